"""What running a model may change beside giving an output, kept and given back.

A forward pass moves batch statistics, vectors of spectral norms and codes, counts calls, caches tables, draws random
numbers. Some modules put a new tensor in a buffer's place, some keep a table in a plain attribute. So what is kept of a
module is its attributes by identity; what is in their containers (among them its parameters, buffers, children and
hooks), at any depth, in arrays of NumPy and in generators; the values of its tensors; and all random states.

Values of weights that are trained aren't kept, of frozen ones only where asked: a copy of all weights is what those who
lack memory can't have. A forward pass that writes into a parameter is found out (``written_parameters``).

Python can't see state in objects of other kinds, or in what a closure holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.backbones.fake import FakeTensor
from localgrad.backbones.random_numbers import RandomState

PLAIN = (bool, int, float, str)
"""Values that are compared as such, and not by identity."""
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of attributes that are torch's own."""
_HOOKS_AND_CHILDREN = sorted(name for name in OF_EVERY_MODULE if name.endswith(("_hooks", "_modules", "_set")))
_CONTAINERS = (dict, list, set, deque)
_HOLDING = (*_CONTAINERS, tuple, np.ndarray)


@final
class ModelState:
    """The state of some modules now, each by itself, and of all random numbers.

    Args:
        modules: of a model ``model.modules()``.
        weights: keep the values of frozen parameters, too: codebooks are such.
    """

    def __init__(self, modules: Iterable[nn.Module], *, weights: bool = False) -> None:
        self.random = RandomState()
        self._kept = {module: _Kept(module, weights=weights) for module in modules}
        values: dict[int, _Value] = {}  # ids count here only: in a copy of this state they are others
        for kept in self._kept.values():
            for tensor in kept.tensors:
                if id(tensor) not in values:
                    values[id(tensor)] = _Value(tensor, tensor.detach().clone(), version_of(tensor))
            kept.values = [values[id(tensor)] for tensor in kept.tensors]
        self._values = list(values.values())
        parameters = {weight: None for module in self._kept for weight in module._parameters.values()}
        self._weights = [(weight, version_of(weight)) for weight in parameters if weight is not None]

    def changed(self) -> list[nn.Module]:
        """The modules whose state is another one now; on a device this waits for the values."""
        return [
            module for module, kept in self._kept.items() if not kept.is_same() or any(map(_is_written, kept.values))
        ]

    def written_buffers(self, root: nn.Module) -> set[str]:
        """Dotted names of a root's buffers that hold other values now or that another tensor stands for."""
        known = {id(tensor): value for tensor, value, _ in self._values}
        return {
            name
            for name, buffer in root.named_buffers(remove_duplicate=False)
            if id(buffer) not in known or not same_bits(buffer, known[id(buffer)])
        }

    def written_numbers(self, module: nn.Module) -> dict[str, float]:
        """A module's own attributes that are numbers and were others: what they are now."""
        before, now = self._kept[module].attributes, vars(module)
        shared = self._kept[module].own_names & now.keys()
        numbers = [name for name in shared if all(type(each[name]) in (int, float) for each in (before, now))]
        return {name: now[name] for name in numbers if now[name] != before[name]}

    def replaced_buffers(self, module: nn.Module) -> list[str]:
        """Names of a module's own buffers that another tensor stands for now."""
        before = self._kept[module].buffers
        return [name for name, buffer in module._buffers.items() if before.get(name) is not buffer]

    def written_parameters(self, root: nn.Module) -> list[str]:
        """Dotted names of a root's parameters that were written into; their values can't be had back."""
        written = {id(weight) for weight, version in self._weights if version_of(weight) != version}
        return [name for name, weight in root.named_parameters() if id(weight) in written]

    @torch.no_grad()
    def restore(self) -> None:
        """Give everything back for good: the same tensors and objects, with the values of then."""
        for kept in self._kept.values():
            kept.restore()
        for tensor, value, _ in self._values:
            if tensor.shape != value.shape:
                tensor.data = value.clone()
            elif not same_bits(tensor, value):
                tensor.copy_(value)
        self.random.restore()

    @contextmanager
    def again(self, *, draws: bool = True) -> Iterator[None]:
        """Have modules in this state for a while, on tensors of its own: what is done to it has no effect afterwards.

        Hooks, children and modes stay as they are; so do random numbers, unless something draws them.
        """
        random, now = RandomState(), [_Kept(module) for module in self._kept]
        mine = [pair for kept in self._kept.values() for pair in kept.contents]
        contents = [(container, _content_of(container)) for container, _ in mine]
        contents += [pair for kept in now for pair in kept.contents]
        copies = {id(kept.tensor): kept.copied() for kept in self._values}
        for kept in self._kept.values():
            kept.put_own(copies)
        for container, content in mine:
            _refill(container, _replaced(content, copies))
        if draws:
            self.random.restore()
        try:
            yield
        finally:
            for kept in now:
                kept.put_own({})
            for container, content in contents:
                _refill(container, content)
            if draws:
                random.restore()


class _Value(NamedTuple):
    """A tensor, its value and its version then."""

    tensor: Tensor
    value: Tensor
    version: int

    def copied(self) -> Tensor:
        """Its value in a tensor of its own."""
        copied = self.value.clone()
        return nn.Parameter(copied, requires_grad=False) if isinstance(self.tensor, nn.Parameter) else copied


def _is_written(kept: _Value) -> bool:
    # Not by versions alone: fused kernels write running statistics past them.
    return version_of(kept.tensor) != kept.version or not same_bits(kept.tensor, kept.value)


@final
class _Kept:
    """One module's attributes, what is in their containers, and the tensors that may be written in place."""

    def __init__(self, module: nn.Module, *, weights: bool = False) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.own_names = self.attributes.keys() - OF_EVERY_MODULE
        self.buffers = dict(module._buffers)
        self.contents: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        self.values: list[_Value] = []
        # Hooks and children; most are empty, and stay so.
        tables = [self.attributes.get(name) for name in _HOOKS_AND_CHILDREN]
        self.empty = [table for table in tables if table is not None and not table]
        self.tables = [(table, _content_of(table)) for table in tables if table]
        seen: set[int] = set()
        waiting = [module._parameters, module._buffers, *(self.attributes[name] for name in self.own_names)]
        while waiting:
            value = waiting.pop()
            if value is None or isinstance(value, PLAIN):  # most are
                continue
            if isinstance(value, Tensor):
                is_kept = weights and not value.requires_grad if isinstance(value, nn.Parameter) else value.is_leaf
                self.tensors += [value] * is_kept
            elif (isinstance(value, _HOLDING) or type(value) is torch.Generator) and id(value) not in seen:
                seen.add(id(value))
                if not isinstance(value, tuple):
                    self.contents.append((value, _content_of(value)))
                if isinstance(value, (*_CONTAINERS, tuple)):
                    waiting += value.values() if isinstance(value, dict) else value

    def is_same(self) -> bool:
        """Whether attributes are the same objects, but for the mode, and containers hold the same ones."""
        present = {**vars(self.module), "training": self.attributes["training"]}
        return (
            _holds(present, self.attributes)
            and not any(self.empty)
            and all(_holds(container, content) for container, content in (*self.tables, *self.contents))
        )

    def restore(self) -> None:
        """Give all attributes and contents back."""
        present = vars(self.module)
        if present.keys() != self.attributes.keys():
            for name in present.keys() - self.attributes.keys():
                del present[name]
        present.update(self.attributes)
        for container in self.empty:
            if container:
                container.clear()
        for container, content in (*self.tables, *self.contents):
            _refill(container, content)

    def put_own(self, copies: Mapping[int, Tensor]) -> None:
        """Give attributes back that aren't torch's own of every module; with copies in place of tensors, by id."""
        present = vars(self.module)
        for name in present.keys() - self.attributes.keys() - OF_EVERY_MODULE:
            del present[name]
        present.update({name: copies.get(id(self.attributes[name]), self.attributes[name]) for name in self.own_names})


def _content_of(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    if isinstance(container, np.ndarray):
        return container.copy()
    if type(container) is torch.Generator:
        return container.get_state()
    return set(container) if isinstance(container, set) else list(container)


def _refill(container: Any, content: Any) -> None:
    """Give a container its contents back, if it has others."""
    if _holds(container, content):
        return
    if isinstance(container, np.ndarray):
        container[...] = content
    elif type(container) is torch.Generator:
        container.set_state(content)
    else:
        container.clear()
        container.update(content) if isinstance(container, (dict, set)) else container.extend(content)


def _replaced(content: Any, copies: Mapping[int, Tensor]) -> Any:
    """Contents with copies in place of tensors, by id."""
    if isinstance(content, dict):
        return {key: copies.get(id(value), value) for key, value in content.items()}
    is_filled = isinstance(content, (list, set))
    return type(content)(copies.get(id(value), value) for value in content) if is_filled else content


def _holds(container: Any, content: Any) -> bool:
    """Whether a container holds the same objects or equal plain values, an array the same bytes."""
    if isinstance(container, np.ndarray):
        return bool(container.tobytes() == content.tobytes())
    if type(container) is torch.Generator:
        return torch.equal(container.get_state(), content)
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return _alike(container, content) and _alike(container.values(), content.values())
    return bool(container == content) if isinstance(container, set) else _alike(container, content)


def _alike(ones: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(map(is_, ones, others)) or all(map(_same, ones, others))


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, PLAIN) and type(one) is type(other) and one == other)


@contextmanager
def left_as_it_was(*roots: nn.Module) -> Iterator[ModelState]:
    """A region at whose end modules, their tensors and gradients, and all random states are what they were."""
    state = ModelState(module for root in roots for module in root.modules())
    weights = dict.fromkeys(weight for root in roots for weight in root.parameters())
    gradients = [(weight, weight.grad, weight.requires_grad) for weight in weights]
    try:
        yield state
    finally:
        state.restore()
        for weight, gradient, requires_grad in gradients:
            weight.grad = gradient
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)


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


@final
class Undo:
    """Remembers, before each of a module's steps, what its forward passes may change.

    Which parts have state is seen in the first step, before which that of all is kept; from then on, theirs is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._first: ModelState | None = None
        self._writing: list[nn.Module] | None = None

    def remember(self) -> Before:
        """The state now. The second time, this waits for values once."""
        if self._first is None:
            self._first = ModelState(self.module.modules(), weights=True)
            return Before(self._first, [])
        if self._writing is None:
            self._writing = self._first.changed()
            self._first = ModelState(())
        rest = [
            (part, buffer, version_of(buffer))
            for part in self.module.modules()
            if part not in self._writing
            for buffer in part._buffers.values()
            if buffer is not None
        ]
        return Before(ModelState(self._writing, weights=True), rest)

    def undo(self, before: Before) -> None:
        """Bring the state back that was remembered.

        Raises:
            RuntimeError: a buffer was written that never was before.
        """
        for part, buffer, version in before.rest:
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"{type(part).__name__} wrote a buffer in this step that it had not written before; it can't be "
                    "taken back."
                )
        before.state.restore()


class Before(NamedTuple):
    """What ``Undo`` remembers: the state of the parts that have some; the other parts' buffers, and their versions."""

    state: ModelState
    rest: list[tuple[nn.Module, Tensor, int]]
