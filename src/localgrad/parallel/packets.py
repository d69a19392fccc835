"""What goes from rank to rank in a step, in bytes: the planner's view of ``wire.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localgrad.partition import Boundaries


@dataclass(frozen=True, kw_only=True)
class Packets:
    """What goes from rank to rank in a step, in bytes: features, labels, and what objectives further on look at.

    Attributes:
        num_ranks: modules, one a rank.
        features: of what enters each block, and the tail.
        images: of the images.
        labels: of the labels.
        pooled: of what enters each block as later modules' context, or zeros.
        uses: what objectives of modules that are not the first look at: ``images``, ``previous``, ``context`` or
            ``gradient``; the last module, trained on the task alone, looks at the latter two only.
    """

    num_ranks: int
    features: Sequence[int]
    images: int
    labels: int
    pooled: Sequence[int]
    uses: frozenset[str]

    def into(self, rank: int, boundaries: Boundaries) -> int:
        """Bytes of the packet that a rank gets from the one before; 0 for the first."""
        if rank == 0:
            return 0
        before = self.features[boundaries[rank - 2]] if rank > 1 else self.images
        return self._packet(rank, boundaries[rank - 1], before, [self.pooled[edge] for edge in boundaries[:rank]])

    def at_most_into(self, rank: int, start: int) -> int:
        """The same at its largest, where it is known only where the rank's own blocks start.

        What the rank before received and the context depend on boundaries further ahead: of these the largest counts.
        """
        if rank == 0:
            return 0
        before = max(self.features[rank - 1 : start]) if rank > 1 else self.images
        return self._packet(rank, start, before, [max(self.pooled[1 : start + 1])] * rank)

    def _packet(self, rank: int, start: int, before: int, context: Sequence[int]) -> int:
        total = self.features[start] + self.labels
        if rank < self.num_ranks - 1:
            total += self.images if "images" in self.uses else 0
            total += before if "previous" in self.uses else 0
        total += self.features[start] if "gradient" in self.uses else 0
        return total + (sum(context) if "context" in self.uses else 0)
