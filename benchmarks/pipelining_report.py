"""What a method's processes measured, and methods side by side: reports and ratios of ``pipelining.py``. Pure data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localgrad.units import format_bytes, format_rate

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process measured; lists have one figure a timed step."""

    rank: int
    blocks: tuple[int, int]
    num_parameters: int
    sent_bytes: int
    step_seconds: tuple[float, ...]
    busy_seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    resident_start_bytes: int
    resident_peak_bytes: int
    tensor_peak_bytes: int

    @property
    def bubble(self) -> float:
        """Share of the wall's time in which this process did not compute."""
        return 1 - sum(self.busy_seconds) / sum(self.step_seconds)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of one method. The losses are of all steps, warm-up included."""

    method: str
    model: str
    image_size: tuple[int, ...]
    batch_size: int
    microbatches: int
    ranks: int
    threads: int
    boundaries: tuple[int, ...]
    balanced_by: str
    seed: int
    steps: int
    warmup: int
    losses: tuple[float, ...]
    shares: tuple[Share, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def median_step_seconds(self) -> float:
        """Of the slowest process."""
        return max(statistics.median(share.step_seconds) for share in self.shares)

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median_step_seconds

    @property
    def bubble(self) -> float:
        """Share of all processes' time that none of them computed in."""
        busy = sum(sum(share.busy_seconds) for share in self.shares)
        return 1 - busy / sum(sum(share.step_seconds) for share in self.shares)

    def to_dict(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        summary = {name: getattr(self, name) for name in ("median_step_seconds", "images_per_second", "bubble")}
        values = asdict(self)
        for share, told in zip(self.shares, values["shares"], strict=True):
            told["bubble"] = share.bubble
        return {"format": FORMAT, **values, **summary}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Read what ``to_dict`` gave, through JSON or not; what follows from the rest is left out."""
        assert values["format"] == FORMAT, f"format {values['format']}, but this version reads {FORMAT}"
        known = {name: _tupled(values[name]) for name in cls.__dataclass_fields__ if name != "shares"}
        shares = tuple(
            Share(**{name: _tupled(share[name]) for name in Share.__dataclass_fields__}) for share in values["shares"]
        )
        return cls(**known, shares=shares)

    def __str__(self) -> str:
        lines = [
            f"{self.method}, {self.model}, {self.image_size[-1]} px, batch {self.batch_size} in {self.microbatches}, "
            f"{self.ranks} x {self.threads} threads, boundaries {list(self.boundaries)} ({self.balanced_by}): "
            f"{self.median_step_seconds:.3f} s a step, {format_rate(self.images_per_second)}, "
            f"bubble {100 * self.bubble:.1f} %"
        ]
        lines += [
            f"  rank {share.rank}: blocks {share.blocks[0]}-{share.blocks[1] - 1}, bubble {100 * share.bubble:.1f} %, "
            f"peak {format_bytes(share.resident_peak_bytes)} resident ({format_bytes(share.resident_start_bytes)} at "
            f"the start), {format_bytes(share.tensor_peak_bytes)} of tensors, sends {format_bytes(share.sent_bytes)}"
            for share in self.shares
        ]
        return "\n".join([*lines, f"  losses {' '.join(f'{loss:.4f}' for loss in self.losses)}"])


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method beside the baseline. Ratios are medians over repeats, with least and greatest."""

    method: str
    ranks: int
    time_ratio: float
    time_ratio_range: tuple[float, float]
    throughput_ratio: float
    bubble: float
    resident_peak_bytes: tuple[int, ...]
    tensor_peak_bytes: tuple[int, ...]
    loss_difference: float
    """The greatest from the baseline's losses, of all steps."""


def rows_of(reports: Sequence[Sequence[Report]]) -> list[Row]:
    """Put methods beside the first one.

    Args:
        reports: for each repeat one report a method, in the same order in each.
    """
    rows = []
    baseline = [repeat[0] for repeat in reports]
    for column in zip(*reports, strict=True):
        pairs = list(zip(column, baseline, strict=True))
        ratios = [one.median_step_seconds / other.median_step_seconds for one, other in pairs]
        rows.append(
            Row(
                method=column[0].method,
                ranks=column[0].ranks,
                time_ratio=statistics.median(ratios),
                time_ratio_range=(min(ratios), max(ratios)),
                throughput_ratio=1 / statistics.median(ratios),
                bubble=statistics.median(report.bubble for report in column),
                resident_peak_bytes=_by_rank(column, "resident_peak_bytes"),
                tensor_peak_bytes=_by_rank(column, "tensor_peak_bytes"),
                loss_difference=max(
                    abs(mine - theirs)
                    for one, other in pairs
                    for mine, theirs in zip(one.losses, other.losses, strict=True)
                ),
            )
        )
    return rows


def _by_rank(reports: Sequence[Report], name: str) -> tuple[int, ...]:
    """The most of all repeats, for each process."""
    return tuple(max(sizes) for sizes in zip(*([getattr(s, name) for s in r.shares] for r in reports), strict=True))


def as_table(rows: Sequence[Row]) -> str:
    def sizes(values: tuple[int, ...]) -> str:
        return " / ".join(map(format_bytes, values))

    lines = [
        "| method | processes | step time, x none | throughput, x none | bubble | peak resident of each | of tensors |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.method} | {row.ranks} | {row.time_ratio:.3f} ({row.time_ratio_range[0]:.3f} to "
        f"{row.time_ratio_range[1]:.3f}) | {row.throughput_ratio:.2f} | {100 * row.bubble:.1f} % "
        f"| {sizes(row.resident_peak_bytes)} | {sizes(row.tensor_peak_bytes)} |"
        for row in rows
    ]
    return "\n".join([*lines, *(f"losses of {row.method} differ by {row.loss_difference:.1e} at most" for row in rows)])
