"""Saved states: loaded as a whole or not at all, copied, and refused with the difference where they don't fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers import adamw, assert_same, batches, make, make_learner, train
from localgrad import Contrastive, FeatureReconstruction, GreedySupervised, LocalLearner
from localgrad.errors import CheckpointError
from localgrad.step.states import check_optimizer_state, describe

OLD = ("objective", "optimizer_classes")
"""What checkpoints of before have not."""


def trained(**more: Any) -> tuple[LocalLearner, dict[str, Any]]:
    """A learner, and its state from two steps on."""
    learner = make_learner(**more)
    train(learner, batches(2))
    return learner, copy.deepcopy(learner.state_dict())


def without(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def test_two_learners_share_no_tensor() -> None:
    first, _ = trained(ema_decay=0.9)
    second = make_learner(ema_decay=0.9)
    state = first.state_dict()
    second.load_state_dict(state)
    assert_same(second.state_dict(), state)

    def memory(learner: LocalLearner) -> set[int]:
        leaves = _tensors(learner.state_dict())
        return {leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.numel()}

    assert not memory(first) & memory(second)
    before = copy.deepcopy(first.state_dict())
    train(second, batches(2))
    assert_same(first.state_dict(), before)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in _tensors(inner)]
    if isinstance(value, (list, tuple)):
        return [leaf for inner in value for leaf in _tensors(inner)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_a_state_of_before_still_loads() -> None:
    learner, state = trained(ema_decay=0.9)
    other = make_learner(ema_decay=0.9)
    other.load_state_dict(without(state, *OLD))
    assert_same(other.state_dict(), learner.state_dict())


def spoil_shape(state: dict[str, Any]) -> None:
    slots = state["optimizers"][2]["state"]
    slots[len(slots) - 1]["exp_avg"] = torch.zeros(7, 3)


def spoil_groups(state: dict[str, Any]) -> None:
    state["optimizers"][1]["param_groups"][0]["params"].pop()


def spoil_slots(state: dict[str, Any]) -> None:
    del state["optimizers"][1]["state"][0]["exp_avg_sq"]


SPOILT: dict[str, tuple[Any, str]] = {
    "a slot of moments": (
        spoil_slots,
        r"optimizer of local module 1 has no exp_avg_sq for [\w.]+, and has it for others",
    ),
    "a shape of moments": (spoil_shape, r"optimizer of local module 2 has exp_avg of shape \[7, 3\] for a parameter"),
    "groups": (spoil_groups, r"optimizer of local module 1 has groups of \[\d+\] parameters, this learner's of"),
    "an optimizer": (lambda s: s["optimizers"].__setitem__(2, {}), "local module 2 has no state or param_groups"),
    "a missing optimizer": (lambda s: s["optimizers"].pop(), "has boundaries .* and 2 optimizers"),
    "a missing objective": (lambda s: s["objectives"].pop(), "2 objectives and 3 scalers for 3 local modules"),
    "a missing scaler": (lambda s: s["scalers"].pop(), "3 objectives and 2 scalers"),
    "an average's weight": (lambda s: s["averaged_model"].pop("head.bias"), "1 weights are missing .head.bias"),
    "no tensor": (lambda s: s["model"].__setitem__("head.bias", [0.0]), "head.bias is a list, not a tensor"),
    "the last auxiliary net": (lambda s: s["objectives"][1].popitem(), "1 weights are missing"),
    **{key: (lambda s, key=key: s.pop(key), f"it has no {key}; give what") for key in ("model", "seed", "num_steps")},
}


def test_a_spoilt_state_changes_nothing() -> None:
    _, state = trained(ema_decay=0.9)
    learner = make_learner(ema_decay=0.9)
    train(learner, batches(1, 6))
    before = copy.deepcopy(learner.state_dict())
    for spoil, message in SPOILT.values():
        spoilt = copy.deepcopy(state)
        spoil(spoilt)
        with pytest.raises(CheckpointError, match=message):
            learner.load_state_dict(spoilt)
        assert_same(learner.state_dict(), before)


@pytest.mark.filterwarnings("ignore")  # an optimizer's own
def test_what_optimizers_keep_for_one_weight_and_not_for_another_is_whole() -> None:
    """Factors for matrices alone, and the like."""
    from timm.optim import create_optimizer_v2, list_optimizers

    shapes = ((8, 6), (6, 8), (3,), (4, 2, 3, 3), (1, 1, 5), (), (13, 14))
    tried = 0
    for name in list_optimizers():
        if "kron" in name:  # it compiles its step
            continue
        weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        try:
            optimizer = create_optimizer_v2(weights, opt=name, lr=1e-3)
            for _ in range(2):
                for weight in weights[1:]:  # the first one has no gradient
                    weight.grad = torch.randn_like(weight)
                optimizer.step()
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError):  # not for this machine, or these
            continue
        check_optimizer_state(optimizer, optimizer.state_dict(), None, 0, dict)
        tried += 1
    assert tried > 30


def test_what_fails_while_loading_is_undone() -> None:
    """A hook of the user's own, say, after the optimizers were loaded."""
    _, state = trained()
    learner = make_learner()
    train(learner, batches(1, 6))
    before = copy.deepcopy(learner.state_dict())

    def fails(*_: object) -> None:
        raise OSError("no")

    learner.model.register_load_state_dict_pre_hook(fails)
    with pytest.raises(OSError, match="no"):
        learner.load_state_dict(state)
    assert_same(learner.state_dict(), before)


@pytest.mark.parametrize("old", [False, True])
def test_another_optimizer_is_named(old: bool) -> None:
    _, state = trained(optimizer=sgd)
    learner = make_learner()
    before = copy.deepcopy(learner.state_dict())
    message = "it has dampening, maximize.*|was another one" if old else "was SGD, and this learner has AdamW"
    with pytest.raises(CheckpointError, match=f"optimizer of local module 0 {message}"):
        learner.load_state_dict(without(state, *OLD) if old else state)
    assert_same(learner.state_dict(), before)
    _, state = trained(optimizer=[sgd, adamw, adamw])
    with pytest.raises(CheckpointError, match="local module 0 was SGD"):
        learner.load_state_dict(state)


def test_an_optimizer_of_other_groups_is_refused() -> None:
    def grouped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=1e-3)

    _, state = trained(optimizer=grouped)
    with pytest.raises(CheckpointError, match=r"has groups of \[1, \d+\] parameters, this learner's of \[\d+\]"):
        make_learner().load_state_dict(state)


def test_schedulers_and_learning_rates_do_not_make_another_optimizer() -> None:
    learner, _ = trained()
    kept = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in learner.optimizers]
    state = copy.deepcopy(learner.state_dict())
    assert len(kept) == 3
    other = make_learner()
    other.load_state_dict(state)
    train(other, batches(1))


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            FeatureReconstruction(),
            GreedySupervised(),
            r"FeatureReconstruction\(\), this learner has GreedySupervised\(\)",
        ),
        (
            Contrastive(),
            Contrastive(temperature=0.2),
            r"Contrastive\(\), this learner has Contrastive\(temperature=0\.2\)",
        ),
        (GreedySupervised(task_weight=2.0), GreedySupervised(), r"task_weight=2\.0"),
    ],
)
def test_another_objective_is_named(theirs: Any, ours: Any, message: str) -> None:
    _, state = trained(objective=theirs)
    learner = make_learner(objective=ours)
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(CheckpointError, match=message):
        learner.load_state_dict(state)
    assert_same(learner.state_dict(), before)


def test_one_may_go_on_with_other_weights_of_terms() -> None:
    _, state = trained(objective=GreedySupervised(task_weight=2.0))
    del state["objective"]
    make_learner(objective=GreedySupervised()).load_state_dict(state)


def test_an_objective_in_plain_values() -> None:
    """Only what isn't the default: an option that comes later doesn't make old checkpoints another objective's."""
    assert describe(FeatureReconstruction()) == {"name": "FeatureReconstruction", "options": {}}
    objective = GreedySupervised(task_weight=(1, 0.5), classifier_options={"depth": (3, 1)}, over_time={"task": (1, 0)})
    found = describe(objective)
    options = {"task_weight": [1, 0.5], "classifier_options": {"depth": [3, 1]}, "over_time": {"task": [1, 0]}}
    assert found == {"name": "GreedySupervised", "options": options}
    read: dict[str, Any] = options  # as from JSON
    assert found == describe(GreedySupervised(**read))


def test_an_average_is_not_dropped_without_a_word() -> None:
    _, state = trained(ema_decay=0.9)
    learner = make_learner()
    with pytest.raises(CheckpointError, match=r"keeps none; make it with ema_decay, or set state\['averaged_model'\]"):
        learner.load_state_dict(state)
    state["averaged_model"] = None
    learner.load_state_dict(state)
    assert learner.num_steps == 2


def test_fp16_needs_its_loss_scale() -> None:
    _, state = trained()
    with pytest.raises(CheckpointError, match="local module 0 has no loss scale"):
        make_learner(precision="fp16").load_state_dict(state)
    learner, state = trained(precision="fp16")
    other = make_learner(precision="fp16")
    other.load_state_dict(state)
    assert_same(other.state_dict(), learner.state_dict())


def test_extra_state_of_a_module_is_loaded() -> None:
    class Extra(nn.Identity):
        def __init__(self, value: int) -> None:
            super().__init__()
            self.value = value

        def get_extra_state(self) -> Any:
            return self.value

        def set_extra_state(self, state: Any) -> None:
            self.value = state

    made = []
    for value in (1, 2):
        model: Any = make()
        model.blocks[0].drop_path1 = Extra(value)
        made.append(make_learner(model))
    made[1].load_state_dict(made[0].state_dict())
    blocks: Any = made[1].model.get_submodule("blocks.0")
    assert blocks.drop_path1.value == 1


def test_extra_state_of_a_head_or_an_average_is_loaded() -> None:
    class Counting(localgrad.Classifier):
        def __init__(self, source: localgrad.Layout, num_classes: int) -> None:
            super().__init__(source, num_classes)
            self.head = nn.Linear(source.width, num_classes)
            self.seen: Any = torch.zeros(0)

        def forward(self, features: Tensor) -> Tensor:
            self.seen = torch.ones(len(self.seen) + 1)  # of another shape each time
            return self.head(features.mean(dim=1))  # type: ignore[no-any-return]

        def get_extra_state(self) -> Any:
            return self.seen

        def set_extra_state(self, state: Any) -> None:
            self.seen = state

    localgrad.register_classifier("counting", Counting)
    objective = localgrad.GreedySupervised(classifier="counting")
    learner, other = (make_learner(objective=objective, ema_decay=0.9) for _ in range(2))
    train(learner, batches(2))
    other.load_state_dict(learner.state_dict())
    assert_same(other.state_dict(), learner.state_dict())
    assert len(other.modules[0].objective.terms["task"].classifier.seen) == 2  # type: ignore[union-attr, arg-type]
