"""Quantities as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localgrad.errors import RecipeError
from localgrad.units import PLAINLY, format_bytes, format_rate, format_seconds, parse_bytes, printable


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        *(("6GiB", 6 * 2**30), ("6 gb", 6 * 2**30), ("1.5M", 3 * 2**19), ("800MiB", 800 * 2**20), ("17", 17), (5, 5)),
        *((6e9, 6 * 10**9), (0.8 * 2**30, int(0.8 * 2**30)), (np.int64(2**40), 2**40)),
    ],
)
def test_parse_bytes(text: str | float, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "6 apples", "-1GiB", "0", 0, "1e3", True, 0.5, float("nan"), float("inf"), None]
)
def test_parse_bytes_refuses_what_is_no_amount(text: Any) -> None:
    with pytest.raises(RecipeError, match="6GiB"):
        parse_bytes(text)


@given(st.integers(1, 10**15))
def test_printed_bytes_parse_back_within_their_digits(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.418, "0.42 s"), (41.2, "41 s"), (185, "3 min 05 s"), (7440, "2 h 04 min"), (59.7, "1 min 00 s")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_format_rate() -> None:
    assert format_rate(1234.4) == "1,234 images/s"
    assert format_rate(3.14159, "steps") == "3.14 steps/s"


def test_what_an_encoding_lacks_is_written_plainly() -> None:
    assert printable("91.2% \u2013 \u2026 \u00d7 3 é 猫 \udcff", "ascii") == r"91.2% - ... x 3 \xe9 \u732b \udcff"
    assert printable("\u2013 é", "latin-1") == "- é"
    assert printable("\u2013 é 猫", "utf-8") == "\u2013 é 猫"
    assert printable("a name \udcff", "utf-8") == r"a name \udcff"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", PLAINLY)
