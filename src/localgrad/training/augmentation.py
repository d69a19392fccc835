"""Settings of training that a recipe has, without the code that they set: so that reading them needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localgrad.errors import RecipeError, arg
from localgrad.options import METHOD, documented, option


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
        if self.crop_padding < 0:
            raise RecipeError(f"{arg('crop_padding')} must be 0 or more pixels, got {self.crop_padding}.")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if not 0 <= alpha < math.inf:
                raise RecipeError(f"{arg(name)} is the alpha of a Beta distribution, 0 or more, got {alpha}.")
        if not 0 <= self.erasing <= 1:
            raise RecipeError(f"{arg('erasing')} is a probability from 0 to 1, got {self.erasing}.")
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(f"{arg('label_smoothing')} must be from 0 to below 1, got {self.label_smoothing}.")
        if self.rand_augment is not None:
            _check_rand_augment(self.rand_augment)

    @property
    def gives_soft_labels(self) -> bool:
        """Whether labels come as probabilities [B, K] instead of class indices [B]."""
        return self.mixup > 0 or self.cutmix > 0 or self.label_smoothing > 0


def _check_rand_augment(setting: tuple[int, int]) -> None:
    if len(setting) != 2 or setting[0] < 1 or not 0 <= setting[1] <= 30:
        raise RecipeError(
            f"{arg('rand_augment')} is (number of operations from 1, magnitude from 0 to 30), got {tuple(setting)}."
        )
