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
COLOURS = {name: colour for name, (_, colour) in COLUMNS.items()}


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan with its forecast: modules or ranks, rivals, notes."""
    forecast, made_for = plan.forecast, plan.made_for
    console.print(
        f"[bold]{plan.model}[/], {'x'.join(map(str, made_for['input_size'][1:]))}, {made_for['num_classes']} classes, "
        f"batch {made_for['training.batch_size']}, {made_for['execution.precision']}, "
        f"{made_for['training.optimizer']}, {made_for['device']}"
    )
    console.print(_head(plan))
    if "global_checkpoint" in forecast:
        console.print(
            f"end-to-end steps recompute {forecast['global_checkpoint']}, and need "
            f"{format_bytes(forecast['global_peak_bytes'])}"
        )
    scale = max(forecast["peak_bytes"], *(row["peak_bytes"] for row in forecast["rivals"]))
    if "parallel" in forecast:
        console.print(_rank_times(plan))
        console.print(_rank_memory(plan))
    else:
        console.print(_modules(plan, forecast["peak_bytes"]))
        console.print(_categories(plan))
    console.print(_table_of_rivals(plan, scale))
    for note in forecast["notes"]:
        console.print(f"[dim]{note}[/]")


def _head(plan: Plan) -> str:
    """What it is, and what it needs."""
    forecast = plan.forecast
    budget = forecast["budget_bytes"]
    room = "" if budget is None else f" of a budget of {format_bytes(budget)}"
    parts = f", each batch in {plan.accumulation} parts" if plan.accumulation > 1 else ""
    count = "end-to-end training" if plan.num_modules == 1 else f"{plan.num_modules} local modules"
    needs = f"needs {format_bytes(forecast['needed_bytes'])}{room}; a step takes"
    if "parallel" not in forecast:
        ratio = f"{forecast['time_ratio']:.2f} x the time of end-to-end training (predicted)"
        return f"[bold]{count}[/]{parts}: {needs} {ratio}"
    ranks = forecast["parallel"]
    return (
        f"[bold]{count} on {ranks['num_ranks']} ranks[/]{parts}, balanced by {ranks['balance']}: the largest rank "
        f"{needs} {forecast['time_ratio'] / ranks['speed_up']:.2f} x the time of end-to-end training in one process, "
        f"{ranks['speed_up']:.2f} x as fast as this plan in one process (predicted, the wire left out)"
    )


def _modules(plan: Plan, scale: int) -> Table:
    table = _table("module", "blocks", "from", "recomputes", "peak", "")
    for index, (span, module) in enumerate(zip(plan.spans, plan.forecast["modules"], strict=True)):
        sets_peak = plan.num_modules > 1 and index == plan.forecast["peak_module"]
        table.add_row(
            f"{index}{' *' if sets_peak else ''}",
            _blocks(span),
            module["first_block"],
            module["checkpoint"],
            format_bytes(module["peak_bytes"]),
            _bar(_figures(module), scale, COLOURS),
        )
    if plan.num_modules > 1:
        table.caption = "* sets the peak"
    return table


def _blocks(span: range) -> str:
    return f"{span.start}-{span.stop - 1}" if len(span) > 1 else str(span.start)


def _rank_times(plan: Plan) -> Table:
    ranks = plan.forecast["parallel"]["ranks"]
    table = _table("rank", "blocks", "from", "recomputes", "time", "")
    most = max(row["time_share"] for row in ranks)
    for index, (span, module, row) in enumerate(zip(plan.spans, plan.forecast["modules"], ranks, strict=True)):
        share = row["time_share"]
        bar = Text("█" * max(1, round(WIDTH * share / most)), style="green")
        sets_speed = " *" if share == most and len(ranks) > 1 else ""
        table.add_row(
            f"{index}{sets_speed}", _blocks(span), module["first_block"], module["checkpoint"], f"{share:.1%}", bar
        )
    if len(ranks) > 1:
        table.caption = "* the slowest rank sets the speed"
    return table


RANK_PARTS = {"static": ("static_bytes", "blue"), "step": ("step_bytes", "green"), "buffers": ("buffer_bytes", "white")}
"""Column -> the key of what a rank needs, and its colour in bars."""


def _rank_memory(plan: Plan) -> Table:
    forecast = plan.forecast["parallel"]
    table = _table("rank", *RANK_PARTS, "peak", "", "sends a step")
    scale = max(row["peak_bytes"] for row in forecast["ranks"])
    sent = [*map(format_bytes, forecast["sent_bytes"]), ""]
    for index, (row, packet) in enumerate(zip(forecast["ranks"], sent, strict=True)):
        parts = {name: row[key] for name, (key, _) in RANK_PARTS.items()}
        figures = [Text(format_bytes(nbytes), style=RANK_PARTS[name][1]) for name, nbytes in parts.items()]
        bar = _bar(parts, scale, {name: colour for name, (_, colour) in RANK_PARTS.items()})
        table.add_row(str(index), *figures, format_bytes(row["peak_bytes"]), bar, packet)
    table.caption = f"buffers: all full, {forecast['num_buffers']} batches on their way at each end of a link"
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


def _table_of_rivals(plan: Plan, scale: int) -> Table:
    table = _table("what it would need", "peak", "", "x memory", "x time")
    base = plan.forecast["rivals"][0]["peak_bytes"]
    own = {"name": "this plan", **{key: plan.forecast[key] for key in ("peak_bytes", "time_ratio")}}
    found = [own]
    if "parallel" in plan.forecast:
        ranks = plan.forecast["parallel"]
        largest = max(row["peak_bytes"] for row in ranks["ranks"])
        ratio = own["time_ratio"] / ranks["speed_up"]
        found = [
            {**own, "name": "this plan, in one process"},
            {"name": "this plan, largest rank", "peak_bytes": largest, "time_ratio": ratio},
        ]
    for row in (*plan.forecast["rivals"], *found):
        nbytes = row["peak_bytes"]
        bar = Text("█" * max(1, round(WIDTH * nbytes / scale)), style="green" if row is found[-1] else "dim")
        share = f"{nbytes / base:.3f}"
        table.add_row(row["name"], format_bytes(nbytes), bar, share, f"{row['time_ratio']:.2f}")
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
LEFT = (*WRAPPED, "module", "rank", "blocks", "from", "at its peak", "what it would need", "method", "modules")


def _bar(figures: dict[str, int], scale: int, colours: dict[str, str]) -> Text:
    """One bar, a coloured run for each column; runs end where the running sum does, so that they add up."""
    bar, done, total = Text(), 0, 0
    for column, nbytes in figures.items():
        total += nbytes
        end = round(WIDTH * total / scale)
        bar.append("█" * (end - done), style=colours[column])
        done = end
    return bar
