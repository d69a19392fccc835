"""A plan for a backbone: balanced by the bytes that autograd keeps, and what tells models apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from localgrad import rules
from localgrad.backbones.base import Backbone
from localgrad.backbones.likeness import signature
from localgrad.backbones.quantized import num_weights
from localgrad.errors import (
    BackboneError,
    PartitionError,
    arg,
)
from localgrad.memory.track import block_activation_bytes, block_activation_bytes_by_values
from localgrad.partition import Checkpointing, Plan, Request, resolve

_kept_bytes: dict[tuple[object, ...], list[int]] = {}

CheckpointRequest = bool | str | Checkpointing | Sequence[bool | str | Checkpointing]


def make_plan(backbone: Backbone, modules: Request | Plan, *, checkpoint: CheckpointRequest = False) -> Plan:
    """Partition a backbone, balancing by the bytes that autograd keeps for one image.

    Args:
        backbone: a split model.
        modules: as for ``LocalLearner``.
        checkpoint: what modules recompute: one for all, or one each, as for ``LocalLearner``; not for a ``Plan``.

    Raises:
        PartitionError: the modules asked for can't be made, a plan is of another model, or both it and ``checkpoint``
            say what is recomputed.
    """
    name = model_name(backbone.model)
    if isinstance(modules, Plan):
        if (modules.model, modules.num_blocks) != (name, len(backbone.blocks)):
            raise _other_model(modules, name, len(backbone.blocks))
        rules.check({"checkpoint": checkpoint, "plan": True}, PartitionError)
        return modules
    costs = activation_bytes(backbone)
    boundaries = resolve(modules, costs, backbone.stage_boundaries)
    num_modules = len(boundaries) + 1
    is_list = isinstance(checkpoint, Sequence) and not isinstance(checkpoint, str)
    listed: list[object] = [*cast(Sequence[object], checkpoint)] if is_list else [checkpoint] * num_modules
    plan = Plan(
        model=name,
        num_blocks=len(costs),
        boundaries=boundaries,
        checkpoint=tuple(Checkpointing.parse(how) for how in listed),
    )
    return replace(plan, activation_bytes=tuple(sum(costs[i] for i in span) for span in plan.spans))


def activation_bytes(backbone: Backbone) -> list[int]:
    """Bytes that autograd keeps for one image in each block; the stem counts to the first, the tail to the last.

    What was found for a model is remembered for the next one that is made alike.
    """
    parts = [backbone.stem, *backbone.blocks, backbone.tail]
    # Two images: batch norms refuse to train on one.
    shape, dtype = backbone.like(2)
    signatures = [signature(part) for part in parts]
    training = tuple(net.training for part in parts for net in part.modules())
    key = (*signatures, shape, dtype, training, torch.get_default_dtype())
    if key not in _kept_bytes or None in signatures:
        try:
            _kept_bytes[key] = block_activation_bytes(parts, torch.empty(shape, dtype=dtype, device="meta"))
        except BackboneError:  # a part looks at values
            _kept_bytes[key] = block_activation_bytes_by_values(parts, backbone.inputs(2))
    stem, *blocks, tail = _kept_bytes[key]
    blocks[0] += stem
    blocks[-1] += tail
    return [kept // 2 for kept in blocks]


def num_parameters(backbone: Backbone) -> int:
    """Numbers that a model learns or holds still: what tells models of one name and depth apart."""
    return num_weights(backbone)


def num_trained(backbone: Backbone) -> int:
    """Numbers in a backbone that learn."""
    return sum(weight.numel() for weight in {*backbone.parameters()} if weight.requires_grad)


def model_name(model: nn.Module) -> str:
    """The architecture's timm name, or the class's where there is none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _other_model(plan: Plan, name: str, num_blocks: int) -> PartitionError:
    return PartitionError(
        f"{arg('plan')}: it was made for {plan.model} with {plan.num_blocks} blocks, "
        f"but this model is {name} with {num_blocks} blocks; make a new plan."
    )


def frozen_from(freeze_from: float | None, index: int, num_modules: int) -> float | None:
    """The share of the training after which a local module is frozen: one after another, the last one never."""
    if freeze_from is None or index == num_modules - 1:
        return None
    return freeze_from + (1 - freeze_from) * index / (num_modules - 1)
