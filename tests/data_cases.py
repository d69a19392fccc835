"""What folder layouts, image kinds and labels are read how: one table for the tests and for docs/data.md.

``python tests/data_cases.py`` writes the tables into the page; tests/test_images_and_folders.py reads every row and
holds page and table together.
"""

from __future__ import annotations

import io
import itertools
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
FILES_A_FOLDER = 6

# Layouts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A folder, and what it is read as.

    Attributes:
        tree: paths below the folder; braces are expanded, ``*`` is some images, an empty folder ends in a slash.
        reads: split to the folders of its classes, ``*`` standing for the class; parts that are cut off are absent.
        refused: a pattern of the message, where it isn't read.
        how: in words, for the page.
        options: of ``load_data``, paths below the folder.
        left_out: reason to number, over all splits.
    """

    tree: tuple[str, ...]
    how: str
    reads: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    options: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The tree as text."""
        return ", ".join(f"`{path}`" for path in self.tree) + "".join(
            f" with `--{key.replace('_', '-')} {value or '.'}`" for key, value in self.options.items()
        )


PETS = "{cat,dog}/*"
LAYOUTS = (
    Layout(tree=(PETS,), how="classes; a fifth is held out as test part", reads={"train": "*"}),
    Layout(tree=(f"train/{PETS}",), how="likewise", reads={"train": "train/*"}),
    Layout(
        tree=(f"train/{PETS}", f"test/{PETS}"),
        how="training and test part; validation images are cut from `train`",
        reads={"train": "train/*", "test": "test/*"},
    ),
    Layout(
        tree=(f"train/{PETS}", f"val/{PETS}"),
        how="`val` selects the best epoch; the test part is cut from `train`",
        reads={"train": "train/*", "val": "val/*"},
    ),
    Layout(
        tree=(f"train/{PETS}", f"val/{PETS}", f"test/{PETS}"),
        how="all three as they are called",
        reads={"train": "train/*", "val": "val/*", "test": "test/*"},
    ),
    Layout(
        tree=(f"Train/{PETS}", f"Val/{PETS}", f"Test/{PETS}"),
        how="likewise, in any case",
        reads={"train": "Train/*", "val": "Val/*", "test": "Test/*"},
    ),
    Layout(
        tree=(f"training/{PETS}", f"validation/{PETS}", f"testing/{PETS}"),
        how="likewise; also `valid`, `dev` and `eval` for validation",
        reads={"train": "training/*", "val": "validation/*", "test": "testing/*"},
    ),
    Layout(
        tree=(f"seg_train/seg_train/{PETS}", f"seg_test/seg_test/{PETS}", "seg_pred/seg_pred/*"),
        how="likewise, with something before the name; images without class folders are left out, and said",
        reads={"train": "seg_train/seg_train/*", "test": "seg_test/seg_test/*"},
        left_out={"in a folder without labels": 6},
    ),
    Layout(
        tree=(f"training_set/training_set/{PETS}", f"test_set/test_set/{PETS}"),
        how="likewise, with `set`, `data`, `images` or `split` behind the name",
        reads={"train": "training_set/training_set/*", "test": "test_set/test_set/*"},
    ),
    Layout(
        tree=(f"archive/photos/{PETS}",),
        how="a folder that holds nothing but one folder is opened, and said",
        reads={"train": "archive/photos/*"},
    ),
    Layout(
        tree=("{cat,dog}/{train,test}/*",),
        how="splits inside of each class",
        reads={"train": "*/train", "test": "*/test"},
    ),
    Layout(
        tree=("{bus,car,train}/*",),
        how="three classes: what holds images itself is no split",
        reads={"train": "*"},
    ),
    Layout(
        tree=("train/{train,bus}/*", "test/{train,bus}/*"),
        how="two splits with a class `train`",
        reads={"train": "train/*", "test": "test/*"},
    ),
    Layout(
        tree=(f"train/{PETS}", "test/*"),
        how="`test` has no labels: left out, and said; a test part is cut from `train`",
        reads={"train": "train/*"},
        left_out={"in a folder without labels": 6},
    ),
    Layout(
        tree=(f"train/{PETS}", f"test/{PETS}", "extra/*"),
        how="`extra` is left out, and said: the splits have classes in common",
        reads={"train": "train/*", "test": "test/*"},
        left_out={"in a folder without labels": 6},
    ),
    Layout(
        tree=("bus/*", "car/*", "train/{steam,electric}/*"),
        how="refused with both readings: a class with folders, or a split beside other folders",
        refused=r"two ways\. With the classes 'bus', 'car' and 'train': type train_data=.*: type train_data=",
    ),
    Layout(
        tree=("bus/*", "car/*", "train/{steam,electric}/*"),
        options={"train_data": ""},
        how="three classes, as said",
        reads={"train": "*"},
    ),
    Layout(
        tree=("{first,second}/{train,test}/{cat,dog}/*",),
        how="refused with both readings: two data sets, or two classes",
        refused="two ways. As several data sets: type data=.*first.*type train_data=",
    ),
    Layout(
        tree=("train/*", "test/*"),
        how="refused: splits without labels, or two classes called so",
        refused="'test' and 'train' in .* hold images without class folders.*type train_data=",
    ),
    Layout(
        tree=("{cat,dog,test}/*",),
        how="refused with both readings: a class `test`, or test images without labels",
        refused="two ways.*'cat', 'dog' and 'test': type train_data=.*move 'test' elsewhere",
    ),
    Layout(
        tree=(f"val/{PETS}", f"test/{PETS}"),
        how="refused: no training part",
        refused="no training part, only 'test' and 'val': name one with train_data",
    ),
    Layout(
        tree=(f"train/{PETS}", f"training/{PETS}"),
        how="refused: two training parts",
        refused="two training parts: type train_data=.*train' or train_data=.*training",
    ),
    Layout(
        tree=(f"train/{PETS}", f"valid/{PETS}", f"dev/{PETS}"),
        how="refused: two validation parts",
        refused="two folders for the split val: type val_data=.* or val_data=",
    ),
    Layout(
        tree=(f"a/{PETS}", f"b/{PETS}", f"test/{PETS}"),
        options={"train_data": "a", "val_data": "b"},
        how="the parts that are named, and of the others those with a split's name",
        reads={"train": "a/*", "val": "b/*", "test": "test/*"},
    ),
    Layout(
        tree=(f"train/{PETS}", "test/{cat,eel}/*"),
        how="refused: a class of the test part that isn't trained",
        refused="the class 'eel', which the part train does not have",
    ),
    Layout(
        tree=(PETS, ".ipynb_checkpoints/*", "__MACOSX/cat/*", "cat/.ipynb_checkpoints/*", ".DS_Store", "cat/._0.png"),
        how="hidden files and folders, and `__MACOSX`, are no classes; counted",
        reads={"train": "*"},
        left_out={"hidden folder": 3, "hidden file": 2},
    ),
    Layout(
        tree=(PETS, "metadata.json", "cat/0.json"),
        how="classes: tables beside them are counted",
        reads={"train": "*"},
        left_out={".json": 2},
    ),
    Layout(
        tree=(PETS, "eel/", "cat/notes.txt", "cat/raw.npy", "labels.md"),
        how="an empty class folder is said; what is no image is counted by its ending",
        reads={"train": "[cd]*"},
        left_out={".txt": 1, ".npy": 1, ".md": 1},
    ),
)


def expand(pattern: str) -> list[str]:
    """Expand braces."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        return [pattern]
    return [
        path
        for choice in found.group(1).split(",")
        for path in expand(pattern[: found.start()] + choice + pattern[found.end() :])
    ]


def plant(root: Path, tree: tuple[str, ...]) -> None:
    """Make the folders and files of a tree; each image is of a colour of its own."""
    numbers = itertools.count(1)
    for path in (path for pattern in tree for path in expand(pattern)):
        where = root / path
        if path.endswith("/"):
            where.mkdir(parents=True)
        elif path.endswith("*"):
            where.parent.mkdir(parents=True, exist_ok=True)
            for index in range(FILES_A_FOLDER):
                picture(next(numbers)).save(where.parent / f"{index}.png")
        else:
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_bytes(b"no image")


def picture(number: int) -> Image.Image:
    """A 2x2 image that no other number has."""
    return Image.new("RGB", (2, 2), (number % 256, number // 256, 77))


# Kinds of images ---------------------------------------------------------------------------------------------------

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20 + 7
COLOUR = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
ALPHA = (np.arange(12).reshape(3, 4) * 23).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of image file, and what it is read as.

    Attributes:
        what: in words.
        how: in words.
        make: the file's bytes.
        pixels: uint8 [H, W, 3] that it is read as, or None.
        close: how far values may be off: of formats that lose something.
        refused: a pattern of the message, where it isn't read.
        options: of ``load_data``.
    """

    what: str
    how: str
    make: Callable[[], bytes]
    pixels: np.ndarray | None = None
    close: int = 0
    refused: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    """An image as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def array(values: np.ndarray, kind: str, **settings: Any) -> bytes:
    """An array as an image's bytes."""
    return saved(Image.fromarray(values), kind, **settings)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, [H, W, 2 to 4], which Pillow doesn't write."""
    height, width, channels = values.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rgb(grey: np.ndarray) -> np.ndarray:
    """Grey as colour."""
    return np.repeat(grey[..., None], 3, axis=2)


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Colours seen over a background."""
    share = alpha[..., None] / 255
    return (colour * share + np.array(background) * (1 - share)).round().astype(np.uint8)


def with_frames(kind: str) -> bytes:
    """Two frames, the second of them black."""
    return saved(Image.fromarray(COLOUR), kind, save_all=True, append_images=[Image.new("RGB", (4, 3))])


def turned(kind: str) -> bytes:
    """An image on its side, with the orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(np.rot90(COLOUR)), kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))


def lab(colour: tuple[int, int, int]) -> bytes:
    """An image in LAB."""
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return saved(ImageCms.profileToProfile(Image.new("RGB", (4, 3), colour), *profiles, outputMode="LAB"), "tiff")


def palette(transparent: int | None = None) -> bytes:
    """A palette image of three colours."""
    image = Image.fromarray((np.arange(12) % 3).astype(np.uint8).reshape(3, 4)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return saved(image, "png", **({} if transparent is None else {"transparency": transparent}))


PALETTE = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], dtype=np.uint8)[np.arange(12).reshape(3, 4) % 3]
RGBA = np.dstack([COLOUR, ALPHA])
SMALL = (GREY.astype(np.uint16) * 16).clip(max=4095)


def twelve_bits() -> np.ndarray:
    """What the range 0..4095 makes of the values of a 12-bit camera."""
    return rgb((SMALL * (255 / 4095)).round().astype(np.uint8))


KINDS = (
    Kind(what="8-bit grey", how="as it is", make=lambda: array(GREY, "png"), pixels=rgb(GREY)),
    Kind(what="8-bit colour", how="as it is", make=lambda: array(COLOUR, "png"), pixels=COLOUR),
    Kind(what="JPEG", how="as Pillow decodes it", make=lambda: array(np.full((8, 8), 99, np.uint8), "jpeg"),
         pixels=np.full((8, 8, 3), 99, np.uint8), close=1),
    Kind(what="16-bit grey PNG", how="0 to 65535, so that 257 times an 8-bit image is that image",
         make=lambda: array(GREY.astype(np.uint16) * 257, "png"), pixels=rgb(GREY)),
    Kind(what="16-bit grey TIFF", how="likewise",
         make=lambda: array(GREY.astype(np.uint16) * 257, "tiff"), pixels=rgb(GREY)),
    Kind(what="16-bit PGM", how="likewise", make=lambda: array(GREY.astype(np.uint16) * 257, "ppm"), pixels=rgb(GREY)),
    Kind(what="16-bit colour PNG", how="the upper 8 bits, as Pillow gives them",
         make=lambda: deep_png(COLOUR.astype(np.int64) * 257), pixels=COLOUR),
    Kind(what="16 bits, of which all sampled files use less than a sixteenth (12-bit cameras)",
         how="refused until `--image-range` says what is white", make=lambda: array(SMALL, "png"),
         refused=r"less than a sixteenth.*type image_range=\(0, 4095\)"),
    Kind(what="the same with `--image-range 0,4095`", how="by that range", make=lambda: array(SMALL, "png"),
         options={"image_range": (0, 4095)}, pixels=twelve_bits()),
    Kind(what="16-bit colour, nearly black", how="refused: Pillow gives the upper 8 bits",
         make=lambda: deep_png(COLOUR.astype(np.int64) * 15), refused="upper 8 bits: convert them"),
    Kind(what="32-bit floats from 0 to 1", how="0 is black, 1 is white",
         make=lambda: array((GREY / 255).astype(np.float32), "tiff"), pixels=rgb(GREY)),
    Kind(what="32-bit floats outside of it", how="refused until `--image-range`",
         make=lambda: array(GREY.astype(np.float32), "tiff"), refused="from 7 to 227.*give image_range"),
    Kind(what="the same with `--image-range 0,255`", how="by that range", options={"image_range": (0, 255)},
         make=lambda: array(GREY.astype(np.float32), "tiff"), pixels=rgb(GREY)),
    Kind(what="32-bit integers", how="refused until `--image-range`",
         make=lambda: array(GREY.astype(np.int32), "tiff"), refused="from 7 to 227.*give image_range"),
    Kind(what="32-bit integers with `--image-range 0,255`", how="by that range",
         make=lambda: array(GREY.astype(np.int32), "tiff"), options={"image_range": (0, 255)}, pixels=rgb(GREY)),
    Kind(what="floats that are no numbers", how="corrupt",
         make=lambda: array(np.full((3, 4), np.nan, np.float32), "tiff"),
         refused="no finite numbers.*on_corrupt='skip'"),
    Kind(what="RGBA", how="over white", make=lambda: array(RGBA, "png"), close=1,
         pixels=over(COLOUR, ALPHA, (255, 255, 255))),
    Kind(what="RGBA with `--background black`", how="over black", make=lambda: array(RGBA, "png"), close=1,
         options={"background": "black"}, pixels=over(COLOUR, ALPHA, (0, 0, 0))),
    Kind(what="RGBA with `--background '#ff8000'`", how="over orange", make=lambda: array(RGBA, "png"), close=1,
         options={"background": "#ff8000"}, pixels=over(COLOUR, ALPHA, (255, 128, 0))),
    Kind(what="grey with transparency (LA)", how="over white",
         make=lambda: array(np.dstack([GREY, ALPHA]), "png"), close=1,
         pixels=over(rgb(GREY), ALPHA, (255, 255, 255))),
    Kind(what="a transparent colour of a grey image", how="over white",
         make=lambda: saved(Image.fromarray(GREY), "png", transparency=7),
         pixels=rgb(np.where(GREY == 7, 255, GREY).astype(np.uint8))),
    Kind(what="a transparent value of a 16-bit grey image", how="over white",
         make=lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "png", transparency=7 * 257),
         pixels=rgb(np.where(GREY == 7, 255, GREY).astype(np.uint8))),
    Kind(what="palette", how="its colours", make=palette, pixels=PALETTE),
    Kind(what="palette with transparency", how="over white", make=lambda: palette(1),
         pixels=np.where((np.arange(12).reshape(3, 4) % 3 == 1)[..., None], 255, PALETTE).astype(np.uint8)),
    Kind(what="1 bit", how="black and white", make=lambda: saved(Image.fromarray(GREY > 99), "png"),
         pixels=rgb(np.where(GREY > 99, 255, 0).astype(np.uint8))),
    Kind(what="CMYK", how="as colour, without a profile",
         make=lambda: saved(Image.fromarray(255 - COLOUR).convert("CMYK"), "tiff"),
         pixels=255 - COLOUR),
    Kind(what="LAB", how="as sRGB", make=lambda: lab((90, 120, 60)),
         pixels=np.full((3, 4, 3), (90, 120, 60), np.uint8), close=3),
    Kind(what="several frames (GIF)", how="the first, and said", make=lambda: with_frames("gif"), pixels=COLOUR),
    Kind(what="several frames (TIFF)", how="likewise", make=lambda: with_frames("tiff"), pixels=COLOUR),
    Kind(what="several frames (PNG)", how="likewise", make=lambda: with_frames("png"), pixels=COLOUR),
    *(Kind(what=f"orientation in {kind.upper()}", how="turned upright", make=lambda kind=kind: turned(kind),
           pixels=COLOUR) for kind in ("png", "webp", "tiff")),
)  # fmt: skip

# Labels of tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a table, and the classes that they become.

    Attributes:
        values: of the column, in turn.
        classes: their names in order; empty where they are refused.
        what: in words.
    """

    what: str
    values: tuple[Any, ...]
    classes: tuple[str, ...]
    refused: str = ""


LABELS = (
    Labels(what="0, 1, 2", values=(0, 1, 2), classes=("0", "1", "2")),
    Labels(what="1, 2, 3", values=(3, 1, 2), classes=("1", "2", "3")),
    Labels(what="0 and 90,000", values=(0, 90_000), classes=("0", "90000")),
    Labels(what="-1 and 1", values=(-1, 1), classes=("-1", "1")),
    Labels(what="texts", values=("dog", "cat"), classes=("cat", "dog")),
    Labels(what="booleans", values=(True, False), classes=("False", "True")),
    Labels(what="whole floats", values=(1.0, 2.0), classes=("1", "2")),
    Labels(what="other floats", values=(0.5, 1.0), classes=(), refused="Labels must be classes"),
    Labels(
        what="missing in the training part",
        values=(0, 1, None),
        classes=(),
        refused="a label that is missing",
    ),
)

# The page ----------------------------------------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """The page's tables by their markers."""

    def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
        lines = [head, ("---",) * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    return {
        "layouts": table(("folder", "is read as"), [(case.what, case.how) for case in LAYOUTS]),
        "kinds": table(("image", "is read"), [(case.what, case.how) for case in KINDS]),
        "labels": table(
            ("labels", "classes"),
            [(case.what, ", ".join(f"`{name}`" for name in case.classes) or "refused") for case in LABELS],
        ),
    }


def rewritten(page: str) -> str:
    """The page with its tables as they are here."""
    for name, text in tables().items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        assert rest, f"{PAGE} has no {start!r}"
        page = f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
