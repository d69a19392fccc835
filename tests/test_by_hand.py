"""Backbones that somebody wrote down: proved where there is a model, used like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import localgrad
from helpers import adamw
from localgrad.backbones.base import split
from localgrad.backbones.by_hand import default_size_of_parts
from localgrad.errors import BackboneError

SIZE = (3, 32, 32)
TOKENS = localgrad.Layout(kind="tokens", width=16, grid=(4, 4), num_prefix_tokens=1)


class Block(nn.Module):
    """A residual MLP, with batch statistics, over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.BatchNorm1d(width), nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mlp(self.norm(tokens.transpose(1, 2)).transpose(1, 2))


class Net(nn.Module):
    """As people write them: parameters and a buffer of its own, a class token, blocks, norm, head."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(width))  # for another task
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(patches), -1, -1), patches], dim=1) * self.scale

    def logits(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(tokens)[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.logits(tokens)


class Embed(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.embed, self.token = net.embed, net.token
        self.register_buffer("scale", net.scale)

    forward = Net.tokens


class Head(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.norm, self.head = net.norm, net.head

    forward = Net.logits


class HeadWithoutNorm(Head):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(tokens[:, 0])


class WritingBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(tokens.mul_(1.0))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def by_hand(net: Net, **changes: Any) -> localgrad.Backbone:
    parts: dict[str, Any] = {"stem": Embed(net), "blocks": net.blocks, "tail": Head(net)}
    return localgrad.Backbone(**{**parts, "input_size": SIZE, "model": net, **changes})


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % 5


def test_the_size_of_images_is_found_where_it_can_be() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=24, num_heads=2, num_classes=5)
    found = split(model, (3, 48, 48))
    plain = nn.Sequential(nn.Conv2d(2, 8, 32, stride=32), nn.Flatten(2))
    assert default_size_of_parts(found.stem, model) == (3, 48, 48)
    assert default_size_of_parts(plain, None) == (2, 224, 224)
    assert default_size_of_parts(nn.Flatten(), None) == (3, 224, 224)


def test_what_is_not_given_is_found(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    backbone = by_hand(net)
    assert backbone.layouts == (TOKENS,) * 5
    assert backbone.block_names == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert (backbone.num_classes, backbone.input_size, backbone.stage_boundaries) == (5, SIZE, ())
    assert torch.equal(backbone(images()), net(images()))
    assert {id(weight) for weight in backbone.parameters()} == {id(weight) for weight in net.parameters()}
    assert all(module.training for module in backbone.modules())
    fresh = Net()
    fresh.load_state_dict(before)
    with torch.no_grad():
        by_hand(fresh)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_stages_begin_where_the_grid_changes() -> None:
    blocks = [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 2, 2), nn.Conv2d(16, 16, 3, padding=1)]
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    stem = nn.Conv2d(3, 8, 4, 4)
    model = nn.Sequential(stem, *blocks, tail)
    backbone = localgrad.Backbone(stem=stem, blocks=blocks, tail=tail, model=model, input_size=SIZE)
    assert [layout.grid for layout in backbone.layouts] == [(8, 8), (8, 8), (4, 4), (4, 4)]
    assert backbone.stage_boundaries == (2,)


WRONG: dict[str, tuple[Callable[[Net], dict[str, Any]], str]] = {
    "reversed blocks": (lambda net: {"blocks": list(net.blocks)[::-1]}, "other features than the model"),
    "a forgotten first block": (lambda net: {"blocks": net.blocks[1:]}, r"In no part: .*blocks\.0\."),
    "a forgotten last block": (lambda net: {"blocks": net.blocks[:-1]}, r"In no part: .*blocks\.3\."),
    "a tail without its norm": (lambda net: {"tail": HeadWithoutNorm(net)}, "other logits than the model"),
    "a block of another model": (lambda _: {"blocks": Net().blocks}, r"blocks\[0\]: .* none of the model's"),
    "a number for a part": (lambda _: {"stem": 3}, "stem: got 3"),
    "a number for blocks": (lambda _: {"blocks": 3}, "blocks: got 3"),
    "no blocks": (lambda _: {"blocks": []}, "blocks: there is none"),
    "a number for a size": (lambda _: {"input_size": 32}, "input_size is .* got 32"),
    "a size that doesn't fit": (lambda _: {"input_size": (1, 32, 32)}, r"stem: it can't run on \[2, 1, 32, 32\]"),
    "a tail that gives no logits": (lambda net: {"tail": net.head}, r"tail: for two images it gave \[2, 17, 5\]"),
    "a wrong layout": (lambda _: {"layouts": localgrad.Layout("tokens", 16, (4, 4))}, "layouts: .*blocks.0. says"),
    "too few layouts": (lambda _: {"layouts": [TOKENS]}, "layouts: got 1 for 4 blocks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_the_model_is_refused(net: Net, case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(BackboneError, match=message):
        by_hand(net, **change(net))


def test_a_part_that_fails_in_training_is_told(net: Net) -> None:
    class Failing(Head):
        def forward(self, tokens: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("only for evaluation")
            return super().forward(tokens)

    with pytest.raises(BackboneError, match=r"don't train .only for evaluation"):
        by_hand(net, tail=Failing(net))


def test_a_gradient_that_is_lost_is_seen(net: Net) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Head(net)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(tokens.detach())

    with pytest.raises(BackboneError, match="gets another gradient"):
        by_hand(net, tail=Cut())


def test_without_a_model_it_is_said_that_nothing_was_compared(net: Net) -> None:
    net.mask_token.requires_grad_(requires_grad=False)
    with pytest.warns(UserWarning, match="compared with nothing"):
        backbone = by_hand(net, model=None)
    assert list(backbone.model.state_dict())[:2] == ["stem.token", "stem.scale"]
    with pytest.raises(BackboneError, match=r"nothing depends on tail\.norm\.bias"):
        by_hand(net, model=None, tail=HeadWithoutNorm(net))
    by_hand(net, model=None, tail=HeadWithoutNorm(net), proved=False)  # as one wishes


def test_a_proof_can_be_repeated(net: Net) -> None:
    backbone = by_hand(net)
    backbone.prove()
    backbone.blocks[1], backbone.blocks[2] = backbone.blocks[2], backbone.blocks[1]
    with pytest.raises(BackboneError, match="other features"):
        backbone.prove()


@pytest.mark.parametrize("proved", [True, False])
def test_a_block_that_writes_into_its_input_gets_a_copy(net: Net, proved: bool) -> None:
    blocks = [net.blocks[0], WritingBlock(net.blocks[1]), net.blocks[2], net.blocks[3]]
    backbone = by_hand(net, blocks=blocks, proved=proved)
    features = backbone.example(1)
    kept = features.clone()
    with torch.no_grad():
        features[:, :1] = kept[:, :1] = -0.0  # what even a factor of one may not write
        version = features._version
        backbone.blocks[1](features)
    assert features._version == version


def step(backbone: nn.Module, **settings: Any) -> list[float]:
    torch.manual_seed(3)
    learner = localgrad.LocalLearner(backbone, **{"modules": 2, **settings})
    learner.configure_optimizers(adamw)
    learner.step(images(), labels())
    return [float(loss) for loss in learner.step(images(), labels()).losses]


def test_it_trains_in_every_way_that_a_split_model_does(net: Net) -> None:
    start = copy.deepcopy(net.state_dict())

    def losses(**settings: Any) -> list[float]:
        net.load_state_dict(start)
        return step(by_hand(net), **settings)

    plain = losses()
    assert losses(offload=True) == plain
    assert losses(checkpoint="blocks") == plain
    blocks = losses(objective=localgrad.FeatureReconstruction(reconstruct="blocks"))
    assert blocks[0] != plain[0]


def test_one_module_is_plain_training(net: Net) -> None:
    plain = copy.deepcopy(net)
    learner = localgrad.LocalLearner(by_hand(net), modules=1)
    learner.configure_optimizers(adamw)
    optimizer = adamw(list(plain.parameters()))
    for _ in range(2):
        learner.step(images(), labels())
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(images()), labels()).backward()
        optimizer.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True))


def test_moving_takes_the_model_along(net: Net) -> None:
    backbone = by_hand(net).to(torch.float64)
    assert {tensor.dtype for name, tensor in net.state_dict().items() if "num_batches" not in name} == {torch.float64}
    assert torch.equal(backbone.eval()(images().double()), net(images().double()))


def test_in_16_bits_copies_are_proved(net: Net) -> None:
    backbone = by_hand(net.to(torch.bfloat16))
    assert net.head.weight.dtype == torch.bfloat16
    with pytest.raises(BackboneError, match="other features"):
        by_hand(net, blocks=list(net.blocks)[::-1])
    assert backbone.example(0).dtype == torch.bfloat16


@pytest.mark.heavy
def test_it_is_estimated_and_planned(cost_cache: object) -> None:
    backbone = by_hand(Net(depth=2))
    plan = localgrad.plan(backbone, batch_size=8, budget="2MiB", modules=2)
    learner = localgrad.LocalLearner(backbone, modules=plan)
    learner.configure_optimizers(adamw)
    assert localgrad.estimate(learner, 8).peak_bytes == plan.forecast.peak_bytes
    learner.step(images(8), labels(8))
