"""Options: a field of settings, its help, its limits and how it is typed, declared once, beside the field.

The command line is made of these fields, and so are the docs of a recipe; nothing here (and nothing that only declares
fields) imports pydantic or torch, so that help comes at once.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from localgrad.errors import RecipeError, arg

T = TypeVar("T")
Values = dict[str, Any]
"""Values by key, as TOML has them (texts, numbers, lists, tables of the same) or an option's reader made them."""
Reader = Callable[[str, str], Any]
"""Makes a value of an option's name and its text."""

DATA, METHOD, EXECUTION, RUN = "Data", "Method", "Execution (doesn't change results)", "Run"


@dataclass(frozen=True, kw_only=True)
class Option:
    """How a field is given on the command line.

    Attributes:
        help: what it is, in a line.
        panel: of the help that lists it; ``None`` for a field without an option of its own.
        name: the option's, as Python spells it; by default the field's.
        read: from its text to a value; by default the type does that.
        key: dotted key of the field.
        kind: the type of what is typed.
        repeated: the type of each, where it may be given again and again.
        default: the field's.
    """

    help: str
    panel: str | None = None
    name: str = ""
    read: Reader | None = None
    key: str = ""
    kind: type = str
    repeated: type | None = None
    default: Any = None


def option(
    default: Any,
    help: str,
    panel: str | None = None,
    *,
    name: str = "",
    read: Reader | None = None,
    repeated: type | None = None,
) -> Any:
    """A dataclass's field with its help and, given a panel, an option; a callable default makes the value."""
    return field_of(default, Option(help=help, panel=panel, name=name, read=read, repeated=repeated))


def field_of(default: Any, own: Option) -> Any:
    """A dataclass's field that is declared."""
    told = {"option": own}
    return field(default_factory=default, metadata=told) if callable(default) else field(default=default, metadata=told)


def entries(**options: Option) -> Any:
    """The field of a dict, of which some entries have options of their own."""
    return field(default_factory=dict, metadata={"option": Option(help="Further ones."), "entries": options})


def declared(kind: type[Any], prefix: str = "") -> dict[str, Option]:
    """What the fields of a dataclass, and of dataclasses in it, declare; by dotted key."""
    return {each.key: each for each in _walk(kind, prefix)}


def _walk(kind: type[Any], prefix: str) -> Iterator[Option]:
    hints = get_type_hints(kind)
    for each in fields(kind):
        hint = hints[each.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{each.name}.")
            continue
        own: Option = each.metadata["option"]
        default = None if each.default is MISSING else each.default
        typed = str if own.read is not None else _typed(hint)
        yield replace(own, name=own.name or each.name, key=prefix + each.name, kind=typed, default=default)
        for name, inner in each.metadata.get("entries", {}).items():
            yield replace(inner, name=inner.name or name, key=f"{prefix}{each.name}.{name}")


def _typed(hint: Any) -> type:
    """What a person types for a field: a number where it takes nothing else, or text."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        return _typed(inner[0]) if len(inner) == 1 else str
    return hint if hint in (bool, int, float, Path) else str


def values_of(options: Mapping[str, Option], given: Mapping[str, Any]) -> Values:
    """What was typed (by the options' names, ``None`` where it wasn't) as values by dotted key.

    Raises:
        RecipeError: a text that can't be read.
    """
    found = {key: (each, given[each.name]) for key, each in options.items() if given.get(each.name) is not None}
    return {key: each.read(each.name, value) if each.read else value for key, (each, value) in found.items()}


def documented(kind: type[T]) -> type[T]:
    """Add what a dataclass's fields declare to its docstring."""
    lines = [f"    {each.name}: {each.metadata['option'].help}" for each in fields(kind) if "option" in each.metadata]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([f"{kind.__doc__}", "", "Attributes:", *lines])
    return kind


# Readers and limits ----------------------------------------------------------------------------------------------


def read_modules(name: str, text: str) -> int | str | list[int]:
    """Read ``4``, ``stages``, or boundaries such as ``2,5,9``; which words there are is checked by a model."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else numbers


def read_list(name: str, text: str) -> str | list[str]:
    """Read one word, or several."""
    return text.split(",") if "," in text else text


def read_numbers(*example: float) -> Reader:
    """A reader of numbers such as ``0.5,0.5,0.5``."""

    def read(name: str, text: str) -> list[float]:
        try:
            return [float(part) for part in text.split(",")]
        except ValueError:
            raise RecipeError(f"{arg(name)}: {text!r} isn't a list of numbers; take {arg(name, example)}.") from None

    return read


def read_freeze(name: str, text: str) -> int | float | str:
    """Read ``stem``, a number of blocks, or a share of them; which words there are is checked by a model."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_on_oom(name: str, text: str) -> str:
    """Read what happens when memory runs out.

    Raises:
        RecipeError: neither ``stop`` nor ``replan``.
    """
    if text not in ("stop", "replan"):
        raise RecipeError(f"{arg(name)}: unknown {text!r}; take stop or replan.")
    return text


def read_share(name: str, text: str) -> float:
    """Read a share: ``2%``, or ``0.02``.

    Raises:
        RecipeError: it is none.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1 or rest:
        raise RecipeError(f"{arg(name, text)}: expected a share such as 2% or 0.02.")
    return share


def read_whole(name: str, text: str) -> int:
    """Read a whole number where a word is taken as well."""
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"{arg(name)}: {text!r} is neither a whole number nor auto; take {arg(name, 64)}.") from None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Annotates a number that must lie within limits, and be one: ``True`` is none.

    Attributes:
        ge: least value.
        gt: what it is above.
        le: largest value.
        lt: what it is below.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """How pydantic checks it."""
        limits = {name: limit for name, limit in asdict(self).items() if limit is not None}
        return {**handler(source), "strict": True, **limits}


Count = Annotated[int, Limits(ge=0, lt=2**63)]
Positive = Annotated[int, Limits(ge=1, lt=2**63)]
Fraction = Annotated[float, Limits(ge=0, lt=1)]
Amount = Annotated[float, Limits(ge=0)]
Factor = Annotated[float, Limits(gt=0)]
Number = Annotated[float, Limits()]

STRICT = {"extra": "forbid", "allow_inf_nan": False}
"""How pydantic takes each part of a recipe."""


@dataclass(frozen=True)
class Readable:
    """Annotates a value that a function of ours must be able to read; its error is the message."""

    read: Callable[[Any], object]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """How pydantic checks it."""
        from pydantic_core import core_schema

        def check(value: Any) -> Any:
            self.read(value)
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))
