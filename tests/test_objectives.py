"""Each term of a local objective against the formula, written a second time in numpy or as a naive loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import localgrad
from localgrad import (
    Contrastive,
    FeatureReconstruction,
    GreedySupervised,
    ImageReconstruction,
    Layout,
    LocalLearner,
    Objective,
)
from localgrad.errors import RecipeError
from localgrad.objectives.auxiliary import LinearDecoder
from localgrad.objectives.base import LocalObjective
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import OBJECTIVES, build_objective
from localgrad.objectives.reconstruction import Reconstruction
from localgrad.objectives.site import Site
from localgrad.objectives.supervised import SupervisedContrastive, TaskLoss

IMAGE = Layout(kind="NCHW", width=3, grid=(16, 16))
FEATURES = Layout(kind="NHWC", width=8, grid=(4, 4))
TOKENS = Layout(kind="tokens", width=8, grid=(4, 4), num_prefix_tokens=1)
DEEP = Layout(kind="NHWC", width=16, grid=(2, 2))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def site(index: int = 1, num_modules: int = 4, inputs: Layout = FEATURES, outputs: Layout = DEEP) -> Site:
    return Site(index=index, num_modules=num_modules, inputs=inputs, outputs=outputs, image=IMAGE, num_classes=5)


def features(layout: Layout, count: int = 3) -> Tensor:
    height, width = layout.grid
    shape = {
        "NHWC": (height, width, layout.width),
        "NCHW": (layout.width, height, width),
        "tokens": (layout.num_prefix_tokens + height * width, layout.width),
    }[layout.kind]
    return torch.randn(count, *shape)


def a_batch(count: int = 3) -> LocalBatch:
    return LocalBatch(features(IMAGE, count), torch.arange(count) % 5)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# Task loss -------------------------------------------------------------------------------------------------------


def naive_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over images of -sum over classes of target * log share."""
    return float(np.mean([-(t * np.log(softmax(row))).sum() for row, t in zip(logits, targets, strict=True)]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_task_loss_is_the_cross_entropy_with_smoothed_labels(smoothing: float) -> None:
    logits, labels = torch.randn(6, 5).double(), torch.tensor([0, 4, 2, 2, 1, 3])
    targets = np.full((6, 5), smoothing / 5)
    targets[np.arange(6), labels.numpy()] += 1 - smoothing
    value = TaskLoss(nn.Identity(), smoothing)(torch.empty(0), logits, LocalBatch(None, labels))
    assert value.loss.item() == pytest.approx(naive_cross_entropy(logits.numpy(), targets), rel=1e-9)
    assert value.logits is logits


def test_task_loss_takes_soft_labels_as_they_are() -> None:
    logits, targets = torch.randn(6, 5).double(), torch.rand(6, 5).double().softmax(dim=1)
    value = TaskLoss(nn.Identity(), 0.3)(torch.empty(0), logits, LocalBatch(None, targets))  # not smoothed twice
    assert value.loss.item() == pytest.approx(naive_cross_entropy(logits.numpy(), targets.numpy()), rel=1e-9)


def test_task_loss_uses_its_classifier() -> None:
    classifier = nn.Linear(8, 5)
    outputs = torch.randn(3, 8)
    term = TaskLoss(classifier)
    value = term(torch.empty(0), outputs, a_batch())
    assert value.logits is not None
    torch.testing.assert_close(value.logits, outputs @ classifier.weight.T + classifier.bias)
    assert torch.equal(term.classify(outputs), value.logits)


# Reconstruction --------------------------------------------------------------------------------------------------


class Copied(LinearDecoder):
    """A decoder whose prediction is given, so that the loss alone is looked at."""

    def __init__(self, target: Layout, prediction: Tensor) -> None:
        super().__init__(DEEP, target)
        self.prediction = prediction

    def forward(self, features: Tensor, hidden: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        return self.prediction


def naive_squared_error(prediction: np.ndarray, target: np.ndarray, *, normalise: bool) -> float:
    """Position by position; a normalised target has mean 0 and (biased) variance 1 over its channels."""
    total, count = 0.0, 0
    for b, h, w in np.ndindex(*target.shape[:3]):
        wanted = target[b, h, w].astype(np.float64)
        if normalise:
            wanted = (wanted - wanted.mean()) / math.sqrt(wanted.var() + 1e-5)
        total += ((prediction[b, h, w] - wanted) ** 2).sum()
        count += wanted.size
    return total / count


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("layout", [FEATURES, TOKENS])
def test_feature_reconstruction_is_the_mean_squared_error(layout: Layout, normalise: bool) -> None:
    inputs, prediction = 3 + 2 * features(layout), torch.randn(3, 4, 4, 8)
    grid = inputs.numpy() if layout is FEATURES else inputs[:, 1:].reshape(3, 4, 4, 8).numpy()
    term = Reconstruction(Copied(layout, prediction), of="inputs", normalise=normalise)
    value = term(inputs, features(DEEP), LocalBatch(None, torch.arange(3)))
    expected = naive_squared_error(prediction.numpy(), grid, normalise=normalise)
    assert value.loss.item() == pytest.approx(expected, rel=1e-5)
    assert value.logits is None


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_image_reconstruction_at_any_patch_size(side: int) -> None:
    """Each position of the output predicts its own patch of pixels, 1 x 1 to 16 x 16."""
    source = Layout(kind="NHWC", width=8, grid=(16 // side, 16 // side))
    decoder = LinearDecoder(source, IMAGE)
    outputs, batch = features(source), a_batch()
    assert batch.images is not None
    value = Reconstruction(decoder, of="image", normalise=False)(torch.empty(0), outputs, batch)
    patches = decoder.project(decoder.norm(outputs)).detach().numpy()
    total = 0.0
    for b, row, column in np.ndindex(3, *source.grid):
        patch = patches[b, row, column].reshape(side, side, 3)
        pixels = batch.images[b, :, row * side : (row + 1) * side, column * side : (column + 1) * side].numpy()
        total += ((patch.transpose(2, 0, 1) - pixels) ** 2).sum()
    assert value.loss.item() == pytest.approx(total / batch.images.numel(), rel=1e-5)


# Supervised contrastive loss -------------------------------------------------------------------------------------


def khosla(z: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    """Equation 2 of arXiv 2004.11362, anchor by anchor; a pair counts as far as its soft targets overlap."""
    losses = []
    for i in range(len(z)):
        denominator = sum(math.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i)
        total = num_positives = 0.0
        for p in range(len(z)):
            overlap = float(targets[i] @ targets[p])
            if p == i or overlap == 0:
                continue
            total += overlap * math.log(math.exp(z[i] @ z[p] / temperature) / denominator)
            num_positives += overlap
        if num_positives:
            losses.append(-total / num_positives)
    return sum(losses) / len(losses) if losses else 0.0


def unit_vectors(count: int) -> Tensor:
    return nn.functional.normalize(torch.randn(count, 6).double(), dim=1)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 0], [0, 0, 1, 2, 3], [4, 4, 4, 4, 4]])
def test_contrastive_loss_is_equation_2(labels: list[int], temperature: float) -> None:
    z = unit_vectors(5)
    term = SupervisedContrastive(FEATURES, 5, temperature=temperature)
    expected = khosla(z.numpy(), np.eye(5)[labels], temperature)
    assert term.loss(z, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_loss_with_soft_labels() -> None:
    z, targets = unit_vectors(6), (torch.rand(6, 5) * 3).softmax(dim=1)
    term = SupervisedContrastive(FEATURES, 5)
    expected = khosla(z.numpy(), targets.double().numpy(), 0.1)
    assert term.loss(z, targets).item() == pytest.approx(expected, rel=1e-5)
    one_hot = torch.eye(5)[torch.tensor([0, 0, 1, 2, 1, 1])]
    assert term.loss(z, one_hot).item() == pytest.approx(term.loss(z, one_hot.argmax(dim=1)).item(), rel=1e-9)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0]])
def test_anchors_without_positives_give_no_loss_and_no_gradient(labels: list[int]) -> None:
    z = unit_vectors(len(labels)).requires_grad_()
    loss = SupervisedContrastive(FEATURES, 5).loss(z, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_contrastive_term_projects_to_unit_vectors() -> None:
    term = SupervisedContrastive(TOKENS, 5)
    outputs, batch = features(TOKENS, 4), LocalBatch(None, torch.tensor([0, 0, 1, 1]))
    z = term.project(outputs)
    z = (z / z.square().sum(dim=1, keepdim=True).sqrt()).detach().double()
    expected = khosla(z.numpy(), np.eye(5)[[0, 0, 1, 1]], 0.1)
    assert term(torch.empty(0), outputs, batch).loss.item() == pytest.approx(expected, rel=1e-4)
    assert term.classify(outputs) is None


def test_contrastive_loss_is_exact_under_bf16_autocast() -> None:
    """Similarities in bf16 are off by parts in 256, and the exponential at temperature 0.1 makes that percents."""
    term = SupervisedContrastive(FEATURES, 5)
    outputs, batch = features(FEATURES, 6), LocalBatch(None, torch.tensor([0, 0, 1, 1, 2, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(torch.empty(0), outputs, batch).loss
        z = nn.functional.normalize(term.project(outputs).float(), dim=1)
    assert loss.dtype == torch.float32
    expected = khosla(z.detach().double().numpy(), np.eye(5)[batch.labels], 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# Sums of weighted terms ------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_and_terms_are_reported_unweighted() -> None:
    objective = FeatureReconstruction(task_weight=0.25, reconstruction_weight=3.0).build(site())
    inputs, outputs, batch = features(FEATURES), features(DEEP), a_batch()
    value = objective(inputs, outputs, batch)
    alone = {name: term(inputs, outputs, batch).loss for name, term in objective.terms.items()}
    torch.testing.assert_close(value.terms, alone)
    torch.testing.assert_close(value.loss, 0.25 * alone["task"] + 3 * alone["reconstruction"])
    assert value.logits is not None
    assert value.logits.shape == (3, 5)


@pytest.mark.parametrize(
    ("num_modules", "expected"),
    [(2, [2.0]), (3, [2.0, 1.0]), (4, [2.0, 1.5, 1.0]), (6, [2.0, 1.75, 1.5, 1.25, 1.0])],
)
def test_weights_by_depth_go_from_the_first_module_to_the_last_but_one(num_modules: int, expected: list[float]) -> None:
    objective = FeatureReconstruction(reconstruction_weight=(2.0, 1.0))
    built = [objective.build(site(index, num_modules)) for index in range(num_modules - 1)]
    assert [each.weights["reconstruction"] for each in built] == pytest.approx(expected)
    assert [each.weights["task"] for each in built] == [1.0] * (num_modules - 1)


def test_weights_by_depth_may_be_a_list_as_toml_writes_pairs() -> None:
    objective = build_objective("feature", {"reconstruction_weight": [2.0, 1.0]})
    assert objective.build(site(1, 4)).weights["reconstruction"] == 1.5


@pytest.mark.parametrize("weight", ["heavy", [1.0], [1.0, 2.0, 3.0], math.nan, math.inf])
def test_weights_that_are_none_are_refused(weight: Any) -> None:
    with pytest.raises(RecipeError, match="weight"):
        build_objective("feature", {"reconstruction_weight": weight}).build(site())


def test_a_weight_of_zero_drops_the_term_and_its_net() -> None:
    objective = FeatureReconstruction(reconstruction_weight=0.0).build(site())
    assert list(objective.terms) == ["task"]
    assert not [name for name, _ in objective.named_parameters() if "decoder" in name]
    faded = FeatureReconstruction(reconstruction_weight=(1.0, 0.0))
    assert [sorted(faded.build(site(index, 3)).terms) for index in (0, 1)] == [["reconstruction", "task"], ["task"]]


@pytest.mark.parametrize(
    "objective", [GreedySupervised(task_weight=-1.0), FeatureReconstruction(task_weight=(1.0, -1.0))]
)
def test_a_negative_weight_is_refused(objective: Objective) -> None:
    with pytest.raises(RecipeError, match=r"weight of 'task' is -1.0 in local module 2; it can't be negative"):
        objective.build(site(2, 4))


@pytest.mark.parametrize(
    "objective",
    [
        GreedySupervised(task_weight=0.0),
        FeatureReconstruction(task_weight=0.0, reconstruction_weight=0.0),
        Contrastive(contrastive_weight=0.0, reconstruction_weight=0.0),
    ],
)
def test_nothing_to_learn_is_refused(objective: Objective) -> None:
    with pytest.raises(RecipeError, match=r"local module 1 has nothing to learn: every weight of .* is 0"):
        objective.build(site())


# The methods by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        (GreedySupervised(), ["task"]),
        (FeatureReconstruction(), ["task", "reconstruction"]),
        (ImageReconstruction(), ["task", "reconstruction"]),
        (Contrastive(), ["reconstruction", "contrastive"]),
        (Contrastive(reconstruction_weight=0.0), ["contrastive"]),
    ],
)
def test_terms_of_each_method(objective: Objective, terms: list[str]) -> None:
    assert list(objective.build(site()).terms) == terms
    last = objective.build(site(3, 4))
    assert list(last.terms) == ["task"]
    assert not list(last.parameters())
    logits = torch.randn(3, 5)
    assert torch.equal(
        last(torch.empty(0), logits, a_batch()).loss, nn.functional.cross_entropy(logits, torch.arange(3))
    )


def test_the_last_module_smooths_its_labels_too() -> None:
    for name in OBJECTIVES:
        last = build_objective(name, {"label_smoothing": 0.2}).build(site(3, 4))
        assert last.terms["task"].label_smoothing == 0.2
    assert FeatureReconstruction(label_smoothing=0.2).build(site()).terms["task"].label_smoothing == 0.2


def reconstruction_of(objective: LocalObjective) -> Reconstruction:
    term = objective.terms["reconstruction"]
    assert isinstance(term, Reconstruction)
    return term


def test_feature_reconstruction_predicts_what_the_module_received() -> None:
    first = reconstruction_of(FeatureReconstruction().build(site(0, 4, inputs=IMAGE, outputs=FEATURES)))
    assert first.decoder.target == IMAGE
    assert not first.normalise, "pixels come normalised from the data path"
    images, outputs = features(IMAGE), features(FEATURES)
    prediction = first.decoder(outputs).detach()
    value = first(images, outputs, LocalBatch(None, torch.arange(3)))
    expected = naive_squared_error(prediction.numpy(), images.permute(0, 2, 3, 1).numpy(), normalise=False)
    assert value.loss.item() == pytest.approx(expected, rel=1e-5)

    second = reconstruction_of(FeatureReconstruction().build(site(1)))
    assert second.decoder.target == FEATURES
    assert second.normalise
    assert "images" not in second.uses
    assert not reconstruction_of(FeatureReconstruction(normalise_targets=False).build(site(1))).normalise


@pytest.mark.parametrize("objective", [ImageReconstruction(), Contrastive()])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_image_methods_reconstruct_the_image_everywhere(objective: Objective, index: int) -> None:
    term = reconstruction_of(objective.build(site(index)))
    assert (term.decoder.target, term.of, term.normalise) == (IMAGE, "image", False)
    assert "images" not in objective.build(site(3, 4)).uses


def test_options_reach_the_auxiliary_nets() -> None:
    options = {
        "decoder": "conv",
        "decoder_options": {"hidden_width": 7},
        "classifier": "transformer",
        "classifier_options": {"depth": 2, "grid": 1},
    }
    objective = build_objective("feature", options).build(site())
    assert reconstruction_of(objective).decoder.first.out_channels == 7
    classifier = objective.terms["task"].classifier
    assert len(classifier.blocks) == 2
    assert classifier.grid == (1, 1)


@pytest.mark.parametrize(("name", "cls"), [("feature", FeatureReconstruction), ("contrastive", Contrastive)])
def test_objectives_by_name(name: str, cls: type) -> None:
    assert build_objective(name, {}) == cls()
    assert sorted(OBJECTIVES) == ["contrastive", "feature", "greedy", "image", "lopt", "segprop", "solo"]


def test_unknown_objectives_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"unknown 'featur'; there are feature, image.*Nearest: feature"):
        build_objective("featur", {})


@pytest.mark.parametrize(("name", "options"), [("greedy", {"decoder": "conv"}), ("contrastive", {"temprature": 1})])
def test_options_of_another_objective_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"objective '{name}' can't take .*{next(iter(options))}"):
        build_objective(name, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "convv"}, "decoder: unknown 'convv'.*Nearest: conv"),
        ({"classifier": "linaer"}, "classifier: unknown 'linaer'.*Nearest: linear"),
        ({"decoder_options": {"hidden": 3}}, "decoder_options: 'linear' can't take .*hidden"),
        ({"classifier": "mlp", "classifier_options": {"depth": 3}}, "classifier_options: 'mlp' can't take .*depth"),
    ],
)
def test_wrong_auxiliary_nets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_objective("feature", options).build(site())


@pytest.mark.parametrize("options", [{"label_smoothing": 1.5}, {"label_smoothing": -0.1}])
def test_label_smoothing_outside_its_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="label_smoothing"):
        build_objective("greedy", options).build(site())


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_divides_by_nothing_is_refused(temperature: float) -> None:
    with pytest.raises(RecipeError, match="temperature"):
        build_objective("contrastive", {"temperature": temperature}).build(site())


# Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "term"),
    [
        (GreedySupervised(), "task"),
        (FeatureReconstruction(), "reconstruction"),
        (ImageReconstruction(), "reconstruction"),
        (Contrastive(), "contrastive"),
        (Contrastive(), "reconstruction"),
    ],
)
def test_every_term_trains_the_blocks_and_its_own_net(objective: Objective, term: str) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    learner = LocalLearner(model, modules=3, objective=objective, input_size=(3, 32, 32))
    module = learner.modules[1]
    inputs = torch.randn(4, 17, 32)
    batch = LocalBatch(torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 1]))
    outputs = module.features(inputs)
    module.objective.terms[term](inputs, outputs, batch).loss.backward()
    for part in [*module.parts, module.objective.terms[term]]:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_objectives_are_values() -> None:
    assert localgrad.FeatureReconstruction() == FeatureReconstruction()
    with pytest.raises(AttributeError, match="cannot assign"):
        FeatureReconstruction().decoder = "conv"  # type: ignore[misc]
