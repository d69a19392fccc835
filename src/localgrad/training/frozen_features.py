"""Features of frozen blocks, kept on disk: what never learns runs once for each augmented epoch that is kept.

Variant v of the features is made of epoch v of the data path, when it is first needed; epoch e of a run is trained on
variant ``e mod cached_epochs``. So a run sees few augmentations of each image, and features that were rounded to
bfloat16: that is a method of its own, and no mere way to run one. Validation images go through the whole model.

A cache tells the weights and the data that it was made of; one of others, missing or torn, is made again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import final

import torch

from localgrad.backbones.base import FrozenStem
from localgrad.errors import RecipeError, arg
from localgrad.formats import Json
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.step.local_step import autocast
from localgrad.training.augment import derive_seed
from localgrad.training.data import Batches
from localgrad.training.feature_cache import FeatureCache, Rows, open_cache, row_bytes, weights_digest, write_cache
from localgrad.training.fingerprint import identity_of

_PART = "train"


@final
class FrozenFeatures:
    """The training batches of a learner whose first blocks are frozen, from behind those.

    Args:
        learner: its stem is frozen.
        train: the batches of images.
        folder: for the cache.
        cached_epochs: augmented epochs that are kept.

    Raises:
        RecipeError: the blocks need more than features, which isn't kept.
    """

    def __init__(self, learner: LocalLearner, train: Batches, folder: Path, cached_epochs: int) -> None:
        stem = learner.backbone.stem
        assert isinstance(stem, FrozenStem), "`rules` ask for frozen blocks"
        if learner.backbone.trunk is not None:
            raise RecipeError(
                f"{arg('cache_frozen', value=True)}: the blocks of a model of another library may need what its stem "
                "makes beside features, which isn't kept; leave it out."
            )
        self.learner, self.train, self.folder, self.num_variants = learner, train, folder, cached_epochs
        self._stem = stem
        self._looks_at_images = any("images" in module.objective.uses for module in learner.modules)

    @property
    def num_bytes(self) -> int:
        """Of disk that all variants take."""
        train = self.train
        soft = train.augment is not None and train.augment.gives_soft_labels
        values = math.prod(self.learner.backbone.layouts[0].shape)
        rows = self.num_variants * len(train) * train.batch_size
        return rows * row_bytes(values, train.info.num_classes if soft else None)

    def epoch(self, epoch: int, start: int) -> Iterator[LocalBatch]:
        """The batches of an epoch from one on; while they are trained, the learner is given features."""
        variant = epoch % self.num_variants
        cache = self._cache_of(variant)
        images = self.train.epoch(variant, start=start) if self._looks_at_images else None
        with self._passing():
            for rows in cache.batches(_PART, self.train.device, start):
                seen = None if images is None else next(images).images
                batch = LocalBatch(seen, rows.labels, features=rows.features, targets=rows.targets, counts_all=True)
                del rows, seen  # what they hold is the step's to free
                yield batch

    def drop(self) -> None:
        """Delete what is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _passing(self) -> Iterator[None]:
        self._stem.passes = True
        try:
            yield
        finally:
            self._stem.passes = False

    def _cache_of(self, variant: int) -> FeatureCache:
        folder, identity = self.folder / f"frozen-{variant}", self._identity(variant)
        found = open_cache(folder, identity)
        if found is None:
            write_cache(folder, [(_PART, self._features(variant))], identity)
            found = open_cache(folder, identity, verify=False)
        assert found is not None, "what was just written can be read"
        return found

    @torch.no_grad()
    def _features(self, variant: int) -> Iterator[Rows]:
        for batch in self.train.epoch(variant):
            with autocast(self.train.device.type, self.learner.precision):
                features = self._stem(batch.images)
            yield Rows(features, batch.labels, batch.targets)

    def _identity(self, variant: int) -> dict[str, Json]:
        """All that features are made of: the frozen weights, and the data path."""
        return {
            "weights": weights_digest([self._stem]),
            "order": derive_seed(self.train.seed, "order", variant),
            "precision": self.learner.precision,
            "data": self._data,
        }

    @cached_property
    def _data(self) -> dict[str, Json]:
        return identity_of(self.train)
