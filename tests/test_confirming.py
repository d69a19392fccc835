"""`localgrad.planning.confirming`: steps said again, and plans that fit a card as a replay of their runs shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers import SIZE, adamw, make
from localgrad.backbones.base import outline
from localgrad.errors import BudgetError
from localgrad.memory.allocator import CachingAllocator, replay
from localgrad.memory.allocator_rules import Rules
from localgrad.memory.cards import CARDS
from localgrad.memory.recording import Mark, Trace
from localgrad.objectives.methods import FeatureReconstruction
from localgrad.partition import Plan
from localgrad.planning.budget import Task, plan_to_budget
from localgrad.planning.confirming import SMALL_BYTES, Room, confirm, with_repeats

MIB = 1 << 20
CARD = replace(CARDS["T4"], context_bytes=0)


def trace_of_steps(*, different: bool = False) -> Trace:
    """Weights, and two steps that each leave a batch to the next one; evaluation."""
    events = [(0, 8 * MIB), (1, 3 * MIB), (2, 30 * MIB), (2, -1)]
    events += [(3, (4 if different else 3) * MIB), (1, -1), (4, 30 * MIB), (4, -1)]
    events += [(5, 12 * MIB), (5, -1)]
    marks = [Mark("weights", 0), Mark("step 1", 1), Mark("step 2", 4), Mark("evaluation", 8)]
    return Trace(CARD, events, marks)


def test_the_second_step_is_said_again_with_blocks_of_its_own() -> None:
    trace = trace_of_steps()
    run = with_repeats(trace, 3)
    taken = [event[0] for event in run.events if event[1] >= 0]
    assert len(taken) == len(set(taken)), "no block twice"
    assert len(run.events) == len(trace.events) + 4 * 4, "three times before evaluation, once after it"
    live: set[int] = set()
    for number, nbytes in run.events:
        (live.add if nbytes >= 0 else live.remove)(number)
    assert len(live) == 2, "weights and the last batch"
    assert run.label_at(len(run.events) - 1) == "step after evaluation"
    assert replay(run.events, CachingAllocator()).allocated_bytes == (8 + 3 + 30) * MIB


def test_steps_that_are_not_the_same_are_not_said_again() -> None:
    trace = trace_of_steps(different=True)
    assert with_repeats(trace, 3).events == trace.events


def test_a_run_is_confirmed_under_what_there_is_and_says_where_it_runs_out() -> None:
    trace, rules = trace_of_steps(), Rules()
    room = Room(card=CARD, rules=rules, cap_bytes=200 * MIB)
    fits = confirm(trace, room)
    assert fits.fits
    assert fits.replay.reserved_bytes <= 200 * MIB - SMALL_BYTES
    least = fits.least_bytes
    assert confirm(trace, replace(room, cap_bytes=least)).fits
    failed = confirm(trace, replace(room, cap_bytes=40 * MIB))
    assert (failed.fits, failed.failed_in) == (False, "step 1")


@pytest.fixture(scope="module")
def task() -> Task:
    backbone = outline(make("vit"), SIZE)
    card = replace(CARD, total_bytes=1 << 30)
    rules = Rules(expandable=True)
    return Task(
        backbone=backbone, objective=FeatureReconstruction(), optimizer=adamw, device="cuda", card=card, rules=rules
    )


@pytest.mark.usefixtures("cost_cache")
def test_a_plan_for_a_card_tells_what_its_budget_includes(task: Task) -> None:
    plan = plan_to_budget(task, 8, 400 * MIB)
    forecast = plan.forecast
    assert forecast is not None
    assert forecast.is_confirmed
    assert forecast.available_bytes == 400 * MIB
    assert forecast.allocated_bytes is not None
    assert forecast.reserved_bytes is not None
    assert forecast.allocated_bytes <= forecast.reserved_bytes <= 400 * MIB
    assert {"cuBLAS workspaces", "weights", "optimizer state", "fragmentation"} <= set(forecast.budget_parts)
    assert Plan.from_json(plan.to_json()).forecast == forecast
    with pytest.raises(BudgetError, match="budget"):
        plan_to_budget(task, 8, 60 * MIB)
