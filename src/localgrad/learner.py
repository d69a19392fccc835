"""``LocalLearner``: a timm model, split, partitioned and ready to train inside anybody's own loop.

It owns no training loop, no data and no device policy; ``step`` takes a batch and trains every local module on it.
The model handed in is trained in place: its ``state_dict()`` is the result, in plain timm naming, at any moment.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad import rules
from localgrad.backbones.base import Backbone, FrozenStem, split
from localgrad.backbones.by_hand import listed
from localgrad.backbones.example import Example
from localgrad.backbones.hooks import has_hooks
from localgrad.errors import (
    BackboneError,
    CheckpointError,
    DataError,
    DeviceError,
    PartitionError,
    RecipeError,
    arg,
)
from localgrad.formats import Json
from localgrad.objectives.auxiliary import carry_exemptions
from localgrad.objectives.averaging import check_moves
from localgrad.objectives.carried import LocalBatch, Route, make_parts, mask_of
from localgrad.objectives.losses import Loss, loss_of
from localgrad.objectives.methods import FeatureReconstruction, Objective, build_objective, is_number
from localgrad.partition import Checkpointing, Plan, Request
from localgrad.partitioning import CheckpointRequest, frozen_from, make_plan, num_parameters, num_trained
from localgrad.step.checkpointing import Recomputed
from localgrad.step.checks import (
    FACTORY,
    Remembered,
    ReplacedOptimizers,
    check_alone,
    check_images,
    check_inputs,
    check_labels,
    check_model,
    check_optimizer,
    check_schedulers,
    check_tensors,
    check_values,
)
from localgrad.step.executor import SequentialExecutor, StepResult, walk
from localgrad.step.global_step import GlobalStep
from localgrad.step.joint_optimizer import JointOptimizer
from localgrad.step.local_module import SHARED, build_local_modules, recomputed_in
from localgrad.step.local_step import LocalStep, StepSettings, autocast, check_precision, drawing_from
from localgrad.step.offload import HOST, Offloader
from localgrad.step.sharding import put_optimizer
from localgrad.step.states import (
    LearnerState,
    check_objective,
    check_optimizer_state,
    check_scaler_state,
    check_weights,
    describe,
    kind_of_optimizer,
    load_weights,
    or_as_before,
)

if TYPE_CHECKING:
    from timm.utils.model_ema import ModelEmaV3
    from torch.distributed import ProcessGroup

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
Factories = OptimizerFactory | Sequence[OptimizerFactory]
NO_LABELS = torch.empty(0)


class Learner(ABC):
    """What trains local modules: all of a model's in one process (``LocalLearner``), or a share (``ParallelLearner``).

    Options are those of both, as in ``LocalLearner``. A learner that is made calls, in this order, ``__init__``, which
    splits and plans; ``_build``, once the model is where its modules are to be made; and ``_remember``, once all is in
    its place.
    """

    is_parallel = False
    """Whether other processes train other modules."""

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: Request | Plan = 4,
        objective: Objective | str | None = None,
        input_size: tuple[int, int, int] | None = None,
        example: Any = None,
        blocks: str | None = None,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] | None = None,
        precision: str = "fp32",
        checkpoint: CheckpointRequest = False,
        compile: bool = False,
        clip_grad: float | None = None,
        accumulation: int | None = None,
        freeze_from: float | None = None,
        auxiliary_from: str = "seed",
        shared: str = "refuse",
        chunk_logits: bool = False,
    ) -> None:
        if shared not in SHARED:
            raise RecipeError(f"shared: unknown {shared!r}; take one of {', '.join(SHARED)}.")
        self.shared, self.chunk_logits = shared, chunk_logits
        _check_options(
            freeze_from=freeze_from, accumulation=accumulation, clip_grad=clip_grad, auxiliary_from=auxiliary_from
        )
        if isinstance(model, Backbone) and input_size not in (None, model.input_size):
            raise BackboneError(f"input_size: {input_size}, but the backbone was split for {model.input_size}.")
        if isinstance(model, Backbone) and (example is not None or blocks is not None):
            raise BackboneError("example, blocks: the backbone was split already; give them to localgrad.split.")
        self.backbone = (
            model if isinstance(model, Backbone) else split(model, input_size, example=example, blocks=blocks)
        )
        self.model = self.backbone.model
        self.loss = loss_of(loss, self.backbone)
        check_model(self.backbone, self.loss)
        if checkpoint is False and self.backbone.recomputes:  # timm's own flag is on
            checkpoint = "blocks"
        if isinstance(objective, str):
            objective = build_objective(objective, {})
        if objective is not None and not isinstance(objective, Objective):
            raise RecipeError(
                f"{arg('objective')}: got {objective!r}, not an objective; make one, such as GreedySupervised() or "
                "FeatureReconstruction(), or name one."
            )
        self.objective = objective or FeatureReconstruction()
        self.plan = make_plan(self.backbone, modules, checkpoint=checkpoint)
        self.freeze_from = freeze_from
        self.seed = torch.initial_seed()  # with the batch's number, of what each of several modules draws
        self._auxiliary_from = auxiliary_from
        self._passed_by = self.backbone.modules_passed_by
        self._hooks_said: set[str] = set()
        self.precision = precision
        self._ema: ModelEmaV3 | None = None
        self._settings: StepSettings = {
            "precision": precision,
            "clip_grad": clip_grad,
            "accumulation": accumulation or self.plan.accumulation,
            "compile": compile,
        }
        self._planned_batch: int | None = None  # until a step has said that batches are of another size
        self._twins: ProcessGroup | None = None  # processes that train the same modules on other images
        self._executor: SequentialExecutor | None = None
        self._replaced = ReplacedOptimizers()
        self._joint: JointOptimizer | None = None
        self.optimizer_factory: Factories | None = None
        self.num_steps = 0
        self._progress = 0.0
        self._values_checked = False
        self._still: list[nn.Module] = []  # modules that were put in evaluation mode one by one

    def _build(self, *, overlap: int = 0) -> None:
        """Make the local modules, where the backbone is; their parts are the model's own."""
        check_precision(self.precision, self.device, self.backbone.dtype)
        draws_by_seed = self._auxiliary_from == "seed"
        self.modules = build_local_modules(
            self.backbone,
            self.plan,
            self.objective,
            overlap=overlap,
            shared=self.shared,
            loss=self.loss,
            chunk_logits=self.chunk_logits,
            drawing=lambda index: drawing_from(self.device, (self.seed, index) if draws_by_seed else None),
        )
        self.route = Route(module.objective.uses for module in self.modules)
        compiled = self._settings["compile"]
        if compiled and self.backbone.trunk is not None:
            raise RecipeError(
                f"compile: {type(self.model).__name__} was split by watching it run, and what lies between its blocks "
                "can't be compiled yet; leave compile out."
            )
        more = {"overlap": overlap, "chunk_logits": self.chunk_logits}
        rules.check({"reconcile": self.uses("gradient"), "compile": compiled, **more})
        self._say_what_is_passed_by(stacklevel=4)
        self._say_what_goes_past_features(stacklevel=4)

    def _remember(self) -> None:
        """Note what the learner is made of, for ``check_ready``; once all is in its place."""
        ours = {f"local module {index}": module for index, module in enumerate(self.modules)}
        self._made_of = Remembered({"": self.model, **ours})
        others = {*self.model.modules(), *(net for module in self.modules for net in module.objective.modules())}
        self._wrappers = [module for module in self._made_of.modules if module not in others]
        weights = self.backbone.stem.parameters()
        self._image_dtypes = list(dict.fromkeys(weight.dtype for weight in weights if weight.is_floating_point()))

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        for mine, copied in zip(self.modules, twin.modules, strict=True):
            carry_exemptions(mine.parameters(), copied.parameters())
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Not picklable: it holds functions that were found out about the model."""
        raise CheckpointError(
            f"{type(self).__name__}: it can't be pickled; save learner.state_dict(), and load that into a learner made "
            "alike (copy.deepcopy makes a copy in memory)."
        )

    def uses(self, what: str) -> bool:
        """Whether a local objective looks at something beside its module's features; see ``Term.uses``."""
        return any(what in module.objective.uses for module in self.modules)

    def _say_what_is_passed_by(self, stacklevel: int) -> None:
        """What users set on the model itself or on a stage isn't met where blocks are called one by one."""
        hooked = [name for name, module in self._passed_by if name not in self._hooks_said and has_hooks(module)]
        if hooked:
            self._hooks_said.update(hooked)
            warnings.warn(
                f"hooks of {', '.join(hooked)} don't run in training, since blocks are called one by one: set them on "
                "blocks, or on the parts of blocks.",
                stacklevel=stacklevel,
            )

    def _say_what_goes_past_features(self, stacklevel: int) -> None:
        """Warn of weights of the stem that only the first module's blocks train, though others read what they make.

        Raises:
            BackboneError: none of the first module's reads it, so it would never learn.
        """
        partly = []
        for name, modules in self.backbone.past_features(self.plan.boundaries):
            if modules[0] > 0:
                raise BackboneError(
                    f"{name}: the stem makes something of it for blocks of local module {modules[0]}, beside the "
                    "features; no gradient comes back from there, so it would never learn. Choose modules=[...] that "
                    "keep these blocks in the first, or hold it in the blocks that read it."
                )
            if len(modules) > 1:
                partly.append(name)
        if partly:
            warnings.warn(
                f"{listed(partly)}: blocks of several local modules read what the stem makes of it, beside features; "
                "those of the first one alone train it.",
                stacklevel=stacklevel,
            )

    def _say_what_differs(self, *, overlap: int = 0, offload: bool = False) -> None:
        """Warn where a plan was made for something else: it trains all the same, but its forecast isn't of this."""
        plan, settings = self.plan, self._settings
        here: dict[str, Json] = {
            "device": self.device.type,
            "input_size": list(self.backbone.input_size),
            "num_classes": self.backbone.num_classes,
            "num_parameters": num_parameters(self.backbone),
            "num_trained": num_trained(self.backbone),
            "dtype": str(self.backbone.dtype),
            "training.freeze_from": self.freeze_from,
            "execution.precision": self.precision,
            "execution.compile": settings["compile"],
            "local.overlap": overlap,
            "objective": self.objective.described,
            "loss": self.loss.described,
            "shared": self.shared,
            "chunk_logits": self.chunk_logits,
        }
        different = plan.differences(here)
        if plan.forecast and settings["accumulation"] != plan.accumulation:
            different.append(f"accumulation {plan.accumulation}, here {settings['accumulation']}")
        for name, value in (("clip_grad", settings["clip_grad"]), ("ema_decay", self._ema)):
            planned = plan.made_for.get(f"training.{name}")
            if plan.made_for and (planned is None) != (value is None):
                different.append(f"{'no ' if planned is None else ''}{name}, here {'none' if value is None else 'one'}")
        if offload and plan.made_for:
            different.append("no offload, here it is on")
        if plan.is_for_ranks and not self.is_parallel:
            different.append("several processes, here one")
        _warn_of_plan(different)
        batch = plan.made_for.get("training.batch_size")
        self._planned_batch = batch if isinstance(batch, int) else None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this process trains."""

    @property
    @abstractmethod
    def own(self) -> range:
        """The local modules that this process trains."""

    @abstractmethod
    def configure_optimizers(self, factory: Factories) -> None:
        """Make one optimizer for each own module, by one factory or by one each."""

    @abstractmethod
    def step(self, images: Any, labels: Tensor | None = None) -> StepResult:
        """Train the own modules on one batch."""

    def label_shape(self, num_items: int) -> tuple[int, ...]:
        """Of the labels of a batch."""
        return self.loss.label_shape(num_items, self.backbone)

    def _device_of(self, parameters: Sequence[nn.Parameter]) -> torch.device:
        """Where a local module trains; where it is."""
        return parameters[0].device

    @abstractmethod
    def _take_weights(self, weights: dict[str, Tensor], averages: dict[str, Tensor] | None) -> None:
        """Take a whole model's weights, or what this process has of them, and those of its average."""

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Each local module's optimizer, once configured."""
        return tuple(step.optimizer for step in self._executor.steps) if self._executor else ()

    @property
    def optimizer(self) -> JointOptimizer:
        """All of them as one, for schedulers and frameworks; its ``step`` has nothing left to do after ``step`` here.

        Raises:
            RecipeError: no optimizers yet.
        """
        if self._joint is None:
            raise no_optimizers()
        return self._joint

    @property
    def gradient_norms(self) -> tuple[Tensor | None, ...]:
        """Norm of each local module's gradient in the last ``step``, before clipping: scalars on the device.

        ``None`` without ``clip_grad``, where nothing computes it; of a module that is frozen; after an end-to-end step.
        In fp16 one that overflowed is infinite or NaN: that module skipped its update.
        """
        return tuple(step.gradient_norm for step in self._executor.steps) if self._executor else ()

    def parameters(self, index: int) -> list[nn.Parameter]:
        """Trainable parameters of a local module: the model's in the model's own order, then the auxiliary nets'.

        With one module this is ``list(model.parameters())``, so that clipping sums in the usual order.
        """
        rank = {id(parameter): number for number, parameter in enumerate(self.model.parameters())}
        read = set(map(id, self.modules[index].reads))
        weights = (weight for weight in self.modules[index].parameters() if id(weight) not in read)
        trainable = [weight for weight in weights if weight.requires_grad]
        return sorted(trainable, key=lambda parameter: rank.get(id(parameter), len(rank)))

    def _make_steps(self, factory: Factories) -> list[LocalStep]:
        self._made_of.check()
        steps = [self.local_step(index, factory) for index in self.own]
        kinds = dict.fromkeys(kind_of_optimizer(step.optimizer) for step in steps)
        _warn_of_plan(self.plan.differences({"optimizer": ", ".join(kinds)}))
        return steps

    def _take_executor(self, executor: SequentialExecutor) -> None:
        """From now on train so; who recovers from memory that runs out, and what is frozen, goes on."""
        executor.recover = None if self._executor is None else self._executor.recover
        self._replaced.add(self.optimizers)
        self._executor = executor
        self._joint = JointOptimizer(self.optimizers)
        self._values_checked = False
        self._freeze()

    def _seed(self, steps: Sequence[LocalStep]) -> None:
        """Make what each module draws its own, wherever it runs; one module draws as any PyTorch loop does."""
        for index, step in zip(self.own, steps, strict=False):  # there may be none yet
            step.seed = (self.seed, index) if len(self.modules) > 1 else None

    def local_step(self, index: int, factory: Factories) -> LocalStep:
        """Make the step of one local module alone, on the device where that module is.

        The learner keeps neither the step nor its optimizer.

        Args:
            index: which module.
            factory: called with its trainable parameters; or one a module.

        Raises:
            RecipeError: the module has nothing to train, or what the factory made isn't an optimizer of just that.
        """
        if not callable(factory):
            if not isinstance(factory, (list, tuple)) or not all(map(callable, factory)):
                raise RecipeError(
                    f"configure_optimizers: got {type(factory).__name__}, not a factory or a list of them; write "
                    f"{FACTORY}."
                )
            if len(factory) != len(self.modules):
                raise RecipeError(
                    f"{len(factory)} optimizer factories were given for {len(self.modules)} local modules."
                )
            make = factory[index]
        else:
            make = factory
        parameters = self.parameters(index)
        if not parameters:
            raise RecipeError(f"local module {index} has no trainable parameter; unfreeze some, or use fewer modules.")
        places = dict.fromkeys(weight.device for weight in self.modules[index].parameters())
        if len(places) > 1:
            raise DeviceError(
                f"local module {index}: its weights are on {' and '.join(map(str, places))}; move the model first, "
                "then make the learner: LocalLearner(model.to(device), ...)."
            )
        device = self._device_of(parameters)
        optimizer = make(parameters)
        check_optimizer(optimizer, parameters, index, self.names_of_parameters)
        return LocalStep(self.modules[index], parameters, optimizer, device=device, twins=self._twins, **self._settings)

    def names_of_parameters(self) -> dict[int, str]:
        """Of all parameters, by ``id``."""
        named = list(self.model.named_parameters())
        for index, module in enumerate(self.modules):
            named += module.objective.named_parameters(prefix=f"modules.{index}.objective")
        return {id(weight): name for name, weight in named}

    def check_ready(self, steps: Sequence[LocalStep]) -> bool:
        """Refuse to train a model that was changed since the learner or its optimizers were made.

        It compares objects, with no operator and without waiting for the device. Hooks that were set since and won't
        run are warned of, once.

        Args:
            steps: those that are to be run.

        Returns:
            Whether weights were frozen or unfrozen since the last one.

        Raises:
            RecipeError: weights are in no optimizer; or schedulers are attached to some optimizers alone, or to
                those that others have replaced.
            BackboneError: a module or parameter was replaced, or has another dtype.
            DeviceError: the model was moved.
        """
        self._made_of.check()
        self._say_what_is_passed_by(stacklevel=6)
        changed = [step.follow_model() for step in steps]
        check_schedulers([step.optimizer for step in steps])
        self._replaced.check()
        return any(changed)

    def _check_batch(self, batch: LocalBatch, *, is_part: bool = False) -> None:
        images, size = batch.images, self.backbone.input_size
        check_tensors(batch)
        stem = self.backbone.stem
        if isinstance(stem, FrozenStem) and stem.passes:  # from a cache of our own, made of checked images
            assert tuple(batch.features.shape[1:]) == tuple(self.backbone.layouts[0].shape), "as they were made"
            return
        if self.backbone.trunk is not None and images is not None:
            check_inputs(batch, self.backbone.given)
            size = size if images.is_floating_point() else tuple(images.shape[1:])
        if images is None or tuple(images.shape[1:]) != size:
            got = None if images is None else list(images.shape)
            raise BackboneError(
                f"images: got {got}, but this learner was made for "
                f"[B, {', '.join(map(str, size))}]; pass input_size= for another size."
            )
        autocasts = self.precision != "fp32" or torch.is_autocast_enabled(self.device.type)
        check_images(
            images,
            self._image_dtypes,
            self.device,
            autocasts=autocasts,
            is_image=not self.backbone.takes_ids,
        )
        check_labels(batch.labels, images, self.backbone.num_classes, self.loss)
        if not self._values_checked:
            check_values(batch, self.backbone.num_classes, self.loss, is_part=is_part)
            self._values_checked = True

    def _in_training(self) -> None:
        """Have the model in training mode, but for the modules that someone put in evaluation mode one by one."""
        if self.model.training and self.modules[self.own[0]].training:
            for wrapper in self._wrappers:  # made while the model was in evaluation mode, they would stay there
                wrapper.training = True
            self._note_still()
        else:
            self.train()

    def _note_still(self) -> None:
        """Note which modules are in evaluation mode while the model is in training mode."""
        if self.modules[self.own[0]].training:
            self._still = [module for module in self._made_of.modules if not module.training]
        else:  # evaluated by us, and then put back by someone who knows the model only
            theirs = dict.fromkeys(self.model.modules())
            ours = [module for module in self._still if module not in theirs]
            self._still = [*ours, *(module for module in theirs if not module.training)]

    def _count_step(self) -> None:
        self.num_steps += 1
        if self._joint is not None:
            self._joint.num_updates += 1

    def at(self, progress: float) -> None:
        """Tell the learner how much of its training is over, for what changes over time.

        Args:
            progress: from 0 to 1.

        Raises:
            RecipeError: it lies outside.
        """
        if not is_number(progress) or not 0 <= progress <= 1:
            raise RecipeError(
                f"progress is a share of the training, from 0 to 1, got {progress!r}; give min(1.0, step / num_steps)."
            )
        for index in self.own:
            self.modules[index].objective.at(progress)
        self._progress = progress
        self._freeze()

    def _freeze(self) -> None:
        steps = () if self._executor is None else self._executor.steps
        for index, step in zip(self.own, steps, strict=False):
            begins = frozen_from(self.freeze_from, index, len(self.modules))
            step.frozen = begins is not None and self._progress >= begins

    def on_out_of_memory(self, recover: Callable[[int], bool] | None) -> None:
        """Have someone asked when memory runs out in a step.

        Args:
            recover: given the module, makes room (``run_as``) and answers whether its step is to be run again.

        Raises:
            RecipeError: no optimizers yet.
        """
        if self._executor is None:
            raise no_optimizers()
        self._executor.recover = recover

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  # torch's own signature
        """Put the model and the auxiliary nets in training mode (or, with ``False``, in evaluation mode).

        Modules that were put in evaluation mode one by one, while the model was in training mode, stay there:
        ``model.train()`` puts those back, too.
        """
        if self.model.training:
            self._note_still()
        for module in self.modules:
            module.train(mode)
        self.model.train(mode)  # last: a model's own train() may keep parts of it still
        for still in self._still if mode else ():
            still.training = False
        return self

    def eval(self) -> Self:
        """Put the model and the auxiliary nets in evaluation mode."""
        return self.train(mode=False)

    def load_state_dict(self, state: LearnerState) -> None:
        """Take up a state from ``state_dict``, whose tensors are copied.

        Raises:
            CheckpointError: it is of another model, partition, objective or optimizer, or made before optimizers were
                configured; the learner is as it was.
        """
        steps = self._executor.steps if self._executor else ()
        self.check_state_dict(state)
        with or_as_before([step.optimizer for step in steps]):
            for index, step in zip(self.own, steps, strict=False):  # there may be none
                put_optimizer(step.optimizer, copy.deepcopy(state["optimizers"][index]))
            self._take_weights(state["model"], state["averaged_model"])
        for index in self.own:
            load_weights(self.modules[index].objective, state["objectives"][index])
        for index, step in zip(self.own, steps, strict=False):
            step.scaler.load_state_dict(state["scalers"][index])
        self.num_steps, self.seed = state["num_steps"], state["seed"]
        if self._joint is not None:
            self._joint.num_updates = 0
        self._seed(steps)

    def check_state_dict(self, state: LearnerState) -> None:
        """Refuse what ``load_state_dict`` would refuse; nothing is changed.

        Raises:
            CheckpointError: as there.
        """
        steps = self._executor.steps if self._executor else ()
        needed = ("model", "objectives", "optimizers", "scalers", "averaged_model", "num_steps", "seed", "boundaries")
        missing = [key for key in needed if not isinstance(state, Mapping) or key not in state]
        if missing:
            raise CheckpointError(f"checkpoint: it has no {', '.join(missing)}; give what learner.state_dict() gave.")
        found, own = ((tuple(state["boundaries"]), len(state["optimizers"])), len(self.modules) if steps else 0)
        if found != (self.plan.boundaries, own):
            raise CheckpointError(
                f"checkpoint: it has boundaries {list(found[0])} and {found[1]} optimizers, this learner "
                f"{list(self.plan.boundaries)} and {own}; use the same modules, and configure optimizers first."
            )
        lengths = {key: len(state[key]) for key in ("objectives", "scalers")}
        if lengths != {"objectives": len(self.modules), "scalers": own}:
            raise CheckpointError(
                f"checkpoint: it has {lengths['objectives']} objectives and {lengths['scalers']} scalers for "
                f"{len(self.modules)} local modules; it isn't whole."
            )
        check_objective(state.get("objective"), self.objective)
        if self._ema is not None and state["averaged_model"] is None:
            raise CheckpointError("checkpoint: it holds no average of the weights; leave ema_decay out.")
        if self._ema is None and state["averaged_model"] is not None:
            raise CheckpointError(
                "checkpoint: it holds an average of the weights, and this learner keeps none; make it with ema_decay, "
                "or set state['averaged_model'] = None to drop it."
            )
        check_weights(self.model, state["model"])
        if state["averaged_model"] is not None:
            check_weights(self.model, state["averaged_model"])
        classes: Sequence[str | None] = state.get("optimizer_classes") or [None] * len(self.modules)
        for index in self.own:
            check_weights(self.modules[index].objective, state["objectives"][index])
        for index, step in zip(self.own, steps, strict=False):
            saved, kind = state["optimizers"][index], classes[index]
            check_optimizer_state(step.optimizer, saved, kind, index, self.names_of_parameters)
            check_scaler_state(step.scaler, state["scalers"][index], index)


@final
class LocalLearner(Learner):
    """Trains a timm model as gradient-isolated local modules.

    Where something changes over the training (an objective's ``over_time`` and ``context``, ``freeze_from``), call
    ``at`` before each step.

    Args:
        model: any timm model that ``localgrad.split`` takes, on its device; or a backbone that is split already.
        modules: how many local modules (balanced by activation bytes), ``"stages"``, explicit boundaries (the
            first block of every module but the first), or a ``Plan``. 1 is end-to-end training. A plan made for
            other settings, another device or smaller batches trains, with a warning that its forecast isn't of this.
        objective: what every module but the last is trained on, or its name; by default ``FeatureReconstruction()``.
        input_size: (C, H, W) of the images; by default the model's own.
        example: for a model that isn't timm's, a batch as it is called with, see ``split``.
        blocks: dotted name of the container of its blocks, see ``split``.
        loss: of every module's task, by name or a function of (logits, labels), see ``objectives/losses.py``; by
            default cross-entropy, of the next token for causal language models of transformers.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast.
        checkpoint: what modules recompute in their backward pass: ``"blocks"`` (or ``True``), ``"halves"``,
            ``"halves/8"`` (over 8 chunks of the batch), ``"halves/8:3"`` (the first three blocks), ``"none"``; one for
            all, or a list; not beside a ``Plan``, which says it (``dataclasses.replace(plan, checkpoint=...)`` makes
            another). By default blocks where ``model.set_grad_checkpointing()`` is on, else none.
        compile: run each local module through ``torch.compile``.
        clip_grad: largest norm of each module's gradient.
        accumulation: parts that ``step`` cuts a batch into, to save memory; one update a step all the same. What looks
            at a whole batch (batch norms, the contrastive term) then looks at a part. By default as a ``Plan`` says.
        ema_decay: keep an exponential moving average of the model's weights, in ``averaged_model``.
        offload: keep modules that don't train, their optimizer state and the average in host memory. ``eval()`` brings
            the whole model there.
        device: where to train, with ``offload`` only; by default where the model is. The model may stay on the CPU.
        overlap: last blocks of the module before that each module's loss trains as well (all of a module that has
            fewer, which is said); they run in both (as in
            interlocking backpropagation, arXiv 2010.04116, whose windows overlap by whole modules).
        freeze_from: share of the training after which modules stop to learn: the first one then, each next one later,
            the last never; ``at`` tells the learner how much is over. As in FreezeOut (arXiv 1706.04983), by module. A
            frozen module's batch norms use their running statistics, which stay; dropout and drop path go on.
        global_checkpoint: what an end-to-end step (``global_step``) recomputes, as for ``checkpoint``.
        auxiliary_from: what auxiliary nets are initialised from: the ``seed`` alone, that is what ``torch.manual_seed``
            was last given, whatever was drawn since; or torch's random ``state``, as any new layer is.

        shared: of a parameter w that modules on both sides of a boundary read (tied embeddings, a position bias of all
            blocks): ``"refuse"``; ``"last"``: the last of them trains it, w <- U_l(w, g_l), and the others read it; or
            ``"average"``: each of them trains a copy, and after each step w <- mean over m of U_m(w, g_m), with g_m the
            gradient of module m's loss and U_m the update of its optimizer, whose state is its own. (Frozen modules
            aren't in the mean; an end-to-end step updates w once, by the optimizer of the first that has it.)
        chunk_logits: make the logits of a language model's own end chunk by chunk, too, and again in the backward pass:
            those of a large vocabulary are then never whole in memory, and results have none. Rounds otherwise.
        alone: train beside other processes of torch.distributed and average nothing with them, each a model of its own.
            Otherwise steps are refused there, as loops that start several processes count on averaged gradients.

    Two learners of equal models that are made after the same ``torch.manual_seed`` are the same, and draw the same in
    their steps, whether the seed was set before or after the model was made. (With one module, steps draw from torch's
    random state, as in any loop.) Making one leaves that state as it was.

    Raises:
        BackboneError: the model can't be split, a parameter is shared across a boundary, or there is one class only.
        PartitionError: the modules asked for can't be made.
        RecipeError: an option has an impossible value, or doesn't go with another.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: Request | Plan = 4,
        objective: Objective | str | None = None,
        input_size: tuple[int, int, int] | None = None,
        example: Any = None,
        blocks: str | None = None,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] | None = None,
        precision: str = "fp32",
        checkpoint: CheckpointRequest = False,
        compile: bool = False,
        clip_grad: float | None = None,
        accumulation: int | None = None,
        ema_decay: float | None = None,
        offload: bool = False,
        device: torch.device | str | None = None,
        overlap: int = 0,
        freeze_from: float | None = None,
        global_checkpoint: str | Checkpointing = "blocks",
        auxiliary_from: str = "seed",
        shared: str = "refuse",
        chunk_logits: bool = False,
        alone: bool = False,
    ) -> None:
        _check_overlap(overlap)
        rules.check({"overlap": overlap, "freeze_from": freeze_from, "offload": offload, "device": device})
        super().__init__(
            model,
            modules=modules,
            objective=objective,
            input_size=input_size,
            example=example,
            blocks=blocks,
            loss=loss,
            precision=precision,
            checkpoint=checkpoint,
            compile=compile,
            clip_grad=clip_grad,
            accumulation=accumulation,
            freeze_from=freeze_from,
            auxiliary_from=auxiliary_from,
            shared=shared,
            chunk_logits=chunk_logits,
        )
        self.alone = alone
        self.overlap = overlap
        self.offload = offload
        self.global_checkpoint = Checkpointing.parse(global_checkpoint, "global_checkpoint")
        self._global_step: GlobalStep | None = None
        self._global_recomputed: list[dict[int, Recomputed]] | None = None
        self._device: torch.device | None = None
        if offload:
            self._device = torch.device(device or self.device)
            self.backbone.to(HOST)
        self._build(overlap=overlap)
        rules.check({"teacher_share": self.uses("teacher"), "ema_decay": ema_decay})
        self._offloader = None if self._device is None else Offloader(self.modules, self._device)
        self._ema = make_ema(self.model, ema_decay, on_host=offload)
        self.averaged_model: nn.Module | None = None if self._ema is None else self._ema.module
        self._say_what_differs(overlap=overlap, offload=offload)
        self._say_short_overlap()
        self._remember()

    def _say_short_overlap(self) -> None:
        """Warn where modules have fewer blocks than the next ones are to train as well."""
        blocks = [len(span) for span in self.plan.spans[:-1]]
        short = [f"{index} ({count})" for index, count in enumerate(blocks) if count < self.overlap]
        if short:
            warnings.warn(
                f"{arg('overlap', self.overlap)}: local modules that have fewer blocks are trained by the next one as "
                f"a whole, and no further back: {', '.join(short)}.",
                stacklevel=3,
            )

    @property
    def device(self) -> torch.device:
        """Where the model trains; without offloading, where it is."""
        return self._device or next(self.model.parameters()).device

    def _device_of(self, parameters: Sequence[nn.Parameter]) -> torch.device:
        return self._device or super()._device_of(parameters)

    @property
    def own(self) -> range:
        """The local modules that this process trains: all of them."""
        return range(len(self.modules))

    def configure_optimizers(self, factory: Factories) -> None:
        """Make one optimizer a local module.

        Args:
            factory: called once for each module with its trainable parameters, to make an optimizer of all of them and
                no others; or a list of such factories, one a module.

        Raises:
            RecipeError: a module has nothing to train, or what a factory made isn't an optimizer of what it was given;
                the learner is as it was.
            BackboneError: the model was changed since the learner was made.
        """
        steps = self._make_steps(factory)
        self.optimizer_factory = factory
        self._global_step = None  # it holds the optimizers of before
        self._seed(steps)
        if self._offloader is not None:
            self._offloader.attach([step.optimizer for step in steps])
        around = None if self._offloader is None else self._offloader.training
        self._take_executor(SequentialExecutor(steps, around, route=self.route))

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  # torch's own signature
        """As of any learner; with offloading, evaluation mode brings the model together in host memory."""
        if self._offloader is not None and not mode:
            self._offloader.rest()
        return super().train(mode)

    def load_state_dict(self, state: LearnerState) -> None:
        """As of any learner; with offloading, the model is then in host memory."""
        if self._offloader is not None:
            self._offloader.rest()
        super().load_state_dict(state)

    def step(self, images: Any, labels: Tensor | None = None) -> StepResult:
        """Train every local module on one batch: K forwards, K losses, K backwards, K updates.

        The model trains in training mode, but for modules of it that you put in evaluation mode one by one (norms that
        are to stay still): ``learner.eval()``, ``learner.train()`` and steps leave those as they are. Gradients of
        another backward pass, or of a step that failed, are dropped first. Values are looked at in the first step only,
        which waits for the device; a later batch of which no label counts has the loss NaN, as in PyTorch. On the
        processor labels beyond the classes are refused in any step.

        Args:
            images: [B, C, H, W], normalised, of the model's dtype and on its device; or what else the model is called
                with, as its example: a tensor, a tuple, or a dict, which may hold the labels.
            labels: class indices int64 [B], -100 for an image whose label doesn't count; or soft targets
                [B, num_classes], probabilities.

        Returns:
            Logits, losses and terms, detached.

        Raises:
            RecipeError: no optimizers yet, schedulers for some of them only, weights that no optimizer holds, or
                gradients that are off (``torch.no_grad``).
            ParallelError: other processes train beside this one, and it wasn't made with ``alone``.
            BackboneError: images of another size, dtype or device than the model was split for; or the model was
                changed since the learner was made.
            DataError: an empty batch; labels that don't fit the images or the classes; images that aren't finite.
        """
        return self.step_on(LocalBatch.of(images, labels))

    def step_on(self, batch: LocalBatch) -> StepResult:
        """As ``step``, on a batch that gives its images away: they are freed as soon as no module needs them.

        Args:
            batch: images and labels; ``batch.images`` may be ``None`` afterwards.
        """
        executor = self._begin(batch)
        batch.number = self.num_steps
        executor.route.begin(batch, self)
        with self._stepping(batch):
            return executor.step(batch)

    def step_parts(self, parts: Sequence[Any], *, logits: bool = True) -> tuple[StepResult, ...]:
        """Train every local module on one batch that comes in parts, such as those that a data loader gave in a row.

        As ``accumulation``, of a batch that is cut already: parts may be of other sizes and lengths. Each module runs
        all of them before its one update; means are over what counts in all.

        Args:
            parts: what the model is called with, each with labels in it: dicts, or pairs of inputs and labels.
            logits: whether results have them: those of all parts can be most of the memory.

        Returns:
            What each part gave; losses and terms are its share of the batch's: those of all parts add up.

        Raises:
            RecipeError: there are no parts, or ``accumulation`` is to cut them once more; and what ``step`` raises.
        """
        if not isinstance(parts, (list, tuple)):
            raise RecipeError(f"step_parts: got a {type(parts).__name__}; give a list of parts, each with its labels.")
        if not parts or self._settings["accumulation"] > 1:
            raise RecipeError(
                f"step_parts: got {len(parts)} parts for a learner of {arg('accumulation')} "
                f"{self._settings['accumulation']}; give one or more to a learner of {arg('accumulation', 1)}."
            )
        batches = [LocalBatch.of(*part) if isinstance(part, (tuple, list)) else LocalBatch.of(part) for part in parts]
        executor = self._begin(*batches)
        for batch in batches:
            batch.number = self.num_steps
            executor.route.begin(batch, self)
        make_parts(batches)
        with self._stepping(*batches):
            return tuple(executor.step_parts(batches, logits=logits))

    def _begin(self, *parts: LocalBatch) -> SequentialExecutor:
        """Refuse a step that would train something else than it seems, before anything is changed."""
        if self._executor is None:
            raise no_optimizers()
        if not self.alone:
            check_alone(self._executor.steps[0].parameters[0])
        if self.check_ready(self._executor.steps):
            self._global_step = None  # it holds the weights of before
        is_checked = self._values_checked
        for part in parts:
            self._values_checked = is_checked
            self._check_batch(part, is_part=len(parts) > 1)
            self._say_if_larger(part)
            part.loss = self.loss
        return self._executor

    def _say_if_larger(self, batch: LocalBatch) -> None:
        """Warn, once, of a batch of more or longer items than the plan's; smaller ones need less."""
        if self._planned_batch is None:
            return
        shape, here = batch.features.shape[1:], dict[str, Json]()
        if len(batch.labels) > self._planned_batch:
            here["training.batch_size"] = len(batch.labels)
        if math.prod(shape) > math.prod(self.backbone.input_size):
            here["input_size"] = list(shape)
        if here:
            _warn_of_plan(self.plan.differences(here))
            self._planned_batch = None

    def global_step(self, images: Any, labels: Tensor | None = None) -> StepResult:
        """Train all modules end to end on one batch, recomputing as ``global_checkpoint`` says.

        The task loss of the model's own logits reaches every module; auxiliary nets have no part in it. The
        optimizers are the modules' own.

        Args:
            images: [B, C, H, W], normalised, on the model's device.
            labels: as for ``step``.

        Returns:
            Figures of the last module; the others have no losses.

        Raises:
            RecipeError: modules are offloaded; and what ``step`` raises.
        """
        return self.global_step_on(LocalBatch.of(images, labels))

    def global_step_on(self, batch: LocalBatch) -> StepResult:
        """As ``global_step``, on a batch.

        Args:
            batch: images and labels.
        """
        if self._executor is not None and self._offloader is not None:
            raise RecipeError("an end-to-end step needs all modules on the device; leave offload out, or global steps.")
        executor = self._begin(batch)
        steps = executor.steps
        with self._stepping(batch):
            for attempt in executor.attempts("an end-to-end step", steps):
                with attempt:
                    if self._global_step is None:
                        self._say_unplanned_global_step()
                        self._global_step = GlobalStep(steps, self._recomputed_globally())
                    result = self._global_step(batch)
        return result

    def _say_unplanned_global_step(self) -> None:
        plan = self.plan
        if plan.made_for and plan.num_modules > 1 and plan.global_checkpoint is None:
            _warn_of_plan(["no end-to-end steps (global_share), here there are some"])

    def _recomputed_globally(self) -> list[dict[int, Recomputed]]:
        if self._global_recomputed is None:
            plan = replace(self.plan, checkpoint=(self.global_checkpoint,) * self.plan.num_modules)
            indices = range(len(self.modules))
            found = [recomputed_in(self.backbone, plan, index, overlap=self.overlap) for index in indices]
            self._global_recomputed = found
        return self._global_recomputed

    @contextlib.contextmanager
    def _stepping(self, *parts: LocalBatch) -> Iterator[None]:
        """A region for a step, which counts once it is done; one that fails tells what it has changed."""
        self._in_training()
        steps = self._executor.steps if self._executor else ()
        before = [each.num_updates for each in steps]
        try:
            yield
            self._count_step()
            if self._ema is not None:
                self._ema.update(self.model, step=self.num_steps)
        except BaseException as error:
            told = self._in_words(error, parts)
            for note in self._half_done(before):
                told.add_note(note)
            if told is error:
                raise
            raise told from error

    def _in_words(self, error: BaseException, parts: Sequence[LocalBatch]) -> BaseException:
        """What ended a step: of labels of no class, which processors find in any step, what the first step says."""
        if isinstance(error, IndexError):
            try:
                for part in parts:
                    check_values(part, self.backbone.num_classes, self.loss, is_part=len(parts) > 1)
            except DataError as told:
                return told
        return error

    def _half_done(self, before: Sequence[int]) -> Iterator[str]:
        """What an unfinished step has changed, in words.

        Args:
            before: updates of each module before it.
        """
        steps = self._executor.steps if self._executor else ()
        done = [str(index) for index, step in enumerate(steps) if step.num_updates > before[index]]
        torn = [str(index) for index, step in enumerate(steps) if step.updating]
        begun = f"localgrad: step {self.num_steps} wasn't finished:"
        if done or torn:
            partly = f"; those of {torn[0]} perhaps in part" if torn else ""
            others = "the others weren't" if len(done) < len(steps) else "the average of weights may not be"
            yield (
                f"{begun} weights of local modules {', '.join(done) or 'none'} were updated, {others}{partly}. The "
                "next step goes on from there; load_state_dict goes back."
            )
        else:
            yield f"{begun} no weights were updated (running statistics may have moved). The next step begins anew."

    @torch.no_grad()
    def logits(self, images: Any) -> tuple[Tensor | None, ...]:
        """Class logits of each module's own classifier, the whole model's last; nothing is trained.

        Call ``eval()`` first, as with any model, or the model's own.

        Args:
            images: [B, C, H, W].

        Returns:
            For each module [B, num_classes], or ``None`` where its objective has no classifier.

        Raises:
            BackboneError: the model was changed since the learner was made.
        """
        self._made_of.check(trains=False)
        if not self.model.training and any(module.training for module in self.modules):
            self.eval()
        found = []
        batch = LocalBatch.of(images, NO_LABELS)
        self.modules[0].begin_batch(batch)
        mask = mask_of(batch, self) if self.uses("mask") else None
        for visit in walk(self.modules, batch):
            with self._on_device(visit.index), autocast(self.device.type, self.precision):
                passed = visit.module.run_parts(visit.received)
                found.append(visit.module.objective.classify(passed.outputs, mask))
            visit.hand_on(passed.handed_on)
        return tuple(found)

    @torch.no_grad()
    def averaged_logits(self, images: Any) -> Tensor:
        """Class logits of the averaged model, in evaluation mode.

        Args:
            images: [B, C, H, W], or what else the model is called with.

        Returns:
            [B, num_classes].

        Raises:
            RecipeError: no average is kept.
        """
        if self.averaged_model is None:
            raise RecipeError("no average of the weights: make the learner with ema_decay=0.9998, say.")
        if self._offloader is None:
            if self.averaged_model.training:
                self.averaged_model.eval()
            given = Example.of(images, "inputs")
            with autocast(given.tensor.device.type, self.precision):
                if given.is_single:
                    return self.backbone.logits_of(self.averaged_model, given.tensor)
                return given.call(self.averaged_model)
        self.eval()
        with _exchanged(self.model, self.averaged_model):  # the model's modules are those that come and go
            last = self.logits(images)[-1]
        assert last is not None, "the last module ends in the model's own classifier"
        return last

    def _on_device(self, index: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._offloader is None else self._offloader.using(index)

    def host_tensors(self) -> list[Tensor]:
        """Every tensor that is parked in host memory; none without offloading."""
        if self._offloader is None:
            return []
        average = self.averaged_model
        return self._offloader.host_tensors() + ([] if average is None else [*average.parameters(), *average.buffers()])

    def run_as(self, plan: Plan) -> None:
        """From now on recompute and accumulate as another plan of the same boundaries says; nothing else changes.

        Raises:
            PartitionError: the plan has other boundaries.
        """
        if plan.boundaries != self.plan.boundaries:
            raise PartitionError(f"plan: its boundaries are {list(plan.boundaries)}, not {list(self.plan.boundaries)}.")
        self.plan = plan
        self._settings["accumulation"] = plan.accumulation
        if plan.global_checkpoint is not None:
            self.global_checkpoint = plan.global_checkpoint
            self._global_step = self._global_recomputed = None
        for index, module in enumerate(self.modules):
            module.recomputed = recomputed_in(self.backbone, plan, index, overlap=self.overlap)
        for step in self._executor.steps if self._executor else ():
            step.run_as(plan.accumulation)

    def state_dict(self) -> LearnerState:
        """Everything that a resumed run needs: model, auxiliary nets, every optimizer and scaler, average, count.

        As with PyTorch's own, its tensors are the learner's: save it, or ``copy.deepcopy`` it, before training goes on.
        """
        steps = self._executor.steps if self._executor else ()
        return {
            "model": self.model.state_dict(),
            "objectives": [module.objective.state_dict() for module in self.modules],
            "optimizers": [step.optimizer.state_dict() for step in steps],
            "scalers": [step.scaler.state_dict() for step in steps],
            "averaged_model": None if self.averaged_model is None else self.averaged_model.state_dict(),
            "num_steps": self.num_steps,
            "seed": self.seed,
            "boundaries": list(self.plan.boundaries),
            "objective": describe(self.objective),
            "optimizer_classes": [type(step.optimizer).__name__ for step in steps],
        }

    def _take_weights(self, weights: dict[str, Tensor], averages: dict[str, Tensor] | None) -> None:
        """Take a whole model's weights, and those of its average where one is kept."""
        self.model.load_state_dict(weights)
        if self.averaged_model is not None:
            assert averages is not None, "checked before"
            load_weights(self.averaged_model, averages)


def _check_overlap(overlap: int) -> None:
    if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0:
        raise RecipeError(f"{arg('overlap')} must be a number of blocks, 0 for none, got {overlap!r}.")


def _check_options(
    *, freeze_from: float | None, accumulation: int | None, clip_grad: float | None, auxiliary_from: str
) -> None:
    """Refuse values of a learner's options that are impossible."""
    if freeze_from is not None and not (is_number(freeze_from) and 0 <= freeze_from <= 1):
        raise RecipeError(f"{arg('freeze_from')} must be a share of the training, from 0 to 1, got {freeze_from!r}.")
    if accumulation is not None and (type(accumulation) is not int or accumulation < 1):
        raise RecipeError(f"{arg('accumulation')} must be at least 1, a whole number of parts, got {accumulation!r}.")
    if clip_grad is not None and not (is_number(clip_grad) and 0 < clip_grad < math.inf):
        raise RecipeError(
            f"{arg('clip_grad')} must be a number above 0, got {clip_grad!r}; leave it out for no clipping."
        )
    if auxiliary_from not in ("seed", "state"):
        raise RecipeError(f"auxiliary_from: unknown {auxiliary_from!r}; take seed or state.")


@contextlib.contextmanager
def _exchanged(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let a model have the values of another one like it, without copying any."""
    mine, theirs = ([*net.parameters(), *net.buffers()] for net in (model, other))
    kept = [tensor.data for tensor in mine]
    for tensor, value in zip(mine, theirs, strict=True):
        tensor.data = value.data
    try:
        yield
    finally:
        for tensor, value in zip(mine, kept, strict=True):
            tensor.data = value


def make_ema(model: nn.Module, decay: float | None, *, on_host: bool) -> ModelEmaV3 | None:
    """A moving average of a model's weights, see ``MovingAverage``.

    Args:
        model: on its device.
        decay: of the average; ``None`` for none.
        on_host: keep it in host memory.

    Raises:
        RecipeError: an impossible decay.
    """
    if decay is None:
        return None
    if not (is_number(decay) and 0 < decay < 1):
        raise RecipeError(f"{arg('ema_decay')} must lie between 0 and 1, got {decay!r}; 0.9998 is usual.")
    check_moves(model)
    from localgrad.step.moving_average import MovingAverage

    if on_host:  # while the model may be in two places, which foreach can't take
        return MovingAverage(model, decay=decay, use_warmup=True, device=HOST, foreach=False)
    return MovingAverage(model, decay=decay, use_warmup=True)


def _warn_of_plan(different: Sequence[str]) -> None:
    if different:
        warnings.warn(
            f"plan: made for {'; '.join(different)}: its forecast isn't one of this training; plan again, or give "
            "dataclasses.replace(plan, made_for={}) if it is meant so.",
            stacklevel=4,
        )


def no_optimizers() -> RecipeError:
    """The error of a step before there are optimizers."""
    return RecipeError("no optimizers yet: call learner.configure_optimizers(lambda params: ...) first.")
