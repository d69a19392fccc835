"""The command line as a person meets it: exit status, one message that says what to type, and nothing left on disk."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import MICRO_TOML, Cli, assert_refused
from localgrad import cli
from localgrad.app import fitting, using_runs
from localgrad.app.build import build_recipe_objective
from localgrad.app.recipe import OPTIONS, Recipe, overlay, parse_toml, preset, preset_names
from localgrad.objectives.auxiliary import CLASSIFIERS, DECODERS
from localgrad.objectives.methods import OBJECTIVES
from localgrad.options import read_modules
from localgrad.registry import Registry
from localgrad.training import data as data_module
from localgrad.training.image_sets import InMemoryImages
from localgrad.training.loading import Found
from ranks import Ranks


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a micro recipe outside it."""
    (tmp_path / "micro.toml").write_text(MICRO_TOML)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "200")
    estimate = SimpleNamespace(peak_bytes=2**20)  # test_memory.py's matter
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: estimate)
    return tmp_path / "here"


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 12) -> Path:
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


# ------------------------------------------------------------------------------------- bad input

VIT = ("--model", "vit_tiny_patch16_224", "--set", "model.options={}")

BAD_OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    # model
    (("--model", "swin_tiny_patch4_windw7_224"), ("--model", "'swin_tiny_patch4_windw7_224'", "Nearest: swin_tiny_")),
    (("--model", "qqqqqqq"), ("--model", "'qqqqqqq'", "timm.list_models()")),
    (("--model", "vit_tiny_patch16_224"), ("--model", "window_size=4", "model.options")),
    (("--lr", "1e-3", "--set", "training.lr=1e-4"), ("--set training.lr=0.0001", "an option says 0.001 already")),
    (("--card", "T4"), ("--card T4 needs --budget",)),
    (("--set", "model.options.foo=1"), ("--model", "foo=1", "model.options")),
    (("--img-size", "33"), ("--img-size", "33", "32 or 34", "--patch-size")),
    ((*VIT, "--img-size", "33", "--patch-size", "4"), ("--img-size", "33", "32 or 36")),
    ((*VIT, "--img-size", "3", "--patch-size", "4"), ("--img-size", "3 pixels", "take 4")),
    (("--img-size", "0"), ("model.img_size = 0", "take 1 or more")),
    (("--drop-path", "1"), ("model.drop_path = 1.0", "below 1")),
    # modules
    (("--modules", "99"), ("--modules", "99", "take a number from 1 to 3")),
    (("--modules", "0"), ("local.modules = 0", "take 1 or more")),
    (("--modules", "-3"), ("local.modules = -3",)),
    (("--modules", "--3"), ("--modules", "'--3'", "boundaries such as 2,5,9")),
    (("--modules", "²"), ("--modules", "'²'")),
    (("--modules", "2,1"), ("--modules", "[2, 1]", "try [1, 2]")),
    (("--modules", "1,9"), ("--modules", "9", "1..2")),
    (("--modules", "many"), ("--modules", "'many'", "'stages'")),
    (("--modules", "1.5"), ("--modules", "'1.5'")),
    # objective
    (("--objective", "foo"), ("objective", "'foo'", "feature, image, greedy, contrastive")),
    (("--decoder", "foo"), ("decoder", "'foo'", "linear, conv, transformer")),
    (("--classifier", "foo"), ("classifier", "'foo'", "linear, mlp, transformer")),
    (("--set", "local.options.foo=1"), ("'foo'",)),
    (("--set", "local.options.task_weight=abc"), ("local.options.task_weight", "'abc'")),
    (("--set", "local.options.task_weight=-1"), ("'task'", "-1")),
    # data
    (("--data", "nowhere"), ("'nowhere'", "digits, cifar10", "existing folder")),
    (("--data", "digit"), ("'digit'", "Nearest: digits")),
    (("--data", "cifar10"), ("cifar10", "--download")),
    (("--data", "a" * 300), ("File name too long",)),
    (("--limit", "1"), ("limit", "1")),
    (("--val-fraction", "1"), ("data.val_fraction = 1.0", "below 1")),
    (("--on-corrupt", "maybe"), ("data.on_corrupt = 'maybe'", "'error' or 'skip'")),
    # training
    (("--epochs", "0"), ("training.epochs = 0",)),
    (("--batch-size", "0"), ("training.batch_size = 0",)),
    (("--batch-size", "5000"), ("--batch-size 5000", "120 images", "smaller")),
    (("--optimizer", "adammw"), ("--optimizer", "'adammw'", "Nearest: ", "adamw")),
    (("--optimizer", "fusedadam"), ("--optimizer", "'fusedadam'", "take adamw")),
    (("--scheduler", "foo"), ("--scheduler", "'foo'", "cosine")),
    (("--num-threads", "1000000"), ("execution.num_threads = 1000000", "take 1024 or less")),
    (("--lr", "nan"), ("training.lr = nan", "finite")),
    (("--lr", "-1"), ("training.lr = -1.0", "above 0")),
    (("--ema-decay", "2"), ("training.ema_decay = 2.0",)),
    (("--schedule", "nonsense"), ("training.schedule = 'nonsense'", "'together' or 'sequential'")),
    (("--cached-epochs", "0"), ("training.cached_epochs = 0", "take 1 or more")),
    (("--schedule", "sequential", "--ema-decay", "0.9"), ("--ema-decay 0.9", "--schedule sequential", "leave one")),
    (("--seed", "-1"), ("seed = -1",)),
    (("--seed", "9" * 30), ("seed = 999",)),
    (("--mixup", "-1"), ("--mixup", "-1")),
    (("--label-smoothing", "1"), ("--label-smoothing", "1.0")),
    # execution
    (("--device", "cuda"), ("--device", "'cuda'", "take --device cpu")),
    (("--device", "cuda:7"), ("--device", "'cuda:7'")),
    (("--device", "gpu"), ("--device", "'gpu'", "auto, cpu, cuda")),
    (("--device", "meta"), ("--device", "'meta'", "auto, cpu or cuda")),
    (("--precision", "fp8"), ("execution.precision = 'fp8'", "'fp32', 'bf16' or 'fp16'")),
    (("--accumulation", "0"), ("execution.accumulation = 0",)),
    (("--num-workers", "-1"), ("execution.num_workers = -1",)),
    (("--health", "-1"), ("execution.health_every = -1", "take 0 or more")),
    (("--health-reference", "nowhere"), ("--health-reference", "add --health 1")),
    (("--health", "1", "--health-reference", "nowhere"), ("--health-reference: nowhere: no run there",)),
    # --set
    (("--set", "training.epoch=3"), ("unknown key 'training.epoch'", "Nearest: epochs")),
    (("--set", "trainings.epochs=3"), ("unknown key 'trainings'", "execution", "Nearest: training")),
    (("--set", "foo"), ("--set", "KEY=VALUE", "'foo'", "--set training.lr=0.001")),
    (("--set", "=3"), ("--set", "KEY=VALUE")),
    (("--set", "training=5"), ("training = 5",)),
    (("--set", "execution=5"), ("recipe: execution = 5",)),
    (("--set", "training.epochs.x=5"), ("--set", "'training.epochs.x'", "no table")),
    (("--set", "training.lr="), ("training.lr = ''",)),
    (("--set", "training.epochs=true"), ("training.epochs = True",)),
    (("--set", "training.lr=true"), ("training.lr = True",)),
    (("--preset", "digits"), ("--preset digits doesn't go with --recipe",)),
]


@pytest.mark.few(12)
@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=[" ".join(options)[:40] for options, _ in BAD_OPTIONS])
def test_bad_options_are_refused(
    options: tuple[str, ...], words: tuple[str, ...], here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(cli_("train", "--recipe", "../micro.toml", *options), *words)
    assert_refused(cli_("train", "--recipe", "../micro.toml", *options, "--out", "a/run"), *words)
    assert list(here.iterdir()) == [], "nothing is left on disk"


def test_bad_data_is_refused(here: Path, cli_: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one", ("cat",))
    write_images(tmp_path / "corrupt")
    broken = tmp_path / "corrupt" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for name, words in {
        "empty": ("empty", "class folders"),
        "one": ("two or more classes", "'cat'"),
        "corrupt": ("corrupt/cat/3.png", "skip"),
        "micro.toml": ("micro.toml", ".parquet"),
        "gone": ("gone",),
    }.items():
        path = str(tmp_path / name)
        assert_refused(cli_("train", "--recipe", "../micro.toml", "--data", path, "--out", "run"), path, *words)
    assert list(here.iterdir()) == []


def test_labels_out_of_range_are_refused(here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    images = InMemoryImages(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.arange(30) % 3)
    monkeypatch.setattr(data_module, "find", lambda *_, **__: Found(("a", "b"), images, None))
    assert_refused(
        cli_("train", "--recipe", "../micro.toml", "--out", "run"), "from 0 to 1", "got 2", "image 2", "digits"
    )
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "tnt_s_legacy_patch16_224"), ("TNT", "is given several features", "--blocks")),
        (("--model", "maxvit_rmlp_pico_rw_256", "--img-size", "100"), ("100", "divisible by window")),
        (("--model", "vit_tiny_patch16_224", "--img-size", "40"), ("--img-size", "40", "32 or 48")),
    ],
    ids=["blocks", "window", "patch"],
)
def test_models_that_cannot_be_split_or_do_not_fit_are_refused(
    options: tuple[str, ...], words: tuple[str, ...], here: Path, cli_: Cli
) -> None:
    assert_refused(cli_("train", "--limit", "120", "--out", "run", *options), *words)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("recipe", ["gone.toml", "folder", "binary.toml", "broken.toml", "unknown.toml"])
def test_recipes_that_cannot_be_read_are_refused(recipe: str, here: Path, cli_: Cli, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.toml").write_text("a = = 3")
    (tmp_path / "unknown.toml").write_text("[training]\nepoch = 3\n")
    said = cli_("train", "--recipe", f"../{recipe}", "--out", "run")
    assert_refused(said, "'training.epoch'" if recipe == "unknown.toml" else recipe)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "out", ["../micro.toml", "../micro.toml/run", "/proc/localgrad-run", "a" * 300, "b/" + "a" * 300]
)
def test_folders_that_cannot_be_written_are_refused(out: str, here: Path, cli_: Cli) -> None:
    assert_refused(cli_("train", "--recipe", "../micro.toml", "--out", out), out)
    assert [path for path in here.iterdir() if path.name != "b"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--lr", "fast"), "--lr"),
        (("train", "--nope"), "--nope"),
        (("train", "extra"), "extra"),
        (("trian",), "trian"),
        (("predict", "run"), "images"),
        (("predict", "run", "x.png", "--top", "0"), "--top"),
        (("train", "--preset", "foo"), "digits, finetune, greedy, infopro, paper"),
        (("train", "--resume", "gone"), "gone: no run there"),
        (("evaluate", "gone"), "gone: no run there"),
        (("evaluate", "gone", "--part", "all"), "--part"),
        (("predict", "gone", "x.png"), "gone: no run there"),
        (("train", "--resume", "gone", "--out", "x"), "--out x doesn't go with --resume"),
        (("train", "--resume", "gone", "--preset", "digits"), "--preset digits doesn't go with --resume"),
        (("train", "--parallel", "modules", "--num-processes", str(10**6)), "take 1 or more, at most 1024"),
        (("train", "--epochs", str(10**400)), "take a number below 9223372036854775808"),
        (("train", "--resume", "gone", "--card", "T4"), "--card T4 doesn't go with --resume"),
        (("train", "--resume", "gone", "--no-cache"), "--no-cache doesn't go with --resume: it is of planning"),
        (("train", "--resume", "gone", "--no-confirm"), "--no-confirm doesn't go with --resume: it is of planning"),
        (("train", "--plan", "gone", "--card", "T4"), "--card T4 doesn't go with --plan"),
        (("train", "--plan", "gone", "--no-cache"), "--no-cache doesn't go with --plan: it is of planning"),
        (("finetune", "--plan", "gone", "--no-confirm"), "--no-confirm doesn't go with --plan: it is of planning"),
        (("finetune", "--data", "x", "--no-cache"), "--no-cache needs --budget: it is of planning"),
    ],
)
def test_bad_commands_are_refused(arguments: tuple[str, ...], words: str, here: Path, cli_: Cli) -> None:
    said = cli_(*arguments)
    assert said.code == 2
    assert words.lower() in said.err.lower()
    assert "Traceback" not in said.err
    assert list(here.iterdir()) == []


# ------------------------------------------------------------------------------------- what works


def test_a_run_from_start_to_prediction(here: Path, cli_: Cli, tmp_path: Path) -> None:
    said = cli_("train", "--recipe", "../micro.toml", "--out", "my runs/first", "--set", "training.min_lr=1e-5")
    assert (said.code, said.err) == (0, "")
    assert "\x1b" not in said.out
    for words in (
        "swin_tiny_patch4_window7_224 on digits: 2 local modules",
        "epoch   2/2",
        "test accuracy",
        "by module",
    ):
        assert words in said.out
    assert said.out.splitlines()[-1].split(maxsplit=2) == ["run", "folder", "my runs/first"]
    assert "min_lr = 1e-05" in (here / "my runs" / "first" / "recipe.toml").read_text()

    accuracy = next(line for line in said.out.splitlines() if line.startswith("test accuracy")).split()[2]
    again = cli_("evaluate", "my runs/first")
    assert again.code == 0
    assert again.out.splitlines()[0].split() == ["test", "accuracy", accuracy, "(359", "images)"]
    assert cli_("evaluate", "my runs/first", "--part", "val").code == 0

    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a digit.png")
    said = cli_("predict", "my runs/first", str(tmp_path / "a digit.png"), "--top", "2")
    assert said.code == 0
    assert said.out.startswith(f"{tmp_path / 'a digit.png'}  ")
    assert said.out.count("%") == 2

    said = cli_("train", "--resume", "my runs/first")
    assert said.code == 0
    assert said.out.startswith("The run in my runs/first is complete; nothing is left to train.\n")
    assert "test accuracy" in said.out

    assert_refused(cli_("train", "--recipe", "../micro.toml", "--out", "my runs/first"), "--resume", "already holds")
    assert_refused(cli_("train", "--resume", "my runs/first", "--seed", "3"), "seed: 0 -> 3")
    assert_refused(cli_("predict", "my runs/first", "gone.png"), "gone.png")

    (here / "my runs/first/checkpoints/best.safetensors").write_bytes(b"torn")
    assert_refused(cli_("evaluate", "my runs/first"), "best.safetensors", "truncated")
    (here / "my runs/first/summary.json").unlink()
    (here / "my runs/first/checkpoints/last.pt").write_bytes(b"torn")
    assert_refused(cli_("train", "--resume", "my runs/first"), "last.pt", "truncated", "another folder")


def test_a_loss_that_is_no_number_stops_the_run(here: Path, cli_: Cli) -> None:
    said = cli_("train", "--recipe", "../micro.toml", "--out", "run", "--optimizer", "sgd", "--lr", "1e30",
                "--warmup-epochs", "0")  # fmt: skip
    assert_refused(said, "local module", "term 'task'", "epoch 1", "no epoch was complete", "lower --lr")
    assert not (here / "run" / "checkpoints" / "last.pt").exists()


@pytest.mark.heavy
def test_a_run_that_diverges_later_can_still_be_resumed_from(
    here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localgrad.learner import LocalLearner

    step = LocalLearner.step_on

    def broken(self: LocalLearner, batch: Any) -> Any:
        if self.num_steps == 9:
            next(self.model.parameters()).data.fill_(float("nan"))
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LocalLearner, "step_on", broken)
        said = cli_("train", "--recipe", "../micro.toml", "--out", "run")
    assert_refused(said, "local module 0", "'task' and 'reconstruction'", "epoch 2, batch 3", "run/checkpoints/last.pt")
    state = torch.load(here / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["position"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["learner"]["model"].values())
    assert cli_("train", "--resume", "run").code == 0


def test_a_dry_run_prints_a_recipe_that_reads_back(here: Path, cli_: Cli, tmp_path: Path) -> None:
    for name in preset_names():
        said = cli_("train", "--preset", name, "--dry-run", "--modules", "2,5", "--mixup", "0.8", "--set", "seed=7")
        assert said.code == 0
        expected = overlay(preset(name), {"local.modules": [2, 5], "augment.mixup": 0.8, "seed": 7})
        assert Recipe.from_toml(said.out) == Recipe.from_dict(expected)
    (tmp_path / "again.toml").write_text(said.out)
    assert cli_("train", "--recipe", "../again.toml", "--dry-run").out == said.out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--optimizer", "adamx"), "--optimizer: timm has no 'adamx'"),
        (("--objective", "featur"), "unknown 'featur'"),
        (("--decoder", "linea"), "linea"),
        (("--set", "local.options.nothing=1"), "nothing"),
        (("--set", "local.options.reconstruct='all'"), "reconstruct: unknown 'all'"),
        (("--model", "vit_tinny_patch16_224"), "--model: timm has no 'vit_tinny_patch16_224'"),
        (("--set", "training.min_lr=1.0"), "training.min_lr: 1 is above the learning rate"),
        (("--plugin", "no_such_module"), "--plugin: there is no module 'no_such_module'"),
        (("--modules", "auto"), "--modules auto needs --budget"),
        (("--freeze", "1.5"), "--freeze 1.5: take stem, a number of blocks from 1 on"),
        (("--freeze", "half"), "--freeze half: take stem"),
        (("--on-oom", "banana"), "--on-oom: unknown 'banana'; take stop or replan"),
        (("--sink", "nope"), "--sink: unknown 'nope'"),
        (("--set", "local.options.clasifier='mlp'"), "'feature' can't take 'clasifier'; its options are"),
    ],
)
def test_a_dry_run_finds_wrong_names(words: tuple[str, ...], told: str, here: Path, cli_: Cli) -> None:
    assert_refused(cli_("train", "--dry-run", *words), told)


def test_no_option_is_the_digits_and_so_is_naming_them(here: Path, cli_: Cli) -> None:
    digits = cli_("train", "--dry-run").out
    assert Recipe.from_toml(digits) == Recipe.from_dict(preset("digits"))
    assert cli_("train", "--dry-run", "--data", "digits").out == digits
    vit = parse_toml(cli_("train", "--dry-run", "--model", "vit_tiny_patch16_224").out, "out")
    assert vit["model"] == {"name": "vit_tiny_patch16_224", "pretrained": False, "options": {}}
    other = Recipe.from_toml(cli_("train", "--dry-run", "--data", "cifar10").out)
    assert other == Recipe.from_dict({"data": {"name": "cifar10"}})


def test_a_dry_run_of_resuming_trains_nothing(here: Path, cli_: Cli) -> None:
    (here / "run").mkdir()
    (here / "run" / "recipe.toml").write_text(MICRO_TOML)
    said = cli_("train", "--resume", "run", "--dry-run", "--checkpoint", "halves/8,none")
    assert said.code == 0
    assert Recipe.from_toml(said.out).execution.checkpoint == ["halves/8", "none"]
    assert [path.name for path in (here / "run").iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("4", 4),
        ("1", 1),
        ("-1", -1),
        ("2,5,9", [2, 5, 9]),
        (" 2, 5 ", [2, 5]),
        ("stages", "stages"),
        ("", ""),
        ("2,", "2,"),
        ("--3", "--3"),
        ("²", "²"),
        ("1.5", "1.5"),
    ],
)
def test_modules_are_read(text: str, modules: Any) -> None:
    assert read_modules("modules", text) == modules


# ------------------------------------------------------------------------------------- the process


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120, **settings
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "--help"], ["--version"]])
def test_help_comes_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from localgrad import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'timm', 'numpy', 'sklearn', 'datasets'} & set(sys.modules)"
    )
    result = python("-c", script, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


def test_help_comes_at_once() -> None:
    """Processor time of the quickest of five, with the bytecode that an installed package has."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "localgrad", "--help", env=environment).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    taken: list[float] = []
    while len(taken) < 5 and min(taken, default=1) >= 0.4:
        taken.append(seconds())
    assert min(taken) < 0.4, taken


@pytest.mark.parametrize(
    ("option", "known"), [("objective", OBJECTIVES), ("options.decoder", DECODERS), ("options.classifier", CLASSIFIERS)]
)
def test_help_names_what_there_is(option: str, known: Registry[Any]) -> None:
    own = OPTIONS[f"local.{option}"].help
    ours = [name for name in known if known.find(name).__module__.startswith("localgrad.")]
    assert len(ours) > 4
    assert set(ours) <= set(re.findall(r"\w+", own)), own


@pytest.mark.parametrize("verb", ["evaluate", "predict", "export"])
def test_a_verb_that_needs_a_run_shows_its_help_without_arguments(verb: str, cli_: Cli) -> None:
    said = cli_(verb)
    assert said.code == 2
    assert f"localgrad {verb} [OPTIONS]" in said.out
    assert "run_folder" in said.out.lower()
    assert "--help" in said.out
    assert not said.err


def test_finetune_without_arguments_says_what_it_needs(cli_: Cli) -> None:
    assert_refused(cli_("finetune"), "--data", "such as --data pets")


def test_without_a_verb_help_is_shown_and_nothing_succeeds(cli_: Cli) -> None:
    said = cli_()
    assert (said.code, said.err) == (2, "")
    assert said.out == cli_("--help").out
    assert all(f"\n  {verb} " in said.out for verb in ("train", "plan", "evaluate", "predict", "compare"))


@pytest.mark.heavy
def test_a_reader_that_leaves_does_not_end_the_run(here: Path, ranks: Ranks) -> None:
    """``localgrad train | head -1``."""
    pipe = here / "pipe"
    os.mkfifo(pipe)
    process = ranks.start(["train", "--recipe", here.parent / "micro.toml", "--out", here / "run"], to=pipe)
    with pipe.open() as reader:
        assert reader.readline().startswith("swin_tiny")
    ended = process.wait()
    assert (ended.codes, ended.err) == ([0], [""])
    assert (here / "run" / "summary.json").exists()


@pytest.mark.heavy
def test_a_terminal_gets_the_live_display(here: Path, ranks: Ranks) -> None:
    """On a real pseudo-terminal."""
    import pty

    control, terminal = pty.openpty()
    process = ranks.start(
        ["train", "--recipe", here.parent / "micro.toml", "--out", here / "run"],
        environment={"TERM": "xterm", "COLUMNS": "100"},
        to=os.ttyname(terminal),
    )
    text = b""
    while process.is_running() or select.select([control], [], [], 0)[0]:
        if select.select([control], [], [], 0.1)[0]:
            text += os.read(control, 65536)
    assert process.wait().codes == [0], text
    os.close(terminal)
    os.close(control)
    assert b"\x1b[" in text
    assert b"epoch 2/2" in text, "the bar's own words; lines say 'epoch   2/2'"
    assert b"test accuracy" in text


def test_an_empty_data_name_is_refused(cli_: Cli) -> None:
    code, _, said = cli_("train", "--data", "")
    assert code == 2
    assert "--data: got an empty text" in said
    assert "Nearest" not in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("train", "--out", ""), "--out"),
        (("train", "--out="), "--out"),
        (("train", "--test-data", ""), "--test-data"),
        (("train", "--set", "data.test_data=''"), "recipe: data.test_data = ''"),
        (("train", "--resume", ""), "--resume"),
        (("evaluate", ""), "argument"),
        (("compare", "--json", ""), "--json"),
    ],
)
def test_an_empty_text_is_refused(words: tuple[str, ...], named: str, here: Path, cli_: Cli) -> None:
    """As of a variable that isn't set: it was the current folder, or nothing at all."""
    assert_refused(cli_(*words), f"{named}: ", "an empty text")
    assert list(here.iterdir()) == [], "nothing is left on disk"


def test_a_short_model_name_finds_its_long_one(cli_: Cli) -> None:
    code, _, said = cli_("train", "--model", "swin_tinny")
    assert code == 2
    assert "Nearest: swin_tiny_patch4_window7_224" in said


LOCALES = {
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "ascii"},
    "LANG": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "strict": {"PYTHONIOENCODING": "latin-1:strict"},
}


def test_an_output_that_lacks_characters_ends_no_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as below in this process, where nothing has to be imported anew."""
    Image.new("L", (8, 8)).save(here / "b\u00ef\u2026.png")
    words = (
        *(["train", "--recipe", "../micro.toml", "--out", "run", "--epochs", "1"], ["evaluate", "run"]),
        *(["predict", "run", "."], ["train", "--resume", "run"], ["train", "--help"], ["train", "--model", "n\u00efx"]),
    )
    codes = []
    for each in words:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            patch.setattr(sys, "argv", ["localgrad", *each])
            try:
                cli.main()
                codes.append(0)
            except SystemExit as stop:
                codes.append(int(stop.code or 0))
    assert codes == [0, 0, 0, 0, 0, 2]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["PYTHONIOENCODING", "LANG", "strict"])
def test_a_pipe_that_lacks_characters_ends_no_command(name: str, here: Path) -> None:
    """Training, evaluating, predicting, resuming, help, a mistake; names that ASCII lacks among them."""
    Image.new("L", (8, 8)).save(here / "b\u00ef\u2026.png")
    script = """
import sys
from types import SimpleNamespace
from localgrad import cli
from localgrad.app import fitting
fitting.estimate_step = lambda *_, **__: SimpleNamespace(peak_bytes=2**20)
for words in (
    ["train", "--recipe", "../micro.toml", "--out", "run", "--epochs", "1"], ["evaluate", "run"],
    ["predict", "run", "."], ["train", "--resume", "run"], ["train", "--help"], ["train", "--model", "n\\u00efx"],
):
    sys.argv = ["localgrad", *words]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    print(words[0], "ended with", code)
"""
    (here / "script.py").write_text(script, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    done = subprocess.run(
        [sys.executable, "script.py"], env={**environment, **LOCALES[name]}, capture_output=True, check=False
    )
    out, err = done.stdout.decode("latin-1"), done.stderr.decode("latin-1")
    assert done.returncode == 0, err
    assert "Traceback" not in err + out
    ends = [line for line in out.splitlines() if " ended with " in line]
    assert [line.rsplit(" ", 1)[1] for line in ends] == ["0", "0", "0", "0", "0", "2"], (out, err)


@pytest.mark.heavy
def test_a_terminal_that_lacks_characters_ends_no_run(here: Path) -> None:
    import pty

    control, terminal = pty.openpty()
    command = [sys.executable, "-m", "localgrad", "train", "--recipe", "../micro.toml", "--out", "run", "--epochs", "1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal, env=environment)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while chunk := os.read(control, 65536):
            text += chunk
    os.close(control)
    assert process.wait(60) == 0, text
    assert b"Traceback" not in text
    assert b"test accuracy" in text
    assert text.isascii()


@pytest.mark.heavy
def test_costs_may_be_measured_anew(cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from localgrad.planning import cache

    monkeypatch.setattr(cache, "_recent", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "micro.toml").write_text(MICRO_TOML)
    for more, cached in ((["--no-cache"], 0), ([], 1)):
        said = cli_("plan", "--recipe", str(tmp_path / "micro.toml"), "--modules", "2", "--set",
                    "training.batch_size=4", *more)  # fmt: skip
        assert said.code == 0, said
        assert len(list(tmp_path.glob("localgrad/costs/*.json"))) == cached


def test_whoever_starts_processes_knows_the_run_folder(here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """To say how to go on when one of them is killed."""
    from localgrad.parallel import launching

    taken: list[Any] = []
    monkeypatch.setattr(launching, "run_processes", lambda *arguments: taken.append(arguments) or 0)
    command = ["train", "--recipe", "../micro.toml", "--parallel", "modules", "--num-processes", "2"]
    assert cli_(*command).code == 0
    assert cli_(*command, "--out", "my run").code == 0
    (count, words, folder), (_, same, named) = taken
    assert (count, words) == (2, [*command, "--out", str(folder)])
    assert str(folder).startswith("runs/digits-feature-")
    assert (same, named) == ([*command, "--out", "my run"], Path("my run"))


def test_what_is_not_as_it_should_be_is_said_once(here: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from localgrad.errors import RunWarning

    def noisy(*_: object, **__: object) -> dict[str, Any]:
        for text in ("one", "two", "one"):
            warnings.warn(text, RunWarning, stacklevel=1)
        return {"accuracy": 1.0, "num_images": 1, "module_accuracy": [1.0], "skipped": {}}

    monkeypatch.setattr(using_runs, "evaluate_run", noisy)
    said = cli_("evaluate", "run")
    assert (said.code, said.err) == (0, "localgrad: one\nlocalgrad: two\n")


@pytest.mark.parametrize("objective", ["greedy", "contrastive", "image"])
def test_another_objective_than_the_presets_begins_with_its_own_options(objective: str, cli_: Cli) -> None:
    said = cli_("train", "--objective", objective, "--dry-run")
    recipe = Recipe.from_toml(said.out, "said")
    assert (recipe.method.local.objective, recipe.method.local.options) == (objective, {})
    build_recipe_objective(recipe)
    kept = cli_("train", "--objective", "feature", "--dry-run")
    assert kept.out == cli_("train", "--dry-run").out
