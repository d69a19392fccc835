"""``localgrad plan --data FOLDER``: its classes, its size, and a plan that trains with the same data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from helpers import assert_refused

if TYPE_CHECKING:
    from helpers import Cli

MODEL = ["--model", "vit_tiny_patch16_224", "--img-size", "16", "--patch-size", "8"]
MODEL += ["--set", "model.options.depth=3", "--set", "model.options.embed_dim=24"]
CLASSES, IMAGES = 3, 20


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pets")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "eel")[:CLASSES]:
        (root / name).mkdir()
        for number in range(IMAGES):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_a_folders_classes_are_planned_for_and_the_plan_trains_with_it(pets: Path, cli_: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    arguments = [*MODEL, "--data", str(pets), "--batch-size", "8", "--budget", "1GiB", "--device", "cpu", "--no-cache"]
    said = cli_("plan", *arguments, "--gradients", "local", "--json", str(path))
    assert said.code == 0, said.err
    assert f"{CLASSES} classes" in said.out
    printed = "".join(said.out.split())
    assert f"localgradtrain--plan{path}--data{pets}" in printed, "however a terminal breaks the line"
    assert json.loads(path.read_text())["made_for"]["num_classes"] == CLASSES
    trained = cli_(
        "train", "--plan", str(path), "--data", str(pets), "--epochs", "1", "--device", "cpu",
        "--transform", "none", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert trained.code == 0, trained.err


def test_data_that_is_missing_is_refused(cli_: Cli, tmp_path: Path) -> None:
    said = cli_("plan", *MODEL, "--data", str(tmp_path / "none"), "--batch-size", "8", "--budget", "1GiB")
    assert_refused(said, "none")


@pytest.mark.heavy
def test_the_largest_batch_is_no_larger_than_the_data(pets: Path, cli_: Cli) -> None:
    said = cli_("plan", *MODEL, "--data", str(pets), "--batch-size", "auto", "--budget", "8GiB", "--device", "cpu")
    assert said.code == 0, said.err
    sizes = [int(found) for found in re.findall(r"^(?:end-to-end|local modules).*? (\d+) +█", said.out, re.MULTILINE)]
    assert sizes
    assert max(sizes) <= CLASSES * IMAGES
    assert "5 % left free" in said.out
