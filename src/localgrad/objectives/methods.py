"""The methods by name: each an ``Objective`` that composes terms.

========================= ============================================== ===========================
objective                 terms of every local module but the last       source
========================= ============================================== ===========================
``FeatureReconstruction`` task loss, reconstruction of the module's input arXiv 2212.14215
``ImageReconstruction``   task loss, reconstruction of the image          InfoPro, arXiv 2101.10832
``GreedySupervised``      task loss                                       arXiv 1812.11446, 1901.08164
``Contrastive``           supervised contrastive, image reconstruction    InfoPro's other form
========================= ============================================== ===========================

Whatever the objective, the last local module is trained on the task loss of the model's own tail: it is what
end-to-end training would do with those blocks, and with one local module the whole is end-to-end training.

The copies of arXiv 2212.14215 that can be had don't tell its loss weights; those here are ours.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from localgrad.auxiliary import build_classifier, build_decoder
from localgrad.errors import RecipeError, did_you_mean
from localgrad.objectives.base import LocalObjective, Site, Term, Weight
from localgrad.objectives.reconstruction import Reconstruction
from localgrad.objectives.supervised import SupervisedContrastive, TaskLoss

Options = Mapping[str, Any]


class Objective(ABC):
    """Description of a local objective, without shapes; ``build`` makes the objective of one local module.

    Attributes:
        label_smoothing: of every task loss, also the last module's; from 0 to 1.
    """

    label_smoothing: float

    @abstractmethod
    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the terms of every local module but the last, by name, each with its weight."""

    def build(self, site: Site) -> LocalObjective:
        """Make the objective of the local module at ``site``.

        Raises:
            RecipeError: a weight is no number or negative, every weight is zero, or label smoothing isn't in [0, 1).
        """
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(f"label_smoothing must be from 0 to below 1, got {self.label_smoothing}.")
        if site.is_last:
            return LocalObjective({"task": TaskLoss(nn.Identity(), self.label_smoothing)}, {"task": 1.0})
        weighted = {name: (_at(site, name, weight), term) for name, (weight, term) in self.terms(site).items()}
        for name, (weight, _) in weighted.items():
            if weight < 0:
                raise RecipeError(f"weight of {name!r} is {weight} in local module {site.index}; it can't be negative.")
        kept = {name: pair for name, pair in weighted.items() if pair[0] > 0}
        if not kept:
            raise RecipeError(
                f"local module {site.index} has nothing to learn: every weight of {type(self).__name__} is 0."
            )
        return LocalObjective(
            {name: term for name, (_, term) in kept.items()}, {name: weight for name, (weight, _) in kept.items()}
        )


@dataclass(frozen=True, kw_only=True)
class GreedySupervised(Objective):
    """Each module is trained on its auxiliary classifier's task loss alone.

    Attributes:
        classifier: auxiliary classifier: ``linear``, ``mlp`` or ``transformer``.
        classifier_options: keyword arguments of that classifier.
        task_weight: weight of the task loss.
        label_smoothing: of every task loss, also the last module's.
    """

    classifier: str = "mlp"
    classifier_options: Options = field(default_factory=dict)
    task_weight: Weight = 1.0
    label_smoothing: float = 0.0

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the task term."""
        classifier = build_classifier(self.classifier, site.outputs, site.num_classes, self.classifier_options)
        return {"task": (self.task_weight, TaskLoss(classifier, self.label_smoothing))}


@dataclass(frozen=True, kw_only=True)
class FeatureReconstruction(GreedySupervised):
    """The method of arXiv 2212.14215: task loss, and reconstruction of the features that the module received.

    The first module received the image, so it reconstructs its pixels.

    Attributes:
        decoder: auxiliary decoder: ``linear``, ``conv`` or ``transformer``.
        decoder_options: keyword arguments of that decoder.
        reconstruction_weight: weight of the reconstruction error.
        normalise_targets: layer-normalise each position of feature targets (never of pixels).
    """

    decoder: str = "linear"
    decoder_options: Options = field(default_factory=dict)
    reconstruction_weight: Weight = 1.0
    normalise_targets: bool = True

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the task term and the reconstruction term."""
        decoder = build_decoder(self.decoder, site.outputs, site.inputs, self.decoder_options)
        features = site.index > 0
        term = Reconstruction(decoder, of_image=False, normalise=features and self.normalise_targets)
        return super().terms(site) | {"reconstruction": (self.reconstruction_weight, term)}


@dataclass(frozen=True, kw_only=True)
class ImageReconstruction(GreedySupervised):
    """InfoPro on transformers: task loss, and reconstruction of the image by every module.

    Attributes:
        decoder: auxiliary decoder: ``linear``, ``conv`` or ``transformer``.
        decoder_options: keyword arguments of that decoder.
        reconstruction_weight: weight of the reconstruction error.
    """

    decoder: str = "linear"
    decoder_options: Options = field(default_factory=dict)
    reconstruction_weight: Weight = 1.0

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the task term and the reconstruction term."""
        decoder = build_decoder(self.decoder, site.outputs, site.image, self.decoder_options)
        term = Reconstruction(decoder, of_image=True, normalise=False)
        return super().terms(site) | {"reconstruction": (self.reconstruction_weight, term)}


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """InfoPro's contrastive form: supervised contrastive loss, and reconstruction of the image.

    Its early modules have no classifier, so no accuracy of their own is reported.

    Attributes:
        decoder: auxiliary decoder: ``linear``, ``conv`` or ``transformer``.
        decoder_options: keyword arguments of that decoder.
        reconstruction_weight: weight of the reconstruction error; 0 leaves the decoder out.
        contrastive_weight: weight of the contrastive loss.
        temperature: of the contrastive loss.
        label_smoothing: of the last module's task loss.
    """

    decoder: str = "linear"
    decoder_options: Options = field(default_factory=dict)
    reconstruction_weight: Weight = 1.0
    contrastive_weight: Weight = 1.0
    temperature: float = 0.1
    label_smoothing: float = 0.0

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        """Make the contrastive term and the reconstruction term."""
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"temperature of the contrastive loss must be above 0, got {self.temperature}.")
        contrastive = SupervisedContrastive(site.outputs, site.num_classes, temperature=self.temperature)
        decoder = build_decoder(self.decoder, site.outputs, site.image, self.decoder_options)
        reconstruction = Reconstruction(decoder, of_image=True, normalise=False)
        return {
            "contrastive": (self.contrastive_weight, contrastive),
            "reconstruction": (self.reconstruction_weight, reconstruction),
        }


OBJECTIVES: Mapping[str, type[Objective]] = {
    "feature": FeatureReconstruction,
    "image": ImageReconstruction,
    "greedy": GreedySupervised,
    "contrastive": Contrastive,
}


def _at(site: Site, name: str, weight: Weight) -> float:
    try:
        value = site.weight(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise RecipeError(
            f"weight of {name!r} is {weight!r}; give a number, or two to go from the first local module to the last, "
            "such as [1.0, 0.5]."
        )
    return value


def build_objective(name: str, options: Options) -> Objective:
    """Make an objective by name, as recipes do.

    Args:
        name: ``feature``, ``image``, ``greedy`` or ``contrastive``.
        options: keyword arguments of its class.

    Raises:
        RecipeError: unknown name, or options that this objective doesn't take.
    """
    if name not in OBJECTIVES:
        raise RecipeError(
            f"objective: unknown {name!r}; there are {', '.join(OBJECTIVES)}.{did_you_mean(name, OBJECTIVES)}"
        )
    try:
        return OBJECTIVES[name](**options)
    except TypeError as error:
        raise RecipeError(f"objective {name!r} can't take {dict(options)} ({error}).") from error
