"""The laws of docs/architecture.md, over one model of each library: they know no names."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers import Planted, Token, adamw, assert_same, copied, logits_and_gradients, place_in
from libraries import LIBRARIES, called, inputs_of, parted, plain_model, saved_and_loaded, task_loss
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import Lopt, Segprop, Solo
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.parallel.wire import Packet, packed, unpacked

every = pytest.mark.parametrize("name", LIBRARIES)


def learner_of(name: str, modules: Any = 2, **more: Any) -> LocalLearner:
    backbone = parted(name)
    torch.manual_seed(1)
    learner = LocalLearner(backbone, modules=modules, **more)
    learner.configure_optimizers(adamw)
    return learner


def step(learner: LocalLearner, name: str, seed: int, items: int = 4) -> Any:
    batch = LIBRARIES[name].batch(seed, items)
    return learner.step(inputs_of(batch), batch["labels"])


# Law 1: isolation ------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@every
def test_a_modules_loss_reaches_its_own_parameters_and_no_others(name: str) -> None:
    learner = learner_of(name, 4)
    localgrad.check_isolation(learner)
    batch = LIBRARIES[name].batch(1, 4)
    under_way = LocalBatch.of(inputs_of(batch), batch["labels"])
    under_way.loss = learner.loss
    learner.route.begin(under_way, learner)
    features = under_way.features
    for index, module in enumerate(learner.modules):
        output = module(features, under_way)
        output.loss.backward()
        features = output.features
        assert not features.requires_grad
        for other, peer in enumerate(learner.modules):
            reached = {key for key, weight in peer.named_parameters() if weight.grad is not None}
            everything = {key for key, _ in peer.named_parameters() if "mask_token" not in key}
            assert reached == (everything if other == index else set()), (index, other)
        module.zero_grad()


# Law 2: equivalence ----------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@every
def test_one_module_is_plain_training_bit_for_bit(name: str) -> None:
    plain, learner = plain_model(name).train(), learner_of(name, 1, clip_grad=1.0)
    optimizer = adamw(list(plain.parameters()))
    torch.manual_seed(3)
    seen = []
    for seed in range(3):
        batch = LIBRARIES[name].batch(seed, 4)
        loss = task_loss(plain, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    torch.manual_seed(3)
    for seed, loss in enumerate(seen):
        assert torch.equal(step(learner, name, seed).losses[0], loss)
    assert_same(learner.model.state_dict(), plain.state_dict())


@pytest.mark.few(2)
@every
def test_execution_changes_no_bit(name: str) -> None:
    """What is recomputed, and where two modules wait."""
    learners = [learner_of(name, 2), learner_of(name, 2, checkpoint="blocks"), learner_of(name, 2, offload=True)]
    for seed in range(2):
        first, *others = [step(learner, name, seed) for learner in learners]
        for other in others:
            assert all(map(torch.equal, first.losses, other.losses))
    for learner in learners[1:]:
        assert_same(learner.eval().model.state_dict(), learners[0].model.state_dict())


@pytest.mark.few(2)
@every
def test_processes_hand_on_all_that_the_next_one_needs(name: str) -> None:
    """Two processes' shares, one after the other, with what would go over the wire; test_parallel.py has real ones."""
    alone = learner_of(name, 2, accumulation=2)
    shares = []
    for rank in (0, 1):
        torch.manual_seed(1)
        shares.append(ParallelLearner(parted(name), team=place_in(2, rank), modules=2, accumulation=2))
        shares[-1].configure_optimizers(adamw)
        shares[-1].train()
    packets: list[Packet] = []
    for seed in range(2):
        batch = LIBRARIES[name].batch(seed, 4)
        given, expected = LocalBatch.of(inputs_of(batch), batch["labels"]), step(alone, name, seed).losses
        for number, share in enumerate(shares):
            received = unpacked(packets.pop()) if number else given
            received.number, received.loss = seed, share.loss
            if not number:
                share.route.begin(received, share)
            executor = share._executor
            assert executor is not None
            result = executor.step(received, None if number else lambda onward: packets.append(packed(onward)))
            assert torch.equal(result.losses[0], expected[number])
    for share in shares:
        weights = share.own_weights()
        assert weights and all(torch.equal(alone.model.state_dict()[key], value) for key, value in weights.items())


# Law 3: lifetime -------------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@every
@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}], ids=str)
@pytest.mark.usefixtures("_no_collector")
def test_a_modules_graph_and_gradients_are_gone_before_the_next_one_runs(name: str, settings: dict[str, Any]) -> None:
    learner = learner_of(name, 3, **settings)
    graphs: dict[int, list[weakref.ref[Token]]] = {0: [], 1: [], 2: []}
    looked: list[int] = []

    def plant(_module: nn.Module, _inputs: object, output: Tensor, *, number: int) -> Tensor:
        token = Token()
        graphs[number].append(weakref.ref(token))
        planted: Tensor = Planted.apply(output, token)  # type: ignore[no-untyped-call]
        return planted

    def look(_module: nn.Module | None, _inputs: object, *, number: int) -> None:
        for before in range(number):
            assert graphs[before], "nothing planted"
            assert all(token() is None for token in graphs[before]), f"graph of module {before}"
            assert all(weight.grad is None for weight in learner.parameters(before)), f"gradients of module {before}"
        looked.append(number)

    for number, module in enumerate(learner.modules):
        for part in module.parts:
            part.register_forward_hook(partial(plant, number=number))
        module.register_forward_pre_hook(partial(look, number=number))
    step(learner, name, 0)
    look(None, None, number=3)
    assert sorted(set(looked)) == [0, 1, 2, 3]


# Law 4: round trip -----------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@every
def test_parts_are_the_model_and_trained_weights_do_in_its_library(name: str, tmp_path: Path) -> None:
    learner, untouched = learner_of(name, 2), plain_model(name)
    batch = LIBRARIES[name].batch(5, 3)
    for mode in (False, True):
        learner.train(mode)
        untouched.train(mode)
        theirs = logits_and_gradients(lambda: called(untouched, batch), untouched)
        ours = logits_and_gradients(lambda: learner.backbone(inputs_of(batch)), learner.model)
        assert all(map(torch.equal, ours, theirs))
    before = copied(learner.model)
    for seed in range(2):
        step(learner, name, seed)
    after = learner.model.state_dict()
    assert sum(not torch.equal(before[key], value) for key, value in after.items()) >= len(after) // 2
    learner.eval()
    loaded = saved_and_loaded(name, learner.model, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(called(loaded, batch), learner.backbone(inputs_of(batch)))
        last = learner.logits(inputs_of(batch))[-1]
        assert last is not None
        assert torch.equal(last, called(loaded, batch))


# Resuming --------------------------------------------------------------------------------------------------------

OBJECTIVES: dict[str, Callable[[], Any]] = {"default": lambda: None, "lopt": Lopt, "solo": Solo, "segprop": Segprop}


@pytest.mark.parametrize("objective", ["default", "lopt", *(pytest.param(o, marks=pytest.mark.heavy) for o in
                                                            ("solo", "segprop"))])  # fmt: skip
@pytest.mark.parametrize("name", ["transformers, language", pytest.param("torchvision", marks=pytest.mark.heavy)])
def test_a_learner_goes_on_from_its_state_bit_for_bit(name: str, objective: str, tmp_path: Path) -> None:
    if name == "torchvision" and objective != "default":
        pytest.skip("of language")
    settings: dict[str, Any] = {"clip_grad": 1.0, "accumulation": 2, "ema_decay": 0.9, "objective":
                                OBJECTIVES[objective]()}  # fmt: skip
    learner = learner_of(name, 3, **settings)
    for seed in range(2):
        step(learner, name, seed)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    further = [step(learner, name, seed) for seed in (2, 3)]

    resumed = learner_of(name, 3, **settings)
    with torch.no_grad():
        for weight in resumed.model.parameters():
            weight.add_(1)  # nothing is alike by chance
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for seed, expected in zip((2, 3), further, strict=True):
        assert all(map(torch.equal, step(resumed, name, seed).losses, expected.losses))
    assert_same(copy.deepcopy(resumed.state_dict()), learner.state_dict())
