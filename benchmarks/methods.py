"""Step time and peak memory of end-to-end training, activation checkpointing and local training, as ratios.

    make bench
    python benchmarks/methods.py --repeats 5 --json results.json

All methods run in one process on the same batch, one step each in turn, in an order that rotates from repeat to
repeat; a method's time ratio is the median over repeats of its time to the plain loop's in the same repeat, so that a
slow minute of a shared machine weighs on both. On a processor glibc is told (in the Makefile) to keep freed memory, as
a GPU's caching allocator does: else returning pages and faulting them in again is most of the noise, and all to the
disadvantage of end-to-end training. Peaks are estimates on fake tensors of the very step that is timed
(``planning/memory.py``); where there is a CUDA GPU, ``torch.cuda.max_memory_allocated`` stands beside them.

The baseline is a plain loop that knows nothing of localgrad, the rival the same with timm's ``set_grad_checkpointing``.
The row "K = 1" is the same code as local training with one module.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner, split
from localgrad.learner import estimate_step
from localgrad.planning.memory import simulate
from localgrad.units import format_bytes

BASELINE = "plain loop"


@dataclass
class Method:
    """One row: how to run a step, and its estimated peak."""

    name: str
    step: Callable[[Tensor, Tensor], object]
    peak_bytes: int


class PlainLoop:
    """What anybody would write: timm model, cross-entropy, AdamW."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = adamw(list(model.parameters()))

    def step(self, images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def plain(name: str, model: nn.Module, size: tuple[int, ...], *, checkpoint: bool) -> Method:
    model = copy.deepcopy(model).train()
    if checkpoint:
        model.set_grad_checkpointing()
    loop = PlainLoop(model)
    inputs = {"images": (size, torch.float32), "labels": (size[:1], torch.int64)}
    device = "cuda" if next(model.parameters()).is_cuda else "cpu"
    peak = simulate(loop, PlainLoop.step, inputs=inputs, device=device).peak_bytes
    return Method(name, loop.step, peak)


def local(name: str, learner: LocalLearner, batch_size: int) -> Method:
    peak = estimate_step(learner, batch_size, adamw).peak_bytes
    learner.configure_optimizers(adamw)
    return Method(name, learner.step, peak)


def methods(model: nn.Module, size: tuple[int, int, int, int]) -> list[Method]:
    backbone = split(model, size[1:])
    objectives = {f"features, {decoder}": FeatureReconstruction(decoder=decoder) for decoder in DECODERS}
    objectives |= {"image, linear": ImageReconstruction(), "greedy": GreedySupervised()}
    rows = [
        plain(BASELINE, model, size, checkpoint=False),
        local("K = 1 (end-to-end)", LocalLearner(backbone, modules=1), size[0]),
        plain("timm checkpointing", model, size, checkpoint=True),
    ]
    for modules in (2, 4):
        for name, objective in objectives.items():
            learner = LocalLearner(backbone, modules=modules, objective=objective)
            rows.append(local(f"K = {modules}, {name}", learner, size[0]))
    learner = LocalLearner(backbone, modules=4, checkpoint=True)
    rows.append(local("K = 4, features, linear, checkpointed", learner, size[0]))
    return rows


DECODERS = ("linear", "conv", "transformer")


def timed(method: Method, images: Tensor, labels: Tensor) -> tuple[float, int | None]:
    if images.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    method.step(images, labels)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if images.is_cuda else None


def measure(rows: list[Method], images: Tensor, labels: Tensor, repeats: int) -> list[dict[str, object]]:
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    measured: dict[str, int | None] = {}
    for repeat in range(repeats + 1):  # the first warms up: optimizer states, allocator, kernels
        shift = repeat % len(rows)
        for row in rows[shift:] + rows[:shift]:
            duration, peak = timed(row, images, labels)
            print(f"  {repeat}/{repeats} {row.name}: {duration:.2f} s", flush=True)
            if repeat:
                seconds[row.name].append(duration)
                measured[row.name] = peak
    base = next(row for row in rows if row.name == BASELINE)
    found = []
    for row in rows:
        ratios = [a / b for a, b in zip(seconds[row.name], seconds[BASELINE], strict=True)]
        found.append(
            {
                "method": row.name,
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "seconds": statistics.median(seconds[row.name]),
                "peak_bytes": row.peak_bytes,
                "peak_ratio": row.peak_bytes / base.peak_bytes,
                "measured_peak_bytes": measured[row.name],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64, help="for the peaks")
    parser.add_argument("--time-batch-size", type=int, default=16, help="for the step times")
    parser.add_argument("--repeats", type=int, default=3, help="0 only estimates peaks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=100).to(args.device)
    images = torch.randn(args.time_batch_size, 3, args.img_size, args.img_size, device=args.device)
    labels = torch.randint(0, 100, (args.time_batch_size,), device=args.device)
    rows = methods(model, (args.batch_size, *images.shape[1:]))
    where = f"{platform.machine()} processor, {torch.get_num_threads()} threads"
    if images.is_cuda:
        where = torch.cuda.get_device_name()
    head = f"{args.model}, {args.img_size} px, fp32, AdamW, peaks at batch {args.batch_size}"
    head += f", times at {args.time_batch_size}; {where}; torch {torch.__version__}"
    head += f"; {datetime.datetime.now(tz=datetime.UTC).date()}"
    print(head)
    if args.repeats:
        found = measure(rows, images, labels, args.repeats)
    else:
        found = [
            {"method": row.name, "peak_bytes": row.peak_bytes, "peak_ratio": row.peak_bytes / rows[0].peak_bytes}
            for row in rows
        ]
    print("\n| method | peak | x plain | step time x plain | range |\n|---|---|---|---|---|")
    for entry in found:
        low, high = entry.get("time_ratio_range", (float("nan"),) * 2)
        print(
            f"| {entry['method']} | {format_bytes(entry['peak_bytes'])} | {entry['peak_ratio']:.3f} "
            f"| {entry.get('time_ratio', float('nan')):.2f} | {low:.2f}-{high:.2f} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"run": head, "methods": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
