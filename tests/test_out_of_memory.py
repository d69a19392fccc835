"""Memory that runs out where no weights are changed: validation, the test, health checks; and in global steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from helpers import MICRO_TOML, Cli, assert_refused, make_learner, metrics_of, without_times
from localgrad.app.recipe import Recipe
from localgrad.evaluating import estimate_evaluation, evaluation_batch
from localgrad.learner import LocalLearner
from localgrad.step.global_step import GlobalStep
from localgrad.training import health

RECIPE = MICRO_TOML.replace("limit = 120", "limit = 48\nval_fraction = 0.02")


class Full:
    """A device on which something larger than ``room`` images has no room, from the call number ``first`` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str, room: int, first: int = 1) -> None:
        self.room, self.first, self.calls = room, first, 0
        owner: Any = {"evaluation": LocalLearner, "health": health, "global": GlobalStep}[place]
        name = {"evaluation": "logits", "health": "gradient_cosine", "global": "__call__"}[place]
        honest = getattr(owner, name)

        def crowded(this: Any, batch: Any, *more: Any, **options: Any) -> Any:
            if not any(isinstance(weight, FakeTensor) for weight in _weights_of(this)):  # an estimate isn't the run
                self.look(len(getattr(batch, "labels", batch)))
            return honest(this, batch, *more, **options)

        monkeypatch.setattr(owner, name, crowded)

    def look(self, num_images: int) -> None:
        self.calls += 1
        if self.calls >= self.first and num_images > self.room:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
            )


def _weights_of(owner: Any) -> Iterator[Tensor]:
    if isinstance(owner, GlobalStep):
        return owner.steps[0].module.parameters()
    return iter(owner.model.parameters())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same run where there is room."""
    from localgrad import run

    folder = tmp_path_factory.mktemp("whole") / "run"
    run.train(Recipe.from_toml(RECIPE + "\nhealth_every = 1\n", "recipe"), out=folder)
    return folder


def assert_same_figures(folder: Path, reference: Path, *, health: bool = True) -> None:
    ours, theirs = ([without_times(line) for line in metrics_of(path)] for path in (folder, reference))
    assert len(ours) == len(theirs)
    assert [line for line in ours if health or "health" not in line] == [
        line for line in theirs if health or "health" not in line
    ]
    accuracies = [json.loads((path / "summary.json").read_text())["test_accuracy"] for path in (folder, reference)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "ran_out",
    [("evaluation", 1, "validation"), ("evaluation", 3, "the test"), ("health", 1, "the health check")],
)
def test_what_was_trained_is_saved_and_the_run_goes_on(
    ran_out: tuple[str, int, str], here: Path, whole: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, first, said_of = ran_out
    with monkeypatch.context() as patch:
        Full(patch, place, 4, first)
        said = cli_("train", "--recipe", "recipe.toml", "--out", "run", "--health", "1")
    assert_refused(said, f"memory ran out in {said_of}: planned ", "observed ", "--resume run --on-oom replan")
    with monkeypatch.context() as patch:
        Full(patch, place, 4)
        trained: list[int] = []
        step = LocalLearner.step_on

        def counted(learner: LocalLearner, batch: Any) -> Any:
            trained.extend([] if isinstance(batch.labels, FakeTensor) else [1])
            return step(learner, batch)

        patch.setattr(LocalLearner, "step_on", counted)
        again = cli_("train", "--resume", "run", "--on-oom", "replan")
    assert again.code == 0, again.err
    assert f"memory ran out in {said_of}; going on with" in again.out
    assert len(trained) == {"validation": 3, "the test": 0, "the health check": 3}[said_of], "an epoch is trained once"
    assert_same_figures(Path("run"), whole, health=place != "health")


@pytest.mark.heavy
def test_evaluating_a_run_takes_smaller_batches_by_itself(
    here: Path, whole: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = cli_("evaluate", str(whole))
    Full(monkeypatch, "evaluation", 16)
    said = cli_("evaluate", str(whole))
    assert said.code == 0
    assert said.out == plenty.out
    assert "memory ran out in the evaluation; going on with 16 images at a time" in said.err
    Full(monkeypatch, "evaluation", 0)
    refused = cli_("evaluate", str(whole))
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("localgrad: memory ran out in the evaluation: ")


@pytest.mark.heavy
def test_a_global_step_goes_on_with_less(here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full(monkeypatch, "global", 100)
    honest = full.look

    def once(num_images: int) -> None:
        full.room = 0 if full.calls == 0 else 100
        honest(num_images)

    full.look = once  # type: ignore[method-assign]
    said = cli_(
        "train", "--recipe", "recipe.toml", "--epochs", "1", "--out", "run", "--global-every", "2", "--on-oom", "replan"
    )
    assert said.code == 0, said.err
    assert said.out.count("memory ran out in an end-to-end step; going on with checkpoint") == 1


def test_an_evaluation_batch_is_what_takes_no_more_than_there_is_room_for() -> None:
    learner = make_learner()
    needed = estimate_evaluation(learner, 8)
    assert evaluation_batch(learner, needed, largest=8) == 8
    assert evaluation_batch(learner, needed - 1, largest=8) == 4
    assert evaluation_batch(learner, 0, largest=8) == 1
    assert learner.model.training


def test_the_estimate_of_evaluation_is_what_the_profiler_sees() -> None:
    from helpers import profiler_peak

    learner = make_learner().eval()
    images = torch.randn(16, *learner.backbone.input_size)
    with torch.no_grad():
        measured = profiler_peak(lambda: list(learner.logits(images))) + images.nbytes
    assert estimate_evaluation(learner, 16) == pytest.approx(measured, rel=0.02)
