"""Experiment trackers as sinks: ``--sink wandb``, ``--sink mlflow``, ``--sink trackio``.

Each is driven by ``accelerate.tracking``, as ``Accelerator(log_with=...)`` does: one class a tracker, all with
``start``, ``store_init_configuration``, ``log`` and ``finish``. Why that library: it is kept with the trackers (nine of
them), weighs nothing beside torch, and knows their limits (how many params MLflow takes at once, and how long).
Lightning's loggers have no trackio and bring a framework; transformers' are callbacks that need a Trainer. What it asks
for: its log lines fail without a ``PartialState``. Made in rank 0 alone, that takes the process group of the team, or
none; under torchrun it would make one, but ``app/agreement.py`` refuses processes that are no team. Its classes start
when ``start`` is called since 1.8, and trackio is among them since 1.9.

What it leaves to its callers is a ``Service``: names, how a run is found again, and how one ends that failed. Figures
are those that TensorBoard gets. Nothing else is sent: no images, no weights, no files.

A tracker never costs a run. What is missing is said before anything is made (``Service.check_available``); a tracker
that can't begin ends the run before its first step; one that fails later is said once and left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

from localgrad.errors import RecipeError, arg, reason_of
from localgrad.finetuning import PILOT_SUFFIX
from localgrad.options import Values
from localgrad.training.events import EpochEnded, Event, HealthMeasured, RunEnded, RunStarted, Sink, figures_of
from localgrad.training.folder import say, write_atomically

PROJECT = "localgrad"
"""Of all runs, where the environment names none."""
IDS_FILE = "trackers.json"
"""In the run folder: each tracker's own id of the run, by the tracker's name."""
OLDEST = "1.9"
"""Version of accelerate that has all of these trackers, each with a ``start`` of its own."""


def _of_environment(**settings: tuple[str, str]) -> dict[str, str]:
    """Arguments, each as (variable, value); left out where the variable says it, as the tracker reads that itself."""
    return {name: value for name, (variable, value) in settings.items() if variable not in os.environ}


def name_of_run(folder: Path) -> str:
    """What a tracker calls a run: its folder's name, and a pilot's with that of the run which it is for."""
    folder = folder.resolve()
    return f"{folder.parent.name}-{folder.name}" if folder.parent.name.endswith(PILOT_SUFFIX) else folder.name


def _start_of_wandb(folder: Path, known: str | None) -> Values:
    given = _of_environment(name=("WANDB_NAME", name_of_run(folder)), dir=("WANDB_DIR", str(folder)))
    return given if known is None else {**given, "id": known, "resume": "allow"}


def _start_of_mlflow(folder: Path, known: str | None) -> Values:
    return {"run_name": name_of_run(folder), "run_id": known}


def _start_of_trackio(folder: Path, known: str | None) -> Values:
    return {"name": known or name_of_run(folder), "resume": "never" if known is None else "allow"}


@final
@dataclass(frozen=True, kw_only=True)
class Service:
    """A tracker, by what accelerate doesn't say of it; called with a run folder, it makes the sink.

    Attributes:
        name: accelerate's, that of the module which is imported, and of the package.
        start: arguments of accelerate's class, from the run folder and the tracker's id of the run (``None`` of a new
            one).
        id_of: that id, from the tracker's own run.
        fail: ends the tracker's own run as one that failed.
        project: environment variable with the project's name, where neither the tracker nor accelerate reads it.
        takes_changes: whether the config of a run that goes on may change.
    """

    name: str
    start: Callable[[Path, str | None], Values]
    id_of: Callable[[Any], str]
    fail: Callable[[Any], object]
    project: str = ""
    takes_changes: bool = True

    def check_available(self) -> None:
        """Refuse a tracker that isn't installed.

        Raises:
            RecipeError: saying what to install.
        """
        needed = {"accelerate": "'localgrad[trackers]'", self.name: self.name}
        missing = [name for name in needed if not _is_installed(name)]
        if missing:
            raise RecipeError(
                f"{arg('sink', self.name)} needs {' and '.join(missing)}: "
                f"pip install {' '.join(needed[name] for name in missing)}."
            )
        tracking = import_module("accelerate.tracking")
        if self.name not in tracking.LOGGER_TYPE_TO_CLASS or not hasattr(tracking.GeneralTracker, "start"):
            raise RecipeError(
                f"{arg('sink', self.name)} needs accelerate {OLDEST} or newer: pip install -U 'localgrad[trackers]'."
            )

    def __call__(self, folder: Path) -> TrackerSink:
        """The sink of a run."""
        return TrackerSink(self, folder)

    def begin(self, folder: Path, known: str | None) -> Any:
        """Accelerate's tracker, started."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # else accelerate's own log lines fail
        project = os.environ.get(self.project) or PROJECT
        tracker = LOGGER_TYPE_TO_CLASS[self.name](project, **self.start(folder, known))
        tracker.start()
        return tracker


def _is_installed(module: str) -> bool:
    """Whether a module can be imported; a folder of that name, as trackers leave them, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


WANDB = Service(
    name="wandb",
    start=_start_of_wandb,
    id_of=lambda run: str(run.id),
    fail=lambda run: run.finish(exit_code=1),
    project="WANDB_PROJECT",
)
MLFLOW = Service(
    name="mlflow",
    start=_start_of_mlflow,
    id_of=lambda run: str(run.info.run_id),
    fail=lambda _run: import_module("mlflow").end_run("FAILED"),
    takes_changes=False,  # a param is written once
)
TRACKIO = Service(
    name="trackio",
    start=_start_of_trackio,
    id_of=lambda run: str(run.name),
    fail=lambda run: run.finish(),  # it knows no failure
)


@final
class TrackerSink(Sink):
    """The figures of a run, its recipe and plan as config, and the figures of its summary, in a tracker.

    Args:
        service: which tracker.
        folder: of the run; it keeps the tracker's id, by which resuming goes on in the same run of the tracker.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self.folder = service, folder
        self._tracker: Any = None  # none before the run has started, after it has ended, or when the tracker failed
        self._step, self._is_complete = 0, False

    def emit(self, event: Event) -> None:
        """Send an event's figures."""
        match event:
            case RunStarted():
                self._start(event)
            case EpochEnded() | HealthMeasured():
                self._step = event.epoch
                self._send(figures_of(event))
            case RunEnded():
                self._send(figures_of_summary(event.summary))
                self._is_complete = True

    def close(self) -> None:
        """End the tracker's run; without a summary, as one that failed."""
        if self._tracker is not None:
            self._carefully(self._tracker.finish if self._is_complete else self._fail)
            self._tracker = None

    def _fail(self) -> None:
        self.service.fail(self._tracker.tracker)

    def _start(self, event: RunStarted) -> None:
        name, ids = self.service.name, _read_ids(self.folder)
        known, self._step = ids.get(name), event.start_epoch
        try:
            self._tracker = self.service.begin(self.folder, known)
            if known is None or self.service.takes_changes:
                self._tracker.store_init_configuration(config_of_start(event))
            ids[name] = self.service.id_of(self._tracker.tracker)
        except Exception as error:  # whatever a tracker says: no account, no network, no such run
            of = "" if known is None else f" with the run {known}, which {self.folder / IDS_FILE} names"
            raise RecipeError(
                f"{arg('sink', name)}: {name} can't begin{of} ({reason_of(error)}); no step was made. Mend that, or "
                f"leave it out, and go on with {arg('resume', self.folder)}."
            ) from error
        text = json.dumps(ids, indent=2) + "\n"
        write_atomically(self.folder / IDS_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    def _send(self, figures: Mapping[str, float]) -> None:
        if self._tracker is not None:
            self._carefully(lambda: self._tracker.log(dict(figures), step=self._step))

    def _carefully(self, work: Callable[[], object]) -> None:
        """Do something with the tracker; what fails is said, and the tracker let go."""
        try:
            work()
        except Exception as error:
            tracker, self._tracker = self._tracker, None
            with suppress(Exception):  # MLflow would take it for the process's run for ever
                self.service.fail(tracker.tracker)
            say(
                f"{arg('sink', self.service.name)}: {self.service.name} failed ({reason_of(error)}); the run goes on "
                f"without it, and its figures are in {self.folder / 'metrics.jsonl'}."
            )


def config_of_start(event: RunStarted) -> Values:
    """What a tracker keeps of a run's start, by dotted key: recipe, plan and estimated bytes; lists become text."""
    plan = {key: value for key, value in event.plan.items() if key not in ("format", "made_for")}  # the recipe has it
    bytes_of = {
        "estimated_peak_bytes": event.estimated_peak_bytes,
        "estimated_end_to_end_peak_bytes": event.estimated_end_to_end_peak_bytes,
    }
    values = {**event.recipe, **_leaves(plan, "plan", "."), **bytes_of}
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in values.items()
        if value is not None
    }


def figures_of_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary, by name: ``summary/test_accuracy``, ``summary/test_module_accuracy/0``."""
    without = {name: value for name, value in summary.items() if name not in ("format", "seed", "plan")}
    found: dict[str, float] = {}
    waiting = list(_leaves(without, "summary", "/").items())
    for name, value in waiting:
        if isinstance(value, list | tuple):
            waiting.extend(_leaves(dict(enumerate(value)), name, "/").items())
        elif isinstance(value, int | float):
            found[name] = int(value) if isinstance(value, bool) else value
    return found


def _leaves(values: Mapping[Any, Any], name: str, between: str) -> Values:
    """Nested mappings as one, by joined names; lists are leaves."""
    found: Values = {}
    for key, value in values.items():
        own = f"{name}{between}{key}"
        found |= _leaves(value, own, between) if isinstance(value, Mapping) else {own: value}
    return found


def _read_ids(folder: Path) -> dict[str, str]:
    """Ids of a run by the name of the tracker; none, which is said, where the file can't be read."""
    path = folder / IDS_FILE
    if not path.exists():
        return {}
    try:
        return {str(name): str(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        say(f"{path}: can't be read ({reason_of(error)}); trackers begin new runs.")
        return {}
