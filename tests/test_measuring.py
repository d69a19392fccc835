"""``localgrad.measure`` against nets counted by hand, and against the estimate, with which it shares no code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers import SIZE, adamw, batches, make
from localgrad import FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner, RecipeError
from localgrad.compare import measuring
from localgrad.estimating import estimate_step
from localgrad.objectives.carried import LocalBatch


def learner_of(kind: str, **more: Any) -> LocalLearner:
    width = {"embed_dim": 64} if kind == "vit" else {}
    return LocalLearner(make(kind, **width), input_size=SIZE, **more)


def test_a_chain_of_linear_layers_is_measured_to_the_byte() -> None:
    """Widths 100, 200, 50 without biases, batch 10, SGD: every tensor counted by hand."""
    chain = nn.Sequential(nn.Linear(100, 200, bias=False), nn.Linear(200, 50, bias=False))
    optimizer = torch.optim.SGD(chain.parameters(), lr=0.1, momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> None:
        chain(images).backward(torch.ones(10, 50))
        optimizer.step()
        optimizer.zero_grad()

    found = localgrad.measure(step, torch.randn(10, 100), torch.zeros(10), holds=(chain, optimizer), repeats=1)
    weights = 100 * 200 + 200 * 50
    inputs = 10 * 100 + 10
    # Deepest in the backward pass of the first layer: the second's gradient, the first's, and what it came from. The
    # output and its gradient are held by the call of backward, the hidden features are freed with the second layer.
    alive = 200 * 50 + 100 * 200 + 10 * 200 + 2 * 10 * 50
    assert found.peak_bytes == 4 * (2 * weights + inputs + alive)
    assert found.reserved_bytes is None


def test_memory_that_a_step_brings_in_once_is_its_peak() -> None:
    def step(images: Tensor, labels: Tensor) -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        torch.empty(5000, dtype=torch.uint8)
        del first
        torch.empty(5500, dtype=torch.uint8)

    images, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    found = localgrad.measure(step, images, labels, holds=[], repeats=1, warmup=0)
    assert found.peak_bytes == images.nbytes + labels.nbytes + 6000


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "objective", "modules"),
    [
        ("vit", FeatureReconstruction(), 1),
        ("vit", ImageReconstruction(), 3),
        ("swin", FeatureReconstruction(), 3),
        ("swin", GreedySupervised(), 2),
    ],
)
def test_measured_is_within_five_percent_of_estimated(kind: str, objective: Any, modules: int) -> None:
    learner = learner_of(kind, modules=modules, objective=objective)
    estimated = estimate_step(learner, 16, adamw)
    learner.configure_optimizers(adamw)
    images, labels = batches(1, 16)[0]

    def step(images: Tensor, labels: Tensor) -> None:  # as from a data path, with images of its own to give away
        learner.step_on(LocalBatch(images.clone(), labels))

    kept = [*learner.modules, *learner.optimizers]
    found = localgrad.measure(step, images, labels, holds=kept, repeats=1).peak_bytes - images.nbytes
    assert found == pytest.approx(estimated.peak_bytes, rel=0.05)
    above = found - measuring.resident_bytes(kept)
    assert above == pytest.approx(estimated.peak_bytes - estimated.static_bytes, rel=0.15)  # not by static bytes alone


def test_a_learner_tells_itself_what_it_holds() -> None:
    learner = learner_of("vit", modules=2)
    learner.configure_optimizers(adamw)
    images, labels = batches(1, 16)[0]
    told = localgrad.measure(learner, images, labels, repeats=1)
    holds = [*learner.modules, *learner.optimizers]
    assert told.peak_bytes == localgrad.measure(learner.step, images, labels, holds=holds, repeats=1).peak_bytes
    assert (
        told.peak_bytes > measuring.resident_bytes(holds) > 3 * 4 * sum(p.numel() for p in learner.model.parameters())
    )


def test_a_reconstruction_does_not_keep_its_target_alive() -> None:
    """torch gives a mean squared error a storage as large as the target; the figures of a step must not hold that."""
    learner = learner_of("vit", modules=3, objective=ImageReconstruction())
    learner.configure_optimizers(adamw)
    result = learner.step(*batches(1, 16)[0])
    sizes = [term.untyped_storage().nbytes() for terms in result.terms for term in terms.values()]
    assert max(sizes) == 4


def test_times_and_rates_come_from_the_clock() -> None:
    calls: list[int] = []
    found = localgrad.measure(
        lambda images, labels: calls.append(1), torch.zeros(6, 1), torch.zeros(6), holds=[], repeats=4, warmup=3
    )
    assert len(calls) == 3 + 1 + 4
    assert len(found.seconds) == 4
    assert found.batch_size == 6
    assert found.images_per_second == 6 / found.median_seconds
    now = iter([10.0, 12.5])
    assert measuring.timed(lambda: None, torch.device("cpu"), lambda: next(now)) == 2.5


def test_resident_bytes_counts_each_storage_once() -> None:
    layer = nn.Linear(10, 10, bias=False)
    tied = nn.Linear(10, 10, bias=False)
    tied.weight = layer.weight
    layer.weight.grad = torch.zeros(10, 10)
    assert measuring.resident_bytes([layer, tied, layer.weight]) == 2 * 400


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"repeats": 0, "holds": []}, "repeats must be at least 1, got 0"),
        ({"warmup": -1, "holds": []}, "warmup can't be negative, got -1"),
        ({}, r"pass holds=\(model, optimizer\)"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        localgrad.measure(lambda images, labels: None, torch.zeros(1), torch.zeros(1), **wrong)


def test_a_learner_without_optimizers_is_told_so() -> None:
    with pytest.raises(RecipeError, match="configure_optimizers"):
        localgrad.measure(learner_of("vit"), *batches(1, 16)[0])
