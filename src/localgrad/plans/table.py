"""A plan as people read it: tables with bars drawn in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from localgrad.partition import Plan
from localgrad.units import format_bytes

WIDTH = 16  # characters of the longest bar
COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "weights": (("parameters", "buffers"), "blue"),
    "optimizer": (("optimizer",), "cyan"),
    "gradients": (("gradients",), "magenta"),
    "activations": (("activations",), "green"),
    "temporary": (("temporary",), "yellow"),
    "inputs": (("inputs",), "white"),
}
"""Column -> the tracker's categories in it, and its colour in bars."""


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan with its forecast: modules, rivals, notes."""
    forecast, made_for = plan.forecast, plan.made_for
    budget = forecast["budget_bytes"]
    room = "" if budget is None else f" of a budget of {format_bytes(budget)}"
    parts = f", each batch in {plan.accumulation} parts" if plan.accumulation > 1 else ""
    count = "end-to-end training" if plan.num_modules == 1 else f"{plan.num_modules} local modules"
    console.print(
        f"[bold]{plan.model}[/], {'x'.join(map(str, made_for['input_size'][1:]))}, {made_for['num_classes']} classes, "
        f"batch {made_for['training.batch_size']}, {made_for['execution.precision']}, "
        f"{made_for['training.optimizer']}, {made_for['device']}"
    )
    console.print(
        f"[bold]{count}[/]{parts}: needs {format_bytes(forecast['needed_bytes'])}{room}; "
        f"a step takes {forecast['time_ratio']:.2f} x the time of end-to-end training (predicted)"
    )
    if "global_checkpoint" in forecast:
        console.print(
            f"end-to-end steps recompute {forecast['global_checkpoint']}, and need "
            f"{format_bytes(forecast['global_peak_bytes'])}"
        )
    scale = max(forecast["peak_bytes"], *(row["peak_bytes"] for row in forecast["rivals"]))
    console.print(_modules(plan, forecast["peak_bytes"]))
    console.print(_categories(plan))
    console.print(_rivals(plan, scale))
    for note in forecast["notes"]:
        console.print(f"[dim]{note}[/]")


def _modules(plan: Plan, scale: int) -> Table:
    table = _table("module", "blocks", "from", "recomputes", "peak", "")
    for index, (span, module) in enumerate(zip(plan.spans, plan.forecast["modules"], strict=True)):
        sets_peak = plan.num_modules > 1 and index == plan.forecast["peak_module"]
        table.add_row(
            f"{index}{' *' if sets_peak else ''}",
            f"{span.start}-{span.stop - 1}" if len(span) > 1 else str(span.start),
            module["first_block"],
            module["checkpoint"],
            format_bytes(module["peak_bytes"]),
            _bar(_figures(module), scale),
        )
    if plan.num_modules > 1:
        table.caption = "* sets the peak"
    return table


def _categories(plan: Plan) -> Table:
    table = _table("at its peak", *COLUMNS)
    for index, module in enumerate(plan.forecast["modules"]):
        figures = [Text(format_bytes(nbytes), style=COLUMNS[name][1]) for name, nbytes in _figures(module).items()]
        table.add_row(f"module {index}", *figures)
    return table


def _figures(module: dict[str, Any]) -> dict[str, int]:
    """Bytes by column of a module at its peak."""
    return {
        column: sum(module["by_category"][category] for category in categories)
        for column, (categories, _) in COLUMNS.items()
    }


def _rivals(plan: Plan, scale: int) -> Table:
    table = _table("what it would need", "peak", "", "x memory", "x time")
    base = plan.forecast["rivals"][0]["peak_bytes"]
    own = {"name": "this plan", **{key: plan.forecast[key] for key in ("peak_bytes", "time_ratio")}}
    for row in (*plan.forecast["rivals"], own):
        nbytes = row["peak_bytes"]
        bar = Text("█" * max(1, round(WIDTH * nbytes / scale)), style="green" if row is own else "dim")
        ratio = f"{nbytes / base:.3f}"
        table.add_row(row["name"], format_bytes(nbytes), bar, ratio, f"{row['time_ratio']:.2f}")
    return table


def print_frontier(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print all plans worth having, fastest first."""
    table = _table("modules", "boundaries", "recomputes", "peak", "", "x memory", "x time")
    base = max(row["peak_bytes"] for row in rows)
    for row in rows:
        table.add_row(
            str(row["num_modules"]),
            ",".join(map(str, row["boundaries"])) or "none",
            _recomputed(row["checkpoint"]),
            format_bytes(row["peak_bytes"]),
            Text("█" * max(1, round(WIDTH * row["peak_bytes"] / base)), style="green"),
            f"{row['peak_bytes'] / base:.3f}",
            f"{row['time_ratio']:.2f}",
        )
    console.print("[bold]Plans worth having[/] (composed figures; x the largest peak, x end-to-end time)")
    console.print(table)


def _recomputed(ways: Sequence[str]) -> str:
    """Which modules recompute what: ``0 halves/8, 1 halves:2``."""
    return ", ".join(f"{index} {way}" for index, way in enumerate(ways) if way != "none") or "nothing"


def print_batches(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the largest batch of every method."""
    table = _table("method", "batch", "", "x time")
    most = max(row["batch_size"] for row in rows) or 1
    for row in rows:
        ratio = "" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}"
        bar = Text("█" * round(WIDTH * row["batch_size"] / most), style="green")
        table.add_row(row["name"], str(row["batch_size"]), bar, ratio)
    console.print("[bold]The largest batch that fits[/] (time for an image, x end-to-end training)")
    console.print(table)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", caption_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in ("", *LEFT) else "right", no_wrap=name not in WRAPPED)
    return table


WRAPPED = ("recomputes", "boundaries")
LEFT = (*WRAPPED, "module", "blocks", "from", "at its peak", "what it would need", "method", "modules")


def _bar(figures: dict[str, int], scale: int) -> Text:
    """One bar, a coloured run for each column; runs end where the running sum does, so that they add up."""
    bar, done, total = Text(), 0, 0
    for column, nbytes in figures.items():
        total += nbytes
        end = round(WIDTH * total / scale)
        bar.append("█" * (end - done), style=COLUMNS[column][1])
        done = end
    return bar
