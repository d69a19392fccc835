"""What running a model may change, kept and given back: so that whoever only looks leaves no trace.

A forward pass moves batch statistics, counts calls, caches tables, draws random numbers. Some models put a new tensor
in a buffer's place, some keep a table in a plain attribute. So what is kept is, for each module, its attributes by
identity, the contents of its plain containers (among them its parameters, buffers, children and hooks) and of what
plain containers and arrays of NumPy are in those, and the values of its tensors; the parameters' gradients and flags;
and the random states of Python, NumPy and PyTorch.

Values of parameters aren't kept: a copy of all weights is what those who lack memory can't have. A forward pass that
writes into a parameter is found out, and told to whoever asked (``written_parameters``).
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.backbones.fake import FakeTensor

CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
"""Types of attributes whose contents are kept as well."""


@dataclass(frozen=True)
class RandomState:
    """The state of all generators that a model on some device may draw from."""

    device: torch.device
    python: Any
    numpy: Any
    torch_: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make it the present state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@final
class ModelState:
    """The state of some modules and everything in them, at the time when this is made.

    Args:
        roots: the modules; what they share is kept once.
        device: whose random numbers they draw, beside the processor's.
    """

    def __init__(self, roots: Iterable[nn.Module], device: torch.device) -> None:
        self.roots = tuple(roots)
        self.random = RandomState.now(device)
        self._modules = [_Kept(module) for module in dict.fromkeys(m for root in self.roots for m in root.modules())]
        found = {id(tensor): tensor for kept in self._modules for tensor in kept.tensors()}
        self._values = [(tensor, tensor.detach().clone()) for tensor in found.values()]
        weights = dict.fromkeys(weight for root in self.roots for weight in root.parameters())
        self._weights = [(weight, weight.grad, weight.requires_grad, version_of(weight)) for weight in weights]

    def written_buffers(self) -> set[str]:
        """Dotted names, in their root, of the buffers that hold other values now or that another tensor stands for."""
        known = {id(tensor): value for tensor, value in self._values}
        written = set()
        for root in self.roots:
            for name, buffer in root.named_buffers(remove_duplicate=False):
                value = known.get(id(buffer))
                if value is None or not same_bits(buffer, value):
                    written.add(name)
        return written

    def changed_modules(self) -> set[nn.Module]:
        """The modules that don't look now as they did: other attributes, contents or values."""
        known = {id(tensor): value for tensor, value in self._values}
        return {
            kept.module
            for kept in self._modules
            if not kept.is_same() or any(not same_bits(tensor, known[id(tensor)]) for tensor in kept.tensors())
        }

    def replaced_buffers(self, module: nn.Module) -> list[str]:
        """Names of a module's own buffers that another tensor stands for now."""
        kept = next(kept for kept in self._modules if kept.module is module)
        before = kept.contents["_buffers"]
        return [name for name, buffer in module._buffers.items() if before.get(name) is not buffer]

    def written_parameters(self) -> list[str]:
        """Dotted names of the parameters that were written into; their values can't be had back."""
        before = {id(weight): version for weight, _, _, version in self._weights}
        named = [named for root in self.roots for named in root.named_parameters()]
        return [name for name, weight in named if before.get(id(weight), version_of(weight)) != version_of(weight)]

    @torch.no_grad()
    def restore(self, *, with_random: bool = True) -> None:
        """Give everything back; the random states only if asked."""
        for kept in self._modules:
            kept.restore()
        for tensor, value in self._values:
            if tensor.shape != value.shape:
                tensor.data = value.clone()
            elif not same_bits(tensor, value):
                tensor.copy_(value)
        for weight, gradient, requires_grad, _ in self._weights:
            weight.grad = gradient
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)
        if with_random:
            self.random.restore()


@final
class _Kept:
    """One module's attributes, and the contents of those that are containers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = {name: value.copy() for name, value in self.attributes.items() if type(value) in CONTAINERS}
        # What was set on the module alone: what every module has is filled with modules, tensors and functions.
        plain = [value for name, value in self.attributes.items() if name not in OF_EVERY_MODULE]
        self.inner = [(value, value.copy()) for value in inner_of(plain)]

    def tensors(self) -> Iterator[Tensor]:
        """Buffers, and tensors in plain attributes and containers: all but parameters."""
        for name, value in self.attributes.items():
            items = [value]
            if name in self.contents and name != "_parameters":
                items = list(value.values() if isinstance(value, dict) else value)
            for item in items:
                if isinstance(item, Tensor) and not isinstance(item, nn.Parameter):
                    yield item

    def is_same(self) -> bool:
        """Whether attributes are the same objects, but for the mode, and containers hold the same ones."""
        present = {**vars(self.module), "training": self.attributes["training"]}
        return (
            alike(present, self.attributes)
            and all(alike(self.attributes[name], content) for name, content in self.contents.items())
            and all(alike(value, content) for value, content in self.inner)
        )

    def restore(self) -> None:
        present = vars(self.module)
        for name in present.keys() - self.attributes.keys():
            del present[name]
        present.update(self.attributes)
        for name, content in self.contents.items():
            refill(self.attributes[name], content)
        for value, content in self.inner:
            refill(value, content)


OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of attributes that are torch's own."""


def inner_of(values: Iterable[Any]) -> list[Any]:
    """Arrays of NumPy among values and in their containers, and containers in those, at any depth; each once."""
    found: dict[int, Any] = {}
    waiting = [(value, False) for value in values]
    while waiting:
        value, is_inner = waiting.pop()
        is_array = type(value) is np.ndarray
        if id(value) in found or not (is_array or type(value) in CONTAINERS or isinstance(value, tuple)):
            continue
        if is_array or (is_inner and not isinstance(value, tuple)):
            found[id(value)] = value
        if not is_array:
            waiting += [(item, True) for item in (value.values() if isinstance(value, dict) else value)]
    return list(found.values())


def refill(container: Any, content: Any) -> None:
    """Give a container its contents back, if it has others."""
    if alike(container, content):
        return
    if isinstance(container, np.ndarray):
        container[...] = content
        return
    container.clear()
    add: Callable[[Any], None] = container.update if isinstance(container, (dict, set)) else container.extend
    add(content)


def alike(container: Any, content: Any) -> bool:
    """Whether two containers hold the same objects, or two arrays the same bytes."""
    if isinstance(container, np.ndarray):
        return bool(container.tobytes() == content.tobytes())
    if len(container) != len(content):
        return False
    if not content:  # most are hooks that nobody set
        return True
    return all(mine is theirs for mine, theirs in zip(_held_in(container), _held_in(content), strict=True))


def _held_in(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    return list(container)


@contextmanager
def left_as_it_was(*roots: nn.Module, device: torch.device | None = None) -> Iterator[ModelState]:
    """A region at whose end modules, their tensors and the random state are what they were.

    Args:
        roots: modules.
        device: whose random numbers they draw; by default that of the first one's parameters.
    """
    first = next(roots[0].parameters(), None)
    state = ModelState(roots, device or (torch.device("cpu") if first is None else first.device))
    try:
        yield state
    finally:
        state.restore()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; what is no number counts as equal to itself, fake values as equal."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if isinstance(one, FakeTensor) or torch.equal(one, other):
        return True
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written; 0 for one of inference mode, which doesn't count."""
    return 0 if tensor.is_inference() else tensor._version
