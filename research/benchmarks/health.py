"""Where methods lose accuracy, module by module: the health log of runs against an end-to-end run of the same recipe.

    python -m research.benchmarks.health --data-path cifar10=FOLDER   # table `images`, profile cpu, K = 4
    python -m research.benchmarks.health --methods greedy --every 5 --out runs/other --json results/other.json

Trains end to end first, then each method, all by the recipe of `research.reproduce TABLE --profile PROFILE` and with
`--health`, one after the other; runs that are complete are read and not repeated, others are resumed. The end-to-end
run's features are probed at the methods' boundaries, too (its best epoch's). What is printed of the methods is of the
last epoch; the file has every check. Nothing in here reads the test set but the runs themselves, at their end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from localgrad.app.build import build
from localgrad.app.recipe import Recipe, overlay
from localgrad.step.states import load_weights
from localgrad.training.events import EpochEnded, read_metrics
from localgrad.training.folder import load_saved_weights, read_text
from localgrad.training.health import HealthCheck
from localgrad.training.trainer import below
from research.reproduce.methods import DEFAULT, END_TO_END
from research.reproduce.profiles import PROFILES
from research.reproduce.results import commit_of_code
from research.reproduce.sources import Source
from research.reproduce.tables import TABLES, Cell, epochs_of, fingerprint, recipe_of

FIGURES = ("local_accuracy", "linear_probe_accuracy", "gradient_cosine", "cka", "reconstruction_error")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", choices=TABLES, default="images")
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--data-path", metavar="DATA=FOLDER", default="")
    parser.add_argument("--methods", default=f"greedy,feature-linear,{DEFAULT}")
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/health"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table, profile = TABLES[options.table], PROFILES[options.profile]
    data = table.data[0]
    folder = options.data_path.removeprefix(f"{data}=") or None
    epochs = epochs_of(table, profile)[-1]
    found: dict[str, dict[str, Any]] = {}
    reference = Path()  # of the end-to-end run, which comes first
    for method in (END_TO_END, *options.methods.split(",")):
        modules = 1 if method == END_TO_END else options.modules
        cell = Cell(table.name, data, method, modules, options.seed, epochs)
        values = overlay(recipe_of(cell, profile), Source(data, folder).settings())
        values = overlay(
            values,
            {
                "execution.device": "auto",
                "execution.num_threads": options.num_threads,
                "execution.health_every": options.every,
            },
        )
        if method != END_TO_END:
            values = overlay(values, {"execution.health_reference": str(reference)})
        # By all that makes the run what it is: another seed, table or K finds a folder of its own.
        run = train(values, options.out / f"{method}-{fingerprint(values)}")
        found[method] = checks_of(run)
        if method == END_TO_END:
            reference = run
            found[method]["health"] = [{"health": probes_of(overlay(values, {"local.modules": options.modules}), run)}]
    print(f"{table.name}, {profile.name}, seed {options.seed}, {epochs} epochs, {datetime.date.today()}, last epoch:\n")
    for line in table_of(found):
        print(line)
    if options.json is not None:
        about = {"table": table.name, "profile": profile.name, "seed": options.seed, "epochs": epochs}
        about |= {"date": str(datetime.date.today()), "commit": commit_of_code(), "num_threads": options.num_threads}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about | {"methods": found}, indent=1) + "\n")


def train(values: dict[str, Any], folder: Path) -> Path:
    """Train by a recipe, or go on with it, where that isn't done; the run folder."""
    if (folder / "summary.json").exists():
        return folder
    recipe = folder.with_name(f"{folder.name}.toml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(Recipe.from_dict(values).to_toml())
    begun = (folder / "recipe.toml").exists()
    how = ["--resume", str(folder)] if begun else ["--recipe", str(recipe), "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "localgrad", "train", *how], check=True, stdout=sys.stderr)
    return folder


def checks_of(folder: Path) -> dict[str, Any]:
    """Accuracies of a run, and its health at each check."""
    lines = [json.loads(line) for line in read_metrics(folder / "metrics.jsonl")[0]]
    summary = json.loads(read_text(folder, "summary.json"))
    return {
        "val_accuracy": summary["val_accuracy"],
        "test_accuracy": summary["test_accuracy"],
        "health": [line for line in lines if "health" in line],
    }


def probes_of(values: dict[str, Any], run: Path) -> list[dict[str, float]]:
    """Linear probes of a run's best weights at the boundaries of another number of modules."""
    job = build(Recipe.from_dict(values))
    load_weights(job.learner.model, below(load_saved_weights(run / "checkpoints" / "best.safetensors"), "model."))
    assert job.data.val is not None, "the profiles leave images out of training"
    check = HealthCheck(job.learner, job.batches, job.evaluation_batches(job.data.val), 1)
    none = (None,) * values["local"]["modules"]
    measured = check(
        EpochEnded(
            epoch=0,
            losses=({},) * len(none),
            train_accuracy=None,
            val_accuracy=None,
            val_module_accuracy=none,
            learning_rate=0.0,
            images_per_second=0.0,
            seconds=0.0,
            is_best=False,
        )
    )
    return [{"linear_probe_accuracy": module["linear_probe_accuracy"]} for module in measured.modules]


def table_of(found: dict[str, Any]) -> list[str]:
    """Markdown: a row for each module of each method."""
    lines = ["| method | module | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |"]
    lines.append("|---|---|" + "---|" * len(FIGURES))
    for method, own in found.items():
        for index, module in enumerate(own["health"][-1]["health"]):
            told = " | ".join(f"{module[name]:.3f}" if name in module else "" for name in FIGURES)
            lines.append(f"| {method} | {index} | {told} |")
    return lines


if __name__ == "__main__":
    main()
