"""Runs whose files were damaged, changed or moved: refused in a line, restored and said, or the same to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import MICRO, Cli, assert_refused, assert_same_run, interrupt_at_step, load_named, metrics_of
from localgrad import run
from localgrad.app import fitting, run_folders, using_runs
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import CheckpointError, DataError, LocalgradError, RunFolderError, RunWarning
from localgrad.training import folder as folder_module
from localgrad.training.events import JsonlSink, read_metrics
from localgrad.training.feature_cache import Rows, open_cache, write_cache
from localgrad.training.folder import RunFolder, is_sound, load_saved_weights, read_text, save_weights
from localgrad.training.trainer import Interrupted


def micro(changes: dict[str, Any] | None = None) -> Recipe:
    return Recipe.from_dict(overlay(MICRO, changes or {}))


@pytest.fixture(autouse=True)
def _quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimating takes longer than a micro run; test_memory.py is about it."""
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))


def quickly(work: Callable[[], object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
        work()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    quickly(lambda: run.train(micro(), out=folder))
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the middle of its third epoch, of 3 batches each."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at_step(patch, 7)
            with pytest.raises(Interrupted):
                run.train(micro(), out=folder)

    quickly(work)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


# Checkpoints and weights -----------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_the_checkpoint_before_the_last_is_kept_until_the_run_is_complete(stopped: Path, finished: Path) -> None:
    positions = [
        torch.load(stopped / "checkpoints" / name, weights_only=True)["position"] for name in ("before.pt", "last.pt")
    ]
    assert [(each["epoch"], each["batch"]) for each in positions] == [(2, 0), (2, 1)]
    assert not (finished / "checkpoints" / "before.pt").exists()


def weights_of(path: Path) -> int:
    """The first byte of a tensor in a checkpoint, where a flipped bit is a wrong number and nothing else."""
    value = torch.load(path, weights_only=True)["learner"]["model"]["head.weight"]
    place = path.read_bytes().find(value.numpy().tobytes())
    assert place > 0
    return place


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", ["bit", "half", "zeros", "empty", "another model's", "gone"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(
    damage: str, copy: Path, finished: Path, tmp_path: Path
) -> None:
    last = copy / "checkpoints" / "last.pt"
    content = last.read_bytes()
    match damage:
        case "bit":
            flip(last, weights_of(last))
        case "half":
            last.write_bytes(content[: len(content) // 2])
        case "zeros":
            last.write_bytes(bytes(len(content)))
        case "empty":
            last.write_bytes(b"")
        case "another model's":
            run.train(micro({"training.epochs": 1, "model.options.embed_dim": 16}), out=tmp_path / "other")
            shutil.copy(tmp_path / "other" / "checkpoints" / "last.pt", last)
        case "gone":
            last.unlink()
    with pytest.warns(RunWarning, match=r"last\.pt: .*; going on from the checkpoint before it, .*before\.pt"):
        run.resume(copy)
    assert_same_run(copy, finished)


@pytest.mark.heavy
def test_of_a_run_module_by_module_the_one_before_may_be_of_the_module_before(tmp_path: Path) -> None:
    """Its features are gone then, or damaged as well, and made again."""
    recipe = micro({"training.schedule": "sequential", "training.epochs": 1, "training.cached_epochs": 1})
    run.train(recipe, out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_step(patch, 5)
        with pytest.raises(Interrupted):
            run.train(recipe, out=tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert torch.load(checkpoints / "before.pt", weights_only=True)["position"]["epoch"] == 1
    flip(tmp_path / "run" / "cache" / "after-module-0" / "train-0.features", 100, 5)
    (checkpoints / "last.pt").write_bytes(b"")
    with pytest.warns(RunWarning, match="going on from the checkpoint before it"):
        run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_without_a_sound_checkpoint_the_run_is_refused(copy: Path) -> None:
    for name in ("last.pt", "before.pt"):
        path = copy / "checkpoints" / name
        flip(path, weights_of(path))
    with pytest.raises(CheckpointError, match=r"last\.pt: .*the checksum of its record .* is wrong.*restore it"):
        run.resume(copy)


def test_a_damaged_last_checkpoint_never_becomes_the_one_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in range(2):
        folder.save_last({"number": number})
    folder.release()
    folder.last.write_bytes(b"damaged")
    again = RunFolder(tmp_path)
    with pytest.warns(RunWarning, match="before"):
        assert again.load_last()["number"] == 0
    again.save_last({"number": 2})
    again.last.write_bytes(b"damaged")
    with pytest.warns(RunWarning, match="before"):
        assert again.load_last()["number"] == 0
    again.release()


class Died(BaseException):
    """The process is gone: nothing that it would still have done is done."""


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("has_parts", [True, False], ids=["parts", "whole"])
def test_there_is_a_sound_checkpoint_after_a_death_at_any_moment(
    has_parts: bool, has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(folder: RunFolder, number: int) -> None:
        if not has_parts:
            folder.save_last({"number": number})
            return
        folder.save_part(f"part-{number}.pt", {"number": number})
        folder.commit({"number": number}, [f"part-{number}.pt"])

    def no_links(*_: object) -> None:
        raise OSError("not supported")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    for moment in range(1, 100):
        calls, is_over = 0, False
        path = tmp_path / str(moment)
        folder = RunFolder(path)
        save(folder, 0)
        save(folder, 1)

        def dying(function: Callable[..., Any], moment: int = moment) -> Callable[..., Any]:
            def called(*arguments: Any, **settings: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= moment:
                    raise Died
                return function(*arguments, **settings)

            return called

        with monkeypatch.context() as patch:
            for owner, name in ((os, "link"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (torch, "save")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save(folder, 2)
                is_over = True
            except Died:
                pass
        folder.release()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = RunFolder(path)
            found = again.load_last()
        assert found["number"] in ((2,) if is_over else (1, 2))
        assert not has_parts or found["parts"][0]["number"] == found["number"]
        assert not said or not has_links
        save(again, 3)
        assert again.load_last()["number"] == 3
        again.last.write_bytes(b"")
        with pytest.warns(RunWarning, match="before"):
            assert again.load_last()["number"] == found["number"]
        again.release()
        if is_over:
            assert moment > 4
            return
    raise AssertionError("it never ends")


def test_parts_of_both_checkpoints_are_kept_and_verified(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for epoch in range(3):
        names = [f"part-{epoch}-{rank}.pt" for rank in range(2)]
        for rank, name in enumerate(names):
            folder.save_part(name, {"weights": torch.full((50,), float(10 * epoch + rank))})
        folder.commit({"epoch": epoch}, names)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("part-*")) == [
        f"part-{epoch}-{rank}.pt" for epoch in (1, 2) for rank in (0, 1)
    ]
    part = checkpoints / "part-2-1.pt"
    flip(part, part.read_bytes().find(torch.full((50,), 21.0).numpy().tobytes()))
    with pytest.warns(RunWarning, match=r"part-2-1\.pt.*going on from the checkpoint before it"):
        assert folder.load_last()["parts"][1]["weights"][0] == 11
    folder.finish()
    folder.release()


def test_one_flipped_bit_in_the_best_weights_is_found(finished: Path, copy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in (folder, copy):
        flip(path / "checkpoints" / "best.safetensors", -1)
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    for use in (using_runs.evaluate_run, lambda path: list(using_runs.predict(path, tmp_path / "image.png"))):
        with pytest.raises(CheckpointError, match=r"damaged .*checksum is wrong.*restore them from a copy"):
            use(folder)
    position = torch.load(copy / "checkpoints" / "last.pt", weights_only=True)["position"]
    assert position["batch"], "the weights of the best epoch are in no checkpoint"
    with pytest.raises(CheckpointError, match=r"best\.safetensors: damaged"):
        run.resume(copy)  # at once, and not after the last epoch


@pytest.mark.heavy
def test_best_weights_that_the_checkpoint_has_are_written_again(tmp_path: Path) -> None:
    recipe = micro({"data.val_fraction": 0.0, "training.ema_decay": 0.5})  # the last epoch is the best
    run.train(recipe, out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, out=tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best.safetensors").write_bytes(b"gone")
    with pytest.warns(RunWarning, match="written again from the checkpoint"):
        run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_equal_weights_are_equal_files_and_plain_safetensors(tmp_path: Path) -> None:
    weights = {"b": torch.randn(3, 2).bfloat16(), "a": torch.tensor(3), "none": torch.empty(0, 4)}
    written = set()
    for number in range(8):  # safetensors itself orders metadata at random
        save_weights(tmp_path / f"{number}", weights)
        written.add((tmp_path / f"{number}").read_bytes())
    assert len(written) == 1
    assert load_file(tmp_path / "0").keys() == load_saved_weights(tmp_path / "0").keys() == weights.keys()
    save_file(weights, tmp_path / "old", metadata={"format": "pt"})
    with pytest.warns(RunWarning, match="without checksums"):
        load_saved_weights(tmp_path / "old")


# Recipe, data.json, summary.json ---------------------------------------------------------------------------------


def test_a_truncated_recipe_is_restored(copy: Path, finished: Path) -> None:
    """What is left of it is another recipe, with another number of epochs."""
    path = copy / "recipe.toml"
    text = path.read_text()
    path.write_text(text[: text.index("[training]")])
    assert Recipe.from_toml(path.read_text()).method.training.epochs != 3
    with pytest.warns(
        RunWarning, match=r"recipe\.toml: damaged or changed since it was written; taken as the checkpoint"
    ):
        run.resume(copy)
    assert path.read_text() == text
    assert is_sound(copy, "recipe.toml")
    assert_same_run(copy, finished)


@pytest.mark.parametrize("damage", ["gone", "empty", "zeros", "no text", "edited"])
def test_any_recipe_that_is_not_the_runs_is_restored(damage: str, copy: Path) -> None:
    path = copy / "recipe.toml"
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        edited = text.replace("epochs = 3", "epochs = 4").encode()
        content = {"empty": b"", "zeros": bytes(len(text)), "no text": b"\xff\xfe", "edited": edited}
        path.write_bytes(content[damage])
    with pytest.warns(RunWarning, match=r"recipe\.toml: .*; taken as the checkpoint keeps it"):
        assert run_folders.read_recipe(copy) == micro()


def test_a_damaged_recipe_without_a_checkpoint_is_refused(copy: Path) -> None:
    shutil.move(copy / "checkpoints" / "checksums.json", copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    shutil.move(copy / "checksums.json", copy / "checkpoints")
    path = copy / "recipe.toml"
    path.write_text(path.read_text()[:100])
    with pytest.raises(RunFolderError, match=r"recipe\.toml: damaged or changed .* no checkpoint keeps it; restore it"):
        run.resume(copy)


def test_what_resume_lays_over_becomes_the_recipe(copy: Path) -> None:
    changed = micro({"execution.accumulation": 2})
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_step(patch, 1)
        with pytest.raises(Interrupted):
            run.resume(copy, changed)
    assert run_folders.read_recipe(copy) == changed
    assert is_sound(copy, "recipe.toml")
    (copy / "recipe.toml").write_text("")
    with pytest.warns(RunWarning, match="taken as the checkpoint keeps it"):
        assert run_folders.read_recipe(copy) == changed


def test_a_recipe_and_a_checkpoint_of_two_runs_are_refused(copy: Path) -> None:
    """Each is sound by itself."""
    folder = RunFolder(copy)
    folder.write_text("recipe.toml", micro({"training.lr": 0.1}).to_toml())
    folder.release()
    with pytest.raises(CheckpointError, match=r"it has another recipe: training\.lr: 0\.002 -> 0\.1"):
        run.resume(copy)


def test_a_plan_that_was_found_on_the_way_fits_the_checkpoint_before_it(copy: Path, finished: Path) -> None:
    """As ``--on-oom replan`` writes it: boundaries in place of their number."""
    folder = RunFolder(copy)
    folder.write_text("recipe.toml", micro({"local.modules": [1], "execution.checkpoint": "blocks"}).to_toml())
    folder.release()
    run.resume(copy)
    assert (copy / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert run_folders.read_recipe(copy).execution.checkpoint == "blocks"


def test_a_recipe_is_known_at_every_moment_of_its_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between checksum and text, once and again: what lies there is sound."""
    folder = RunFolder(tmp_path)
    folder.write_text("recipe.toml", "seed = 1\n")
    replace = Path.replace
    for text in ("seed = 2\n", "seed = 3\n"):
        with monkeypatch.context() as patch:

            def dying(self: Path, target: Path) -> Path:
                if Path(target).name == "recipe.toml":
                    raise KeyboardInterrupt
                return replace(self, target)

            patch.setattr(Path, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                folder.write_text("recipe.toml", text)
        assert read_text(tmp_path, "recipe.toml") == "seed = 1\n"
    folder.write_text("recipe.toml", "seed = 4\n")
    assert read_text(tmp_path, "recipe.toml") == "seed = 4\n"
    folder.release()


def test_a_damaged_data_file_is_restored(copy: Path, tmp_path: Path) -> None:
    path = copy / "data.json"
    text = path.read_text()
    values = json.loads(text)
    path.write_text(json.dumps({**values, "mean": [0.9]}))  # predictions would be of other numbers
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    with pytest.warns(RunWarning, match=r"data\.json: damaged or changed"):
        changed = list(using_runs.predict(copy, tmp_path / "image.png"))
    path.write_text(text)
    assert list(using_runs.predict(copy, tmp_path / "image.png")) == changed


def test_a_damaged_summary_is_made_again(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "test_accuracy": 0.99}))
    with pytest.warns(RunWarning, match=r"summary\.json: damaged; made again"):
        assert run.resume(folder)["test_accuracy"] == summary["test_accuracy"]
    assert_same_run(folder, finished)


def as_older_versions_wrote(folder: Path) -> Path:
    """No checksums, and nothing kept in checkpoints."""
    checkpoints = folder / "checkpoints"
    (checkpoints / "checksums.json").unlink()
    (checkpoints / "before.pt").unlink(missing_ok=True)
    state = torch.load(checkpoints / "last.pt", weights_only=True)
    del state["kept"]
    torch.save(state, checkpoints / "last.pt")
    save_file(load_file(checkpoints / "best.safetensors"), checkpoints / "best.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "data.json").read_text())
    del data["fingerprint"]
    (folder / "data.json").write_text(json.dumps(data))
    return folder


def test_runs_of_older_versions_are_read_and_the_missing_checksums_said(copy: Path, finished: Path) -> None:
    as_older_versions_wrote(copy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.resume(copy)
    assert {str(each.message) for each in said} == {
        f"{copy}: without checksums, as older versions wrote runs; what can't be verified is taken as it is."
    }
    assert [line["val_accuracy"] for line in metrics_of(copy)] == [
        line["val_accuracy"] for line in metrics_of(finished)
    ]
    weights, theirs = (load_file(path / "model.safetensors") for path in (copy, finished))
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
    assert is_sound(copy, "recipe.toml"), "from now on it has one"


# metrics.jsonl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"\xff", b"{", b"\x00", b"0"], ids=repr)
def test_damaged_metrics_are_said_and_completed_from_the_checkpoint(damage: bytes, copy: Path, finished: Path) -> None:
    path = copy / "metrics.jsonl"
    content = path.read_bytes()
    place = content.index(b'"epoch": 0') + 9  # a number, where one more digit is another epoch
    path.write_bytes(content[:place] + damage + content[place + 1 :] if damage != b"0" else content.replace(b"1", b"2"))
    with pytest.warns(RunWarning, match=r"metrics\.jsonl: line.*taken as the checkpoint keeps them"):
        run.resume(copy)
    assert_same_run(copy, finished)


def test_lines_that_are_no_metrics_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == ([], [])
    path.write_bytes(b'{"epoch": 0}\n\xff\xfe\n{"epoch": "x"}\n[1]\n\n{"epoch": 1}\n{"ep')
    assert read_metrics(path) == (['{"epoch": 0}', '{"epoch": 1}'], [2, 3, 4, 5, 7])
    with pytest.warns(RunWarning, match="line 2, 3, 4, 5, 7 damaged; left out"):
        sink = JsonlSink(path, 1)
    sink.close()
    assert path.read_text() == '{"epoch": 0}\n'


# The feature cache -----------------------------------------------------------------------------------------------


def test_a_cache_with_one_flipped_bit_is_not_used(tmp_path: Path) -> None:
    rows = [Rows(torch.randn(4, 3), torch.arange(4), torch.arange(4))]
    folder = tmp_path / "cache" / "after-module-0"
    write_cache(folder, [("train-0", rows)], {"seed": 1})
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), 7):
            flip(path, place)
            found = open_cache(folder, {"seed": 1})
            if found is not None:  # of the manifest's text, white space is free
                assert path.name == "manifest.json"
                assert torch.equal(found.arrays["train-0"].features, rows[0].features.bfloat16())
            path.write_bytes(content)
    assert open_cache(folder, {"seed": 1}) is not None


# Data that was moved ---------------------------------------------------------------------------------------------


def write_images(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                folder / name / f"{index}.png"
            )
    return folder


@pytest.fixture(scope="module")
def of_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of images, stopped in its second epoch; the folder lies beside it."""
    here = tmp_path_factory.mktemp("data")
    write_images(here / "images")

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at_step(patch, 3)
            with pytest.raises(Interrupted):
                run.train(micro({"data.name": str(here / "images"), "training.batch_size": 12}), out=here / "run")

    quickly(work)
    return here


@pytest.fixture
def moved(of_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The same, and the images are in ``elsewhere`` now."""
    shutil.copytree(of_folder / "run", tmp_path / "run")
    shutil.copytree(of_folder / "images", tmp_path / "elsewhere")
    (of_folder / "images").rename(of_folder / "away")
    yield tmp_path
    (of_folder / "away").rename(of_folder / "images")


def with_data(folder: Path, place: Path) -> Recipe:
    return Recipe.from_dict(overlay(run_folders.read_recipe(folder).to_dict(), {"data.name": str(place)}))


@pytest.mark.heavy
def test_moved_data_is_known_by_its_content(moved: Path) -> None:
    folder, place = moved / "run", moved / "elsewhere"
    with pytest.raises(DataError, match=r"If it was moved, say where it is now: data"):
        run.resume(folder)
    with pytest.raises(DataError, match=r"say where it is now: data"):
        using_runs.evaluate_run(folder)
    accuracy = using_runs.evaluate_run(folder, data=str(place))["accuracy"]
    run.resume(folder, with_data(folder, place))
    assert run_folders.read_recipe(folder).method.data.name == str(place)
    assert is_sound(folder, "recipe.toml")
    assert is_sound(folder, "data.json")
    assert using_runs.evaluate_run(folder)["num_images"] == 8
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize("change", ["pixel", "label"])
def test_other_data_is_refused(change: str, moved: Path) -> None:
    folder, place = moved / "run", moved / "elsewhere"
    if change == "pixel":
        image = Image.open(place / "cat" / "3.png").convert("RGB")
        red, green, blue = image.getpixel((0, 0))
        image.putpixel((0, 0), (red ^ 1, green, blue))
        image.save(place / "cat" / "3.png")
    else:
        (place / "cat" / "3.png").rename(place / "dog" / "33.png")
    for use in (
        lambda: run.resume(folder, with_data(folder, place)),
        lambda: using_runs.evaluate_run(folder, data=str(place)),
    ):
        with pytest.raises(DataError, match=r"data=.*elsewhere.: this is not what the run .* was trained on"):
            use()


def test_data_that_changed_in_its_place_is_said(of_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(of_folder / "run", tmp_path / "run"))
    path = of_folder / "images" / "cat" / "3.png"
    content = path.read_bytes()
    Image.new("RGB", (16, 16)).save(path)
    try:
        with pytest.warns(RunWarning, match="it was changed"):
            using_runs.evaluate_run(folder)
    finally:
        path.write_bytes(content)


def test_moved_data_of_an_older_run_is_compared_as_far_as_it_is_known(moved: Path) -> None:
    folder, place = as_older_versions_wrote(moved / "run"), moved / "elsewhere"
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        using_runs.evaluate_run(folder, data=str(place))
        (place / "cat" / "3.png").unlink()
        with pytest.raises(DataError, match="num_train"):
            using_runs.evaluate_run(folder, data=str(place))


def test_images_that_are_decoded_while_training_have_a_fingerprint() -> None:
    from localgrad.training.fingerprint import fingerprint_of

    found = {fingerprint_of(load_named("digits", limit=100, seed=seed)) for seed in (0, 0, 1)}
    assert len(found) == 2


def test_fingerprints_of_files(tmp_path: Path) -> None:
    from localgrad.training.fingerprint import fingerprint_of

    one, other = write_images(tmp_path / "one"), write_images(tmp_path / "other")
    of = {path: fingerprint_of(load_named(str(path), memory_limit_bytes=0)) for path in (one, other)}
    assert of[one] == of[other]
    Image.new("RGB", (16, 16)).save(other / "dog" / "7.png")
    assert fingerprint_of(load_named(str(other), memory_limit_bytes=0)) != of[one]


def test_the_command_line_takes_moved_data_and_says_damage_in_a_line(moved: Path, cli_: Cli) -> None:
    folder, place = moved / "run", moved / "elsewhere"
    assert_refused(cli_("evaluate", str(folder)), "If it was moved", "--data")
    said = cli_("evaluate", str(folder), "--data", str(place))
    assert (said.code, said.err) == (0, "")
    (folder / "recipe.toml").write_text("")
    (folder / "checkpoints" / "last.pt").write_bytes(b"")
    said = cli_("train", "--resume", str(folder), "--data", str(place))
    assert said.code == 0, said
    lines = said.err.splitlines()
    assert all(line.startswith("localgrad: ") for line in lines)
    assert [("recipe.toml" in line, "last.pt" in line) for line in lines] == [(True, False), (False, True)], lines


# Every byte ------------------------------------------------------------------------------------------------------

READ = ("recipe.toml", "data.json", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/before.pt")
READ += ("checkpoints/best.safetensors", "checkpoints/checksums.json")


def damages(content: bytes, seed: str, count: int) -> Iterator[bytes]:
    """Flips at random places, halves, zeros."""
    draws = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        damaged[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        yield bytes(damaged)
    half = len(content) // 2
    yield from (content[:half], content[half:], bytes(len(content)), b"")
    yield content[:half] + bytes(len(content) - half)


def what_is_read(folder: Path, name: str) -> dict[str, Any]:
    """What resuming, evaluating and predicting take from a file of a run, or from what stands for it."""
    held = RunFolder(folder, is_guest=True)
    match name:
        case "checkpoints/best.safetensors":
            return load_saved_weights(held.best)
        case "checkpoints/last.pt" | "checkpoints/before.pt":
            state = run_folders.load_last(held, micro())
            assert state is not None
            return {**state["learner"]["model"], **state["position"], **held.kept, "sums": state["sums"]}
        case "metrics.jsonl":
            lines = folder_module._load_checkpoint(held.last)["kept"]["metrics.jsonl"]
            sink = JsonlSink(folder / "metrics.jsonl", 2, lines)
            sink.close()
            assert read_metrics(folder / "metrics.jsonl") == (sink.lines, [])
            return {"lines": sink.lines}
    return {"recipe": run_folders.read_recipe(folder), "data": run_folders.read_description(folder)}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return bool(ours == theirs)


@pytest.mark.parametrize(
    ("name", "count"),
    [(READ[3], 60), *(pytest.param(name, 200, marks=pytest.mark.heavy) for name in READ)],
)
def test_files_with_flipped_bits_are_refused_or_restored(
    name: str, count: int, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many places of each file, read as a run reads it: the same content, or that of the checkpoint before."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    for module, reader in ((folder_module, "_load_checkpoint"), (using_runs, "load_saved_weights")):
        read, again = getattr(module, reader), cache(getattr(module, reader))
        monkeypatch.setattr(
            module, reader, lambda path, read=read, again=again: (read if path == folder / name else again)(path)
        )
    expected, before = what_is_read(folder, name), {}
    content = (folder / name).read_bytes()
    if name == "checkpoints/last.pt":
        (folder / name).rename(folder / "away")
        with pytest.warns(RunWarning):
            before = what_is_read(folder, name)
        assert not same(before, expected)
    refused = restored = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for damaged in damages(content, name, count):
            (folder / name).write_bytes(damaged)
            said.clear()
            try:
                found = what_is_read(folder, name)
            except CheckpointError as error:
                assert Path(name).name in str(error)
                refused += 1
                continue
            if not same(found, expected):
                assert same(found, before)
                restored += 1
                assert any("before" in str(each.message) for each in said)
    assert (refused > 0.75 * count) == (name == "checkpoints/best.safetensors")
    assert (restored > 0.5 * count) == (name == "checkpoints/last.pt")


def test_no_file_of_a_run_is_left_out(stopped: Path, finished: Path) -> None:
    """But those that nothing reads."""

    def files(folder: Path) -> set[str]:
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        return {str(path) for path in found if path.parts[0] not in ("tensorboard", ".lock", "skipped.csv")}

    of_timm = {"config.json"}  # which timm reads
    assert files(stopped) == {*READ, *of_timm}
    assert files(finished) == {*READ, *of_timm, "summary.json", "model.safetensors"} - {"checkpoints/before.pt"}


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["last.pt", "part-1-0.pt", "part-1-1.pt", "part-0-0.pt"])
def test_parts_with_flipped_bits_give_way_to_those_before(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for epoch in range(2):
        names = [f"part-{epoch}-{rank}.pt" for rank in range(2)]
        for rank, part in enumerate(names):
            folder.save_part(part, {"weights": torch.full((50,), float(10 * epoch + rank))})
        folder.commit({"epoch": epoch}, names)
    folder.release()
    path = tmp_path / "checkpoints" / name
    content = path.read_bytes()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for damaged in damages(content, name, 200):
            path.write_bytes(damaged)
            said.clear()
            found = RunFolder(tmp_path, is_guest=True).load_last()
            assert found["epoch"] == (not said)
            for rank, part in enumerate(found["parts"]):
                assert torch.equal(part["weights"], torch.full((50,), float(10 * found["epoch"] + rank)))


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*READ, "summary.json", "model.safetensors"])
def test_runs_with_flipped_bits_are_refused_or_end_the_same(
    name: str, stopped: Path, finished: Path, tmp_path: Path
) -> None:
    """Each is trained to its end."""
    source = finished if name in ("summary.json", "model.safetensors") else stopped
    content = (source / name).read_bytes()
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        for number, damaged in enumerate(damages(content, f"heavy {name}", 40)):
            folder = Path(shutil.copytree(source, tmp_path / str(number)))
            (folder / name).write_bytes(damaged)
            try:
                run.resume(folder)
            except LocalgradError as error:
                assert name.rsplit("/", maxsplit=1)[-1] in str(error)
                refused += 1
            else:
                if name != "model.safetensors":  # which nothing reads
                    assert_same_run(folder, finished)
            shutil.rmtree(folder)
    assert (refused > 0) == (name == "checkpoints/best.safetensors")
