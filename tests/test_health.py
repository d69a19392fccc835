"""The health log: its figures against independent ones, and a run that doesn't notice it."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from localgrad import run
from localgrad.app import fitting
from localgrad.app.build import build
from localgrad.app.recipe import Recipe, overlay
from localgrad.backbones.base import Layout
from localgrad.errors import CheckpointError, RecipeError
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import OBJECTIVES
from localgrad.training.data import Batches, DataInfo
from localgrad.training.events import ConsoleSink, EpochEnded, HealthMeasured, JsonlSink, TensorBoardSink
from localgrad.training.folder import RunFolder, load_saved_weights, save_weights
from localgrad.training.health import HealthCheck, gradient_cosine, linear_cka, linear_probe, pool, pooled_features
from localgrad.training.image_sets import InMemoryImages
from localgrad.training.trainer import EpochSums, Interrupted

SIZE = (3, 16, 16)
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "model_name": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "drop_path_rate": 0.2,
    },
    "swin": {
        "model_name": "swin_tiny_patch4_window7_224",
        "img_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 2),
        "num_heads": (2, 2),
        "window_size": 4,
    },
    "resnet": {"model_name": "resnet18", "channels": (8, 8, 16, 16), "output_stride": 8},
}
VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 16,
    "patch_size": 4,
    "options": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
RESNET: dict[str, Any] = {
    "name": "resnet18",
    "img_size": 16,
    "options": {"channels": [8, 8, 16, 16], "output_stride": 8},
}
MICRO: dict[str, Any] = {
    "model": VIT,
    "data": {"name": "digits", "limit": 120},
    "local": {"modules": 2},
    "training": {"epochs": 2, "batch_size": 16, "lr": 2e-3},
    "execution": {"device": "cpu", "num_threads": 1},
}
TIMES = ("images_per_second", "seconds")


def make(kind: str = "vit", modules: Any = 3, objective: str = "feature", **settings: Any) -> LocalLearner:
    torch.manual_seed(0)
    model = timm.create_model(**MODELS[kind], num_classes=5)
    return LocalLearner(model, modules=modules, input_size=SIZE, objective=OBJECTIVES[objective](), **settings)


def some_batch(num_images: int = 12) -> LocalBatch:
    generator = torch.Generator().manual_seed(1)
    return LocalBatch(torch.randn(num_images, *SIZE, generator=generator), torch.arange(num_images) % 5)


def batches_of(num_images: int, batch_size: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(num_images)
    labels = torch.arange(num_images).sort().values * 5 // num_images  # sorted by class, as folders are
    images = torch.randint(0, 40, (num_images, *SIZE), generator=generator, dtype=torch.uint8)
    images += (40 * labels).to(torch.uint8)[:, None, None, None]
    info = DataInfo("toy", tuple("abcde"), 3, SIZE[1:], (0.5,) * 3, (0.25,) * 3, 0, num_images, 0, 0, ())
    return Batches(
        images=InMemoryImages(images, labels),
        batch_size=batch_size,
        image_size=SIZE[1:],
        info=info,
        device=torch.device("cpu"),
        augment=None,
        seed=0,
        drop_last=False,
    )


def ended(num_modules: int = 3, **changes: Any) -> EpochEnded:
    values: dict[str, Any] = {
        "epoch": 4,
        "losses": ({"task": 1.5, "reconstruction": 0.25},) * (num_modules - 1) + ({"task": 0.5},),
        "train_accuracy": None,
        "val_accuracy": 0.75,
        "val_module_accuracy": (0.5,) * (num_modules - 1) + (0.75,),
        "learning_rate": 1e-3,
        "images_per_second": 1.0,
        "seconds": 1.0,
        "is_best": True,
    }
    return EpochEnded(**{**values, **changes})


# ------------------------------------------------------------------------------------- cosine of gradients


def naive_cosines(learner: LocalLearner, batch: LocalBatch) -> list[float]:
    """By ``backward()`` on whole copies: one through timm's own model, one for each module's loss."""
    theirs = copy.deepcopy(learner.model).eval()
    nn.functional.cross_entropy(theirs(batch.images), batch.labels).backward()
    end_to_end = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = []
    for index in range(len(learner.modules)):
        ours = copy.deepcopy(learner).eval()
        features = batch.images
        for module in ours.modules[: index + 1]:
            output = module(features, batch)
            features = output.features
        output.loss.backward()
        owned = {id(parameter) for parameter in ours.modules[index].parts.parameters()}
        x, y = [], []
        for name, parameter in ours.model.named_parameters():
            if id(parameter) in owned:
                x.append(parameter.grad.double().flatten().numpy())
                y.append(end_to_end[name].double().flatten().numpy())
        x, y = np.concatenate(x), np.concatenate(y)
        found.append(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)))
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("objective", ["feature", "greedy", "contrastive"])
def test_cosines_are_those_of_plain_backward_passes(kind: str, objective: str) -> None:
    learner, batch = make(kind, objective=objective), some_batch()
    found = gradient_cosine(learner, batch, chunk=5)
    assert found == pytest.approx(naive_cosines(learner, batch), abs=1e-5)
    assert found[-1] == pytest.approx(1.0, abs=1e-5), "the last module is trained on the task loss itself"
    assert abs(found[0]) < 0.9


def test_one_module_is_trained_with_the_end_to_end_gradient() -> None:
    assert gradient_cosine(make(modules=1), some_batch()) == pytest.approx([1.0], abs=1e-6)


def test_class_weights_and_ignored_labels_count_as_in_training() -> None:
    batch = some_batch()
    batch.labels[::3] = -100
    weight = torch.tensor([0.1, 10.0, 1.0, 3.0, 0.0])
    for loss in (None, nn.CrossEntropyLoss(weight)):
        cosines = gradient_cosine(make(modules=1, loss=loss), batch, chunk=5)
        assert cosines == pytest.approx([1.0], abs=1e-6)
        several = [gradient_cosine(make(loss=loss), batch, chunk=chunk) for chunk in (5, 100)]
        assert several[0] == pytest.approx(several[1], abs=1e-5)


def test_soft_labels_will_do() -> None:
    batch = some_batch()
    soft = LocalBatch(batch.images, nn.functional.one_hot(batch.labels, 5).float())
    assert gradient_cosine(make(), soft) == pytest.approx(gradient_cosine(make(), batch), abs=1e-5)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"checkpoint": "blocks"}, {"offload": True}], ids=str)
def test_cosines_are_the_same_however_the_learner_runs(settings: dict[str, Any]) -> None:
    expected = gradient_cosine(make(), some_batch())
    learner = make(**settings)
    learner.configure_optimizers(torch.optim.AdamW)
    assert gradient_cosine(learner, some_batch()) == pytest.approx(expected, abs=1e-6)
    learner.step_on(some_batch())
    assert all(math.isfinite(cosine) for cosine in gradient_cosine(learner, some_batch()))


def test_a_frozen_module_has_no_cosine() -> None:
    learner = make()
    for parameter in learner.modules[1].parts.parameters():
        parameter.requires_grad_(requires_grad=False)
    first, second, third = gradient_cosine(learner, some_batch())
    assert math.isnan(second)
    assert (math.isfinite(first), third) == (True, pytest.approx(1.0))


def test_measuring_leaves_everything_as_it_was() -> None:
    learner = make("resnet").train()
    learner.modules[1].parts[0].eval()  # somebody's choice
    for number, parameter in enumerate(learner.model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    check = HealthCheck(learner, batches_of(40), batches_of(20), 1, reference=learner.model.state_dict())
    before = copy.deepcopy((learner.model.state_dict(), [p.grad for p in learner.model.parameters()]))
    modes = [part.training for module in learner.modules for part in module.modules()]
    random = torch.get_rng_state()
    check(ended())
    after = learner.model.state_dict(), [p.grad for p in learner.model.parameters()]
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    assert [part.training for module in learner.modules for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_draws_and_statistics_of_an_objective_are_put_back() -> None:
    """None of ours has any, in evaluation mode; somebody's own might."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, *values: Any) -> Any:
            self.count += torch.rand(())
            return inner(*values)

    learner = make()
    inner, learner.modules[0].objective.terms["task"] = learner.modules[0].objective.terms["task"], Counting()
    random = torch.get_rng_state()
    gradient_cosine(learner, some_batch())
    assert float(learner.modules[0].objective.terms["task"].count) == 0
    assert torch.equal(torch.get_rng_state(), random)


# ------------------------------------------------------------------------------------- linear probe


@pytest.mark.parametrize("width", [6, 60], ids=["narrow", "wider-than-images"])
def test_the_probe_is_ridge_regression(width: int) -> None:
    generator = np.random.default_rng(0)
    labels, val_labels = generator.integers(0, 4, 40), generator.integers(0, 4, 200)
    centres = generator.normal(size=(4, width))
    x = centres[labels] + 1.5 * generator.normal(size=(40, width))
    y = centres[val_labels] + 1.5 * generator.normal(size=(200, width))
    x[:, 0] = y[:, 0] = 3.0  # says nothing
    x, y = x.astype(np.float32) * 50 + 7, y.astype(np.float32) * 50 + 7
    scaler = StandardScaler().fit(x)
    for ridge in (0.01, 0.1, 3.0):
        reference = Ridge(alpha=ridge * len(x)).fit(scaler.transform(x), np.eye(4)[labels])
        expected = (reference.predict(scaler.transform(y)).argmax(1) == val_labels).mean()
        tensors = map(torch.from_numpy, (x, labels, y, val_labels))
        assert linear_probe(*tensors, ridge=ridge) == pytest.approx(expected)
    assert 0.4 < expected < 1, "else the comparison says little"


def test_a_class_that_was_not_seen_is_never_right() -> None:
    x, labels = torch.eye(4), torch.tensor([0, 1, 0, 1])
    assert linear_probe(x, labels, x, labels) == 1
    assert linear_probe(x, labels, x, torch.full((4,), 2)) == 0


# ------------------------------------------------------------------------------------- CKA


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    centring = np.eye(len(k)) - 1 / len(k)
    return float(np.trace(k @ centring @ m @ centring)) / (len(k) - 1) ** 2


def test_cka_is_normalised_hsic() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 5)) + 4
    y = np.concatenate([x[:, :2], generator.normal(size=(30, 6))], axis=1)
    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)
    assert 0.1 < expected < 0.9


def test_cka_ignores_rotation_and_scale_but_no_other_map() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = torch.linalg.qr(x[:6]).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)
    assert linear_cka(x, x * torch.tensor([10.0, 1, 1, 1, 1, 1])) < 0.8
    assert math.isnan(linear_cka(x, torch.ones(30, 2)))


# ------------------------------------------------------------------------------------- features


def test_features_are_those_inside_the_plain_model() -> None:
    learner, batches = make().eval(), batches_of(20)
    stops = [span.stop for span in learner.plan.spans]
    seen: dict[int, list[Tensor]] = {stop: [] for stop in stops}
    model = copy.deepcopy(learner.model)
    for stop in stops:
        model.blocks[stop - 1].register_forward_hook(lambda _m, _i, out, stop=stop: seen[stop].append(out))
    with torch.no_grad():
        for batch in batches.epoch(0):
            model(batch.images)
    found, labels = pooled_features(learner.backbone, stops, batches)
    assert torch.equal(labels, batches.images.labels)
    for stop, features in zip(stops, found, strict=True):
        tokens = torch.cat(seen[stop])
        torch.testing.assert_close(features, torch.cat([tokens[:, 1:].mean(1), tokens[:, 0]], dim=1))


def test_grids_are_averaged_over_their_places() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(pool(Layout(kind="NHWC", width=5, grid=(3, 4)), x), x.mean(dim=(1, 2)))
    torch.testing.assert_close(pool(Layout(kind="NCHW", width=3, grid=(4, 5)), x), x.mean(dim=(2, 3)))


# ------------------------------------------------------------------------------------- one check


def test_the_averages_accuracy_is_not_told_as_the_last_modules() -> None:
    learner = make(ema_decay=0.9)
    learner.configure_optimizers(torch.optim.AdamW)
    measured = HealthCheck(learner, batches_of(40), batches_of(20), 2)(ended())
    assert [own.get("local_accuracy") for own in measured.modules] == [0.5, 0.5, None]


def test_one_record_tells_everything() -> None:
    learner = make()
    check = HealthCheck(learner, batches_of(40), batches_of(20), 2, reference=make().model.state_dict())
    measured = check(ended())
    assert measured.epoch == 4
    usual = ["local_accuracy", "reconstruction_error", "gradient_cosine", "linear_probe_accuracy", "cka"]
    assert [list(own) for own in measured.modules] == [usual, usual, [name for name in usual if "recon" not in name]]
    assert [own["local_accuracy"] for own in measured.modules] == [0.5, 0.5, 0.75]
    assert [own.get("reconstruction_error") for own in measured.modules] == [0.25, 0.25, None]
    assert [own["cka"] for own in measured.modules] == pytest.approx([1.0] * 3), "the reference is the model itself"
    assert all(own["linear_probe_accuracy"] > 0.8 for own in measured.modules), "shades of grey are easy"
    with torch.no_grad():
        for parameter in learner.modules[1].parts.parameters():
            parameter.copy_(torch.randn_like(parameter))
    again = check(ended())
    assert again.modules[0]["cka"] == pytest.approx(1.0), "the reference stays what it was"
    assert again.modules[1]["cka"] < 0.99
    assert check(ended()) == again


def test_what_cannot_be_measured_is_left_out() -> None:
    losses = ({"contrastive": 1.0},) * 2 + ({"task": 0.5},)
    event = ended(losses=losses, val_accuracy=None, val_module_accuracy=(None,) * 3)
    measured = HealthCheck(make(objective="contrastive"), batches_of(40), None, 1)(event)
    assert [list(own) for own in measured.modules] == [["gradient_cosine"]] * 3


def test_modules_whose_turn_has_not_come_are_left_out() -> None:
    learner = make()
    check = HealthCheck(learner, batches_of(40), batches_of(20), 1, reference=learner.model.state_dict())
    event = ended(module=1, losses=({}, {"task": 1.0}, {}), val_module_accuracy=(None, 0.5, None))
    probes = ["linear_probe_accuracy", "cka"]
    assert [list(own) for own in check(event).modules] == [probes, ["local_accuracy", *probes], []]


def test_images_are_spread_over_the_classes() -> None:
    check = HealthCheck(make(), batches_of(50), batches_of(50), 1, num_images=10)
    for part in (check._train, check._val):
        assert part is not None
        assert torch.bincount(part.images.labels).tolist() == [2] * 5
    assert len(torch.bincount(next(check._probe.epoch(0)).labels)) == 5


def test_checks_are_every_so_many_epochs_and_at_the_end() -> None:
    check = HealthCheck(make(), batches_of(20), None, 3)
    assert [epoch for epoch in range(8) if check.is_due(epoch, 8)] == [2, 5, 7]
    check.every = 10
    assert [epoch for epoch in range(8) if check.is_due(epoch, 4)] == [3, 7], "the last of every module"


def test_a_reference_of_another_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match="of another model"):
        HealthCheck(make(), batches_of(20), None, 1, reference=make("swin").model.state_dict())


# ------------------------------------------------------------------------------------- sinks

MEASURED = HealthMeasured(
    epoch=1,
    modules=(
        {"local_accuracy": 0.5, "reconstruction_error": 0.25, "gradient_cosine": -0.125, "cka": 0.75},
        {"local_accuracy": 0.625, "linear_probe_accuracy": 0.875, "gradient_cosine": 1.0, "cka": 0.5},
    ),
)


def test_tensorboard_shows_health_by_module(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.emit(MEASURED)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    found = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    sink.close()
    assert found == {
        f"health/module{index}/{name}": [(1, value)]
        for index, own in enumerate(MEASURED.modules)
        for name, value in own.items()
    }


def test_the_console_gets_one_line() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, width=40))
    sink.emit(MEASURED)
    sink.emit(HealthMeasured(epoch=2, modules=({}, {})))
    assert file.getvalue().splitlines() == [
        "  health: reconstruction error 0.25 –  gradient cosine -0.12 1.00  CKA 0.75 0.50  "  # noqa: RUF001
        "linear probe – 87.5%",  # noqa: RUF001
        "  health: nothing to measure yet",
    ]


def test_a_line_of_json_that_resuming_drops_with_its_epoch(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for epoch in range(3):
        sink.emit(HealthMeasured(epoch=epoch, modules=MEASURED.modules))
    sink.close()
    JsonlSink(path, 2).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"epoch": epoch, "health": list(MEASURED.modules)} for epoch in range(2)]


# ------------------------------------------------------------------------------------- runs


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimating takes longer than a micro run."""
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
    monkeypatch.setattr(fitting, "estimate_stages", lambda *_: [SimpleNamespace(peak_bytes=2**20)])


def micro(changes: dict[str, Any] | None = None) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, changes or {}))


def lines_of(folder: Path, *, health: bool) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if ("health" in line) == health]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in kept]


@pytest.fixture(scope="module")
def end_to_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
        run.train(micro({"local.modules": 1, "training.epochs": 1}), out=folder)
    return folder


EVERYTHING = {
    "training.ema_decay": 0.9,
    "training.clip_grad": 1.0,
    "augment.mixup": 0.4,
    "augment.crop_padding": 1,
    "model.drop_path": 0.2,
}
"""Whatever has a state or draws numbers."""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING,
        {"model": RESNET, "local.objective": "contrastive"},
        {"execution.offload": True, "training.ema_decay": 0.9},
        {"training.schedule": "sequential", "training.cached_epochs": 1},
        {"data.val_fraction": 0.0, "execution.precision": "bf16"},
    ],
    ids=["everything", "batch-norm", "offload", "sequential", "no-validation"],
)
def test_a_run_does_not_notice_that_its_health_is_measured(changes: dict[str, Any], tmp_path: Path) -> None:
    run.train(micro(changes), out=tmp_path / "without")
    run.train(micro({**changes, "execution.health_every": 1}), out=tmp_path / "with")
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    lines = lines_of(tmp_path / "with", health=False)
    assert lines == lines_of(tmp_path / "without", health=False)
    assert lines_of(tmp_path / "without", health=True) == []
    assert [line["epoch"] for line in lines_of(tmp_path / "with", health=True)] == [line["epoch"] for line in lines]
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("with", "without")
    ]
    learners = [state["learner"] for state in states]
    words = [[learner.pop(key) for key in ("objective", "optimizer_classes")] for learner in learners]
    assert words[0] == words[1]
    torch.testing.assert_close(learners[0], learners[1], atol=0, rtol=0)
    ours, theirs = (state["random"] for state in states)
    assert torch.equal(ours["torch"], theirs["torch"])
    assert torch.equal(ours["numpy"][1], theirs["numpy"][1])
    assert ours["python"] == theirs["python"]


@pytest.mark.heavy
def test_a_run_compares_itself_with_an_end_to_end_run(end_to_end: Path, tmp_path: Path) -> None:
    recipe = micro({"execution.health_every": 5, "execution.health_reference": str(end_to_end)})
    run.train(recipe, out=tmp_path / "run")
    [line] = lines_of(tmp_path / "run", health=True)
    assert line["epoch"] == 1, "the last one"
    assert all(0 < own["cka"] < 1 for own in line["health"])
    again = micro({"local.modules": 1, "training.epochs": 1, "execution.health_every": 1})
    again = Recipe.from_dict(overlay(again.to_dict(), {"execution.health_reference": str(end_to_end)}))
    run.train(again, out=tmp_path / "again")
    [line] = lines_of(tmp_path / "again", health=True)
    assert line["health"][0]["cka"] == pytest.approx(1.0), "the same recipe gives the same weights"


@pytest.mark.heavy
def test_an_interrupted_run_measures_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = micro({**EVERYTHING, "execution.health_every": 1})
    run.train(recipe, out=tmp_path / "whole")
    count, add = 0, EpochSums.add

    def interrupted(self: EpochSums, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, *arguments)

    monkeypatch.setattr(EpochSums, "add", interrupted)
    with pytest.raises(Interrupted):
        run.train(recipe, out=tmp_path / "parts")
    run.resume(tmp_path / "parts")
    for health in (False, True):
        assert lines_of(tmp_path / "parts", health=health) == lines_of(tmp_path / "whole", health=health)
    run_files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert run_files[0] == run_files[1]


def test_the_test_set_is_not_read(tmp_path: Path) -> None:
    job = build(micro({"execution.health_every": 1}))
    check = fitting.health_check(job)
    assert check is not None
    pixels = job.data.test.images.flatten(1)
    for part in (check._train, check._val, check._probe):
        assert not any((row == pixels).all(1).any() for row in part.images.images.flatten(1))


def write_recipe(folder: Path, text: str) -> None:
    held = RunFolder(folder)
    held.write_text("recipe.toml", text)
    held.release()


def make_bad(kind: str, tmp_path: Path, end_to_end: Path) -> tuple[Path | str, dict[str, Any]]:
    folder = tmp_path / "reference"
    if kind == "missing":
        return folder, {}
    if kind == "not-a-run":
        folder.mkdir()
        return folder, {}
    if kind == "no-weights":
        write_recipe(folder, (end_to_end / "recipe.toml").read_text())
        return folder, {}
    if kind == "local":
        write_recipe(folder, micro().to_toml())
        weights = (end_to_end / "checkpoints" / "best.safetensors").read_bytes()
        (folder / "checkpoints" / "best.safetensors").write_bytes(weights)
        return folder, {}
    if kind == "other-model":
        return end_to_end, {"model.options": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
    assert kind == "off"
    return end_to_end, {"execution.health_every": 0}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no run there"),
        ("not-a-run", "no run there"),
        ("no-weights", "there are none; train the run first"),
        ("local", "it was trained with local modules; name a run with modules=1"),
        ("other-model", r"another model \(model.options.embed_dim: 16 -> 32\)"),
        ("off", "add health_every=1"),
    ],
)
def test_a_bad_reference_is_refused_in_one_line(kind: str, words: str, tmp_path: Path, end_to_end: Path) -> None:
    path, changes = make_bad(kind, tmp_path, end_to_end)
    recipe = micro({"execution.health_every": 1, "execution.health_reference": str(path), **changes})
    with pytest.raises(RecipeError, match=f"^health_reference.*{words}") as refusal:
        run.train(recipe, out=tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists(), "a mistake leaves nothing behind"


def test_a_reference_with_other_classes_is_refused(tmp_path: Path, end_to_end: Path) -> None:
    write_recipe(tmp_path, (end_to_end / "recipe.toml").read_text())
    weights = load_saved_weights(end_to_end / "checkpoints" / "best.safetensors")
    weights["model.head.weight"] = weights["model.head.weight"][:7].clone()
    save_weights(tmp_path / "checkpoints" / "best.safetensors", weights)
    job = build(micro({"execution.health_every": 1, "execution.health_reference": str(tmp_path)}))
    with pytest.raises(RecipeError, match=r"^health_reference=\S+: checkpoint: it is of another model: head"):
        fitting.health_check(job)
