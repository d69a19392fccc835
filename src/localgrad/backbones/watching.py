"""Take any model apart by watching it run: blocks that are called in a chain, and what lies before, between, behind.

No names are looked for. A *station* is a call of a module that all features pass through (``flow`` finds them); between
them all that the model does can be run piece by piece:

* a **block** is a station, called with what the model itself gives it beside the features: masks, rotary angles, grid
  sizes. That is the *context*, which the stem makes once a batch;
* a **segment** is the model's own code between two stations: its forward is run with stand-ins in place of all other
  modules, is given the features where one station would give them, and stops where the next one is called. The *stem*
  is the segment before the first station, the *tail* the one behind the last; *glue* lies between two stations where
  the model does something there (a downsampling, a norm), and belongs to the block behind it.

That this is so is found out by running the model with stand-ins that give noise, twice for every bit of their numbers:
what a station is given may depend on nothing but what the one before gave. So branches on values, caches and contexts
made of features are found before anything is trained; the proof (``proof``) comes on top.

Stand-ins replace a module in its parent for as long as a segment runs; neither its hooks nor its wrappers see that.

Shapes: B batch, N tokens, D width, H W grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from localgrad.backbones.by_hand import listed
from localgrad.backbones.example import Example, Path, leaves, mapped, replaced
from localgrad.backbones.flow import (
    LEAST_TRUNK,
    Followed,
    ModuleCall,
    Place,
    Reached,
    beside,
    broken_at,
    choose,
    of_container,
    slots,
)
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.proof import digest, nothing_hidden
from localgrad.backbones.random_numbers import RandomState
from localgrad.backbones.state import version_of
from localgrad.errors import BackboneError, LocalgradError, arg, reason_of

RUNS_OF_DRAWS = 64
"""Forward passes without blocks, in which one that is left out at random shows: at a rate of 0.05, nearly surely."""


@dataclass(frozen=True)
class Shape:
    """In place of a tensor in what a module gave: its shape, and whether its first side is the batch."""

    sides: tuple[int, ...]
    dtype: torch.dtype
    is_split: bool

    def zeros(self, num_items: int, like: Tensor) -> Tensor:
        """A stand-in without memory of its own."""
        sides = (num_items, *self.sides[1:]) if self.is_split else self.sides
        dtype = like.dtype if self.dtype.is_floating_point and like.is_floating_point() else self.dtype
        return torch.zeros((), dtype=dtype, device=like.device).expand(sides)


@dataclass(frozen=True)
class TrunkStation:
    """A module that turns features into features.

    Attributes:
        slot: where it stands.
        enters: path of the features in (args, kwargs).
        leaves: path of the features in what it gives.
        given: what it gives, with ``Shape`` in place of tensors.
        entered: shape of what enters, [B, ...].
        left: shape of what leaves, [B, ...].
    """

    slot: Place
    enters: Path
    leaves: Path
    given: Any
    entered: tuple[int, ...]
    left: tuple[int, ...]

    def answer(self, features: Tensor, num_items: int) -> Any:
        """What it gives when features are what it made."""
        filled = _filled(self.given, num_items, features)
        return replaced(filled, self.leaves, features) if self.leaves else features

    def stand_in(self, received: Tensor, num_items: int) -> Any:
        """What it gives when it does nothing."""
        if self.entered == self.left:
            return self.answer(torch.zeros((), dtype=received.dtype, device=received.device).expand_as(received), 0)
        shape = Shape(self.left, received.dtype, is_split=True)
        return self.answer(shape.zeros(num_items, received), num_items)


def _filled(given: Any, num_items: int, like: Tensor) -> Any:
    """What a module gives, with zeros in place of tensors."""
    if isinstance(given, Shape):
        return given.zeros(num_items, like)
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*(_filled(item, num_items, like) for item in given))
    if isinstance(given, (tuple, list)):
        return type(given)(_filled(item, num_items, like) for item in given)
    if isinstance(given, dict):
        found = given
        for key, item in given.items():
            found = replaced(found, (key,), _filled(item, num_items, like))
        return found
    return given


def _with_memory(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _outline_of(value: Any, num_items: int, fixed: frozenset[Path] = frozenset()) -> Any:
    """What a module gave, with ``Shape`` in place of tensors; ``fixed`` ones have no row an item, however long."""
    found = value
    for path, leaf in leaves(value):
        if isinstance(leaf, Tensor):
            is_split = bool(leaf.ndim) and len(leaf) == num_items and path not in fixed
            shape = Shape(tuple(leaf.shape), leaf.dtype, is_split=is_split)
            found = replaced(found, path, shape)
    return found


@final
@dataclass
class Context:
    """What blocks and segments need beside features, for one batch.

    Attributes:
        calls: (args, kwargs) of every station, without features.
        example: what the model was called with; its main tensor is a stand-in where nobody looks at it.
        outputs: what modules outside of the trunk gave, by their number, with ``Shape`` in place of tensors.
        num_items: B.
        fixed: where tensors stand that have no row an item, though they may be as long as a batch (a mask of positions,
            a bias of heads): paths into calls, and the example's args and kwargs.
    """

    calls: list[tuple[tuple[Any, ...], Kwargs]]
    example: Example
    outputs: dict[int, Any]
    num_items: int
    fixed: frozenset[Path] = frozenset()

    def map(self, change: Callable[[Tensor], Tensor]) -> Context:
        """With every tensor changed, each once."""
        known: dict[int, Tensor] = {}
        inputs = Example(
            mapped(self.example.args, change, known), mapped(self.example.kwargs, change, known), self.example.main
        )
        return Context(mapped(self.calls, change, known), inputs, self.outputs, self.num_items, self.fixed)

    @property
    def leaves(self) -> list[tuple[Path, Any]]:
        """All that is in it, with the path to each."""
        return leaves((self.calls, self.example.args, self.example.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, once, in order."""
        found: dict[int, Tensor] = {}
        for _, leaf in self.leaves:
            if isinstance(leaf, Tensor):
                found.setdefault(id(leaf), leaf)
        return list(found.values())

    def is_split(self, tensor: Tensor) -> bool:
        """Whether a tensor of it has one row an item."""
        if not tensor.ndim or len(tensor) != self.num_items:
            return False
        return not self.fixed or not any(leaf is tensor and path in self.fixed for path, leaf in self.leaves)

    def detach(self) -> Context:
        """Without graphs."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device) -> Context:
        """On a device."""
        return self.map(lambda tensor: tensor.to(device))

    def rows(self, num_items: int) -> Context:
        """For another number of items: the first ones, over and over if there are fewer."""
        if num_items == self.num_items:
            return self
        times = -(-num_items // self.num_items)

        def taken(tensor: Tensor) -> Tensor:
            if not self.is_split(tensor):
                return tensor
            return tensor.repeat(times, *[1] * (tensor.ndim - 1))[:num_items] if times > 1 else tensor[:num_items]

        found = self.map(taken)
        found.num_items = num_items
        return found

    def chunk(self, count: int) -> list[Context]:
        """In parts, as ``Tensor.chunk`` cuts a batch."""
        sizes = [len(part) for part in torch.empty(self.num_items, 0).chunk(count)]
        found, begin = [], 0
        for size in sizes:
            found.append(self.between(begin, begin + size))
            begin += size
        return found

    def between(self, start: int, stop: int) -> Context:
        """Of the items from one up to another one."""
        part = self.map(partial(self._rows_of, slice(start, stop)))
        part.num_items = stop - start
        return part

    def _rows_of(self, rows: slice, tensor: Tensor) -> Tensor:
        return tensor[rows] if self.is_split(tensor) else tensor

    @classmethod
    def join(cls, parts: Sequence[Context]) -> Context:
        """Parts of a batch as one."""
        first, *rest = parts
        if not rest:
            return first
        rows = [iter(part.tensors) for part in parts]
        joined = {}
        for tensors in zip(*rows, strict=True):
            one = tensors[0]
            if not first.is_split(one):
                joined[id(one)] = one
            elif any(one.stride()):
                joined[id(one)] = torch.cat(tensors)
            else:  # a stand-in without memory of its own
                joined[id(one)] = one[:1].expand(sum(map(len, tensors)), *one.shape[1:])
        found = first.map(lambda tensor: joined[id(tensor)])
        found.num_items = sum(part.num_items for part in parts)
        return found


class _Stop(BaseException):
    """Raised by a stand-in to leave the model's forward; carries what it was given."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class _StandIn(nn.Module):
    """In a module's place: answers by a function, and looks like the module otherwise.

    Args:
        module: in whose place.
        answer: what it gives, by what it is given.
        device: where the model runs, to code that asks a parameter.
    """

    def __init__(
        self, module: nn.Module, answer: Callable[[tuple[Any, ...], Kwargs], Any], device: torch.device
    ) -> None:
        super().__init__()
        if (weight := next(module.parameters(), None)) is not None:  # models ask their first parameter for its dtype
            empty = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)
            self._parameters["empty"] = empty
        vars(self)["of"] = module
        vars(self)["answer"] = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["of"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        return vars(self)["answer"](args, kwargs)


@contextmanager
def _standing_in(stand_ins: Sequence[tuple[Place, _StandIn]]) -> Iterator[None]:
    """A region in which modules are replaced in their parents."""
    try:
        for slot, stand_in in stand_ins:
            slot.parent._modules[slot.key] = stand_in
        yield
    finally:
        for slot, _ in stand_ins:
            slot.parent._modules[slot.key] = slot.module


@contextmanager
def _put_in(others: Sequence[tuple[dict[str, Tensor | None], str, Tensor]]) -> Iterator[None]:
    """A region in which tensors stand for others in the tables of modules."""
    kept = [(table, name, table[name]) for table, name, _ in others]
    try:
        for table, name, tensor in others:
            table[name] = tensor
        yield
    finally:
        for table, name, own in kept:
            table[name] = own


@final
class UnderWay:
    """What parts share about the batch that is under way; it knows no model, so that blocks can be copied alone."""

    def __init__(self) -> None:
        self.given: Example | None = None
        """All that the model is called with, where that is more than its main tensor."""
        self.known: Context | None = None
        """The context of the example."""
        self._current: Context | None = None
        self._rows: tuple[int, int] | None = None
        self._cuts: dict[tuple[int, int], Context] = {}

    @property
    def current(self) -> Context | None:
        """The context of the batch under way."""
        return self._current

    @current.setter
    def current(self, context: Context | None) -> None:
        self._current, self._cuts = context, {}

    @contextmanager
    def of_rows(self, start: int, stop: int) -> Iterator[None]:
        """A region in which some items of the batch under way run by themselves."""
        before, self._rows = self._rows, (start, stop)
        try:
            yield
        finally:
            self._rows = before

    def context(self, features: Tensor) -> Context:
        """The context of the batch under way, or the example's where something else is tried out; features [B, ...]."""
        if self._current is not None and self._rows is not None:
            if self._rows not in self._cuts:
                self._cuts[self._rows] = self._current.between(*self._rows)
            return self._cuts[self._rows]
        if self._current is not None and self._current.num_items == len(features):
            return self._current
        assert self.known is not None, "the stem has run once"
        dtype, device = features.dtype, features.device
        known = self.known.rows(len(features))
        return known.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype))

    @property
    def differs_by_batch(self) -> bool:
        """Whether the context has something of each item (a mask), so that that of another batch would be wrong."""
        known = self.known
        return known is not None and any(known.is_split(tensor) and any(tensor.stride()) for tensor in known.tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> UnderWay:
        """Without the batch under way, whose tensors have graphs."""
        twin = UnderWay()
        memo[id(self)] = twin
        twin.known = copy.deepcopy(self.known, memo)
        return twin


@final
class Trunk:
    """A model, its stations, what stands around them, and the context of the batch that is under way.

    Shared by all parts of a backbone.
    """

    def __init__(self, model: nn.Module, stations: Sequence[TrunkStation], example: Example) -> None:
        self.model = model
        self.stations = list(stations)
        self.example = example
        self.around: list[tuple[Place, int]] = []
        """Modules outside of the trunk that are called between two stations only, and between which: 0 is the stem."""
        self.outputs: dict[int, Any] = {}
        """What those give, by their number, for the example."""
        self.written: set[int] = set()
        """Those whose output the model writes into, so that a stand-in for it needs memory of its own."""
        self.reads_inputs = True
        """Whether something behind the first block looks at the main tensor."""
        self.draws: dict[int, bool] = {}
        """By the start of a segment, whether random numbers are drawn on the way there, as far as it was seen."""
        self.fixed: frozenset[Path] = frozenset()
        """Where tensors of a context stand that are as long whatever the batch; see ``Context``."""
        self.fixed_outputs: dict[int, frozenset[Path]] = {}
        """Likewise in what modules of the stem give, by their number."""
        self.reach: dict[str, set[int]] = {}
        """Of weights of the stem that get to stations beside the features: to which."""
        self.batch = UnderWay()
        self._runs: list[nn.Module] = []

    def inputs(self, main: Tensor) -> Example:
        """What the model is called with, of which one tensor is given: the others of this batch, or the example's."""
        given = self.batch.given
        if given is None or given.num_items != len(main):
            given = self.example.rows(len(main))
            given = given.map(lambda tensor: tensor.to(main.device))
        return given.with_main(main)

    def run(
        self, example: Example, answer: Callable[[int, tuple[Any, ...], Kwargs], Any], others: dict[int, Any]
    ) -> Tensor:
        """The model's logits, its stations answered by a function; modules of ``others`` (by number) by what is said.

        Raises:
            _Stop: an answer has ended it.
        """
        like = example.tensor
        stand_ins = [
            (station.slot, _StandIn(station.slot.module, partial(answer, index), like.device))
            for index, station in enumerate(self.stations)
        ]
        zeros = [
            (table, name, torch.zeros(tensor.shape, dtype=tensor.dtype, device=like.device))
            for table, name, tensor in self._elsewhere()
        ]
        for number, (slot, _) in enumerate(self.around):
            if number in others:
                fill = self._filling(number, others[number], example.num_items, like)
                stand_ins.append((slot, _StandIn(slot.module, fill, like.device)))
        with _standing_in(stand_ins), _put_in(zeros):
            return example.call(self.model)

    def left_out(self) -> str | None:
        """The name of a block that the model leaves out now and then in training, if it does; the mode is to be that.

        It may where its own code draws random numbers between blocks: then it is run often, with nothing in its blocks.
        """
        called: list[int] = []
        between: list[RandomState] = []
        draws = False

        def answer(index: int, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            nonlocal draws
            draws = draws or (bool(between) and not between.pop().holds())
            called.append(index)
            given = self.stations[index].stand_in(taken_out(self.stations[index], args, kwargs)[0], len(main))
            if not draws:
                between.append(RandomState())
            return mapped(given, _with_memory)  # what stands between blocks may write into it

        main = self.example.tensor
        for _ in range(RUNS_OF_DRAWS):
            with torch.no_grad():
                self.run(self.example, answer, {})
            missing = set(range(len(self.stations))) - set(called)
            if missing:
                return self.stations[min(missing)].slot.name
            if not draws:
                return None
            called.clear()
        return None

    def _elsewhere(self) -> list[tuple[dict[str, Tensor | None], str, Tensor]]:
        """Tensors that another process has (on ``meta`` here) and that the model's own code goes past all the same.

        Their values reach nothing that is made here: of a segment's weights each process that runs it has its own.
        """
        if not self._runs:
            modules = [*(station.slot.module for station in self.stations), *(slot.module for slot, _ in self.around)]
            stood_in = {inner for module in modules for inner in module.modules()}
            self._runs = [module for module in self.model.modules() if module not in stood_in]
        tables: list[dict[str, Any]] = [t for m in self._runs for t in (m._parameters, m._buffers)]
        return [
            (table, name, tensor)
            for table in tables
            for name, tensor in table.items()
            if tensor is not None and tensor.device.type == "meta"
        ]

    def _filling(
        self, number: int, given: Any, num_items: int, like: Tensor
    ) -> Callable[[tuple[Any, ...], Kwargs], Any]:
        def fill(args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            received = next((leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)), like)
            dtype = received.dtype if received.is_floating_point() else next(self.model.parameters()).dtype
            filled = _filled(given, num_items, torch.empty(0, dtype=dtype, device=received.device))
            return mapped(filled, _with_memory) if number in self.written else filled

        return fill


class Segment(nn.Module):
    """The model's own code between two stations; features (or inputs) in, features (or logits) out.

    Args:
        trunk: the model and its stations.
        start: number of the station whose output is given; -1 for the stem, which is given the main input.
    """

    def __init__(self, trunk: Trunk, start: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.start = start
        self.weights = nn.ParameterList()
        for number, (slot, place) in enumerate(trunk.around):
            if place == start + 1:
                self.add_module(f"of_{number}", slot.module)

    @property
    def stop(self) -> int:
        """Number of the station whose input is wanted."""
        return self.start + 1

    def forward(self, given: Tensor) -> Tensor:
        """[B, ...] to [B, ...]."""
        return self._enter(given) if self.start < 0 else self._go_on(given)

    def _enter(self, main: Tensor) -> Tensor:
        """The stem: features for the first station, and the context of the batch."""
        trunk = self.trunk
        example = trunk.inputs(main)
        calls: list[tuple[tuple[Any, ...], Kwargs]] = []
        outputs: dict[int, Any] = {}
        first: list[Tensor] = []
        last = len(trunk.stations) - 1
        ends = ExitStack()

        def answer(index: int, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            station = trunk.stations[index]
            features, rest_args, rest_kwargs = taken_out(station, args, kwargs)
            calls.append((rest_args, rest_kwargs))
            if not index:
                first.append(features)
                ends.enter_context(torch.no_grad())  # what follows is gone through for its arguments alone
            if index == last:
                raise _Stop(features)
            return station.stand_in(features, len(main))

        others = {number: given for number, given in trunk.outputs.items() if trunk.around[number][1] > 0}
        hooks = [
            slot.module.register_forward_hook(
                _noting_output(outputs, number, len(main), trunk.fixed_outputs.get(number, frozenset()))
            )
            for number, (slot, place) in enumerate(trunk.around)
            if place == 0
        ]
        try:
            with ends:
                trunk.run(example, answer, others)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not trunk.reads_inputs:
            example = example.with_main(torch.zeros((), dtype=main.dtype, device=main.device).expand_as(main))
        trunk.batch.current = Context(calls, example, {**others, **outputs}, len(main), trunk.fixed)
        return first[0]

    def _go_on(self, features: Tensor) -> Tensor:
        trunk = self.trunk
        context = trunk.batch.context(features)
        learns = torch.is_grad_enabled()
        draws = trunk.draws.get(self.start)
        before = RandomState() if draws or (draws is None and trunk.model.training) else None

        def answer(index: int, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            station = trunk.stations[index]
            if index == self.stop:
                raise _Stop(taken_out(station, args, kwargs)[0])
            if index < self.start:
                return station.stand_in(taken_out(station, args, kwargs)[0], len(features))
            torch.set_grad_enabled(learns)
            if before is not None:
                trunk.draws[self.start] = bool(draws) or not before.holds()
                before.restore()  # what is drawn from here on is what the model itself draws here
            return station.answer(features, len(features))

        others = {number: given for number, given in context.outputs.items() if trunk.around[number][1] != self.stop}
        example = context.example
        try:
            with torch.no_grad():  # until the station is reached, and what is given is the features
                return trunk.run(example, answer, others)
        except _Stop as stop:
            return stop.features


def _noting_output(outputs: dict[int, Any], number: int, num_items: int, fixed: frozenset[Path]) -> Callable[..., None]:
    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs[number] = _outline_of(output, num_items, fixed)

    return note


def taken_out(station: TrunkStation, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Tensor, tuple[Any, ...], Kwargs]:
    """The features in a station's arguments, and the arguments without them."""
    where, key, *rest = station.enters
    value = (args if where == "args" else kwargs)[key]
    for step in rest:
        value = value[step]
    features: Tensor = value
    path = (key, *rest)
    if where == "args":
        return features, replaced(args, path, None), dict(kwargs)
    return features, args, replaced(dict(kwargs), path, None)


class Called(nn.Module):
    """A station as a block: features to features, called with the context of the batch."""

    def __init__(self, trunk: Trunk, index: int, glue: Segment | None) -> None:
        super().__init__()
        station = trunk.stations[index]
        self.batch = trunk.batch
        self.index, self.enters, self.leaves = index, station.enters, station.leaves
        self.glue = glue
        self.block = station.slot.module

    def told_as(self) -> dict[str, Any]:
        """What counts of it beside its modules, for ``likeness``: how its block is called, by shapes."""
        known = self.batch.known
        called = None if known is None else _outline_of(known.calls[self.index], known.num_items)
        return {"enters": self.enters, "leaves": self.leaves, "called": called}

    def forward(self, features: Tensor) -> Tensor:
        """[B, ...] to [B, ...]."""
        args, kwargs = self.batch.context(features).calls[self.index]
        if self.glue is not None:
            features = self.glue(features)
        where, *path = self.enters
        if where == "args":
            output = self.block(*replaced(args, tuple(path), features), **kwargs)
        else:
            output = self.block(*args, **replaced(kwargs, tuple(path), features))
        for step in self.leaves:
            output = output[step]
        found: Tensor = output
        return found


# Finding stations ---------------------------------------------------------------------------------------------------


def stations_of(
    model: nn.Module, example: Example, blocks: str | None = None, *, by_shapes: bool = False
) -> tuple[list[TrunkStation], list[bool]]:
    """The stations of a model's trunk, and whether there is glue before each.

    Args:
        model: in eval mode.
        example: two items.
        blocks: dotted name of the container whose children they are to be; by default found, as fine as can be.
        by_shapes: whether there are no values, by which stations could be checked.

    Raises:
        BackboneError: nothing stands in a chain; the message says what was found, and where it broke.
    """
    seen = Followed(model, example, lambda output: _outline_of(output, example.num_items))
    if blocks is not None:
        ways = [_of_named(model, seen, blocks)]
    else:
        ways = choose(seen)
        if not ways:
            raise _no_trunk(model, seen, broken_at(seen))
        _check_is_trunk(model, seen, ways[0])
    if by_shapes:
        stations = [_station(seen, call) for call in ways[0]]
        return stations, _apart(ways[0], stations, looks_at_strides=True)
    reasons = []
    for way in ways:
        stations = [_station(seen, call) for call in way]
        try:
            shown = check_chain(model, stations, example)
            return stations, [one or other for one, other in zip(shown, _apart(way, stations), strict=True)]
        except _Broken as broken:
            reasons.append(str(broken))
    raise _no_trunk(model, seen, reasons[0])


def _apart(
    calls: Sequence[ModuleCall], stations: Sequence[TrunkStation], *, looks_at_strides: bool = False
) -> list[bool]:
    """Whether an operator stands before each station: what multiplies by one leaves no trace in bits.

    With ``looks_at_strides`` views are told by how they stand in memory, too, and not left to whoever compares bits.
    """
    pairs = list(zip(calls, stations, strict=True))
    between = [one.left[a.leaves] != other.entered[b.enters] for (one, a), (other, b) in pairwise(pairs)]
    if looks_at_strides:
        views = [one.stands[1][a.leaves] != other.stands[0][b.enters] for (one, a), (other, b) in pairwise(pairs)]
        between = [one or other for one, other in zip(between, views, strict=True)]
    return [False, *between, True]


def _of_named(model: nn.Module, seen: Followed, name: str) -> list[ModuleCall]:
    calls = of_container(seen, name)
    if not calls:
        containers = dict.fromkeys(call.slot.container for call in seen.walk())
        known = [each for each in containers if of_container(seen, each)]
        raise BackboneError(
            f"{arg('blocks', name)}: {type(model).__name__} calls no module with weights in it; it does in "
            f"{listed(known)}."
        )
    found = [call for call in calls if 0 not in call.entered.values()]  # what the input is given to is the stem's
    for call in found:
        if seen.ends(call) is None:
            raise BackboneError(f"{arg('blocks', name)}: they don't stand in a chain: {seen.why_not(call)}.")
    if not found:
        raise BackboneError(f"{arg('blocks', name)}: it has no module behind the one that is given the input.")
    return found


def _no_trunk(model: nn.Module, seen: Followed, why: str) -> BackboneError:
    chains: dict[str, int] = {}
    for call in seen.walk():
        if seen.ends(call) is not None:
            chains[call.slot.container] = chains.get(call.slot.container, 0) + 1
    found = ", ".join(f"{name or 'the model'} ({count})" for name, count in list(chains.items())[:6])
    return BackboneError(
        f"{type(model).__name__} can't be split: {why}. Chains seen: {found or 'none'}. Give "
        f"{arg('blocks')}, the dotted name of the container of its blocks, or make a localgrad.Backbone of its parts "
        "by hand."
    )


def _check_is_trunk(model: nn.Module, seen: Followed, chosen: Sequence[ModuleCall]) -> None:
    """Refuse a chain that is only the beginning of what the model does, before its features go several ways."""
    mine, others = sum(call.weight for call in chosen), beside(seen, chosen)
    if mine < LEAST_TRUNK * others or (len(chosen) == 1 and others):
        raise _no_trunk(
            model,
            seen,
            f"{broken_at(seen)}; the chain {chosen[0].name} .. {chosen[-1].name} has but "
            f"{100 * mine / (mine + others):.0f} % of its blocks' weights",
        )


def _station(seen: Followed, call: ModuleCall) -> TrunkStation:
    ends = seen.ends(call)
    assert ends is not None, "chosen ones are stations"
    enters, leaves_at = ends
    return TrunkStation(
        slot=call.slot,
        enters=enters,
        leaves=leaves_at,
        given=call.output,
        entered=call.shapes[0][enters],
        left=call.shapes[1][leaves_at],
    )


class _Broken(Exception):  # noqa: N818  # what it is
    """Stations that don't stand in a chain: where, and how."""


def check_chain(model: nn.Module, stations: Sequence[TrunkStation], example: Example) -> list[bool]:
    """Whether something is done to the features before each station; [stations + 1], the tail's last.

    Raises:
        _Broken: a station is given what depends on more than what the one before gave.
    """
    trunk = Trunk(model, stations, example)
    noises = [_noise(station, example, seed) for seed, station in enumerate(stations)]
    others = [_noise(station, example, seed + 1000) for seed, station in enumerate(stations)]
    real = _run_real(trunk)
    base = _run_noise(trunk, noises)
    for index, station in enumerate(stations):
        if base.rest[index] != real.rest[index]:
            raise _Broken(f"what {station.slot.name} is called with beside its features depends on features")
    count = len(stations)
    runs = []
    for bit in range(max(1, (count - 1).bit_length())):
        for wanted in (0, 1):
            changed = [((index >> bit) & 1) == wanted for index in range(count)]
            mixed = [
                other if is_changed else noise for noise, other, is_changed in zip(noises, others, changed, strict=True)
            ]
            runs.append(_run_noise(trunk, mixed))
            _check_changes(stations, base, runs[-1], changed)
    if all(seen.logits == base.logits for seen in runs):
        raise _Broken(f"its logits don't depend on {stations[-1].slot.name}")
    for index in range(1, count):
        if all(seen.features[index] == base.features[index] for seen in runs):
            raise _Broken(f"{stations[index].slot.name} isn't given what {stations[index - 1].slot.name} gave")
    return [False, *(base.features[index] != digest([noises[index - 1]]) for index in range(1, count)), True]


def _check_changes(stations: Sequence[TrunkStation], base: _Answers, seen: _Answers, changed: Sequence[bool]) -> None:
    """Refuse what changed though nothing that it may depend on did; ``changed`` says what each station gave."""
    if not len(seen.features) == len(seen.rest) == len(stations):
        raise _Broken("which of its blocks are called depends on features")
    for index, station in enumerate(stations):
        if seen.rest[index] != base.rest[index]:
            raise _Broken(f"what {station.slot.name} is called with beside its features depends on features")
        if not (index > 0 and changed[index - 1]) and seen.features[index] != base.features[index]:
            raise _Broken(f"{station.slot.name} is given more than what the block before it gave (a skip, or a branch)")
    if not changed[-1] and seen.logits != base.logits:
        raise _Broken(f"its logits depend on more than what {stations[-1].slot.name} gave (a skip, or a branch)")


@dataclass
class _Answers:
    features: list[bytes] = field(default_factory=list)
    rest: list[bytes] = field(default_factory=list)
    logits: bytes = b""


def _run_real(trunk: Trunk) -> _Answers:
    seen = _Answers()

    def noting(index: int) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
            _note(seen, trunk.stations[index], args, kwargs, looks=False)

        return note

    handles = [
        station.slot.module.register_forward_pre_hook(noting(index), with_kwargs=True)
        for index, station in enumerate(trunk.stations)
    ]
    try:
        with torch.no_grad():
            trunk.example.call(trunk.model)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen.rest) != len(trunk.stations):
        raise _Broken("a block is called more than once")
    return seen


def _run_noise(trunk: Trunk, noises: Sequence[Tensor]) -> _Answers:
    seen = _Answers()

    def answer(index: int, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        station = trunk.stations[index]
        if len(seen.rest) != index:
            raise _Broken("its blocks are called in another order when features are others")
        _note(seen, station, args, kwargs)
        return station.answer(noises[index].clone(), len(noises[index]))

    try:
        with torch.no_grad():
            seen.logits = digest([trunk.run(trunk.example, answer, {})])
    except (_Broken, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's code says of values that it doesn't expect
        raise _Broken(f"it doesn't run without its blocks ({reason_of(error, 160)})") from error
    return seen


def _note(seen: _Answers, station: TrunkStation, args: tuple[Any, ...], kwargs: Kwargs, *, looks: bool = True) -> None:
    try:
        features, rest_args, rest_kwargs = taken_out(station, args, kwargs)
    except (KeyError, IndexError, TypeError) as error:
        raise _Broken(f"{station.slot.name} is called in another way when features are others") from error
    if not isinstance(features, Tensor):
        raise _Broken(f"{station.slot.name} is called in another way when features are others")
    seen.features.append(digest([features]) if looks else b"")
    rest = sorted(leaves((rest_args, rest_kwargs)), key=lambda leaf: repr(leaf[0]))
    tensors = [leaf for _, leaf in rest if isinstance(leaf, Tensor)]
    plain = repr([(path, leaf) for path, leaf in rest if isinstance(leaf, (bool, int, float, str))])
    seen.rest.append(digest(tensors) + plain.encode())


def _noise(station: TrunkStation, example: Example, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(leaves(station.given))
    shape = shapes[station.leaves]
    return torch.randn(shape.sides, generator=generator, device="cpu").to(example.tensor.device, shape.dtype)


# The parts ------------------------------------------------------------------------------------------------------------


class TakenApart(NamedTuple):
    """A model taken apart.

    Attributes:
        trunk: what they share.
        stem: inputs to features.
        blocks: features to features.
        tail: features to logits.
        unused: parameters that no part reads.
    """

    trunk: Trunk
    stem: Segment
    blocks: list[Called]
    tail: Segment
    unused: list[nn.Parameter]


def take_apart(model: nn.Module, example: Example, blocks: str | None = None, *, by_shapes: bool = False) -> TakenApart:
    """Take a model apart. Nothing is proved; the model is to be in eval mode, in a region that leaves it as it was.

    Args:
        model: on the processor or a device, where the example is.
        example: two items.
        blocks: dotted name of the container of its blocks; by default found.
        by_shapes: whether its tensors have shapes and no values (fake ones): then what only values show is taken to be
            as data flows.

    Raises:
        BackboneError: no blocks in a chain.
    """
    if by_shapes:
        return _made_of(model, *stations_of(model, example, blocks, by_shapes=True), example, by_shapes=True)
    with nothing_hidden(model):
        stations, glued = stations_of(model, example, blocks, by_shapes=False)
        try:
            return _made_of(model, stations, glued, example, by_shapes=False)
        except (LocalgradError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model's own code says
            raise BackboneError(
                f"{type(model).__name__} can't be split: with its blocks left out, its own code fails "
                f"({reason_of(error)}). Give {arg('blocks')}, the dotted name of the container of its blocks, or make "
                "a localgrad.Backbone of its parts by hand."
            ) from error


def _made_of(
    model: nn.Module, stations: list[TrunkStation], glued: list[bool], example: Example, *, by_shapes: bool
) -> TakenApart:
    trunk = Trunk(model, stations, example)
    if by_shapes:  # nothing is drawn, and nobody could tell
        trunk.draws = dict.fromkeys(range(-1, len(stations)), False)
    busy = _find_around(trunk)
    last = len(stations) - 1
    glued = [is_glued or index in busy for index, is_glued in enumerate(glued)]
    glued[0] = False
    stem, tail = Segment(trunk, -1), Segment(trunk, last)
    called = [Called(trunk, index, Segment(trunk, index - 1) if glued[index] else None) for index in range(last + 1)]
    _find_fixed(trunk, stem)
    with torch.no_grad():
        stem(example.tensor)
    trunk.batch.known = trunk.batch.current
    segments = [stem, *(block.glue for block in called if block.glue is not None), tail]
    _find_reading(trunk, segments[1:], by_shapes=by_shapes)
    unused = _find_weights(trunk, segments)
    return TakenApart(trunk, stem, called, tail, unused)


def _find_fixed(trunk: Trunk, stem: Segment) -> None:
    """Find what of a context is as long whatever the batch: it is made for two items, and for three."""
    with torch.no_grad(), suppress(Exception):  # of a model that takes no other number nothing is known
        made = []
        for num_items in (2, 3):
            stem(trunk.example.rows(num_items).tensor)
            assert trunk.batch.current is not None, "the stem has just made it"
            made.append(trunk.batch.current)
        two, three = made
        others = {path: leaf.shape for path, leaf in three.leaves if isinstance(leaf, Tensor)}
        alike = [path for path, leaf in two.leaves if isinstance(leaf, Tensor) and others.get(path) == leaf.shape]
        trunk.fixed = frozenset(alike)
        for number, outline in two.outputs.items():
            sides = {path: leaf.sides for path, leaf in leaves(three.outputs[number]) if isinstance(leaf, Shape)}
            same = [path for path, leaf in leaves(outline) if isinstance(leaf, Shape) and sides.get(path) == leaf.sides]
            trunk.fixed_outputs[number] = frozenset(same) if trunk.around[number][1] == 0 else frozenset()


def _find_around(trunk: Trunk) -> set[int]:
    """Find which modules are called in one place only, what they give, and in which place; gives the places of all."""
    model, example = trunk.model, trunk.example
    stations = {id(station.slot.module) for station in trunk.stations}
    inside = {id(module) for station in trunk.stations for module in station.slot.module.modules()}
    spanning = {id(m) for m in model.modules() if any(id(inner) in stations for inner in m.modules())}
    places: dict[int, set[int]] = {}
    outputs: dict[int, Any] = {}
    versions: list[tuple[int, Tensor, int]] = []
    left = 0

    def passed(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal left
        left += 1

    def called(module: nn.Module, _args: Any) -> None:
        places.setdefault(id(module), set()).add(left)

    def gave(module: nn.Module, _args: Any, output: Any) -> None:
        if id(module) in outputs and outputs[id(module)] != _outline_of(output, example.num_items):
            places[id(module)].add(-1)  # it gives now this, now that: no stand-in for it
        outputs[id(module)] = _outline_of(output, example.num_items)
        versions.extend((id(module), leaf, version_of(leaf)) for _, leaf in leaves(output) if isinstance(leaf, Tensor))

    counts: dict[int, int] = {}
    found = list(slots(model))
    for slot in found:
        counts[id(slot.module)] = counts.get(id(slot.module), 0) + 1
    handles = [station.slot.module.register_forward_hook(passed) for station in trunk.stations]
    for slot in found:
        if id(slot.module) not in inside and id(slot.module) not in spanning:
            handles.append(slot.module.register_forward_pre_hook(called))
            handles.append(slot.module.register_forward_hook(gave))
    try:
        with torch.no_grad():
            example.call(model)
    finally:
        for handle in handles:
            handle.remove()
    written = {module for module, tensor, version in versions if version_of(tensor) != version}
    taken: set[int] = set()
    for slot in found:
        where = places.get(id(slot.module), set())
        if id(slot.module) in taken or len(where) != 1 or counts[id(slot.module)] > 1:
            continue
        place = next(iter(where))
        inner = [places.get(id(module), {place}) for module in slot.module.modules()]
        if all(each == {place} for each in inner):
            trunk.around.append((slot, place))
            trunk.outputs[len(trunk.around) - 1] = outputs[id(slot.module)]
            if id(slot.module) in written:
                trunk.written.add(len(trunk.around) - 1)
            taken |= set(map(id, slot.module.modules()))
    idle = {id(slot.module) for slot in found if isinstance(slot.module, nn.Identity)}
    return {place for number, where in places.items() if number not in idle for place in where}


def _find_reading(trunk: Trunk, segments: Sequence[Segment], *, by_shapes: bool) -> None:
    """Find out whether what is behind the first block looks at the main input."""
    context = trunk.batch.known
    assert context is not None, "the stem has run"
    main = context.example.tensor
    if by_shapes:
        trunk.reads_inputs = any(_is_reached(trunk, segment, main) for segment in segments)
        if not trunk.reads_inputs:
            nothing = torch.zeros((), dtype=main.dtype, device=main.device).expand_as(main)
            trunk.batch.known = Context(
                context.calls, context.example.with_main(nothing), context.outputs, context.num_items, context.fixed
            )
        trunk.batch.current = trunk.batch.known
        return
    other = context.example.with_main(torch.zeros((), dtype=main.dtype, device=main.device).expand_as(main))

    def seen() -> list[bytes]:
        found = []
        for segment in segments:
            station = trunk.stations[segment.start]
            with torch.no_grad():
                found.append(digest([segment(_noise(station, trunk.example, 7))]))
        return found

    before = seen()
    trunk.batch.current = Context(context.calls, other, context.outputs, context.num_items, context.fixed)
    try:
        trunk.reads_inputs = seen() != before
    except Exception:  # whatever a model says of an empty input
        trunk.reads_inputs = True
    if not trunk.reads_inputs:
        trunk.batch.known = trunk.batch.current
    trunk.batch.current = trunk.batch.known


def _is_reached(trunk: Trunk, segment: Segment, main: Tensor) -> bool:
    """Whether data flows from the main input to what a segment gives, past its features."""
    features = _noise(trunk.stations[segment.start], trunk.example, 7)
    reached = Reached(main)
    with torch.no_grad(), reached:
        return reached.holds(segment(features))


def _find_weights(trunk: Trunk, segments: Sequence[Segment]) -> list[nn.Parameter]:
    """Give segments the weights that they read without a module of their own; what is left is read by none.

    A weight of another segment's module or of a block counts: whoever reads it as well shares it. What is read in
    training alone (a mask token) is found in train mode, in some runs, as that may be drawn.
    """
    model = trunk.model
    learning = [weight for weight in model.parameters() if weight.is_floating_point()]
    frozen = [weight for weight in learning if not weight.requires_grad]
    modes, draws = [(module, module.training) for module in model.modules()], dict(trunk.draws)
    for weight in frozen:
        weight.requires_grad = True
    try:
        for is_training in (False, *[True] * RUNS_IN_TRAINING):
            for module, mode in modes:
                module.training = is_training or mode
            for segment in segments:
                with suppress(*([Exception] if is_training else [])):  # whatever it asks for in training
                    _add_weights(trunk, segment, learning)
    finally:
        for module, mode in modes:
            module.training = mode
        for weight in frozen:
            weight.requires_grad = False
        trunk.batch.current, trunk.draws = trunk.batch.known, draws
    held = {id(w) for segment in segments for w in segment.parameters()}
    held |= {id(w) for station in trunk.stations for w in station.slot.module.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in held]


RUNS_IN_TRAINING = 3


def _add_weights(trunk: Trunk, segment: Segment, learning: Sequence[nn.Parameter]) -> None:
    """Add to a segment what its output, or the context that it makes, depends on."""
    own = {id(weight) for weight in segment.parameters()}
    with torch.enable_grad():
        if segment.start < 0:
            ends = [segment(trunk.example.tensor)]
            context = trunk.batch.current
            assert context is not None, "the stem has just made it"
            _note_reach(trunk, ends[0], context, learning)
            ends += context.tensors
        else:
            ends = [segment(_noise(trunk.stations[segment.start], trunk.example, 7))]
    for weight, is_read in zip(learning, _depends(ends, learning), strict=True):
        if is_read and id(weight) not in own:
            segment.weights.append(weight)


def _note_reach(trunk: Trunk, features: Tensor, context: Context, learning: Sequence[nn.Parameter]) -> None:
    """Note to which stations weights of the stem get beside the features: by them alone those aren't trained."""
    names = {id(weight): name for name, weight in trunk.model.named_parameters()}
    by_tensor: dict[int, list[bool]] = {}
    for index, call in enumerate(context.calls):
        for _, leaf in leaves(call):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                if id(leaf) not in by_tensor:
                    by_tensor[id(leaf)] = _depends([leaf], learning)
                for weight, is_read in zip(learning, by_tensor[id(leaf)], strict=True):
                    if is_read:
                        trunk.reach.setdefault(names[id(weight)], set()).add(index)
    for weight, is_read in zip(learning, _depends([features], learning), strict=True):
        if is_read and (name := names[id(weight)]) in trunk.reach:
            trunk.reach[name].add(0)


def _depends(ends: Sequence[Tensor], learning: Sequence[nn.Parameter]) -> list[bool]:
    """Of each weight, whether tensors depend on it."""
    ends = [end for end in ends if end.requires_grad]
    if not ends:
        return [False] * len(learning)
    ones = [torch.ones_like(end) for end in ends]
    found = torch.autograd.grad(ends, learning, ones, allow_unused=True, retain_graph=True)
    return [gradient is not None for gradient in found]
