"""Labelled images of one part of a data set: decoded in memory, or encoded and decoded when they are read.

`InMemoryImages` holds every image decoded, as one uint8 tensor that lives on the device where it takes little of its
memory: a batch is then one index operation. `FileImages` holds encoded files, which worker processes decode and
resize batch by batch. Nothing is random here (`augment.py` draws by batch, on the device), so what workers do is a
function of the index alone. Where all files are wanted at once they are decoded in a few threads: Pillow's calls
release Python's lock.

What is left out of a part on the way stands in its `Skipped`: no image is missing without a name or a count.

Shapes: N images of a set, B batch, C channels, H W image.
"""

from __future__ import annotations

import copy
import csv
import io
import os
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, cast, final

import torch
from torch import Tensor

from localgrad.errors import DataError, arg
from localgrad.training.images import (
    Kind,
    Missing,
    Probed,
    Reading,
    Unreadable,
    has_colour,
    num_channels_of,
    open_image,
    probe,
    to_pixels,
)
from localgrad.training.settings import OnCorrupt
from localgrad.training.transforms import Prepared

_COLUMNS = ("part", "image", "reason")
_DEVICE_SHARE = 0.1  # of the free memory: the rest belongs to the model, which is why one uses localgrad
_CHUNK = 256  # images a thread decodes before it takes the next lot
PROBED = 64  # images opened to learn size and channels; decoding checks the rest


@dataclass
class Skipped:
    """What was left out of one part of a data set.

    Attributes:
        images: name to reason, of each that should have been an image.
        others: reason to number, of files that nobody would take for one (``.txt``, hidden).
    """

    images: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, int]:
        """Reason to number, corrupt images under one reason."""
        kinds = Counter("corrupt" if reason.startswith("corrupt") else reason for reason in self.images.values())
        return {**dict(sorted(kinds.items())), **dict(sorted(self.others.items()))}

    def add(self, name: str, error: Unreadable) -> None:
        """Note an image that was left out, once."""
        self.images[name] = f"corrupt: {error.reason}" if error.kind == "corrupt" else error.reason


class Cell(TypedDict):
    """An image in a table of Hugging Face's: its file's bytes, or where the file is."""

    bytes: bytes | None
    path: str | None


def skipped_table(skipped: Mapping[str, Skipped], before: str = "") -> str:
    """What was left out of each part, image by image, as CSV text; rows of such a table from before are kept."""
    rows = {tuple(row): None for row in csv.reader(io.StringIO(before)) if len(row) == len(_COLUMNS)}
    rows = {_COLUMNS: None, **rows}
    rows |= {(part, name, reason): None for part, own in skipped.items() for name, reason in sorted(own.images.items())}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How batches are wanted.

    Attributes:
        image_size: (H, W) that the model takes; what is decoded on the fly comes at this size.
        device: where.
        num_workers: processes that decode ahead, where there is something to decode.
        prepared: what each image goes through; then they come at its size.
        may_be_empty: leave out a batch of which no image can be read, instead of ending the run there.
    """

    image_size: tuple[int, int]
    device: torch.device
    num_workers: int = 0
    prepared: Prepared | None = None
    may_be_empty: bool = False


class ImageSet(ABC):
    """Labelled images of one part of a data set.

    Attributes:
        labels: int64 class indices [N], on the CPU; a stream has none before it is read.
        knows_labels: whether they are there, and images can be had in any order.
    """

    labels: Tensor
    knows_labels: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def subset(self, indices: Tensor) -> ImageSet:
        """The images at ``indices`` (int64 [M]), in that order."""

    def in_epoch(self, seed: int) -> ImageSet:
        """The images as an epoch has them, where they bring an order of their own."""
        return self

    @abstractmethod
    def read(
        self, batches: Sequence[Tensor], wanted: Wanted, seeds: Sequence[int] = ()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read batch after batch.

        Args:
            batches: int64 indices [B] of each batch.
            wanted: how.
            seeds: of each batch, what its images' draws depend on.

        Yields:
            Images uint8 [B, C, h, w] and labels int64 [B], on ``device``.

        Raises:
            DataError: for a corrupt image that is not to be skipped.
        """


@final
class InMemoryImages(ImageSet):
    """Decoded images, uint8 [N, C, H, W], and labels, int64 [N].

    Raises:
        DataError: where the two do not belong together.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise DataError(f"Images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}.")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise DataError(
                f"Labels must be int64 [{len(images)}], one an image, got {labels.dtype} {list(labels.shape)}."
            )
        self.images = images
        self.labels = labels
        self._near: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def subset(self, indices: Tensor) -> InMemoryImages:
        """Copy the images at ``indices`` (int64 [M]), in that order."""
        return InMemoryImages(self.images[indices], self.labels[indices])

    def read(
        self, batches: Sequence[Tensor], wanted: Wanted, seeds: Sequence[int] = ()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Index batch after batch; what no transform prepares is resized later, after cropping, on the device."""
        device = wanted.device
        if wanted.prepared is not None:
            for indices, seed in zip(batches, seeds, strict=True):
                found = [wanted.prepared(image, seed, place) for place, image in enumerate(self.images[indices])]
                yield torch.stack(found).to(device), self.labels[indices].to(device)
            return
        images, labels = self._moved_near(device)
        for indices in batches:
            rows = indices.to(images.device, non_blocking=True)
            picked, targets = images[rows], labels[rows]
            if picked.device.type != device.type:
                picked, targets = (t.pin_memory().to(device, non_blocking=True) for t in (picked, targets))
            yield picked, targets

    def _moved_near(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tensors on ``device`` if they take little of it, else where they are; once per device."""
        if device not in self._near:
            fits = device.type != "cuda" or (self.images.nbytes <= _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
            target = device if fits else self.images.device
            self._near[device] = (self.images.to(target), self.labels.to(target))
        return self._near[device]


class ImageFiles(ABC):
    """Encoded images that can be fetched by row; picklable, for worker processes."""

    @abstractmethod
    def encoded(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Name and bytes of each row's image; `Missing` where the file can't be read."""

    @abstractmethod
    def sources(self, rows: Sequence[int]) -> Sequence[str | bytes]:
        """Path or bytes of each row's image: its header is read without the rest."""


@final
@dataclass(frozen=True)
class FilesOnDisk(ImageFiles):
    """Images that are files of their own."""

    paths: tuple[str, ...]

    def encoded(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Read the files at ``rows``; see `ImageFiles.encoded`."""
        return [(self.paths[row], bytes_of(self.paths[row])) for row in rows]

    def sources(self, rows: Sequence[int]) -> Sequence[str]:
        """The paths; see `ImageFiles.sources`."""
        return [self.paths[row] for row in rows]


@final
@dataclass(frozen=True)
class FilesInTable(ImageFiles):
    """Images in the rows of a Hugging Face data set, fetched as Arrow so that nothing decodes them twice."""

    table: Any  # a datasets.Dataset in Arrow format with the image column alone
    column: str
    name: str
    folder: str = ""  # that paths in the table start from

    def encoded(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the cells at ``rows``; see `ImageFiles.encoded`."""
        return [self._name_and_bytes(row, cell) for row, cell in zip(rows, self._cells(rows), strict=True)]

    def sources(self, rows: Sequence[int]) -> Sequence[str | bytes]:
        """The bytes in the table, or the path; see `ImageFiles.sources`."""
        return [
            os.path.join(self.folder, cell["path"]) if cell["bytes"] is None and cell["path"] else cell["bytes"] or b""  # noqa: PTH118
            for cell in self._cells(rows)
        ]

    def _cells(self, rows: Sequence[int]) -> list[Cell]:
        cells = self.table[list(rows)][self.column].to_pylist()
        return [cell or Cell(bytes=b"", path=None) for cell in cells]

    def _name_and_bytes(self, row: int, cell: Cell) -> tuple[str, bytes]:
        label = f"{self.name}, row {row}" + (f" ({cell['path']})" if cell["path"] else "")
        if cell["bytes"] is None and cell["path"]:
            return label, bytes_of(os.path.join(self.folder, cell["path"]))  # noqa: PTH118  # a str, as torchvision's
        return label, cell["bytes"] or b""


class EncodedImages(ImageSet):
    """Encoded images, decoded when they are read, by worker processes.

    Attributes:
        reading: how they are read.
        on_corrupt: whether an image that can't be decoded is left out of its batch, or ends the run.
        skipped: takes what is left out.
    """

    reading: Reading
    on_corrupt: OnCorrupt
    skipped: Skipped

    def read_as(self, reading: Reading, on_corrupt: OnCorrupt | None = None, skipped: Skipped | None = None) -> Self:
        """The same images, read otherwise."""
        other = copy.copy(self)
        other.reading, other.on_corrupt = reading, on_corrupt or self.on_corrupt
        other.skipped = self.skipped if skipped is None else skipped
        return other

    @abstractmethod
    def has_colour(self) -> bool:
        """Whether one of the images is known to have more than grey."""

    @abstractmethod
    def sampled(self) -> Sequence[tuple[str, bytes]]:
        """Names and bytes of a few images, to learn what they are like."""

    @abstractmethod
    def requests(self, batches: Sequence[Tensor]) -> Iterator[Any]:
        """What a worker is to be told of each batch, given the indices int64 [B] of its images."""

    @abstractmethod
    def fetch(self, request: Any) -> tuple[Sequence[tuple[str, bytes]], Tensor]:
        """Names and bytes of a batch's images, and their labels int64 [B]; in a worker."""

    def probe(self) -> list[Probed]:
        """Open a few images to learn what they are like.

        Raises:
            DataError: if none of them can be read, or one is corrupt and not to be skipped.
        """
        seen, sampled = [], self.sampled()
        for name, encoded in sampled:
            try:
                seen.append(probe(encoded, self.reading))
            except Unreadable as error:
                raise_unless_skipped(name, error, self.on_corrupt)
        if not seen:
            raise DataError(f"None of the {len(sampled)} images tried can be read, {sampled[-1][0]} among them.")
        return seen

    def read(
        self, batches: Sequence[Tensor], wanted: Wanted, seeds: Sequence[int] = ()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode batch after batch in worker processes; see `ImageSet.read`.

        A skipped image makes its batch smaller, the same in every epoch and after every resume.
        """
        device = wanted.device
        loader = torch.utils.data.DataLoader(
            _DecodedBatches(self, wanted.image_size, wanted.prepared),
            batch_size=None,
            sampler=cast("Any", zip(self.requests(batches), seeds or [0] * len(batches), strict=True)),
            num_workers=wanted.num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else the loader draws its workers' seed from the global state
        )
        for images, labels, unreadable, failure in loader:
            if failure is not None:
                raise DataError(failure)
            for name, kind, reason in unreadable:
                error = Unreadable(kind, reason)
                self.skipped.add(name, raise_unless_skipped(name, error, self.on_corrupt))
            if not len(images) and wanted.may_be_empty:
                continue
            if not len(images):
                name, _, reason = unreadable[0]
                raise DataError(
                    f"Not one image of a batch of {len(unreadable)} can be read, {name} among them ({reason})."
                )
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@final
@dataclass(eq=False)
class FileImages(EncodedImages):
    """Encoded images, decoded when they are read.

    Attributes:
        files: where the bytes come from.
        labels: int64 [N].
        rows: int64 [N], the row of ``files`` that each image is; all of them where None.
        reading: how they are read.
        on_corrupt: whether an image that can't be decoded is left out of its batch, or ends the run.
        skipped: takes what is left out.
    """

    files: ImageFiles
    labels: Tensor
    rows: Tensor = None  # type: ignore[assignment]
    reading: Reading = field(default_factory=Reading)
    on_corrupt: OnCorrupt = "error"
    skipped: Skipped = field(default_factory=Skipped)

    def __post_init__(self) -> None:
        """All rows, where none were given."""
        if self.rows is None:
            self.rows = torch.arange(len(self.labels))

    def subset(self, indices: Tensor) -> FileImages:
        """The images at ``indices`` (int64 [M]), in that order; nothing is read."""
        return replace(self, labels=self.labels[indices], rows=self.rows[indices])

    def sampled(self) -> Sequence[tuple[str, bytes]]:
        """Some, spread evenly."""
        spread = self.rows[torch.linspace(0, len(self) - 1, min(PROBED, len(self))).long()]
        return self.files.encoded(spread.tolist())

    def requests(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The indices alone."""
        return iter(batches)

    def fetch(self, request: Any) -> tuple[Sequence[tuple[str, bytes]], Tensor]:
        """Read the files at some indices; see `EncodedImages.fetch`."""
        return self.files.encoded(self.rows[request].tolist()), self.labels[request]

    def has_colour(self) -> bool:
        """Whether one of the images has more than grey, by their headers."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return any(list(threads.map(self._has_colour_from, range(0, len(self), _CHUNK))))

    def _has_colour_from(self, start: int) -> bool:
        sources = self.files.sources(self.rows[start : start + _CHUNK].tolist())
        return any(has_colour(source, self.reading.background) for source in sources)

    def decode(self, image_size: tuple[int, int]) -> tuple[InMemoryImages, bool]:
        """Decode every image, in threads, and bring it to (H, W).

        Returns:
            The images that could be decoded (the others are in ``skipped``), and whether all of
            them had this size to begin with.

        Raises:
            DataError: for a corrupt image, unless those are to be skipped.
        """
        pixels = torch.empty((len(self), self.reading.num_channels, *image_size), dtype=torch.uint8)
        good = torch.ones(len(self), dtype=torch.bool)
        work = partial(self._decode_chunk, pixels=pixels, good=good)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            all_alike = all(list(threads.map(work, range(0, len(self), _CHUNK))))
        if not good.all():
            pixels = pixels[good]
        return InMemoryImages(pixels, self.labels[good]), all_alike

    def _decode_chunk(self, start: int, *, pixels: Tensor, good: Tensor) -> bool:
        alike, reading = True, self.reading
        rows = self.rows[start : start + _CHUNK].tolist()
        for i, (name, encoded) in enumerate(self.files.encoded(rows), start):
            try:
                decoded = to_pixels(open_image(encoded), reading)
            except Unreadable as error:
                self.skipped.add(name, raise_unless_skipped(name, error, self.on_corrupt))
                good[i] = False
                continue
            alike &= decoded.shape == pixels.shape[1:]
            pixels[i] = reading.to_size(decoded, (pixels.shape[2], pixels.shape[3]))
        return alike


def _ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which stops its workers once the run is saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_IS_OF_COLOUR = (
    "The image {name} has colour, and the first images of the stream, by which it was taken for grey, have none; "
    "leave {streaming} out."
)
_Decoded = tuple[Tensor, Tensor, list[tuple[str, Kind, str]], str | None]


@final
class _DecodedBatches(torch.utils.data.Dataset[_Decoded]):
    """What a worker runs; failures travel as text, since a raised one would arrive with its traceback."""

    def __init__(self, images: EncodedImages, image_size: tuple[int, int], prepared: Prepared | None) -> None:
        self.images = images
        self.image_size = image_size
        self.prepared = prepared

    def __getitem__(self, request: tuple[Any, int]) -> _Decoded:
        what, seed = request
        good, decoded = [], []
        unreadable: list[tuple[str, Kind, str]] = []
        reading = self.images.reading
        empty = torch.empty((0, reading.num_channels, *self.image_size), dtype=torch.uint8)
        encoded_files, labels = self.images.fetch(what)
        for place, (name, encoded) in enumerate(encoded_files):
            try:
                image = open_image(encoded)
                if not self.images.knows_labels and num_channels_of(image, reading.background) > reading.num_channels:
                    return empty, labels[[]], [], _IS_OF_COLOUR.format(name=name, streaming=arg("streaming"))
                pixels = to_pixels(image, reading)
                ready = (
                    self.prepared(pixels, seed, place) if self.prepared else reading.to_size(pixels, self.image_size)
                )
            except Unreadable as error:
                unreadable.append((name, error.kind, error.reason))
                continue
            except DataError as error:
                return empty, labels[[]], [], f"{error} The image: {name}."
            good.append(place)
            decoded.append(ready)
        return torch.stack(decoded) if decoded else empty, labels[good], unreadable, None


def raise_unless_skipped(name: str, error: Unreadable, on_corrupt: OnCorrupt) -> Unreadable:
    """Give back what happened to an image if that is to be noted and no more.

    A file that is no image by its content is never a reason to stop; values of an unknown range always are.

    Raises:
        DataError: naming the image.
    """
    if error.kind == "range":
        raise DataError(
            f"The image {name} can't be read: {error.reason}; give {arg('image_range')} (black, white), such as "
            f"{arg('image_range', (0, 4095))}."
        ) from None
    if error.kind == "corrupt" and on_corrupt == "error":
        raise DataError(
            f"The image {name} can't be read ({error.reason}): remove it, or leave such images out with "
            f"{arg('on_corrupt', 'skip')}."
        ) from None
    return error


def bytes_of(path: str) -> bytes:
    """A file's bytes; `Missing`, with the reason, where it can't be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        is_link = Path(path).is_symlink()
        return Missing("no image", "dangling link") if is_link else Missing("corrupt", "there is no such file")
    except OSError as error:
        return Missing("corrupt", error.strerror or str(error))
