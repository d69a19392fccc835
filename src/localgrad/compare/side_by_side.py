"""Methods side by side: estimated and measured peak memory, step times as ratios, the Pareto front.

All methods run in one process on the same batch. First each one alone warms up and has the memory of one step measured;
then come the timed repeats, in each of which every method has its turn, in an order that rotates from repeat to repeat.
A method's time ratio is the median over repeats of its time to the plain loop's *in the same repeat* (and precision),
so that a slow minute of a shared machine weighs on both; the spread is the least and the greatest ratio.

One model is trained by all in turn. While others run, a method's own tensors are parked in host memory, and batches lie
there too: so on CUDA the device holds in every turn what it would hold if that method were alone. The step gets a batch
that it may give away, as from the data path. On a processor nothing is parked: only what the method itself holds and
allocates is counted (``measuring.py``).

A method that fails (out of memory, a compiler's error) leaves its row with the reason; the others go on.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from localgrad.compare.contenders import END_TO_END, Contender, Local, Runner, Stage
from localgrad.compare.measuring import peak_of, timed
from localgrad.errors import MemoryExceeded, RecipeError, reason_of
from localgrad.formats import Json, check_format
from localgrad.memory.track import MemoryProfile
from localgrad.objectives.carried import LocalBatch
from localgrad.step.executor import out_of_memory
from localgrad.units import format_bytes

FORMAT = 1
TIMELINE_BINS = 600
SETTLING_STEPS = {"cuda": 1, "cpu": 0}  # the caching allocator still holds what fitted the method before
STEPS_A_TURN = {"cuda": 3, "cpu": 1}
Timeline = list[tuple[float, int]]
Report = Callable[[str, int], None]
"""Told what comes next, and how many turns there are in all."""


@dataclass(kw_only=True)
class Row:
    """What is known of one method. Bytes, seconds; ratios are to the plain loop in the same precision.

    Attributes:
        name: of the method.
        family: ``end-to-end``, ``recomputed``, ``local`` or ``local, recomputed``.
        precision: ``fp32`` or ``bf16``.
        compile: through ``torch.compile``.
        num_modules: local modules; ``None`` for plain loops.
        baseline: name of the row that ratios are to.
        estimated_peak_bytes: ``None`` where it can't be known without running (compiled), or the estimate failed.
        measured_peak_bytes: of tensors allocated at once.
        reserved_peak_bytes: what the CUDA allocator held; ``None`` on a processor.
        estimated_peak_ratio: to the baseline's estimate.
        measured_peak_ratio: to the baseline's measurement.
        seconds: of each repeat's step; ``None`` where it failed.
        step_seconds: time ratio times the baseline's median, so that drift of the machine is out of it.
        time_ratio: median over repeats.
        time_ratio_range: least and greatest.
        images_per_second: at ``step_seconds``.
        images_per_second_range: at the slowest and the fastest ratio.
        is_pareto: no other method of this precision is at least as fast and as small, and better in one of the two.
        error: why something is missing.
    """

    name: str
    family: str
    precision: str
    compile: bool
    num_modules: int | None
    baseline: str
    estimated_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    estimated_peak_ratio: float | None = None
    measured_peak_ratio: float | None = None
    seconds: list[float | None] = field(default_factory=list)
    step_seconds: float | None = None
    time_ratio: float | None = None
    time_ratio_range: tuple[float, float] | None = None
    images_per_second: float | None = None
    images_per_second_range: tuple[float, float] | None = None
    is_pareto: bool = False
    error: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Measured, or else estimated."""
        return self.estimated_peak_bytes if self.measured_peak_bytes is None else self.measured_peak_bytes


class About(TypedDict, total=False):
    """Under which circumstances a comparison was made; what isn't known is left out."""

    model: str
    input_size: list[int]
    num_classes: int
    batch_size: int
    data: str
    device: str
    device_type: str
    num_threads: int
    versions: dict[str, str]
    date: str
    command: str
    settings: dict[str, Json]
    notes: list[str]
    is_interrupted: bool


@dataclass(kw_only=True)
class Comparison:
    """The rows, and under which circumstances they were found.

    Attributes:
        about: model, batch size, device, versions, date, command, settings.
        rows: one a method.
        timelines: where they were asked for, of some methods: bytes alive over one estimated step, as (share of its
            operators, bytes).
    """

    about: About
    rows: list[Row]
    timelines: dict[str, Timeline] = field(default_factory=dict)

    def to_json(self) -> str:
        """Everything, as JSON text."""
        values = {"format": FORMAT, **asdict(self)}
        if not self.timelines:
            del values["timelines"]
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read what ``to_json`` wrote.

        Raises:
            RecipeError: the text is something else.
        """
        try:
            values = json.loads(text)
            check_format("comparison", values["format"], FORMAT, RecipeError, oldest=FORMAT)
            return cls(
                about=values["about"],
                rows=[Row(**{name: _restored(name, value) for name, value in row.items()}) for row in values["rows"]],
                timelines={
                    name: [(float(x), int(y)) for x, y in points]
                    for name, points in values.get("timelines", {}).items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"comparison: this is not the JSON of a comparison ({error!r}).") from error


def _restored(name: str, value: Any) -> Any:
    return tuple(value) if name.endswith("_range") and value is not None else value


def compare(
    stage: Stage,
    methods: Sequence[Contender],
    images: Tensor,
    labels: Tensor,
    *,
    repeats: int = 3,
    warmup: int = 1,
    estimate_only: bool = False,
    timelines: bool = False,
    about: About | None = None,
    report: Report = lambda *_: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Estimate, measure and time methods.

    Args:
        stage: model, optimizer, batch size, device.
        methods: distinct by name; the plain loop of each precision is the baseline of its rows.
        images: [B, C, H, W] in host memory.
        labels: [B], likewise.
        repeats: timed turns of every method.
        warmup: steps of each method before its memory is measured.
        estimate_only: run nothing.
        timelines: keep the bytes alive over one step of the methods that are worth drawing.
        about: circumstances to be kept with the result.
        report: called once a turn.
        clock: in seconds.
    """
    assert len(images) == stage.batch_size, "estimates are for the batch that is run"
    rows = [
        Row(
            name=method.name,
            family=method.family,
            precision=method.precision,
            compile=method.compile,
            num_modules=method.num_modules if isinstance(method, Local) else None,
            baseline=END_TO_END if method.precision == "fp32" else f"{END_TO_END}, {method.precision}",
        )
        for method in methods
    ]
    profiles: dict[str, MemoryProfile] = {}
    turns = len(methods) * (1 if estimate_only else 2 + repeats)

    def say(text: str) -> None:
        report(text, turns)

    for method, row in zip(methods, rows, strict=True):
        say(f"estimating {method.name}")
        with _failing(row, stage, "the estimate failed: "):
            profile = method.estimate(stage)
            if profile is not None:
                profiles[method.name] = profile
                row.estimated_peak_bytes = profile.peak_bytes
    is_interrupted = False
    if not estimate_only:
        kept = LocalBatch(images, labels)
        try:
            _run_contenders(stage, methods, rows, kept, repeats=repeats, warmup=warmup, say=say, clock=clock)
        except KeyboardInterrupt:  # hours of work may be behind it: what was measured is told
            is_interrupted = True
    summarise(rows, stage.batch_size)
    told = [name for name in _worth_drawing(rows) if name in profiles] if timelines else []
    drawn = {name: envelope(profiles[name].timeline, TIMELINE_BINS) for name in told}
    return Comparison(about={**(about or About()), "is_interrupted": is_interrupted}, rows=rows, timelines=drawn)


def _run_contenders(
    stage: Stage,
    methods: Sequence[Contender],
    rows: Sequence[Row],
    kept: LocalBatch,
    *,
    repeats: int,
    warmup: int,
    say: Callable[[str], None],
    clock: Callable[[], float],
) -> None:
    """Fill in what is measured."""
    device = stage.device

    def fresh() -> LocalBatch:
        assert kept.images is not None
        return LocalBatch(kept.images.to(device, copy=True), kept.labels.to(device, copy=True))

    runners: dict[str, Runner] = {}
    for method, row in zip(methods, rows, strict=True):
        say(f"warming up {method.name}")
        with _failing(row, stage):
            _check_room(row, device)
            runner = method.build(stage)
            with runner.on_stage(device):
                for _ in range(warmup):
                    runner.step(fresh())
                # The batch is made inside: the profiler doesn't see that what it has not seen made is freed.
                found = peak_of(lambda: runner.step(fresh()), device, [stage.backbone.model, *runner.own])  # noqa: B023
            row.measured_peak_bytes, row.reserved_peak_bytes = found
            runners[method.name] = runner
    by_name = {row.name: row for row in rows}
    for repeat in range(repeats):
        order = rotated([row.name for row in rows if row.name in runners], repeat)
        for row in rows:
            row.seconds.append(None)
        for name in order:
            say(f"repeat {repeat + 1} of {repeats}: {name}")
            row = by_name[name]
            with _failing(row, stage):
                row.seconds[-1] = _turn(runners[name], fresh, device, clock)
            if row.seconds[-1] is None:
                del runners[name]


def rotated(names: Sequence[str], repeat: int) -> list[str]:
    """The order of turns in a repeat: everybody is first once before anybody is twice."""
    shift = repeat % len(names) if names else 0
    return [*names[shift:], *names[:shift]]


def _turn(runner: Runner, fresh: Callable[[], LocalBatch], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of a step, the median of a few on CUDA."""
    with runner.on_stage(device):
        for _ in range(SETTLING_STEPS[device.type]):
            runner.step(fresh())
        found = []
        for _ in range(STEPS_A_TURN[device.type]):
            batch = fresh()
            found.append(timed(lambda: runner.step(batch), device, clock))  # noqa: B023  # called at once
    return statistics.median(found)


@contextmanager
def _failing(row: Row, stage: Stage, prefix: str = "") -> Iterator[None]:
    """Turn what goes wrong inside into a row's ``error``, and free what the step left."""
    try:
        yield
    except Exception as error:
        said = reason_of(error, limit=200)
        if isinstance(error, MemoryExceeded) or (isinstance(error, RuntimeError) and out_of_memory(error) is not None):
            row.error = "out of memory"
        else:
            row.error = prefix + (said if isinstance(error, _NoRoomError) else f"{type(error).__name__}: {said}")
        error.__traceback__ = None  # its frames hold the step's tensors
        for weight in stage.backbone.model.parameters():
            weight.grad = None
        gc.collect()
        if stage.device.type == "cuda":
            torch.cuda.empty_cache()


class _NoRoomError(Exception):
    pass


def _check_room(row: Row, device: torch.device) -> None:
    """Don't start what the system would kill, and all results with it; a GPU refuses by itself."""
    free = _free_host_bytes()
    needed = row.estimated_peak_bytes
    if device.type == "cpu" and free is not None and needed is not None and needed > free:
        raise _NoRoomError(f"not run: it needs about {format_bytes(needed)}, {format_bytes(free)} of memory are free")


def _free_host_bytes() -> int | None:
    """Memory that processes can still have, where the system tells (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"][0]) * 1024 if "MemAvailable" in found else None


# Summing up ------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row], batch_size: int) -> None:
    """Fill in ratios, rates and the Pareto front from what was estimated, measured and timed."""
    by_name = {row.name: row for row in rows}
    for row in rows:
        base = by_name.get(row.baseline)
        row.estimated_peak_ratio = _ratio(row.estimated_peak_bytes, base.estimated_peak_bytes if base else None)
        row.measured_peak_ratio = _ratio(row.measured_peak_bytes, base.measured_peak_bytes if base else None)
        pairs = zip(row.seconds, base.seconds, strict=True) if base else ()
        ratios = [own / other for own, other in pairs if own is not None and other is not None]
        own_times = [value for value in row.seconds if value is not None]
        if base is not None and ratios:
            scale = statistics.median(value for value in base.seconds if value is not None)
            row.time_ratio, row.time_ratio_range = statistics.median(ratios), (min(ratios), max(ratios))
            row.step_seconds = row.time_ratio * scale
            row.images_per_second_range = batch_size / (max(ratios) * scale), batch_size / (min(ratios) * scale)
        elif own_times:
            row.step_seconds = statistics.median(own_times)
            row.images_per_second_range = batch_size / max(own_times), batch_size / min(own_times)
        row.images_per_second = None if row.step_seconds is None else batch_size / row.step_seconds
    for precision in {row.precision for row in rows}:
        points = {
            row.name: (row.step_seconds, row.measured_peak_bytes)
            for row in rows
            if row.precision == precision and row.step_seconds is not None and row.measured_peak_bytes is not None
        }
        for name in pareto_front(points):
            by_name[name].is_pareto = True


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (two costs each) that no other point dominates, the first cost ascending.

    Of points that are equal in both, all are kept.
    """
    front: list[str] = []
    least: float | None = None
    last: tuple[float, float] | None = None
    for name, point in sorted(points.items(), key=lambda item: item[1]):
        if least is None or point[1] < least or point == last:
            front.append(name)
            least, last = point[1], point
    return front


def envelope(timeline: Sequence[tuple[int, int]], bins: int) -> Timeline:
    """Thin a timeline of (operators run so far, bytes alive) out: the greatest value in each of so many equal parts.

    Returns:
        (share of the operators where the part begins, bytes), one a part; the peak is among them.
    """
    total = max(1, timeline[-1][0] + 1)
    highest = [0] * bins
    place, alive = 0, 0
    for part in range(bins):
        highest[part] = alive
        while place < len(timeline) and timeline[place][0] * bins < (part + 1) * total:
            alive = timeline[place][1]
            highest[part] = max(highest[part], alive)
            place += 1
    return [(part / bins, value) for part, value in enumerate(highest)]


def _worth_drawing(rows: Iterable[Row]) -> list[str]:
    """The methods whose timelines are worth a picture: the mountain, its rival, the longest sawtooth."""
    rows = [row for row in rows if not row.compile]
    first = rows[0].precision if rows else ""
    rows = [row for row in rows if row.precision == first]
    plain = [row.name for row in rows if row.num_modules is None]
    local = [row for row in rows if row.family == "local"]
    longest = max(local, key=lambda row: row.num_modules or 0, default=None)
    return [*plain, *([longest.name] if longest else [])]


def _ratio(own: float | None, other: float | None) -> float | None:
    return None if own is None or not other else own / other
