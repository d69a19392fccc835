"""The memory of evaluation, predicted on fake tensors; and the batch with which it needs no more than is there.

Evaluation keeps no activations for a backward pass, but its batches need not be those of training: with a large one it
needs more than a step whose modules recompute. How many images are looked at together changes no accuracy, so the
batch is what fits.
"""

from __future__ import annotations

import torch

from localgrad.estimating import _bare
from localgrad.learner import LocalLearner
from localgrad.memory.track import simulate
from localgrad.objectives.carried import made_up

LARGEST_EVALUATION_BATCH = 256


def estimate_evaluation(learner: LocalLearner, batch_size: int, device: torch.device | None = None) -> int:
    """Bytes that the evaluation of one batch takes beside weights, and whatever else is there: images included.

    Args:
        learner: as it is evaluated; it is not touched.
        batch_size: images.
        device: that it is evaluated on; by default the one where it is.
    """
    profile = simulate(
        _bare(learner),
        lambda fake: _evaluate(fake, batch_size),
        inputs={},
        device="cuda" if (device or learner.device).type == "cuda" else "cpu",
    )
    return profile.peak_bytes - profile.static_bytes


def _evaluate(learner: LocalLearner, batch_size: int) -> None:
    """What ``training.trainer.evaluate`` does with a batch."""
    learner.eval()
    with torch.no_grad():
        batch = made_up(learner.backbone, torch.empty(batch_size, 0))
        inputs = batch.given or batch.features
        logits = list(learner.logits(inputs))
        if learner.averaged_model is not None:
            logits[-1] = learner.averaged_logits(inputs)


def evaluation_batch(
    learner: LocalLearner,
    room_bytes: int,
    device: torch.device | None = None,
    *,
    largest: int = LARGEST_EVALUATION_BATCH,
) -> int:
    """The largest evaluation batch, a power of two, that takes no more than some room; 1 where none does.

    Args:
        learner: as it is evaluated.
        room_bytes: beside weights, optimizer state and whatever else stays: what a training step may take beside them.
        device: that it is evaluated on; by default the one where it is.
        largest: no more images than this.
    """
    size = largest
    while size > 1:
        needed = estimate_evaluation(learner, size, device)
        if needed <= room_bytes:
            break
        guess = size * max(room_bytes, 0) // needed  # it grows about evenly with the images
        size = 1 << min(size // 2, max(guess, 1)).bit_length() - 1
    return size
