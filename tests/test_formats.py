"""Files of 0.1.0 are read, files of newer versions are refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

from localgrad import run
from localgrad.app import using_runs
from localgrad.app.recipe import RECIPE_FORMAT, Recipe
from localgrad.errors import CheckpointError, LocalgradError, PartitionError, RecipeError
from localgrad.formats import check_format
from localgrad.partition import PLAN_FORMAT, Checkpointing, Forecast, Plan, forecast_of
from localgrad.training.saved import RUN_FORMAT

FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize("found", [1, 2, 3])
def test_numbers_up_to_the_newest_are_read(found: int) -> None:
    assert check_format("plan", found, 3, PartitionError) == found


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (4, "plan: its format is 4, written by a newer version; this one reads up to 3. Update localgrad: pip install"),
        (1, "plan: its format is 1, of an older version; this one reads 2 to 3"),
        *((wrong, "which is no number of a format") for wrong in (0, -1, True, "2", None, 2.0)),
    ],
)
def test_other_numbers_are_refused_in_one_line(found: object, words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        check_format("plan", found, 3, CheckpointError, oldest=2)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


# Plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan-0.1.0.json", "plan-for-ranks-0.1.0.json"])
def test_a_plan_of_the_first_version_is_read_figure_for_figure(name: str) -> None:
    values = json.loads((FILES / name).read_text())
    assert "format" not in values
    plan = Plan.from_json(json.dumps(values))
    again = json.loads(plan.to_json())
    assert again.pop("format") == PLAN_FORMAT == 2
    globally = values["forecast"].pop("global_checkpoint", None)
    assert again.pop("global_checkpoint") == globally
    of_today = {each.name: each.default for each in fields(Forecast) if each.default is not MISSING}
    of_today |= {"notes": [], "budget_parts": {}, "attention": {}}
    rivals = [{**each, "needed_bytes": 0} for each in values["forecast"]["rivals"]]
    values = {"evaluation_batch": None, **values, "forecast": {**of_today, **values["forecast"], "rivals": rivals}}
    assert again == values
    assert plan.is_for_ranks == ("ranks" in name)
    assert plan.global_checkpoint == (None if globally is None else Checkpointing.parse(globally))
    assert Plan.from_json(plan.to_json()).forecast == plan.forecast


@pytest.mark.parametrize(
    "path", sorted(Path("research/results/memory/plans").resolve().glob("*.json")), ids=lambda p: p.stem
)
def test_published_plans_are_read(path: Path) -> None:
    plan = Plan.from_json(path.read_text())
    again = Plan.from_json(plan.to_json())
    assert (again, again.forecast, again.made_for) == (plan, plan.forecast, plan.made_for)


def test_a_plan_without_a_forecast_says_so() -> None:
    plan = Plan.from_json('{"model": "vit", "num_blocks": 4, "boundaries": [2], "forecast": {}}')
    assert plan.forecast is None
    assert not plan.is_for_ranks
    with pytest.raises(PartitionError, match="no forecast; make it with `localgrad plan`"):
        forecast_of(plan)


# Recipes and runs ------------------------------------------------------------------------------------------------


def test_a_recipe_carries_its_number_and_newer_ones_are_refused() -> None:
    text = Recipe().to_toml()
    assert text.startswith(f"format = {RECIPE_FORMAT}\n")
    assert Recipe.from_toml(text) == Recipe() == Recipe.from_toml(text.split("\n", maxsplit=1)[1])
    assert "format" not in Recipe().to_dict(), "what is published is told by its values"
    with pytest.raises(RecipeError, match="recipe: its format is 99, written by a newer version"):
        Recipe.from_toml("format = 99\ncolour = 'red'\n")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run of 0.1.0 that was stopped in its second epoch."""
    return Path(shutil.copytree(FILES / "run-0.1.0", tmp_path / "run"))


def numbered(path: Path, number: int) -> None:
    """Give a JSON file of a run another format number, and the run no checksum of it."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    (path.parent / "checkpoints" / "checksums.json").unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore::localgrad.errors.RunWarning")
def test_a_run_of_the_first_version_is_evaluated_resumed_and_told(old: Path) -> None:
    assert all("format" not in (old / name).read_text() for name in ("recipe.toml", "data.json"))
    before = using_runs.evaluate_run(old)
    assert before["num_images"] == 359
    summary = run.resume(old)
    assert summary["format"] == RUN_FORMAT == json.loads((old / "summary.json").read_text())["format"]
    assert summary["epochs"] == 2
    assert (old / "recipe.toml").read_text().startswith("format = ")
    assert [json.loads(line)["epoch"] for line in (old / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert run.resume(old) == summary, "finished"


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::localgrad.errors.RunWarning")
def test_a_run_of_the_first_version_is_extended(old: Path) -> None:
    summary = run.resume(old, {"training.epochs": 3, "training.patience": 9})
    assert (summary["num_epochs"], summary["extended_at"]) == (3, 1)
    assert run.resume(old) == summary


NEWER = "its format is 3, written by a newer version"


def test_a_newer_checkpoint_is_refused_in_one_line(old: Path) -> None:
    last = old / "checkpoints" / "last.pt"
    torch.save({**torch.load(last, weights_only=True), "format": 3}, last)
    with pytest.raises(CheckpointError, match=NEWER) as raised:
        run.resume(old)
    assert "\n" not in str(raised.value)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::localgrad.errors.RunWarning")
def test_newer_run_folders_are_refused_in_one_line(old: Path) -> None:
    numbered(old / "data.json", 3)
    last = old / "checkpoints" / "last.pt"
    kept = last.read_bytes()
    last.unlink()  # which has a copy
    for use in (using_runs.evaluate_run, run.resume):
        with pytest.raises(LocalgradError, match=rf"data.json: {NEWER}") as raised:
            use(old)
        assert "\n" not in str(raised.value)
    last.write_bytes(kept)
    run.resume(old)
    numbered(old / "summary.json", 3)
    with pytest.raises(LocalgradError, match=rf"summary.json: {NEWER}"):
        run.resume(old)
