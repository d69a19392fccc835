"""The command line: ``localgrad train | plan | compare | evaluate | predict``.

It turns options into a recipe and calls ``localgrad.run``; torch is imported only inside a verb. Every mistake that
a user can make ends in one line on standard error and exit status 2. An interrupted run is saved and exits with 128
plus the signal's number, as shells do.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from localgrad.errors import LocalgradError, RunWarning
from localgrad.units import PLAINLY

app = typer.Typer(
    name="localgrad",
    help="Train vision transformers as gradient-isolated local modules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(verbs: typer.Typer = app) -> None:
    """Run the command line; the console script's entry.

    Args:
        verbs: another command line to run in the same way.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever its encoding: what it lacks is written plainly
            stream.reconfigure(errors=PLAINLY)
    _say_warnings_in_lines()
    if os.environ.get("RANK", "0") != "0":  # one of several processes: the first one speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115, PTH123  # for the rest of the process
    try:
        verbs()
    except SystemExit as stop:
        _leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except LocalgradError as error:
        _refuse(str(error))
    except OSError as error:  # what no check foresaw: a name too long, no permission, a full disk
        _refuse(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except UnicodeEncodeError as error:
        _refuse(f"{error.object!a}: the system's encoding, {error.encoding}, lacks this; set PYTHONUTF8=1.")
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc(file=sys.__stderr__)  # a fault of our own, on whichever rank it is
        _leave(1)


def _say_warnings_in_lines() -> None:
    """Say what isn't as it should be in a run folder as one line, once."""
    show, said = warnings.showwarning, set()

    def say(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, RunWarning):
            show(message, category, *where, **more)
        elif str(message) not in said:
            said.add(str(message))
            print(f"localgrad: {message}", file=sys.stderr)  # noqa: T201

    warnings.filterwarnings("always", category=RunWarning)
    warnings.showwarning = say


def _refuse(message: str) -> None:
    print(f"localgrad: {message}", file=sys.stderr)  # noqa: T201
    _leave(2)


def _leave(status: int) -> None:
    """Exit, in one of several processes without waiting for what others may never send."""
    if "RANK" not in os.environ:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if status and os.environ["RANK"] != "0":  # torchrun ends all as soon as one has failed: let rank 0 speak first
        time.sleep(1)
    os._exit(status)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import localgrad

        typer.echo(localgrad.__version__)
        raise typer.Exit


METHOD, DATA, EXECUTION = "Method", "Data", "Execution (doesn't change results)"

# Options that several verbs take alike: each is declared, with its help, here only.
ModelOption = Annotated[str | None, typer.Option(help="timm's name of the model.", rich_help_panel=METHOD)]
ImgSizeOption = Annotated[int | None, typer.Option(help="Side of the images in pixels.", rich_help_panel=METHOD)]
PatchSizeOption = Annotated[int | None, typer.Option(help="Side of a patch in pixels.", rich_help_panel=METHOD)]
ObjectiveOption = Annotated[
    str | None, typer.Option(help="feature, image, greedy, contrastive, or a plugin's.", rich_help_panel=METHOD)
]
DecoderOption = Annotated[
    str | None,
    typer.Option(help="Auxiliary decoder: linear, conv, transformer, bilinear, or a plugin's.", rich_help_panel=METHOD),
]
ClassifierOption = Annotated[
    str | None,
    typer.Option(help="Auxiliary classifier: linear, mlp, transformer, next, or a plugin's.", rich_help_panel=METHOD),
]
OverlapOption = Annotated[
    int | None,
    typer.Option(help="Last blocks of the module before that each module trains as well.", rich_help_panel=METHOD),
]
GlobalEveryOption = Annotated[
    int | None, typer.Option(help="Every step of that number is end-to-end, recomputing.", rich_help_panel=METHOD)
]
GlobalTailOption = Annotated[
    float | None, typer.Option(help="Share of the steps, at the end, that are end-to-end.", rich_help_panel=METHOD)
]
EmaOption = Annotated[float | None, typer.Option(help="Keep an average of the weights.", rich_help_panel=METHOD)]
OptimizerOption = Annotated[str | None, typer.Option(help="timm's name of the optimizer.", rich_help_panel=METHOD)]
PrecisionOption = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=EXECUTION)]
CompileOption = Annotated[
    bool | None, typer.Option("--compile", help="Compile each local module.", rich_help_panel=EXECUTION)
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(help="A module that registers what you name; may be repeated.", rich_help_panel=EXECUTION),
]
PresetOption = Annotated[
    str | None, typer.Option(help="Start from a preset: digits, paper, infopro, greedy, infopro-source, trgl-source.")
]
RecipeOption = Annotated[Path | None, typer.Option(help="Start from a recipe in TOML.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any value of the recipe: --set training.min_lr=1e-5.")
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Measure costs for a plan anew, and keep none of them.")
]
RunFolderArgument = Annotated[Path, typer.Argument(help="A folder that `localgrad train` made.")]
RunDeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")]


@app.command()
def train(  # noqa: PLR0917  # one parameter an option
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, cifar10, cifar100, stl10, svhn, a folder, or a Hugging Face data set.",
            rich_help_panel=DATA,
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Where torchvision's data sets lie.", rich_help_panel=DATA)] = None,
    download: Annotated[
        bool,
        typer.Option("--download", help="Fetch a torchvision data set that is missing.", rich_help_panel=DATA),
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use only this many training images.", rich_help_panel=DATA)] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the training images that selects the best epoch.", rich_help_panel=DATA),
    ] = None,
    on_corrupt: Annotated[
        str | None, typer.Option(help="A corrupt image: error, or skip.", rich_help_panel=DATA)
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(help="Class folders or a table to train on, whatever --data holds.", rich_help_panel=DATA),
    ] = None,
    val_data: Annotated[
        str | None, typer.Option(help="Likewise, of the images that select the best epoch.", rich_help_panel=DATA)
    ] = None,
    test_data: Annotated[str | None, typer.Option(help="Likewise, of the test images.", rich_help_panel=DATA)] = None,
    image_range: Annotated[
        str | None,
        typer.Option(help="BLACK,WHITE of images of more than 8 bits: 0,4095.", rich_help_panel=DATA),
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Colour behind transparent images; white by default.", rich_help_panel=DATA)
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="To normalise by, of values in 0..1: 0.5 or 0.5,0.5,0.5.", rich_help_panel=DATA)
    ] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.", rich_help_panel=DATA)] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Images of another shape: crop (cut), pad (bars) or squash.", rich_help_panel=DATA),
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(help="Of files of images: imagenet, none, or module:function.", rich_help_panel=DATA),
    ] = None,
    model: ModelOption = None,
    img_size: ImgSizeOption = None,
    patch_size: PatchSizeOption = None,
    drop_path: Annotated[
        float | None, typer.Option(help="Stochastic depth rate; by default the model's own.", rich_help_panel=METHOD)
    ] = None,
    pretrained: Annotated[
        bool | None, typer.Option("--pretrained", help="Start from timm's weights.", rich_help_panel=METHOD)
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(
            help="Local modules: a number, stages, or boundaries such as 2,5,9. 1 is end-to-end.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    objective: ObjectiveOption = None,
    decoder: DecoderOption = None,
    classifier: ClassifierOption = None,
    overlap: OverlapOption = None,
    global_every: GlobalEveryOption = None,
    global_tail: GlobalTailOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.", rich_help_panel=METHOD)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images an update.", rich_help_panel=METHOD)] = None,
    optimizer: OptimizerOption = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=METHOD)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.", rich_help_panel=METHOD)] = None,
    scheduler: Annotated[str | None, typer.Option(help="cosine, step, poly, none …", rich_help_panel=METHOD)] = None,
    warmup_epochs: Annotated[float | None, typer.Option(help="Linear warm-up.", rich_help_panel=METHOD)] = None,
    clip_grad: Annotated[
        float | None, typer.Option(help="Largest norm of each module's gradient.", rich_help_panel=METHOD)
    ] = None,
    ema_decay: EmaOption = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Train the modules together, or sequential: one after another, on cached features.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    cached_epochs: Annotated[
        int | None,
        typer.Option(help="Augmented epochs of features that sequential caches on disk.", rich_help_panel=METHOD),
    ] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Label smoothing.", rich_help_panel=METHOD)] = None,
    mixup: Annotated[float | None, typer.Option(help="Alpha of mixup.", rich_help_panel=METHOD)] = None,
    cutmix: Annotated[float | None, typer.Option(help="Alpha of cutmix.", rich_help_panel=METHOD)] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and draws.", rich_help_panel=METHOD)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=EXECUTION)] = None,
    precision: PrecisionOption = None,
    accumulation: Annotated[
        int | None,
        typer.Option(help="Parts that each batch is cut into, to save memory.", rich_help_panel=EXECUTION),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Recompute inside modules: blocks, halves, halves/8 (in 8 chunks), none; a list: one each.",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    compile_: CompileOption = None,
    offload: Annotated[
        bool | None,
        typer.Option("--offload", help="Keep modules that don't train in host memory.", rich_help_panel=EXECUTION),
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Processes that decode large data sets.", rich_help_panel=EXECUTION)
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="Processor threads.", rich_help_panel=EXECUTION)] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="modules: share the local modules out among processes.", rich_help_panel=EXECUTION),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(help="With --parallel: start so many here; or use torchrun.", rich_help_panel=EXECUTION),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="With --parallel: how often the whole model is there.", rich_help_panel=EXECUTION),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard",
            help="With --replicas: each keeps a part of weights and optimizer state.",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    health: Annotated[
        int | None,
        typer.Option(help="Every so many epochs, measure where accuracy is lost.", rich_help_panel=EXECUTION),
    ] = None,
    health_reference: Annotated[
        str | None,
        typer.Option(help="With --health: an end-to-end run, to compare features with.", rich_help_panel=EXECUTION),
    ] = None,
    sink: Annotated[
        list[str] | None,
        typer.Option(
            help="Where figures go: tensorboard, or what a plugin registers; may be repeated.",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    plugin: PluginOption = None,
    preset: PresetOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    plan_: Annotated[
        Path | None, typer.Option("--plan", help="Train as a plan from `localgrad plan --json` says.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory, such as 6GiB: plan modules and recomputation to fit.")
    ] = None,
    no_cache: NoCacheOption = False,
    on_oom: Annotated[str, typer.Option(help="When memory runs out: stop, or replan and go on.")] = "stop",
    out: Annotated[Path | None, typer.Option(help="The run folder; by default a new one under runs/.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and stop.")] = False,
) -> None:
    """Train a model. With no options: handwritten digits, four local modules, under two minutes on two cores."""
    from localgrad.app.recipe import Recipe, overlay, parse_assignments
    from localgrad.errors import RecipeError

    options: dict[str, Any] = {
        "data.name": train_data if data is None and resume is None else data,
        "data.root": root,
        "data.limit": limit,
        "data.val_fraction": val_fraction,
        "data.on_corrupt": on_corrupt,
        "data.train_data": train_data,
        "data.val_data": val_data,
        "data.test_data": test_data,
        "data.image_range": parse_numbers("--image-range", image_range),
        "data.background": background,
        "data.mean": parse_numbers("--mean", mean),
        "data.std": parse_numbers("--std", std),
        "data.fit": fit,
        "data.transform": transform,
        "model.name": model,
        "model.img_size": img_size,
        "model.patch_size": patch_size,
        "model.drop_path": drop_path,
        "model.pretrained": pretrained,
        "local.modules": None if modules is None else parse_modules(modules),
        "local.objective": objective,
        "local.options.decoder": decoder,
        "local.options.classifier": classifier,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "local.overlap": overlap,
        "training.global_every": global_every,
        "training.global_tail": global_tail,
        "training.optimizer": optimizer,
        "training.lr": lr,
        "training.weight_decay": weight_decay,
        "training.scheduler": scheduler,
        "training.warmup_epochs": warmup_epochs,
        "training.clip_grad": clip_grad,
        "training.ema_decay": ema_decay,
        "training.schedule": schedule,
        "training.cached_epochs": cached_epochs,
        "augment.label_smoothing": label_smoothing,
        "augment.mixup": mixup,
        "augment.cutmix": cutmix,
        "seed": seed,
        "execution.device": device,
        "execution.precision": precision,
        "execution.accumulation": accumulation,
        "execution.checkpoint": checkpoint.split(",") if checkpoint and "," in checkpoint else checkpoint,
        "execution.compile": compile_,
        "execution.offload": offload,
        "execution.num_workers": num_workers,
        "execution.num_threads": num_threads,
        "execution.parallel": parallel,
        "execution.replicas": replicas,
        "execution.shard": shard,
        "execution.health_every": health,
        "execution.health_reference": health_reference,
        "execution.sinks": sink or None,
        "execution.plugins": plugin or None,
    }
    changes: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    changes |= parse_assignments(set_ or [])
    if isinstance(changes.get("local.modules"), str):  # --set local.modules=2,5,9
        changes["local.modules"] = parse_modules(changes["local.modules"])
    num_bytes = _budget(budget, plan_, changes, verb="train")
    if on_oom not in ("stop", "replan"):
        raise RecipeError(f"--on-oom: unknown {on_oom!r}; take stop or replan.")
    plan = None
    if resume is not None:
        given: dict[str, object] = {"--out": out, "--preset": preset, "--recipe": recipe}
        given |= {"--plan": plan_, "--budget": budget}
        wanted = _resumed(resume, changes, forbidden=given)
    elif plan_ is not None:
        plan, wanted = _planned(plan_, preset, recipe, changes)
    else:
        wanted = Recipe.from_dict(overlay(_base(preset, recipe, changes), changes))
    if dry_run:
        typer.echo(wanted.to_toml(), nl=False)
        return
    if num_processes is not None:
        _start_processes(num_processes, wanted, resume or out)
    from localgrad import run

    with _saying_how_to_resume():
        if resume is not None:
            run.resume(resume, wanted, sinks=[_console_sink()], on_oom=on_oom)
        else:
            run.train(
                wanted,
                out=out,
                download=download,
                sinks=[_console_sink()],
                plan=plan,
                budget=num_bytes,
                on_oom=on_oom,
                cache=not no_cache,
            )


def _start_processes(count: int, recipe: Any, folder: Path | None) -> None:
    """Start this command again in several processes, unless this is one of them; doesn't come back then."""
    from localgrad.errors import RecipeError

    if recipe.execution.parallel != "modules":
        raise RecipeError(f"--num-processes {count}: say what they share; add --parallel modules.")
    if count < 1:
        raise RecipeError(f"--num-processes: {count} is no number of processes; take 1 or more.")
    from localgrad.parallel.launching import run_processes
    from localgrad.parallel.team import in_team

    if in_team():
        return
    arguments = sys.argv[1:]
    if folder is None:  # a new one, that this process knows as well
        from localgrad.training.folder import new_folder

        folder = new_folder(recipe.method.data.name, recipe.method.local.objective)
        arguments = [*arguments, "--out", str(folder)]
    raise SystemExit(run_processes(count, arguments, folder))


@app.command()
def plan(  # noqa: PLR0917  # one parameter an option
    model: ModelOption = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Images an update, or auto: the largest that fits.", rich_help_panel=METHOD)
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Memory, such as 6GiB; no limit by default.")] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="By default the data's, or timm's own.", rich_help_panel=METHOD)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Plan for the classes of a data set.", rich_help_panel=DATA)] = None,
    img_size: ImgSizeOption = None,
    patch_size: PatchSizeOption = None,
    modules: Annotated[
        str | None,
        typer.Option(help="Only so many modules, stages, or boundaries; any by default.", rich_help_panel=METHOD),
    ] = None,
    objective: ObjectiveOption = None,
    decoder: DecoderOption = None,
    classifier: ClassifierOption = None,
    overlap: OverlapOption = None,
    global_every: GlobalEveryOption = None,
    global_tail: GlobalTailOption = None,
    optimizer: OptimizerOption = None,
    precision: PrecisionOption = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; there need be no GPU to plan for one.", rich_help_panel=EXECUTION)
    ] = "auto",
    compile_: CompileOption = None,
    plugin: PluginOption = None,
    preset: PresetOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    parallel: Annotated[
        int | None, typer.Option(help="So many ranks, a local module each; --budget is then of every rank.")
    ] = None,
    balance: Annotated[
        str | None, typer.Option(help="With --parallel: time (default), or memory: the smallest largest rank.")
    ] = None,
    frontier: Annotated[bool, typer.Option("--frontier", help="Print all plans worth having.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the plan, for train --plan.")] = None,
    no_cache: NoCacheOption = False,
) -> None:
    """Find the fastest way to train a model within a memory budget; no GPU, no data and no weights are needed."""
    from localgrad.app.recipe import parse_assignments

    options = {
        "model.name": model,
        "model.img_size": img_size,
        "model.patch_size": patch_size,
        "data.name": data,
        "local.objective": objective,
        "local.options.decoder": decoder,
        "local.options.classifier": classifier,
        "training.batch_size": None if batch_size in (None, "auto") else _whole("--batch-size", batch_size),
        "local.overlap": overlap,
        "training.global_every": global_every,
        "training.global_tail": global_tail,
        "training.optimizer": optimizer,
        "execution.precision": precision,
        "execution.compile": compile_,
        "execution.plugins": plugin or None,
    }
    changes: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    changes |= parse_assignments(set_ or [])
    if modules is not None:
        changes["local.modules"] = parse_modules(modules)
    elif isinstance(changes.get("local.modules"), str):  # --set local.modules=2,5,9
        changes["local.modules"] = parse_modules(changes["local.modules"])
    changes.setdefault("local.modules", "auto")
    num_bytes = _budget(budget, None, changes, verb="plan")
    _print_plan(
        _base(preset, recipe, {"data.name": "", **changes}),
        changes,
        budget=num_bytes,
        device=device,
        num_classes=num_classes,
        largest_batch=batch_size == "auto",
        frontier=frontier,
        ranks=(parallel, balance),
        json=json_,
        cache=not no_cache,
    )


def _print_plan(
    base: dict[str, Any],
    changes: dict[str, Any],
    *,
    budget: int | None,
    device: str,
    num_classes: int | None,
    largest_batch: bool,
    frontier: bool,
    ranks: tuple[int | None, str | None],
    json: Path | None,
    cache: bool,
) -> None:
    """Plan a recipe, print what was found, and write it."""
    from dataclasses import replace

    from rich.console import Console
    from rich.markup import escape

    from localgrad.app import planned as recipes
    from localgrad.app.recipe import Recipe, overlay
    from localgrad.compare.plots import check_output_file
    from localgrad.errors import RecipeError
    from localgrad.planning import budget as budgets
    from localgrad.planning import rank_plans as parallel
    from localgrad.planning import table

    recipe = Recipe.from_dict(overlay(base, changes))
    in_parallel = parallel.asked_for(
        *ranks, num_buffers=recipe.execution.buffers, frontier=frontier, largest_batch=largest_batch
    )
    if largest_batch and budget is None:
        raise RecipeError("--batch-size auto: the largest batch that fits what? Add --budget, such as --budget 8GiB.")
    if json is not None:
        check_output_file("--json", json)
    if num_classes is not None and num_classes < 2:
        raise RecipeError(f"--num-classes: a classifier needs at least 2 classes, got {num_classes}.")
    named = recipe.method.data.name if "name" in overlay(base, changes).get("data", {}) else ""
    classes, channels = recipes.CLASSES.get(named, (None, 3))
    kind = recipes.kind_of(recipe.execution.device if device == "auto" else device)
    num_classes = num_classes or classes
    task = recipes.task_of(recipe, device=kind, num_classes=num_classes, num_channels=channels, cache=cache)
    console = Console()
    if largest_batch:
        assert budget is not None, "checked above"
        rows = budgets.largest_batches(task, budget)
        table.print_batches(rows, console)
        size = rows[-1].batch_size
        if not size:
            raise RecipeError("--batch-size auto: not even two images fit this budget; take a larger one.")
        training = replace(recipe.method.training, batch_size=size)
        recipe = replace(recipe, method=replace(recipe.method, training=training))
    if frontier:
        table.print_frontier(budgets.worth_having(task, recipe.method.training.batch_size), console)
    found = recipes.plan_recipe(recipe, task, budget, in_parallel)
    table.print_plan(found, console)
    if json is not None:
        json.write_text(found.to_json(), encoding="utf-8")
        path = escape(shlex.quote(str(json)))
        how = f" --parallel modules --num-processes {found.num_modules}" if found.is_for_ranks else ""
        console.print(f"[dim]written: {path}; train with: localgrad train --plan {path}{how} --data …[/]")


@app.command()
def evaluate(
    run_folder: RunFolderArgument,
    part: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    device: RunDeviceOption = None,
    data: Annotated[str | None, typer.Option(help="Where the run's data lies now, if it was moved.")] = None,
    root: Annotated[str | None, typer.Option(help="The same of torchvision's data sets.")] = None,
) -> None:
    """Accuracy of a run's best weights, of the whole model and of each module's own classifier."""
    from localgrad import run
    from localgrad.errors import RecipeError
    from localgrad.training.events import accuracies

    if part not in ("test", "val", "train"):
        raise RecipeError(f"--part: unknown {part!r}; take test, val or train.")
    result = run.evaluate_run(run_folder, part=part, device=device, data=data, root=root)
    left_out = "".join(f"; left out: {count:,} {reason}" for reason, count in result["skipped"].items())
    typer.echo(f"{part} accuracy  {result['accuracy']:.2%}  ({result['num_images']:,} images{left_out})")
    typer.echo(f"by module  {accuracies(result['module_accuracy'])}")


@app.command()
def predict(
    run_folder: RunFolderArgument,
    images: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 3,
    device: RunDeviceOption = None,
) -> None:
    """Classify images with a run's best weights."""
    from localgrad import run
    from localgrad.training.image_sets import Skipped

    skipped = Skipped()
    for prediction in run.predict(run_folder, images, top=top, device=device, skipped=skipped):
        classes = "  ".join(f"{name} {share:.1%}" for name, share in prediction.classes)
        typer.echo(f"{prediction.path}  {classes}")
    for name, reason in skipped.images.items():
        typer.echo(f"left out: {name} ({reason})", err=True)
    if skipped.others:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.others.items()))
        typer.echo(f"left out, which are no images: {counts}", err=True)


@app.command()
def compare(  # noqa: PLR0917  # one parameter an option
    model: Annotated[str, typer.Option(help="timm's name of the model.")] = "swin_tiny_patch4_window7_224",
    img_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the random labels; by default 1000.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    data: Annotated[str | None, typer.Option(help="A data set, as for train; by default random images.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where torchvision's data sets lie.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="timm's name of the optimizer.")] = "adamw",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or both: fp32,bf16.")] = "fp32",
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Choices: 2,4,stages. Given repeatedly, each as for train: --modules 4 --modules 2,5,9."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="feature,image,greedy,contrastive; by default feature, and image and greedy once each."),
    ] = None,
    decoder: Annotated[str, typer.Option(help="linear,conv,transformer.")] = "linear",
    checkpoint: Annotated[
        str, typer.Option(help="Recompute inside local modules: none,blocks,halves,halves/8.")
    ] = "none,halves/8",
    compile_: Annotated[bool, typer.Option("--compile", help="Compiled methods as well (none in chunks).")] = False,
    memory_budget: Annotated[
        str, typer.Option(help="With --compile: shares of activations that torch may keep, such as 0.5,0.3.")
    ] = "0.5",
    plan: Annotated[list[Path] | None, typer.Option(help="A plan's JSON file; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed turns of each method.")] = 3,
    warmup: Annotated[int, typer.Option(help="Steps of each method before it is measured.")] = 1,
    estimate_only: Annotated[bool, typer.Option("--estimate-only", help="Estimate peaks, run nothing.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw peak against step time: .png or .svg.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw memory over one step: .png or .svg.")] = None,
) -> None:
    """Peak memory and step time of end-to-end training, its rivals and local modules, side by side."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would talk; read when torch is imported
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from localgrad.compare import options as bench

    settings = bench.Settings(
        model=model,
        img_size=img_size,
        num_classes=num_classes,
        batch_size=batch_size,
        data=data,
        root=root,
        device=device,
        optimizer=optimizer,
        precision=precision,
        modules=tuple(modules or ("2,4",)),
        objective=objective,
        decoder=decoder,
        checkpoint=checkpoint,
        compile=compile_,
        budget=memory_budget,
        plans=tuple(plan or ()),
        repeats=repeats,
        warmup=warmup,
        estimate_only=estimate_only,
        json=json_,
        plot=plot,
        timeline=timeline,
    )
    columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("building the model", total=None)
        turn = itertools.count()
        comparison = bench.run(
            settings,
            lambda text, turns: progress.update(task, description=text, completed=next(turn), total=turns),
        )
    console = Console()
    table = bench.comparison_table(comparison)
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if console.width < needed:  # a terminal wraps lines, but figures that are cut are lost
        console = Console(width=needed)
    console.print(bench.head_of(comparison), highlight=False, soft_wrap=True)
    console.print()
    console.print(table)
    console.print()
    for note in bench.notes_of(comparison):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def parse_modules(text: str) -> int | str | list[int]:
    """Read ``4``, ``stages``, or boundaries such as ``2,5,9``."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        return text  # a word; which ones there are is checked where blocks are known
    return numbers[0] if len(numbers) == 1 else numbers


def parse_numbers(option: str, text: str | None) -> list[float] | None:
    """Read numbers such as ``0.5,0.5,0.5``."""
    from localgrad.errors import RecipeError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        example = "0,4095" if option == "--image-range" else "0.5,0.5,0.5"
        raise RecipeError(f"{option}: {text!r} isn't a list of numbers; take {option} {example}.") from None


def _whole(option: str, text: str | None) -> int:
    """Read a whole number."""
    from localgrad.errors import RecipeError

    try:
        return int(text or "")
    except ValueError:
        raise RecipeError(f"{option}: {text!r} is neither a whole number nor auto; take --batch-size 64.") from None


def _budget(text: str | None, plan: Path | None, changes: dict[str, Any], *, verb: str) -> int | None:
    """Read a budget, and see that nothing else decides what it is there to decide."""
    from localgrad.errors import RecipeError
    from localgrad.units import parse_bytes

    if text is None and verb == "train":
        return None
    if plan is not None:
        raise RecipeError("--budget and --plan both decide how to train; give one of them.")
    for key in ("execution.checkpoint", "execution.accumulation"):
        if key in changes:
            option = f"--{key.removeprefix('execution.')}"
            who = "with --budget" if verb == "train" else "to localgrad plan"
            raise RecipeError(f"{option} can't be given {who}, which decides it; leave it out.")
    if text is None:
        return None
    if verb == "train":
        changes.setdefault("local.modules", "auto")
    try:
        return parse_bytes(text)
    except RecipeError as error:
        raise RecipeError(f"--budget: {error}") from None


def _planned(path: Path, preset: str | None, recipe: Path | None, changes: dict[str, Any]) -> tuple[Any, Any]:
    """A plan from its file, and the recipe to train by it; refused where options contradict the plan."""
    from localgrad.app.planned import changes_of, check_plan_is_for
    from localgrad.app.recipe import Recipe, overlay
    from localgrad.errors import BudgetError, PartitionError
    from localgrad.partition import Plan

    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except PartitionError as error:
        raise BudgetError(f"--plan {path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BudgetError(f"--plan: {path} can't be read ({reason}); make one with localgrad plan --json.") from error
    values = {**changes_of(plan), **changes}
    wanted = Recipe.from_dict(overlay(_base(preset, recipe, values), values))
    check_plan_is_for(plan, wanted)
    return plan, wanted


def _base(preset_name: str | None, recipe: Path | None, changes: dict[str, Any]) -> dict[str, Any]:
    """What the options are laid over: a recipe file, a preset, or (where no other data is named) the digits."""
    from localgrad.app.recipe import preset, read_toml
    from localgrad.errors import RecipeError

    if recipe is not None and preset_name is not None:
        raise RecipeError("--preset and --recipe both say where to start; give one of them.")
    if recipe is not None:
        return read_toml(recipe)
    if preset_name is None and changes.get("data.name", "digits") != "digits":
        return {}
    base = preset(preset_name or "digits")
    if preset_name is None and "model.name" in changes:
        base.pop("model", None)  # the preset's micro Swin has options that another model doesn't take
    return base


def _resumed(path: Path, changes: dict[str, Any], forbidden: dict[str, object]) -> Any:
    """The recipe of the run to be resumed, with the options laid over it."""
    from localgrad import run
    from localgrad.app.recipe import Recipe, overlay
    from localgrad.errors import RecipeError

    given = [name for name, value in forbidden.items() if value is not None]
    if given:
        raise RecipeError(f"{given[0]} can't be given with --resume: the run in {path} has its recipe and folder.")
    return Recipe.from_dict(overlay(run.read_recipe(path).to_dict(), changes))


def _console_sink() -> Any:
    from rich.console import Console

    from localgrad.training.events import ConsoleSink

    class PatientConsole(Console):
        """Falls silent where nobody reads on (``localgrad train | head``); the run goes on."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return ConsoleSink(PatientConsole())


@contextlib.contextmanager
def _saying_how_to_resume() -> Iterator[None]:
    from localgrad.training.trainer import Interrupted

    try:
        yield
    except Interrupted as stop:
        command = f"localgrad train --resume {shlex.quote(str(stop.folder))}"
        print(f"localgrad: {stop}; go on with: {command}", file=sys.stderr)  # noqa: T201
        sys.exit(128 + stop.signal_number)
