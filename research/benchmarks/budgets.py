"""Whether runs keep the budget that they name: ``localgrad train --budget B`` on a card of exactly B bytes.

    python -m research.benchmarks.budgets              # what isn't in the results yet
    python -m research.benchmarks.budgets --only swin-t

Each pair of model and budget is planned and trained for two epochs with evaluation, in a process of its own on the
simulated card (``research/simulated_card``): PyTorch's own allocator, no GPU, cuDNN off. A pair holds if the run ends
well, or if its plan was refused and the smallest that was found wouldn't fit. Written as it comes to
``research/results/memory/budgets.json``; the page is ``research/docs/budgets.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from research import simulated_card

RESEARCH = Path(__file__).parents[1]
RESULTS = RESEARCH / "results" / "memory" / "budgets.json"
PAGE = RESEARCH / "docs" / "budgets.md"
MIB = 1 << 20
VALUES = {"deit-s": 600_000}
"""By model: tensors of up to so many numbers, as its largest weight has, have values, so that splitting is proved;
larger ones cost nothing."""
MOST_VALUES = 2_500_000
MODELS = {
    "swin-t": "swin_tiny_patch4_window7_224",
    "swin-s": "swin_small_patch4_window7_224",
    "vit-b": "vit_base_patch16_224",
    "deit-s": "deit_small_patch16_224",
    "convnext-t": "convnext_tiny",
}
PAIRS = (  # model, MiB, precision, modules (None: any)
    ("swin-t", 3000, "fp32", None),
    ("swin-t", 1800, "fp32", None),
    ("swin-t", 1500, "fp32", None),
    ("swin-s", 2000, "fp32", None),
    ("swin-t", 3000, "fp32", 1),
    ("vit-b", 2400, "bf16", None),
    ("vit-b", 2600, "fp32", 1),
    ("deit-s", 1000, "fp32", None),
    ("deit-s", 1600, "bf16", 1),
    ("convnext-t", 2600, "fp32", None),
    ("swin-t", 2200, "bf16", 4),
    ("swin-t", 2600, "bf16", 1),
    ("swin-s", 2800, "bf16", None),
    ("vit-b", 3200, "fp32", 4),
    ("vit-b", 2400, "fp32", 1),
    ("deit-s", 2200, "fp32", 4),
    ("deit-s", 700, "bf16", None),
    ("convnext-t", 2000, "bf16", 4),
    ("convnext-t", 3600, "fp32", 1),
    ("swin-s", 3600, "fp32", 1),
)


def key_of(pair: tuple[str, int, str, int | None]) -> str:
    """A pair as text."""
    name, budget, precision, modules = pair
    how = "any plan" if modules is None else "end to end" if modules == 1 else f"K = {modules}"
    return f"{name}, {budget:,} MiB, {precision}, {how}"


def run(pair: tuple[str, int, str, int | None]) -> dict[str, Any]:
    """Train a pair on its card; what was planned and what was seen."""
    name, budget, precision, modules = pair
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        ran = simulated_card.command_line(
            *("train", "--budget", f"{budget}MiB", "--data", "digits", "--epochs", "2", "--out", "run"),
            *("--model", MODELS[name], "--batch-size", "64", "--precision", precision, "--device", "cuda"),
            *(() if modules is None else ("--modules", str(modules))),
            *("--set", "data.limit=300", "--set", "execution.sinks=[]"),
            total_bytes=budget * MIB,
            values=VALUES.get(name, MOST_VALUES),
            folder=Path(folder),
            more={"XDG_CACHE_HOME": f"{folder}/cache"},
            timeout=1800,
        )
        seconds = round(time.monotonic() - began)
        said = (ran.err.strip().splitlines() or [""])[-1]
        found: dict[str, Any] = {"status": ran.code, "said": "" if ran.code == 0 else said, "seconds": seconds}
        plan, summary = Path(folder) / "run" / "plan.json", Path(folder) / "run" / "summary.json"
        if plan.exists():
            values = json.loads(plan.read_text())
            forecast = values["forecast"]
            found |= {
                "modules": len(values["boundaries"]) + 1,
                "checkpoint": values["checkpoint"],
                "evaluation_batch": values["evaluation_batch"],
                "available_mib": forecast["available_bytes"] / MIB,
                "planned_reserved_mib": forecast["reserved_bytes"] / MIB,
                "planned_allocated_mib": forecast["allocated_bytes"] / MIB,
                "allowances_mib": sum(
                    nbytes for part, nbytes in forecast["budget_parts"].items() if part.startswith("allowance")
                )
                / MIB,
            }
        if summary.exists():
            values = json.loads(summary.read_text())
            found["reserved_mib"] = values["measured_reserved_bytes"] / MIB
            found["allocated_mib"] = values["measured_peak_bytes"] / MIB
        return found


def page(results: dict[str, dict[str, Any]]) -> str:
    """The table of what there is."""
    rows = [(key_of(pair), results[key_of(pair)]) for pair in PAIRS if key_of(pair) in results]
    ended = [row for _, row in rows if row["status"] == 0]
    full = [row for row in ended if share_of(row) >= 0.9]
    lines = [
        "# Budgets kept",
        "",
        "PyTorch's allocator, simulated card, no GPU, cuDNN off. Made by `research/benchmarks/budgets.py`:",
        "`localgrad train --budget B` on a card of exactly B bytes, batch 64, 224 x 224 pixels, two epochs",
        "with evaluation.",
        "",
        f"{len(rows)} of {len(PAIRS)} pairs were run: {len(ended)} ended well, and in {len(full)} of these what was",
        "reserved is at least 0.90 of what the budget leaves the allocator, less named allowances.",
        "",
        "| model, budget | plan | evaluated by | reserved, MiB | planned | of what there is | |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in rows:
        if row["status"]:
            lines.append(f"| {key} | | | | | | {row['said'][:150]} |")
            continue
        ways = ", ".join(dict.fromkeys(row["checkpoint"])) or "none"
        lines.append(
            f"| {key} | K = {row['modules']}, recomputes {ways} | {row['evaluation_batch']} "
            f"| {row['reserved_mib']:,.0f} | {row['planned_reserved_mib']:,.0f} | {share_of(row):.2f} | |"
        )
    return "\n".join(lines) + "\n"


def share_of(row: dict[str, Any]) -> float:
    """What a run reserved, of what its budget leaves less named allowances."""
    share: float = row["reserved_mib"] / (row["available_mib"] - row["allowances_mib"])
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="pairs whose text begins so")
    parser.add_argument("--again", action="store_true", help="those too that are in the results")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for pair in PAIRS:
        key = key_of(pair)
        if key.startswith(options.only) and (options.again or key not in results):
            results[key] = run(pair)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(key, results[key], flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
