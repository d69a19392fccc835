"""Recipes: everything that defines a run, as TOML and back, and the presets that ship with the package.

A recipe has two halves. ``Method`` changes results: model, data, augmentation, local modules, optimization, seed.
``Execution`` must not: device, precision, checkpointing, compilation, workers. (Lower precision and other kernels
round differently; nothing else may change.) So a run may be resumed with another execution, never with another method.

Single values are laid over a preset or a TOML file by dotted key (``training.epochs=20``); the command line's options
are such values. Unknown keys and impossible values are refused with the key's name; settings of timm's own are checked
by timm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

from localgrad.errors import RecipeError, arg, did_you_mean, reason_of
from localgrad.formats import check_format, read_input
from localgrad.options import (
    DATA,
    EXECUTION,
    METHOD,
    STRICT,
    Amount,
    Count,
    Factor,
    Fraction,
    Limits,
    Option,
    Positive,
    Readable,
    Values,
    declared,
    documented,
    entries,
    option,
    read_freeze,
    read_list,
    read_modules,
)
from localgrad.training.settings import Augment, DataSettings

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from pydantic import TypeAdapter


def _read_checkpoint(value: str | list[str], name: str = "checkpoint") -> None:
    from localgrad.partition import Checkpointing  # which would hold up --help, as would what reads TOML

    for text in [value] if isinstance(value, str) else value:
        Checkpointing.parse(text, name)


@documented
@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how timm is asked for it."""

    __pydantic_config__ = STRICT
    name: str = option(
        "swin_tiny_patch4_window7_224",
        "timm's name of the model, a plugin's, or hf:FOLDER_OR_NAME of transformers (to train: image classifiers).",
        METHOD,
        name="model",
    )
    img_size: Positive | None = option(None, "Side of the images in pixels; by default the model's own.", METHOD)
    patch_size: Positive | None = option(None, "Side of a patch in pixels; by default the model's own.", METHOD)
    drop_path: Fraction | None = option(None, "Stochastic depth rate; by default the model's own.", METHOD)
    pretrained: bool = option(default=False, help="Start from timm's weights, or those of hf:.", panel=METHOD)
    weights: str | None = option(
        None, "Start from these: a file, a folder (timm's, or a run's), or hf-hub:OWNER/NAME.", METHOD
    )
    lora: Positive | None = option(
        None, "Train adapters of this rank in every linear layer, and the head; no other weight. Needs peft.", METHOD
    )
    quantize: Literal["4bit"] | None = option(
        None, "4bit: with lora, the weights below the adapters are held in 4 bits (NF4). Needs bitsandbytes.", METHOD
    )
    blocks: str | None = option(None, "Dotted name of the container of its blocks; by default found.", METHOD)
    options: Values = option(
        dict, "Further keyword arguments of timm.create_model, such as depths; of hf: values of its config."
    )


@documented
@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How the model is trained locally."""

    __pydantic_config__ = STRICT
    modules: Positive | str | list[int] = option(
        4,
        "Local modules: a number, stages, boundaries such as 2,5,9, or auto (with a budget). 1 is end-to-end.",
        METHOD,
        read=read_modules,
    )
    objective: str = option(
        "feature", "feature, image, greedy, contrastive, lopt, solo, segprop, or a plugin's.", METHOD
    )
    options: Values = entries(
        decoder=Option(
            help="Auxiliary decoder: linear, bottleneck, conv, transformer, bilinear, or a plugin's.", panel=METHOD
        ),
        classifier=Option(
            help="Auxiliary classifier: linear, mlp, transformer, next, tail, readout, or a plugin's.", panel=METHOD
        ),
    )
    overlap: Count = option(0, "Last blocks of the module before that each module trains as well.", METHOD)


@documented
@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimization; every local module has its own optimizer and scheduler with these settings.

    A pair of factors goes from the first local module to the last.
    """

    __pydantic_config__ = STRICT
    epochs: Positive = option(100, "Passes over the training images.", METHOD)
    patience: Positive | None = option(
        None,
        "Stop after so many epochs without a better validation accuracy; learning rates stay those of all epochs.",
        METHOD,
    )
    batch_size: Positive = option(128, "Images an update.", METHOD)
    optimizer: str = option("adamw", "timm's name of the optimizer, such as adamw, sgd, lamb.", METHOD)
    lr: Factor = option(5e-4, "Peak learning rate.", METHOD)
    weight_decay: Amount = option(0.05, "Weight decay; not of biases, norms and what the model names.", METHOD)
    scheduler: str = option("cosine", "cosine, step, poly (linear), none …", METHOD)
    warmup_epochs: Amount = option(5, "Linear warm-up.", METHOD)
    warmup_lr: Amount = option(1e-6, "Learning rate at the start of the warm-up.")
    min_lr: Amount = option(1e-6, "Learning rate at the end.")
    clip_grad: Factor | None = option(None, "Largest norm of each module's gradient; off by default.", METHOD)
    ema_decay: Annotated[float, Limits(gt=0, lt=1)] | None = option(
        None, "Keep and select an average of the weights with this decay.", METHOD
    )
    schedule: Literal["together", "sequential"] = option(
        "together", "Train the modules together, or sequential: one after another, on cached features.", METHOD
    )
    cached_epochs: Positive = option(
        4, "Augmented epochs of features that sequential, or cache_frozen, keeps on disk.", METHOD
    )
    cache_frozen: bool = option(
        default=False,
        help="Run frozen blocks for the cached epochs alone; later ones read features.",
        panel=METHOD,
    )
    global_every: Positive | None = option(
        None, "Every step of that number is end-to-end, recomputing within the same memory.", METHOD
    )
    global_tail: Fraction = option(0.0, "Share of the steps, at the end, that are end-to-end.", METHOD)
    lr_depth: tuple[Factor, Factor] = option((1.0, 1.0), "Factors on the learning rate.")
    weight_decay_depth: tuple[Amount, Amount] = option((1.0, 1.0), "Factors on the weight decay.")
    warmup_stagger: Amount = option(0.0, "Epochs by which each module's warm-up is longer than the one before.")
    freeze: int | float | str | None = option(
        None,
        "What stays as it is: stem, the first so many blocks, or a share of them such as 0.5; 1.0 leaves the head.",
        METHOD,
        read=read_freeze,
    )
    layer_decay: Annotated[float, Limits(gt=0, le=1)] | None = option(
        None, "Factor on the learning rate from each block to the one before, as 0.75; off by default.", METHOD
    )
    balance: Literal["none", "weights", "sampling"] = option(
        "none",
        "Unbalanced classes: weights (cross-entropy weighted by class), sampling (classes drawn alike often), none.",
        METHOD,
    )
    freeze_from: Fraction | None = option(
        None, "Share of the training after which early modules stop to learn, one after another; off by default."
    )

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
    """The half of a recipe that changes results: what is trained, on what, how, and from which seed."""

    __pydantic_config__ = STRICT
    seed: Annotated[int, Limits(ge=0, lt=2**63)] = option(0, "Of weights, order of the images and draws.", METHOD)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augment: Augment = field(default_factory=Augment)
    local: LocalSettings = field(default_factory=LocalSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


@documented
@dataclass(frozen=True, kw_only=True)
class Execution:
    """The half of a recipe that must not change results."""

    __pydantic_config__ = STRICT
    device: str = option("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1.", EXECUTION)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "fp32, bf16 or fp16.", EXECUTION)
    accumulation: Positive = option(
        1, "Parts that each batch is cut into, to save memory; batch norms and contrastive see parts.", EXECUTION
    )
    checkpoint: Annotated[str | list[str], Readable(_read_checkpoint)] = option(
        "none",
        "Recompute inside modules: blocks, halves, halves/8 (in 8 chunks), halves/8:3 (the first 3 blocks), none; a "
        "list: one each.",
        EXECUTION,
        read=read_list,
    )
    global_checkpoint: Annotated[str, Readable(lambda text: _read_checkpoint(text, "global_checkpoint"))] = option(
        "blocks", "What end-to-end steps recompute."
    )
    compile: bool = option(default=False, help="Compile each local module.", panel=EXECUTION)
    offload: bool = option(
        default=False, help="Keep modules that don't train, and their optimizers, in host memory.", panel=EXECUTION
    )
    num_workers: Count = option(2, "Processes that decode data sets too large for memory.", EXECUTION)
    num_threads: Annotated[int, Limits(ge=1, le=1024)] | None = option(
        None, "Processor threads; a run chooses once, by size: 1 for a small model, else torch's choice.", EXECUTION
    )
    parallel: Literal["none", "modules"] = option(
        "none", "modules: share the local modules out among processes.", EXECUTION
    )
    replicas: Positive = option(1, "With parallel: how often the whole model is there.", EXECUTION)
    buffers: Positive = option(2, "Batches that may be on their way at each end of a link between two processes.")
    wire: Literal["same", "bf16"] = option("same", "How features travel: same, or bf16 in half the bytes.")
    shard: bool = option(
        default=False, help="With replicas: each keeps a part of weights and optimizer state.", panel=EXECUTION
    )
    health_every: Count = option(
        0, "Every so many epochs, and the last, measure where accuracy is lost.", EXECUTION, name="health"
    )
    health_reference: str | None = option(None, "With health: an end-to-end run, to compare features with.", EXECUTION)
    sinks: list[str] = option(
        lambda: ["tensorboard"],
        "Where figures go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio, or a plugin's; may be repeated.",
        EXECUTION,
        name="sink",
        repeated=str,
    )
    plugins: list[str] = option(
        list, "Module that registers what you name; may be repeated.", EXECUTION, name="plugin", repeated=str
    )


RECIPE_FORMAT = 1
"""Version of a recipe's TOML. Without a number it is 1, that of 0.1.0."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run."""

    method: Method = field(default_factory=Method)
    execution: Execution = field(default_factory=Execution)

    def to_dict(self) -> Values:
        """The recipe as nested plain values, method and execution side by side; unset values are left out."""
        return cast(Values, _without_none({**asdict(self.method), "execution": asdict(self.execution)}))

    def arguments(self) -> Values:
        """What local modules are trained and selected by, as arguments by their own names; for ``rules.check``.

        But for the device: a run moves its model there, while a learner's ``device`` is for offloading alone.
        """
        local, training, execution = asdict(self.method.local), asdict(self.method.training), asdict(self.execution)
        del execution["device"]
        selected = {"val_fraction": self.method.data.val_fraction, "streaming": self.method.data.streaming}
        return {**selected, **training, **execution, **local.pop("options"), **local}

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


OPTIONS = declared(Method) | declared(Execution, "execution.")
"""What each value of a recipe is, and how it is typed; by dotted key."""

DOWNLOAD = Option(
    help="Fetch a torchvision data set that is missing.", panel=DATA, name="download", key="download", kind=bool
)
"""The option of whatever reads a data set by name."""


def parse_toml(text: str, source: str) -> Values:
    """Parse TOML text, naming ``source`` in the error."""
    import tomllib

    try:
        return tomllib.loads(text)
    except ValueError as error:  # or a number of thousands of digits, which Python doesn't read
        raise RecipeError(f"{source}: this is not TOML ({reason_of(error, limit=200)}).") from error


def preset_names() -> list[str]:
    """Names of the presets that ship with the package; those of sources' own forms come last."""
    files = [entry.name for entry in _presets().iterdir()]
    names = [name.removesuffix(".toml") for name in files if name.endswith(".toml")]
    return sorted(names, key=lambda name: (name.endswith("-source"), name))


def preset(name: str) -> Values:
    """The values of a preset.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in preset_names():
        raise RecipeError(
            f"{arg('preset')}: unknown {name!r}; there are {', '.join(preset_names())}."
            f"{did_you_mean(name, preset_names())}"
        )
    return parse_toml(_presets().joinpath(f"{name}.toml").read_text(encoding="utf-8"), name)


def _presets() -> Traversable:
    from importlib import resources

    return resources.files("localgrad.app.presets")


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


def read_toml(path: Path) -> Values:
    """Values of a recipe from a file.

    Raises:
        RecipeError: it can't be read, or is no TOML.
    """
    return parse_toml(read_input("recipe", path, "name a recipe in TOML"), str(path))


def overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Values:
    """Lay single values, by dotted key, over nested ones, which aren't changed.

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
                raise RecipeError(f"{arg('set')}: {dotted!r} goes through {key!r}, which is no table.")
        table[last] = value
    return result


def parse_assignments(assignments: Iterable[str]) -> Values:
    """Read ``key=value`` texts; a value is TOML, or else a plain word.

    Raises:
        RecipeError: a text without ``=``.
    """
    import tomllib

    changes: Values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"{arg('set')}: expected KEY=VALUE, got {assignment!r}; for example {arg('set', 'training.lr=0.001')}."
            )
        try:
            changes[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except ValueError:  # no TOML, or a number of thousands of digits, which Python doesn't read
            changes[key.strip()] = text.strip()
    return changes


def difference(old: Recipe, new: Recipe) -> list[str]:
    """The lines in which two recipes' methods differ: ``training.epochs: 20 -> 30``."""
    before, after = flat(asdict(old.method)), flat(asdict(new.method))
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def validated(kind: type[Any], values: Any, prefix: str) -> Any:
    """Make a dataclass of plain values, checked and converted (lists become tuples) by its annotations.

    The prefix is the dotted key of the values in a recipe, with a dot at its end; for messages.

    Raises:
        RecipeError: an unknown key or an impossible value, named by its dotted key.
    """
    from pydantic import TypeAdapter, ValidationError  # which would hold up --help

    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    try:
        made = _adapters[kind].validate_python(values)
    except ValidationError as error:
        raise RecipeError(_explain(kind, error.errors(), prefix)) from None
    _check_taken(values, made, prefix)
    return made


_adapters: dict[type[Any], TypeAdapter[Any]] = {}
"""Kept, as one takes a hundred times as long to make as to use."""


def _check_taken(value: Any, taken: Any, key: str) -> None:
    """Refuse what would be taken for something else: an empty text for none, true for 1."""
    if isinstance(value, Mapping) and is_dataclass(taken):
        for name, own in value.items():
            _check_taken(own, getattr(taken, name), f"{key}{name}.")
    elif isinstance(value, (list, tuple)) and isinstance(taken, (list, tuple)):
        for own, its in zip(value, taken, strict=True):
            _check_taken(own, its, key)
    elif isinstance(value, str) and not value:
        raise RecipeError(f"recipe: {key[:-1]} = '': an empty text is no value; give one, or leave it out.")
    elif isinstance(value, bool) and not isinstance(taken, bool):
        raise RecipeError(
            f"recipe: {key[:-1]} = {value}: true and false are no numbers; give {taken:g}, if that is meant."
        )


_WANTED = {
    "greater_than_equal": "take {ge} or more",
    "greater_than": "take a number above {gt}",
    "less_than_equal": "take {le} or less",
    "less_than": "take a number below {lt}",
    "finite_number": "take a finite number",
    "literal_error": "take {expected}",
    "too_long": "take {max_length} values",
    "missing": "a value is missing; add it",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a table",
    "dataclass": "a table",
}
"""What is to be given, by pydantic's name of an error, or by its first word: the kind of value."""


def _explain(kind: type[Any], errors: Sequence[Any], prefix: str) -> str:
    error = errors[0]
    path = [str(part) for part in error["loc"]]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_at(kind, path[:-1]) + (["execution"] if kind is Method and len(path) == 1 else [])
        return (
            f"recipe: unknown key {prefix + '.'.join(path)!r}; here a recipe has {', '.join(known)}."
            f"{did_you_mean(path[-1], known)}"
        )
    key = _key_of(error)
    alike = [each for each in errors if _key_of(each) == key]  # of a union, one a kind of value
    for each in alike:
        cause = each.get("ctx", {}).get("error")
        if cause is not None:  # a check of our own, which names its argument
            return f"recipe: {cause}"
    said = [_WANTED[each["type"]].format(**_plain(each.get("ctx", {}))) for each in alike if each["type"] in _WANTED]
    kinds = [_WANTED[word] for word in (each["type"].partition("_")[0] for each in alike) if word in _WANTED]
    if "a number" in kinds:
        kinds = [each for each in kinds if each != "a whole number"]
    told = said[0] if said else f"take {' or '.join(dict.fromkeys(kinds)) or 'another value'}"
    return f"recipe: {(prefix + key).rstrip('.')} = {error['input']!r}: {told}."


def _plain(limits: Values) -> Values:
    """Limits as a person writes them: 1, not 1.0."""
    return {name: f"{each:.15g}" if isinstance(each, float) else each for name, each in limits.items()}


def _key_of(error: Any) -> str:
    """The dotted key that an error is of, without the branches of a union, as pydantic calls them."""
    branches = ("constrained-", "function-", "list[", "tuple[")
    path = [str(part) for part in error["loc"]]
    named = [part for part in path if part not in ("int", "str", "float") and not part.startswith(branches)]
    return ".".join(named[:-1] if error["type"] == "missing" else named)


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


def flat(values: Mapping[str, Any], prefix: str = "") -> Values:
    """Nested values by dotted key."""
    found: Values = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
