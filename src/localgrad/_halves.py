"""The halves of a timm block: its attention and its MLP, each as ``x + drop_path(branch(x))``.

What. ``find_pieces(block, example)`` returns the pieces that, run in sequence, give what the block gives, bit for bit.
A branch treats every image by itself (``per_image``), so it may run over a part of the batch at a time; the drop path
stands outside of it and draws for the whole batch, in the order in which the block itself draws.

How. There is no table of architectures but one of *written forms*: where timm puts norm, attention, layer scale and
MLP under which names. Each form is tried in training mode on a copy of the block with random weights, and taken only
if it gives the copy's own bits. Drop path may hide a branch of every image; then it is tried in evaluation mode, too. A
block that no form fits is one piece of its own, the whole block: still right, only coarser.

Source: timm 1.0.31 (``x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))`` and its variants). The idea of cutting
a block at its residual additions is common to reversible networks (RevNet, arXiv 1707.04585) and to mega-batching of
feed-forward chunks (Reformer, arXiv 2001.04451, Section 3: "chunking").

Shapes: B batch first in every tensor; what follows is the block's own layout.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._fake import TorchDispatchMode
from ._timm_adapters import Step, attribute, identity

ATTENTION_NAMES = ("_attn", "_shifted_window_attn", "_partition_attn", "attn", "token_mixer")
"""Where a block keeps its attention, the first that exists: Swin's methods roll and cut windows around ``attn``."""

DRAW_OF_ROWS = torch.ops.aten.bernoulli_.float
"""How a processor draws a mask (dropout, also inside fused attention; drop path)."""


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
        per_image: whether the branch treats every image of a batch by itself, and draws for each by itself, so that it
            may run over parts of the batch.
        draws: of each tensor of random numbers that it draws in training mode, the axes in their order in memory, for
            more than one image (for a single one, a convolution may choose another order).
    """

    branch: Callable[[Tensor], Tensor]
    drop_path: Callable[[Tensor], Tensor] | None
    per_image: bool = True
    draws: tuple[tuple[int, ...], ...] = ()

    def __call__(self, features: Tensor) -> Tensor:
        """Run the piece plainly."""
        if self.drop_path is None:
            return self.branch(features)
        return features + self.drop_path(self.branch(features))


def whole_block(block: nn.Module) -> Piece:
    """A block as one piece, for the whole batch at once."""
    return Piece(block, None, per_image=False)


def find_pieces(block: nn.Module, example: Tensor, *, halves: bool = True) -> list[Piece]:
    """Cut a block at its residual additions.

    Args:
        block: one block of a backbone.
        example: features that enter it, [2 or more, ...].
        halves: look for attention and MLP; otherwise only for how the block draws, so that it may run over chunks.

    Returns:
        Two or more pieces where the block's written form is known, else one: the whole block. The block and the random
        state are as before.
    """
    if any(isinstance(module, _BatchNorm) for module in block.modules()):
        return [whole_block(block)]  # batch statistics: a half would see another batch than the block does
    alike = signature(block), example.shape[1:], example.dtype, example.device.type
    if alike not in _known_cuts:
        with torch.no_grad(), _random_state_kept(example.device), _one_thread():
            _known_cuts[alike] = _find_cuts(block, example)
    pieces: list[Piece] = []
    for step, (number, found) in zip(_steps(block), _known_cuts[alike][halves], strict=True):
        cut = list(_candidates(step))[number]
        pieces += [
            replace(piece, per_image=same.per_image, draws=same.draws) for piece, same in zip(cut, found, strict=True)
        ]
    return pieces


class _Found(NamedTuple):
    """What was found out about one piece."""

    per_image: bool
    draws: tuple[tuple[int, ...], ...]


_Cuts = list[tuple[int, list[_Found]]]  # for each step of a block: which candidate it is, and of what kind its pieces
_known_cuts: dict[Any, dict[bool, _Cuts]] = {}  # blocks that are alike are cut alike: one proof for all blocks of a ViT


def _find_cuts(block: nn.Module, example: Tensor) -> dict[bool, _Cuts]:
    """How a block can be cut: with its halves looked for (key true), and only as a whole."""
    # Weights as they come would prove nothing: a norm or a layer scale that starts at zero hides its whole branch.
    twin = _with_random_weights(copy.deepcopy(block))
    cuts: dict[bool, _Cuts] = {True: [], False: []}
    for step in _steps(twin):
        *candidates, whole = _candidates(step)
        state = _random_state(example.device)
        step.train()
        outputs, noted, _ = _run_noting(whole, example)
        number, noted_of_halves = len(candidates), noted
        for n, pieces in enumerate(candidates):
            proved = _noted_if_same(step, pieces, example, (state, outputs))
            if proved is not None:
                number, noted_of_halves = n, proved
                break
        step.train()
        cuts[True].append((number, [_how_it_draws(*found) for found in noted_of_halves]))
        cuts[False].append((len(candidates), [_how_it_draws(*found) for found in noted]))
        example = outputs
    return cuts


def signature(module: nn.Module) -> str:
    """A text that is the same for modules that compute alike: classes, plain attributes, shapes; no values of weights.

    Floats count only as zero or not: the rate of a drop path changes neither form nor cost, whether there is one does.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        plain = {key: _plain(value) for key, value in vars(part).items() if key not in ("name", "training")}
        digest.update(repr((name, type(part).__qualname__, sorted(plain.items(), key=str))).encode())
        for tensor_name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                digest.update(repr((tensor_name, *tensor.shape, tensor.dtype, tensor.requires_grad)).encode())
    return digest.hexdigest()


def _plain(value: object) -> object:
    """A plain value as it counts in a signature; ``None`` for what is no plain value."""
    if isinstance(value, float):
        return value != 0
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, functools.partial):
        return value.func.__qualname__, _plain(value.args), _plain(value.keywords)
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    return value if isinstance(value, (bool, int, str)) else None


def _steps(block: nn.Module) -> list[nn.Module]:
    return list(block) if isinstance(block, nn.Sequential) else [block]


def _with_random_weights(block: nn.Module) -> nn.Module:
    for parameter in block.parameters():
        if parameter.ndim > 1:
            bound = max(1, parameter[0].numel()) ** -0.5
            parameter.uniform_(-bound, bound)
        else:
            parameter.uniform_(0.5, 1.5)
    return block


def _candidates(step: nn.Module) -> Iterator[list[Piece]]:
    """Ways to cut one call of a timm module, the whole call last."""
    glue: list[Piece] = []
    module, args, kwargs, recomputed = step, (), {}, {}
    if isinstance(step, Step):
        module, args, kwargs = step.module, step.args, step.kwargs
        recomputed = dict(step.recomputed.items())
        if step.glue is not identity:
            glue = [Piece(step.glue, None)]
    if not (isinstance(step, Step) and step.unpack):
        for branches in _written_forms(module, args, kwargs, recomputed):
            yield [*glue, *(Piece(branch, drop) for branch, drop in branches)]
    yield [Piece(step, None)]


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


def _noted_if_same(
    step: nn.Module, pieces: Sequence[Piece], example: Tensor, given: tuple[Tensor, Tensor]
) -> list[_Noted] | None:
    """What `_run_noting` notes, if pieces give a step's bits; ``None`` if they don't.

    Args:
        step: the step.
        pieces: a way to cut it.
        example: features that enter it.
        given: the random state before the step ran in training mode, and what it gave.
    """
    state, outputs = given
    try:
        step.train()
        _set_random_state(example.device, state)
        found, noted, shown = _run_noting(pieces, example)
        if not torch.equal(found, outputs):
            return None
        if not shown:
            step.eval()
            if not torch.equal(_through(pieces, example[:1]), step(example[:1])):
                return None
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError):  # the form was another block's
        return None
    return noted


def _through(pieces: Sequence[Piece], features: Tensor) -> Tensor:
    for piece in pieces:
        features = piece(features)
    return features


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with a single thread: for two images, more of them wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that draws random numbers, and the shape for which it does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Any, tuple[int, ...]]] = []
        self.layouts: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        like = next((value for value in args if isinstance(value, Tensor)), torch.empty(0))
        before = _random_state(like.device)
        result = func(*args, **(kwargs or {}))
        if not torch.equal(before, _random_state(like.device)):  # fused attention has the tag, and mostly no dropout
            self.seen.append((func, tuple(like.shape)))
            self.layouts.append(tuple(sorted(range(like.ndim), key=like.stride, reverse=True)))
        return result


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


_Noted = tuple[Piece, Tensor, _Draws]  # a piece, what entered it, and what it drew


def _run_noting(pieces: Sequence[Piece], features: Tensor) -> tuple[Tensor, list[_Noted], bool]:
    """Run pieces in order; note what each draws, and whether there is an image to which each added something."""
    noted = []
    shown = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for piece in pieces:
        version = features._version
        with _Draws() as draws:
            output = piece.branch(features)
        noted.append((piece, features, draws))
        if piece.drop_path is not None:
            if features._version != version:
                raise ValueError("the branch writes into what it receives, from which it couldn't be recomputed")
            output = piece.drop_path(output)
            shown &= output.flatten(1).any(1)
            output = features + output
        features = output
    return features, noted, bool(shown.any())


def _how_it_draws(piece: Piece, example: Tensor, drawn: _Draws) -> _Found:
    """How a piece draws: by image, or (dropout on a table of positions) once for the whole batch."""
    if not drawn.seen:
        return _Found(per_image=True, draws=())
    with _Draws() as one:
        piece.branch(example[:1])
    by_image = [
        (func, (len(example) * shape[0], *shape[1:]) if shape else None) for func, shape in one.seen
    ] == drawn.seen
    # On a processor only this operator's rows can be had without the others (``execution.checkpointing``).
    known = example.device.type != "cpu" or all(func is DRAW_OF_ROWS for func, _ in drawn.seen)
    return _Found(by_image and known, tuple(drawn.layouts))
