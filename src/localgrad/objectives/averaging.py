"""What a moving average of a module's weights averages, and what it doesn't.

Weights are averaged, and running statistics of batch and instance norms, which are averages themselves. All other
buffers (counters, codes, tables) are the model's own. A spectral norm's vectors belong to one weight: those of the
averaged weight are found by power iteration, a few at each update. So its largest singular value is one, as in the
model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from localgrad.errors import RecipeError, arg

POWER_ITERATIONS = 8
"""At each update. A norm's own take one a step, but an average jumps at first, and is looked at at once."""


def averaged_pairs(average: nn.Module, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """What is averaged, each tensor once: of the average, and of the model. In the order of a state dict."""
    seen: set[int] = set()
    for own, part in zip(average.modules(), model.modules(), strict=True):
        for name in (*part._parameters, *(_STATISTICS if isinstance(part, _NormBase) else ())):
            mine, value = getattr(own, name), getattr(part, name)
            if mine is None or id(mine) in seen:
                continue
            seen.add(id(mine))
            if mine.is_floating_point() or mine.is_complex():
                yield mine, value


def check_moves(model: nn.Module) -> None:
    """Refuse to average weights in 16 bits: a step of a slow average is less than half of their last bit.

    Raises:
        RecipeError: naming one of them.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.is_floating_point() and weight.dtype.itemsize < 4:
            raise RecipeError(
                f"{name} is {weight.dtype}, in which a moving average would stay where it is; keep the model's weights "
                f"in float32 ({arg('precision', 'bf16')} computes in bf16 all the same), or take no average."
            )


_STATISTICS = ("running_mean", "running_var")


@final
class OtherBuffers:
    """Lets the buffers of an average that aren't averaged be as the model's are."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Tensor, int]] = {}  # by number of a buffer: what was copied last, its version

    @torch.no_grad()
    def follow(self, average: nn.Module, model: nn.Module) -> None:
        """Copy what may have changed since the last call."""
        for number, (table, name, value, is_shown) in enumerate(_other_buffers(average, model)):
            last = self._last.get(number)
            # Constants are copied once. Fused kernels write past versions, so what a state dict shows is copied always.
            if is_shown or last is None or last[0] is not value or last[1] != value._version:
                _copy_buffer(table, name, value)
                self._last[number] = value, value._version


Buffers = dict[str, Tensor | None]
"""A module's table of them."""


def _other_buffers(average: nn.Module, model: nn.Module) -> Iterator[tuple[Buffers, str, Tensor, bool]]:
    """The other buffers: the average's table and the name in it, the model's buffer, whether a state dict shows it."""
    for own, part in zip(average.modules(), model.modules(), strict=True):
        kept = {*(_STATISTICS if isinstance(part, _NormBase) else ()), *_vectors_of(own)}
        for name, value in part._buffers.items():
            if value is not None and name not in kept:
                yield own._buffers, name, value, name not in part._non_persistent_buffers_set


def _copy_buffer(table: Buffers, name: str, value: Tensor) -> None:
    """Let a buffer be as another one is; in its own memory, where it has the shape."""
    own = table.get(name)
    if own is None or (own.shape, own.dtype) != (value.shape, value.dtype):
        table[name] = value.to(value.device if own is None else own.device, copy=True)
    else:
        own.copy_(value)


def _hooked_norms(part: nn.Module) -> list[Any]:
    return [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def _vectors_of(part: nn.Module) -> list[str]:
    """Names of a spectral norm's vectors in a part."""
    if isinstance(part, _SpectralNorm):
        return ["_u", "_v"]
    return [f"{hook.name}_{vector}" for hook in _hooked_norms(part) for vector in "uv"]


def has_spectral_norms(module: nn.Module) -> bool:
    """Whether a module has PyTorch's spectral norm, of the new kind or the old, anywhere."""
    return any(_vectors_of(part) for part in module.modules())


@torch.no_grad()
def renew_spectral_norms(average: nn.Module) -> None:
    """Take power iterations with averaged weights."""
    for part in average.modules():
        for hook in _hooked_norms(part):
            for _ in range(POWER_ITERATIONS):
                weight = hook.compute_weight(part, do_power_iteration=True)
            setattr(part, hook.name, weight)
        if isinstance(part, ParametrizationList):
            norms = [norm for norm in part if isinstance(norm, _SpectralNorm)]
            for norm in norms:
                norm.training = True
            for _ in range(POWER_ITERATIONS if norms else 0):
                part()
            for norm in norms:
                norm.training = False
