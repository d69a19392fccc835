"""The sequential executor: local modules one after another, in one process.

::

    batch t     module 0            module 1            module 2
                F L B U free  --->  F L B U free  --->  F L B U free       --> StepResult
                              detached features

F forward, L loss, B backward, U clip and update. At any time at most one module has activations and gradients.
The images leave the batch as soon as no later module's objective looks at them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar, final

import torch
from torch import Tensor

from localgrad.backbones.base import Layout
from localgrad.errors import MemoryExceeded
from localgrad.objectives.carried import Handed, LocalBatch, Route, Value
from localgrad.step.copies import Copies
from localgrad.step.local_module import LocalOutput
from localgrad.step.local_step import LocalStep

HandOn = Callable[[LocalBatch], None]


@dataclass(frozen=True)
class StepResult:
    """What one training step gives; every tensor is detached and on the training device.

    With several processes it is of this rank's modules; in sequential mode of the module whose turn it is.

    Attributes:
        logits: the whole model's class logits [B, num_classes], before this step's update; ``None`` where these modules
            don't end in it, or logits are made chunk by chunk.
        losses: each local module's total loss, scalars.
        terms: each local module's terms by name, unweighted, scalars.
        module_logits: each local module's own class logits; ``None`` where it has no classifier.
        targets: class indices int64 [B] where the batch has them.
        unsound: whether the features received from another rank aren't all finite numbers, bool; else ``None``.
    """

    logits: Tensor | None
    losses: tuple[Tensor, ...]
    terms: tuple[dict[str, Tensor], ...]
    module_logits: tuple[Tensor | None, ...]
    targets: Tensor | None = None
    unsound: Tensor | None = None


class Walked(Protocol):
    """What can be walked over."""

    @property
    def layout(self) -> Layout | None:
        """Of what it hands on; of the model's logits nobody asks."""


W = TypeVar("W", bound=Walked)


@dataclass
class Visit(Generic[W]):
    """A local module (or its step) whose turn it is: what it receives, and where it stands in the walk."""

    index: int
    module: W
    received: Tensor
    batch: LocalBatch
    route: Route | None
    is_last: bool
    gradient: Tensor | None = None

    def hand_on(self, features: Tensor, gradient: Tensor | None = None) -> None:
        """Say what the next module receives."""
        self.batch.features, self.gradient = features, gradient

    def carried(self, features: Tensor, gradient: Tensor | None = None) -> dict[str, Value]:
        """What else the next module is given."""
        assert self.route is not None, "without one nothing is carried"
        assert self.module.layout is not None, "there is a module behind this one"
        handed = Handed(self.received, features, self.module.layout, gradient, self.batch)
        return self.route.onward(self.index, handed)

    def send(self, hand_on: HandOn, features: Tensor, gradient: Tensor | None = None) -> None:
        """Give someone the batch as the next module is to receive it."""
        hand_on(self.batch.onward(features, self.carried(features, gradient)))


def walk(modules: Sequence[W], batch: LocalBatch, route: Route | None = None, *, first: int = 0) -> Iterator[Visit[W]]:
    """The one walk over local modules in order: each receives what the one before hands on.

    Whoever walks runs each module, and says what it hands on. In between, what the batch carries is made, or let go of
    where no module behind looks at it::

        for visit in walk(modules, batch, route):
            visit.hand_on(visit.module(visit.received, batch).features)

    Args:
        modules: local modules or their steps, all of a model's or some in a row.
        batch: as it enters the first of them; afterwards, its features are what the last one hands on.
        route: what is carried where; by default nothing is.
        first: index of the first of them.
    """
    for index, module in enumerate(modules, first):
        if route is not None:
            batch.carried = {
                what.name: batch.carried[what.name] for what in route.into(index) if what.name in batch.carried
            }
        visit = Visit(index, module, batch.features, batch, route, is_last=module is modules[-1])
        yield visit
        if route is not None and not visit.is_last:
            batch.carried = visit.carried(batch.features, visit.gradient)
        del visit


@final
class Attempt:
    """A region in which memory may run out: that ends it, and ``reason`` is the error's first line."""

    reason: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.reason = out_of_memory(error) if isinstance(error, RuntimeError) else None
        return self.reason is not None


@final
class SequentialExecutor:
    """Runs the steps of all local modules in order.

    Args:
        steps: one for each local module, first to last; in a parallel run, for those of this process.
        around: given a module's index, a context in which its step is to run, such as one that has it on the device.
        first: index of the first step's module.
        route: what is carried where in the whole model; by default as the objectives of the steps say.

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
        route: Route | None = None,
    ) -> None:
        self.steps = tuple(steps)
        self.first = first
        self.route = route or Route(step.module.objective.uses for step in self.steps)
        self.recover: Callable[[int], bool] | None = None
        self.around = around or (lambda _: contextlib.nullcontext())
        self.copies = Copies(self.steps)
        for index, step in enumerate(self.steps, first):
            step.module.keeps_gradient = self.route.is_late(index + 1)

    def step(self, batch: LocalBatch, hand_on: HandOn | None = None) -> StepResult:
        """Train every local module on one batch, out of which what it carries is taken on the way.

        ``hand_on`` is given the batch as the module behind the last one is to receive it: before the last one's
        backward pass, if all of it is there by then.
        """
        with self.copies.all_modules():
            losses, terms, logits = [], [], []
            for visit in walk(self.steps, batch, self.route, first=self.first):
                sends = hand_on if visit.is_last else None
                is_late = self.route.is_late(visit.index + 1)
                take = None if sends is None or is_late else partial(visit.send, sends)
                for attempt in self.attempts(visit.index, [visit.module]):
                    with attempt, self.around(visit.index), self.copies.of(visit.module):
                        output = visit.module(visit.received, batch, take)
                if sends is not None and is_late:
                    visit.send(sends, output.features, output.gradient)
                visit.hand_on(output.features, output.gradient)
                losses.append(output.loss)
                terms.append(output.terms)
                logits.append(output.logits)
                del output, take, attempt
            ends_the_model = self.first + len(self.steps) == len(self.route.uses)
            whole = batch.features if ends_the_model else None
            if whole is not None and not self.steps[-1].module.gives_logits:
                whole = logits[-1]
            return StepResult(whole, tuple(losses), tuple(terms), tuple(logits), batch.known_targets)

    def step_parts(self, parts: Sequence[LocalBatch], *, logits: bool = True) -> list[StepResult]:
        """Train every local module on one batch that comes in parts: each has all of them before its one update.

        Args:
            parts: as ``make_parts`` has made them.
            logits: whether to keep them.

        Returns:
            What each part gives; losses and terms are its share of the batch's.
        """
        with self.copies.all_modules():
            outputs: list[list[LocalOutput]] = [[] for _ in parts]
            walks = [walk(self.steps, part, self.route, first=self.first) for part in parts]
            for visits in zip(*walks, strict=True):
                step = visits[0].module
                for attempt in self.attempts(visits[0].index, [step]):
                    with attempt, self.around(visits[0].index), self.copies.of(step):
                        received = [visit.received for visit in visits]
                        is_looked_at = logits or not visits[0].is_last
                        found = step.over_parts(received, parts, features=is_looked_at, logits=logits)
                for visit, output, own in zip(visits, found, outputs, strict=True):
                    visit.hand_on(output.features, output.gradient)
                    own.append(output._replace(features=output.features[:0], gradient=None))
                del found, output, attempt, visits, visit, received
            gives_logits = self.steps[-1].module.gives_logits
            return [
                StepResult(
                    part.features if logits and gives_logits else own[-1].logits,
                    tuple(output.loss for output in own),
                    tuple(output.terms for output in own),
                    tuple(output.logits for output in own),
                    part.known_targets,
                )
                for part, own in zip(parts, outputs, strict=True)
            ]

    def attempts(self, place: int | str, steps: Sequence[LocalStep]) -> Iterator[Attempt]:
        """Regions to run something in: where memory runs out before an update, one more if someone can recover.

        Args:
            place: the module that it is, by number; or what is done by all of them.
            steps: what it may change.

        Raises:
            MemoryExceeded: memory ran out, and nobody could help.
        """
        index = place if isinstance(place, int) else self.first + len(self.steps)
        while True:
            before = None if self.recover is None else [step.snapshot() for step in steps]
            attempt = Attempt()
            yield attempt
            if attempt.reason is None:
                return
            # The exception is gone here, and with its frames the graph that they held. Gradients go before anyone is
            # asked: room is needed, estimates would count them, and whoever goes on starts from none.
            for step in steps:
                step.optimizer.zero_grad(set_to_none=True)
            updating = any(step.updating for step in steps)
            if before is None or updating or self.recover is None or not self.recover(index):
                raise MemoryExceeded(place, attempt.reason)
            for step, state in zip(steps, before, strict=True):
                step.go_back(state)


def free_cache(device: torch.device) -> None:
    """Give back what an allocator holds of a device without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> str | None:
    """The first line of an error that says that memory ran out, on a GPU or a processor; ``None`` for any other."""
    line = str(error).split("\n", maxsplit=1)[0]
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in line:
        return line or "out of memory"
    return None
