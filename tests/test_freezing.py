"""What stays as it is: the first blocks run in eval mode without a graph, and the rest trains as in a plain loop."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

import localgrad
from helpers import (
    SIZE,
    adamw,
    assert_refused,
    assert_same,
    assert_same_run,
    batches,
    copied,
    interrupt_at_step,
    load_named,
    make,
)
from libraries import LIBRARIES, called, inputs_of, plain_model, task_loss
from localgrad.backbones.base import Backbone, FrozenStem, outline, split
from localgrad.errors import BackboneError
from localgrad.learner import LocalLearner
from localgrad.objectives.methods import FeatureReconstruction
from localgrad.planning.budget import Task, plan_to_budget
from localgrad.training import feature_cache
from localgrad.training.data import Batches
from localgrad.training.frozen_features import FrozenFeatures
from localgrad.training.image_sets import InMemoryImages
from localgrad.training.optim import OptimizerFactory, Schedule
from localgrad.training.settings import Augment
from localgrad.training.trainer import Interrupted

if TYPE_CHECKING:
    from helpers import Cli

DROPPING: dict[str, dict[str, Any]] = {
    "vit": {"drop_path_rate": 0.4, "proj_drop_rate": 0.2},
    "swin": {"drop_path_rate": 0.4},
    "resnet": {},
}


def frozen(kind: str, freeze: str | float) -> Backbone:
    return split(make(kind, **DROPPING[kind]), SIZE).frozen(freeze)


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.parametrize("freeze", ["stem", 1, 0.5])
def test_one_module_is_a_plain_loop_whose_first_blocks_stand_still(kind: str, freeze: str | float) -> None:
    backbone = frozen(kind, freeze)
    plain = split(make(kind, **DROPPING[kind]), SIZE)
    count = len(plain.blocks) - len(backbone.blocks)
    still, learning = [plain.stem, *plain.blocks[:count]], [*plain.blocks[count:], plain.tail]
    learner = LocalLearner(backbone, modules=1)
    learner.configure_optimizers(adamw)
    weights = [weight for part in learning for weight in part.parameters()]
    optimizer = adamw(weights)
    before = copied(backbone.stem)
    for seed, (images, labels) in enumerate(batches(3)):
        torch.manual_seed(seed)
        result = learner.step(images, labels)
        torch.manual_seed(seed)
        features = images
        with torch.no_grad():
            for part in still:
                features = part.eval()(features)
        for part in learning:
            features = part.train()(features)
        loss = nn.functional.cross_entropy(features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(result.losses[0], loss.detach())
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name], tensor), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.stem.state_dict().items())


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", DROPPING)
def test_nothing_of_it_learns_is_held_or_costs_activations(kind: str) -> None:
    whole = LocalLearner(split(make(kind, **DROPPING[kind]), SIZE), modules=1)
    backbone = frozen(kind, 0.5)
    for modules in (1, 2):
        learner = LocalLearner(backbone, modules=modules)
        learner.configure_optimizers(adamw)
        before = copied(backbone.stem)
        for images, labels in batches(2):
            learner.step(images, labels)
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.stem.state_dict().items())
        held = {id(weight) for group in learner.optimizer.param_groups for weight in group["params"]}
        assert not held & {id(weight) for weight in backbone.stem.parameters()}
        assert all(weight.grad is None for weight in backbone.stem.parameters())
        localgrad.check_isolation(learner)
    plain = localgrad.estimate(whole, 32, optimizer=adamw)
    still = localgrad.estimate(LocalLearner(backbone, modules=1), 32, optimizer=adamw)
    if kind != "resnet":  # whose first convolution's output is the most that is alive, with a graph or without
        assert still.by_category["activations"] < 0.8 * plain.by_category["activations"]
    assert still.static_bytes < plain.static_bytes
    assert backbone.stem.training
    assert backbone.stem.part.training, "modes are put back"


def test_the_first_modules_target_is_what_enters_the_first_block_that_learns() -> None:
    backbone = frozen("vit", 0.5)
    learner = LocalLearner(backbone, modules=2, objective=FeatureReconstruction())
    assert learner.modules[0].objective is not None
    seen: list[torch.Tensor] = []
    objective = learner.modules[0].objective
    objective.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    learner.configure_optimizers(adamw)
    images, labels = batches(1)[0]
    with torch.no_grad():
        expected = backbone.eval().stem(images)
    backbone.train()
    learner.step(images, labels)
    assert torch.equal(seen[0], expected)


def test_all_blocks_may_stand_still() -> None:
    for freeze in (1.0, 4):
        backbone = split(make("vit", depth=4), SIZE).frozen(freeze)
        before = copied(backbone.model)
        learner = LocalLearner(backbone, modules=1)
        learner.configure_optimizers(adamw)
        for images, labels in batches(2):
            learner.step(images, labels)
        changed = {
            name.partition(".")[0]
            for name, tensor in backbone.model.state_dict().items()
            if not torch.equal(tensor, before[name])
        }
        assert changed == {"norm", "head"}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", LIBRARIES)
def test_models_of_every_library(name: str) -> None:
    model = plain_model(name)
    batch = LIBRARIES[name].batch(0, 4)
    plain = copy.deepcopy(model).eval()
    backbone = split(model, example=inputs_of(batch)).frozen(0.5)
    learner = LocalLearner(backbone, modules=1)
    learner.configure_optimizers(adamw)
    before = copied(backbone.stem)
    model.eval()
    with torch.no_grad():
        expected = task_loss(plain, batch)
        assert torch.equal(called(model, batch), called(plain, batch))
    learner.train()
    result = learner.step(inputs_of(batch), batch["labels"])
    assert torch.isfinite(result.losses[0])
    assert abs(float(result.losses[0]) - float(expected)) < 0.5, "dropout alone is between them"
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.stem.state_dict().items())


@pytest.mark.heavy
def test_plans_count_what_stands_still() -> None:
    whole = outline(make("vit", depth=6), SIZE)
    still = outline(make("vit", depth=6), SIZE).frozen(0.5)
    given: dict[str, Any] = {"objective": FeatureReconstruction(), "optimizer": adamw}
    tasks = [Task(backbone=each, **given) for each in (whole, still)]
    plans = [plan_to_budget(task, 32) for task in tasks]
    assert plans[1].forecast.peak_bytes < 0.8 * plans[0].forecast.peak_bytes
    assert plans[1].num_blocks == 3
    for plan in (plans[1], plan_to_budget(replace(tasks[1], modules=3), 32)):
        assert plan.forecast.composed_peak_bytes == pytest.approx(plan.forecast.peak_bytes, rel=0.02)


def test_what_cannot_stand_still_is_refused() -> None:
    backbone = split(make("vit", depth=4), SIZE)
    for freeze in ("head", 0, 5, 0.0, 1.5, -1, True):
        with pytest.raises(BackboneError, match="take stem, a number of blocks from 1 to 4, or a share"):
            backbone.frozen(freeze)
    model = make("vit", depth=4)
    model.blocks[3].mlp = model.blocks[0].mlp
    with pytest.raises(BackboneError, match=r"blocks.*mlp.* would be frozen, and is shared with parts that learn"):
        split(model, SIZE).frozen(1)


OPTIONS = ["--data", "digits", "--model", "vit_tiny_patch16_224", "--img-size", "16", "--patch-size", "8"]
OPTIONS += ["--set", "model.options.depth=4", "--set", "model.options.embed_dim=24", "--set", "data.limit=64"]
OPTIONS += ["--batch-size", "16", "--device", "cpu"]


@pytest.mark.heavy
def test_a_run_is_planned_trained_stopped_and_resumed(
    cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers import interrupt_at_step

    options = [*OPTIONS, "--freeze", "0.5", "--modules", "2", "--layer-decay", "0.7", "--epochs", "2"]
    assert cli_("train", *options, "--out", str(tmp_path / "whole")).code == 0
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 5)
        cli_("train", *options, "--out", str(tmp_path / "stopped"))
    assert cli_("train", "--resume", str(tmp_path / "stopped")).code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert cli_("evaluate", str(tmp_path / "whole"), "--device", "cpu").code == 0
    path = tmp_path / "plan.json"
    budget = ["--budget", "1GiB", "--json", str(path), "--no-cache"]
    planning = [*OPTIONS[:-6], "--batch-size", "16", "--device", "cpu", "--freeze", "2"]
    said = cli_("plan", *planning, *budget)
    assert said.code == 0, said.err
    assert json.loads(path.read_text())["num_blocks"] == 2
    by_plan = ["--plan", str(path), "--data", "digits", "--epochs", "1", "--set", "data.limit=64", "--device", "cpu"]
    trained = cli_("train", *by_plan, "--out", str(tmp_path / "planned"))
    assert trained.code == 0, trained.err
    assert "freeze = 2" in (tmp_path / "planned" / "recipe.toml").read_text()


def test_mistakes_are_one_line(cli_: Cli) -> None:
    assert_refused(cli_("train", *OPTIONS, "--freeze", "head"), "--freeze head", "take stem, a number of blocks")
    said = cli_("train", *OPTIONS, "--freeze", "0.5", "--modules", "3")
    assert_refused(said, "--freeze 0.5", "leaves 2 of the blocks", "--modules 2")
    assert_refused(cli_("train", *OPTIONS, "--layer-decay", "1.5"), "layer_decay")


def test_rates_fall_from_layer_to_layer_as_timms_do() -> None:
    model = make("vit", depth=4)
    settings: dict[str, Any] = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}
    learner = LocalLearner(split(model, SIZE), modules=3)
    learner.configure_optimizers(OptimizerFactory(model, **settings, layer_decay=0.5))
    schedule = Schedule(
        list(learner.optimizers), name="cosine", epochs=3, batches_per_epoch=4,
        warmup_epochs=0.0, warmup_lr=0.0, min_lr=0.0,
    )  # fmt: skip
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    whole = torch.optim.AdamW(groups, lr=0.01)
    theirs = create_scheduler_v2(
        whole, sched="cosine", num_epochs=3, min_lr=0.0, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=4
    )[0]
    for batch in (0, 5, 11):
        schedule.at(batch)
        theirs.step_update(batch)
        named = [(id(weight), group) for group in whole.param_groups for weight in group["params"]]
        expected = {number: (group["lr"], group["weight_decay"]) for number, group in named}
        seen = set()
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if id(weight) in expected:
                        assert (group["lr"], group["weight_decay"]) == pytest.approx(expected[id(weight)])
                        seen.add(id(weight))
                    else:
                        assert group["lr"] == pytest.approx(schedule.learning_rate), "auxiliary nets are new"
        assert seen == set(expected)


# Cached features -------------------------------------------------------------------------------------------------

CACHED = {
    "model.name": "vit_tiny_patch16_224",
    "model.img_size": 16,
    "model.patch_size": 8,
    "model.options": {"depth": 4, "embed_dim": 24, "num_heads": 2},
    "data.name": "digits",
    "data.limit": 64,
    "augment.crop_padding": 1,
    "local.modules": 2,
    "training.freeze": 0.5,
    "training.epochs": 2,
    "training.batch_size": 16,
    "training.warmup_epochs": 0.0,
    "training.cached_epochs": 2,
    "execution.num_threads": 1,
}


@pytest.mark.parametrize("objective", ["feature", pytest.param("image", marks=pytest.mark.heavy)])
def test_features_that_are_kept_whole_train_the_same_weights(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many augmented epochs as there are epochs, and without rounding."""
    monkeypatch.setattr(feature_cache, "STORED", torch.float32)
    recipe = {**CACHED, "local.objective": objective}
    localgrad.train(recipe, out=tmp_path / "images")
    cached = localgrad.train({**recipe, "training.cache_frozen": True}, out=tmp_path / "features")
    assert_same(load_file(tmp_path / "features/model.safetensors"), load_file(tmp_path / "images/model.safetensors"))
    assert not (tmp_path / "features/cache").exists()
    assert cached["test_accuracy"] is not None


def test_features_are_made_again_for_other_labels_or_another_normalisation(tmp_path: Path) -> None:
    learner, info = LocalLearner(frozen("vit", 0.5), modules=1), load_named("digits").info
    images = torch.randint(0, 256, (16, *SIZE), dtype=torch.uint8)
    own = {"num_channels": SIZE[0], "std": (0.5,) * SIZE[0]}
    how: dict[str, Any] = {"batch_size": 8, "image_size": SIZE[1:], "device": torch.device("cpu"), "seed": 0}

    def trained_on(labels: torch.Tensor, mean: float) -> list[int]:
        here = replace(info, mean=(mean,) * SIZE[0], **own)
        train = Batches(images=InMemoryImages(images, labels), info=here, augment=Augment(), **how)
        batches = list(FrozenFeatures(learner, train, tmp_path, 1).epoch(0, 0))
        sums.append(float(torch.cat([batch.features for batch in batches]).sum()))
        return torch.cat([batch.targets for batch in batches]).tolist()

    labels = torch.arange(16) % 2
    sums: list[float] = []
    first = trained_on(labels, 0.5)
    assert trained_on(labels, 0.5) == first
    assert trained_on(1 - labels, 0.5) == [1 - label for label in first]
    trained_on(labels, 0.2)
    assert sums[0] == sums[1] == sums[2] != sums[3]


@pytest.mark.heavy
def test_frozen_blocks_run_no_more_once_all_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that was cut off takes up what is on disk, and ends bit for bit as one that wasn't."""
    ran: list[bool] = []
    run_blocks = FrozenStem.run

    def counted(self: FrozenStem, given: torch.Tensor) -> torch.Tensor:
        if self.training and not self.passes and type(given) is torch.Tensor and len(given) == 16:
            ran.append(True)
        return run_blocks(self, given)

    monkeypatch.setattr(FrozenStem, "run", counted)
    recipe = {**CACHED, "training.cache_frozen": True, "training.epochs": 4}
    localgrad.train(recipe, out=tmp_path / "whole")
    num_steps = 64 // 16
    assert len(ran) == 2 * num_steps, "two epochs of four"
    monkeypatch.setattr(FrozenStem, "run", run_blocks)
    interrupt_at_step(monkeypatch, 3 * num_steps + 1)
    with pytest.raises(Interrupted):
        localgrad.train(recipe, out=tmp_path / "cut")
    assert (tmp_path / "cut/cache").exists()
    localgrad.resume(tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_what_has_no_features_to_keep_is_refused(cli_: Cli) -> None:
    for given, said in (
        ([], "--cache-frozen needs --freeze"),
        (["--freeze", "1", "--schedule", "sequential"], "--cache-frozen doesn't go with --schedule sequential"),
        (["--freeze", "1", "--global-every", "2"], "--cache-frozen doesn't go with --global-every"),
    ):
        assert_refused(cli_("train", "--cache-frozen", *given), said)
