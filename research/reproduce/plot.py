"""A table of results as a panel: what was run for its most frequent data set.

What was run on another kind of device, or on other copies of the images, isn't drawn beside the rest. Training that
recomputes every block stands at end-to-end training's accuracy, which it has to the bit, where its memory was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from localgrad.errors import RecipeError
from research import panels
from research.panels import Panel, Point, family_of
from research.reproduce.costs import RECOMPUTED, TABLE, costs_of, path_of_costs
from research.reproduce.methods import BASELINES, END_TO_END, overlay_of
from research.reproduce.profiles import Profile
from research.reproduce.report import Group, alike, groups_of, is_current, peak_ratio
from research.reproduce.results import Row, load_rows, path_of
from research.reproduce.tables import TABLES, Table


def draw(table: Table, profile: Profile, results: Path, path: Path) -> str:
    """Draw what was run of a table; give a line that says what.

    Raises:
        RecipeError: nothing was run yet, matplotlib is missing, or the file can't be written.
    """
    panel = panel_of(table, profile, results)
    if panel is None:
        raise RecipeError(
            f"--plot: nothing of {table.name} was run in the profile {profile.name}; type "
            f"python -m research.reproduce {table.name} --profile {profile.name} first."
        )
    panels.draw([panel], path)
    return f"{path}: {len(panel.points)} points; {panel.title}"


def panel_of(table: Table, profile: Profile, results: Path) -> Panel | None:
    """What was run of a table; ``None`` where nothing was."""
    rows = [row for row in load_rows(path_of(results, table.name, profile.name)) if is_current(table, profile, row)]
    lots = [[row for row in lot if row["data"] == data] for lot in alike(rows) for data in table.data]
    if not rows:
        return None
    largest = max(lots, key=len)
    groups = [group for group in groups_of(table, profile, largest) if group.rows]
    epochs = {group.epochs for group in groups}
    points = _points(groups, several_epochs=len(epochs) > 1)
    exact = next((point for point in points if point.family == panels.EXACT), None)
    costs = path_of_costs(results, profile)
    if exact is not None and costs.exists() and TABLES[TABLE].model == table.model:
        memory = costs_of(json.loads(costs.read_text()))[RECOMPUTED, 1].memory
        points.append(Point("every block recomputed", panels.RECOMPUTED, memory, exact.accuracies))
    return Panel(_title(table, profile, largest), tuple(points))


def _points(groups: Sequence[Group], *, several_epochs: bool) -> list[Point]:
    base = next((group for group in groups if group.method == END_TO_END), None)
    points = []
    for group in groups:
        name = group.method if group.method in BASELINES else f"{group.method}, K = {group.modules}"
        family = family_of(
            group.modules,
            is_recomputed=group.method == RECOMPUTED,
            is_in_part="training.freeze" in overlay_of(group.method),
        )
        points.append(
            Point(
                f"{name}, {group.epochs} epochs" if several_epochs else name,
                family,
                peak_ratio(group, base),
                tuple(100 * row["test_accuracy"] for row in group.rows),
            )
        )
    return points


def _title(table: Table, profile: Profile, rows: Sequence[Row]) -> str:
    counts = " or ".join(sorted({f"{row['num_train']:,}" for row in rows}))
    told = f"from scratch, {table.title.format(size=profile.size)}: {counts} images, {profile.epochs} epochs"
    return f"{told} ({rows[0]['data']})" if len(table.data) > 1 else told
