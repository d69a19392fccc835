"""The best plan for any costs of local modules, in one process or one a rank: exact, pure, integers in, boundaries out.

The problem. Blocks ``0 .. n - 1`` are cut into modules; a module ``(start, stop)`` can be run in several ways, each
with a time and a peak, and adds static bytes (its auxiliary nets and their optimizer state) that are alive all the
time. In one process modules run one after another, so a plan takes

    time = sum of the modules' times          peak = sum of their static bytes + the largest of their peaks

Sought is the least time among plans with ``peak <= budget``; of equals, the one with the fewest modules. With one
module a rank, all train at the same time, each on another batch::

    batch t+2   rank 0   F B U | packet ->
    batch t+1                     rank 1   F B U | packet ->
    batch t                                           rank 2   F B U

No rank waits for a backward pass of another, so the slowest rank sets the speed, and each rank needs room for its own
module only: its weights and their optimizer state, its step, the packets that wait to be worked on, and those that were
sent and not taken yet. Sought are the boundaries, and a way to run each module, with the least of

    time:    (slowest rank, sum over ranks, largest rank's bytes), among plans in which every rank keeps a budget
    memory:  (largest rank's bytes), and of equals the best by time

The algorithm. One dynamic program over prefixes (``_search``): of the plans of the first ``stop`` blocks those are kept
that may still become best. In one process that are those that no other beats in (time, modules), static bytes and
largest peak at once. Static sums vary little, so peaks below ``budget - (the largest static sum)`` fit whatever else is
chosen, and count as equal; what is left is a handful of plans for each prefix. A module then offers one way (its
fastest that fits anyway) and the few in the window above. With 48 blocks that is some thousand spans, each looked at
once. What a rank needs depends on its own blocks alone, so each offers one way, the fastest that fits, and one plan of
each prefix is kept. A maximum can't break ties there (a prefix that is worse than it need be may hide behind a slower
rank further on), so the least maximum is found first, and then the least sum below it.

How it differs from checkpointing planners (Checkmate, arXiv 1910.02653, an integer program; rotor, arXiv 1911.13214, a
dynamic program over one backward pass): gradients end at boundaries, so peaks of modules don't add up, and cutting is
itself the strongest way to save. And from planners of pipelines (PipeDream, arXiv 1806.03377; torchgpipe, arXiv
2004.09910): a stage there keeps the activations of as many batches as there are stages behind it; here a rank keeps one
batch's, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from localgrad.memory.costs import Choice
from localgrad.partition import Boundaries

UNLIMITED = 1 << 62
STEP_OF_FRONTIER = 0.99
"""A plan is worth having beside a faster one if it needs at least one per cent less memory."""


Choices = Callable[[int, int], Sequence[Choice]]
"""``choices(start, stop)``: ways to run a module, the fastest first, each next one slower and smaller; may be empty."""
Static = Callable[[int, int], int]
"""``static(start, stop)``: bytes that the module's auxiliary nets and their optimizer state add."""
Resident = Callable[[int, int, int], int]
"""``resident(rank, start, stop)``: bytes that a rank has besides its module's step: static ones and packets."""


@dataclass(frozen=True)
class Solution:
    """A plan found.

    Attributes:
        boundaries: first block of every module but the first.
        choices: how each module is run.
        nanoseconds: nominal time of a step.
        peak_bytes: its peak, without the static bytes of the model itself.
    """

    boundaries: Boundaries
    choices: tuple[Choice, ...]
    nanoseconds: int
    peak_bytes: int


@dataclass(frozen=True)
class Ranks:
    """A plan found for ranks.

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


# The dynamic program ---------------------------------------------------------------------------------------------


class _Offer(NamedTuple):
    """A way to run a module, and the bytes that are counted with it."""

    choice: Choice
    num_bytes: int


class _Label(NamedTuple):
    """A plan of a prefix: what it is judged by, and what it is."""

    figures: tuple[int, ...]
    boundaries: Boundaries
    offers: tuple[_Offer, ...]

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(offer.choice for offer in self.offers)


_Offers = Callable[[int, int, int], Sequence[_Offer]]
"""``offers(index, start, stop)``: ways to run a module; its index counts only where the number of modules is given."""
_Extended = Callable[[tuple[int, ...], _Offer], tuple[int, ...] | None]
"""Figures of a plan with one more module; they never get less where those of the prefix get more."""


def _search(
    num_blocks: int,
    offers: _Offers,
    extended: _Extended,
    kept: Callable[[list[_Label]], list[_Label]],
    *,
    begin: tuple[int, ...],
    num_modules: range | None = None,
) -> list[_Label]:
    """The plans of all blocks that are kept; prefixes are told apart by their modules if these are counted."""
    best: dict[tuple[int, int], list[_Label]] = {(0, 0): [_Label(begin, (), ())]}
    for stop in range(1, num_blocks + 1):
        reached: dict[int, list[_Label]] = {}
        for start in range(stop):
            for count in (0,) if num_modules is None else range(start + 1):
                labels = best.get((start, count), ())
                if not labels or not (num_modules is None or _can_end(num_modules, count + 1, num_blocks - stop)):
                    continue
                offered = offers(count, start, stop)
                for label in labels:
                    for offer in offered:
                        figures = extended(label.figures, offer)
                        if figures is not None:
                            boundaries = (*label.boundaries, start) if start else ()
                            found = _Label(figures, boundaries, (*label.offers, offer))
                            reached.setdefault(0 if num_modules is None else count + 1, []).append(found)
        for count, labels in reached.items():
            best[stop, count] = kept(labels)
    counts = (0,) if num_modules is None else num_modules
    return [label for count in counts for label in best.get((num_blocks, count), ())]


def _can_end(num_modules: range, made: int, blocks_left: int) -> bool:
    """Whether one of the numbers of modules can be reached with the blocks that are left, each of one at least."""
    if not blocks_left:
        return made in num_modules
    return any(0 < count - made <= blocks_left for count in num_modules)


# In one process --------------------------------------------------------------------------------------------------


def fastest(
    num_blocks: int, choices: Choices, static: Static, budget: int, *, num_modules: range | None = None
) -> Solution | None:
    """Find the fastest plan with ``peak <= budget``, of equals the one with the fewest modules.

    Args:
        num_blocks: blocks between stem and tail.
        choices: ways to run a module.
        static: bytes that a module adds.
        budget: bytes, the model's own static ones already taken off.
        num_modules: how many it may have; any number by default.

    Returns:
        The plan, or ``None`` where none fits.
    """
    fits_anyway = budget - _largest_static(num_blocks, static)

    @cache
    def offered(start: int, stop: int) -> list[_Offer]:
        found = []
        for choice in choices(start, stop):
            if choice.peak_bytes <= budget:
                found.append(_Offer(choice, static(start, stop)))
            if choice.peak_bytes <= fits_anyway:
                break  # slower ones save what need not be saved
        return found

    def extended(figures: tuple[int, ...], offer: _Offer) -> tuple[int, ...] | None:
        time, count, total, peak = figures
        choice, total = offer.choice, total + offer.num_bytes
        if total + max(peak, choice.peak_bytes) > budget:
            return None
        return time + choice.nanoseconds, count + 1, total, max(peak, choice.peak_bytes, fits_anyway)

    last = _search(
        num_blocks,
        lambda _, start, stop: offered(start, stop),
        extended,
        _unbeaten,
        begin=(0, 0, 0, 0),
        num_modules=num_modules,
    )
    best = min(last, key=lambda label: label.figures, default=None)
    if best is None:
        return None
    peak = best.figures[2] + max(choice.peak_bytes for choice in best.choices)
    return Solution(best.boundaries, best.choices, best.figures[0], peak)


def smallest(num_blocks: int, choices: Choices, static: Static, *, num_modules: range | None = None) -> Solution:
    """Find the plan with the least peak, of equals the fastest. Arguments as for ``fastest``.

    Raises:
        ValueError: there is no plan at all (no choices for any partition).
    """

    @cache
    def offered(start: int, stop: int) -> list[_Offer]:
        return [_Offer(choice, static(start, stop)) for choice in choices(start, stop)[-1:]]

    def extended(figures: tuple[int, ...], offer: _Offer) -> tuple[int, ...]:
        time, count, total, peak = figures
        choice = offer.choice
        return time + choice.nanoseconds, count + 1, total + offer.num_bytes, max(peak, choice.peak_bytes)

    labels = _search(
        num_blocks,
        lambda _, start, stop: offered(start, stop),
        extended,
        _unbeaten,
        begin=(0, 0, 0, 0),
        num_modules=num_modules,
    )
    least = min((label.figures[2] + label.figures[3] for label in labels), default=None)
    if least is None:
        counts = "any number of" if num_modules is None else " or ".join(map(str, num_modules))
        raise ValueError(f"no plan of {counts} modules can be made of {num_blocks} blocks")
    found = fastest(num_blocks, choices, static, least, num_modules=num_modules)
    assert found is not None, "the smallest plan fits its own peak"
    return found


def frontier(num_blocks: int, choices: Choices, static: Static, *, num_modules: range | None = None) -> list[Solution]:
    """Find all plans worth having: the fastest of all, then the fastest with one per cent less memory, and so on."""
    found: list[Solution] = []
    solution = fastest(num_blocks, choices, static, UNLIMITED, num_modules=num_modules)
    while solution is not None:
        found.append(solution)
        # Always below the peak just found, also where one per cent of it is less than a byte: each round ends nearer.
        budget = min(int(solution.peak_bytes * STEP_OF_FRONTIER), solution.peak_bytes - 1)
        solution = fastest(num_blocks, choices, static, budget, num_modules=num_modules)
    return found


def _unbeaten(labels: list[_Label]) -> list[_Label]:
    """Plans that no other beats in all of (time, modules), static bytes and peak."""
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda label: label.figures):
        _, _, static, peak = label.figures
        if not any(other.figures[2] <= static and other.figures[3] <= peak for other in kept):
            kept.append(label)
    return kept


def _largest_static(num_blocks: int, static: Static) -> int:
    """The most that the modules of any partition add."""
    most = [0]
    for stop in range(1, num_blocks + 1):
        most.append(max(most[start] + static(start, stop) for start in range(stop)))
    return most[-1]


# One module a rank -----------------------------------------------------------------------------------------------


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

    @cache
    def offers(rank: int, start: int, stop: int) -> list[_Offer]:
        own = resident(rank, start, stop)
        fitting = (choice for choice in choices(start, stop) if own + choice.peak_bytes <= budget)
        return [_Offer(choice, own + choice.peak_bytes) for choice in fitting][:1]

    best = _best_ranks(num_blocks, num_ranks, offers, lambda key, offer: (max(*key, offer.choice.nanoseconds),))
    if best is None:
        return None
    slowest = best.figures[-1]

    def within(rank: int, start: int, stop: int) -> list[_Offer]:
        return [offer for offer in offers(rank, start, stop) if offer.choice.nanoseconds <= slowest]

    def total(key: tuple[int, ...], offer: _Offer) -> tuple[int, ...]:
        return key[0] + offer.choice.nanoseconds, max(key[1], offer.num_bytes)

    best = _best_ranks(num_blocks, num_ranks, within, total)
    assert best is not None, "the plan that has the fastest slowest rank is among them"
    return Ranks(best.boundaries, best.choices, tuple(offer.num_bytes for offer in best.offers))


def smallest_ranks(num_blocks: int, num_ranks: int, choices: Choices, resident: Resident) -> Ranks:
    """Find the plan whose largest rank is the smallest, of equals the fastest. Arguments as for ``fastest_ranks``.

    Raises:
        ValueError: there is no plan at all: more ranks than blocks, or no choices for any partition.
    """

    def offers(rank: int, start: int, stop: int) -> list[_Offer]:
        return [_Offer(way, resident(rank, start, stop) + way.peak_bytes) for way in choices(start, stop)[-1:]]

    best = _best_ranks(num_blocks, num_ranks, offers, lambda key, offer: (max(*key, offer.num_bytes),))
    if best is None:
        raise ValueError(f"no plan for {num_ranks} ranks can be made of {num_blocks} blocks")
    found = fastest_ranks(num_blocks, num_ranks, choices, resident, best.figures[-1])
    assert found is not None, "the smallest plan fits its own peak"
    return found


def _best_ranks(num_blocks: int, num_ranks: int, offers: _Offers, extended: _Extended) -> _Label | None:
    """The plan with the least figures, of equals the one with the earliest boundaries."""

    def first(labels: list[_Label]) -> list[_Label]:
        return [min(labels, key=lambda label: label[:2])]

    found = _search(num_blocks, offers, extended, first, begin=(0, 0), num_modules=range(num_ranks, num_ranks + 1))
    return found[0] if found else None
