"""Predicted against PyTorch's own allocator, configuration by configuration: the table of research/docs/allocator.md.

    python -m research.benchmarks.allocator_table               # all that have no result yet
    python -m research.benchmarks.allocator_table swin-t --again # those whose name has it, anew
    python -m research.benchmarks.allocator_table --table       # the page of what is there

A configuration is predicted from the model alone (``localgrad.estimating.record_run``, replayed through the model in
``localgrad.memory.allocator``), and then runs the same real steps under the simulated CUDA runtime
(``research/simulated_card``), which has no kernels, but PyTorch's own caching allocator. Compared are the most bytes
allocated and reserved, and verdicts at twenty caps around the limit: the events that PyTorch's allocator recorded are
replayed through itself with ``set_per_process_memory_fraction``, those predicted through the model, and each cap counts
as the same where both fit or both run out.

Configurations of one model on one card share a process; the allocator is emptied in between, and has to be empty.
Results are committed as JSON under ``research/results/memory``, one file a configuration.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from localgrad.backbones.base import Backbone, split
from localgrad.estimating import record_run
from localgrad.learner import LocalLearner, make_ema
from localgrad.memory.allocator import CachingAllocator, Event, replay
from localgrad.memory.allocator_rules import fraction_of, rules_here
from localgrad.memory.cards import MIB, card_named
from localgrad.objectives.carried import LocalBatch
from localgrad.training.optim import OptimizerFactory
from research import simulated_card

RESULTS = Path(__file__).parents[1] / "results" / "memory"
PAGE = Path(__file__).parents[1] / "docs" / "allocator.md"
NUM_CAPS = 20
NUM_STEPS = 3
TOTAL = 1 << 37  # of the simulated card: nothing but a cap is the limit
SHORT = {
    "swin-t": "swin_tiny_patch4_window7_224",
    "swin-s": "swin_small_patch4_window7_224",
    "vit-s": "vit_small_patch16_224",
    "vit-b": "vit_base_patch16_224",
    "deit-s": "deit_small_patch16_224",
    "pvt-b1": "pvt_v2_b1",
    "convnext-t": "convnext_tiny",
}
SIZE = (3, 224, 224)


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
        clip_grad: largest norm of a gradient.
        card: as `localgrad.memory.cards` has it.
        evaluation: images of an evaluation batch, before one more step; 0 for none.
        last: images of a smaller last step; 0 for none.
    """

    model: str
    batch: int = 64
    modules: int = 4
    precision: str = "bf16"
    checkpoint: str = "none"
    accumulation: int = 1
    average: float | None = None
    offload: bool = False
    overlap: int = 0
    every_global: int = 0
    optimizer: str = "adamw"
    clip_grad: float | None = None
    card: str = "H200"
    evaluation: int = 0
    last: int = 0

    @property
    def told(self) -> list[str]:
        """What distinguishes it, in words."""
        told = []
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("model", "batch", "modules", "precision", "card") and value != each.default:
                told.append(each.name if value is True else f"{each.name} {value}")
        return told

    @property
    def name(self) -> str:
        """The same, for a file."""
        parts = [self.model, f"b{self.batch}", f"k{self.modules}", self.precision, *self.told, self.card]
        return "_".join(part.replace("/", "").replace(" ", "-").lower() for part in parts)

    @property
    def convolves_inside(self) -> bool:
        """Whether its blocks hold convolutions, of which cuDNN is off here."""
        return self.model in ("pvt-b1", "convnext-t")

    @property
    def kinds(self) -> list[bool]:
        """Which steps are end-to-end."""
        return [bool(self.every_global) and step % self.every_global == 0 for step in range(1, NUM_STEPS + 1)]


def _rows() -> Iterator[Configuration]:
    row = Configuration
    # H200
    yield row(model="swin-t")
    yield row(model="swin-t", precision="fp32")
    yield row(model="swin-t", precision="fp32", modules=1, checkpoint="blocks")
    yield row(model="swin-t", modules=1, evaluation=256)
    yield row(model="swin-t", checkpoint="halves/8")
    yield row(model="swin-t", modules=2, accumulation=4, average=0.999)
    yield row(model="swin-t", modules=6, overlap=1)
    yield row(model="swin-t", modules=3, offload=True)
    yield row(model="swin-t", every_global=2)
    yield row(model="swin-t", modules=8, optimizer="sgd", last=24)
    yield row(model="vit-b")
    yield row(model="vit-b", modules=1, checkpoint="blocks")
    yield row(model="vit-b", modules=2, precision="fp32", batch=32, clip_grad=1.0)
    yield row(model="vit-b", modules=6, offload=True, batch=32)
    yield row(model="vit-b", modules=3, average=0.999, evaluation=256)
    yield row(model="vit-b", modules=8, optimizer="lamb")
    yield row(model="vit-s", precision="fp32")
    yield row(model="vit-s", precision="fp16", batch=48)
    yield row(model="vit-s", modules=2, checkpoint="halves/4", every_global=2)
    yield row(model="vit-s", modules=3, optimizer="lion", accumulation=2, last=40)
    yield row(model="deit-s", modules=3, checkpoint="halves/4")
    yield row(model="deit-s", modules=1, precision="fp32", optimizer="sgd")
    yield row(model="deit-s", modules=5, overlap=1, average=0.99)
    yield row(model="swin-s", precision="fp32", batch=24, modules=8)
    yield row(model="swin-s", modules=2, checkpoint="blocks", batch=48)
    yield row(model="pvt-b1", modules=2)
    yield row(model="pvt-b1", modules=4, precision="fp32", batch=32)
    yield row(model="convnext-t", modules=4)
    yield row(model="convnext-t", modules=1, precision="fp32", batch=32, checkpoint="blocks")
    # T4
    yield row(model="swin-t", card="T4", precision="fp32", batch=32)
    yield row(model="swin-t", card="T4", precision="fp16", modules=2, checkpoint="blocks")
    yield row(model="swin-t", card="T4", precision="fp16", modules=6, evaluation=256, average=0.999)
    yield row(model="vit-s", card="T4", precision="fp16", modules=1, checkpoint="blocks")
    yield row(model="vit-s", card="T4", precision="fp16", modules=4, accumulation=2)
    yield row(model="vit-s", card="T4", precision="fp32", modules=3, offload=True)
    yield row(model="convnext-t", card="T4", precision="fp16", modules=2)
    # RTX 4090
    yield row(model="swin-t", card="RTX 4090")
    yield row(model="swin-t", card="RTX 4090", modules=2, checkpoint="halves/4", accumulation=2)
    yield row(model="swin-t", card="RTX 4090", precision="fp32", modules=3, every_global=3, optimizer="sgd")
    yield row(model="vit-b", card="RTX 4090", modules=4, clip_grad=1.0)
    yield row(model="vit-b", card="RTX 4090", modules=2, checkpoint="blocks", evaluation=128)
    yield row(model="vit-b", card="RTX 4090", precision="fp16", modules=1, checkpoint="halves/4", batch=32)
    yield row(model="deit-s", card="RTX 4090", modules=4, overlap=1)
    yield row(model="deit-s", card="RTX 4090", precision="fp32", modules=2, optimizer="adamw", last=17)


ROWS = tuple(_rows())


# -- one configuration ------------------------------------------------------------------------------------


def learner_of(row: Configuration, backbone: Backbone) -> LocalLearner:
    """The learner of a row, on the processor: what it is made of needs values, and a simulated card has none."""
    return LocalLearner(
        backbone,
        modules=row.modules,
        precision=row.precision,
        checkpoint=row.checkpoint,
        accumulation=row.accumulation,
        ema_decay=row.average,
        overlap=row.overlap,
        clip_grad=row.clip_grad,
        **({"offload": True, "device": "cuda"} if row.offload else {}),
    )


def put_on_card(learner: LocalLearner, row: Configuration) -> None:
    """Move it, and make its average, in the order of a run."""
    if row.offload:
        return
    learner.model.to("cuda")
    for module in learner.modules:
        module.to("cuda")
    learner._ema = make_ema(learner.model, row.average, on_host=False)
    learner.averaged_model = None if learner._ema is None else learner._ema.module


def batch_of(number: int, learner: LocalLearner) -> LocalBatch:
    """A batch as it comes, on the card."""
    images = torch.empty(number, *learner.backbone.input_size, device="cuda")
    return LocalBatch(images, torch.zeros(number, dtype=torch.long, device="cuda"))


def train_really(learner: LocalLearner, row: Configuration, optimizer: Any) -> list[Event]:
    """Run the steps of a row on the card; the events, as PyTorch's allocator saw them."""
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10**7)
    put_on_card(learner, row)
    learner.configure_optimizers(optimizer)
    batch = result = None  # the last ones are held until there are others, as by the trainer

    def step(size: int, *, is_global: bool) -> None:
        nonlocal batch, result
        batch = batch_of(size, learner)
        result = (learner.global_step_on if is_global else learner.step_on)(batch)

    for is_global in row.kinds:
        step(row.batch, is_global=is_global)
    if row.last:
        step(row.last, is_global=row.kinds[-1])
    if row.evaluation:
        evaluate(learner, row)
        step(row.batch, is_global=row.kinds[-1])
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    return events_of(trace)


def evaluate(learner: LocalLearner, row: Configuration) -> None:
    """Two batches of evaluation, the last one smaller."""
    learner.eval()
    images = logits = None
    for size in (row.evaluation, row.evaluation // 3):
        images = batch_of(size, learner).features
        logits = list(learner.logits(images))
        if learner.averaged_model is not None:
            logits[-1] = learner.averaged_logits(images)
    del images, logits
    learner.train()


def events_of(trace: Sequence[dict[str, Any]]) -> list[Event]:
    """PyTorch's record as events; its side streams are numbered from 1."""
    events: list[Event] = []
    live: dict[int, int] = {}
    streams = {0: 0}
    number = 0
    for entry in trace:
        if entry["action"] == "alloc":
            stream = streams.setdefault(entry["stream"], len(streams))
            events.append((number, entry["size"], stream) if stream else (number, entry["size"]))
            live[entry["addr"]] = number
            number += 1
        elif entry["action"] == "free_completed":
            events.append((live.pop(entry["addr"]), -1))
    return events


def empty_card() -> None:
    """Have the allocator as it was before anything ran.

    Raises:
        RuntimeError: something is still there.
    """
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    if torch.cuda.memory_reserved():
        raise RuntimeError(f"{torch.cuda.memory_reserved():,} bytes are still reserved")
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()


def fits_really(events: Sequence[Event], cap: int, side: int) -> bool:
    """Whether PyTorch's own allocator runs events under a cap."""
    torch.cuda.set_per_process_memory_fraction(fraction_of(cap, torch.cuda.get_device_properties(0).total_memory))
    held: dict[int, int] = {}
    fits = True
    for number, nbytes, *stream in events:
        if nbytes < 0:
            torch._C._cuda_cudaCachingAllocator_raw_delete(held.pop(number))
            continue
        try:
            held[number] = torch._C._cuda_cudaCachingAllocator_raw_alloc(nbytes, side if stream else 0)
        except torch.OutOfMemoryError:
            fits = False
            break
    for address in held.values():
        torch._C._cuda_cudaCachingAllocator_raw_delete(address)
    torch.cuda.set_per_process_memory_fraction(1.0)
    empty_card()
    return fits


def compare(row: Configuration, backbone: Backbone) -> dict[str, Any]:
    """Predict a row, run it, and hold one against the other."""
    start = time.perf_counter()
    optimizer = OptimizerFactory(backbone.model, name=row.optimizer, lr=1e-3, weight_decay=0.05)
    learner = learner_of(row, backbone)
    trace = record_run(
        learner,
        row.batch,
        optimizer,
        card_named(row.card),
        steps=NUM_STEPS,
        last_batch=row.last or None,
        evaluation_batch=row.evaluation or None,
        last_evaluation_batch=row.evaluation // 3 or None,
        globally=row.kinds,
        cudnn=False,
    )
    predicted, seconds = replay(trace.events, CachingAllocator()), time.perf_counter() - start
    events = train_really(learner, row, optimizer)
    stats = torch.cuda.memory_stats()
    allocated, reserved = (stats[f"{kind}_bytes.all.peak"] for kind in ("allocated", "reserved"))
    learner._executor = None
    learner.backbone.cpu()
    del learner
    gc.collect()
    empty_card()
    side = torch.cuda.Stream().cuda_stream  # type: ignore[no-untyped-call]
    first, last = int(0.97 * allocated), reserved + 24 * MIB
    caps = [first + at * (last - first) // (NUM_CAPS - 1) for at in range(NUM_CAPS)]
    really = [fits_really(events, cap, side) for cap in caps]
    foretold = [replay(trace.events, CachingAllocator(cap)).fits for cap in caps]
    return {
        "configuration": asdict(row),
        "torch": torch.__version__,
        "rules": str(rules_here()),
        "attention": trace.attention,
        "allocated": allocated,
        "reserved": reserved,
        "predicted_allocated": predicted.allocated_bytes,
        "predicted_reserved": predicted.reserved_bytes,
        "caps": caps,
        "fits": really,
        "predicted_fits": foretold,
        "seconds_of_prediction": round(seconds, 1),
    }


def run_group(names: Sequence[str], *, as_json: bool) -> None:
    """In a process on the simulated card: rows of one model, their results written (or printed) as they come."""
    import timm

    rows = [row for row in ROWS if row.name in names]
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = split(timm.create_model(SHORT[rows[0].model], num_classes=100), SIZE)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    for row in rows:
        try:
            result = compare(row, backbone)
        except Exception as error:  # one that fails may leave something behind; the others have their own process
            print(f"{row.name}: {type(error).__name__}: {error}", flush=True)
            return
        if as_json:
            print(json.dumps(result), flush=True)
            continue
        (RESULTS / f"{row.name}.json").write_text(json.dumps(result) + "\n")
        print(line_of(result), flush=True)


# -- all of them ------------------------------------------------------------------------------------------


def off(result: dict[str, Any], kind: str) -> float:
    """How far a prediction is off, as a share."""
    return float(result[f"predicted_{kind}"] / result[kind] - 1)


def num_same(result: dict[str, Any]) -> int:
    """At how many caps the verdicts are the same."""
    return sum(a == b for a, b in zip(result["fits"], result["predicted_fits"], strict=True))


def line_of(result: dict[str, Any]) -> str:
    """A row of the table."""
    row = Configuration(**result["configuration"])
    who = [row.model, row.card, str(row.batch), str(row.modules), row.precision, ", ".join(row.told)]
    figures = [f"{result[kind] / MIB:,.0f} | {off(result, kind):+.2%}" for kind in ("allocated", "reserved")]
    same = f"{num_same(result)} of {len(result['caps'])}"
    return f"| {' | '.join([*who, *figures, same])} |"


def results() -> list[dict[str, Any]]:
    """All that there are, in the order of `ROWS`."""
    paths = [RESULTS / f"{row.name}.json" for row in ROWS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def page(found: Sequence[dict[str, Any]]) -> str:
    """The page of documentation."""
    plain = [result for result in found if not Configuration(**result["configuration"]).convolves_inside]
    near = sum(abs(off(result, "reserved")) <= 0.005 for result in plain)
    worst, worst_of_all = (max(abs(off(result, "reserved")) for result in which) for which in (plain, found))
    same, caps = sum(map(num_same, found)), sum(len(result["caps"]) for result in found)
    versions = sorted({result["torch"] for result in found})
    rules = sorted({result["rules"] for result in found})
    head = (
        "| model | card | batch | K | precision | more | allocated, MiB | predicted | reserved, MiB | predicted "
        "| verdicts the same |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [
        "# Predicted memory against PyTorch's own allocator",
        "",
        "PyTorch's allocator, simulated runtime, no GPU. Made by `research/benchmarks/allocator_table.py`;",
        "results in `research/results/memory/`. cuDNN is off.",
        "",
        f"torch {', '.join(versions)}; {'; '.join(rules)}.",
        f"{len(found)} of {len(ROWS)} configurations of 224 x 224 pixels, 100 classes; three steps from an empty",
        "allocator, and what *more* names. Swin's attention is written out in timm; ViT's, DeiT's and PVT's",
        "is fused, and its kernel follows card and precision.",
        "",
        f"* Reserved within 0.5 % in {near} of {len(plain)} without convolutions inside blocks; worst {worst:.2%},",
        f"  with them {worst_of_all:.2%}.",
        f"* Verdicts (fits, or runs out) the same at {same} of {caps} caps, {same / caps:.1%}: from 0.97 x",
        "  allocated to 24 MiB above reserved. Real verdicts: recorded events replayed through PyTorch's own",
        "  allocator under `set_per_process_memory_fraction`.",
        "",
        head,
        *map(line_of, found),
        "",
        "What isn't shown: any figure of a real GPU; cuDNN's workspaces, which are the card's own choice;",
        "compiled code. The simulated card has the shared memory of an H100 whatever its name, by which",
        "memory-efficient attention chooses a kernel for wide heads in float32.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="those whose name has any of these")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--table", action="store_true", help="write the page of what is there")
    parser.add_argument("--group", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group:
        run_group(options.names, as_json=options.json)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.table:
        PAGE.write_text(page(results()))
        return
    wanted = [row for row in ROWS if not options.names or any(name in row.name for name in options.names)]
    wanted = [row for row in wanted if options.again or not (RESULTS / f"{row.name}.json").exists()]
    key: Callable[[Configuration], tuple[str, str]] = lambda row: (row.card, row.model)  # noqa: E731
    for (card, _), rows in groupby(sorted(wanted, key=key), key):
        ran = simulated_card.run(
            Path(__file__),
            "--group",
            *(row.name for row in rows),
            card=card_named(card),
            total_bytes=TOTAL,
            timeout=7200,
        )
        print(ran.out, end="", flush=True)
        if ran.code:
            print(ran.err, file=sys.stderr)


if __name__ == "__main__":
    main()
