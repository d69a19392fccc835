"""What a learner keeps beside the model and its optimizers, for loops that save those two in files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localgrad.backbones.namespaces import Attributes
from localgrad.errors import CheckpointError
from localgrad.formats import check_format
from localgrad.learner import LocalLearner

FORMAT = 1


def remaining_state(learner: LocalLearner) -> Attributes:
    """Auxiliary nets, loss scales, the average of weights, the count of steps, and what they belong to."""
    state: Attributes = {**learner.state_dict()}
    del state["model"], state["optimizers"]
    return {**state, "format": FORMAT}


def load_remaining_state(learner: LocalLearner, state: Mapping[str, Any]) -> None:
    """Take up what ``remaining_state`` gave; model and optimizers stay as they are.

    Raises:
        CheckpointError: it is of other local modules, or of a newer version.
    """
    check_format("checkpoint", state.get("format"), FORMAT, CheckpointError)
    own = learner.state_dict()
    whole: Any = {**state, "model": own["model"], "optimizers": own["optimizers"]}
    learner.load_state_dict(whole)
