"""Where the parts of ``pipelining.py`` begin: as asked for, or balanced by seconds measured here, or by memory."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence

import torch
from pipelining_workers import LOCAL, Stopwatch, adamw, objective_of
from torch import nn

from localgrad.backbones.base import Backbone, Layout
from localgrad.errors import RecipeError
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import Objective
from localgrad.partition import Boundaries, balance, balance_by, check_boundaries
from localgrad.partitioning import activation_bytes
from localgrad.step.local_module import site_of


def choose_boundaries(options: argparse.Namespace, backbone: Backbone, count: int) -> Boundaries:
    """As asked for, or balanced over the blocks; for local modules with their auxiliary nets, exactly.

    Args:
        options: of the command.
        backbone: the model.
        count: parts wanted.
    """
    if options.boundaries is not None:
        boundaries = check_boundaries(options.boundaries, len(backbone.blocks))
        if len(boundaries) != count - 1:
            raise RecipeError(
                f"boundaries: {list(boundaries)} make {len(boundaries) + 1} parts, but {count} are wanted (a process "
                f"each, or --modules); give {count - 1} of them, or --balance time."
            )
        return boundaries
    if count == 1:
        return ()
    if options.balance == "memory":  # of one batch in flight; 1F1B keeps more of them the earlier the stage
        return balance(activation_bytes(backbone), count)
    if options.method in LOCAL:
        return local_boundaries(backbone, objective_of(options), count, batch_size=options.batch_size)
    images = torch.randn(options.batch_size // options.microbatches, *backbone.input_size)
    return balance(_microseconds(block_seconds(backbone, images)), count)


def local_boundaries(backbone: Backbone, objective: Objective, count: int, *, batch_size: int) -> Boundaries:
    """Those with the least seconds of the slowest local module: its blocks, its auxiliary nets, their update."""
    num_blocks = len(backbone.blocks)
    images = torch.randn(batch_size, *backbone.input_size)
    blocks = _microseconds(block_seconds(backbone, images, updates=True))
    heads: dict[tuple[Layout | None, Layout, int], int] = {}  # few, since few blocks' features differ in shape

    def cost(start: int, stop: int) -> int:
        found = sum(blocks[start:stop])
        if stop == num_blocks:
            return found  # the model's own tail, which is timed with the last block
        follows = stop if getattr(objective, "classifier", "") == "next" else 0
        kind = (backbone.layouts[start] if start else None, backbone.layouts[stop], follows)
        if kind not in heads:
            heads[kind] = _microseconds([head_seconds(backbone, objective, start, stop, batch_size)])[0]
        return found + heads[kind]

    return balance_by(cost, num_blocks, count)


def block_seconds(backbone: Backbone, images: torch.Tensor, *, repeats: int = 3, updates: bool = False) -> list[float]:
    """Forward and backward of each block, least of a few; the stem counts to the first, the tail to the last.

    Args:
        backbone: the model; it stays as it is.
        images: [B, C, H, W].
        repeats: the least of so many is taken.
        updates: time the optimizer's step as well.
    """
    backbone = copy.deepcopy(backbone)  # gradients and batch statistics stay away from the weights that are trained
    parts = [backbone.stem, *backbone.blocks, backbone.tail]
    optimizers = [_optimizer(part) if updates else None for part in parts]
    least = [math.inf] * len(parts)
    for _ in range(repeats):
        features = images
        for number, (part, optimizer) in enumerate(zip(parts, optimizers, strict=True)):
            clock = Stopwatch()
            inputs = features.detach().requires_grad_(number > 0)
            with clock.running():
                features = part(inputs)
                features.backward(torch.ones_like(features))
                if optimizer is not None:
                    optimizer.step()
            part.zero_grad()
            least[number] = min(least[number], clock.seconds)
    stem, *blocks, tail = least
    blocks[0] += stem
    blocks[-1] += tail
    return blocks


def head_seconds(
    backbone: Backbone, objective: Objective, start: int, stop: int, batch_size: int, *, repeats: int = 3
) -> float:
    """Forward, backward and update of the auxiliary nets of a run of blocks that isn't the last; least of a few."""
    boundaries = (start, stop) if start else (stop,)
    head = objective.build(site_of(backbone, boundaries, len(boundaries) - 1)).train()
    optimizer = _optimizer(head)
    inputs = torch.randn(batch_size, *(backbone.layouts[start].shape if start else backbone.input_size))
    batch = LocalBatch(inputs, torch.zeros(batch_size, dtype=torch.int64))
    least = math.inf
    for _ in range(repeats):
        outputs = torch.randn(batch_size, *backbone.layouts[stop].shape, requires_grad=True)
        clock = Stopwatch()
        with clock.running():
            head(inputs, outputs, batch).loss.backward()
            if optimizer is not None:
                optimizer.step()
        least = min(least, clock.seconds)
    return least


def _optimizer(part: nn.Module) -> torch.optim.Optimizer | None:
    parameters = list(part.parameters())
    return adamw(parameters) if parameters else None


def _microseconds(seconds: Sequence[float]) -> list[int]:
    return [round(1e6 * value) for value in seconds]
