"""Classifying images: what is found by a name, what is written, and that it is what the plain model says."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from helpers import MICRO, assert_refused
from localgrad import run
from localgrad.app import using_runs
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import DataError
from localgrad.training.image_sets import Skipped
from localgrad.training.prediction import images_named

if TYPE_CHECKING:
    from helpers import Cli

CLASSES = ("a, b", 'c "d"', "e\nf")
SIZE = 16


def noise(path: Path, seed: int, size: tuple[int, int] = (24, 40), **saving: Any) -> Path:
    """An image of its own; size is (H, W)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **saving)
    return path


def trained(folder: Path, data: Path, **changes: Any) -> Path:
    """A run of one epoch."""
    settings = {"data": {"name": str(data), "val_fraction": 0}, "training.epochs": 1, "execution.sinks": [], **changes}
    run.train(Recipe.from_dict(overlay(MICRO, settings)), out=folder)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on colour photos, as they are and through a transform; and some more photos."""
    root = tmp_path_factory.mktemp("prediction")
    for number in range(24):
        noise(root / "set" / CLASSES[number % 3] / f"{number}.png", number)
    for number in range(5):
        noise(root / "new" / ("x" if number % 2 else "y") / f"{number}.png", 100 + number)
    trained(root / "plain", root / "set", **{"data.mean": [0.4], "data.std": [0.3], "data.transform": "none"})
    own = {"data.transform": "imagenet", "data.interpolation": "bilinear", "data.crop": 0.8}
    trained(root / "transformed", root / "set", **own)
    return root


def plain_model(folder: Path) -> torch.nn.Module:
    options = {"embed_dim": 8, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=8, num_classes=3, **options)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def shares_by_hand(folder: Path, path: Path, transform: Callable[[Image.Image], torch.Tensor]) -> dict[str, float]:
    """What the saved weights say of an image, by timm, torchvision and Pillow alone."""
    info = json.loads((folder / "data.json").read_text())
    pixels = transform(Image.open(path).convert("RGB"))
    images = tv.normalize(pixels, info["mean"], info["std"])[None]
    with torch.no_grad():
        shares = plain_model(folder)(images).softmax(1)[0]
    return dict(zip(info["class_names"], shares.tolist(), strict=True))


def test_the_preprocessing_is_that_of_the_run(here: Path) -> None:
    """Cut to the model's shape and resized; or as timm evaluates, of which pixels differ by their rounding."""
    square = v2.Compose([v2.PILToTensor(), v2.CenterCrop(24), v2.Resize(SIZE, v2.InterpolationMode.BICUBIC), scaled])
    timms = create_transform((3, SIZE, SIZE), interpolation="bilinear", crop_pct=0.8, mean=(0, 0, 0), std=(1, 1, 1))
    for folder, transform, close in (("plain", square, 1e-6), ("transformed", timms, 2e-3)):
        found = list(using_runs.predict(here / folder, here / "new", top=3))
        assert len(found) == 5
        for each in found:
            assert dict(each.classes) == pytest.approx(shares_by_hand(here / folder, each.path, transform), abs=close)
            assert list(each.classes) == sorted(each.classes, key=lambda named: -named[1])


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 255


def test_batches_change_no_printed_probability(here: Path) -> None:
    one, many = (
        {each.path: each.classes for each in using_runs.predict(here / "plain", here / "set", top=9, batch_size=size)}
        for size in (1, 7)
    )
    assert one.keys() == many.keys()
    assert len(one) == 24
    for path, classes in one.items():
        assert [f"{name} {share:.1%}" for name, share in classes] == [f"{n} {share:.1%}" for n, share in many[path]]
        assert dict(classes) == pytest.approx(dict(many[path]), abs=1e-6)


def test_memory_that_runs_out_halves_a_batch(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def shares(self: Any, images: list[torch.Tensor]) -> torch.Tensor:
        seen.append(self.batch_size)
        if self.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor([[0.5, 0.3, 0.2]]).expand(len(images), 3)

    monkeypatch.setattr(using_runs._Classifier, "_shares", shares)
    with pytest.warns(match="memory ran out in prediction; going on with 2 images at a time"):
        assert len(list(using_runs.predict(here / "plain", here / "new", batch_size=4))) == 5
    assert seen == [4, 2, 2]


# Files -------------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_have_all_digits_and_what_was_left_out(here: Path, cli_: Cli, tmp_path: Path) -> None:
    folder = tmp_path / 'im, "ages"\n1'
    good = [noise(folder / name, number) for number, name in enumerate(("a,b.png", 'c"d\n.png', "sub.png/e.jpg"))]
    broken = folder / "broken.png"
    broken.write_bytes(good[0].read_bytes()[:90])
    (folder / "notes.txt").write_text("hello")
    bytes_name = os.fsencode(folder) + b"/\xff.png"
    Path(os.fsdecode(bytes_name)).write_bytes(good[0].read_bytes())
    said = cli_("predict", str(here / "plain"), str(folder), "--top", "9", "--csv", str(tmp_path / "out.csv"),
                "--json", str(tmp_path / "out.json"))  # fmt: skip
    assert said.code == 1, said.err
    assert said.err.splitlines()[-2:] == ["passed over: 1 .txt", "1 of 5 images are left out"]
    assert said.err.startswith("left out: ") and "broken.png (corrupt: " in said.err
    assert said.out.splitlines() == [
        f"written: {tmp_path}/out.{kind} (4 images, 1 left out)" for kind in ("csv", "json")
    ]

    rows, listed = rows_of(tmp_path / "out.csv"), json.loads((tmp_path / "out.json").read_text())
    columns = ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3", "error"]
    assert list(rows[0]) == list(listed[0]) == columns
    assert [{key: "" if value is None else str(value) for key, value in each.items()} for each in listed] == [
        {key: value.replace("\\udcff", "\udcff") for key, value in row.items()} for row in rows
    ]
    found = list(using_runs.predict(here / "plain", folder, top=9))
    assert [each["path"] for each in listed] == [str(each.path) for each in found]
    assert {os.fsencode(each["path"]) for each in listed} == {*map(os.fsencode, good), os.fsencode(broken), bytes_name}
    for row, each in zip(listed, found, strict=True):
        assert row["error"] == each.error
        if each.error is None:
            named = [(row[f"class{n}"], row[f"probability{n}"]) for n in ("", "_2", "_3")]
            assert named == list(each.classes)
            assert torch.tensor([share for _, share in named]).double().tolist() == [share for _, share in named]
    assert [row["path"] for row in rows if row["error"]] == [str(broken)]
    assert sorted(each.name for each in tmp_path.glob(".*")) == [], "no temporary file is left"


def test_columns_follow_top_alone(here: Path, cli_: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")
    (tmp_path / "a.png").write_bytes(b"no image")
    said = cli_("predict", str(here / "plain"), str(tmp_path / "a.png"), "--top", "1", "--csv", str(out))
    assert said.code == 1
    [row] = rows_of(out)
    assert row == {"path": str(tmp_path / "a.png"), "class": "", "probability": "", "error": "no image by its content"}
    said = cli_("predict", str(here / "plain"), str(here / "new" / "x"), "--csv", "/dev/stdout", "--top", "1")
    assert said.code == 0, said.err
    assert said.out.startswith("path,class,probability,error\n")


def test_files_that_cannot_be_written_are_refused_before_any_work(
    here: Path, cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(tmp_path / "a.png", 0)
    monkeypatch.setattr(using_runs, "predict", lambda *_, **__: pytest.fail("it has begun"))
    words = ("predict", str(here / "plain"), str(image))
    assert_refused(cli_(*words, "--csv", str(tmp_path / "gone/out.csv")), "--csv: there is no folder")
    assert_refused(cli_(*words, "--csv", "-"), "--csv -: name a file; of a pipe, --csv /dev/stdout")
    assert_refused(cli_(*words, "--json", str(tmp_path)), "--json:", "is a folder; name a file in it")
    assert_refused(cli_(*words, "--csv", str(image)), "--csv:", "a.png' is an image; name another file")
    both = (str(tmp_path / "out"), str(tmp_path / "x/../out"))
    (tmp_path / "x").mkdir()
    assert_refused(cli_(*words, "--csv", both[0], "--json", both[1]), "--json:", "is that of --csv as well")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    (tmp_path / "old.csv").write_text("")
    for name in ("new.csv", "old.csv"):
        assert_refused(cli_(*words, "--csv", str(tmp_path / name)), "--csv:", "can't be written")


def test_what_was_there_stays_where_predicting_ends_early(here: Path, cli_: Cli, tmp_path: Path) -> None:
    noise(tmp_path / "set/a.png", 0)
    (tmp_path / "set/b.png").write_bytes((tmp_path / "set/a.png").read_bytes()[:90])
    (tmp_path / "out.csv").write_text("before")
    words = ("predict", str(here / "plain"), str(tmp_path / "set"), "--csv", str(tmp_path / "out.csv"))
    assert_refused(cli_(*words, "--on-corrupt", "error"), "b.png can't be read", "--on-corrupt skip")
    assert (tmp_path / "out.csv").read_text() == "before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.csv", "set"]


def test_kinds_of_images_are_read_as_in_training(here: Path, tmp_path: Path) -> None:
    """Palette, CMYK, grey, 16 bits, animated, turned by EXIF: each is the same picture; one of unknown range isn't."""
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    picture = Image.fromarray(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png")
    picture.convert("P").save(tmp_path / "b.png")
    Image.merge("CMYK", [Image.new("L", (16, 16), 0)] * 3 + [Image.fromarray(255 - grey)]).save(tmp_path / "c.tif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "d.png")
    picture.save(tmp_path / "e.gif", save_all=True, append_images=[Image.new("L", (16, 16))])
    Image.fromarray(np.rot90(grey)).save(tmp_path / "f.png", exif=exif)
    Image.fromarray(grey.astype(np.float32) * 3).save(tmp_path / "g.tif")
    *alike, unknown = using_runs.predict(here / "plain", tmp_path)
    assert len(alike) == 6
    for each in alike:
        assert dict(each.classes) == pytest.approx(dict(alike[0].classes), abs=1e-6), each.path
    assert unknown.error is not None and unknown.error.endswith("isn't known; give image_range (black, white)")


# What is found -----------------------------------------------------------------------------------------------------


def names(what: list[str], **counts: int) -> list[str]:
    """The images found, and what was passed over."""
    skipped = Skipped()
    found = [str(path) for path in images_named(what, skipped)]
    assert dict(skipped.others) == {key.replace("_", " "): count for key, count in counts.items()}
    return found


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.png", "b[1].png", "d.png/c.png", "d.png/e/f.jpg", ".hidden.png", ".cache/g.png"):
        noise(tmp_path / name, 0, (2, 2))
    (tmp_path / "n.txt").write_text("hello")
    (tmp_path / "d.png" / "e" / "up").symlink_to("..")
    (tmp_path / "d.png" / "here").symlink_to(".")
    (tmp_path / "link.png").symlink_to("a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVERY = ["a.png", "b[1].png", "link.png", "d.png/c.png", "d.png/e/f.jpg"]


def test_files_folders_and_patterns_are_found(tree: Path) -> None:
    assert names(["b[1].png", ".hidden.png"]) == ["b[1].png", ".hidden.png"]
    assert sorted(names(["."], hidden_file=1, hidden_folder=1, **{".txt": 1})) == sorted(EVERY)
    assert names(["d.png", "d.png/c.png", "./a.png", "a.png"], named_twice=2) == [
        "d.png/c.png", "d.png/e/f.jpg", "a.png"]  # fmt: skip
    assert names(["*.png"]) == ["a.png", "b[1].png", "d.png/c.png", "d.png/e/f.jpg", "link.png"]
    assert sorted(names(["**/*.png"])) == sorted(EVERY)
    assert sorted(names(["**/*.jpg"])) == ["d.png/e/f.jpg"]
    assert sorted(names(["**"], hidden_file=1, hidden_folder=1, **{".txt": 1})) == sorted(EVERY)
    assert names(["d.png/**/*.jpg", str(tree / "**" / "f.jpg")], named_twice=1) == ["d.png/e/f.jpg"]
    assert names(["[ab]*"]) == ["a.png", "b[1].png"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("gone.png", "There is no file or folder gone.png: name an image, a folder of images or a pattern."),
        ("", "There is no file or folder : name an image"),
        ("pipe", "pipe is no file: a pipe or a device can't be read again; save the image as a file."),
        ("*.webp", r"Nothing matches '\*.webp': a pattern is written like"),
        ("*.txt", r"There is no image in what matches '\*.txt': looked for what Pillow opens, such as .jpg, .png"),
        ("empty", "There is no image in empty: looked below it for what Pillow opens"),
    ],
)
def test_what_has_no_image_is_refused(tree: Path, what: str, words: str) -> None:
    (tree / "empty").mkdir()
    os.mkfifo(tree / "pipe")
    with pytest.raises(DataError, match=words):
        images_named(["a.png", what], Skipped())
