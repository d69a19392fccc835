"""``python -m research.census``: split and train the models of other libraries, each in a process of its own.

What is done is kept in ``research/results/census/``, a file for each library, and isn't done again; ``--report`` writes
the table in ``research/docs/census.md``.

::

    python -m research.census timm torchvision
    python -m research.census transformers-language/LlamaForCausalLM --again
    python -m research.census --report
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import typer

from research.census.models import Entry, entries
from research.census.report import rewrite
from research.census.trial import Row

RESULTS = Path("research/results/census")
PAGE = Path("research/docs/census.md")


def parser() -> argparse.ArgumentParser:
    """What may be typed."""
    made = argparse.ArgumentParser(prog="python -m research.census", description=__doc__.partition("\n")[0])
    made.add_argument("names", nargs="*", help="libraries, or LIBRARY/MODEL; all by default")
    made.add_argument("--again", action="store_true", help="models that are done, too")
    made.add_argument("--split-only", action="store_true", help="train no step")
    made.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="of one model")
    made.add_argument("--report", action="store_true", help="write the tables of the docs, and stop")
    made.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> None:
    """Try models, or report."""
    given = parser().parse_args(arguments)
    wanted = [entry for entry in entries() if not given.names or {entry.library, entry.label} & set(given.names)]
    if not wanted:
        known = ", ".join(dict.fromkeys(entry.library for entry in entries()))
        sys.exit(
            f"names: none of {', '.join(given.names)} is in the census; give libraries ({known}) or LIBRARY/MODEL."
        )
    if given.report:
        typer.echo(f"{PAGE}: {'rewritten' if rewrite(PAGE, RESULTS) else 'as it was'}")
    elif given.one:
        typer.echo(json.dumps(in_this_process(wanted[0], steps=not given.split_only)))
    else:
        for entry in wanted:
            known = read(entry.library).get(entry.name)
            if (
                given.again
                or known is None
                or ("steps" not in known and "reason" not in known and not given.split_only)
            ):
                row = in_its_own(entry, steps=not given.split_only, timeout=given.timeout)
                if row is not None:
                    keep(entry, row)


def in_this_process(entry: Entry, *, steps: bool) -> Row:
    """What comes of a model here."""
    import logging
    import warnings

    from research.census.trial import tried

    warnings.simplefilter("ignore")  # of the libraries, about configurations
    logging.disable(logging.WARNING)
    return tried(entry, steps=steps)


def in_its_own(entry: Entry, *, steps: bool, timeout: int) -> Row | None:
    """What comes of a model in a process of its own; ``None`` if it takes too long, which says more of the machine."""
    command = [sys.executable, "-m", "research.census", entry.label, "--one", *([] if steps else ["--split-only"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        typer.echo(f"{entry.label}: not done in {timeout} s, and not kept; give --timeout")
        return None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
        return {"reason": f"fault: {lines[-1]}"}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def read(library: str) -> dict[str, Row]:
    """What is known of a library's models."""
    path = RESULTS / f"{library}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(entry: Entry, row: Row) -> None:
    """Write down what came of a model, and say it."""
    rows = {**read(entry.library), entry.name: row}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{entry.library}.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    new.replace(path)
    blocks = f"{row.get('blocks')} blocks, {row.get('first')} .. {row.get('last')}"
    typer.echo(f"{entry.label}: {row.get('reason') or blocks} {row.get('steps', '')} {row.get('seconds')} s")


if __name__ == "__main__":
    main()
