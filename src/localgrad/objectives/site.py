"""Where in the model a local module stands: all that an objective needs to know to be built."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from localgrad.backbones.base import Layout
from localgrad.objectives.losses import CROSS_ENTROPY, Loss

Weight = float | tuple[float, float]
"""Weight of a term: one number, or (first, last) to interpolate linearly from the first local module to the
last but one (InfoPro, arXiv 2101.10832, section 4, interpolates so)."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where in the model a local module stands; all that an objective needs to know to be built.

    Attributes:
        index: number of the module, from 0.
        num_modules: how many there are.
        inputs: layout of what the module receives (for the first one, the image).
        outputs: layout of what its last block gives.
        image: layout of the image: NCHW.
        num_classes: classes of the task.
        states: layouts of what enters each of its blocks.
        previous: layout of what the module before received; the first module's own input there.
        context: layouts of what each earlier module hands on.
        following: the blocks after it, each with the layout of what it gives.
        tail: the model's own end, behind its last block.
        undecayed: ids of the model's parameters that it leaves weight decay off.
        loss: of the task.
        head: the last layer of the model's own end, where the last module hands it what it takes, chunk by chunk.
    """

    index: int
    num_modules: int
    inputs: Layout
    outputs: Layout
    image: Layout
    num_classes: int
    states: tuple[Layout, ...] = ()
    previous: Layout | None = None
    context: tuple[Layout, ...] = ()
    following: tuple[tuple[nn.Module, Layout], ...] = ()
    tail: nn.Module | None = None
    undecayed: frozenset[int] = frozenset()
    loss: Loss = CROSS_ENTROPY
    head: nn.Linear | None = None

    @property
    def is_last(self) -> bool:
        """Whether this module ends in the model's own tail."""
        return self.index == self.num_modules - 1

    @property
    def has_padding(self) -> bool:
        """Whether features are sequences, of which some tokens may be padding."""
        return self.outputs.kind == self.image.kind == "sequence"

    def weight(self, weight: Weight) -> float:
        """The value of a weight at this depth."""
        if isinstance(weight, (int, float)):
            return float(weight)
        first, last = weight
        return first + (last - first) * min(1.0, self.index / max(1, self.num_modules - 2))
