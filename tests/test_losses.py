"""Losses by name and of functions: against PyTorch's own, chunk by chunk, in parts of a batch; and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import SIZE, make_backbone
from localgrad.errors import DataError, LocalgradError, RecipeError
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.losses import IGNORED, CrossEntropy, Loss, NextToken, TokenLoss, in_chunks, loss_of
from localgrad.objectives.methods import GreedySupervised
from localgrad.objectives.supervised import TaskLoss
from localgrad.step.checks import check_values

NUM_CLASSES = 5
ITEMS: Any = SimpleNamespace(names_tokens=False, model=nn.Identity(), num_classes=NUM_CLASSES, input_size=(3, 8, 8))
TOKENS: Any = SimpleNamespace(
    names_tokens=True, model=nn.Identity(), num_classes=NUM_CLASSES, input_size=(6,), num_tokens=6
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(*shape: int) -> Tensor:
    labels = torch.randint(NUM_CLASSES, shape, generator=torch.Generator().manual_seed(3))
    labels[0, -2:] = IGNORED
    labels[-1, 0] = IGNORED
    return labels


def naive(logits: Tensor, labels: Tensor, weight: Tensor | None = None, *, shift: int = 0) -> Tensor:
    """A loop over tokens."""
    total, counted = torch.zeros((), dtype=torch.float64), 0.0
    for row, own in zip(logits, labels, strict=True):
        for place in range(len(own) - shift):
            label = int(own[place + shift])
            if label != IGNORED:
                each = 1.0 if weight is None else float(weight[label])
                total, counted = total - each * row[place].log_softmax(0)[label], counted + each
    return total / counted


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0])


@pytest.mark.parametrize(
    ("loss", "weight", "shift"),
    [
        (CrossEntropy(per_token=True), None, 0),
        (CrossEntropy(WEIGHT, per_token=True), WEIGHT, 0),
        (NextToken(), None, 1),
    ],
)
def test_losses_of_tokens_are_a_loop_over_tokens_whole_and_in_chunks(
    loss: TokenLoss, weight: Tensor | None, shift: int
) -> None:
    vectors, head, labels = drawn(3, 6, 4), nn.Linear(4, NUM_CLASSES).double(), labels_of(3, 6)
    expected = naive(head(vectors), labels, weight, shift=shift)
    torch.testing.assert_close(loss(head(vectors), labels), expected)
    gradients = torch.autograd.grad(expected, list(head.parameters()))
    for whole in (1, 2 * NUM_CLASSES, 7 * NUM_CLASSES, 10_000):
        made = []

        def counted(rows: Tensor) -> Tensor:
            made.append(len(rows) * NUM_CLASSES)  # noqa: B023  # called within the loop
            return head(rows)

        value = in_chunks(loss, counted, vectors, labels, NUM_CLASSES, whole=whole)
        torch.testing.assert_close(value, expected)
        assert max(made) <= max(whole, NUM_CLASSES)
        for mine, theirs in zip(torch.autograd.grad(value, list(head.parameters())), gradients, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_label_smoothing_in_chunks_is_pytorchs() -> None:
    vectors, head, labels = drawn(3, 6, 4), nn.Linear(4, NUM_CLASSES).double(), labels_of(3, 6)
    loss = CrossEntropy(WEIGHT, per_token=True)
    whole = loss(head(vectors), labels, label_smoothing=0.2)
    expected = F.cross_entropy(head(vectors).flatten(0, 1), labels.flatten(), WEIGHT.double(), label_smoothing=0.2)
    torch.testing.assert_close(whole, expected)
    chunked = in_chunks(loss, head, vectors, labels, NUM_CLASSES, label_smoothing=0.2, whole=10)
    torch.testing.assert_close(chunked, expected)


@pytest.mark.parametrize(
    "loss", [CrossEntropy(WEIGHT), CrossEntropy(), CrossEntropy(WEIGHT, per_token=True), NextToken()]
)
@pytest.mark.parametrize("counts_all", [False, True])
def test_parts_of_a_batch_make_the_mean_of_the_whole(loss: Loss, counts_all: bool) -> None:
    """Class weights and ignored labels stand unevenly in parts."""
    logits, labels = drawn(5, 6, NUM_CLASSES), labels_of(5, 6)
    if not loss.names_tokens:
        logits, labels = logits[:, 0], labels[:, 3].clamp(min=0)
        labels = labels if counts_all else torch.cat([labels[:1] * 0 + IGNORED, labels[1:]])
    elif counts_all:
        labels = labels.clamp(min=0)
    batch = LocalBatch(None, labels, features=logits, counts_all=counts_all)
    batch.loss = loss
    total = torch.zeros((), dtype=torch.float64)
    term = TaskLoss(nn.Identity(), loss=loss)
    for part in batch.parts(3):
        value = term(part.features, part.features, part)
        total = total + (value.loss if value.is_share else value.loss * part.share)
    torch.testing.assert_close(total, loss(logits, labels), rtol=1e-6, atol=0.0)


def test_binary_and_regression_are_pytorchs() -> None:
    logits = drawn(4, NUM_CLASSES)
    many = (drawn(4, NUM_CLASSES, seed=1) > 0).float()
    expected = F.binary_cross_entropy_with_logits(logits, many.double())
    torch.testing.assert_close(loss_of("binary", ITEMS)(logits, many), expected)
    wanted = drawn(4, seed=2)
    value = loss_of("regression", ITEMS)(logits[:, :1], wanted)  # [B, 1] and [B]: not each with each
    torch.testing.assert_close(value, (logits[:, 0] - wanted).square().mean())


def test_pytorchs_module_gives_class_weights() -> None:
    loss = loss_of(nn.CrossEntropyLoss(WEIGHT), ITEMS)
    logits, labels = drawn(4, NUM_CLASSES), torch.tensor([0, 1, 4, 4])
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels, WEIGHT.double()))
    assert loss_of(nn.CrossEntropyLoss(), TOKENS).names_tokens


def test_what_is_derived_from_pytorchs_module_is_computed_by_itself() -> None:
    class Focal(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return (1 - super().forward(logits, labels).neg().exp()).square()

    logits, labels = drawn(4, NUM_CLASSES), torch.tensor([0, 1, 4, 4])
    assert torch.equal(loss_of(Focal(), ITEMS)(logits, labels), Focal()(logits, labels))


def test_what_a_model_is_made_for_is_the_default() -> None:
    config = SimpleNamespace(problem_type="multi_label_classification")
    many: Any = SimpleNamespace(names_tokens=False, model=SimpleNamespace(config=config))
    causal: Any = SimpleNamespace(names_tokens=True, input_size=(6,), model=SimpleNamespace(loss_type="ForCausalLM"))
    assert [type(loss_of(None, each)).__name__ for each in (ITEMS, TOKENS, many, causal)] == [
        "CrossEntropy",
        "CrossEntropy",
        "Binary",
        "NextToken",
    ]
    assert loss_of(None, TOKENS).names_tokens and not loss_of(None, ITEMS).names_tokens


@pytest.mark.parametrize(
    ("loss", "backbone", "message"),
    [
        ("cross_entropy", ITEMS, "loss: unknown 'cross_entropy'; take cross-entropy, .* Nearest: cross-entropy"),
        (3, ITEMS, "loss: got 3; give a name"),
        ("next-token", ITEMS, "loss: next-token doesn't go with logits for each item"),
        ("binary", TOKENS, "loss: binary doesn't go with logits for each token.*take per-token or next-token"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), ITEMS, "label_smoothing is an option of the objective"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, -1.0])), ITEMS, "class weights are one finite number from 0 on"),
    ],
)
def test_no_loss_is_one_line(loss: Any, backbone: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        loss_of(loss, backbone)
    assert "\n" not in str(caught.value)


IMAGES, IDS = torch.zeros(4, 3, 8, 8), torch.zeros(4, 6, dtype=torch.int64)
WRONG_LABELS: dict[str, tuple[str, Any, Tensor, Tensor, str]] = {
    "indices for binary": ("binary", ITEMS, torch.zeros(4, dtype=torch.int64), IMAGES, r"F.one_hot\(labels, 5\)"),
    "too many for binary": ("binary", ITEMS, torch.zeros(4, 6), IMAGES, r"takes 0 to 1 for each class, \[B, 5\]"),
    "whole numbers for regression": ("regression", ITEMS, torch.zeros(4, 5).long(), IMAGES, r"labels.float\(\)"),
    "too few for regression": ("regression", ITEMS, torch.zeros(4), IMAGES, r"a number for each, \[B, 5\]"),
    "one a sequence": ("next-token", TOKENS, torch.zeros(4, dtype=torch.int64), IDS, r"takes one a token, \[B, N\]"),
    "classes of a model without a head": ("per-token", TOKENS, torch.zeros(4).long(), IMAGES, "has no head: take the"),
    "floats for tokens": ("per-token", TOKENS, torch.zeros(4, 6), IDS, r"pass labels.long\(\)"),
    "shifted already": ("next-token", TOKENS, IDS[:, 1:], IDS, "the loss itself shifts"),
    "a single token": ("next-token", TOKENS, IDS[:, :1], IDS[:, :1], "two tokens or more"),
}


@pytest.mark.parametrize("case", list(WRONG_LABELS))
def test_labels_that_a_loss_does_not_take_are_one_line(case: str) -> None:
    name, backbone, labels, inputs, message = WRONG_LABELS[case]
    with pytest.raises(DataError, match=message) as caught:
        loss_of(name, backbone).check(labels, inputs, NUM_CLASSES)
    assert "\n" not in str(caught.value)


def learner_of(loss: Any, **options: Any) -> LocalLearner:
    learner = LocalLearner(make_backbone(), modules=2, loss=loss, objective=GreedySupervised(**options))
    learner.configure_optimizers(lambda params: torch.optim.AdamW(params, lr=1e-3))
    return learner


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), r"torch.float32 \[4\]"),
        (lambda logits, labels: (logits.argmax(1) == labels).sum(), r"torch.int64 \[\]"),
        (lambda logits, labels: 0.0, "0.0"),
    ],
)
def test_a_function_that_gives_no_scalar_is_told(function: Any, got: str) -> None:
    with pytest.raises(RecipeError, match=f"loss: your function gave {got}; let it return a scalar tensor"):
        learner_of(function).step(images(), torch.arange(4))


class Scaled(nn.Module):
    """A loss that learns its temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.scale, labels)


def test_a_loss_that_learns_is_refused() -> None:
    with pytest.raises(RecipeError, match="loss: Scaled has scale, which learns, and no local module would train it"):
        learner_of(Scaled())
    learner_of(Scaled().requires_grad_(False)).step(images(), torch.arange(4))


def test_a_function_of_ones_own_may_ignore_what_it_likes() -> None:
    own = loss_of(
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1), TOKENS
    )
    labels = torch.where(IDS > 1, IDS % NUM_CLASSES, -1)
    check_values(LocalBatch(IDS, labels), NUM_CLASSES, own)
    with pytest.raises(DataError, match="-1"):
        check_values(LocalBatch(IDS, labels), NUM_CLASSES, loss_of("per-token", TOKENS))


def test_every_loss_trains_every_module() -> None:
    num_classes = learner_of(None).backbone.num_classes
    wanted = torch.rand(4, num_classes, generator=torch.Generator().manual_seed(1))
    for loss, labels in {
        "binary": (wanted > 0.5).float(),
        "regression": wanted,
        F.multi_margin_loss: torch.arange(4),
    }.items():
        learner = learner_of(loss, classifier="linear")
        before = [copy.detach().clone() for copy in learner.model.parameters()]
        losses = [float(sum(learner.step(images(), labels).losses)) for _ in range(4)]
        assert losses[-1] < losses[0]
        assert not any(map(torch.equal, before[-2:], list(learner.model.parameters())[-2:]))


@pytest.mark.parametrize(
    ("loss", "options", "labels", "message"),
    [
        ("binary", {}, 2 * torch.ones(4, 5), "labels: some aren't from 0 to 1"),
        ("regression", {}, torch.full((4, 5), float("nan")), "labels: some are NaN or infinite"),
        ("regression", {"label_smoothing": 0.1}, None, "label_smoothing.* is of classes"),
        ("binary", {"contrastive_weight": 1.0}, None, "contrastive_weight: it is of classes"),
        ("binary", {"teacher_share": 0.5}, None, "teacher_share: it is of classes"),
        (nn.CrossEntropyLoss(torch.ones(3)), {}, torch.arange(4), "got 3 class weights, the model has 5"),
    ],
)
def test_what_does_not_go_with_a_loss_is_one_line(loss: Any, options: Any, labels: Any, message: str) -> None:
    with pytest.raises(LocalgradError, match=message) as caught:
        learner_of(loss, **options).step(images(), labels)
    assert "\n" not in str(caught.value)
