"""Models of transformers by name, ``hf:FOLDER_OR_NAME``: made of their config alone, without weights, for plans.

The config says everything that memory and time depend on. It is read by transformers itself, from a folder that
``save_pretrained`` made or from the hub, and the model is built by transformers' own Auto class of the task on the meta
device, where it takes no memory. Its weights are of the type that the config names, as ``from_pretrained`` gives them.

A batch of it is made up: token ids with an attention mask, as collators give them, or images.

Source: transformers 5, ``AutoConfig.from_pretrained``, ``AutoModelFor....from_config``.

Shapes: B batch, N tokens, C H W image.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from localgrad.app.recipe import ModelSettings
from localgrad.errors import BackboneError, RecipeError, arg, did_you_mean, reason_of

PREFIX = "hf:"
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


class MadeUp(NamedTuple):
    """A model on the meta device, and two items of what it is called with."""

    model: nn.Module
    example: dict[str, Tensor]


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a model of transformers."""
    return name.startswith(PREFIX)


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
        settings: its name, ``hf:`` and a folder or a name of the hub; the images' size; ``options`` of ``from_config``,
            such as ``dtype``.
        num_classes: by default the config's own.
        num_channels: of the images.
        sequence_length: tokens in a sequence.
        task: one of ``TASKS``; by default as the config says.

    Raises:
        BackboneError: transformers isn't there, or can't make it.
        RecipeError: an option that it doesn't have, or that it needs.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackboneError(
            f"{arg('model', settings.name)}: it takes transformers, which isn't installed; pip install 'localgrad[hf]'."
        ) from error
    for key in ("patch_size", "drop_path"):
        if getattr(settings, key) is not None:
            raise RecipeError(f"{arg(key)}: it is of timm's models; of {settings.name} its config says it.")
    config = _config_of(transformers, settings.name)
    kind = _task_of(config, task, settings.name)
    _check_sizes(config, kind, settings, num_classes=num_classes, sequence_length=sequence_length)
    if num_classes is not None:
        config.num_labels = num_classes
    if kind.is_of_images:
        _set_images(config, settings.img_size, num_channels)
    make = getattr(transformers, kind.auto_class)
    try:
        with torch.device("meta"):
            model: nn.Module = make.from_config(config, **settings.options)
    except Exception as error:  # whatever its code says of a config
        raise BackboneError(
            f"{arg('model', settings.name)}: {kind.auto_class} can't make it ({type(error).__name__}: "
            f"{reason_of(error, 300)}); check {arg('task')} and model.options."
        ) from error
    weights = next(model.parameters()).dtype
    if weights == torch.float16:
        raise BackboneError(
            f"{arg('model', settings.name)}: its config says weights in float16, in which updates get lost; take "
            f"{arg('model.options.dtype', 'bfloat16')} or float32."
        )
    return MadeUp(model, _example_of(model, config, kind, num_channels, sequence_length))


def _config_of(transformers: Any, name: str) -> Any:
    place = name.removeprefix(PREFIX)
    is_path = place.startswith((".", "~", os.sep)) or place.count("/") > 1
    if is_path and not Path(place).expanduser().is_dir():
        raise BackboneError(
            f"{arg('model', name)}: there is no such folder; name one with config.json, as save_pretrained makes it."
        )
    chatter = logging.getLogger("huggingface_hub")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)  # it tells of each try to reach the hub; the last one's reason is told below
    try:
        return transformers.AutoConfig.from_pretrained(str(Path(place).expanduser()) if is_path else place)
    except Exception as error:  # of files, of the network, of what is in a config
        raise BackboneError(
            f"{arg('model', name)}: transformers can't read a config there ({reason_of(error, 200)}); name a folder "
            "with config.json, as save_pretrained makes it, or, online, a model of the hub."
        ) from error
    finally:
        chatter.setLevel(level)


def _task_of(config: Any, task: str | None, name: str) -> HubTask:
    if task is not None:
        if task not in TASKS:
            raise RecipeError(f"{arg('task')}: unknown {task!r}; take {', '.join(TASKS)}.{did_you_mean(task, TASKS)}")
        return TASKS[task]
    classes = config.architectures or []
    found = [kind for kind in TASKS.values() if any(each.endswith(kind.endings) for each in classes)]
    if not found:
        said = f"names {', '.join(classes)}, which is none of them" if classes else "names no class"
        raise RecipeError(f"{arg('task')}: take {', '.join(TASKS)}; the config of {name} {said}.")
    return found[0]


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


def _set_images(config: Any, side: int | None, num_channels: int) -> None:
    if side is not None and hasattr(config, "image_size"):
        config.image_size = [side, side] if isinstance(config.image_size, (list, tuple)) else side
    if hasattr(config, "num_channels"):
        config.num_channels = num_channels


def _example_of(
    model: nn.Module, config: Any, kind: HubTask, num_channels: int, sequence_length: int | None
) -> dict[str, Tensor]:
    """Two items of what a model is called with, on the meta device."""
    if kind.is_of_images:
        size = getattr(config, "image_size", None) or SIDE
        height, width = size if isinstance(size, Iterable) else (size, size)
        return {"pixel_values": torch.empty(2, num_channels, height, width, device="meta")}
    assert sequence_length is not None, "checked before"
    ids = torch.zeros(2, sequence_length, dtype=torch.int64, device="meta")
    takes = inspect.signature(model.forward).parameters
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if "attention_mask" in takes else {})
