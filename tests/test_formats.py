"""Files of 0.1.0 are read, files of newer versions are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localgrad.errors import CheckpointError, PartitionError
from localgrad.formats import check_format
from localgrad.partition import PLAN_FORMAT, Checkpointing, Plan, forecast_of

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
    values["forecast"] = {"global_peak_bytes": None, "parallel": None, **values["forecast"]}
    assert again == values
    assert plan.is_for_ranks == ("ranks" in name)
    assert plan.global_checkpoint == (None if globally is None else Checkpointing.parse(globally))
    assert Plan.from_json(plan.to_json()).forecast == plan.forecast


def test_a_plan_without_a_forecast_says_so() -> None:
    plan = Plan.from_json('{"model": "vit", "num_blocks": 4, "boundaries": [2], "forecast": {}}')
    assert plan.forecast is None
    assert not plan.is_for_ranks
    with pytest.raises(PartitionError, match="no forecast; make it with `localgrad plan`"):
        forecast_of(plan)
