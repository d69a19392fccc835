"""What the command line loads, in a process that has all but localgrad itself: ``ranks.py`` calls it."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Import localgrad anew, be its command line, and print which of its modules were loaded."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "localgrad"]:
        del sys.modules[name]
    cli = importlib.import_module("localgrad.cli")
    cli.app(sys.argv[1:], standalone_mode=False)
    print("loaded", *(name for name in sys.modules if name.startswith("localgrad.")))  # noqa: T201
