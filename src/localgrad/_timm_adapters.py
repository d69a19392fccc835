"""What timm models do around their blocks, as small pieces that ``backbone.split`` chooses among.

A timm model is nearly a chain of modules, but not quite: its ``forward`` permutes and flattens features between
two blocks, hands them a rotary embedding or a grid size, adds a class token half way, or keeps the class token in
a stream of its own. Each such habit is one piece here. ``split`` never asks which architecture it has: it tries
the pieces on what it observed in a real forward pass and keeps the one that gives the same bits.

This file and ``backbone.py`` are the only ones that know timm's private names (written against timm 1.0.31; the
tests of the families pin the behaviour).

Shapes: B batch, N tokens, P prefix tokens, D width, H W grid.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import BackboneError

Kind = Literal["NHWC", "NCHW", "tokens"]

SUPPORTED_FAMILIES: tuple[str, ...] = (
    *("swin", "swinv2", "swinv2_cr", "vit", "deit", "deit3", "dinov2", "beit", "beitv2", "eva02", "cait", "xcit"),
    *("davit", "maxvit", "mvitv2", "pvt_v2", "hiera", "convnext", "resnet"),
)
"""Families that the tests hold to the bit; others may work, and are proved or refused at the time of splitting."""

TRUNK_NAMES = (
    "blocks",
    "layers",
    "stages",
    *("layer1", "layer2", "layer3", "layer4"),
    "blocks_token_only",
    "cls_attn_blocks",
)
"""Where timm models keep their blocks, or groups of blocks."""


def rearrange(features: Tensor, source: Kind, target: Kind, grid: tuple[int, int], *, dense: bool) -> Tensor:
    """Move features from one layout to another: the same values, and the same strides that timm gives them.

    Args:
        features: [B, H, W, D], [B, D, H, W] or [B, N, D] as ``source`` says.
        source: how the features stand.
        target: how they are wanted.
        grid: (H, W).
        dense: make the result contiguous, where timm does (the kernels that follow depend on it).

    Returns:
        The features in the ``target`` layout.
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


class Recomputed(nn.Module):
    """A tensor argument that a timm model computes once and gives to every block: computed again at each call.

    A tensor captured at the time of splitting would stay on its device, in its precision, and out of autograd.
    """

    def __init__(self, source: nn.Module, method: str, kwargs: dict[str, Any], index: int | None) -> None:
        super().__init__()
        self.source = source
        self.method, self.kwargs, self.index = method, kwargs, index

    def forward(self) -> Tensor:
        """Compute the argument from its module's present parameters and buffers."""
        value: Tensor = getattr(self.source, self.method)(**self.kwargs)
        return value if self.index is None else value[self.index]


class _Source(NamedTuple):
    child: str  # the model's child that computes the tensor
    method: str
    takes_grid: bool


TENSOR_ARGUMENTS = {
    "rope": _Source("rope", "get_embed", takes_grid=True),  # eva02 and its kin: rotary position embedding
    "shared_rel_pos_bias": _Source("rel_pos_bias", "forward", takes_grid=False),  # beit with one bias for all blocks
}
"""Tensor arguments of blocks that are known, by keyword."""


def find_recomputed(
    model: nn.Module, keyword: str, value: Tensor, grid: tuple[int, int], block_index: int
) -> Recomputed | None:
    """Find how ``model`` computes a tensor argument of a block.

    Args:
        model: the timm model.
        keyword: the argument's name.
        value: the tensor that was observed.
        grid: (H, W) of the block's features.
        block_index: which block it is (a depth-wise rope is indexed by it).

    Returns:
        A module that computes the same tensor, bit for bit, or None.
    """
    known = TENSOR_ARGUMENTS.get(keyword)
    source = child_of(model, known.child) if known else None
    if known is None or source is None:
        return None
    variants: list[dict[str, Any]] = [{}]
    if known.takes_grid:
        # A rope built without a grid of its own needs one at every call.
        variants = [{}, {"shape": grid}] if getattr(source, "feat_shape", None) else [{"shape": grid}]
    for kwargs in variants:
        whole = Recomputed(source, known.method, kwargs, index=None)
        computed = whole()
        if same(computed, value):
            return whole
        if block_index < len(computed) and same(computed[block_index], value):
            return Recomputed(source, known.method, kwargs, index=block_index)
    return None


def find_glue(given: Tensor, wanted: Tensor, class_token: nn.Parameter | None) -> Callable[..., Tensor] | None:
    """Find what stands between the output of one module and the input of the next.

    Args:
        given: what the first module returned.
        wanted: what the second one received.
        class_token: [1, 1, D], the token that the model may put in front, where it has one.

    Returns:
        A callable from the one to the other, ``identity`` where they are equal, None where nothing fits.
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
    """Whether two tensors have the same bits in the same order of memory."""
    return one.shape == other.shape and one.stride() == other.stride() and torch.equal(one, other)


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
        kwargs: dict[str, Any],
        recomputed: dict[str, Recomputed],
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
        """Features in, features out.

        Args:
            features: as they leave the part before.

        Returns:
            The features that the timm module gives.

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


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The registered child of that name, or None."""
    return dict(module.named_children()).get(name)


def token_order(model: nn.Module, block_index: int, num_tokens: int) -> tuple[int, ...] | None:
    """Where each token stands on the grid, for a model that reorders its tokens (hiera).

    Args:
        model: the timm model.
        block_index: the block that the tokens have left (0 for those that enter it).
        num_tokens: N.

    Returns:
        The raster position of token n at index n, or None where the tokens are in raster order.
    """
    reroll = child_of(model, "reroll")
    if reroll is None:
        return None
    token_at = reroll(torch.arange(num_tokens).view(1, num_tokens, 1), block_index).flatten()
    order = tuple(token_at.argsort().tolist())
    return None if order == tuple(range(num_tokens)) else order


# Observation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Station:
    """A module of the trunk that may be called on the way from the stem to the tail."""

    name: str
    group: str  # the stage it belongs to, "" where the trunk is flat
    module: nn.Module


@dataclass(frozen=True)
class Call:
    """One observed call of a station: features in, features out, and what else it was given."""

    station: Station
    module: nn.Module
    received: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Tensor
    unpack: bool


@dataclass(frozen=True)
class Seen:
    """Everything that one forward pass of the model showed."""

    calls: list[Call]
    stem_names: set[str]  # the model's own attributes read before the first block
    head_names: set[str]  # and after the last one
    before_head: list[str]  # children called between the last block and forward_head
    tail_input: Tensor
    logits: Tensor


def find_stations(model: nn.Module) -> list[Station]:
    """The blocks, and what else stands beside them in their groups, by where timm puts them."""
    stations: list[Station] = []
    for trunk_name, trunk in trunks_of(model).items():
        for name, element in trunk.named_children():
            path = f"{trunk_name}.{name}"
            group = child_of(element, "blocks")
            if isinstance(group, (nn.Sequential, nn.ModuleList)):
                for child_name, child in element.named_children():
                    if child is not group:
                        stations.append(Station(f"{path}.{child_name}", path, child))
                stations += [Station(f"{path}.blocks.{n}", path, block) for n, block in group.named_children()]
            else:
                # resnet: the container itself is the stage
                stations.append(Station(path, trunk_name if trunk_name[-1].isdigit() else "", element))
    if not stations:
        raise unsupported(model, "no container of blocks was found")
    return stations


def trunks_of(model: nn.Module) -> dict[str, nn.Module]:
    containers = (nn.Sequential, nn.ModuleList)
    return {
        name: child for name, child in model.named_children() if name in TRUNK_NAMES and isinstance(child, containers)
    }


def observe(model: nn.Module, stations: list[Station], images: Tensor) -> Seen:
    """Run the model once under hooks and sort what happened."""
    log: list[tuple[str, Any]] = []
    trunks = trunks_of(model)
    handles = [hook for station in stations for hook in _watch(station, log)]
    for name, child in model.named_children():
        if name not in trunks:
            handles.append(child.register_forward_pre_hook(_child_hook(name, log)))
    try:
        logits = _probe(model, log)(images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise BackboneError(
            f"the model does not take images of input_size={tuple(images.shape[1:])}: {error} Build it for them "
            f"(timm.create_model(..., img_size={images.shape[-1]}) where the family has that argument), or pass "
            f"the size it was built for{_built_for(model)}."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise BackboneError("the model returns no [B, num_classes] logits: build it with num_classes=N and pooling.")
    if not logits.isfinite().all():
        raise BackboneError(
            "the model's logits are not finite numbers, so nothing can be compared with them: check its weights."
        )
    return _sort(model, log, logits)


def _built_for(model: nn.Module) -> str:
    size = attribute(child_of(model, "patch_embed") or model, "img_size")
    return f" ({size[0]} x {size[1]})" if size else ""


def _probe(model: nn.Module, log: list[tuple[str, Any]]) -> nn.Module:
    """A shallow copy of the model that notes which parameters and children its own methods read."""
    base: Any = type(model)

    class Probe(base):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            log.append(("read", name))
            return super().__getattr__(name)

        def forward_head(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
            log.append(("head", _snapshot(features)))
            return super().forward_head(features, *args, **kwargs)

    probe = copy.copy(model)
    object.__setattr__(probe, "__class__", Probe)
    return probe


def _watch(station: Station, log: list[tuple[str, Any]]) -> Iterator[Any]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received = _snapshot(args[0]) if args else None
        log.append(("enter", (station, (received, *args[1:]), dict(kwargs))))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        unpack = isinstance(output, tuple)
        log.append(("leave", (station, _snapshot(output[0] if unpack else output), unpack)))

    yield station.module.register_forward_pre_hook(enter, with_kwargs=True)
    yield station.module.register_forward_hook(leave)


def _child_hook(name: str, log: list[tuple[str, Any]]) -> Callable[..., None]:
    def called(_: nn.Module, args: tuple[Any, ...]) -> None:
        log.append(("child", (name, _snapshot(args[0]) if args else None)))

    return called


def _snapshot(features: Any) -> Any:
    """Features as they are now: a module further on may write into them."""
    return features.clone() if isinstance(features, Tensor) else None


def _sort(model: nn.Module, log: list[tuple[str, Any]], logits: Tensor) -> Seen:
    """Divide the log into what happened before, in and after the trunk."""
    in_trunk = [index for index, (what, _) in enumerate(log) if what in ("enter", "leave")]
    if not in_trunk:
        raise unsupported(model, "none of its blocks was called")
    before, after = log[: in_trunk[0]], log[in_trunk[-1] + 1 :]
    head = next((index for index, (what, _) in enumerate(after) if what == "head"), None)
    if head is None:
        raise unsupported(model, "its forward does not end in forward_head")
    last_children = [detail for what, detail in after[:head] if what == "child"]
    before_head = [name for name, _ in last_children]
    # ``self.norm(self.blocks(x))`` reads norm before the blocks run, but calls it after them.
    only_late = set(before_head) - {detail[0] for what, detail in before if what == "child"}
    trunks = trunks_of(model).keys()
    return Seen(
        calls=_pair_calls(model, [log[index] for index in in_trunk]),
        stem_names={detail for what, detail in before if what == "read"} - trunks - only_late,
        head_names=({detail for what, detail in after if what == "read"} | only_late) - trunks,
        before_head=before_head,
        tail_input=last_children[0][1] if last_children else after[head][1],
        logits=logits,
    )


def _pair_calls(model: nn.Module, events: list[tuple[str, Any]]) -> list[Call]:
    calls = []
    for (what, entered), (then, left) in zip(events[::2], events[1::2], strict=False):
        station = entered[0]
        if (what, then) != ("enter", "leave") or station is not left[0]:
            raise unsupported(model, f"{station.name} calls other blocks inside it")
        (received, *args), kwargs = entered[1], entered[2]
        returned, unpack = left[1], left[2]
        if received is None or returned is None:
            raise unsupported(model, f"{station.name} does not pass one tensor of features on")
        calls.append(_one_stream(Call(station, station.module, received, tuple(args), kwargs, returned, unpack)))
    return calls


def _one_stream(call: Call) -> Call:
    """A call of two streams (tokens, class token) as the call of its packed form."""
    pack = TWO_STREAMS.get(type(call.module).__name__)
    if pack is None:
        return call
    class_token = call.args[0]
    return Call(
        call.station,
        pack(call.module),
        torch.cat((class_token, call.received), dim=1),
        (),
        {},
        torch.cat((call.returned, call.received), dim=1),
        unpack=False,
    )


def unsupported(model: nn.Module, what: str) -> BackboneError:
    children = ", ".join(name for name, _ in model.named_children())
    return BackboneError(
        f"{type(model).__name__} can't be split: {what}. Its children are {children or 'none'}; blocks are looked "
        f"for in {', '.join(TRUNK_NAMES)}. Families that work: {', '.join(SUPPORTED_FAMILIES)}."
    )


def attribute(model: nn.Module, name: str) -> Any:
    """One of timm's optional attributes, None where this model has none: the only such look-up in this file."""
    return getattr(model, name, None)
