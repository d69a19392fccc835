"""``python -m research.reproduce``: from what a person typed to cells that are listed, run or reported.

What is typed is checked before anything is run. A data set that is missing fails its cells, not the others'.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localgrad.app.build import resolve_device
from localgrad.errors import DataError, LocalgradError, RecipeError, did_you_mean
from localgrad.training.folder import check_writable
from localgrad.units import format_seconds
from research.reproduce import plot
from research.reproduce.methods import BASELINES, METHODS, REMEDIES, SOURCES
from research.reproduce.profiles import DATA, PROFILES, Profile
from research.reproduce.results import (
    Row,
    command_of_row,
    identity,
    identity_of,
    known_runs,
    load_rows,
    path_of,
    run_of,
    store,
)
from research.reproduce.runner import Errand, run_errands
from research.reproduce.sources import OFFICIAL, Source
from research.reproduce.tables import TABLES, cells_of_all, command_of

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``python -m research.reproduce``, as typed.

    Attributes:
        table: one table; all by default.
        profile: smoke, cpu, cpu-full or gpu.
        data: only these data sets.
        data_path: DATA=FOLDER, folders that stand in for the official files.
        root: where the official files lie.
        download: let torchvision fetch them.
        methods: only these.
        modules: only these K; the baselines have one module whatever it is.
        seeds: instead of the profile's.
        epochs: instead of the table's.
        jobs: processes at a time.
        num_threads: of each process; by default the cores shared out.
        device: auto, cpu, cuda, cuda:N.
        again: run cells that are done, too, in fresh folders.
        results: folder of the results.
    """

    table: str | None = None
    profile: str | None = None
    data: str | None = None
    data_path: Sequence[str] = field(default=())
    root: str | None = None
    download: bool = False
    methods: str | None = None
    modules: str | None = None
    seeds: str | None = None
    epochs: str | None = None
    jobs: int = 1
    num_threads: int | None = None
    device: str = "auto"
    again: bool = False
    results: Path = Path("research/results")


def chosen_errands(settings: Settings) -> list[Errand]:
    """The cells that were asked for, those first that tell most, each with where its images are and how it is run.

    Raises:
        RecipeError: an option names what there is not.
        DeviceError: this machine has no such device.
    """
    profile = profile_named(settings.profile)
    for option, value in (("--jobs", settings.jobs), ("--num-threads", settings.num_threads)):
        if value is not None and value < 1:
            raise RecipeError(f"{option}: {value} is below 1; take 1.")
    resolve_device(settings.device)
    tables = [TABLES[name] for name in _names("TABLE", settings.table, TABLES)]
    methods = _names("--methods", settings.methods, [*METHODS, *REMEDIES, *SOURCES])
    data = _names("--data", settings.data, DATA)
    modules = _numbers("--modules", settings.modules, least=2)
    seeds, epochs = _numbers("--seeds", settings.seeds, least=0), _numbers("--epochs", settings.epochs, least=1)
    sources = _sources(settings)
    cells = [
        cell
        for cell in cells_of_all(tables, profile, seeds=seeds, epochs=epochs)
        if cell.method in methods
        and cell.data in data
        and (modules is None or cell.method in BASELINES or cell.modules in modules)
    ]
    if not cells:
        raise RecipeError(
            "--methods, --modules and --data together leave no cell; `python -m research.reproduce "
            f"{settings.table or 'cifar10'} --profile {profile.name} --dry-run` lists all there are."
        )
    threads = settings.num_threads or max(1, (os.cpu_count() or 1) // settings.jobs)
    execution: dict[str, Any] = {"execution.device": settings.device, "execution.num_threads": threads}
    errands = [Errand(cell, profile, sources[cell.data], execution) for cell in cells]
    return [errand.again() for errand in errands] if settings.again else errands


def list_cells(settings: Settings, say: Say) -> None:
    """List the cells that were asked for: whether each is done, and its command."""
    errands = chosen_errands(settings)
    known = {} if settings.again else known_runs(settings.results, errands[0].profile.name)
    for errand in errands:
        is_done = _run(errand) in known or errand.is_finished
        state = "done" if is_done else "begun" if errand.is_begun else "not run"
        say(f"{state:8} {command_of(errand.cell, errand.profile, errand.source.path)}")


def draw(table: str | None, profile: str | None, results: Path, path: Path) -> str:
    """Draw a table's results; give a line that says what was drawn.

    Raises:
        RecipeError: no table is named, or its results can't be drawn.
    """
    if table is None:
        raise RecipeError(f"--plot: which table? Take {', '.join(TABLES)}.")
    name = _names("TABLE", table, TABLES)[0]
    return plot.draw(TABLES[name], profile_named(profile), results, path)


def fill(settings: Settings, say: Say) -> int:
    """Run the cells that were asked for and aren't done; each result is written as soon as it is there.

    Returns:
        An exit status: 0, 1 where a cell failed, 128 and the signal's number where one stopped it.
    """
    errands = chosen_errands(settings)
    profile = errands[0].profile
    check_writable(settings.results, name="results")
    known = {} if settings.again else known_runs(settings.results, profile.name)
    missing = []
    for errand in errands:
        row = known.get(_run(errand))
        if row is None:
            missing.append(errand)
        else:
            _adopt(errand, row, settings.results)
    done, failed = len(errands) - len(missing), 0
    say(f"{len(errands)} cells, {done} done")
    ready, unready = _split_by_data(missing, download=settings.download)
    for errand, reason in unready:
        say(f"failed   {errand.cell}: {reason}")
        failed += 1

    def ended(errand: Errand, error: str | None) -> None:
        nonlocal done, failed
        if error is not None:
            failed += 1
            say(f"failed   {errand.cell}: {error} (more in {errand.beside('.log')})")
            return
        try:
            row = errand.row()
        except (LocalgradError, OSError, ValueError) as damage:
            failed += 1
            say(f"failed   {errand.cell}: its run can't be read ({damage}); --again runs it anew")
            return
        store(settings.results, errand.cell, profile, row)
        done += 1
        say(f"{done:>3}/{len(errands)}  {errand.cell}: {_told(row)}")

    number = run_errands(
        ready, at_once=settings.jobs, started=lambda errand: say(f"started  {errand.cell}"), ended=ended
    )
    if number is not None:
        say(
            f"stopped; {done} of {len(errands)} cells are done, and what was running is saved: the same command goes on"
        )
        return 128 + number
    if failed:
        say(f"{failed} of {len(errands)} cells failed; the same command tries them again")
    return 1 if failed else 0


def _told(row: Row) -> str:
    return f"{row['test_accuracy']:.2%}, peak {row['peak_ratio']:.2f} x end-to-end, {format_seconds(row['seconds'])}"


def _run(errand: Errand) -> tuple[Any, ...]:
    return run_of(identity_of(errand.cell, errand.profile, errand.source.label, errand.source.digest))


def _adopt(errand: Errand, row: Row, results: Path) -> None:
    """Take the row of the same run, of another table or by another name, into the cell's own table."""
    cell, profile = errand.cell, errand.profile
    known = load_rows(path_of(results, cell.table, profile.name))
    own = {**row, "method": cell.method, "command": command_of_row(cell, profile, errand.source.path, row)}
    if identity(own) not in map(identity, known):
        store(results, cell, profile, own)


def _split_by_data(errands: Iterable[Errand], *, download: bool) -> tuple[list[Errand], list[tuple[Errand, str]]]:
    """Cells whose data set is there, and the others, each with what is wrong."""
    reasons: dict[str, str | None] = {}
    ready, unready = [], []
    for errand in errands:
        source = errand.source
        if source.data not in reasons:
            try:
                source.check(download=download)
                reasons[source.data] = None
            except DataError as error:
                reasons[source.data] = f"{error} A folder may stand in: --data-path {source.data}=FOLDER."
        reason = reasons[source.data]
        if reason is None:
            ready.append(errand)
        else:
            unready.append((errand, reason))
    return ready, unready


# Options ---------------------------------------------------------------------------------------------------------


def profile_named(name: str | None) -> Profile:
    """The profile of a name.

    Raises:
        RecipeError: no name, or one that there isn't.
    """
    if name is None:
        raise RecipeError(f"--profile: how large? Take {', '.join(PROFILES)}; figures of one never mix with another's.")
    return PROFILES[_names("--profile", name, PROFILES)[0]]


def _names(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Read a comma-separated list of known names; all of them where nothing was typed."""
    names = list(known)
    if text is None:
        return names
    found = [part.strip() for part in text.split(",")]
    for name in found:
        if name not in names:
            raise RecipeError(f"{option}: unknown {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}")
    return list(dict.fromkeys(found))


def _numbers(option: str, text: str | None, *, least: int) -> list[int] | None:
    """Read a comma-separated list of whole numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) >= least for part in parts):
        raise RecipeError(
            f"{option}: {text!r} is no list of whole numbers from {least} on; type it like {least},{least + 2}."
        )
    return list(dict.fromkeys(map(int, parts)))


def _sources(settings: Settings) -> dict[str, Source]:
    """Where each data set's images are; folders are looked into at once."""
    paths: dict[str, str] = {}
    for text in settings.data_path:
        name, equals, path = text.partition("=")
        if not equals or not path or name not in DATA:
            raise RecipeError(
                f"--data-path: expected DATA=FOLDER, got {text!r}; for example --data-path cifar10=FOLDER."
            )
        paths[name] = path
    sources = {name: Source(name, paths.get(name), settings.root) for name in DATA}
    for name in paths:
        assert sources[name].label != OFFICIAL, "a folder is no official source"
    return sources
