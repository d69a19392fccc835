"""The balancing against brute force, and Plan as data."""

from __future__ import annotations

import itertools
import random
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad import balancing as _balance
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


def by_prefixes(costs: list[int], num_modules: int) -> tuple[int, ...]:
    """The plain dynamic program over prefixes: right and slow, for more blocks than brute force can do."""
    best: dict[int, tuple[list[int], tuple[int, ...]]] = {
        stop: ([sum(costs[:stop])], ()) for stop in range(1, len(costs) + 1)
    }
    for k in range(2, num_modules + 1):
        best = {
            stop: min(
                (sorted([*best[start][0], sum(costs[start:stop])], reverse=True), (*best[start][1], start))
                for start in range(k - 1, stop)
            )
            for stop in range(k, len(costs) + 1)
        }
    return best[len(costs)][1]


@st.composite
def long_problems(draw: st.DrawFn) -> tuple[list[int], int]:
    """Ties, heavy blocks among light ones, blocks that cost nothing."""
    cost = draw(st.sampled_from([st.integers(0, 3), st.integers(1, 4), st.integers(0, 10**9)]))
    costs = draw(st.lists(cost | st.sampled_from([0, 5, 10**6]), min_size=10, max_size=24))
    return costs, draw(st.integers(1, len(costs)))


@pytest.mark.parametrize("longest", [_balance.LONGEST, 16])  # states as integers, and as tuples
@given(problem=long_problems())
@settings(deadline=None, max_examples=120)
def test_balance_equals_the_plain_program_over_prefixes(longest: int, problem: tuple[list[int], int]) -> None:
    costs, num_modules = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_balance, "LONGEST", longest)
        assert balance(costs, num_modules) == by_prefixes(costs, num_modules)


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


@pytest.mark.parametrize("kind", ["alike", "bytes", "heavy", "doubling"])
def test_1000_blocks_are_instant(kind: str) -> None:
    draw = random.Random(0)
    costs = {
        "alike": [draw.randint(1, 4) for _ in range(1000)],
        "bytes": [draw.randint(1, 10**9) for _ in range(1000)],
        "heavy": [int(1000 * draw.paretovariate(1)) for _ in range(1000)],
        "doubling": [2 ** (block // 10) for block in range(1000)],
    }[kind]
    for num_modules in (2, 4, 16, 64, 500, 999):
        start = time.process_time()
        boundaries = balance(costs, num_modules)
        assert time.process_time() - start < 0.3, num_modules
        assert len(check_boundaries(boundaries, 1000)) == num_modules - 1


NO_COSTS: list[Any] = [-1, -0.5, float("nan"), float("inf"), True, "3", None, np.int64(-2), np.float32("nan")]


@pytest.mark.parametrize("cost", NO_COSTS)
def test_costs_that_are_none_are_refused(cost: Any) -> None:
    with pytest.raises(
        PartitionError, match=r"^costs: block 1 costs .*give (0 or more|each block a finite number).*\.$"
    ):
        balance([3, cost, 2], 2)
    with pytest.raises(PartitionError, match=r"^costs: block 1 "):
        resolve(2, [3, cost, 2])
    if not isinstance(cost, (bool, str)) and cost is not None:
        with pytest.raises(PartitionError, match=r"^cost: a module of blocks 0 to 0 costs .*\.$"):
            balance_by(lambda _start, _stop: cost, 3, 2)


def test_numbers_of_other_kinds_are_taken_exactly() -> None:
    costs = [5, 1, 3, 3, 1, 4]
    assert balance(list(np.array(costs, dtype=np.uint8)), 3) == balance(costs, 3), "a sum of bytes would overflow"
    assert balance(list(np.array(costs) * 60), 3) == balance(costs, 3)
    assert balance([cost / 8 for cost in costs], 3) == balance(costs, 3)
    tenths = [0.1, 0.2, 0.3, 0.3]  # sums of floats would be rounded
    exact = [int(Fraction(cost) * 2**60) for cost in tenths]
    assert balance(tenths, 2) == balance(exact, 2)  # type: ignore[arg-type]
    assert balance(costs, np.int64(3)) == balance(costs, 3)


def test_a_cost_of_modules_is_asked_for_once_each() -> None:
    asked: list[tuple[int, int]] = []

    def cost(start: int, stop: int) -> int:
        asked.append((start, stop))
        return (stop - start) ** 2

    balance_by(cost, 12, 6)
    assert len(asked) == len(set(asked)) == 78


@pytest.mark.parametrize("num_modules", [0, -1, 4, True, 2.0, "2", None])
def test_impossible_counts_are_refused(num_modules: Any) -> None:
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
    assert resolve(np.int64(3), costs) == (2, 4)  # type: ignore[arg-type]
    assert resolve(list(np.array([1, 4])), costs) == (1, 4)


@pytest.mark.parametrize("request_", ["stages", "halves", True, 2.5, float("nan"), None, [1.7], [True], ["1"]])
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
    [
        "",
        "[]",
        "{}",
        '{"model": "m", "num_blocks": 3, "boundaries": [2, 1]}',
        '{"model": 1, "extra": 2}',
        '{"model": "m", "num_blocks": 3, "boundaries": [1.5]}',
        '{"model": "m", "num_blocks": 3, "boundaries": [], "accumulation": 0}',
    ],
)
def test_a_broken_plan_is_refused(text: str) -> None:
    with pytest.raises(PartitionError):
        Plan.from_json(text)


def test_plan_lists_must_fit_its_modules() -> None:
    with pytest.raises(PartitionError, match="checkpoint has 1 entries for 2"):
        Plan(model="m", num_blocks=4, boundaries=(2,), checkpoint=(Checkpointing("blocks"),))
