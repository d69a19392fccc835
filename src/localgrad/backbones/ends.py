"""A model's own end, for auxiliary heads made of it: copies of blocks and of the tail, and the last linear layer.

Parts that were found by watching hold the whole model, whose code they run, and what is known of the batch under way.
A copy of such a part has weights of its own; of the rest of the model it has a skeleton, in which stations and other
segments' modules are the originals (they are stood in for, and never run), and it looks at the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from localgrad.backbones.fake import by_shapes_alone, fake_copy_with_memo
from localgrad.backbones.hooks import copy_without_hooks
from localgrad.backbones.watching import Called, Segment, Trunk


def _trunks(part: nn.Module) -> Iterator[Trunk]:
    for module in part.modules():
        if isinstance(module, Segment):
            yield module.trunk


def copied(part: nn.Module) -> nn.Module:
    """A copy of a block or of a tail, with weights of its own and without users' hooks."""
    own = set(part.modules())
    memo: dict[int, Any] = {}
    shared = [module.batch for module in own if isinstance(module, Called)]
    for trunk in _trunks(part):
        slots = [*(station.slot for station in trunk.stations), *(slot for slot, _ in trunk.around)]
        shared += [trunk.batch, trunk.example, *(slot.module for slot in slots if slot.module not in own)]  # type: ignore[list-item]
    memo.update({id(thing): thing for thing in shared})
    return copy_without_hooks(part, memo)


def last_linear(tail: nn.Module, features: Tensor, num_classes: int) -> nn.Linear | None:
    """The linear layer whose output a tail gives as the logits, as it is; ``None`` where something comes behind.

    Args:
        tail: features to logits.
        features: such as it takes; no logits are computed of them.
        num_classes: of the logits.
    """
    if features.is_meta:  # its own code may ask for values, which fake tensors answer and those don't
        with by_shapes_alone():
            fake_mode, (twin, like), copies = fake_copy_with_memo((tail, features))
            with fake_mode:
                linear = last_linear(twin, like, num_classes)
        return next((original for original, copied in copies if copied is linear), None)
    found: list[tuple[nn.Linear, Tensor]] = []

    def marking(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def mark(given: Tensor) -> Tensor:
            marker = torch.zeros((), dtype=given.dtype, device=given.device).expand(*given.shape[:-1], num_classes)
            found.append((linear, marker))
            return marker

        return mark

    linears = [
        module for module in tail.modules() if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    with torch.no_grad(), _in_place_of_forward({linear: marking(linear) for linear in linears}), _still(tail):
        logits = tail(features)
    return next((linear for linear, marker in found if marker is logits), None)


@final
class Headless(nn.Module):
    """A model's tail up to its last linear layer: what that is given, [B, ...] to [B, ..., D].

    Args:
        tail: features to logits.
        linear: the last layer of it, as ``last_linear`` finds it. It stays in the tail, and is passed by.
    """

    linear: nn.Linear

    def __init__(self, tail: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.tail = tail
        vars(self)["linear"] = linear  # past the registry: it is in the tail

    def forward(self, features: Tensor) -> Tensor:
        """Run the tail without its last layer."""
        with _in_place_of_forward({self.linear: _as_it_is}):
            found: Tensor = self.tail(features)
        return found


def _as_it_is(given: Tensor) -> Tensor:
    return given


@contextmanager
def _in_place_of_forward(stand_ins: dict[nn.Linear, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    before = {module: vars(module).get("forward") for module in stand_ins}
    try:
        for module, answer in stand_ins.items():
            vars(module)["forward"] = answer
        yield
    finally:
        for module, own in before.items():
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


@contextmanager
def _still(part: nn.Module) -> Iterator[None]:
    """A region in evaluation mode."""
    modes = {module: module.training for module in part.modules()}
    try:
        part.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def cut_off(tail: nn.Module, linear: nn.Linear) -> None:
    """Have a tail give what a linear layer of it is given, and not what that gives."""
    for root in (tail, *(trunk.model for trunk in _trunks(tail))):
        for module in root.modules():
            for name, child in module._modules.items():
                if child is linear:
                    module._modules[name] = nn.Identity()
