"""Models of transformers by name, ``hf:FOLDER_OR_NAME``: made of their config alone, without weights, for plans.

The config says everything that memory and time depend on. It is read by transformers itself, from a folder that
``save_pretrained`` made or from the hub, and the model is built by transformers' own Auto class of the task on the meta
device, where it takes no memory. Its weights are of the type that the config names, as ``from_pretrained`` gives them;
those of image classifiers are float32, as recipes train them (``hub_classifiers``).

A batch of it is made up: token ids with an attention mask, as collators give them, or images.

Source: transformers 5, ``AutoConfig.from_pretrained``, ``AutoModelFor....from_config``.

Shapes: B batch, N tokens, C H W image.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from localgrad.app.recipe import ModelSettings
from localgrad.backbones.adapters import with_adapters
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.quantized import quantize_base
from localgrad.errors import BackboneError, RecipeError, arg, did_you_mean, reason_of
from localgrad.rules import HUB_PREFIX

SIDE = 224
"""Of the images, in pixels, where a config doesn't say it."""


@dataclass(frozen=True)
class HubTask:
    """What a model is made for.

    Attributes:
        auto_class: of transformers, that makes it.
        endings: of the names of its classes.
        is_of_images: whether it is given images, and not token ids.
        has_labels: whether how many classes there are is anybody's choice, and not the vocabulary's size.
    """

    auto_class: str
    endings: tuple[str, ...]
    is_of_images: bool = False
    has_labels: bool = True


TASKS = {
    "causal-lm": HubTask("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), has_labels=False),
    "masked-lm": HubTask("AutoModelForMaskedLM", ("ForMaskedLM",), has_labels=False),
    "sequence-classification": HubTask("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "token-classification": HubTask("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "image-classification": HubTask("AutoModelForImageClassification", ("ForImageClassification",), is_of_images=True),
}
"""By name; of a model without a name that is asked for, by what its config says of its class."""


IMAGES = TASKS["image-classification"]
OF_LOADING = ("dtype", "attn_implementation")
"""Options that aren't the config's: how ``from_pretrained`` and ``from_config`` make the model."""


ITS_OWN_CODE = {"trust_remote_code": False}
"""Code that lies beside weights is never run."""


class MadeUp(NamedTuple):
    """A model on the meta device, and two items of what it is called with."""

    model: nn.Module
    example: dict[str, Tensor] | Tensor


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a model of transformers."""
    return name.startswith(HUB_PREFIX)


def make_from_config(
    settings: ModelSettings,
    *,
    num_classes: int | None = None,
    num_channels: int = 3,
    sequence_length: int | None = None,
    task: str | None = None,
) -> MadeUp:
    """Make a model of its config alone.

    Args:
        settings: its name, ``hf:`` and a folder or a name of the hub; the images' size; ``options``: values of the
            config, and ``OF_LOADING``; the rank of adapters of an image classifier.
        num_classes: by default the config's own.
        num_channels: of the images.
        sequence_length: tokens in a sequence.
        task: one of ``TASKS``; by default as the config says.

    Raises:
        BackboneError: transformers isn't there, or can't make it.
        RecipeError: an option that it doesn't have, or that it needs.
    """
    transformers = library_for(settings.name)
    config = config_of(settings)
    kind = _task_of(transformers, config, task, settings.name)
    _check_sizes(config, kind, settings, num_classes=num_classes, sequence_length=sequence_length)
    if num_classes is not None:
        config.num_labels = num_classes
    if kind.is_of_images:
        set_images(config, settings, num_channels)
    elif settings.lora is not None:
        raise RecipeError(
            f"{arg('lora')}: of models of transformers image classifiers alone are given adapters here; in Python, "
            "localgrad.plan takes the model as peft made it."
        )
    model = made_of(config, kind, settings, device="meta")
    weights = next(model.parameters()).dtype
    if weights == torch.float16:
        raise BackboneError(
            f"{arg('model', settings.name)}: its config says weights in float16, in which updates get lost; take "
            f"{arg('model.options.dtype', 'bfloat16')} or float32."
        )
    side = settings.img_size
    size = side_of(config) if side is None else (side, side)
    if settings.lora is not None:
        with torch.device("meta"):
            model = with_adapters(model, settings.lora, (num_channels, *size), heads=heads_of(config, settings))
            model = model if settings.quantize is None else quantize_base(model, has_values=False)
    if kind.is_of_images:  # as a recipe's data gives them
        return MadeUp(model, torch.empty(2, num_channels, *size, device="meta"))
    return MadeUp(model, _tokens_for(model, sequence_length))


def library_for(name: str) -> Any:
    """The package transformers, for a model of it.

    Raises:
        BackboneError: it isn't there.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackboneError(
            f"{arg('model', name)}: it takes transformers, which isn't installed; pip install 'localgrad[hf]'."
        ) from error
    return transformers


def place_on_hub(name: str) -> str:
    """The folder, or the name on the hub, that a model's name has.

    Raises:
        BackboneError: it is a path, and no folder is there.
    """
    place = name.removeprefix(HUB_PREFIX)
    is_path = place.startswith((".", "~", os.sep)) or place.count("/") > 1
    if not is_path:
        return place
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise BackboneError(
            f"{arg('model', name)}: there is no such folder; name one with config.json, as save_pretrained makes it."
        )
    return str(folder)


@contextmanager
def quietly() -> Iterator[None]:
    """A region in which transformers and its hub print nothing: what is to be known is said by whoever loads."""
    from transformers.utils import logging as said

    hub, level, bars = logging.getLogger("huggingface_hub"), said.get_verbosity(), said.is_progress_bar_enabled()
    before = hub.level
    hub.setLevel(logging.CRITICAL)  # it tells of each try to reach the hub; the last one's reason is told
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(before)
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()


def config_of(settings: ModelSettings, kept: str | None = None) -> Any:
    """The config of a model, with the values of ``settings.options`` that are its own.

    Args:
        settings: its name and options.
        kept: the text of a config, in place of reading one.

    Raises:
        BackboneError: there is none, or none that transformers can read.
        RecipeError: an option that isn't one of its values.
    """
    transformers, name = library_for(settings.name), settings.name
    try:
        with quietly():
            if kept is None:
                config = transformers.AutoConfig.from_pretrained(place_on_hub(name), **ITS_OWN_CODE)
            else:
                values = json.loads(kept)
                config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except BackboneError:
        raise
    except Exception as error:  # of files, of the network, of what is in a config
        raise BackboneError(
            f"{arg('model', name)}: transformers can't read a config there ({reason_of(error, 200)}); name a folder "
            "with config.json, as save_pretrained makes it, or, online, a model of the hub."
        ) from error
    known = config.to_dict()
    for key, value in settings.options.items():
        if key in OF_LOADING:
            continue
        named = f"model.options.{key}"
        if key not in known:
            raise RecipeError(f"{arg(named)}: the config of {name} has no {key!r}.{did_you_mean(key, known)}")
        try:
            setattr(config, key, value)
        except Exception as error:  # as transformers checks its types
            raise RecipeError(f"{arg(named, value)}: it can't be that ({reason_of(error, 200)}).") from error
    return config


def loading_of(settings: ModelSettings, kind: HubTask) -> Kwargs:
    """Keywords of ``from_pretrained`` and ``from_config``: a recipe's images are float32, and so its weights.

    Raises:
        RecipeError: another type for them.
    """
    given = {key: value for key, value in settings.options.items() if key in OF_LOADING}
    if not kind.is_of_images:
        return given
    wanted = given.setdefault("dtype", "float32")
    if wanted != "float32":
        raise RecipeError(
            f"{arg('model.options.dtype', wanted)}: recipes keep an image classifier's weights in float32; take "
            f"{arg('precision', 'bf16')}, which computes in that."
        )
    return given


def made_of(config: Any, kind: HubTask, settings: ModelSettings, *, device: str = "cpu") -> nn.Module:
    """A model of its config, of random weights.

    Raises:
        BackboneError: transformers can't make it.
    """
    make, how = getattr(library_for(settings.name), kind.auto_class), loading_of(settings, kind)
    try:
        with quietly(), torch.device(device):
            model: nn.Module = make.from_config(config, **how)
    except Exception as error:  # whatever its code says of a config
        raise BackboneError(
            f"{arg('model', settings.name)}: {kind.auto_class} can't make it ({type(error).__name__}: "
            f"{reason_of(error, 300)}); check {arg('task')} and model.options."
        ) from error
    return model


def heads_of(config: Any, settings: ModelSettings) -> tuple[str, ...]:
    """Names of an image classifier's weights whose shapes follow the number of classes."""
    other = copy.deepcopy(config)
    other.num_labels = config.num_labels + 1
    shapes, others = (
        {name: weight.shape for name, weight in made_of(each, IMAGES, settings, device="meta").state_dict().items()}
        for each in (copy.deepcopy(config), other)
    )
    return tuple(name for name, shape in shapes.items() if others[name] != shape)


def _task_of(transformers: Any, config: Any, task: str | None, name: str) -> HubTask:
    if task is not None:
        if task not in TASKS:
            raise RecipeError(f"{arg('task')}: unknown {task!r}; take {', '.join(TASKS)}.{did_you_mean(task, TASKS)}")
        return TASKS[task]
    classes = config.architectures or []
    found = [kind for kind in TASKS.values() if any(each.endswith(kind.endings) for each in classes)]
    if not found and classifies_images(transformers, config):
        return IMAGES
    if not found:
        said = f"names {', '.join(classes)}, which is none of them" if classes else "names no class"
        raise RecipeError(f"{arg('task')}: take {', '.join(TASKS)}; the config of {name} {said}.")
    return found[0]


def classifies_images(transformers: Any, config: Any) -> bool:
    """Whether transformers has an image classifier of a config's kind."""
    return type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _check_sizes(
    config: Any, kind: HubTask, settings: ModelSettings, *, num_classes: int | None, sequence_length: int | None
) -> None:
    """Refuse sizes that a model doesn't have, or lacks."""
    if not kind.has_labels and num_classes is not None:
        raise RecipeError(f"{arg('num_classes')}: a language model's classes are its vocabulary; leave it out.")
    if kind.is_of_images:
        if sequence_length is not None:
            raise RecipeError(
                f"{arg('sequence_length')}: {settings.name} is given images; take {arg('img_size')}, or leave it out."
            )
        return
    if settings.img_size is not None:
        raise RecipeError(f"{arg('img_size')}: {settings.name} is given tokens; take {arg('sequence_length', 512)}.")
    if sequence_length is None:
        raise RecipeError(
            f"{arg('sequence_length')}: memory depends on how many tokens a sequence has; take "
            f"{arg('sequence_length', 512)}, say."
        )
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if sequence_length < 2 or (most is not None and sequence_length > most):
        upto = "" if most is None else f" to {most}, as its config says"
        raise RecipeError(f"{arg('sequence_length', sequence_length)}: {settings.name} takes 2{upto}.")


def set_images(config: Any, settings: ModelSettings, num_channels: int) -> None:
    """Make a config one for images of a size and a number of channels.

    Its own size stays where a model of it takes the other one as it is: Dinov2 fits its position embeddings to what it
    is given, and a convolutional model has none.
    """
    of_images, side = _of_images(config), settings.img_size
    if hasattr(of_images, "num_channels"):
        of_images.num_channels = num_channels
    if side is None or not hasattr(of_images, "image_size") or side_of(config) == (side, side):
        return
    if not _takes(config, settings, num_channels, side):
        of_images.image_size = [side, side] if isinstance(of_images.image_size, (list, tuple)) else side


def _of_images(config: Any) -> Any:
    """The config that says what images are like: a model's own, or that of the one of two towers that sees them."""
    return config if hasattr(config, "image_size") else getattr(config, "vision_config", config)


def _takes(config: Any, settings: ModelSettings, num_channels: int, side: int) -> bool:
    """Whether a model of a config, as it is, runs on images of another size; by shapes alone."""
    try:
        model = made_of(copy.deepcopy(config), IMAGES, settings, device="meta").eval()
        images = torch.empty(2, num_channels, side, side, device="meta", dtype=next(model.parameters()).dtype)
        with torch.no_grad(), torch.device("meta"):
            model(images)
    except Exception:  # whatever its code says of images of another size
        return False
    return True


def side_of(config: Any) -> tuple[int, int]:
    """(H, W) of the images that a config is of."""
    size = getattr(_of_images(config), "image_size", None) or SIDE
    height, width = size if isinstance(size, Iterable) else (size, size)
    return height, width


def _tokens_for(model: nn.Module, sequence_length: int | None) -> dict[str, Tensor]:
    """Two sequences as collators give them, on the meta device."""
    assert sequence_length is not None, "checked before"
    ids = torch.zeros(2, sequence_length, dtype=torch.int64, device="meta")
    takes = inspect.signature(model.forward).parameters
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if "attention_mask" in takes else {})
