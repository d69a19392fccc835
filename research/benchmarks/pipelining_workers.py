"""What one process does in each method of ``pipelining.py``: a ``Worker`` trains its share, and is timed."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.optim import AdamW, Optimizer

from localgrad import FeatureReconstruction, LocalLearner, ParallelLearner, Team
from localgrad.backbones.base import Backbone
from localgrad.compare.measuring import Held
from localgrad.estimating import estimate_step
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.methods import Objective
from localgrad.parallel.memory import estimate_share
from localgrad.partition import Boundaries, spans

WHOLE = ("none", "parts")
LOCAL = ("local", "local-one")
ALONE = (*WHOLE, "local-one", "stages-one")
"""Those of one process."""
METHODS = (*WHOLE, "stages-one", "1f1b", "gpipe", "local-one", "local")
LEARNING_RATE = 1e-4
CPU = torch.device("cpu")


class Stopwatch:
    """Adds up the seconds that are spent inside ``running()``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class Phases:
    """Seconds of one part of the model: forward with loss, backward, update."""

    def __init__(self) -> None:
        self.forward, self.backward, self.update = Stopwatch(), Stopwatch(), Stopwatch()

    @property
    def seconds(self) -> tuple[float, float, float]:
        return self.forward.seconds, self.backward.seconds, self.update.seconds


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)


class Worker(ABC):
    """One process's share of the training, whatever the method.

    Attributes:
        parts: what is trained here, in order, each with an optimizer of its own; the model's own parameters.
        blocks: of each part, its blocks.
        packets: bytes of the features that each part gives to the next one in a step; 0 for the last.
        optimizers: of each part.
        phases: of each part, since the worker was made.
        needs_images: whether ``step`` is to be given the images.
        needs_labels: and the labels.
        sent_bytes: what this process sends a step, to all others.
        lead: how many steps the first process may be ahead of the last.
        profiled: the last so many steps show the peak of tensors.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        blocks: Sequence[range],
        packets: Sequence[int],
        optimizers: Sequence[Optimizer] | None = None,
    ) -> None:
        self.parts = [part.train() for part in parts]
        self.blocks = list(blocks)
        self.packets = list(packets)
        self.optimizers = list(optimizers or (adamw(list(part.parameters())) for part in parts))
        self.phases = [Phases() for _ in parts]
        self.needs_images = self.needs_labels = True
        self.sent_bytes = 0
        self.lead = 0
        self.profiled = 1

    @abstractmethod
    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """Train on one batch.

        Args:
            images: [B, C, H, W]; ``None`` unless they are needed here.
            labels: [B], likewise.

        Returns:
            The batch's mean task loss before the update, in the process that knows it; ``None`` in the others.
        """

    def begin(self, num_steps: int) -> None:  # noqa: B027  # most have nothing to do
        """Told before the first of so many steps."""

    def finish(self) -> None:  # noqa: B027
        """Told after the last one."""

    @property
    def busy_seconds(self) -> float:
        """Seconds spent computing since the worker was made."""
        return sum(sum(phases.seconds) for phases in self.phases)

    def holds(self) -> list[Held]:
        """What is alive between steps, for the count of tensors."""
        return [*self.parts, *self.optimizers]

    def estimate(self) -> int | None:
        """localgrad's own estimate of the peak of this process's tensors, where there is one."""
        return None

    def update(self) -> None:
        for optimizer, phases in zip(self.optimizers, self.phases, strict=True):
            with phases.update.running():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


# End to end, in one process --------------------------------------------------------------------------------------


class Alone(Worker):
    """The plain loop in one process; by option over the batch's parts one after another, with one update."""

    def __init__(self, backbone: Backbone, *, microbatches: int = 1) -> None:
        super().__init__([backbone.model], [range(len(backbone.blocks))], [0])
        self.microbatches = microbatches

    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor:
        assert images is not None, "needs_images"
        assert labels is not None, "needs_labels"
        (model,), (phases,) = self.parts, self.phases
        losses = []
        for some, theirs in zip(images.chunk(self.microbatches), labels.chunk(self.microbatches), strict=True):
            with phases.forward.running():
                loss = F.cross_entropy(model(some), theirs) / self.microbatches
            with phases.backward.running():
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        self.update()
        return torch.stack(losses).sum()


class StagesAlone(Worker):
    """A pipeline's stages in one process: each microbatch forward through all of them, then backward.

    It is ``Alone`` over the same parts, cut where stages are, so that each stage's own seconds are known.
    """

    def __init__(self, backbone: Backbone, boundaries: Boundaries, *, batch_size: int, microbatches: int) -> None:
        blocks = spans(boundaries, len(backbone.blocks))
        nets = [stage_net(backbone, boundaries, number) for number in range(len(blocks))]
        super().__init__(nets, blocks, packets_of(backbone, blocks, batch_size))
        self.microbatches = microbatches

    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor:
        assert images is not None, "needs_images"
        assert labels is not None, "needs_labels"
        losses = []
        for some, theirs in zip(images.chunk(self.microbatches), labels.chunk(self.microbatches), strict=True):
            entered: list[Tensor] = []
            left: list[Tensor] = []
            for net, phases in zip(self.parts, self.phases, strict=True):
                with phases.forward.running():
                    entered.append(left[-1].detach().requires_grad_() if left else some)
                    left.append(net(entered[-1]))
            with self.phases[-1].forward.running():
                left[-1] = F.cross_entropy(left[-1], theirs) / self.microbatches
            gradient = None
            losses.append(left[-1].detach())
            for phases in reversed(self.phases):
                with phases.backward.running():
                    left.pop().backward(gradient)  # type: ignore[no-untyped-call]
                    gradient = entered.pop().grad
        self.update()
        return torch.stack(losses).sum()


# End to end, as a pipeline ---------------------------------------------------------------------------------------


class TimedStage(PipelineStage):
    """A stage whose computing is timed; waiting for others is outside of these calls."""

    phases: Phases

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.forward.running():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self.phases.backward.running():
            super().backward_one_chunk(*args, **kwargs)

    def scale_grads(self, *args: Any, **kwargs: Any) -> None:
        with self.phases.update.running():
            super().scale_grads(*args, **kwargs)


class Pipelined(Worker):
    """One stage of an end-to-end pipeline."""

    def __init__(
        self,
        backbone: Backbone,
        boundaries: Boundaries,
        *,
        rank: int,
        batch_size: int,
        microbatches: int,
        schedule: str,
    ) -> None:
        num_stages = len(boundaries) + 1
        is_first, is_last = rank == 0, rank == num_stages - 1
        blocks = spans(boundaries, len(backbone.blocks))
        packets = packets_of(backbone, blocks, batch_size)
        super().__init__([stage_net(backbone, boundaries, rank)], [blocks[rank]], [packets[rank]])
        self.needs_images, self.needs_labels = is_first, is_last
        size = batch_size // microbatches
        edges = (0, *boundaries, len(backbone.blocks))
        entering, leaving = ((size, *backbone.layouts[edge].shape) for edge in (edges[rank], edges[rank + 1]))
        inputs = example((size, *backbone.input_size) if is_first else entering, requires_grad=not is_first)
        outputs = example((size, backbone.num_classes) if is_last else leaving, requires_grad=True)
        self.sent_bytes = packets[rank] + (0 if is_first else packets[rank - 1])  # features there, gradients back
        stage = TimedStage(self.parts[0], rank, num_stages, CPU, input_args=inputs, output_args=outputs)
        stage.phases = self.phases[0]
        kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[schedule]
        self.schedule = kind(stage, microbatches, loss_fn=self.loss)  # the API's mean of means

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        with self.phases[0].forward.running():
            return F.cross_entropy(logits, labels)

    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor | None:
        losses: list[Tensor] = []
        given = () if images is None else (images,)
        self.schedule.step(*given, target=labels, losses=losses, return_outputs=False)
        self.update()
        return torch.stack(losses).detach().mean() if losses else None


class Contiguous(nn.Module):
    """What is sent lies in one piece."""

    def forward(self, features: Tensor) -> Tensor:
        return features.contiguous()


def stage_net(backbone: Backbone, boundaries: Boundaries, rank: int) -> nn.Sequential:
    """The run of blocks between two boundaries, with the stem or the tail at the ends."""
    span = spans(boundaries, len(backbone.blocks))[rank]
    parts: list[nn.Module] = [backbone.stem] if rank == 0 else []
    parts += [backbone.blocks[index] for index in span]
    parts.append(backbone.tail if rank == len(boundaries) else Contiguous())
    return nn.Sequential(*parts)


def example(shape: tuple[int, ...], *, requires_grad: bool) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=requires_grad)


def packets_of(backbone: Backbone, blocks: Sequence[range], batch_size: int) -> list[int]:
    """Bytes of the features that each run of blocks gives to the next one; nothing for the last."""
    ends = [run.stop for run in blocks]
    return [4 * batch_size * math.prod(backbone.layouts[end].shape) for end in ends[:-1]] + [0]


# Local modules ---------------------------------------------------------------------------------------------------


class LocalModules(Worker):
    """localgrad's local modules: all of them in one process, or this rank's share."""

    def __init__(self, learner: LocalLearner, batch_size: int) -> None:
        learner.configure_optimizers(adamw)
        packets = packets_of(learner.backbone, learner.plan.spans, batch_size)
        packets = [size + 2 * 8 * batch_size if size else 0 for size in packets]  # labels, as they are and as indices
        own = learner.own
        super().__init__(
            [learner.modules[index] for index in own],
            [learner.plan.spans[index] for index in own],
            packets[own.start : own.stop],
            learner.optimizers,
        )
        self.learner = learner
        self.batch_size = batch_size
        for part, optimizer, phases in zip(self.parts, self.optimizers, self.phases, strict=True):
            watch(part, optimizer, phases, lambda: self.waited_seconds)

    @property
    def waited_seconds(self) -> float:
        """Seconds that this process has waited for others."""
        return 0.0

    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor | None:
        assert images is not None, "needs_images"
        assert labels is not None, "needs_labels"
        return self.learner.step(images, labels).losses[-1]

    def estimate(self) -> int | None:
        return estimate_step(self.learner, self.batch_size, adamw).peak_bytes


class LocalShare(LocalModules):
    """One rank's local modules."""

    learner: ParallelLearner

    def __init__(self, learner: ParallelLearner, batch_size: int) -> None:
        super().__init__(learner, batch_size)
        place, links = learner.team.place, learner.links
        self.needs_images = self.needs_labels = place.before is None
        self.sent_bytes = self.packets[-1]
        # A batch may be sent when the one num_buffers before it was asked for, and that is num_buffers - 1 ahead.
        self.lead = (2 * links.num_buffers - 1) * (place.num_ranks - 1)
        self.profiled = links.num_buffers + 1
        self.clock = Stopwatch()

    def begin(self, num_steps: int) -> None:
        self.learner.begin(num_steps)

    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor | None:
        with self.clock.running():
            batch = None if labels is None else LocalBatch(images, labels)
            result = self.learner.share(batch)
        return result.losses[-1] if result.logits is not None else None

    def finish(self) -> None:
        self.learner.links.finish()
        sender = self.learner.links.sender
        assert sender is None or sender.packet_bytes == self.sent_bytes, "packets are features and labels"

    @property
    def waited_seconds(self) -> float:
        return self.learner.links.waited_seconds

    @property
    def busy_seconds(self) -> float:
        return self.clock.seconds - self.waited_seconds

    def holds(self) -> list[Held]:
        """With the buffers, but without what is sent: the profiled steps send as much anew, and see that."""
        receiver = self.learner.links.receiver
        return [
            *super().holds(),
            *(tensor for slots in ([] if receiver is None else receiver._ring) for tensor in slots),
        ]

    def estimate(self) -> int | None:
        return estimate_share(self.learner, self.batch_size, adamw).peak_bytes


def watch(part: nn.Module, optimizer: Optimizer, phases: Phases, waited: Callable[[], float]) -> None:
    """Have a local module's phases timed: its forward pass by hooks, its update by hooks, its backward between.

    Args:
        part: the module.
        optimizer: its own.
        phases: what is added to.
        waited: seconds that this process has waited for others; what it waits while it hands features on is left out.
    """
    now = waited_before = 0.0

    def at(stopwatch: Stopwatch | None, left_out: float = 0.0) -> None:
        nonlocal now
        before, now = now, time.perf_counter()
        if stopwatch is not None:
            stopwatch.seconds += now - before - left_out

    def end_forward(*_: Any) -> None:
        nonlocal waited_before
        at(phases.forward)
        waited_before = waited()

    part.register_forward_pre_hook(lambda *_: at(None))
    part.register_forward_hook(end_forward)
    optimizer.register_step_pre_hook(lambda *_: at(phases.backward, waited() - waited_before))
    optimizer.register_step_post_hook(lambda *_: at(phases.update))


def objective_of(options: argparse.Namespace) -> Objective:
    """Feature reconstruction, with the auxiliary nets asked for."""
    nets = {name: getattr(options, name) for name in ("classifier", "decoder")}
    return FeatureReconstruction(**{name: value for name, value in nets.items() if value is not None})


def worker_for(options: argparse.Namespace, backbone: Backbone, boundaries: Boundaries, rank: int) -> Worker:
    """The worker of a method: the one place to add another."""
    batch = {"batch_size": options.batch_size, "microbatches": options.microbatches}
    match options.method:
        case "none":
            return Alone(backbone)
        case "parts":
            return Alone(backbone, microbatches=options.microbatches)
        case "stages-one":
            return StagesAlone(backbone, boundaries, **batch)
        case "local-one":
            learner = LocalLearner(backbone, modules=boundaries, objective=objective_of(options))
            return LocalModules(learner, options.batch_size)
        case "local":
            team = Team.join(device=CPU)
            return LocalShare(
                ParallelLearner(backbone, team=team, modules=boundaries, objective=objective_of(options)),
                options.batch_size,
            )
        case _:
            return Pipelined(backbone, boundaries, rank=rank, schedule=options.method, **batch)
