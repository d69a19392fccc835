"""What a batch carries from module to module beside features and labels: one table, which everyone reads.

The executor makes things on the way and lets go of them; the batch cuts them into parts; the wire between processes,
the estimates of memory and the planners read their shapes. A new thing is a line here, or ``register_carried`` from
outside; a term that looks at it names it in ``Term.uses``.

Beside the table stands the *model context* (``LocalBatch.model_context``): what the blocks of a model that was split by
watching are called with beside features. Every module needs it, whatever its objective, and it is no tensor but a tree
of them, which the model alone knows.

Shapes: B batch first, left out in ``Carried.shape`` of what is split with the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from localgrad.backbones.base import Backbone, Layout
from localgrad.backbones.example import LABEL_NAMES, Example
from localgrad.backbones.watching import Context
from localgrad.errors import DataError, RecipeError, arg
from localgrad.objectives.losses import CROSS_ENTROPY, Loss
from localgrad.objectives.site import Site

CONTEXT_GRID = 4
"""Side of the grid that features are pooled to where they are later modules' context."""
INSIDE = frozenset({"states", "branches"})
"""What terms may look at besides: of their own module, so that nothing is carried."""
Value = Tensor | tuple[Tensor, ...]
MODEL_CONTEXT = "model_context"
"""What blocks of a model that was split by watching need beside features, by its name on the wire."""
MASK_NAME = "attention_mask"
"""Keyword of what says of each token [B, N] whether it isn't padding, in Hugging Face's models."""


class Handed(NamedTuple):
    """A module that hands on: what a carried thing may be made of.

    Attributes:
        received: what the module received.
        features: what it hands on, detached.
        layout: of ``features``.
        gradient: of its loss by ``features``; only for what is made after the backward pass, and not of frozen modules.
            In fp16 it is times the loss scale, without which most of it would be 0.
        batch: as it entered the module, with what is carried so far.
    """

    received: Tensor
    features: Tensor
    layout: Layout
    gradient: Tensor | None
    batch: LocalBatch


@dataclass(frozen=True, kw_only=True)
class Carried:
    """One thing that a batch carries.

    It is there only while an objective further on looks at it. It begins with the batch: ``LocalBatch(images, labels,
    mine=...)``, or ``begin``; or modules make it as they hand on: ``make``; or both.

    Attributes:
        name: by which ``Term.uses`` asks for it, and ``batch.<name>`` gives it.
        shape: of one image, at a place in the model, which has ``inputs``, ``previous``, ``context``, ``image`` and
            ``num_classes``; with ``splits=False`` the whole shape. Of what grows: the last one's.
        begin: makes it before the first module, given the batch and the learner.
        make: makes it anew as a module hands on.
        after_backward: ``make`` needs the module's backward pass to be done.
        lasts: modules behind the next one look at the same; otherwise each module makes its own for the next alone.
        grows: each module adds one: it is a tuple.
        splits: a part of a batch takes a part of it: its first side is B.
        travels: whether it may go from one process to another.
        narrows: travels in bfloat16 where the wire does.
        dtype: ``None`` for that of the features.

    Raises:
        RecipeError: the name is taken or no identifier, or it never comes to be.
    """

    name: str
    shape: Callable[[Site], Sequence[int]]
    begin: Callable[[LocalBatch, Any], Tensor] | None = None
    make: Callable[[Handed], Tensor | None] | None = None
    after_backward: bool = False
    lasts: bool = True
    grows: bool = False
    splits: bool = True
    travels: bool = True
    narrows: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.name.isidentifier() or self.name.startswith("_") or self.name in RESERVED:
            raise RecipeError(f"name: {self.name!r} can't be what a batch carries; take another identifier.")
        if self.make is None and (self.grows or self.after_backward or not self.lasts):
            raise RecipeError(f"{self.name}: grows, after_backward and lasts=False need make=, a function of Handed.")

    def shapes(self, site: Site) -> list[tuple[int, ...]]:
        """The shapes at a place in the model: one, or of what grows one for each module before."""
        if not self.grows:
            return [tuple(self.shape(site))]
        return [tuple(self.shape(replace(site, inputs=layout))) for layout in site.context]

    def empty(self, site: Site, num_images: int, dtype: torch.dtype) -> Value:
        """Uninitialised memory for it, on the current device."""
        sides = [(num_images, *shape) if self.splits else shape for shape in self.shapes(site)]
        found = tuple(torch.empty(side, dtype=self.dtype or dtype) for side in sides)
        return found if self.grows else found[0]

    def nbytes(self, site: Site, num_images: int, dtype: torch.dtype) -> list[int]:
        """Bytes of each of its tensors."""
        each = num_images if self.splits else 1
        return [each * torch.Size(shape).numel() * (self.dtype or dtype).itemsize for shape in self.shapes(site)]


def pooled(layout: Layout, features: Tensor) -> Tensor:
    """What later modules get as context: features averaged over a small grid, [B, rows, columns, D]."""
    grid = layout.to_grid(features).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(grid, _context_grid(layout)).permute(0, 2, 3, 1)


def _context_grid(layout: Layout) -> tuple[int, int]:
    rows, columns = (min(side, CONTEXT_GRID) for side in layout.grid)
    return rows, columns


def _taught(batch: LocalBatch, learner: Any) -> Tensor:
    probabilities: Tensor = learner.averaged_logits(batch.given or batch.features).float().softmax(dim=1)
    return probabilities


def mask_of(batch: LocalBatch, learner: Any) -> Tensor:
    """Which tokens of a batch's sequences aren't padding, bool [B, N]: as its attention mask says, or else all."""
    sides = batch.features.shape[:2]
    told = None if batch.given is None else batch.given.argument(learner.model, MASK_NAME)
    if isinstance(told, Tensor):
        if told.shape == sides:
            return told != 0
        warnings.warn(
            f"{MASK_NAME}: of shape {list(told.shape)}, which doesn't tell what is padding among {list(sides)}; "
            f"auxiliary losses count every token. Give one of {list(sides)} for them not to.",
            stacklevel=2,
        )
    return torch.ones(sides, dtype=torch.bool, device=batch.features.device)


def _previous(site: Site) -> Sequence[int]:
    return (site.previous or site.image).shape


RESERVED = frozenset(
    {
        "features",
        "labels",
        "targets",
        "number",
        "share",
        "labels_counted",
        "token_factor",
        "counts_all",
        "carried",
        "averaged",
        "given",
        "loss",
        "to",
        "of",
        "keep",
        "parts",
        "onward",
        "take_context",
        "known_targets",
        MODEL_CONTEXT,
        "model_contexts",
    }
)
CARRIED = {
    each.name: each
    for each in (
        Carried(name="images", shape=lambda site: site.image.shape),
        Carried(
            name="teacher",
            shape=lambda site: (site.num_classes,),
            begin=_taught,
            dtype=torch.float32,
            travels=False,
        ),
        Carried(name="previous", shape=_previous, make=lambda handed: handed.received, lasts=False, narrows=True),
        Carried(
            name="context",
            shape=lambda site: (*_context_grid(site.inputs), site.inputs.width),
            make=lambda handed: pooled(handed.layout, handed.features),
            grows=True,
            narrows=True,
        ),
        Carried(
            name="gradient",
            shape=lambda site: site.inputs.shape,
            make=lambda handed: handed.gradient,
            after_backward=True,
            lasts=False,
        ),
        Carried(name="mask", shape=lambda site: (site.image.grid[1],), begin=mask_of, dtype=torch.bool),
    )
}
"""The table: images (of the batch), teacher (class probabilities [B, num_classes] of the averaged model), previous
(what the module before received), context (pooled features of earlier modules, each [B, rows, columns, D]), gradient
(of the loss of the module before, by what it handed on; in fp16 times the loss scale)
and mask (which tokens of sequences aren't padding)."""


def register_carried(carried: Carried) -> Carried:
    """Let batches carry something of your own, in this process: every process of a parallel run has to register it.

    Args:
        carried: the same name may be given again, and the last one counts; names of the table above may not.

    Raises:
        RecipeError: the name is one of localgrad's own.
    """
    if carried.name in _OWN:
        raise RecipeError(f"name: localgrad carries {carried.name} itself; take another name.")
    CARRIED[carried.name] = carried
    return carried


_OWN = frozenset(CARRIED) | INSIDE


@final
class Route:
    """What a batch carries where, by what each module's objective looks at.

    Args:
        uses: ``LocalObjective.uses`` of every module of the model, in order.

    Raises:
        RecipeError: something is looked at that nobody carries.
    """

    def __init__(self, uses: Iterable[frozenset[str]]) -> None:
        self.uses = tuple(uses)
        unknown = sorted(frozenset().union(*self.uses) - CARRIED.keys() - INSIDE)
        if unknown:
            raise RecipeError(
                f"uses: a term looks at {', '.join(unknown)}, which no batch carries; take one of "
                f"{', '.join([*CARRIED, *sorted(INSIDE)])}, or register_carried(Carried(name={unknown[0]!r}, ...))."
            )
        self._into = [self._looked_at(index) for index in range(len(self.uses) + 1)]

    def _looked_at(self, index: int) -> list[Carried]:
        def is_wanted(carried: Carried) -> bool:
            users = self.uses[index:] if carried.lasts else self.uses[index : index + 1]
            return any(carried.name in used for used in users)

        return [carried for carried in CARRIED.values() if is_wanted(carried)]

    def into(self, index: int) -> list[Carried]:
        """What a batch carries into a module: all that it, or one behind it, looks at."""
        return self._into[index]

    def is_late(self, index: int) -> bool:
        """Whether something that goes into a module is there only after the backward pass of the one before."""
        return any(carried.after_backward for carried in self._into[index])

    def begin(self, batch: LocalBatch, learner: Any) -> None:
        """Have all that begins with the batch in it.

        Raises:
            RecipeError: something isn't there, and nobody makes it.
        """
        for carried in self._into[0]:
            if carried.begin is not None and carried.name not in batch.carried:
                batch.carried[carried.name] = carried.begin(batch, learner)
            elif carried.make is None and carried.name not in batch.carried:
                raise RecipeError(
                    f"{carried.name}: an objective looks at it, and the batch has none; give "
                    f"LocalBatch(images, labels, {carried.name}=...) to step_on."
                )

    def pretend(self, batch: LocalBatch, site: Site, dtype: torch.dtype) -> None:
        """As ``begin`` at the first site, with zeros in place of what nobody has given: for made-up batches."""
        for carried in self._into[0]:
            if carried.name not in batch.carried and (carried.begin is not None or carried.make is None):
                value = carried.empty(site, len(batch.labels), dtype)
                if isinstance(value, Tensor):
                    value.fill_(value.dtype == torch.bool)  # no token is padding: of none there is no mean
                batch.carried[carried.name] = value

    def onward(self, index: int, handed: Handed) -> dict[str, Value]:
        """What is carried on by the module of that index, which hands on."""
        found: dict[str, Value] = {}
        for carried in self._into[index + 1]:
            value = handed.batch.carried.get(carried.name)
            if carried.make is not None:
                made = carried.make(handed)
                value = made if not carried.grows or made is None else (*(value or ()), made)
            if value is not None:
                found[carried.name] = value
        return found


def _is_tree(inputs: Any) -> bool:
    """Whether it is a dict or a tuple of tensors, or an example."""
    return isinstance(inputs, (Mapping, Example)) or (
        isinstance(inputs, (tuple, list)) and any(isinstance(x, Tensor) for x in inputs)
    )


@final
class LocalBatch:
    """One batch on its way through the modules: what enters the next one, the labels, and what else is carried.

    What is carried (see ``objectives/carried.py``) is an attribute by its name: ``batch.images``, ``batch.previous``.
    It is there only while an objective looks at it, and ``None`` (an empty tuple, of what grows) otherwise.

    Args:
        images: [B, C, H, W], normalised.
        labels: class indices [B], or soft targets [B, num_classes] (mixup, cutmix); -100 for an image that no loss
            of the labels counts.
        features: what the next module receives; by default the images.
        targets: class indices [B], to count accuracy with, where labels may be mixed; by default the labels, if those
            are indices.
        number: of the batch in the training, from 0; what modules draw at random in its step depends on it.
        share: of one part of a batch, the share of the batch's items that it has.
        labels_counted: of one part, how much the labels of the whole batch count, a scalar: by that the sum of its
            losses is divided. ``None`` where all labels count alike.
        token_factor: of one part, what makes a mean over those of its tokens that aren't padding, times its share of
            the items, its share of the mean over all such tokens; a scalar.
        counts_all: whether no label is ignored, for certain: the data path has seen to it.
        given: all that the model is called with, where that is more than the images; [B, ...] each.
        carried: what else, by name.

    Attributes:
        branches: what each residual branch of the module's blocks gave, with its graph.
    """

    def __init__(
        self,
        images: Tensor | None,
        labels: Tensor,
        *,
        features: Tensor | None = None,
        targets: Tensor | None = None,
        number: int = 0,
        share: float | None = None,
        labels_counted: Tensor | None = None,
        token_factor: Tensor | None = None,
        counts_all: bool = False,
        given: Example | None = None,
        **carried: Value | None,
    ) -> None:
        unknown = carried.keys() - CARRIED.keys()
        if unknown:
            raise TypeError(f"LocalBatch: nothing is carried as {', '.join(sorted(unknown))}; see register_carried.")
        self.labels = labels
        self._features = images if features is None else features
        self._targets = targets
        self.number = number
        self.share = share
        self.labels_counted = labels_counted
        self.token_factor = token_factor
        self.counts_all = counts_all
        self.given = given
        self.model_contexts: Sequence[Context] = ()
        """The model context of the whole, or of its parts."""
        self.loss: Loss = CROSS_ENTROPY
        """Of the task: how many of the labels count."""
        self.branches: tuple[Tensor, ...] = ()
        self.carried: dict[str, Value] = {
            name: value for name, value in {"images": images, **carried}.items() if value is not None
        }
        self._counted: Tensor | None = None  # of all labels; and factors by number of parts: once for all modules
        self._factors: dict[int, tuple[Tensor, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in CARRIED:
            raise AttributeError(f"LocalBatch has no {name}, and nothing is carried by that name")
        return self.carried.get(name, () if CARRIED[name].grows else None)

    @property
    def model_context(self) -> Context | None:
        """What blocks of a model that was split by watching need beside features; the stem makes it.

        Raises:
            RecipeError: it is there in parts that can't be joined.
        """
        if len({tuple(tensor.ndim for tensor in each.tensors) for each in self.model_contexts}) > 1:
            raise RecipeError(
                f"{arg('accumulation')}: the model makes masks for those parts of a batch alone that have padding, so "
                "parts can't be put together to be cut anew; keep the number of parts."
            )
        if len(self.model_contexts) > 1:
            self.model_contexts = [Context.join(self.model_contexts)]
        return self.model_contexts[0] if self.model_contexts else None

    @model_context.setter
    def model_context(self, context: Context | None) -> None:
        self.model_contexts = [] if context is None else [context]

    @property
    def features(self) -> Tensor:
        """What the next module receives; the images, before the first."""
        assert self._features is not None, "a step starts with images"
        return self._features

    @features.setter
    def features(self, features: Tensor) -> None:
        self._features = features

    @property
    def known_targets(self) -> Tensor | None:
        """Class indices [B]; ``None`` where labels are mixed and nobody has given any."""
        return self.labels if self._targets is None and self.labels.ndim == 1 else self._targets

    @property
    def targets(self) -> Tensor:
        """Class indices [B]."""
        assert self.known_targets is not None, "mixed labels come with targets"
        return self.known_targets

    @classmethod
    def of(cls, inputs: Any, labels: Tensor | None = None) -> LocalBatch:
        """From what a model is called with: a tensor, a tuple or a dict; labels may be in the dict.

        Raises:
            DataError: there are no labels.
        """
        if isinstance(inputs, Tensor):
            if labels is None:
                raise DataError("labels: got None; pass class indices int64 [B], -100 for images that have none.")
            return cls(inputs, labels)
        if labels is not None and not _is_tree(inputs):
            return cls(inputs, labels)  # an array, say, which checks refuse by its name
        if labels is None and isinstance(inputs, Mapping):
            labels = next((inputs[name] for name in LABEL_NAMES if name in inputs), None)
        if labels is None:
            raise DataError(
                f"labels: got none; pass step(inputs, labels), or put them in the batch as {LABEL_NAMES[0]!r}."
            )
        given = Example.of(inputs, "inputs")
        return cls(given.tensor, labels, given=given)

    def keep(self, carried: Iterable[Carried]) -> None:
        """Let go of all that is carried but these."""
        names = {each.name for each in carried}
        self.carried = {name: value for name, value in self.carried.items() if name in names}

    def onward(self, features: Tensor, carried: dict[str, Value]) -> LocalBatch:
        """The batch as another module receives it."""
        onward = LocalBatch(None, self.labels, features=features, targets=self._targets, number=self.number)
        onward.carried, onward.loss = carried, self.loss
        onward.model_contexts = self.model_contexts
        return onward

    def to(self, device: torch.device) -> LocalBatch:
        """The batch on another device."""
        known: dict[int, Tensor] = {}  # images are features, too, before the first module

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                known[id(tensor)] = tensor.to(device)
            return known[id(tensor)]

        targets = None if self._targets is None else moved(self._targets)
        there = LocalBatch(None, moved(self.labels), features=moved(self.features), targets=targets, number=self.number)
        there.loss = self.loss
        there.given = None if self.given is None else self.given.map(moved)
        there.model_contexts = [context.map(moved) for context in self.model_contexts]
        there.carried = {
            name: moved(value) if isinstance(value, Tensor) else tuple(map(moved, value))
            for name, value in self.carried.items()
        }
        return there

    def parts(self, count: int) -> list[LocalBatch]:
        """The batch cut into parts, as ``Tensor.chunk`` cuts."""
        labels = self.labels.chunk(count)

        def cut(name: str, value: Value) -> Sequence[Value]:
            if not CARRIED[name].splits:
                return [value] * len(labels)
            return (
                value.chunk(count)
                if isinstance(value, Tensor)
                else list(zip(*(x.chunk(count) for x in value), strict=True))
            )

        features = [None] * len(labels) if self._features is None else self._features.chunk(count)
        carried = {name: cut(name, value) for name, value in self.carried.items()}
        counted, of_tokens = self._labels_counted() if len(labels) > 1 else None, self._token_factors(count)
        contexts = self._contexts_of_parts(count) or [None] * len(labels)
        given = [None] * len(labels) if self.given is None else self.given.chunk(count)
        found = []
        for index, own in enumerate(labels):
            part = LocalBatch(None, own, features=features[index], number=self.number, labels_counted=counted)
            part.share = len(own) / len(self.labels) if len(labels) > 1 else None
            part.given, part.model_context, part.loss = given[index], contexts[index], self.loss
            part.token_factor = of_tokens[index] if of_tokens else None
            part.carried = {name: values[index] for name, values in carried.items()}
            found.append(part)
        return found

    def take_context(self, parts: Sequence[LocalBatch]) -> None:
        """Take what the stem has made for the parts of this batch, if it has just been there."""
        if not self.model_contexts:
            # As they are: some models leave a mask away where a part has no padding, so that parts differ in kind.
            self.model_contexts = [context for part in parts for context in part.model_contexts]

    def _contexts_of_parts(self, count: int) -> Sequence[Context | None]:
        if len(self.model_contexts) > 1 and len(self.model_contexts) == len(self.labels.chunk(count)):
            return self.model_contexts
        whole = self.model_context
        return [] if whole is None else whole.chunk(count)

    def _labels_counted(self) -> Tensor | None:
        """``labels_counted`` of each part."""
        if self._counted is None and (self.loss.weighs or not self.counts_all):
            self._counted = self.loss.counted(self.labels)
        return self._counted

    def _token_factors(self, count: int) -> Sequence[Tensor]:
        """``token_factor`` of each part; none where nobody looks at the mask, or there is one part."""
        mask = self.carried.get("mask")
        masks = mask.chunk(count) if isinstance(mask, Tensor) else ()
        if len(masks) > 1 and len(masks) not in self._factors:
            self._factors[len(masks)] = token_factors(masks)
        return self._factors.get(len(masks), ())


def token_factors(masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``LocalBatch.token_factor`` of parts by their masks [B, N], without waiting for a device."""
    each, items = torch.stack([mask.sum() for mask in masks]), list(map(len, masks))
    # Whole numbers above and below, so that it is 1 to the last bit where no token is padding.
    total, each = each.sum(), each * sum(items)
    return tuple(part / (total * own) for part, own in zip(each.unbind(), items, strict=True))


def make_parts(parts: Sequence[LocalBatch]) -> None:
    """Make batches the parts of one: each is told what its means are of the whole's.

    Args:
        parts: with their loss, and all that begins with a batch in them.
    """
    total = sum(len(part.labels) for part in parts)
    counts = [part.loss.counted(part.labels) for part in parts]
    known = [count for count in counts if count is not None]
    counted = torch.stack(known).sum() if len(known) == len(parts) else None
    masks = [mask for part in parts if isinstance(mask := part.carried.get("mask"), Tensor)]
    factors = token_factors(masks) if len(masks) == len(parts) else [None] * len(parts)
    for part, factor in zip(parts, factors, strict=True):
        part.share, part.labels_counted, part.token_factor = len(part.labels) / total, counted, factor


def empty_batch(
    site: Site,
    carried: Iterable[Carried],
    num_images: int,
    dtype: torch.dtype,
    *,
    labels: Tensor | None = None,
    main: tuple[Sequence[int], torch.dtype] | None = None,
    context: Context | None = None,
) -> LocalBatch:
    """A batch as it enters the module at a site, of uninitialised memory.

    Args:
        site: where.
        carried: what else it has.
        num_images: of it.
        dtype: of features.
        labels: of it; by default class indices, zeros.
        main: shape and dtype of what the first module receives; by default as features there.
        context: the model context of an example, of a model that was split by watching.
    """
    shape, kind = main if main is not None and site.index == 0 else ((num_images, *site.inputs.shape), dtype)
    labels = torch.zeros(num_images, dtype=torch.int64) if labels is None else labels
    batch = LocalBatch(None, labels, features=torch.empty(tuple(shape), dtype=kind))
    batch.loss = site.loss
    if context is not None and site.index:  # of the first one, the stem makes it
        batch.model_context = context.rows(num_images).map(
            lambda tensor: torch.empty_like(tensor) if any(tensor.stride()) else tensor
        )
    for each in carried:
        if each.grows and not site.context:
            continue  # nobody has added to it yet
        is_input = each.name == "images" and site.index == 0
        batch.carried[each.name] = batch.features if is_input else each.empty(site, num_images, dtype)
    return batch


def empty_inputs(backbone: Backbone, num_items: int) -> Tensor:
    """The main input of a batch, of uninitialised memory (token ids: zeros), on the current device."""
    shape, dtype = backbone.like(num_items)
    return torch.empty(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def made_up(backbone: Backbone, labels: Tensor) -> LocalBatch:
    """A batch as long as its labels, on which nothing depends but shapes."""
    main = empty_inputs(backbone, len(labels))
    if backbone.trunk is None or backbone.given.is_single:
        return LocalBatch(main, labels)
    given = backbone.given

    def like(tensor: Tensor) -> Tensor:
        if tensor is given.tensor:
            return main
        is_split = tensor.ndim and len(tensor) == given.num_items
        return torch.zeros((len(labels), *tensor.shape[1:]) if is_split else tensor.shape, dtype=tensor.dtype)

    return LocalBatch(main, labels, given=given.map(like))
