"""Runs a process on the simulated card."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from localgrad.memory.cards import Card
from research.simulated_card.building import build

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    """What a process left: exit status and what it printed."""

    code: int
    out: str
    err: str


def environment(
    *,
    total_bytes: int | None = None,
    taken_bytes: int = 0,
    devices: int = 1,
    card: Card | None = None,
    values: bool | int = False,
    cache: Path | None = None,
) -> dict[str, str]:
    """This process's environment, and what makes one that is started with it see simulated cards.

    Args:
        total_bytes: of each device; by default the card's, or 141 GiB.
        taken_bytes: of these, what others (other processes, the context) have already.
        devices: how many.
        card: whose multiprocessors, threads, capability and name it has; an H100 in all but its name by default.
        values: whether kernels compute (on the processor), or the largest number of elements that a tensor with
            values has: what is larger is 0, and costs nothing.
        cache: as in ``build``.

    Raises:
        Unavailable: it can't be built here.
    """
    left_out = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    made = {name: value for name, value in os.environ.items() if name not in left_out}
    made = {name: value for name, value in made.items() if not name.startswith("SIMULATED_CARD_")}
    made["LD_PRELOAD"] = str(build(cache))
    made["OMP_NUM_THREADS"] = "1"
    made["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [made.get("PYTHONPATH")])])
    settings: dict[str, object] = {"DEVICES": devices, "TAKEN_BYTES": taken_bytes}
    if card is not None:
        major, minor = card.capability
        settings |= {"NAME": card.name, "MULTIPROCESSORS": card.multiprocessors, "THREADS": card.threads}
        settings |= {"CAPABILITY": 10 * major + minor, "TOTAL_BYTES": card.total_bytes}
    if total_bytes is not None:
        settings["TOTAL_BYTES"] = total_bytes
    if values is not False:
        settings["VALUES"] = "all" if values is True else values
    return made | {f"SIMULATED_CARD_{name}": str(value) for name, value in settings.items()}


def run(
    code: str | Path,
    *arguments: str,
    more: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 600.0,
    **card: object,
) -> Ran:
    """Run Python code, or a script, on simulated cards.

    Args:
        code: the code itself, or the path of a script.
        arguments: of the script.
        more: environment beyond the card's.
        folder: where it runs; here by default.
        timeout: seconds after which it is ended, with ``subprocess.TimeoutExpired``.
        card: as ``environment`` takes.
    """
    what = ["-c", code] if isinstance(code, str) else [str(code)]
    return _run([*what, *arguments], more, folder, timeout, card)


def command_line(
    *arguments: str,
    more: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 600.0,
    **card: object,
) -> Ran:
    """``localgrad ...`` on simulated cards; else as ``run``."""
    return _run(["-m", "localgrad", *arguments], more, folder, timeout, card)


def _run(
    arguments: list[str], more: Mapping[str, str] | None, folder: Path | None, timeout: float, card: dict[str, object]
) -> Ran:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(**card) | dict(more or {}),  # type: ignore[arg-type]
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
