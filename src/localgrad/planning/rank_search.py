"""The best plan for modules that train at the same time, one a rank: exact, pure, integers in, boundaries out.

The problem. Blocks ``0 .. n - 1`` are cut into as many modules as there are ranks; rank r has module r alone::

    batch t+2   rank 0   F B U | packet ->
    batch t+1                     rank 1   F B U | packet ->
    batch t                                           rank 2   F B U

No rank waits for a backward pass of another, so the slowest rank sets the speed, and each rank needs room for its own
module only: its weights and their optimizer state, its step, the packets that wait to be worked on, and those that were
sent and not taken yet. Sought are the boundaries, and a way to run each module, with the least of

    time:    (slowest rank, sum over ranks, largest rank's bytes), among plans in which every rank keeps a budget
    memory:  (largest rank's bytes), and of equals the best by time

The algorithm. What a rank needs depends on its own blocks alone, so the fastest way that fits is chosen module by
module, and what is left is a minimax dynamic program over (ranks, blocks): every span once a rank, twice over. A
maximum can't break ties in a dynamic program (a prefix that is worse than it need be may hide behind a slower rank
further on), so the least maximum is found first, and then the least sum below it.

How it differs from planners of pipelines (PipeDream, arXiv 1806.03377; torchgpipe, arXiv 2004.09910): a stage
there keeps the activations of as many batches as there are stages behind it; here a rank keeps one batch's, wherever it
stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from localgrad.memory.costs import Choice
from localgrad.partition import Boundaries
from localgrad.planning.search import UNLIMITED, Choices

Resident = Callable[[int, int, int], int]
"""``resident(rank, start, stop)``: bytes that a rank has besides its module's step: static ones and packets."""


@dataclass(frozen=True)
class Ranks:
    """A plan found.

    Attributes:
        boundaries: first block of every rank but the first.
        choices: how each rank's module is run.
        rank_bytes: each rank's peak.
    """

    boundaries: Boundaries
    choices: tuple[Choice, ...]
    rank_bytes: tuple[int, ...]

    @property
    def nanoseconds(self) -> int:
        """Nominal time of the slowest rank's step."""
        return max(choice.nanoseconds for choice in self.choices)


class _Offer(NamedTuple):
    choice: Choice
    num_bytes: int


class _Label(NamedTuple):
    """The best plan of the first blocks on the first ranks."""

    key: tuple[int, ...]
    boundaries: Boundaries
    offers: tuple[_Offer, ...]


Offers = Callable[[int, int, int], _Offer | None]
Key = Callable[[tuple[int, ...], _Offer], tuple[int, ...]]


def fastest_ranks(
    num_blocks: int, num_ranks: int, choices: Choices, resident: Resident, budget: int = UNLIMITED
) -> Ranks | None:
    """Find the plan with the fastest slowest rank in which every rank is within a budget.

    Args:
        num_blocks: blocks between stem and tail.
        num_ranks: modules, one a rank.
        choices: ways to run a module.
        resident: bytes that a rank has besides its module's step.
        budget: bytes of one rank.

    Returns:
        The plan, of equals the one with the least sum of times, then with the smallest largest rank; ``None`` where
        none fits.
    """
    found: dict[tuple[int, int, int], _Offer | None] = {}

    def offers(rank: int, start: int, stop: int) -> _Offer | None:
        place = rank, start, stop
        if place not in found:
            own = resident(rank, start, stop)
            fitting = (choice for choice in choices(start, stop) if own + choice.peak_bytes <= budget)
            choice = next(fitting, None)
            found[place] = None if choice is None else _Offer(choice, own + choice.peak_bytes)
        return found[place]

    best = _search(num_blocks, num_ranks, offers, lambda key, offer: (max(*key, offer.choice.nanoseconds),))
    if best is None:
        return None
    slowest = best.key[-1]

    def within(rank: int, start: int, stop: int) -> _Offer | None:
        offer = offers(rank, start, stop)
        return offer if offer is not None and offer.choice.nanoseconds <= slowest else None

    def total(key: tuple[int, ...], offer: _Offer) -> tuple[int, ...]:
        return key[0] + offer.choice.nanoseconds, max(key[1], offer.num_bytes)

    best = _search(num_blocks, num_ranks, within, total)
    assert best is not None, "the plan that has the fastest slowest rank is among them"
    numbers = [offer.num_bytes for offer in best.offers]
    return Ranks(best.boundaries, tuple(offer.choice for offer in best.offers), tuple(numbers))


def smallest_ranks(num_blocks: int, num_ranks: int, choices: Choices, resident: Resident) -> Ranks:
    """Find the plan whose largest rank is the smallest, of equals the fastest. Arguments as for ``fastest_ranks``.

    Raises:
        ValueError: there is no plan at all: more ranks than blocks, or no choices for any partition.
    """

    def offers(rank: int, start: int, stop: int) -> _Offer | None:
        ways = choices(start, stop)
        return _Offer(ways[-1], resident(rank, start, stop) + ways[-1].peak_bytes) if ways else None

    best = _search(num_blocks, num_ranks, offers, lambda key, offer: (max(*key, offer.num_bytes),))
    if best is None:
        raise ValueError(f"no plan for {num_ranks} ranks can be made of {num_blocks} blocks")
    found = fastest_ranks(num_blocks, num_ranks, choices, resident, best.key[-1])
    assert found is not None, "the smallest plan fits its own peak"
    return found


def _search(num_blocks: int, num_ranks: int, offers: Offers, key: Key) -> _Label | None:
    """The plan with the least key; a key must never get less where that of a prefix gets more."""
    best: dict[int, _Label] = {0: _Label((0, 0), (), ())}
    for rank in range(num_ranks):
        is_last = rank == num_ranks - 1
        reached: dict[int, _Label] = {}
        for stop in [num_blocks] if is_last else range(rank + 1, num_blocks - (num_ranks - 1 - rank) + 1):
            labels = _extended(best, rank, stop, offers, key)
            label = min(labels, key=lambda label: label[:2], default=None)
            if label is not None:
                reached[stop] = label
        best = reached
    return best.get(num_blocks)


def _extended(best: dict[int, _Label], rank: int, stop: int, offers: Offers, key: Key) -> Iterable[_Label]:
    for start, label in best.items():
        offer = offers(rank, start, stop) if start < stop else None
        if offer is not None:
            boundaries = (*label.boundaries, start) if rank else ()
            yield _Label(key(label.key, offer), boundaries, (*label.offers, offer))
