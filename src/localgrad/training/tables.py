"""Tables of images: parquet, Arrow, CSV and JSON files, folders of them, and the Hugging Face hub.

The Hugging Face library loads a table; here its columns are found by their types, its parts by their names, and its
labels (whole numbers, texts, booleans) become classes with their own names.

How it differs from taking the label column as it is: the library reads the files of all parts by the class names of the
first one, so that a part written with its names in another order would be read with wrong labels, silently. Here every
file's own names count, and classes are matched by name.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localgrad.errors import DataError, arg, did_you_mean, reason_of
from localgrad.training.folders import SPLITS, Split, is_hidden, split_of, visible_folders
from localgrad.training.image_sets import FileImages, FilesInTable, Skipped

TABLE_LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".jsonl": "json", ".json": "json"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
PATH_COLUMNS = (*IMAGE_COLUMNS, "file_name", "path", "file", "filename")
"""Text columns that are taken for paths of images, in tables without a column of images."""

METADATA = ("metadata.csv", "metadata.jsonl")
"""Tables of images beside them, by the library's own names."""

UNLABELLED = -1


@dataclass(frozen=True)
class Part:
    """One part of a data set: its images and its own class names.

    Their labels are indices into ``class_names``; -1 where there is none.
    """

    images: FileImages
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """The parts of a table or a folder.

    Attributes:
        parts: by split.
        notes: what a user should know about their choice.
        skipped: what was left out of each part while it was listed.
    """

    parts: Mapping[Split, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, Skipped] = field(default_factory=dict)


def find_tables(name: str, path: Path | None = None, *, config: str | None = None) -> Parts:
    """Load a table: a file or folder, or a name on the Hugging Face hub, in one of its configurations.

    Raises:
        DataError: nothing that the library can load, or no columns of images and labels in it.
    """
    import datasets

    if path is None:
        source = name.partition(":")[0]
        return _parts_of(name, _loaded(name, lambda: datasets.load_dataset(source, name=config)), "")
    if path.is_dir() and any((path / own).exists() for own in ("dataset_dict.json", "state.json")):
        return _parts_of(name, _loaded(name, lambda: datasets.load_from_disk(str(path))), str(path))
    if path.is_file():
        if path.suffix.lower() not in TABLE_LOADERS:
            raise DataError(
                f"{path} is a file that holds no data set: give a folder, or a file with one of the endings "
                f"{', '.join(TABLE_LOADERS)}."
            )
        return _parts_of(name, _by_files(name, {"train": [str(path)]}), str(path.parent))
    plain = _plain_tables(path)
    if plain:
        return _parts_of(name, _by_files(name, plain), str(path))
    if glob.has_magic(str(path.resolve())):
        raise DataError(
            f"The Hugging Face library takes the brackets, * or ? in {path.resolve()} for a pattern: rename the "
            f"folder, or name single files with {arg('train_data')}, {arg('val_data')} and {arg('test_data')}."
        )
    if holds_tables(path, kinds=(".parquet", ".arrow")):
        files = _loaded(name, partial(_data_files, str(path)))
        own_names = {_class_names_in(file) for paths in files.values() for file in paths} - {None}
        if len(own_names) > 1:
            return _parts_of(name, _by_files(name, files), str(path))
    return _parts_of(name, _loaded(name, lambda: datasets.load_dataset(str(path))), str(path))


def holds_tables(path: Path, kinds: tuple[str, ...] = tuple(TABLE_LOADERS)) -> str:
    """What tables of some endings a folder, or one of its folders, holds.

    Returns:
        ``only`` where they are what counts, ``beside`` where images may count more, or an empty text.
    """
    names = [(folder, entry.name) for folder in (path, *visible_folders(path)) for entry in os.scandir(folder)]
    tables = [folder / name for folder, name in names if name.lower().endswith(kinds) and not is_hidden(name)]
    tables = [table for table in tables if table.is_file()]
    if any(p.name in ("dataset_dict.json", "state.json") for p in tables):
        return "only"
    if any(p.suffix.lower() in (".parquet", ".arrow") or p.name in METADATA for p in tables):
        return "only"
    return "beside" if tables else ""


# -------------------------------------------------------------------------------------------------- loading


def _plain_tables(path: Path) -> dict[str, list[str]]:
    """CSV and JSON tables right in a folder, by the splits that they are named after.

    The library would pass over them where there are more images than tables. Not ``metadata``, which is its own name.
    """
    tables = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (".csv", ".jsonl", ".json") and p.is_file()]
    if not tables or any(p.name in METADATA for p in tables):
        return {}
    if any(p.suffix.lower() in (".parquet", ".arrow") for p in path.rglob("*")):
        return {}
    splits: dict[str, list[str]] = {}
    for table in tables:
        splits.setdefault(split_of(table.stem) or ("train" if len(tables) == 1 else table.stem), []).append(str(table))
    return splits


def _by_files(name: str, files: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
    """Each file loaded by itself, so that its own class names are read: part to one or several sets of rows."""
    import datasets

    def rows_of(path: str) -> Any:
        kind = TABLE_LOADERS.get(Path(path).suffix.lower(), "parquet")
        return _loaded(name, lambda: datasets.load_dataset(kind, data_files={"train": [glob.escape(path)]}))["train"]

    return {part: [rows_of(path) for path in paths] for part, paths in files.items()}


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        loaded = load()
    except (DatasetsError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        known = ("digits", "cifar10", "cifar100", "stl10", "svhn")
        raise DataError(
            f"{name} is not one of {', '.join(known)}, and the Hugging Face library can't load it: "
            f"{reason_of(error, limit=300)}{did_you_mean(name.lower(), known)}"
        ) from error
    if isinstance(loaded, dict):
        return {str(part): rows for part, rows in loaded.items()}
    return {"train": loaded}


def _data_files(source: str) -> dict[str, list[str]]:
    """The files of each part, as the library finds them; nothing where they have no class names of their own."""
    import datasets

    found = datasets.load_dataset_builder(source).config.data_files or {}
    return {str(part): [str(path) for path in paths] for part, paths in found.items()}


def _class_names_in(path: str) -> str | None:
    """The class names that a parquet or Arrow file brings, as text; None where it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.lower().endswith(".parquet"):
            metadata = pq.read_schema(path).metadata
        elif path.lower().endswith(".arrow"):
            with pa.memory_map(path) as source:
                metadata = pa.ipc.open_stream(source).schema.metadata
        else:
            return None
        features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (OSError, ValueError, AttributeError, pa.ArrowInvalid):
        return None  # the library will say what is wrong with it
    names = {column: kind["names"] for column, kind in features.items() if "names" in kind}
    return json.dumps(names, sort_keys=True) if names else None


# ---------------------------------------------------------------------------------------------------- parts


def _parts_of(name: str, loaded: Mapping[str, Any], folder: str) -> Parts:
    """The parts that a loaded table has, by the names of splits."""
    splits: dict[Split, str] = {}
    for part in loaded:
        split = split_of(part)
        if split is None:
            continue
        if split in splits and part != split and splits[split] != split:
            raise DataError(
                f"{name} has two parts for the split {split}, {splits[split]!r} and {part!r}: name the file of "
                f"one with "
                f"--{split}-data FILE."
            )
        if split not in splits or part == split:
            splits[split] = part
    if "train" not in splits:
        raise DataError(f"{name} has no part 'train', only {', '.join(loaded)}.")
    parts: dict[Split, Part] = {}
    notes = [f"The part {part!r} is not used." for part in loaded if part not in splits.values()]
    for split in SPLITS:
        if split not in splits:
            continue
        rows = loaded[splits[split]]
        rows = rows if isinstance(rows, list) else [rows]
        if split != "train" and not all(_has_columns(own) for own in rows):
            notes.append(f"The part {splits[split]!r} is not used: it has no labels.")
            continue
        read = _part(f"{name} {split}", rows, folder)
        unlabelled = read.images.labels == UNLABELLED
        if split == "train" and len(read.images) and unlabelled.all():
            raise DataError(f"The part {splits[split]!r} of {name} has no labels: all are missing or -1.")
        if split != "train" and len(read.images) and unlabelled.all():
            # Some publishers keep the labels of the test part to themselves, and write -1.
            notes.append(f"The part {splits[split]!r} is not used: its images have no labels.")
            continue
        parts[split] = read
    return Parts(parts, tuple(notes))


def _has_columns(rows: Any) -> bool:
    try:
        _columns("", rows)
    except DataError:
        return False
    return True


def _part(name: str, tables: Sequence[Any], folder: str) -> Part:
    import datasets

    images, labels, class_names = [], [], []
    for rows in tables:
        image, label = _columns(name, rows)
        own, names = _labels(rows, label)
        if not isinstance(rows.features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image())  # noqa: PLW2901  paths, bytes or structs of both
        only = rows.select_columns([image])
        images.append(only if image == "image" else only.rename_column(image, "image"))
        labels.append(own)
        class_names.append(names)
    together = images[0] if len(images) == 1 else datasets.concatenate_datasets(images)
    names = tuple(dict.fromkeys(name for names in class_names for name in names))
    own = torch.cat([matched(own, each, names) for own, each in zip(labels, class_names, strict=True)])
    return Part(FileImages(FilesInTable(together.with_format("arrow"), "image", name, folder), own), names)


def matched(labels: Tensor, names: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Labels of some class names as labels of others, by name.

    Args:
        labels: int64 [N], indices into ``names``; others stay as they are.
        names: what they mean.
        wanted: what they are to mean; has all names that occur.
    """
    if tuple(names) == tuple(wanted[: len(names)]):
        return labels
    index = {name: number for number, name in enumerate(wanted)}
    table = torch.tensor([index.get(name, UNLABELLED) for name in names] + [len(wanted)])  # the last one is of no class
    return torch.where(labels >= 0, table[labels.clamp(0, len(names))], labels)


def _columns(name: str, rows: Any) -> tuple[str, str]:
    """Find the image column and the label column."""
    from datasets import ClassLabel, Image

    features = rows.features
    kinds = {column: str(getattr(kind, "dtype", "")) for column, kind in features.items()}
    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    image = _pick(images, IMAGE_COLUMNS)
    if image is None and not images:
        bytes_ = [c for c in IMAGE_COLUMNS if "binary" in kinds.get(c, "") or _is_struct(features.get(c))]
        paths = [c for c in PATH_COLUMNS if "string" in kinds.get(c, "")]
        image = next(iter([*bytes_, *paths]), None)
    classes = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    plain = [c for c in LABEL_COLUMNS if any(word in kinds.get(c, "") for word in ("int", "string", "bool", "float"))]
    label = _pick(classes, LABEL_COLUMNS) or _pick(plain, LABEL_COLUMNS)
    if image is None or label is None:
        lacking = "column of type Image" if image is None else "label column (type ClassLabel)"
        columns = ", ".join(f"{c} ({type(kind).__name__})" for c, kind in features.items())
        raise DataError(f"{name} has no single {lacking}: its columns are {columns}.")
    return image, label


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, dict) and set(kind) <= {"bytes", "path"} and "bytes" in kind


def _pick(candidates: list[str], preferred: Sequence[str]) -> str | None:
    """The only candidate, or else the first preferred one among them."""
    if len(candidates) == 1:
        return candidates[0]
    return next((column for column in preferred if column in candidates), None)


def _labels(rows: Any, column: str) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices [N], -1 where there is none, and the names of the classes."""
    from datasets import ClassLabel

    cells = rows.select_columns([column]).with_format("arrow")[:][column]
    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        numbers = cells.fill_null(UNLABELLED).to_numpy()
        return torch.from_numpy(numbers.astype(np.int64)), tuple(kind.names)
    return indexed(cells.to_pylist(), f"the column {column!r}")


def indexed(values: Sequence[Any], what: str) -> tuple[Tensor, tuple[str, ...]]:
    """Make classes of labels of any plain type.

    Args:
        values: whole numbers, whole floats, booleans or texts. None, floats that are no number, and nothing but -1
            mean no label.
        what: where they are from, for messages.

    Returns:
        Indices int64 [N], -1 where there is no label, into the names, which are in the order of the values.

    Raises:
        DataError: floats that are not whole.
    """
    plain = [_class_label(value, what) for value in values]
    known = {value for value in plain if value is not None}
    if known == {UNLABELLED}:
        known = set()
    ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
    index = {value: number for number, value in enumerate(ordered)}
    labels = torch.tensor([index.get(value, UNLABELLED) if value is not None else UNLABELLED for value in plain])
    return labels.long(), tuple(str(value) for value in ordered)


def _class_label(value: Any, what: str) -> int | str | bool | None:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, int | str):
        return value
    raise DataError(f"Labels must be classes: whole numbers, texts or booleans; {what} has {value!r}.")
