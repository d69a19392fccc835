"""The sequential executor: local modules one after another, in one process.

::

    batch t     module 0            module 1            module 2
                F L B U free  --->  F L B U free  --->  F L B U free       --> StepResult
                              detached features

F forward, L loss, B backward, U clip and update. At any time at most one module has activations and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from localgrad.execution.local_step import LocalStep
from localgrad.objectives.base import LocalBatch


@dataclass(frozen=True)
class StepResult:
    """What one training step gives; every tensor is detached and on the training device.

    Attributes:
        logits: the whole model's class logits [B, num_classes], before this step's update.
        losses: each local module's total loss, scalars.
        terms: each local module's terms by name, unweighted, scalars.
        module_logits: each local module's own class logits; ``None`` where it has no classifier.
    """

    logits: Tensor
    losses: tuple[Tensor, ...]
    terms: tuple[dict[str, Tensor], ...]
    module_logits: tuple[Tensor | None, ...]


class SequentialExecutor:
    """Runs the steps of all local modules in order.

    Args:
        steps: one for each local module, first to last.
    """

    def __init__(self, steps: Sequence[LocalStep]) -> None:
        self.steps = tuple(steps)

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """Train every local module on one batch.

        Args:
            images: [B, C, H, W], normalised.
            labels: class indices [B], or soft targets [B, num_classes].
        """
        batch = LocalBatch(images, labels)
        features = images
        losses, terms, logits = [], [], []
        for step in self.steps:
            output = step(features, batch)
            features = output.features
            losses.append(output.loss)
            terms.append(output.terms)
            logits.append(output.logits)
            del output  # or the features would outlive the next module's forward pass
        return StepResult(features, tuple(losses), tuple(terms), tuple(logits))
