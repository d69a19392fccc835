"""Images and folders as people have them: every row of the table in docs/data.md, and random folders read twice."""

from __future__ import annotations

import dataclasses
import gc
import io
import random
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import data_cases
import slow_reader
from data_cases import COLOUR, KINDS, LABELS, LAYOUTS, Kind, Labels, Layout, array, picture, plant, saved
from helpers import load_named
from localgrad.errors import DataError
from localgrad.training import data, folders, images
from localgrad.training.augment import ModelInput
from localgrad.training.data import Splits
from localgrad.training.image_sets import InMemoryImages, Skipped, Wanted
from localgrad.training.prediction import images_named, load_images_for_prediction
from localgrad.training.settings import DataSettings


@pytest.fixture(autouse=True)
def no_network_and_a_cache_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def by_class(splits: Splits, *parts: str) -> list[tuple[str, bytes]]:
    """(class, pixels) of each image of some parts, sorted."""
    found = []
    for images_ in (getattr(splits, part) for part in parts):
        if images_ is not None:
            assert isinstance(images_, InMemoryImages)
            pixels = images_.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
            names = [splits.info.class_names[label] for label in images_.labels.tolist()]
            found += [(name, each.numpy().tobytes()) for name, each in zip(names, pixels.contiguous(), strict=True)]
    return sorted(found)


# The table ----------------------------------------------------------------------------------------------------------


def test_the_page_and_the_table_are_one() -> None:
    page = data_cases.PAGE.read_text()
    assert data_cases.rewritten(page) == page, "type python tests/data_cases.py"


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.what[:60])
def test_layouts(case: Layout, tmp_path: Path) -> None:
    root = tmp_path / "set"
    plant(root, case.tree)
    options: dict[str, Any] = {key: str(root / value) for key, value in case.options.items()}
    if case.refused:
        with pytest.raises(DataError, match=case.refused) as error:
            load_named(str(root), **options)
        assert "\n" not in str(error.value)
        return
    splits = load_named(str(root), val_fraction=0.25, **options)
    wanted: dict[str, list[tuple[str, bytes]]] = {}
    for split, pattern in case.reads.items():
        level = pattern.split("/").index(next(part for part in pattern.split("/") if "*" in part))
        wanted[split] = sorted(
            (file.relative_to(root).parts[level], Image.open(file).tobytes())
            for file in root.glob(f"{pattern}/**/*.png")
            if not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(root).parts)
        )
    cut = {"train", "val", "test"} - set(case.reads)  # of the training part
    assert by_class(splits, "train", *cut) == wanted["train"]
    for split in case.reads:
        if split != "train":
            assert by_class(splits, split) == wanted[split]
    left_out: dict[str, int] = {}
    for counts in splits.info.skipped.values():
        for reason, count in counts.items():
            left_out[reason] = left_out.get(reason, 0) + count
    assert left_out == case.left_out


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.what)
def test_kinds_of_images(case: Kind, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for index in range(4):
            (tmp_path / folder / f"{index}.tif").write_bytes(case.make())  # the ending says another format
    if case.refused:
        with pytest.raises(DataError, match=case.refused):
            load_named(str(tmp_path), val_fraction=0, **case.options)
        return
    splits = load_named(str(tmp_path), val_fraction=0, **case.options)
    lazy = load_named(str(tmp_path), val_fraction=0, memory_limit_bytes=0, **case.options)
    assert case.pixels is not None
    size = case.pixels.shape[:2]
    for part in (splits.train, lazy.train):
        [(read, _)] = part.read([torch.arange(2)], Wanted(image_size=size, device=torch.device("cpu")))
        pixels = read[1].expand(3, -1, -1).permute(1, 2, 0).int().numpy()
        assert pixels.shape == case.pixels.shape
        assert np.abs(pixels - case.pixels).max() <= case.close
    assert ("several frames" in " ".join(splits.info.notes)) == case.what.startswith("several frames")
    info = splits.info
    of_255 = dataclasses.replace(info, mean=(0.0,) * info.num_channels, std=(1 / 255,) * info.num_channels)
    reading = DataSettings(**case.options)
    paths = images_named([tmp_path], Skipped())
    [(_, image), *_] = load_images_for_prediction(paths, reading, of_255, image_size=size)
    assert np.abs(image.expand(3, -1, -1).permute(1, 2, 0).numpy() - case.pixels).max() <= case.close + 1e-3


def table(path: Path, labels: list[Any], **settings: Any) -> None:
    import datasets

    encoded = [saved(picture(index), "png") for index in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), **settings}) if settings else None
    images_ = [{"bytes": each, "path": None} for each in encoded]
    datasets.Dataset.from_dict({"image": images_, "label": labels}, features=features).to_parquet(str(path))


@pytest.mark.parametrize("case", LABELS, ids=lambda case: case.what)
def test_labels_of_tables(case: Labels, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table(tmp_path / "set" / "train.parquet", list(case.values) * 4)
    table(tmp_path / "set" / "test.parquet", list(case.values)[:2])
    if case.refused:
        with pytest.raises(DataError, match=case.refused):
            load_named(str(tmp_path / "set"), val_fraction=0)
        return
    splits = load_named(str(tmp_path / "set"), val_fraction=0)
    assert splits.info.class_names == case.classes
    plain = [str(int(value) if isinstance(value, float) else value) for value in case.values]
    assert [splits.info.class_names[label] for label in splits.train.labels] == plain * 4
    assert [splits.info.class_names[label] for label in splits.test.labels] == plain[:2]


# 1: pixels ----------------------------------------------------------------------------------------------------------


def pairs(root: Path, encoded: bytes, ending: str = "png", count: int = 4) -> Path:
    """The same image, some times in each of two classes."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.{ending}").write_bytes(encoded)
    return root


def test_one_deep_image_that_wasnt_sampled_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localgrad.training.image_sets.PROBED", 2)
    fine = array(np.full((2, 2), 0.5, np.float32), "tiff")
    pairs(tmp_path / "set", fine, "tiff")
    (tmp_path / "set" / "b" / "1.tiff").write_bytes(array(np.full((2, 2), 5.0, np.float32), "tiff"))
    for limit in (0, 2**30):
        with pytest.raises(DataError, match=r"b/1\.tiff can't be read: .*give image_range"):
            splits = load_named(str(tmp_path / "set"), val_fraction=0, on_corrupt="skip", memory_limit_bytes=limit)
            everything = [torch.arange(len(splits.train)), torch.arange(0)]
            wanted = Wanted(image_size=(2, 2), device=torch.device("cpu"))
            list(splits.train.read(everything[:1], wanted))
            list(splits.test.read([torch.arange(len(splits.test))], wanted))


@pytest.mark.parametrize("limit", [0, 2**30], ids=["decoded while training", "in memory"])
@pytest.mark.parametrize("size", [2, 3], ids=["alike", "of several sizes"])
def test_one_image_of_colour_that_wasnt_sampled_counts(
    limit: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localgrad.training.image_sets.PROBED", 2)
    root = pairs(tmp_path / "set", array(np.zeros((2, 2), np.uint8), "png"))
    (root / "a" / "2.png").write_bytes(array(np.full((size, size, 3), (0, 0, 255), np.uint8), "png"))
    splits = load_named(str(root), val_fraction=0, memory_limit_bytes=limit, image_size=(2, 2))
    assert splits.info.num_channels == 3
    wanted = Wanted(image_size=(2, 2), device=torch.device("cpu"))
    read = [next(part.read([torch.arange(len(part))], wanted))[0] for part in (splits.train, splits.test)]
    assert (torch.cat(read)[:, 2] == 255).all(dim=2).all(dim=1).sum() == 1


def test_grey_images_of_several_sizes_stay_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localgrad.training.image_sets.PROBED", 2)
    root = pairs(tmp_path / "set", array(np.zeros((2, 2), np.uint8), "png"))
    (root / "a" / "2.png").write_bytes(array(np.zeros((3, 3), np.uint8), "png"))
    splits = load_named(str(root), val_fraction=0, image_size=(2, 2))
    assert splits.info.num_channels == 1
    assert "Images are stored at 2x2 pixels." in splits.info.notes


def test_a_range_for_images_of_8_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image_range: no sampled image has more than 8 bits"):
        load_named(str(pairs(tmp_path, array(COLOUR, "png"))), image_range=(0, 4095))
    with pytest.raises(DataError, match="image_range: no sampled image has more than 8 bits"):
        load_named("digits", image_range=(0, 4095))
    with pytest.raises(DataError, match=r"Pillow gives the upper 8 bits, .*image_range=\(0, 65535\)"):
        deep = data_cases.deep_png(COLOUR.astype(np.int64) * 257)
        load_named(str(pairs(tmp_path / "deep", deep)), image_range=(0, 4095))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"background": "blanc"}, "'blanc' is no colour; take white"),
        ({"background": "1,2,999"}, "'1,2,999' is no colour"),
        ({"image_range": (5, 5)}, "the first one smaller"),
        ({"image_range": (0, float("nan"))}, "the first one smaller"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "The images have 1 channels"),
        ({"mean": (0.5,), "std": (float("inf"),)}, "mean and std must be finite"),
        ({"test_data": "x"}, "test_data='x' doesn't go with data='digits': it brings its own parts"),
    ],
)
def test_impossible_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_named("digits", **option)


@pytest.mark.filterwarnings("ignore")  # Pillow's
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "gif", "webp", "bmp"])
def test_damaged_bytes_never_end_in_a_traceback(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sound = saved(Image.fromarray(COLOUR), kind, **({"exif": exif} if kind not in ("gif", "bmp") else {}))
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(sound)
        for spot in rng.integers(0, len(sound), rng.integers(1, 4)):
            damaged[spot] = rng.integers(0, 256)
        try:
            images.probe(bytes(damaged), images.Reading())
        except images.Unreadable as error:
            assert error.reason


def test_damaged_exif_data_leave_the_pixels() -> None:
    sound = saved(Image.fromarray(COLOUR), "png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(images.to_pixels(images.open_image(sound), images.Reading()).permute(1, 2, 0), COLOUR)


def test_grey_over_a_colour_is_colour(tmp_path: Path) -> None:
    see_through = array(np.zeros((2, 2, 2), np.uint8), "png")  # LA
    pairs(tmp_path, see_through)
    assert load_named(str(tmp_path)).info.num_channels == 1
    splits = load_named(str(tmp_path), background="#0000ff")
    assert splits.info.num_channels == 3
    assert splits.train.images[0, :, 0, 0].tolist() == [0, 0, 255]  # type: ignore[attr-defined]
    assert "Transparent images are read over (0, 0, 255) (8 of 8 sampled)." in splits.info.notes


# 2: which folder is what --------------------------------------------------------------------------------------------


def test_names_of_splits() -> None:
    for name, split in {
        "train": "train", "TRAIN": "train", "Training": "train", "seg_train": "train", "train-images": "train",
        "my.val": "val", "valid": "val", "eval": "val", "dev": "val", "Validation_set": "val", "trainset": "train",
        "test": "test", "testing": "test", "cifar10-test": "test",
        "steam train": "train", "trains": None, "untrained": None, "restest": None, "cat": None, "devil": None,
    }.items():  # fmt: skip
        assert folders.split_of(name) == split, name


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    plant(tmp_path / "set", ("cat/*",))
    plant(tmp_path / "far", ("dog/*",))
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "far" / "dog")
    (tmp_path / "set" / "cat" / "again").symlink_to(tmp_path / "set" / "cat")
    (tmp_path / "set" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set" / "self")
    plant(tmp_path / "far", ("one/*", "two/*"))
    (tmp_path / "far" / "one" / "other").symlink_to(tmp_path / "far" / "two")
    (tmp_path / "far" / "two" / "other").symlink_to(tmp_path / "far" / "one")
    (tmp_path / "set" / "eel").symlink_to(tmp_path / "far" / "one")
    splits = load_named(str(tmp_path / "set"), val_fraction=0)
    assert splits.info.class_names == ("cat", "dog", "eel")
    assert splits.info.num_train + splits.info.num_test == 24
    assert splits.info.skipped["train"]["dangling link"] >= 1


def test_a_validation_part_selects_and_is_not_cut(tmp_path: Path) -> None:
    plant(tmp_path, ("train/{cat,dog}/*", "val/{cat,dog}/*", "test/{cat,dog}/*"))
    splits = load_named(str(tmp_path))
    assert (splits.info.num_train, splits.info.num_val, splits.info.num_test) == (12, 12, 12)
    assert "The data set's own validation part selects the best epoch." in splits.info.notes
    without = load_named(str(tmp_path), val_fraction=0)
    assert without.val is None
    assert "The part 'val' is not used: val_fraction is 0, which takes the last epoch." in without.info.notes
    assert torch.equal(load_named(str(tmp_path), seed=5).val.images, splits.val.images)  # type: ignore[union-attr]


def test_the_validation_part_of_a_table_is_for_validation(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "set").mkdir()
    kind = datasets.ClassLabel(names=["cat", "dog"])
    table(tmp_path / "set" / "train.parquet", [0, 1] * 10, label=kind)
    table(tmp_path / "set" / "validation.parquet", [0, 1], label=kind)
    info = load_named(str(tmp_path / "set")).info
    assert (info.num_train, info.num_val, info.num_test) == (16, 2, 4)


# 3: labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_class_names_in_another_order_are_matched_by_name(tmp_path: Path, form: str) -> None:
    import datasets

    names = {"train": ["cat", "dog", "eel"], "test": ["eel", "cat", "dog"]}
    labels = {"train": [0, 1, 2] * 4, "test": [0, 1, 2]}
    (tmp_path / "set").mkdir()
    for part, own in names.items():
        table(tmp_path / "set" / f"{part}.parquet", labels[part], label=datasets.ClassLabel(names=own))
    if form == "saved":
        parts = {
            part: datasets.load_dataset("parquet", data_files=str(tmp_path / "set" / f"{part}.parquet"), split="train")
            for part in names
        }
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    splits = load_named(str(tmp_path / ("saved" if form == "saved" else "set")), val_fraction=0)
    assert [splits.info.class_names[label] for label in splits.test.labels] == ["eel", "cat", "dog"]
    assert [splits.info.class_names[label] for label in splits.train.labels] == ["cat", "dog", "eel"] * 4


def test_shards_with_class_names_of_their_own(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "set").mkdir()
    for shard, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        path = tmp_path / "set" / f"train-0000{shard}-of-00002.parquet"
        table(path, [0, 1] * 5, label=datasets.ClassLabel(names=names))
    splits = load_named(str(tmp_path / "set"), val_fraction=0)
    names = by_class(splits, "train", "test")
    pixel = {saved(picture(index), "png"): index for index in range(10)}
    assert len(pixel) == 10
    for index in range(10):  # the first shard says cat, dog, the second one dog, cat
        raw = np.asarray(picture(index)).tobytes()
        assert sorted(name for name, pixels in names if pixels == raw) == ["cat", "dog"]


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    root = tmp_path / "my set [v2]"
    plant(root, ("{cat,dog}/*",))
    assert load_named(str(root)).info.class_names == ("cat", "dog")
    table(root / "all.parquet", ["cat", "dog"] * 5)
    assert load_named(str(root / "all.parquet"), val_fraction=0).info.num_train == 8
    with pytest.raises(DataError, match="for a pattern: rename the folder, or name single files with train_data"):
        load_named(str(root))


def test_a_table_is_the_second_thing_that_is_tried(tmp_path: Path) -> None:
    plant(tmp_path, ("train/*", "test/*"))
    (tmp_path / "submission.csv").write_text("id,label\n1,0\n")
    with pytest.raises(DataError, match=r"without class folders.*As a table: .* no single column of type Image"):
        load_named(str(tmp_path))
    table(tmp_path / "all.parquet", [-1] * 4)
    with pytest.raises(DataError, match=r"The part 'train' of .* has no labels"):
        load_named(str(tmp_path / "all.parquet"))


def test_a_class_of_a_table_that_isnt_trained_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table(tmp_path / "set" / "train.parquet", ["cat", "dog"] * 4)
    table(tmp_path / "set" / "test.parquet", ["dog", "dogs"])
    with pytest.raises(DataError, match=r"the class 'dogs', which the part train does not have\. Nearest: dog"):
        load_named(str(tmp_path / "set"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves files open
@pytest.mark.parametrize("form", ["csv", "metadata.csv", "metadata.jsonl", "bytes", "struct", "two csv"])
def test_tables_that_name_or_hold_images(tmp_path: Path, form: str) -> None:
    import datasets

    root = tmp_path / "set"
    root.mkdir()
    labels = ["dog", "cat"] * 5
    encoded = [saved(picture(index), "png") for index in range(10)]
    if form in ("bytes", "struct"):
        cells = encoded if form == "bytes" else [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(encoded)]
        datasets.Dataset.from_dict({"img": cells, "label": labels}).to_parquet(str(root / "train.parquet"))
    else:
        (root / "pictures").mkdir()
        for index, each in enumerate(encoded):
            (root / "pictures" / f"{index}.png").write_bytes(each)
        rows = [(f"pictures/{index}.png", label) for index, label in enumerate(labels)]
        lines = {"metadata.jsonl": [f'{{"file_name": "{name}", "label": "{label}"}}' for name, label in rows]}.get(
            form, ["file_name,label" if "meta" in form else "image,label", *(f"{name},{label}" for name, label in rows)]
        )
        if form == "two csv":
            (root / "train.csv").write_text("\n".join(lines[:7]))
            (root / "test.csv").write_text("\n".join([lines[0], *lines[7:]]))
        else:
            (root / ("labels.csv" if form == "csv" else form)).write_text("\n".join(lines))
    splits = load_named(str(root), val_fraction=0)
    assert splits.info.class_names == ("cat", "dog")
    wanted = sorted((label, picture(index).tobytes()) for index, label in enumerate(labels))
    assert by_class(splits, "train", "test") == wanted
    gc.collect()
    if form == "two csv":
        assert splits.info.num_test == 4


# 4 and 5: files -----------------------------------------------------------------------------------------------------


def test_every_format_that_pillow_opens_and_writes(tmp_path: Path) -> None:
    tried = []
    for ending in sorted(images.image_suffixes()):
        kind = Image.registered_extensions()[ending]
        if kind not in Image.SAVE:
            continue
        try:
            encoded = saved(Image.fromarray(np.full((32, 32, 3), 200, np.uint8)), kind)
            Image.open(io.BytesIO(encoded)).load()
        except Exception:
            continue  # not everything that it writes, it reads
        tried.append(ending)
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"x{ending.upper()}").write_bytes(encoded)
    assert {".gif", ".jfif", ".webp", ".bmp", ".tiff", ".ppm", ".png", ".jpg"} <= set(tried)
    splits = load_named(str(tmp_path), val_fraction=0, image_size=(32, 32))
    assert splits.info.num_train + splits.info.num_test == 2 * len(tried)
    assert (by_class(splits, "train")[0][1][0] - 200) in range(-8, 8)


def test_images_are_known_by_content(tmp_path: Path) -> None:
    plant(tmp_path, ("{cat,dog}/*",))
    for index in range(3):
        (tmp_path / "cat" / f"{index}.png").rename(tmp_path / "cat" / f"{index}{('', '.txt', '.0001')[index]}")
    info = load_named(str(tmp_path), val_fraction=0).info
    assert info.num_train + info.num_test == 12
    assert not info.skipped


def test_a_corrupt_image_is_listed_with_its_part(tmp_path: Path) -> None:
    plant(tmp_path, ("train/{cat,dog}/*", "test/{cat,dog}/*"))
    broken = [tmp_path / part / "cat" / "1.png" for part in ("train", "test")]
    for file in broken:
        file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(DataError, match=r"1\.png can't be read"):
        load_named(str(tmp_path))
    splits = load_named(str(tmp_path), val_fraction=0, on_corrupt="skip")
    assert [list(splits.skipped[part].images) for part in ("train", "test")] == [[str(broken[0])], [str(broken[1])]]
    assert splits.info.skipped == {"train": {"corrupt": 1}, "test": {"corrupt": 1}}


def test_a_file_that_may_not_be_read_is_no_empty_one(tmp_path: Path) -> None:
    plant(tmp_path, ("{cat,dog}/*",))
    (tmp_path / "cat" / "0.png").unlink()
    (tmp_path / "cat" / "0.png").mkdir()  # for a test that may run as root: it can't be opened as a file either
    splits = load_named(str(tmp_path), val_fraction=0)
    assert splits.info.num_train + splits.info.num_test == 11
    missing = images.Missing("corrupt", "Permission denied")
    with pytest.raises(images.Unreadable, match="Permission denied"):
        images.open_image(missing)


def test_a_part_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    plant(tmp_path, ("train/{cat,dog}/*", "test/{cat,dog}/*"))
    for file in (tmp_path / "test").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="None of the 12 images tried can be read"):
        load_named(str(tmp_path))


# 6 and 7: normalisation and shape -----------------------------------------------------------------------------------


def test_images_are_brought_to_the_models_shape() -> None:
    wide = torch.arange(2 * 6, dtype=torch.uint8).reshape(1, 2, 6).expand(3, -1, -1).contiguous() * 20

    def fit(images: torch.Tensor, size: tuple[int, int], **others: Any) -> torch.Tensor:
        return ModelInput(size=size, **others).of(images)

    options: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    assert torch.equal(fit(wide, (2, 2), **options), wide[..., 2:4].float())
    squashed = fit(wide, (2, 3), fit="squash", **options)
    assert squashed.shape == (3, 2, 3)
    assert float(squashed[0, 0, 0]) < float(squashed[0, 0, 2])
    padded = fit(wide, (6, 6), fit="pad", background=(9, 8, 7), **options)
    assert torch.equal(padded[:, 2:4], wide.float())
    for channel, value in enumerate((9, 8, 7)):
        assert (padded[channel, :2] == value).all()
        assert (padded[channel, 4:] == value).all()
    grey = fit(wide[:1], (6, 6), fit="pad", background=(255, 0, 0), mean=(0.0,), std=(1 / 255,))
    assert (grey[:, :2] == 76).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_files_and_memory_give_the_same_shape(tmp_path: Path, fit: Any) -> None:
    rng = np.random.default_rng(0)
    pairs(tmp_path, array(rng.integers(0, 256, (4, 9, 3), dtype=np.uint8), "png"))
    seen = []
    for limit in (0, 2**30):
        splits = load_named(str(tmp_path), fit=fit, memory_limit_bytes=limit, mean=(0.5,), std=(0.5,))
        batches = data.Batches(
            images=splits.train, batch_size=2, image_size=(6, 6), info=splits.info, device=torch.device("cpu"),
            augment=None, seed=0,
        )  # fmt: skip
        seen.append(next(batches.epoch(0)).images)
        said = data.note_on_fit(splits, (6, 6))
        assert (said is not None) == (fit == "crop")
    assert torch.equal(seen[0], seen[1])
    assert "56% of their pixels" in (data.note_on_fit(load_named(str(tmp_path)), (6, 6)) or "")


def test_square_images_are_cut_without_a_word(tmp_path: Path) -> None:
    pairs(tmp_path, array(np.zeros((8, 8, 3), np.uint8), "png"))
    assert data.note_on_fit(load_named(str(tmp_path)), (6, 6)) is None


# Random folders, read twice -----------------------------------------------------------------------------------------

MODES = ("L", "RGB", "RGBA", "LA", "P", "P transparent", "1", "16", "F", "16 dark", "F large", "I")
CLASS_NAMES = ("cat", "dog", "Eel", "a b", "train", "test", "val", "0", "ünï")
SPLIT_NAMES = (
    "train",
    "Train",
    "training",
    "val",
    "validation",
    "dev",
    "test",
    "TEST",
    "seg_train",
    "my-test",
    "extra",
)
SETS_OF_SPLITS = (
    *([""], ["train"], ["train", "test"], ["train", "val"], ["train", "validation", "test"], ["Train", "TEST"]),
    *(["training", "dev"], ["seg_train", "my-test"], ["train", "test", "extra"]),
)
WAYS = (*("{split}/{name}",) * 3, "{split}/{split}/{name}", "{name}/{split}", "top/{split}/{name}")
ENDINGS = (".png", ".PNG", ".jpg", ".tif", "", ".dat")


JUNK = (
    *(".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/y.png", "__MACOSX/a/._b.png", "cat/._x.png", ".DS_Store"),
    *("cat/notes.txt", "train/labels.md", "notes.txt", "stray.png", "empty/", "train/empty/", "cat/gone.png", "gone"),
    "linked",
)


@cache
def encoded(mode: str, seed: int) -> bytes:
    """A random image of 2x3 pixels."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, 256, (2, 3), dtype=np.uint8)
    wide = {"RGB": 3, "RGBA": 4, "LA": 2}
    if mode in wide:
        return array(rng.integers(0, 256, (2, 3, wide[mode]), dtype=np.uint8), "png")
    if mode.startswith("P"):
        image = Image.fromarray(grey % 4).convert("P")
        image.putpalette(rng.integers(0, 256, 12).tolist())
        return saved(image, "png", **({"transparency": bytes([0, 128, 255, 9])} if "transparent" in mode else {}))
    if mode == "1":
        return saved(Image.fromarray(grey > 127), "png")
    deep = {
        "L": (grey, "png"),
        "16": (rng.integers(0, 65536, (2, 3)).astype(np.uint16) | 0x8000, "png"),
        "16 dark": (rng.integers(0, 4096, (2, 3)).astype(np.uint16), "png"),
        "F": (rng.random((2, 3)).astype(np.float32), "tiff"),
        "F large": (rng.random((2, 3)).astype(np.float32) * 900 + 2, "tiff"),
        "I": (rng.integers(2, 10**6, (2, 3)).astype(np.int32), "tiff"),
    }
    values, kind = deep[mode]
    return array(values, kind)


@st.composite
def random_folders(draw: st.DrawFn) -> dict[str, bytes | str | None]:
    """Paths to content: bytes, None for an empty folder, a text for a link."""
    tree: dict[str, bytes | str | None] = {}
    classes = draw(st.lists(st.sampled_from(CLASS_NAMES), min_size=2, max_size=3, unique=True))
    any_names = st.lists(st.sampled_from(SPLIT_NAMES), min_size=1, max_size=3, unique=True)
    splits = draw(st.one_of(st.sampled_from(SETS_OF_SPLITS), st.sampled_from(SETS_OF_SPLITS), any_names))
    inside = draw(st.sampled_from(WAYS))
    known = draw(st.integers(0, 3)) > 0  # images whose range is known
    modes = draw(st.lists(st.sampled_from(MODES[:9] if known else MODES), min_size=1, max_size=3))
    damaged, strange, flat = (draw(st.sampled_from((0.0, 0.0, 0.05))) for _ in range(3))
    chance = random.Random(draw(st.integers(0, 2**32)))
    for split in splits:
        for name in classes:
            folder = inside.format(split=split, name=name)
            if chance.random() < flat:  # images without a class folder
                folder = split or name
            for index in range(chance.randint(3, 4)):
                ending = chance.choice(ENDINGS) if chance.random() < 0.2 else ".png"
                content = encoded(chance.choice(modes), chance.randrange(12))
                if chance.random() < damaged:
                    content = content[: chance.randrange(9, len(content) - 1)]
                elif chance.random() < strange:
                    content = chance.choice([b"", b"no image", b"\0" * 40])
                tree[f"{folder}/{name[0]}{index}{ending}".replace("//", "/").lstrip("/")] = content
    for path in draw(st.lists(st.sampled_from(JUNK), max_size=4, unique=True)):
        if path.endswith("/"):
            tree[path] = None
        elif "gone" in path:
            tree[path] = "nowhere"
        elif path == "linked":
            tree[path] = "../far"
        else:
            tree[path] = encoded("RGB", 1) if path.endswith("png") and "._" not in path else b"hello"
    return tree


def grow(root: Path, tree: dict[str, bytes | str | None]) -> None:
    far = root.parent / "far"
    far.mkdir()
    for index in range(3):
        (far / f"{index}.png").write_bytes(encoded("RGB", 900 + index))
    root.mkdir()
    for path, content in tree.items():
        where = root / path
        assert where.is_relative_to(root), path
        where.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            where.mkdir(exist_ok=True)
        elif isinstance(content, str):
            where.symlink_to(content)
        else:
            where.write_bytes(content)


def check(tree: dict[str, bytes | str | None]) -> str:
    """Read a folder twice; what came out."""
    top = Path(tempfile.mkdtemp())
    try:
        root = top / "set"
        grow(root, tree)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged files
            ways = slow_reader.readings(root)
            try:
                splits = load_named(str(root), on_corrupt="skip", val_fraction=0.3)
            except DataError as error:
                assert "\n" not in str(error)
                return refused(str(error), ways)
            assert len(ways) == 1, f"{ways} are read as {splits.info}"
            compare(splits, ways[0])
        return "read"
    finally:
        shutil.rmtree(top)


UNCLEAR = (
    *("two ways", "without class folders", "no training part", "two folders", "two training parts"),
    "no images in class folders",
)


def refused(message: str, ways: list[slow_reader.Reading]) -> str:
    """Whether a refusal has a reason that the slow reader sees, too."""
    if len(ways) != 1:
        assert any(words in message for words in UNCLEAR), message
        return "unclear"
    way = ways[0]
    contents = {
        (split, name): [slow_reader.pixels(file) for file in files]
        for split, own in way.items()
        for name, files in own.items()
    }
    everything = [each for own in contents.values() for each in own]
    damaged = any(isinstance(each, str) for each in everything)
    strange = {name for split, own in way.items() for name in own if split != "train"} - set(way["train"])
    few = len(way["train"]) < 2 or sum(len(files) for files in way["train"].values()) < 3
    reasons = {
        "which the part train does not have": bool(strange),
        "image_range": any(isinstance(each, str) and each == "range" for each in everything)
        or any(isinstance(each, np.ndarray) and each.max() < 16 for each in everything),
        "two or more classes": few or damaged,
        "can be read": damaged,
        "too few to hold out": few,
    }
    assert any(text in message and is_so for text, is_so in reasons.items()), message
    return "refused"


def compare(splits: Splits, way: slow_reader.Reading) -> None:
    """The same images in the same classes and parts."""
    assert set(splits.info.class_names) == set(way["train"])
    cut = {"train", "val", "test"} - set(way)
    for split, own in way.items():
        wanted = []
        for name, files in own.items():
            read = [slow_reader.pixels(file) for file in files]
            wanted += [(name, each) for each in read if not isinstance(each, str)]
        parts = ["train", *cut] if split == "train" else [split]
        found = []
        for part in parts:
            images_ = getattr(splits, part)
            if images_ is None:
                continue
            assert isinstance(images_, InMemoryImages)
            pixels = images_.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).double().numpy()
            found += [
                (splits.info.class_names[k], each) for k, each in zip(images_.labels.tolist(), pixels, strict=True)
            ]
        assert len(found) == len(wanted)
        for name, each in wanted:
            near = [
                index for index, (other, got) in enumerate(found) if other == name and np.abs(got - each).max() <= 1
            ]
            assert near, (split, name, each)
            del found[near[0]]


QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # to make a failing folder smaller takes minutes


@given(random_folders())
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=QUIET, phases=PHASES)
def test_random_folders_are_read_as_a_slow_reader_reads_them(tree: dict[str, bytes | str | None]) -> None:
    check(tree)


@pytest.mark.heavy
@given(random_folders())
@settings(max_examples=2_000, deadline=None, suppress_health_check=QUIET, phases=PHASES)
def test_many_random_folders_are_read_as_a_slow_reader_reads_them(tree: dict[str, bytes | str | None]) -> None:
    check(tree)
