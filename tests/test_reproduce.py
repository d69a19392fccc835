"""The published tables and ours: what a cell is, that it is run once, and that the docs say what was measured."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from localgrad import cli
from localgrad.app.build import build_recipe_objective
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import RecipeError
from localgrad.objectives.methods import OBJECTIVES
from research.panels import EXACT, IN_PART, RECOMPUTED
from research.reproduce import __main__ as command_line
from research.reproduce import costs, plot, report, results, runner, tables, verb
from research.reproduce.methods import BASELINES, DEFAULT, END_TO_END, METHODS, REMEDIES
from research.reproduce.profiles import CPU, CPU_FULL, DATA, GPU, PROFILES, SMOKE, Wanted
from research.reproduce.published import PUBLISHED, published_for
from research.reproduce.sources import Source, image_format
from research.reproduce.tables import (
    TABLES,
    Cell,
    cells_of,
    command_of,
    epochs_of,
    fingerprint,
    interleaved,
    model_of,
    recipe_of,
    repeating_command_of,
)

ROOT = Path(__file__).parents[1]
EVERY_CELL = [
    (cell, profile) for profile in PROFILES.values() for table in TABLES.values() for cell in cells_of(table, profile)
]
FOLDER = "images"
OF_REMEDIES = ("freeze", "ema_decay", "global_every", "global_tail", "lr_depth", "warmup_stagger", "freeze_from")


# ------------------------------------------------------------------------------------------------- cells


def test_published_figures_are_of_methods_of_ours_and_have_sources() -> None:
    assert {name for figure in PUBLISHED for name in figure.methods} <= METHODS.keys()
    for figure in PUBLISHED:
        assert figure.source.startswith("arXiv ")
        assert figure.data in (*DATA, None)
        assert figure.accuracy is not None or figure.memory_saving is not None
        assert (figure.modules == 1) == (figure.methods == (END_TO_END,))


def test_published_figures_as_quoted() -> None:
    """The numbers to beat, by hand."""
    expected = {
        ("cifar10", "end-to-end", 1): "91.37",
        ("cifar10", "image", 4): "83.38, −38 % memory",  # noqa: RUF001
        ("cifar10", "feature-conv", 4): "86.28, −45 % memory",  # noqa: RUF001
        ("cifar10", "trgl", 4): "86.48 ± 0.54, −29 % memory",  # noqa: RUF001
        ("cifar100", "greedy", 4): "69.34 ± 0.91, −33 % memory",  # noqa: RUF001
        ("stl10", "greedy", 4): "67.00 ± 1.36, −55 % memory",  # noqa: RUF001
        ("svhn", "feature-linear", 2): "−36 % memory",  # noqa: RUF001
    }
    assert {key: str(published_for(*key)) for key in expected} == expected
    assert published_for("svhn", "greedy", 4) is None
    assert published_for("cifar10", DEFAULT, 4) is None


@pytest.mark.parametrize("method", [*METHODS, *REMEDIES])
def test_a_method_changes_nothing_that_all_have_in_common(method: str) -> None:
    keys = {**METHODS, **REMEDIES}[method].keys()
    allowed = {"local.objective", "local.options", "execution.checkpoint"}
    if method in BASELINES:
        allowed |= {"local.modules", "training.freeze"}
    if method in REMEDIES:
        allowed |= {"local.overlap", *(f"training.{name}" for name in OF_REMEDIES)}
    assert keys <= allowed


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_recipes_of_one_table_differ_in_their_local_modules_alone(profile: Any) -> None:
    for table in TABLES.values():
        for data, epochs in itertools.product(table.data, epochs_of(table, profile)):
            cells = [cell for cell in cells_of(table, profile) if (cell.data, cell.epochs) == (data, epochs)]
            shared = []
            for cell in cells:
                values = overlay(recipe_of(cell, profile), {"seed": 0, "local": None})
                values["execution"] = values.pop("execution", {}) | {"checkpoint": None}
                values["training"] = {key: value for key, value in values["training"].items() if key not in OF_REMEDIES}
                shared.append(json.dumps(values, sort_keys=True))
            assert len(set(shared)) == min(1, len(cells))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_recipes_are_possible(profile: Any) -> None:
    for table in TABLES.values():
        for cell in cells_of(table, profile, seeds=[3]):
            recipe = Recipe.from_dict(recipe_of(cell, profile))
            assert (recipe.method.data.name, recipe.method.seed) == (cell.data, 3)
            assert recipe.method.local.modules == cell.modules
            assert recipe.method.training.epochs == cell.epochs
            known = {option.name for option in fields(OBJECTIVES[recipe.method.local.objective])}
            assert recipe.method.local.options.keys() <= known
            build_recipe_objective(recipe)


def test_a_shorter_run_has_the_same_shape() -> None:
    cells = [Cell("epochs", "cifar10", "greedy", 4, 0, epochs) for epochs in epochs_of(TABLES["epochs"], CPU)]
    recipes = [recipe_of(cell, CPU)["training"] for cell in cells]
    shares = {round(training["warmup_epochs"] / training["epochs"], 9) for training in recipes}
    assert len(shares) == 1
    assert [training["epochs"] for training in recipes] == sorted(training["epochs"] for training in recipes)


def test_digits_are_not_mirrored_and_the_full_recipe_is_the_papers() -> None:
    recipe = recipe_of(Cell("svhn", "svhn", "greedy", 4, 0, 300), GPU)
    assert recipe["augment"]["flip"] is False
    recipe = recipe_of(Cell("cifar10", "cifar10", "greedy", 4, 0, 300), GPU)
    assert recipe["augment"]["flip"] is True
    assert recipe["training"] == {
        "epochs": 300, "batch_size": 1024, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05,
        "scheduler": "cosine", "warmup_epochs": 20, "warmup_lr": 1e-6, "min_lr": 1e-6,
    }  # fmt: skip
    assert recipe["local"] == {"modules": 4, "objective": "greedy", "options": {"classifier": "linear"}}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
@pytest.mark.parametrize("model", ["swin", "vit"])
def test_profiles_know_how_many_blocks_their_models_have(profile: Any, model: str) -> None:
    table = "cifar10" if model == "swin" else "vit"
    settings = Recipe.from_dict(recipe_of(Cell(table, "cifar10", "greedy", 2, 0, 1), profile)).method.model
    sizes = {"img_size": settings.img_size, "patch_size": settings.patch_size}
    with torch.device("meta"):
        made = timm.create_model(settings.name, **settings.options, **{k: v for k, v in sizes.items() if v})
    blocks = made.blocks if model == "vit" else [block for layer in made.layers for block in layer.blocks]
    assert len(blocks) == profile.num_blocks[model]


def test_cells_come_in_an_order_that_tells_most_first() -> None:
    cells = cells_of(TABLES["cifar10"], CPU)
    assert cells[0] == Cell("cifar10", "cifar10", END_TO_END, 1, 0, CPU.epochs)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    local = len(METHODS.keys() - BASELINES.keys())
    assert {cell.modules for cell in cells[1 : 1 + local]} == {4}
    assert {cell.method for cell in cells[: len(METHODS)]} == set(METHODS)
    assert len(set(cells)) == len(cells)
    assert {cell.modules for cell in cells} == {1, 2, 4, 6, 12}
    vit = cells_of(TABLES["vit"], CPU)
    assert {cell.modules for cell in vit} == {1, 2, 4, 6}, "the small ViT has no twelve blocks"
    assert {cell.modules for cell in cells_of(TABLES["cifar10"], GPU)} == {1, 2, 4, 6, 12}
    mixed = interleaved(cell for name in ("svhn", "ranking") for cell in cells_of(TABLES[name], CPU))
    assert [cell.seed for cell in mixed] == sorted(cell.seed for cell in mixed)


def test_an_agenda_is_run_in_its_order_and_tables_share_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "_sources", lambda _: dict.fromkeys(DATA))
    cells = [errand.cell for errand in verb.chosen_errands(verb.Settings(profile="cpu-full"))]
    assert len(set(cells)) == len(cells)
    first = [(cell.method, cell.modules) for cell in cells[:9]]
    assert first[0] == (END_TO_END, 1)
    assert {*first} == {
        *((END_TO_END, 1), ("half-frozen", 1), ("greedy", 4), ("image", 4), ("feature-linear", 4)),
        *((DEFAULT, 4), ("trgl", 4), (DEFAULT, 2), ("feature-linear", 2)),
    }
    assert {cell.seed for cell in cells[:9]} == {0}
    assert {cell.seed for cell in cells[9:19]} == {1, 2}
    assert list(dict.fromkeys(cell.table for cell in cells)) == ["cifar10", "cifar100", "epochs", "ranking", "vit"]
    assert all(cell.method in TABLES[cell.table].methods for cell in cells), "or its row would be in no table"
    own = [cell for cell in cells if cell.table == "cifar10"]
    assert cells_of(TABLES["cifar10"], CPU_FULL) == own
    assert {cell.seed for cell in cells_of(TABLES["cifar10"], CPU_FULL, seeds=[5])} == {5}
    longer = recipe_of(next(cell for cell in cells if cell.epochs == 60), CPU_FULL)
    assert "limit" not in longer["data"]
    assert longer["training"]["warmup_epochs"] == 6
    again = fingerprint(recipe_of(next(cell for cell in cells if cell.table == "epochs"), CPU_FULL))
    assert again == fingerprint(recipe_of(own[0], CPU_FULL))


def test_fingerprints_tell_runs_apart() -> None:
    runs: dict[str, set[tuple[Any, ...]]] = {}
    for cell, profile in EVERY_CELL:
        if cell.seed > (cell.table == "ranking"):  # one table with a second seed tells that it counts
            continue
        own = (profile.name, TABLES[cell.table].model, cell.data, cell.modules, cell.seed, cell.epochs)
        runs.setdefault(fingerprint(recipe_of(cell, profile)), set()).add((*own, cell.method))
    twice = [same for same in runs.values() if len({run[:-1] for run in same}) > 1]
    assert not twice
    cell = Cell("cifar10", "cifar10", "greedy", 4, 0, CPU.epochs)
    in_ranking = Cell("ranking", *(getattr(cell, name) for name in ("data", "method", "modules", "seed", "epochs")))
    assert fingerprint(recipe_of(cell, CPU)) == fingerprint(recipe_of(in_ranking, CPU)), "tables share runs"


def test_fingerprints_tell_meanings_apart_and_not_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe_of(Cell("cifar10", "cifar10", "greedy", 4, 0, CPU.epochs), CPU)
    own = fingerprint(values)
    assert fingerprint(Recipe.from_dict(values).to_dict()) == own, "a default that is typed is the same recipe"
    assert fingerprint(overlay(values, {"execution.device": "cuda", "execution.num_threads": 3})) == own
    assert fingerprint(overlay(values, {"execution.precision": "fp32"})) != own
    assert fingerprint(overlay(values, {"training.ema_decay": 0.998})) != own
    monkeypatch.setattr(tables, "REVISION", tables.REVISION + 1)
    assert fingerprint(values) != own


PUBLISHED_TABLES = sorted(Path(__file__).parents[1].glob("research/results/*-cpu.json"))


@pytest.mark.parametrize("path", PUBLISHED_TABLES, ids=lambda path: path.stem)
def test_published_rows_are_those_of_todays_recipes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And still when recipes have got new keys."""
    rows = json.loads(path.read_text())
    assert rows
    table = path.stem.removesuffix("-cpu")

    def outdated() -> list[Any]:
        cells = [Cell(table, *(row[key] for key in ("data", "method", "modules", "seed", "epochs"))) for row in rows]
        return [
            row for row, cell in zip(rows, cells, strict=True) if fingerprint(recipe_of(cell, CPU)) != row["recipe"]
        ]

    assert not outdated()
    to_dict = Recipe.to_dict
    new = {
        "data.fit": "crop",
        "data.on_broken": "",
        "local.new": 0,
        "execution.new": 3,
        "later.table": [1],
        "new": False,
    }
    monkeypatch.setattr(Recipe, "to_dict", lambda self: overlay(to_dict(self), new))
    assert not outdated()


@pytest.mark.parametrize("key", ["data.fit", "execution.new", "later.table", "later.more.so", "top"])
def test_a_new_key_counts_where_it_is_not_the_default(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe_of(Cell("cifar10", "cifar10", "greedy", 4, 0, CPU.epochs), CPU)
    own = fingerprint(values)
    to_dict, default = Recipe.to_dict, Recipe()
    monkeypatch.setattr(Recipe, "to_dict", lambda self: overlay(to_dict(self), {key: 1 if self == default else 2}))
    changed = fingerprint(values)
    assert changed != own
    monkeypatch.setattr(Recipe, "to_dict", lambda self: overlay(to_dict(self), {} if self == default else {key: 2}))
    assert fingerprint(values) == changed, "a default of None is left out"
    monkeypatch.setattr(Recipe, "to_dict", lambda self: overlay(to_dict(self), {key: 1 if self == default else 3}))
    assert fingerprint(values) != changed


def test_a_changed_default_of_a_known_key_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe_of(Cell("cifar10", "cifar10", "greedy", 4, 0, CPU.epochs), CPU)
    own, to_dict = fingerprint(values), Recipe.to_dict
    monkeypatch.setattr(Recipe, "to_dict", lambda self: overlay(to_dict(self), {"training.cached_epochs": 5}))
    assert fingerprint(values) != own


def test_a_command_runs_its_cell_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[verb.Settings] = []
    monkeypatch.setattr(verb, "list_cells", lambda settings, _say: taken.append(settings))
    some = [pair for pair in EVERY_CELL if pair[0].seed == 0][::15]
    some += [(Cell("cifar10", "cifar10", "greedy", 4, 7, 3), SMOKE)]
    for cell, profile in some:
        words = shlex.split(repeating_command_of(cell, profile, None, device="cpu", num_threads=2))
        assert words[:3] == ["python", "-m", "research.reproduce"]
        said = CliRunner().invoke(command_line.app, [*words[3:], "--dry-run"])
        assert said.exit_code == 0, said.output
        (errand,) = verb.chosen_errands(taken.pop())
        assert (errand.cell, errand.execution["execution.num_threads"]) == (cell, 2), words


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, ""),
        ("data/my cifar", " --data-path cifar10='data/my cifar'"),
        ("/home/me/cifar", " --data-path cifar10=FOLDER"),
        ("~/cifar", " --data-path cifar10=FOLDER"),
    ],
)
def test_a_command_names_no_folder_of_this_machine(path: str | None, words: str) -> None:
    cell = Cell("ranking", "cifar10", "greedy", 4, 2, CPU.epochs)
    expected = "python -m research.reproduce ranking --profile cpu --methods greedy --modules 4 --seeds 2"
    assert command_of(cell, CPU, path) == expected + words
    again = repeating_command_of(cell, CPU, path, device="cuda", num_threads=2)
    assert again == f"{expected}{words} --device cuda --num-threads 2 --again"
    assert repeating_command_of(cell, CPU, path, device="cpu", num_threads=None) == f"{expected}{words} --again"


def test_models_in_words() -> None:
    assert model_of({"model": {"name": "vit"}}) == "vit"
    values = {"model": {"name": "swin", "img_size": 32, "options": {"depths": [2, 2]}}}
    assert model_of(values) == "swin, depths=[2, 2], img_size=32"


# ------------------------------------------------------------------------------------------------ images


def write_folder(path: Path, kind: str = "png", num_images: int = 12) -> None:
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (path / part / name).mkdir(parents=True)
            for index in range(num_images):
                pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / part / name / f"{index}.{kind}")


@pytest.mark.parametrize(("kind", "words"), [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WebP"), ("bmp", "BMP")])
def test_copies_are_told_from_official_files(tmp_path: Path, kind: str, words: str) -> None:
    write_folder(tmp_path / "set", kind, 2)
    label = Source("cifar10", str(tmp_path / "set")).label
    assert label == f"a folder of {words} copies, not compared with the official pixels"
    assert "official files" in Source("cifar10").label


def test_folders_are_told_apart_by_their_files_and_not_by_where_they_lie(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", num_images=2)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    write_folder(tmp_path / "larger", num_images=3)
    digests = [Source("cifar10", str(tmp_path / name)).digest for name in ("set", "copy", "larger")]
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "copy/.cache").mkdir()
    (tmp_path / "copy/.cache/notes").write_text("no image")
    assert Source("cifar10", str(tmp_path / "copy")).digest == digests[0]
    (tmp_path / "copy/train/cat/0.png").rename(tmp_path / "copy/train/dog/9.png")
    assert Source("cifar10", str(tmp_path / "copy")).digest != digests[0]
    assert Source("cifar10").digest == "official"


def test_webp_may_be_lossless(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.webp", lossless=True)
    assert image_format((tmp_path / "a.webp").read_bytes()) == "lossless WebP"
    assert image_format(b"") == "other"


# ------------------------------------------------------------------------------------------------ running

FAKE = """
import hashlib, json, os, signal, struct, sys, time
from pathlib import Path

words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(words.get("--out") or words["--resume"])
with open("calls.txt", "a") as calls:
    print("resume" if "--resume" in words else "start", folder.name.split("-k")[0], file=calls)
folder.mkdir(parents=True, exist_ok=True)
if "--recipe" in words:
    (folder / "recipe.toml").write_text(Path(words["--recipe"]).read_text())
if "FAKE_SLOW" in os.environ:
    time.sleep(0.5)
if os.environ.get("FAKE_FAILS", "none") in folder.name:
    sys.exit("some lines\\nlocalgrad: it went wrong")
if os.environ.get("FAKE_WAITS", "none") in folder.name and "--resume" not in words:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (folder / "waiting").touch()
    time.sleep(60)
seed = int(folder.name.split("seed")[1].split("-")[0])
(folder / "data.json").write_text(json.dumps({"num_train": 60, "num_val": 6, "num_test": 24, "notes": ["Cut."]}))
tensors = {"w": {"dtype": "BF16", "shape": [30, 41]}, "i": {"dtype": "I64", "shape": [9]}}
header = json.dumps({"__metadata__": {}, **tensors})
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
(folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "train_accuracy": 0.6}) + "\\n")
(folder / "summary.json").write_text(json.dumps({
    "test_accuracy": (0.8 if "end-to-end" in folder.name else 0.7) + seed / 100, "best_epoch": 1, "seconds": 36.0,
    "estimated_peak_bytes": 30, "estimated_end_to_end_peak_bytes": 60,
    "device": os.environ.get("FAKE_DEVICE", "abacus processor, 2 threads"),
    "val_accuracy": 0.5 + ("greedy" in folder.name) / 10,
    "test_module_accuracy": [0.1], "measured_peak_bytes": 2**20, "measured_peak_of": "all", "images_per_second": 9.0,
    "versions": {},
}))
sums = {name: [hashlib.sha256((folder / name).read_bytes()).hexdigest()]
        for name in ("recipe.toml", "data.json", "summary.json")}
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "checkpoints" / "checksums.json").write_text(json.dumps(
    {"files": sums, "sha256": hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()}))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a folder of images, where cells are run by a stand-in for training."""
    (tmp_path / "fake.py").write_text(FAKE)
    home = tmp_path / "here"
    write_folder(home / FOLDER, num_images=2)
    monkeypatch.chdir(home)
    monkeypatch.setattr(runner, "commit_of_code", lambda: "abc1234")
    monkeypatch.setattr(runner, "TRAIN", (sys.executable, str(tmp_path / "fake.py")))
    return home


def asked(**settings: Any) -> verb.Settings:
    usual = {"table": "cifar10", "profile": "smoke", "data_path": [f"cifar10={FOLDER}"], "modules": "2"}
    return verb.Settings(**(usual | settings))


def rows_of(table: str = "cifar10") -> list[dict[str, Any]]:
    return json.loads(Path(f"research/results/{table}-smoke.json").read_text())


def calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines()


def test_cells_are_run_once_and_written_down(here: Path) -> None:
    said: list[str] = []
    assert verb.fill(asked(methods="greedy,end-to-end", seeds="0,1"), said.append) == 0
    assert calls() == ["start cifar10-end-to-end", "start cifar10-greedy"] * 2
    assert said[0] == "4 cells, 0 done"
    assert said[-1].split(maxsplit=1)[0] == "4/4"
    rows = rows_of()
    assert [(row["method"], row["modules"], row["seed"]) for row in rows] == [
        ("end-to-end", 1, 0), ("end-to-end", 1, 1), ("greedy", 2, 0), ("greedy", 2, 1)
    ]  # fmt: skip
    row = rows[2]
    assert set(results.KEYS) <= row.keys()
    assert (row["test_accuracy"], row["peak_bytes"], row["peak_ratio"], row["seconds"]) == (0.7, 30, 0.5, 36.0)
    assert (row["profile"], row["epochs"], row["train_accuracy"], row["num_train"]) == ("smoke", 2, 0.6, 60)
    assert row["data_source"].startswith("a folder of PNG copies")
    command = "python -m research.reproduce cifar10 --profile smoke --methods greedy --modules 2 --seeds 0"
    threads = os.cpu_count()
    assert row["command"] == f"{command} --data-path cifar10={FOLDER} --num-threads {threads} --again"
    assert (row["num_parameters"], row["notes"], row["peak_of"]) == (1230, ["Cut."], "estimate")
    assert row["commit"]

    said.clear()
    assert verb.fill(asked(methods="greedy,end-to-end", seeds="0,1"), said.append) == 0
    assert (said, len(calls())) == (["4 cells, 4 done"], 4)
    assert rows_of() == rows


def test_a_result_that_was_lost_is_read_from_its_run(here: Path) -> None:
    verb.fill(asked(methods="greedy"), lambda _: None)
    rows = rows_of()
    Path("research/results/cifar10-smoke.json").unlink()
    assert verb.fill(asked(methods="greedy"), lambda _: None) == 0
    assert (rows_of(), len(calls())) == (rows, 1)


def test_a_cell_is_repeated_by_its_own_command(here: Path) -> None:
    verb.fill(asked(methods="greedy"), lambda _: None)
    (row,) = rows_of()
    for _ in range(2):
        assert CliRunner().invoke(command_line.app, shlex.split(row["command"])[3:]).exit_code == 0
    assert calls() == ["start cifar10-greedy"] * 3
    assert rows_of() == [row]
    assert len(list(Path("runs/reproduce/smoke").glob("*/summary.json"))) == 3


def test_a_repetition_that_was_stopped_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb.fill(asked(methods="greedy"), lambda _: None)
    monkeypatch.setenv("FAKE_FAILS", "again1")
    assert verb.fill(asked(methods="greedy", again=True), lambda _: None) == 1
    monkeypatch.delenv("FAKE_FAILS")
    assert verb.fill(asked(methods="greedy", again=True), lambda _: None) == 0
    assert calls() == ["start cifar10-greedy", "start cifar10-greedy", "resume cifar10-greedy"]


@pytest.mark.parametrize("again", [False, True])
def test_tables_that_run_at_a_time_share_runs(here: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    monkeypatch.setenv("FAKE_SLOW", "")
    settings = asked(table="cifar10,ranking", methods="greedy,end-to-end", modules="4", jobs=3, again=again)
    said: list[str] = []
    assert verb.fill(settings, said.append) == 0
    assert sorted(calls()) == ["start cifar10-end-to-end", "start cifar10-greedy"]
    assert said[-1].split(maxsplit=1)[0] == "4/4"
    assert len(rows_of()) == len(rows_of("ranking")) == 2


def test_tables_share_runs(here: Path) -> None:
    verb.fill(asked(methods="greedy", modules="4"), lambda _: None)
    said: list[str] = []
    assert verb.fill(asked(table="ranking", methods="greedy", modules="4"), said.append) == 0
    assert (said, len(calls())) == (["1 cells, 1 done"], 1)
    (row,) = rows_of("ranking")
    assert row["command"].startswith("python -m research.reproduce ranking ")
    assert {**row, "command": ""} == {**rows_of()[0], "command": ""}


def test_other_images_are_other_cells(here: Path) -> None:
    write_folder(here / "lossy", "jpeg", 2)
    verb.fill(asked(methods="greedy"), lambda _: None)
    verb.fill(asked(methods="greedy", data_path=["cifar10=lossy"]), lambda _: None)
    assert sorted(row["data_source"].split()[3] for row in rows_of()) == ["JPEG", "PNG"]
    write_folder(here / "more", num_images=3)
    verb.fill(asked(methods="greedy", data_path=["cifar10=more"]), lambda _: None)
    assert len(rows_of()) == len(calls()) == 3
    text = report.markdown(TABLES["cifar10"], SMOKE, rows_of())
    assert text.count("| greedy | 2 | 70.00 | 60.0 | 1 |") == 3
    for row in rows_of():
        assert f"to test on, files {row['data_digest']} (Cut)" in text


def test_a_cell_that_fails_does_not_stop_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "end-to-end-k1")
    said: list[str] = []
    assert verb.fill(asked(methods="end-to-end,greedy"), said.append) == 1
    assert [row["method"] for row in rows_of()] == ["greedy"]
    (failed,) = [line for line in said if line.startswith("failed")]
    assert "end-to-end on cifar10, K = 1, seed 0, 2 epochs: it went wrong (more in runs/reproduce/smoke/" in failed
    assert said[-1] == "1 of 2 cells failed; the same command tries them again"
    monkeypatch.delenv("FAKE_FAILS")
    assert verb.fill(asked(methods="end-to-end,greedy"), said.append) == 0
    assert calls()[-1] == "resume cifar10-end-to-end"


def test_a_data_set_that_is_missing_fails_its_own_cells(here: Path) -> None:
    said: list[str] = []
    assert verb.fill(asked(table="cifar10,svhn", methods="end-to-end"), said.append) == 1
    assert [row["data"] for row in rows_of()] == ["cifar10"]
    (failed,) = [line for line in said if line.startswith("failed")]
    assert "svhn is not (or not complete)" in failed
    assert "--data-path svhn=FOLDER" in failed
    assert "\n" not in failed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_keeps_what_is_finished_and_goes_on_later(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("FAKE_WAITS", "greedy")
    before = signal.getsignal(number)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("started") and "greedy" in line:
            while not list(here.glob("runs/*/*/*greedy*/waiting")):
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    assert verb.fill(asked(methods="end-to-end,greedy,default"), say) == 128 + number
    assert signal.getsignal(number) == before
    assert [row["method"] for row in rows_of()] == ["end-to-end"]
    assert said[-1].startswith("stopped; 1 of 3 cells are done")
    assert calls() == ["start cifar10-end-to-end", "start cifar10-greedy"]
    states: list[str] = []
    verb.list_cells(asked(methods="end-to-end,greedy,default"), states.append)
    assert [line.split(" python -m")[0].strip() for line in states] == ["done", "begun", "not run"]

    assert verb.fill(asked(methods="end-to-end,greedy,default"), said.append) == 0
    assert calls()[2:] == ["resume cifar10-greedy", "start cifar10-default"]
    assert len(rows_of()) == 3


def test_several_cells_at_a_time(here: Path) -> None:
    said: list[str] = []
    settings = asked(methods="end-to-end,greedy,default,image", jobs=3)
    assert verb.fill(settings, said.append) == 0
    assert [line.split()[0] for line in said[1:4]] == ["started"] * 3
    assert len(rows_of()) == 4
    threads = max(1, (os.cpu_count() or 1) // 3)
    assert {errand.execution["execution.num_threads"] for errand in verb.chosen_errands(settings)} == {threads}


def test_a_result_of_a_changed_recipe_is_run_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb.fill(asked(methods="greedy"), lambda _: None)
    monkeypatch.setitem(SMOKE.settings, "training.lr", 5e-4)
    assert verb.fill(asked(methods="greedy"), lambda _: None) == 0
    assert calls() == ["start cifar10-greedy"] * 2
    text = report.markdown(TABLES["cifar10"], SMOKE, rows_of())
    assert "1 runs of recipes that have changed since are left out." in text


@pytest.mark.heavy
def test_a_smoke_cell_from_its_command_to_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true thing, on a parquet folder in the Hugging Face layout; but for its memory."""
    quickly = "from ranks import estimate_nothing; estimate_nothing(); from localgrad import cli; cli.main()"
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    monkeypatch.setattr(runner, "TRAIN", (sys.executable, "-c", path + quickly, *runner.TRAIN[3:]))
    assert smoke_cell(tmp_path, monkeypatch)["peak_ratio"] == 1


@pytest.mark.heavy
def test_a_smoke_cell_tells_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < smoke_cell(tmp_path, monkeypatch)["peak_ratio"] < 1


def smoke_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import datasets

    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    Path("cifar").mkdir()
    for part, count in (("train", 60), ("test", 20)):
        images = [Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"image": images, "label": [index % 2 for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(f"cifar/{part}-00000-of-00001.parquet")
    words = "cifar10 --profile smoke --methods greedy --modules 2 --epochs 1 --seeds 0 --num-threads 1"
    said = CliRunner().invoke(command_line.app, [*words.split(), "--device", "cpu", "--data-path", "cifar10=cifar"])
    assert said.exit_code == 0, said.output
    (row,) = rows_of()
    assert row["command"] == f"python -m research.reproduce {words}".replace(
        " --epochs 1 --seeds 0 --num-threads 1",
        " --seeds 0 --epochs 1 --data-path cifar10=cifar --num-threads 1 --again",
    )
    assert (row["num_parameters"] > 1000, row["num_threads"]) == (True, 1)
    assert (row["num_train"], row["num_test"], row["epochs"]) == (54, 20, 1)
    assert len(row["module_accuracy"]) == 2
    Path("docs.md").write_text("<!-- table: cifar10 smoke -->\n<!-- end -->\n")
    said = CliRunner().invoke(command_line.app, ["--report", "--docs", "docs.md"])
    assert said.output == "docs.md: rewritten\n"
    text = Path("docs.md").read_text().replace(f" {report.DAGGER}", "")  # code that no commit holds yet
    accuracies = f"{100 * row['test_accuracy']:.2f} | {100 * row['train_accuracy']:.1f}"
    assert f"| greedy | 2 | 1 | {accuracies} | 1 | baseline not run |" in text
    assert CliRunner().invoke(command_line.app, ["--report", "--check", "--docs", "docs.md"]).exit_code == 0
    return row


# ------------------------------------------------------------------------------------------------- report


def test_the_docs_are_in_step_with_the_results() -> None:
    assert report.differences(ROOT / "research/docs/accuracy.md", ROOT / "research/results") == []


def test_results_that_are_committed_are_complete() -> None:
    known = {
        results.path_of(ROOT / "research/results", table, profile): (table, profile)
        for table in TABLES
        for profile in PROFILES
    }
    for path in (ROOT / "research/results").glob("*.json"):
        table, profile = known[path]
        for row in results.load_rows(path):
            assert row["profile"] == profile
            assert row["command"].startswith(f"python -m research.reproduce {table} --profile {profile} ")
            assert row["command"].endswith(" --again")


def test_rows_that_were_not_run_are_counted_in_a_line(here: Path) -> None:
    command = "`python -m research.reproduce cifar10 --profile"
    empty = report.markdown(TABLES["cifar10"], GPU, [])
    assert not [line for line in empty.splitlines() if line.startswith("|")]
    of_gpu = len({(cell.method, cell.modules) for cell in cells_of(TABLES["cifar10"], GPU)})
    assert f"Not run yet: {of_gpu} of {of_gpu} rows; {command} gpu` fills them." in empty
    verb.fill(asked(methods="end-to-end,greedy", modules="2"), lambda _: None)
    text = report.markdown(TABLES["cifar10"], SMOKE, rows_of())
    names = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert names == ["| method", "| end-to-end", "| greedy"]
    of_smoke = len({(cell.method, cell.modules) for cell in cells_of(TABLES["cifar10"], SMOKE)})
    assert f"Not run yet: {of_smoke - 2} of {of_smoke} rows; {command} smoke` fills them." in text


def test_figures_over_seeds(here: Path) -> None:
    """Against a reckoning by hand: end-to-end is 80, 81, 82 percent, greedy 10 points less, seed by seed."""
    verb.fill(asked(methods="end-to-end,greedy", seeds="0,1,2"), lambda _: None)
    text = report.markdown(TABLES["cifar10"], SMOKE, rows_of())
    spread = statistics.stdev([80, 81, 82])
    assert f"| end-to-end | 1 | 81.00 ± {spread:.2f} | 60.0 | 3 |  | 0.50 x | 1.00 MiB | 0.01 | 91.37 [1] |" in text
    assert "| greedy | 2 | 71.00 ± 1.00 | 60.0 | 3 | −10.00 ± 0.00 | 0.50 x | 1.00 MiB | 0.01 |  |" in text  # noqa: RUF001
    assert "images from a folder of PNG copies, not compared with the official pixels" in text
    ranked = report.markdown(
        TABLES["ranking"], SMOKE, [row | {"modules": 4} for row in rows_of() if row["method"] == "greedy"]
    )
    assert "left out" in ranked, "a row that was edited by hand isn't the recipe that it says"


def test_a_ranking_goes_by_validation(here: Path) -> None:
    """End-to-end has the best test accuracy, greedy the best validation accuracy."""
    verb.fill(asked(table="ranking", methods="greedy,end-to-end,image", modules="4"), lambda _: None)
    text = report.markdown(TABLES["ranking"], SMOKE, rows_of("ranking"))
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert names == ["greedy", "end-to-end", "image"]
    assert "| greedy | 4 | 60.00 | 70.00 | 60.0 | 1 |" in text
    assert "The order, and the choice of `default`, go by validation accuracy" in text
    verb.fill(asked(methods="greedy"), lambda _: None)
    assert "| validation" not in report.markdown(TABLES["cifar10"], SMOKE, rows_of()), "it isn't ranked"


def test_an_average_is_held_against_end_to_end_training_with_one(here: Path) -> None:
    verb.fill(
        asked(table="ranking", methods="average,end-to-end,end-to-end-average,default", modules="4"), lambda _: None
    )
    accuracies = {"average": 0.71, "end-to-end": 0.6, "end-to-end-average": 0.7, "default": 0.62}
    rows = [{**row, "test_accuracy": accuracies[row["method"]]} for row in rows_of("ranking")]
    text = report.markdown(TABLES["ranking"], SMOKE, rows)
    assert "| average | 4 | 50.00 | 71.00 | 60.0 | 1 | +1.00 | 0.50 x |" in text
    assert "| default | 4 | 50.00 | 62.00 | 60.0 | 1 | +2.00 | 0.50 x |" in text
    assert "| end-to-end-average | 1 | 50.00 | 70.00 | 60.0 | 1 | +10.00 | 0.50 x |" in text
    assert "is held against `end-to-end-average`" in text
    alone = report.markdown(TABLES["ranking"], SMOKE, [row for row in rows if row["method"] != "end-to-end-average"])
    assert "| average | 4 | 50.00 | 71.00 | 60.0 | 1 | baseline not run | 0.50 x |" in alone


@pytest.mark.parametrize(
    ("epochs", "best", "is_marked"),
    [
        (50, 37, True),
        (50, 44, True),
        (50, 45, False),
        (50, 49, False),
        (50, None, False),
        (12, 9, True),
        (12, 10, False),
    ],
)
def test_a_best_epoch_before_a_remedy_began_is_marked(
    here: Path, epochs: int, best: int | None, *, is_marked: bool
) -> None:
    verb.fill(asked(table="ranking", methods="global-tail-10,default", modules="4", epochs=str(epochs)), lambda _: None)
    text = report.markdown(TABLES["ranking"], SMOKE, [{**row, "best_epoch": best} for row in rows_of("ranking")])
    assert ("| global-tail-10 ‡ |" in text) == is_marked
    assert ("came before the method's own part" in text) == is_marked
    assert "| default |" in text


def test_a_gap_over_fewer_seeds_says_so(here: Path) -> None:
    verb.fill(asked(methods="end-to-end", seeds="0"), lambda _: None)
    verb.fill(asked(methods="greedy", seeds="0,1"), lambda _: None)
    assert " (1 seed) | " in report.markdown(TABLES["cifar10"], SMOKE, rows_of())


def test_kinds_of_devices_are_never_averaged(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb.fill(asked(methods="greedy,end-to-end", seeds="0"), lambda _: None)
    monkeypatch.setenv("FAKE_DEVICE", "abacus processor, 1 threads")
    verb.fill(asked(methods="greedy", seeds="1"), lambda _: None)
    assert "| greedy | 2 | 70.50 ± 0.71 | 60.0 | 2 |" in report.markdown(TABLES["cifar10"], SMOKE, rows_of())
    monkeypatch.setenv("FAKE_DEVICE", "NVIDIA Abacus")
    verb.fill(asked(methods="greedy", seeds="2"), lambda _: None)
    text = report.markdown(TABLES["cifar10"], SMOKE, rows_of())
    assert "| greedy | 2 | 70.50 ± 0.71 | 60.0 | 2 |" in text
    assert "| greedy | 2 | 72.00 | 60.0 | 1 | baseline not run |" in text
    assert "--device cuda" in rows_of()[-1]["command"]


def test_code_that_no_commit_holds_is_marked(here: Path) -> None:
    verb.fill(asked(methods="greedy,end-to-end"), lambda _: None)
    rows = [{**row, "commit": {"greedy": "abc+ then def"}.get(row["method"], "abc")} for row in rows_of()]
    text = report.markdown(TABLES["cifar10"], SMOKE, rows)
    assert "| greedy † | 2 |" in text
    assert "| end-to-end | 1 |" in text
    assert "† Run by code with changes that no commit holds." in text
    assert "†" not in report.markdown(TABLES["cifar10"], SMOKE, [row | {"commit": "abc"} for row in rows])


def test_a_caption_tells_the_model(here: Path) -> None:
    verb.fill(asked(methods="greedy"), lambda _: None)
    assert report.markdown(TABLES["cifar10"], SMOKE, rows_of()).startswith("*Swin on CIFAR-10; 1,230 parameters; ")
    large = [row | {"num_parameters": 2_712_345} for row in rows_of()]
    assert "2.71 million parameters" in report.markdown(TABLES["cifar10"], SMOKE, large)
    assert report.markdown(TABLES["vit"], GPU, []).startswith("*ViT-T on all four data sets; profile `gpu`")
    assert not any("Swin" in profile.about or "ViT" in profile.about for profile in PROFILES.values())


def test_kinds_of_images_are_never_averaged(here: Path) -> None:
    write_folder(here / "lossy", "jpeg", 2)
    verb.fill(asked(methods="greedy", seeds="0"), lambda _: None)
    verb.fill(asked(methods="greedy", seeds="1", data_path=["cifar10=lossy"]), lambda _: None)
    text = report.markdown(TABLES["cifar10"], SMOKE, rows_of())
    assert "| greedy | 2 | 70.00 | 60.0 | 1 |" in text
    assert "| greedy | 2 | 71.00 | 60.0 | 1 |" in text


def test_docs_and_results_that_differ_are_found(here: Path) -> None:
    docs, folder = Path("docs.md"), Path("research/results")
    docs.write_text("Before.\n<!-- table: cifar10 smoke -->\nold\n<!-- end -->\nAfter.\n")
    assert len(report.differences(docs, folder)) == 1
    assert report.rewrite(docs, folder)
    assert report.differences(docs, folder) == []
    assert not report.rewrite(docs, folder)
    verb.fill(asked(methods="greedy"), lambda _: None)
    assert report.differences(docs, folder) == ["cifar10 smoke: the docs' table isn't what its results give"]
    report.rewrite(docs, folder)
    text = docs.read_text()
    assert text.startswith("Before.\n<!-- table: cifar10 smoke -->\n*Swin on CIFAR-10")
    assert text.endswith("<!-- end -->\nAfter.\n")
    docs.write_text(text.replace("70.00", "75.00"))
    assert report.differences(docs, folder)
    (folder / "cifar10-smoke.json").rename(folder / "cifar100-cpu.json")
    report.rewrite(docs, folder)
    assert report.differences(docs, folder) == ["cifar100-cpu.json: the docs have no table for these results"]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cifar10", "--profile: how large? Take smoke, cpu, cpu-full, gpu"),
        ("cifar10 --profile gpus", "--profile: unknown 'gpus'"),
        ("cifar --profile cpu", "TABLE: unknown 'cifar'"),
        ("--profile cpu --methods gredy", "Nearest: greedy"),
        ("--profile cpu --methods ''", "--methods: got an empty text"),
        ("--profile cpu --modules 1", "--modules: '1' is no list of whole numbers from 2 on"),
        ("--profile cpu --modules many", "--modules: 'many'"),
        ("--profile cpu --modules 2,", "--modules: '2,'"),
        ("--profile cpu --seeds -1", "--seeds: '-1'"),
        ("--profile cpu --epochs 0", "--epochs: '0'"),
        ("--profile cpu --jobs 0", "--jobs: 0 is below 1"),
        ("--profile cpu --num-threads 0", "--num-threads: 0 is below 1"),
        ("--profile cpu --device abacus", "--device: 'abacus'"),
        ("--profile cpu --data mnist", "--data: unknown 'mnist'"),
        ("vit --profile cpu --methods greedy --modules 12", "leave no cell"),
        ("--profile cpu --data-path images", "expected DATA=FOLDER, got 'images'"),
        ("--profile cpu --data-path mnist=images", "expected DATA=FOLDER, got 'mnist=images'"),
        ("--profile cpu --data-path cifar10=", "expected DATA=FOLDER, got 'cifar10='"),
        ("--profile cpu --data-path cifar10=nowhere", "--data-path cifar10=nowhere: "),
        ("--profile cpu --data-path cifar10=digits", "not a known name"),
        ("--check", "it goes with --report"),
        ("--report --docs nowhere.md", "--docs: nowhere.md can't be read"),
        ("--report --docs wrong.md", "a marker names 'cifar'"),
        ("--profile cpu --results file", "--results file: it can't be made"),
    ],
)
def test_bad_options_are_refused(
    words: str, said: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("wrong.md").write_text("<!-- table: cifar cpu -->\n<!-- end -->\n")
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["reproduce", *shlex.split(words)])
    with pytest.raises(SystemExit) as stop:
        cli.main(command_line.app)
    error = capfd.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1), error
    assert said in error
    assert sorted(path.name for path in here.iterdir()) == ["file", FOLDER, "wrong.md"]


@pytest.mark.parametrize("text", ["{", "{}", '[{"data": "cifar10"}]', "[1]"])
def test_results_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cifar10-cpu.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"cifar10-cpu\.json"):
        results.load_rows(path)


def test_a_commit_is_named() -> None:
    assert results.commit_of_code()
    assert " " not in results.commit_of_code()


def test_what_a_step_costs_is_measured_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agenda = (Wanted(table="cifar10", methods=("half-frozen", "default"), modules=(2,)),)
    small = replace(SMOKE, agenda=agenda)
    monkeypatch.setitem(PROFILES, "smoke", small)
    monkeypatch.setattr(costs, "TURNS", 2)
    said: list[str] = []
    costs.measure_costs_of(small, tmp_path, said.append)
    assert [line.split(":")[0] for line in said] == [
        "end-to-end, K = 1",
        "end-to-end-checkpointed, K = 1",
        "half-frozen, K = 1",
        "default, K = 2",
    ]
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- costs: smoke -->\n<!-- end -->\nafter\n")
    assert report.rewrite(docs, tmp_path)
    lines = docs.read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert cells[0] == ["method", "K", "memory", "arithmetic", "time of a step", "cifar10, points"]
    assert cells[1] == ["end-to-end", "1", "1.00", "1.00", "1.00", ""]
    assert 1.1 < float(cells[2][3]) < 1.4, "recomputing takes up to a third more arithmetic"
    assert float(cells[2][2]) < 1, "recomputing takes less"
    assert report.differences(docs, tmp_path) == []


def test_what_is_lost_and_saved_is_told_in_a_sentence(here: Path) -> None:
    where = Path("research/results")
    small = replace(SMOKE, agenda=(Wanted(table="cifar10", methods=("end-to-end", "default"), modules=(2,)),))
    names = {"cifar10": "CIFAR-10"}
    rows = [
        {"method": method, "modules": modules, "peak_bytes": peak, "flops": 1, "seconds": [time, 2 * time, 3 * time]}
        for method, modules, peak, time in (
            *(("end-to-end", 1, 100, 1.0), ("default", 2, 50, 1.5)),
            ("end-to-end-checkpointed", 1, 25, 2.0),
        )
    ]
    verb.fill(asked(methods="end-to-end", seeds="0"), lambda _: None)
    costs.path_of_costs(where, small).parent.mkdir(parents=True)
    costs.path_of_costs(where, small).write_text(json.dumps({"rows": rows}))
    assert report.in_a_sentence(small, where, names) == "", "nothing local was run"
    verb.fill(asked(methods="default", seeds="0,1"), lambda _: None)
    told = report.in_a_sentence(small, where, names)
    assert told == (
        "CIFAR-10, end to end 80.00 % (1 seed): K = 2 −10.00 points (1 seed) at 0.50 x the memory and 1.50 x "  # noqa: RUF001
        "the time. Every block recomputed, exact: 0.25 x and 2.00 x."
    )


def test_local_training_is_told_at_equal_epochs_arithmetic_and_time(here: Path) -> None:
    """Runs of two epochs; a step of `default` takes 1.25 x the arithmetic and 2 x the time."""
    where = Path("research/results")
    agenda = tuple(Wanted(table="epochs", methods=("end-to-end", "default"), epochs=epochs) for epochs in (2, 3))
    small = replace(SMOKE, agenda=agenda)
    measured = (("end-to-end", 1, 4, 1.0), ("end-to-end-checkpointed", 1, 5, 3.2), ("default", 4, 5, 2.0))
    rows = [
        {"method": name, "modules": modules, "peak_bytes": 1, "flops": flops, "seconds": [seconds]}
        for name, modules, flops, seconds in measured
    ]
    costs.path_of_costs(where, small).parent.mkdir(parents=True)
    told = {"rows": rows, "batch_size": 16, "torch": "2.14.1", "machine": "x86_64", "date": "2026-11-30"}
    costs.path_of_costs(where, small).write_text(json.dumps(told))
    verb.fill(asked(methods="end-to-end,default", seeds="0,1", modules="4"), lambda _: None)
    verb.fill(asked(table="epochs", methods="default", seeds="0", epochs="2,3", modules="4"), lambda _: None)
    lines = report.at_equal_costs(small, where).splitlines()
    assert lines[0] == "| end-to-end training, 2 epochs | in as much | epochs of `default`, K = 4 | points |"
    assert lines[2:] == [
        "| nothing recomputed | epochs | 2 for 2.0 | −10.00 ± 0.00 (2 seeds) |",  # noqa: RUF001  # a minus
        "| nothing recomputed | arithmetic | 1.6 | not run |",
        "| nothing recomputed | time | 1.0 | not run |",
        "| every block recomputed | arithmetic | 2 for 2.0 | −10.00 ± 0.00 (2 seeds) |",  # noqa: RUF001
        "| every block recomputed | time | 3 for 3.2 | −10.00 (1 seed) |",  # noqa: RUF001
    ]
    assert report.costs(small, where).endswith("\n".join(lines) + "\n")


def test_accuracy_is_drawn_against_memory(here: Path) -> None:
    verb.fill(asked(methods="end-to-end,half-frozen,greedy", seeds="0,1"), lambda _: None)
    words = ["cifar10", "--profile", "smoke", "--plot", "accuracy.svg"]
    said = CliRunner().invoke(command_line.app, words)
    assert said.exit_code == 0, said.output
    assert said.output.startswith("accuracy.svg: 3 points; from scratch, Swin on CIFAR-10: ")
    drawn = Path("accuracy.svg").read_text()
    panel = plot.panel_of(TABLES["cifar10"], SMOKE, Path("research/results"))
    assert panel is not None
    assert {point.family for point in panel.points} == {EXACT, IN_PART, "2 local modules"}
    assert all(f">{text}<" in drawn for point in panel.points for text in (point.label, point.family))
    CliRunner().invoke(command_line.app, words)
    assert Path("accuracy.svg").read_text() == drawn
    with pytest.raises(RecipeError, match="nothing of svhn was run"):
        verb.draw("svhn", "smoke", Path("research/results"), Path("accuracy.png"))
    with pytest.raises(RecipeError, match="which table"):
        verb.draw(None, "smoke", Path("research/results"), Path("accuracy.png"))


def test_recomputed_training_is_drawn_at_end_to_end_accuracy_where_it_was_measured(here: Path) -> None:
    where = Path("research/results")
    verb.fill(asked(methods="end-to-end", seeds="0,1"), lambda _: None)
    shares = (("end-to-end", 100), ("end-to-end-checkpointed", 25))
    rows = [{"method": name, "modules": 1, "peak_bytes": peak, "flops": 1, "seconds": [1.0]} for name, peak in shares]
    costs.path_of_costs(where, SMOKE).parent.mkdir(parents=True)
    costs.path_of_costs(where, SMOKE).write_text(json.dumps({"rows": rows}))
    panel = plot.panel_of(TABLES["cifar10"], SMOKE, where)
    assert panel is not None
    exact, recomputed = panel.points
    assert (recomputed.family, recomputed.memory, recomputed.accuracies) == (RECOMPUTED, 0.25, exact.accuracies)


def test_what_is_trained_in_part_is_held_against_what_is_trained_in_whole(here: Path) -> None:
    """Its own estimate of end-to-end training is of the same part."""
    verb.fill(asked(methods="end-to-end,half-frozen"), lambda _: None)
    rows = rows_of()
    for row in rows:
        row["peak_bytes"] = {"end-to-end": 100, "half-frozen": 60}[row["method"]]
        row["peak_ratio"] = 1.0
    text = report.markdown(TABLES["cifar10"], SMOKE, rows)
    assert re.search(r"\| half-frozen \| 1 \|.*\| 0\.60 x \|", text)
