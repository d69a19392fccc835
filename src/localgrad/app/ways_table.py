"""The table of all ways to fine-tune, as people read it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from localgrad.app.ways import FULL, Way, Ways, fastest_way, typed
from localgrad.errors import arg
from localgrad.units import format_bytes

COLUMNS = ("method", "run", "gradients", "trained", "needs", "memory", "time", "fits")


def print_ways(ways: Ways, budget: int | None, console: Console) -> None:
    """Print every way, and name the fastest ones that fit."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("method", "run", "gradients") else "right", no_wrap=True)
    base = ways.rows[0]
    for way in ways.rows:
        optimizer = "" if way.optimizer is None else ", 8-bit"
        table.add_row(
            typed(way.words) + optimizer,
            way.how,
            "exact" if way.is_exact else "local",
            f"{way.share:.1%}",
            format_bytes(way.needed_bytes),
            f"{way.peak_bytes / base.peak_bytes:.2f}",
            f"{way.time_ratio:.2f}",
            "" if budget is None else "yes" if way.fits(budget) else "no",
        )
    console.print("[bold]Ways to fine-tune[/] (composed; memory and time beside the first line, predicted)")
    console.print(table)
    for line in (*_fastest_ones(ways, budget), _advice(), *(f"not tried: {reason}" for reason in ways.left_out)):
        console.print(line, highlight=False, markup=False)


def _advice() -> str:
    """What ``research/docs/finetuning.md`` shows."""
    return (
        "where it was measured, on 5,000 images and on 49,000, freezing the lower half cost at most 1.2 and 3.1 points "
        "of accuracy, two local modules 2.0 and 0.9, LoRA 1.0 and 1.9: choose exact gradients where they fit, or try "
        f"some on your images: localgrad finetune {arg('pilot', '5%')}"
    )


def _fastest_ones(ways: Ways, budget: int | None) -> list[str]:
    """The fastest that fits, the fastest with exact gradients, and of those the one that trains all weights."""
    asked = {
        "the fastest that fits": fastest_way(ways.rows, budget),
        "the fastest with exact gradients that fits": fastest_way(ways.rows, budget, is_exact=True),
        "the fastest that fits and trains every weight, with exact gradients": fastest_way(
            ways.rows, budget, is_exact=True, words=(FULL,)
        ),
    }
    return [f"{told}: {'none' if way is None else _way_in_words(way)}" for told, way in asked.items()]


def _way_in_words(way: Way) -> str:
    optimizer = "" if way.optimizer is None else f" {arg('optimizer', way.optimizer)}"
    gradients = "exact" if way.is_exact else "local"
    return f"{arg('method', way.method)}{optimizer}, {way.how} ({gradients} gradients), {way.time_ratio:.2f} x the time"
