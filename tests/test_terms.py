"""A mistake is told in the words of who made it: arguments from Python, options from the command line."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import localgrad
from helpers import MICRO_TOML, Cli, assert_refused, load_named
from localgrad import errors, options, rules, run
from localgrad.app.build import resolve_device
from localgrad.app.recipe import OPTIONS, Execution, Method, Recipe, overlay, parse_toml, preset
from localgrad.cli import option_of
from localgrad.learner import LocalLearner
from localgrad.objectives.auxiliary import NextClassifier
from localgrad.training.settings import Augment

SIZE = (1, 16, 16)


def model() -> torch.nn.Module:
    values: dict[str, Any] = {**parse_toml(MICRO_TOML, "micro")["model"], "in_chans": 1, "num_classes": 10}
    more = values.pop("options")
    return timm.create_model(values.pop("name"), **values, **more)


def plan(**more: Any) -> object:
    return localgrad.plan(model(), input_size=SIZE, **{"batch_size": 16, **more})


def learn(**more: Any) -> object:
    return localgrad.LocalLearner(model(), input_size=SIZE, **{"modules": 2, **more})


def train(**changes: Any) -> object:
    """Keys with a double underscore for the dot."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return run.train(Recipe.from_dict(overlay(parse_toml(MICRO_TOML, "micro"), dotted)))


GREEDY, FEATURE = localgrad.GreedySupervised, localgrad.FeatureReconstruction
WRONG: list[tuple[Callable[[], object], str, str, str]] = [
    # What Python code does, what a person types, and how each is told what it got.
    (lambda: plan(budget="100KiB"), "plan --budget 100KiB", "budget='100KiB'", "--budget 100KiB"),
    (lambda: plan(batch_size=10**9), "plan --batch-size 1000000000", "batch_size=1000000000", "--batch-size 10000000"),
    (lambda: plan(modules=9), "plan --modules 9", "modules: 9", "--modules: 9"),
    (lambda: plan(modules=[1, 1]), "plan --modules 1,1", "modules: boundaries", "--modules: boundaries"),
    (lambda: plan(parallel=9), "plan --parallel 9", "parallel=9", "--parallel 9"),
    (lambda: plan(parallel=2, balance="luck"), "plan --parallel 2 --balance luck", "balance: unk", "--balance: unk"),
    (lambda: plan(parallel=2, overlap=1), "plan --parallel 2 --overlap 1", "overlap=1 doesn't", "--overlap 1 doesn't"),
    (lambda: plan(parallel=2, modules=3), "plan --parallel 2 --modules 3", "take parallel=3", "take --parallel 3"),
    (lambda: learn(modules=9), "train --modules 9", "modules: 9 local", "--modules: 9 local"),
    (lambda: learn(overlap=1, offload=True), "train --overlap 1 --offload", "go with offload", "go with --offload"),
    (
        lambda: learn(overlap=1, freeze_from=0.5),
        "train --overlap 1 --set training.freeze_from=0.5",
        "go with freeze_from",
        "go with --set training.freeze_from",
    ),
    (
        lambda: learn(objective=FEATURE(reconcile=1.0), compile=True),
        "train --set local.options.reconcile=1.0 --compile",
        "go with compile",
        "--set local.options.reconcile=1.0 doesn't go with --compile",
    ),
    (
        lambda: learn(objective=GREEDY(teacher_share=0.5)),
        "train --objective greedy --set local.options.teacher_share=0.5",
        "add ema_decay=0.999",
        "add --ema-decay 0.999",
    ),
    (lambda: learn(checkpoint="halfs"), "train --checkpoint halfs", "checkpoint: unknown", "--checkpoint: unknown"),
    (
        lambda: train(execution__global_checkpoint="halfs"),
        "train --set execution.global_checkpoint=halfs",
        "global_checkpoint: unknown",
        "--set execution.global_checkpoint: unknown",
    ),
    (
        lambda: train(training__schedule="sequential", training__ema_decay=0.9),
        "train --schedule sequential --ema-decay 0.9",
        "ema_decay=0.9 doesn't go with schedule='sequential'",
        "--ema-decay 0.9 doesn't go with --schedule sequential",
    ),
    (
        lambda: train(training__schedule="sequential", training__global_every=2),
        "train --schedule sequential --global-every 2",
        "global_every=2",
        "--global-every 2",
    ),
    (
        lambda: train(training__schedule="sequential", training__warmup_stagger=0.1),
        "train --schedule sequential --set training.warmup_stagger=0.1",
        "warmup_stagger=0.1",
        "--set training.warmup_stagger=0.1",
    ),
    (
        lambda: train(execution__offload=True, training__global_tail=0.5),
        "train --offload --global-tail 0.5",
        "go with global_tail",
        "go with --global-tail",
    ),
    (
        lambda: train(execution__health_reference="x"),
        "train --health-reference x",
        "add health_every=1",
        "add --health 1",
    ),
    (lambda: train(execution__shard=True), "train --shard", "add parallel='modules'", "add --parallel modules"),
    (lambda: train(execution__replicas=2), "train --replicas 2", "replicas=2 needs", "--replicas 2 needs"),
    (lambda: train(local__modules="auto"), "train --modules auto", "add budget='6GiB'", "add --budget 6GiB"),
    (lambda: train(training__optimizer="adammw"), "train --optimizer adammw", "optimizer: timm", "--optimizer: timm"),
    (lambda: train(training__scheduler="foo"), "train --scheduler foo", "scheduler: unknown", "--scheduler: unknown"),
    (lambda: train(execution__accumulation=99), "train --accumulation 99", "accumulation=99", "--accumulation 99"),
    (lambda: train(training__batch_size=5000), "train --batch-size 5000", "batch_size=5000", "--batch-size 5000"),
    (lambda: train(model__name="swin_tinny"), "train --model swin_tinny", "model: timm has no", "--model: timm has no"),
    (lambda: train(model__img_size=33), "train --img-size 33", "another patch_size", "another --patch-size"),
    (lambda: train(local__objective="foo"), "train --objective foo", "objective: unknown", "--objective: unknown"),
    (lambda: resolve_device("gpu"), "train --device gpu", "device: 'gpu'", "--device: 'gpu'"),
    (lambda: preset("papr"), "train --preset papr", "preset: unknown", "--preset: unknown"),
    (lambda: Augment(mixup=-1.0), "train --mixup -1", "mixup is the alpha", "--mixup is the alpha"),
    (lambda: load_named("digits", limit=1), "train --limit 1", "limit must leave", "--limit must leave"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=[case[1] for case in WRONG])
def test_each_is_told_in_its_own_terms(
    wrong: tuple[Callable[[], object], str, str, str], cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake, command, in_python, typed = wrong
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.toml").write_text(MICRO_TOML)
    with pytest.raises(errors.LocalgradError) as caught:
        mistake()
    assert in_python in str(caught.value)
    assert "--" not in str(caught.value)
    verb, *words = shlex.split(command)
    start = [] if "--preset" in words else ["--recipe", "micro.toml"]
    said = cli_(verb, *start, *words)
    assert_refused(said, typed)
    assert not re.search(r"\b(budget|batch_size|parallel|modules|[a-z]+_[a-z_]+)=", re.sub(r"--set \S+", "", said.err))
    assert [path.name for path in tmp_path.iterdir()] == ["micro.toml"], "nothing is left on disk"


@pytest.mark.parametrize(
    ("name", "value", "in_python", "typed"),
    [
        ("budget", None, "budget", "--budget"),
        ("budget", "6 GiB", "budget='6 GiB'", "--budget '6 GiB'"),
        ("offload", True, "offload=True", "--offload"),
        ("health_every", 1, "health_every=1", "--health 1"),
        ("image_range", (0, 4095), "image_range=(0, 4095)", "--image-range 0,4095"),
        ("resume", Path("a run"), "resume='a run'", "--resume 'a run'"),
        ("wire", "bf16", "wire='bf16'", "--set execution.wire=bf16"),
        ("local.options.context", None, "context", "--set local.options.context"),
        ("local.options.decoder", "conv", "decoder='conv'", "--decoder conv"),
        ("global_share", 0.5, "global_share=0.5", "--global-every, --global-tail"),
    ],
)
def test_arguments_are_named_as_their_reader_types_them(name: str, value: object, in_python: str, typed: str) -> None:
    assert errors.arg(name, value) == in_python
    with errors.naming(option_of):
        assert errors.arg(name, value) == typed
    assert errors.arg(name, value) == in_python


def test_only_the_command_line_writes_dashes() -> None:
    """Docstrings may; and pip's own options are pip's."""
    package = Path(localgrad.__file__).parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told]
        dashed = [text for text in texts if isinstance(text, str) and re.search(r"--[a-z]", text) and "pip" not in text]
        assert path.name == "cli.py" or dashed == [], path


# Options ---------------------------------------------------------------------------------------------------------


def test_every_field_of_a_recipe_is_declared_with_its_help() -> None:
    values = Recipe().to_dict()
    for key, each in OPTIONS.items():
        assert each.help.strip().endswith((".", "…")), key
        *path, last = key.split(".")
        table = values
        for part in path:
            table = table.get(part, {})
        assert last in table or each.default is None, key
    named = [each.name for each in OPTIONS.values() if each.panel]
    assert len(named) == len(set(named)), "an option says one thing"
    assert "img_size: Side of the images" in str(type(Method().model).__doc__)
    assert "wire: How features travel" in str(Execution.__doc__)


@pytest.mark.parametrize("verb", ["train", "finetune", "plan", "compare"])
def test_help_shows_ten_options_and_help_all_the_others(verb: str, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    listed = {flag: re.findall(r"│ (--[a-z-]+)", cli_(verb, flag).out) for flag in ("--help", "--help-all")}
    everyday = set(listed["--help"]) - {"--help", "--help-all"}
    assert len(everyday) == 10
    assert everyday < set(listed["--help-all"])
    if verb == "train":
        every = {option_of(each.key, None) for each in OPTIONS.values() if each.panel}
        assert every < set(listed["--help-all"])


def test_options_read_what_is_typed() -> None:
    given = {"modules": "2,5", "image_range": "0,4095", "checkpoint": "none,halves/8", "lr": 0.1, "seed": None}
    assert options.values_of(OPTIONS, given) == {
        "local.modules": [2, 5],
        "data.image_range": [0.0, 4095.0],
        "execution.checkpoint": ["none", "halves/8"],
        "training.lr": 0.1,
    }
    with pytest.raises(
        errors.RecipeError, match=r"mean: 'a,b' isn't a list of numbers; take mean=\(0\.5, 0\.5, 0\.5\)"
    ):
        options.values_of(OPTIONS, {"mean": "a,b"})


# Rules -----------------------------------------------------------------------------------------------------------


def value_for(condition: rules.Given) -> object:
    """A value for which a condition holds."""
    if isinstance(condition, rules.OfTransformers):
        return f"{rules.HUB_PREFIX}folder"
    if isinstance(condition, rules.OneOf):
        return condition.values[0]
    return None if isinstance(condition, rules.Absent) else 3 if condition.value is None else condition.value


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: f"{rule.first.said()} {rule.second.said()}")
def test_every_rule_refuses_what_it_names_and_nothing_else(rule: rules.Rule) -> None:
    first, second = rule.first.key, rule.second.key
    with pytest.raises(
        errors.BudgetError, match=rf"^{re.escape(rule.first.name.split('.')[-1])}\b.*{second}"
    ) as caught:
        rules.check({first: value_for(rule.first), second: value_for(rule.second)}, errors.BudgetError)
    assert rule.reason in str(caught.value)
    assert str(caught.value).endswith(".")
    off = next(value for value in rule.first.off)
    rules.check({first: off, second: value_for(rule.second)})
    rules.check({first: value_for(rule.first)})


def test_the_rules_name_arguments_that_there_are() -> None:
    """Of a recipe, of a verb, or of an objective."""
    import inspect
    from dataclasses import fields

    from localgrad import cli

    known = {key.rpartition(".")[2] for key in OPTIONS} | {"global_share"}
    for verb in (cli.train, cli.finetune, cli.plan, cli.compare, cli.export):
        known |= {name.rstrip("_") for name in inspect.signature(verb).parameters}
    known |= {each.name for kind in (GREEDY, FEATURE) for each in fields(kind)}
    known |= set(inspect.signature(NextClassifier).parameters) | set(inspect.signature(LocalLearner).parameters)
    assert {given.key for rule in rules.RULES for given in (rule.first, rule.second)} <= known
