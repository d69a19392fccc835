"""What makes an image of the model's size of one that is stored: transforms by name, image by image.

A *transform* is made for a size and a use (``make(image_size=(224, 224), training=True)``), takes one image as uint8
[C, h, w] and gives uint8 [C, H, W]; normalising, mixup and cutmix follow on the device (``augment.py``). It may be
anything that is written against torchvision's ``transforms.v2``. Images of files go through it in the worker processes
that decode them. Each image is drawn for by a seed of its own, hashed from (seed, epoch, batch, place in the batch), so
a run draws the same with any number of workers, and after being resumed.

A transform may also take ``interpolation=`` and ``crop=``, as a recipe has them or pretrained weights want them: those
here do. In evaluation they give what timm's own transform gives for crop mode ``center``, but for rounding.

Shapes: C channels, h w stored, H W wanted.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from localgrad.errors import DataError, LocalgradError, arg, reason_of
from localgrad.registry import Registry, function_named
from localgrad.training.augment import derive_seed, private_rng

Transform = Callable[[Tensor], Tensor]

NONE = "none"
"""The name of no transform."""
INTERPOLATION = "bicubic"
EVALUATED_SHARE = 0.875
"""Of an image's shorter side, in evaluation: 224 pixels of 256. Both where neither a recipe nor weights say others."""
LIGHT_AREA = (0.5, 1.0)
"""Of an image, in a random crop of ``light``: half of it still shows what its label names, where there are too few
images and epochs to learn otherwise (a choice, not a measured optimum). ``imagenet`` draws from 0.08 on."""
GREY = 114
"""What is erased becomes the mean of ImageNet's pixels, from 0 to 255."""

TRANSFORMS: Registry[Callable[..., Transform]] = Registry("transform")


def register_transform(name: str, transform: Callable[..., Transform]) -> None:
    """Give a transform a name, by which recipes (``data.transform``) and the command line choose it.

    Args:
        name: for ``--transform``.
        transform: called with ``image_size=(H, W)`` and ``training=``, gives what is called with each image. It may
            take ``interpolation=`` (a name) and ``crop=`` (a share of the side) as well, each with a default.

    Raises:
        RecipeError: the name is another's.
    """
    TRANSFORMS.register(name, transform)


def imagenet(
    image_size: tuple[int, int], *, training: bool, interpolation: str = INTERPOLATION, crop: float = EVALUATED_SHARE
) -> Transform:
    """The standard recipe of training on photos: random crops, flips, colours and RandAugment, parts erased.

    In evaluation it is the centre.
    """
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    if not training:
        return _centre(image_size, interpolation, crop)
    made: Transform = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, interpolation=_mode(interpolation), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3),
            v2.RandAugment(num_ops=2, magnitude=9),
            v2.RandomErasing(p=0.25, value=GREY),
        ]
    )
    return made


def light(
    image_size: tuple[int, int], *, training: bool, interpolation: str = INTERPOLATION, crop: float = EVALUATED_SHARE
) -> Transform:
    """Random crops of half of an image or more, mirrored or not; evaluated as ``imagenet`` is."""
    from torchvision.transforms import v2

    if not training:
        return _centre(image_size, interpolation, crop)
    cut = v2.RandomResizedCrop(image_size, scale=LIGHT_AREA, interpolation=_mode(interpolation), antialias=True)
    made: Transform = v2.Compose([cut, v2.RandomHorizontalFlip()])
    return made


def _centre(image_size: tuple[int, int], interpolation: str, crop: float) -> Transform:
    """Cut the centre out of an image that is so much larger; small ones are enlarged."""
    from torchvision.transforms import v2

    shorter = math.floor(max(image_size) / crop)  # rounded down, as timm does
    resize = v2.Resize(shorter, interpolation=_mode(interpolation), antialias=True)
    made: Transform = v2.Compose([resize, v2.CenterCrop(image_size)])
    return made


def _mode(interpolation: str) -> Any:
    """What torchvision calls it; the nearest pixel as Pillow takes it."""
    from torchvision.transforms import v2

    return v2.InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)


register_transform("imagenet", imagenet)
register_transform("light", light)


def _maker(name: str) -> Callable[..., Transform]:
    """What makes a transform: registered, or ``module:function``."""
    made: Callable[..., Transform] = function_named("transform", name) if ":" in name else TRANSFORMS.find(name)
    return made


def resizing_of(name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Of what may be wanted of resizing, what a transform takes, with its defaults where nothing is (``None``).

    Args:
        name: a registered one, or ``module:function``.
        wanted: ``interpolation`` and ``crop``, or one of them.
    """
    make = _maker(name)
    try:
        known = inspect.signature(make).parameters
    except (TypeError, ValueError):  # of code that isn't Python's
        return {}
    found = {key: known[key].default if value is None else value for key, value in wanted.items() if key in known}
    return {key: value for key, value in found.items() if value not in (None, inspect.Parameter.empty)}


@final
class Prepared:
    """A transform for one part of the data, with an image's own draws. Picklable where the transform is.

    Args:
        name: a registered one, or ``module:function``.
        image_size: (H, W) that the model takes.
        training: whether for training.
        resizing: ``interpolation`` and ``crop``, where they are set.

    Raises:
        RecipeError: there is no such transform.
        DataError: it can't be made for this size, or doesn't take what is set.
    """

    def __init__(
        self, name: str, image_size: tuple[int, int], *, training: bool, resizing: Mapping[str, Any] | None = None
    ) -> None:
        make = _maker(name)
        given = {key: value for key, value in (resizing or {}).items() if value is not None}
        for key in given.keys() - resizing_of(name, given).keys():
            raise DataError(
                f"{arg(f'data.{key}', given[key])}: the transform {name} takes no {key}; leave it out, or let the "
                f"function that makes it take {key}=."
            )
        self.name, self.image_size = name, image_size
        self.transform: Any = self._guarded(lambda: make(image_size=image_size, training=training, **given), "be made")
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
