"""Models as users bring them: that write into their input, carry hooks, are of another type, wrapped, or quantised."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from helpers import SIZE, adamw, assert_same, batches, copied, make, make_learner, train
from localgrad import FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner
from localgrad.backbones.base import outline, split
from localgrad.backbones.fake import fake_copy
from localgrad.backbones.timm_models import InputKept, default_input_size
from localgrad.errors import BackboneError, DeviceError, RecipeError, reason_of
from localgrad.estimating import estimate_step
from localgrad.isolation import check_isolation
from localgrad.memory.costs import CostSettings
from localgrad.memory.parts import measure_costs
from localgrad.memory.track import block_activation_bytes
from localgrad.objectives.averaging import check_moves
from localgrad.partitioning import make_plan

# Writing into what is received -----------------------------------------------------------------------------------


class Activated(nn.Module):
    """A block behind an activation, which may write into what it receives; in training only, if asked."""

    def __init__(self, block: nn.Module, *, inplace: bool, in_training_only: bool = False) -> None:
        super().__init__()
        self.block, self.inplace, self.in_training_only = block, inplace, in_training_only

    def forward(self, features: Tensor) -> Tensor:
        if self.training or not self.in_training_only:
            features = features.mul_(0.9) if self.inplace else features * 0.9
        return self.block(features)


def writing(*, inplace: bool = True, at: tuple[int, ...] = (0, 1, 2, 3), **more: Any) -> nn.Module:
    """A ViT whose blocks begin with an activation."""
    model = make("vit")
    for index in at:
        model.blocks[index] = Activated(model.blocks[index], inplace=inplace, **more)
    return model


HOW: dict[str, dict[str, Any]] = {
    "inputs": {},
    "one module": {"modules": 1},
    "previous": {"objective": FeatureReconstruction(reconstruct="previous")},
    "blocks": {"objective": FeatureReconstruction(reconstruct="blocks")},
    "images": {"objective": ImageReconstruction()},
    "transport": {"objective": FeatureReconstruction(transport_tau=0.5)},
    "next": {"objective": GreedySupervised(classifier="next")},
    "reconcile": {"objective": FeatureReconstruction(reconcile=0.5)},
    "overlap": {"modules": 2, "overlap": 1},
    "recomputed": {"checkpoint": "blocks"},
    "chunks": {"checkpoint": "blocks/2"},
    "halves": {"checkpoint": "halves/2"},
    "parts": {"accumulation": 2},
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("how", "in_training_only"), [*((how, False) for how in HOW), ("inputs", True), ("recomputed", True)]
)
def test_blocks_that_write_into_their_input_train_as_those_that_do_not(how: str, in_training_only: bool) -> None:
    found = []
    for inplace in (False, True):
        learner = make_learner(writing(inplace=inplace, in_training_only=in_training_only), **HOW[how])
        images = batches(2)
        results = train(learner, copy.deepcopy(images))
        found.append(([(result.losses, result.logits) for result in results], learner.model.state_dict()))
        assert all(isinstance(block, InputKept) == inplace for block in learner.backbone.blocks)
    assert_same(*found)


class Rescaled(Activated):
    """Writes past the versions by which autograd notices."""

    def forward(self, features: Tensor) -> Tensor:
        if self.inplace:
            features.data.mul_(0.9)
            return self.block(features)
        return self.block(features + (0.9 * features - features).detach())


def test_writes_that_autograd_does_not_notice_are_seen() -> None:
    found = []
    for inplace in (False, True):
        model = make("vit")
        model.blocks[1] = Rescaled(model.blocks[1], inplace=inplace)
        learner = make_learner(model, checkpoint="blocks")
        found.append([result.losses for result in train(learner, batches(3))])
        assert isinstance(learner.backbone.blocks[1], InputKept) == inplace
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def test_end_to_end_steps_recompute_from_what_was_received() -> None:
    found = []
    for inplace in (False, True):
        learner = make_learner(writing(inplace=inplace), modules=2)
        found.append([learner.global_step(*batch).losses for batch in batches(2)])
        check_isolation(learner)
    assert_same(*found)


class Normalising(nn.Module):
    """A stem that centres the images, in place or not."""

    def __init__(self, embed: nn.Module, *, inplace: bool) -> None:
        super().__init__()
        self.embed, self.inplace = embed, inplace

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("embed"), name)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images.sub_(0.5) if self.inplace else images - 0.5)


def test_a_stem_that_writes_into_the_images_leaves_those_of_the_caller() -> None:
    found = []
    for inplace in (False, True):
        model = make("vit")
        model.patch_embed = Normalising(model.patch_embed, inplace=inplace)
        learner = make_learner(model, objective=ImageReconstruction())
        given, before = batches(2), batches(2)
        found.append([result.losses for result in train(learner, given)])
        assert_same(given, before)
    assert_same(*found)


def test_models_that_do_not_write_are_given_no_copies() -> None:
    for kind in ("vit", "resnet"):  # whose activations in place write into what their own layers give
        backbone = split(make(kind), SIZE)
        assert not any(isinstance(block, InputKept) for block in backbone.blocks)
        assert not backbone.stem.copies_input
        assert not backbone.tail.copies_input


@pytest.mark.heavy
def test_estimates_know_of_the_copies() -> None:
    model = writing(at=(1,))
    proved, drawn = split(model, SIZE), outline(model, SIZE)
    for backbone in (proved, drawn):
        assert [isinstance(block, InputKept) for block in backbone.blocks] == [False, True, False, False]
    peaks = [
        estimate_step(make_learner(backbone, modules=[1]), 8, adamw).peak_bytes
        for backbone in (drawn, split(writing(inplace=False, at=(1,)), SIZE))
    ]
    assert peaks[0] >= peaks[1]


# Hooks -----------------------------------------------------------------------------------------------------------


class NanGuard:
    """Reads what passes; holds a lock, as loggers do, which can't be copied."""

    def __init__(self) -> None:
        self.count = 0
        self.lock = threading.Lock()

    def watch(self, module: nn.Module, args: Any, output: Any = None) -> None:
        seen = (output if isinstance(output, tuple) else (output,)) if output is not None else args
        for tensor in seen:
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                raise FloatingPointError("not a number")
        self.count += 1

    def on(self, model: nn.Module) -> None:
        block = model.get_submodule("blocks.1.mlp")
        block.register_forward_pre_hook(self.watch)
        block.register_forward_hook(self.watch)
        block.register_full_backward_hook(lambda module, before, after: self.watch(module, after))
        next(block.parameters()).register_hook(lambda gradient: self.watch(block, (gradient,)))


@functools.cache
def expected_estimates() -> list[Any]:
    return estimates_of(make("vit", depth=2))


def estimates_of(model: nn.Module) -> list[Any]:
    """Everything that is found out about a model on tensors without values."""
    backbone, drawn = split(model, SIZE), outline(model, SIZE)
    learner = LocalLearner(backbone, modules=2, checkpoint="blocks")
    inputs = torch.empty(2, *SIZE, device="meta")
    return [
        learner.plan,
        estimate_step(learner, 4, adamw).peak_bytes,
        estimate_step(learner, 4, adamw, globally=True).peak_bytes,
        block_activation_bytes([backbone.stem, *backbone.blocks], inputs),
        measure_costs(drawn, FeatureReconstruction(), adamw, CostSettings(batch_size=4)).to_dict(),
    ]


@pytest.mark.heavy
def test_hooks_of_users_run_on_values_only_and_stay_on() -> None:
    model, guard = make("vit", depth=2), NanGuard()
    expected = expected_estimates()
    guard.on(model)
    assert estimates_of(model) == expected
    learner = make_learner(model, modules=2)
    before = guard.count
    train(learner, batches(1))
    assert guard.count - before == 4  # before, behind, and in the backward pass: of the block and of a weight
    assert len(model.get_submodule("blocks.1.mlp")._forward_hooks) == 1


@pytest.mark.heavy
def test_hooks_on_all_modules_run_on_values_only() -> None:
    expected = expected_estimates()
    guard = NanGuard()
    handle = register_module_forward_hook(guard.watch)
    try:
        assert estimates_of(make("vit", depth=2)) == expected
        count = guard.count
        make("vit")(batches(1)[0][0])
        assert guard.count > count
    finally:
        handle.remove()


def test_fake_copies_keep_hooks_that_are_torchs_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.spectral_norm(model[0])
    nn.utils.parametrizations.weight_norm(model[1])
    prune.random_unstructured(model[2], "weight", amount=0.5)
    model[0].register_forward_hook(functools.partial(print, "a user's"))
    fake_mode, fake = fake_copy(model)
    with fake_mode:
        fake(torch.empty(2, 4)).sum().backward()
    assert [len(layer._forward_pre_hooks) for layer in fake] == [1, 0, 1]
    assert [len(layer._forward_hooks) for layer in fake] == [0, 0, 0]
    assert len(model[0]._forward_hooks) == 1
    assert nn.utils.parametrize.is_parametrized(fake[1], "weight")
    for name in ("0.weight_orig", "2.weight_orig", "1.parametrizations.weight.original0"):
        assert fake.get_parameter(name).grad is not None, name


def test_hooks_that_blocks_called_one_by_one_pass_by_are_said() -> None:
    model = make("swin")
    model.layers[1].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match=r"hooks of layers\.1 don't run in training"):
        make_learner(model)


@pytest.mark.parametrize("place", ["", "layers.1"])
def test_hooks_that_are_set_later_and_pass_by_are_said_once(place: str) -> None:
    learner = make_learner(make("swin"))
    (batch,) = batches(1)
    learner.step(*batch)
    learner.model.get_submodule(place).register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(UserWarning, match=r"hooks of \S+ don't run in training"):
        learner.step(*batch)
    learner.step(*batch)  # warnings are errors


# Types of weights ------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("vit", torch.bfloat16),
        ("resnet", torch.float64),
        pytest.param("vit", torch.float64, marks=pytest.mark.heavy),
        pytest.param("resnet", torch.bfloat16, marks=pytest.mark.heavy),
    ],
)
def test_models_in_another_type_train(kind: str, dtype: torch.dtype) -> None:
    objective = FeatureReconstruction(
        reconstruct="previous", context=0.5, contrastive_weight=0.5, similarity_weight=0.5, transport_tau=1.0
    )
    learners = [make_learner(make(kind).to(wanted), objective=objective) for wanted in (torch.float32, dtype)]
    steps = []
    for learner, wanted in zip(learners, (torch.float32, dtype), strict=True):
        given = [(images.to(wanted), labels) for images, labels in batches(2, soft=dtype == torch.float64)]
        steps.append(train(learner, given))
    learner = learners[1]
    assert {weight.dtype for module in learner.modules for weight in module.parameters()} == {dtype}
    for ours, exact in zip(steps[1], steps[0], strict=True):
        assert {loss.dtype for loss in ours.losses} == {torch.float64 if dtype == torch.float64 else torch.float32}
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        for mine, other in zip(ours.losses, exact.losses, strict=True):
            assert mine.item() == pytest.approx(other.item(), rel=tolerance)
    check_isolation(learner)
    peaks = [estimate_step(each, 8, adamw).peak_bytes for each in learners]
    assert 0.4 < peaks[1] / peaks[0] < 0.8 if dtype == torch.bfloat16 else 1.8 < peaks[1] / peaks[0] < 2.1
    if kind == "vit":
        costs = measure_costs(learner.backbone, objective, adamw, CostSettings(batch_size=8))
        assert costs.images == 8 * math.prod(SIZE) * dtype.itemsize


def test_weights_and_precisions_that_do_not_go_together_are_refused() -> None:
    for dtype, precision, words in (
        (torch.float16, "fp32", r"float16, in which updates get lost; call model\.float\(\)"),
        (torch.float16, "fp16", r"float16, in which updates get lost; call model\.float\(\)"),
        (torch.float64, "bf16", r"'bf16' is for weights in float32, .* take precision='fp32'"),
        (torch.bfloat16, "fp16", r"'fp16' is for weights in float32, .* take precision='fp32'"),
    ):
        with pytest.raises(DeviceError, match=words):
            LocalLearner(make("vit").to(dtype), modules=2, input_size=SIZE, precision=precision)
    mixed = make("vit")
    mixed.blocks[1].bfloat16()
    with pytest.raises(BackboneError, match=r"several types \(bfloat16, float32\).* model\.float\(\)"):
        split(mixed, SIZE)


@pytest.mark.parametrize(
    "asked",
    [
        {"ema_decay": 0.9998},
        {"objective": GreedySupervised(classifier="next", classifier_options={"weights": "ema"})},
    ],
)
def test_averages_of_weights_in_16_bits_are_refused_as_they_would_stay(asked: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"torch.bfloat16, in which a moving average would stay .*precision='bf16'"):
        LocalLearner(make("vit").to(torch.bfloat16), modules=2, input_size=SIZE, **asked)
    frozen = make("vit").to(torch.bfloat16).requires_grad_(False)
    frozen.head.float().requires_grad_(True)
    check_moves(frozen)  # what isn't trained is its own average


@pytest.mark.heavy
def test_the_default_type_of_tensors_is_not_the_models() -> None:
    model, data = make("vit"), batches(1)
    torch.set_default_dtype(torch.float64)
    try:
        learner = make_learner(model)
        assert {weight.dtype for module in learner.modules for weight in module.parameters()} == {torch.float32}
        train(learner, data)
        estimate_step(learner, 2, adamw)
        check_isolation(learner)
    finally:
        torch.set_default_dtype(torch.float32)


# Channels, batch norms -------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["vit", "resnet", "swin"])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_default_input_has_the_models_own_channels(kind: str, channels: int) -> None:
    model = make(kind, in_chans=channels)
    assert default_input_size(model)[0] == channels
    with pytest.raises(
        BackboneError, match=rf"has 3 channels, but the model was built for {channels}: pass in_chans=3"
    ):
        split(model, SIZE)
    learner = LocalLearner(model, modules=2)
    learner.configure_optimizers(adamw)
    learner.step(torch.randn(2, *learner.backbone.input_size), torch.tensor([0, 1]))


@pytest.mark.few(1)
@pytest.mark.parametrize("checkpoint", ["none", "blocks/2"])
def test_batch_norms_over_one_image_are_refused_in_words(checkpoint: str) -> None:
    model = make("resnet", output_stride=32)  # a grid of 1 x 1 in the end
    learner = make_learner(model, checkpoint=checkpoint)
    with pytest.raises(RecipeError, match=r"images: a batch of 1 leaves a batch norm .*drop_last=True"):
        learner.step(*batches(1, 1)[0])
    with pytest.raises(RecipeError, match=r"images: a batch of 1"):
        learner.global_step(*batches(1, 1)[0])
    parts = make_learner(model, accumulation=3, checkpoint=checkpoint)
    with pytest.raises(RecipeError, match=r"accumulation: 3 parts of 7 images .* take accumulation=2, or larger"):
        parts.step(*batches(1, 7)[0])
    parts.step(*batches(1, 6)[0])
    with pytest.raises(RecipeError, match=r"accumulation: 2 parts of 2 images .* take accumulation=1"):
        measure_costs(learner.backbone, GreedySupervised(), adamw, CostSettings(batch_size=2, accumulation=2))


# What stands around a model --------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_timms_own_flag_of_recomputation_is_followed() -> None:
    for kind in ("vit", "swin", "resnet"):
        model = make(kind)
        reference = train(make_learner(copy.deepcopy(model), checkpoint="blocks"), batches(2))
        model.set_grad_checkpointing()
        learner = make_learner(model)
        assert {how.level for how in learner.plan.checkpoint} == {"blocks"}
        assert_same([step.losses for step in train(learner, batches(2))], [step.losses for step in reference])
        assert {how.level for how in make_learner(model, checkpoint="none").plan.checkpoint} == {"none"}


class Adapter(nn.Module):
    """Hands on its model's attributes, as wrappers of peft do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)

    def forward(self, images: Tensor) -> Tensor:
        return self.base_model.model(images)


class SubTensor(Tensor):
    """Stands for quantised and sharded weights, which are tensors of their own classes."""


def with_weight(weight: nn.Parameter) -> nn.Module:
    model = make("vit")
    model.blocks[1].mlp.fc1.weight = weight
    return model


def quantised() -> nn.Module:
    model = make("vit")
    model.blocks[1].mlp.fc1 = torch.ao.nn.quantized.dynamic.Linear(32, 128)
    return model


def under_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return make("vit")


def lazy() -> nn.Module:
    model = make("vit")
    model.head = nn.LazyLinear(5)
    return model


def compiled() -> nn.Module:
    model = make("vit")
    model.compile(backend="eager")
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DataParallel": (lambda: nn.DataParallel(make("vit")), r"DataParallel stands around .* pass model\.module "),
    "torch.compile": (lambda: torch.compile(make("vit"), backend="eager"), r"pass model\._orig_mod "),
    "model.compile": (compiled, r"model\.compile\(\) was called.* pass compile=True"),
    "adapter": (lambda: Adapter(make("vit")), r"Adapter stands around .* pass model\.base_model\.model "),
    "in a row": (lambda: nn.Sequential(nn.Identity(), make("vit")), r"pass model\[1\] "),
    "scripted": (lambda: torch.jit.script(make("resnet")), "traced by torch.jit"),
    "quantised": (quantised, r"blocks\.1\.mlp\.fc1 is a quantised Linear.* quantise it after training"),
    "integers": (
        lambda: with_weight(nn.Parameter(torch.ones(128, 32, dtype=torch.int8), requires_grad=False)),
        r"blocks\.1\.mlp\.fc1\.weight is of type torch\.int8",
    ),
    "subclass": (
        lambda: with_weight(nn.Parameter(torch.ones(128, 32).as_subclass(SubTensor))),
        r"blocks\.1\.mlp\.fc1\.weight is a SubTensor",
    ),
    "lazy": (lazy, r"head\.weight is of a lazy layer.* call model\(images\) once"),
    "inference mode": (under_inference_mode, r"made under torch\.inference_mode\(\)"),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)
@pytest.mark.parametrize("name", REFUSED)
def test_wrapped_and_quantised_models_are_refused_with_the_way_out(name: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(BackboneError, match=words) as error:
        LocalLearner(build(), modules=2, input_size=SIZE)
    assert "\n" not in str(error.value)


def test_adapters_inside_a_model_train() -> None:
    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(requires_grad=False)
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, features: Tensor) -> Tensor:
            return self.base(features) + self.up(self.down(features))

    model = make("vit").requires_grad_(requires_grad=False)
    for block in model.blocks:
        block.attn.qkv = LowRank(block.attn.qkv)
    model.head.requires_grad_(requires_grad=True)
    learner, before = make_learner(model, modules=2), copied(model)
    train(learner, batches(1))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_weights_that_share_memory_across_a_boundary_are_refused() -> None:
    model = make("vit")
    model.blocks[3].mlp.fc1.weight = nn.Parameter(model.blocks[0].mlp.fc1.weight.data)
    with pytest.raises(BackboneError, match=r"mlp\.fc1\.weight is shared by blocks\.0, blocks\.3"):
        make_learner(model, modules=2)
    tied = make("vit")
    tied.blocks[1].mlp.fc1.weight = tied.blocks[0].mlp.fc1.weight
    learner = make_learner(tied, modules=[2])
    train(learner, batches(1))
    assert tied.blocks[1].mlp.fc1.weight is tied.blocks[0].mlp.fc1.weight


# What is on around a step ----------------------------------------------------------------------------------------


def test_a_step_in_which_nothing_could_train_is_refused() -> None:
    learner, batch = make_learner(), batches(1)[0]
    for off in (torch.no_grad(), torch.inference_mode()):
        for step in (learner.step, learner.global_step):
            with off, pytest.raises(RecipeError, match=r"under torch\.no_grad\(\) .* call it outside"):
                step(*batch)
    with torch.inference_mode():
        images = torch.randn(2, *SIZE)
    with pytest.raises(RecipeError, match=r"made under torch\.inference_mode\(\).* images\.clone\(\)"):
        learner.step(images, torch.tensor([0, 1]))


def test_another_autocast_around_a_step_is_refused() -> None:
    learner, batch = make_learner(), batches(1)[0]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RecipeError, match=r"torch\.autocast in torch\.bfloat16, and this learner has precision='fp32'"),
    ):
        learner.step(*batch)
    same = make_learner(precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        same.step(*batch)


AROUND: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("around", AROUND)
def test_estimates_are_the_same_whatever_is_on_around_them(around: str) -> None:
    def estimates() -> list[Any]:
        bytes_of = measure_costs(
            outline(model, SIZE), FeatureReconstruction(), adamw, CostSettings(batch_size=4)
        ).to_dict()
        return [make_plan(split(model, SIZE), 2), estimate_step(learner, 4, adamw).peak_bytes, bytes_of]

    model = make("vit", depth=2)
    learner = LocalLearner(model, modules=2, input_size=SIZE, checkpoint="blocks")
    expected = estimates()
    with AROUND[around]():
        assert estimates() == expected


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_images_may_have_their_channels_last(kind: str) -> None:
    plain = train(make_learner(make(kind), modules=2), batches(2))
    learner = make_learner(make(kind).to(memory_format=torch.channels_last), modules=2)
    given = [(images.to(memory_format=torch.channels_last), labels) for images, labels in batches(2)]
    for ours, theirs in zip(train(learner, given), plain, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=1e-4)


# Messages --------------------------------------------------------------------------------------------------------


def test_a_forward_that_looks_at_values_trains_and_is_balanced_by_running_it() -> None:
    class Checked(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, features: Tensor) -> Tensor:
            if not torch.isfinite(features).all():
                raise FloatingPointError
            return self.block(features)

    model = make("vit")
    plain = make_learner(copy.deepcopy(model), modules=2)
    model.blocks[2] = Checked(model.blocks[2])
    with pytest.raises(BackboneError, match=r"its forward looks at values .*LocalLearner trains it"):
        outline(model, SIZE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner = make_learner(model, modules=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (learner.plan.boundaries, learner.plan.activation_bytes) == (
        plain.plan.boundaries,
        plain.plan.activation_bytes,
    )
    train(learner, batches(1))


def test_dropped_tokens_are_named_and_nothing_else() -> None:
    model = make("eva", patch_drop_rate=0.5)
    for take_apart in (split, outline):
        with pytest.raises(BackboneError, match="patch_drop_rate=0") as error:
            take_apart(model, SIZE)
        assert "num_classes" not in str(error.value)


def test_reasons_are_one_line_with_the_useful_part() -> None:
    assert reason_of(ValueError("first\n  second:\n\tthird ")) == "first second: third"
    assert reason_of(ValueError("said\nException raised from f at x.cpp:3\nframe #0: g\n")) == "said"
    assert reason_of(ValueError()) == "ValueError"
    long = reason_of(ValueError(f"begin {'x' * 5000} end"), limit=100)
    assert len(long) <= 100
    assert long.startswith("begin")
    assert long.endswith("end")

    class Demanding(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            raise RuntimeError("this block can't go on\nbecause: too few tokens")

    model = make("vit")
    model.blocks[1] = Demanding()
    with pytest.raises(BackboneError, match="can't go on because: too few tokens") as error:
        split(model, SIZE)
    assert "\n" not in str(error.value)


def test_a_model_that_timm_cannot_make_is_refused_with_all_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from localgrad.app.build import create_model
    from localgrad.app.recipe import ModelSettings

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Error(s) in loading state_dict for VisionTransformer:\n\tsize mismatch for head.weight")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(BackboneError, match=r"loading state_dict .* size mismatch for head\.weight\. Check"):
        create_model(ModelSettings(name="vit_tiny_patch16_224"), num_classes=5, num_channels=3)
