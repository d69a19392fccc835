"""What a run folder says of its run: recipe, data, summary, checkpoint; read, verified, held against what is wanted."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from localgrad.app.build import Job, build
from localgrad.app.hub_classifiers import CONFIG, PROCESSOR, config_text, processor_text
from localgrad.app.hub_models import is_on_hub
from localgrad.app.places import Places, are_elsewhere, located, telling_places, with_paths_of, write_places
from localgrad.app.recipe import Recipe, TrainingSettings, difference
from localgrad.app.timm_classifiers import is_timm_run, timm_config_of_run
from localgrad.errors import BackboneError, CheckpointError, DataError, RecipeError, RunFolderError, arg
from localgrad.formats import check_format
from localgrad.training.data import DataInfo
from localgrad.training.events import summary_rows
from localgrad.training.fingerprint import DataDescription, fingerprint_of
from localgrad.training.folder import RunFolder, is_sound, kept_of, load_saved_weights, read_text, say
from localgrad.training.parallel_trainer import joined_checkpoint
from localgrad.training.saved import RUN_FORMAT, Checkpoint, PositionState, Summary
from localgrad.training.settings import DataSettings

_PLACE = [each.name for each in fields(DataSettings) if each.name in ("name", "root") or each.name.endswith("_data")]
"""Keys of a recipe that say where its data lies."""


def place_of(recipe: Recipe) -> tuple[str | None, ...]:
    """Where a recipe's data lies."""
    return tuple(getattr(recipe.method.data, key) for key in _PLACE)


def without_place(recipe: Recipe) -> Recipe:
    """A recipe that doesn't say where its data lies."""
    data = replace(recipe.method.data, **{key: getattr(DataSettings(), key) for key in _PLACE})
    return replace(recipe, method=replace(recipe.method, data=data))


def length_of(recipe: Recipe) -> tuple[int, int | None]:
    """What says how long a run is: its epochs, and how many it waits for a better one."""
    return recipe.method.training.epochs, recipe.method.training.patience


def other_method(own: Recipe, recipe: Recipe) -> list[str]:
    """The lines in which a recipe isn't one that a run may go on with.

    Where its data lies may differ, its length, and what becomes of corrupt images: those of the test part may be found
    when all epochs are trained.
    """
    lengths = ("epochs", "patience")

    def bare(each: Recipe) -> Recipe:
        method = without_place(each).method
        training = replace(method.training, **{key: getattr(TrainingSettings(), key) for key in lengths})
        data = replace(method.data, on_corrupt=DataSettings().on_corrupt)
        return replace(each, method=replace(method, training=training, data=data))

    return difference(bare(own), bare(recipe))


def read_recipe(path: Path) -> Recipe:
    """Read a run's recipe; a damaged one as its checkpoint keeps it.

    Raises:
        RunFolderError: no run there, or its recipe is damaged and no checkpoint keeps it.
        RecipeError: its recipe can't be read.
    """
    try:
        text = read_text(path, "recipe.toml")
    except OSError as error:
        raise RunFolderError(
            f"{path}: no run there (no recipe.toml that can be read); name a folder that `localgrad train` made."
        ) from error
    return Recipe.from_toml(text, str(path / "recipe.toml"))


def read_description(path: Path) -> DataDescription:
    """Read what a run knows of its data; where it is damaged, as its checkpoint keeps it.

    Raises:
        CheckpointError: missing or damaged, and no checkpoint keeps it.
        DataError: a newer version wrote it.
    """
    try:
        return DataDescription.from_dict(json.loads(read_text(path, "data.json")))
    except DataError:  # of a newer version
        raise
    except (OSError, ValueError, TypeError, AttributeError, RunFolderError) as error:
        raise CheckpointError(
            f"{path / 'data.json'}: missing or damaged ({error}); restore it from a copy, or train the run again."
        ) from error


def config_kept(path: Path, recipe: Recipe) -> str | None:
    """The text of the config of a run's model of transformers; of any other model ``None``.

    Raises:
        RunFolderError: it is missing or damaged, and no checkpoint keeps it.
    """
    if not is_on_hub(recipe.method.model.name):
        return None
    try:
        return read_text(path, CONFIG)
    except OSError as error:
        raise RunFolderError(
            f"{path / CONFIG}: missing, and no checkpoint keeps it; restore it from a copy, or train the run again."
        ) from error


def describe_model(job: Job) -> dict[str, str]:
    """Files of a run, by name, by which transformers or timm reads its model; none of a model that is neither's."""
    backbone = job.learner.backbone
    return files_beside_weights(job.recipe, backbone.model, job.data.info, backbone.image_size)


def files_beside_weights(
    recipe: Recipe, model: nn.Module, info: DataInfo, size: tuple[int, int, int]
) -> dict[str, str]:
    """Texts, by the names of files, by which transformers or timm reads a run's model; none of another model.

    A model that timm can't describe has none, which is said: it is trained, and becomes a program, all the same.

    Args:
        recipe: of the run.
        model: with adapters in its layers or without.
        info: of the data.
        size: (C, H, W) that the model takes.
    """
    if is_timm_run(recipe, model):
        try:
            return {CONFIG: timm_config_of_run(recipe, model, info, size)}
        except BackboneError as error:
            say(f"There is no {CONFIG}, by which timm would load the run's folder: {error}")
            return {}
    if not is_on_hub(recipe.method.model.name):
        return {}
    _, height, width = size
    processor = processor_text((height, width), info.mean, info.std, replace(recipe.method.data, fit=info.fit))
    found = {CONFIG: config_text(model, info.class_names)}
    return found if processor is None else found | {PROCESSOR: processor}


def finished_as(path: Path, own: Recipe, recipe: Recipe) -> Summary | None:
    """The summary of a run, if by a recipe, too, nothing is left to train; ``own`` is the run's."""
    summary = read_summary(path, own) if own.method.training.epochs == recipe.method.training.epochs else None
    goes_on = summary is not None and summary.get("stopped_early") and length_of(own) != length_of(recipe)
    if summary is None or goes_on:
        return None
    if left := difference(own, recipe):
        say(f"{path}: finished, so this changes nothing: {'; '.join(left)}.")
    return summary


def read_summary(path: Path, recipe: Recipe) -> Summary | None:
    """The summary of a finished run, the last thing that it writes; ``None`` also where that is damaged.

    While a finished run is extended, its summary stays until there is a new one: it is of another length.
    """
    file = path / "summary.json"
    if not file.exists():
        return None
    try:
        summary: Summary = json.loads(read_text(path, file.name))
        summary["folder"] = str(path)
        summary_rows(summary)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RunFolderError) as error:
        if not (path / "checkpoints" / "last.pt").exists():
            raise RunFolderError(f"{file}: damaged; restore it from a copy.") from error
        say(f"{file}: damaged; made again from the last checkpoint.")
        return None
    check_format(str(file), summary.get("format", 1), RUN_FORMAT, RunFolderError)
    return summary if (summary["epochs"], summary.get("patience")) == length_of(recipe) else None


def load_last(folder: RunFolder, recipe: Recipe) -> Checkpoint | None:
    """The state to resume from, and the weights of the best epoch are there; ``None`` before the first checkpoint.

    Raises:
        CheckpointError: there is no sound one of this run.
        RecipeError: it was trained for more epochs than the recipe has.
        RunFolderError: the run is finished and has none.
    """
    if not folder.has_checkpoint:
        if (folder.path / "summary.json").exists():
            raise RunFolderError(
                f"{arg('resume', folder.path)}: the run is finished, and its checkpoint is gone ({folder.last}), so it "
                f"can't go on; start a new one, from its weights by {arg('weights', str(folder.path))}."
            )
        return None

    def agree(state: Checkpoint) -> str | None:
        missing = [name for name in ("position", "sums", "random") if not isinstance(state.get(name), dict)]
        missing += [] if isinstance(state.get("learner"), dict) or state.get("parts") else ["learner"]
        if missing:
            return f"it has no {missing[0]!r}"
        text = kept_of(state).get("recipe.toml")
        if not isinstance(text, str):
            return None
        different = other_method(Recipe.from_toml(text, "checkpoint"), recipe)
        # A number of modules and its boundaries are the same (``on_oom``); the learner compares those.
        different = [line for line in different if not line.startswith("local.modules:")]
        return f"it has another recipe: {', '.join(different)}" if different else None

    state = _of_length(folder, joined_checkpoint(folder.load_last(agree)), recipe)
    return {**state, "lost_best": _has_lost_best(folder, state["position"], recipe)}


def _of_length(folder: RunFolder, state: Checkpoint, recipe: Recipe) -> Checkpoint:
    """A checkpoint of a run that goes on for another number of epochs than it was saved with, or for the same.

    The checkpoint says for how many it was saved: the recipe may be the new one already, if that was all that was done
    before the run was interrupted again.
    """
    text = kept_of(state).get("recipe.toml")
    begun = Recipe.from_toml(text, "checkpoint") if isinstance(text, str) else read_recipe(folder.path)
    if length_of(begun) == length_of(recipe):
        return state
    (before, _), (epochs, patience) = length_of(begun), length_of(recipe)
    complete, batch = state["position"].get("epoch", 0), state["position"].get("batch", 0)
    trained, is_finished = complete + (batch > 0), (folder.path / "summary.json").exists()
    if epochs < trained or (epochs == trained and epochs != before and is_finished and not batch):
        raise RecipeError(
            f"{arg('epochs', epochs)}: the run is in epoch {trained} already; take {trained} or more, or start a new "
            "run."
            if batch
            else f"{arg('epochs', epochs)}: the run has trained {trained} already; take more, or start a new run."
        )
    note = (
        f"learning rates from epoch {complete + 1} on are those of {epochs} epochs, before it of {before}: this isn't "
        f"bit for bit a run of {epochs} from its start"
        if epochs != before
        else f"from epoch {complete + 1} on no epoch is the last one for not being better"
        if patience is None
        else f"from epoch {complete + 1} on {patience} epochs are waited for a better one"
    )
    return {**state, "position": {**state["position"], "extended_at": complete}, "note": note}


def _has_lost_best(folder: RunFolder, position: PositionState, recipe: Recipe) -> bool:
    """Whether the best epoch's weights are damaged, and the checkpoint has them; read at the end, too late to find out.

    Raises:
        CheckpointError: they are damaged or missing, and can't be had back.
    """
    best = position.get("best_epoch")
    if best is None:
        return False
    try:
        load_saved_weights(folder.best)
    except CheckpointError as error:
        is_of_best = (best + 1, 0) == (position.get("epoch"), position.get("batch"))
        if recipe.method.training.schedule == "sequential" or not is_of_best:
            raise
        say(f"{error.fact}; written again from the checkpoint, which is of the best epoch.")
        return True
    return False


def build_again(recipe: Recipe, places: Places, **settings: Any) -> Job:
    """Build what a run's recipe names, which was there once; the job's recipe has its paths as they were typed."""
    try:
        with telling_places(recipe, places, DataError):
            wanted = located(recipe, places)
            job = build(wanted, **settings)
        return job if wanted is recipe else replace(job, recipe=with_paths_of(job.recipe, recipe))
    except DataError as error:
        name = recipe.method.data.root or recipe.method.data.name
        if Path(name).expanduser().exists():
            raise
        raise DataError(f"{error} If it was moved, say where it is now: {arg('data')}, or {arg('root')}.") from error


def describe_data(job: Job) -> DataDescription:
    """What ``data.json`` holds of a job's data."""
    height, width = job.batches.image_size
    return DataDescription(job.data.info, fingerprint_of(job.data), (height, width))


def is_moved(own: Recipe, recipe: Recipe, places: Places) -> bool:
    """Whether a run's data lies elsewhere than it did: somebody says so, or a relative path leads elsewhere."""
    return place_of(own) != place_of(recipe) or are_elsewhere(recipe, places)


def check_data(path: Path, job: Job, *, is_moved: bool) -> DataDescription:
    """Compare the data with what a run was trained on; gives what ``data.json`` would hold of it.

    Raises:
        DataError: it is other data, in another place.
    """
    found, name = describe_data(job), job.recipe.method.data.name
    try:
        known = read_description(path)
    except CheckpointError as error:
        if is_moved:
            raise DataError(f"{arg('data', name)}: it can't be compared with the run's: {error}") from error
        say(f"{path / 'data.json'}: missing or damaged; the data is taken as it is.")
        return found
    different = known.differences(found)
    if different:
        what = f"not what the run in {path} was trained on (another {', '.join(different)})"
        if is_moved:
            raise DataError(f"{arg('data', name)}: this is {what}; name where the same images and labels are.")
        say(f"The data {name} is {what}: it was changed, and images that were trained on may select or test now.")
    return found


def _has_changed(path: Path, described: DataDescription) -> bool:
    """Whether a run's data is not what its ``data.json`` says: what it goes on with is what it is used with."""
    return bool(read_description(path).differences(described))


def rewrite(
    folder: RunFolder,
    recipe: Recipe,
    described: DataDescription,
    places: Places,
    *,
    is_moved: bool,
    config: str | None = None,
) -> None:
    """Write down what a run goes on with: what was laid over its recipe, where files are now, what was damaged.

    Args:
        folder: of the run.
        recipe: that it goes on by.
        described: what ``data.json`` holds.
        places: of what the recipe names.
        is_moved: whether the data lies elsewhere now.
        config: the text of ``config.json``, of a model that has one.
    """
    write_places(folder, recipe, places)
    text = recipe.to_toml()
    if not (is_sound(folder.path, "recipe.toml") and read_text(folder.path, "recipe.toml") == text):
        folder.write_text("recipe.toml", text)
    folder.kept["recipe.toml"] = text
    if is_moved or not is_sound(folder.path, "data.json") or _has_changed(folder.path, described):
        folder.write_json("data.json", described.to_dict())
    else:
        folder.kept["data.json"] = read_text(folder.path, "data.json")
    if config is not None and not (is_sound(folder.path, CONFIG) and read_text(folder.path, CONFIG) == config):
        folder.write_text(CONFIG, config)
    if config is not None:
        folder.kept[CONFIG] = config
