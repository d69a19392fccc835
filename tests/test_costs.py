"""Costs measured block by block and composed, against the simulation of the whole step."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest
import timm
import torch
from torch import nn

from helpers import adamw
from localgrad.backbones.base import Backbone, outline
from localgrad.backbones.fake import without_initialization
from localgrad.backbones.halves import signature
from localgrad.estimating import estimate_step
from localgrad.learner import LocalLearner
from localgrad.memory import track as memory
from localgrad.memory.costs import CostSettings
from localgrad.memory.parts import measure_costs
from localgrad.objectives.methods import (
    Contrastive,
    FeatureReconstruction,
    GreedySupervised,
    ImageReconstruction,
    Objective,
)
from localgrad.training.optim import OptimizerFactory

VIT = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 32, "patch_size": 8}
SWIN = {
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "vit": ("vit_tiny_patch16_224", VIT),
    "pvt_v2": ("pvt_v2_b0", {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 2, 1)}),
    "convnext": ("convnext_atto", {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1)}),
    "beit": ("beit_base_patch16_224", VIT),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1)}),
}
OBJECTIVES: dict[str, Objective] = {
    "linear": FeatureReconstruction(),
    "conv": FeatureReconstruction(decoder="conv"),
    "transformer": FeatureReconstruction(decoder="transformer"),
    "image": ImageReconstruction(),
    "greedy": GreedySupervised(),
    "contrastive": Contrastive(),
    "transport": GreedySupervised(transport_tau=1.0),
}
WAYS = ["none", "blocks", "halves", "halves/2", "halves/4", "halves/4:2", "blocks:1"]


def backbone_of(family: str, drop_path: float = 0.1) -> Backbone:
    name, small = FAMILIES[family]
    model = timm.create_model(name, num_classes=10, drop_path_rate=drop_path, **small)
    side = 64 if family == "resnet" else 32  # batch norms refuse a grid of one position
    return outline(model, (3, side, side))


# Each value of each factor stands at least twice; batches that chunks don't divide are among them.
CASES = [
    ("swin", "linear", "adamw", CostSettings(batch_size=6)),
    ("vit", "conv", "lamb", CostSettings(batch_size=6, accumulation=2)),
    ("pvt_v2", "greedy", "momentum", CostSettings(batch_size=7, precision="bf16")),
    ("convnext", "contrastive", "adafactorbv", CostSettings(batch_size=6, accumulation=3)),
    ("beit", "image", "momentum", CostSettings(batch_size=7)),
    ("resnet", "image", "lamb", CostSettings(batch_size=6, precision="bf16")),
    ("swin", "transformer", "adafactorbv", CostSettings(batch_size=16, precision="bf16")),
    ("vit", "image", "adamw", CostSettings(batch_size=16, precision="bf16", accumulation=2)),
    ("swin", "contrastive", "momentum", CostSettings(batch_size=16, device="cuda")),
    ("vit", "linear", "adamw", CostSettings(batch_size=16, precision="bf16", device="cuda")),
    ("resnet", "conv", "adamw", CostSettings(batch_size=6, device="cuda")),
    ("swin", "transport", "adamw", CostSettings(batch_size=16, precision="bf16")),
    ("vit", "transport", "momentum", CostSettings(batch_size=16)),
]


QUICK = (1, 2, 4, 9, 11)
TOO_HIGH = pytest.mark.xfail(strict=True, reason="known: 9.7 % above, with three parts of a batch")
NUMBERS = [
    n if n in QUICK else pytest.param(n, marks=[pytest.mark.heavy, TOO_HIGH] if n == 3 else pytest.mark.heavy)
    for n in range(len(CASES))
]


@pytest.mark.few(1)
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: "-".join(CASES[number][:3]))
def test_composed_costs_are_those_of_the_whole_step(number: int) -> None:
    family, objective, optimizer, settings = CASES[number]
    chosen = random.Random(number)
    backbone = backbone_of(family, drop_path=0.1 * (number % 3 > 0))
    num_modules = chosen.randint(1, 3)
    boundaries = sorted(chosen.sample(range(1, len(backbone.blocks)), num_modules - 1))
    factory = OptimizerFactory(backbone.model, name=optimizer, lr=1e-3, weight_decay=0.05)
    learner = LocalLearner(
        backbone,
        modules=boundaries,
        objective=OBJECTIVES[objective],
        checkpoint=[chosen.choice(WAYS) for _ in range(num_modules)],
        precision=settings.precision,
        accumulation=settings.accumulation,
    )
    costs = measure_costs(backbone, OBJECTIVES[objective], factory, settings)
    simulated = estimate_step(learner, settings.batch_size, factory, torch.device(settings.device))
    # BEiT's tables of positions, which don't grow with the batch, leave such small models 1.2 % below.
    # A loop over all weights at once (foreach) goes group by group; the sum over both is a little more.
    above = 0.03 if settings.device == "cuda" else 0.01 * settings.accumulation
    assert 0.98 < costs.peak_of(learner.plan) / simulated.peak_bytes < 1 + above


@pytest.mark.heavy
def test_choices_are_worth_having_and_agree_with_choice() -> None:
    costs = measure_costs(backbone_of("swin"), OBJECTIVES["linear"], adamw, CostSettings(batch_size=7))
    for start, stop in itertools.combinations(range(costs.num_blocks + 1), 2):
        choices = costs.choices(start, stop)
        for faster, slower in itertools.pairwise(choices):
            assert faster.nanoseconds < slower.nanoseconds
            assert faster.peak_bytes > slower.peak_bytes
        for choice in choices:
            assert costs.choice(start, stop, choice.how) == choice
        assert choices[0].how.level == "none"  # nothing is faster than recomputing nothing


def test_blocks_that_are_alike_have_one_signature() -> None:
    blocks = backbone_of("swin").blocks
    unshifted, shifted = signature(blocks[0]), signature(blocks[1])
    assert unshifted != shifted
    vit = [signature(block) for block in backbone_of("vit").blocks]
    assert vit[1] == vit[2] != vit[0]  # the first one has no drop path
    assert len({signature(block) for block in backbone_of("vit", drop_path=0.0).blocks}) == 1


def test_autocast_for_cuda_runs_norms_in_float32() -> None:
    norm = nn.LayerNorm(64)

    def step(norm: nn.LayerNorm, images: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.utils.checkpoint.checkpoint(norm, images, use_reentrant=False)
            assert found.dtype == kind
        found.sum().backward()  # recomputes; PyTorch itself checks that types are as in the forward pass
        norm.zero_grad()

    for device, kind in (("cpu", torch.bfloat16), ("cuda", torch.float32)):  # noqa: B007  # read by step
        memory.simulate(norm, step, inputs={"images": ((8, 64), torch.bfloat16)}, device=device)  # type: ignore[arg-type]

    def kept(norm: nn.LayerNorm, images: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            images = images * 1
            found = norm(images)
        del images, found

    inputs = {"images": ((64, 1024), torch.bfloat16)}
    norm = nn.LayerNorm(1024)
    cpu, cuda = (memory.simulate(norm, kept, inputs=inputs, device=name) for name in ("cpu", "cuda"))  # type: ignore[arg-type]
    # Output and the float32 copy of the input, instead of an output in bfloat16; mean and rstd in both.
    numbers = 64 * 1024
    assert cuda.peak_bytes - cuda.static_bytes == pytest.approx(numbers * (2 + 4 + 4) + 2 * 512, abs=1024)
    assert cpu.peak_bytes - cpu.static_bytes == pytest.approx(numbers * (2 + 2) + 2 * 64 * 4, abs=1024)


def test_a_loss_counts_the_buffers_of_its_kernel() -> None:
    weight = nn.Parameter(torch.ones(1000))

    def step(weight: nn.Parameter) -> None:
        loss = nn.functional.mse_loss(weight, torch.zeros(1000))
        loss.view(1).backward()
        weight.grad = None

    real, simulated = memory.track(lambda: step(weight)), memory.simulate(weight, step, inputs={})
    assert real.peak_bytes == simulated.peak_bytes == 4000 * 4 + 4


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "limit"), [("swin_tiny_patch4_window7_224", 6), ("vit_large_patch16_224", 10)])
def test_costs_are_measured_quickly(name: str, limit: float) -> None:
    # Processor time of both threads; twice the limit, since a busy neighbour slows every instruction.
    torch.set_num_threads(2)
    before = time.process_time()
    with without_initialization():
        model = timm.create_model(name)
    measure_costs(outline(model, (3, 224, 224)), GreedySupervised(), adamw, CostSettings(batch_size=64))
    assert time.process_time() - before < 2 * limit
