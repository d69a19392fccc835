"""Peak memory of one rank's training step, without its neighbours and without the memory."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from localgrad.backbones.base import Layout
from localgrad.learner import Factories, make_ema
from localgrad.memory.track import MemoryProfile, simulate
from localgrad.objectives.base import LocalBatch, Site
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.step.executor import SequentialExecutor
from localgrad.step.local_module import CONTEXT_GRID, LocalModule, LocalOutput
from localgrad.step.local_step import HandOn, LocalStep, StepSettings
from localgrad.step.sharding import OwnRows

if TYPE_CHECKING:
    from timm.utils.model_ema import ModelEmaV3


def estimate_share(
    learner: ParallelLearner, batch_size: int, optimizer: Factories, device: torch.device | None = None
) -> MemoryProfile:
    """Predict the memory of one training step of this process on fake tensors; the learner is not touched.

    Counts the own modules, the packets that have room here, and those that wait to be taken by the next rank.

    Args:
        learner: as it will be trained.
        batch_size: images a step of this replica.
        optimizer: factory, as for ``configure_optimizers``.
        device: that it will be trained on; by default the learner's.
    """
    place = learner.team.place
    step = _ShareStep(
        site=learner.sites[learner.own.start],
        first=learner.own.start,
        uses=[module.objective.uses for module in learner.modules],
        settings={**learner._settings, "compile": False},
        batch_size=batch_size,
        dtype=learner.backbone.dtype,
        factory=optimizer,
        num_received=0 if place.before is None else learner.links.num_slots,
        num_sent=0 if place.behind is None else learner.links.num_buffers,
    )
    own = _Own([learner.modules[index] for index in learner.own], learner._own_parts, learner._ema)
    if learner.skeleton is not None:
        step.sharers = learner.team.num_replicas
        own, step.shapes = _by_rows(learner.skeleton, step.sharers, averages=learner.averages)
    elif learner.team.num_replicas > 1:  # DDP averages gradients in buckets of its own, which it keeps
        own.buckets = [torch.empty_like(weight) for module in own.modules for weight in trained(module)]
    return simulate(
        own,
        step,
        inputs={"labels": ((batch_size,), torch.int64)},
        device="cuda" if (device or learner.device).type == "cuda" else "cpu",
    )


@dataclass
class _Own:
    """What one process has of a learner: nothing of the others' modules, not even shapes."""

    modules: list[LocalModule]
    parts: nn.Module
    average: ModelEmaV3 | None
    buckets: list[Tensor] = field(default_factory=list)


Places = list[tuple[nn.Module, str]]
"""Where a weight is; one that is used twice is in several."""


def _places(module: nn.Module) -> dict[nn.Parameter, Places]:
    found: dict[nn.Parameter, Places] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                found.setdefault(weight, []).append((part, name))
    return found


def _put(weights: Iterable[nn.Parameter], places: Iterable[Places]) -> None:
    for weight, owners in zip(weights, places, strict=True):
        for part, name in owners:
            part._parameters[name] = weight


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The weights that a module learns."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def _keep_rows(module: nn.Module, num_sharers: int) -> list[torch.Size]:
    """Leave a module one share of the rows of each weight, the last share padded; the shapes of the whole weights."""
    places = _places(module)
    rows = [
        nn.Parameter(weight.new_empty((-(-len(weight) // num_sharers), *weight.shape[1:])), weight.requires_grad)
        for weight in places
    ]
    _put(rows, places.values())
    return [weight.shape for weight in places]


def _by_rows(skeleton: Sequence[LocalModule], num_sharers: int, *, averages: bool) -> tuple[_Own, list[Any]]:
    """Own modules with the rows of one replica, in memory that is never touched, and the shapes of whole weights."""
    modules = [copied.to_empty(device="cpu") for copied in copy.deepcopy(list(skeleton))]
    shapes = [_keep_rows(module, num_sharers) for module in modules]
    parts = OwnRows([part for module in modules for part in module.parts])
    return _Own(modules, parts, make_ema(parts, 0.5, on_host=False) if averages else None), shapes


class _ShardedStep(LocalStep):
    """A step as ``sharding.shard`` makes it, in plain tensors: the weights are whole from forward to backward only.

    What FSDP2 allocates: a buffer of all replicas' rows, until the forward pass is done, and the weights cut out of it;
    then a buffer of all gradients, and the own rows of them. Gloo lets go of a buffer when it comes to it, so that a
    measured peak may be higher, by the module's weights or (with accumulation) one and a half times as much.

    Args:
        module: with rows of its weights.
        shapes: of the whole ones.
        num_sharers: replicas.
        factory: makes the optimizer, of rows.
        settings: of the step.
    """

    def __init__(
        self, module: LocalModule, shapes: Sequence[torch.Size], num_sharers: int, factory: Any, **settings: Any
    ) -> None:
        places = _places(module)
        self._shapes, self._num_sharers = shapes, num_sharers
        self._rows, self._places = list(places), list(places.values())
        rows = trained(module)
        super().__init__(module, rows, factory(rows), **settings)
        self._forward = self._run

    def _once(
        self,
        inputs: Tensor,
        batch: LocalBatch,
        share: float | Tensor,
        hand_on: HandOn | None = None,
        *,
        received: Tensor | None = None,
    ) -> LocalOutput:
        num_gathered = sum(row.numel() for row in self._rows) * self._num_sharers
        self._gathered: Tensor | None = torch.empty(num_gathered, dtype=self._rows[0].dtype)
        whole = [
            nn.Parameter(torch.empty(shape, dtype=row.dtype), row.requires_grad)
            for shape, row in zip(self._shapes, self._rows, strict=True)
        ]
        _put(whole, self._places)
        output = super()._once(inputs, batch, share, hand_on, received=received)
        gradients = [weight.grad for weight in whole if weight.grad is not None]
        for weight in whole:
            weight.grad = None
        scattered = torch.cat([gradient.flatten() for gradient in gradients])
        _put(self._rows, self._places)
        del gradients, whole, weight
        for row in self.parameters:
            row.grad = torch.empty_like(row)
        del scattered
        return output

    def _run(self, *given: Any) -> LocalOutput:
        output: LocalOutput = self.module(*given)
        self._gathered = None
        return output


@dataclass
class _ShareStep:
    """A training step of copied own modules, without their neighbours."""

    site: Site
    first: int
    uses: list[frozenset[str]]
    settings: StepSettings
    batch_size: int
    dtype: torch.dtype
    factory: Factories
    num_received: int
    num_sent: int
    sharers: int = 1
    shapes: list[Any] | None = None
    executor: SequentialExecutor | None = None

    def __call__(self, own: _Own, labels: Tensor) -> object:
        if self.executor is None:
            steps = [self._step(index, module) for index, module in enumerate(own.modules, self.first)]
            self.executor = SequentialExecutor(steps, first=self.first, uses=self.uses)
            self.received = [self._packet() for _ in range(self.num_received)]
            self.sent: deque[object] = deque(maxlen=self.num_sent)
        packet = self.received[0] if self.received else self._packet()
        batch = LocalBatch(packet.get("images"), labels, None, packet.get("previous"))
        batch.context = tuple(tensor for name, tensor in packet.items() if name.startswith("context"))
        batch.gradient = packet.get("gradient")
        result = self.executor.train(packet["features"], batch, lambda _, features: self.sent.append(features))
        if own.average is not None:
            own.average.update(own.parts, step=1)
        return result

    def _step(self, index: int, module: LocalModule) -> LocalStep:
        module.train()
        factory = self.factory if callable(self.factory) else self.factory[index]
        cpu = torch.device("cpu")  # where fake tensors are
        if self.shapes is not None:
            shapes = self.shapes[index - self.first]
            return _ShardedStep(module, shapes, self.sharers, factory, device=cpu, **self.settings)
        weights = trained(module)
        return LocalStep(module, weights, factory(weights), device=cpu, **self.settings)

    def _packet(self) -> dict[str, Tensor]:
        site = self.site
        assert self.executor is not None, "made before"

        def empty(layout: Layout | None) -> Tensor:
            assert layout is not None, "of a module behind others"
            return torch.empty(self.batch_size, *layout.shape, dtype=self.dtype)

        if self.first == 0:
            images = empty(site.image)
            return {"features": images, "images": images}
        packet = {"features": empty(site.inputs)}
        if self.executor.is_used("images", self.first):
            packet["images"] = empty(site.image)
        if self.executor.is_used("previous", self.first):
            packet["previous"] = empty(site.previous)
        if "gradient" in self.executor.uses[self.first]:
            packet["gradient"] = empty(site.inputs)
        if self.executor.is_used("context", self.first):
            for number, layout in enumerate(site.context):
                rows, columns = (min(side, CONTEXT_GRID) for side in layout.grid)
                shape = self.batch_size, rows, columns, layout.width
                packet[f"context{number:03d}"] = torch.empty(shape, dtype=self.dtype)
        return packet
