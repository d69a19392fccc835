"""The mechanism of splitting: what it promises beside equal logits, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from localgrad.backbones.base import Layout, split
from localgrad.errors import BackboneError

SWIN = {
    "model_name": "swin_tiny_patch4_window7_224",
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (1, 2),
}
VIT = {
    "model_name": "vit_tiny_patch16_224",
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "img_size": 32,
    "patch_size": 8,
}
EVA = VIT | {"model_name": "eva02_tiny_patch14_224", "embed_dim": 32, "num_heads": 2}
RESNET = {"model_name": "resnet18", "channels": (8, 8, 16, 16)}
SIZE = (3, 32, 32)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make(kwargs: dict, **more: object) -> nn.Module:
    return timm.create_model(**({"num_classes": 5} | kwargs | more))


def images(size: tuple[int, int, int] = SIZE, count: int = 3) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def seeded(module: nn.Module, batch: Tensor) -> Tensor:
    torch.manual_seed(2)
    return module(batch)


# What a backbone is


def test_swin_blocks_are_timms_own_in_order() -> None:
    model = make(SWIN)
    backbone = split(model, SIZE)
    assert backbone.block_names == (
        *("layers.0.blocks.0", "layers.0.blocks.1"),
        *("layers.1.downsample", "layers.1.blocks.0"),
    )
    assert [model.get_submodule(name) for name in backbone.block_names] == list(backbone.blocks)
    assert backbone.stage_boundaries == (2,)
    assert [layout.grid for layout in backbone.layouts] == [(8, 8), (8, 8), (8, 8), (4, 4), (4, 4)]
    assert [layout.width for layout in backbone.layouts] == [16, 16, 16, 32, 32]
    assert {layout.kind for layout in backbone.layouts} == {"NHWC"}
    assert (backbone.input_size, backbone.num_classes) == (SIZE, 5)


def test_vit_layouts_count_class_and_register_tokens() -> None:
    backbone = split(make(VIT, reg_tokens=2), SIZE)
    assert set(backbone.layouts) == {Layout("tokens", 24, (4, 4), 3)}
    assert backbone.stage_boundaries == ()


def test_cait_class_token_appears_with_its_class_attention_blocks() -> None:
    backbone = split(make(VIT | {"model_name": "cait_xxs24_224"}), SIZE)
    assert backbone.block_names[3:] == ("blocks_token_only.0", "blocks_token_only.1")
    assert [layout.num_prefix_tokens for layout in backbone.layouts] == [0, 0, 0, 0, 1, 1]
    holders = [
        n for n, b in zip(backbone.block_names, backbone.blocks, strict=True) if owns(b, backbone.model.cls_token)
    ]
    assert holders == ["blocks_token_only.0"]


def owns(part: nn.Module, parameter: Tensor) -> bool:
    return any(parameter is mine for mine in part.parameters())


@pytest.mark.parametrize(
    "kwargs",
    [
        VIT | {"img_size": 16, "patch_size": 4},
        VIT | {"in_chans": 1},
        VIT | {"img_size": (16, 32)},
        VIT | {"patch_size": (4, 8)},
        SWIN | {"patch_size": 2, "in_chans": 1},
        SWIN | {"img_size": (32, 64), "embed_dim": 8},
        SWIN | {"embed_dim": 8},  # D = H = W at the first boundary
        EVA | {"img_size": 16, "patch_size": 4, "in_chans": 1},
        VIT | {"model_name": "beit_base_patch16_224", "img_size": 16, "patch_size": 4},
    ],
)
def test_image_patch_and_channel_variants(kwargs: dict) -> None:
    model = make(kwargs)
    height, width = kwargs["img_size"] if isinstance(kwargs["img_size"], tuple) else (kwargs["img_size"],) * 2
    size = (kwargs.get("in_chans", 3), height, width)
    backbone = split(model, size)
    assert torch.equal(backbone.eval()(images(size)), model(images(size)))
    patch = kwargs.get("patch_size", 4)
    patch = patch if isinstance(patch, tuple) else (patch, patch)
    assert backbone.layouts[0].grid == (height // patch[0], width // patch[1])
    assert backbone.layouts[0].width == kwargs["embed_dim"]
    assert backbone.layouts[0].kind == ("NHWC" if "swin" in kwargs["model_name"] else "tokens")


# Train mode, ownership and copies


@pytest.mark.parametrize("kwargs", [SWIN, VIT, EVA])
def test_drop_path_and_dropout_draw_the_same_random_numbers(kwargs: dict) -> None:
    model = make(kwargs, drop_path_rate=0.5, drop_rate=0.3, proj_drop_rate=0.2)
    backbone = split(model, SIZE).train()
    first, again = seeded(backbone, images()), seeded(backbone, images())
    assert torch.equal(first, seeded(model, images()))
    assert torch.equal(first, again)
    assert not torch.equal(first, backbone(images()))


def test_modes_reach_every_module_of_the_parts_and_of_the_model() -> None:
    model = make(VIT, drop_path_rate=0.5)
    backbone = split(model, SIZE)
    for mode in (False, True):
        backbone.train(mode)
        assert {m.training for m in backbone.modules()} == {m.training for m in model.modules()} == {mode}
    backbone.train()
    backbone.blocks[1].eval()
    assert not any(m.training for m in backbone.blocks[1].modules() if isinstance(m, DropPath))


def test_training_the_parts_trains_the_model() -> None:
    model = make(VIT)
    backbone = split(model, SIZE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    backbone(images()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    plain = make(VIT)
    plain.load_state_dict(backbone.model.state_dict())
    assert torch.equal(plain.eval()(images()), backbone.eval()(images()))


def test_unused_parameters_stay_with_the_tail() -> None:
    model = make(VIT)
    model.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 1, 24)))
    backbone = split(model, SIZE)
    assert owns(backbone.tail, model.mask_token)
    assert not owns(backbone.stem, model.mask_token)


def test_deepcopy_is_whole_and_apart() -> None:
    backbone = split(make(SWIN), SIZE)
    twin = copy.deepcopy(backbone)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in twin.model.parameters()}
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in backbone.parameters())
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert torch.equal(twin.eval()(images()), twin.model(images()))
    assert twin(images()).abs().sum() > 0


def test_pickle_round_trip() -> None:
    backbone = split(make(EVA), SIZE).eval()
    assert torch.equal(pickle.loads(pickle.dumps(backbone))(images()), backbone(images()))


@pytest.mark.few(1)
@pytest.mark.parametrize("kwargs", [SWIN, EVA, VIT | {"model_name": "xcit_nano_12_p16_224", "num_heads": 2}])
def test_a_copy_runs_on_fake_tensors(kwargs: dict) -> None:
    backbone = split(make(kwargs), SIZE)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(backbone)
    with mode:
        assert fake(torch.empty(2, *SIZE)).shape == (2, 5)
    assert {id(p) for p in fake.parameters()} == {id(p) for p in fake.model.parameters()}


@pytest.mark.parametrize("kwargs", [SWIN, VIT, EVA])
def test_moving_the_backbone_moves_the_model(kwargs: dict) -> None:
    backbone = split(make(kwargs), SIZE).eval().to(torch.float64)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float64}
    assert {id(p) for p in backbone.parameters()} == {id(p) for p in backbone.model.parameters()}
    batch = images().double()
    assert torch.equal(backbone(batch), backbone.model(batch))


def test_rope_is_computed_at_each_call() -> None:
    backbone = split(make(EVA), SIZE).eval()
    rope = backbone.model.rope
    before = backbone(images())
    for buffer in rope.buffers():
        buffer.mul_(0.5)
    assert not torch.equal(backbone(images()), before)
    assert torch.equal(backbone(images()), backbone.model(images()))


def test_model_is_left_as_it_was() -> None:
    model = make(RESNET).train()
    model.layer2.eval()  # frozen batch statistics
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random_state = torch.get_rng_state()
    backbone = split(model, SIZE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert backbone.stem.training


def test_checkpointing_flag_of_timm_does_not_matter() -> None:
    for kwargs in (SWIN, VIT, EVA):
        model = make(kwargs)
        model.set_grad_checkpointing()
        backbone = split(model, SIZE).eval()
        assert torch.equal(backbone(images()), model.set_grad_checkpointing(False) or model(images()))


# Layout


def test_layout_to_grid_and_prefix() -> None:
    grid = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert Layout("NHWC", 5, (3, 4)).to_grid(grid) is grid
    assert torch.equal(Layout("NCHW", 5, (3, 4)).to_grid(grid.permute(0, 3, 1, 2)), grid)
    tokens = torch.cat((torch.full((2, 2, 5), -1), grid.flatten(1, 2)), dim=1)
    layout = Layout("tokens", 5, (3, 4), num_prefix_tokens=2)
    assert torch.equal(layout.to_grid(tokens), grid)
    assert layout.to_grid(tokens)._base is tokens  # a view
    prefix = layout.prefix(tokens)
    assert prefix is not None
    assert prefix.shape == (2, 2, 5)
    assert (prefix == -1).all()
    assert Layout("NHWC", 5, (3, 4)).prefix(grid) is None


def test_layout_order_against_a_loop() -> None:
    order = (3, 0, 5, 1, 4, 2)
    tokens = torch.randn(2, 6, 7)
    expected = torch.empty(2, 6, 7)
    for token, place in enumerate(order):
        expected[:, place] = tokens[:, token]
    layout = Layout("tokens", 7, (2, 3), order=order)
    assert torch.equal(layout.to_grid(tokens), expected.view(2, 2, 3, 7))


# Sharing


def test_shared_parameter_across_a_boundary_is_refused() -> None:
    model = make(VIT)
    model.blocks[2].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    backbone = split(model, SIZE)
    backbone.check_boundaries(())
    with pytest.raises(BackboneError, match=r"blocks\.0\.mlp\.fc1\.weight is shared by blocks\.0, blocks\.2"):
        backbone.check_boundaries((1,))
    with pytest.raises(BackboneError, match="shared"):
        copy.deepcopy(backbone).check_boundaries((2,))


def test_shared_mixed_rope_is_refused_but_fixed_rope_is_not() -> None:
    split(make(EVA), SIZE).check_boundaries((1, 2))
    mixed = split(make(EVA | {"model_name": "vit_small_patch16_rope_mixed_224"}), SIZE)
    with pytest.raises(BackboneError, match=r"rope\."):
        mixed.check_boundaries((2,))


def test_shared_batch_statistics_are_refused() -> None:
    model = make(RESNET)
    for name in ("weight", "bias"):  # own scale and shift, shared statistics
        assert name in model.layer1[1].bn1._parameters
    for name in model.layer1[0].bn1._buffers:
        model.layer1[1].bn1._buffers[name] = model.layer1[0].bn1._buffers[name]
    backbone = split(model, SIZE)
    backbone.check_boundaries((2,))
    with pytest.raises(BackboneError, match="running_mean"):
        backbone.check_boundaries((1,))


# Refusals: the rule, the value, the next thing to do


def test_no_classifier() -> None:
    with pytest.raises(BackboneError, match="num_classes=N"):
        split(make(VIT, num_classes=0), SIZE)


def test_wrong_channels() -> None:
    with pytest.raises(BackboneError, match="in_chans=1"):
        split(make(VIT), (1, 32, 32))


@pytest.mark.parametrize("kwargs", [VIT, SWIN])
def test_wrong_image_size(kwargs: dict) -> None:
    with pytest.raises(BackboneError, match=r"input_size=\(3, 40, 40\).*img_size=40.*\(32 x 32\)"):
        split(make(kwargs), (3, 40, 40))


@pytest.mark.parametrize("size", [(32, 32), (3, 0, 32), (3, 32, 32, 32)])
def test_malformed_input_size(size: tuple) -> None:
    with pytest.raises(BackboneError, match="input_size"):
        split(make(VIT), size)


def test_a_name_is_not_a_model() -> None:
    with pytest.raises(BackboneError, match=r"timm\.create_model"):
        split("vit_tiny_patch16_224", SIZE)  # type: ignore[arg-type]


def test_meta_and_fake_models() -> None:
    with pytest.raises(BackboneError, match="real model"):
        split(make(VIT).to("meta"), SIZE)
    with FakeCopyMode(FakeTensorMode()):
        fake = copy.deepcopy(make(VIT))
    with pytest.raises(BackboneError, match="real model"):
        split(fake, SIZE)


def test_patch_dropout_leaves_no_grid() -> None:
    with pytest.raises(BackboneError, match="patch_drop_rate=0"):
        split(make(VIT, patch_drop_rate=0.5), SIZE)


def test_distilled_training_gives_two_logits() -> None:
    model = make(VIT | {"model_name": "deit_tiny_distilled_patch16_224"})
    model.set_distilled_training(True)
    with pytest.raises(BackboneError, match="returns 2 tensors"):
        split(model, SIZE)


def test_weights_that_are_not_numbers() -> None:
    model = make(VIT)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(BackboneError, match="not finite"):
        split(model, SIZE)


def test_frozen_arguments_refuse_another_grid() -> None:
    model = timm.create_model("xcit_nano_12_p16_224", embed_dim=16, depth=2, num_heads=2, num_classes=5)
    backbone = split(model, (3, 32, 64)).eval()
    with pytest.raises(BackboneError, match="split the model again"):
        backbone(images((3, 64, 64)))


@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "crossvit_tiny_240"])
def test_unknown_architectures_say_what_was_looked_for(name: str) -> None:
    model = timm.create_model(name, depth=[[1, 2, 0]]) if "cross" in name else timm.create_model(name, depth=2)
    with pytest.raises(BackboneError, match=r"can't be split: .*is given several features.*Give blocks,"):
        split(model, (3, 224, 224))


class Toy(nn.Module):
    """The smallest model with timm's shape; ``twist`` is what its forward does between blocks and head."""

    num_classes = 5

    def __init__(self, twist: object = nn.Identity()) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)
        self.twist = partial(twist) if not isinstance(twist, nn.Module) else twist

    def forward_features(self, batch: Tensor) -> Tensor:
        return self.blocks(self.stem(batch))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3)))

    def forward(self, batch: Tensor) -> Tensor:
        return self.forward_head(self.twist(self.forward_features(batch)))


def test_a_model_that_is_no_timm_model_but_shaped_like_one() -> None:
    model = Toy()
    backbone = split(model, SIZE)
    assert torch.equal(backbone(images()), model(images()))
    assert backbone.layouts[0] == Layout("NCHW", 8, (8, 8))


@pytest.mark.parametrize("twist", [torch.neg, torch.relu])
def test_an_unknown_step_is_never_split_wrongly(twist: object) -> None:
    """timm's conventions don't know it; watching the model does."""
    model = Toy(twist)
    backbone = split(model, SIZE)
    assert backbone.trunk is not None
    assert torch.equal(backbone(images()), model(images()))
