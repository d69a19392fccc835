"""The examples run as they stand, name public things only, and are plugins for the command line."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import localgrad
from helpers import Cli
from localgrad.backbones.base import BACKBONES
from localgrad.objectives.auxiliary import CLASSIFIERS, DECODERS
from localgrad.objectives.methods import OBJECTIVES
from localgrad.training.events import SINKS

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LINES = 59
SHORT = {"language_model": ("3",), "finetune": ("1", "freeze")}
"""What is typed behind the name, to be quick."""
OF_LOOPS = {"digits", *(path.stem for path in EXAMPLES if path.stem.startswith("loop_"))}
"""These, and what they share, are run by test_loops.py."""
SMALL = ["--limit", "100", "--epochs", "1", "--batch-size", "20", "--num-threads", "1", "--device", "cpu"]
VIT = ["--model", "vit_tiny_patch16_224", "--img-size", "8", "--patch-size", "2", "--modules", "2"]
OPTIONS = ["--set", "model.options={embed_dim=32, depth=2, num_heads=2}"]


REGISTRIES = (OBJECTIVES, DECODERS, CLASSIFIERS, BACKBONES, SINKS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with copies of the examples, from which they are imported anew; nothing stays registered."""
    for path in EXAMPLES:
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_known", dict(registry._known))
    built_in = [dict(registry._known) for registry in REGISTRIES]
    yield tmp_path
    forget(built_in)


def forget(built_in: list[dict]) -> None:
    """Be as another process is, which knows no plugin."""
    for registry, names in zip(REGISTRIES, built_in, strict=True):
        registry._known = dict(names)
    for path in EXAMPLES:
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_takes_public_names_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(not alias.name.startswith("localgrad.") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not re.match(r"localgrad\b(?!\.integrations\.)", str(node.module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "localgrad":
            assert node.attr in localgrad.__all__


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.heavy] if path.stem in SHORT else [], id=path.stem)
        for path in EXAMPLES
        if path.stem not in OF_LOOPS
    ],
)
def test_an_example_runs(
    path: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", [path.name, *SHORT.get(path.stem, ())])
    runpy.run_path(str(here / path.name), run_name="__main__")
    said = capsys.readouterr().out
    prints = {"own_term": "sparsity", "own_sink": "written: ", "finetune": r"freeze +\d"}
    assert re.search(prints.get(path.stem, r"\d\.\d\d"), said)


@pytest.mark.heavy
def test_fine_tuning_beats_training_from_scratch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(here / "finetune.py"), run_name="finetune")["main"]()
    found = dict(re.findall(r"^(\S+|from scratch) +(\d+\.\d)%", capsys.readouterr().out, re.MULTILINE))
    accuracy = {name: float(value) for name, value in found.items()}
    for method in ("full", "freeze", "lora", "local"):
        assert accuracy[method] > accuracy["from scratch"] + 5, method


@pytest.mark.heavy
def test_a_run_of_a_plugins_objective_knows_its_plugin(here: Path, cli_: Cli) -> None:
    built_in = [dict(registry._known) for registry in REGISTRIES]
    said = cli_("train", "--plugin", "own_term", "--objective", "sparse", *SMALL, *VIT, *OPTIONS, "--out", "run")
    assert said.code == 0, said.err
    assert "sparsity" in json.loads((here / "run/metrics.jsonl").read_text().splitlines()[-1])["losses"][0]
    for verb in (("evaluate", "run"), ("train", "--resume", "run")):
        forget(built_in)
        said = cli_(*verb)
        assert said.code == 0, said.err
        assert "test accuracy" in said.out
    assert "own_term" in sys.modules


def test_a_plugins_decoder_backbone_and_sink_by_name(here: Path, cli_: Cli) -> None:
    built_in = [dict(registry._known) for registry in REGISTRIES]
    plugins = ["--plugin", "own_decoder", "--plugin", "own_backbone", "--plugin", "own_sink"]
    names = [*plugins, "--decoder", "mlp", "--model", "patches", "--sink", "csv"]
    said = cli_("train", *names, "--img-size", "8", "--modules", "2", *SMALL, "--out", "run")
    assert said.code == 0, said.err
    assert (here / "run/accuracy.csv").read_text().startswith("epoch,accuracy,learning rate\n0,")
    assert not (here / "run/tensorboard").exists()
    assert "patches on digits" in said.out
    forget(built_in)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(here / "black.png")
    said = cli_("predict", "run", "black.png")
    assert said.code == 0, said.err
    assert said.out.startswith("black.png")


@pytest.mark.heavy  # three processes start
def test_two_processes_load_plugins_as_well(here: Path) -> None:
    parallel = ["--parallel", "modules", "--num-processes", "2", "--modules", "2", "--out", "run"]
    plugins = ["--plugin", "own_term", "--plugin", "own_backbone", "--model", "patches", "--img-size", "8"]
    command = [sys.executable, "-m", "localgrad", "train", *plugins, "--objective", "sparse", *SMALL, *parallel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "sparsity" in json.loads((here / "run/metrics.jsonl").read_text().splitlines()[-1])["losses"][0]


@pytest.mark.heavy
def test_a_plan_of_a_plugins_backbone_trains(here: Path, cli_: Cli) -> None:
    names = ["--plugin", "own_backbone", "--model", "patches", "--img-size", "8", "--data", "digits"]
    said = cli_("plan", *names, "--batch-size", "20", "--budget", "2MiB", "--json", "plan.json", "--no-cache")
    assert said.code == 0, said.err
    said = cli_("train", "--plan", "plan.json", "--limit", "60", "--epochs", "1", "--device", "cpu", "--out", "run")
    assert said.code == 0, said.err
    assert "own_backbone" in (here / "run/recipe.toml").read_text()
