"""Recipes and plans: plan a recipe to a budget, lay a plan over a recipe, refuse a plan made for something else.

A plan that was made for a recipe remembers it by the recipe's own keys (``Plan.made_for``), so that training from the
plan alone is possible, and a difference can be named as people would type it. Nothing here reads data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from localgrad import rules
from localgrad.app.build import (
    build_recipe_objective,
    check_model_name,
    check_model_settings,
    check_patches,
    default_transform,
    frozen_as_said,
    input_size_of,
    make_model,
    optimizer_of,
)
from localgrad.app.data_path import data_path_of
from localgrad.app.hub_models import is_on_hub, make_from_config
from localgrad.app.recipe import Recipe, overlay
from localgrad.backbones.base import BACKBONES, Backbone, outline
from localgrad.backbones.fake import without_initialization
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.weights import check_source
from localgrad.errors import BudgetError, PartitionError, RecipeError, arg
from localgrad.formats import Json, read_input
from localgrad.memory.cards import card_here, card_named, card_of
from localgrad.objectives.losses import loss_of
from localgrad.partition import Plan, as_json
from localgrad.partitioning import num_parameters, num_trained
from localgrad.planning.budget import Task, check_gradients, plan_to_budget
from localgrad.planning.confirming import DataPath
from localgrad.planning.rank_plans import Parallel, plan_parallel
from localgrad.registry import load_plugins
from localgrad.step.local_step import check_precision
from localgrad.step.states import kind_of_optimizer

if TYPE_CHECKING:
    from localgrad.training.data import Splits

KNOWN = {
    "digits": (10, 1, 1438),
    "cifar10": (10, 3, 50_000),
    "cifar100": (100, 3, 50_000),
    "stl10": (10, 3, 5_000),
    "svhn": (10, 3, 73_257),
}
"""(classes, channels, images that aren't for tests) of data sets that are known by name."""


@dataclass(frozen=True)
class PlannedData:
    """What planning has to know of the data.

    Attributes:
        num_classes: ``None`` for the model's own.
        num_channels: of the images.
        num_images: that are trained on, at most; ``None`` where no data is named.
        splits: the data, where it was read: a folder, a table, or a data set of the hub.
    """

    num_classes: int | None = None
    num_channels: int = 3
    num_images: int | None = None
    splits: Splits | None = None


def data_planned_for(recipe: Recipe, name: str) -> PlannedData:
    """What a data set has; one that isn't known by name is read.

    Args:
        recipe: how it is read.
        name: of the data; empty where none is named.

    Raises:
        DataError: it is missing, or none.
    """
    if not name:
        return PlannedData()
    if name in KNOWN:
        return PlannedData(*KNOWN[name])
    from localgrad.training.data import load_data  # only who has data of their own needs it

    method, side = recipe.method, recipe.method.model.img_size
    splits = load_data(
        method.data,
        seed=method.seed,
        image_size=None if side is None else (side, side),
        default_transform=default_transform(recipe),
    )
    return PlannedData(splits.info.num_classes, splits.info.num_channels, splits.info.num_train, splits)


REMEMBERED = (
    *("model.name", "model.img_size", "model.patch_size", "model.drop_path", "model.lora", "model.quantize"),
    *("model.blocks", "model.options"),
    "training.batch_size",
    *("training.optimizer", "training.ema_decay", "training.clip_grad", "training.global_every"),
    *("training.global_tail", "training.freeze", "training.freeze_from"),
    *("local.objective", "local.options", "local.overlap", "augment.mixup", "augment.cutmix"),
    *("execution.precision", "execution.compile"),
)
"""What a plan's figures depend on, by the recipe's keys."""

LATER = ("model.lora", "model.quantize", "training.freeze")
"""Of them, those that plans of 0.1.0 don't have: they were off."""

UNTOLD = ("training.freeze_from", "augment.mixup", "augment.cutmix")
"""Of them, those that older plans counted and don't say: not compared there."""

VERSIONS = ("localgrad", "torch", "timm")


def task_of(
    recipe: Recipe,
    *,
    device: str,
    data: PlannedData = PlannedData(),
    measure: bool = False,
    cache: bool = True,
    card: str = "auto",
    replays: bool = True,
    gradients: str = "any",
    sequence_length: int | None = None,
    hub_task: str | None = None,
) -> Task:
    """What a recipe is to train, on an outline of its model: no data, no weights.

    Args:
        recipe: its ``local.modules`` may be ``auto``.
        device: ``cpu`` or ``cuda``; there need be none.
        data: what it is trained on.
        measure: whether parts are timed here, by the clock.
        cache: whether costs that were measured before may be taken.
        card: name of the card that is planned for; ``auto`` is the one here, or one that is assumed.
        replays: whether the plan is confirmed by replaying its run's allocations.
        gradients: ``any``, ``exact`` or ``local``: which plans are looked for.
        sequence_length: tokens in a sequence, of a language model (``hf:``).
        hub_task: what a model of transformers is made for, see ``hub_models.TASKS``.
    """
    load_plugins(recipe.execution.plugins)
    how: Kwargs = {"device": device, "cache": cache, "card": card, "replays": replays, "gradients": gradients}
    if recipe.method.model.weights is not None:
        check_source(recipe.method.model.weights)  # of which figures don't depend on values
    check_model_settings(recipe)
    settings = replace(recipe.method.model, pretrained=False, weights=None)
    if is_on_hub(settings.name):
        made = make_from_config(
            settings,
            num_classes=data.num_classes,
            num_channels=data.num_channels,
            sequence_length=sequence_length,
            task=hub_task,
        )
        outlined = outline(made.model, example=made.example, blocks=settings.blocks)
        check_precision(recipe.execution.precision, torch.device("cpu"), outlined.dtype)
        on_hub = task_on(recipe, frozen_as_said(recipe, outlined), data=data.splits, **how)
        return replace(on_hub, measure=measure, num_images=data.num_images)
    for name, value in (("sequence_length", sequence_length), ("task", hub_task)):
        if value is not None:
            raise RecipeError(
                f"{arg(name)}: it is of models of transformers, {arg('model', 'hf:FOLDER')}; leave it out."
            )
    check_model_name(settings.name)
    # A backbone of a plugin is proved as it is made, for which it needs values.
    with nullcontext() if settings.name in BACKBONES else without_initialization():
        model, _ = make_model(settings, num_classes=data.num_classes, num_channels=data.num_channels, has_values=False)
    size = input_size_of(model, settings, data.num_channels)
    check_patches(model, size[1:])
    backbone = model if isinstance(model, Backbone) else outline(model, size, blocks=settings.blocks)
    task = task_on(recipe, frozen_as_said(recipe, backbone), data=data.splits, **how)
    return replace(task, measure=measure, num_images=data.num_images)


def task_on(
    recipe: Recipe,
    backbone: Backbone,
    *,
    device: str,
    cache: bool = True,
    card: str = "auto",
    replays: bool = True,
    gradients: str = "any",
    data: Splits | None = None,
) -> Task:
    """What a recipe is to train, on a backbone that is there already, and with data that was read, if it was."""
    is_of_images = len(backbone.input_size) == 3 and backbone.given.is_single
    training, local, execution = recipe.method.training, recipe.method.local, recipe.execution
    rules.check({**recipe.arguments(), "checkpoint": None, "plan": True})  # a plan says itself what is recomputed
    return Task(
        backbone=backbone,
        # Pixels' mean and deviation need the data, which isn't read here; memory and time don't depend on them.
        objective=build_recipe_objective(recipe).with_pixels(
            *zip(*[(0.5, 0.25)] * (backbone.input_size[0] if len(backbone.input_size) == 3 else 1), strict=True)
        ),
        optimizer=optimizer_of(training, backbone.model),
        precision=execution.precision,
        device=device,
        compiled=execution.compile,
        ema_decay=training.ema_decay,
        clip_grad=training.clip_grad,
        modules=None if local.modules == "auto" else local.modules,
        gradients=check_gradients(gradients),
        overlap=local.overlap,
        global_share=training.global_share,
        freeze_from=training.freeze_from,
        soft_labels=recipe.method.augment.mixup > 0 or recipe.method.augment.cutmix > 0,
        cache=cache,
        card=card_of(card) if device == "cuda" else None,
        data=data_path_of(recipe, backbone.image_size, backbone.num_classes, data) if is_of_images else DataPath(),
        replays=replays,
    )


def kind_of(device: str, card: str = "auto") -> str:
    """The kind of a device that is planned for; there need be none.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        card: one that is named is planned for with CUDA, where nothing else is said.

    Raises:
        RecipeError: neither auto, cpu nor cuda; or a card for processors.
    """
    rules.check({"card": card, "device": device})
    if device == "auto" and card != "auto":
        card_named(card)
        return "cuda"
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":", maxsplit=1)[0]
    if kind not in ("cpu", "cuda"):
        raise RecipeError(f"{arg('device')}: {device!r} can't be planned for; take auto, cpu or cuda.")
    return kind


def plan_recipe(recipe: Recipe, task: Task, budget: int | None, parallel: Parallel | None = None) -> Plan:
    """The fastest plan within a budget in bytes (none: no limit), for one process or ranks; remembers its recipe."""
    size = recipe.method.training.batch_size
    plan = plan_to_budget(task, size, budget) if parallel is None else plan_parallel(task, size, parallel, budget)
    return replace(plan, made_for={**made_for(recipe, task.backbone, task.device), **_optimizer_of(task)})


def made_for_task(task: Task, batch_size: int) -> dict[str, Json]:
    """What a plan has to remember that was made without a recipe."""
    return {
        "training.batch_size": batch_size,
        "training.ema_decay": task.ema_decay,
        "training.clip_grad": task.clip_grad,
        "training.freeze_from": task.freeze_from,
        "local.overlap": task.overlap,
        "execution.precision": task.precision,
        "execution.compile": task.compiled,
        "objective": task.objective.described,
        "loss": loss_of(task.loss, task.backbone).described,
        "shared": task.shared,
        "chunk_logits": task.chunk_logits,
        **_optimizer_of(task),
        **_of_model(task.backbone, task.device),
    }


def _of_model(backbone: Backbone, device: str) -> dict[str, Json]:
    return {
        "device": device,
        "input_size": list(backbone.input_size),
        "num_classes": backbone.num_classes,
        "num_parameters": num_parameters(backbone),
        "num_trained": num_trained(backbone),
        "dtype": str(backbone.dtype),
        "versions": _versions(),
    }


def _optimizer_of(task: Task) -> dict[str, Json]:
    """The kind of optimizer that a task's factory makes."""
    weights = [weight for weight in task.backbone.parameters() if weight.requires_grad]
    return {"optimizer": kind_of_optimizer(task.optimizer(weights))}


def _versions() -> dict[str, Json]:
    return {name: metadata.version(name) for name in VERSIONS}


def made_for(recipe: Recipe, backbone: Backbone, device: str) -> dict[str, Json]:
    """What a plan for a recipe has to remember."""
    values = _by_dotted_key(recipe)
    return {
        **{key: values[key] for key in REMEMBERED},
        **({"execution.plugins": list[Json](recipe.execution.plugins)} if recipe.execution.plugins else {}),
        **_of_model(backbone, device),
    }


def changes_of(plan: Plan) -> dict[str, Json]:
    """A plan as values to be laid over a recipe, by dotted keys.

    Raises:
        BudgetError: the plan doesn't say what it was made for.
    """
    missing = [key for key in REMEMBERED if key not in (*plan.made_for, *LATER, *UNTOLD)]
    if missing:
        raise BudgetError(f"{arg('plan')}: it doesn't say {missing[0]}; make a new one with localgrad plan.")
    kept = (*REMEMBERED, "execution.plugins")
    changes = {key: value for key, value in plan.made_for.items() if key in kept and value is not None}
    return changes | how_to_run(plan)


def overridden(plan: Plan, base: Mapping[str, Any]) -> list[str]:
    """What a recipe's table says otherwise than the plan that is laid over it: ``training.batch_size 32, not 64``."""
    found = []
    for key in REMEMBERED:
        said: Any = base
        for part in key.split("."):
            said = said.get(part) if isinstance(said, Mapping) else None
        planned = plan.made_for.get(key)
        if said is not None and planned is not None and as_json(said) != planned:
            found.append(f"{key} {planned!r}, not {said!r}")
    return found


def laid_over(plan: Plan, recipe: Recipe) -> Recipe:
    """A recipe with the modules of a plan, run as the plan says."""
    return Recipe.from_dict(overlay(recipe.to_dict(), how_to_run(plan)))


def how_to_run(plan: Plan) -> dict[str, Json]:
    """The boundaries of a plan and how its modules run, as values to be laid over a recipe."""
    return {
        "local.modules": list(plan.boundaries) if plan.boundaries else 1,
        "execution.checkpoint": [str(how) for how in plan.checkpoint] or "none",
        "execution.accumulation": plan.accumulation,
        **({} if plan.global_checkpoint is None else {"execution.global_checkpoint": str(plan.global_checkpoint)}),
    }


def read_plan(path: Path) -> Plan:
    """A plan from its file.

    Raises:
        BudgetError: it can't be read, or holds no plan.
    """
    text = read_input("plan", path, f"make one with localgrad plan {arg('json', 'FILE')}", BudgetError)
    try:
        return Plan.from_json(text)
    except PartitionError as error:
        raise BudgetError(f"{arg('plan', path)}: {error}") from error


def check_plan_is_for(plan: Plan, recipe: Recipe) -> None:
    """Refuse a plan that was made for another recipe or by other versions.

    Raises:
        BudgetError: with every difference.
    """
    values = _by_dotted_key(recipe)
    pairs = [(key, plan.made_for.get(key), values[key]) for key in REMEMBERED if key in (*plan.made_for, *LATER)]
    pairs += [(key, value, values[key]) for key, value in how_to_run(plan).items()]
    said = plan.made_for.get("versions")
    versions = said if isinstance(said, dict) else {}
    pairs += [(name, versions.get(name), metadata.version(name)) for name in VERSIONS]
    different = [f"{key} {old!r}, here {new!r}" for key, old, new in pairs if old != new]
    if different:
        raise BudgetError(f"{arg('plan')}: it was made for {'; '.join(different)}. Make a new one with localgrad plan.")


def note_of_plan(plan: Plan, recipe: Recipe, device: torch.device) -> str | None:
    """A line for a run, as it is now, whose plan was made for something else; ``None`` where it holds."""
    values = _by_dotted_key(recipe)
    here = {key: values[key] for key in REMEMBERED} | {"device": device.type, "versions": _versions()}
    different = plan.differences(here)
    different += [
        f"{key} {value!r}, here {values[key]!r}" for key, value in how_to_run(plan).items() if value != values[key]
    ]
    planned_for = None if plan.forecast is None else plan.forecast.card
    here_is = card_here(str(device)) if planned_for and device.type == "cuda" else None
    if planned_for and here_is and not here_is.is_like(planned_for):
        different.append(f"{planned_for}, here {here_is}")
    if plan.is_for_ranks and recipe.execution.parallel == "none":
        different.append("several processes, here one")
    if not different:
        return None
    return f"plan: made for {'; '.join(different)}: its forecast isn't one of this run"


def check_plan_fits(plan: Plan, backbone: Backbone, data: str) -> None:
    """Refuse a plan whose model takes other images or has other classes than the one at hand.

    Raises:
        BudgetError: naming the difference.
    """
    if plan.num_blocks != len(backbone.blocks):
        raise BudgetError(
            f"{arg('plan')}: it was made for {plan.num_blocks} blocks, but this model has {len(backbone.blocks)}; make "
            "a new one with localgrad plan."
        )
    said = plan.made_for.get("input_size")
    size: list[Json] = said if isinstance(said, list) and said else [*backbone.input_size]
    channels, *sides = backbone.input_size
    num_classes = backbone.num_classes
    for key, planned, value, option in (
        ("channels", size[0], channels, arg("data", data)),
        ("image size", size[1:], sides, arg("img_size", sides[-1])),
        ("num_classes", plan.made_for.get("num_classes"), num_classes, arg("num_classes", num_classes)),
    ):
        if planned not in (value, None):
            raise BudgetError(
                f"{arg('plan')}: it was made for {key} {planned}, here {value}; plan again with {option}."
            )


def _by_dotted_key(recipe: Recipe) -> dict[str, Json]:
    """Every value of a recipe, tables included, as JSON would give it back."""
    values: dict[str, Json] = {}

    def walk(table: dict[str, Json], prefix: str) -> None:
        for key, value in table.items():
            values[prefix + key] = value
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(json.loads(json.dumps({**asdict(recipe.method), "execution": asdict(recipe.execution)}, default=str)), "")
    return values
