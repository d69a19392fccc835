"""Weights of which several local modules train a copy each: ``shared="average"``.

A weight on both sides of a boundary (tied embeddings, a position bias of all blocks) gets no gradient across
it. So each of its modules has a copy for the length of a step, and afterwards the weight is their mean::

    w  <-  mean over the modules m that learn of  U_m(w, g_m)

with g_m the gradient of m's own loss and U_m the update of m's own optimizer, whose state (momenta) stays its own. With
plain gradient descent that is one step along the mean of the gradients; with any optimizer it is local SGD that
averages after each step (Stich, arXiv 1805.09767), the modules in the place of workers.

No copy outlives its step: between two of them there is the weight alone, in the model and in its state. While a step
lasts, two more tensors of its size are there: what it was, and the sum of the copies so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from localgrad.step.local_step import LocalStep


@dataclass
class _UnderWay:
    """A weight in the middle of a step: what it was, how many copies are to come, the sum of those that were trained.

    Sums are in float32 at least.
    """

    before: Tensor
    to_come: int
    total: Tensor | None = None
    trained: int = 0

    def add(self, weight: Tensor) -> None:
        """Take what a module made of its copy."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.total = weight.to(wide, copy=True) if self.total is None else self.total.add_(weight)
        self.trained += 1
        self.to_come -= 1

    def mean(self) -> Tensor:
        """Of all copies; those that weren't trained are as they were."""
        assert self.total is not None, "one was trained"
        others = self.before * self.to_come if self.to_come else 0
        return (self.total + others) / (self.trained + self.to_come)


@final
class Copies:
    """The copies of a learner's shared weights, step after step.

    Args:
        steps: of local modules in order; those that have a weight in ``module.copies`` train a copy each.
    """

    def __init__(self, steps: Sequence[LocalStep]) -> None:
        self.steps = tuple(steps)
        self._under_way: dict[nn.Parameter, _UnderWay] = {}

    def _learners(self, weight: nn.Parameter) -> int:
        return sum(any(own is weight for own in step.module.copies) for step in self.steps if not step.frozen)

    @contextmanager
    def all_modules(self) -> Iterator[None]:
        """A region for a step of all modules. Where it fails, weights are the means of what copies are by then."""
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, state in self._under_way.items():
                    if state.total is None and torch.equal(weight, state.before):
                        continue  # nothing was updated
                    state.add(weight)  # of the module that failed, or of the next one, which didn't begin
                    weight.copy_(state.mean())
            self._under_way.clear()

    @contextmanager
    def of(self, step: LocalStep) -> Iterator[None]:
        """A region for one module's step, in which weights are its copies. Where it fails, it may be entered again."""
        weights = [] if step.frozen else step.module.copies
        with torch.no_grad():
            for weight in weights:
                if weight not in self._under_way:
                    self._under_way[weight] = _UnderWay(weight.clone(), self._learners(weight))
        yield
        with torch.no_grad():
            for weight in weights:
                state = self._under_way[weight]
                if state.to_come == 1 and state.total is None:
                    del self._under_way[weight]  # it is the only one that learns
                    continue
                state.add(weight)
                if state.to_come:
                    weight.copy_(state.before)
                else:
                    weight.copy_(state.mean())
                    del self._under_way[weight]
        if weights:
            step.module.objective.follow()  # the weights that all modules see, not its copies
