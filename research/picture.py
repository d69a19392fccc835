"""``python -m research.picture``: accuracy against peak memory, from scratch and fine-tuned, from the results.

python -m research.picture docs/images/accuracy.svg
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from localgrad import cli
from localgrad.errors import RecipeError
from research import panels
from research.benchmarks import finetuning
from research.panels import Panel, Point, family_of
from research.reproduce.plot import panel_of
from research.reproduce.profiles import CPU_FULL
from research.reproduce.tables import TABLES

RESULTS = Path(__file__).parent / "results"
SHOWN = RESULTS.parents[1] / "docs" / "images" / "accuracy.svg"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def all_panels(results: Path = RESULTS) -> list[Panel]:
    """From scratch on all images, a panel a data set that was run; then fine-tuned, on few images and on all."""
    names = ("cifar10", "cifar100")
    scratch = [panel_of(TABLES[name], CPU_FULL, results) for name in names]
    return [panel for panel in (*scratch, *map(_fine_tuned, (5_000, None))) if panel is not None]


def _fine_tuned(images: int | None) -> Panel | None:
    results = finetuning.read()
    points = []
    for method, changes in finetuning.METHODS.items():
        figures = finetuning.figures_of("vit", images, method, results)
        if figures is not None and method != "scratch":  # fifteen points below the others, and not fine-tuned
            family = family_of(
                changes["local.modules"],
                is_recomputed="execution.checkpoint" in changes,
                is_in_part=not {"training.freeze", "model.lora"}.isdisjoint(changes),
            )
            points.append(Point(method, family, figures.estimated, figures.accuracies))
    title = f"fine-tuned, ViT on CIFAR-10: {'all' if images is None else f'{images:,}'} images"
    return Panel(title, tuple(points)) if points else None


def is_in_step(path: Path = SHOWN) -> bool:
    """Whether a picture (.svg) has every method and accuracy of the results, and no other."""
    drawn = re.findall(r">([^<>]+ \([0-9.]+\))</text>", path.read_text(encoding="utf-8")) if path.exists() else []
    return sorted(drawn) == sorted(point.label for panel in all_panels() for point in panel.points)


@app.command()
def picture(path: Annotated[Path, typer.Argument(help="A picture, .svg or .png.")] = SHOWN) -> None:
    """Draw accuracy against peak memory, all methods, from the results."""
    drawn = all_panels()
    if not drawn:
        raise RecipeError("nothing was run yet; type python -m research.reproduce --profile cpu-full first.")
    panels.draw(drawn, path)
    typer.echo(f"{path}: {'; '.join(panel.title for panel in drawn)}")


if __name__ == "__main__":
    cli.main(app)
