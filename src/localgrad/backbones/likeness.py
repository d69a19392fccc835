"""What makes two modules compute alike, so that what is found out about one holds for the other.

By content and not by name: the classes' own code and what it refers to, plain attributes, shapes. A class that was
defined again under its old name, a method that was replaced in a class or in an instance, another closure or another
helper function make another module. Where content can't be read (an object of a foreign class, say), nothing is alike.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from localgrad.backbones.fake import FakeTensor
from localgrad.backbones.hooks import OUR_PACKAGES, is_ours

RATES = ("p", "drop_prob")
"""Where torch's dropout and timm's drop path keep their rate, by which the blocks of a model differ.

Which rate it is changes neither form nor cost, whether there is one does. All other numbers count exactly."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LIBRARIES = OUR_PACKAGES | sys.stdlib_module_names | {"numpy", "einops", "torchvision"}
_NOT_COMPARED = frozenset({"training", "name", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"})
_HOOKS = ("_forward_", "_backward_", "_state_dict_", "_load_state_dict_")


def signature(module: nn.Module) -> str | None:
    """The same text for modules that cost the same, also in another process; ``None`` where one isn't readable."""
    reader = _Reader()
    text = reader.read(module)
    return None if reader.is_opaque else text


def likeness(module: nn.Module) -> Hashable | None:
    """The same for modules that compute alike, whatever their weights, in this process.

    As ``signature``, and the classes themselves, and the values of single integers; ``None`` where something isn't
    readable. Waits for a device where such integers are on one.
    """
    reader = _Reader()
    text = reader.read(module)
    if reader.is_opaque or reader.has_tensors:
        return None
    integers = [b for b in module.buffers() if b.numel() == 1 and not (b.is_floating_point() or b.is_complex())]
    single = [buffer.item() for buffer in integers if not (buffer.is_meta or isinstance(buffer, FakeTensor))]
    return text, tuple(reader.classes), tuple(single)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module runs code that is neither PyTorch's nor timm's nor this package's."""
    reader = _Reader()
    reader.read(module)
    return reader.is_foreign


@final
class _Reader:
    """Reads one module.

    Attributes:
        is_opaque: whether it has something that can't be read.
        has_tensors: whether it keeps tensors as plain attributes, whose values aren't read.
        is_foreign: whether some of its code isn't ours.
    """

    def __init__(self) -> None:
        self.is_opaque = self.has_tensors = self.is_foreign = False
        self.classes: dict[type, object] = {}
        self._functions: dict[int, object] = {}
        self._objects: set[int] = set()

    def read(self, module: nn.Module) -> str:
        """A digest of the module."""
        digest = hashlib.sha256()
        parts = dict(module.named_modules())
        self._parts = {id(part): name for name, part in parts.items()}
        for name, part in parts.items():
            digest.update(repr((name, self._class(type(part)), self._attributes(part))).encode())
            for tensor_name, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None:
                    digest.update(repr((tensor_name, *tensor.shape, tensor.dtype, tensor.requires_grad)).encode())
        return digest.hexdigest()

    def _attributes(self, part: nn.Module) -> list[tuple[str, object]]:
        found = []
        told: Callable[[nn.Module], dict[str, Any]] = getattr(type(part), "told_as", vars)
        values = told(part)
        for name, value in values.items():
            if name in _NOT_COMPARED or name.startswith(_HOOKS):
                continue
            is_rate = name in RATES and isinstance(value, float)
            found.append((name, value != 0 if is_rate else self._value(value)))
        for table in ("_forward_hooks", "_forward_pre_hooks"):  # they may change what is computed
            found.append((table, [self._value(hook) for hook in vars(part)[table].values()]))
        return sorted(found, key=lambda item: item[0])

    def _value(self, value: Any) -> object:
        if type(value) in _PLAIN:  # most are
            return type(value).__name__, value
        readers: tuple[tuple[Any, Callable[[Any], object]], ...] = (
            (enum.Enum, lambda v: (type(v).__qualname__, v.name)),
            (_PLAIN, lambda v: (type(v).__name__, v)),
            ((tuple, list), lambda v: (type(v).__name__, [self._value(item) for item in v])),
            ((set, frozenset), lambda v: (type(v).__name__, sorted(map(self._value, v), key=repr))),
            (dict, lambda v: (type(v).__name__, [(self._value(key), self._value(item)) for key, item in v.items()])),
            (functools.partial, lambda v: (self._value(v.func), self._value(v.args), self._value(v.keywords))),
            (types.FunctionType, self._function),
            (types.MethodType, lambda v: (self._value(v.__func__), self._value(v.__self__))),
            (types.BuiltinFunctionType, lambda v: v.__name__),
            (types.ModuleType, lambda v: self._library(v.__name__, v.__name__)),
            ((torch.dtype, torch.device, torch.memory_format), repr),
            (type, self._class_value),
            (Tensor, self._tensor),
        )
        read = next((read for kinds, read in readers if isinstance(value, kinds)), self._object)
        return read(value)

    def _library(self, home: str, name: str) -> object:
        """What is known by its name, where it is of a library; of users' own modules anything may be read."""
        self.is_opaque |= home.partition(".")[0] not in _LIBRARIES
        return home, name

    def _class_value(self, value: type) -> object:
        if issubclass(value, nn.Module):
            return self._class(value)
        return self._library(value.__module__, value.__qualname__)

    def _tensor(self, value: Tensor) -> object:
        self.has_tensors = True
        return "tensor", tuple(value.shape), value.dtype

    def _object(self, value: Any) -> object:
        if id(value) in self._parts:
            return "part", self._parts[id(value)]
        if (is_ours(value) or dataclasses.is_dataclass(value)) and hasattr(value, "__dict__"):
            if id(value) in self._objects:
                return "seen"
            self._objects.add(id(value))
            kind = type(value)
            name = self._class(kind) if isinstance(value, nn.Module) else (kind.__module__, kind.__qualname__)
            if isinstance(value, nn.Module):
                self.is_opaque = True  # a module that is nobody's part: its weights may be anything
            return name, self._value({key: item for key, item in vars(value).items() if not key.startswith("__")})
        self.is_opaque = True
        return type(value).__qualname__

    def _class(self, kind: type) -> object:
        """A class with the code of all that it inherits, but for what every module has."""
        if kind not in self.classes:
            self.classes[kind] = None  # a class may refer to itself
            found = []
            for base in kind.__mro__[: kind.__mro__.index(nn.Module) if nn.Module in kind.__mro__ else 1]:
                ours = is_ours(base)
                self.is_foreign |= not ours
                members = [(name, self._member(name, value, ours=ours)) for name, value in vars(base).items()]
                found.append((base.__module__, base.__qualname__, [item for item in members if item[1] is not None]))
            self.classes[kind] = hashlib.sha256(repr(found).encode()).hexdigest()
        return self.classes[kind]

    def _member(self, name: str, value: Any, *, ours: bool) -> object:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            return [self._function(f) for f in (value.fget, value.fset) if isinstance(f, types.FunctionType)]
        if isinstance(value, functools.cached_property):
            value = value.func
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return None if ours or (name.startswith("__") and name.endswith("__")) else self._value(value)

    def _function(self, function: types.FunctionType) -> object:
        if id(function) in self._functions:
            return self._functions[id(function)]
        name = function.__globals__.get("__name__"), function.__qualname__
        self._functions[id(function)] = name  # it may call itself
        found: list[object] = [name, _text_of(function.__code__)]
        if not is_ours(function):
            self.is_foreign = True
            found.append(self._value((function.__defaults__, function.__kwdefaults__)))
            for global_name in _names_in(function.__code__):
                if global_name in function.__globals__:
                    found.append((global_name, self._value(function.__globals__[global_name])))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # empty yet
                continue
            is_class = isinstance(content, type)  # for super()
            found.append(content.__qualname__ if is_class else self._value(content))
        self._functions[id(function)] = found
        return found


_texts: dict[int, tuple[types.CodeType, str]] = {}  # with the code itself, so that its number isn't given again


def _text_of(code: types.CodeType) -> str:
    """A digest of code, whatever file and line it stands in."""
    if id(code) not in _texts:
        consts = [_text_of(c) if isinstance(c, types.CodeType) else _const(c) for c in code.co_consts]
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        text = repr((code.co_code, getattr(code, "co_exceptiontable", b""), consts, names, counts))
        _texts[id(code)] = code, hashlib.sha256(text.encode()).hexdigest()
    return _texts[id(code)][1]


def _const(value: object) -> object:
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


def _names_in(code: types.CodeType) -> Iterable[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names_in(const)
