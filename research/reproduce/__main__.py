"""``python -m research.reproduce``: the published tables, and our runs for them.

python -m research.reproduce ranking --profile cpu --dry-run
python -m research.reproduce --report
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from localgrad import cli
from localgrad.errors import RecipeError
from research.reproduce import report as reports
from research.reproduce import verb
from research.reproduce.costs import measure_costs_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def reproduce(  # noqa: PLR0917  # one parameter an option
    table: Annotated[
        str | None,
        typer.Argument(help="cifar10, cifar100, stl10, svhn, vit, ranking, epochs, images or sources; all by default."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Size: smoke (seconds), cpu (few images), cpu-full (a small model), gpu (all).")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Only these: cifar10,svhn.")] = None,
    data_path: Annotated[
        list[str] | None,
        typer.Option(help="DATA=FOLDER: a folder of images in place of the official files; may be repeated."),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Where torchvision's data sets lie.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch data sets that are missing.")] = False,
    methods: Annotated[str | None, typer.Option(help="Only these: end-to-end,greedy,default.")] = None,
    modules: Annotated[str | None, typer.Option(help="Only these K: 2,4. End-to-end training has one.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of the profile's: 0,1,2.")] = None,
    epochs: Annotated[str | None, typer.Option(help="Instead of the table's: 10, or 10,20.")] = None,
    jobs: Annotated[int, typer.Option(help="Cells that run at a time.")] = 1,
    num_threads: Annotated[
        int | None, typer.Option(help="Processor threads of each; by default all cores, shared out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    again: Annotated[bool, typer.Option("--again", help="Run cells that are done, too, in fresh folders.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("research/results"),
    docs: Annotated[Path, typer.Option(help="File whose tables --report writes.")] = Path("research/docs/accuracy.md"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their commands, and stop.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the tables in the docs from the results.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw TABLE's accuracy against memory, .png or .svg, from the results.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure memory and time of a step of the profile's methods, and stop.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="With --report: only say where docs and results differ.")
    ] = False,
) -> None:
    """The published tables: run our figures for them, cell by cell, and write them into the docs."""
    if check and not report:
        raise RecipeError("--check: it goes with --report; type python -m research.reproduce --report --check.")
    if check:
        differences = reports.differences(docs, results)
        for line in differences:
            typer.echo(line)
        sys.exit(1 if differences else 0)
    if report:
        typer.echo(f"{docs}: {'rewritten' if reports.rewrite(docs, results) else 'as it was'}")
        return
    if plot is not None:
        typer.echo(verb.draw(table, profile, results, plot))
        return
    if measure:
        measure_costs_of(verb.profile_named(profile), results, typer.echo)
        return
    settings = verb.Settings(
        table=table,
        profile=profile,
        data=data,
        data_path=tuple(data_path or ()),
        root=root,
        download=download,
        methods=methods,
        modules=modules,
        seeds=seeds,
        epochs=epochs,
        jobs=jobs,
        num_threads=num_threads,
        device=device,
        again=again,
        results=results,
    )

    def say(line: str) -> None:
        print(line, flush=True)  # a log file is read while it grows

    if dry_run:
        verb.list_cells(settings, say)
    else:
        sys.exit(verb.fill(settings, say))


if __name__ == "__main__":
    cli.main(app)
