"""What the planner says of a card, beside what the card does: one table in six minutes, and a verdict.

    python -m research.gpu_check                                             # on the GPU; commit what it prints
    python -m research.gpu_check --device cpu --small                        # a processor: no allocator, no launches
    python -m research.simulated_card --script research/gpu_check.py --small # no GPU: times are left out

Each row is a way to train one model. Its bytes are predicted first, from fake tensors alone: `estimating.record_run`
writes down what the run asks of the allocator, and `memory.allocator` replays it. Then the same steps are run for real.

    allocated, reserved   PyTorch's own figures; expected: those of the replay
    cap                   the run under the smallest cap that the replay says will do, and under one in which the
                          replay says it won't; expected: the same of both
    time                  of a step, as a multiple of the first row's; expected: the planner's, from operator counts
    launches              of a step; expected: at most `MOST_LAUNCHES` times those of the first row of its precision
    waits                 of the host for the card, in a step; expected: none

Every row stands alone: what fails is told in its line, and the next one is run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from torch import nn

import localgrad
from localgrad.app.fitting import device_name, versions
from localgrad.estimating import estimate_step, record_run
from localgrad.memory.allocator import CachingAllocator, Replay, replay
from localgrad.memory.allocator_rules import fraction_of, rules_here
from localgrad.memory.cards import Card, card_here
from localgrad.memory.costs import CostSettings
from localgrad.memory.parts import measure_costs
from localgrad.memory.recording import Trace
from localgrad.objectives.carried import LocalBatch
from localgrad.partition import Checkpointing
from localgrad.units import format_bytes
from research.simulated_card import inside

MIB = 1 << 20
STEPS = 3
ALLOCATED_OFF, RESERVED_OFF, ESTIMATE_OFF = 0.01, 0.02, 0.03
"""How far predictions may be off, as a share: those of the replay, and on a processor that of the estimate."""
CONVOLUTION_BYTES = 64 * MIB
"""May come on top on a real card: cuDNN's workspace for the convolution that makes patches."""
TIME_OFF = 0.35
"""How far a predicted multiple of a step's time may be off: it is a roofline, not a measurement."""
MOST_LAUNCHES = 3.0
MOST_LAUNCHES_IN_CHUNKS = 6.0
"""Where halves of blocks run over four chunks of the batch, twice each."""
LOSSES_OFF = 2e-3
"""How far losses may be off the processor's after three steps in fp32: sums come in another order."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to train.

    Attributes:
        name: for the table.
        modules: local modules.
        precision: as for recipes.
        checkpoint: as for recipes.
        compiled: whether blocks are compiled; then bytes can't be predicted, and are only shown.
    """

    name: str
    modules: int = 1
    precision: str = "fp32"
    checkpoint: str = "none"
    compiled: bool = False


ROWS = (
    Row(name="end-to-end"),
    Row(name="checkpointing", checkpoint="blocks"),
    Row(name="K=2", modules=2),
    Row(name="K=4", modules=4),
    Row(name="bf16", precision="bf16"),
    Row(name="K=4-bf16", modules=4, precision="bf16"),
    Row(name="K=4-halves", modules=4, precision="bf16", checkpoint="halves/4"),
    Row(name="compiled", modules=4, precision="bf16", compiled=True),
)


@dataclass(kw_only=True)
class Seen:
    """What is known of a row.

    Attributes:
        cells: of the table, by column.
        wrong: what isn't as expected.
    """

    cells: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def compare(self, column: str, expected: float, seen: float, *, off: float, more: float = 0.0) -> None:
        """Two figures in bytes beside one another.

        Args:
            column: of the table.
            expected: what was predicted.
            seen: what was observed.
            off: by which share they may differ.
            more: what may come on top.
        """
        share = seen / expected - 1
        self.cells[column] = f"{format_bytes(expected)} / {format_bytes(seen)} ({share:+.1%})"
        if not -off * expected <= seen - expected <= off * expected + more:
            self.wrong.append(f"{column} {share:+.1%}")


class Check:
    """Rows on one device.

    Args:
        device: where they are run.
        small: a small model and batch, for where there is no card.
    """

    def __init__(self, device: torch.device, *, small: bool) -> None:
        is_any_card = device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_any_card else device
        self.small = small
        self.on_card = device.type == "cuda"
        self.is_simulated = self.on_card and inside.is_here()
        self.card: Card | None = card_here(str(device)) if self.on_card else None
        self.batch_size = 8 if small else 64
        self._first: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------ what is run

    def model(self) -> nn.Module:
        """The same weights each time, on the processor."""
        torch.manual_seed(0)
        if not self.small:
            return timm.create_model("swin_tiny_patch4_window7_224", num_classes=100, drop_path_rate=0.0)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
        return timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)

    def learner(self, row: Row) -> localgrad.LocalLearner:
        """As a row says, on the processor, without optimizers."""
        size = (3, 32, 32) if self.small else (3, 224, 224)
        settings: dict[str, Any] = {"precision": row.precision, "checkpoint": row.checkpoint, "compile": row.compiled}
        return localgrad.LocalLearner(self.model(), modules=row.modules, input_size=size, **settings)

    def moved(self, learner: localgrad.LocalLearner) -> localgrad.LocalLearner:
        """Put a learner on the device, as a run does, with optimizers."""
        learner.model.to(self.device)
        for module in learner.modules:
            module.to(self.device)
        learner.configure_optimizers(adamw)
        return learner

    def batch(self, learner: localgrad.LocalLearner) -> LocalBatch:
        """Images and labels, made on the device as the data path makes them."""
        images = torch.zeros(self.batch_size, *learner.backbone.input_size, device=self.device)
        return LocalBatch(images, torch.zeros(self.batch_size, dtype=torch.long, device=self.device))

    def run(self, row: Row) -> localgrad.LocalLearner:
        """Train for some steps."""
        learner = self.moved(self.learner(row))
        held: Any = None
        for _ in range(STEPS):
            batch = self.batch(learner)
            held = (batch, learner.step_on(batch))
        del held
        return learner

    # ------------------------------------------------------------------------------------------------ the columns

    def row(self, row: Row) -> Seen:
        """Everything about one row."""
        seen = Seen()
        learner = self.learner(replace(row, compiled=False))
        estimate = estimate_step(learner, self.batch_size, adamw, self.device).peak_bytes
        seen.cells["estimate"] = format_bytes(estimate)
        if self.on_card:
            assert self.card is not None, "there is a card"
            self._bytes(seen, row, record_run(learner, self.batch_size, adamw, self.card, steps=STEPS))
        with self._clean():
            learner = self.run(row)
            if not self.on_card:
                images = torch.zeros(self.batch_size, *learner.backbone.input_size)
                labels = torch.zeros(self.batch_size, dtype=torch.long)
                observed = localgrad.measure(learner, images, labels, repeats=1, warmup=1).peak_bytes
                seen.compare("allocated", estimate, observed, off=1.0 if row.compiled else ESTIMATE_OFF)
            if self.on_card:
                self._launches(seen, row, learner)
            if not self.is_simulated:
                self._time(seen, row, learner)
            del learner
        return seen

    def _bytes(self, seen: Seen, row: Row, trace: Trace) -> None:
        """Allocated and reserved bytes, and the run under two caps."""
        assert self.card is not None, "there is a card"
        expected = self._replayed(trace, self.card.total_bytes)
        more = 0 if self.is_simulated else CONVOLUTION_BYTES
        with self._clean():
            self.run(row)
            allocated, reserved = (
                read(self.device) for read in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
            )
        off = 1.0 if row.compiled else 0.0
        seen.compare("allocated", expected.allocated_bytes, allocated, off=ALLOCATED_OFF + off, more=more)
        seen.compare("reserved", expected.reserved_bytes, reserved, off=RESERVED_OFF + off, more=more)
        if row.compiled:
            return
        low, high = self._caps(trace, expected)
        fits = [self._fits(row, cap_bytes + more) for cap_bytes in (high, low)]
        seen.cells["cap"] = f"{format_bytes(high)} {_told(fits[0])}, {format_bytes(low)} {_told(fits[1])}"
        if fits != [True, False]:
            seen.wrong.append("cap")

    def _replayed(self, trace: Trace, cap_bytes: int) -> Replay:
        assert self.card is not None, "there is a card"
        total = self.card.total_bytes
        allocator = CachingAllocator(cap_bytes, free_bytes=total, total_bytes=total, rules=rules_here())
        return replay(trace.events, allocator)

    def _caps(self, trace: Trace, expected: Replay) -> tuple[int, int]:
        """A cap that won't do and one that will, the first above it, two per cent apart at most."""
        step = max(2 * MIB, expected.allocated_bytes // 50)
        low = expected.allocated_bytes - step
        while not self._replayed(trace, low + step).fits:
            low += step
        return low, low + step

    def _fits(self, row: Row, cap_bytes: int) -> bool:
        total = torch.cuda.get_device_properties(self.device).total_memory
        with self._clean():
            torch.cuda.set_per_process_memory_fraction(fraction_of(cap_bytes, total), self.device)
            try:
                self.run(row)
            except localgrad.LocalgradError:  # memory ran out in a step
                return False
            except torch.OutOfMemoryError:
                return False
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        return True

    def _launches(self, seen: Seen, row: Row, learner: localgrad.LocalLearner) -> None:
        """Kernels of a step, and whether the host waits for the card in it."""
        count = _simulated_launches if self.is_simulated else _profiled_launches
        launches = count(lambda: learner.step_on(self.batch(learner)))
        first = self._first.setdefault(f"launches in {row.precision}", launches)
        seen.cells["launches"] = f"{launches:,.0f} ({launches / first:.2f} x)"
        most = MOST_LAUNCHES_IN_CHUNKS if "/" in str(row.checkpoint) else MOST_LAUNCHES
        if launches > most * first and not row.compiled:
            seen.wrong.append("launches")
        batch = self.batch(learner)
        torch.cuda.synchronize(self.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            learner.step_on(batch)
            seen.cells["waits"] = "none"
        except RuntimeError as error:
            seen.cells["waits"] = str(error).splitlines()[0][:40]
            seen.wrong.append("waits")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _time(self, seen: Seen, row: Row, learner: localgrad.LocalLearner) -> None:
        """Seconds of a step, as a multiple of the first row's."""
        found = []
        for _ in range(2 if self.small else 10):
            batch = self.batch(learner)
            self._synchronize()
            start = time.perf_counter()
            learner.step_on(batch)
            self._synchronize()
            found.append(time.perf_counter() - start)
        seconds = statistics.median(found)
        ratio = seconds / self._first.setdefault("seconds", seconds)
        expected = self._predicted_ratio(row, learner)
        seen.cells["time"] = f"{expected:.2f} / {ratio:.2f} x ({1e3 * seconds:.1f} ms)"
        if self.on_card and not row.compiled and abs(ratio / expected - 1) > TIME_OFF:
            seen.wrong.append(f"time {ratio / expected - 1:+.0%}")

    def _predicted_ratio(self, row: Row, learner: localgrad.LocalLearner) -> float:
        how = Checkpointing.parse(row.checkpoint)
        settings = CostSettings(batch_size=self.batch_size, precision=row.precision, device=self.device.type)
        costs = measure_costs(learner.backbone, learner.objective, adamw, settings)
        time_of = sum(costs.choice(span.start, span.stop, how).nanoseconds for span in learner.plan.spans)
        return time_of / self._first.setdefault("nanoseconds", time_of)

    def losses(self) -> Seen:
        """Three steps of four modules in fp32, on a small model, beside the processor's."""
        small = Check(self.device, small=True)
        found = []
        for device in (torch.device("cpu"), self.device):
            small.device = device
            learner = small.moved(small.learner(Row(name="losses", modules=4)))
            generator = torch.Generator().manual_seed(1)
            images = torch.randn(8, *learner.backbone.input_size, generator=generator).to(device)
            labels = torch.arange(8, device=device)
            found.append(
                torch.tensor([[float(loss) for loss in learner.step(images, labels).losses] for _ in range(3)])
            )
        off = float(((found[1] - found[0]) / found[0]).abs().max())
        return Seen(wrong=[] if off <= LOSSES_OFF else [f"losses are off the processor's by {off:.1e}"])

    # --------------------------------------------------------------------------------------------------- between

    def _synchronize(self) -> None:
        if self.on_card:
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def _clean(self) -> Iterator[None]:
        """A region that begins with an allocator that holds nothing, and ends so."""
        self._empty()
        try:
            yield
        finally:
            self._empty()

    def _empty(self) -> None:
        gc.collect()
        if self.on_card:
            torch._C._cuda_clearCublasWorkspaces()  # type: ignore[attr-defined]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What all rows are trained with."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def _told(fits: bool) -> str:  # noqa: FBT001  # the value itself
    return "runs" if fits else "runs out"


def _simulated_launches(step: Callable[[], object]) -> float:
    inside.reset()
    step()
    counts = inside.counts()
    return counts["launches"] + counts["products"]


def _profiled_launches(step: Callable[[], object]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kinds = ("Memcpy", "Memset")
    return sum(1 for event in profiler.events() if not event.name.startswith(kinds))


def main() -> int:
    """Run all rows; the exit status is the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a small model and batch")
    parser.add_argument("--seconds", type=float, default=360, help="no row is begun after so long")
    parser.add_argument("--leave-out", default="", help="rows, by name, with commas between")
    given = parser.parse_args()
    start, device = time.monotonic(), torch.device(given.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    check = Check(device, small=given.small)
    what = "PyTorch's allocator, simulated card, no GPU" if check.is_simulated else device_name(device)
    print(f"{what}; {', '.join(f'{name} {number}' for name, number in versions().items())}")
    if check.card is not None:
        print(f"{check.card}; allocator: {rules_here()}")
    print(f"batch {check.batch_size}; each cell: expected / seen; x: multiples of the first row's\n")
    left_out, wrong, count = given.leave_out.split(","), [], 0
    if check.is_simulated:
        left_out.append("compiled")  # there is nothing that could run what is compiled
    rows: list[tuple[str, Callable[[], Seen]]] = [("losses", check.losses)]
    rows += [(row.name, lambda row=row: check.row(row)) for row in ROWS]  # type: ignore[misc]
    for name, look in rows:
        late = time.monotonic() - start > given.seconds
        if name in left_out or late:
            print(f"{name}: left out{', as time is up' if late else ''}")
            continue
        count += 1
        try:
            seen = look()
        except Exception as error:  # told, and the next row is run
            seen = Seen(wrong=[f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"])
        cells = "".join(f"  {column} {text}" for column, text in seen.cells.items())
        print(
            f"{name}:{cells}  {'NOT AS EXPECTED: ' + '; '.join(seen.wrong) if seen.wrong else 'as expected'}",
            flush=True,
        )
        wrong += [f"{name} ({'; '.join(seen.wrong)})"] if seen.wrong else []
    if wrong:
        print(f"\nverdict: {count - len(wrong)} of {count} rows are as expected; not: {', '.join(wrong)}")
    else:
        print(f"\nverdict: all {count} rows are as expected")
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
