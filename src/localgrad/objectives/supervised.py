"""Terms that use the labels: the task loss, and the supervised contrastive loss.

Both take class indices or soft targets (mixup and cutmix make those).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.backbones.base import Layout
from localgrad.errors import RecipeError, arg
from localgrad.objectives.auxiliary import Classifier, Pool, TrainedHead
from localgrad.objectives.base import Term, TermValue, in_float32, one_hot
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.losses import CROSS_ENTROPY, IGNORED, WHOLE, Loss, TokenLoss, in_chunks


class TaskLoss(Term):
    """Cross-entropy of a classifier on the module's output.

    Of class indices, the mean over the images whose label isn't ignored (-100); of a batch in parts as well.

    Args:
        classifier: maps the module's output to logits; the identity for the last module, whose output they are.
        label_smoothing: from 0 to 1; soft targets come smoothed already and are taken as they are.
        teacher_share: share of the loss that is cross-entropy with the averaged model's own class probabilities
            (distillation, Hinton et al., arXiv 1503.02531, section 2, at temperature 1).
        loss: of the task.
        has_padding: whether features are sequences, of which a classifier is told what is padding.

    Logits of tokens that are more than ``losses.WHOLE`` numbers are made chunk by chunk, and then there are none to
    look at.
    """

    def __init__(
        self,
        classifier: nn.Module,
        label_smoothing: float = 0.0,
        teacher_share: float = 0.0,
        loss: Loss = CROSS_ENTROPY,
        *,
        has_padding: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.classifier = classifier
        self.label_smoothing = label_smoothing
        self.teacher_share = teacher_share
        self.takes_mask = has_padding and isinstance(classifier, Classifier) and classifier.takes_mask
        self.uses = frozenset(("teacher",) * bool(teacher_share) + ("mask",) * self.takes_mask)
        if has_padding and isinstance(classifier, Classifier) and not (self.takes_mask or loss.names_tokens):
            warnings.warn(
                f"{arg('classifier')}: {type(classifier).__name__} isn't told which tokens are padding; set "
                "takes_mask = True, and let forward(features, mask) pass over them.",
                stacklevel=2,
            )

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the cross-entropy. Arguments as in ``Term.forward``."""
        logits, loss = self._loss(outputs, batch)
        is_share = batch.labels_counted is not None
        if self.teacher_share:
            assert batch.teacher is not None, "the learner asks the teacher where a term uses it"
            assert logits is not None, "a teacher is of classes of items"
            taught = F.cross_entropy(in_float32(logits), batch.teacher)
            if is_share and batch.share is not None:
                taught = taught * batch.share
            loss = (1 - self.teacher_share) * loss + self.teacher_share * taught
        return TermValue(loss, logits, is_share)

    def _loss(self, outputs: Tensor, batch: LocalBatch) -> tuple[Tensor | None, Tensor]:
        """The logits, where all of them are made at once, and the loss.

        Of a part of a batch in which labels may not count, the sum over the part divided by what counts in the whole: a
        part may hold none, and a mean over none is no number.
        """
        head, loss, counted = self.classifier, self.loss, batch.labels_counted
        if isinstance(head, TrainedHead) and isinstance(loss, TokenLoss) and loss.names_tokens:
            vectors = head.embed(outputs, batch.mask if self.takes_mask else None)
            if vectors[..., 0].numel() * head.num_classes > WHOLE:
                labels, smoothing = batch.labels, self.label_smoothing
                classes = head.num_classes
                chunked = in_chunks(
                    loss, head.score, vectors, labels, classes, label_smoothing=smoothing, counted=counted
                )
                return None, chunked
            logits = head.score(vectors)
        else:
            logits = self.classify(outputs, batch.mask if self.takes_mask else None)
        scores = in_float32(logits)
        if counted is None:
            return logits, loss(scores, batch.labels, label_smoothing=self.label_smoothing)
        assert isinstance(loss, TokenLoss), "others count all their labels alike"
        rows = loss.aligned(scores, batch.labels) if loss.names_tokens else (scores, batch.labels)
        return logits, loss.summed(*rows, self.label_smoothing) / counted

    def classify(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Class logits [B, num_classes], or [B, N, num_classes] of tokens."""
        head = self.classifier
        logits = cast(Tensor, head(outputs, mask) if self.takes_mask else head(outputs))
        if isinstance(head, Classifier):
            of = "[B, N, num_classes]" if self.loss.names_tokens else "[B, num_classes]"
            if logits.ndim != of.count(",") + 1 or logits.shape[-1] != head.num_classes or len(logits) != len(outputs):
                raise RecipeError(
                    f"{arg('classifier')}: {type(head).__name__} gave {list(logits.shape)}; give {of}, "
                    f"B being {len(outputs)} and num_classes {head.num_classes} here."
                )
        return logits

    def follow(self) -> None:
        """Let the classifier follow what it follows."""
        if isinstance(self.classifier, Classifier):
            self.classifier.follow()


class SupervisedContrastive(Term):
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, equation 2) on a projection of pooled features.

    For every anchor i, with z the normalised projections and t the temperature:
    ``-mean over positives p of log(exp(z_i.z_p / t) / sum over a != i of exp(z_i.z_a / t))``.
    With soft targets a pair is positive to the degree that its targets overlap. Anchors without a positive in
    the batch don't count; images whose label is ignored (-100) have no part in it.

    Args:
        source: layout of the module's output features.
        width: of the projection.
        temperature: t.
        num_classes: classes, to make class indices into one-hot rows.
        has_padding: whether features are sequences, of which padding is left out.
    """

    def __init__(
        self,
        source: Layout,
        num_classes: int,
        *,
        width: int = 128,
        temperature: float = 0.1,
        has_padding: bool = False,
    ) -> None:
        super().__init__()
        self.uses = frozenset(("mask",) * has_padding)
        pool = Pool(source)
        self.project = nn.Sequential(
            pool, nn.Linear(pool.width, source.width), nn.GELU(), nn.Linear(source.width, width)
        )
        self.temperature = temperature
        self.num_classes = num_classes

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the contrastive loss. Arguments as in ``Term.forward``."""
        pool, *layers = self.project
        pooled = pool(outputs, batch.mask if self.uses else None)
        for layer in layers:
            pooled = layer(pooled)
        z = F.normalize(in_float32(pooled), dim=1)
        with torch.autocast(z.device.type, enabled=False):  # exp of bf16 similarities is too coarse
            return TermValue(self.loss(z, batch.labels))

    def loss(self, z: Tensor, labels: Tensor) -> Tensor:
        """The loss of unit vectors z [B, width]; labels [B] or [B, num_classes]."""
        soft = one_hot(labels, self.num_classes)
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        if not labels.is_floating_point():
            others = others & (labels != IGNORED)
        positives = (soft @ soft.T) * others
        similarities = (z @ z.T / self.temperature).masked_fill(~others, float("-inf"))
        log_shares = F.log_softmax(similarities, dim=1).masked_fill(~others, 0.0)
        num_positives = positives.sum(dim=1)
        losses = -(positives * log_shares).sum(dim=1) / num_positives.clamp(min=1e-6)
        counted = (num_positives > 1e-6).float()
        return (losses * counted).sum() / counted.sum().clamp(min=1.0)
