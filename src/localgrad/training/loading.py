"""From the name of a data set to labelled images: who reads what, and how image files are decoded.

What it is: `find` turns a name into `Found`, the parts of a data set as image sets. A name is tried as
one of the known ones (`KNOWN_NAMES`), then as an existing path, then as a Hugging Face hub name
(OWNER/NAME, or OWNER/NAME:CONFIG). Reading formats is left to the libraries that define them:
scikit-learn (digits), torchvision (CIFAR, SVHN, STL-10, ImageFolder), Hugging Face datasets (the rest).

There are two kinds of `ImageSet`. `InMemoryImages` holds every image decoded, as one uint8 tensor that
lives on the device where it takes little of its memory: a batch is then one index operation.
`FileImages` holds encoded files, which worker processes decode and resize batch by batch.

How it differs from `torchvision.datasets` with a `DataLoader`: no Python per image in the step's way where
the set is small, and nothing random here at all (`augment.py` draws by batch, on the device), so what
workers do is a function of the index alone. Files are decoded by Pillow, whose calls release Python's lock,
in a few threads where all of them are wanted at once.

Shapes: N images of a set, B batch, C channels, H W image.
"""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import numpy as np
import torch
from torch import Tensor

from localgrad.errors import DataError, did_you_mean, reason_of
from localgrad.training.augment import resize_to_cover

if TYPE_CHECKING:
    from PIL import Image

OnCorrupt = Literal["skip", "error"]

KNOWN_NAMES = ("digits", "cifar10", "cifar100", "stl10", "svhn")
DEFAULT_ROOT = Path("data")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TABLE_LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".jsonl": "json", ".json": "json"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
TEST_PARTS = ("test", "val", "validation", "valid")

_DEVICE_SHARE = 0.1  # of the free memory: the rest belongs to the model, which is why one uses localgrad
_CHUNK = 256  # images a thread decodes before it takes the next lot
_PROBED = 64  # images opened to learn size and channels; decoding checks the rest


@dataclass(frozen=True)
class Shape:
    """What the images of a set have in common: channels, and (H, W) in pixels or None where it varies."""

    num_channels: int
    size: tuple[int, int] | None


class CorruptImage(Exception):  # noqa: N818  a message between the functions of this file, not an error
    """An image that can't be decoded; becomes a DataError or a count."""


# ------------------------------------------------------------------------------------------ image sets


class ImageSet(ABC):
    """Labelled images of one part of a data set.

    Attributes:
        labels: int64 class indices [N], on the CPU.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def subset(self, indices: Tensor) -> ImageSet:
        """The images at ``indices`` (int64 [M]), in that order."""

    @abstractmethod
    def read(
        self, batches: Sequence[Tensor], *, image_size: tuple[int, int], device: torch.device, num_workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read batch after batch.

        Args:
            batches: int64 indices [B] of each batch.
            image_size: (H, W) that the model takes; what is decoded on the fly comes at this size.
            device: where the batches are wanted.
            num_workers: processes that decode ahead, where there is something to decode.

        Yields:
            Images uint8 [B, C, h, w] and labels int64 [B], on ``device``.

        Raises:
            DataError: for a corrupt image that is not to be skipped.
        """


@final
class InMemoryImages(ImageSet):
    """Decoded images in one tensor.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].

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
        self,
        batches: Sequence[Tensor],
        *,
        image_size: tuple[int, int],  # unused: resized later, after cropping, on the device
        device: torch.device,
        num_workers: int,  # unused: nothing is left to decode
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Index batch after batch; see `ImageSet.read`."""
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
        """Name and bytes of each row's image; no bytes where the file can't be read."""


@final
@dataclass(frozen=True)
class FilesOnDisk(ImageFiles):
    """Images that are files of their own."""

    paths: tuple[str, ...]

    def encoded(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Read the files at ``rows``; see `ImageFiles.encoded`."""
        return [(self.paths[row], _bytes_of(self.paths[row])) for row in rows]


@final
@dataclass(frozen=True)
class FilesInTable(ImageFiles):
    """Images in the rows of a Hugging Face data set, fetched as Arrow so that nothing decodes them twice."""

    table: Any  # a datasets.Dataset in Arrow format with the image column alone
    column: str
    name: str

    def encoded(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the cells at ``rows``; see `ImageFiles.encoded`."""
        cells = self.table[list(rows)][self.column].to_pylist()
        return [
            self._name_and_bytes(row, cell or {"bytes": b"", "path": None})
            for row, cell in zip(rows, cells, strict=True)
        ]

    def _name_and_bytes(self, row: int, cell: dict[str, Any]) -> tuple[str, bytes]:
        label = f"{self.name}, row {row}" + (f" ({cell['path']})" if cell["path"] else "")
        if cell["bytes"] is None and cell["path"]:
            return label, _bytes_of(cell["path"])
        return label, cell["bytes"] or b""


@final
class FileImages(ImageSet):
    """Encoded images, decoded when they are read.

    Args:
        files: where the bytes come from.
        labels: int64 [N].
        rows: int64 [N], the row of ``files`` that each image is; all of them where None.
        num_channels: 1 or 3, what the images are converted to.
        on_corrupt: whether an image that can't be decoded is left out of its batch, or ends the run.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: Tensor,
        *,
        rows: Tensor | None = None,
        num_channels: int = 3,
        on_corrupt: OnCorrupt = "error",
    ) -> None:
        self.files = files
        self.labels = labels
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self.num_channels = num_channels
        self.on_corrupt = on_corrupt

    def subset(self, indices: Tensor) -> FileImages:
        """The images at ``indices`` (int64 [M]), in that order; nothing is read."""
        return FileImages(
            self.files,
            self.labels[indices],
            rows=self.rows[indices],
            num_channels=self.num_channels,
            on_corrupt=self.on_corrupt,
        )

    def with_settings(self, num_channels: int, on_corrupt: OnCorrupt) -> FileImages:
        """The same images, to be converted and checked otherwise."""
        return FileImages(self.files, self.labels, rows=self.rows, num_channels=num_channels, on_corrupt=on_corrupt)

    def probe(self) -> Shape:
        """Open a few images, spread evenly, to learn what they have in common.

        Returns:
            1 channel only if every one is grey; a size only if they all share it.

        Raises:
            DataError: if none of them can be read.
        """
        spread = self.rows[torch.linspace(0, len(self) - 1, min(_PROBED, len(self))).long()]
        seen = []
        for name, encoded in self.files.encoded(spread.tolist()):
            try:
                image = open_image(encoded)
            except CorruptImage as error:
                if self.on_corrupt == "error":
                    raise _corrupt(name, error) from None
                continue
            seen.append((_num_channels(image), (image.height, image.width)))
        if not seen:
            raise DataError(f"None of the {len(spread)} images tried can be read, {name} among them.")
        sizes = {size for _, size in seen}
        return Shape(max(channels for channels, _ in seen), sizes.pop() if len(sizes) == 1 else None)

    def decode(self, image_size: tuple[int, int]) -> tuple[InMemoryImages, int, bool]:
        """Decode every image, in threads.

        Args:
            image_size: (H, W) that each is brought to.

        Returns:
            The images that could be decoded, how many could not, and whether those decoded had this size
            and no more colour than ``num_channels`` to begin with.

        Raises:
            DataError: for a corrupt image, unless those are to be skipped.
        """
        pixels = torch.empty((len(self), self.num_channels, *image_size), dtype=torch.uint8)
        good = torch.ones(len(self), dtype=torch.bool)
        work = partial(self._decode_chunk, pixels=pixels, good=good)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            all_alike = all(list(threads.map(work, range(0, len(self), _CHUNK))))
        num_corrupt = len(self) - int(good.sum())
        if num_corrupt:
            pixels = pixels[good]
        return InMemoryImages(pixels, self.labels[good]), num_corrupt, all_alike

    def _decode_chunk(self, start: int, *, pixels: Tensor, good: Tensor) -> bool:
        alike = True
        rows = self.rows[start : start + _CHUNK].tolist()
        for i, (name, encoded) in enumerate(self.files.encoded(rows), start):
            try:
                image = open_image(encoded)
            except CorruptImage as error:
                if self.on_corrupt == "error":
                    raise _corrupt(name, error) from None
                good[i] = False
                continue
            decoded = to_pixels(image, self.num_channels)
            alike &= decoded.shape == pixels.shape[1:] and _num_channels(image) <= self.num_channels
            pixels[i] = resize_to_cover(decoded, (pixels.shape[2], pixels.shape[3]))
        return alike

    def read(
        self, batches: Sequence[Tensor], *, image_size: tuple[int, int], device: torch.device, num_workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode batch after batch in worker processes; see `ImageSet.read`.

        A skipped image makes its batch smaller, the same in every epoch and after every resume.
        """
        loader = torch.utils.data.DataLoader(
            _DecodedBatches(self, image_size),
            batch_size=None,
            sampler=cast("Any", batches),
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else the loader draws its workers' seed from the global state
        )
        for images, labels, corrupt in loader:
            if corrupt and self.on_corrupt == "error":
                raise DataError(corrupt[0])
            if not len(images):
                raise DataError(f"Not one image of a batch of {len(corrupt)} can be read. {corrupt[0]}")
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which stops its workers once the run is saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _DecodedBatches(torch.utils.data.Dataset[tuple[Tensor, Tensor, list[str]]]):
    """What a worker runs; failures travel as text, since a raised one would arrive with its traceback."""

    def __init__(self, images: FileImages, image_size: tuple[int, int]) -> None:
        self.images = images
        self.image_size = image_size

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        good, decoded, corrupt = [], [], []
        rows = self.images.rows[indices].tolist()
        for index, (name, encoded) in zip(indices.tolist(), self.images.files.encoded(rows), strict=True):
            try:
                pixels = to_pixels(open_image(encoded), self.images.num_channels)
            except CorruptImage as error:
                corrupt.append(str(_corrupt(name, error)))
                continue
            good.append(index)
            decoded.append(resize_to_cover(pixels, self.image_size))
        empty = torch.empty((0, self.images.num_channels, *self.image_size), dtype=torch.uint8)
        return torch.stack(decoded) if decoded else empty, self.images.labels[good], corrupt


# -------------------------------------------------------------------------------------------- decoding


def open_image(encoded: bytes) -> Image.Image:
    """Decode an image file, turned upright where its EXIF data say so.

    Args:
        encoded: the file's bytes.

    Returns:
        The image, its pixels loaded.

    Raises:
        CorruptImage: where Pillow makes no image of them.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    broken = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, zlib.error)
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        image.load()
        if image.info.get("exif") and image.getexif().get(0x0112, 1) != 1:  # the tag of orientation
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:  # whose own text names the buffer in memory
        raise CorruptImage("not an image that Pillow knows" if encoded else "empty") from error
    except (*broken, Image.DecompressionBombError) as error:
        raise CorruptImage("empty" if not encoded else str(error)) from error
    return image


def to_pixels(image: Image.Image, num_channels: int) -> Tensor:
    """Convert to grey or colour.

    Args:
        image: of any mode; 16-bit greys keep their upper 8 bits.
        num_channels: 1 or 3.

    Returns:
        uint8 [C, H, W].
    """
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's advice: straight to RGB would warn
    pixels = np.array(image.convert("L" if num_channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(image.height, image.width, num_channels)).permute(2, 0, 1)


def list_image_files(path: Path) -> list[Path]:
    """List a file itself, or all image files below a folder, sorted.

    Args:
        path: an image file or a folder.

    Returns:
        At least one path.

    Raises:
        DataError: if there is no such path, or no image below it.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"There is no file or folder {path}: name an image or a folder of images.")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"There is no image in {path}: looked for *{', *'.join(IMAGE_SUFFIXES)} below it.")
    return found


def read_image_files(paths: Sequence[Path], num_channels: int, on_corrupt: OnCorrupt) -> Iterator[tuple[Path, Tensor]]:
    """Decode image files one after the other.

    Args:
        paths: the files.
        num_channels: 1 or 3.
        on_corrupt: pass over corrupt images, or stop at the first.

    Yields:
        Path and uint8 [C, h, w] of each.

    Raises:
        DataError: for a corrupt image that is not to be skipped.
    """
    for path in paths:
        try:
            image = open_image(_bytes_of(str(path)))
        except CorruptImage as error:
            if on_corrupt == "error":
                raise _corrupt(str(path), error) from None
            continue
        yield path, to_pixels(image, num_channels)


def _num_channels(image: Image.Image) -> int:
    return 1 if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") else 3


def _bytes_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _corrupt(name: str, error: CorruptImage) -> DataError:
    return DataError(
        f"The image {name} can't be read ({reason_of(error, limit=300)}): remove it, or leave such images out with "
        "--on-corrupt skip."
    )


# --------------------------------------------------------------------------------------- finding by name


@dataclass(frozen=True)
class Found:
    """A data set as its files give it, before any splitting of our own.

    Attributes:
        class_names: in the order of the labels.
        train: the training part.
        test: the test part, or None where there is none.
        notes: what a user should know about the choice of parts.
    """

    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet | None
    notes: tuple[str, ...] = field(default=())


def find(name: str, *, root: Path | None, download: bool) -> Found:
    """Resolve a name: known names first, then paths, then the Hugging Face hub.

    Args:
        name: such as ``digits``, ``./photos`` or ``ylecun/mnist``.
        root: where torchvision's data sets are kept (`DEFAULT_ROOT` where None); names are also looked for
            as folders in it.
        download: whether torchvision may fetch what is missing.

    Returns:
        The parts, labels not checked yet.

    Raises:
        DataError: for a name that is nothing of these, and for files that are missing or unusable.
    """
    if name in _READERS:
        return _READERS[name](root or DEFAULT_ROOT, download)
    for path in [Path(name).expanduser()] + ([root / name] if root else []) if name.strip() else []:
        if path.exists():
            return _find_path(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", name):
        repository, _, config = name.partition(":")
        if Path(name).parent.is_dir():
            raise DataError(f"There is no file or folder {name}, though there is {Path(name).parent}.")
        return _find_table(name, partial(_load_dataset, repository, name=config or None))
    raise DataError(
        f"No data set or path is called {name!r}: give one of {', '.join(KNOWN_NAMES)}, an existing folder, "
        f"or OWNER/NAME on the Hugging Face hub.{did_you_mean(name.lower(), KNOWN_NAMES)}"
    )


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
            f"{name} is not (or not complete) in {root}: fetch it with --download, or name the folder that "
            f"holds it with --root DIR ({reason_of(error, limit=300)})."
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
    **{name: partial(_find_in_torchvision, name=name) for name in ("cifar10", "cifar100", "stl10", "svhn")},
}


# ------------------------------------------------------------------------------------ folders and tables


def _find_path(path: Path) -> Found:
    """Decide what a path holds: a table, class folders, or nothing of use."""
    if path.is_file():
        return _find_table_file(path)
    here = [p for folder in (path, *_subfolders(path)) for p in sorted(folder.iterdir()) if p.is_file()]
    tables = [p for p in here if p.suffix in TABLE_LOADERS]
    if any(p.name in ("dataset_dict.json", "state.json") for p in tables):
        return _find_table(str(path), partial(_load_from_disk, str(path)))
    if any(p.suffix in (".parquet", ".arrow") or p.stem == "metadata" for p in tables):
        return _find_table(str(path), partial(_load_dataset, str(path)))
    class_root = path / "train" if (path / "train").is_dir() else path
    if any(_holds_images(folder) for folder in _subfolders(class_root)):
        return _find_folder(path)
    if tables:
        return _find_table(str(path), partial(_load_dataset, str(path)))
    if not any(path.iterdir()):
        raise DataError(f"The data folder {path} is empty: expected class folders of images, or parquet files.")
    raise DataError(
        f"There are no images in class folders of {class_root}: expected {class_root.name}/CLASS/*.png (or "
        f"another of {', '.join(IMAGE_SUFFIXES)}), or parquet files."
    )


def _subfolders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir())


def _holds_images(folder: Path) -> bool:
    return any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.rglob("*"))


def _find_folder(path: Path) -> Found:
    """An image folder in torchvision's layout, with or without parts of its own."""
    if not (path / "train").is_dir():
        class_names, train = _read_folder(path)
        return Found(class_names, train, None)
    class_names, train = _read_folder(path / "train")
    parts = [part for part in TEST_PARTS if (path / part).is_dir()]
    if not parts:
        return Found(class_names, train, None)
    test_names, test = _read_folder(path / parts[0])
    strange = [name for name in test_names if name not in class_names]
    if strange:
        raise DataError(
            f"{path / parts[0]} has the class {strange[0]!r}, which {path / 'train'} does not have."
            f"{did_you_mean(strange[0], class_names)}"
        )
    places = torch.tensor([class_names.index(name) for name in test_names])
    test = FileImages(test.files, places[test.labels])
    return Found(class_names, train, test, tuple(f"The part {part!r} is not used." for part in parts[1:]))


def _read_folder(path: Path) -> tuple[tuple[str, ...], FileImages]:
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

    try:
        folder = ImageFolder(path)
    except FileNotFoundError as error:
        raise DataError(f"The image folder {path} is incomplete: {reason_of(error, limit=300)}") from error
    paths, labels = zip(*folder.samples, strict=True)
    return tuple(folder.classes), FileImages(FilesOnDisk(paths), torch.tensor(labels))


def _find_table_file(path: Path) -> Found:
    if path.suffix not in TABLE_LOADERS:
        raise DataError(
            f"{path} is a file that holds no data set: give a folder, or a file with one of the endings "
            f"{', '.join(TABLE_LOADERS)}."
        )
    load = partial(_load_dataset, TABLE_LOADERS[path.suffix], data_files=str(path))
    return _find_table(str(path), load)


def _load_dataset(source: str, **settings: Any) -> Any:
    import datasets

    return datasets.load_dataset(source, **settings)


def _load_from_disk(source: str) -> Any:
    import datasets

    return datasets.load_from_disk(source)


def _find_table(name: str, load: Callable[[], Any]) -> Found:
    """A Hugging Face data set, its columns found by their types."""
    from datasets.exceptions import DatasetsError

    try:
        loaded = load()
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} is not one of {', '.join(KNOWN_NAMES)}, and the Hugging Face library can't load it: "
            f"{reason_of(error, limit=300)}{did_you_mean(name.lower(), KNOWN_NAMES)}"
        ) from error
    parts = {str(part): rows for part, rows in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in parts:
        raise DataError(f"{name} has no part 'train', only {', '.join(parts)}.")
    image, label, class_names = _columns(name, parts["train"])
    read = {
        part: _read_table(f"{name} {part}", parts[part], image, label)
        for part in ("train", *TEST_PARTS)
        if part in parts and {image, label} <= set(parts[part].features)
    }
    if class_names is None:
        class_names = tuple(str(k) for k in range(int(read["train"].labels.max()) + 1))
    # Some publishers keep the labels of the test part to themselves, and write -1.
    labelled = [p for p in TEST_PARTS if p in read and len(read[p]) and int(read[p].labels.min()) >= 0]
    unused = [part for part in parts if part not in ("train", *labelled[:1])]
    notes = tuple(f"The part {part!r} is not used." for part in unused)
    return Found(class_names, read["train"], read[labelled[0]] if labelled else None, notes)


def _columns(name: str, rows: Any) -> tuple[str, str, tuple[str, ...] | None]:
    """Find the image column, the label column, and the class names where the label's type has them."""
    from datasets import ClassLabel, Image

    features = rows.features
    image = _pick([c for c, kind in features.items() if isinstance(kind, Image)], IMAGE_COLUMNS)
    classes = [c for c, kind in features.items() if isinstance(kind, ClassLabel)]
    plain = [c for c in LABEL_COLUMNS if "int" in str(getattr(features.get(c), "dtype", ""))]
    label = _pick(classes, LABEL_COLUMNS) or _pick(plain, LABEL_COLUMNS)
    if image is None or label is None:
        lacking = "column of type Image" if image is None else "label column (type ClassLabel)"
        columns = ", ".join(f"{c} ({type(kind).__name__})" for c, kind in features.items())
        raise DataError(f"{name} has no single {lacking}: its columns are {columns}.")
    return image, label, tuple(features[label].names) if label in classes else None


def _pick(candidates: list[str], preferred: Sequence[str]) -> str | None:
    """The only candidate, or else the first preferred one among them."""
    if len(candidates) == 1:
        return candidates[0]
    return next((column for column in preferred if column in candidates), None)


def _read_table(name: str, rows: Any, image: str, label: str) -> FileImages:
    labels = rows.select_columns([label]).with_format("arrow")[:][label].fill_null(-1).to_numpy()
    files = FilesInTable(rows.select_columns([image]).with_format("arrow"), image, name)
    return FileImages(files, torch.from_numpy(labels.astype(np.int64)))
