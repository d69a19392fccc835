"""A step of end-to-end training among local ones, with the same weights, optimizers and memory budget.

Local training keeps one module's activations. End-to-end training that recomputes every block keeps little more, so a
run may mix the two: now and then (or at its end) a step in which the task loss reaches all modules. Their own
optimizers take the gradients, so nothing is added to what is static; but all modules' gradients are alive at once.

Auxiliary nets have no part in such a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from localgrad.backbones.namespaces import Attributes
from localgrad.objectives.carried import LocalBatch
from localgrad.step.checkpointing import Recomputed
from localgrad.step.executor import StepResult, walk
from localgrad.step.local_module import LocalOutput
from localgrad.step.local_step import (
    LocalStep,
    autocast,
    check_surroundings,
    explained,
    joined,
    single_images_refused,
)


@final
class GlobalStep:
    """Trains all modules on the last one's loss; of each, ``recomputed`` stands in for parts, by their number."""

    def __init__(self, steps: Sequence[LocalStep], recomputed: Sequence[Mapping[int, Recomputed]]) -> None:
        self.steps = tuple(steps)
        self.recomputed = tuple(recomputed)
        owned = {id(weight): weight for step in self.steps for weight in step.parameters}
        self._together = _Together(list(owned.values()), self.steps)

    def __call__(self, batch: LocalBatch) -> StepResult:
        """Train on one batch; gives figures of the last module, the others have no losses."""
        last = self.steps[-1]
        for step in self.steps:
            step.begin()
        check_surroundings(last.device_type, last.precision, batch.features, batch.labels)
        with contextlib.ExitStack() as still:
            still.enter_context(single_images_refused(len(batch.labels), last.accumulation))
            for step in self.steps:
                if step.frozen:
                    still.enter_context(step.as_frozen.running())
            return self._train(batch, last)

    def _train(self, batch: LocalBatch, last: LocalStep) -> StepResult:
        scaler = last.scaler
        parts = batch.parts(last.accumulation)
        outputs = []
        gives_logits = last.module.gives_logits
        for part in parts:
            self.steps[0].module.begin_batch(part)
            with autocast(last.device_type, last.precision):
                logits = self._logits(part.features, part.labels)
                value = last.module.objective(logits, logits, part)
            scaler.scale(value.loss).backward()
            terms = {name: term.detach() for name, term in value.terms.items()}
            made = None if gives_logits or value.logits is None else value.logits.detach()
            outputs.append(LocalOutput(logits.detach(), value.loss.detach(), terms, made))
            del logits, value
        self.steps[0].module.end_batch()
        self._update(scaler)
        found = joined(outputs)
        num_others = len(self.steps) - 1
        terms_of_all = (*({} for _ in range(num_others)), found.terms)
        whole = found.features if gives_logits else found.logits
        module_logits = (*([None] * num_others), whole)
        return StepResult(whole, (found.loss,), terms_of_all, module_logits, batch.known_targets)

    def _logits(self, images: Tensor, labels: Tensor) -> Tensor:
        batch = LocalBatch(None, labels, features=images)
        for visit in walk(self.steps, batch):
            visit.hand_on(visit.module.module.own(visit.received, self.recomputed[visit.index]))
        return batch.features

    def _update(self, scaler: torch.amp.GradScaler) -> None:
        learning_still = {id(weight) for step in self.steps if not step.frozen for weight in step.parameters}
        for step in self.steps:
            step.updating = True
            for weight in step.parameters:
                if id(weight) not in learning_still:
                    weight.grad = None
        if self.steps[-1].clip_grad is not None:
            scaler.unscale_(self._together)
            learning = [weight for weight in self._together.param_groups[0]["params"] if weight.grad is not None]
            nn.utils.clip_grad_norm_(learning, self.steps[-1].clip_grad)
        scaler.step(self._together)
        self._together.zero_grad(set_to_none=True)  # of auxiliary nets there are none; of a step held back, all
        scaler.update()
        for step in self.steps:
            step.module.objective.follow()
            step.num_updates += not step.frozen
            step.updating = False


@final
class _Together(torch.optim.Optimizer):
    """The optimizers of all modules as one, for the gradient scaler: what isn't finite anywhere holds back all."""

    def __init__(self, parameters: Sequence[nn.Parameter], steps: Sequence[LocalStep]) -> None:
        super().__init__(parameters, {})
        self.steps = steps

    def __getstate__(self) -> Attributes:
        """For copies: of its own attributes torch's optimizer hands on none but these."""
        return {**super().__getstate__(), "steps": self.steps}

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update every module that still learns; blocks that two modules train are updated by their first alone."""
        for step in self.steps:
            if not step.frozen:
                with explained(step.optimizer):
                    step.optimizer.step()
                step.optimizer.zero_grad(set_to_none=True)
