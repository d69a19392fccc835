"""Recipes: everything that defines a run, as TOML and back, and the presets that ship with the package.

A recipe has two halves. ``Method`` changes results: model, data, augmentation, local modules, optimization, seed.
``Execution`` must not: device, precision, checkpointing, compilation, workers. (Lower precision and other kernels
round differently; nothing else may change.) So a run may be resumed with another execution, never with another method.

A recipe is read from a preset or a TOML file, then single values are laid over it by dotted key
(``training.epochs=20``); the command line's options are such values. Unknown keys and impossible values are refused
with the key's name; settings of timm's own (optimizers, schedulers, model options) are checked by timm.
"""

from __future__ import annotations

import copy
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from localgrad.errors import PartitionError, RecipeError, did_you_mean
from localgrad.formats import check_format
from localgrad.partition import Checkpointing
from localgrad.training.augment import Augment

Positive = Annotated[int, Field(ge=1, strict=True)]  # strict: true is no number
Fraction = Annotated[float, Field(ge=0, lt=1, strict=True)]
Amount = Annotated[float, Field(ge=0, strict=True)]
Factor = Annotated[float, Field(gt=0, strict=True)]
Number = Annotated[float, Field(strict=True)]


def _checkpoint(value: str | list[str]) -> str | list[str]:
    for text in [value] if isinstance(value, str) else value:
        try:
            Checkpointing.parse(text)
        except PartitionError as error:
            raise ValueError(str(error).removeprefix("checkpoint: ")) from error
    return value


Checkpoint = Annotated[str | list[str], AfterValidator(_checkpoint)]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how timm is asked for it.

    Attributes:
        name: timm's name of the architecture, or that of a backbone which a plugin registers.
        img_size: side of the images in pixels; by default the model's own.
        patch_size: side of a patch in pixels; by default the model's own.
        drop_path: stochastic depth rate; by default the model's own (0.1 for Swin).
        pretrained: start from timm's pretrained weights (downloaded by timm).
        options: further keyword arguments of ``timm.create_model``, such as ``depths``.
    """

    __pydantic_config__ = STRICT
    name: str = "swin_tiny_patch4_window7_224"
    img_size: Positive | None = None
    patch_size: Positive | None = None
    drop_path: Fraction | None = None
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images.

    Attributes:
        name: digits, cifar10, cifar100, stl10, svhn, a folder, or a Hugging Face data set.
        root: where torchvision's data sets lie; by default ``data``.
        val_fraction: share of the training set that selects the best epoch; 0 takes the last epoch.
        limit: use only this many training images.
        on_corrupt: a corrupt image stops the run (``error``) or is left out and counted (``skip``).
        train_data: a folder of class folders or a table, instead of the training part that ``name`` holds.
        val_data: likewise, of the validation part.
        test_data: likewise, of the test part.
        image_range: (black, white) of images of more than 8 bits; by default the range of their type.
        background: a colour behind transparent images: a name, #rrggbb or 255,255,255; by default white.
        mean: per channel or one for all, of pixel values scaled to 0..1; by default the training images', or with
            ``model.pretrained`` what the weights were trained with.
        std: likewise.
        fit: how images of another shape are brought to the model's: ``crop`` (by default), ``pad`` or ``squash``.
        transform: what makes an image of a file one of the model's size: ``imagenet``, a registered name, or
            ``module:function``; ``none`` is ``fit`` alone. By default ``imagenet`` for files of images that are larger
            than the model's, where nothing is said of cropping and augmenting.
    """

    __pydantic_config__ = STRICT
    name: str = "digits"
    root: str | None = None
    val_fraction: Fraction = 0.1
    limit: Positive | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    train_data: str | None = None
    val_data: str | None = None
    test_data: str | None = None
    image_range: tuple[Number, Number] | None = None
    background: str | None = None
    mean: tuple[Number, ...] | None = None
    std: tuple[Factor, ...] | None = None
    fit: Literal["crop", "pad", "squash"] | None = None
    transform: str | None = None


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How the model is trained locally.

    Attributes:
        modules: number of local modules (balanced by activation bytes), ``stages``, boundaries, or ``auto``: as many
            as is fastest within a budget.
        objective: feature, image, greedy, contrastive, or one that a plugin registers.
        options: keyword arguments of the objective: ``decoder``, ``classifier``, weights, remedies.
        overlap: last blocks of the module before that each module's loss trains as well.
    """

    __pydantic_config__ = STRICT
    modules: Positive | str | list[int] = 4
    objective: str = "feature"
    options: dict[str, Any] = field(default_factory=dict)
    overlap: Annotated[int, Field(ge=0, strict=True)] = 0


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimization; every local module has its own optimizer and scheduler with these settings.

    A pair of factors goes from the first local module to the last.

    Attributes:
        epochs: passes over the training images.
        batch_size: images an update.
        optimizer: timm's name, such as adamw, sgd, lamb.
        lr: peak learning rate.
        weight_decay: not applied to biases, norms and what the model names.
        scheduler: timm's name, such as cosine, step, poly (linear), none.
        warmup_epochs: linear warm-up from ``warmup_lr``.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end.
        clip_grad: largest norm of each module's gradient; off by default.
        ema_decay: keep and select an average of the weights with this decay; off by default.
        schedule: train the local modules ``together``, or one after another on cached features (``sequential``).
        cached_epochs: in sequential mode, how many differently augmented epochs of features are cached.
        global_every: each step of that number is end-to-end (recomputing, within the same memory); off by default.
        global_tail: share of the steps, at the end, that are end-to-end.
        lr_depth: factors on the learning rate of the first and the last local module.
        weight_decay_depth: the same on the weight decay.
        warmup_stagger: epochs by which each module's warm-up is longer than that of the module before.
        freeze_from: share of the training after which early modules stop to learn, one after another; off by default.
    """

    __pydantic_config__ = STRICT
    epochs: Positive = 100
    batch_size: Positive = 128
    optimizer: str = "adamw"
    lr: Annotated[float, Field(gt=0, strict=True)] = 5e-4
    weight_decay: Amount = 0.05
    scheduler: str = "cosine"
    warmup_epochs: Amount = 5
    warmup_lr: Amount = 1e-6
    min_lr: Amount = 1e-6
    clip_grad: Annotated[float, Field(gt=0, strict=True)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    schedule: Literal["together", "sequential"] = "together"
    cached_epochs: Positive = 4
    global_every: Positive | None = None
    global_tail: Fraction = 0.0
    lr_depth: tuple[Factor, Factor] = (1.0, 1.0)
    weight_decay_depth: tuple[Amount, Amount] = (1.0, 1.0)
    warmup_stagger: Amount = 0.0
    freeze_from: Fraction | None = None

    def is_global(self, step: int, num_steps: int) -> bool:
        """Whether a step of the run (from 0) is end-to-end."""
        every = self.global_every is not None and (step + 1) % self.global_every == 0
        return every or step >= round((1 - self.global_tail) * num_steps)

    @property
    def global_share(self) -> float:
        """Share of the steps that is."""
        return self.global_tail + (1 - self.global_tail) / (self.global_every or math.inf)

    @property
    def has_global_steps(self) -> bool:
        """Whether any step is."""
        return self.global_every is not None or self.global_tail > 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """The half of a recipe that changes results.

    Attributes:
        seed: of the weights, the order of the images and every random draw.
        model: which model.
        data: which images.
        augment: what happens to training images.
        local: modules and objective.
        training: optimization.
    """

    __pydantic_config__ = STRICT
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augment: Augment = field(default_factory=Augment)
    local: LocalSettings = field(default_factory=LocalSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The half of a recipe that must not change results.

    Attributes:
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1``.
        precision: fp32, bf16 or fp16 autocast.
        accumulation: parts that each batch is cut into (batch norms and the contrastive term see the parts).
        checkpoint: what local modules recompute in their backward pass: ``none``, ``blocks``, ``halves``, ``halves/8``
            (over 8 chunks of the batch), ``halves/8:3`` (the first three blocks); one for all, or a list.
        global_checkpoint: what end-to-end steps recompute (``training.global_every``, ``global_tail``).
        compile: run each local module through torch.compile.
        offload: keep local modules that don't train, and their optimizer state, in host memory.
        num_workers: processes that decode images of sets too large for memory.
        num_threads: processor threads; by default torch's choice.
        parallel: ``modules`` shares the local modules out among the processes that torchrun started; by default one
            process trains them all.
        replicas: how often the whole model is there, each with a part of every batch (``parallel``).
        buffers: batches that may be on their way at each end of a link between two processes.
        wire: how features travel between processes: ``same``, or ``bf16`` in half the bytes.
        shard: share each module's weights, gradients and optimizer state out among its replicas (FSDP2).
        health_every: measure the modules' health after every so many epochs, and the last; 0 is never.
        health_reference: folder of an end-to-end run of the same model, for CKA with its features.
        sinks: where events go beside ``metrics.jsonl``, by name: ``tensorboard``, or what a plugin registers.
        plugins: modules that register what the recipe names: objectives, decoders, classifiers, sinks, backbones.
    """

    __pydantic_config__ = STRICT
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulation: Positive = 1
    checkpoint: Checkpoint = "none"
    global_checkpoint: Annotated[str, AfterValidator(_checkpoint)] = "blocks"
    compile: bool = False
    offload: bool = False
    num_workers: Annotated[int, Field(ge=0, strict=True)] = 2
    num_threads: Positive | None = None
    parallel: Literal["none", "modules"] = "none"
    replicas: Positive = 1
    buffers: Positive = 2
    wire: Literal["same", "bf16"] = "same"
    shard: bool = False
    health_every: Annotated[int, Field(ge=0, strict=True)] = 0
    health_reference: str | None = None
    sinks: list[str] = field(default_factory=lambda: ["tensorboard"])
    plugins: list[str] = field(default_factory=list)


RECIPE_FORMAT = 1
"""Version of a recipe's TOML. Without a number it is 1, that of 0.1.0."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run."""

    method: Method = field(default_factory=Method)
    execution: Execution = field(default_factory=Execution)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain values, method and execution side by side; unset values are left out."""
        return cast(dict[str, Any], _without_none({**asdict(self.method), "execution": asdict(self.execution)}))

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        import tomli_w

        return tomli_w.dumps({"format": RECIPE_FORMAT, **self.to_dict()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Make a recipe from nested plain values.

        Raises:
            RecipeError: an unknown key or an impossible value, named by its dotted key; or a newer version's recipe.
        """
        check_format("recipe", values.get("format", 1), RECIPE_FORMAT, RecipeError)
        method = {key: value for key, value in values.items() if key not in ("format", "execution")}
        return cls(
            method=validated(Method, method, ""),
            execution=validated(Execution, values.get("execution", {}), "execution."),
        )

    @classmethod
    def from_toml(cls, text: str, source: str = "recipe") -> Recipe:
        """Read a recipe from TOML text.

        Raises:
            RecipeError: not TOML, an unknown key or an impossible value.
        """
        return cls.from_dict(parse_toml(text, source))


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Parse TOML text, naming ``source`` in the error."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source}: this is not TOML ({error}).") from error


def preset_names() -> list[str]:
    """Names of the presets that ship with the package; those of sources' own forms come last."""
    files = [entry.name for entry in resources.files("localgrad.app.presets").iterdir()]
    names = [name.removesuffix(".toml") for name in files if name.endswith(".toml")]
    return sorted(names, key=lambda name: (name.endswith("-source"), name))


def preset(name: str) -> dict[str, Any]:
    """The values of a preset.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in preset_names():
        raise RecipeError(
            f"--preset: unknown {name!r}; there are {', '.join(preset_names())}.{did_you_mean(name, preset_names())}"
        )
    return parse_toml(
        resources.files("localgrad.app.presets").joinpath(f"{name}.toml").read_text(encoding="utf-8"), name
    )


def as_recipe(given: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe, or what stands for one: its values, nested or by dotted key; a preset's name; a file in TOML.

    Raises:
        RecipeError: a key that there isn't, an impossible value, or a file that can't be read.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        return Recipe.from_dict(overlay({}, flat(given)))
    if isinstance(given, str) and given in preset_names():
        return Recipe.from_dict(preset(given))
    return Recipe.from_dict(read_toml(Path(given)))


def read_toml(path: Path) -> dict[str, Any]:
    """Values of a recipe from a file.

    Raises:
        RecipeError: it can't be read, or is no TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RecipeError(f"--recipe: {path} can't be read ({reason}); name a recipe in TOML.") from error


def overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay single values over nested ones.

    Args:
        values: nested plain values; not changed.
        changes: dotted key to value.

    Raises:
        RecipeError: a key goes through something that is not a table.
    """
    result = copy.deepcopy(dict(values))
    for dotted, value in changes.items():
        table: Any = result
        *path, last = dotted.split(".")
        for key in path:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise RecipeError(f"--set: {dotted!r} goes through {key!r}, which is no table.")
        table[last] = value
    return result


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` texts; a value is TOML, or else a plain word.

    Raises:
        RecipeError: a text without ``=``.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set: expected KEY=VALUE, got {assignment!r}; for example --set training.lr=0.001.")
        try:
            changes[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = text.strip()
    return changes


def difference(old: Recipe, new: Recipe) -> list[str]:
    """The lines in which two recipes' methods differ: ``training.epochs: 20 -> 30``."""
    before, after = flat(asdict(old.method)), flat(asdict(new.method))
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def validated(kind: type[Any], values: Any, prefix: str) -> Any:
    """Make a dataclass of plain values, checked and converted (lists become tuples) by its annotations.

    Args:
        kind: the dataclass.
        values: what it is to be made of.
        prefix: dotted key of ``values`` in a recipe, with a dot at its end; for messages.

    Raises:
        RecipeError: an unknown key or an impossible value, named by its dotted key.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(_explain(kind, first, prefix)) from None


def _explain(kind: type[Any], error: Any, prefix: str) -> str:
    path = [str(part) for part in error["loc"]]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_at(kind, path[:-1]) + (["execution"] if kind is Method and len(path) == 1 else [])
        return (
            f"recipe: unknown key {prefix + '.'.join(path)!r}; here a recipe has {', '.join(known)}."
            f"{did_you_mean(path[-1], known)}"
        )
    branches = ("constrained-", "function-", "list[", "tuple[")  # of a union, as pydantic calls them
    named = [part for part in path if part not in ("int", "str", "float") and not part.startswith(branches)]
    key = (prefix + ".".join(named)).rstrip(".")
    cause = error.get("ctx", {}).get("error")
    if cause is not None:  # a check of our own, which names its value
        return f"recipe: {key}: {cause}"
    return f"recipe: {key} = {error['input']!r}: {error['msg']}."


def _keys_at(kind: type[Any], path: list[str]) -> list[str]:
    for key in path:
        inner = get_type_hints(kind).get(key)
        if inner is None or not is_dataclass(inner):
            break
        kind = cast(type[Any], inner)
    return [entry.name for entry in fields(kind)]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return list(value) if isinstance(value, tuple) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
