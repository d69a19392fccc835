"""Blocks that two modules train, against a plain loop."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localgrad
from helpers import (
    assert_same,
    batches,
    copied,
    make,
    make_learner,
    quick_adamw,
    term_of,
    train,
)
from localgrad import FeatureReconstruction
from localgrad.errors import RecipeError

SWIN: dict[str, Any] = {"depths": (2, 2, 1), "drop_path_rate": 0.0}  # timm gives a Swin 0.1

learner_of = partial(make_learner, optimizer=quick_adamw)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_overlap_is_what_a_plain_loop_does() -> None:
    learner = learner_of(make(depth=6), [2, 4], objective=FeatureReconstruction(), overlap=1)
    model = copy.deepcopy(learner.model)
    extra = [copy.deepcopy(module.objective) for module in learner.modules]
    blocks = model.blocks
    stem = [model.cls_token, model.pos_embed, *model.patch_embed.parameters()]
    owned = [
        [*stem, *blocks[:2].parameters(), *extra[0].parameters()],
        [*blocks[1:4].parameters(), *extra[1].parameters()],
        [*blocks[3:].parameters(), *model.norm.parameters(), *model.head.parameters()],
    ]
    optimizers = [quick_adamw(parameters) for parameters in owned]

    def update(index: int, y: Tensor, target: Tensor, labels: Tensor) -> None:
        task, reconstruction = extra[index].terms["task"], extra[index].terms["reconstruction"]
        loss = F.cross_entropy(task.classifier(y), labels) + F.mse_loss(reconstruction.decoder(y), target)
        loss.backward()
        optimizers[index].step()
        optimizers[index].zero_grad()

    data = batches(3)
    results = train(learner, data)
    for (images, labels), result in zip(data, results, strict=True):
        first = blocks[0](model._pos_embed(model.patch_embed(images)))
        update(0, blocks[1](first), images.permute(0, 2, 3, 1), labels)
        first = first.detach()  # what enters the block in common
        grid = first[:, 1:].reshape(len(images), 4, 4, 32)
        second = blocks[2](blocks[1](first))
        update(1, blocks[3](second), F.layer_norm(grid, (32,)), labels)
        x = second.detach()
        for block in blocks[3:]:
            x = block(x)
        logits = model.head(model.norm(x)[:, 0])
        F.cross_entropy(logits, labels).backward()
        optimizers[2].step()
        optimizers[2].zero_grad()
        assert torch.equal(result.logits, logits.detach())
    assert_same(copied(learner.model), copied(model))
    for module, ours in zip(learner.modules, extra, strict=True):
        assert_same(copied(module.objective), copied(ours))
    assert [len(module.parts) for module in learner.modules] == [3, 3, 4]


def test_with_overlap_the_model_stays_plain_and_isolated() -> None:
    learner = learner_of(overlap=1, objective=FeatureReconstruction(context=0.5, reconstruct="previous"))
    train(learner, batches(2))
    localgrad.check_isolation(learner)
    plain = make().eval()
    plain.load_state_dict(learner.model.state_dict())
    images, _ = batches(1)[0]
    learner.eval()
    with torch.no_grad():
        logits = learner.logits(images)
        assert logits[-1] is not None
        assert torch.equal(plain(images), logits[-1])
    assert [found is not None and tuple(found.shape) for found in logits] == [(4, 5)] * 3


@pytest.mark.parametrize(("boundaries", "shared"), [([1, 2, 3], [0, 1, 1, 1]), ([3], [0, 3]), ([2, 3], [0, 2, 1])])
def test_overlap_is_at_most_the_module_before(boundaries: list[int], shared: list[int]) -> None:
    with pytest.warns(UserWarning, match=r"overlap=7: local modules that have fewer blocks .* 0 \(\d\)"):
        learner = learner_of(modules=boundaries, overlap=7)
    assert [module.shared for module in learner.modules] == shared
    assert [module.given for module in learner.modules] == [*shared[1:], 0]
    entered: list[Tensor] = []
    handles = [
        module.parts[0].register_forward_pre_hook(lambda _, args: entered.append(args[0])) for module in learner.modules
    ]
    train(learner, batches(1))
    for handle in handles:
        handle.remove()
    assert len(entered) >= len(shared)
    with torch.no_grad():
        learner.eval()
        images = batches(1)[0][0]
        assert torch.equal(learner.logits(images)[-1], learner.model(images))  # type: ignore[arg-type]


def test_overlap_across_a_change_of_resolution() -> None:
    learner = learner_of(make("swin", **SWIN), [2, 4], objective=FeatureReconstruction(), overlap=1)
    layouts = learner.backbone.layouts
    targets = [term_of(module.objective, "reconstruction").decoder.target for module in learner.modules[:-1]]
    assert targets[1] == layouts[1]
    train(learner, batches(1))
    learner.eval()
    images = batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(learner.logits(images)[-1], learner.model(images))  # type: ignore[arg-type]


@pytest.mark.heavy
def test_overlap_may_be_recomputed_and_cut_in_parts() -> None:
    found = {}
    for checkpoint, accumulation in [("none", 1), ("blocks", 1), ("halves", 1), ("blocks", 2), ("halves/2:1", 2)]:
        learner = learner_of(optimizer=sgd, overlap=1, checkpoint=checkpoint, accumulation=accumulation)
        train(learner, batches(2))
        found[checkpoint, accumulation] = copied(learner.model)
    expected = found.pop(("none", 1))
    assert_same(found.pop(("blocks", 1)), expected)
    for weights in found.values():
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_overlap_resumes_bit_for_bit() -> None:
    settings: dict[str, Any] = {"overlap": 1, "clip_grad": 0.5, "ema_decay": 0.9}
    learner = learner_of(make(drop_path_rate=0.2), **settings)
    train(learner, batches(2))
    state = copy.deepcopy(learner.state_dict())
    train(learner, batches(2))
    other = learner_of(make(drop_path_rate=0.2), **settings)
    other.load_state_dict(state)
    train(other, batches(2))
    assert_same(other.state_dict(), learner.state_dict())


@pytest.mark.parametrize("overlap", [-1, True, 0.5])
def test_a_bad_overlap_is_refused(overlap: Any) -> None:
    with pytest.raises(RecipeError, match="overlap must be a number of blocks"):
        learner_of(overlap=overlap)


def test_overlap_doesnt_go_with_offloading() -> None:
    with pytest.raises(RecipeError, match="overlap=1 doesn't go with offload"):
        learner_of(overlap=1, offload=True)


@pytest.mark.parametrize(
    "more",
    [{"overlap": 1}, {"overlap": 1, "checkpoint": "blocks"}, {"objective": FeatureReconstruction(reconcile=0.1)}],
)
def test_batch_norms_see_each_batch_once(more: dict[str, Any]) -> None:
    """Though a block of two modules runs in both, and reconciling runs a module three times."""
    learner = make_learner(make("resnet"), modules=3, **more)
    train(learner, batches(3))
    counts = [module.num_batches_tracked for module in learner.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert counts and {int(count) for count in counts} == {3}
