"""What a recipe's data takes of a card: images that stay there, and how batches are made of them, on fake tensors.

Batches are made on the card (``training/augment.py``), so what that takes is part of a step's allocations. Here the
same functions run on tensors without memory. Two things are otherwise than in that code. Resizing bytes is written out
as torchvision does it on CUDA, in float32; processors have a kernel for bytes. And of RandAugment nothing is recorded,
as what it does is drawn image by image: its groups are small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.app.recipe import Recipe
from localgrad.objectives.carried import LocalBatch
from localgrad.planning.confirming import DataPath
from localgrad.training.augment import crop_and_flip, draw_crops, erase, normalise
from localgrad.training.settings import Augment
from localgrad.training.transforms import NONE

if TYPE_CHECKING:
    from localgrad.training.data import Splits

STORED = {"digits": 8, "cifar10": 32, "cifar100": 32, "stl10": 96, "svhn": 32}
"""Side of the images of data sets that are known by name, as they are stored."""


@final
@dataclass(frozen=True)
class MadeBatches:
    """Makes batches as ``Batches`` does on a card.

    Attributes:
        stored: (C, h, w) of the images as they come to the card.
        size: (H, W) that the model takes.
        num_classes: for soft labels.
        augment: of the images in training.
    """

    stored: tuple[int, int, int]
    size: tuple[int, int]
    num_classes: int
    augment: Augment

    def __call__(self, num_images: int) -> LocalBatch:
        """A batch of so many images."""
        picked = torch.empty(num_images, *self.stored, dtype=torch.uint8)
        targets = torch.zeros(num_images, dtype=torch.int64)
        images = crop_and_flip(picked, *draw_crops(num_images, self.augment, 0))
        images = self._resized(images)
        channels = self.stored[0]
        floats = normalise(images, [0.5] * channels, [0.5] * channels)
        if self.augment.erasing:
            floats = erase(floats, torch.zeros(num_images, 4, dtype=torch.int64))
        if not self.augment.gives_soft_labels:
            return LocalBatch(floats, targets, targets=targets, counts_all=True)
        labels = torch.zeros(num_images, self.num_classes)
        if self.augment.mixup or self.augment.cutmix:
            flipped = floats.flip(0).mul_(0.5)
            floats.mul_(0.5).add_(flipped)
        return LocalBatch(floats, labels, targets=targets, counts_all=True)

    def _resized(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == self.size:
            return images
        floats = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True)
        return floats.clamp_(0, 255).round_().to(torch.uint8)


def data_path_of(recipe: Recipe, size: tuple[int, int, int], num_classes: int, data: Splits | None = None) -> DataPath:
    """What a recipe's data takes of a card, as far as is known.

    Args:
        recipe: names the data, and how it is augmented.
        size: (C, H, W) that the model takes.
        num_classes: of the data.
        data: that was read; without it only data sets that are known by name are known.
    """
    channels, height, width = size
    name = recipe.method.data.name
    stored = (channels, height, width)
    kept: list[int] = []
    evaluated: tuple[int, ...] = ()
    as_stored = recipe.method.data.transform in (None, NONE)
    if name in STORED and as_stored:
        stored = (channels, STORED[name], STORED[name])
    if data is not None:
        from localgrad.training.image_sets import InMemoryImages  # only who has data needs it

        parts = [part for part in (data.train, data.val, data.test) if part is not None]
        evaluated = tuple(len(part) for part in parts[1:])
        tensors = [part for part in parts if isinstance(part, InMemoryImages)]
        if tensors and as_stored:
            _, *shape = tensors[0].images.shape
            stored = (shape[0], shape[1], shape[2])
            kept = [nbytes for part in tensors for nbytes in (part.images.nbytes, part.labels.nbytes)]
    augment = recipe.method.augment
    if not (augment.mixup or augment.cutmix):  # as a run's batches are made: losses smooth hard labels themselves
        augment = replace(augment, label_smoothing=0.0)
    make = MadeBatches(stored, (height, width), num_classes, augment)
    return DataPath(kept_bytes=tuple(kept), make_batch=make, num_evaluated=evaluated)
