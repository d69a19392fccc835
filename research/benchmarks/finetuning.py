"""Fine-tuning side by side: pretrained on CIFAR-100, fine-tuned on CIFAR-10 by each method.

::

    python -m research.benchmarks.finetuning --data-path FOLDER    # with cifar10/ and cifar100/; what isn't done yet
    python -m research.benchmarks.finetuning --measure             # memory and time of a step, on a quiet machine
    python -m research.benchmarks.finetuning --report              # the page alone

Every cell is a run of `localgrad train`, one thread, in a process of its own. A cell that is done is kept in
``research/results/finetuning/cells.json``; a run that was cut off goes on; several processes share the cells among
them. The learning rate of a method is chosen of two, by validation images of seed 0; the test set is read once a run,
at its end. The page is ``research/docs/finetuning.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import localgrad
from localgrad.app.recipe import Recipe, overlay
from localgrad.estimating import estimate_step
from research.learners import learner_of

RESEARCH = Path(__file__).parents[1]
RESULTS = RESEARCH / "results" / "finetuning" / "cells.json"
STEPS = RESULTS.with_name("steps.json")
PAGE = RESEARCH / "docs" / "finetuning.md"

Values = dict[str, Any]

MODELS: dict[str, Values] = {
    "vit": {
        "model.name": "vit_tiny_patch16_224",
        "model.img_size": 32,
        "model.patch_size": 8,
        "model.options": {"embed_dim": 96, "depth": 6, "num_heads": 3},
    },
    "swin": {
        "model.name": "swin_tiny_patch4_window7_224",
        "model.img_size": 32,
        "model.patch_size": 4,
        "model.options": {"embed_dim": 48, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4},
    },
}
COMMON: Values = {
    "data.val_fraction": 0.02,
    "augment.flip": True,
    "augment.crop_padding": 2,
    "training.weight_decay": 0.05,
    "execution.num_threads": 1,
}
PRETRAINING: Values = {
    **COMMON,
    "local.modules": 1,
    "local.objective": "greedy",
    "training.epochs": 20,
    "training.batch_size": 128,
    "training.lr": 2e-3,
    "training.warmup_epochs": 1.0,
}
FINE_TUNING: Values = {**COMMON, "training.epochs": 10, "training.batch_size": 64, "training.warmup_epochs": 1.0}
RATES = (5e-4, 2e-3)
SEEDS = (0, 1, 2)


def _local(modules: int, classifier: str) -> Values:
    own = {"classifier": classifier, "decoder": "linear"}
    return {"local.modules": modules, "local.objective": "feature", "local.options": own}


WHOLE: Values = {"local.modules": 1, "local.objective": "greedy"}
LORA: Values = {"model.lora": 8}
METHODS: dict[str, Values] = {
    "full": WHOLE,
    "lower half frozen": {**WHOLE, "training.freeze": 0.5},
    "probe": {**WHOLE, "training.freeze": 1.0},
    "LoRA": {**WHOLE, **LORA},
    "K = 2, transformer heads": _local(2, "transformer"),
    "K = 4, transformer heads": _local(4, "transformer"),
    "K = 2, tail heads": _local(2, "tail"),
    "K = 2, transformer heads + LoRA": {**_local(2, "transformer"), **LORA},
    "scratch": {**WHOLE, "model.weights": None},
    "K = 3, transformer heads": _local(3, "transformer"),
    "K = 3, tail heads": _local(3, "tail"),
    "K = 4, tail heads": _local(4, "tail"),
    "LoRA, blocks recomputed": {**WHOLE, **LORA, "execution.checkpoint": "blocks"},
    "full, blocks recomputed": {**WHOLE, "execution.checkpoint": "blocks"},
}
"""What each changes, in the order in which cells are run."""
THE_SAME = {"full, blocks recomputed": "full"}
"""Methods that aren't run, since they give the same weights as another one, bit for bit; their steps are measured."""
OF_ALL_IMAGES = ("full", "lower half frozen", "LoRA", "K = 2, transformer heads")


@dataclass(frozen=True)
class Cell:
    """One run: which model, on how many images (none: all), how, at which rate, from which seed."""

    model: str
    images: int | None
    method: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.model}; {self.images or 'all'}; {self.method}; {self.rate:g}; seed {self.seed}"

    @property
    def values(self) -> Values:
        """Its recipe, but for its data and its weights, by dotted key."""
        limit = {} if self.images is None else {"data.limit": self.images}
        own = {"training.lr": self.rate, "seed": self.seed}
        return {**MODELS[self.model], **FINE_TUNING, **limit, **METHODS[self.method], **own}


def wanted(model: str, images: int | None, results: dict[str, Values]) -> list[Cell]:
    """Cells of a model and a number of images that aren't done and can be run, in order; rates first."""
    methods = tuple(each for each in methods_of(model) if each not in THE_SAME) if images else OF_ALL_IMAGES
    cells = [Cell(model, images, method, rate, SEEDS[0]) for method in methods for rate in rates_of(images)]
    for seed in SEEDS[1:] if images else ():
        found = [(method, best_rate(model, images, method, results)) for method in methods]
        cells += [Cell(model, images, method, rate, seed) for method, rate in found if rate is not None]
    if images is None:  # at the rate that was chosen on fewer
        cells = [
            Cell(model, None, method, rate, SEEDS[0])
            for method in methods
            if (rate := best_rate(model, 5_000, method, results)) is not None
        ]
    return [cell for cell in cells if str(cell) not in results]


def methods_of(model: str) -> tuple[str, ...]:
    """The methods that a model was trained by: tails weren't made for Swin's stages when these cells were run."""
    return tuple(method for method in METHODS if model != "swin" or "tail" not in method)


def rates_of(images: int | None) -> tuple[float, ...]:
    """The rates that are tried for so many images."""
    return RATES if images else ()


def best_rate(model: str, images: int | None, method: str, results: dict[str, Values]) -> float | None:
    """The rate of a method by validation images of the first seed, once all were tried."""
    found = {rate: results.get(str(Cell(model, images, method, rate, SEEDS[0]))) for rate in RATES}
    done = {rate: row["val_accuracy"] for rate, row in found.items() if row is not None}
    return max(done, key=lambda rate: done[rate]) if len(done) == len(RATES) else None


def trained(values: Values, folder: Path) -> dict[str, Any]:
    """Train a recipe in a folder, or go on with it; its summary."""
    recipe = folder.with_name(f"{folder.name}.toml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(Recipe.from_dict(overlay({}, {k: v for k, v in values.items() if v is not None})).to_toml())
    begun = (folder / "recipe.toml").exists()
    how = ["--resume", str(folder)] if begun else ["--recipe", str(recipe), "--out", str(folder)]
    command = [sys.executable, "-m", "localgrad", "train", *how]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def run(options: argparse.Namespace) -> None:
    """Run what isn't done, model by model, in the order that the module says."""
    for model, images in (("vit", 5_000), ("swin", 5_000), ("vit", None)):
        if options.model and (model, images) != (options.model, options.images or None):
            continue
        values = {**MODELS[model], **PRETRAINING, "data.name": str(options.data_path / "cifar100")}
        pretrained = options.out / f"{model}-pretrained"
        told = trained(values, pretrained)
        keep(f"{model}; pretrained", told)
        while one := next(free_of(wanted(model, images, read()), options.out), None):
            cell, folder, lock = one
            values = {"model.weights": str(pretrained), **cell.values, "data.name": str(options.data_path / "cifar10")}
            try:
                keep(str(cell), trained(values, folder))
            finally:
                lock.release()


def free_of(cells: list[Cell], out: Path) -> Iterator[tuple[Cell, Path, FileLock]]:
    """The cells that no other process runs, each with its folder, and held for this one."""
    for cell in cells:
        folder = out / str(cell).replace("; ", "-").replace(" ", "_")
        lock = FileLock(folder.with_suffix(f"{folder.suffix}.lock"))
        with contextlib.suppress(Timeout):
            lock.acquire(blocking=False)
            if str(cell) not in read():  # it may have been done meanwhile
                yield cell, folder, lock
            lock.release()


def read(path: Path = RESULTS) -> dict[str, Values]:
    """What is done."""
    found: dict[str, Values] = json.loads(path.read_text()) if path.exists() else {}
    return found


def measure_steps(only: str | None) -> None:
    """Measure memory and time of a step of every method, in turns, on images that are drawn; needs no data."""
    found = read(STEPS)
    for model in MODELS if only is None else [only]:
        learners = {method: _learner(model, method) for method in methods_of(model) if method != "scratch"}
        adamw = partial(torch.optim.AdamW, lr=1e-4)
        estimates = {
            method: estimate_step(learner, FINE_TUNING["training.batch_size"], adamw).peak_bytes
            for method, learner in learners.items()
        }
        torch.manual_seed(0)
        images, labels = torch.randn(FINE_TUNING["training.batch_size"], 3, 32, 32), torch.arange(64) % 10
        seconds: dict[str, list[float]] = {method: [] for method in learners}
        for _ in range(9):
            for method, learner in learners.items():
                measured = localgrad.measure(learner, images, labels, repeats=1, warmup=1)
                seconds[method].append(measured.seconds[0])
                found[f"{model}; {method}"] = {"peak_bytes": measured.peak_bytes, "estimated": estimates[method]}
        for method, times in seconds.items():
            found[f"{model}; {method}"] |= {"seconds": times, "torch": torch.__version__}
        print(model, {method: f"{min(times):.3f} s" for method, times in seconds.items()}, flush=True)
        STEPS.write_text(json.dumps(found, indent=1) + "\n")


def _learner(model: str, method: str) -> localgrad.LocalLearner:
    """The learner of a method, without weights that were trained."""
    values = {**Cell(model, None, method, RATES[0], 0).values, "data.name": "digits", "model.weights": None}
    return learner_of(overlay({}, {key: value for key, value in values.items() if value is not None}), (3, 32, 32))


def keep(key: str, summary: dict[str, Any]) -> None:
    """Add a cell to what is done."""
    names = ("val_accuracy", "test_accuracy", "estimated_peak_bytes", "measured_peak_bytes", "measured_peak_of")
    row = {name: summary.get(name) for name in names}
    row |= {"seconds": summary["seconds"], "torch": summary["versions"]["torch"]}
    row["date"] = datetime.now(UTC).date().isoformat()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(RESULTS.with_suffix(".lock")):
        RESULTS.write_text(json.dumps({**read(), key: {**row, **read().get(key, {})}}, indent=1) + "\n")
    print(key, row["val_accuracy"], row["test_accuracy"], flush=True)


@dataclass(frozen=True)
class Figures:
    """What a method came to.

    Attributes:
        accuracies: on the test set, in percent, of each seed that was run.
        estimated: memory of a step, as a share of full fine-tuning's; likewise, as measured.
        measured: likewise; ``None`` where no step was measured.
        time: of a step, likewise.
    """

    accuracies: tuple[float, ...]
    estimated: float
    measured: float | None
    time: float | None

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return statistics.fmean(self.accuracies)


def figures_of(model: str, images: int | None, method: str, results: dict[str, Values]) -> Figures | None:
    """Of a method at its chosen rate; ``None`` where it wasn't run, or full fine-tuning wasn't."""
    rows, base = (_rows_of(model, images, name, results) for name in (THE_SAME.get(method, method), "full"))
    if not rows or not base:
        return None
    steps = read(STEPS)
    if method in THE_SAME and f"{model}; {method}" not in steps:
        return None
    own, whole = (steps.get(f"{model}; {name}") for name in ("full" if method == "scratch" else method, "full"))
    ratios = [] if own is None or whole is None else list(map(operator.truediv, own["seconds"], whole["seconds"]))
    return Figures(
        accuracies=tuple(100 * row["test_accuracy"] for row in rows),
        estimated=(own["estimated"] if own and method in THE_SAME else rows[0]["estimated_peak_bytes"])
        / base[0]["estimated_peak_bytes"],
        measured=None if own is None or whole is None else own["peak_bytes"] / whole["peak_bytes"],
        time=statistics.median(ratios) if ratios else None,
    )


def _rows_of(model: str, images: int | None, method: str, results: dict[str, Values]) -> list[Values]:
    rate = best_rate(model, 5_000, method, results)
    keys = [] if rate is None else [str(Cell(model, images, method, rate, seed)) for seed in SEEDS]
    return [results[key] for key in keys if key in results]


def table(model: str, images: int | None, results: dict[str, Values]) -> list[str]:
    """Markdown: a row for each method that was run."""
    lines = [
        "| | gradients | seeds | test accuracy, % | memory, estimated | memory, measured | time of a step |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {method: figures_of(model, images, method, results) for method in METHODS}
    for method, figures in found.items():
        if figures is not None:
            own = figures.accuracies
            ends = f" ({min(own):.1f} to {max(own):.1f})" if len(own) > 1 else ""
            gradients = "exact" if METHODS[method]["local.modules"] == 1 else "local"
            told = ("" if value is None else f"{value:.2f}" for value in (figures.measured, figures.time))
            lines.append(
                f"| {method} | {gradients} | {len(own)} | {figures.mean:.1f}{ends} | {figures.estimated:.2f} "
                f"| {' | '.join(told)} |"
            )
    return lines if any(found.values()) else []


def num_runs(model: str, images: int | None, results: dict[str, Values]) -> int:
    """Cells at the chosen rates that are done."""
    return sum(len(_rows_of(model, images, method, results)) for method in METHODS if method not in THE_SAME)


def days_of(results: dict[str, Values]) -> str:
    """On which days, from the first to the last, cells ended."""
    days = sorted(row["date"] for row in results.values())
    return " to ".join(dict.fromkeys((days[0], days[-1])))


def page(results: dict[str, Values]) -> str:
    """The tables of what there is."""
    rows = [row for key, row in results.items()]
    versions = sorted({row["torch"] for row in rows})
    lines = [
        "# Fine-tuning, method by method",
        "",
        "Pretrained on CIFAR-100 end to end, then fine-tuned on CIFAR-10, both at 32 x 32 pixels. CIFAR-10",
        "is a copy in JPEG: its figures compare methods, and aren't to be set beside published ones. Every",
        f"method has its rate, of {' and '.join(f'{rate:g}' for rate in RATES)}, by validation images of the "
        "first seed; AdamW,",
        f"{FINE_TUNING['training.epochs']} epochs, batches of {FINE_TUNING['training.batch_size']}, fp32, one thread.",
        "Accuracy is of the test set, the mean over seeds with the least and the greatest. Memory and time",
        "are of a step, beside full fine-tuning: as estimated, and as measured on the processor",
        "(`--measure`, methods in turns, the median of nine ratios). Of full fine-tuning with its blocks",
        "recomputed steps alone were run: its weights are those of full fine-tuning, bit for bit.",
        "",
        f"Made by `python -m research.benchmarks.finetuning`; {days_of(results)}, torch {', '.join(versions)}."
        if rows
        else "",
        "",
    ]
    for model, images in (("vit", 5_000), ("swin", 5_000), ("vit", None)):
        own = table(model, images, results)
        asked = len(set(methods_of(model)) - set(THE_SAME)) * len(SEEDS) if images else len(OF_ALL_IMAGES)
        if own:
            name = {"vit": "A ViT of 6 blocks, width 96", "swin": "A Swin of 6 blocks, width 48"}[model]
            first = results[f"{model}; pretrained"]
            lines += [
                f"## {name}, {images or 'all 49,000'} images",
                "",
                f"Pretrained to {100 * first['test_accuracy']:.1f} % on CIFAR-100 in {PRETRAINING['training.epochs']} "
                "epochs.",
                "",
                *own,
                "",
                f"{num_runs(model, images, results)} of {asked} cells at the chosen rates were run.",
                "",
            ]
        else:
            lines += [f"Not run yet: {model}, {images or 'all'} images, {asked} cells.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run what isn't done, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-path", type=Path, help="a folder with cifar10/ and cifar100/")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--model", choices=MODELS, help="this one alone")
    parser.add_argument("--images", type=int, default=5_000, help="with --model; 0: all of them")
    parser.add_argument("--measure", action="store_true", help="measure a step of every method, and stop")
    parser.add_argument("--report", action="store_true", help="write the page, and stop")
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        measure_steps(options.model)
    elif not options.report:
        if options.data_path is None:
            parser.error("--data-path: say where cifar10/ and cifar100/ lie.")
        run(options)
    if read():
        PAGE.write_text(page(read()))


if __name__ == "__main__":
    main()
