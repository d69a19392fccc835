"""A trained run put to use: its accuracy on a part of its data, and the classes of other images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from localgrad.app.build import input_size_of, make_model, resolve_device
from localgrad.app.fitting import of_best
from localgrad.app.places import read_places
from localgrad.app.recipe import Recipe, validated
from localgrad.app.run_folders import (
    build_again,
    check_data,
    config_kept,
    is_moved,
    read_description,
    read_recipe,
)
from localgrad.backbones.base import Backbone
from localgrad.backbones.example import logits_of
from localgrad.errors import RecipeError, arg
from localgrad.registry import load_plugins
from localgrad.step.states import load_weights
from localgrad.training.data import load_images_for_prediction
from localgrad.training.folder import load_saved_weights, say
from localgrad.training.image_sets import Skipped
from localgrad.training.saved import Evaluation
from localgrad.training.settings import DataSettings
from localgrad.training.stagewise import gather
from localgrad.training.trainer import below, evaluate, halve, load_best_weights, with_less

_BEST = Path("checkpoints") / "best.safetensors"


def evaluate_run(
    path: Path, *, part: str = "test", device: str | None = None, data: str | None = None, root: str | None = None
) -> Evaluation:
    """Accuracy of a run's best weights on its own data.

    Args:
        path: the run folder.
        part: ``test``, ``val`` or ``train``.
        device: by default the recipe's.
        data: where the run's data lies now, if it was moved.
        root: the same of torchvision's data sets.

    Raises:
        DataError: the data is missing, or was moved and is not what the run was trained on.
        CheckpointError: the weights are missing or damaged.
    """
    if part not in ("test", "val", "train"):
        raise RecipeError(f"{arg('part')}: unknown {part!r}; take test, val or train.")
    own = _on_device(read_recipe(path), device)
    place = own.method.data
    place = replace(place, name=data or place.name, root=root or place.root)
    recipe = replace(own, method=replace(own.method, data=place))
    weights = load_saved_weights(path / _BEST)
    places = read_places(path, own, recipe)
    job = build_again(recipe, places, has_weights=True, config=config_kept(path, recipe))
    check_data(path, job, is_moved=is_moved(own, recipe, places))
    images = job.data.part(part)
    if images is None:
        raise RecipeError(
            f"{arg('part', 'val')}: this run has no validation images (data.val_fraction = 0); take "
            f"{arg('part', 'test')}."
        )
    load_best_weights(job.local, weights)
    gather(job.local, job.device)
    batches = job.evaluation_batches(images)
    accuracy, by_module = with_less(
        "the evaluation", lambda: evaluate(job.local, batches), partial(halve, batches), job.device, _say_less
    )
    return {
        "part": part,
        "accuracy": accuracy,
        "module_accuracy": of_best(recipe, by_module),
        "num_images": job.data.num_read(part),
        "skipped": job.data.skipped[part].counts(),
    }


def _say_less(place: str, less: str) -> bool:
    say(f"memory ran out in {place}; going on with {less}.")
    return True


@dataclass(frozen=True)
class Prediction:
    """The classes that a model finds in one image, as (name, probability), the likeliest first."""

    path: Path
    classes: tuple[tuple[str, float], ...]


def predict(
    path: Path,
    images: Path,
    *,
    top: int = 3,
    device: str | None = None,
    on_corrupt: str | None = None,
    image_range: Sequence[float] | None = None,
    background: str | None = None,
    fit: str | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Prediction]:
    """Classify images with a run's best weights; the plain model alone is used, and the data set not needed.

    Args:
        path: the run folder.
        images: an image, or a folder of images.
        top: classes to name for each.
        device: by default the recipe's; so are the four that follow, as ``data.`` of a recipe has them.
        on_corrupt: an image that is corrupt.
        image_range: (black, white) of images of more than 8 bits.
        background: behind transparent images.
        fit: of images of another shape.
        skipped: takes what is passed over.

    Raises:
        RecipeError: an impossible value.
        DataError: an image that can't be read.
    """
    asked = {"on_corrupt": on_corrupt, "image_range": image_range, "background": background, "fit": fit}
    given = {key: value for key, value in asked.items() if value is not None}
    checked: DataSettings = validated(DataSettings, given, "data.")
    recipe = _on_device(read_recipe(path), device)
    reading = replace(recipe.method.data, **{key: getattr(checked, key) for key in given})
    info = read_description(path).info
    load_plugins(recipe.execution.plugins)
    where = resolve_device(recipe.execution.device)
    settings = replace(recipe.method.model, pretrained=False, weights=None)
    config = config_kept(path, recipe)
    made, _ = make_model(settings, num_classes=info.num_classes, num_channels=info.num_channels, config=config)
    size = input_size_of(made, settings, info.num_channels)
    model = made.model if isinstance(made, Backbone) else made
    load_weights(model, below(load_saved_weights(path / _BEST), "model."))
    model.to(where).eval()
    for image_path, image in load_images_for_prediction(images, reading, info, image_size=size[1:], skipped=skipped):
        with torch.no_grad():
            logits = logits_of(model, model(image[None].to(where)))
            shares = logits.float().softmax(dim=1)[0]
        best = shares.topk(min(top, len(info.class_names)))
        yield Prediction(
            image_path,
            tuple((info.class_names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )


def _on_device(recipe: Recipe, device: str | None) -> Recipe:
    return recipe if device is None else replace(recipe, execution=replace(recipe.execution, device=device))
