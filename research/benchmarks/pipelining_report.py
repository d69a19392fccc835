"""What a method's processes measured, and methods side by side: reports and ratios of ``pipelining.py``. Pure data."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localgrad.units import format_bytes, format_rate

FORMAT = 2
SAME_MODULES = "local-one"
"""What ``local`` is held to beside the baseline: its modules and its losses in one process."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stage or a local module: mean seconds of a timed step, and bytes. As ``planning.simulator.Module``.

    Attributes:
        forward: seconds, with the loss.
        backward: seconds.
        update: seconds.
        sent_bytes: of the features that it gives to the next one in a step, to whichever process.
        gradient_bytes: of its gradients.
        num_blocks: how many blocks it has.
    """

    forward: float
    backward: float
    update: float
    sent_bytes: int
    gradient_bytes: int
    num_blocks: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process measured; lists have one figure a timed step.

    Attributes:
        parts: that this process trains.
        span_seconds: from the end of its last warm-up step to the end of its last timed one.
        estimated_bytes: localgrad's estimate of ``tensor_peak_bytes``, where there is one.
    """

    rank: int
    blocks: tuple[int, int]
    num_parameters: int
    sent_bytes: int
    parts: tuple[Part, ...]
    span_seconds: float
    step_seconds: tuple[float, ...]
    busy_seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    resident_start_bytes: int
    resident_peak_bytes: int
    tensor_peak_bytes: int
    estimated_bytes: int | None

    @property
    def bubble(self) -> float:
        """Share of the wall's time in which this process did not compute."""
        return 1 - sum(self.busy_seconds) / sum(self.step_seconds)

    def __str__(self) -> str:
        estimated = "" if self.estimated_bytes is None else f" ({format_bytes(self.estimated_bytes)} estimated)"
        lines = [
            f"  rank {self.rank}: blocks {self.blocks[0]}-{self.blocks[1] - 1}, bubble {100 * self.bubble:.1f} %, "
            f"busy {statistics.mean(self.busy_seconds):.3f} s a step, processor "
            f"{statistics.mean(self.processor_seconds):.3f} s, "
            f"peak {format_bytes(self.resident_peak_bytes)} resident ({format_bytes(self.resident_start_bytes)} at "
            f"the start), {format_bytes(self.tensor_peak_bytes)} of tensors{estimated}, sends "
            f"{format_bytes(self.sent_bytes)}"
        ]
        edges = itertools.accumulate((part.num_blocks for part in self.parts), initial=self.blocks[0])
        lines += [
            f"    blocks {start}-{start + part.num_blocks - 1}: forward {part.forward:.3f} s, backward "
            f"{part.backward:.3f} s, update {part.update:.3f} s"
            for start, part in zip(edges, self.parts, strict=False)
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of one method. The losses are of all steps, warm-up included.

    Attributes:
        cores: that the processes could use together.
        pinned: whether each process was kept on one of them.
        objective: auxiliary nets of local modules.
    """

    method: str
    model: str
    image_size: tuple[int, ...]
    batch_size: int
    microbatches: int
    ranks: int
    threads: int
    cores: int
    pinned: bool
    boundaries: tuple[int, ...]
    balanced_by: str
    objective: str
    seed: int
    steps: int
    warmup: int
    losses: tuple[float, ...]
    shares: tuple[Share, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_per_step(self) -> float:
        """Of the last process, once batches follow each other."""
        return self.shares[-1].span_seconds / self.steps

    @property
    def median_step_seconds(self) -> float:
        """Of the slowest process."""
        return max(statistics.median(share.step_seconds) for share in self.shares)

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds_per_step

    @property
    def bubble(self) -> float:
        """Share of all processes' time that none of them computed in."""
        busy = sum(sum(share.busy_seconds) for share in self.shares)
        return 1 - busy / sum(sum(share.step_seconds) for share in self.shares)

    def to_dict(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        names = ("seconds_per_step", "median_step_seconds", "images_per_second", "bubble")
        values = asdict(self)
        for share, told in zip(self.shares, values["shares"], strict=True):
            told["bubble"] = share.bubble
        return {"format": FORMAT, **values, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Read what ``to_dict`` gave, through JSON or not; what follows from the rest is left out."""
        assert values["format"] == FORMAT, f"format {values['format']}, but this version reads {FORMAT}"
        known = {name: _tupled(values[name]) for name in cls.__dataclass_fields__ if name != "shares"}
        shares = []
        for share in values["shares"]:
            told = {name: _tupled(share[name]) for name in Share.__dataclass_fields__ if name != "parts"}
            shares.append(Share(**told, parts=tuple(Part(**part) for part in share["parts"])))
        return cls(**known, shares=tuple(shares))

    def __str__(self) -> str:
        nets = f", {self.objective}" if self.objective else ""
        lines = [
            f"{self.method}{nets}, {self.model}, {self.image_size[-1]} px, batch {self.batch_size} in "
            f"{self.microbatches}, {self.ranks} x {self.threads} threads{' pinned' * self.pinned} on {self.cores} "
            f"cores, boundaries {list(self.boundaries)} ({self.balanced_by}): {self.seconds_per_step:.3f} s a step, "
            f"{format_rate(self.images_per_second)}, bubble {100 * self.bubble:.1f} %"
        ]
        return "\n".join(
            [*lines, *map(str, self.shares), f"  losses {' '.join(f'{loss:.4f}' for loss in self.losses)}"]
        )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method beside the baseline. Ratios are medians over repeats, with least and greatest.

    Attributes:
        images_per_second: median over repeats, which a machine's other work moves more than ratios.
        time_ratio: its step time, in those of the baseline.
        throughput_ratio: its images/s likewise.
        to_same_modules: for ``local``, its images/s in those of its modules in one process; with its range.
        loss_difference: the greatest from the losses of ``losses_of``, of all steps.
        losses_of: the baseline, or for local modules these in one process; ``None`` where those weren't run.
    """

    method: str
    ranks: int
    images_per_second: float
    time_ratio: float
    time_ratio_range: tuple[float, float]
    throughput_ratio: float
    to_same_modules: float | None
    to_same_modules_range: tuple[float, float] | None
    bubble: float
    resident_peak_bytes: tuple[int, ...]
    tensor_peak_bytes: tuple[int, ...]
    estimated_bytes: tuple[int, ...] | None
    loss_difference: float | None
    losses_of: str | None


def rows_of(reports: Sequence[Sequence[Report]]) -> list[Row]:
    """Put methods beside the first one.

    Args:
        reports: for each repeat one report a method, in the same order in each.
    """
    rows = []
    columns = {column[0].method: column for column in zip(*reports, strict=True)}
    baseline = next(iter(columns.values()))
    same_modules = columns.get(SAME_MODULES)
    for method, column in columns.items():
        ratios = [one.seconds_per_step / other.seconds_per_step for one, other in zip(column, baseline, strict=True)]
        is_local = bool(column[0].objective)
        others = same_modules if is_local else baseline
        gains = None
        if method == "local" and same_modules is not None:
            gains = [
                one.images_per_second / other.images_per_second for one, other in zip(column, same_modules, strict=True)
            ]
        rows.append(
            Row(
                method=method,
                ranks=column[0].ranks,
                images_per_second=statistics.median(report.images_per_second for report in column),
                time_ratio=statistics.median(ratios),
                time_ratio_range=(min(ratios), max(ratios)),
                throughput_ratio=1 / statistics.median(ratios),
                to_same_modules=None if gains is None else statistics.median(gains),
                to_same_modules_range=None if gains is None else (min(gains), max(gains)),
                bubble=statistics.median(report.bubble for report in column),
                resident_peak_bytes=_by_rank(column, "resident_peak_bytes"),
                tensor_peak_bytes=_by_rank(column, "tensor_peak_bytes"),
                estimated_bytes=_by_rank(column, "estimated_bytes") if is_local else None,
                loss_difference=None if others is None else _loss_difference(column, others),
                losses_of=None if others is None else others[0].method,
            )
        )
    return rows


def _loss_difference(column: Sequence[Report], others: Sequence[Report]) -> float:
    return max(
        abs(mine - theirs)
        for one, other in zip(column, others, strict=True)
        for mine, theirs in zip(one.losses, other.losses, strict=True)
    )


def _by_rank(reports: Sequence[Report], name: str) -> tuple[int, ...]:
    """The most of all repeats, for each process."""
    return tuple(max(sizes) for sizes in zip(*([getattr(s, name) for s in r.shares] for r in reports), strict=True))


def as_table(rows: Sequence[Row]) -> str:
    def sizes(values: tuple[int, ...] | None) -> str:
        return " / ".join(map(format_bytes, values)) if values else ""

    def ratio(row: Row) -> str:
        if row.to_same_modules is None or row.to_same_modules_range is None:
            return ""
        return f"{row.to_same_modules:.2f} ({row.to_same_modules_range[0]:.2f} to {row.to_same_modules_range[1]:.2f})"

    lines = [
        f"| method | processes | images/s | step time, x none | throughput, x none | throughput, x {SAME_MODULES} "
        "| bubble | peak resident of each | of tensors | estimated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.method} | {row.ranks} | {row.images_per_second:.2f} "
        f"| {row.time_ratio:.3f} ({row.time_ratio_range[0]:.3f} to {row.time_ratio_range[1]:.3f}) "
        f"| {row.throughput_ratio:.2f} | {ratio(row)} | {100 * row.bubble:.1f} % "
        f"| {sizes(row.resident_peak_bytes)} | {sizes(row.tensor_peak_bytes)} | {sizes(row.estimated_bytes)} |"
        for row in rows
    ]
    lines += [
        f"losses of {row.method} differ from those of {row.losses_of} by {row.loss_difference:.1e} at most"
        for row in rows
        if row.losses_of not in (None, row.method)
    ]
    return "\n".join(lines)
