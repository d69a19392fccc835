"""What each remedy costs in memory and predicted time: the last columns of research/docs/accuracy.md's list.

    python -m research.benchmarks.remedies                  # Swin-T, 224 px, batch 64, fp32, K = 4
    python -m research.benchmarks.remedies --profile cpu    # the model and batch of that profile

Estimates on fake tensors, as `localgrad plan --modules 4` gives them (nothing recomputed inside modules, with a profile
what it says; end-to-end steps recompute blocks); no time is measured. Both are held against end-to-end training of
the same model, without an average of the weights.
"""

from __future__ import annotations

import argparse
import datetime
from typing import Any

import torch

from localgrad.app.planned import PlannedData, task_of
from localgrad.app.recipe import Recipe, overlay
from localgrad.partition import Checkpointing
from localgrad.partitioning import make_plan
from localgrad.planning.budget import Search, Task, mean_nanoseconds
from localgrad.planning.search import Solution
from research.reproduce.methods import BASELINES, METHODS, REMEDIES
from research.reproduce.profiles import CPU

SWIN_T: dict[str, Any] = {"model.name": "swin_tiny_patch4_window7_224", "training.batch_size": 64}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", choices=["cpu"])
    parser.add_argument("--modules", type=int, default=4)
    options = parser.parse_args()
    base = SWIN_T if options.profile is None else {**CPU.settings, **CPU.models["swin"]}
    print(f"K = {options.modules}, {base['model.name']}, torch {torch.__version__}, {datetime.date.today()}")
    print("| method | peak, x end-to-end | predicted time, x end-to-end |")
    print("|---|---|---|")
    greedy = task_for(base, "greedy", {})
    whole = Search(greedy, greedy.costs(base["training.batch_size"]))
    end_to_end = whole.end_to_end()
    peak = whole.peak(end_to_end)
    for name, changes in {**METHODS, **REMEDIES}.items():
        if name in BASELINES:
            continue
        task = task_for(base, name, changes)
        how = Checkpointing.parse(base.get("execution.checkpoint", "none"))
        nbytes, nanoseconds = cost_of(task, base["training.batch_size"], options.modules, how)
        print(f"| {name} | {nbytes / peak:.3f} | {nanoseconds / end_to_end.nanoseconds:.2f} |", flush=True)


def task_for(base: dict[str, Any], name: str, changes: dict[str, Any]) -> Task:
    recipe = Recipe.from_dict(overlay({}, {**base, **(changes or METHODS[name])}))
    return task_of(recipe, device="cpu", data=PlannedData(10, 3))


def cost_of(task: Task, batch_size: int, modules: int, how: Checkpointing) -> tuple[int, float]:
    """Confirmed peak bytes and predicted nanoseconds of the balanced partition."""
    plan = make_plan(task.backbone, modules, checkpoint=str(how))
    costs = task.costs(batch_size)
    choices = tuple(costs.choice(span.start, span.stop, how) for span in plan.spans)
    solution = Solution(plan.boundaries, choices, sum(choice.nanoseconds for choice in choices), 0)
    peak = task.confirm(plan, batch_size).peak_bytes
    if not task.global_share:
        return peak, mean_nanoseconds(task, costs, solution, None)
    blocks = costs.choice(0, costs.num_blocks, Checkpointing("blocks"))
    peak = max(peak, task.confirm(plan, batch_size, blocks.how).peak_bytes)
    return peak, mean_nanoseconds(task, costs, solution, blocks)


if __name__ == "__main__":
    main()
