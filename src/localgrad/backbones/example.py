"""An example batch: what a model is called with, and which of it becomes the features.

A tensor, or any tree of tensors: a tuple of positional arguments, or a dict of keywords as data loaders of Hugging Face
give them. One tensor is the *main* one, which turns into features (images, token ids, embeddings); the others (masks,
positions) go along with it.

Shapes: B batch, first in every tensor of an example that has one row an item.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from localgrad.backbones.namespaces import Kwargs
from localgrad.errors import BackboneError

MAIN_NAMES = ("pixel_values", "input_ids", "inputs_embeds", "images", "input_values", "x")
"""Keywords of what turns into features, in Hugging Face's models and others."""
LABEL_NAMES = ("labels", "label", "label_ids")
"""Keywords of a batch that aren't the model's input here: losses are computed by the local modules."""
LOGIT_NAMES = ("logits", "last_hidden_state")
"""Where outputs with names have what the task loss is computed of, the first that is there."""

Path = tuple[Any, ...]


@final
@dataclass(frozen=True)
class Example:
    """What a model is called with: positional arguments, keywords, and where the main tensor is among them.

    Attributes:
        args: positional arguments.
        kwargs: keywords, without labels.
        main: path of the main tensor: ("args", 0), or ("kwargs", "input_ids").
    """

    args: tuple[Any, ...]
    kwargs: Kwargs
    main: Path

    @classmethod
    def of(cls, batch: Any, name: str = "example") -> Example:
        """From what users have: a tensor, a tuple of positional arguments, or a dict (labels are left out).

        Raises:
            BackboneError: there is no tensor in it.
        """
        if isinstance(batch, Example):
            return batch
        if isinstance(batch, Tensor):
            return cls((batch,), {}, ("args", 0))
        if isinstance(batch, Mapping):
            kwargs = {key: value for key, value in batch.items() if key not in LABEL_NAMES}
            names = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
            known = [key for key in MAIN_NAMES if key in names]
            if names:
                return cls((), kwargs, ("kwargs", (known or names)[0]))
        elif isinstance(batch, Sequence) and not isinstance(batch, str) and any(isinstance(v, Tensor) for v in batch):
            first = next(index for index, value in enumerate(batch) if isinstance(value, Tensor))
            return cls(tuple(batch), {}, ("args", first))
        raise BackboneError(
            f"{name}: got {type(batch).__name__}; give what the model is called with: a tensor, a tuple of positional "
            "arguments, or a dict of keywords, such as one batch of your data loader."
        )

    @property
    def tensor(self) -> Tensor:
        """The main tensor, [B, ...]."""
        found: Tensor = (self.args if self.main[0] == "args" else self.kwargs)[self.main[1]]
        return found

    @property
    def num_items(self) -> int:
        """B."""
        return len(self.tensor)

    @property
    def is_single(self) -> bool:
        """Whether it is a single tensor."""
        return len(self.args) == 1 and not self.kwargs

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """With every tensor changed; one that stands twice is changed once."""
        known: dict[int, Tensor] = {}
        return Example(mapped(self.args, change, known), mapped(self.kwargs, change, known), self.main)

    def leaves(self) -> list[tuple[Path, Any]]:
        """Everything in it, with the path to each."""
        return leaves((self.args, self.kwargs))

    def with_main(self, tensor: Tensor) -> Example:
        """With another main tensor."""
        return self.map(lambda each: tensor if each is self.tensor else each)

    def argument(self, model: nn.Module, name: str) -> Any:
        """What a model's forward gets by that name, as a keyword or by its position; ``None`` if nothing."""
        names = _positions(type(model).forward)
        if name in names[: len(self.args)]:
            return self.args[names.index(name)]
        return self.kwargs.get(name)

    def rows(self, count: int) -> Example:
        """Of so many items: the first ones, over and over if there are fewer."""
        have = self.num_items

        def taken(tensor: Tensor) -> Tensor:
            if not tensor.ndim or len(tensor) != have:
                return tensor
            if count <= have:
                return tensor[:count]
            return tensor.repeat(-(-count // have), *[1] * (tensor.ndim - 1))[:count]

        return self.map(taken)

    def chunk(self, count: int) -> list[Example]:
        """In parts, as ``Tensor.chunk`` cuts a batch."""
        have, found, begin = self.num_items, [], 0
        for part in self.tensor.chunk(count):
            found.append(self.map(partial(_rows_of, slice(begin, begin + len(part)), have)))
            begin += len(part)
        return found

    def to(self, device: torch.device | str) -> Example:
        """On a device."""
        return self.map(lambda tensor: tensor.to(device))

    def call(self, model: nn.Module) -> Tensor:
        """The model's logits for it."""
        kwargs = {**self.kwargs, "use_cache": False} if takes_cache(model) else self.kwargs
        return logits_of(model, model(*self.args, **kwargs))

    def described(self) -> str:
        """In words: names and shapes."""
        named = [*(("", value) for value in self.args), *((f"{key} ", value) for key, value in self.kwargs.items())]
        return ", ".join(f"{key}{list(value.shape)}" for key, value in named if isinstance(value, Tensor))


def _rows_of(rows: slice, have: int, tensor: Tensor) -> Tensor:
    return tensor[rows] if tensor.ndim and len(tensor) == have else tensor


def takes_cache(model: nn.Module) -> bool:
    """Whether a model would keep keys and values of one call for the next: of use in generation alone."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "use_cache", False)) or _has_cache(type(model).forward)


@functools.cache
def _positions(forward: Callable[..., Any]) -> list[str]:
    """Names of what a method takes by position, but for the object itself."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = inspect.signature(forward).parameters.items()
    return [name for name, parameter in taken if parameter.kind in by_position][1:]


@functools.cache
def _has_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def says_causal(model: nn.Module) -> bool:
    """Whether a model that gives logits of tokens says that it is a causal language model.

    Models of transformers do by ``loss_type``; where it isn't set that takes causal language modelling, too
    (GPT2LMHeadModel).
    """
    return getattr(model, "loss_type", "") in (None, "ForCausalLM")


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """The tensor that the task loss is computed of, in what a model gave.

    Raises:
        BackboneError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in LOGIT_NAMES:
            if isinstance(output.get(name), Tensor):
                return output[name]  # type: ignore[no-any-return]
    for name in LOGIT_NAMES:
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    tensors = [each for each in output if isinstance(each, Tensor)] if isinstance(output, Sequence) else []
    if len(tensors) == 1:
        return tensors[0]
    if tensors:
        raise BackboneError(
            f"{type(model).__name__} returns {len(tensors)} tensors, and one of them would be trained; wrap it in a "
            "module whose forward returns the logits."
        )
    raise BackboneError(
        f"{type(model).__name__} returns a {type(output).__name__} without logits; wrap it in a module whose forward "
        "returns the tensor that the loss is computed of."
    )


def mapped(value: Any, change: Callable[[Tensor], Any], known: dict[int, Any] | None = None) -> Any:
    """Nested tuples, lists and dicts with every tensor changed; the same tensor always becomes the same."""
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = change(value)
        return known[id(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change, known) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change, known) for item in value)
    if type(value) is dict:
        return {key: mapped(item, change, known) for key, item in value.items()}
    return value


def leaves(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """What is in nested tuples, lists and dicts, with the path to each."""
    if isinstance(value, (tuple, list)):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    return [(path, value)]


def replaced(value: Any, path: Path, new: Any) -> Any:
    """Nested tuples, lists and dicts with one leaf replaced; what is on the way to it is copied."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, tuple):
        items = [replaced(item, rest, new) if index == key else item for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [replaced(item, rest, new) if index == key else item for index, item in enumerate(value)]
    if type(value) is dict:
        return {name: replaced(item, rest, new) if name == key else item for name, item in value.items()}
    import copy

    twin = copy.copy(value)  # a mapping of its own class, such as a ModelOutput
    twin[key] = replaced(value[key], rest, new)
    return twin
