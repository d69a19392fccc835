"""Offloading: local modules that don't train wait in host memory, and come to the device in time.

::

    batch t     module 0            module 1            module 2
    compute     F L B U             F L B U             F L B U
    copies      in 1                out 0, in 2         out 1, in 0 (for batch t+1)      out 2

Out means home to the host: what training changed (parameters, buffers, optimizer state), then its device memory is
free. One side stream does all copies in order, so the memory that module k leaves is there before module k+2
arrives: the device holds two modules' static tensors at most. On a processor the copies are plain ones.

What moves are the same tensor objects: only their ``.data`` is exchanged. So optimizers find their state under their
parameters, and a module that waits is an ordinary module on the processor. After a step all but module 0 are. A tensor
that several modules read is on the device as long as any of them is.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.backbones.proof import tensors_in

HOST = torch.device("cpu")


class _Home(NamedTuple):
    """Where a tensor on the device has its home in host memory, and torch's count of its changes when it came."""

    tensor: Tensor
    host: Tensor
    version: int


class _Stay(NamedTuple):
    """A module that is on the device."""

    with_state: bool
    homes: list[_Home]


class _Coming(NamedTuple):
    """A module on its way to the device: each tensor, its home, its copy; the CUDA event after the last one."""

    number: int
    with_state: bool
    moved: list[tuple[Tensor, Tensor, Tensor]]
    ready: Any


class CopyWatch(Protocol):
    """Sees what can't be seen where host and device are one memory: where fake tensors are."""

    def copying(self) -> contextlib.AbstractContextManager[None]:
        """A region of copies to and fro; the device's memory of what comes is the side stream's."""

    def made_at_home(self, host: Tensor) -> None:
        """This tensor, made just now, is in host memory."""


@final
class Offloader:
    """Keeps the static tensors of at most two local modules on the device, those of the others in host memory.

    Modules are used in ascending order; in another order they come just as well, but not ahead of time.

    Args:
        modules: all local modules, first to last; their tensors are moved to the host.
        device: where modules are to be used.
        watch: sees the copies.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, watch: CopyWatch | None = None) -> None:
        self.modules = list(modules)
        self._watch = watch
        self.device = torch.empty(0, device=device).device  # "cuda" is the current GPU, by its number
        self._optimizers: list[Optimizer] = []
        self._present: dict[int, _Stay] = {}
        self._coming: _Coming | None = None
        everything = [tensor for module in self.modules for tensor in _distinct(_weights(module))]
        counts = Counter(map(id, everything))
        self._shared = _distinct([tensor for tensor in everything if counts[id(tensor)] > 1])
        _place(everything, HOST)

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on, a module that trains brings the state of its optimizer along."""
        self.rest()
        self._optimizers = list(optimizers)

    @contextlib.contextmanager
    def training(self, index: int) -> Iterator[None]:
        """Have module ``index`` on the device with its optimizer's state, and the one after it on its way.

        After the last module the first one is there for the next step, and what went home has arrived.
        """
        last = index == len(self.modules) - 1
        self._bring(index, with_state=True)
        self._prefetch(0 if last else index + 1, with_state=True)
        try:
            yield
        except BaseException:
            self._coming = None  # nobody knows what comes next
            self._send_home(index)
            self._wait()
            raise
        if len(self.modules) > 1:
            self._send_home(index)
        if last:
            self._bring(0, with_state=True)
            self._wait()

    @contextlib.contextmanager
    def using(self, index: int) -> Iterator[None]:
        """Have module ``index`` on the device to run it, without its optimizer's state."""
        last = index == len(self.modules) - 1
        self._bring(index, with_state=False)
        if not last:
            self._prefetch(index + 1, with_state=False)
        try:
            yield
        except BaseException:
            self._coming = None
            raise
        finally:
            self._send_home(index)
            if last:
                self.rest()

    def rest(self) -> None:
        """Send everything home: all modules are then ordinary modules in host memory."""
        self._coming = None
        for index in list(self._present):
            self._send_home(index)
        self._wait()
        _place(self._shared, HOST)

    def host_tensors(self) -> list[Tensor]:
        """Every tensor that lies in host memory now, the homes of those on the device included."""
        found = []
        for index in range(len(self.modules)):
            stay = self._present.get(index)
            if stay is None:
                found += self._tensors(index, with_state=True)
            else:  # between steps, such a module has its state with it
                found += [home.host for home in stay.homes]
        return found

    # -- one module there and back ------------------------------------------------------------------

    def _tensors(self, index: int, *, with_state: bool) -> list[Tensor]:
        """What moves with a module; looked up each time, since optimizers make and replace their state."""
        shared = set(map(id, self._shared))
        tensors = [tensor for tensor in _weights(self.modules[index]) if id(tensor) not in shared]
        if with_state and self._optimizers:
            tensors += _device_state(self._optimizers[index])
        return _distinct(tensors)

    @torch.no_grad()
    def _prefetch(self, index: int, *, with_state: bool) -> None:
        """Begin to copy a module to the device; nobody sees the copies yet."""
        self._coming = None
        if index in self._present:
            return
        moved = []
        with self._copying():
            for tensor in self._tensors(index, with_state=with_state):
                host = self._home_of(tensor.data)
                there = torch.empty_like(host, device=self.device)  # complete when the side stream has come here
                moved.append((tensor, host, there.copy_(host, non_blocking=True)))
            ready = None if self._stream is None else self._stream.record_event()
        self._coming = _Coming(index, with_state, moved, ready)

    def _bring(self, index: int, *, with_state: bool) -> None:
        """Have a module on the device: what runs from here on sees the copies."""
        if index in self._present:
            return
        _place(self._shared, self.device)
        if self._coming is None or self._coming[:2] != (index, with_state):
            self._prefetch(index, with_state=with_state)
        coming, self._coming = self._coming, None
        assert coming is not None
        if coming.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(coming.ready)
        homes = []
        for tensor, host, there in coming.moved:
            tensor.data = there
            homes.append(_Home(tensor, host, tensor._version))
        self._present[index] = _Stay(with_state, homes)

    @torch.no_grad()
    def _send_home(self, index: int) -> None:
        """Copy what a module's stay changed to the host, and give its device memory back."""
        stay = self._present.pop(index, None)
        if stay is None:
            return
        if self._stream is not None:  # all that used these tensors, and wrote them, comes before the copies home
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        homes = {id(home.tensor): home for home in stay.homes}
        with self._copying():
            for tensor in self._tensors(index, with_state=stay.with_state):
                there = tensor.data
                home = homes.get(id(tensor))
                if home is None or (home.host.shape, home.host.dtype) != (there.shape, there.dtype):  # made since
                    host = torch.empty_like(there, device=HOST, pin_memory=self._pins)
                    if self._watch is not None:
                        self._watch.made_at_home(host)
                else:
                    host = home.host
                    if _is_unchanged(home, trained=stay.with_state):
                        tensor.data = host
                        continue
                host.copy_(there, non_blocking=True)
                if self._stream is not None:
                    # Optimizer state of the first step is the compute stream's, which must not take this memory for
                    # something else before the copy is done. What was fetched is the side stream's own: the next module
                    # to come gets its memory, and comes after this copy.
                    there.record_stream(self._stream)
                tensor.data = host

    def _home_of(self, tensor: Tensor) -> Tensor:
        """The host memory to which a tensor will come back: its own, if that will do."""
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor = tensor.contiguous()  # an expanded tensor can't be written
        if tensor.device != HOST:  # put there by hand, as Optimizer.load_state_dict does
            tensor = tensor.to(HOST)
        return tensor.pin_memory() if self._pins and not tensor.is_pinned() else tensor

    # -- the side stream ----------------------------------------------------------------------------

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"

    @property
    def _stream(self) -> torch.cuda.Stream | None:
        return _side_stream(self.device) if self.device.type == "cuda" else None

    def _copying(self) -> contextlib.AbstractContextManager[Any]:
        if self._watch is not None:
            return self._watch.copying()
        stream = self._stream
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def _wait(self) -> None:
        """Until all copies are done: the processor may read host memory then."""
        if self._stream is not None:
            self._stream.synchronize()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream  # one a device, not one an offloader: streams can't be copied


def _place(tensors: list[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _device_state(optimizer: Optimizer) -> list[Tensor]:
    """State tensors that belong on the device: all but step counters, which most optimizers keep on the processor."""
    counters_too = any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
    return [tensor for tensor in tensors_in(list(optimizer.state.values())) if tensor.ndim > 0 or counters_too]


def _is_unchanged(home: _Home, *, trained: bool) -> bool:
    """Whether a tensor needs no copy home.

    Only of parameters the version counter tells all; batch norms and fused kernels write past it.
    """
    if not isinstance(home.tensor, nn.Parameter) or (trained and home.tensor.requires_grad):
        return False
    return home.tensor._version == home.version
