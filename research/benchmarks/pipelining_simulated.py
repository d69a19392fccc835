"""What localgrad's simulators say of the runs of ``pipelining.py``, beside what they measured. Pure.

``simulation/shared_cores.py`` is asked, which is ``simulator.py`` where each process has a core of its own and
links are free (``tests/test_simulator.py``). What is left out is told in pipelining.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pipelining_report import Report

STEPS = 200
ALONE, RUNNING = "alone", "in the run"


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A method's images/s, measured and predicted; medians over repeats.

    Attributes:
        method: what was simulated.
        ranks: its processes.
        cores: that they have; fewer than processes where those share them.
        seconds: of the parts, where they were measured: ``alone`` or ``in the run``.
        predicted: images/s.
        measured: images/s.
        error: predicted in those measured, less 1; with its range.
        error_range: least and greatest of all repeats.
    """

    method: str
    ranks: int
    cores: int
    seconds: str
    predicted: float
    measured: float
    error: float
    error_range: tuple[float, float]


def simulator_is_here() -> bool:
    return importlib.util.find_spec("research.simulation.shared_cores") is not None


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
                    cores=min(one.ranks, one.cores),
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
    from research.simulation.shared_cores import gpipe, local_modules, one_forward_one_backward
    from research.simulation.simulator import Module, joined

    parts = iter(Module(**asdict(part)) for share in timed.shares for part in share.parts)
    modules = [joined(list(itertools.islice(parts, len(share.parts)))) for share in report.shares]
    cores = cores_of(report)
    if report.method == "local":
        outcome = local_modules(modules, STEPS, cores)  # with as many buffers as the engine has
    else:
        schedule = {"1f1b": one_forward_one_backward, "gpipe": gpipe}[report.method]
        outcome = schedule(modules, STEPS, cores, microbatches=report.microbatches)
    throughput: float = outcome.steady_throughput
    return report.batch_size * throughput


def cores_of(report: Report) -> list[int]:
    """Which core each rank is on."""
    assert report.ranks <= report.cores or report.pinned, "ranks that share cores are kept on them"
    return [rank * report.cores // report.ranks for rank in range(report.ranks)]


def as_lines(found: Sequence[Simulated]) -> list[str]:
    lines = []
    for one in found:
        sharing = "" if one.cores == one.ranks else f" on {one.cores} cores"
        low, high = (f"{100 * error:+.1f}" for error in one.error_range)
        lines.append(
            f"simulated {one.method}, {one.ranks} processes{sharing}, seconds measured {one.seconds}: "
            f"{one.predicted:.2f} images/s, measured {one.measured:.2f}: {100 * one.error:+.1f} % ({low} to {high})"
        )
    return lines
