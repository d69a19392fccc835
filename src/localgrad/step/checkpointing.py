"""Activation checkpointing of blocks and of their halves: recompute in the backward pass what would be kept.

Calling a timm model's blocks one by one passes by timm's own ``grad_checkpointing`` flag, so it is done here, with
PyTorch's non-reentrant checkpoint. It restores the random state, so dropout and drop path draw the same numbers
twice. A block that writes state (``observe_effects``) is recomputed as a whole, from its state before the first pass,
which afterwards is as the first pass left it: checkpointing changes nothing but time and memory.

A half of a block (``halves.Piece``) can run over chunks of the batch, each under its own checkpoint::

    features ──┬── chunk 0 ── branch ──┐
               ├── chunk 1 ── branch ──┼── drop path ── + ── features
               └── chunk 2 ── branch ──┘                │
               └────────────────────────────────────────┘

so in the backward pass only one chunk's inner activations are alive. Exact forward and backward, but for rounding: what
a branch computes for an image does not depend on the others, and weight gradients are sums over images.
The drop path draws once for the whole batch. Dropout inside a branch draws, on a processor, for the whole batch too and
keeps the chunk's rows, so that the numbers are those of the plain block; on other devices each chunk draws its own. A
branch that draws once for all images (dropout on a table of positions) is run on the whole batch.

A block runs as a whole where it, or anything in it, has hooks, and where it is no longer what was cut (another forward,
another child). So hooks see what they see in the plain block, and once more in the recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localgrad.backbones.effects import NO_EFFECTS, Effects
from localgrad.backbones.fake import TorchDispatchMode
from localgrad.backbones.halves import DRAW_OF_ROWS, Piece
from localgrad.backbones.hooks import has_hooks, hooks_on_all
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.watching import UnderWay
from localgrad.errors import RecipeError

Part = Callable[[Tensor], Tensor]


@final
class Recomputed:
    """A block as its module runs it in training: from its input, or from the inputs of its pieces, in chunks.

    Args:
        pieces: the block's pieces in order; the whole block as a single one for checkpointing by blocks.
        chunks: parts of the batch that each piece runs over.
        block: the block, to be run as it is where the pieces aren't it any more; ``None`` for pieces of nothing.
    """

    def __init__(self, pieces: Sequence[Piece], chunks: int = 1, block: nn.Module | None = None) -> None:
        self.pieces = tuple(pieces)
        self.chunks = chunks
        self.block = block
        self._cuts = tuple({id(piece.cut): piece.cut for piece in self.pieces if piece.cut is not None}.values())

    def __call__(self, features: Tensor) -> Tensor:
        """Features [B, ...] to features.

        Raises:
            RecipeError: the block wrote a buffer that it didn't write when it was observed.
        """
        if self.block is None:
            return run_pieces(self.pieces, features, self.chunks)
        parts = list(self.block.modules())
        is_as_cut = not (hooks_on_all() or any(map(has_hooks, parts))) and all(cut.holds() for cut in self._cuts)
        pieces = self.pieces if is_as_cut else (self._whole(self.block),)
        if torch.compiler.is_compiling():
            return run_pieces(pieces, features, self.chunks)
        buffers = self._left_alone(parts)
        features = run_pieces(pieces, features, self.chunks)
        for part, name, buffer, version in buffers:
            if buffer._version != version:
                raise RecipeError(
                    f"checkpoint: {type(self.block).__name__} is recomputed, and now its forward pass writes the "
                    f"buffer {name} of {type(part).__name__}, which it didn't when the learner was made; it would be "
                    "written twice. Take checkpoint='none'."
                )
        return features

    def _whole(self, block: nn.Module) -> Piece:
        first = self.pieces[0]
        return Piece(block, None, per_image=False, effects=first.effects if first.branch is block else NO_EFFECTS)

    def _left_alone(self, parts: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Buffers that a forward pass isn't known to write, and their versions."""
        written = {id(part) for piece in self.pieces for part in (*piece.effects.parts, *piece.effects.norms)}
        return [
            (part, name, buffer, buffer._version)
            for part in parts
            if part._buffers and id(part) not in written
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]


def run_pieces(
    pieces: Sequence[Piece], features: Tensor, chunks: int | None, branches: list[Tensor] | None = None
) -> Tensor:
    """Run a block's pieces in order, features [B, ...] to features.

    Each is recomputed over so many chunks of the batch; with ``None`` nothing is. ``branches`` takes what each residual
    branch gives, before its drop path.
    """
    for piece in pieces:
        output = piece.branch(features) if chunks is None else _branch(piece, features, chunks)
        if piece.drop_path is not None:
            if branches is not None:
                branches.append(output)
            output = piece.drop_path(output)
            is_free = branches is None and _is_fresh(output, features)  # what a branch gave may be looked at
            output = output.add_(features) if is_free else features + output
        features = output
    return features


def _branch(piece: Piece, features: Tensor, chunks: int) -> Tensor:
    chunks = min(chunks, len(features)) if piece.per_image else 1
    return checkpointed(piece.branch, features, piece.effects) if chunks == 1 else _over_chunks(piece, features, chunks)


def _is_fresh(output: Tensor, features: Tensor) -> bool:
    """Whether the branch's output may be written into: nobody saved it, and the sum has its type."""
    return output is not features and not output.is_leaf and output._base is None and output.dtype == features.dtype


def _over_chunks(piece: Piece, features: Tensor, chunks: int) -> Tensor:
    parts = features.chunk(chunks)
    draws = piece.draws and features.device.type == "cpu"
    state = torch.get_rng_state() if draws else None
    outputs, start = [], 0
    for part in parts:
        run = piece.branch
        if state is not None:
            torch.set_rng_state(state)  # every chunk draws the whole batch's numbers, and keeps its rows
            run = partial(_with_rows_of, piece, start, len(features))
        if piece.under_way is not None:
            run = partial(in_context_of, piece.under_way, start, run)
        outputs.append(checkpointed(run, part))
        start += len(part)
    return torch.cat(outputs)


def in_context_of(under_way: UnderWay, start: int, run: Part, part: Tensor) -> Tensor:
    """Run something on some items of the batch under way, with their own masks and positions."""
    with under_way.of_rows(start, start + len(part)):
        return run(part)


def _with_rows_of(piece: Piece, start: int, total: int, part: Tensor) -> Tensor:
    """A branch whose random draws are rows of those for a whole batch."""
    with _RowsOfDraws(start, len(part), total, piece.draws):
        return piece.branch(part)


@final
class _RowsOfDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws every Bernoulli mask for the whole batch, and gives the chunk's rows of it."""

    def __init__(self, start: int, length: int, total: int, layouts: Sequence[Sequence[int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start, self.length, self.total = start, length, total
        self.layouts = iter(layouts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run an operator; replace the draw of a mask."""
        if func is not DRAW_OF_ROWS:
            return func(*args, **(kwargs or {}))
        mask, *probability = args
        repeats = len(mask) // self.length  # windows of an image stand one after another in the first dimension
        # As bytes: the draws don't depend on the type, and a whole batch's mask is the largest tensor here. In the
        # whole mask's order of memory, for in that order numbers are drawn.
        layout = next(self.layouts, range(mask.ndim))
        whole = torch.empty_permuted((self.total * repeats, *mask.shape[1:]), tuple(layout), dtype=torch.bool)
        func(whole, *probability, **(kwargs or {}))
        return mask.copy_(whole[self.start * repeats : (self.start + self.length) * repeats])


def checkpointed(block: Part, inputs: Tensor, effects: Effects = NO_EFFECTS) -> Tensor:
    """Run ``block(inputs)``, keeping only ``inputs`` for the backward pass, and the state that its effects change."""
    if getattr(block, "keeps_inputs_only", False):  # by itself: a stand-in of ``planning.parts``
        result: Tensor = block(inputs)
        return result
    recomputed: Tensor
    if effects:
        recomputed = checkpoint(block, inputs, use_reentrant=False, context_fn=effects.contexts)
    else:  # said in two calls: the compiler can't follow a context that is chosen
        recomputed = checkpoint(block, inputs, use_reentrant=False)
    return recomputed
