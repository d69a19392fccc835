"""What CUDA operators take from the allocator besides their outputs: one table by operator.

What. A kernel's host code asks the caching allocator for staging buffers, contiguous copies and workspaces, and gives
them back when it returns. The dispatcher doesn't see them, but they lie among activations, and a bias gradient's
alone may take more than the activations of a block. `TABLE` has, for each operator that takes some, the reason, the
file of PyTorch that says so, and a rule: given the operator's arguments and the card, what is taken and given back, in
order, before and after the outputs are made. ``recording.py`` writes that among what the dispatcher sees.

How true. Each rule is host code, and so the same whatever a kernel computes; ``tests/test_temporaries.py`` holds each
against PyTorch's own allocator, operator by operator, and fails where a release of torch takes something else.

What is not here: cuDNN's workspaces, which the card's own library chooses (the rules for convolutions are those of
PyTorch's kernels without cuDNN), compiled code, and collectives.

Sources are files of PyTorch's repository, below ``aten/src/ATen/native/cuda`` where no folder is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from localgrad.memory.cards import MIB, Card

aten = torch.ops.aten


def workspace_bytes(card: Card) -> int:
    """The workspace of cuBLAS, one for each thread that multiplies matrices, never given back.

    There are two such threads: that of the forward pass, and autograd's for the device. The environment variable
    ``CUBLAS_WORKSPACE_CONFIG`` sets another size, which isn't looked at here.

    Source: ``getChosenWorkspaceSize`` in ``aten/src/ATen/cuda/CublasHandlePool.cpp``; asked of torch 2.14 for compute
    capabilities 7.5 to 12.0.
    """
    return 32 * MIB if card.capability >= (9, 0) else 8 * MIB + 128 * 1024


# -- attention ------------------------------------------------------------------------------------------


def attention_kernel(
    card: Card, dtype: torch.dtype, head_width: int, *, has_mask: bool, has_dropout: bool = False
) -> tuple[str, str]:
    """Which kernel of fused attention torch takes, and why.

    Not cuDNN's, which torch prefers on some cards and releases; it takes about what flash attention does.

    Args:
        card: that it runs on.
        dtype: of queries, keys and values.
        head_width: their last dimension.
        has_mask: whether an attention mask or bias is given.
        has_dropout: whether attention drops out; no kernel minds.

    Returns:
        ``flash``, ``efficient`` or ``math``, and the reason in words.

    Source: ``select_sdp_backend`` in ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``.
    """
    del has_dropout
    half = dtype in (torch.float16, torch.bfloat16)
    if half and card.capability >= (8, 0) and head_width <= _FLASH_WIDTH and not has_mask:
        return "flash", f"{_short(dtype)}, no mask, heads of {head_width}, compute capability 8.0 or more"
    known = dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and card.capability >= (8, 0))
    if known:
        why = "a mask" if half and has_mask else _short(dtype) if not half else f"{card.name} is below 8.0"
        return "efficient", f"memory-efficient attention ({why})"
    return "math", f"no fused kernel for {_short(dtype)} on {card.name}"


_FLASH_WIDTH = 256


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- rules ----------------------------------------------------------------------------------------------


@final
class Moves:
    """What an operator takes and gives back, in order; outputs have their places among it.

    Attributes:
        steps: ``("take", bytes)``, ``("give", number of the take)``, ``("output", number)``; outputs that aren't named
            come at ``("outputs", 0)``, or at the end; ``("multiply", 0)`` is a matrix product (see `workspace_bytes`).
    """

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self._taken = 0

    def take(self, nbytes: int) -> int:
        """Take bytes; the result is what `give` wants."""
        self.steps.append(("take", nbytes))
        self._taken += 1
        return self._taken - 1

    def give(self, *taken: int) -> None:
        """Give back what was taken."""
        self.steps += [("give", number) for number in taken]

    def passing(self, *sizes: int) -> None:
        """Take some after each other, and give all back, the last first."""
        self.give(*reversed([self.take(nbytes) for nbytes in sizes]))

    def output(self, number: int) -> None:
        """Here the operator makes one of its outputs."""
        self.steps.append(("output", number))

    def multiply(self) -> None:
        """Here it multiplies matrices."""
        self.steps.append(("multiply", 0))

    def outputs(self) -> None:
        """Here it makes all others."""
        self.steps.append(("outputs", 0))


Arguments = Sequence[Any]
Rule = Callable[[Arguments, Card, Moves], None]


@dataclass(frozen=True)
class Temporary:
    """One entry of the table.

    Attributes:
        reason: what the bytes are for.
        source: the file of PyTorch whose host code takes them.
        rule: called with the operator's positional arguments, the card, and where to write.
    """

    reason: str
    source: str
    rule: Rule


def moves_of(func: Any, args: Arguments, card: Card) -> list[tuple[str, int]] | None:
    """What an operator takes besides its outputs; ``None`` where it takes nothing.

    Args:
        func: the operator, as the dispatcher names it.
        args: its positional arguments.
        card: that it runs on.
    """
    entry = TABLE.get(func)
    if entry is None:
        return None
    moves = Moves()
    entry.rule(args, card, moves)
    return moves.steps or None


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _multiple(value: int, multiple: int) -> int:
    return value + -value % multiple


def _floor_power(value: int) -> int:
    """The largest power of two that isn't above a positive number."""
    return 1 << (value.bit_length() - 1) if value > 0 else 1


# -- sums, means and other reductions ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """A dimension of a reduction, as the kernel's iterator has it: strides in elements, 0 for what is reduced."""

    size: int
    stride: int
    out_stride: int


def _iterated(shape: Sequence[int], strides: Sequence[int], reduced: set[int]) -> list[_Axis]:
    """The dimensions in the iterator's order, reduced ones first, neighbours merged where memory allows.

    Source: ``reorder_dimensions`` and ``coalesce_dimensions`` in ``aten/src/ATen/TensorIterator.cpp``.
    """
    out_strides, following = {}, 1
    for axis in reversed([axis for axis in range(len(shape)) if axis not in reduced]):
        out_strides[axis] = following
        following *= shape[axis]
    inner = sorted(reduced, key=lambda axis: (strides[axis], -axis))
    outer = sorted(out_strides, key=lambda axis: (out_strides[axis], -axis))
    merged: list[_Axis] = []
    for axis in (*inner, *outer):
        if shape[axis] == 1:
            continue
        new = _Axis(shape[axis], strides[axis], out_strides.get(axis, 0))
        last = merged[-1] if merged else None
        follows = (
            last is not None
            and last.size * last.stride == new.stride
            and last.size * last.out_stride == new.out_stride
            and (last.out_stride == 0) == (new.out_stride == 0)
        )
        if follows and last is not None:
            merged[-1] = _Axis(last.size * new.size, last.stride, last.out_stride)
        else:
            merged.append(new)
    return merged


def staging_bytes(
    shape: Sequence[int],
    strides: Sequence[int],
    reduced: set[int],
    card: Card,
    *,
    accumulated: int = 4,
    vector: int = 4,
) -> tuple[int, int]:
    """The staging buffer and the semaphores of a reduction; zeros where one block of threads sums an output.

    A reduction whose outputs are too few to keep the card busy is split among blocks of threads, which leave their
    part in memory. How many blocks follows from the number of them that the card runs at once.

    Args:
        shape: of the input.
        strides: of it, in elements.
        reduced: its axes that are summed over.
        card: that it runs on.
        accumulated: bytes of a partial result.
        vector: elements that a thread loads at once.

    Source: ``setReduceConfig`` and ``ReduceConfig`` in ``Reduce.cuh``, which is among torch's installed headers.
    """
    axes = _iterated(shape, strides, reduced)
    num_reduced = sum(axis.out_stride == 0 for axis in axes)
    if not num_reduced:
        return 0, 0
    num_inputs = math.prod(axis.size for axis in axes[:num_reduced])
    num_outputs = math.prod(axis.size for axis in axes[num_reduced:])
    along_inputs = num_reduced == len(axes) or axes[0].stride < axes[num_reduced].stride
    fastest = axes[0] if along_inputs else axes[num_reduced]
    across, down = (num_inputs, num_outputs) if along_inputs else (num_outputs, num_inputs)
    outputs_at_once = 1
    if fastest.stride == 1:
        if along_inputs and across >= _LEAST_TO_LOAD_TOGETHER and num_reduced == 1:
            across //= vector
        elif not along_inputs:
            outputs_at_once = _outputs_at_once(axes, num_reduced)
            across //= outputs_at_once
    width, height = _block_of_threads(across, down, _MOST_THREADS // outputs_at_once)
    inputs_a_step, outputs_a_step = (width, 1) if along_inputs else (1, width)
    values = -(-num_inputs // inputs_a_step)  # that one thread sums
    splits_over_warps = values >= min(height * _FEWEST_VALUES, _MOST_VALUES)
    if splits_over_warps:
        inputs_a_step *= height
        values = -(-num_inputs // inputs_a_step)
    else:
        outputs_a_step *= height
    blocks = -(-(num_outputs // outputs_at_once) // outputs_a_step)
    at_once = card.multiprocessors * (card.threads // (width * height))
    if not (splits_over_warps and values >= _MOST_VALUES and blocks <= at_once):
        return 0, 0
    wanted, most, fewest = -(-at_once // blocks), -(-values // _FEWEST_VALUES), -(-values // _MOST_VALUES)
    parts = min(max(wanted, fewest), most)
    if parts <= 1:
        return 0, 0
    a_block = 1 if along_inputs else width * outputs_at_once
    return accumulated * num_outputs * parts * a_block, 4 * blocks


_MOST_THREADS = 512  # of a block
_FEWEST_VALUES, _MOST_VALUES = 16, 256  # that a thread sums, if the reduction is split
_LEAST_TO_LOAD_TOGETHER = 128
_WARP = 32


def _outputs_at_once(axes: Sequence[_Axis], num_reduced: int) -> int:
    """Neighbouring outputs that a thread works on: all strides must be multiples of it, and the number of outputs."""
    must_divide = [axes[num_reduced].size] + [axis.stride for at, axis in enumerate(axes) if at != num_reduced]
    return next(size for size in (4, 2, 1) if all(value % size == 0 for value in must_divide))


def _block_of_threads(across: int, down: int, most: int) -> tuple[int, int]:
    """Width and height of a block: as wide as a warp, then as high, then as wide as may be."""
    wide, high = (most if side >= most else _floor_power(side) for side in (across, down))
    width = min(wide, _WARP)
    height = min(high, most // width)
    return min(wide, most // height), height


def _reduce(
    tensor: Tensor, axes: Any, card: Card, moves: Moves, *, accumulated: int | None = None, vector: int = 4
) -> None:
    """The staging of a reduction over some axes of a tensor (all, where none are named), after its output is made."""
    moves.outputs()
    if tensor.numel() == 0:
        return
    chosen = [axes] if isinstance(axes, int) else list(axes or range(tensor.dim()))
    reduced = {axis % max(1, tensor.dim()) for axis in chosen}
    if accumulated is None:
        accumulated = max(4, tensor.element_size())  # halves are summed in float32
    moves.passing(
        *filter(
            None,
            staging_bytes(tuple(tensor.shape), tensor.stride(), reduced, card, accumulated=accumulated, vector=vector),
        )
    )


def _sum(args: Arguments, card: Card, moves: Moves) -> None:
    _reduce(args[0], args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None, card, moves)


def _norm(args: Arguments, card: Card, moves: Moves) -> None:
    _reduce(args[0], args[2] if len(args) > 2 else None, card, moves)  # order, then axes


def _all(args: Arguments, card: Card, moves: Moves) -> None:
    axes = args[1] if len(args) > 1 and not isinstance(args[1], bool) else None
    _reduce(args[0], axes, card, moves, accumulated=1)


def _mean_of_errors(args: Arguments, card: Card, moves: Moves) -> None:
    """A mean over errors that lie in a buffer of their own, contiguous."""
    reduction = args[2] if len(args) > 2 else 1
    moves.outputs()
    if reduction == 0:
        return
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
    numel = math.prod(shape)
    moves.passing(*filter(None, staging_bytes((numel,), (1,), {0}, card)))


# -- softmax, norms, roll, indexing ------------------------------------------------------------------------


def _softmax_backward(args: Arguments, card: Card, moves: Moves) -> None:
    moves.outputs()
    moves.passing(_nbytes(args[0]))


def _roll(args: Arguments, card: Card, moves: Moves) -> None:
    axes = args[2] if len(args) > 2 else ()
    copies = [moves.take(_nbytes(args[0])) for _ in range(max(0, len(axes) - 1))]
    moves.outputs()
    moves.give(*copies)


def _copies(args: Arguments, moves: Moves, *places: int) -> list[int]:
    """Contiguous copies of arguments that lie otherwise, taken before the outputs."""
    return [moves.take(_nbytes(args[place])) for place in places if not args[place].is_contiguous()]


def _layer_norm(args: Arguments, card: Card, moves: Moves) -> None:
    copies = _copies(args, moves, 0)
    moves.outputs()
    moves.give(*copies)


def _layer_norm_backward(args: Arguments, card: Card, moves: Moves) -> None:
    gradient, inputs, shape = args[:3]
    copied = _copies(args, moves, 1)  # the input's comes first, the gradient's in the call of the kernel
    moves.outputs()
    late = _copies(args, moves, 0)
    width = math.prod(shape)
    rows = inputs.numel() // width
    if rows > _MANY_ROWS and width // _WARP < card.multiprocessors // 2:
        columns = -(-width // _WARP)
        parts = min(_MOST_PARTS // columns, -(-rows // _WARP))
        size = inputs.element_size()
        partial = [moves.take(parts * width * size) for _ in range(2)]  # of weight and bias
        for _ in range(2):
            total = moves.take(width * size)
            moves.passing(*filter(None, staging_bytes((parts, width), (width, 1), {0}, card)))
            moves.give(total)
        moves.give(*reversed(partial))
    moves.give(*late, *copied)
    del gradient


_MANY_ROWS = 64 * 1024
_MOST_PARTS = 32 * 1024


def _index_put(args: Arguments, card: Card, moves: Moves) -> None:
    """An accumulating one sorts its indices, so that sums come out the same each time."""
    if len(args) < 4 or not args[3]:
        return
    indices = [index for index in args[1] if index is not None]
    shape = torch.broadcast_shapes(*(index.shape for index in indices))  # type: ignore[no-untyped-call]
    a_row = 8 * math.prod(shape)
    moves.outputs()
    bounds = [moves.take(8), moves.take(8)]  # the smallest and the largest index, and whether they are allowed
    moves.passing(1)
    moves.passing(1)
    moves.give(*bounds)
    linear = moves.take(a_row)
    moves.passing(a_row)
    copied = [moves.take(_nbytes(args[2]))] if not args[2].is_contiguous() else []
    sorting = [moves.take(a_row) for _ in range(3)]
    moves.passing(_SORT_BYTES)
    moves.give(*reversed(sorting), *copied, linear)


_SORT_BYTES = 3583  # of cub's radix sort, for a few thousand keys


# -- attention ------------------------------------------------------------------------------------------


def _flash_backward(args: Arguments, card: Card, moves: Moves) -> None:
    """Gradients of queries are summed in float32, in whole blocks of rows; and each row's sum of gradient x output."""
    batch, heads, rows, width = args[1].shape
    rows = _multiple(rows, 128)
    width = _multiple(width, 32)
    moves.outputs()
    moves.passing(4 * batch * heads * rows, 4 * batch * heads * rows * width)


def _flash_forward(args: Arguments, card: Card, moves: Moves) -> None:
    """Where heads are too few for the card, keys are split among blocks of threads, which leave partial outputs."""
    batch, heads, rows, width = args[0].shape
    dropout = args[3] if len(args) > 3 else 0.0
    parts = 1 if dropout else _splits(batch * heads * -(-rows // 64), args[1].shape[2], width, card)
    if parts <= 1:
        return
    moves.output(0)
    moves.output(1)
    partial = [
        moves.take(4 * parts * batch * heads * rows),
        moves.take(4 * parts * batch * heads * rows * _multiple(width, 32)),
    ]
    moves.outputs()
    moves.give(*partial)


def _splits(blocks: int, keys: int, width: int, card: Card) -> int:
    """Into how many parts FlashAttention-2 splits the keys, so that its blocks of threads fill the card evenly.

    Source: ``num_splits_heuristic`` in ``flash_attn/flash_api.cpp``.
    """
    per_block = 256 if width <= 64 else 128 if width <= 128 else 64
    key_blocks, places = -(-keys // per_block), 2 * card.multiprocessors
    if blocks >= 0.8 * places:
        return 1
    efficiency = {}
    for parts in range(1, min(128, places, key_blocks) + 1):
        if parts == 1 or -(-key_blocks // parts) != -(-key_blocks // (parts - 1)):
            waves = blocks * parts / places
            efficiency[parts] = waves / math.ceil(waves)
    best = max(efficiency.values(), default=0.0)
    return next((parts for parts, share in efficiency.items() if share >= 0.85 * best), 1)


def _efficient_forward(args: Arguments, card: Card, moves: Moves) -> None:
    """Nothing besides; but the state of random numbers comes before the output."""
    for number in (2, 3, 0, 1):
        moves.output(number)


def _efficient_backward(args: Arguments, card: Card, moves: Moves) -> None:
    """Row sums of gradient x output, and what blocks of threads add up of the queries' gradients."""
    gradient, query, _, value = args[:4]
    batch, heads, rows, width = query.shape
    half = query.element_size() == 2
    laid_out = gradient.transpose(1, 2)  # as the kernel has it: [B, N, heads, D]
    copies = [] if laid_out.is_contiguous() else [moves.take(_nbytes(gradient))]
    moves.outputs()
    row_sums = 4 * batch * heads * rows
    if half:
        sums = moves.take(row_sums)
    else:  # made of other operators
        product = moves.take(4 * gradient.numel())
        sums = moves.take(row_sums)
        if heads > 1 and rows > 1:  # in another order: [B, heads, N]
            total, sums = sums, moves.take(row_sums)
            moves.give(total)
        moves.give(product)
    widest = max(width, value.shape[3])
    tall = widest > 64 and (half or card.capability >= (8, 0))
    block = 128 if tall else 64
    floats = -(-rows // block) * -(-width // 64) * (block * 64 + 4)
    if half and widest > 128:  # too wide for registers
        floats += 2 * 64 * _multiple(width, block)
    workspace = moves.take(4 * batch * heads * _multiple(floats, 4))
    moves.give(sums, workspace, *copies)


# -- convolutions, without cuDNN --------------------------------------------------------------------------


def _is_depthwise(inputs: Tensor, weight: Tensor, groups: int) -> bool:
    return groups > 1 and inputs.shape[1] == groups and weight.shape[0] % inputs.shape[1] == 0


def _unfolded(inputs: Tensor, weight: Tensor, out_size: Sequence[int]) -> int:
    """Bytes of one image's patches as columns."""
    area = math.prod(weight.shape[2:])
    return weight.shape[1] * area * math.prod(out_size) * inputs.element_size()


def _out_size(inputs: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    sides = zip(inputs.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(side + 2 * pad - far * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, far in sides]


def _convolution(args: Arguments, card: Card, moves: Moves) -> None:
    inputs, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
    copies = _copies(args, moves, 0)
    moves.outputs()
    if not transposed and not _is_depthwise(inputs, weight, groups):
        columns = []
        if not _is_pointwise(weight, stride, padding):
            columns.append(moves.take(_unfolded(inputs, weight, _out_size(inputs, weight, stride, padding, dilation))))
        moves.multiply()
        moves.give(*columns)
    moves.give(*copies)


def _is_pointwise(weight: Tensor, stride: Any, padding: Any) -> bool:
    return math.prod(weight.shape[2:]) == 1 and set(stride) == {1} and set(padding) == {0}


def _convolution_backward(args: Arguments, card: Card, moves: Moves) -> None:
    gradient, inputs, weight, _, stride, padding, _, transposed, _, groups, wanted = args[:11]
    made = dict(
        zip([which for which in range(3) if wanted[which]], range(3), strict=False)
    )  # outputs, by what they are
    if transposed or _is_depthwise(inputs, weight, groups):
        _depthwise_backward(args, made, card, moves)
        return
    copies = _copies(args, moves, 0)
    columns = 0 if _is_pointwise(weight, stride, padding) else _unfolded(inputs, weight, gradient.shape[2:])
    taken = []
    if wanted[_OF_INPUT]:
        moves.output(made[_OF_INPUT])
        copies += _copies(args, moves, 1)
        taken = [moves.take(columns)] if columns else []
        moves.multiply()
    for which in (_OF_BIAS, _OF_WEIGHT):
        if which in made:
            moves.output(made[which])
    if not taken and columns:
        taken = [moves.take(columns)]
    moves.multiply()
    moves.give(*taken, *reversed(copies))


def _depthwise_backward(args: Arguments, made: dict[int, int], card: Card, moves: Moves) -> None:
    """Source: ``DepthwiseConv2d.cu``; the bias's gradient is a sum, made behind (``Convolution.cpp``)."""
    copies = _copies(args, moves, 0)
    if _OF_WEIGHT in made:
        inputs = _copies(args, moves, 1)
        moves.output(made[_OF_WEIGHT])
        moves.give(*inputs)
    if _OF_INPUT in made:
        moves.output(made[_OF_INPUT])
    moves.give(*copies)
    if _OF_BIAS in made:
        moves.output(made[_OF_BIAS])
        gradient = args[0]
        axes = {axis for axis in range(gradient.dim()) if axis != 1}
        moves.passing(*filter(None, staging_bytes(tuple(gradient.shape), gradient.stride(), axes, card)))


_OF_INPUT, _OF_WEIGHT, _OF_BIAS = range(3)


MULTIPLY = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._addmm_activation.default,
    }
)
"""Operators that are a matrix product: they take a workspace (`workspace_bytes`) if their thread has none yet."""

_REDUCE = "partial results of blocks of threads, and their semaphores"
_CONTIGUOUS = "a contiguous copy of a permuted input"
_ATTENTION = "transformers/cuda/attention_backward.cu"
_SUMS = Temporary(_REDUCE, "Reduce.cuh", _sum)
TABLE: dict[Any, Temporary] = {
    aten.sum.dim_IntList: _SUMS,
    aten.sum.default: _SUMS,
    aten.mean.dim: _SUMS,
    aten.mean.default: _SUMS,
    aten.linalg_vector_norm.default: Temporary(_REDUCE, "Reduce.cuh", _norm),
    aten.all.default: Temporary(_REDUCE, "Reduce.cuh", _all),
    aten.any.default: Temporary(_REDUCE, "Reduce.cuh", _all),
    aten.all.dim: Temporary(_REDUCE, "Reduce.cuh", _all),
    aten.any.dim: Temporary(_REDUCE, "Reduce.cuh", _all),
    aten.mse_loss.default: Temporary(_REDUCE, "Reduce.cuh; aten/src/ATen/native/Loss.cpp", _mean_of_errors),
    aten.smooth_l1_loss.default: Temporary(_REDUCE, "Reduce.cuh; aten/src/ATen/native/Loss.cpp", _mean_of_errors),
    aten._softmax_backward_data.default: Temporary(
        "the product of gradient and output", "SoftMax.cu", _softmax_backward
    ),
    aten.roll.default: Temporary("the result of each axis but the last", "TensorTransformations.h", _roll),
    aten.native_layer_norm.default: Temporary(_CONTIGUOUS, "layer_norm_kernel.cu", _layer_norm),
    aten.native_layer_norm_backward.default: Temporary(
        f"{_CONTIGUOUS}; partial sums of the weights' gradients over many rows",
        "layer_norm_kernel.cu",
        _layer_norm_backward,
    ),
    aten.index_put.default: Temporary("sorted indices and a copy of the values", "Indexing.cu", _index_put),
    aten._scaled_dot_product_flash_attention.default: Temporary(
        "partial outputs, where heads are few", "flash_attn/flash_api.cpp", _flash_forward
    ),
    aten._scaled_dot_product_flash_attention_backward.default: Temporary(
        "row sums, and the queries' gradients in float32", "flash_attn/flash_api.cpp", _flash_backward
    ),
    aten._scaled_dot_product_efficient_attention.default: Temporary(
        "nothing, in another order", "transformers/cuda/attention.cu", _efficient_forward
    ),
    aten._scaled_dot_product_efficient_attention_backward.default: Temporary(
        "row sums, and the queries' gradients in float32", _ATTENTION, _efficient_backward
    ),
    aten.convolution.default: Temporary("patches of one image as columns", "ConvolutionMM2d.cu", _convolution),
    aten.convolution_backward.default: Temporary(
        f"{_CONTIGUOUS}; patches of one image as columns", "ConvolutionMM2d.cu", _convolution_backward
    ),
}
"""Of each operator that takes something besides its outputs: why, where PyTorch says so, and how much."""
