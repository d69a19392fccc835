"""Terms that shape a module's features beside what they are to tell: transport, and similarity matching."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.backbones.base import Layout
from localgrad.objectives.auxiliary import mask_at, mean_of
from localgrad.objectives.base import Term, TermValue, in_float32, one_hot
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.losses import IGNORED


class Transport(Term):
    """The transport penalty of TRGL (arXiv 2309.17357, section 3): residual blocks should move features little.

    ``sum over blocks of mean((what the block gives - what it received) ** 2) / (2 tau)``: the larger tau, the freer.
    What branches add is the difference of a block's output and input; blocks that change the shape (where a Swin stage
    begins) don't count, and neither does the tail. The paper's squared norm is a sum over positions and channels; this
    is their mean, so that one tau serves every resolution; of sequences over tokens that aren't padding.
    """

    def __init__(self, tau: float, *, has_padding: bool = False, ends_in_tail: bool = False) -> None:
        super().__init__()
        self.tau = tau
        self.ends_in_tail = ends_in_tail
        self.uses = frozenset({"states", *(("mask",) * has_padding)})

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the penalty. Arguments as in ``Term.forward``."""
        total = torch.zeros((), device=outputs.device)
        for before, after in pairwise(states if self.ends_in_tail else (*states, outputs)):
            if before.shape == after.shape and "mask" in self.uses:
                total = total + _mean_square(in_float32(after) - in_float32(before), batch)
            elif before.shape == after.shape:
                total = total + F.mse_loss(in_float32(after), in_float32(before))
        return TermValue(total / (2 * self.tau))


class BranchTransport(Term):
    """The transport penalty as TRGL charges it (arXiv 2309.17357, section 3): per residual branch.

    ``sum over branches of mean(branch output ** 2) / (2 tau)``, attention and MLP apart, each after its layer scale and
    before its drop path. As in ``Transport`` a mean stands for the paper's squared norm.
    """

    def __init__(self, tau: float, *, has_padding: bool = False) -> None:
        super().__init__()
        self.tau = tau
        self.uses = frozenset({"branches", *(("mask",) * has_padding)})

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the penalty. Arguments as in ``Term.forward``."""
        total = torch.zeros((), device=outputs.device)
        for branch in batch.branches:
            masked = "mask" in self.uses
            total = total + (_mean_square(branch.float(), batch) if masked else branch.float().square().mean())
        return TermValue(total / (2 * self.tau))


def _mean_square(moved: Tensor, batch: LocalBatch) -> Tensor:
    """Of the numbers of tokens [B, N, D] that aren't padding."""
    counts = mask_at(batch.mask, moved.shape[1]).unsqueeze(-1)
    mean = (moved.square() * counts).sum() / (counts.sum() * moved.shape[-1]).clamp(min=1)
    return mean if batch.token_factor is None else mean * batch.token_factor.to(mean.dtype)


class SimilarityMatching(Term):
    """Similarity matching (Nokland and Eidnes, arXiv 1901.06656, section 2.2): images that share a class look alike.

    The mean squared difference of two B x B matrices of cosine similarities: of the labels (one-hot, centred), and of
    the standard deviations over all positions of a linear map of the features (centred). Images whose label is ignored
    (-100) have no part in it.

    Args:
        source: layout of the module's output features.
        num_classes: classes, to make class indices into one-hot rows.
        width: of the linear map; by default the features' own.
        has_padding: whether features are sequences, of which padding is left out.
    """

    def __init__(
        self, source: Layout, num_classes: int, *, width: int | None = None, has_padding: bool = False
    ) -> None:
        super().__init__()
        self.uses = frozenset(("mask",) * has_padding)
        self.source = source
        self.num_classes = num_classes
        self.project = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width or source.width))

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the loss. Arguments as in ``Term.forward``."""
        mapped = in_float32(self.project(self.source.to_grid(outputs)).flatten(1, 2))
        if self.uses:
            variance = mean_of((mapped - mean_of(mapped, batch.mask).unsqueeze(1)).square(), batch.mask)
        else:
            variance = mapped.var(dim=1, unbiased=False)
        spread = (variance + 1e-6).sqrt()
        targets = one_hot(batch.labels, self.num_classes)
        with torch.autocast(outputs.device.type, enabled=False):
            if batch.labels.is_floating_point():
                return TermValue(F.mse_loss(_similarities(spread), _similarities(targets)))
            counted = (batch.labels != IGNORED).float()
            # Pairs of an ignored image are 0 on both sides: what is left of the mean is one over all other pairs.
            loss = F.mse_loss(_similarities(spread, counted), _similarities(targets))
            return TermValue(loss * (len(counted) / counted.sum().clamp(min=1.0)).square())


def _similarities(rows: Tensor, counted: Tensor | None = None) -> Tensor:
    """Cosine similarities of centred rows, [B, D] to [B, B]; 0 of those that don't count."""
    unit = F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
    if counted is not None:
        unit = unit * counted.unsqueeze(1)
    return unit @ unit.T
