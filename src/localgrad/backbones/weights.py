"""Weights to start from: a file, a folder or a name of the hub, brought to a model's own shapes by timm's functions.

timm's models keep how foreign checkpoints are renamed and how position embeddings are resized in a function beside each
family (``checkpoint_filter_fn``). It has no public name: this is the one place that calls it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from localgrad.backbones.by_hand import listed
from localgrad.backbones.timm_models import beginnings_of_heads
from localgrad.errors import BackboneError, arg, did_you_mean, reason_of

FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
"""What a folder's weights are called: of timm, of transformers, and of a run of ours."""
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
HUB = ("hf-hub:", "hf_hub:")
_RESIZING = ("crop_pct", "interpolation", "crop_mode")
LEAST = 0.5
"""Share of a model's weights without its head that a file must have: else it is another model's."""


@dataclass(frozen=True)
class LoadedWeights:
    """What became of a file's weights.

    Attributes:
        source: as it was named.
        num_loaded: tensors that were taken.
        resized: names of those that were brought to another size.
        left_out: in the file, not in the model.
        made_new: in the model, not in the file: the head, for other classes.
        normalised_by: (mean, std) of the images that they were trained on, where the source says so.
        evaluated_by: likewise how images are brought to the model's size, as timm's configs say it: ``crop_pct``,
            ``interpolation`` and ``crop_mode``.
        notes: what else is to be known of them, a sentence each.
    """

    source: str
    num_loaded: int
    resized: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    made_new: tuple[str, ...] = ()
    normalised_by: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    evaluated_by: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people."""
        told = {"resized": self.resized, "left out": self.left_out, "made new": self.made_new}
        more = "".join(f"; {what}: {listed(names)}" for what, names in told.items() if names)
        return f"Weights of {self.source}: {self.num_loaded} tensors loaded{more}."


@dataclass(frozen=True)
class _SourceFound:
    """Weights as they lie somewhere, and what stands beside them."""

    weights: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)


def start_from(model: nn.Module, source: str) -> LoadedWeights:
    """Load weights into a timm model: its head is left new for other classes, position embeddings are resized.

    Args:
        model: made, with the classes and the image size that it is trained with.
        source: a file (safetensors, or what ``torch.save`` wrote, read without running code), a folder with one
            (timm's, or a run's), or a name of the hub (``hf-hub:timm/vit_tiny_patch16_224.augreg_in21k``).

    Returns:
        What was loaded, left out and made new.

    Raises:
        BackboneError: it can't be read, or holds another model's weights; the message says which.
    """
    found = _weights_at(source)
    _check_architecture(model, found.config, source)
    weights = _renamed(model, found.weights, source)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = set(model.state_dict())
    head = beginnings_of_heads(model)
    resized = [
        name for name, tensor in found.weights.items() if name in weights and weights[name].shape != tensor.shape
    ]
    taken: dict[str, Tensor] = {}
    others: list[str] = []
    for name in sorted(weights.keys() & kept):
        tensor, wanted = weights[name], own[name]
        if tensor.shape != wanted.shape and name == f"{_first_convolution(model)}.weight":
            tensor = _other_channels(tensor, wanted.shape[1])
            resized.append(name)
        if tensor.shape == wanted.shape:
            taken[name] = tensor
        elif not name.startswith(head):
            others.append(f"{name} is {list(tensor.shape)} there, and {list(wanted.shape)} in this model")
    _check_enough(model, own, taken, weights, source)
    if others:
        raise BackboneError(
            f"{arg('weights', source)}: {others[0]}; take the model that the weights are of, with its own options."
        )
    model.load_state_dict(taken, strict=False)
    return LoadedWeights(
        source=source,
        num_loaded=len(taken),
        resized=tuple(name for name in resized if name in taken),
        left_out=tuple(sorted(weights.keys() - taken.keys())),
        made_new=tuple(sorted(kept - taken.keys())),
        normalised_by=_normalised_by(found.config),
        evaluated_by={key: found.config[key] for key in _RESIZING if found.config.get(key)} or None,
    )


def check_source(source: str) -> Path:
    """The path of a source of weights, which need not be read yet.

    Raises:
        BackboneError: it is neither a path that there is, nor a name of the hub.
    """
    path = Path(source).expanduser()
    if path.exists() or source.startswith(HUB):
        return path
    near = did_you_mean(path.name, [each.name for each in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise BackboneError(
        f"{arg('weights', source)}: there is no such file or folder; name one, or {HUB[0]}OWNER/NAME of the hub.{near}"
    )


def _weights_at(source: str) -> _SourceFound:
    """The weights of a source, and its config where it has one."""
    import timm.models

    path = check_source(source)
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.exists():
            return _SourceFound(_only_tensors(timm.models.load_state_dict(str(path)), source))
        name = source.partition(":")[2]
        config, _, _ = timm.models.load_model_config_from_hf(name)
        return _SourceFound(_only_tensors(timm.models.load_state_dict_from_hf(name, weights_only=True), source), config)
    except BackboneError:
        raise
    except Exception as error:  # whatever the libraries say of a file
        raise BackboneError(f"{arg('weights', source)}: it can't be read ({reason_of(error)}).") from error


def _read_folder(path: Path) -> _SourceFound:
    import timm.models

    files = [path / name for name in FILES if (path / name).is_file()]
    if not files:
        files = sorted(each for each in path.iterdir() if each.suffix in ENDINGS)
    if len(files) != 1 and not (files and files[0].name in FILES):
        seen = listed([each.name for each in files]) if files else "none"
        raise BackboneError(
            f"{arg('weights', path)}: a folder has one file of weights, such as {FILES[0]}; here are: {seen}. Name one."
        )
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        read = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = {**read, **(read.get("pretrained_cfg") or {})}
    elif (path / "data.json").is_file():  # a run of ours
        config = json.loads((path / "data.json").read_text(encoding="utf-8")) | _resized_in_run(path)
    return _SourceFound(_only_tensors(timm.models.load_state_dict(str(files[0])), str(path)), config)


def _resized_in_run(path: Path) -> dict[str, Any]:
    """How a run's images were brought to its model's size, in timm's words; nothing where it doesn't say."""
    import tomllib

    file = path / "recipe.toml"
    own = tomllib.loads(file.read_text(encoding="utf-8")).get("data", {}) if file.is_file() else {"transform": "?"}
    if own.get("transform", "none") == "none":
        return {"crop_pct": 1.0, "interpolation": "bicubic"}
    return {"crop_pct": own.get("crop"), "interpolation": own.get("interpolation")}


def _only_tensors(found: Any, source: str) -> dict[str, Tensor]:
    """A state dict's tensors; other things that trainers save beside them are passed over."""
    tensors = {name: each for name, each in dict(found).items() if isinstance(each, Tensor)}
    if not tensors:
        raise BackboneError(f"{arg('weights', source)}: there are no tensors in it.")
    return tensors


def _check_architecture(model: nn.Module, config: Mapping[str, Any], source: str) -> None:
    theirs = config.get("architecture")
    own = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if isinstance(theirs, str) and own is not None and theirs.partition(".")[0] != own:
        raise BackboneError(
            f"{arg('weights', source)}: they are of {theirs}, and this model is {own}; take "
            f"{arg('model', theirs.partition('.')[0])}."
        )


def _renamed(model: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights by the names that timm's model gives them, position embeddings at its size."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about how timm resizes
            return _only_tensors(adapt(dict(weights), model), source)
    except BackboneError:
        raise
    except Exception as error:  # made for checkpoints of the family; of others it says anything
        raise BackboneError(
            f"{arg('weights', source)}: they don't fit {type(model).__name__} ({type(error).__name__}: "
            f"{reason_of(error)}); take the model that the weights are of."
        ) from error


def _first_convolution(model: nn.Module) -> str:
    named = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ""
    return named if isinstance(named, str) else str(next(iter(named), ""))


def _other_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weights for another number of channels, as timm makes them."""
    from timm.models import adapt_input_conv

    if weight.ndim != 4 or weight.shape[1] != 3:
        return weight
    adapted: Tensor = adapt_input_conv(channels, weight)
    return adapted


def _check_enough(
    model: nn.Module,
    own: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
) -> None:
    """Refuse a file of which little or nothing is this model's."""
    head = beginnings_of_heads(model)
    body = {name: tensor.numel() for name, tensor in own.items() if not name.startswith(head)}
    share = sum(count for name, count in body.items() if name in taken) / max(1, sum(body.values()))
    if share < LEAST:
        theirs, ours = listed(sorted(weights.keys() - taken.keys())), listed(sorted(body.keys() - taken.keys()))
        raise BackboneError(
            f"{arg('weights', source)}: {share:.0%} of this model's weights are in it; it has {theirs}, the model "
            f"{ours}. Take the model that the weights are of."
        )


def _normalised_by(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    mean, std = config.get("mean"), config.get("std")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std)):
        return None
    return tuple(map(float, mean)), tuple(map(float, std))
