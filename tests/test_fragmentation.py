"""Orders of a run's first allocations (``research/benchmarks/fragmentation.py``): the same requests, other places."""

from __future__ import annotations

from collections import Counter

import pytest

from helpers import adamw, make
from localgrad import LocalLearner
from localgrad.estimating import record_run
from localgrad.memory.allocator import CachingAllocator, Event, replay
from localgrad.memory.allocator_rules import Rules
from localgrad.memory.recording import Trace
from research.benchmarks.fragmentation import CARD, ORDERS, fits, smallest_safe_cap, state_first


@pytest.fixture(scope="module")
def trace() -> Trace:
    return record_run(LocalLearner(make(), modules=2), 4, adamw, CARD, steps=2)


def most_at_once(events: list[Event]) -> int:
    held: dict[int, int] = {}
    most = 0
    for number, nbytes, *_ in events:
        if nbytes < 0:
            del held[number]  # it was taken before, and not given back yet
        else:
            held[number] = nbytes
        most = max(most, sum(held.values()))
    return most


def test_orders_ask_for_the_same(trace: Trace) -> None:
    for name, order in ORDERS.items():
        events = order(trace)
        extra = Counter(events) - Counter(trace.events)
        assert not Counter(trace.events) - Counter(events), name
        assert len(extra) == (2 if name == "one block first" else 0), name
        assert most_at_once(events) <= most_at_once(trace.events) * 1.01 + 4 * 1024, name


def test_state_comes_before_the_first_step_and_is_two_numbers_a_weight(trace: Trace) -> None:
    begin = trace.marks[1].index
    moved = state_first(trace)[begin:]
    state = list(dict.fromkeys(event for event in moved if event[1] > 0))
    learner = LocalLearner(make(), modules=2)
    sizes = Counter(
        weight.nbytes for module in learner.modules for weight in module.parameters() if weight.requires_grad
    )
    first = Counter(event[1] for event in state[: 2 * sum(sizes.values())])
    assert first == Counter({nbytes: 2 * count for nbytes, count in sizes.items()})


@pytest.mark.parametrize("expandable", [False, True])
def test_a_safe_cap_fits_and_a_much_smaller_one_does_not(trace: Trace, expandable: bool) -> None:
    rules = Rules(expandable=expandable)
    cap, allocated = smallest_safe_cap(trace.events, rules)
    assert fits(trace.events, cap, rules)
    assert not fits(trace.events, allocated - 1, rules)
    assert allocated == replay(trace.events, CachingAllocator(rules=rules)).allocated_bytes
