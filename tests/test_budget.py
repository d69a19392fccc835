"""Plans to a budget: they fit, nothing faster does, what can't fit is told with what would, and costs are cached."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import localgrad
from helpers import SIZE, make
from localgrad import Contrastive, FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner, Plan
from localgrad.app.planning import adamw
from localgrad.backbones.base import outline
from localgrad.errors import BackboneError, BudgetError, PartitionError, RecipeError
from localgrad.estimating import estimate_step
from localgrad.memory.allocator_rules import MIB, Rules
from localgrad.memory.cards import CARDS
from localgrad.memory.costs import WAYS, CostSettings
from localgrad.memory.parts import measure_costs
from localgrad.memory.track import MemoryProfile, annotate
from localgrad.partition import Checkpointing
from localgrad.planning import budget as budgets
from localgrad.planning import cache
from localgrad.planning.budget import (
    RIVALS,
    Margin,
    Search,
    Task,
    largest_batches,
    parts_of,
    plan_to_budget,
    worth_having,
)
from localgrad.planning.confirming import Room
from localgrad.planning.search import UNLIMITED
from localgrad.units import parse_bytes

BATCH = 48
pytestmark = pytest.mark.usefixtures("cost_cache")


def vit(**more: Any) -> nn.Module:
    return make("vit", **({"embed_dim": 16, "depth": 5} | more))


def swin(**more: Any) -> nn.Module:
    return make("swin", **({"embed_dim": 16, "patch_size": 2} | more))


def task_of(model: nn.Module | None = None, **more: Any) -> Task:
    backbone = outline(vit() if model is None else model, SIZE)
    return Task(**({"backbone": backbone, "objective": FeatureReconstruction(), "optimizer": adamw} | more))


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of()


@pytest.fixture(scope="module")
def whole(task: Task) -> Search:
    return Search(task, task.costs(BATCH))


def least_told(message: str) -> int:
    found = re.search(r"the least is ([\d.]+ \w+)", message)
    assert found, message
    return parse_bytes(found[1])


def refusal(task: Task, batch_size: int, budget: int) -> str:
    with pytest.raises(BudgetError) as caught:
        plan_to_budget(task, batch_size, budget)
    return str(caught.value)


def learner_of(task: Task, plan: Plan) -> LocalLearner:
    return LocalLearner(
        task.backbone,
        modules=plan,
        objective=task.objective,
        precision=task.precision,
        clip_grad=task.clip_grad,
        accumulation=plan.accumulation,
        ema_decay=task.ema_decay,
    )


# The search ------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("shares", [(0.3, 0.0), pytest.param((0.7, 0.4, 0.15, 0.0), marks=pytest.mark.heavy)], ids=str)
def test_smaller_budgets_fit_and_are_never_faster(shares: tuple[float, ...], task: Task, whole: Search) -> None:
    """From more than enough to the least that there is, which works, while a little less doesn't."""
    high, low = whole.peak(whole.end_to_end()), task.confirm(whole.as_plan(whole.smallest()), BATCH).peak_bytes
    ladder = [int(high * 1.01), *(int(low + (high - low) * share) for share in shares)]
    plans = [plan_to_budget(task, BATCH, budget) for budget in ladder]
    for budget, plan in zip(ladder, plans, strict=True):
        assert plan.forecast.needed_bytes == plan.forecast.peak_bytes <= budget == plan.forecast.budget_bytes
        assert estimate_step(learner_of(task, plan), BATCH, adamw).peak_bytes == plan.forecast.peak_bytes
        assert plan.accumulation == 1, "whole batches fit"
    times = [plan.forecast.time_ratio for plan in plans]
    assert times == sorted(times)
    assert (plans[0].boundaries, plans[0].checkpoint, times[0]) == ((), (Checkpointing(),), 1.0)
    assert len(set(times)) >= min(4, len(ladder)), "the ladder goes through different plans"


def test_the_fastest_is_that_of_brute_force(task: Task, whole: Search) -> None:
    """Every partition, every way, on every number of first blocks: against costs as they are composed."""
    costs, num_blocks = whole.costs, 5
    runs = {}
    for start, stop in itertools.combinations(range(num_blocks + 1), 2):
        hows = [
            replace(way, first=first)
            for way in WAYS
            for first in ([None] if way.level == "none" else [None, *range(1, stop - start)])
        ]
        runs[start, stop] = [costs.choice(start, stop, how) for how in hows]
    partitions = [
        list(itertools.pairwise((0, *inner, num_blocks)))
        for count in range(num_blocks)
        for inner in itertools.combinations(range(1, num_blocks), count)
    ]

    def best(budget: int, num_modules: int | None) -> tuple[int, int] | None:
        found = []
        for spans in partitions:
            if num_modules in (None, len(spans)):
                room = budget - whole.static_bytes - sum(costs.static_of(*span) for span in spans)
                fitting = [[c.nanoseconds for c in runs[span] if c.peak_bytes <= room] for span in spans]
                if all(fitting):
                    found.append((sum(map(min, fitting)), len(spans)))
        return min(found, default=None)

    high, low = whole.peak(whole.end_to_end()), whole.peak(whole.smallest())
    for num_modules in (None, 1, 2, 4, 5):
        search = Search(replace(task, modules=num_modules), costs)
        for budget in (low - 1, *(low + (high - low) * part // 12 for part in range(14)), UNLIMITED):
            solution = search.fastest(budget)
            found = None if solution is None else (solution.nanoseconds, len(solution.choices))
            assert found == best(budget, num_modules), (num_modules, budget)
            assert solution is None or search.peak(solution) <= budget
        least = search.peak(search.smallest())
        assert best(least, num_modules) is not None
        assert best(least - 1, num_modules) is None


@pytest.mark.few(1)
@pytest.mark.parametrize("modules", [1, 3, [2, 3]], ids=str)
def test_modules_that_are_asked_for_are_kept(modules: Any, task: Task) -> None:
    asked = replace(task, modules=modules)
    search = Search(asked, task.costs(BATCH))
    for solution in (search.smallest(), search.fastest(UNLIMITED), *search.frontier()):
        assert solution is not None
        assert len(solution.choices) == (modules if isinstance(modules, int) else 3)
        assert isinstance(modules, int) or solution.boundaries == (2, 3)
    plan = plan_to_budget(asked, BATCH, search.peak(search.smallest()) + 2000)
    assert plan.num_modules == len(search.smallest().choices)


@pytest.mark.heavy
def test_stages_are_kept_and_models_without_any_refuse(task: Task) -> None:
    staged = task_of(swin(depths=(1, 1), num_heads=(1, 2)), modules="stages")
    assert plan_to_budget(staged, 4).boundaries == staged.backbone.stage_boundaries
    with pytest.raises(PartitionError, match="no stages"):
        plan_to_budget(replace(task, modules="stages"), BATCH)
    with pytest.raises(PartitionError, match="6 local modules can't be made of 5 blocks"):
        plan_to_budget(replace(task, modules=6), BATCH)


@pytest.mark.heavy
def test_batches_are_cut_only_where_nothing_else_fits(task: Task, whole: Search) -> None:
    """And then into the fewest parts that do; the least of all works when it is typed as it is told."""
    fixed = replace(task, modules=1)
    search = Search(fixed, task.costs(BATCH))
    least = fixed.confirm(search.as_plan(search.smallest()), BATCH).peak_bytes
    assert plan_to_budget(fixed, BATCH, least).accumulation == 1
    plan = plan_to_budget(fixed, BATCH, least - 1)
    assert plan.accumulation == 2
    assert plan.forecast.peak_bytes < least
    message = refusal(fixed, BATCH, int(whole.static_bytes * 1.01))
    assert "with the batch in " in message
    assert "no modules" in message
    told = least_told(message)
    best = plan_to_budget(fixed, BATCH, told)
    assert f"with the batch in {best.accumulation} parts" in message
    assert "the least is" in refusal(fixed, BATCH, int(best.forecast.peak_bytes * 0.99))
    assert told <= 1.01 * best.forecast.peak_bytes


def test_parts_of_a_batch_hold_two_images() -> None:
    assert parts_of(1) == parts_of(2) == parts_of(3) == []
    assert parts_of(4) == [2]
    assert parts_of(64) == [2, 4, 8, 16, 32]
    for size in range(1, 200):
        for parts in parts_of(size):
            assert min(len(part) for part in torch.zeros(size).chunk(parts)) >= 2, (size, parts)


@pytest.mark.heavy
def test_what_would_fit_is_told_truly() -> None:
    """Another batch, another precision: those that are named fit."""
    fixed = task_of(vit(depth=1), modules=1)
    small = Search(fixed, fixed.costs(2))
    budget = small.peak(small.smallest()) + 4096
    message = refusal(fixed, 3, budget)
    assert "batch_size=2," in message
    assert "no modules" in message
    assert plan_to_budget(fixed, 2, budget).accumulation == 1
    told = re.search(r"precision='bf16' \(least ([^)]+)\)", message)
    bf16 = replace(fixed, precision="bf16")
    search = Search(bf16, bf16.costs(3))
    least = bf16.confirm(search.as_plan(search.smallest()), 3).peak_bytes
    assert (told is not None) == (least < least_told(message)), "told where it helps"
    assert told is None or parse_bytes(told[1]) == pytest.approx(least, rel=0.01)
    assert "a smaller img_size or model" in message
    assert "precision=" not in refusal(bf16, 3, budget // 2 + small.static_bytes // 2)


def test_a_budget_below_the_static_bytes_is_refused(task: Task, whole: Search) -> None:
    message = refusal(task, BATCH, whole.static_bytes)
    assert "weights, optimizer state and margin alone" in message
    assert "optimizer='adafactorbv'" in message
    cuda = replace(task, device="cuda")
    assert "weights, optimizer state and margin alone" in refusal(cuda, BATCH, 64 << 20)


@given(peak=st.integers(1, 1 << 36), on_card=st.booleans(), compiled=st.booleans(), replayed=st.booleans())
def test_a_margin_taken_off_and_put_on_is_none(peak: int, on_card: bool, compiled: bool, replayed: bool) -> None:
    room = Room.of(CARDS["B200"], Rules(expandable=True), None, convolves=True) if on_card else None
    margin = Margin.of(room, compiled=compiled, replayed=replayed)
    assert margin.usable(margin.needed(peak)) >= peak
    assert margin.usable(margin.needed(peak) - 1) < peak
    assert len(margin.reasons) == (on_card and not replayed) + compiled


@pytest.mark.heavy
def test_margins_are_taken_off_and_told(task: Task) -> None:
    plan = plan_to_budget(replace(task, compiled=True), BATCH)
    needed, peak = plan.forecast.needed_bytes, plan.forecast.peak_bytes
    assert needed == pytest.approx(1.1 * peak, abs=1)
    assert "10 %" in plan.forecast.notes[0]
    assert plan_to_budget(replace(task, compiled=True), BATCH, needed).boundaries == plan.boundaries
    less = plan_to_budget(replace(task, compiled=True), BATCH, needed - 1)
    assert less.forecast.needed_bytes < needed
    on_card = replace(task, device="cuda", modules=1, card=CARDS["T4"], replays=False)
    cuda = plan_to_budget(on_card, 4)
    assert cuda.forecast.needed_bytes > cuda.forecast.peak_bytes + CARDS["T4"].context_bytes
    assert "not confirmed" in cuda.forecast.notes[0]


def shifted(task: Task, monkeypatch: pytest.MonkeyPatch, shift: Callable[[Plan], int]) -> list[Plan]:
    """Whole steps that need more than their parts: the costs' own figure and a shift; gives the plans confirmed."""
    confirmed = []

    def confirm(self: Task, plan: Plan, batch_size: int) -> MemoryProfile:
        confirmed.append(plan)
        costs = self.costs(batch_size, plan.accumulation)
        spans = [(span.start, span.stop) for span in plan.spans]
        peaks = [costs.choice(*span, plan.checkpointing(index)).peak_bytes for index, span in enumerate(spans)]
        static = Search(self, costs).static_bytes + sum(costs.static_of(*span) for span in spans)
        labels = {f"module {index}": static + peak for index, peak in enumerate(peaks)}
        return MemoryProfile(
            peak_bytes=max(labels.values()) + shift(plan),
            static_bytes=static,
            by_category={},
            timeline=[],
            peak_by_label=labels,
            by_category_of_label={label: {} for label in labels},
            peak_label="module 0",
        )

    monkeypatch.setattr(Task, "confirm", confirm)
    return confirmed


def test_a_peak_above_the_composed_one_is_searched_again(
    task: Task, whole: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = whole.peak(whole.end_to_end())
    confirmed = shifted(task, monkeypatch, lambda plan: peak // 20 if plan.num_modules == 1 else 0)
    for budget in (peak + peak // 50, peak * 8 // 10, peak * 5 // 10):
        confirmed.clear()
        plan = plan_to_budget(task, BATCH, budget)
        assert plan.forecast.peak_bytes <= budget
        assert plan.accumulation == 1
        assert len(set(confirmed)) == len(confirmed) <= 4, "no plan is tried twice"


@pytest.mark.heavy
def test_the_least_is_found_even_if_all_others_need_more(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Search(task, task.costs(4))
    least = whole.as_plan(whole.smallest())
    low = whole.peak(whole.smallest())
    shifted(task, monkeypatch, lambda plan: 0 if plan == least else 10 * low)
    assert plan_to_budget(task, 4, low + low // 4) == least
    shifted(task, monkeypatch, lambda _: low)
    message = refusal(task, 4, low + low // 2)
    assert least_told(message) >= low, "what a whole step needs is told, not what was composed"


@pytest.mark.heavy
@pytest.mark.parametrize(
    "more",
    [
        {"precision": "bf16"},
        {"objective": Contrastive()},
        *(
            pytest.param(more, marks=pytest.mark.heavy)
            for more in (
                {"ema_decay": 0.9},
                {"clip_grad": 1.0},
                {"objective": ImageReconstruction()},
                {"objective": GreedySupervised()},
                {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
                {"device": "cuda", "replays": False},
            )
        ),
    ],
    ids=["bf16", "contrastive", "ema", "clip", "image", "greedy", "sgd", "cuda"],
)
def test_every_kind_of_task_fits_its_budget(more: dict[str, Any]) -> None:
    found = task_of(swin(depths=(1, 1), num_heads=(1, 2)), **more)
    search = Search(found, found.costs(8))
    low, high = search.peak(search.smallest()), search.peak(search.end_to_end())
    budget = found.margin.needed((low + high) // 2)
    plan = plan_to_budget(found, 8, budget)
    peak = estimate_step(learner_of(found, plan), 8, found.optimizer, torch.device(found.device)).peak_bytes
    assert found.margin.needed(peak) == plan.forecast.needed_bytes <= budget
    composed = plan.forecast.composed_peak_bytes
    assert composed == pytest.approx(peak, rel=0.03), "the parts say what the whole step needs"


def on_a_card(**more: Any) -> Task:
    """One module of one block: there is little to try."""
    model = vit(depth=1)
    return task_of(model, device="cuda", card=CARDS["T4"], modules=1, accumulation=1, precision="fp16", **more)


@pytest.mark.heavy
def test_the_least_that_a_card_needs_suffices() -> None:
    task = on_a_card()
    least = least_told(refusal(task, 8, 590 * MIB))
    assert least > 590 * MIB
    plan = plan_to_budget(task, 8, least)
    assert plan.forecast.needed_bytes <= least
    assert plan.forecast.is_confirmed


@pytest.mark.heavy
@pytest.mark.parametrize("more", [{"modules": None}, {"ema_decay": 0.9}, {"compiled": True}, {"accumulation": None}])
def test_the_least_that_a_card_needs_suffices_for_all_kinds(more: dict[str, Any]) -> None:
    task = replace(on_a_card(), **more)
    least = least_told(refusal(task, 8, 590 * MIB))
    assert plan_to_budget(task, 8, least).forecast.needed_bytes <= least


@pytest.mark.heavy
def test_batch_norms_and_tiny_batches_have_plans() -> None:
    torch.manual_seed(0)
    resnet = task_of(timm.create_model("resnet18", num_classes=5))
    for size in (2, 3, 10):
        search = Search(resnet, resnet.costs(size))
        budget = search.peak(search.end_to_end()) - 1
        assert plan_to_budget(resnet, size, budget).forecast.peak_bytes <= budget
    one_block = task_of(vit(depth=1))
    for size in (1, 2, 3):
        assert plan_to_budget(one_block, size).num_modules == 1
    assert [len(row.checkpoint) for row in worth_having(one_block, 4)] == [1] * len(worth_having(one_block, 4))


@pytest.mark.parametrize("size", [0, -1, 1 << 18, 10**18])
def test_a_batch_out_of_reach_is_refused(size: int, task: Task) -> None:
    for find in (plan_to_budget, worth_having):
        with pytest.raises(BudgetError, match=r"batch_size=-?\d+: plans are made for 1 to 131072 images; take"):
            find(task, size)


# The forecast ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forecast_plan(task: Task, whole: Search) -> Plan:
    return plan_to_budget(replace(task, modules=3), BATCH, int(whole.peak(whole.end_to_end()) * 0.6))


@pytest.mark.heavy
def test_the_forecast_tells_every_module(forecast_plan: Plan, task: Task) -> None:
    forecast = forecast_plan.forecast
    profile = estimate_step(learner_of(task, forecast_plan), BATCH, adamw)
    assert forecast.static_bytes == profile.static_bytes
    for index, module in enumerate(forecast.modules):
        assert sum(module.by_category.values()) == module.peak_bytes == profile.peak_by_label[f"module {index}"]
        assert module.by_category == profile.by_category_of_label[f"module {index}"]
        assert module.checkpoint == str(forecast_plan.checkpointing(index))
        assert module.num_blocks == len(forecast_plan.spans[index])
        assert module.first_block == task.backbone.block_names[forecast_plan.spans[index].start]
        assert module.last_block == task.backbone.block_names[forecast_plan.spans[index].stop - 1]
    peaks = [module.peak_bytes for module in forecast.modules]
    assert peaks[forecast.peak_module] == max(peaks) == forecast.peak_bytes
    assert sum(module.time_share for module in forecast.modules) == pytest.approx(1)


@pytest.mark.heavy
def test_rivals_need_what_whole_steps_of_theirs_do(forecast_plan: Plan, task: Task) -> None:
    rivals = forecast_plan.forecast.rivals
    assert [row.name for row in rivals] == list(RIVALS)
    assert rivals[0].time_ratio == 1
    assert all(row.time_ratio > 1 for row in rivals[1:])
    for row in rivals:
        learner = LocalLearner(task.backbone, modules=1, checkpoint=RIVALS[row.name])
        assert row.peak_bytes == pytest.approx(estimate_step(learner, BATCH, adamw).peak_bytes, rel=1e-3)


def test_a_plan_survives_json_and_trains(forecast_plan: Plan) -> None:
    back = Plan.from_json(forecast_plan.to_json())
    assert back == forecast_plan
    assert back.forecast == forecast_plan.forecast
    learner = LocalLearner(vit(), modules=back, input_size=SIZE, accumulation=back.accumulation)
    assert learner.plan.checkpoint == forecast_plan.checkpoint
    learner.configure_optimizers(adamw)
    assert len(learner.step(torch.randn(2, *SIZE), torch.tensor([0, 1])).losses) == 3


def test_all_plans_worth_having(task: Task, whole: Search) -> None:
    rows = worth_having(task, BATCH)
    peaks, times = [row.peak_bytes for row in rows], [row.time_ratio for row in rows]
    assert times == sorted(times)
    assert times[0] == 1
    assert peaks[-1] == pytest.approx(whole.peak(whole.smallest()), rel=0.015)
    assert all(later < earlier for earlier, later in itertools.pairwise(peaks))
    for row in rows:
        plan = whole.fastest(row.peak_bytes)
        assert plan is not None
        assert plan.nanoseconds / whole.end_to_end().nanoseconds == row.time_ratio


# The cache -------------------------------------------------------------------------------------------------------


@functools.cache
def costs_of_tiny(settings: CostSettings) -> Any:
    found = tiny()
    return measure_costs(found.backbone, found.objective, found.optimizer, settings)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """An empty cache; grows by one with each measurement.

    Of one block the costs are always those of ``tiny``: that it is measured matters, and when, not what.
    """
    calls: list[Any] = []

    def counted(backbone: Any, *others: Any, **more: Any) -> Any:
        calls.append((backbone, *others))
        return costs_of_tiny(others[-1]) if len(backbone.blocks) == 1 else measure_costs(backbone, *others, **more)

    monkeypatch.setattr(budgets, "measure_costs", counted)
    monkeypatch.setattr(cache, "_recent", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def tiny(**more: Any) -> Task:
    """A task that nothing is remembered of."""
    return task_of(vit(depth=1, **more.pop("model", {})), **more)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process would start."""
    monkeypatch.setattr(cache, "_recent", {})


def test_costs_are_measured_once(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny().costs(4)
    assert tiny().costs(4) == first
    assert len(measured) == 1
    forget(monkeypatch)
    assert tiny().costs(4) == first, "from the folder"
    assert len(measured) == 1


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "more",
    [
        {"model": {"embed_dim": 24}},
        {"model": {"num_classes": 7}},
        {"model": {"drop_path_rate": 0.1}},
        {"model": {"img_size": 16}},
        {"precision": "bf16"},
        {"device": "cuda"},
        {"objective": FeatureReconstruction(decoder="conv")},
        {"objective": GreedySupervised()},
        {"optimizer": "sgd"},
        {"frozen": True},
    ],
    ids=str,
)
def test_anything_else_is_measured_again(more: dict[str, Any], measured: list[Any]) -> None:
    tiny().costs(4)
    more = dict(more)
    if "img_size" in more.get("model", {}):
        small = more.pop("model")
        more["backbone"] = outline(vit(depth=1, **small), (3, 16, 16))
    if "optimizer" in more:
        model = vit(depth=1)
        optimizer = localgrad.training.optim.OptimizerFactory(model, name="sgd", lr=0.1, weight_decay=0.0)
        more["optimizer"] = optimizer
    if more.pop("frozen", False):
        model = vit(depth=1)
        model.patch_embed.requires_grad_(False)
        more["backbone"] = outline(model, SIZE)
    tiny(**more).costs(4)
    assert len(measured) == 2
    tiny().costs(6)
    assert len(measured) == 3


def test_other_versions_are_measured_again(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().costs(4)
    monkeypatch.setattr(cache.metadata, "version", lambda name: f"99 of {name}")
    tiny().costs(4)
    assert len(measured) == 2
    monkeypatch.setattr(cache, "_own_version", lambda: "another")
    tiny().costs(4)
    assert len(measured) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"parts": 5}', "\x00\xff"])
def test_a_damaged_cache_is_measured_again(text: str, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny().costs(4)
    (path,) = cache.cache_folder().iterdir()
    whole = path.read_text()
    path.write_bytes(text.encode("latin-1"))
    forget(monkeypatch)
    assert tiny().costs(4) == first
    assert len(measured) == 2
    assert path.read_text() == whole, "and mended"


def test_a_cache_that_cannot_be_written_is_no_error(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tiny().costs(4)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    forget(monkeypatch)
    tiny().costs(4)
    assert len(measured) == 2


def test_an_optimizer_without_a_name_is_measured_once_a_task(measured: list[Any]) -> None:
    nameless = tiny(optimizer=torch.optim.AdamW)
    plan_to_budget(nameless, 4)
    assert len(measured) == 1
    assert not cache.cache_folder().exists()


class Edited(GreedySupervised):
    """An objective of the user's own: its fields tell nothing of its code."""


class WithOwnCode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def of_own_block() -> Task:
    model = vit(depth=1)
    model.blocks[0].mlp.act = WithOwnCode()
    return task_of(model)


def of_replaced_method() -> Task:
    model = vit(depth=1)
    model.blocks[0].mlp.forward = lambda x: x
    return task_of(model)


def of_strange_value() -> Task:
    """Its text is an address, which another object may have in another process."""
    return tiny(objective=FeatureReconstruction(over_time={"task": object()}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "make_task",
    [lambda: tiny(objective=Edited()), of_own_block, of_replaced_method],
    ids=["objective", "block", "method"],
)
def test_what_the_user_may_edit_is_measured_anew_by_every_process(
    make_task: Callable[[], Task], measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_task()
    assert own.costs(4) == own.costs(4)
    assert len(measured) == 1, "once a task all the same"
    forget(monkeypatch)
    make_task().costs(4)
    assert len(measured) == 2
    assert not cache.cache_folder().exists()


def test_values_that_text_does_not_tell_are_not_cached() -> None:
    settings = CostSettings(batch_size=4, precision="fp32", accumulation=1, device="cpu", overlap=0)
    for task, known in ((tiny(), True), (of_strange_value(), False)):
        assert (cache.key_of(task.backbone, task.objective, task.optimizer, settings) is not None) == known


def test_costs_of_an_edited_objective_are_its_own(tmp_path: Path, measured: list[Any], monkeypatch: Any) -> None:
    """Edited between two processes, as people do: the plan is that of the code as it is now."""
    source = """
from localgrad import GreedySupervised
from localgrad.objectives.base import Term, TermValue
from torch import nn

class Extra(Term):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(width, {width})
    def forward(self, inputs, outputs, batch, states=()):
        return TermValue(self.net(outputs).square().mean())

class Mine(GreedySupervised):
    def terms(self, site):
        return {{**super().terms(site), "extra": (1.0, Extra(site.outputs.width))}}
"""
    static = []
    for width in (1, 301):
        forget(monkeypatch)
        own: dict[str, Any] = {"__name__": "mine"}
        exec(source.format(width=width), own)
        static.append(task_of(vit(depth=2), objective=own["Mine"]()).costs(4).static_of(0, 1))
    assert static[1] - static[0] == 300 * (16 + 1) * 4 * 3, "weights and AdamW's two moments"


def test_without_a_cache_none_is_read_or_written(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(cache=False).costs(4)
    assert not cache.cache_folder().exists()
    tiny().costs(4)
    tiny(cache=False).costs(4)
    assert len(measured) == 3


@pytest.mark.heavy
def test_the_cache_keeps_what_was_used_last(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().costs(4)
    folder = cache.cache_folder()
    (first,) = folder.iterdir()
    monkeypatch.setattr(cache, "CACHE_BYTES", int(2.5 * first.stat().st_size))
    (folder / "left.1.tmp").write_text("unfinished")
    for age, path in enumerate((first, folder / "left.1.tmp"), 1):
        os.utime(path, (time.time() - 7200 * age,) * 2)
    tiny().costs(6)
    (second,) = set(folder.iterdir()) - {first}
    os.utime(second, (time.time() - 3600,) * 2)
    forget(monkeypatch)
    tiny().costs(4)  # used again
    tiny().costs(8)
    assert len(measured) == 3
    assert first in set(folder.iterdir())
    assert second not in set(folder.iterdir())
    assert len(list(folder.iterdir())) == 2


def test_a_cache_with_one_wrong_digit_is_measured_again(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny().costs(4)
    (path,) = cache.cache_folder().iterdir()
    text = path.read_text()
    place = text.index('"static": [') + len('"static": [')
    path.write_text(text[:place] + str(9 - int(text[place])) + text[place + 1 :])
    forget(monkeypatch)
    assert tiny().costs(4) == first
    assert len(measured) == 2


def _measure_elsewhere(folder: str, results: Any) -> None:
    import os

    os.environ["XDG_CACHE_HOME"] = folder
    torch.set_num_threads(1)
    results.put(tiny().costs(4).to_dict())


@pytest.mark.heavy
def test_two_processes_may_measure_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_measure_elsewhere, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = (results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert first == second
    assert [path.suffix for path in (tmp_path / "localgrad" / "costs").iterdir()] == [".json"]


# The largest batch -----------------------------------------------------------------------------------------------


def fits_really(task: Task, name: str, size: int, budget: int) -> bool:
    """By whole steps, with nothing of the search in common for the methods that are one way."""
    if name in RIVALS:
        learner = LocalLearner(task.backbone, modules=1, checkpoint=RIVALS[name])
        return estimate_step(learner, size, adamw).peak_bytes <= budget
    search = Search(task, task.costs(size))
    least = search.smallest()
    if name.endswith("nothing recomputed"):
        found = search.fastest_plain(budget)
        return found is not None and task.confirm(search.as_plan(found), size).peak_bytes <= budget + 4096
    return task.confirm(search.as_plan(least), size).peak_bytes <= budget + 4096


def room_for(num_bytes: int) -> int:
    """A budget with so many bytes in the part of it that the largest batch may take."""
    return -(-num_bytes * 100 // (100 - budgets.FREE_PERCENT))


@pytest.mark.heavy
def test_the_largest_batch_fits_and_a_larger_one_does_not(task: Task, whole: Search) -> None:
    budget = whole.peak(whole.end_to_end())
    rows = largest_batches(task, room_for(budget))
    assert [row.name for row in rows][: len(RIVALS)] == list(RIVALS)
    assert rows[0].batch_size == pytest.approx(BATCH, abs=1)
    for row in rows:
        assert fits_really(task, row.name, row.batch_size - 1, budget), row
        assert not fits_really(task, row.name, row.batch_size * 103 // 100 + 2, budget), row
        assert row.time_ratio >= 1
    assert rows[-1].batch_size >= max(row.batch_size for row in rows)


@pytest.mark.heavy
def test_batches_of_a_few_images_are_found(task: Task) -> None:
    """Costs of sizes this small are not far enough apart for any share of them."""
    for size in (2, 3, 4, 5):
        search = Search(task, task.costs(size))
        rows = largest_batches(replace(task, modules=1), room_for(search.peak(search.end_to_end()) + 64))
        assert rows[0].batch_size == size


@pytest.mark.heavy
def test_the_largest_batch_of_a_net_with_batch_norms_is_found_without_a_single_image() -> None:
    """Two images are all that fits, and on one alone (of one position) batch norms refuse to train."""
    net = task_of(make("resnet", layers=(1, 1, 1, 1), output_stride=32), modules=1)
    two = Search(net, net.costs(2))
    usable = two.peak(two.end_to_end())
    assert budgets._largest_batch(net, lambda search: search.fastest(usable)) == 2


@pytest.mark.heavy
def test_no_batch_fits_too_little_and_none_is_beyond_reach(task: Task, whole: Search) -> None:
    rows = largest_batches(task, whole.static_bytes + 1)
    assert [(row.batch_size, row.time_ratio) for row in rows] == [(0, None)] * 6
    assert budgets._largest(lambda _: True) == budgets.LARGEST_BATCH
    for limit in (2, 3, 17, 1000):
        assert budgets._largest(lambda size, limit=limit: size <= limit) == limit


def test_the_number_of_modules_holds_for_every_batch(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(task, modules=4)
    found = Search(asked, task.costs(BATCH)).fastest_plain(UNLIMITED)
    assert found is not None
    assert len(found.choices) == 4


# In Python -------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_plan_in_python() -> None:
    plan = localgrad.plan(vit(), batch_size=16, input_size=SIZE)
    assert plan.num_modules == 1
    smaller = localgrad.plan(vit(), batch_size=16, input_size=SIZE, budget=f"{plan.forecast.peak_bytes // 1024}KiB")
    assert smaller.forecast.peak_bytes <= plan.forecast.peak_bytes
    learner = LocalLearner(vit(), modules=smaller, input_size=SIZE, accumulation=smaller.accumulation)
    assert localgrad.estimate(learner, 16).peak_bytes == smaller.forecast.peak_bytes


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"budget": "6 gigs"}, RecipeError, "budget: '6 gigs' is not an amount of memory"),
        ({"budget": 0}, RecipeError, "must be positive"),
        ({"budget": "9" * 400}, RecipeError, "more memory than there is"),
        ({"batch_size": 0}, BudgetError, "batch_size=0"),
        ({"precision": "fp64"}, RecipeError, "precision: unknown 'fp64'"),
        ({"device": "tpu"}, RecipeError, "device: 'tpu'"),
        ({"modules": 9}, PartitionError, "9 local modules"),
        ({"modules": "auto"}, PartitionError, "modules: 'auto'"),
        ({"model": "vit_tinny"}, BackboneError, "Nearest"),
    ],
)
def test_impossible_plans_are_refused(more: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        localgrad.plan(**({"model": vit(depth=2), "batch_size": 4, "input_size": SIZE} | more))


def learner_for_estimates(**more: Any) -> LocalLearner:
    return LocalLearner(vit(depth=2), modules=2, input_size=SIZE, **more)


@pytest.mark.heavy
def test_estimate_takes_learners_and_batches_as_they_come() -> None:
    learner = learner_for_estimates()
    expected = estimate_step(learner, 4, adamw).peak_bytes
    images = torch.empty(4, *SIZE, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    assert localgrad.estimate(learner, 4).peak_bytes == expected
    assert localgrad.estimate(learner, (images, labels)).peak_bytes == expected
    learner.configure_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    sgd = localgrad.estimate(learner, 4)
    assert sgd.peak_bytes < expected
    assert localgrad.estimate(learner, 4, optimizer=adamw).peak_bytes == expected
    assert learner.num_steps == 0
    assert all(parameter.grad is None for parameter in learner.model.parameters())


class Loop:
    """A person's own."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 5))
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, images: Tensor, labels: Tensor) -> None:
        with annotate("mine"):
            nn.functional.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_estimate_takes_a_method_of_anybodys_loop() -> None:
    loop, images, labels = Loop(), torch.empty(4, 3, 4, 4, device="meta"), torch.empty(4, dtype=torch.int64)
    before = [parameter.clone() for parameter in loop.model.parameters()]
    profile = localgrad.estimate(loop.step, (images, labels))
    assert profile.peak_by_label["mine"] == profile.peak_bytes == sum(profile.by_category.values())
    named = localgrad.estimate(loop.step, {"labels": labels, "images": images})
    assert named.peak_bytes == profile.peak_bytes
    weights = sum(parameter.numel() * 4 for parameter in loop.model.parameters())
    assert profile.by_category["parameters"] == weights
    assert 2 * weights <= profile.by_category["optimizer"] < 2.01 * weights, "and each weight's count of steps"
    assert all(torch.equal(*pair) for pair in zip(before, loop.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "batch",
    [0, -3, (), (torch.zeros(4, *SIZE),), torch.zeros(4, *SIZE), (torch.zeros(4, 3, 8, 8), torch.zeros(4)), {}, (4, 5)],
    ids=["0", "-3", "empty", "no labels", "tensor", "other size", "mapping", "numbers"],
)
def test_estimate_refuses_batches_that_are_none(batch: Any) -> None:
    with pytest.raises(RecipeError, match="estimate: "):
        localgrad.estimate(learner_for_estimates(), batch)


def test_estimate_refuses_what_it_cannot_copy() -> None:
    def step(images: Tensor) -> None: ...

    with pytest.raises(RecipeError, match="must be a method of an object that holds model and optimizer"):
        localgrad.estimate(step, (torch.zeros(1),))
    for batch in (4, torch.zeros(2, 3, 4, 4), (torch.zeros(2, 3, 4, 4), 5)):
        with pytest.raises(RecipeError, match="estimate: "):
            localgrad.estimate(Loop().step, batch)


@pytest.mark.heavy
def test_a_plan_that_is_used_for_something_else_says_so() -> None:
    model = make("vit", depth=2)
    found = localgrad.plan(model, batch_size=4, modules=2, precision="bf16", input_size=SIZE, device="cuda")
    own = replace(found, made_for={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalLearner(model, modules=own, input_size=SIZE)
    says = "device 'cuda', here 'cpu'; execution.precision 'bf16', here 'fp32': its forecast"
    with pytest.warns(UserWarning, match=says):
        LocalLearner(model, modules=found, input_size=SIZE)
    here = replace(found, made_for={**found.made_for, "device": "cpu"})
    for changes, says in (
        ({"accumulation": 2}, "accumulation 1, here 2"),
        ({"clip_grad": 1.0}, "no clip_grad, here one"),
        ({"ema_decay": 0.9}, "no ema_decay, here one"),
        ({"overlap": 1}, "local.overlap 0, here 1"),
        ({"objective": GreedySupervised()}, r"objective 'FeatureReconstruction\(\)', here 'GreedySupervised\(\)'"),
    ):
        with pytest.warns(UserWarning, match=says):
            LocalLearner(model, modules=here, input_size=SIZE, precision="bf16", **changes)
    with pytest.warns(UserWarning, match="num_parameters [0-9]+, here [0-9]+"):
        LocalLearner(make("vit", depth=2, embed_dim=64), modules=here, input_size=SIZE, precision="bf16")
    for changed, says in (
        (make("vit", depth=2).to(torch.bfloat16), "dtype 'torch.float32', here 'torch.bfloat16'"),
        (make("vit", depth=2).requires_grad_(False), "num_trained [0-9]+, here [0-9]+"),
    ):
        changed.head.requires_grad_(True)  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match=says):
            LocalLearner(changed, modules=here, input_size=SIZE, precision="bf16")
    learner = LocalLearner(model, modules=here, input_size=SIZE, precision="bf16")
    learner.configure_optimizers(torch.optim.AdamW)
    with pytest.warns(UserWarning, match=r"optimizer 'AdamW', here 'SGD\(momentum=0.9\)': its forecast isn't"):
        learner.configure_optimizers(lambda weights: torch.optim.SGD(weights, momentum=0.9))
    localgrad.estimate(learner, 4, optimizer=torch.optim.AdamW)
    learner = LocalLearner(model, modules=here, input_size=SIZE, precision="bf16")
    learner.configure_optimizers(adamw)
    learner.step(torch.randn(2, *SIZE), torch.arange(2))  # a smaller one fits
    with pytest.warns(UserWarning, match="training.batch_size 4, here 6"):
        learner.step(torch.randn(6, *SIZE), torch.arange(6) % 5)
    learner = LocalLearner(model, modules=here, input_size=SIZE, precision="bf16")
    learner.configure_optimizers(adamw)
    with pytest.warns(UserWarning, match="training.batch_size 4, here 6"):
        learner.global_step(torch.randn(6, *SIZE), torch.arange(6) % 5)
    with pytest.raises(PartitionError, match="checkpoint='halves' doesn't go with plan: a plan says what"):
        LocalLearner(model, modules=own, input_size=SIZE, checkpoint="halves")
