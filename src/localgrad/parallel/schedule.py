"""The schedule of parallel local modules: what each rank does, batch by batch. Pure: no tensors, no processes.

Rank r has a run of local modules and works on batch t - r while rank 0 works on batch t. No gradient comes back, so
nothing is waited for but the features of the rank before. F forward of the rank's last module (those before it train
whole), S features sent, U backward and update, r a receive that is asked for ahead, into one of two buffers here::

    time     0        1        2        3        4        5
    rank 0   F0 S0 U0 F1 S1 U1 F2 S2 U2 F3 S3 U3
    rank 1   r0 r1    F0 S0 U0 F1 S1 U1 F2 S2 U2 F3 S3 U3
                      r2       r3
    rank 2   r0 r1             F0 U0    F1 U1    F2 U2    F3 U3
                               r2       r3

``timetable`` draws this of the actions themselves. Features go out before the backward pass, so that they travel under
it. A rank asks for a batch when a buffer is free, and sends one when all but the last few have been taken; so a slow
rank holds up those before it, and the memory for batches on their way is known: ``num_buffers`` of them at each end.

Against the pipelines of end-to-end training (GPipe, 1F1B): a batch needs no way back through the ranks, and the
weights change behind it. So batches follow each other at once, and only the first R - 1 steps of an epoch are idle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from localgrad.partition import balance

Kind = Literal["expect", "receive", "forward", "settle", "send", "update"]
NUM_BUFFERS = 2
"""Batches that may be on their way at each end of a link."""


class Action(NamedTuple):
    """Something that a rank does about one batch.

    Attributes:
        kind: ``expect`` asks for a batch, into a free buffer; ``receive`` waits until it is there; ``forward`` runs
            all modules, the last one as far as its features; ``settle`` waits until a batch sent earlier was taken;
            ``send`` sends features on; ``update`` is the last module's backward pass and update.
        batch: number of the batch.
    """

    kind: Kind
    batch: int


def actions(
    batch: int, *, rank: int, num_ranks: int, first: int, last: int, num_buffers: int = NUM_BUFFERS
) -> Iterator[Action]:
    """What a rank does about one batch, in order.

    Args:
        batch: its number.
        rank: from 0.
        num_ranks: how many there are.
        first: the first batch of the phase (an epoch, or the rest of one).
        last: the last batch, as far as is known; it may come nearer between two batches, but never nearer than
            ``num_buffers - 1`` batches ahead.
        num_buffers: batches that may be on their way at each end of a link.
    """
    if rank > 0:
        ahead = (
            range(first, first + num_buffers) if batch == first else range(batch + num_buffers - 1, batch + num_buffers)
        )
        for coming in ahead:
            if coming <= last:
                yield Action("expect", coming)
        yield Action("receive", batch)
    yield Action("forward", batch)
    if rank < num_ranks - 1:
        if batch - num_buffers >= first:
            yield Action("settle", batch - num_buffers)
        yield Action("send", batch)
    yield Action("update", batch)


def program(rank: int, *, num_ranks: int, num_batches: int, num_buffers: int = NUM_BUFFERS) -> list[Action]:
    """All that a rank does in a phase of a number of batches."""
    last = num_batches - 1
    return [
        action
        for batch in range(num_batches)
        for action in actions(batch, rank=rank, num_ranks=num_ranks, first=0, last=last, num_buffers=num_buffers)
    ]


def timetable(num_ranks: int, num_batches: int, num_buffers: int = NUM_BUFFERS) -> list[list[tuple[Action, ...]]]:
    """What each rank does at each time, if all modules take equally long: rank, time -> actions.

    An action that waits for another rank is done as early as that one lets it; nothing else is supposed.

    Raises:
        RuntimeError: the ranks wait for each other for ever.
    """
    programs = [
        program(r, num_ranks=num_ranks, num_batches=num_batches, num_buffers=num_buffers) for r in range(num_ranks)
    ]
    done = [0] * num_ranks
    sent: list[set[int]] = [set() for _ in range(num_ranks)]
    expected: list[set[int]] = [set() for _ in range(num_ranks)]
    table: list[list[tuple[Action, ...]]] = [[] for _ in range(num_ranks)]
    while any(done[r] < len(programs[r]) for r in range(num_ranks)):
        sent_before, expected_before = [set(batches) for batches in sent], [set(batches) for batches in expected]
        moved = False
        for rank, listed in enumerate(programs):
            now: list[Action] = []
            while done[rank] < len(listed):
                kind, batch = action = listed[done[rank]]
                if kind == "receive" and batch not in sent_before[rank - 1]:
                    break
                if kind == "settle" and batch not in expected_before[rank + 1]:
                    break
                now.append(action)
                done[rank] += 1
                if kind == "expect":
                    expected[rank].add(batch)
                elif kind == "send":
                    sent[rank].add(batch)
                elif kind == "update":
                    break
            moved = moved or bool(now)
            table[rank].append(tuple(now))
        if not moved:
            raise RuntimeError(
                f"ranks wait for each other: {[listed[n] for listed, n in zip(programs, done, strict=True)]}"
            )
    return table


def shares(costs: Sequence[int], num_ranks: int) -> tuple[range, ...]:
    """Which modules each rank has: runs of modules, the largest sum of costs as small as can be.

    Args:
        costs: of each module, in any unit.
        num_ranks: at most as many as there are modules.
    """
    edges = [0, *balance(costs, num_ranks), len(costs)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))
