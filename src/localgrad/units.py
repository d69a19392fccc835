"""Quantities as people type and read them: bytes, seconds, rates.

Bytes are binary: ``6GiB`` is 6 * 2**30, and since graphics cards are sold in those, ``6GB`` and ``6G``
mean the same. Everything inside the package is an integer number of bytes or a float number of seconds;
these functions stand at the border only. So does what a terminal can print: ``PLAINLY`` is a handler of Python's
codecs that writes what an encoding lacks in ASCII.
"""

from __future__ import annotations

import codecs
import math
import numbers
import re
from collections.abc import Mapping

from localgrad.errors import RecipeError, arg

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)

PLAINLY = "localgrad"
"""Name of a handler of encoding errors, for ``errors=``."""
_PLAIN = {"…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "→": "->", "≤": "<=", "·": "*"}  # noqa: RUF001


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each) or ascii(each)[1:-1] for each in lacking), error.end


codecs.register_error(PLAINLY, _plainly)


def printable(text: str, encoding: str) -> str:
    """Text as an encoding can hold it: ``91.2% –`` is ``91.2% -`` in ASCII."""  # noqa: RUF002  # a dash is meant
    return text.encode(encoding, PLAINLY).decode(encoding)


def parse_bytes(text: str | float, argument: str = "budget") -> int:
    """Read an amount of memory.

    Args:
        text: such as ``6GiB``, ``6.5 GB``, ``512M``, or a number of bytes (a part of one is left out).
        argument: whose value it is, for messages.

    Returns:
        Bytes, at least 1.

    Raises:
        RecipeError: the text is not an amount.
    """
    amount: int
    match = _BYTES.fullmatch(text) if isinstance(text, str) else None
    if match is not None:
        number = float(match[1])
        if number == float("inf"):
            raise RecipeError(f"{arg(argument)}: {match[1][:20]!r}… is more memory than there is; write it like 6GiB.")
        amount = round(number * 1024 ** _POWERS[match[2].lower()])
    elif isinstance(text, numbers.Real) and not isinstance(text, bool) and math.isfinite(text):
        amount = int(text)  # of an integer of NumPy, too, and rounded down
    else:
        raise RecipeError(f"{arg(argument)}: {text!r} is not an amount of memory; write it like 6GiB or 800MiB.")
    if amount < 1:
        raise RecipeError(f"{arg(argument)}: memory must be positive, got {text!r}; write it like 6GiB.")
    return amount


def format_bytes(num_bytes: float) -> str:
    """Print bytes with three significant digits, as in ``2.34 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000:  # 1,000 and not 1,024, so that no figure has four digits before the point
            return f"{value:.0f} B" if unit == "B" else f"{value:.{_decimals(value)}f} {unit}"
        value /= 1024
    return f"{value:.{_decimals(value)}f} TiB"


def format_counts(counts: Mapping[str, int]) -> str:
    """Print what was counted by reason: ``1,234 corrupt, 3 .txt``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def format_seconds(seconds: float) -> str:
    """Print a duration: ``0.42 s``, ``41 s``, ``3 min 05 s``, ``2 h 04 min``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_rate(per_second: float, unit: str = "images") -> str:
    """Print a rate: ``1,234 images/s``."""
    return f"{per_second:,.{_decimals(per_second)}f} {unit}/s"


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
