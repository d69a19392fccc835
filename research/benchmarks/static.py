"""Static memory: what offloading and small optimizer states leave on the device; the tables of research/docs/memory.md.

    python -m research.benchmarks.static

Estimates on fake tensors: no GPU, no weights, no time is measured.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn

from localgrad import FeatureReconstruction, LocalLearner
from localgrad.backbones.base import Backbone, outline
from localgrad.backbones.fake import without_initialization
from localgrad.estimating import estimate_step
from localgrad.training.optim import OptimizerFactory
from localgrad.units import format_bytes

LARGE = (
    ("vit_large_patch16_224", 6),
    ("swin_large_patch4_window7_224", 6),
    ("swin_large_patch4_window7_224", [10, 15, 20, 25, 26]),
)
OPTIMIZERS = ("adamw", "bnbadamw8bit", "adafactorbv", "bnblion8bit", "adafactor")


def backbone(name: str) -> tuple[nn.Module, Backbone]:
    with without_initialization():
        model = timm.create_model(name)
    return model, outline(model, (3, 224, 224))


def factory(model: nn.Module, name: str = "adamw") -> OptimizerFactory:
    return OptimizerFactory(model, name=name, lr=1e-3, weight_decay=0.05)


def offloading() -> None:
    print("| model, modules | static | peak | peak with --offload | static left on the device | in host memory |")
    print("|---|---|---|---|---|---|")
    for name, modules in LARGE:
        model, parts = backbone(name)
        rows = []
        for offload in (False, True):
            learner = LocalLearner(
                parts, modules=modules, objective=FeatureReconstruction(), precision="bf16", offload=offload
            )
            rows.append(estimate_step(learner, 1, factory(model)))
        plain, parked = rows
        told = f"{modules} modules" if isinstance(modules, int) else "modules " + ",".join(map(str, modules))
        resident = max(
            sum(found[key] for key in ("parameters", "buffers", "optimizer"))
            for found in parked.by_category_of_label.values()
        )
        print(
            f"| {name}, {told} | {format_bytes(plain.static_bytes)} | {format_bytes(plain.peak_bytes)} "
            f"| {format_bytes(parked.peak_bytes)} | {format_bytes(resident)} | {format_bytes(parked.host_bytes)} |",
            flush=True,
        )


def optimizers() -> None:
    model, parts = backbone("vit_small_patch16_224")
    learner = LocalLearner(parts, modules=4, objective=FeatureReconstruction())
    every = {id(p): p for module in learner.modules for p in module.parameters() if p.requires_grad}
    count = sum(p.numel() for p in every.values())
    print(f"\nvit_small_patch16_224, 4 modules, {count / 1e6:.1f} million parameters with auxiliary nets")
    print("| --optimizer | state | bytes a parameter |\n|---|---|---|")
    for name in OPTIMIZERS:
        try:
            profile = estimate_step(learner, 2, factory(model, name))
        except Exception as error:
            print(f"| {name} | not here: {str(error).splitlines()[0]} | |")
            continue
        state = profile.by_category["optimizer"]
        print(f"| {name} | {format_bytes(state)} | {state / count:.2f} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    print(f"AdamW, bf16, batch 1; torch {torch.__version__}, timm {timm.__version__}\n")
    offloading()
    optimizers()
