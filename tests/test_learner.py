"""``LocalLearner`` as users hold it: the six lines of the README, what it refuses, and its state."""

from __future__ import annotations

import copy
import dataclasses
import io
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

import localgrad
from helpers import SIZE, VIT, adamw, assert_same, batches, copied, flat, make, make_backbone, term_of, train
from localgrad import (
    Contrastive,
    FeatureReconstruction,
    GreedySupervised,
    ImageReconstruction,
    LocalLearner,
    Plan,
    partitioning,
)
from localgrad.errors import BackboneError, CheckpointError, DeviceError, PartitionError, RecipeError
from localgrad.estimating import end_to_end
from localgrad.memory.track import block_activation_bytes
from localgrad.partition import Checkpointing
from localgrad.partitioning import make_plan


def make_learner(model: nn.Module | None = None, modules: Any = 3, optimizer: Any = adamw, **more: Any) -> LocalLearner:
    learner = LocalLearner(
        make_backbone(drop_path_rate=0.2) if model is None else model, modules=modules, input_size=SIZE, **more
    )
    learner.configure_optimizers(optimizer)
    return learner


def weights(learner: LocalLearner) -> dict[str, Tensor]:
    """Everything that training changes, by name, copied."""
    found = {f"model.{name}": value for name, value in learner.model.state_dict().items()}
    for index, module in enumerate(learner.modules):
        found |= {f"objective {index}.{name}": value for name, value in module.objective.state_dict().items()}
    return {name: value.clone() for name, value in found.items()}


# The six lines ---------------------------------------------------------------------------------------------------


def test_the_six_lines() -> None:
    model, (images, labels) = make("swin"), batches(1)[0]
    before = copy.deepcopy(model.state_dict())
    learner = localgrad.LocalLearner(
        model, modules=4, objective=localgrad.FeatureReconstruction(), input_size=(3, 32, 32)
    )
    learner.configure_optimizers(lambda params: torch.optim.AdamW(params, lr=1e-3))
    result = learner.step(images, labels)
    assert result.logits.shape == (4, 5)
    assert len(result.losses) == len(learner.modules) == len(learner.optimizers) == learner.plan.num_modules == 4
    assert all(loss.shape == () and loss > 0 for loss in result.losses)
    assert [sorted(terms) for terms in result.terms] == [["reconstruction", "task"]] * 3 + [["task"]]
    assert [None if logits is None else tuple(logits.shape) for logits in result.module_logits] == [(4, 5)] * 4
    tensors = [result.logits, *result.losses, *(v for terms in result.terms for v in terms.values())]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert learner.model is model
    assert [name for name, value in model.state_dict().items() if torch.equal(value, before[name])] == []
    assert learner.num_steps == 1


def test_the_loss_goes_down() -> None:
    learner, (images, labels) = make_learner(make("vit")), batches(1)[0]
    losses = [[float(loss) for loss in learner.step(images, labels).losses] for _ in range(15)]
    assert all(last < 0.9 * first for first, last in zip(losses[0], losses[-1], strict=True))


def test_a_loss_is_the_weighted_sum_of_its_terms() -> None:
    learner = make_learner(objective=FeatureReconstruction(task_weight=0.5, reconstruction_weight=2.0))
    result = learner.step(*batches(1)[0])
    for loss, terms in zip(result.losses[:-1], result.terms[:-1], strict=True):
        torch.testing.assert_close(loss, 0.5 * terms["task"] + 2 * terms["reconstruction"])
    assert torch.equal(result.losses[-1], result.terms[-1]["task"])


def test_logits_of_a_step_are_those_before_its_update() -> None:
    learner = make_learner(make("vit"))
    images, labels = batches(1)[0]
    with torch.no_grad():
        twin = copy.deepcopy(learner.model)
        expected = twin.train()(images)
    result = learner.step(images, labels)
    # Earlier modules are updated before later ones run, but on features from before their update.
    assert torch.equal(result.logits, expected)


def test_a_split_backbone_is_taken_as_it_is() -> None:
    backbone = localgrad.split(make("vit"), SIZE)
    learner = LocalLearner(backbone, modules=2)
    assert learner.backbone is backbone
    assert learner.model is backbone.model


def test_the_models_own_size_is_the_default() -> None:
    assert LocalLearner(make("vit"), modules=1).backbone.input_size == SIZE


def test_no_step_before_the_optimizers() -> None:
    learner = LocalLearner(make("vit"), modules=2)
    assert learner.optimizers == ()
    with pytest.raises(RecipeError, match=r"no optimizers yet: call learner.configure_optimizers"):
        learner.step(*batches(1)[0])


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    learner = make_learner()
    with pytest.raises(
        BackboneError, match=rf"images: got \[{', '.join(map(str, shape))}\].*\[B, 3, 32, 32\].*input_size="
    ):
        learner.step(torch.randn(shape), torch.zeros(2, dtype=torch.int64))


def test_a_step_puts_the_model_in_training_mode() -> None:
    learner = make_learner()
    learner.eval()
    nets = [learner.model, *learner.modules, learner.backbone.stem, learner.backbone.tail]
    assert not any(net.training for net in nets)
    assert not any(part.training for module in learner.modules for part in module.modules())
    learner.step(*batches(1)[0])
    assert all(net.training for net in nets)
    assert all(part.training for module in learner.modules for part in module.modules())


# Modules ---------------------------------------------------------------------------------------------------------


def test_ways_to_say_which_modules() -> None:
    model = make("swin")
    backbone = localgrad.split(model, SIZE)
    assert LocalLearner(backbone, modules=1).plan.boundaries == ()
    assert LocalLearner(backbone, modules="stages").plan.boundaries == backbone.stage_boundaries == (1, 3)
    assert LocalLearner(backbone, modules=[2, 4]).plan.boundaries == (2, 4)
    by_count = LocalLearner(backbone, modules=3).plan
    assert by_count.num_modules == 3
    assert by_count.activation_bytes
    text = by_count.to_json()
    assert LocalLearner(backbone, modules=Plan.from_json(text)).plan == by_count


def test_modules_own_every_block_once_in_order() -> None:
    learner = make_learner(make("swin"), modules=(2, 4))
    parts = [part for module in learner.modules for part in module.parts]
    backbone = learner.backbone
    assert parts == [backbone.stem, *backbone.blocks, backbone.tail]
    owned = [id(p) for index in range(3) for p in learner.parameters(index)]
    assert len(owned) == len(set(owned))
    assert set(owned) >= {id(p) for p in learner.model.parameters()}


@pytest.mark.parametrize("name", ["cait_xxs24_224", "vit_tiny_patch16_224"])
def test_one_module_has_the_models_parameters_in_the_models_order(name: str) -> None:
    sizes = VIT | {"num_classes": 5} | ({"embed_dim": 24, "num_heads": 3} if "cait" in name else {})
    learner = LocalLearner(timm.create_model(name, **sizes), modules=1, input_size=SIZE)
    assert [id(p) for p in learner.parameters(0)] == [id(p) for p in learner.model.parameters()]


def test_a_count_is_balanced_by_activation_bytes() -> None:
    backbone = localgrad.split(make("swin", depths=(2, 3), num_heads=(1, 2)), SIZE)
    plan = make_plan(backbone, 3)
    candidates = [
        make_plan(backbone, (first, second)).activation_bytes
        for second in range(2, plan.num_blocks)
        for first in range(1, second)
    ]
    assert max(plan.activation_bytes) == min(max(costs) for costs in candidates)


def test_the_stems_bytes_count_to_the_first_block_and_the_tails_to_the_last() -> None:
    backbone = localgrad.split(make("swin"), SIZE)
    images = torch.empty(2, *SIZE, device="meta")
    parts = [backbone.stem, *backbone.blocks, backbone.tail]
    stem, *blocks, tail = block_activation_bytes(parts, images)
    assert stem > 0
    assert tail > 0
    expected = tuple(kept // 2 for kept in (blocks[0] + stem, *blocks[1:-1], blocks[-1] + tail))
    plan = LocalLearner(backbone, modules=range(1, len(blocks))).plan
    assert plan.activation_bytes == expected


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (5, "5 local modules can't be made of 4 blocks; take a number from 1 to 4"),
        (0, "0 local modules can't be made"),
        (-1, "-1 local modules can't be made"),
        ("stages", "this model has no stages"),
        ("stage", "'stage' is neither a number"),
        ((2, 1), "boundaries must ascend"),
        ((1, 4), r"boundary 4 lies outside 1\.\.3"),
        ((0, 2), "boundary 0 lies outside"),
        (True, "expected a number"),
        (2.5, "expected a number"),
    ],
)
def test_impossible_modules_are_refused(modules: Any, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        LocalLearner(make("vit"), modules=modules)


@pytest.mark.parametrize("change", [{"num_blocks": 5}, {"model": "vit_small_patch16_224"}])
def test_a_plan_of_another_model_is_refused(change: dict[str, Any]) -> None:
    plan = LocalLearner(make("vit"), modules=2).plan
    with pytest.raises(PartitionError, match=r"plan: it was made for .* make a new plan"):
        LocalLearner(make("vit"), modules=dataclasses.replace(plan, **change))


@pytest.mark.parametrize("planned", [False, True])
def test_end_to_end_steps_that_a_plan_does_not_count_are_said_once(planned: bool) -> None:
    plan = LocalLearner(make("vit"), modules=2).plan
    remembering = dataclasses.replace(
        plan,
        made_for={"execution.precision": "fp32"},
        global_checkpoint=Checkpointing.parse("blocks", "global_checkpoint") if planned else None,
    )
    learner = LocalLearner(make("vit"), modules=remembering, input_size=SIZE)
    learner.configure_optimizers(adamw)
    learner.step(*batches(1)[0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            learner.global_step(*batches(1)[0])
    told = [str(warning.message) for warning in said]
    assert len(told) == (0 if planned else 1), told
    assert planned or "made for no end-to-end steps (global_share), here there are some" in told[0]


def test_checkpoint_flags_must_fit_the_modules() -> None:
    assert LocalLearner(make("vit"), modules=2, checkpoint=[True, "halves/2:1"]).plan.checkpoint == (
        Checkpointing("blocks"),
        Checkpointing("halves", 2, 1),
    )
    with pytest.raises(PartitionError, match="checkpoint has 1 entries for 2 local modules"):
        LocalLearner(make("vit"), modules=2, checkpoint=[True])


def test_a_parameter_shared_across_a_boundary_is_refused() -> None:
    torch.manual_seed(0)
    shared = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
    model = timm.create_model("beit_base_patch16_224", **VIT, **shared)
    with pytest.raises(BackboneError, match=r"rel_pos_bias.* is shared by .*blocks\.0.*blocks\.3"):
        LocalLearner(model, modules=2)
    assert LocalLearner(model, modules=1).plan.num_modules == 1


def test_a_model_that_needs_two_images_to_train_is_planned_too() -> None:
    """Batch norm over one value: a ResNet at 32 pixels ends in 1 x 1 maps, fine for any batch but of one image."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=5)
    learner = make_learner(model, modules="stages", objective=GreedySupervised())
    assert torch.isfinite(learner.step(*batches(1)[0]).logits).all()
    localgrad.check_isolation(learner)


# Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"accumulation": 0}, {"ema_decay": 1.0}, {"ema_decay": 0.0}, {"clip_grad": 0.0}, {"clip_grad": -1.0}]
)
def test_impossible_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(option))):
        LocalLearner(make("vit"), modules=2, **option)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(DeviceError, match="unknown 'fp8'; take one of fp32, bf16, fp16"):
        LocalLearner(make("vit"), modules=2, precision="fp8")


def test_a_frozen_module_is_refused() -> None:
    learner = LocalLearner(make("vit"), modules=2)
    for parameter in learner.modules[1].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RecipeError, match="local module 1 has no trainable parameter; unfreeze some"):
        learner.configure_optimizers(adamw)


def test_frozen_parameters_are_left_alone() -> None:
    model = make("vit")
    frozen = {name: p for name, p in model.named_parameters() if "attn" in name}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in frozen.items()}
    learner = make_learner(model)
    assert not {id(p) for index in range(3) for p in learner.parameters(index)} & {id(p) for p in frozen.values()}
    train(learner, batches(2))
    assert_same(dict(frozen), before)


def test_clipping_bounds_each_modules_own_gradient() -> None:
    """With SGD at rate 1 an update is the gradient: as long as allowed, and in the unclipped one's direction."""
    clip = 0.05
    data = batches(1)
    free, clipped = (
        make_learner(make("vit"), optimizer=lambda params: torch.optim.SGD(params, lr=1.0), clip_grad=value)
        for value in (None, clip)
    )
    start = [torch.cat([p.detach().flatten() for p in free.parameters(index)]) for index in range(3)]
    for learner in (free, clipped):
        train(learner, data)
    for index in range(3):
        gradient, update = (
            torch.cat([p.detach().flatten() for p in learner.parameters(index)]) - start[index]
            for learner in (free, clipped)
        )
        assert gradient.norm() > clip
        assert update.norm().item() == pytest.approx(clip, rel=1e-3)
        torch.testing.assert_close(update, gradient * clip / gradient.norm(), atol=1e-6, rtol=1e-2)


def test_the_average_is_timms() -> None:
    data = batches(4)
    plain, averaging = make_learner(), make_learner(ema_decay=0.9)
    reference = ModelEmaV3(plain.model, decay=0.9, use_warmup=True)
    torch.manual_seed(7)
    for number, (images, labels) in enumerate(data, start=1):
        plain.step(images, labels)
        reference.update(plain.model, step=number)
    train(averaging, data)
    assert averaging.averaged_model is not None
    assert plain.averaged_model is None
    assert_same(averaging.averaged_model.state_dict(), reference.module.state_dict())
    assert_same(averaging.model.state_dict(), plain.model.state_dict())
    assert not torch.equal(next(averaging.averaged_model.parameters()), next(averaging.model.parameters()))


def scalers_of(learner: LocalLearner) -> list[torch.amp.GradScaler]:
    assert learner._executor is not None
    return [step.scaler for step in learner._executor.steps]


def test_fp16_has_a_scaler_for_each_module() -> None:
    learner = make_learner(make("vit"), precision="fp16")
    scalers = scalers_of(learner)
    assert len({id(scaler) for scaler in scalers}) == 3
    assert all(scaler.is_enabled() for scaler in scalers)
    assert not any(scaler.is_enabled() for scaler in scalers_of(make_learner(make("vit"))))
    learner.step(*batches(1)[0])
    scalers[1].update(new_scale=3e38)  # this module's gradients overflow
    before = weights(learner)
    learner.step(*batches(1)[0])
    after = weights(learner)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    names = {id(p): f"model.{name}" for name, p in learner.model.named_parameters()}
    for index in range(3):
        own = {names[id(p)] for p in learner.parameters(index) if id(p) in names}
        assert (own & moved == set()) if index == 1 else (own <= moved), index
    assert [scaler.get_scale() for scaler in scalers] == [65536.0, pytest.approx(1.5e38), 65536.0]


def test_fp16_unscales_before_it_clips() -> None:
    """The norm is the true gradient's: a scaled one would be clipped to nothing."""
    clip = 0.05
    learner = make_learner(
        make("vit"), optimizer=lambda params: torch.optim.SGD(params, lr=1.0), precision="fp16", clip_grad=clip
    )
    start = [[p.detach().clone() for p in learner.parameters(index)] for index in range(3)]
    train(learner, batches(1))
    for index in range(3):
        moved = [(p - q).flatten() for p, q in zip(learner.parameters(index), start[index], strict=True)]
        assert torch.cat(moved).norm().item() == pytest.approx(clip, rel=1e-2)


# Logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize(
    ("objective", "has_classifier"),
    [
        (FeatureReconstruction(), True),
        (ImageReconstruction(), True),
        (GreedySupervised(), True),
        (Contrastive(), False),
    ],
)
def test_logits_of_every_module(objective: localgrad.Objective, has_classifier: bool, configured: bool) -> None:
    learner = LocalLearner(make("swin", drop_path_rate=0.5), modules=3, objective=objective, input_size=SIZE)
    if configured:
        learner.configure_optimizers(adamw)
    images = batches(1)[0][0]
    learner.eval()
    before = weights(learner)
    *early, last = learner.logits(images)
    assert [None if logits is None else tuple(logits.shape) for logits in early] == [
        (4, 5) if has_classifier else None
    ] * 2
    with torch.no_grad():
        assert last is not None
        assert torch.equal(last, learner.model(images))
    assert not last.requires_grad
    assert_same(weights(learner), before)


def test_a_model_in_evaluation_mode_trains_like_any_once_it_is_in_training_mode() -> None:
    """What stands around its parts follows it, though it was made in the other mode; timm's tail drops by its own."""
    images, labels = batches(1)[0]
    found = []
    for first in (True, False):
        model = timm.create_model("resnet18", num_classes=5, drop_rate=0.9, in_chans=SIZE[0])
        torch.manual_seed(0)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.05)
        learner = make_learner(model.train(first), modules=2)
        model.train()
        torch.manual_seed(1)
        found.append(learner.step(images, labels).logits)
        model.eval()
        *_, last = learner.logits(images)
        with torch.no_grad():
            assert last is not None
            assert torch.equal(last, model(images))
    assert torch.equal(*found)  # type: ignore[arg-type]


def test_steps_without_classifiers_say_so() -> None:
    result = make_learner(objective=Contrastive()).step(*batches(1)[0])
    assert result.module_logits[:2] == (None, None)
    assert torch.equal(result.module_logits[2], result.logits)  # type: ignore[arg-type]


def test_logits_use_the_learners_precision() -> None:
    learner = make_learner(make("vit"), precision="bf16").eval()
    assert all(logits is not None and logits.dtype == torch.bfloat16 for logits in learner.logits(batches(1)[0][0]))


# State -----------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9, "clip_grad": 1.0}, {"precision": "fp16"}], ids=str)
def test_a_saved_state_goes_on_bit_for_bit(settings: dict[str, Any]) -> None:
    data = batches(6)
    straight = make_learner(**settings)
    train(straight, data)

    first = make_learner(**settings)
    torch.manual_seed(7)
    for images, labels in data[:3]:
        first.step(images, labels)
    random_state = torch.get_rng_state()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)

    torch.manual_seed(99)
    second = make_learner(make("vit", drop_path_rate=0.2), **settings)
    train(second, batches(1))  # a state of its own, to be replaced whole
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.num_steps == 3
    torch.set_rng_state(random_state)
    for images, labels in data[3:]:
        second.step(images, labels)
    assert_same(weights(second), weights(straight))
    if settings.get("ema_decay"):
        assert straight.averaged_model is not None
        assert second.averaged_model is not None
        assert_same(second.averaged_model.state_dict(), straight.averaged_model.state_dict())
    assert second.num_steps == straight.num_steps == 6
    assert [s.state_dict() for s in scalers_of(second)] == [s.state_dict() for s in scalers_of(straight)]


@pytest.mark.heavy
def test_another_models_state_is_refused_with_names() -> None:
    state = make_learner(make("vit", depth=5)).state_dict()
    with pytest.raises(CheckpointError, match=r"of another model: 0 weights are missing .*unknown \(blocks\.4\."):
        make_learner().load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"of another model: .* weights are missing \(blocks\.4\."):
        make_learner(make("vit", depth=5)).load_state_dict(make_learner().state_dict())
    state = make_learner(make("vit", num_classes=6)).state_dict()
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \[6, 32\], not \[5, 32\]"):
        make_learner().load_state_dict(state)


@pytest.mark.parametrize("other", [{"modules": 2}, {"modules": (1, 2)}, {"objective": Contrastive()}], ids=str)
def test_another_partitions_or_objectives_state_is_refused_and_changes_nothing(other: dict[str, Any]) -> None:
    learner = make_learner(modules=(1, 3))
    theirs = make_learner(**other)
    train(theirs, batches(2))
    before = weights(learner)
    with pytest.raises(CheckpointError):
        learner.load_state_dict(theirs.state_dict())
    assert_same(weights(learner), before)
    assert learner.num_steps == 0


def test_a_state_without_an_average_is_refused_where_one_is_kept() -> None:
    """Otherwise the average would stay at this learner's first weights, and be selected and exported."""
    theirs = make_learner()
    train(theirs, batches(2))
    with pytest.raises(CheckpointError, match=r"average|ema"):
        make_learner(ema_decay=0.9).load_state_dict(theirs.state_dict())


def test_a_state_needs_optimizers_on_both_sides() -> None:
    bare = LocalLearner(make("vit"), modules=3, input_size=SIZE)
    with pytest.raises(CheckpointError, match="configure optimizers first"):
        bare.load_state_dict(make_learner().state_dict())
    bare.load_state_dict(LocalLearner(make("vit"), modules=3, input_size=SIZE).state_dict())


def test_deepcopy_gives_a_learner_of_its_own() -> None:
    data = batches(4)
    learner = make_learner(ema_decay=0.9, clip_grad=1.0)
    train(learner, data[:2])
    twin = copy.deepcopy(learner)
    before = weights(learner)
    train(twin, data[2:])
    assert_same(weights(learner), before)
    train(learner, data[2:])
    assert_same(weights(learner), weights(twin))
    assert learner.averaged_model is not None
    assert twin.averaged_model is not None
    assert_same(learner.averaged_model.state_dict(), twin.averaged_model.state_dict())


def test_end_to_end_is_the_same_code_with_one_module() -> None:
    learner = make_learner(make("vit"), clip_grad=0.5, precision="bf16", accumulation=2)
    baseline = end_to_end(learner)
    assert baseline.model is learner.model
    assert baseline.plan.num_modules == 1
    assert baseline._settings == learner._settings


def test_the_end_to_end_baseline_keeps_an_average_where_the_run_does() -> None:
    assert end_to_end(make_learner()).averaged_model is None
    baseline = end_to_end(make_learner(ema_decay=0.9))
    assert baseline.plan.num_modules == 1
    assert baseline.averaged_model is not None  # or the run would be compared with less than its like


@pytest.mark.few(1)
@pytest.mark.parametrize("checkpoint", ["none", "halves/2"])
@pytest.mark.parametrize("classifier", ["transformer", "next"])
def test_learners_of_one_seed_are_the_same_whenever_it_was_set(classifier: str, checkpoint: str) -> None:
    """Before the model was made, after it, or with other draws in between; a second one in the process too."""

    def trained(*, seed_first: bool, draws: int) -> tuple[dict[str, Any], list[Any]]:
        torch.manual_seed(3 if seed_first else 99)
        model = make(drop_path_rate=0.3, proj_drop_rate=0.1)
        weights = make()  # seeds again: the same weights in all
        model.load_state_dict(weights.state_dict())
        torch.manual_seed(3)
        torch.rand(draws)
        objective = FeatureReconstruction(classifier=classifier)
        state = torch.get_rng_state()
        learner = LocalLearner(model, modules=3, objective=objective, input_size=SIZE, checkpoint=checkpoint)
        assert torch.equal(torch.get_rng_state(), state), "making a learner draws nothing of the caller's"
        learner.configure_optimizers(adamw)
        first = copied(learner.modules[0].objective)
        results = [learner.step(*batch) for batch in batches(2)]
        return {"auxiliary": first, **flat(learner.state_dict())}, [result.losses for result in results]

    reference, losses = trained(seed_first=True, draws=0)
    for seed_first, draws in ((True, 0), (False, 0), (False, 17)):
        state, own_losses = trained(seed_first=seed_first, draws=draws)
        assert_same(state, reference)
        assert_same(own_losses, losses)


def test_modules_have_auxiliary_nets_of_their_own_and_another_seed_other_ones() -> None:
    def places(seed: int) -> list[Tensor]:
        model = make()
        torch.manual_seed(seed)
        learner = LocalLearner(model, modules=3, input_size=SIZE)
        return [term_of(module.objective, "task").classifier.places for module in learner.modules[:2]]

    first, second = places(0)
    assert not torch.equal(first, second)
    assert torch.equal(places(0)[1], second)
    assert not torch.equal(places(4)[0], first)


def test_auxiliary_nets_can_draw_as_any_new_layer_does() -> None:
    def made(draws: int) -> Tensor:
        model = make()
        torch.manual_seed(0)
        torch.rand(draws)
        learner = LocalLearner(model, modules=2, input_size=SIZE, auxiliary_from="state")
        return term_of(learner.modules[0].objective, "task").classifier.places.detach()

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))
    with pytest.raises(RecipeError, match="auxiliary_from: unknown 'x'; take seed or state"):
        LocalLearner(make(), modules=2, input_size=SIZE, auxiliary_from="x")


def test_what_autograd_keeps_is_found_once_for_models_that_are_made_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    found = partitioning.block_activation_bytes
    monkeypatch.setattr(partitioning, "_kept_bytes", {})
    monkeypatch.setattr(partitioning, "block_activation_bytes", lambda *given: runs.append(given) or found(*given))
    one, same = (localgrad.split(make("vit"), SIZE) for _ in range(2))
    assert partitioning.activation_bytes(one) == partitioning.activation_bytes(same) != []
    assert len(runs) == 1
    same.eval()
    partitioning.activation_bytes(same)
    other = partitioning.activation_bytes(localgrad.split(make("vit", attn_drop_rate=0.1), SIZE))
    assert other != partitioning.activation_bytes(one)
    assert len(runs) == 3
    hooked = localgrad.split(make("vit"), SIZE)
    hooked.blocks[0].register_forward_hook(lambda _module, _given, output: output)
    partitioning.activation_bytes(hooked)
    assert len(runs) == 4
