"""What a module's forward pass changes beside giving an output: its state.

Batch norms move running statistics, spectral norms their vectors, codebooks their codes, counters themselves. State is
a buffer, a parameter that isn't trained, or a plain attribute (a number, a tensor, an array, a list and what is in it),
written in place or set anew; and Python's and NumPy's random numbers. ``observe_effects`` finds out which parts of a
module have such state, on a copy; ``keep`` remembers the state of parts, ``put_back`` and ``as_kept`` bring it back for
good or for a while.

Python can't see state in objects of other kinds, or in what a closure holds.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localgrad.backbones.namespaces import Attributes
from localgrad.backbones.state import RandomState, alike, inner_of, refill, same_bits, version_of

OUR_PACKAGES = frozenset({"torch", "timm", "localgrad"})
"""Whose code is known by its version."""

HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
)
"""Where PyTorch keeps the hooks of a module's calls."""

_GLOBAL_HOOKS = torch.nn.modules.module.__dict__
_PLAIN = (bool, int, float, str)
_CONTAINERS = (list, dict, set, deque)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks, its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooks_on_all() -> bool:
    """Whether a call of any module runs hooks."""
    return bool(
        _GLOBAL_HOOKS["_global_forward_hooks"]
        or _GLOBAL_HOOKS["_global_forward_pre_hooks"]
        or _GLOBAL_HOOKS["_global_backward_hooks"]
        or _GLOBAL_HOOKS["_global_backward_pre_hooks"]
    )


def is_ours(function: object) -> bool:
    """Whether code is of PyTorch, timm or this package: a function, a class, or an object of one."""
    function = getattr(function, "__func__", function)
    scope = getattr(function, "__globals__", None)
    if scope is None:
        kind = function if isinstance(function, type) else type(function)
        return kind.__module__.partition(".")[0] in OUR_PACKAGES
    return str(scope.get("__name__")).partition(".")[0] in OUR_PACKAGES


# Keeping and bringing back ---------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """The state of one part as it was.

    Attributes:
        part: the module.
        tables: its tables of parameters and buffers, and what stood in each.
        plain: its plain attributes, each with what was in it, where it is a container.
        values: of each tensor that may be written in place, by id: the tensor, its value then and its version.
        inner: containers in containers, and arrays of NumPy, each with what was in it.
    """

    part: nn.Module
    tables: list[tuple[Attributes, Attributes]]
    plain: dict[str, tuple[Any, Any]]
    values: dict[int, tuple[Tensor, Tensor, int]]
    inner: list[tuple[Any, Any]]


def keep(parts: Iterable[nn.Module]) -> list[Kept]:
    """Remember the state of parts, each by itself and not its children."""
    return [_kept(part) for part in parts]


@torch.no_grad()
def _kept(part: nn.Module) -> Kept:
    found: list[tuple[Attributes, Attributes]] = [(table, dict(table)) for table in (part._parameters, part._buffers)]
    plain = {name: value for name, value in vars(part).items() if name not in _OF_EVERY_MODULE}
    tensors = [value for _, table in found for value in table.values() if _may_be_written(value)]
    tensors += [value for value in plain.values() if isinstance(value, Tensor) and _may_be_written(value)]
    values = {id(tensor): (tensor, tensor.clone(), version_of(tensor)) for tensor in tensors}
    inner = [(value, value.copy()) for value in inner_of(plain.values())]
    return Kept(part, found, {name: (value, _content(value)) for name, value in plain.items()}, values, inner)


def _may_be_written(value: object) -> bool:
    """Of a tensor that a forward pass gave only the name counts, of a weight that learns nothing."""
    return isinstance(value, Tensor) and not value.requires_grad


def _content(value: object) -> Any:
    if isinstance(value, _CONTAINERS):
        return copy.copy(value)
    return value.get_state() if isinstance(value, torch.Generator) else None


@torch.no_grad()
def put_back(kept: Sequence[Kept]) -> None:
    """Bring a state back for good: the same tensors and objects, with the values of then."""
    for part, tables, plain, values, inner in kept:
        for table, then in tables:
            table.clear()
            table.update(then)
        for name in [name for name in vars(part) if name not in _OF_EVERY_MODULE and name not in plain]:
            del vars(part)[name]
        for name, (value, content) in plain.items():
            vars(part)[name] = value
            _refill(value, content)
        for value, content in inner:
            refill(value, content)
        for tensor, value, _ in values.values():
            tensor.copy_(value)


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(content)
    elif isinstance(value, _CONTAINERS):
        value.clear()
        value.extend(content) if isinstance(value, (list, deque)) else value.update(content)


@contextmanager
def as_kept(kept: Sequence[Kept]) -> Iterator[None]:
    """Have parts in their state of then, on tensors of its own; what is done to it has no effect afterwards."""
    now = [([dict(table) for table, _ in tables], dict(vars(part))) for part, tables, *_ in kept]
    inner_now = [(value, value.copy()) for each in kept for value, _ in each.inner]
    copies: dict[int, Any] = {}

    def copied(value: Any, values: dict[int, tuple[Tensor, Tensor, int]], content: Any = None) -> Any:
        if id(value) not in copies:
            copies[id(value)] = _copied(value, values, content)
        return copies[id(value)]

    for part, tables, plain, values, inner in kept:
        for value, content in inner:  # in place: what holds them is copied one level deep
            refill(value, content)
        for table, then in tables:
            table.clear()
            table.update({name: copied(value, values) for name, value in then.items()})
        for name, (value, content) in plain.items():
            vars(part)[name] = copied(value, values, content)
    try:
        yield
    finally:
        for value, content in inner_now:
            refill(value, content)
        for (part, tables, *_), (were, attributes) in zip(kept, now, strict=True):
            for (table, _), was in zip(tables, were, strict=True):
                table.clear()
                table.update(was)
            for name in vars(part).keys() - attributes.keys():
                del vars(part)[name]
            vars(part).update(attributes)


def _copied(value: Any, values: dict[int, tuple[Tensor, Tensor, int]], content: Any) -> Any:
    if id(value) in values:
        copied = values[id(value)][1].clone()
        return nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied
    if isinstance(value, torch.Generator):
        generator = torch.Generator(value.device)
        generator.set_state(content)
        return generator
    return copy.copy(content) if isinstance(value, _CONTAINERS) else value


def has_changed(kept: Kept) -> bool:
    """Whether a part's state is another one now; on a device this waits for the values."""
    part, tables, plain, values, inner = kept
    if any(table.keys() != then.keys() or any(table[n] is not then[n] for n in then) for table, then in tables):
        return True
    now = {name: value for name, value in vars(part).items() if name not in _OF_EVERY_MODULE}
    if now.keys() != plain.keys() or any(_differs(now[name], *plain[name]) for name in now):
        return True
    if not all(alike(value, content) for value, content in inner):
        return True
    # Not by versions alone: fused kernels write running statistics past them.
    return any(
        version_of(tensor) != version or not same_bits(tensor, value) for tensor, value, version in values.values()
    )


def _differs(now: Any, then: Any, content: Any) -> bool:
    if now is not then:
        return not (isinstance(now, _PLAIN) and type(now) is type(then) and now == then)
    if isinstance(now, torch.Generator):
        return not torch.equal(now.get_state(), content)
    return isinstance(now, _CONTAINERS) and _items(now) != _items(content)


def _items(container: Any) -> list[Any]:
    """What is in a container, by identity, but for plain values: tensors can't be compared."""
    values = [*container.items()] if isinstance(container, dict) else [(None, value) for value in container]
    return [(key, value if isinstance(value, _PLAIN) else id(value)) for key, value in values]


# Random numbers that are not PyTorch's -----------------------------------------------------------------------------


def other_random_state() -> tuple[Any, Any]:
    """The states of Python's and NumPy's random numbers."""
    return random.getstate(), np.random.get_state()


def set_other_random_state(state: tuple[Any, Any]) -> None:
    """Set what ``other_random_state`` gave."""
    random.setstate(state[0])
    np.random.set_state(state[1])


def _same_other_random_state(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    numbers = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return bool(one[0] == other[0]) and numbers


# Copies ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def twin_of(module: nn.Module) -> nn.Module:
    """A copy of a module without its users' hooks, which are not to run on what is only tried.

    PyTorch's own stay: those of spectral and weight norm compute the weight.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for table in HOOKS:
            hooks = vars(part)[table]
            if hooks:
                memo[id(hooks)] = type(hooks)((key, hooks[key]) for key in _of_torch(part, table))
        for value in vars(part).values():  # what an earlier pass left: PyTorch copies leaves only
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.clone()
    return copy.deepcopy(module, memo)


def _of_torch(part: nn.Module, table: str) -> list[int]:
    """The numbers of PyTorch's own hooks in a table of hooks, or of facts about them."""
    calls = vars(part)[table.removesuffix("_with_kwargs").removesuffix("_always_called")]
    return [key for key in vars(part)[table] if is_ours(calls[key])]


def strip_hooks(module: nn.Module) -> None:
    """Take its users' hooks off a module, as ``twin_of`` does; state dicts' hooks stay."""
    for part in module.modules():
        kept = {table: _of_torch(part, table) for table in HOOKS}
        for table, keys in kept.items():
            hooks = vars(part)[table]
            for key in [key for key in hooks if key not in keys]:
                del hooks[key]


def let_go(module: nn.Module) -> None:
    """Cut what a module shows of an earlier pass (the weight of an old spectral norm) from that pass's graph.

    PyTorch copies nothing that has a graph.
    """
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(part)[name] = value.detach()


# What a recomputation has to take back ----------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a block's forward pass changes in training mode.

    Attributes:
        parts: modules that write into themselves.
        norms: batch norms of PyTorch or timm, whose statistics stay where they are with zero momentum.
        draws: whether it draws from Python's or NumPy's random numbers.
    """

    parts: tuple[nn.Module, ...] = ()
    norms: tuple[_BatchNorm, ...] = ()
    draws: bool = False

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.parts or self.norms or self.draws)

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """For a forward pass that is about to begin, and for its recomputation, which leaves no trace."""
        return contextlib.nullcontext(), self._again(keep(self.parts), other_random_state() if self.draws else None)

    @contextmanager
    def _again(self, kept: Sequence[Kept], drawn: tuple[Any, Any] | None) -> Iterator[None]:
        now = None if drawn is None else other_random_state()
        if drawn is not None:
            set_other_random_state(drawn)
        try:
            with as_kept(kept), _still_statistics(self.norms):
                yield
        finally:
            if now is not None:
                set_other_random_state(now)


NO_STATE = State()


@contextmanager
def _still_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Keep running statistics where they are, without a copy of them."""
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm that does with its statistics what PyTorch's do."""
    return isinstance(module, _BatchNorm) and is_ours(type(module).forward) and "forward" not in vars(module)


class Observed(NamedTuple):
    """What was seen in a module's forward pass in training mode.

    Attributes:
        parts: names of the modules in it that write into themselves; "" is the module itself.
        draws: whether it draws from Python's or NumPy's random numbers.
        mixes: whether what it gives for an image depends on the other images of the batch.
        by_images: names of those parts that write what depends on the images.
    """

    parts: tuple[str, ...]
    draws: bool
    mixes: bool
    by_images: tuple[str, ...]

    @property
    def sees_batches(self) -> bool:
        """Whether results depend on which images come together."""
        return self.mixes or bool(self.by_images)

    def state_of(self, module: nn.Module) -> State:
        """The state of the module that was observed, or of one that is alike."""
        found = [module.get_submodule(name) for name in self.parts]
        others = [part for part in found if not is_plain_norm(part)]
        norms = [part for part in found if is_plain_norm(part)]
        return State(tuple(others), tuple(cast(list[_BatchNorm], norms)), self.draws)


def observe_effects(module: nn.Module, twin: nn.Module, example: Tensor, *, foreign: bool) -> Observed:
    """See what a module's forward pass does in training mode; state that it writes only now and then isn't seen.

    Args:
        module: the module, which stays as it is.
        twin: a copy of it in training mode, which is run.
        example: what enters it, [2 or more, ...].
        foreign: whether it runs code that isn't ours, of which nothing is known.
    """
    parts = dict(twin.named_modules())
    norms = tuple(name for name, part in parts.items() if isinstance(part, _BatchNorm))
    tracking = tuple(name for name in norms if parts[name].running_mean is not None)
    has_more = any(_buffers(part) for name, part in parts.items() if name not in norms)
    if example.is_meta or not (foreign or has_more):
        return Observed(tracking, draws=False, mixes=bool(norms), by_images=tracking)
    before, behind = keep(parts.values()), keep(module.modules())  # a closure in the copy may run the module
    start, drawn = RandomState.now(example.device), random_state(example.device)

    def run(features: Tensor) -> Tensor:
        start.restore()
        output: Tensor = twin(features.clone()).detach()
        return output

    def changed(kept: Sequence[Kept]) -> tuple[str, ...]:
        return tuple(name for name, each in zip(parts, kept, strict=True) if has_changed(each))

    try:
        with torch.enable_grad():
            outputs = run(example)
            written = changed(before) if not any(map(has_changed, behind)) else tuple(parts)
            now = RandomState.now(example.device)
            draws = not _same_other_random_state((start.python, start.numpy), (now.python, now.numpy))
            if not (foreign or set(written) - set(norms)):
                return Observed(written, draws, mixes=bool(norms), by_images=written)
            is_quiet = not draws and torch.equal(random_state(example.device), drawn)
            states = {name: _state(parts[name]) for name in written}
            first = keep(parts.values())
            run(example)
            again = changed(first)
            put_back(before)
            # As many images, and so the same kernels: what doesn't mix them gives the first one's bits.
            others_changed = run(torch.cat([example[:1], 1 - 2 * example[1:].flip(-1)]))
            by_images = tuple(name for name in written if not _same_states(states[name], _state(parts[name])))
            mixes = len(outputs) != len(example) or not same_bits(others_changed[:1], outputs[:1])
            put_back(before)
            mixes = mixes or (is_quiet and not _same_alone(run, example, outputs))
    finally:
        put_back(before)
        put_back([kept for kept in behind if has_changed(kept)])
        start.restore()
    # What is written once, and whatever the images are, is a table that is made when it is needed, and no state.
    written = tuple(name for name in written if name in again or name in by_images)
    return Observed(written, draws, mixes, by_images)


def _same_alone(run: Callable[[Tensor], Tensor], example: Tensor, outputs: Tensor) -> bool:
    """Whether an image gives by itself what it gives among others, but for rounding."""
    try:
        alone = run(example[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # it needs several
        return False
    if alone.shape != outputs[:1].shape:
        return False
    return bool((alone - outputs[:1]).norm() <= 0.01 * outputs[:1].norm())


@torch.no_grad()
def _state(part: nn.Module) -> Attributes:
    """What a part has in its tables, copied, and its plain numbers; no tensors that it only shows."""
    found: Attributes = {name: value for name, value in vars(part).items() if isinstance(value, _PLAIN)}
    tables = {**part._parameters, **part._buffers}
    return found | {name: value.clone() for name, value in tables.items() if value is not None}


def _same_states(one: Attributes, other: Attributes) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(value, other[name]) for name, value in one.items()]
    return all(same_bits(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1] for pair in pairs)


def random_state(device: torch.device) -> Tensor:
    """The state of PyTorch's random numbers on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set what ``random_state`` gave."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@final
class Undo:
    """Remembers, before each of a module's steps, what its forward passes may change.

    Which parts have state is seen in the first step, before which that of all is kept; from then on, theirs is.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._first: list[Kept] | None = None
        self._writing: list[nn.Module] | None = None

    def remember(self) -> Before:
        """The state now. The second time, this waits for values once."""
        if self._first is None:
            self._first = keep(self.module.modules())
            return Before(self._first, [], other_random_state())
        if self._writing is None:
            self._writing = [kept.part for kept in self._first if has_changed(kept)]
            self._first = []
        known = set(map(id, self._writing))
        rest = [
            (part, b, b._version) for part in self.module.modules() if id(part) not in known for b in _buffers(part)
        ]
        return Before(keep(self._writing), rest, other_random_state())

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
        put_back(before.kept)
        set_other_random_state(before.drawn)


class Before(NamedTuple):
    """What ``Undo`` remembers.

    Attributes:
        kept: the state of the parts that have some.
        rest: the other parts' buffers, and their versions.
        drawn: states of Python's and NumPy's random numbers.
    """

    kept: list[Kept]
    rest: list[tuple[nn.Module, Tensor, int]]
    drawn: tuple[Any, Any]


def _buffers(part: nn.Module) -> list[Tensor]:
    return [buffer for buffer in part._buffers.values() if buffer is not None]
