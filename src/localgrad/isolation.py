"""Gradient isolation, proved on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from localgrad.backbones.example import LABEL_NAMES, Example
from localgrad.backbones.state import left_as_it_was
from localgrad.errors import (
    IsolationError,
)
from localgrad.learner import LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.step.executor import walk
from localgrad.step.local_module import site_of
from localgrad.step.offload import HOST


def check_isolation(learner: LocalLearner, images: Any = None, labels: Tensor | None = None) -> None:
    """Prove on one batch that no local module's loss reaches another module's parameters.

    Each module runs forward and backward alone; afterwards only its own parameters may have a gradient. Nothing
    is updated, and gradients and random state are left as they were.

    Args:
        learner: any learner, with or without optimizers.
        images: [B, C, H, W], or what the model is called with, as for ``step``; two random images by default.
        labels: [B]; classes in turn by default.

    Raises:
        IsolationError: naming the two modules and the parameter.
    """
    owners = [set(map(id, module.parameters())) for module in learner.modules]
    named = [
        (f"local module {number}: {name}", parameter)
        for number, module in enumerate(learner.modules)
        for name, parameter in module.named_parameters()
    ]
    kept = [parameter.grad for _, parameter in named]
    device = learner.device
    if learner._offloader is not None:  # all modules at once: in host memory, then
        learner._offloader.rest()
        device = HOST
    try:
        with left_as_it_was(learner.model, *learner.modules):
            dtype = learner.backbone.dtype
            if images is None:
                images = learner.backbone.inputs()
            has_labels = labels is not None or (isinstance(images, Mapping) and not set(LABEL_NAMES).isdisjoint(images))
            if not has_labels:
                count = len(images) if isinstance(images, Tensor) else Example.of(images, "images").num_items
                labels = learner.loss.made_up(count, learner.backbone)
            batch = LocalBatch.of(images, labels).to(device)
            batch.loss = learner.loss
            site = site_of(learner.backbone, learner.plan.boundaries, 0, overlap=learner.overlap)
            with device:
                learner.route.pretend(batch, site, dtype)
            for visit in walk(learner.modules, batch, learner.route):
                for _, parameter in named:
                    parameter.grad = None
                index, output = visit.index, visit.module(visit.received, batch)
                output.loss.backward(retain_graph=True)  # a leak is to be named, not to end in autograd's own error
                visit.hand_on(output.features, visit.module.gradient)
                for name, parameter in named:
                    if parameter.grad is not None and id(parameter) not in owners[index]:
                        raise IsolationError(
                            f"the loss of local module {index} reached a parameter of another: {name}."
                        )
                visit.module.gradient = None
    finally:
        for (_, parameter), gradient in zip(named, kept, strict=True):
            parameter.grad = gradient
