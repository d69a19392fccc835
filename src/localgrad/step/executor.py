"""The sequential executor: local modules one after another, in one process.

::

    batch t     module 0            module 1            module 2
                F L B U free  --->  F L B U free  --->  F L B U free       --> StepResult
                              detached features

F forward, L loss, B backward, U clip and update. At any time at most one module has activations and gradients.
The images leave the batch as soon as no later module's objective looks at them: with feature reconstruction, after
the first module. A caller that keeps no name of its own for them gets their memory back for the other modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from localgrad.errors import MemoryExceeded
from localgrad.objectives.base import LocalBatch
from localgrad.step.local_module import LocalOutput
from localgrad.step.local_step import HandOn, LocalStep

T = TypeVar("T")
HandOnward = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class StepResult:
    """What one training step gives; every tensor is detached and on the training device.

    Attributes:
        logits: the whole model's class logits [B, num_classes], before this step's update.
        losses: each local module's total loss, scalars.
        terms: each local module's terms by name, unweighted, scalars.
        module_logits: each local module's own class logits; ``None`` where it has no classifier.
    """

    logits: Tensor
    losses: tuple[Tensor, ...]
    terms: tuple[dict[str, Tensor], ...]
    module_logits: tuple[Tensor | None, ...]


class Trained(NamedTuple):
    """What the steps of some modules in a row give.

    Attributes:
        features: what the last one hands on.
        losses: of each.
        terms: of each, by name.
        module_logits: of each that has a classifier.
        received: what the last one received, where a later module looks at that.
    """

    features: Tensor
    losses: tuple[Tensor, ...]
    terms: tuple[dict[str, Tensor], ...]
    module_logits: tuple[Tensor | None, ...]
    received: Tensor | None


class SequentialExecutor:
    """Runs the steps of all local modules in order.

    Args:
        steps: one for each local module, first to last; in a parallel run, for those of this process.
        around: given a module's index, a context in which its step is to run, such as one that has it on the device.
        first: index of the first step's module.
        uses: what each module of the whole model looks at (``LocalObjective.uses``); by default that of the steps.

    Attributes:
        recover: called with the index of a module in whose step memory ran out; where it answers true (something was
            changed that needs less), the step is run again, as if nothing had been.
    """

    def __init__(
        self,
        steps: Sequence[LocalStep],
        around: Callable[[int], contextlib.AbstractContextManager[None]] | None = None,
        *,
        first: int = 0,
        uses: Sequence[frozenset[str]] | None = None,
    ) -> None:
        self.steps = tuple(steps)
        self.first = first
        self.uses = tuple(uses or [step.module.objective.uses for step in self.steps])
        self.recover: Callable[[int], bool] | None = None
        self.around = around or (lambda _: contextlib.nullcontext())
        self._last_user = {what: self._last(what) for what in ("images", "previous", "context")}
        for index, step in enumerate(self.steps, first):
            step.module.keeps_gradient = any("gradient" in used for used in self.uses[index + 1 : index + 2])

    def _last(self, what: str) -> int:
        """The last module that looks at something; -1 for none."""
        return max((index for index, used in enumerate(self.uses) if what in used), default=-1)

    def step(self, batch: LocalBatch) -> StepResult:
        """Train every local module on one batch.

        Args:
            batch: images and labels; the images are taken out of it on the way.
        """
        assert batch.images is not None, "a step starts with images"
        return StepResult(*self.train(batch.images, batch)[:4])

    def is_used(self, what: str, index: int) -> bool:
        """Whether a module, or one behind it, looks at ``images``, ``previous`` or ``context``."""
        return index <= self._last_user[what]

    def train(self, features: Tensor, batch: LocalBatch, hand_on: HandOnward | None = None) -> Trained:
        """Run all steps on what the first one receives.

        Args:
            features: that.
            batch: images and labels, and what else the first module's objective looks at.
            hand_on: called by the last step, before its backward pass, with what it received and what it gives.
        """
        received = batch.previous
        losses, terms, logits = [], [], []
        for index, step in enumerate(self.steps, self.first):
            if index > max(0, self._last_user["images"]):
                batch.images = None
            batch.previous = received if index <= self._last_user["previous"] else None
            received = features if index < self._last_user["previous"] else None
            take = partial(hand_on, features) if hand_on is not None and step is self.steps[-1] else None
            output = self._run(index, step, features, batch, take)
            features, batch.gradient = output.features, output.gradient
            if index < self._last_user["context"]:
                batch.context = (*batch.context, step.module.pooled(features))
            losses.append(output.loss)
            terms.append(output.terms)
            logits.append(output.logits)
            del output, take
        return Trained(features, tuple(losses), tuple(terms), tuple(logits), received)

    def _run(
        self, index: int, step: LocalStep, features: Tensor, batch: LocalBatch, hand_on: HandOn | None
    ) -> LocalOutput:
        def run() -> LocalOutput:
            with self.around(index):
                return step(features, batch, hand_on)

        return self.recovering(index, [step], run)

    def recovering(self, index: int, steps: Sequence[LocalStep], run: Callable[[], T]) -> T:
        """Run something; where memory runs out before an update, once more if someone can recover.

        Args:
            index: of the module that it is; as many as there are for an end-to-end step.
            steps: what it may change.
            run: the step or steps.

        Raises:
            MemoryExceeded: memory ran out, and nobody could help.
        """
        while True:
            before = None if self.recover is None else [step.snapshot() for step in steps]
            try:
                return run()
            except RuntimeError as error:
                reason = out_of_memory(error)
                if reason is None:
                    raise
            # The exception is gone here, and with its frames the graph that they held. Gradients go before anyone is
            # asked: room is needed, estimates would count them, and whoever goes on starts from none.
            for step in steps:
                step.optimizer.zero_grad(set_to_none=True)
            updating = any(step.updating for step in steps)
            if before is None or updating or self.recover is None or not self.recover(index):
                raise MemoryExceeded(index, reason)
            for step, state in zip(steps, before, strict=True):
                step.go_back(state)


def out_of_memory(error: RuntimeError) -> str | None:
    """The first line of an error that says that memory ran out, on a GPU or a processor; ``None`` for any other."""
    line = str(error).split("\n", maxsplit=1)[0]
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in line:
        return line or "out of memory"
    return None
