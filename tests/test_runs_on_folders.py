"""Runs on folders of images: what is said first, what is kept, what evaluating and predicting make of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from data_cases import array, plant
from helpers import Cli, assert_refused
from localgrad import run
from localgrad.app import build, fitting, places, run_folders, using_runs
from localgrad.app.comparison import Settings
from localgrad.app.recipe import Recipe, overlay
from localgrad.compare import verb
from localgrad.errors import DataError, RecipeError
from localgrad.training import data
from localgrad.training.events import Event, RunStarted, Sink
from localgrad.training.image_sets import Skipped
from localgrad.training.images import Reading
from localgrad.training.settings import DataSettings

VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 8,
    "patch_size": 4,
    "options": {"embed_dim": 12, "depth": 2, "num_heads": 2},
}
MICRO: dict[str, Any] = {
    "model": VIT,
    "data": {"name": "set"},
    "local": {"modules": 2},
    "training": {"epochs": 1, "batch_size": 4, "lr": 1e-3, "warmup_epochs": 0},
    "execution": {"device": "cpu", "num_threads": 1, "num_workers": 0},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; memory is estimated elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
    return tmp_path


class Listener(Sink):
    """Keeps the first lines of a run."""

    def __init__(self) -> None:
        self.lines: tuple[str, ...] = ()

    def emit(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.lines = event.details


def micro(changes: dict[str, Any] | None = None) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, changes or {}))


def write_set(
    root: Path, dtype: Any = np.uint8, factor: int = 1, shape: tuple[int, ...] = (8, 8), count: int = 8
) -> Path:
    """Dark and bright images in two classes."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (root / name).mkdir(parents=True)
        for index in range(count):
            values = (rng.integers(low, low + 100, shape) * factor).astype(dtype)
            (root / name / f"{index}.png").write_bytes(array(values, "png"))
    return root


def test_the_first_lines_say_what_was_found(here: Path) -> None:
    plant(here / "set", ("train/{cat,dog}/*", "val/{cat,dog}/*", "test/{cat,dog}/*", "train/cat/notes.txt", ".x/*"))
    (here / "set/train/cat/1.png").write_bytes((here / "set/train/cat/1.png").read_bytes()[:45])
    (here / "set/test/cat/2.png").write_bytes(b"")
    listener = Listener()
    summary = run.train(micro({"data.on_corrupt": "skip"}), out=here / "run", sinks=[listener])
    assert listener.lines[:4] == (
        "11 training, 12 validation, 11 test images, 2 classes (cat, dog)",
        "left out of train: 1 corrupt, 1 .txt",
        "left out of test: 1 empty",
        "listed in skipped.csv in the run folder",
    )
    assert "Found train in set/train, val in set/val, test in set/test." in listener.lines
    assert "The data set's own validation part selects the best epoch." in listener.lines
    assert summary["num_test"] == 11
    assert summary["skipped"] == {"train": {"corrupt": 1, ".txt": 1}, "test": {"empty": 1}}
    rows = (here / "run" / "skipped.csv").read_text().splitlines()
    assert rows[0] == "part,image,reason"
    assert [row.split(",")[0:2] for row in rows[1:]] == [
        ["train", "set/train/cat/1.png"],
        ["test", "set/test/cat/2.png"],
    ]
    assert json.loads((here / "run" / "data.json").read_text())["skipped"]["test"] == {"empty": 1}


def test_counts_stand_beside_the_accuracy(here: Path, cli_: Cli) -> None:
    plant(here / "set", ("train/{cat,dog}/*", "test/{cat,dog}/*"))
    (here / "set/test/cat/2.png").write_bytes(b"")
    (here / "micro.toml").write_text(micro().to_toml())
    said = cli_("train", "--recipe", "micro.toml", "--out", "run")
    assert said.code == 0, said.err
    assert "(11 images, read once, at the end; left out: 1 empty)" in said.out
    said = cli_("evaluate", "run")
    assert "(11 images; left out: 1 empty)" in said.out
    said = cli_("predict", "run", "set/test")
    assert said.code == 1
    assert len(said.out.splitlines()) == 11
    assert said.err == "left out: set/test/cat/2.png (empty)\n1 of 12 images are left out\n"


@pytest.mark.parametrize("limit_bytes", [0, 2**30])
def test_images_that_are_decoded_while_training_are_listed_too(
    here: Path, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = data.load_data
    monkeypatch.setattr(data, "load_data", lambda *a, **k: load(*a, **k, memory_limit_bytes=limit_bytes))
    plant(here / "set", ("train/{cat,dog}/*", "test/{cat,dog}/*"))
    (here / "set/train/cat/1.png").write_bytes(b"")
    (here / "set/test/cat/2.png").write_bytes(b"no")
    summary = run.train(micro({"data.val_fraction": 0.0}), out=here / "run")
    assert summary["num_skipped"] == 2
    assert summary["num_test"] == 11
    rows = (here / "run" / "skipped.csv").read_text().splitlines()
    assert rows[1:] == ["train,set/train/cat/1.png,empty", "test,set/test/cat/2.png,no image by its content"]
    assert using_runs.evaluate_run(here / "run")["num_images"] == 11


def test_a_run_is_used_with_the_data_that_it_went_on_with(here: Path) -> None:
    """Images were added in their place, brighter ones: what normalises them is what trained."""
    write_set(here / "set")
    run.train(micro(), out=here / "run")
    before = json.loads((here / "run/data.json").read_text())
    for index in range(20, 40):
        (here / f"set/light/{index}.png").write_bytes(array(np.full((8, 8), 250, np.uint8), "png"))
    with pytest.warns(match="another fingerprint.*it was changed"):
        run.resume(here / "run", {"training.epochs": 2})
    known, found = json.loads((here / "run/data.json").read_text()), data.load_data(DataSettings(name="set")).info
    assert known["num_train"] == found.num_train > before["num_train"]
    assert known["mean"] == pytest.approx(found.mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        using_runs.evaluate_run(here / "run")


def test_a_corrupt_image_of_the_test_part_costs_no_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found at the end; the same run ends without it."""
    monkeypatch.setattr("localgrad.training.image_sets.PROBED", 2)
    load = data.load_data
    monkeypatch.setattr(data, "load_data", lambda *a, **k: load(*a, **k, memory_limit_bytes=0))
    plant(here / "set", ("train/{cat,dog}/*", "test/{cat,dog}/*"))
    image = here / "set/test/cat/2.png"
    image.write_bytes(image.read_bytes()[:45])
    with pytest.raises(DataError, match="leave such images out with on_corrupt='skip'"):
        run.train(micro(), out=here / "run")
    assert run.resume(here / "run", {"data.on_corrupt": "skip"})["num_test"] == 11


def test_weights_that_are_neither_loaded_nor_learnt_are_named(here: Path) -> None:
    write_set(here / "set")
    small = timm.create_model(VIT["name"], num_classes=2, in_chans=1, img_size=8, patch_size=4, **VIT["options"])
    save_file(small.state_dict(), here / "small.safetensors")
    deeper = {"model.options": {**VIT["options"], "depth": 3}, "model.weights": "small.safetensors"}
    more = "Not in the weights, and frozen: blocks.2."
    for changes, is_said in (({"training.freeze": 0.5}, False), ({"model.lora": 2}, True)):
        listener = Listener()
        run.train(micro({**deeper, **changes, "local.modules": 1}), out=here / next(iter(changes)), sinks=[listener])
        assert any(line.startswith(more) for line in listener.lines) == is_said


@pytest.fixture
def weights(here: Path) -> Path:
    """Pretrained weights of the micro model, for mean 0.5 and std 0.5."""
    torch.manual_seed(0)
    model = timm.create_model(VIT["name"], num_classes=5, img_size=8, patch_size=4, in_chans=3, **VIT["options"])
    save_file(model.state_dict(), here / "weights.safetensors")
    return here / "weights.safetensors"


def pretrained(weights: Path, mean: float = 0.5) -> dict[str, Any]:
    overlaid = {"file": str(weights), "num_classes": 5, "mean": [mean] * 3, "std": [0.25] * 3, "input_size": [3, 8, 8]}
    return {"model.pretrained": True, "model.options": {**VIT["options"], "pretrained_cfg_overlay": overlaid}}


def test_pretrained_weights_bring_their_own_normalisation(here: Path, weights: Path) -> None:
    write_set(here / "set", shape=(8, 8, 3))
    listener = Listener()
    run.train(micro(pretrained(weights)), out=here / "run", sinks=[listener])
    info = json.loads((here / "run" / "data.json").read_text())
    assert (info["mean"], info["std"]) == ([0.5] * 3, [0.25] * 3)
    assert any("as the pretrained weights were trained" in line for line in listener.lines)
    kept = run_folders.read_recipe(here / "run").method.data
    assert (kept.mean, kept.std) == ((0.5,) * 3, (0.25,) * 3)

    seen = []
    evaluate = using_runs.evaluate

    def watched(learner: Any, batches: Any) -> Any:
        seen.append((batches.info.mean, batches.info.std))
        return evaluate(learner, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(using_runs, "evaluate", watched)
        result = using_runs.evaluate_run(here / "run")
    assert seen == [((0.5,) * 3, (0.25,) * 3)]
    (here / "run" / "summary.json").unlink()
    assert run.resume(here / "run")["test_accuracy"] == result["accuracy"]  # and so does a run that is resumed
    found = {p.path: p.classes[0][0] for p in using_runs.predict(here / "run", here / "set")}
    assert len(found) == 16


def test_grey_images_take_the_average_of_three_channels(here: Path, weights: Path) -> None:
    write_set(here / "set")
    run.train(micro(pretrained(weights, mean=0.4)), out=here / "run")
    info = json.loads((here / "run" / "data.json").read_text())
    assert (info["num_channels"], info["mean"], info["std"]) == (1, [pytest.approx(0.4)], [0.25])


def test_mean_and_std_win_over_the_weights_own(here: Path, weights: Path) -> None:
    write_set(here / "set", shape=(8, 8, 3))
    run.train(micro({**pretrained(weights), "data.mean": [0.1], "data.std": [0.2]}), out=here / "run")
    info = json.loads((here / "run" / "data.json").read_text())
    assert (info["mean"], info["std"]) == ([0.1] * 3, [0.2] * 3)


def test_a_run_from_before_keeps_the_normalisation_that_it_had(here: Path, weights: Path) -> None:
    """Its recipe says nothing about it: the data's own mean and std were taken."""
    write_set(here / "set", shape=(8, 8, 3))
    recipe = micro(pretrained(weights))
    own = build.build(micro()).data.info
    assert build.build(recipe, has_weights=True).data.info.mean == own.mean
    assert build.build(recipe).data.info.mean == own.mean  # resumed before its first checkpoint
    job = build.build(recipe, is_new=True)
    assert job.data.info.mean == (0.5,) * 3
    assert run._normalised_as(job.recipe, recipe).method.data.mean == (0.5,) * 3  # started again by torchrun


def test_how_images_are_read_is_kept_with_the_run(here: Path, cli_: Cli) -> None:
    write_set(here / "set", np.uint16, 16, (6, 12))
    (here / "micro.toml").write_text(micro().to_toml())
    options = ("train", "--recipe", "micro.toml", "--out", "run")
    assert_refused(cli_(*options), "less than a sixteenth", "--image-range 0,4095")
    wanted = ("--image-range", "0,4095", "--fit", "pad", "--background", "#101010", "--mean", "0.5", "--std", "0.25")
    said = cli_(*options, *wanted)
    assert said.code == 0, said.err
    assert "read by 0 to 4095 (16 of 16 sampled)" in said.out
    info = json.loads((here / "run" / "data.json").read_text())
    assert (info["image_range"], info["background"], info["fit"]) == ([0, 4095], [16, 16, 16], "pad")
    assert (info["mean"], info["std"]) == ([0.5], [0.25])

    asked, corrupt = [], []
    load = using_runs.load_images_for_prediction

    def watched(path: list[Path], reading: DataSettings, *arguments: Any, **settings: Any) -> Any:
        asked.append(Reading.as_set(reading))
        corrupt.append(reading.on_corrupt)
        return load(path, reading, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(using_runs, "load_images_for_prediction", watched)
        assert len(list(using_runs.predict(here / "run", here / "set"))) == 16
        otherwise = ("--image-range", "0,1000", "--background", "white", "--fit", "squash", "--on-corrupt", "error")
        assert cli_("predict", "run", "set", *otherwise).code == 0
    kept, typed = ([each.image_range, each.background, each.fit] for each in asked)
    assert kept == [(0, 4095), (16, 16, 16), "pad"]
    assert typed == [(0, 1000), (255, 255, 255), "squash"]
    assert corrupt == ["skip", "error"]
    assert_refused(cli_("predict", "run", "set", "--fit", "bend"), "data.fit = 'bend'")
    assert_refused(cli_("predict", "run", "set", "--image-range", "a"), "--image-range: 'a'", "--image-range 0,4095")
    assert using_runs.evaluate_run(here / "run")["num_images"] == 3


def test_a_comparison_reads_images_as_a_refusal_says(here: Path, cli_: Cli) -> None:
    write_set(here / "set", np.uint16, 16, (6, 12))
    options = ("compare", "--model", "vit_tiny_patch16_224", "--data", "set", "--batch-size", "4", "--device", "cpu")
    refused = cli_(*options, "--estimate-only")
    assert refused.code == 2
    assert "type --image-range 0,4095; if" in refused.err
    settings = Settings(data="set", batch_size=4, image_range=[0, 4095], background="black", fit="pad")
    images, _ = verb._images_of_data(settings, "set").batch((1, 8, 8))
    assert images.shape == (4, 1, 8, 8)
    assert (images[:, :, 0] == images.min()).all(), "a black bar"
    assert "data.on_corrupt = 'maybe'" in cli_(*options, "--on-corrupt", "maybe").err


def test_a_fit_beside_a_transform_is_told(here: Path, cli_: Cli) -> None:
    write_set(here / "set")
    listener = Listener()
    run.train(micro({"data.fit": "pad", "data.transform": "light"}), out=here / "run", sinks=[listener])
    assert "fit='pad' does nothing: a transform brings images to the model's shape by itself." in listener.lines
    assert_refused(cli_("predict", "run", "set", "--fit", "pad"), "--fit pad: the run's images go through", "light")


def test_what_is_cut_off_is_said_once(here: Path) -> None:
    write_set(here / "set", shape=(8, 16, 3))
    listener = Listener()
    run.train(micro(), out=here / "run", sinks=[listener])
    [line] = [line for line in listener.lines if "cut" in line]
    assert line.startswith("Images are cut to the model's shape: 50% of their pixels on average are left out")
    run.train(micro({"data.fit": "squash"}), out=here / "other", sinks=[listener])
    assert not [line for line in listener.lines if "cut" in line]


def test_parts_can_be_named(here: Path, cli_: Cli) -> None:
    write_set(here / "a")
    write_set(here / "b", count=3)
    (here / "micro.toml").write_text(micro().to_toml())
    said = cli_(
        "train", "--recipe", "micro.toml", "--train-data", "a", "--test-data", "b", "--val-data", "b", "--out", "run"
    )
    assert said.code == 0, said.err
    assert "16 training, 6 validation, 6 test images, 2 classes" in said.out
    assert_refused(cli_("train", "--recipe", "micro.toml", "--data", "a", "--test-data", "gone"), "--test-data", "gone")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--image-range", "12"), ("data.image_range",)),
        (("--image-range", "a,b"), ("--image-range: 'a,b' isn't a list of numbers", "--image-range 0,4095")),
        (("--image-range", "9,1"), ("the first one smaller", "--image-range 0,4095")),
        (("--background", "blanc"), ("'blanc' is no colour", "--background")),
        (("--mean", "0.5"), ("mean and std go together",)),
        (("--mean", "0.5", "--std", "0"), ("data.std", "above 0")),
        (("--mean", "x", "--std", "1"), ("--mean: 'x' isn't a list of numbers",)),
        (("--fit", "stretch"), ("data.fit = 'stretch'", "'crop', 'pad' or 'squash'")),
        (("--train-data", "gone"), ("gone",)),
    ],
)
def test_bad_options_are_refused(options: tuple[str, ...], words: tuple[str, ...], here: Path, cli_: Cli) -> None:
    write_set(here / "set")
    (here / "micro.toml").write_text(micro().to_toml())
    assert_refused(cli_("train", "--recipe", "micro.toml", "--out", "run", *options), *words)
    assert not (here / "run").exists()


def test_what_each_replica_left_out_is_listed() -> None:
    ours, theirs = {"train": Skipped({"a.png": "empty"})}, {"train": Skipped({"b.png": "empty"})}
    said = [{part: own.images for part, own in each.items()} for each in (ours, theirs)]
    team = SimpleNamespace(everyone=lambda value: [value, said[1]])
    fitting.add_skipped_of_all(team, ours)  # type: ignore[arg-type]
    assert ours["train"].images == {"a.png": "empty", "b.png": "empty"}
    assert ours["train"].counts() == {"empty": 2}


# From another working directory ----------------------------------------------------------------------------------


def trained_here(here: Path, changes: dict[str, Any] | None = None) -> Path:
    """A finished run by relative paths; and a folder to go to."""
    if not (here / "set").exists():
        write_set(here / "set")
    run.train(micro(changes), out=here / "run")
    (here / "away").mkdir()
    return here / "run"


def test_a_run_goes_on_from_another_working_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(here / "more" / "test", count=3)
    images = {"data.root": "more", "data.test_data": "test"}
    folder = trained_here(here, images)
    before, recipe = using_runs.evaluate_run(folder), (folder / "recipe.toml").read_text()
    assert json.loads((folder / "places.json").read_text())["paths"] == {
        "data.name": str(here / "set"), "data.root": str(here / "more"), "data.test_data": str(here / "more" / "test"),
    }  # fmt: skip
    monkeypatch.chdir(here / "away")
    assert using_runs.evaluate_run(folder) == before
    assert len(list(using_runs.predict(folder, here / "set"))) == 16
    (folder / "places.json").unlink()  # which the checkpoint keeps
    with pytest.warns(match=r"places\.json: missing; taken as the checkpoint keeps it"):
        run.resume(folder, {"training.epochs": 2})
    assert (folder / "recipe.toml").read_text() == recipe.replace("epochs = 1", "epochs = 2"), "it stays portable"
    assert json.loads((folder / "data.json").read_text())["name"] == "set"


def test_what_lies_beside_is_taken_first_if_it_is_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained_here(here)
    (here / "set").rename(here / "away" / "set")
    monkeypatch.chdir(here / "away")
    run.resume(folder, {"training.epochs": 2})
    assert json.loads((folder / "places.json").read_text())["paths"] == {"data.name": str(here / "away" / "set")}
    write_set(here / "set", count=9)
    monkeypatch.chdir(here)
    with pytest.raises(DataError, match=r"^data='set': this is not what the run in .* was trained on"):
        run.resume(folder, {"training.epochs": 3})
    with pytest.raises(DataError, match=r"^data='set': this is not what the run in .* was trained on"):
        using_runs.evaluate_run(folder)
    assert using_runs.evaluate_run(folder, data="away/set")["num_images"] == 3


def test_data_that_is_in_neither_place_is_said_with_both(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained_here(here)
    (here / "set").rename(here / "elsewhere")
    monkeypatch.chdir(here / "away")
    for use in (using_runs.evaluate_run, lambda path: run.resume(path, {"training.epochs": 2})):
        with pytest.raises(DataError) as refused:
            use(folder)
        assert str(refused.value).startswith("No data set or path is called 'set'")
        assert str(refused.value).endswith(
            f" When the run was made, it was {here / 'set'}. If it was moved, say where it is now: data, or root."
        )
    using_runs.evaluate_run(folder, data="../elsewhere")
    run.resume(folder, {"training.epochs": 2, "data.name": "../elsewhere"})
    assert json.loads((folder / "places.json").read_text())["paths"] == {
        "data.name": str(here / "away" / ".." / "elsewhere")
    }


@pytest.mark.heavy
def test_a_reference_is_found_from_another_working_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(here / "set")
    run.train(micro({"local.modules": 1}), out=here / "reference")
    folder = trained_here(here, {"execution.health_every": 1, "execution.health_reference": "reference"})
    monkeypatch.chdir(here / "away")
    run.resume(folder, {"training.epochs": 2})
    (here / "reference").rename(here / "gone")
    with pytest.raises(
        RecipeError, match=r"^health_reference: reference: no run there .* made, it was .*/reference\.$"
    ):
        run.resume(folder, {"training.epochs": 3})


def test_where_sets_lie_that_are_known_by_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = micro({"data.name": "cifar10"})
    assert places.found_places(recipe) == {}
    (here / "data").mkdir()
    found = places.found_places(recipe)
    assert found == {"data.root": str(here / "data")}
    assert places.located(recipe, found) is recipe
    (here / "away").mkdir()
    monkeypatch.chdir(here / "away")
    elsewhere = places.located(recipe, found)
    assert elsewhere.method.data.root == str(here / "data")
    assert places.with_paths_of(elsewhere, recipe) == recipe
    assert places.found_places(micro({"data.name": "digits", "data.root": str(here / "data")})) == {}, "absolute"
