"""Settings of training that a recipe has, without the code that they set: so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from localgrad.errors import RecipeError, arg
from localgrad.options import (
    DATA,
    METHOD,
    STRICT,
    Factor,
    Fraction,
    Limits,
    Number,
    Positive,
    documented,
    option,
    read_numbers,
)

_WIDEST = 4096
"""Pixels of a border, at most."""
_ALPHAS = 1e-6, 1e6
"""Between them Beta distributions are drawn from without a loss."""

OnCorrupt = Literal["error", "skip"]
Fit = Literal["crop", "pad", "squash"]
"""How an image of another shape is brought to the model's: its central part, bars at its sides, other proportions."""
Interpolation = Literal["nearest", "bilinear", "bicubic"]
"""How transforms resize."""


@documented
@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images."""

    __pydantic_config__ = STRICT
    name: str = option(
        "digits", "digits, cifar10, cifar100, stl10, svhn, a folder, or a Hugging Face data set.", DATA, name="data"
    )
    root: str | None = option(None, "Where torchvision's data sets lie; by default data.", DATA)
    val_fraction: Fraction = option(
        0.1, "Share of the training images that selects the best epoch; 0 takes the last epoch.", DATA
    )
    limit: Positive | None = option(None, "Use only this many training images.", DATA)
    on_corrupt: OnCorrupt = option("error", "A corrupt image: error, or skip (and count).", DATA)
    train_data: str | None = option(None, "Class folders or a table to train on, whatever the data set holds.", DATA)
    val_data: str | None = option(None, "Likewise, of the images that select the best epoch.", DATA)
    test_data: str | None = option(None, "Likewise, of the test images.", DATA)
    image_column: str | None = option(
        None, "Of a table: the column of images; by default the only one, or image or img.", DATA
    )
    label_column: str | None = option(
        None,
        "Of a table: the column of labels; by default the only one of classes, or label, fine_label, labels.",
        DATA,
    )
    config: str | None = option(
        None, "Of a Hugging Face data set: its configuration; by default the only one, or default.", DATA
    )
    streaming: bool = option(
        default=False, help="Of a table: read it as it comes, without keeping it; parts are cut in order.", panel=DATA
    )
    num_examples: Positive | None = option(
        None, "With streaming: training images, where the data set doesn't say how many there are."
    )
    shuffle_buffer: Positive | None = option(
        None, "With streaming: images that wait for their turn, from which each is drawn; 1000 by default."
    )
    image_range: tuple[Number, Number] | None = option(
        None, "BLACK,WHITE of images of more than 8 bits: 0,4095.", DATA, read=read_numbers(0, 4095)
    )
    background: str | None = option(
        None, "Colour behind transparent images: a name, #rrggbb or 255,255,255; white by default.", DATA
    )
    mean: tuple[Number, ...] | None = option(
        None,
        "To normalise by, of values in 0..1: 0.5 or 0.5,0.5,0.5; by default the training images', or what pretrained "
        "weights were trained with.",
        DATA,
        read=read_numbers(0.5, 0.5, 0.5),
    )
    std: tuple[Factor, ...] | None = option(None, "Likewise.", DATA, read=read_numbers(0.5, 0.5, 0.5))
    fit: Fit | None = option(None, "Images of another shape: crop (cut; by default), pad (bars) or squash.", DATA)
    transform: str | None = option(
        None,
        "What images go through: imagenet, light (crops and flips), none, module:function, or a plugin's; by default "
        "imagenet for files larger than the model's, where nothing is said of augmenting.",
        DATA,
    )
    interpolation: Interpolation | None = option(
        None,
        "With a transform: nearest, bilinear or bicubic; by default as pretrained weights say, or bicubic.",
        DATA,
    )
    crop: Annotated[float, Limits(gt=0, le=1)] | None = option(
        None,
        "With a transform: central share of the side that is evaluated; by default as pretrained weights say, or "
        "0.875.",
        DATA,
    )


@documented
@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to training images, beyond resizing and normalising.

    Raises:
        RecipeError: for a value outside its range.
    """

    crop_padding: int = option(0, "Pixels of black border from which a crop of the stored size is drawn; 0 is off.")
    flip: bool = option(default=False, help="Mirror half of the images left to right (never for digits or text).")
    rand_augment: tuple[int, int] | None = option(None, "(Number of operations, magnitude 0 to 30); off by default.")
    erasing: float = option(0.0, "Probability that a rectangle of an image is set to the mean colour.")
    mixup: float = option(0.0, "Alpha of mixup; 0 is off. With cutmix on as well, each batch takes one.", METHOD)
    cutmix: float = option(0.0, "Alpha of cutmix; 0 is off.", METHOD)
    label_smoothing: float = option(0.0, "Probability mass spread evenly over all classes.", METHOD)

    def __post_init__(self) -> None:
        """Check every range once, where the settings are built."""
        pad = self.crop_padding
        if not (_is_plain_number(pad) and isinstance(pad, int) and 0 <= pad <= _WIDEST):
            raise RecipeError(f"{arg('crop_padding')} must be 0 or more pixels, at most {_WIDEST}, got {pad!r}.")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if not (_is_plain_number(alpha) and (alpha == 0 or _ALPHAS[0] <= alpha <= _ALPHAS[1])):
                raise RecipeError(
                    f"{arg(name)} is the alpha of a Beta distribution, 0 or from {_ALPHAS[0]:g} to {_ALPHAS[1]:g}, got "
                    f"{alpha!r}."
                )
        if not (_is_plain_number(self.erasing) and 0 <= self.erasing <= 1):
            raise RecipeError(f"{arg('erasing')} is a probability from 0 to 1, got {self.erasing!r}.")
        if not (_is_plain_number(self.label_smoothing) and 0 <= self.label_smoothing < 1):
            raise RecipeError(f"{arg('label_smoothing')} must be from 0 to below 1, got {self.label_smoothing!r}.")
        if self.rand_augment is not None:
            _check_rand_augment(self.rand_augment)

    @property
    def gives_soft_labels(self) -> bool:
        """Whether labels come as probabilities [B, K] instead of class indices [B]."""
        return self.mixup > 0 or self.cutmix > 0 or self.label_smoothing > 0


def _is_plain_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_rand_augment(setting: tuple[int, int]) -> None:
    are_whole = all(_is_plain_number(each) and isinstance(each, int) for each in setting)
    if not are_whole or len(setting) != 2 or setting[0] < 1 or not 0 <= setting[1] <= 30:
        raise RecipeError(
            f"{arg('rand_augment')} is (number of operations from 1, magnitude from 0 to 30), got {tuple(setting)}."
        )
