"""Where the boundaries between local modules fall: a ``Plan`` (pure data) and the balancing (pure algorithm).

Nothing here knows torch, a model or a device. ``balance`` takes integers and returns boundaries; what the
integers are (bytes that autograd saves for one block, microseconds, ...) is its caller's business. The
optimum is exact: it minimises the sorted costs of all modules, the largest first. So among the partitions with the
least peak it takes the one with the least second-largest module, and so on. Greedy and bisection methods (as in
torchgpipe's block partition, after Barany and Grinberg) reach the same peak but leave the rest arbitrary. How it is
found in a fraction of a second for a thousand blocks is told in ``balancing.py``.

Boundaries are the indices of the first block of each module but the first: with six blocks,
``(2, 5)`` is the three modules 0-1, 2-4, 5. The empty tuple is one module: end-to-end training.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, fields
from fractions import Fraction
from operator import index
from typing import SupportsIndex, TypedDict, cast

from localgrad.balancing import balanced
from localgrad.errors import PartitionError, arg
from localgrad.formats import Json, check_format

Boundaries = tuple[int, ...]
Request = int | str | Sequence[int]
LEVELS = ("none", "blocks", "halves")


@dataclass(frozen=True, order=True)
class Checkpointing:
    """What one local module recomputes in its backward pass. Changes memory and time, never results.

    As text: ``none``, ``blocks``, ``halves``, ``blocks/8`` and ``halves/8`` (over 8 chunks of the batch),
    ``halves/8:3`` (the first three blocks).

    Attributes:
        level: ``none``; ``blocks``: of a block only its input is kept; ``halves``: of a block its input and the
            features between attention and MLP, and only one of the two is recomputed at a time.
        chunks: the parts of the batch that each block or half runs over, one after another.
        first: how many blocks from the module's start on; ``None`` for all. Blocks near the start are the widest in
            hierarchical models, and their backward pass is last, when the activations of the others are gone.
    """

    level: str = "none"
    chunks: int = 1
    first: int | None = None
    argument: InitVar[str] = "checkpoint"

    def __post_init__(self, argument: str) -> None:
        """Check the values, and that they go together."""
        if self.level not in LEVELS:
            raise PartitionError(f"{arg(argument)}: unknown {self.level!r}; take none, blocks, halves or halves/8.")
        if self.chunks < 1 or (self.chunks > 1 and self.level == "none"):
            raise PartitionError(
                f"{arg(argument)}: {self.chunks} chunks of {self.level!r}; write halves/8, for example."
            )
        if self.first is not None and (self.first < 1 or self.level == "none"):
            raise PartitionError(
                f"{arg(argument)}: {self}: the number of blocks after ':' must be at least 1, with a level."
            )

    def __str__(self) -> str:
        """The text that ``parse`` reads."""
        chunks = f"/{self.chunks}" if self.chunks > 1 else ""
        return self.level + chunks + ("" if self.first is None else f":{self.first}")

    @classmethod
    def parse(cls, value: object, argument: str = "checkpoint") -> Checkpointing:
        """Read ``halves/8:3``; ``True`` and ``False`` stand for ``blocks`` and ``none``.

        Args:
            value: text, or what is read already.
            argument: whose value it is, for messages.

        Raises:
            PartitionError: it can't be read; the message says what can.
        """
        if isinstance(value, Checkpointing):
            return value
        if isinstance(value, bool):
            return cls("blocks" if value else "none")
        match = (
            re.fullmatch(r"([a-z]+)(?:/(\d{1,9}))?(?::(\d{1,9}))?", value.strip()) if isinstance(value, str) else None
        )
        if match is None:
            raise PartitionError(
                f"{arg(argument)}: {str(value)[:40]!r} can't be read; take none, blocks, halves, halves/8 (over 8 "
                "chunks of the batch), or halves/8:3 (the first three blocks of a module)."
            )
        level, chunks, first = match.groups()
        return cls(level, int(chunks or 1), None if first is None else int(first), argument)


@dataclass(frozen=True, kw_only=True)
class ModuleForecast:
    """What one local module of a plan is expected to cost.

    Attributes:
        first_block: name of its first block.
        last_block: name of its last block.
        num_blocks: how many it has.
        checkpoint: what it recomputes, as text.
        peak_bytes: the most that is alive while its step runs.
        by_category: those bytes by what they are of.
        time_share: of the whole step's time.
    """

    first_block: str
    last_block: str
    num_blocks: int
    checkpoint: str
    peak_bytes: int
    by_category: dict[str, int]
    time_share: float


@dataclass(frozen=True, kw_only=True)
class Rival:
    """What another way to train the same model would cost.

    Attributes:
        name: how it is trained.
        peak_bytes: of a step.
        time_ratio: of a step's time to end-to-end training's.
        needed_bytes: the budget that it needs, with the margin; 0 where that wasn't asked.
    """

    name: str
    peak_bytes: int
    time_ratio: float
    needed_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RankForecast:
    """What one rank of a plan for ranks is expected to cost; its peak is the sum of the three parts.

    Attributes:
        time_share: of the step of the same plan in one process.
        peak_bytes: all that it needs.
        static_bytes: weights, optimizer state and average of its module.
        step_bytes: what its module's step takes besides.
        buffer_bytes: packets that are on their way.
    """

    time_share: float
    peak_bytes: int
    static_bytes: int
    step_bytes: int
    buffer_bytes: int


@dataclass(frozen=True, kw_only=True)
class RanksForecast:
    """What a plan for ranks is expected to cost, one local module a rank.

    Attributes:
        num_ranks: how many.
        balance: ``time`` or ``memory``.
        num_buffers: batches that may be on their way at each end of a link.
        speed_up: over the same plan in one process.
        sent_bytes: a step, over each boundary.
        ranks: each rank.
    """

    num_ranks: int
    balance: str
    num_buffers: int
    speed_up: float
    sent_bytes: tuple[int, ...]
    ranks: tuple[RankForecast, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the largest rank."""
        return max(rank.peak_bytes for rank in self.ranks)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a plan is expected to cost, as one whole step of it on fake tensors told.

    Attributes:
        peak_bytes: the most that is alive in a step, in one process.
        composed_peak_bytes: the same as the search composed it from the costs of blocks.
        static_bytes: what is alive all the time.
        needed_bytes: the budget that the plan needs, with the margin; of the largest rank in a plan for ranks.
        budget_bytes: that was asked for; ``None`` for none.
        time_ratio: of a step's time to that of end-to-end training on the whole batch, nothing recomputed.
        global_peak_bytes: of an end-to-end step, where some are; ``None`` otherwise.
        modules: each local module.
        peak_module: which of them sets the peak.
        rivals: what end-to-end training would cost.
        exact: beside local modules for a budget, the fastest way to exact gradients with whole batches that fits it, by
            the margin; where none does, the one that needs least.
        notes: for people.
        parallel: in a plan for ranks, what they are expected to cost.
        allocated_bytes: on a card, at most allocated in a whole run, as ``torch.cuda.max_memory_allocated`` counts.
        reserved_bytes: likewise reserved, as ``torch.cuda.max_memory_reserved`` counts.
        available_bytes: of the budget, what a process's allocator may reserve.
        card: that was planned for, in words.
        card_is_assumed: nobody named it, and there was none.
        allocator_rules: of PyTorch's allocator, in words.
        is_confirmed: the run's own allocations were replayed under exactly what is left of the budget, and fit.
        budget_parts: what the budget includes, and how many bytes of each.
        attention: kernels of fused attention that were assumed, and why.
    """

    peak_bytes: int
    composed_peak_bytes: int
    static_bytes: int
    needed_bytes: int
    budget_bytes: int | None
    time_ratio: float
    global_peak_bytes: int | None = None
    modules: tuple[ModuleForecast, ...]
    peak_module: int
    rivals: tuple[Rival, ...]
    exact: Rival | None = None
    notes: tuple[str, ...] = ()
    parallel: RanksForecast | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    available_bytes: int | None = None
    card: str | None = None
    card_is_assumed: bool = False
    allocator_rules: str | None = None
    is_confirmed: bool = False
    budget_parts: dict[str, int] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)


class PlanDict(TypedDict, total=False):
    """The JSON of a plan."""

    format: int
    model: str
    num_blocks: int
    boundaries: list[int]
    checkpoint: list[str]
    activation_bytes: list[int]
    accumulation: int
    evaluation_batch: int | None
    global_checkpoint: str | None
    made_for: dict[str, Json]
    forecast: Json


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A partition of one model, with what is known of its modules. Pure data; JSON and back.

    Attributes:
        model: name of the model that the plan was made for (refused for another).
        num_blocks: blocks between stem and tail.
        boundaries: first block of every local module but the first, ascending.
        checkpoint: for each module, what is recomputed in its backward pass; empty for nothing in any.
        activation_bytes: for each module, the bytes that autograd keeps for one image if nothing is recomputed.
        accumulation: parts that each batch is cut into.
        evaluation_batch: images that are evaluated together, at most; results don't depend on it.
        global_checkpoint: what end-to-end steps recompute, where the plan says; else it is as configured.
        made_for: what a plan to a budget was made for, by the keys of a recipe, with versions; empty otherwise. Its
            forecast holds for that alone; ``differences`` tells what is otherwise.
        forecast: what it is expected to cost; ``None`` where nothing was forecast.
    """

    model: str
    num_blocks: int
    boundaries: Boundaries
    checkpoint: tuple[Checkpointing, ...] = ()
    activation_bytes: tuple[int, ...] = ()
    accumulation: int = 1
    evaluation_batch: int | None = None
    global_checkpoint: Checkpointing | None = None
    made_for: dict[str, Json] = field(default_factory=dict, compare=False)
    forecast: Forecast | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that the boundaries fit the blocks and the lists fit the modules."""
        check_boundaries(self.boundaries, self.num_blocks)
        for name in ("checkpoint", "activation_bytes"):
            values = getattr(self, name)
            if values and len(values) != self.num_modules:
                raise PartitionError(f"plan: {name} has {len(values)} entries for {self.num_modules} local modules.")
        if self.accumulation < 1:
            raise PartitionError(f"plan: accumulation must be at least 1, got {self.accumulation}.")

    @property
    def num_modules(self) -> int:
        """Number of local modules, at least 1."""
        return len(self.boundaries) + 1

    @property
    def spans(self) -> tuple[range, ...]:
        """The blocks of each local module, as ranges of block indices."""
        return spans(self.boundaries, self.num_blocks)

    @property
    def is_for_ranks(self) -> bool:
        """Whether it was made for several processes."""
        return self.forecast is not None and self.forecast.parallel is not None

    def checkpointing(self, index: int) -> Checkpointing:
        """What local module ``index`` recomputes."""
        return self.checkpoint[index] if self.checkpoint else Checkpointing()

    def differences(self, here: Mapping[str, object]) -> list[str]:
        """In what a plan was made for something else: ``execution.precision 'bf16', here 'fp32'``.

        Args:
            here: what it is to be used for, by keys of ``made_for``; those that the plan doesn't say are passed over.
        """
        pairs = (
            (key, as_json(self.made_for[key]), as_json(value)) for key, value in here.items() if key in self.made_for
        )
        return [f"{key} {planned!r}, here {value!r}" for key, planned, value in pairs if planned != value]

    def to_dict(self) -> PlanDict:
        """The plan as plain values; checkpointing as text."""
        globally = self.global_checkpoint
        return {
            "format": PLAN_FORMAT,
            "model": self.model,
            "num_blocks": self.num_blocks,
            "boundaries": list(self.boundaries),
            "checkpoint": [str(how) for how in self.checkpoint],
            "activation_bytes": list(self.activation_bytes),
            "accumulation": self.accumulation,
            "evaluation_batch": self.evaluation_batch,
            "global_checkpoint": None if globally is None else str(globally),
            "made_for": self.made_for,
            "forecast": None if self.forecast is None else json.loads(json.dumps(asdict(self.forecast))),
        }

    def to_json(self) -> str:
        """Write the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text, of this version or an older one.

        Raises:
            PartitionError: the text is no plan, one whose parts contradict each other, or one of a newer version.
        """
        try:
            values = json.loads(text)
            check_format("plan", values.pop("format", 1), PLAN_FORMAT, PartitionError)
            known = {entry.name for entry in fields(cls)}
            unknown = sorted(set(values) - known)
            if unknown:
                raise PartitionError(f"plan: unknown key {unknown[0]!r}; a plan has {', '.join(sorted(known))}.")
            forecast = dict(values.get("forecast") or {})
            # Format 1 had what end-to-end steps recompute among the figures.
            evaluated = values.get("evaluation_batch")
            globally = values.get("global_checkpoint", forecast.pop("global_checkpoint", None))
            return cls(
                model=str(values["model"]),
                num_blocks=_integer(values["num_blocks"]),
                boundaries=tuple(map(_integer, values["boundaries"])),
                checkpoint=tuple(Checkpointing.parse(c) for c in values.get("checkpoint", ())),
                activation_bytes=tuple(map(_integer, values.get("activation_bytes", ()))),
                accumulation=_integer(values.get("accumulation", 1)),
                evaluation_batch=None if evaluated is None else _integer(evaluated),
                global_checkpoint=None if globally is None else Checkpointing.parse(globally),
                made_for=dict(values.get("made_for", {})),
                forecast=_read_forecast(forecast) if forecast else None,
            )
        except PartitionError:
            raise
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
            raise PartitionError(f"plan: this is not the JSON of a plan ({error!r}).") from error


PLAN_FORMAT = 2
"""Version of a plan's JSON. 1, without a number, was that of 0.1.0."""


def _read_forecast(values: dict[str, Json]) -> Forecast:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Forecast).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["forecast", *map(str, first["loc"])])
        raise PartitionError(f"plan: {key}: {first['msg']}; make the plan again with `localgrad plan`.") from None


def forecast_of(plan: Plan) -> Forecast:
    """The forecast of a plan that has one.

    Raises:
        PartitionError: nothing was forecast.
    """
    if plan.forecast is None:
        raise PartitionError("plan: it has no forecast; make it with `localgrad plan`.")
    return plan.forecast


def as_json(value: object) -> object:
    """A value as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value


def spans(boundaries: Boundaries, num_blocks: int) -> tuple[range, ...]:
    """Turn boundaries into the ranges of blocks that they make."""
    edges = (0, *boundaries, num_blocks)
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))


def check_boundaries(boundaries: Sequence[int], num_blocks: int) -> Boundaries:
    """Return the boundaries as a tuple, if every module that they make has at least one block.

    Raises:
        PartitionError: out of order, repeated, or outside ``1 .. num_blocks - 1``.
    """
    if num_blocks < 1:
        raise PartitionError(f"a partition needs at least one block, got num_blocks={num_blocks}.")
    for number, boundary in enumerate(boundaries):
        if not 1 <= boundary < num_blocks:
            raise PartitionError(
                f"{arg('modules')}: boundary {boundary} lies outside 1..{num_blocks - 1} (the model has {num_blocks} "
                "blocks, and a boundary is the index of the first block of a module)."
            )
        if number and boundary <= boundaries[number - 1]:
            listed = list(boundaries)
            raise PartitionError(f"{arg('modules')}: boundaries must ascend, got {listed}; try {sorted(set(listed))}.")
    return tuple(boundaries)


def resolve(request: Request, costs: Sequence[int], stage_boundaries: Sequence[int] = ()) -> Boundaries:
    """Turn what a user asks for into boundaries.

    Args:
        request: a number of modules (balanced by ``costs``), ``"stages"``, or explicit boundaries.
        costs: cost of each block, for balancing (bytes, usually).
        stage_boundaries: first block of every stage after the first, for ``"stages"``.

    Returns:
        Boundaries; empty for one module.

    Raises:
        PartitionError: more modules than blocks, no stages, boundaries out of order, an unknown word.
    """
    num_blocks = len(costs)
    if isinstance(request, SupportsIndex) and not isinstance(request, bool):
        return balance(costs, index(request))
    if isinstance(request, str):
        if request != "stages":
            raise PartitionError(
                f"{arg('modules')}: {request!r} is neither a number of modules, 'stages', nor boundaries such as 2,5,9."
            )
        if not stage_boundaries:
            raise PartitionError(f"{arg('modules')}: this model has no stages; give a number of modules, such as 4.")
        return check_boundaries(stage_boundaries, num_blocks)
    try:
        return check_boundaries([_integer(boundary) for boundary in cast(Sequence[int], request)], num_blocks)
    except TypeError:
        raise PartitionError(
            f"{arg('modules')}: expected a number, 'stages' or boundaries such as [2, 5, 9], got {request!r}."
        ) from None


def _integer(number: object) -> int:
    """A whole number, of numpy's too; a fraction would be cut off without a word.

    Raises:
        TypeError: it is none.
    """
    if isinstance(number, bool):
        raise TypeError(number)
    return index(cast(SupportsIndex, number))


def balance(costs: Sequence[int], num_modules: int) -> Boundaries:
    """Split blocks into ``num_modules`` runs with the least largest sum of costs.

    Among partitions with the same largest sum, the one with the least second-largest sum, and so on; among
    those that are still equal, the one with the earliest boundaries.

    Args:
        costs: cost of each block, a finite number, none negative; sums are exact.
        num_modules: modules wanted, from 1 to ``len(costs)``.

    Returns:
        ``num_modules - 1`` boundaries.

    Raises:
        PartitionError: ``num_modules`` is not between 1 and the number of blocks, or a cost is negative or no number.
    """
    exact = _exact(costs)
    count = _check_count(num_modules, len(exact))
    heavy = [block for block, cost in enumerate(exact) if cost]
    if count <= len(heavy):
        # Each module of the best partition has blocks that cost something. The others go to whom they follow, so that
        # boundaries are early.
        found = balanced([exact[block] for block in heavy], count)
        return tuple(heavy[number - 1] + 1 for number in found)
    return _earliest_apart(heavy, len(exact), count)


def _exact(costs: Sequence[int]) -> list[int]:
    """Costs as integers, scaled by a power of two where some are fractions.

    Raises:
        PartitionError: a cost is negative, or no finite number.
    """
    found: list[Fraction] = []
    for block, cost in enumerate(costs):
        try:
            if isinstance(cost, (str, bytes)):
                raise TypeError(cost)
            value = Fraction(_integer(cost) if hasattr(cost, "__index__") else float(cost))
        except (TypeError, ValueError, OverflowError):
            raise PartitionError(
                f"costs: block {block} costs {cost!r}; give each block a finite number, such as its bytes."
            ) from None
        if value < 0:
            raise PartitionError(f"costs: block {block} costs {cost!r}; a cost can't be negative, give 0 or more.")
        found.append(value)
    scale = max((value.denominator for value in found), default=1)  # powers of two, so each divides the largest
    return [int(value * scale) for value in found]


def _check_count(num_modules: int, num_blocks: int) -> int:
    try:
        count = _integer(num_modules)
    except TypeError:
        count = -1
    if not 1 <= count <= num_blocks:
        raise PartitionError(
            f"{arg('modules')}: {num_modules} local modules can't be made of {num_blocks} blocks; "
            f"take a number from 1 to {num_blocks}."
        )
    return count


def _earliest_apart(heavy: Sequence[int], num_blocks: int, num_modules: int) -> Boundaries:
    """The earliest boundaries of so many modules that each has one of the ``heavy`` blocks at most."""
    boundaries: list[int] = []
    for boundary in range(1, num_blocks):
        left = num_modules - 2 - len(boundaries)
        needed = max(0, len(heavy) - bisect_left(heavy, boundary) - 1)
        if left >= needed:
            boundaries.append(boundary)
    return tuple(boundaries)


def balance_by(cost: Callable[[int, int], int], num_blocks: int, num_modules: int) -> Boundaries:
    """Like ``balance``, for a cost of a module that is not the sum over its blocks.

    Args:
        cost: ``cost(start, stop)`` of one module with blocks ``start .. stop - 1``, a number that isn't negative;
            asked for once each.
        num_blocks: number of blocks.
        num_modules: modules wanted.

    Returns:
        ``num_modules - 1`` boundaries.

    Raises:
        PartitionError: ``num_modules`` is not between 1 and ``num_blocks``, or a cost is negative or no number.
    """
    count = _check_count(num_modules, num_blocks)
    # own[stop][start]: costs of the modules that end there.
    own = [[_checked(cost(start, stop), start, stop) for start in range(stop)] for stop in range(num_blocks + 1)]
    # best[stop]: (module costs, largest first; boundaries) of the first `stop` blocks in `k` modules.
    # Adding one cost to two sorted lists keeps their order, so optimal prefixes make optimal wholes.
    best: dict[int, tuple[tuple[int, ...], Boundaries]] = {
        stop: ((own[stop][0],), ()) for stop in range(1, num_blocks + 1)
    }
    for k in range(2, count + 1):
        largest = [best[start][0][0] if start in best else 0 for start in range(num_blocks)]
        extended = {}
        for stop in range(k, num_blocks + 1):
            peaks = list(map(max, largest[k - 1 : stop], own[stop][k - 1 :]))
            least = min(peaks)  # nothing but the least peak can be best
            starts = [start for start, peak in enumerate(peaks, k - 1) if peak == least]
            extended[stop] = min(_extend(*best[start], own[stop][start], start) for start in starts)
        best = extended
    return best[num_blocks][1]


def _checked(cost: int, start: int, stop: int) -> int:
    if not 0 <= cost < math.inf:
        raise PartitionError(
            f"cost: a module of blocks {start} to {stop - 1} costs {cost!r}; give a finite number, 0 or more."
        )
    return cost


def _extend(
    costs: tuple[int, ...], boundaries: Boundaries, cost: int, start: int
) -> tuple[tuple[int, ...], Boundaries]:
    return tuple(sorted((*costs, cost), reverse=True)), (*boundaries, start)
