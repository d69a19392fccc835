"""Every class is abstract or final: nobody inherits what another class needs for itself, to refuse it."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
from abc import ABC
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Protocol, is_typeddict

from torch import nn

import localgrad

EXTENSION_POINTS = {"TorchDispatchMode", "LocalTrainer"}
"""Concrete classes to inherit from, besides records (an objective adds terms to another): torch's own, typed, and a
Trainer, as people who use transformers do."""


@cache
def classes() -> list[type[Any]]:
    """Of all modules, which are imported: not when tests are collected."""
    found: dict[type[Any], None] = {}
    for info in pkgutil.walk_packages(localgrad.__path__, "localgrad."):
        if info.name == "localgrad.__main__":
            continue
        module = importlib.import_module(info.name)
        members = [value for value in vars(module).values() if inspect.isclass(value)]
        found |= {member: None for member in members if member.__module__ == info.name}
    return list(found)


def is_abstract(kind: type[Any]) -> bool:
    return inspect.isabstract(kind) or {ABC, Protocol} & set(kind.__bases__) != set()


def is_record(kind: type[Any]) -> bool:
    return is_dataclass(kind) or is_typeddict(kind) or issubclass(kind, tuple | enum.Enum)


def test_every_class_is_abstract_or_final() -> None:
    """Mark it ``@final``, or give it an abstract method."""
    neither = {
        f"{kind.__module__}.{kind.__name__}"
        for kind in classes()
        if kind.__qualname__ not in EXTENSION_POINTS
        and not (issubclass(kind, BaseException | nn.Module) or is_record(kind))
        and not (is_abstract(kind) or kind.__dict__.get("__final__"))
    }
    assert neither == set()


def test_only_what_is_abstract_is_inherited_from() -> None:
    parents = {
        base
        for kind in classes()
        for base in kind.__bases__
        if base.__module__.startswith("localgrad.")
        and not (issubclass(base, BaseException | nn.Module) or is_record(base))
    }
    assert {base.__qualname__ for base in parents if not is_abstract(base)} <= EXTENSION_POINTS
