"""Models of timm that were proved before, in this process, aren't proved again: most tests need one that is split."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from localgrad.backbones.proof import Shown

SIMPLE = (bool, int, float, str, tuple, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def proved_once(prove: Callable[..., Shown]) -> Callable[..., Shown]:
    """A proof that remembers what it was asked of models whose code is all of libraries, and passed."""
    passed: dict[Hashable, Shown] = {}

    def proved(
        model: nn.Module,
        chain: nn.Module,
        parts: Any,
        blocks: Sequence[tuple[str, nn.Module]],
        images: Tensor,
        **more: Any,
    ) -> Shown:
        # With a call, the parts were made by hand, or by watching: any parts may be given there.
        about = None if any(more.values()) else _about(model, images)
        if about is None:
            return prove(model, chain, parts, blocks, images, **more)
        key = (about, tuple(name for name, _ in blocks))
        if key not in passed:
            passed[key] = prove(model, chain, parts, blocks, images)
        return passed[key]

    return proved


def _about(model: nn.Module, images: Tensor) -> Hashable:
    """All that a proof may depend on but the values of weights; ``None`` where that can't be told."""
    found: list[Hashable] = [(images.shape, images.dtype)]
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        own = vars(module)
        if not kind.__module__.startswith(("timm.", "torch.nn.")) or "forward" in own or _is_hooked(own):
            return None
        plain = [(key, value) for key, value in own.items() if isinstance(value, SIMPLE) and _is_plain(value)]
        found.append((name, kind, kind.forward, tuple(plain)))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    numbers: dict[int, int] = {}
    for name, tensor in tensors:
        number = numbers.setdefault(id(tensor), len(numbers))
        if type(tensor) not in (Tensor, nn.Parameter):
            return None
        found.append((name, number, tensor.shape, tensor.dtype, tensor.requires_grad, bool(tensor.isfinite().all())))
    return tuple(found)


def _is_hooked(own: dict[str, Any]) -> bool:
    """Whether there are hooks beside the package's own, with which splitting looks on."""
    return any(not hook.__module__.startswith("localgrad.") for name in HOOKS for hook in own[name].values())


def _is_plain(value: Any) -> bool:
    return all(_is_plain(item) for item in value) if isinstance(value, tuple) else isinstance(value, SIMPLE)
