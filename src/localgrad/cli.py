"""The command line: ``localgrad train | finetune | plan | compare | evaluate | predict | export``.

It turns options into a recipe and calls ``localgrad.run``; torch is imported only inside a verb. Every mistake that
a user can make ends in one line on standard error and exit status 2; 1 is that of ``predict`` where some images could
not be read. An interrupted run is saved and exits with 128 plus the signal's number, as shells do.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, final

import typer
from typer.core import TyperGroup
from typer.models import OptionInfo

from localgrad import rules
from localgrad.app.comparison import Settings
from localgrad.app.recipe import DOWNLOAD, OPTIONS, Recipe, overlay, parse_assignments, preset, read_toml
from localgrad.errors import LocalgradError, RecipeError, RunWarning, arg, naming
from localgrad.memory.allocator_rules import EXPANDABLE, VARIABLES
from localgrad.options import (
    DATA,
    EXECUTION,
    METHOD,
    RUN,
    Option,
    Values,
    declared,
    read_modules,
    read_on_oom,
    read_share,
    read_whole,
    values_of,
)
from localgrad.units import PLAINLY, format_counts, parse_bytes

Verb = TypeVar("Verb", bound=Callable[..., None])


@final
class _Verbs(TyperGroup):
    """Lists the verbs in plain lines: rich, which lays out the help of each, takes longer to load than all the rest."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help as click does."""
        super(TyperGroup, self).format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs with all that their help says."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].help) for name in self.list_commands(ctx)])


app = typer.Typer(
    name="localgrad",
    cls=_Verbs,
    help="Train vision transformers as gradient-isolated local modules.",
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
    _let_waiting_threads_sleep()
    _let_segments_expand()
    if os.environ.get("RANK", "0") != "0":  # one of several processes: the first one speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115, PTH123  # for the rest of the process
    try:
        with naming(option_of):
            _refuse_empty(sys.argv[1:])
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


def _let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads, beside a busy process, not spin in the time that the last one needs to finish.

    It is read when torch is imported. What the user has set stays.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _let_segments_expand() -> None:
    """Have PyTorch's allocator keep one segment that grows, in which less is lost between blocks.

    It is read at the first use of CUDA. What the user has set stays; other systems than Linux don't have it.
    """
    if sys.platform == "linux" and not any(os.environ.get(name) for name in VARIABLES):
        os.environ[VARIABLES[-1]] = EXPANDABLE


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


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuse an empty text, as of a variable that isn't set: it would be taken for the current folder, or for none."""
    for before, word in zip(["", *words], words, strict=False):
        name, sign, value = word.partition("=")
        if not word or (sign and not value and name.startswith("--")):
            named = name or (before if before.startswith("--") else "argument")
            raise RecipeError(f"{named}: got an empty text, as of a variable that isn't set; give a value.")


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
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import localgrad

        typer.echo(localgrad.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


Everyday = Collection[str]
"""Names of the options that ``--help`` lists; the others are under ``--help-all``."""


def _show_all(context: typer.Context, value: bool) -> None:  # noqa: FBT001  # as typer calls it
    """Show the help of every option."""
    if value:
        for each in context.command.params:
            each.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


def takes(options: Mapping[str, Option], everyday: Everyday, *, with_defaults: bool = False) -> Callable[[Verb], Verb]:
    """Give a verb options that are declared elsewhere, beside those of its own; it gets them by name, or ``None``.

    Args:
        options: by dotted key.
        everyday: those of both kinds that ``--help`` lists.
        with_defaults: whether they have their fields' defaults, and are not left to a recipe.
    """

    def decorate(verb: Verb) -> Verb:
        signature = inspect.signature(verb, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        made = [_parameter(each, with_default=with_defaults) for each in options.values() if each.panel]
        parameters = [each.replace(kind=_KEYWORD) for each in (*made, *own)]
        for each in parameters:
            info = each.annotation.__metadata__[0]
            if isinstance(info, OptionInfo):
                info.hidden = each.name not in everyday
        if len(everyday) < len(parameters):
            every = typer.Option("--help-all", is_eager=True, callback=_show_all, help=_EVERY)
            annotation = Annotated[bool, every]
            parameters.append(inspect.Parameter("help_all", _KEYWORD, default=False, annotation=annotation))
        verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return verb

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_EVERY = "Show every option, and exit."


def _parameter(option: Option, *, with_default: bool) -> inspect.Parameter:
    """What typer makes an option of."""
    info = typer.Option(_flag(option.name), help=option.help, rich_help_panel=option.panel)
    kind: Any = list[option.repeated] if option.repeated else option.kind  # type: ignore[name-defined]
    default = option.default if with_default else None
    return inspect.Parameter(option.name, _KEYWORD, default=default, annotation=Annotated[kind | None, info])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option_of(name: str, value: object) -> str:
    """An argument as it is typed here: ``--budget``, ``--budget 6GiB``, ``--set training.min_lr=1e-05``."""
    field = name.rpartition(".")[2]
    if field == "global_share":  # what these come to
        return f"{option_of('global_every', None)}, {option_of('global_tail', None)}"
    own = OPTIONS.get(name) or _BY_NAME.get(field)
    key = own.key if own is not None else name
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if "." in key and (own is None or not own.panel):
        return f"--set {key}" if value is None else f"--set {shlex.quote(f'{key}={text}')}"
    flag = _flag(field if own is None else own.name)
    return flag if value is None or value is True else f"{flag} {shlex.quote(text)}"


_BY_NAME = {key.rpartition(".")[2]: each for key, each in OPTIONS.items() if not key.endswith((".name", ".options"))}

RunFolderArgument = Annotated[Path, typer.Argument(help="A folder that `localgrad train` made.")]

_OWN = {
    each.name: each
    for each in (
        Option(
            name="preset",
            help="Start from a preset: digits, finetune, paper, infopro, greedy, infopro-source, trgl-source.",
            panel=RUN,
        ),
        Option(name="recipe", help="Start from a recipe in TOML.", panel=RUN, kind=Path),
        Option(name="set", help="Any value of the recipe: --set training.min_lr=1e-5.", panel=RUN, repeated=str),
        Option(name="plan", help="Train as a plan from `localgrad plan --json` says.", panel=RUN, kind=Path),
        Option(name="budget", help="Memory, such as 6GiB: plan modules and recomputation to fit.", panel=RUN),
        Option(
            name="gradients",
            help="With a budget: plans with exact gradients, local ones, or any (default).",
            panel=RUN,
        ),
        Option(name="no_cache", help="Measure costs for a plan anew, and keep none of them.", panel=RUN, kind=bool),
        Option(name="card", help="Plan for this card, such as T4 or RTX 4090; auto is the one here.", panel=EXECUTION),
        Option(
            name="no_confirm",
            help="On CUDA: don't replay the run's allocations; quicker, with a larger margin.",
            panel=RUN,
            kind=bool,
        ),
        Option(name="on_oom", help="When memory runs out: stop (default), or replan and go on.", panel=RUN),
        Option(name="out", help="The run folder; by default a new one under runs/.", panel=RUN, kind=Path),
        Option(name="resume", help="Continue the run in this folder; more --epochs extend it.", panel=RUN, kind=Path),
        Option(name="dry_run", help="Check and print the recipe, and stop.", panel=RUN, kind=bool),
        Option(
            name="num_processes",
            help="With --parallel: start so many here; or use torchrun.",
            panel=EXECUTION,
            kind=int,
        ),
    )
}
"""What ``train`` takes beside a recipe's values, by name."""

_METHOD = "full, freeze, probe, lora, qlora, local, or some joined by +, as lora+local."
_IN_TRAIN = {**OPTIONS, DOWNLOAD.key: DOWNLOAD, **_OWN}
_EVERYDAY = ("data", "model", "weights", "modules", "objective", "epochs", "batch_size", "lr", "budget", "resume")


@app.command(epilog="All options: localgrad train --help-all")
@takes(_IN_TRAIN, _EVERYDAY)
def train(**given: Any) -> None:
    """Train a model. With no options: handwritten digits, four local modules, two to three minutes on two cores."""
    resume, plan_file, budget = given["resume"], given["plan"], given["budget"]
    on_oom = read_on_oom("on_oom", given["on_oom"] or "stop")
    if given["data"] is None and resume is None:
        given["data"] = given["train_data"]
    changes = _changes(OPTIONS, given)
    rules.check({name: given[name] for name in _OWN} | _decided(changes))
    num_bytes = None if budget is None else parse_bytes(budget)
    if num_bytes is not None:
        changes.setdefault("local.modules", "auto")
    plan = None
    if resume is not None:
        from localgrad.app.run_folders import read_recipe

        wanted = Recipe.from_dict(overlay(read_recipe(resume).to_dict(), changes))
    elif plan_file is not None:
        plan, wanted = _by_plan(plan_file, given, changes)
    else:
        wanted = Recipe.from_dict(overlay(_base(given, changes), changes))
    if given["dry_run"]:
        from localgrad.app.build import checked
        from localgrad.training.events import check_sinks

        checked(wanted, is_planned=num_bytes is not None or plan is not None)
        check_sinks(wanted.execution.sinks, by_name=True)
        typer.echo(wanted.to_toml(), nl=False)
        return
    if given["num_processes"] is not None:
        _start_processes(given["num_processes"], wanted, resume or given["out"])
    from localgrad import run

    with _saying_how_to_resume():
        if resume is not None:
            download = bool(given["download"])
            run.resume(resume, wanted, download=download, sinks=[_console_sink()], on_oom=on_oom)
        else:
            run.train(
                wanted,
                out=given["out"],
                download=bool(given["download"]),
                sinks=[_console_sink()],
                plan=plan,
                budget=num_bytes,
                on_oom=on_oom,
                cache=not given["no_cache"],
                card=given["card"] or "auto",
                confirm=not given["no_confirm"],
                gradients=given["gradients"] or "any",
            )


_IN_FINETUNE = {
    key: each for key, each in _IN_TRAIN.items() if key not in ("preset", "resume", "dry_run", "num_processes")
} | {
    each.name: each
    for each in (
        replace(_OWN["recipe"], help="Start from a recipe in TOML, in the preset's place."),
        replace(_OWN["plan"], help="Fine-tune as a plan from `localgrad plan --finetune --json` says."),
        replace(_OWN["budget"], help="Memory, such as 6GiB: take the best method that fits, or plan the named one."),
        replace(_OWN["gradients"], help="With a budget and no method: exact ones, local ones, or any (default)."),
        Option(name="method", help=_METHOD, panel=METHOD),
        Option(name="pilot", help="Try the methods on such a share of the images first, as 2%.", panel=METHOD),
    )
}


@app.command(epilog="All options: localgrad finetune --help-all")
@takes(
    _IN_FINETUNE,
    ("data", "model", "weights", "method", "budget", "pilot", "epochs", "batch_size", "lr", "out"),
)
def finetune(**given: Any) -> None:
    """Fine-tune a pretrained model on your images: every weight by default, or the best method that fits a budget."""
    if given["data"] is None:
        given["data"] = given["train_data"]
    changes = _changes(OPTIONS, given)
    share = None if given["pilot"] is None else read_share("pilot", given["pilot"])
    rules.check({name: given[name] for name in _IN_FINETUNE if name in given} | _decided(changes))
    plan = None
    if given["plan"] is not None:
        from localgrad.app.planned import read_plan

        plan = read_plan(given["plan"])

    from localgrad import finetuning

    with _saying_how_to_resume():
        finetuning.finetune(
            changes,
            method=given["method"],
            budget=given["budget"],
            gradients=given["gradients"] or "any",
            pilot=share,
            plan=plan,
            out=given["out"],
            base=None if given["recipe"] is None else read_toml(given["recipe"]),
            sinks=[_console_sink()],
            say=typer.echo,
            download=bool(given["download"]),
            on_oom=read_on_oom("on_oom", given["on_oom"] or "stop"),
            cache=not given["no_cache"],
            card=given["card"] or "auto",
            confirm=not given["no_confirm"],
        )


def _changes(options: Mapping[str, Option], given: Mapping[str, Any]) -> Values:
    """Options as changes to a recipe, by dotted key."""
    typed, others = values_of(options, given), parse_assignments(given["set"] or [])
    twice = [key for key in typed.keys() & others.keys() if typed[key] != others[key]]
    if twice:
        raise RecipeError(
            f"--set {twice[0]}={others[twice[0]]}: an option says {typed[twice[0]]} already; leave one of them out."
        )
    changes = typed | others
    if isinstance(changes.get("local.modules"), str):  # --set local.modules=2,5,9
        changes["local.modules"] = read_modules("modules", changes["local.modules"])
    return changes


def _decided(changes: Values) -> Values:
    """What a plan decides, as it was typed."""
    return {key: changes.get(f"execution.{key}") for key in ("checkpoint", "accumulation")}


_MOST_PROCESSES = 1024


def _start_processes(count: int, recipe: Recipe, folder: Path | None) -> None:
    """Start this command again in several processes, unless this is one of them; doesn't come back then."""
    rules.check({"num_processes": count or 1, "parallel": recipe.execution.parallel})
    if not 1 <= count <= _MOST_PROCESSES:
        raise RecipeError(
            f"{arg('num_processes')}: {count} is no number of processes; take 1 or more, at most {_MOST_PROCESSES}."
        )
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


_RECIPE_IN_PLAN = {
    key: OPTIONS[key]
    for key in (
        *("model.name", "model.img_size", "model.patch_size", "model.weights", "model.lora"),
        *("model.quantize", "model.blocks"),
        *("data.image_column", "data.label_column", "data.config"),
        *("local.modules", "local.objective", "local.overlap"),
        *("local.options.decoder", "local.options.classifier", "training.global_every", "training.global_tail"),
        "training.freeze",
        *("training.optimizer", "execution.precision", "execution.compile", "execution.plugins"),
    )
} | {
    "data.name": replace(OPTIONS["data.name"], help="Plan for the classes of a data set; a folder's are read."),
    "local.modules": replace(OPTIONS["local.modules"], help="Only so many modules, stages, or boundaries."),
    "training.batch_size": replace(
        OPTIONS["training.batch_size"], help="Images an update, or auto: the largest that fits.", kind=str
    ),
}
_IN_PLAN = _RECIPE_IN_PLAN | {
    each.name: each
    for each in (
        replace(_OWN["budget"], help="Memory, such as 6GiB; no limit by default."),
        *(_OWN[name] for name in ("preset", "recipe", "set", "card", "gradients", "no_confirm", "no_cache")),
        Option(name="num_classes", help="By default the data's, or timm's own.", panel=DATA, kind=int),
        Option(name="sequence_length", help="Of a model of transformers: tokens in a sequence.", panel=DATA, kind=int),
        Option(
            name="task",
            help="Of a model of transformers: causal-lm, masked-lm, sequence-, token- or image-classification; by "
            "default as its config says.",
            panel=METHOD,
        ),
        Option(name="device", help="auto, cpu or cuda; there need be no GPU to plan for one.", panel=EXECUTION),
        Option(
            name="parallel",
            help="So many ranks, a local module each; --budget is then of every rank.",
            panel=EXECUTION,
            kind=int,
        ),
        Option(
            name="balance",
            help="With --parallel: time (default), or memory: the smallest largest rank.",
            panel=EXECUTION,
        ),
        Option(name="frontier", help="Print all plans worth having.", panel=RUN, kind=bool),
        Option(name="finetune", help="Print all ways to fine-tune, and plan the best that fits.", panel=RUN, kind=bool),
        Option(name="method", help=f"With --finetune: plan this one. {_METHOD}", panel=METHOD),
        Option(name="json", help="Write the plan, for train --plan.", panel=RUN, kind=Path),
        Option(
            name="measure", help="Time the model's parts here, in a minute, not by nominal rates.", panel=RUN, kind=bool
        ),
    )
}


@app.command(epilog="All options: localgrad plan --help-all")
@takes(
    _IN_PLAN,
    (
        *("model", "img_size", "sequence_length", "batch_size", "budget", "modules", "precision", "device"),
        *("frontier", "json"),
    ),
)
def plan(**given: Any) -> None:
    """Find the fastest way to train a model within a memory budget; no GPU, no data and no weights are needed."""
    if given["finetune"]:
        _plan_finetuning(given)
        return
    size, json, num_classes = given.pop("batch_size"), given["json"], given["num_classes"]
    frontier, largest_batch = bool(given["frontier"]), size == "auto"
    if not (size is None or largest_batch):
        given["batch_size"] = read_whole("batch_size", size)
    changes = _changes(_RECIPE_IN_PLAN, given)
    changes.setdefault("local.modules", "auto")
    rules.check({**_decided(changes), "budget": "any"})  # with none, a plan decides them as well
    told = ("preset", "recipe", "budget", "gradients", "parallel", "method", "finetune")
    rules.check({"batch_size": size} | {name: given[name] for name in told})
    budget = None if given["budget"] is None else parse_bytes(given["budget"])
    values = overlay(_base(given, {"data.name": "", **changes}), changes)
    recipe = Recipe.from_dict(values)

    from rich.console import Console
    from rich.markup import escape

    from localgrad.app import planned as recipes
    from localgrad.formats import check_output_file
    from localgrad.planning import budget as budgets
    from localgrad.planning import rank_plans as parallel
    from localgrad.planning import table

    in_parallel = parallel.asked_for(
        given["parallel"],
        given["balance"],
        num_buffers=recipe.execution.buffers,
        frontier=frontier,
        largest_batch=largest_batch,
    )
    if json is not None:
        check_output_file("json", json)
    if num_classes is not None and num_classes < 2:
        raise RecipeError(f"{arg('num_classes')}: a classifier needs at least 2 classes, got {num_classes}.")
    named = recipe.method.data.name if "name" in values.get("data", {}) else ""
    data = recipes.data_planned_for(recipe, named)
    device, card = given["device"], given["card"] or "auto"
    kind = recipes.kind_of(recipe.execution.device if device in (None, "auto") else device, card)
    data = data if num_classes is None else replace(data, num_classes=num_classes)
    task = recipes.task_of(
        recipe,
        device=kind,
        data=data,
        measure=bool(given["measure"]),
        cache=not given["no_cache"],
        card=card,
        replays=not given["no_confirm"],
        gradients=given["gradients"] or "any",
        sequence_length=given["sequence_length"],
        hub_task=given["task"],
    )
    console = Console()
    if largest_batch:
        assert budget is not None, "checked above"
        rows = budgets.largest_batches(task, budget)
        table.print_batches(rows, console)
        if not rows[-1].batch_size:
            raise RecipeError(f"{arg('batch_size', 'auto')}: not even two images fit this budget; take a larger one.")
        training = replace(recipe.method.training, batch_size=rows[-1].batch_size)
        recipe = replace(recipe, method=replace(recipe.method, training=training))
    if frontier:
        table.print_frontier(budgets.worth_having(task, recipe.method.training.batch_size), console)
    found = recipes.plan_recipe(recipe, task, budget, in_parallel)
    table.print_plan(found, console)
    if json is not None:
        json.write_text(found.to_json(), encoding="utf-8")
        path, train_with = shlex.quote(str(json)), _training_by(found, json, recipe.method.model.name, named)
        console.print(f"[dim]written: {escape(path)}; train with: {escape(train_with)}[/]")


def _plan_finetuning(given: dict[str, Any]) -> None:
    """Print what every way to fine-tune needs, and plan the best that fits, or the one that is named."""
    told = ("preset", "budget", "gradients", "parallel", "frontier", "num_classes", "sequence_length", "task", "method")
    rules.check({name: given[name] for name in (*told, "finetune", "batch_size", "device", "card")})
    if given["batch_size"] is not None:
        given["batch_size"] = read_whole("batch_size", given["batch_size"])
    changes = _changes(_RECIPE_IN_PLAN, given)
    from rich.console import Console
    from rich.markup import escape

    from localgrad.app.ways import Tuning
    from localgrad.app.ways_table import print_ways
    from localgrad.formats import check_output_file
    from localgrad.planning.table import print_plan

    json = given["json"]
    if json is not None:
        check_output_file("json", json)
    if given["device"] not in (None, "auto"):
        changes["execution.device"] = given["device"]
    tuning = Tuning.of(
        changes,
        method=given["method"],
        budget=given["budget"],
        gradients=given["gradients"] or "any",
        base=None if given["recipe"] is None else read_toml(given["recipe"]),
        planning={
            "cache": not given["no_cache"],
            "card": given["card"] or "auto",
            "replays": not given["no_confirm"],
            "measure": bool(given["measure"]),
        },
    )
    console = Console()
    with console.status("measuring the parts of each method; the next time they are known"):
        ways = tuning.ways()
    print_ways(ways, tuning.budget, console)
    found = tuning.plan_of_best(ways, console.print)
    console.print()
    print_plan(found, console)
    if json is not None:
        json.write_text(found.to_json(), encoding="utf-8")
        path = shlex.quote(str(json))
        train_with = f"localgrad finetune --plan {path} --data {shlex.quote(tuning.name)}"
        console.print(f"[dim]written: {escape(path)}; train with: {escape(train_with)}[/]")


def _training_by(plan: Any, path: Path, model: str, data: str) -> str:
    """What to type to train by a plan that was written."""
    from localgrad.app.hub_models import is_on_hub

    if is_on_hub(model) and len(plan.made_for["input_size"]) != 3:  # what recipes train is given images
        return f"LocalLearner(model, modules=Plan.from_json(open({str(path)!r}).read()), example=batch)"
    how = f" --parallel modules --num-processes {plan.num_modules}" if plan.is_for_ranks else ""
    return f"localgrad train --plan {shlex.quote(str(path))}{how} --data {shlex.quote(data) if data else '…'}"


@app.command(no_args_is_help=True)
@takes(
    {**{key: OPTIONS[key] for key in ("execution.device", "data.root")}, DOWNLOAD.key: DOWNLOAD},
    ("part", "device", "data", "root", "download"),
)
def evaluate(
    *,
    run_folder: RunFolderArgument,
    part: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data: Annotated[
        str | None, typer.Option(help="Where the run's data lies now, if it was moved.", rich_help_panel=DATA)
    ] = None,
    **given: Any,
) -> None:
    """Accuracy of a run's best weights, of the whole model and of each module's own classifier."""
    from localgrad.app.using_runs import evaluate_run
    from localgrad.training.events import accuracies

    result = evaluate_run(
        run_folder,
        part=part,
        data=data,
        device=given["device"],
        root=given["root"],
        download=bool(given["download"]),
    )
    left_out = f"; left out: {format_counts(result['skipped'])}" if result["skipped"] else ""
    typer.echo(f"{part} accuracy  {result['accuracy']:.2%}  ({result['num_images']:,} images{left_out})")
    typer.echo(f"by module  {accuracies(result['module_accuracy'])}")


_READING = ("data.on_corrupt", "data.image_range", "data.background", "data.fit")
_IN_PREDICT = {key: OPTIONS[key] for key in ("execution.device", *_READING)} | {
    "data.on_corrupt": replace(
        OPTIONS["data.on_corrupt"], help="An image that can't be read: skip (and say; by default), or error."
    )
}


@app.command(no_args_is_help=True)
@takes(_IN_PREDICT, ("top", "csv", "json", *(each.name for each in _IN_PREDICT.values())))
def predict(
    *,
    run_folder: RunFolderArgument,
    images: Annotated[list[str], typer.Argument(help="Images, folders of images, and patterns such as 'a/**/*.jpg'.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 3,
    csv: Annotated[Path | None, typer.Option(help="Write a table to this file, in place of lines.")] = None,
    json: Annotated[Path | None, typer.Option(help="Likewise as a list of objects.")] = None,
    **given: Any,
) -> None:
    """Classify images with a run's best weights. Exit status 1: some could not be read; the others are there."""
    from localgrad.app import using_runs
    from localgrad.app.prediction_files import check_prediction_files, is_stream, shown_path, written_predictions
    from localgrad.training.image_sets import Skipped

    files = {name: path for name, path in (("csv", csv), ("json", json)) if path is not None}
    check_prediction_files(files)
    skipped = Skipped()
    reading = {key.rpartition(".")[2]: value for key, value in values_of(_IN_PREDICT, given).items()}
    predictions = using_runs.predict(run_folder, images, top=top, skipped=skipped, **reading)
    total = failed = 0
    with written_predictions(files, predictions.num_named) as write:
        for prediction in predictions:
            total += 1
            failed += prediction.error is not None
            write(prediction)
            if prediction.error is not None:
                typer.echo(f"left out: {shown_path(prediction.path)} ({prediction.error})", err=True)
            elif not files:
                classes = "  ".join(f"{name} {share:.1%}" for name, share in prediction.classes)
                typer.echo(f"{shown_path(prediction.path)}  {classes}")
    if skipped.others:
        counts = format_counts(dict(sorted(skipped.others.items())))
        typer.echo(f"passed over: {counts}", err=True)
    for path in (each for each in files.values() if not is_stream(each)):
        typer.echo(f"written: {shown_path(path)} ({total - failed:,} images, {failed:,} left out)")
    if failed:
        typer.echo(f"{failed:,} of {total:,} images are left out", err=True)
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
def export(
    *,
    run_folder: RunFolderArgument,
    to: Annotated[str, typer.Option(help="timm (a folder), onnx, torch-export (a file), or hub (uploads a folder).")],
    out: Annotated[Path | None, typer.Option(help="What to write; by default below export/ of the run folder.")] = None,
    repo: Annotated[str | None, typer.Option(help="With hub: OWNER/NAME to upload to.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="An image, or a folder of images, to compare logits on; by default noise.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written; with hub: write it, and upload nothing.")
    ] = False,
) -> None:
    """Write a run's model for timm, transformers, ONNX, torch.export or the hub; it is read again and compared."""
    from localgrad.integrations.exporting import export as write

    typer.echo(str(write(run_folder, to=to, out=out, example=images, repo=repo, dry_run=dry_run)))


_IN_COMPARE = declared(Settings)


@app.command(epilog="All options: localgrad compare --help-all")
@takes(
    _IN_COMPARE,
    ("model", "batch_size", "data", "device", "precision", "modules", "checkpoint", "plan", "estimate_only", "plot"),
    with_defaults=True,
)
def compare(**given: Any) -> None:
    """Peak memory and step time of end-to-end training, its rivals and local modules, side by side."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would talk; read when torch is imported
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from localgrad.compare import verb as bench

    typed = values_of(_IN_COMPARE, given)
    values: Values = {key: tuple(each) if isinstance(each, list) else each for key, each in typed.items()}
    settings = Settings(**values)
    columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("building the model", total=None)
        turn = itertools.count()
        comparison = bench.run(
            settings, lambda text, turns: progress.update(task, description=text, completed=next(turn), total=turns)
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


def _by_plan(path: Path, given: Mapping[str, Any], changes: Values) -> tuple[Any, Recipe]:
    """A plan from its file, and the recipe to train by it; refused where options contradict the plan."""
    from localgrad.app.planned import changes_of, check_plan_is_for, overridden, read_plan

    plan = read_plan(path)
    values = {**changes_of(plan), **changes}
    base = _base(given, values)
    wanted = Recipe.from_dict(overlay(base, values))
    check_plan_is_for(plan, wanted)
    for name in ("recipe", "preset"):
        if given[name] is not None and (otherwise := overridden(plan, base)):
            typer.echo(f"{arg('plan', path)} decides, over {arg(name, given[name])}: {'; '.join(otherwise)}.", err=True)
    return plan, wanted


def _base(given: Mapping[str, Any], changes: Values) -> Values:
    """What the options are laid over: a recipe file, a preset, or (where no other data is named) the digits."""
    if given["recipe"] is not None:
        return read_toml(given["recipe"])
    named = given["preset"]
    if named is None and changes.get("data.name", "digits") != "digits":
        return {}
    base = preset(named or "digits")
    if named is None and "model.name" in changes:
        base.pop("model", None)  # the preset's micro Swin has options that another model doesn't take
    local = base.get("local", {})
    if changes.get("local.objective", local.get("objective")) != local.get("objective"):
        local.pop("options", None)  # likewise those of its objective
    return base


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
