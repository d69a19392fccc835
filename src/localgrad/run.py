"""A run: one execution of a recipe in its folder: trained, resumed, evaluated, used.

The folder is made when all that the recipe names is built (``build.py``), so that a mistake leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from localgrad import rules
from localgrad.app.agreement import team_of, together
from localgrad.app.build import Job, build, create_model, input_size_of, resolve_device
from localgrad.app.planned import check_plan_fits, laid_over, note_of_plan, plan_recipe, task_on
from localgrad.app.recipe import DataSettings, Recipe, as_recipe, difference, flat, overlay, validated
from localgrad.app.replanning import Replanner
from localgrad.app.threads import threads_kept
from localgrad.backbones.base import Backbone
from localgrad.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    LocalgradError,
    MemoryExceeded,
    PartitionError,
    RecipeError,
    RunFolderError,
    arg,
)
from localgrad.estimating import end_to_end, estimate_step
from localgrad.formats import check_format
from localgrad.memory.allocator_rules import fraction_of, rules_here
from localgrad.memory.track import MemoryProfile
from localgrad.parallel.memory import estimate_share
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.parallel.team import Team, was_restarted
from localgrad.partition import Plan, forecast_of
from localgrad.registry import load_plugins, name_of_function
from localgrad.step.executor import out_of_memory
from localgrad.training.data import DataInfo, Splits, load_images_for_prediction
from localgrad.training.events import (
    JsonlSink,
    Replanned,
    RunEnded,
    RunStarted,
    Sink,
    check_sinks,
    make_sinks,
    summary_rows,
)
from localgrad.training.feature_cache import check_space
from localgrad.training.fingerprint import DataDescription, fingerprint_of
from localgrad.training.folder import (
    RunFolder,
    check_writable,
    holds_run,
    is_sound,
    kept_of,
    load_saved_weights,
    new_folder,
    read_text,
    save_weights,
    say,
)
from localgrad.training.health import HealthCheck
from localgrad.training.image_sets import Skipped, skipped_table
from localgrad.training.images import parse_colour
from localgrad.training.optim import note_of_warmup
from localgrad.training.parallel_trainer import ParallelTrainer, joined_checkpoint, name_of
from localgrad.training.saved import (
    RUN_FORMAT,
    Checkpoint,
    Evaluation,
    Peak,
    Peaks,
    PositionState,
    RankFigures,
    Summary,
)
from localgrad.training.stagewise import StagewiseTrainer, disk_needed, estimate_stages, gather
from localgrad.training.trainer import LocalTrainer, Trainer, evaluate, load_best_weights
from localgrad.training.transforms import NONE
from localgrad.units import format_bytes, parse_bytes

_FEW = 10  # classes that are named in the first lines of a run
_ONE_LINE = 100


@threads_kept()
def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: Path | str | None = None,
    transform: str | Callable[..., Any] | None = None,
    download: bool = False,
    sinks: Sequence[Sink | str] = (),
    plan: Plan | None = None,
    budget: int | str | None = None,
    on_oom: str = "stop",
    cache: bool = True,
    card: str = "auto",
    confirm: bool = True,
) -> Summary:
    """Train a recipe from the start, as ``localgrad train`` does, in a run folder of its own.

    Args:
        recipe: what to do: a recipe, its values (nested, or by dotted key), a preset's name, or a file in TOML.
        out: the run folder; by default a new one under ``runs/``.
        transform: what makes an image one of the model's size, in the recipe's place (``data.transform``): a name, or
            a function of a module, called with ``image_size`` and ``training=``.
        download: let torchvision fetch a data set that is missing.
        sinks: take the events, beside the run folder's own files and what the recipe names; by name (``console``), or
            made already.
        plan: that the recipe was made from; refused if it is of another model or shape.
        budget: bytes, or such as ``"6GiB"``; the recipe's modules and how they run are planned to fit.
        on_oom: what to do when memory runs out: ``stop``, or ``replan`` and go on.
        cache: take costs that were measured before for a plan, and keep those that are measured.
        card: with a budget on CUDA, the card that is planned for; by default the one that it is trained on.
        confirm: likewise, whether the plan is confirmed by replaying the allocations of its run.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        LocalgradError: anything that can't be as the recipe says.

    Example:
        >>> train({"model.name": "vit_tiny_patch16_224", "data.name": "./photos"}, sinks=["console"])  # doctest: +SKIP
    """
    _check_on_oom(on_oom)
    wanted, place = as_recipe(recipe), None if out is None else Path(out)
    num_bytes = None if budget is None else parse_bytes(budget)
    if transform is not None:
        name = transform if isinstance(transform, str) else name_of_function("transform", transform)
        wanted = as_recipe(overlay(wanted.to_dict(), {"data.transform": name}))
    load_plugins(wanted.execution.plugins)
    check_sinks((*wanted.execution.sinks, *sinks))
    if place is not None and holds_run(place):
        if was_restarted():
            return resume(place, _normalised_as(read_recipe(place), wanted), sinks=sinks, on_oom=on_oom)
        raise RunFolderError(
            f"{arg('out')}: {place} already holds a run; continue it with {arg('resume', place)}, or choose another "
            "folder."
        )
    is_planned = plan is not None or num_bytes is not None
    given = {"plan": plan is not None, "budget": num_bytes is not None, "on_oom": on_oom}
    decided = dict.fromkeys(("checkpoint", "accumulation"))  # a recipe always has them, and a plan lays others over it
    rules.check({**wanted.arguments(), **decided, **given})
    check_writable(place or Path("runs"))
    planning = _Planning(plan, num_bytes, cache=cache, card=card, confirm=confirm)
    with team_of(wanted) as team:
        job = together(
            team,
            lambda: build(wanted, download=download, is_new=True, planned=planning if is_planned else None, team=team),
        )
        path = place or new_folder(wanted.method.data.name, wanted.method.local.objective)
        path = path if team is None else team.everyone(path)[0]
        _check_space(job, path)
        health = _health_check(job)
        folder = together(team, lambda: RunFolder(path, is_guest=team is not None and not team.is_speaker))
        try:
            if team is None or team.is_speaker:
                folder.write_text("recipe.toml", job.recipe.to_toml())
                folder.write_json("data.json", _describe(job).to_dict())
                folder.write_text("skipped.csv", skipped_table(job.data.skipped))
                if planning.plan is not None:
                    folder.write_text("plan.json", planning.plan.to_json())
            if team is not None:
                return _fit_together(job, team, folder, sinks)
            with _within_budget(job, planning):
                return _fit(job, folder, sinks, health=health, replan=on_oom == "replan")
        finally:
            folder.release()


@contextlib.contextmanager
def _within_budget(job: Job, planning: _Planning) -> Iterator[None]:
    """Hold this process to what its plan leaves PyTorch's allocator of a card, also where the card has more."""
    plan, device = planning.plan, job.device
    available = None if plan is None or plan.forecast is None else plan.forecast.available_bytes
    if available is None or device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()  # what planning and proofs left
    total = torch.cuda.mem_get_info(device)[1]
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(fraction_of(available, total), number)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, number)


def _check_on_oom(on_oom: str) -> None:
    if on_oom not in ("stop", "replan"):
        raise RecipeError(f"{arg('on_oom')}: unknown {on_oom!r}; take stop or replan.")


def _normalised_as(begun: Recipe, recipe: Recipe) -> Recipe:
    """A recipe with the normalisation and the transform that a run of it found when it began."""
    own, data = begun.method.data, recipe.method.data
    if data.transform is None:
        data = replace(data, transform=own.transform)
    if data.mean is None and recipe.method.model.pretrained:
        data = replace(data, mean=own.mean, std=own.std)
    return replace(recipe, method=replace(recipe.method, data=data))


@final
class _Planning:
    """Plans a recipe once its model is there, or checks that a plan fits that model.

    Args:
        plan: made before, or ``None``.
        budget: bytes, or ``None``.
        cache: whether costs that were measured before may be taken.
        card: that is planned for.
        confirm: whether the plan is confirmed by a replay.
    """

    def __init__(
        self, plan: Plan | None, budget: int | None, *, cache: bool, card: str = "auto", confirm: bool = True
    ) -> None:
        self.plan, self.budget, self.cache, self.card, self.confirm = plan, budget, cache, card, confirm

    def __call__(self, recipe: Recipe, backbone: Backbone, data: Splits) -> Recipe:
        """The recipe with its modules and how they run."""
        if self.budget is not None:
            kind = resolve_device(recipe.execution.device).type
            task = task_on(
                recipe, backbone, device=kind, cache=self.cache, card=self.card, replays=self.confirm, data=data
            )
            self.plan = plan_recipe(recipe, task, self.budget)
        assert self.plan is not None, "there is a plan or a budget"
        check_plan_fits(self.plan, backbone, recipe.method.data.name)
        return laid_over(self.plan, recipe)


@threads_kept()
def resume(
    path: Path | str,
    changes: Recipe | Mapping[str, Any] | None = None,
    *,
    sinks: Sequence[Sink | str] = (),
    on_oom: str = "stop",
) -> Summary:
    """Continue a run where its last checkpoint stands; a finished run only gives its summary.

    Args:
        path: the run folder.
        changes: the recipe as it is wanted now, or values to be laid over the run's own; its method must be the run's
            own, its execution may differ, and so may where the data lies (``data.name``, ``data.root``), if it is the
            same data. It becomes the run's recipe.
        sinks: take the events, as for ``train``.
        on_oom: as for ``train``.

    Raises:
        RecipeError: another method; the message lists the differences.
        RunFolderError: no run there, or another process uses it.
        CheckpointError: both checkpoints are damaged, or of another model; or the best epoch's weights are damaged.
        DataError: the data is missing, or was moved and is not what the run was trained on.
    """
    _check_on_oom(on_oom)
    place = Path(path)
    own = read_recipe(place)
    recipe = changes if isinstance(changes, Recipe) else as_recipe(overlay(own.to_dict(), flat(changes or {})))
    different = difference(_without_place(own), _without_place(recipe))
    if different:
        raise RecipeError(
            f"{arg('resume', place)}: the run has another recipe ({'; '.join(different)}); leave those options out, "
            "or start a new run."
        )
    rules.check({**recipe.arguments(), "on_oom": on_oom})
    load_plugins(recipe.execution.plugins)
    check_sinks((*recipe.execution.sinks, *sinks))
    finished = _read_summary(place)
    if finished is not None:
        for sink in make_sinks(sinks, place):
            sink.emit(RunEnded(summary=finished))
            sink.close()
        return finished
    with team_of(recipe) as team:
        folder = together(team, lambda: RunFolder(place, is_guest=team is not None and not team.is_speaker))
        try:
            state = together(team, lambda: _load_last(folder, recipe))
            job = together(team, lambda: _build_again(recipe, has_weights=state is not None, team=team))
            is_moved = _place_of(own) != _place_of(recipe)
            speaks = team is None or team.is_speaker
            described = together(team, lambda: _check_data(place, job, is_moved=is_moved) if speaks else None)
            _check_space(job, place)

            def rewrite() -> None:
                if described is not None:
                    _rewrite(folder, job.recipe, described, is_moved=is_moved)

            if team is not None:
                return _fit_together(job, team, folder, sinks, state, fits=rewrite)
            health = _health_check(job)
            return _fit(job, folder, sinks, state, health=health, replan=on_oom == "replan", fits=rewrite)
        finally:
            folder.release()


def _load_last(folder: RunFolder, recipe: Recipe) -> Checkpoint | None:
    """The state to resume from, and the weights of the best epoch are there; ``None`` before the first checkpoint."""
    if not folder.has_checkpoint:
        return None

    def agree(state: Checkpoint) -> str | None:
        missing = [name for name in ("position", "sums", "random") if not isinstance(state.get(name), dict)]
        missing += [] if isinstance(state.get("learner"), dict) or state.get("parts") else ["learner"]
        if missing:
            return f"it has no {missing[0]!r}"
        text = kept_of(state).get("recipe.toml")
        if not isinstance(text, str):
            return None
        different = difference(_without_place(Recipe.from_toml(text, "checkpoint")), _without_place(recipe))
        # A number of modules and its boundaries are the same (``on_oom``); the learner compares those.
        different = [line for line in different if not line.startswith("local.modules:")]
        return f"it has another recipe: {', '.join(different)}" if different else None

    state = joined_checkpoint(folder.load_last(agree))
    return {**state, "lost_best": _has_lost_best(folder, state["position"], recipe)}


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


def _build_again(recipe: Recipe, **settings: Any) -> Job:
    """Build what a run's recipe names, which was there once."""
    try:
        return build(recipe, **settings)
    except DataError as error:
        name = recipe.method.data.root or recipe.method.data.name
        if Path(name).expanduser().exists():
            raise
        raise DataError(f"{error} If it was moved, say where it is now: {arg('data')}, or {arg('root')}.") from error


def _check_data(path: Path, job: Job, *, is_moved: bool) -> DataDescription:
    """Compare the data with what a run was trained on.

    Returns:
        What ``data.json`` would hold of it.

    Raises:
        DataError: it is other data, in another place.
    """
    found, name = _describe(job), job.recipe.method.data.name
    try:
        known = _read_data(path)
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
        say(f"The data {name} is {what}: it was changed.")
    return found


def _rewrite(folder: RunFolder, recipe: Recipe, described: DataDescription, *, is_moved: bool) -> None:
    """Write down what a run goes on with: what was laid over its recipe, and what was damaged."""
    text = recipe.to_toml()
    if not (is_sound(folder.path, "recipe.toml") and read_text(folder.path, "recipe.toml") == text):
        folder.write_text("recipe.toml", text)
    folder.kept["recipe.toml"] = text
    if is_moved or not is_sound(folder.path, "data.json"):
        folder.write_json("data.json", described.to_dict())
    else:
        folder.kept["data.json"] = read_text(folder.path, "data.json")


def _describe(job: Job) -> DataDescription:
    return DataDescription(job.data.info, fingerprint_of(job.data))


_PLACE = [each.name for each in fields(DataSettings) if each.name in ("name", "root") or each.name.endswith("_data")]
"""Keys of a recipe that say where its data lies."""


def _place_of(recipe: Recipe) -> tuple[str | None, ...]:
    """Where a recipe's data lies."""
    return tuple(getattr(recipe.method.data, key) for key in _PLACE)


def _without_place(recipe: Recipe) -> Recipe:
    """A recipe that doesn't say where its data lies."""
    data = replace(recipe.method.data, **{key: getattr(DataSettings(), key) for key in _PLACE})
    return replace(recipe, method=replace(recipe.method, data=data))


def read_recipe(path: Path) -> Recipe:
    """Read the recipe of a run folder, verified; a damaged one as its checkpoint keeps it.

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


def _read_data(path: Path) -> DataDescription:
    """Read what a run folder knows of its data, verified; where it is damaged, as its checkpoint keeps it.

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

    Returns:
        ``accuracy``, ``module_accuracy`` (``None`` where a module has no classifier, or none for averaged weights),
        ``num_images``, ``part``, ``skipped`` (what was left out of the part, reason to number).

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
    weights = load_saved_weights(path / "checkpoints" / "best.safetensors")
    job = _build_again(recipe, has_weights=True)
    _check_data(path, job, is_moved=_place_of(own) != _place_of(recipe))
    images = {"test": job.data.test, "val": job.data.val, "train": job.data.train}[part]
    if images is None:
        raise RecipeError(
            f"{arg('part', 'val')}: this run has no validation images (data.val_fraction = 0); take "
            f"{arg('part', 'test')}."
        )
    load_best_weights(job.local, weights)
    gather(job.local, job.device)
    accuracy, by_module = evaluate(job.local, job.evaluation_batches(images))
    by_module = _of_best(recipe, by_module)
    return {
        "part": part,
        "accuracy": accuracy,
        "module_accuracy": by_module,
        "num_images": job.data.num_read(part),
        "skipped": job.data.skipped[part].counts(),
    }


def _of_best(recipe: Recipe, by_module: list[float | None]) -> list[float | None]:
    """Modules' accuracies with the best weights: where those are an average, only the last one's are any.

    The classifiers of the others were trained on the features of the weights as they were, and not on the average's.
    """
    if recipe.method.training.ema_decay is None:
        return by_module
    return [None] * (len(by_module) - 1) + by_module[-1:]


@dataclass(frozen=True)
class Prediction:
    """The classes that a model finds in one image.

    Attributes:
        path: the image.
        classes: (name, probability), the likeliest first.
    """

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
    """Classify images with a run's best weights; the plain timm model alone is used, and the data set not needed.

    Args:
        path: the run folder.
        images: an image, or a folder of images.
        top: classes to name for each.
        device: by default the recipe's.
        on_corrupt: an image that is corrupt; by default as in the run.
        image_range: (black, white) of images of more than 8 bits; by default as in the run.
        background: behind transparent images; by default as in the run.
        fit: of images of another shape; by default as in the run.
        skipped: takes what is passed over.

    Raises:
        RecipeError: an impossible value.
        DataError: an image that can't be read.
    """
    asked = {"on_corrupt": on_corrupt, "image_range": image_range, "background": background, "fit": fit}
    given = {key: value for key, value in asked.items() if value is not None}
    reading: DataSettings = validated(DataSettings, given, "data.")
    recipe = _on_device(read_recipe(path), device)
    info = _read_data(path).info
    load_plugins(recipe.execution.plugins)
    where = resolve_device(recipe.execution.device)
    settings = replace(recipe.method.model, pretrained=False)
    made = create_model(settings, num_classes=info.num_classes, num_channels=info.num_channels)
    size = input_size_of(made, settings, info.num_channels)
    model = made.model if isinstance(made, Backbone) else made
    weights = load_saved_weights(path / "checkpoints" / "best.safetensors")
    load_model_weights(model, weights)
    model.to(where).eval()
    found = load_images_for_prediction(
        images,
        mean=info.mean,
        std=info.std,
        num_channels=info.num_channels,
        image_size=size[1:],
        on_corrupt=(reading if "on_corrupt" in given else recipe.method.data).on_corrupt,
        image_range=reading.image_range or info.image_range,
        background=info.background if reading.background is None else parse_colour(reading.background),
        fit=reading.fit or info.fit,
        transform=None if recipe.method.data.transform == NONE else recipe.method.data.transform,
        skipped=skipped,
    )
    for image_path, image in found:
        with torch.no_grad():
            shares = model(image[None].to(where)).float().softmax(dim=1)[0]
        best = shares.topk(min(top, len(info.class_names)))
        yield Prediction(
            image_path,
            tuple((info.class_names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )


def load_model_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put the model's part of a run's best weights into a plain model."""
    from localgrad.step.states import load_weights

    load_weights(model, model_weights(weights))


def model_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a run's best weights, without the auxiliary nets'."""
    prefix = "model."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _fit(
    job: Job,
    folder: RunFolder,
    sinks: Sequence[Sink | str],
    state: Checkpoint | None = None,
    *,
    health: HealthCheck | None = None,
    replan: bool = False,
    fits: Callable[[], None] = lambda: None,
) -> Summary:
    settings = job.recipe.method.training
    trainer = _trainer(job, folder)
    trainer.health = health
    if state is not None:
        trainer.load_state_dict(state)
        if state.get("lost_best"):
            trainer._save_best()
    fits()
    if isinstance(trainer, StagewiseTrainer):
        stages = estimate_stages(job.local, settings.batch_size, job.optimizer, job.device)
        profile = max(stages, key=lambda stage: stage.peak_bytes)
    else:
        profile = estimate_run(job)
    peak = profile.peak_bytes
    replanner = Replanner(job, profile, lambda: _observed(job.device))
    if replan and not isinstance(trainer, StagewiseTrainer):
        job.learner.on_out_of_memory(partial(_go_on, replanner, trainer))
    factory = job.optimizer if callable(job.optimizer) else job.optimizer[0]
    baseline = estimate_step(end_to_end(job.learner), settings.batch_size, factory, job.device).peak_bytes

    def run() -> Summary:
        _emit_start(job, trainer, peak, baseline)
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.device)
        try:
            trainer.fit()
        except MemoryExceeded as error:
            raise replanner.explain(error, folder.path) from error
        except RuntimeError as error:
            if out_of_memory(error) is None:
                raise
            ways = [arg("accumulation", 2 * job.recipe.execution.accumulation), arg("checkpoint", "halves/8")]
            if not isinstance(trainer, StagewiseTrainer) and not job.recipe.execution.offload:
                ways.append(arg("offload", value=True))
            raise DeviceError(
                f"{job.device} is out of memory; take {', '.join(ways[:-1])} or {ways[-1]}, which don't change "
                f"results, or more {arg('modules')}."
            ) from error
        return _finish(job, trainer, {"estimated_peak_bytes": peak, "estimated_end_to_end_peak_bytes": baseline})

    return _told(trainer, (*job.recipe.execution.sinks, *sinks), run)


def _told(trainer: Trainer, sinks: Sequence[Sink | str], run: Callable[[], Summary]) -> Summary:
    """Run something whose events go to the run folder and to some sinks, and tell them its summary."""
    epoch, path, kept = trainer.position.epoch, trainer.folder.path, trainer.folder.kept
    lines = JsonlSink(path / "metrics.jsonl", epoch, kept.get("metrics.jsonl"))
    kept["metrics.jsonl"] = lines.lines
    trainer.sinks = (lines, *make_sinks(sinks, path))
    try:
        summary = run()
        for sink in trainer.sinks:
            sink.emit(RunEnded(summary=summary))
        return summary
    finally:
        for sink in trainer.sinks:
            sink.close()


def _fit_together(
    job: Job,
    team: Team,
    folder: RunFolder,
    sinks: Sequence[Sink | str],
    state: Checkpoint | None = None,
    *,
    fits: Callable[[], None] = lambda: None,
) -> Summary:
    """As ``_fit``, in every one of several processes; rank 0 writes and speaks."""
    learner, settings = job.learner, job.recipe.method.training
    assert isinstance(learner, ParallelLearner), "a team has parallel learners"
    trainer = ParallelTrainer(
        learner=learner,
        schedule=job.schedule_for(learner.optimizers),
        train=job.batches,
        val=None if job.data.val is None else job.evaluation_batches(job.data.val),
        epochs=settings.epochs,
        folder=folder,
        sinks=(),
    )
    if state is not None:
        together(team, lambda: trainer.load_state_dict(state))
        if state.get("lost_best"):
            trainer._save_best()
    fits()
    batch_size = settings.batch_size // team.num_replicas
    estimated = together(team, lambda: estimate_share(learner, batch_size, job.optimizer, job.device))
    peaks = team.everyone(estimated.peak_bytes)
    if team.is_speaker:
        factory = job.optimizer if callable(job.optimizer) else job.optimizer[0]
        baseline = estimate_step(end_to_end(learner), batch_size, factory, job.device).peak_bytes

    def run() -> Summary:
        if team.is_speaker:
            _emit_start(job, trainer, max(peaks), baseline)
        trainer.fit()
        measured = team.everyone(_rank_figures(job, team, learner))
        ranks: list[RankFigures] = measured
        for figures, estimate in zip(ranks, peaks, strict=True):
            figures["estimated_peak_bytes"] = estimate
        more: Peaks = {"estimated_peak_bytes": max(peaks), "ranks": ranks}
        more["measured_peak_bytes"] = max(figures["measured_peak_bytes"] for figures in measured)
        if team.is_speaker:
            more["estimated_end_to_end_peak_bytes"] = baseline
        summary = _finish(job, trainer, more)
        team.everyone(None)  # rank 0 has written it all
        return summary

    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    watched: Callable[[], Summary] = partial(trainer.watched, run)
    return _told(trainer, (*job.recipe.execution.sinks, *sinks), watched) if team.is_speaker else watched()


def _rank_figures(job: Job, team: Team, learner: ParallelLearner) -> RankFigures:
    """What one process of a parallel run measured of itself."""
    peak = _measured_peak(job.device)
    return {
        "rank": team.rank,
        "replica": team.replica,
        "modules": list(learner.own),
        "sent_bytes_per_step": learner.sent_bytes_per_step,
        "waited_seconds": learner.links.waited_seconds,
        "measured_peak_bytes": peak["measured_peak_bytes"],
        "measured_peak_of": peak["measured_peak_of"],
    }


def estimate_run(job: Job) -> MemoryProfile:
    """Predict the memory of the steps that a job's recipe has: the larger, where some are end-to-end."""
    settings = job.recipe.method.training
    local = estimate_step(job.local, settings.batch_size, job.optimizer)
    if not settings.has_global_steps or job.learner.plan.num_modules == 1:
        return local
    globally = estimate_step(job.local, settings.batch_size, job.optimizer, globally=True)
    return max(local, globally, key=lambda profile: profile.peak_bytes)


def _go_on(replanner: Replanner, trainer: Trainer, module: int) -> bool:
    """Take the next plan, and write it down so that resuming takes it too."""
    plan = replanner.next_plan()
    if plan is None:
        return False
    recipe = replanner.adopt(plan)
    trainer.folder.write_text("recipe.toml", recipe.to_toml())
    how = f"checkpoint {','.join(map(str, plan.checkpoint))}, accumulation {plan.accumulation}"
    for sink in trainer.sinks:
        sink.emit(Replanned(module=module, peak_bytes=forecast_of(plan).peak_bytes, how=how))
    return True


def _observed(device: torch.device) -> tuple[int, str]:
    measured = _measured_peak(device)
    return measured["measured_peak_bytes"], measured["measured_peak_of"]


def _trainer(job: Job, folder: RunFolder) -> Trainer:
    settings = job.recipe.method.training
    val = None if job.data.val is None else job.evaluation_batches(job.data.val)
    if settings.schedule == "sequential":
        return StagewiseTrainer(
            learner=job.local,
            optimizer=job.optimizer,
            schedule_for=job.schedule_for,
            train=job.batches,
            val=val,
            epochs=settings.epochs,
            cached_epochs=settings.cached_epochs,
            folder=folder,
            sinks=(),
        )
    return LocalTrainer(
        learner=job.local,
        schedule=job.schedule_for(job.learner.optimizers),
        train=job.batches,
        val=val,
        epochs=settings.epochs,
        folder=folder,
        sinks=(),
        is_global=settings.is_global if settings.has_global_steps and job.learner.plan.num_modules > 1 else None,
    )


def _health_check(job: Job) -> HealthCheck | None:
    """What measures the modules' health, where the recipe asks for it; refused if its reference is no good."""
    execution, val = job.recipe.execution, job.data.val
    if not execution.health_every:
        return None
    reference = None
    if execution.health_reference is not None:
        reference = _end_to_end_weights(Path(execution.health_reference), job.recipe)
    try:
        return HealthCheck(
            job.local,
            job.batches,
            None if val is None else job.evaluation_batches(val),
            execution.health_every,
            reference=reference,
        )
    except CheckpointError as error:
        raise RecipeError(f"{arg('health_reference', execution.health_reference)}: {error}") from error


def _end_to_end_weights(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The best weights of an end-to-end run of a recipe's model."""
    try:
        found = read_recipe(path)
        weights = load_saved_weights(path / "checkpoints" / "best.safetensors")
    except LocalgradError as error:
        raise RecipeError(f"{arg('health_reference')}: {error}") from error
    named = arg("health_reference", path)
    free = ("model.drop_path", "model.pretrained")  # these don't change what features are
    different = [line for line in difference(found, recipe) if line.startswith("model.") and not line.startswith(free)]
    if different:
        raise RecipeError(f"{named}: it is a run of another model ({'; '.join(different)}).")
    if found.method.local.modules not in (1, []):
        raise RecipeError(f"{named}: it was trained with local modules; name a run with {arg('modules', 1)}.")
    return model_weights(weights)


def _check_space(job: Job, path: Path) -> None:
    """Refuse a run whose cached features the disk has no room for; makes nothing."""
    settings = job.recipe.method.training
    if settings.schedule == "sequential":
        variants = min(settings.cached_epochs, settings.epochs)
        check_space(path / "cache", disk_needed(job.local, job.batches, job.data.info.num_val, variants))


def _emit_start(job: Job, trainer: Trainer, peak: int, baseline: int) -> None:
    method, learner, info = job.recipe.method, job.learner, job.data.info
    modules = "end-to-end" if learner.plan.num_modules == 1 else f"{learner.plan.num_modules} local modules"
    names = learner.backbone.block_names
    spans = "  |  ".join(
        names[span.start] if len(span) == 1 else f"{names[span.start]} … {names[span.stop - 1]}"
        for span in learner.plan.spans
    )
    training = method.training
    warmup = note_of_warmup(training.warmup_epochs, training.epochs, len(trainer.train))
    details = [
        f"{info.num_train:,} training, {info.num_val:,} validation, {info.num_test:,} test images, "
        f"{info.num_classes} classes{_some_names(info.class_names)}",
        *_left_out(info),
        *info.notes,
        f"modules: {spans}",
        f"estimated peak {format_bytes(peak)}, end-to-end {format_bytes(baseline)}",
        *([f"PyTorch's allocator: {rules_here()}"] if job.device.type == "cuda" else []),
        *([] if not isinstance(learner, ParallelLearner) else [_shared_out(learner)]),
        *trainer.details(),
        *(note for note in (warmup, _note_of_plan(job, trainer.folder)) if note is not None),
    ]
    event = RunStarted(
        folder=str(trainer.folder.path),
        title=f"{method.model.name} on {info.name}: {modules}, {method.local.objective} objective, {job.device}, "
        f"{job.recipe.execution.precision}",
        details=tuple(details),
        epochs=trainer.epochs,
        start_epoch=trainer.position.epoch,
        batches_per_epoch=len(trainer.train),
        epochs_per_module=trainer.epochs_per_module,
    )
    for sink in trainer.sinks:
        sink.emit(event)


def _some_names(names: Sequence[str]) -> str:
    """The names of classes in brackets, where they are few."""
    listed = ", ".join(names)
    return f" ({listed})" if len(names) <= _FEW and len(listed) < _ONE_LINE else ""


def _left_out(info: DataInfo) -> list[str]:
    """What was left out of each part, as lines."""
    lines = []
    for part, counts in info.skipped.items():
        listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        lines.append(f"left out of {part}: {listed}")
    return [*lines, "listed in skipped.csv in the run folder"] if info.num_skipped else lines


def _note_of_plan(job: Job, folder: RunFolder) -> str | None:
    """A line where the run's plan was made for something else: another device, or what a resumed run changed."""
    try:
        plan = Plan.from_json((folder.path / "plan.json").read_text())
    except OSError:  # the run has none
        return None
    except PartitionError as error:
        return f"plan.json: {error}"
    return note_of_plan(plan, job.recipe, job.device.type)


def _shared_out(learner: ParallelLearner) -> str:
    """Which process has which modules, as a line."""
    shares = "  |  ".join(f"rank {rank}: {name_of(modules)}" for rank, modules in enumerate(learner.shares))
    return shares if learner.team.num_replicas == 1 else f"{learner.team.num_replicas} replicas of {shares}"


def _finish(job: Job, trainer: Trainer, peaks: Peaks) -> Summary:
    """Read the test set, once, with the best epoch's weights; write weights and summary."""
    start = time.perf_counter()
    measured = _measured_peak(job.device)
    speaks = job.team is None or job.team.is_speaker
    trainer.load_best()
    accuracy, by_module = trainer.evaluate(job.evaluation_batches(job.data.test))
    if speaks:
        weights = model_weights(load_saved_weights(trainer.folder.best))
        save_weights(trainer.folder.path / "model.safetensors", weights)
    if job.team is not None:
        add_skipped_of_all(job.team, job.data.skipped)
    position = trainer.position
    summary: Summary = {
        "format": RUN_FORMAT,
        "test_accuracy": accuracy,
        "test_module_accuracy": _of_best(job.recipe, by_module),
        "num_test": job.data.num_read("test"),
        "losses": position.last_losses,
        **measured,
        **peaks,
        "images_per_second": position.num_images / position.train_seconds,
        **trainer.selection(),
        "seconds": position.seconds + time.perf_counter() - start,
        "seed": job.recipe.method.seed,
        "plan": job.learner.plan.to_dict(),
        "num_skipped": sum(len(own.images) for own in job.data.skipped.values()),
        "skipped": {part: own.counts() for part, own in job.data.skipped.items() if own.counts()},
        "device": device_name(job.device),
        "versions": versions(),
        "folder": str(trainer.folder.path),
    }
    if speaks:
        table = trainer.folder.path / "skipped.csv"  # which grows where images are decoded while training
        before = table.read_text(encoding="utf-8", errors="replace") if table.exists() else ""
        trainer.folder.write_text("skipped.csv", skipped_table(job.data.skipped, before))
        trainer.folder.write_json("summary.json", summary)
        trainer.folder.finish()
    return summary


def add_skipped_of_all(team: Team, skipped: Mapping[str, Skipped]) -> None:
    """Add what other processes left out while they trained: replicas read different images. All call this together."""
    for others in team.everyone({part: own.images for part, own in skipped.items()}):
        for part, images in others.items():
            skipped[part].images.update(images)


def _read_summary(path: Path) -> Summary | None:
    """The summary of a finished run, the last thing that it writes; ``None`` also where that is damaged."""
    if not (path / "summary.json").exists():
        return None
    has_checkpoint = (path / "checkpoints" / "last.pt").exists()
    try:
        summary: Summary = json.loads(read_text(path, "summary.json"))
        summary_rows({**summary, "folder": str(path)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RunFolderError) as error:
        if not has_checkpoint:
            raise RunFolderError(f"{path / 'summary.json'}: damaged; restore it from a copy.") from error
        say(f"{path / 'summary.json'}: damaged; made again from the last checkpoint.")
        return None
    check_format(str(path / "summary.json"), summary.get("format", 1), RUN_FORMAT, RunFolderError)
    summary["folder"] = str(path)
    return summary


def _measured_peak(device: torch.device) -> Peak:
    if device.type == "cuda":
        return {
            "measured_peak_bytes": torch.cuda.max_memory_allocated(device),
            "measured_peak_of": "tensors on the GPU",
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "measured_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "measured_peak_of": "the whole process, libraries and data included",
    }


def versions() -> dict[str, str]:
    """What ran: Python and the packages that results may depend on."""
    names = ("localgrad", "torch", "timm", "torchvision", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} processor, {torch.get_num_threads()} threads"


def _on_device(recipe: Recipe, device: str | None) -> Recipe:
    return recipe if device is None else replace(recipe, execution=replace(recipe.execution, device=device))
