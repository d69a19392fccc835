"""The fastest plan that fits a memory budget: exact, for any costs of local modules. Pure: integers in, boundaries out.

The problem. Blocks ``0 .. n - 1`` are cut into modules; a module ``(start, stop)`` can be run in several ways, each
with a time and a peak, and adds static bytes (its auxiliary nets and their optimizer state) that are alive all the
time. Modules run one after another, so a plan takes

    time = sum of the modules' times          peak = sum of their static bytes + the largest of their peaks

Sought is the least time among plans with ``peak <= budget``; of equals, the one with the fewest modules.

The algorithm. A dynamic program over prefixes: the plans of the first ``stop`` blocks that may still become best are
those that no other beats in (time, modules), static bytes and largest peak at once. Static sums vary little, so peaks
below ``budget - (the largest static sum)`` fit whatever else is chosen, and count as equal; what is left is a handful
of plans for each prefix. A module then offers one way (its fastest that fits anyway) and the few in the window above.
With 48 blocks that is some thousand spans, each looked at once.

How it differs from checkpointing planners (Checkmate, arXiv 1910.02653, an integer program; rotor, arXiv 1911.13214, a
dynamic program over one backward pass): gradients end at boundaries, so peaks of modules don't add up, and cutting is
itself the strongest way to save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class _Label(NamedTuple):
    """A plan of a prefix."""

    nanoseconds: int
    num_modules: int
    static: int
    peak: int
    choice: Choice | None  # of its last module
    start: int  # of its last module
    before: _Label | None


def fastest(
    num_blocks: int, choices: Choices, static: Static, budget: int, *, num_modules: int | None = None
) -> Solution | None:
    """Find the fastest plan with ``peak <= budget``, of equals the one with the fewest modules.

    Args:
        num_blocks: blocks between stem and tail.
        choices: ways to run a module.
        static: bytes that a module adds.
        budget: bytes, the model's own static ones already taken off.
        num_modules: take just so many; any number by default.

    Returns:
        The plan, or ``None`` where none fits.
    """
    fits_anyway = budget - _largest_static(num_blocks, static)

    def offers(start: int, stop: int) -> list[Choice]:
        offered = []
        for choice in choices(start, stop):
            if choice.peak_bytes <= budget:
                offered.append(choice)
            if choice.peak_bytes <= fits_anyway:
                break  # slower ones save what need not be saved
        return offered

    def extended(label: _Label, choice: Choice, start: int, added: int) -> _Label | None:
        total, peak = label.static + added, max(label.peak, choice.peak_bytes, fits_anyway)
        if total + max(label.peak, choice.peak_bytes) > budget:
            return None
        return _Label(label.nanoseconds + choice.nanoseconds, label.num_modules + 1, total, peak, choice, start, label)

    last = _search(num_blocks, offers, static, extended, num_modules)
    best = min(last, key=lambda label: label[:4], default=None)
    return None if best is None else _solution(best)


def smallest(num_blocks: int, choices: Choices, static: Static, *, num_modules: int | None = None) -> Solution:
    """Find the plan with the least peak, of equals the fastest. Arguments as for ``fastest``.

    Raises:
        ValueError: there is no plan at all (no choices for any partition).
    """

    def offers(start: int, stop: int) -> Sequence[Choice]:
        return choices(start, stop)[-1:]

    def extended(label: _Label, choice: Choice, start: int, added: int) -> _Label:
        time, peak = label.nanoseconds + choice.nanoseconds, max(label.peak, choice.peak_bytes)
        return _Label(time, label.num_modules + 1, label.static + added, peak, choice, start, label)

    labels = _search(num_blocks, offers, static, extended, num_modules)
    least = min((label.static + label.peak for label in labels), default=None)
    if least is None:
        raise ValueError(f"no plan of {num_modules or 'any number of'} modules can be made of {num_blocks} blocks")
    found = fastest(num_blocks, choices, static, least, num_modules=num_modules)
    assert found is not None, "the smallest plan fits its own peak"
    return found


def frontier(num_blocks: int, choices: Choices, static: Static, *, num_modules: int | None = None) -> list[Solution]:
    """Find all plans worth having: the fastest of all, then the fastest with one per cent less memory, and so on."""
    found: list[Solution] = []
    solution = fastest(num_blocks, choices, static, UNLIMITED, num_modules=num_modules)
    while solution is not None:
        found.append(solution)
        # Always below the peak just found, also where one per cent of it is less than a byte: each round ends nearer.
        budget = min(int(solution.peak_bytes * STEP_OF_FRONTIER), solution.peak_bytes - 1)
        solution = fastest(num_blocks, choices, static, budget, num_modules=num_modules)
    return found


def _search(
    num_blocks: int,
    offers: Choices,
    static: Static,
    extended: Callable[[_Label, Choice, int, int], _Label | None],
    num_modules: int | None,
) -> list[_Label]:
    """The plans of all blocks that no other beats; prefixes are told apart by their modules if these are counted."""
    counted = num_modules is not None
    best: dict[tuple[int, int], list[_Label]] = {(0, 0): [_Label(0, 0, 0, 0, None, 0, None)]}
    for stop in range(1, num_blocks + 1):
        reached: dict[int, list[_Label]] = {}
        for start in range(stop):
            offered = offers(start, stop)
            added = static(start, stop) if offered else 0
            for count in range(start + 1) if counted else (0,):
                for label in best.get((start, count), ()):
                    for choice in offered:
                        found = extended(label, choice, start, added)
                        if found is not None:
                            reached.setdefault(count + 1 if counted else 0, []).append(found)
        for count, labels in reached.items():
            best[stop, count] = _unbeaten(labels)
    return best.get((num_blocks, num_modules or 0), [])


def _unbeaten(labels: list[_Label]) -> list[_Label]:
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda label: label[:4]):
        if not any(other.static <= label.static and other.peak <= label.peak for other in kept):
            kept.append(label)
    return kept


def _largest_static(num_blocks: int, static: Static) -> int:
    """The most that the modules of any partition add."""
    most = [0]
    for stop in range(1, num_blocks + 1):
        most.append(max(most[start] + static(start, stop) for start in range(stop)))
    return most[-1]


def _solution(last: _Label) -> Solution:
    labels = [last]
    while labels[-1].before is not None and labels[-1].before.choice is not None:
        labels.append(labels[-1].before)
    labels.reverse()
    choices = tuple(label.choice for label in labels if label.choice is not None)
    return Solution(
        boundaries=tuple(label.start for label in labels[1:]),
        choices=choices,
        nanoseconds=last.nanoseconds,
        peak_bytes=last.static + max(choice.peak_bytes for choice in choices),
    )
