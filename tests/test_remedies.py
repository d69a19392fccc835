"""What objectives offer against the losses of local training, each term against a naive reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import (
    SIZE,
    make,
    make_learner,
    quick_adamw,
    term_of,
    walk,
)
from localgrad import Contrastive, FeatureReconstruction, GreedySupervised, ImageReconstruction, Layout, LocalLearner
from localgrad.errors import RecipeError
from localgrad.objectives.auxiliary import ConvDecoder, Decoder, TransformerDecoder
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.reconstruction import BlockReconstruction, Reconstruction
from localgrad.objectives.regularisers import SimilarityMatching
from localgrad.objectives.supervised import TaskLoss

FEATURES = Layout(kind="tokens", width=8, grid=(4, 4), num_prefix_tokens=1)
DEEP = Layout(kind="NHWC", width=16, grid=(2, 2))

learner_of = partial(make_learner, optimizer=quick_adamw)


SWIN: dict[str, Any] = {"depths": (2, 2, 1), "drop_path_rate": 0.0}  # timm gives a Swin 0.1


def a_batch(seed: int = 1, num_images: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, *SIZE, generator=generator), torch.randint(5, (num_images,), generator=generator)


def train(learner: LocalLearner, num_steps: int, seed: int = 7) -> None:
    torch.manual_seed(seed)
    for number in range(num_steps):
        learner.step(*a_batch(number))


def normalised(grid: np.ndarray) -> np.ndarray:
    mean, variance = grid.mean(-1, keepdims=True), grid.var(-1, keepdims=True)
    return (grid - mean) / np.sqrt(variance + 1e-5)


# Transport --------------------------------------------------------------------------------------------------------


def naive_transport(states: list[Tensor], tau: float) -> float:
    total = 0.0
    for before, after in pairwise(states):
        if before.shape == after.shape:
            moved = [(b - a) ** 2 for b, a in zip(after.flatten().tolist(), before.flatten().tolist(), strict=True)]
            total += sum(moved) / len(moved)
    return total / (2 * tau)


@pytest.mark.parametrize(
    ("kind", "boundaries", "same_shape"), [("vit", [1, 2], [1, 1, 2]), ("swin", [2, 4], [2, 1, 2])]
)
def test_transport_is_the_mean_square_of_what_blocks_add(
    kind: str, boundaries: list[int], same_shape: list[int]
) -> None:
    model = make(kind, **(SWIN if kind == "swin" else {}))
    learner = learner_of(model, boundaries, objective=GreedySupervised(transport_tau=0.7))
    images, labels = a_batch()
    found = walk(learner, images)
    result = learner.step(images, labels)
    for index, count in enumerate(same_shape):
        states = found[index][index == 0 : len(found[index]) - (index == 2)]  # the stem and the tail are no blocks
        assert sum(before.shape == after.shape for before, after in pairwise(states)) == count
        assert result.terms[index]["transport"].item() == pytest.approx(naive_transport(states, 0.7), rel=1e-4)


def test_one_module_is_trained_end_to_end_without_transport() -> None:
    learner = learner_of(modules=1, objective=GreedySupervised(transport_tau=0.7))
    assert learner.step(*a_batch()).terms[0].keys() == {"task"}


def test_transport_reaches_the_blocks() -> None:
    learner = learner_of(modules=2, objective=GreedySupervised(task_weight=0.0, transport_tau=2.0))
    module = learner.modules[0]
    images, labels = a_batch()
    module(images, LocalBatch(images, labels)).loss.backward()
    assert list(module.objective.terms) == ["transport"]
    stem, *blocks = module.parts
    x, total = stem(images), 0.0
    for block in blocks:
        y = block(x)
        total, x = total + ((y - x) ** 2).mean() / 4, y
    weights = list(module.parts.parameters())
    expected = torch.autograd.grad(total, weights)  # type: ignore[arg-type]
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-7)


def test_tau_goes_with_depth() -> None:
    learner = learner_of(modules=4, objective=GreedySupervised(transport_tau=(1.0, 3.0)))
    assert [term_of(module.objective, "transport").tau for module in learner.modules] == [1.0, 2.0, 3.0, 3.0]


# Reconstruction: targets, errors, masks --------------------------------------------------------------------------


def mean_square(prediction: Tensor, target: Tensor, layout: Layout, *, norm: bool) -> float:
    grid = target[:, layout.num_prefix_tokens :].reshape(len(target), *layout.grid, layout.width).numpy()
    return float(((prediction.detach().numpy() - (normalised(grid) if norm else grid)) ** 2).mean())


@pytest.mark.parametrize("norm", [True, False])
def test_blocks_are_reconstructed_from_the_modules_output(norm: bool) -> None:
    objective = FeatureReconstruction(reconstruct="blocks", normalise_targets=norm, decoder="conv")
    learner = learner_of(modules=2, objective=objective)
    images, labels = a_batch()
    *states, outputs = walk(learner, images)[0][1:]  # the first module's stem is no block
    term = term_of(learner.modules[0].objective, "reconstruction")
    assert isinstance(term, BlockReconstruction)
    layout = learner.backbone.layouts[0]
    predictions = [part.decoder(outputs) for part in term.parts]
    errors = [mean_square(p, state, layout, norm=norm) for p, state in zip(predictions, states, strict=True)]
    assert len(errors) == 2
    result = learner.step(images, labels)
    assert result.terms[0]["reconstruction"].item() == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_previous_is_what_the_module_before_received() -> None:
    learner = learner_of(modules=4, objective=FeatureReconstruction(reconstruct="previous"))
    images, labels = a_batch()
    entered = [states[0] for states in walk(learner, images)]
    outputs = [states[-1] for states in walk(learner, images)]
    terms = [term_of(module.objective, "reconstruction") for module in learner.modules[:-1]]
    predictions = [term.decoder(output).detach() for term, output in zip(terms, outputs[:-1], strict=True)]
    result = learner.step(images, labels)
    pixels = images.permute(0, 2, 3, 1)
    for index in (0, 1):  # the image as it is, for the first module and for the one after it
        expected = float(((predictions[index] - pixels) ** 2).mean())
        assert result.terms[index]["reconstruction"].item() == pytest.approx(expected, rel=1e-4)
    expected = mean_square(predictions[2], entered[1], learner.backbone.layouts[1], norm=True)
    assert result.terms[2]["reconstruction"].item() == pytest.approx(expected, rel=1e-4)


def test_no_gradient_goes_into_targets_of_blocks() -> None:
    parts = [Reconstruction(ConvDecoder(FEATURES, FEATURES), of="inputs", normalise=True) for _ in range(2)]
    outputs, *states = (torch.randn(2, 17, 8, requires_grad=True) for _ in range(3))
    value = BlockReconstruction(parts)(torch.empty(0), outputs, LocalBatch(None, torch.arange(2)), states)
    gradients = torch.autograd.grad(value.loss, [outputs, *states], allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None)


def test_targets_arrive_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = Reconstruction.forward

    def watched(self: Any, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Any = ()) -> Any:
        seen.append(inputs.requires_grad or (batch.previous is not None and batch.previous.requires_grad))
        return forward(self, inputs, outputs, batch, states)

    monkeypatch.setattr(Reconstruction, "forward", watched)
    for reconstruct in ("inputs", "previous", "blocks"):
        train(learner_of(modules=4, objective=FeatureReconstruction(reconstruct=reconstruct)), 1)
    assert len(seen) == 9
    assert not any(seen)


def smooth_l1(p: np.ndarray, t: np.ndarray) -> float:
    total = 0.0
    for error in np.abs(p - t).flatten().tolist():
        total += error**2 / 2 if error < 1 else error - 0.5
    return total / p.size


def cosine(p: np.ndarray, t: np.ndarray) -> float:
    rows = zip(p.reshape(-1, p.shape[-1]), t.reshape(-1, t.shape[-1]), strict=True)
    return float(np.mean([1 - (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in rows]))


@pytest.mark.parametrize(("error", "formula"), [("smooth_l1", smooth_l1), ("cosine", cosine)])
def test_other_errors_are_their_formulas(error: str, formula: Callable[..., float]) -> None:
    torch.manual_seed(0)
    term = Reconstruction(ConvDecoder(DEEP, FEATURES), of="inputs", normalise=True, error=error)
    inputs, outputs = 3 + 2 * torch.randn(3, 17, 8), torch.randn(3, 2, 2, 16)
    target = normalised(inputs[:, 1:].reshape(3, 4, 4, 8).numpy())
    value = term(inputs, outputs, LocalBatch(None, torch.arange(3)))
    expected = formula(term.decoder(outputs).detach().numpy(), target)
    assert value.loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("error", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("kind", [ConvDecoder, TransformerDecoder])
def test_only_hidden_positions_count(kind: type[Decoder], error: str) -> None:
    torch.manual_seed(0)
    decoder = kind(DEEP, FEATURES)
    term = Reconstruction(decoder, of="inputs", normalise=False, error=error, mask=0.5)
    assert term.mask_token is not None
    nn.init.normal_(term.mask_token)
    inputs, outputs = torch.randn(3, 17, 8), torch.randn(3, 2, 2, 16)
    torch.manual_seed(5)
    hidden = torch.rand(3, 2, 2) < 0.5
    assert 0 < hidden.sum() < hidden.numel()
    shown = outputs.clone()
    for place in hidden.nonzero().tolist():
        shown[tuple(place)] = term.mask_token.detach()
    prediction = decoder(shown).detach().numpy()
    target = inputs[:, 1:].reshape(3, 4, 4, 8).numpy()
    formulas = {"mse": lambda p, t: ((p - t) ** 2).mean(), "smooth_l1": smooth_l1, "cosine": cosine}
    rows = [(b, i, j) for b, i, j in np.ndindex(3, 4, 4) if hidden[b, i // 2, j // 2]]
    expected = np.mean([formulas[error](prediction[row][None], target[row][None]) for row in rows])
    torch.manual_seed(5)
    value = term(inputs, outputs, LocalBatch(None, torch.arange(3)))
    assert value.loss.item() == pytest.approx(float(expected), rel=1e-4)


def test_what_is_hidden_has_no_part_in_the_prediction() -> None:
    torch.manual_seed(0)
    term = Reconstruction(TransformerDecoder(FEATURES, FEATURES), of="inputs", normalise=True, mask=0.4)
    outputs = torch.randn(2, 17, 8, requires_grad=True)
    torch.manual_seed(3)
    hidden = torch.rand(2, 4, 4) < 0.4
    torch.manual_seed(3)
    inputs = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(1))
    value = term(inputs, outputs, LocalBatch(None, torch.arange(2)))
    value.loss.backward()
    assert outputs.grad is not None
    reached = outputs.grad[:, 1:].reshape(2, 4, 4, 8).abs().sum(-1)
    assert torch.equal(reached == 0, hidden)
    assert term.mask_token is not None
    assert term.mask_token.grad is not None
    assert term.mask_token.grad.abs().sum() > 0


def test_nothing_hidden_is_no_loss() -> None:
    term = Reconstruction(ConvDecoder(DEEP, FEATURES), of="inputs", normalise=True, mask=1e-9)
    assert term(torch.randn(2, 17, 8), torch.randn(2, 2, 2, 16), LocalBatch(None, torch.arange(2))).loss == 0


def test_an_image_may_be_masked_too() -> None:
    learner = learner_of(objective=ImageReconstruction(decoder="conv", mask=0.6, reconstruction_error="smooth_l1"))
    before = copy.deepcopy(learner.modules[0].objective.state_dict())
    train(learner, 1)
    after = learner.modules[0].objective.state_dict()
    assert not [name for name in after if torch.equal(before[name], after[name])]


# Weights over time and depth -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 2.0), (0.5, 1.25), (1.0, 0.5)])
def test_weights_change_over_time(progress: float, factor: float) -> None:
    objective = FeatureReconstruction(over_time={"reconstruction": (2.0, 0.5)}, reconstruction_weight=3.0)
    learner = learner_of(objective=objective)
    learner.at(progress)
    result = learner.step(*a_batch())
    for loss, terms in zip(result.losses[:-1], result.terms[:-1], strict=True):
        torch.testing.assert_close(loss, terms["task"] + factor * 3 * terms["reconstruction"])
    assert torch.equal(result.losses[-1], result.terms[-1]["task"])


def test_before_anyone_tells_the_time_it_is_the_start() -> None:
    learner = learner_of(objective=GreedySupervised(over_time={"task": (0.25, 1.0)}))
    result = learner.step(*a_batch())
    torch.testing.assert_close(result.losses[0], 0.25 * result.terms[0]["task"])


def test_pairs_of_options_go_with_depth() -> None:
    objective = FeatureReconstruction(
        decoder="transformer",
        decoder_options={"depth": [1, 2]},
        classifier="next",
        classifier_options={"depth": [3, 1]},
    )
    learner = learner_of(make(depth=5), modules=[1, 2, 3], objective=objective)
    objectives = [module.objective for module in learner.modules[:-1]]
    assert [len(term_of(o, "task").classifier.blocks) for o in objectives] == [3, 2, 1]
    assert [len(term_of(o, "reconstruction").decoder.blocks) for o in objectives] == [1, 2, 2]  # round(1.5) is 2


# Similarity matching ---------------------------------------------------------------------------------------------


def naive_similarity(mapped: np.ndarray, targets: np.ndarray) -> float:
    """[B, N, D] and [B, C] to the loss, pair by pair."""
    spread = np.sqrt(mapped.var(axis=1) + 1e-6)

    def similarity(rows: np.ndarray, a: int, b: int) -> float:
        x, y = rows[a] - rows[a].mean(), rows[b] - rows[b].mean()
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))

    pairs = [(a, b) for a in range(len(targets)) for b in range(len(targets))]
    return float(np.mean([(similarity(spread, a, b) - similarity(targets, a, b)) ** 2 for a, b in pairs]))


@pytest.mark.parametrize("soft", [False, True])
def test_similarity_matching_is_the_papers_formula(soft: bool) -> None:
    torch.manual_seed(0)
    term = SimilarityMatching(FEATURES, 4, width=6)
    outputs = torch.randn(5, 17, 8, requires_grad=True)
    labels = torch.rand(5, 4).softmax(1) if soft else torch.tensor([0, 1, 1, 3, 0])
    one_hot = labels.numpy() if soft else np.eye(4)[labels.numpy()]
    mapped = term.project(outputs[:, 1:]).detach().numpy()
    value = term(torch.empty(0), outputs, LocalBatch(None, labels))
    assert value.loss.item() == pytest.approx(naive_similarity(mapped, one_hot), rel=1e-4)
    value.loss.backward()
    assert outputs.grad is not None
    assert (outputs.grad[:, 1:].abs().sum((0, 2)) > 0).all()


def test_any_objective_takes_the_regularisers() -> None:
    more: dict[str, Any] = {"similarity_weight": (1.0, 0.0), "contrastive_weight": 0.5, "transport_tau": 1.0}
    for kind in (GreedySupervised, FeatureReconstruction, ImageReconstruction, Contrastive):
        result = learner_of(objective=kind(**more)).step(*a_batch())
        assert {"contrastive", "similarity", "transport"} <= result.terms[0].keys()
        assert "similarity" not in result.terms[1]  # its weight is 0 there
        assert list(result.terms[2]) == ["task", "transport"]
        expected = sum(value * (0.5 if name == "contrastive" else 1) for name, value in result.terms[0].items())
        torch.testing.assert_close(result.losses[0], expected)


# Teacher ----------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_averaged_model_before_the_step() -> None:
    objective = GreedySupervised(teacher_share=(0.3, 0.6), label_smoothing=0.1)
    learner = learner_of(make(drop_path_rate=0.5), objective=objective, ema_decay=0.5)
    train(learner, 3)
    images, labels = a_batch(9)
    average = copy.deepcopy(learner.averaged_model)
    assert average is not None
    with torch.no_grad():
        shares = average.eval()(images).softmax(1).numpy()
        plain = learner.model(images).softmax(1).numpy()
    assert np.abs(shares - plain).max() > 1e-3  # else this shows nothing
    result = learner.step(images, labels)
    for index, share in enumerate((0.3, 0.6)):
        logits = result.module_logits[index]
        assert logits is not None
        log_shares = logits.double().log_softmax(1).numpy()
        one_hot = 0.9 * np.eye(5)[labels.numpy()] + 0.1 / 5
        by_labels, taught = (-(target * log_shares).sum(1).mean() for target in (one_hot, shares))
        expected = (1 - share) * by_labels + share * taught
        assert result.terms[index]["task"].item() == pytest.approx(expected, rel=1e-5)
    assert list(result.terms[-1]) == ["task"]


def test_no_teacher_without_an_average() -> None:
    with pytest.raises(RecipeError, match=r"teacher_share must be from 0 to 1, got 1\.5"):
        learner_of(objective=GreedySupervised(teacher_share=1.5), ema_decay=0.9)
    with pytest.raises(RecipeError, match=r"teacher_share needs ema_decay: .* add ema_decay=0\.999"):
        learner_of(objective=GreedySupervised(teacher_share=0.5))


def test_teacher_share_is_a_mixture() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(3, 4), torch.rand(3, 4).softmax(1)
    batch = LocalBatch(None, torch.tensor([1, 0, 3]), teacher=teacher)
    ends = [TaskLoss(nn.Identity(), 0.0, share)(logits, logits, batch).loss for share in (0.0, 1.0, 0.25)]
    torch.testing.assert_close(ends[1], -(teacher * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(ends[2], 0.75 * ends[0] + 0.25 * ends[1])


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "count"), [(7, 3), (4, 2), (2, 5)])
def test_a_batch_is_cut_alike(num_images: int, count: int) -> None:
    rows = torch.arange(num_images)

    def marked(*shape: int) -> Tensor:
        return rows.view(-1, *[1] * len(shape)).expand(num_images, *shape)

    whole = LocalBatch(
        marked(3, 2, 2),
        rows,
        teacher=marked(5),
        previous=marked(4, 8),
        context=(marked(2, 2, 3), marked(1, 1, 2)),
        gradient=marked(4, 8),
    )
    parts = whole.parts(count)
    assert [part.labels.tolist() for part in parts] == [chunk.tolist() for chunk in rows.chunk(count)]
    for part in parts:
        tensors = [part.images, part.teacher, part.previous, part.gradient, *part.context]
        assert len(part.context) == 2
        for tensor in tensors:
            assert tensor is not None
            assert tensor.flatten(1)[:, 0].tolist() == part.labels.tolist()
    bare = LocalBatch(None, rows).parts(count)
    assert all((p.images, p.teacher, p.previous, p.gradient, p.context) == (None, None, None, None, ()) for p in bare)


def test_parts_of_a_batch_give_the_whole_steps_gradient() -> None:
    objective = FeatureReconstruction(context=1.0, reconstruct="previous", teacher_share=0.5, transport_tau=1.0)
    found = []
    for accumulation in (1, 2):
        learner = learner_of(objective=objective, ema_decay=0.9, accumulation=accumulation)
        learner.configure_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        train(learner, 2)
        found.append(learner.model.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)
