"""Where the images of a cell are from, and what they are copies of.

The data sets have official files, which torchvision fetches. Where it can't, a folder may stand in (``--data-path``);
what lies there may be copies that lost something, so it is looked at, and named in every result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from localgrad.errors import DataError
from localgrad.training.image_sets import FileImages
from localgrad.training.loading import find
from research.reproduce.tables import digest

OFFICIAL = "official files, read by torchvision"

_FORMATS = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG", "PNG"), (b"BM", "BMP"), (b"GIF8", "GIF"))


@dataclass(frozen=True)
class Source:
    """Where the images of one data set are.

    Attributes:
        data: its name.
        path: a folder that stands in for the official files, as typed; ``None`` for those.
        root: where the official files lie; by default torchvision's ``data``.
    """

    data: str
    path: str | None = None
    root: str | None = None

    @cached_property
    def label(self) -> str:
        """What the images are, for results; reads a few of a folder's.

        Raises:
            DataError: the folder holds no data set.
        """
        if self.path is None:
            return OFFICIAL
        try:
            images = find(self.path, root=None, download=False).train
        except DataError as error:
            raise DataError(f"--data-path {self.data}={self.path}: {error}") from error
        if not isinstance(images, FileImages):
            raise DataError(f"--data-path {self.data}={self.path}: expected a folder of images, not a known name.")
        rows = sorted({0, len(images) // 2, len(images) - 1})
        kinds = sorted({image_format(encoded) for _, encoded in images.files.encoded(rows)})
        return f"a folder of {' and '.join(kinds)} copies, not compared with the official pixels"

    @cached_property
    def digest(self) -> str:
        """What tells folders of images apart: names and sizes of their files, wherever they lie."""
        if self.path is None:
            return "official"
        top = Path(self.path).expanduser()
        if top.is_file():
            return digest([(top.name, top.stat().st_size)])
        files = []
        for folder, below, names in os.walk(top, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            paths = [Path(folder, name) for name in names if not name.startswith(".")]
            files += [(path.relative_to(top).as_posix(), path.stat().st_size) for path in paths if path.is_file()]
        return digest(sorted(files))

    def check(self, *, download: bool) -> None:
        """See that the data set is there; fetch the official files if that is allowed.

        Raises:
            DataError: it isn't, or can't be fetched.
        """
        if self.path is None:
            find(self.data, root=None if self.root is None else Path(self.root), download=download)

    def settings(self) -> Mapping[str, str]:
        """Recipe keys that say where the images are, on this machine."""
        return {"data.name": self.path or self.data, **({} if self.root is None else {"data.root": self.root})}


def image_format(encoded: bytes) -> str:
    """Name the format of an image file by its first bytes, and whether it loses something."""
    if encoded[:4] == b"RIFF":
        return "lossless WebP" if encoded[12:16] == b"VP8L" else "WebP"
    return next((name for start, name in _FORMATS if encoded.startswith(start)), "other")
