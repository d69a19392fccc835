"""What the task is: a loss of logits and labels, the same for every local module's classifier and the model's own end.

==================== =========================================== =======================================
name                 logits, labels                              loss
==================== =========================================== =======================================
``cross-entropy``    [B, K], int64 [B] or soft [B, K];           cross-entropy, labels of -100 left out
                     [B, N, K], int64 [B, N]: per token
``next-token``       [B, N, K], int64 [B, N], not shifted        cross-entropy of logits n, label n + 1
``binary``           [B, K], 0 to 1 [B, K]: several at once      binary cross-entropy, mean over classes
``regression``       [B, K], floats [B, K] or [B]                mean squared error
==================== =========================================== =======================================

Means are over what counts: images or tokens whose label isn't ignored; of a batch that is cut into parts as well.

Shapes: B batch, N tokens, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor

from localgrad.errors import RecipeError, did_you_mean

IGNORED = -100
"""The class index of images and tokens that no loss counts, as in ``torch.nn.functional.cross_entropy``."""


class Loss(ABC):
    """A loss of logits and labels.

    Attributes:
        is_of_classes: whether labels are classes: an index for each image, or soft ones.
        needs_classes: whether there have to be two of them.
        names_tokens: whether there is a label for each token.
    """

    is_of_classes = True
    needs_classes = True
    names_tokens = False

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss, a scalar; logits in float32."""

    def counted(self, labels: Tensor) -> Tensor | None:
        """How many labels count, a scalar on the device; ``None`` where all do."""
        return None

    def label_shape(self, num_items: int, backbone: Any) -> tuple[int, ...]:
        """Of the labels of a batch; of token ids one each."""
        return (num_items, *backbone.input_size[:1]) if self.names_tokens else (num_items,)


@final
class CrossEntropy(Loss):
    """Of class indices or soft targets; with logits of tokens [B, N, K], of a class for each token."""

    def __init__(self, weight: Tensor | None = None, *, per_token: bool = False) -> None:
        self.weight = weight
        self.names_tokens = per_token
        self.is_of_classes = not per_token

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy."""
        if self.names_tokens:
            logits, labels = logits.flatten(0, 1), labels.flatten()
        smoothing = 0.0 if labels.is_floating_point() else label_smoothing
        weight = None if self.weight is None else self.weight.to(logits)
        return F.cross_entropy(logits, labels, weight, label_smoothing=smoothing)

    def counted(self, labels: Tensor) -> Tensor | None:
        """How many labels aren't ignored."""
        return None if labels.is_floating_point() else (labels != IGNORED).sum()


@final
class NextToken(Loss):
    """Cross-entropy of each token's logits with the token behind it; labels are the tokens themselves."""

    is_of_classes = False
    names_tokens = True

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, shifted."""
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=label_smoothing)

    def counted(self, labels: Tensor) -> Tensor | None:
        """How many labels aren't ignored; the first of each sequence is no one's next."""
        return (labels[:, 1:] != IGNORED).sum()


@final
class Binary(Loss):
    """Binary cross-entropy: several classes at once."""

    is_of_classes = False
    needs_classes = False

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean over images and classes."""
        smoothed = labels.to(logits) * (1 - label_smoothing) + 0.5 * label_smoothing
        return F.binary_cross_entropy_with_logits(logits, smoothed)

    def label_shape(self, num_items: int, backbone: Any) -> tuple[int, ...]:
        """[B, K]."""
        return (num_items, backbone.num_classes)


@final
class Regression(Loss):
    """Mean squared error."""

    is_of_classes = False
    needs_classes = False

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean over all numbers."""
        wanted = labels.to(logits).reshape(logits.shape) if labels.numel() == logits.numel() else labels.to(logits)
        return F.mse_loss(logits, wanted)

    def label_shape(self, num_items: int, backbone: Any) -> tuple[int, ...]:
        """[B, K]."""
        return (num_items, backbone.num_classes)


@final
class OwnFunction(Loss):
    """A user's own function of (logits, labels), which gives a scalar."""

    is_of_classes = False
    needs_classes = False

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """What the function gives."""
        return self.function(logits, labels)


CROSS_ENTROPY = CrossEntropy()
LOSSES: dict[str, Callable[[], Loss]] = {
    "cross-entropy": CrossEntropy,
    "per-token": lambda: CrossEntropy(per_token=True),
    "next-token": NextToken,
    "binary": Binary,
    "regression": Regression,
}


def loss_of(loss: str | Loss | Callable[[Tensor, Tensor], Tensor] | None, backbone: Any) -> Loss:
    """A loss by name, or of a function; by default what the model is made for.

    Causal language models of transformers say so themselves (``loss_type``); other logits of tokens are taken one by
    one.

    Raises:
        RecipeError: there is none of that name.
    """
    if loss is None:
        if getattr(backbone.model, "loss_type", None) == "ForCausalLM":
            return NextToken()
        return CrossEntropy(per_token=backbone.names_tokens)
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise RecipeError(f"loss: unknown {loss!r}; take {', '.join(LOSSES)}.{did_you_mean(loss, LOSSES)}")
        return LOSSES[loss]()
    if not callable(loss):
        raise RecipeError(f"loss: got {loss!r}; give a name ({', '.join(LOSSES)}) or a function of logits and labels.")
    return OwnFunction(loss)
