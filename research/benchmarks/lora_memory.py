"""Memory of fine-tuning a ViT-S/16: all weights, adapters, local modules, both; a table of research/docs/memory.md.

    python -m research.benchmarks.lora_memory             # estimates, without a GPU
    python -m research.benchmarks.lora_memory --measured  # on a card, real or simulated: real steps
    python -m research.benchmarks.lora_memory --4bit      # estimates: weights of 4 bits, AdamW of 8 bits

224 px, batch 8, AdamW, fp32; LoRA of rank 16 in attention and MLP, the head trained as a whole. Needs the extra
``peft``, and ``8bit`` for the last. "Above static" is what a step takes beside weights and optimizer state:
activations, gradients, temporaries.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import localgrad
from localgrad.backbones.adapters import with_adapters
from localgrad.backbones.quantized import quantize_base
from localgrad.estimating import estimate_step
from localgrad.training.optim import OptimizerFactory

BATCH, SIZE = 8, (3, 224, 224)
MODEL = "vit_small_patch16_224"
LORA = LoraConfig(r=16, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
CHECKPOINTED: dict[str, Any] = {"modules": 1, "checkpoint": "blocks"}
WAYS: list[tuple[str, bool, dict[str, Any]]] = [
    ("full fine-tuning", False, {"modules": 1}),
    ("full, every block recomputed", False, CHECKPOINTED),
    ("LoRA", True, {"modules": 1}),
    ("LoRA, every block recomputed", True, CHECKPOINTED),
    ("K = 2", False, {"modules": 2}),
    ("K = 2, LoRA", True, {"modules": 2}),
    ("K = 4", False, {"modules": 4}),
    ("K = 4, LoRA", True, {"modules": 4}),
    ("K = 4, LoRA, linear heads", True, {"modules": 4, "objective": localgrad.GreedySupervised(classifier="linear")}),
]
ADAMW = partial(torch.optim.AdamW, lr=1e-4)


class Peak(NamedTuple):
    """Bytes of a step: weights and optimizer state, and all at its peak."""

    static: int
    total: int


def learners(device: str = "cpu") -> Iterator[tuple[str, localgrad.LocalLearner]]:
    """One for each way, of the same weights."""
    for name, adapts, options in WAYS:
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(MODEL, num_classes=100)
        backbone = localgrad.split(get_peft_model(model, LORA) if adapts else model, SIZE)
        yield name, localgrad.LocalLearner(backbone.to(device), **options)


def in_4_bits(models: list[str]) -> Iterator[str]:
    """The table of weights held in full and in 4 bits, line by line: bytes in MiB."""
    columns = ["", "weights", "AdamW: state", "above static", "total", "8-bit AdamW: state", "total"]
    yield f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    ways: dict[str, dict[str, Any]] = {
        "": {"modules": 1},
        ", every block recomputed": CHECKPOINTED,
        ", K = 2": {"modules": 2},
        ", K = 4": {"modules": 4},
        ", K = 4, linear heads": {"modules": 4, "objective": localgrad.GreedySupervised(classifier="linear")},
    }
    for name in models:
        for what in ("full", "LoRA", "LoRA, 4 bits"):
            torch.manual_seed(0)
            model: nn.Module = timm.create_model(name, num_classes=100)
            model = model if what == "full" else with_adapters(model, 16, SIZE)
            model = quantize_base(model) if "4 bits" in what else model
            backbone = localgrad.split(model, SIZE)
            for way, options in ways.items():
                told = []
                for optimizer in ("adamw", "bnbadamw8bit"):
                    learner = localgrad.LocalLearner(backbone, **options)
                    profile = estimate_step(
                        learner, BATCH, OptimizerFactory(model, name=optimizer, lr=1e-4, weight_decay=0.05)
                    )
                    static, state = profile.static_bytes, profile.by_category["optimizer"]
                    shown = [state, profile.peak_bytes]
                    told += shown if told else [static - state, state, profile.peak_bytes - static, shown[1]]
                    del learner
                    gc.collect()
                cells = " | ".join(f"{nbytes / 2**20:,.1f}" for nbytes in told)
                yield f"| {name.removesuffix('_patch16_224')}, {what}{way} | {cells} |"


def estimated(learner: localgrad.LocalLearner) -> Peak:
    profile = estimate_step(learner, BATCH, ADAMW)
    return Peak(profile.static_bytes, profile.peak_bytes)


def measured(learner: localgrad.LocalLearner) -> Peak:
    """By PyTorch's own account of what tensors hold of a card, in the third step."""
    learner.configure_optimizers(ADAMW)
    images, labels = torch.randn(BATCH, *SIZE, device="cuda"), torch.arange(BATCH, device="cuda")
    for _ in range(2):
        learner.step(images, labels)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learner.step(images, labels)
    return Peak(before, torch.cuda.max_memory_allocated())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measured", action="store_true", help="real steps on a card")
    parser.add_argument("--4bit", dest="in_4_bits", nargs="*", metavar="MODEL", help="of these models; a ViT-S/16")
    given = parser.parse_args()
    if given.in_4_bits is not None:
        for line in in_4_bits(given.in_4_bits or [MODEL]):
            print(line, flush=True)
        return
    on_card = given.measured
    print("| | total | x full | above static | x full |\n|---|---|---|---|---|")
    first = None
    for name, learner in learners("cuda" if on_card else "cpu"):
        peak = measured(learner) if on_card else estimated(learner)
        first = first or peak
        above, of_first = peak.total - peak.static, first.total - first.static
        print(
            f"| {name} | {peak.total / 2**20:,.0f} MiB | {peak.total / first.total:.2f} | {above / 2**20:,.0f} MiB "
            f"| {above / of_first:.2f} |",
            flush=True,
        )
        del learner
        gc.collect()


if __name__ == "__main__":
    main()
