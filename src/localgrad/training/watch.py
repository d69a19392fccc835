"""Who is still there: a thread in every process of a parallel run that ends them all when one is lost, and says why.

Each process writes a heartbeat into torch.distributed's store twice a second, and reads the others'. A fault is written
there, once, by whoever sees it first: the process itself (a loss that is no number, no memory left, a step that takes
for ever), a neighbour whose connection broke, or anybody who misses its heartbeat. Every process then ends within a
second or two; the one with the lowest number that is still alive prints what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from localgrad.execution.team import exit_status

BEAT_SECONDS = 0.5
SILENT_SECONDS = 10.0
"""A process is taken for lost when it wrote no heartbeat for so long."""
HANGING_SECONDS = 600.0
"""A process hangs when one step, or reading one batch, takes so long; ``LOCALGRAD_HANGING_SECONDS`` says otherwise."""


@dataclass(frozen=True)
class Fault:
    """What ended a run.

    Attributes:
        rank: of the process that failed, among all.
        cause: what happened, a sentence without its rank.
        is_alive: whether that process could still say so itself.
        status: exit status of the others.
    """

    rank: int
    cause: str
    is_alive: bool = True
    status: int = 1


class Watch:
    """The heartbeat of one process.

    Args:
        store: torch.distributed's key-value store.
        rank: of this process among all.
        names: what each process trains, in words, by rank.
        doing: what this process is doing, its batch, and since when (``time.monotonic``).
        noted: the number of a signal that arrived here, or ``None``.

    Attributes:
        told_to_stop: the number of a signal that arrived at any process.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        names: list[str],
        *,
        doing: Callable[[], tuple[str, int, float]],
        noted: Callable[[], int | None],
    ) -> None:
        self.store = store
        self.rank = rank
        self.names = names
        self.told_to_stop: int | None = None
        self.hanging_seconds = float(os.environ.get("LOCALGRAD_HANGING_SECONDS", HANGING_SECONDS))
        self._doing = doing
        self._noted = noted
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="localgrad watch", daemon=True)

    def __enter__(self) -> Watch:
        self.store.set(f"beat/{self.rank}", "0")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the store may be gone; so are the others then
            self.store.set(f"beat/{self.rank}", "over")
        self._over.set()
        self._thread.join()

    def tell(self, fault: Fault) -> Fault:
        """Tell all others of a fault, unless there was one before.

        Returns:
            The one that counts.
        """
        text = json.dumps(asdict(fault))
        found = self.store.compare_set("fault", "", text)
        return Fault(**json.loads(found))

    def await_fault(self) -> None:
        """Give the thread time to end this process for what another one said."""
        time.sleep(4 * BEAT_SECONDS + 1)

    def describe(self, fault: Fault) -> str:
        """A fault as one line."""
        return f"rank {fault.rank} ({self.names[fault.rank]}): {fault.cause}"

    def _run(self) -> None:
        last = dict.fromkeys(range(len(self.names)), ("", time.monotonic()))
        beat = 0
        while not self._over.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._once(beat, last)
            except RuntimeError as error:  # the store went with the process that kept it
                if not self._over.is_set():
                    reason = str(error).split("\n", maxsplit=1)[0]
                    self._end(Fault(0, f"the store of the run is gone ({reason})", is_alive=False))

    def _once(self, beat: int, last: dict[int, tuple[str, float]]) -> None:
        self.store.set(f"beat/{self.rank}", str(beat))
        signal_number = self._noted()
        if signal_number is not None:
            self.store.set("stop", str(signal_number))
        if self.told_to_stop is None and self.store.check(["stop"]):
            self.told_to_stop = int(self.store.get("stop"))
        if self.store.check(["fault"]):
            self._end(Fault(**json.loads(self.store.get("fault"))))
        now = time.monotonic()
        what, batch, since = self._doing()
        if what in ("work", "read a batch") and now - since > self.hanging_seconds:
            self._end(self.tell(Fault(self.rank, f"it hangs: for {now - since:.0f} s, {_phrase(what)} {batch + 1}")))
        for rank, (seen, when) in last.items():
            if rank == self.rank or seen == "over":
                continue
            said = self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else ""
            if said != seen:
                last[rank] = said, now
            elif now - when > SILENT_SECONDS:
                cause = f"no sign of life for {SILENT_SECONDS:.0f} s: stopped, or its machine is gone"
                self._end(self.tell(Fault(rank, cause, is_alive=False)))

    def _end(self, fault: Fault) -> None:
        """End this process, from the thread: the main one may wait for ever."""
        if self._over.is_set():
            return
        speaker = 1 if fault.rank == 0 and not fault.is_alive else 0
        if self.rank == speaker:
            print(f"localgrad: {self.describe(fault)}", file=sys.__stderr__, flush=True)
        sys.stdout.flush()
        os._exit(exit_status(fault.status))


def _phrase(what: str) -> str:
    return "in the step on batch" if what == "work" else "reading batch"
