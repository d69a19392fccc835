"""The proof of a split: what it holds against each other, what it costs, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import localgrad
from localgrad.backbones.base import Backbone, split
from localgrad.backbones.fake import copy_on_host
from localgrad.backbones.proof import digest
from localgrad.backbones.state import left_as_it_was
from localgrad.compare.measuring import peak_of
from localgrad.errors import BackboneError

SIZE = (3, 32, 32)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
CONVIT = VIT | {"embed_dim": 8, "num_heads": 2, "local_up_to_layer": 2}


class Toy(nn.Module):
    """The smallest model with timm's shape."""

    num_classes = 5

    def __init__(self, *blocks: nn.Module, between: Any = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*(blocks or (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))))
        self.head = nn.Linear(8, 5)
        self.between = between

    def forward_features(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.forward_features(images)
        return self.forward_head(features if self.between is None else self.between(features))


class Seven(torch.autograd.Function):
    """The identity, whose gradient is seven times as long."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 7 * gradient


class Pool(nn.Module):
    """[B, D, H, W] -> [B, D]."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))


def by_hand(model: Toy) -> Backbone:
    """The parts of a toy, which leave out what it does between blocks and head."""
    tail = nn.Sequential(Pool(), model.head)
    return Backbone(stem=model.stem, blocks=model.blocks, tail=tail, input_size=SIZE, model=model)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


# What is proved


@pytest.mark.parametrize("name", ["convit_tiny", "convit_small"])
def test_a_table_made_at_the_first_call_is_made_by_the_parts_too(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **CONVIT)
    untouched = copy.deepcopy(model)
    backbone = split(model, SIZE)
    assert torch.equal(backbone.eval()(images()), untouched.eval()(images()))
    assert torch.equal(model.eval()(images()), untouched(images()))
    backbone.train()(images()).square().sum().backward()
    untouched.train()(images()).square().sum().backward()
    for (name_, ours), theirs in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert ours.grad is not None, name_
        assert torch.equal(ours.grad, theirs.grad), name_


@pytest.mark.parametrize("between", [torch.detach, Seven.apply])
@pytest.mark.parametrize("zero_head", [False, True])
def test_equal_logits_and_other_gradients_are_refused(between: Any, zero_head: bool) -> None:
    torch.manual_seed(0)
    model = Toy(between=between)
    if zero_head:
        nn.init.zeros_(model.head.weight)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BackboneError, match=r"gives? the model's logits, but .* gets another gradient"):
        by_hand(model)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_way_around_the_blocks_is_refused() -> None:
    class Around(Toy):
        def forward(self, images: Tensor) -> Tensor:
            features = self.stem(images)
            return self.forward_head(self.blocks(features) + (features - features.detach()))

    with pytest.raises(BackboneError, match="can't be split"):
        split(Around(), SIZE)


def test_a_frozen_model_is_proved_by_its_images() -> None:
    model = Toy(between=torch.detach).requires_grad_(False)
    with pytest.raises(BackboneError, match="the images gets another gradient"):
        by_hand(model)


def test_writing_into_a_parameter_is_refused() -> None:
    class Drifts(nn.Conv2d):
        def forward(self, features: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(1.0)
            return super().forward(features)

    with pytest.raises(BackboneError, match=r"writes into its parameter blocks\.1\.weight"):
        split(Toy(nn.Conv2d(8, 8, 1), Drifts(8, 8, 1)), SIZE)


def test_a_buffer_of_the_model_itself_that_is_replaced_is_refused_and_one_that_is_written_is_not() -> None:
    class Counts(Toy):
        def __init__(self, replaces: bool) -> None:
            super().__init__()
            self.replaces = replaces
            self.register_buffer("calls", torch.zeros(()))

        def forward_features(self, images: Tensor) -> Tensor:
            if self.replaces:
                self.calls = self.calls + 1
            else:
                self.calls += 1
            return super().forward_features(images)

    with pytest.raises(BackboneError, match=r"replaces its buffer calls.*self\.calls\.copy_"):
        split(Counts(replaces=True), SIZE)
    backbone = split(Counts(replaces=False), SIZE)
    assert backbone.model.calls == 0
    backbone(images())
    assert backbone.model.calls == 1


# What is left


class Leaves(nn.Conv2d):
    """A block that leaves traces of every kind."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(1), persistent=False)
        self.register_buffer("none", None)
        self.table = torch.zeros(2)
        self.seen: list[int] = []
        self.by_name: dict[str, Tensor] = {}
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.written += 1
        self.replaced = torch.ones(1, len(features))
        self.none = torch.ones(2)
        self.table.add_(1)
        self.seen.append(len(features))
        self.by_name[str(self.calls)] = features
        self.calls += 1
        self.new_attribute = features
        return super().forward(features) + random.random() + float(np.random.rand()) + torch.rand(())


def attributes(model: nn.Module) -> list[Any]:
    """All that can be seen of a model's modules: attributes by identity, and what is in containers."""
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            items = list(value.items()) if isinstance(value, dict) else value if isinstance(value, list) else None
            found.append(
                (name, id(value), items if items is None else [str(type(item)) + repr(item) for item in items])
            )
    return found


def test_model_and_random_states_are_what_they_were() -> None:
    torch.manual_seed(0)
    model = Toy(Leaves(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    model.blocks[1].eval()
    model.head.requires_grad_(False)
    model.stem.weight.grad = gradient = torch.ones_like(model.stem.weight)
    called = []
    model.stem.weight.register_post_accumulate_grad_hook(lambda weight: called.append("optimizer in backward"))
    hook = model.blocks[0].register_forward_hook(lambda *_: called.append("forward"))
    before, values = attributes(model), [t.clone() for t in model.state_dict().values()]
    random.seed(1)
    np.random.seed(1)
    states = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    buffers = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}

    split(model, SIZE)

    assert attributes(model) == before
    assert all(torch.equal(a, b) for a, b in zip(values, model.state_dict().values(), strict=True))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == {n: i for n, (i, _) in buffers.items()}
    assert all(torch.equal(buffer, buffers[name][1]) for name, buffer in model.named_buffers())
    assert torch.equal(model.blocks[0].table, torch.zeros(2))
    assert not hasattr(model.blocks[0], "new_attribute")
    assert model.stem.weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert (random.getstate(), str(np.random.get_state())) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert set(called) == {"forward"}
    assert hook.id in model.blocks[0]._forward_hooks


def test_a_refused_model_is_left_as_it_was_too() -> None:
    model = Toy(Leaves(), nn.Conv2d(8, 8, 1), between=torch.detach)
    before = attributes(model)
    with pytest.raises(BackboneError):
        by_hand(model)
    assert attributes(model) == before


def test_state_against_a_deep_copy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Leaves(), nn.BatchNorm2d(8))
    for _ in range(2):  # from the second time on there is something to have back
        model(torch.randn(2, 8, 4, 4))
        model.zero_grad()
        kept = copy.deepcopy({n: b.clone() for n, b in model.named_buffers()})
        with left_as_it_was(model) as state:
            model(torch.randn(3, 8, 4, 4))
            written = state.written_buffers(model)
        assert written >= {"0.written", "0.replaced", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
        assert kept.keys() == dict(model.named_buffers()).keys()
        assert all(torch.equal(value, dict(model.named_buffers())[name]) for name, value in kept.items())


def test_splitting_within_no_grad_and_inference_mode() -> None:
    torch.manual_seed(0)
    wrong, right = Toy(between=torch.detach), timm.create_model("vit_tiny_patch16_224", **VIT)
    for region in (torch.no_grad(), torch.inference_mode()):
        with region, pytest.raises(BackboneError, match="another gradient"):
            by_hand(wrong)
        with region:
            backbone = split(right, SIZE)
        backbone(images()).sum().backward()


# Where


def test_models_in_bfloat16_are_proved_by_a_copy_and_share_their_own_tensors() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=16,
                              depths=(2, 1), num_heads=(1, 2), num_classes=5).to(torch.bfloat16)  # fmt: skip
    model.layers[1].eval()
    before = attributes(model)
    backbone = split(model, SIZE)
    assert attributes(model) == before
    assert backbone.model is model
    assert {id(p) for p in backbone.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in backbone.buffers()} == {id(b) for b in model.buffers()}
    assert [model.get_submodule(name) for name in backbone.block_names] == list(backbone.blocks)
    assert not any(module.training != model.training for module in backbone.stem.modules())
    batch = images().bfloat16()
    assert torch.equal(backbone.eval()(batch), model(batch))
    with pytest.raises(BackboneError, match="another gradient"):
        by_hand(Toy(between=torch.detach).bfloat16())


def test_a_copy_on_the_host_keeps_ties_and_values() -> None:
    model = Toy().half()
    model.blocks[1].weight = model.blocks[0].weight
    model.blocks[0].weight.grad = torch.ones_like(model.blocks[0].weight)
    copied, pairs = copy_on_host(model)
    assert copied.blocks[1].weight is copied.blocks[0].weight
    assert copied.blocks[0].weight.dtype == torch.float32
    assert torch.equal(copied.head.weight.half(), model.head.weight)
    assert type(copied.head.weight) is nn.Parameter
    known = {id(twin): original for original, twin in pairs}
    assert all(known[id(twin)] is mine for twin, mine in zip(copied.parameters(), model.parameters(), strict=True))


# What it costs


@pytest.mark.heavy
def test_its_memory_stays_below_that_of_the_smallest_training_step() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=8, num_classes=5)
    splitting, _ = peak_of(lambda: split(model, (3, 224, 224)), torch.device("cpu"), [model])
    learner = localgrad.LocalLearner(model, modules=4, input_size=(3, 224, 224))
    learner.configure_optimizers(torch.optim.AdamW)
    batch = torch.randn(2, 3, 224, 224)
    labels = torch.tensor([0, 1])
    learner.step(batch, labels)
    held = [*learner.modules, *learner.optimizers]
    step, _ = peak_of(lambda: learner.step(batch, labels), torch.device("cpu"), held)
    assert splitting < step, (splitting, step)


@pytest.mark.heavy
def test_vit_tiny_is_proved_in_less_than_a_second() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(4):
            start = time.process_time()
            split(model, (3, 224, 224))
            seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 1, seconds


def test_digests_tell_bits_shapes_and_types_apart() -> None:
    base = torch.zeros(2, 3)
    others = [torch.zeros(3, 2), -base, base.double(), base + 1e-30, torch.zeros(2, 3, dtype=torch.complex64)]
    assert len({digest([tensor]) for tensor in [base, *others]}) == 6
    assert digest([base.T]) == digest([torch.zeros(3, 2)])
    assert digest([torch.tensor(float("nan"))]) == digest([torch.tensor(float("nan"))])
