"""A run's model as timm reads it: ``config.json`` beside ``model.safetensors``.

The images of a recipe go through its transform in evaluation, which is told in timm's words: ``crop_pct`` and
``interpolation`` of a centre that is cut out, or the whole image brought to the model's size. What timm has no words
for is said in ``notes`` of the config, sentence by sentence.

Shapes: C channels, H W of the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from localgrad.app.hub_models import is_on_hub
from localgrad.app.recipe import ModelSettings, Recipe
from localgrad.backbones.base import BACKBONES
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.timm_config import is_of_timm, remembers_arguments, timm_config
from localgrad.training.augment import share_cut_off
from localgrad.training.settings import DataSettings
from localgrad.training.transforms import EVALUATED_SHARE, INTERPOLATION, NONE

if TYPE_CHECKING:
    from localgrad.training.data import DataInfo

_MODES = {"crop": "center", "squash": "squash", "pad": "border"}
"""timm's words for how whole images of another shape are brought to the model's."""

TINY = 1e-9
"""A share of an image that is none, but for rounding."""


@dataclass(frozen=True)
class Evaluated:
    """What images go through in evaluation, in timm's words, and what these leave open."""

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def evaluated_images(data: DataSettings, info: DataInfo, size: tuple[int, int, int]) -> Evaluated:
    """What a run's images go through in evaluation.

    Args:
        data: as the recipe has it.
        info: of the data.
        size: (C, H, W) that the model takes.
    """
    _, height, width = size
    is_whole, is_ours = data.transform in (None, NONE), data.transform in ("imagenet", "light")
    notes = []
    if is_whole:
        found = {"interpolation": INTERPOLATION, "crop_pct": 1.0, "crop_mode": _MODES[info.fit]}
        if info.fit == "pad":
            notes.append(f"Bars beside images have the colour {info.background}, and in timm the mean of pixels.")
        elif info.fit == "crop" and (info.found_size is None or share_cut_off(info.found_size, (height, width)) > TINY):
            notes.append(
                "Images of another shape than the model's were cut, and then resized; timm and transformers resize "
                "them first, so that probabilities may differ by some thousandths."
            )
    else:
        found = {"interpolation": data.interpolation or INTERPOLATION, "crop_pct": data.crop or EVALUATED_SHARE}
        found["crop_mode"] = "center"
        if not is_ours:
            notes.append(f"Images went through the transform {data.transform}, which timm doesn't know.")
        elif height != width:
            notes.append("Images were brought to the longer side of the model's, and then cut.")
    if info.image_range is not None:
        low, high = info.image_range
        notes.append(f"Pixels of more than 8 bits were scaled from {low:g} to {high:g}.")
    values = {"input_size": list(size), "mean": list(info.mean), "std": list(info.std), **found}
    return Evaluated(values | ({"notes": notes} if notes else {}), tuple(notes))


def is_timm_run(recipe: Recipe, model: nn.Module) -> bool:
    """Whether timm makes a recipe's model."""
    name = recipe.method.model.name
    return not is_on_hub(name) and name not in BACKBONES and is_of_timm(model)


def timm_config_of_run(recipe: Recipe, model: nn.Module, info: DataInfo, size: tuple[int, int, int]) -> str:
    """The text of ``config.json`` of a run's model.

    Args:
        recipe: of the run.
        model: of timm; with adapters in its layers or without.
        info: of the data.
        size: (C, H, W) that the model takes.

    Raises:
        BackboneError: timm can't write it.
    """
    settings = recipe.method.model
    return timm_config(
        model,
        model_args=_model_arguments(settings, model, size[0], info.num_classes),
        class_names=info.class_names,
        images=evaluated_images(recipe.method.data, info, size).values,
        keeps_source=settings.pretrained,
    )


def _model_arguments(settings: ModelSettings, model: nn.Module, num_channels: int, num_classes: int) -> Kwargs:
    """Arguments of ``timm.create_model`` that a recipe says; timm adds the size, where it remembers it."""
    found = {**settings.options, "in_chans": num_channels, "num_classes": num_classes}
    if settings.patch_size is not None:
        found["patch_size"] = settings.patch_size
    takes_size = hasattr(getattr(model, "patch_embed", None), "img_size")
    if settings.img_size is not None and takes_size and not remembers_arguments(model):
        found["img_size"] = settings.img_size
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
