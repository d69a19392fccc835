"""What the order of a run's first allocations costs: the page research/docs/fragmentation.md.

    python -m research.benchmarks.fragmentation            # print each row as it is found
    python -m research.benchmarks.fragmentation --page     # and write the page

A run is recorded on fake tensors (``localgrad.estimating.record_run``: weights and two steps), and the same requests
are replayed in other orders through the model of PyTorch's allocator (``localgrad.memory.allocator``). Steps stay as
they are; what changes is what is asked for before the first one. For each order the smallest safe cap is sought: the
run fits it, and every cap up to 3 % above it that was tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn, optim

from localgrad.backbones.base import outline
from localgrad.backbones.fake import without_initialization
from localgrad.estimating import record_run
from localgrad.learner import LocalLearner
from localgrad.memory.allocator import CachingAllocator, Event, replay
from localgrad.memory.allocator_rules import Rules
from localgrad.memory.cards import MIB, card_named
from localgrad.memory.recording import Trace
from localgrad.memory.temporaries import workspace_bytes

PAGE = Path(__file__).parents[1] / "docs" / "fragmentation.md"
CARD = card_named("RTX 4090")
BATCH = 64
SHORT = {"Swin-T": "swin_tiny_patch4_window7_224", "ViT-B": "vit_base_patch16_224"}
RUNS = (
    *(("Swin-T", modules, precision) for precision in ("fp32", "bf16") for modules in (1, 2, 4)),
    ("ViT-B", 4, "bf16"),
)
ABOVE = (1.01, 1.02, 1.03)
PLENTY = 1 << 50


def adamw(parameters: list[nn.Parameter]) -> optim.Optimizer:
    """The optimizer of every module."""
    return optim.AdamW(parameters)


def recorded(name: str, modules: int, precision: str) -> Trace:
    """Two steps of a run."""
    with without_initialization():
        model = timm.create_model(SHORT[name], num_classes=100)
    learner = LocalLearner(outline(model, (3, 224, 224)), modules=modules, precision=precision)
    return record_run(learner, BATCH, adamw, CARD, steps=2, cudnn=False)


# Orders -------------------------------------------------------------------------------------------------------


def as_it_is(trace: Trace) -> list[Event]:
    """Optimizer state comes at each module's first update, among activations of earlier modules' outputs."""
    return list(trace.events)


def state_first(trace: Trace, *, largest_first: bool = False) -> list[Event]:
    """Optimizer state comes after the weights, module by module."""
    begin, end = (mark.index for mark in trace.marks[1:3])
    gone = {event[0] for event in trace.events if event[1] < 0}
    workspace = workspace_bytes(CARD)
    state = [event for event in trace.events[begin:end] if event[0] not in gone and event[1] != workspace]
    moved = {event[0] for event in state}
    if largest_first:
        state.sort(key=lambda event: -event[1])
    rest = [event for event in trace.events[begin:] if event[0] not in moved]
    return [*trace.events[:begin], *state, *rest]


def state_largest_first(trace: Trace) -> list[Event]:
    """Likewise, and the largest tensors first."""
    return state_first(trace, largest_first=True)


def one_block_first(trace: Trace) -> list[Event]:
    """All that steps take at once is asked for as one block after the weights, and given back before the first step."""
    begin = trace.marks[1].index
    weights = sum(event[1] for event in trace.events[:begin] if event[1] > 0)
    needed = replay(trace.events, CachingAllocator(total_bytes=PLENTY)).allocated_bytes - weights
    number = max(event[0] for event in trace.events) + 1
    return [*trace.events[:begin], (number, needed), (number, -1), *trace.events[begin:]]


ORDERS: dict[str, Callable[[Trace], list[Event]]] = {
    "as it is": as_it_is,
    "state first": state_first,
    "state first, largest first": state_largest_first,
    "one block first": one_block_first,
}


# Caps ---------------------------------------------------------------------------------------------------------


def fits(events: list[Event], cap: int, rules: Rules) -> bool:
    """Whether a run fits a cap."""
    return replay(events, CachingAllocator(cap, total_bytes=PLENTY, rules=rules)).fits


def smallest_safe_cap(events: list[Event], rules: Rules) -> tuple[int, int]:
    """The smallest safe cap, to one per cent, and the bytes that are allocated at most; fitting isn't monotone."""
    free = replay(events, CachingAllocator(total_bytes=PLENTY, rules=rules))
    low, high = free.allocated_bytes, free.reserved_bytes
    while high - low > low // 100:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(events, middle, rules) else (middle, high)
    while True:
        failing = [cap for cap in (int(high * share) for share in ABOVE) if not fits(events, cap, rules)]
        if not failing:
            return high, free.allocated_bytes
        high = int(failing[-1] * ABOVE[0])


class Row(NamedTuple):
    """One run with one kind of segments: the least caps by order, in bytes."""

    name: str
    modules: int
    precision: str
    expandable: bool
    allocated: int
    caps: dict[str, int]


def rows_of(name: str, modules: int, precision: str) -> list[Row]:
    """Both kinds of segments of a run."""
    trace, rows = recorded(name, modules, precision), []
    orders = {order: make(trace) for order, make in ORDERS.items()}
    for expandable in (False, True):
        rules = Rules(expandable=expandable)
        found = {order: smallest_safe_cap(events, rules) for order, events in orders.items()}
        caps = {order: cap for order, (cap, _) in found.items()}
        rows.append(Row(name, modules, precision, expandable, found["as it is"][1], caps))
    return rows


def line_of(row: Row) -> str:
    """A row of the table: the least cap as it is, and what other orders make of it."""
    base = row.caps["as it is"]
    others = " | ".join(f"{row.caps[order] / base - 1:+.1%}" for order in list(ORDERS)[1:])
    kind = "expandable" if row.expandable else "ordinary"
    figures = f"{row.allocated / MIB:,.0f} | {base / MIB:,.0f} | {base / row.allocated:.2f} x"
    return f"| {row.name} | {row.modules} | {row.precision} | {kind} | {figures} | {others} |"


def verdict(rows: list[Row], order: str) -> str:
    """On how many runs an order needs less or more by over one per cent, which is as exactly as caps are sought."""
    changes = [row.caps[order] / row.caps["as it is"] - 1 for row in rows]
    less, more = sum(change < -0.01 for change in changes), sum(change > 0.01 for change in changes)
    mean = sum(changes) / len(changes)
    return f"* {order}: less on {less} of {len(rows)}, more on {more}; {mean:+.1%} on average."


HEAD = f"""# The order of a run's first allocations

Pure replays, no GPU: a run is recorded from fake tensors, and its requests go through the model of
PyTorch's allocator ([how true it is](allocator.md)) in other orders. Made by
`research/benchmarks/fragmentation.py`; torch {torch.__version__}, {CARD.name}, batch {BATCH}, AdamW,
100 classes, two steps. The least cap is the smallest one, to one per cent, that the run fits and
under which those up to 3 % larger fit, too.

* *as it is*: optimizer state comes at each module's first update.
* *state first*: after the weights, module by module. *largest first*: its largest tensors first.
* *one block first*: all that steps take at once, as one block, given back before the first step.

| model | K | precision | segments | allocated, MiB | least cap, MiB | to allocated | state first \
| largest first | one block first |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Print the table, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--page", action="store_true", help="write research/docs/fragmentation.md")
    writes = parser.parse_args().page
    rows: list[Row] = []
    for run in RUNS:
        rows += rows_of(*run)
        for row in rows[-2:]:
            print(line_of(row), flush=True)
    verdicts = []
    for expandable, words in ((False, "Ordinary segments"), (True, "Expandable segments")):
        own = [row for row in rows if row.expandable == expandable]
        verdicts += ["", f"{words}, against *as it is*:", "", *(verdict(own, order) for order in list(ORDERS)[1:])]
    print("\n".join(verdicts))
    if writes:
        table = "\n".join(map(line_of, rows))
        conclusion = PAGE.read_text(encoding="utf-8").partition(CONCLUSION)[2] if PAGE.exists() else "\n"
        PAGE.write_text(HEAD + table + "\n" + "\n".join(verdicts) + f"\n\n{CONCLUSION}{conclusion}", encoding="utf-8")


CONCLUSION = "## What follows"
"""Heading of what people have written below the table; it is kept."""

if __name__ == "__main__":
    main()
