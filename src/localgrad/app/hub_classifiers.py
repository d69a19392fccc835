"""Image classifiers of transformers in recipes, ``model.name = "hf:FOLDER_OR_NAME"``: made, loaded, written down.

``from_pretrained`` loads the weights, in float32; the head is new where the data has other classes. Which
weights are the head's is seen by their shapes: those that follow the number of classes. A weight of another shape that
isn't the head's is refused, and not drawn anew in silence, as ``ignore_mismatched_sizes`` would.

Pixels are scaled and normalised as the image processor beside the weights does. It is one affine function of a byte,
whatever its factor and offset, so it is written as mean and std of pixels from 0 to 1, as recipes have them. What else
a processor does to pixels (another order of channels) isn't done here, and refused.

A run keeps the config of its model beside its recipe, so that it can be resumed, evaluated and used when the folder or
the hub is gone. With ``model.safetensors`` and a processor's file, its folder is one that ``from_pretrained`` reads.

Source: transformers 5, ``PreTrainedModel.from_pretrained``, ``AutoImageProcessor``.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from localgrad.app.hub_models import (
    IMAGES,
    ITS_OWN_CODE,
    classifies_images,
    config_of,
    heads_of,
    library_for,
    loading_of,
    made_of,
    place_on_hub,
    quietly,
    set_images,
    side_of,
)
from localgrad.app.recipe import ModelSettings
from localgrad.backbones.adapters import with_adapters
from localgrad.backbones.by_hand import listed
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.weights import LEAST, LoadedWeights
from localgrad.errors import BackboneError, arg, reason_of
from localgrad.training.settings import DataSettings
from localgrad.training.transforms import EVALUATED_SHARE, INTERPOLATION, NONE

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
"""Files of a run that transformers reads."""
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")
"""Of image processors, that data of recipes goes through in its own way, or needn't go through."""
BYTE = 255
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of filters."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def check_classifier(settings: ModelSettings, kept: str | None = None) -> Any:
    """Refuse a model of transformers that is no image classifier; gives its config.

    Args:
        settings: its name and options.
        kept: the text of its config, as a run keeps it.

    Raises:
        BackboneError: it is none, or can't be read.
    """
    transformers = library_for(settings.name)
    config = config_of(settings, kept)
    classes = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), ())
    made = classes if isinstance(classes, (tuple, list)) else (classes,)
    takes = {next(name for name in inspect.signature(each.forward).parameters if name != "self") for each in made}
    if not classifies_images(transformers, config) or "pixel_values" not in takes:
        raise BackboneError(
            f"{arg('model', settings.name)}: recipes train image classifiers, and {config.model_type} is none; it is "
            "planned here, and trained in Python: localgrad.LocalLearner(model, modules=4, example=batch), where a "
            "plan may stand in place of 4, or localgrad.integrations.hf.LocalTrainer."
        )
    return config


def size_of_images(settings: ModelSettings, kept: str | None = None) -> tuple[int, int]:
    """(H, W) of the images that a model takes in a recipe."""
    side = settings.img_size
    return side_of(config_of(settings, kept)) if side is None else (side, side)


def make_classifier(
    settings: ModelSettings, *, num_classes: int | None, num_channels: int, kept: str | None = None
) -> tuple[nn.Module, LoadedWeights | None]:
    """An image classifier with the weights that it starts from and its adapters, and what became of the weights.

    Args:
        settings: as a recipe has them.
        num_classes: by default the config's own.
        num_channels: of the images.
        kept: the text of its config, as a run keeps it.

    Raises:
        BackboneError: it is none, can't be made, or its weights can't be loaded.
        RecipeError: an option that it doesn't have; or peft is missing.
    """
    config = check_classifier(settings, kept)
    theirs = copy.deepcopy(config)
    if num_classes is not None:
        config.num_labels = num_classes
    config.problem_type = None  # a class of each image, whatever it was before
    set_images(config, settings, num_channels)
    heads = heads_of(config, settings) if settings.pretrained or settings.lora is not None else ()
    weights: LoadedWeights | None = None
    if settings.pretrained:
        model, weights = _load(settings, config, theirs, heads)
    else:
        model = made_of(config, IMAGES, settings)
    if settings.lora is not None:  # what is new learns as well: frozen, it would stay as it was drawn
        size = (num_channels, *(side_of(config) if settings.img_size is None else (settings.img_size,) * 2))
        model = with_adapters(model, settings.lora, size, heads=(*heads, *(weights.made_new if weights else ())))
    return model.train(), weights


def _load(settings: ModelSettings, config: Any, theirs: Any, heads: Sequence[str]) -> tuple[nn.Module, LoadedWeights]:
    """A model by ``from_pretrained``, and what became of its weights.

    Args:
        settings: its name.
        config: as it is wanted.
        theirs: as it was read.
        heads: names of the weights that may be new.
    """
    transformers, name = library_for(settings.name), settings.name
    make, named = getattr(transformers, IMAGES.auto_class), f"{arg('model', name)} {arg('pretrained', value=True)}"
    how: Kwargs = {"ignore_mismatched_sizes": True, "output_loading_info": True, **ITS_OWN_CODE}
    how |= loading_of(settings, IMAGES)
    try:
        with quietly():
            model, told = make.from_pretrained(place_on_hub(name), config=config, **how)
    except BackboneError:
        raise
    except Exception as error:  # of files, of the network, of what is in them
        raise BackboneError(
            f"{named}: its weights can't be loaded ({reason_of(error, 300)}); "
            "name a folder with model.safetensors, as save_pretrained makes it, or, online, a model of the hub."
        ) from error
    other = {key: (list(there), list(here)) for key, there, here in told["mismatched_keys"]}
    for key, (there, here) in other.items():
        if key not in heads:
            raise BackboneError(
                f"{named}: {key} is {there} there, and {here} in this model; {_why_other(settings, config, theirs)}."
            )
    new = {*told["missing_keys"], *other}
    own = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    body = {key: count for key, count in own.items() if key not in heads}
    share = sum(count for key, count in body.items() if key not in new) / max(1, sum(body.values()))
    if share < LEAST:
        raise BackboneError(
            f"{named}: {share:.0%} of this model's weights are in it; it has "
            f"{listed(sorted(told['unexpected_keys']))}, the model {listed(sorted(new - set(heads)))}. Name a folder "
            "whose weights are of its config."
        )
    normalised_by, evaluated_by, notes = _processor_beside(settings, config)
    loaded = LoadedWeights(
        source=name,
        num_loaded=len(own.keys() - new),
        left_out=tuple(sorted({*told["unexpected_keys"], *other})),
        made_new=tuple(sorted(new)),
        normalised_by=normalised_by,
        evaluated_by=evaluated_by,
        notes=notes,
    )
    return model, loaded


def _why_other(settings: ModelSettings, config: Any, theirs: Any) -> str:
    """What to do about weights of another shape."""
    channels, own = (getattr(each, "num_channels", None) for each in (config, theirs))
    if channels != own:
        return f"its weights are of images of {own} channels, and the data's have {channels}: take such images"
    if settings.img_size is not None:
        height, width = side_of(theirs)
        size = arg("img_size", height)
        return f"its weights are of images of {height}x{width} pixels, and it takes no others: take {size}"
    return "take its config as it is, without model.options"


def _processor_beside(
    settings: ModelSettings, config: Any
) -> tuple[Statistics | None, dict[str, Any] | None, tuple[str, ...]]:
    """What the image processor beside the weights normalises by, how it resizes, and what is to be said of it."""
    try:
        with quietly():
            processor = library_for(settings.name).AutoImageProcessor.from_pretrained(
                place_on_hub(settings.name), **ITS_OWN_CODE
            )
    except (OSError, ValueError, ImportError):  # there is none, or none that is of images alone
        return None, None, ()
    values: Mapping[str, Any] = processor.to_dict()
    others = [key for key, value in values.items() if key.startswith("do_") and value and key not in STEPS]
    if others:
        raise BackboneError(
            f"{arg('model', settings.name)}: its image processor asks for {', '.join(others)}, which recipes don't do; "
            "take another model, or train in Python: localgrad.LocalLearner(model, modules=4, example=batch)."
        )
    found, resized = statistics_of(values), resizing_beside(values)
    side, taken = _side_of_processor(values), size_of_images(settings) if settings.img_size else side_of(config)
    if side is None or side == taken:
        return found, resized, ()
    advice = f"; {arg('img_size', side[0])} takes those" if side[0] == side[1] else ""
    note = f"Images are {taken[0]}x{taken[1]}, and the image processor's {side[0]}x{side[1]}{advice}."
    return found, resized, (note,)


LARGER = dict.fromkeys(("LevitImageProcessor", "LevitImageProcessorFast"), 224 / 256)
"""Shares that are cut out of images whose processor makes them larger than it says."""
WHOLE_FROM = 384
"""Side from which ConvNext's processor squashes whole images, and cuts nothing."""


def resizing_beside(processor: Mapping[str, Any]) -> dict[str, Any] | None:
    """How an image processor brings images to its size, as timm's configs say it; ``None`` where it doesn't say."""
    if not processor.get("do_resize", True) or processor.get("resample") is None:
        return None
    size: Any = processor.get("size") or {}
    crop: Any = processor.get("crop_size") if processor.get("do_center_crop") else None
    found = {"interpolation": FILTERS.get(int(processor["resample"]), "another"), "crop_pct": 1.0}
    mode = "center" if "shortest_edge" in size else "squash"  # timm squashes to a larger size, and then cuts, too
    edge = size.get("shortest_edge") or size.get("height")
    share = float(processor.get("crop_pct") or LARGER.get(str(processor.get("image_processor_type")), 1.0))
    if edge and isinstance(crop, Mapping) and "height" in crop:
        return {**found, "crop_mode": mode, "crop_pct": share * int(crop["height"]) / int(edge)}
    if edge and processor.get("crop_pct") and mode == "center" and int(edge) < WHOLE_FROM:
        return {**found, "crop_mode": mode, "crop_pct": share}
    return {**found, "crop_mode": "squash"}


def statistics_of(processor: Mapping[str, Any]) -> Statistics | None:
    """(mean, std) of pixels from 0 to 1 that do what an image processor does to bytes; ``None`` where it doesn't say.

    Args:
        processor: its values. Pixels x in bytes become ``(x * rescale_factor - offset - image_mean) / image_std``, of
            which EfficientNet's may have an offset of 1 (``rescale_offset``), and divides by the std once more
            (``include_top``).
    """
    mean, std = _per_channel(processor.get("image_mean")), _per_channel(processor.get("image_std"))
    again = std
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * (len(mean) or 1), (1.0,) * (len(std) or 1)
    if not mean or len(mean) != len(std):
        return None
    factor = float(processor.get("rescale_factor") or 1 / BYTE) if processor.get("do_rescale", True) else 1.0
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    if processor.get("include_top"):
        std = tuple(each * more for each, more in zip(std, again or std, strict=True))
    scale = factor * BYTE if abs(factor * BYTE - 1) > 1e-6 else 1.0
    return tuple((each + offset) / scale for each in mean), tuple(each / scale for each in std)


def _per_channel(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),)


def _side_of_processor(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """(H, W) of what an image processor gives, where it says so."""
    size: Any = values.get("crop_size") if values.get("do_center_crop") else None
    size = size or values.get("size") or {}
    if isinstance(size, Mapping) and "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    if isinstance(size, Mapping) and "shortest_edge" in size and not values.get("do_center_crop"):
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def config_text(model: nn.Module, class_names: Sequence[str]) -> str:
    """A model's config as a run keeps it: every value, and the names of the data's classes."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}
    text: str = config.to_json_string(use_diff=False)
    return text


def processor_text(
    image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], data: DataSettings
) -> str | None:
    """The image processor of a run, as transformers reads it: CLIP's, whose steps are those of a recipe's images.

    Args:
        image_size: (H, W).
        mean: of pixels from 0 to 1; one for each of three channels.
        std: likewise.
        data: what images go through.

    Returns:
        The text of its file; ``None`` where it has no steps that do what is done to images here.
    """
    height, width = image_size
    is_whole, is_ours = data.transform in (None, NONE), data.transform in ("imagenet", "light")
    if len(mean) != 3 or height != width or not (is_ours or (is_whole and data.fit != "pad")):
        return None
    sides = {"height": height, "width": width}
    shorter = height if is_whole else math.floor(height / (data.crop or EVALUATED_SHARE))
    is_cropped = not (is_whole and data.fit == "squash")
    numbers = {name: number for number, name in FILTERS.items()}
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": shorter} if is_cropped else sides,
        "resample": numbers[INTERPOLATION if is_whole else data.interpolation or INTERPOLATION],
        "do_center_crop": is_cropped,
        "crop_size": sides,
        "do_rescale": True,
        "rescale_factor": 1 / BYTE,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }
    return json.dumps(values, indent=2) + "\n"
