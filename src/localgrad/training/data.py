"""The data path: a name becomes parts, parts become batches that are ready for the step.

`load_data` finds a data set (`loading.py`), checks it, splits a validation part off the training part where it has none
of its own, decodes it into memory where it is small, and says what it did in a `DataInfo`. `Batches` turns one part
into batches on the device, shuffled and augmented (`augment.py`) for training, in order and plain for evaluation.

Why not a `DataLoader` throughout: the sets that local learning is compared on are small, and the steps short. Indexing
a uint8 tensor and augmenting the batch on the device costs milliseconds, with no worker process. Larger sets are
decoded by worker processes, and the same augmentation follows.

Two rules hold here. Selection is honest: validation images are those that the data set brings for it, or come from the
training part, by class and by seed, and the test part is never touched by a setting. And a run can be resumed in the
middle of an epoch, bit for bit: the order of an epoch depends on (seed, epoch), the draws of a batch on (seed, epoch,
index), and on nothing that ran before; the global random states are neither read nor changed.

Shapes: N images of a set, B batch, C channels, H W image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from localgrad.errors import DataError, arg
from localgrad.objectives.carried import LocalBatch
from localgrad.training.augment import WHITE, ModelInput, augment_batch, derive_seed, generator_for, share_cut_off
from localgrad.training.folders import Split
from localgrad.training.image_sets import EncodedImages, FileImages, ImageSet, InMemoryImages, Skipped, Wanted
from localgrad.training.images import Probed, Reading, check_range
from localgrad.training.loading import Found, find
from localgrad.training.settings import Augment, DataSettings, Fit
from localgrad.training.tables import Chosen
from localgrad.training.transforms import NONE, Prepared

RESIZING = ("interpolation", "crop")
"""Settings of data that are of how a transform resizes."""
MEMORY_LIMIT_BYTES = 2 * 1024**3
TEST_FRACTION = 0.2
_WORTH_SAYING = 0.01  # share of an image that may be cut off without a word: rounding
_TEST_SEED = 0  # one test part for everybody, whatever the seed of the run

_IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}  # 1: their averages


@dataclass(frozen=True)
class DataInfo:
    """What there is to know about a data set without its images.

    Attributes:
        name: as the user gave it.
        class_names: in the order of the labels.
        num_channels: 1 or 3.
        found_size: (H, W) of the images as they were found, None if they differ.
        mean: per channel, of pixel values scaled to 0..1, over the training part.
        std: likewise.
        num_skipped: images left out while loading: corrupt ones, and files that are none by their content.
        num_train: images.
        num_val: images, 0 if there is no validation part.
        num_test: images.
        notes: sentences about choices that a reader of results should know.
        image_range: (black, white) of images of more than 8 bits, None for the range of their type.
        background: (R, G, B) from 0 to 255, behind transparent images.
        fit: how images of another shape are brought to the model's.
        skipped: what was left out of each part while loading, reason to number.
    """

    name: str
    class_names: tuple[str, ...]
    num_channels: int
    found_size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_skipped: int
    num_train: int
    num_val: int
    num_test: int
    notes: tuple[str, ...]
    image_range: tuple[float, float] | None = None
    background: tuple[int, int, int] = WHITE
    fit: Fit = "crop"
    skipped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; ``val`` is None where no validation part was wanted.

    ``skipped`` has what was left out of each part, and grows where images are decoded while
    training; ``sizes`` are the (H, W) of sampled images; ``transform`` is what each image goes through.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    info: DataInfo
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    transform: str | None = None

    def part(self, name: str) -> ImageSet | None:
        """One of them."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def num_read(self, part: str) -> int:
        """Images of a part without those that were left out, as far as they were read."""
        images = self.part(part)
        left_out = len(self.skipped[part].images) if isinstance(images, EncodedImages) else 0
        return 0 if images is None else len(images) - left_out

    def said(self, *notes: str) -> Splits:
        """The same, with further notes."""
        return replace(self, info=replace(self.info, notes=(*self.info.notes, *notes)))

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> Splits:
        """The same, to be normalised otherwise.

        Args:
            mean: per channel, or one for all; of a colour model, for grey images, their average is taken.
            std: likewise.
        """
        channels = self.info.num_channels
        if len(mean) == len(std) == 3 and channels == 1:
            mean, std = [sum(mean) / 3], [sum(std) / 3]
        mean, std = _checked_statistics(channels, mean, std)
        notes = tuple(note for note in self.info.notes if note != _BY_IMAGENET)
        return replace(self, info=replace(self.info, mean=mean, std=std, notes=notes))


def load_data(
    settings: DataSettings,
    *,
    seed: int = 0,
    download: bool = False,
    image_size: tuple[int, int] | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    default_transform: tuple[str, tuple[int, int]] | None = None,
) -> Splits:
    """Load a data set by name, checked and split.

    Args:
        settings: which images, and how they are read. Where the data set has a validation part, that is taken as it
            is, or with a fraction of 0 left unused; images are limited after the validation part is split off.
        seed: of the validation part and of the limit.
        download: whether torchvision may fetch what is missing.
        image_size: (H, W) that the model takes: images of different sizes are stored at it.
        memory_limit_bytes: decoded sets up to this size are kept in memory.
        default_transform: the one for files whose images are mostly larger than a size, (H, W), where none is set.

    Raises:
        DataError: for data that is missing, empty, corrupt, of one class, or labelled outside its classes.
    """
    name = settings.name
    given: dict[Split, str | None] = {
        "train": settings.train_data,
        "val": settings.val_data,
        "test": settings.test_data,
    }
    root = None if settings.root is None else Path(settings.root)
    chosen = Chosen(**{each.name: getattr(settings, each.name) for each in fields(Chosen)})
    found = find(name, root=root, download=download, given={k: v for k, v in given.items() if v}, chosen=chosen)
    _check_labels(name, found)
    parts, notes = _split(found, settings, seed)
    skipped = {part: found.skipped.get(part) or Skipped() for part in parts}
    reading = Reading.as_set(settings)
    settled = _settle(
        parts,
        reading,
        settings,
        skipped=skipped,
        image_size=image_size,
        limit_bytes=memory_limit_bytes,
        default_transform=default_transform,
    )
    train, val, test = (settled.parts.get(part) for part in ("train", "val", "test"))
    assert train is not None, "every set has a training part"
    assert test is not None, "and a test part"
    if train.knows_labels:
        _check_classes(name, found.class_names, train)
    _check_read(name, parts, settled.parts)
    mean, std, measured = _statistics(train, settled.num_channels, settings.mean, settings.std)
    info = DataInfo(
        name=name,
        class_names=found.class_names,
        num_channels=settled.num_channels,
        found_size=settled.size,
        mean=mean,
        std=std,
        num_skipped=sum(len(own.images) for own in skipped.values()),
        num_train=len(train),
        num_val=0 if val is None else len(val),
        num_test=len(test),
        notes=(*found.notes, *notes, *settled.notes, *measured, *_without_images(found.class_names, train)),
        image_range=reading.image_range,
        background=reading.background,
        fit=reading.fit,
        skipped={part: own.counts() for part, own in skipped.items() if own.counts()},
    )
    return Splits(train, val, test, info, skipped, settled.sizes, settled.transform)


def resizing_set(settings: DataSettings) -> dict[str, Any]:
    """What settings say of how a transform resizes."""
    return {key: getattr(settings, key) for key in RESIZING}


def note_on_fit(splits: Splits, image_size: tuple[int, int]) -> str | None:
    """How much of the images is cut off for (H, W), as a sentence; None where that is next to nothing."""
    cut = [share_cut_off(size, image_size) for size in splits.sizes]
    if splits.transform or splits.info.fit != "crop" or not cut or max(cut) < _WORTH_SAYING:
        return None
    return (
        f"Images are cut to the model's shape: {sum(cut) / len(cut):.0%} of their pixels on average are left "
        f"out, up to "
        f"{max(cut):.0%} (of {len(cut)} sampled); data.fit pad or squash keeps all."
    )


# ------------------------------------------------------------------------------------------------ checks


def _check_labels(name: str, found: Found) -> None:
    num_classes = len(found.class_names)
    for part, images in (("train", found.train), ("val", found.val), ("test", found.test)):
        if images is None:
            continue
        if not len(images):
            raise DataError(f"The part {part!r} of {name} is empty: it has no images.")
        if images.knows_labels:
            _check_range(f"part {part!r} of {name}", images.labels, num_classes)


def _check_range(what: str, labels: Tensor, num_classes: int) -> None:
    strange = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(strange):
        row = int(strange[0])
        raise DataError(
            f"Labels must be from 0 to {num_classes - 1} ({num_classes} classes), got {int(labels[row])} for image "
            f"{row} of the {what}{'; -1 is also a label that is missing' if int(labels[row]) == -1 else ''}."
        )


def _check_classes(name: str, class_names: Sequence[str], train: ImageSet) -> None:
    present = torch.bincount(train.labels).nonzero()
    if len(present) < 2:
        only = f"only {class_names[int(present[0])]!r}" if len(present) else "no image at all"
        raise DataError(f"There must be two or more classes among the training images of {name}, got {only}.")


def _check_read(name: str, before: Mapping[str, ImageSet], after: Mapping[str, ImageSet]) -> None:
    """Refuse a part of which nothing is left."""
    for part, images in after.items():
        if not len(images):
            raise DataError(f"None of the {len(before[part])} images of the part {part!r} of {name} can be read.")


def _without_images(class_names: Sequence[str], train: ImageSet) -> list[str]:
    """Say which classes have no training image."""
    if not train.knows_labels:
        return []
    counts = torch.bincount(train.labels, minlength=len(class_names)).tolist()
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    listed = ", ".join(empty[:6]) + (f" and {len(empty) - 6} more" if len(empty) > 6 else "")
    return [f"Classes without a training image: {listed}."] if empty else []


# --------------------------------------------------------------------------------------------- splitting


def apportion(counts: Sequence[int], total: int, ceilings: Sequence[int]) -> list[int]:
    """Share ``total`` out in proportion to ``counts``, in whole numbers, by largest remainders.

    Returns:
        How many to take of each; they add up to ``total``, or to what the ceilings (the most of each) allow.
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
    """Choose images at random, of each class in proportion, and where asked no class's last one.

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


def _split(found: Found, settings: DataSettings, seed: int) -> tuple[dict[str, ImageSet], list[str]]:
    """Make parts out of what was found: train, validation (if there is to be one) and test."""
    train, test, val, notes = found.train, found.test, None, []
    val_fraction, limit = settings.val_fraction, settings.limit
    if limit is not None and limit < 2:
        raise DataError(f"{arg('limit')} must leave at least 2 training images, got {limit}.")
    if test is None:
        test, train = _cut(train, round(TEST_FRACTION * len(train)), leave_one=True, seed=_TEST_SEED)
        notes.append(
            f"No test part: {_said_order(test)}{len(test)} of {len(test) + len(train)} images are held out as one."
        )
        if not len(test):
            raise DataError(f"{len(train)} images are too few to hold out a test part of {TEST_FRACTION:.0%}.")
    if found.val is not None and val_fraction:
        val = found.val
        notes.append("The data set's own validation part selects the best epoch.")
    elif found.val is not None:
        notes.append("The part 'val' is not used: val_fraction is 0, which takes the last epoch.")
    elif val_fraction:
        val, train = _cut(train, round(val_fraction * len(train)), leave_one=True, seed=seed)
        if len(val) and not val.knows_labels:
            notes.append(
                f"Validation images are {_said_order(val)}{len(val)} training images of the stream, in its order."
            )
        if not len(val):
            val = None
            notes.append(f"{len(train)} training images are too few for a validation part of {val_fraction}.")
    if limit is not None and limit < len(train):
        notes.append(f"Limited to {limit} of {len(train)} training images.")
        train, _ = _cut(train, limit, leave_one=False, seed=seed)
    parts = {"train": train, "val": val, "test": test}
    return {part: images for part, images in parts.items() if images is not None}, notes


def _said_order(images: ImageSet) -> str:
    return "" if images.knows_labels else "the first "


def _cut(images: ImageSet, num_wanted: int, *, leave_one: bool, seed: int) -> tuple[ImageSet, ImageSet]:
    """Cut a part off: images of all classes in proportion, or the first ones of a stream."""
    if images.knows_labels:
        chosen, others = stratified_choice(images.labels, num_wanted, leave_one=leave_one, seed=seed)
    else:
        chosen, others = torch.tensor_split(torch.arange(len(images)), [num_wanted])
    return images.subset(chosen), images.subset(others)


# ------------------------------------------------------------------------------- into memory, or left in files


@dataclass(frozen=True)
class _Settled:
    """The parts where they will stay, and what was seen on the way there.

    Attributes:
        parts: by name.
        num_channels: 1 or 3.
        size: (H, W) of the images as they were found; None where it varies.
        notes: what to say.
        sizes: (H, W) of sampled images.
        transform: what each image goes through.
    """

    parts: Mapping[str, ImageSet]
    num_channels: int
    size: tuple[int, int] | None
    notes: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    transform: str | None = None


def _settle(
    parts: Mapping[str, ImageSet],
    reading: Reading,
    settings: DataSettings,
    *,
    skipped: Mapping[str, Skipped],
    image_size: tuple[int, int] | None,
    limit_bytes: int,
    default_transform: tuple[str, tuple[int, int]] | None,
) -> _Settled:
    """Decode files where the result is small enough, and no transform is to see them as they are."""
    transform = None if settings.transform == NONE else settings.transform
    first = parts["train"]
    if isinstance(first, InMemoryImages):
        check_range((), reading.image_range)
        _, num_channels, height, width = first.images.shape
        return _Settled(parts, num_channels, (height, width), sizes=((height, width),), transform=transform)
    files: dict[str, EncodedImages] = {
        part: images.read_as(reading, on_corrupt=settings.on_corrupt, skipped=skipped[part])
        for part, images in parts.items()
        if isinstance(images, EncodedImages)
    }
    probed = [image for images in files.values() for image in images.probe()]
    check_range(probed, reading.image_range)
    sizes = tuple(image.size for image in probed)
    if settings.transform is None and default_transform is not None:
        name, model_size = default_transform
        larger = [min(size) > max(model_size) for size in sizes]
        transform = name if 2 * sum(larger) > len(larger) else None
    size, num_channels = sizes[0] if len(set(sizes)) == 1 else None, max(image.num_channels for image in probed)
    settled = _decode_if_small(files, num_channels, size, image_size, limit_bytes if transform is None else 0)
    notes = (*_notes_on(probed, reading), *settled.notes)
    return replace(settled, notes=notes, sizes=sizes, transform=transform)


def _notes_on(probed: Sequence[Probed], reading: Reading) -> list[str]:
    """What a sample of the images shows that is read otherwise than one might think."""
    notes = []
    frames = sum(image.has_frames for image in probed)
    if frames:
        notes.append(f"Of images with several frames the first is read ({frames} of {len(probed)} sampled).")
    see_through = sum(image.is_transparent for image in probed)
    if see_through:
        colour = "white" if reading.background == WHITE else f"{reading.background}"
        notes.append(f"Transparent images are read over {colour} ({see_through} of {len(probed)} sampled).")
    deep = sum(image.is_deep for image in probed)
    if deep:
        known = "the range of its type" if reading.image_range is None else "{:g} to {:g}".format(*reading.image_range)
        notes.append(f"Images of more than 8 bits are read by {known} ({deep} of {len(probed)} sampled).")
    return notes


def _decode_if_small(
    files: Mapping[str, EncodedImages],
    num_channels: int,
    size: tuple[int, int] | None,
    image_size: tuple[int, int] | None,
    limit_bytes: int,
) -> _Settled:
    if num_channels == 1 and any(images.has_colour() for images in files.values()):  # among those not probed, too
        num_channels = 3
    files = {part: images.read_as(replace(images.reading, num_channels=num_channels)) for part, images in files.items()}
    num_values = sum(len(images) for images in files.values()) * num_channels
    wanted = [each for each in (size, image_size) if each is not None]
    fitting = [each for each in wanted if num_values * each[0] * each[1] <= limit_bytes]
    kept = {part: images for part, images in files.items() if isinstance(images, FileImages)}
    if not fitting or len(kept) < len(files):
        return _Settled(files, num_channels, size, notes=("Images are decoded while training.",))
    stored = fitting[0]
    decoded = {part: images.decode(stored) for part, images in kept.items()}
    if stored == size and not all(alike for _, alike in decoded.values()):
        # The few images probed were alike but others are not: take the set for mixed.
        return _decode_if_small(files, num_channels, None, image_size, limit_bytes)
    notes = () if stored == size else (f"Images are stored at {stored[0]}x{stored[1]} pixels.",)
    return _Settled({part: images for part, (images, _) in decoded.items()}, num_channels, size, notes)


def _statistics(
    train: ImageSet, num_channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...], list[str]]:
    """The mean and standard deviation asked for, or those of the training part, or ImageNet's; and what to say."""
    if (mean is None) != (std is None):
        raise DataError("mean and std go together: give both, or neither.")
    if mean is None or std is None:
        if isinstance(train, InMemoryImages):
            return *_measured(train.images), []
        return *_IMAGENET[num_channels], [_BY_IMAGENET]
    used = _checked_statistics(num_channels, mean, std)
    return *used, [f"Normalised by mean {_rounded_figures(used[0])} and std {_rounded_figures(used[1])}."]


_BY_IMAGENET = "Normalised by the mean and std of ImageNet; data.mean and data.std set others."


def _checked_statistics(
    num_channels: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = (tuple(values) * (num_channels if len(values) == 1 else 1) for values in (mean, std))
    if not len(mean) == len(std) == num_channels:
        raise DataError(f"The images have {num_channels} channels, got mean {tuple(mean)} and std {tuple(std)}.")
    if not all(map(math.isfinite, (*mean, *std))):
        raise DataError(f"mean and std must be finite, got {tuple(mean)} and {tuple(std)}.")
    if min(std) <= 0:
        raise DataError(f"{arg('std')} must be above 0, got {tuple(std)}.")
    return mean, std


def _rounded_figures(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


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


@final
@dataclass(eq=False, kw_only=True)
class Batches:
    """Batches of an image set, ready for the step.

    Attributes:
        images: one part of a data set.
        batch_size: images a batch.
        image_size: (H, W) that the model takes, in pixels.
        info: of the data set; mean, std and the number of classes are used.
        device: where the batches are made and wanted.
        augment: for training, or None for evaluation: every image, in order, resized and normalised only.
        seed: of order and augmentation.
        drop_last: leave out a last batch that is not full; in training only.
        num_workers: processes that decode images which are not in memory.
        shard: (number, of how many) replicas that share the images out without overlap: in training each takes a
            part of every batch, in evaluation every so many-th batch.
        transform: what each image goes through, by name; by default it is resized as ``info.fit`` says.
        resizing: ``interpolation`` and ``crop`` of the transform, where they are set.
        draws_alike: in training, draw classes alike often, with replacement.

    Raises:
        DataError: for a batch that is larger than the images are many, where that would leave no batch; or a label that
            means no class (nor may one be ignored: accuracies count every image).
    """

    images: ImageSet
    batch_size: int
    image_size: tuple[int, int]
    info: DataInfo
    device: torch.device
    augment: Augment | None
    seed: int
    drop_last: bool = True
    num_workers: int = 0
    shard: tuple[int, int] = (0, 1)
    transform: str | None = None
    resizing: Mapping[str, Any] = field(default_factory=dict)
    draws_alike: bool = False

    def __post_init__(self) -> None:
        """Check what can't be, and what images go through."""
        info, batch_size, replicas = self.info, self.batch_size, self.shard[1]
        if batch_size < 1:
            raise DataError(f"{arg('batch_size')} must be 1 or more, got {batch_size}.")
        if self.num_workers < 0:
            raise DataError(f"{arg('num_workers')} must be 0 or more, got {self.num_workers}.")
        if self.images.knows_labels:
            _check_range("set that batches are made of", self.images.labels, info.num_classes)
        self.input = ModelInput(
            size=self.image_size, mean=info.mean, std=info.std, fit=info.fit, background=info.background
        )
        prepared, training = None, self.augment is not None
        if self.transform is not None:
            prepared = Prepared(self.transform, self.image_size, training=training, resizing=self.resizing)
            prepared.try_on(info.num_channels)
        self.wanted = Wanted(
            image_size=self.image_size,
            device=self.device,
            num_workers=self.num_workers,
            prepared=prepared,
            may_be_empty=not training,
        )
        if training and batch_size % replicas:
            raise DataError(
                f"{arg('batch_size', batch_size)} can't be shared out among {replicas} replicas; take a multiple of "
                f"{replicas}."
            )
        if self._num_batches == 0:
            raise DataError(
                f"{arg('batch_size', batch_size)} leaves no full batch of {len(self.images)} images: choose a smaller "
                "one."
            )

    def plain(self, images: ImageSet, batch_size: int) -> Batches:
        """Batches of other images of the set, in order and not augmented."""
        return replace(self, images=images, batch_size=batch_size, augment=None)

    def __len__(self) -> int:
        number, replicas = self.shard
        return self._num_batches if self.augment is not None else len(range(number, self._num_batches, replicas))

    @property
    def _num_batches(self) -> int:
        """Batches of all replicas together."""
        full, rest = divmod(len(self.images), self.batch_size)
        drops = self.drop_last and self.augment is not None
        return full if drops or not rest else full + 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[LocalBatch]:
        """Make the batches of one epoch, all of them on the device.

        Images are float32 [B, C, H, W], normalised; labels int64 [B], or float32 [B, K] where augmentation makes them
        soft; targets int64 [B], the class indices, whatever was mixed into the images.

        Args:
            epoch: counted from 0; each has its own order and draws.
            start: index of the first batch wanted: those from it on are the same as if those before had been made too.
        """
        indices = self._batches(epoch)[start : len(self)]
        number, replicas = self.shard
        shard = () if replicas == 1 else (number,)
        seeds = [derive_seed(self.seed, "batch", epoch, index, *shard) for index in range(start, start + len(indices))]
        own = self.images if self.augment is None else self.images.in_epoch(derive_seed(self.seed, "order", epoch))
        read = own.read(indices, self.wanted, seeds)
        if self.augment is None:  # in evaluation a batch of which nothing can be read is left out
            yield from (LocalBatch(self.input.of(images), targets, counts_all=True) for images, targets in read)
            return
        for seed, (images, targets) in zip(seeds, read, strict=True):
            floats, labels = augment_batch(
                images, targets, self.input, augment=self.augment, num_classes=self.info.num_classes, seed=seed
            )
            yield LocalBatch(floats, labels, targets=targets, counts_all=True)

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Indices of the images of each batch."""
        batches = torch.split(self._order(epoch), self.batch_size)
        number, replicas = self.shard
        if self.augment is None:
            return batches[number::replicas]
        return [batch.tensor_split(replicas)[number] for batch in batches]

    def _order(self, epoch: int) -> Tensor:
        if self.augment is None or not self.images.knows_labels:
            return torch.arange(len(self.images))
        generator = generator_for(self.seed, "order", epoch)
        if self.draws_alike:
            return draw_alike(self.images.labels, generator)
        return torch.randperm(len(self.images), generator=generator)


def draw_alike(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many images as there are, with replacement: every class alike often, but for one; in random order.

    Args:
        labels: int64 [N].
        generator: draws.

    Returns:
        int64 [N], indices.
    """
    by_class, counts = labels.argsort(stable=True), torch.bincount(labels)
    present = counts.nonzero().squeeze(1)
    present = present[torch.randperm(len(present), generator=generator)]  # whose turn it is to be drawn once more
    classes = present[torch.randperm(len(labels), generator=generator) % len(present)]
    shares = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    place = (shares * counts[classes]).long()
    return by_class[(counts.cumsum(0) - counts)[classes] + place]


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights of classes, inverse to their number of images: float32 [K], with mean 1 over the images.

    One without images has 0. It is also how often an image is drawn in an epoch by `draw_alike`, on average.
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    share = len(labels) / counts.count_nonzero()
    return torch.where(counts > 0, share / counts.clamp(min=1), 0.0).float()
