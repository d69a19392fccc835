"""From the bytes of one image file to pixels: uint8, grey or colour, upright, opaque, at 8 bits.

`open_image` lets Pillow decode the first frame and turns it upright, `to_pixels` makes uint8 [C, H, W] of any mode as a
`Reading` says. What can't be read is raised as `Unreadable`, whose kind says what follows: a file that is no image by
its content is left out and counted, a corrupt one ends the run or is left out (``on_corrupt``), and values outside the
range that is known always end it.

How it differs from ``Image.convert``: that keeps the lower 8 bits of 32-bit integers, cuts floats in 0..1 to black, and
drops transparency, so that black on transparent becomes black on black.

Shapes: C channels, H W image.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from localgrad.errors import DataError, arg, reason_of
from localgrad.training.augment import WHITE, resize_to_fit
from localgrad.training.settings import DataSettings, Fit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

Kind = Literal["corrupt", "no image", "range"]

DEEP_TYPES_MAX = 65535
"""Largest value of 16 bits: what is read as white where no range is given."""
FULL_SHARE = 1 / 16
"""Of the range of 16 bits: where no sampled image uses as much, the range is taken for another one (12-bit cameras)."""

_STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # formats that Pillow names and can't decode
_GUESSES = ("IM", "IMT", "IPTC", "MCIDAS", "PCD", "SPIDER", "TGA", "XVTHUMB", "PCX", "DCX", "FLI", "MSP")
"""Formats without a signature worth the name: taken by extension, never by content."""
_SIGNATURES = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\0\0\x01\0", b"8BPS"),
    *(b"qoif", b"\0\0\0\x0cjP", b"P1\n", b"P2\n", b"P3\n", b"P4\n", b"P5\n", b"P6\n"),
)
_DEEP_COLOUR = (b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # formats that may have 16 bits in several channels
_ORIENTATION = 0x0112
_EXIF_KEYS = {"exif", "Raw profile type exif", "Raw profile type xmp", "XML:com.adobe.xmp", "xmp"}
"""Where Pillow's readers keep EXIF data, or an orientation as XMP."""


class Unreadable(Exception):  # noqa: N818  a message between functions; becomes a DataError or a count
    """An image that can't be read.

    Args:
        kind: ``corrupt``, ``no image`` (by its content) or ``range`` (values that need ``image_range``).
        reason: one line.
    """

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Both arguments, for what comes from a worker process."""
        return type(self), (self.kind, self.reason)


@final
class Missing(bytes):
    """No bytes, and why: a kind (``no image`` or ``corrupt``) and a few words."""

    kind: Kind
    reason: str

    def __new__(cls, kind: Kind, reason: str) -> Missing:
        """Made of the reason alone."""
        made = super().__new__(cls)
        made.kind, made.reason = kind, reason
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Both arguments, for what goes to a worker process."""
        return type(self), (self.kind, self.reason)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read.

    Attributes:
        num_channels: 1 or 3, what they are converted to.
        image_range: (black, white) of images of more than 8 bits; by default the range of their type.
        background: (R, G, B) from 0 to 255, what lies behind transparent images.
        fit: how an image of another shape is brought to the one wanted.
    """

    num_channels: int = 3
    image_range: tuple[float, float] | None = None
    background: tuple[int, int, int] = WHITE
    fit: Fit = "crop"

    @classmethod
    def as_set(cls, settings: DataSettings, num_channels: int = 3) -> Reading:
        """As a recipe's data settings say.

        Raises:
            DataError: a colour or a range that is none.
        """
        known, colour = settings.image_range, settings.background
        if known is not None and not -math.inf < known[0] < known[1] < math.inf:
            raise DataError(
                f"{arg('image_range')} is the values of black and of white, the first one smaller, got "
                f"{tuple(known)}; take {arg('image_range', (0, 4095))}, for example."
            )
        background = WHITE if colour is None else parse_colour(colour)
        return cls(num_channels=num_channels, image_range=known, background=background, fit=settings.fit or "crop")

    def to_size(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Bring uint8 [C, h, w] to uint8 [C, H, W]."""
        return resize_to_fit(pixels, size, self.fit, self.background)


def parse_colour(text: str) -> tuple[int, int, int]:
    """Read a colour: a name, ``#rrggbb`` or ``255,255,255``.

    Raises:
        DataError: it is none.
    """
    from PIL import ImageColor

    try:
        if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){2}", text):
            values = [int(part) for part in text.split(",")]
            if max(values) > 255:
                raise ValueError
        else:
            values = list(ImageColor.getrgb(text.strip()))[:3]
    except ValueError:
        raise DataError(
            f"{arg('background')}: {text!r} is no colour; take white, black, '#rrggbb' or 255,255,255."
        ) from None
    return values[0], values[1], values[2]


# ------------------------------------------------------------------------------------------------ what is an image


@cache
def image_suffixes() -> frozenset[str]:
    """Endings, in small letters, of the files that the installed Pillow decodes."""
    from PIL import Image

    _know_all_formats()
    known = Image.registered_extensions().items()
    return frozenset(ending.lower() for ending, kind in known if kind in Image.OPEN and kind not in _STUBS)


def _know_all_formats() -> None:
    """Let Pillow load all its readers, the common ones first, in which order it asks them about each file."""
    from PIL import Image

    Image.preinit()
    Image.init()


@cache
def _signed_formats() -> tuple[str, ...]:
    from PIL import Image

    _know_all_formats()
    return tuple(kind for kind in Image.OPEN if kind not in _STUBS + _GUESSES)


def is_image(path: str, suffix: str) -> bool:
    """Whether a file is an image: by its ending (small letters, with the dot), or else by its content."""
    if suffix in image_suffixes():
        return True
    from PIL import Image

    try:
        if not Path(path).is_file():  # a pipe would wait for ever
            return False
        with Path(path).open("rb") as file:
            head = file.read(16)
            if not head:
                return False
            file.seek(0)
            with Image.open(file, formats=_signed_formats()):
                return True
    except Exception:  # whatever a reader says to bytes that are not its own
        return False


# ----------------------------------------------------------------------------------------------------- decoding


def open_image(encoded: bytes) -> Image.Image:
    """Decode the first frame of an image file, its pixels loaded, turned upright where its EXIF data say so.

    Raises:
        Unreadable: where Pillow makes no image of the bytes.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(encoded, Missing):
        raise Unreadable(encoded.kind, encoded.reason)
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        image.load()
    except UnidentifiedImageError as error:  # whose own text names the buffer in memory
        if encoded.startswith(_SIGNATURES) or encoded[8:12] in (b"WEBP", b"AVIF"):
            raise Unreadable("corrupt", "its header is damaged") from error
        raise Unreadable("no image", "no image by its content" if encoded else "empty") from error
    except Exception as error:  # Pillow's readers say many things to damaged bytes
        raise Unreadable("corrupt", reason_of(error, limit=300)) from error
    try:
        has_exif = not _EXIF_KEYS.isdisjoint(image.info) or hasattr(image, "tag_v2")  # tested first: it is quick
        if not has_exif or image.getexif().get(_ORIENTATION, 1) == 1:
            return image
        upright = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data: the pixels are sound
        return image
    upright.format = image.format  # which says how deep it is
    return upright


def to_pixels(image: Image.Image, reading: Reading) -> Tensor:
    """Convert an image of any mode to grey or colour, opaque, at 8 bits: uint8 [C, H, W].

    Raises:
        Unreadable: for values outside the range that is known.
    """
    if is_deep(image):
        image = _at_8_bits(image, reading)
    if is_transparent(image):
        image = _over(image, reading.background)
    num_channels = reading.num_channels
    try:
        pixels = np.array(image.convert("L" if num_channels == 1 else "RGB"))
    except ValueError as error:
        raise Unreadable("corrupt", f"Pillow makes no colours of its mode {image.mode}") from error
    return torch.from_numpy(pixels.reshape(image.height, image.width, num_channels)).permute(2, 0, 1)


def has_colour(source: str | bytes, background: tuple[int, int, int]) -> bool:
    """Whether the header of a file, given by its path or its bytes, tells of more than grey; a damaged one doesn't."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return num_channels_of(image, background) > 1
    except Exception:  # whatever a reader says to damaged bytes; whoever decodes it tells
        return False


def num_channels_of(image: Image.Image, background: tuple[int, int, int]) -> int:
    """1 where nothing is lost by reading an image as grey, else 3."""
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        grey = not is_transparent(image)
    elif image.mode in ("LA", "La"):
        grey = False
    else:
        return 3
    return 1 if grey or len(set(background)) == 1 else 3


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def is_transparent(image: Image.Image) -> bool:
    """Whether some of an image may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def type_range(image: Image.Image) -> tuple[float, float] | None:
    """The range of a deep image's type, or None where 32 bits could mean anything."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return (0, DEEP_TYPES_MAX) if is_16_bit else None


def _at_8_bits(image: Image.Image, reading: Reading) -> Image.Image:
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise Unreadable("corrupt", "it has values that are no finite numbers")
    known = reading.image_range or type_range(image)
    if known is None:
        if values.min() < 0 or values.max() > 1:
            raise Unreadable(
                "range", f"its values, of 32 bits, go from {values.min():g} to {values.max():g}, and what black is and "
                "what white isn't known"
            )  # fmt: skip
        known = (0, 1)
    low, high = known
    scaled = ((values - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
    see_through = image.info.get("transparency")
    if not isinstance(see_through, int):
        return Image.fromarray(scaled)
    alpha = Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8))
    return Image.merge("LA", (Image.fromarray(scaled), alpha))


def _over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image, seen over a colour."""
    from PIL import Image

    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode == "1":
        image = image.convert("L")  # with its transparent colour, which only greys and colours keep
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


# ------------------------------------------------------------------------------------------------------- probing


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What one sampled image is like.

    Attributes:
        num_channels: 1 or 3.
        size: (H, W) in pixels.
        share: the largest value as a share of the range of 16 bits; None where it isn't read by that range.
        is_deep: whether it has more than 8 bits in one channel.
        is_deep_colour: whether it has 16 bits in several, of which Pillow gives the upper 8.
        has_frames: whether there are frames beside the first.
        is_transparent: whether some of it may be transparent.
    """

    num_channels: int
    size: tuple[int, int]
    share: float | None
    is_deep: bool
    is_deep_colour: bool
    has_frames: bool
    is_transparent: bool


def probe(encoded: bytes, reading: Reading) -> Probed:
    """Learn what an image is like.

    Raises:
        Unreadable: it can't be read as it is to be.
    """
    from PIL import Image

    image = open_image(encoded)
    lazy: Any = Image.open(io.BytesIO(encoded)) if encoded.startswith(_DEEP_COLOUR) else None
    deep = is_deep(image)
    deep_colour = lazy is not None and not deep and any(";16" in str(tile) for tile in lazy.tile)
    if deep:
        to_pixels(image, reading)
    share = None
    if deep and type_range(image):
        share = float(np.asarray(image).max()) / DEEP_TYPES_MAX
    elif deep_colour:
        share = float(np.asarray(image.convert("RGB")).max()) / 255
    return Probed(
        num_channels=num_channels_of(image, reading.background),
        size=(image.height, image.width),
        share=share,
        is_deep=deep,
        is_deep_colour=deep_colour,
        has_frames=bool(getattr(image, "is_animated", False)),
        is_transparent=is_transparent(image),
    )


def check_range(seen: Sequence[Probed], image_range: tuple[float, float] | None) -> None:
    """Refuse a range of values (None is the range of their type) that is surely not the sampled images'.

    Raises:
        DataError: with what to type.
    """
    shares = [image.share for image in seen if image.share is not None]
    dark = bool(shares) and max(shares) < FULL_SHARE
    deep_colour = any(image.is_deep_colour for image in seen)
    if image_range is not None:
        if deep_colour and tuple(image_range) != (0, DEEP_TYPES_MAX):
            raise DataError(
                f"{arg('image_range')}: of colour images of 16 bits Pillow gives the upper 8 bits, so no other range "
                f"can be read; convert them to 8 bits, or read them as they are with {arg('image_range', (0, 65535))}."
            )
        if not deep_colour and not any(image.is_deep for image in seen):
            raise DataError(f"{arg('image_range')}: no sampled image has more than 8 bits; leave it out.")
    elif dark and deep_colour:
        raise DataError(
            f"All {len(shares)} sampled colour images of 16 bits use less than a sixteenth of that range, and Pillow "
            f"gives its upper 8 bits: convert them to 8 bits, or read them nearly black with "
            f"{arg('image_range', (0, 65535))}."
        )
    elif dark:
        top = max(shares) * DEEP_TYPES_MAX
        bits = 12 if top > 255 else 8  # cameras have 12 bits; what has no more than 8 is an image of 8
        raise DataError(
            f"All {len(shares)} sampled images of 16 bits use less than a sixteenth of that range (up to {top:.0f} of "
            f"65535): if {2**bits - 1} is white, type {arg('image_range', (0, 2**bits - 1))}; if they are meant to "
            f"be nearly black, {arg('image_range', (0, 65535))}."
        )
