"""Unbalanced classes: the loss weighted by class against torch's own, and the draws of balanced sampling."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import (
    MICRO,
    Cli,
    Recorder,
    assert_refused,
    assert_same_run,
    interrupt_at_step,
    make_backbone,
    place_in,
    quick_adamw,
)
from localgrad import run
from localgrad.app import build, fitting
from localgrad.app.recipe import Recipe, overlay
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.losses import CrossEntropy
from localgrad.parallel.memory import estimate_share
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.training import data
from localgrad.training.augment import generator_for
from localgrad.training.data import Batches, class_weights, draw_alike
from localgrad.training.image_sets import InMemoryImages
from localgrad.training.trainer import Interrupted
from ranks import Ranks

COUNTS = [40, 5, 0, 15]
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))


@pytest.fixture(autouse=True)
def unbalanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the digits' training part, three classes of four, a few images each."""
    load = data.load_data

    def cut(*given: Any, **more: Any) -> data.Splits:
        splits = load(*given, **more)
        rows = [(splits.train.labels == each).nonzero().squeeze(1)[:count] for each, count in enumerate(COUNTS)]
        few, names = splits.train.subset(torch.cat(rows)), splits.info.class_names[:4]
        val, test = (part.subset((part.labels < 4).nonzero().squeeze(1)) for part in (splits.val, splits.test) if part)
        info = data.replace(splits.info, class_names=names, num_train=len(few), num_val=len(val), num_test=len(test))
        return data.replace(splits, train=few, val=val, test=test, info=info)

    monkeypatch.setattr(data, "load_data", cut)


def micro(**changes: Any) -> Recipe:
    own = {"data": {"name": "digits", "val_fraction": 0.2}, "training.batch_size": 12, "training.optimizer": "sgd"}
    return Recipe.from_dict(overlay(overlay(MICRO, own), changes))


def weights_by_hand() -> Tensor:
    """Three classes have images: each weighs a third of all of them."""
    return torch.tensor([60 / 3 / count if count else 0.0 for count in COUNTS])


def test_weights_are_inverse_to_the_number_of_images_and_one_on_average() -> None:
    found = class_weights(LABELS, 4)
    torch.testing.assert_close(found, weights_by_hand())
    assert float(found[LABELS].mean()) == pytest.approx(1)
    assert float(found[2]) == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"augment.label_smoothing": 0.1}, {"augment.mixup": 0.5, "augment.label_smoothing": 0.1}],
    ids=["hard", "smooth", "mixed"],
)
def test_one_module_with_weights_is_a_loop_with_torchs_own_loss(changes: dict[str, Any]) -> None:
    job = build.build(micro(**{"training.balance": "weights", "local.modules": 1, **changes}))
    model = copy.deepcopy(job.local.model)
    job.local.configure_optimizers(quick_adamw)
    optimizer = quick_adamw(list(model.parameters()))
    smoothing = 0.0 if "augment.mixup" in changes else job.recipe.method.augment.label_smoothing
    loss_of = nn.CrossEntropyLoss(weights_by_hand(), label_smoothing=smoothing)
    for batch, twin in zip(job.batches.epoch(0), job.batches.epoch(0), strict=True):
        assert batch.labels.is_floating_point() == ("augment.mixup" in changes)
        result = job.local.step_on(batch)
        loss = loss_of(model(twin.images), twin.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(result.losses[0], loss.detach())
    for ours, theirs in zip(job.local.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("is_global", [False, True], ids=["local", "end-to-end"])
def test_every_modules_task_is_weighted(accumulation: int, is_global: bool) -> None:
    changes = {"training.balance": "weights", "execution.accumulation": accumulation, "training.global_tail": 0.5}
    job = build.build(micro(**changes))
    batch = next(job.batches.epoch(0))
    labels = batch.labels
    step = job.local.global_step_on if is_global else job.local.step_on
    result = step(LocalBatch(batch.images, labels, counts_all=True))
    modules = [1] if is_global else [0, 1]
    for index in modules:
        logits = result.module_logits[index] if not is_global else result.logits
        assert logits is not None
        wanted = F.cross_entropy(logits, labels, weights_by_hand())
        assert not torch.allclose(wanted, F.cross_entropy(logits, labels), rtol=1e-3)
        torch.testing.assert_close(result.terms[index]["task"], wanted)


def test_classes_are_drawn_alike_and_images_of_a_class_too() -> None:
    orders = torch.stack([draw_alike(LABELS, generator_for(0, "order", epoch)) for epoch in range(300)])
    drawn = LABELS[orders]
    for each, count in enumerate(COUNTS):
        own = (drawn == each).sum(1)
        assert own.unique().tolist() == ([20] if count else [0]), "60 images of three classes"
        if count:
            often = torch.bincount(orders[drawn == each], minlength=60)[each == LABELS].double()
            expected = 300 * 20 / count
            assert float(((often - expected) ** 2 / expected).sum()) < count + 6 * (2 * count) ** 0.5  # chi-squared
    assert (drawn[:, 0] == 0).double().mean() == pytest.approx(1 / 3, abs=0.1), "in no order of classes"
    five = torch.tensor([0, 0, 0, 1, 1])
    halves = torch.stack([five[draw_alike(five, generator_for(epoch))].sum() for epoch in range(200)])
    assert set(halves.tolist()) == {2, 3}, "whose turn it is changes"


def test_draws_depend_on_seed_and_epoch_alone_and_replicas_share_them() -> None:
    images = InMemoryImages(torch.arange(60, dtype=torch.uint8).reshape(60, 1, 1, 1).expand(60, 1, 4, 4), LABELS)
    job = build.build(micro(**{"training.balance": "sampling"}))
    made: Batches = data.replace(job.batches, images=images, image_size=(4, 4), transform=None)

    def seen(batches: Batches, epoch: int, start: int = 0) -> list[list[int]]:
        return [batch.targets.tolist() for batch in batches.epoch(epoch, start=start)]

    assert made.draws_alike
    assert len(made) == len(data.replace(made, draws_alike=False)) == 5
    assert seen(made, 1)[2:] == seen(made, 1, start=2)
    assert seen(made, 1) != seen(made, 2)
    assert seen(made, 1) != seen(data.replace(made, seed=9), 1)
    shares = [seen(data.replace(made, shard=(number, 2)), 1) for number in (0, 1)]
    assert [first + second for first, second in zip(*shares, strict=True)] == seen(made, 1)
    assert seen(made.plain(images, 60), 0) == [LABELS.tolist()], "evaluated once each, in order"


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("schedule", "balance"),
    [("together", "weights"), ("sequential", "weights"), ("together", "sampling"), ("sequential", "sampling")],
)
def test_a_run_says_how_and_goes_on_bit_for_bit(
    schedule: str, balance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = micro(**{"training.balance": balance, "training.epochs": 2, "training.schedule": schedule})
    if schedule == "together":  # of the others a step with its loss is estimated as well
        monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
    listener = Recorder()
    run.train(recipe, out=tmp_path / "whole", sinks=[listener])
    said = {
        "weights": "Cross-entropy is weighted by class: from 0.5 (0, 40 images) to 4 (1, 5 images); a class without "
        "images weighs 0.",
        "sampling": "Classes are drawn alike often, one without images never: an image of 0 (of 40) 0.5 times an "
        "epoch, one of 1 (of 5) 4 times, on average.",
    }
    assert said[balance] in listener.events[0].details  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 8)
        with pytest.raises(Interrupted):
            run.train(recipe, out=tmp_path / "run")
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_it_does_not_go_with_is_one_line(cli_: Cli) -> None:
    cases = {
        ("weights", "--parallel", "modules", "--replicas", "2"): "--balance weights doesn't go with --replicas:",
        ("weights", "--objective", "contrastive"): "--balance weights doesn't go with --objective contrastive",
        ("even",): "training.balance = 'even'",
    }
    for options, words in cases.items():
        assert_refused(cli_("train", "--data", "digits", "--balance", *options), words)
    assert_refused(cli_("plan", "--balance", "even"), "--balance: unknown 'even'; take time or memory")
    assert_refused(cli_("plan", "--balance", "memory"), "--balance memory needs --parallel")


def test_a_share_with_weights_is_estimated_in_parts_too() -> None:
    weighted = CrossEntropy([1.0, 2.0, 0.5, 1.0, 3.0])
    peaks = []
    for loss in (weighted, None):
        learner = ParallelLearner(make_backbone(), modules=2, team=place_in(2, 1), loss=loss, accumulation=2)
        peaks.append(estimate_share(learner, 8, quick_adamw).peak_bytes)
    assert 0 <= peaks[0] - peaks[1] < 1024, "five weights, and how much labels count"


@pytest.mark.heavy
@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_two_processes_train_as_one(balance: str, ranks: Ranks, tmp_path: Path) -> None:
    recipe = micro(**{"training.balance": balance, "execution.accumulation": 2, "data.limit": 120})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    alone = ["train", "--recipe", str(tmp_path / "recipe.toml"), "--out"]
    assert ranks.run([*alone, str(tmp_path / "one")], size=1).codes == [0]
    assert ranks.run([*alone, str(tmp_path / "two"), "--parallel", "modules"], size=2).codes == [0, 0]
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert ours == theirs
