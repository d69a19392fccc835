"""The long run on a GPU, to its last step, on a simulated card: cells, a stop in the middle, resuming, the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from localgrad.memory.cards import card_named

if TYPE_CHECKING:
    from simulated import SimulatedCard

TESTS = Path(__file__).parent
METHODS = "end-to-end,image,feature-linear,feature-conv,feature-transformer"


def write_images(path: Path) -> None:
    generator = np.random.default_rng(0)
    for part, name in ((part, name) for part in ("train", "test") for name in ("cat", "dog")):
        (path / part / name).mkdir(parents=True)
        for index in range(30):
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / part / name / f"{index}.png")


@pytest.mark.heavy
def test_the_table_of_the_paper_is_filled_on_one_card(simulated: SimulatedCard, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    words = [
        "--profile",
        "gpu",
        "--device",
        "cuda",
        "--methods",
        METHODS,
        "--modules",
        "4",
        "--data-path",
        "cifar10=images",
    ]
    command = [sys.executable, str(TESTS / "reproduced_on_a_card.py"), "cifar10", *words]
    environment = simulated.environment(card=card_named("H200"), values=True)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(TESTS)])

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    process = started()
    runs = tmp_path / "runs" / "reproduce" / "gpu"
    until = time.monotonic() + 600
    while not list(runs.glob("*feature-linear*/checkpoints/last*")):  # an epoch of it is over
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "the same command goes on" in said
    process = started()
    said, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, said
    assert "5 cells" in said
    rows = json.loads((tmp_path / "research" / "results" / "cifar10-gpu.json").read_text())
    assert {row["method"] for row in rows} == set(METHODS.split(","))
    for row in rows:
        assert "H200" in row["device"]
        assert "--device cuda" in row["command"]
        assert 0 <= row["test_accuracy"] <= 1
        assert row["measured_peak_bytes"] > 0
    docs = shutil.copy(TESTS.parent / "research" / "docs" / "accuracy.md", tmp_path / "accuracy.md")
    report = subprocess.run(
        [*command[:2], "--report", "--docs", str(docs)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.returncode == 0, report.stderr
    table = re.search(r"<!-- table: cifar10 gpu -->(.*?)<!-- end -->", Path(docs).read_text(), re.DOTALL)
    assert table is not None
    assert all(f"| {method} " in table[1] for method in METHODS.split(","))
