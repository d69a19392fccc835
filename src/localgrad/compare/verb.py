"""``localgrad compare``: from what a person typed to a comparison, and the table that is printed.

Everything that can be wrong is found before the first step: names, numbers, partitions, files that can't be written.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from localgrad import rules
from localgrad.app.build import check_model_name, create_model, input_size_of, resolve_device
from localgrad.app.comparison import Settings
from localgrad.app.fitting import device_name, versions
from localgrad.app.planned import read_plan
from localgrad.app.recipe import ModelSettings, validated
from localgrad.backbones.base import Backbone, split
from localgrad.compare.contenders import HOST, Contender, Local, Stage, default_methods
from localgrad.compare.plots import check_path, plot_timeline, plot_trade_off
from localgrad.compare.side_by_side import About, Comparison, Report, Row, compare
from localgrad.errors import RecipeError, arg, did_you_mean
from localgrad.formats import Json, check_output_file
from localgrad.objectives.auxiliary import DECODERS
from localgrad.objectives.methods import OBJECTIVES
from localgrad.partition import Checkpointing
from localgrad.partitioning import num_parameters, num_trained
from localgrad.planning.budget import LARGEST_BATCH
from localgrad.step.local_step import check_precision
from localgrad.training.data import Batches, load_data
from localgrad.training.optim import OptimizerFactory
from localgrad.training.settings import DataSettings
from localgrad.units import format_bytes, format_rate

PRECISIONS = ("fp32", "bf16")


def run(settings: Settings, report: Report) -> Comparison:
    """Compare methods, and write the files that were asked for.

    Raises:
        LocalgradError: something is wrong with an option; nothing was run.
    """
    _check_numbers(settings)
    _check_files(settings)
    device = resolve_device(settings.device)
    precisions = _choices("precision", settings.precision, PRECISIONS)
    for precision in precisions:
        check_precision(precision, device)
    check_model_name(settings.model)
    methods = _methods(settings, precisions)
    torch.manual_seed(0)
    data = _images(settings)
    asked = ModelSettings(name=settings.model, img_size=settings.img_size)
    model = create_model(asked, num_classes=data.num_classes, num_channels=data.num_channels)
    size = input_size_of(model, asked, data.num_channels)
    optimizer = OptimizerFactory(model, name=settings.optimizer, lr=1e-4, weight_decay=0.05)
    images, labels = data.batch(size)
    backbone = split(model.to(device), size)
    optimizer([next(backbone.parameters())])  # timm may not be able to make it here
    for method in methods:
        if isinstance(method, Local):
            method.check(backbone)
    about: About = {
        "model": settings.model,
        "input_size": list(size),
        "num_classes": data.num_classes,
        "batch_size": settings.batch_size,
        "data": data.name,
        "device": device_name(device),
        "device_type": device.type,
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": shlex.join(["localgrad", *sys.argv[1:]]),
        "settings": {name: _json_value(value) for name, value in asdict(settings).items()},
    }
    about["notes"] = _notes_of_plans(settings, precisions, backbone, device)
    stage = Stage(backbone, optimizer, settings.batch_size, device)
    comparison = compare(
        stage,
        methods,
        images,
        labels,
        repeats=settings.repeats,
        warmup=settings.warmup,
        estimate_only=settings.estimate_only,
        timelines=settings.timeline is not None,
        about=about,
        report=report,
    )
    if settings.json is not None:
        settings.json.write_text(comparison.to_json(), encoding="utf-8")
    if settings.plot is not None:
        plot_trade_off(comparison, settings.plot)
    if settings.timeline is not None:
        plot_timeline(comparison, settings.timeline)
    return comparison


def _json_value(value: Any) -> Json:
    if isinstance(value, Path):
        return str(value)
    return [_json_value(item) for item in value] if isinstance(value, tuple) else value


# Options ---------------------------------------------------------------------------------------------------------


def _check_numbers(settings: Settings) -> None:
    for name, least, usual in (
        ("batch_size", 1, 64),
        ("repeats", 1, 3),
        ("warmup", 0, 1),
        ("num_classes", 1, 1000),
        ("img_size", 1, 224),
    ):
        value = getattr(settings, name)
        if name == "batch_size" and value > LARGEST_BATCH:
            raise RecipeError(f"{arg(name)}: {value} is above {LARGEST_BATCH}; take {usual}.")
        if value is not None and value < least:
            instead = f", or {arg('estimate_only', value=True)} to run nothing" if name == "repeats" else ""
            raise RecipeError(f"{arg(name)}: {value} is below {least}; take {usual}{instead}.")
    names = ("data", "num_classes", "plot", "estimate_only", "download", *rules.READING)
    rules.check({name: getattr(settings, name) for name in names})


def _check_files(settings: Settings) -> None:
    if settings.json is not None:
        check_output_file("json", settings.json)
    for name, path in (("plot", settings.plot), ("timeline", settings.timeline)):
        if path is not None:
            check_path(name, path)


def _methods(settings: Settings, precisions: Sequence[str]) -> list[Contender]:
    given = settings.modules[0].split(",") if len(settings.modules) == 1 else settings.modules
    checkpoints = _choices("checkpoint", settings.checkpoint)
    checkpoints = [str(Checkpointing.parse(text)) for text in checkpoints]
    objective = settings.objective
    return default_methods(
        modules=[_module_choice(text.strip()) for text in given],
        objectives=None if objective is None else _choices("objective", objective, OBJECTIVES),
        decoders=_choices("decoder", settings.decoder, DECODERS),
        checkpoints=checkpoints,
        precisions=precisions,
        compile=settings.compile,
        budgets=[_memory_share(text) for text in _choices("memory_budget", settings.budget)],
        # Their rows have forecasts of their own; in what they were made for something else is told below the table.
        plans=[(title, replace(read_plan(path), made_for={})) for path, title in _titles(settings.plans).items()],
    )


def _titles(paths: Sequence[Path]) -> dict[Path, str]:
    """What rows of plans are called: by their files' names, with as many folders as tell them apart."""
    paths = list(dict.fromkeys(paths))
    deepest = max((len(path.absolute().parts) for path in paths), default=1)
    for count in range(1, deepest + 1):
        told = ["/".join(path.absolute().with_suffix("").parts[-count:]) for path in paths]
        if len(set(told)) == len(paths):
            break
    return {path: f"plan {name}" for path, name in zip(paths, told, strict=True)}


def _notes_of_plans(
    settings: Settings, precisions: Sequence[str], backbone: Backbone, device: torch.device
) -> list[str]:
    """A line for each plan that was made for something else than what is compared."""
    notes = []
    for path, title in _titles(settings.plans).items():
        plan = read_plan(path)
        planned = plan.made_for.get("execution.precision")
        here = {
            "training.batch_size": settings.batch_size,
            "training.optimizer": settings.optimizer,
            "execution.precision": planned if planned in precisions else precisions[0],
            "device": device.type,
            "input_size": list(backbone.input_size),
            "num_classes": backbone.num_classes,
            "num_parameters": num_parameters(backbone),
            "num_trained": num_trained(backbone),
            "dtype": str(backbone.dtype),
            "local.overlap": 0,
            "training.ema_decay": None,
            "training.global_every": None,
            "training.global_tail": 0.0,
        }
        different = plan.differences(here)
        if plan.is_for_ranks:
            different.append("several processes, here one")
        if different:
            notes.append(f"{title}: made for {'; '.join(different)}: its own forecast isn't one of this row.")
    return notes


def _choices(name: str, text: str, known: Iterable[str] = ()) -> list[str]:
    """Read a comma-separated list; each item is one of those known, where there are any."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    names = list(known)
    if not found:
        raise RecipeError(f"{arg(name)}: {text!r} names nothing; leave it out for its default.")
    for each in found:
        if names and each not in names:
            raise RecipeError(f"{arg(name)}: unknown {each!r}; take {', '.join(names)}.{did_you_mean(each, names)}")
    return list(dict.fromkeys(found))


def _module_choice(text: str) -> int | str | tuple[int, ...]:
    if text == "stages":
        return text
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"{arg('modules')}: {text!r} is neither a number, stages, nor boundaries; take 2,4 for two choices, or "
            f"{arg('modules', 4)} {arg('modules', '2,5,9')} for four modules and then for these boundaries."
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _memory_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise RecipeError(f"{arg('memory_budget')}: {text!r} is no share from 0 to 1; take 0.5.")
    return share


@dataclass(frozen=True)
class _Images:
    """What the data set is like, and a function that gives one batch of it for (C, H, W), in host memory."""

    name: str
    num_classes: int
    num_channels: int
    batch: Callable[[tuple[int, int, int]], tuple[Tensor, Tensor]]


def _images(settings: Settings) -> _Images:
    if settings.data is not None:
        return _images_of_data(settings, settings.data)
    num_classes = 1000 if settings.num_classes is None else settings.num_classes

    def draw(size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        return torch.randn(settings.batch_size, *size), torch.randint(num_classes, (settings.batch_size,))

    return _Images("random images", num_classes, 3, draw)


def _images_of_data(settings: Settings, name: str) -> _Images:
    side = settings.img_size
    asked = {key: getattr(settings, key) for key in rules.READING if getattr(settings, key) is not None}
    data: DataSettings = validated(DataSettings, {**asked, "name": name, "val_fraction": 0.0}, "data.")
    splits = load_data(data, download=settings.download, image_size=None if side is None else (side, side))
    info = splits.info

    def first(size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        batches = Batches(
            images=splits.train,
            batch_size=settings.batch_size,
            image_size=size[1:],
            info=info,
            device=HOST,
            augment=None,
            seed=0,
        )
        batch = next(batches.epoch(0))
        if len(batch.images) < settings.batch_size:
            raise RecipeError(
                f"{arg('batch_size', settings.batch_size)}: {name} has {len(splits.train)} training images; take fewer."
            )
        return batch.images, batch.targets

    return _Images(name, info.num_classes, info.num_channels, first)


# The table -------------------------------------------------------------------------------------------------------


def head_of(comparison: Comparison) -> str:
    """One line that says under which circumstances."""
    about = comparison.about
    channels, height, width = about["input_size"]
    return (
        f"{about['model']}, {channels} x {height} x {width}, batch {about['batch_size']} of {about['data']}, "
        f"{about['settings']['optimizer']}; {about['device']}; torch {about['versions']['torch']}; {about['date']}"
    )


def comparison_table(comparison: Comparison) -> Table:
    """The rows for a terminal; ``*`` marks what no other method beats in both time and memory."""
    rows = comparison.rows
    timed = any(row.step_seconds is not None for row in rows)
    reserved = any(row.reserved_peak_bytes is not None for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right")
    table.add_column("method", no_wrap=True)
    heads = ["estimated", "x"]
    if timed:
        heads += ["measured", "x", *(["reserved"] if reserved else []), "step time", "spread", "images/s", ""]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    precision = rows[0].precision if rows else ""
    for number, row in enumerate(rows, 1):
        if row.precision != precision:
            table.add_section()
            precision = row.precision
        cells = [_bytes(row.estimated_peak_bytes, row), _number(row.estimated_peak_ratio)]
        if timed:
            cells += [_bytes(row.measured_peak_bytes), _number(row.measured_peak_ratio)]
            cells += [_bytes(row.reserved_peak_bytes)] if reserved else []
            spread = "-" if row.time_ratio_range is None else "{:.2f} to {:.2f}".format(*row.time_ratio_range)
            rate = "-" if row.images_per_second is None else format_rate(row.images_per_second, "").split(" ")[0]
            cells += [_number(row.time_ratio, " x"), spread, rate.removesuffix("/s"), "*" if row.is_pareto else ""]
        table.add_row(str(number), row.name, *cells, style="bold" if row.is_pareto else None)
    return table


def notes_of(comparison: Comparison) -> list[str]:
    """What a reader of the table should know: how to read it, and which methods failed."""
    rows = comparison.rows
    notes = []
    if any(row.is_pareto for row in rows):
        notes.append("* no other method of its precision is as fast and as small; ratios are to end-to-end.")
    if any(row.compile for row in rows):
        notes.append("compiled methods have no estimate: the compiler decides what is kept.")
    notes += comparison.about.get("notes", [])
    if comparison.about.get("is_interrupted"):
        notes.append("interrupted: what had been measured by then.")
    notes += [f"{number} {row.name}: {row.error}" for number, row in enumerate(rows, 1) if row.error is not None]
    return notes


def _bytes(nbytes: int | None, row: Row | None = None) -> str:
    if nbytes is None:
        return "unknown" if row is not None and row.compile else "-"
    return format_bytes(nbytes)


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"
