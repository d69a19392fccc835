"""Pictures of accuracy against peak memory: panels side by side, a point a method, with its spread over seeds.

matplotlib (extra ``plots``) is used by its objects, as in ``localgrad/compare/plots.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localgrad.compare.plots import GREY, check_path

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

EXACT, RECOMPUTED, IN_PART = "end-to-end gradients", "the same, recomputed", "in part (frozen, LoRA)"
_STYLES = {
    EXACT: ("#000000", "o"),
    RECOMPUTED: ("#D55E00", "s"),
    IN_PART: ("#666666", "P"),
    "2 local modules": ("#009E73", "D"),
    "3 local modules": ("#E69F00", "v"),
    "4 local modules": ("#0072B2", "^"),
}
_OTHER = "#CC79A7", "X"
_PLACES = ((7, 4), (7, -12), (-7, 4), (-7, -12), (7, 16), (-7, 16), (7, -24), (-7, -24))


def family_of(modules: int, *, is_recomputed: bool = False, is_in_part: bool = False) -> str:
    """What a method is drawn and listed as."""
    if modules > 1:
        return f"{modules} local modules"
    return IN_PART if is_in_part else RECOMPUTED if is_recomputed else EXACT


@dataclass(frozen=True)
class Point:
    """A method.

    Attributes:
        name: that stands beside it.
        family: as of ``family_of``.
        memory: of a step, as a share of end-to-end training's.
        accuracies: on the test set, in percent, of each seed.
    """

    name: str
    family: str
    memory: float
    accuracies: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """The mean."""
        return statistics.fmean(self.accuracies)

    @property
    def label(self) -> str:
        """Name and accuracy."""
        return f"{self.name} ({self.accuracy:.1f})"


@dataclass(frozen=True)
class Panel:
    """A title, and methods that were run on the same images."""

    title: str
    points: tuple[Point, ...]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels side by side.

    Raises:
        RecipeError: matplotlib is missing, or the file can't be written.
    """
    check_path("plot", path)
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7 * columns + 1, 5 * lines + 1), dpi=150, layout="constrained")
    grid = figure.add_gridspec(lines, columns)
    places = [figure.add_subplot(grid[number // columns, number % columns]) for number in range(len(panels))]
    shown: dict[str, Artist] = {}
    for axes, panel in zip(places, panels, strict=True):
        shown |= _points(axes, panel)
    for axes in places[::columns]:
        axes.set_ylabel("test accuracy (%); bars: sample standard deviation")
    for axes in places[-columns:]:
        axes.set_xlabel("peak memory of a step (x end-to-end training)")
    listed = [name for name in _STYLES if name in shown] + [name for name in shown if name not in _STYLES]
    handles = [shown[name] for name in listed]
    figure.legend(handles, listed, loc="outside lower center", ncols=3 * columns, frameon=False)
    figure.draw_without_rendering()
    for axes, panel in zip(places, panels, strict=True):
        _label(axes, panel.points)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "localgrad"}):  # letters stay letters
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else {"Software": None})


def _points(axes: Axes, panel: Panel) -> dict[str, Artist]:
    """Draw a panel; give a point of each family."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    shown: dict[str, Artist] = {}
    for point in panel.points:
        colour, marker = _STYLES.get(point.family, _OTHER)
        spread = [statistics.stdev(point.accuracies)] if len(point.accuracies) > 1 else None
        axes.errorbar([point.memory], [point.accuracy], spread, fmt="none", ecolor=colour, capsize=3)
        shown[point.family] = axes.scatter([point.memory], [point.accuracy], color=colour, marker=marker, zorder=3)
        if point.family == EXACT:
            axes.axhline(point.accuracy, color=GREY, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    axes.margins(y=0.12)
    axes.set_xlim(0, 1.25 * max(point.memory for point in panel.points))
    axes.set_title(panel.title, loc="left")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    return shown


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Name each point beside it, where no other name or point is, if there is such a place."""
    at = {point: (point.memory, point.accuracy) for point in points}
    taken = [axes.transData.transform(place) for place in at.values()]
    boxes: list[Bbox] = []
    for point, place in sorted(at.items(), key=lambda item: item[1]):
        for offset in _PLACES:
            side = "left" if offset[0] > 0 else "right"
            text = axes.annotate(point.label, place, xytext=offset, textcoords="offset points", fontsize=8, ha=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in boxes) and not any(box.contains(*other) for other in taken):
                break
            if offset != _PLACES[-1]:
                text.remove()
        boxes.append(box)
