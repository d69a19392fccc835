"""Local modules in other people's loops (examples/loop_*.py): each trains what a loop written out here trains, and
goes on after it was interrupted; and what of a loop would be wrong with ``learner.optimizer`` is refused."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, NativeScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import localgrad
from helpers import assert_same, batches, copied, make_learner
from localgrad.errors import CheckpointError, ParallelError, RecipeError
from localgrad.learner import LocalLearner

pytest.importorskip("timm.task", reason="timm 1.0.27 has it")

from timm.task import load_task_ema_checkpoint, resume_task_checkpoint

from localgrad.integrations import timm_task  # it needs that

if TYPE_CHECKING:
    from ranks import Ranks

EXAMPLES = Path(__file__).parents[1] / "examples"
EPOCHS, PARTS, BATCH = 3, 2, 32
UPDATES = 2
"""An epoch, of the images that are left."""
Batch = tuple[Tensor, Tensor]


class Loop(NamedTuple):
    """A script, how its optimizers and its schedule are made in the loops of this file, and what it saves."""

    name: str
    groups: Callable[[nn.Module, Sequence[nn.Parameter]], list[dict[str, Any]]]
    schedule: Callable[[Optimizer], Callable[[int], None]]
    checkpoint: str
    weights: Callable[[Path], dict[str, Tensor]]
    needs: str = "torch"
    total: Callable[[list[Tensor]], float] = lambda shares: sum(map(float, shares))


def alike(model: nn.Module, weights: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": list(weights), "lr": 3e-3}]


def by_layer(model: nn.Module, weights: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """One group a parameter: layer decay for the model's, none for an auxiliary net's."""
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.9)
    scales = {id(weight): (group["lr_scale"], group["weight_decay"]) for group in groups for weight in group["params"]}
    found = [(weight, *scales.get(id(weight), (1.0, 0.05))) for weight in weights]
    return [{"params": [weight], "lr": 3e-3 * scale, "weight_decay": decay} for weight, scale, decay in found]


def by_rank(model: nn.Module, weights: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """As timm's own filter for the model, which is what the script says for lists."""
    undecayed = {id(weight) for weight in param_groups_weight_decay(model, 0.05)[0]["params"]}
    assert undecayed == {id(weight) for weight in model.parameters() if weight.ndim <= 1}
    return [{"params": [each], "lr": 3e-3, "weight_decay": 0.05 * (each.ndim > 1)} for each in weights]


def undecayed(model: nn.Module, weights: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": list(weights), "lr": 3e-3, "weight_decay": 0.0, "fused": True}]


def cosine(optimizer: Optimizer) -> Callable[[int], None]:
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * UPDATES)
    return lambda number: scheduler.step()


def of_timm(optimizer: Optimizer) -> Callable[[int], None]:
    options = {"num_epochs": EPOCHS, "warmup_epochs": 1, "warmup_lr": 1e-4, "warmup_prefix": True}
    scheduler, _ = create_scheduler_v2(optimizer, step_on_epochs=False, updates_per_epoch=UPDATES, **options)
    scheduler.step_update(0)
    return scheduler.step_update


def of_transformers(optimizer: Optimizer) -> Callable[[int], None]:
    from transformers import get_cosine_schedule_with_warmup

    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, EPOCHS * UPDATES)
    return lambda number: scheduler.step()


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def of_trainer(path: Path) -> dict[str, Tensor]:
    from transformers import ViTForImageClassification

    last = max(path.glob("checkpoint-*"), key=lambda each: int(each.name.rpartition("-")[2]))
    return ViTForImageClassification.from_pretrained(last).state_dict()  # type: ignore[no-any-return]


LOOPS = [
    Loop("plain", by_layer, cosine, "a.pt", lambda path: loaded(path)["learner"]["model"]),
    Loop("fabric", alike, cosine, "a.ckpt", lambda path: loaded(path)["learner"]["model"], "lightning_fabric"),
    Loop(
        "accelerate", alike, cosine, "a", lambda path: loaded(path / "custom_checkpoint_0.pkl")["model"], "accelerate"
    ),
    Loop(
        "timm",
        by_rank,
        of_timm,
        "a",
        lambda path: loaded(path / "last.pth.tar")["state_dict"],
        total=lambda shares: float(torch.stack(shares).sum()),
    ),
    Loop("trainer", undecayed, of_transformers, "a", of_trainer, "transformers"),
]
EACH = pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripts as they stand, on two updates an epoch; in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    digits = importlib.import_module("digits")
    train, test = digits.datasets()
    few = [TensorDataset(*(tensor[:count] for tensor in data.tensors)) for data, count in ((train, 128), (test, 16))]
    monkeypatch.setattr(digits, "datasets", lambda: few)
    yield digits
    for name in {"digits", *(f"loop_{loop.name}" for loop in LOOPS)}:
        sys.modules.pop(name, None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Batch], float]]:
    """What learners were given, in parts, and the task losses that they gave."""
    seen: list[tuple[list[Batch], float]] = []
    step, step_parts = LocalLearner.step, LocalLearner.step_parts

    def whole(self: LocalLearner, images: Any, labels: Any = None) -> Any:
        result = step(self, images, labels)
        if labels is not None:
            parts = list(zip(images.chunk(PARTS), labels.chunk(PARTS), strict=True))
            seen.append((parts, float(result.terms[-1]["task"])))
        return result

    def in_parts(self: LocalLearner, parts: Any, **more: Any) -> Any:
        results = step_parts(self, parts, **more)
        pairs = [tuple(part.values()) if isinstance(part, dict) else tuple(part) for part in parts]
        seen.append((pairs, sum(float(result.terms[-1]["task"]) for result in results)))
        return results

    monkeypatch.setattr(LocalLearner, "step", whole)
    monkeypatch.setattr(LocalLearner, "step_parts", in_parts)
    return seen


# Loops written out --------------------------------------------------------------------------------------------------


def updates_of(train: TensorDataset) -> list[list[Batch]]:
    """The batches of each update, in the order that scripts draw."""
    loader, found = DataLoader(train, BATCH, shuffle=True, drop_last=True), []
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        drawn = list(loader)
        found += [drawn[first : first + PARTS] for first in range(0, len(drawn), PARTS)]
    return found


def by_torch_alone(loop: Loop, model: nn.Module, updates: Sequence[Sequence[Batch]]) -> list[float]:
    """End to end, without localgrad: accumulation, clipping, optimizer and schedule as anybody writes them."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(loop.groups(model, weights))
    scheduled, losses = loop.schedule(optimizer), []
    model.train()
    for number, parts in enumerate(updates, 1):
        shares = []
        for images, labels in parts:
            output = model(images)
            share = cross_entropy(getattr(output, "logits", output), labels) / len(parts)
            share.backward()
            shares.append(share.detach())
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduled(number)
        losses.append(loop.total(shares))
    return losses


def by_steps(loop: Loop, model: nn.Module, updates: Sequence[Sequence[Batch]], seed: int) -> list[float]:
    """Two local modules by ``LocalLearner.step``, with a schedule for each module's own optimizer."""
    torch.manual_seed(seed)
    inputs, targets = zip(*([torch.cat(each) for each in zip(*parts, strict=True)] for parts in updates), strict=True)
    is_named = loop.name == "trainer"
    given = [{"pixel_values": images, "labels": labels} for images, labels in zip(inputs, targets, strict=True)]
    example = {"example": given[0]} if is_named else {}
    learner = LocalLearner(model, modules=2, clip_grad=1.0, accumulation=PARTS, **example)
    learner.configure_optimizers(lambda parameters: torch.optim.AdamW(loop.groups(model, parameters)))
    scheduled, losses = [loop.schedule(optimizer) for optimizer in learner.optimizers], []
    for number, (images, labels) in enumerate(zip(inputs, targets, strict=True), 1):
        result = learner.step(given[number - 1]) if is_named else learner.step(images, labels)
        losses.append(float(result.terms[-1]["task"]))
        for schedule in scheduled:
            schedule(number)
    return losses


class Stopped(BaseException):
    """What kills a loop in the middle."""


QUICK = {("plain", 1), ("timm", 2)}


def case(loop: Loop, modules: int) -> Any:
    marks = () if (loop.name, modules) in QUICK else pytest.mark.heavy
    return pytest.param(loop, modules, marks=marks, id=f"{loop.name} {modules}")


@pytest.mark.parametrize(("loop", "modules"), [case(loop, modules) for loop in LOOPS for modules in (1, 2)])
def test_a_loop_trains_what_is_written_out_here_and_goes_on_when_it_was_stopped(
    loop: Loop, modules: int, small: ModuleType, steps: list[tuple[list[Batch], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(loop.needs)
    script = importlib.import_module(f"loop_{loop.name}")
    script.main(EPOCHS, modules, loop.checkpoint)
    updates, losses = [list(each) for each in zip(*steps, strict=True)]
    trained = {name: value.clone() for name, value in loop.weights(Path(loop.checkpoint)).items()}

    # The same as the loop that is written out.
    seed, made = 0, small.vit
    if loop.name == "trainer":
        seed, made = 42, lambda: model_of(script)
    else:
        assert_same(updates, updates_of(small.datasets()[0]))
    model = made()
    expected = by_torch_alone(loop, model, updates) if modules == 1 else by_steps(loop, model, updates, seed)
    assert losses == expected if modules == 1 else losses == pytest.approx(expected, rel=1e-6)
    assert_same(trained, model.state_dict())
    assert losses[-1] < losses[0]

    # Stopped in its second epoch or right after it, and begun anew.
    steps.clear()
    with monkeypatch.context() as patched:
        patched.setattr("builtins.print", stopping)
        with pytest.raises(Stopped):
            script.main(EPOCHS, modules, f"b{loop.checkpoint}")
    steps.clear()
    script.main(EPOCHS, modules, f"b{loop.checkpoint}")
    again = [loss for _, loss in steps]
    assert 0 < len(again) < len(losses)
    assert again == losses[-len(again) :]
    assert_same(loop.weights(Path(f"b{loop.checkpoint}")), trained)


def stopping(*said: object, **options: Any) -> None:
    if any(line in str(said[0]) for line in ("epoch 1", "'epoch': '2'")):
        raise Stopped


def model_of(script: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    return script.ViTForImageClassification(script.ViTConfig(**sizes, **script.SIZES))  # type: ignore[no-any-return]


@pytest.mark.heavy  # two processes each
@EACH
def test_a_script_that_is_killed_goes_on_where_it_saved(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a person runs it: killed after its first epoch, run again, and compared with one that nobody killed."""
    pytest.importorskip(loop.needs)
    process = start_script(loop, tmp_path)
    assert process.stdout is not None
    lines = iter(process.stdout)
    assert any("epoch 0" in line or "'epoch': '1'" in line for line in lines)
    deadline = time.monotonic() + 60
    while loop.name == "trainer" and not list(tmp_path.glob("*/checkpoint-*/trainer_state.json")):  # it prints first
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = start_script(loop, tmp_path)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "epoch 0" not in said
    assert re.search(r"loss\W+\d\.\d", said)
    assert float(re.findall(r"accuracy\W+(\d\.\d+)", said)[-1]) > 0.4

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module(f"loop_{loop.name}")
    (saved,) = tmp_path.glob(f"loop_{loop.name}*")
    script.main(2, 2, f"whole-{saved.name}")
    for name in ("digits", script.__name__):
        sys.modules.pop(name)
    assert_same(loop.weights(saved), loop.weights(tmp_path / f"whole-{saved.name}"))


def start_script(loop: Loop, folder: Path) -> subprocess.Popen[str]:
    """Two epochs."""
    command = [sys.executable, "-u", str(EXAMPLES / f"loop_{loop.name}.py"), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# A task of timm's -------------------------------------------------------------------------------------------------


def task_of(**more: Any) -> Any:
    return timm_task.LocalTask(make_learner(**more), verbose=False)


def test_timms_loop_on_a_task_with_what_it_may_ask_for(tmp_path: Path) -> None:
    """Its average of weights, soft labels, a loss cut in place, a loss scale that is off; saved, and taken up."""
    task, plain = task_of(), make_learner()
    task.setup_ema(decay=0.9)
    scaler, off = NativeScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)
    scaler._scaler = off
    for number, (images, labels) in enumerate(batches(3, soft=True), 1):
        result = task(images, labels)
        loss = result["loss"]
        loss /= 2
        scaler(loss, task.learner.optimizer)
        task.learner.optimizer.zero_grad()
        task.update_ema(step=number)
        expected = plain.step(images, labels)
        assert torch.equal(2 * loss.detach(), expected.terms[-1]["task"])
        assert torch.equal(result["output"], expected.logits)
        assert [result[f"loss/module_{index}"] for index in range(3)] == list(expected.losses)
    assert_same(task.learner.state_dict(), plain.state_dict())
    saver = CheckpointSaver(
        task.get_trainable_module(), task.learner.optimizer, checkpoint_dir=str(tmp_path), task=task
    )
    saver.save_checkpoint(0, metric=1.0)
    other = task_of()
    other.setup_ema(decay=0.9)
    path = str(tmp_path / "last.pth.tar")
    assert resume_task_checkpoint(other, path, other.learner.optimizer, log_info=False) == 1
    load_task_ema_checkpoint(other, path)
    assert_same(other.learner.state_dict(), plain.state_dict())
    assert_same(other.get_trainable_module(ema=True).state_dict(), task.get_trainable_module(ema=True).state_dict())


def test_what_timms_loop_would_do_to_gradients_that_are_not_there_is_refused() -> None:
    task, (images, labels) = task_of(), batches(1)[0]
    task(images, labels)
    with pytest.raises(RecipeError, match=r"twice before one optimizer.step.*its grad-accum-steps.*accumulation=2"):
        task(images, labels)
    task.learner.optimizer.step()
    with pytest.raises(RecipeError, match=r"GradScaler called it.*precision='fp16'"):
        NativeScaler("cpu")(task(images, labels)["loss"], task.learner.optimizer)
    for call, words in (
        (task.get_clip_parameters, "clip-grad out, and its amp in float16.*clip_grad=1.0, precision='fp16'"),
        (task.prepare_distributed, "LocalTask trains in one process"),
        (task.compile, "leave the loop's torchcompile out.*compile=True"),
    ):
        with pytest.raises(RecipeError, match=words):
            call()
    with pytest.raises(CheckpointError, match=r"no task_state.*begin anew from its weights"):
        task.load_checkpoint_state(task.learner.model.state_dict())
    state = {**task.get_task_state(), "format": 2}
    with pytest.raises(CheckpointError, match="format is 2, written by a newer version"):
        task.load_task_state(state)
    with pytest.raises(CheckpointError, match="boundaries"):
        task_of(modules=2).load_task_state(task.get_task_state())


def test_an_older_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.task", None)
    monkeypatch.delitem(sys.modules, "localgrad.integrations.timm_task")
    with pytest.raises(ImportError, match=r"needs timm 1\.0\.27 or later"):
        importlib.import_module("localgrad.integrations.timm_task")


# Several processes ------------------------------------------------------------------------------------------------


def test_a_learner_beside_other_processes_is_refused_unless_it_is_to_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    learners = [make_learner(), make_learner(alone=True)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    before = copied(learners[0].model)
    batch = batches(1)[0]
    for call in (lambda: learners[0].step(*batch), lambda: learners[0].step_parts([batch])):
        with pytest.raises(ParallelError, match=r"2 processes.*ParallelLearner.*num_replicas=2.*alone=True"):
            call()
    assert_same(copied(learners[0].model), before)
    learners[1].step(*batch)
    localgrad.estimate(learners[0], 4)  # runs nothing that others could count on


@pytest.mark.heavy  # two processes each, of other libraries
@pytest.mark.parametrize("framework", ["accelerate", "fabric"])
def test_two_processes_of_a_framework_average_by_a_parallel_learner_and_not_in_silence(
    ranks: Ranks, framework: str
) -> None:
    pytest.importorskip("lightning_fabric" if framework == "fabric" else framework)
    ended = ranks.run([framework], size=2, call="loop_worker:main")
    assert ended.codes == [0, 0], ended.err
    for said in ended.out:
        assert "step: there are 2 processes, and LocalLearner averages no gradients" in said
    apart, moved = map(float, re.search(r"apart (\S+) moved (\S+)", ended.out[0]).groups())  # type: ignore[union-attr]
    assert apart < 1e-2 * moved
