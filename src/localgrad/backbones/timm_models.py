"""What timm models do around their blocks, as small pieces that ``split`` chooses among.

A timm model is nearly a chain of modules, but not quite: its ``forward`` permutes and flattens features between
two blocks, hands them a rotary embedding or a grid size, adds a class token half way, or keeps the class token in
a stream of its own. Each such habit is one piece here; ``split`` tries them on what it observed in a real forward pass
and keeps the one that gives the same bits. Written against timm 1.0.31; the tests of the families pin the behaviour.

Shapes: B batch, N tokens, P prefix tokens, D width, H W grid.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from localgrad.backbones.fake import FakeTensor, real_tensors
from localgrad.backbones.namespaces import Kwargs
from localgrad.errors import BackboneError

Kind = Literal["NHWC", "NCHW", "tokens", "sequence"]

SUPPORTED_FAMILIES: tuple[str, ...] = (
    *("swin", "swinv2", "swinv2_cr", "vit", "deit", "deit3", "dinov2", "beit", "beitv2", "eva02", "cait", "convit"),
    *("xcit", "davit", "maxvit", "mvitv2", "pvt_v2", "hiera", "convnext", "resnet"),
)
"""Families that the tests hold to the bit; others may work, and are proved or refused at the time of splitting."""

TRUNK_NAMES = (
    *("blocks", "layers", "stages", "layer1", "layer2", "layer3", "layer4"),
    *("blocks_token_only", "cls_attn_blocks"),
)
"""Where timm models keep their blocks, or groups of blocks."""


def with_plain_attention(block: nn.Module) -> nn.Module:
    """Let a block of timm's vision transformer compute attention from its scores, and not by the fused operator."""
    attention: Any = block.attn
    assert hasattr(attention, "fused_attn"), "timm's name for the choice"
    attention.fused_attn = False
    return block


def undecayed(model: nn.Module, weight_decay: float = 1.0) -> frozenset[int]:
    """The ids of the parameters that timm leaves weight decay off: vectors, and what the model itself names.

    Args:
        model: a whole model of timm, whose ``no_weight_decay`` names positions and tokens.
        weight_decay: of the others; with none, all are left off.
    """
    from timm.optim import param_groups_weight_decay

    named: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=named)
    return frozenset(id(weight) for group in groups if not group["weight_decay"] for weight in group["params"])


def rearrange(features: Tensor, source: Kind, target: Kind, grid: tuple[int, int], *, dense: bool) -> Tensor:
    """Move features from one layout to another: the same values, and the same strides that timm gives them.

    Args:
        features: [B, H, W, D], [B, D, H, W] or [B, N, D] as ``source`` says.
        source: how the features stand.
        target: how they are wanted.
        grid: (H, W).
        dense: make the result contiguous, where timm does (the kernels that follow depend on it).
    """
    if source == "tokens":
        features = features.reshape(features.shape[0], *grid, features.shape[2])
    elif source == "NCHW":
        features = features.permute(0, 2, 3, 1)
    if target == "NCHW":
        features = features.permute(0, 3, 1, 2)
    elif target == "tokens":
        features = features.flatten(1, 2)
    return features.contiguous() if dense else features


class PrependToken(nn.Module):
    """Put a learned token in front of the sequence: what cait and xcit do before their class-attention blocks."""

    def __init__(self, token: nn.Parameter) -> None:
        super().__init__()
        self.token = token

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, D] -> [B, 1 + N, D]."""
        return torch.cat((self.token.expand(features.shape[0], -1, -1), features), dim=1)


class PackedClassAttention(nn.Module):
    """A block of two streams (grid tokens, class token) as a block of one: the class token stands in front."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: Tensor) -> Tensor:
        """[B, 1 + N, D] -> [B, 1 + N, D]; the block changes the first token only."""
        class_token, tokens = features[:, :1], features[:, 1:]
        return torch.cat((self.block(tokens, class_token), tokens), dim=1)


TWO_STREAMS = {"LayerScaleBlockClassAttn": PackedClassAttention}
"""Classes of timm blocks called as ``block(tokens, class_token) -> class_token``, and their one-stream form."""


class ComputedArgument(nn.Module):
    """A tensor argument that a timm model computes once and gives to every block: computed again at each call.

    A tensor captured at the time of splitting would stay on its device, in its precision, and out of autograd.
    """

    def __init__(self, source: nn.Module, method: str, kwargs: Kwargs, index: int | None) -> None:
        super().__init__()
        self.source = source
        self.method, self.kwargs, self.index = method, kwargs, index

    def forward(self) -> Tensor:
        """Compute the argument from its module's present parameters and buffers."""
        value: Tensor = getattr(self.source, self.method)(**self.kwargs)
        return value if self.index is None else value[self.index]


class _Computed(NamedTuple):
    child: str  # the model's child that computes the tensor
    method: str
    takes_grid: bool


TENSOR_ARGUMENTS = {
    "rope": _Computed("rope", "get_embed", takes_grid=True),  # eva02 and its kin: rotary position embedding
    "shared_rel_pos_bias": _Computed("rel_pos_bias", "forward", takes_grid=False),  # beit with one bias for all blocks
}
"""Tensor arguments of blocks that are known, by keyword."""


def find_recomputed(
    model: nn.Module, keyword: str, value: Tensor, grid: tuple[int, int], block_index: int
) -> ComputedArgument | None:
    """How a model computes a tensor argument of a block: a module that gives the same bits, or None.

    ``grid`` is (H, W) of the block's features; a depth-wise rope is indexed by the block.
    """
    known = TENSOR_ARGUMENTS.get(keyword)
    source = child_of(model, known.child) if known else None
    if known is None or source is None:
        return None
    variants: list[Kwargs] = [{}]
    if known.takes_grid:
        # A rope built without a grid of its own needs one at every call.
        variants = [{}, {"shape": grid}] if getattr(source, "feat_shape", None) else [{"shape": grid}]
    for kwargs in variants:
        whole = ComputedArgument(source, known.method, kwargs, index=None)
        computed = whole()
        if same(computed, value):
            return whole
        if block_index < len(computed) and same(computed[block_index], value):
            return ComputedArgument(source, known.method, kwargs, index=block_index)
    return None


def find_glue(given: Tensor, wanted: Tensor, class_token: nn.Parameter | None) -> Callable[..., Tensor] | None:
    """What stands between the output of one module and the input of the next; ``identity`` where nothing does, or None.

    Args:
        given: what the first module returned.
        wanted: what the second one received.
        class_token: [1, 1, D], the token that the model may put in front, where it has one.
    """
    return next((glue for glue in _glues(given, wanted, class_token) if same(glue(given), wanted)), None)


def identity(features: Tensor) -> Tensor:
    """Return the features as they are."""
    return features


def _glues(given: Tensor, wanted: Tensor, class_token: nn.Parameter | None) -> Iterator[Callable[..., Tensor]]:
    yield identity
    for source, target in itertools.product(_kinds_of(given), _kinds_of(wanted)):
        grid = _grid_of(given, source) or _grid_of(wanted, target)
        if source != target and grid and (source != "tokens" or math.prod(grid) == given.shape[1]):
            for dense in (False, True):
                yield functools.partial(rearrange, source=source, target=target, grid=grid, dense=dense)
    if class_token is not None and given.ndim == 3 and given.shape[2] == class_token.shape[2]:
        yield PrependToken(class_token)


def kind_after(glue: Callable[..., Tensor]) -> Kind | None:
    """The layout that a piece of glue arranges, None for one that leaves it open."""
    return glue.keywords["target"] if isinstance(glue, functools.partial) else None


def _kinds_of(features: Tensor) -> tuple[Kind, ...]:
    return {4: ("NHWC", "NCHW"), 3: ("tokens",)}.get(features.ndim, ())  # type: ignore[return-value]


def _grid_of(features: Tensor, kind: Kind) -> tuple[int, int] | None:
    if kind == "tokens":
        return None
    axis = 1 if kind == "NHWC" else 2
    return features.shape[axis], features.shape[axis + 1]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits in the same order of memory; fake ones, the same shape and order."""
    if one.shape != other.shape or one.stride() != other.stride():
        return False
    return isinstance(one, FakeTensor) or torch.equal(one, other)


class InputKept(nn.Module):
    """A block that writes into what it receives (an in-place activation first), made to write into a copy of it.

    Its input is also what an objective reconstructs, what is recomputed from, and what another module or process sees.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: Tensor) -> Tensor:
        """What the block gives; the features stay as they are."""
        result: Tensor = self.block(features.clone())
        return result


class Step(nn.Module):
    """One call of a timm module, with what its caller did around it.

    Args:
        module: the timm module.
        glue: what happens to the features before the call.
        args: plain values that follow the features.
        kwargs: plain values by keyword.
        recomputed: tensor arguments by keyword.
        unpack: the module returns a tuple whose first item is the features.
        shape: the only shape (without the batch) for which ``args`` and ``kwargs`` hold, None for any.
        name: the module's dotted path in the timm model, for errors.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        glue: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: Kwargs,
        recomputed: dict[str, ComputedArgument],
        unpack: bool,
        shape: tuple[int, ...] | None,
        name: str,
    ) -> None:
        super().__init__()
        self.module = module
        self.glue = glue
        self.recomputed = nn.ModuleDict(recomputed)
        self.args, self.kwargs, self.unpack = args, kwargs, unpack
        self.shape, self.name = shape, name

    def forward(self, features: Tensor) -> Tensor:
        """Features to features.

        Raises:
            BackboneError: the features have another grid than the one this backbone was split for.
        """
        features = self.glue(features)
        if self.shape is not None and tuple(features.shape[1:]) != self.shape:
            raise BackboneError(
                f"{self.name} was split for features of shape [B, {', '.join(map(str, self.shape))}], but got "
                f"{list(features.shape)}: split the model again with this input_size."
            )
        tensors = {keyword: source() for keyword, source in self.recomputed.items()}
        output = self.module(features, *self.args, **self.kwargs, **tensors)
        result: Tensor = output[0] if self.unpack else output
        return result

    def simplest(self) -> nn.Module:
        """The timm module itself, where nothing happens around it."""
        around = self.args or self.kwargs or len(self.recomputed) or self.unpack or self.glue is not identity
        return self if around else self.module


def recomputes(module: nn.Module) -> bool:
    """Whether timm's flag is on, by which a model or stage recomputes its blocks in the backward pass."""
    return bool(attribute(module, "grad_checkpointing"))


def input_channels(model: nn.Module) -> int | None:
    """Channels of the images that a model was built for, None where it doesn't tell: by itself, or by its stem."""
    channels = attribute(model, "in_chans")
    if channels is None:
        names = (attribute(model, "pretrained_cfg") or {}).get("first_conv")
        first = names if isinstance(names, str) else next(iter(names or ()), "")
        stem = dict(model.named_modules()).get(first) if first else None
        channels = attribute(stem, "in_channels") if isinstance(stem, nn.Conv2d) else None
    return channels if isinstance(channels, int) else None


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that a timm model was configured for, with the channels that it was built for (``in_chans``).

    Raises:
        BackboneError: the model doesn't say; pass ``input_size``.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    if size is None:
        raise BackboneError(f"{type(model).__name__} doesn't tell its input size; pass input_size=(C, H, W).")
    embed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = embed or size[1:]
    return input_channels(model) or size[0], height, width


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The registered child of that name, or None."""
    return dict(module.named_children()).get(name)


def token_order(model: nn.Module, block_index: int, num_tokens: int) -> tuple[int, ...] | None:
    """The raster position of token n at index n, for a model that reorders its tokens (hiera); None in raster order.

    ``block_index`` is the block that the N tokens have left, 0 for those that enter it.
    """
    reroll = child_of(model, "reroll")
    if reroll is None:
        return None
    with real_tensors():
        token_at = reroll(torch.arange(num_tokens).view(1, num_tokens, 1), block_index).flatten()
        order = tuple(token_at.argsort().tolist())
    return None if order == tuple(range(num_tokens)) else order


class Unsplittable(BackboneError):  # noqa: N818  # what it is, as its base is named
    """A model whose parts aren't the model; says what is wrong, and what works."""

    def __init__(self, model: nn.Module, what: str) -> None:
        children = ", ".join(name for name, _ in model.named_children())
        super().__init__(
            f"{type(model).__name__} can't be split: {what}. Its children are {children or 'none'}; blocks are looked "
            f"for in {', '.join(TRUNK_NAMES)}. Families that work: {', '.join(SUPPORTED_FAMILIES)}."
        )
        self.what = what


unsupported = Unsplittable
"""What to say of a model that can't be split."""


def attribute(model: nn.Module, name: str) -> Any:
    """One of timm's optional attributes, None where this model has none: the only such look-up in this file."""
    return getattr(model, name, None)


def beginnings_of_heads(model: nn.Module) -> tuple[str, ...]:
    """What the names of a timm model's classifiers begin with."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ("head", "fc", "classifier")
    names = (named,) if isinstance(named, str) else tuple(named)
    return tuple(f"{name}." for name in names)
