"""The table of research/docs/allocator.md: predictions beside PyTorch's own allocator, on a simulated card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from localgrad.memory.cards import card_named
from research.benchmarks import allocator_table as table

if TYPE_CHECKING:
    from simulated import SimulatedCard

TESTS = Path(__file__).parent


BOTH = """
import gc, sys, torch
import compared_on_a_card, operators_on_a_card

for script, argument in (compared_on_a_card, "vit"), (operators_on_a_card, "40"):
    sys.argv = ["", argument]
    script.main()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
"""
"""Of two scripts, one after the other: what takes longest is to start a process."""


def on_an_h200(simulated: SimulatedCard, code: str | Path, *arguments: str) -> list[str]:
    """The lines that are printed there."""
    more = {"PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS.parent}:{TESTS}"}
    return simulated.run(code, *arguments, card=card_named("H200"), total_bytes=table.TOTAL, more=more).splitlines()


@pytest.fixture(scope="module")
def operators_and_model(simulated: SimulatedCard) -> tuple[Any, Any]:
    model, operators = on_an_h200(simulated, BOTH)[-2:]
    return json.loads(operators), json.loads(model)["vit"]


def test_operators_take_what_the_table_says(operators_and_model: tuple[Any, Any]) -> None:
    """On other cards, and more of them, in ``test_temporaries.py``."""
    operators, _ = operators_and_model
    assert len(operators) > 60
    assert not {case: each for case, each in operators.items() if each[0] != each[1]}


def assert_foretold(result: Any) -> None:
    assert abs(table.off(result, "allocated")) <= 0.005
    assert abs(table.off(result, "reserved")) <= 0.02
    assert table.num_same(result) >= 19
    assert not all(result["fits"]), "caps lie on both sides of the limit"
    assert any(result["fits"])


def test_a_small_model_reserves_what_is_predicted(operators_and_model: tuple[Any, Any]) -> None:
    assert_foretold(operators_and_model[1])


@pytest.mark.heavy
def test_a_small_swin_reserves_what_is_predicted(simulated: SimulatedCard) -> None:
    [*_, printed] = on_an_h200(simulated, TESTS / "compared_on_a_card.py", "swin")
    assert_foretold(json.loads(printed)["swin"])


def test_the_results_are_as_good_as_the_page_says() -> None:
    results = table.results()
    if not results:
        pytest.skip("no results yet")
    plain = [each for each in results if not table.Configuration(**each["configuration"]).convolves_inside]
    near = [abs(table.off(each, "reserved")) <= 0.005 for each in plain]
    assert sum(near) >= 0.9 * len(near)
    assert all(abs(table.off(each, "reserved")) <= 0.02 for each in plain)
    assert all(abs(table.off(each, "reserved")) <= 0.05 for each in results)
    assert sum(map(table.num_same, results)) >= 0.95 * sum(len(each["caps"]) for each in results)


def test_the_page_is_the_one_of_the_results() -> None:
    assert table.PAGE.read_text() == table.page(table.results())


def test_names_of_rows_differ() -> None:
    names = [row.name for row in table.ROWS]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.heavy
@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
def test_a_configuration_reserves_what_is_predicted(row: table.Configuration, simulated: SimulatedCard) -> None:
    script = TESTS.parent / "research" / "benchmarks" / "allocator_table.py"
    printed = simulated.run(
        script, "--group", "--json", row.name, card=card_named(row.card), total_bytes=table.TOTAL, timeout=1200
    )
    result = json.loads(printed.splitlines()[-1])
    limit = 0.05 if row.convolves_inside else 0.02
    assert abs(table.off(result, "reserved")) <= limit
