"""How features stand in memory between blocks: which axes are positions, and which one is channels.

Mostly the shape tells, given the model and the image. Where features are as wide as their grid is high and long it
doesn't; then one position of what went in is changed, and that place is looked for in what came out: a change stays
near its place (in a transformer through its residual path), and spreads over all channels.

Shapes: B batch, N tokens, P prefix tokens, D width, H W grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.backbones.fake import FakeTensor
from localgrad.backbones.timm_models import Kind, Unsplittable, attribute, child_of, token_order, unsupported

PLACE = (0.2, 0.7)
"""Where something is changed, as shares of the height and the width: on no diagonal, so that a transposition shows."""


@dataclass(frozen=True)
class Layout:
    """How features stand in memory at one point between blocks."""

    kind: Kind
    width: int
    """D, the number of channels."""
    grid: tuple[int, int]
    """(H, W) of the spatial tokens; of a sequence (1, N), N being the example's length: batches may have another."""
    num_prefix_tokens: int = 0
    """P, class and register tokens that stand before the grid tokens (kind "tokens")."""
    order: tuple[int, ...] | None = None
    """Token n of the sequence stands at raster position order[n]; None: in raster order."""
    is_causal: bool = False
    """Whether features of a sequence depend on what is before and at their place alone."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's features."""
        if self.kind == "sequence":
            return (self.grid[1], self.width)
        if self.kind == "tokens":
            return (self.num_prefix_tokens + self.grid[0] * self.grid[1], self.width)
        return (*self.grid, self.width) if self.kind == "NHWC" else (self.width, *self.grid)

    def to_grid(self, features: Tensor) -> Tensor:
        """Spatial features without prefix tokens, [B, H, W, D]; as a view where memory allows it."""
        if self.kind == "NHWC":
            return features
        if self.kind == "NCHW":
            return features.permute(0, 2, 3, 1)
        if self.kind == "sequence":
            return features.reshape(len(features), 1, -1, self.width)  # of whatever length this batch is
        tokens = features[:, self.num_prefix_tokens :]
        if self.order is not None:
            tokens = tokens[:, torch.tensor(self._token_at, device=features.device)]
        return tokens.reshape(tokens.shape[0], *self.grid, self.width)

    def prefix(self, features: Tensor) -> Tensor | None:
        """Class and register tokens, [B, P, D], a view; None where there are none."""
        return features[:, : self.num_prefix_tokens] if self.num_prefix_tokens else None

    def add(self, features: Tensor, grid: Tensor) -> Tensor:
        """Features with a grid [B, H, W, D] added to their spatial part."""
        return features + self.from_grid(grid)

    def from_grid(self, grid: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Features made of a grid [B, H, W, D] and of class and register tokens [B, P, D], by default zeros."""
        if self.kind == "NHWC":
            return grid
        if self.kind == "NCHW":
            return grid.permute(0, 3, 1, 2)
        if self.kind == "sequence":
            return grid.squeeze(1)
        tokens = grid.flatten(1, 2)
        if self.order is not None:
            tokens = tokens[:, torch.tensor(self.order, device=grid.device)]
        return (
            F.pad(tokens, (0, 0, self.num_prefix_tokens, 0)) if prefix is None else torch.cat([prefix, tokens], dim=1)
        )

    @cached_property
    def _token_at(self) -> tuple[int, ...]:
        """The inverse of ``order``: which token stands at each raster position."""
        order = self.order or ()
        return tuple(sorted(range(len(order)), key=order.__getitem__))


class GridUnknown(Unsplittable):
    """Tokens that make no grid that anybody knows."""


@final
class LayoutFinder:
    """Finds the layouts of the features along a model's trunk, in order, for images of a height and width.

    ``more_prefix_tokens`` is how many there may be where the model doesn't say.
    """

    def __init__(self, model: nn.Module, height: int, width: int, *, more_prefix_tokens: tuple[int, ...] = ()) -> None:
        self.model = model
        own = int(attribute(model, "num_prefix_tokens") or 0)
        self.prefix_tokens = tuple(dict.fromkeys((own, 0, *more_prefix_tokens)))
        self.widths = {int(info["num_chs"]) for info in attribute(model, "feature_info") or []}
        embedded = attribute(child_of(model, "patch_embed") or model, "grid_size")
        self.grids: list[tuple[int, int]] = [tuple(embedded)] if embedded else []
        for stride in range(1, max(height, width) + 1):
            self.grids.append((math.ceil(height / stride), math.ceil(width / stride)))
            self.grids.append((height // stride, width // stride))
        # Decides where D = H = W leaves both readings open and there are no values: the last kind known for certain.
        self.kind: Kind = attribute(model, "output_fmt") or "NCHW"

    def describe(self, features: Tensor, index: int, changed: Callable[[], Tensor]) -> Layout:
        """The layout of the features [B, ...] that enter block ``index``.

        ``changed`` gives those features after what they were made of was changed at one place (``change_image``,
        ``change_features``).
        """
        layout = self._tokens(features, index) if features.ndim == 3 else self._map(features, changed)
        if index == 0 and not isinstance(features, FakeTensor):
            self._check_places((changed() - features).float().square(), layout)
        self.kind = layout.kind
        # Grids only shrink along the trunk, and mostly stay: the present one is the first guess for the next.
        self.grids.insert(0, layout.grid)
        return layout

    def _map(self, features: Tensor, changed: Callable[[], Tensor]) -> Layout:
        _, one, two, three = features.shape
        options = [Layout("NHWC", three, (one, two)), Layout("NCHW", one, (two, three))]
        options.sort(key=lambda o: (o.grid in self.grids, o.width in self.widths, o.kind == self.kind))
        rivals = [option for option in options if self._fits(option) == self._fits(options[-1])]
        if len(rivals) > 1 and not isinstance(features, FakeTensor):
            moved = (changed() - features).float().square()
            rivals.sort(key=lambda option: _share_at_place(moved, option))
        return rivals[-1]

    def _check_places(self, moved: Tensor, layout: Layout) -> None:
        """Refuse features whose rows are columns, or whose tokens are channels: a square doesn't tell by its shape."""
        axes = range(1, moved.ndim)
        readings = [moved.permute(0, *order) for order in itertools.permutations(axes)]
        if moved.ndim == 4:
            plain = Layout("NHWC", layout.width, layout.grid)
            readings.insert(0, layout.to_grid(moved))
        else:
            plain = layout
            if not layout.num_prefix_tokens:  # as a grid, too: it may have been made of columns
                readings += [self._transposed(moved, layout)]
        shares = [_share_at_place(reading, plain) for reading in readings if tuple(reading.shape[1:]) == plain.shape]
        if max(shares) > 2 * shares[0]:  # clearly: on a grid of few cells every place is near every other one
            raise unsupported(
                self.model,
                f"its features of shape [B, {', '.join(map(str, moved.shape[1:]))}] don't stand as rows, columns, "
                "channels or tokens of them (a change at one place of the image shows at another one)",
            )

    @staticmethod
    def _transposed(moved: Tensor, layout: Layout) -> Tensor:
        """Tokens [B, N, D] as if their grid had been flattened column by column."""
        grid = layout.to_grid(moved).reshape(len(moved), layout.grid[1], layout.grid[0], layout.width).transpose(1, 2)
        return layout.add(torch.zeros_like(moved), grid)

    def _fits(self, option: Layout) -> tuple[bool, bool]:
        return option.grid in self.grids, option.width in self.widths

    def _tokens(self, features: Tensor, index: int) -> Layout:
        _, count, width = features.shape
        for grid in self.grids:
            for prefix in self.prefix_tokens:
                if grid[0] * grid[1] + prefix == count and min(grid) > 0:
                    order = token_order(self.model, max(index - 1, 0), count)
                    return Layout("tokens", width, grid, prefix, order)
        raise GridUnknown(self.model, f"{count} tokens enter block {index}, and which grid they make is not known")


def change_image(images: Tensor) -> Tensor:
    """Images [B, C, H, W] with a patch of an eighth of their sides changed."""
    changed = images.clone()
    rows, columns = (_cells(length, share, length // 16) for length, share in zip(images.shape[2:], PLACE, strict=True))
    changed[:, :, rows, columns] += 1.0
    return changed


def change_features(features: Tensor, layout: Layout) -> Tensor:
    """Features [B, ...] of a layout with one position changed, by as much as they are large."""
    grid = torch.zeros(len(features), *layout.grid, layout.width, dtype=features.dtype, device=features.device)
    values = torch.randn(layout.width, generator=torch.Generator().manual_seed(2), device="cpu")
    row, column = (_cells(length, share, 0) for length, share in zip(layout.grid, PLACE, strict=True))
    grid[:, row, column] = 4 * features.std() * values.to(grid)
    return layout.add(features, grid)


def change_later(main: Tensor) -> Tensor:
    """Token ids [B, N] or vectors [B, N, D] with all tokens of the second half changed; ids stay among those given."""
    later = main[:, main.shape[1] // 2 :]
    if main.is_floating_point():
        changed = later + 1.0
    else:
        low, high = int(main.min()), int(main.max())
        other = high if high > low else max(low - 1, 1 - low)
        changed = torch.where(later == low, other, low)
    return torch.cat([main[:, : main.shape[1] // 2], changed.to(main.dtype)], dim=1)


def looks_ahead(run: Callable[[Tensor], Tensor], main: Tensor) -> bool:
    """Whether earlier tokens' features [B, N, D] depend on later tokens; also where nobody can tell.

    Rounding that differs (other kernels, for other numbers) isn't taken for a look ahead.
    """
    features = run(main.clone())
    middle = main.shape[1] // 2 if main.ndim > 1 else 0
    if not middle or features.ndim != 3 or features.shape[1] != main.shape[1]:
        return True
    moved = (run(change_later(main)) - features).abs()
    return bool(moved[:, :middle].max() > 1e-5 * moved[:, middle:].max())


def _share_at_place(moved: Tensor, option: Layout) -> float:
    """How much of a change lies where it was made, if features stand as an option says; [B, ...] to 0 ... 1."""
    grid = option.to_grid(moved).sum((0, 3))
    rows, columns = (
        _cells(length, share, max(1, length // 8)) for length, share in zip(option.grid, PLACE, strict=True)
    )
    return float(grid[rows, columns].sum() / grid.sum().clamp(min=1e-30))


def _cells(length: int, share: float, around: int) -> slice:
    """The place along an axis, and as many cells on both of its sides."""
    middle = int(share * length)
    return slice(max(0, middle - around), middle + around + 1)
