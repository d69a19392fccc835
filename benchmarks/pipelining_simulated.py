"""What ``localgrad.planning.simulator`` says of the runs of ``pipelining.py``, beside what they measured. Pure.

How processes that share cores are taken together, and what is left out, is told in pipelining.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelining_report import Report

STEPS = 200
ALONE, RUNNING = "alone", "in the run"


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A method's images/s, measured and predicted; medians over repeats.

    Attributes:
        method: what was simulated.
        ranks: its processes.
        actors: what it was simulated with: ranks, or cores where ranks share them.
        seconds: of the parts, where they were measured: ``alone`` or ``in the run``.
        predicted: images/s.
        measured: images/s.
        error: predicted in those measured, less 1; with its range.
        error_range: least and greatest of all repeats.
    """

    method: str
    ranks: int
    actors: int
    seconds: str
    predicted: float
    measured: float
    error: float
    error_range: tuple[float, float]


def simulator_is_here() -> bool:
    return importlib.util.find_spec("localgrad.planning.simulator") is not None


def simulated(reports: Sequence[Sequence[Report]], method: str) -> list[Simulated]:
    """Simulate a method in each repeat; nothing where it wasn't run.

    Args:
        reports: for each repeat one report a method.
        method: of several processes.
    """
    found: dict[str, list[tuple[float, float]]] = {ALONE: [], RUNNING: []}
    one = None
    for repeat in reports:
        by_method = {report.method: report for report in repeat}
        one = by_method.get(method)
        if one is None:
            return []
        apart = by_method.get("local-one" if method == "local" else "stages-one")
        if apart is not None and apart.boundaries == one.boundaries:
            found[ALONE].append((predict(one, apart), one.images_per_second))
        if one.ranks <= one.cores:
            found[RUNNING].append((predict(one, one), one.images_per_second))
    assert one is not None, "a comparison has a repeat"
    lines = []
    for seconds, pairs in found.items():
        if pairs:
            errors = [predicted / measured - 1 for predicted, measured in pairs]
            lines.append(
                Simulated(
                    method=method,
                    ranks=one.ranks,
                    actors=min(one.ranks, one.cores),
                    seconds=seconds,
                    predicted=statistics.median(predicted for predicted, _ in pairs),
                    measured=statistics.median(measured for _, measured in pairs),
                    error=statistics.median(errors),
                    error_range=(min(errors), max(errors)),
                )
            )
    return lines


def predict(report: Report, timed: Report) -> float:
    """Images/s of a run, from the seconds of its parts that one of the same boundaries measured."""
    from localgrad.planning.simulator import Module, gpipe, joined, local_modules, one_forward_one_backward

    parts = [part for share in timed.shares for part in share.parts]
    modules: list[Any] = []
    for counts in on_cores([len(share.parts) for share in report.shares], report):
        own, parts = parts[: sum(counts)], parts[sum(counts) :]
        modules.append(joined([Module(**asdict(part)) for part in own]))
    if report.method == "local":
        outcome = local_modules(modules, STEPS)  # with as many buffers as the engine has
    else:
        schedule = {"1f1b": one_forward_one_backward, "gpipe": gpipe}[report.method]
        outcome = schedule(modules, STEPS, microbatches=report.microbatches)
    throughput: float = outcome.steady_throughput
    return report.batch_size * throughput


def on_cores(values: Sequence[int], report: Report) -> Iterable[list[int]]:
    """Values of each rank, those together whose ranks share a core."""
    if report.ranks <= report.cores:
        return [[value] for value in values]
    assert report.pinned, "ranks that share cores are kept on them"
    ranks = itertools.groupby(range(report.ranks), lambda rank: rank * report.cores // report.ranks)
    return [[values[rank] for rank in group] for _, group in ranks]


def as_lines(found: Sequence[Simulated]) -> list[str]:
    lines = []
    for one in found:
        sharing = "" if one.actors == one.ranks else f", as {one.actors} cores of {one.ranks / one.actors:g} ranks each"
        low, high = (f"{100 * error:+.1f}" for error in one.error_range)
        lines.append(
            f"simulated {one.method}, {one.ranks} processes{sharing}, seconds measured {one.seconds}: "
            f"{one.predicted:.2f} images/s, measured {one.measured:.2f}: {100 * one.error:+.1f} % ({low} to {high})"
        )
    return lines
