"""Watch a timm model run once: which blocks were called, in which order, with what; what was read before and after.

What it sees is data (``Seen``), of which ``base.py`` makes the parts. Every hook is taken off again.

Shapes: B batch; images [B, C, H, W].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.backbones.fake import NEEDS_VALUES, FakeTensor, looks_at_values
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.state import same_bits
from localgrad.backbones.timm_models import TRUNK_NAMES, TWO_STREAMS, attribute, child_of, unsupported
from localgrad.errors import BackboneError, reason_of


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
    kwargs: Kwargs
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
    """The containers of a model that others may run one after the other, by name."""
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
        logits = _probe(model, log)(images.clone())  # it may write into them
    except torch.OutOfMemoryError:
        raise
    except NEEDS_VALUES as error:
        raise looks_at_values(error) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        _check_dtypes(model, error)
        raise BackboneError(
            f"the model does not take images of input_size={tuple(images.shape[1:])}: {reason_of(error)} Build it for "
            f"them (timm.create_model(..., img_size={images.shape[-1]}) where the family has that argument), or pass "
            f"the size it was built for{_built_for(model)}."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise BackboneError(
            f"the model returns {got} for {len(images)} images, and no logits [B, num_classes]: build it with "
            "num_classes=N and pooling (global_pool='avg' or 'token')."
        )
    if not isinstance(logits, FakeTensor) and not logits.isfinite().all():
        raise BackboneError(
            "the model's logits are not finite numbers, so nothing can be compared with them: check its weights."
        )
    return _sort(model, log, logits)


def _check_dtypes(model: nn.Module, error: Exception) -> None:
    """Blame an error on the types of the weights, where they are of several."""
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    if len(dtypes) > 1:
        raise BackboneError(
            f"the model's weights are of several types ({', '.join(sorted(dtypes))}), and its forward fails on them "
            f"({reason_of(error)}): cast it to one, as by model.float()."
        ) from error


@contextmanager
def watch_inputs(
    model: nn.Module, parts: Sequence[nn.Module], shapes: Sequence[tuple[int, ...] | None]
) -> Iterator[set[int]]:
    """While the model and its parts run, in whatever mode: which parts write into what they receive?

    The images are given as copies to the model and the first part, so that both begin with the same. ``shapes`` are
    those of one image's features that enter each part, None for the stem.

    Yields:
        The numbers of those parts, complete once they have run.

    Raises:
        BackboneError: inside, where features of another shape enter a part.
    """
    writing: set[int] = set()

    def copy_images(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].clone(), *args[1:]) if args else args

    def watch(number: int, part: nn.Module) -> Iterator[Any]:
        entered: list[tuple[Tensor, int, Tensor]] = []

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            shape = shapes[number]
            if shape is not None and tuple(args[0].shape[1:]) != shape:
                raise unsupported(
                    model,
                    f"in {'train' if part.training else 'eval'} mode features of shape {list(args[0].shape)} and not "
                    f"[B, {', '.join(map(str, shape))}] enter {'the tail' if number == len(parts) - 1 else 'a block'}, "
                    "so they have no grid (where tokens are dropped, build it with patch_drop_rate=0)",
                )
            entered.append((args[0], args[0]._version, args[0].detach().clone()))

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            features, version, value = entered.pop()
            if features._version != version or not same_bits(features, value):  # versions don't count writes by .data
                writing.add(number)

        yield part.register_forward_pre_hook(enter, prepend=True)
        yield part.register_forward_hook(leave)

    handles = [hook for number, part in enumerate(parts) for hook in watch(number, part)]
    handles += [module.register_forward_pre_hook(copy_images, prepend=True) for module in (model, parts[0])]
    try:
        yield writing
    finally:
        for handle in handles:
            handle.remove()


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
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
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
    return replace(
        call,
        module=pack(call.module),
        received=torch.cat((class_token, call.received), dim=1),
        args=(),
        kwargs={},
        returned=torch.cat((call.returned, call.received), dim=1),
        unpack=False,
    )
