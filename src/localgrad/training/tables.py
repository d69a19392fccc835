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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localgrad.errors import DataError, arg, did_you_mean, reason_of
from localgrad.training.folders import SPLITS, Split, is_hidden, split_of, visible_folders
from localgrad.training.image_sets import FileImages, FilesInTable, Skipped
from localgrad.training.streams import SHUFFLE_BUFFER, StreamedImages

TABLE_LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".jsonl": "json", ".json": "json"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
PATH_COLUMNS = (*IMAGE_COLUMNS, "file_name", "path", "file", "filename")
"""Text columns that are taken for paths of images, in tables without a column of images."""

METADATA = ("metadata.csv", "metadata.jsonl")
"""Tables of images beside them, by the library's own names."""

UNLABELLED = -1
_NAMED = 5
"""Files that a note names; of more, their number."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What somebody says of a table, by the names of arguments; what is open is found.

    Attributes:
        image_column: of images.
        label_column: of labels.
        config: of a Hugging Face data set.
        streaming: whether it is read as it comes.
        num_examples: training images of a stream, where that isn't known.
        shuffle_buffer: of a stream.
    """

    image_column: str | None = None
    label_column: str | None = None
    config: str | None = None
    streaming: bool = False
    num_examples: int | None = None
    shuffle_buffer: int | None = None

    def refuse(self, what: str, *names: str) -> None:
        """Refuse what is given of some of these, by default of all, for what has no such thing.

        Raises:
            DataError: naming the first one.
        """
        for name in names or [each.name for each in fields(self)]:
            value = getattr(self, name)
            if value:
                raise DataError(f"{arg(name, value)}: {what}; leave it out.")


@dataclass(frozen=True)
class Part:
    """One part of a data set: its images and its own class names.

    Their labels are indices into ``class_names``; -1 where there is none.
    """

    images: FileImages | StreamedImages
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


def find_tables(name: str, path: Path | None = None, chosen: Chosen | None = None) -> Parts:
    """Load a table: a file or folder, or a name on the Hugging Face hub.

    Args:
        name: for messages; on the hub it is what is loaded.
        path: of a file or folder.
        chosen: its columns and configuration, where somebody says them.

    Raises:
        DataError: nothing that the library can load, or no columns of images and labels in it.
    """
    import datasets

    chosen = chosen or Chosen()
    if path is None:
        return _parts_of(name, _loaded_by_name(name, name, chosen), "", chosen)
    if path.is_dir() and any((path / own).exists() for own in ("dataset_dict.json", "state.json")):
        chosen.refuse(f"{path} was saved as one data set, and has no configurations", "config")
        return _parts_of(name, _loaded(name, lambda: datasets.load_from_disk(str(path))), str(path), chosen)
    if path.is_file():
        chosen.refuse(f"{path} is a file, and has no configurations", "config")
        if path.suffix.lower() not in TABLE_LOADERS:
            raise DataError(
                f"{path} is a file that holds no data set: give a folder, or a file with one of the endings "
                f"{', '.join(TABLE_LOADERS)}."
            )
        files: Mapping[str, Sequence[str]] = {"train": [str(path)]}
        counts = _counts_in(files) if chosen.streaming else {}
        return _parts_of(name, _by_files(name, files, chosen), str(path.parent), chosen, counts)
    plain = {} if _says_configs(path) else _plain_tables(path)
    if plain:
        chosen.refuse(f"{path} has tables without a README.md that names configurations", "config")
        return _parts_of(name, _by_files(name, plain, chosen), str(path), chosen)
    if glob.has_magic(str(path.resolve())):
        raise DataError(
            f"The Hugging Face library takes the brackets, * or ? in {path.resolve()} for a pattern: rename the "
            f"folder, or name single files with {arg('train_data')}, {arg('val_data')} and {arg('test_data')}."
        )
    counts, notes = {}, _notes_on_configs(path, chosen)
    if holds_tables(path, kinds=(".parquet", ".arrow")) or chosen.streaming:
        files = _loaded_by_name(name, str(path), chosen, partial(_data_files, str(path), chosen.config))
        notes += [] if _says_configs(path) else _notes_on_unread(path, files)
        own_names = {_class_names_in(file) for paths in files.values() for file in paths} - {None}
        if len(own_names) > 1:
            chosen.refuse(f"files of {path} list their classes otherwise than others", "streaming")
            found = _parts_of(name, _by_files(name, files, chosen), str(path), chosen)
            return replace(found, notes=(*found.notes, *notes))
        counts = _counts_in(files) if chosen.streaming else {}
    found = _parts_of(name, _loaded_by_name(name, str(path), chosen), str(path), chosen, counts)
    return replace(found, notes=(*found.notes, *notes))


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


def _by_files(name: str, files: Mapping[str, Sequence[str]], chosen: Chosen) -> dict[str, list[Any]]:
    """Each file loaded by itself, so that its own class names are read: part to one or several sets of rows."""
    import datasets

    def rows_of(path: str) -> Any:
        kind = TABLE_LOADERS.get(Path(path).suffix.lower(), "parquet")
        own = {"train": [glob.escape(path)]}
        return _loaded(name, lambda: datasets.load_dataset(kind, data_files=own, streaming=chosen.streaming))["train"]

    return {part: [rows_of(path) for path in paths] for part, paths in files.items()}


def _says_configs(path: Path) -> bool:
    """Whether a folder's README.md names configurations in its head, as data sets of the hub do."""
    readme = path / "README.md"
    return readme.is_file() and re.search(r"^configs:", readme.read_text("utf-8", "replace"), re.MULTILINE) is not None


def _notes_on_configs(path: Path, chosen: Chosen) -> list[str]:
    """Say that there are other configurations than the one that is taken where nobody chose."""
    import datasets

    known = datasets.get_dataset_config_names(str(path)) if _says_configs(path) and chosen.config is None else []
    return [f"Of the configurations {', '.join(known)} the default one is read."] if len(known) > 1 else []


def _notes_on_unread(path: Path, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Say which tables the library passes over: where some are named after splits, it takes no others."""
    read = {Path(file).resolve() for paths in files.values() for file in paths}
    tables = [each for each in sorted(path.rglob("*")) if each.suffix.lower() in (".parquet", ".arrow")]
    left = [str(each.relative_to(path)) for each in tables if each.resolve() not in read and not is_hidden(each.name)]
    more = f" and {len(left) - _NAMED:,} more" if len(left) > _NAMED else ""
    said = f"Not read: {', '.join(left[:_NAMED])}{more}: the Hugging Face library takes them for no part."
    return [said] if left and read else []


def _loaded_by_name(name: str, source: str, chosen: Chosen, load: Callable[[], Any] | None = None) -> Mapping[str, Any]:
    """What the library loads by a folder or a name on the hub, in the configuration that is chosen.

    Raises:
        DataError: it can't; where it has other configurations, with their names.
    """
    import datasets

    def load_it() -> Any:
        return datasets.load_dataset(source, name=chosen.config, streaming=chosen.streaming)

    try:
        loaded: Mapping[str, Any] = _loaded(name, load or load_it)
        return loaded
    except DataError as error:
        if not isinstance(error.__cause__, ValueError):  # as the library says that it has no such configuration
            raise
        try:
            known = [str(each) for each in datasets.get_dataset_config_names(source)]
        except Exception:  # of a data set that isn't there, whatever the library says
            raise error from None
        if chosen.config in known or (chosen.config is None and len(known) < 2):
            raise
        begin = "" if chosen.config is None else f"{arg('config', chosen.config)}: "
        several = f"the configuration{'s' * (len(known) > 1)} {', '.join(known)}"
        near = "" if chosen.config is None else did_you_mean(chosen.config, known)
        raise DataError(f"{begin}{name} has {several}; take {arg('config', known[0])}, or another.{near}") from error


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


def _data_files(source: str, config: str | None) -> dict[str, list[str]]:
    """The files of each part, as the library finds them; nothing where they have no class names of their own."""
    import datasets

    found = datasets.load_dataset_builder(source, name=config).config.data_files or {}
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


def _parts_of(
    name: str, loaded: Mapping[str, Any], folder: str, chosen: Chosen, counts: Mapping[str, int] | None = None
) -> Parts:
    """The parts that a loaded table has, by the names of splits."""
    if chosen.streaming:
        return _streamed_parts(name, loaded, folder, chosen, counts or {})
    parts: dict[Split, Part] = {}
    notes: list[str] = []
    for split, part, rows in _labelled_parts(name, loaded, chosen, notes):
        read = _part(f"{name} {split}", rows, folder, chosen)
        unlabelled = read.images.labels == UNLABELLED
        if split == "train" and len(read.images) and unlabelled.all():
            raise DataError(f"The part {part!r} of {name} has no labels: all are missing or -1.")
        if split != "train" and len(read.images) and unlabelled.all():
            # Some publishers keep the labels of the test part to themselves, and write -1.
            notes.append(f"The part {part!r} is not used: its images have no labels.")
            continue
        parts[split] = read
        notes += _notes_on_columns(rows[0], chosen) if split == "train" else []
    return Parts(parts, tuple(notes))


def _labelled_parts(
    name: str, loaded: Mapping[str, Any], chosen: Chosen, notes: list[str]
) -> Iterator[tuple[Split, str, list[Any]]]:
    """Each split, what its part is called, and its rows, file by file; what isn't used is noted."""
    splits = _splits_in(name, loaded)
    notes += [f"The part {part!r} is not used." for part in loaded if part not in splits.values()]
    for split in SPLITS:
        if split not in splits:
            continue
        rows = loaded[splits[split]]
        rows = rows if isinstance(rows, list) else [rows]
        if split != "train" and not all(_has_columns(own, chosen) for own in rows):
            notes.append(f"The part {splits[split]!r} is not used: it has no labels.")
            continue
        yield split, splits[split], rows


def _splits_in(name: str, loaded: Mapping[str, Any]) -> dict[Split, str]:
    """Which part of a loaded table is which split, by its name."""
    splits: dict[Split, str] = {}
    for part in loaded:
        split = split_of(part)
        if split is None:
            continue
        if split in splits and part != split and splits[split] != split:
            raise DataError(
                f"{name} has two parts for the split {split}, {splits[split]!r} and {part!r}: name the file of "
                f"one with {arg(f'{split}_data', 'FILE')}."
            )
        if split not in splits or part == split:
            splits[split] = part
    if "train" not in splits:
        raise DataError(f"{name} has no part 'train', only {', '.join(loaded)}.")
    return splits


def _streamed_parts(
    name: str, loaded: Mapping[str, Any], folder: str, chosen: Chosen, counts: Mapping[str, int]
) -> Parts:
    """The parts of a table that is streamed: of each the first images are read.

    Raises:
        DataError: its classes or its length aren't known before it is read.
    """
    parts: dict[Split, Part] = {}
    notes: list[str] = []
    for split, part, (rows, *_) in _labelled_parts(name, loaded, chosen, notes):
        images, class_names = _streamed_part(f"{name} {split}", rows, folder, chosen, counts.get(part))
        labels = images.head()[1]
        if split != "train" and len(labels) and (labels < 0).all():
            notes.append(f"The part {part!r} is not used: its first {len(labels)} images have no labels.")
            continue
        if len(set(labels.tolist())) == 1 < len(labels):
            notes.append(
                f"The first {len(labels)} images of the part {part!r} are of one class: if the stream is "
                "sorted by class, its order doesn't mix classes, and parts cut off of it don't have all."
            )
        parts[split] = Part(images, class_names)
        notes += _notes_on_columns(rows, chosen) if split == "train" else []
    return Parts(parts, tuple(notes))


def _streamed_part(
    name: str, rows: Any, folder: str, chosen: Chosen, count: int | None
) -> tuple[StreamedImages, tuple[str, ...]]:
    """The images of one part, which are not read yet, and its class names."""
    import datasets

    streaming = arg("streaming", value=True)
    if isinstance(rows, datasets.Dataset):
        count, rows = len(rows), rows.to_iterable_dataset()
    if not rows.features:
        raise DataError(f"{streaming}: the columns of {name} aren't known before it is read; leave it out.")
    image, label = _columns(name, rows, chosen)
    kind = rows.features[label]
    if not isinstance(kind, datasets.ClassLabel):
        raise DataError(
            f"{streaming}: the column {label!r} of {name} isn't of type ClassLabel, so its classes aren't known before "
            "all of it is read; leave it out."
        )
    only = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    names = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    only = only.rename_columns(names) if names else only
    length = (chosen.num_examples if name.endswith(" train") else None) or count or _num_examples(rows)
    if length is None and name.endswith(" train"):
        example = arg("data.num_examples", 50000)
        raise DataError(f"{streaming}: {name} doesn't say how many images it has; add {example}, as it is.")
    images = StreamedImages(
        stream=only,
        length=sum(1 for _ in only.select_columns(["label"])) if length is None else length,
        name=name,
        class_indices=torch.arange(len(kind.names)),
        folder=folder,
        shuffle_buffer=chosen.shuffle_buffer or SHUFFLE_BUFFER,
    )
    return images, tuple(kind.names)


def _counts_in(files: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many rows the parts have whose files are all parquet here: those say it."""
    import pyarrow.parquet as pq

    known = {part: paths for part, paths in files.items() if all(Path(path).is_file() for path in paths)}
    known = {part: paths for part, paths in known.items() if all(path.endswith(".parquet") for path in paths)}
    return {part: sum(pq.read_metadata(path).num_rows for path in paths) for part, paths in known.items()}


def _num_examples(rows: Any) -> int | None:
    """How many rows a stream says it has."""
    found = (rows.info.splits or {}).get(str(rows.split))
    return None if found is None or not found.num_examples else int(found.num_examples)


def _has_columns(rows: Any, chosen: Chosen) -> bool:
    try:
        _columns("", rows, chosen)
    except DataError:
        return False
    return True


def _part(name: str, tables: Sequence[Any], folder: str, chosen: Chosen) -> Part:
    import datasets

    images, labels, class_names = [], [], []
    for rows in tables:
        image, label = _columns(name, rows, chosen)
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


def _columns(name: str, rows: Any, chosen: Chosen) -> tuple[str, str]:
    """The image column and the label column: as they are chosen, or found.

    Raises:
        DataError: there is no such column, or it holds something else; or there is none, or no single one.
    """
    features = rows.features
    image = chosen.image_column or _image_column(features)
    label = chosen.label_column or _label_column(features)
    columns = f"its columns are {', '.join(f'{c} ({_said_kind(kind)})' for c, kind in features.items())}"
    for key, column, wanted, holds in (
        ("image_column", image, "column of type Image", _can_hold_images),
        ("label_column", label, "label column (type ClassLabel)", _can_hold_labels),
    ):
        if column is None:
            raise DataError(f"{name} has no single {wanted}: {columns}; name one with {arg(key)}.")
        if column not in features:
            near = did_you_mean(column, features)
            raise DataError(f"{arg(key, column)}: {name} has no such column; {columns}.{near}")
        if not holds(features[column]):
            what = "one image a row" if key == "image_column" else "one label a row: a class, a whole number or a text"
            raise DataError(f"{arg(key, column)}: this column of {name} doesn't hold {what}; {columns}.")
    assert image is not None, "checked above"
    assert label is not None, "likewise"
    if image == label:
        raise DataError(f"{arg('label_column', label)}: it is the column of images; {columns}.")
    return image, label


def _image_column(features: Mapping[str, Any]) -> str | None:
    from datasets import Image

    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    image = _pick(images, IMAGE_COLUMNS)
    if image is not None or images:
        return image
    bytes_ = [c for c in IMAGE_COLUMNS if c in features and _can_hold_images(features[c]) and not _is_text(features[c])]
    paths = [c for c in PATH_COLUMNS if c in features and _is_text(features[c])]
    return next(iter([*bytes_, *paths]), None)


def _label_column(features: Mapping[str, Any]) -> str | None:
    plain = [column for column in LABEL_COLUMNS if column in features and _can_hold_labels(features[column])]
    return _pick(_class_columns(features), LABEL_COLUMNS) or _pick(plain, LABEL_COLUMNS)


def _class_columns(features: Mapping[str, Any]) -> list[str]:
    from datasets import ClassLabel

    return [column for column, kind in features.items() if isinstance(kind, ClassLabel)]


def _notes_on_columns(rows: Any, chosen: Chosen) -> list[str]:
    """Say which of several columns of classes was taken, where nobody chose."""
    several = _class_columns(rows.features)
    if chosen.label_column or len(several) < 2:
        return []
    label = _label_column(rows.features)
    others = ", ".join(column for column in several if column != label)
    return [f"Labels are the column {label!r}; others of classes: {others}."]


def _can_hold_images(kind: Any) -> bool:
    from datasets import Image

    return isinstance(kind, Image) or "binary" in _dtype(kind) or _is_text(kind) or _is_struct(kind)


def _can_hold_labels(kind: Any) -> bool:
    from datasets import ClassLabel

    return isinstance(kind, ClassLabel) or _dtype(kind).startswith(
        ("int", "uint", "string", "large_string", "bool", "float")
    )


def _is_text(kind: Any) -> bool:
    return "string" in _dtype(kind)


def _dtype(kind: Any) -> str:
    """The type of a plain column; empty for any other."""
    from datasets import Value

    return str(kind.dtype) if isinstance(kind, Value) else ""


def _said_kind(kind: Any) -> str:
    """A column's type, as its owner would know it: ``Value``, ``List of ClassLabel``, ``dict``."""
    inner = getattr(kind, "feature", None)
    return type(kind).__name__ + (f" of {_said_kind(inner)}" if inner is not None else "")


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
