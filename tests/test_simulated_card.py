"""Every CUDA path, on a card that is simulated: the allocator, checks and streams are PyTorch's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from helpers import MICRO, MICRO_TOML, Said, assert_refused, assert_same_run, metrics_of
from localgrad.app.recipe import Recipe, overlay
from localgrad.memory.cards import card_named

if TYPE_CHECKING:
    from simulated import SimulatedCard

MIB = 1 << 20
RECIPE = (
    MICRO_TOML.replace("limit = 120", "limit = 32\nval_fraction = 0.02").replace("batch_size = 16", "batch_size = 8")
).replace('"cpu"', '"cuda"')

FACTS = """
import json, torch
from research.simulated_card import inside

facts = {"available": torch.cuda.is_available(), "devices": torch.cuda.device_count()}
properties = torch.cuda.get_device_properties(0)
facts |= {"name": properties.name, "total": properties.total_memory}
facts |= {"multiprocessors": properties.multi_processor_count, "capability": torch.cuda.get_device_capability()}
facts["free"] = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
held = torch.ones(1 << 20, device="cuda:1")
facts["taken"] = [before - torch.cuda.mem_get_info(index)[0] for index, before in enumerate(facts["free"])]
facts["reserved"] = [torch.cuda.memory_reserved(index) for index in range(2)]
facts["sum"] = (held @ held).item(), held.device.index
try:
    held + torch.ones(1 << 20, device="cuda:0")
except RuntimeError as error:
    facts["refused"] = str(error)
try:
    torch.empty(1 << 30, device="cuda:0")
except torch.OutOfMemoryError as error:
    facts["full"] = type(error).__name__
torch.manual_seed(0)
facts["drawn"] = [torch.randn(3, device=f"cuda:{index}").tolist() for index in range(2)]
inside.reset()
held.mul_(2)
facts["counts"] = inside.counts()
print(json.dumps(facts))
"""


VERBS = """
import gc, json, sys, torch
from pathlib import Path
from localgrad import cli

torch.cuda.init()
calls = []
for arguments in json.loads(sys.argv[1]):
    gc.collect()
    torch.cuda.empty_cache()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    sys.argv, code = ["localgrad", *arguments], 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    peaks = [torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())]
    calls.append({"code": code, "peaks": peaks})
Path("calls.json").write_text(json.dumps(calls))
"""
"""Several command lines in one process: what takes longest is to start one."""


STOPPED = """
import signal
from localgrad import run
from localgrad.app.recipe import as_recipe, overlay
from localgrad.training.trainer import EpochSums, Interrupted

changes = {"model.drop_path": 0.2, "augment.mixup": 0.4, "training.clip_grad": 1.0, "execution.precision": "fp16"}
recipe = as_recipe(overlay(as_recipe("recipe.toml").to_dict(), changes))
run.train(recipe, out="whole")
add, count = EpochSums.add, 0

def stopping(self, *arguments):
    global count
    count += 1
    if count == 6:
        signal.raise_signal(signal.SIGTERM)
    add(self, *arguments)

EpochSums.add = stopping
try:
    run.train(recipe, out="stopped")
except Interrupted:
    run.resume("stopped")
else:
    raise SystemExit("it was not stopped")
"""


class Called(NamedTuple):
    """What a command line left: its exit status, and the peak of each device."""

    code: int
    peaks: list[int]


def calls_of(folder: Path) -> list[Called]:
    return [Called(**each) for each in json.loads((folder / "calls.json").read_text())]


def call(simulated: SimulatedCard, folder: Path, *lines: str, recipe: str = RECIPE, **card: Any) -> list[Called]:
    """Run command lines, one after another, on simulated cards with values; each must end well."""
    (folder / "recipe.toml").write_text(recipe)
    arguments = json.dumps([line.split() for line in lines])
    said = simulated.run(VERBS, arguments, folder=folder, **({"values": True} | card))
    calls = calls_of(folder)
    assert [each.code for each in calls] == [0] * len(lines), said
    return calls


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


class Found(NamedTuple):
    """What a process said and left; one process, as what takes longest is to start one."""

    facts: Any
    calls: list[Called]
    losses: Any
    folder: Path


@pytest.fixture(scope="module")
def found(simulated: SimulatedCard, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Of three scripts, one after the other: facts, a run that is trained and evaluated, and losses."""
    folder = tmp_path_factory.mktemp("card")
    settings = overlay(MICRO, {"training.epochs": 1, "data.limit": 32, "data.val_fraction": 0.02})
    (folder / "recipe.toml").write_text(Recipe.from_dict(settings).to_toml())
    lines = "train --recipe recipe.toml --out run --device cuda:1", "evaluate run --device cuda:1"
    options = {"card": card_named("T4"), "total_bytes": 600 * MIB, "taken_bytes": 88 * MIB, "devices": 2}
    verbs = json.dumps([line.split() for line in lines])
    code = f"{FACTS}del held\n{VERBS}sys.argv = ['', 'vit']\n{LOSSES}"
    said = simulated.run(code, verbs, folder=folder, values=True, **options).splitlines()
    return Found(json.loads(said[0]), calls_of(folder), json.loads(said[-1]), folder)


def test_the_simulated_card_is_what_it_says(found: Found) -> None:
    card, facts = card_named("T4"), found.facts
    assert facts["available"]
    assert facts["devices"] == 2
    assert (facts["name"], facts["total"]) == ("T4", 600 * MIB)
    assert facts["multiprocessors"] == card.multiprocessors
    assert facts["capability"] == list(card.capability)
    assert facts["free"] == [512 * MIB, 512 * MIB]
    assert facts["taken"] == [0, 20 * MIB]  # each device has memory of its own; 20 MiB is what the allocator asks for
    assert facts["reserved"] == [0, 20 * MIB]
    assert facts["sum"] == [float(1 << 20), 1]
    assert "two devices" in facts["refused"] or "same device" in facts["refused"]
    assert facts["full"] == "OutOfMemoryError"
    assert facts["drawn"][0] == facts["drawn"][1]  # one seed for all devices, as CUDA has it
    assert facts["counts"]["launches"] == 1


LOSSES = """
import json, sys, torch
from localgrad import LocalLearner
from tests.helpers import SIZE, adamw, batches, make

losses = {}
kinds = {"vit": {}, "swin": {"depths": (2, 1, 1), "drop_path_rate": 0.0}}
for kind in sys.argv[1:]:
    learners = {}
    for device in "cpu", "cuda":
        torch.manual_seed(1)
        learners[device] = LocalLearner(make(kind, **kinds[kind]).to(device), modules=4, input_size=SIZE)
    for ours, theirs in zip(learners["cuda"].modules, learners["cpu"].modules, strict=True):
        ours.load_state_dict(theirs.state_dict())
    for device, learner in learners.items():
        learner.configure_optimizers(adamw)
        losses[f"{kind} {device}"] = [
            [loss.item() for loss in learner.step(images.to(device), labels.to(device)).losses]
            for images, labels in batches(10)
        ]
print(json.dumps(losses))
"""


def test_ten_steps_of_four_modules_have_the_losses_of_the_processor(found: Found) -> None:
    assert_losses("vit", found.losses)


@pytest.mark.heavy
def test_ten_steps_of_a_swin_have_the_losses_of_the_processor(simulated: SimulatedCard) -> None:
    assert_losses("swin", json.loads(simulated.run(LOSSES, "swin", values=True).splitlines()[-1]))


def assert_losses(kind: str, losses: Any) -> None:
    ours, theirs = (torch.tensor(losses[f"{kind} {device}"]) for device in ("cuda", "cpu"))
    assert ours.shape == (10, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs[0] != theirs[9]).all()


def assert_measured(folder: Path, peak: int, name: str = "Simulated card") -> None:
    summary = summary_of(folder)
    assert summary["device"] == name
    # That is before the test: its batches are such that it needs no more.
    assert 0 < summary["measured_peak_bytes"] <= summary["measured_reserved_bytes"]
    assert peak == summary["measured_peak_bytes"]


def test_a_run_is_trained_and_evaluated(found: Found) -> None:
    assert [each.code for each in found.calls] == [0, 0]
    assert_measured(found.folder / "run", found.calls[0].peaks[1], "T4")
    assert found.calls[0].peaks[0] == 0, "all of it is on the device that was named"


@pytest.mark.heavy
def test_train_evaluate_plan_and_train_again(simulated: SimulatedCard, tmp_path: Path) -> None:
    calls = call(
        simulated,
        tmp_path,
        "train --recipe recipe.toml --out run",
        "evaluate run",
        "plan --recipe recipe.toml --data digits --budget 800MiB --json plan.json --device cuda",
        "train --recipe recipe.toml --plan plan.json --out planned --epochs 1",
    )
    assert_measured(tmp_path / "run", calls[0].peaks[0])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["made_for"]["device"] == "cuda"
    assert plan["forecast"]["is_confirmed"]
    assert summary_of(tmp_path / "planned")["measured_reserved_bytes"] <= plan["forecast"]["available_bytes"]


@pytest.mark.heavy
def test_a_run_that_was_stopped_goes_on_bit_for_bit(simulated: SimulatedCard, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    simulated.run(STOPPED, folder=tmp_path, values=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.heavy
def test_every_way_of_running_a_step(simulated: SimulatedCard, tmp_path: Path) -> None:
    common = "train --recipe recipe.toml --epochs 1 --out"
    calls = call(
        simulated,
        tmp_path,
        f"{common} second --device cuda:1 --global-every 2 --ema-decay 0.9 --mixup 0.4 --precision bf16",
        f"{common} fp16 --precision fp16 --clip-grad 1",
        f"{common} offload --offload --health 1",
        f"{common} sequential --schedule sequential --checkpoint halves/2 --accumulation 2",
        devices=2,
    )
    lines = metrics_of(tmp_path / "offload")
    assert {"gradient_cosine", "linear_probe_accuracy"} <= set(lines[-1]["health"][-1])
    # The first, as cuBLAS keeps its workspaces on a device that was used: all of it is on the one that was named.
    assert [bool(peak) for peak in calls[0].peaks] == [False, True]
    assert all(each.peaks[0] for each in calls[1:])


@pytest.mark.heavy
def test_comparing_measures_allocated_and_reserved_bytes(simulated: SimulatedCard, tmp_path: Path) -> None:
    line = "compare --model vit_tiny_patch16_224 --img-size 32 --batch-size 2 --modules 2 --repeats 1 --warmup 0"
    call(simulated, tmp_path, f"{line} --json compare.json", values=True)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert len(found["rows"]) > 1
    assert all(
        row["reserved_peak_bytes"] >= row["measured_peak_bytes"] > 0 for row in found["rows"] if not row["error"]
    )


CROWDED = RECIPE.replace('"swin_tiny_patch4_window7_224"', '"vit_tiny_patch16_224"')
CROWDED = (
    CROWDED[: CROWDED.index("img_size")]
    + "img_size = 224\noptions = { depth = 4 }\n"
    + CROWDED[CROWDED.index("[local]") :]
)
CROWDED = CROWDED.replace("batch_size = 8", "batch_size = 32").replace("epochs = 2", "epochs = 1")
LIMIT = 1_200_000
"""Elements of the largest tensor that has values: activations of 32 images of 224 px have none, and cost nothing."""


@pytest.mark.heavy
def test_a_run_on_a_full_card_stops_in_one_line_or_goes_on_with_less(simulated: SimulatedCard, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(CROWDED)
    card = {"total_bytes": 310 * MIB, "values": LIMIT, "folder": tmp_path}
    train = ("train", "--recipe", "recipe.toml", "--out")
    stopped = simulated.localgrad(*train, "stopped", **card)
    ours = "".join(line for line in stopped.err.splitlines(keepends=True) if line.startswith("localgrad:"))
    assert "Traceback" not in stopped.err  # PyTorch itself warns of what it couldn't map
    refused = Said(stopped.code, stopped.out, ours)
    assert_refused(refused, "memory ran out in local module 0", "planned ", "reserved by the allocator: ")
    went_on = simulated.localgrad(*train, "run", "--on-oom", "replan", **card)
    assert went_on.code == 0, went_on.err
    assert "memory ran out in local module 0; going on with checkpoint" in went_on.out
    summary = summary_of(tmp_path / "run")
    assert summary["measured_reserved_bytes"] <= card["total_bytes"]
    evaluated = simulated.localgrad("evaluate", "run", **(card | {"total_bytes": 130 * MIB}))
    assert evaluated.code == 0, evaluated.err
    assert "memory ran out in the evaluation; going on with" in evaluated.err
