"""Every kind of data set, written small in its own format; batches; and what is wrong with bad input."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import load_named
from localgrad.errors import DataError
from localgrad.training import data, image_sets, images
from localgrad.training.data import Batches
from localgrad.training.prediction import images_named, load_images_for_prediction
from localgrad.training.settings import Augment, DataSettings

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

EVERYTHING = Augment(
    crop_padding=1, flip=True, rand_augment=(2, 9), erasing=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1
)


@pytest.fixture(autouse=True)
def no_network_and_a_cache_of_our_own(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(value: int, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> Image.Image:
    """Noise around a value, so that images can be told apart; size is (H, W)."""
    rng = np.random.default_rng(value)
    channels = (3,) if mode == "RGB" else ()
    return Image.fromarray(rng.integers(0, 256, (*size, *channels), dtype=np.uint8))


def write_folder(root: Path, counts: dict[str, int], **settings: object) -> Path:
    """Write PNGs ROOT/CLASS/N.png; counts maps classes to their number of images."""
    value = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(value := value + 1, **settings).save(root / name / f"{i}.png")
    return root


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def as_read(encoded: bytes, num_channels: int = 3) -> torch.Tensor:
    return images.to_pixels(images.open_image(encoded), images.Reading(num_channels=num_channels))


def write_parquet(path: Path, labels: list[int], *, names: list[str] | None, label: str = "label") -> Path:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            label: datasets.ClassLabel(names=names) if names else datasets.Value("int64"),
        }
    )
    rows = {
        "image": [{"bytes": png(picture(i)), "path": None} for i in range(len(labels))],
        label: labels,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


# ---------------------------------------------------------------------------------------------- splitting


@given(st.lists(st.integers(0, 6), min_size=2, max_size=200), st.floats(0, 1), st.booleans(), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_stratified_choice_is_a_partition_in_proportion(labels, fraction, leave_one, seed):
    labels = torch.tensor(labels)
    wanted = round(fraction * len(labels))
    chosen, others = data.stratified_choice(labels, wanted, leave_one=leave_one, seed=seed)
    assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(len(labels)))
    counts = torch.bincount(labels, minlength=7)
    taken = torch.bincount(labels[chosen], minlength=7)
    if leave_one:
        assert len(chosen) == min(wanted, int((counts - 1).clamp(min=0).sum()))
        assert ((counts - taken)[counts > 0] >= 1).all()
    else:
        assert len(chosen) == wanted
        assert ((taken - counts * wanted / len(labels)).abs() < 1).all()
    again, _ = data.stratified_choice(labels, wanted, leave_one=leave_one, seed=seed)
    assert torch.equal(chosen, again)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 300))
def test_shares_stay_under_their_ceilings_and_add_up(counts, total):
    ceilings = [count // 2 for count in counts]
    shares = data.apportion(counts, total, ceilings)
    assert all(0 <= share <= top for share, top in zip(shares, ceilings, strict=True))
    assert sum(shares) == min(total, sum(ceilings))


def test_the_seed_changes_the_validation_part_and_never_the_test_part():
    first, second = load_named("digits", seed=0), load_named("digits", seed=1)
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.val.images, second.val.images)


# ------------------------------------------------------------------------------------------ sets by their name


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    splits = load_named("digits", val_fraction=0.25)
    info = splits.info
    assert (info.num_train, info.num_val, info.num_test) == (1078, 360, 359)
    assert (info.num_channels, info.found_size, info.num_classes) == (1, (8, 8), 10)
    assert "held out" in info.notes[0]
    together = torch.cat([part.images for part in (splits.train, splits.val, splits.test)]).flatten(1)
    real = torch.from_numpy(load_digits().data * 255 / 16).round().to(torch.uint8)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, real.numpy()))
    pixels = splits.train.images.double() / 255
    assert info.mean == pytest.approx([pixels.mean().item()])
    assert info.std == pytest.approx([pixels.std(correction=0).item()])


def test_no_validation_part_where_none_is_wanted():
    splits = load_named("digits", val_fraction=0)
    assert splits.val is None
    assert splits.info.num_val == 0


def test_limit_takes_training_images_alone():
    everything, few = load_named("digits"), load_named("digits", limit=100)
    assert few.info.num_train == len(few.train) == 100
    assert torch.equal(few.val.images, everything.val.images)
    assert torch.bincount(few.train.labels).tolist() == [10] * 10
    assert "Limited to 100" in few.info.notes[-1]


def write_cifar(root: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    ten = name == "cifar10"
    base = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    base.mkdir(parents=True)
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    labels = [0, 1, 2, 3, 4] * 4
    for file in files:
        content = {
            "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels" if ten else "fine_labels": labels,
        }
        (base / file).write_bytes(pickle.dumps(content))
    names = [f"thing {i}" for i in range(10 if ten else 100)]
    meta = {"label_names" if ten else "fine_label_names": names}
    (base / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize(("name", "num_train", "num_classes"), [("cifar10", 100, 10), ("cifar100", 20, 100)])
def test_cifar_from_its_pickles(tmp_path, monkeypatch, name, num_train, num_classes):
    write_cifar(tmp_path, name)
    # The files are ours, so their checksums can't be those of the published ones: only that check is off.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    splits = load_named(name, root=tmp_path, val_fraction=0)
    assert (splits.info.num_train, splits.info.num_test, splits.info.num_classes) == (num_train, 20, num_classes)
    assert splits.info.class_names[1] == "thing 1"
    first = next((tmp_path).rglob("data_batch_1" if name == "cifar10" else "train"))
    raw = pickle.loads(first.read_bytes())
    assert np.array_equal(splits.train.images[:20].flatten(1).numpy(), raw["data"])
    assert splits.train.labels[:20].tolist() == raw["labels" if name == "cifar10" else "fine_labels"]


def test_svhn_from_its_matrices(tmp_path, monkeypatch):
    import scipy.io

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)  # its own order: H, W, C, N
    labels = np.array([[1 + i % 10] for i in range(20)], dtype=np.uint8)  # 10 stands for the digit 0
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels})
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda _: True)
    splits = load_named("svhn", root=tmp_path, val_fraction=0)
    assert splits.info.class_names == tuple("0123456789")
    assert splits.test.labels[8:11].tolist() == [9, 0, 1]
    assert np.array_equal(splits.test.images[3].numpy(), images[..., 3].transpose(2, 0, 1))


def test_stl10_from_its_binaries(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    base = tmp_path / "stl10_binary"
    base.mkdir()
    names = [f"thing {i}" for i in range(10)]
    (base / "class_names.txt").write_text("\n".join(names))
    (base / "fold_indices.txt").write_text("")
    images = rng.integers(0, 256, (12, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        images.transpose(0, 1, 3, 2).tofile(base / f"{part}_X.bin")  # its own order: columns first
        np.array([1 + i % 10 for i in range(12)], dtype=np.uint8).tofile(base / f"{part}_y.bin")
    monkeypatch.setattr("torchvision.datasets.STL10._check_integrity", lambda _: True)
    splits = load_named("stl10", root=tmp_path, val_fraction=0)
    assert splits.info.class_names == tuple(names)
    assert splits.info.found_size == (96, 96)
    assert splits.train.labels.tolist() == [*range(10), 0, 1]
    assert np.array_equal(splits.train.images.numpy(), images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn"])
def test_missing_files_name_the_root_and_the_way_to_get_them(tmp_path, name):
    with pytest.raises(DataError, match="download=True") as error:
        load_named(name, root=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- image folders


@pytest.mark.parametrize("test_part", ["test", "Testing"])
def test_image_folder_with_parts(tmp_path, test_part):
    write_folder(tmp_path / "train", {"cat": 10, "dog": 10, "eel": 10})
    write_folder(tmp_path / test_part, {"cat": 2, "eel": 3})
    splits = load_named(str(tmp_path), val_fraction=0.1)
    info = splits.info
    assert (info.num_train, info.num_val, info.num_test) == (27, 3, 5)
    assert info.class_names == ("cat", "dog", "eel")
    assert splits.test.labels.tolist() == [0, 0, 2, 2, 2]
    file = next(iter(sorted((tmp_path / test_part / "cat").iterdir())))
    expected = np.asarray(Image.open(file)).transpose(2, 0, 1)
    assert np.array_equal(splits.test.images[0].numpy(), expected)


def test_image_folder_without_parts_gets_a_test_part(tmp_path):
    write_folder(tmp_path, {"cat": 10, "dog": 20}, mode="L")
    splits = load_named(str(tmp_path), val_fraction=0)
    assert torch.bincount(splits.test.labels).tolist() == [2, 4]
    assert splits.info.num_channels == 1
    assert "6 of 30 images are held out" in splits.info.notes[0]
    assert torch.equal(load_named(str(tmp_path), seed=9).test.images, splits.test.images)


def test_a_folder_is_found_below_the_root(tmp_path):
    write_folder(tmp_path / "pets", {"cat": 10, "dog": 10})
    assert load_named("pets", root=tmp_path).info.num_classes == 2


def test_sizes_are_unified_at_the_models(tmp_path):
    write_folder(tmp_path / "a", {"cat": 8}, size=(6, 9))
    write_folder(tmp_path / "b", {"dog": 8}, size=(12, 7))
    for name in ("cat", "dog"):
        next(tmp_path.rglob(name)).rename(tmp_path / name)
    (tmp_path / "a").rmdir()
    (tmp_path / "b").rmdir()
    splits = load_named(str(tmp_path), image_size=(8, 8))
    assert splits.info.found_size is None
    assert splits.train.images.shape[1:] == (3, 8, 8)
    assert "stored at 8x8" in splits.info.notes[-1]
    lazy = load_named(str(tmp_path))
    assert isinstance(lazy.train, data.FileImages)
    assert next(iter(all_batches(lazy, augment=None))).images.shape[1:] == (3, 8, 8)


def test_one_odd_image_among_many_is_noticed_though_it_was_not_probed(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "PROBED", 2)
    write_folder(tmp_path, {"cat": 10, "dog": 10}, mode="L")
    picture(0, (6, 9)).save(tmp_path / "cat" / "5.png")
    splits = load_named(str(tmp_path), image_size=(6, 6))
    assert (splits.info.found_size, splits.info.num_channels) == (None, 3)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 20


@pytest.mark.parametrize("layout", ["nothing", "empty", "no classes", "no images", "empty class", "only train"])
def test_folders_that_are_no_data_set(tmp_path, layout):
    messages = {
        "nothing": "No data set or path is called",
        "empty": "is empty",
        "no classes": "no images in class folders",
        "no images": "no images in class folders",
        "empty class": "two or more classes .* only 'cat'",
        "only train": "no images in class folders of .*photos",
    }
    path = tmp_path / "photos"
    if layout != "nothing":
        path.mkdir()
    if layout == "no classes":
        picture(0).save(path / "0.png")
    if layout == "no images":
        (path / "cat").mkdir()
        (path / "cat" / "notes.txt").write_text("none yet")
    if layout == "empty class":
        write_folder(path, {"cat": 3, "dog": 0})
    if layout == "only train":
        (path / "train").mkdir()
    with pytest.raises(DataError, match=messages[layout]) as error:
        load_named(str(path))
    assert "\n" not in str(error.value)


def test_one_class_is_too_few(tmp_path):
    with pytest.raises(DataError, match=r"two or more classes .* only 'cat'"):
        load_named(str(write_folder(tmp_path, {"cat": 10})))


def test_a_test_part_may_not_have_classes_of_its_own(tmp_path):
    write_folder(tmp_path / "train", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "test", {"cat": 3, "dogs": 3})
    with pytest.raises(DataError, match=r"'dogs', which .*train does not have\. Nearest: dog"):
        load_named(str(tmp_path))


@pytest.mark.parametrize("damage", [60, 40, "flipped"])
@pytest.mark.parametrize("limit_bytes", [0, 2**30])
def test_corrupt_images_are_named_or_counted(tmp_path, damage, limit_bytes):
    write_folder(tmp_path / "train", {"cat": 10, "dog": 10})
    write_folder(tmp_path / "test", {"cat": 2, "dog": 2})
    broken = tmp_path / "train" / "cat" / "3.png"
    encoded = broken.read_bytes()
    flipped = encoded[:60] + bytes(255 - byte for byte in encoded[60:])
    broken.write_bytes(flipped if damage == "flipped" else encoded[:damage])

    def whole_epoch(on_corrupt):
        splits = load_named(
            str(tmp_path), on_corrupt=on_corrupt, val_fraction=0, memory_limit_bytes=limit_bytes, image_size=(6, 6)
        )
        return splits.info, list(all_batches(splits, augment=EVERYTHING, image_size=(6, 6)))

    info, batches = whole_epoch("skip")
    assert sum(len(batch.images) for batch in batches) == 19
    assert (info.num_skipped, info.num_train) == ((1, 19) if limit_bytes else (0, 20))
    with pytest.raises(DataError, match="on_corrupt='skip'") as error:
        whole_epoch("error")
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\0" * 200, None])
@pytest.mark.parametrize("limit_bytes", [0, 2**30])
def test_files_that_are_no_images_are_left_out_and_counted(tmp_path, content, limit_bytes):
    write_folder(tmp_path / "train", {"cat": 10, "dog": 10})
    write_folder(tmp_path / "test", {"cat": 2, "dog": 2})
    strange = tmp_path / "train" / "cat" / "3.png"
    strange.unlink()
    if content is None:
        strange.symlink_to(tmp_path / "gone.png")
    else:
        strange.write_bytes(content)
    splits = load_named(str(tmp_path), val_fraction=0, memory_limit_bytes=limit_bytes, image_size=(6, 6))
    batches = list(all_batches(splits, augment=None, image_size=(6, 6)))
    assert sum(len(batch.images) for batch in batches) == splits.num_read("train") == 19
    reason = {None: "dangling link", b"": "empty"}.get(content, "no image by its content")
    assert splits.skipped["train"].images == {str(strange): reason}
    assert splits.skipped["train"].counts() == {reason: 1}
    assert splits.info.num_skipped == (1 if limit_bytes else 0)


def test_images_come_upright_and_of_every_mode(tmp_path):
    turned = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "png", exif=exif)
    assert as_read(buffer.getvalue()).shape == (3, 4, 2)
    deep = Image.fromarray(np.full((2, 2), 40000, dtype=np.uint16))
    assert (as_read(png(deep), 1) == 40000 >> 8).all()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        assert as_read(png(Image.new(mode, (3, 2)))).shape == (3, 2, 3)
    see_through = Image.new("P", (3, 2))
    see_through.info["transparency"] = b"\x00\x80"
    assert images.to_pixels(see_through, images.Reading()).shape == (3, 2, 3)


# ---------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("label", ["label", "fine_label", "labels", "species"])
def test_parquet_folder_with_parts(tmp_path, label):
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", [0, 1] * 10, names=["cat", "dog"], label=label)
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", [1, 0, 1], names=["cat", "dog"], label=label)
    splits = load_named(str(tmp_path / "set"), val_fraction=0)
    assert (splits.info.class_names, splits.info.num_train) == (("cat", "dog"), 20)
    assert splits.test.labels.tolist() == [1, 0, 1]
    assert np.array_equal(splits.test.images[2].numpy(), np.asarray(picture(2)).transpose(2, 0, 1))


def test_a_single_parquet_file_with_plain_numbers_as_labels(tmp_path):
    splits = load_named(str(write_parquet(tmp_path / "all.parquet", [0, 1, 2] * 10, names=None)), val_fraction=0)
    assert splits.info.class_names == ("0", "1", "2")
    assert splits.info.num_test == 6


def test_a_data_set_saved_to_disk(tmp_path):
    import datasets

    file = write_parquet(tmp_path / "all.parquet", [0, 1] * 10, names=["cat", "dog"])
    loaded = datasets.load_dataset("parquet", data_files=str(file))
    loaded.save_to_disk(tmp_path / "saved")
    assert load_named(str(tmp_path / "saved")).info.class_names == ("cat", "dog")


def test_a_test_part_without_labels_is_left_out(tmp_path):
    for part, labels in {"train": [0, 1] * 5, "validation": [0, 1], "test": [-1, -1]}.items():
        write_parquet(tmp_path / "set" / f"{part}.parquet", labels, names=["cat", "dog"])
    splits = load_named(str(tmp_path / "set"))
    assert splits.val.labels.tolist() == [0, 1]
    assert (splits.info.num_train, splits.info.num_test) == (8, 2)
    assert "The part 'test' is not used: its images have no labels." in splits.info.notes


@pytest.mark.parametrize("label", [2, -1])
def test_labels_outside_their_classes(tmp_path, label):
    import datasets

    write_parquet(tmp_path / "a.parquet", [0, 1, 1, label], names=None)
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train")
    # ClassLabel itself lets no such number in when a table is written, so it is declared afterwards.
    schema = rows.data.table.replace_schema_metadata(
        datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        ).arrow_schema.metadata
    )
    import pyarrow.parquet

    pyarrow.parquet.write_table(schema, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=rf"from 0 to 1 \(2 classes\), got {label} for image 3 of the part 'train'"):
        load_named(str(tmp_path / "b.parquet"))


def test_tables_without_the_columns_wanted(tmp_path):
    (tmp_path / "a.csv").write_text("height,width\n1,2\n")
    with pytest.raises(DataError, match=r"no single column of type Image: its columns are height \(Value\), width"):
        load_named(str(tmp_path / "a.csv"))
    write_parquet(tmp_path / "b.parquet", [0, 1], names=None, label="species")
    with pytest.raises(DataError, match=r"no single label column .* image \(Image\), species \(Value\)"):
        load_named(str(tmp_path / "b.parquet"))


def test_a_table_without_rows(tmp_path):
    with pytest.raises(DataError, match="corresponds to no data"):
        load_named(str(write_parquet(tmp_path / "a.parquet", [], names=["cat", "dog"])))


def test_files_that_are_no_data_set(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"\.parquet"):
        load_named(str(tmp_path / "notes.txt"))
    (tmp_path / "broken.parquet").write_bytes(b"hello")
    with pytest.raises(DataError, match="Hugging Face library can't load it") as error:
        load_named(str(tmp_path / "broken.parquet"))
    assert "\n" not in str(error.value)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(DataError, match=r"'cifra10'.*Nearest: cifar10"):
        load_named("cifra10")
    with pytest.raises(DataError, match=r"not one of digits, .* Hugging Face library can't load it") as error:
        load_named("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_missing_folder_beside_others_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="no file or folder photos/cats"):
        load_named("photos/cats")


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_the_real_images_beside_the_repository(name, num_classes):
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"{SHARED_DATA / name} is not on this machine")
    info = load_named(str(SHARED_DATA / name)).info
    assert (info.num_train, info.num_val, info.num_test) == (45_000, 5_000, 10_000)
    assert (info.num_classes, info.found_size, info.num_skipped) == (num_classes, (32, 32), 0)


def test_some_real_images_beside_the_repository():
    if not (SHARED_DATA / "cifar100").is_dir():
        pytest.skip(f"{SHARED_DATA / 'cifar100'} is not on this machine")
    test_file = SHARED_DATA / "cifar100" / "test-00000-of-00001.parquet"
    info = load_named(str(test_file), limit=500, memory_limit_bytes=0).info
    assert (info.num_classes, info.num_train, info.num_test) == (100, 500, 2_000)


# ----------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"limit": 1}, "limit must leave"),
        ({"mean": (0.5,)}, "mean and std go together"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "The images have 1 channels"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be above 0"),
        ({"mean": (0.5,), "std": (float("nan"),)}, "mean and std must be finite"),
        ({"mean": (float("inf"),), "std": (0.5,)}, "mean and std must be finite"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(DataError, match=message):
        load_named("digits", **setting)


def test_mean_and_std_can_be_given():
    info = load_named("digits", mean=(0.5,), std=(0.25,)).info
    assert (info.mean, info.std) == ((0.5,), (0.25,))


def test_statistics_are_those_of_the_training_part_alone():
    images = torch.randint(0, 256, (5000, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = data._measured(images)
    values = images.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert data._measured(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))[1] == (1 / 255,)


def test_images_and_labels_must_belong_together():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"uint8 \[N, C, H, W\]"):
        data.InMemoryImages(images.float(), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match=r"int64 \[4\]"):
        data.InMemoryImages(images, torch.zeros(3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------ batches


def all_batches(splits, *, epoch=0, start=0, image_size=(8, 8), part="train", **changes):
    arguments = {
        "augment": EVERYTHING,
        "seed": 0,
        "drop_last": False,
        "batch_size": 8,
        "device": torch.device("cpu"),
    } | changes
    return Batches(images=getattr(splits, part), image_size=image_size, info=splits.info, **arguments).epoch(
        epoch, start
    )


def assert_equal_batches(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.targets, b.targets)


@pytest.fixture
def digits():
    return load_named("digits", limit=60)


def test_evaluation_takes_every_image_in_order(digits):
    batches = list(all_batches(digits, part="test", augment=None, drop_last=True))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), digits.test.labels)
    images = torch.cat([batch.images for batch in batches])
    mean, std = digits.info.mean[0], digits.info.std[0]
    torch.testing.assert_close(images, (digits.test.images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert all(batch.labels is batch.targets for batch in batches)


def test_training_takes_every_image_once_in_an_order_of_its_own(digits):
    plain = {"augment": Augment()}
    first = torch.cat([batch.images for batch in all_batches(digits, **plain)])
    second = torch.cat([batch.images for batch in all_batches(digits, epoch=1, **plain)])
    assert not torch.equal(first, second)
    assert sorted(map(bytes, first.numpy())) == sorted(map(bytes, second.numpy()))


def test_the_last_batch_is_left_out_on_request(digits):
    sizes = [len(batch.images) for batch in all_batches(digits, batch_size=8, drop_last=True)]
    assert sizes == [8] * 7
    sizes = [len(batch.images) for batch in all_batches(digits, batch_size=8, drop_last=False)]
    assert sizes == [8] * 7 + [4]


def test_soft_labels_keep_the_hard_ones_beside_them(digits):
    batch = next(all_batches(digits))
    assert (batch.images.dtype, batch.images.shape) == (torch.float32, (8, 1, 8, 8))
    assert (batch.labels.dtype, batch.labels.shape) == (torch.float32, (8, 10))
    assert (batch.targets.dtype, batch.targets.shape) == (torch.int64, (8,))


@pytest.mark.parametrize("start", [0, 3, 7, 8])
def test_an_epoch_resumed_in_the_middle_is_the_same(digits, start):
    uninterrupted = list(all_batches(digits, epoch=2))
    torch.manual_seed(start)
    np.random.seed(start)
    assert_equal_batches(list(all_batches(digits, epoch=2, start=start)), uninterrupted[start:])


def test_global_random_states_are_neither_read_nor_changed(digits):
    torch.manual_seed(0)
    expected = list(all_batches(digits))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert_equal_batches(all_batches(digits), expected)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the loader forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_give_the_same_batches_as_memory(tmp_path, num_workers):
    write_folder(tmp_path / "train", {"cat": 13, "dog": 14}, size=(8, 8))
    write_folder(tmp_path / "test", {"cat": 2, "dog": 2}, size=(8, 8))
    same = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    stored, lazy = load_named(str(tmp_path), **same), load_named(str(tmp_path), memory_limit_bytes=0, **same)
    assert isinstance(stored.train, data.InMemoryImages)
    assert isinstance(lazy.train, data.FileImages)
    state = torch.get_rng_state()
    uninterrupted = list(all_batches(stored, epoch=1))
    assert_equal_batches(all_batches(lazy, epoch=1, num_workers=num_workers), uninterrupted)
    assert_equal_batches(all_batches(lazy, epoch=1, start=2, num_workers=num_workers), uninterrupted[2:])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_of_nothing_but_corrupt_images_is_left_out_of_an_evaluation(tmp_path):
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "test", {"cat": 3, "dog": 2})
    splits = load_named(str(tmp_path), on_corrupt="skip", val_fraction=0, memory_limit_bytes=0)
    (tmp_path / "test/dog/1.png").write_bytes(b"")
    last = sorted((tmp_path / "test/dog").iterdir())[-1]
    last.write_bytes(b"")
    read = list(all_batches(splits, part="test", batch_size=4, augment=None))
    assert [len(batch.images) for batch in read] == [4]
    assert splits.num_read("test") == 4


def test_a_batch_of_nothing_but_corrupt_images_ends_the_run(tmp_path):
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "test", {"cat": 1, "dog": 1})
    splits = load_named(str(tmp_path), on_corrupt="skip", val_fraction=0, memory_limit_bytes=0)
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="Not one image of a batch of 8"):
        next(all_batches(splits))
    with pytest.raises(DataError, match="None of the 8 images tried"):
        load_named(str(tmp_path), on_corrupt="skip", val_fraction=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"batch_size": 61, "drop_last": True}, "batch_size=61 leaves no full batch of 60 images"),
        ({"num_workers": -1}, "num_workers must be 0 or more"),
    ],
)
def test_impossible_batches_are_refused(digits, setting, message):
    with pytest.raises(DataError, match=message):
        all_batches(digits, **setting)


@pytest.mark.parametrize("label", [-100, -1, 10])
def test_batches_of_labels_that_mean_no_class_are_refused(digits, label):
    images = digits.train.subset(torch.arange(8))
    images.labels[5] = label
    with pytest.raises(DataError, match=rf"from 0 to 9 \(10 classes\), got {label} for image 5"):
        all_batches(dataclasses.replace(digits, train=images))


# --------------------------------------------------------------------------------------------- prediction


MEAN, STD = (0.5,) * 3, (0.25,) * 3


def prepared(path, skipped=None, **settings):
    info = dataclasses.replace(load_named("digits").info, mean=MEAN, std=STD, num_channels=3)
    paths = images_named([path], skipped or image_sets.Skipped())
    return load_images_for_prediction(paths, DataSettings(**settings), info, image_size=(8, 8))


def test_prediction_walks_a_folder_and_prepares_as_evaluation_does(tmp_path):
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4}, size=(10, 13))
    write_folder(tmp_path / "test", {"cat": 1, "dog": 2}, size=(10, 13))
    splits = load_named(str(tmp_path), mean=MEAN, std=STD)
    found = dict(prepared(tmp_path / "test"))
    assert list(found) == sorted((tmp_path / "test").rglob("*.png"))
    evaluated = next(all_batches(splits, part="test", augment=None)).images
    assert torch.equal(torch.stack(list(found.values())), evaluated)
    [(path, image)] = prepared(tmp_path / "test" / "cat" / "0.png")
    assert torch.equal(image, found[path])


def test_prediction_without_images(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        prepared(tmp_path / "nothing")
    with pytest.raises(DataError, match="no image in"):
        prepared(tmp_path)


def test_prediction_of_a_corrupt_image(tmp_path):
    write_folder(tmp_path, {"cat": 2})
    broken = tmp_path / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"0\.png"):
        list(prepared(tmp_path))
    [(path, error), (other, image)] = prepared(tmp_path, on_corrupt="skip")
    assert (path.name, error.kind, other.name) == ("0.png", "corrupt", "1.png")
    assert isinstance(image, torch.Tensor)


def test_prediction_passes_over_what_is_no_image_and_says_so(tmp_path):
    write_folder(tmp_path, {"cat": 2})
    strange = tmp_path / "cat" / "0.png"
    strange.write_bytes(b"hello")
    (tmp_path / "notes.txt").write_text("hello")
    left_out = image_sets.Skipped()
    [(path, error), (other, _)] = prepared(tmp_path, skipped=left_out)
    assert (path.name, str(error), other.name) == ("0.png", "no image by its content", "1.png")
    assert left_out.counts() == {".txt": 1}
    with pytest.raises(DataError, match=r"0\.png can't be read \(no image by its content\)"):  # it was named
        list(prepared(strange))


# ---------------------------------------------------------------------------------- what an import brings along


def test_importing_needs_torch_alone():
    code = (
        "import sys, localgrad.training.data; "
        "print([m for m in ('torchvision', 'timm', 'datasets', 'sklearn', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"
