"""`localgrad.memory.temporaries`: what operators take, beside what they take on a simulated card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from localgrad.memory.cards import CARDS, MIB, card_named
from localgrad.memory.temporaries import TABLE, attention_kernel, moves_of, staging_bytes, workspace_bytes

if TYPE_CHECKING:
    from simulated import SimulatedCard

SCRIPT = Path(__file__).with_name("operators_on_a_card.py")


def beside(simulated: SimulatedCard, name: str, *, reductions: int) -> int:
    """Compare each operator on a card; how many cases there were."""
    printed = simulated.run(SCRIPT, str(reductions), card=card_named(name), total_bytes=1 << 37)
    answer = json.loads(printed.splitlines()[-1])
    different = {case: each for case, each in answer.items() if each[0] != each[1]}
    assert not different, f"torch {torch.__version__} takes something else on {name}: mend TABLE for {different}"
    return len(answer)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["T4", "RTX 4090", "A100-40GB", "RTX 3060", "H200", "B200"])
def test_operators_of_many_sizes_take_what_the_table_says(simulated: SimulatedCard, name: str) -> None:
    assert beside(simulated, name, reductions=200) > 150


def test_every_entry_has_a_reason_and_a_source() -> None:
    for entry in TABLE.values():
        assert entry.reason
        assert ".cu" in entry.source or ".h" in entry.source or ".cpp" in entry.source


def test_a_bias_gradient_takes_more_where_a_card_runs_more_threads() -> None:
    shape, strides = (64 * 3136, 96), (96, 1)
    taken = {name: staging_bytes(shape, strides, {0}, card)[0] for name, card in CARDS.items()}
    assert taken["H200"] > taken["RTX 4090"] > taken["T4"] > 0
    assert staging_bytes((64, 96), (96, 1), {0}, card_named("H200")) == (0, 0)  # one block sums so few


def test_the_workspace_is_larger_from_hopper_on() -> None:
    assert workspace_bytes(card_named("H100")) == workspace_bytes(card_named("RTX 5090")) == 32 * MIB
    assert workspace_bytes(card_named("A100-80GB")) == workspace_bytes(card_named("T4")) == 8.125 * MIB


@pytest.mark.parametrize(
    ("name", "dtype", "has_mask", "kernel"),
    [
        ("H200", torch.bfloat16, False, "flash"),
        ("H200", torch.bfloat16, True, "efficient"),
        ("H200", torch.float32, False, "efficient"),
        ("T4", torch.float16, False, "efficient"),
        ("T4", torch.bfloat16, False, "math"),
        ("H200", torch.float64, False, "math"),
    ],
)
def test_the_attention_kernel_follows_card_type_and_mask(
    name: str,
    dtype: torch.dtype,
    has_mask: bool,
    kernel: str,
) -> None:
    chosen, why = attention_kernel(card_named(name), dtype, 64, has_mask=has_mask)
    assert chosen == kernel
    assert why


def test_most_operators_take_nothing() -> None:
    x = torch.empty(4, 4)
    assert moves_of(torch.ops.aten.mul.Tensor, (x, x), card_named("H200")) is None
    assert moves_of(torch.ops.aten.native_layer_norm.default, (x, [4], None, None, 1e-5), card_named("H200")) == [
        ("outputs", 0)
    ]
