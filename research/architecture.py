"""Counts that tell how the source is built: ``python -m research.architecture [--against OTHER/src]``.

Lines, functions, names and the frames between the command line's verb and a module's objective; with ``--against`` of
two versions side by side. The frames are counted in a micro training that each version runs in its own process.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

SOURCE = Path(__file__).parents[1] / "src"
APART = ("reproduce", "simulator.py", "shared_cores.py")
"""What stood in the package once and is research now: left out of both versions."""

REPEATABLE = {
    "main": "entry points are called so",
    "train": "the verb of the command line, and the function of Python that does it",
    "finetune": "likewise",
    "plan": "likewise",
    "evaluate": "likewise",
    "predict": "likewise",
    "export": "likewise",
    "compare": "likewise",
}
"""Public top-level names that may be defined twice, and why."""

FILES = {
    "__init__.py": "Python's own name",
    "base.py": "what a package stands on, as the design draws it",
}
"""Names of files that may be there several times, and why."""

VERBS = ("_check", "_refuse", "_run", "_search", "_split")
"""First words of private functions that may be: each is read in its own file, and says what it does."""

APART_FROM_OTHERS = re.compile(
    r"leave (?!it |out)(one of them|[\w-]*) *out|(goes?|(does|do)n't go) (together )?with|needs? --"
)
"""How error texts say that two options exclude each other, or that one needs the other; values in them are blanks."""

TABLE = "rules.py"
"""Where it is to be said, and isn't counted."""

SAID_BY_HAND = {
    "learner.py: Learner.check_state_dict": "the checkpoint decides",
    "objectives/losses.py: Regression.check_values": "labels decide",
    "objectives/losses.py: loss_of": "what the model gives decides",
    "learner.py: Learner._build": "how the model was split decides",
    "step/local_step.py: compilers_errors_told": "the compiler decides",
    "learner.py: LocalLearner.global_step_on": "a method that is called decides",
    "parallel/parallel_learner.py: ParallelLearner.__init__": "layers of the model decide",
    "parallel/parallel_learner.py: ParallelLearner._refuse": "how the model was split decides",
    "app/using_runs.py: predict": "the run's recipe decides",
    "cli.py: _changes": "two values of one key decide",
    "integrations/hf.py: _check_arguments": "arguments of transformers decide",
    "planning/budget.py: Task.fixed": "two numbers decide",
    "planning/rank_plans.py: _with_modules": "two numbers decide",
    "step/checks.py: check_values": "labels decide",
}
"""Functions that may say it all the same, and what decides: nothing that an argument's value tells."""

_COUNT_FRAMES = """
import sys, torch
from collections import Counter
from pathlib import Path
import localgrad
from localgrad.objectives.base import LocalObjective

package, depths = str(Path(localgrad.__file__).parent), Counter()

def count(module, args):
    if isinstance(module, LocalObjective):
        frame, found = sys._getframe(), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(package):
                found.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
            frame = frame.f_back
        depths[tuple(reversed(found[: found.index(("cli.py", "train")) + 1]))] += 1

torch.nn.modules.module.register_module_forward_pre_hook(count)
from localgrad.cli import app
app(sys.argv[1:], standalone_mode=False)
frames = (*depths.most_common(1)[0][0], ("the objective", "forward"))
for file, name in frames:
    print("FRAME", file, name)
"""


@dataclass(frozen=True)
class Function:
    """A function or method: where it is and how long.

    Attributes:
        name: with its class.
        path: relative to the source.
        lines: from ``def`` to its end.
        num_parameters: of its signature.
        text: the literals in it, joined.
    """

    name: str
    path: str
    lines: int
    num_parameters: int
    text: str


@dataclass(frozen=True)
class Architecture:
    """What is counted of one version.

    Attributes:
        lines: of each file, blank ones left out.
        all_lines: with blank ones.
        functions: all of them.
        loose: how often ``dict[str, Any]`` is written.
        named_twice: top-level classes and functions defined in several files that may not be, with those files.
        files_named_twice: names of several files that may not be.
        frames: from the verb to the objective, as ``file name``; empty where they weren't counted.
    """

    lines: dict[str, int]
    all_lines: int
    functions: tuple[Function, ...]
    loose: int
    named_twice: dict[str, list[str]]
    files_named_twice: dict[str, list[str]]
    frames: tuple[str, ...] = ()

    @property
    def longest(self) -> Function:
        """The longest function."""
        return max(self.functions, key=lambda function: function.lines)

    @property
    def places_of_exclusions(self) -> list[str]:
        """Functions beside the table that refuse options for others: ``file: function``."""
        found = [each for each in self.functions if each.path != TABLE and APART_FROM_OTHERS.search(each.text)]
        return [f"{each.path}: {each.name}" for each in found]

    def figures(self) -> dict[str, str]:
        """What is printed of a version, by name."""
        train = [each for each in self.functions if each.path.endswith("cli.py") and each.name == "train"]
        places = self.places_of_exclusions
        holders = {place.split(":")[0] for place in places}
        largest = sorted(self.lines.items(), key=lambda pair: -pair[1])[:5]
        return {
            "files": str(len(self.lines)),
            "lines": f"{sum(self.lines.values())} ({self.all_lines} with blank ones)",
            "median file": f"{statistics.median(self.lines.values()):.0f} lines",
            "largest files": "\n".join(f"{name} {count}" for name, count in largest),
            "longest function": f"{self.longest.lines} lines\n{self.longest.path}: {self.longest.name}",
            "frames from verb to objective": str(len(self.frames) or "not counted"),
            "dict[str, Any]": str(self.loose),
            "names defined twice": _listed(self.named_twice),
            "files of the same name": _listed(self.files_named_twice),
            "parameters of cli.train": ", ".join(str(each.num_parameters) for each in train),
            "functions that say what goes with what": f"{len(places)} in {len(holders)} files",
        }


def _listed(names: dict[str, list[str]]) -> str:
    return "\n".join([str(len(names)), *sorted(names)])


def count(source: Path, *, frames: bool = True) -> Architecture:
    """Count a version.

    Args:
        source: its ``src``, with ``localgrad`` in it.
        frames: whether a micro training is run for its frames.

    Raises:
        FileNotFoundError: no package ``localgrad`` is there.
    """
    package = source / "localgrad"
    if not package.is_dir():
        raise FileNotFoundError(f"{source}: no package localgrad is in it; give the folder src of a version.")
    lines, functions, all_lines, loose = {}, [], 0, 0
    names, files = defaultdict(list), defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        name = str(path.relative_to(package))
        if any(part in APART for part in Path(name).parts):
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines[name] = sum(1 for line in text.splitlines() if line.strip())
        all_lines += len(text.splitlines())
        loose += text.count("dict[str, Any]")
        functions += _functions(tree, name)
        if path.name not in FILES:
            files[path.name].append(name)
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not _may_repeat(node):
                names[node.name].append(name)
    return Architecture(
        lines=lines,
        all_lines=all_lines,
        functions=tuple(functions),
        loose=loose,
        named_twice={name: found for name, found in names.items() if len(found) > 1},
        files_named_twice={name: found for name, found in files.items() if len(found) > 1},
        frames=count_frames(source) if frames else (),
    )


def _may_repeat(node: ast.ClassDef | ast.FunctionDef) -> bool:
    is_verb = isinstance(node, ast.FunctionDef) and any(f"{node.name}_".startswith(f"{verb}_") for verb in VERBS)
    return is_verb or node.name in REPEATABLE


def _functions(tree: ast.AST, path: str, prefix: str = "") -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            docstring = node.body[0].value if ast.get_docstring(node) and isinstance(node.body[0], ast.Expr) else None
            literals = [
                each.value
                for each in ast.walk(node)
                if isinstance(each, ast.Constant) and isinstance(each.value, str) and each is not docstring
            ]
            yield Function(
                name=prefix + node.name,
                path=path,
                lines=(node.end_lineno or node.lineno) - node.lineno + 1,
                num_parameters=len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs),
                text=" ".join(literals),
            )
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield from _functions(node, path, f"{prefix}{node.name}.")


def count_frames(source: Path) -> tuple[str, ...]:
    """The package's frames on the stack at a module's objective, in a training of one epoch, the verb's first.

    Raises:
        RuntimeError: the training failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--epochs", "1", "--out", str(Path(folder) / "run"), "--device", "cpu"]
        ended = subprocess.run(
            [sys.executable, "-c", _COUNT_FRAMES, "train", *options],
            env={**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    found = tuple(re.findall(r"^FRAME (.*)$", ended.stdout, flags=re.MULTILINE))
    if not found:
        raise RuntimeError(f"{source}: its micro training failed:\n{ended.stdout}\n{ended.stderr}")
    return found


def main(
    against: Annotated[Path | None, typer.Option(help="src of another version, shown before this one's.")] = None,
    *,
    details: Annotated[bool, typer.Option(help="Print the frames and the places, too.")] = False,
) -> None:
    """Print the counts of this version, beside those of another."""
    versions = {} if against is None else {"before": count(against)}
    versions["after" if versions else "now"] = count(SOURCE)
    table = Table(box=None, pad_edge=False)
    for name in ("", *versions):
        table.add_column(name, overflow="fold")
    columns = [version.figures() for version in versions.values()]
    for name in columns[0]:
        table.add_row(*map(Text, (name, *(figures[name] for figures in columns))))
    console = Console(width=max(100, Console().width))
    console.print(table)
    if details:
        for name, version in versions.items():
            console.print(f"\n{name}: frames\n  " + "\n  ".join(version.frames), highlight=False)
            console.print(f"{name}: what goes with what\n  " + "\n  ".join(version.places_of_exclusions))
            console.print(f"{name}: names\n  " + "\n  ".join(f"{k} {v}" for k, v in version.named_twice.items()))


if __name__ == "__main__":
    typer.run(main)
