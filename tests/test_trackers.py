"""Experiment trackers as sinks: accelerate's border with a tracker of a few lines behind it, and the real ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import MICRO, Recorder, assert_same_run
from localgrad import run
from localgrad.app import fitting
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import RecipeError, RunWarning
from localgrad.integrations import trackers
from localgrad.integrations.trackers import MLFLOW, TRACKIO, WANDB, Service, TrackerSink, name_of_run
from localgrad.training.events import EpochEnded, Event, RunStarted, register_sink

pytest.importorskip("accelerate")
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

BOTH = ["tensorboard", "wandb"]


class Tiny(GeneralTracker):  # type: ignore[misc]  # its types aren't read
    """Keeps what it is given; all of them together."""

    name = "tiny"
    requires_logging_directory = False
    calls: ClassVar[list[tuple[Any, ...]]] = []
    fails_at: ClassVar[str] = ""

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(
            id="run-7",
            info=SimpleNamespace(run_id="run-7"),
            name=self.options["name"],
            finish=lambda exit_code: self._take("failed", exit_code),
        )

    def start(self) -> None:
        self._take("start", self.project, self.options)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._take("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._take("log", values, step)

    def finish(self) -> None:
        self._take("finish")

    def _take(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails_at:
            raise ConnectionError("no network\n  at all")


@pytest.fixture(autouse=True)
def _tiny_for_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny is W&B; and estimates, which take longer than these runs, are left out."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
    monkeypatch.setattr(trackers, "_is_installed", lambda _: True)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Tiny)
    monkeypatch.setattr(Tiny, "calls", [])
    yield
    PartialState._reset_state()


def micro(sinks: list[str], **changes: Any) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, {"execution.sinks": sinks, **changes}))


def of_kind(kind: str) -> list[tuple[Any, ...]]:
    return [call[1:] for call in Tiny.calls if call[0] == kind]


def crash_at(epoch: int) -> Recorder:
    def crash(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == epoch:
            raise KeyError("crash")

    return Recorder(crash)


# A run -----------------------------------------------------------------------------------------------------------


def test_a_tracker_gets_recipe_plan_and_bytes_tensorboards_figures_and_the_summary(tmp_path: Path) -> None:
    recipe, listener = micro(BOTH, **{"execution.health_every": 2}), Recorder()
    summary = run.train(recipe, out=tmp_path / "mine", sinks=[listener])
    kinds = [call[0] for call in Tiny.calls]
    assert kinds == ["start", "config", *["log"] * 6, "finish"], "three epochs, two of them with health; the summary"
    assert of_kind("start") == [("localgrad", {"name": "mine", "dir": str(tmp_path / "mine")})]

    [[config]] = of_kind("config")
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert config["training.lr"] == 2e-3 and config["model.options.depth"] == 2
    assert config["execution.sinks"] == "['tensorboard', 'wandb']"
    assert config["plan.boundaries"] == "[1]"
    assert config["plan.activation_bytes"] == str(summary["plan"]["activation_bytes"])
    assert config["estimated_peak_bytes"] == config["estimated_end_to_end_peak_bytes"] == 2**20

    logs = of_kind("log")
    assert [step for _, step in logs] == [0, 1, 1, 2, 2, 2]
    shown = EventAccumulator(str(tmp_path / "mine" / "tensorboard")).Reload()
    names = shown.Tags()["scalars"]
    tracked = {(name, step): value for values, step in logs[:-1] for name, value in values.items()}
    expected = {(name, each.step): each.value for name in names for each in shown.Scalars(name)}
    assert tracked == pytest.approx(expected), "TensorBoard has float32"
    end, _ = logs[-1]
    assert end["summary/test_accuracy"] == summary["test_accuracy"]
    assert end["summary/test_module_accuracy/1"] == summary["test_module_accuracy"][1]
    assert all(type(value) in (int, float) for value in end.values())

    [started] = [event for event in listener.events if isinstance(event, RunStarted)]
    assert Recipe.from_dict(overlay({}, started.recipe)) == recipe, "a sink of one's own has the whole recipe"
    assert started.plan == summary["plan"]
    assert not torch.distributed.is_initialized()


def test_a_run_that_goes_on_is_the_same_run_of_the_tracker(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        run.train(micro(["wandb"]), out=tmp_path / "run", sinks=[crash_at(1)])
    assert of_kind("failed") == [(1,)] and not of_kind("finish")
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": "run-7"}
    Tiny.calls.clear()
    run.resume(tmp_path / "run")
    [(_, options)] = of_kind("start")
    assert (options["id"], options["resume"]) == ("run-7", "allow")
    assert len(of_kind("config")) == len(of_kind("finish")) == 1
    assert of_kind("log")[-1][1] == 2
    Tiny.calls.clear()
    run.resume(tmp_path / "run")
    assert not Tiny.calls, "nothing is left to train"


def test_mlflow_keeps_the_params_of_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Tiny)
    sink = dataclasses.replace(MLFLOW, start=lambda _folder, known: {"name": known})(tmp_path)
    start = RunStarted(folder="", title="", details=(), epochs=2, start_epoch=0, batches_per_epoch=1, recipe={"a": 1})
    for _ in range(2):
        sink.emit(start)
    assert [options["name"] for _, options in of_kind("start")] == [None, "run-7"]
    assert of_kind("config") == [({"a": 1},)]


def test_names_and_the_environments_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    assert WANDB.start(folder, None) == {"name": "mine", "dir": str(folder)}
    assert MLFLOW.start(folder, "7") == {"run_name": "mine", "run_id": "7"}
    assert TRACKIO.start(folder, None) == {"name": "mine", "resume": "never"}
    assert TRACKIO.start(folder, "mine-2") == {"name": "mine-2", "resume": "allow"}
    assert name_of_run(tmp_path / "mine-pilot" / "lora") == "mine-pilot-lora"
    for name in ("NAME", "DIR", "PROJECT"):
        monkeypatch.setenv(f"WANDB_{name}", "theirs")
    assert WANDB.start(folder, None) == {}
    assert WANDB.begin(tmp_path, "7").project == "theirs"


# What is missing or fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "missing", "line"),
    [
        (WANDB, "wandb", "sink='wandb' needs wandb: pip install wandb."),
        (MLFLOW, "accelerate", "sink='mlflow' needs accelerate: pip install 'localgrad[trackers]'."),
        (TRACKIO, "", "sink='trackio' needs accelerate and trackio: pip install 'localgrad[trackers]' trackio."),
    ],
)
def test_what_is_not_installed_is_refused_before_anything_is_made(
    service: Service, missing: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda name: missing not in ("", name))
    with pytest.raises(RecipeError) as told:
        run.train(micro([service.name]), out=tmp_path / "run")
    assert str(told.value) == line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("left_behind")
    assert trackers._is_installed("accelerate")


def test_an_accelerate_of_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LOGGER_TYPE_TO_CLASS, "wandb")
    with pytest.raises(RecipeError) as told:
        WANDB.check_available()
    assert str(told.value) == "sink='wandb' needs accelerate 1.9 or newer: pip install -U 'localgrad[trackers]'."


@pytest.mark.few(1)
@pytest.mark.parametrize("where", ["start", "config"])
def test_a_tracker_that_cannot_begin_ends_the_run_before_its_first_step(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiny, "fails_at", where)
    listener = Recorder()
    with pytest.raises(RecipeError) as told:
        run.train(micro(["wandb"]), out=tmp_path / "run", sinks=[listener])
    assert str(told.value) == (
        f"sink='wandb': wandb can't begin (no network at all); no step was made. Mend that, or leave it out, and go on "
        f"with resume='{tmp_path / 'run'}'."
    )
    assert not listener.events
    assert len(of_kind("failed")) == (where == "config")
    monkeypatch.setattr(Tiny, "fails_at", "")
    run.resume(tmp_path / "run")
    assert of_kind("finish")


@pytest.mark.few(1)
@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_that_fails_later_costs_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.train(micro([]), out=tmp_path / "without")
    monkeypatch.setattr(Tiny, "fails_at", where)
    with pytest.warns(RunWarning) as said:
        run.train(micro(["wandb"]), out=tmp_path / "run")
    assert [str(each.message) for each in said] == [
        "sink='wandb': wandb failed (no network at all); the run goes on without it, and its figures are in "
        f"{tmp_path / 'run' / 'metrics.jsonl'}."
    ]
    assert len(of_kind(where)) == 1
    assert of_kind("failed") == [(1,)], "it is let go"
    assert_same_run(tmp_path / "run", tmp_path / "without")


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_damaged_ids_are_said_and_a_new_run_begins(text: str, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(text)
    sink = TrackerSink(WANDB, tmp_path)
    with pytest.warns(RunWarning, match=r"trackers.json: can't be read .*; trackers begin new runs\."):
        sink.emit(RunStarted(folder="", title="", details=(), epochs=1, start_epoch=0, batches_per_epoch=1))
    assert "id" not in of_kind("start")[0][1]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "run-7"}


def test_a_name_that_ships_cannot_be_taken() -> None:
    with pytest.raises(RecipeError, match=r"register_sink: 'wandb' is localgrad's own; take another name\."):
        register_sink("wandb", WANDB)


# The real ones, offline ------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_real_one_offline_and_resumed(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    own = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    own["MLFLOW_TRACKING_URI"] = (tmp_path / "mlruns").as_uri()
    (tmp_path / "recipe.toml").write_text(micro([name]).to_toml())

    def train(*options: str) -> dict[str, str]:
        command = [sys.executable, "-m", "localgrad", "train", *options]
        environment = {**os.environ, **own}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads((tmp_path / "run" / "trackers.json").read_text()))

    ids = train("--recipe", "recipe.toml", "--out", "run")
    assert list(ids) == [name]
    assert train("--resume", "run", "--epochs", "4") == ids
