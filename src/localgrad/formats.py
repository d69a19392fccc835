"""The versions of what is written to disk: each kind of file carries a number, and older numbers are read.

Files of 0.1.0 carry none, and count as 1 (its checkpoints carry 2). A file whose number is newer than what this version
knows is refused in one line: it was written by a newer localgrad, and may mean something else.
"""

from __future__ import annotations

import os
from pathlib import Path

from localgrad.errors import LocalgradError, RecipeError, arg

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
"""What JSON can hold."""


def check_format(what: str, found: object, newest: int, error: type[LocalgradError], *, oldest: int = 1) -> int:
    """The format number of a file, if this version reads it.

    Args:
        what: the file, for the message: ``plan``, ``checkpoint runs/x/checkpoints/last.pt``.
        found: the number that it carries.
        newest: the number that this version writes.
        error: what is raised.
        oldest: the first number that this version reads.

    Raises:
        LocalgradError: ``error``: no number, or one that isn't read; the message says what to do.
    """
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise error(f"{what}: its format is {found!r}, which is no number of a format; restore it from a copy.")
    if found > newest:
        raise error(
            f"{what}: its format is {found}, written by a newer version; this one reads up to {newest}. Update "
            "localgrad: pip install --upgrade localgrad."
        )
    if found < oldest:
        raise error(f"{what}: its format is {found}, of an older version; this one reads {oldest} to {newest}.")
    return found


def read_input(name: str, path: Path, advice: str, error: type[LocalgradError] = RecipeError) -> str:
    """The text of a file that an argument names.

    Args:
        name: of the argument.
        path: of the file.
        advice: what to do where it can't be read.
        error: what is raised then.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as found:
        reason = found.strerror if isinstance(found, OSError) else "it is no text"
        raise error(f"{arg(name)}: {path} can't be read ({reason}); {advice}.") from found


def given_path(name: str, path: Path | str) -> Path:
    """The path that an argument names.

    Raises:
        RecipeError: an empty text, which would be the current folder.
    """
    if path == "":
        raise RecipeError(f"{arg(name)}: got an empty text; name a folder, or '.' for the current one.")
    return Path(path)


def check_output_file(name: str, path: Path) -> None:
    """Refuse a file that can't be written.

    Raises:
        RecipeError: it is a folder, or in none, or not ours to write.
    """
    folder = path.parent
    if path.is_dir():
        raise RecipeError(f"{arg(name)}: {str(path)!r} is a folder; name a file in it.")
    if not folder.is_dir():
        raise RecipeError(f"{arg(name)}: there is no folder {str(folder)!r}; make it, or name another one.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise RecipeError(f"{arg(name)}: {str(path)!r} can't be written; name a file in a folder of yours.")
