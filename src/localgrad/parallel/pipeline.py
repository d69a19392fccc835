"""The pipelined executor: this process's share of the local modules, between two links.

It does what ``schedule.actions`` says, on the batches that the rank before sends (on rank 0, on those it is given),
and trains its modules just as the sequential executor would: a batch meets the same weights, the same features and the
same random numbers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from localgrad.errors import ParallelError
from localgrad.objectives.carried import LocalBatch
from localgrad.parallel.schedule import NUM_BUFFERS, actions
from localgrad.parallel.wire import Line, Packet, Receiver, Sender, packed, unpacked
from localgrad.step.executor import SequentialExecutor, StepResult


@dataclass(frozen=True)
class Neighbours:
    """Where a rank stands in the row of ranks that share the local modules, and its lines to both sides."""

    rank: int
    num_ranks: int
    before: Line | None = None
    behind: Line | None = None


@final
class Links:
    """Both links of a rank through one phase after another, in the order of the schedule.

    Args:
        place: where this rank stands.
        device: where tensors are wanted.
        num_buffers: batches that may be on their way at each end of a link.
        wire: ``same`` or ``bf16``.
    """

    def __init__(
        self, place: Neighbours, device: torch.device, *, num_buffers: int = NUM_BUFFERS, wire: str = "same"
    ) -> None:
        self.place = place
        self.num_buffers = num_buffers
        self.sender = None if place.behind is None else Sender(place.behind, wire=wire)
        # What is sent on from a buffer must stay there until it was taken.
        self.num_slots = num_buffers if place.behind is None else 2 * num_buffers
        self.receiver = None if place.before is None else Receiver(place.before, device, self.num_slots)
        self.waited_seconds = 0.0
        self.doing: tuple[str, int, float] = ("nothing", 0, time.monotonic())
        self.begin(0)

    def begin(self, first: int, last: int | None = None) -> None:
        """Begin a phase with its first batch; if its last one isn't known, no batch is asked for ahead."""
        self.first = self.batch = first
        self._last = last
        if last is not None:
            self._do("between batches")

    @property
    def last(self) -> int:
        """The last batch of the phase, as far as is known."""
        return self.batch if self._last is None else self._last

    @property
    def is_over(self) -> bool:
        """Whether all batches of the phase are done."""
        return self._last is not None and self.batch > self._last

    def stop_soon(self) -> None:
        """End the phase as soon as no rank asks for more: on rank 0, which the others follow."""
        if self._last is not None:
            self._last = min(self._last, self.batch + self.num_buffers)

    def finish(self) -> None:
        """Wait until everything sent was taken."""
        if self.sender is not None:
            self.sender.finish()
        if self.receiver is not None:
            self.receiver.finish()
        self._do("nothing")

    def receive(self) -> dict[str, Tensor]:
        """The next batch's packet; asks for those behind it on the way. Nothing on the first rank."""
        if self.is_over:
            raise ParallelError(f"all {self.batch - self.first} batches that were begun are done; call begin() again.")
        packet: dict[str, Tensor] = {}
        for kind, batch in self._actions():
            if kind == "expect":
                assert self.receiver is not None, "the first rank expects nothing"
                start = self._waiting("the rank before")
                self.receiver.expect(batch)
                self.waited_seconds += time.monotonic() - start  # the first packet of a phase is described first
            elif kind == "receive":
                assert self.receiver is not None, "the first rank receives nothing"
                start = self._waiting("the rank before")
                packet, last = self.receiver.receive(batch)
                self.waited_seconds += time.monotonic() - start
                self._last = None if self._last is None else last
            elif kind == "forward":
                break
        self._do("work")
        return packet

    def send(self, packet: Packet) -> None:
        """Send the batch on, once there is room."""
        assert self.sender is not None, "the last rank sends nothing"
        for kind, batch in self._actions():
            if kind == "settle":
                start = self._waiting("the next rank")
                self.sender.settle(batch)
                self.waited_seconds += time.monotonic() - start
            elif kind == "send":
                self.sender.send(batch, packet, last=self.last)
        self._do("work")

    def done(self) -> None:
        """The batch is done."""
        self.batch += 1
        self._do("between batches")

    def _actions(self) -> list[tuple[str, int]]:
        found = actions(
            self.batch,
            rank=self.place.rank,
            num_ranks=self.place.num_ranks,
            first=self.first,
            last=self.last,
            num_buffers=self.num_buffers,
        )
        return list(found)

    def _do(self, what: str) -> float:
        now = time.monotonic()
        self.doing = (what, self.batch, now)
        return now

    def _waiting(self, whom: str) -> float:
        return self._do(f"wait for {whom}")


@final
class PipelineExecutor:
    """Trains one rank's modules, between its links to the ranks before and behind."""

    def __init__(self, executor: SequentialExecutor, links: Links) -> None:
        self.executor = executor
        self.links = links
        self.sent_bytes_per_step = 0

    def receive(self, given: LocalBatch | None) -> tuple[LocalBatch, Tensor | None]:
        """The next batch (on rank 0 the one given), and whether it is unsound: not all features finite, bool."""
        packet = self.links.receive()
        if not packet:
            assert given is not None, "the first rank has the images"
            return given, None
        return unpacked(packet), ~torch.isfinite(packet["features"].sum())  # read later, where a loss is no number

    def step(self, batch: LocalBatch, unsound: Tensor | None) -> StepResult:
        """Train this rank's modules on a batch, and send it on. Arguments are what ``receive`` gave."""
        send = None if self.links.sender is None else lambda onward: self.links.send(packed(onward))
        result = self.executor.step(batch, send)
        self.links.done()
        if self.links.sender is not None:
            self.sent_bytes_per_step = self.links.sender.packet_bytes
        return replace(result, unsound=unsound)
