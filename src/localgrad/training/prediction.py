"""Images to be classified: found by what somebody typed, and made ready as a model is evaluated on them.

What is typed is a file, a folder (searched with all below it) or a pattern, such as ``photos/**/*.jpg``; where a file
of that very name is there, it is meant. Hidden files and folders are found by their own names alone, links to folders
are followed, but not in circles.

Files are decoded ahead in a few threads (Pillow's calls release Python's lock); of a large folder no more is in memory
than those. An image that can't be read is told in its place, and the others follow.

Shapes: C channels, H W image.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from localgrad.errors import DataError, arg
from localgrad.training.augment import ModelInput
from localgrad.training.data import DataInfo, resizing_set
from localgrad.training.folders import images_under, visible_folders, why_left_out
from localgrad.training.image_sets import Skipped, bytes_of, raise_unless_skipped
from localgrad.training.images import Reading, Unreadable, image_suffixes, is_image, open_image, to_pixels
from localgrad.training.settings import DataSettings
from localgrad.training.transforms import NONE, Prepared

_MAX_THREADS = 8
_DEEP = "**"  # in a pattern: any folders, or none


# ----------------------------------------------------------------------------------------------- which images


def images_named(what: Sequence[str | Path], skipped: Skipped) -> list[Path]:
    """The image files that somebody means, each once, in the order they were typed in; those of a folder sorted.

    Args:
        what: files, folders and patterns; files are taken whatever they are.
        skipped: takes what is passed over, by reason: what is no image, and what was there before.

    Raises:
        DataError: one of them is not there, or has no image.
    """
    found: dict[str, Path] = {}
    for each in what:
        for path in _images_meant(str(each), skipped):
            place = os.path.abspath(path)  # noqa: PTH100  # no links are resolved: two names are two images
            skipped.others["named twice"] += place in found
            found.setdefault(place, Path(path))
    skipped.others = +skipped.others
    return list(found.values())


def _images_meant(text: str, skipped: Skipped) -> list[str]:
    path = os.path.expanduser(text) if text.startswith("~") and not os.path.lexists(text) else text  # noqa: PTH111
    if text and os.path.isfile(path):  # noqa: PTH113  # a str, as names may be any bytes
        return [path]
    if text and os.path.isdir(path):  # noqa: PTH112
        found = list(images_under(Path(path), skipped))
        if not found:
            raise DataError(f"There is no image in {text}: looked below it for {_looked_for()}.")
        return found
    if text and os.path.exists(path):  # noqa: PTH110
        raise DataError(f"{text} is no file: a pipe or a device can't be read again; save the image as a file.")
    if not glob.has_magic(path):
        raise DataError(f"There is no file or folder {text}: name an image, a folder of images or a pattern.")
    matches = {os.path.normpath(match) for match in _matches(path)}
    if not matches:
        raise DataError(f"Nothing matches {text!r}: a pattern is written like 'photos/*.jpg' or 'photos/**/*.jpg'.")
    highest = sorted(match for match in matches if matches.isdisjoint(map(str, Path(match).parents)))
    found = [image for match in highest for image in _images_at(match, skipped)]
    if not found:
        raise DataError(f"There is no image in what matches {text!r}: looked for {_looked_for()}.")
    return found


def _looked_for() -> str:
    known = image_suffixes()
    return f"what Pillow opens, such as {', '.join(each for each in ('.jpg', '.png', '.webp') if each in known)}"


def _images_at(match: str, skipped: Skipped) -> Iterator[str]:
    """The images at one match of a pattern, which may be a folder, or no image."""
    suffix = os.path.splitext(match)[1].lower()  # noqa: PTH122
    if os.path.isdir(match):  # noqa: PTH112
        yield from images_under(Path(match), skipped)
    elif is_image(match, suffix):
        yield match
    else:
        skipped.others[why_left_out(match, suffix)] += 1


def _matches(pattern: str) -> Iterator[str]:
    """What matches a pattern, as ``glob`` has it, but that no folder is entered from inside of itself."""
    before, found, after = pattern.partition(f"{_DEEP}{os.sep}")
    if not found and pattern.endswith(_DEEP):
        before, found = pattern.removesuffix(_DEEP), _DEEP
    if not found or not (before or os.sep).endswith(os.sep):  # a**b is but a*b
        yield from glob.glob(pattern)  # noqa: PTH207  # of a str, as names may be any bytes
        return
    for start in glob.glob(before) if before else [""]:  # noqa: PTH207
        if not after:
            yield start or os.curdir  # which is searched with all below it
            continue
        for folder in _folders_below(start):
            yield from _matches(os.path.join(glob.escape(folder), after))  # noqa: PTH118


def _folders_below(start: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """A folder and all visible ones below it."""
    own = os.path.realpath(start or os.curdir)
    if own in above:
        return
    yield start
    for inner in visible_folders(Path(start or os.curdir)):
        yield from _folders_below(os.path.join(start, inner.name), (*above, own))  # noqa: PTH118


# ------------------------------------------------------------------------------------------------ as the model takes


def load_images_for_prediction(
    paths: Sequence[Path], settings: DataSettings, info: DataInfo, *, image_size: tuple[int, int]
) -> Iterator[tuple[Path, Tensor | Unreadable]]:
    """Load images without labels, float32 [C, H, W], as a model is evaluated on them; with their paths.

    Args:
        paths: of image files.
        settings: how images are read, and what they go through. With ``on_corrupt`` of ``skip`` one that can't be read
            comes as `Unreadable`.
        info: of the data that the model was trained on: channels, mean and std.
        image_size: (H, W) that the model takes, in pixels.

    Raises:
        DataError: a transform that can't be; later, at an image that isn't skipped.
    """
    reading = Reading.as_set(settings, info.num_channels)
    name = settings.transform
    transform = None
    if name not in (None, NONE):
        transform = Prepared(str(name), image_size, training=False, resizing=resizing_set(settings))
    to = ModelInput(size=image_size, mean=info.mean, std=info.std, fit=reading.fit, background=reading.background)

    def ready(path: Path, pixels: Tensor | Unreadable) -> Tensor | Unreadable:
        if isinstance(pixels, Unreadable):
            return _unless_it_ends_all(path, pixels, settings, is_alone=len(paths) == 1)
        if transform is None:
            return to.of(pixels)
        try:
            return to.of(transform(pixels, 0))
        except DataError as error:
            raise DataError(f"{error} The image: {path}.") from error

    return ((path, ready(path, pixels)) for path, pixels in _decoded(paths, reading))


def _unless_it_ends_all(path: Path, error: Unreadable, settings: DataSettings, *, is_alone: bool) -> Unreadable:
    """What happened to an image, in words that say what to type, where it is to be told and no more."""
    if settings.on_corrupt == "skip":
        advice = f"; give {arg('image_range')} (black, white)" if error.kind == "range" else ""
        return Unreadable(error.kind, error.reason + advice)
    kept = Unreadable("corrupt", error.reason) if is_alone and error.kind == "no image" else error
    return raise_unless_skipped(str(path), kept, settings.on_corrupt)


def _decoded(paths: Sequence[Path], reading: Reading) -> Iterator[tuple[Path, Tensor | Unreadable]]:
    """Decode files ahead, in order: uint8 [C, h, w] of each, or why not."""

    def decode(path: Path) -> Tensor | Unreadable:
        try:
            return to_pixels(open_image(bytes_of(str(path))), reading)
        except Unreadable as error:
            return error

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    waiting: deque[tuple[Path, Future[Tensor | Unreadable]]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        try:
            for path in paths:
                waiting.append((path, threads.submit(decode, path)))
                if len(waiting) > 2 * num_threads:
                    first, found = waiting.popleft()
                    yield first, found.result()
            while waiting:
                first, found = waiting.popleft()
                yield first, found.result()
        finally:
            for _, rest in waiting:  # whoever asked has stopped
                rest.cancel()
