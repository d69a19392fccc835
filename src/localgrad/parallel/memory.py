"""Peak memory of one rank's training step, without its neighbours and without the memory."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from localgrad.backbones.watching import Segment
from localgrad.learner import Factories, make_ema
from localgrad.memory.track import MemoryProfile, simulate
from localgrad.objectives.carried import LocalBatch, Route, empty_batch
from localgrad.objectives.losses import CROSS_ENTROPY, Loss
from localgrad.objectives.site import Site
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.step.executor import SequentialExecutor
from localgrad.step.local_module import LocalModule
from localgrad.step.local_step import LocalStep, Region, StepSettings
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
        main=learner.backbone.like(batch_size),
        first=learner.own.start,
        route=learner.route,
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
    own.loss = learner.loss
    return simulate(
        own,
        step,
        inputs={"labels": (learner.label_shape(batch_size), learner.loss.label_dtype)},
        device="cuda" if (device or learner.device).type == "cuda" else "cpu",
    )


@dataclass
class _Own:
    """What one process has of a learner: nothing of the others' modules, not even shapes."""

    modules: list[LocalModule]
    parts: nn.Module
    average: ModelEmaV3 | None
    buckets: list[Tensor] = field(default_factory=list)
    loss: Loss = CROSS_ENTROPY  # which may have weights of classes

    def __deepcopy__(self, memo: dict[int, Any]) -> _Own:
        """Without the weights of others, of which a model that was split by watching has shapes."""
        trunks = [part.trunk for own in self.modules for part in own.modules() if isinstance(part, Segment)]
        for trunk in trunks:
            tensors = (*trunk.model.parameters(), *trunk.model.buffers())
            memo.update({id(tensor): tensor for tensor in tensors if tensor.is_meta})
        return _Own(
            copy.deepcopy(self.modules, memo),
            copy.deepcopy(self.parts, memo),
            copy.deepcopy(self.average, memo),
            copy.deepcopy(self.buckets, memo),
            copy.deepcopy(self.loss, memo),
        )


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


@final
class _Sharded:
    """A module's passes as ``sharding.shard`` makes them, in plain tensors: weights are whole in these alone.

    What FSDP2 allocates: a buffer of all replicas' rows, until the forward pass is done, and the weights cut out of it;
    then a buffer of all gradients, and the own rows of them. Gloo lets go of a buffer when it comes to it, so that a
    measured peak may be higher, by the module's weights or (with accumulation) one and a half times as much.
    """

    def __init__(self, module: LocalModule, shapes: Sequence[torch.Size], num_sharers: int) -> None:
        places = _places(module)
        self._shapes, self._num_sharers = shapes, num_sharers
        self._rows, self._places = list(places), list(places.values())
        self._trained = trained(module)
        self._gathered: Tensor | None = None
        module.register_forward_hook(self._forward_done)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """A region for a forward and backward pass."""
        num_gathered = sum(row.numel() for row in self._rows) * self._num_sharers
        self._gathered = torch.empty(num_gathered, dtype=self._rows[0].dtype)
        whole = [
            nn.Parameter(torch.empty(shape, dtype=row.dtype), row.requires_grad)
            for shape, row in zip(self._shapes, self._rows, strict=True)
        ]
        _put(whole, self._places)
        yield
        gradients = [weight.grad for weight in whole if weight.grad is not None]
        for weight in whole:
            weight.grad = None
        scattered = torch.cat([gradient.flatten() for gradient in gradients])
        _put(self._rows, self._places)
        del gradients, whole, weight
        for row in self._trained:
            row.grad = torch.empty_like(row)
        del scattered

    def _forward_done(self, *_: object) -> None:
        self._gathered = None


@dataclass
class _ShareStep:
    """A training step of copied own modules, without their neighbours."""

    site: Site
    main: tuple[tuple[int, ...], torch.dtype]
    first: int
    route: Route
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
            self.executor = SequentialExecutor(steps, first=self.first, route=self.route)
            self.received = [self._batch(own, labels) for _ in range(self.num_received)]
            self.sent: deque[object] = deque(maxlen=self.num_sent)
        batch = self.received[0] if self.received else self._batch(own, labels)
        batch = batch.onward(batch.features, dict(batch.carried))
        batch.labels, batch.loss = labels, own.loss
        has_next = self.first + len(own.modules) < len(self.route.uses)
        result = self.executor.step(batch, self.sent.append if has_next else None)
        if own.average is not None:
            own.average.update(own.parts, step=1)
        return result

    def _step(self, index: int, module: LocalModule) -> LocalStep:
        module.train()
        factory = self.factory if callable(self.factory) else self.factory[index]
        cpu = torch.device("cpu")  # where fake tensors are
        around: Region = contextlib.nullcontext
        if self.shapes is not None:
            around = _Sharded(module, self.shapes[index - self.first], self.sharers).passing
        weights = trained(module)
        return LocalStep(module, weights, factory(weights), device=cpu, around=around, **self.settings)

    def _batch(self, own: _Own, labels: Tensor) -> LocalBatch:
        under_way = own.modules[0].under_way
        return empty_batch(
            self.site,
            self.route.into(self.first),
            self.batch_size,
            self.dtype,
            labels=torch.zeros_like(labels),
            main=self.main,
            context=None if under_way is None else under_way.known,
        )
