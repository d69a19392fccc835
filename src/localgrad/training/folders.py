"""Which folder is what: the splits (train, val, test) and the classes of an image folder, by names and by content.

Names alone don't decide, since a class may be called ``test``: what a folder holds does. A folder that holds images
itself is a class, one that holds folders of images can be a split. Where two readings remain, both are named and
nothing is chosen.

How it differs from ``torchvision.datasets.ImageFolder``: hidden folders are no classes, splits are found, files are
taken by content where their ending says nothing, and what is left out is counted. Images come in the same order.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from localgrad.errors import DataError, arg
from localgrad.training.image_sets import Skipped
from localgrad.training.images import is_image

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
}
"""Names of splits, in any case; with something before them (``seg_train``) or a general word
behind them (``train_images``)."""

JUNK = ("__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information")
"""Folders, in small letters, that systems leave beside images; so are all hidden ones."""

_WORDS = "set|data|dataset|images|imgs|split"
_SPLIT_NAME = re.compile(rf"(?:.*[\W_])?({'|'.join(SPLIT_NAMES)})(?:[\W_]?(?:{_WORDS}))?")


@dataclass(frozen=True)
class Folders:
    """What a folder was read as.

    Attributes:
        classes: split to name of class to its folder.
        notes: what a user should know about the choice.
        roots: split to the folder that its classes lie in.
        others: what was left out outside the class folders, by reason.
    """

    classes: Mapping[Split, Mapping[str, Path]]
    notes: tuple[str, ...] = ()
    roots: Mapping[Split, Path] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)


def split_of(name: str) -> Split | None:
    """The split that a folder's or a table's name stands for, if any."""
    found = _SPLIT_NAME.fullmatch(name.casefold())
    return SPLIT_NAMES[found.group(1)] if found else None


def is_hidden(name: str) -> bool:
    """Whether a name is one that systems and editors leave beside images."""
    return name.startswith(".") or name.casefold() in JUNK


def visible_folders(path: Path) -> list[Path]:
    """The folders in a folder, sorted, links followed, without hidden ones."""
    with os.scandir(path) as entries:
        return sorted(Path(entry.path) for entry in entries if not is_hidden(entry.name) and _is_folder(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


# ------------------------------------------------------------------------------------------------- readings


def read_folders(path: Path, *, train_is_given: bool = False) -> Folders:
    """Find splits and classes.

    Args:
        path: a folder.
        train_is_given: the training part lies elsewhere: only other splits are looked for, by their names.

    Raises:
        DataError: no images in class folders, or two ways to read it.
    """
    if train_is_given:
        splits, left_out = _named_splits(path, visible_folders(path))
        splits.pop("train", None)
        return _as_splits(path, splits, left_out)
    here = _unwrapped(path)
    found = _readings(here, shown=path)
    if here != path:
        note = f"Read from {here}, the only folder with images in {path}."
        found = Folders(found.classes, (note, *found.notes), found.roots, found.others)
    return found


def read_classes(path: Path) -> Folders:
    """Take each folder below ``path`` for a class, whatever it is called; the result has the split train alone.

    Raises:
        DataError: there is none with images.
    """
    classes = {folder.name: folder for folder in visible_folders(path)}
    if not any(_holds_images(folder) for folder in classes.values()):
        raise DataError(f"There are no images in class folders of {path}: expected {path.name}/CLASS/*.png.")
    return Folders({"train": classes}, roots={"train": path}, others=_strays(path))


def _unwrapped(path: Path) -> Path:
    """Go down while a folder holds nothing but one folder of folders, which is called like no split."""
    while not _has_images(path):
        inner = [folder for folder in visible_folders(path) if _holds_images(folder)]
        if len(inner) != 1 or split_of(inner[0].name) or not _is_nested(inner[0]):
            break
        path = inner[0]
    return path


def _readings(path: Path, shown: Path) -> Folders:
    folders = [folder for folder in visible_folders(path) if _holds_images(folder)]
    if not folders:
        raise DataError(
            f"There are no images in class folders of {shown}: expected {shown.name}/CLASS/*.png (or another kind "
            "that Pillow opens), parquet files, or a table that names images."
        )
    named = [folder for folder in folders if split_of(folder.name)]
    unnamed = [folder for folder in folders if not split_of(folder.name)]
    nested = [folder for folder in named if _is_nested(_split_root(folder))]
    flat = [folder for folder in named if folder not in nested]
    if not nested:
        if not named or (unnamed and all(split_of(folder.name) == "train" for folder in flat)):
            return _inside_out(path) or read_classes(path)
        if not unnamed:
            raise DataError(
                f"{_named(flat)} in {path} hold images without class folders. As a set with the classes "
                f"{_named(flat)}: "
                f"type {arg('train_data', path)}. As splits: their images have no labels; sort them into class "
                "folders, or name a table with labels."
            )
        raise DataError(
            f"{path} can be read in two ways. With the classes {_named(folders)}: type {arg('train_data', path)}. "
            f"With {_named(flat)} as images without labels: move {_named(flat)} elsewhere."
        )
    splits, left_out = _named_splits(path, named)
    if "train" not in splits:
        if unnamed:
            return read_classes(path)
        raise DataError(
            f"{path} has no training part, only {_named(named)}: name one with {arg('train_data')}. If "
            f"{_named(named)} are classes, type {arg('train_data', path)}."
        )
    if unnamed and not _share_classes(splits):
        raise DataError(
            f"{path} can be read in two ways. With the classes {_named(folders)}: type {arg('train_data', path)}. "
            f"With {_named(nested)} as splits, without {_named(unnamed)}: type "
            + " ".join(arg(f"{split}_data", splits[split]) for split in SPLITS if split in splits)
            + "."
        )
    return _as_splits(path, splits, [*left_out, *unnamed])


def _named_splits(path: Path, folders: Sequence[Path]) -> tuple[dict[Split, Path], list[Path]]:
    """Folders that are splits by their names and have class folders, and those named so that have none."""
    splits: dict[Split, Path] = {}
    left_out = []
    for folder in folders:
        split = split_of(folder.name)
        root = _split_root(folder)
        if split is None or not _holds_images(folder):
            continue
        if not _is_nested(root):
            left_out.append(folder)
        elif split in splits:
            raise DataError(
                f"{path} has two folders for the split {split}: type {arg(f'{split}_data', splits[split])} or "
                f"{arg(f'{split}_data', root)}, and {arg('train_data')} with it."
                if split != "train"
                else f"{path} has two training parts: type {arg('train_data', splits[split])} or "
                f"{arg('train_data', root)}."
            )
        else:
            splits[split] = root
    return splits, left_out


def _as_splits(path: Path, splits: Mapping[Split, Path], left_out: Sequence[Path]) -> Folders:
    notes = []
    others: Counter[str] = Counter()
    for folder in left_out:
        found: Skipped = Skipped()
        count = sum(1 for _ in images_under(folder, found))
        others["in a folder without labels"] += count
        notes.append(f"Left out: {count} images in {folder}, which has no class folders, or no split's name.")
    classes = {split: {folder.name: folder for folder in visible_folders(root)} for split, root in splits.items()}
    for root in splits.values():
        others.update(_strays(root))
    return Folders(classes, tuple(notes), splits, others)


def _inside_out(path: Path) -> Folders | None:
    """Splits inside of each class, CLASS/train and CLASS/test, if that is how all images lie."""
    classes: dict[Split, dict[str, Path]] = {}
    folders = [folder for folder in visible_folders(path) if _holds_images(folder)]
    if any(map(_has_images, folders)):
        return None
    for folder in folders:
        inner = [each for each in visible_folders(folder) if _holds_images(each)]
        splits = [split_of(each.name) for each in inner]
        if "train" not in splits or None in splits or len(set(splits)) != len(splits):
            return None
        if any(_is_nested(each) for each in inner):
            raise DataError(
                f"{path} can be read in two ways. As several data sets: type {arg('data', folder)}. With the classes "
                f"{_named(folders)}: type {arg('train_data', path)}."
            )
        for split, each in zip(splits, inner, strict=True):
            assert split is not None, "checked above"
            classes.setdefault(split, {})[folder.name] = each
    if set(classes) == {"train"}:
        return None
    return Folders(classes, (f"Splits are read from inside of each class of {path}.",), dict.fromkeys(classes, path))


def _share_classes(splits: Mapping[Split, Path]) -> bool:
    """Whether two splits have a class in common, which no other reading explains."""
    names = [{folder.name for folder in visible_folders(root)} for root in splits.values()]
    return len(names) > 1 and bool(set.intersection(*names))


def _split_root(folder: Path) -> Path:
    """Where a split's class folders lie: below another folder of the split's name, as in ``seg_train/seg_train``."""
    root = folder
    while not _has_images(root):
        inner = [each for each in visible_folders(root) if _holds_images(each)]
        same = len(inner) == 1 and (inner[0].name == root.name or split_of(inner[0].name) == split_of(folder.name))
        if not same:
            break
        root = inner[0]
    return root


def _is_nested(folder: Path) -> bool:
    """Whether images lie in folders of a folder."""
    return any(_holds_images(each) for each in visible_folders(folder))


def _named(folders: Sequence[Path]) -> str:
    names = [repr(folder.name) for folder in folders[:6]] + (["…"] if len(folders) > 6 else [])
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---------------------------------------------------------------------------------------------------- files


def images_under(folder: Path, skipped: Skipped) -> Iterator[str]:
    """The images in a folder and below it, in torchvision's order; links are followed, hidden names are not.

    What is no image is counted by reason in ``skipped``.
    """
    trails: dict[str, tuple[tuple[int, int], ...]] = {}  # the folders that each folder lies in
    listing = []
    for root, inner, names in os.walk(str(folder), onerror=_refuse, followlinks=True):
        where = Path(root).stat()
        trail, own = trails.get(os.path.dirname(root), ()), (where.st_dev, where.st_ino)  # noqa: PTH120  # a str
        if own in trail:  # a link to a folder that this one lies in
            inner[:] = []
            continue
        trails[root] = (*trail, own)
        hidden = [name for name in inner if is_hidden(name)]
        if hidden:
            skipped.others["hidden folder"] += len(hidden)
        inner[:] = sorted(name for name in inner if not is_hidden(name))
        listing.append((root, names))
    for root, names in sorted(listing):
        for name in sorted(names):
            path, suffix = os.path.join(root, name), _suffix(name)  # noqa: PTH118  # as torchvision's, and quick
            if is_hidden(name):
                skipped.others["hidden file"] += 1
            elif is_image(path, suffix):
                yield path
            else:
                skipped.others[why_left_out(path, suffix)] += 1


def _refuse(error: OSError) -> None:
    raise DataError(f"The folder {error.filename} can't be read ({error.strerror}).") from error


def why_left_out(path: str, suffix: str) -> str:
    """Why a file that is no image is left out: its ending, as a rule."""
    where = Path(path)
    if where.is_symlink() and not where.exists():
        return "dangling link"
    return suffix or "no ending"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  # a str, and quick


def _holds_images(folder: Path, above: tuple[str, ...] = ()) -> bool:
    """Whether there is an image in a folder or below it; stops at the first."""
    own = os.path.realpath(folder)
    if own in above:  # a link to a folder above
        return False
    return _has_images(folder) or any(_holds_images(each, (*above, own)) for each in visible_folders(folder))


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        files = (entry for entry in entries if not is_hidden(entry.name) and not _is_folder(entry))
        return any(is_image(file.path, _suffix(file.name)) for file in files)


def _strays(root: Path) -> Counter[str]:
    """What lies beside class folders: files are of no class."""
    strays: Counter[str] = Counter()
    with os.scandir(root) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                strays["hidden folder" if _is_folder(entry) else "hidden file"] += 1
            elif not _is_folder(entry):
                suffix = _suffix(entry.name)
                is_stray = is_image(entry.path, suffix)
                strays["image outside class folders" if is_stray else why_left_out(entry.path, suffix)] += 1
    return strays
