"""Activation checkpointing of one block: recompute in the backward pass instead of keeping activations.

Calling a timm model's blocks one by one passes by timm's own ``grad_checkpointing`` flag, so it is done here, with
PyTorch's non-reentrant checkpoint. It restores the random state, so dropout and drop path draw the same numbers
twice. What it does not undo is a batch norm's running statistics, which a second forward would move a second
time; with zero momentum during the recomputation they stay, and checkpointing changes nothing but time and memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(block: nn.Module, inputs: Tensor) -> Tensor:
    """Run ``block(inputs)``, keeping only ``inputs`` for the backward pass."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return cast(Tensor, checkpoint(block, inputs, use_reentrant=False))
    return cast(
        Tensor,
        checkpoint(
            block,
            inputs,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _still_statistics(norms)),
        ),
    )


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
