"""Who is still there: a thread in every process of a parallel run that ends them all when one is lost, and says why.

Each process writes a heartbeat into torch.distributed's store twice a second, and reads the others'. A fault is written
there, once, by whoever sees it first: the process itself (a loss that is no number, no memory left, a step that takes
for ever), a neighbour whose connection broke, or anybody who misses its heartbeat. Every process then ends, and the one
with the lowest number that is still alive prints what happened. How long that takes, until all have ended:

* a process that fails and can say so (memory, a loss that is no number, an error): ``TOLD_SECONDS``
* one that is killed: ``BROKEN_SECONDS`` and ``TOLD_SECONDS``; where nobody talks to it, as one that is stopped
* one that is stopped, or whose machine is gone: ``SILENT_SECONDS`` and ``TOLD_SECONDS``
* one that hangs in a step or in reading a batch: ``HANGING_SECONDS`` and ``TOLD_SECONDS``

A loss is read once a second. A process that is stopped can't end itself: torchrun kills it half a minute later. Between
epochs (evaluating, saving) nothing is taken for hanging.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, final

from localgrad.errors import DivergenceError, LocalgradError, ParallelError, reason_of

BEAT_SECONDS = 0.5
HEARD_SECONDS = 3 * BEAT_SECONDS
"""A process stays so long after a fault: the store may be its own, and torchrun ends all as soon as one has ended."""
TOLD_SECONDS = 5.0
"""All processes have ended so long after a fault was told."""
SILENT_SECONDS = 10.0
"""A process is taken for lost when it wrote no heartbeat for so long."""
BROKEN_SECONDS = 3.0
"""The same once a connection broke: somebody is gone, and this shows who."""
HANGING_SECONDS = 600.0
"""A process hangs when one step, or reading one batch, takes so long; ``LOCALGRAD_HANGING_SECONDS`` says otherwise."""
SILENT = f"no sign of life for {SILENT_SECONDS:.0f} s: stopped, or its machine is gone"
GONE = "it ended without a word: killed, or its machine is gone"
_BROKEN = (
    "connection closed",
    "connection reset",
    "connection was",
    "broken pipe",
    "connection refused",
    "gloo",
    "nccl",
)


@dataclass(frozen=True)
class Fault:
    """What ended a run: the rank of the process that failed, and a sentence without it.

    Attributes:
        is_alive: whether that process could still say so itself.
        status: exit status of the others.
    """

    rank: int
    cause: str
    is_alive: bool = True
    status: int = 1


@final
class Watch:
    """The heartbeat of one process.

    Args:
        store: torch.distributed's key-value store, on a connection of its own: others block it while they wait.
        rank: of this process among all.
        size: how many there are.

    Attributes:
        names: what each process trains, in words, by rank; empty until that is known.
        doing: what this process is doing, its batch, and since when (``time.monotonic``).
        noted: the number of a signal that arrived here, or ``None``.
        told_to_stop: the number of a signal that arrived at any process.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.names: list[str] = []
        self.doing: Callable[[], tuple[str, int, float]] = lambda: ("nothing", 0, 0.0)
        self.noted: Callable[[], int | None] = lambda: None
        self.told_to_stop: int | None = None
        self.hanging_seconds = float(os.environ.get("LOCALGRAD_HANGING_SECONDS", HANGING_SECONDS))
        self._silent_seconds = SILENT_SECONDS
        self._ending: Fault | None = None
        self._error: Exception | None = None
        self._over = threading.Event()
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="localgrad watch", daemon=True)
        self._second = threading.Thread(target=self._watch_store, name="localgrad watch of the store", daemon=True)

    @contextlib.contextmanager
    def watching(self, *passing: type[Exception]) -> Iterator[None]:
        """Watch in the background; what breaks in here because another process was lost is said to be its fault.

        Args:
            *passing: errors that all processes agree on, or that ``telling`` has told.

        Raises:
            ParallelError: another process was lost.
        """
        self.store.set(f"beat/{self.rank}", "0")
        self._answered = time.monotonic()
        self._thread.start()
        self._second.start()
        try:
            with self.telling(*passing):
                yield
        finally:
            self._over.set()
            self._thread.join(TOLD_SECONDS)  # not for ever: the store may answer no more
            with contextlib.suppress(RuntimeError):  # the store may be gone; so are the others then
                self.store.set(f"beat/{self.rank}", "over")
                if self.rank == 0 and self._error is None:
                    self._let_others_leave()

    def _let_others_leave(self) -> None:
        """The store goes with this process, where torchrun doesn't keep it: the others must have no more to ask."""
        latest = time.monotonic() + TOLD_SECONDS
        for key in (f"beat/{rank}" for rank in range(1, self.size)):
            while not (self.store.check([key]) and self.store.get(key) == b"over") and time.monotonic() < latest:
                time.sleep(0.01)

    @contextlib.contextmanager
    def telling(
        self, *passing: type[Exception], explain: Callable[[Exception], Fault | None] = lambda error: None
    ) -> Iterator[None]:
        """Whatever fails in here in one process ends all of them.

        Args:
            *passing: errors that don't count.
            explain: an error's fault, where more is known of it than is said here.

        Raises:
            LocalgradError: as one line that names rank, modules and cause.
        """
        try:
            yield
        except passing:
            raise
        except Exception as error:
            if error is self._error:  # told by a region within this one
                raise
            self._error = error
            told = explain(error) or self._fault(error)
            fault = self.tell(told) if told is not None else None
            if fault is None or fault.rank != self.rank:
                # The thread ends this process, once it knows whose fault it is.
                self._over.wait(SILENT_SECONDS + TOLD_SECONDS)
                fault = fault or Fault(self.rank, _in_words(error))
            else:
                time.sleep(HEARD_SECONDS)
            if isinstance(error, LocalgradError) or fault.rank != self.rank or _is_broken(error):
                kind = DivergenceError if isinstance(error, DivergenceError) else ParallelError
                raise kind(self.describe(fault)) from error
            if self.rank == 0:
                print(f"localgrad: {self.describe(fault)}", file=sys.__stderr__, flush=True)
            raise

    def tell(self, fault: Fault) -> Fault:
        """Tell all others of a fault, unless there was one before.

        Returns:
            The one that counts.
        """
        if self._ending is not None:  # the store may be gone already
            return self._ending
        text = json.dumps(asdict(fault))
        try:
            found = self.store.compare_set("fault", "", text)
        except RuntimeError:
            return self._store_gone
        return Fault(**json.loads(found))

    def describe(self, fault: Fault) -> str:
        """A fault as one line."""
        name = f" ({self.names[fault.rank]})" if self.names else ""
        return f"rank {fault.rank}{name}: {fault.cause}"

    @property
    def _store_gone(self) -> Fault:
        # Where torchrun keeps the store, it is gone with torchrun, which ends all processes; else rank 0 kept it.
        return Fault(0, GONE, is_alive=False)

    def _fault(self, error: Exception) -> Fault | None:
        """The fault of an error here; ``None`` where another process is lost and nobody knows yet which."""
        if isinstance(error, LocalgradError):
            return Fault(self.rank, str(error), status=2)
        if _is_broken(error):
            self._silent_seconds = BROKEN_SECONDS
            return None
        if self.rank != 0:  # where main() says nothing
            traceback.print_exc(file=sys.__stderr__)
        return Fault(self.rank, _in_words(error))

    def _run(self) -> None:
        last = dict.fromkeys(range(self.size), ("", time.monotonic()))
        beat = 0
        while not self._over.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._once(beat, last)
                self._answered = time.monotonic()
            except RuntimeError:  # the store went with the process that kept it
                # At the end of a run, or after an error that all agree on, this process is about to leave as well.
                if not self._over.wait(BROKEN_SECONDS):
                    self._end(self._store_gone)

    def _watch_store(self) -> None:
        """End this process when the store answers no more: asking it then takes for ever."""
        while not self._over.wait(BEAT_SECONDS):
            if self._ending is None and time.monotonic() - self._answered > SILENT_SECONDS:
                self._end(Fault(0, SILENT, is_alive=False))

    def _once(self, beat: int, last: dict[int, tuple[str, float]]) -> None:
        self.store.set(f"beat/{self.rank}", str(beat))
        signal_number = self.noted()
        if signal_number is not None:
            self.store.set("stop", str(signal_number))
        if self.told_to_stop is None and self.store.check(["stop"]):
            self.told_to_stop = int(self.store.get("stop"))
        if self.store.check(["fault"]):
            fault = Fault(**json.loads(self.store.get("fault")))
            if fault.rank == self.rank and fault.is_alive:
                return  # the main thread has told it, and ends this process
            self._end(fault)
        now = time.monotonic()
        what, batch, since = self.doing()
        if what in ("work", "between batches") and now - since > self.hanging_seconds:
            phrase = f"in the step on batch {batch + 1}" if what == "work" else f"before batch {batch + 1}"
            self._end(self.tell(Fault(self.rank, f"it hangs: for {now - since:.0f} s, {phrase}")))
        for rank, (seen, when) in last.items():
            if rank == self.rank or seen == "over":
                continue
            said = self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else ""
            if said != seen:
                last[rank] = said, now
            elif now - when > self._silent_seconds:
                cause = SILENT if self._silent_seconds == SILENT_SECONDS else GONE  # where a connection broke
                self._end(self.tell(Fault(rank, cause, is_alive=False)))

    def _end(self, fault: Fault) -> None:
        """End this process, from the thread: the main one may wait for ever."""
        if self._over.is_set():
            return
        self._ending = fault
        speaker = 1 if fault.rank == 0 and not fault.is_alive else 0
        if self.rank == speaker:
            print(f"localgrad: {self.describe(fault)}", file=sys.__stderr__, flush=True)
        time.sleep(HEARD_SECONDS)
        os._exit(fault.status)


def _is_broken(error: Exception) -> bool:
    """Whether an error says that a connection to another process broke."""
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _BROKEN)


def _in_words(error: Exception) -> str:
    reason = reason_of(error)
    return reason if reason == type(error).__name__ else f"{type(error).__name__}: {reason}"
