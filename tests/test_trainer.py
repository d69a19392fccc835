"""The loop: sums of an epoch, divergence, signals, random state."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from helpers import Recorder
from localgrad.errors import CheckpointError, DivergenceError
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.step.executor import StepResult
from localgrad.training.data import Batches, DataInfo
from localgrad.training.events import EpochEnded, Event, Progressed
from localgrad.training.folder import RunFolder
from localgrad.training.image_sets import InMemoryImages
from localgrad.training.optim import OptimizerFactory, Schedule
from localgrad.training.trainer import (
    EpochSums,
    Interrupted,
    TogetherTrainer,
    _restore_random_state,
    all_random_states,
    best_weights,
    evaluate,
    load_best_weights,
)

NUM_CLASSES = 3


def batches_of(num_images: int, *, training: bool, batch_size: int = 8) -> Batches:
    from localgrad.training.settings import Augment

    generator = torch.Generator().manual_seed(num_images)
    labels = torch.arange(num_images) % NUM_CLASSES
    images = torch.randint(0, 80, (num_images, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images += (80 * labels).to(torch.uint8)[:, None, None, None]
    info = DataInfo("toy", ("a", "b", "c"), 1, (8, 8), (0.5,), (0.25,), 0, num_images, 0, 0, ())
    return Batches(
        images=InMemoryImages(images, labels),
        batch_size=batch_size,
        image_size=(8, 8),
        info=info,
        device=torch.device("cpu"),
        augment=Augment() if training else None,
        seed=0,
        drop_last=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    held = RunFolder(tmp_path / "run")
    yield held
    held.release()


def make(folder: RunFolder, *, epochs: int = 3, modules: int = 2, val: bool = True, **settings: Any) -> TogetherTrainer:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        in_chans=1,
        num_classes=NUM_CLASSES,
    )
    learner = LocalLearner(model, modules=modules, input_size=(1, 8, 8), **settings)
    learner.configure_optimizers(OptimizerFactory(model, name="adamw", lr=5e-3, weight_decay=0.05))
    train = batches_of(44, training=True)
    schedule = Schedule(
        learner.optimizers,
        name="cosine",
        epochs=epochs,
        batches_per_epoch=len(train),
        warmup_epochs=0,
        warmup_lr=0,
        min_lr=0,
    )
    return TogetherTrainer(
        learner=learner,
        schedule=schedule,
        train=train,
        val=batches_of(20, training=False) if val else None,
        epochs=epochs,
        folder=folder,
        sinks=[Recorder()],
    )


def events_of(trainer: TogetherTrainer, kind: type[Event]) -> list[Any]:
    [sink] = trainer.sinks
    assert isinstance(sink, Recorder)
    return [event for event in sink.events if isinstance(event, kind)]


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Call ``action(learner)`` after step ``number``, counted from 1."""
    step = LocalLearner.step_on

    def watched(self: LocalLearner, batch: LocalBatch) -> StepResult:
        result = step(self, batch)
        if self.num_steps == number:
            action(self)
        return result

    monkeypatch.setattr(LocalLearner, "step_on", watched)


# ------------------------------------------------------------------------------------- the epoch


def test_an_epoch_is_summed_as_it_was_trained(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(folder, epochs=1)
    seen = []
    step = LocalLearner.step_on

    def kept(self: LocalLearner, batch: LocalBatch) -> StepResult:
        result = step(self, batch)
        right = int((result.logits.argmax(1) == batch.labels).sum())
        seen.append(([{name: float(v) for name, v in terms.items()} for terms in result.terms], right))
        return result

    monkeypatch.setattr(LocalLearner, "step_on", kept)
    trainer.fit()
    [event] = events_of(trainer, EpochEnded)
    assert len(seen) == 5, "44 images are five full batches of 8"
    for index, terms in enumerate(event.losses):
        for name, value in terms.items():
            assert value == pytest.approx(np.mean([found[index][name] for found, _ in seen]), rel=1e-6)
    assert event.train_accuracy == sum(right for _, right in seen) / 40
    assert trainer.position.num_images == 40
    assert trainer.position.last_losses == list(event.losses)


def test_learning_rates_move_with_every_batch(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, rates = make(folder, epochs=2), []
    step = LocalLearner.step_on

    def kept(self: LocalLearner, batch: LocalBatch) -> StepResult:
        rates.append([group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups])
        return step(self, batch)

    monkeypatch.setattr(LocalLearner, "step_on", kept)
    trainer.fit()
    assert all(len(set(row)) == 1 for row in rates), "all modules stand at the same place in time"
    expected = [5e-3 * 0.5 * (1 + np.cos(np.pi * batch / 10)) for batch in range(10)]
    assert [row[0] for row in rates] == pytest.approx(expected)


def test_progress_is_told_about_once_a_second(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localgrad.training.trainer.SECONDS_BETWEEN_READINGS", 0.0)
    trainer = make(folder, epochs=1)
    trainer.fit()
    told = events_of(trainer, Progressed)
    assert [event.batch for event in told] == [1, 2, 3, 4, 5]
    assert all(len(event.losses) == 2 and event.images_per_second > 0 for event in told)


def test_evaluation_counts_like_anybody(folder: RunFolder) -> None:
    trainer = make(folder, modules=2, epochs=10)
    trainer.fit()
    learner, batches = trainer.learner, batches_of(20, training=False)
    accuracy, by_module = evaluate(learner, batches)
    learner.eval()
    right = [0, 0]
    with torch.no_grad():
        for batch in batches.epoch(0):
            for index, logits in enumerate(learner.logits(batch.images)):
                assert logits is not None
                right[index] += int((logits.argmax(1) == batch.targets).sum())
    assert by_module == pytest.approx([count / 20 for count in right])
    assert accuracy == by_module[-1]
    assert accuracy > 0.8, "three shades of grey can be learned"


def test_the_first_of_equally_good_epochs_is_kept(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr(
        "localgrad.training.trainer.evaluate", lambda learner, _: (value := next(accuracies), [None, value])
    )
    trainer = make(folder, epochs=4)
    best: dict[str, torch.Tensor] = {}
    after_step(monkeypatch, 10, lambda learner: best.update({k: v.clone() for k, v in best_weights(learner).items()}))
    trainer.fit()
    assert (trainer.position.best_epoch, trainer.position.best_accuracy) == (1, 0.75)
    assert [event.is_best for event in events_of(trainer, EpochEnded)] == [True, True, False, False]
    trainer.load_best()
    assert all(torch.equal(value, best[name]) for name, value in best_weights(trainer.learner).items())


def test_best_weights_of_another_partition_are_refused(folder: RunFolder, tmp_path: Path) -> None:
    weights = best_weights(make(folder, modules=1).learner)
    with pytest.raises(CheckpointError, match="of another model"):
        load_best_weights(make(folder, modules=2).learner, weights)


# ------------------------------------------------------------------------------------- divergence


def step_result(*losses: float, targets: Sequence[int] = (0, 1, 2)) -> StepResult:
    terms = tuple({"task": torch.tensor(loss)} for loss in losses)
    nobodys = (None,) * len(losses)
    return StepResult(torch.eye(3), tuple(term["task"] for term in terms), terms, nobodys, torch.tensor(targets))


def test_the_first_loss_that_is_not_finite_is_named() -> None:
    sums = EpochSums([(0, "task"), (1, "task")], torch.device("cpu"))
    for losses in ((1.0, 2.0), (3.0, float("inf")), (float("nan"), float("nan")), (1.0, 1.0)):
        sums.add(step_result(*losses))
    assert sums.first_failure() == (1, [(1, "task")])
    good = EpochSums([(0, "task"), (1, "task")], torch.device("cpu"))
    good.add(step_result(1.0, 2.0, targets=[0, 1, 0]))
    good.add(step_result(3.0, 5.0, targets=[0, 0, 0]))
    assert good.first_failure() is None
    assert good.means(2) == [{"task": 2.0}, {"task": 3.5}]
    mixed = EpochSums([(0, "task"), (1, "task"), (1, "transport")], torch.device("cpu"))
    local = step_result(1.0, 2.0)
    local.terms[1]["transport"] = torch.tensor(0.5)
    globally = step_result(4.0)  # the last module's, whose penalty is no part of an end-to-end step
    globally.terms[0]["transport"] = torch.tensor(0.0)
    mixed.add(local)
    mixed.add(globally)
    assert mixed.means(2) == [{"task": 1.0}, {"task": 3.0, "transport": 0.5}]
    again = EpochSums([(0, "task"), (1, "task")], torch.device("cpu"))
    again.load_state_dict(good.state_dict())
    assert again.means(2) == good.means(2)
    assert (int(again.num_correct), again.num_batches, again.num_images) == (3, 2, 6)


def break_weights(learner: LocalLearner) -> None:
    with torch.no_grad():
        next(learner.modules[1].parameters()).fill_(float("nan"))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (7, r"the loss of local module 1 .*\(term 'task', epoch 2, batch 3\)"),
        (10, r"the weights of local module 1 .* by an update of term 'task', epoch 2, batch 5\)"),
    ],
    ids=["in-the-middle", "by-the-last-update-of-an-epoch"],
)
def test_a_run_that_diverges_keeps_the_last_good_checkpoint(
    step: int, words: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(folder)
    after_step(monkeypatch, step, break_weights)
    with pytest.raises(DivergenceError, match=words + r"; the last good checkpoint is .*last\.pt\. Try a lower lr"):
        trainer.fit()
    state = folder.load_last()
    assert state["position"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["learner"]["model"].values())
    make(folder).load_state_dict(state)


def test_a_run_that_diverges_at_once_says_that_nothing_is_kept(folder: RunFolder, monkeypatch: Any) -> None:
    trainer = make(folder)
    after_step(monkeypatch, 1, break_weights)
    with pytest.raises(DivergenceError, match="no epoch was complete"):
        trainer.fit()
    assert not folder.last.exists()


def test_an_interrupted_run_that_has_diverged_is_not_saved(folder: RunFolder, monkeypatch: Any) -> None:
    def both(learner: LocalLearner) -> None:
        break_weights(learner)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = make(folder)
    after_step(monkeypatch, 8, both)
    with pytest.raises(DivergenceError):
        trainer.fit()
    assert folder.load_last()["position"]["epoch"] == 1


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_batch_and_saves(number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    trainer = make(folder)
    after_step(monkeypatch, 8, lambda _: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stop:
        trainer.fit()
    assert stop.value.signal_number == number
    assert stop.value.folder == folder.path
    position = folder.load_last()["position"]
    assert (position["epoch"], position["batch"], position["num_images"]) == (1, 3, 64)
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_second_ctrl_c_stops_at_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_: LocalLearner) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = make(folder)
    after_step(monkeypatch, 8, twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert folder.load_last()["position"]["epoch"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_in_another_thread_leaves_signals_alone(folder: RunFolder) -> None:
    trainer = make(folder, epochs=1)
    failures = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert failures == []
    assert trainer.position.epoch == 1


# ------------------------------------------------------------------------------------- state


def test_all_random_states_come_back(folder: RunFolder) -> None:
    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    np.random.randn()  # leaves a second normal number cached
    random.gauss(0, 1)
    folder.save_last({"random": all_random_states()})
    expected = draw()
    draw()
    _restore_random_state(folder.load_last()["random"])
    assert draw() == expected


def test_a_state_is_taken_up_whole(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(folder, ema_decay=0.9)
    after_step(monkeypatch, 8, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        trainer.fit()
    other = make(folder, ema_decay=0.9)
    other.load_state_dict(folder.load_last())
    folder.save_last(trainer.state_dict())
    first = folder.last.read_bytes()
    folder.save_last(other.state_dict())
    assert folder.last.read_bytes() == first
