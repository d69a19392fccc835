"""A small Llama on real text, by local modules and end to end.

The text is the source of Python's own standard library, which every machine has, byte by byte; every tenth file is held
out, and nothing is selected on it: all methods have one learning rate, one schedule and as many steps. A cell (a method
and a seed) that is done is kept in ``research/results/language/perplexity.json`` and isn't run again; the page is
``research/docs/language.md``.

::

    python -m research.benchmarks.language           # what isn't done yet, seed 0 first
    python -m research.benchmarks.language --report     # the page alone

Needs the extra ``hf``. One thread a cell; about two minutes each.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sysconfig
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

import localgrad
from localgrad.estimating import estimate_step

RESEARCH = Path(__file__).parents[1]
RESULTS = RESEARCH / "results" / "language" / "perplexity.json"
PAGE = RESEARCH / "docs" / "language.md"
LAYERS, WIDTH, BATCH, LENGTH, STEPS, SEEDS = 8, 96, 8, 128, 400, 3
LR, WARMUP, CLIP, HELD_OUT = 2e-3, 20, 1.0, 256
METHODS: dict[str, dict[str, Any]] = {
    "end to end": {"modules": 1},
    "lower half frozen": {"modules": 1},
    "default, K = 2": {"modules": 2},
    "default, K = 4": {"modules": 4},
    "solo, K = 2": {"modules": 2, "objective": "solo"},
    "solo, K = 4": {"modules": 4, "objective": "solo"},
    "lopt, K = 2": {"modules": 2, "objective": "lopt"},
    "lopt, K = 4": {"modules": 4, "objective": "lopt"},
}


def bytes_of(files: list[Path]) -> Tensor:
    """Files as one row of bytes, int64."""
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and held-out ones."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return bytes_of([path for n, path in enumerate(files) if n % 10]), bytes_of(files[::10])


def windows(source: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many windows of LENGTH bytes, [count, LENGTH]."""
    starts = torch.randint(len(source) - LENGTH, (count,), generator=generator)
    return torch.stack([source[start : start + LENGTH] for start in starts.tolist()])


def llama() -> nn.Module:
    """The model, from torch's random state."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=8 * WIDTH // 3,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def perplexity(model: nn.Module, held_out: Tensor) -> float:
    """Of a byte, given those before it in its window."""
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in held_out.split(BATCH)]
    model.train()
    return math.exp(statistics.fmean(losses))


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """One a module."""
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.1)


def schedule(step: int) -> float:
    """Warm-up, then a cosine to nothing."""
    return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def run(method: str, seed: int) -> dict[str, Any]:
    """Train a cell."""
    torch.manual_seed(seed)
    train, rest = text()
    held_out = windows(rest, HELD_OUT, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    model = llama()
    if method == "lower half frozen":
        model.model.embed_tokens.requires_grad_(requires_grad=False)  # type: ignore[call-arg,union-attr,operator]
        model.model.layers[: LAYERS // 2].requires_grad_(requires_grad=False)  # type: ignore[call-arg,union-attr,operator,index]
    first = windows(train, 2, torch.Generator().manual_seed(0))
    learner = localgrad.LocalLearner(model, example={"input_ids": first}, clip_grad=CLIP, **METHODS[method])
    peak = estimate_step(learner, BATCH, partial(torch.optim.AdamW, lr=LR)).peak_bytes
    learner.configure_optimizers(adamw)
    schedulers = [LambdaLR(optimizer, schedule) for optimizer in learner.optimizers]
    began = time.process_time()
    for _ in range(STEPS):
        ids = windows(train, BATCH, generator)
        learner.step({"input_ids": ids}, ids)
        for scheduler in schedulers:
            scheduler.step()
    seconds = time.process_time() - began
    return {
        "perplexity": perplexity(model, held_out),
        "peak_bytes": peak,
        "processor_seconds": seconds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def key_of(method: str, seed: int) -> str:
    """A cell as text."""
    return f"{method}; seed {seed}"


def page(results: dict[str, dict[str, Any]]) -> str:
    """The table of what there is."""
    done = len(results)
    base = [results[key] for seed in range(SEEDS) if (key := key_of("end to end", seed)) in results]
    versions = sorted({f"Python {row['python']}, torch {row['torch']}" for row in results.values()})
    dates = sorted({row["date"] for row in results.values()})
    lines = [
        "# A language model from scratch",
        "",
        f"A Llama of {LAYERS} layers, width {WIDTH}, on the source files of Python's standard library, byte by",
        f"byte; every tenth file held out. {STEPS} steps of {BATCH} windows of {LENGTH} bytes, AdamW, the same rate",
        f"for all. Made by `python -m research.benchmarks.language`: {done} of {len(METHODS) * SEEDS} cells.",
        f"{'; '.join(versions)}; {dates[0]} to {dates[-1]}." if dates else "",
        "",
        "Perplexity is of a held-out byte, the mean over seeds with the least and the greatest; memory is the",
        "estimated peak of a step, and time the processor's, both beside end to end. So short a training",
        "shows who learns fast, and not who ends well: nothing about longer ones follows.",
        "",
        "| | seeds | perplexity | memory | time |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        rows = [results[key] for seed in range(SEEDS) if (key := key_of(method, seed)) in results]
        if not rows or not base:
            continue
        found = [row["perplexity"] for row in rows]
        memory = rows[0]["peak_bytes"] / base[0]["peak_bytes"]
        ratio = statistics.fmean(  # of a seed's cells alone, which ran one after the other
            row["processor_seconds"] / other["processor_seconds"] for row, other in zip(rows, base, strict=False)
        )
        lines.append(
            f"| {method} | {len(rows)} | {statistics.fmean(found):.2f} ({min(found):.2f} to {max(found):.2f}) "
            f"| {memory:.2f} x | {ratio:.2f} x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what isn't done, or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="cells whose text begins so")
    parser.add_argument("--report", action="store_true", help="write the page, and stop")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in range(0 if options.report else SEEDS):
        for method in METHODS:
            key = key_of(method, seed)
            if key.startswith(options.only) and key not in results:
                results[key] = run(method, seed)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
