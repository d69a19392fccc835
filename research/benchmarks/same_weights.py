"""Whether a change of the code changed what is trained: digits for two epochs, old code and new, bit for bit.

    git worktree add ../before COMMIT
    python -m research.benchmarks.same_weights --old ../before/src

Each recipe is trained once by either side, in a process of its own with one thread. What is compared are all tensors of
the last checkpoint (model, auxiliary nets, optimizers) and the losses of every epoch. Exit status 1 where any differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OWN = Path(__file__).resolve().parents[2] / "src"
RECIPES = {
    "default, K = 4": [],
    "the paper's heads, augmented, K = 2": [
        "--classifier",
        "linear",
        "--modules",
        "2",
        "--mixup",
        "0.2",
        "--drop-path",
        "0.1",
    ],
    "images, conv decoder": ["--objective", "image", "--decoder", "conv"],
    "greedy, clipped, average": [
        "--objective",
        "greedy",
        "--set",
        "local.options={}",
        "--clip-grad",
        "1",
        "--ema-decay",
        "0.9",
    ],
    "contrastive": ["--objective", "contrastive", "--set", "local.options={}"],
    "end to end": ["--modules", "1"],
    "halves in chunks, two parts of a batch": ["--checkpoint", "halves/2", "--accumulation", "2"],
    "bfloat16": ["--precision", "bf16"],
    "sequential": ["--schedule", "sequential"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--old", type=Path, required=True, help="the src folder of the code before")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--only", action="append", default=[], help="a recipe of the list; may be repeated")
    options = parser.parse_args()
    differing = 0
    for name, words in RECIPES.items():
        if options.only and name not in options.only:
            continue
        old, new = (hashes(source, [*words, "--epochs", options.epochs]) for source in (options.old, OWN))
        others = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        differing += bool(others)
        said = "the same" if not others else f"OTHER: {', '.join(others[:4])} and {max(0, len(others) - 4)} more"
        print(f"{name}: {len(new)} hashes, {said}", flush=True)
    sys.exit(bool(differing))


def hashes(source: Path, words: list[str]) -> dict[str, str]:
    """Train, and give the hash of each tensor of the last checkpoint, and the losses."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        environment = {**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "localgrad", "train", "--device", "cpu", "--out", str(run), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{source}: {done.stderr or done.stdout}")
        last = torch.load(run / "checkpoints" / "last.pt", weights_only=True, map_location="cpu")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: hashlib.sha256(raw(tensor)).hexdigest() for name, tensor in tensors_of(last, "")}
    for line in lines:
        found |= {f"epoch {line.get('epoch')}: {key}": repr(value) for key, value in line.items() if "loss" in key}
    return found


def raw(tensor: Any) -> bytes:
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return bytes(str((tensor.dtype, tuple(tensor.shape))), "ascii") + flat.numpy().tobytes()


def tensors_of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}/{index}")


if __name__ == "__main__":
    main()
