"""How long planning takes: the figures of research/docs/memory.md.

    python -m research.benchmarks.speed_of_estimates

Each line comes from a process of its own, in which nothing has been estimated before; the imports are told apart. No
cache is read. Seconds are of the wall and, in brackets, of the processor: they differ where others share the machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time

CASES = (
    ("swin_tiny_patch4_window7_224", 64),
    ("swin_tiny_patch4_window7_224", 256),
    ("vit_large_patch16_224", 64),
)


class _Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.before = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def lap(self) -> str:
        now = self._now()
        wall, processor = (b - a for a, b in zip(self.before, now, strict=True))
        self.before = now
        return f"{wall:.1f} ({processor:.1f})"


def one(name: str, batch_size: int) -> None:
    """Plan once, with AdamW in fp32 for 2/5 of what end-to-end training needs, and print a line of the table."""
    clock = _Clock()
    import timm  # its time is measured
    from torch import nn, optim

    from localgrad import FeatureReconstruction
    from localgrad.backbones.base import outline
    from localgrad.backbones.fake import without_initialization
    from localgrad.planning.budget import Search, Task
    from localgrad.units import format_bytes

    def adamw(parameters: list[nn.Parameter]) -> optim.Optimizer:  # not known to the cache
        return optim.AdamW(parameters)

    imports = clock.lap()
    with without_initialization():
        model = timm.create_model(name)
    task = Task(backbone=outline(model, (3, 224, 224)), objective=FeatureReconstruction(), optimizer=adamw)
    costs = task.costs(batch_size)
    measuring = clock.lap()
    search = Search(task, costs)
    budget = search.peak(search.end_to_end()) * 2 // 5
    solution = search.fastest(budget)
    searching = clock.lap()
    assert solution is not None, "a plan for 2/5 of the memory"
    profile = task.confirm(search.as_plan(solution), batch_size)
    confirming = clock.lap()
    told = f"{format_bytes(search.peak(solution))}, confirmed {format_bytes(profile.peak_bytes)}"
    print(f"| {name} | {batch_size} | {imports} | {measuring} | {searching} | {confirming} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "BATCH"), help="plan for this one, in this process")
    given = parser.parse_args()
    if given.one is not None:
        one(given.one[0], int(given.one[1]))
        return
    print(f"seconds, wall (processor); {os.cpu_count()} cores; {datetime.datetime.now(tz=datetime.UTC).date()}\n")
    print(
        "| model | batch | imports | costs | search | confirming step | composed peak |\n|---|---|---|---|---|---|---|"
    )
    for name, batch_size in CASES:
        subprocess.run([sys.executable, __file__, "--one", name, str(batch_size)], check=True)


if __name__ == "__main__":
    main()
