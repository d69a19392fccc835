"""What the task is: a loss of logits and labels, the same for every local module's classifier and the model's own end.

==================== =========================================== =======================================
name                 logits, labels                              loss
==================== =========================================== =======================================
``cross-entropy``    [B, K], int64 [B] or soft [B, K]            cross-entropy, labels of -100 left out
``per-token``        [B, N, K], int64 [B, N]                     the same of each token
``next-token``       [B, N, K], int64 [B, N], not shifted        cross-entropy of logits n, label n + 1
``binary``           [B, K], 0 to 1 [B, K]: several at once      binary cross-entropy, mean over classes
``regression``       [B, K], floats [B, K], or [B] where K = 1   mean squared error
==================== =========================================== =======================================

Means are over what counts: images or tokens whose label isn't ignored; of a batch that is cut into parts as well. With
class weights they are weighted, as PyTorch's: ``loss=torch.nn.CrossEntropyLoss(weight)`` gives them.

Logits of a large vocabulary can be most of a step's memory. So those of an auxiliary head are made a chunk of tokens at
a time, and made again in the backward pass (``in_chunks``), wherever they are more than ``WHOLE`` numbers.

Shapes: B batch, N tokens, K classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localgrad.backbones.example import says_causal
from localgrad.backbones.fake import FakeTensor
from localgrad.errors import DataError, RecipeError, did_you_mean

IGNORED = -100
"""The class index of images and tokens that no loss counts, as in ``torch.nn.functional.cross_entropy``."""
WHOLE = 2**22
"""Logits of tokens that are made at once, at most: 16 MiB of them in float32."""


class Loss(ABC):
    """A loss of logits and labels.

    Attributes:
        is_of_classes: whether labels are classes: an index for each image, or soft ones.
        needs_classes: whether there have to be two of them.
        names_tokens: whether there is a label for each token.
        smooths: whether there is label smoothing for it.
        weighs: whether labels that count don't count alike.
        label_dtype: of labels that this loss takes.
    """

    is_of_classes = True
    needs_classes = True
    names_tokens = False
    smooths = True
    weighs = False
    label_dtype = torch.int64

    @property
    def described(self) -> str:
        """A text that is the same for losses of which a step needs the same memory and time."""
        weighs = ", weighted" if self.weighs else ""
        return f"{type(self).__name__}, of {'tokens' if self.names_tokens else 'items'}{weighs}"

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss, a scalar; logits in float32."""

    def counted(self, labels: Tensor) -> Tensor | None:
        """How much the labels count, a scalar on the device; ``None`` where all count alike."""
        return None

    def label_shape(self, num_items: int, backbone: Any) -> tuple[int, ...]:
        """Of the labels of a batch; of tokens one each."""
        return (num_items, backbone.num_tokens) if self.names_tokens else (num_items,)

    @abstractmethod
    def check(self, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
        """Refuse labels of another shape or type than this loss takes; no value is read.

        Args:
            labels: of a batch.
            inputs: its main input, [B, ...].
            num_classes: of the model.

        Raises:
            DataError: naming what to pass.
        """

    def check_values(self, labels: Tensor) -> None:  # noqa: B027  # most losses take any
        """Refuse values of labels that mean nothing, class indices apart. Waits for the device.

        Raises:
            DataError: naming what to pass.
        """

    def made_up(self, num_items: int, backbone: Any) -> Tensor:
        """Labels that this loss takes, for made-up batches: class indices in turn, or zeros."""
        shape = self.label_shape(num_items, backbone)
        if self.label_dtype.is_floating_point:
            return torch.zeros(shape, dtype=self.label_dtype)
        found: Tensor = torch.arange(math.prod(shape)).reshape(shape) % backbone.num_classes
        return found


class TokenLoss(Loss):
    """Cross-entropy of class indices, of which there may be one for each token; it can be computed chunk by chunk."""

    weight: Tensor | None = None

    def aligned(self, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (or what they are made of) and their labels, one a row: [B, N, K], [B, N] to [M, K], [M].

        Raises:
            DataError: there is another number of labels than of tokens.
        """
        if values.shape[:2] != labels.shape:
            raise DataError(
                f"labels: got {list(labels.shape)} for logits of {list(values.shape[:2])} tokens; give one a token, "
                f"{IGNORED} where none counts."
            )
        return values.flatten(0, 1), labels.flatten()

    def summed(self, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """The sum over rows, of which a mean is this divided by what counts; logits [M, K]."""
        return F.cross_entropy(logits, labels, self._weight(logits), reduction="sum", label_smoothing=label_smoothing)

    def _weight(self, like: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(like)

    def _counted(self, labels: Tensor) -> Tensor:
        counts = labels != IGNORED
        if self.weight is None:
            return counts.sum()
        return (self.weight.to(labels.device)[labels.clamp(min=0)] * counts).sum()


@final
class CrossEntropy(TokenLoss):
    """Of class indices or soft targets; ``per_token``, with logits [B, N, K], of a class for each token.

    Args:
        weight: of each class, [K]; by default all weigh alike.
        per_token: whether there is a label for each token.

    Raises:
        RecipeError: weights that aren't numbers from 0 on.
    """

    def __init__(self, weight: Tensor | Sequence[float] | None = None, *, per_token: bool = False) -> None:
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.get_default_dtype()).detach()
            if weight.ndim != 1 or not bool((weight >= 0).all() & weight.isfinite().all()) or not bool(weight.any()):
                raise RecipeError("loss: class weights are one finite number from 0 on a class, not all of them 0.")
        self.weight = weight
        self.weighs = weight is not None
        self.names_tokens = per_token
        self.is_of_classes = not per_token

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy."""
        if self.names_tokens:
            logits, labels = self.aligned(logits, labels)
        smoothing = 0.0 if labels.is_floating_point() else label_smoothing
        return F.cross_entropy(logits, labels, self._weight(logits), label_smoothing=smoothing)

    def counted(self, labels: Tensor) -> Tensor | None:
        """How many labels aren't ignored, or the sum of their weights."""
        return None if labels.is_floating_point() else self._counted(labels)

    def check(self, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
        """As for any loss."""
        if self.weight is not None and len(self.weight) != num_classes:
            raise RecipeError(f"loss: got {len(self.weight)} class weights, the model has {num_classes} classes.")
        if self.names_tokens:
            _check_tokens(labels, inputs)
            return
        shape = list(labels.shape)
        if labels.is_floating_point() and labels.ndim == 1:
            raise DataError(f"labels: got {labels.dtype} {shape}; class indices are int64: pass labels.long().")
        if labels.is_floating_point():
            if labels.ndim != 2 or shape[1] != num_classes:
                raise DataError(f"labels: got soft labels {shape}; the model takes [B, {num_classes}].")
        elif labels.ndim == 2 and shape[1] == 1 != num_classes:
            raise DataError(f"labels: got {shape}; class indices are one number an image, [B]: pass labels.squeeze(1).")
        elif labels.ndim != 1:
            raise DataError(
                f"labels: got {labels.dtype} {shape}; pass class indices int64 [B], or soft labels as labels.float()."
            )
        elif labels.dtype != torch.int64:
            raise DataError(f"labels: got {labels.dtype}; class indices are int64: pass labels.long().")


@final
class NextToken(TokenLoss):
    """Cross-entropy of each token's logits with the token behind it; labels are the tokens themselves."""

    is_of_classes = False
    names_tokens = True

    def aligned(self, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As of any token loss, shifted: nothing is behind the last token, and the first is no one's next."""
        # Labels are moved and not logits, which would be copied.
        return super().aligned(values, F.pad(labels[:, 1:], (0, 1), value=IGNORED))

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, shifted."""
        return F.cross_entropy(*self.aligned(logits, labels), label_smoothing=label_smoothing)

    def counted(self, labels: Tensor) -> Tensor | None:
        """How many labels aren't ignored; the first of each sequence is no one's next."""
        return self._counted(labels[:, 1:])

    def check(self, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
        """As for any loss."""
        _check_tokens(labels, inputs)
        if labels.shape[1] < 2:
            raise DataError(f"labels: got {list(labels.shape)}; a next token takes sequences of two tokens or more.")


@final
class Binary(Loss):
    """Binary cross-entropy: several classes at once."""

    label_dtype = torch.float32
    is_of_classes = False
    needs_classes = False

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean over images and classes."""
        smoothed = labels.to(logits) * (1 - label_smoothing) + 0.5 * label_smoothing
        return F.binary_cross_entropy_with_logits(logits, smoothed)

    def label_shape(self, num_items: int, backbone: Any) -> tuple[int, ...]:
        """[B, K]."""
        return (num_items, backbone.num_classes)

    def check(self, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
        """As for any loss."""
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise DataError(
                f"labels: got {labels.dtype} {list(labels.shape)}; loss='binary' takes 0 to 1 for each class, "
                f"[B, {num_classes}]: F.one_hot(labels, {num_classes}).float() makes them of class indices."
            )

    def check_values(self, labels: Tensor) -> None:
        """As for any loss."""
        if not isinstance(labels, FakeTensor) and not bool(((labels >= 0) & (labels <= 1)).all()):
            raise DataError("labels: some aren't from 0 to 1, as loss='binary' takes them; 0 is no, 1 is yes.")


@final
class Regression(Loss):
    """Mean squared error."""

    label_dtype = torch.float32
    is_of_classes = False
    needs_classes = False
    smooths = False

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean over all numbers."""
        wanted = labels.to(logits)
        return F.mse_loss(logits, wanted.unsqueeze(-1) if wanted.ndim < logits.ndim else wanted)

    def label_shape(self, num_items: int, backbone: Any) -> tuple[int, ...]:
        """[B, K]."""
        return (num_items, backbone.num_classes)

    def check(self, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
        """As for any loss."""
        shape = list(labels.shape)
        if not labels.is_floating_point():
            raise DataError(f"labels: got {labels.dtype} {shape}; loss='regression' takes floats: labels.float().")
        if shape[1:] != [num_classes] and not (labels.ndim == 1 and num_classes == 1):
            raise DataError(f"labels: got {shape}; loss='regression' takes a number for each, [B, {num_classes}].")

    def check_values(self, labels: Tensor) -> None:
        """As for any loss."""
        if not isinstance(labels, FakeTensor) and not bool(labels.isfinite().all()):
            raise DataError("labels: some are NaN or infinite, and loss='regression' would be, too; leave those out.")


@final
class OwnFunction(Loss):
    """A user's own function of (logits, labels), which gives a scalar: the mean over a batch.

    Of a batch in parts, it is the mean of what it gives for each, weighed by their items.
    """

    is_of_classes = False
    needs_classes = False
    smooths = False

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, per_token: bool = False) -> None:
        self.function = function
        self.names_tokens = per_token

    @property
    def described(self) -> str:
        """By its name."""
        return str(getattr(self.function, "__qualname__", type(self.function).__qualname__))

    def __call__(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """What the function gives.

        Raises:
            RecipeError: it is no scalar.
        """
        found = self.function(logits, labels)
        if not isinstance(found, Tensor) or found.ndim or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise RecipeError(f"loss: your function gave {got}; let it return a scalar tensor, such as losses.mean().")
        return found

    def check(self, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
        """Whatever the function takes."""


def _check_tokens(labels: Tensor, inputs: Tensor) -> None:
    """Refuse labels that aren't a class index for each token."""
    shape = list(labels.shape)
    if labels.dtype != torch.int64:
        raise DataError(f"labels: got {labels.dtype} {shape}; classes of tokens are int64: pass labels.long().")
    is_of_ids = inputs.ndim == 2 and not inputs.is_floating_point()
    if labels.ndim != 2:
        raise DataError(
            f"labels: got {shape}; this loss takes one a token, [B, N], {IGNORED} where none counts."
            + ("" if is_of_ids else " A model that gives features of tokens has no head: take the one that has.")
        )
    if is_of_ids and shape[1] != inputs.shape[1]:
        raise DataError(
            f"labels: got {shape} for tokens {list(inputs.shape)}; give one a token, {IGNORED} where none counts (the "
            "loss itself shifts those of next tokens)."
        )


def in_chunks(
    loss: TokenLoss,
    head: Callable[[Tensor], Tensor],
    vectors: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    label_smoothing: float = 0.0,
    whole: int = WHOLE,
    counted: Tensor | None = None,
) -> Tensor:
    """The mean loss of ``head(vectors)``, of which never more than ``whole`` numbers are there at once.

    Each chunk's logits are made again in the backward pass; nothing in ``head`` may draw at random.

    Args:
        loss: of the task.
        head: [M, D] to logits [M, K].
        vectors: [B, N, D].
        labels: [B, N].
        num_classes: K.
        label_smoothing: from 0 to 1.
        whole: numbers of logits in a chunk.
        counted: what labels of the whole batch count, where these are a part's; by default what these do.
    """
    rows, wanted = loss.aligned(vectors, labels)

    def of_chunk(chunk: Tensor, own: Tensor) -> Tensor:
        logits = head(chunk)
        return loss.summed(logits if logits.dtype == torch.float64 else logits.float(), own, label_smoothing)

    size = max(1, whole // num_classes)
    total = torch.zeros((), device=vectors.device)
    for chunk, own in zip(torch.split(rows, size), torch.split(wanted, size), strict=True):
        total = total + checkpoint(of_chunk, chunk, own, use_reentrant=False, preserve_rng_state=False)
    counted = loss.counted(labels) if counted is None else counted
    assert counted is not None, "labels of tokens are indices"
    return total / counted  # no number where none counts, as PyTorch's


CROSS_ENTROPY = CrossEntropy()
LOSSES: dict[str, Callable[[], Loss]] = {
    "cross-entropy": CrossEntropy,
    "per-token": lambda: CrossEntropy(per_token=True),
    "next-token": NextToken,
    "binary": Binary,
    "regression": Regression,
}
PROBLEMS = {"regression": Regression, "multi_label_classification": Binary}
"""Losses by ``config.problem_type`` of transformers; its third one is cross-entropy."""


def loss_of(loss: str | Loss | Callable[[Tensor, Tensor], Tensor] | None, backbone: Any) -> Loss:
    """A loss by name, or of a function; by default what the model is made for.

    Models of transformers say so themselves: causal language models by ``loss_type``, classifiers by
    ``config.problem_type``. Other logits of tokens are taken one by one.

    Raises:
        RecipeError: there is none of that name, or it doesn't go with the model's logits.
    """
    per_token: bool = backbone.names_tokens
    if loss is None:
        if per_token and len(backbone.input_size) < 3 and says_causal(backbone.model):
            return NextToken()
        problem = getattr(getattr(backbone.model, "config", None), "problem_type", None)
        return PROBLEMS[problem]() if problem in PROBLEMS and not per_token else CrossEntropy(per_token=per_token)
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise RecipeError(f"loss: unknown {loss!r}; take {', '.join(LOSSES)}.{did_you_mean(loss, LOSSES)}")
        found = LOSSES[loss]()
    elif isinstance(loss, Loss):
        found = loss
    elif type(loss) is nn.CrossEntropyLoss:  # what is derived from it may compute anything
        return _of_pytorch(loss, per_token=per_token)
    elif callable(loss):
        learning = [] if not isinstance(loss, nn.Module) else [n for n, w in loss.named_parameters() if w.requires_grad]
        if learning:
            raise RecipeError(
                f"loss: {type(loss).__name__} has {learning[0]}, which learns, and no local module would train it; "
                "hold it in an objective's term, or in the model, or set requires_grad=False."
            )
        return OwnFunction(loss, per_token=per_token)
    else:
        raise RecipeError(f"loss: got {loss!r}; give a name ({', '.join(LOSSES)}) or a function of logits and labels.")
    if found.names_tokens != per_token:
        have, take = (
            ("token", "per-token or next-token") if per_token else ("item", "cross-entropy, binary or regression")
        )
        raise RecipeError(
            f"loss: {loss if isinstance(loss, str) else type(loss).__name__} doesn't go with logits for each {have}, "
            f"as the model gives; take {take}, or give a function of logits and labels."
        )
    return found


def _of_pytorch(loss: nn.CrossEntropyLoss, *, per_token: bool) -> Loss:
    """PyTorch's own module, whose class weights are ours; means over parts of a batch are known of it."""
    if loss.reduction != "mean" or loss.ignore_index != IGNORED or loss.label_smoothing:
        raise RecipeError(
            f"loss: of CrossEntropyLoss the mean is taken, with ignore_index={IGNORED}, and label_smoothing is an "
            "option of the objective; give torch.nn.CrossEntropyLoss(weight=...) alone."
        )
    return CrossEntropy(loss.weight, per_token=per_token)
