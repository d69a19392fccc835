"""Users' hooks on modules: whether there are any, and copies that leave them with the original.

They read values, log, stop; what is only tried or estimated runs none of them. PyTorch's own stay: some layers are made
of them (spectral and weight norm compute the weight).
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

OUR_PACKAGES = frozenset({"torch", "timm", "localgrad"})
"""Whose code is known by its version."""
_OF_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBALS = vars(nn.modules.module)
_OF_ALL_CALLS = [_GLOBALS[f"_global{table}"] for table in _OF_CALLS]
HOOKS_ON_ALL_MODULES: list[dict[int, Any]] = [
    hooks for name, hooks in _GLOBALS.items() if name.startswith("_global_") and isinstance(hooks, dict)
]
"""PyTorch's tables of hooks that run in calls of any module."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks, its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooks_on_all() -> bool:
    """Whether a call of any module runs hooks."""
    return any(_OF_ALL_CALLS)


def is_ours(function: object) -> bool:
    """Whether code is of PyTorch, timm or this package: a function, a class, or an object of one."""
    function = getattr(function, "__func__", function)
    scope = getattr(function, "__globals__", None)
    kind = function if isinstance(function, type) else type(function)
    home = str(kind.__module__ if scope is None else scope.get("__name__"))
    return home.partition(".")[0] in OUR_PACKAGES


def _is_users(hook: Any) -> bool:
    while isinstance(hook, partial) or type(hook).__name__ == "_WrappedHook":  # torch wraps those of loading
        hook = hook.func if isinstance(hook, partial) else hook.hook
    return not is_ours(hook)


def strip_hooks(module: nn.Module) -> None:
    """Take its users' hooks off a module; those of state dicts stay."""
    for part in module.modules():
        for table in _OF_CALLS:
            hooks = vars(part)[table]
            for number in [number for number, hook in hooks.items() if _is_users(hook)]:
                del hooks[number]


def let_go(module: nn.Module) -> None:
    """Cut what an earlier pass left (an old spectral norm's weight) off its graph: PyTorch copies nothing with one."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(part)[name] = value.detach()


def copy_without_hooks(obj: T, memo: dict[int, Any] | None = None) -> T:
    """``copy.deepcopy``, but that hooks of users stay with the original; what an earlier pass left has no graph."""
    memo = {} if memo is None else memo
    # What stands in the memo already isn't copied: not the hooks, and nothing that only they hold (locks, files).
    attributes = [pair for module in _modules_reached(obj) for pair in vars(module).items()]
    tables = [value for name, value in attributes if name.endswith("_hooks") and isinstance(value, dict)]
    memo.update({id(table): type(table)() for table in tables})
    shown = [value for _, value in attributes if isinstance(value, Tensor)]
    with torch.no_grad():
        memo.update({id(value): value.detach().clone() for value in shown if not value.is_leaf})
    copied = copy.deepcopy(obj, memo)
    for table in tables:
        memo[id(table)].update({key: copy.deepcopy(hook, memo) for key, hook in table.items() if not _is_users(hook)})
    return copied


def _modules_reached(obj: object) -> Iterator[nn.Module]:
    """The modules that a deep copy of ``obj`` copies."""
    seen: set[int] = set()
    waiting = [obj]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _HOLD_NO_MODULES):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield item
            waiting += [value for name, value in vars(item).items() if not name.endswith("_hooks")]
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        elif isinstance(item, types.MethodType):
            waiting.append(item.__self__)
        elif isinstance(item, partial):
            waiting += [item.func, item.args, item.keywords]
        else:
            waiting += getattr(item, "__dict__", {}).values()


_HOLD_NO_MODULES = (
    *(Tensor, str, bytes, int, float, type),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
)
