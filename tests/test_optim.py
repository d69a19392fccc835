"""Optimizers and schedules of the modules against timm's own for the whole model."""

from __future__ import annotations

import copy
import io
import itertools
import sys
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from localgrad.errors import RecipeError
from localgrad.estimating import estimate_step
from localgrad.learner import LocalLearner
from localgrad.objectives.auxiliary import exempt_from_decay, is_exempt_from_decay
from localgrad.objectives.methods import FeatureReconstruction, GreedySupervised, Objective
from localgrad.training.optim import SCHEDULERS, OptimizerFactory, Schedule, note_of_warmup

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "xcit": ("xcit_nano_12_p8_224", {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "resnet": ("resnet10t", {}),
}


def make(name: str) -> nn.Module:
    architecture, options = MODELS[name]
    model: nn.Module = timm.create_model(architecture, num_classes=5, **options)
    return model


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_is_timms_own(name: str, weight_decay: float) -> None:
    model = make(name)
    reference = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=weight_decay)
    parameters = list(model.parameters())
    factory = OptimizerFactory(model, name="adamw", lr=1e-3, weight_decay=weight_decay)
    halves = [factory(part) for part in (parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :])]
    decay_of = {id(p): group["weight_decay"] for group in reference.param_groups for p in group["params"]}
    ours = {id(p): group["weight_decay"] for half in halves for group in half.param_groups for p in group["params"]}
    assert ours == decay_of
    assert len(ours) == len(parameters)
    if weight_decay:
        assert set(ours.values()) == {0.0, weight_decay}


def test_auxiliary_nets_decay_their_matrices_only() -> None:
    auxiliary = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    optimizer = OptimizerFactory(make("vit"), name="adamw", lr=1e-3, weight_decay=0.1)(list(auxiliary.parameters()))
    groups = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert groups == {0.0: 3, 0.1: 1}


AUXILIARY: dict[str, Objective] = {
    "transformers": FeatureReconstruction(decoder="transformer", classifier="transformer"),
    "next": GreedySupervised(classifier="next", classifier_options={"depth": 2}),
    "next, fresh": GreedySupervised(classifier="next", classifier_options={"weights": "fresh", "depth": 2}),
    "masked": FeatureReconstruction(decoder="conv", classifier="mlp", mask=0.5),
}


@pytest.mark.parametrize("objective", AUXILIARY)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_auxiliary_nets_are_decayed_as_the_model_is(name: str, objective: str) -> None:
    """Matrices are; vectors, positions, and copies of what the model's own list names aren't."""
    model = make(name)
    learner = LocalLearner(model, modules=2, objective=AUXILIARY[objective], input_size=(3, 16, 16))
    learner.configure_optimizers(OptimizerFactory(model, name="adamw", lr=1e-3, weight_decay=0.1))
    found = {
        id(p): group["weight_decay"] for o in learner.optimizers for group in o.param_groups for p in group["params"]
    }
    positions = ("places", "pos_embed", "relative_position_bias_table", "mask_token")
    seen = set()
    for module in learner.modules:
        for parameter_name, parameter in module.objective.named_parameters():
            is_position = any(word in parameter_name for word in positions)
            seen |= {word for word in positions if word in parameter_name}
            assert found[id(parameter)] == (0.0 if parameter.ndim <= 1 or is_position else 0.1), parameter_name
    expected = {"transformers": {"places"}, "masked": {"mask_token"}}.get(objective, set())
    assert seen == (expected or ({"relative_position_bias_table"} if name == "swin" else set()))


def test_a_term_of_ones_own_can_exempt_a_table() -> None:
    table, matrix = exempt_from_decay(nn.Parameter(torch.zeros(4, 3))), nn.Parameter(torch.zeros(4, 3))
    optimizer = OptimizerFactory(make("vit"), name="adamw", lr=1e-3, weight_decay=0.1)([table, matrix])
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(table): 0.0, id(matrix): 0.1}


@pytest.mark.parametrize("name", ["adamw", "AdamW", "sgd", "lamb", "lion", "adan"])
def test_optimizers_are_timms(name: str) -> None:
    model = make("vit")
    optimizer = OptimizerFactory(model, name=name, lr=0.01, weight_decay=0.05)(list(model.parameters()))
    assert type(optimizer) is type(create_optimizer_v2(model, opt=name, lr=0.01))
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_unknown_optimizers_are_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"timm has no 'adamww'; take adamw, sgd, lamb.*Nearest: .*adamw"):
        OptimizerFactory(make("vit"), name="adamww", lr=0.01, weight_decay=0.0)


def test_an_optimizer_that_this_machine_lacks_is_refused() -> None:
    model = make("vit")
    factory = OptimizerFactory(model, name="fusedadam", lr=0.01, weight_decay=0.0)
    with pytest.raises(RecipeError, match=r"timm can't make 'fusedadam' here \(.*\); take adamw, sgd or lamb"):
        factory(list(model.parameters()))


@pytest.mark.heavy
@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_of_timm_trains_or_is_refused_in_a_line(name: str) -> None:
    torch.manual_seed(0)
    model = make("vit")
    learner = LocalLearner(model, modules=2, input_size=(3, 16, 16))
    before = [weight.clone() for weight in model.parameters()]
    try:
        factory = OptimizerFactory(model, name=name, lr=1e-3, weight_decay=0.05)
        learner.configure_optimizers(factory)
    except RecipeError as error:
        assert name.startswith(("bnb", "fused", "adahessian", "kron")), "the others train"
        assert "\n" not in str(error)
        return
    for _ in range(2):
        learner.step(torch.randn(4, 3, 16, 16), torch.arange(4))
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)
    estimated, kept = estimate_step(learner, 4, factory).by_category["optimizer"], state_bytes(learner)
    assert 0.9 * kept - 4096 <= estimated <= 1.1 * kept + 4096, "counters of steps may be shared"


@pytest.mark.parametrize("name", ["muon", "adamuon"])
def test_updates_that_divide_by_the_number_of_steps_are_estimated(name: str) -> None:
    model = make("vit")
    learner = LocalLearner(model, modules=2, input_size=(3, 16, 16))
    factory = OptimizerFactory(model, name=name, lr=1e-3, weight_decay=0.05)
    estimated = estimate_step(learner, 4, factory).by_category["optimizer"]
    learner.configure_optimizers(factory)
    learner.step(torch.randn(4, 3, 16, 16), torch.arange(4))
    assert estimated == pytest.approx(state_bytes(learner), rel=0.1)


@pytest.mark.parametrize("name", ["kron", "KronW"])
def test_optimizers_that_compile_their_updates_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"optimizer: '{name}' compiles its updates.*take adamw"):
        OptimizerFactory(make("vit"), name=name, lr=0.01, weight_decay=0.0)


class Asking(torch.optim.SGD):
    """An update for which values are needed."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.nonzero(self.param_groups[0]["params"][0]).tolist()


def test_an_optimizer_that_can_not_be_estimated_is_one_line() -> None:
    learner = LocalLearner(make("vit"), modules=2, input_size=(3, 16, 16))
    with pytest.raises(RecipeError, match=r"^optimizer: Asking can't be run on tensors without values") as refused:
        estimate_step(learner, 4, lambda params: Asking(params, lr=0.1))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["adahessian", "AdaHessian"])
def test_optimizers_of_second_gradients_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"optimizer: '{name}' needs second gradients.*take adamw"):
        OptimizerFactory(make("vit"), name=name, lr=0.01, weight_decay=0.0)


NOTHING = [float("nan"), float("inf"), -1.0, -0.0, 1e300, 1e-300]


@pytest.mark.parametrize("value", NOTHING)
def test_learning_rates_that_are_none_are_refused(value: float) -> None:
    model = make("vit")
    with pytest.raises(RecipeError, match=r"^lr: .* is no learning rate; take a number above 0"):
        OptimizerFactory(model, name="adamw", lr=value, weight_decay=0.0)
    factory = OptimizerFactory(model, name="adamw", lr=1.0, weight_decay=0.0)
    with pytest.raises(RecipeError, match=r"^lr_depth: with a factor of .* is no learning rate"):
        factory.scaled(value, 1.0)
    with pytest.raises(RecipeError, match=r"^learning rate: .* is no learning rate"):
        schedule_of(optimizers(1, lr=1e-2), lr=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e38])
def test_weight_decays_that_are_none_are_refused(value: float) -> None:
    model = make("vit")
    with pytest.raises(RecipeError, match=r"^weight_decay: .* is no decay .*; take a number from 0 on"):
        OptimizerFactory(model, name="adamw", lr=0.01, weight_decay=value)
    factory = OptimizerFactory(model, name="adamw", lr=0.01, weight_decay=1.0)
    with pytest.raises(RecipeError, match=r"^weight_decay_depth: with a factor of .* is no decay"):
        factory.scaled(1.0, value)


def test_numbers_that_an_update_takes_are_no_larger_than_it_can_have() -> None:
    """PyTorch ends in an error of its own where a rate, or its product with the decay, is beyond float32."""
    model = make("vit")
    for lr, decay in ((1e30, 0.0), (1e-8, 1e30), (1.0, 1e30)):
        learner = LocalLearner(copy.deepcopy(model), modules=2, input_size=(3, 16, 16))
        learner.configure_optimizers(OptimizerFactory(learner.model, name="adamw", lr=lr, weight_decay=decay))
        learner.step(torch.randn(4, 3, 16, 16), torch.arange(4))
    for lr, decay in ((1e38, 0.0), (1e30, 1e30), (1e20, 1e20)):
        with pytest.raises(RecipeError, match=r"is no (learning rate|decay).* at most 1e\+30"):
            OptimizerFactory(model, name="adamw", lr=lr, weight_decay=decay)
    with pytest.raises(RecipeError, match=r"^layer_decay: with a factor of .* is no learning rate"):
        OptimizerFactory(model, name="adamw", lr=1e-3, weight_decay=0.0, layer_decay=1e-30)


# ------------------------------------------------------------------------------- small states

SMALL = ["adafactorbv", "bnbadamw8bit"]


def learner_with(name: str, *, offload: bool = False) -> tuple[LocalLearner, OptimizerFactory]:
    if name.startswith("bnb"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'localgrad[8bit]'")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "drop_path_rate": 0.2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    learner = LocalLearner(model, modules=2, input_size=(3, 32, 32), clip_grad=0.5, offload=offload)
    factory = OptimizerFactory(model, name=name, lr=1e-3, weight_decay=0.05)
    learner.configure_optimizers(factory)
    return learner, factory


def train(learner: LocalLearner, start: int, stop: int) -> list[float]:
    losses = []
    for number in range(start, stop):
        torch.manual_seed(number)
        images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
        losses.append(float(learner.step(images + labels[:, None, None, None], labels).losses[-1]))
    return losses


def state_bytes(learner: LocalLearner) -> int:
    values = [v for o in learner.optimizers for state in o.state.values() for v in state.values()]
    storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in values if isinstance(v, torch.Tensor)}
    return sum(storages.values())


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.heavy
@pytest.mark.parametrize("name", SMALL)
def test_small_states_train_and_are_estimated(name: str) -> None:
    learner, factory = learner_with(name)
    losses = train(learner, 0, 30)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    real = state_bytes(learner)
    full = 8 * sum(p.numel() for index in range(2) for p in learner.parameters(index))
    assert real < 0.35 * full
    estimated = estimate_step(learner, 4, factory).by_category["optimizer"]
    assert estimated == pytest.approx(real, rel=0.05)
    weights = [*learner.model.parameters()]
    assert {group["weight_decay"] for o in learner.optimizers for group in o.param_groups} == {0.0, 0.05}
    assert all(torch.isfinite(weight).all() for weight in weights)


@pytest.mark.few(1)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_small_states_are_resumed_bit_for_bit_and_offloaded(name: str, offload: bool) -> None:
    straight, _ = learner_with(name)
    train(straight, 0, 6)
    first, _ = learner_with(name, offload=offload)
    train(first, 0, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second, _ = learner_with(name, offload=offload)
    train(second, 9, 11)  # a state of its own, to be replaced whole
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, 3, 6)
    assert_same_state(second.model.state_dict(), straight.model.state_dict())
    assert state_bytes(second) == pytest.approx(state_bytes(straight), rel=0.5)  # tables of levels are shared no more


@pytest.mark.parametrize("name", ["bnbadamw8bit", "BnbLion8bit", "bnbsgd8bit"])
def test_8_bit_optimizers_are_bitsandbytes_by_timms_names(name: str) -> None:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'localgrad[8bit]'")
    model = make("vit")
    optimizer = OptimizerFactory(model, name=name, lr=0.01, weight_decay=0.05)(list(model.parameters()))
    assert type(optimizer) in {library.optim.AdamW8bit, library.optim.Lion8bit, library.optim.SGD8bit}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=r"'bnbadamw8bit' needs bitsandbytes .*; pip install 'localgrad\[8bit\]'\.$"):
        OptimizerFactory(make("vit"), name="bnbadamw8bit", lr=0.01, weight_decay=0.0)


# ------------------------------------------------------------------------------------- schedules


def optimizers(count: int, lr: float = 1e-2) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr) for _ in range(count)]


def rates(schedule: Schedule, num_batches: int) -> list[float]:
    found = []
    for batch in range(num_batches):
        schedule.at(batch)
        [rate] = {group["lr"] for optimizer in schedule.optimizers for group in optimizer.param_groups}
        found.append(rate)
    return found


def schedule_of(made: list[torch.optim.Optimizer], lr: float | None = None, **changes: Any) -> Schedule:
    if lr is not None:
        made[0].param_groups[0]["lr"] = lr
    settings = {"name": "cosine", "epochs": 4, "batches_per_epoch": 8, "warmup_epochs": 0.0, "warmup_lr": 0.0}
    return Schedule(made, **{**settings, "min_lr": 0.0, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({key: value}, f"^{key}: ") for key in ("warmup_lr", "min_lr", "warmup_epochs", "warmup_stagger")
          for value in (float("nan"), float("inf"), -1.0)),
        ({"min_lr": 0.1}, r"^min_lr: 0.1 is above the learning rate \(0.01\), which would rise to the end"),
        ({"min_lr": 0.1, "name": "poly"}, "^min_lr: 0.1 is above"),
        ({"min_lr": 0.1, "name": "tanh"}, "^min_lr: 0.1 is above"),
        ({"warmup_lr": 0.1, "warmup_epochs": 1}, "^warmup_lr: 0.1 is above .* would fall in the warm-up"),
        ({"epochs": 0}, "^epochs: 0 is below 1"),
        ({"batches_per_epoch": 0}, "^batches_per_epoch must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_schedules_that_are_none_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        schedule_of(optimizers(1), **changes)


def test_a_rate_of_a_module_below_the_least_is_named() -> None:
    first, second = optimizers(1, lr=1e-7) + optimizers(1)
    with pytest.raises(RecipeError, match="min_lr: 1e-06 is above the learning rate of local module 0"):
        schedule_of([first, second], min_lr=1e-6)


def test_rates_that_nobody_uses_may_be_any() -> None:
    assert schedule_of(optimizers(1), warmup_lr=0.1).learning_rate == 1e-2
    assert schedule_of(optimizers(1), min_lr=0.1, name="step").learning_rate == 1e-2


@pytest.mark.parametrize("batches", [1, 2, 8])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_short_runs_start_at_their_rate_and_end_below_it(name: str, epochs: int, batches: int) -> None:
    schedule = schedule_of(optimizers(1), name=name, epochs=epochs, batches_per_epoch=batches)
    found = rates(schedule, epochs * batches)
    assert found[0] == pytest.approx(1e-2, rel=1e-4)
    assert found == sorted(found, reverse=True)
    if name == "multistep" and epochs * batches >= 8:
        assert [round(1e-2 / rate) for rate in found] == sorted([round(1e-2 / rate) for rate in found])
        assert len(set(found)) == 3, "two decays, apart"
        first = next(number for number, rate in enumerate(found) if rate < 1e-2)
        assert first + 1 >= epochs * batches // 3, "the first third at least at the whole rate"


@pytest.mark.parametrize("epochs", [3, 4, 5, 8, 10, 100])
def test_step_decays_twice_after_a_third_and_after_two(epochs: int) -> None:
    found = rates(schedule_of(optimizers(1), name="step", epochs=epochs, batches_per_epoch=7), epochs * 7)
    decays = [number for number, (rate, following) in enumerate(itertools.pairwise(found), 1) if following < rate]
    assert [round(decay / (epochs * 7) * 3) for decay in decays] == [1, 2]
    assert found[-1] == pytest.approx(1e-4)


def test_a_warm_up_of_less_than_an_update_is_none() -> None:
    assert rates(schedule_of(optimizers(1), epochs=1, batches_per_epoch=1, warmup_epochs=5.0), 1) == [1e-2]


@pytest.mark.parametrize(
    ("asked", "epochs", "batches", "says"),
    [
        (5.0, 25, 8, None),
        (0.0, 1, 1, None),
        (5.0, 10, 8, "warm-up: 2 of 10 epochs, a fifth of the run, instead of 5 epochs (training.warmup_epochs)"),
        (20.0, 3, 8, "warm-up: 0.6 of 3 epochs, a fifth of the run, instead of 20 epochs (training.warmup_epochs)"),
        (1.0, 1, 3, "warm-up: none, as a fifth of the run is no update, instead of 1 epochs (training.warmup_epochs)"),
    ],
)
def test_a_warm_up_that_is_cut_is_told(asked: float, epochs: int, batches: int, says: str | None) -> None:
    assert note_of_warmup(asked, epochs, batches) == says


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "none"])
@pytest.mark.parametrize(("epochs", "warmup"), [(10, 2.0), (10, 0.0), (4, 0.5)])
def test_every_module_follows_timms_schedule(name: str, epochs: int, warmup: float) -> None:
    settings = {"warmup_lr": 1e-5, "min_lr": 1e-4}
    schedule = Schedule(optimizers(3), name=name, epochs=epochs, batches_per_epoch=7, warmup_epochs=warmup, **settings)
    [single] = optimizers(1)
    reference, _ = create_scheduler_v2(
        single,
        sched=name,
        num_epochs=epochs,
        decay_epochs=epochs / 3,
        decay_milestones=[epochs // 2, epochs * 3 // 4],
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=7,
        **settings | ({"decay_rate": 1.0} if name == "poly" else {}),  # the power: ours falls linearly
    )
    expected = []
    for batch in range(7 * epochs):
        reference.step_update(batch)
        expected.append(single.param_groups[0]["lr"])
    found = rates(schedule, 7 * epochs)
    assert found == expected
    assert found[0] == pytest.approx(1e-5 if warmup else 1e-2)
    assert found[-1] < max(found)


def test_none_keeps_the_rate_after_the_warm_up() -> None:
    schedule = Schedule(
        optimizers(2), name="none", epochs=10, batches_per_epoch=5, warmup_epochs=2, warmup_lr=0.0, min_lr=0.0
    )
    found = rates(schedule, 50)
    assert found[:10] == pytest.approx([1e-2 * batch / 10 for batch in range(10)])
    assert found[10:] == pytest.approx([1e-2] * 40)


@pytest.mark.parametrize(("epochs", "warmup", "batches"), [(10, 5.0, 2 * 8), (1, 5.0, 1.6), (10, 1.0, 8)])
def test_the_warm_up_takes_a_fifth_of_the_run_at_most(epochs: int, warmup: float, batches: float) -> None:
    schedule = Schedule(
        optimizers(1), name="cosine", epochs=epochs, batches_per_epoch=8, warmup_epochs=warmup, warmup_lr=0, min_lr=0
    )
    found = rates(schedule, 8 * epochs)
    rising = [after > before for before, after in itertools.pairwise(found)]
    assert found.index(max(found)) == pytest.approx(batches, abs=1)
    assert rising == sorted(rising, reverse=True), "up, then down"


def test_the_rate_depends_on_the_place_alone() -> None:
    schedule = Schedule(
        optimizers(2), name="cosine", epochs=4, batches_per_epoch=5, warmup_epochs=1, warmup_lr=0.0, min_lr=0.0
    )
    in_order = rates(schedule, 20)
    for batch in (13, 2, 19, 0, 7):
        schedule.at(batch)
        assert schedule.learning_rate == in_order[batch]


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_shortest_runs_have_a_schedule(name: str, epochs: int) -> None:
    schedule = Schedule(
        optimizers(1), name=name, epochs=epochs, batches_per_epoch=1, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6
    )
    assert all(0 < rate <= 1e-2 for rate in rates(schedule, epochs))


def test_unknown_schedulers_are_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown 'cosin'; take one of cosine, .*Nearest: cosine"):
        Schedule(optimizers(1), name="cosin", epochs=1, batches_per_epoch=1, warmup_epochs=0, warmup_lr=0, min_lr=0)


def test_a_copied_learner_decays_what_the_first_one_does() -> None:
    objective = GreedySupervised(classifier="transformer")
    learner = LocalLearner(make("vit"), modules=2, objective=objective, input_size=(3, 16, 16))
    marked = [p for m in learner.modules for p in m.objective.parameters() if is_exempt_from_decay(p) and p.ndim > 1]
    assert marked
    sizes = []
    for each in (learner, copy.deepcopy(learner)):
        each.configure_optimizers(OptimizerFactory(each.model, name="adamw", lr=1e-3, weight_decay=0.05))
        sizes.append([[len(group["params"]) for group in optimizer.param_groups] for optimizer in each.optimizers])
    assert sizes[0] == sizes[1]
