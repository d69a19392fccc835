"""Estimated against measured peaks of real steps: the table of research/docs/memory.md, as JSON.

    python -m research.benchmarks.estimates --json research/results/memory/estimates-cpu.json

Measured is what ``localgrad.measure`` finds: on a processor the profiler's allocation events, on CUDA
``torch.cuda.max_memory_allocated``; estimated, the whole step on fake tensors; composed, what the planner sees.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path

import timm
import torch

from localgrad import FeatureReconstruction, LocalLearner, estimate, measure, split
from localgrad.app.fitting import device_name
from localgrad.app.planning import adamw
from localgrad.memory.costs import CostSettings
from localgrad.memory.parts import measure_costs

MODELS = ("swin_tiny_patch4_window7_224", "vit_small_patch16_224", "pvt_v2_b1")
MODULES = (1, 2, 4)
WAYS = ("none", "blocks", "halves/2")
PRECISIONS = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    rows = []
    for name in args.models.split(","):
        backbone = split(timm.create_model(name, num_classes=100).to(device), (3, 224, 224))
        images = torch.rand(args.batch_size, 3, 224, 224, device=device)
        labels = torch.arange(args.batch_size, device=device)
        for precision in PRECISIONS:
            settings = CostSettings(batch_size=args.batch_size, precision=precision, device=device.type)
            costs = measure_costs(backbone, FeatureReconstruction(), adamw, settings)
            for modules, how in itertools.product(MODULES, WAYS):
                learner = LocalLearner(backbone, modules=modules, checkpoint=how, precision=precision)
                estimated = estimate(learner, args.batch_size, optimizer=adamw).peak_bytes
                composed = costs.peak_of(learner.plan)
                learner.configure_optimizers(adamw)
                measured = measure(learner, images, labels, repeats=1, warmup=1).peak_bytes
                row = {"model": name, "modules": modules, "checkpoint": how, "precision": precision}
                row |= {"estimated_bytes": estimated, "composed_bytes": composed, "measured_bytes": measured}
                row["deviation"] = estimated / measured - 1
                row["composed_deviation"] = composed / measured - 1
                rows.append(row)
                print(
                    f"{name} {precision} K={modules} {how}: measured {measured / 2**20:.0f} MiB, "
                    f"estimated {row['deviation']:+.2%}, composed {row['composed_deviation']:+.2%}",
                    flush=True,
                )
    run = f"batch {args.batch_size}, 224 px, AdamW, feature reconstruction; {device_name(device)}; "
    run += f"torch {torch.__version__}, timm {timm.__version__}; {datetime.datetime.now(tz=datetime.UTC).date()}"
    print(f"\n{run}\n\n| model | precision | deviation of the estimate | of the composed estimate |\n|---|---|---|---|")
    for name, precision in itertools.product(args.models.split(","), PRECISIONS):
        own = [row for row in rows if (row["model"], row["precision"]) == (name, precision)]
        ranges = []
        for key in ("deviation", "composed_deviation"):
            ranges.append(f"{min(row[key] for row in own):+.1%} to {max(row[key] for row in own):+.1%}")
        print(f"| {name} | {precision} | {ranges[0]} | {ranges[1]} |")
    if args.json:
        args.json.write_text(json.dumps({"run": run, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
