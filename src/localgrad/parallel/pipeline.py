"""The pipelined executor: this process's share of the local modules, between two links.

It does what ``schedule.actions`` says, on the batches that the rank before sends (on rank 0, on those it is given),
and trains its modules just as the sequential executor would: a batch meets the same weights, the same features and the
same random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localgrad.errors import ParallelError
from localgrad.objectives.base import LocalBatch
from localgrad.parallel.schedule import NUM_BUFFERS, actions
from localgrad.parallel.wire import Line, Packet, Receiver, Sender
from localgrad.step.executor import SequentialExecutor
from localgrad.step.local_step import LocalStep


@dataclass(frozen=True)
class Neighbours:
    """Where a rank stands in the row of ranks that share the local modules.

    Attributes:
        rank: from 0.
        num_ranks: how many there are.
        before: line from the rank before; ``None`` for the first.
        behind: line to the next rank; ``None`` for the last.
    """

    rank: int
    num_ranks: int
    before: Line | None = None
    behind: Line | None = None


@dataclass(frozen=True)
class ShareResult:
    """What one training step gives on one rank; every tensor is detached and on the device.

    Attributes:
        logits: the whole model's class logits [B, num_classes] on the last rank, ``None`` on the others.
        losses: total loss of each of this rank's modules, scalars.
        terms: their terms by name, unweighted, scalars.
        module_logits: their own class logits; ``None`` where one has no classifier.
        targets: class indices int64 [B].
        unsound: whether the features that were received aren't all finite numbers, bool; ``None`` on the first rank.
    """

    logits: Tensor | None
    losses: tuple[Tensor, ...]
    terms: tuple[dict[str, Tensor], ...]
    module_logits: tuple[Tensor | None, ...]
    targets: Tensor
    unsound: Tensor | None = None


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
        """Begin a phase.

        Args:
            first: its first batch.
            last: its last batch; if that isn't known, no batch is asked for ahead.
        """
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


class PipelineExecutor(SequentialExecutor):
    """Trains one rank's modules.

    Args:
        steps: of this rank's modules, first to last.
        links: to the ranks before and behind.
        first: index of the first of them.
        uses: what each module of the whole model looks at.

    Attributes:
        sent_bytes_per_step: of the last training step.
    """

    def __init__(self, steps: Sequence[LocalStep], links: Links, *, first: int, uses: Sequence[frozenset[str]]) -> None:
        super().__init__(steps, first=first, uses=uses)
        self.links = links
        self.sent_bytes_per_step = 0

    def share(self, batch: LocalBatch | None, targets: Tensor | None, *, number: int) -> ShareResult:
        """Train this rank's modules on the next batch.

        Args:
            batch: on the first rank; the others receive theirs.
            targets: class indices int64 [B], on the first rank.
            number: of the batch in the training.
        """
        packet = self.links.receive()
        if packet:
            context = tuple(packet[name] for name in sorted(packet) if name.startswith("context"))
            batch = LocalBatch(
                packet.get("images"), packet["labels"], None, packet.get("previous"), context, packet.get("gradient")
            )
            features, targets = packet["features"], packet["targets"]
            unsound = ~torch.isfinite(features.sum())  # read later, where a loss is no number
        else:
            assert batch is not None and batch.images is not None, "a step starts with images"
            assert targets is not None, "and with targets"
            features, unsound = batch.images, None
        batch.number = number
        following = self.first + len(self.steps)
        is_last = self.links.sender is None
        # The gradient at what is handed on is there only after the backward pass.
        is_late = not is_last and "gradient" in self.uses[following]

        def hand_on(received: Tensor, features: Tensor) -> None:
            context = batch.context
            if self.is_used("context", following):
                context = (*context, self.steps[-1].module.pooled(features))
            self.links.send(self._packet(features, batch, targets, received, context))

        trained = self.train(features, batch, None if is_last or is_late else hand_on)
        if is_late:
            self.links.send(self._packet(trained.features, batch, targets, trained.received, batch.context))
        self.links.done()
        if self.links.sender is not None:
            self.sent_bytes_per_step = self.links.sender.packet_bytes
        logits = trained.features if is_last else None
        return ShareResult(logits, trained.losses, trained.terms, trained.module_logits, targets, unsound)

    def _packet(
        self, features: Tensor, batch: LocalBatch, targets: Tensor, received: Tensor | None, context: Sequence[Tensor]
    ) -> Packet:
        """What the next rank's modules look at."""
        following = self.first + len(self.steps)
        packet = {"features": features, "labels": batch.labels, "targets": targets}
        optional = {
            "images": batch.images if self.is_used("images", following) else None,
            "previous": received if self.is_used("previous", following) else None,
            "gradient": batch.gradient if "gradient" in self.uses[following] else None,
        }
        packet |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        if self.is_used("context", following):
            packet |= {f"context{index:03d}": pooled for index, pooled in enumerate(context)}
        return packet
