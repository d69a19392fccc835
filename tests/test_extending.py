"""Registries, plugins and transforms: what a person adds is found by name, and refused in one line where it's wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import localgrad
from helpers import SIZE, Recorder, batches, load_named, make, make_backbone, make_learner
from localgrad.app import build, run_folders, using_runs
from localgrad.app.recipe import Recipe, as_recipe, overlay
from localgrad.errors import DataError, RecipeError
from localgrad.objectives.auxiliary import CLASSIFIERS, DECODERS, LinearDecoder, NextClassifier
from localgrad.objectives.methods import OBJECTIVES
from localgrad.planning import cache
from localgrad.registry import Registry, load_plugins
from localgrad.training.data import Batches
from localgrad.training.settings import Augment
from localgrad.training.transforms import Prepared

VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8}
VIT["options"] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
RECIPE: dict[str, Any] = {
    "model": VIT,
    "local.modules": 2,
    "training": {"epochs": 2, "batch_size": 8},
    "execution": {"device": "cpu", "num_threads": 1, "num_workers": 0},
}


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (OBJECTIVES, DECODERS, CLASSIFIERS):
        monkeypatch.setattr(registry, "_known", dict(registry._known))


# Names ---------------------------------------------------------------------------------------------------------------


class Mine(LinearDecoder):
    """A decoder of a user's."""


@dataclass(frozen=True, kw_only=True)
class MyObjective(localgrad.GreedySupervised):
    """An objective of a user's."""


def test_what_is_registered_is_found() -> None:
    localgrad.register_decoder("mine", Mine)
    localgrad.register_decoder("mine", Mine)  # again: a module that is loaded anew
    objective = localgrad.FeatureReconstruction(decoder="mine")
    learner = localgrad.LocalLearner(make(), modules=2, input_size=SIZE, objective=objective)
    assert any(isinstance(net, Mine) for net in learner.modules[0].modules())


@pytest.mark.parametrize(
    ("register", "name", "value", "message"),
    [
        (localgrad.register_decoder, "linear", Mine, "'linear' is .*LinearDecoder already; take another"),
        (localgrad.register_decoder, "no name", Mine, "'no name' is no name"),
        (localgrad.register_decoder, "mine", nn.Linear, "inherits from localgrad.Decoder"),
        (localgrad.register_classifier, "mine", Mine, "inherits from localgrad.Classifier"),
        (localgrad.register_objective, "mine", lambda: None, "inherits from localgrad.Objective"),
        (localgrad.register_sink, "mine", 3, "give a class or a function"),
        (localgrad.register_backbone, "mine", None, "give a class or a function"),
        (localgrad.register_transform, "mine", "crop", "give a class or a function"),
    ],
)
def test_what_can_not_have_a_name_is_refused(register: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        register(name, value)


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(RecipeError, match=r"decoder: unknown 'lineer'; there are linear, conv, .* Nearest: linear"):
        DECODERS.find("lineer")


def test_entry_points_are_found_and_imported_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def entry_points(*, group: str, name: str | None = None) -> list[metadata.EntryPoint]:
        asked.append(group)
        known = [metadata.EntryPoint("installed", f"{__name__}:MyObjective", group)]
        known += [metadata.EntryPoint("gone", "no_such_package:Thing", group)]
        return [each for each in known if name in (None, each.name)]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert OBJECTIVES.find("installed") is MyObjective
    assert list(OBJECTIVES)[-2:] == ["installed", "gone"]
    assert set(asked) == {"localgrad.objectives"}
    with pytest.raises(RecipeError, match="objective 'gone': no_such_package:Thing can't be imported"):
        OBJECTIVES.find("gone")


def test_plans_that_depend_on_a_users_decoder_are_not_cached() -> None:
    assert cache.is_told_by_text(localgrad.FeatureReconstruction())
    localgrad.register_decoder("mine", Mine)
    objective = localgrad.FeatureReconstruction(decoder="mine")
    assert not cache.is_told_by_text(objective)
    assert objective.looks_inside  # what it builds isn't known to depend on layouts alone
    assert not localgrad.FeatureReconstruction().looks_inside


def test_a_decoder_of_another_size_is_told() -> None:
    class Wrong(localgrad.Decoder):
        def patches(self, grid: Tensor) -> Tensor:
            return grid[..., :3]

    layout = localgrad.Layout("NHWC", 8, (4, 4))
    with pytest.raises(RecipeError, match=r"Wrong.patches gave \[2, 4, 4, 3\]; .* num_outputs being 8"):
        Wrong(layout, layout)(torch.randn(2, 4, 4, 8))


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda loss: loss, r"'odd': it gave a tensor of shape \[\]"),
        (None, r"'odd': it gave a tensor of shape \[4\]"),
        (lambda loss: localgrad.TermValue(0.5), r"'odd': it gave 0\.5"),
        (lambda loss: localgrad.TermValue(loss.detach()), "odd: nothing in the module learns of its loss"),
    ],
)
def test_a_term_that_gives_no_scalar_is_told(gives: Any, message: str) -> None:
    class Odd(localgrad.Term):
        def forward(self, inputs: Tensor, outputs: Tensor, batch: localgrad.LocalBatch, states: Any = ()) -> Any:
            losses = outputs.flatten(1).mean(1)
            return localgrad.TermValue(losses) if gives is None else gives(losses.mean())

    @dataclass(frozen=True, kw_only=True)
    class WithOdd(localgrad.GreedySupervised):
        def terms(self, site: localgrad.Site) -> Any:
            return {"odd": (1.0, Odd())}

    learner = make_learner(modules=2, objective=WithOdd())
    with pytest.raises(RecipeError, match=f"term {message}"):
        learner.step(*batches(1)[0])


def test_logits_of_another_shape_are_told() -> None:
    class OneShort(localgrad.Classifier):
        def forward(self, features: Tensor) -> Tensor:
            return features.flatten(1)[:, : self.num_classes - 1]

    localgrad.register_classifier("one-short", OneShort)
    learner = make_learner(modules=2, objective=localgrad.GreedySupervised(classifier="one-short"))
    with pytest.raises(RecipeError, match=r"OneShort gave \[4, 4\]; give \[B, num_classes\], B being 4 and .* 5 here"):
        learner.step(*batches(1)[0])


@pytest.mark.parametrize(
    ("of_model", "said"), [(True, r"the model's head\.weight"), (False, "local module 0's as well")]
)
def test_a_net_that_two_modules_would_train_is_refused(of_model: bool, said: str) -> None:
    backbone = make_backbone()
    head = backbone.model.head if of_model else nn.Linear(4, 5)

    class Deep(localgrad.Term):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, inputs: Tensor, outputs: Tensor, batch: localgrad.LocalBatch, states: Any = ()) -> Any:
            return localgrad.TermValue(outputs.mean())

    @dataclass(frozen=True, kw_only=True)
    class WithHead(localgrad.GreedySupervised):
        def terms(self, site: localgrad.Site) -> Any:
            return {"deep": (1.0, Deep())} if site.index < site.num_modules - 1 else super().terms(site)

    with pytest.raises(RecipeError, match=f"of local module . is {said}.*: two optimizers would train it"):
        make_learner(backbone, modules=3, objective=WithHead())


# Plugins -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("plugin_of_mine"):
            del sys.modules[name]


def test_a_plugin_that_can_not_be_imported_is_told(here: Path) -> None:
    (here / "plugin_of_mine.py").write_text("import no_such_package\n")
    (here / "plugin_of_mine_too.py").write_text("1 / 0\n")
    for name, message in (
        ("nowhere_at_all", "there is no module 'nowhere_at_all', neither in the current folder"),
        ("plugin_of_mine", "'plugin_of_mine' can't be imported .ModuleNotFoundError: No module named 'no_such_pack"),
        ("plugin_of_mine_too", "can't be imported .ZeroDivisionError"),
        ("plugin_of_mine.py", "such as plugin_of_mine[.]"),
        ("./x", "no name of a module"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_plugins([name])


class Ahead(NextClassifier):
    """A classifier of a user's, made of the blocks that follow."""


def test_a_classifier_that_looks_ahead_is_refused_where_nothing_is_trained_ahead(tmp_path: Path) -> None:
    localgrad.register_classifier("ahead", Ahead)
    changes = {"local.options.classifier": "ahead", "training.schedule": "sequential", "data.name": "digits"}
    with pytest.raises(RecipeError, match=r"classifier: .* blocks that follow, and with schedule='sequential'"):
        localgrad.train(overlay(RECIPE, changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_registry_is_a_mapping() -> None:
    registry: Registry[Any] = Registry("thing")
    registry.register("one", int)
    assert dict(registry) == {"one": int}
    assert "two" not in registry
    assert len(registry) == 1


# Recipes, train and resume as calls ----------------------------------------------------------------------------------


def test_what_stands_for_a_recipe(tmp_path: Path) -> None:
    expected = Recipe.from_dict(overlay({}, {"training.epochs": 3, "local.modules": 2}))
    assert as_recipe({"training": {"epochs": 3}, "local.modules": 2}) == expected
    assert as_recipe(expected) is expected
    (tmp_path / "mine.toml").write_text(expected.to_toml())
    assert as_recipe(str(tmp_path / "mine.toml")) == expected
    assert as_recipe("digits").method.data.name == "digits"
    with pytest.raises(RecipeError, match=r"can't be read"):
        as_recipe("nothing.toml")


class Odd:
    """Takes no events."""


@pytest.mark.parametrize("sink", [Odd(), Recorder, "nothing"], ids=["object", "class", "name"])
def test_what_is_no_sink_is_refused_before_anything_is_made(sink: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sink"):
        localgrad.train(RECIPE, out=tmp_path / "run", sinks=[sink])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("named", [["tensorboard", "tensorboard"], ["tensorboard"]], ids=["recipe", "recipe and call"])
def test_a_sink_that_is_there_twice_is_refused_before_anything_is_made(named: list[str], tmp_path: Path) -> None:
    recipe = as_recipe(overlay(RECIPE, {"execution.sinks": named}))
    with pytest.raises(RecipeError, match=r"^sinks: 'tensorboard' is there twice.* give it once"):
        localgrad.train(recipe, out=tmp_path / "run", sinks=["tensorboard"] if len(named) == 1 else [])
    mine = Recorder()
    with pytest.raises(RecipeError, match=r"^sinks: .* is there twice"):
        localgrad.train(RECIPE, out=tmp_path / "run", sinks=[mine, mine])
    assert not (tmp_path / "run").exists()


# Transforms ----------------------------------------------------------------------------------------------------------


def transform_of_mine(image_size: tuple[int, int], *, training: bool) -> Any:
    """Draws from all three sources of random numbers."""

    def changed(image: Tensor) -> Tensor:
        cut = image[:, : image_size[0], : image_size[1]].clone()
        if training:
            cut[0, 0, 0] = random.randrange(256)
            cut[0, 0, 1] = int(np.random.randint(256))
            cut[0, 0, 2] = int(torch.randint(256, ()))
        return cut

    return changed


def gives_floats(image_size: tuple[int, int], *, training: bool) -> Any:
    return lambda image: image[:, : image_size[0], : image_size[1]] / 255


def fails(image_size: tuple[int, int], *, training: bool) -> Any:
    return lambda image: image.no_such_method()


def gives_nothing(image_size: tuple[int, int], *, training: bool) -> Any:
    return None


def write_photos(folder: Path, size: tuple[int, int] = (48, 60), count: int = 16) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 255, (size[0] + index % 3, size[1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def batches_of(path: Path, transform: str | None, num_workers: int = 0, **settings: Any) -> Batches:
    data = load_named(str(path), transform=transform)
    size: dict[str, Any] = {"image_size": (32, 32), "batch_size": 6, "device": torch.device("cpu")}
    augment = Augment()
    made = {**size, "augment": augment, "seed": 3, "info": data.info, "transform": transform, **settings}
    return Batches(images=data.train, num_workers=num_workers, **made)


@pytest.mark.parametrize("transform", ["imagenet", f"{__name__}:transform_of_mine"])
def test_draws_depend_on_seed_epoch_and_index_alone(tmp_path: Path, transform: str) -> None:
    path = write_photos(tmp_path / "photos")
    made = batches_of(path, transform)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    plain = [batch.images for batch in made.epoch(1)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert all(map(torch.equal, plain, (b.images for b in batches_of(path, transform, num_workers=2).epoch(1))))
    assert all(map(torch.equal, plain[2:], (batch.images for batch in made.epoch(1, start=2))))
    assert not torch.equal(plain[0], next(made.epoch(2)).images)
    other = next(batches_of(path, transform, seed=4).epoch(1)).images
    assert not torch.equal(plain[0], other)


def test_images_of_a_batch_are_drawn_for_one_by_one(tmp_path: Path) -> None:
    path = write_photos(tmp_path / "photos")
    images = next(batches_of(path, f"{__name__}:transform_of_mine").epoch(0)).images
    assert len({tuple(corner) for corner in images[:, 0, 0, :3].tolist()}) == len(images)


def test_evaluation_takes_the_centre() -> None:
    image = torch.arange(3 * 64 * 128, dtype=torch.float32).reshape(3, 64, 128).div(97).to(torch.uint8)
    prepared = Prepared("imagenet", (56, 56), training=False)
    found = prepared(image, 0)
    assert found.shape == (3, 56, 56)
    assert torch.equal(found, prepared(image, 1))
    assert torch.equal(found, image[:, 4:60, 36:92])  # 56 of 64 is the share, so nothing is resized


@pytest.mark.parametrize("channels", [1, 3])
def test_the_standard_transform_gives_the_models_size(channels: int) -> None:
    prepared = Prepared("imagenet", (24, 40), training=True)
    image = torch.randint(256, (channels, 50, 70), dtype=torch.uint8)
    found = torch.stack([prepared(image, seed) for seed in range(12)])
    assert found.shape == (12, channels, 24, 40)
    assert found.float().std(dim=0).mean() > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gives_floats", r"gave torch.float32 \[3, 32, 32\]; let it give torch.uint8 \[3, 32, 32\]"),
        ("fails", "can't take an image of .*AttributeError: .*no_such_method"),
        ("gives_nothing", "gave NoneType for image_size"),
    ],
)
def test_a_transform_that_is_wrong_is_told_before_training(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        localgrad.train(
            {**RECIPE, "data.name": str(write_photos(tmp_path / "photos"))},
            transform=f"{__name__}:{name}",
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_an_error_in_a_worker_is_one_line(tmp_path: Path) -> None:
    made = batches_of(write_photos(tmp_path / "photos"), f"{__name__}:transform_of_mine", num_workers=1)
    assert made.wanted.prepared is not None
    made.wanted.prepared.transform = lambda image: image.no_such_method()
    with pytest.raises(DataError, match=r"no_such_method.* The image: .*\.png\.$"):
        next(made.epoch(0))


def test_files_larger_than_the_model_get_the_standard_transform_and_the_run_keeps_it(tmp_path: Path) -> None:
    recipe = {**RECIPE, "data.name": str(write_photos(tmp_path / "photos")), "training.epochs": 1}
    listener = Recorder()
    localgrad.train(recipe, out=tmp_path / "run", sinks=[listener])
    assert any("through the transform imagenet" in line for line in listener.events[0].details)
    assert run_folders.read_recipe(tmp_path / "run").method.data.transform == "imagenet"
    assert using_runs.evaluate_run(tmp_path / "run")["num_images"] > 0
    predictions = list(using_runs.predict(tmp_path / "run", tmp_path / "photos" / "cat" / "0.png"))
    assert predictions[0].classes[0][0] in ("cat", "dog")


@pytest.mark.parametrize("changes", [{"data.transform": "none"}, {"augment.flip": True}, {"data.fit": "pad"}], ids=str)
def test_what_is_said_of_images_stands(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = as_recipe({**RECIPE, "data.name": str(write_photos(tmp_path / "photos", count=12)), **changes})
    job = build.build(recipe, is_new=True)
    assert job.data.transform is None
    assert job.recipe.method.data.transform == recipe.method.data.transform


def test_small_images_and_runs_that_began_before_stay_as_they_are(tmp_path: Path) -> None:
    small = as_recipe({**RECIPE, "data.name": str(write_photos(tmp_path / "small", (24, 24), count=12))})
    assert build.build(small, is_new=True).data.transform is None
    large = as_recipe({**RECIPE, "data.name": str(write_photos(tmp_path / "large", count=12))})
    assert build.build(large).data.transform is None  # as in resuming a run whose recipe has none


def test_a_function_goes_by_its_name(tmp_path: Path) -> None:
    recipe = {**RECIPE, "data.name": "digits", "data.limit": 64, "training.epochs": 1}
    small = {"model.img_size": 8, "model.patch_size": 2}
    localgrad.train({**recipe, **small}, transform=transform_of_mine, out=tmp_path / "run")
    assert run_folders.read_recipe(tmp_path / "run").method.data.transform == f"{__name__}:transform_of_mine"
    assert localgrad.resume(tmp_path / "run")["epochs"] == 1
    with pytest.raises(RecipeError, match=r"transform: .* can't be found again by a name"):
        localgrad.train(recipe, transform=lambda image_size, training: None)
