"""The tables, their cells, and the recipe and the command of a cell: pure functions of names and numbers.

A cell is one run: a method with K modules and a seed on a data set, with a table's model, in a profile's size. What its
recipe comes to is hashed into a fingerprint, which stands in every result: when a method, a profile or a default is
changed, what was measured before is no longer shown as its result, and its cells are run again. A key that recipes get
later counts only where its value isn't the default, which is to be what was done before there was the key: so results
outlive it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any

from localgrad.app.recipe import Recipe, overlay, preset
from research.reproduce.methods import BASELINES, DEFAULT, END_TO_END, METHODS, REMEDIES, overlay_of
from research.reproduce.profiles import DATA, Profile

REVISION = 2
"""To be raised by hand when code changes what a method means under the same recipe: all results are made anew."""

_OF_MACHINES = ("device", "num_threads", "parallel", "replicas", "buffers", "wire", "shard")

_ALWAYS = {
    "": ("seed",),
    "model": ("name", "pretrained", "options"),
    "data": ("name", "val_fraction", "on_corrupt"),
    "augment": ("crop_padding", "flip", "erasing", "mixup", "cutmix", "label_smoothing"),
    "local": ("modules", "objective", "options", "overlap"),
    "training": (
        *("epochs", "batch_size", "optimizer", "lr", "weight_decay", "scheduler", "warmup_epochs", "warmup_lr"),
        *("min_lr", "schedule", "cached_epochs", "global_tail", "lr_depth", "weight_decay_depth", "warmup_stagger"),
    ),
    "execution": (
        *("precision", "accumulation", "checkpoint", "global_checkpoint", "compile", "offload", "num_workers"),
        "health_every",
    ),
}
"""Keys of recipes that count whatever their value, by table: those of revision 2. None is added."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of results.

    Attributes:
        name: as typed, and of its files.
        title: what it shows, a phrase; ``{size}`` follows the name of a model.
        data: data sets.
        model: ``swin`` or ``vit``.
        methods: rows, baselines among them.
        modules: choices of K for all but the baselines, the most telling first.
        shares: of the profile's epochs, one run of every cell for each.
        num_images: to train on at most, in place of the profile's number.
        has_published: whether published figures stand beside ours.
        is_ranked: best first, instead of in the order of ``methods``.
    """

    name: str
    title: str
    data: tuple[str, ...]
    model: str = "swin"
    methods: tuple[str, ...] = tuple(METHODS)
    modules: tuple[int, ...] = (4, 2, 6, 12)
    shares: tuple[float, ...] = (1.0,)
    num_images: int | None = None
    has_published: bool = True
    is_ranked: bool = False


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a table.

    Attributes:
        table: its name.
        data: data set.
        method: its name.
        modules: K; 1 for the baselines.
        seed: of the run.
        epochs: of the run.
    """

    table: str
    data: str
    method: str
    modules: int
    seed: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.table}: {self.method} on {self.data}, K = {self.modules}, seed {self.seed}, {self.epochs} epochs"


_ALL = (
    Table(name="cifar10", title="Swin{size} on CIFAR-10", data=("cifar10",)),
    Table(name="cifar100", title="Swin{size} on CIFAR-100", data=("cifar100",)),
    Table(name="stl10", title="Swin{size} on STL-10", data=("stl10",)),
    Table(name="svhn", title="Swin{size} on SVHN", data=("svhn",)),
    Table(name="vit", title="ViT{size} on all four data sets", data=tuple(DATA), model="vit", has_published=False),
    Table(
        name="ranking",
        title="What helps, at K = 4",
        data=("cifar10",),
        methods=(END_TO_END, "greedy", "feature-linear", "image", "trgl", DEFAULT, *REMEDIES),
        modules=(4,),
        has_published=False,
        is_ranked=True,
    ),
    Table(
        name="epochs",
        title="The gap to end-to-end training after more and more epochs, at K = 4",
        data=("cifar10",),
        methods=(END_TO_END, "greedy", "feature-linear", DEFAULT),
        modules=(4,),
        shares=(0.25, 0.5, 1.0, 2.0),
        has_published=False,
    ),
    Table(
        name="images",
        title="The gap to end-to-end training on 10,000 training images, at K = 4",
        data=("cifar10",),
        methods=(END_TO_END, DEFAULT, "feature-linear", "greedy", "overlap-1", "global-tail-20"),
        modules=(4,),
        shares=(0.5,),
        num_images=10_000,
        has_published=False,
    ),
    Table(
        name="sources",
        title="Sources' own forms beside ours, at K = 4",
        data=("cifar10",),
        methods=(END_TO_END, "trgl", "trgl-source", "image", "infopro-source"),
        modules=(4,),
        has_published=False,
    ),
)
TABLES: dict[str, Table] = {table.name: table for table in _ALL}


def epochs_of(table: Table, profile: Profile) -> tuple[int, ...]:
    """Epochs that a table's cells are run for by default."""
    wanted = [each.epochs or profile.epochs for each in profile.agenda if each.table == table.name]
    if wanted:
        return tuple(dict.fromkeys(wanted))
    return tuple(dict.fromkeys(max(1, round(share * profile.epochs)) for share in table.shares))


def modules_of(table: Table, profile: Profile) -> tuple[int, ...]:
    """Choices of K that the profile's model has blocks for."""
    return tuple(k for k in table.modules if k <= profile.num_blocks[table.model])


def cells_of(
    table: Table, profile: Profile, *, seeds: Sequence[int] | None = None, epochs: Sequence[int] | None = None
) -> list[Cell]:
    """All cells of a table, those first that tell most.

    Args:
        table: which.
        profile: its size.
        seeds: instead of the profile's.
        epochs: instead of the table's.
    """
    if profile.agenda:
        return _agreed([table], profile, seeds, epochs)
    modules = modules_of(table, profile)
    rows = [(method, 1) for method in table.methods if method == END_TO_END]
    rows += [(method, modules[0]) for method in table.methods if method not in BASELINES]
    rows += [(method, 1) for method in table.methods if method in BASELINES and method != END_TO_END]
    rows += [(method, k) for k in modules[1:] for method in table.methods if method not in BASELINES]
    return [
        Cell(table.name, data, method, k, seed, num_epochs)
        for seed in (profile.seeds if seeds is None else seeds)
        for data in table.data
        for num_epochs in (epochs_of(table, profile) if epochs is None else epochs)
        for method, k in rows
    ]


def _agreed(
    tables: Sequence[Table], profile: Profile, seeds: Sequence[int] | None, epochs: Sequence[int] | None
) -> list[Cell]:
    """The cells of some tables that a profile's agenda has, in its order."""
    names = {table.name for table in tables}
    return list(
        dict.fromkeys(
            Cell(wanted.table, wanted.data, method, 1 if method in BASELINES else k, seed, number)
            for wanted in profile.agenda
            if wanted.table in names
            for seed in (wanted.seeds if seeds is None else seeds)
            for number in ((wanted.epochs or profile.epochs,) if epochs is None else epochs)
            for k in wanted.modules
            for method in wanted.methods
        )
    )


def cells_of_all(
    tables: Sequence[Table],
    profile: Profile,
    *,
    seeds: Sequence[int] | None = None,
    epochs: Sequence[int] | None = None,
) -> list[Cell]:
    """The cells of several tables: in the order of the profile's agenda, or the first seed of all of them first.

    Args:
        tables: which.
        profile: their size.
        seeds: instead of the profile's.
        epochs: instead of the tables'.
    """
    if profile.agenda:
        return _agreed(tables, profile, seeds, epochs)
    return interleaved(cell for table in tables for cell in cells_of(table, profile, seeds=seeds, epochs=epochs))


def interleaved(cells: Iterable[Cell]) -> list[Cell]:
    """Cells of several tables, the first seed of all of them first."""
    return sorted(cells, key=lambda cell: cell.seed)


def recipe_of(cell: Cell, profile: Profile) -> dict[str, Any]:
    """The recipe of a cell as nested plain values, without what belongs to a machine (where data lies, the device)."""
    values = overlay(_base(profile.preset), profile.settings)
    values = overlay(values, profile.models[TABLES[cell.table].model])
    values = overlay(values, DATA[cell.data])
    if (num_images := TABLES[cell.table].num_images) is not None:
        values = overlay(values, {"data.limit": num_images})
    values = overlay(values, {"local.modules": cell.modules, **overlay_of(cell.method)})
    warmup = values["training"]["warmup_epochs"] * cell.epochs / profile.epochs  # a shorter run of the same shape
    own = {"data.name": cell.data, "seed": cell.seed, "training.epochs": cell.epochs, "training.warmup_epochs": warmup}
    return overlay(values, own)


@cache
def _base(name: str | None) -> dict[str, Any]:
    """What a profile is laid over: a preset without its local modules, which are the method's to say."""
    return {} if name is None else {key: value for key, value in preset(name).items() if key != "local"}


def fingerprint(values: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell recipes apart, wherever they are run."""
    recipe, defaults = Recipe.from_dict(values).to_dict(), Recipe().to_dict()
    return digest({"revision": REVISION, "recipe": _telling(recipe, defaults)})


def _telling(values: Mapping[str, Any], defaults: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """What tells a recipe, or one of its tables, from others: see ``_ALWAYS``."""
    found: dict[str, Any] = {}
    always = _ALWAYS.get(table, ())
    for key, value in values.items():
        if table == "execution" and key in _OF_MACHINES:
            continue
        if isinstance(value, Mapping) and key not in always:
            inner = _telling(value, defaults.get(key, {}), f"{table}.{key}" if table else key)
            found |= {key: inner} if inner else {}
        elif key in always or value != defaults.get(key):
            found[key] = value
    return found


def digest(value: object) -> str:
    """Eight hexadecimal digits that tell plain values apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def model_of(values: Mapping[str, Any]) -> str:
    """The model of a recipe in words: timm's name, and whatever isn't timm's own."""
    settings = dict(values["model"])
    name = settings.pop("name")
    changed = {**settings.pop("options", {}), **settings}
    return ", ".join([name, *(f"{key}={json.dumps(changed[key])}" for key in sorted(changed))])


def command_of(cell: Cell, profile: Profile, path: str | None) -> str:
    """What a stranger types to run this cell and no other.

    Args:
        cell: which.
        profile: its size.
        path: where the data were, if not where torchvision puts them; a path of this machine alone is left out.
    """
    words = ["python -m research.reproduce", cell.table, "--profile", profile.name, "--methods", cell.method]
    if cell.method not in BASELINES:
        words += ["--modules", str(cell.modules)]
    words += ["--seeds", str(cell.seed)]
    if len(TABLES[cell.table].data) > 1:
        words += ["--data", cell.data]
    if epochs_of(TABLES[cell.table], profile) != (cell.epochs,):
        words += ["--epochs", str(cell.epochs)]
    if path is not None:
        is_elsewhere = PurePath(path).is_absolute() or path.startswith("~")
        words += ["--data-path", f"{cell.data}={'FOLDER' if is_elsewhere else shlex.quote(path)}"]
    return " ".join(words)


def repeating_command_of(
    cell: Cell, profile: Profile, path: str | None, *, device: str, num_threads: int | None
) -> str:
    """What repeats a cell as it was run, even where its result lies already.

    Args:
        cell: which.
        profile: its size.
        path: as for ``command_of``.
        device: kind of it; the processor goes without saying.
        num_threads: of the run, if known.
    """
    words = [command_of(cell, profile, path)]
    words += [] if device == "cpu" else ["--device", device]
    words += [] if num_threads is None else ["--num-threads", str(num_threads)]
    return " ".join([*words, "--again"])
