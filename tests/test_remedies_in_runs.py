"""Remedies in whole runs, from recipes, the command line and Python: mixed, resumed, planned, refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import localgrad
from helpers import (
    SIZE,
    Cli,
    Recorder,
    adamw,
    assert_refused,
    assert_same_run,
    batches,
    interrupt_at_step,
    make,
    make_learner,
    metrics_of,
)
from localgrad import FeatureReconstruction, GreedySupervised, LocalLearner, run
from localgrad.app import fitting
from localgrad.app.build import build
from localgrad.app.planned import PlannedData, laid_over, plan_recipe, task_of
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import RecipeError
from localgrad.estimating import estimate_step
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import Objective
from localgrad.partition import Forecast
from localgrad.planning.budget import Task, looks_at_whole_batches
from localgrad.training.events import EpochEnded
from localgrad.training.health import gradient_cosine
from localgrad.training.trainer import Interrupted

# Runs ------------------------------------------------------------------------------------------------------------

MICRO: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 4,
        "options": {"embed_dim": 16, "depth": 3, "num_heads": 2},
    },
    "data": {"name": "digits", "limit": 72},
    "local": {"modules": 3},
    "training": {"epochs": 2, "batch_size": 16, "lr": 2e-3},
    "execution": {"device": "cpu", "num_threads": 1},
}


def micro(**changes: Any) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, {key.replace("__", "."): value for key, value in changes.items()}))


@pytest.fixture
def _quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kind each step of a run was."""
    seen: list[str] = []
    local, end_to_end = LocalLearner.step_on, LocalLearner.global_step_on
    monkeypatch.setattr(LocalLearner, "step_on", lambda *given: seen.append("l") or local(*given))
    monkeypatch.setattr(LocalLearner, "global_step_on", lambda *given: seen.append("g") or end_to_end(*given))
    return seen


@pytest.mark.usefixtures("_quick_estimates")
def test_a_run_mixes_local_and_global_steps(tmp_path: Path, kinds: list[str]) -> None:
    sink = Recorder()
    recipe = micro(training__global_every=2, training__global_tail=0.5, training__clip_grad=1.0)
    summary = run.train(recipe, out=tmp_path / "run", sinks=[sink])
    assert "".join(kinds) == "lglg" + "gggg"
    ended = [event for event in sink.events if isinstance(event, EpochEnded)]
    assert [sorted(terms) for terms in ended[0].losses] == [["reconstruction", "task"]] * 2 + [["task"]]
    assert [sorted(terms) for terms in ended[1].losses] == [[], [], ["task"]]
    assert summary["losses"] == json.loads(json.dumps(ended[1].losses))
    assert 0 < summary["test_accuracy"] <= 1


@pytest.mark.few(1)
@pytest.mark.usefixtures("_quick_estimates")
@pytest.mark.parametrize("at", [3, 6])
def test_a_mixed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    changes: dict[str, Any] = {
        "training__global_every": 2,
        "training__ema_decay": 0.9,
        "training__lr_depth": [0.5, 1.0],
        "training__warmup_stagger": 0.5,
        "local__overlap": 1,
        "local__options": {
            "context": 0.6,
            "reconstruct": "previous",
            "teacher_share": 0.3,
            "classifier": "next",
            "classifier_options": {"weights": "ema"},
            "over_time": {"reconstruction": [1.0, 0.0]},
        },
    }
    run.train(micro(**changes), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, at)
        with pytest.raises(Interrupted):
            run.train(micro(**changes), out=tmp_path / "run")
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.usefixtures("_quick_estimates")
def test_losses_of_an_epoch_are_means_over_the_steps_that_had_them(tmp_path: Path) -> None:
    found = []
    step_on = LocalLearner.step_on

    def noted(self: LocalLearner, batch: LocalBatch) -> Any:
        result = step_on(self, batch)
        found.append([float(loss) for loss in result.losses])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLearner, "step_on", noted)
        run.train(micro(training__global_every=4, training__epochs=1, local__objective="greedy"), out=tmp_path / "run")
    losses = metrics_of(tmp_path / "run")[0]["losses"]
    assert len(found) == 3
    for index in (0, 1):
        assert losses[index]["task"] == pytest.approx(sum(step[index] for step in found) / 3, rel=1e-5)


@pytest.mark.heavy
def test_the_peak_of_a_run_counts_its_global_steps(tmp_path: Path) -> None:
    recipe = micro(training__global_tail=0.5, execution__global_checkpoint="none", training__batch_size=32)
    job = build(recipe)
    local, end_to_end = (
        estimate_step(job.learner, 32, job.optimizer, globally=kind).peak_bytes for kind in (False, True)
    )
    assert end_to_end > local
    assert fitting.estimate_run(job).peak_bytes == end_to_end
    assert fitting.estimate_run(build(micro(training__batch_size=32))).peak_bytes == local


@pytest.mark.heavy
@pytest.mark.usefixtures("_quick_estimates")
def test_weights_change_over_time_in_sequential_mode_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    at = localgrad.objectives.base.LocalObjective.at  # type: ignore[attr-defined]

    def noted(self: Any, progress: float) -> None:
        at(self, progress)
        seen.append((id(self), progress))

    monkeypatch.setattr(localgrad.objectives.base.LocalObjective, "at", noted)  # type: ignore[attr-defined]
    options = {"over_time": {"reconstruction": [1.0, 0.0]}}
    run.train(micro(training__schedule="sequential", local__options=options), out=tmp_path / "run")
    modules = list(dict.fromkeys(module for module, _ in seen))
    assert len(modules) == 3
    for module in modules:
        assert [progress for of, progress in seen if of == module] == [number / 8 for number in range(8)]


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transport_tau": 0}, "transport_tau must be above 0"),
        ({"transport_tau": [1.0, -1.0]}, "transport_tau must be above 0"),
        ({"similarity_weight": -1.0}, "'similarity' is -1.0"),
        ({"contrastive_weight": -1.0}, "'contrastive' is -1.0"),
        ({"contrastive_weight": 1.0, "temperature": 0.0}, "temperature of the contrastive loss"),
        ({"reconcile": -1.0}, "reconcile is -1.0"),
        ({"context": 1.5}, "context must be a share"),
        ({"over_time": {"task": [1.0, -1.0]}}, "over_time: task"),
        ({"over_time": {"tusk": [1.0, 0.0]}}, "there is no term 'tusk'"),
        ({"teacher_share": 1.5}, "teacher_share=1.5 needs ema_decay"),
        ({"teacher_share": 0.5}, "add ema_decay"),
        ({"reconstruct": "next"}, "take inputs, previous or blocks"),
        ({"reconstruction_error": "l1"}, "unknown 'l1'"),
        ({"mask": 1.0, "decoder": "conv"}, "mask must be a share"),
        ({"mask": 0.5, "decoder": "linear"}, "conv or transformer"),
        ({"reconstruction_weight": 0, "task_weight": 0}, "nothing to learn"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build(micro(local__options=options))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


SEQUENTIAL = {"training.schedule": "sequential"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"local.overlap": -1}, "local.overlap = -1"),
        ({"local.overlap": True}, "local.overlap = True"),
        ({"training.global_every": 0}, "training.global_every = 0"),
        ({"training.global_tail": 1.0}, "training.global_tail = 1.0"),
        ({"training.freeze_from": -0.5}, "training.freeze_from = -0.5"),
        ({"training.lr_depth": [0.0, 1.0]}, "training.lr_depth"),
        ({"training.lr_depth": [1.0]}, "training.lr_depth"),
        ({"training.weight_decay_depth": [-1.0, 1.0]}, "training.weight_decay_depth"),
        ({"training.warmup_stagger": -1.0}, "training.warmup_stagger = -1.0"),
        ({"training.warmup_stagger": 1.0}, "warmup_stagger: 1.0 makes"),
        ({"execution.global_checkpoint": "nine"}, "global_checkpoint: unknown 'nine'"),
        ({"execution.offload": True, "local.overlap": 1}, "overlap=1 doesn't go with offload"),
        ({"execution.offload": True, "training.global_every": 2}, "offload doesn't go with global_every"),
        ({"execution.offload": True, "training.global_tail": 0.5}, "offload doesn't go with global_tail"),
        ({"execution.compile": True, "local.options.reconcile": 1.0}, "reconcile=1.0 doesn't go with compile"),
        ({"local.overlap": 1, "local.options.reconcile": 1.0}, "reconcile=1.0 doesn't go with overlap"),
        ({**SEQUENTIAL, "training.global_every": 2}, "global_every=2"),
        ({**SEQUENTIAL, "training.global_tail": 0.5}, "global_tail=0.5"),
        ({**SEQUENTIAL, "local.overlap": 1}, "overlap=1"),
        ({**SEQUENTIAL, "training.freeze_from": 0.0}, "freeze_from=0.0"),
        ({**SEQUENTIAL, "training.warmup_stagger": 0.1}, "warmup_stagger=0.1"),
        ({**SEQUENTIAL, "local.options.teacher_share": 0.5}, "teacher_share=0.5"),
        ({**SEQUENTIAL, "local.options.reconcile": 1.0}, "reconcile=1.0"),
        ({**SEQUENTIAL, "local.options.context": 0.5}, "context=0.5"),
        ({**SEQUENTIAL, "local.options.reconstruct": "previous"}, "reconstruct='previous'"),
        ({**SEQUENTIAL, "local.options.classifier": "next"}, "classifier='next'"),
        ({**SEQUENTIAL, "training.patience": 2}, "patience=2 doesn't go with schedule='sequential'"),
        ({"training.patience": 2, "data.val_fraction": 0.0}, "patience=2 needs val_fraction: validation images tell"),
        ({"training.patience": 2, "data.val_fraction": 1e-4}, "patience=2: there are no validation images to tell"),
        ({"training.patience": 2, "training.global_tail": 0.5}, "global_tail=0.5 doesn't go with patience"),
        ({"training.patience": 2, "training.freeze_from": 0.5}, "freeze_from=0.5 doesn't go with patience"),
        ({"training.patience": 2, "local.options.context": 0.5}, "context=0.5 doesn't go with patience"),
    ],
    ids=str,
)
def test_what_doesnt_go_together_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build(Recipe.from_dict(overlay(MICRO, changes)))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "changes",
    [
        {"local.overlap": 1},
        {"training.global_every": 2},
        {"training.global_tail": 0.5},
        {"local.options.reconstruct": "blocks"},
        {"local.options.reconstruct": "previous"},
        {"local.options.classifier": "next"},
        {"local.options.teacher_share": 0.5, "training.ema_decay": 0.9},
        {"local.options.context": 0.5},
        {"local.options.similarity_weight": 1.0, "local.options.contrastive_weight": 0.5},
        {"local.options.transport_tau": 1.0},
        {"local.options.decoder": "conv", "local.options.mask": 0.5},
        {"training.freeze_from": 0.5},
    ],
    ids=str,
)
def test_remedies_are_planned(changes: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(overlay(MICRO, {"local.modules": 3, **changes}))
    task = task_of(recipe, device="cpu", data=PlannedData(10))
    plan = plan_recipe(recipe, task, 2**30)
    found = plan.forecast
    assert found.peak_bytes <= 2**30
    if task.global_share:
        assert laid_over(plan, recipe).execution.global_checkpoint == str(plan.global_checkpoint)
        assert found.global_peak_bytes <= found.peak_bytes
    else:
        assert found.composed_peak_bytes == pytest.approx(found.peak_bytes, rel=0.1)


def forecast_of(**changes: Any) -> Forecast:
    recipe = Recipe.from_dict(overlay(MICRO, {"local.modules": [1, 2], **changes}))
    return plan_recipe(recipe, task_of(recipe, device="cpu", data=PlannedData(10)), None).forecast


@pytest.mark.heavy
def test_predicted_times_know_what_remedies_do() -> None:
    """Held against one another: plans know no clock, so ratios to end-to-end training are exact."""
    averaged = {"training.ema_decay": 0.9}
    plain = forecast_of().time_ratio
    taught = forecast_of(**averaged, **{"local.options.teacher_share": 0.5}).time_ratio
    assert plain + 0.2 < taught < plain + 0.5, "a forward pass of the whole model: about a third of its step"
    reconciled = forecast_of(**{"local.options.reconcile": 0.5})
    shares = [module.time_share for module in forecast_of().modules]
    expected = plain * (shares[0] + 3 * sum(shares[1:]))
    assert reconciled.time_ratio == pytest.approx(expected, rel=0.02), "three passes, but for the first module"
    context = forecast_of(**{"local.options.context": 0.5}).time_ratio
    assert plain < context < 1.3 * plain
    frozen = [forecast_of(**{"training.freeze_from": share}).time_ratio for share in (0.5, 0.0)]
    # Of three modules the first is frozen for half of the training (all of it, from 0 on), the second for a quarter.
    saved = (plain - frozen[0], plain - frozen[1])
    assert saved[1] == pytest.approx(2 * saved[0])
    backward = 2 / 3
    assert saved[0] == pytest.approx(plain * backward * (0.5 * shares[0] + 0.25 * shares[1]), rel=0.25)


@pytest.mark.heavy
def test_plans_from_python_know_overlap_end_to_end_steps_and_freezing() -> None:
    options: dict[str, Any] = {"batch_size": 4, "modules": [1, 2], "input_size": SIZE}
    plain = localgrad.plan(make(), **options).forecast
    overlapping = localgrad.plan(make(), **options, overlap=1).forecast
    assert overlapping.time_ratio > plain.time_ratio
    mixed = localgrad.plan(make(), **options, global_share=0.5).forecast
    assert mixed.global_peak_bytes <= mixed.peak_bytes
    assert localgrad.plan(make(), **options, freeze_from=0.5).forecast.time_ratio < plain.time_ratio
    with pytest.raises(RecipeError, match="global_share must be a share of the steps"):
        localgrad.plan(make(), **options, global_share=2)


@pytest.mark.heavy
def test_end_to_end_steps_from_python() -> None:
    images, labels = batches(1)[0]
    one, other = make_learner(), make_learner()
    one.global_step(images, labels)
    other.global_step_on(LocalBatch(images, labels))
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])
    one.step(images, labels)  # auxiliary nets have an optimizer's state from now on
    profile = localgrad.estimate(one.global_step, (images, labels))
    assert one.optimizer_factory is not None
    globally = estimate_step(one, len(images), one.optimizer_factory, globally=True)
    assert profile.peak_bytes == globally.peak_bytes


@pytest.mark.heavy
def test_a_budget_holds_for_end_to_end_steps_too() -> None:
    recipe = Recipe.from_dict(overlay(MICRO, {"local.modules": 3, "training.global_tail": 0.5}))
    task = task_of(recipe, device="cpu", data=PlannedData(10))
    free = plan_recipe(recipe, task, None).forecast
    budget = int(0.9 * free.peak_bytes)
    plan = plan_recipe(recipe, task, budget)
    assert max(plan.forecast.peak_bytes, plan.forecast.global_peak_bytes) <= budget
    assert plan.forecast.time_ratio > free.time_ratio


@pytest.mark.parametrize(
    ("objective", "compares"),
    [
        (GreedySupervised(), False),
        (GreedySupervised(contrastive_weight=0.1), True),
        (FeatureReconstruction(similarity_weight=(0.0, 0.1)), True),
        (localgrad.Contrastive(), True),
        (localgrad.ImageReconstruction(similarity_weight=(0, 0)), False),
    ],
    ids=str,
)
def test_replanning_keeps_batches_whole_for_terms_that_compare_images(objective: Objective, compares: bool) -> None:
    backbone = localgrad.split(make(), SIZE)
    assert looks_at_whole_batches(Task(backbone=backbone, objective=objective, optimizer=adamw)) == compares


# From the command line, and from Python --------------------------------------------------------------------------

REACHABLE: list[list[str]] = [
    [
        "local.options.transport_tau=1.0",
        "local.options.similarity_weight=0.1",
        "local.options.contrastive_weight=[0.1, 0]",
    ],
    ["local.options.classifier=next", "local.options.classifier_options={ weights = 'ema', depth = [2, 1] }"],
    ["local.options.reconstruct=blocks", "local.options.decoder=conv", "local.options.mask=0.5"],
    ["local.options.reconstruct=previous", "local.options.reconstruction_error=cosine"],
    ["local.options.context=0.5", "local.options.over_time={ task = [0.5, 1.0] }", "local.overlap=1"],
    ["local.options.teacher_share=[0.1, 0.5]", "training.ema_decay=0.9"],
    ["local.options.reconcile=0.5", "training.lr_depth=[0.5, 1]", "training.weight_decay_depth=[1, 0]"],
    ["training.global_every=2", "training.global_tail=0.25", "execution.global_checkpoint=halves"],
    ["training.freeze_from=0.25", "training.warmup_stagger=0.1"],
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "micro.toml").write_text(micro(training__epochs=1).to_toml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.few(3)
@pytest.mark.usefixtures("_quick_estimates")
@pytest.mark.parametrize("settings", REACHABLE, ids=lambda settings: settings[0].split("=")[0])
def test_every_remedy_can_be_typed(here: Path, cli_: Cli, settings: list[str]) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    said = cli_("train", "--recipe", "micro.toml", *options, "--out", "run")
    assert said.code == 0, said
    assert (here / "run" / "model.safetensors").exists()
    written = (here / "run" / "recipe.toml").read_text()
    for setting in settings:
        assert setting.split("=")[0].split(".")[-1] in written


def test_a_mistake_in_a_remedy_is_one_line(here: Path, cli_: Cli) -> None:
    said = cli_("train", "--recipe", "micro.toml", "--set", "local.options.transport_tua=1.0")
    assert_refused(said, "transport_tua")
    assert_refused(cli_("train", "--recipe", "micro.toml", "--set", "local.options.mask=0.5"), "conv or transformer")
    assert not (here / "runs").exists()


@pytest.mark.heavy
def test_every_remedy_can_be_had_from_python() -> None:
    objective = localgrad.FeatureReconstruction(
        transport_tau=(1.0, 2.0),
        similarity_weight=0.1,
        contrastive_weight=0.1,
        context=0.5,
        over_time={"reconstruction": (1.0, 0.0)},
        teacher_share=0.3,
        classifier="next",
        classifier_options={"weights": "ema"},
        decoder="conv",
        reconstruct="blocks",
        reconstruction_error="smooth_l1",
        mask=0.3,
    )
    learner = make_learner(make(drop_path_rate=0.1), objective=objective, overlap=1, ema_decay=0.9)
    localgrad.check_isolation(learner)
    losses = []
    for number in range(8):
        learner.at(number / 8)
        losses.append(float(learner.step(*batches(1)[0]).losses[-1]))
    assert losses[-1] < losses[0]
    assert estimate_step(learner, 4, adamw).peak_bytes > 0
    reconciled = make_learner(objective=FeatureReconstruction(reconcile=0.5))
    assert estimate_step(reconciled, 4, adamw).peak_bytes > 0


def test_health_is_measured_whatever_an_objective_looks_at() -> None:
    options: dict[str, Any] = {"teacher_share": 0.5, "context": 0.5, "transport_tau": 1.0}
    objective = FeatureReconstruction(reconstruct="previous", **options)
    learner = make_learner(modules=4, objective=objective, ema_decay=0.9, overlap=1)
    learner.step(*batches(1)[0])
    found = gradient_cosine(learner, LocalBatch(*batches(1)[0]))
    assert found[-1] == pytest.approx(1, abs=1e-5)
    assert all(-1 < cosine < 1 for cosine in found[:-1])
