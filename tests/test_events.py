"""Events and where they go: console, JSON lines, TensorBoard."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from localgrad.errors import RunWarning
from localgrad.training.events import (
    ConsoleSink,
    EpochEnded,
    Event,
    JsonlSink,
    Progressed,
    RunEnded,
    RunStarted,
    TensorBoardSink,
    accuracies,
    make_sinks,
    summary_rows,
)

SUMMARY: dict[str, Any] = {
    "test_accuracy": 0.9731,
    "test_module_accuracy": [0.8, None, 0.9731],
    "num_test": 1359,
    "best_epoch": 1,
    "epochs": 3,
    "estimated_peak_bytes": 3 * 2**20,
    "estimated_end_to_end_peak_bytes": 8 * 2**20,
    "measured_peak_bytes": 900 * 2**20,
    "measured_peak_of": "the whole process",
    "images_per_second": 1234.5,
    "seconds": 75.0,
    "folder": "runs/" + "a-very-long-name-" * 8 + "[bold]:car:",
}


def started(start_epoch: int = 0, **changes: Any) -> RunStarted:
    values: dict[str, Any] = {
        "folder": "runs/x",
        "title": "swin on digits",
        "details": ("modules: a | b",),
        "epochs": 3,
        "start_epoch": start_epoch,
        "batches_per_epoch": 10,
    }
    return RunStarted(**{**values, **changes})


def progressed(epoch: int, batch: int) -> Progressed:
    return Progressed(epoch=epoch, batch=batch, losses=(1.25, 0.5), images_per_second=321.0)


def ended(epoch: int, **changes: Any) -> EpochEnded:
    values: dict[str, Any] = {
        "epoch": epoch,
        "losses": ({"task": 1.5, "reconstruction": 0.25}, {"task": 0.75 + epoch}),
        "train_accuracy": 0.5,
        "val_accuracy": 0.625 + epoch / 16,
        "val_module_accuracy": (None, 0.625),
        "learning_rate": 1e-3 / (epoch + 1),
        "images_per_second": 321.0,
        "seconds": 2.5,
        "is_best": epoch != 1,
    }
    return EpochEnded(**{**values, **changes})


WHOLE_RUN: list[Event] = [
    started(),
    progressed(0, 4),
    ended(0),
    progressed(1, 4),
    ended(1),
    ended(2),
    RunEnded(summary=SUMMARY),
]


# ------------------------------------------------------------------------------------- console


def show(events: list[Event], *, terminal: bool, width: int = 60) -> str:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, force_terminal=terminal, width=width, legacy_windows=False))
    for event in events:
        sink.emit(event)
    sink.close()
    sink.close()  # closing twice is no fault
    return file.getvalue()


def test_without_a_terminal_lines_are_plain() -> None:
    text = show(WHOLE_RUN, terminal=False)
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[:3] == ["swin on digits", "modules: a | b", "  epoch 1 batch 4/10  loss 1.250 0.500  321 images/s"]
    assert lines[3] == (
        "epoch   1/3  loss 1.750 0.750  validation 62.50%  by module – 62.5%  321 images/s  2.50 s *"  # noqa: RUF001
    ), "lines are longer than the console is wide, and not broken"
    assert not lines[4].endswith("*"), "one progress line in ten seconds is enough, and epoch 2 was not the best"
    assert not [line for line in lines if line != line.rstrip()]


def test_the_console_that_is_named_gives_way_to_one_that_is_made(tmp_path: Path) -> None:
    """As of ``--sink console``, where the command line has its own: each line would be written twice."""
    made = ConsoleSink(Console(file=io.StringIO()))
    assert make_sinks(["console", made], tmp_path) == [made]
    [named] = make_sinks(["console"], tmp_path)
    assert isinstance(named, ConsoleSink)


def test_a_terminal_gets_a_live_display_that_reaches_its_end() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, force_terminal=True, width=100, legacy_windows=False))
    for event in WHOLE_RUN[:-1]:
        sink.emit(event)
    assert sink._progress is not None
    [task] = sink._progress.tasks
    assert (task.completed, task.total) == (30, 30)
    sink.emit(WHOLE_RUN[-1])
    assert sink._progress is None, "the display ends before the summary"
    assert "\x1b[" in file.getvalue()
    assert "epoch 3/3" in file.getvalue()
    assert file.getvalue().count("test accuracy") == 1


def test_a_resumed_run_starts_its_display_where_it_stood() -> None:
    sink = ConsoleSink(Console(file=io.StringIO(), force_terminal=True, width=100))
    sink.emit(started(start_epoch=2))
    assert sink._progress is not None
    assert sink._progress.tasks[0].completed == 20
    sink.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_names_that_look_like_markup_are_printed_as_they_are(terminal: bool) -> None:
    text = show([started(title="on data/[/red]:car: [bold]x", details=("[/]",))], terminal=terminal, width=200)
    assert "on data/[/red]:car: [bold]x" in text
    assert "[/]\n" in text


def test_without_validation_images_no_accuracy_is_printed() -> None:
    event = ended(0, val_accuracy=None, val_module_accuracy=(None, None), train_accuracy=None)
    assert "validation" not in show([started(), event], terminal=False)


def test_the_summary_says_everything_on_lines_that_are_not_cut() -> None:
    lines = show(WHOLE_RUN, terminal=False, width=40).splitlines()
    text = "\n".join(lines)
    for words in (
        "test accuracy  97.31%  (1,359 images, read once, at the end)",
        "by module      80.0% – 97.3%",  # noqa: RUF001
        "3.00 MiB estimated, 0.38 x end-to-end (8.00 MiB)",
        "900 MiB (the whole process)",
        "1,234 images/s",
        "3, the best was 2",
        "1 min 15 s",
    ):
        assert words in text, words
    assert f"run folder     {SUMMARY['folder']}" in lines
    assert [name for name, _ in summary_rows(SUMMARY)] == [
        "test accuracy",
        "by module",
        "peak memory",
        "measured",
        "speed",
        "epochs",
        "time",
        "run folder",
    ]


def test_a_summary_without_a_run_says_that_nothing_is_left() -> None:
    lines = show([RunEnded(summary=SUMMARY)], terminal=False).splitlines()
    assert lines[0] == f"The run in {SUMMARY['folder']} is complete; nothing is left to train."
    assert "test accuracy  97.31%" in lines[2]


def test_a_module_without_a_classifier_is_a_dash() -> None:
    assert accuracies([0.5, None, 1.0]) == "50.0% – 100.0%"  # noqa: RUF001


# ------------------------------------------------------------------------------------- JSON lines


def write_lines(path: Path, epochs: range, keep: int) -> list[dict[str, Any]]:
    sink = JsonlSink(path, keep)
    sink.emit(started())
    sink.emit(progressed(0, 1))
    for epoch in epochs:
        sink.emit(ended(epoch))
    sink.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_an_epoch(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "metrics.jsonl", range(3), 0)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[1]["losses"] == [{"task": 1.5, "reconstruction": 0.25}, {"task": 1.75}]
    assert lines[1]["val_module_accuracy"] == [None, 0.625]


def test_on_resuming_later_epochs_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(3), 0)
    with path.open("a") as file:
        file.write('{"epoch": 1, "los')
    with pytest.warns(RunWarning, match="metrics.jsonl: line 4 damaged; left out"):
        lines = write_lines(path, range(2, 4), 2)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    path.write_text(path.read_text() + "[1]\n3\n{}\n\n")
    with pytest.warns(RunWarning, match="line 5, 6, 7, 8 damaged"):
        assert [line["epoch"] for line in write_lines(path, range(0), 4)] == [0, 1, 2, 3]
    assert write_lines(path, range(0), 0) == []
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------- TensorBoard


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_reads_the_figures_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for event in WHOLE_RUN[:5]:
        sink.emit(event)
    found = read_back(tmp_path)  # already before it is closed
    sink.close()
    assert set(found) == {
        "accuracy/train",
        "accuracy/val",
        "accuracy/val_module1",
        "learning_rate",
        "images_per_second",
        "loss/module0/task",
        "loss/module0/reconstruction",
        "loss/module1/task",
    }
    assert found["accuracy/val"] == [(0, 0.625), (1, 0.6875)]
    assert found["loss/module1/task"] == [(0, 0.75), (1, 1.75)]
    assert found["learning_rate"][1][1] == pytest.approx(5e-4)


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    for epochs, keep in ((range(3), 0), (range(1, 3), 1)):
        sink = TensorBoardSink(tmp_path)
        sink.emit(started(start_epoch=keep))
        for epoch in epochs:
            sink.emit(ended(epoch, val_accuracy=0.5 + keep / 4))
        sink.close()
    assert read_back(tmp_path)["accuracy/val"] == [(0, 0.5), (1, 0.75), (2, 0.75)]
