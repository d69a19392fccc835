"""What makes an image of the model's size of one that is stored: transforms by name, image by image.

A *transform* is made for a size and a use (``make(image_size=(224, 224), training=True)``), takes one image as uint8
[C, h, w] and gives uint8 [C, H, W]; normalising, mixup and cutmix follow on the device (``augment.py``). It may be
anything that is written against torchvision's ``transforms.v2``. Images of files go through it in the worker processes
that decode them. Each image is drawn for by a seed of its own, hashed from (seed, epoch, batch, place in the batch), so
a run draws the same with any number of workers, and after being resumed.

Shapes: C channels, h w stored, H W wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from localgrad.errors import DataError, LocalgradError, reason_of
from localgrad.registry import Registry, function_named
from localgrad.training.augment import derive_seed, private_rng

Transform = Callable[[Tensor], Tensor]

NONE = "none"
"""The name of no transform."""
EVALUATED_SHARE = 0.875
"""Of an image's shorter side, in evaluation: 224 pixels of 256."""
GREY = 114
"""What is erased becomes the mean of ImageNet's pixels, from 0 to 255."""

TRANSFORMS: Registry[Callable[..., Transform]] = Registry("transform")


def register_transform(name: str, transform: Callable[..., Transform]) -> None:
    """Give a transform a name, by which recipes (``data.transform``) and the command line choose it.

    Args:
        name: for ``--transform``.
        transform: called with ``image_size=(H, W)`` and ``training=``, gives what is called with each image.

    Raises:
        RecipeError: the name is another's.
    """
    TRANSFORMS.register(name, transform)


def imagenet(image_size: tuple[int, int], *, training: bool) -> Transform:
    """The recipe that fine-tuning takes as a standard: random crops, flips, colours and RandAugment, parts erased.

    In evaluation it is the centre.
    """
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    bicubic = v2.InterpolationMode.BICUBIC
    steps = [
        v2.RandomResizedCrop(image_size, interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.3, 0.3, 0.3),
        v2.RandAugment(num_ops=2, magnitude=9),
        v2.RandomErasing(p=0.25, value=GREY),
    ]
    if not training:
        shorter = round(max(image_size) / EVALUATED_SHARE)
        steps = [v2.Resize(shorter, interpolation=bicubic, antialias=True), v2.CenterCrop(image_size)]
    made: Transform = v2.Compose(steps)
    return made


register_transform("imagenet", imagenet)


@final
class Prepared:
    """A transform for one part of the data, with an image's own draws. Picklable where the transform is.

    Args:
        name: a registered one, or ``module:function``.
        image_size: (H, W) that the model takes.
        training: whether for training.

    Raises:
        RecipeError: there is no such transform.
        DataError: it can't be made for this size.
    """

    def __init__(self, name: str, image_size: tuple[int, int], *, training: bool) -> None:
        make = function_named("transform", name) if ":" in name else TRANSFORMS.find(name)
        self.name, self.image_size = name, image_size
        self.transform: Any = self._guarded(lambda: make(image_size=image_size, training=training), "be made")
        if not callable(self.transform):
            raise DataError(
                f"transform: {name} gave {type(self.transform).__name__} for image_size={image_size}, "
                f"training={training}; let it give what is called with each image."
            )

    def __call__(self, image: Tensor, *seed: int) -> Tensor:
        """Transform one image, uint8 [C, h, w] to uint8 [C, H, W], by draws that depend on the seed.

        Raises:
            DataError: the transform fails, or gives something else.
        """
        with private_rng(derive_seed("transform", *seed)):
            found = self._guarded(lambda: self.transform(image), f"take an image of {list(image.shape)}")
        wanted = (len(image), *self.image_size)
        if not isinstance(found, Tensor) or found.dtype != torch.uint8 or tuple(found.shape) != wanted:
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise DataError(
                f"transform: {self.name} gave {got}; let it give torch.uint8 {list(wanted)} (normalising follows, by "
                "mean and std)."
            )
        return found.as_subclass(Tensor)

    def _guarded(self, run: Callable[[], Any], what: str) -> Any:
        try:
            return run()
        except LocalgradError:
            raise
        except Exception as error:  # whatever a user's code says
            raise DataError(
                f"transform: {self.name} can't {what} ({type(error).__name__}: {reason_of(error)})."
            ) from error

    def try_on(self, num_channels: int) -> None:
        """Transform noise, so that a mistake is told before anything is read.

        Raises:
            DataError: as for each image.
        """
        size = [num_channels, *(2 * side for side in self.image_size)]
        self(torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0), device="cpu"), 0)
