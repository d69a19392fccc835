"""The script for a real card works the first time: it is run on a processor and on a simulated card."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from research import gpu_check
from research.gpu_check import ROWS, Seen

if TYPE_CHECKING:
    from simulated import SimulatedCard

SCRIPT = Path(__file__).parents[1] / "research" / "gpu_check.py"
NAMES = [row.name for row in ROWS]


def all_but(*names: str) -> str:
    return ",".join(name for name in ["losses", *NAMES] if name not in names)


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--small", *arguments])
        status, said = gpu_check.main(), capsys.readouterr().out
        assert status == 0, said
        return str(said)

    return run


def test_figures_that_differ_are_told() -> None:
    seen = Seen()
    seen.compare("reserved", 100, 101, off=0.02)
    seen.compare("allocated", 100, 105, off=0.02, more=2)
    assert seen.wrong == ["allocated +5.0%"]
    assert seen.cells["reserved"] == "100 B / 101 B (+1.0%)"


def test_it_runs_on_a_processor(on_processor: Callable[..., str]) -> None:
    said = on_processor("--leave-out", all_but("end-to-end"))
    assert "end-to-end:  estimate " in said
    assert "K=4: left out" in said
    assert "verdict: all 1 rows are as expected" in said


@pytest.mark.heavy
def test_every_row_but_the_compiled_one_runs_on_a_processor(on_processor: Callable[..., str]) -> None:
    assert f"verdict: all {len(NAMES)} rows are as expected" in on_processor("--leave-out", "compiled")


@pytest.mark.heavy
def test_it_runs_on_a_simulated_card(simulated: SimulatedCard) -> None:
    said = simulated.run(SCRIPT, "--small", "--leave-out", all_but("K=4"), values=True)
    line = next(line for line in said.splitlines() if line.startswith("K=4:"))
    for column in ("estimate", "allocated", "reserved", "cap", "launches", "waits none"):
        assert f"  {column} " in line + " ", line
    assert "time" not in line
    assert "verdict: all 1 rows are as expected" in said


@pytest.mark.heavy
def test_every_row_runs_on_a_simulated_card(simulated: SimulatedCard) -> None:
    said = simulated.run(SCRIPT, "--small", values=True)
    assert "compiled: left out" in said
    assert f"verdict: all {len(NAMES)} rows are as expected" in said
