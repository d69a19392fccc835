"""Remedies of a schedule: end-to-end steps among local ones, freezing, rates that go with depth."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import (
    SIZE,
    adamw,
    assert_same,
    batches,
    copied,
    make,
    make_learner,
    profiler_peak,
)
from localgrad import GreedySupervised, LocalLearner
from localgrad.app.build import optimizers_of
from localgrad.app.recipe import TrainingSettings
from localgrad.compare.measuring import resident_bytes
from localgrad.errors import RecipeError
from localgrad.estimating import estimate_step
from localgrad.objectives.carried import LocalBatch
from localgrad.partition import Checkpointing
from localgrad.training.optim import OptimizerFactory, Schedule


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train_globally(learner: LocalLearner, count: int = 3) -> list[Any]:
    torch.manual_seed(7)
    return [learner.global_step_on(LocalBatch(images, labels)) for images, labels in batches(count)]


# End-to-end steps ------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(("clip", "overlap"), [(None, 0), (0.5, 0), (0.5, 1)])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_global_steps_are_end_to_end_training(kind: str, clip: float | None, overlap: int) -> None:
    model = make(kind, drop_path_rate=0.2)
    twin = copy.deepcopy(model).train()
    learner = make_learner(model, objective=GreedySupervised(label_smoothing=0.1), clip_grad=clip, overlap=overlap)
    before = [copied(module.objective) for module in learner.modules]
    results = train_globally(learner)
    # Overlap: blocks that two modules train are updated by their first.
    mine, taken, optimizers = dict(twin.named_parameters()), set(), []
    names = {id(weight): name for name, weight in model.named_parameters()}
    for index in range(3):
        listed = [names[id(p)] for p in learner.parameters(index) if id(p) in names]
        own = [name for name in listed if name not in taken]
        taken.update(own)
        optimizers.append(adamw([mine[name] for name in own]))
    assert taken == mine.keys()
    torch.manual_seed(7)
    for (images, labels), result in zip(batches(3), results, strict=True):
        logits = twin(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(twin.parameters(), clip)
            assert norm > clip
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(result.logits, logits.detach())
        assert torch.equal(result.losses[0], loss.detach())
        assert result.terms == ({}, {}, {"task": result.losses[0]})
        assert [logits is None for logits in result.module_logits] == [True, True, False]
    for name, value in copied(twin).items():
        assert torch.equal(copied(model)[name], value), name
    for module, objective in zip(learner.modules, before, strict=True):
        assert_same(copied(module.objective), objective)
    assert learner.num_steps == 3


@pytest.mark.heavy
def test_levels_of_checkpointing_agree_in_global_steps() -> None:
    found = {}
    for how in ("none", "blocks", "halves", "halves/2", "blocks/2"):
        learner = make_learner(make(drop_path_rate=0.2), optimizer=sgd, global_checkpoint=how)
        train_globally(learner)
        found[how] = copied(learner.model)
    for how in ("blocks", "halves"):
        assert_same(found[how], found["none"])
    for how in ("halves/2", "blocks/2"):
        for name, value in found[how].items():
            torch.testing.assert_close(value, found["none"][name], rtol=1e-4, atol=1e-6)


def test_global_steps_may_be_cut_in_parts() -> None:
    found = []
    for accumulation in (1, 2):
        learner = make_learner(optimizer=sgd, accumulation=accumulation, clip_grad=0.5)
        results = train_globally(learner)
        found.append((copied(learner.model), results[-1]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1][1].logits, found[0][1].logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1][1].losses, found[0][1].losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_loss_scale_changes_nothing_in_global_steps(clip: float | None, overlap: int) -> None:
    found = []
    for scale in (1.0, 256.0):  # powers of two: exact
        learner = make_learner(optimizer=sgd, clip_grad=clip, overlap=overlap)
        assert learner._executor is not None
        learner._executor.steps[-1].scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        train_globally(learner)
        found.append(copied(learner.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


def test_a_global_step_in_fp16_trains() -> None:
    learner = make_learner(precision="fp16", clip_grad=1.0, overlap=1)
    before = copied(learner.model)
    train_globally(learner, 1)
    assert learner.state_dict()["scalers"][-1]["scale"] == 65536.0
    after = copied(learner.model)
    assert not [name for name in after if torch.equal(after[name], before[name])]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_holds_back_all_modules(bad: float, clip: float | None) -> None:
    learner = make_learner(clip_grad=clip)
    assert learner._executor is not None
    scaler = learner._executor.steps[-1].scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train_globally(learner, 1)
    before = copied(learner.model)
    handle = learner.backbone.blocks[0].attn.qkv.weight.register_hook(  # type: ignore[union-attr]
        lambda gradient: torch.full_like(gradient, bad)
    )
    train_globally(learner, 1)
    handle.remove()
    assert_same(copied(learner.model), before)
    assert all(p.grad is None for module in learner.modules for p in module.parameters())
    assert scaler.get_scale() == 512.0
    train_globally(learner, 1)
    after = copied(learner.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not [name for name in after if torch.equal(after[name], before[name])]


def test_local_and_global_steps_share_state_and_resume_bit_for_bit() -> None:
    def mixed(learner: LocalLearner) -> None:
        torch.manual_seed(3)
        for number, (images, labels) in enumerate(batches(4)):
            batch = LocalBatch(images, labels)
            (learner.global_step_on if number % 2 else learner.step_on)(batch)

    learners = [make_learner(make(drop_path_rate=0.2), ema_decay=0.9) for _ in range(2)]
    mixed(learners[0])
    learners[1].load_state_dict(copy.deepcopy(learners[0].state_dict()))
    for learner in learners:
        mixed(learner)
    assert_same(learners[1].state_dict(), learners[0].state_dict())
    assert learners[0].num_steps == 8


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("vit", {}),
        ("swin", {"precision": "bf16"}),
        ("vit", {"overlap": 1, "global_checkpoint": "halves"}),
        ("vit", {"global_checkpoint": "none", "accumulation": 2}),
    ],
    ids=str,
)
def test_the_memory_of_a_global_step_is_foreseen(kind: str, more: dict[str, Any]) -> None:
    wide = {"embed_dim": 96, "num_heads": 3} if kind == "vit" else {"embed_dim": 48, "depths": (2, 2)}
    extra = {"patch_size": 4} if kind == "vit" else {"patch_size": 2, "num_heads": (2, 4)}
    learner = make_learner(make(kind, **wide, **extra), 2, **more)
    estimated = estimate_step(learner, 8, adamw, globally=True).peak_bytes
    labels = torch.arange(8) % 5
    learner.step_on(LocalBatch(torch.rand(8, *SIZE), labels))  # all optimizer state
    rise = profiler_peak(lambda: learner.global_step_on(LocalBatch(torch.rand(8, *SIZE), labels)))
    measured = resident_bytes([*learner.modules, *learner.optimizers, labels]) + rise
    assert estimated == pytest.approx(measured, rel=0.05)


def test_new_optimizers_are_those_of_global_steps_too() -> None:
    learner = make_learner(optimizer=sgd)
    train_globally(learner, 1)
    learner.configure_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    before = copied(learner.model)
    train_globally(learner, 1)
    assert_same(copied(learner.model), before)


def test_global_steps_are_refused_without_optimizers_or_with_offloading() -> None:
    images, labels = batches(1)[0]
    with pytest.raises(RecipeError, match="no optimizers yet"):
        LocalLearner(make(), input_size=SIZE).global_step_on(LocalBatch(images, labels))
    with pytest.raises(RecipeError, match="leave offload out"):
        make_learner(offload=True).global_step_on(LocalBatch(images, labels))


# Freezing --------------------------------------------------------------------------------------------------------


def test_modules_freeze_one_after_another() -> None:
    learner = make_learner(make(drop_path_rate=0.2), modules=4, freeze_from=0.4, ema_decay=0.9)
    frozen = []
    for progress in (0.0, 0.39, 0.4, 0.59, 0.6, 0.79, 0.8, 0.99):
        learner.at(progress)
        before = [copied(module) for module in learner.modules]
        result = learner.step(*batches(1)[0])
        same = [
            all(torch.equal(old[k], v) for k, v in copied(m).items())
            for old, m in zip(before, learner.modules, strict=True)
        ]
        moved = [
            not any(torch.equal(old[k], v) for k, v in copied(m).items())
            for old, m in zip(before, learner.modules, strict=True)
        ]
        assert [not still for still in same] == moved
        assert len(result.losses) == 4
        assert all(torch.isfinite(loss) for loss in result.losses)
        frozen.append(sum(same))
    assert frozen == [0, 0, 1, 1, 2, 2, 3, 3]  # from 0.4 on one each fifth; the last never


def test_a_frozen_module_gives_the_same_features() -> None:
    learner = make_learner(modules=[2], freeze_from=0.0)
    images, labels = batches(1)[0]
    with torch.no_grad():
        expected = learner.model.train()(images)
    learner.at(0.0)
    assert torch.equal(learner.step(images, labels).logits, expected)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_bad_share_of_freezing_is_refused(share: float) -> None:
    with pytest.raises(RecipeError, match="freeze_from must be a share"):
        make_learner(freeze_from=share)


# Rates by depth, and which steps are end to end ------------------------------------------------------------------


def test_rates_and_decays_go_with_depth() -> None:
    settings = TrainingSettings(lr=0.01, weight_decay=0.1, lr_depth=(0.5, 2.0), weight_decay_depth=(0.0, 1.0))
    model = make()
    learner = make_learner(model, modules=4, optimizer=optimizers_of(settings, model, 4))
    assert [optimizer.param_groups[0]["lr"] for optimizer in learner.optimizers] == [0.005, 0.01, 0.015, 0.02]
    decays = [sorted({group["weight_decay"] for group in o.param_groups}) for o in learner.optimizers]
    assert decays == [[0.0], [0.0, pytest.approx(0.1 / 3)], [0.0, pytest.approx(0.2 / 3)], [0.0, 0.1]]
    assert isinstance(optimizers_of(TrainingSettings(), model, 4), OptimizerFactory)
    with pytest.raises(RecipeError, match="2 optimizer factories were given for 3 local modules"):
        make_learner(optimizer=[adamw, adamw])


def test_warm_ups_are_staggered() -> None:
    learner = make_learner(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    schedule = Schedule(
        learner.optimizers,
        name="none",
        epochs=20,
        batches_per_epoch=10,
        warmup_epochs=2,
        warmup_lr=0.0,
        min_lr=0.0,
        warmup_stagger=1.0,
    )
    schedule.at(10)
    assert [o.param_groups[0]["lr"] for o in learner.optimizers] == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    schedule.at(40)
    assert [o.param_groups[0]["lr"] for o in learner.optimizers] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("every", "tail", "expected"),
    [
        (None, 0.0, []),
        (3, 0.0, [2, 5, 8]),
        (None, 0.2, [8, 9]),
        (4, 0.25, [3, 7, 8, 9]),  # round(7.5) is 8
        (1, 0.0, list(range(10))),
    ],
)
def test_which_steps_are_end_to_end(every: int | None, tail: float, expected: list[int]) -> None:
    settings = TrainingSettings(global_every=every, global_tail=tail)
    assert [step for step in range(10) if settings.is_global(step, 10)] == expected
    assert settings.has_global_steps == bool(expected)


# What a review found -----------------------------------------------------------------------------------------------


def test_a_frozen_module_runs_in_parts_too() -> None:
    learner = make_learner(accumulation=2, freeze_from=0.5)
    sizes: list[int] = []
    learner.modules[0].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    (images, labels), *_ = batches(1)
    for progress in (0.0, 0.9):
        learner.at(progress)
        learner.step(images, labels)
    assert sizes == [len(images) // 2] * 4


def test_a_frozen_modules_gradients_are_not_clipped_with_the_others() -> None:
    ours, theirs = (make_learner(clip_grad=1e-3, freeze_from=0.5, optimizer=sgd) for _ in range(2))
    ours.at(0.99)  # the first two are frozen
    for step in theirs._executor.steps[:2]:  # type: ignore[union-attr]
        step.frozen = True
        for weight in step.parameters:
            weight.requires_grad_(False)
    for learner in (ours, theirs):
        train_globally(learner, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


def test_replanning_reaches_end_to_end_steps() -> None:
    learner = make_learner(global_checkpoint="none")
    asked: list[int] = []
    (images, labels), *_ = batches(1)
    learner.global_step_on(LocalBatch(images, labels))
    own = type(learner.modules[0]).own
    failing = iter([True, False])

    def recover(index: int) -> bool:
        asked.append(index)
        learner.run_as(dataclasses.replace(learner.plan, global_checkpoint=Checkpointing("blocks")))
        return True

    def short(self: Any, inputs: Tensor, recomputed: Any) -> Tensor:
        if self is learner.modules[-1] and next(failing, False):
            raise torch.OutOfMemoryError("CUDA out of memory: a test")
        return own(self, inputs, recomputed)

    learner.on_out_of_memory(recover)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(learner.modules[0]), "own", short)
        learner.global_step_on(LocalBatch(images, labels))
    assert asked == [len(learner.modules)]
    assert str(learner.global_checkpoint) == "blocks"


def test_overlap_and_freezing_are_refused_together() -> None:
    with pytest.raises(RecipeError, match="overlap"):
        make_learner(overlap=1, freeze_from=0.5)
