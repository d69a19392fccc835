"""Plans tell exact from local gradients, take four modules at most unasked, and balance by memory without a budget."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

import localgrad
from helpers import assert_refused, make
from localgrad.app.planning import adamw
from localgrad.backbones.base import outline
from localgrad.errors import BudgetError, PartitionError, RecipeError
from localgrad.memory.costs import WAYS
from localgrad.objectives.methods import GreedySupervised
from localgrad.partition import Checkpointing, Plan, forecast_of
from localgrad.planning import budget
from localgrad.planning.budget import MOST_MODULES, Search, Task, plan_to_budget
from localgrad.planning.table import print_plan

if TYPE_CHECKING:
    from helpers import Cli

BATCH = 128


def task_of(depth: int, **more: Any) -> Task:
    backbone = outline(make("vit", depth=depth), (3, 32, 32))
    return Task(backbone=backbone, objective=GreedySupervised(classifier="linear"), optimizer=adamw, **more)


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of(6)


@pytest.fixture(scope="module")
def search(task: Task) -> Search:
    return Search(replace(task, modules="any"), task.costs(BATCH))


def told(plan: Plan, task: Task) -> str:
    out = io.StringIO()
    made_for = {"training.batch_size": BATCH, "execution.precision": "fp32", "training.optimizer": "adamw"}
    more = {"input_size": list(task.backbone.input_size), "num_classes": 10, "device": "cpu"}
    print_plan(replace(plan, made_for={**made_for, **more}), Console(file=out, width=200))
    return out.getvalue()


def test_local_plans_tell_the_fastest_exact_one_that_fits(task: Task, search: Search) -> None:
    exact = search.smallest_exact()
    room = search.peak(exact) + 4096
    plan = plan_to_budget(task, BATCH, room)
    rival = forecast_of(plan).exact
    assert plan.num_modules > 1, "local modules are faster here"
    assert rival is not None
    assert rival.needed_bytes <= room
    assert rival.time_ratio >= forecast_of(plan).time_ratio
    fitting = [search.end_to_end(how) for how in _every_way(6)]
    fastest = min(each.nanoseconds for each in fitting if search.peak(each) <= room)
    assert rival.time_ratio == pytest.approx(fastest / search.end_to_end().nanoseconds)
    text = told(plan, task)
    assert f"{plan.num_modules} local modules (local gradients)" in text
    assert "exact gradients fit too: end-to-end, checkpoint" in text
    assert "plan it with gradients='exact'" in text
    asked = plan_to_budget(replace(task, gradients="exact"), BATCH, room)
    assert asked.num_modules == 1
    assert forecast_of(asked).time_ratio == pytest.approx(rival.time_ratio)
    assert forecast_of(asked).exact is None
    assert "end-to-end training (exact gradients)" in told(asked, task)
    assert Plan.from_json(plan.to_json()) == plan
    assert forecast_of(Plan.from_json(plan.to_json())).exact == rival


@pytest.mark.heavy
def test_where_no_exact_one_fits_the_least_is_told(task: Task, search: Search) -> None:
    least = search.peak(search.smallest_exact())
    room = (search.peak(search.smallest()) + least) // 2
    plan = plan_to_budget(task, BATCH, room)
    rival = forecast_of(plan).exact
    assert rival is not None
    assert rival.peak_bytes == rival.needed_bytes == least > room
    assert "exact gradients don't fit with whole batches: the least is end-to-end, checkpoint" in told(plan, task)
    assert plan_to_budget(replace(task, gradients="exact"), BATCH, room).accumulation > 1
    asked = replace(task, gradients="exact", accumulation=1)
    with pytest.raises(BudgetError, match="no gradients"):
        plan_to_budget(asked, BATCH, room)


@pytest.mark.heavy
def test_so_many_modules_at_most_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_MODULES == 4
    monkeypatch.setattr(budget, "MOST_MODULES", 2)  # of so small a model no plan of more than three is the smallest
    task = task_of(10, accumulation=1)
    search = Search(replace(task, modules="any"), task.costs(BATCH))
    narrow = Search(task, search.costs)
    assert len(search.smallest().choices) > 2 >= len(narrow.smallest().choices)
    assert all(len(each.choices) <= 2 for each in narrow.frontier())
    between = (search.peak(search.smallest()) + narrow.peak(narrow.smallest())) // 2
    with pytest.raises(BudgetError, match=r"modules='any'"):
        plan_to_budget(task, BATCH, between)
    assert plan_to_budget(replace(task, modules="any"), BATCH, between).num_modules > 2
    assert plan_to_budget(replace(task, modules=6), BATCH, search.peak(search.end_to_end())).num_modules == 6


def test_local_gradients_alone_can_be_asked_for(task: Task, search: Search) -> None:
    enough = 2 * search.peak(search.end_to_end())
    assert plan_to_budget(task, BATCH, enough).num_modules == 1
    assert plan_to_budget(replace(task, gradients="local"), BATCH, enough).num_modules > 1
    for gradients, modules in (("exact", 4), ("local", 1), ("local", [])):
        with pytest.raises(RecipeError, match=f"gradients='{gradients}' doesn't go with modules"):
            plan_to_budget(replace(task, gradients=gradients, modules=modules), BATCH, enough)
    single = replace(task, backbone=outline(make("vit", depth=1), (3, 32, 32)), gradients="local")
    with pytest.raises(PartitionError, match="this model has one block"):
        plan_to_budget(single, BATCH, enough)


def test_without_a_budget_modules_are_balanced_by_memory(task: Task, search: Search) -> None:
    for count in (2, 4):
        plan = plan_to_budget(replace(task, modules=count), BATCH)
        assert all(how == Checkpointing() for how in plan.checkpoint)
        every = [list(boundaries) for boundaries in itertools.combinations(range(1, 6), count - 1)]
        peaks = {
            tuple(each): search.peak(Search(replace(task, modules=each), search.costs).balanced()) for each in every
        }
        assert forecast_of(plan).composed_peak_bytes == peaks[plan.boundaries] == min(peaks.values())
        assert min(peaks.values()) < 0.8 * max(peaks.values())
    assert plan_to_budget(task, BATCH).num_modules == 1, "nothing is saved where nobody asks"


@pytest.mark.heavy
def test_vit_large_in_four_modules_takes_little_more_than_half() -> None:
    """The case that was reported: first blocks alone, and 0.93 x end-to-end's memory."""
    found = localgrad.plan("vit_large_patch16_224", batch_size=16, modules=4, cache=False)
    end_to_end = forecast_of(found).rivals[0].peak_bytes
    assert forecast_of(found).peak_bytes <= 0.6 * end_to_end


def test_words_that_are_none_and_pairs_that_make_no_sense_are_refused(cli_: Cli) -> None:
    with pytest.raises(RecipeError, match="gradients: unknown 'precise'; take one of any, exact, local"):
        localgrad.plan("vit_tiny_patch16_224", batch_size=2, budget="1GiB", gradients="precise")
    with pytest.raises(RecipeError, match="gradients='exact' needs budget"):
        localgrad.plan("vit_tiny_patch16_224", batch_size=2, gradients="exact")
    for arguments, said in (
        (["plan", "--gradients", "local"], "--gradients local needs --budget"),
        (["plan", "--gradients", "half", "--budget", "1GiB"], "--gradients: unknown 'half'"),
        (["plan", "--gradients", "exact", "--budget", "1GiB", "--parallel", "2"], "doesn't go with --parallel"),
        (["train", "--gradients", "exact"], "--gradients exact needs --budget"),
        (["train", "--modules", "any"], "--modules any needs --budget"),
    ):
        assert_refused(cli_(*arguments), said)


@pytest.mark.heavy
def test_a_run_is_planned_with_the_gradients_that_are_asked_for(cli_: Cli, tmp_path: Path) -> None:
    small = ["--data", "digits", "--model", "vit_tiny_patch16_224", "--img-size", "16", "--patch-size", "8"]
    small += ["--set", "model.options.depth=3", "--set", "model.options.embed_dim=24", "--epochs", "1"]
    small += ["--set", "data.limit=64", "--batch-size", "16", "--device", "cpu", "--budget", "1GiB", "--no-cache"]
    assert cli_("train", *small, "--gradients", "local", "--out", str(tmp_path / "local")).code == 0
    recipe = (tmp_path / "local" / "recipe.toml").read_text(encoding="utf-8")
    assert re.search(r"modules = \[", recipe)


def _every_way(num_blocks: int) -> list[Checkpointing]:
    firsts = [None, *range(1, num_blocks)]
    return [replace(way, first=first) for way in WAYS for first in (firsts if way.level != "none" else [None])]


def test_classes_that_are_weighted_are_planned_for() -> None:
    """Their weights are real tensors, where all else has shapes alone."""
    model = make("vit", depth=2)
    plain, weighted = (
        localgrad.plan(model, batch_size=8, modules=1, loss=torch.nn.CrossEntropyLoss(weight), cache=False)
        for weight in (None, torch.linspace(0.5, 1.5, model.num_classes))
    )
    assert weighted.forecast is not None
    assert plain.forecast is not None
    more = weighted.forecast.peak_bytes - plain.forecast.peak_bytes
    assert 0 <= more <= 1024, "the weights themselves"
