"""Figures that were found before: from memory, or from the user's cache folder, by everything that they depend on.

The key has the versions of the packages and a digest of our own source, so that a figure of other code is never taken
for this one's. Nothing is kept that depends on code which no version tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

from localgrad.backbones.base import Backbone
from localgrad.backbones.halves import signature
from localgrad.formats import Json
from localgrad.memory.costs import CostSettings
from localgrad.objectives.losses import Loss, OwnFunction, loss_of
from localgrad.objectives.methods import Objective

Figures = dict[str, Json]

CACHE_BYTES = 64 << 20
"""The cache is kept below this size; what was used longest ago goes first."""
PACKAGES = ("torch", "timm", "torchvision", "bitsandbytes", "transformers", "open_clip", "peft")
"""Packages whose code the costs may depend on, beside our own: their versions tell it."""

_recent: dict[str, Figures] = {}


def remembered(key: str | None, find: Callable[[], Figures], *, folder: str = "costs") -> Figures:
    """Figures by their key: from memory, from the cache folder, or found and kept.

    Args:
        key: of ``key_of``; ``None`` finds them anew each time.
        find: gives them.
        folder: of the cache folder, by what the figures are.
    """
    if key is None:
        return find()
    if key not in _recent:
        _recent[key] = _read(folder, key) or _write(folder, key, find())
    return _recent[key]


def key_of(
    backbone: Backbone, objective: Objective, optimizer: object, settings: CostSettings, loss: Loss | None = None
) -> str | None:
    """A digest of everything that the costs depend on; ``None`` where they depend on code that no version tells.

    That is an optimizer without a ``cache_key``, and an objective or a part of the model whose class is the user's
    own: it may be edited, and so may anything that it calls.
    """
    known_as = getattr(optimizer, "cache_key", None)
    loss = loss_of(loss, backbone)
    if known_as is None or not is_told_by_text(objective) or not _is_told(loss):
        return None
    parts_of_model = (backbone.stem, *backbone.blocks, backbone.tail)
    signatures = [signature(part) for part in parts_of_model]
    if None in signatures or not all(_is_known(net) for part in parts_of_model for net in part.modules()):
        return None
    parts = (
        signatures,
        (backbone.input_size, backbone.num_classes, backbone.layouts),
        (repr(objective), known_as, dataclasses.astuple(settings), loss.described),
        [_version_of(name) for name in PACKAGES],
        _own_version(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _is_told(loss: Loss) -> bool:
    """Whether a loss is one of ours: of a user's nothing is known."""
    return _is_known_class(type(loss)) and not isinstance(loss, OwnFunction)


def _is_known(value: object) -> bool:
    """Whether a value's class, and what that inherits from, is of a package whose version is in the key."""
    held = [item.func if isinstance(item, partial) else item for item in vars(value).values()]
    functions = [item for item in held if inspect.isroutine(item) or inspect.isclass(item)]  # methods put in its place
    return all(map(_is_of_known_package, functions)) and _is_known_class(type(value))


def _is_known_class(kind: type) -> bool:
    return all(map(_is_of_known_package, kind.__mro__))


def _is_of_known_package(item: object) -> bool:
    package = (getattr(item, "__module__", None) or "builtins").split(".", maxsplit=1)[0]
    return package in {"builtins", "abc", "typing", "collections", "functools", "math", "localgrad", *PACKAGES}


def is_told_by_text(objective: Objective) -> bool:
    """Whether an objective is one of ours and has plain values only, so that its text tells it."""

    def is_plain(value: object) -> bool:
        if isinstance(value, Mapping):
            return all(is_plain(item) for pair in value.items() for item in pair)
        if isinstance(value, (tuple, list)):
            return all(map(is_plain, value))
        return value is None or isinstance(value, (str, int, float))

    is_known = _is_known(objective) and all(map(_is_known_class, objective.nets))
    return is_known and all(is_plain(getattr(objective, each.name)) for each in fields(objective))


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # an optional one
        return ""


@lru_cache(maxsize=1)
def _own_version() -> str:
    """A digest of the package's own code: a figure of another version is never taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder(name: str = "costs") -> Path:
    """Where figures are kept, by what they are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localgrad" / name


def _read(folder: str, key: str) -> Figures | None:
    try:
        path = cache_folder(folder) / f"{key}.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        figures = values["figures"]
        if values["sha256"] != _digest_of_figures(figures):
            return None
        os.utime(path)  # used now
        return dict(figures)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # no home, none there, or damaged: find them anew
        return None


def _write(name: str, key: str, figures: Figures) -> Figures:
    try:
        folder = cache_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{key}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps({"sha256": _digest_of_figures(figures), "figures": figures}), encoding="utf-8")
        unfinished.replace(folder / f"{key}.json")
        _limit(folder)
    except (OSError, RuntimeError):  # a cache that can't be written costs time, nothing else
        pass
    return figures


def _digest_of_figures(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _limit(folder: Path) -> None:
    """Keep the cache below its size: remove what was used longest ago, and what other processes left unfinished."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for used, size, path in sorted(files):
        is_left = path.suffix == ".tmp" and time.time() - used > 3600
        if is_left or total > CACHE_BYTES:
            path.unlink(missing_ok=True)
            total -= size
