"""Two pictures of a comparison: the trade-off of peak memory against step time, and the memory timeline.

matplotlib (extra ``plots``) is used by its objects, on the Agg and SVG canvases: no global state, no window. Colours
are Okabe and Ito's, which people with any colour vision can tell apart; shapes say the same once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localgrad.compare.side_by_side import Comparison, Row
from localgrad.errors import RecipeError, arg
from localgrad.formats import check_output_file
from localgrad.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
FAMILIES = {  # colour, marker, words for the legend
    "end-to-end": ("#000000", "o", "end-to-end"),
    "recomputed": ("#D55E00", "s", "end-to-end, activations recomputed"),
    "local": ("#0072B2", "^", "local modules"),
    "local, recomputed": ("#009E73", "D", "local modules, activations recomputed"),
}
LINES = ("#000000", "#D55E00", "#0072B2", "#009E73")
FRONT, GREY = "#CC79A7", "#666666"
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def check_path(name: str, path: Path) -> None:
    """Refuse a picture that couldn't be written, before there is anything to lose.

    Raises:
        RecipeError: not PNG or SVG, or no such folder, or it can't be written; or matplotlib isn't installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise RecipeError(
            f"{arg(name)}: pictures need matplotlib, which isn't installed; pip install 'localgrad[plots]'."
        ) from None
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(f"{arg(name)}: {str(path)!r} is neither .png nor .svg; take {path.stem or 'plot'}.png.")
    check_output_file(name, path)


def plot_trade_off(comparison: Comparison, path: Path) -> None:
    """Draw peak memory against step time: every method a numbered point, the Pareto front as a step line.

    Whatever lies on the line or above it to the right can be had; nothing below it was found.
    """
    figure, axes = _figure(comparison, "Peak memory against step time", right=0.66)
    numbered = [(number, row) for number, row in enumerate(comparison.rows, 1) if _is_point(row)]
    unit, size = _unit(max((row.peak_bytes or 0 for _, row in numbered), default=0))
    for _, row in numbered:
        _draw_point(axes, row, size)
    _set_limits(axes, [row for _, row in numbered], size)
    for precision in dict.fromkeys(row.precision for _, row in numbered):
        _draw_front(axes, [row for _, row in numbered if row.precision == precision], size)
    axes.set_xlabel("time per step (seconds)")
    axes.set_ylabel(f"measured peak memory of a step ({unit})")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    bases = [row for _, row in numbered if row.name == row.baseline]
    if len({row.precision for _, row in numbered}) == 1 and bases and bases[0].step_seconds:
        _add_ratio_axes(axes, bases[0], size)
    _draw_legend(axes, [row for _, row in numbered])
    _list_rows(axes, numbered)
    _place_numbers(figure, axes, [(str(number), *_point_of(row, size)) for number, row in numbered])
    _save(figure, path)


def plot_timeline(comparison: Comparison, path: Path) -> None:
    """Draw bytes alive over one step, as estimated: the end-to-end mountain against the local sawtooth."""
    figure, axes = _figure(comparison, "Memory over one training step (estimated)", right=0.97)
    highest = max((nbytes for timeline in comparison.timelines.values() for _, nbytes in timeline), default=1)
    unit, size = _unit(highest)
    for index, (name, timeline) in enumerate(comparison.timelines.items()):
        colour = LINES[index % len(LINES)]
        shares, alive = [100 * share for share, _ in timeline], [nbytes / size for _, nbytes in timeline]
        peak = max(nbytes for _, nbytes in timeline)
        axes.fill_between(shares, alive, step="post", color=colour, alpha=0.1, linewidth=0)
        axes.step(shares, alive, where="post", color=colour, linewidth=1.6, label=f"{name} ({format_bytes(peak)})")
        axes.axhline(peak / size, color=colour, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_ylim(0, 1.06 * highest / size)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the step's own operators (%)")
    axes.set_ylabel(f"memory of tensors alive ({unit}); dotted: the peak")
    if comparison.timelines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    _save(figure, path)


def _unit(nbytes: int) -> tuple[str, int]:
    """The largest unit in which an amount is at least 1."""
    return next(((name, size) for name, size in UNITS if nbytes >= size), UNITS[-1])


def _figure(comparison: Comparison, what: str, *, right: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    about = comparison.about
    figure = Figure(figsize=(10, 6), dpi=150)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle(f"{what}: {about.get('model', 'model')}", x=0.02, y=0.985, ha="left", fontsize=14)
    known = (f"batch {about.get('batch_size')}", about.get("device"), about.get("date"))
    figure.text(0.02, 0.915, ", ".join(str(item) for item in known if item), fontsize=9.5, color=GREY)
    figure.subplots_adjust(left=0.08, right=right, top=0.84, bottom=0.19)
    return figure, axes


def _is_point(row: Row) -> bool:
    return row.step_seconds is not None and row.measured_peak_bytes is not None


def _point_of(row: Row, size: int) -> tuple[float, float]:
    assert row.step_seconds is not None
    assert row.peak_bytes is not None
    return row.step_seconds, row.peak_bytes / size


def _spread_of(row: Row) -> tuple[float, float]:
    """Seconds at the least and the greatest time ratio, in which the point itself lies."""
    assert row.step_seconds is not None
    if not (row.time_ratio and row.time_ratio_range):
        return row.step_seconds, row.step_seconds
    scale = row.step_seconds / row.time_ratio
    return row.time_ratio_range[0] * scale, row.time_ratio_range[1] * scale


def _draw_point(axes: Axes, row: Row, size: int) -> None:
    colour, marker, _ = FAMILIES[row.family]
    x, y = _point_of(row, size)
    least, most = _spread_of(row)
    axes.errorbar(
        x, y, xerr=[[max(0.0, x - least)], [max(0.0, most - x)]], color=colour, alpha=0.4, linewidth=1, capsize=2.5
    )
    face = colour if row.is_pareto else "white"
    axes.plot(x, y, marker=marker, markersize=8, color=colour, markerfacecolor=face, markeredgewidth=1.6, zorder=3)


def _draw_front(axes: Axes, rows: Sequence[Row], size: int) -> None:
    """The border of what can be had, to the edges of the axes."""
    front = sorted(_point_of(row, size) for row in rows if row.is_pareto)
    if front:
        times, peaks = zip(*front, strict=True)
        right, top = axes.get_xlim()[1], axes.get_ylim()[1]
        axes.step(
            [times[0], *times, right],
            [top, *peaks, peaks[-1]],
            where="post",
            color=FRONT,
            linewidth=2.5,
            alpha=0.75,
            zorder=1,
            gid="pareto-front",
        )


def _set_limits(axes: Axes, rows: Sequence[Row], size: int) -> None:
    if not rows:
        return
    times = [time for row in rows for time in _spread_of(row)]
    margin = 0.06 * (max(times) - min(times)) or 0.1 * max(times)
    axes.set_xlim(max(0.0, min(times) - margin), max(times) + margin)
    axes.set_ylim(0, 1.1 * max(_point_of(row, size)[1] for row in rows))


def _add_ratio_axes(axes: Axes, base: Row, size: int) -> None:
    """Both scales once more, as multiples of end-to-end."""
    seconds, peak = _point_of(base, size)
    top = axes.secondary_xaxis("top", functions=_scaling(seconds))
    right = axes.secondary_yaxis("right", functions=_scaling(peak))
    top.xaxis.set_major_formatter("{x:g} x")
    right.yaxis.set_major_formatter("{x:g} x")
    for scale in (top, right):
        scale.tick_params(labelsize=8, colors=GREY, length=2)
        scale.spines[:].set_visible(False)


def _scaling(unit: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return lambda value: value / unit, lambda value: value * unit


def _draw_legend(axes: Axes, rows: Sequence[Row]) -> None:
    """What shapes mean, below the axes."""
    from matplotlib.lines import Line2D

    present = {row.family for row in rows}
    keys = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=words)
        for family, (colour, marker, words) in FAMILIES.items()
        if family in present
    ]
    front = Line2D([], [], color=FRONT, linewidth=2.5, label="Pareto front (filled points)")
    axes.legend(
        handles=[*keys, front], loc="upper center", bbox_to_anchor=(0.7, -0.12), ncols=3, frameon=False, fontsize=8.5
    )


def _list_rows(axes: Axes, numbered: Sequence[tuple[int, Row]]) -> None:
    """Names by number, to the right of the axes."""
    size = 9.5 if len(numbered) <= 20 else 9.5 * 20 / len(numbered)
    step = 0.049 * size / 9.5
    for place, (number, row) in enumerate(numbered):
        write = partial(axes.text, transform=axes.transAxes, fontsize=size, va="top", clip_on=False)
        colour = FAMILIES[row.family][0]
        weight = "bold" if row.is_pareto else "normal"
        height = 1.0 - place * step
        write(1.12, height, str(number), color=colour, weight=weight, ha="right")
        write(1.135, height, row.name, color=colour, weight=weight, ha="left")


def _place_numbers(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each point's number beside it, where it hides neither another number nor a point; far ones get a line."""
    scale = figure.dpi / 72
    centres = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken = list(centres)
    offsets = [
        (radius * dx, radius * dy)
        for radius in (11, 18, 26, 35, 46)
        for dx, dy in ((0.75, 0.75), (-0.75, 0.75), (0.75, -0.75), (-0.75, -0.75), (0, 1), (0, -1), (1, 0), (-1, 0))
    ]
    for (text, x, y), centre in zip(points, centres, strict=True):

        def room(offset: tuple[float, float], centre: tuple[Any, ...] = centre) -> float:
            at = centre[0] + offset[0] * scale, centre[1] + offset[1] * scale
            inside = axes.get_window_extent().contains(*at)
            nearest = min(((at[0] - u) ** 2 + (at[1] - v) ** 2) ** 0.5 / scale for u, v in taken)
            return min(nearest, 10.0) if inside else -1.0

        offset = max(offsets, key=room)  # the first of those with room enough, which is the nearest
        taken.append((centre[0] + offset[0] * scale, centre[1] + offset[1] * scale))
        is_far = offset[0] ** 2 + offset[1] ** 2 > 13**2
        axes.annotate(
            text,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 4} if is_far else None,
        )


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "localgrad"}):  # letters stay letters
        figure.savefig(path, format=path.suffix.lower()[1:], bbox_inches="tight", pad_inches=0.15)
