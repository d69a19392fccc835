"""End-to-end training as a pipeline (torch.distributed.pipelining): what local modules are held to.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/pipelining.py --method 1f1b
    python benchmarks/pipelining.py --method none                        # one process, one thread
    python benchmarks/pipelining.py --compare 1f1b gpipe --ranks 2       # all of them in turns, as ratios to none

One process a stage on gloo, each with one thread. A stage is a run of the blocks that ``localgrad.split`` gives, with
the stem or the tail at the ends, and has its own AdamW. Random images, the same few batches in turn, fp32. Drop path
is off (unless asked for), so that the losses of all methods are the same to rounding.

What is measured, in every process, of each step after the warm-up:

* its seconds on the wall. Nobody waits for the others between steps, so a method may begin a batch early;
* how many of them it was *busy*: in forward, loss, backward, optimizer. The rest is the *bubble*: waiting, sending,
  receiving, and the schedule's own Python. Where processes share cores, being busy takes longer, so the bubble reads
  too small: run no more processes than there are cores. ``processor_seconds`` are of all threads, gloo's among them;
* peak memory: resident in the process (``VmHWM``, reset once everything is built; Python and libraries are in it, so
  ``resident_start_bytes`` stands beside it), and of tensors, in one more step (``localgrad.comparing.measuring``).

A method's step time is the median of its slowest process. Ratios are to ``none`` of the same repeat.

What torch.distributed.pipelining (2.15) asks for, and what follows:

* **Microbatches of one shape.** Buffers are allocated for the shape of the first; so the batch must be divisible. 1F1B
  wants at least as many microbatches as stages. Batch norms and stochastic layers see microbatches.
* **The loss is a mean of means.** The schedule backpropagates each microbatch's mean loss and divides the gradients by
  their number afterwards (``scale_grads``), in one pass over all of them. It is the whole batch's mean to rounding.
* **Example tensors must say ``requires_grad``.** With ``input_args`` and ``output_args`` (on the meta device) a stage
  knows its buffers; without, the first step runs forward and backward once more to find out. But the examples' flag
  decides whether a gradient crosses the boundary. Where only the receiving stage's example lacks it, the stage before
  waits for ever; where both do, autograd fails.
* **Tensors on the wire are contiguous**, or gloo refuses the send; a stage ends in ``contiguous()``.
* **All or nothing of the batch.** The first stage is given the images, the last one the labels, the others nothing;
  ``step()`` takes whatever comes and splits it. Losses come back in a list that is empty in all other processes.
* **No hook around a backward pass**, so its time is taken in a subclass of ``PipelineStage``, of calls that have
  public names but no documentation (``forward_one_chunk``, ``backward_one_chunk``, ``scale_grads``). Waiting for others
  is outside of them.
* **One send and one receive wait for each other.** 1F1B sends features and receives a gradient as one batch, and waits
  for both before it goes on. That is part of its bubble.

Another method is one more ``Worker`` in ``worker_for``; all else here is common to all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import datetime
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipelining_report import FORMAT, Report, Share, as_table, rows_of
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.optim import AdamW, Optimizer

from localgrad.backbone import Backbone, split
from localgrad.comparing.measuring import Held, peak_of
from localgrad.errors import LocalgradError, RecipeError
from localgrad.learner import activation_bytes, default_input_size
from localgrad.partition import Boundaries, balance, check_boundaries, spans

ALONE = ("none", "parts")
METHODS = (*ALONE, "1f1b", "gpipe")
NUM_BATCHES = 2
"""Different batches, made before training; step t trains on batch t modulo this."""
LEARNING_RATE = 1e-4
CPU = torch.device("cpu")


# Workers ---------------------------------------------------------------------------------------------------------


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


class Worker(ABC):
    """One process's share of the training, whatever the method.

    Attributes:
        net: what is trained here; its parameters are the model's own.
        optimizer: of its parameters.
        busy: runs while this process computes.
        needs_images: whether ``step`` is to be given the images.
        needs_labels: and the labels.
        sent_bytes: what it sends a step, to all others.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.train()
        self.optimizer: Optimizer = AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        self.busy = Stopwatch()
        self.needs_images = self.needs_labels = True
        self.sent_bytes = 0

    @abstractmethod
    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """Train on one batch.

        Args:
            images: [B, C, H, W]; ``None`` unless they are needed here.
            labels: [B], likewise.

        Returns:
            The batch's mean task loss before the update, in the process that knows it; ``None`` in the others.
        """

    @property
    def busy_seconds(self) -> float:
        """Seconds spent computing since the worker was made."""
        return self.busy.seconds

    def holds(self) -> list[Held]:
        """What is alive between steps, for the count of tensors."""
        return [self.net, self.optimizer]

    def update(self) -> None:
        with self.busy.running():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Alone(Worker):
    """The plain loop in one process; by option over the batch's parts one after another, with one update."""

    def __init__(self, model: nn.Module, *, parts: int = 1) -> None:
        super().__init__(model)
        self.parts = parts

    def step(self, images: Tensor | None, labels: Tensor | None) -> Tensor:
        assert images is not None, "needs_images"
        assert labels is not None, "needs_labels"
        losses = []
        with self.busy.running():
            for some, theirs in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True):
                loss = F.cross_entropy(self.net(some), theirs) / self.parts
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
        self.update()
        return torch.stack(losses).sum()


class TimedStage(PipelineStage):
    """A stage whose computing is timed; waiting for others is outside of these calls."""

    busy: Stopwatch

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.busy.running():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self.busy.running():
            super().backward_one_chunk(*args, **kwargs)

    def scale_grads(self, *args: Any, **kwargs: Any) -> None:
        with self.busy.running():
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
        super().__init__(stage_net(backbone, boundaries, rank))
        self.needs_images, self.needs_labels = is_first, is_last
        size = batch_size // microbatches
        edges = (0, *boundaries, len(backbone.blocks))
        entering, leaving = ((size, *backbone.layouts[edge].shape) for edge in (edges[rank], edges[rank + 1]))
        inputs = example((size, *backbone.input_size) if is_first else entering, requires_grad=not is_first)
        outputs = example((size, backbone.num_classes) if is_last else leaving, requires_grad=True)
        self.sent_bytes = 4 * microbatches * (math.prod(entering) * (not is_first) + math.prod(leaving) * (not is_last))
        stage = TimedStage(self.net, rank, num_stages, CPU, input_args=inputs, output_args=outputs)
        stage.busy = self.busy
        kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[schedule]
        self.schedule = kind(stage, microbatches, loss_fn=self.loss)  # the API's mean of means

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        with self.busy.running():
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


def worker_for(options: argparse.Namespace, backbone: Backbone, boundaries: Boundaries, rank: int) -> Worker:
    """The worker of a method: the one place to add another."""
    if options.method in ALONE:
        return Alone(backbone.model, parts=options.microbatches if options.method == "parts" else 1)
    return Pipelined(
        backbone,
        boundaries,
        rank=rank,
        batch_size=options.batch_size,
        microbatches=options.microbatches,
        schedule=options.method,
    )


# One process of a run --------------------------------------------------------------------------------------------


class Built(NamedTuple):
    """What is left in one process once the model is built; the whole model is gone."""

    worker: Worker
    boundaries: Boundaries
    blocks: range
    input_size: tuple[int, int, int]
    weights: dict[str, Tensor]
    """The share's weights by their names in the plain model."""


def build(options: argparse.Namespace, rank: int, ranks: int) -> Built:
    """Build the model everywhere, from the same seed, and keep this process's share of it."""
    torch.manual_seed(options.seed)
    sizes = {"img_size": options.img_size} if options.img_size else {}
    settings = {"num_classes": options.num_classes, "drop_path_rate": 0.0, **sizes, **options.model_options}
    model = timm.create_model(options.model, **settings)
    backbone = split(model, default_input_size(model)).train()
    boundaries = agree(lambda: choose_boundaries(options, backbone, ranks), ranks)
    backbone.check_boundaries(boundaries)
    torch.manual_seed(options.seed + rank)
    worker = worker_for(options, backbone, boundaries, rank)
    own = {id(tensor) for tensor in (*worker.net.parameters(), *worker.net.buffers())}
    weights = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) in own}
    return Built(worker, boundaries, spans(boundaries, len(backbone.blocks))[rank], backbone.input_size, weights)


def agree(decide: Callable[[], Boundaries], ranks: int) -> Boundaries:
    """What rank 0 decides, in all processes; what it refuses, all refuse."""
    told: list[Any] = [None]
    if ranks == 1 or dist.get_rank() == 0:
        try:
            told = [decide()]
        except LocalgradError as error:
            told = [error]
    if ranks > 1:
        dist.broadcast_object_list(told)
    if isinstance(told[0], LocalgradError):
        raise told[0]
    boundaries: Boundaries = told[0]
    return boundaries


def choose_boundaries(options: argparse.Namespace, backbone: Backbone, ranks: int) -> Boundaries:
    """As asked for, or balanced over the blocks."""
    if options.boundaries is not None:
        boundaries = check_boundaries(options.boundaries, len(backbone.blocks))
        if len(boundaries) != ranks - 1:
            raise RecipeError(
                f"boundaries: {list(boundaries)} make {len(boundaries) + 1} stages, but there are {ranks} processes; "
                f"give {ranks - 1} of them, or --balance time."
            )
        return boundaries
    if ranks == 1:
        return ()
    if options.balance == "memory":  # of one batch in flight; 1F1B keeps more of them the earlier the stage
        return balance(activation_bytes(backbone), ranks)
    images = torch.randn(options.batch_size // options.microbatches, *backbone.input_size)
    return balance([round(1e6 * seconds) for seconds in block_seconds(backbone, images)], ranks)


def block_seconds(backbone: Backbone, images: Tensor, *, repeats: int = 3) -> list[float]:
    """Forward and backward of each block, least of a few; the stem counts to the first, the tail to the last."""
    backbone = copy.deepcopy(backbone)  # gradients and batch statistics stay away from the weights that are trained
    parts = [backbone.stem, *backbone.blocks, backbone.tail]
    least = [math.inf] * len(parts)
    for _ in range(repeats):
        features = images
        for number, part in enumerate(parts):
            clock = Stopwatch()
            inputs = features.detach().requires_grad_(number > 0)
            with clock.running():
                features = part(inputs)
                features.backward(torch.ones_like(features))
            least[number] = min(least[number], clock.seconds)
    stem, *blocks, tail = least
    blocks[0] += stem
    blocks[-1] += tail
    return blocks


Batch = tuple[Tensor | None, Tensor | None]


def batches_for(worker: Worker, options: argparse.Namespace, size: tuple[int, int, int]) -> list[Batch]:
    """Of each batch what the worker needs. Made before training, as functions of seed and number alone."""
    made: list[Batch] = []
    for number in range(NUM_BATCHES):
        generator = torch.Generator().manual_seed(options.seed * NUM_BATCHES + number)
        labels = torch.randint(options.num_classes, (options.batch_size,), generator=generator)
        images = torch.randn(options.batch_size, *size, generator=generator) if worker.needs_images else None
        made.append((images, labels if worker.needs_labels else None))
    return made


def train(options: argparse.Namespace, rank: int, ranks: int) -> Report | None:
    """Train and measure; the report is rank 0's."""
    built = build(options, rank, ranks)
    worker = built.worker
    batches = batches_for(worker, options, built.input_size)
    if ranks > 1:
        dist.barrier()
    resident_start = restart_resident_peak()
    losses, figures = steps(worker, batches, options.warmup + options.steps)
    resident_peak = resident_peak_bytes()
    if options.weights is not None:
        weights = {name: value.detach().contiguous() for name, value in built.weights.items()}
        save_file(weights, options.weights / f"{rank}.safetensors")
    held = [*worker.holds(), *(tensor for batch in batches for tensor in batch if tensor is not None)]
    tensor_peak, _ = peak_of(lambda: worker.step(*batches[0]), CPU, held)
    walls, busy, processor = zip(*figures[options.warmup :], strict=True)
    share = Share(
        rank=rank,
        blocks=(built.blocks.start, built.blocks.stop),
        num_parameters=sum(parameter.numel() for parameter in worker.net.parameters()),
        sent_bytes=worker.sent_bytes,
        step_seconds=walls,
        busy_seconds=busy,
        processor_seconds=processor,
        resident_start_bytes=resident_start,
        resident_peak_bytes=resident_peak,
        tensor_peak_bytes=tensor_peak,
    )
    found = gathered((share, losses), ranks)
    if rank > 0:
        return None
    return Report(
        method=options.method,
        model=options.model,
        image_size=built.input_size,
        batch_size=options.batch_size,
        microbatches=1 if options.method == "none" else options.microbatches,
        ranks=ranks,
        threads=options.threads,
        boundaries=built.boundaries,
        balanced_by=options.balance if options.boundaries is None else "given",
        seed=options.seed,
        steps=options.steps,
        warmup=options.warmup,
        losses=tuple(next(losses for _, losses in found if losses)),
        shares=tuple(share for share, _ in found),
        about=circumstances(),
    )


def steps(worker: Worker, batches: list[Batch], count: int) -> tuple[list[float], list[tuple[float, float, float]]]:
    """Train so many steps.

    Returns:
        The losses that are known here; seconds of each step on the wall, computing, and of the processor.
    """
    losses, figures = [], []
    for number in range(count):
        busy, processor, wall = worker.busy_seconds, time.process_time(), time.perf_counter()
        loss = worker.step(*batches[number % len(batches)])
        now = time.perf_counter()
        figures.append((now - wall, worker.busy_seconds - busy, time.process_time() - processor))
        if loss is not None:
            losses.append(loss.item())
    return losses, figures


def gathered(mine: Any, ranks: int) -> list[Any]:
    """What all processes have, in rank 0; nothing elsewhere."""
    if ranks == 1:
        return [mine]
    found: list[Any] = [None] * ranks
    dist.gather_object(mine, found if dist.get_rank() == 0 else None)
    return found


def circumstances() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "processors": os.cpu_count(),
        "load": os.getloadavg(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def restart_resident_peak() -> int:
    """Let the peak begin anew where Linux lets us, and give what is resident now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what freed tensors left in the C library's hands
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _of_status("VmRSS")


def resident_peak_bytes() -> int:
    return _of_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _of_status(name: str) -> int:
    """A figure of /proc/self/status in bytes, 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


# The methods in turns --------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> list[list[Report]]:
    """Run all methods in each repeat, in an order that rotates, each in processes of its own."""
    methods = ["none", *(method for method in options.compare if method != "none")]
    boundaries: dict[str, tuple[int, ...]] = {}  # measured once, then kept
    found: list[list[Report]] = []
    for repeat in range(options.repeats):
        shift = repeat % len(methods)
        reports: dict[str, Report] = {}
        for method in methods[shift:] + methods[:shift]:
            print(f"repeat {repeat + 1} of {options.repeats}: {method}", file=sys.stderr, flush=True)
            reports[method] = started(options, method, boundaries.get(method, options.boundaries))
            boundaries[method] = reports[method].boundaries
        found.append([reports[method] for method in methods])
    return found


def started(options: argparse.Namespace, method: str, boundaries: tuple[int, ...] | None) -> Report:
    """Run one method in processes of its own and read its report."""
    ranks = 1 if method in ALONE else options.ranks
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    arguments = ["--method", method, *passed_on(options)]
    if ranks > 1 and boundaries is not None:
        arguments += ["--boundaries", ",".join(map(str, boundaries))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [sys.executable, *launch, __file__, *arguments, "--json", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
        return Report.from_dict(json.loads(path.read_text()))


class RunFailed(LocalgradError, RuntimeError):  # noqa: N818  # what happened
    """The processes of one method ended otherwise than with a report."""


def passed_on(options: argparse.Namespace) -> list[str]:
    """The options that all methods are run with."""
    names = ("model", "num_classes", "batch_size", "microbatches", "balance", "threads", "steps", "warmup", "seed")
    arguments = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    arguments += ["--model-options", json.dumps(options.model_options)]
    if options.img_size:
        arguments += ["--img-size", str(options.img_size)]
    return arguments


# The command -----------------------------------------------------------------------------------------------------


def boundaries_of(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", "--schedule", choices=METHODS, default="1f1b", help="parts: none, in microbatches")
    parser.add_argument("--compare", nargs="+", choices=METHODS, help="run these and none in turns")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each method, with --compare")
    parser.add_argument("--repeats", type=int, default=3, help="turns, with --compare")
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--model-options", type=json.loads, default={}, help="JSON, for timm.create_model")
    parser.add_argument("--img-size", type=int, help="by default the model's own")
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--boundaries", type=boundaries_of, help="first block of every stage but the first: 3,7")
    parser.add_argument("--balance", choices=("time", "memory"), default="time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--weights", type=Path, help="a folder that gets each process's weights after training")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace, ranks: int) -> None:
    """Refuse what can't be run.

    Raises:
        RecipeError: the message says what to type instead.
    """
    for name in ("steps", "batch_size", "microbatches", "threads", "repeats"):
        if getattr(options, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    if options.batch_size % options.microbatches:
        raise RecipeError(
            f"--batch-size {options.batch_size} doesn't divide into {options.microbatches} microbatches; their buffers "
            "have one shape."
        )
    methods = options.compare or [options.method]
    if "1f1b" in methods and options.microbatches < ranks:
        raise RecipeError(f"1f1b: at least one microbatch a stage; --microbatches {ranks}, say.")
    if not options.compare and options.method in ALONE and ranks > 1:
        raise RecipeError(f"--method {options.method} is one process, but there are {ranks}; run it without torchrun.")


def main() -> None:
    options = parse()
    rank, launched = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        check(options, options.ranks if options.compare else launched)
        if options.compare:
            written, text = compared(options)
        else:
            report = run(options, rank, launched)
            if report is None:
                return
            written, text = report.to_dict(), str(report)
    except LocalgradError as error:
        if rank == 0:
            print(f"pipelining: {error}", file=sys.stderr)
        sys.exit(2)
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps(written, indent=1) + "\n")


def compared(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    reports = compare(options)
    rows = rows_of(reports)
    written = {
        "format": FORMAT,
        "about": circumstances(),
        "rows": [asdict(row) for row in rows],
        "repeats": [[report.to_dict() for report in repeat] for repeat in reports],
    }
    return written, as_table(rows)


def run(options: argparse.Namespace, rank: int, ranks: int) -> Report | None:
    """One process of one method."""
    torch.set_num_threads(options.threads)
    if ranks == 1:
        return train(options, rank, ranks)
    dist.init_process_group("gloo")
    try:
        return train(options, rank, ranks)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
