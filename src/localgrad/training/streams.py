"""Images of a data set that is streamed: read in the order in which they come, and kept nowhere.

A stream (an ``IterableDataset`` of the Hugging Face library) gives its rows one after the other. So nothing is known of
them before: no labels, no place of an image. An epoch is a shuffled stream, its files in another order and its rows
drawn from a buffer, by a seed alone; and to begin in the middle of it, the rows before are read again and dropped. That
takes time, and it is exact: the library's own saved state leaves out what is in the buffer.

Parts are cut off of the beginning, in the stream's own order; what is behind a cut keeps the order of its files, since
another one would move the cut.

Shapes: B batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from localgrad.errors import DataError, arg
from localgrad.training.image_sets import PROBED, Cell, EncodedImages, Skipped, bytes_of
from localgrad.training.images import Missing, Reading
from localgrad.training.settings import OnCorrupt

SHUFFLE_BUFFER = 1000
"""Images that wait, encoded, for their turn; where a recipe says nothing."""
NO_LABEL = -1


@final
@dataclass(eq=False, kw_only=True)
class StreamedImages(EncodedImages):
    """One part of a streamed data set.

    Attributes:
        stream: of rows with an ``image``, encoded, and a ``label``, a whole number or nothing.
        length: images that are read of it.
        name: for messages.
        class_indices: the label that each label of the stream stands for.
        folder: that paths of images start from.
        shuffle_buffer: images that wait for their turn in training.
    """

    stream: Any
    length: int
    name: str
    class_indices: Tensor
    folder: str = ""
    shuffle_buffer: int = SHUFFLE_BUFFER
    reading: Reading = field(default_factory=Reading)
    on_corrupt: OnCorrupt = "error"
    skipped: Skipped = field(default_factory=Skipped)
    first: tuple[list[tuple[str, bytes]], Tensor] | None = None
    knows_labels: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.length

    def subset(self, indices: Tensor) -> StreamedImages:
        """The images at consecutive ``indices``, in the stream's own order."""
        start, length = int(indices[0]) if len(indices) else 0, len(indices)
        assert indices.equal(torch.arange(start, start + length)), "a stream has no places"
        stream = self.stream.skip(start) if start else self.stream
        stream = stream.take(length) if start + length < self.length else stream
        return replace(self, stream=stream, length=length, first=None)

    def as_classes(self, names: Sequence[str], wanted: Sequence[str]) -> StreamedImages:
        """The same with labels, by name, as others number them; one that they lack is no class."""
        indices = [wanted.index(name) if name in wanted else NO_LABEL for name in names]
        return replace(self, class_indices=torch.tensor(indices), first=None)

    def in_epoch(self, seed: int) -> StreamedImages:
        """Shuffled: the files, and the rows of one after the other in a buffer.

        Newer libraries read several files at once, in threads: here their timing must decide nothing.
        """
        shuffle = self.stream.shuffle
        alone = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in signature(shuffle).parameters else {}
        return replace(self, stream=shuffle(seed=seed, buffer_size=self.shuffle_buffer, **alone), first=None)

    def head(self) -> tuple[list[tuple[str, bytes]], Tensor]:
        """Names, bytes and labels (-1 where there is none) of the first images, which are read once."""
        if self.first is None:
            self.first = self._read(list(self.stream.take(min(PROBED, self.length))))
        return self.first

    def has_colour(self) -> bool:
        """None is known but the first ones, which were looked at; a later one is refused when it comes."""
        return False

    def sampled(self) -> Sequence[tuple[str, bytes]]:
        """The first ones."""
        return self.head()[0]

    def requests(self, batches: Sequence[Tensor]) -> Iterator[Any]:
        """The encoded images of each batch themselves, since this process alone reads the stream.

        Raises:
            DataError: it ends too early, or a label is of no class.
        """
        position = int(batches[0][0]) if batches else 0
        rows = iter(self.stream.skip(position) if position else self.stream)
        for indices in batches:
            assert int(indices[0]) == position, "a stream is read in its own order"
            taken = list(itertools.islice(rows, len(indices)))
            position += len(taken)
            if len(taken) < len(indices):
                raise DataError(
                    f"{self.name} ends after {position:,} of {self.length:,} images: say how many there are with "
                    f"{arg('data.num_examples', position)}, or take fewer with {arg('limit')}."
                )
            encoded, labels = self._read(taken)
            if bool((labels < 0).any()):
                place = int((labels < 0).nonzero()[0])
                raise DataError(
                    f"The image {encoded[place][0]} has the label {taken[place]['label']}, which is no class; a stream "
                    "can't be read without such images."
                )
            yield encoded, labels

    def fetch(self, request: Any) -> tuple[Sequence[tuple[str, bytes]], Tensor]:
        """What was read already."""
        encoded, labels = request
        return encoded, labels

    def _read(self, rows: Sequence[Any]) -> tuple[list[tuple[str, bytes]], Tensor]:
        labels = torch.tensor([NO_LABEL if row["label"] is None else row["label"] for row in rows], dtype=torch.int64)
        known = (labels >= 0) & (labels < len(self.class_indices))
        indices = self.class_indices[torch.where(known, labels, 0)]
        return [self._named_bytes(row["image"]) for row in rows], torch.where(known, indices, NO_LABEL)

    def _named_bytes(self, cell: Cell | None) -> tuple[str, bytes]:
        """An image's bytes, and what it is called: alike in every epoch, wherever in the stream it comes."""
        path, encoded = (None, None) if cell is None else (cell["path"], cell["bytes"])
        if encoded is None:
            encoded = b"" if path is None else self._bytes_at(path)
        content = path or f"sha256 {hashlib.sha256(encoded).hexdigest()[:12]}"
        return f"{self.name} ({content})", encoded

    def _bytes_at(self, path: str) -> bytes:
        if "://" not in path:
            return bytes_of(f"{self.folder}/{path}" if self.folder and not path.startswith("/") else path)
        import fsspec  # type: ignore[import-untyped]

        try:
            with fsspec.open(path) as file:
                content: bytes = file.read()
            return content
        except OSError as error:
            return Missing("corrupt", error.strerror or str(error))
