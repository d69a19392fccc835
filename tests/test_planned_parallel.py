"""Plans for ranks: every rank keeps the budget, what is forecast is what steps need, and what can't be is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import localgrad
from helpers import MICRO_TOML, SIZE, Cli, assert_refused, make
from localgrad import FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner, Plan
from localgrad.app.planning import adamw
from localgrad.backbones.base import outline
from localgrad.errors import BudgetError, LocalgradError, PartitionError, RecipeError
from localgrad.estimating import estimate_step
from localgrad.partition import RankForecast
from localgrad.planning.budget import Margin, Search, Task
from localgrad.planning.rank_plans import Parallel, _RankSearch, asked_for, largest_rank, plan_parallel
from localgrad.units import parse_bytes

BATCH = 48
pytestmark = pytest.mark.usefixtures("cost_cache")


def task_of(*, depth: int = 6, **more: Any) -> Task:
    """Costs are measured of every run of blocks: of 21 for six of them."""
    backbone = outline(make("vit", embed_dim=16, depth=depth), SIZE)
    return Task(**({"backbone": backbone, "objective": FeatureReconstruction(), "optimizer": adamw} | more))


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of()


@pytest.fixture(scope="module")
def free(task: Task) -> Plan:
    return plan_parallel(task, BATCH, Parallel(num_ranks=3))


def ranks_of(plan: Plan) -> tuple[RankForecast, ...]:
    return plan.forecast.parallel.ranks


def slowest(plan: Plan) -> float:
    """Nominal time of the slowest rank, to end-to-end training in one process."""
    ratio: float = plan.forecast.time_ratio / plan.forecast.parallel.speed_up
    return ratio


# The forecast ----------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ema_decay": 0.9, "clip_grad": 1.0},
        {"objective": ImageReconstruction()},
        {"objective": FeatureReconstruction(reconstruct="previous", context=0.5)},
        {"objective": FeatureReconstruction(classifier="next", reconcile=0.1)},
        {"precision": "bf16", "device": "cuda", "soft_labels": True},
    ],
    ids=["plain", "average and clipping", "images", "previous and context", "next and gradient", "cuda"],
)
def test_a_ranks_parts_are_those_of_the_whole_step(more: dict[str, Any]) -> None:
    task = task_of(depth=5, **more)
    plan = plan_parallel(task, BATCH, Parallel(num_ranks=4))
    forecast, ranks = plan.forecast.parallel, ranks_of(plan)
    assert plan.num_modules == forecast.num_ranks == len(ranks) == 4
    static, composed = plan.forecast.static_bytes, sum(row.static_bytes for row in ranks)
    assert composed >= 0.999 * static
    if "previous" not in str(more):  # its nets depend on all boundaries ahead, and are composed from the largest
        assert composed == pytest.approx(static, rel=2e-3, abs=4 * 4096), "and the labels on each rank, rounded"
    for row, module in zip(ranks, plan.forecast.modules, strict=True):
        assert row.step_bytes == module.peak_bytes - plan.forecast.static_bytes > 0
        assert row.peak_bytes == row.static_bytes + row.step_bytes + row.buffer_bytes
        assert row.time_share == module.time_share
    sent = forecast.sent_bytes
    buffers = [2 * sent[0], 3 * sent[0] + 2 * sent[1], 3 * sent[1] + 2 * sent[2], sent[2]]
    assert [row.buffer_bytes for row in ranks] == buffers
    assert forecast.speed_up == pytest.approx(1 / max(row.time_share for row in ranks))
    margin = replace(task, replays=False).margin  # no rank's run is replayed
    assert plan.forecast.needed_bytes == margin.needed(largest_rank(plan))


@pytest.mark.heavy
def test_bytes_sent_are_those_of_the_tensors(task: Task) -> None:
    size = 4 * BATCH * 17 * 16  # 16 patches and the class token, 16 channels
    images = 4 * BATCH * 3 * 32 * 32
    plain = plan_parallel(task, BATCH, Parallel(num_ranks=4))
    assert plain.forecast.parallel.sent_bytes == (size + 8 * BATCH,) * 3
    soft = plan_parallel(replace(task, soft_labels=True), BATCH, Parallel(num_ranks=4))
    assert soft.forecast.parallel.sent_bytes == (size + 4 * 5 * BATCH,) * 3
    looking = plan_parallel(task_of(depth=4, objective=ImageReconstruction()), BATCH, Parallel(num_ranks=4))
    assert looking.forecast.parallel.sent_bytes == tuple(size + 8 * BATCH + extra for extra in (images, images, 0))
    supplied = plan_parallel(task_of(depth=3, objective=GreedySupervised(context=0.5)), BATCH, Parallel(num_ranks=3))
    pooled = 4 * BATCH * 4 * 4 * 16
    assert supplied.forecast.parallel.sent_bytes == tuple(size + 8 * BATCH + count * pooled for count in (1, 2))


@pytest.mark.heavy
def test_ranks_are_balanced_by_time_or_by_memory(task: Task, free: Plan) -> None:
    small = plan_parallel(task, BATCH, Parallel(num_ranks=3, balance="memory"))
    assert largest_rank(small) < largest_rank(free)
    assert slowest(small) > slowest(free)
    assert free.forecast.parallel.speed_up > 2.5, "six blocks alike, on three ranks"
    for plan, balance in ((small, "memory"), (free, "time")):
        assert plan.forecast.parallel.balance == balance


def test_a_plan_survives_json_and_trains(free: Plan) -> None:
    back = Plan.from_json(free.to_json())
    assert back == free
    assert back.forecast == free.forecast
    with pytest.warns(UserWarning, match="made for .*several processes, here one"):
        learner = LocalLearner(make("vit", embed_dim=16, depth=6), modules=back, input_size=SIZE)
    learner.configure_optimizers(adamw)
    assert len(learner.step(torch.randn(2, *SIZE), torch.tensor([0, 1])).losses) == 3


# The budget ------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("shares", [(1.0, 0.2, 0.0), pytest.param((0.8, 0.6, 0.4), marks=pytest.mark.heavy)], ids=str)
@pytest.mark.parametrize("balance", ["time", "memory"])
def test_every_rank_keeps_the_budget_down_to_the_least(
    balance: str, shares: tuple[float, ...], task: Task, free: Plan
) -> None:
    most = largest_rank(free)
    least = largest_rank(plan_parallel(task, BATCH, Parallel(num_ranks=3, balance="memory")))
    plans = []
    for share in shares:
        budget = int(least + (most - least) * share)
        plan = plan_parallel(task, BATCH, Parallel(num_ranks=3, balance=balance), budget)
        assert plan.forecast.needed_bytes == largest_rank(plan) <= budget == plan.forecast.budget_bytes
        assert plan.accumulation == 1
        step = learner_of(task, plan)
        assert estimate_step(step, BATCH, adamw).peak_bytes == plan.forecast.peak_bytes
        plans.append(plan)
    times = [slowest(plan) for plan in plans]
    assert times == sorted(times)
    assert plans[0].boundaries == free.boundaries or balance == "memory" or shares[0] < 1


def learner_of(task: Task, plan: Plan) -> LocalLearner:
    with pytest.warns(UserWarning, match="several processes, here one"):
        return LocalLearner(task.backbone, modules=plan, objective=task.objective, accumulation=plan.accumulation)


@pytest.mark.heavy
def test_what_would_fit_is_told_truly(task: Task) -> None:
    with pytest.raises(BudgetError, match=r"on 3 ranks keeps every rank within it") as caught:
        plan_parallel(task, 8, Parallel(num_ranks=3), 10 * 1024)
    found = re.search(r"the least is ([\d.]+ \w+)", str(caught.value))
    assert found
    least = parse_bytes(found[1])
    assert "parallel=4" in str(caught.value)
    assert "\n" not in str(caught.value)
    plan = plan_parallel(task, 8, Parallel(num_ranks=3), least)
    assert plan.forecast.needed_bytes <= least
    assert plan.accumulation > 1, "batches are cut where nothing else fits"
    with pytest.raises(BudgetError, match="the least is"):
        plan_parallel(task, 8, Parallel(num_ranks=3), int(0.98 * least))


@pytest.mark.heavy
def test_a_peak_above_the_composed_one_is_searched_again(
    task: Task, free: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def low(self: _RankSearch, rank: int, start: int, stop: int) -> int:
        return self.static_bytes(start, stop)  # as if packets took nothing

    monkeypatch.setattr(_RankSearch, "_resident", low)
    budget = largest_rank(free) - 1
    plan = plan_parallel(task, BATCH, Parallel(num_ranks=3), budget)
    assert largest_rank(plan) <= budget


def test_a_margin_is_taken_off(task: Task, free: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Margin, "of", classmethod(lambda cls, *_, **__: cls(50, 0, ("half as much again",))))
    task = replace(task)
    plan = plan_parallel(task, BATCH, Parallel(num_ranks=3), int(1.5 * largest_rank(free)))
    assert plan.forecast.needed_bytes == pytest.approx(1.5 * largest_rank(plan), abs=1)
    assert largest_rank(plan) <= largest_rank(free)


# What is asked for, and refused ----------------------------------------------------------------------------------


@pytest.mark.heavy
def test_boundaries_that_are_asked_for_are_kept(task: Task) -> None:
    plan = plan_parallel(replace(task, modules=(1, 2)), BATCH, Parallel(num_ranks=3))
    assert plan.boundaries == (1, 2)
    plan = plan_parallel(replace(task, modules=3), BATCH, Parallel(num_ranks=3))
    assert plan.num_modules == 3
    one = plan_parallel(task, BATCH, Parallel(num_ranks=1))
    assert (one.num_modules, one.forecast.parallel.speed_up, one.forecast.parallel.sent_bytes) == (1, 1, ())


@pytest.mark.parametrize(
    ("more", "num_ranks", "error", "words"),
    [
        ({}, 7, PartitionError, "parallel=7: each rank needs a block, and this model has 6; take parallel=6"),
        ({}, 0, RecipeError, "parallel=0: a plan needs at least one rank; take parallel=2"),
        ({}, -3, RecipeError, "parallel=-3"),
        ({"modules": 2}, 3, PartitionError, "parallel=3: .* modules asks for 2; .* take parallel=2"),
        ({"modules": (2, 3)}, 2, PartitionError, "modules asks for 3"),
        ({"overlap": 1}, 2, RecipeError, "overlap=1 doesn't go with parallel"),
        ({"global_share": 0.1}, 2, RecipeError, "global_share=0.1 doesn't go with parallel"),
        (
            {"objective": GreedySupervised(teacher_share=0.5)},
            2,
            RecipeError,
            "teacher_share=0.5 doesn't go",
        ),
        ({"objective": GreedySupervised(teacher_share=(0.5, 0))}, 2, RecipeError, "teacher_share"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    more: dict[str, Any], num_ranks: int, error: type[LocalgradError], words: str, task: Task
) -> None:
    with pytest.raises(error, match=words) as caught:
        plan_parallel(replace(task, **more), BATCH, Parallel(num_ranks=num_ranks))
    assert "\n" not in str(caught.value)


def test_options_are_read() -> None:
    assert asked_for(None, None) is None
    assert asked_for(4, None) == Parallel(num_ranks=4)
    assert asked_for(4, "memory") == Parallel(num_ranks=4, balance="memory")
    with pytest.raises(RecipeError, match="balance: unknown 'size'; take time or memory"):
        asked_for(4, "size")


@pytest.mark.heavy
def test_plan_in_python() -> None:
    model = make("vit", embed_dim=16, depth=3)
    plan = localgrad.plan(model, batch_size=16, input_size=SIZE, parallel=2)
    assert plan.forecast.parallel.num_ranks == 2
    small = localgrad.plan(model, batch_size=16, input_size=SIZE, parallel=2, balance="memory", budget="4MiB")
    assert largest_rank(small) <= largest_rank(plan)
    with pytest.raises(RecipeError, match="balance: unknown 'luck'"):
        localgrad.plan(model, batch_size=16, input_size=SIZE, parallel=2, balance="luck")
    with pytest.raises(BudgetError, match="batch_size=0"):
        localgrad.plan(model, batch_size=0, input_size=SIZE, parallel=2)


@pytest.mark.heavy
def test_stages_of_a_hierarchical_model_differ_in_what_they_send() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1, 1),
        num_heads=(1, 2, 4), num_classes=5,
    )  # fmt: skip
    plan = localgrad.plan(model, batch_size=16, input_size=SIZE, parallel=3)
    first, second = plan.forecast.parallel.sent_bytes
    assert first > second


# localgrad plan --parallel ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a micro recipe outside it."""
    (tmp_path / "micro.toml").write_text(MICRO_TOML.replace("epochs = 2", "epochs = 1"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "here"


@pytest.mark.heavy
def test_a_plan_for_ranks_is_printed_written_and_trained(
    here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--recipe", "../micro.toml", "--parallel", "3", "--budget", "3MiB", "--json", "plan.json")
    said = cli_("plan", *options)
    assert (said.code, said.err) == (0, "")
    words = ("3 local modules (local gradients) on 3 ranks", "balanced by time", "the largest rank needs")
    words += ("of a budget of 3.00 MiB",)
    words += ("as fast as this plan in one process", "rank", "blocks", "time", "█", "static", "step", "buffers", "peak")
    words += ("sends a step", "* the slowest rank", "2 batches on their way", "end-to-end", "this plan, largest rank")
    for word in words:
        assert word in " ".join(said.out.split()), (word, said.out)
    assert "…" not in said.out.replace("--data …", ""), "nothing is cut off"
    assert max(map(len, said.out.splitlines())) <= 80
    plan = Plan.from_json(Path("plan.json").read_text())
    assert largest_rank(plan) <= 3 << 20 == plan.forecast.budget_bytes
    said = cli_("train", "--plan", "plan.json", "--limit", "120", "--device", "cpu", "--out", "run")
    assert said.code == 0, said.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["plan"]["boundaries"] == list(plan.boundaries)
    assert summary["plan"]["checkpoint"] == [str(how) for how in plan.checkpoint]


REFUSALS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--parallel", "9"), ("--parallel 9", "this model has 3", "take --parallel 3")),
    (("--parallel", "0"), ("--parallel 0: a plan needs at least one rank", "--parallel 2")),
    (("--parallel", "2", "--balance", "luck"), ("--balance", "'luck'", "time or memory")),
    (("--balance", "memory"), ("--balance memory needs --parallel", "--parallel 4")),
    (("--parallel", "2", "--frontier"), ("--frontier", "--parallel")),
    (("--parallel", "2", "--batch-size", "auto", "--budget", "1GiB"), ("--batch-size auto", "--parallel")),
    (("--parallel", "2", "--overlap", "1"), ("--overlap 1", "--parallel")),
    (("--parallel", "2", "--global-every", "4"), ("--global-every, --global-tail", "--parallel")),
    (("--parallel", "2", "--modules", "3"), ("--parallel 2", "--modules asks for 3", "--parallel 3")),
    (
        ("--parallel", "2", "--set", "local.options.teacher_share=0.5", "--set", "training.ema_decay=0.9"),
        ("--set local.options.teacher_share=0.5", "--parallel"),
    ),
    (("--parallel", "2", "--batch-size", "4", "--budget", "1KiB"), ("--budget 1.00KiB", "the least is", "2 ranks")),
    (("--parallel", "2", "--set", "execution.offload=true"), ("--offload",)),
]


@pytest.mark.few(4)
@pytest.mark.parametrize(("options", "words"), REFUSALS, ids=[" ".join(o)[:40] for o, _ in REFUSALS])
def test_impossible_plans_for_ranks_are_refused(
    options: tuple[str, ...], words: tuple[str, ...], here: Path, cli_: Cli
) -> None:
    assert_refused(cli_("plan", "--recipe", "../micro.toml", *options), *words)
    assert list(here.iterdir()) == []


def test_a_search_is_given_the_same_costs_as_for_one_process(task: Task) -> None:
    search = _RankSearch(Search(replace(task, modules=3), task.costs(BATCH)), Parallel(num_ranks=3))
    total = sum(search.static_bytes(start, stop) for start, stop in ((0, 1), (1, 4), (4, 6)))
    heads = sum(task.costs(BATCH).static_of(*run) for run in ((0, 1), (1, 4), (4, 6)))
    assert total == task.costs(BATCH).static_bytes + heads
