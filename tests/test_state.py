"""What a forward pass writes moves once a step, however a block is recomputed; hooks and other classes are seen."""

from __future__ import annotations

import collections
import copy
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import spectral_norm

import localgrad
from helpers import SIZE, adamw, assert_same, batches, flat, make, train
from localgrad import GreedySupervised, LocalLearner
from localgrad.backbones.fake import FakeTensorMode
from localgrad.backbones.halves import find_pieces, observed, signature
from localgrad.errors import ParallelError, RecipeError
from localgrad.estimating import estimate_step
from localgrad.isolation import check_isolation
from localgrad.memory.costs import CostSettings
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.partition import Checkpointing
from localgrad.planning.budget import Task, looks_at_whole_batches
from localgrad.planning.cache import key_of
from localgrad.step.local_module import LocalModule, recompute

WIDTH = 32
STEPS = 5
WAYS = ("blocks", "blocks/2", "halves", "halves/4")


def learner_of(model: nn.Module, checkpoint: Any = "none", modules: int = 2, **settings: Any) -> LocalLearner:
    torch.manual_seed(1)
    objective = settings.pop("objective", GreedySupervised())
    learner = LocalLearner(
        model, modules=modules, input_size=SIZE, objective=objective, checkpoint=checkpoint, **settings
    )
    learner.configure_optimizers(sgd)
    return learner


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # so that rounding stays rounding


def assert_near(ours: Any, theirs: Any) -> None:
    """But for rounding: kernels may add in another order for parts of a batch."""
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


# Layers with state -----------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """Counts calls in one of several ways, and gives what depends on the count."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.calls = 0
        self.history: list[int] = []
        self.tensor = torch.zeros(())
        self.nested: dict[str, list[int]] = {"calls": [0]}
        self.array = np.zeros(1)
        self.names = collections.Counter[str]()

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return features
        with torch.no_grad():
            if self.way == "in place":
                self.count.add_(1)
            elif self.way == "reassigned":
                self.count = self.count + 1
            elif self.way == "not saved":
                self.hidden += 1
            elif self.way == "frozen parameter":
                self.frozen += 1
            elif self.way == "attribute":
                self.calls += 1
            elif self.way == "list":
                self.history.append(1)
            elif self.way == "nested":
                self.nested["calls"][0] += 1
            elif self.way == "array":
                self.array += 1
            elif self.way == "counted names":
                self.names["calls"] += 1
            else:
                self.tensor = self.tensor + 1
        return features * (1 + 0.1 * self.value())

    def value(self) -> float:
        others = self.calls + len(self.history) + self.nested["calls"][0] + float(self.array[0]) + self.names["calls"]
        return float(self.count + self.hidden + self.frozen + self.tensor) + others


COUNTING = ["in place", "reassigned", "not saved", "frozen parameter", "attribute", "list", "tensor attribute"]
COUNTING += ["nested", "array", "counted names"]


class RunningMean(nn.Module):
    """Takes a mean over all images off, and off later batches what it has seen: its own batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(features.mean(dim=(0, 1)), 0.1)
        return features - self.mean


class Codebook(nn.Module):
    """A code per token, whose codes follow the tokens; a code that is dead after three calls is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(7, WIDTH), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("used", torch.zeros(7))

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.detach().flatten(0, 1)
        numbers = torch.cdist(tokens, self.codes).argmin(dim=1)
        if self.training:
            with torch.no_grad():
                self.calls += 1
                hits = F.one_hot(numbers, 7).to(tokens.dtype)
                self.codes.lerp_(hits.T @ tokens / (hits.sum(dim=0)[:, None] + 1), 0.1)
                if self.calls > 3:
                    self.used = self.used + hits.sum(dim=0)
        return features + self.codes[numbers].view_as(features)


class Noise(nn.Module):
    """Scales by a random number that is not PyTorch's, or of a generator of its own."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, features: Tensor) -> Tensor:
        if self.source == "python":
            return features * random.uniform(0.5, 1.5)
        if self.source == "numpy":
            return features * float(np.random.rand())
        return features * torch.rand((), generator=self.generator)


class TokenNorm(nn.Module):
    """Instance norm over tokens, with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(WIDTH, track_running_stats=True)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(features.transpose(1, 2)).transpose(1, 2)


def spectral(norm: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    return norm(nn.Linear(WIDTH, WIDTH))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{f"counts, {way}": lambda way=way: Counter(way) for way in COUNTING},
    "running mean": RunningMean,
    "codebook": Codebook,
    "instance norm": TokenNorm,
    "spectral norm": lambda: spectral(parametrizations.spectral_norm),
    "spectral norm, old": lambda: spectral(spectral_norm),
    **{f"noise, {source}": lambda source=source: Noise(source) for source in ("python", "numpy", "own")},
}


def with_layer(name: str) -> nn.Module:
    """A ViT whose second block has such a layer."""
    model = make(depth=3)
    torch.manual_seed(2)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, LAYERS[name]())
    return model


def run(learner: LocalLearner, steps: int = STEPS) -> tuple[list[Tensor], dict[str, Any]]:
    """Losses, and every state afterwards: of tensors, attributes and random numbers."""
    random.seed(0)
    np.random.seed(0)
    losses = [loss for result in train(learner, batches(steps, 8)) for loss in result.losses]
    return losses, state_of(learner.model)


class NoObjective(nn.Module):
    """Where only the features of a module are run."""


def trunk(name: str, way: str) -> LocalModule:
    """A block with such a layer, and one without, as a local module."""
    backbone = localgrad.split(make(depth=2), SIZE)
    block = backbone.blocks[0]
    torch.manual_seed(2)
    block.mlp = nn.Sequential(block.mlp, LAYERS[name]())  # type: ignore[assignment]
    how = Checkpointing.parse(way)
    recomputed = {} if way == "none" else {i: recompute(backbone, i, how) for i in range(2)}
    return LocalModule(list(backbone.blocks), NoObjective(), recomputed).train()  # type: ignore[arg-type]


def trained_trunk(module: LocalModule, steps: int = STEPS) -> tuple[list[Tensor], dict[str, Any]]:
    """What a module gives in some steps, and every state afterwards: of tensors, attributes, random numbers."""
    optimizer = sgd([weight for weight in module.parameters() if weight.requires_grad])
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(7)
    outputs = []
    for _ in range(steps):
        output = module.features(torch.randn(4, 17, WIDTH))
        outputs.append(output.detach())
        output.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs, state_of(module)


def state_of(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: value.detach().clone() for name, value in module.named_buffers()}
    state |= {name: value.detach().clone() for name, value in module.named_parameters()}
    state |= {name: part.value() for name, part in module.named_modules() if isinstance(part, Counter)}
    return state | {"random": random.random(), "numpy": float(np.random.rand()), "torch": torch.rand(())}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", LAYERS)
def test_state_moves_once_a_step_however_a_block_is_recomputed(name: str) -> None:
    plain = trained_trunk(trunk(name, "none"))
    for way in WAYS:
        assert_near(trained_trunk(trunk(name, way)), plain)
    if "counts" in name:
        counted = [value for key, value in plain[1].items() if key.endswith("mlp.1")]
        assert counted == [STEPS]


SPLIT = [
    "counts, in place",
    "counts, reassigned",
    "counts, attribute",
    "running mean",
    "spectral norm",
    "instance norm",
]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SPLIT)
def test_state_moves_once_in_a_learners_steps(name: str) -> None:
    plain = run(learner_of(with_layer(name)))
    for way in ("blocks", "halves/4"):
        assert_near(run(learner_of(with_layer(name), way)), plain)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["counts, in place", "running mean", "spectral norm"])
def test_state_moves_once_in_end_to_end_steps_too(name: str) -> None:
    found = []
    for way in ("none", "blocks", "halves/4"):
        learner = learner_of(with_layer(name), global_checkpoint=way)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(7)
        losses = [learner.global_step(*batch).losses for batch in batches(3, 8)]
        found.append((losses, state_of(learner.model)))
    assert_near(found[1], found[0])
    assert_near(found[2], found[0])


@pytest.mark.parametrize("name", LAYERS)
def test_looking_for_state_changes_none(name: str) -> None:
    block = trunk(name, "none").parts[0]
    layer: Any = block.mlp[1]  # type: ignore[index]
    before = copy.deepcopy(block.state_dict())
    numbers = {key: copy.copy(value) for key, value in vars(layer).items() if isinstance(value, (int, list, str))}
    own = layer.generator.get_state() if isinstance(layer, Noise) else None
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    find_pieces(block, torch.randn(2, 17, WIDTH, generator=torch.Generator().manual_seed(1)))
    assert_same(block.state_dict(), before)
    assert {key: vars(layer)[key] for key in numbers} == numbers
    assert own is None or torch.equal(own, layer.generator.get_state())
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


class Late(nn.Module):
    """Writes a buffer from its third call on, and nothing before."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        Late.calls += 1
        if Late.calls > 12:
            self.mean += 1
        return features


def test_a_buffer_that_nobody_saw_being_written_ends_recomputation() -> None:
    model = make(depth=2)
    Late.calls = 0
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Late())
    learner = learner_of(model, "blocks", modules=1)
    with pytest.raises(RecipeError, match=r"checkpoint: Block is recomputed.*buffer mean of Late.*checkpoint='none'"):
        run(learner, 9)


class Centered(nn.Module):
    """Takes the mean over the batch off; writes nothing."""

    def forward(self, features: Tensor) -> Tensor:
        return features - features.mean(dim=0, keepdim=True)


def test_what_looks_at_a_whole_batch_gets_whole_batches() -> None:
    def model() -> nn.Module:
        made = make(depth=2)
        made.blocks[0].mlp = nn.Sequential(made.blocks[0].mlp, Centered())
        return made

    backbone = localgrad.split(model(), SIZE)
    assert not any(piece.per_image for piece in find_pieces(backbone.blocks[0], backbone.example(0)))
    assert all(piece.per_image for piece in find_pieces(backbone.blocks[1], backbone.example(1)))
    losses = [run(learner_of(model(), way))[0] for way in ("none", "halves/4")]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert looks_at_whole_batches(Task(backbone=backbone, objective=GreedySupervised(), optimizer=adamw))
    assert not looks_at_whole_batches(
        Task(backbone=localgrad.split(make(), SIZE), objective=GreedySupervised(), optimizer=adamw)
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["counts, in place", "counts, reassigned", "counts, list", "running mean"])
def test_memory_that_runs_out_takes_state_back(name: str) -> None:
    plain = run(learner_of(with_layer(name)))
    learner = learner_of(with_layer(name))
    failing = iter([False] * 4 + [True, False, True] + [False] * 100)  # once in each module

    def runs_out(*_: object) -> None:
        if next(failing):
            raise torch.OutOfMemoryError("CUDA out of memory")

    learner.modules[0].objective.register_forward_hook(runs_out)
    learner.modules[1].objective.register_forward_hook(runs_out)
    learner.on_out_of_memory(lambda _: True)
    assert_same(run(learner), plain)


@pytest.mark.parametrize("name", ["counts, in place", "counts, reassigned", "counts, attribute", "running mean"])
def test_the_isolation_check_leaves_state_alone(name: str) -> None:
    learner = learner_of(with_layer(name))
    before = copy.deepcopy(learner.model.state_dict())
    counts = [part.value() for part in learner.model.modules() if isinstance(part, Counter)]
    check_isolation(learner)
    assert_same(learner.model.state_dict(), before)
    assert counts == [part.value() for part in learner.model.modules() if isinstance(part, Counter)]


@pytest.mark.heavy
def test_estimates_take_blocks_with_state() -> None:
    for name in ("counts, in place", "spectral norm", "running mean"):
        learner = learner_of(with_layer(name).train(), "blocks")
        assert estimate_step(learner, 4, adamw).peak_bytes > 0


def refuse_replicas(model: nn.Module) -> None:
    """What a learner of two replicas asks before it trains."""
    asked: Any = types.SimpleNamespace(
        team=types.SimpleNamespace(num_replicas=2), backbone=localgrad.split(model, SIZE)
    )
    ParallelLearner._refuse_own_ways(asked)


def test_replicas_keep_state_that_is_theirs_alike() -> None:
    for name in ("counts, in place", "instance norm", "spectral norm"):
        refuse_replicas(with_layer(name))
    refuse_replicas(make("resnet"))


def test_replicas_are_refused_where_state_would_go_its_own_ways() -> None:
    with pytest.raises(ParallelError, match=r"replicas=2: RunningMean in blocks\.1 writes.*take replicas=1"):
        refuse_replicas(with_layer("running mean"))


# Classes ---------------------------------------------------------------------------------------------------------


def cell(factor: float) -> type[nn.Module]:
    """A notebook's cell that defines a block, run with another number in it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
            self.attn, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, features: Tensor) -> Tensor:
            features = features + self.attn(self.norm1(features))
            return features + factor * self.mlp(self.norm2(features))

    return Block


def pieces_of(block: nn.Module) -> int:
    return len(find_pieces(block, torch.randn(2, 3, 6)))


def test_a_second_class_of_the_same_name_has_its_own_cut() -> None:
    assert pieces_of(cell(1.0)()) == 2
    assert pieces_of(cell(2.0)()) == 1
    assert signature(cell(1.0)()) != signature(cell(2.0)())


def doubled(self: Any, features: Tensor) -> Tensor:
    return 2 * self.mlp(features)


def test_a_replaced_forward_has_its_own_cut() -> None:
    kind = cell(1.0)
    plain = signature(kind())
    assert pieces_of(kind()) == 2
    replaced: Any = kind()
    replaced.forward = types.MethodType(doubled, replaced)
    assert pieces_of(replaced) == 1
    assert pieces_of(kind()) == 2
    assert signature(replaced) != plain
    kind.forward = doubled  # type: ignore[method-assign]
    assert pieces_of(kind()) == 1
    assert signature(kind()) != plain


helper = float


class WithHelper(cell(1.0)):  # type: ignore[misc]
    """Calls a function by its global name."""

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.attn(self.norm1(features))
        return features + scaled(self.mlp(self.norm2(features)))


def scaled(features: Tensor) -> Tensor:
    return features


def test_another_helper_function_makes_another_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pieces_of(WithHelper()) == 2
    monkeypatch.setitem(globals(), "scaled", lambda features: 3 * features)
    assert pieces_of(WithHelper()) == 1


class Scaled(nn.Module):
    """timm's form, but for a number or a buffer that may be one."""

    def __init__(self, factor: float, gate: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.attn, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)
        self.factor = factor
        self.register_buffer("gate", torch.tensor(gate))

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.attn(self.norm1(features))
        return features + self.gate * self.factor * self.mlp(self.norm2(features))


def test_numbers_that_hide_a_factor_in_one_block_do_not_in_another() -> None:
    assert pieces_of(Scaled(1.0, 2.0)) == 1
    assert pieces_of(Scaled(1.0, 1.0)) == 1  # a buffer may change later
    assert pieces_of(Scaled(2.0, 1.0)) == 1


settings = types.ModuleType("settings_of_mine")
settings.factor = 1.0  # type: ignore[attr-defined]


class WithSettings(cell(1.0)):  # type: ignore[misc]
    """Reads a number in a module of the user's."""

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.attn(self.norm1(features))
        return features + settings.factor * self.mlp(self.norm2(features))  # type: ignore[attr-defined]


def test_a_number_in_a_users_module_is_not_taken_for_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pieces_of(WithSettings()) == 2
    monkeypatch.setattr(settings, "factor", 3.0)
    assert pieces_of(WithSettings()) == 1
    assert signature(WithSettings()) is None


@pytest.mark.parametrize("level", ["none", "halves", "halves/2"])
def test_a_number_that_is_set_later_counts(level: str) -> None:
    """As a schedule of the user's would set it: a factor of a branch that was one when the learner was made."""

    class Gated(Block):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.factor = 1.0

        def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
            features = features + self.factor * self.attn(self.norm1(features))
            return features + self.factor * self.mlp(self.norm2(features))

    def trained(level: str) -> Any:
        learner = learner_of(make(depth=2, block_fn=Gated), level)
        for block in learner.model.blocks:  # type: ignore[union-attr]
            block.factor = 0.5
        return [step.losses for step in train(learner, batches(2))]

    assert_near(trained(level), trained("blocks"))


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["instance", "class", "drop path"])
def test_what_is_replaced_after_the_learner_was_made_runs(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def model_and_learner(way: str) -> LocalLearner:
        learner = learner_of(make(depth=2), way)
        block: Any = learner.model.blocks[0]
        if how == "instance":
            block.forward = types.MethodType(lambda self, x: x + 2 * self.attn(self.norm1(x)), block)
        elif how == "class":
            monkeypatch.setattr(type(block), "forward", lambda self, x: x + 2 * self.attn(self.norm1(x)))
        else:
            block.drop_path1 = nn.Threshold(0.1, 0.0)
            learner._remember()  # which refuses it; what is found out of a block must not rely on that
        return learner

    plain = run(model_and_learner("none"), 2)
    monkeypatch.undo()
    assert_near(run(model_and_learner("halves"), 2), plain)


def test_costs_of_what_cannot_be_read_are_not_written_down() -> None:
    class Opaque:
        pass

    def factory(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return adamw(weights)

    factory.cache_key = "adamw"  # type: ignore[attr-defined]
    backbone = localgrad.split(make(depth=2), SIZE)
    settings = CostSettings(batch_size=2)
    assert key_of(backbone, GreedySupervised(), factory, settings) is not None
    backbone.blocks[0].something = Opaque()  # type: ignore[assignment]
    assert key_of(backbone, GreedySupervised(), factory, settings) is None


def test_a_users_operator_is_asked_anew() -> None:
    sizes = iter([3, 5])

    @torch.library.custom_op("localgrad_test::resized", mutates_args=())
    def resized(x: Tensor) -> Tensor:
        return x.clone()

    @resized.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(next(sizes))

    mode = FakeTensorMode()
    with mode:
        given = torch.empty(2)
        assert [len(resized(given)) for _ in range(2)] == [3, 5]


# Hooks -----------------------------------------------------------------------------------------------------------

HookSetter = Callable[[nn.Module, list[Any]], Any]
SETTERS: dict[str, HookSetter] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda _, i, o: seen.append((i[0].detach(), o.detach()))),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda _, i: seen.append(i[0].detach())),
    "with kwargs": lambda m, seen: m.register_forward_hook(
        lambda _, i, k, o: seen.append(o.detach()), with_kwargs=True
    ),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda _, i, o: seen.append((i[0], o[0]))),
    "changes": lambda m, seen: m.register_forward_hook(lambda _, i, o: 1.5 * o),
}
PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "block": lambda model: model.blocks[0],
    "attention": lambda model: model.blocks[0].attn,
    "drop path": lambda model: model.blocks[0].drop_path1,
    "norm": lambda model: model.blocks[0].norm2,
    "deep": lambda model: model.blocks[0].mlp.fc1,
}


@pytest.mark.few(2)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", SETTERS)
def test_hooks_run_as_in_checkpointed_blocks(kind: str, place: str) -> None:
    found = {}
    for way in ("none", *WAYS):
        learner = learner_of(make(depth=2), way, modules=1)
        seen: list[Any] = []
        SETTERS[kind](PLACES[place](learner.model), seen)
        losses, state = run(learner, 2)
        found[way] = losses, state, seen
    for way in WAYS[1:]:
        assert_near(found[way], found["blocks"])
    assert_near(found["blocks"][:2], found["none"][:2])
    # A recomputation ends where it has all that the backward pass needs: before what comes last.
    again = 1 if kind == "backward" or (place == "block" and kind != "pre") else 2
    assert len(found["blocks"][2]) == again * len(found["none"][2])


def noting(names: list[str]) -> Callable[..., None]:
    return lambda module, *_: names.append(type(module).__name__)


@pytest.mark.parametrize("way", ["blocks/2", "halves", "halves/4"])
def test_hooks_on_all_modules_run(way: str) -> None:
    found = []
    for how in ("blocks", way):
        learner = learner_of(make(depth=2), how, modules=1)
        names: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(noting(names))
        try:
            losses = run(learner, 1)
        finally:
            handle.remove()
        found.append((losses, names))
    assert_near(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_hooks_run_where_modules_overlap() -> None:
    seen = {}
    for way in ("blocks", "halves/2"):
        learner = learner_of(make(depth=4), way, modules=2, overlap=1)
        seen[way] = []
        for block in learner.model.blocks:
            SETTERS["forward"](block, seen[way])
        run(learner, 2)
    assert_near(seen["halves/2"], seen["blocks"])


def test_observing_runs_no_users_hooks() -> None:
    model, seen = make(depth=2), []
    for part in model.blocks.modules():
        part.register_forward_hook(lambda *_: seen.append(1))
    backbone = localgrad.split(model, SIZE)
    seen.clear()
    find_pieces(backbone.blocks[0], backbone.example(0))
    observed(backbone.blocks[0], backbone.example(0))
    assert not seen


# Averages --------------------------------------------------------------------------------------------------------


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))

    def forward(self, features: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(features) * self.filter).real


def averaging(layer: nn.Module, steps: int = 6, **settings: Any) -> tuple[LocalLearner, Any, Any]:
    model = make(depth=2)
    model.blocks[0].mlp = nn.Sequential(model.blocks[0].mlp, layer)
    torch.manual_seed(1)
    learner = LocalLearner(model, modules=1, input_size=SIZE, objective=GreedySupervised(), ema_decay=0.9, **settings)
    learner.configure_optimizers(lambda weights: torch.optim.AdamW(weights, lr=3e-2))
    run(learner, steps)
    assert learner.averaged_model is not None
    return learner, model.blocks[0].mlp[1], learner.averaged_model.blocks[0].mlp[1]  # type: ignore[index, union-attr]


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, spectral_norm], ids=["new", "old"])
@pytest.mark.parametrize("offload", [False, True])
def test_an_averaged_layer_with_spectral_norm_has_norm_one(norm: Any, offload: bool) -> None:
    learner, own, averaged = averaging(norm(nn.Linear(WIDTH, WIDTH)), offload=offload)
    assert torch.linalg.svdvals(averaged.weight.detach())[0].item() == pytest.approx(1, abs=1e-3)
    assert not torch.equal(own.bias, averaged.bias)
    images = batches(1)[0][0]
    logits = learner.averaged_logits(images)
    assert learner.averaged_model is not None
    torch.testing.assert_close(logits, learner.averaged_model.eval()(images))
    assert torch.linalg.svdvals(averaged.weight.detach())[0].item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("way", ["in place", "reassigned", "not saved"])
def test_the_average_has_the_models_counters(way: str) -> None:
    _, own, averaged = averaging(Counter(way))
    assert own.value() == averaged.value() == 6


def test_complex_weights_are_averaged() -> None:
    _, own, averaged = averaging(Complex())
    assert not torch.equal(own.filter, averaged.filter)
    learner, own, averaged = averaging(Complex(), steps=3)
    before, decay = averaged.filter.detach().clone(), learner._ema.get_decay(4)  # type: ignore[union-attr]
    train(learner, batches(1))
    torch.testing.assert_close(averaged.filter, decay * before + (1 - decay) * own.filter)


def test_a_tied_weight_is_averaged_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(WIDTH, WIDTH)
            self.other = nn.Linear(WIDTH, WIDTH)
            self.other.weight = self.one.weight

        def forward(self, features: Tensor) -> Tensor:
            return self.other(self.one(features))

    learner, own, averaged = averaging(Tied(), steps=3)
    before, decay = averaged.one.weight.detach().clone(), learner._ema.get_decay(4)  # type: ignore[union-attr]
    train(learner, batches(1))
    torch.testing.assert_close(averaged.one.weight, decay * before + (1 - decay) * own.one.weight)


def test_an_average_with_state_is_resumed() -> None:
    learner, _, averaged = averaging(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))
    other, _, theirs = averaging(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), steps=1)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one in (learner, other):
        train(one, batches(2))
    assert_same(theirs.state_dict(), averaged.state_dict())


def test_the_average_runs_no_users_hooks() -> None:
    model, seen = make(depth=2), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    learner = learner_of(model, modules=1, ema_decay=0.9)
    seen.clear()
    learner.averaged_logits(batches(1)[0][0])
    assert not seen


def test_a_modules_own_run_has_the_same_form() -> None:
    """Evaluation runs the plain blocks, whatever is recomputed in training."""
    learner = learner_of(make(depth=2), "halves/2", modules=1)
    seen: list[Any] = []
    SETTERS["forward"](learner.model.blocks[0], seen)
    learner.eval().logits(batches(1)[0][0])
    assert len(seen) == 1
    assert isinstance(learner.modules[0], LocalModule)
