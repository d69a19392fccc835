"""``localgrad finetune``: methods, what fits, a pilot; and plan, finetune, export, reload, predict on a folder."""

from __future__ import annotations

import csv
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import localgrad
from helpers import assert_refused
from localgrad import finetuning
from localgrad.app import ways, ways_table
from localgrad.app.planned import PlannedData
from localgrad.app.recipe import Recipe
from localgrad.app.ways import METHODS, Way, fastest_way, in_order, recipe_for, typed, words_of
from localgrad.errors import RecipeError
from localgrad.units import parse_bytes
from research.benchmarks import finetuning as measured

if TYPE_CHECKING:
    from helpers import Cli

pytestmark = pytest.mark.usefixtures("cost_cache")
VIT = {"depth": 4, "embed_dim": 24, "num_heads": 2}
MODEL = ["--model", "vit_tiny_patch16_224", "--img-size", "16", "--patch-size", "8", "--device", "cpu"]
MODEL += ["--set", "model.options={depth=4, embed_dim=24, num_heads=2}"]
SHORT = ["--epochs", "1", "--transform", "none", "--num-threads", "1", "--sink", "console"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, each with its own colour."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for channel, name in enumerate(("cat", "dog", "eel")):
        (root / name).mkdir()
        for number in range(20):
            pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=7, **VIT)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def given(photos: Path, weights: Path) -> list[str]:
    """What is typed for both."""
    return ["--data", str(photos), *MODEL, "--weights", str(weights), "--batch-size", "8"]


# Methods ---------------------------------------------------------------------------------------------------------


def test_words_come_in_their_own_order() -> None:
    assert words_of("local + lora") == words_of("lora+local") == ("lora", "local")
    assert words_of("freeze+lora+local") == ("freeze", "lora", "local")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "lorra",
            "method: unknown 'lorra'; take full, freeze, probe, lora, qlora, local, or some of them joined by +.",
        ),
        ("full+lora", "method='full+lora': full stands alone: it trains every weight; leave it out."),
        ("probe+local", "method='probe+local': probe stands alone: it trains the head alone; leave it out."),
    ],
)
def test_a_method_that_there_is_not(method: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        words_of(method)
    assert str(raised.value).startswith(said)


def test_each_word_sets_its_options_and_what_is_asked_for_comes_last() -> None:
    data = {"data.name": "pets", "model.weights": "vit.safetensors"}
    freeze = recipe_for(("freeze",), data, PlannedData())
    assert (freeze.method.training.freeze, freeze.method.local.modules, freeze.method.model.lora) == (0.5, 1, None)
    both = recipe_for(("lora", "local"), data | {"model.lora": 4, "local.modules": 3}, PlannedData())
    assert (both.method.model.lora, both.method.local.modules, both.method.training.layer_decay) == (4, 3, None)
    assert not both.method.model.pretrained
    assert recipe_for(("full",), {"data.name": "pets"}, PlannedData()).method.model.pretrained


def test_batch_and_rate_follow_from_the_data() -> None:
    def chosen(words: tuple[str, ...], num_images: int, **more: Any) -> tuple[int, float]:
        training = recipe_for(words, {"data.name": "pets", **more}, PlannedData(num_images=num_images)).method.training
        return training.batch_size, training.lr

    assert chosen(("full",), 100_000) == (64, 5e-4)
    assert chosen(("full",), 400) == (16, 2.5e-4), "the square root of the batch"
    assert chosen(("full",), 3) == (8, pytest.approx(1.77e-4))
    assert chosen(("lora",), 100_000) == (64, 2e-3)
    assert chosen(("full",), 400, **{"training.batch_size": 64}) == (64, 5e-4)
    assert chosen(("full",), 400, **{"training.lr": 0.1}) == (16, 0.1)


def test_local_modules_without_the_word_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"modules: local modules are of method='lora\+local'"):
        recipe_for(("lora",), {"data.name": "pets", "local.modules": 2}, PlannedData())


# What fits -------------------------------------------------------------------------------------------------------


def way(words: str, num_modules: int, needs: int, time: float, **more: Any) -> Way:
    return Way((words,), "plain", num_modules, needs, needs, time, 1.0, **more)


WAYS = (
    way("full", 1, 100, 1.0),
    way("full", 1, 60, 1.3),
    way("full", 2, 50, 1.02),
    way("freeze", 1, 55, 0.66),
    way("freeze", 2, 30, 0.7),
    way("full", 4, 20, 0.5, in_turn=True),
    way("full", 1, 59, 1.2, optimizer="bnbadamw8bit"),
)


def test_the_fastest_is_of_those_that_fit() -> None:
    assert fastest_way(WAYS, None) is WAYS[3]
    assert fastest_way(WAYS[:-1], 70, words=("full",), is_exact=True) is WAYS[1]
    assert fastest_way(WAYS, 70, words=("full",), is_exact=True) is WAYS[-1], "other optimizers are named, too"
    assert fastest_way(WAYS, 52) is WAYS[4]
    assert fastest_way(WAYS, 52, is_exact=True) is None
    assert fastest_way(WAYS, 25) is None, "no plan trains modules in turn"


def test_the_table_is_of_the_recipe_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the preset, in whose place it stands."""
    seen = []

    def task_of(recipe: Recipe, **_: Any) -> Any:
        seen.append((recipe.method.training.batch_size, recipe.method.training.optimizer))
        raise RecipeError("seen")

    monkeypatch.setattr(ways, "task_of", task_of)
    base = {"training": {"batch_size": 24, "optimizer": "sgd", "lr": 0.1}}
    with pytest.raises(RecipeError, match="seen"):
        ways.ways_of({"data.name": "pets"}, PlannedData(num_images=100), base, budget=None)
    assert seen == [(24, "sgd")]


def test_unasked_exact_gradients_come_first_and_all_weights_before_some() -> None:
    assert in_order(WAYS, 200)[:3] == [WAYS[0], WAYS[3], WAYS[1]]
    assert in_order(WAYS, 70)[:2] == [WAYS[1], WAYS[3]], "but not taken unasked"
    assert in_order(WAYS, 52) == [WAYS[2], WAYS[4]]
    assert in_order(WAYS, 10) == []


@pytest.mark.heavy
def test_what_the_table_says_is_what_a_plan_says(photos: Path, cli_: Cli, tmp_path: Path) -> None:
    """Of every method that the table lists, a plan that is made for it alone needs what the table says."""
    budget = ["--budget", "100MiB", "--no-cache", "--batch-size", "8"]
    said = cli_("plan", "--finetune", "--data", str(photos), *MODEL, *budget, "--json", str(tmp_path / "p.json"))
    assert said.code == 0, said.err
    rows = [line.split() for line in said.out.splitlines() if line.startswith(("full ", "freeze", "lora", "qlora"))]
    assert {row[0] for row in rows} >= {"full", "freeze", "lora"}
    needs = {(row[0], row[1]): " ".join(row[4:6]) for row in rows if row[1] == "plain"}
    for method in ("full", "freeze", "lora"):
        path = tmp_path / f"{method}.json"
        alone = {"full": [], "freeze": ["--freeze", "0.5"], "lora": ["--lora", "8"]}[method]
        more = [*MODEL, "--modules", "1", "--budget", "100MiB", "--batch-size", "8", "--no-cache", *alone]
        assert cli_("plan", "--data", str(photos), *more, "--json", str(path)).code == 0
        forecast = json.loads(path.read_text())["forecast"]
        assert parse_bytes(needs[method, "plain"]) == pytest.approx(forecast["needed_bytes"], rel=0.02)
    assert "the fastest that fits: --method freeze, plain" in " ".join(said.out.split())


def test_the_advice_has_the_figures_of_the_results() -> None:
    results = measured.read()

    def most_lost(method: str, images: int | None, *models: str) -> float:
        pairs = [[measured.figures_of(model, images, name, results) for name in ("full", method)] for model in models]
        return max(full.mean - own.mean for full, own in pairs if full is not None and own is not None)

    told = {
        method: f"{most_lost(method, 5_000, 'vit', 'swin'):.1f} and {most_lost(method, None, 'vit'):.1f}"
        for method in ("lower half frozen", "K = 2, transformer heads", "LoRA")
    }
    frozen, local, lora = told.values()
    expected = f"at most {frozen} points of accuracy, two local modules {local}, LoRA {lora}:"
    assert expected in ways_table._advice(), told


# The verb --------------------------------------------------------------------------------------------------------


def test_plan_finetune_evaluate_export_reload_predict(
    given: list[str], photos: Path, cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_bases", lambda left_out: iter([(("full",), None)]))  # all are in the heavy tests
    plan, run = tmp_path / "plan.json", tmp_path / "run"
    planned = cli_("plan", "--finetune", "--method", "lora+local", *given, "--budget", "50MiB", "--json", str(plan))
    assert planned.code == 0, planned.err
    assert f"localgradfinetune--plan{plan}--data{photos}" in "".join(planned.out.split())
    tuned = cli_("finetune", "--plan", str(plan), *given, *SHORT, "--out", str(run))
    assert tuned.code == 0, tuned.err
    recipe = tomllib.loads((run / "recipe.toml").read_text())
    assert recipe["model"]["lora"] == 8
    assert recipe["training"]["lr"] == pytest.approx(7.07e-4)
    assert len(json.loads(plan.read_text())["boundaries"]) == len(recipe["local"]["modules"]) > 0
    evaluated = cli_("evaluate", str(run), "--device", "cpu")
    assert evaluated.code == 0, evaluated.err
    assert "test accuracy" in evaluated.out
    exported = cli_("export", str(run), "--to", "timm", "--out", str(tmp_path / "photos"))
    assert exported.code == 0, exported.err
    model = timm.create_model(f"local-dir:{tmp_path / 'photos'}", pretrained=True).eval()
    ready = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    some, written = str(photos / "*" / "1*.png"), tmp_path / "classes.csv"
    predicted = cli_("predict", str(run), some, "--device", "cpu", "--csv", str(written))
    assert predicted.code == 0, predicted.err
    rows = list(csv.DictReader(written.read_text().splitlines()))
    assert len(rows) == 3 * 11
    images = torch.stack([ready(Image.open(row["path"]).convert("RGB")) for row in rows])
    names, shares = model.pretrained_cfg["label_names"], model(images).softmax(dim=1)
    assert [names[index] for index in shares.argmax(dim=1)] == [row["class"] for row in rows]
    told = torch.tensor([float(row["probability"]) for row in rows])
    assert torch.allclose(shares.amax(dim=1), told, atol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("method", ["full", "freeze+local", "probe"])
def test_what_a_method_trains(method: str, photos: Path, weights: Path, tmp_path: Path) -> None:
    model = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "options": VIT, "weights": str(weights)}
    changes = {"data.name": str(photos), "data.transform": "none", "model": model, "training.epochs": 1}
    changes |= {"execution.num_threads": 1, "execution.device": "cpu", "training.warmup_epochs": 0}
    localgrad.finetune(changes, method=method, out=tmp_path / "run", say=str)
    before, after = load_file(weights), load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    blocks = {name.split(".")[1] for name in moved if name.startswith("blocks.")}
    assert blocks == {"full": {"0", "1", "2", "3"}, "freeze+local": {"2", "3"}, "probe": set()}[method]
    assert "head.weight" in moved


@pytest.mark.heavy
def test_within_a_budget_the_best_that_fits_is_taken(given: list[str], cli_: Cli, tmp_path: Path) -> None:
    said = cli_("finetune", *given, *SHORT, "--budget", "100MiB", "--out", str(tmp_path / "run"))
    assert said.code == 0, said.err
    assert "Fine-tuning by --method full." in said.out
    assert tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["local"]["modules"] == 1
    refused = cli_("finetune", *given, "--budget", "300KiB", "--out", str(tmp_path / "none"))
    assert_refused(refused, "--budget 300KiB: no method fits; the least is --method")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "methods", [("full", "freeze"), pytest.param(("full", "freeze", "lora", "local"), marks=pytest.mark.heavy)]
)
def test_a_pilot_tries_all_and_goes_on_with_the_best(
    methods: tuple[str, ...], given: list[str], cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [typed(words) for words in finetuning.PILOTED] == ["full", "freeze", "lora", "local"]
    monkeypatch.setattr(finetuning, "PILOTED", tuple(words_of(method) for method in methods))
    run = tmp_path / "run"
    said = cli_("finetune", *given, *SHORT, "--lr", "1e-3", "--pilot", "30%", "--out", str(run))
    assert said.code == 0, said.err
    lines = [line.split() for line in said.out.splitlines() if line.startswith("pilot: ")]
    assert [line[1].rstrip(":") for line in lines] == list(methods)
    accuracy = {line[1].rstrip(":"): float(line[4].rstrip("%,")) for line in lines}
    best = max(accuracy, key=lambda name: accuracy[name])
    assert f"Fine-tuning by --method {best}." in said.out
    for name in accuracy:
        recipe = tomllib.loads((tmp_path / "run-pilot" / name / "recipe.toml").read_text())
        assert recipe["data"]["limit"] == 16, "30 % of the images, and two batches at least"
    assert "limit" not in tomllib.loads((run / "recipe.toml").read_text())["data"]


@pytest.mark.parametrize(
    ("count", "is_read", "val_fraction", "share", "expected"),
    [(1000, True, 0.5, 0.5, 500), (1000, False, 0.1, 0.5, 450), (1000, True, 0.1, 0.01, 32), (20, True, 0.1, 0.5, 20)],
)
def test_a_pilot_takes_its_share_of_what_is_trained_on(
    count: int, is_read: bool, val_fraction: float, share: float, expected: int
) -> None:
    """Images that were read are counted without those for validation."""
    splits: Any = object() if is_read else None
    data = PlannedData(num_images=count, splits=splits)
    recipe = recipe_for(("full",), {"data.name": "pets", "data.val_fraction": val_fraction}, data)
    recipe = replace(recipe, method=replace(recipe.method, training=replace(recipe.method.training, batch_size=16)))
    found = finetuning._on_share(SimpleNamespace(data=data), recipe, share)  # type: ignore[arg-type]
    assert found.method.data.limit == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "vit_tiny_patch16_224"], "--data: say what to fine-tune on, such as --data pets."),
        (["--data", "none-such", "--model", "vit_tiny_patch16_224"], "none-such"),
        (["--data", "digits", "--method", "qat"], "--method: unknown 'qat'"),
        (["--data", "digits", "--pilot", "2"], "--pilot 2: expected a share such as 2% or 0.02."),
        (["--data", "digits", "--method", "lora", "--modules", "2"], "local modules are of --method lora+local"),
        (["--data", "digits", "--method", "lora", "--budget", "1GiB", "--gradients", "exact"], "--gradients exact"),
        (["--data", "digits", "--pilot", "5%", "--val-fraction", "0"], "--pilot 0.05 needs --val-fraction"),
        (["--data", "digits", "--plan", "none.json", "--method", "lora"], "a plan says what is trained"),
    ],
)
def test_bad_input(arguments: list[str], said: str, cli_: Cli, tmp_path: Path) -> None:
    assert_refused(cli_("finetune", *arguments, "--out", str(tmp_path / "run")), said)
    assert not (tmp_path / "run").exists()


def test_a_method_alone_is_no_plan(cli_: Cli) -> None:
    assert_refused(cli_("plan", "--data", "digits", "--method", "lora"), "--method lora needs --finetune")


@pytest.mark.parametrize("given", ["--parallel 2", "--preset digits", "--batch-size auto --budget 1GiB"])
def test_what_does_not_go_with_a_plan_for_fine_tuning(given: str, cli_: Cli) -> None:
    assert_refused(cli_("plan", "--finetune", "--data", "digits", *given.split()), "finetune")


def test_methods_name_fields_of_the_recipe() -> None:
    from localgrad.app.recipe import OPTIONS

    assert all(key in OPTIONS for changes in METHODS.values() for key in changes)


def test_a_pilot_of_before_is_not_taken_for_this_one(given: list[str], cli_: Cli, tmp_path: Path) -> None:
    """It may have had another share, or another rate."""
    before = tmp_path / "run-pilot" / "full"
    before.mkdir(parents=True)
    (before / "recipe.toml").write_text("format = 1\n")
    said = cli_("finetune", *given, *SHORT, "--pilot", "30%", "--out", str(tmp_path / "run"))
    assert_refused(said, f"{before} already holds a run")
    assert not (tmp_path / "run").exists()
