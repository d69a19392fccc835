"""Features on disk: what a finished local module gives, stored once and read back as memory-mapped bfloat16.

A cache is a folder of raw arrays and a manifest (shapes, dtypes, checksums, and the identity of what was stored)::

    after-module-0/
        manifest.json
        train-0.features    bfloat16, one row an image, in the order in which they were made
        train-0.labels      what the loss compares with: int64, or float32 where augmentation made them soft
        train-0.targets     int64
        ...
        val.features

A *part* (``train-0``) is one pass over the images. Labels are stored beside the features that belong to them, so
mixed labels can't come apart from mixed features. It is read back in the batches in which it was written: where
images were left out, those are smaller.

The folder is written under another name, flushed to disk and renamed: it is there whole, or not at all. It is opened
only where its manifest tells the identity that is asked for and every file has the size and, unless it was just
written, the SHA-256 that the manifest tells; else it is made again. Writes are plain (on a full disk a write fails,
while a write through a map kills the process), reads go through private maps.

Shapes: R rows of a part, B batch, ... one image's features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, final

import torch
from torch import Tensor, nn

from localgrad.errors import RunFolderError, arg
from localgrad.formats import Json
from localgrad.training.folder import raw_bytes
from localgrad.units import format_bytes

FORMAT = 3
STORED = torch.bfloat16
ARRAYS = ("features", "labels", "targets")
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)}


class Rows(NamedTuple):
    """Some rows of a part.

    Attributes:
        features: [B, ...].
        labels: int64 [B], or float32 [B, K].
        targets: int64 [B].
    """

    features: Tensor
    labels: Tensor
    targets: Tensor


@final
@dataclass(frozen=True)
class FeatureCache:
    """An open cache.

    Attributes:
        arrays: each part's.
        sizes: rows of each batch, by part.
        dtype: of features when they were made, and of batches.
        num_bytes: on disk.
    """

    arrays: Mapping[str, Rows]
    sizes: Mapping[str, Sequence[int]]
    dtype: torch.dtype
    num_bytes: int

    def batches(self, part: str, device: torch.device, start: int = 0) -> Iterator[Rows]:
        """Read a part in order, from the batch of index ``start`` on.

        Yields:
            Copies that are the caller's own: features in the dtype in which they were made.
        """
        whole = self.arrays[part]
        ends = list(itertools.accumulate(self.sizes[part], initial=0))
        for rows in itertools.starmap(slice, itertools.pairwise(ends[start:])):
            # To the device while it is small, then to its dtype; a copy even where neither changes.
            yield Rows(
                whole.features[rows].to(device, copy=True).to(self.dtype),
                whole.labels[rows].to(device, copy=True),
                whole.targets[rows].to(device, copy=True),
            )


def write_cache(folder: Path, parts: Iterable[tuple[str, Iterable[Rows]]], identity: Mapping[str, Any]) -> None:
    """Store parts, whole or not at all; what the folder held before is replaced.

    Args:
        folder: the cache.
        parts: name and batches of each; every one is asked for when it is written.
        identity: plain values that tell what is stored; asked for again by ``open_cache``.

    Raises:
        RunFolderError: no permission, or the disk is full.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            described = {name: _write_part(temporary, name, batches) for name, batches in parts}
            holds = {"identity": dict(identity), "parts": described}
            manifest = {"format": FORMAT, **holds, "sha256": _digest_of(holds)}
            with (temporary / "manifest.json").open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=2)
                _flush(file)
            _flush_folder(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            _flush_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise RunFolderError(
            f"feature cache {folder}: can't be written ({error.strerror}); make room, then go on with {arg('resume')}"
            f"{folder.parent.parent}."
        ) from error


def open_cache(folder: Path, identity: Mapping[str, Any], *, verify: bool = True) -> FeatureCache | None:
    """Open a cache that is whole and holds just what an identity tells; ``None`` where there is none.

    Unless it was just written, all of it is read once, to verify checksums.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["format"], manifest["identity"]) != (FORMAT, json.loads(json.dumps(dict(identity)))):
            return None
        if manifest["sha256"] != _digest_of({key: manifest[key] for key in ("identity", "parts")}):
            return None
        dtypes, arrays, sizes, num_bytes = set(), {}, {}, 0
        for name, described in manifest["parts"].items():
            found = []
            for kind in ARRAYS:
                dtype, shape = _DTYPES[described[kind]["dtype"]], described[kind]["shape"]
                path = folder / f"{name}.{kind}"
                if path.stat().st_size != math.prod(shape) * dtype.itemsize:
                    return None
                if verify and described[kind]["sha256"] != _digest_of_file(path):
                    return None
                num_bytes += path.stat().st_size
                found.append(_map(path, dtype, shape))
            arrays[name] = Rows(*found)
            sizes[name] = described["batches"]
            dtypes.add(_DTYPES[described["made_in"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return FeatureCache(arrays, sizes, dtypes.pop(), num_bytes) if len(dtypes) == 1 else None


def free_bytes(folder: Path) -> int:
    """Bytes that a cache in ``folder`` may take: what is free on its disk, and what the folder holds already."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    return shutil.disk_usage(nearest).free + held


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a cache that the disk has no room for, before anything is computed for it; the folder needn't exist.

    Raises:
        RunFolderError: too little is free.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise RunFolderError(
            f"{arg('cached_epochs')}: the features need {format_bytes(needed_bytes)} of disk in {folder}, "
            f"{format_bytes(free)} are free; take fewer {arg('cached_epochs')}, fewer {arg('modules')}, or another "
            f"{arg('out')}."
        )


def row_bytes(num_values: int, num_label_classes: int | None) -> int:
    """Bytes that one image takes in a cache: its features' values, and its labels (K where those are soft)."""
    label = torch.int64.itemsize if num_label_classes is None else num_label_classes * torch.float32.itemsize
    return num_values * STORED.itemsize + label + torch.int64.itemsize


def _write_part(folder: Path, name: str, batches: Iterable[Rows]) -> dict[str, Json]:
    """Write one part's arrays and describe them."""
    shapes: dict[str, tuple[torch.dtype, list[int]]] = {}
    sizes, made_in, digests = [], set(), {kind: hashlib.sha256() for kind in ARRAYS}
    with ExitStack() as stack:
        files = {kind: stack.enter_context((folder / f"{name}.{kind}").open("wb")) for kind in ARRAYS}
        for batch in batches:
            made_in.add(batch.features.dtype)
            stored = batch._replace(features=batch.features.to(STORED))
            for kind, tensor in zip(ARRAYS, stored, strict=True):
                assert len(tensor) == len(stored.targets), "features, labels and targets go together"
                known = shapes.setdefault(kind, (tensor.dtype, list(tensor.shape[1:])))
                assert known == (tensor.dtype, list(tensor.shape[1:])), "rows are alike"
                content = raw_bytes(tensor)
                digests[kind].update(content)
                files[kind].write(content)
            sizes.append(len(stored.targets))
        for file in files.values():
            _flush(file)
    assert len(made_in) == 1, "a part has rows, all made in one dtype"
    described: dict[str, Json] = {
        kind: {"dtype": str(dtype), "shape": [sum(sizes), *shape], "sha256": digests[kind].hexdigest()}
        for kind, (dtype, shape) in shapes.items()
    }
    return {**described, "batches": list(sizes), "made_in": str(made_in.pop())}


def weights_digest(parts: Iterable[nn.Module]) -> str:
    """What tells the weights of some parts, in order, from any others."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        for name, value in part.state_dict().items():
            digest.update(f"{number}.{name}:{value.dtype}:{list(value.shape)}".encode())
            digest.update(raw_bytes(value))
    return digest.hexdigest()


def _digest_of(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(tuple(shape))


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
