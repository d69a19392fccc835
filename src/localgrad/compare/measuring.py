"""Step time and peak memory as they are observed: no code in common with the estimates of ``memory/track.py``.

How memory is counted.

* On CUDA: ``torch.cuda.max_memory_allocated`` of one step that is not timed, after the warm-up, the cache emptied and
  the counters reset: everything alive on the device, whoever made it. ``max_memory_reserved`` of the same step stands
  beside it: what the caching allocator held for that.
* On a processor: the most bytes that tensors took at once in one step, from the allocation events of torch's profiler,
  on top of what was alive before: parameters, buffers and optimizer state of what the step holds, images and labels.
  It is not the size of the process, which has Python, libraries, and freed pages that the C library keeps.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.errors import RecipeError
from localgrad.learner import Learner

Step = Callable[[Tensor, Tensor], object]
Held = nn.Module | Optimizer | Tensor


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was observed of one training step.

    Attributes:
        batch_size: images a step.
        device: where the images were.
        seconds: of each timed step.
        peak_bytes: the most bytes of tensors that were alive at once; how they are counted is told above.
        reserved_bytes: what the CUDA allocator held at most; ``None`` on a processor.
    """

    batch_size: int
    device: str
    seconds: tuple[float, ...]
    peak_bytes: int
    reserved_bytes: int | None

    @property
    def median_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Images a second at the median step time."""
        return self.batch_size / self.median_seconds


def measure(
    step: Learner | Step,
    images: Tensor,
    labels: Tensor,
    *,
    holds: Iterable[Held] | None = None,
    repeats: int = 5,
    warmup: int = 2,
) -> Measurement:
    """Time a training step and measure its peak memory.

    The steps really train. First come ``warmup`` of them, then one for the memory, then ``repeats`` that are timed.

    Args:
        step: a learner with optimizers; or a function of images and labels that does one training step.
        images: [B, C, H, W], on the device; they stay alive and count.
        labels: [B].
        holds: for a function, what is alive between its steps: model and optimizer. Read on processors only; CUDA's
            allocator knows by itself.
        repeats: timed steps, at least 1.
        warmup: steps before; without any, the memory is that of the first step, which makes the optimizer's state.

    Returns:
        Seconds of each repeat, and peak bytes.

    Raises:
        RecipeError: ``repeats`` or ``warmup`` is too small, or ``holds`` is missing.

    Example:
        >>> localgrad.measure(learner, images, labels).images_per_second  # doctest: +SKIP
        >>> localgrad.measure(train_step, images, labels, holds=(model, optimizer)).peak_bytes  # doctest: +SKIP
    """
    if repeats < 1:
        raise RecipeError(f"repeats must be at least 1, got {repeats}.")
    if warmup < 0:
        raise RecipeError(f"warmup can't be negative, got {warmup}.")
    device = images.device
    if not isinstance(step, Learner) and holds is None and device.type != "cuda":
        raise RecipeError(
            "holds: a function doesn't tell what is alive between its steps; pass holds=(model, optimizer)."
        )
    run = step.step if isinstance(step, Learner) else step

    def once() -> None:
        run(images, labels)

    for _ in range(warmup):
        once()
    # Asked when the optimizers have made their state.
    held: Iterable[Held] = holds or ()
    if isinstance(step, Learner):
        held = [*step.modules, *step.optimizers, *([] if step._ema is None else [step._ema.module])]
    allocated, reserved = peak_of(once, device, [*held, images, labels])
    seconds = tuple(timed(once, device) for _ in range(repeats))
    return Measurement(
        batch_size=len(images), device=str(device), seconds=seconds, peak_bytes=allocated, reserved_bytes=reserved
    )


def timed(run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one call takes until the device is done."""
    _synchronize(device)
    start = clock()
    run()
    _synchronize(device)
    return clock() - start


def peak_of(run: Callable[[], object], device: torch.device, held: Iterable[Held]) -> tuple[int, int | None]:
    """Measure the peak memory of one call.

    What is held before it counts on a processor; CUDA's allocator knows by itself.

    Returns:
        Bytes allocated at most, and bytes reserved at most (``None`` on a processor).
    """
    gc.collect()  # what only cycles keep alive is no part of the step
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    before = resident_bytes(held)
    return before + _rise(run), None


def resident_bytes(held: Iterable[Held]) -> int:
    """Bytes of all tensors of modules and optimizers, each storage counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors_of(held):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tensors_of(held: Iterable[Held]) -> list[Tensor]:
    """Parameters, buffers and gradients of modules, states of optimizers, and tensors as they are."""
    found: list[Tensor] = []
    for item in held:
        if isinstance(item, nn.Module):
            weights = [*item.parameters()]
            found += [*weights, *item.buffers(), *(weight.grad for weight in weights if weight.grad is not None)]
        elif isinstance(item, Optimizer):
            states = (state for state in item.state.values() if isinstance(state, dict))
            found += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        else:
            found.append(item)
    return found


def _rise(run: Callable[[], object]) -> int:
    """The most bytes above the beginning that the processor's allocator gave out during one call."""
    collects = gc.isenabled()
    gc.disable()  # it would free cycles at a moment that depends on earlier steps
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        if collects:
            gc.enable()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), number, event.nbytes())
        for number, event in enumerate(events)
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    running = peak = 0
    for _, _, nbytes in sorted(changes):
        running += nbytes
        peak = max(peak, running)
    return peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
