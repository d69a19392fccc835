"""What a run says of images, as CSV and JSON: a row for each image, also for one that could not be read.

Columns are the same whatever happens: ``path``, ``class``, ``probability``, ``class_2``, ``probability_2`` and so on,
and last ``error``, why there is no class. JSON is a list of objects with these keys, ``null`` where CSV is empty.
Probabilities have all digits of their float32. Rows are written as they come, into a file that has its name at the end.

A name of a file may be any bytes; what is no UTF-8 in it stands as JSON and Python write it, such as backslash udcff.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from localgrad.app.using_runs import Prediction
from localgrad.errors import RecipeError, arg
from localgrad.formats import check_output_file
from localgrad.training.folder import written_atomically
from localgrad.training.images import is_image

Row = dict[str, str | float | None]
Write = Callable[[Prediction], object]


def check_prediction_files(files: Mapping[str, Path]) -> None:
    """Refuse files that can't be written, by the names of their arguments.

    Raises:
        RecipeError: as `check_output_file` says; two are one file; or one is an image.
    """
    for name, path in files.items():
        if str(path) == "-":
            raise RecipeError(f"{arg(name, '-')}: name a file; of a pipe, {arg(name, '/dev/stdout')}.")
        check_output_file(name, path)
        if not is_stream(path):
            check_output_file(name, path.parent / f".{path.name}.part")  # beside it, where it is written first
        if path.is_file() and is_image(str(path), path.suffix.lower()):
            raise RecipeError(f"{arg(name)}: {str(path)!r} is an image; name another file.")
    first, *others = files.items() or [("", Path())]
    for name, path in others:
        if path.resolve() == first[1].resolve():
            raise RecipeError(f"{arg(name)}: {str(path)!r} is that of {arg(first[0])} as well; name another file.")


@contextmanager
def written_predictions(files: Mapping[str, Path], num_named: int) -> Iterator[Write]:
    """A region in which predictions are written, each to all files; they are there at its end, and not before.

    Args:
        files: by kind, ``csv`` and ``json``.
        num_named: classes that each image has.
    """
    kinds = {"csv": _csv_rows, "json": _json_rows}
    with ExitStack() as stack:
        writers = [stack.enter_context(_opened(path, kinds[kind], num_named)) for kind, path in files.items()]

        def write(prediction: Prediction) -> None:
            for each in writers:
                each(prediction)

        yield write


@contextmanager
def _opened(path: Path, rows: Callable[[IO[str], list[str]], Any], num_named: int) -> Iterator[Write]:
    columns = ["path", *(f"{key}{n}" for n in ("", *_numbers(num_named)) for key in ("class", "probability")), "error"]
    with ExitStack() as stack:
        place = path if is_stream(path) else stack.enter_context(written_atomically(path.resolve()))
        how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        file = stack.enter_context(place.open("a" if place == path else "w", **how))  # type: ignore[call-overload]
        write = stack.enter_context(rows(file, columns))
        yield lambda prediction: write(_row_of(prediction, columns))


def _numbers(num_named: int) -> list[str]:
    return [f"_{number}" for number in range(2, num_named + 1)]


def _row_of(prediction: Prediction, columns: list[str]) -> Row:
    values: list[str | float | None] = [value for named in prediction.classes for value in named]
    values += [None] * (len(columns) - 2 - len(values))
    return dict(zip(columns, [str(prediction.path), *values, prediction.error], strict=True))


@contextmanager
def _csv_rows(file: IO[str], columns: list[str]) -> Iterator[Callable[[Row], object]]:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    yield writer.writerow


@contextmanager
def _json_rows(file: IO[str], columns: list[str]) -> Iterator[Callable[[Row], object]]:
    before = "[\n"

    def write(row: Row) -> None:
        nonlocal before
        file.write(before + json.dumps(row, ensure_ascii=False))
        before = ",\n"

    yield write
    file.write("[]\n" if before == "[\n" else "\n]\n")


def is_stream(path: Path) -> bool:
    """Whether a path is no file to be replaced: a pipe, ``/dev/stdout``."""
    return path.is_relative_to("/dev") or (path.exists() and not path.is_file())


def shown_path(path: Path) -> str:
    """A path on one line, whatever its name has in it."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(path))
