"""The planner against brute force: every partition, every way to run every module."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad.partition import Checkpointing, check_boundaries, spans
from localgrad.planning.search import UNLIMITED, Choice, Solution, fastest, frontier, smallest

WAYS = [Checkpointing(), Checkpointing("blocks"), Checkpointing("halves"), Checkpointing("halves", 4)]


class Table:
    """Random costs of every module, no more alike than a model's."""

    def __init__(self, num_blocks: int, seed: int, *, spread: int = 50, largest_static: int = 30) -> None:
        generator = random.Random(seed)
        self.num_blocks = num_blocks
        self._static = {}
        self._choices = {}
        for start in range(num_blocks):
            for stop in range(start + 1, num_blocks + 1):
                times = sorted(generator.sample(range(spread + 4), generator.randint(1, 4)))
                peaks = sorted((generator.randint(0, spread) * (stop - start) for _ in times), reverse=True)
                options = {peak: (time, peak, how) for time, peak, how in zip(times, peaks, WAYS, strict=False)}
                kept = sorted(options.values())
                falling = [o for i, o in enumerate(kept) if all(o[1] < earlier[1] for earlier in kept[:i])]
                self._choices[start, stop] = [Choice(*option) for option in falling]
                self._static[start, stop] = generator.randint(0, largest_static)

    def choices(self, start: int, stop: int) -> list[Choice]:
        return self._choices[start, stop]

    def static(self, start: int, stop: int) -> int:
        return self._static[start, stop]

    def brute_force(self, budget: int, num_modules: range | None = None) -> tuple[int, int] | None:
        """(time, modules) of the best plan, by looking at all of them."""
        best = None
        inner = range(1, self.num_blocks)
        counts = [count - 1 for count in num_modules or range(1, self.num_blocks + 1) if count <= self.num_blocks]
        for boundaries in itertools.chain.from_iterable(itertools.combinations(inner, count) for count in counts):
            runs = [(span.start, span.stop) for span in spans(boundaries, self.num_blocks)]
            room = budget - sum(self._static[run] for run in runs)
            # Given the partition, modules don't disturb each other: each takes its fastest way that has room.
            fitting = [[c.nanoseconds for c in self._choices[run] if c.peak_bytes <= room] for run in runs]
            if all(fitting):
                found = sum(min(times) for times in fitting), len(runs)
                best = found if best is None else min(best, found)
        return best

    def least_peak(self) -> int:
        inner = range(1, self.num_blocks)
        every = itertools.chain.from_iterable(itertools.combinations(inner, n) for n in range(self.num_blocks))
        return min(
            sum(self._static[run] for run in runs) + max(self._choices[run][-1].peak_bytes for run in runs)
            for runs in ([(s.start, s.stop) for s in spans(boundaries, self.num_blocks)] for boundaries in every)
        )

    def check(self, solution: Solution, budget: int) -> None:
        """A solution is what it says it is."""
        check_boundaries(solution.boundaries, self.num_blocks)
        runs = [(span.start, span.stop) for span in spans(solution.boundaries, self.num_blocks)]
        assert len(runs) == len(solution.choices)
        assert all(choice in self._choices[run] for run, choice in zip(runs, solution.choices, strict=True))
        assert solution.nanoseconds == sum(choice.nanoseconds for choice in solution.choices)
        peak = sum(self._static[run] for run in runs) + max(choice.peak_bytes for choice in solution.choices)
        assert solution.peak_bytes == peak <= budget


@given(
    num_blocks=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    largest_static=st.sampled_from([0, 3, 30, 200]),
    share=st.floats(0, 1.2),
)
@settings(deadline=None, max_examples=150)
def test_the_fastest_plan_is_that_of_brute_force(num_blocks, seed, largest_static, share):
    table = Table(num_blocks, seed, largest_static=largest_static)
    budget = int(share * (table.choices(0, num_blocks)[0].peak_bytes + largest_static))
    expected = table.brute_force(budget)
    found = fastest(num_blocks, table.choices, table.static, budget)
    if expected is None:
        assert found is None
        return
    assert found is not None
    table.check(found, budget)
    assert (found.nanoseconds, len(found.choices)) == expected


@given(num_blocks=st.integers(10, 14), seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0))
@settings(deadline=None, max_examples=15)
def test_up_to_fourteen_blocks_too(num_blocks, seed, share):
    table = Table(num_blocks, seed)
    budget = int(share * table.choices(0, num_blocks)[0].peak_bytes)
    expected = table.brute_force(budget)
    found = fastest(num_blocks, table.choices, table.static, budget)
    assert (None if found is None else (found.nanoseconds, len(found.choices))) == expected


@given(
    num_blocks=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    least=st.integers(1, 8),
    more=st.integers(0, 3),
    share=st.floats(0, 1.5),
)
@settings(deadline=None, max_examples=100)
def test_a_number_of_modules_can_be_asked_for(num_blocks, seed, least, more, share):
    table, num_modules = Table(num_blocks, seed), range(least, least + more + 1)
    budget = int(share * table.choices(0, num_blocks)[0].peak_bytes)
    expected = table.brute_force(budget, num_modules)
    found = fastest(num_blocks, table.choices, table.static, budget, num_modules=num_modules)
    assert (None if found is None else (found.nanoseconds, len(found.choices))) == expected
    assert found is None or len(found.choices) in num_modules


@given(num_blocks=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_the_smallest_plan_is_the_smallest_and_no_smaller_budget_fits(num_blocks, seed):
    table = Table(num_blocks, seed)
    found = smallest(num_blocks, table.choices, table.static)
    assert found.peak_bytes == table.least_peak()
    table.check(found, found.peak_bytes)
    assert fastest(num_blocks, table.choices, table.static, found.peak_bytes - 1) is None


@given(num_blocks=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_the_frontier_gets_slower_and_smaller_and_ends_near_the_smallest(num_blocks, seed):
    table = Table(num_blocks, seed)
    plans = frontier(num_blocks, table.choices, table.static)
    assert plans[0] == fastest(num_blocks, table.choices, table.static, UNLIMITED)
    for faster, smaller in itertools.pairwise(plans):
        assert smaller.nanoseconds >= faster.nanoseconds
        assert smaller.peak_bytes <= 0.99 * faster.peak_bytes
        assert fastest(num_blocks, table.choices, table.static, smaller.peak_bytes).nanoseconds == smaller.nanoseconds
    assert plans[-1].peak_bytes * 0.99 < smallest(num_blocks, table.choices, table.static).peak_bytes + 1


def test_the_frontier_ends_where_a_plan_costs_nothing():
    plans = frontier(3, lambda start, stop: [Choice(stop - start, 0, Checkpointing())], lambda start, stop: 0)
    assert [plan.peak_bytes for plan in plans] == [0]


def test_of_equal_times_the_fewest_modules():
    def choices(start, stop):
        return [Choice(stop - start, stop - start, Checkpointing())]

    found = fastest(6, choices, lambda start, stop: 0, 6)
    assert found.boundaries == ()
    assert len(fastest(6, choices, lambda start, stop: 0, 3).choices) == 2


def test_nothing_fits_is_none_and_no_plan_at_all_is_refused():
    table = Table(4, 0)
    assert fastest(4, table.choices, table.static, -1) is None
    with pytest.raises(ValueError, match="9 modules can be made of 4 blocks"):
        smallest(4, table.choices, table.static, num_modules=range(9, 10))


@pytest.mark.parametrize("num_blocks", [24, 48])
def test_deep_models_take_a_moment(num_blocks):
    table = Table(num_blocks, 1, spread=1000, largest_static=300)
    start = time.process_time()
    least = smallest(num_blocks, table.choices, table.static).peak_bytes
    for share in (1.0, 1.1, 1.5, 3.0):
        assert fastest(num_blocks, table.choices, table.static, int(share * least)) is not None
    assert time.process_time() - start < 5.0
