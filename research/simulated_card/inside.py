"""What a process that runs on the simulated card can ask it: counts, stalls, and another amount of memory."""

from __future__ import annotations

import collections
import ctypes
import os
import sys
import traceback

NAMES = (
    "launches",
    "products",
    "synchronisations",
    "to_host",
    "to_device",
    "on_device",
    "fills",
    "mallocs",
    "frees",
    "graphs",
    "to_device_pageable",
    "pinned_mallocs",
)
"""What is counted; ``to_device_pageable``: copies that hold the host up, as their source isn't pinned."""
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
stalls: collections.Counter[tuple[str, str]] = collections.Counter()
"""What ``watch_stalls`` found: (which call waits for the card, the Python lines that led there)."""


def is_here() -> bool:
    """Whether this process runs on the simulated card."""
    return "libsimulated_card" in os.environ.get("LD_PRELOAD", "")


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["LD_PRELOAD"])


def counts() -> dict[str, int]:
    """Calls since the start or the last ``reset``."""
    found = (ctypes.c_long * len(NAMES))()
    _library().simulated_card_counts(found)
    return dict(zip(NAMES, found, strict=True))


def reset() -> None:
    """All counts to 0."""
    _library().simulated_card_reset()


def set_total(total_bytes: int) -> None:
    """The memory of each device from now on: as if another process had taken or left some. 0: as at the start."""
    _library().simulated_card_set_total(ctypes.c_size_t(total_bytes))


def _note(call: bytes) -> None:
    lines = [
        f"{frame.filename.split('/src/')[-1].split('site-packages/')[-1]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_stack(sys._getframe(1))
        if "/torch/" not in frame.filename
    ]
    stalls[call.decode(), " < ".join(reversed(lines[-3:]))] += 1


_noting = _Callback(_note)  # kept: the library has only its address


def watch_stalls(*, on: bool = True) -> None:
    """Note in ``stalls`` what waits for the card, and from where."""
    _library().simulated_card_set_callback(_noting if on else None)
