"""A run: one execution of a recipe in its folder, trained or resumed.

The folder is made when all that the recipe names is built (``build.py``), so that a mistake leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from localgrad import rules
from localgrad.app.agreement import team_of, together
from localgrad.app.build import Job, build, resolve_device
from localgrad.app.fitting import fit, health_check, plan_of_run
from localgrad.app.hub_classifiers import CONFIG
from localgrad.app.places import located, read_places, telling_places, write_places
from localgrad.app.planned import check_plan_fits, laid_over, plan_recipe, task_on
from localgrad.app.recipe import Recipe, as_recipe, flat, overlay
from localgrad.app.run_folders import (
    build_again,
    check_data,
    config_kept,
    describe_data,
    describe_model,
    finished_as,
    is_moved,
    load_last,
    other_method,
    read_recipe,
    rewrite,
)
from localgrad.app.threads import threads_kept
from localgrad.backbones.base import Backbone
from localgrad.errors import RecipeError, RunFolderError, arg
from localgrad.formats import given_path
from localgrad.options import read_on_oom
from localgrad.parallel.team import Team, was_restarted
from localgrad.partition import Plan
from localgrad.registry import load_plugins, name_of_function
from localgrad.training.data import Splits
from localgrad.training.events import RunEnded, Sink, check_sinks, make_sinks
from localgrad.training.feature_cache import check_space
from localgrad.training.folder import RunFolder, check_writable, holds_run, new_folder
from localgrad.training.frozen_features import FrozenFeatures
from localgrad.training.image_sets import skipped_table
from localgrad.training.saved import Summary
from localgrad.training.stagewise import disk_needed
from localgrad.units import parse_bytes


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
    gradients: str = "any",
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
        gradients: with a budget, which plans are looked for: ``exact``, ``local``, or ``any``.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        LocalgradError: anything that can't be as the recipe says.

    Example:
        >>> train({"model.name": "vit_tiny_patch16_224", "data.name": "./photos"}, sinks=["console"])  # doctest: +SKIP
    """
    read_on_oom("on_oom", on_oom)
    wanted, place = as_recipe(recipe), None if out is None else given_path("out", out)
    num_bytes = None if budget is None else parse_bytes(budget)
    if transform is not None:
        name = transform if isinstance(transform, str) else name_of_function("transform", transform)
        wanted = as_recipe(overlay(wanted.to_dict(), {"data.transform": name}))
    load_plugins(wanted.execution.plugins)
    check_sinks((*wanted.execution.sinks, *sinks))
    if place is not None and holds_run(place):
        if was_restarted():
            begun = _normalised_as(read_recipe(place), wanted)
            return resume(place, begun, download=download, sinks=sinks, on_oom=on_oom)
        raise _taken(place)
    given = {"plan": plan is not None, "budget": num_bytes is not None, "on_oom": on_oom, "card": card}
    decided = dict.fromkeys(("checkpoint", "accumulation"))  # a recipe always has them, and a plan lays others over it
    rules.check({**wanted.arguments(), **decided, **given})
    if card != "auto" and num_bytes is None:
        raise RecipeError(
            f"{arg('card', card)} needs {arg('budget')}: it is of what is planned for; add {arg('budget', '6GiB')}, or "
            "leave it out."
        )
    check_writable(place or Path("runs"))
    planned = (
        None
        if plan is None and num_bytes is None
        else partial(_planned, plan, num_bytes, cache=cache, card=card, replays=confirm, gradients=gradients)
    )
    with team_of(wanted) as team:
        job = together(team, lambda: build(wanted, download=download, is_new=True, planned=planned, team=team))
        path = place or new_folder(wanted.method.data.name, wanted.method.local.objective)
        path = path if team is None else team.everyone(path)[0]
        _check_space(job, path)
        health = health_check(job)
        with _held(path, team) as folder:
            together(team, lambda: _check_free(folder))
            if job.speaks:
                folder.write_text("recipe.toml", job.recipe.to_toml())
                folder.write_json("data.json", describe_data(job).to_dict())
                write_places(folder, job.recipe, {})
                for name, text in describe_model(job).items():
                    folder.write_text(name, text)
                folder.write_text("skipped.csv", skipped_table(job.data.skipped))
                if job.plan is not None:
                    folder.write_text("plan.json", job.plan.to_json())
            return fit(job, folder, sinks, health=health, replan=on_oom == "replan")


@threads_kept()
def resume(
    path: Path | str,
    changes: Recipe | Mapping[str, Any] | None = None,
    *,
    download: bool = False,
    sinks: Sequence[Sink | str] = (),
    on_oom: str = "stop",
) -> Summary:
    """Continue a run where its last checkpoint stands; a finished run only gives its summary, unless it is extended.

    Args:
        path: the run folder.
        changes: the recipe as it is wanted now, or values to be laid over the run's own; its method must be the run's
            own, its execution may differ, and so may where the data lies (``data.name``, ``data.root``), if it is the
            same data. It becomes the run's recipe. Another number of epochs (``training.epochs``) extends the run,
            also a finished one, from its last checkpoint on, by the learning rates of so many epochs; it waits anew for
            a better one (``training.patience``, which may differ too). The summary is replaced at the new end.
        download: let torchvision fetch the run's data set, if it is missing here.
        sinks: take the events, as for ``train``.
        on_oom: as for ``train``.

    Raises:
        RecipeError: another method; the message lists the differences. Or fewer epochs than were trained.
        RunFolderError: no run there, or another process uses it.
        CheckpointError: both checkpoints are damaged, or of another model; or the best epoch's weights are damaged.
        DataError: the data is missing, or was moved and is not what the run was trained on.
    """
    read_on_oom("on_oom", on_oom)
    place = given_path("path", path)
    own = read_recipe(place)
    recipe = changes if isinstance(changes, Recipe) else as_recipe(overlay(own.to_dict(), flat(changes or {})))
    _check_same_run(place, own, recipe)
    rules.check({**recipe.arguments(), "on_oom": on_oom})
    load_plugins(recipe.execution.plugins)
    check_sinks((*recipe.execution.sinks, *sinks))
    finished = finished_as(place, own, recipe)
    if finished is not None:
        for sink in make_sinks(sinks, place):
            sink.emit(RunEnded(summary=finished))
            sink.close()
        return finished
    places = read_places(place, own, recipe)
    with team_of(recipe) as team, _held(place, team) as folder:
        state = together(team, lambda: load_last(folder, recipe))
        config = together(team, lambda: config_kept(place, recipe))
        has_weights = state is not None
        how = {"download": download, "has_weights": has_weights, "team": team, "config": config}
        job = together(team, lambda: build_again(recipe, places, **how))
        job = replace(job, plan=plan_of_run(folder, job.recipe, job.device))
        moved = is_moved(own, recipe, places)
        described = together(team, lambda: check_data(place, job, is_moved=moved) if job.speaks else None)
        _check_space(job, place)

        def go_on() -> None:
            if described is not None:
                text = describe_model(job).get(CONFIG) if config is None else config
                rewrite(folder, job.recipe, described, places, is_moved=moved, config=text)

        with telling_places(recipe, places, RecipeError):
            health = health_check(replace(job, recipe=located(job.recipe, places)))
        return fit(job, folder, sinks, state, health=health, replan=on_oom == "replan", fits=go_on)


def _taken(path: Path) -> RunFolderError:
    return RunFolderError(
        f"{arg('out')}: {path} already holds a run; continue it with {arg('resume', path)}, or choose another folder."
    )


def _check_free(folder: RunFolder) -> None:
    """Refuse a folder in which another process began, and may have ended, a run while this one was built."""
    if holds_run(folder.path):
        raise _taken(folder.path)


def _check_same_run(path: Path, own: Recipe, recipe: Recipe) -> None:
    """Refuse a recipe by which a run can't go on."""
    different = other_method(own, recipe)
    if different:
        raise RecipeError(
            f"{arg('resume', path)}: the run has another recipe ({'; '.join(different)}); leave those options out, "
            "or start a new run."
        )
    before, settings = own.method.training.epochs, recipe.method.training
    if settings.schedule == "sequential" and settings.epochs != before:
        raise RecipeError(
            f"{arg('epochs', settings.epochs)}: with {arg('schedule', 'sequential')} a run stays as long as it began, "
            f"{before} epochs a module, as finished modules don't go on; leave it out, or start a new run."
        )


def _check_space(job: Job, path: Path) -> None:
    """Refuse a run whose cached features the disk has no room for; makes nothing."""
    settings = job.recipe.method.training
    if settings.schedule == "sequential":
        variants = min(settings.cached_epochs, settings.epochs)
        check_space(path / "cache", disk_needed(job.local, job.batches, job.data.info.num_val, variants))
    elif settings.cache_frozen:
        variants = min(settings.cached_epochs, settings.epochs)
        check_space(path / "cache", FrozenFeatures(job.local, job.batches, path / "cache", variants).num_bytes)


@contextmanager
def _held(path: Path, team: Team | None) -> Iterator[RunFolder]:
    """A run folder that these processes hold, until they have done."""
    folder = together(team, lambda: RunFolder(path, is_guest=team is not None and not team.is_speaker))
    try:
        yield folder
    finally:
        folder.release()


def _normalised_as(begun: Recipe, recipe: Recipe) -> Recipe:
    """A recipe with the normalisation and the transform that a run of it found when it began."""
    own, data = begun.method.data, recipe.method.data
    if data.transform is None:
        data = replace(data, transform=own.transform)
    if data.transform == own.transform:
        data = replace(data, interpolation=data.interpolation or own.interpolation, crop=data.crop or own.crop)
    if data.mean is None and (recipe.method.model.pretrained or recipe.method.model.weights):
        data = replace(data, mean=own.mean, std=own.std)
    return replace(recipe, method=replace(recipe.method, data=data))


def _planned(
    plan: Plan | None, budget: int | None, recipe: Recipe, backbone: Backbone, data: Splits, **how: Any
) -> tuple[Recipe, Plan]:
    """A recipe planned to a budget once its model is there, or laid over with a plan that fits that model."""
    if budget is not None:
        kind = resolve_device(recipe.execution.device).type
        plan = plan_recipe(recipe, task_on(recipe, backbone, device=kind, data=data, **how), budget)
    assert plan is not None, "there is a plan or a budget"
    check_plan_fits(plan, backbone, recipe.method.data.name)
    return laid_over(plan, recipe), plan
