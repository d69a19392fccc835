"""A plan as people read it: tables with bars drawn in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from localgrad.errors import arg
from localgrad.partition import Forecast, ModuleForecast, Plan, RanksForecast, Rival, forecast_of
from localgrad.planning.budget import FREE_PERCENT, Candidate, LargestBatch
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
    forecast, made_for = forecast_of(plan), plan.made_for
    size = made_for["input_size"]
    assert isinstance(size, list), "as planning wrote it"
    items = "x".join(map(str, size[1:])) if len(size) > 1 else f"{size[0]} tokens"
    console.print(
        f"[bold]{plan.model}[/], {items}, {made_for['num_classes']} classes, "
        f"batch {made_for['training.batch_size']}, {made_for['execution.precision']}, "
        f"{made_for['training.optimizer']}, {made_for['device']}"
    )
    console.print(_head(plan))
    if forecast.exact is not None:
        console.print(_exact_beside(forecast, forecast.exact), highlight=False, markup=False)
    for line in _on_card(forecast):
        console.print(line, highlight=False, markup=False)
    if forecast.global_peak_bytes is not None:
        console.print(
            f"end-to-end steps recompute {plan.global_checkpoint}, and need {format_bytes(forecast.global_peak_bytes)}"
        )
    scale = max(forecast.peak_bytes, *(row.peak_bytes for row in forecast.rivals))
    if forecast.parallel is not None:
        console.print(_rank_times(plan, forecast.parallel))
        console.print(_rank_memory(forecast.parallel))
    else:
        console.print(_modules(plan, forecast.peak_bytes))
        console.print(_categories(forecast.modules))
    if forecast.budget_parts:
        console.print(_budget_parts(forecast))
    console.print(_table_of_rivals(plan, scale))
    for note in forecast.notes:
        console.print(f"[dim]{note}[/]")


def _budget_parts(forecast: Forecast) -> Table:
    """What a budget includes on a card, each named."""
    table = _table("what the budget includes", "bytes", "")
    most = max(forecast.budget_parts.values())
    for name, nbytes in forecast.budget_parts.items():
        bar = Text("█" * round(WIDTH * nbytes / most), style="dim")
        table.add_row(name, format_bytes(nbytes), bar)
    return table


def _on_card(forecast: Forecast) -> list[str]:
    """Lines about the card, its allocator, and whether the plan was confirmed."""
    if forecast.card is None:
        return []
    assumed = ": assumed, as there is none here and none is named" if forecast.card_is_assumed else ""
    lines = [f"card: {forecast.card}{assumed}; PyTorch's allocator: {forecast.allocator_rules}"]
    if forecast.is_confirmed and forecast.reserved_bytes is not None and forecast.allocated_bytes is not None:
        available = format_bytes(forecast.available_bytes or 0)
        lines.append(
            f"confirmed by a replay of the run's allocations: {format_bytes(forecast.reserved_bytes)} reserved, "
            f"{format_bytes(forecast.allocated_bytes)} allocated, of {available} that the allocator may have"
        )
    else:
        lines.append("not confirmed by a replay of the run's allocations")
    lines += [f"attention: {kernel} ({why})" for kernel, why in forecast.attention.items()]
    return lines


def _head(plan: Plan) -> str:
    """What it is, and what it needs."""
    forecast = forecast_of(plan)
    budget = forecast.budget_bytes
    room = "" if budget is None else f" of a budget of {format_bytes(budget)}"
    parts = f", each batch in {plan.accumulation} parts" if plan.accumulation > 1 else ""
    count = "end-to-end training" if plan.num_modules == 1 else f"{plan.num_modules} local modules"
    count += f" ({'exact' if plan.num_modules == 1 else 'local'} gradients)"
    needs = f"needs {format_bytes(forecast.needed_bytes)}{room}; a step takes"
    ranks = forecast.parallel
    if ranks is None:
        ratio = f"{forecast.time_ratio:.2f} x the time of end-to-end training (predicted)"
        return f"[bold]{count}[/]{parts}: {needs} {ratio}"
    return (
        f"[bold]{count} on {ranks.num_ranks} ranks[/]{parts}, balanced by {ranks.balance}: the largest rank "
        f"{needs} {forecast.time_ratio / ranks.speed_up:.2f} x the time of end-to-end training in one process, "
        f"{ranks.speed_up:.2f} x as fast as this plan in one process (predicted, the wire left out)"
    )


def _exact_beside(forecast: Forecast, exact: Rival) -> str:
    """The best way to exact gradients, in a line."""
    figures = f"{format_bytes(exact.needed_bytes)}, {exact.time_ratio:.2f} x the time"
    guessed = ", by the margin" if forecast.is_confirmed else ""
    if exact.needed_bytes <= (forecast.budget_bytes or 0):
        return f"exact gradients fit too{guessed}: {exact.name}, {figures}; plan it with {arg('gradients', 'exact')}"
    on = f"{arg('gradients', 'exact')} tries parts of batches, too"
    return f"exact gradients don't fit with whole batches{guessed}: the least is {exact.name}, {figures}; {on}"


def _modules(plan: Plan, scale: int) -> Table:
    table = _table("module", "blocks", "from", "recomputes", "peak", "")
    forecast = forecast_of(plan)
    for index, (span, module) in enumerate(zip(plan.spans, forecast.modules, strict=True)):
        sets_peak = plan.num_modules > 1 and index == forecast.peak_module
        table.add_row(
            f"{index}{' *' if sets_peak else ''}",
            _blocks(span),
            module.first_block,
            module.checkpoint,
            format_bytes(module.peak_bytes),
            _bar(_figures(module), scale, COLOURS),
        )
    if plan.num_modules > 1:
        table.caption = "* sets the peak"
    return table


def _blocks(span: range) -> str:
    return f"{span.start}-{span.stop - 1}" if len(span) > 1 else str(span.start)


def _rank_times(plan: Plan, forecast: RanksForecast) -> Table:
    ranks, modules = forecast.ranks, forecast_of(plan).modules
    table = _table("rank", "blocks", "from", "recomputes", "time", "")
    most = max(row.time_share for row in ranks)
    for index, (span, module, row) in enumerate(zip(plan.spans, modules, ranks, strict=True)):
        share = row.time_share
        bar = Text("█" * max(1, round(WIDTH * share / most)), style="green")
        sets_speed = " *" if share == most and len(ranks) > 1 else ""
        table.add_row(f"{index}{sets_speed}", _blocks(span), module.first_block, module.checkpoint, f"{share:.1%}", bar)
    if len(ranks) > 1:
        table.caption = "* the slowest rank sets the speed"
    return table


RANK_PARTS = {"static": "blue", "step": "green", "buffers": "white"}
"""Columns of what a rank needs, and their colours in bars."""


def _rank_memory(forecast: RanksForecast) -> Table:
    table = _table("rank", *RANK_PARTS, "peak", "", "sends a step")
    sent = [*map(format_bytes, forecast.sent_bytes), ""]
    for index, (row, packet) in enumerate(zip(forecast.ranks, sent, strict=True)):
        parts = {"static": row.static_bytes, "step": row.step_bytes, "buffers": row.buffer_bytes}
        figures = [Text(format_bytes(nbytes), style=RANK_PARTS[name]) for name, nbytes in parts.items()]
        bar = _bar(parts, forecast.peak_bytes, RANK_PARTS)
        table.add_row(str(index), *figures, format_bytes(row.peak_bytes), bar, packet)
    table.caption = f"buffers: all full, {forecast.num_buffers} batches on their way at each end of a link"
    return table


def _categories(modules: Sequence[ModuleForecast]) -> Table:
    table = _table("at its peak", *COLUMNS)
    for index, module in enumerate(modules):
        figures = [Text(format_bytes(nbytes), style=COLUMNS[name][1]) for name, nbytes in _figures(module).items()]
        table.add_row(f"module {index}", *figures)
    return table


def _figures(module: ModuleForecast) -> dict[str, int]:
    """Bytes by column of a module at its peak."""
    return {
        column: sum(module.by_category[category] for category in categories)
        for column, (categories, _) in COLUMNS.items()
    }


def _table_of_rivals(plan: Plan, scale: int) -> Table:
    table = _table("what it would need", "peak", "", "x memory", "x time")
    forecast = forecast_of(plan)
    ranks, ratio = forecast.parallel, forecast.time_ratio
    own = "this plan" if ranks is None else "this plan, in one process"
    rows = [*forecast.rivals, Rival(name=own, peak_bytes=forecast.peak_bytes, time_ratio=ratio)]
    if ranks is not None:
        largest = Rival(name="this plan, largest rank", peak_bytes=ranks.peak_bytes, time_ratio=ratio / ranks.speed_up)
        rows.append(largest)
    for row in rows:
        nbytes = row.peak_bytes
        bar = Text("█" * max(1, round(WIDTH * nbytes / scale)), style="green" if row is rows[-1] else "dim")
        share = f"{nbytes / rows[0].peak_bytes:.3f}"
        table.add_row(row.name, format_bytes(nbytes), bar, share, f"{row.time_ratio:.2f}")
    return table


def print_frontier(rows: Sequence[Candidate], console: Console) -> None:
    """Print all plans worth having, fastest first."""
    table = _table("modules", "boundaries", "recomputes", "peak", "", "x memory", "x time")
    base = max(row.peak_bytes for row in rows)
    for row in rows:
        table.add_row(
            str(len(row.checkpoint)),
            ",".join(map(str, row.boundaries)) or "none",
            _recomputed(list(map(str, row.checkpoint))),
            format_bytes(row.peak_bytes),
            Text("█" * max(1, round(WIDTH * row.peak_bytes / base)), style="green"),
            f"{row.peak_bytes / base:.3f}",
            f"{row.time_ratio:.2f}",
        )
    console.print("[bold]Plans worth having[/] (composed figures; x the largest peak, x end-to-end time)")
    console.print(table)


def _recomputed(ways: Sequence[str]) -> str:
    """Which modules recompute what: ``0 halves/8, 1 halves:2``."""
    return ", ".join(f"{index} {way}" for index, way in enumerate(ways) if way != "none") or "nothing"


def print_batches(rows: Sequence[LargestBatch], console: Console) -> None:
    """Print the largest batch of every method."""
    table = _table("method", "batch", "", "x time")
    most = max(row.batch_size for row in rows) or 1
    for row in rows:
        ratio = "" if row.time_ratio is None else f"{row.time_ratio:.2f}"
        bar = Text("█" * round(WIDTH * row.batch_size / most), style="green")
        table.add_row(row.name, str(row.batch_size), bar, ratio)
    console.print(
        f"[bold]The largest batch that fits[/], {FREE_PERCENT} % left free (time for an image, x end-to-end training)"
    )
    console.print(table)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", caption_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in ("", *LEFT) else "right", no_wrap=name not in WRAPPED)
    return table


WRAPPED = ("recomputes", "boundaries")
LEFT = (
    *WRAPPED,
    "module",
    "rank",
    "blocks",
    "from",
    "at its peak",
    "what it would need",
    "what the budget includes",
    "method",
    "modules",
)


def _bar(figures: dict[str, int], scale: int, colours: dict[str, str]) -> Text:
    """One bar, a coloured run for each column; runs end where the running sum does, so that they add up."""
    bar, done, total = Text(), 0, 0
    for column, nbytes in figures.items():
        total += nbytes
        end = round(WIDTH * total / scale)
        bar.append("█" * (end - done), style=colours[column])
        done = end
    return bar
