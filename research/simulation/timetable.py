"""What ranks do when, by the schedule of ``parallel/schedule.py`` alone. Pure: no tensors, no processes."""

from __future__ import annotations

from localgrad.parallel.schedule import NUM_BUFFERS, Action, actions


def program(rank: int, *, num_ranks: int, num_batches: int, num_buffers: int = NUM_BUFFERS) -> list[Action]:
    """All that a rank does in a phase of a number of batches."""
    last = num_batches - 1
    return [
        action
        for batch in range(num_batches)
        for action in actions(batch, rank=rank, num_ranks=num_ranks, first=0, last=last, num_buffers=num_buffers)
    ]


def timetable(num_ranks: int, num_batches: int, num_buffers: int = NUM_BUFFERS) -> list[list[tuple[Action, ...]]]:
    """What each rank does at each time, if all modules take equally long: rank, time -> actions.

    An action that waits for another rank is done as early as that one lets it; nothing else is supposed.

    Raises:
        RuntimeError: the ranks wait for each other for ever.
    """
    programs = [
        program(r, num_ranks=num_ranks, num_batches=num_batches, num_buffers=num_buffers) for r in range(num_ranks)
    ]
    done = [0] * num_ranks
    sent: list[set[int]] = [set() for _ in range(num_ranks)]
    expected: list[set[int]] = [set() for _ in range(num_ranks)]
    table: list[list[tuple[Action, ...]]] = [[] for _ in range(num_ranks)]
    while any(done[r] < len(programs[r]) for r in range(num_ranks)):
        sent_before, expected_before = [set(batches) for batches in sent], [set(batches) for batches in expected]
        moved = False
        for rank, listed in enumerate(programs):
            now: list[Action] = []
            while done[rank] < len(listed):
                kind, batch = action = listed[done[rank]]
                if kind == "receive" and batch not in sent_before[rank - 1]:
                    break
                if kind == "settle" and batch not in expected_before[rank + 1]:
                    break
                now.append(action)
                done[rank] += 1
                if kind == "expect":
                    expected[rank].add(batch)
                elif kind == "send":
                    sent[rank].add(batch)
                elif kind == "update":
                    break
            moved = moved or bool(now)
            table[rank].append(tuple(now))
        if not moved:
            raise RuntimeError(
                f"ranks wait for each other: {[listed[n] for listed, n in zip(programs, done, strict=True)]}"
            )
    return table
