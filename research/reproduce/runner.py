"""Running cells: each in a process of its own, so that its measured peak is its own, some at a time.

A cell's process is ``localgrad train`` on a recipe that is written beside its run folder, or ``localgrad train
--resume`` where that was interrupted. So a cell is an ordinary run, to be looked at, evaluated and resumed like any.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import LocalgradError
from localgrad.training.folder import write_atomically
from research.reproduce.profiles import Profile
from research.reproduce.results import Row, commit_of_code, identity_of, row_of
from research.reproduce.sources import Source
from research.reproduce.tables import Cell, digest, recipe_of

RUNS = Path("runs/reproduce")
TRAIN = (sys.executable, "-m", "localgrad", "train")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.1
_SAVING_SECONDS = 120.0  # what a run gets to save itself before it is killed


@dataclass(frozen=True)
class Errand:
    """A cell to be run on this machine.

    Attributes:
        cell: which.
        profile: its size.
        source: where its images are.
        execution: recipe keys of this machine: device, threads.
        repetition: 0 is the first run of the cell; each has a folder of its own.
    """

    cell: Cell
    profile: Profile
    source: Source
    execution: dict[str, Any]
    repetition: int = 0

    @cached_property
    def folder(self) -> Path:
        """The run folder; its name changes with whatever changes results."""
        cell = self.cell
        source = self.source
        own = digest([*identity_of(cell, self.profile, source.label, source.digest), source.path])
        name = f"{cell.data}-{cell.method}-k{cell.modules}-seed{cell.seed}-{cell.epochs}-epochs-{own}"
        again = f"-again{self.repetition}" if self.repetition else ""
        return RUNS / self.profile.name / (name + again)

    def again(self) -> Errand:
        """The same cell in a folder where no run is complete."""
        errand = self
        while errand.is_finished:
            errand = replace(errand, repetition=errand.repetition + 1)
        return errand

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete."""
        return (self.folder / "summary.json").exists()

    @property
    def is_begun(self) -> bool:
        """Whether there is a run to be resumed."""
        return (self.folder / "recipe.toml").exists()

    def beside(self, suffix: str) -> Path:
        """A file of ours beside the run folder."""
        return self.folder.with_name(self.folder.name + suffix)

    def row(self) -> Row:
        """The row of the finished run."""
        return row_of(
            self.cell,
            self.profile,
            self.folder,
            data_source=self.source.label,
            data_digest=self.source.digest,
            path=self.source.path,
            commit=" then ".join(dict.fromkeys(self._commits())),
        )

    def start(self) -> subprocess.Popen[bytes]:
        """Start the run, or resume it, in a session of its own: Ctrl-C reaches it through us alone, once.

        Raises:
            RecipeError: the recipe is impossible.
        """
        values = overlay(recipe_of(self.cell, self.profile), {**self.source.settings(), **self.execution})
        text = Recipe.from_dict(values).to_toml()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        recipe, commits = self.beside(".toml"), json.dumps([*self._commits(), commit_of_code()])
        write_atomically(recipe, lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(self.beside(".commits.json"), lambda path: path.write_text(commits, encoding="utf-8"))
        how = ["--recipe", str(recipe), "--out", str(self.folder)]
        if self.is_begun:
            how = ["--resume", str(self.folder)]
            for key, value in self.execution.items():
                how += ["--set", f"{key}={json.dumps(value)}"]
        with self.beside(".log").open("wb") as log:
            return subprocess.Popen(
                [*TRAIN, *how],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def last_words(self) -> str:
        """The last line that the run said."""
        lines = self.beside(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("localgrad: ") if lines else "it said nothing"

    def _commits(self) -> list[str]:
        try:
            commits: list[str] = json.loads(self.beside(".commits.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return commits


def run_errands(
    errands: Sequence[Errand],
    *,
    at_once: int,
    started: Callable[[Errand], None],
    ended: Callable[[Errand, str | None], None],
) -> int | None:
    """Run cells, some at a time, never two in one folder; one that fails doesn't stop the others.

    Args:
        errands: in order.
        at_once: processes.
        started: told of each run that starts.
        ended: told of each run that ends, and of its error, if there is one.

    Returns:
        The number of the signal that stopped it all, or ``None``.
    """
    waiting = deque(errands)
    running: dict[subprocess.Popen[bytes], Errand] = {}

    def settle(process: subprocess.Popen[bytes]) -> None:
        errand = running.pop(process)
        is_well = process.returncode == 0 and errand.is_finished
        ended(errand, None if is_well else errand.last_words())

    with _noting_signals() as noted:
        try:
            while (waiting or running) and not noted:
                for _ in range(len(waiting)):
                    if len(running) >= at_once or noted:
                        break
                    errand = waiting.popleft()
                    if any(errand.folder == other.folder for other in running.values()):
                        waiting.append(errand)  # the same run for another table: it is read when it is there
                        continue
                    if errand.is_finished:
                        ended(errand, None)
                        continue
                    try:
                        running[errand.start()] = errand
                    except LocalgradError as error:
                        ended(errand, str(error))
                        continue
                    started(errand)
                time.sleep(_POLL_SECONDS)
                for process in [process for process in running if process.poll() is not None]:
                    settle(process)
        finally:
            for process in running:
                process.terminate()  # a run saves itself
            for process in list(running):
                try:
                    process.wait(_SAVING_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                if process.returncode == 0:  # it was just ready
                    settle(process)
    return noted[0] if noted else None


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Note Ctrl-C and its like instead of dying of them; a second one is not noted any more."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = [number for number, handler in before.items() if handler != signal.SIG_IGN]  # nohup

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        for each in caught:
            signal.signal(each, before[each])

    for number in caught:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in caught:
            signal.signal(number, before[number])
