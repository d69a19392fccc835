"""How one part of a model is measured: on tensors without memory (here), or for real by the clock (``timing.py``).

Shapes: B batch first.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import flop_registry

from localgrad.backbones.fake import FakeTensorMode, copies_within, optimizer_over
from localgrad.backbones.namespaces import Kwargs
from localgrad.memory.costs import CostSettings, PartCost
from localgrad.memory.track import CUDA_ROUNDING, Observer, Tracker, autocast_of, choose_foreach, rounded
from localgrad.step.local_step import autocast

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
Run = Callable[[Tensor], Tensor]
Like = tuple[tuple[int, ...], torch.dtype]


class Measured(NamedTuple):
    """What a part costs, and what it gives."""

    cost: PartCost
    shape: tuple[int, ...]  # of the output, batch included
    dtype: torch.dtype
    keeps_input: bool


class UpdateCost(NamedTuple):
    """Bytes of an optimizer's state over some weights, and of its temporaries in a step; its time, where it is read."""

    state: int
    temporary: int
    nanoseconds: int = 0


class Gauge(ABC):
    """How a part is measured. Tensors are made in its ``mode``, nets in ``building``."""

    mode: AbstractContextManager[object]

    @abstractmethod
    def building(self) -> AbstractContextManager[object]:
        """The context in which an objective's nets are made."""

    @abstractmethod
    def running(self) -> AbstractContextManager[object]:
        """The context in which parts run, for what isn't measured."""

    @abstractmethod
    def source(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that needs a gradient and drops it."""

    @abstractmethod
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
        """Run a part forward and backward.

        Args:
            run: the part.
            like: shape and dtype of its input.
            weights: parameters whose gradients it makes.
            present: its input is there before and after, and isn't counted.
            needs_gradient: whether its input does.
            accumulates: its gradients are added to those of earlier parts of the batch, each as soon as it is there; by
                default as the settings say.
        """

    @abstractmethod
    def updating(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> int:
        """Nanoseconds of an optimizer's step over all weights of a part; 0 where no update is timed."""

    @abstractmethod
    def update(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> UpdateCost:
        """Let an optimizer take its second step over some weights."""


@final
class ByShapes(Gauge):
    """On tensors without memory: bytes as the device's allocator rounds them, and nominal seconds."""

    def __init__(self, mode: FakeTensorMode, settings: CostSettings) -> None:
        self.mode: FakeTensorMode = mode
        self.settings = settings
        self.rounding = rounding_of(settings)
        with mode:
            self.anchor = torch.empty((), requires_grad=True)

    def building(self) -> AbstractContextManager[object]:
        """Nets are fake copies of real ones, which are made small."""
        stack = ExitStack()
        stack.enter_context(self.mode)
        stack.enter_context(copies_within(self.mode))
        return stack

    def running(self) -> AbstractContextManager[object]:
        """On fake tensors, in the precision and as on the device."""
        stack = ExitStack()
        casts = self.settings.precision != "fp32"
        for region in (
            self.mode,
            autocast_of(self.settings.device if casts else "cpu"),
            autocast("cpu", self.settings.precision),
        ):
            stack.enter_context(region)
        return stack

    def source(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that needs a gradient and drops it."""
        source: Tensor = _Source.apply(self.anchor, shape, dtype)
        return source

    def _input(self, shape: Sequence[int], dtype: torch.dtype, *, needs_gradient: bool) -> Tensor:
        return self.source(shape, dtype) if needs_gradient else torch.empty(tuple(shape), dtype=dtype)

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
        """Run a part under the tracker."""
        shape, dtype = like
        clock = _Clock(RATES[self.settings.device])
        meter = Tracker(self.rounding, clock)
        casts = self.settings.precision != "fp32"
        with self.mode, meter, autocast_of(self.settings.device if casts else "cpu"), torch.enable_grad():
            held = self._input(shape, dtype, needs_gradient=needs_gradient) if present else None
            if self.settings.accumulation > 1 if accumulates is None else accumulates:
                for weight in weights:
                    weight.grad = torch.empty_like(weight)
            meter.begin()
            clock.seconds = 0.0
            inputs = held if held is not None else self._input(shape, dtype, needs_gradient=needs_gradient)
            entered = weakref.ref(inputs.untyped_storage())
            with autocast("cpu", self.settings.precision):
                output = run(inputs)
                del inputs
                in_autocast = meter.alive_bytes
            keeps_input = entered() is not None
            kept, forward, forward_seconds = meter.alive_bytes, meter.take_peak(), clock.seconds
            nbytes = rounded(nbytes_of(output), self.rounding)
            measured_shape, measured_dtype = tuple(output.shape), output.dtype
            end = _Sink.apply(output)
            del output
            meter.take_peak()
            if end.requires_grad:  # a frozen stem has no backward pass
                end.backward()
            backward = meter.take_peak()
            gradients = sum(
                rounded(nbytes_of(weight.grad), self.rounding) for weight in weights if weight.grad is not None
            )
            for weight in weights:
                weight.grad = None
            del held
        cost = PartCost(
            kept=kept - nbytes,
            kept_in_autocast=in_autocast - nbytes,
            output=nbytes,
            forward=forward,
            backward=backward,
            gradients=gradients,
            forward_ns=round(forward_seconds * 1e9),
            backward_ns=round((clock.seconds - forward_seconds) * 1e9),
        )
        return Measured(cost, measured_shape, measured_dtype, keeps_input)

    def updating(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> int:
        """Nominal times leave the update out."""
        return 0

    def update(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> UpdateCost:
        """Let an optimizer take its second step over some weights, alone."""
        meter = Tracker(self.rounding)
        with self.mode, meter:
            copies = [nn.Parameter(torch.empty_like(weight)) for weight in weights]
            for weight in copies:
                weight.grad = torch.empty_like(weight)
            optimizer = optimizer_over(self.mode, factory, copies)
            if self.settings.device == "cuda":
                choose_foreach([optimizer])
            optimizer.step()
            meter.begin()
            optimizer.step()
            temporary = meter.take_peak() - meter.alive_bytes
            values = [value for state in optimizer.state.values() for value in state.values()]
            state = sum(rounded(nbytes_of(value), self.rounding) for value in values if isinstance(value, Tensor))
        return UpdateCost(state, temporary)


def rounding_of(settings: CostSettings) -> int:
    """What the allocator of a kind of device rounds sizes up to."""
    return CUDA_ROUNDING if settings.device == "cuda" else 1


@dataclass(frozen=True)
class Rates:
    """Nominal rates of a kind of device, for ratios between plans.

    Attributes:
        flops: arithmetic a second in float32.
        half_flops: arithmetic a second in bfloat16 or float16.
        bytes: memory traffic a second.
        launch_seconds: least time of an operator.
    """

    flops: float
    half_flops: float
    bytes: float
    launch_seconds: float


RATES = {
    "cpu": Rates(flops=100e9, half_flops=200e9, bytes=5e9, launch_seconds=5e-6),
    "cuda": Rates(flops=20e12, half_flops=250e12, bytes=1.6e12, launch_seconds=5e-6),
}
"""A few processor cores, whose operators fault in the fresh pages that they write; a data-centre GPU of 2020 (float32
without TF32)."""


@final
class _Source(torch.autograd.Function):
    """Gives a tensor that needs a gradient and takes the gradient; nothing else holds on to either."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None


@final
class _Sink(torch.autograd.Function):
    """Takes an output without holding on to it, and gives a gradient of its shape."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.like = output.shape, output.dtype
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


@final
class _Clock(Observer):
    """Adds up the nominal seconds of operators."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.seconds = 0.0

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs, result: Any) -> None:
        """Add the time of an operator."""
        if not func.is_view and func not in _FREE:
            self.seconds += self._time(func, args, kwargs, result)

    def _time(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs, result: Any) -> float:
        tensors = [item for value in (*args, result) for item in _tensors_of(value)]
        rates, traffic = self.rates, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        time = max(traffic / rates.bytes, rates.launch_seconds)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=result)
            is_half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors)
            time = max(time, flops / (rates.half_flops if is_half else rates.flops))
        return time


_FREE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.detach.default,
    torch.ops.aten._unsafe_view.default,
}
"""Operators that move nothing, though PyTorch doesn't call them views."""


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_of(item)


def nbytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
