"""What the commonest operators give, told from the shapes of what they take; nothing runs.

PyTorch finds that out by running most of them as twenty to fifty others in Python, milliseconds each time that shapes
are new. Here a rule stands for an operator wherever it is plain: dense tensors in order, of one floating type. All else
has no rule, mistakes among it, which PyTorch then finds. ``tests/test_memory.py`` holds each rule against PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from localgrad.backbones.namespaces import Kwargs

aten = torch.ops.aten


class Fresh(NamedTuple):
    """A tensor in memory of its own, its elements in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Outputs = Fresh | list[Fresh | None] | None
"""What an operator gives; in a list, ``None`` for what it was asked to leave out."""
Rule = Callable[[Sequence[Any]], Outputs]


def given_by(func: Any, args: Sequence[Any], kwargs: Kwargs) -> Outputs:
    """What an operator gives; ``None`` where no rule says so, a list of nothing where it only writes."""
    if func in _MAKE_LIKE:
        return _made(args[0].shape, args[0].dtype, kwargs) if args[0].is_contiguous() else None
    if func is aten.empty.memory_format:
        return _made(tuple(args[0]), torch.get_default_dtype(), kwargs)
    if kwargs.keys() - {"approximate"}:
        return None
    if func in _WRITE_ONLY:
        return [] if _are_alike(args) else None
    rule = _RULES.get(func)
    return None if rule is None else rule(args)


def _made(shape: tuple[int, ...], dtype: torch.dtype, kwargs: Kwargs) -> Outputs:
    """A new tensor, where it is a plain one of a processor."""
    plain: dict[str, tuple[object, ...]] = {
        "layout": (torch.strided,),
        "device": (torch.device("cpu"),),
        "pin_memory": (False,),
    }
    plain["memory_format"] = (torch.contiguous_format, torch.preserve_format)
    if any(kwargs.get(name) not in (None, *values) for name, values in plain.items()) or min(shape, default=0) < 0:
        return None
    return Fresh(shape, kwargs.get("dtype") or dtype)


def _is_simple_tensor(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.is_contiguous()


def _as_its_tensors(args: Sequence[Any]) -> Outputs:
    """As its tensors, which are all of the same shape, in order; numbers beside them change nothing."""
    first, *others = (value for value in args if isinstance(value, Tensor))
    if not all(map(_is_simple_tensor, (first, *others))) or any(isinstance(value, (list, tuple)) for value in args):
        return None
    if any(each.shape != first.shape or each.dtype != first.dtype for each in others):
        return None
    return Fresh(first.shape, first.dtype)


def _first(args: Sequence[Any]) -> Outputs:
    """As its first argument, whatever is done along its axes."""
    return Fresh(args[0].shape, args[0].dtype) if _is_simple_tensor(args[0]) else None


def _of_roll(args: Sequence[Any]) -> Outputs:
    axes = args[2] if len(args) > 2 else ()
    is_possible = len(axes) == len(args[1]) and all(-args[0].ndim <= axis < args[0].ndim for axis in axes)
    return _first(args) if is_possible and axes else None


def _of_softmax_backward(args: Sequence[Any]) -> Outputs:
    gradient, output, axis, dtype = args
    if gradient.dtype != dtype or not -output.ndim <= axis < output.ndim:
        return None
    return _as_its_tensors((gradient, output))


def _addmm(args: Sequence[Any]) -> Outputs:
    if len(args) != 3:
        return None
    bias, left, right = args
    same = bias.dtype == left.dtype == right.dtype and left.ndim == right.ndim == 2
    if not (same and left.is_floating_point() and left.shape[1] == right.shape[0]):
        return None
    shape = (left.shape[0], right.shape[1])
    return Fresh(shape, left.dtype) if bias.shape == shape[1:] else None


def _of_layer_norm(args: Sequence[Any]) -> Outputs:
    inputs, shape, weight, bias, _ = args
    weights = [each for each in (weight, bias) if each is not None]
    if not (_is_normalized(inputs, shape, weights)):
        return None
    statistic = Fresh((*inputs.shape[: -len(shape)], *[1] * len(shape)), inputs.dtype)
    return [Fresh(inputs.shape, inputs.dtype), statistic, statistic]


def _is_normalized(inputs: Tensor, shape: Sequence[int], weights: Sequence[Tensor]) -> bool:
    """Whether a norm over the last axes is of elements in order, with weights of the same type."""
    if not (
        _is_simple_tensor(inputs) and shape and inputs.numel() and tuple(inputs.shape[-len(shape) :]) == tuple(shape)
    ):
        return False
    return all(
        _is_simple_tensor(each) and each.shape == tuple(shape) and each.dtype == inputs.dtype for each in weights
    )


def _of_layer_norm_backward(args: Sequence[Any]) -> Outputs:
    gradient, inputs, shape, mean, deviation, weight, bias, wanted = args
    weights = [each for each in (weight, bias) if each is not None]
    if not (_is_normalized(inputs, shape, weights) and gradient.shape == inputs.shape):
        return None
    if not (gradient.dtype == mean.dtype == deviation.dtype == inputs.dtype and len(shape) < inputs.ndim):
        return None
    one = Fresh(tuple(shape), inputs.dtype)
    return [
        Fresh(inputs.shape, inputs.dtype) if wanted[0] else None,
        one if wanted[1] and weight is not None else None,
        one if wanted[2] and bias is not None else None,
    ]


def _of_grouped_mm(args: Sequence[Any]) -> Outputs:
    """Matrices of rows in groups: of experts, say. PyTorch's own rule is that of CUDA, which has it in 16 bits only."""
    left, right, ends, bias, dtype = (*args, None, None, None)[:5]
    if bias is not None or dtype is not None or left.dtype != right.dtype or not left.is_floating_point():
        return None
    if left.shape[-1] != right.shape[-2] or (ends is None) != (left.ndim == right.ndim == 3):
        return None
    rows, columns = left.shape[-2], right.shape[-1]
    groups = {(2, 2): ends, (3, 3): left}.get((left.ndim, right.ndim))
    shape = (rows, columns) if groups is None else (len(groups), rows, columns)
    return Fresh(shape, left.dtype) if columns * left.element_size() % 16 == 0 else None  # else rows are padded


def _each(args: Sequence[Any]) -> Outputs:
    """As each of the tensors of its one list."""
    tensors = args[0]
    return [Fresh(each.shape, each.dtype) for each in tensors] if all(map(_is_simple_tensor, tensors)) else None


def _are_alike(args: Sequence[Any]) -> bool:
    """Whether lists of tensors go together, one by one; numbers may be lists, too."""
    lists = [value for value in args if isinstance(value, (list, tuple))]
    if any(len(each) != len(lists[0]) for each in lists):
        return False
    tensors = [each for each in lists if all(isinstance(item, Tensor) for item in each)]
    if any(isinstance(value, Tensor) for value in args):
        return False
    if not all(map(_is_simple_tensor, chain.from_iterable(tensors))):
        return False
    return all(
        item.shape == first.shape and item.dtype == first.dtype
        for each in tensors
        for first, item in zip(tensors[0], each, strict=True)
    )


_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _as_its_tensors),
    **dict.fromkeys(
        (aten.gelu.default, aten.gelu_backward.default, aten.neg.default, aten.relu.default), _as_its_tensors
    ),
    **dict.fromkeys((aten.rsqrt.default, aten.sqrt.default, aten.silu.default), _as_its_tensors),
    aten.roll.default: _of_roll,
    aten.addmm.default: _addmm,
    aten.native_layer_norm.default: _of_layer_norm,
    aten.native_layer_norm_backward.default: _of_layer_norm_backward,
    aten._softmax_backward_data.default: _of_softmax_backward,
    aten._foreach_sqrt.default: _each,
    **({aten._grouped_mm.default: _of_grouped_mm} if hasattr(aten, "_grouped_mm") else {}),  # torch 2.6 has none
}
_MAKE_LIKE = frozenset({aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default})
_WRITE_ONLY = frozenset(
    {
        aten._foreach_add_.List,
        aten._foreach_add_.Scalar,
        aten._foreach_addcdiv_.ScalarList,
        aten._foreach_addcmul_.Scalar,
        aten._foreach_div_.ScalarList,
        aten._foreach_lerp_.Scalar,
        aten._foreach_mul_.Scalar,
        aten._foreach_mul_.ScalarList,
    }
)
"""Operators that write into what they are given and give nothing."""
