"""What is refused before a step, or made right: models changed, modes, optimizers, images and labels, failed steps."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import localgrad
from helpers import SIZE, adamw, assert_same, batches, copied, make, make_learner, train
from localgrad import Contrastive, FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner
from localgrad.errors import (
    BackboneError,
    CheckpointError,
    DataError,
    DeviceError,
    LocalgradError,
    PartitionError,
    RecipeError,
)
from localgrad.estimating import estimate_step
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.regularisers import SimilarityMatching
from localgrad.objectives.supervised import SupervisedContrastive, TaskLoss
from localgrad.step.local_step import LocalStep

Change = Callable[[Any], object]


def steps_of(learner: LocalLearner) -> tuple[LocalStep, ...]:
    assert learner._executor is not None
    return learner._executor.steps


# A model that was changed after the learner was made ---------------------------------------------------------------


class Lora(nn.Module):
    """A linear layer with two small matrices beside it, as adapters are put on."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def put_lora(model: Any) -> None:
    for block in model.blocks:
        block.attn.qkv = Lora(block.attn.qkv)


def register_again(model: Any) -> None:
    layer = model.blocks[1].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def swap_a_weight_of_the_stem(model: Any) -> None:
    model.pos_embed = nn.Parameter(model.pos_embed.detach().clone())


CHANGES: dict[str, tuple[Change, str]] = {
    "head": (lambda m: setattr(m, "head", nn.Linear(32, 5)), "module head was replaced"),
    "reset_classifier": (lambda m: m.reset_classifier(5), "module head was replaced"),
    "lora": (put_lora, r"module blocks\.0\.attn\.qkv was replaced"),
    "block": (lambda m: m.blocks.__setitem__(2, copy.deepcopy(m.blocks[2])), r"module blocks\.2 was replaced"),
    "fewer blocks": (lambda m: m.blocks.__delitem__(3), r"module blocks\.3 was taken out"),
    "parameter": (register_again, r"parameter blocks\.1\.mlp\.fc1\.weight was replaced"),
    "stem": (swap_a_weight_of_the_stem, "parameter pos_embed was replaced"),
    "norm without weights": (lambda m: setattr(m, "norm", nn.Identity()), "module norm was replaced"),
    "added": (lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1))), "parameter scale was added"),
    "half": (lambda m: m.half(), "were torch.float32 when the learner was made and are torch.float16 now"),
    "double": (lambda m: m.double(), "are torch.float64 now"),
    "meta": (lambda m: m.to("meta"), "was replaced"),
}


@pytest.mark.few(12)
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_replaced_in_the_model_is_not_left_untrained(name: str, configured: bool) -> None:
    change, message = CHANGES[name]
    learner = make_learner() if configured else LocalLearner(make(), modules=3, input_size=SIZE)
    if configured:
        train(learner, batches(1))
    change(learner.model)
    with pytest.raises(BackboneError, match=message) as caught:
        if configured:
            learner.step(*batches(1)[0])
        else:
            learner.configure_optimizers(adamw)
    assert "make the learner again" in str(caught.value)
    if configured:
        for call in (learner.global_step, lambda images, _: learner.logits(images)):
            with pytest.raises(BackboneError, match=message):
                call(*batches(1)[0])


@pytest.mark.parametrize("settings", [{"offload": True}, {"ema_decay": 0.9}, {"checkpoint": "halves"}, {"overlap": 1}])
def test_with_every_setting_too(settings: dict[str, Any]) -> None:
    learner = make_learner(**settings)
    train(learner, batches(2))
    learner.eval()
    learner.logits(batches(1)[0][0])
    train(learner, batches(1))
    learner.model.head = nn.Linear(32, 5)
    with pytest.raises(BackboneError, match="module head was replaced"):
        train(learner, batches(1))


def test_a_changed_auxiliary_net_is_noticed() -> None:
    learner = make_learner()
    classifier: Any = learner.modules[0].objective.terms["task"]
    classifier.classifier = nn.Identity()
    with pytest.raises(BackboneError, match=r"local module 0\.objective\.terms\.task\.classifier was replaced"):
        train(learner, batches(1))


def test_a_backbone_whose_model_was_changed_is_refused() -> None:
    backbone = localgrad.split(make(), SIZE)
    backbone.model.head = nn.Linear(32, 5)
    with pytest.raises(BackboneError, match=r"head\.weight was replaced or added after it was split"):
        LocalLearner(backbone, modules=2)


def test_a_compiler_that_fails_is_told_of_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(kind: type[RuntimeError]) -> None:
        def forward(*_: Any) -> Any:
            raise kind("no compiler\nSet TORCHDYNAMO_VERBOSE=1 for the stack")

        monkeypatch.setattr(torch, "compile", lambda function, **_: forward)
        train(make_learner(modules=2, compile=True), batches(1))

    compilers: type[RuntimeError] = type("Failed", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    with pytest.raises(
        DeviceError, match=r"^compile=True: torch can't compile .* \(no compiler\); leave compile out\."
    ):
        failing(compilers)
    with pytest.raises(RuntimeError, match=r"^no compiler") as raised:
        failing(RuntimeError)
    assert not isinstance(raised.value, DeviceError)


def test_a_copy_trains_its_own_weights() -> None:
    """Compiled code belongs to the module that it was made of: a copy would have trained the original."""
    torch.compiler.reset()
    learner = make_learner(modules=2)
    steps_of(learner)[0]._is_compiled = True  # nothing is compiled before it runs
    twin = copy.deepcopy(learner)
    steps_of(learner)[0]._is_compiled = False
    forward: Any = steps_of(twin)[0]._forward
    original = getattr(forward, "_torchdynamo_orig_callable", forward)
    assert original.__self__ is twin.modules[0]
    twin.model.head = nn.Linear(32, 5)  # and it knows its own model
    with pytest.raises(BackboneError, match="head was replaced"):
        train(twin, batches(1))
    train(learner, batches(1))


@pytest.mark.heavy
def test_an_estimate_takes_a_learner_that_was_trained() -> None:
    learner = make_learner()
    train(learner, batches(1))
    assert estimate_step(learner, 4, adamw).peak_bytes > 0


def test_a_learner_cannot_be_pickled_and_says_what_to_save() -> None:
    learner = make_learner()
    with pytest.raises(CheckpointError, match=r"can't be pickled; save learner\.state_dict\(\)"):
        pickle.dumps(learner)
    assert copy.copy(learner).model is learner.model


def test_weights_that_are_unfrozen_later_are_refused_until_an_optimizer_holds_them() -> None:
    model: Any = make()
    weight = model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    learner = make_learner(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), clip_grad=1.0)
    train(learner, batches(1))
    learner.global_step(*batches(1)[0])
    weight.requires_grad_(True)
    before = weight.detach().clone()
    with pytest.raises(RecipeError, match=r"mlp\.fc1\.weight of a local module was unfrozen.*configure_optimizers"):
        train(learner, batches(1))
    owner = next(i for i in range(3) if id(weight) in {id(p) for p in learner.parameters(i)})
    learner.optimizers[owner].add_param_group({"params": [weight]})
    for step in (learner.step, learner.global_step):
        step(*batches(1)[0])
        assert not torch.equal(weight, before)
        before = weight.detach().clone()
    weight.requires_grad_(False)  # frozen again: fine
    learner.step(*batches(1)[0])
    assert torch.equal(weight, before)
    weight.requires_grad_(True)
    learner.configure_optimizers(adamw)
    learner.step(*batches(1)[0])
    assert not torch.equal(weight, before)


def test_freezing_a_whole_module_is_said() -> None:
    learner = make_learner()
    for weight in learner.modules[1].parameters():
        weight.requires_grad_(False)
    with pytest.raises(RecipeError, match="all parameters of a local module were frozen"):
        train(learner, batches(1))


def test_parts_on_two_devices_are_refused() -> None:
    learner = LocalLearner(make(), modules=2, input_size=SIZE)
    learner.modules[0].objective.to("meta")
    learner._remember()
    with pytest.raises(DeviceError, match="local module 0: its weights are on cpu and meta"):
        learner.configure_optimizers(adamw)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_refused(mode: Any) -> None:
    learner = make_learner()
    images, labels = batches(1)[0]
    with mode(), pytest.raises(RecipeError, match=r"called under torch\.no_grad"):
        learner.step(images, labels)


# Modes -------------------------------------------------------------------------------------------------------------


def norms_of(learner: LocalLearner) -> list[_BatchNorm]:
    return [net for net in learner.model.modules() if isinstance(net, _BatchNorm)]


def copied_buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def resnet_learner(**more: Any) -> LocalLearner:
    return make_learner(make("resnet"), objective=GreedySupervised(classifier="linear"), **more)


@pytest.mark.parametrize("how", ["learner", "model", "evaluation"])
def test_norms_that_the_user_keeps_still_stay_so(how: str) -> None:
    learner = resnet_learner()
    frozen = norms_of(learner)[::2]
    moving = norms_of(learner)[1::2]
    for norm in frozen:
        norm.eval()
    before = [copied_buffers(norm) for norm in frozen]
    for _ in range(2):  # as a trainer's epochs
        learner.train()
        train(learner, batches(2))
        if how == "learner":
            learner.eval()
        elif how == "model":
            learner.model.eval()
        else:
            learner.eval()
            learner.logits(batches(1)[0][0])
            assert not any(net.training for net in learner.model.modules())
        train(learner, batches(1))
        assert not any(norm.training for norm in frozen)
        assert all(norm.training for norm in moving)
        assert all(module.training for module in learner.modules)
    assert_same([copied_buffers(norm) for norm in frozen], before)
    for norm in frozen:  # and back
        norm.train()
    train(learner, batches(1))
    learner.eval().train()
    assert all(net.training for net in learner.model.modules())


def test_the_models_own_train_is_the_users_choice() -> None:
    learner = resnet_learner()
    for norm in norms_of(learner):
        norm.eval()
    train(learner, batches(1))
    learner.eval()
    learner.model.train()  # PyTorch's: all of it
    norms_of(learner)[0].eval()
    train(learner, batches(1))
    assert [norm.training for norm in norms_of(learner)] == [False] + [True] * (len(norms_of(learner)) - 1)
    assert all(module.training for net in learner.modules for module in net.objective.modules())


def test_a_model_that_came_in_evaluation_mode_is_trained_in_training_mode() -> None:
    learner = make_learner(make("resnet").eval(), objective=GreedySupervised(classifier="linear"))
    train(learner, batches(1))
    assert all(net.training for net in learner.model.modules())


class Counting(nn.Module):
    """A block with state of its own: it counts calls, and keeps the last mean."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean = x.detach().mean()  # another tensor each time
        result: Tensor = self.block(x)
        return result


@pytest.mark.parametrize("globally", [False, True])
def test_a_frozen_modules_state_stays(globally: bool) -> None:
    learner = resnet_learner(freeze_from=0.5)
    learner.at(0.0)
    train(learner, batches(1))
    learner.at(0.5)
    step = learner.global_step if globally else learner.step
    before, others = copied(learner.modules[0]), copied(learner.modules[1].parts)
    for images, labels in batches(3):
        step(images, labels)
    assert_same(copied(learner.modules[0]), before)
    moved = [name for name, value in copied(learner.modules[1].parts).items() if not torch.equal(value, others[name])]
    assert any("running_mean" in name for name in moved)
    assert all(norm.training for norm in norms_of(learner))


def test_a_frozen_modules_own_buffers_stay() -> None:
    model: Any = make("vit")
    counting = model.blocks[0] = Counting(model.blocks[0])
    calls: Any = counting.calls
    learner = make_learner(model, freeze_from=0.5)
    learner.at(0.0)
    start = int(calls)
    train(learner, batches(2))
    assert int(calls) == start + 2
    learner.at(0.5)
    mean = counting.mean
    for number in range(3):
        train(learner, batches(1 + number))
        assert int(calls) == start + 2
        assert counting.mean is mean


def test_what_a_frozen_module_draws_goes_on() -> None:
    """Without batch norms a frozen module gives what it gave before: dropout and drop path included."""
    learner = make_learner(make(drop_path_rate=0.5, proj_drop_rate=0.3), freeze_from=0.0)
    images = batches(1)[0][0]
    step = steps_of(learner)[0]
    step.frozen = True
    batch = LocalBatch(images, batches(1)[0][1])
    given = step(images, batch).features
    step.frozen = False
    assert torch.equal(given, step(images, batch).features)


# Optimizers --------------------------------------------------------------------------------------------------------


class Sam(torch.optim.SGD):
    """As sharpness-aware minimisation is usually written."""

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Asks(torch.optim.SGD):
    """Needs a closure, and says so only when it is asked to step."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "requires closure"


class Twice(torch.optim.SGD):
    """What PyTorch only warns of: one parameter twice in a group."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["params"].append(params[0])


def test_what_a_factory_returns_is_looked_at() -> None:
    model = make()
    learner = LocalLearner(model, modules=3, input_size=SIZE)
    from timm.optim import create_optimizer_v2

    once = torch.optim.SGD(model.parameters(), lr=0.1)

    def scheduler(params: list[nn.Parameter]) -> Any:
        return torch.optim.lr_scheduler.StepLR(torch.optim.SGD(params, lr=0.1), 1)

    cases: list[tuple[Any, str]] = [
        (lambda params: create_optimizer_v2(model, "sgd", lr=0.1), r"wasn't given \(.* parameters, such as .*params"),
        (lambda params: torch.optim.SGD(model.parameters(), lr=0.1), "not of model.parameters()"),
        (lambda params: once, "over what it wasn't given"),
        (lambda params: torch.optim.SGD(params[1:], lr=0.1), "leaves out 1 parameters, such as "),
        (lambda params: torch.optim.SGD([p for p in params if p.ndim > 1], lr=0.1), "leaves out .* freeze those"),
        (lambda params: torch.optim.SGD([*params, nn.Parameter(torch.ones(1))], lr=0.1), "one of no local module"),
        (scheduler, "returned StepLR, not an optimizer; write configure_optimizers"),
        (lambda params: None, "returned NoneType, not an optimizer"),
        (lambda params: torch.optim.AdamW, "returned the class AdamW, not an optimizer"),
        (torch.optim.LBFGS, "LBFGS, whose step needs a closure"),
        (lambda params: create_optimizer_v2(params, "adahessian", lr=0.1), "needs second gradients"),
        (lambda params: Sam(params, lr=0.1), "two backward passes"),
        (lambda params: torch.optim.SparseAdam(params, lr=0.1), "needs sparse gradients"),
        (lambda params: torch.optim.Adam(params, lr=0.1, differentiable=True), "needs a graph of its own"),
        (lambda params: torch.optim.SGD(params, lr=float("nan")), "SGD with lr=nan"),
        (lambda params: torch.optim.SGD(params, lr=float("inf")), "SGD with lr=inf"),
        (
            lambda params: torch.optim.SGD(
                [{"params": params[:1]}, {"params": params[1:], "weight_decay": float("nan")}], lr=0.1
            ),
            "SGD with weight_decay=nan",
        ),
        (Twice, "Twice that holds a parameter twice"),
        (once, "got SGD, not a factory or a list of them"),
        ([adamw, once, adamw], "got list, not a factory"),
        ([adamw], "1 optimizer factories were given for 3 local modules"),
    ]
    for factory, message in cases:
        with pytest.raises(RecipeError, match=message):
            learner.configure_optimizers(factory)
        assert learner.optimizers == ()
        assert learner.optimizer_factory is None
    for good in (torch.optim.AdamW, lambda params: create_optimizer_v2(params, "lamb", lr=0.1), [adamw] * 3):
        learner.configure_optimizers(good)
        train(learner, batches(1))


def give_to_another(learner: LocalLearner) -> None:
    learner.optimizers[0].add_param_group({"params": list(learner.model.get_submodule("head").parameters())})


CHANGED_OPTIMIZERS: dict[str, tuple[Callable[[LocalLearner], object], str]] = {
    "two hold it": (give_to_another, "2 parameters that aren't the module's were added to it"),
    "a group is gone": (lambda learner: learner.optimizers[1].param_groups.pop(), "taken out of its optimizer"),
    "none is left": (lambda learner: learner.optimizers[0].param_groups.clear(), "taken out of its optimizer"),
    "one is gone": (lambda learner: learner.optimizers[2].param_groups[0]["params"].pop(), "taken out of its"),
}


@pytest.mark.parametrize("how", CHANGED_OPTIMIZERS)
def test_what_an_optimizer_holds_is_looked_at_before_each_step(how: str) -> None:
    change, message = CHANGED_OPTIMIZERS[how]
    learner = make_learner()
    train(learner, batches(1))
    change(learner)
    for step in (learner.step, learner.global_step):
        with pytest.raises(RecipeError, match=message):
            step(*batches(1)[0])
    learner.configure_optimizers(adamw)
    train(learner, batches(1))


def test_a_copied_learners_optimizers_hold_what_they_should() -> None:
    learner = make_learner()
    train(learner, batches(1))
    twin = copy.deepcopy(learner)
    twin.load_state_dict(learner.state_dict())
    train(twin, batches(1))


def test_a_failed_configuration_leaves_the_one_before() -> None:
    learner = make_learner()
    held = learner.optimizers
    with pytest.raises(RecipeError, match="leaves out"):
        learner.configure_optimizers(lambda params: torch.optim.SGD(params[1:], lr=0.1))
    assert learner.optimizers == held
    train(learner, batches(1))


def test_who_recovers_from_lost_memory_is_kept_by_new_optimizers() -> None:
    learner = make_learner()
    learner.on_out_of_memory(lambda module: False)
    before = learner._executor
    learner.configure_optimizers(adamw)
    assert before is not None
    assert learner._executor is not None
    assert learner._executor is not before
    assert learner._executor.recover is before.recover


def test_an_optimizers_own_complaint_is_one_line() -> None:
    learner = make_learner(optimizer=lambda params: Asks(params, lr=0.1))
    with pytest.raises(RecipeError, match=r"the step of Asks failed \(requires closure"):
        learner.step(*batches(1)[0])
    with pytest.raises(RecipeError, match="the step of Asks failed"):
        learner.global_step(*batches(1)[0])


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_a_scheduler_over_some_optimizers_is_refused(kind: str) -> None:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    def attach(optimizer: torch.optim.Optimizer) -> object:
        if kind == "timm":
            return CosineLRScheduler(optimizer, t_initial=10)
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    learner = make_learner()
    train(learner, batches(1))
    kept = [attach(learner.optimizers[0])]
    with pytest.raises(RecipeError, match=r"attached to 1 of 3 optimizers, and none to that of local module 1"):
        train(learner, batches(1))
    kept += [attach(optimizer) for optimizer in learner.optimizers[1:]]
    train(learner, batches(1))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["torch", "timm", "a tensor's"])
def test_a_scheduler_of_optimizers_that_were_replaced_is_refused(kind: str) -> None:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    def in_tensors(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=torch.tensor(1e-3), foreach=False)

    learner = make_learner(optimizer=in_tensors if kind == "a tensor's" else adamw)
    kept: list[Any] = [
        CosineLRScheduler(each, t_initial=10) if kind == "timm" else torch.optim.lr_scheduler.StepLR(each, 1)
        for each in learner.optimizers
    ]
    train(learner, batches(1))
    learner.configure_optimizers(adamw)
    train(learner, batches(1))  # whoever made them may have dropped them
    before = copy.deepcopy(learner.state_dict())
    for number, each in enumerate(kept):
        each.step(number + 1) if kind == "timm" else each.step()
    with pytest.raises(RecipeError, match="goes on with an optimizer that configure_optimizers replaced"):
        train(learner, batches(1))
    assert_same(learner.state_dict(), before)
    train(copy.deepcopy(learner), batches(1))  # of which nobody has one
    del kept, each
    gc.collect()
    train(learner, batches(1))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, "1"])
def test_a_clipping_norm_is_a_number(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"clip_grad must be a number above 0, got .*leave it out"):
        LocalLearner(make(), modules=2, input_size=SIZE, clip_grad=value)


# Images and labels -------------------------------------------------------------------------------------------------

IMAGES, LABELS = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def with_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.flatten()[-1] = value
    return changed


BAD_BATCHES: dict[str, tuple[Any, Any, str]] = {
    "NaN": (with_value(IMAGES, float("nan")), LABELS, "images: number 3 has values that are NaN or infinite"),
    "infinite": (with_value(IMAGES, float("inf")), LABELS, "NaN or infinite"),
    "raw": ((IMAGES * 50).byte(), LABELS, r"images: got torch\.uint8; pass floats, normalised"),
    "double": (IMAGES.double(), LABELS, r"images: got torch\.float64, the model is torch\.float32; pass images\.to"),
    "half": (IMAGES.half(), LABELS, r"images: got torch\.float16"),
    "elsewhere": (IMAGES.to("meta"), LABELS, "images: they are on meta, the model trains on cpu"),
    "size": (IMAGES[..., :16], LABELS, r"images: got \[4, 3, 32, 16\]"),
    "one image": (IMAGES[0], LABELS, r"images: got \[3, 32, 32\]"),
    "empty": (IMAGES[:0], LABELS[:0], "images: got an empty batch"),
    "graph": (IMAGES.clone().requires_grad_(), LABELS, r"pass images\.detach\(\)"),
    "fewer labels": (IMAGES, LABELS[:3], "labels: got 3 for 4 images"),
    "fewer images": (IMAGES[:3], LABELS, "labels: got 4 for 3 images"),
    "beyond": (IMAGES, with_value(LABELS, 5), "labels: that of image 3 is 5; they go from 0 to 4"),
    "negative": (IMAGES, with_value(LABELS, -1), "labels: that of image 3 is -1"),
    "overflown": (IMAGES, with_value(LABELS, 2**62), "labels: that of image 3 is 4611686018427387904"),
    "all ignored": (IMAGES, torch.full((4,), -100), "labels: all are -100, ignored"),
    "int32": (IMAGES, LABELS.int(), r"labels: got torch\.int32; .* labels\.long\(\)"),
    "uint8": (IMAGES, LABELS.byte(), r"labels: got torch\.uint8"),
    "bool": (IMAGES, LABELS > 1, r"labels: got torch\.bool"),
    "column": (IMAGES, LABELS[:, None], r"labels: got \[4, 1\]; .* labels\.squeeze\(1\)"),
    "integers one-hot": (IMAGES, F.one_hot(LABELS, 5), r"labels: got torch\.int64 \[4, 5\].*labels\.float\(\)"),
    "floats": (IMAGES, LABELS.float(), r"labels: got torch\.float32 \[4\]; class indices are int64"),
    "array": (IMAGES.numpy(), LABELS, r"images: got ndarray; pass a tensor: torch\.as_tensor\(images\)"),
    "list": (IMAGES, [0, 1, 2, 3], "labels: got list; pass a tensor"),
    "no labels": (IMAGES, None, "labels: got None; pass class indices int64"),
    "sparse": (IMAGES.to_sparse(), LABELS, r"images: got a tensor that is torch\.sparse_coo; .*to_dense"),
    "nested": (torch.nested.nested_tensor([*IMAGES], layout=torch.jagged), LABELS, "images: got a tensor that is nest"),
    "labels with a graph": (IMAGES, torch.zeros(4, 5, requires_grad=True).softmax(1), r"pass labels\.detach\(\)"),
    "scalar": (IMAGES, LABELS[0], r"labels: got torch\.int64 \[\]"),
    "other classes": (IMAGES, torch.full((4, 6), 1 / 6), r"labels: got soft labels \[4, 6\]; the model takes \[B, 5\]"),
    "labels elsewhere": (IMAGES, LABELS.to("meta"), "labels: they are on meta, the images on cpu"),
    "multi-hot": (IMAGES, torch.ones(4, 5), r"labels: row 0 is \[1, 1, 1, 1, 1\]; soft labels are probabilities"),
    "negative row": (IMAGES, torch.tensor([[1.5, -0.5, 0, 0, 0]] * 4), "labels: row 0 is"),
    "NaN row": (IMAGES, torch.full((4, 5), float("nan")), "labels: row 0 is"),
    "empty row": (IMAGES, torch.zeros(4, 5), "labels: row 0 is"),
}


def test_a_bad_batch_is_one_line_and_changes_nothing() -> None:
    learner = make_learner()
    before = copied(learner.model)
    for name, (images, labels, message) in BAD_BATCHES.items():
        for step in (learner.step, learner.global_step):
            with pytest.raises(LocalgradError, match=message) as caught:
                step(images, labels)
            assert isinstance(caught.value, ValueError), name
            assert "\n" not in str(caught.value), name
    assert learner.num_steps == 0
    assert_same(copied(learner.model), before)
    learner.step(IMAGES, LABELS)  # values were not taken for seen


@pytest.mark.parametrize("value", [5, -1])
def test_labels_of_no_class_are_one_line_in_later_steps_too(value: int) -> None:
    learner = make_learner()
    learner.step(IMAGES, LABELS)
    for step in (learner.step, learner.global_step):
        with pytest.raises(DataError, match=f"labels: that of image 3 is {value}; they go from 0 to 4") as caught:
            step(IMAGES, with_value(LABELS, value))
        assert "wasn't finished" in caught.value.__notes__[0]


def test_images_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        images = torch.randn(4, *SIZE)
    with pytest.raises(RecipeError, match=r"made under torch\.inference_mode\(\).*images\.clone\(\)"):
        make_learner().step(images, LABELS)


def test_good_batches_stay_good() -> None:
    learner = make_learner()
    for labels in (LABELS, with_value(LABELS, -100), F.one_hot(LABELS, 5).float(), torch.full((4, 5), 0.2).double()):
        learner.configure_optimizers(adamw)
        learner.step(IMAGES, labels)
    mixed = make_learner(precision="bf16")
    for images in (IMAGES, IMAGES.bfloat16(), IMAGES.half()):
        mixed.step(images, LABELS)


def test_values_are_read_in_the_first_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda tensor: calls.append(1) or isfinite(tensor))
    learner = make_learner()
    train(learner, batches(3))
    assert len(calls) == 1
    learner.configure_optimizers(adamw)
    train(learner, batches(2))
    assert len(calls) == 2


def test_one_class_is_nothing_to_learn() -> None:
    with pytest.raises(BackboneError, match="num_classes=1, and the cross-entropy of one class is always 0"):
        LocalLearner(make(num_classes=1), modules=2, input_size=SIZE)


# Ignored labels ----------------------------------------------------------------------------------------------------


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def ignoring(*kept: int, count: int = 8) -> Tensor:
    labels = torch.arange(count) % 5
    labels[[number for number in range(count) if number not in kept]] = -100
    return labels


@pytest.mark.few(4)
@pytest.mark.parametrize("globally", [False, True])
@pytest.mark.parametrize(
    "objective", [FeatureReconstruction(), FeatureReconstruction(label_smoothing=0.1, task_weight=0.5)], ids=str
)
@pytest.mark.parametrize("labels", [ignoring(0, 1, 4), ignoring(7), ignoring(*range(8))], ids=str)
def test_accumulation_is_the_mean_over_labels_that_count(labels: Tensor, objective: Any, globally: bool) -> None:
    images = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(2))
    found, results = [], []
    for accumulation in (1, 4, 3):
        learner = make_learner(optimizer=sgd, objective=objective, accumulation=accumulation)
        step = learner.global_step if globally else learner.step
        results.append(step(images, labels))
        found.append(copied(learner.model))
    for weights, result in zip(found[1:], results[1:], strict=True):
        torch.testing.assert_close(weights, found[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.losses, results[0].losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.terms, results[0].terms, rtol=1e-5, atol=1e-6)
        assert all(value.isfinite().all() for value in weights.values())


def test_parts_divide_sums_by_what_the_whole_batch_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(10, 5, generator=generator, requires_grad=True), torch.arange(10) % 5
    labels[3] = -100
    term = TaskLoss(nn.Identity(), 0.1)
    for count in (2, 3, 4, 7):
        parts = LocalBatch(None, labels).parts(count)
        for part, chunk in zip(parts, logits.chunk(count), strict=True):
            assert part.share == len(part.labels) / 10
            value = term(chunk, chunk, part)
            assert value.is_share
            plain = F.cross_entropy(chunk, part.labels, label_smoothing=0.1, reduction="sum") / torch.tensor(9)
            assert torch.equal(value.loss, plain)
            gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (value.loss, plain)]
            assert torch.equal(*gradients)
    for batch in (
        LocalBatch(None, F.one_hot(labels.clamp(min=0), 5).float()),
        LocalBatch(None, labels, counts_all=True),
    ):
        assert [part.labels_counted for part in batch.parts(2)] == [None, None]
        assert not term(logits[:5], logits[:5], batch.parts(2)[0]).is_share
    assert LocalBatch(None, labels).parts(1)[0].share is None


def test_what_parts_are_divided_by_is_computed_once_for_all_modules() -> None:
    batch = LocalBatch(None, ignoring(0, 1, 4))
    first, second = (part.labels_counted for part in batch.parts(2))
    assert first is second is batch.parts(4)[0].labels_counted
    assert first == 3


@pytest.mark.parametrize("kind", [SupervisedContrastive, SimilarityMatching])
def test_images_without_a_label_have_no_part_in_comparisons(kind: Any) -> None:
    layout = localgrad.Layout(kind="tokens", width=12, grid=(2, 2))
    torch.manual_seed(0)
    term = kind(layout, 5)
    features = torch.randn(6, 4, 12)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    alone = term(features, features, LocalBatch(None, labels)).loss
    more = torch.cat([features, torch.randn(3, 4, 12)]).requires_grad_()
    among = term(more, more, LocalBatch(None, F.pad(labels, (0, 3), value=-100))).loss
    torch.testing.assert_close(among, alone, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(among, more)
    assert torch.equal(gradient[6:], torch.zeros(3, 4, 12))
    assert gradient[:6].abs().sum() > 0
    for labels in (torch.full((6,), -100), torch.tensor([0, *[-100] * 5])):
        inputs = features.clone().requires_grad_()
        loss = term(inputs, inputs, LocalBatch(None, labels)).loss
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, inputs)[0]).all()


def test_a_run_on_unlabelled_images_stays_finite() -> None:
    objective = Contrastive(similarity_weight=0.5)
    learner = make_learner(objective=objective, accumulation=2)
    images = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(2))
    for labels in (ignoring(0, 1, 4), ignoring(5, 6)):
        assert all(torch.isfinite(loss) for loss in learner.step(images, labels).losses)


# Failed steps ------------------------------------------------------------------------------------------------------


def test_a_step_begins_with_cleared_gradients() -> None:
    learner, clean = make_learner(clip_grad=1.0), make_learner(clip_grad=1.0)
    images, labels = batches(1)[0]
    for step, plain in ((learner.step, clean.step), (learner.global_step, clean.global_step)):
        F.cross_entropy(learner.model(images), labels).backward()
        torch.manual_seed(0)
        step(images, labels)
        torch.manual_seed(0)
        plain(images, labels)
        assert_same(copied(learner.model), copied(clean.model))
        assert all(weight.grad is None for weight in learner.model.parameters())


class Stops(nn.Module):
    """Fails in its forward pass or in its backward pass while it is armed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.armed: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        if self.armed == "forward":
            raise KeyboardInterrupt
        if self.armed == "backward":
            result.register_hook(self._stop)
        return result

    def _stop(self, gradient: Tensor) -> None:
        raise ValueError("stopped")


@pytest.mark.few(1)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}, {"offload": True}], ids=str)
def test_a_step_after_a_failed_one(where: str, first: bool, settings: dict[str, Any]) -> None:
    """In the first module nothing has happened; later on the error says which modules were updated."""
    made: list[LocalLearner] = []
    for _ in range(2):
        model: Any = make(drop_path_rate=0.3)
        number = 0 if first else 3
        model.blocks[number] = Stops(model.blocks[number])
        made.append(make_learner(model, modules=(1, 3), ema_decay=0.9, **settings))
    learner, clean = made
    data = batches(3)
    for each in made:
        each.step(*data[0])
    stops: Any = learner.model.get_submodule(f"blocks.{0 if first else 3}")
    stops.armed = where
    with pytest.raises((KeyboardInterrupt, ValueError)) as caught:
        learner.step(*data[1])
    stops.armed = None
    note = caught.value.__notes__[-1]
    assert learner.num_steps == 1
    if first:
        assert "no weights were updated" in note
        for each in made:
            torch.manual_seed(3)
            each.step(*data[2])
        assert_same(learner.state_dict(), clean.state_dict())
    else:
        assert "weights of local modules 0, 1 were updated, the others weren't" in note
        assert all(torch.isfinite(loss) for loss in learner.step(*data[2]).losses)


@pytest.mark.parametrize("globally", [False, True])
def test_a_scaler_survives_an_update_that_was_interrupted(globally: bool) -> None:
    class Interrupted(torch.optim.SGD):
        armed = False

        def step(self, closure: Any = None) -> Any:
            if self.armed:
                raise KeyboardInterrupt
            return super().step(closure)

    learner = make_learner(optimizer=lambda params: Interrupted(params, lr=0.1), precision="fp16", clip_grad=1.0)
    step = learner.global_step if globally else learner.step
    step(*batches(1)[0])
    Interrupted.armed = True
    with pytest.raises(KeyboardInterrupt) as caught:
        step(*batches(1)[0])
    assert "perhaps in part" in caught.value.__notes__[-1]
    Interrupted.armed = False
    result = step(*batches(1)[0])
    assert torch.isfinite(result.losses[-1])


# Options of another kind ---------------------------------------------------------------------------------------------


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"freeze_from": "0.5"}, "freeze_from must be a share of the training, from 0 to 1, got '0.5'"),
    ({"ema_decay": "0.9"}, "ema_decay must lie between 0 and 1, got '0.9'"),
    ({"accumulation": "2"}, "accumulation must be at least 1, a whole number of parts, got '2'"),
    ({"accumulation": 1.5}, "accumulation must be at least 1, a whole number of parts, got 1.5"),
    ({"accumulation": True}, "accumulation must be at least 1, a whole number of parts, got True"),
    ({"freeze_from": False}, "freeze_from must be a share of the training, from 0 to 1, got False"),
    ({"clip_grad": [1.0]}, r"clip_grad must be a number above 0, got \[1.0\]"),
    ({"objective": GreedySupervised(context=True)}, "context must be .* got True"),
    ({"objective": GreedySupervised(task_weight=True)}, "weight of 'task' is True"),
    ({"objective": GreedySupervised(over_time=cast(Any, None))}, "over_time: got None; give a dict"),
    ({"objective": GreedySupervised(classifier_options=cast(Any, None))}, "classifier_options: got None; give a dict"),
    (
        {
            "objective": ImageReconstruction(
                reconstruction_error="bce", pixel_mean=cast(Any, 0.5), pixel_std=cast(Any, 0.5)
            )
        },
        "pixel_mean",
    ),
    ({"objective": "gredy"}, "objective: unknown 'gredy'.* Nearest: greedy"),
    ({"objective": GreedySupervised}, "objective: got <class .*GreedySupervised'>, not an objective"),
    ({"objective": GreedySupervised(label_smoothing=cast(Any, "0.1"))}, "label_smoothing must be .* got '0.1'"),
    ({"objective": Contrastive(temperature=cast(Any, "a"))}, "temperature .* must be above 0, got 'a'"),
    ({"objective": GreedySupervised(context=cast(Any, [0.5]))}, r"context must be .* got \[0.5\]"),
    ({"objective": GreedySupervised(over_time={"task": (0.0, 0.0)})}, "nothing to learn: every weight"),
]


@pytest.mark.parametrize("checkpoint", [None, 2])
def test_what_is_no_checkpointing_is_one_line(checkpoint: Any) -> None:
    with pytest.raises(PartitionError, match=f"checkpoint: '{checkpoint}' can't be read; take none, blocks"):
        LocalLearner(make(), modules=2, input_size=SIZE, checkpoint=checkpoint)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_options_that_are_no_numbers_are_one_line(number: int) -> None:
    settings, message = OPTIONS[number]
    with pytest.raises(RecipeError, match=message):
        LocalLearner(make(), modules=2, input_size=SIZE, **settings)


def test_parts_are_a_list() -> None:
    with pytest.raises(RecipeError, match="step_parts: got a Tensor; give a list of parts"):
        make_learner().step_parts(cast(Any, batches(1)[0][0]))


def test_progress_is_a_share_of_the_training() -> None:
    learner = make_learner(objective=GreedySupervised(classifier="linear", over_time={"task": (1.0, 0.5)}))
    for progress in (float("nan"), -0.1, 1.5, "1"):
        with pytest.raises(RecipeError, match="progress is a share of the training, from 0 to 1, got"):
            learner.at(cast(Any, progress))
    learner.at(1)
    with pytest.raises(DataError, match="labels: got None"):
        learner.step(batches(1)[0][0], cast(Any, None))
    train(learner, batches(1))
