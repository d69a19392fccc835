"""Linear layers whose weights are held in 4 bits, beside adapters that learn (QLoRA, arXiv 2305.14314).

A weight is NF4: blocks of 64 numbers, each block with its largest absolute value in float32, 0.5625 bytes a number. It
is dequantised where it is multiplied, forwards and once more backwards, and gone right after; so a step holds one
layer's weight in full at a time, and a layer computes bit for bit what ``nn.Linear`` does with the dequantised weight.

What is packed is a buffer: it never learns, and whatever moves, saves, copies or counts buffers does so with it. That
is why bitsandbytes' own layer isn't kept, whose scales are no tensors of a module and which leaves autocast aside. Its
operators are: they run on processors too, and tell their shapes. (torchao 0.18 has no NF4 outside of its
prototypes, and int4 neither in float32 nor on processors.)
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.errors import BackboneError, RecipeError, arg

BLOCK = 64
"""Numbers that share a scale."""
_KIND = "nf4"
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def silence_hint() -> None:
    """Have bitsandbytes, once it is imported, leave out one line: it misses a kernel that nothing here calls.

    peft imports it, too.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_hint)


def _is_no_hint(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def check_quantizer() -> None:
    """Import what quantises.

    Raises:
        RecipeError: it is missing.
    """
    silence_hint()
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise RecipeError(
            f"{arg('quantize', '4bit')}: it needs bitsandbytes ({error}); pip install 'localgrad[8bit]'."
        ) from error


def dequantized(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight [out, in] from its bytes [out, in / 2] and the scales of its blocks."""
    narrow = dtype if dtype in _NARROW else torch.float32
    # As one row: bitsandbytes 0.50's kernels for AVX512 take a block for ended where a row ends.
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, scales, BLOCK, _KIND, [2 * packed.numel()], narrow
    )
    return flat.view(packed.shape[0], 2 * packed.shape[1]).to(dtype)


@final
class _TimesDequantized(torch.autograd.Function):
    """``F.linear`` that keeps no more of its weight than the packed one."""

    @staticmethod
    def forward(inputs: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's outputs."""
        return F.linear(inputs, dequantized(packed, scales, inputs.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """What the backward pass needs."""
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        """The gradients of inputs and bias."""
        (gradient,) = gradients
        packed, scales = ctx.saved_tensors
        of_inputs = gradient @ dequantized(packed, scales, gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return of_inputs, None, None, of_bias


class _Packed(NamedTuple):
    """A weight in 4 bits: bytes, and the scales of its blocks."""

    packed: Tensor
    scales: Tensor


def packed_weight(layer: object, *, has_values: bool = True) -> _Packed | None:
    """The weight of a linear layer in 4 bits; ``None`` where it can't be held so.

    Args:
        layer: plain, with an even number of inputs; or bitsandbytes' own of NF4 in blocks of 64 numbers.
        has_values: false where nobody reads values: nothing is computed then.

    Raises:
        BackboneError: bitsandbytes has rearranged its own layer's weight.
    """
    if not isinstance(layer, nn.Linear) or layer.in_features % 2:
        return None
    weight, shape = layer.weight.data, (layer.out_features, layer.in_features // 2)
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        if (state.quant_type, state.blocksize, weight.dtype) != (_KIND, BLOCK, torch.uint8):
            return None
        if getattr(state, "packing_format_for_cpu", False):  # with AVX512-BF16, in its layer's first evaluation
            raise BackboneError(
                "bitsandbytes has put a layer's 4 bits in another order, for this processor, when the model was "
                "evaluated; call localgrad.quantize_base(model) before that."
            )
        functional = importlib.import_module("bitsandbytes.functional")
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        return _Packed(weight.as_subclass(Tensor).view(shape), scales.float())
    if type(layer).forward is not nn.Linear.forward or weight.dtype not in _NARROW:
        return None
    if not has_values:
        return _Packed(torch.empty(shape, dtype=torch.uint8), torch.empty(-(-weight.numel() // BLOCK)))
    packed, scales = torch.ops.bitsandbytes.quantize_4bit.default(weight.contiguous(), BLOCK, _KIND, torch.uint8)
    return _Packed(packed.view(shape), scales)


def dequantize_layers(model: nn.Module) -> nn.Module:
    """Put plain linear layers, of the same values, in the place of those whose weights are held in 4 bits; in place."""
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight, requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        holder, _, own = name.rpartition(".")
        setattr(model.get_submodule(holder), own, plain)
    return model


@final
class QuantizedLinear(nn.Module):
    """A linear layer with a weight of 4 bits, which doesn't learn.

    Args:
        packed: the weight, see ``packed_weight``.
        bias: a parameter, taken over as it is.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, packed: _Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("packed", packed.packed)
        self.register_buffer("scales", packed.scales)
        self.bias = bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:  # noqa: FBT001, FBT002  # torch's own
        """As a module's, but that scales stay float32: in another type they would be rounded, and refused."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    @property
    def out_features(self) -> int:
        """Numbers that it gives."""
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        """Numbers that it takes."""
        return 2 * self.packed.shape[1]

    @property
    def num_weights(self) -> int:
        """Numbers that are held in 4 bits."""
        return 2 * self.packed.numel()

    @property
    def weight(self) -> Tensor:
        """The dequantised weight [out, in], made anew each time; what is written into it is lost."""
        return dequantized(self.packed, self.scales)

    def forward(self, inputs: Tensor) -> Tensor:
        """``F.linear`` with the dequantised weight, in autocast's type where that is on."""
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        made: Tensor = _TimesDequantized.apply(inputs.to(dtype), self.packed, self.scales, bias)
        return made

    def reset_parameters(self) -> None:
        """Refuse to begin anew.

        Raises:
            BackboneError: always; it would stay random.
        """
        raise BackboneError(
            f"{arg('quantize', '4bit')}: weights of 4 bits don't learn, so that they can't begin anew; take "
            "classifier_options.weights 'copy' or 'ema'."
        )

    def extra_repr(self) -> str:
        """Its sizes, as ``nn.Linear`` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize_base(model: nn.Module, *, has_values: bool = True) -> nn.Module:
    """Hold the weights of the linear layers that adapters of peft stand in in 4 bits (QLoRA).

    What bitsandbytes holds in 4 bits already is taken over as it is. Other layers that aren't plain, or have an odd
    number of inputs, stay. peft's ``merge`` has no effect on such layers: dequantise and add by hand.

    Args:
        model: as peft has made it; changed in place, and given back.
        has_values: false where nobody reads weights, as for estimates.

    Raises:
        RecipeError: bitsandbytes is missing.
        BackboneError: no layer can be, or adapters are merged.
    """
    check_quantizer()
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise BackboneError(
            f"{arg('quantize', '4bit')}: adapters are merged into the weights, which could not be undone in 4 bits; "
            "call model.unmerge_adapter() first."
        )
    made: dict[int, QuantizedLinear] = {}  # by layer: one that is in two places stays one
    for adapted in list(model.modules()):
        layer = adapted._modules.get("base_layer")
        if id(layer) not in made and isinstance(layer, nn.Linear):
            packed = packed_weight(layer, has_values=has_values)
            if packed is not None:
                made[id(layer)] = QuantizedLinear(packed, layer.bias)
        if id(layer) in made:
            adapted.base_layer = made[id(layer)]
    if not made:
        raise BackboneError(
            f"{arg('quantize', '4bit')}: {type(model).__name__} has no adapters in plain linear layers with an even "
            f"number of inputs; put some in first, as by {arg('lora', 8)} or peft.get_peft_model."
        )
    return model


def num_quantized(model: nn.Module) -> int:
    """Weights of a model that are held in 4 bits; no parameters of it."""
    return sum(layer.num_weights for layer in model.modules() if isinstance(layer, QuantizedLinear))


def num_weights(model: nn.Module) -> int:
    """All numbers that a model learns or holds still."""
    return sum(weight.numel() for weight in model.parameters()) + num_quantized(model)


def plain_weight(weights: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight of a layer in a state dict, dequantised where it has 4 bits."""
    packed = weights.get(f"{layer}.packed")
    return weights[f"{layer}.weight"] if packed is None else dequantized(packed, weights[f"{layer}.scales"])
