"""The balancing against brute force, and Plan as data."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad.errors import PartitionError
from localgrad.partition import Checkpointing, Plan, balance, balance_by, check_boundaries, resolve, spans


def brute_force(costs: list[int], num_modules: int) -> tuple[int, ...]:
    def key(boundaries: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
        sums = [sum(costs[i] for i in span) for span in spans(boundaries, len(costs))]
        return sorted(sums, reverse=True), boundaries

    return min(itertools.combinations(range(1, len(costs)), num_modules - 1), key=key)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    costs = draw(st.lists(st.integers(0, 50), min_size=1, max_size=10))
    return costs, draw(st.integers(1, len(costs)))


@given(problems())
@settings(deadline=None, max_examples=300)
def test_balance_equals_brute_force(problem: tuple[list[int], int]) -> None:
    costs, num_modules = problem
    assert balance(costs, num_modules) == brute_force(costs, num_modules)


@given(problems())
@settings(deadline=None)
def test_more_modules_never_raise_the_peak(problem: tuple[list[int], int]) -> None:
    costs, num_modules = problem

    def peak(count: int) -> int:
        return max(sum(costs[i] for i in span) for span in spans(balance(costs, count), len(costs)))

    assert peak(len(costs)) <= peak(num_modules) <= peak(1)


@given(problems(), st.integers(0, 30))
@settings(deadline=None)
def test_balance_by_takes_costs_that_are_not_sums(problem: tuple[list[int], int], head: int) -> None:
    costs, num_modules = problem

    def cost(start: int, stop: int) -> int:
        return sum(costs[start:stop]) + head * (stop < len(costs)) * stop

    def key(boundaries: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
        parts = [cost(span.start, span.stop) for span in spans(boundaries, len(costs))]
        return sorted(parts, reverse=True), boundaries

    expected = min(itertools.combinations(range(1, len(costs)), num_modules - 1), key=key)
    assert balance_by(cost, len(costs), num_modules) == expected


@given(problems())
def test_spans_cover_every_block_once(problem: tuple[list[int], int]) -> None:
    costs, num_modules = problem
    covered = [i for span in spans(balance(costs, num_modules), len(costs)) for i in span]
    assert covered == list(range(len(costs)))


def test_48_blocks_are_instant() -> None:
    start = time.perf_counter()
    boundaries = balance([3, 1, 4, 1, 5, 9, 2, 6] * 6, 12)
    assert len(boundaries) == 11
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("num_modules", [0, -1, 4])
def test_impossible_counts_are_refused(num_modules: int) -> None:
    with pytest.raises(PartitionError, match="from 1 to 3"):
        balance([1, 2, 3], num_modules)


@pytest.mark.parametrize(
    ("boundaries", "says"), [((2, 1), "ascend"), ((1, 1), "ascend"), ((0,), "outside"), ((6,), "outside")]
)
def test_boundaries_out_of_order_are_refused(boundaries: tuple[int, ...], says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        check_boundaries(boundaries, 6)


def test_resolve_takes_counts_stages_and_boundaries() -> None:
    costs = [1] * 6
    assert resolve(1, costs) == ()
    assert resolve(6, costs) == (1, 2, 3, 4, 5)
    assert resolve(3, costs) == (2, 4)
    assert resolve("stages", costs, (2, 5)) == (2, 5)
    assert resolve([1, 4], costs) == (1, 4)


@pytest.mark.parametrize("request_", ["stages", "halves", True, 2.5])
def test_resolve_refuses_what_it_does_not_know(request_: object) -> None:
    with pytest.raises(PartitionError, match="modules"):
        resolve(request_, [1, 2, 3])  # type: ignore[arg-type]


@given(problems())
def test_plan_survives_json(problem: tuple[list[int], int]) -> None:
    costs, num_modules = problem
    plan = Plan(
        model="m",
        num_blocks=len(costs),
        boundaries=balance(costs, num_modules),
        checkpoint=tuple(Checkpointing.parse(("none", "halves/3:2")[i % 2]) for i in range(num_modules)),
        activation_bytes=tuple(range(num_modules)),
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.num_modules == num_modules == len(plan.spans)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"model": "m", "num_blocks": 3, "boundaries": [2, 1]}', '{"model": 1, "extra": 2}'],
)
def test_a_broken_plan_is_refused(text: str) -> None:
    with pytest.raises(PartitionError):
        Plan.from_json(text)


def test_plan_lists_must_fit_its_modules() -> None:
    with pytest.raises(PartitionError, match="checkpoint has 1 entries for 2"):
        Plan(model="m", num_blocks=4, boundaries=(2,), checkpoint=(Checkpointing("blocks"),))
