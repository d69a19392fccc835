"""A trained run put to use: its accuracy on a part of its data, and the classes of other images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from localgrad.app.build import input_size_of, make_model, resolve_device
from localgrad.app.fitting import of_best
from localgrad.app.places import read_places
from localgrad.app.recipe import Recipe, validated
from localgrad.app.run_folders import (
    build_again,
    check_data,
    config_kept,
    files_beside_weights,
    is_moved,
    read_description,
    read_recipe,
    read_summary,
)
from localgrad.backbones.base import Backbone
from localgrad.backbones.example import logits_of
from localgrad.backbones.timm_config import WEIGHTS
from localgrad.errors import DataError, RecipeError, RunFolderError, arg
from localgrad.registry import load_plugins
from localgrad.step.states import load_weights
from localgrad.training.data import DataInfo
from localgrad.training.folder import load_saved_weights, say
from localgrad.training.image_sets import Skipped
from localgrad.training.images import Unreadable
from localgrad.training.prediction import images_named, load_images_for_prediction
from localgrad.training.saved import Evaluation, Summary
from localgrad.training.settings import DataSettings
from localgrad.training.stagewise import gather
from localgrad.training.trainer import below, evaluate, halve, load_best_weights, with_less
from localgrad.training.transforms import NONE

PREDICTED_AT_ONCE = 32
"""Images: enough for a card not to wait, few enough for any."""
_BEST = Path("checkpoints") / "best.safetensors"


def evaluate_run(
    path: Path,
    *,
    part: str = "test",
    device: str | None = None,
    data: str | None = None,
    root: str | None = None,
    download: bool = False,
) -> Evaluation:
    """Accuracy of a run's best weights on its own data.

    Args:
        path: the run folder.
        part: ``test``, ``val`` or ``train``.
        device: by default the recipe's.
        data: where the run's data lies now, if it was moved.
        root: the same of torchvision's data sets.
        download: let torchvision fetch the run's data set, if it is missing here.

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
    job = build_again(recipe, places, download=download, has_weights=True, config=config_kept(path, recipe))
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
    """What a model finds in one image.

    Attributes:
        path: of the image.
        classes: (name, probability), the likeliest first; none where there is an error.
        error: why the image has no classes.
    """

    path: Path
    classes: tuple[tuple[str, float], ...]
    error: str | None = None


@dataclass(frozen=True)
class Predictions:
    """Predictions as they are made, once.

    Attributes:
        num_named: classes that each image has.
        made: goes through the images.
    """

    num_named: int
    made: Iterator[Prediction]

    def __iter__(self) -> Iterator[Prediction]:
        return self.made


def predict(
    path: Path,
    images: Path | str | Sequence[Path | str],
    *,
    top: int = 3,
    device: str | None = None,
    on_corrupt: str = "skip",
    image_range: Sequence[float] | None = None,
    background: str | None = None,
    fit: str | None = None,
    skipped: Skipped | None = None,
    batch_size: int = PREDICTED_AT_ONCE,
) -> Predictions:
    """Classify images with a run's best weights; the plain model alone is used, and the data set not needed.

    All that can be wrong but for single images is found before this returns.

    Args:
        path: the run folder.
        images: image files, folders and patterns, or one of them.
        top: classes to name for each, as far as there are so many.
        device: by default the recipe's; so are the three that follow the next one, as ``data.`` of a recipe has them.
        on_corrupt: an image that can't be read has an ``error`` (``skip``), or ends all (``error``).
        image_range: (black, white) of images of more than 8 bits.
        background: behind transparent images.
        fit: of images of another shape.
        skipped: takes what is passed over: unreadable images, and what is no image.
        batch_size: images that the model is given at once; where memory runs out, fewer.

    Raises:
        RecipeError: an impossible value.
        DataError: no image there; or, later, one that can't be read.
    """
    asked = {"on_corrupt": on_corrupt, "image_range": image_range, "background": background, "fit": fit}
    for name, number in (("top", top), ("batch_size", batch_size)):
        if number < 1:
            raise RecipeError(f"{arg(name, number)}: take 1 or more.")
    given = {key: value for key, value in asked.items() if value is not None}
    checked: DataSettings = validated(DataSettings, given, "data.")
    recipe = _on_device(read_recipe(path), device)
    if fit is not None and recipe.method.data.transform not in (None, NONE):
        raise RecipeError(
            f"{arg('fit', fit)}: the run's images go through the transform {recipe.method.data.transform}, which "
            f"brings them to the model's shape by itself; leave {arg('fit')} out."
        )
    reading = replace(recipe.method.data, **{key: getattr(checked, key) for key in given})
    info = read_description(path).info
    left_out = Skipped() if skipped is None else skipped
    found = images_named([images] if isinstance(images, Path | str) else images, left_out)
    load_plugins(recipe.execution.plugins)
    where = resolve_device(recipe.execution.device)
    model, size = _model_with(path, recipe, info, below(load_saved_weights(path / _BEST), "model."))
    classifier = _Classifier(model.to(where), where, info.class_names, batch_size)
    loaded = load_images_for_prediction(found, reading, info, image_size=size[1:])
    num_named = min(top, info.num_classes)
    return Predictions(num_named, _predictions(classifier, loaded, num_named, left_out))


@dataclass
class _Classifier:
    """A plain model in evaluation mode, and how many images it is given at once: fewer where memory runs out."""

    model: nn.Module
    device: torch.device
    class_names: tuple[str, ...]
    batch_size: int

    def shares(self, images: Sequence[Tensor]) -> Tensor:
        """Probabilities, float32 [B, K] on the processor, of images [C, H, W]."""
        return with_less("prediction", lambda: self._shares(images), partial(halve, self), self.device, _say_less)

    @torch.no_grad()
    def _shares(self, images: Sequence[Tensor]) -> Tensor:
        found = []
        for start in range(0, len(images), self.batch_size):
            batch = torch.stack(list(images[start : start + self.batch_size])).to(self.device)
            found.append(logits_of(self.model, self.model(batch)).float().softmax(dim=1).cpu())
        return torch.cat(found)


def _predictions(
    classifier: _Classifier, loaded: Iterator[tuple[Path, Tensor | Unreadable]], top: int, skipped: Skipped
) -> Iterator[Prediction]:
    """In the images' order, batch by batch."""
    while batch := list(itertools.islice(loaded, classifier.batch_size)):
        images = [image for _, image in batch if isinstance(image, Tensor)]
        shares = iter(classifier.shares(images) if images else ())
        for path, image in batch:
            if isinstance(image, Unreadable):
                skipped.add(str(path), image)
                yield Prediction(path, (), skipped.images[str(path)])
            else:
                yield _likeliest(path, next(shares), classifier.class_names, top)


def _likeliest(path: Path, shares: Tensor, class_names: tuple[str, ...], top: int) -> Prediction:
    if not shares.isfinite().all():
        return Prediction(path, (), "the model's logits are no finite numbers")
    best = shares.sort(descending=True, stable=True)
    values = zip(best.indices[:top].tolist(), best.values[:top].tolist(), strict=True)
    return Prediction(path, tuple((class_names[index], share) for index, share in values))


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run leaves, to be used elsewhere; on the processor, in evaluation mode.

    Attributes:
        path: the run folder.
        recipe: of the run.
        info: of its data.
        summary: its figures.
        model: the plain one, with the weights of ``model.safetensors``.
        trained: as it was trained, with the best epoch's weights: with adapters, or weights of 4 bits, where it has
            them.
        size: (C, H, W) that it takes.
        files: texts by which its library reads it, by name.
    """

    path: Path
    recipe: Recipe
    info: DataInfo
    summary: Summary
    model: nn.Module
    trained: nn.Module
    size: tuple[int, int, int]
    files: Mapping[str, str]

    def images(self, path: Path, count: int) -> Tensor:
        """So many images of a file or a folder at most, [B, C, H, W], as the model is evaluated on them.

        Raises:
            DataError: there is none that can be read.
        """
        paths = images_named([path], Skipped())
        reading = replace(self.recipe.method.data, on_corrupt="skip")
        found = load_images_for_prediction(paths, reading, self.info, image_size=self.size[1:])
        images, left_out = [], []
        for place, image in found:
            if isinstance(image, Unreadable):
                left_out.append(f"{place} ({image.reason})")
            else:
                images.append(image)
            if len(images) == count:
                break
        if not images:
            raise DataError(f"None of the images in {path} can be read, such as {left_out[0]}; name others.")
        for each in left_out:
            say(f"left out: {each}.")
        return torch.stack(images)


def open_run(path: Path) -> FinishedRun:
    """A finished run, with its model twice: as its folder has it for other libraries, and as it was trained.

    Raises:
        RunFolderError: no run there, or it isn't finished.
        CheckpointError: its weights are missing or damaged.
    """
    recipe = read_recipe(path)
    summary = read_summary(path, recipe)
    if summary is None:
        raise RunFolderError(
            f"{path}: this run isn't finished, and has no {WEIGHTS} of its best epoch yet; go on with "
            f"{arg('resume', path)}."
        )
    info = read_description(path).info
    load_plugins(recipe.execution.plugins)
    settings = recipe.method.model
    bare = replace(recipe, method=replace(recipe.method, model=replace(settings, lora=None, quantize=None)))
    model, size = _model_with(path, bare, info, load_saved_weights(path / WEIGHTS))
    trained, _ = _model_with(path, recipe, info, below(load_saved_weights(path / _BEST), "model."))
    return FinishedRun(
        path, recipe, info, summary, model, trained, size, files_beside_weights(recipe, model, info, size)
    )


def _model_with(
    path: Path, recipe: Recipe, info: DataInfo, weights: dict[str, Tensor]
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model of a run's recipe with weights, in evaluation mode, and the (C, H, W) that it takes."""
    settings = replace(recipe.method.model, pretrained=False, weights=None)
    config = config_kept(path, recipe)
    made, _ = make_model(settings, num_classes=info.num_classes, num_channels=info.num_channels, config=config)
    model = made.model if isinstance(made, Backbone) else made
    load_weights(model, weights)
    return model.eval(), input_size_of(made, settings, info.num_channels)


def _on_device(recipe: Recipe, device: str | None) -> Recipe:
    return recipe if device is None else replace(recipe, execution=replace(recipe.execution, device=device))
