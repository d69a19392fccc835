"""What the docs say of the code and of results, made from these: ``python -m docs.generate`` writes it anew.

::

    <!-- made by docs/generate.py: recipe -->
    whatever stands here is replaced
    <!-- end -->

``tests/test_docs.py`` holds the pages against it. (The tables of ``research/docs/accuracy.md`` have a command of their
own, ``python -m research.reproduce --report``, and those of ``docs/data.md`` another, in ``tests/data_cases.py``.)
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import localgrad
from localgrad import rules
from localgrad.app.recipe import Recipe
from localgrad.units import format_bytes
from research import panels, picture
from research.benchmarks import finetuning
from research.reproduce.profiles import CPU_FULL
from research.reproduce.published import PUBLISHED, QUOTED, RECIPES, published_for
from research.reproduce.report import in_a_sentence
from research.reproduce.results import load_rows, path_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "research/docs").glob("*.md"))]
_MARKED = re.compile(r"(<!-- made by docs/generate\.py: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Lines = Iterator[str]


def filled(text: str) -> str:
    """A page with everything between its markers made anew."""
    return _MARKED.sub(lambda match: match[1] + "".join(f"{line}\n" for line in MADE[match[2]]()) + match[4], text)


# Results ---------------------------------------------------------------------------------------------------------

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}


def published() -> Lines:
    """The published gap between feature reconstruction and end-to-end training, K = 4."""
    rows = {"end-to-end": ("end-to-end", 1), "four local modules (feature reconstruction)": ("feature-linear", 4)}
    yield f"| | {' | '.join(DATA.values())} |"
    yield "|---|" + "---|" * len(DATA)
    found = {name: [published_for(data, *key) for data in DATA] for name, key in rows.items()}
    accuracies = {name: [figure.accuracy for figure in row if figure] for name, row in found.items()}
    for name, row in accuracies.items():
        yield f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |"
    gaps = [local - exact for exact, local in zip(*accuracies.values(), strict=True)]
    yield f"| **gap, points** | {' | '.join(f'**{gap:.1f}**'.replace('-', '−') for gap in gaps)} |"  # noqa: RUF001
    yield ""
    yield f"({QUOTED}; it doesn't give the recipe.)"


def published_methods() -> Lines:
    """All published figures, a row a method."""
    yield f"| method | K | {' | '.join(DATA.values())} | source |"
    yield f"|---|---|{'---|' * (len(DATA) + 1)}"
    rows = {(figure.methods, figure.modules): figure.source for figure in reversed(PUBLISHED)}
    for (methods, modules), source in reversed(rows.items()):
        figures = (published_for(data, methods[0], modules) for data in DATA)
        name = methods[0].removesuffix("-linear")  # it isn't told which of the decoders
        yield f"| {name} | {modules} | {' | '.join(map(str, figures))} | {source} |"
    yield ""
    for source, told in RECIPES.items():
        yield f"* {source}: {told}."


NAMES = {  # of rows in the results: what a reader calls them, and whether the README has them
    "end-to-end": ("plain loop, end-to-end", True),
    "K = 1": ("the same in this package: `--modules 1`", False),
    "end-to-end, timm checkpointing": ("timm's checkpointing of every block", True),
    "K = 1, halves/8": ("`--modules 1 --checkpoint halves/8`", False),
    "plan k1-blocks8": ("`--modules 1 --checkpoint blocks/8`", True),
    "K = 4, feature": ("4 local modules, nothing recomputed", True),
    "plan k4-peaks, feature": ("4 local modules, only what sets the peak recomputed", True),
    "plan k4-chunks, feature": ("4 local modules, chunks where they count", True),
    "K = 4, feature, halves/8": ("4 local modules, `--checkpoint halves/8`", False),
    "plan any, feature": ("any number of modules (nine)", False),
}


def measured(*, short: bool) -> Lines:
    """Peak memory and step time of each method on Swin-Tiny, as `localgrad compare` measured them."""
    path = "research/results/memory/compare-swin-tiny-cpu.json"
    result = json.loads((ROOT / path).read_text(encoding="utf-8"))
    rows, about = {row["name"]: row for row in result["rows"]}, result["about"]
    yield "| method | peak memory | step time (range) | gradients |"
    yield "|---|---|---|---|"
    for name, (told, is_short) in NAMES.items():
        if is_short or not short:
            yield f"| {told} | {_ratios(rows[name])} | {'local' if 'local' in rows[name]['family'] else 'exact'} |"
    repeats = about["settings"]["repeats"]
    yield ""
    yield f"By `localgrad compare`, {about['device']}, torch {about['versions']['torch']}, {about['date']}, {repeats}"
    yield "repeats, auxiliary classifier `mlp`; command and rows are in"
    yield f"`{path}`."


def _ratios(row: Mapping[str, Any]) -> str:
    peak = f"{row['measured_peak_ratio']:.2f}"
    if row["name"] == "end-to-end":
        return f"{peak} ({format_bytes(row['measured_peak_bytes'])}) | 1.00"
    least, most = row["time_ratio_range"]
    return f"{peak} | {row['time_ratio']:.2f} ({least:.2f} to {most:.2f})"


def fine_tuned() -> Lines:
    """Fine-tuning by each method, a ViT on 5,000 images."""
    results = finetuning.read()
    yield from finetuning.table("vit", 5_000, results)
    yield ""
    first = results["vit; pretrained"]
    yield f"A ViT of 6 blocks, 32 px, pretrained on CIFAR-100 to {first['test_accuracy']:.1%}, then 10 epochs on 5,000"
    yield f"images of CIFAR-10 (JPEG copies); torch {first['torch']}, one thread, {finetuning.days_of(results)}."


SHORT = {
    "full": "full fine-tuning {points} %",
    "full, blocks recomputed": "its blocks recomputed, the same, at {measured:.2f} x the memory and {time:.2f} x the "
    "time",
    "lower half frozen": "the lower half frozen {points} at {measured:.2f} x and {time:.2f} x",
    "LoRA, blocks recomputed": "LoRA with its blocks recomputed {points} at {measured:.2f} x and {time:.2f} x",
    "K = 2, transformer heads": "two local modules {points} at {measured:.2f} x and {time:.2f} x",
}


def fine_tuned_short() -> Lines:
    """The same in a sentence, with what all images give: there, LoRA's figure is the one without recomputation."""
    told, seeds, results = [], [], finetuning.read()
    for method, text in SHORT.items():
        few = finetuning.figures_of("vit", 5_000, method, results)
        all_of_them = finetuning.figures_of("vit", None, method.removesuffix(", blocks recomputed"), results)
        assert few is not None and all_of_them is not None, "they are in the results"
        told.append(text.format(points=f"{few.mean:.1f} and {all_of_them.mean:.1f}", **vars(few)))
        seeds.append((len(few.accuracies), len(all_of_them.accuracies)))
    few_seeds, all_seeds = min(seeds)
    yield from textwrap.wrap(
        f"**Fine-tuned**, a small ViT, on 5,000 images ({few_seeds} seeds) and on 49,000 ({all_seeds}): "
        f"{'; '.join(told)}.",
        100,
    )


def from_scratch_short() -> Lines:
    """What local modules lose and save here, from scratch, on all images."""
    told = in_a_sentence(CPU_FULL, ROOT / "research/results", DATA)
    if not told:
        yield "No run of that size was made here yet."
        return
    row = load_rows(path_of(ROOT / "research/results", "cifar10", CPU_FULL.name))[0]
    text = (
        f"**Here**, a Swin of {row['num_parameters'] / 1e6:.1f} million parameters on all images but "
        f"{row['num_val']:,} (JPEG copies of CIFAR-10), "
        f"{CPU_FULL.epochs} epochs. {told}"
    )
    yield from textwrap.wrap(text, 100, break_on_hyphens=False)


# The recipe ------------------------------------------------------------------------------------------------------


def recipe() -> Lines:
    """A table of each section of the recipe: key, default and meaning of its fields."""
    method, execution = (_field_types(Recipe)[name] for name in ("method", "execution"))
    types_of = _field_types(method)
    top = {name: kind for name, kind in types_of.items() if not dataclasses.is_dataclass(kind)}
    yield from _section("At the top", method, "", only=top)
    for name, kind in types_of.items():
        if name not in top:
            yield from _section(f"`[{name}]`", kind, f"{name}.")
    yield from _section("`[execution]`: changes no results", execution, "execution.")


def _field_types(kind: Any) -> dict[str, Any]:
    return {name: value for name, value in typing.get_type_hints(kind).items() if name in _names(kind)}


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _section(title: str, kind: Any, prefix: str, only: Mapping[str, Any] | None = None) -> Lines:
    docs, hints = _attributes(kind), typing.get_type_hints(kind, include_extras=True)
    yield from (f"## {title}", "", "| key | option | default | meaning |", "|---|---|---|---|")
    for field in dataclasses.fields(kind):
        if only is None or field.name in only:
            key, own = prefix + field.name, field.metadata.get("option")
            meaning = _cell(own.help if own else docs[field.name])
            choices = _choices(hints[field.name])
            if not all(str(value) in meaning for value in choices):
                meaning += f" ({', '.join(f'`{value}`' for value in choices)})"
            yield f"| `{key}` | {_flag(own, field.name)} | {_default(field)} | {meaning} |"
            for name, entry in field.metadata.get("entries", {}).items():
                yield f"| `{key}.{name}` | {_flag(entry, name)} |  | {_cell(entry.help)} |"
    yield ""


def _flag(own: Any, name: str) -> str:
    """How a field that is declared with an option is typed."""
    return f"`--{(own.name or name).replace('_', '-')}`" if own and own.panel else ""


def _attributes(kind: Any) -> dict[str, str]:
    """What a docstring in Google's style says of each attribute."""
    text = inspect.getdoc(kind) or ""
    _, _, listed = text.partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", listed, re.DOTALL | re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in entries}


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a ``Literal``, wherever it stands in a hint."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Annotated):
        return next((found for inner in typing.get_args(hint) if (found := _choices(inner))), ())
    return ()


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None or value in ({}, [], ()):
        return ""
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").removesuffix(".")


# Public names ----------------------------------------------------------------------------------------------------

SECTIONS = {  # by the package that a name's home is in
    "Train": ("learner", "isolation", "step", "parallel"),
    "Plan, estimate, measure": ("app", "planning", "partition", "balancing", "memory", "compare"),
    "Objectives": ("objectives",),
    "Models": ("backbones",),
    "Runs": ("run", "finetuning", "training", "integrations"),
    "Errors": ("errors",),
}


def public_names() -> Lines:
    """Every public name: its first sentence in a table, its whole docstring behind that."""
    homes = {name: getattr(localgrad, name).__module__.split(".")[1] for name in localgrad.__all__ if name[0] != "_"}
    known = {home for section in SECTIONS.values() for home in section}
    others = tuple(sorted(set(homes.values()) - known))
    for title, packages in {**SECTIONS, "More": others}.items():
        names = sorted(name for name, home in homes.items() if home in packages)
        if names:
            yield from (f"## {title}", "", "| name | what it is |", "|---|---|")
            yield from (f"| `{name}` | {_first_sentence(name)} |" for name in names)
            yield from ("", "```{eval-rst}", *(line for name in names for line in _directive(name)), "```", "")


def _first_sentence(name: str) -> str:
    text = inspect.getdoc(getattr(localgrad, name)) or ""
    return _cell(" ".join(text.split("\n\n")[0].split()))


def _directive(name: str) -> Lines:
    value = getattr(localgrad, name)
    if not inspect.isclass(value):
        yield f".. auto{'function' if callable(value) else 'data'}:: localgrad.{name}"
        return
    yield f".. autoclass:: localgrad.{name}"
    if not issubclass(value, Exception):
        yield "   :members:"


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(path: Path) -> Lines:
    """What an example defines, without its description and what it does when it is run."""
    code = path.read_text(encoding="utf-8").split('"""\n', 1)[1].split("if __name__", maxsplit=1)[0]
    yield f"```python no-run: tests/test_examples.py runs {path.relative_to(ROOT)}"
    yield code.strip()
    yield "```"


MADE: Mapping[str, Callable[[], Lines]] = {
    "published": published,
    "published-methods": published_methods,
    "fine-tuned": fine_tuned,
    "fine-tuned-short": fine_tuned_short,
    "from-scratch-short": from_scratch_short,
    "measured": lambda: measured(short=False),
    "measured-short": lambda: measured(short=True),
    "recipe": recipe,
    "public-names": public_names,
    **{path.stem: partial(example, path) for path in EXAMPLES},
    "rules": rules.as_markdown,
}


def main() -> None:
    """Write what is out of step anew, and say which pages were."""
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: rewritten")
    if not picture.is_in_step():
        panels.draw(picture.all_panels(), picture.SHOWN)
        print(f"{picture.SHOWN.relative_to(ROOT)}: drawn anew")


if __name__ == "__main__":
    main()
