"""`localgrad.memory.cards`: names of cards, and what of a budget is left for tensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from localgrad.errors import BudgetError
from localgrad.memory.cards import CARDS, CONTEXT_BYTES, Card, available_bytes, card_named, card_of

if TYPE_CHECKING:
    from simulated import SimulatedCard

GIB = 1 << 30


def card(total_bytes: int, context_bytes: int) -> Card:
    settings = {**asdict(CARDS["A10"]), "total_bytes": total_bytes, "context_bytes": context_bytes}
    return Card(**settings)


def test_a_card_is_found_however_its_name_is_written() -> None:
    assert card_named("rtx4090") is card_named("NVIDIA RTX-4090") is CARDS["RTX 4090"]
    with pytest.raises(BudgetError, match=r"budget|card.*take T4"):
        card_named("GTX 1")


def test_where_there_is_no_card_one_is_assumed_and_it_is_known() -> None:
    assert card_of("auto").assumed
    assert not card_of("T4").assumed


@pytest.mark.parametrize(
    ("total", "gone", "budget", "left"),
    [
        (8 * GIB, CONTEXT_BYTES, 4 * GIB, 4 * GIB - CONTEXT_BYTES),  # a card that is only named
        (8 * GIB, CONTEXT_BYTES, None, 8 * GIB - CONTEXT_BYTES),
        (8 * GIB, 0, 8 * GIB, 8 * GIB),  # a simulated one has no context
        (8 * GIB, 6 * GIB, 4 * GIB, 2 * GIB),  # others hold most of it
        (80 * GIB, 40 * GIB, 20 * GIB, 20 * GIB - CONTEXT_BYTES),  # others hold some, and don't matter
        (8 * GIB, CONTEXT_BYTES, 1, 0),
    ],
)
def test_what_of_a_budget_is_left_for_tensors(total: int, gone: int, budget: int | None, left: int) -> None:
    assert available_bytes(card(total, gone), budget) == left


@pytest.mark.heavy
def test_the_card_here_is_asked(simulated: SimulatedCard) -> None:
    code = (
        "import json, torch, dataclasses; from localgrad.memory.cards import card_here; kept = torch.empty(1 << 20, "
        "device='cuda'); print(json.dumps(dataclasses.asdict(card_here())))"
    )
    found = json.loads(simulated.run(code, card=CARDS["T4"], taken_bytes=3 << 20))
    expected = {**asdict(CARDS["T4"]), "context_bytes": 3 << 20, "capability": [7, 5]}
    assert found == expected | {"name": found["name"]}
