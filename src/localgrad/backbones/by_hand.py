"""A backbone from parts that somebody wrote down: what its features are like, and the checks that nothing is lost.

What ``split`` finds is given here: a stem, blocks and a tail, each from one tensor to one tensor. Left to find is the
layout of the features between them; left to show, that the parts are the model, or (without one) that all are used.

Shapes: B batch, C channels, H W image, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from localgrad.backbones.layouts import Layout, LayoutFinder, change_features, change_image
from localgrad.backbones.state import left_as_it_was
from localgrad.backbones.timm_models import default_input_size
from localgrad.errors import BackboneError, reason_of

MOST_NAMED = 4
"""Parameters that a message names."""


class Chain(nn.Module):
    """Stem, blocks and tail in a row: the model of a backbone that was made without one."""

    def __init__(self, stem: nn.Module, blocks: Iterable[nn.Module], tail: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.tail = stem, nn.ModuleList(blocks), tail

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K]."""
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.tail(features)
        return logits


def check_parts(stem: object, blocks: object, tail: object, model: object) -> list[nn.Module]:
    """Refuse what are no parts, or not those of a model; gives the blocks.

    Raises:
        BackboneError: naming the argument.
    """
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise BackboneError(f"blocks: got {blocks!r}; give a list of modules, or an nn.Sequential.")
    found = list(blocks)
    named = [("stem", stem), *((f"blocks[{index}]", block) for index, block in enumerate(found)), ("tail", tail)]
    for name, part in [*named, *([] if model is None else [("model", model)])]:
        if not isinstance(part, nn.Module):
            raise BackboneError(f"{name}: got {part!r}, not a module; give an nn.Module that takes and gives a tensor.")
    if not found:
        raise BackboneError("blocks: there is none; a boundary between local modules falls between two blocks.")
    if isinstance(model, nn.Module):
        known = set(map(id, model.parameters()))
        for name, part in named:
            strange = [weight for weight, tensor in part.named_parameters() if id(tensor) not in known]
            if strange:
                raise BackboneError(
                    f"{name}: its parameter {strange[0]} is none of the model's; make parts of the model's own modules "
                    "and parameters, not of copies."
                )
    return found


def default_size_of_parts(stem: nn.Module, model: nn.Module | None) -> tuple[int, int, int]:
    """(C, H, W) that parts are tried with where nobody says: the model's own, or 224 pixels square."""
    if model is not None and getattr(model, "pretrained_cfg", None):
        return default_input_size(model)
    first = next((weight for weight in stem.parameters() if weight.ndim == 4), None)
    return 3 if first is None else first.shape[1], 224, 224


@final
class PartsSeen:
    """What running parts once shows of the features between them.

    Args:
        model: the model, for what it tells of its features.
        parts: stem, blocks and tail.
        input_size: (C, H, W) of the images.
        layouts: of what enters each block, and the tail; one for all; by default found.

    Raises:
        BackboneError: a part can't run, or gives something else than one tensor of features; or a layout isn't that of
            the features, or can't be found.
    """

    layouts: list[Layout]
    """Of what enters each block, and of what enters the tail."""
    num_classes: int
    """K."""

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[nn.Module],
        input_size: tuple[int, int, int],
        layouts: Layout | Sequence[Layout] | None,
    ) -> None:
        stem, *blocks, tail = parts
        like = next(model.parameters())
        self.given = [layouts] * len(parts[1:]) if isinstance(layouts, Layout) else layouts
        if self.given is not None and len(self.given) != len(parts) - 1:
            raise BackboneError(
                f"layouts: got {len(self.given)} for {len(blocks)} blocks; give one for what enters each block and one "
                "for what enters the tail, or a single one for all."
            )
        self.finder = LayoutFinder(model, *input_size[1:], more_prefix_tokens=(1,))
        with torch.inference_mode(mode=False), left_as_it_was(model, *parts), torch.no_grad():
            for part in (model, *parts):
                part.eval()
            images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
            self.layouts = []
            entered, before = change_image(images), stem
            features = self._run("stem", stem, images)
            for index, block in enumerate(blocks):
                self._take(features, before, entered, f"blocks[{index}]")
                entered, before = change_features(features, self.layouts[-1]), block
                features = self._run(f"blocks[{index}]", block, features)
            self._take(features, before, entered, "the tail")
            logits = self._run("tail", tail, features)
        if logits.ndim != 2 or len(logits) != 2:
            raise BackboneError(f"tail: for two images it gave {list(logits.shape)}; let it give logits [B, classes].")
        self.num_classes = logits.shape[1]

    def _run(self, name: str, part: nn.Module, given: Tensor) -> Tensor:
        try:
            found = part(given.clone())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a user's code says
            raise BackboneError(
                f"{name}: it can't run on {list(given.shape)} ({type(error).__name__}: {reason_of(error)}); check it, "
                "and input_size."
            ) from error
        if not isinstance(found, Tensor):
            raise BackboneError(f"{name}: it gave {type(found).__name__}; let it give one tensor.")
        return found

    def _take(self, features: Tensor, before: nn.Module, entered: Tensor, where: str) -> None:
        """The layout of the features that go to a place."""
        index = len(self.layouts)
        if self.given is not None:
            layout = self.given[index]
            if tuple(features.shape[1:]) != layout.shape:
                raise BackboneError(
                    f"layouts: that of what enters {where} says [B, {', '.join(map(str, layout.shape))}], but it is "
                    f"{list(features.shape)}."
                )
            self.layouts.append(layout)
            return
        if features.ndim not in (3, 4):
            raise BackboneError(
                f"{where}: {list(features.shape)} enters it; features are maps [B, H, W, D], [B, D, H, W] or tokens "
                "[B, N, D]."
            )
        try:
            self.layouts.append(self.finder.describe(features, index, lambda: before(entered.clone())))
        except BackboneError as error:
            raise BackboneError(
                f"layouts: of {list(features.shape)}, which enters {where}, it can't be found what stands where; give "
                "them, such as layouts=localgrad.Layout(kind='tokens', width=192, grid=(14, 14), num_prefix_tokens=1)."
            ) from error

    @property
    def stage_boundaries(self) -> list[int]:
        """The blocks from which on features have another grid."""
        return [i for i, (before, after) in enumerate(pairwise(self.layouts[:-1]), 1) if before.grid != after.grid]


def names_of_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """Dotted paths of blocks in a model; by number, of those that are none of its modules."""
    paths = {id(module): name for name, module in model.named_modules() if name}
    return [paths.get(id(block), f"blocks.{index}") for index, block in enumerate(blocks)]


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
