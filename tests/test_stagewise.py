"""Sequential mode: honest features, one module at a time, and runs that stop anywhere and go on bit for bit."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import (
    EVERYTHING,
    Recorder,
    assert_same,
    assert_same_run,
    interrupt_at_step,
    metrics_of,
    wait_for_epochs,
)
from localgrad import run
from localgrad.app import fitting, using_runs
from localgrad.app.build import build
from localgrad.app.recipe import Recipe, overlay, preset
from localgrad.errors import BackboneError, CheckpointError, DeviceError, RecipeError, RunFolderError
from localgrad.estimating import estimate_step
from localgrad.learner import LocalLearner
from localgrad.memory import track as memory
from localgrad.step.local_module import LocalModule, Passed
from localgrad.step.local_step import LocalStep
from localgrad.training import feature_cache, stagewise
from localgrad.training.events import ConsoleSink, EpochEnded, Event, FeaturesCached, RunStarted
from localgrad.training.folder import RunFolder
from localgrad.training.stagewise import StagewiseTrainer, disk_needed, estimate_stages, place
from localgrad.training.trainer import Interrupted
from ranks import Ranks

SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_size": 16,
    "patch_size": 2,
    "options": {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4},
}
VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 16,
    "patch_size": 4,
    "options": {"embed_dim": 16, "depth": 3, "num_heads": 2},
}
RESNET: dict[str, Any] = {
    "name": "resnet18",
    "img_size": 16,
    "options": {"channels": [8, 8, 16, 16], "output_stride": 8},
}
MICRO: dict[str, Any] = {
    "model": SWIN,
    "data": {"name": "digits", "limit": 120},
    "local": {"modules": 3},
    "training": {"epochs": 3, "batch_size": 16, "lr": 2e-3, "schedule": "sequential", "cached_epochs": 2},
    "execution": {"device": "cpu", "num_threads": 1},
}
NUM_BATCHES, NUM_MODULES, EPOCHS = 7, 3, 3
CPU = torch.device("cpu")


def micro(changes: dict[str, Any] | None = None) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, changes or {}))


@pytest.fixture
def true_estimates() -> None:
    """Asked for by tests that want the memory estimated as users have it."""


def quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimating takes longer than a micro run."""
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20, peak_by_label={}))
    monkeypatch.setattr(fitting, "estimate_stages", lambda *_: [SimpleNamespace(peak_bytes=2**20, peak_by_label={})])


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "true_estimates" not in request.fixturenames:
        quick_estimates(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that draws numbers, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quick_estimates(patch)
        run.train(micro(EVERYTHING), out=folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    held = RunFolder(tmp_path / "run")
    yield held
    held.release()


def make(folder: RunFolder, changes: dict[str, Any] | None = None) -> StagewiseTrainer:
    trainer = fitting.make_trainer(build(micro(changes)), folder)
    assert isinstance(trainer, StagewiseTrainer)
    return trainer


def at_module(trainer: StagewiseTrainer, index: int, epoch: int = 0) -> StagewiseTrainer:
    """As if the modules before were finished."""
    trainer._end_module()
    trainer.position.epoch, trainer.position.batch = index * EPOCHS + epoch, 0
    trainer._prepare()
    return trainer


def test_what_is_replaced_between_steps_is_not_left_untrained(folder: RunFolder) -> None:
    trainer = make(folder)
    trainer._prepare()
    fed = trainer._feed()
    trainer.learner.train()
    trainer._step(next(fed))
    trainer.learner.model.head = nn.Identity()
    with pytest.raises(BackboneError, match="module head was replaced after the learner was made"):
        trainer._step(next(fed))


@pytest.mark.parametrize("part", ["learner", "sums", "random"])
def test_a_spoilt_checkpoint_changes_nothing(folder: RunFolder, part: str) -> None:
    trainer = make(folder)
    state = {**copy.deepcopy(trainer.state_dict()), "position": {**asdict(trainer.position), "num_images": 7}}
    state[part] = {}
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(CheckpointError, match="doesn't fit this run"):
        trainer.load_state_dict(state)
    assert_same(trainer.state_dict(), before)


# ------------------------------------------------------------------------------------- a whole run


@pytest.mark.heavy
@pytest.mark.usefixtures("true_estimates")
def test_a_run_learns_digits(tmp_path: Path) -> None:
    changes = {
        "data.limit": 400,
        "model.options": {"embed_dim": 24, "depths": [1, 1, 2], "num_heads": [2, 4, 8], "window_size": 4},
        "training.epochs": 3,
        "training.schedule": "sequential",
        "execution": {"device": "cpu", "num_threads": 1},
    }
    summary = run.train(Recipe.from_dict(overlay(preset("digits"), changes)), out=tmp_path / "run")
    assert summary["test_accuracy"] > 0.5, "chance is 0.1"
    assert 0 < summary["estimated_peak_bytes"] < 0.6 * summary["estimated_end_to_end_peak_bytes"]
    assert len(summary["best_epochs"]) == len(summary["module_val_accuracy"]) == 4


@pytest.mark.heavy
def test_what_a_run_leaves_is_used_like_any_other(finished: Path) -> None:
    assert not (finished / "cache").exists()
    for name in ("recipe.toml", "checkpoints/last.pt", "model.safetensors", "summary.json", "tensorboard"):
        assert (finished / name).exists(), name
    summary = json.loads((finished / "summary.json").read_text())
    assert using_runs.evaluate_run(finished)["accuracy"] == summary["test_accuracy"]
    assert using_runs.evaluate_run(finished)["module_accuracy"] == summary["test_module_accuracy"]
    assert using_runs.evaluate_run(finished, part="val")["accuracy"] == summary["val_accuracy"]
    assert [set(terms) for terms in summary["losses"]] == [{"task", "reconstruction"}] * 2 + [{"task"}]
    assert summary["epochs"] == EPOCHS
    weights, best = load_file(finished / "model.safetensors"), load_file(finished / "checkpoints" / "best.safetensors")
    assert all(torch.equal(weights[name], best[f"model.{name}"]) for name in weights)


@pytest.mark.heavy
def test_each_modules_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own classifier, module by module; what comes later doesn't change it."""
    kept: list[dict[str, Tensor]] = []
    finish = StagewiseTrainer._finish_epoch
    learners = []

    def watched(self: StagewiseTrainer, *arguments: Any) -> None:
        index = self.index
        kept.append({name: value.clone() for name, value in self.learner.modules[index].state_dict().items()})
        learners.append(self.learner)
        finish(self, *arguments)

    monkeypatch.setattr(StagewiseTrainer, "_finish_epoch", watched)
    sink = Recorder()
    summary = run.train(micro({"training.epochs": 4, "training.lr": 1e-2}), out=tmp_path / "run", sinks=[sink])
    ended = [event for event in sink.events if isinstance(event, EpochEnded)]
    assert [event.module for event in ended] == [0] * 4 + [1] * 4 + [2] * 4
    assert [event.epoch for event in ended] == list(range(12))
    for index, module in enumerate(learners[-1].modules):
        found = [event.val_module_accuracy[index] for event in ended[4 * index : 4 * index + 4]]
        best = found.index(max(found))
        assert (summary["best_epochs"][index], summary["module_val_accuracy"][index]) == (best, found[best])
        assert all(torch.equal(module.state_dict()[k], value) for k, value in kept[4 * index + best].items())
        others = [event.val_module_accuracy for event in ended[4 * index : 4 * index + 4]]
        assert all(values[j] is None for values in others for j in range(3) if j != index)
    assert any(best != 3 for best in summary["best_epochs"]), "else the last epoch would do"
    assert [event.val_accuracy is None for event in ended] == [True] * 8 + [False] * 4


@pytest.mark.heavy
def test_each_modules_learning_rate_starts_anew(finished: Path) -> None:
    rates = [line["learning_rate"] for line in metrics_of(finished)]
    assert rates == rates[:EPOCHS] * NUM_MODULES
    assert rates[0] > rates[1] > rates[2]


def test_one_module_is_ordinary_training_bit_for_bit(tmp_path: Path) -> None:
    one = {**EVERYTHING, "local.modules": 1}
    for schedule in ("sequential", "together"):
        run.train(micro({**one, "training.schedule": schedule}), out=tmp_path / schedule)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("sequential", "together"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.heavy
def test_the_first_module_is_trained_as_it_is_together_with_others(tmp_path: Path) -> None:
    """Nothing of it depends on the rest: no draws (drop path), so that both see the same numbers."""
    losses = []
    for schedule in ("sequential", "together"):
        run.train(micro({"training.schedule": schedule}), out=tmp_path / schedule)
        losses.append([line["losses"][0] for line in metrics_of(tmp_path / schedule)[:EPOCHS]])
    assert losses[0] == losses[1]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "changes",
    [
        {"local.objective": "image"},
        {"local.objective": "greedy", "local.modules": "stages", "training.cached_epochs": 9},
        {"local.objective": "contrastive"},
        {"model": VIT},
        {"model": RESNET},
        {"execution.precision": "bf16", "execution.accumulation": 2},
        {"data.val_fraction": 0.0},
    ],
    ids=["image", "greedy", "contrastive", "vit", "resnet", "bf16", "no-val"],
)
def test_every_kind_of_run_ends_in_a_summary(changes: dict[str, Any], tmp_path: Path) -> None:
    summary = run.train(micro({"training.epochs": 2, **changes}), out=tmp_path / "run")
    assert using_runs.evaluate_run(tmp_path / "run")["accuracy"] == summary["test_accuracy"]
    if changes.get("local.objective") == "contrastive":
        assert summary["best_epochs"][:-1] == [1, 1], "no classifier: the last epoch"
        assert summary["module_val_accuracy"][:-1] == [None, None]
        assert [line["train_accuracy"] is None for line in metrics_of(tmp_path / "run")] == [True] * 4 + [False] * 2
    if "data.val_fraction" in changes:
        assert summary["best_epochs"] == [1, 1, 1]


# ------------------------------------------------------------------------------------- honest features


@pytest.mark.parametrize("model", [SWIN, VIT, RESNET], ids=["swin", "vit", "resnet"])
def test_a_variant_is_the_epoch_of_that_number_and_keeps_its_labels(model: dict[str, Any], folder: RunFolder) -> None:
    trainer = at_module(make(folder, {**EVERYTHING, "model": model}), 1)
    module, data = trainer.learner.modules[0].eval(), trainer.train
    seen = []
    for epoch in range(EPOCHS):
        at_module(trainer, 1, epoch)
        fed = list(trainer._feed())
        assert len(fed) == len(data)
        for given, batch in zip(fed, data.epoch(epoch % 2), strict=True):
            with torch.no_grad():
                expected = module.features(batch.images)
            assert given.features is not None
            assert torch.equal(given.features, expected.bfloat16().float())
            assert torch.equal(given.labels, batch.labels)
            assert torch.equal(given.targets, batch.targets)
            assert given.images is None
        seen.append(torch.cat([given.labels for given in fed]))
    assert seen[0].dtype == torch.float32, "mixup was on"
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert trainer.val is not None
    for rows, batch in zip(trainer._read(1, "val"), trainer.val.epoch(0), strict=True):
        with torch.no_grad():
            assert torch.equal(rows.features, module.features(batch.images).bfloat16().float())
        assert torch.equal(rows.targets, batch.targets)


def test_a_later_module_gets_what_the_finished_ones_make_of_the_cache(folder: RunFolder) -> None:
    trainer = at_module(make(folder, EVERYTHING), 2, epoch=1)
    first, second, _ = trainer.learner.eval().modules
    for given, batch in zip(trainer._feed(), trainer.train.epoch(1), strict=True):
        with torch.no_grad():
            expected = second.features(first.features(batch.images).bfloat16().float())
        assert torch.equal(given.features, expected.bfloat16().float())
    assert [path.name for path in trainer.cache_folder.iterdir()] == ["after-module-1"], "the cache before is deleted"


def test_images_that_an_objective_looks_at_belong_to_the_features(folder: RunFolder) -> None:
    trainer = at_module(make(folder, {**EVERYTHING, "local.objective": "image"}), 1, epoch=1)
    trainer.position.batch = 2  # as on resuming
    fed = list(trainer._feed())
    assert len(fed) == NUM_BATCHES - 2
    for given, batch in zip(fed, trainer.train.epoch(1, start=2), strict=True):
        assert torch.equal(given.images, batch.images)
        assert torch.equal(given.labels, batch.labels)


def test_finished_modules_run_in_evaluation_mode(folder: RunFolder) -> None:
    trainer = make(folder, {**EVERYTHING, "model": RESNET, "model.drop_path": 0.0})
    trainer.learner.train()
    before = {name: value.clone() for name, value in trainer.learner.modules[0].state_dict().items()}
    at_module(trainer, 1)
    after = trainer.learner.modules[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "running statistics stand still"


def test_a_cache_is_used_again_only_for_the_same_weights(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = feature_cache.write_cache
    monkeypatch.setattr(stagewise, "write_cache", lambda *args: (written.append(args[0].name), write(*args)))
    trainer = at_module(make(folder), 1)
    at_module(trainer, 1)
    assert written == ["after-module-0"]
    path = trainer.cache_folder / "after-module-0" / "train-1.features"
    path.write_bytes(path.read_bytes()[:-2])
    at_module(trainer, 1)
    assert written == ["after-module-0"] * 2, "torn"
    with torch.no_grad():
        next(trainer.learner.modules[0].parts.parameters()).view(-1)[0] += 1e-6
    at_module(trainer, 1)
    assert written == ["after-module-0"] * 3, "other weights"
    shutil.rmtree(trainer.cache_folder)
    at_module(trainer, 2)
    assert written[3:] == ["after-module-0", "after-module-1"], "made again from the images"


# ------------------------------------------------------------------------------------- one module at a time


@pytest.mark.heavy
@pytest.mark.usefixtures("_no_collector")
def test_only_the_trained_modules_optimizer_lives(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(folder)
    made: list[weakref.ref[Any]] = []
    states: list[weakref.ref[Any]] = []
    make_step = LocalLearner.local_step
    step_of = LocalStep.__call__
    counts = []

    def watched(self: LocalLearner, *arguments: Any) -> LocalStep:
        step = make_step(self, *arguments)
        made.append(weakref.ref(step.optimizer))
        return step

    def stepped(self: LocalStep, *arguments: Any) -> Any:
        result = step_of(self, *arguments)
        states[:] = [state for state in states if state() is not None]
        known = {id(state()) for state in states}
        values = [value for entry in self.optimizer.state.values() for value in entry.values()]
        states.extend(weakref.ref(value) for value in values if id(value) not in known)
        alive = [optimizer() for optimizer in made if optimizer() is not None]
        counts.append((alive == [self.optimizer], len(states) == len(values), len(values) > 0))
        return result

    def nothing_alive(event: Event) -> None:
        if isinstance(event, FeaturesCached):
            assert all(optimizer() is None for optimizer in made)
            assert all(state() is None for state in states)

    monkeypatch.setattr(LocalLearner, "local_step", watched)
    monkeypatch.setattr(LocalStep, "__call__", stepped)
    trainer.sinks = (sink := Recorder(nothing_alive),)
    trainer.fit()
    assert len(made) == NUM_MODULES
    assert len(counts) == NUM_MODULES * EPOCHS * NUM_BATCHES
    assert all(all(found) for found in counts)
    assert [event.module for event in sink.events if isinstance(event, FeaturesCached)] == [0, 1]
    assert not trainer.learner.optimizers
    assert all(p.grad is None for module in trainer.learner.modules for p in module.parameters())


@pytest.mark.heavy
def test_only_the_trained_modules_weights_are_on_the_device(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no second device here: moves are noted, and at each step only the module's own may be the last word."""
    trainer = make(folder)
    where: dict[int, str] = {}
    device = torch.device("cpu:0")  # another name for the same, so that one can be told from the other
    trainer.train.device = device
    indices = {id(module): index for index, module in enumerate(trainer.learner.modules)}
    move, walk = LocalModule.to, LocalModule.run_parts
    seen = set()

    def noted(self: LocalModule, target: Any) -> LocalModule:
        where[indices[id(self)]] = str(target)
        assert list(where.values()).count("cpu:0") <= 1, "the others go away first"
        return move(self, target)

    def looked(self: LocalModule, inputs: Tensor, **more: Any) -> Passed:
        assert [index for index, place_ in where.items() if place_ == "cpu:0"] == [indices[id(self)]]
        seen.add((indices[id(self)], self.training))
        return walk(self, inputs, **more)

    monkeypatch.setattr(LocalModule, "to", noted)
    monkeypatch.setattr(LocalModule, "run_parts", looked)
    trainer.fit()
    assert seen == {(index, mode) for index in range(NUM_MODULES) for mode in (True, False)}
    monkeypatch.setattr(LocalModule, "to", lambda self, target: where.update({indices[id(self)]: str(target)}))
    place(trainer.learner, 1, device)
    assert where == {0: "cpu", 1: "cpu:0", 2: "cpu"}


@pytest.mark.heavy
@pytest.mark.parametrize(("objective", "model"), [("feature", SWIN), ("image", VIT)], ids=["swin", "vit"])
def test_the_peak_is_below_that_of_training_together(objective: str, model: dict[str, Any]) -> None:
    """By at least the optimizer state and the weights of the other modules."""
    changes = {"local.objective": objective, "model": model}
    job, other = build(micro(changes)), build(micro({**changes, "training.schedule": "together"}))
    together = estimate_step(other.learner, 64, other.optimizer).peak_bytes
    stages = estimate_stages(job.learner, 64, job.optimizer, CPU)
    assert len(stages) == NUM_MODULES
    for index, stage in enumerate(stages):
        rest = [p for j in range(NUM_MODULES) if j != index for p in job.learner.parameters(j)]
        nbytes = sum(p.numel() * p.element_size() for p in rest)
        assert stage.peak_bytes <= together - 3 * nbytes, (index, stage.peak_bytes, together)  # weights, two of AdamW
        own = sum(p.numel() * p.element_size() for p in job.learner.parameters(index))
        assert stage.by_category["parameters"] == own
    assert max(stage.peak_bytes for stage in stages) > 0.5 * together, "and not out of all measure"


@pytest.mark.heavy
def test_the_estimate_is_what_a_real_step_takes(folder: RunFolder) -> None:
    trainer = make(folder, {"local.objective": "image"})
    job = build(micro({"local.objective": "image"}))
    stages = estimate_stages(job.learner, 16, job.optimizer, CPU)
    for index, stage in enumerate(stages):
        at_module(trainer, index)
        trainer.learner.train()

        def step() -> None:
            trainer._step(next(trainer._feed()))

        buffers = sum(b.numel() * b.element_size() for b in trainer.learner.modules[index].buffers())
        parameters = trainer.learner.modules[index].parameters()
        found = memory.track(step, categories={"parameters": parameters}).by_category
        assert stage.by_category["optimizer"] == pytest.approx(found["optimizer"], abs=buffers + 64)
        assert stage.by_category["activations"] == pytest.approx(found["activations"], rel=0.03)
    other = build(micro({"local.objective": "image"}))
    before = {name: value.clone() for name, value in other.learner.model.state_dict().items()}
    estimate_stages(other.learner, 16, other.optimizer, CPU)
    assert all(torch.equal(value, before[name]) for name, value in other.learner.model.state_dict().items())


# ------------------------------------------------------------------------------------- disk


@pytest.mark.few(2)
@pytest.mark.parametrize("model", [SWIN, VIT, RESNET], ids=["swin", "vit", "resnet"])
@pytest.mark.parametrize("soft", [True, False])
def test_the_disk_needed_is_the_most_that_is_ever_taken(
    model: dict[str, Any], soft: bool, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(folder, {"model": model, **({"augment.mixup": 0.4} if soft else {})})
    taken = []
    rmtree = shutil.rmtree

    def measured(path: Path, **options: Any) -> None:
        if path.name.startswith("after"):
            files = [path for path in trainer.cache_folder.rglob("*") if path.is_file() and path.suffix != ".json"]
            taken.append(sum(path.stat().st_size for path in files))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", measured)
    at_module(trainer, 2)
    assert trainer.val is not None
    assert disk_needed(trainer.learner, trainer.train, len(trainer.val.images), 2) == max(taken)
    for span in trainer.learner.plan.spans[:1]:
        with torch.no_grad():
            features = trainer.learner.eval().modules[0].features(torch.zeros(2, 1, 16, 16))
        assert trainer.learner.backbone.layouts[span.stop].shape == tuple(features.shape[1:])


def test_too_small_a_disk_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunFolderError, match=r"need .* of disk in .*run/cache, .* are free; take fewer cached_epochs"):
        run.train(micro(), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    run.train(micro({"local.modules": 1, "training.epochs": 1}), out=tmp_path / "run")  # needs none


@pytest.mark.heavy
def test_the_disk_needed_is_told_at_the_start(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    sink, text = Recorder(), StringIO()
    run.train(micro(), out=tmp_path / "run", sinks=[sink, ConsoleSink(Console(file=text, width=200))])
    [started] = [event for event in sink.events if isinstance(event, RunStarted)]
    assert (started.epochs, started.epochs_per_module) == (9, 3)
    [line] = [line for line in started.details if "on disk" in line]
    assert "2 augmented epochs" in line
    assert str(tmp_path / "run" / "cache") in line
    printed = text.getvalue()
    for words in ("epoch   2/3 of module 3/3", "features of module 2 cached: ", "3 a module, one after another"):
        assert words in printed, words


def test_an_average_of_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ema_decay=0\.9 doesn't go with schedule='sequential'"):
        run.train(micro({"training.ema_decay": 0.9}), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- resuming


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [21, 22, 60])
def test_a_run_stopped_in_any_module_goes_on_bit_for_bit(
    step: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 steps a module: in one, at its end, and at the first step of the next."""
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, step)
        with pytest.raises(Interrupted):
            run.train(micro(EVERYTHING), out=tmp_path / "run")
    if step > 30:
        shutil.rmtree(tmp_path / "run" / "cache")  # made again
    torch.rand(5)  # another process stands elsewhere in its random numbers
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("epoch", [2, 3, 8])
def test_a_run_killed_between_its_best_weights_and_its_checkpoint_goes_on(
    epoch: int, finished: Path, tmp_path: Path
) -> None:
    """What lies on disk is newer than the checkpoint: weights that this epoch will select again."""

    def crash(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(micro(EVERYTHING), out=tmp_path / "run", sinks=[Recorder(crash)])
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.heavy
def test_a_signal_while_features_are_cached_stops_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = feature_cache.write_cache

    def signalled(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stagewise, "write_cache", signalled)
        with pytest.raises(Interrupted):
            run.train(micro(EVERYTHING), out=tmp_path / "run")
    assert list((tmp_path / "run" / "cache").iterdir()) == []
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.heavy  # quick twins: the tests above, and the same with modules that train together in test_run.py
def test_real_processes_stopped_in_every_way_go_on_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """SIGTERM, SIGKILL in an epoch and while features are written, Ctrl-C, then to the end."""
    recipe = micro({"data.limit": 500, **EVERYTHING})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    folder = tmp_path / "run"

    process = ranks.start(["train", "--recipe", tmp_path / "recipe.toml", "--out", folder])
    wait_for_epochs(process, folder, 1)
    assert process.send(signal.SIGTERM).codes == [143]

    ended = ranks.run(["train", "--resume", folder], fault=(0, "kill while caching", 5))  # the second module's features
    assert ended.codes == [128 + signal.SIGKILL]
    assert sorted(path.name for path in (folder / "cache").iterdir()) == [".after-module-1.partial", "after-module-0"]
    assert len(metrics_of(folder)) == 6

    process = ranks.start(["train", "--resume", folder])
    wait_for_epochs(process, folder, 7)
    assert process.send(signal.SIGKILL).codes == [128 + signal.SIGKILL]

    process = ranks.start(["train", "--resume", folder])
    wait_for_epochs(process, folder, 8)
    assert process.send(signal.SIGINT).codes == [130]
    assert len(metrics_of(folder)) < 9, "it was stopped on its way"

    run.resume(folder)
    run.train(recipe, out=tmp_path / "whole")
    assert_same_run(folder, tmp_path / "whole")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second module's first epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quick_estimates(patch)
        interrupt_at_step(patch, 24)
        with pytest.raises(Interrupted):
            run.train(micro(), out=folder)
    return folder


@pytest.mark.few(1)
@pytest.mark.parametrize("value", ["gone", None, {"optimizer": {}, "scaler": {}}])
def test_a_checkpoint_whose_optimizer_does_not_fit_is_refused(value: Any, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    state = torch.load(last, weights_only=True)
    assert len(state["local_step"]["optimizer"]["state"]) > 0
    torch.save({k: v for k, v in {**state, "local_step": value}.items() if v != "gone"}, last)
    with pytest.raises(CheckpointError, match="doesn't fit this run"):
        run.resume(tmp_path / "run")


def test_another_schedule_is_another_method(finished: Path) -> None:
    changed = micro({**EVERYTHING, "training.schedule": "together"})
    with pytest.raises(RecipeError, match=r"training\.schedule: 'sequential' -> 'together'"):
        run.resume(finished, changed)


def test_memory_that_runs_out_is_told_without_what_sequential_mode_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(LocalStep, "__call__", step)
    with pytest.raises(DeviceError, match="take accumulation=2 or checkpoint='halves/8', which") as caught:
        run.train(micro(), out=tmp_path / "run")
    assert "offload" not in str(caught.value)
