"""A table of results as a picture: test accuracy against peak memory, a point a method, with its spread over seeds.

matplotlib (extra ``plots``) is used by its objects, as in ``localgrad/compare/plots.py``. What was run on another kind
of device, or on other copies of the images, isn't drawn beside the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localgrad.compare.plots import GREY, check_path
from localgrad.errors import RecipeError
from research.reproduce.methods import BASELINES, END_TO_END
from research.reproduce.profiles import Profile
from research.reproduce.report import Group, alike, groups_of, is_current, peak_ratio
from research.reproduce.results import Row, load_rows, path_of
from research.reproduce.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_STYLES = {1: ("#000000", "o"), 2: ("#009E73", "D"), 3: ("#E69F00", "v"), 4: ("#0072B2", "^")}
_OTHER = "#CC79A7", "s"


def draw(table: Table, profile: Profile, results: Path, path: Path) -> str:
    """Draw what was run of a table for its most frequent data set; give a line that says what.

    Raises:
        RecipeError: nothing was run yet, matplotlib is missing, or the file can't be written.
    """
    check_path("plot", path)
    rows = [row for row in load_rows(path_of(results, table.name, profile.name)) if is_current(table, profile, row)]
    lots = [[row for row in lot if row["data"] == data] for lot in alike(rows) for data in table.data]
    if not rows:
        raise RecipeError(
            f"--plot: nothing of {table.name} was run in the profile {profile.name}; type "
            f"python -m research.reproduce {table.name} --profile {profile.name} first."
        )
    largest = max(lots, key=len)
    groups = [group for group in groups_of(table, profile, largest) if group.rows]
    _picture(groups, largest, profile, path)
    return f"{path}: {len(groups)} of {len({_name(group) for group in groups_of(table, profile, rows)})} methods"


def _picture(groups: Sequence[Group], rows: Sequence[Row], profile: Profile, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    base = next((group for group in groups if group.method == END_TO_END), None)
    for group in groups:
        _point(axes, group, base)
    axes.margins(y=0.12)
    axes.set_xlim(0, 1.2 * max(peak_ratio(group, base) for group in groups))
    figure.draw_without_rendering()
    _label(axes, {_name(group): (peak_ratio(group, base), _accuracy(group)) for group in groups})
    if base is not None:
        axes.axhline(_accuracy(base), color=GREY, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    told = sorted({row["data"] for row in rows})
    counts = sorted({f"{row['num_train']:,}" for row in rows})
    axes.set_title(f"{', '.join(told)}, {', '.join(counts)} images; profile {profile.name}", loc="left")
    axes.set_xlabel("peak memory of a step, estimated (x end-to-end training)")
    axes.set_ylabel("test accuracy (%); bars: sample standard deviation over seeds")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else {"Software": None})


def _point(axes: Axes, group: Group, base: Group | None) -> None:
    colour, marker = _STYLES.get(group.modules, _OTHER)
    found = [100 * row["test_accuracy"] for row in group.rows]
    x, y = peak_ratio(group, base), _accuracy(group)
    spread = statistics.stdev(found) if len(found) > 1 else None
    known = axes.get_legend_handles_labels()[1]
    label = "end-to-end gradients" if group.modules == 1 else f"{group.modules} local modules"
    axes.errorbar(
        *([x], [y], None if spread is None else [spread]),
        fmt=marker,
        color=colour,
        capsize=3,
        label="_" if label in known else label,
    )


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Name each point beside it, where no other name or point is, if there is such a place."""
    taken = [axes.transData.transform(point) for point in points.values()]
    boxes: list[Bbox] = []
    for name, point in sorted(points.items(), key=lambda item: item[1]):
        for offset in ((7, 4), (7, -12), (-7, 4), (-7, -12), (7, 16), (7, -24)):
            side = "left" if offset[0] > 0 else "right"
            text = axes.annotate(name, point, xytext=offset, textcoords="offset points", fontsize=8, ha=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in boxes) and not any(box.contains(*at) for at in taken):
                break
            if offset != (7, -24):
                text.remove()
        boxes.append(box)


def _name(group: Group) -> str:
    return group.method if group.method in BASELINES else f"{group.method}, K = {group.modules}"


def _accuracy(group: Group) -> float:
    return statistics.fmean(100 * row["test_accuracy"] for row in group.rows)
