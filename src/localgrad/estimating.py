"""The memory of a learner's step, predicted on fake tensors; and its end-to-end baseline."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from localgrad.learner import Factories, Learner, LocalLearner
from localgrad.memory.track import MemoryProfile, annotate, simulate
from localgrad.objectives.carried import LocalBatch
from localgrad.step.executor import StepResult
from localgrad.step.offload import HOST, Offloader


def end_to_end(learner: Learner) -> LocalLearner:
    """The same backbone, precision and settings with one local module: the end-to-end baseline, sharing weights."""
    decay = None if learner._ema is None else learner._ema.decay
    offload, device = (learner.offload, learner._device) if isinstance(learner, LocalLearner) else (False, None)
    return LocalLearner(
        learner.backbone,
        modules=1,
        objective=learner.objective,
        ema_decay=decay,
        offload=offload,
        device=device,
        **learner._settings,
    )


def estimate_step(
    learner: LocalLearner,
    batch_size: int,
    optimizer: Factories,
    device: torch.device | None = None,
    *,
    globally: bool = False,
) -> MemoryProfile:
    """Predict the memory of one training step on fake tensors; the learner is not touched.

    Args:
        learner: as it will be trained.
        batch_size: images a step.
        optimizer: factory, as for ``configure_optimizers``.
        device: that it will be trained on; by default the one where it is.
        globally: predict the end-to-end step (``global_step_on``), and not the local one.
    """
    if globally:
        learner._recomputed_globally()  # made of real blocks; fake ones can't be taken apart
    bare = copy.copy(learner)  # without its optimizers and compiled code, which a fake copy can't hold
    bare.plan = replace(learner.plan, made_for={})  # what it was made for was said
    bare._executor, bare._settings = None, {**learner._settings, "compile": False}
    bare._global_step = None
    bare.optimizer_factory = None
    bare._offloader, bare._device = None, None
    return simulate(
        bare,
        _EstimatedStep(optimizer, (batch_size, *learner.backbone.input_size), globally=globally),
        inputs={"labels": ((batch_size,), torch.int64)},
        device="cuda" if (device or learner.device).type == "cuda" else "cpu",
        host=LocalLearner.host_tensors,
    )


@final
class _EstimatedStep:
    """A training step of a copied learner, whose optimizers are made at the first call.

    It makes its images as the data path does, and gives them away, so that they are counted for as long as they live.
    """

    def __init__(self, factory: Factories, size: tuple[int, ...], *, globally: bool = False) -> None:
        self.factory = factory
        self.size = size
        self.globally = globally
        self.configured = False

    def __call__(self, learner: LocalLearner, labels: Tensor) -> StepResult:
        first = not self.configured
        if first:
            if learner.offload:  # to fake tensors, which are all on the processor
                learner._device = HOST
                learner._offloader = Offloader(learner.modules, HOST)
            learner.configure_optimizers(self.factory)
            _annotate_modules(learner)
            self.configured = True
            # The first step only makes optimizer state, which is the same after a few images.
            labels = labels[: 2 * learner._settings["accumulation"]]
        # The first step makes all optimizer state, also that of auxiliary nets, which an end-to-end step leaves alone.
        step = learner.global_step_on if self.globally and not first else learner.step_on
        return step(LocalBatch(torch.empty(len(labels), *self.size[1:], dtype=learner.backbone.dtype), labels))


def _annotate_modules(learner: LocalLearner) -> None:
    """Have each module's step run under its own label."""
    executor = learner._executor
    assert executor is not None, "optimizers are configured"
    inner = executor.around

    @contextlib.contextmanager
    def around(index: int) -> Iterator[None]:
        with annotate(f"module {index}"), inner(index):
            yield

    executor.around = around
