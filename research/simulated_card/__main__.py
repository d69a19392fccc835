"""``python -m research.simulated_card [--total-bytes 3GiB] [--card T4] ... train --budget 3GiB``: localgrad on it."""

from __future__ import annotations

import argparse
import os
import sys

from localgrad.memory.cards import card_named
from localgrad.units import parse_bytes
from research.simulated_card.building import Unavailable
from research.simulated_card.running import environment


def parser() -> argparse.ArgumentParser:
    """The options of the card, and what is run on it."""
    made = argparse.ArgumentParser(description=__doc__, prog="python -m research.simulated_card")
    made.add_argument("--total-bytes", type=parse_bytes, metavar="BYTES", help="of each device")
    made.add_argument("--taken-bytes", type=parse_bytes, default=0, metavar="BYTES", help="what others have of it")
    made.add_argument("--devices", type=int, default=1)
    made.add_argument("--card", type=card_named, help="a card of the planner's table")
    made.add_argument(
        "--values", default="2500000", help="'all', 'none', or the largest number of elements that has values"
    )
    made.add_argument("--script", action="store_true", help="what follows is a script and its arguments")
    made.add_argument("arguments", nargs=argparse.REMAINDER, help="of localgrad")
    return made


def main() -> None:
    """Replace this process by one that sees the card."""
    given = parser().parse_args()
    values = {"all": True, "none": False}.get(given.values)
    try:
        seen = environment(
            total_bytes=given.total_bytes,
            taken_bytes=given.taken_bytes,
            devices=given.devices,
            card=given.card,
            values=int(given.values) if values is None else values,
        )
    except Unavailable as error:
        sys.exit(f"no simulated card: {error}")
    what = [] if given.script else ["-m", "localgrad"]
    os.execve(sys.executable, [sys.executable, *what, *given.arguments], seen)


if __name__ == "__main__":
    main()
