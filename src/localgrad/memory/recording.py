"""The blocks that a step takes from a CUDA card's allocator and gives back, in order: no GPU, and no tensor has memory.

What. A `Recorder` watches a tracker (``track.py``), and writes down each storage that appears and dies. Among that it
writes what a CUDA device would do and fake tensors don't: the temporaries of operators (``temporaries.py``), a cuBLAS
workspace for each thread that multiplies, autograd's sums of gradients in place. What comes out is a `Trace`, which
``allocator.py`` replays.

What stays on the processor isn't written down: the step counters of optimizers.

Autograd sums the gradients that reach a tensor on several ways in place, where it holds the only reference to the
first. Under a dispatch mode it never does, so the sum is written down as a block of its own; if the first term dies
right after, the sum takes that one's block instead. Source: ``torch/csrc/autograd/input_buffer.cpp``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from localgrad.backbones.namespaces import Kwargs
from localgrad.memory.allocator import Event
from localgrad.memory.cards import Card
from localgrad.memory.temporaries import MULTIPLY, moves_of, workspace_bytes
from localgrad.memory.track import Observer

GIVEN_BACK = -1
COUNTER_BYTES = 8  # of an optimizer's step counter, at most
SIDE_STREAM = 1


@dataclass(frozen=True)
class Mark:
    """Where a part of a trace begins.

    Attributes:
        label: such as ``step 1`` or ``evaluation``.
        index: of its first event.
    """

    label: str
    index: int


@dataclass
class Trace:
    """What a run takes from the allocator, in order.

    Attributes:
        card: that it is recorded for.
        events: blocks that are taken and given back.
        marks: where steps, evaluation and so on begin, in order; they are as long as until the next.
        attention: kernels of fused attention that were assumed: name to reason.
    """

    card: Card
    events: list[Event] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)

    def label_at(self, index: int) -> str:
        """The label of the part in which an event lies."""
        return next((mark.label for mark in reversed(self.marks) if mark.index <= index), "")


@final
class Recorder(Observer):
    """Writes a trace of what a tracker sees.

    Args:
        card: that the operators would run on.
    """

    def __init__(self, card: Card) -> None:
        self.trace = Trace(card)
        self._numbers: dict[int, int] = {}  # by address of the storage
        self._num_blocks = 0
        self._on_host: set[int] = set()  # likewise
        self._empty: set[int] = set()  # numbers
        self._made: list[tuple[int, int]] | None = None  # of the operator that runs: numbers and bytes
        self._gone: list[int] = []
        self._moves: list[tuple[str, int]] | None = None
        self._has_workspace = {False: False, True: False}  # in the backward pass or not
        self._sum: _Sum | None = None
        self._stream = 0

    def mark(self, label: str) -> None:
        """Begin a part of the trace."""
        self.trace.marks.append(Mark(label, len(self.trace.events)))

    def take(self, nbytes: int) -> Callable[[], None]:
        """Take bytes of which no tensor is known; calling the result gives them back."""
        number = self._take(nbytes)
        return lambda: self._give(number)

    # -- modules that wait in host memory (``step/offload.py``) ---------------------------------------------

    def stays_on_host(self, tensor: Tensor) -> None:
        """A tensor that isn't known yet is in host memory: nothing of it is written down."""
        self._on_host.add(tensor.untyped_storage()._cdata)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """A region of copies to and fro; what is made in it comes from the side stream's memory."""
        self._stream = SIDE_STREAM
        try:
            yield
        finally:
            self._stream = 0

    def made_at_home(self, host: Tensor) -> None:
        """A tensor that was made just now is in host memory: nothing was taken for it."""
        number = self._numbers.pop(host.untyped_storage()._cdata)
        taken = self.trace.events.pop()
        assert taken[0] == number, "it was the last"
        self.stays_on_host(host)

    # -- what the tracker tells --------------------------------------------------------------------------

    def before(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        """An operator is about to run."""
        self._sum = None
        self._made, self._gone = [], []
        self._moves = moves_of(func, args, self.trace.card)

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs, result: Any) -> None:
        """It ran: write down its outputs, and what it took besides."""
        made, moves = self._made or [], self._moves
        self._made = None
        if moves is None:
            self._write(made)
        else:
            self._lay_out(made, moves)
        if func in MULTIPLY:
            self._multiply()
        for number in self._gone:
            self._give(number)
        if func is _ADD and made:
            self._sum = self._maybe_in_place(args, result)

    def took(self, storage: torch.UntypedStorage, *, was_there: bool, in_optimizer: bool) -> None:
        """A storage is there."""
        nbytes = storage.nbytes()
        if storage._cdata in self._on_host:
            return
        if in_optimizer and nbytes <= COUNTER_BYTES:
            return
        number = self._numbers[storage._cdata] = self._next()
        if self._made is None or was_there:
            self._write([(number, nbytes)])
        else:
            self._made.append((number, nbytes))

    def gave_back(self, address: int) -> None:
        """A storage is gone."""
        number = self._numbers.pop(address, None)
        if number is None:
            self._on_host.discard(address)
            return
        if self._made is not None:
            self._gone.append(number)
            return
        if self._sum is not None and self._sum.address == address:  # the sum is this very block, and goes on
            taken, self._sum = self._sum, None
            self.trace.events.pop()
            self._numbers[taken.result] = number
            return
        self._give(number)

    # -- writing ---------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._num_blocks += 1
        return self._num_blocks - 1

    def _write(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Write that blocks are taken; of nothing the allocator takes nothing."""
        for number, nbytes in blocks:
            if nbytes:
                self.trace.events.append((number, nbytes, self._stream) if self._stream else (number, nbytes))
            else:
                self._empty.add(number)

    def _take(self, nbytes: int) -> int:
        number = self._next()
        self._write([(number, nbytes)])
        return number

    def _give(self, number: int) -> None:
        self._sum = None
        if number in self._empty:
            self._empty.discard(number)
        else:
            self.trace.events.append((number, GIVEN_BACK))

    def _lay_out(self, made: list[tuple[int, int]], moves: list[tuple[str, int]]) -> None:
        """Write an operator's outputs among what it takes besides."""
        named = {value for kind, value in moves if kind == "output"}
        rest = [block for at, block in enumerate(made) if at not in named]
        taken: list[int] = []
        for kind, value in moves:
            if kind == "take":
                taken.append(self._take(value))
            elif kind == "give":
                self._give(taken[value])
            elif kind == "output":
                self._write(made[value : value + 1])
            elif kind == "multiply":
                self._multiply()
            else:
                self._write(rest)
                rest = []
        self._write(rest)

    def _multiply(self) -> None:
        """Where a thread multiplies for the first time, its workspace is taken, and stays."""
        in_backward = torch._C._current_graph_task_id() != NO_TASK
        if not self._has_workspace[in_backward]:
            self._has_workspace[in_backward] = True
            self._take(workspace_bytes(self.trace.card))

    def _maybe_in_place(self, args: tuple[Any, ...], result: Tensor) -> _Sum | None:
        """A sum that autograd would have made in place, if its first term dies right now."""
        first, second = args[:2]
        is_autograds = torch._C._current_graph_task_id() != NO_TASK and not torch.is_grad_enabled()
        if not is_autograds or not isinstance(second, Tensor) or first._is_view():
            return None
        if first.dtype != result.dtype or first.shape != result.shape:
            return None
        return _Sum(first.untyped_storage()._cdata, result.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Sum:
    """A sum that was just made: the addresses of its first term and of its result."""

    address: int
    result: int


_ADD = torch.ops.aten.add.Tensor
NO_TASK = -1  # torch's number of the backward pass that runs, where none does
