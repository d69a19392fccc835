"""The halves of a timm block: its attention and its MLP, each as ``x + drop_path(branch(x))``.

What. ``find_pieces(block, example)`` returns the pieces that, run in sequence, give what the block gives, bit for bit.
A branch treats every image by itself (``per_image``), so it may run over a part of the batch at a time; the drop path
stands outside of it and draws for the whole batch, in the order in which the block itself draws.

How. There is no table of architectures but one of *written forms*: where timm puts norm, attention, layer scale and
MLP under which names. Each form is tried on an example, in evaluation and in training mode, and taken only if it gives
the block's own bits. A block that no form fits is one piece of its own, the whole block: still right, only coarser.

Source: timm 1.0.31 (``x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))`` and its variants). The idea of cutting
a block at its residual additions is common to reversible networks (RevNet, arXiv 1707.04585) and to mega-batching of
feed-forward chunks (Reformer, arXiv 2001.04451, Section 3: "chunking").

Shapes: B batch first in every tensor; what follows is the block's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ._timm_adapters import Step, attribute, identity

ATTENTION_NAMES = ("_attn", "_shifted_window_attn", "_partition_attn", "attn", "token_mixer")
"""Where a block keeps its attention, the first that exists: Swin's methods roll and cut windows around ``attn``."""


@dataclass(frozen=True)
class Branch:
    """One residual branch: ``scale(after(inner(before(x))))``.

    Attributes:
        inner: attention or MLP.
        before: a norm, or identity.
        after: a norm, or identity.
        args: follow the features in the call of ``inner``.
        kwargs: by keyword.
        recomputed: tensor arguments, made anew at each call (rope).
        scale: the module and the name of its layer-scale parameter, where that is a bare parameter.
    """

    inner: Callable[..., Tensor]
    before: Callable[[Tensor], Tensor] = identity
    after: Callable[[Tensor], Tensor] = identity
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    recomputed: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    scale: tuple[nn.Module, str] | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Features [B, ...] to the branch's output, of the same shape."""
        tensors = {keyword: source() for keyword, source in self.recomputed.items()}
        result = self.after(self.inner(self.before(features), *self.args, **self.kwargs, **tensors))
        if self.scale is not None:
            module, name = self.scale
            result = getattr(module, name) * result
        return result


@dataclass(frozen=True)
class Piece:
    """A part of a block that can be recomputed by itself.

    Attributes:
        branch: what runs under the checkpoint.
        drop_path: what happens to the branch's output before it is added to the features; ``None`` where the piece is
            no residual: the branch's output is the piece's.
        per_image: whether the branch treats every image of a batch by itself, so that it may run over parts of it.
        draws: whether it draws random numbers in training mode.
    """

    branch: Callable[[Tensor], Tensor]
    drop_path: Callable[[Tensor], Tensor] | None
    per_image: bool
    draws: bool

    def __call__(self, features: Tensor) -> Tensor:
        """Run the piece plainly."""
        if self.drop_path is None:
            return self.branch(features)
        return features + self.drop_path(self.branch(features))


def whole_block(block: nn.Module) -> Piece:
    """A block as one piece."""
    return Piece(block, None, per_image=_treats_images_apart(block), draws=_draws(block))


def find_pieces(block: nn.Module, example: Tensor, *, proved: bool = True) -> list[Piece]:
    """Cut a block at its residual additions.

    Args:
        block: one block of a backbone.
        example: features that enter it, [2 or more, ...].
        proved: compare bits; otherwise (fake tensors, weights without values) shapes only.

    Returns:
        Two or more pieces where the block's written form is known, else one: the whole block. The block keeps its mode,
        buffers and the random state.
    """
    whole = whole_block(block)
    if not whole.per_image:  # batch statistics: a half would see another batch than the block does
        return [whole]
    steps = list(block) if isinstance(block, nn.Sequential) else [block]
    pieces: list[Piece] = []
    for step in steps:
        found = _pieces_of_step(step, example, proved=proved)
        pieces += found
        if step is not steps[-1]:
            with torch.no_grad(), _rewound(step):
                example = step(example)
    return pieces if len(pieces) > 1 else [whole]


def _pieces_of_step(step: nn.Module, example: Tensor, *, proved: bool) -> list[Piece]:
    glue: list[Piece] = []
    module, args, kwargs, recomputed = step, (), {}, {}
    if isinstance(step, Step):
        if step.unpack:
            return [Piece(step, None, per_image=True, draws=_draws(step))]
        module, args, kwargs = step.module, step.args, step.kwargs
        recomputed = dict(step.recomputed.items())
        if step.glue is not identity:
            glue = [Piece(step.glue, None, per_image=True, draws=False)]
    for branches in _written_forms(module, args, kwargs, recomputed):
        pieces = [*glue, *(Piece(branch, drop, per_image=True, draws=_draws_in(branch)) for branch, drop in branches)]
        if _same_results(step, pieces, example, proved=proved):
            return pieces
    return [Piece(step, None, per_image=True, draws=_draws(step))]


Form = list[tuple[Branch, Callable[[Tensor], Tensor]]]


def _written_forms(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recomputed: dict[str, Any]
) -> Iterator[Form]:
    """The ways in which timm writes a block with two residual branches."""
    attention = next((found for name in ATTENTION_NAMES if (found := attribute(module, name)) is not None), None)
    mlp = attribute(module, "mlp")
    norms = [attribute(module, name) for name in ("norm1", "norm2")]
    if attention is None or mlp is None or None in norms:
        return
    drops = [attribute(module, f"drop_path{n}") or attribute(module, "drop_path") or identity for n in (1, 2)]
    scales = [next((n for n in names if attribute(module, n) is not None), None) for names in _SCALES]
    for mlp_args in dict.fromkeys(((), args)):
        inner = (
            {"inner": attention, "args": args, "kwargs": kwargs, "recomputed": recomputed},
            {"inner": mlp, "args": mlp_args},
        )
        for norm_first in (True, False):
            form: Form = []
            for number in (0, 1):
                scale = scales[number]
                layer_scale = attribute(module, scale) if scale else None
                after: list[Any] = [] if norm_first else [norms[number]]
                if isinstance(layer_scale, nn.Module):
                    after.append(layer_scale)
                branch = Branch(
                    before=norms[number] if norm_first else identity,
                    after=_Chain(after) if after else identity,
                    scale=(module, scale) if scale and isinstance(layer_scale, nn.Parameter) else None,
                    **inner[number],
                )
                form.append((branch, drops[number]))
            yield form


_SCALES = (("ls1", "gamma_1", "gamma1"), ("ls2", "gamma_2", "gamma2"))


@dataclass(frozen=True)
class _Chain:
    """Calls in a row; plain data, so that a copy of the model copies it too."""

    calls: Sequence[Callable[[Tensor], Tensor]]

    def __call__(self, features: Tensor) -> Tensor:
        for call in self.calls:
            features = call(features)
        return features


def _same_results(step: nn.Module, pieces: Sequence[Piece], example: Tensor, *, proved: bool) -> bool:
    was_training = step.training
    try:
        for mode in (False, True) if proved else (True,):
            step.train(mode)
            with torch.no_grad():
                with _rewound(step):
                    expected = step(example)
                with _rewound(step):
                    found = example
                    for piece in pieces:
                        found = piece(found)
            if found.shape != expected.shape or (proved and not torch.equal(found, expected)):
                return False
    except (AttributeError, TypeError, ValueError, RuntimeError):  # the form was another block's
        return False
    finally:
        step.train(was_training)
    return True


@contextmanager
def _rewound(step: nn.Module) -> Iterator[None]:
    """Put the random state back at the end (there are no buffers to put back: batch norms were ruled out)."""
    device = next((tensor.device for tensor in step.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _treats_images_apart(block: nn.Module) -> bool:
    return not any(isinstance(module, _BatchNorm) for module in block.modules())


def _draws(*modules: object) -> bool:
    return any(
        (isinstance(part, _DropoutNd) and part.p > 0) or (getattr(part, "drop_prob", None) or 0) > 0
        for module in modules
        if isinstance(module, nn.Module)
        for part in module.modules()
    )


def _draws_in(branch: Branch) -> bool:
    inner = getattr(branch.inner, "__self__", branch.inner)  # a method's block holds both drop paths: look at its parts
    if inner is not branch.inner and isinstance(inner, nn.Module):
        return _draws(attribute(inner, "attn"))
    return _draws(inner)
