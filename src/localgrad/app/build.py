"""A recipe made into objects: device, data, model, learner, optimizers, batches. Nothing is written.

The order is chosen for the person who waits: names and numbers that can be wrong are checked before data is read, and
data before a model is built.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from localgrad import rules
from localgrad.app.hub_classifiers import check_classifier, make_classifier, size_of_images
from localgrad.app.hub_models import is_on_hub, side_of
from localgrad.app.recipe import ModelSettings, Recipe, TrainingSettings, validated
from localgrad.app.threads import choose_threads
from localgrad.backbones.adapters import passed_by, with_adapters
from localgrad.backbones.base import BACKBONES, Backbone, num_frozen, split
from localgrad.backbones.by_hand import listed
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.quantized import check_quantizer, num_quantized, num_weights, quantize_base
from localgrad.backbones.timm_models import default_input_size
from localgrad.backbones.weights import LoadedWeights, start_from
from localgrad.errors import BackboneError, DeviceError, LocalgradError, RecipeError, arg, did_you_mean, reason_of
from localgrad.evaluating import LARGEST_EVALUATION_BATCH
from localgrad.learner import Factories, Learner, LocalLearner
from localgrad.objectives.losses import CrossEntropy
from localgrad.objectives.methods import Objective, build_objective
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.parallel.team import Team
from localgrad.partition import Plan
from localgrad.partitioning import make_plan
from localgrad.registry import load_plugins
from localgrad.step.local_step import check_precision
from localgrad.training.optim import OptimizerFactory, Schedule, check_schedule, optimizer_info
from localgrad.training.settings import Interpolation
from localgrad.training.transforms import INTERPOLATION, NONE, resizing_of

Planned = Callable[[Recipe, Backbone, "Splits"], tuple[Recipe, Plan]]


if TYPE_CHECKING:  # planning reads no data, and needs none of this
    from localgrad.training.data import Batches, DataInfo, Splits
    from localgrad.training.image_sets import ImageSet


@dataclass(frozen=True)
class Job:
    """What a recipe comes to, built. In sequential mode the learner is on the processor and has no optimizers."""

    recipe: Recipe
    data: Splits
    learner: Learner
    optimizer: Factories
    schedule_for: Callable[[Sequence[Optimizer]], Schedule]
    batches: Batches
    device: torch.device
    team: Team | None = None
    plan: Plan | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.team is None or self.team.is_speaker

    @property
    def local(self) -> LocalLearner:
        """The learner of a run in one process."""
        assert isinstance(self.learner, LocalLearner), "each of several processes has a share"
        return self.learner

    def evaluation_batches(self, images: ImageSet) -> Batches:
        """Batches of one part of the data, in order and not augmented."""
        return self.batches.plain(images, LARGEST_EVALUATION_BATCH)


def build(
    recipe: Recipe,
    *,
    download: bool = False,
    has_weights: bool = False,
    is_new: bool = False,
    planned: Planned | None = None,
    team: Team | None = None,
    config: str | None = None,
) -> Job:
    """Build what a recipe names, and check all of it; nothing is written.

    Args:
        recipe: what to build.
        download: let torchvision fetch a data set that is missing.
        has_weights: weights will be loaded, so pretrained ones aren't needed.
        is_new: a run begins: the job's recipe says how the weights that it starts from want images normalised, where it
            was open.
        planned: gives the recipe with its modules and how they run, and the plan that says so, once the model is there.
        team: the processes that train it together.
        config: of a model of transformers, as its run keeps it.
    """
    from localgrad.training.data import Batches, load_data, resizing_set

    objective = checked(recipe, is_planned=planned is not None, config=config)
    method, execution = recipe.method, recipe.execution
    device = resolve_device(execution.device) if team is None else team.device
    check_precision(execution.precision, device)
    training = method.training
    is_sequential = training.schedule == "sequential"
    if execution.num_threads is not None:
        torch.set_num_threads(execution.num_threads)
    side = method.model.img_size
    data = load_data(
        method.data,
        seed=method.seed,
        download=download,
        image_size=None if side is None else (side, side),
        default_transform=default_transform(recipe) if is_new else None,
    )
    _check_patience(recipe, data)
    settings_of_model = replace(method.model, pretrained=False, weights=None) if has_weights else method.model
    chooses = is_new and device.type == "cpu"
    made = _make_model(recipe, settings_of_model, data.info, chooses=chooses, config=config)
    model, size = made.model, made.size
    execution = replace(execution, num_threads=made.num_threads)
    recipe = replace(recipe, execution=execution)
    recipe, data = _settled(recipe, data, made, is_new=is_new)
    objective = objective.with_pixels(data.info.mean, data.info.std)
    waits = is_sequential or execution.offload or team is not None  # on the processor, until its modules are made
    model = model if waits else model.to(device)
    backbone = _split(model, size, settings_of_model)
    backbone = frozen_as_said(recipe, backbone)
    data = data.said(*_what_learns(recipe, backbone), *_new_that_stands_still(backbone, made))
    loss, data = _balanced(training.balance, data, device)
    made_by = None
    if planned is not None:
        recipe, made_by = planned(recipe, backbone, data)
        method, execution = recipe.method, recipe.execution
    plan = make_plan(backbone, method.local.modules, checkpoint=execution.checkpoint)
    settings_of_learner: Kwargs = {
        "modules": plan,
        "objective": objective,
        "loss": loss,
        "precision": execution.precision,
        "compile": execution.compile,
        "accumulation": execution.accumulation,
        "clip_grad": training.clip_grad,
        "ema_decay": training.ema_decay,
        "freeze_from": training.freeze_from,
        "auxiliary_from": "state",  # seeded right before; as it was when the published runs were made
    }
    learner: Learner
    if team is None:
        learner = LocalLearner(
            backbone,
            offload=execution.offload,
            device=device if execution.offload else None,
            overlap=method.local.overlap,
            global_checkpoint=execution.global_checkpoint,
            **settings_of_learner,
        )
    else:
        learner = ParallelLearner(
            backbone,
            team=team,
            num_buffers=execution.buffers,
            wire=execution.wire,
            shard=execution.shard,
            **settings_of_learner,
        )
    optimizer = optimizers_of(training, backbone.model, plan.num_modules)
    if not is_sequential:
        learner.configure_optimizers(optimizer)
    augment = method.augment
    if not (augment.mixup or augment.cutmix):  # the losses smooth hard labels by themselves
        augment = replace(augment, label_smoothing=0.0)
    batches = Batches(
        images=data.train,
        batch_size=training.batch_size,
        image_size=size[1:],
        info=data.info,
        device=device,
        augment=augment,
        seed=method.seed,
        num_workers=execution.num_workers,
        shard=(0, 1) if team is None else (team.replica, team.num_replicas),
        transform=data.transform,
        resizing=resizing_set(recipe.method.data),
        draws_alike=training.balance == "sampling",
    )

    def schedule_for(optimizers: Sequence[Optimizer]) -> Schedule:
        own: Kwargs = {"batches_per_epoch": len(batches), "first": learner.own.start}
        return Schedule(optimizers, warmup_stagger=training.warmup_stagger, **own, **_schedule_of(training))

    # Made once to be checked, and dropped: nothing has been written yet.
    schedule_for([_optimizer_alone(learner, index, optimizer) for index in learner.own])
    return Job(recipe, data, learner, optimizer, schedule_for, batches, device, team, made_by)


def checked(recipe: Recipe, *, is_planned: bool = False, config: str | None = None) -> Objective:
    """Refuse names and numbers that can't be, before data is read and a model built; no device is asked for.

    Args:
        recipe: as it would be trained.
        is_planned: whether a plan or a budget decides modules and how they run.
        config: of a model of transformers, as its run keeps it.

    Returns:
        Its objective, but for what the data tells.

    Raises:
        LocalgradError: what is wrong first.
    """
    rules.check(recipe.arguments() | ({} if is_planned else {"budget": None}))
    load_plugins(recipe.execution.plugins)
    model, data = recipe.method.model, recipe.method.data
    check_model_settings(recipe)
    if data.transform is not None:
        rules.check({"transform": data.transform, "interpolation": data.interpolation, "crop": data.crop})
    if is_on_hub(model.name):
        check_classifier(model, config)
    else:
        check_model_name(model.name)
    _check_training(recipe)
    objective = build_recipe_objective(recipe)
    objective.check()
    if recipe.method.training.schedule == "sequential" and objective.looks_ahead:  # a plugin's; of ours `rules` says so
        raise RecipeError(
            f"{arg('classifier')}: it is made of blocks that follow, and with {arg('schedule', 'sequential')} those "
            "aren't trained yet; take another one."
        )
    return objective


def check_model_settings(recipe: Recipe) -> None:
    """Refuse what doesn't go with a recipe's model, by its name.

    Raises:
        RecipeError: the first of it.
    """
    model = recipe.method.model
    rules.check({**asdict(model), "model": model.name, "layer_decay": recipe.method.training.layer_decay})


def _split(model: nn.Module, size: tuple[int, int, int], settings: ModelSettings) -> Backbone:
    """A recipe's model in parts; one of transformers is watched while it is given images as data gives them."""
    if isinstance(model, Backbone):
        return model
    if not is_on_hub(settings.name):
        return split(model, size, blocks=settings.blocks)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0), device="cpu")
    return split(model, example=images, blocks=settings.blocks)


@dataclass(frozen=True)
class _MadeModel:
    """A recipe's model, its (C, H, W), the number of threads, chosen if it was open, and what it starts from."""

    model: nn.Module
    size: tuple[int, int, int]
    num_threads: int | None
    weights: LoadedWeights | None
    is_pretrained: bool

    @property
    def starts_from_weights(self) -> bool:
        """Whether its weights were trained before."""
        return self.is_pretrained or self.weights is not None


def _make_model(
    recipe: Recipe, settings: ModelSettings, info: DataInfo, *, chooses: bool, config: str | None
) -> _MadeModel:
    def make() -> tuple[nn.Module, LoadedWeights | None]:
        _seed_everything(recipe.method.seed)
        classes, channels = info.num_classes, info.num_channels
        return make_model(settings, num_classes=classes, num_channels=channels, config=config)

    model, weights = make()
    size = input_size_of(model, settings, info.num_channels)
    check_patches(model, size[1:])
    threads = recipe.execution.num_threads
    if threads is None and chooses:
        threads = choose_threads(model, size, recipe.method.training.batch_size)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
            model, weights = make()  # as it will be when this recipe, with its number of threads, is trained again
    return _MadeModel(model, size, threads, weights, settings.pretrained)


def default_transform(recipe: Recipe) -> tuple[str, tuple[int, int]] | None:
    """What files of images go through that are larger than the model's, and its size; none if a recipe says how."""
    data, augment, model = recipe.method.data, recipe.method.augment, recipe.method.model
    if data.transform or data.fit or augment.crop_padding or augment.flip or augment.rand_augment or augment.erasing:
        return None
    if is_on_hub(model.name):
        return "imagenet", size_of_images(model)
    import timm

    known = None if model.name in BACKBONES else timm.get_pretrained_cfg(model.name)
    size = known.input_size[1:] if known is not None else None
    size = size if model.img_size is None else (model.img_size, model.img_size)
    return None if size is None else ("imagenet", size)


def _settled(recipe: Recipe, data: Splits, made: _MadeModel, *, is_new: bool) -> tuple[Recipe, Splits]:
    """The recipe and the data once the model is there: normalised as its weights were trained, and what is cut off."""
    from localgrad.training.data import note_on_fit

    cut_off = note_on_fit(data, made.size[1:])
    data = data if cut_off is None else data.said(cut_off)
    if data.transform is not None:
        data = data.said(
            f"Images go through the transform {data.transform}; {arg('transform', NONE)} takes them as they are."
        )
        if recipe.method.data.fit is not None:
            fit = arg("fit", recipe.method.data.fit)
            data = data.said(f"{fit} does nothing: a transform brings images to the model's shape by itself.")
        settings = replace(recipe.method.data, transform=data.transform)
        recipe = replace(recipe, method=replace(recipe.method, data=settings))
    settings = recipe.method.data
    rules.check({"transform": data.transform, "interpolation": settings.interpolation, "crop": settings.crop})
    if made.weights is not None:
        data = data.said(str(made.weights), *made.weights.notes)
    return _evaluated_as_weights(*_normalised_as_weights(recipe, data, made), made) if is_new else (recipe, data)


def _normalised_as_weights(recipe: Recipe, data: Splits, made: _MadeModel) -> tuple[Recipe, Splits]:
    """The recipe and the data, normalised as the weights that a run starts from were trained."""
    if not made.starts_from_weights or recipe.method.data.mean is not None:
        return recipe, data
    trained_with = _trained_with(made)
    if trained_with is None:
        return recipe, data.said(
            "Nothing says what the weights' images were normalised by; the data's own is taken. data.mean and data.std "
            "set others."
        )
    data = data.normalised_by(*trained_with)
    mean, std = data.info.mean, data.info.std
    data = data.said(
        f"Normalised by mean {', '.join(f'{m:.4g}' for m in mean)} and std {', '.join(f'{s:.4g}' for s in std)}, as "
        "the pretrained weights were trained; data.mean and data.std set others."
    )
    settings = replace(recipe.method.data, mean=mean, std=std)
    return replace(recipe, method=replace(recipe.method, data=settings)), data


def _evaluated_as_weights(recipe: Recipe, data: Splits, made: _MadeModel) -> tuple[Recipe, Splits]:
    """The recipe and the data, brought to the model's size as the weights want it, or by the transform's defaults."""
    from localgrad.training.data import resizing_set

    settings = recipe.method.data
    given = resizing_set(settings)
    if data.transform is None or None not in given.values():
        return recipe, data
    known, notes = _resized_with(made) if made.starts_from_weights else ({}, [])
    wanted = {key: known.get(key) if value is None else value for key, value in given.items()}
    # A transform of one's own may have defaults that a recipe can't have; they stay its own.
    found = {key: value for key, value in resizing_of(data.transform, wanted).items() if _can_be_set(value)}
    taken = [key for key in known if key in found and given[key] is None]
    if taken:
        told = {"interpolation": "images are resized {}", "crop": "the central {:.4g} of their side is evaluated"}
        said = " and ".join(told[key].format(found[key]) for key in taken)
        others = " and ".join(f"data.{key}" for key in taken)
        sets = "set others" if len(taken) > 1 else "sets another"
        data = data.said(f"{said[0].upper()}{said[1:]}, as with the pretrained weights; {others} {sets}.", *notes)
    settings = replace(settings, **found)
    return replace(recipe, method=replace(recipe.method, data=settings)), data


def _can_be_set(value: object) -> bool:
    return value in get_args(Interpolation) or (isinstance(value, float) and 0 < value <= 1)


def _resized_with(made: _MadeModel) -> tuple[dict[str, Any], list[str]]:
    """Interpolation and crop of the images that a model's weights are evaluated on, and what of it isn't made here."""
    from timm.data import resolve_data_config

    known: Kwargs = getattr(made.model, "pretrained_cfg", None) or {}
    if made.weights is not None and made.weights.evaluated_by is not None:
        known = dict(made.weights.evaluated_by)
    if not known:
        return {}, []
    config = resolve_data_config(pretrained_cfg=known)
    interpolation, crop, mode = config["interpolation"], float(config["crop_pct"]), config["crop_mode"]
    notes = []
    if interpolation not in get_args(Interpolation):
        notes.append(f"The weights' interpolation is {interpolation}, which there isn't here: it is {INTERPOLATION}.")
        interpolation = INTERPOLATION
    if mode != "center":
        notes.append(f"The weights' images were brought to size by crop mode {mode}; here their centre is cut out.")
    if not 0 < crop <= 1:
        notes.append(f"The weights' crop is {crop:.4g}, of a border around images; here it is 1.")
        crop = 1.0
    return {"interpolation": interpolation, "crop": crop}, notes


def _balanced(balance: str, data: Splits, device: torch.device) -> tuple[CrossEntropy | None, Splits]:
    """The loss where classes are weighted, and the data with a line on how unequal ones are balanced."""
    from localgrad.training.data import class_weights

    if balance == "none":
        return None, data
    names, labels = data.info.class_names, data.train.labels
    weights, counts = class_weights(labels, len(names)), torch.bincount(labels, minlength=len(names))
    rarest = int(weights.argmax())
    commonest = int(counts.argmax())
    ends = [(float(weights[each]), names[each], f"{int(counts[each]):,}") for each in (commonest, rarest)]
    (low, most, num_most), (high, least, num_least) = ends
    empty = bool((counts == 0).any())
    if balance == "sampling":
        never = ", one without images never" if empty else ""
        return None, data.said(
            f"Classes are drawn alike often{never}: an image of {most} (of {num_most}) {low:.3g} times an epoch, one "
            f"of {least} (of {num_least}) {high:.3g} times, on average."
        )
    none = "; a class without images weighs 0" if empty else ""
    # Where the step is: else each loss would wait for a copy.
    return CrossEntropy(weights.to(device)), data.said(
        f"Cross-entropy is weighted by class: from {low:.3g} ({most}, {num_most} images) to {high:.3g} ({least}, "
        f"{num_least} images){none}."
    )


def frozen_as_said(recipe: Recipe, backbone: Backbone) -> Backbone:
    """A backbone whose first blocks stay as they are, where a recipe says so.

    Raises:
        BackboneError: these can't be frozen.
        RecipeError: fewer blocks are left to learn than there are to be local modules.
    """
    freeze, modules = recipe.method.training.freeze, recipe.method.local.modules
    if freeze is None:
        return backbone
    backbone = backbone.frozen(freeze)
    left = len(backbone.blocks)
    if isinstance(modules, int) and modules > left:
        raise RecipeError(
            f"{arg('freeze', freeze)}: it leaves {left} of the blocks for local modules, too few for "
            f"{arg('modules', modules)}; take {arg('modules', left)}, or freeze fewer."
        )
    return backbone


def _new_that_stands_still(backbone: Backbone, made: _MadeModel) -> Iterator[str]:
    """A line where weights that no file had don't learn either."""
    new = set() if made.weights is None else set(made.weights.made_new)
    still = [
        plain
        for name, weight in backbone.model.named_parameters()
        if not weight.requires_grad and (plain := name.replace(".base_layer.", ".")) in new
    ]
    if still:
        yield f"Not in the weights, and frozen: {listed(still)} stay as they were drawn."


def _what_learns(recipe: Recipe, backbone: Backbone) -> Iterator[str]:
    """A line for a run in which some weights stay as they are."""
    model = recipe.method.model
    how = {"freeze": recipe.method.training.freeze, "lora": model.lora, "quantize": model.quantize}
    asked = [arg(name, value) for name, value in how.items() if value is not None]
    if not asked:
        return
    learning = sum(weight.numel() for weight in backbone.model.parameters() if weight.requires_grad)
    packed = num_quantized(backbone.model)
    total = num_weights(backbone.model)
    held = (
        f"; {packed / total:.1%} are held in 4 bits, which model.safetensors will have dequantised and merged"
        if packed
        else ""
    )
    yield f"{' and '.join(asked)}: {learning / total:.2%} of the weights learn{held}."
    if model.lora is not None and (names := passed_by(backbone.model)):
        yield f"No adapters in {listed(names)}: the model reads these weights, if at all, without calling the layers."


def _trained_with(made: _MadeModel) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and std of the images that a model's weights were trained on: as their source says, or timm."""
    if made.weights is not None and made.weights.normalised_by is not None:
        return made.weights.normalised_by
    known: Kwargs = getattr(made.model, "pretrained_cfg", None) or {}
    return (known["mean"], known["std"]) if known.get("mean") and known.get("std") else None


def _check_patience(recipe: Recipe, data: Splits) -> None:
    """Refuse to wait for a better validation accuracy where so few images came to no validation part."""
    patience, share = recipe.method.training.patience, recipe.method.data.val_fraction
    if patience is not None and data.val is None:
        raise RecipeError(
            f"{arg('patience', patience)}: there are no validation images to tell when to stop: "
            f"{data.info.num_train} training images are too few for {arg('val_fraction', share)}; take a larger share."
        )


def _check_training(recipe: Recipe) -> None:
    """Refuse optimizers and numbers that can't be, before data is read."""
    training, execution = recipe.method.training, recipe.execution
    if training.freeze is not None:
        num_frozen(training.freeze)
    optimizer_info(training.optimizer)
    check_schedule(training.lr * min(training.lr_depth), **_schedule_of(training))
    own = training.batch_size // execution.replicas
    if execution.accumulation > own:
        raise RecipeError(
            f"{arg('accumulation', execution.accumulation)}: so many parts can't be made of {own} images; take fewer."
        )


def _schedule_of(training: TrainingSettings) -> Kwargs:
    names = ("epochs", "warmup_epochs", "warmup_lr", "min_lr")
    return {"name": training.scheduler, **{name: getattr(training, name) for name in names}}


def _optimizer_alone(learner: Learner, index: int, optimizer: Factories) -> Optimizer:
    """An optimizer of one local module that nobody keeps."""
    if isinstance(learner, ParallelLearner):  # a whole step would meet its twins
        return (optimizer if callable(optimizer) else optimizer[index])(learner.parameters(index))
    return learner.local_step(index, optimizer).optimizer


def optimizer_of(training: TrainingSettings, model: nn.Module) -> OptimizerFactory:
    """The optimizer factory of a recipe, the same for every depth."""
    return OptimizerFactory(
        model,
        name=training.optimizer,
        lr=training.lr,
        weight_decay=training.weight_decay,
        layer_decay=training.layer_decay,
    )


def optimizers_of(training: TrainingSettings, model: nn.Module, num_modules: int) -> Factories:
    """One optimizer factory for all local modules, or one each where depth has its own settings."""
    factory = optimizer_of(training, model)
    if training.lr_depth == training.weight_decay_depth == (1.0, 1.0):
        return factory

    def between(ends: tuple[float, float], index: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * index / max(1, num_modules - 1)

    return [
        factory.scaled(between(training.lr_depth, index), between(training.weight_decay_depth, index))
        for index in range(num_modules)
    ]


def resolve_device(name: str) -> torch.device:
    """Turn a device's name into a device that this machine has.

    Raises:
        DeviceError: it has none such.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"{arg('device')}: {name!r} is no device; take auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"{arg('device')}: {name!r} was asked for, but torch sees no CUDA GPU here; take {arg('device', 'cpu')}."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{arg('device')}: {name!r}, but there are {torch.cuda.device_count()} GPUs; take cuda:0.")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"{arg('device')}: {name!r} is not supported; take auto, cpu or cuda.")
    return device


def check_model_name(name: str) -> None:
    """Refuse a model that neither timm has nor a plugin registered.

    Raises:
        BackboneError: with the nearest names.
    """
    import timm

    if is_on_hub(name):
        raise BackboneError(
            f"{arg('model', name)}: by name, models of transformers are known to localgrad plan and localgrad train "
            "alone; take one of timm's here, or, in Python, give the model itself, with an example."
        )
    if name not in BACKBONES and not timm.is_model(name.split(".", maxsplit=1)[0]):
        nearest = did_you_mean(name, [*timm.list_models(), *BACKBONES]) or " timm.list_models() names them all."
        raise BackboneError(f"{arg('model')}: timm has no {name!r}.{nearest}")


def build_recipe_objective(recipe: Recipe) -> Objective:
    """The objective that a recipe names.

    Raises:
        RecipeError: an unknown name or option.
    """
    local, augment = recipe.method.local, recipe.method.augment
    if "label_smoothing" in local.options and (augment.mixup or augment.cutmix):
        raise RecipeError(
            "local.options.label_smoothing: labels that are mixed don't look at it; set "
            f"{arg('augment.label_smoothing', local.options['label_smoothing'])} in its place."
        )
    options = {"label_smoothing": augment.label_smoothing, **local.options}
    objective = build_objective(local.objective, options)
    made: Objective = validated(type(objective), options, "local.options.")  # (first, last) is a list in TOML
    return made


def make_model(
    settings: ModelSettings,
    *,
    num_classes: int | None,
    num_channels: int,
    config: str | None = None,
    has_values: bool = True,
) -> tuple[nn.Module, LoadedWeights | None]:
    """The model of a recipe with the weights that it starts from and its adapters, and what became of the weights.

    Args:
        settings: as the recipe has them.
        num_classes: by default the model's own.
        num_channels: of the images.
        config: of a model of transformers, as its run keeps it.
        has_values: false where nobody reads weights.

    Raises:
        BackboneError: it can't be made, or its weights can't be loaded.
        RecipeError: a library is missing.
    """
    if settings.quantize is not None:
        check_quantizer()
    if is_on_hub(settings.name):
        model, weights = make_classifier(settings, num_classes=num_classes, num_channels=num_channels, kept=config)
    else:
        model = create_model(settings, num_classes=num_classes, num_channels=num_channels)
        weights = None if settings.weights is None else start_from(model, settings.weights)
        if settings.lora is not None:
            model = with_adapters(model, settings.lora, input_size_of(model, settings, num_channels))
    if settings.quantize is not None:
        model = quantize_base(model, has_values=has_values)
    return model, weights


def create_model(settings: ModelSettings, *, num_classes: int | None, num_channels: int) -> nn.Module:
    """Make the model of a recipe for a data set: timm's, with no number of classes timm's own; or a plugin's backbone.

    Raises:
        BackboneError: unknown to timm, or timm can't make it with these settings.
    """
    import timm

    check_model_name(settings.name)
    options: Kwargs = dict(settings.options)
    for key in ("img_size", "patch_size"):
        if getattr(settings, key) is not None:
            options[key] = getattr(settings, key)
    if settings.drop_path is not None:
        options["drop_path_rate"] = settings.drop_path
    classes = {} if num_classes is None else {"num_classes": num_classes}

    if settings.name in BACKBONES:
        for name in ("weights", "lora"):
            if getattr(settings, name) is not None:
                raise BackboneError(f"{arg(name)}: {settings.name} is a plugin's; it is for timm's models alone.")
        if settings.pretrained:
            options["pretrained"] = True
        return _made_by_plugin(settings.name, {"in_chans": num_channels, **classes, **options})

    def create() -> nn.Module:
        model: nn.Module = timm.create_model(
            settings.name, pretrained=settings.pretrained, in_chans=num_channels, **classes, **options
        )
        return model

    try:
        try:
            return create()
        except TypeError as error:
            if settings.img_size is None or "'img_size'" not in str(error):
                raise
            del options["img_size"]  # a convolutional model, which takes any size
            return create()
    except Exception as error:  # timm's own checks are asserts and errors of many kinds
        raise BackboneError(
            f"{arg('model')}: timm can't make {settings.name!r} with {_as_options(options)}: "
            f"{reason_of(error).rstrip('.')}. "
            f"Check {arg('img_size')}, {arg('patch_size')} and model.options"
            f"{', or name weights that lie here by ' + arg('weights') if settings.pretrained else ''}."
        ) from error


def _made_by_plugin(name: str, options: Kwargs) -> Backbone:
    try:
        made = BACKBONES[name](**options)
    except LocalgradError:
        raise
    except Exception as error:  # whatever a user's code says
        raise BackboneError(
            f"{arg('model')}: {name!r} can't be made with {_as_options(options)}: {type(error).__name__}: "
            f"{reason_of(error).rstrip('.')}. Check {arg('img_size')}, {arg('patch_size')} and {arg('model.options')}."
        ) from error
    if not isinstance(made, Backbone):
        raise BackboneError(f"{arg('model')}: {name!r} gave {type(made).__name__}; let it return a localgrad.Backbone.")
    return made


def input_size_of(model: nn.Module, settings: ModelSettings, num_channels: int) -> tuple[int, int, int]:
    """(C, H, W) that a model takes in a recipe."""
    if isinstance(model, Backbone):
        return model.image_size
    if settings.img_size is not None:
        return num_channels, settings.img_size, settings.img_size
    if is_on_hub(settings.name):
        return num_channels, *side_of(model.config)
    return num_channels, *default_input_size(model)[1:]


def check_patches(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Refuse an image size that isn't a whole number of patches: a model would leave the rest of the image unseen."""
    embed, config = getattr(model, "patch_embed", None), getattr(model, "config", None)
    option = arg("patch_size") if config is None else "model.options.patch_size"
    patch = getattr(embed if config is None else config, "patch_size", None)
    if patch is None:
        return
    patches = (patch, patch) if isinstance(patch, int) else tuple(patch)
    for side, length in zip(image_size, patches, strict=True):
        if side % length:
            below = side // length * length
            near = f"{below} or {below + length}" if below else f"{length}"
            raise BackboneError(
                f"{arg('img_size')}: {side} pixels aren't a whole number of patches of {length}; take {near}, or "
                f"another {option}."
            )


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _as_options(options: Kwargs) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
