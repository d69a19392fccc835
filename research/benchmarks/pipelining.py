"""Local modules and end-to-end pipelines (torch.distributed.pipelining) on several processes, side by side.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/pipelining.py --method local
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/pipelining.py --method 1f1b
    python research/benchmarks/pipelining.py --method none                            # one process, one thread
    python research/benchmarks/pipelining.py --compare local local-one 1f1b gpipe --ranks 2 --simulate

========== ========= =============================================================================================
method     processes
========== ========= =============================================================================================
none       one       end to end, the plain loop: what ratios are to
parts      one       the same over microbatches
stages-one one       the same, stage by stage: the pipelines' stages, in one process
1f1b gpipe R         end to end, torch.distributed.pipelining, a stage a process
local-one  one       local modules, one after another (``LocalLearner``)
local      R         the same local modules, shared among the processes (``ParallelLearner``)
========== ========= =============================================================================================

Processes talk over gloo, each has one thread. A stage or a local module is a run of the blocks that ``localgrad.split``
gives, with the stem or the tail at the ends, and has its own AdamW. Random images, the same few batches in turn, fp32.
Drop path is off (unless asked for), so that the losses of all end-to-end methods are the same to rounding. Local
modules are trained by feature reconstruction with its default nets or ``--classifier`` and ``--decoder``; there are as
many as processes, or ``--modules``, and the losses of local and local-one are the same bit for bit.

What is measured, in every process, of each step after the warm-up:

* its seconds on the wall. Nobody waits for the others between steps, so a method may begin a batch early. A method's
  step time, which its images/s and all ratios are made of, is the time of the last process from its last warm-up step's
  end to its last timed step's, divided by the timed steps. There is no filling in it (that is in the warm-up), and no
  draining: where the first process may be ahead by some batches, all train on as many more. Ratios are to ``none`` of
  the same repeat, for local beside that to ``local-one``;
* how many of them it was *busy*. The rest is the *bubble*. End to end: busy in forward, loss, backward, optimizer, so
  that waiting, sending, receiving, and the schedule's own Python are the bubble. Local: all but waiting for another
  process, as the engine counts it; sending and Python are busy, which makes the bubble smaller, by what the phases of
  its modules leave. Where processes share cores, being busy takes longer, so the bubble reads too small.
  ``processor_seconds`` are of all threads, gloo's among them;
* seconds of each part (stage or local module): forward with loss, backward, update. In the file they are as
  ``research/benchmarks/speed_up.py`` reads them, and ``--times`` writes nothing else;
* peak memory: resident in the process (``VmHWM``, reset once everything is built; Python and libraries are in it, so
  ``resident_start_bytes`` stands beside it), and of tensors, in one more step (``localgrad.compare.measuring``): with
  the batch in use, buffers for batches to come and batches not yet taken. localgrad's estimate of it stands beside it.

``--balance time`` measures forward and backward of each block in one process while the others wait. For stages, it is
of a microbatch and without the optimizer. For local modules, it is of the whole batch, with the auxiliary nets and all
updates, so that the slowest module is as fast as it can be. With --compare, all pipelines keep the boundaries that the
first one found, and so do local and local-one.

``--simulate`` holds our simulators (``simulation/simulator.py``) against this: images/s that they predict for
local, 1f1b and gpipe from seconds measured *alone* (each part in one process, local-one or stages-one of the same
repeat), and from those measured *in the run* itself. The first tells whether the speed of R processes can be told from
one; the second whether the schedule is understood, apart from what processes do to each other. Links are taken as free
of cost. Where R processes share fewer cores, ``--pin`` is asked for: rank r is kept on core r x cores / R, and
``simulation/shared_cores.py`` lets ranks that could compute at the same moment on a core each run at an n-th of its
speed. Changing between them costs nothing there, and work is no slower beside other work (memory, caches), so expect it
to predict a little too much. For R > cores only seconds measured alone are used, since those of a run count the time
that the other rank of a core had.

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

Another method is one more ``Worker`` in pipelining_workers.py; all else here is common to all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
from pipelining_boundaries import choose_boundaries
from pipelining_report import FORMAT, Part, Report, Share, as_table, rows_of
from pipelining_simulated import as_lines, simulated, simulator_is_here
from pipelining_workers import ALONE, CPU, LOCAL, METHODS, WHOLE, Worker, objective_of, worker_for
from safetensors.torch import save_file
from torch import Tensor

from localgrad.backbones.base import split
from localgrad.backbones.timm_models import default_input_size
from localgrad.compare.measuring import Held, peak_of
from localgrad.errors import LocalgradError, RecipeError
from localgrad.partition import Boundaries

NUM_BATCHES = 2
"""Different batches, made before training; step t trains on batch t modulo this."""
TIMED_ALONE = {"local": "local-one", "1f1b": "stages-one", "gpipe": "stages-one"}
"""By method, where the seconds of its parts are measured in one process."""
BOUNDARIES_OF = {"local-one": "local", "gpipe": "1f1b", "stages-one": "1f1b"}
"""Methods that have the boundaries of another one, in a comparison."""


# One process of a run --------------------------------------------------------------------------------------------


class Built(NamedTuple):
    """What is left in one process once the model is built; the whole model is gone, unless it is trained here."""

    worker: Worker
    boundaries: Boundaries
    input_size: tuple[int, int, int]
    weights: dict[str, Tensor]
    """The share's weights by their names in the plain model."""


def num_parts(options: argparse.Namespace, ranks: int) -> int:
    """Stages or local modules of a method on so many processes."""
    if options.method in WHOLE:
        return 1
    wanted = options.ranks if ranks == 1 and options.method in ALONE else ranks
    return options.modules or wanted if options.method in LOCAL else wanted


def build(options: argparse.Namespace, rank: int, ranks: int) -> Built:
    """Build the model everywhere, from the same seed, and keep this process's share of it."""
    torch.manual_seed(options.seed)
    sizes = {"img_size": options.img_size} if options.img_size else {}
    settings = {"num_classes": options.num_classes, "drop_path_rate": 0.0, **sizes, **options.model_options}
    model = timm.create_model(options.model, **settings)
    backbone = split(model, default_input_size(model)).train()
    count = num_parts(options, ranks)
    boundaries = agree(lambda: choose_boundaries(options, backbone, count), ranks)
    backbone.check_boundaries(boundaries)
    # Local modules draw the same auxiliary nets everywhere; stages have nothing to draw but what is random in a step.
    torch.manual_seed(options.seed + (0 if options.method in LOCAL else rank))
    worker = worker_for(options, backbone, boundaries, rank)
    own = {id(tensor) for part in worker.parts for tensor in (*part.parameters(), *part.buffers())}
    weights = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) in own}
    return Built(worker, boundaries, backbone.input_size, weights)


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
    worker.begin(options.warmup + options.steps + worker.lead + worker.profiled)
    losses = steps(worker, batches, range(options.warmup)).losses
    before = [phases.seconds for phases in worker.phases]
    start = time.perf_counter()
    timed = steps(worker, batches, range(options.warmup, options.warmup + options.steps))
    span = time.perf_counter() - start
    parts = tuple(parts_of(worker, before, options.steps))
    resident_peak = resident_peak_bytes()
    if options.weights is not None:
        weights = {name: value.detach().contiguous() for name, value in built.weights.items()}
        save_file(weights, options.weights / f"{rank}.safetensors")
    steps(worker, batches, range(worker.lead))  # the others may still be timing theirs

    def last_steps() -> None:
        for _ in range(worker.profiled):
            worker.step(*batches[0])
        worker.finish()  # what is on its way while the profiler stops makes it write where it must not

    tensor_peak, _ = peak_of(last_steps, CPU, alive(worker, batches[0]))
    share = Share(
        rank=rank,
        blocks=(worker.blocks[0].start, worker.blocks[-1].stop),
        num_parameters=sum(parameter.numel() for part in worker.parts for parameter in part.parameters()),
        sent_bytes=worker.sent_bytes,
        parts=parts,
        span_seconds=span,
        step_seconds=timed.walls,
        busy_seconds=timed.busy,
        processor_seconds=timed.processor,
        resident_start_bytes=resident_start,
        resident_peak_bytes=resident_peak,
        tensor_peak_bytes=tensor_peak,
        estimated_bytes=worker.estimate(),
    )
    found = gathered((share, losses + timed.losses), ranks)
    if rank > 0:
        return None
    objective = objective_of(options)
    return Report(
        method=options.method,
        model=options.model,
        image_size=built.input_size,
        batch_size=options.batch_size,
        microbatches=1 if options.method in ("none", *LOCAL) else options.microbatches,
        ranks=ranks,
        threads=options.threads,
        cores=options.cores,
        pinned=options.pin,
        boundaries=built.boundaries,
        balanced_by=options.balance if options.boundaries is None else "given",
        objective=f"{objective.classifier}, {objective.decoder}" if options.method in LOCAL else "",
        seed=options.seed,
        steps=options.steps,
        warmup=options.warmup,
        losses=tuple(next(losses for _, losses in found if losses)),
        shares=tuple(share for share, _ in found),
        about=circumstances(),
    )


class Steps(NamedTuple):
    """Losses that are known here; seconds of each step on the wall, computing, and of the processor."""

    losses: list[float]
    walls: tuple[float, ...]
    busy: tuple[float, ...]
    processor: tuple[float, ...]


def steps(worker: Worker, batches: list[Batch], numbers: range) -> Steps:
    """Train the steps of these numbers."""
    losses, figures = [], []
    for number in numbers:
        busy, processor, wall = worker.busy_seconds, time.process_time(), time.perf_counter()
        loss = worker.step(*batches[number % len(batches)])
        now = time.perf_counter()
        figures.append((now - wall, worker.busy_seconds - busy, time.process_time() - processor))
        if loss is not None:
            losses.append(loss.item())
    return Steps(losses, *(tuple(figure[place] for figure in figures) for place in range(3)))


def parts_of(worker: Worker, before: list[tuple[float, ...]], count: int) -> Iterator[Part]:
    """Mean seconds of each part over so many steps, which began with these sums."""
    for part, blocks, packet, phases, old in zip(
        worker.parts, worker.blocks, worker.packets, worker.phases, before, strict=True
    ):
        forward, backward, update = ((now - then) / count for now, then in zip(phases.seconds, old, strict=True))
        weights = [weight for weight in part.parameters() if weight.requires_grad]
        yield Part(
            forward=forward,
            backward=backward,
            update=update,
            sent_bytes=packet,
            gradient_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            num_blocks=len(blocks),
        )


def alive(worker: Worker, batch: Batch) -> Iterator[Held]:
    """What is alive between steps. One by one: a list would keep alive what the step lets go."""
    yield from worker.holds()
    yield from (tensor for tensor in batch if tensor is not None)


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
    if options.simulate:
        methods += [TIMED_ALONE[method] for method in methods if method in TIMED_ALONE]
    methods = list(dict.fromkeys(methods))
    boundaries: dict[str, tuple[int, ...]] = {}  # measured once, then kept
    found: list[list[Report]] = []
    for repeat in range(options.repeats):
        shift = repeat % len(methods)
        reports: dict[str, Report] = {}
        for method in methods[shift:] + methods[:shift]:
            print(f"repeat {repeat + 1} of {options.repeats}: {method}", file=sys.stderr, flush=True)
            family = BOUNDARIES_OF.get(method, method)
            reports[method] = started(options, method, boundaries.get(family, options.boundaries))
            boundaries[family] = reports[method].boundaries
        found.append([reports[method] for method in methods])
    return found


def started(options: argparse.Namespace, method: str, boundaries: tuple[int, ...] | None) -> Report:
    """Run one method in processes of its own and read its report."""
    ranks = 1 if method in ALONE else options.ranks
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    arguments = ["--method", method, *passed_on(options)]
    if method not in WHOLE and boundaries is not None:
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
    names += ("ranks", "modules", "img_size", "classifier", "decoder")
    given = [(name, getattr(options, name)) for name in names]
    arguments = [
        text for name, value in given if value is not None for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [*arguments, "--model-options", json.dumps(options.model_options), *(["--pin"] * options.pin)]


# The command -----------------------------------------------------------------------------------------------------


def boundaries_of(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", "--schedule", choices=METHODS, default="1f1b")
    parser.add_argument("--compare", nargs="+", choices=METHODS, help="run these and none in turns")
    parser.add_argument("--simulate", action="store_true", help="hold the simulator against it, with --compare")
    parser.add_argument("--ranks", type=int, default=2, help="processes with --compare; parts of stages-one, local-one")
    parser.add_argument("--modules", type=int, help="local modules; by default as many as processes")
    parser.add_argument("--classifier", help="of the local modules; by default the objective's")
    parser.add_argument("--decoder", help="likewise")
    parser.add_argument("--repeats", type=int, default=3, help="turns, with --compare")
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--model-options", type=json.loads, default={}, help="JSON, for timm.create_model")
    parser.add_argument("--img-size", type=int, help="by default the model's own")
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--boundaries", type=boundaries_of, help="first block of every part but the first: 3,7")
    parser.add_argument("--balance", choices=("time", "memory"), default="time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--pin", action="store_true", help="keep each process on one core")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--times", type=Path, help="where to write seconds of each part, for benchmarks/speed_up.py")
    parser.add_argument("--weights", type=Path, help="a folder that gets each process's weights after training")
    options = parser.parse_args(arguments)
    options.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return options


def check(options: argparse.Namespace, ranks: int) -> None:
    """Refuse what can't be run.

    Raises:
        RecipeError: the message says what to type instead.
    """
    for name in ("steps", "batch_size", "microbatches", "threads", "repeats", "ranks", "modules"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    if options.batch_size % options.microbatches:
        raise RecipeError(
            f"--batch-size {options.batch_size} doesn't divide into {options.microbatches} microbatches; their buffers "
            "have one shape."
        )
    methods = options.compare or [options.method]
    if "1f1b" in methods and options.microbatches < ranks:
        raise RecipeError(f"1f1b: at least one microbatch a stage; --microbatches {ranks}, say.")
    if "local" in methods and ranks == 1:
        raise RecipeError("local: one process only; start it with torchrun, or take --method local-one.")
    if "local" in methods and options.modules is not None and options.modules < ranks:
        raise RecipeError(f"--modules {options.modules}: a local module a process at least; take {ranks}.")
    if options.pin and options.threads > 1:
        raise RecipeError("--pin: a process on one core has one thread; leave out --threads.")
    if options.simulate:
        check_simulated(options, ranks)
    if not options.compare and options.method in ALONE and ranks > 1:
        raise RecipeError(f"--method {options.method} is one process, but there are {ranks}; run it without torchrun.")


def check_simulated(options: argparse.Namespace, ranks: int) -> None:
    """Refuse what can't be simulated."""
    if not options.compare:
        raise RecipeError("--simulate: there is nothing to hold it against; add --compare local 1f1b.")
    if not simulator_is_here():
        raise RecipeError("--simulate: this localgrad has no research/simulation/shared_cores.py; leave it out.")
    if ranks > options.cores and not options.pin:
        raise RecipeError(
            f"--simulate: {ranks} processes share {options.cores} cores; add --pin, so that it is known how."
        )


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
    if options.times is not None and not options.compare:
        options.times.write_text(json.dumps([part for share in written["shares"] for part in share["parts"]]) + "\n")


def compared(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    reports = compare(options)
    rows = rows_of(reports)
    predicted = [found for method in TIMED_ALONE for found in simulated(reports, method)] if options.simulate else []
    written = {
        "format": FORMAT,
        "about": circumstances(),
        "rows": [asdict(row) for row in rows],
        "simulated": [asdict(found) for found in predicted],
        "repeats": [[report.to_dict() for report in repeat] for repeat in reports],
    }
    return written, "\n".join([as_table(rows), *as_lines(predicted)])


def run(options: argparse.Namespace, rank: int, ranks: int) -> Report | None:
    """One process of one method."""
    if options.pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank * len(cores) // ranks]})  # threads made from here on, gloo's too
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
