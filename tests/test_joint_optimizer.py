"""``learner.optimizer``: all modules' optimizers as one, for schedulers and frameworks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from helpers import adamw, assert_same, batches, copied, make, make_backbone, make_learner, train
from localgrad.errors import CheckpointError, RecipeError
from localgrad.learner import LocalLearner
from localgrad.step.joint_optimizer import JointOptimizer

DATA = batches(4)
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
    "warmup": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=4),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10),
    "chained": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[2],
    ),
}


def grouped(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Two groups of other learning rates, which schedulers keep apart."""
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 3e-3, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_what_is_trained_by_a_scheduler_of_all_is_what_one_for_each_trains(kind: str) -> None:
    one, each = make_learner(optimizer=grouped), make_learner(optimizer=grouped)
    ours = SCHEDULERS[kind](one.optimizer)
    theirs = [SCHEDULERS[kind](optimizer) for optimizer in each.optimizers]
    for images, labels in DATA:
        one.step(images, labels)
        one.optimizer.step()
        ours.step()
        each.step(images, labels)
        for scheduler in theirs:
            scheduler.step()
        rates = [group["lr"] for optimizer in each.optimizers for group in optimizer.param_groups]
        assert [group["lr"] for group in one.optimizer.param_groups] == rates == ours.get_last_lr()
        assert len(set(rates)) == (1 if kind == "one cycle" else 2)
    assert_same(copied(one.model), copied(each.model))


def by_decay(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """A factor of its own for each group."""
    factors = [0.9 if group["weight_decay"] else 0.5 for group in optimizer.param_groups]
    return lr_scheduler.LambdaLR(optimizer, [lambda step, factor=factor: factor**step for factor in factors])


def timms(name: str, **more: Any) -> Callable[[torch.optim.Optimizer], Any]:
    """One that timm's loop calls after each update with its number, and after each epoch.

    Its plateau, which is torch's, isn't among them: it is on its way out, and says that it doesn't resume.
    """
    options = {"num_epochs": 4, "updates_per_epoch": 3, "step_on_epochs": False, "warmup_epochs": 1, "decay_epochs": 1}
    return lambda optimizer: create_scheduler_v2(optimizer, sched=name, **(options | more))[0]


ALL: dict[str, Callable[[torch.optim.Optimizer], Any]] = SCHEDULERS | {
    "by group": by_decay,
    "multiplicative": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "multistep": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5]),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=7, power=2.0),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, step_size_up=3),
    "at once": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "averaging": lambda optimizer: SWALR(optimizer, swa_lr=1e-4, anneal_epochs=4),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1),
    "timm's cosine": timms("cosine", warmup_lr=1e-5, noise=(0.2, 0.9)),
    "timm's tanh": timms("tanh"),
    "timm's step": timms("step"),
    "timm's multistep": timms("multistep", decay_milestones=(2, 3)),
    "timm's poly": timms("poly"),
    "timm's wsd": timms("wsd"),
}


def several() -> list[torch.optim.Optimizer]:
    """Two modules' own, of two groups each; the second with timm's factor on the learning rate."""
    made = [grouped([nn.Parameter(torch.zeros(2)) for _ in range(4)]) for _ in range(2)]
    for optimizer in made:
        optimizer.param_groups[1]["lr_scale"] = 0.5
    return made


def advance(scheduler: Any, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """As a loop does: after each update, or with an epoch's number and its metric."""
    for number in numbers:
        optimizer.step()
        if hasattr(scheduler, "step_update"):
            scheduler.step_update(number)
            scheduler.step(number, 1.0)
        else:
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


@pytest.mark.parametrize("kind", ALL)
def test_every_scheduler_of_torch_and_timm_writes_what_one_for_each_writes_and_goes_on(kind: str) -> None:
    """Rates, momenta and what else a group keeps; also by another one that took up its state half way."""
    each, joint = several(), JointOptimizer(several())
    for optimizer in each:
        advance(ALL[kind](optimizer), optimizer, range(1, 10))
    expected = settings([group for optimizer in each for group in optimizer.param_groups])
    scheduler = ALL[kind](joint)
    begun = settings(joint.param_groups)
    advance(scheduler, joint, range(1, 6))
    again = JointOptimizer(several())
    resumed = ALL[kind](again)
    again.load_state_dict(copy.deepcopy(joint.state_dict()))
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for one, optimizer in ((scheduler, joint), (resumed, again)):
        advance(one, optimizer, range(6, 10))
        assert settings(optimizer.param_groups) == expected
    assert settings(joint.param_groups) != begun


def test_its_groups_and_states_are_the_modules_own() -> None:
    learner = make_learner()
    train(learner, DATA[:1])
    joint = learner.optimizer
    assert joint is learner.optimizer
    assert isinstance(joint, torch.optim.Optimizer)
    own = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    assert all(mine is theirs for mine, theirs in zip(joint.param_groups, own, strict=True))
    weight = learner.parameters(2)[0]
    assert joint.state[weight] is learner.optimizers[2].state[weight]
    assert sum(len(group["params"]) for group in joint.param_groups) == len(joint.state)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RecipeError, match=r"gradients of another backward pass.* call learner\.step\(batch\)"):
        joint.step()
    joint.zero_grad()
    assert weight.grad is None
    before = copied(learner.model)
    joint.step()
    assert_same(copied(learner.model), before)
    assert str(joint).splitlines() == ["JointOptimizer(", "  0: AdamW", "  1: AdamW", "  2: AdamW", ")"]


def test_its_state_goes_to_another_learner_and_training_goes_on_the_same() -> None:
    one = make_learner(optimizer=grouped)
    scheduler = SCHEDULERS["cosine"](one.optimizer)
    for batch in DATA[:2]:
        one.step(*batch)
        one.optimizer.step()
    scheduler.step()
    state = copy.deepcopy(one.optimizer.state_dict())
    other = LocalLearner(make_backbone(), modules=3)
    other.configure_optimizers(grouped)
    other.model.load_state_dict(one.model.state_dict())
    for mine, theirs in zip(other.modules, one.modules, strict=True):
        mine.objective.load_state_dict(theirs.objective.state_dict())
    other.optimizer.load_state_dict(state)
    other.num_steps = one.num_steps
    for images, labels in DATA[2:]:
        assert_same(other.step(images, labels).losses, one.step(images, labels).losses)
    assert_same(other.state_dict(), one.state_dict())


def test_a_state_of_other_modules_is_refused_and_changes_nothing() -> None:
    state = make_learner(modules=2).optimizer.state_dict()
    learner = make_learner()
    train(learner, DATA[:1])
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(CheckpointError, match="of these local modules"):
        learner.optimizer.load_state_dict(state)
    torn = learner.optimizer.state_dict()
    torn["param_groups"][2]["local_module"] = 0
    with pytest.raises(CheckpointError, match="of these local modules"):
        learner.optimizer.load_state_dict(torn)
    assert_same(learner.state_dict(), before)


def test_schedulers_of_momentum_see_what_all_have() -> None:
    learner = make_learner(optimizer=[adamw, adamw, lambda params: torch.optim.SGD(params, lr=0.1)])
    assert "lr" in learner.optimizer.defaults
    assert "betas" not in learner.optimizer.defaults
    with pytest.raises(ValueError, match="momentum"):
        SCHEDULERS["one cycle"](learner.optimizer)


def test_what_it_can_not_do_is_refused_in_a_line() -> None:
    learner = LocalLearner(make_backbone(), modules=2)
    with pytest.raises(RecipeError, match="no optimizers yet"):
        _ = learner.optimizer
    learner.configure_optimizers(adamw)
    with pytest.raises(RecipeError, match="a closure has no part in it"):
        learner.optimizer.step(lambda: 0.0)
    with pytest.raises(RecipeError, match=r"learner\.optimizers\[index\]"):
        learner.optimizer.add_param_group({"params": []})


def test_a_loop_that_means_something_else_by_a_step_is_refused() -> None:
    """Several batches to an update, which each made one; a loss scale of the loop's own, that no gradient has."""
    learner = make_learner()
    joint = learner.optimizer
    for images, labels in DATA[:2]:
        learner.step(images, labels)
    with pytest.raises(RecipeError, match=r"has made 2 updates since the last one.*accumulation=2"):
        joint.step()
    learner.step(*DATA[0])
    learner.load_state_dict(copy.deepcopy(learner.state_dict()))
    learner.step(*DATA[0])
    joint.step()
    learner.step_parts([DATA[0], DATA[1]])
    joint.step()
    for unscales in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(1, requires_grad=True).sum()).backward()
        if unscales:
            scaler.unscale_(joint)
        with pytest.raises(RecipeError, match=r"a GradScaler called it.*precision='fp16'"):
            scaler.step(joint)
        joint.step()
    torch.amp.GradScaler("cpu", enabled=False).step(joint)


def test_a_scheduler_of_optimizers_that_were_replaced_is_noticed() -> None:
    learner = make_learner()
    scheduler = SCHEDULERS["cosine"](learner.optimizer)
    learner.configure_optimizers(adamw)
    train(learner, DATA[:1])
    scheduler.optimizer.step()
    scheduler.step()
    with pytest.raises(RecipeError, match=r"CosineAnnealingLR\(learner\.optimizer, T_max=100\)"):
        learner.step(*DATA[1])


def test_a_copy_of_a_learner_has_one_of_its_own() -> None:
    learner = make_learner()
    SCHEDULERS["cosine"](learner.optimizer)
    twin = copy.deepcopy(learner)
    assert twin.optimizer.param_groups[0] is twin.optimizers[0].param_groups[0]
    assert twin.optimizer.param_groups[0] is not learner.optimizer.param_groups[0]
    train(twin, DATA[:1])
    twin.optimizer.step()


def test_accelerate_takes_it_and_its_scheduler() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, learner = make_learner(), make_learner()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare(learner.optimizer)
    scheduler = accelerator.prepare(SCHEDULERS["cosine"](optimizer))
    reference = SCHEDULERS["cosine"](plain.optimizer)
    for images, labels in DATA:
        learner.step(images, labels)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        plain.step(images, labels)
        plain.optimizer.step()
        reference.step()
        assert [group["lr"] for group in learner.optimizer.param_groups] == reference.get_last_lr()
    assert not optimizer.step_was_skipped
    assert_same(learner.state_dict(), plain.state_dict())


class _Modal(torch.optim.AdamW):
    """With modes, as schedule-free optimizers have them."""

    mode = ""

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_modes_are_passed_on_to_the_modules_that_have_them() -> None:
    """Accelerate and others look for them by ``hasattr``, and do nothing where they aren't."""
    learner = make_learner(optimizer=[adamw, _Modal, _Modal])
    for name in ("eval", "train"):
        getattr(copy.copy(learner.optimizer), name)()
        assert [getattr(optimizer, "mode", None) for optimizer in learner.optimizers] == [None, name, name]
    assert not any(hasattr(make_learner().optimizer, name) for name in ("train", "eval", "sync_lookahead"))


def test_timms_lookahead_is_synced_as_in_a_loop_of_its_own() -> None:
    """It passes over weights without a gradient, as all are here after a step; frozen ones stay as they are."""
    options = {"opt": "lookahead_sgd", "lr": 0.1}
    learner, model = make_learner(modules=1, optimizer=lambda params: create_optimizer_v2(params, **options)), make()
    optimizer = create_optimizer_v2(list(model.parameters()), **options)
    for images, labels in DATA[:2]:
        learner.step(images, labels)
        learner.optimizer.step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for each in (learner, optimizer):
        getattr(each, "optimizer", each).sync_lookahead()
    assert_same(copied(learner.model), copied(model))
    assert all(weight.grad is None for weight in learner.model.parameters())


def test_norms_of_gradients_are_those_before_clipping() -> None:
    learner, free = make_learner(clip_grad=0.01, freeze_from=0.5), make_learner()
    assert free.gradient_norms == (None,) * 3
    norms: list[torch.Tensor] = []
    for number, parameters in enumerate(map(learner.parameters, range(3))):
        learner.optimizers[number].register_step_pre_hook(
            lambda *_, own=parameters: norms.append(torch.cat([w.grad.flatten() for w in own if w.grad is not None]))
        )
    learner.step(*DATA[0])
    free.step(*DATA[0])
    assert free.gradient_norms == (None,) * 3
    for norm, clipped in zip(learner.gradient_norms, norms, strict=True):
        assert norm is not None
        assert norm > 0.02
        torch.testing.assert_close(clipped.norm(), torch.tensor(0.01), rtol=1e-3, atol=0)
    learner.at(0.6)
    learner.step(*DATA[1])
    assert [norm is None for norm in learner.gradient_norms] == [True, False, False]


# Batches that come in parts -----------------------------------------------------------------------------------------


def test_a_batch_in_parts_trains_as_one_that_is_cut() -> None:
    """Equal parts: the very same; of other sizes, and labels that don't count, within rounding."""
    (images, labels), *_ = batches(1, 8)
    labels[[0, 5]] = -100
    cut, given, whole = (make_learner(accumulation=count) for count in (2, 1, 1))
    once = cut.step(images, labels)
    parts = given.step_parts([(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert_same(copied(given.model), copied(cut.model))
    summed = [sum(part.losses[index] for part in parts) for index in range(3)]
    torch.testing.assert_close(tuple(summed), once.losses)
    assert torch.equal(torch.cat([part.logits for part in parts if part.logits is not None]), once.logits)
    silent = make_learner()
    results = silent.step_parts([(images[:4], labels[:4]), (images[4:], labels[4:])], logits=False)
    assert all(result.logits is None and result.module_logits == (None,) * 3 for result in results)
    assert_same([result.losses for result in results], [part.losses for part in parts])
    assert_same(copied(silent.model), copied(cut.model))
    uneven = make_learner(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    whole.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
    uneven.step_parts([(images[:1], labels[:1]), (images[1:], labels[1:])])
    whole.step(images, labels)
    torch.testing.assert_close(copied(uneven.model), copied(whole.model), rtol=1e-4, atol=1e-6)


def test_parts_are_refused_where_there_are_none_or_they_are_to_be_cut() -> None:
    with pytest.raises(RecipeError, match="step_parts: got 0 parts"):
        make_learner().step_parts([])
    with pytest.raises(RecipeError, match="accumulation=1"):
        make_learner(accumulation=2).step_parts([DATA[0]])
