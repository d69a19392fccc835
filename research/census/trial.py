"""One model of the census: split it, and train one step of it with two and with four local modules."""

from __future__ import annotations

import copy
import time
import traceback
from typing import Any

import torch
from torch import Tensor, nn

import localgrad
from localgrad.backbones.base import Backbone
from localgrad.errors import LocalgradError
from research.census.models import Batch, Entry

MODULES = (2, 4)
Row = dict[str, Any]


def tried(entry: Entry, *, steps: bool = True) -> Row:
    """What came of a model.

    Returns:
        ``blocks``, ``first``, ``last`` and ``watched`` (or timm's known way) and ``seconds`` of the processor if it was
        split; else ``reason``. By number of modules, ``steps`` has "" for a step that trained, or what was said.
    """
    torch.manual_seed(0)
    model = entry.make()
    batch = entry.batch(model)
    begin = time.process_time()
    try:
        backbone = localgrad.split(model, example=batch)
    except LocalgradError as error:
        return {"reason": str(error), "seconds": _since(begin)}
    row: Row = {"blocks": len(backbone.blocks), "first": backbone.block_names[0], "last": backbone.block_names[-1]}
    row |= {"watched": backbone.trunk is not None, "seconds": _since(begin)}
    if steps:
        row["steps"] = {str(modules): _step(backbone, modules, batch) for modules in MODULES}
    return row


def _since(begin: float) -> float:
    return round(time.process_time() - begin, 1)


def _step(backbone: Backbone, modules: int, batch: Batch) -> str:
    """One step; "" if every module's loss is finite and its weights moved, or what went wrong."""
    if len(backbone.blocks) < modules:
        return f"it has {len(backbone.blocks)} blocks"
    backbone = copy.deepcopy(backbone)
    try:
        labels = _labels(backbone, batch)
        learner = localgrad.LocalLearner(backbone, modules=modules, shared="last")
        learner.configure_optimizers(lambda params: torch.optim.AdamW(params, lr=1e-4))
        before = [_weights(module).clone() for module in learner.modules]
        result = learner.step(batch, labels) if isinstance(batch, Tensor) else learner.step({**batch, "labels": labels})
    except LocalgradError as error:
        return str(error)
    except Exception as error:  # a fault of ours: it is a result, too
        return f"{type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1].name})"
    if not all(bool(torch.isfinite(torch.as_tensor(loss))) for loss in result.losses):
        return "a loss isn't finite"
    moved = [not torch.equal(one, _weights(module)) for one, module in zip(before, learner.modules, strict=True)]
    return "" if all(moved) else f"modules whose weights didn't move: {[i for i, m in enumerate(moved) if not m]}"


def _labels(backbone: Backbone, batch: Batch) -> Tensor:
    """Labels as the logits want them: one an item, a token or a place; next tokens are shifted by the loss."""
    was = backbone.training
    with torch.no_grad():
        logits = backbone.eval()(batch)
    backbone.train(was)
    shape = (logits.shape[0], *(logits.shape[2:] if logits.ndim == 4 else logits.shape[1:-1]))
    return torch.randint(backbone.num_classes, shape, generator=torch.Generator().manual_seed(2))


def _weights(module: nn.Module) -> Tensor:
    """All of a module's weights in a row."""
    return torch.cat([weight.detach().flatten() for weight in module.parameters() if weight.requires_grad])
