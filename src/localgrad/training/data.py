"""The data path: a name becomes parts, parts become batches that are ready for the step.

What it is: `load_data` finds a data set (`loading.py`), checks it, splits a validation part off the training
part, decodes it into memory where it is small, and says all that it did in a `DataInfo`. `Batches` turns one
part into batches on the device, shuffled and augmented (`augment.py`) for training, in order and plain for
evaluation. `load_images_for_prediction` prepares images without labels the same way.

Why not a `DataLoader` throughout: the sets that local learning is compared on are small (CIFAR, SVHN,
STL-10), and the steps short. Indexing a uint8 tensor and augmenting the batch on the device costs
milliseconds, with no worker process and, but for RandAugment, nothing that waits for the device. Larger sets
are decoded by worker processes, and the same augmentation follows.

Two rules hold here. Selection is honest: validation images come from the training part, by class and by
seed, and the test part is never touched by a setting. And a run can be resumed in the middle of an epoch, bit
for bit: the order of an epoch depends on (seed, epoch), the draws of a batch on (seed, epoch, index), and on
nothing that ran before; the global random states are neither read nor changed.

Shapes: N images of a set, B batch, C channels, H W image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from localgrad.errors import DataError
from localgrad.training.augment import (
    Augment,
    augment_batch,
    derive_seed,
    generator_for,
    normalise,
    prepare_batch,
)
from localgrad.training.loading import (
    FileImages,
    Found,
    ImageSet,
    InMemoryImages,
    OnCorrupt,
    Shape,
    find,
    list_image_files,
    read_image_files,
)

__all__ = [
    "Augment",
    "Batch",
    "Batches",
    "DataInfo",
    "FileImages",
    "ImageSet",
    "InMemoryImages",
    "Splits",
    "load_data",
    "load_images_for_prediction",
    "normalise",
]

MEMORY_LIMIT_BYTES = 2 * 1024**3
TEST_FRACTION = 0.2
_TEST_SEED = 0  # one test part for everybody, whatever the seed of the run

_IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}  # 1: their averages


@dataclass(frozen=True)
class DataInfo:
    """What there is to know about a data set without its images.

    Attributes:
        name: as the user gave it.
        class_names: in the order of the labels.
        num_channels: 1 or 3.
        image_size: (H, W) of the images as they were found, None if they differ.
        mean: per channel, of pixel values scaled to 0..1, over the training part.
        std: likewise.
        num_skipped: corrupt images left out while loading.
        num_train: images.
        num_val: images, 0 if there is no validation part.
        num_test: images.
        notes: sentences about choices that a reader of results should know.
    """

    name: str
    class_names: tuple[str, ...]
    num_channels: int
    image_size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_skipped: int
    num_train: int
    num_val: int
    num_test: int
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; ``val`` is None where no validation part was wanted."""

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    info: DataInfo


def load_data(
    name: str,
    *,
    root: Path | None = None,
    download: bool = False,
    val_fraction: float = 0.1,
    limit: int | None = None,
    on_corrupt: OnCorrupt = "error",
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Splits:
    """Load a data set by name, checked and split.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, ``stl10``, ``svhn``, a folder or table of images, or
            OWNER/NAME on the Hugging Face hub.
        root: the folder that holds torchvision's data sets.
        download: whether torchvision may fetch what is missing there.
        val_fraction: share of the training part that becomes the validation part, from 0 to below 1.
        limit: use this many training images only (after the validation part is split off).
        on_corrupt: leave corrupt images out and count them, or stop at the first.
        seed: of the validation part and of ``limit``.
        image_size: (H, W) that the model takes: images of different sizes are stored at it.
        memory_limit_bytes: decoded sets up to this size are kept in memory.
        mean: per channel, instead of the training part's (a pretrained model brings its own).
        std: likewise.

    Returns:
        The parts and their description.

    Raises:
        DataError: for data that is missing, empty, corrupt, of one class, or labelled outside its classes.
    """
    _check_settings(val_fraction=val_fraction, limit=limit, on_corrupt=on_corrupt)
    found = find(name, root=root, download=download)
    _check_labels(name, found)
    parts, notes = _split(found, val_fraction=val_fraction, limit=limit, seed=seed)
    settled = _settle(parts, on_corrupt, image_size, memory_limit_bytes)
    train, *val, test = settled.parts
    _check_classes(name, found.class_names, train)
    used_mean, used_std = _statistics(train, settled.found_shape.num_channels, mean, std)
    info = DataInfo(
        name=name,
        class_names=found.class_names,
        num_channels=settled.found_shape.num_channels,
        image_size=settled.found_shape.size,
        mean=used_mean,
        std=used_std,
        num_skipped=settled.num_skipped,
        num_train=len(train),
        num_val=sum(len(part) for part in val),
        num_test=len(test),
        notes=(*found.notes, *notes, *settled.notes),
    )
    return Splits(train, val[0] if val else None, test, info)


# ------------------------------------------------------------------------------------------------ checks


def _check_settings(*, val_fraction: float, limit: int | None, on_corrupt: str) -> None:
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction is a share of the training part, from 0 to below 1, got {val_fraction}.")
    if limit is not None and limit < 2:
        raise DataError(f"limit must leave at least 2 training images, got {limit}.")
    if on_corrupt not in get_args(OnCorrupt):
        raise DataError(f"on_corrupt must be one of {', '.join(get_args(OnCorrupt))}, got {on_corrupt!r}.")


def _check_labels(name: str, found: Found) -> None:
    num_classes = len(found.class_names)
    for part, images in (("train", found.train), ("test", found.test)):
        if images is None:
            continue
        if not len(images):
            raise DataError(f"The part {part!r} of {name} is empty: it has no images.")
        _check_range(f"part {part!r} of {name}", images.labels, num_classes)


def _check_range(what: str, labels: Tensor, num_classes: int) -> None:
    strange = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(strange):
        row = int(strange[0])
        raise DataError(
            f"Labels must be from 0 to {num_classes - 1} ({num_classes} classes), got {int(labels[row])} for image "
            f"{row} of the {what}."
        )


def _check_classes(name: str, class_names: Sequence[str], train: ImageSet) -> None:
    present = torch.bincount(train.labels).nonzero()
    if len(present) < 2:
        only = f"only {class_names[int(present[0])]!r}" if len(present) else "no image at all"
        raise DataError(f"There must be two or more classes among the training images of {name}, got {only}.")


# --------------------------------------------------------------------------------------------- splitting


def apportion(counts: Sequence[int], total: int, ceilings: Sequence[int]) -> list[int]:
    """Share ``total`` out in proportion to ``counts``, in whole numbers, by largest remainders.

    Args:
        counts: images of each class.
        total: how many to take altogether.
        ceilings: the most that may be taken of each class.

    Returns:
        How many to take of each class; they add up to ``total``, or to what the ceilings allow.
    """
    everything = max(1, sum(counts))
    shares = [min(total * count // everything, top) for count, top in zip(counts, ceilings, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda k: (-(total * counts[k] % everything), k))
    missing = min(total, sum(ceilings)) - sum(shares)
    while missing > 0:
        for k in by_remainder:
            if missing > 0 and shares[k] < ceilings[k]:
                shares[k] += 1
                missing -= 1
    return shares


def stratified_choice(labels: Tensor, num_wanted: int, *, leave_one: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Choose images at random, of each class in proportion.

    Args:
        labels: int64 class indices [N].
        num_wanted: how many to choose.
        leave_one: choose no class's last image.
        seed: of the choice.

    Returns:
        Indices (int64, ascending) of the chosen and of the others.
    """
    counts = torch.bincount(labels).tolist() if len(labels) else []
    shares = apportion(counts, num_wanted, [max(0, count - leave_one) for count in counts])
    generator = generator_for(seed, "stratified choice")
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    for k, share in enumerate(shares):
        members = (labels == k).nonzero().flatten()
        is_chosen[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return is_chosen.nonzero().flatten(), (~is_chosen).nonzero().flatten()


def _split(found: Found, *, val_fraction: float, limit: int | None, seed: int) -> tuple[list[ImageSet], list[str]]:
    """Make parts out of what was found: train, validation (if there is to be one) and test."""
    train, test, val, notes = found.train, found.test, None, []
    if test is None:
        test, train = _cut(train, round(TEST_FRACTION * len(train)), leave_one=True, seed=_TEST_SEED)
        notes.append(f"No test part: {len(test)} of {len(test) + len(train)} images are held out as one.")
        if not len(test):
            raise DataError(f"{len(train)} images are too few to hold out a test part of {TEST_FRACTION:.0%}.")
    if val_fraction:
        val, train = _cut(train, round(val_fraction * len(train)), leave_one=True, seed=seed)
        if not len(val):
            val = None
            notes.append(f"{len(train)} training images are too few for a validation part of {val_fraction}.")
    if limit is not None and limit < len(train):
        notes.append(f"Limited to {limit} of {len(train)} training images.")
        train, _ = _cut(train, limit, leave_one=False, seed=seed)
    return [part for part in (train, val, test) if part is not None], notes


def _cut(images: ImageSet, num_wanted: int, *, leave_one: bool, seed: int) -> tuple[ImageSet, ImageSet]:
    chosen, others = stratified_choice(images.labels, num_wanted, leave_one=leave_one, seed=seed)
    return images.subset(chosen), images.subset(others)


# ------------------------------------------------------------------------------- into memory, or left in files


@dataclass(frozen=True)
class _Settled:
    """The parts where they will stay, and what was seen on the way there."""

    parts: Sequence[ImageSet]
    found_shape: Shape
    num_skipped: int = 0
    notes: tuple[str, ...] = ()


def _settle(
    parts: Sequence[ImageSet], on_corrupt: OnCorrupt, image_size: tuple[int, int] | None, limit_bytes: int
) -> _Settled:
    """Decode files where the result is small enough."""
    first = parts[0]
    if isinstance(first, InMemoryImages):
        return _Settled(parts, Shape(first.images.shape[1], (first.images.shape[2], first.images.shape[3])))
    files = [p.with_settings(3, on_corrupt) for p in parts if isinstance(p, FileImages)]
    probed = [part.probe() for part in files]
    size = probed[0].size if len({shape.size for shape in probed}) == 1 else None
    shape = Shape(max(shape.num_channels for shape in probed), size)
    return _decode_if_small(files, shape, image_size, limit_bytes)


def _decode_if_small(
    files: Sequence[FileImages], shape: Shape, image_size: tuple[int, int] | None, limit_bytes: int
) -> _Settled:
    files = [part.with_settings(shape.num_channels, part.on_corrupt) for part in files]
    num_values = sum(len(part) for part in files) * shape.num_channels
    wanted = [size for size in (shape.size, image_size) if size is not None]
    sizes = [size for size in wanted if num_values * size[0] * size[1] <= limit_bytes]
    if not sizes:
        return _Settled(files, shape, notes=("Images are decoded while training.",))
    decoded = [part.decode(sizes[0]) for part in files]
    is_native = sizes[0] == shape.size
    if is_native and not all(alike for _, _, alike in decoded):
        # The few images probed were alike but others are not: take the set for mixed, and for colour.
        return _decode_if_small(files, Shape(3, None), image_size, limit_bytes)
    notes = () if is_native else (f"Images are stored at {sizes[0][0]}x{sizes[0][1]} pixels.",)
    return _Settled([images for images, _, _ in decoded], shape, sum(n for _, n, _ in decoded), notes)


def _statistics(
    train: ImageSet, num_channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation asked for, or those of the training part, or ImageNet's."""
    if (mean is None) != (std is None):
        raise DataError("mean and std go together: give both, or neither.")
    if mean is None or std is None:
        return _measured(train.images) if isinstance(train, InMemoryImages) else _IMAGENET[num_channels]
    if not len(mean) == len(std) == num_channels:
        raise DataError(f"The images have {num_channels} channels, got mean {tuple(mean)} and std {tuple(std)}.")
    if not all(map(math.isfinite, (*mean, *std))):
        raise DataError(f"mean and std must be finite, got {tuple(mean)} and {tuple(std)}.")
    if min(std) <= 0:
        raise DataError(f"std must be above 0, got {tuple(std)}.")
    return tuple(mean), tuple(std)


def _measured(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 [N, C, H, W], summed in integers: exact anywhere."""
    sums, squares = torch.zeros(2, images.shape[1], dtype=torch.int64)
    for chunk in torch.split(images, 2048):
        values = chunk.to(torch.int32)
        sums += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = [total / count / 255 for total in sums.tolist()]
    variance = [total / count / 255**2 - m**2 for total, m in zip(squares.tolist(), mean, strict=True)]
    # A channel that never changes must not be divided by zero: one grey level is the least there can be.
    return tuple(mean), tuple(max(v, 255.0**-2) ** 0.5 for v in variance)


# ----------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """What a step is fed, all of it on the device.

    Attributes:
        images: float32 [B, C, H, W], normalised.
        labels: what the loss compares with: int64 [B], or float32 [B, K] where augmentation makes them soft.
        targets: int64 [B], the class indices, whatever was mixed into the images.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor


class Batches:
    """Batches of an image set, ready for the step.

    Args:
        images: one part of a data set.
        batch_size: images a batch.
        image_size: (H, W) that the model takes, in pixels.
        info: of the data set; mean, std and the number of classes are used.
        device: where the batches are made and wanted.
        augment: for training, or None for evaluation: every image, in order, resized and normalised only.
        seed: of order and augmentation.
        drop_last: leave out a last batch that is not full, in training.
        num_workers: processes that decode images which are not in memory.
        shard: (number, of how many) replicas that share the images out without overlap: in training each takes a
            part of every batch, in evaluation every so many-th batch.

    Raises:
        DataError: for a batch that is larger than the images are many, where that would leave no batch; or a label that
            means no class (nor may one be ignored: accuracies count every image).
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        image_size: tuple[int, int],
        info: DataInfo,
        device: torch.device | str,
        augment: Augment | None,
        seed: int,
        drop_last: bool,
        num_workers: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be 1 or more, got {batch_size}.")
        if num_workers < 0:
            raise DataError(f"num_workers must be 0 or more, got {num_workers}.")
        _check_range("set that batches are made of", images.labels, info.num_classes)
        self.images = images
        self.batch_size = batch_size
        self.image_size = image_size
        self.info = info
        self.device = torch.device(device)
        self.augment = augment
        self.seed = seed
        self.drop_last = drop_last and augment is not None
        self.num_workers = num_workers
        self.shard = shard
        if augment is not None and batch_size % shard[1]:
            raise DataError(
                f"batch_size {batch_size} can't be shared out among {shard[1]} replicas; take a multiple of {shard[1]}."
            )
        if self._num_batches == 0:
            raise DataError(
                f"batch_size {batch_size} leaves no full batch of {len(images)} images: choose a smaller one."
            )

    def __len__(self) -> int:
        number, replicas = self.shard
        return self._num_batches if self.augment is not None else len(range(number, self._num_batches, replicas))

    @property
    def _num_batches(self) -> int:
        """Batches of all replicas together."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Make the batches of one epoch.

        Args:
            epoch: counted from 0; each has its own order and draws.
            start: index of the first batch wanted, for resuming inside the epoch.

        Yields:
            The batches from ``start`` on, the same as if those before had been made too.
        """
        indices = self._batches(epoch)[start : len(self)]
        read = self.images.read(indices, image_size=self.image_size, device=self.device, num_workers=self.num_workers)
        number, replicas = self.shard
        own = () if replicas == 1 else (number,)
        for index, (images, targets) in enumerate(read, start):
            yield self._prepare(images, targets, derive_seed(self.seed, "batch", epoch, index, *own))

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Indices of the images of each batch."""
        batches = torch.split(self._order(epoch), self.batch_size)
        number, replicas = self.shard
        if self.augment is None:
            return batches[number::replicas]
        return [batch.tensor_split(replicas)[number] for batch in batches]

    def _order(self, epoch: int) -> Tensor:
        if self.augment is None:
            return torch.arange(len(self.images))
        return torch.randperm(len(self.images), generator=generator_for(self.seed, "order", epoch))

    def _prepare(self, images: Tensor, targets: Tensor, seed: int) -> Batch:
        info = self.info
        if self.augment is None:
            floats = prepare_batch(images, image_size=self.image_size, mean=info.mean, std=info.std)
            return Batch(floats, targets, targets)
        floats, labels = augment_batch(
            images,
            targets,
            augment=self.augment,
            num_classes=info.num_classes,
            image_size=self.image_size,
            mean=info.mean,
            std=info.std,
            seed=seed,
        )
        return Batch(floats, labels, targets)


# -------------------------------------------------------------------------------------------- prediction


def load_images_for_prediction(
    path: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_channels: int,
    image_size: tuple[int, int],
    on_corrupt: OnCorrupt = "error",
) -> Iterator[tuple[Path, Tensor]]:
    """Load images without labels, as a model is evaluated on them.

    Args:
        path: an image file, or a folder that is searched with all below it.
        mean: per channel, that the model was trained with.
        std: likewise.
        num_channels: 1 or 3.
        image_size: (H, W) that the model takes, in pixels.
        on_corrupt: pass over corrupt images, or stop at the first.

    Returns:
        An iterator of paths and images float32 [C, H, W]; it raises DataError at a corrupt image, unless
        those are to be skipped.

    Raises:
        DataError: at once, if there is no such path or no image in it.
    """
    _check_settings(val_fraction=0, limit=None, on_corrupt=on_corrupt)
    paths = list_image_files(path)

    def prepared() -> Iterator[tuple[Path, Tensor]]:
        for found, pixels in read_image_files(paths, num_channels, on_corrupt):
            yield found, prepare_batch(pixels, image_size=image_size, mean=mean, std=std)

    return prepared()
