"""An image folder read in another way: the whole tree first, every file by its content, pixel by pixel.

For tests: it shares no code with localgrad, and takes its time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
GENERAL = ("set", "data", "dataset", "images", "imgs", "split")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jfif", ".ppm")


@dataclass
class Folder:
    """A folder with all that is visible in it."""

    path: Path
    folders: list[Folder] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    def images(self) -> list[Path]:
        """All images, this folder's and those below."""
        return self.files + [file for folder in self.folders for file in folder.images()]

    def filled(self) -> list[Folder]:
        """The folders that have images."""
        return [folder for folder in self.folders if folder.images()]


def scan(path: Path) -> Folder:
    """Read the tree."""
    found = Folder(path)
    for entry in sorted(path.iterdir()):
        if entry.name[0] == "." or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            found.folders.append(scan(entry))
        elif entry.suffix.lower() in IMAGE_ENDINGS or opens(entry):
            found.files.append(entry)
    return found


def opens(path: Path) -> bool:
    """Whether a file is an image by content."""
    try:
        with Image.open(path) as image:
            return image.format in ("PNG", "TIFF", "JPEG", "GIF", "BMP", "WEBP")
    except Exception:
        return False


def role(name: str) -> str | None:
    """The split that a name stands for."""
    words = [word for word in re.split(r"[\W_]+", name.casefold()) if word]
    if len(words) > 1 and words[-1] in GENERAL:
        words.pop()
    return ROLES.get(words[-1]) if words else None


Reading = dict[str, dict[str, list[Path]]]


def readings(path: Path) -> list[Reading]:
    """Every way to read a folder: split to class to files. None where it has no labels, two where it isn't clear."""
    top = scan(path)
    while not top.files and len(top.filled()) == 1 and not role(top.filled()[0].name) and top.filled()[0].filled():
        top = top.filled()[0]
    folders = top.filled()
    named = {folder.name: inner(folder) for folder in folders if role(folder.name)}
    unnamed = [folder for folder in folders if not role(folder.name)]
    splits = {name: folder for name, folder in named.items() if folder.filled()}
    as_classes = [{"train": {folder.name: folder.images() for folder in folders}}] if folders else []
    if not named:
        return inside_out(top) or as_classes
    if not splits:
        trains = [role(name) == "train" for name in named]
        return as_classes if unnamed and all(trains) else [*as_classes, {}]
    by_role: Reading = {}
    for name, folder in splits.items():
        own = {each.name: each.images() for each in folder.filled()}
        if by_role.setdefault(role(name) or "", own) is not own:
            return [*as_classes, {}]
    if "train" not in by_role:
        return as_classes if unnamed else [*as_classes, {}]
    common = set.intersection(*({each.name for each in folder.folders} for folder in splits.values()))
    if unnamed and not (len(splits) > 1 and common):
        return [*as_classes, by_role]
    return [by_role]


def inner(folder: Folder) -> Folder:
    """The folder of class folders of a split."""
    while not folder.files and len(folder.filled()) == 1:
        only = folder.filled()[0]
        if only.name != folder.name and role(only.name) != role(folder.name):
            break
        folder = only
    return folder


def inside_out(top: Folder) -> list[Reading]:
    """CLASS/train and CLASS/test."""
    found: Reading = {}
    for folder in top.filled():
        roles = [role(each.name) for each in folder.filled()]
        if folder.files or "train" not in roles or None in roles or len(set(roles)) < len(roles):
            return []
        if any(each.filled() for each in folder.filled()):
            return [{"train": {}}, {"train": {}}]
        for each in folder.filled():
            found.setdefault(role(each.name) or "", {})[folder.name] = each.images()
    return [found] if set(found) != {"train"} else []


def pixels(path: Path) -> np.ndarray | str:
    """Float [H, W, 3] from 0 to 255 over white; or why there are none: ``none``, ``corrupt``, ``range``."""
    try:
        content = path.read_bytes()
    except OSError:
        return "none"
    try:
        image = Image.open(path)
        image.load()
    except Exception:
        return "corrupt" if content[:4] in (b"\x89PNG", b"II*\0", b"MM\0*") else "none"
    return _shown(image)


def _shown(image: Image.Image) -> np.ndarray | str:
    values, mode = np.asarray(image).astype(np.float64), image.mode
    greys = {"1": values * 255, "L": values, "I;16": values / 257}
    if mode in ("I", "F"):
        greys[mode] = values * 255
        if values.min() < 0 or values.max() > 1:
            return "range"
    if mode in greys:
        return _grey(greys[mode])
    if mode == "P":
        colours = np.array(image.getpalette("RGB"), dtype=np.float64).reshape(-1, 3)
        colours = np.concatenate([colours, np.zeros((256 - len(colours), 3))])
        alpha = np.full(256, 255.0)
        see_through = image.info.get("transparency", b"")
        alpha[: len(see_through)] = list(see_through)
        return _over_white(colours[values.astype(int)], alpha[values.astype(int)])
    colour, alpha = {
        "LA": lambda: (_grey(values[..., 0]), values[..., 1]),
        "RGB": lambda: (values, np.full(values.shape[:2], 255.0)),
        "RGBA": lambda: (values[..., :3], values[..., 3]),
    }[mode]()
    return _over_white(colour, alpha)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)
