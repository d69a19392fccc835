"""Names for what can be chosen: objectives, decoders, classifiers, sinks, backbones, transforms; and plugins.

What ships with localgrad registers by the same call as what others add. A name is looked for among what was
registered, then among the Python entry points of the kind's group (``localgrad.objectives``, ...), which an installed
package declares; those are imported when they are asked for, and so is what ships behind an extra (``declare``). A
plugin is any module whose import registers something.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, final

from localgrad.errors import RecipeError, arg, did_you_mean, reason_of

T = TypeVar("T")


@final
class Registry(Mapping[str, T]):
    """What there is of one kind, by name.

    Args:
        kind: one word, for messages; its plural names the group of entry points.
        base: the class that what is registered must inherit from; by default anything that can be called is taken.
    """

    def __init__(self, kind: str, base: type | None = None) -> None:
        self.kind, self.base = kind, base
        self.group = f"localgrad.{kind}s"
        self._known: dict[str, T] = {}
        self._declared: dict[str, metadata.EntryPoint] = {}

    def register(self, name: str, value: T) -> None:
        """Give something a name.

        Raises:
            RecipeError: the name is none, or another's; or what is named isn't of this kind.
        """
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(f"register_{self.kind}: {name!r} is no name; take letters, digits, _, - and dots.")
        self._check(f"register_{self.kind}({name!r})", value)
        if name in self._declared:
            raise RecipeError(f"register_{self.kind}: {name!r} is localgrad's own; take another name.")
        before = self._known.get(name, value)
        if _home_of(before) != _home_of(value):  # the same one again comes of a module that is loaded anew
            raise RecipeError(f"register_{self.kind}: {name!r} is {_home_of(before)} already; take another name.")
        self._known[name] = value

    def declare(self, name: str, place: str) -> None:
        """Name what ships as ``module:name``, to be imported when asked for: it stands higher up, or needs an extra."""
        self._declared[name] = metadata.EntryPoint(name, place, self.group)

    def find(self, name: str) -> T:
        """What has a name.

        Raises:
            RecipeError: nothing; the message says what there is.
        """
        try:
            return self[name]
        except (KeyError, TypeError):
            raise RecipeError(
                f"{arg(self.kind)}: unknown {name!r}; there are {', '.join(self)}, and what a plugin registers."
                f"{did_you_mean(str(name), self)}"
            ) from None

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            [*found] = metadata.entry_points(group=self.group, name=name) if isinstance(name, str) else ()
            found = [self._declared[name]] if name in self._declared else found
            if not found:
                raise KeyError(name)
            try:
                value = found[0].load()
            except Exception as error:  # whatever a package's import says
                raise RecipeError(
                    f"{self.kind} {name!r}: {found[0].value} can't be imported ({_said(error)})."
                ) from error
            self._check(f"{self.kind} {name!r} ({found[0].value})", value)
            self._known[name] = value
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        installed = (each.name for each in metadata.entry_points(group=self.group))
        return iter(dict.fromkeys([*self._known, *self._declared, *installed]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _check(self, what: str, value: object) -> None:
        if self.base is not None and not (isinstance(value, type) and issubclass(value, self.base)):
            raise RecipeError(f"{what}: got {value!r}; give a class that inherits from localgrad.{self.base.__name__}.")
        if not callable(value):
            raise RecipeError(f"{what}: got {value!r}; give a class or a function.")


def _home_of(value: object) -> str:
    """Where something is defined: the same for a script that runs and the module that is imported of it."""
    module, named = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{getattr(sys.modules.get(module), '__file__', module)}: {named}" if module and named else repr(value)


def misfit(kind: Callable[..., Any], options: Mapping[str, Any], error: TypeError, given: Collection[str] = ()) -> str:
    """Which of its options a class can't take, and which it has; where that can't be told, what Python said.

    What localgrad gives by keyword itself (``given``) is no option.
    """
    try:
        parameters = [*inspect.signature(kind).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in given]
    strange = [name for name in options if name not in known]
    if not strange or not known or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return f"can't take {dict(options)} ({error})."
    return f"can't take {strange[0]!r}; its options are {', '.join(known)}.{did_you_mean(strange[0], known)}"


def load_plugins(names: Iterable[str]) -> None:
    """Import modules that register something, from wherever Python finds modules or from the current folder.

    Raises:
        RecipeError: there is no such module, or its import fails.
    """
    for name in names:
        _import("plugins", name)


def function_named(option: str, text: str) -> Callable[..., Any]:
    """Import what ``module:function`` names; the option that it stands in is for messages.

    Raises:
        RecipeError: there is no such module or function.
    """
    module, _, name = text.partition(":")
    found: Any = _import(option, module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RecipeError(f"{arg(option)}: there is no function {name!r} in the module {module!r}.")
    return found  # type: ignore[no-any-return]


def name_of_function(option: str, function: Callable[..., Any]) -> str:
    """``module:function``, by which a function is found again.

    Raises:
        RecipeError: it can't be found by a name: a lambda, or a function within another one.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not function:
        raise RecipeError(
            f"{arg(option)}: {function!r} can't be found again by a name, as resuming must; define a function in a "
            "module."
        )
    return f"{module}:{name}"


def _import(option: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that nothing installed is hidden; stays, for what the module imports later
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        known = Path(name).stem if name.endswith(".py") else "my_module"
        raise RecipeError(f"{arg(option)}: {name!r} is no name of a module; write it as import does, such as {known}.")
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a user's code says
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise RecipeError(
                f"{arg(option)}: there is no module {name!r}, neither in the current folder ({here}) nor installed; "
                "start where it lies, or name its folder in PYTHONPATH."
            ) from error
        raise RecipeError(f"{arg(option)}: the module {name!r} can't be imported ({_said(error)}).") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"
