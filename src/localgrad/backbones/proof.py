"""Prove that a backbone's parts are its model: the same logits, the same gradient of every parameter, bit for bit.

The model runs first, then the parts, from the same buffers and random state; in eval and in train mode. Held against
each other are what every block is given, call by call; the logits; and the gradients of images and trainable
parameters, of the logits and of the last block's output.

A head, a norm or a layer scale that starts at zero would hide everything before it: parameters that are nothing but
zeros get random values for as long as the proof takes. Logits of the true weights are compared before (``split``).
Parameters that several parts read (a rotary table of which every block makes its own) get the sum of several gradients,
in another order of summation: these are held to rounding.

Every block runs under a checkpoint, so that one block's activations are alive, for one image; of the model's gradients
only digests are kept. ``autograd.grad`` is used, and not ``backward``: gradients that are there stay, and nobody's
hooks on them are called.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from localgrad.backbones.state import ModelState, left_as_it_was
from localgrad.backbones.timm_models import unsupported

FEATURES_SHARE = 0.01
"""Length of the last block's cotangent beside that of the logits: large enough to count, too small to drown them."""


@dataclass
class Passes:
    """What one forward and backward pass showed."""

    calls: list[tuple[str, bytes]] = field(default_factory=list)
    """Of every call of a block, in order: its name, and a digest of all tensors that it was given."""
    last: Tensor | None = None
    """What the last call gave."""
    is_forward: bool = True
    """Whether the forward pass is under way: a model that recomputes calls its blocks in the backward pass again."""
    logits: Tensor | None = None
    gradients: dict[str, bytes | Tensor | None] = field(default_factory=dict)
    """Of images and parameters, by name: digests, but for the tensors of what several parts read."""


class Shown(NamedTuple):
    """What the proof saw: names of buffers that a forward pass writes, and of weights that nothing depends on."""

    written: frozenset[str]
    unread: frozenset[str]


def prove(
    model: nn.Module,
    chain: nn.Module,
    parts: Sequence[nn.Module],
    blocks: Sequence[tuple[str, nn.Module]],
    images: Tensor,
    *,
    moving: Collection[nn.Module] = (),
    call: Callable[[Tensor], Any] | None = None,
) -> Shown:
    """Compare parts with their model; both are left as they are.

    Args:
        model: on the processor.
        chain: runs the parts in sequence; shares its parameters with the model.
        parts: stem, blocks and tail.
        blocks: the modules of the trunk, by name, that both call.
        images: [B, C, H, W], B at least 2.
        moving: modules that a forward pass changes, beside those with buffers in training.
        call: how the model is called with images, where it takes more than those, or gives more than logits.

    Raises:
        BackboneError: something differs; the message says what.
    """
    blocks = list({id(block): (name, block) for name, block in blocks if not isinstance(block, nn.Identity)}.values())
    written: set[str] = set()
    unread = {name for name, weight in model.named_parameters() if weight.requires_grad}
    counts = Counter(id(weight) for part in parts for weight in part.parameters())
    shared = {number for number, count in counts.items() if count > 1}
    with left_as_it_was(model, chain) as state, torch.enable_grad(), nothing_hidden(model):

        def traced(run: Callable[[Tensor], Any], mode: str, *, into_images: bool) -> Passes:
            # Only batch norms need a second image, and only in training; what else the number of images may
            # show, splitting has seen by its own two.
            count = 2 if mode == "train" and any(isinstance(m, _BatchNorm) for m in model.modules()) else 1
            state.restore()
            for each in (model, chain):
                each.train(mode == "train")
            with _noting_blocks(blocks, moving) as trace:
                _run(run, model, images[:count], trace, shared, into_images=into_images)
            return trace

        into_images = images.is_floating_point()
        for mode in ("eval", "train"):
            try:
                theirs = traced(call or model, mode, into_images=into_images)
            except RuntimeError:  # models of sound set requires_grad on what they are given, and it must be a leaf
                if not into_images:
                    raise
                into_images = False
                theirs = traced(call or model, mode, into_images=False)
            written |= state.written_buffers(model)
            _check_written(model, state)
            ours = traced(chain, mode, into_images=into_images)
            _compare(model, theirs, ours, mode)
            unread -= {name for name, gradient in theirs.gradients.items() if gradient is not None}
    return Shown(frozenset(written), frozenset(unread))


@contextmanager
def nothing_hidden(model: nn.Module) -> Iterator[None]:
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
    for name in state.written_parameters(model):
        raise unsupported(
            model, f"its forward pass writes into its parameter {name}; make a buffer of it, and build the model anew"
        )
    for name in state.replaced_buffers(model):
        raise unsupported(
            model,
            f"its forward pass replaces its buffer {name}, and its parts would each keep their own; write into it "
            f"(self.{name}.copy_(...))",
        )


def _run(
    run: Callable[[Tensor], Any],
    model: nn.Module,
    images: Tensor,
    trace: Passes,
    shared: Collection[int],
    *,
    into_images: bool,
) -> None:
    """One forward and one backward pass, to the images if asked for, noted in a trace."""
    entered = images.detach().clone().requires_grad_(into_images)
    starts = [("the images", entered)] if entered.requires_grad else []
    starts += [*((name, w) for name, w in model.named_parameters() if w.requires_grad)]
    # A clone, since a leaf that needs a gradient could not be written into, as images can.
    logits = run(entered.clone())
    trace.is_forward = False
    ends = [end for end in (logits, trace.last) if isinstance(end, Tensor) and end.requires_grad]
    trace.last = None
    trace.logits = logits.detach() if isinstance(logits, Tensor) else None
    if not ends:
        return
    cotangents = [_cotangent(end, 1.0 if end is logits else FEATURES_SHARE) for end in ends]
    found = torch.autograd.grad(ends, [start for _, start in starts], cotangents, allow_unused=True)
    for (name, start), gradient in zip(starts, found, strict=True):
        keeps = gradient is None or id(start) in shared
        trace.gradients[name] = gradient if keeps else digest([gradient])


@contextmanager
def _noting_blocks(blocks: Sequence[tuple[str, nn.Module]], moving: Collection[nn.Module]) -> Iterator[Passes]:
    """Let blocks note what they are given, and recompute what is inside them in the backward pass."""
    trace = Passes()
    before = [(vars(block), dict(vars(block))) for _, block in blocks]
    for name, block in blocks:
        vars(block)["forward"] = _noting(name, block, trace, moving)
        vars(block)["_compiled_call_impl"] = None  # compiled, it would not be called
    try:
        yield trace
    finally:
        for attributes, were in before:
            for name in ("forward", "_compiled_call_impl"):
                attributes.pop(name, None)
                if name in were:
                    attributes[name] = were[name]


def _noting(name: str, block: nn.Module, trace: Passes, moving: Collection[nn.Module]) -> Callable[..., Any]:
    forward = block.forward
    moves = any(module in moving or (module.training and module._buffers) for module in block.modules())

    def noted(*args: Any, **kwargs: Any) -> Any:
        given = list(tensors_in((args, dict(sorted(kwargs.items())))))
        if trace.is_forward:
            trace.calls.append((name, digest(given)))
        again = _Again(block if moves else None, given)

        def call() -> Any:
            return forward(*again.replaced(args), **again.replaced(kwargs))

        # Without arguments, which a checkpoint would save, and refuse once they were written into.
        output = checkpoint(call, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        again.called()
        if trace.is_forward:
            trace.last = next(tensors_in(output), None)
        return output

    return noted


@final
class _Again:
    """A region in which a call is repeated from what there was before it: of its block, and of what it was given.

    Args:
        block: whose state moves when it is called; ``None`` for one that has none.
        given: the tensors of the call, some of which it may write into.
    """

    def __init__(self, block: nn.Module | None, given: Sequence[Tensor]) -> None:
        self.state = None if block is None else ModelState(block.modules())
        self.given = [(tensor, tensor._version, tensor.detach().clone()) for tensor in given]
        self.copies: dict[int, Tensor] = {}
        self.ends = ExitStack()

    def called(self) -> None:
        """After the call: only what it wrote into is needed again."""
        self.given = [kept for kept in self.given if kept[0]._version != kept[1]]

    def __enter__(self) -> None:
        """Begin, with what there was before."""
        if self.state is not None:
            self.ends.enter_context(self.state.again())
        # Copies of copies: a leaf that needs a gradient can't be written into.
        self.copies = {
            id(tensor): value.requires_grad_(tensor.requires_grad).clone() for tensor, _, value in self.given
        }

    def __exit__(self, *exception: object) -> None:
        """End, with what there was at the beginning."""
        self.ends.close()

    def replaced(self, value: Any) -> Any:
        """Arguments, in a repeated call with copies of what the first one wrote into."""
        if isinstance(value, Tensor):
            return self.copies.get(id(value), value)
        if isinstance(value, (tuple, list)):
            return type(value)(self.replaced(item) for item in value)
        return {key: self.replaced(item) for key, item in value.items()} if isinstance(value, dict) else value


def _compare(model: nn.Module, theirs: Passes, ours: Passes, mode: str) -> None:
    if theirs.logits is None:
        raise unsupported(model, f"in {mode} mode it returns no tensor of logits")
    for expected, found in zip(theirs.calls, ours.calls, strict=False):
        if expected != found:
            raise unsupported(model, f"in {mode} mode its parts give {expected[0]} other features than the model does")
    if len(theirs.calls) != len(ours.calls):
        calls = f"{len(ours.calls)} blocks, the model {len(theirs.calls)}"
        raise unsupported(model, f"in {mode} mode its parts call {calls}")
    if ours.logits is None or digest([ours.logits]) != digest([theirs.logits]):
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
    return length * torch.randn(end.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(end.dtype)


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
