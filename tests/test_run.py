"""Runs: what a finished one leaves, honest selection, resuming bit for bit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import helpers
from helpers import (
    Recorder,
    assert_same_run,
    interrupt_at_step,
    load_named,
    metrics_of,
    wait_for_epochs,
)
from localgrad import finetuning, run
from localgrad.app import fitting, run_folders, using_runs
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import CheckpointError, DataError, RecipeError, RunFolderError, RunWarning
from localgrad.learner import LocalLearner
from localgrad.training import data
from localgrad.training.augment import normalise
from localgrad.training.data import load_data
from localgrad.training.events import EpochEnded, Event, accuracies
from localgrad.training.folder import RunFolder
from localgrad.training.trainer import Interrupted, Trainer
from ranks import Ranks

CIFAR100 = Path(__file__).parents[2] / "shared" / "data" / "cifar100"

SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_size": 16,
    "patch_size": 2,
    "options": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
}
VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 16,
    "patch_size": 4,
    "options": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
MICRO: dict[str, Any] = {
    "model": SWIN,
    "data": {"name": "digits", "limit": 120},
    "local": {"modules": 2},
    "training": {"epochs": 2, "batch_size": 16, "lr": 2e-3},
    "execution": {"device": "cpu", "num_threads": 1},
}
EVERYTHING = {"training.ema_decay": 0.9, **helpers.EVERYTHING}


def micro(changes: dict[str, Any] | None = None) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, changes or {}))


@pytest.fixture
def true_estimates() -> None:
    """Asked for by tests that want the memory estimated as users have it."""


@pytest.fixture(autouse=True)
def _quick_estimates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimating takes longer than a micro run; test_memory.py is about it."""
    if "true_estimates" not in request.fixturenames:
        monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished") / "run with spaces"
    run.train(micro({"training.epochs": 4}), out=folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that got SIGTERM in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at_step(monkeypatch, 10)  # 7 batches an epoch
        with pytest.raises(Interrupted):
            run.train(micro(), out=folder)
    return folder


# ------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_every_file(finished: Path) -> None:
    for name in (
        "recipe.toml",
        "data.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints/last.pt",
        "checkpoints/best.safetensors",
        "model.safetensors",
        "summary.json",
    ):
        assert (finished / name).exists(), name
    assert Recipe.from_toml((finished / "recipe.toml").read_text()) == micro({"training.epochs": 4})
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert not [path for path in finished.rglob(".*") if path.name != ".lock"], "temporary files are gone"


def test_the_summary_has_every_figure(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 <= summary["test_accuracy"] <= 1
    assert len(summary["test_module_accuracy"]) == 2
    assert summary["test_module_accuracy"][-1] == summary["test_accuracy"]
    assert [set(terms) for terms in summary["losses"]] == [{"task", "reconstruction"}, {"task"}]
    for key in ("estimated_peak_bytes", "estimated_end_to_end_peak_bytes", "measured_peak_bytes", "num_test"):
        assert isinstance(summary[key], int)
        assert summary[key] > 0
    assert summary["images_per_second"] > 0
    assert (summary["epochs"], summary["seed"]) == (4, 0)
    assert {"python", "torch", "timm", "localgrad"} <= set(summary["versions"])
    assert "processor" in summary["device"]
    assert summary["folder"] == str(finished)
    assert summary["plan"]["num_blocks"] == 3


@pytest.mark.parametrize("model", [SWIN, VIT], ids=["swin", "vit"])
def test_the_weights_are_plain_timm_and_give_the_evaluated_logits(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    summary = run.train(micro({"model": model, "training.epochs": 1}), out=folder)
    size = {"img_size": model["img_size"], "patch_size": model["patch_size"]}
    plain = timm.create_model(model["name"], num_classes=10, in_chans=1, **size, **model["options"])
    plain.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    plain.eval()

    pairs = []
    logits_of = LocalLearner.logits

    def compared(self: LocalLearner, images: torch.Tensor) -> Any:
        found = logits_of(self, images)
        with torch.no_grad():
            pairs.append((found[-1], plain(images)))
        return found

    monkeypatch.setattr(LocalLearner, "logits", compared)
    result = using_runs.evaluate_run(folder)
    assert len(pairs) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert result["accuracy"] == summary["test_accuracy"]
    assert result["module_accuracy"] == summary["test_module_accuracy"]

    data = load_named("digits")  # and the accuracy is what anybody would compute
    predicted = torch.cat([theirs for _, theirs in pairs]).argmax(dim=1)
    assert float((predicted == data.test.labels).float().mean()) == pytest.approx(result["accuracy"], abs=1e-7)


@pytest.mark.heavy
def test_a_run_can_be_repeated_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    torch.rand(7)  # whatever happened before in the process
    run.train(micro({"training.epochs": 4}), out=tmp_path / "again")
    assert_same_run(tmp_path / "again", finished)


# ------------------------------------------------------------------------------------- honest selection


def test_the_test_set_is_read_once_and_after_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []

    def watched(*args: Any, **settings: Any) -> Any:
        splits = load_data(*args, **settings)
        read = splits.test.read

        def counted(*inner: Any, **rest: Any) -> Any:
            happened.append("test")
            return read(*inner, **rest)

        splits.test.read = counted  # type: ignore[method-assign]
        return splits

    monkeypatch.setattr(data, "load_data", watched)
    sink = Recorder(lambda event: happened.append("epoch") if isinstance(event, EpochEnded) else None)
    run.train(micro(), out=tmp_path / "run", sinks=[sink])
    assert happened == ["epoch", "epoch", "test"]


def test_validation_selects_the_best_epoch(finished: Path) -> None:
    lines = metrics_of(finished)
    found = [line["val_accuracy"] for line in lines]
    best = int(np.argmax(found))
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["best_epoch"], summary["val_accuracy"]) == (best, found[best])
    assert [line["is_best"] for line in lines] == [
        value > max(found[:index], default=-1.0) for index, value in enumerate(found)
    ]
    assert using_runs.evaluate_run(finished, part="val")["accuracy"] == found[best], (
        "the saved weights are that epoch's"
    )
    assert 0 <= using_runs.evaluate_run(finished, part="train")["accuracy"] <= 1


@pytest.mark.heavy
def test_without_validation_images_the_last_epoch_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = run.train(micro({"data.val_fraction": 0.0}), out=folder)
    assert (summary["best_epoch"], summary["val_accuracy"]) == (1, None)
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["learner"]["model"]
    weights = load_file(folder / "model.safetensors")
    assert last.keys() == weights.keys()
    assert all(torch.equal(last[name], weights[name]) for name in weights)
    with pytest.raises(RecipeError, match="part='val': this run has no validation images"):
        using_runs.evaluate_run(folder, part="val")


# ------------------------------------------------------------------------------------- every kind of run


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"local.modules": 1}, [{"task"}]),
        ({"local.modules": [1, 2]}, [{"task", "reconstruction"}, {"task", "reconstruction"}, {"task"}]),
        ({"local.modules": "stages"}, [{"task", "reconstruction"}, {"task"}]),
        ({"execution.precision": "bf16"}, [{"task", "reconstruction"}, {"task"}]),
        ({"local.objective": "image", "local.options.decoder": "conv"}, [{"task", "reconstruction"}, {"task"}]),
        ({"local.objective": "greedy", "local.options.classifier": "linear"}, [{"task"}, {"task"}]),
        ({"local.objective": "contrastive"}, [{"contrastive", "reconstruction"}, {"task"}]),
        ({"local.options.task_weight": [1.0, 0.5]}, [{"task", "reconstruction"}, {"task"}]),
        (EVERYTHING, [{"task", "reconstruction"}, {"task"}]),
        ({"augment.label_smoothing": 0.1, "training.optimizer": "sgd"}, [{"task", "reconstruction"}, {"task"}]),
    ],
    ids=["end-to-end", "boundaries", "stages", "bf16", "image", "greedy", "contrastive", "weights", "all", "sgd"],
)
def test_every_kind_of_run_ends_in_a_summary(changes: dict[str, Any], terms: list[set[str]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = run.train(micro({"training.epochs": 1, **changes}), out=folder)
    assert [set(found) for found in summary["losses"]] == terms
    assert all(np.isfinite(value) for found in summary["losses"] for value in found.values())
    if changes.get("local.objective") == "contrastive" or changes is EVERYTHING:  # no classifier, or none of an average
        assert summary["test_module_accuracy"][0] is None
        assert using_runs.evaluate_run(folder)["module_accuracy"] == summary["test_module_accuracy"]
        assert accuracies(summary["test_module_accuracy"]).startswith("– ")  # noqa: RUF001
    else:
        assert None not in summary["test_module_accuracy"]
    if changes is EVERYTHING:
        assert metrics_of(folder)[0]["train_accuracy"] is None, "labels were soft"
    assert using_runs.evaluate_run(folder)["accuracy"] == summary["test_accuracy"]


def test_the_average_of_the_weights_is_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run.train(micro({"training.ema_decay": 0.9, "data.val_fraction": 0.0}), out=folder)
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["learner"]
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(last["averaged_model"][name], weights[name]) for name in weights)
    assert any(not torch.equal(last["model"][name], weights[name]) for name in weights)


def test_execution_does_not_change_results(finished: Path, tmp_path: Path) -> None:
    """Recomputing and workers not by a bit, accumulation only in rounding."""
    same = {"execution.checkpoint": "blocks", "execution.num_workers": 0, "training.epochs": 4}
    run.train(micro(same), out=tmp_path / "same")
    ours, theirs = (path / "model.safetensors" for path in (tmp_path / "same", finished))
    assert ours.read_bytes() == theirs.read_bytes()
    run.train(micro({"execution.accumulation": 3, "training.epochs": 4}), out=tmp_path / "near")
    for ours_line, line in zip(metrics_of(tmp_path / "near"), metrics_of(finished), strict=True):
        for found, expected in zip(ours_line["losses"], line["losses"], strict=True):
            assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.heavy
def test_a_default_folder_is_made_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (Path(run.train(micro({"training.epochs": 1}))["folder"]) for _ in range(2))
    assert first != second
    assert first.parent == second.parent == Path("runs")
    assert first.name.startswith("digits-feature-")


def write_image_folder(root: Path, num_images: int = 24) -> Path:
    """Two classes that anything can tell apart: dark and bright."""
    generator = np.random.default_rng(0)
    for name, low in (("dark night", 0), ("day", 180)):
        (root / name).mkdir(parents=True)
        for index in range(num_images):
            pixels = generator.integers(low, low + 70, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
    return root


@pytest.mark.heavy  # quick: test_finetuning.py, on a folder too
def test_an_image_folder_is_trained_on_and_predicted(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "photos")
    changes = {"data": {"name": str(data), "val_fraction": 0.2}, "training.epochs": 3, "training.batch_size": 8}
    summary = run.train(micro(changes), out=tmp_path / "run")
    assert summary["num_test"] == 10
    assert summary["test_accuracy"] == 1.0

    predictions = list(using_runs.predict(tmp_path / "run", data))
    assert len(predictions) == 48
    for prediction in predictions:
        shares = [share for _, share in prediction.classes]
        assert {name for name, _ in prediction.classes} == {"dark night", "day"}
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    right = [prediction.classes[0][0] == prediction.path.parent.name for prediction in predictions]
    assert sum(right) >= 46

    shutil.rmtree(data / "day")  # the data set is not needed
    [single] = using_runs.predict(tmp_path / "run", data / "dark night" / "00.png", top=1)
    assert [name for name, _ in single.classes] == ["dark night"]


def test_predicting_gives_the_softmax_of_the_plain_model(tmp_path: Path, finished: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    [prediction] = using_runs.predict(finished, tmp_path / "digit.png", top=99)
    assert len(prediction.classes) == 10
    info = json.loads((finished / "data.json").read_text())
    plain = timm.create_model(
        SWIN["name"], num_classes=10, in_chans=1, img_size=16, patch_size=2, **SWIN["options"]
    ).eval()
    plain.load_state_dict(load_file(finished / "model.safetensors"))
    big = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    image = normalise(torch.from_numpy(np.array(big))[None, None], info["mean"], info["std"])
    with torch.no_grad():
        shares = plain(image).softmax(dim=1)[0]
    for name, share in prediction.classes:
        assert share == pytest.approx(float(shares[int(name)]), abs=0.02)  # Pillow rounds otherwise when it resizes


def test_a_corrupt_image_is_named_or_skipped_with_a_count(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "photos")
    broken, strange = data / "day" / "03.png", data / "day" / "04.png"
    broken.write_bytes(broken.read_bytes()[:60])
    where = {"name": str(data), "val_fraction": 0.0, "transform": "none"}  # decoded when the run begins
    changes = {"data": where, "training.epochs": 1, "training.batch_size": 8}
    with pytest.raises(DataError, match=r"day/03\.png.*skip"):
        run.train(micro(changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sink = Recorder()
    summary = run.train(micro({**changes, "data.on_corrupt": "skip"}), out=tmp_path / "run", sinks=[sink])
    assert summary["num_skipped"] == 1
    [(part, counts)] = summary["skipped"].items()
    assert counts == {"corrupt": 1}
    assert f"left out of {part}: 1 corrupt" in sink.events[0].details  # type: ignore[union-attr]
    rows = (tmp_path / "run" / "skipped.csv").read_text().splitlines()
    assert rows[0] == "part,image,reason"
    assert rows[1].startswith(f"{part},{broken},corrupt: ")
    strange.write_bytes(b"no image")
    summary = run.train(micro({**changes, "data.on_corrupt": "skip"}), out=tmp_path / "other")
    assert summary["num_skipped"] == 2
    assert f"{strange},no image by its content" in (tmp_path / "other" / "skipped.csv").read_text()


@pytest.mark.heavy
@pytest.mark.skipif(not CIFAR100.exists(), reason=f"{CIFAR100} is not on this machine")
@pytest.mark.filterwarnings("ignore:::datasets")
def test_cifar100_is_trained_on(tmp_path: Path) -> None:
    changes = {"data": {"name": str(CIFAR100), "limit": 200}, "model": VIT, "training.epochs": 1}
    summary = run.train(micro(changes), out=tmp_path / "run")
    assert summary["num_test"] == 10_000
    assert len(json.loads((tmp_path / "run" / "data.json").read_text())["class_names"]) == 100


# ------------------------------------------------------------------------------------- resuming


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, 10),
        ({}, 1),
        ({"local.modules": 1, **EVERYTHING}, 12),
        (EVERYTHING, 10),
        pytest.param({"execution.precision": "bf16", "execution.accumulation": 2}, 10, marks=pytest.mark.heavy),
        ({"local.objective": "contrastive", "data.val_fraction": 0.0, "training.optimizer": "sgd"}, 13),
    ],
    ids=["plain", "first-step", "end-to-end", "all", "bf16", "contrastive"],
)
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(
    changes: dict[str, Any], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = micro({"training.epochs": 3, **changes})
    run.train(recipe, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, step)
        with pytest.raises(Interrupted) as stop:
            run.train(recipe, out=tmp_path / "parts")
    assert (stop.value.signal_number, stop.value.folder) == (signal.SIGTERM, tmp_path / "parts")
    position = torch.load(tmp_path / "parts" / "checkpoints" / "last.pt", weights_only=True)["position"]
    assert (position["epoch"], position["batch"]) == divmod(step, 7)
    torch.rand(5)  # another process stands elsewhere in its random numbers
    np.random.rand(5)
    run.resume(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.heavy
def test_a_signal_during_validation_stops_the_run_after_the_epoch_is_saved(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = micro({"training.epochs": 4})
    with pytest.raises(Interrupted):
        run.train(recipe, out=tmp_path / "run", sinks=[Recorder(interrupt)])
    position = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["position"]
    assert (position["epoch"], position["batch"]) == (2, 0)
    run.resume(tmp_path / "run", recipe)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.heavy
def test_a_run_killed_before_its_first_checkpoint_starts_again(finished: Path, tmp_path: Path) -> None:
    def crash(event: Event) -> None:
        if isinstance(event, EpochEnded):
            raise KeyboardInterrupt  # nothing is saved, as if the process were gone

    with pytest.raises(KeyboardInterrupt):
        run.train(micro({"training.epochs": 4}), out=tmp_path / "run", sinks=[Recorder(crash)])
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    assert len(metrics_of(tmp_path / "run")) == 1
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_runs_data_may_be_fetched_again(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is refused with the words "fetch it with download"."""
    folder, find = shutil.copytree(stopped, tmp_path / "run"), data.find

    def missing(*arguments: Any, download: bool, **more: Any) -> Any:
        if not download:
            raise DataError("it is missing")
        return find(*arguments, download=download, **more)

    monkeypatch.setattr(data, "find", missing)
    with pytest.raises(DataError, match="missing"):
        run.resume(folder)
    run.resume(folder, download=True)
    assert (folder / "summary.json").exists()
    with pytest.raises(DataError, match="missing"):
        using_runs.evaluate_run(folder)
    assert using_runs.evaluate_run(folder, download=True)["num_images"] > 0


def test_a_card_is_not_planned_for_beside_a_plan(tmp_path: Path) -> None:
    plan: Any = object()
    with pytest.raises(RecipeError, match=r"^card='T4' doesn't go with plan: it is of planning"):
        run.train(micro(), out=tmp_path / "run", plan=plan, card="T4")


def test_an_empty_text_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^out: got an empty text; name a folder"):
        run.train(micro(), out="")
    with pytest.raises(RecipeError, match=r"^path: got an empty text"):
        run.resume("")
    with pytest.raises(RecipeError, match=r"^out: got an empty text"):
        finetuning.finetune({"data.name": "digits", "model.name": "vit_tiny_patch16_224"}, out="")
    assert not list(tmp_path.iterdir())


def judged_as(monkeypatch: pytest.MonkeyPatch, accuracies: dict[int, float]) -> None:
    """Validation of epochs gives these accuracies."""

    def validate(trainer: Trainer) -> tuple[float, list[float | None]]:
        return (found := accuracies[trainer.position.epoch]), [*[None] * (len(trainer.learner.modules) - 1), found]

    monkeypatch.setattr(Trainer, "_validate", validate)


@pytest.mark.parametrize(("epochs", "again"), [(3, 0.6), (5, 0.2)], ids=["the same", "longer"])
def test_the_summary_names_the_epoch_of_the_weights_after_a_kill_between_two_writes(
    epochs: int, again: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights are of epoch 1, the checkpoint is from before it; trained longer, it turns out worst."""
    save, folder = RunFolder.save_last, tmp_path / "run"

    def killed(run_folder: RunFolder, state: Any) -> None:
        if state["position"]["epoch"] == 2:
            raise KeyboardInterrupt  # as if the process were gone
        save(run_folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_last", killed)
        judged_as(patch, {0: 0.3, 1: 0.6})
        with pytest.raises(KeyboardInterrupt):
            run.train(micro({"training.epochs": 3}), out=folder)
    best = load_file(folder / "checkpoints" / "best.safetensors")
    judged_as(monkeypatch, {1: again, 2: 0.4, 3: 0.4, 4: 0.55})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # which says that it is trained longer
        run.resume(folder, {"training.epochs": epochs})
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best_epoch"], summary["val_accuracy"]) == (1, 0.6)
    kept = load_file(folder / "checkpoints" / "best.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in best.items())
    assert [line["is_best"] for line in metrics_of(folder)] == [True, again == 0.6, *[False] * (epochs - 2)]


@pytest.mark.heavy
@pytest.mark.usefixtures("true_estimates")
def test_another_execution_may_go_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = micro({"training.epochs": 4})
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 10)
        with pytest.raises(Interrupted):
            run.train(recipe, out=tmp_path / "run")
    run.resume(tmp_path / "run", micro({"training.epochs": 4, "execution.checkpoint": "blocks"}))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_finished_run_only_gives_its_summary(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be built")

    monkeypatch.setattr(run_folders, "build", build)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    sink = Recorder()
    assert run.resume(finished, sinks=[sink]) == json.loads((finished / "summary.json").read_text())
    assert len(sink.events) == 1
    with pytest.warns(RunWarning, match=r"finished, so this changes nothing: data.root: None -> 'elsewhere'"):
        run.resume(finished, {"data.root": "elsewhere"})
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.heavy
def test_real_processes_stopped_in_every_way_go_on_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, then Ctrl-C, then to the end; and the same weights as of one run without a stop."""
    recipe = micro({"training.epochs": 5, "data.limit": 500, **EVERYTHING})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    folder = tmp_path / "a folder"

    process = ranks.start(["train", "--recipe", tmp_path / "recipe.toml", "--out", folder])
    wait_for_epochs(process, folder, 1, seconds_on=0.1)
    ended = process.send(signal.SIGTERM)
    assert ended.codes == [143]
    assert ended.err == [
        f"localgrad: stopped by SIGTERM, and saved in {folder}; go on with: localgrad train --resume '{folder}'\n"
    ]

    process = ranks.start(["train", "--resume", folder])
    wait_for_epochs(process, folder, 2, seconds_on=0.1)
    assert process.send(signal.SIGKILL).codes == [128 + signal.SIGKILL]

    process = ranks.start(["train", "--resume", folder])
    wait_for_epochs(process, folder, 3, seconds_on=0.1)
    ended = process.send(signal.SIGINT)
    assert ended.codes == [130]
    assert "stopped by SIGINT" in ended.err[0]
    assert len(metrics_of(folder)) < 5, "it was stopped on its way"

    run.resume(folder)
    run.train(recipe, out=tmp_path / "whole")
    assert_same_run(folder, tmp_path / "whole")


# ------------------------------------------------------------------------------------- refused


def only_checkpoint(folder: Path) -> Path:
    """The last checkpoint of a run that has no other."""
    (folder / "checkpoints" / "before.pt").unlink()
    return folder / "checkpoints" / "last.pt"


@pytest.mark.heavy
def test_another_method_is_refused_with_the_difference(stopped: Path) -> None:
    changed = micro({"training.epochs": 3, "training.lr": 0.1, "model.drop_path": 0.1})
    with pytest.raises(RecipeError, match=r"\(model\.drop_path: None -> 0\.1; training\.lr: 0\.002 -> 0\.1\)"):
        run.resume(stopped, changed)


def test_a_folder_with_a_run_is_not_overwritten(stopped: Path) -> None:
    with pytest.raises(RunFolderError, match="already holds a run; continue it with resume="):
        run.train(micro(), out=stopped)


def test_a_folder_in_use_by_another_process_is_refused(stopped: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(stopped / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match="another process is using it"):
            run.resume(stopped)
        holder.communicate("\n")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share: float, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    last = only_checkpoint(folder)
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"last\.pt: it is truncated or no checkpoint"):
        run.resume(folder)


def test_the_checkpoint_of_another_model_is_refused(stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    last = only_checkpoint(folder)
    state = torch.load(last, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "kept"}, last)  # as older versions wrote it
    (folder / "checkpoints" / "checksums.json").unlink()
    wider = {"model": {**SWIN, "options": {**SWIN["options"], "embed_dim": 32}}}
    (folder / "recipe.toml").write_text(micro(wider).to_toml())
    with (
        pytest.raises(CheckpointError, match=r"last\.pt: it doesn't fit this run .*another model"),
        pytest.warns(RunWarning, match="without checksums"),
    ):
        run.resume(folder)
    (folder / "recipe.toml").write_text(micro({"local.modules": 3}).to_toml())
    with (
        pytest.raises(CheckpointError, match=r"it has boundaries \[1\] and 2 optimizers, this learner \[1, 2\]"),
        pytest.warns(RunWarning, match="without checksums"),
    ):
        run.resume(folder)


@pytest.mark.parametrize("part", ["learner", "position", "sums", "random"])
def test_a_checkpoint_without_one_of_its_parts_is_refused(part: str, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    last = only_checkpoint(folder)
    state = torch.load(last, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != part}, last)
    with pytest.raises(CheckpointError, match="doesn't fit this run"):
        run.resume(folder)
    torch.save({**state, part: None}, last)
    with pytest.raises(CheckpointError, match="doesn't fit this run"):
        run.resume(folder)


@pytest.mark.parametrize("content", [{"format": 1}, {}, [1, 2]])
def test_a_checkpoint_of_another_version_is_refused(content: Any, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    torch.save(content, only_checkpoint(folder))
    with pytest.raises(CheckpointError, match="its format is"):
        run.resume(folder)


def test_a_run_that_ended_in_the_folder_while_another_was_built_stays(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, folder = run.build, tmp_path / "run"

    def build_slowly(*arguments: Any, **more: Any) -> Any:
        shutil.copytree(finished, folder)
        return build(*arguments, **more)

    monkeypatch.setattr(run, "build", build_slowly)
    with pytest.raises(RunFolderError, match="already holds a run; continue it with resume="):
        run.train(micro(), out=folder)
    assert_same_run(folder, finished)


def test_damaged_weights_are_refused(finished: Path, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    best = folder / "checkpoints" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:1000])
    for use in (
        using_runs.evaluate_run,
        lambda path: list(using_runs.predict(path, write_image_folder(tmp_path / "some", 1))),
    ):
        with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
            use(folder)
    best.unlink()
    with pytest.raises(CheckpointError, match="there are none; train the run first"):
        using_runs.evaluate_run(folder)
    (folder / "data.json").write_text("{")
    (folder / "checkpoints" / "last.pt").unlink()
    with pytest.raises(CheckpointError, match=r"data\.json: missing or damaged"):
        list(using_runs.predict(folder, tmp_path))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for use in (run.resume, using_runs.evaluate_run, lambda path: list(using_runs.predict(path, path))):
        with pytest.raises(RunFolderError, match="no run there"):
            use(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RunFolderError, match="no run there"):
        run.resume(tmp_path)
