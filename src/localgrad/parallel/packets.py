"""Bytes of what goes from rank to rank in a step, for plans with one local module a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import final

import torch

from localgrad.backbones.base import Layout
from localgrad.objectives.carried import Carried, Route
from localgrad.objectives.site import Site
from localgrad.partition import Boundaries


@final
class Packets:
    """Packets of any partition: features, labels, and what objectives further on look at.

    Args:
        num_ranks: modules, one a rank.
        layouts: of what enters each block, and the tail.
        image: layout of the images.
        num_classes: classes of the task.
        num_images: of a batch.
        dtype: of images and features.
        labels: bytes of the labels, and of masks and positions beside the features.
        uses: what the objectives of modules that are neither first nor last look at.
        last_uses: what that of the last one looks at.
        rounded: bytes that the allocator gives for some.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        layouts: Sequence[Layout],
        image: Layout,
        num_classes: int,
        num_images: int,
        dtype: torch.dtype,
        labels: int,
        uses: Iterable[str],
        last_uses: Iterable[str],
        rounded: Callable[[int], int] = lambda nbytes: nbytes,
    ) -> None:
        self.num_ranks = num_ranks
        self.layouts = tuple(layouts)
        self.image, self.num_classes = image, num_classes
        self.num_images, self.dtype, self.labels = num_images, dtype, labels
        self.rounded = rounded
        middle = frozenset(uses)
        self.route = Route([middle] * (num_ranks - 1) + [frozenset(last_uses)])
        self.at_most_into = cache(self._at_most_into)

    def into(self, rank: int, boundaries: Boundaries) -> int:
        """Bytes of the packet that a rank gets from the one before; 0 for the first."""
        if rank == 0:
            return 0
        received = [self.image, *(self.layouts[edge] for edge in boundaries)]
        site = self._site(rank, received[rank], received[rank - 1], tuple(received[1 : rank + 1]))
        carried = sum(sum(self._nbytes(what, site)) for what in self.route.into(rank))
        return self._features(site.inputs) + self.labels + carried

    def _at_most_into(self, rank: int, start: int) -> int:
        """The same at its largest, where it is known only where the rank's own blocks start.

        What the rank before received, and what earlier ones handed on, depends on boundaries further ahead: of these
        the largest counts.
        """
        if rank == 0:
            return 0
        inputs = self.layouts[start]
        befores = dict.fromkeys(self.layouts[rank - 1 : start]) if rank > 1 else [self.image]
        earlier = dict.fromkeys(self.layouts[1 : start + 1])
        total = self._features(inputs) + self.labels
        for what in self.route.into(rank):
            if what.grows:
                ends = [self._site(rank, inputs, before, (layout,)) for before in befores for layout in earlier]
                total += rank * max(sum(self._nbytes(what, site)) for site in ends)
            else:
                sites = [self._site(rank, inputs, before, ()) for before in befores]
                total += max(sum(self._nbytes(what, site)) for site in sites)
        return total

    def _site(self, rank: int, inputs: Layout, previous: Layout, context: tuple[Layout, ...]) -> Site:
        return Site(
            index=rank,
            num_modules=self.num_ranks,
            inputs=inputs,
            outputs=inputs,
            image=self.image,
            num_classes=self.num_classes,
            previous=previous,
            context=context,
        )

    def _features(self, layout: Layout) -> int:
        return self.rounded(self.num_images * torch.Size(layout.shape).numel() * self.dtype.itemsize)

    def _nbytes(self, what: Carried, site: Site) -> list[int]:
        return [self.rounded(nbytes) for nbytes in what.nbytes(site, self.num_images, self.dtype)]
