"""From results to the tables in the docs: Markdown between two markers, made by a command and held by a test.

::

    <!-- table: cifar10 cpu -->
    whatever stands here is replaced
    <!-- end -->

A row is a method with K modules (and a number of epochs), over its seeds: mean and sample standard deviation. The gap
to end-to-end training is taken seed by seed, among runs of the same epochs and the same images. Results whose recipe
has changed since are left out, and counted.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from localgrad.errors import RecipeError, did_you_mean
from localgrad.reproduce.methods import END_TO_END
from localgrad.reproduce.profiles import PROFILES, Profile
from localgrad.reproduce.published import Published, published_for
from localgrad.reproduce.results import Row, identity, identity_of, load_rows, path_of
from localgrad.reproduce.tables import TABLES, Cell, Table, cells_of, epochs_of
from localgrad.training.folder import write_atomically
from localgrad.units import format_bytes

DOCS = Path("docs/accuracy.md")
NOT_RUN = "not run"
_MARKED = re.compile(r"(<!-- table: (\S+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """The runs of one method that differ in their seed alone; none where it wasn't run."""

    data: str
    method: str
    modules: int
    epochs: int
    rows: tuple[Row, ...] = ()

    @property
    def accuracy(self) -> float:
        """Mean test accuracy; below all others where nothing was run."""
        return statistics.fmean(row["test_accuracy"] for row in self.rows) if self.rows else -1.0


def rewrite(docs: Path, results: Path) -> bool:
    """Write all tables anew between their markers; says whether anything changed.

    Raises:
        RecipeError: the docs can't be read, or a marker names no table.
    """
    old = _read(docs)
    new = _filled(old, results)
    if new != old:
        write_atomically(docs, lambda path: path.write_text(new))
    return new != old


def differences(docs: Path, results: Path) -> list[str]:
    """What differs between the docs' tables and the results: names of tables, empty where all is in step."""
    text = _read(docs)
    new = {match.group(2, 3): match[4] for match in _MARKED.finditer(_filled(text, results))}
    old = {match.group(2, 3): match[4] for match in _MARKED.finditer(text)}
    found = [
        f"{' '.join(names)}: the docs' table isn't what its results give" for names in old if old[names] != new[names]
    ]
    known = {path_of(results, table, profile): (table, profile) for table in TABLES for profile in PROFILES}
    for path in sorted(results.glob("*.json")):
        if path in known and known[path] not in old and known[path][1] != "smoke":
            found.append(f"{path.name}: the docs have no table for these results")
    return found


def _read(docs: Path) -> str:
    try:
        return docs.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--docs: {docs} can't be read; type --docs FILE, or work in the source folder.") from error


def _filled(text: str, results: Path) -> str:
    def fill(match: re.Match[str]) -> str:
        table, profile = match[2], match[3]
        for name, known in ((table, TABLES), (profile, PROFILES)):
            if name not in known:
                raise RecipeError(
                    f"--docs: a marker names {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}"
                )
        rows = load_rows(path_of(results, table, profile))
        return f"{match[1]}{markdown(TABLES[table], PROFILES[profile], rows)}{match[5]}"

    return _MARKED.sub(fill, text)


# A table ---------------------------------------------------------------------------------------------------------


def markdown(table: Table, profile: Profile, rows: Iterable[Row]) -> str:
    """A table of results; one for each kind of copies that the images were read from.

    Args:
        table: which.
        profile: its size.
        rows: what was run, in any order.
    """
    rows = list(rows)
    current = [row for row in rows if _is_current(table, profile, row)]
    sources = sorted({row["data_source"] for row in current}) or [""]
    parts = [f"*{table.title}; profile `{profile.name}`: {profile.about}.*"]
    for source in sources:
        mine = [row for row in current if row["data_source"] == source]
        parts += [_circumstances(table, profile, mine), _table(table, profile, mine)]
    if len(rows) > len(current):
        parts.append(f"{len(rows) - len(current)} runs of recipes that have changed since are left out.")
    return "\n\n".join(parts) + "\n"


def _is_current(table: Table, profile: Profile, row: Row) -> bool:
    if row["method"] not in table.methods or row["data"] not in table.data:
        return False
    cell = Cell(table.name, row["data"], row["method"], row["modules"], row["seed"], row["epochs"])
    return identity(row) == identity_of(cell, profile, row["data_source"])


def _circumstances(table: Table, profile: Profile, rows: Sequence[Row]) -> str:
    command = f"`localgrad reproduce {table.name} --profile {profile.name}`"
    if not rows:
        return f"No cell has been run yet; {command} fills them."

    def listed(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows}))

    images = ", ".join(
        f"{data}: {' or '.join(sorted({format(row['num_train'], ',') for row in rows if row['data'] == data}))}"
        for data in dict.fromkeys(row["data"] for row in rows)
    )
    return (
        f"{listed('model')}; images from {listed('data_source')}; training images: {images}; {listed('device')}; "
        f"commit {listed('commit')}; {listed('date')}. Made by {command}; each cell's own command, commit, device, "
        f"date and seconds are in `results/{table.name}-{profile.name}.json`."
    )


def _table(table: Table, profile: Profile, rows: Sequence[Row]) -> str:
    groups = _groups(table, profile, rows)
    if table.is_ranked:
        groups.sort(key=lambda group: -group.accuracy)
    sources: list[str] = []
    several_data = len(table.data) > 1
    several_epochs = len({group.epochs for group in groups}) > 1
    published = {
        id(group): published_for(group.data, group.method, group.modules) if table.has_published else None
        for group in groups
    }
    head = [*(["data"] if several_data else []), "method", "K", *(["epochs"] if several_epochs else [])]
    head += ["test accuracy, %", "seeds", "gap, points", "peak", "measured", "hours a run"]
    head += ["published, other settings"] if any(published.values()) else []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for group, modules in _merged(groups, [group for group in groups if published[id(group)]]):
        cells = [*([group.data] if several_data else []), group.method, modules]
        cells += [str(group.epochs)] if several_epochs else []
        cells += _figures(group, _baseline(group, groups))
        cells += [_cited(published[id(group)], sources)] if any(published.values()) else []
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"[{number}] {source}." for number, source in enumerate(sources, 1)]
    return "\n".join([*lines, *(["", " ".join(notes)] if notes else [])])


def _groups(table: Table, profile: Profile, rows: Sequence[Row]) -> list[Group]:
    """Every group that the table asks for, and those that were run for other epochs; in the table's order."""
    others = {row["epochs"] for row in rows} - set(epochs_of(table, profile))
    epochs = sorted({*epochs_of(table, profile), *others})
    cells = cells_of(table, profile, seeds=[0], epochs=epochs)
    cells.sort(
        key=lambda cell: (table.data.index(cell.data), cell.epochs, cell.modules, table.methods.index(cell.method))
    )
    groups = []
    for cell in cells:
        key = (cell.data, cell.method, cell.modules, cell.epochs)
        own = [row for row in rows if (row["data"], row["method"], row["modules"], row["epochs"]) == key]
        if own or cell.epochs not in others:
            groups.append(Group(*key, tuple(sorted(own, key=lambda row: int(row["seed"])))))
    return groups


def _merged(groups: Sequence[Group], alone: Sequence[Group]) -> list[tuple[Group, str]]:
    """Groups with their K as text; those of one method that weren't run share a line, unless they stand alone."""
    lines: dict[tuple[object, ...], tuple[Group, list[int]]] = {}
    for number, group in enumerate(groups):
        is_open = not group.rows and group not in alone
        key = (group.data, group.method, group.epochs) if is_open else (number,)
        lines.setdefault(key, (group, []))[1].append(group.modules)
    return [(group, ", ".join(map(str, sorted(modules)))) for group, modules in lines.values()]


def _baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    same = (group.data, END_TO_END, group.epochs)
    return next((other for other in groups if (other.data, other.method, other.epochs) == same), None)


def _figures(group: Group, baseline: Group | None) -> list[str]:
    """Accuracy, seeds, gap, peak, measured peak, hours of one line."""
    rows = group.rows
    if not rows:
        return [NOT_RUN, "", "", "", "", ""]
    own = {row["seed"]: 100 * row["test_accuracy"] for row in rows}
    theirs = {row["seed"]: 100 * row["test_accuracy"] for row in baseline.rows} if baseline else {}
    gaps = [own[seed] - theirs[seed] for seed in own if seed in theirs]
    gap = f"baseline {NOT_RUN}" if not gaps else _spread(gaps, sign="+")
    return [
        _spread(list(own.values())),
        str(len(rows)),
        "" if group.method == END_TO_END else gap,
        f"{statistics.fmean(row['peak_ratio'] for row in rows):.2f} x",
        format_bytes(max(row["measured_peak_bytes"] for row in rows)),
        f"{statistics.fmean(row['seconds'] for row in rows) / 3600:.2g}",
    ]


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and sample standard deviation where there are several values."""
    mean = format(statistics.fmean(values), f"{sign}.2f").replace("-", "−")  # noqa: RUF001  # a minus
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def _cited(figure: Published | None, sources: list[str]) -> str:
    """A published figure with the number of its source, which is noted down."""
    if figure is None:
        return ""
    if figure.source not in sources:
        sources.append(figure.source)
    return f"{figure} [{sources.index(figure.source) + 1}]"
