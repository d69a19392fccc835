"""The times of a model's parts on the machine at hand, by its clock: seconds that mean something.

Nominal times (``gauge.py``) compare plans on a machine that nobody has. Here each distinct part runs on real tensors,
forward and backward, chunks and updates too, on a few images. What is read is laid over the costs of any batch size:
all but the update grows with the images.

What the sum of parts misses (caches that a part finds filled, a machine that is busy otherwise) is told by a forward
and backward pass of the whole model: `Calibration.error`.

Shapes: B batch first.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from localgrad.backbones.base import Backbone
from localgrad.errors import DeviceError, arg
from localgrad.formats import Json
from localgrad.memory.costs import Costs, CostSettings, PartCost
from localgrad.memory.gauge import Gauge, Like, Measured, OptimizerFactory, Run, UpdateCost
from localgrad.memory.parts import Workshop, find_cuts, measure_all
from localgrad.objectives.losses import Loss
from localgrad.objectives.methods import Objective
from localgrad.step.local_step import autocast

IMAGES = {"cpu": 8, "cuda": 32}
"""On how many images parts run: a processor's time grows evenly with them soon, a card's from where it is full."""
LIMIT_SECONDS = 45.0
"""After so long each part that is left runs once."""


@final
class ByClock(Gauge):
    """On real tensors: nanoseconds, the least of a few runs; no bytes.

    Args:
        device: that it runs on.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        self.mode: AbstractContextManager[object] = device
        self._until = time.monotonic() + LIMIT_SECONDS

    def building(self) -> AbstractContextManager[object]:
        """Nets are made on the device."""
        return self.device

    def running(self) -> AbstractContextManager[object]:
        """On the device, in the precision."""
        stack = ExitStack()
        stack.enter_context(self.device)
        stack.enter_context(autocast(self.device.type, self.precision))
        return stack

    def source(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A leaf that needs a gradient."""
        return torch.randn(tuple(shape), dtype=dtype, device=self.device, requires_grad=True)

    def measure(
        self,
        run: Run,
        like: Like,
        weights: Sequence[Tensor],
        *,
        present: bool = False,
        needs_gradient: bool = True,
        accumulates: bool | None = None,
    ) -> Measured:
        """Run a part a few times, forward and backward."""
        inputs = filled(like, self.device).requires_grad_(needs_gradient and like[1].is_floating_point)
        forward, backward = [], []
        output = inputs

        def once() -> None:
            nonlocal output
            with self.device, torch.enable_grad():
                began = self._now()
                with autocast(self.device.type, self.precision):
                    output = run(inputs)
                forward.append(self._now() - began)
                gradient = torch.ones_like(output)
                began = self._now()
                if output.requires_grad:
                    output.backward(gradient)  # type: ignore[no-untyped-call]
                backward.append(self._now() - began)
            for tensor in (inputs, *weights):
                tensor.grad = None

        self._repeat(once)
        cost = PartCost(0, 0, 0, 0, 0, 0, min(forward[-2:] + forward[1:]), min(backward[-2:] + backward[1:]))
        return Measured(cost, tuple(output.shape), output.dtype, keeps_input=False)

    def updating(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> int:
        """Nanoseconds of an optimizer's step over copies of some weights."""
        copies = [nn.Parameter(torch.randn_like(weight)) for weight in weights]
        for weight in copies:
            weight.grad = torch.zeros_like(weight)
        optimizer = factory(copies)
        found = []

        def once() -> None:
            began = self._now()
            optimizer.step()
            found.append(self._now() - began)

        self._repeat(once)
        return min(found[-2:] + found[1:])

    def update(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> UpdateCost:
        """No bytes; ``updating`` has the time of all weights at once."""
        return UpdateCost(0, 0)

    def _repeat(self, once: Callable[[], None]) -> None:
        """Run once to warm up, and two to nine times more for up to a fifth of a second; once, where time is up."""
        once()
        began = time.monotonic()
        for count in range(9):
            now = time.monotonic()
            if now > self._until or (count >= 2 and now - began > 0.2):
                return
            once()

    def _now(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter_ns()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the clock said, and how far its parts add up.

    Attributes:
        costs: with times; without bytes.
        machine: that it was read on.
        seconds: that it took.
        error: of the parts' sum: to the forward and backward pass of the whole model, less 1.
    """

    costs: Costs
    machine: str
    seconds: float
    error: float

    @property
    def note(self) -> str:
        """A line for people."""
        return (
            f"times measured on {self.machine}, {self.costs.settings.batch_size} images, in {self.seconds:.0f} s; the "
            f"parts add up to {1 + self.error:.2f} x the passes of the whole model"
        )

    def to_dict(self) -> dict[str, Json]:
        """All of it as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """Take up what ``to_dict`` gave."""
        return cls(**{**values, "costs": Costs.from_dict(values["costs"])})


def machine_of(device: torch.device) -> str:
    """What times are of: the card, or the processor and how many threads of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {count} thread{'s' if count > 1 else ''}"


def measure_times(
    backbone: Backbone,
    objective: Objective,
    optimizer: OptimizerFactory,
    settings: CostSettings,
    device: torch.device,
    *,
    loss: Loss | None = None,
) -> Calibration:
    """Run each distinct part of a backbone on a copy of it, and a whole step of all of them.

    Args:
        backbone: split, or outlined; its weights may be uninitialised, its copy gets random ones.
        objective: what every module but the last is trained on.
        optimizer: makes a module's optimizer.
        settings: of ``IMAGES`` images; the precision and overlap are those that will be trained.
        device: that is there.
        loss: of the task; by default the model's own.

    Raises:
        DeviceError: not even two images fit the device; or the backbone was outlined without weights.
    """
    if next(backbone.parameters()).is_meta:
        raise DeviceError(
            f"{arg('measure', value=True)}: this model was outlined by shapes alone, so there is nothing to run; leave "
            "it out, or plan in Python for what localgrad.split gives."
        )
    began = time.monotonic()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            real = _copied(backbone, device)
            gauge = ByClock(device, settings.precision)
            shop = Workshop(gauge, settings)
            costs = measure_all(shop, real, find_cuts(real), (objective, optimizer), loss=loss)
            like = backbone.like(settings.batch_size)
            whole = gauge.measure(real, like, list(real.parameters()), needs_gradient=False).cost
    except torch.OutOfMemoryError as full:
        if settings.batch_size <= 2:
            raise DeviceError(f"{arg('measure', value=True)}: two images don't fit {device}; leave it out.") from full
        fewer = replace(settings, batch_size=settings.batch_size // 2)
        return measure_times(backbone, objective, optimizer, fewer, device, loss=loss)
    added = sum(part.forward_ns + part.backward_ns for part in costs.parts[0])
    error = added / (whole.forward_ns + whole.backward_ns) - 1
    seconds = time.monotonic() - began
    return Calibration(costs=costs, machine=machine_of(device), seconds=seconds, error=error)


def filled(like: Like, device: torch.device) -> Tensor:
    """Random numbers; token ids are zeros, which every vocabulary has."""
    shape, dtype = like
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=dtype, device=device)


def _copied(backbone: Backbone, device: torch.device) -> Backbone:
    """A copy with weights of a usual size: of others, subnormal numbers say, a processor takes another time."""
    made = copy.deepcopy(backbone)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0.0, 0.02)
    return made.to(device).train()
