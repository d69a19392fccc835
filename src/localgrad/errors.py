"""What can go wrong for a user, as one small family.

Each class is also the builtin that Python code would expect (``ValueError`` for a wrong argument,
``RuntimeError`` for a run that could not go on), so callers may catch either. The command line turns
every member into one line on standard error and exit status 2. A message says the rule, the value
it got, and what to type next. Faults of our own are ``assert``, never one of these.

Messages name arguments by ``arg``, never by hand: as Python code writes them, or as the command line does while it
runs (``naming``; what an option is called there is ``cli.py``'s matter).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath

NEAR = 0.6
"""How alike two names must be, from 0 to 1, for one to be suggested for the other."""


Naming = Callable[[str, object], str]
"""How an argument is written, from its name (or dotted key in a recipe) and a value, ``None`` for the name alone."""


def in_python(name: str, value: object) -> str:
    """An argument as Python code writes it: ``budget``, ``budget='6GiB'``."""
    name = name.rpartition(".")[2]
    return name if value is None else f"{name}={str(value) if isinstance(value, PurePath) else value!r}"


_naming: Naming = in_python


def arg(name: str, value: object = None) -> str:
    """Name an argument in a message, as whoever reads it would type it.

    Args:
        name: its Python name; or its dotted key in a recipe, where it is no more than that.
        value: one that it has, or should have; ``True`` for a flag.
    """
    return _naming(name, value)


@contextmanager
def naming(style: Naming) -> Iterator[None]:
    """A region of this process in which arguments are named in another style, whatever thread writes a message."""
    global _naming  # noqa: PLW0603  # as a language is: one a process
    before, _naming = _naming, style
    try:
        yield
    finally:
        _naming = before


class LocalgradError(Exception):
    """Base of everything that localgrad raises on purpose."""


class BackboneError(LocalgradError, ValueError):
    """A model that can't be split into stem, blocks and tail, or an input that doesn't fit it."""


class PartitionError(LocalgradError, ValueError):
    """A partition that the model does not have: too many modules, boundaries out of order."""


class BudgetError(LocalgradError, ValueError):
    """A memory budget that no plan can keep, or a plan that was made for something else."""


class RecipeError(LocalgradError, ValueError):
    """A recipe (or an option of the command line) with an unknown key or an impossible value."""


class DataError(LocalgradError, ValueError):
    """Data that is missing, empty, corrupt, or labelled outside its classes."""


class DeviceError(LocalgradError, RuntimeError):
    """A device or precision that this machine does not have."""


class ParallelError(LocalgradError, RuntimeError):
    """Processes that can't train together, or one of them that was lost."""


class MemoryExceeded(DeviceError):  # noqa: N818  # what happened, as torch's own name says
    """Memory ran out, and what was changed by then is as it was before.

    Args:
        place: the local module in whose step it was, by number; or what was done, such as ``validation``.
        reason: the allocator's first line.
    """

    def __init__(self, place: int | str, reason: str) -> None:
        super().__init__(f"memory ran out in {f'local module {place}' if isinstance(place, int) else place}: {reason}")
        self.place = place
        self.reason = reason


class RunFolderError(LocalgradError, RuntimeError):
    """A run folder that can't be written, is in use, or belongs to another recipe."""


class RunWarning(UserWarning):
    """Something in a run folder is not as it should be, and the run goes on all the same: restored, or unverifiable."""


class CheckpointError(LocalgradError, RuntimeError):
    """A checkpoint that is truncated, of another model, or of another version.

    Args:
        fact: what is wrong.
        advice: what to do about it.
    """

    def __init__(self, fact: str, advice: str = "") -> None:
        super().__init__(f"{fact}; {advice}." if advice else fact)
        self.fact = fact


class IsolationError(LocalgradError, RuntimeError):
    """A gradient crossed a boundary between local modules."""


class DivergenceError(LocalgradError, RuntimeError):
    """A loss that is no longer a finite number."""


def reason_of(error: BaseException, limit: int = 600) -> str:
    """What an error says, on one line: its useful part often stands under the first one.

    Args:
        error: of torch, of timm, or of a model's own code.
        limit: characters that are kept at most; the end matters as the beginning does, so the middle goes.

    Returns:
        All lines as one, without the C++ frames that torch may append; the error's class where it says nothing.
    """
    said = _NATIVE_FRAMES.split(str(error), maxsplit=1)[0]
    line = " ".join(said.split()) or type(error).__name__
    if len(line) <= limit:
        return line
    half = (limit - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


_NATIVE_FRAMES = re.compile(r"\n\s*(?:Exception raised from |C\+\+ CapturedTraceback|frame #0)")


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """Name the nearest known spellings of ``name``, as a sentence to append to an error.

    Args:
        name: what the user typed.
        known: what there is.
        count: how many to name at most.

    Returns:
        `` Nearest: a, b.`` with a leading space, or an empty string where nothing is near.
    """

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        start = difflib.SequenceMatcher(None, name, candidate[: len(name)]).ratio()  # swin_tiny for a longer name
        return max(whole, 0.95 * start)

    scored = sorted(((likeness(candidate), candidate) for candidate in known), key=lambda pair: (-pair[0], pair[1]))
    near = [candidate for score, candidate in scored[:count] if name and score >= NEAR]
    return f" Nearest: {', '.join(near)}." if near else ""
