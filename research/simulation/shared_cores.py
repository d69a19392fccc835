"""The schedules of ``simulator.py`` where several ranks share a core: a small simulation of events. Pure.

Ranks that can compute at the same moment on one core each run at an n-th of its speed, as an operating system's short
slices of time let them; a rank that waits leaves the core to the others. Two ranks here, a core for each and one for
both; a letter is a second of the wall::

    two cores   rank 0  F B U F B U F B U           one core   rank 0  F B B U U F F B B U U F F B B U U
                rank 1    F B U F B U F B U                    rank 1    F F B B U U F F B B U U F F B B U

Every rank has a fixed order of tasks, that of ``parallel/schedule.py`` or of ``simulator.py``. Between two events (a
task ends) every task at work has a speed of its own that doesn't change, so the next event is known, and the whole
course is exact. Where each rank has a core of its own, all is as in ``simulator.py``.

Left out, beside what is left out there: links (they take no time), what changing between ranks costs, and that work
beside other work may be slower (memory, caches).

Source: processor sharing as the limit of short slices, Kleinrock, J. ACM 14 (1967), "Time-shared systems: a theoretical
treatment".
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

from localgrad.parallel.schedule import NUM_BUFFERS
from research.simulation.simulator import (
    Module,
    Order,
    Outcome,
    check_counts,
    order_of_1f1b,
    order_of_gpipe,
    outcome_of,
    period_of,
)
from research.simulation.timetable import program

Name = tuple[str, int]
"""Of a task of a rank: what it is, and the number of the batch or microbatch."""


class Task(NamedTuple):
    """What a rank does at a stretch, or waits for.

    Attributes:
        name: unlike those of the rank's other tasks.
        seconds: of work, on a core that no other rank uses.
        after: a rank and which of its tasks must be done before.
    """

    name: Name
    seconds: float = 0.0
    after: tuple[int, Name] | None = None


def local_modules(
    modules: Sequence[Module], steps: int, cores: Sequence[Hashable], *, num_buffers: int = NUM_BUFFERS
) -> Outcome:
    """Local modules, one a rank.

    Args:
        modules: in order.
        steps: batches.
        cores: of each rank, which core it is on.
        num_buffers: batches that may be on their way at each end of a link.

    Returns:
        The outcome; a rank's ``idle`` time is then all that it isn't given of its core.

    Raises:
        ValueError: no modules, steps or buffers, or not one core for each rank.
    """
    check_counts(modules=len(modules), steps=steps, num_buffers=num_buffers)
    programs = []
    for rank, module in enumerate(modules):
        seconds = {"forward": module.forward, "update": module.backward + module.update}
        tasks = []
        for kind, batch in program(rank, num_ranks=len(modules), num_batches=steps, num_buffers=num_buffers):
            after = {"receive": (rank - 1, ("send", batch)), "settle": (rank + 1, ("expect", batch))}.get(kind)
            tasks.append(Task((kind, batch), seconds.get(kind, 0.0), after))
        programs.append(tasks)
    done = _played(programs, cores)
    return _outcome(modules, done, [done[-1]["update", batch] for batch in range(steps)])


def one_forward_one_backward(
    modules: Sequence[Module], steps: int, cores: Sequence[Hashable], *, microbatches: int
) -> Outcome:
    """A pipeline with one forward, one backward, flushed at each batch. Arguments as for ``gpipe``."""
    return _flushed(modules, steps, cores, microbatches, order_of_1f1b)


def gpipe(modules: Sequence[Module], steps: int, cores: Sequence[Hashable], *, microbatches: int) -> Outcome:
    """A pipeline with all microbatches forward, then all backward.

    Args:
        modules: in order; their seconds are of a whole batch.
        steps: batches.
        cores: of each rank, which core it is on.
        microbatches: parts of each batch.

    Raises:
        ValueError: no modules, steps or microbatches, or not one core for each rank.
    """
    return _flushed(modules, steps, cores, microbatches, order_of_gpipe)


def _flushed(
    modules: Sequence[Module], steps: int, cores: Sequence[Hashable], microbatches: int, order: Order
) -> Outcome:
    check_counts(modules=len(modules), steps=steps, microbatches=microbatches)
    last = len(modules) - 1
    programs = []
    for rank, module in enumerate(modules):
        seconds = {"forward": module.forward / microbatches, "backward": module.backward / microbatches}
        before = {"forward": rank - 1 if rank > 0 else None, "backward": rank + 1 if rank < last else None}
        passes = order(rank, len(modules), microbatches)
        tasks = []
        for step in range(steps):
            for kind, number in passes:
                name, neighbour = (kind, step * microbatches + number), before[kind]
                tasks.append(Task(name, seconds[kind], None if neighbour is None else (neighbour, name)))
            tasks.append(Task(("update", step), module.update))
        programs.append(tasks)
    done = _played(programs, cores)
    return _outcome(modules, done, [max(times["update", step] for times in done) for step in range(steps)])


def _played(programs: Sequence[Sequence[Task]], cores: Sequence[Hashable]) -> list[dict[Name, float]]:
    """When each rank has done each of its tasks.

    Raises:
        ValueError: not one core for each rank.
        RuntimeError: the ranks wait for each other for ever.
    """
    if len(cores) != len(programs):
        raise ValueError(f"{len(programs)} ranks need as many cores' names, got {len(cores)}.")
    now = 0.0
    coming = [deque(tasks) for tasks in programs]
    done: list[dict[Name, float]] = [{} for _ in programs]
    left: dict[int, float] = {}  # of each rank at work, seconds of work until its task is done
    while True:
        moved = True
        while moved:  # what takes no time may let another rank begin
            moved = False
            for rank, tasks in enumerate(coming):
                while tasks and rank not in left and _may_begin(tasks[0], done):
                    moved = True
                    if tasks[0].seconds > 0:
                        left[rank] = tasks[0].seconds
                    else:
                        done[rank][tasks.popleft().name] = now
        if not left:
            break
        sharing = Counter(cores[rank] for rank in left)
        passed = min(seconds * sharing[cores[rank]] for rank, seconds in left.items())
        now += passed
        for rank, seconds in list(left.items()):
            if seconds * sharing[cores[rank]] <= passed:
                done[rank][coming[rank].popleft().name] = now
                del left[rank]
            else:
                left[rank] = seconds - passed / sharing[cores[rank]]
    if any(coming):
        raise RuntimeError(f"ranks wait for each other: {[tasks[0] if tasks else None for tasks in coming]}")
    return done


def _may_begin(task: Task, done: Sequence[dict[Name, float]]) -> bool:
    return task.after is None or task.after[1] in done[task.after[0]]


def _outcome(modules: Sequence[Module], done: Sequence[dict[Name, float]], ends: Sequence[float]) -> Outcome:
    """What was found. Once a rank has done all, others have more of its core: batches that end later aren't even."""
    finished = [max(times.values()) for times in done]
    even = [end for end in ends if end <= min(finished)]
    return replace(outcome_of(modules, ends, max(finished)), period=period_of(even or ends))
