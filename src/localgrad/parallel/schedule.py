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

Features go out before the backward pass, so that they travel under
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
    """What a rank does about one batch of a phase (an epoch, or the rest of one), in order.

    The last batch is that as far as is known; it may come nearer between two batches, but never nearer than
    ``num_buffers - 1`` batches ahead. So many may be on their way at each end of a link.
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


def shares(costs: Sequence[int], num_ranks: int) -> tuple[range, ...]:
    """Which modules each rank has: runs of modules, the largest sum of their costs as small as can be."""
    edges = [0, *balance(costs, num_ranks), len(costs)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))
