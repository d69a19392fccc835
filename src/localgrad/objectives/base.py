"""What a local module is trained on: a weighted sum of named terms, built for the module's place in the model.

Two halves. An ``Objective`` is what the user writes: a small immutable description with no shapes in it
(``FeatureReconstruction(decoder="conv")``). ``Objective.build`` turns it into a ``LocalObjective`` for one
``Site``: an ``nn.Module`` that owns the auxiliary nets, so that a local module has one ``parameters()``, and
export simply drops the objective. This file has what both halves need; the objectives by name are in ``methods.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor, nn

from localgrad.backbone import Layout

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
    """

    index: int
    num_modules: int
    inputs: Layout
    outputs: Layout
    image: Layout
    num_classes: int

    @property
    def is_last(self) -> bool:
        """Whether this module ends in the model's own tail."""
        return self.index == self.num_modules - 1

    def weight(self, weight: Weight) -> float:
        """The value of a weight at this depth."""
        if isinstance(weight, (int, float)):
            return float(weight)
        first, last = weight
        return first + (last - first) * min(1.0, self.index / max(1, self.num_modules - 2))


@dataclass
class LocalBatch:
    """What a local objective may look at besides the features that enter and leave the module.

    Attributes:
        images: [B, C, H, W], normalised; ``None`` once no later module needs them.
        labels: class indices [B], or soft targets [B, num_classes] (mixup, cutmix).
    """

    images: Tensor | None
    labels: Tensor


class TermValue(NamedTuple):
    """One term's loss, and the class logits [B, num_classes] where computing it makes any."""

    loss: Tensor
    logits: Tensor | None = None


class Term(nn.Module, ABC):
    """One term of a local objective; owns the auxiliary net that it needs."""

    uses_images = False
    """Whether the term looks at ``batch.images``."""

    @abstractmethod
    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch) -> TermValue:
        """Compute the term.

        Args:
            inputs: what the module received, detached; the image for the first module.
            outputs: what its last block gave (the model's logits for the last module).
            batch: image and labels.

        Returns:
            A scalar loss, in float32, and logits where there are any.
        """

    def classify(self, outputs: Tensor) -> Tensor | None:
        """Class logits [B, num_classes] from the module's outputs, ``None`` for a term that has no classifier."""
        return None


class ObjectiveValue(NamedTuple):
    """The total loss (a scalar with a graph), each term's own unweighted loss, and logits where there are any."""

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None


class LocalObjective(nn.Module):
    """The weighted sum of named terms that one local module is trained on.

    Args:
        terms: by name, in the order in which they are computed.
        weights: factor of each term, by the same names.
    """

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, float]) -> None:
        super().__init__()
        assert terms.keys() == weights.keys(), "each term has a weight"
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch) -> ObjectiveValue:
        """Compute every term and their weighted sum. Arguments as in ``Term.forward``."""
        values: dict[str, TermValue] = {name: term(inputs, outputs, batch) for name, term in self.terms.items()}
        losses = [_scaled(value.loss, self.weights[name]) for name, value in values.items()]
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        logits = next((value.logits for value in values.values() if value.logits is not None), None)
        return ObjectiveValue(total, {name: value.loss for name, value in values.items()}, logits)

    @property
    def uses_images(self) -> bool:
        """Whether a term looks at the images of the batch."""
        return any(cast(Term, term).uses_images for term in self.terms.values())

    def classify(self, outputs: Tensor) -> Tensor | None:
        """Class logits from the module's outputs; ``None`` where no term has a classifier."""
        for term in self.terms.values():
            logits = cast(Term, term).classify(outputs)
            if logits is not None:
                return logits
        return None


def _scaled(loss: Tensor, weight: float) -> Tensor:
    return loss if weight == 1.0 else loss * weight  # keeps a lone task loss free of one more node
