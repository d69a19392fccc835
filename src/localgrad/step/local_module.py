"""A local module: a run of blocks with its own objective, whose features leave without their graph.

``LocalModule.forward`` is the only place in the package where features are detached. Blocks, auxiliary nets and
loss stand in one ``forward``, so that wrapping, compiling or distributing a local module sees all its parameters used
exactly once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from localgrad.backbones.base import Backbone, FrozenStem, Layout, Stem, memory_of
from localgrad.backbones.effects import Observed, plain_norms, still_statistics
from localgrad.backbones.ends import Headless, last_linear
from localgrad.backbones.halves import AsCut, Piece, find_pieces, observed, whole_block
from localgrad.backbones.hooks import has_hooks
from localgrad.backbones.timm_models import undecayed
from localgrad.backbones.watching import UnderWay
from localgrad.errors import BackboneError, RecipeError, arg
from localgrad.objectives.base import LocalObjective, ObjectiveValue
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.losses import CROSS_ENTROPY, Loss, TokenLoss
from localgrad.objectives.methods import Objective
from localgrad.objectives.site import Site
from localgrad.partition import Checkpointing, Plan
from localgrad.step.checkpointing import Part, Recomputed, run_pieces


class LocalOutput(NamedTuple):
    """What a local module gives for one batch.

    Attributes:
        features: what it hands on, detached, for the next module (the model's logits for the last one).
        loss: its local objective, a scalar with the graph of this module only.
        terms: each term's own unweighted loss, detached.
        logits: class logits [B, num_classes], detached; ``None`` where the objective has no classifier.
        gradient: of the loss by what is handed on, once the backward pass is done; where it is asked for.
    """

    features: Tensor
    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None
    gradient: Tensor | None = None


class Passed(NamedTuple):
    """A pass through a module's parts, with its graph.

    Attributes:
        outputs: what the last part gives.
        handed_on: what the next module receives: the same, or with overlap what entered the blocks that overlap.
        states: what entered each block, and the tail; empty unless asked for.
    """

    outputs: Tensor
    handed_on: Tensor
    states: list[Tensor]


class LocalModule(nn.Module):
    """A run of blocks with its own objective.

    With overlap, the parts of a module start with the last blocks of the module before, which hands on what enters
    those: so a module's loss trains them too, and they run in both.

    Args:
        parts: the stem (first module only), the blocks, the tail (last module only), in order.
        objective: what the module is trained on; owns the auxiliary nets.
        recomputed: by number of a part, what stands in for it in training: the same function, which keeps less and
            recomputes it in the backward pass.
        layout: of what it hands on; for the last module, anything.
        shared: parts at the start that belong to the module before.
        given: parts at the end that the next module runs as well.
        pieces: by number of a part, its pieces, where the objective looks at residual branches.
        reads: weights that it reads, and that another module trains.
        copies: weights of which it trains a copy, as other modules do (see ``step/copies.py``).
        under_way: what the parts share about the batch under way, of a model that was split by watching it.
        gives_logits: false for a last module whose objective makes the logits, and not its parts.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        objective: LocalObjective,
        recomputed: Mapping[int, Recomputed] | None = None,
        *,
        layout: Layout | None = None,
        shared: int = 0,
        given: int = 0,
        pieces: Mapping[int, Sequence[Piece]] | None = None,
        reads: Sequence[nn.Parameter] = (),
        copies: Sequence[nn.Parameter] = (),
        under_way: UnderWay | None = None,
        gives_logits: bool = True,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.objective = objective
        self.recomputed = dict(recomputed or {})
        self.layout = layout
        self.shared = shared
        self.given = given
        self.pieces = dict(pieces or {})
        self._passed_by = [by for number, found in self.pieces.items() for by in _passed_by(self.parts[number], found)]
        self.under_way = under_way
        self.gives_logits = gives_logits
        self._counted_before = plain_norms(self.parts[:shared])  # by the module before, in its own step
        self.reads: list[nn.Parameter]
        self.copies: list[nn.Parameter]
        vars(self).update(reads=list(reads), copies=list(copies))  # past the registry: they are in its parts
        self.keeps_gradient = False
        self.has_unread = False  # whether it has trainable parameters that no loss of its reads; known where it matters
        self.gradient: Tensor | None = None

    def run_parts(self, inputs: Tensor, *, with_states: bool = False, branches: list[Tensor] | None = None) -> Passed:
        """Run the parts in order: image or features in, features (or logits), asked-for states and branches out."""
        states = []
        handed_on = None
        for number, part in enumerate(self.parts):
            if number == len(self.parts) - self.given:
                handed_on = inputs
            if with_states and not isinstance(part, Stem):
                states.append(inputs)
            recomputed = self.recomputed.get(number) if self.training else None
            with still_statistics(self._counted_before if number < self.shared else ()):
                if branches is not None and number in self.pieces:
                    chunks = None if recomputed is None else recomputed.chunks
                    inputs = run_pieces(self.pieces[number], inputs, chunks, branches)
                else:
                    run: Part = recomputed or part
                    inputs = run(inputs)
        return Passed(inputs, inputs if handed_on is None else handed_on, states)

    def check_branches(self) -> None:
        """Refuse blocks of which running branch after branch would skip something. No operator runs.

        Raises:
            RecipeError: hooks were set on a block, or it has another forward than when it was cut.
        """
        for module, cut in self._passed_by:
            if has_hooks(module) or not (cut is None or cut.holds()):
                raise RecipeError(
                    f"transport_per: {type(module).__name__} has hooks, or another forward than when the learner was "
                    "made, which a penalty per branch would skip; set hooks on its parts (attention, MLP), or take "
                    "transport_per = 'block'."
                )

    def features(self, inputs: Tensor) -> Tensor:
        """What the last part gives."""
        return self.run_parts(inputs).outputs

    def own(self, inputs: Tensor, recomputed: Mapping[int, Recomputed]) -> Tensor:
        """Run the module's own parts only, recomputing as a caller says: a step of end-to-end training."""
        for number, part in enumerate(self.parts):
            if number >= self.shared:
                run: Part = recomputed.get(number, part)
                inputs = run(inputs)
        return inputs

    def forward(self, inputs: Tensor, batch: LocalBatch, received: Tensor | None = None) -> LocalOutput:
        """Compute detached features, the loss with its graph, and detached figures.

        Args:
            inputs: what the module before handed on; the images [B, C, H, W] for the first one.
            batch: images and labels.
            received: what the objective compares with in place of ``inputs``, where those were moved.
        """
        self.begin_batch(batch)
        entered = self.objective.enter(inputs, batch)
        branches: list[Tensor] = []
        outputs, handed_on, states = self.run_parts(
            entered,
            with_states="states" in self.objective.uses or not self._targets_input(inputs),
            branches=branches if "branches" in self.objective.uses else None,
        )
        self.note_context(batch)
        if self.keeps_gradient and outputs.requires_grad:
            outputs.register_hook(self._keep)  # type: ignore[no-untyped-call]
        target = inputs if received is None else received
        if not self._targets_input(target):  # as ``Backbone.targets_input``: what enters the first block
            target = states[0].detach()
        batch.branches = tuple(branches)
        value: ObjectiveValue = self.objective(target, outputs, batch, states)
        batch.branches = ()
        return LocalOutput(
            features=handed_on.detach(),
            loss=value.loss,
            terms={name: term.detach() for name, term in value.terms.items()},
            logits=None if value.logits is None else value.logits.detach(),
        )

    def _targets_input(self, inputs: Tensor) -> bool:
        return inputs.is_floating_point() and inputs.ndim in (3, 4) and not isinstance(self.parts[0], FrozenStem)

    def begin_batch(self, batch: LocalBatch) -> None:
        """Have the parts run with what goes along with a batch's features.

        Raises:
            RecipeError: these are no model's first parts, and what its blocks need of this batch isn't there.
        """
        if self.under_way is not None:
            is_first = isinstance(self.parts[0], Stem)
            if not is_first and batch.model_context is None and self.under_way.differs_by_batch:
                raise RecipeError(
                    "batch: it has features but no context (masks, positions), which the model's stem makes of its "
                    "inputs; train all modules on a batch, from its inputs on."
                )
            self.under_way.given, self.under_way.current = batch.given, batch.model_context

    def note_context(self, batch: LocalBatch) -> None:
        """Have a batch carry on what the stem has just made of it."""
        if self.under_way is not None and batch.model_context is None and self.under_way.current is not None:
            batch.model_context = self.under_way.current.detach()

    def end_batch(self) -> None:
        """Let go of a batch's context, which may hold the stem's graph."""
        if self.under_way is not None:
            self.under_way.current = None

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient


class ModelEnd(NamedTuple):
    """What a model does behind its last block, as its last local module runs it.

    Attributes:
        tail: features to logits, or to what the head takes.
        head: makes logits of that, chunk by chunk; ``None`` where the tail gives logits.
    """

    tail: nn.Module
    head: nn.Linear | None = None

    @classmethod
    def of(cls, backbone: Backbone, loss: Loss, *, chunked: bool) -> ModelEnd:
        """A backbone's end, as it is or cut before its last layer.

        Args:
            backbone: split, or outlined.
            loss: of the task.
            chunked: whether logits are never to be whole in memory.

        Raises:
            RecipeError: logits can't be made chunk by chunk.
        """
        if not chunked:
            return cls(backbone.tail)
        if not (isinstance(loss, TokenLoss) and loss.names_tokens):
            raise RecipeError(
                f"{arg('chunk_logits')}: it is of logits of tokens and losses that sum over them (next-token, "
                "per-token); leave it out."
            )
        like = next(backbone.parameters())
        features = torch.zeros(2, *backbone.layouts[-1].shape, dtype=like.dtype, device=like.device)
        linear = last_linear(backbone.tail, features, backbone.num_classes)
        if linear is None or has_hooks(linear):
            why = "does something behind its last linear layer" if linear is None else "has hooks on its last layer"
            raise RecipeError(f"{arg('chunk_logits')}: {type(backbone.model).__name__} {why}; leave it out.")
        return cls(Headless(backbone.tail, linear), linear)


def site_of(
    backbone: Backbone,
    boundaries: Sequence[int],
    index: int,
    *,
    overlap: int = 0,
    loss: Loss = CROSS_ENTROPY,
    head: nn.Linear | None = None,
) -> Site:
    """Where in a split model a local module stands, which trains ``overlap`` blocks of the module before as well."""
    num_blocks = len(backbone.blocks)
    edges = [0, *boundaries, num_blocks]
    layouts = backbone.layouts
    image = image_of(backbone.input_size)
    starts = [edge - shared_blocks(edges, number, overlap) for number, edge in enumerate(edges[:-1])]
    start, stop = starts[index], edges[index + 1]
    received = [image if backbone.targets_input else layouts[0], *(layouts[number] for number in starts[1:])]
    return Site(
        index=index,
        num_modules=len(edges) - 1,
        inputs=received[index],
        outputs=layouts[stop],
        image=image,
        num_classes=backbone.num_classes,
        states=tuple(layouts[start:stop]),
        previous=received[max(0, index - 1)],
        context=tuple(received[1 : index + 1]),
        following=tuple((backbone.blocks[number], layouts[number + 1]) for number in range(stop, num_blocks)),
        tail=backbone.tail,
        undecayed=undecayed(backbone.model),
        loss=loss,
        head=head,
    )


def image_of(input_size: tuple[int, ...]) -> Layout:
    """The layout of a model's main input: images, or a sequence of numbers or vectors."""
    if len(input_size) == 3:
        return Layout(kind="NCHW", width=input_size[0], grid=(input_size[1], input_size[2]))
    return Layout(kind="sequence", width=input_size[1] if len(input_size) > 1 else 1, grid=(1, input_size[0]))


def build_local_objective(objective: Objective, site: Site, dtype: torch.dtype) -> LocalObjective:
    """Make the objective of a site, its auxiliary nets in the type of the model's weights."""
    built = objective.build(site)
    for weight in built.parameters():  # buffers are factors of losses, which are in float32
        if weight.dtype == torch.get_default_dtype() != dtype:
            weight.data = weight.data.to(dtype)
    return built


def shared_blocks(edges: Sequence[int], index: int, overlap: int) -> int:
    """Blocks of the module before that a module trains as well: at most all that this one has of its own.

    ``edges`` are the first block of every module, and the number of blocks. There are none for the first module, and
    none beyond the last.
    """
    return min(overlap, edges[index] - edges[index - 1]) if 0 < index < len(edges) - 1 else 0


def build_local_modules(
    backbone: Backbone,
    plan: Plan,
    objective: Objective,
    *,
    overlap: int = 0,
    shared: str = "refuse",
    loss: Loss = CROSS_ENTROPY,
    chunk_logits: bool = False,
    drawing: Callable[[int], AbstractContextManager[None]] = lambda _index: nullcontext(),
) -> list[LocalModule]:
    """Make the local modules of a plan from a backbone's parts; auxiliary nets join the backbone's device.

    Args:
        backbone: a split model; its parts are shared, not copied.
        plan: boundaries, and which modules checkpoint inside.
        objective: what every module but the last is trained on.
        overlap: blocks of the module before that each module trains as well.
        shared: what becomes of a parameter that several modules read, see ``LocalLearner``.
        loss: of every module's task.
        chunk_logits: whether logits of the model's own end are made chunk by chunk.
        drawing: given a module's number, the region in which its auxiliary nets are made; decides what they draw.

    Raises:
        BackboneError: a parameter is shared across a boundary, or the objective looks at residual branches and a block
            can't be cut into them.
        RecipeError: an auxiliary net holds a weight that another module trains.
    """
    weights = shared_weights(backbone, plan.boundaries, shared)
    end = ModelEnd.of(backbone, loss, chunked=chunk_logits)
    device = next(backbone.parameters()).device
    edges = [0, *plan.boundaries, len(backbone.blocks)]
    modules = []
    for index, span in enumerate(plan.spans):
        first, last = index == 0, index == plan.num_modules - 1
        site = site_of(backbone, plan.boundaries, index, overlap=overlap, loss=loss, head=end.head)
        stem, tail = [backbone.stem] * first, [end.tail] * last
        begins, given = (shared_blocks(edges, number, overlap) for number in (index, index + 1))
        blocks = [backbone.blocks[number] for number in range(span.start - begins, span.stop)]
        with drawing(index):
            built = build_local_objective(objective, site, backbone.dtype)
        looks = "branches" in built.uses
        modules.append(
            LocalModule(
                [*stem, *blocks, *tail],
                built.to(device),
                recomputed_in(backbone, plan, index, overlap=overlap),
                layout=None if last else backbone.layouts[span.stop - given],
                shared=begins,
                given=given,
                pieces=_branched(backbone, range(span.start - begins, span.stop), len(stem)) if looks else None,
                reads=weights[index].reads,
                copies=weights[index].copies,
                under_way=None if backbone.trunk is None else backbone.trunk.batch,
                gives_logits=not last or end.head is None,
            )
        )
    _check_auxiliary(backbone, modules)
    return modules


def _check_auxiliary(backbone: Backbone, modules: Sequence[LocalModule]) -> None:
    """Refuse auxiliary nets that hold a weight of another module's: each would train it, none would know.

    Raises:
        RecipeError: naming it.
    """
    of_model = {memory_of(weight): name for name, weight in backbone.model.named_parameters() if weight.requires_grad}
    holders: dict[object, int] = {}
    for index, module in enumerate(modules):
        own = {memory_of(weight) for weight in module.parts.parameters()}
        for name, weight in module.objective.named_parameters():
            where = memory_of(weight)
            if where in of_model and where not in own:
                whose = f"the model's {of_model[where]}"
            elif holders.setdefault(where, index) != index and weight.requires_grad:
                whose = f"local module {holders[where]}'s as well"
            else:
                continue
            raise RecipeError(
                f"{arg('objective')}: {name} of local module {index} is {whose}: two optimizers would train it; give "
                "each module a net of its own (copy.deepcopy), or read it where it is, detached (no attribute)."
            )


SHARED = ("refuse", "last", "average")


class SharedWeights(NamedTuple):
    """Weights of a local module that others have as well: those that it only reads, and those it trains a copy of."""

    reads: list[nn.Parameter]
    copies: list[nn.Parameter]


def shared_weights(backbone: Backbone, boundaries: Sequence[int], shared: str) -> list[SharedWeights]:
    """Of each local module, the weights that it shares with others, and what becomes of them.

    Raises:
        BackboneError: something is shared across a boundary, and may not be.
    """
    found = [SharedWeights([], []) for _ in range(len(boundaries) + 1)]
    if shared == "refuse":
        backbone.check_boundaries(boundaries)
        return found
    for each in backbone.shared_across(boundaries):
        if not isinstance(each.tensor, nn.Parameter):
            backbone.check_boundaries(boundaries)
            continue
        aliases = [each.tensor, *(weight for weight in backbone.parameters() if _is_alias(weight, each.tensor))]
        for module in each.modules[:-1] if shared == "last" else ():
            found[module].reads.extend(aliases)
        for module in each.modules if shared == "average" and each.tensor.requires_grad else ():
            found[module].copies.append(each.tensor)
    return found


def _is_alias(weight: Tensor, other: Tensor) -> bool:
    """Whether two parameters were made of one tensor."""
    return weight is not other and memory_of(weight) == memory_of(other)


def _branched(backbone: Backbone, blocks: range, before: int) -> dict[int, list[Piece]]:
    """The pieces of blocks, by number of the part; ``before`` parts stand before the first of them.

    Raises:
        BackboneError: a block that is no change of shape can't be cut into residual branches.
    """
    found = {}
    for number, block in enumerate(blocks, before):
        found[number] = find_pieces(backbone.blocks[block], backbone.example(block), halves=True)
        is_residual = any(piece.drop_path is not None for piece in found[number])
        if not is_residual and backbone.layouts[block] == backbone.layouts[block + 1]:
            raise BackboneError(
                f"transport_per: {backbone.block_names[block]} can't be cut into its residual branches; take "
                "transport_per = 'block'."
            )
    return found


def _passed_by(block: nn.Module, pieces: Sequence[Piece]) -> list[tuple[nn.Module, AsCut | None]]:
    """The modules of a block that aren't called where its pieces are, each with what it was when it was cut."""
    cuts = {id(piece.cut.module): piece.cut for piece in pieces if piece.cut is not None}
    return [
        (module, cuts.get(id(module)))
        for module in block.modules()
        if any(id(inner) in cuts for inner in module.modules())
    ]


def recomputed_in(backbone: Backbone, plan: Plan, index: int, *, overlap: int = 0) -> dict[int, Recomputed]:
    """What stands in for the parts of a plan's local module in training, by number of the part."""
    how, span = plan.checkpointing(index), plan.spans[index]
    if how.level == "none":
        return {}
    before = 1 if index == 0 else 0  # the stem
    edges = [0, *plan.boundaries, len(backbone.blocks)]
    blocks = range(span.start - shared_blocks(edges, index, overlap), span.stop)
    return {before + number: recompute(backbone, block, how) for number, block in enumerate(blocks[: how.first])}


def recompute(backbone: Backbone, index: int, how: Checkpointing) -> Recomputed:
    """What stands in for a block in training under a level of checkpointing: ``blocks`` or ``halves``."""
    block = backbone.blocks[index]
    example = backbone.example(index)
    if how.level == "blocks" and how.chunks == 1:
        return Recomputed([whole_block(block, example)], block=block)
    return Recomputed(find_pieces(block, example, halves=how.level == "halves"), how.chunks, block)


def observed_parts(backbone: Backbone) -> Iterator[tuple[str, nn.Module, Observed]]:
    """The stem, each block and the tail: its name, itself, and what its forward pass changes in training mode."""
    yield "the stem", backbone.stem, observed(backbone.stem, backbone.inputs())
    for index, (name, block) in enumerate(zip(backbone.block_names, backbone.blocks, strict=True)):
        yield name, block, observed(block, backbone.example(index))
    yield "the tail", backbone.tail, observed(backbone.tail, backbone.example(len(backbone.blocks)))
