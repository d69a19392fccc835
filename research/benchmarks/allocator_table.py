"""Predicted against PyTorch's own allocator, configuration by configuration: the table of docs/memory-budgets.

    python research/benchmarks/allocator_table.py               # all that have no result yet
    python research/benchmarks/allocator_table.py swin-t-k4-bf16 --again
    python research/benchmarks/allocator_table.py --table       # the table of what is there, as Markdown

Each configuration runs twice, in processes of its own. One trains for real, under the simulated CUDA runtime
(``research/simulated_card``), which has no kernels but PyTorch's own caching allocator: what it allocates and reserves,
and the events themselves. The other predicts both from the model alone (``localgrad.estimating.record_run`` and
``localgrad.memory.allocator``), on a processor. Verdicts: the recorded real events are replayed through PyTorch's own
allocator with ``set_per_process_memory_fraction`` at twenty caps around the limit, the predicted ones through the
model; they are compared cap by cap.

Results are committed as JSON under ``research/results/memory``, one file a configuration, with what made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent.parent / "results" / "memory"
MIB = 1 << 20
CAPS = 20
SHORT = {
    "swin-t": "swin_tiny_patch4_window7_224",
    "swin-s": "swin_small_patch4_window7_224",
    "vit-s": "vit_small_patch16_224",
    "vit-b": "vit_base_patch16_224",
    "deit-s": "deit_small_patch16_224",
    "pvt-b1": "pvt_v2_b1",
    "convnext-t": "convnext_tiny",
}
CARDS = ("H200", "T4", "RTX 4090")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row: a model, how it is trained, and the card.

    Attributes:
        model: one of `SHORT`.
        batch: images a step.
        modules: local modules.
        precision: as for recipes.
        checkpoint: as for recipes.
        accumulation: parts of a batch.
        average: decay of an average of weights.
        offload: whether modules wait in host memory.
        overlap: blocks that two modules share.
        every_global: every so many-th step is end-to-end; 0 for none.
        optimizer: timm's name.
        card: one of `CARDS`.
        evaluation: images of an evaluation batch; 0 for none.
    """

    model: str
    batch: int = 32
    modules: int = 4
    precision: str = "bf16"
    checkpoint: str = "none"
    accumulation: int = 1
    average: float | None = None
    offload: bool = False
    overlap: int = 0
    every_global: int = 0
    optimizer: str = "adamw"
    card: str = "H200"
    evaluation: int = 0
    clip_grad: float | None = None

    @property
    def name(self) -> str:
        """What distinguishes it, for a file."""
        told = [self.model, f"b{self.batch}", f"k{self.modules}", self.precision]
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("model", "batch", "modules", "precision") and value != each.default:
                text = each.name if value is True else f"{each.name}-{value}"
                told.append(text.replace("/", "").replace(" ", "").lower())
        return "_".join(told)

    @property
    def convolves_inside(self) -> bool:
        """Whether its blocks hold convolutions, of which cuDNN is off here."""
        return self.model in ("pvt-b1", "convnext-t")


STEPS = 4


def build(row: Configuration, device: str) -> tuple[Any, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """The learner of a row, and its factory of optimizers; made on the processor, as on the simulated card are no values."""
    import timm

    import localgrad
    from localgrad.learner import make_ema
    from localgrad.training.optim import OptimizerFactory

    torch.manual_seed(0)
    model = timm.create_model(SHORT[row.model], num_classes=100)
    factory = OptimizerFactory(model, name=row.optimizer, lr=1e-3, weight_decay=0.05)
    learner = localgrad.LocalLearner(
        model,
        modules=row.modules,
        precision=row.precision,
        checkpoint=row.checkpoint,
        input_size=(3, 224, 224),
        accumulation=row.accumulation,
        ema_decay=row.average if row.offload else None,
        offload=row.offload,
        device=device if row.offload else None,
        overlap=row.overlap,
        clip_grad=row.clip_grad,
    )
    if not row.offload:  # in the order in which a run moves them
        learner.model.to(device)
        for module in learner.modules:
            module.to(device)
        learner._ema = make_ema(learner.model, row.average, on_host=False)
        learner.averaged_model = None if learner._ema is None else learner._ema.module
    return learner, factory


def kinds(row: Configuration) -> list[bool]:
    """Which steps are end-to-end."""
    return [bool(row.every_global) and step % row.every_global == 0 for step in range(1, STEPS + 1)]


def run_really(row: Configuration) -> dict[str, Any]:
    """Train under the simulated runtime: PyTorch's own figures, and the events."""
    from localgrad.objectives.carried import LocalBatch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10**7)
    learner, factory = build(row, "cuda")
    learner.configure_optimizers(factory)
    marks = [_taken()]

    def batch_of(size: int) -> LocalBatch:
        images = torch.empty(size, 3, 224, 224, device="cuda")
        return LocalBatch(images, torch.zeros(size, dtype=torch.long, device="cuda"))

    batch = result = None

    def step(is_global: bool) -> None:
        nonlocal batch, result
        batch = batch_of(row.batch)
        result = (learner.global_step_on if is_global else learner.step_on)(batch)
        marks.append(_taken())

    for is_global in kinds(row):
        step(is_global)
    if row.evaluation:
        learner.eval()
        images = logits = None
        for size in (row.evaluation, row.evaluation // 3):
            images = batch_of(size).features
            logits = list(learner.logits(images))
            if learner.averaged_model is not None:
                logits[-1] = learner.averaged_logits(images)
        del images, logits
        learner.train()
        marks.append(_taken())
        step(kinds(row)[-1])
    stats = torch.cuda.memory_stats()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    return {
        "allocated": stats["allocated_bytes.all.peak"],
        "reserved": stats["reserved_bytes.all.peak"],
        "marks": marks,
        "trace": [(e["action"], e["addr"], e["size"], e["stream"]) for e in trace],
    }


def _taken() -> int:
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def predict(row: Configuration) -> Any:
    """The trace of a row from the model alone."""
    from localgrad.estimating import record_run
    from localgrad.memory.cards import card_named

    learner, factory = build(row, "cpu")
    return record_run(
        learner,
        row.batch,
        factory,
        card_named(row.card),
        steps=STEPS,
        globally=kinds(row),
        evaluation_batch=row.evaluation or None,
        last_evaluation_batch=row.evaluation // 3 or None,
    )
