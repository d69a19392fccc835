"""What passes between modules: the next blocks as a classifier, context, reconciled gradients."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import localgrad
from helpers import (
    SIZE,
    assert_same,
    batches,
    copied,
    make,
    make_learner,
    quick_adamw,
    term_of,
    train,
    walk,
)
from localgrad import FeatureReconstruction, GreedySupervised, Layout, LocalLearner
from localgrad.errors import RecipeError
from localgrad.objectives.auxiliary import NextClassifier, build_classifier
from localgrad.objectives.base import ContextSupply
from localgrad.objectives.carried import LocalBatch, pooled
from localgrad.objectives.methods import Objective, Segprop
from localgrad.objectives.readouts import Bridge, TailClassifier
from localgrad.step import local_step
from localgrad.step.local_module import site_of
from localgrad.step.local_step import LocalStep, cosine_direction

SWIN: dict[str, Any] = {"depths": (2, 2, 1), "drop_path_rate": 0.0}  # timm gives a Swin 0.1

learner_of = partial(make_learner, optimizer=quick_adamw)


# The next blocks as a classifier ---------------------------------------------------------------------------------


def next_learner(weights: str, decay: float = 0.9, **more: Any) -> tuple[LocalLearner, NextClassifier]:
    options = {"weights": weights, "decay": decay, "depth": 2}
    objective = GreedySupervised(classifier="next", classifier_options=options)
    learner = learner_of(objective=objective, modules=[1, 2], **more)
    return learner, term_of(learner.modules[0].objective, "task").classifier


def followed(learner: LocalLearner) -> dict[str, Tensor]:
    return copied(nn.Sequential(*learner.backbone.blocks[1:3]))


@pytest.mark.parametrize("weights", ["fresh", "copy", "ema"])
def test_next_is_made_like_the_blocks_that_follow(weights: str) -> None:
    learner, classifier = next_learner(weights)
    mine, theirs = copied(classifier.blocks), followed(learner)
    if weights == "fresh":
        matrices = [name for name in mine if mine[name].ndim > 1]
        assert len(matrices) == 8
        assert not [name for name in matrices if torch.equal(mine[name], theirs[name])]
        assert [mine[name].shape for name in mine] == [theirs[name].shape for name in theirs]
    else:
        assert_same(mine, theirs)
    own = {id(p) for p in learner.modules[0].parameters()}
    assert not own & {id(p) for block in learner.backbone.blocks[1:] for p in block.parameters()}
    assert not [name for name in classifier.state_dict() if "source" in name]
    assert len(term_of(learner.modules[1].objective, "task").classifier.blocks) == 2  # depth 2 of 2 that follow


def test_next_takes_no_more_blocks_than_follow() -> None:
    backbone = localgrad.split(make(), SIZE)
    following = site_of(backbone, (1, 3), 1).following
    assert len(following) == 1
    classifier = build_classifier("next", backbone.layouts[3], 5, {"depth": 7}, following)
    assert isinstance(classifier, NextClassifier)
    assert len(classifier.blocks) == 1
    with pytest.raises(RecipeError, match="needs blocks that follow"):
        build_classifier("next", backbone.layouts[3], 5, {}, ())


def test_next_across_a_change_of_resolution_ends_in_the_layout_there() -> None:
    learner = learner_of(make("swin", **SWIN), modules=[2, 4], objective=GreedySupervised(classifier="next"))
    classifier = term_of(learner.modules[0].objective, "task").classifier
    assert classifier.pool.width == learner.backbone.layouts[3].width == 64
    images, labels = batches(1)[0]
    with torch.no_grad():
        x = walk(learner, images)[0][-1]
        expected = classifier.head(classifier.pool.norm(classifier.blocks(x).mean((1, 2))))
    found = learner.step(images, labels).module_logits[0]
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weights", ["fresh", "copy"])
def test_fresh_and_copied_blocks_are_trained(weights: str) -> None:
    learner, classifier = next_learner(weights)
    before = copied(classifier.blocks)
    train(learner, batches(1))
    after = copied(classifier.blocks)
    assert [name for name in after if torch.equal(before[name], after[name])] == []


def test_the_average_moves_after_the_update_only() -> None:
    learner, classifier = next_learner("ema", decay=0.75)
    held = {id(p) for optimizer in learner.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in classifier.blocks.parameters()}
    seen: list[dict[str, Tensor]] = []

    def at_forward(module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        seen.append(copied(classifier.blocks))
        outputs.register_hook(lambda gradient: seen.append(copied(classifier.blocks)))

    classifier.blocks.register_forward_hook(at_forward)
    for images, labels in batches(3):
        mine, theirs = copied(classifier.blocks), followed(learner)  # this module's update comes before theirs
        seen.clear()
        learner.step(images, labels)
        assert len(seen) == 2
        assert_same(seen[0], mine)
        assert_same(seen[1], mine)
        for name, value in copied(classifier.blocks).items():
            torch.testing.assert_close(value, mine[name] + 0.25 * (theirs[name] - mine[name]), rtol=1e-5, atol=1e-7)
    assert not torch.equal(classifier.blocks[0].attn.qkv.weight, learner.backbone.blocks[1].attn.qkv.weight)


def test_an_average_is_resumed_bit_for_bit() -> None:
    learner, classifier = next_learner("ema")
    train(learner, batches(3))
    state = copy.deepcopy(learner.state_dict())
    train(learner, batches(2))
    other, its = next_learner("ema")
    other.load_state_dict(state)
    train(other, batches(2))
    assert_same(copied(its), copied(classifier))
    assert_same(copied(other.model), copied(learner.model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "frozen"}, "take fresh, copy or ema"),
        ({"decay": 1.0}, "decay of 'next'"),
        ({"decay": -0.1}, "decay of 'next'"),
        ({"depth": 0}, "depth of a decoder or classifier"),
        ({"width": 3}, "'next' can't take"),
    ],
)
def test_bad_options_of_next_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        learner_of(objective=GreedySupervised(classifier="next", classifier_options=options))
    assert "\n" not in str(refused.value)
    assert "object at" not in str(refused.value)


# The last blocks and the model's end as a classifier ---------------------------------------------------------------


def tail_learner(name: str = "swin", **options: Any) -> tuple[LocalLearner, list[TailClassifier]]:
    shape = SWIN if name == "swin" else {}
    learner = learner_of(make(name, **shape), modules=[1, 3], objective=Segprop(classifier_options=options))
    return learner, [term_of(module.objective, "task").classifier for module in learner.modules[:-1]]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_bridge_stands_before_last_blocks_of_another_size(depth: int) -> None:
    learner, classifiers = tail_learner(depth=depth)
    layouts, images = learner.backbone.layouts, batches(1)[0][0]
    features = [states[-1] for states in walk(learner, images)]  # what left each module
    blocks, norm = learner.backbone.blocks, nn.functional.layer_norm
    for index, boundary in enumerate((1, 3)):
        source, target = layouts[boundary], layouts[len(blocks) - depth]
        mine, x = classifiers[index], features[index]
        if source.shape != target.shape:
            bridge = mine.bridge
            x = norm(x, (source.width,), bridge.norm.weight, bridge.norm.bias)
            rows = source.grid[0] // target.grid[0]
            x = x.unflatten(2, (target.grid[1], -1)).unflatten(1, (target.grid[0], rows)).mean((2, 4))
            x = x @ bridge.project.weight.T + bridge.project.bias
        else:
            assert not list(mine.bridge.parameters())
        with torch.no_grad():
            for block in blocks[len(blocks) - depth :]:
                x = block(x)
            torch.testing.assert_close(mine(features[index]), learner.backbone.tail(x))


def test_a_bridge_takes_class_tokens_along() -> None:
    source = Layout("tokens", 8, (4, 4), 2)
    bridge = Bridge(source, Layout("tokens", 6, (2, 2), 2))
    features = torch.randn(3, 18, 8, generator=torch.Generator().manual_seed(0))
    found = bridge(features)
    assert found.shape == (3, 6, 6)
    expected = bridge.project(bridge.norm(features[:, :2]))
    torch.testing.assert_close(found[:, :2], expected)
    first = bridge.norm(features[:, [2, 3, 6, 7]]).mean(1)  # the upper left quarter
    torch.testing.assert_close(found[:, 2], bridge.project(first))
    channels_first = Bridge(Layout("NCHW", 8, (4, 4)), Layout("NCHW", 6, (2, 2)))
    channels_first.load_state_dict(bridge.state_dict())
    image = features[:, 2:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(channels_first(image).flatten(2).transpose(1, 2), found[:, 2:])
    with pytest.raises(RecipeError, match="take 1 class and register tokens, and here there are 2; take 'next'"):
        Bridge(source, Layout("tokens", 8, (4, 4), 1))


def test_last_blocks_may_follow_the_models_own() -> None:
    learner, classifiers = tail_learner(weights="ema", decay=0.75, depth=2)
    held = {id(p) for optimizer in learner.optimizers for group in optimizer.param_groups for p in group["params"]}
    for classifier in classifiers:
        own = {name for name, weight in classifier.named_parameters() if id(weight) in held}
        assert own == {name for name, _ in classifier.named_parameters() if name.startswith("bridge.")}

    def theirs() -> list[dict[str, Tensor]]:
        return [*(copied(block) for block in learner.backbone.blocks[-2:]), copied(learner.backbone.tail)]

    def mine(classifier: TailClassifier) -> list[dict[str, Tensor]]:
        return [*(copied(block) for block in classifier.blocks), copied(classifier.end)]

    for images, labels in batches(3):
        before, followed = [mine(classifier) for classifier in classifiers], theirs()
        learner.step(images, labels)
        for classifier, was in zip(classifiers, before, strict=True):
            for now, then, target in zip(mine(classifier), was, followed, strict=True):
                for name, value in now.items():
                    torch.testing.assert_close(value, then[name] + 0.25 * (target[name] - then[name]))
        assert not torch.equal(theirs()[1]["mlp.fc1.weight"], followed[1]["mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "fresh"}, "weights 'fresh' of 'tail' is unknown; take copy or ema"),
        ({"decay": 1.0}, "decay of 'tail' must be from 0 to below 1, got 1.0"),
        ({"decay": "slow"}, "decay of 'tail' must be from 0 to below 1, got 'slow'"),
    ],
)
def test_bad_options_of_a_tail_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tail_learner(**options)


# Context ----------------------------------------------------------------------------------------------------------


def context_learner(model: nn.Module | None = None, **more: Any) -> LocalLearner:
    return learner_of(model, modules=4, objective=GreedySupervised(context=0.5), **more)


def features_and_context(learner: LocalLearner, images: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    found: list[tuple[Tensor, tuple[Tensor, ...]]] = [(images, ())]
    for module, states in zip(learner.modules[:-1], walk(learner, images), strict=False):
        found.append((states[-1], (*found[-1][1], pooled(module.layout, states[-1]))))
    return found


def test_context_changes_nothing_at_first_and_learns_at_once() -> None:
    learner = context_learner()
    images, labels = batches(1)[0]
    last = walk(learner, images)[-1][-1]
    assert torch.equal(learner.step(images, labels).logits, last)
    supplies = [module.objective.context for module in learner.modules]
    assert supplies[0] is None
    assert [len(supply.enter) for supply in supplies[1:] if supply is not None] == [1, 2, 3]
    for supply in supplies[1:]:
        assert supply is not None
        assert all(linear.weight.abs().sum() > 0 for linear in supply.enter)  # type: ignore[union-attr, operator]


def test_context_is_a_projection_of_pooled_features() -> None:
    layout = Layout(kind="tokens", width=8, grid=(4, 4), num_prefix_tokens=1)
    earlier = Layout(kind="NHWC", width=6, grid=(8, 8))
    site = site_of(localgrad.split(make(), SIZE), (1, 2), 1)
    site = type(site)(**{**site.__dict__, "inputs": layout, "context": (earlier,)})
    torch.manual_seed(0)
    supply = ContextSupply(site, until=0.5)
    nn.init.normal_(supply.enter[0].weight)  # type: ignore[arg-type]
    nn.init.normal_(supply.enter[0].bias)  # type: ignore[arg-type]
    supply.at(0.125)
    features, pooled = torch.randn(2, 17, 8), torch.randn(2, 2, 2, 6)
    found = supply(features, (pooled,)).detach()
    expected = features.clone()
    weight, bias = supply.enter[0].weight.detach(), supply.enter[0].bias.detach()  # type: ignore[union-attr, operator]
    for b, i, j in np.ndindex(2, 4, 4):
        expected[b, 1 + 4 * i + j] += 0.75 * (weight @ pooled[b, i // 2, j // 2] + bias)
    torch.testing.assert_close(found, expected)


def test_pooled_features_are_means_of_patches() -> None:
    learner = context_learner(make("swin", **SWIN))
    states = walk(learner, batches(1)[0][0])[0][-1]  # [4, 8, 8, 32]
    assert states.shape[1:3] == (8, 8)
    found = pooled(learner.modules[0].layout, states)
    assert found.shape == (4, 4, 4, 32)
    torch.testing.assert_close(found[:, 1, 2], states[:, 2:4, 4:6].mean((1, 2)))


def test_context_fades_and_is_never_there_in_evaluation() -> None:
    learner = context_learner()
    train(learner, batches(3))
    images, _ = batches(1)[0]
    inputs, context = features_and_context(learner, images)[2]
    objective, batch = learner.modules[2].objective, LocalBatch(None, torch.arange(4), context=context)
    learner.train()
    moved = []
    with torch.no_grad():
        for progress in (0.0, 0.25, 0.4):
            learner.at(progress)
            moved.append(objective.enter(inputs, batch) - inputs)
        torch.testing.assert_close(moved[1], 0.5 * moved[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moved[2], 0.2 * moved[0], rtol=1e-4, atol=1e-6)
        assert moved[0].abs().max() > 1e-3
        learner.at(0.5)
        assert objective.enter(inputs, batch) is inputs
        learner.at(0.0)
        learner.eval()
        assert objective.enter(inputs, batch) is inputs
        assert torch.equal(learner.logits(images)[-1], learner.model(images))  # type: ignore[arg-type]


def test_context_keeps_modules_isolated_and_the_model_plain() -> None:
    learner = context_learner()
    train(learner, batches(2))
    localgrad.check_isolation(learner)
    assert learner.model.state_dict().keys() == make().state_dict().keys()
    fresh = make().eval()
    fresh.load_state_dict(learner.model.state_dict())
    images, _ = batches(1)[0]
    learner.eval()
    with torch.no_grad():
        assert torch.equal(fresh(images), learner.logits(images)[-1])  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [None, (3, 0, 5, 1, 2, 4)])
@pytest.mark.parametrize("kind", ["tokens", "NHWC", "NCHW"])
def test_a_layout_adds_to_its_grid_only(kind: Any, order: tuple[int, ...] | None) -> None:
    tokens = kind == "tokens"
    layout = Layout(kind=kind, width=5, grid=(2, 3), num_prefix_tokens=2 * tokens, order=order if tokens else None)
    features, grid = torch.randn(4, *layout.shape), torch.randn(4, 2, 3, 5)
    found = layout.add(features, grid)
    torch.testing.assert_close(layout.to_grid(found), layout.to_grid(features) + grid)
    assert not tokens or torch.equal(found[:, :2], features[:, :2])


# Reconciled gradients --------------------------------------------------------------------------------------------


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def second_step(
    weight: float,
    *,
    accumulation: int = 1,
    kind: str = "vit",
    drop_path: float = 0.0,
    makes: type[Objective] = GreedySupervised,
    precision: str = "double",
) -> tuple[LocalStep, LocalBatch, Tensor]:
    """The step of a second module of three, a batch with a gradient that it is to be like, and its inputs."""
    objective = makes(reconcile=weight)
    model = make(kind, drop_path_rate=drop_path)
    more = {} if precision == "double" else {"precision": precision}
    learner = learner_of(model, [2, 3], optimizer=sgd, objective=objective, accumulation=accumulation, **more)
    dtype = torch.double if precision == "double" else torch.float32
    for module in learner.modules:
        module.to(dtype)
    inputs = walk(learner, batches(1)[0][0].to(dtype))[0][-1]
    generator = torch.Generator().manual_seed(2)
    batch = LocalBatch(None, torch.tensor([0, 3, 1, 4]))
    batch.carried["gradient"] = torch.randn(inputs.shape, generator=generator, dtype=dtype)
    learner.train()
    return learner.local_step(1, sgd), batch, inputs


def gradients_of(step: LocalStep, batch: LocalBatch, inputs: Tensor) -> dict[str, Tensor]:
    """What a step's optimizer is given."""
    found: dict[str, Tensor] = {}

    def note(*_: Any) -> None:
        named = step.module.named_parameters()
        found.update({name: weight.grad.clone() for name, weight in named if weight.grad is not None})

    handle = step.optimizer.register_step_pre_hook(note)
    torch.manual_seed(5)
    step(inputs, batch)
    handle.remove()
    return found


def reference(step: LocalStep, batch: LocalBatch, inputs: Tensor, weight: float) -> dict[str, Tensor]:
    """The same by autograd alone: the gradient of loss + weight * penalty, differentiated twice.

    The penalty is 1 - cosine, a mean that weighs the images of a part by the length of their own
    gradients.
    """
    assert batch.gradient is not None
    torch.manual_seed(5)
    x = inputs.clone().requires_grad_()
    weights = dict(step.module.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = step.module(x, batch, inputs).loss
        (own,) = torch.autograd.grad(loss, x, create_graph=True)
        halves = (tensor.chunk(step.accumulation) for tensor in (own, batch.gradient))
        penalty = torch.stack([weighted_penalty(*half) for half in zip(*halves, strict=True)]).mean()
        found = torch.autograd.grad(loss + weight * penalty, list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def weighted_penalty(own: Tensor, wanted: Tensor) -> Tensor:
    lengths = own.detach().flatten(1).norm(dim=1)
    away = 1 - F.cosine_similarity(own.flatten(1), wanted.flatten(1), dim=1)
    return (away * lengths / lengths.sum()).sum()


def flattened(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("scale", "settings"),
    [
        (1.0, {}),
        (1.0, {"drop_path": 0.3}),
        (1.0, {"kind": "swin"}),
        (1.0, {"accumulation": 2}),
        (1024.0, {}),
        (1.0, {"makes": FeatureReconstruction}),
        (1.0, {"makes": FeatureReconstruction, "kind": "swin"}),
    ],
)
def test_the_pull_is_the_second_derivative(
    scale: float, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A central difference: right to 5 % of its length, and the error falls with the square of the step.

    What is reconstructed is no function of the inputs: the derivative is taken with the target where it is.
    """
    made = partial(second_step, **settings)
    plain = flattened(reference(*made(0.5), 0.0))
    expected = flattened(reference(*made(0.5), 0.5)) - plain
    assert expected.norm() > 0.01 * plain.norm()
    errors = []
    for length in (0.003, 0.001):
        monkeypatch.setattr(local_step, "RELATIVE_STEP", {"fp32": length})
        given = made(0.5)
        given[0].scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        pull = flattened(gradients_of(*given)) - plain
        errors.append(((pull - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.05
    assert errors[1] < max(0.15 * errors[0], 1e-5)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_pull_is_the_same_in_bf16(kind: str) -> None:
    pulls = []
    for precision in ("fp32", "bf16"):
        plain, pulled = (
            flattened(gradients_of(*second_step(weight, kind=kind, makes=FeatureReconstruction, precision=precision)))
            for weight in (0.0, 0.5)
        )
        pulls.append(pulled - plain)
    assert F.cosine_similarity(*pulls, dim=0) > 0.95
    assert pulls[1].norm() == pytest.approx(pulls[0].norm().item(), rel=0.2)


def test_a_reconciled_step_that_fails_leaves_its_inputs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt, in smaller parts, is made with them (``--on-oom replan``)."""
    step, batch, inputs = second_step(0.5, precision="fp32")

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(step, "_forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            step(inputs, batch)
    assert not inputs.requires_grad
    step.run_as(2)
    step(inputs, batch)


def test_the_direction_is_the_gradient_of_one_minus_cosine() -> None:
    torch.manual_seed(0)
    own, wanted = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 4)
    (expected,) = torch.autograd.grad(weighted_penalty(own, wanted), own)
    torch.testing.assert_close(cosine_direction(own.detach(), wanted), expected, rtol=1e-4, atol=1e-6)


def test_a_module_is_given_the_gradient_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(objective=GreedySupervised(reconcile=(0.5, 1.0)))
    images, labels = batches(1)[0]
    given: list[Tensor | None] = []
    step = LocalStep.__call__

    def watched(self: LocalStep, inputs: Tensor, batch: LocalBatch, *more: Any) -> Any:
        given.append(batch.gradient)
        return step(self, inputs, batch, *more)

    expected = []
    for module, states in zip(learner.modules[:-1], walk(learner, images), strict=False):
        output = states[-1].clone().requires_grad_()
        F.cross_entropy(term_of(module.objective, "task").classifier(output), labels).backward()
        expected.append(output.grad)
    monkeypatch.setattr(LocalStep, "__call__", watched)
    learner.step(images, labels)
    assert given[0] is None
    for found, gradient in zip(given[1:], expected, strict=True):
        torch.testing.assert_close(found, gradient)
    assert [module.objective.reconcile for module in learner.modules] == [0.0, 1.0, 1.0]


def test_reconciling_draws_nothing_more() -> None:
    states = []
    for weight in (0.0, 1.0):
        learner = learner_of(make(drop_path_rate=0.3), objective=GreedySupervised(reconcile=weight))
        result = train(learner, batches(1))[0]
        states.append((torch.get_rng_state(), result.logits, result.losses))
    assert_same(states[0], states[1])  # figures are those of the first pass


def test_reconciled_gradients_come_to_agree() -> None:
    cosines = []
    for weight in (0.0, 10.0):
        learner = learner_of(modules=[2], optimizer=sgd, objective=GreedySupervised(reconcile=weight))
        images, labels = batches(1)[0]
        for _ in range(15):
            learner.step(images, labels)
        gradient = []
        states = walk(learner, images)
        features = states[0][-1].clone().requires_grad_()
        for parts, objective in (([], learner.modules[0]), (learner.modules[1].parts, learner.modules[1])):
            outputs = features
            for part in parts:
                outputs = part(outputs)
            loss = F.cross_entropy(term_of(objective.objective, "task").classifier(outputs), labels)
            gradient.append(torch.autograd.grad(loss, features)[0].flatten(1))
        cosines.append(F.cosine_similarity(*gradient).mean().item())
    assert cosines[1] > cosines[0] + 0.1


def test_an_overflow_in_the_wanted_gradient_leaves_statistics_finite() -> None:
    """Gradient scalers provoke overflows: the update is held back, and batch norms see nothing of it."""
    step, batch, inputs = second_step(0.1, kind="resnet", precision="fp32")
    assert batch.gradient is not None
    batch.gradient[0, 0] = torch.inf
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    step(inputs, batch)
    buffers = dict(step.module.named_buffers())
    assert any(name.endswith("running_var") for name in buffers)
    assert all(buffer.isfinite().all() for buffer in buffers.values())
    assert all(weight.isfinite().all() for weight in step.module.parameters())


def test_reconciling_doesnt_go_with_moving_targets() -> None:
    with pytest.raises(RecipeError, match=r"reconcile=0.1 doesn't go with reconstruct='blocks'"):
        learner_of(objective=FeatureReconstruction(reconcile=0.1, reconstruct="blocks"))


@pytest.mark.parametrize(
    ("more", "words"),
    [({"compile": True}, "reconcile doesn't go with compile"), ({"overlap": 1}, "reconcile doesn't go with overlap")],
)
def test_reconciling_doesnt_go_with_everything(more: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        learner_of(objective=GreedySupervised(reconcile=1.0), **more)
