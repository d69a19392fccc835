"""The halves of a timm block: its attention and its MLP, each as ``x + drop_path(branch(x))``.

``find_pieces`` gives the pieces that, run in sequence, give what the block gives, bit for bit. A branch treats every
image by itself (``per_image``), so it may run over a part of the batch at a time; the drop path stands outside of it
and draws for the whole batch, in the order in which the block itself draws.

There is no table of architectures but one of *written forms*: where timm puts norm, attention, layer scale and MLP
under which names. Each form is tried in training mode on a copy of the block with random weights, and taken only if it
gives the copy's own bits; where drop path hides a branch of every image, in evaluation mode, too. A block that no form
fits is one piece of its own: still right, only coarser.

Source: timm 1.0.31 (``x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))`` and its variants). Cutting a block at
its residual additions: RevNet, arXiv 1707.04585; chunks of feed-forward layers: Reformer, arXiv 2001.04451, Section 3.

Shapes: B batch first in every tensor; what follows is the block's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, final

import torch
from torch import Tensor, nn

from localgrad.backbones.effects import NO_EFFECTS, Effects, Observed, observe_effects
from localgrad.backbones.fake import TorchDispatchMode
from localgrad.backbones.hooks import copy_without_hooks, has_hooks
from localgrad.backbones.likeness import is_foreign, likeness, signature
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.random_numbers import RandomState, random_state_kept
from localgrad.backbones.state import OF_EVERY_MODULE
from localgrad.backbones.timm_models import Step, attribute, identity
from localgrad.backbones.watching import Called, UnderWay

ATTENTION_NAMES = ("_attn", "_shifted_window_attn", "_partition_attn", "attn", "token_mixer")
"""Where a block keeps its attention, the first that exists: Swin's methods roll and cut windows around ``attn``."""

__all__ = ["DRAW_OF_ROWS", "Branch", "Piece", "find_pieces", "observed", "signature", "whole_block"]

DRAW_OF_ROWS = torch.ops.aten.bernoulli_.float
"""How a processor draws a mask (dropout, also inside fused attention; drop path)."""


@dataclass(frozen=True)
class Branch:
    """One residual branch: ``scale(after(inner(before(x))))``.

    Attributes:
        inner: attention or MLP.
        before: a norm, or identity.
        after: a norm, or identity.
        args: follow the features in the call of ``inner``.
        kwargs: by keyword.
        recomputed: tensor arguments, made anew at each call (rope).
        scale: the module and the name of its layer-scale parameter, where that is a bare parameter.
    """

    inner: Callable[..., Tensor]
    before: Callable[[Tensor], Tensor] = identity
    after: Callable[[Tensor], Tensor] = identity
    args: tuple[Any, ...] = ()
    kwargs: Kwargs = field(default_factory=dict)
    recomputed: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    scale: tuple[nn.Module, str] | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Features [B, ...] to the branch's output, of the same shape."""
        tensors = {keyword: source() for keyword, source in self.recomputed.items()}
        result = self.after(self.inner(self.before(features), *self.args, **self.kwargs, **tensors))
        if self.scale is not None:
            module, name = self.scale
            result = getattr(module, name) * result
        return result


@dataclass(frozen=True)
class AsCut:
    """A module as it was when it was cut: its branches give what it gives for as long as it is so.

    Attributes:
        functions: the methods that its forward pass runs, with the code that they had, by name.
        own: what the instance has in place of them, by name; ``None`` for nothing.
        children: modules that the branches call, by name.
        settings: its numbers, flags and texts, by name, but for its mode: its forward pass may read them.
    """

    module: nn.Module
    kind: type[nn.Module]
    functions: tuple[tuple[str, Any, Any], ...]
    own: tuple[tuple[str, Any], ...]
    children: tuple[tuple[str, nn.Module], ...]
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, module: nn.Module) -> AsCut:
        """A module as it is now."""
        names = [name for name in ("forward", *ATTENTION_NAMES) if hasattr(type(module), name)]
        functions = [(name, getattr(type(module), name)) for name in names]
        return cls(
            module,
            type(module),
            tuple((name, function, attribute(function, "__code__")) for name, function in functions),
            tuple((name, vars(module).get(name)) for name in names),
            tuple(module.named_children()),
            tuple(
                (name, value)
                for name, value in vars(module).items()
                if isinstance(value, (bool, int, float, str)) and name not in OF_EVERY_MODULE
            ),
        )

    def holds(self) -> bool:
        """Whether the module still is so. Runs at every step: lean."""
        module, kind = self.module, self.kind
        if type(module) is not kind:
            return False
        own, children = vars(module), module._modules
        return (
            all(children.get(name) is child for name, child in self.children)
            and all(own.get(name) is value for name, value in self.own)
            and all(own.get(name) == value for name, value in self.settings)
            and all(
                (found := getattr(kind, name, None)) is function and getattr(found, "__code__", None) is code
                for name, function, code in self.functions
            )
        )


@dataclass(frozen=True)
class Piece:
    """A part of a block that can be recomputed by itself.

    Attributes:
        branch: what runs under the checkpoint.
        drop_path: what happens to the branch's output before it is added to the features; ``None`` where the piece is
            no residual: the branch's output is the piece's.
        per_image: whether the branch treats every image of a batch by itself, and draws for each by itself, so that it
            may run over parts of the batch.
        draws: of each tensor of random numbers that it draws in training mode, the axes in their order in memory, for
            more than one image (for a single one, a convolution may choose another order).
        effects: what running it changes, to be taken back when it is recomputed.
        cut: of a residual branch, the module that it is a part of.
        under_way: what it is called with beside features, of which a part of the batch takes its own items.
    """

    branch: Callable[[Tensor], Tensor]
    drop_path: Callable[[Tensor], Tensor] | None
    per_image: bool = True
    draws: tuple[tuple[int, ...], ...] = ()
    effects: Effects = NO_EFFECTS
    cut: AsCut | None = None
    under_way: UnderWay | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Run the piece plainly."""
        if self.drop_path is None:
            return self.branch(features)
        return features + self.drop_path(self.branch(features))


def whole_block(block: nn.Module, example: Tensor) -> Piece:
    """A block as one piece, for the whole batch at once; ``example`` enters it, [2 or more, ...]."""
    return Piece(block, None, per_image=False, effects=observed(block, example).effects_on(block))


def observed(module: nn.Module, example: Tensor) -> Observed:
    """What a module's forward pass changes in training mode, on an example [2 or more, ...]; nothing stays changed."""
    if example.is_meta:  # shapes alone: there is nothing to see, and nothing to run
        return observe_effects(module, module, example, foreign=False)

    def run() -> Observed:
        with torch.no_grad(), random_state_kept(), _one_thread():
            twin = _with_random_weights(copy_without_hooks(module)).train()
            return observe_effects(module, twin, example, foreign=is_foreign(module))

    return _remembered(_known_states, module, example, run)


def find_pieces(block: nn.Module, example: Tensor, *, halves: bool = True) -> list[Piece]:
    """Cut a block at its residual additions; the block and the random state are as before.

    Args:
        block: one block of a backbone.
        example: features that enter it, [2 or more, ...].
        halves: look for attention and MLP; otherwise only for how the block draws, so that it may run over chunks.

    Returns:
        Two or more pieces where the block's written form is known, else one: the whole block. That is also what a block
        is that has state (its effects are taken back as a whole) or hooks; and one on the meta device, of which only
        shapes are known.
    """
    seen = observed(block, example)
    if seen.parts or seen.draws or any(map(has_hooks, block.modules())):
        return [Piece(block, None, per_image=False, effects=seen.effects_on(block))]
    under_way = _under_way(block)
    if example.is_meta:
        return [Piece(block, None, per_image=not seen.mixes, under_way=under_way)]

    def run() -> dict[bool, _Cuts]:
        with torch.no_grad(), random_state_kept(), _one_thread():
            return _find_cuts(block, example)

    known = _remembered(_known_cuts, block, example, run)
    pieces: list[Piece] = []
    for step, (number, found) in zip(_steps(block), known[halves], strict=True):
        *candidates, whole = _candidates(step)
        cut = None if number == len(candidates) else AsCut.of(step.module if isinstance(step, Step) else step)
        for piece, same in zip([*candidates, whole][number], found, strict=True):
            per_image = same.per_image and not seen.mixes
            pieces.append(replace(piece, per_image=per_image, draws=same.draws, cut=cut, under_way=under_way))
    return pieces


def _under_way(block: nn.Module) -> UnderWay | None:
    """What a block knows of the batch under way, if it was found by watching."""
    return next((part.batch for part in block.modules() if isinstance(part, Called)), None)


T = TypeVar("T")


def _remembered(known: dict[Any, T], module: nn.Module, example: Tensor, find: Callable[[], T]) -> T:
    """What was found out about a module that is alike, or is now; modules that can't be compared are their own."""
    alike: Hashable | None = likeness(module)
    if alike is None:
        return find()
    key = alike, example.shape[1:], example.dtype, example.device.type
    if key not in known:
        known[key] = find()
    return known[key]


class _Found(NamedTuple):
    """What was found out about one piece."""

    per_image: bool
    draws: tuple[tuple[int, ...], ...]


_Cuts = list[tuple[int, list[_Found]]]  # for each step of a block: which candidate it is, and of what kind its pieces
_known_cuts: dict[Any, dict[bool, _Cuts]] = {}  # blocks that are alike are cut alike: one proof for all blocks of a ViT
_known_states: dict[Any, Observed] = {}


def _find_cuts(block: nn.Module, example: Tensor) -> dict[bool, _Cuts]:
    """How a block can be cut: with its halves looked for (key true), and only as a whole."""
    # Weights as they come would prove nothing: a norm or a layer scale that starts at zero hides its whole branch. So
    # does a buffer that is one in this block, and something else in another.
    twin = _with_random_weights(copy_without_hooks(block), buffers=True)
    cuts: dict[bool, _Cuts] = {True: [], False: []}
    for step in _steps(twin):
        *candidates, whole = _candidates(step)
        state = RandomState()
        step.train()
        outputs, noted, _ = _run_noting(whole, example)
        number, noted_of_halves = len(candidates), noted
        for n, pieces in enumerate(candidates):
            proved = _noted_if_same(step, pieces, example, (state, outputs))
            if proved is not None:
                number, noted_of_halves = n, proved
                break
        step.train()
        cuts[True].append((number, [_how_it_draws(*found) for found in noted_of_halves]))
        cuts[False].append((len(candidates), [_how_it_draws(*found) for found in noted]))
        example = outputs
    return cuts


def _steps(block: nn.Module) -> list[nn.Module]:
    return list(block) if isinstance(block, nn.Sequential) else [block]


def _with_random_weights(block: nn.Module, *, buffers: bool = False) -> nn.Module:
    for tensor in (*block.parameters(), *(block.buffers() if buffers else ())):
        if not tensor.is_floating_point():
            if tensor.is_complex():
                tensor.normal_()
        elif tensor.ndim > 1 and isinstance(tensor, nn.Parameter):
            bound = max(1, tensor[0].numel()) ** -0.5
            tensor.uniform_(-bound, bound)
        else:
            tensor.uniform_(0.5, 1.5)
    return block


def _candidates(step: nn.Module) -> Iterator[list[Piece]]:
    """Ways to cut one call of a timm module, the whole call last."""
    glue: list[Piece] = []
    module, args, kwargs, recomputed = step, (), {}, {}
    if isinstance(step, Step):
        module, args, kwargs = step.module, step.args, step.kwargs
        recomputed = dict(step.recomputed.items())
        if step.glue is not identity:
            glue = [Piece(step.glue, None)]
    if not (isinstance(step, Step) and step.unpack):
        for branches in _written_forms(module, args, kwargs, recomputed):
            yield [*glue, *(Piece(branch, drop) for branch, drop in branches)]
    yield [Piece(step, None)]


Form = list[tuple[Branch, Callable[[Tensor], Tensor]]]


def _written_forms(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, recomputed: Kwargs) -> Iterator[Form]:
    """The ways in which timm writes a block with two residual branches."""
    attention = next((found for name in ATTENTION_NAMES if (found := attribute(module, name)) is not None), None)
    mlp = attribute(module, "mlp")
    norms = [attribute(module, name) for name in ("norm1", "norm2")]
    if attention is None or mlp is None or None in norms:
        return
    drops = [attribute(module, f"drop_path{n}") or attribute(module, "drop_path") or identity for n in (1, 2)]
    scales = [next((n for n in names if attribute(module, n) is not None), None) for names in _SCALES]
    for mlp_args in dict.fromkeys(((), args)):
        inner = (
            {"inner": attention, "args": args, "kwargs": kwargs, "recomputed": recomputed},
            {"inner": mlp, "args": mlp_args},
        )
        for norm_first in (True, False):
            form: Form = []
            for number in (0, 1):
                scale = scales[number]
                layer_scale = attribute(module, scale) if scale else None
                after: list[Any] = [] if norm_first else [norms[number]]
                if isinstance(layer_scale, nn.Module):
                    after.append(layer_scale)
                branch = Branch(
                    before=norms[number] if norm_first else identity,
                    after=_Chain(after) if after else identity,
                    scale=(module, scale) if scale and isinstance(layer_scale, nn.Parameter) else None,
                    **inner[number],
                )
                form.append((branch, drops[number]))
            yield form


_SCALES = (("ls1", "gamma_1", "gamma1"), ("ls2", "gamma_2", "gamma2"))


@dataclass(frozen=True)
class _Chain:
    """Calls in a row; plain data, so that a copy of the model copies it too."""

    calls: Sequence[Callable[[Tensor], Tensor]]

    def __call__(self, features: Tensor) -> Tensor:
        for call in self.calls:
            features = call(features)
        return features


def _noted_if_same(
    step: nn.Module, pieces: Sequence[Piece], example: Tensor, given: tuple[RandomState, Tensor]
) -> list[_Noted] | None:
    """What `_run_noting` notes, if pieces give a step's bits: what it gave from a random state in training mode."""
    state, outputs = given
    try:
        step.train()
        state.restore()
        found, noted, shown = _run_noting(pieces, example)
        if not torch.equal(found, outputs):
            return None
        if not shown:
            step.eval()
            if not torch.equal(_run_pieces(pieces, example[:1]), step(example[:1])):
                return None
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError):  # the form was another block's
        return None
    return noted


def _run_pieces(pieces: Sequence[Piece], features: Tensor) -> Tensor:
    for piece in pieces:
        features = piece(features)
    return features


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with a single thread: for two images, more of them wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@final
class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that draws random numbers, and the shape for which it does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Any, tuple[int, ...]]] = []
        self.layouts: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run an operator."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        like = next((value for value in args if isinstance(value, Tensor)), torch.empty(0))
        before = RandomState()
        result = func(*args, **(kwargs or {}))
        if not before.same_torch(RandomState()):  # fused attention has the tag, and mostly no dropout
            self.seen.append((func, tuple(like.shape)))
            self.layouts.append(tuple(sorted(range(like.ndim), key=like.stride, reverse=True)))
        return result


_Noted = tuple[Piece, Tensor, _Draws]  # a piece, what entered it, and what it drew


def _run_noting(pieces: Sequence[Piece], features: Tensor) -> tuple[Tensor, list[_Noted], bool]:
    """Run pieces in order; note what each draws, and whether there is an image to which each added something."""
    noted = []
    shown = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for piece in pieces:
        version = features._version
        with _Draws() as draws:
            output = piece.branch(features)
        noted.append((piece, features, draws))
        if piece.drop_path is not None:
            if features._version != version:
                raise ValueError("the branch writes into what it receives, from which it couldn't be recomputed")
            output = piece.drop_path(output)
            shown &= output.flatten(1).any(1)
            output = features + output
        features = output
    return features, noted, bool(shown.any())


def _how_it_draws(piece: Piece, example: Tensor, drawn: _Draws) -> _Found:
    """How a piece draws: by image, or (dropout on a table of positions) once for the whole batch."""
    if not drawn.seen:
        return _Found(per_image=True, draws=())
    with _Draws() as one:
        piece.branch(example[:1])
    by_image = [
        (func, (len(example) * shape[0], *shape[1:]) if shape else None) for func, shape in one.seen
    ] == drawn.seen
    # On a processor only this operator's rows can be had without the others (``execution.checkpointing``).
    known = example.device.type != "cpu" or all(func is DRAW_OF_ROWS for func, _ in drawn.seen)
    return _Found(by_image and known, tuple(drawn.layouts))
