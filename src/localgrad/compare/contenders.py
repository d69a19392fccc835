"""The methods that ``localgrad compare`` runs: what anybody would write, its rivals, and local modules.

A ``Contender`` is a small description. On a ``Stage`` it gives an estimate of its step's memory, and a ``Runner`` of
the step itself. All of them train the same model's weights in turn: neither times nor bytes depend on values. Auxiliary
nets and optimizer state are each runner's own. The plain loop knows nothing of localgrad.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, final

import torch
import torch.nn.functional as F
from torch import Tensor

from localgrad.backbones.base import Backbone
from localgrad.compare.measuring import Held, tensors_of
from localgrad.estimating import estimate_step
from localgrad.learner import LocalLearner, OptimizerFactory
from localgrad.memory.track import MemoryProfile, simulate
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import build_objective
from localgrad.partition import Checkpointing, Plan
from localgrad.partitioning import make_plan
from localgrad.step.local_step import PRECISIONS, compiled_alone

HOST = torch.device("cpu")
END_TO_END = "end-to-end"


@dataclass(frozen=True)
class Stage:
    """What all methods share.

    Attributes:
        backbone: the model, split, on its device.
        optimizer: makes an optimizer from parameters.
        batch_size: images a step.
        device: where to train.
    """

    backbone: Backbone
    optimizer: OptimizerFactory
    batch_size: int
    device: torch.device


@dataclass
class Runner:
    """A method that is ready to train.

    Attributes:
        step: one training step on a batch, which may give its images away.
        own: modules and optimizers that no other method has: they are parked while others run.
    """

    step: Callable[[LocalBatch], object]
    own: Sequence[Held]

    @contextlib.contextmanager
    def on_stage(self, device: torch.device) -> Iterator[None]:
        """Have everything of one's own on the device, and back in host memory afterwards; free on a processor."""
        self._move(HOST, device)
        try:
            yield
        finally:
            self._move(device, HOST)

    def _move(self, source: torch.device, target: torch.device) -> None:
        if source.type == target.type:
            return
        for tensor in tensors_of(self.own):
            if tensor.device.type == source.type and tensor.ndim:  # step counts of optimizers stay on the host
                tensor.data = tensor.data.to(target)


@dataclass(frozen=True, kw_only=True)
class Contender(ABC):
    """One row of a comparison.

    Attributes:
        precision: ``fp32`` or ``bf16`` autocast.
        compile: run through ``torch.compile``.
    """

    precision: str = "fp32"
    compile: bool = False

    @property
    def name(self) -> str:
        """The row's name: no two methods have the same."""
        precision = "" if self.precision == "fp32" else f", {self.precision}"
        return self.label + precision + (", compiled" if self.compile else "")

    @property
    @abstractmethod
    def label(self) -> str:
        """The name without precision and compilation."""

    @property
    @abstractmethod
    def family(self) -> str:
        """``end-to-end``, ``recomputed`` (exact gradients, less memory), ``local`` or ``local, recomputed``."""

    @abstractmethod
    def estimate(self, stage: Stage) -> MemoryProfile | None:
        """Predict the memory of a step; ``None`` where the compiler decides what is kept."""

    @abstractmethod
    def build(self, stage: Stage) -> Runner:
        """Make the step."""


@dataclass(frozen=True, kw_only=True)
class PlainLoop(Contender):
    """What anybody would write: timm's model, cross-entropy, one optimizer.

    Attributes:
        checkpoint: timm's own ``set_grad_checkpointing``.
        budget: share of the activations that the compiler may keep (torch's ``activation_memory_budget``).
    """

    checkpoint: bool = False
    budget: float | None = None

    @property
    def label(self) -> str:
        """The name without precision and compilation."""
        rival = ", timm checkpointing" if self.checkpoint else ""
        return END_TO_END + rival + (f", budget {self.budget:g}" if self.budget is not None else "")

    @property
    def family(self) -> str:
        """``recomputed`` with checkpointing or a budget."""
        return "recomputed" if self.checkpoint or self.budget is not None else END_TO_END

    def estimate(self, stage: Stage) -> MemoryProfile | None:
        """Predict the memory of a step."""
        if self.compile:
            return None
        size = (stage.batch_size, *stage.backbone.input_size)
        return simulate(
            _Loop(self, stage),
            _Loop.train_on,
            inputs={"images": (size, torch.float32), "labels": (size[:1], torch.int64)},
            device="cuda" if stage.device.type == "cuda" else "cpu",
        )

    def build(self, stage: Stage) -> Runner:
        """Make the step."""
        loop = _Loop(self, stage)
        return Runner(loop.step, [loop.optimizer])


@final
class _Loop:
    def __init__(self, method: PlainLoop, stage: Stage) -> None:
        self.method = method
        self.model = stage.backbone.model
        self.optimizer = stage.optimizer([weight for weight in self.model.parameters() if weight.requires_grad])
        self.forward: Callable[[Tensor], Tensor] = compiled_alone(self.model) if method.compile else self.model

    def step(self, batch: LocalBatch) -> None:
        assert batch.images is not None, "a step starts with images"
        self.train_on(batch.images, batch.labels)

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        dtype = PRECISIONS[self.method.precision]
        with _as_it_recomputes(self.method, self.model):
            with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
                loss = F.cross_entropy(self.forward(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _as_it_recomputes(method: PlainLoop, model: Any) -> Iterator[None]:
    """Timm's checkpointing is a flag on the model that all share, torch's budget one that is read on compiling."""
    with contextlib.ExitStack() as stack:
        if method.budget is not None:
            from torch._functorch import config

            stack.enter_context(config.patch(activation_memory_budget=method.budget))
        if method.checkpoint:
            model.set_grad_checkpointing(enable=True)
            stack.callback(model.set_grad_checkpointing, enable=False)
        yield


@dataclass(frozen=True, kw_only=True)
class Local(Contender):
    """Our code: local modules, or one (which is end-to-end training).

    Attributes:
        modules: a number, ``stages``, or boundaries; or a plan.
        objective: feature, image, greedy or contrastive.
        decoder: linear, conv or transformer; ``None`` where the objective has none.
        checkpoint: what the modules recompute, as text; a plan has its own.
        title: what a plan is called.
    """

    modules: int | str | tuple[int, ...] | Plan
    objective: str = "feature"
    decoder: str | None = "linear"
    checkpoint: str = "none"
    title: str = ""

    @property
    def label(self) -> str:
        """The name without precision and compilation."""
        if isinstance(self.modules, Plan):
            where = self.title
        elif isinstance(self.modules, tuple):
            where = f"blocks {'|'.join(map(str, self.modules))}"
        else:
            where = "stages" if self.modules == "stages" else f"K = {self.modules}"
        parts = [where]
        if self.num_modules != 1:
            parts.append(self.objective + ("" if self.decoder in (None, "linear") else f", {self.decoder}"))
        return ", ".join(parts + ([] if self.checkpoint == "none" else [self.checkpoint]))

    @property
    def num_modules(self) -> int | None:
        """How many modules; ``None`` where the model's stages tell."""
        if isinstance(self.modules, Plan):
            return self.modules.num_modules
        if isinstance(self.modules, tuple):
            return len(self.modules) + 1
        return self.modules if isinstance(self.modules, int) else None

    @property
    def family(self) -> str:
        """``local``, or with recomputation; one module is end-to-end."""
        hows = self.modules.checkpoint if isinstance(self.modules, Plan) else (Checkpointing.parse(self.checkpoint),)
        recomputes = any(how.level != "none" for how in hows)
        if self.num_modules == 1:
            return "recomputed" if recomputes else END_TO_END
        return "local, recomputed" if recomputes else "local"

    def check(self, backbone: Backbone) -> None:
        """Refuse what can't be built, before anything is run.

        Raises:
            PartitionError: modules or checkpointing that the model doesn't have.
            RecipeError: an unknown objective or decoder.
        """
        self._learner(backbone, compile=False)

    def estimate(self, stage: Stage) -> MemoryProfile | None:
        """Predict the memory of a step."""
        if self.compile:
            return None
        return estimate_step(self._learner(stage.backbone), stage.batch_size, stage.optimizer, stage.device)

    def build(self, stage: Stage) -> Runner:
        """Make the step."""
        learner = self._learner(stage.backbone, compile=self.compile)
        learner.configure_optimizers(stage.optimizer)
        return Runner(learner.step_on, [*(module.objective for module in learner.modules), *learner.optimizers])

    def _learner(self, backbone: Backbone, *, compile: bool = False) -> LocalLearner:
        options = {} if self.decoder is None else {"decoder": self.decoder}
        plan = make_plan(backbone, self.modules, checkpoint=self.checkpoint)
        objective = build_objective(self.objective, options)
        return LocalLearner(backbone, modules=plan, objective=objective, precision=self.precision, compile=compile)


class _Common(TypedDict):
    precision: str
    compile: bool


def default_methods(
    *,
    modules: Sequence[int | str | tuple[int, ...]] = (2, 4),
    objectives: Sequence[str] | None = None,
    decoders: Sequence[str] = ("linear",),
    checkpoints: Sequence[str] = ("none", "halves/8"),
    precisions: Sequence[str] = ("fp32",),
    compile: bool = False,
    budgets: Sequence[float] = (0.5,),
    plans: Sequence[tuple[str, Plan]] = (),
) -> list[Contender]:
    """The rows of a comparison, the plain loop of each precision first.

    Args:
        modules: choices of local modules.
        objectives: at every choice of modules, decoder and checkpointing; by default feature reconstruction, and the
            other two once each, at the last choice of modules without checkpointing.
        decoders: auxiliary decoders.
        checkpoints: inside modules.
        precisions: all methods in each.
        compile: everything a second time, compiled, but for checkpointing in chunks; and the plain loop at ``budgets``.
        budgets: shares of the activations that compiled plain loops may keep.
        plans: (title, plan), each trained on the first objective and decoder.
    """
    first = (objectives or ("feature",))[0]
    found: list[Contender] = []
    for precision in precisions:
        for compiled in (False, True) if compile else (False,):
            common: _Common = {"precision": precision, "compile": compiled}
            found += [PlainLoop(**common), PlainLoop(checkpoint=True, **common)]
            if compiled:
                found += [PlainLoop(budget=budget, **common) for budget in budgets]
            # Chunks are written out one by one in a compiled graph, which then takes many minutes to compile.
            hows = [how for how in checkpoints if not (compiled and Checkpointing.parse(how).chunks > 1)]
            found += [Local(modules=1, **common)]
            found += [] if compiled else [Local(modules=1, checkpoint="halves/8", **common)]
            found += [
                Local(modules=choice, objective=name, decoder=_decoder(name, decoder), checkpoint=how, **common)
                for choice in modules
                for name in objectives or (first,)
                for decoder in decoders
                for how in hows
            ]
            if objectives is None:
                others = {name: _decoder(name, decoders[0]) for name in ("image", "greedy")}
                found += [Local(modules=modules[-1], objective=o, decoder=d, **common) for o, d in others.items()]
            decoder = _decoder(first, decoders[0])
            found += [Local(modules=p, title=t, objective=first, decoder=decoder, **common) for t, p in plans]
    return list({method.name: method for method in found}.values())


def _decoder(objective: str, decoder: str) -> str | None:
    return None if objective == "greedy" else decoder
