"""What happens during a run, as typed events, and where they go.

The trainer emits; sinks print, write JSON lines or TensorBoard files, or do what a user registers. A sink never changes
a run. Figures are plain Python numbers: the trainer reads them from the device at most once a second.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final, runtime_checkable

from localgrad.errors import RecipeError, arg
from localgrad.registry import Registry
from localgrad.training.folder import say, write_atomically
from localgrad.units import format_bytes, format_counts, format_rate, format_seconds, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """A run begins or is resumed.

    Attributes:
        folder: the run folder.
        title: one line: data, model, modules, objective, device.
        details: further lines worth seeing before the wait.
        epochs: in all.
        start_epoch: first one to run.
        batches_per_epoch: updates an epoch.
        epochs_per_module: where modules are trained one after another, the epochs of each; ``epochs`` is their sum.
        recipe: values of the run's recipe by dotted key; what isn't set is left out.
        plan: the plan that it runs by, as ``Plan.to_dict`` gives it.
        estimated_peak_bytes: of the run's largest step.
        estimated_end_to_end_peak_bytes: of such a step of the whole model.
    """

    folder: str
    title: str
    details: tuple[str, ...]
    epochs: int
    start_epoch: int
    batches_per_epoch: int
    epochs_per_module: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    estimated_peak_bytes: int | None = None
    estimated_end_to_end_peak_bytes: int | None = None

    def name_of(self, epoch: int) -> str:
        """An epoch as a person counts: ``12/24``, or ``12/24 of module 3/4``."""
        if self.epochs_per_module is None:
            return f"{min(epoch + 1, self.epochs):>3}/{self.epochs}"
        module, own = divmod(min(epoch, self.epochs - 1), self.epochs_per_module)
        return f"{own + 1:>3}/{self.epochs_per_module} of module {module + 1}/{self.epochs // self.epochs_per_module}"


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """Some batches were trained on, about once a second.

    Attributes:
        epoch: from 0.
        batch: batches done in this epoch.
        losses: each local module's total loss, of the last batch.
        images_per_second: since the last such event.
    """

    epoch: int
    batch: int
    losses: tuple[float, ...]
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """An epoch is over and validated.

    Attributes:
        epoch: from 0.
        losses: each local module's terms by name, averaged over the epoch.
        train_accuracy: of the whole model, on the batches as they were trained on; ``None`` with soft labels.
        val_accuracy: of the whole model (its weight average where one is kept); ``None`` without validation images.
        val_module_accuracy: of each local module's own classifier.
        learning_rate: at the end of the epoch.
        images_per_second: of training, over the run so far.
        seconds: training and validation.
        is_best: whether this epoch is the best so far (of the module, where it alone is trained).
        module: the only one that was trained; ``None`` where all were. Of the others, losses are empty and accuracies
            ``None``.
    """

    epoch: int
    losses: tuple[dict[str, float], ...]
    train_accuracy: float | None
    val_accuracy: float | None
    val_module_accuracy: tuple[float | None, ...]
    learning_rate: float
    images_per_second: float
    seconds: float
    is_best: bool
    module: int | None = None


@dataclass(frozen=True, kw_only=True)
class HealthMeasured:
    """The health of each local module was measured after an epoch; see ``health.py``.

    Attributes:
        epoch: from 0.
        modules: each module's figures by name; what can't be measured is left out.
    """

    epoch: int
    modules: tuple[dict[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Replanned:
    """Memory ran out, and the run goes on with what needs less.

    Attributes:
        place: in what it ran out: ``local module 2``, ``an end-to-end step``, ``validation``, ``the health check``.
        how: what the new plan recomputes, and its accumulation; or how many images are looked at together from now on.
        peak_bytes: estimated, of the new plan; ``None`` where it is no step that has one.
    """

    place: str
    how: str
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoppedEarly:
    """A run is over before its last epoch, as validation accuracy didn't rise for as long as it was waited for.

    Attributes:
        epoch: the last that was trained, from 0.
        epochs: how many there would have been.
        num_waited: epochs since the best one.
    """

    epoch: int
    epochs: int
    num_waited: int


@dataclass(frozen=True, kw_only=True)
class FeaturesCached:
    """A finished module's features were computed and stored.

    Attributes:
        module: whose they are, from 0.
        num_bytes: on disk.
        seconds: that it took.
    """

    module: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """A run is over; the summary is what ``summary.json`` holds."""

    summary: Mapping[str, Any]


Event = RunStarted | Progressed | EpochEnded | HealthMeasured | FeaturesCached | Replanned | StoppedEarly | RunEnded


@runtime_checkable
class Sink(Protocol):
    """Takes events. What has these two methods is one; inheriting brings a ``close`` that does nothing."""

    @abstractmethod
    def emit(self, event: Event) -> None:
        """Take one event: ``RunStarted`` first, ``RunEnded`` last; other kinds may be added, so ignore what is new."""

    def close(self) -> None:
        """Release what the sink holds; called once, also after an error."""


SINKS: Registry[Callable[[Path], Sink]] = Registry("sink")


def register_sink(name: str, sink: Callable[[Path], Sink]) -> None:
    """Give a sink a name, by which recipes (``execution.sinks``) and the command line choose it.

    Args:
        name: for ``--sink``.
        sink: a class or function, called with the run folder when the run begins or is resumed. If it has a
            ``check_available`` (of a class, a class method), that is called before anything is made, and raises a
            ``RecipeError`` where the sink can't be had.

    Raises:
        RecipeError: the name is another's.
    """
    SINKS.register(name, sink)


def check_sinks(sinks: Sequence[Sink | str], *, by_name: bool = False) -> None:
    """Refuse unknown names, what can't be had here, what takes no events, and what would take them twice.

    Args:
        sinks: names, or sinks that are made.
        by_name: whether names alone are looked at, not whether their libraries are there.

    Raises:
        RecipeError: naming it.
    """
    for index, sink in enumerate(sinks):
        if any(sink is other or (isinstance(sink, str) and sink == other) for other in sinks[:index]):
            raise RecipeError(
                f"{arg('sinks')}: {sink!r} is there twice, and would write everything twice; give it once (a recipe's "
                "own count as well)."
            )
        if isinstance(sink, str):
            found = SINKS.find(sink)
            if not by_name:
                getattr(found, "check_available", lambda: None)()
        elif isinstance(sink, type) or not isinstance(sink, Sink):
            raise RecipeError(
                f"{arg('sinks')}: got {sink!r}, which is no sink; give a name, or an object with emit and close."
            )


def make_sinks(sinks: Sequence[Sink | str], folder: Path) -> list[Sink]:
    """Sinks as they are, and those that are named, made for a run folder.

    The console that is named gives way to one that is made already, as the command line's is.
    """
    has_console = any(isinstance(sink, ConsoleSink) for sink in sinks)
    wanted = [sink for sink in sinks if not (has_console and isinstance(sink, str) and sink == "console")]
    return [SINKS.find(sink)(folder) if isinstance(sink, str) else sink for sink in wanted]


def _of_epochs(lines: Sequence[str], number: int) -> list[str]:
    """Lines of the first epochs."""
    return [line for line in lines if json.loads(line)["epoch"] < number]


@final
class JsonlSink(Sink):
    """One JSON object an epoch, and one a health check (it has ``health``), appended to a file.

    Args:
        path: the file.
        keep_epochs: on resuming, lines of later epochs are dropped: they will be written again.
        known: on resuming, the lines that the checkpoint keeps; what the file lost of them is restored.

    Attributes:
        lines: all that were written, for checkpoints to keep.
    """

    def __init__(self, path: Path, keep_epochs: int = 0, known: Sequence[str] | None = None) -> None:
        found, unsound = read_metrics(path)
        kept = _of_epochs(found, keep_epochs)
        self.lines = kept if known is None else _of_epochs(known, keep_epochs)
        if unsound or kept != self.lines:
            lost = f"line {', '.join(map(str, unsound))} damaged" if unsound else "lines changed or missing"
            mended = "left out" if known is None else f"all {len(self.lines)} lines taken as the checkpoint keeps them"
            say(f"{path}: {lost}; {mended}.")
        text = "".join(line + "\n" for line in self.lines)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def emit(self, event: Event) -> None:
        """Write an epoch's figures."""
        match event:
            case EpochEnded():
                values = asdict(event)
            case HealthMeasured():
                values = {"epoch": event.epoch, "health": event.modules}
            case _:
                return
        line = json.dumps(values)
        self.lines.append(line)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> tuple[list[str], list[int]]:
    """The sound lines of a ``metrics.jsonl``, which needn't exist; and the numbers, from 1, of those that are not."""
    sound, unsound = [], []
    content = path.read_bytes() if path.exists() else b""
    for number, encoded in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), 1):
        try:
            line = encoded.decode()
            is_sound = isinstance(json.loads(line)["epoch"], int)
        except (ValueError, KeyError, TypeError, RecursionError):  # no text, no JSON, or of another kind
            is_sound = False
        if is_sound:
            sound.append(line)
        else:
            unsound.append(number)
    return sound, unsound


def figures_of(event: EpochEnded | HealthMeasured) -> dict[str, float]:
    """An event's figures by name, as TensorBoard and other trackers show them; what wasn't measured is left out."""
    if isinstance(event, HealthMeasured):
        modules = enumerate(event.modules)
        return {f"health/module{index}/{name}": value for index, own in modules for name, value in own.items()}
    figures: dict[str, float | None] = {
        "accuracy/train": event.train_accuracy,
        "accuracy/val": event.val_accuracy,
        "learning_rate": event.learning_rate,
        "images_per_second": event.images_per_second,
    }
    for index, terms in enumerate(event.losses):
        figures |= {f"loss/module{index}/{name}": value for name, value in terms.items()}
    for index, accuracy in enumerate(event.val_module_accuracy):
        figures[f"accuracy/val_module{index}"] = accuracy
    return {name: value for name, value in figures.items() if value is not None}


@final
class TensorBoardSink(Sink):
    """TensorBoard event files: losses by module and term, accuracies, learning rate, speed, health by module.

    On resuming, what was written of later epochs than the run starts with is hidden.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def emit(self, event: Event) -> None:
        """Write an epoch's figures."""
        match event:
            case RunStarted():
                self._open(event.start_epoch)
            case EpochEnded() | HealthMeasured():
                self._write(event.epoch, figures_of(event))

    def _open(self, epoch: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=epoch or None)
        return self._writer

    def _write(self, epoch: int, figures: Mapping[str, float]) -> None:
        writer = self._writer or self._open(0)
        for name, value in figures.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()  # else a killed process would take the last two minutes with it

    def close(self) -> None:
        """Write out and close the files."""
        if self._writer is not None:
            self._writer.close()


@final
class ConsoleSink(Sink):
    """A live progress display, or plain lines where there is no terminal; then the summary."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started: RunStarted | None = None
        self._last_line = 0.0

    def emit(self, event: Event) -> None:
        """Print what a person wants to see of an event."""
        match event:
            case RunStarted():
                self._start(event)
            case Progressed():
                self._advance(event)
            case EpochEnded():
                self._end_epoch(event)
            case HealthMeasured():
                self._print(f"  health: {health(event.modules)}")
            case Replanned():
                peak = "" if event.peak_bytes is None else f": {format_bytes(event.peak_bytes)}"
                self._print(f"memory ran out in {event.place}; going on with {event.how}{peak}")
            case StoppedEarly():
                self._print(
                    f"Stopped after epoch {event.epoch + 1} of {event.epochs}: validation accuracy hasn't risen for "
                    f"{event.num_waited} epoch{'s' * (event.num_waited > 1)}."
                )
            case FeaturesCached():
                size, seconds = format_bytes(event.num_bytes), format_seconds(event.seconds)
                self._print(f"features of module {event.module + 1} cached: {size}, {seconds}")
            case RunEnded():
                self.close()
                if self._started is None:
                    self._print(f"The run in {event.summary['folder']} is complete; nothing is left to train.")
                print_summary(self.console, event.summary)

    def close(self) -> None:
        """End the live display."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self, event: RunStarted) -> None:
        self._started = event
        self._print(event.title, style="bold")
        for line in event.details:
            self._print(line)
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("loss {task.fields[losses]}  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task(
            "",
            total=event.epochs * event.batches_per_epoch,
            completed=event.start_epoch * event.batches_per_epoch,
            epoch=event.name_of(event.start_epoch).strip(),
            losses=printable("…", self.console.encoding),
            rate="",
        )
        self._progress.start()

    def _advance(self, event: Progressed) -> None:
        assert self._started is not None, "a run starts before it progresses"
        losses = " ".join(f"{loss:.3f}" for loss in event.losses)
        rate = format_rate(event.images_per_second)
        if self._progress is not None:
            self._move(self._started, event.epoch, event.batch, losses=losses, rate=rate)
        elif time.monotonic() - self._last_line > 10:  # a log file wants fewer lines than a screen
            self._last_line = time.monotonic()
            of = self._started.batches_per_epoch
            epoch = self._started.name_of(event.epoch).strip() if self._started.epochs_per_module else event.epoch + 1
            self._print(f"  epoch {epoch} batch {event.batch}/{of}  loss {losses}  {rate}")

    def _end_epoch(self, event: EpochEnded) -> None:
        assert self._started is not None, "a run starts before it ends"
        losses = " ".join(f"{sum(terms.values()):.3f}" for terms in event.losses if terms)
        parts = [f"epoch {self._started.name_of(event.epoch)}", f"loss {losses}"]
        if event.module is not None and event.val_module_accuracy[event.module] is not None:
            parts.append(f"validation {event.val_module_accuracy[event.module]:.2%}")
        elif event.val_accuracy is not None:
            parts.append(f"validation {event.val_accuracy:.2%}")
            parts.append(f"by module {accuracies(event.val_module_accuracy)}")
        parts.append(format_rate(event.images_per_second))
        parts.append(format_seconds(event.seconds) + (" *" if event.is_best else ""))
        self._print("  ".join(parts))
        of = self._started.batches_per_epoch
        self._move(self._started, event.epoch, of, losses=losses, rate=format_rate(event.images_per_second))

    def _move(self, run: RunStarted, epoch: int, batch: int, **shown: Any) -> None:
        """Move the live display, where there is one."""
        if self._progress is not None and self._task is not None:
            done = epoch * run.batches_per_epoch + batch
            self._progress.update(self._task, completed=done, epoch=run.name_of(epoch).strip(), **shown)

    def _print(self, line: str, style: str | None = None) -> None:
        """Print a line as it is: names and paths may hold what rich would take for markup."""
        text = printable(line, self.console.encoding)
        self.console.print(text, style=style, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _console(_folder: Path) -> Sink:
    from rich.console import Console

    return ConsoleSink(Console())


register_sink("tensorboard", lambda folder: TensorBoardSink(folder / "tensorboard"))
register_sink("console", _console)
for _name in ("wandb", "mlflow", "trackio"):
    SINKS.declare(_name, f"localgrad.integrations.trackers:{_name.upper()}")


def accuracies(values: Sequence[float | None]) -> str:
    """Print accuracies in a row: ``91.2% 94.0%``, a dash where a module has no classifier."""
    return " ".join("–" if value is None else f"{value:.1%}" for value in values)  # noqa: RUF001  # a dash is meant


def health(modules: Sequence[Mapping[str, float]]) -> str:
    """Print health figures in a row, name by name; accuracies of the modules' own classifiers stand elsewhere."""
    names = dict.fromkeys(name for own in modules for name in own if name != "local_accuracy")
    parts = []
    for name in names:
        values = [own.get(name) for own in modules]
        if name.endswith("_accuracy"):
            parts.append(f"{name.removesuffix('_accuracy').replace('_', ' ')} {accuracies(values)}")
        else:
            figures = " ".join("–" if value is None else f"{value:.2f}" for value in values)  # noqa: RUF001  # likewise
            parts.append(f"{name.replace('_', ' ').replace('cka', 'CKA')} {figures}")
    return "  ".join(parts) or "nothing to measure yet"


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print a run's summary, a figure a line; no line is cut, so that the folder can be copied."""
    from rich.text import Text

    rows = summary_rows(summary)
    width = max(len(name) for name, _ in rows) + 2
    console.print()
    for name, value in rows:
        text = Text.assemble((name.ljust(width), "bold"), printable(value, console.encoding))
        console.print(text, highlight=False, soft_wrap=True)


def _epochs_row(summary: Mapping[str, Any]) -> str:
    """How many epochs there were, and the best of them."""
    epochs = f"{summary['num_epochs']} of " if summary.get("stopped_early") else ""
    parts = [f"{epochs}{summary['epochs']}, the best was {summary['best_epoch'] + 1}"]
    if summary.get("stopped_early"):
        parts.append("stopped early")
    if summary.get("extended_at"):
        parts.append(f"extended after {summary['extended_at']}")
    return "; ".join(parts)


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of a printed summary, as (name, value)."""
    left_out = summary.get("skipped", {}).get("test", {})
    without = f"; left out: {format_counts(left_out)}" if left_out else ""
    peak, baseline = summary["estimated_peak_bytes"], summary["estimated_end_to_end_peak_bytes"]
    epochs, while_training = _epochs_row(summary), "while training"
    when = "at the end" if summary.get("extended_at") else "once, at the end"  # it may have been read before
    if "best_epochs" in summary:  # modules were trained one after another
        best = ", ".join(str(epoch + 1) for epoch in summary["best_epochs"])
        epochs = f"{summary['epochs']} a module, one after another; the best were {best}"
        while_training = "through all modules, without the caching"
    reserved = ""
    if "measured_reserved_bytes" in summary:
        reserved = f", {format_bytes(summary['measured_reserved_bytes'])} reserved"
    return [
        (
            "test accuracy",
            f"{summary['test_accuracy']:.2%}  ({summary['num_test']:,} images, read {when}{without})",
        ),
        ("by module", accuracies(summary["test_module_accuracy"]) + "  (each local module's own classifier)"),
        (
            "peak memory",
            f"{format_bytes(peak)} estimated, {peak / baseline:.2f} x end-to-end ({format_bytes(baseline)})",
        ),
        ("measured", f"{format_bytes(summary['measured_peak_bytes'])} ({summary['measured_peak_of']}){reserved}"),
        ("speed", f"{format_rate(summary['images_per_second'])} {while_training}"),
        ("epochs", epochs),
        ("time", format_seconds(summary["seconds"])),
        ("run folder", summary["folder"]),
    ]
