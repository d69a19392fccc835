"""The costs of a model's parts, each distinct one measured once, forward and backward, on tensors without memory.

How. Each part runs by itself under the tracker of ``track.py``, between a source that gives its input and a sink that
gives its output's gradient; so what is measured is the code that trains. Blocks that are alike (same classes, plain
attributes and shapes) are measured once. Chunks of a half are alike too: two sizes are measured, and the block is then
measured with a stand-in that takes and frees the same bytes for each chunk. ``costs.py`` composes modules from that.

Seconds are a roofline (Williams, Waterman, Patterson, CACM 2009): each operator takes the longest of its arithmetic,
its traffic and its launch, at nominal rates of a kind of device. They serve to compare plans, as ratios; no clock is
read. ``timing.py`` reads one, for the same parts.

Shapes: B batch first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from localgrad.backbones.base import Backbone
from localgrad.backbones.fake import by_shapes_alone, fake_copy, optimizer_over
from localgrad.backbones.halves import Branch, Piece, find_pieces, signature, whole_block
from localgrad.memory.costs import WAYS, Costs, CostSettings, Head, PartCost
from localgrad.memory.gauge import (
    ByShapes,
    Gauge,
    Like,
    Measured,
    OptimizerFactory,
    Run,
    UpdateCost,
    nbytes_of,
    rounding_of,
)
from localgrad.memory.track import rounded, without_collector
from localgrad.objectives.base import ContextSupply, LocalObjective, ObjectiveValue
from localgrad.objectives.carried import CARRIED, Route, empty_batch
from localgrad.objectives.losses import Loss, loss_of
from localgrad.objectives.methods import Objective
from localgrad.objectives.site import Site
from localgrad.partition import Checkpointing
from localgrad.step.checkpointing import Recomputed, checkpointed, in_context_of
from localgrad.step.local_module import ModelEnd, build_local_objective, site_of
from localgrad.step.local_step import only_read, single_images_refused


@final
class _Chunk(torch.autograd.Function):
    """Takes and frees what one chunk of a branch does, without its operators."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, known: _KnownChunk) -> Tensor:
        ctx.known = known
        ctx.kept = torch.empty(max(0, known.cost.kept), dtype=torch.uint8)  # the random state, for one
        ctx.save_for_backward(features, weight)
        inner = torch.empty(max(0, known.cost.forward - known.cost.output), dtype=torch.uint8)
        output = torch.empty((len(features), *known.output_shape), dtype=known.output_dtype)
        del inner
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        features, weight = ctx.saved_tensors
        cost = ctx.known.cost
        outside = cost.output + nbytes_of(features) + cost.gradients  # views and results, alive besides
        inner = torch.empty(max(0, cost.backward - outside), dtype=torch.uint8)
        found = torch.empty_like(features), torch.empty_like(weight)
        del inner
        return *found, None


@dataclass(frozen=True)
class _KnownChunk:
    """A branch of which one chunk was measured; callable like the branch."""

    keeps_inputs_only = True

    cost: PartCost
    output_shape: tuple[int, ...]
    output_dtype: torch.dtype
    weight: nn.Parameter

    def __call__(self, features: Tensor) -> Tensor:
        output: Tensor = _Chunk.apply(features, self.weight, self)
        return output


Cuts = dict[str, list[Piece]]
"""The pieces of a block by level of checkpointing; ``whole``, it is one piece."""


@final
class Workshop:
    """Measures the parts of one backbone; remembers those that are alike.

    Args:
        gauge: how.
        settings: batch size, precision and so on.
    """

    def __init__(self, gauge: Gauge, settings: CostSettings) -> None:
        self.gauge = gauge
        self.mode = gauge.mode
        self.measure = gauge.measure
        self.settings = settings
        self.rounding = rounding_of(settings)
        self.known: dict[Any, Any] = {}

    def once(self, key: Any, measure: Callable[[], Any]) -> Any:
        """``measure()``, or what it gave before for the same key."""
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def nbytes(self, *tensors: Tensor) -> int:
        """Bytes that the device's allocator gives for tensors."""
        return sum(rounded(nbytes_of(tensor), self.rounding) for tensor in tensors)

    def nbytes_of(self, like: Like) -> int:
        """The same for a tensor that is told by its shape and type."""
        return rounded(math.prod(like[0]) * like[1].itemsize, self.rounding)

    def static_bytes(self, module: nn.Module) -> int:
        """The same for a module's parameters and buffers."""
        return self.nbytes(*module.parameters(), *module.buffers())

    def way(self, block: nn.Module, pieces: Cuts, like: Like, how: Checkpointing) -> PartCost:
        """Measure a block under a way of checkpointing, given its pieces by level."""
        weights = [weight for weight in block.parameters() if weight.requires_grad]
        if how.level == "none":
            run: Run = block
        elif how == Checkpointing("blocks"):
            run = Recomputed(pieces["whole"])
        else:
            return self._chunked(pieces[how.level], like, how.chunks)
        return self.measure(run, like, weights).cost

    def _chunked(self, pieces: Sequence[Piece], like: Like, chunks: int) -> PartCost:
        """A block in chunks: one chunk of each piece is measured, stand-ins then run as often as there are chunks."""
        stand_ins, cached, forward_ns, backward_ns = [], 0, 0, 0
        shape, dtype = like
        for piece in pieces:
            size = math.ceil(shape[0] / chunks) if piece.per_image else shape[0]
            times = math.ceil(shape[0] / size)  # as Tensor.chunk cuts: 9 images in 8 chunks are 5
            chunk = self._chunk(piece, ((size, *shape[1:]), dtype), shape[0])
            with self.mode:
                weight = nn.Parameter(torch.empty(max(1, chunk.cost.gradients // 4)))
            branch = _KnownChunk(chunk.cost, chunk.shape[1:], chunk.dtype, weight)
            stand_ins.append(Piece(branch, piece.drop_path, piece.per_image))
            cached += chunk.cost.kept_in_autocast - chunk.cost.kept
            forward_ns += times * chunk.cost.forward_ns
            backward_ns += times * chunk.cost.backward_ns
            shape, dtype = (shape[0], *chunk.shape[1:]), chunk.dtype if piece.drop_path is None else dtype
        gradients = [cast(_KnownChunk, piece.branch).weight for piece in stand_ins]
        cost = self.measure(Recomputed(stand_ins, chunks), like, gradients).cost
        return cost._replace(
            kept_in_autocast=cost.kept_in_autocast + cached,
            forward=cost.forward + cached,
            forward_ns=cost.forward_ns + forward_ns,
            backward_ns=cost.backward_ns + backward_ns,
        )

    def _chunk(self, piece: Piece, like: Like, whole: int) -> Measured:
        """One chunk of a branch; measured at all and an eighth of the batch: every tensor grows evenly with it."""
        (size, *rest), dtype = like
        mark = _mark_of(piece)

        def measured(size: int) -> Measured:
            branch = piece.branch
            if piece.under_way is not None and piece.per_image:
                branch = partial(in_context_of, piece.under_way, 0, piece.branch)
            run, like = partial(checkpointed, branch, effects=piece.effects), ((size, *rest), dtype)
            key = "chunk", mark, like
            measure = partial(self.measure, run, like, _weights_of(piece), present=True, accumulates=False)
            found: Measured = self.once(key, measure)
            return found

        # Not by image: on the whole batch, always. A chunk of one image may run otherwise than one of many.
        if whole < 16 or not piece.per_image:
            return measured(size)
        if size in (math.ceil(whole / 8), whole):
            return measured(size)
        small, large = measured(math.ceil(whole / 8)), measured(whole)
        share = (size - small.shape[0]) / (large.shape[0] - small.shape[0])
        between = (round(a + (b - a) * share) for a, b in zip(small.cost, large.cost, strict=True))
        return Measured(PartCost(*between), (size, *small.shape[1:]), small.dtype, small.keeps_input)

    def update(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> UpdateCost:
        """Measure an optimizer over some weights, each shape once and by itself."""
        if not weights:
            return UpdateCost(0, 0)
        nanoseconds = self.gauge.updating(weights, factory)
        optimizer = optimizer_over(self.mode, factory, weights)
        ordered = [weight for group in optimizer.param_groups for weight in group["params"]]
        found = [self._updated([weight], factory) for weight in ordered]
        state, temporary = sum(cost.state for cost in found), [cost.temporary for cost in found]
        if self.temporaries_add(ordered, factory):
            return UpdateCost(state, sum(temporary), nanoseconds)
        # A loop holds the last weight's results until it has the next one's. As blocks follow on blocks, the last
        # weight comes before the first. What is held is a part of the last one's temporaries: most need no measuring.
        most = max(temporary)
        for weight, own, before in zip(
            (*ordered[-1:], *ordered[:-1]), temporary, (temporary[-1], *temporary), strict=False
        ):
            if own + before > most:
                most = max(most, own + self._left_over(weight, factory))
        return UpdateCost(state, most, nanoseconds)

    def temporaries_add(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> bool:
        """Whether the optimizer works on all weights at once (``foreach``), and not on one after another."""

        def measured() -> bool:
            largest = max(weights, key=Tensor.numel)
            one, two, three = (self._updated([largest] * count, factory).temporary for count in (1, 2, 3))
            return three - two > one / 2

        adds: bool = self.once("temporaries add", measured)
        return adds

    def _left_over(self, weight: nn.Parameter, factory: OptimizerFactory) -> int:
        """Bytes of temporaries that a loop over weights still holds when it is at the next one."""
        if weight.ndim < 2:
            return 0
        return self._updated([weight] * 2, factory).temporary - self._updated([weight], factory).temporary

    def _updated(self, weights: Sequence[nn.Parameter], factory: OptimizerFactory) -> UpdateCost:
        key = "update", len(weights), weights[0].shape, weights[0].dtype
        cost: UpdateCost = self.once(key, partial(self.gauge.update, weights, factory))
        return cost


def _leading(cost: PartCost, entered: int, kept: int) -> PartCost:
    """A part as the first of its module: what enters it, of which it keeps so much, is there anyway."""
    return cost._replace(
        kept=cost.kept - kept,
        kept_in_autocast=cost.kept_in_autocast - kept,
        forward=cost.forward - entered,
        backward=cost.backward - kept,
    )


def _mark_of(piece: Piece) -> object:
    """The same for pieces that cost the same: the MLPs of a stage, say, however their blocks' attention differs."""
    branch = piece.branch
    if not (isinstance(branch, Branch) and isinstance(branch.inner, nn.Module)) or branch.recomputed or branch.scale:
        return id(piece)
    calls = [
        [signature(call) if isinstance(call, nn.Module) else getattr(call, "__name__", "") for call in _calls_in(part)]
        for part in (branch.before, branch.inner, branch.after)
    ]
    return id(piece) if any(None in found for found in calls) else repr((calls, branch.args, branch.kwargs))


def _calls_in(part: Callable[[Tensor], Tensor]) -> Sequence[Callable[[Tensor], Tensor]]:
    calls: Sequence[Callable[[Tensor], Tensor]] = getattr(part, "calls", [part])
    return calls


def _weights_of(piece: Piece) -> list[Tensor]:
    branch = piece.branch
    if isinstance(branch, nn.Module):
        return list(branch.parameters())
    found: dict[int, Tensor] = {}
    for part in _modules_in(branch):
        found |= {id(weight): weight for weight in part.parameters()}
    return list(found.values())


def _modules_in(branch: object) -> Iterator[nn.Module]:
    """The modules that a branch calls, through bound methods and chains."""
    for value in vars(branch).values() if hasattr(branch, "__dict__") else ():
        owner = getattr(value, "__self__", value)
        if isinstance(owner, nn.Module):
            yield owner
        elif hasattr(owner, "calls"):
            yield from (call for call in owner.calls if isinstance(call, nn.Module))


# The whole backbone ----------------------------------------------------------------------------------------------


def measure_costs(
    backbone: Backbone,
    objective: Objective,
    optimizer: OptimizerFactory,
    settings: CostSettings,
    *,
    loss: Loss | None = None,
) -> Costs:
    """Measure each distinct part of a backbone once; nothing real is allocated, and the backbone isn't touched.

    Args:
        backbone: split, or outlined.
        objective: what every module but the last is trained on.
        optimizer: makes a module's optimizer.
        settings: batch size, precision, accumulation, device.
        loss: of the task; by default what the model is made for.
    """
    # The collector would look at every fake tensor again and again: a sixth of the time.
    with without_collector(), by_shapes_alone():
        fake_mode, (fake, fake_pieces, loss) = fake_copy((backbone, find_cuts(backbone), loss))
        fake.train()
        with single_images_refused(settings.batch_size, settings.accumulation), fake_mode:
            shop = Workshop(ByShapes(fake_mode, settings), settings)
            return measure_all(shop, fake, fake_pieces, (objective, optimizer), loss=loss)


def find_cuts(backbone: Backbone) -> list[Cuts]:
    """The pieces of every block."""
    cuts = []
    for index, block in enumerate(backbone.blocks):
        example = backbone.example(index)
        found = {level: find_pieces(block, example, halves=level == "halves") for level in ("blocks", "halves")}
        cuts.append({"whole": [whole_block(block, example)], **found})
    return cuts


def measure_all(
    shop: Workshop,
    backbone: Backbone,
    pieces: list[Cuts],
    training: tuple[Objective, OptimizerFactory],
    *,
    loss: Loss | None = None,
) -> Costs:
    """Measure the parts of a backbone that is as the shop's gauge needs it; else as ``measure_costs``."""
    settings, (_, optimizer) = shop.settings, training
    loss = loss_of(loss, backbone)
    size = settings.part_size
    dtype = next(backbone.parameters()).dtype
    end = ModelEnd.of(backbone, loss, chunked=settings.chunk_logits)
    units = [backbone.stem, *backbone.blocks, end.tail]
    along = _Along.of(shop, backbone, size)
    parts: list[list[PartCost]] = [[] for _ in WAYS]
    leading: list[list[PartCost]] = [[] for _ in WAYS]
    static, states, temporary, update_ns, likes = [], [], [], [], []
    like: Like = backbone.like(size)
    owners = {id(tensor): number for number, unit in enumerate(units) for tensor in own_tensors(unit)}
    has_copies = settings.shared == "average"
    for number, unit in enumerate(units):
        likes.append(like)
        told = signature(unit)
        mark = told or id(unit), like
        owned = [tensor for tensor in own_tensors(unit) if has_copies or owners[id(tensor)] == number]
        weights = [tensor for tensor in owned if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
        read = [weight for weight in unit.parameters() if not has_copies and owners[id(weight)] != number]
        is_block = 0 < number <= len(backbone.blocks)
        stem = number == 0  # the images are there before it, and need no gradient
        measure = partial(shop.measure, unit, like, weights, present=stem, needs_gradient=not stem)
        with only_read(read):
            plain: Measured = shop.once((mark, "plain"), measure)
            if stem and along is not None:
                plain = plain._replace(cost=along.apart_from(plain.cost))
            if told is None:  # what costs the same when it runs plainly, of the same modules, does in any way
                mark = _kinds_in(unit), like, plain  # type: ignore[assignment]
            for way, how in enumerate(WAYS):
                cost = plain.cost
                if way and is_block:
                    cuts = pieces[number - 1]
                    if len(cuts["halves"]) == 1:  # no halves: what is written so runs as the whole block
                        how = Checkpointing("blocks", how.chunks)  # noqa: PLW2901
                    cost = shop.once((mark, str(how)), partial(shop.way, unit, cuts, like, how))
                parts[way].append(cost)
                kept = shop.nbytes_of(like) if plain.keeps_input or (way and is_block) else 0
                leading[way].append(cost if stem else _leading(cost, shop.nbytes_of(like), kept))
        update = shop.update(weights, optimizer)
        static.append(shop.nbytes(*owned) + update.state)
        states.append(update.state)
        temporary.append(update.temporary)
        update_ns.append(update.nanoseconds)
        like = plain.shape, plain.dtype
    heads, head_of, uses, last_uses = _measure_heads(shop, backbone, training, [*likes, like], end=end, loss=loss)
    inputs = [shop.nbytes_of(((settings.batch_size, *shape[1:]), dtype)) for shape, dtype in likes[1:]]
    trained = [weight for unit in units for weight in unit.parameters() if weight.requires_grad]
    labels = loss.label_shape(settings.batch_size, backbone), loss.label_dtype
    return Costs(
        settings=settings,
        parts=parts,
        leading=leading,
        heads=heads,
        head_of=head_of,
        static=static,
        state=states,
        temporary=temporary,
        update_ns=update_ns,
        temporary_adds=shop.temporaries_add(trained, optimizer),
        inputs=inputs,
        images=shop.nbytes_of(backbone.like(settings.batch_size)),
        uses=sorted(uses),
        last_uses=sorted(last_uses),
        carried=sum(
            rounded(nbytes, shop.rounding)
            for what in Route([frozenset(uses)]).into(0)
            if what.make is None and what.name != "images"
            for nbytes in what.nbytes(site_of(backbone, [], 0), settings.batch_size, dtype)
        ),
        labels=shop.nbytes_of(labels),
        along=0 if along is None else along.of_batch,
        images_stay=along is not None and along.images_stay,
    )


def own_tensors(unit: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a part, each once."""
    return list({id(tensor): tensor for tensor in (*unit.parameters(), *unit.buffers())}.values())


def _kinds_in(unit: nn.Module) -> tuple[object, ...]:
    """The classes that make up a part, and the shapes of their weights."""
    return tuple((type(net), tuple(w.shape for w in net.parameters(recurse=False))) for net in unit.modules())


@dataclass(frozen=True)
class _Along:
    """What goes along with a batch through a backbone that was split by watching it: its context.

    Attributes:
        of_part: bytes that the stem makes for a part of the batch.
        of_batch: bytes of all parts', and of what the model is called with beside its main input.
        images_stay: whether the main input is there for as long.
    """

    of_part: int
    of_batch: int
    images_stay: bool

    @classmethod
    def of(cls, shop: Workshop, backbone: Backbone, size: int) -> _Along | None:
        """Have a made-up part of a batch under way in a backbone, and tell what goes along with it."""
        trunk, settings = backbone.trunk, shop.settings
        if trunk is None:
            return None
        with shop.gauge.running(), torch.no_grad():
            given = backbone.given.rows(size).to(next(backbone.parameters()).device)
            trunk.batch.given = given
            backbone.stem(given.tensor.clone())
        made = trunk.batch.current
        assert made is not None, "the stem has run"
        main, others = _storages([given.tensor]), _storages([leaf for _, leaf in given.leaves()])
        of_stem = {key: tensor for key, tensor in _storages(made.tensors).items() if key not in others}
        nbytes = {key: rounded(tensor.untyped_storage().nbytes(), shop.rounding) for key, tensor in of_stem.items()}
        parts = settings.batch_size / size
        # What isn't split by items is made for each part anew.
        of_parts = sum(
            round(own * (parts if made.is_split(of_stem[key]) else settings.accumulation))
            for key, own in nbytes.items()
        )
        beside = [tensor for key, tensor in others.items() if key not in main]
        of_inputs = sum(shop.nbytes_of(((round(len(t) * parts), *t.shape[1:]), t.dtype)) for t in beside if t.ndim)
        return cls(
            of_part=sum(nbytes.values()),
            of_batch=of_parts + of_inputs,
            images_stay=trunk.reads_inputs or not backbone.given.is_single,
        )

    def apart_from(self, stem: PartCost) -> PartCost:
        """The cost of a stem without what it makes for all modules."""
        return stem._replace(
            kept=stem.kept - self.of_part,
            kept_in_autocast=stem.kept_in_autocast - self.of_part,
            forward=stem.forward - self.of_part,
            backward=stem.backward - self.of_part,
        )


def _storages(values: Iterable[object]) -> dict[int, Tensor]:
    """Tensors by the memory that they stand in, one for each."""
    found: dict[int, Tensor] = {}
    for value in values:
        if isinstance(value, Tensor):
            found.setdefault(value.untyped_storage()._cdata, value)
    return found


def _measure_heads(
    shop: Workshop,
    backbone: Backbone,
    training: tuple[Objective, OptimizerFactory],
    likes: Sequence[Like],
    *,
    end: ModelEnd,
    loss: Loss,
) -> tuple[list[Head], list[list[int]], set[str], set[str]]:
    """Measure the objectives of all modules that partitions can have: one for each pair of layouts.

    ``likes`` are of what enters each part, and of what the last one gives.
    """
    objective, optimizer = training
    num_blocks, overlap, layouts = len(backbone.blocks), shop.settings.overlap, backbone.layouts
    numbers: dict[Any, int] = {}
    heads: list[Head] = []
    head_of: list[list[int]] = []
    uses: set[str] = set()
    last_uses: set[str] = set()
    for start in range(num_blocks):
        row = []
        for stop in range(start + 1, num_blocks + 1):
            last, begin = stop == num_blocks, max(0, start - overlap)
            key: tuple[Any, ...] = ("last", start == 0) if last else (start == 0, layouts[begin], layouts[stop])
            if objective.looks_inside:
                key = start, stop
            if key not in numbers:
                # How many modules there are besides isn't known: one before and one behind stand for all.
                edges = [start] * (start > 0) + [stop] * (not last)
                site = site_of(backbone, edges, min(start, 1), overlap=overlap, loss=loss, head=end.head)
                with shop.gauge.building():
                    built = build_local_objective(objective, site, backbone.dtype)
                built.train()
                if start:
                    (last_uses if last else uses).update(built.uses)
                outputs = likes[stop + 1 + last]
                numbers[key] = len(heads)
                is_image = start == 0 and backbone.targets_input
                around = likes[0], likes[0 if is_image else begin + 1], outputs
                states = likes[begin + 1 : stop + 1 + last]  # with the tail's
                labels = loss.label_shape(outputs[0][0], backbone), loss.label_dtype
                found = _measure_head(shop, built, optimizer, site, likes=around, states_like=states, labels=labels)
                heads.append(found)
            row.append(numbers[key])
        head_of.append(row)
    return heads, head_of, uses, last_uses


def _measure_head(
    shop: Workshop,
    objective: LocalObjective,
    optimizer: OptimizerFactory,
    site: Site,
    *,
    likes: tuple[Like, Like, Like],
    states_like: Sequence[Like],
    labels: Like,
) -> Head:
    """Measure an objective, given what images, its module's inputs, outputs and what enters its blocks are like."""
    images_like, inputs_like, outputs_like = likes
    with shop.mode:
        inputs = torch.empty(inputs_like[0], dtype=inputs_like[1])
        batch = empty_batch(site, Route([objective.uses]).into(0), images_like[0][0], inputs_like[1])
        batch.labels, batch.loss = torch.zeros(labels[0], dtype=labels[1]), site.loss
        states = [shop.gauge.source(*like) for like in states_like] if "states" in objective.uses else []
        if "branches" in objective.uses:  # two a block, mostly; the step that confirms a plan has just those there are
            batch.branches = tuple(shop.gauge.source(*like) for like in states_like for _ in range(2))
    of_end = [] if site.head is None or not site.is_last else list(site.head.parameters())  # chunks are multiplied here
    terms = [weight for weight in (*objective.terms.parameters(), *of_end) if weight.requires_grad]
    logits = 0

    def run(outputs: Tensor) -> Tensor:
        nonlocal logits
        value: ObjectiveValue = objective(inputs, outputs, batch, states)
        # Of the last module they are its outputs.
        logits = 0 if value.logits is None or site.is_last else shop.nbytes(value.logits)
        return value.loss

    cost = shop.measure(run, outputs_like, terms, present=True).cost
    if objective.context is not None and site.context:
        cost = _with_time(cost, _measure_context(shop, objective.context, site, inputs_like))
    update = shop.update([weight for weight in objective.parameters() if weight.requires_grad], optimizer)
    passes = 3 if objective.reconcile else 1
    static = shop.static_bytes(objective) + update.state
    return Head(cost, static, update.temporary, passes, update.nanoseconds, logits)


def _measure_context(shop: Workshop, context: ContextSupply, site: Site, inputs_like: Like) -> PartCost:
    """Measure how context of earlier modules is added to what a module receives."""
    (size, *_), dtype = inputs_like
    with shop.mode:
        pooled = cast(tuple[Tensor, ...], CARRIED["context"].empty(site, size, dtype))
    weights = list(context.parameters())
    measured = shop.measure(lambda inputs: context(inputs, pooled), inputs_like, weights, present=True)
    return measured.cost


def _with_time(cost: PartCost, other: PartCost) -> PartCost:
    """A cost that takes another one's time as well; its bytes are seen by the step that confirms a plan."""
    return cost._replace(
        forward_ns=cost.forward_ns + other.forward_ns, backward_ns=cost.backward_ns + other.backward_ns
    )
