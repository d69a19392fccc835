"""``python -m localgrad``, for launchers that want a module."""

from localgrad.cli import main

main()
