"""A timm model's ``config.json``, by which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` makes it again.

timm writes it itself (``timm.models.save_for_hf``): the architecture, the arguments that the model was made with, its
classes, and what images go through. This is the one place that calls it, and that knows its keys. Without a kind of
weights (``safe_serialization=None``) it writes the config alone. What a run knows better is laid over it: timm's own
values are those of the weights that a model started from, and older versions of timm know fewer arguments.

Source: timm 1.0.31, ``models/_hub.py`` (``save_config_for_hf``, ``load_model_config_from_path``).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from localgrad.backbones.namespaces import Kwargs
from localgrad.errors import BackboneError, reason_of

WEIGHTS = "model.safetensors"
"""What a folder's weights are called, of timm and of transformers."""
_OF_OTHER_WEIGHTS = ("test_input_size", "test_crop_pct", "test_pool_size", "min_input_size", "label_offset")
"""What timm recommends for the weights that a model started from."""
_OF_SOURCE = ("license", "tag", "description", "notes", "origin_url")
"""What is told of those weights, and isn't so of a model that was trained from random ones."""

_NOT_WRITTEN = ("architecture", "state_dict", "url", "file", "hf_hub_id", "hf_hub_filename", "source")
"""What stands elsewhere in the file, or says where those weights are."""


def is_of_timm(model: nn.Module) -> bool:
    """Whether timm made a model, and can make it again by the name of its architecture."""
    import timm

    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return isinstance(architecture, str) and timm.is_model(architecture)


def timm_config(
    model: nn.Module,
    *,
    model_args: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    images: Mapping[str, Any] | None = None,
    keeps_source: bool = True,
) -> str:
    """The text of a timm model's ``config.json``.

    Args:
        model: of timm.
        model_args: arguments of ``timm.create_model``, beside those that timm remembers.
        class_names: in the order of the labels.
        images: what images go through, in timm's words: ``mean``, ``std``, ``input_size``, ``crop_pct`` and others.
        keeps_source: whether licence and origin of timm's weights are those of this model.

    Raises:
        BackboneError: timm can't write it.
    """
    import timm.models

    dropped = (*(_OF_OTHER_WEIGHTS if images else ()), *(() if keeps_source else _OF_SOURCE))
    source: Any = model.pretrained_cfg
    own = {key: value for key, value in source.items() if key not in (*dropped, *_NOT_WRITTEN)} | dict(images or {})
    # Given beforehand as well: timm would make its own of three channels, for another number of them.
    told: Kwargs = {"pretrained_cfg": own} | ({"label_names": list(class_names)} if class_names else {})
    with tempfile.TemporaryDirectory() as folder:
        try:
            timm.models.save_for_hf(
                model, folder, model_config=told, model_args=dict(model_args or {}), safe_serialization=None
            )
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        except Exception as error:  # of many kinds, asserts among them
            raise BackboneError(f"timm can't write this model's config.json ({reason_of(error, 300)}).") from error
    known = config["pretrained_cfg"]
    for key in dropped:
        known.pop(key, None)
    known.update(images or {})
    known["num_classes"] = config["num_classes"]
    return json.dumps(config, indent=2) + "\n"


def remembers_arguments(model: nn.Module) -> bool:
    """Whether this version of timm remembers what a model was made with."""
    return hasattr(model, "_model_args")
