"""Copies of models, optimizers and learners whose tensors have shapes but no memory.

``fake_copy`` is ``copy.deepcopy`` with every tensor on the way replaced by a fake one, so it reaches whatever a deep
copy reaches: parameters, buffers, optimizer state, plain attributes, items of containers. ``without_initialization``
builds a model without filling its weights, for those who want to know its shapes only.

The private names of PyTorch that the package needs (``TorchDispatchMode``, ``FakeTensorMode``) are imported in this
file and nowhere else; ``tests/test_memory.py`` pins what we rely on.

Sources: ``torch/_subclasses/fake_utils.py`` (the copy by function mode).
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import inspect
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily as real_tensors
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch

__all__ = [
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "TorchFunctionMode",
    "backward_under_modes",
    "copies_within",
    "fake_copy",
    "fake_copy_with_memo",
    "quick_view",
    "random_state_kept",
    "real_tensors",
    "without_initialization",
]

T = TypeVar("T")


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """PyTorch's own, of which the compiler needs to know nothing.

    PyTorch wraps the dispatch of every mode so that the compiler leaves it alone. Nothing is compiled under the modes
    of this package; unwrapped, an operator costs less, and the compiler, which takes seconds, isn't imported.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class FakeTensorMode(fake_tensor.FakeTensorMode):  # type: ignore[no-untyped-call]
    """PyTorch's own, without that wrapper."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    __torch_dispatch__ = inspect.unwrap(fake_tensor.FakeTensorMode.__torch_dispatch__)


class _FakeCopier(TorchFunctionMode):
    """While active, ``copy.deepcopy`` of a tensor gives a fake one. Use `fake_copy`.

    A function mode sees ``Tensor.__deepcopy__`` whatever holds the tensor: a module, an optimizer's
    state, a list, a plain attribute. ``Parameter.__deepcopy__`` isn't seen, but the ``clone`` that it
    is made of is; the same holds for PyTorch's own ``FakeCopyMode``, which would keep CUDA devices,
    break ties between parameters that share a storage, and forget the value of step counters.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self._fake_mode = fake_mode
        self._storages: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # original's address: both

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Copy a tensor as a fake one; leave everything else alone."""
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._converted(tensor)
            return memo[id(tensor)]
        if func is Tensor.clone:
            return self.fake(args[0])
        return func(*args, **(kwargs or {}))

    def _converted(self, tensor: Tensor) -> Tensor:
        fake = self.fake(tensor)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake CPU tensor like ``tensor``, on the fake of its storage."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
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
                return torch.empty(0, dtype=tensor.dtype).set_(
                    known[1].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
                )


def copies_within(fake_mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    """While active, deep copies of fake tensors stay in their mode; a plain deep copy would copy the mode as well."""
    return _FakeCopier(fake_mode)


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


def quick_view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of a fake tensor; of a contiguous one by a call that does the same, and is quicker for a new shape.

    PyTorch makes the view itself of up to ten operators in Python.
    """
    if not tensor.is_contiguous() or tensor.numel() == 0:
        plain: Tensor = torch.ops.aten.view.default(tensor, shape)
        return plain
    sizes = list(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = tensor.numel() // -math.prod(sizes)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    view: Tensor = torch.ops.aten.as_strided.default(tensor, sizes, strides, tensor.storage_offset())
    return view


def fake_copy(obj: T) -> tuple[FakeTensorMode, T]:
    """Copy any object so that its tensors have shapes but no memory.

    The copy is ``copy.deepcopy``, with every tensor that it reaches (parameters, buffers, optimizer
    state, gradients, plain attributes, items of containers) replaced by a fake CPU tensor of the same
    shape, stride, dtype and ``requires_grad``. What shared a storage still does. CUDA and meta tensors become
    CPU ones, since autograd's backward on fake CUDA tensors needs a GPU. A tensor that a closure
    captured isn't reached, and is refused by the fake mode when it is used.

    Args:
        obj: a module, an optimizer, a learner that holds both, a tuple of such things.

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
    with _FakeCopier(fake_mode) as copier, _generators_made_anew():
        try:
            copied = copy.deepcopy(obj, memo)
        except TypeError as error:
            error.add_note(f"fake_copy: {type(obj).__name__} holds something that copy.deepcopy can't copy")
            raise
    # deepcopy keeps the originals alive in a list of their own, in the memo.
    originals = [original for original in memo.get(id(memo), []) if id(original) in memo]
    for original in originals:
        if isinstance(original, nn.Parameter) and original.grad is not None:
            memo[id(original)].grad = copier.fake(original.grad)
    return fake_mode, copied, [(original, memo[id(original)]) for original in originals]


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
def random_state_kept() -> Iterator[None]:
    """Put every random state of the process back: Python's, NumPy's, PyTorch's on CPU and CUDA."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class without_initialization(TorchFunctionMode):  # noqa: N801  # used as a context manager
    """While active, parameters that are made keep whatever their memory holds: no random numbers are drawn for them.

    Buffers and everything that is computed while a model is built stay right. For a model whose values nobody reads.
    """

    SKIPPED = frozenset(
        getattr(Tensor, name)
        for name in ("uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_", "zero_", "fill_", "div_")
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip what would fill a parameter in place."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, nn.Parameter) and (func in self.SKIPPED or _is_initializer(func)):
            return filled
        return func(*args, **kwargs)


def _is_initializer(func: Any) -> bool:
    return getattr(func, "__module__", None) == "torch.nn.init"
