"""What batches carry, added to from outside: in one process here, in several in ``test_parallel.py`` ("own")."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers import SIZE, adamw, batches, make, make_backbone
from localgrad import Carried, LocalBatch, LocalLearner, RecipeError, check_isolation, register_carried
from localgrad.estimating import estimate_step
from localgrad.memory.costs import CostSettings
from localgrad.memory.parts import measure_costs
from localgrad.objectives.base import LocalObjective
from localgrad.objectives.carried import CARRIED, Route
from localgrad.step.executor import walk
from localgrad.training.health import gradient_cosine
from parallel_worker import Moments, moments


def make_learner(**more: Any) -> LocalLearner:
    torch.manual_seed(0)
    learner = LocalLearner(make_backbone(), modules=4, objective=Moments(), **more)
    learner.configure_optimizers(adamw)
    return learner


@pytest.mark.parametrize("parts", [1, 2])
def test_own_things_are_made_on_the_way_and_cut_with_the_batch(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(accumulation=parts)
    images, labels = batches(1, 6)[0]
    found: dict[int, list[Any]] = {}
    indices = {id(module.objective): index for index, module in enumerate(learner.modules)}
    forward = LocalObjective.forward

    def watched(self: LocalObjective, inputs: Tensor, outputs: Tensor, batch: LocalBatch, *more: Any) -> Any:
        found.setdefault(indices[id(self)], []).append((inputs, batch.moments, batch.scale, batch.images))
        return forward(self, inputs, outputs, batch, *more)

    monkeypatch.setattr(LocalObjective, "forward", watched)
    learner.step(images, labels)
    expected = moments(images)
    for index in range(3):
        inputs = torch.cat([given[0] for given in found[index]])
        if index:
            expected = 0.5 * expected + 0.5 * moments(inputs)
        assert torch.equal(torch.cat([given[1] for given in found[index]]), expected)
        assert all(torch.equal(given[2], images.abs().amax().view(1)) for given in found[index])
        assert all(given[3] is None for given in found[index])  # nobody looks at the images
    assert all(given[1:3] == (None, None) for given in found[3])  # nor the last module at these


def test_training_with_own_things_learns_and_stays_isolated() -> None:
    learner = make_learner(ema_decay=0.9)
    data = batches(1, 6) * 12
    losses = [learner.step(*batch).losses for batch in data]
    assert all(last < first for first, last in zip(losses[0][:-1], losses[-1][:-1], strict=True))
    check_isolation(learner)
    cosines = gradient_cosine(learner, LocalBatch(*data[0]))
    assert len(cosines) == 4
    assert cosines[-1] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.heavy
def test_the_estimate_knows_what_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thing as large as the image, from the first module to the last but one, costs its bytes."""
    learner = make_learner()
    before = estimate_step(learner, 32, adamw).peak_bytes
    image_bytes = 32 * 4 * torch.Size(SIZE).numel()
    large = Carried(
        name="scale", shape=lambda site: site.image.shape, begin=lambda batch, learner: batch.features * 2.0
    )
    monkeypatch.setitem(CARRIED, "scale", large)
    learner = make_learner()
    after = estimate_step(learner, 32, adamw).peak_bytes
    assert after - before == image_bytes - 4  # that the small one took
    costs = measure_costs(learner.backbone, Moments(), adamw, CostSettings(batch_size=32))
    assert costs.carried == image_bytes
    assert "scale" in costs.uses
    assert "scale" not in costs.last_uses


@pytest.mark.heavy
def test_own_things_are_planned_for() -> None:
    model = make("vit")
    options: dict[str, Any] = {"batch_size": 16, "objective": Moments(), "input_size": SIZE, "cache": False}
    plan = localgrad.plan(model, budget="1GiB", **options)
    learner = LocalLearner(model, modules=plan, objective=Moments(), input_size=SIZE)
    learner.configure_optimizers(adamw)
    learner.step(*batches(1, 16)[0])
    ranks, bare = (
        localgrad.plan(model, parallel=3, **{**options, "objective": objective}).forecast.parallel.sent_bytes
        for objective in (Moments(), localgrad.GreedySupervised(classifier="linear"))
    )
    own = 4 * (2 * 16 + 1)  # moments of each image, and the scale; the last module looks at neither
    assert ranks == (bare[0] + own, bare[1])


def test_who_looks_at_what_nobody_carries_is_told() -> None:
    with pytest.raises(
        RecipeError, match=r"looks at wind, which no batch carries.*register_carried\(Carried\(name='wind'"
    ):
        Route([frozenset({"wind"})])
    with pytest.raises(RecipeError, match="localgrad carries images itself"):
        register_carried(Carried(name="images", shape=lambda site: (1,)))
    for name in ("features", "no name", "_x"):
        with pytest.raises(RecipeError, match="can't be what a batch carries"):
            Carried(name=name, shape=lambda site: (1,))
    with pytest.raises(RecipeError, match="need make="):
        Carried(name="mine", shape=lambda site: (1,), grows=True)
    with pytest.raises(TypeError, match="nothing is carried as mine"):
        LocalBatch(None, torch.zeros(2), mine=torch.zeros(2))
    with pytest.raises(AttributeError, match="has no mine"):
        LocalBatch(None, torch.zeros(2)).mine  # noqa: B018


def test_no_name_of_a_batch_itself_is_carried() -> None:
    batch = LocalBatch(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))
    for name in {*dir(batch), *vars(batch)}:
        if not name.startswith("_"):
            with pytest.raises(RecipeError, match=f"name: .*{name}.* take another"):
                register_carried(Carried(name=name, shape=lambda site: (1,)))


def test_what_comes_with_the_batch_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARRIED, "scale", Carried(name="scale", shape=lambda site: (1,), splits=False))
    learner = make_learner()
    images, labels = batches(1)[0]
    with pytest.raises(RecipeError, match=r"scale: an objective looks at it, and the batch has none; give LocalBatch"):
        learner.step(images, labels)
    learner.step_on(LocalBatch(images, labels, scale=torch.ones(1)))


def test_things_go_as_soon_as_no_module_behind_looks_at_them() -> None:
    layers = [nn.Identity() for _ in range(4)]
    for layer in layers:
        layer.layout = localgrad.Layout(kind="NCHW", width=3, grid=(2, 2))
    route = Route([frozenset(), frozenset({"images"}), frozenset({"previous"}), frozenset({"context"})])
    batch = LocalBatch(torch.ones(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64))
    seen = []
    for visit in walk(layers, batch, route):
        seen.append(sorted(batch.carried))
        visit.hand_on(visit.received + 1)
    assert seen == [["images"], ["context", "images"], ["context", "previous"], ["context"]]
    assert [float(pooled.mean()) for pooled in batch.context] == [2.0, 3.0, 4.0]
