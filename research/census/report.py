"""The tables of ``research/docs/census.md``, from the results."""

from __future__ import annotations

import json
from pathlib import Path

from research.census.models import Entry, entries
from research.census.trial import MODULES, Row

BEGIN, END = "<!-- made by research.census -->", "<!-- end -->"
LONGEST = 150
"""Characters of a reason."""


def rewrite(page: Path, results: Path) -> bool:
    """Write the tables anew; whether anything changed."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    new = f"{before}{BEGIN}\n{tables(results)}{END}{rest.partition(END)[2]}"
    page.write_text(new)
    return new != text


def tables(results: Path) -> str:
    """A line on each library, then what was refused, then all that was split."""
    libraries: dict[str, list[Entry]] = {}
    for entry in entries():
        libraries.setdefault(entry.library, []).append(entry)
    known: dict[str, dict[str, Row]] = {
        library: json.loads(path.read_text()) if (path := results / f"{library}.json").exists() else {}
        for library in libraries
    }
    lines = ["| | models | tried | split | " + " | ".join(f"K = {modules}" for modules in MODULES) + " |"]
    lines.append("|---|" + "---|" * (3 + len(MODULES)))
    refused = ["", "| refused | why |", "|---|---|"]
    untrained = ["", "| not trained | K | why |", "|---|---|---|"]
    split = ["", "| split | blocks | first | last | s |", "|---|---|---|---|---|"]
    for library, wanted in libraries.items():
        rows = {entry.name: known[library][entry.name] for entry in wanted if entry.name in known[library]}
        done = {name: row for name, row in rows.items() if "reason" not in row}
        trained = [sum(row.get("steps", {}).get(str(modules)) == "" for row in done.values()) for modules in MODULES]
        cells = [library, len(wanted), len(rows), len(done), *trained]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for name, row in rows.items():
            if "reason" in row:
                refused.append(f"| {library}/{name} | {shortened(row['reason'])} |")
                continue
            way = "" if row["watched"] else " (timm's own way)"
            split.append(
                f"| {library}/{name} | {row['blocks']}{way} | `{row['first']}` | `{row['last']}` | {row['seconds']} |"
            )
            untrained += [
                f"| {library}/{name} | {modules} | {shortened(why)} |"
                for modules, why in row.get("steps", {}).items()
                if why
            ]
    found = [lines, *(table for table in (refused, untrained, split) if len(table) > 3)]
    return "\n".join(line for table in found for line in table) + "\n"


def shortened(reason: str) -> str:
    """The first sentences of a reason, on one line of a table."""
    first = reason.partition(" Chains seen")[0].replace("|", "/").replace("\n", " ")
    return first if len(first) <= LONGEST else f"{first[:LONGEST]} ..."
