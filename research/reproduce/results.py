"""Results on disk: ``research/results/TABLE-PROFILE.json``, cells with what tells where their figures are from."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import re
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import localgrad
from localgrad.app.recipe import parse_toml
from localgrad.errors import RecipeError
from localgrad.training.events import read_metrics
from localgrad.training.folder import read_text, write_atomically
from research.reproduce.profiles import Profile
from research.reproduce.tables import TABLES, Cell, fingerprint, model_of, recipe_of, repeating_command_of

Row = dict[str, Any]

KEYS = (
    "data",
    "model",
    "profile",
    "method",
    "modules",
    "seed",
    "epochs",
    "test_accuracy",
    "peak_bytes",
    "peak_ratio",
    "seconds",
    "device",
    "commit",
    "command",
)
"""What every row has; others may be added."""

RUN = ("recipe", "data_source", "data_digest")
"""What makes two rows of one profile the same run, by whatever names."""

IDENTITY = ("data", "method", "modules", "seed", "epochs", *RUN)
"""What makes two rows of one profile the same cell."""


def path_of(results: Path, table: str, profile: str) -> Path:
    """The file of a table."""
    return results / f"{table}-{profile}.json"


def load_rows(path: Path) -> list[Row]:
    """Read a table's rows; none where there is no file.

    Raises:
        RecipeError: it isn't a list of cells.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--results: {path} can't be read ({error}); restore it, or move it away.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(KEYS) <= row.keys() for row in rows):
        raise RecipeError(f"--results: {path} is no list of cells with the keys {', '.join(KEYS)}; move it away.")
    return rows


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row the cell that it is, whatever its table."""
    return tuple(row.get(key) for key in IDENTITY)


def identity_of(cell: Cell, profile: Profile, data_source: str, data_digest: str) -> tuple[Any, ...]:
    """The identity that a cell's row has, or will have."""
    recipe = fingerprint(recipe_of(cell, profile))
    return cell.data, cell.method, cell.modules, cell.seed, cell.epochs, recipe, data_source, data_digest


def run_of(row_identity: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of an identity that makes a run what it is."""
    return row_identity[-len(RUN) :]


def device_kind(device: str) -> str:
    """What a run's device is, however many threads it had; never averaged with another one."""
    return re.sub(r", \d+ threads?$", "", device)


def command_of_row(cell: Cell, profile: Profile, path: str | None, row: Mapping[str, Any]) -> str:
    """What repeats a row's run as this cell."""
    device = "cpu" if device_kind(row["device"]).endswith("processor") else "cuda"
    return repeating_command_of(cell, profile, path, device=device, num_threads=row.get("num_threads"))


def known_runs(results: Path, profile: str) -> dict[tuple[Any, ...], Row]:
    """Every row of a profile by its recipe and images: tables share runs, and so do two names of one method."""
    rows = [row for table in TABLES for row in load_rows(path_of(results, table, profile))]
    return {run_of(identity(row)): row for row in rows}


def store(results: Path, cell: Cell, profile: Profile, row: Row) -> None:
    """Put a row into its table's file, in place of the same cell's older one; whole or not at all."""
    path = path_of(results, cell.table, profile.name)
    results.mkdir(parents=True, exist_ok=True)
    with _locked(results):
        rows = {identity(known): known for known in load_rows(path)} | {identity(row): row}
        ordered = sorted(rows.values(), key=lambda row: tuple(row[key] for key in IDENTITY[:5]))
        text = json.dumps(ordered, indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let nobody else rewrite the folder's files meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def row_of(
    cell: Cell, profile: Profile, folder: Path, *, data_source: str, data_digest: str, path: str | None, commit: str
) -> Row:
    """The row of a finished run.

    Args:
        cell: which.
        profile: its size.
        folder: the run folder.
        data_source: what the images are copies of.
        data_digest: what tells their files apart.
        path: where they were, if not where torchvision puts them.
        commit: of the code that ran.

    Raises:
        RunFolderError: a file of the run is damaged.
    """
    summary = json.loads(read_text(folder, "summary.json"))
    info = json.loads(read_text(folder, "data.json"))
    sound, _ = read_metrics(folder / "metrics.jsonl")
    lines = [json.loads(line) for line in sound]
    best: Row = next((line for line in lines if line["epoch"] == summary["best_epoch"]), {})
    values = recipe_of(cell, profile)
    execution = parse_toml(read_text(folder, "recipe.toml"), "recipe.toml").get("execution", {})
    peak = summary["estimated_peak_bytes"]
    row = {
        "data": cell.data,
        "model": model_of(values),
        "profile": profile.name,
        "method": cell.method,
        "modules": cell.modules,
        "seed": cell.seed,
        "epochs": cell.epochs,
        "test_accuracy": summary["test_accuracy"],
        "peak_bytes": peak,
        "peak_ratio": peak / summary["estimated_end_to_end_peak_bytes"],
        "seconds": summary["seconds"],
        "device": summary["device"],
        "commit": commit,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "hours": summary["seconds"] / 3600,
        "val_accuracy": summary["val_accuracy"],
        "train_accuracy": best.get("train_accuracy"),
        "module_accuracy": summary["test_module_accuracy"],
        "best_epoch": summary["best_epoch"],
        "measured_peak_bytes": summary["measured_peak_bytes"],
        "measured_peak_of": summary["measured_peak_of"],
        "images_per_second": summary["images_per_second"],
        "num_train": info["num_train"],
        "num_val": info["num_val"],
        "num_test": info["num_test"],
        "notes": info["notes"],
        "data_source": data_source,
        "data_digest": data_digest,
        "num_parameters": num_parameters(folder / "model.safetensors"),
        "num_threads": execution.get("num_threads"),
        "peak_of": "estimate",
        "recipe": fingerprint(values),
        "versions": summary["versions"],
    }
    return row | {"command": command_of_row(cell, profile, path, row)}


def num_parameters(weights: Path) -> int:
    """How many numbers a file of weights holds, read from its header."""
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    return sum(math.prod(entry["shape"]) for entry in tensors if "F" in entry["dtype"])  # no indices, no counts


def commit_of_code() -> str:
    """The commit of the running package, with ``+`` where its files were changed since; its version without git."""
    package = Path(localgrad.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "__init__.py"):  # installed into an environment below somebody's repository
        return str(localgrad.__version__)
    changed = git("status", "--porcelain", "--", ".")
    return f"{git('rev-parse', '--short', 'HEAD')}{'+' if changed else ''}"
