"""Which axes of features are positions: found by their shape, and where that says nothing by changing one place."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from localgrad.backbones.base import Layout, split
from localgrad.backbones.layouts import change_image
from localgrad.errors import BackboneError


class Square(nn.Module):
    """Features as wide as their grid is high and long, in a layout of choice."""

    num_classes = 5

    def __init__(self, axes: tuple[int, ...], *, flat: bool = False, mixes: bool = False) -> None:
        super().__init__()
        self.axes, self.flat = axes, flat
        self.patch_embed = nn.Conv2d(3, 64 if flat else 8, 4, 4)
        self.blocks = nn.Sequential(Block(mixes=mixes), Block(mixes=mixes), Block(mixes=mixes))
        self.head = nn.Linear(64 if flat else 8, 5)

    def forward_features(self, images: Tensor) -> Tensor:
        features = self.patch_embed(images)
        features = features.flatten(2) if self.flat else features
        return self.blocks(features.permute(0, *self.axes))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features.mean((1, 2)) if features.ndim == 4 else features.mean(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class Block(nn.Module):
    """Some channels or rows mixed (nobody cares which), and with ``mixes`` all positions: a residual block."""

    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 1) * 0.3)
        self.mixes = mixes

    def forward(self, features: Tensor) -> Tensor:
        branch = torch.tanh(features * self.weight)
        axes = tuple(range(1, features.ndim))
        return features + branch + (branch.mean(axes, keepdim=True) if self.mixes else 0)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize(("axes", "kind"), [((1, 2, 3), "NCHW"), ((2, 3, 1), "NHWC")])
def test_width_equal_to_both_sides_of_the_grid(axes: tuple[int, ...], kind: str, mixes: bool) -> None:
    torch.manual_seed(0)
    model = Square(axes, mixes=mixes)
    backbone = split(model, (3, 32, 32))
    assert set(backbone.layouts) == {Layout(kind, 8, (8, 8))}
    # Independently: the patch that a pixel belongs to is where the features move.
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[:, :, 4:8, 20:24] += 1
    moved = (backbone.stem(other) - backbone.stem(images)).abs()
    grid = backbone.layouts[0].to_grid(moved)[0].sum(-1)
    assert grid[1, 5] > 0
    assert grid.sum() == grid[1, 5]


def test_pvt_v2_at_128_pixels() -> None:
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=5)
    layouts = split(model, (3, 128, 128)).layouts
    assert layouts[0] == Layout("NHWC", 32, (32, 32))
    assert layouts[1].grid == (32, 32)


@pytest.mark.parametrize(("axes", "flat"), [((3, 2, 1), False), ((1, 3, 2), False), ((2, 1, 3), False), ((1, 2), True)])
def test_rows_that_are_columns_and_tokens_that_are_channels_are_refused(axes: tuple[int, ...], flat: bool) -> None:
    torch.manual_seed(0)
    model = Square(axes, flat=flat)
    with pytest.raises(BackboneError, match="a change at one place of the image"):
        split(model, (3, 32, 32))


def test_a_changed_image_differs_at_one_place_alone() -> None:
    images = torch.zeros(2, 3, 64, 32)
    rows, columns = change_image(images)[1, 0].nonzero().T
    assert rows.unique().tolist() == list(range(8, 17))
    assert columns.unique().tolist() == list(range(20, 25))
