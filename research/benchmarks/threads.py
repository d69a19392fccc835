"""Threads: the digits demo alone and beside one busy process, and where a second thread begins to pay.

    python -m research.benchmarks.threads demo [--epochs 2] [--repeats 3]
    python -m research.benchmarks.threads rule [--repeats 5]

``demo`` trains by the command line, each way alone and beside a process that only counts, in turn, and prints images a
second while training and how many times as long it takes beside the other: as chosen (one thread), with as many threads
as cores whose waiting ones sleep, and with those that spin. ``rule`` prints the seconds of a step with one thread and
with all, smallest model first, beside what ``app/threads.py`` decides by. The load of the machine before each
measurement is printed too: near nought, or the figures are of something else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
BUSY = "while True: pass"
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "as chosen": ([], {}),
    f"{CORES} threads, waiting ones sleep": (["--num-threads", str(CORES)], {}),
    f"{CORES} threads, waiting ones spin": (["--num-threads", str(CORES)], {"OMP_WAIT_POLICY": "ACTIVE"}),
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "ViT, 64 wide, 4 blocks, 32 px": ({"embed_dim": 64, "depth": 4, "num_heads": 2, "patch_size": 4}, 32),
    "the digits' Swin": (
        {"embed_dim": 48, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "window_size": 4, "patch_size": 4},
        32,
    ),
    "ViT, 128 wide, 6 blocks, 32 px": ({"embed_dim": 128, "depth": 6, "num_heads": 2, "patch_size": 4}, 32),
    "ViT-Ti, 32 px": ({"patch_size": 4}, 32),
    "ViT-Ti, 224 px": ({}, 224),
    "Swin-T, 224 px": ({}, 224),
}


def load() -> float:
    return os.getloadavg()[0]


def images_per_second(words: list[str], environment: dict[str, str], epochs: int, *, is_beside: bool) -> float:
    """Of the last epoch of a run on digits."""
    unset = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    environment = {**{name: value for name, value in os.environ.items() if name not in unset}, **environment}
    busy = subprocess.Popen([sys.executable, "-c", BUSY]) if is_beside else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "-m", "localgrad", "train", "--device", "cpu", "--epochs", str(epochs), *words]
            subprocess.run([*command, "--out", str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
            speed: float = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["images_per_second"]
            return speed
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()


def demo(options: argparse.Namespace) -> None:
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.repeats):
        for name, (words, environment) in WAYS.items():
            for is_beside in (False, True):
                before = load()
                speed = images_per_second(words, environment, options.epochs, is_beside=is_beside)
                found.setdefault((name, is_beside), []).append(speed)
                where = "beside one" if is_beside else "alone"
                print(f"{name}, {where}: {speed:.0f} images/s (load before {before:.1f})", flush=True)
    for name in WAYS:
        alone, beside = (statistics.median(found[name, is_beside]) for is_beside in (False, True))
        print(
            f"{name}: alone {alone:.0f}, beside one busy process {beside:.0f} images/s: {alone / beside:.2f} x as long"
        )


def rule(options: argparse.Namespace) -> None:
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import localgrad
    from localgrad.app.threads import choose_threads

    batch_size = 32
    for name, (settings, side) in MODELS.items():
        kind = "swin_tiny_patch4_window7_224" if "Swin" in name else "vit_tiny_patch16_224"
        model = timm.create_model(kind, num_classes=10, img_size=side, **settings)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, side, side))
        torch.set_num_threads(CORES)
        chosen = choose_threads(model, (3, side, side), batch_size)
        learner = localgrad.LocalLearner(model, modules=2, input_size=(3, side, side))
        learner.configure_optimizers(lambda weights: torch.optim.AdamW(weights, lr=1e-3))
        images, labels = torch.randn(batch_size, 3, side, side), torch.randint(10, (batch_size,))
        seconds: dict[int, list[float]] = {1: [], CORES: []}
        before = load()
        for repeat in range(options.repeats + 1):
            for threads, times in seconds.items():
                torch.set_num_threads(threads)
                begin = time.perf_counter()
                learner.step(images, labels)
                if repeat:  # the first is to warm up
                    times.append(time.perf_counter() - begin)
        one, all_ = (min(times) for times in seconds.values())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = batch_size * counter.get_total_flops()
        print(
            f"{name}: {parameters / 1e6:.2f} million parameters, {flops / 1e9:.1f} GFLOP a forward pass; a step takes "
            f"{one:.3f} s with 1 thread, {all_:.3f} s with {CORES} ({one / all_:.2f} x); {chosen} chosen "
            f"(load before {before:.1f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["demo", "rule"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    demo(options) if options.what == "demo" else rule(options)


if __name__ == "__main__":
    main()
