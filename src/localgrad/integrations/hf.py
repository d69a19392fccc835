"""``LocalTrainer``: the Trainer of transformers, whose training step is that of local modules.

Data sets, collators, samplers, schedulers, callbacks, loggers, evaluation, checkpoints and the hub stay Trainer's own.
Of its loop one thing differs. Trainer collects the batches of one update (``get_batch_samples``), calls
``training_step`` for each, clips the gradients, and steps optimizer and scheduler. Here the first ``training_step`` of
an update has the learner train on all of its batches (``LocalLearner.step_parts``): means are over what counts in all
of them, and each module clips, updates and frees its gradients before the next one runs. Each call then returns its own
batch's share of the model's task loss, which is what Trainer's own would have returned. What follows finds no
gradients, and an optimizer whose ``step`` has nothing left to do (``learner.optimizer``); the scheduler made of it
changes every module's learning rate.

With one local module this is Trainer itself, bit for bit on the processor; with smoothed labels but for rounding, as
transformers sums their loss in another order.

Names that aren't public, and that this file alone relies on: of Trainer ``_prepare_inputs`` (moves a batch to the
device), ``_build_accelerator_args``, ``_save_optimizer_and_scheduler``, ``_load_optimizer_and_scheduler`` and
``_load_best_model`` (each called where its name says), and of Accelerate ``_original_forward``, where it keeps the
forward that it has wrapped. ``tests/test_hf_trainer.py`` pins what they do. Source: ``trainer.py`` of transformers.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from localgrad.backbones.example import LABEL_NAMES, logits_of
from localgrad.backbones.proof import digest
from localgrad.errors import CheckpointError, RecipeError, arg, reason_of
from localgrad.formats import check_format
from localgrad.integrations.own_loss import check_loss, own_loss
from localgrad.integrations.remaining import FORMAT, load_remaining_state, remaining_state
from localgrad.learner import LocalLearner
from localgrad.objectives.base import in_float32
from localgrad.objectives.losses import IGNORED, Loss
from localgrad.objectives.methods import FeatureReconstruction, Objective, build_objective
from localgrad.partition import Plan, Request
from localgrad.partitioning import CheckpointRequest
from localgrad.step.executor import StepResult, free_cache

try:
    from accelerate.utils import GradScalerKwargs
    from transformers import PreTrainedModel, Trainer, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"localgrad.integrations.hf needs transformers and accelerate ({reason_of(error)}): "
        "pip install 'localgrad[hf]'."
    ) from error

FILE = "localgrad.pt"
"""What Trainer's checkpoints lack: auxiliary nets, loss scales, the average of weights, the count of steps."""
OPTIMIZER_FILE = "optimizer.pt"
"""Where Trainer saves its optimizer: here those of all local modules."""
ACTIVATION_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""The field that has Trainer recompute activations, by its name since transformers 5.20, and before."""
REFUSED: dict[str, str] = {
    "deepspeed": "its engine makes backward pass and update of the whole model; leave it out",
    "fsdp": "it wraps the whole model, which is never run as a whole in training; leave it out",
    "parallelism_config": "local modules train in one process here; leave it out",
    "torch_compile": "it compiles the whole model, which is never run as a whole in training; leave it out",
    "use_liger_kernel": "it changes the model's forward when training begins; leave it out",
    "auto_find_batch_size": "modules before the one in which memory runs out have made their update by then; "
    "localgrad.plan says beforehand what fits",
    "use_cache": "they keep no keys and values, which generation alone has a use for; leave it out",
    "enable_jit_checkpoint": "it saves in the middle of an update; leave it out, save_steps saves in between",
}
"""Fields of TrainingArguments that don't go with local modules, and what to do."""


class LocalTrainer(Trainer):  # type: ignore[misc]  # its types aren't read
    """A Trainer that trains its model as gradient-isolated local modules.

    Takes what Trainer takes, and what ``LocalLearner`` takes where Trainer's own arguments don't say it:

    ========================================= =================================================================
    TrainingArguments                         local modules
    ========================================= =================================================================
    ``bf16``, ``fp16``                        the learner's precision; a loss scale for each module
    ``gradient_accumulation_steps``           each module runs all batches of an update before it is updated
    ``max_grad_norm``                         largest norm of each module's gradient
    ``learning_rate``, ``optim``, schedulers  one optimizer a module, of that class; one schedule for all
    ``activation_checkpointing``              ``checkpoint="blocks"`` (before: ``gradient_checkpointing``)
    ``label_smoothing_factor``                ``label_smoothing`` of the objective
    ========================================= =================================================================

    The model is split when training begins, or ``learner`` is first asked for. Logged is the model's task loss, and for
    several modules each one's own loss as ``loss/module_0``; with ``max_grad_norm`` the norm of all gradients together
    as ``grad_norm``, and each module's, which is what is clipped, as ``grad_norm/module_0``. A checkpoint has one more
    file, ``localgrad.pt``; training that is resumed from it goes on bit for bit. In fp16 the schedule goes on where
    modules skip an update, whose gradients overflowed.

    Args:
        model: as for Trainer; one of peft trains its adapters.
        args: Trainer's own arguments.
        *more: other positional arguments of Trainer.
        modules: how many local modules, boundaries, or a plan, as for ``LocalLearner``; the following likewise.
        objective: what every module but the last is trained on, or its name.
        example: a batch to split the model by; by default one of the first items of the training set.
        blocks: dotted name of the container of the model's blocks; by default found.
        checkpoint: what modules recompute.
        loss: of every module's task; by default the model's own, as far as it is one that localgrad has, which is
            checked on the example.
        shared: what becomes of parameters that several modules read.
        overlap: last blocks of the module before that each module trains as well.
        freeze_from: share of the training after which modules stop to learn.
        ema_decay: of a moving average of the weights, in ``learner.averaged_model``.
        auxiliary_from: what auxiliary nets are initialised from.
        chunk_logits: make logits of a large vocabulary chunk by chunk.
        **options: other keywords of Trainer.

    Raises:
        RecipeError: an argument that doesn't go with local modules, by its name.
    """

    optimizer: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *more: Any,
        modules: Request | Plan = 4,
        objective: Objective | str | None = None,
        example: Any = None,
        blocks: str | None = None,
        checkpoint: CheckpointRequest = False,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] | None = None,
        shared: str = "refuse",
        overlap: int = 0,
        freeze_from: float | None = None,
        ema_decay: float | None = None,
        auxiliary_from: str = "seed",
        chunk_logits: bool = False,
        **options: Any,
    ) -> None:
        if args is not None:
            _check_arguments(args)
        self._objective = build_objective(objective, {}) if isinstance(objective, str) else objective
        self._example = example
        self._loss = loss
        self._options: dict[str, Any] = {
            "modules": modules,
            "blocks": blocks,
            "checkpoint": checkpoint,
            "shared": shared,
            "overlap": overlap,
            "freeze_from": freeze_from,
            "ema_decay": ema_decay,
            "auxiliary_from": auxiliary_from,
            "chunk_logits": chunk_logits,
        }
        self._learner: LocalLearner | None = None
        self._split_model: nn.Module | None = None
        self._batches: list[Any] = []  # of the update under way
        self._shares: list[Tensor] = []  # of their task losses, those not yet returned
        self._sums: Tensor | None = None  # of each module's losses since they were logged
        self._num_summed = 0
        super().__init__(model, args, *more, **options)
        self._check_made()
        if self._loss is not None:  # a model that takes no labels is evaluated all the same
            self.label_names: list[str] = self.label_names or [LABEL_NAMES[0]]

    def _check_made(self) -> None:
        """Refuse what is known once Trainer has made itself."""
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            what, count = (
                ("world_size", self.args.world_size) if self.args.world_size > 1 else ("n_gpu", self.args.n_gpu)
            )
            raise RecipeError(
                f"{arg(what, count)}: LocalTrainer trains in one process on one device; start one (and set "
                "CUDA_VISIBLE_DEVICES=0), or train in a loop of your own with localgrad.ParallelLearner."
            )
        kind = str(getattr(self.accelerator.distributed_type, "value", self.accelerator.distributed_type))
        if kind != "NO":
            raise RecipeError(
                f"accelerate: it is configured for {kind}, and LocalTrainer trains in one process on one device; "
                "configure it for none."
            )
        if self.accelerator.mixed_precision not in ("no", "bf16", "fp16"):
            raise RecipeError(
                f"{arg('mixed_precision', self.accelerator.mixed_precision)}: local modules train in fp32, bf16 or "
                "fp16; set bf16=True in TrainingArguments."
            )
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise RecipeError(
                "optimizers: one of the whole model can't be each local module's own; give "
                "optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-4}), or set optim and lr_scheduler_type."
            )
        if self.compute_loss_func is not None:
            raise RecipeError(
                "compute_loss_func: each module has a loss of its own logits; give loss=, a function of logits and "
                "labels, or a name."
            )
        for name in ("compute_loss", "training_step"):
            if getattr(type(self), name) is not getattr(LocalTrainer, name):
                raise RecipeError(
                    f"{type(self).__name__}.{name}: local modules train without it; give loss=, a function of logits "
                    "and labels, and leave it out."
                )

    # The learner ----------------------------------------------------------------------------------------------------

    @property
    def learner(self) -> LocalLearner:
        """What trains: the model, split. Made when it is first asked for, and anew for another model (``model_init``).

        Raises:
            BackboneError: the model can't be split.
            RecipeError: its own loss isn't the task loss of local modules; and what ``LocalLearner`` raises.
        """
        if self._learner is None or self._split_model is not self.model:
            with _random_state_kept():
                self._learner = self._make_learner()
            self._split_model = self.model
        return self._learner

    def _make_learner(self) -> LocalLearner:
        options = dict(self._options)
        if any(getattr(self.args, name, None) for name in ACTIVATION_CHECKPOINTING):
            _switch_off_checkpointing(self.model)
            options["checkpoint"] = options["checkpoint"] or "blocks"
        objective = self._objective
        if self.label_smoother is not None:  # which Trainer leaves out where it doesn't smooth
            objective = replace(objective or FeatureReconstruction(), label_smoothing=self.args.label_smoothing_factor)
        example = self._prepare_inputs(self._first_items() if self._example is None else self._example)
        precision = self.accelerator.mixed_precision
        with _own_forward(self.model):
            own = own_loss(self.model, example) if self._loss is None else None
            learner = LocalLearner(
                self.model,
                objective=objective,
                example=example,
                loss=self._loss,
                precision="fp32" if precision == "no" else precision,
                clip_grad=self.args.max_grad_norm or None,
                accumulation=1,
                **options,
            )
            if own is not None:
                check_loss(self.model, example, learner.loss, own)
        return learner

    def _first_items(self) -> Any:
        """A batch of the first items of the training set with a label that counts, as its collator makes it."""
        if self.train_dataset is None:
            raise RecipeError("example: there is no train_dataset to take one from; give a batch.")
        loader = self.get_train_dataloader()
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
            if not self.args.dataloader_num_workers and _is_read_once(self.train_dataset):  # workers read copies
                raise RecipeError(
                    f"example: {type(self.train_dataset).__name__} can be read once, and a batch of it would be "
                    "missing from training; give example=, a batch as the data loader makes it."
                )
            return next(iter(loader))
        data, total = loader.dataset, len(loader.dataset)
        count = min(total, max(2, self.args.per_device_train_batch_size))

        def batch_from(start: int) -> Any:
            return loader.collate_fn([data[index] for index in range(start, start + count)])

        starts = range(0, min(total - count, MOST_TRIED * count) + 1, count)
        counting = (batch for batch in map(batch_from, starts) if _counts(batch))
        return next(counting, None) or batch_from(0)

    # The optimizers -------------------------------------------------------------------------------------------------

    def create_optimizer(self, *_: Any, **__: Any) -> Optimizer:
        """Make one optimizer a local module, of the class and with the groups that Trainer's own would have.

        Returns:
            All of them as one: ``learner.optimizer``.
        """
        if any(getattr(self.args, name, None) for name in ACTIVATION_CHECKPOINTING):
            _switch_off_checkpointing(self.model)  # Trainer has it on anew in every train(); the learner recomputes
        if self.optimizer is None:
            learner = self.learner
            decayed = {name for name in self.get_decay_parameter_names(self.model) if name}
            by_model = {id(weight): name in decayed for name, weight in self.model.named_parameters()}
            learner.configure_optimizers(
                [self._factory(by_model | self._decayed(module.objective)) for module in learner.modules]
            )
            self.optimizer = learner.optimizer
        made: Optimizer = self.optimizer
        return made

    def _decayed(self, net: nn.Module) -> dict[int, bool]:
        """Whether weights of auxiliary nets are decayed, by ``id``."""
        names = set(self.get_decay_parameter_names(net))
        return {id(weight): name in names for name, weight in net.named_parameters()}

    def _factory(self, decays: Mapping[int, bool]) -> Callable[[list[nn.Parameter]], Optimizer]:
        def make(parameters: list[nn.Parameter]) -> Optimizer:
            found = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            kind, options = found[0], dict(found[1])
            of_model = {"params", "model", "optimizer_dict"} & options.keys()
            has_modes = callable(getattr(kind, "eval", None)) and callable(getattr(kind, "train", None))
            if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or of_model or has_modes:
                raise RecipeError(
                    f"{arg('optim', str(self.args.optim))}: it takes the whole model, or has modes of its own, and "
                    "can't be made for each local module; take adamw_torch, sgd, adafactor or adamw_bnb_8bit."
                )
            if "bitsandbytes" in kind.__module__ and options.get("optim_bits") == 8:
                self._keep_embeddings_whole()
            decayed = [weight for weight in parameters if decays[id(weight)]]
            others = [weight for weight in parameters if not decays[id(weight)]]
            groups = [
                {"params": decayed, "weight_decay": self.args.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
            made: Optimizer = kind(groups, **options)
            return made

        return make

    def _keep_embeddings_whole(self) -> None:
        """Have 8-bit optimizers keep embeddings' states in float32, as Trainer does."""
        from bitsandbytes.optim import GlobalOptimManager

        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Accelerate's own loss scale is switched off: each local module has one."""
        made: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        made["kwargs_handlers"] = [*(made.get("kwargs_handlers") or []), GradScalerKwargs(enabled=False)]
        return made

    # Training -------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own batches of one update, which are kept for its first ``training_step``."""
        found = super().get_batch_samples(*args, **kwargs)
        self._batches, self._shares = list(found[0]), []
        return found

    def training_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Train on all batches of an update at the first of them.

        Args:
            model: the model, perhaps wrapped; it is put in training mode.
            inputs: one batch, with its labels.

        Returns:
            The batch's share of the model's task loss, a scalar.
        """
        if not self._shares:
            model.train()
            self._check_optimizer()
            self.learner.at(min(1.0, self.state.global_step / max(1, self.state.max_steps)))
            results = self.learner.step_parts([self._prepare_inputs(batch) for batch in self._batches], logits=False)
            self._note_losses(results)
            self._shares = [result.terms[-1]["task"] for result in results]
            every = self.args.torch_empty_cache_steps
            if every is not None and self.state.global_step % every == 0:
                free_cache(self.learner.device)
        return self._shares.pop(0)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:  # noqa: FBT001, FBT002  # Trainer's own
        """The loss of an evaluation: the one that is trained on, where ``loss=`` was given; else the model's own."""
        if self._loss is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **more)
        labels = next(inputs[name] for name in LABEL_NAMES if name in inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name not in LABEL_NAMES})
        logits = logits_of(model, outputs)
        loss = self.learner.loss(in_float32(logits), labels)
        if not isinstance(outputs, dict):  # of others Trainer takes the first for a loss, and drops it
            outputs = {"logits": logits}
        return (loss, outputs) if return_outputs else loss

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that a subclass or a callback has put in the place of the modules' own.

        Raises:
            RecipeError: saying how to make some.
        """
        ours, theirs = self.learner.optimizers, getattr(self.optimizer, "optimizer", self.optimizer)
        if not ours or theirs is not self.learner.optimizer:
            raise RecipeError(
                f"optimizer: {type(self).__name__} has a {type(theirs).__name__} of its own, which would train "
                "nothing; give optimizer_cls_and_kwargs=, or have create_optimizer call "
                "self.learner.configure_optimizers(lambda params: ...), and set and return self.optimizer = "
                "self.learner.optimizer."
            )

    def _note_losses(self, results: Sequence[StepResult]) -> None:
        if len(results[0].losses) > 1:
            summed = torch.stack([torch.stack(result.losses) for result in results]).sum(dim=0)
            self._sums = summed if self._sums is None else self._sums + summed
            self._num_summed += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with each module's loss, a mean since the last time, and the last gradients' norms."""
        if "loss" in logs:
            logs.pop("grad_norm", None)  # Trainer's own, of no gradients
            logs |= self._gradient_norms()
            if self._sums is not None:
                means = (self._sums / self._num_summed).tolist()
                logs |= {f"loss/module_{index}": mean for index, mean in enumerate(means)}
                self._sums, self._num_summed = None, 0
        super().log(logs, *args, **kwargs)

    def _gradient_norms(self) -> dict[str, float]:
        """Of the last update, by name: of all modules' gradients together, and for several modules each one's."""
        norms = () if self._learner is None else self._learner.gradient_norms
        known = [(index, norm) for index, norm in enumerate(norms) if norm is not None]
        if not known:
            return {}
        values = torch.stack([norm for _, norm in known]).tolist()  # waits for the device once, as the loss does
        found = {"grad_norm": math.hypot(*values)}
        if len(norms) > 1:
            found |= {f"grad_norm/module_{index}": value for (index, _), value in zip(known, values, strict=True)}
        return found

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save what Trainer saves, and ``localgrad.pt`` beside it."""
        super()._save_optimizer_and_scheduler(output_dir)
        state = {**remaining_state(self.learner), "digest": self._digest()}
        target = Path(output_dir) / FILE
        torch.save(state, target.with_suffix(".part"))
        os.replace(target.with_suffix(".part"), target)  # noqa: PTH105  # over one that is there

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what Trainer loads, and the learner's own state.

        Raises:
            CheckpointError: a file is missing, or is of other local modules.
        """
        if checkpoint is None:
            return
        path = Path(checkpoint) / FILE
        missing = [name for name in (FILE, OPTIMIZER_FILE) if not (Path(checkpoint) / name).is_file()]
        if missing:
            raise CheckpointError(
                f"checkpoint: {checkpoint} has no {' and no '.join(missing)}, so that training can't go on from it; "
                "take one that LocalTrainer has saved without save_only_model, or begin anew from its weights with "
                "from_pretrained."
            )
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_format(f"checkpoint {path}", saved.get("format"), FORMAT, CheckpointError)
        learner = self.learner
        if tuple(saved["boundaries"]) != learner.plan.boundaries:
            raise CheckpointError(
                f"checkpoint: it has boundaries {saved['boundaries']}, this learner {list(learner.plan.boundaries)}; "
                "give the same modules."
            )
        self._check_weights(checkpoint, saved.pop("digest"))
        super()._load_optimizer_and_scheduler(checkpoint)
        load_remaining_state(learner, saved)

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights, as Trainer does, and by the library where Trainer misses them."""
        super()._load_best_model()
        checkpoint = str(self.state.best_model_checkpoint)
        state = Path(checkpoint) / FILE
        expected = None
        if state.is_file():  # not with save_only_model
            expected = torch.load(state, map_location="cpu", weights_only=True)["digest"]
        if expected is None or self._digest() != expected:
            self._take_weights(checkpoint)
        if expected is not None:
            self._check_weights(checkpoint, expected)

    def _check_weights(self, checkpoint: str, expected: str) -> None:
        """Have the weights that were saved.

        Trainer loads a file by the names in it, and passes over those that it doesn't know. Some models are saved by
        other names than their modules have (ViT, in transformers 5): ``from_pretrained`` knows them.

        Raises:
            CheckpointError: they are others.
        """
        if self._digest() != expected:
            self._take_weights(checkpoint)
        if self._digest() != expected:
            raise CheckpointError(
                f"checkpoint: the weights that were loaded from {checkpoint} aren't those that were saved with "
                f"{FILE}; it isn't whole: take another one."
            )

    def _take_weights(self, checkpoint: str) -> None:
        """Take a checkpoint's weights as the library reads them.

        Raises:
            CheckpointError: the library makes another model of it: parts were replaced since it was made.
        """
        if not isinstance(self.model, PreTrainedModel):
            return
        dtypes = {weight.dtype for weight in self.model.parameters() if weight.is_floating_point()}
        widest = torch.float32 if len(dtypes) > 1 else next(iter(dtypes))  # in which each of them is whole
        kept = self.model.from_pretrained(checkpoint, config=self.model.config, dtype=widest).state_dict()
        different = sorted(kept.keys() ^ self.model.state_dict().keys())
        if different:
            raise CheckpointError(
                f"checkpoint: {checkpoint} can't be loaded into this {type(self.model).__name__}: parts of it were "
                f"replaced ({different[0]}), and the library makes it without; load its weights by hand."
            )
        self.model.load_state_dict(kept)

    def _digest(self) -> str:
        """Of what the model has learned, and of its buffers that are saved."""
        model = self.learner.model
        frozen = {id(weight) for weight in model.parameters() if not weight.requires_grad}  # adapters' files lack them
        state = model.state_dict(keep_vars=True)
        return digest(
            [value for value in state.values() if isinstance(value, Tensor) and id(value) not in frozen]
        ).hex()


# Arguments and models ---------------------------------------------------------------------------------------------


def _check_arguments(args: TrainingArguments) -> None:
    """Refuse fields that don't go with local modules.

    Raises:
        RecipeError: naming the first.
    """
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if value:
            shown = value if isinstance(value, (bool, str)) else "..."
            raise RecipeError(f"{arg(name, shown)}: it doesn't go with local modules: {reason}.")
    for name in ACTIVATION_CHECKPOINTING:
        if getattr(args, name, None) and getattr(args, f"{name}_kwargs", None):
            raise RecipeError(
                f"{name}_kwargs: local modules recompute by themselves; leave it out, and say which blocks with "
                "checkpoint=, such as 'blocks:3'."
            )


def _switch_off_checkpointing(model: Any) -> None:
    """Undo what Trainer does as training begins: local modules recompute by themselves."""
    for name in ACTIVATION_CHECKPOINTING:
        switch = getattr(model, f"{name}_disable", None)
        if callable(switch):
            switch()
            return


MOST_TRIED = 64


def _is_read_once(data: Any) -> bool:
    """Whether a data set is an iterator, or reads from one that it holds."""
    return any(isinstance(each, Iterator) for each in (data, *getattr(data, "__dict__", {}).values()))


def _counts(batch: Any) -> bool:
    """Whether a label of a batch counts; of a batch without labels nobody knows."""
    labels = next((batch[name] for name in LABEL_NAMES if name in batch), None) if _is_dict(batch) else None
    return not isinstance(labels, Tensor) or bool((labels != IGNORED).any())


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """A region in which a model runs its own forward, without the precision that Accelerate has wrapped around it."""
    wrapped = vars(model).get("forward")
    own = vars(model).get("_original_forward")
    if wrapped is None or own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """A region after which random numbers go on as if nothing had been drawn: collators and data sets draw some."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
