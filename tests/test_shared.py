"""Weights that several local modules read: refused, trained by the last of them, or by each, averaged."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import localgrad
from families import FAMILIES, shake
from helpers import assert_same
from libraries import VOCABULARY, llama, tokens
from localgrad.backbones.base import Backbone, split
from localgrad.errors import BackboneError, RecipeError
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import GreedySupervised, Lopt
from localgrad.step.local_step import drawing_from

WAYS = ("last", "average")


def tied_llama() -> nn.Module:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return llama(tied=True)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=32)
    made: nn.Module = transformers.GPT2LMHeadModel(config)
    return made


class Scaled(nn.Module):
    """A block whose branch is scaled by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + (self.linear(x) * scale).tanh()


class OneScale(nn.Module):
    """All of its blocks are given what is made of weights, once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale, self.head = nn.Linear(4, 8), nn.Linear(2, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Scaled() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(torch.ones(2))
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale)
        return self.head(x.mean(1))


class LateScale(OneScale):
    """Only its last blocks are given that."""

    def forward(self, x: Tensor) -> Tensor:
        scale, one = self.scale(torch.ones(2)), torch.ones(8)
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(x, scale if index > 1 else one)
        return self.head(x.mean(1))


class ReadTwice(nn.Module):
    """Its tail reads the embedding's weight, and calls no module that has it; its stem has a token for training."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.hidden = nn.Parameter(torch.randn(8))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.training:
            x = torch.where((torch.rand(x.shape[:2]) < 0.5)[..., None], self.hidden, x)
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.embedding.weight)


def of_timm(family: str) -> nn.Module:
    name, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(name, num_classes=5, drop_path_rate=0.2, **options | {"depth": 4})
    shake(made)
    return made


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "llama": (tied_llama, lambda: tokens(0, 4), "embed_tokens.weight"),
    "gpt2": (gpt2, lambda: tokens(0, 4), "wte.weight"),
    "beit": (lambda: of_timm("beit shared bias"), images, "rel_pos_bias.relative_position_bias_table"),
    "rope_mixed": (lambda: of_timm("eva02 mixed rope"), images, "rope.freqs"),
}
"""Models, a batch, and how the name of what they share ends."""


@cache
def _parted(name: str) -> Backbone:
    make, batch, _ = MODELS[name]
    return split(make(), example=batch())


def learner_of(name: str, modules: Any, shared: str, optimizer: Any = None, **more: Any) -> LocalLearner:
    backbone = copy.deepcopy(_parted(name))
    torch.manual_seed(1)
    learner = LocalLearner(backbone, modules=modules, shared=shared, **more)
    learner.configure_optimizers(optimizer or (lambda params: torch.optim.SGD(params, lr=0.1)))
    return learner


def step(learner: LocalLearner, name: str) -> Any:
    batch = MODELS[name][1]()
    return learner.step(batch) if isinstance(batch, dict) else learner.step(batch, torch.tensor([0, 1, 2, 3]))


def weight_of(learner: LocalLearner, name: str) -> nn.Parameter:
    ending = MODELS[name][2]
    [found] = [weight for key, weight in learner.model.named_parameters() if key.endswith(ending)]
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize("name", MODELS)
def test_the_refusal_names_ways_out_and_each_of_them_trains(name: str) -> None:
    with pytest.raises(BackboneError, match="is shared by") as refused:
        learner_of(name, 2, "refuse")
    assert "\n" not in str(refused.value)
    assert tuple(re.findall(r"shared='(\w+)'", str(refused.value))) == WAYS
    for modules in (2, 4):
        for way in WAYS:
            learner = learner_of(name, modules, way)
            before = weight_of(learner, name).detach().clone()
            localgrad.check_isolation(learner)
            assert all(bool(loss.isfinite()) for loss in step(learner, name).losses)
            assert not torch.equal(weight_of(learner, name), before)
            state = learner.model.state_dict()
            assert state.keys() == MODELS[name][0]().state_dict().keys()


def test_what_there_is_no_word_for() -> None:
    with pytest.raises(RecipeError, match="shared: unknown 'first'; take one of refuse, last, average"):
        learner_of("llama", 2, "first")


def by_hand(learner: LocalLearner, name: str, optimizers: dict[int, torch.optim.Optimizer]) -> Tensor:
    """What averaging makes of the shared weight: each module alone, from the same start, with its own optimizer."""
    weight = weight_of(learner, name)
    batch = LocalBatch.of(MODELS[name][1]()) if name == "llama" else LocalBatch(images(), torch.tensor([0, 1, 2, 3]))
    batch.loss = learner.loss
    learner.route.begin(batch, learner)
    start, found, features = weight.detach().clone(), [], batch.features
    for index, module in enumerate(learner.modules):
        with drawing_from(torch.device("cpu"), (learner.seed, index, learner.num_steps)):
            output = module.train()(features, batch)
        output.loss.backward()
        features = output.features
        if weight.grad is not None:
            optimizers[index].step()
            found.append(weight.detach().clone())
        for each in module.parameters():
            each.grad = None
        with torch.no_grad():
            weight.copy_(start)
    assert len(found) > 1
    total = found[0].clone()
    for each in found[1:]:
        total += each
    return total / len(found)


@pytest.mark.parametrize("name", ["llama", "beit"])
def test_the_average_is_that_of_copies_that_each_module_trains_by_itself(name: str) -> None:
    """Two steps with AdamW: whose momenta stay each module's own."""

    def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2)

    learner, reference = (learner_of(name, 3, "average", adamw) for _ in range(2))
    weight = weight_of(reference, name)
    readers = [i for i, module in enumerate(reference.modules) if any(w is weight for w in module.parameters())]
    mine = {index: torch.optim.AdamW([weight], lr=1e-2) for index in readers}
    for _ in range(2):
        expected = by_hand(reference, name, mine)
        step(learner, name)
        assert torch.equal(weight_of(learner, name), expected)
        reference.num_steps += 1
        reference.model.load_state_dict(learner.model.state_dict())  # all else that was trained
        for ours, theirs in zip(reference.modules, learner.modules, strict=True):
            ours.objective.load_state_dict(theirs.objective.state_dict())
    own = [optimizer.state[weight_of(learner, name)]["exp_avg"] for index, optimizer in enumerate(learner.optimizers)
           if index in readers]  # fmt: skip
    assert not torch.equal(own[0], own[1])


def gradients_of(learner: LocalLearner) -> list[Tensor]:
    """Of the shared weight, by each module's loss in its next step."""
    learner, found = copy.deepcopy(learner), []
    batch = LocalBatch.of(MODELS["llama"][1]())
    batch.loss = learner.loss
    learner.route.begin(batch, learner)
    features = batch.features
    for index, module in enumerate(learner.modules):
        with drawing_from(torch.device("cpu"), (learner.seed, index, learner.num_steps)):
            output = module.train()(features, batch)
        features = output.features
        found += torch.autograd.grad(output.loss, [weight_of(learner, "llama")])
    return found


def test_with_plain_gradient_descent_it_is_a_step_along_the_mean_of_the_gradients() -> None:
    learner = learner_of("llama", 2, "average", objective=Lopt())
    weight = weight_of(learner, "llama")
    expected = weight.detach() - 0.1 * sum(gradients_of(learner)) / 2
    step(learner, "llama")
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_batch_train_as_the_whole(way: str) -> None:
    def in_double(accumulation: int) -> LocalLearner:
        backbone = copy.deepcopy(_parted("beit")).double()
        torch.manual_seed(1)
        learner = LocalLearner(backbone, modules=2, shared=way, accumulation=accumulation)
        learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
        for module in learner.train().model.modules():  # no drop path
            module.training = "Drop" not in type(module).__name__
        return learner

    states = []
    for count in (1, 2):
        learner = in_double(count)
        learner.step(images().double(), torch.tensor([0, 1, 2, 3]))
        states.append(learner.model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_one_tensor_is_saved_and_training_goes_on_from_it_bit_for_bit(way: str) -> None:
    def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2)

    learner, resumed = (learner_of("llama", 3, way, adamw, clip_grad=1.0, accumulation=2) for _ in range(2))
    for _ in range(2):
        step(learner, "llama")
    assert learner.model.lm_head.weight is learner.model.model.embed_tokens.weight  # type: ignore[union-attr]
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    for _ in range(2):
        assert all(map(torch.equal, step(learner, "llama").losses, step(resumed, "llama").losses))
    assert_same(resumed.state_dict(), learner.state_dict())


@pytest.mark.few(1)
@pytest.mark.parametrize("way", WAYS)
def test_modules_may_wait_in_host_memory(way: str) -> None:
    plain, offloaded = learner_of("llama", 3, way), learner_of("llama", 3, way, offload=True)
    for _ in range(2):
        assert all(map(torch.equal, step(plain, "llama").losses, step(offloaded, "llama").losses))
    assert_same(offloaded.eval().model.state_dict(), plain.model.state_dict())


def test_frozen_modules_are_not_in_the_mean() -> None:
    learner, last = (learner_of("llama", 2, way, freeze_from=0.5, objective=Lopt()) for way in ("average", "last"))
    for each in (learner, last):
        each.at(0.5)
        step(each, "llama")
    assert torch.equal(weight_of(learner, "llama"), weight_of(last, "llama"))  # the first one only runs


@pytest.mark.parametrize("way", WAYS)
def test_frozen_modules_keep_no_gradient_from_a_step_of_the_whole_model(way: str) -> None:
    """A shared weight learns as long as one of its modules does; what only frozen ones have stays."""
    learner = learner_of("llama", 2, way, freeze_from=0.5, objective=Lopt())
    learner.at(0.5)
    before = {name: weight.detach().clone() for name, weight in learner.model.named_parameters()}
    learner.global_step(MODELS["llama"][1]())
    frozen = {id(weight) for weight in learner.modules[0].parameters()}
    shared = weight_of(learner, "llama")
    for name, weight in learner.model.named_parameters():
        assert torch.equal(weight, before[name]) == (id(weight) in frozen and weight is not shared), name
        assert weight.grad is None, name


def test_averages_follow_the_weights_that_all_modules_see() -> None:
    """And no module's copy of a moment."""
    options = {"weights": "ema", "decay": 0.5}
    objective = GreedySupervised(classifier="tail", classifier_options=options)
    learner = learner_of("llama", 2, "average", objective=objective)
    weight, head = weight_of(learner, "llama"), learner.modules[0].objective
    [copied] = [own for name, own in head.named_parameters() if own.shape == weight.shape]
    before = weight.detach().clone()
    assert torch.equal(copied, before)
    step(learner, "llama")
    assert torch.equal(copied, before)  # the second module wasn't updated yet
    now = weight.detach().clone()
    assert not torch.equal(now, before)
    step(learner, "llama")
    torch.testing.assert_close(copied.detach(), (before + now) / 2)


def test_a_step_that_fails_leaves_the_mean_of_what_copies_are() -> None:
    learner = learner_of("llama", 2, "average", objective=Lopt())
    weight = weight_of(learner, "llama")
    before, (first, _) = weight.detach().clone(), gradients_of(learner)

    def fail(*_: Any) -> None:
        raise RuntimeError("a hook")

    for number, expected in enumerate([before, before - 0.1 * first / 2]):
        handle = learner.modules[number].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="a hook"):
            step(learner, "llama")
        handle.remove()
        if number:
            torch.testing.assert_close(weight.detach(), expected)
        else:
            assert torch.equal(weight, expected)
    step(learner, "llama")  # and goes on


@pytest.mark.few(1)
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
def test_a_context_that_is_made_of_weights_is_trained_by_the_first_module(checkpoint: str) -> None:
    """Recomputed or not: of the blocks that it has; later ones read what it made."""
    torch.manual_seed(0)
    features, labels = torch.randn(4, 6, 4), torch.tensor([0, 1, 2, 3])
    with pytest.warns(match=r"scale\.weight, scale\.bias: .* those of the first one alone train it"):
        learner = LocalLearner(split(OneScale(), example=features), modules=2, checkpoint=checkpoint)
    learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
    reference, weight = copy.deepcopy(learner), learner.model.scale.weight
    assert sum(any(each is weight for each in module.parameters()) for module in learner.modules) == 1
    assert isinstance(weight, nn.Parameter)
    before = weight.detach().clone()
    under_way = LocalBatch(features, labels)
    loss = reference.modules[0].eval()(features, under_way).loss  # in which nothing is recomputed
    [gradient] = torch.autograd.grad(loss, [reference.model.scale.weight])  # type: ignore[list-item]
    learner.step(features, labels)
    torch.testing.assert_close(weight.detach(), before - 0.1 * gradient)
    assert gradient.any()


def test_a_context_that_only_later_modules_read_is_refused() -> None:
    features = torch.randn(4, 6, 4)
    with pytest.raises(BackboneError, match=r"scale\.weight: .* it would never learn"):
        LocalLearner(split(LateScale(), example=features), modules=2)
    learner = LocalLearner(split(LateScale(), example=features), modules=1)
    learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
    before = learner.model.scale.weight.detach().clone()  # type: ignore[operator,union-attr]
    learner.step(features, torch.tensor([0, 1, 2, 3]))
    assert not torch.equal(learner.model.scale.weight, before)  # type: ignore[arg-type]


def test_a_weight_that_the_tail_reads_from_the_stems_module_is_shared() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (4, 6))
    model = ReadTwice()
    with pytest.raises(BackboneError, match=r"embedding\.weight is shared by the stem, the tail"):
        LocalLearner(copy.deepcopy(model), modules=2, example=ids, loss="next-token", objective="greedy")
    learner = LocalLearner(
        copy.deepcopy(model), modules=2, example=ids, loss="next-token", objective="greedy", shared="last"
    )
    learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
    weight, hidden = learner.model.embedding.weight, learner.model.hidden
    before, was_hidden = weight.detach().clone(), hidden.detach().clone()  # type: ignore[operator,union-attr]
    assert [any(each is weight for each in learner.parameters(index)) for index in range(2)] == [False, True]
    assert [any(each is hidden for each in learner.parameters(index)) for index in range(2)] == [True, False]
    learner.step(ids, ids)
    assert not torch.equal(weight, before)  # type: ignore[arg-type]
    assert not torch.equal(hidden, was_hidden), "read in training alone"  # type: ignore[arg-type]
    localgrad.check_isolation(learner, ids, ids)
