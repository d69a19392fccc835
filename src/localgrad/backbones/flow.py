"""Which calls of modules all of a model's features pass through, found by following data once from input to logits.

Every operator that makes floating-point numbers out of the input is a node, with edges from what it read. A *waist* is
a node that every path from the input to the logits goes through: behind it nothing is known of what came before but
what it gives. A call of a module that is given one waist and gives a later one is a *station*: it can be a block. The
inside of a residual block has no waists, a block in a chain has both; skips over a block, second streams and heads that
read several stages have none, whatever the modules are called and however deep they lie.

Integers and truth values made of features aren't followed (they have no gradients; ``watching`` finds by noise where
they matter). Where the input is integers (token ids), the first floating-point numbers looked up by them are nodes.

Of all stations those are chosen that make up the model's trunk, as fine as its own repetition goes: ``choose``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from localgrad.backbones.example import Example, Path, leaves
from localgrad.backbones.fake import TorchDispatchMode
from localgrad.backbones.namespaces import Kwargs

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
LEAST_INSIDE = 0.5
"""Share of a call's weights that the stations inside of it are to hold, for them to stand in its place."""
LIGHT_STEM = 0.05
"""A container before all others is the stem's if it holds less than this share of the heaviest one's weights."""
LIGHT = 0.01
"""Any other container is glue if it holds less than this."""
LIGHT_INSIDE = 0.25
"""One in a stage is glue if it holds less than this of the heaviest one there, and no such modules (a downsampling)."""
LEAST_TRUNK = 0.2
"""Weights in a chain, as a share of those in containers beside it, below which it isn't the model's trunk."""
LOOKING_UP = ("embedding", "index_select", "index", "gather")
"""Operators that make floating-point numbers of ids."""
BY_SHAPE = (
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "lift_fresh"),
)
"""Operators that look at no value of what they are given."""


class Place(NamedTuple):
    """Where a module stands: its dotted name, its parent and its name there."""

    name: str
    parent: nn.Module
    key: str
    module: nn.Module

    @property
    def container(self) -> str:
        """Dotted name of its parent."""
        return self.name.rpartition(".")[0]


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        slot: where the module stands.
        times: how many times it was called in all.
        entered: the node of each tensor in (args, kwargs) that the input reaches.
        left: likewise of what it gave.
        shapes: of every tensor of ``entered`` and ``left``, which are features if their first side is the batch.
        stands: how each of them stands in memory: shape, strides, offset.
        output: what it gave, outlined.
        inside: calls made by it.
    """

    slot: Place
    times: int = 1
    entered: dict[Path, int] = field(default_factory=dict)
    left: dict[Path, int] = field(default_factory=dict)
    shapes: tuple[dict[Path, tuple[int, ...]], dict[Path, tuple[int, ...]]] = field(default_factory=lambda: ({}, {}))
    stands: tuple[dict[Path, Any], dict[Path, Any]] = field(default_factory=lambda: ({}, {}))
    output: Any = None
    inside: list[ModuleCall] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its module's."""
        return self.slot.name

    @property
    def weight(self) -> int:
        """How many numbers its module's parameters have."""
        return sum(weight.numel() for weight in self.slot.module.parameters())

    @property
    def is_composite(self) -> bool:
        """Whether modules with weights make it up, as they do blocks; and not convolutions, matrices."""
        return any(next(child.parameters(), None) is not None for child in self.slot.module.children())

    @property
    def is_container(self) -> bool:
        """Whether its module has no code of its own."""
        return type(self.slot.module) is nn.Sequential

    def walk(self) -> Iterator[ModuleCall]:
        """It and all calls inside of it."""
        yield self
        for call in self.inside:
            yield from call.walk()


@final
class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what becomes of a tensor while it is the mode.

    Args:
        main: the tensor, node 0.
    """

    def __init__(self, main: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: list[tuple[int, ...]] = [()]
        """Of every node, the nodes that it was made of."""
        self.makers: list[str] = ["the input"]
        """Of every node, the name of the innermost module that made it."""
        self.stack: list[str] = [""]
        self._nodes: dict[int, tuple[int, StorageWeakRef]] = {}  # the references keep addresses from being taken again
        self._ids: dict[int, StorageWeakRef] = {}
        storage = main.untyped_storage()
        if main.is_floating_point():
            self._nodes[storage._cdata] = (0, _reference(storage))
        else:
            self._ids[storage._cdata] = _reference(storage)

    def node(self, tensor: Tensor) -> int | None:
        """The node of a tensor that the input reaches; else ``None``."""
        known = self._nodes.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
        return None if known is None else known[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run an operator, and note what it made of what."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.__name__.partition(".")[0]
        if name in BY_SHAPE:
            return result
        nodes = [node for tensor in given if (node := self.node(tensor)) is not None]
        reads_ids = self._ids and any(t.untyped_storage()._cdata in self._ids for t in given if not _is_floating(t))
        if not nodes and not reads_ids:
            return result
        if reads_ids and name in LOOKING_UP:
            nodes.append(0)
        is_mutable = func._schema.is_mutable
        made = [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor)]
        if is_mutable:
            made += _written(func, args, kwargs)
        old = {tensor.untyped_storage()._cdata for tensor in given}
        new: int | None = None
        for tensor in made:
            storage = tensor.untyped_storage()
            if _is_floating(tensor):
                if not nodes or (storage._cdata in old and not is_mutable):
                    continue  # a view
                if new is None:
                    new = len(self.read)
                    self.read.append(tuple(sorted(set(nodes))))
                    self.makers.append(self.stack[-1])
                self._nodes[storage._cdata] = (new, _reference(storage))
            elif reads_ids and tensor.dtype is not torch.bool:
                self._ids[storage._cdata] = _reference(storage)
        return result

    def waists(self, end: int) -> list[int]:
        """Nodes that every path from the input to a node goes through, in order."""
        alive = self._furthest(end)
        found, reach = [], 0
        for node in sorted(alive):
            if reach <= node:
                found.append(node)
            reach = max(reach, alive[node])
        return found

    def past(self, node: int, end: int) -> tuple[str, str] | None:
        """What goes on past a node to the end: the names of who made it before, and of who reads it behind."""
        alive = self._furthest(end)
        crossing = [(alive[each], each) for each in alive if each < node < alive[each]]
        if not crossing:
            return None
        reader, maker = max(crossing, key=lambda pair: (pair[0] - pair[1], pair))
        return self.makers[maker], self.makers[reader]

    def _furthest(self, end: int) -> dict[int, int]:
        """Of every node on a path to the end, the last one that reads it."""
        furthest = {end: end}
        for node in range(end, 0, -1):
            if node in furthest:
                for earlier in self.read[node]:
                    furthest.setdefault(earlier, node)
        return furthest


@final
class Reached(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows a tensor of whatever type to all that is made of its values, while it is the mode.

    Args:
        main: the tensor.
    """

    def __init__(self, main: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storage = main.untyped_storage()
        self._known: dict[int, StorageWeakRef] = {storage._cdata: _reference(storage)}

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of it."""
        return tensor.untyped_storage()._cdata in self._known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run an operator; what it makes or writes is reached if something that it is given is."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.__name__.partition(".")[0] not in BY_SHAPE and any(map(self.holds, given)):
            made = [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor)]
            for tensor in made + (_written(func, args, kwargs) if func._schema.is_mutable else []):
                storage = tensor.untyped_storage()
                self._known[storage._cdata] = _reference(storage)
        return result


def _reference(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _written(func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> list[Tensor]:
    """The arguments that an operator writes into."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]
    return found


def slots(model: nn.Module) -> Iterator[Place]:
    """Every module below a model, where it stands."""
    for name, parent in model.named_modules():
        for key, child in parent.named_children():
            yield Place(f"{name}.{key}" if name else key, parent, key, child)


@final
class Followed:
    """What one run of a model showed.

    Args:
        model: in eval mode.
        example: two items.
        outlined: of what a module gave, what is to be kept.
    """

    def __init__(self, model: nn.Module, example: Example, outlined: Callable[[Any], Any]) -> None:
        self.model = model
        self.calls: list[ModuleCall] = []
        """The outermost calls of modules with weights."""
        self._stack: list[ModuleCall] = []
        self._outlined = outlined
        self._num_items = example.num_items
        times: dict[int, int] = {}
        handles = []
        for slot in {id(slot.module): slot for slot in slots(model)}.values():
            if next(slot.module.parameters(), None) is not None:
                handles.append(slot.module.register_forward_pre_hook(self._entering(slot, times), with_kwargs=True))
                handles.append(slot.module.register_forward_hook(self._leaving))
        try:
            with torch.no_grad(), Flow(example.tensor) as self.flow:
                logits = example.call(model)
        finally:
            for handle in handles:
                handle.remove()
        self.end = self.flow.node(logits)
        """The logits' node; ``None`` where the input doesn't reach them."""
        self.waists = set() if self.end is None else set(self.flow.waists(self.end))
        for call in self.walk():
            call.times = times[id(call.slot.module)]

    def walk(self) -> Iterator[ModuleCall]:
        """All calls."""
        for call in self.calls:
            yield from call.walk()

    def _entering(self, slot: Place, times: dict[int, int]) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
            times[id(module)] = times.get(id(module), 0) + 1
            call = ModuleCall(slot)
            call.entered = self._nodes_in({"args": args, "kwargs": kwargs}, call.shapes[0], call.stands[0])
            (self._stack[-1].inside if self._stack else self.calls).append(call)
            self._stack.append(call)
            self.flow.stack.append(slot.name)

        return enter

    def _leaving(self, _module: nn.Module, _args: Any, output: Any) -> None:
        call = self._stack.pop()
        self.flow.stack.pop()
        call.output = self._outlined(output)
        call.left = self._nodes_in(output, call.shapes[1], call.stands[1])

    def _nodes_in(self, value: Any, shapes: dict[Path, tuple[int, ...]], stands: dict[Path, Any]) -> dict[Path, int]:
        found = {}
        for path, leaf in leaves(value):
            if isinstance(leaf, Tensor) and (node := self.flow.node(leaf)) is not None:
                found[path], shapes[path] = node, tuple(leaf.shape)
                stands[path] = leaf.shape, leaf.stride(), leaf.storage_offset()
        return found

    def ends(self, call: ModuleCall) -> tuple[Path, Path] | None:
        """Where features enter and leave a call that is a station; ``None`` for any other."""
        if len(call.entered) != 1 or call.times > 1 or not _has_matrix(call.slot.module):
            return None
        enters, first = next(iter(call.entered.items()))
        if first not in self.waists or not first or not self._is_features(call.shapes[0][enters]):
            return None  # the one that is given the input itself is of the stem
        found = [path for path, last in call.left.items() if last in self.waists and first < last != self.end]
        if len(found) != 1 or not self._is_features(call.shapes[1][found[0]]):
            return None  # two views of one tensor are more than either
        return enters, found[0]

    def _is_features(self, shape: tuple[int, ...]) -> bool:
        return len(shape) in (3, 4) and shape[0] == self._num_items

    def why_not(self, call: ModuleCall) -> str:
        """Why a call is no station."""
        if call.times > 1:
            return f"{call.name} is called {call.times} times in one pass, with the same weights each time"
        if not call.entered or not call.left:
            return f"{call.name} doesn't turn features into features"
        if len(call.entered) > 1:
            given = ", ".join(".".join(map(str, path[1:] if path[0] == "kwargs" else path)) for path in call.entered)
            return f"{call.name} is given several features ({given})"
        node = max(call.left.values())
        past = None if self.end is None else self.flow.past(node, self.end)
        if past is not None:
            maker, reader = (name or "its own code" for name in past)
            return f"past {call.name}, what {maker} gave goes on to {reader} (a skip, or a second stream)"
        return f"{call.name} gives features of another kind than [B, N, D] or [B, C, H, W]"


def _has_matrix(module: nn.Module) -> bool:
    return any(weight.ndim > 1 for weight in module.parameters())


# Choosing ---------------------------------------------------------------------------------------------------------


def of_container(seen: Followed, name: str) -> list[ModuleCall]:
    """The calls of a container's children."""
    return [call for call in seen.walk() if call.slot.container == name and _has_matrix(call.slot.module)]


def choose(seen: Followed) -> list[list[ModuleCall]]:
    """The calls that make up a model's trunk: ever finer ones, the finest first; empty if there are none."""
    grouped = _in_groups(seen)
    chosen = _without_light(_without_leaves(_outermost(seen.calls, grouped)))
    found = [chosen] if chosen else []
    while found:
        finer = _finer(found[0], grouped)
        if finer is None:
            break
        found.insert(0, finer)
    return found


def _in_groups(seen: Followed) -> set[ModuleCall]:
    """Stations that stand with others: in a container, or as children of one module that are mostly of a kind."""
    found: set[ModuleCall] = set()
    children: dict[nn.Module, list[ModuleCall]] = {}
    for call in seen.walk():
        if seen.ends(call) is None:
            continue
        if isinstance(call.slot.parent, CONTAINERS):
            found.add(call)
        elif call.is_composite:
            children.setdefault(call.slot.parent, []).append(call)
    holding = {type(parent) for parent, calls in children.items() if _is_alike(calls)}
    for parent, calls in children.items():
        if type(parent) in holding:
            found.update(calls)
    return found


def _is_alike(calls: Sequence[ModuleCall]) -> bool:
    """Whether most modules of several are of a class that others of them are of, too."""
    kinds = [type(call.slot.module) for call in calls]
    return 2 * sum(kinds.count(kind) > 1 for kind in kinds) >= len(kinds) > 1


def _outermost(calls: Sequence[ModuleCall], grouped: set[ModuleCall]) -> list[ModuleCall]:
    found = []
    for call in calls:
        found += [call] if call in grouped else _outermost(call.inside, grouped)
    return found


def _weight(calls: Sequence[ModuleCall]) -> int:
    return sum(call.weight for call in calls)


def _without_leaves(calls: list[ModuleCall]) -> list[ModuleCall]:
    """Without single layers, where there are blocks."""
    blocks = [call for call in calls if call.is_composite]
    return blocks if 2 * _weight(blocks) >= _weight(calls) else calls


def _without_light(calls: list[ModuleCall], *, least: float = LIGHT) -> list[ModuleCall]:
    """Without containers that hold next to nothing (of a stem, of a neck), unless of what heavy ones hold."""
    groups: dict[str, list[ModuleCall]] = {}
    for call in calls:
        groups.setdefault(call.slot.container, []).append(call)
    weights = {name: _weight(group) for name, group in groups.items()}
    most = max(weights.values(), default=0)
    of_blocks = max(least, LIGHT_STEM)
    kinds = {type(call.slot.module) for call in calls if weights[call.slot.container] >= of_blocks * most}
    kept: list[ModuleCall] = []
    for call in calls:
        is_of_kind = type(call.slot.module) in kinds
        share = LIGHT if is_of_kind else least if kept else of_blocks
        if weights[call.slot.container] >= share * most:
            kept.append(call)
    return kept


def _finer(chosen: list[ModuleCall], grouped: set[ModuleCall]) -> list[ModuleCall] | None:
    """Calls with the stations inside of them in their place: those of one class all, or none; ``None`` if none can."""
    inside: dict[ModuleCall, list[ModuleCall]] = {}
    for call in chosen:
        inner = _outermost(call.inside, grouped)
        if len(chosen) > 1:
            inner = [each for each in inner if each.is_composite]
        tables = sum(weight.numel() for weight in call.slot.module.parameters(recurse=False))
        inner = _without_light(inner, least=LIGHT_INSIDE)
        inside[call] = inner if _weight(inner) >= LEAST_INSIDE * (call.weight - tables) else []
    counts: dict[type, list[int]] = {}
    for call, inner in inside.items():
        counts.setdefault(type(call.slot.module), []).append(len(inner))
    found = []
    for call, inner in inside.items():
        of_kind = counts[type(call.slot.module)]
        found += inner if inner and (call.is_container or (min(of_kind) > 0 and max(of_kind) > 1)) else [call]
    return found if len(found) > len(chosen) else None


def beside(seen: Followed, chosen: Sequence[ModuleCall]) -> int:
    """Weights of containers' children that are in no station, and hold none."""
    taken = {module for call in chosen for module in call.slot.module.modules()}
    total = 0
    for call in seen.walk():
        modules = set(call.slot.module.modules())
        if isinstance(call.slot.parent, CONTAINERS) and not modules & taken:
            total += call.weight
            taken |= modules
    return total


def broken_at(seen: Followed) -> str:
    """Where the heaviest chain of modules breaks, in words."""
    if seen.end is None:
        return "its logits don't depend on its input"
    groups: dict[str, list[ModuleCall]] = {}
    for call in seen.walk():
        if isinstance(call.slot.parent, CONTAINERS) and _has_matrix(call.slot.module):
            groups.setdefault(call.slot.container, []).append(call)
    if not groups:
        return "it has no container of blocks (nn.ModuleList, nn.Sequential)"
    for name in sorted(groups, key=lambda each: -_weight({id(c.slot.module): c for c in groups[each]}.values())):  # type: ignore[arg-type]
        for call in groups[name]:
            if seen.ends(call) is None and 0 not in call.entered.values():
                return seen.why_not(call)
    return "no two of its blocks stand in a chain"
