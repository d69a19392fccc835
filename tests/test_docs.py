"""The docs say what is so: code runs, commands are the command line's, tables are what code and results give."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner

from docs import generate
from localgrad import cli
from ranks import free_port
from research import picture
from research.reproduce import __main__ as reproduce

ROOT = Path(__file__).resolve().parents[1]
MADE = re.compile(r"<!-- (?:made by|table:|layouts|kinds|labels).*?<!-- end", re.DOTALL)
BY_NAME = {str(page.relative_to(ROOT)): page for page in generate.PAGES}


class Block(NamedTuple):
    """A fenced block: its first word, what else its fence says, its text."""

    page: str
    line: int
    language: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    fence = re.compile(r"^```(\S*) ?([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for name, page in BY_NAME.items():
        text = page.read_text(encoding="utf-8")
        for match in fence.finditer(text):
            yield Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2], match[3])


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if not block.note.startswith("no-run")]


def test_every_page_has_its_blocks_and_says_what_they_are() -> None:
    assert {"README.md", "docs/quickstart.md", "docs/memory-budgets.md"} <= {block.page for block in BLOCKS}
    for block in BLOCKS:
        assert block.language in ("", "sh", "python", "toml", "{toctree}", "{eval-rst}"), block
        assert re.fullmatch(r"(no-run: \w.+)?", block.note), f"{block}: a block that isn't run has a reason"
        if not block.language:  # what a program prints, and drawings
            assert not re.search(r"^(localgrad|python|import|from) ", block.text, re.MULTILINE), block


# Python ----------------------------------------------------------------------------------------------------------


def run_python(name: str, **given: Any) -> dict[str, Any]:
    """Run a page's blocks one after another, as a reader would, and give back what they name."""
    namespace = dict(given)
    for block in RUN:
        if (block.page, block.language) == (name, "python"):
            code = ast.increment_lineno(ast.parse(block.text), block.line)
            exec(compile(code, str(BY_NAME[name]), "exec"), namespace)
    return namespace


SMALL = {
    "swin": {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "vit": {"depth": 4, "embed_dim": 48},
}


@pytest.fixture(params=["small", pytest.param("as they stand", marks=pytest.mark.heavy)])
def models(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that pages make, small or as they stand; and a folder for what they write."""
    create = timm.create_model

    def create_small(name: str, **options: Any) -> torch.nn.Module:
        return create(name, **options, **SMALL[name.split("_", maxsplit=1)[0]])

    if request.param == "small":
        monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def a_loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(2, 3, 224, 224), torch.randint(100, (2,)))]


ALONE = {"README.md", "docs/parallel.md"}


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("name", sorted({block.page for block in RUN if block.language == "python"} - ALONE))
def test_the_python_of_a_page_runs(name: str) -> None:
    run_python(name)


@pytest.mark.usefixtures("models")
def test_the_python_of_the_readme_trains_the_model() -> None:
    named = run_python("README.md", loader=a_loader())
    assert len(named["result"].losses) == 4
    assert all(loss.isfinite() for loss in named["result"].losses)
    assert len(named["learner"].optimizers) == 4


@pytest.mark.usefixtures("models")
def test_the_python_of_several_processes_runs_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts it; what several do is for test_parallel.py."""
    team = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in team.items():
        monkeypatch.setenv(name, str(value))
    named = run_python("docs/parallel.md", loader=a_loader(), epochs=1)
    assert named["weights"].keys() == named["model"].state_dict().keys()


# Commands --------------------------------------------------------------------------------------------------------


def commands(language: str = "sh") -> Iterator[Any]:
    for block in RUN:
        if block.language == language:
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    marks = [pytest.mark.heavy] if "--plugin" in words else []  # a process of its own
                    yield pytest.param(words, id=f"{block.page}: {' '.join(words)}", marks=marks)


command_of = cache(typer.main.get_command)


def parse(app: typer.Typer, words: list[str]) -> None:
    """Hold options and arguments against the command line, and run nothing."""
    command: Any = command_of(app)
    if words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_is_one(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    match words:
        case ["localgrad", *rest]:
            check_localgrad(rest)
        case ["python", "-m", "research.reproduce", *rest]:
            parse(reproduce.app, rest)
        case ["python", "-m", "research.census", *rest]:
            from research.census.__main__ import parser

            parser().parse_args(rest)
        case ["python", "-m", "research.simulated_card", *rest]:
            from research.simulated_card.__main__ import parser

            given = parser().parse_args(rest)
            assert given.arguments
            assert not given.script or (ROOT / given.arguments[0]).exists()
        case ["python", script, *rest]:
            text = (ROOT / script).read_text(encoding="utf-8")
            assert all(f'"{word}"' in text for word in rest if word.startswith("--"))
        case ["make", target]:
            assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            extra = re.fullmatch(r"(?:\.|localgrad)(?:\[(\w+)\])?", what)
            assert extra
            assert extra[1] is None or extra[1] in extras
        case _:
            raise AssertionError(f"no test knows what to do with {words}; say `no-run` and why")


def check_localgrad(words: list[str]) -> None:
    parse(cli.app, list(words))
    needs_a_file = {"--resume", "--plan", "--recipe", "--budget"}
    if words[0] == "train" and not needs_a_file & set(words):
        if "--plugin" in words:  # in a process of its own, as a name is registered once
            command = [sys.executable, "-m", "localgrad", *words, "--dry-run"]
            ran = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr
            assert tomllib.loads(ran.stdout)["model"]
            return
        if "hf:./vit" in words:  # of which the config is read
            pytest.importorskip("transformers").ViTConfig().save_pretrained("vit")
        told = CliRunner().invoke(cli.app, [*words, "--dry-run"])
        assert told.exit_code == 0, told.exception or told.output
        assert tomllib.loads(told.output)["model"]


# What is made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_made_of_code_and_results_is_in_step(name: str) -> None:
    text = BY_NAME[name].read_text(encoding="utf-8")
    assert generate.filled(text) == text, f"{name} is out of step; type: python -m docs.generate"


def test_every_benchmark_tells_what_it_takes() -> None:
    programs = {path.name: path.read_text() for path in ROOT.glob("research/benchmarks/*.py")}
    started = {name: text for name, text in programs.items() if '__name__ == "__main__"' in text}
    assert len(started) > 10
    assert not [name for name, text in started.items() if "ArgumentParser(" not in text and "typer." not in text]


def test_published_commands_start_from_a_clone() -> None:
    """As modules, which find each other there; by its path, Python finds a script's own folder alone."""
    pages = {
        path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/docs/*.md"))
    }
    by_path = {
        (path.name, each) for path in pages for each in re.findall(r"python\s+(research/[\w/]+\.py)", pages[path])
    }
    assert by_path == {("parallel.md", "research/benchmarks/pipelining.py")}, "it is started by torchrun, too"
    modules = sorted({name for text in pages.values() for name in re.findall(r"python\s+-m\s+(research[\w.]+)", text)})
    assert len(modules) > 10
    program = f"import importlib\nfor name in {modules}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_picture_of_accuracy_and_memory_is_in_step() -> None:
    assert picture.is_in_step(), "the results have changed since; type: python -m docs.generate"


def test_the_readme_tells_the_published_gap_in_its_first_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert "| **gap, points** | **−5.1** | **−2.0** | **−5.3** |" in lines[:30]  # noqa: RUF001  # minus signs
    assert "| four local modules (feature reconstruction) | 86.28 | 73.00 | 66.89 |" in lines[:30]


def test_every_key_of_the_recipe_is_in_its_table() -> None:
    from localgrad.app.recipe import Execution, TrainingSettings

    made = "\n".join(generate.recipe())
    for prefix, kind in (("training", TrainingSettings), ("execution", Execution)):
        for name in kind.__dataclass_fields__:
            assert re.search(rf"^\| `{prefix}\.{name}` \| .* \| .* \| \S.+ \|$", made, re.MULTILINE), name
    assert re.search(r"^\| `execution\.buffers` \|  \| `2` \| [Bb]atches that may be on their way", made, re.MULTILINE)


def test_what_fields_declare_is_found() -> None:
    own = SimpleNamespace(help="Which | one.", panel="Method", name="")

    @dataclass
    class Settings:
        """Some."""

        how_many: Literal["a", "b"] | None = field(default=None, metadata={"option": own})
        rest: dict[str, int] = field(default_factory=dict, metadata={"option": own, "entries": {"depth": own}})

    assert list(generate._section("Some", Settings, "some."))[4:] == [
        "| `some.how_many` | `--how-many` |  | Which \\| one (`a`, `b`) |",
        "| `some.rest` | `--rest` |  | Which \\| one |",
        "| `some.rest.depth` | `--depth` |  | Which \\| one |",
        "",
    ]


def test_the_architecture_page_has_every_package_in_its_layer() -> None:
    page, laws = BY_NAME["docs/architecture.md"].read_text(), ast.parse((ROOT / "tests/test_laws.py").read_text())
    listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| \S.+ \|$", page, re.MULTILINE)
    layers = next(
        ast.literal_eval(node.value)
        for node in laws.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    names = [name for row in listed for name in re.findall(r"`(\w+)`", row)]
    assert [*names, "__main__"] == [name for layer in layers for name in layer]


@pytest.mark.parametrize("name", BY_NAME)
def test_lines_are_short(name: str) -> None:
    """But for rows of tables, what is made, and what can't be broken."""
    text = MADE.sub("", BY_NAME[name].read_text(encoding="utf-8"))
    long = [line for line in text.splitlines() if len(line) > 100 and not line.startswith("|") and " " in line.strip()]
    assert long == []
