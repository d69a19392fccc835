"""Augmentation of whole batches on the device, as functions of (images, settings, seed).

The order between storage and the model is fixed::

    uint8, native size:  crop with padding and flip -> RandAugment -> resize
    float32, model size: normalise -> random erasing -> mixup or cutmix

The batch is the unit, since at 32x32 a step takes less time than the Python of 128 per-image transforms: one gather
crops and flips it, each image by its own draws. torchvision's RandAugment draws one operation for all it is given, so
it is applied to groups of `RAND_AUGMENT_GROUP` images (shuffled, so never the same ones twice).

No draw touches a global random state: each batch has one seed, hashed from (seed, epoch, batch index), and every part
of the augmentation derives its own from that. So a batch is the same whatever ran before it, on any device: draws are
made on the CPU and copied without waiting (RandAugment alone waits for a GPU). Library code that insists on a global
state runs inside `private_rng`.

Sources: RandAugment arXiv 1909.13719; random erasing arXiv 1708.04896; mixup arXiv 1710.09412; cutmix
arXiv 1905.04899 (the last two through `timm.data.Mixup`).

Shapes: B batch, C channels, H W image, K classes.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.training.settings import Augment, Fit

WHITE = (255, 255, 255)

RAND_AUGMENT_GROUP = 8
"""Images that share RandAugment's operations: smaller costs more calls, larger varies less."""

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def derive_seed(*parts: int | str) -> int:
    """Hash ``parts`` into one seed, from 0 to below 2**63: the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed` of ``parts``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def private_rng(seed: int) -> Iterator[None]:
    """Run library code that draws from torch's CPU, numpy's or Python's global state, seeded; put all back after it.

    Unlike ``torch.manual_seed`` it leaves the accelerators' generators alone, which dropout draws from.
    """
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a model takes, and how stored images are brought to it.

    Attributes:
        size: (H, W) in pixels.
        mean: per channel, of pixel values scaled to 0..1.
        std: likewise.
        fit: how images of another shape are brought to that size.
        background: (R, G, B) from 0 to 255, of the bars that ``pad`` adds.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    fit: Fit = "crop"
    background: Sequence[int] = WHITE

    def of(self, images: Tensor) -> Tensor:
        """What a model is evaluated on, float32 [B, C, H, W]: resized and normalised, nothing random.

        Args:
            images: uint8 [B, C, h, w].
        """
        return normalise(resize_to_fit(images, self.size, self.fit, self.background), self.mean, self.std)


def augment_batch(
    images: Tensor, targets: Tensor, to: ModelInput, *, augment: Augment, num_classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Turn stored images, uint8 [B, C, h, w], and class indices, int64 [B], into what a training step is fed.

    Args:
        images: on the device that is to do the work.
        targets: there too.
        to: what the model takes.
        augment: the settings.
        num_classes: K, for soft labels.
        seed: all that the random draws depend on.

    Returns:
        Images float32 [B, C, H, W], and labels: float32 [B, K] where ``augment.gives_soft_labels``, else the targets.
    """
    images = crop_and_flip(images, *draw_crops(len(images), augment, seed))
    if augment.rand_augment is not None:
        images = rand_augment(images, *augment.rand_augment, seed=seed)
    floats = to.of(images)
    if augment.erasing:
        floats = erase(floats, draw_boxes(len(floats), to.size, augment.erasing, seed))
    if augment.gives_soft_labels:
        return mix(floats, targets, augment=augment, num_classes=num_classes, seed=seed)
    return floats, targets


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute ``(images / 255 - mean) / std`` per channel: uint8 [..., C, H, W] to float32."""
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    scale, shift = (_to_device(t[:, None, None], images.device) for t in (scale, shift))
    return torch.mul(images, scale).add_(shift)


def resize_to_cover(images: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Cut the central part that has the wanted aspect, and resize it; see `resize_to_fit`."""
    height, width = images.shape[-2:]
    if (height, width) == tuple(image_size):
        return images
    scale = min(height / image_size[0], width / image_size[1])
    box = (max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale)))
    top, left = (height - box[0]) // 2, (width - box[1]) // 2
    central = images[..., top : top + box[0], left : left + box[1]]
    return _resized(central, image_size)


def resize_to_fit(images: Tensor, image_size: tuple[int, int], fit: Fit, background: Sequence[int]) -> Tensor:
    """Bring images to a size (bicubic, antialiased).

    Args:
        images: uint8 [..., C, h, w].
        image_size: (H, W) wanted, in pixels.
        fit: ``crop`` cuts the central part that has the wanted aspect, ``pad`` adds bars, ``squash`` keeps all and
            changes the proportions.
        background: (R, G, B) from 0 to 255, of the bars.

    Returns:
        uint8 [..., C, H, W]; ``images`` themselves where they already have that size.
    """
    height, width = images.shape[-2:]
    if fit == "crop" or (height, width) == tuple(image_size):
        return resize_to_cover(images, image_size)
    if fit == "squash":
        return _resized(images, image_size)
    scale = min(image_size[0] / height, image_size[1] / width)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    top, left = (image_size[0] - inner[0]) // 2, (image_size[1] - inner[1]) // 2
    red, green, blue = background
    # Grey as Pillow makes it of a colour (ITU-R 601-2).
    bars = [round(0.299 * red + 0.587 * green + 0.114 * blue)] if images.shape[-3] == 1 else [red, green, blue]
    filled = _to_device(torch.tensor(bars, dtype=images.dtype)[:, None, None], images.device)
    padded = filled.expand(*images.shape[:-2], *image_size).clone()
    padded[..., top : top + inner[0], left : left + inner[1]] = _resized(images, inner)
    return padded


def share_cut_off(size: tuple[int, int], image_size: tuple[int, int]) -> float:
    """The share, from 0 to 1, that `resize_to_cover` cuts off of an image of (h, w) pixels for (H, W)."""
    scale = min(size[0] / image_size[0], size[1] / image_size[1])
    return 1 - scale * image_size[0] * scale * image_size[1] / (size[0] * size[1])


def _resized(images: Tensor, image_size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(image_size):
        return images
    from torchvision.transforms.v2 import InterpolationMode  # type: ignore[import-untyped]
    from torchvision.transforms.v2 import functional as transforms

    resized: Tensor = transforms.resize(images, list(image_size), InterpolationMode.BICUBIC, antialias=True)
    return resized


def draw_crops(num_images: int, augment: Augment, seed: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Draw where each image is cropped, and whether it is mirrored.

    Args:
        num_images: B.
        augment: of which ``crop_padding`` and ``flip`` count here.
        seed: of the batch.

    Returns:
        The padding, then per image on the CPU: top and left (int64 [B], 0 to twice the padding) and
        mirrored (bool [B]): the arguments of `crop_and_flip`.
    """
    generator = generator_for(seed, "crop and flip")
    top, left = torch.randint(0, 2 * augment.crop_padding + 1, (2, num_images), generator=generator)
    mirrored = torch.rand(num_images, generator=generator) < (0.5 if augment.flip else 0.0)
    return augment.crop_padding, top, left, mirrored


def crop_and_flip(images: Tensor, padding: int, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    """Pad with black, crop each image back to its size at its own place, mirror some: one gather.

    Args:
        images: [B, C, H, W].
        padding: pixels on each side.
        top: int64 [B], row of the padded image where the crop starts.
        left: int64 [B], its column.
        mirrored: bool [B].

    Returns:
        [B, C, H, W] of the same type.
    """
    num_images, num_channels, height, width = images.shape
    top, left, mirrored = (_to_device(t, images.device) for t in (top, left, mirrored))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).flatten(1)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    gathered = padded.gather(2, pixels[:, None, :].expand(-1, num_channels, -1))
    return gathered.view(num_images, num_channels, height, width)


def rand_augment(images: Tensor, num_ops: int, magnitude: int, *, seed: int) -> Tensor:
    """Apply torchvision's RandAugment to groups of `RAND_AUGMENT_GROUP` images.

    Args:
        images: uint8 [B, C, H, W], C being 1 or 3; so is what is returned.
        num_ops: operations in a row for each group.
        magnitude: 0 to 30.
        seed: of the batch.
    """
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    transform = v2.RandAugment(num_ops=num_ops, magnitude=magnitude)
    with private_rng(derive_seed(seed, "rand_augment")):
        return torch.cat([transform(group) for group in torch.split(images, RAND_AUGMENT_GROUP)])


def draw_boxes(num_images: int, image_size: tuple[int, int], probability: float, seed: int) -> Tensor:
    """Draw one rectangle an image of (H, W) pixels, with a probability; else it is empty.

    Returns:
        int64 [B, 4] on the CPU: top, left, bottom, right (the last two exclusive).
    """
    draws = torch.rand(5, num_images, generator=generator_for(seed, "erasing"), dtype=torch.float64)
    sides = torch.tensor(image_size, dtype=torch.float64)
    area = sides.prod() * (ERASED_AREA[0] + draws[0] * (ERASED_AREA[1] - ERASED_AREA[0]))
    low, high = math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])
    aspect = torch.exp(low + draws[1] * (high - low))
    box = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).round()
    box = box.clamp(min=1).minimum(sides)
    start = (draws[2:4].T * (sides - box + 1)).floor()
    box = box * (draws[4] < probability)[:, None]
    return torch.cat([start, start + box], dim=1).long()


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set each image's rectangle (`draw_boxes`) to 0, the mean colour of normalised float32 [B, C, H, W]."""
    top, left, bottom, right = _to_device(boxes, images.device).T[:, :, None]
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


def mix(images: Tensor, targets: Tensor, *, augment: Augment, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mix pairs of images and their labels by timm's Mixup, or only smooth the labels.

    timm mixes image i with image B-1-i and wants an even number: the last image of an odd batch stays as it is.

    Args:
        images: float32 [B, C, H, W]; overwritten, which spares a copy of the batch.
        targets: int64 class indices [B].
        augment: of which ``mixup``, ``cutmix`` and ``label_smoothing`` count here.
        num_classes: K.
        seed: of the batch.

    Returns:
        The images, and labels float32 [B, K], each row adding up to 1.
    """
    from timm.data.mixup import Mixup, mixup_target

    num_mixed = len(images) // 2 * 2 if augment.mixup or augment.cutmix else 0
    soft: Tensor = mixup_target(targets, num_classes, smoothing=augment.label_smoothing)
    if num_mixed == 0:
        return images, soft
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.label_smoothing,
        num_classes=num_classes,
    )
    with private_rng(derive_seed(seed, "mix")):
        _, soft[:num_mixed] = mixup(images[:num_mixed], targets[:num_mixed])  # images in place
    return images, soft


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor over without making the host wait for the device."""
    return tensor.to(device, non_blocking=True)
