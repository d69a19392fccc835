"""Recipes: TOML and back, single values laid over, and errors that name the key."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad.app.build import build_recipe_objective
from localgrad.app.recipe import (
    OPTIONS,
    DataSettings,
    Execution,
    LocalSettings,
    Method,
    ModelSettings,
    Recipe,
    TrainingSettings,
    difference,
    overlay,
    parse_assignments,
    parse_toml,
    preset,
    preset_names,
)
from localgrad.errors import RecipeError
from localgrad.objectives.methods import build_objective
from localgrad.options import read_modules
from localgrad.training.settings import Augment

# Round trip ------------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
positive = st.integers(1, 10**6)
shares = st.floats(0, 0.99)
amounts = st.floats(0, 1e6)
plain = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False, allow_infinity=False), words),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
options = st.dictionaries(words, plain, max_size=3)

recipes = st.builds(
    Recipe,
    method=st.builds(
        Method,
        seed=st.integers(0, 2**40),
        model=st.builds(
            ModelSettings,
            name=words,
            img_size=st.none() | positive,
            patch_size=st.none() | positive,
            drop_path=shares,
            pretrained=st.booleans(),
            options=options,
        ),
        data=st.builds(
            DataSettings,
            name=words,
            root=st.none() | words,
            val_fraction=shares,
            limit=st.none() | positive,
            on_corrupt=st.sampled_from(["error", "skip"]),
            test_data=st.none() | words,
            image_range=st.none() | st.tuples(amounts, amounts),
            mean=st.none() | st.lists(amounts, min_size=1, max_size=3).map(tuple),
            fit=st.none() | st.sampled_from(["crop", "pad", "squash"]),
        ),
        augment=st.builds(
            Augment,
            crop_padding=st.integers(0, 8),
            flip=st.booleans(),
            rand_augment=st.none() | st.tuples(st.integers(1, 4), st.integers(0, 30)),
            erasing=shares,
            mixup=st.just(0.0) | st.floats(1e-6, 1e6),
            label_smoothing=shares,
        ),
        local=st.builds(
            LocalSettings,
            modules=positive | st.just("stages") | st.lists(st.integers(1, 50), min_size=1, max_size=4),
            objective=words,
            options=options,
        ),
        training=st.builds(
            TrainingSettings,
            epochs=positive,
            lr=st.floats(1e-9, 10),
            weight_decay=amounts,
            clip_grad=st.none() | st.floats(1e-6, 100),
            ema_decay=st.none() | st.floats(0.01, 0.9999),
        ),
    ),
    execution=st.builds(
        Execution,
        device=st.sampled_from(["auto", "cpu", "cuda:1"]),
        precision=st.sampled_from(["fp32", "bf16", "fp16"]),
        accumulation=positive,
        checkpoint=st.sampled_from(["none", "blocks", "halves/4:2", ["none", "halves"]]),
        num_threads=st.none() | st.integers(1, 1024),
    ),
)


@given(recipes)
@settings(max_examples=25, deadline=None)
def test_toml_and_back(recipe: Recipe) -> None:
    text = recipe.to_toml()
    again = Recipe.from_toml(text)
    assert again == recipe
    assert Recipe.from_toml(again.to_toml()).to_toml() == again.to_toml()
    assert difference(recipe, again) == []


def test_the_default_recipe_is_an_empty_file() -> None:
    assert Recipe.from_toml("") == Recipe() == Recipe.from_dict({})


def test_method_and_execution_stand_side_by_side() -> None:
    values = tomllib.loads(Recipe().to_toml())
    assert sorted(values) == ["augment", "data", "execution", "format", "local", "model", "seed", "training"]
    assert values["execution"]["device"] == "auto"
    assert "img_size" not in values["model"], "unset values are left out"


def test_values_of_a_file_reach_their_places() -> None:
    recipe = Recipe.from_toml(
        "seed = 3\n[model]\nimg_size = 32\noptions = {depths = [2, 2]}\n[augment]\nrand_augment = [2, 9]\n"
        '[local]\nmodules = [2, 5]\n[execution]\nprecision = "bf16"'
    )
    assert recipe.method.seed == 3
    assert recipe.method.model.img_size == 32
    assert recipe.method.model.options == {"depths": [2, 2]}
    assert recipe.method.augment.rand_augment == (2, 9)
    assert recipe.method.local.modules == [2, 5]
    assert recipe.execution.precision == "bf16"


def test_text_that_is_not_toml_names_its_source() -> None:
    with pytest.raises(RecipeError, match=r"my\.toml: this is not TOML \(.*line 2"):
        Recipe.from_toml("seed = 1\nseed = = 2", "my.toml")


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"training": {"epoch": 3}}, "training.epoch", "epochs"),
        ({"trainin": {}}, "trainin", "training"),
        ({"local": {"module": 2}}, "local.module", "modules"),
        ({"augment": {"mix_up": 0.1}}, "augment.mix_up", "mixup"),
        ({"execution": {"precison": "bf16"}}, "execution.precison", "precision"),
        ({"exection": {"precision": "bf16"}}, "exection", "execution"),
        ({"model": {"image_size": 32}}, "model.image_size", "img_size"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(values: dict[str, Any], key: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe: unknown key '{key}'; .*{nearest}.*Nearest: {nearest}"):
        Recipe.from_dict(values)


@pytest.mark.parametrize("key", ["function", "constrained", "functional_groups", "int"])
def test_keys_that_look_like_pydantics_own_words_are_refused_as_any(key: str) -> None:
    with pytest.raises(RecipeError, match="unknown key") as caught:
        Recipe.from_dict({key: 1})
    assert repr(key) in str(caught.value)
    with pytest.raises(RecipeError, match="unknown key") as caught:
        Recipe.from_dict({"training": {key: 1}})
    assert repr(f"training.{key}") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", "one"),
        ("model.img_size", 0),
        ("model.drop_path", 1.0),
        ("model.drop_path", float("nan")),
        ("model.options", 3),
        ("data.val_fraction", 1.0),
        ("data.val_fraction", -0.1),
        ("data.on_corrupt", "ignore"),
        ("data.fit", "stretch"),
        ("data.limit", 0),
        ("augment.crop_padding", -1),
        ("augment.label_smoothing", 1.5),
        ("augment.rand_augment", [2, 31]),
        ("augment.rand_augment", [2]),
        ("local.modules", 0),
        ("local.modules", ["two"]),
        ("local.modules", True),
        ("training", 3),
        ("training.epochs", 0),
        ("training.epochs", 1.5),
        ("training.lr", 0),
        ("training.lr", float("inf")),
        ("training.weight_decay", -0.1),
        ("training.clip_grad", 0),
        ("training.ema_decay", 1),
        ("execution.precision", "fp8"),
        ("execution.accumulation", 0),
        ("execution.num_threads", 0),
        ("execution.checkpoint", "perhaps"),
    ],
)
def test_impossible_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(overlay({}, {key: value}))
    message = str(caught.value)
    # A check of ours names the argument.
    assert message.startswith((f"recipe: {key} = ", f"recipe: {key}.", f"recipe: {key.rsplit('.', maxsplit=1)[-1]}"))
    assert "\n" not in message


def test_a_table_that_is_a_number_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="recipe: execution = 3: "):
        Recipe.from_dict({"execution": 3})


# Single values ---------------------------------------------------------------------------------------------------


def test_overlay_sets_single_values_and_changes_nothing_else() -> None:
    values = {"seed": 1, "local": {"modules": 2, "options": {"decoder": "linear", "task_weight": 0.5}}}
    before = repr(values)
    changes = {"local.options.decoder": "conv", "training.lr": 0.1, "seed": 2, "a.b.c": 3}
    assert overlay(values, changes) == {
        "seed": 2,
        "local": {"modules": 2, "options": {"decoder": "conv", "task_weight": 0.5}},
        "training": {"lr": 0.1},
        "a": {"b": {"c": 3}},
    }
    assert repr(values) == before


def test_overlay_goes_through_tables_only() -> None:
    with pytest.raises(RecipeError, match=r"'seed\.x' goes through 'seed', which is no table"):
        overlay({"seed": 1}, {"seed.x": 2})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.lr=1e-3", 1e-3),
        ("training.lr = 0.5", 0.5),
        ("training.lr=3", 3),
        ("training.lr=true", True),
        ("training.lr=[1, 2]", [1, 2]),
        ("training.lr={a = 1}", {"a": 1}),
        ('training.lr="4"', "4"),
        ("training.lr=adamw", "adamw"),
        ("training.lr= plain words ", "plain words"),
        ("training.lr=a=b", "a=b"),
        ("training.lr=", ""),
    ],
)
def test_assignments_are_toml_or_else_words(text: str, value: Any) -> None:
    found = parse_assignments([text])
    assert found == {"training.lr": value}
    assert type(found["training.lr"]) is type(value)


def test_later_assignments_win() -> None:
    assert parse_assignments(["a=1", "b=2", "a=3"]) == {"a": 3, "b": 2}


@pytest.mark.parametrize("text", ["training.lr", "=3", " = 3", ""])
def test_assignments_need_a_key_and_a_value(text: str) -> None:
    with pytest.raises(RecipeError, match=r"set: expected KEY=VALUE, got .*set='training\.lr=0\.001'"):
        parse_assignments([text])


@pytest.mark.parametrize(
    ("text", "modules"), [("4", 4), ("stages", "stages"), ("2,5,9", [2, 5, 9]), ("-1", -1), ("2, 5", [2, 5])]
)
def test_modules_on_the_command_line(text: str, modules: Any) -> None:
    assert read_modules("modules", text) == modules


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5})?", fullmatch=True), st.integers(), max_size=5))
@settings(max_examples=50, deadline=None)
def test_what_is_laid_over_can_be_read_back(changes: dict[str, int]) -> None:
    heads = {key for key in changes if "." not in key}
    changes = {key: value for key, value in changes.items() if "." not in key or key.split(".")[0] not in heads}
    result = overlay({}, changes)
    for dotted, value in changes.items():
        found: Any = result
        for key in dotted.split("."):
            found = found[key]
        assert found == value


# Presets ---------------------------------------------------------------------------------------------------------


def test_presets_by_name() -> None:
    assert {"digits", "greedy", "infopro", "paper"} <= set(preset_names())
    with pytest.raises(RecipeError, match=r"preset: unknown 'papr'; there are .*digits.*Nearest: paper"):
        preset("papr")


ODD: tuple[Any, ...] = (
    *(True, False, 0, -1, 0.5, math.nan, math.inf, 10**30, "", "3", "word", [], [1], [1, 2, 3], [True, 1], ["a"]),
    *([1.5, -2.5], {}, {"a": 1}),
)


@pytest.mark.parametrize("key", OPTIONS)
def test_odd_values_are_refused_in_words_of_our_own(key: str) -> None:
    for value in ODD:
        try:
            Recipe.from_dict(overlay({}, {key: value}))
        except RecipeError as error:
            assert not re.search(r"[Ii]nput|valid|should|parse|instance|\n", str(error)), str(error)
            assert re.search("take|give|add|must|is a probability|is the alpha|can't be read", str(error)), str(error)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"data.test_data": ""}, "data.test_data = '': an empty text is no value"),
        ({"execution.health_reference": ""}, "execution.health_reference = '': an empty text is no value"),
        ({"execution.sinks": [""]}, "execution.sinks = '': an empty text is no value"),
        ({"training.freeze": True}, "training.freeze = True: true and false are no numbers; give 1, if"),
        ({"augment": {"crop_padding": True}}, "augment.crop_padding = True: true and false are no numbers"),
        ({"local.modules": [True, 2]}, "local.modules = True: true and false are no numbers"),
        ({"training.lr": 0}, "training.lr = 0: take a number above 0"),
        ({"training.epochs": 0}, "training.epochs = 0: take 1 or more"),
        ({"local.modules": 0}, "local.modules = 0: take 1 or more"),
        ({"training.freeze": []}, "training.freeze = []: take a number or a text"),
        ({"training.lr_depth": [1.0]}, "training.lr_depth = [1.0]: a value is missing"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=f"^recipe: {re.escape(told)}"):
        Recipe.from_dict(overlay({}, values))


def test_numbers_of_thousands_of_digits_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^mine\.toml: this is not TOML \(Exceeds the limit"):
        parse_toml(f"seed = {'9' * 5000}", "mine.toml")
    with pytest.raises(RecipeError, match=r"^recipe: training\.epochs = .*: take a whole number"):
        Recipe.from_dict(overlay({}, parse_assignments([f"training.epochs={'9' * 5000}"])))


def test_label_smoothing_beside_mixup_is_said_in_one_place() -> None:
    """Labels that mixup made soft don't look at the objective's."""
    options = {"label_smoothing": 0.1}
    assert build_recipe_objective(Recipe.from_dict({"local": {"options": options}})).label_smoothing == 0.1
    recipe = Recipe.from_dict({"local": {"options": options}, "augment": {"mixup": 0.2}})
    with pytest.raises(RecipeError, match=r"^local\.options\.label_smoothing: .* set label_smoothing=0\.1"):
        build_recipe_objective(recipe)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole_recipes(name: str) -> None:
    recipe = Recipe.from_dict(preset(name))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    local = recipe.method.local
    objective = build_objective(
        local.objective, {"label_smoothing": recipe.method.augment.label_smoothing, **local.options}
    )
    for option, value in local.options.items():
        assert getattr(objective, option) == value


def test_presets_of_the_comparison_differ_in_their_objective_only() -> None:
    recipes = {name: Recipe.from_dict(preset(name)) for name in ("paper", "infopro", "greedy")}
    for name in ("infopro", "greedy"):
        keys = [line.split(":")[0] for line in difference(recipes["paper"], recipes[name])]
        assert keys
        assert all(key.startswith("local.") for key in keys), keys
    assert [recipes[name].method.local.objective for name in recipes] == ["feature", "image", "greedy"]


def test_presets_are_read_anew_each_time() -> None:
    preset("paper")["local"]["options"]["decoder"] = "changed"
    assert preset("paper")["local"]["options"]["decoder"] != "changed"


# Differences -----------------------------------------------------------------------------------------------------


def test_differences_are_the_methods_by_dotted_key() -> None:
    old = Recipe.from_dict({"training": {"epochs": 20}, "local": {"options": {"decoder": "conv"}}})
    new = Recipe.from_dict({"training": {"epochs": 30}, "seed": 1, "model": {"options": {"depths": [2, 2]}}})
    assert difference(old, new) == [
        "local.options.decoder: 'conv' -> None",
        "model.options.depths: None -> [2, 2]",
        "seed: 0 -> 1",
        "training.epochs: 20 -> 30",
    ]


def test_execution_is_no_difference() -> None:
    old = Recipe()
    new = dataclasses.replace(old, execution=Execution(device="cpu", precision="bf16", accumulation=4))
    assert old != new
    assert difference(old, new) == []


def test_parse_toml_gives_plain_values() -> None:
    assert parse_toml("a = {b = [1, 2]}", "x") == {"a": {"b": [1, 2]}}
