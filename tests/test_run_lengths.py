"""How long runs are: those that stop early, and those that are extended."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import MICRO, Cli, Recorder, assert_refused, assert_same_run, interrupt_at_step, metrics_of
from localgrad import run
from localgrad.app import fitting
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import RecipeError, RunFolderError, RunWarning
from localgrad.training.events import EpochEnded, Event, RunStarted, StoppedEarly
from localgrad.training.trainer import Interrupted
from ranks import Ranks

STILL: dict[str, Any] = {"training.lr": 1e-9, "training.min_lr": 0.0, "training.epochs": 6, "training.patience": 2}
"""A run that learns nothing: its first epoch is the best, and it stops after the third."""
CONSTANT: dict[str, Any] = {"training.scheduler": "none", "training.ema_decay": 0.9}
"""Learning rates that don't depend on how many epochs there are: an extended run is one of all epochs, bit for bit."""


def micro(**changes: Any) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, {key.replace("__", "."): value for key, value in changes.items()}))


@pytest.fixture(autouse=True)
def _quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped early."""
    folder = tmp_path_factory.mktemp("early") / "run"
    run.train(micro(**STILL), out=folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("short") / "run"
    run.train(micro(training__epochs=2, **CONSTANT), out=folder)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of four from its start."""
    folder = tmp_path_factory.mktemp("long") / "run"
    run.train(micro(training__epochs=4, **CONSTANT), out=folder)
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def assert_is_as_long(folder: Path, reference: Path) -> None:
    """Two finished runs, one of which was extended, bit for bit."""
    assert (folder / "recipe.toml").read_text() == (reference / "recipe.toml").read_text()
    values = summary_of(folder)
    assert values.pop("extended_at") == 2
    (folder / "summary.json").write_text(json.dumps({**values, "extended_at": 0}))
    assert_same_run(folder, reference)


# Stopping early --------------------------------------------------------------------------------------------------


def test_a_run_stops_when_no_epoch_was_better_for_long_enough(early: Path, tmp_path: Path, cli_: Cli) -> None:
    summary = summary_of(early)
    assert [line["val_accuracy"] for line in metrics_of(early)] == [summary["val_accuracy"]] * 3
    assert {key: summary[key] for key in ("epochs", "patience", "num_epochs", "stopped_early", "best_epoch")} == {
        "epochs": 6, "patience": 2, "num_epochs": 3, "stopped_early": True, "best_epoch": 0,
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in early.rglob("*")}
    sink = Recorder()
    assert run.resume(early, sinks=[sink]) == summary, "it is finished"
    assert len(sink.events) == 1
    assert {path: path.stat().st_mtime_ns for path in early.rglob("*")} == before

    (tmp_path / "recipe.toml").write_text(micro(**STILL).to_toml())
    said = cli_("train", "--recipe", tmp_path / "recipe.toml", "--patience", 1, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert "Stopped after epoch 2 of 6: validation accuracy hasn't risen for 1 epoch." in said.out.splitlines()
    assert "2 of 6, the best was 1; stopped early" in said.out


@pytest.mark.heavy
def test_rates_are_those_of_all_epochs_and_a_run_that_gets_better_isnt_stopped(short: Path, tmp_path: Path) -> None:
    sink = Recorder()
    recipe = micro(training__epochs=5, training__patience=1)
    summary = run.train(recipe, out=tmp_path / "run", sinks=[sink])
    found = [line["val_accuracy"] for line in metrics_of(tmp_path / "run")]
    rising = next((epoch for epoch in range(1, 5) if found[epoch : epoch + 1] <= found[epoch - 1 : epoch]), 4)
    assert summary["num_epochs"] == rising + 1 == len(found)
    assert summary["stopped_early"] == (rising < 4) == any(isinstance(event, StoppedEarly) for event in sink.events)
    run.train(micro(training__epochs=5), out=tmp_path / "all")
    rates = [line["learning_rate"] for line in metrics_of(tmp_path / "all")]
    assert [line["learning_rate"] for line in metrics_of(tmp_path / "run")] == rates[: rising + 1]
    assert summary_of(short)["stopped_early"] is False


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.heavy), 8])
def test_a_run_that_was_cut_off_stops_where_it_would_have(
    step: int, early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, step)  # three batches an epoch; the last of the three epochs
        with pytest.raises(Interrupted):
            run.train(micro(**STILL), out=tmp_path / "run")
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", early)


def test_a_run_that_was_cut_off_after_the_deciding_epoch_decides_the_same(early: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run.train(micro(**STILL), out=tmp_path / "run", sinks=[Recorder(interrupt)])
    position = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["position"]
    assert (position["epoch"], position["batch"]) == (3, 0)
    sink = Recorder()
    run.resume(tmp_path / "run", sinks=[sink])
    assert [event.num_waited for event in sink.events if isinstance(event, StoppedEarly)] == [2]
    assert not any(isinstance(event, EpochEnded) for event in sink.events)
    assert_same_run(tmp_path / "run", early)


def test_health_is_measured_after_the_last_epoch_wherever_that_is(tmp_path: Path) -> None:
    run.train(micro(**STILL, execution__health_every=10), out=tmp_path / "run")
    assert [line["epoch"] for line in metrics_of(tmp_path / "run") if "health" in line] == [2]


# Extending -------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_extended_and_says_how(short: Path, long: Path, tmp_path: Path, cli_: Cli) -> None:
    folder = copy_of(short, tmp_path)
    said = cli_("train", "--resume", folder, "--epochs", 4)
    assert said.code == 0, said.err
    assert (
        "learning rates from epoch 3 on are those of 4 epochs, before it of 2: this isn't bit for bit a run of 4 from "
        "its start"
    ) in said.out.splitlines()
    assert "4, the best was" in said.out
    assert "; extended after 2" in said.out
    assert "read at the end)" in said.out, "and not once: it was read when the run had two epochs"
    assert_is_as_long(folder, long)


def test_learning_rates_are_those_of_the_longer_schedule(tmp_path: Path) -> None:
    run.train(micro(training__epochs=2), out=tmp_path / "run")
    run.resume(tmp_path / "run", {"training.epochs": 4})
    run.train(micro(training__epochs=4), out=tmp_path / "long")
    ours, theirs = ([line["learning_rate"] for line in metrics_of(tmp_path / name)] for name in ("run", "long"))
    assert ours[2:] == theirs[2:]
    assert ours[1] < ours[2], "it had fallen to the end"


@pytest.mark.parametrize("at", [2, 3], ids=["before its first checkpoint", "later"])
def test_an_extension_that_was_killed_loses_nothing_and_goes_on(
    at: int, short: Path, long: Path, tmp_path: Path
) -> None:
    def crash(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == at:
            raise KeyboardInterrupt  # nothing is saved, as if the process were gone

    folder = copy_of(short, tmp_path)
    before = {name: (folder / name).read_bytes() for name in ("summary.json", "model.safetensors")}
    with pytest.raises(KeyboardInterrupt):
        run.resume(folder, {"training.epochs": 4}, sinks=[Recorder(crash)])
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert Recipe.from_toml((folder / "recipe.toml").read_text()).method.training.epochs == 4
    sink = Recorder()
    run.resume(folder, sinks=[sink])
    [started] = [event for event in sink.events if isinstance(event, RunStarted)]
    assert started.start_epoch == at
    assert any("bit for bit" in line for line in started.details) == (at == 2)
    assert_is_as_long(folder, long)


def test_a_run_that_stopped_in_an_epoch_is_extended(
    long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 8)
        with pytest.raises(Interrupted):
            run.train(micro(training__epochs=3, **CONSTANT), out=tmp_path / "run")
    with pytest.raises(RecipeError, match="epochs=2: the run is in epoch 3 already; take 3 or more, or start a new"):
        run.resume(tmp_path / "run", {"training.epochs": 2})
    run.resume(tmp_path / "run", {"training.epochs": 4})
    assert_is_as_long(tmp_path / "run", long)


@pytest.mark.parametrize(
    ("changes", "num_epochs"),
    [({"training.epochs": 9}, 5), ({"training.patience": 1}, 4), ({"training.patience": None}, 6)],
    ids=str,
)
def test_a_run_that_stopped_early_waits_anew(
    changes: dict[str, Any], num_epochs: int, early: Path, tmp_path: Path
) -> None:
    folder = copy_of(early, tmp_path)
    summary = run.resume(folder, changes)
    assert summary["num_epochs"] == num_epochs
    assert summary["stopped_early"] == ("training.patience" not in changes or changes["training.patience"] is not None)
    assert (summary["extended_at"], summary["best_epoch"]) == (3, 0)
    assert run.resume(folder) == summary == summary_of(folder)


def test_patience_changes_nothing_where_no_epoch_is_left(short: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in short.rglob("*")}
    with pytest.warns(RunWarning, match="changes nothing: training.patience: None -> 1"):
        assert run.resume(short, {"training.patience": 1}) == summary_of(short)
    assert {path: path.stat().st_mtime_ns for path in short.rglob("*")} == before


def test_what_cant_be_extended_is_refused_in_a_line(short: Path, early: Path, tmp_path: Path, cli_: Cli) -> None:
    folder = copy_of(short, tmp_path)
    kept = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    said = cli_("train", "--resume", folder, "--epochs", 1)
    assert_refused(said, "--epochs 1: the run has trained 2 already; take more, or start a new run.")
    said = cli_("train", "--resume", folder, "--epochs", 4, "--lr", 0.1)
    assert_refused(said, "(training.lr: 0.002 -> 0.1); leave those options out")
    assert {path: path.read_bytes() for path in kept} == kept
    with pytest.raises(RecipeError, match="epochs=3: the run has trained 3 already; take more"):
        run.resume(early, {"training.epochs": 3})
    (folder / "checkpoints" / "last.pt").unlink()
    with pytest.raises(RunFolderError, match=r"its checkpoint is gone .*last\.pt.* from its weights by weights="):
        run.resume(folder, {"training.epochs": 4})
    one_by_one = micro(training__schedule="sequential", training__epochs=1)
    (tmp_path / "recipe.toml").write_text(one_by_one.to_toml())
    with pytest.warns(match="without checksums"), pytest.raises(RecipeError, match="a run stays as long as it began"):
        run.resume(tmp_path, {"training.epochs": 2})


@pytest.mark.heavy
def test_several_processes_stop_and_extend_as_one_does(early: Path, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(micro(**STILL).to_toml())
    folder = tmp_path / "shared out"
    ended = ranks.run(["train", "--recipe", tmp_path / "recipe.toml", "--parallel", "modules", "--out", folder], size=2)
    assert set(ended.codes) == {0}, ended
    assert "Stopped after epoch 3 of 6: validation accuracy hasn't risen for 2 epochs." in ended.out[0]
    assert_same_run(folder, early)
    ended = ranks.run(["train", "--resume", folder, "--epochs", 9], size=2)
    assert set(ended.codes) == {0}, ended
    alone = copy_of(early, tmp_path)
    run.resume(alone, {"training.epochs": 9})
    assert summary_of(alone)["num_epochs"] == 5
    assert_same_run(folder, alone)
    ended = ranks.run(["train", "--resume", folder, "--epochs", 4], size=2)
    assert set(ended.codes) == {2}, ended
    assert ended.err[0] == "localgrad: --epochs 4: the run has trained 5 already; take more, or start a new run.\n"
