"""A fingerprint of a data set's content: the same wherever its files lie, another one where an image or a label is.

It is made of what training sees: the classes, every label of every part in order, and the pixels where they are in
memory. Of sets that are decoded while training, which may be too large to be read for this, it takes the encoded bytes
of ``SAMPLE`` images of each part, spread evenly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from localgrad.training.data import FileImages, ImageSet, InMemoryImages, Splits

SAMPLE = 1024
_OF_PLACE = ("name", "notes", "num_skipped", "skipped")
"""What is known of a data set that may change when it is moved."""


def fingerprint_of(data: Splits) -> str:
    """64 hexadecimal digits that tell the content of data sets apart."""
    digest = hashlib.sha256(repr(tuple(map(str, data.info.class_names))).encode("utf-8", "surrogateescape"))
    for images in (data.train, data.val, data.test):
        digest.update(b"none" if images is None else b"part")
        if images is not None:
            digest.update(raw_bytes(images.labels))
            _add_pixels(digest, images)
    return digest.hexdigest()


def _add_pixels(digest: Any, images: ImageSet) -> None:
    if isinstance(images, InMemoryImages):
        digest.update(repr(tuple(images.images.shape)).encode())
        digest.update(raw_bytes(images.images))
    elif isinstance(images, FileImages):
        spread = torch.linspace(0, len(images) - 1, min(SAMPLE, len(images))).long()
        for _, encoded in images.files.encoded(images.rows[spread].tolist()):
            digest.update(hashlib.sha256(encoded).digest())


def raw_bytes(tensor: Tensor) -> Any:
    """A tensor's values as a buffer of bytes, on the host."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def differences(known: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In what two descriptions of data sets differ, wherever they lie.

    Args:
        known: the values of a run's ``data.json``.
        found: those of the data at hand.

    Returns:
        The keys. Without a fingerprint in ``known`` (older versions wrote none), classes, counts, sizes, mean and
        standard deviation are compared.
    """
    if "fingerprint" in known:
        return [] if known["fingerprint"] == found["fingerprint"] else ["fingerprint"]
    return [key for key, value in known.items() if key not in _OF_PLACE and _as_list(value) != _as_list(found.get(key))]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
