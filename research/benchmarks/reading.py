"""What reading data costs, old code against new: paired runs in fresh processes, and whether both read the same bits.

    git worktree add ../before COMMIT
    python -m research.benchmarks.reading --old ../before/src                    # digits, and a folder of CIFAR's size
    python -m research.benchmarks.reading --old ../before/src --data FOLDER  # and one's own, such as CIFAR as parquet

Old and new take turns, each reads everything once in a process of its own (after one turn that fills the disk's
cache); the median of the pairs' ratios counts, and what it may be is 1.05.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

OWN = Path(__file__).resolve().parents[2] / "src"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--old", type=Path, help="the src folder of the code before")
    parser.add_argument("--data", action="append", default=[], help="further data sets; may be repeated")
    parser.add_argument("--images", type=int, default=60_000, help="in the folder that is made")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--read", help="(a process of ours) read this and print what it took")
    options = parser.parse_args()
    if options.read is not None:
        read(options.read)
        return
    if options.old is None:
        parser.error("--old: name the src folder of the code before, such as ../before/src")
    with tempfile.TemporaryDirectory() as folder:
        made = write_folder(Path(folder) / "images", options.images)
        for name in ("digits", str(made), *options.data):
            said = "a folder of PNG files" if name == str(made) else name
            compare(said, name, options.old, options.pairs)


def compare(said: str, name: str, old: Path, pairs: int) -> None:
    first = [measured(name, source) for source in (old, OWN)]
    same = first[0]["digest"] == first[1]["digest"]
    turns = []
    for number in range(pairs):
        order = (old, OWN) if number % 2 == 0 else (OWN, old)  # neither is always first
        seconds = {source: measured(name, source)["seconds"] for source in order}
        turns.append((seconds[old], seconds[OWN]))
    ratios = sorted(new / before for before, new in turns)
    before, new = (statistics.median(values) for values in zip(*turns, strict=True))
    print(
        f"{said}: {before:.2f} s before, {new:.2f} s now; ratio {statistics.median(ratios):.3f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f} over {pairs} pairs); "
        f"{'the same' if same else 'OTHER'} pixels, labels, parts"
    )


def measured(name: str, source: Path) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(source.resolve()), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--read", name]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stderr)
    result: dict[str, object] = json.loads(process.stdout.splitlines()[-1])
    return result


def read(name: str) -> None:
    """Read a data set, and say what it took (imports aside) and what came out."""
    import torchvision.datasets  # noqa: F401  # both sides need some of it

    from localgrad.training.data import load_data
    from localgrad.training.settings import DataSettings

    start = time.perf_counter()
    splits = load_data(DataSettings(name=name))
    seconds = time.perf_counter() - start
    digest = hashlib.sha256(repr((splits.info.class_names, splits.info.mean, splits.info.std)).encode())
    for part in (splits.train, splits.val, splits.test):
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    print(json.dumps({"seconds": seconds, "digest": digest.hexdigest()}))


def write_folder(root: Path, count: int) -> Path:
    """Smooth random images of 32x32 pixels in ten classes, a sixth of them for testing."""
    rng = np.random.default_rng(0)
    for index in range(count):
        part, name = ("test" if index % 6 == 5 else "train"), f"class {index // 6 % 10}"
        folder = root / part / name
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index:05}.png")
    return root


if __name__ == "__main__":
    main()
