"""The health log: figures of each local module that say where accuracy is lost, measured between epochs, by option.

========================= ======================================================================================
``local_accuracy``        of the module's own classifier, on validation images (from ``EpochEnded``); not of the last
                          module where an average of the weights is kept, which is what is validated there
``reconstruction_error``  of its decoder, over the epoch (from ``EpochEnded``)
``gradient_cosine``       between the gradient that it is trained with and the one end-to-end training would give it
``linear_probe_accuracy`` of a ridge classifier fitted to its pooled features, on validation images
``cka``                   how like its features are to those of an end-to-end run at the same depth, from 0 to 1
========================= ======================================================================================

What can't be measured is left out. Probes read training and validation images, not augmented, never the test set.
Everything is in float32, in evaluation mode, of the weights as they are trained (not their average), and leaves the
learner and the random state as they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from localgrad.backbones.base import Backbone, Layout
from localgrad.backbones.hooks import copy_without_hooks
from localgrad.backbones.state import left_as_it_was
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.step.executor import walk
from localgrad.step.states import check_weights, load_weights
from localgrad.training.data import Batches, stratified_choice
from localgrad.training.events import EpochEnded, HealthMeasured

NUM_IMAGES = 1024
"""Images that a linear probe is fitted to, and as many that it is read on."""
GRADIENT_IMAGES = 64
"""Images whose gradients are compared."""


@final
class HealthCheck:
    """Measures the health of a learner's modules after some of a run's epochs.

    A check takes the memory of one module's plain step on at most 64 images (nothing is recomputed) or of eight images
    through the whole model, beside the whole model's gradient; with a reference, once, that of a second model.

    Args:
        learner: the one that is trained.
        train: training batches; of their images, some are taken, spread over the classes.
        val: validation batches, or ``None``: then there is no linear probe.
        every: how many epochs from one check to the next; the last epoch is always checked.
        num_images: of each part, for features.
        reference: weights of the same model trained end-to-end, on the processor, for CKA.

    Raises:
        CheckpointError: the reference is of another model.
    """

    def __init__(
        self,
        learner: LocalLearner,
        train: Batches,
        val: Batches | None,
        every: int,
        *,
        num_images: int = NUM_IMAGES,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.learner = learner
        self.every = every
        self._train = _plain_batches(train, num_images, train.batch_size)
        self._val = None if val is None else _plain_batches(val, num_images, train.batch_size)
        few = min(GRADIENT_IMAGES, train.batch_size)
        self._probe = _plain_batches(train, few, few)
        self._reference = None if reference is None else dict(reference)
        self._reference_features: list[Tensor] | None = None
        if self._reference is not None:
            check_weights(learner.model, self._reference)

    def shrink(self) -> str | None:
        """Have the next checks need about half as much, and say how; ``None`` where nothing needs less.

        Features don't depend on how many images are looked at together. Gradients are compared on half as many images.
        """
        if self._probe.batch_size == 1:
            return None
        for batches in (self._train, self._val, self._probe):
            if batches is not None:
                batches.batch_size = max(1, batches.batch_size // 2)
        return f"{self._train.batch_size} images at a time, gradients of {self._probe.batch_size}"

    def is_due(self, epoch: int, num_epochs: int) -> bool:
        """Whether to measure after an epoch, from 0; in sequential mode, there are so many of every module."""
        return (epoch + 1) % self.every == 0 or (epoch + 1) % num_epochs == 0

    def __call__(self, ended: EpochEnded) -> HealthMeasured:
        """Measure, after an epoch, whose own figures are taken over.

        Where one module is trained alone, those after it are left out, and gradients are compared when the last one's
        turn has come.
        """
        num_modules = len(self.learner.modules) if ended.module is None else ended.module + 1
        figures: list[dict[str, float | None]] = [
            {"local_accuracy": accuracy, "reconstruction_error": losses.get("reconstruction")}
            for accuracy, losses in zip(ended.val_module_accuracy, ended.losses, strict=True)
        ]
        if self.learner.averaged_model is not None:
            figures[-1]["local_accuracy"] = None
        if num_modules == len(figures):
            batch = next(self._probe.epoch(0))
            cosines = gradient_cosine(self.learner, LocalBatch(batch.images, batch.labels))
            for own, cosine in zip(figures, cosines, strict=True):
                own["gradient_cosine"] = cosine
        for own, features in zip(figures, self._features(num_modules), strict=False):
            own.update(features)
        return HealthMeasured(
            epoch=ended.epoch,
            modules=tuple(
                {name: value for name, value in own.items() if value is not None and math.isfinite(value)}
                for own in figures
            ),
        )

    def _features(self, num_modules: int) -> list[dict[str, float]]:
        """Linear probe and CKA of the first modules."""
        stops = [span.stop for span in self.learner.plan.spans]
        with _at_rest(self.learner):
            if self._reference is not None:  # the same images at every check: its features are made once
                reference = copy_without_hooks(self.learner.backbone)
                load_weights(reference.model, self._reference)
                self._reference, self._reference_features = None, pooled_features(reference, stops, self._train)[0]
                del reference
            stops = stops[:num_modules]
            ours, labels = pooled_features(self.learner.backbone, stops, self._train)
            found: list[dict[str, float]] = [{} for _ in ours]
            if self._val is not None:
                theirs, val_labels = pooled_features(self.learner.backbone, stops, self._val)
                for own, x, y in zip(found, ours, theirs, strict=True):
                    own["linear_probe_accuracy"] = linear_probe(x, labels, y, val_labels)
        for own, x, y in zip(found, ours, self._reference_features or (), strict=False):
            own["cka"] = linear_cka(x, y)
        return found


def gradient_cosine(learner: LocalLearner, batch: LocalBatch, *, chunk: int = 8) -> list[float]:
    """How far each local module's own gradient points where the end-to-end gradient points.

    The gradient of the module's local objective, and that of the task loss through all modules (the last module's
    objective on the model's logits), over those trainable parameters of the model that the module owns: its auxiliary
    nets, which the task loss doesn't know, are left out. The end-to-end part goes over a few images at a time, and its
    whole gradient is kept while the modules run theirs. An offloaded model is measured on the processor.

    Args:
        learner: with or without optimizers.
        batch: images and labels; 64 images will do.
        chunk: images at a time in the end-to-end part, at most; it changes no result.

    Returns:
        A cosine for each module; nan where a gradient is zero or the module has no trainable parameter of the model.
    """
    of_model = set(map(id, learner.model.parameters()))
    found = []
    learner.route.begin(batch, learner)
    with _at_rest(learner) as device, torch.enable_grad():
        batch = batch.to(device)
        whole = _end_to_end_gradient(learner, batch, chunk)
        for visit in walk(learner.modules, batch, learner.route):
            own = [parameter for parameter in learner.parameters(visit.index) if id(parameter) in of_model]
            output = visit.module(visit.received, batch)
            visit.hand_on(output.features)
            gradient = _gradient(output.loss, own)
            del output  # with it the module's graph
            found.append(_cosine(gradient, [whole[id(parameter)] for parameter in own]))
    return found


def _end_to_end_gradient(learner: LocalLearner, batch: LocalBatch, chunk: int) -> dict[int, Tensor]:
    """The gradient of the task loss, by id of the parameter."""
    parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    batch.loss = learner.loss  # which says how much each label counts
    for part in batch.parts(-(-len(batch.labels) // chunk)):
        logits = learner.backbone(part.features)
        loss = learner.modules[-1].objective(part.features, logits, part).loss
        for done, gradient in zip(total, _gradient(loss, parameters), strict=True):
            done.add_(gradient)
    return {id(parameter): gradient for parameter, gradient in zip(parameters, total, strict=True)}


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """As ``loss.backward()`` gives it, but nobody's ``grad`` is touched; zero for parameters that aren't used."""
    if not parameters:
        return ()
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def _cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    if not ours:
        return math.nan
    x, y = (torch.cat([gradient.flatten().cpu().double() for gradient in side]) for side in (ours, theirs))
    return float((x @ y) / (x.norm() * y.norm()))  # 0 / 0 is nan


@torch.no_grad()
def pooled_features(backbone: Backbone, stops: Sequence[int], batches: Batches) -> tuple[list[Tensor], Tensor]:
    """A model's features after so many blocks each (increasing), one vector an image.

    Returns:
        [N, width] for each stop, and class indices [N], on the processor.
    """
    device = next(backbone.parameters()).device
    rows: list[list[Tensor]] = [[] for _ in stops]
    labels = []
    for batch in batches.epoch(0):
        features = backbone.stem(batch.images.to(device))
        for number, block in enumerate(backbone.blocks[: stops[-1]], start=1):
            features = block(features)
            if number in stops:
                rows[stops.index(number)].append(pool(backbone.layouts[number], features).float().cpu())
        labels.append(batch.targets.cpu())
    return [torch.cat(parts) for parts in rows], torch.cat(labels)


def pool(layout: Layout, features: Tensor) -> Tensor:
    """Mean over the grid, beside the class and register tokens where there are any: [B, width]."""
    mean = layout.to_grid(features).mean(dim=(1, 2))
    prefix = layout.prefix(features)
    return mean if prefix is None else torch.cat([mean, prefix.flatten(1)], dim=1)


def linear_probe(
    features: Tensor, labels: Tensor, val_features: Tensor, val_labels: Tensor, *, ridge: float = 0.1
) -> float:
    """Accuracy, from 0 to 1, of a linear classifier on standardised features: ridge regression to one-hot targets.

    Args:
        features: [N, width], to fit to.
        labels: class indices [N].
        val_features: [M, width], to read the accuracy on.
        val_labels: class indices [M].
        ridge: penalty, as a share of the features' own (unit) variance.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=ridge * len(features)))
    probe.fit(features.double().numpy(), labels.numpy())
    return float(probe.score(val_features.double().numpy(), val_labels.numpy()))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment, from 0 to 1, of two models' features of the same images: [N, width] each.

    Kornblith et al., arXiv 1905.00414, section 3: ``|Y'X|^2 / (|X'X| |Y'Y|)`` with Frobenius norms and centred columns;
    it doesn't change with rotations and scales of either. nan where one side's features are all alike.
    """
    x, y = (side.double() - side.double().mean(dim=0) for side in (x, y))
    shared: Tensor = torch.linalg.matrix_norm(y.T @ x) ** 2
    return float(shared / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))


def _plain_batches(batches: Batches, num_images: int, batch_size: int) -> Batches:
    """Some images, spread over all classes, in order and not augmented."""
    chosen, _ = stratified_choice(
        batches.images.labels, min(num_images, len(batches.images)), leave_one=False, seed=batches.seed
    )
    return batches.plain(batches.images.subset(chosen), batch_size)


@contextlib.contextmanager
def _at_rest(learner: LocalLearner) -> Iterator[torch.device]:
    """Have a learner in evaluation mode, all of it on one device; afterwards it and the random state are as before."""
    nets = (learner.model, *learner.modules)
    modes = [(module, module.training) for net in nets for module in net.modules()]
    learner.eval()  # which brings the modules of an offloading learner home
    device = next(learner.model.parameters()).device
    try:
        with left_as_it_was(*nets), torch.autocast(device.type, enabled=False):
            yield device
    finally:
        for module, mode in modes:
            module.training = mode
