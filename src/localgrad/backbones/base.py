"""Turn a timm model into a stem, a list of blocks and a tail that give the very same logits.

There is no branch per architecture. ``split`` runs the model once and watches (``observe``): which modules of the trunk
were called, in which order, what each received and returned, and which of the model's own attributes were read before
the first block and after the last. From this follow

* the *stem*: a shallow copy of the model that holds only what was read before the first block, its trunk emptied;
  its own ``forward_features`` then is the embedding, with every option that the model has;
* the *blocks*: the observed calls, each with whatever timm does between two calls (``timm_models``), found by
  comparing bits. Plain arguments are frozen, tensor arguments (rope) are computed again at each call;
* the *tail*: the children called after the last block, then a shallow copy's own ``forward_head``.

Then it is proved (``proof``): the parts must give the model's logits and every gradient bit for bit. The model is left
as it was (``state``). A part never writes into what it receives: where the proof sees one do so, it is given a copy. A
model on a GPU, or with weights of 16 bits, is split by a copy in host memory, in float32.

Parameters are shared with the model, never copied: training the parts trains the model. Settings changed on the model
afterwards (``reset_classifier``, ``set_input_size``) are not seen: split again. timm's ``grad_checkpointing`` has no
effect on the parts, since blocks are called directly; ``LocalLearner`` follows it. timm's ``forward_intermediates``
reads features out, but can't cut the graph into modules that are trained, moved and compiled on their own.

Sources: timm 1.0.31 (``forward_features``/``forward_head`` and the ``blocks``/``stages``/``layers`` convention);
hiera's unrolled token order: arXiv 2306.00989, Section 3.

Shapes: B batch, N tokens, P prefix tokens, D width, H W grid; images [B, C, H, W].
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from localgrad.backbones.adapters import adapted_model, check_adapters_are_read, check_calls_alike
from localgrad.backbones.by_hand import Chain, PartsSeen, check_parts, default_size_of_parts, listed, names_of_blocks
from localgrad.backbones.example import Example, says_causal
from localgrad.backbones.fake import (
    NEEDS_VALUES,
    FakeTensor,
    by_shapes_alone,
    copy_on_host,
    fake_copy_with_memo,
    on_meta,
)
from localgrad.backbones.layouts import (
    GridUnknown,
    Layout,
    LayoutFinder,
    change_features,
    change_image,
    looks_ahead,
)
from localgrad.backbones.observe import Call, Seen, find_stations, observe, trunks_of, watch_inputs
from localgrad.backbones.proof import prove
from localgrad.backbones.state import ModelState, left_as_it_was
from localgrad.backbones.timm_models import (
    SUPPORTED_FAMILIES,
    TENSOR_ARGUMENTS,
    ComputedArgument,
    InputKept,
    Step,
    Unsplittable,
    attribute,
    default_input_size,
    find_glue,
    find_recomputed,
    input_channels,
    kind_after,
    recomputes,
    unsupported,
)
from localgrad.backbones.watching import TakenApart, Trunk, take_apart
from localgrad.errors import BackboneError, arg, reason_of
from localgrad.registry import Registry

__all__ = ["BACKBONES", "SUPPORTED_FAMILIES", "Backbone", "Layout", "outline", "register_backbone", "split"]


class CopyingPart(nn.Module):
    """Stem or tail: what does it, given a copy where it writes into what it receives (blocks: ``InputKept``)."""

    def __init__(self, part: nn.Module, *, copies_input: bool = False) -> None:
        super().__init__()
        self.part = part
        self.copies_input = copies_input

    def forward(self, given: Tensor) -> Tensor:
        """Images or features [B, ...] to features or logits."""
        return self.run(given.clone() if self.copies_input else given)

    def run(self, given: Tensor) -> Tensor:
        """What the part does."""
        result: Tensor = self.part(given)
        return result


class Stem(CopyingPart):
    """Images [B, C, H, W] to the first block's features."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(part, copies_input=True)  # until it is known whether it has to be


class FrozenStem(Stem):
    """The stem and the first blocks of a model as they are: in eval mode, and without a graph.

    Attributes:
        passes: whether what it is given are the features that it gave before, which then pass it by.
    """

    def __init__(self, stem: Stem, blocks: Iterable[nn.Module]) -> None:
        super().__init__(stem)
        self.passes = False
        self.copies_input = False  # the stem does, where it has to
        self.blocks = nn.ModuleList(blocks)
        self.requires_grad_(requires_grad=False)

    def run(self, given: Tensor) -> Tensor:
        """Images or ids to the features of the first block that learns."""
        if self.passes:
            return given
        with standing_still(self):
            features: Tensor = self.part(given)
            for block in self.blocks:
                features = block(features)
        return features


class FrozenBlock(nn.Module):
    """A block as it is, where no block behind it learns: in eval mode, and without a graph."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.requires_grad_(requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features to features."""
        with standing_still(self):
            outputs: Tensor = self.block(features)
        return outputs


@contextmanager
def standing_still(part: nn.Module) -> Iterator[None]:
    """A region in which a part runs in eval mode and without a graph; modes are as before at its end."""
    training = [module for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class TimmStem(Stem):
    """A shallow copy of a timm model that holds the stem's children only, its trunk emptied."""

    def run(self, given: Tensor) -> Tensor:
        """The model's own embedding."""
        features: Tensor = self.part.forward_features(given)  # type: ignore[operator]
        return features


class Tail(CopyingPart):
    """The last block's features to logits [B, num_classes].

    Args:
        part: does it.
        unused: parameters that the model's forward pass never reads (mask tokens): kept, so that none gets lost.
    """

    def __init__(self, part: nn.Module, *, unused: Iterable[nn.Parameter] = ()) -> None:
        super().__init__(part)
        self.unused = nn.ParameterList(unused)


class TimmTail(Tail):
    """What a timm model does after its last block.

    Args:
        part: a shallow copy of the model that holds the tail's children only.
        glue: what the model does to the features first.
        before_head: names of the children called, in order, before ``forward_head``.
        unused: as for ``Tail``.
    """

    def __init__(
        self,
        part: nn.Module,
        *,
        glue: Callable[..., Tensor],
        before_head: Sequence[str],
        unused: Iterable[nn.Parameter],
    ) -> None:
        super().__init__(part, unused=unused)
        self.glue = glue
        self.before_head = tuple(before_head)

    def run(self, given: Tensor) -> Tensor:
        """The model's own end."""
        features = self.glue(given)
        for name in self.before_head:
            features = self.part.get_submodule(name)(features)
        logits: Tensor = self.part.forward_head(features)  # type: ignore[operator]
        return logits


class Backbone(nn.Module):
    """A model as stem, blocks and tail: found by ``split``, or made by hand of modules from one tensor to one tensor.

    The parts share their parameters with ``model``, which is not registered here: each parameter belongs to
    exactly one part (unless the model itself uses it in several, see ``check_boundaries``). By hand, this is proved at
    once (see ``prove``).

    Args:
        stem: images [B, C, H, W] to features.
        blocks: features to features, in order; a boundary between local modules may fall between any two.
        tail: features to logits [B, num_classes].
        input_size: (C, H, W) of the images; by default the one that ``model`` is configured for, or 224 pixels square
            with the channels of the stem's first convolution.
        model: the model whose modules and parameters the parts are made of, and which they are to equal; its
            ``state_dict()`` is what is trained. By default the parts in a row are the model.
        layouts: how features stand that enter each block, and the tail (one more than blocks); one for all where they
            are alike. By default found by changing single places, with one class token at most.
        proved: whether to prove it now; without, forgotten blocks or norms train without a word.

    Raises:
        BackboneError: a part can't run or gives no features; or the parts aren't the model.

    Example:
        >>> parts = {"stem": net.embed, "blocks": net.layers, "tail": net.head}  # doctest: +SKIP
        >>> Backbone(**parts, input_size=(3, 32, 32), model=net)  # doctest: +SKIP
    """

    model: nn.Module
    """The plain model: its ``state_dict()`` is what to export."""
    stem: Stem
    """[B, C, H, W] -> features."""
    blocks: nn.ModuleList
    """Features -> features, each from and to one tensor."""
    tail: Tail
    """Features -> [B, num_classes]."""
    block_names: tuple[str, ...]
    """Dotted path of each block in the model."""
    layouts: tuple[Layout, ...]
    """Layout of the features entering block i; the last one, of those entering the tail."""
    stage_boundaries: tuple[int, ...]
    """Index of the first block of every stage after the first; empty for a model without stages."""
    input_size: tuple[int, ...]
    """Of one item of the main input: (C, H, W) of images, (N,) of token ids in the example."""
    num_classes: int
    """Width of the logits."""
    names_tokens: bool
    """Whether there are logits for each token [B, N, num_classes], and not for each item."""
    num_tokens: int
    """N of those logits, in the example."""
    trunk: Trunk | None
    """What the parts share where they were found by watching the model; else ``None``."""

    def __init__(
        self,
        *,
        stem: nn.Module,
        blocks: Iterable[nn.Module],
        tail: nn.Module,
        input_size: tuple[int, int, int] | None = None,
        model: nn.Module | None = None,
        layouts: Layout | Sequence[Layout] | None = None,
        proved: bool = True,
    ) -> None:
        super().__init__()
        parts = check_parts(stem, blocks, tail, model)
        whole = Chain(stem, parts, tail) if model is None else model
        size = _checked_size(default_size_of_parts(stem, model) if input_size is None else input_size)
        if next(whole.parameters(), None) is None:
            raise BackboneError("Backbone: its parts have no parameters; there is nothing to train.")
        _check_weights(whole)
        _check_is_real(whole)
        found = PartsSeen(whole, [stem, *parts, tail], size, layouts)
        held = {id(weight) for part in (stem, *parts, tail) for weight in part.parameters()}
        left = {name: weight for name, weight in whole.named_parameters() if id(weight) not in held}
        self._take(
            whole,
            stem=Stem(stem),
            blocks=parts,
            tail=Tail(tail, unused=left.values()),
            block_names=names_of_blocks(whole, parts),
            layouts=found.layouts,
            stage_boundaries=found.stage_boundaries,
            input_size=size,
            num_classes=found.num_classes,
        )
        for module in (self, self.stem, self.blocks, self.tail, self.tail.unused):
            module.training = whole.training
        if proved:
            self.prove()
            if model is None:
                warnings.warn(
                    "Backbone: no model was given, so its parts were compared with nothing; that they run and that all "
                    "their parameters are used is all that was seen. Give model=, or proved=False if there is none.",
                    stacklevel=2,
                )
        else:
            self._look()

    @classmethod
    def _of_parts(cls, model: nn.Module, **parts: Any) -> Backbone:
        """A backbone of parts that were found; for ``split``."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(model, **parts)
        return made

    def _take(
        self,
        model: nn.Module,
        *,
        stem: Stem,
        blocks: Iterable[nn.Module],
        tail: Tail,
        block_names: Sequence[str],
        layouts: Sequence[Layout],
        stage_boundaries: Sequence[int],
        input_size: tuple[int, ...],
        num_classes: int,
        given: Example | None = None,
        trunk: Trunk | None = None,
        num_tokens: int = 0,
    ) -> None:
        # Past nn.Module's registry, so that state_dict() holds nothing twice; deepcopy copies it with the rest.
        object.__setattr__(self, "model", model)
        self.stem, self.blocks, self.tail = stem, nn.ModuleList(blocks), tail
        self.block_names, self.layouts = tuple(block_names), tuple(layouts)
        self.stage_boundaries = tuple(stage_boundaries)
        self.input_size, self.num_classes = input_size, num_classes
        self.names_tokens, self.num_tokens = num_tokens > 0, num_tokens
        self._given, self.trunk = given, trunk
        self._written_buffers: frozenset[str] = frozenset()
        self._followed = _shared_slots(model, self)

    def prove(self) -> None:
        """Prove that the parts are the model: the same logits and gradients, bit for bit, in eval and in train mode.

        Parts without a model are held against themselves in a row: that what they do can be repeated, writes into no
        parameter, and reads every one. All is left as it was. On a GPU, or in 16 bits, copies in host memory are held
        against each other, in float32.

        Raises:
            BackboneError: something differs, or a parameter is never used; the message says what.
        """
        twin = self._provable()
        with self._in_the_same_mode():
            twin._prove_here()
        if twin is not self:
            self._learn_from(twin)

    @contextmanager
    def _in_the_same_mode(self) -> Iterator[None]:
        """A region at whose end what is around the parts is in the mode that it was in."""
        modes = {module: module.training for module in self.modules()}
        try:
            yield
        finally:
            for module in self.modules():
                module.training = modes.get(module, self.model.training)

    def logits_of(self, model: nn.Module, main: Tensor) -> Tensor:
        """What a model like this one gives for a main input, called with what else this batch has."""
        logits: Tensor = model(main) if self.trunk is None else self.trunk.inputs(main).call(model)
        return logits

    def _call(self, main: Tensor) -> Tensor:
        return self.logits_of(self.model, main)

    def _provable(self) -> Backbone:
        """This backbone, or a copy on which arithmetic can be repeated to the bit."""
        if _is_proved_in_place(self.model):
            return self
        return copy_on_host(self)[0]

    def _prove_here(self) -> None:
        in_model = set(self.model.modules())
        parts = self.parts
        blocks = [pair for pair in zip(self.block_names, self.blocks, strict=True) if pair[1] in in_model]
        inner = [self.stem.part, *self.blocks, self.tail.part]
        with torch.inference_mode(mode=False), left_as_it_was(self.model, *inner) as state, torch.no_grad():
            self.eval()
            images = self.inputs()
            try:
                self._call(images.clone())
                moving = state.changed()
                state.restore()
                with self._keeping_inputs():
                    shown = prove(self.model, self, parts, blocks, images, moving=moving, call=self._call)
            except Unsplittable as error:
                raise BackboneError(f"Backbone: {error.what}.{self._lost()}") from None
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, TypeError, RuntimeError) as error:
                raise BackboneError(f"Backbone: its parts don't train ({reason_of(error)}).") from error
        self._written_buffers = shown.written
        unused = sorted(shown.unread)
        if unused and isinstance(self.model, Chain):
            raise BackboneError(
                f"Backbone: nothing depends on {listed(unused)}; use them in a part's forward, or take them out (or "
                "freeze them: requires_grad_(False))."
            )

    def _lost(self) -> str:
        """A sentence on the model's parameters that no part has."""
        ids = set(map(id, self.tail.unused))
        lost = [name for name, weight in self.model.named_parameters() if id(weight) in ids]
        return f" In no part: {listed(lost)}." if lost else " Check the order of the blocks, and what each part does."

    def _look(self) -> None:
        """Run the parts once in training mode: which write into their input, and which buffers are written."""
        inner = [self.stem.part, *self.blocks, self.tail.part]
        with torch.inference_mode(mode=False), left_as_it_was(self.model, *inner) as state, torch.no_grad():
            with self._in_the_same_mode(), self._keeping_inputs():
                self.train()(self.inputs())
            self._written_buffers = frozenset(state.written_buffers(self.model))

    @property
    def given(self) -> Example:
        """What the model is called with, two items: random images, or what it was split by."""
        return Example.of(_random_images(self.input_size)) if self._given is None else self._given

    @property
    def takes_ids(self) -> bool:
        """Whether the main input is token ids, and not images or vectors."""
        return self._given is not None and not self._given.tensor.is_floating_point()

    @property
    def targets_input(self) -> bool:
        """Whether what the first local module receives can be a target: images or vectors that no frozen stem is given.

        Token ids, sound [B, T] and video [B, T, C, H, W] aren't: there it is what enters the first block.
        """
        return len(self.input_size) in (2, 3) and not (self.takes_ids or isinstance(self.stem, FrozenStem))

    def frozen(self, freeze: str | float) -> Backbone:
        """This backbone with its first blocks as they are: they run once, without a graph, and nothing of them learns.

        They become part of the stem, in eval mode: batch norms and dropout stand still. Their weights are frozen
        (``requires_grad``), so no optimizer has state of them, and no local module has them. The first module's target
        is what enters the first block that learns.

        Args:
            freeze: ``"stem"``, for no block; how many blocks; or a share of them, such as 0.5. All but what follows
                the last block: 1.0.

        Raises:
            BackboneError: that is nothing that can be frozen, or something in it is shared with what learns.
        """
        count = num_frozen(freeze, len(self.blocks))
        inner = min(count, len(self.blocks) - 1)
        still = [FrozenBlock(block) for block in self.blocks[inner:count]]
        held = {memory_of(tensor): name for name, tensor in self.model.named_parameters()}
        learning = [*self.blocks[count:], self.tail]
        learns = {memory_of(weight) for part in learning for weight in part.parameters()}
        for part in (self.stem, *self.blocks[:count]):
            tied = [held[where] for where in map(memory_of, part.parameters()) if where in learns and where in held]
            if tied:
                raise BackboneError(
                    f"{arg('freeze', freeze)}: {tied[0]} would be frozen, and is shared with parts that learn; freeze "
                    "nothing, or build the model without sharing (tie_word_embeddings=False)."
                )
        made = Backbone._of_parts(
            self.model,
            stem=FrozenStem(self.stem, self.blocks[:inner]),
            blocks=[*still, *self.blocks[count:]],
            tail=self.tail,
            block_names=self.block_names[inner:],
            layouts=self.layouts[inner:],
            stage_boundaries=[at - inner for at in self.stage_boundaries if at > inner],
            input_size=self.input_size,
            num_classes=self.num_classes,
            given=self._given,
            trunk=self.trunk,
            num_tokens=self.num_tokens,
        )
        made._written_buffers = self._written_buffers
        return made

    def inputs(self, num_items: int = 2) -> Tensor:
        """The main input of a made-up batch, [num_items, ...]: random images, or the example's own items again."""
        main = self.given.rows(num_items).tensor
        like = next(self.model.parameters())
        return main.to(like.device, like.dtype if main.is_floating_point() else main.dtype)

    @property
    def kept_of_example(self) -> list[Tensor]:
        """Tensors that are kept of the example that it was split by: no step's, and on no card."""
        if self.trunk is None:
            return []
        own = {tensor.untyped_storage()._cdata for tensor in _tensors(self.model)}
        known = [] if self.trunk.batch.known is None else self.trunk.batch.known.tensors
        given = [leaf for _, leaf in (*self.given.leaves(), *self.trunk.example.leaves()) if isinstance(leaf, Tensor)]
        return [tensor for tensor in (*known, *given) if tensor.untyped_storage()._cdata not in own]

    def like(self, num_items: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the main input of a batch."""
        ids = self._given.tensor.dtype if self._given is not None and self.takes_ids else None
        return (num_items, *self.input_size), ids or self.dtype

    def _learn_from(self, twin: Backbone) -> None:
        """Take what was found out on a copy."""
        self._written_buffers = twin._written_buffers
        self.stem.copies_input, self.tail.copies_input = twin.stem.copies_input, twin.tail.copies_input
        for index, (block, copied) in enumerate(zip(self.blocks, twin.blocks, strict=True)):
            if isinstance(copied, InputKept) and not isinstance(block, InputKept):
                self.blocks[index] = InputKept(block)

    @property
    def parts(self) -> list[nn.Module]:
        """Stem, blocks and tail."""
        return [self.stem, *self.blocks, self.tail]

    def forward(self, images: Any) -> Tensor:
        """Images [B, C, H, W] to logits [B, num_classes], the bits that ``model(images)`` gives.

        A model that was split by an example takes what that is like: a tensor, or a tuple or dict of them.
        """
        if not isinstance(images, Tensor):
            given = Example.of(images, "inputs")
            if self.trunk is not None:
                self.trunk.batch.given = given
            images = given.tensor
        elif self.trunk is not None:
            self.trunk.batch.given = None  # of another call, with which this tensor has nothing to do
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.tail(features)
        return logits

    def train(self, mode: bool = True) -> Backbone:  # noqa: FBT001, FBT002 (torch's signature)
        """Set the mode of the parts and of ``model``."""
        super().train(mode)
        self.model.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.follow_parts()
        return self

    def follow_parts(self) -> None:
        """Give the modules of ``model`` that aren't in a part the parts' tensors, after these were moved.

        Most parameters change in place; where torch makes new ones, the model's own must follow.
        """
        for owner, table, name, part, own_table, own_name in self._followed:
            vars(owner)[table][name] = vars(part)[own_table][own_name]

    def example(self, index: int) -> Tensor:
        """Random features such as enter block ``index``, for two images; the random state stays as it was."""
        like = next(self.parameters())
        generator = torch.Generator().manual_seed(index)
        shape = self.layouts[index].shape
        return torch.randn(2, *shape, generator=generator, device="cpu").to(like.device, like.dtype)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, where the main input is such.

        Raises:
            BackboneError: it is something else.
        """
        return _checked_size(self.input_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the images and features."""
        return next(self.parameters()).dtype

    @property
    def recomputes(self) -> bool:
        """Whether timm's ``grad_checkpointing`` is on where blocks that are called directly pass by it."""
        return any(recomputes(module) for _, module in self.modules_passed_by)

    @property
    def modules_passed_by(self) -> list[tuple[str, nn.Module]]:
        """Modules of the model (itself, its stages) that are never called as the parts are, and their names."""
        called = set(self.modules())
        return [
            (name or type(module).__name__, module)
            for name, module in self.model.named_modules()
            if module not in called
        ]

    @contextmanager
    def _keeping_inputs(self) -> Iterator[None]:
        """While the parts run, find those that write into their input; give them copies from then on."""
        parts = self.parts
        shapes = [None, *(layout.shape for layout in self.layouts)]
        self.stem.copies_input = False
        with watch_inputs(self.model, parts, shapes) as writing:
            yield
        last = len(parts) - 1
        self.stem.copies_input, self.tail.copies_input = 0 in writing, last in writing
        for number in sorted(writing - {0, last}):
            self.blocks[number - 1] = InputKept(parts[number])

    def _check_written_by_parts(self) -> None:
        """Refuse buffers that the model's own code between blocks writes: it runs once for each part that it is in.

        Raises:
            BackboneError: naming one.
        """
        owned = {id(buffer) for part in self.parts for buffer in part.buffers()}
        for name, buffer in self.model.named_buffers():
            if name in self._written_buffers and id(buffer) not in owned:
                raise BackboneError(
                    f"{type(self.model).__name__} can't be split: {name} is written in training by its own code, or by "
                    "a module that stands in several places, and those run once for each part; give each place a "
                    "module of its own, or make a localgrad.Backbone of its parts by hand."
                )

    def check_boundaries(self, boundaries: Sequence[int]) -> None:
        """Refuse boundaries across which local modules would share a parameter, or a buffer that they write.

        Args:
            boundaries: index of the first block of every local module after the first, increasing.

        Raises:
            BackboneError: something is shared; the message names it and its blocks.
        """
        for shared in self.shared_across(boundaries):
            way_out = (
                " give shared='last' (the last of them trains it, the others read it) or shared='average' (each trains "
                "a copy, and they are averaged after each step),"
                if shared.is_weight
                else ""
            )
            raise BackboneError(
                f"{shared.name} is shared by {', '.join(shared.places)}, which boundaries={list(boundaries)} put in "
                f"different local modules: keep these in one module,{way_out} or build the model without sharing."
            )

    def shared_across(self, boundaries: Sequence[int]) -> Iterator[Shared]:
        """Weights, and buffers that are written, which several local modules of given boundaries have."""
        owners: dict[object, dict[int, list[str]]] = {}
        for module, (name, part) in self._parts_by_module(boundaries):
            for tensor in _tensors(part):
                owners.setdefault(memory_of(tensor), {}).setdefault(module, []).append(name)
        named: list[tuple[str, Tensor]] = [*self.model.named_parameters()]
        named += [(name, buffer) for name, buffer in self.model.named_buffers() if name in self._written_buffers]
        for name, tensor in named:
            modules = owners.get(memory_of(tensor), {})
            if len(modules) > 1:
                yield Shared(name, tensor, tuple(modules), [part for parts in modules.values() for part in parts])

    def past_features(self, boundaries: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names of the stem's weights that get to blocks beside the features, and of which local modules those are."""
        reach = {} if self.trunk is None or isinstance(self.stem, FrozenStem) else self.trunk.reach
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and name in reach:
                at = {sum(boundary <= index for boundary in boundaries) for index in reach[name]}
                yield name, tuple(sorted(at))

    def _parts_by_module(self, boundaries: Sequence[int]) -> Iterator[tuple[int, tuple[str, nn.Module]]]:
        yield 0, ("the stem", self.stem)
        for index, (name, block) in enumerate(zip(self.block_names, self.blocks, strict=True)):
            yield sum(boundary <= index for boundary in boundaries), (name, block)
        yield len(boundaries), ("the tail", self.tail)


def num_frozen(freeze: str | float, num_blocks: int | None = None) -> int:
    """How many of a model's first blocks are frozen; without their number, of the one that there is at least.

    Raises:
        BackboneError: it is neither ``"stem"``, a number of blocks, nor a share of them.
    """
    if freeze == "stem":
        return 0
    if not isinstance(freeze, str) and not isinstance(freeze, bool):
        if isinstance(freeze, int) and 1 <= freeze <= (num_blocks or freeze):
            return freeze
        if isinstance(freeze, float) and 0 < freeze <= 1:
            return max(1, round(freeze * (num_blocks or 1)))
    upwards = f"from 1 to {num_blocks}" if num_blocks else "from 1 on"
    raise BackboneError(
        f"{arg('freeze', freeze)}: take stem, a number of blocks {upwards}, or a share of them, such as 0.5."
    )


class Shared(NamedTuple):
    """A tensor that several local modules have: its name, their numbers, and their parts that read it."""

    name: str
    tensor: Tensor
    modules: tuple[int, ...]
    places: list[str]

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, which one of them can train."""
        return isinstance(self.tensor, nn.Parameter)


def split(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    example: Any = None,
    blocks: str | None = None,
) -> Backbone:
    """Split a model into stem, blocks and tail, and prove that they give the same logits and gradients.

    The model keeps its parameters (the parts share them) and is left as it was; the random state stays too. Models of
    timm are known; any other is watched while it runs (``watching``).

    Args:
        model: on any device: a timm model with a classifier, or any other that is given an example; of one with
            adapters of peft, the model in its wrapper is split.
        input_size: (C, H, W) of the images that it will be trained on; by default the model's own.
        example: a batch as the model is called with, in place of ``input_size``: a tensor, a tuple of positional
            arguments, or a dict of keywords, such as one of a data loader (labels are left out). Its tensors have one
            row an item.
        blocks: dotted name of the container whose children are to be the blocks; by default found.

    Returns:
        The backbone.

    Raises:
        BackboneError: the model has no trunk that can be found, no classifier, another image size, or parts
            that don't give its logits and gradients bit for bit.
    """
    given = None if example is None else Example.of(example)
    wrapper, model = model, adapted_model(model)
    if given is None:
        size = _check_arguments(model, input_size)
        given = Example.of(_random_images(size))
    else:
        _check_example(model, input_size, given)
    if wrapper is not model:
        check_calls_alike(wrapper, model, given.rows(2))
    if _is_proved_in_place(model):
        return _found(model, given.rows(2), blocks)
    # Elsewhere: there some backward passes differ from themselves, and there memory is what users lack.
    copied, copies = copy_on_host(model)
    there = given.rows(2).to("cpu").map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    made: Backbone = copy.deepcopy(_found(copied, there, blocks), {id(twin): original for original, twin in copies})
    return made


def _found(model: nn.Module, given: Example, blocks: str | None) -> Backbone:
    """The parts of a model on the processor: as timm's are known, or by watching it."""
    is_image = given.tensor.ndim == 4 and given.tensor.is_floating_point() and given.is_single
    if blocks is None and is_image and _is_timms(model):
        try:
            return _split(model, given.tensor.to(next(model.parameters())))
        except Unsplittable:
            pass  # what watching finds is finer, and says more where it finds nothing
    return _watched(model, given, blocks)


def _watched(model: nn.Module, given: Example, blocks: str | None) -> Backbone:
    """Take a model apart by watching it run, and prove it."""
    like = next(model.parameters())
    given = given.map(lambda tensor: tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device))
    with torch.inference_mode(mode=False), left_as_it_was(model) as state, torch.no_grad():
        model.eval()
        logits = _called(model, given)
        if logits.ndim < 2:
            raise BackboneError(
                f"{type(model).__name__} can't be split: it gives {list(logits.shape)} for {given.num_items} items; "
                "let it give logits [B, num_classes], for one number each [B, 1] (without squeeze)."
            )
        moving = state.changed()
        state.restore()
        model.eval()
        _check_items_are_apart(model, given, logits)
        state.restore()
        model.eval()
        parts = take_apart(model, given, blocks)
        state.restore()
        model.eval()
        backbone = _backbone_of(model, given, parts, logits)
        stations = [(station.slot.name, station.slot.module) for station in parts.trunk.stations]
        try:
            state.restore()
            model.eval()
            if not torch.equal(backbone(given.tensor.clone()), logits):
                raise unsupported(model, "in eval mode its parts give other logits than the model")
            state.restore()
            _check_is_all_called(model.train(), parts)
            state.restore()
            _check_counts_nothing(model.train(), backbone, given, state)
            state.restore()
            with backbone._keeping_inputs():
                shown = prove(
                    model, backbone, backbone.parts, stations, given.tensor, moving=moving, call=backbone._call
                )
        except torch.OutOfMemoryError:
            raise
        except Unsplittable as error:
            raise _refused_of(backbone, error.what) from None
        except (AttributeError, TypeError, RuntimeError) as error:
            raise _refused_of(backbone, f"its parts don't run on their own ({reason_of(error)})") from error
        backbone._written_buffers = shown.written
        backbone._check_written_by_parts()
        check_adapters_are_read(model, shown.unread)
    for module in set(backbone.modules()) - set(model.modules()):
        module.training = model.training
    return backbone


def _check_counts_nothing(model: nn.Module, backbone: Backbone, given: Example, state: ModelState) -> None:
    """Refuse a model in train mode whose own code changes numbers that it keeps, each time that it runs."""

    def written() -> dict[str, float]:
        _called(model, given)
        return {
            attribute if module is model else f"{name}.{attribute}": now
            for name, module in backbone.modules_passed_by
            for attribute, now in state.written_numbers(module).items()
        }

    if not written():
        return
    before, now = written(), written()
    counting = [name for name, value in now.items() if value != before.get(name, value)]  # no size that is noted once
    if counting:
        raise BackboneError(
            f"{type(model).__name__} can't be split: {listed(counting)} is changed in training by its own code, which "
            "runs once for each part; keep it in a module that is called once, or in your loop."
        )


ITEMS_APART = 1e-3
"""Of the greatest logit: what kernels may give otherwise for an item when another one changes."""


def _refused_of(backbone: Backbone, why: str) -> BackboneError:
    containers = list(dict.fromkeys(name.rpartition(".")[0] for name in backbone.block_names))
    return BackboneError(
        f"{type(backbone.model).__name__} can't be split: {why}. Blocks were seen in {listed(containers)}; give "
        f"{arg('blocks')}, the dotted name of another container, or make a localgrad.Backbone of its parts by hand."
    )


def _check_items_are_apart(model: nn.Module, given: Example, logits: Tensor) -> None:
    """Refuse a model in eval mode of whose logits the first depend on the second item: its batch isn't what is first.

    Local losses, parts of a batch and what is left out as padding go by items; given are two, and their logits.
    """
    main = given.tensor
    ours, theirs = logits[:1], _called(model, given.with_main(torch.cat([main[:1], main[1:].roll(1, -1)])))[:1]
    if ours.shape == theirs.shape and not bool((ours - theirs).abs().max() <= ITEMS_APART * ours.abs().max()):
        raise BackboneError(
            f"{type(model).__name__} can't be split: its logits for the first item of a batch depend on the second. If "
            "the batch isn't the first dimension of what it takes, build it so (batch_first=True)."
        )


def _check_is_all_called(model: nn.Module, parts: TakenApart) -> None:
    """Refuse a model in train mode that drops layers at random."""
    if (name := parts.trunk.left_out()) is not None:
        raise BackboneError(
            f"{type(model).__name__} can't be split: in training it leaves out {name} at random, and a local module "
            "runs all its blocks; build it without that (layerdrop=0)."
        )


def _called(model: nn.Module, given: Example) -> Tensor:
    """A model's logits for an example.

    Raises:
        BackboneError: it can't be called so.
    """
    try:
        return given.call(model)
    except (torch.OutOfMemoryError, *NEEDS_VALUES):
        raise
    except Exception as error:  # whatever a model's code says
        raise BackboneError(
            f"example: {type(model).__name__} can't be called with {given.described()} "
            f"({type(error).__name__}: {reason_of(error)}); give what its forward takes, by the same names."
        ) from error


def _backbone_of(model: nn.Module, given: Example, parts: TakenApart, logits: Tensor) -> Backbone:
    """A backbone of parts that were found by watching; not proved yet."""
    return Backbone._of_parts(
        model,
        stem=Stem(parts.stem),
        blocks=parts.blocks,
        tail=Tail(parts.tail, unused=parts.unused),
        block_names=[station.slot.name for station in parts.trunk.stations],
        **_layouts_of_parts(model, given, parts),
        input_size=tuple(given.tensor.shape[1:]),
        num_classes=logits.shape[1 if logits.ndim == 4 else -1],
        given=given,
        trunk=parts.trunk,
        num_tokens=logits.shape[1] if logits.ndim == 3 else 0,
    )


def _layouts_of_parts(model: nn.Module, given: Example, parts: TakenApart) -> dict[str, Any]:
    """Layouts between parts that were found by watching, and the first blocks of stages."""
    main = given.tensor
    layouts: list[Layout] = []
    is_image = main.ndim == 4 and main.is_floating_point()
    finder = LayoutFinder(model, *main.shape[2:], more_prefix_tokens=(1, 5, 2)) if is_image else None
    before: Callable[[Tensor], Tensor] = parts.stem
    features, entered = parts.stem(main.clone()), change_image(main) if is_image else main
    for index, block in enumerate([*parts.blocks, None]):
        layouts.append(_layout_at(finder, features, index, before, entered))
        if block is not None:
            entered = change_features(features, layouts[-1])
            before, features = block, block(features.clone())

    def run(given: Tensor) -> Tensor:
        features = parts.stem(given)
        for block in parts.blocks:
            features = block(features)
        found: Tensor = features
        return found

    if main.ndim in (2, 3) and all(layout.kind == "sequence" for layout in layouts):
        is_causal = says_causal(model) if isinstance(main, FakeTensor) else not looks_ahead(run, main)
        if is_causal:
            layouts = [replace(layout, is_causal=True) for layout in layouts]
        parts.stem(main.clone())  # the batch under way is the example again
    boundaries = [i for i, (one, other) in enumerate(pairwise(layouts[:-1]), 1) if one.grid != other.grid]
    return {"layouts": layouts, "stage_boundaries": boundaries}


def _layout_at(
    finder: LayoutFinder | None, features: Tensor, index: int, before: Callable[[Tensor], Tensor], entered: Tensor
) -> Layout:
    """The layout of features; where nobody can tell what stands where, a sequence of positions."""
    if finder is not None:
        with contextlib.suppress(GridUnknown):
            return finder.describe(features, index, lambda: before(entered.clone()))
    return Layout("sequence", features.shape[-1], (1, features.shape[1]))


def _random_images(size: Sequence[int]) -> Tensor:
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0), device="cpu")


def _is_proved_in_place(model: nn.Module) -> bool:
    """Whether a model computes on the processor, in a precision for which that has all operators."""
    floating = [tensor for tensor in _tensors(model) if tensor.is_floating_point()]
    return all(tensor.device.type == "cpu" and tensor.element_size() > 2 for tensor in floating)


def _split(model: nn.Module, images: Tensor) -> Backbone:
    stations = find_stations(model)
    with torch.inference_mode(mode=False), left_as_it_was(model) as state, torch.no_grad():
        model.eval()
        seen = observe(model, stations, images)
        moving = state.changed()
        state.restore()
        model.eval()
        try:
            backbone = _assemble(model, seen, images)
            state.restore()
            model.eval()
            if not torch.equal(backbone(images.clone()), seen.logits):
                raise unsupported(model, "in eval mode its parts give other logits than the model")
            state.restore()
            blocks = [(call.station.name, call.station.module) for call in seen.calls]
            with backbone._keeping_inputs():
                shown = prove(model, backbone, backbone.parts, blocks, images, moving=moving)
            backbone._written_buffers = shown.written
            check_adapters_are_read(model, shown.unread)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, RuntimeError) as error:
            raise unsupported(model, f"its parts don't run on their own ({reason_of(error)})") from error
    for module in set(backbone.modules()) - set(model.modules()):
        module.training = model.training
    return backbone


def outline(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    example: Any = None,
    blocks: str | None = None,
) -> Backbone:
    """Split a model by shapes alone: quick and without arithmetic, for estimates; not proved, so not for training.

    A timm model's parts hold its own parameters, whatever their values (see ``without_initialization``). Where features
    are as wide as their grid is high and long, shapes leave open which axis is which, and the first reading is taken.
    What only watching splits is outlined by how data flows, on the meta device: with no memory, however large it is.

    Args:
        model: as for ``split``; its parameters may be on the meta device where it isn't timm's.
        input_size: as for ``split``.
        example: as for ``split``; of its tensors only shapes and types are read.
        blocks: as for ``split``.

    Returns:
        A backbone on a copy of the model's modules.

    Raises:
        BackboneError: as for ``split``, but for wrong parts, which only values can show.
    """
    model = adapted_model(model)
    if example is None:
        size = _check_arguments(model, input_size)
        given = Example.of(torch.empty(2, *size, device="meta"))
        if blocks is None:
            try:
                return _outlined_as_timms(model, size)
            except Unsplittable:
                pass
    else:
        given = Example.of(example)
        _check_example(model, input_size, given, is_real=False)
        is_image = given.tensor.ndim == 4 and given.tensor.is_floating_point() and given.is_single
        if blocks is None and is_image and _is_timms(model):
            return outline(model, _checked_size(given.tensor.shape[1:]))
    return _outlined_by_watching(model, given.rows(2), blocks)


def _outlined_as_timms(model: nn.Module, size: tuple[int, int, int]) -> Backbone:
    fake_mode, fake_model, copies = fake_copy_with_memo(model)
    with by_shapes_alone(), left_as_it_was(fake_model) as state, fake_mode, torch.no_grad():
        fake_model.eval()
        images = torch.empty(2, *size, dtype=next(model.parameters()).dtype)
        try:
            seen = observe(fake_model, find_stations(fake_model), images)
            state.restore()
            fake_model.eval()
            backbone = _assemble(fake_model, seen, images)
            with backbone._keeping_inputs():
                backbone.train()(images)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise unsupported(model, f"its parts don't run on their own ({reason_of(error)})") from error
    originals = {id(copied): original for original, copied in copies if isinstance(original, Tensor)}
    made: Backbone = copy.deepcopy(backbone, originals)
    return made.train(model.training)


def _outlined_by_watching(model: nn.Module, given: Example, blocks: str | None) -> Backbone:
    """Take a model apart by how data flows, on fake tensors; gives a backbone on the meta device."""
    with by_shapes_alone():
        fake_mode, fake_model, _ = fake_copy_with_memo(model)
        with left_as_it_was(fake_model) as state, fake_mode, torch.no_grad():
            dtype = next(fake_model.parameters()).dtype
            fake = given.map(lambda tensor: torch.zeros(tensor.shape, dtype=_dtype_of_input(tensor, dtype)))
            fake_model.eval()
            logits = _called(fake_model, fake)
            state.restore()
            fake_model.eval()
            try:
                parts = take_apart(fake_model, fake, blocks, by_shapes=True)
                state.restore()
                fake_model.eval()
                backbone = _backbone_of(fake_model, fake, parts, logits)
                with backbone._keeping_inputs():
                    backbone.train()(fake.tensor)
            except (AttributeError, TypeError, RuntimeError) as error:
                if isinstance(error, NEEDS_VALUES):
                    raise
                raise unsupported(model, f"its parts don't run on their own ({reason_of(error)})") from error
    return on_meta(backbone).train(model.training)


def _dtype_of_input(tensor: Tensor, of_weights: torch.dtype) -> torch.dtype:
    return of_weights if tensor.is_floating_point() else tensor.dtype


# Arguments and errors -------------------------------------------------------------------------------------------


def _check_example(model: object, input_size: object, given: Example, *, is_real: bool = True) -> None:
    if not isinstance(model, nn.Module):
        raise BackboneError(f"split takes a model, got {model!r}: pass an nn.Module.")
    if input_size is not None:
        raise BackboneError("input_size: the example says it; give one of the two.")
    if not given.num_items:
        raise BackboneError("example: it has no item; give a batch of one item or more.")
    _check_is_plain(model)
    if next(model.parameters(), None) is None:
        raise BackboneError(f"{type(model).__name__} has no parameters; there is nothing to train.")
    _check_weights(model)
    if is_real:
        _check_is_real(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise BackboneError(
            f"{type(model).__name__} is an encoder and a decoder, whose blocks look at the encoder's features: two "
            "trunks can't be one; train its encoder alone (model.get_encoder()), or a decoder-only model."
        )


def _check_arguments(model: nn.Module, input_size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    if not isinstance(model, nn.Module):
        raise BackboneError(f"split takes a timm model, got {model!r}: pass timm.create_model({model!r}).")
    _check_is_plain(model)
    _check_is_not_around(model, next((n for n, m in model.named_modules() if n and _is_timms(m)), None))
    for method in ("forward_features", "forward_head"):
        if not callable(attribute(model, method)):
            raise BackboneError(
                f"{type(model).__name__} is no timm model (it has no {method}): give example=, a batch that it is "
                "called with, such as example=torch.randn(2, 3, 224, 224) or a dict of a data loader."
            )
    size = _checked_size(default_input_size(model) if input_size is None else input_size)
    if attribute(model, "num_classes") == 0:
        raise BackboneError("the model has no classifier (num_classes=0): pass num_classes=N to timm.create_model.")
    channels = input_channels(model)
    if channels not in (None, size[0]):
        raise BackboneError(
            f"input_size={size} has {size[0]} channels, but the model was built for {channels}: "
            f"pass in_chans={size[0]} to timm.create_model."
        )
    if next(model.parameters(), None) is None:
        raise unsupported(model, "it has no parameters")
    _check_weights(model)
    _check_is_real(model)
    return size


def _checked_size(input_size: object) -> tuple[int, int, int]:
    try:
        channels, height, width = map(int, input_size)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise BackboneError(f"input_size is (channels, height, width), got {input_size!r}: pass e.g. (3, 224, 224).")
    return channels, height, width


def _check_is_real(model: nn.Module) -> None:
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in model.parameters()):
        raise BackboneError(
            "the model's parameters are on the meta device or fake, so its parts can't be compared with it: "
            "split a real model, then deep-copy the backbone."
        )


WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""PyTorch's own classes that stand around a model, by name, and where each has it."""


def _check_is_plain(model: nn.Module) -> None:
    """Refuse what stands around a model, or was made of one, and can't be taken apart or trained."""
    _check_is_not_around(model, WRAPPERS.get(type(model).__name__) if _is_torchs(model) else None)
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise BackboneError(
            "model: model.compile() was called, but local modules never call the model itself; pass compile=True to "
            "the learner, and a model on which it wasn't."
        )
    for name, module in model.named_modules():
        where = f"its part {name}" if name else "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise BackboneError(
                f"{where} was scripted or traced by torch.jit, and can't be split: pass the model that it was made of."
            )
        made_in = type(module).__module__
        if made_in.startswith("torch.ao.nn.") and ".quantized." in made_in and ".qat." not in made_in:
            raise BackboneError(
                f"{where} is a quantised {type(module).__name__}, whose weights can't be trained: pass the model as it "
                "was before, and quantise it after training."
            )


def _check_is_not_around(model: nn.Module, inner: str | None) -> None:
    """Refuse a wrapper, whose own forward would never run; ``inner`` is the dotted name of what it has."""
    if inner is not None and not _is_timms(model):
        if getattr(model, "module", None) is model.get_submodule(inner):
            inner = "module"  # what is public, of frameworks that keep it elsewhere
        path = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in inner.split("."))
        raise BackboneError(
            f"model: {type(model).__name__} stands around the model, whose blocks are called without it: pass "
            f"model{path} (and compile=True for torch.compile, ParallelLearner for several processes)."
        )


def _is_torchs(model: nn.Module) -> bool:
    return type(model).__module__.startswith("torch.")


def _is_timms(model: nn.Module) -> bool:
    """Whether a module has timm's two methods by its own class (wrappers hand on their model's attributes)."""
    return all(callable(getattr(type(model), method, None)) for method in ("forward_features", "forward_head"))


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that a plain training loop couldn't train, or that are in several places."""
    for name, weight in model.named_parameters():
        if isinstance(weight, nn.UninitializedParameter):
            raise BackboneError(
                f"model: {name} is of a lazy layer, and has no shape yet: call model(images) once before, on one batch."
            )
        kind = type(weight.data)
        if kind not in (Tensor, nn.Parameter, FakeTensor):
            raise BackboneError(
                f"model: {name} is a {kind.__name__}, not a plain tensor (quantised or sharded weights): pass the "
                "model as it was before that."
            )
        if not (weight.is_floating_point() or weight.is_complex()):
            raise BackboneError(
                f"model: {name} is of type {weight.dtype}, which has no gradients: pass the model as it was before it "
                "was quantised, make that a buffer, or localgrad.quantize_base(model) below adapters of peft."
            )
        if weight.is_inference():
            raise BackboneError(
                f"model: {name} was made under torch.inference_mode(), and can't be trained: make the model outside of "
                "it."
            )
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1 and "meta" not in devices:
        raise BackboneError(
            f"model: its weights are on several devices ({', '.join(devices)}): move it to one, as by "
            f"model.to({devices[0]!r}); offload=True keeps idle modules in host memory."
        )


# Assembly -------------------------------------------------------------------------------------------------------


def _assemble(model: nn.Module, seen: Seen, images: Tensor) -> Backbone:
    stem = _find_stem(model, seen, images)
    features = stem(images)
    groups = _group_calls(seen.calls)
    finder = LayoutFinder(model, *images.shape[2:])
    blocks: list[nn.Module] = []
    layouts: list[Layout] = []
    before = features

    def changed() -> Tensor:
        """The present features, had one place of what they were made of been different."""
        entered = change_features(before, layouts[-1]) if blocks else change_image(images)
        found: Tensor = (blocks[-1] if blocks else stem)(entered)
        return found

    for index, calls in enumerate(groups):
        layouts.append(finder.describe(features, index, changed))
        before = features
        steps = []
        for call in calls:
            steps.append(_make_step(model, call, features, layouts[-1], index))
            finder.kind = kind_after(steps[-1].glue) or finder.kind
            features = call.returned
        blocks.append(steps[0].simplest() if len(steps) == 1 else nn.Sequential(*(s.simplest() for s in steps)))
    layouts.append(finder.describe(features, len(groups), changed))
    tail_glue = _glue(model, features, seen.tail_input, groups[-1][-1].station.name, "the tail")
    return Backbone._of_parts(
        model,
        stem=stem,
        blocks=blocks,
        tail=_make_tail(model, seen, tail_glue, [stem, *blocks]),
        block_names=[_block_of(calls).station.name for calls in groups],
        layouts=layouts,
        stage_boundaries=_stage_boundaries(groups, layouts),
        input_size=(images.shape[1], images.shape[2], images.shape[3]),
        num_classes=seen.logits.shape[1],
    )


def _find_stem(model: nn.Module, seen: Seen, images: Tensor) -> Stem:
    """The model without its trunk: then its own ``forward_features`` gives what its first block received."""
    stand_ins: dict[str, nn.Module | None] = {name: nn.Identity() for name in seen.head_names}
    for position, (name, trunk) in enumerate(trunks_of(model).items()):
        if isinstance(trunk, nn.Sequential):
            stand_ins[name] = nn.Sequential()
        else:
            # cait and xcit add their class token where a second trunk is there, even an empty one
            stand_ins[name] = None if position else nn.ModuleList()
    blocks_need = {source.child for source in TENSOR_ARGUMENTS.values()}
    stem = TimmStem(_shallow_part(model, seen.stem_names - blocks_need, stand_ins))
    if _find_glue(model, stem(images), seen.calls[0].received) is None:
        raise unsupported(model, f"what stands before {seen.calls[0].station.name} is not its forward_features alone")
    return stem


def _shallow_part(model: nn.Module, owned: set[str], stand_ins: dict[str, nn.Module | None]) -> nn.Module:
    """A shallow copy of the model that registers only its own share of parameters, buffers and children."""
    part = copy.copy(model)
    state = part.__dict__
    state["_parameters"] = {n: p if n in owned else None for n, p in model._parameters.items()}
    state["_buffers"] = {n: b if n in owned else None for n, b in model._buffers.items()}
    state["_modules"] = {n: m if n in owned else stand_ins.get(n) for n, m in model._modules.items()}
    for hooks in [name for name in state if name.endswith(("_hooks", "_hooks_with_kwargs"))]:
        state[hooks] = type(state[hooks])()
    if "grad_checkpointing" in state:
        state["grad_checkpointing"] = False  # there is no trunk left to checkpoint
    return part


def _group_calls(calls: list[Call]) -> list[list[Call]]:
    """Calls as blocks: one that holds nothing but vectors (a norm) joins a neighbour."""
    groups: list[list[Call]] = []
    waiting: list[Call] = []
    for call in calls:
        if _is_block(call.module):
            groups.append([*waiting, call])
            waiting = []
        elif isinstance(call.module, nn.Identity):
            continue
        elif groups and groups[-1][0].station.group == call.station.group:
            groups[-1].append(call)
        else:
            waiting.append(call)
    if groups:
        groups[-1] += waiting
    return groups


def _is_block(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _block_of(calls: list[Call]) -> Call:
    return next(call for call in calls if _is_block(call.module))


def _make_step(model: nn.Module, call: Call, features: Tensor, layout: Layout, index: int) -> Step:
    """One observed call as a module that takes the features of the one before it."""
    name = call.station.name
    for value in call.args:
        if not _is_plain(value):
            raise unsupported(model, f"{name} is called with a {type(value).__name__} beside its features")
    recomputed: dict[str, ComputedArgument] = {}
    for keyword, value in call.kwargs.items():
        if _is_plain(value):
            continue
        source = find_recomputed(model, keyword, value, layout.grid, index) if isinstance(value, Tensor) else None
        if source is None:
            raise unsupported(model, f"{name} is called with {keyword}=, and how to compute that is not known")
        recomputed[keyword] = source
    plain = {keyword: value for keyword, value in call.kwargs.items() if keyword not in recomputed}
    holds_for_grid = _has_numbers([call.args, plain, [source.kwargs for source in recomputed.values()]])
    return Step(
        call.module,
        glue=_glue(model, features, call.received, "the features before it", name),
        args=call.args,
        kwargs=plain,
        recomputed=recomputed,
        unpack=call.unpack,
        shape=tuple(call.received.shape[1:]) if holds_for_grid else None,
        name=name,
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _has_numbers(value: Any) -> bool:
    """Whether plain arguments hold a number, which may be the grid's."""
    if isinstance(value, dict):
        return _has_numbers(list(value.values()))
    if isinstance(value, (tuple, list)):
        return any(_has_numbers(item) for item in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _find_glue(model: nn.Module, given: Tensor, wanted: Tensor) -> Callable[..., Tensor] | None:
    return find_glue(given, wanted, model._parameters.get("cls_token"))


def _glue(model: nn.Module, given: Tensor, wanted: Tensor, source: str, target: str) -> Callable[..., Tensor]:
    glue = _find_glue(model, given, wanted)
    if glue is None:
        raise unsupported(
            model,
            f"{target} does not receive what {source} gives ({list(given.shape)} became {list(wanted.shape)} "
            "in a way that is not known)",
        )
    return glue


def _make_tail(model: nn.Module, seen: Seen, glue: Callable[..., Tensor], others: list[nn.Module]) -> Tail:
    """The rest of the model: what is read after the last block, and what is never read."""
    owned_elsewhere = {id(tensor) for part in others for tensor in _tensors(part)}
    names = seen.head_names | (set(model._modules) | set(model._buffers)) - seen.stem_names - trunks_of(model).keys()
    part = _shallow_part(model, names, {})
    in_tail = owned_elsewhere | {id(tensor) for tensor in _tensors(part)}
    unused = [parameter for parameter in model.parameters() if id(parameter) not in in_tail]
    return TimmTail(part, glue=glue, before_head=seen.before_head, unused=unused)


def _stage_boundaries(groups: list[list[Call]], layouts: list[Layout]) -> list[int]:
    """Where a group of the model begins; in a flat trunk, the blocks that change the grid (hiera)."""
    stages = [_block_of(calls).station.group for calls in groups]
    if any(stages):
        return [index for index, (before, stage) in enumerate(pairwise(stages), start=1) if stage != before]
    return [i for i, (before, after) in enumerate(pairwise(layouts)) if i > 0 and before.grid != after.grid]


def memory_of(tensor: Tensor) -> object:
    """The same for tensors that begin at the same place in memory, such as two parameters made of one tensor."""
    has_memory = not (tensor.is_meta or isinstance(tensor, FakeTensor)) and tensor.numel()
    return (tensor.device, tensor.data_ptr()) if has_memory else id(tensor)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _shared_slots(model: nn.Module, parts: nn.Module) -> list[tuple[nn.Module, str, str, nn.Module, str, str]]:
    """Where modules of the model that are in no part hold the very tensors of a part: (module, table, name) of both."""
    places: dict[int, tuple[nn.Module, str, str]] = {}
    for part in parts.modules():
        for table, name, tensor in _slots(part):
            places.setdefault(id(tensor), (part, table, name))
    inside = set(parts.modules())
    return [
        (module, table, name, *places[id(tensor)])
        for module in model.modules()
        if module not in inside
        for table, name, tensor in _slots(module)
        if id(tensor) in places
    ]


def _slots(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for table in ("_parameters", "_buffers"):
        for name, tensor in vars(module)[table].items():
            if tensor is not None:
                yield table, name, tensor


BACKBONES: Registry[Callable[..., Backbone]] = Registry("backbone")


def register_backbone(name: str, backbone: Callable[..., Backbone]) -> None:
    """Give a backbone a name, by which recipes (``model.name``) and the command line choose it.

    Args:
        name: for ``--model``.
        backbone: called as ``timm.create_model`` is, without the name: with ``num_classes`` and ``in_chans`` (and
            ``img_size``, ``patch_size``, ``drop_path_rate``, ``pretrained`` where a recipe has them), and with
            ``model.options``.

    Raises:
        RecipeError: the name is another's.
    """
    BACKBONES.register(name, backbone)
