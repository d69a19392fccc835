"""From the name of a data set to labelled images: who reads what.

A name is tried as one of the known ones (`rules.NAMED_DATA`), then as an existing path, then as a Hugging Face hub name
(OWNER/NAME, or OWNER/NAME:CONFIG). Which folder is what is found by `folders.py`, tables are read by `tables.py`, and
the formats of known names by the libraries that define them: scikit-learn (digits), torchvision (CIFAR, SVHN, STL-10).

Classes are matched by name: a part whose classes stand in another order gets the labels of the training part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localgrad import rules
from localgrad.errors import DataError, arg, did_you_mean, reason_of
from localgrad.training.folders import SPLITS, Folders, Split, images_under, read_classes, read_folders
from localgrad.training.image_sets import FileImages, FilesOnDisk, ImageSet, InMemoryImages, Skipped
from localgrad.training.streams import StreamedImages
from localgrad.training.tables import Chosen, Part, Parts, find_tables, holds_tables, matched

DEFAULT_ROOT = Path("data")


@dataclass(frozen=True)
class Found:
    """A data set as its files give it, before any splitting of our own.

    Attributes:
        class_names: in the order of the labels.
        train: the training part.
        test: the test part, or None where there is none.
        notes: what a user should know about the choice of parts.
        val: the validation part, or None where there is none.
        skipped: what was left out of each part while it was listed.
    """

    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet | None
    notes: tuple[str, ...] = field(default=())
    val: ImageSet | None = None
    skipped: Mapping[str, Skipped] = field(default_factory=dict)


def find(
    name: str,
    *,
    root: Path | None,
    download: bool,
    given: Mapping[Split, str] | None = None,
    chosen: Chosen | None = None,
) -> Found:
    """Resolve a name: known names first, then paths, then the Hugging Face hub. Labels aren't checked yet.

    Args:
        name: such as ``digits``, ``./photos`` or ``ylecun/mnist``.
        root: where torchvision's data sets are kept (`DEFAULT_ROOT` where None); names are also looked for
            as folders in it.
        download: whether torchvision may fetch what is missing.
        given: folders or tables of single parts, in place of those that are found.
        chosen: what is said of tables.

    Raises:
        DataError: for a name that is nothing of these, for files that are missing or unusable, and for folders that can
            be read in two ways.
    """
    given, chosen = dict(given or {}), chosen or Chosen()
    parts = {f"{split}_data": where for split, where in given.items()}
    rules.check({"data": name, **parts, **asdict(chosen)}, DataError)
    if name in _READERS:
        return _READERS[name](root or DEFAULT_ROOT, download)
    return _together(name, _found_parts(name, root, given, chosen))


def _found_parts(name: str, root: Path | None, given: Mapping[Split, str], chosen: Chosen) -> Parts:
    """The parts of a path or a hub name, with those that were given."""
    path, train, found = existing_path(name, root), given.get("train"), Parts()
    if path is not None and (train is None or existing_path(train, root) != path):
        is_table = _is_table(path) or bool(chosen.config)
        found = (
            find_tables(str(path), path, chosen)
            if is_table
            else _parts_in(path, train_is_given=train is not None, chosen=chosen)
        )
    elif path is None and name != train:
        found = _from_hub(name, chosen)
    parts, skipped, notes = dict(found.parts), dict(found.skipped), dict.fromkeys(found.notes)
    for split, where in given.items():
        own, said = existing_path(where, root), chosen if split == "train" else replace(chosen, num_examples=None)
        if own is None:
            raise DataError(f"--{split}-data: there is no file or folder {where}.")
        read = find_tables(str(own), own, said) if _is_table(own) else _parts_of_folders(own, read_classes(own), said)
        parts[split], skipped[split] = read.parts["train"], read.skipped.get("train", Skipped())
        notes |= dict.fromkeys(read.notes)
    return Parts(parts, tuple(notes), skipped)


def _is_table(path: Path) -> bool:
    return path.is_file() or holds_tables(path) == "only"


def existing_path(name: str, root: Path | None) -> Path | None:
    """The file or folder of a name, by itself or in a root; ``None`` where there is none."""
    candidates = [Path(name).expanduser()] + ([root / name] if root else []) if name.strip() else []
    return next((path for path in candidates if path.exists()), None)


def _from_hub(name: str, chosen: Chosen) -> Parts:
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", name):
        source, _, config = name.partition(":")
        if Path(name).parent.is_dir():
            raise DataError(f"There is no file or folder {name}, though there is {Path(name).parent}.")
        if config:
            chosen.refuse(f"{name} names one already", "config")
            chosen = replace(chosen, config=config)
        return find_tables(source, chosen=chosen)
    raise DataError(
        f"No data set or path is called {name!r}: give one of {', '.join(rules.NAMED_DATA)}, an existing folder, "
        f"or OWNER/NAME on the Hugging Face hub.{did_you_mean(name.lower(), rules.NAMED_DATA)}"
    )


def _together(name: str, found: Parts) -> Found:
    """Parts with the training part's classes.

    Raises:
        DataError: a part has a class that isn't trained.
    """
    if "train" not in found.parts:
        raise DataError(f"{name} has no training part: name one with {arg('train_data')}.")
    class_names = found.parts["train"].class_names
    images: dict[Split, FileImages | StreamedImages] = {}
    for split, part in found.parts.items():
        if isinstance(part.images, StreamedImages):
            images[split] = part.images.as_classes(part.class_names, class_names)
            continue
        used = torch.bincount(part.images.labels[part.images.labels >= 0]).nonzero().flatten().tolist()
        own = [part.class_names[k] for k in used if 0 <= k < len(part.class_names)]
        strange = [each for each in own if each not in class_names] if split != "train" else []
        if strange:
            raise DataError(
                f"The part {split!r} of {name} has the class {strange[0]!r}, which the part train does not have."
                f"{did_you_mean(strange[0], class_names)}"
            )
        labels = part.images.labels if split == "train" else matched(part.images.labels, part.class_names, class_names)
        images[split] = replace(part.images, labels=labels)
    return Found(class_names, images["train"], images.get("test"), found.notes, images.get("val"), found.skipped)


def _find_digits(root: Path, download: bool) -> Found:  # noqa: FBT001  one signature for all readers
    """The 1,797 handwritten digits of 8x8 pixels that ship with scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images)[:, None].mul(255 / 16).round().to(torch.uint8)
    images = InMemoryImages(pixels, torch.from_numpy(bunch.target).long())
    return Found(tuple(str(digit) for digit in bunch.target_names), images, None)


def _find_in_torchvision(root: Path, download: bool, *, name: str) -> Found:  # noqa: FBT001
    from torchvision import datasets as readers  # type: ignore[import-untyped]

    by_flag = {"cifar10": readers.CIFAR10, "cifar100": readers.CIFAR100}
    by_split = {"stl10": readers.STL10, "svhn": readers.SVHN}
    try:
        if name in by_flag:
            parts = [by_flag[name](root, train=train, download=download) for train in (True, False)]
        else:
            parts = [by_split[name](root, split=split, download=download) for split in ("train", "test")]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            f"{name} is not (or not complete) in {root}: fetch it with {arg('download', value=True)}, or name the "
            f"folder that holds it with {arg('root')} ({reason_of(error, limit=300)})."
        ) from error
    class_names = tuple(getattr(parts[0], "classes", ())) or tuple(str(digit) for digit in range(10))
    train, test = (_images_of(part) for part in parts)
    return Found(class_names, train, test)


def _images_of(part: Any) -> InMemoryImages:
    """Torchvision's arrays; CIFAR has the channels last and calls its labels targets."""
    labels = torch.as_tensor(np.asarray(part.targets if hasattr(part, "targets") else part.labels)).long()
    pixels = torch.from_numpy(np.asarray(part.data))
    if hasattr(part, "targets"):
        pixels = pixels.permute(0, 3, 1, 2)
    return InMemoryImages(pixels.contiguous(), labels.reshape(-1))


_READERS: dict[str, Callable[[Path, bool], Found]] = {
    "digits": _find_digits,
    **{name: partial(_find_in_torchvision, name=name) for name in rules.NAMED_DATA if name != "digits"},
}


# ------------------------------------------------------------------------------------------------ folders


def _parts_in(path: Path, *, train_is_given: bool, chosen: Chosen) -> Parts:
    """The parts of a folder: of folders by split and class, or else of a table beside images without classes."""
    if not any(path.iterdir()):
        raise DataError(f"The data folder {path} is empty: expected class folders of images, or parquet files.")
    has_tables = not train_is_given and holds_tables(path) == "beside"
    if has_tables and (chosen.image_column or chosen.label_column):
        return find_tables(str(path), path, chosen)
    folders, why_not = Folders({}), ""
    try:
        folders = read_folders(path, train_is_given=train_is_given)
    except DataError as error:
        if not has_tables:
            raise
        why_not = str(error)
    if has_tables and len(folders.classes.get("train", ())) < 2:  # images without classes, and a table that names them
        try:
            return find_tables(str(path), path, chosen)
        except DataError as error:
            raise DataError(f"{why_not or f'There is one class at most in {path}.'} As a table: {error}") from error
    return _parts_of_folders(path, folders, chosen)


def _parts_of_folders(path: Path, folders: Folders, chosen: Chosen) -> Parts:
    """List the images of each split and class, and say which classes have none.

    Raises:
        DataError: something is said of a table, which this isn't.
    """
    chosen.refuse(f"{path} is read by its class folders, and this is of tables")
    parts: dict[Split, Part] = {}
    skipped: dict[str, Skipped] = {}
    empty: dict[str, list[Split]] = {}
    for split in SPLITS:
        if split not in folders.classes:
            continue
        own = skipped[split] = Skipped()
        paths: list[str] = []
        labels: list[int] = []
        names: list[str] = []
        for name, folder in sorted(folders.classes[split].items()):
            found = list(images_under(folder, own))
            if not found:
                empty.setdefault(name, []).append(split)
                continue
            labels += [len(names)] * len(found)
            names.append(name)
            paths += found
        parts[split] = Part(
            FileImages(FilesOnDisk(tuple(paths)), torch.tensor(labels, dtype=torch.int64)), tuple(names)
        )
    for own in list(skipped.values())[:1]:  # the training part's, where it is there
        own.others.update(folders.others)
    notes = list(folders.notes)
    roots = {split: folders.roots[split] for split in SPLITS if split in folders.roots}
    if len(set(roots.values())) > 1:
        notes.append("Found " + ", ".join(f"{split} in {root}" for split, root in roots.items()) + ".")
    if empty:
        listed = ", ".join(f"{name} ({', '.join(splits)})" for name, splits in empty.items())
        notes.append(f"Class folders without an image: {listed}.")
    return Parts(parts, tuple(notes), skipped)
