"""A fingerprint of a data set's content: the same wherever its files lie, another one where an image or a label is.

It is made of what training sees: the classes, every label of every part in order, and the pixels where they are in
memory. Of sets that are decoded while training, which may be too large to be read for this, it takes the encoded bytes
of ``SAMPLE`` images of each part, spread evenly. Of a stream it takes the lengths of its parts, and the first images
with their labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from localgrad.errors import DataError
from localgrad.formats import Json, check_format
from localgrad.training.data import Batches, DataInfo, Splits
from localgrad.training.folder import raw_bytes
from localgrad.training.image_sets import FileImages, ImageSet, InMemoryImages
from localgrad.training.saved import RUN_FORMAT
from localgrad.training.streams import StreamedImages

SAMPLE = 1024
_OF_PLACE = ("name", "notes", "num_skipped", "skipped")
"""What is known of a data set that may change when it is moved."""


def fingerprint_of(data: Splits) -> str:
    """64 hexadecimal digits that tell the content of data sets apart."""
    digest = hashlib.sha256(repr(tuple(map(str, data.info.class_names))).encode("utf-8", "surrogateescape"))
    for images in (data.train, data.val, data.test):
        digest.update(b"none" if images is None else b"part")
        if images is not None:
            _add_part(digest, images)
    return digest.hexdigest()


def identity_of(batches: Batches) -> dict[str, Json]:
    """All that the batches of every epoch are made of, as plain values: what a cache of them has to tell."""
    digest = hashlib.sha256()
    _add_part(digest, batches.images)
    return {
        "images": digest.hexdigest(),
        "num_images": len(batches.images),
        "mean": list(batches.info.mean),
        "std": list(batches.info.std),
        "seed": batches.seed,
        "batch_size": batches.batch_size,
        "image_size": list(batches.image_size),
        "transform": str(batches.transform),
        "resizing": dict(batches.resizing),
        "augment": None if batches.augment is None else asdict(batches.augment),
        "draws_alike": batches.draws_alike,
    }


def _add_part(digest: Any, images: ImageSet) -> None:
    digest.update(raw_bytes(images.labels if images.knows_labels else torch.tensor(len(images))))
    _add_pixels(digest, images)


def _add_pixels(digest: Any, images: ImageSet) -> None:
    if isinstance(images, InMemoryImages):
        digest.update(repr(tuple(images.images.shape)).encode())
        digest.update(raw_bytes(images.images))
    elif isinstance(images, FileImages):
        spread = torch.linspace(0, len(images) - 1, min(SAMPLE, len(images))).long()
        for _, encoded in images.files.encoded(images.rows[spread].tolist()):
            digest.update(hashlib.sha256(encoded).digest())
    elif isinstance(images, StreamedImages):
        first, labels = images.head()
        digest.update(raw_bytes(labels))
        for _, encoded in first:
            digest.update(hashlib.sha256(encoded).digest())


@dataclass(frozen=True)
class DataDescription:
    """What a run knows of its data, as its ``data.json`` holds it.

    Attributes:
        info: all but the images.
        fingerprint: of the images and labels; ``None`` where an older version wrote none.
        image_size: (H, W) that the model is given; ``None`` where an older version didn't write it.
    """

    info: DataInfo
    fingerprint: str | None
    image_size: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Json]:
        """Plain values, side by side."""
        size = None if self.image_size is None else list(self.image_size)
        return {"format": RUN_FORMAT, **asdict(self.info), "image_size": size, "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, values: Any) -> DataDescription:
        """Take up what ``to_dict`` gave, in this version or an older one.

        Raises:
            TypeError: they are no description, or lack something.
            DataError: they are of a newer version.
        """
        check_format("data.json", values.pop("format", 1), RUN_FORMAT, DataError)
        fingerprint, size = values.pop("fingerprint", None), values.pop("image_size")
        if "found_size" not in values:  # what older versions called so: the images as they were found
            values["found_size"], size = size, None
        info = DataInfo(**{key: _with_tuples(value) for key, value in values.items()})
        return cls(info, fingerprint, _with_tuples(size))

    def differences(self, found: DataDescription) -> list[str]:
        """In what other data differ from these, wherever they lie, by key.

        Without a fingerprint here, classes, counts, sizes, mean and standard deviation are compared.
        """
        if self.fingerprint is not None:
            return [] if self.fingerprint == found.fingerprint else ["fingerprint"]
        keys = [each.name for each in fields(DataInfo) if each.name not in _OF_PLACE]
        return [key for key in keys if getattr(self.info, key) != getattr(found.info, key)]


def _with_tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
