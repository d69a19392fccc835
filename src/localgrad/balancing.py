"""The balancing of blocks, exactly and fast: sorted costs of modules, the largest first, as small as can be.

What. ``balanced(costs, num_modules)`` cuts costs above zero into runs. Of all ways it takes the one whose sums, sorted
with the largest first, come first lexicographically; of equals the one with the earliest boundaries.

How. A dynamic program from the last block to the first, over (boundaries so far, where the last one is). What makes it
fast is what it needs not look at:

* Blocks so heavy that the others fit beside them, each module below such a block's own cost, stand alone; cut them out
  first. Then the largest sum ``limit`` of the rest is found by bisection.
* With ``limit``, each boundary has an earliest and a latest position (runs filled from the right, and from the left).
  Mostly these are a few blocks apart, so that few states are left.
* A state's sorted sums are one integer, with a digit for every sum that can occur, as high as the sum is large: adding
  a module is adding a digit, and comparing integers compares sorted sums. Where too many sums can occur, states are
  sorted tuples, and the best next boundary is searched for by halves: it never moves back as the run's start moves on,
  since the cost fulfils the quadrangle inequality (Yao, "Efficient dynamic programming using quadrangle inequalities",
  STOC 1980).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import final

LONGEST = 1 << 16
"""Bits of an integer that stands for sorted sums; with longer ones, tuples are quicker."""


def balanced(costs: Sequence[int], num_modules: int) -> tuple[int, ...]:
    """The boundaries of the best partition.

    Args:
        costs: of each block, above zero.
        num_modules: runs wanted, from 1 to ``len(costs)``.
    """
    runs = _Runs(costs)
    runs.cut_out_heavy_blocks(num_modules)
    if num_modules == len(costs):
        return tuple(range(1, len(costs)))
    low, high = 1, runs.prefix[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if runs.least_modules(middle) <= num_modules else (middle + 1, high)
    return _States(runs, low, num_modules).boundaries()


@final
class _Runs:
    """Blocks, and the heavy ones among them that stand alone.

    Args:
        costs: of each block.
    """

    def __init__(self, costs: Sequence[int]) -> None:
        self.costs = costs
        self.prefix = [0, *accumulate(costs)]
        self.alone: set[int] = set()
        self.edges = [0, len(costs)]  # first blocks of stretches that no module crosses, and the end

    def cut_out_heavy_blocks(self, num_modules: int) -> None:
        """Cut out the heaviest blocks for as long as the others need not make a module as heavy."""
        levels = sorted(set(self.costs), reverse=True)
        low, high = 0, len(levels)  # if the others fit beside some, they fit beside fewer
        while low < high:
            middle = (low + high + 1) // 2
            self._cut_out(levels[:middle])
            low, high = (
                (middle, high) if self.least_modules(levels[middle - 1] - 1) <= num_modules else (low, middle - 1)
            )
        self._cut_out(levels[:low])

    def _cut_out(self, levels: Sequence[int]) -> None:
        self.alone = {block for block, cost in enumerate(self.costs) if levels and cost >= levels[-1]}
        self.edges = sorted({0, len(self.costs), *self.alone, *(block + 1 for block in self.alone)})

    def least_modules(self, limit: int) -> float:
        """The fewest modules none of which costs more than ``limit``, but for blocks that stand alone."""
        prefix, count = self.prefix, 0
        for start, end in pairwise(self.edges):
            position = start
            while position < end:
                reached = end if start in self.alone else bisect_right(prefix, prefix[position] + limit, hi=end + 1) - 1
                if reached == position:
                    return float("inf")
                position, count = reached, count + 1
        return count


@final
class _States:
    """Where boundaries can be, and the best way on from each.

    Args:
        runs: the blocks.
        limit: the most that a module may cost, but for blocks that stand alone.
        num_modules: modules wanted.
    """

    def __init__(self, runs: _Runs, limit: int, num_modules: int) -> None:
        self.prefix, self.alone, self.num_modules = runs.prefix, runs.alone, num_modules
        num_blocks = len(runs.costs)
        self.farthest, nearest = [0] * num_blocks, [0] * (num_blocks + 1)
        for start, end in pairwise(runs.edges):
            for position in range(start, end):
                reached = bisect_right(self.prefix, self.prefix[position] + limit, hi=end + 1) - 1
                self.farthest[position] = end if start in self.alone else reached
                left = bisect_left(self.prefix, self.prefix[position + 1] - limit, lo=start)
                nearest[position + 1] = start if start in self.alone else left
        latest, earliest = [0], [num_blocks]
        for _ in range(num_modules):
            latest.append(self.farthest[latest[-1]] if latest[-1] < num_blocks else num_blocks)
            earliest.append(nearest[earliest[-1]])
        # Boundary number k, with k modules before it and none of them empty.
        self.low = [max(position, k) for k, position in enumerate(reversed(earliest))]
        self.high = [min(position, num_blocks - num_modules + k) for k, position in enumerate(latest)]

    def boundaries(self) -> tuple[int, ...]:
        """The boundaries of the best partition, of equals the earliest."""
        spans = zip(self.low[:-1], self.high[:-1], strict=True)
        starts = set(chain.from_iterable(range(low, high + 1) for low, high in spans))
        sums: set[int] = set()
        bits, most = self.num_modules.bit_length(), LONGEST // self.num_modules.bit_length()
        for start in starts - self.alone:
            sums.update(self.prefix[end] - self.prefix[start] for end in range(start + 1, self.farthest[start] + 1))
            if len(sums) > most:
                return self._by_tuples()
        return self._by_integers({cost: 1 << (bits * digit) for digit, cost in enumerate(sorted(sums))})

    def _next(self, number: int, start: int) -> range:
        """Where the module from boundary ``number`` at ``start`` can end."""
        after = number + 1
        return range(max(start + 1, self.low[after]), min(self.farthest[start], self.high[after]) + 1)

    def _by_integers(self, digit: dict[int, int]) -> tuple[int, ...]:
        prefix, alone = self.prefix, self.alone
        best = [[0]]  # for boundaries from the last to the first, the best from each of its positions on
        for number in reversed(range(self.num_modules)):
            after, low, row = best[-1], self.low[number + 1], []
            for start in range(self.low[number], self.high[number] + 1):
                if start in alone:  # on every way on, so it need not be counted
                    row.append(after[start + 1 - low])
                else:
                    base = prefix[start]
                    ends = self._next(number, start)
                    row.append(min([after[end - low] + digit[prefix[end] - base] for end in ends]))
            best.append(row)
        best.reverse()
        found = [0]
        for number in range(self.num_modules - 1):
            start, low = found[-1], self.low[number + 1]
            goal = best[number][start - self.low[number]]
            for end in self._next(number, start):
                own = 0 if start in alone else digit[prefix[end] - prefix[start]]
                if best[number + 1][end - low] + own == goal:
                    found.append(end)
                    break
        return tuple(found[1:])

    def _by_tuples(self) -> tuple[int, ...]:
        """The same, with negative costs in ascending order as states: the largest tuple is the best."""
        ends: list[dict[int, int]] = []
        best: dict[int, tuple[int, ...]] = {len(self.prefix) - 1: ()}
        for number in reversed(range(self.num_modules)):
            row: dict[int, tuple[int, ...]] = {}
            chosen: dict[int, int] = {}
            after = self.low[number + 1], self.high[number + 1]
            todo = [(self.low[number], self.high[number], *after)]
            while todo:
                low, high, first, last = todo.pop()
                if low > high:
                    continue
                start = (low + high) // 2
                own = self._next(number, start)
                tried = range(max(own.start, first), min(own.stop, last + 1))
                chosen[start] = max(tried, key=lambda end: (self._with(best[end], start, end), -end))
                row[start] = self._with(best[chosen[start]], start, chosen[start])
                todo += [(low, start - 1, first, chosen[start]), (start + 1, high, chosen[start], last)]
            best = row
            ends.append(chosen)
        found = [0]
        for chosen in reversed(ends[1:]):
            found.append(chosen[found[-1]])
        return tuple(found[1:])

    def _with(self, costs: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
        if start in self.alone:
            return costs
        listed = list(costs)
        insort(listed, self.prefix[start] - self.prefix[end])
        return tuple(listed)
