"""Hugging Face's data sets on disk, in its own formats: columns by other names, configurations, streams."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import MICRO, assert_refused, assert_same_run, interrupt_at_step, load_named
from localgrad import run
from localgrad.app import using_runs
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import DataError
from localgrad.training.data import Batches, Splits
from localgrad.training.settings import Augment
from localgrad.training.trainer import Interrupted

if TYPE_CHECKING:
    from helpers import Cli

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def no_network_and_a_cache_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value: int) -> bytes:
    """An image that is told by its value, 4x4."""
    text = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(text, "png")
    return text.getvalue()


def table(labels: list[Any], kind: Any = None, start: int = 0, **columns: tuple[list[Any], Any]) -> datasets.Dataset:
    """Images in the column ``photo``, valued from ``start`` on, and labels in ``species``."""
    kinds = {"photo": datasets.Image(), "species": kind or datasets.ClassLabel(names=NAMES)}
    photos = [{"bytes": png(start + number), "path": None} for number in range(len(labels))]
    values = {"photo": photos, "species": labels, **{name: values for name, (values, _) in columns.items()}}
    kinds |= {name: own for name, (_, own) in columns.items()}
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))


def written(path: Path, rows: datasets.Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path))
    return path


def values_of(images: Any) -> list[int]:
    return [int(value) for value in images.images[:, 0, 0, 0]]


LABELS = [0, 1, 2] * 5
TEXTS = ([f"breed {number % 5}" for number in range(15)], datasets.Value("string"))
NUMBERS = ([number % 2 + 7 for number in range(15)], datasets.Value("int32"))
CAPTIONS = (["a photo"] * 15, datasets.Value("string"))


# Columns -----------------------------------------------------------------------------------------------------------


def test_columns_by_other_names_are_found_by_their_types(tmp_path: Path) -> None:
    written(tmp_path / "set/train.parquet", table(LABELS, caption=CAPTIONS, price=NUMBERS))
    splits = load_named(str(tmp_path / "set"), val_fraction=0)
    assert splits.info.class_names == tuple(NAMES)
    assert sorted(zip(values_of(splits.train), splits.train.labels.tolist(), strict=True)) == sorted(
        (value, value % 3) for value in values_of(splits.train)
    )


BREEDS = tuple(f"breed {number}" for number in range(5))


@pytest.mark.parametrize(("column", "classes"), [("breed", BREEDS), ("price", ("7", "8")), ("species", tuple(NAMES))])
def test_labels_are_those_of_the_column_that_is_named(tmp_path: Path, column: str, classes: tuple[str, ...]) -> None:
    """Texts and whole numbers too; the classes of another part are matched by name."""
    written(tmp_path / "set/train.parquet", table(LABELS, breed=TEXTS, price=NUMBERS))
    few = {"breed": (["breed 4", "breed 1"], TEXTS[1]), "price": ([8, 8], NUMBERS[1])}
    written(tmp_path / "set/test.parquet", table([2, 0], start=100, **few))
    splits = load_named(str(tmp_path / "set"), val_fraction=0, label_column=column, image_column="photo")
    assert splits.info.class_names == classes
    expected = {"breed": [4, 1], "price": [1, 1], "species": [2, 0]}[column]
    assert splits.test.labels.tolist() == expected
    truth = {"breed": lambda value: value % 5, "price": lambda value: value % 2, "species": lambda value: value % 3}
    assert splits.train.labels.tolist() == [truth[column](value) for value in values_of(splits.train)]


def test_one_of_several_columns_of_images_or_classes(tmp_path: Path) -> None:
    mask = ([{"bytes": png(200), "path": None}] * 15, datasets.Image())
    coarse = ([0] * 10 + [1] * 5, datasets.ClassLabel(names=["x", "y"]))
    path = written(tmp_path / "all.parquet", table(LABELS, mask=mask, label=coarse))
    columns = r"its columns are photo \(Image\), species \(ClassLabel\), mask \(Image\), label \(ClassLabel\)"
    with pytest.raises(DataError, match=rf"no single column of type Image: {columns}; name one with image_column"):
        load_named(str(path))
    splits = load_named(str(path), image_column="mask", val_fraction=0)
    assert set(values_of(splits.train)) == {200}
    assert splits.info.class_names == ("x", "y")
    assert "Labels are the column 'label'; others of classes: species." in splits.info.notes


LISTED = ([[0, 1]] * 15, datasets.List(datasets.ClassLabel(names=["x", "y"])))
NESTED = ([{"class": 1}] * 15, {"class": datasets.Value("int64")})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_column": "tags"}, r"label_column='tags': this column of .* doesn't hold one label a row: a class, a "
         r"whole number or a text; its columns are .*tags \(List of ClassLabel\)"),
        ({"label_column": "thing"}, r"label_column='thing': this column .* doesn't hold one label .* thing \(dict\)"),
        ({"label_column": "specie"}, r"label_column='specie': .* has no such column; its columns .* Nearest: species"),
        ({"image_column": "tags"}, r"image_column='tags': this column .* doesn't hold one image a row; its columns"),
        ({"label_column": "photo"}, r"label_column='photo': this column .* doesn't hold one label a row"),
        ({"image_column": "name", "label_column": "name"}, "label_column='name': it is the column of images"),
        ({"config": "x"}, r"config='x': .*all.parquet is a file, and has no configurations; leave it out"),
    ],
)  # fmt: skip
def test_columns_that_are_none_are_refused_with_those_there_are(
    tmp_path: Path, options: dict[str, str], words: str
) -> None:
    path = written(tmp_path / "all.parquet", table(LABELS, tags=LISTED, thing=NESTED, name=CAPTIONS))
    with pytest.raises(DataError, match=words) as error:
        load_named(str(path), **options)
    assert "\n" not in str(error.value)


def test_what_is_of_tables_is_refused_elsewhere(tmp_path: Path, cli_: Cli) -> None:
    for name in ("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    with pytest.raises(DataError, match=r"label_column='x': .* is read by its class folders, and this is of tables"):
        load_named(str(tmp_path), label_column="x")
    assert_refused(cli_("train", "--config", "x"), "--config x doesn't go with --data digits: it is of tables")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves the table open
def test_columns_of_csv_files_and_of_metadata(tmp_path: Path) -> None:
    """``metadata.csv`` beside images, by the library's own loader; and a table of paths of another name."""
    (tmp_path / "set").mkdir()
    rows = []
    for number in range(12):
        (tmp_path / "set" / f"{number}.png").write_bytes(png(number))
        rows.append(f"{number}.png,{number % 2},{'dog' if number % 3 else 'cat'}\n")
    (tmp_path / "set" / "metadata.csv").write_text("file_name,sex,animal\n" + "".join(rows))
    splits = load_named(str(tmp_path / "set"), label_column="animal", val_fraction=0)
    assert splits.info.class_names == ("cat", "dog")
    assert splits.train.labels.tolist() == [bool(value % 3) for value in values_of(splits.train)]
    (tmp_path / "set" / "metadata.csv").rename(tmp_path / "set" / "all.csv")
    splits = load_named(str(tmp_path / "set"), image_column="file_name", label_column="sex", val_fraction=0)
    assert splits.info.class_names == ("0", "1")
    assert splits.train.labels.tolist() == [value % 2 for value in values_of(splits.train)]


# Configurations ----------------------------------------------------------------------------------------------------

README = """---
configs:
- config_name: wild
  data_files:
  - split: train
    path: wild/train*.parquet
  - split: test
    path: wild/test.parquet
- config_name: tame
  data_files:
  - split: train
    path: tame/*.parquet
---
# Photos
"""


def plant_configs(root: Path, readme: str = README) -> Path:
    """A folder as it is on the hub, with two configurations."""
    written(root / "wild/train-0.parquet", table(LABELS))
    written(root / "wild/test.parquet", table([2, 0], start=50))
    written(root / "tame/train.parquet", table(LABELS, start=100))
    (root / "README.md").write_text(readme)
    return root


def test_a_configuration_is_read_by_its_name(tmp_path: Path, cli_: Cli) -> None:
    path = plant_configs(tmp_path / "set")
    wild, tame = (load_named(str(path), config=each, val_fraction=0) for each in ("wild", "tame"))
    assert sorted(values_of(wild.train)) == list(range(15))
    assert values_of(wild.test) == [50, 51]
    assert sorted(values_of(tame.train) + values_of(tame.test)) == list(range(100, 115))
    with pytest.raises(DataError, match=r"has the configurations wild, tame; take config='wild', or another\.$"):
        load_named(str(path))
    assert_refused(
        cli_("train", "--data", str(path), "--config", "time"),
        "--config time: ", "has the configurations wild, tame; take --config wild, or another. Nearest: tame",
    )  # fmt: skip


def test_the_default_configuration_is_taken_and_said(tmp_path: Path) -> None:
    readme = README.replace("config_name: tame\n", "config_name: tame\n  default: true\n")
    splits = load_named(str(plant_configs(tmp_path / "set", readme)), val_fraction=0)
    assert sorted(values_of(splits.train) + values_of(splits.test)) == list(range(100, 115))
    assert "Of the configurations wild, tame the default one is read." in splits.info.notes


def test_tables_that_the_library_passes_over_are_said(tmp_path: Path) -> None:
    path = tmp_path / "set"
    for name in ("train-0", "test-0", "extra-0"):
        written(path / f"{name}.parquet", table(LABELS))
    notes = load_named(str(path), val_fraction=0).info.notes
    assert "Not read: extra-0.parquet: the Hugging Face library takes them for no part." in notes
    (path / "extra-0.parquet").rename(path / "train-1.parquet")
    assert not any("Not read" in note for note in load_named(str(path), val_fraction=0).info.notes)


def test_a_saved_data_set_has_columns_and_no_configurations(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(LABELS, breed=TEXTS)}).save_to_disk(tmp_path / "saved")
    splits = load_named(str(tmp_path / "saved"), label_column="breed", val_fraction=0)
    assert splits.info.num_classes == 5
    with pytest.raises(DataError, match=r"config='x': .* was saved as one data set, and has no configurations"):
        load_named(str(tmp_path / "saved"), config="x")


# Streams -----------------------------------------------------------------------------------------------------------


def plant_stream(root: Path, *, kinds: dict[str, int] | None = None) -> Path:
    """Two files of 20 images for training and one of 6 for each other part, labels drawn."""
    draw = np.random.default_rng(0)
    for number, (part, count) in enumerate(
        (kinds or {"train-0": 20, "train-1": 20, "validation": 6, "test": 6}).items()
    ):
        written(root / f"{part}.parquet", table(draw.integers(0, 3, count).tolist(), start=40 * number))
    return root


def batches_of(splits: Splits, *, epoch: int = 0, start: int = 0, **changes: Any) -> list[tuple[list[int], list[int]]]:
    """The values and labels of the images in each batch."""
    info = dataclasses.replace(splits.info, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    how = {"images": splits.train, "batch_size": 8, "augment": Augment(), "seed": 5, "drop_last": False, **changes}
    made = Batches(image_size=(4, 4), info=info, device=torch.device("cpu"), **how)
    assert len(made) == -(-len(how["images"]) // 8)
    return [
        (batch.images[:, 0, 0, 0].round().int().tolist(), batch.targets.tolist()) for batch in made.epoch(epoch, start)
    ]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the loader forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_of_a_stream_has_every_image_once_and_goes_on_bit_for_bit(tmp_path: Path, num_workers: int) -> None:
    path = plant_stream(tmp_path / "set")
    kept = load_named(str(path), memory_limit_bytes=0)
    splits = load_named(str(path), streaming=True)
    assert dataclasses.replace(splits.info, notes=()) == dataclasses.replace(kept.info, notes=())
    assert (splits.info.num_train, splits.info.num_val, splits.info.num_test) == (40, 6, 6)
    first, second = (batches_of(splits, epoch=epoch, num_workers=num_workers) for epoch in (0, 1))
    assert first != second
    truth = {value: label for values, labels in batches_of(kept) for value, label in zip(values, labels, strict=True)}
    for epoch in (first, second):
        seen = [pair for values, labels in epoch for pair in zip(values, labels, strict=True)]
        assert sorted(seen) == sorted(truth.items())
    for start in (0, 2, 4, 5):
        assert batches_of(splits, epoch=1, start=start, num_workers=num_workers) == second[start:]
    for part in ("val", "test"):
        plain = {"augment": None, "images": splits.part(part)}
        assert batches_of(splits, **plain) == batches_of(kept, augment=None, images=kept.part(part))
    buffered = load_named(str(path), streaming=True, shuffle_buffer=1)
    [values] = {tuple(value // 20 for batch, _ in batches_of(buffered) for value in batch)}
    assert sorted(values) == [0] * 20 + [2] * 20


def test_parts_are_cut_off_of_a_streams_beginning(tmp_path: Path) -> None:
    path = plant_stream(tmp_path / "set", kinds={"train-0": 20, "train-1": 20})
    splits = load_named(str(path), streaming=True, val_fraction=0.25, limit=20)
    order = [*range(20), *range(40, 60)]
    found = {part: [] for part in ("train", "val", "test")}
    for part, values in found.items():
        plain = {"augment": None, "images": splits.part(part)}
        values += [value for batch, _ in batches_of(splits, **plain) for value in batch]
    assert (found["test"], found["val"], found["train"]) == (order[:8], order[8:16], order[16:36])
    assert splits.info.notes[:3] == (
        "No test part: the first 8 of 40 images are held out as one.",
        "Validation images are the first 8 training images of the stream, in its order.",
        "Limited to 20 of 24 training images.",
    )
    shuffled = [value for batch, _ in batches_of(splits) for value in batch]
    assert sorted(shuffled) == sorted(found["train"]) != shuffled


def test_classes_of_a_streams_parts_are_matched_by_name(tmp_path: Path) -> None:
    other = datasets.ClassLabel(names=["cat", "ant", "bee"])
    for name, rows in (("train/a", table(LABELS)), ("test/a", table([0, 1, 2, 2], other, start=50))):
        rows.to_parquet(str(written(tmp_path / "set" / f"{name}.parquet", rows)))
    with pytest.raises(DataError, match=r"streaming=True: files of .* list their classes otherwise than others"):
        load_named(str(tmp_path / "set"), streaming=True)
    splits = load_named(
        str(tmp_path / "set/train/a.parquet"), test_data=str(tmp_path / "set/test/a.parquet"), streaming=True
    )
    assert batches_of(splits, augment=None, images=splits.test) == [([50, 51, 52, 53], [2, 0, 1, 1])]


def test_a_saved_data_set_is_streamed(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(LABELS)}).save_to_disk(tmp_path / "saved")
    splits = load_named(str(tmp_path / "saved"), streaming=True, val_fraction=0)
    assert [value for batch, _ in batches_of(splits, augment=None) for value in batch] == list(range(3, 15))


def test_streams_that_cannot_be_are_refused_in_one_line(tmp_path: Path, cli_: Cli) -> None:
    path = plant_stream(tmp_path / "set")
    written(tmp_path / "texts.parquet", table(LABELS, breed=TEXTS))
    with pytest.raises(DataError, match=r"streaming=True: the column 'breed' of .* isn't of type ClassLabel, so its"):
        load_named(str(tmp_path / "texts.parquet"), streaming=True, label_column="breed")
    splits = load_named(str(path), streaming=True, num_examples=50)
    with pytest.raises(DataError, match=r"train ends after 40 of 50 images: say how many .* num_examples=40, or take"):
        batches_of(splits)
    sorted_by_class = written(tmp_path / "sorted.parquet", table([0] * 8 + [1] * 80))
    assert not any("of one class" in note for note in load_named(str(sorted_by_class), streaming=True).info.notes)
    written(sorted_by_class, table([0] * 80 + [1] * 80))
    notes = load_named(str(sorted_by_class), streaming=True).info.notes
    assert notes[0].startswith("The first 64 images of the part 'train' are of one class: if the stream is sorted")
    words = ("train", "--data", str(path), "--streaming")
    assert_refused(cli_(*words, "--balance", "weights"), "--balance weights doesn't go with --streaming: labels")
    assert_refused(cli_(*words, "--schedule", "sequential"), "--schedule sequential doesn't go with --streaming")
    assert_refused(cli_("train", "--streaming"), "--streaming doesn't go with --data digits: it is of tables")
    unlabelled = written(tmp_path / "holes.parquet", table([0, 1, 2, None] * 10))
    with pytest.raises(DataError, match=r"has the label None, which is no class; a stream"):
        batches_of(load_named(str(unlabelled), streaming=True, val_fraction=0))


def test_corrupt_images_of_a_stream_are_counted_once(tmp_path: Path) -> None:
    rows = table(LABELS)
    photos = [{"bytes": png(number)[:50] if number in (7, 9) else png(number), "path": None} for number in range(15)]
    features = rows.features
    broken = datasets.Dataset.from_dict({"photo": photos, "species": LABELS}, features=features)
    path = written(tmp_path / "all.parquet", broken)
    with pytest.raises(DataError, match=r"The image .* \(sha256 [0-9a-f]{12}\) can't be read"):
        batches_of(load_named(str(path), streaming=True, val_fraction=0))
    splits = load_named(str(path), streaming=True, val_fraction=0, on_corrupt="skip")
    for epoch in range(2):
        assert sum(len(values) for values, _ in batches_of(splits, epoch=epoch)) == 10
    assert splits.skipped["train"].counts() == {"corrupt": 2}
    assert splits.num_read("train") == 10


def test_colour_in_a_stream_that_began_grey_is_refused_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localgrad.training.streams.PROBED", 2)
    text = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(text, "png")
    photos = [{"bytes": png(9) if number == 12 else text.getvalue(), "path": None} for number in range(15)]
    rows = datasets.Dataset.from_dict({"photo": photos, "species": LABELS}, features=table(LABELS).features)
    splits = load_named(str(written(tmp_path / "all.parquet", rows)), streaming=True, val_fraction=0)
    assert splits.info.num_channels == 1
    with pytest.raises(
        DataError, match=r"The image .* has colour, and the first images .* have none; leave streaming out"
    ):
        batches_of(splits) + batches_of(splits, images=splits.test)


@pytest.mark.heavy
def test_a_run_on_a_stream_is_resumed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of its second epoch."""
    own = {"data": {"name": str(plant_stream(tmp_path / "set")), "streaming": True}, "training.batch_size": 8}
    recipe = Recipe.from_dict(overlay(MICRO, {**own, "execution.num_workers": 0, "augment.flip": True}))
    summary = run.train(recipe, out=tmp_path / "whole")
    assert (summary["num_test"], summary["epochs"]) == (6, 3)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 8)
        with pytest.raises(Interrupted):
            run.train(recipe, out=tmp_path / "run")
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert using_runs.evaluate_run(tmp_path / "whole")["accuracy"] == summary["test_accuracy"]
