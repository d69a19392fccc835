"""Prove that a backbone's parts are its model: the same logits, the same gradient of every parameter, bit for bit.

The model as its owner handed it over runs first, then the parts, from the same buffers and random state; in eval and in
train mode. Held against each other are

* what every block is given, call by call;
* the logits;
* the gradients of images and trainable parameters, of the logits and of the last block's output.

A head, a norm or a layer scale that starts at zero would hide everything before it. So parameters that are nothing but
zeros get random values for as long as the proof takes. Logits of the true weights are compared before (``split``).

Parameters that several parts read (a rotary table of which every block makes its own) get the sum of several gradients,
in another order of summation: these are held to rounding.

Memory. Every block runs under a checkpoint, in the model and in the parts alike, so that one block's activations are
alive, for one image; and the trainable parameters' gradients, once. Of those of the model only digests are kept. A
training step needs more: its optimizer's state, and the activations of a whole local module.

``autograd.grad`` is used, and not ``backward``: gradients that are there stay, and nobody's hooks on them are called.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ._state import ModelState, left_as_it_was
from ._timm_adapters import unsupported

FEATURES_SHARE = 0.01
"""Length of the last block's cotangent beside that of the logits: large enough to count, too small to drown them."""


@dataclass
class Trace:
    """What one forward and backward pass showed."""

    calls: list[tuple[str, bytes]] = field(default_factory=list)
    """Of every call of a block, in order: its name, and a digest of all tensors that it was given."""
    shapes: list[torch.Size] = field(default_factory=list)
    """Of the first tensor that each call was given."""
    last: Tensor | None = None
    """What the last call gave."""
    is_forward: bool = True
    """Whether the forward pass is under way: a model that recomputes calls its blocks in the backward pass again."""
    logits: Any = None
    gradients: dict[str, bytes | Tensor | None] = field(default_factory=dict)
    """Of images and parameters, by name: digests, but for the tensors of what several parts read."""


def prove(
    model: nn.Module,
    chain: nn.Module,
    parts: Sequence[nn.Module],
    blocks: Sequence[tuple[str, nn.Module]],
    images: Tensor,
) -> frozenset[str]:
    """Compare parts with their model; both are left as they are.

    Args:
        model: on the processor.
        chain: runs the parts in sequence; shares its parameters with the model.
        parts: stem, blocks and tail.
        blocks: the modules of the trunk, by name, that both call.
        images: [B, C, H, W], B at least 2.

    Returns:
        Names of the buffers that a forward pass writes.

    Raises:
        BackboneError: something differs; the message says what.
    """
    blocks = list({id(block): (name, block) for name, block in blocks if not isinstance(block, nn.Identity)}.values())
    written: set[str] = set()
    shapes: list[list[torch.Size]] = []
    counts = Counter(id(weight) for part in parts for weight in part.parameters())
    shared = {number for number, count in counts.items() if count > 1}
    with left_as_it_was(model, chain) as state, torch.enable_grad(), _nothing_hidden(model):
        for mode in ("eval", "train"):
            # Only batch norms need a second image, and only in training; what else the number of images may
            # show, splitting has seen by its own two.
            count = 2 if mode == "train" and any(isinstance(m, _BatchNorm) for m in model.modules()) else 1
            traces = []
            for run in (model, chain):
                state.restore()
                for each in (model, chain):
                    each.train(mode == "train")
                traces.append(_trace(run, model, blocks, images[:count], shared))
                if run is model:
                    written |= state.written_buffers()
                    _check_written(model, state)
            theirs, ours = traces
            _compare(model, theirs, ours, mode)
            shapes.append(theirs.shapes)
    if [shape[1:] for shape in shapes[0]] != [shape[1:] for shape in shapes[1]]:
        raise unsupported(
            model, "in train mode it drops tokens, so features have no grid (build it with patch_drop_rate=0)"
        )
    return frozenset(written)


@contextmanager
def _nothing_hidden(model: nn.Module) -> Iterator[None]:
    """Random values in place of parameters that are all zeros."""
    zeros = [weight.data for weight in model.parameters() if weight.is_floating_point() and not weight.data.any()]
    generator = torch.Generator().manual_seed(3)
    for weight in zeros:
        bound = max(1, weight[0].numel()) ** -0.5 if weight.ndim > 1 else 0.5
        weight.uniform_(-bound, bound, generator=generator)
    try:
        yield
    finally:
        for weight in zeros:
            weight.zero_()


def _check_written(model: nn.Module, state: ModelState) -> None:
    for name in state.written_parameters():
        raise unsupported(
            model, f"its forward pass writes into its parameter {name}; make a buffer of it, and build the model anew"
        )
    for name in state.replaced_buffers(model):
        raise unsupported(
            model,
            f"its forward pass replaces its buffer {name}, and its parts would each keep their own; write into it "
            f"(self.{name}.copy_(...))",
        )


def _trace(
    run: nn.Module, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], images: Tensor, shared: set[int]
) -> Trace:
    trace = Trace()
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    entered = images.detach().clone().requires_grad_()
    with _observed(blocks, trace):
        # A clone, since a leaf that needs a gradient could not be written into, as images can.
        trace.logits = run(entered.clone())
        trace.is_forward = False
        ends = [end for end in (trace.logits, trace.last) if isinstance(end, Tensor) and end.requires_grad]
        if not ends:
            return trace
        starts = [("the images", entered), *named]
        lengths = [1.0 if end is trace.logits else FEATURES_SHARE for end in ends]
        cotangents = [_cotangent(end, length) for end, length in zip(ends, lengths, strict=True)]
        found = torch.autograd.grad(ends, [start for _, start in starts], cotangents, allow_unused=True)
    for (name, start), gradient in zip(starts, found, strict=True):
        keeps = gradient is None or id(start) in shared
        trace.gradients[name] = gradient if keeps else digest([gradient])
    trace.last = None
    trace.logits = trace.logits.detach() if isinstance(trace.logits, Tensor) else trace.logits
    return trace


@contextmanager
def _observed(blocks: Sequence[tuple[str, nn.Module]], trace: Trace) -> Iterator[None]:
    """Let blocks note what they are given, and recompute what is inside them in the backward pass."""
    before = [(block, vars(block).get("forward")) for _, block in blocks]
    for name, block in blocks:
        vars(block)["forward"] = _noting(name, block.forward, trace)
    try:
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def _noting(name: str, forward: Callable[..., Any], trace: Trace) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        if trace.is_forward:
            given = list(tensors_in((args, dict(sorted(kwargs.items())))))
            trace.calls.append((name, digest(given)))
            trace.shapes.append(given[0].shape if given else torch.Size())
        output = checkpoint(forward, *args, use_reentrant=False, determinism_check="none", **kwargs)
        if trace.is_forward:
            trace.last = next(tensors_in(output), None)
        return output

    return noted


def _compare(model: nn.Module, theirs: Trace, ours: Trace, mode: str) -> None:
    if not isinstance(theirs.logits, Tensor):
        raise unsupported(model, f"in {mode} mode it returns no tensor of logits")
    for expected, found in zip(theirs.calls, ours.calls, strict=False):
        if expected != found:
            raise unsupported(model, f"in {mode} mode its parts give {expected[0]} other features than the model does")
    if len(theirs.calls) != len(ours.calls):
        calls = f"{len(ours.calls)} blocks, the model {len(theirs.calls)}"
        raise unsupported(model, f"in {mode} mode its parts call {calls}")
    if not isinstance(ours.logits, Tensor) or digest([ours.logits]) != digest([theirs.logits]):
        raise unsupported(model, f"in {mode} mode its parts give other logits than the model")
    for name, expected_gradient in theirs.gradients.items():
        if not _same_gradient(expected_gradient, ours.gradients.get(name)):
            raise unsupported(
                model, f"in {mode} mode its parts give the model's logits, but {name} gets another gradient"
            )


def _same_gradient(expected: bytes | Tensor | None, found: bytes | Tensor | None) -> bool:
    if not (isinstance(expected, Tensor) and isinstance(found, Tensor)):
        return expected == found if type(expected) is type(found) else False
    bound = max(1e-4, 8 * torch.finfo(expected.dtype).eps) * expected.abs().max()
    return bool((expected - found).abs().max() <= bound)


def _cotangent(end: Tensor, length: float) -> Tensor:
    return length * torch.randn(end.shape, generator=torch.Generator().manual_seed(1)).to(end.dtype)


def digest(tensors: Sequence[Tensor]) -> bytes:
    """A digest of the shapes and bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        dense = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
        found.update(repr((*dense.shape, dense.dtype)).encode())
        found.update(memoryview(dense.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()))  # type: ignore[arg-type]
    return found.digest()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
