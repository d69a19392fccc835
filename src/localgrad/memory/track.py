"""Peak memory of a training step, from the step itself: no GPU, and no tensor is allocated.

What. `track` runs any callable and reports the most bytes that were alive at once, what they were
(parameters, gradients, activations, ...) and under which label. `simulate` does so on a copy of a learner
whose tensors have shapes but no memory (`backbones/fake.py`). `saved_bytes` and `block_activation_bytes` are the
cheap half: only what autograd keeps.

Why a callable. An estimator that rebuilds the step drifts away from it. Here the step that is
estimated is the step that is run.

How. Every operator that reaches PyTorch's dispatcher passes through a mode of ours, which looks up
the storages that went in and came out. A storage is counted once, when first seen, and given back
by the weak reference that PyTorch keeps honest: the Python object of a storage lives exactly as
long as the C++ storage, so views, in-place results and tensors that only autograd holds all come
out right. A storage that existed before the step and is first met in the middle of it raises the
whole curve, since it was there all along.

How it differs from ``torch.distributed._tools.mem_tracker.MemTracker``, whose idea this is: no
module hooks (so any callable will do, again and again, without resets), peaks by label, categories
settled once at the end and not at every allocation.

What the dispatcher can't see, and so neither can we: workspaces *inside* one kernel (attention's
split sums, convolution's im2col and reordered operands, cuBLAS's fixed workspace), the fragmentation
and caching of a CUDA allocator, and the CUDA context. Temporaries that a fake kernel makes in Python
aren't counted either, because a real kernel may not need them. Which kernel is chosen is decided for
the CPU: fused attention reads as the CPU's flash kernel, whose outputs are like those of CUDA's.

How far off, against the profiler's allocations of real CPU steps at batch 32: MLP, ViT and Swin 0.0 %
in float32; at most 2.1 % below in bfloat16, whose kernels pack operands into workspaces of fixed size
(so less at larger batches); ResNet-18 at most 2.1 % below. ConvNeXt on a CPU reads up to 20 % below:
oneDNN reorders whole feature maps for its depthwise convolutions. Not yet held against a GPU.

Sources: ``torch/distributed/_tools/mem_tracker.py``; "PyTorch caching allocator",
``c10/cuda/CUDACachingAllocator.cpp`` (blocks of 512 bytes).

Shapes: B batch, N tokens, D width, C H W image.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from localgrad.backbones.fake import (
    DataDependentOutputException,
    FakeTensor,
    TorchDispatchMode,
    TorchFunctionMode,
    backward_under_modes,
    by_shapes_alone,
    fake_copy,
    fake_copy_with_memo,
    quick_result,
)
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.state import left_as_it_was
from localgrad.errors import RecipeError, arg, reason_of
from localgrad.memory.cards import Card
from localgrad.memory.temporaries import attention_kernel

T = TypeVar("T")

CATEGORIES = ("parameters", "buffers", "optimizer", "inputs", "gradients", "activations", "temporary")
CUDA_ROUNDING = 512  # bytes: the smallest block of the CUDA caching allocator
UNLABELLED = ""


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """The memory of one step, in bytes.

    Attributes:
        peak_bytes: the most bytes that were alive at once, what was there before the step included.
        static_bytes: bytes alive when the step began: parameters, buffers, optimizer state, inputs.
        by_category: bytes at the peak, one entry for each of `CATEGORIES`; they sum to `peak_bytes`.
            Activations were made in the forward pass and are still alive; gradients are ``.grad`` of
            a known parameter; temporary is the rest.
        timeline: (operators run so far, bytes alive), one entry at each change, in order.
        peak_by_label: the peak while each `annotate` label was the innermost one; ``""`` is outside all.
        by_category_of_label: as ``by_category``, at the peak of each label.
        peak_label: the label in which the peak fell.
        host_bytes: bytes parked in host memory, which none of the other figures count.
    """

    peak_bytes: int
    static_bytes: int
    by_category: dict[str, int]
    timeline: list[tuple[int, int]]
    peak_by_label: dict[str, int]
    by_category_of_label: dict[str, dict[str, int]]
    peak_label: str
    host_bytes: int = 0


_active: list[Tracker] = []


@contextlib.contextmanager
def annotate(label: str) -> Iterator[None]:
    """Name the part of a step that runs inside, for `MemoryProfile.peak_by_label`.

    Free to leave in production code: where nothing is tracked, it does nothing. Labels nest, and the
    innermost is charged; a label that is entered again continues its own peak.

    Args:
        label: such as the local module that is running.
    """
    if not _active:
        yield
        return
    tracker = _active[-1]
    outer = tracker.switch_label(label)
    try:
        yield
    finally:
        tracker.switch_label(outer)


@final
class _Entry:
    """One storage at one size: its category, and between which changes of the timeline it was alive."""

    __slots__ = ("born", "category", "died", "nbytes", "on_host", "reference")

    def __init__(self, nbytes: int, category: str, born: int) -> None:
        self.nbytes = nbytes
        self.category = category
        self.born = born
        self.died: int | None = None
        self.on_host = False
        self.reference: weakref.ref[torch.UntypedStorage] | None = None


def rounded(nbytes: int, rounding: int) -> int:
    """Bytes of the block that an allocator gives."""
    return nbytes + -nbytes % rounding


class Observer(ABC):
    """Told by a tracker of all that it sees, in order, for those who want to know more than its sums.

    Only ``after`` must be there; what else is told may be passed over.
    """

    def before(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> None:  # noqa: B027
        """An operator is about to run, with these arguments."""

    @abstractmethod
    def after(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs, result: Any) -> None:
        """It ran."""

    def took(self, storage: torch.UntypedStorage, *, was_there: bool, in_optimizer: bool) -> None:  # noqa: B027
        """A storage is there that wasn't known; one that ``was_there`` is only met late."""

    def gave_back(self, address: int) -> None:  # noqa: B027
        """The storage at an address (``storage._cdata``) is gone."""


@final
class _Nobody(Observer):
    """Wants to know nothing more."""

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs, result: Any) -> None:
        """It ran."""


@final
class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators take and make. For whole steps use `track`.

    Args:
        rounding: sizes are rounded up to multiples of so many bytes.
        observer: told of operators and storages.
    """

    def __init__(self, rounding: int, observer: Observer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounding = rounding
        self._observer = observer or _Nobody()
        self._alive: dict[int, _Entry] = {}  # by address of the C++ storage
        self._entries: list[_Entry] = []
        self._in_optimizer = False
        self._known_parameters: dict[int, weakref.ref[Tensor]] = {}
        self._hooks: list[Any] = []
        self._optimizers: dict[int, Optimizer] = {}
        self._host_bytes = 0
        self._label = UNLABELLED
        self.is_in_operator = False  # where fake kernels call operators of their own
        self.begin()

    # -- the account ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Open a new account: whatever is alive now was there before the step."""
        self._base = 0  # bytes that were there before; grows when such a storage is met late
        self._entries = list(self._alive.values())
        for entry in self._entries:
            entry.born = -1
            self._base += entry.nbytes
        self._running = 0  # bytes above the base
        self._num_operators = 0
        self._timeline = [(0, 0)]
        self._peak = self._label_peak = 0
        self._peak_at = self._label_peak_at = 0
        self._peak_label = self._label
        self._label_peaks: dict[str, tuple[int, int]] = {}  # bytes, and when

    @property
    def alive_bytes(self) -> int:
        """Bytes alive now, above what was there when the account began."""
        return self._running

    def take_peak(self) -> int:
        """The most bytes above the beginning since the account began or this was last called."""
        peak, self._peak = self._peak, self._running
        return peak

    def switch_label(self, label: str) -> str:
        """Charge what follows to ``label``; return the label until now."""
        outer, self._label = self._label, label
        self._label_peaks[outer] = self._label_peak, self._label_peak_at
        now = self._running, len(self._timeline) - 1
        self._label_peak, self._label_peak_at = max(self._label_peaks.get(label, now), now)
        return outer

    def profile(self) -> MemoryProfile:
        """Close the account."""
        self.switch_label(self._label)
        self._settle()
        by_category = self._categories_at(self._peak_at)
        base = self._base
        profile = MemoryProfile(
            peak_bytes=base + self._peak,
            static_bytes=base,
            by_category=by_category,
            timeline=[(operators, base + running) for operators, running in self._timeline],
            peak_by_label={label: base + peak for label, (peak, _) in self._label_peaks.items()},
            by_category_of_label={label: self._categories_at(at) for label, (_, at) in self._label_peaks.items()},
            peak_label=self._peak_label,
            host_bytes=self._host_bytes,
        )
        assert sum(by_category.values()) == profile.peak_bytes
        return profile

    def _categories_at(self, moment: int) -> dict[str, int]:
        by_category = dict.fromkeys(CATEGORIES, 0)
        for entry in self._entries:
            if entry.born <= moment and (entry.died is None or entry.died > moment):
                by_category[entry.category] += entry.nbytes
        return by_category

    def _change(self, nbytes: int) -> None:
        """Move the curve by ``nbytes``, and note a new peak."""
        running = self._running = self._running + nbytes
        if running > self._label_peak:
            self._label_peak = running
            self._label_peak_at = len(self._timeline)
        if running > self._peak:  # not inside: `take_peak` lowers this peak alone
            self._peak = running
            self._peak_at = len(self._timeline)
            self._peak_label = self._label
        self._timeline.append((self._num_operators, running))

    def _add(self, storage: torch.UntypedStorage, category: str, *, was_there: bool) -> _Entry:
        """Count a storage that is met for the first time, until it dies."""
        nbytes = rounded(storage.nbytes(), self._rounding)
        entry = _Entry(nbytes, category, -1 if was_there else len(self._timeline))
        key = storage._cdata
        entry.reference = weakref.ref(storage, lambda _: self._remove(key, entry))
        self._alive[key] = entry
        self._entries.append(entry)
        self._observer.took(storage, was_there=was_there, in_optimizer=self._in_optimizer)
        if was_there:
            self._base += nbytes
        else:
            self._change(nbytes)
        return entry

    def _remove(self, key: int, entry: _Entry) -> None:
        if self._alive.get(key) is entry:
            del self._alive[key]
            entry.reference = None
            entry.died = len(self._timeline)
            self._observer.gave_back(key)
            self._change(-entry.nbytes)

    def mark(self, tensor: Tensor, category: str) -> None:
        """Settle the category of a tensor's storage; one not met before was there all along."""
        storage = tensor.untyped_storage()
        entry = self._alive.get(storage._cdata)
        if entry is None:
            self._add(storage, category, was_there=True)
        else:
            entry.category = category

    def exclude(self, tensor: Tensor) -> None:
        """Count a tensor's storage as host memory: present, but not in the account that opens next."""
        self.mark(tensor, "parameters")
        entry = self._alive[tensor.untyped_storage()._cdata]
        if not entry.on_host:
            self._host_bytes += entry.nbytes
            entry.on_host, entry.nbytes = True, 0

    # -- parameters, gradients and optimizer state ------------------------------------------------

    def know_parameter(self, parameter: Tensor) -> None:
        """Mark a parameter and its gradient, the present one and those to come."""
        known = self._known_parameters.get(id(parameter))
        if known is not None and known() is parameter:
            self.mark(parameter, "parameters")  # an offloaded one comes in another storage each time
            return
        self._known_parameters[id(parameter)] = weakref.ref(parameter)
        self.mark(parameter, "parameters")
        self._mark_gradient(parameter)
        if parameter.is_leaf and parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(self._mark_gradient)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def _mark_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.mark(parameter.grad, "gradients")

    def _before_optimizer(self, optimizer: Optimizer, *_: object) -> None:
        self._in_optimizer = True
        self._optimizers.pop(id(optimizer), None)
        self._optimizers[id(optimizer)] = optimizer  # the last one
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.know_parameter(parameter)
        self._mark_state(optimizer)

    def _after_optimizer(self, optimizer: Optimizer, *_: object) -> None:
        self._in_optimizer = False
        self._mark_state(optimizer)

    @property
    def optimizer_at_work(self) -> str | None:
        """The class of the optimizer whose step is under way."""
        return type([*self._optimizers.values()][-1]).__name__ if self._in_optimizer else None

    def _mark_state(self, optimizer: Optimizer) -> None:
        for state in optimizer.state.values():
            for value in state.values() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    self.mark(value, "optimizer")

    def _settle(self) -> None:
        """Parameters and state may have got other storages since they were marked; settle those as well."""
        for reference in self._known_parameters.values():
            parameter = reference()
            if parameter is not None:
                self._recategorise(parameter, "parameters")
        for optimizer in self._optimizers.values():
            for state in optimizer.state.values():
                for value in state.values() if isinstance(state, dict) else ():
                    if isinstance(value, Tensor):
                        self._recategorise(value, "optimizer")

    def _recategorise(self, tensor: Tensor, category: str) -> None:
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            entry.category = category

    # -- the mode --------------------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        self._hooks.append(register_optimizer_step_pre_hook(self._before_optimizer))
        self._hooks.append(register_optimizer_step_post_hook(self._after_optimizer))
        _active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _active.remove(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run one operator, and count what it touched and what it made."""
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):  # a question, asked twice for each operator
            return args[0].device
        self._num_operators += 1
        self._observer.before(func, args, kwargs or {})
        self.is_in_operator = True
        try:
            result = self._run(func, args, kwargs)
        finally:
            self.is_in_operator = False
        self._observer.after(func, args, kwargs or {}, result)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs | None) -> Any:
        self._touch_all(args)
        try:
            result = quick_result(func, args, kwargs or {})
            if result is NotImplemented:
                result = func(*args, **kwargs) if kwargs else func(*args)
        except DataDependentOutputException:
            # A fake tensor has no values. A step that reads its loss, or asks whether a gradient was
            # infinite, gets the harmless answer; any other question about values stays an error.
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return _harmless_value(args[0].dtype, counts=self._in_optimizer)
        if isinstance(result, Tensor):
            if func in _FULL_SIZE_LOSSES:
                self._made_in_full(args, kwargs or {}, result)
            self._made(result)
        elif isinstance(result, (list, tuple)):
            for item in result:
                if isinstance(item, Tensor):
                    self._made(item)
        return result

    def _touch_all(self, args: tuple[Any, ...]) -> None:
        for argument in args:
            if isinstance(argument, Tensor):
                self._touch(argument)
            elif isinstance(argument, (list, tuple)):
                for item in argument:
                    if isinstance(item, Tensor):
                        self._touch(item)

    # Both look-ups run for every tensor of every operator: keep them lean.
    def _touch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            category = "parameters" if isinstance(tensor, nn.Parameter) else "inputs"
            self._add(storage, category, was_there=True)

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        entry = self._alive.get(storage._cdata)
        if entry is None:
            self._add(storage, self._new_category(), was_there=False)
        elif not (
            entry.on_host or 0 <= entry.nbytes - storage.nbytes() < self._rounding
        ):  # resized: a new block for the old
            self._remove(storage._cdata, entry)
            self._add(storage, entry.category, was_there=False)

    def _made_in_full(self, args: tuple[Any, ...], kwargs: Kwargs, loss: Tensor) -> None:
        """Count what the kernel of a loss takes, and gives as the storage of its scalar; fake kernels show neither."""
        reduction = args[2] if len(args) > 2 else kwargs.get("reduction", 1)
        if reduction == 0 or loss.untyped_storage()._cdata in self._alive:
            return
        whole = torch.broadcast_shapes(args[0].shape, args[1].shape).numel() * loss.element_size()  # type: ignore[no-untyped-call]
        storage = loss.untyped_storage()
        if storage.nbytes() < whole:
            storage.resize_(whole)
        self._made(loss)
        self._made(args[0].new_empty(whole, dtype=torch.uint8))  # the other one, gone at once

    def _new_category(self) -> str:
        # Backward runs with gradients off, unless it recomputes a checkpointed forward pass.
        if torch.is_grad_enabled():
            return "activations"
        in_backward = torch._C._current_graph_task_id() != -1
        return "temporary" if in_backward or self._in_optimizer else "activations"


@final
class CudaAutocast(TorchFunctionMode):
    """Makes what runs on a processor take the memory that it takes on a CUDA device.

    Inside an autocast region of the CPU, norms, softmax, sums and losses run in float32, as in a CUDA region; the CPU's
    leaves norms and softmax in the type of their input. Tensors of two types are joined as they are, by ``cat`` and
    ``stack``; the CPU's region casts them first. And where a card is named, fused attention is the kernel that torch
    would choose there, with its own outputs; else it is the CPU's flash kernel.

    Args:
        card: that is meant.

    Attributes:
        attention: the kernels of fused attention so far, in words.

    Source: "Autocast Op Reference", pytorch.org/docs/stable/amp.html; ``aten/src/ATen/autocast_mode.h``;
    ``aten/src/ATen/native/transformers/attention.cpp``.
    """

    IN_FLOAT32 = (
        "layer_norm group_norm softmax log_softmax softmin softplus logsumexp sum prod cumsum cumprod norm normalize "
        "cosine_similarity cdist dist renorm pow __pow__ __rpow__ exp expm1 log log2 log10 log1p rsqrt reciprocal tan "
        "sinh cosh acos asin erfinv mse_loss l1_loss smooth_l1_loss huber_loss nll_loss cross_entropy kl_div "
        "binary_cross_entropy_with_logits soft_margin_loss multi_margin_loss multilabel_margin_loss "
        "margin_ranking_loss triplet_margin_loss cosine_embedding_loss hinge_embedding_loss poisson_nll_loss"
    )
    """Names of functions and methods. Those made of others stand here too: what they call isn't seen."""
    _in_float32 = frozenset(IN_FLOAT32.split())
    _as_they_are = frozenset({"cat", "concat", "concatenate", "stack"})

    def __init__(self, card: Card | None = None) -> None:
        super().__init__()
        self._card = card
        self.attention: dict[str, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Call a function, its inputs cast where CUDA would."""
        kwargs = kwargs or {}
        if func is Tensor.backward and not kwargs.get("inputs"):  # what it recomputes needs the mode, too
            create_graph = bool(kwargs.get("create_graph"))
            retain_graph = bool(kwargs.get("retain_graph", create_graph))
            with self:
                backward_under_modes(
                    args[0], kwargs.get("gradient"), retain_graph=retain_graph, create_graph=create_graph
                )
            return None
        if bool(_active) and _active[-1].is_in_operator:  # a fake kernel's own
            return func(*args, **kwargs)
        name, is_casting = getattr(func, "__name__", ""), torch.is_autocast_enabled("cpu")
        if self._card is not None and func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if is_casting and name in self._in_float32:
            args = tuple(_in_float32(value) for value in args)
            kwargs = {key: _in_float32(value) for key, value in kwargs.items()}
        elif is_casting and name in self._as_they_are:
            with _without_autocast():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(  # noqa: PLR0917  # torch's signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Fused attention, by the kernel of the card."""
        card = self._card
        assert card is not None, "asked for with a card only"
        tensors = [query, key, value, attn_mask]
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            tensors = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]
        q, k, v, mask = tensors
        assert q is not None and k is not None and v is not None, "given"
        kernel, why = attention_kernel(card, q.dtype, q.shape[-1], has_mask=mask is not None)
        is_plain = q.ndim == _BATCHED_HEADS and not enable_gqa
        with _without_autocast():
            if kernel == "math" or not is_plain:
                self.attention["math"] = why if is_plain else "its shapes are for no fused kernel"
                with sdpa_kernel(SDPBackend.MATH):
                    return F.scaled_dot_product_attention(
                        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                    )
            self.attention[kernel] = why
            if kernel == "flash":
                width = q.shape[-1]
                q, k, v = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))
                scale = width**-0.5 if scale is None else scale
                flash = torch.ops.aten._scaled_dot_product_flash_attention
                found = flash(q, k, v, dropout_p, is_causal, return_debug_mask=False, scale=scale)
                output: Tensor = found[0][..., :width] if width % 8 else found[0]
                return output
            needs_sums = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask))
            bias = None if mask is None else _as_bias(mask, q, k)
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            attended: Tensor = efficient(q, k, v, bias, needs_sums, dropout_p, is_causal, scale=scale)[0]
            return attended


_BATCHED_HEADS = 4  # [B, heads, N, D]


def _as_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as memory-efficient attention takes it: numbers to add, rows padded to 16, over all heads."""
    if mask.dtype == torch.bool:
        nothing = torch.zeros((), dtype=query.dtype)
        mask = torch.where(mask, nothing, torch.full((), -torch.inf, dtype=query.dtype))
    columns = mask.shape[-1]
    if columns % 16:
        mask = F.pad(mask, (0, -columns % 16))[..., :columns]
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """As it is within CUDA's own operators: nothing more is cast, and what was cast stays known."""
    was_enabled = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)  # noqa: FBT003
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", was_enabled)


def _in_float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def autocast_of(device: str, card: Card | None = None) -> contextlib.AbstractContextManager[CudaAutocast | None]:
    """A context in which regions and kernels of the CPU, where fake tensors are, are like those of ``device``."""
    return CudaAutocast(card) if device == "cuda" else contextlib.nullcontext()


_DEVICE_OF = torch.ops.prim.device.default
_FULL_SIZE_LOSSES = {torch.ops.aten.mse_loss.default, torch.ops.aten.smooth_l1_loss.default}
"""Losses that write every element's error, twice, and return its mean at the beginning of one of the two."""


def _harmless_value(dtype: torch.dtype, *, counts: bool) -> float | int | bool:
    """Zero of the Python type that ``item()`` gives for ``dtype``, or one: optimizers divide by what steps come to."""
    if dtype == torch.bool:
        return False
    return float(counts) if dtype.is_floating_point else int(counts)


def track(
    step: Callable[[], object],
    *,
    warmup: int = 1,
    categories: Mapping[str, Iterable[Tensor]] | None = None,
    rounding: int = 1,
    host: Callable[[], Iterable[Tensor]] | None = None,
) -> MemoryProfile:
    """Run a step and report its memory.

    Warm-up steps come first, so that optimizer state exists. Their cyclic garbage is collected before
    the step that counts, and the collector rests during it: what a cycle keeps alive is counted, every
    time alike, and not as the collector happens to be scheduled. The result of ``step`` is dropped at once.

    Args:
        step: one training step, with nothing left alive that a training loop would not keep.
        warmup: how many steps to run before the one that counts.
        categories: what is known to be alive before the step: any of `CATEGORIES` to tensors. Parameters
            and state of any optimizer that steps are found without. Anything else that an operator
            touches is counted when it is touched, as ``inputs`` or ``parameters``.
        rounding: sizes are rounded up to multiples of this many bytes: 1, or 512 as CUDA's allocator does.
        host: asked after the warm-up (so let there be one) for the tensors that are parked in host memory; they don't
            count, but for `MemoryProfile.host_bytes`.

    Returns:
        The profile of the last step.

    Raises:
        ValueError: for a category that isn't in `CATEGORIES`, or a rounding below 1.
    """
    if rounding < 1:
        raise ValueError(f"rounding must be 1 or more bytes, got {rounding}; CUDA's allocator rounds to 512")
    for category in categories or {}:
        if category not in CATEGORIES:
            raise ValueError(f"categories must be among {', '.join(CATEGORIES)}; got {category!r}")
    known = {category: list(tensors) for category, tensors in (categories or {}).items()}
    with Tracker(rounding) as tracker:
        # Marked before the warm-up, so that state which an optimizer is seen to own is the optimizer's.
        for category, tensors in known.items():
            for tensor in tensors:
                if category == "parameters":
                    tracker.know_parameter(tensor)
                else:
                    tracker.mark(tensor, category)
        for _ in range(warmup):
            try:
                step()
            except Exception as error:
                if tracker.optimizer_at_work is None:
                    raise
                raise RecipeError(
                    f"{arg('optimizer')}: {tracker.optimizer_at_work} can't be run on tensors without values, so that "
                    f"what it needs can't be estimated ({reason_of(error, limit=200)}); take adamw, sgd or lamb."
                ) from error
        if warmup:
            gc.collect()
        for tensor in host() if host is not None else ():
            tracker.exclude(tensor)
        tracker.begin()
        with without_collector():
            step()
        return tracker.profile()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Let Python's collector of cycles rest."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_frozen_by: list[str] = []
"""``"us"`` while an estimate is made; ``"others"`` for good, once they were seen to have frozen objects."""


@contextlib.contextmanager
def collecting_own_garbage() -> Iterator[None]:
    """Let collections of cycles, which are asked for, look at what is made from here on: all else is a process's own.

    A process that has imported torch holds a million objects, at which each collection would look. One that has frozen
    them itself is left to it, and asked once: the answer takes a look at each of them.
    """
    if not _frozen_by and gc.get_freeze_count():
        _frozen_by.append("others")
    own = not _frozen_by
    if own:
        gc.freeze()
        _frozen_by.append("us")
    try:
        with without_collector():
            yield
    finally:
        if own:
            gc.unfreeze()
            _frozen_by.remove("us")


def simulate(
    learner: T,
    step: Callable[..., object],
    *,
    inputs: Mapping[str, tuple[Sequence[int], torch.dtype]],
    warmup: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    host: Callable[[T], Iterable[Tensor]] | None = None,
    autocasts: bool = True,
) -> MemoryProfile:
    """Predict the memory of a training step without running it.

    Neither the learner nor the random state of the process is changed, and no tensor memory is used.
    Reading a value in the step (``loss.item()``) gives zero, and one in an optimizer.

    Args:
        learner: whatever the step needs that holds tensors; a tuple such as ``(model, optimizer)`` will do.
        step: called as ``step(copy_of_learner, **fake_inputs)``. It must reach tensors only by these.
        inputs: name to (shape, dtype) of each input, batch size first.
        warmup: how many steps to run before the one that counts.
        device: the device to predict for. ``"cuda"`` rounds sizes as its allocator does, and gives
            optimizers that left it open the ``foreach`` loop, as PyTorch does there by default.
        host: given the copy, the tensors that are parked in host memory between steps; see `track`.
        autocasts: whether the step may have regions of autocast; without any it is quicker.

    Returns:
        The profile of one step.

    Example:
        >>> profile = simulate(
        ...     (model, optimizer), train_step, inputs={"images": ((64, 3, 224, 224), torch.float32)}
        ... )  # doctest: +SKIP
    """
    with collecting_own_garbage(), by_shapes_alone():
        fake_mode, fake_learner, memo = fake_copy_with_memo(learner)
        reached = [copied for _, copied in memo]
        with fake_mode, autocast_of(device if autocasts else "cpu"), foreach_of(device):
            batch = {name: torch.empty(tuple(shape), dtype=dtype) for name, (shape, dtype) in inputs.items()}
            return track(
                partial(step, fake_learner, **batch),
                warmup=warmup,
                categories=_known_categories(reached, batch),
                rounding=CUDA_ROUNDING if device == "cuda" else 1,
                host=None if host is None else lambda: host(fake_learner),
            )


@contextlib.contextmanager
def foreach_of(device: str) -> Iterator[None]:
    """Let optimizers loop as they do on ``device``, those too that are made in the first step."""
    if device != "cuda":
        yield
        return
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: choose_foreach([optimizer]))
    try:
        yield
    finally:
        hook.remove()


def _known_categories(reached: Iterable[object], batch: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Sort what a fake copy holds; optimizer state is told from buffers when the optimizer steps."""
    tensors = [item for item in reached if isinstance(item, Tensor)]
    return {
        "buffers": [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)],
        "parameters": [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)],
        "inputs": list(batch.values()),
    }


def choose_foreach(reached: Iterable[object]) -> None:
    """Give optimizers that left it open the ``foreach`` loop, PyTorch's default on CUDA."""
    for optimizer in reached:
        if isinstance(optimizer, Optimizer):
            for group in optimizer.param_groups:
                if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                    group["foreach"] = True
                if group.get("capturable"):
                    group["capturable"] = False  # refused on CPU tensors; costs no memory


# -- what autograd saves -----------------------------------------------------------------------------


@final
class _SavedStorages:
    """The distinct storages that autograd was asked to save."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        # Storages are held, so that an address can't be used twice.
        self._excluded = {s._cdata: s for s in (tensor.untyped_storage() for tensor in exclude)}
        self._saved: dict[int, torch.UntypedStorage] = {}

    def recording(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Record while this context is open."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._saved[storage._cdata] = storage
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all storages recorded so far."""
        return sum(storage.nbytes() for storage in self._saved.values())


def saved_bytes(fn: Callable[..., object], *inputs: Tensor, exclude: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass of one call.

    Args:
        fn: called once as ``fn(*inputs)``; its result is dropped.
        inputs: its tensors, real or (inside their mode) fake.
        exclude: tensors that don't count, such as parameters, which are alive anyway.

    Returns:
        Bytes of the distinct storages saved, inputs included where they are saved. A whole storage
        counts where a view of it is saved.
    """
    saved = _SavedStorages(exclude)
    with saved.recording():
        fn(*inputs)
    return saved.nbytes


def block_activation_bytes(parts: Sequence[nn.Module], inputs: Tensor) -> list[int]:
    """Count what each of a chain of modules saves for its backward pass.

    Each part runs on the detached output of the one before, on fake copies: no memory, no gradient,
    and the originals (batch statistics, say) stay as they are. A tensor at a seam that both sides save
    counts for the earlier one only, so the sum is what the whole chain saves. Parameters and buffers
    don't count.

    Args:
        parts: modules to run in order, each taking the output of the one before.
        inputs: the input of the first part, B first; only its shape and dtype are read, so a meta
            tensor of the true batch size costs nothing.

    Returns:
        Bytes for each part, at the batch size of ``inputs``.
    """
    with by_shapes_alone():
        fake_mode, (chain, features) = fake_copy((list(parts), inputs.detach()))
        with fake_mode:
            return _kept_in_turn(chain, features)


def block_activation_bytes_by_values(parts: Sequence[nn.Module], inputs: Tensor) -> list[int]:
    """The same for parts that look at values: they are run, and left as they were."""
    with left_as_it_was(*parts), torch.inference_mode(mode=False), torch.enable_grad():
        return _kept_in_turn(parts, inputs)


def _kept_in_turn(chain: Sequence[nn.Module], features: Tensor) -> list[int]:
    states = [tensor for part in chain for tensor in (*part.parameters(), *part.buffers())]
    saved = _SavedStorages(states)
    totals = [0]
    with saved.recording():
        for part in chain:
            outputs = part(features)
            features = outputs.detach().requires_grad_(outputs.requires_grad)
            totals.append(saved.nbytes)
    return [after - before for before, after in itertools.pairwise(totals)]
