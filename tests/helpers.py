"""What several test files share: small models, seeded data, training, comparisons, the command line, real runs."""

from __future__ import annotations

import copy
import gc
import json
import signal
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from localgrad.backbones.base import Backbone, split
from localgrad.learner import LocalLearner, StepResult
from localgrad.objectives.base import LocalObjective
from localgrad.parallel.pipeline import Neighbours
from localgrad.parallel.team import Team
from localgrad.training.data import Splits, load_data
from localgrad.training.events import Event, Sink
from localgrad.training.settings import DataSettings
from localgrad.training.trainer import EpochSums

if TYPE_CHECKING:
    from ranks import Started

# Models ----------------------------------------------------------------------------------------------------------

SIZE = (3, 32, 32)
MICRO_TOML = """
[data]
name = "digits"
limit = 120
[model]
name = "swin_tiny_patch4_window7_224"
img_size = 16
patch_size = 2
options = { embed_dim = 16, depths = [1, 1], num_heads = [2, 2], window_size = 4 }
[local]
modules = 2
[training]
epochs = 2
batch_size = 16
[execution]
device = "cpu"
num_threads = 1
"""
"""A recipe of a second."""
MICRO: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 8,
        "options": {"embed_dim": 8, "depth": 2, "num_heads": 2},
    },
    "data": {"name": "digits", "limit": 48},
    "local": {"modules": 2},
    "training": {"epochs": 3, "batch_size": 16, "lr": 2e-3, "warmup_epochs": 0},
    "execution": {"device": "cpu", "num_threads": 1},
}
"""A recipe of half a second."""
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (1, 1, 1),
    "num_heads": (1, 2, 4),
}
MODELS: dict[str, dict[str, Any]] = {
    "swin": {"model_name": "swin_tiny_patch4_window7_224", **SWIN},
    "vit": {"model_name": "vit_tiny_patch16_224", **VIT},
    # For its batch norms.
    "resnet": {"model_name": "resnet18", "channels": (8, 8, 16, 16), "output_stride": 8},
    # Lists its parameters in another order than it uses them; a clipping norm sums in the listed one.
    "cait": {"model_name": "cait_xxs24_224", **VIT, "embed_dim": 24, "depth": 2, "num_heads": 3},
    # Every block reads one rotary embedding's buffers.
    "eva": {"model_name": "eva02_tiny_patch14_224", **VIT},
}


def make(kind: str = "vit", **more: Any) -> nn.Module:
    """A small model of five classes; the same weights each time."""
    torch.manual_seed(0)
    return timm.create_model(**(MODELS[kind] | {"num_classes": 5} | more))


def make_backbone(kind: str = "vit", **more: Any) -> Backbone:
    """The same, split: a copy of one that is split once, as that takes longer than a step of it.

    The random state is what it is after making the model.
    """
    key = repr(MODELS[kind] | more)
    if key not in _split:
        model = make(kind, **more)
        random_state = torch.get_rng_state()
        _split[key] = split(model, SIZE), random_state
    backbone, random_state = _split[key]
    torch.set_rng_state(random_state)
    return copy.deepcopy(backbone)


_split: dict[str, tuple[Backbone, Tensor]] = {}


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


def quick_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)  # far enough for moving averages to lag visibly


def make_learner(model: nn.Module | None = None, modules: Any = 3, optimizer: Any = adamw, **more: Any) -> LocalLearner:
    """A learner with optimizers, of a small ViT by default; the same weights each time."""
    torch.manual_seed(1)
    learner = LocalLearner(make_backbone() if model is None else model, modules=modules, input_size=SIZE, **more)
    learner.configure_optimizers(optimizer)
    return learner


def copied(weights: nn.Module) -> dict[str, Tensor]:
    """A module's state, copied."""
    return {name: value.detach().clone() for name, value in weights.state_dict().items()}


def term_of(objective: LocalObjective, name: str) -> Any:
    return objective.terms[name]


# Training --------------------------------------------------------------------------------------------------------


def batches(count: int, num_images: int = 4, *, soft: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Images and labels, or soft labels; the same each time."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        images = torch.randn(num_images, *SIZE, generator=generator)
        labels = torch.randint(5, (num_images,), generator=generator)
        if soft:
            labels = torch.rand(num_images, 5, generator=generator).softmax(dim=1)
        made.append((images, labels))
    return made


def train(learner: LocalLearner, data: list[tuple[Tensor, Tensor]]) -> list[StepResult]:
    torch.manual_seed(7)
    return [learner.step(images, labels) for images, labels in data]


def walk(learner: LocalLearner, images: Tensor) -> list[list[Tensor]]:
    """For each module what entered each part and what left the last, by a plain pass through the parts."""
    found, x = [], images
    with torch.no_grad():
        for module in learner.modules:
            states = [x]
            for part in module.parts:
                states.append(part(states[-1]))
            found.append(states)
            x = states[-1]
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state as one dict, its tensors copied."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, inner in items for name, leaf in flat(inner, f"{prefix}{key}.").items()}
    return {prefix: value.clone() if isinstance(value, Tensor) else value}


def assert_same(ours: Any, theirs: Any) -> None:
    """Two states, however nested, bit for bit."""
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype, name
        else:
            assert value == theirs[name], name


def logits_and_gradients(call: Callable[[], Tensor], model: nn.Module) -> list[Tensor]:
    """Of all parameters, in their order; zeros of those that are not read. The same draws each time."""
    torch.manual_seed(5)
    logits = call()
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6))
    weights = list(model.parameters())
    found = torch.autograd.grad(logits, weights, cotangent, allow_unused=True)
    return [logits.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


class Token:
    """Lives as long as the node of the graph that holds it."""


class Planted(torch.autograd.Function):
    """The identity, with a token in its node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Token) -> Tensor:
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


# Processes ---------------------------------------------------------------------------------------------------------


def place_in(num_ranks: int, rank: int = 0, num_replicas: int = 1) -> Team:
    """A process's place among others that aren't there: enough to make a learner."""
    return Team(
        rank=rank, size=num_ranks * num_replicas, replica=0, num_replicas=num_replicas, store=None, control=None,
        place=Neighbours(rank=rank, num_ranks=num_ranks), device=torch.device("cpu"),
    )  # fmt: skip


# Memory ----------------------------------------------------------------------------------------------------------


def profiler_peak(step: Callable[[], object]) -> int:
    """Peak bytes of a second step above its start, from the allocator's own events: no code in common with ours."""
    step()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    running = peak = 0
    for _, _, nbytes in changes:
        running += nbytes
        peak = max(peak, running)
    return peak


# The command line ------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Said]
"""What the fixture ``cli_`` gives: arguments in, what was said out."""


def assert_refused(said: Said, *words: str) -> None:
    assert said.code == 2, said
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("localgrad: ")
    assert "Traceback" not in said.err + said.out
    for word in words:
        assert word in said.err, (word, said.err)


# Runs ------------------------------------------------------------------------------------------------------------

TIMES = ("images_per_second", "seconds")
EVERYTHING: dict[str, Any] = {
    "training.clip_grad": 1.0,
    "augment.mixup": 0.4,
    "augment.cutmix": 1.0,
    "augment.label_smoothing": 0.1,
    "augment.crop_padding": 1,
    "model.drop_path": 0.2,
}
"""Changes to a recipe: whatever has a state or draws numbers."""


class Recorder(Sink):
    """Keeps events; calls ``at_event`` with each."""

    def __init__(self, at_event: Callable[[Event], object] | None = None) -> None:
        self.events: list[Event] = []
        self.at_event = at_event

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if self.at_event is not None:
            self.at_event(event)


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Two finished runs, bit for bit in all but how long they took, their memory, and where they lie."""
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert [without_times(line) for line in metrics_of(folder)] == [
        without_times(line) for line in metrics_of(reference)
    ]
    ours, theirs = (without_times(json.loads((path / "summary.json").read_text())) for path in (folder, reference))
    for own in ("folder", "measured_peak_bytes", "estimated_peak_bytes", "estimated_end_to_end_peak_bytes"):
        del ours[own], theirs[own]
    for summary in (ours, theirs):
        summary.pop("ranks", None)  # of a parallel run
    assert ours == theirs


def interrupt_at_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send this process SIGTERM at the end of training step ``number``, counted from 1."""
    count = 0
    add = EpochSums.add

    def interrupted(self: EpochSums, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            signal.raise_signal(signal.SIGTERM)
        add(self, *arguments)

    monkeypatch.setattr(EpochSums, "add", interrupted)


def wait_for_epochs(process: Started, folder: Path, count: int, *, seconds_on: float = 0.0) -> None:
    """Wait until ``count`` epochs are saved, and so long into the next one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_running():
        last, metrics = folder / "checkpoints" / "last.pt", folder / "metrics.jsonl"
        if last.exists() and metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            time.sleep(seconds_on)
            return
        time.sleep(0.005)
    raise AssertionError(process.wait())


def load_named(name: str, **options: Any) -> Splits:
    """Load a data set by name, with single settings of a recipe's and of ``load_data``."""
    own = {each.name for each in fields(DataSettings)}
    settings = {key: value for key, value in options.items() if key in own}
    others = {key: value for key, value in options.items() if key not in own}
    return load_data(DataSettings(name=name, **settings), **others)
