"""Activation checkpointing of blocks and of their halves: recompute in the backward pass what would be kept.

Calling a timm model's blocks one by one passes by timm's own ``grad_checkpointing`` flag, so it is done here, with
PyTorch's non-reentrant checkpoint. It restores the random state, so dropout and drop path draw the same numbers
twice. What it does not undo is a batch norm's running statistics, which a second forward would move a second
time; with zero momentum during the recomputation they stay, and checkpointing changes nothing but time and memory.

A half of a block (``_halves.Piece``) can run over chunks of the batch, each under its own checkpoint::

    features ──┬── chunk 0 ── branch ──┐
               ├── chunk 1 ── branch ──┼── drop path ── + ── features
               └── chunk 2 ── branch ──┘                │
               └────────────────────────────────────────┘

so in the backward pass only one chunk's inner activations are alive. Exact forward and backward: what a branch computes
for an image does not depend on the others (but for the last bits, where a kernel rounds otherwise for fewer rows), and
weight gradients are sums over images (in another order of summation).
The drop path draws once for the whole batch. Dropout inside a branch draws, on a processor, for the whole batch too and
keeps the chunk's rows, so that the numbers are those of the plain block; on other devices each chunk draws its own. A
branch that draws once for all images (dropout on a table of positions) is run on the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from localgrad._fake import TorchDispatchMode
from localgrad._halves import DRAW_OF_ROWS, Piece

Part = Callable[[Tensor], Tensor]


class Recomputed:
    """A block as its module runs it in training: from its input, or from the inputs of its pieces, in chunks.

    Args:
        pieces: the block's pieces in order; the whole block as a single one for checkpointing by blocks.
        chunks: parts of the batch that each piece runs over.
    """

    def __init__(self, pieces: Sequence[Piece], chunks: int = 1) -> None:
        self.pieces = tuple(pieces)
        self.chunks = chunks

    def __call__(self, features: Tensor) -> Tensor:
        """Features [B, ...] to features."""
        for piece in self.pieces:
            features = _run(piece, features, self.chunks)
        return features


def run_telling_branches(
    pieces: Sequence[Piece], features: Tensor, recomputed: Recomputed | None, branches: list[Tensor]
) -> Tensor:
    """Run a block's pieces, and tell what each residual branch gives, before its drop path.

    Args:
        pieces: the block's.
        features: what enters the first of them.
        recomputed: how the block is recomputed, if it is.
        branches: takes the outputs of residual branches, in order.
    """
    for piece in pieces:
        output = piece.branch(features) if recomputed is None else _branch(piece, features, recomputed.chunks)
        if piece.drop_path is None:
            features = output
        else:
            branches.append(output)
            features = features + piece.drop_path(output)  # not in place: the branch's output is looked at
    return features


def _branch(piece: Piece, features: Tensor, chunks: int) -> Tensor:
    chunks = min(chunks, len(features)) if piece.per_image else 1
    return checkpointed(piece.branch, features) if chunks == 1 else _over_chunks(piece, features, chunks)


def _run(piece: Piece, features: Tensor, chunks: int) -> Tensor:
    output = _branch(piece, features, chunks)
    if piece.drop_path is None:
        return output
    output = piece.drop_path(output)
    return output.add_(features) if _is_fresh(output, features) else features + output


def _is_fresh(output: Tensor, features: Tensor) -> bool:
    """Whether the branch's output may be written into: nobody saved it, and the sum has its type."""
    return output is not features and not output.is_leaf and output._base is None and output.dtype == features.dtype


def _over_chunks(piece: Piece, features: Tensor, chunks: int) -> Tensor:
    parts = features.chunk(chunks)
    if not (piece.draws and features.device.type == "cpu"):
        return torch.cat([checkpointed(piece.branch, part) for part in parts])
    state = torch.get_rng_state()
    outputs, start = [], 0
    for part in parts:
        torch.set_rng_state(state)  # every chunk draws the whole batch's numbers, and keeps its rows
        outputs.append(checkpointed(_WithRowsOf(piece, start, len(part), len(features)), part))
        start += len(part)
    return torch.cat(outputs)


class _WithRowsOf:
    """A branch whose random draws are rows of those for a whole batch."""

    def __init__(self, piece: Piece, start: int, length: int, total: int) -> None:
        self.piece, self.rows = piece, (start, length, total)

    def __call__(self, features: Tensor) -> Tensor:
        with _RowsOfDraws(*self.rows, self.piece.draws):
            return self.piece.branch(features)


class _RowsOfDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws every Bernoulli mask for the whole batch, and gives the chunk's rows of it."""

    def __init__(self, start: int, length: int, total: int, layouts: Sequence[Sequence[int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start, self.length, self.total = start, length, total
        self.layouts = iter(layouts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
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


def checkpointed(block: Part, inputs: Tensor) -> Tensor:
    """Run ``block(inputs)``, keeping only ``inputs`` for the backward pass."""
    if getattr(block, "keeps_inputs_only", False):  # by itself: a stand-in of ``planning.parts``
        result: Tensor = block(inputs)
        return result
    modules = block.modules() if isinstance(block, nn.Module) else ()
    norms = [module for module in modules if isinstance(module, _BatchNorm)]
    if not norms:
        recomputed: Tensor = checkpoint(block, inputs, use_reentrant=False)
        return recomputed
    still: Tensor = checkpoint(
        block, inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _still_statistics(norms))
    )
    return still


@contextlib.contextmanager
def _still_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Keep running statistics where they are during a recomputation."""
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
