"""Whether a plan fits a card: what its run asks of PyTorch's allocator, replayed at exactly what is left of a budget.

A run of a plan is recorded on fake tensors, in the order in which it allocates (``estimating.record_run``): weights,
images that stay on the card, whole steps, evaluation; one more step follows it. What comes out is replayed through a
model of the allocator (``memory/allocator.py``). Fitting isn't monotone in the cap, so a plan is confirmed under the
very cap that its run will have, and under the same less what is named but not recorded (`Room.spare_bytes`).

Near its limit an allocator with expandable segments wears down over steps. Steps become the same from the second on; so
that one is replayed `REPEATS` more times. Of three models at their limit the least cap grew by 3.8 % at most from the
second step to the 25th, and by 0.0 to 1.9 % from the tenth on (PyTorch's allocator, simulated runtime, no GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from localgrad.memory.allocator import CachingAllocator, Event, Replay, replay
from localgrad.memory.allocator_rules import MIB, Rules
from localgrad.memory.cards import CONTEXT_BYTES, Card, available_bytes
from localgrad.memory.recording import Trace
from localgrad.objectives.carried import LocalBatch

REPEATS = 24
"""How often the second step is replayed after itself."""
CUDNN_BYTES = 64 * MIB
"""Left for workspaces of cuDNN where a model has convolutions: an allowance, not measured. It asks for less where it
doesn't get what it would like."""
SMALL_BYTES = 8 * MIB
"""Left for small tensors of a run that aren't recorded: sums of losses, metrics, checks of weights."""


@dataclass(frozen=True, kw_only=True)
class DataPath:
    """What a run's data takes of a card beside the batches of images that steps are given.

    Attributes:
        kept_bytes: of tensors that stay on the card from the first batch on.
        make_batch: makes a batch of so many images as the run does, on fake tensors; images of the model's size and
            labels, by default.
        num_evaluated: images of the parts that are evaluated; the last batch of each may be a smaller one.
        batches_are_full: whether training leaves out a last batch that isn't.
    """

    kept_bytes: tuple[int, ...] = ()
    make_batch: Callable[[int], LocalBatch] | None = None
    num_evaluated: tuple[int, ...] = ()
    batches_are_full: bool = True


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a process's allocator has of a card.

    Attributes:
        card: that it is on.
        rules: of the allocator.
        cap_bytes: that the process may have.
        cudnn_bytes: of these, left for cuDNN.
    """

    card: Card
    rules: Rules
    cap_bytes: int
    cudnn_bytes: int = 0

    @classmethod
    def of(cls, card: Card, rules: Rules, budget: int | None, *, convolves: bool) -> Room:
        """What a budget leaves."""
        cudnn = CUDNN_BYTES if convolves else 0
        return cls(card=card, rules=rules, cap_bytes=available_bytes(card, budget), cudnn_bytes=cudnn)

    def less(self, *, percent: int) -> Room:
        """The same with some per cent left free."""
        return replace(self, cap_bytes=self.cap_bytes * 100 // (100 + percent))

    @property
    def context_bytes(self) -> int:
        """What of a budget the card's context takes."""
        return min(self.card.context_bytes, CONTEXT_BYTES)

    @property
    def spare_bytes(self) -> int:
        """What is named and not recorded."""
        return self.cudnn_bytes + SMALL_BYTES

    def allocators(self, cap_bytes: int) -> Iterator[CachingAllocator]:
        """Every allocator that the process may find itself with: where the driver puts segments is unknown."""
        for is_descending in (False, True) if self.rules.by_address else (True,):
            yield CachingAllocator(
                cap_bytes,
                free_bytes=self.card.total_bytes - self.card.context_bytes,
                total_bytes=self.card.total_bytes,
                is_descending=is_descending,
                rules=self.rules,
            )

    def replayed(self, events: Sequence[Event], cap_bytes: int) -> Replay:
        """Events under a cap; of several allocators the one that reserves the most, or that doesn't do."""
        found = [replay(events, allocator) for allocator in self.allocators(cap_bytes)]
        return min(found, key=lambda each: (each.fits, -each.reserved_bytes))


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What came of a replay.

    Attributes:
        replay: under the cap.
        failed_in: where in the run it ran out, if it did: ``step 2``, ``evaluation``.
        least_bytes: about the least cap that would do; fitting isn't monotone, so it is no promise.
        attention: kernels of attention that were assumed, and why.
    """

    replay: Replay
    failed_in: str | None
    least_bytes: int
    attention: dict[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the plan may be run."""
        return self.failed_in is None


def confirm(trace: Trace, room: Room) -> Confirmation:
    """Replay a recorded run under exactly the cap that it will have, and under that less what isn't recorded."""
    run, first = with_repeats(trace), None
    for cap_bytes in (room.cap_bytes, room.cap_bytes - room.spare_bytes):
        found = room.replayed(run.events, cap_bytes)
        first = first or found
        if not found.fits:
            assert found.failed_at is not None, "it says where"
            failed_in = run.label_at(found.failed_at)
            least = _least_cap(trace.events, room, found)
            return Confirmation(replay=found, failed_in=failed_in, least_bytes=least, attention=trace.attention)
    assert first is not None, "two caps were tried"
    least = _least_cap(trace.events, room, first)
    return Confirmation(replay=first, failed_in=None, least_bytes=least, attention=trace.attention)


def _least_cap(events: Sequence[Event], room: Room, found: Replay) -> int:
    """About the least cap under which events run, with what isn't recorded; by halving, to a per cent."""
    free = room.replayed(events, 1 << 50) if not found.fits else found
    low, high = free.allocated_bytes, max(free.reserved_bytes, found.reserved_bytes) + 64 * MIB
    if not found.fits:
        high = max(high, int(1.3 * free.allocated_bytes))
    generous = Room(card=_unlimited(room.card), rules=room.rules, cap_bytes=high)
    while high - low > max(low // 100, 4 * MIB):
        middle = (low + high) // 2
        low, high = (low, middle) if generous.replayed(events, middle).fits else (middle, high)
    return high + room.spare_bytes


def _unlimited(card: Card) -> Card:
    return replace(card, total_bytes=1 << 50, context_bytes=0)


# Steps that have become the same ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """The events of a run with more steps than were recorded: what an index among them is of."""

    events: list[Event]
    labels: list[tuple[int, str]]

    def label_at(self, index: int) -> str:
        return next((label for start, label in reversed(self.labels) if start <= index), "")


def with_repeats(trace: Trace, repeats: int = REPEATS) -> _Run:
    """The events of a run, with its last step some more times before evaluation, and once more after it.

    What a step leaves behind for the next one (its batch, its losses) is found by comparing what was taken before a
    step and is given back in it with what was taken in it and isn't. Where the two differ nothing is repeated.
    """
    starts = [mark.index for mark in trace.marks] + [len(trace.events)]
    labels = [(mark.index, mark.label) for mark in trace.marks]
    steps = [at for at, mark in enumerate(trace.marks) if mark.label.startswith("step ") and mark.label[5:].isdigit()]
    begin, end = starts[steps[-1]], starts[steps[-1] + 1]
    step, rest = trace.events[begin:end], trace.events[end:]
    sizes = {event[0]: event[1] for event in trace.events if event[1] >= 0}
    own = [event[0] for event in step if event[1] >= 0]
    gone = {event[0] for event in step if event[1] < 0}
    inherited = sorted(gone - set(own))  # numbers ascend as blocks are taken
    left = [number for number in own if number not in gone]
    if [sizes[number] for number in inherited] != [sizes[number] for number in left] or len(steps) == 1:
        return _Run(list(trace.events), labels)
    events, following = trace.events[:end], max(sizes) + 1
    last = dict(zip(inherited, left, strict=True))  # what the step gives back of the one before it -> of this one
    number_of = dict(zip(left, left, strict=True))  # a block that the recorded step left -> the last one's

    def once_more() -> None:
        nonlocal following, last
        now = {number: following + at for at, number in enumerate(own)}
        following += len(own)
        names = {**last, **now}
        events.extend((names[number], *more) for number, *more in step)  # type: ignore[misc]
        last = {old: now[new] for old, new in zip(inherited, left, strict=True)}
        number_of.update({number: now[number] for number in left})

    for _ in range(repeats):
        once_more()
    labels = labels[: steps[-1] + 1] + [(index + len(events) - end, label) for index, label in labels[steps[-1] + 1 :]]
    freed_later = {event[0] for event in rest if event[1] < 0}
    events += [(number_of.get(number, number), *more) for number, *more in rest]  # type: ignore[misc]
    if rest and not freed_later & set(left):
        labels.append((len(events), "step after evaluation"))
        once_more()
    return _Run(events, labels)
