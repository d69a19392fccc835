"""The laws of docs/architecture.md, one section each. (Round trips over all families are in test_families.py.)"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localgrad
from helpers import MODELS, SIZE, Planted, Token, adamw, assert_same, batches, make, make_backbone, train
from localgrad import Contrastive, FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner
from localgrad.estimating import estimate_step
from localgrad.objectives.carried import LocalBatch
from localgrad.step.local_module import LocalModule, LocalOutput
from localgrad.step.local_step import drawing_from

KINDS = ["swin", "vit", "resnet"]
OBJECTIVES = {
    "feature": FeatureReconstruction(),
    "image": ImageReconstruction(),
    "greedy": GreedySupervised(),
    "contrastive": Contrastive(),
}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """For tolerances: AdamW's first step is the gradient's sign, which turns a rounding error into a whole step."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def make_learner(
    kind: str, modules: Any = 3, optimizer: Any = adamw, drop_path: float = 0.0, **more: Any
) -> LocalLearner:
    learner = LocalLearner(make_backbone(kind, drop_path_rate=drop_path), modules=modules, **more)
    learner.configure_optimizers(optimizer)
    return learner


# Law 1: isolation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_a_modules_loss_reaches_its_own_parameters_and_no_others(kind: str, objective: str) -> None:
    learner = make_learner(kind, objective=OBJECTIVES[objective])
    images, labels = batches(1, 6)[0]
    batch, features = LocalBatch(images, labels), images
    for index, module in enumerate(learner.modules):
        output = module(features, batch)
        output.loss.backward()
        features = output.features
        assert not features.requires_grad
        for other, peer in enumerate(learner.modules):
            reached = {name for name, parameter in peer.named_parameters() if parameter.grad is not None}
            everything = {name for name, _ in peer.named_parameters()}
            assert reached == (everything if other == index else set()), (index, other)
        module.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_check_isolation_passes_and_leaves_everything_as_it_was(kind: str) -> None:
    learner = make_learner(kind, objective=ImageReconstruction(), drop_path=0.3)
    for number, parameter in enumerate(learner.model.parameters()):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    gradients = {name: copy.copy(p.grad) for name, p in learner.model.named_parameters()}
    before = copy.deepcopy(learner.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    localgrad.check_isolation(learner)
    assert torch.equal(torch.get_rng_state(), state)
    after = learner.state_dict()
    assert_same(after["model"], before["model"])
    for ours, theirs in zip(after["objectives"], before["objectives"], strict=True):
        assert_same(ours, theirs)
    for name, parameter in learner.model.named_parameters():
        kept = gradients[name]
        assert parameter.grad is kept is None or torch.equal(parameter.grad, kept), name
    assert learner.model.training


def leaky(self: LocalModule, inputs: Tensor, batch: LocalBatch) -> LocalOutput:
    """``LocalModule.forward`` as somebody might break it: the features keep their graph."""
    outputs = self.features(inputs)
    value = self.objective(inputs, outputs, batch)
    return LocalOutput(outputs, value.loss, {}, value.logits)


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_check_isolation_catches_features_that_keep_their_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(kind)
    marked = next(iter(learner.modules[0].parameters()))
    marked.grad = torch.ones_like(marked)
    state = torch.get_rng_state()
    monkeypatch.setattr(LocalModule, "forward", leaky)
    with pytest.raises(localgrad.IsolationError, match="local module 1 reached a parameter of another: local module 0"):
        localgrad.check_isolation(learner)
    assert marked.grad is not None
    assert torch.equal(marked.grad, torch.ones_like(marked))  # also where it fails
    assert torch.equal(torch.get_rng_state(), state)
    reached = [p for module in learner.modules for p in module.parameters() if p is not marked and p.grad is not None]
    assert not reached


def test_check_isolation_catches_an_objective_that_uses_another_modules_weights() -> None:
    learner = make_learner("vit")
    thief = learner.modules[2].objective
    stolen = next(iter(learner.modules[0].parameters()))
    honest = thief.forward
    thief.forward = lambda *args: honest(*args)._replace(loss=stolen.square().sum())  # type: ignore[method-assign]
    with pytest.raises(localgrad.IsolationError, match=r"local module 2 reached .* local module 0"):
        localgrad.check_isolation(learner)


# Law 2: equivalence ----------------------------------------------------------------------------------------------


def plain_timm_training(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], *, smoothing: float, clip: float | None
) -> list[tuple[Tensor, Tensor]]:
    """What anybody would write: no line in common with the package."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    torch.manual_seed(7)
    seen = []
    for images, labels in data:
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        seen.append((logits.detach(), loss.detach()))
    return seen


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("smoothing", "clip", "soft"),
    [(0.0, None, False), (0.1, 0.5, False), (0.0, 0.5, True)],
    ids=["plain", "smoothed and clipped", "soft labels and clipped"],
)
@pytest.mark.parametrize("kind", [*KINDS, "cait"])
def test_one_module_is_plain_timm_training_bit_for_bit(
    kind: str, smoothing: float, clip: float | None, soft: bool
) -> None:
    data = batches(5, 6, soft=soft)
    reference = make(kind, drop_path_rate=0.3)
    seen = plain_timm_training(reference, data, smoothing=smoothing, clip=clip)
    objective = FeatureReconstruction(label_smoothing=smoothing)
    learner = make_learner(kind, modules=1, drop_path=0.3, objective=objective, clip_grad=clip)
    results = train(learner, data)
    for result, (logits, loss) in zip(results, seen, strict=True):
        assert torch.equal(result.logits, logits)
        assert torch.equal(result.losses[0], loss)
        assert torch.equal(result.terms[0]["task"], loss)
    assert_same(learner.model.state_dict(), reference.state_dict())


def layer_normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_sequential_training_equals_a_naive_loop_bit_for_bit(kind: str) -> None:
    """The naive loop: slices of blocks, a detach between them, a loss and an optimizer each, all by hand."""
    objective = FeatureReconstruction(reconstruction_weight=0.5, label_smoothing=0.1)
    boundaries = (1, 3)
    learner = make_learner(kind, modules=boundaries, drop_path=0.3, objective=objective, clip_grad=1.0)

    model = make(kind, drop_path_rate=0.3)
    backbone = localgrad.split(model, SIZE).train()
    layouts = backbone.layouts
    modules, auxiliary, optimizers = [], [], []
    for number, (start, stop) in enumerate([(0, 1), (1, 3), (3, len(backbone.blocks))]):
        parts: list[nn.Module] = [*backbone.blocks[start:stop]]
        parts = [backbone.stem, *parts] if number == 0 else parts
        parts = [*parts, backbone.tail] if number == 2 else parts
        terms = learner.modules[number].objective.terms
        heads = (
            []
            if number == 2
            else [copy.deepcopy(terms["task"].classifier), copy.deepcopy(terms["reconstruction"].decoder)]
        )
        modules.append(parts)
        auxiliary.append(heads)
        optimizers.append(adamw([p for part in [*parts, *heads] for p in part.parameters()]))

    data = batches(4, 6)
    torch.manual_seed(7)
    losses = []
    for step, (images, labels) in enumerate(data):
        features = images
        for number, parts in enumerate(modules):
            inputs = features.detach()
            outputs = inputs
            with drawing_from(torch.device("cpu"), (learner.seed, number, step)):  # what a module draws is its own
                for part in parts:
                    outputs = part(outputs)
            if number == 2:
                loss = F.cross_entropy(outputs, labels, label_smoothing=0.1)
            else:
                classifier, decoder = auxiliary[number]
                task = F.cross_entropy(classifier(outputs), labels, label_smoothing=0.1)
                grid = layouts[1].to_grid
                target = inputs.permute(0, 2, 3, 1) if number == 0 else layer_normalised(grid(inputs))
                loss = task + F.mse_loss(decoder(outputs), target) * 0.5
            loss.backward()
            own = optimizers[number].param_groups[0]["params"]
            torch.nn.utils.clip_grad_norm_(learner_order(learner, number, own, model, auxiliary), 1.0)
            optimizers[number].step()
            optimizers[number].zero_grad()
            losses.append(loss.detach())
            features = outputs

    results = train(learner, data)
    assert all(torch.equal(a, b) for a, b in zip([v for r in results for v in r.losses], losses, strict=True))
    assert_same(learner.model.state_dict(), model.state_dict())
    for number, heads in enumerate(auxiliary[:2]):
        terms = learner.modules[number].objective.terms
        assert_same(terms["task"].classifier.state_dict(), heads[0].state_dict())
        assert_same(terms["reconstruction"].decoder.state_dict(), heads[1].state_dict())


def learner_order(
    learner: LocalLearner, number: int, own: list[nn.Parameter], model: nn.Module, auxiliary: list[list[nn.Module]]
) -> list[nn.Parameter]:
    """The same parameters in the order in which the learner's clipping sums: the model's, then the auxiliary nets'."""
    ids = {id(p) for p in own}
    ordered = [p for p in model.parameters() if id(p) in ids]
    ordered += [p for net in auxiliary[number] for p in net.parameters()]
    assert len(ordered) == len(own) == len(learner.parameters(number))
    return ordered


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing_at_all(kind: str) -> None:
    data = batches(3, 6)
    plain = make_learner(kind, drop_path=0.3)
    saving = make_learner(kind, drop_path=0.3, checkpoint=True)
    assert [str(how) for how in saving.plan.checkpoint] == ["blocks"] * 3
    for ours, theirs in zip(train(saving, data), train(plain, data), strict=True):
        assert torch.equal(ours.logits, theirs.logits)
        assert all(torch.equal(a, b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    assert_same(saving.model.state_dict(), plain.model.state_dict())  # running statistics among them


def test_checkpointing_recomputes_only_the_modules_it_was_asked_for() -> None:
    learner = make_learner("vit", modules=(1, 2), checkpoint=(False, True, False))
    calls = [0] * 4
    for number, block in enumerate(learner.backbone.blocks):

        def count(*_: object, number: int = number) -> None:
            calls[number] += 1

        block.register_forward_pre_hook(count)
    train(learner, batches(1, 6))
    assert calls == [1, 2, 1, 1]


@pytest.mark.parametrize(("accumulation", "num_images"), [(2, 6), (3, 7), (5, 6)])
@pytest.mark.parametrize("objective", ["feature", "greedy"])
def test_accumulation_gives_the_whole_batchs_update(objective: str, accumulation: int, num_images: int) -> None:
    data = batches(2, num_images)
    settings = {"objective": OBJECTIVES[objective], "optimizer": sgd, "clip_grad": 1.0}
    whole, parts = make_learner("swin", **settings), make_learner("swin", accumulation=accumulation, **settings)
    for ours, theirs in zip(train(parts, data), train(whole, data), strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.losses, theirs.losses, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.terms, theirs.terms, atol=1e-5, rtol=1e-5)
        assert [None if v is None else v.shape for v in ours.module_logits] == [v.shape for v in theirs.module_logits]
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), atol=1e-5, rtol=1e-4)


def test_accumulation_takes_soft_labels_apart_with_their_images() -> None:
    data = batches(2, 6, soft=True)
    whole, parts = make_learner("vit", optimizer=sgd), make_learner("vit", optimizer=sgd, accumulation=2)
    for ours, theirs in zip(train(parts, data), train(whole, data), strict=True):
        torch.testing.assert_close(ours.losses, theirs.losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", ["feature", "contrastive"])
def test_bf16_stays_within_its_rounding(objective: str) -> None:
    """bf16 keeps 8 bits: losses within 2 %, and updates that point the same way."""
    data = batches(3, 6)
    full, low = (
        make_learner("swin", objective=OBJECTIVES[objective], optimizer=sgd, precision=precision)
        for precision in ("fp32", "bf16")
    )
    start = copy.deepcopy(full.model.state_dict())
    for ours, theirs in zip(train(low, data), train(full, data), strict=True):
        torch.testing.assert_close(ours.losses, theirs.losses, atol=0.02, rtol=0.02)
        assert all(loss.dtype == torch.float32 for loss in ours.losses)
    moved = [
        torch.cat([(state[name] - start[name]).flatten() for name, _ in full.model.named_parameters()])
        for state in (low.model.state_dict(), full.model.state_dict())
    ]
    assert F.cosine_similarity(*moved, dim=0) > 0.98
    assert all(p.dtype == torch.float32 for p in low.model.parameters())


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("vit", "eager"), *(pytest.param(kind, "inductor", marks=pytest.mark.heavy) for kind in ("swin", "vit"))],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while compiling
def test_compiling_stays_within_float_rounding(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    compiled_functions = []

    def compile_with(function: Any, **options: Any) -> Callable[..., Any]:
        compiled_functions.append(function)
        return original(function, backend=backend, **options)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_with)
    data = batches(2, 6)
    if kind == "vit":
        monkeypatch.setitem(MODELS, "vit", MODELS["vit"] | {"depth": 2})  # compiling takes its time
    plain, compiled = make_learner(kind, 2, sgd), make_learner(kind, 2, sgd, compile=True)
    assert [function.__self__ for function in compiled_functions] == compiled.modules
    for ours, theirs in zip(train(compiled, data), train(plain, data), strict=True):
        torch.testing.assert_close(ours.losses, theirs.losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict(), atol=1e-4, rtol=1e-3)


@pytest.mark.heavy
def test_local_modules_are_compiled_for_their_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All share one forward's code, so torch takes the second module's shape for a change of the first one's.

    It would then compile for symbolic sizes: a Swin of three blocks took 180 s so, and 4 s with static ones.
    """
    graphs = compile_and_train(make_compiled("resnet", 2), monkeypatch)
    assert len(graphs) >= 2  # older torch breaks a module into several
    assert not any(isinstance(value, torch.SymInt) for inputs in graphs for value in inputs)


@pytest.mark.heavy
def test_more_modules_than_torch_recompiles_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the ninth variant of one forward's code on, torch would run the rest uncompiled, with a line in a log."""
    monkeypatch.setitem(MODELS, "swin", MODELS["swin"] | {"depths": (3, 3, 4), "patch_size": 2})
    assert len(compile_and_train(make_compiled("swin", 12), monkeypatch)) > 8


@pytest.mark.heavy
def test_the_memory_of_a_compiled_learner_is_estimated() -> None:
    learners = [make_compiled("vit", 2, compile=flag) for flag in (True, False)]
    for learner in learners:
        learner.configure_optimizers(sgd)  # a run estimates when it is ready to start
    peaks = [estimate_step(learner, 4, sgd).peak_bytes for learner in learners]
    assert peaks[0] == peaks[1]


def make_compiled(kind: str, modules: int, *, compile: bool = True) -> LocalLearner:
    return LocalLearner(make(kind), modules=modules, input_size=SIZE, objective=GreedySupervised(), compile=compile)


def compile_and_train(learner: LocalLearner, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The inputs of every graph that is compiled in one step."""
    torch.compiler.reset()
    compiled: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(inputs)
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: original(module, backend=backend, **options))
    learner.configure_optimizers(sgd)
    train(learner, batches(1, 6))
    return compiled


# Law 3: lifetime -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"accumulation": 2}, {"parts": 2}, {"checkpoint": True}, {"precision": "bf16"}], ids=str
)
@pytest.mark.parametrize("kind", ["swin", "vit"])
@pytest.mark.usefixtures("_no_collector")
def test_a_modules_graph_and_gradients_are_gone_before_the_next_one_runs(kind: str, settings: dict) -> None:
    num_parts = settings.get("parts", 0)
    learner = make_learner(kind, 3, **{name: value for name, value in settings.items() if name != "parts"})
    graphs: dict[int, list[weakref.ref]] = {0: [], 1: [], 2: []}
    storages: dict[int, list[weakref.ref]] = {0: [], 1: [], 2: []}
    checked = []

    def plant(_module: nn.Module, _inputs: object, output: Tensor, *, number: int) -> Tensor:
        token = Token()
        graphs[number].append(weakref.ref(token))
        storages[number].append(weakref.ref(output.untyped_storage()))
        return Planted.apply(output, token)

    def look(_module: nn.Module, _inputs: object, *, number: int) -> None:
        for before in range(number):
            assert graphs[before], "nothing planted"
            assert all(token() is None for token in graphs[before]), f"graph of module {before}"
            own = learner.parameters(before)
            assert all(parameter.grad is None for parameter in own), f"gradients of module {before}"
            # Of all that module made, only what it hands on may live: its last part's output, as our own input.
            alive = [storage for storage in storages[before][:-1] if storage() is not None]
            assert {"accumulation", "parts"} & settings.keys() or not alive, f"activations of module {before}"
        checked.append(number)

    for number, module in enumerate(learner.modules):
        for part in module.parts:
            part.register_forward_hook(partial(plant, number=number))
        module.register_forward_pre_hook(partial(look, number=number))
    (images, labels), *_ = batches(1, 6)
    if num_parts:
        learner.step_parts(list(zip(images.chunk(num_parts), labels.chunk(num_parts), strict=True)))
    else:
        learner.step(images, labels)
    assert sorted(set(checked)) == [0, 1, 2]
    look(learner.modules[0], None, number=3)  # after the step, nothing of any module is left


def test_the_instruments_of_the_lifetime_test_can_fail() -> None:
    token = Token()
    seen = weakref.ref(token)
    x = torch.ones(3, requires_grad=True)
    loss = Planted.apply(x * 2, token).sum()
    del token
    loss.backward()
    assert seen() is not None  # the graph lives as long as its loss does
    del loss
    assert seen() is None


def test_more_modules_need_less_memory() -> None:
    peaks = {}
    for modules in (1, 2, 4):
        model = make("vit", patch_size=4)
        learner = LocalLearner(model, modules=modules, input_size=SIZE, objective=GreedySupervised())
        peaks[modules] = estimate_step(learner, 32, adamw).peak_bytes
    assert peaks[4] < 0.75 * peaks[2], peaks
    assert peaks[2] < 0.75 * peaks[1], peaks


@pytest.mark.parametrize(("objective", "kept"), [("feature", [True, False, False]), ("image", [True, True, False])])
@pytest.mark.usefixtures("_no_collector")
def test_images_that_are_given_away_die_with_their_last_user(objective: str, kept: list[bool]) -> None:
    learner = make_learner("vit", 3, objective=OBJECTIVES[objective])
    alive = []
    batch = LocalBatch(*batches(1, 6)[0])
    assert batch.images is not None
    storage = weakref.ref(batch.images.untyped_storage())
    for module in learner.modules:
        module.register_forward_pre_hook(lambda *_: alive.append(storage() is not None))
    learner.step_on(batch)
    assert alive == kept
    assert storage() is None


# Law 4: round trip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trained_weights_give_the_same_logits_in_plain_timm(kind: str) -> None:
    learner = make_learner(kind, drop_path=0.3)
    train(learner, batches(2, 6))
    fresh = timm.create_model(**(MODELS[kind] | {"num_classes": 5}))
    before = fresh.state_dict()
    assert not torch.equal(next(iter(before.values())), next(iter(learner.model.state_dict().values())))
    fresh.load_state_dict(learner.model.state_dict(), strict=True)
    images = batches(1, 6)[0][0]
    learner.eval()
    with torch.no_grad():
        expected = fresh.eval()(images)
        assert torch.equal(learner.backbone(images), expected)
        assert torch.equal(learner.model(images), expected)
    last = learner.logits(images)[-1]
    assert last is not None
    assert torch.equal(last, expected)


# Law 5: architecture ---------------------------------------------------------------------------------------------

PACKAGE = Path(localgrad.__file__).parent
LAYERS = (
    ("errors",),
    ("units", "formats"),
    ("registry",),
    ("balancing", "partition"),
    ("options", "rules"),
    ("backbones",),
    ("objectives",),
    ("step",),
    ("memory",),
    ("partitioning",),
    ("learner",),
    ("estimating", "evaluating", "isolation"),
    ("parallel",),
    ("planning",),
    ("training",),
    ("app",),
    ("run",),
    ("finetuning",),
    ("compare",),
    ("integrations",),
    ("cli",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@cache
def source_files() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py" and "presets" not in path.parts
    ]


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, functions and type checking included."""
    known = {dotted(other) for other in source_files()}
    package = ["localgrad", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{home}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if name.removeprefix("localgrad.") in known}
            found |= submodules | ({home} if names - submodules else set())
    return {name.removeprefix("localgrad.") for name in found if name.startswith("localgrad.")}


def test_every_file_has_a_layer() -> None:
    assert {dotted(path).split(".")[0] for path in source_files()} == set(RANKS)


@pytest.mark.parametrize("path", source_files(), ids=dotted)
def test_imports_point_one_way(path: Path) -> None:
    own = dotted(path).split(".")[0]
    for imported in imports_of(path):
        layer = imported.split(".")[0]
        assert layer in RANKS, f"{dotted(path)} imports localgrad.{imported}, which has no layer"
        assert RANKS[layer] < RANKS[own] or layer in LAYERS[RANKS[own]], f"{dotted(path)} imports localgrad.{imported}"


def test_no_import_cycles_within_a_layer() -> None:
    waiting = {dotted(path): imports_of(path) - {dotted(path)} for path in source_files()}
    while waiting:
        ready = {name for name, needed in waiting.items() if not needed & waiting.keys()}
        assert ready, f"a cycle among {sorted(waiting)}"
        waiting = {name: needed for name, needed in waiting.items() if name not in ready}


def test_the_import_reader_sees_function_level_and_relative_imports() -> None:
    assert {"app.recipe", "run", "training.events"} <= imports_of(PACKAGE / "cli.py")
    assert {"backbones.timm_models", "errors"} <= imports_of(PACKAGE / "backbones" / "base.py")
    assert {"objectives.base", "objectives.supervised"} <= imports_of(PACKAGE / "objectives" / "methods.py")


def test_no_test_module_imports_another() -> None:
    """What several share stands in files of its own, so that each file of tests runs alone and any may go."""
    for path in Path(__file__).parent.rglob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {str(node.module), *(alias.name for alias in node.names)}
        found = sorted(name for name in imported if name.rsplit(".", maxsplit=1)[-1].startswith("test_"))
        assert not found, f"{path.name} imports {found}"


PUBLIC = [
    "Backbone",
    "BackboneError",
    "BudgetError",
    "Carried",
    "CheckpointError",
    "Checkpointing",
    "Classifier",
    "Contrastive",
    "DataError",
    "Decoder",
    "DeviceError",
    "DivergenceError",
    "EpochEnded",
    "FeatureReconstruction",
    "FeaturesCached",
    "GreedySupervised",
    "Handed",
    "HealthMeasured",
    "ImageReconstruction",
    "IsolationError",
    "Layout",
    "LocalBatch",
    "LocalLearner",
    "LocalObjective",
    "LocalgradError",
    "Measurement",
    "Objective",
    "ParallelError",
    "ParallelLearner",
    "PartitionError",
    "Plan",
    "Progressed",
    "Recipe",
    "RecipeError",
    "Replanned",
    "RunEnded",
    "RunFolderError",
    "RunStarted",
    "Sink",
    "Site",
    "StepResult",
    "StoppedEarly",
    "Team",
    "Term",
    "TermValue",
    "__version__",
    "balance",
    "check_isolation",
    "estimate",
    "export",
    "finetune",
    "measure",
    "plan",
    "quantize_base",
    "register_backbone",
    "register_carried",
    "register_classifier",
    "register_decoder",
    "register_objective",
    "register_sink",
    "register_transform",
    "resume",
    "split",
    "train",
]
"""What users may rely on. A change here is a change of the package's contract."""


def test_public_names_are_frozen() -> None:
    assert sorted(localgrad.__all__) == PUBLIC
    assert dir(localgrad) == PUBLIC
    assert all(getattr(localgrad, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = localgrad.Nothing


def test_names_for_type_checkers_are_the_public_names() -> None:
    """The lazy table and the imports that type checkers read are two lists of the same names and homes."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    listed = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    listed = {name: home for name, home in listed.items() if str(home).startswith("localgrad.")}
    assert sorted([*listed, "__version__"]) == PUBLIC
    for name, home in listed.items():
        assert getattr(localgrad, name) is getattr(importlib.import_module(str(home)), name)


def test_cli_verbs_are_frozen() -> None:
    from localgrad.cli import app

    verbs = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert sorted(verbs) == ["compare", "evaluate", "export", "finetune", "plan", "predict", "train"]
    assert not app.registered_groups


DETACHED = {
    # The one place where features leave without their graph, and figures for reports.
    # The context of blocks leaves the stem in the same way; embedded token ids are a target.
    "step.local_module": ["handed_on", "self.under_way.current", "states[0]", "term", "value.logits"],
    "step.global_step": ["logits", "term", "value.logits", "value.loss"],  # figures, once the backward pass is done
    "step.local_step": ["output.loss"],  # the figure, once its backward pass is done
    "objectives.losses": ["torch.as_tensor(weight, dtype=torch.get_default_dtype())"],  # class weights, as given
    "objectives.readouts": ["linear.bias", "linear.weight"],  # the model's own, read and not trained
    "objectives.reconstruction": ["state"],  # a target inside the module; what goes on keeps its graph
    "backbones.fake": ["tensor", "torch.ops.aten"],  # a copy of a weight on the host, and an operator's name
    "backbones.watching": ["Tensor"],  # how a context is detached
    "backbones.state": ["tensor"],  # values to be had back
    # The proof's images, its figures once the backward pass is done, and what a call had been given.
    "backbones.proof": ["images", "logits", "tensor", "tensor", "tensor"],
    "backbones.observe": ["args[0]"],  # what a part received, to be compared with what it left of it
    "backbones.effects": ["twin(features.clone())"],  # of a copy that is tried
    "backbones.hooks": ["value", "value"],  # what a module shows of an earlier pass
    "memory.gauge": ["torch.ops.aten"],  # the operator's own name, in a list of those that take no time
    "memory.track": ["inputs", "outputs"],  # the seams of a chain of parts, on fake tensors
    "training.folder": ["tensor"],  # weights on their way to disk
}


def test_features_are_detached_in_one_place() -> None:
    found: dict[str, list[str]] = {}
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("detach", "detach_"):
                found.setdefault(dotted(path), []).append(ast.unparse(node.value))
    assert {name: sorted(values) for name, values in found.items()} == DETACHED


@pytest.mark.parametrize("module", ["localgrad", "localgrad.cli"])
def test_importing_does_not_wait_for_torch(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in ('torch', 'timm', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(localgrad, name)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}("), "a dataclass's own signature says nothing"
    if not inspect.isclass(value):
        return
    for attribute, member in vars(value).items():
        if attribute.startswith("_") or not (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
            continue
        assert inspect.getdoc(SimpleNamespace if member is None else member), f"{name}.{attribute}"
