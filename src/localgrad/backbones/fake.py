"""Copies of models, optimizers and learners whose tensors have shapes but no memory.

The private names of PyTorch that the package needs (``TorchDispatchMode``, ``FakeTensorMode``) are imported in this
file and nowhere else; ``tests/test_memory.py`` pins what we rely on.

Sources: ``torch/_subclasses/fake_utils.py`` (the copy by function mode).
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch._subclasses.fake_tensor import unset_fake_temporarily as real_tensors
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch

from localgrad.backbones.hooks import HOOKS_ON_ALL_MODULES, copy_without_hooks
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.random_numbers import random_state_kept
from localgrad.backbones.shapes import Fresh, given_by
from localgrad.errors import BackboneError, reason_of

__all__ = [
    "NEEDS_VALUES",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "TorchFunctionMode",
    "backward_under_modes",
    "by_shapes_alone",
    "copies_within",
    "copy_on_host",
    "fake_copy",
    "fake_copy_with_memo",
    "looks_at_values",
    "on_meta",
    "quick_result",
    "real_tensors",
    "without_initialization",
]

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where code asks fake tensors for values: by a condition, or as a shape."""


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """PyTorch's own, of which the compiler needs to know nothing.

    PyTorch wraps the dispatch of every mode so that the compiler leaves it alone. Nothing is compiled under the modes
    of this package; unwrapped, an operator costs less, and the compiler, which takes seconds, isn't imported.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@final
class FakeTensorMode(fake_tensor.FakeTensorMode):  # type: ignore[no-untyped-call]
    """PyTorch's own, without that wrapper, and with a quicker memory of what operators give.

    What an operator gives follows from the shapes of what it takes. PyTorch remembers that, too, but asks so much on
    the way that a known operator takes it a tenth of a millisecond, several times as long as here, where tensors are
    dense ones of a processor. What doesn't follow from shapes alone goes PyTorch's way.
    """

    _recipes: ClassVar[dict[tuple[object, ...], _Recipe | None]] = {}
    """How to make what an operator gives, by the operator and all that counts of its arguments; ``None``: no way."""

    def __init__(self) -> None:
        super().__init__()
        self.cache_enabled = False  # PyTorch's
        with torch._C._DisableTorchDispatch():  # another mode may be on
            like = FakeTensor(self, torch.empty(0, device="meta"), _CPU)
        self._attributes = {name: value for name, value in vars(like).items() if name != "fake_mode"}
        self.channels_first = False  # whether convolutions put channels first, as PyTorch's own on CUDA; cuDNN's keep
        self._hooks_put_away: list[list[tuple[dict[int, Any], dict[int, Any]]]] = []
        self.caches: list[Any] = []
        """Functions of models that remember tables of real tensors: no use among fake ones, nor the other way round."""

    def __enter__(self) -> FakeTensorMode:
        """Make tensors fake, and put away the hooks that users set on all modules at once."""
        self._forget()
        self._hooks_put_away.append([(hooks, dict(hooks)) for hooks in HOOKS_ON_ALL_MODULES if hooks])
        for hooks, _ in self._hooks_put_away[-1]:
            hooks.clear()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Make tensors real again."""
        super().__exit__(*exception)
        for hooks, kept in self._hooks_put_away.pop():
            hooks.update(kept)
        self._forget()

    def _forget(self) -> None:
        for cached in self.caches if not self._hooks_put_away else ():
            cached.cache_clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give the fake tensors that an operator gives."""
        kwargs = kwargs or {}
        known = self.known(func, args, kwargs)
        if known is not NotImplemented:
            return known
        if self.channels_first and func in _CONVOLUTIONS:
            return self._contiguous(_dispatch(self, func, types, args, kwargs))
        key = self._key_of(func, args, kwargs)
        if key is None:
            return _dispatch(self, func, types, args, kwargs)
        recipe = self._quickly(func, args, kwargs) if key not in self._recipes else None
        if recipe is not None:
            self._recipes[key] = recipe
            return recipe(self, args)
        result = _dispatch(self, func, types, args, kwargs)
        if key not in self._recipes:
            # What a user's operator gives may follow from anything, and its rule may be replaced.
            is_pytorchs = func.namespace in _NAMESPACES and torch.Tag.inplace_view not in func.tags
            self._recipes[key] = _recipe_for(result, self, args, kwargs) if is_pytorchs else None
        return result

    def known(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        """What an operator gives, where that needn't be found out any more; else ``NotImplemented``."""
        at_once = _AT_ONCE.get(func)
        if at_once is not None and (made := at_once(self, func, args, kwargs)) is not NotImplemented:
            return made
        if self.channels_first and func in _CONVOLUTIONS:
            return NotImplemented
        key = self._key_of(func, args, kwargs)
        recipe = None if key is None else self._recipes.get(key)
        return NotImplemented if recipe is None else recipe(self, args)

    def _quickly(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> _Recipe | None:
        """A recipe for an operator that PyTorch's mode needn't be asked about, which takes it up to milliseconds."""
        given = given_by(func, args, kwargs)
        if given is not None:
            return _recipe_of(given)
        if func not in _BY_KERNEL or "device" in kwargs:
            return None
        with fake_tensor.in_kernel_invocation_manager(self):  # as PyTorch's mode ends up doing
            result = func(*args, **kwargs)
        return _recipe_for(result, self, args, kwargs)

    def cpp_meta_supports_symint(self, func: Any) -> bool:
        """Whether an operator's kernel for shapes is preferred to its decomposition into others."""
        return func in _WITH_KERNELS or bool(super().cpp_meta_supports_symint(func))

    def make(
        self,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        *,
        memory: torch.UntypedStorage | None = None,
        offset: int = 0,
    ) -> FakeTensor:
        """A fake tensor in memory of its own or in some other's: ``FakeTensor(...)``, in a third of its time.

        Not while operators are tracked: they wouldn't see it being made.
        """
        with torch._C._DisableTorchDispatch():
            if memory is None:
                shaped = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                shaped = torch.empty(0, dtype=dtype, device="meta").set_(memory, offset, shape, stride)
            tensor = Tensor._make_subclass(FakeTensor, shaped, dispatch_device=True, device_for_backend_keys=_CPU)
            torch._C._set_throw_on_mutable_data_ptr(tensor)
        vars(tensor).update(self._attributes, fake_mode=self)
        return tensor

    def _value_of(self, _: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        """The value of a fake tensor that has one: ``item()``.

        Raises:
            DataDependentOutputException: it has none.
        """
        if type(args[0]) is not FakeTensor or args[0].fake_mode is not self:
            return NotImplemented
        if args[0].constant is None:
            raise DataDependentOutputException(_VALUE_OF)
        with torch._C._DisableTorchDispatch():
            return args[0].constant.item()

    def _number(self, _: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        """A single number as a fake tensor that knows its value, until something unknown is written into it."""
        if not _is_number(args[0]):
            return NotImplemented
        tensor = self.make((), (), args[0].dtype)
        with torch._C._DisableTorchDispatch():
            tensor.constant = args[0].clone()
        self.fake_tensor_converter.add_constant_storage_mapping(tensor)
        return tensor

    def _into_first(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        """What optimizers do to each parameter, with numbers that change at every step; and their counts of steps."""
        first = args[0]
        if type(first) is FakeTensor and first.constant is not None:
            if first.fake_mode is not self or first.ndim or type(args[1]) not in _NUMBERS or kwargs:
                return NotImplemented
            with torch._C._DisableTorchDispatch():
                func(first.constant, args[1])
            return first
        are_alike = all(
            type(each) is FakeTensor
            and each.fake_mode is self
            and _is_simple(each)
            and each.shape == first.shape
            and each.dtype is first.dtype
            and each.dtype.is_floating_point
            for each in args
            if type(each) not in _NUMBERS
        )
        return first if are_alike else NotImplemented

    def _as_it_is(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        """What has nothing to do with tensors."""
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)

    def _contiguous(self, made: Any) -> Any:
        """The same tensors, contiguous; those that operators just made."""
        if isinstance(made, (list, tuple)):
            return [self._contiguous(each) for each in made]
        if not isinstance(made, FakeTensor) or made.is_contiguous():
            return made
        strides = [math.prod(made.shape[axis + 1 :]) for axis in range(made.ndim)]
        return self.make(made.shape, strides, made.dtype)

    def _key_of(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[object, ...] | None:
        key = [func, torch.get_default_dtype(), *kwargs]
        is_plain = type(func) is OpOverload and self._describe(args, key) and self._describe(kwargs.values(), key)
        return tuple(key) if is_plain else None

    def _describe(self, values: Iterable[Any], key: list[object]) -> bool:
        """Add arguments to a key; false where they are more than plain values and shapes. Runs always: keep it lean."""
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if value.fake_mode is not self or not _is_simple(value):
                    return False
                key += (value.dtype, value.shape, value.stride(), value.storage_offset())
            elif kind in _PLAIN:
                key += (kind, value)  # with its type, since 1 == 1.0 == True
            elif kind is list or kind is tuple:
                key += (kind, len(value))
                if not self._describe(value, key):
                    return False
            else:
                return False
        return True


_dispatch = inspect.unwrap(fake_tensor.FakeTensorMode.__torch_dispatch__)
_PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
_WITH_KERNELS = {
    torch.ops.aten.addmm.default,
    torch.ops.aten.gelu_backward.default,
    torch.ops.aten.native_layer_norm_backward.default,
    torch.ops.aten._softmax_backward_data.default,
}
"""The slowest of those that PyTorch decomposes in Python (up to thirty operators) though it needs not."""
_BY_KERNEL = {
    *(torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.view.default),
    *(torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.t.default),
    *(torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.expand.default),
    *(torch.ops.aten.slice.Tensor, torch.ops.aten.select.int, torch.ops.aten._unsafe_view.default),
    *(torch.ops.aten.squeeze.dim, torch.ops.aten.unsqueeze.default, torch.ops.aten.sum.dim_IntList),
    *(torch.ops.aten.div_.Tensor, torch.ops.aten.bernoulli_.float, torch.ops.aten.uniform_.default),
    *(torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.add_.Tensor),
    *(torch.ops.aten._softmax.default, torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor),
}
"""Operators whose kernel for shapes is quick, and all that PyTorch's mode asks."""
_CONVOLUTIONS = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}
_NAMESPACES = ("aten", "prims")
_VALUE_OF = torch.ops.aten._local_scalar_dense.default
_AT_ONCE: dict[Any, Callable[..., Any]] = {
    _VALUE_OF: FakeTensorMode._value_of,
    torch.ops.aten.lift_fresh.default: FakeTensorMode._number,  # of torch.tensor(...)
    torch.ops.aten.add_.Tensor: FakeTensorMode._into_first,
    torch.ops.aten.mul_.Tensor: FakeTensorMode._into_first,
    torch.ops.aten.lerp_.Scalar: FakeTensorMode._into_first,
    torch.ops.aten.addcmul_.default: FakeTensorMode._into_first,
    torch.ops.aten.addcdiv_.default: FakeTensorMode._into_first,
    torch.ops.profiler._record_function_enter_new.default: FakeTensorMode._as_it_is,
    torch.ops.profiler._record_function_exit._RecordFunction: FakeTensorMode._as_it_is,
}
"""How to do what needs no recipe; ``NotImplemented``: not with these arguments."""
_NUMBERS = (int, float)
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
_CPU = torch.device("cpu")
_Recipe = Callable[[FakeTensorMode, tuple[Any, ...]], Any]
"""Given the mode and the positional arguments of an operator, makes what the operator gives."""


def _is_number(tensor: Any) -> bool:
    return type(tensor) is Tensor and tensor.ndim == 0 and tensor.device == _CPU and not tensor.is_complex()


def _is_simple(tensor: FakeTensor) -> bool:
    """Whether a fake tensor is a dense one of real numbers on a processor, of whose values nothing is known."""
    return (
        tensor.constant is None
        and tensor.fake_device == _CPU
        and tensor.layout is torch.strided
        and not tensor.dtype.is_complex
    )


@dataclass(frozen=True)
class _Given:
    """A recipe for what is an argument itself."""

    place: int

    def __call__(self, mode: FakeTensorMode, args: tuple[Any, ...]) -> Any:
        return args[self.place]


@dataclass(frozen=True)
class _Made:
    """A recipe for a tensor in memory of its own, or in that of an argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    owner: int | None

    def __call__(self, mode: FakeTensorMode, args: tuple[Any, ...]) -> FakeTensor:
        memory = None if self.owner is None else args[self.owner].untyped_storage()
        return mode.make(self.shape, self.stride, self.dtype, memory=memory, offset=self.offset)


def _recipe_of(given: Fresh | list[Fresh | None]) -> _Recipe:
    """How to make tensors in memory of their own; of none, nothing."""
    if isinstance(given, list):
        made = [None if each is None else _fresh(each) for each in given]
        return lambda mode, args: [each and each(mode, args) for each in made] or None
    return _fresh(given)


def _fresh(each: Fresh) -> _Made:
    strides = tuple(math.prod(side or 1 for side in each.shape[axis + 1 :]) for axis in range(len(each.shape)))
    return _Made(each.shape, strides, each.dtype, 0, None)


def _recipe_for(result: Any, mode: FakeTensorMode, args: tuple[Any, ...], kwargs: Kwargs) -> _Recipe | None:
    """How to make the same from other arguments of the same shapes; ``None`` where shapes alone don't tell."""
    owners: dict[int, int | None] = {}  # of storages: the argument that holds it; none for those by name or in lists
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            owners.setdefault(id(value.untyped_storage()), place)
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                owners.setdefault(id(item.untyped_storage()), None)
    if not isinstance(result, (list, tuple)):
        return _recipe_for_one(result, mode, args, owners)
    recipes = [_recipe_for_one(part, mode, args, owners) for part in result]
    known = [recipe for recipe in recipes if recipe is not None]
    return (lambda mode, args: [recipe(mode, args) for recipe in known]) if len(known) == len(recipes) else None


def _recipe_for_one(
    part: Any, mode: FakeTensorMode, args: tuple[Any, ...], owners: dict[int, int | None]
) -> _Recipe | None:
    place = next((place for place, value in enumerate(args) if value is part), None)
    if place is not None:
        return _Given(place)
    if part is None:
        return lambda mode, args: None
    is_shape = type(part) is Tensor and part.is_meta  # a kernel's
    if not (is_shape or (type(part) is FakeTensor and _is_simple(part))) or part.requires_grad:
        return None
    storage = part.untyped_storage()
    made = _Made(part.shape, part.stride(), part.dtype, int(part.storage_offset()), owners.get(id(storage)))
    if made.owner is None:
        nbytes = made(mode, ()).untyped_storage().nbytes()
        if id(storage) in owners or made.offset or nbytes != storage.nbytes():
            return None
        owners[id(storage)] = None  # what else stands in this memory has no recipe
    return made


@final
class _Copier(TorchFunctionMode):
    """While active, ``copy.deepcopy`` copies tensors by a function, whatever holds them.

    A function mode sees ``Tensor.__deepcopy__``; ``Parameter.__deepcopy__`` it doesn't, but the ``clone`` in it.
    """

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._convert = convert

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Copy a tensor; leave everything else alone."""
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.copied(tensor).requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        return self.copied(args[0]) if func is Tensor.clone else func(*args, **(kwargs or {}))

    def copied(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor, without a graph."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self._convert(tensor)


@final
class _Fakes:
    """Fake CPU tensors like real ones, on fakes of their storages.

    PyTorch's own ``FakeCopyMode`` would keep CUDA devices, break ties between parameters that share a storage, and
    forget the value of step counters.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._storages: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # original's address: both

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        value = tensor.item() if known is None and _has_a_value_to_keep(tensor) else None
        with self._fake_mode:
            if value is not None:
                scalar = torch.tensor(value, dtype=tensor.dtype).reshape(tensor.shape)
                self._storages[storage._cdata] = storage, scalar
                return scalar
            if known is None:
                known = storage, torch.empty(storage.nbytes(), dtype=torch.uint8)
                self._storages[storage._cdata] = known
        memory, offset = known[1].untyped_storage(), int(tensor.storage_offset())
        return self._fake_mode.make(tensor.shape, tensor.stride(), tensor.dtype, memory=memory, offset=offset)


def copies_within(fake_mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    """While active, deep copies of fake tensors stay in their mode; a plain deep copy would copy the mode as well."""
    return _Copier(_Fakes(fake_mode))


def _has_a_value_to_keep(tensor: Tensor) -> bool:
    # Optimizers read their step counter; fake tensors made from a Python number remember it.
    return (
        tensor.numel() == 1
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and tensor.untyped_storage().nbytes() == tensor.element_size()
    )


def backward_under_modes(tensor: Tensor, gradient: Tensor | None, *, retain_graph: bool, create_graph: bool) -> None:
    """``tensor.backward(gradient)`` that function modes don't see, so that they stay on for what is recomputed.

    A mode is off while it handles a call, and PyTorch has no public way to run a backward pass that is none.
    """
    start = torch.ones_like(tensor) if gradient is None else gradient
    _engine_run_backward(
        (tensor,), (start,), retain_graph, create_graph, (), allow_unreachable=True, accumulate_grad=True
    )


def _quick_view(tensor: FakeTensor, shape: Sequence[int]) -> Tensor:
    """A view of a fake tensor; of a contiguous one without asking what its shape gives.

    PyTorch makes the view itself of up to ten operators in Python.
    """
    mode: object = tensor.fake_mode
    is_quick = _is_simple(tensor) and tensor.is_contiguous() and tensor.numel() > 0
    if not (is_quick and isinstance(mode, FakeTensorMode)):
        plain: Tensor = torch.ops.aten.view.default(tensor, shape)
        return plain
    sizes = list(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = tensor.numel() // -math.prod(sizes)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    offset = int(tensor.storage_offset())
    return mode.make(sizes, strides, tensor.dtype, memory=tensor.untyped_storage(), offset=offset)


def quick_result(func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    """What an operator gives, without running it, for a mode that has the fake mode right below it.

    ``NotImplemented`` where it has to run. From mode to mode by PyTorch's way takes longer than this answer.
    """
    if func in _VIEWS and isinstance(args[0], FakeTensor):
        return _quick_view(*args, **kwargs)
    below = _python_dispatch._get_current_dispatch_mode()
    return below.known(func, args, kwargs) if type(below) is FakeTensorMode else NotImplemented


def fake_copy(obj: T) -> tuple[FakeTensorMode, T]:
    """Copy any object (a module, an optimizer, a learner) so that its tensors have shapes but no memory.

    The copy is ``copy.deepcopy``, with every tensor that it reaches (parameters, buffers, optimizer state, gradients,
    plain attributes, items of containers) replaced by a fake CPU tensor of the same shape, stride, dtype and
    ``requires_grad``. What shared a storage still does. CUDA and meta tensors become CPU ones, since autograd's
    backward on fake CUDA tensors needs a GPU. A tensor that a closure captured isn't reached, and the fake mode refuses
    it. Hooks of users aren't copied (``copy_without_hooks``): they read values, of which there are none.

    Returns:
        The mode inside which the copy has to be used, and the copy.

    Raises:
        TypeError: for an object that ``copy.deepcopy`` can't copy, such as a lock or an open file.
    """
    fake_mode, copied, _ = fake_copy_with_memo(obj)
    return fake_mode, copied


def fake_copy_with_memo(obj: T) -> tuple[FakeTensorMode, T, list[tuple[Any, Any]]]:
    """As `fake_copy`, with (original, copy) of everything that was reached as well."""
    fake_mode = FakeTensorMode()
    memo: dict[int, Any] = {}
    with _Copier(_Fakes(fake_mode)) as copier, _generators_made_anew():
        try:
            copied = copy_without_hooks(obj, memo)
        except TypeError as error:
            error.add_note(f"fake_copy: {type(obj).__name__} holds something that copy.deepcopy can't copy")
            raise
    pairs = _copied_in(memo)
    kinds = {base for original, _ in pairs if isinstance(original, nn.Module) for base in type(original).__mro__}
    fake_mode.caches = list({id(each): each for kind in kinds for each in _caches_of(kind)}.values())
    for original, twin in pairs:
        if isinstance(original, nn.Parameter) and original.grad is not None:
            twin.grad = copier.copied(original.grad)
    return fake_mode, copied, pairs


def _copied_in(memo: dict[int, Any]) -> list[tuple[Any, Any]]:
    """(original, copy) of what a deep copy has reached: its memo keeps the originals alive, in a list of their own."""
    return [(original, memo[id(original)]) for original in memo.get(id(memo), []) if id(original) in memo]


def optimizer_over(
    mode: AbstractContextManager[Any],
    factory: Callable[[list[nn.Parameter]], Optimizer],
    weights: Iterable[nn.Parameter],
) -> Optimizer:
    """An optimizer over weights that are shapes alone; tables that it computes for itself are, too.

    It is made in no mode, as some read the values of their tables while they make them (bitsandbytes' do).
    """
    with real_tensors():
        optimizer = factory(list(weights))
    for name, value in vars(optimizer).items() if isinstance(mode, FakeTensorMode) else ():
        if isinstance(value, dict) and value and all(type(entry) is Tensor for entry in value.values()):
            with mode:
                setattr(
                    optimizer, name, {key: torch.empty(entry.shape, dtype=entry.dtype) for key, entry in value.items()}
                )
    return optimizer


def copy_on_host(module: M) -> tuple[M, list[tuple[Any, Any]]]:
    """Copy a module so that its tensors are on the processor; gives (original, copy) of everything reached as well.

    Where its weights are of one type, floats of 16 bits become float32: a processor lacks some operators for them.
    """
    widens = len({weight.dtype for weight in module.parameters()}) == 1

    def on_host(tensor: Tensor) -> Tensor:
        small = widens and tensor.is_floating_point() and tensor.element_size() == 2
        return tensor.detach().to("cpu", torch.float32 if small else tensor.dtype, copy=True)

    memo: dict[int, Any] = {}
    with random_state_kept(), _Copier(on_host):
        copied = copy.deepcopy(module, memo)
    return copied, _copied_in(memo)


def on_meta(module: M) -> M:
    """Copy a module so that its tensors are on the meta device: shapes without memory, and in no mode.

    What shared a storage still does.
    """
    storages: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # by the original's address: both

    def as_shape(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage, torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
        memory = storages[storage._cdata][1].untyped_storage()
        shaped = torch.empty(0, dtype=tensor.dtype, device="meta")
        shaped.set_(memory, int(tensor.storage_offset()), tensor.shape, tensor.stride())
        return nn.Parameter(shaped, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shaped

    with _Copier(as_shape), _generators_made_anew():
        return copy.deepcopy(module)


@functools.cache
def _caches_of(kind: type) -> tuple[Any, ...]:
    """Functions that remember what they gave (``lru_cache``), bare or decorated again, in a class and in its file."""
    home = sys.modules.get(kind.__module__)
    values = [*vars(kind).values(), *([] if home is None else vars(home).values())]
    found: dict[int, Any] = {}
    for held in values:
        value = held.__func__ if isinstance(held, (staticmethod, classmethod)) else held
        cells = (value.__closure__ or ()) if isinstance(value, types.FunctionType) else ()
        for each in (value, *map(_cell_of, cells)):
            if isinstance(each, _Cached) and each.__wrapped__.__module__ == kind.__module__:
                found[id(each)] = each
    return tuple(found.values())


_Cached = type(functools.lru_cache(_is_number))


def _cell_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


@contextlib.contextmanager
def _generators_made_anew() -> Iterator[None]:
    # deepcopy would carry a generator's state over as a tensor, which here is a fake one.
    before = copyreg.dispatch_table.get(torch.Generator)
    copyreg.pickle(torch.Generator, lambda generator: (_seeded, (generator.initial_seed(),)))
    try:
        yield
    finally:
        del copyreg.dispatch_table[torch.Generator]
        if before is not None:
            copyreg.dispatch_table[torch.Generator] = before


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def by_shapes_alone() -> Iterator[None]:
    """A region for estimates: what the caller has on around it (no gradients, autocast, a default device) is off.

    Random states are put back.

    Raises:
        BackboneError: inside, code asked for values.
    """
    processor = contextlib.nullcontext() if torch.get_default_device() == _CPU else _CPU
    in_autocast = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)  # noqa: FBT003  # as a region it would keep cast weights until its end
    try:
        with random_state_kept(), torch.inference_mode(mode=False), torch.enable_grad(), processor:
            yield
    except NEEDS_VALUES as error:
        raise looks_at_values(error) from error
    finally:
        torch.set_autocast_enabled("cpu", in_autocast)


def looks_at_values(error: Exception) -> BackboneError:
    """The error of a model whose own forward can't do with shapes alone."""
    return BackboneError(
        f"model: its forward looks at values ({reason_of(error)}), and estimates and plans have shapes alone; "
        "LocalLearner trains it all the same, without a budget."
    )


@final
class without_initialization(TorchFunctionMode):  # noqa: N801  # used as a context manager
    """While active, parameters that are made keep whatever their memory holds: no random numbers are drawn for them.

    Buffers and everything that is computed while a model is built stay right. For a model whose values nobody reads.
    """

    SKIPPED = frozenset(
        getattr(Tensor, name)
        for name in ("uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_", "zero_", "fill_", "div_")
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Skip what would fill a parameter in place."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        is_initializer = getattr(func, "__module__", None) == "torch.nn.init"
        if isinstance(filled, nn.Parameter) and (func in self.SKIPPED or is_initializer):
            return filled
        return func(*args, **kwargs)
