"""``python -m research.simulated_card [--total-bytes 3GiB] [--card T4] ... train --budget 3GiB``: localgrad on it."""

from __future__ import annotations

import argparse
import os
import sys

from localgrad.memory.cards import card_named
from localgrad.units import parse_bytes
from research.simulated_card.building import Unavailable
from research.simulated_card.running import environment


def main() -> None:
    """Replace this process by one that sees the card."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m research.simulated_card")
    parser.add_argument("--total-bytes", type=parse_bytes, metavar="BYTES", help="of each device")
    parser.add_argument("--taken-bytes", type=parse_bytes, default=0, metavar="BYTES", help="what others have of it")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--card", type=card_named, help="a card of the planner's table")
    parser.add_argument(
        "--values", default="2500000", help="'all', 'none', or the largest number of elements that has values"
    )
    parser.add_argument("--script", action="store_true", help="what follows is a script and its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of localgrad")
    given = parser.parse_args()
    values = {"all": True, "none": False}.get(given.values)
    try:
        made = environment(
            total_bytes=given.total_bytes,
            taken_bytes=given.taken_bytes,
            devices=given.devices,
            card=given.card,
            values=int(given.values) if values is None else values,
        )
    except Unavailable as error:
        sys.exit(f"no simulated card: {error}")
    what = [] if given.script else ["-m", "localgrad"]
    os.execve(sys.executable, [sys.executable, *what, *given.arguments], made)


if __name__ == "__main__":
    main()
