"""Plans at the command line and in runs: what is printed, what is refused, and what happens when memory runs out."""

from __future__ import annotations

import gc
import itertools
import json
import re
import shlex
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from helpers import MICRO_TOML, Cli, Recorder, assert_refused
from localgrad import LocalLearner, Plan, run
from localgrad.app import fitting
from localgrad.app.planned import PlannedData, laid_over, made_for, note_of_plan, task_of
from localgrad.app.recipe import Recipe, overlay, parse_toml
from localgrad.app.replanning import Replanner
from localgrad.errors import DeviceError, MemoryExceeded, RecipeError
from localgrad.estimating import estimate_step
from localgrad.memory.cards import CARDS
from localgrad.partition import Checkpointing
from localgrad.planning import budget as budgets
from localgrad.planning.budget import plan_to_budget
from localgrad.step.local_step import LocalStep
from localgrad.training.events import Replanned

pytestmark = pytest.mark.usefixtures("cost_cache")

SMALL = MICRO_TOML.replace("epochs = 2", "epochs = 1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a micro recipe outside it."""
    (tmp_path / "micro.toml").write_text(SMALL)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "here"


def recipe_of(**changes: Any) -> Recipe:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return Recipe.from_dict(overlay(parse_toml(SMALL, "micro"), changes))


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the micro recipe that cuts, recomputes and accumulates."""
    recipe = recipe_of()
    task = task_of(recipe, device="cpu", data=PlannedData(10, 1))
    plan = plan_to_budget(task, 16)
    plan = replace(
        plan,
        boundaries=(2,),
        checkpoint=(Checkpointing("blocks"), Checkpointing()),
        accumulation=2,
        made_for=made_for(recipe, task.backbone, "cpu"),
    )
    path = tmp_path_factory.mktemp("plan") / "my plan.json"
    path.write_text(plan.to_json())
    return path


def changed(plan_file: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    values = json.loads(plan_file.read_text())
    to.write_text(json.dumps(change(values) or values))
    return str(to)


# localgrad plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["80", pytest.param("200", marks=pytest.mark.heavy)])
def test_a_plan_is_printed_with_all_there_is_to_know(
    columns: str, here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    said = cli_("plan", "--recipe", "../micro.toml", "--modules", "2", "--budget", "700KiB", "--frontier")
    assert (said.code, said.err) == (0, "")
    words = ("2 local modules", "700 KiB", "fp32", "16x16", "10 classes", "batch 16", "adamw", "cpu", "x the time")
    words += ("Plans worth having", "x memory", "x time", "* sets the peak", "this plan", "recomputes", "█")
    words += ("weights", "optimizer", "gradients", "activations", "temporary", "inputs", "module 0", "module 1")
    words += ("end-to-end", "end-to-end, checkpoint blocks", "end-to-end, checkpoint halves/8")
    for word in words:
        assert word in " ".join(said.out.split()), (word, said.out)
    assert "…" not in said.out, "nothing is cut off"
    assert max(map(len, said.out.splitlines())) <= int(columns)
    assert list(here.iterdir()) == []


@pytest.mark.heavy
def test_a_plan_is_written_and_trained(here: Path, cli_: Cli) -> None:
    options = ("--recipe", "../micro.toml", "--modules", "2", "--budget", "600KiB", "--json", "a plan.json")
    said = cli_("plan", *options)
    assert said.code == 0, said.err
    assert "localgrad train --plan 'a plan.json'" in said.out
    plan = Plan.from_json(Path("a plan.json").read_text())
    assert plan.forecast.needed_bytes <= plan.forecast.budget_bytes == 600 * 1024
    assert plan.made_for["num_classes"] == 10
    assert plan.made_for["input_size"] == [1, 16, 16]
    said = cli_("train", "--plan", "a plan.json", "--epochs", "1", "--limit", "120", "--device", "cpu", "--out", "run")
    assert said.code == 0, said.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["plan"]["boundaries"] == list(plan.boundaries)
    assert summary["plan"]["checkpoint"] == [str(how) for how in plan.checkpoint]
    assert summary["estimated_peak_bytes"] == plan.forecast.peak_bytes


@pytest.mark.heavy
def test_a_plan_alone_says_how_to_train(plan_file: Path, here: Path, cli_: Cli) -> None:
    options = ("--plan", str(plan_file), "--epochs", "1", "--limit", "120", "--device", "cpu", "--out", "run")
    assert cli_("train", *options).code == 0
    written = Recipe.from_toml(Path("run/recipe.toml").read_text())
    assert written.method.local.modules == [2]
    assert written.execution.checkpoint == ["blocks", "none"]
    assert written.execution.accumulation == 2
    assert written.method.training.batch_size == 16
    assert written.method.model.options == parse_toml(SMALL, "")["model"]["options"]
    assert json.loads(Path("run/plan.json").read_text()) == json.loads(plan_file.read_text())
    Path("run/summary.json").unlink()
    said = cli_("train", "--resume", "run")
    assert said.code == 0, said.err
    assert json.loads(Path("run/summary.json").read_text())["plan"]["checkpoint"] == ["blocks", "none"]


def test_a_budget_is_trained_to(here: Path, cli_: Cli) -> None:
    said = cli_("train", "--recipe", "../micro.toml", "--budget", "1000KiB", "--out", "run")
    assert said.code == 0, said.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["estimated_peak_bytes"] <= 1000 * 1024 < summary["estimated_end_to_end_peak_bytes"]
    plan = Plan.from_json(Path("run/plan.json").read_text())
    written = Recipe.from_toml(Path("run/recipe.toml").read_text())
    assert written.method.local.modules == (list(plan.boundaries) or 1)
    assert written.execution.accumulation == plan.accumulation


@pytest.mark.heavy
def test_the_largest_batch_is_planned(here: Path, cli_: Cli) -> None:
    said = cli_(
        *("plan", "--recipe", "../micro.toml", "--modules", "1", "--batch-size", "auto", "--budget", "600KiB"),
        *("--json", "plan.json"),
    )
    assert said.code == 0, said.err
    plan = Plan.from_json(Path("plan.json").read_text())
    assert plan.forecast.needed_bytes <= 600 * 1024
    assert plan.accumulation == 1
    said = cli_("plan", "--recipe", "../micro.toml", "--batch-size", "auto", "--budget", "200KiB")
    assert said.code == 2
    assert "not even two images" in said.err


@pytest.mark.heavy
def test_the_largest_batch_of_every_method_is_printed(here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*budgets.RIVALS, "local modules, nothing recomputed", "local modules, any plan")
    rows = [budgets.LargestBatch(name, 2 + number, 1.5) for number, name in enumerate(names)]
    rows[0] = budgets.LargestBatch(names[0], 0)
    monkeypatch.setattr(budgets, "largest_batches", lambda *_: rows)
    said = cli_("plan", "--recipe", "../micro.toml", "--batch-size", "auto", "--budget", "1GiB")
    assert said.code == 0, said.err
    assert all(name in said.out for name in names)
    assert "batch 7," in said.out
    rows[-1] = budgets.LargestBatch(names[-1], 0)
    assert_refused(cli_("plan", "--batch-size", "auto", "--budget", "1GiB"), "--batch-size auto", "not even two images")


@pytest.mark.heavy
def test_data_decide_the_classes(here: Path, cli_: Cli) -> None:
    said = cli_("plan", "--recipe", "../micro.toml", "--batch-size", "4", "--modules", "1", "--device", "cpu")
    assert "10 classes" in said.out, "the recipe names them"
    said = cli_("plan", "--recipe", "../micro.toml", "--num-classes", "7", "--batch-size", "4", "--device", "cuda")
    assert "7 classes" in said.out
    assert re.search(r"needs \d{3} MiB", said.out), "there need be no GPU to plan for one: its context is counted"


PLAN_REFUSALS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--budget", "6 gigs"), ("--budget", "'6 gigs'", "6GiB")),
    (("--budget", "-1"), ("--budget", "'-1'")),
    (("--budget", "0"), ("--budget", "positive", "6GiB")),
    (("--budget", "1e3"), ("--budget", "'1e3'")),
    (("--budget", "6GiB6"), ("--budget", "'6GiB6'")),
    (("--budget", ""), ("--budget", "an empty text")),
    (("--budget", "9" * 400), ("--budget", "more memory than there is")),
    (("--budget", "1"), ("--budget 1B", "weights, optimizer state")),
    (("--batch-size", "many"), ("--batch-size", "'many'", "auto")),
    (("--batch-size", "0"), ("training.batch_size", "0")),
    (("--batch-size", "-5"), ("training.batch_size", "-5")),
    (("--batch-size", "1000000000000000000"), ("--batch-size", "131072")),
    (("--batch-size", "auto"), ("--batch-size auto", "--budget")),
    (("--num-classes", "1"), ("--num-classes", "at least 2")),
    (("--modules", "9"), ("--modules", "9 local modules", "1 to 3")),
    (("--modules", "9", "--budget", "1GiB"), ("--modules", "9 local modules", "1 to 3")),
    (("--modules", "0"), ("modules", "0")),
    (("--modules", "2,1"), ("--modules", "ascend")),
    (("--modules", "some"), ("--modules", "'some'")),
    (("--img-size", "17"), ("--img-size", "17", "16 or 18")),
    (("--device", "tpu"), ("--device", "'tpu'")),
    (("--precision", "fp64"), ("precision", "fp64")),
    (("--json", "."), ("--json", "is a folder")),
    (("--json", "no/folder.json"), ("--json", "there is no folder 'no'")),
    (("--set", "execution.accumulation=4"), ("--accumulation", "--budget")),
    (("--set", "execution.checkpoint=halves"), ("--checkpoint", "--budget")),
    (("--set", "execution.offload=true"), ("--offload",)),
    (("--set", "training.schedule=sequential"), ("--schedule sequential",)),
    (("--set", "local.modules=7"), ("7 local modules",)),
    (("--optimizer", "adamm"), ("--optimizer", "adamm")),
    (("--preset", "digits"), ("--preset digits doesn't go with --recipe",)),
]


@pytest.mark.few(9)
@pytest.mark.parametrize(("options", "words"), PLAN_REFUSALS, ids=[" ".join(o)[:40] for o, _ in PLAN_REFUSALS])
def test_impossible_plans_are_refused(options: tuple[str, ...], words: tuple[str, ...], here: Path, cli_: Cli) -> None:
    assert_refused(cli_("plan", "--recipe", "../micro.toml", *options), *words)
    assert list(here.iterdir()) == []


# train --plan, train --budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch-size", "32"), ("training.batch_size 16, here 32",)),
        (("--model", "vit_tiny_patch16_224"), ("model.name 'swin_tiny_patch4_window7_224', here 'vit_tiny_",)),
        (("--img-size", "32"), ("model.img_size 16, here 32",)),
        (("--drop-path", "0.2"), ("model.drop_path None, here 0.2",)),
        (("--optimizer", "sgd"), ("training.optimizer 'adamw', here 'sgd'",)),
        (("--precision", "bf16"), ("execution.precision 'fp32', here 'bf16'",)),
        (("--objective", "greedy"), ("local.objective 'feature', here 'greedy'",)),
        (("--modules", "3"), ("local.modules [2], here 3",)),
        (("--checkpoint", "halves"), ("--checkpoint halves doesn't go with --plan",)),
        (("--accumulation", "1"), ("execution.accumulation 2, here 1",)),
        (("--ema-decay", "0.9"), ("training.ema_decay None, here 0.9",)),
        (("--mixup", "0.8"), ("augment.mixup 0.0, here 0.8",)),
        (("--set", "training.freeze_from=0.5"), ("training.freeze_from None, here 0.5",)),
        (("--budget", "6GiB"), ("--budget 6GiB doesn't go with --plan",)),
        (("--offload",), ("--offload",)),
        (("--schedule", "sequential"), ("--schedule sequential",)),
        (("--on-oom", "pray"), ("--on-oom", "'pray'", "stop or replan")),
        (("--batch-size", "32", "--lr", "0.1", "--modules", "1"), ("batch_size 16, here 32; local.modules [2]",)),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_options_that_contradict_a_plan_are_refused(
    options: tuple[str, ...], words: tuple[str, ...], plan_file: Path, here: Path, cli_: Cli
) -> None:
    assert_refused(cli_("train", "--plan", str(plan_file), "--device", "cpu", *options), *words)
    assert list(here.iterdir()) == []


def test_a_plan_says_what_it_decides_over_a_recipe_file(plan_file: Path, here: Path, cli_: Cli, tmp_path: Path) -> None:
    same = cli_("train", "--plan", str(plan_file), "--recipe", "../micro.toml", "--dry-run")
    assert same.code == 0, same.err
    assert "decides" not in same.err
    wider = Recipe.from_toml((tmp_path / "micro.toml").read_text()).to_dict()
    wider = overlay(wider, {"training.batch_size": 48, "augment.mixup": 0.8, "local.modules": 3})
    (tmp_path / "wider.toml").write_text(Recipe.from_dict(wider).to_toml())
    old = changed(plan_file, tmp_path / "old.json", lambda plan: plan["made_for"].pop("augment.mixup") and None)
    for plan, mixup in ((str(plan_file), 0.0), (old, 0.8)):
        said = cli_("train", "--plan", plan, "--recipe", "../wider.toml", "--dry-run")
        assert said.code == 0, said.err
        assert "decides, over --recipe ../wider.toml: training.batch_size 16, not 48" in said.err
        assert ("augment.mixup 0.0, not 0.8" in said.err) == (mixup == 0)
        written = Recipe.from_toml(said.out)
        assert (written.method.training.batch_size, written.method.augment.mixup) == (16, mixup)


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "torch": (lambda plan: plan["made_for"]["versions"].update(torch="1.0"), ("torch '1.0', here '",)),
    "localgrad": (lambda plan: plan["made_for"]["versions"].pop("localgrad") and None, ("localgrad None, here '",)),
    "classes": (lambda plan: plan["made_for"].update(num_classes=7), ("num_classes 7, here 10", "--num-classes 10")),
    "size": (lambda plan: plan["made_for"].update(input_size=[1, 8, 8]), ("[8, 8], here [16, 16]", "--img-size 16")),
    "channels": (lambda plan: plan["made_for"].update(input_size=[3, 16, 16]), ("channels 3, here 1", "--data digits")),
    "bare": (lambda plan: plan.pop("made_for") and None, ("doesn't say model.name", "localgrad plan")),
    "blocks": (lambda plan: plan.update(num_blocks=7), ("7 blocks",)),
    "word": (lambda plan: plan.update(num_blocks="x"), ("not the JSON of a plan",)),
    "boundaries": (lambda plan: plan.update(boundaries=[5]), ("boundary 5",)),
    "infinite": (lambda plan: plan.update(accumulation=float("inf")), ("not the JSON of a plan",)),
    "zero": (lambda plan: plan.update(accumulation=0), ("accumulation",)),
    "ways": (lambda plan: plan.update(checkpoint=["none"]), ("checkpoint has 1 entries for 2",)),
    "way": (lambda plan: plan.update(checkpoint=["none", "all"]), ("'all'",)),
    "newer": (lambda plan: plan.update(format=3), ("format is 3", "reads up to 2", "pip install --upgrade")),
    "format": (lambda plan: plan.update(format="x"), ("format is 'x'",)),
    "forecast": (lambda plan: plan["forecast"].pop("peak_bytes") and None, ("forecast.peak_bytes", "localgrad plan")),
    "figure": (lambda plan: plan["forecast"]["modules"][0].update(num_blocks="x"), ("forecast.modules.0.num_blocks",)),
    "key": (lambda plan: plan.update(colour="red"), ("unknown key 'colour'",)),
    "list": (lambda plan: [plan], ("--plan",)),
    "made for": (lambda plan: plan.update(made_for="ab"), ("not the JSON of a plan",)),
    "batch": (lambda plan: plan["made_for"].update({"training.batch_size": "x"}), ("batch_size",)),
}


@pytest.mark.few(10)
@pytest.mark.parametrize("name", DAMAGED)
def test_plans_of_something_else_are_refused(name: str, plan_file: Path, here: Path, cli_: Cli, tmp_path: Path) -> None:
    change, words = DAMAGED[name]
    path = changed(plan_file, tmp_path / "other.json", change)
    assert_refused(cli_("train", "--plan", path, "--limit", "120", "--device", "cpu"), *words)
    assert list(here.iterdir()) == []


def test_plans_that_cannot_be_read_are_refused(here: Path, cli_: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "half.json").write_text('{"model": "vit')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.json", "half.json", "binary.json", "gone.json", "."):
        assert_refused(cli_("train", "--plan", f"../{name}"), "--plan", name)
    assert list(here.iterdir()) == []


def test_a_plan_for_another_card_says_so(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.from_json(plan_file.read_text())
    assert plan.forecast is not None
    plan = replace(plan, forecast=replace(plan.forecast, card=str(CARDS["A100-40GB"])))
    plan = replace(plan, made_for={**plan.made_for, "device": "cuda"})
    recipe = laid_over(plan, recipe_of())
    for name, differs in (("A100-40GB", False), ("A100-80GB", False), ("RTX 4060", True), ("H100", True)):
        here = replace(CARDS[name], name=f"NVIDIA {name}")
        monkeypatch.setattr("localgrad.app.planned.card_here", lambda _, here=here: here)
        note = note_of_plan(plan, recipe, torch.device("cuda"))
        assert (note is not None) == differs, note
        assert not differs or f"compute capability 8.0), here NVIDIA {name} (" in str(note)


@pytest.mark.heavy
def test_a_plan_for_a_gpu_can_be_trained_without_one(
    plan_file: Path, here: Path, cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(plan_file, tmp_path / "cuda.json", lambda plan: plan["made_for"].update(device="cuda"))
    options = ("--plan", path, "--limit", "120", "--epochs", "1", "--device", "cpu", "--out", "run")
    said = cli_("train", *options)
    assert said.code == 0
    assert "plan: made for device 'cuda', here 'cpu': its forecast isn't one of this run" in " ".join(said.out.split())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(cli_("train", "--plan", path, "--device", "cuda"), "no CUDA GPU")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--checkpoint", "halves"), ("--checkpoint halves doesn't go with --budget",)),
        (("--accumulation", "2"), ("--accumulation 2 doesn't go with --budget",)),
        (("--offload",), ("--offload", "--budget")),
        (("--schedule", "sequential"), ("--schedule sequential",)),
        (("--budget", "100KiB"), ("--budget", "weights, optimizer state", "larger budget")),
        (("--budget", "six"), ("--budget", "'six'")),
        (("--modules", "9"), ("9 local modules",)),
        (("--resume", "run"), ("--budget 6GiB doesn't go with --resume",)),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_options_that_contradict_a_budget_are_refused(
    options: tuple[str, ...], words: tuple[str, ...], here: Path, cli_: Cli
) -> None:
    recipe = () if "--resume" in options else ("--recipe", "../micro.toml")
    assert_refused(cli_("train", *recipe, "--budget", "6GiB", *options), *words)
    assert list(here.iterdir()) == []


def test_modules_of_their_own_need_a_budget(here: Path, cli_: Cli) -> None:
    assert_refused(cli_("train", "--recipe", "../micro.toml", "--modules", "auto"), "--modules auto", "--budget")


# When memory runs out --------------------------------------------------------------------------------------------


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of ...")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")


class Shortage:
    """Memory runs out in the step of a module, counted over all modules from 1.

    Args:
        call: which step.
        where: ``backward`` (all is computed, gradients and statistics are there), ``update``, ``recompute``.
        error: what the allocator says.
        times: how often the same step fails.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        call: int,
        where: str = "backward",
        error: Exception = GPU,
        times: int = 1,
    ) -> None:
        self.call, self.left, self.count, self.again, self.due = call, times, 0, False, False
        self.alive: list[weakref.ref[Tensor]] = []
        self.error = error
        step, backward, adamw = LocalStep.__call__, LocalStep._once, torch.optim.AdamW.step
        block = timm.models.resnet.BasicBlock.forward

        def called(this: LocalStep, *arguments: Any) -> Any:
            if isinstance(arguments[0], FakeTensor):  # an estimate
                return step(this, *arguments)
            self.count += not self.again
            self.again = False
            self.due = self.count == self.call and self.left > 0
            if self.left < times and self.count == self.call:
                assert [ref for ref in self.alive if ref() is not None] == [], "memory of the failed try is free"
            return step(this, *arguments)

        def ran(this: LocalStep, inputs: Tensor, *arguments: Any) -> Any:
            output = backward(this, inputs, *arguments)
            if where == "backward":
                self.fail(output.features)
            return output

        def updated(this: Any, *arguments: Any, **options: Any) -> Any:
            if where == "update":
                self.fail(this.param_groups[0]["params"][0])
            return adamw(this, *arguments, **options)

        def recomputed(this: nn.Module, inputs: Tensor) -> Tensor:
            if isinstance(inputs, FakeTensor):
                return block(this, inputs)
            if where == "recompute" and torch._C._current_graph_task_id() != -1:
                self.fail(inputs)
            result: Tensor = block(this, inputs)
            self.alive += [weakref.ref(result)] if self.due else []
            return result

        monkeypatch.setattr(LocalStep, "__call__", called)
        monkeypatch.setattr(LocalStep, "_once", ran)
        monkeypatch.setattr(torch.optim.AdamW, "step", updated)
        monkeypatch.setattr(timm.models.resnet.BasicBlock, "forward", recomputed)

    def fail(self, tensor: Tensor | None = None) -> None:
        if self.due and not isinstance(tensor, FakeTensor):
            self.due, self.again, self.left = False, True, self.left - 1
            raise type(self.error)(str(self.error))


def resnet() -> LocalLearner:
    """With dropout and batch norms: a step draws numbers and moves statistics."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, drop_rate=0.2, drop_path_rate=0.2)
    learner = LocalLearner(model, modules=2, input_size=(3, 32, 32), checkpoint="blocks", clip_grad=1.0)
    learner.configure_optimizers(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    return learner


def train(learner: LocalLearner) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(7)
    for _ in range(3):
        learner.step(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3]))
    found = dict(learner.model.state_dict())
    return found | {f"objective.{key}": value for key, value in learner.modules[0].objective.state_dict().items()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("where", "error", "times"),
    [("backward", GPU, 1), ("backward", CPU, 2), ("recompute", GPU, 1)],
    ids=["backward", "processor, twice", "recompute"],
)
def test_a_step_that_ran_out_of_memory_is_run_again_as_if_nothing_had_been(
    where: str, error: Exception, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(resnet())
    shortage = Shortage(monkeypatch, 4, where, error, times)  # the second module of the second batch
    learner = resnet()
    asked: list[int] = []

    def recover(module: int) -> bool:
        asked.append(module)
        assert [ref for ref in shortage.alive if ref() is not None] == [], "free before anything is asked"
        assert all(parameter.grad is None for parameter in learner.model.parameters()), "gradients too"
        torch.rand(5)  # planning may draw numbers
        ways = (Checkpointing("blocks"), Checkpointing("blocks" if len(asked) > 1 else "none"))
        learner.run_as(replace(learner.plan, checkpoint=ways))
        return True

    learner.on_out_of_memory(recover)
    gc.disable()  # memory is free at once, not when the collector comes by
    try:
        found = train(learner)
    finally:
        gc.enable()
    assert asked == [1] * times
    assert shortage.alive or where == "backward"
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert int(found["bn1.num_batches_tracked"]) == 3


@pytest.mark.heavy
def test_an_update_that_ran_out_of_memory_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Shortage(monkeypatch, 4, "update")
    learner = resnet()
    asked: list[int] = []
    learner.on_out_of_memory(lambda module: not asked.append(module))  # type: ignore[func-returns-value]
    with pytest.raises(MemoryExceeded) as caught:
        train(learner)
    assert (caught.value.place, asked) == (1, []), "weights may have been changed in part"
    assert all(parameter.grad is None for parameter in learner.parameters(1)), "whoever goes on starts from none"
    Shortage(monkeypatch, 1, "backward")
    learner.on_out_of_memory(lambda module: not asked.append(module))  # type: ignore[func-returns-value]
    train(learner)
    assert asked == [0], "an earlier update's failure is forgotten"


@pytest.mark.heavy
def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    Shortage(monkeypatch, 1, error=RuntimeError("shapes don't match"))
    learner = resnet()
    learner.on_out_of_memory(lambda _: True)
    with pytest.raises(RuntimeError, match="shapes don't match"):
        train(learner)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run.train(recipe_of(), out=folder)
    return load_file(folder / "model.safetensors")


def assert_near(folder: Path, expected: dict[str, Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.heavy
def test_a_run_that_ran_out_of_memory_says_what_to_type(
    here: Path, cli_: Cli, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Shortage(patch, 4, error=CPU)
        said = cli_("train", "--recipe", "../micro.toml", "--out", "a run")
    assert_refused(said, "memory ran out in local module 1 (", "planned ", "observed ", "--resume 'a run'")
    command = said.err.split("go on with ")[1].split(" (or ")[0]
    assert "--on-oom replan" in said.err
    resumed = cli_("train", *shlex.split(command))
    assert resumed.code == 0, resumed.err
    assert_near(Path("a run"), uninterrupted)


@pytest.mark.heavy
def test_a_run_replans_and_goes_on(
    here: Path, cli_: Cli, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Shortage(patch, 3, times=2)
        said = cli_("train", "--recipe", "../micro.toml", "--out", "run", "--on-oom", "replan")
    assert said.code == 0, said.err
    assert said.out.count("memory ran out in local module 0; going on with checkpoint") == 2
    assert_near(Path("run"), uninterrupted)
    written = Recipe.from_toml(Path("run/recipe.toml").read_text())
    summary = json.loads(Path("run/summary.json").read_text())
    assert written.execution.checkpoint == summary["plan"]["checkpoint"]
    assert (written.execution.checkpoint, written.execution.accumulation) != ("none", 1)
    assert written.method == replace(
        recipe_of().method, local=replace(recipe_of().method.local, modules=summary["plan"]["boundaries"])
    ), "the method is the run's own"


@pytest.mark.heavy
def test_a_run_that_always_runs_out_ends(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Shortage(patch, 4, times=10**6)
        sink = Recorder()
        with pytest.raises(DeviceError, match="nothing with these boundaries needs less") as caught:
            run.train(recipe_of(), out=here / "run", sinks=[sink], on_oom="replan")
    peaks = [event.peak_bytes for event in sink.events if isinstance(event, Replanned)]
    assert peaks
    assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(peaks))
    assert "memory ran out in local module 1" in str(caught.value)


@pytest.mark.heavy
def test_a_run_that_no_planner_plans_says_what_needs_less(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that nothing does."""
    recipe = recipe_of()
    recipe = replace(recipe, execution=replace(recipe.execution, offload=True))
    with monkeypatch.context() as patch:
        Shortage(patch, 4, times=10**6)
        with pytest.raises(
            DeviceError, match=r"no other plan was looked for .*offload.* accumulation=2 or checkpoint="
        ):
            run.train(recipe, out=here / "run", on_oom="replan")


def test_a_run_within_a_budget_evaluates_within_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors, too."""
    sizes: list[int] = []
    monkeypatch.setattr(fitting, "evaluation_batch", lambda *_: 2)
    read = LocalLearner.logits
    monkeypatch.setattr(LocalLearner, "logits", lambda own, images: sizes.append(len(images)) or read(own, images))
    run.train(recipe_of(), out=here / "run", budget="1GiB")
    assert max(sizes) == 2


@pytest.mark.heavy
def test_memory_that_runs_out_elsewhere_is_told(here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(_: Any) -> Any:
        raise CPU

    monkeypatch.setattr("localgrad.training.trainer.Trainer._validate", validate)
    said = cli_("train", "--recipe", "../micro.toml", "--out", "run")
    assert_refused(said, "memory ran out in validation", "--resume run --on-oom replan")


@pytest.mark.heavy
@pytest.mark.parametrize("accumulation", [1, 2])
def test_replanning_keeps_the_parts_that_contrastive_terms_see(accumulation: int) -> None:
    job = run.build(recipe_of(local__objective="contrastive", execution__accumulation=accumulation))
    profile = estimate_step(job.learner, 16, job.optimizer)
    plan = Replanner(job, profile, lambda: {"measured_peak_bytes": 0, "measured_peak_of": ""}).next_plan()
    assert plan is not None
    assert plan.accumulation == accumulation


def test_a_budget_of_nothing_is_refused_not_forgotten(here: Path) -> None:
    with pytest.raises(RecipeError, match="budget: memory must be positive, got 0"):
        run.train(recipe_of(), out=here / "run", budget=0)
    assert not (here / "run").exists()
