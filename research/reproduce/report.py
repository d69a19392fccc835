"""From results to the tables in the docs: Markdown between two markers, made by a command and held by a test.

::

    <!-- table: cifar10 cpu -->
    whatever stands here is replaced
    <!-- end -->

A row is a method with K modules (and a number of epochs), over its seeds: mean and sample standard deviation. Rows that
weren't run are counted in a line. The gap to end-to-end training is taken seed by seed, among runs of the same epochs,
the same images and one kind of device.
Training accuracy is that of the best epoch, on augmented images while they are trained on.
Results whose recipe has changed since are left out, and counted.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from localgrad.errors import RecipeError, did_you_mean
from localgrad.training.folder import write_atomically
from localgrad.units import format_bytes
from research.reproduce.costs import RECOMPUTED, Cost, costs_of, markdown_of_costs, path_of_costs
from research.reproduce.methods import AVERAGED, BASELINES, DEFAULT, END_TO_END, begins_at, keeps_average, overlay_of
from research.reproduce.profiles import PROFILES, Profile
from research.reproduce.published import Published, published_for
from research.reproduce.results import Row, device_kind, identity, identity_of, load_rows, path_of
from research.reproduce.tables import TABLES, Cell, Table, cells_of, epochs_of

DOCS = Path("research/docs/accuracy.md")
LENGTHS = "epochs"
"""The table whose runs differ in their length."""
DAGGER = "†"
DOUBLE_DAGGER = "‡"
_MARKED = re.compile(r"(<!-- (table|costs): (\S+)(?: (\S+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """The runs of one method that differ in their seed alone; none where it wasn't run."""

    data: str
    method: str
    modules: int
    epochs: int
    rows: tuple[Row, ...] = ()

    @property
    def validation(self) -> tuple[float, ...]:
        """Accuracies in percent on validation images, of the runs that had any."""
        return tuple(100 * row["val_accuracy"] for row in self.rows if row["val_accuracy"] is not None)

    @property
    def merit(self) -> float:
        """What a ranking goes by; those that were run without validation images come last."""
        return statistics.fmean(self.validation) if self.validation else -1.0

    @property
    def is_of_changed_code(self) -> bool:
        """Whether a run's code was no commit's."""
        return any("+" in row["commit"] for row in self.rows)

    @property
    def is_of_before(self) -> bool:
        """Whether the best epoch of a run was over before what the method adds began to act."""
        first = math.floor(begins_at(self.method) * self.epochs)  # in the middle of which it may begin
        return any(row["best_epoch"] is not None and row["best_epoch"] < first for row in self.rows)


def rewrite(docs: Path, results: Path) -> bool:
    """Write all tables anew between their markers; says whether anything changed.

    Raises:
        RecipeError: the docs can't be read, or a marker names no table.
    """
    old = _read(docs)
    new = _filled(old, results)
    if new != old:
        write_atomically(docs, lambda path: path.write_text(new, encoding="utf-8"))
    return new != old


def differences(docs: Path, results: Path) -> list[str]:
    """What differs between the docs' tables and the results: names of tables, empty where all is in step."""
    text = _read(docs)
    new = {match.group(2, 3, 4): match[5] for match in _MARKED.finditer(_filled(text, results))}
    old = {match.group(2, 3, 4): match[5] for match in _MARKED.finditer(text)}
    found = [
        f"{' '.join(filter(None, names[1:]))}: the docs' table isn't what its results give"
        for names in old
        if old[names] != new[names]
    ]
    known = {path_of(results, table, profile): (table, profile) for table in TABLES for profile in PROFILES}
    for path in sorted(results.glob("*.json")):
        if path in known and ("table", *known[path]) not in old and known[path][1] != "smoke":
            found.append(f"{path.name}: the docs have no table for these results")
    return found


def _read(docs: Path) -> str:
    try:
        return docs.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--docs: {docs} can't be read; type --docs FILE, or work in the source folder.") from error


def _filled(text: str, results: Path) -> str:
    def fill(match: re.Match[str]) -> str:
        kind, table, profile = match.group(2, 3, 4)
        if kind == "costs":
            table, profile = None, table
        for name, known in ((table, TABLES), (profile, PROFILES)):
            if name is not None and name not in known:
                raise RecipeError(
                    f"--docs: a marker names {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}"
                )
        if table is None:
            return f"{match[1]}{costs(PROFILES[profile], results)}{match[6]}"
        rows = load_rows(path_of(results, table, profile))
        return f"{match[1]}{markdown(TABLES[table], PROFILES[profile], rows)}{match[6]}"

    return _MARKED.sub(fill, text)


# A table ---------------------------------------------------------------------------------------------------------


def markdown(table: Table, profile: Profile, rows: Iterable[Row]) -> str:
    """A table of results; one for each kind of device, and of copies that the images were read from.

    Args:
        table: which.
        profile: its size.
        rows: what was run, in any order.
    """
    rows = list(rows)
    current = [row for row in rows if is_current(table, profile, row)]
    parts = [f"*{_title(table, profile, current)}; profile `{profile.name}`: {profile.about}.*"]
    for mine in alike(current):
        parts += [_circumstances(table, profile, mine), _table(table, profile, mine)]
    parts += _not_run(table, profile, current)
    if len(rows) > len(current):
        parts.append(f"{len(rows) - len(current)} runs of recipes that have changed since are left out.")
    return "\n\n".join(parts) + "\n"


def costs(profile: Profile, results: Path) -> str:
    """The table of what steps cost, beside what was lost in accuracy."""
    accuracy = {
        name: {
            (group.method, group.modules): f"{_spread(gaps, sign='+')} ({len(gaps)})"
            for group in groups
            if group.method != END_TO_END and (gaps := _gaps(group, _baseline(group, groups)))
        }
        for name, groups in _groups_by_data(profile, results).items()
    }
    told = markdown_of_costs(profile, results, accuracy)
    has_lengths = any(wanted.table == LENGTHS for wanted in profile.agenda)
    is_measured = path_of_costs(results, profile).exists()
    return f"{told}\n{at_equal_costs(profile, results)}" if has_lengths and is_measured else told


def at_equal_costs(profile: Profile, results: Path) -> str:
    """What `default` comes to in the epochs, the arithmetic and the time that end-to-end training takes.

    Its length is the nearest of those that are asked for or were run, where that is within a tenth.
    """
    table = TABLES[LENGTHS]
    lot = _runs_of([table.data[0], LENGTHS], profile, results)
    base = [row for row in lot if (row["method"], row["epochs"]) == (END_TO_END, profile.epochs)]
    modules = table.modules[0]
    own = [row for row in lot if (row["method"], row["modules"]) == (DEFAULT, modules)]
    lengths = sorted({*epochs_of(table, profile), *(row["epochs"] for row in own)})
    head = [f"end-to-end training, {profile.epochs} epochs", "in as much", f"epochs of `{DEFAULT}`, K = {modules}"]
    lines = [f"| {' | '.join(head)} | points |", "|---|---|---|---|"]
    for name, what, share in _shares(costs_of(json.loads(path_of_costs(results, profile).read_text())), modules):
        exact = share * profile.epochs
        nearest = min(lengths, key=lambda length: abs(length - exact))
        is_near = abs(nearest - exact) <= 0.1 * exact
        same = tuple(row for row in own if row["epochs"] == nearest) if is_near else ()
        gaps = _gaps(_group_of(same), _group_of(tuple(base))) if same and base else []
        points = f"{_spread(gaps, sign='+')} ({_seeds(gaps)})" if gaps else "not run"
        lines.append(f"| {name} | {what} | {f'{nearest} for ' if is_near else ''}{exact:.1f} | {points} |")
    return "\n".join(lines) + "\n"


def _shares(steps: dict[tuple[str, int], Cost], modules: int) -> Iterator[tuple[str, str, float]]:
    """How many steps of `default` cost as much as one of end-to-end training, in each way."""
    local, whole, recomputed = steps[DEFAULT, modules], steps[END_TO_END, 1], steps[RECOMPUTED, 1]
    yield "nothing recomputed", "epochs", 1.0
    for name, cost in (("nothing recomputed", whole), ("every block recomputed", recomputed)):
        yield name, "arithmetic", cost.flops / local.flops
        yield name, "time", cost.time / local.time


def _runs_of(names: Iterable[str], profile: Profile, results: Path) -> list[Row]:
    """What was run of some tables that share runs, each run once, on the first kind of images and device."""
    found = {
        tuple(row[key] for key in ("method", "modules", "epochs", "seed", "data_digest", "device")): row
        for name in names
        for row in load_rows(path_of(results, name, profile.name))
        if is_current(TABLES[name], profile, row)
    }
    lots = alike(list(found.values()))
    return lots[0] if lots else []


def _group_of(rows: tuple[Row, ...]) -> Group:
    """Runs that differ in their seed alone, as a group."""
    first = rows[0]
    return Group(first["data"], first["method"], first["modules"], first["epochs"], rows)


def _groups_by_data(profile: Profile, results: Path) -> dict[str, list[Group]]:
    """Of the agenda's tables by data set: the runs, where there are several kinds of the first."""
    found = {}
    for name in dict.fromkeys(wanted.table for wanted in profile.agenda if wanted.table == wanted.data):
        rows = load_rows(path_of(results, name, profile.name))
        lots = alike([row for row in rows if is_current(TABLES[name], profile, row)])
        found[name] = groups_of(TABLES[name], profile, lots[0] if lots else [])
    return found


def in_a_sentence(profile: Profile, results: Path, names: dict[str, str]) -> str:
    """What ``default`` loses and saves on all images, for a first screen; empty where none was run.

    Args:
        profile: of which.
        results: where results lie.
        names: of data sets.
    """
    steps = costs_of(json.loads(path_of_costs(results, profile).read_text()))
    parts = []
    for data, groups in _groups_by_data(profile, results).items():
        base = next(group for group in groups if group.method == END_TO_END and group.epochs == profile.epochs)
        local = [group for group in groups if group.rows and (group.method, group.epochs) == (DEFAULT, profile.epochs)]
        told = [
            f"K = {group.modules} {_spread(gaps, sign='+')} points ({_seeds(gaps)}) at "
            f"{steps[DEFAULT, group.modules].memory:.2f} x the memory and {steps[DEFAULT, group.modules].time:.2f} x "
            "the time"
            for group in local
            if (gaps := _gaps(group, base))
        ]
        if told:
            parts.append(
                f"{names[data]}, end to end {_figures(base, None)[0]} % ({_seeds(base.rows)}): {'; '.join(told)}"
            )
    exact = steps[RECOMPUTED, 1]
    recomputed = f"Every block recomputed, exact: {exact.memory:.2f} x and {exact.time:.2f} x."
    return f"{'. '.join(parts)}. {recomputed}" if parts else ""


def _seeds(runs: Sequence[object]) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def _title(table: Table, profile: Profile, rows: Sequence[Row]) -> str:
    title = table.title.format(size=profile.size)
    counts = sorted({row["num_parameters"] for row in rows if row.get("num_parameters")})
    told = [f"{count / 1e6:.3g} million" if count >= 1e6 else f"{count:,}" for count in counts]
    return f"{title}; {' or '.join(dict.fromkeys(told))} parameters" if told else title


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that may stand in one table: one kind of device, of copies, and one lot of images of each data set."""

    def lot(row: Row) -> tuple[str, ...]:
        return row["data_digest"], *(str(row[f"num_{part}"]) for part in ("train", "val", "test"))

    lots: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        if lot(row) not in lots.setdefault(row["data"], []):
            lots[row["data"]].append(lot(row))
    alike: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        key = row["data_source"], device_kind(row["device"]), sorted(lots[row["data"]]).index(lot(row))
        alike.setdefault(key, []).append(row)
    return [alike[key] for key in sorted(alike)]


def is_current(table: Table, profile: Profile, row: Row) -> bool:
    """Whether a row is of a table's recipes as they are now."""
    if row["method"] not in table.methods or row["data"] not in table.data:
        return False
    cell = Cell(table.name, row["data"], row["method"], row["modules"], row["seed"], row["epochs"])
    return identity(row) == identity_of(cell, profile, row["data_source"], row.get("data_digest", ""))


def _not_run(table: Table, profile: Profile, rows: Sequence[Row]) -> list[str]:
    """A line that counts the rows that weren't run, where there are any."""
    groups = groups_of(table, profile, rows)
    count = sum(not group.rows for group in groups)
    command = f"`{_command(table, profile)}`"
    return [f"Not run yet: {count} of {len(groups)} rows; {command} fills them."] if count else []


def _command(table: Table, profile: Profile) -> str:
    return f"python -m research.reproduce {table.name} --profile {profile.name}"


def _circumstances(table: Table, profile: Profile, rows: Sequence[Row]) -> str:
    def listed(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows}))

    return (
        f"{listed('model')}; images from {listed('data_source')}; {_images(rows)}; {listed('device')}; "
        f"commit {listed('commit')}; {listed('date')}. Made by `{_command(table, profile)}`; each cell's own command, "
        f"commit, device, date and seconds are in `research/results/{table.name}-{profile.name}.json`."
    )


def _images(rows: Sequence[Row]) -> str:
    """How many images there were of each data set, which, and what was done to them."""
    told = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        train, val, test = (f"{own[0][f'num_{part}']:,}" for part in ("train", "val", "test"))
        files = "" if own[0]["data_digest"] == "official" else f", files {own[0]['data_digest']}"
        notes = dict.fromkeys(note.rstrip(".") for row in own for note in row.get("notes", ()))
        remarks = "".join(f" ({note})" for note in notes)
        told.append(f"{data}: {train} to train on, {val} to select by, {test} to test on{files}{remarks}")
    return "; ".join(told)


def _table(table: Table, profile: Profile, rows: Sequence[Row]) -> str:
    groups = groups_of(table, profile, rows)
    several_data = len(table.data) > 1
    several_epochs = len({group.epochs for group in groups}) > 1
    groups = [group for group in groups if group.rows]
    if table.is_ranked:
        groups.sort(key=lambda group: -group.merit)
    sources: list[str] = []
    published = {
        id(group): published_for(group.data, group.method, group.modules) if table.has_published else None
        for group in groups
    }
    head = [*(["data"] if several_data else []), "method", "K", *(["epochs"] if several_epochs else [])]
    head += ["validation, %"] if table.is_ranked else []
    head += ["test accuracy, %", "training, %", "seeds", "gap, points", "peak", "measured", "hours a run"]
    head += ["published, other settings"] if any(published.values()) else []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for group in groups:
        marks = DAGGER * group.is_of_changed_code + DOUBLE_DAGGER * group.is_of_before
        name = f"{group.method} {marks}".strip()
        cells = [*([group.data] if several_data else []), name, str(group.modules)]
        cells += [str(group.epochs)] if several_epochs else []
        cells += [_spread(group.validation) if group.validation else ""] if table.is_ranked else []
        cells += _figures(group, _baseline(group, groups))
        cells += [_cited(published[id(group)], sources)] if any(published.values()) else []
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"[{number}] {source}." for number, source in enumerate(sources, 1)]
    if any(group.is_of_changed_code for group in groups):
        notes.append(f"{DAGGER} Run by code with changes that no commit holds.")
    if any(group.is_of_before for group in groups):
        notes.append(
            f"{DOUBLE_DAGGER} A best epoch by validation came before the method's own part began: up to there it is "
            f"a run of `{DEFAULT}`."
        )
    if table.is_ranked:
        notes.append(
            f"The order, and the choice of `{DEFAULT}`, go by validation accuracy; test accuracy is read once and "
            "decides nothing."
        )
    if any(_is_averaged(group) for group in groups):
        notes.append(f"What keeps an average of the weights is held against `{AVERAGED}`.")
    return "\n".join([*lines, *(["", " ".join(notes)] if notes else [])])


def groups_of(table: Table, profile: Profile, rows: Sequence[Row]) -> list[Group]:
    """Every group that the table asks for, and those that were run for other epochs; in the table's order."""
    others = {row["epochs"] for row in rows} - set(epochs_of(table, profile))
    cells = cells_of(table, profile, seeds=[0])
    cells += cells_of(table, profile, seeds=[0], epochs=sorted(others)) if others else []
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


def _baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """The end-to-end runs of the same images and epochs (and with an average, if that is kept), if there are any."""
    same = (group.data, AVERAGED if _is_averaged(group) else END_TO_END, group.epochs)
    return next((other for other in groups if (other.data, other.method, other.epochs) == same), None)


def _is_averaged(group: Group) -> bool:
    return keeps_average(group.method) and group.method not in BASELINES


def _figures(group: Group, baseline: Group | None) -> list[str]:
    """Test accuracy, training accuracy, seeds, gap, peak, measured peak, hours of one line."""
    rows = group.rows
    own = [100 * row["test_accuracy"] for row in rows]
    gaps = _gaps(group, baseline)
    gap = "baseline not run" if not gaps else _spread(gaps, sign="+")
    if gaps and len(gaps) < len(rows):
        gap += f" ({len(gaps)} seeds)" if len(gaps) > 1 else " (1 seed)"
    ratio = peak_ratio(group, baseline)
    training = [100 * row["train_accuracy"] for row in rows if row["train_accuracy"] is not None]
    return [
        _spread(own),
        f"{statistics.fmean(training):.1f}" if training else "",
        str(len(rows)),
        "" if group.method == END_TO_END else gap,
        f"{ratio:.2f} x",
        format_bytes(max(row["measured_peak_bytes"] for row in rows)),
        f"{statistics.fmean(row['seconds'] for row in rows) / 3600:.2g}",
    ]


def _gaps(group: Group, baseline: Group | None) -> list[float]:
    """Points of test accuracy above the baseline's, for each seed that both have."""
    theirs = {row["seed"]: row["test_accuracy"] for row in baseline.rows} if baseline else {}
    return [100 * (row["test_accuracy"] - theirs[row["seed"]]) for row in group.rows if row["seed"] in theirs]


def peak_ratio(group: Group, baseline: Group | None) -> float:
    """Peak as a share of end-to-end training's.

    That is the one which the run estimated; of a network that isn't trained in whole, that isn't either, so the runs
    themselves are held against one another.
    """
    if baseline is not None and "training.freeze" in overlay_of(group.method):
        peaks = [statistics.fmean(row["peak_bytes"] for row in each.rows) for each in (group, baseline)]
        return peaks[0] / peaks[1]
    return statistics.fmean(row["peak_ratio"] for row in group.rows)


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and sample standard deviation where there are several values."""
    mean = format(statistics.fmean(values), f"{sign}.2f").replace("-", "−")  # noqa: RUF001  # a minus
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def _cited(figure: Published | None, sources: list[str]) -> str:
    """A published figure with the number of its source, which is noted down."""
    if figure is None:
        return ""
    if figure.cited not in sources:
        sources.append(figure.cited)
    return f"{figure} [{sources.index(figure.cited) + 1}]"
