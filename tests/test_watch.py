"""The heartbeat of parallel processes, without processes: what needs them is in ``test_parallel_runs``."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

from localgrad.parallel.watch import Watch


def test_the_first_rank_leaves_last() -> None:
    """The store goes with it, and another one's last heartbeat would find nothing."""
    store = dist.HashStore()
    first, second = (Watch(store, rank, 2) for rank in (0, 1))
    left: list[int] = []
    may_leave = threading.Event()

    def run(watch: Watch, until: threading.Event | None) -> None:
        with watch.watching():
            if until is not None:
                until.wait(10)
        left.append(watch.rank)

    threads = [threading.Thread(target=run, args=each) for each in ((first, None), (second, may_leave))]
    for thread in threads:
        thread.start()
    threads[0].join(0.3)
    assert left == []  # its own work is long done
    may_leave.set()
    began = time.monotonic()
    for thread in threads:
        thread.join(10)
    assert sorted(left) == [0, 1]
    assert time.monotonic() - began < 5
