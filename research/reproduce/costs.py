"""What a step of each method costs, measured in turns, beside the accuracy that it is paid for.

::

    <!-- costs: cpu-full -->
    whatever stands here is replaced
    <!-- end -->
"""

from __future__ import annotations

import json
import platform
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import localgrad
from localgrad.training.folder import write_atomically
from research.learners import CLASSES, learner_of
from research.reproduce.methods import BASELINES, END_TO_END
from research.reproduce.profiles import Profile
from research.reproduce.tables import Cell, recipe_of

TABLE = "cifar10"
"""Whose methods and model are measured."""
RECOMPUTED = "end-to-end-checkpointed"
"""Measured as well: to the same accuracy as end-to-end training, bit for bit."""
TURNS = 9


def path_of_costs(results: Path, profile: Profile) -> Path:
    """The file of a profile's measurements."""
    return results / "costs" / f"{profile.name}.json"


def measured_pairs(profile: Profile) -> list[tuple[str, int]]:
    """Methods and K of the agenda of a profile, baselines once."""
    pairs = [(END_TO_END, 1), (RECOMPUTED, 1)]
    for wanted in profile.agenda:
        if wanted.table == TABLE:
            for method in wanted.methods:
                pairs += [(method, modules) for modules in ((1,) if method in BASELINES else wanted.modules)]
    return list(dict.fromkeys(pairs))


def measure_costs_of(profile: Profile, results: Path, say: Callable[[str], None]) -> None:
    """Measure memory and time of a step of every method, one thread, in turns; on images that are drawn."""
    torch.set_num_threads(1)
    side = int(profile.models["swin"]["model.img_size"])
    learners = {
        (method, modules): learner_of(
            recipe_of(Cell(TABLE, TABLE, method, modules, 0, profile.epochs), profile), (3, side, side)
        )
        for method, modules in measured_pairs(profile)
    }
    size = int(profile.settings["training.batch_size"])
    torch.manual_seed(0)
    images, labels = torch.randn(size, 3, side, side), torch.arange(size) % CLASSES
    seconds: dict[tuple[str, int], list[float]] = {pair: [] for pair in learners}
    peaks: dict[tuple[str, int], int] = {}
    flops: dict[tuple[str, int], int] = {}
    for pair, learner in learners.items():
        with FlopCounterMode(display=False) as counter:
            learner.step(images, labels)
        flops[pair] = counter.get_total_flops()
    for _ in range(TURNS):
        for pair, learner in learners.items():
            step = localgrad.measure(learner, images, labels, repeats=1, warmup=1)
            seconds[pair] += step.seconds
            peaks[pair] = step.peak_bytes
    rows: list[dict[str, Any]] = [
        {
            "method": method,
            "modules": modules,
            "peak_bytes": peaks[method, modules],
            "flops": flops[method, modules],
            "seconds": times,
        }
        for (method, modules), times in seconds.items()
    ]
    told: dict[str, Any] = {"rows": rows, "batch_size": size, "torch": torch.__version__, "machine": platform.machine()}
    told["date"] = datetime.now(UTC).date().isoformat()
    text = json.dumps(told, indent=1) + "\n"
    path_of_costs(results, profile).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path_of_costs(results, profile), lambda path: path.write_text(text, encoding="utf-8"))
    for row in rows:
        say(f"{row['method']}, K = {row['modules']}: {min(row['seconds']):.3f} s, {row['peak_bytes'] / 2**20:,.1f} MiB")


@dataclass(frozen=True)
class Cost:
    """Of a step of a method beside end-to-end training's: shares of memory and arithmetic, and of time by turns."""

    memory: float
    flops: float
    times: tuple[float, ...]

    @property
    def time(self) -> float:
        """The median."""
        return statistics.median(self.times)


def costs_of(told: dict[str, Any]) -> dict[tuple[str, int], Cost]:
    """What was measured, by method and K, in its order."""
    base = next(row for row in told["rows"] if row["method"] == END_TO_END)
    return {
        (row["method"], row["modules"]): Cost(
            row["peak_bytes"] / base["peak_bytes"],
            row["flops"] / base["flops"],
            tuple(mine / other for mine, other in zip(row["seconds"], base["seconds"], strict=True)),
        )
        for row in told["rows"]
    }


def markdown_of_costs(profile: Profile, results: Path, accuracy: dict[str, dict[tuple[str, int], str]]) -> str:
    """The table of what was measured.

    Args:
        profile: of which.
        results: where results lie.
        accuracy: by data set, what there is to say of a method with K modules.
    """
    path = path_of_costs(results, profile)
    if not path.exists():
        return f"Not measured yet: `python -m research.reproduce --measure --profile {profile.name}`.\n"
    told = json.loads(path.read_text())
    head = ["method", "K", "memory", "arithmetic", "time of a step", *(f"{data}, points" for data in accuracy)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (method, modules), cost in costs_of(told).items():
        low, high = min(cost.times), max(cost.times)
        spread = "" if method == END_TO_END else f" ({low:.2f} to {high:.2f})"
        cells = [method, str(modules), f"{cost.memory:.2f}", f"{cost.flops:.2f}", f"{cost.time:.2f}{spread}"]
        cells += [found.get((method, modules), "") for found in accuracy.values()]
        lines.append(f"| {' | '.join(cells)} |")
    torch_version = told["torch"].partition("+")[0]
    about = (
        f"Of a step of {told['batch_size']} images beside end-to-end training's, as measured on a processor, one "
        f"thread: methods in {TURNS} turns, the median of their ratios of time with the least and the greatest; "
        f"torch {torch_version}, {told['machine']}, {told['date']}. Arithmetic is that of matrix products and "
        f"convolutions, as PyTorch counts it; fused attention isn't counted. `{RECOMPUTED}` recomputes every block, "
        "to the same accuracy. Points are test accuracy less end-to-end training's, seed by seed, with the number of "
        "seeds; empty where it wasn't run."
    )
    lines += ["", *textwrap.wrap(about, 100, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"
