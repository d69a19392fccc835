"""Processes for tests, forked from one that has imported everything and trained once, so that each starts at once.

``Ranks`` is the tests' end; this file as a script is the other one. Each process it forks is what
``python -m localgrad`` would be, with torchrun's environment where there are several: it calls the command line's own
entry, or another function. A fault may be put into one of them.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How some processes ended: exit statuses as shells tell them, what each said, and when.

    ``ended_at`` is when the last one ended that could end by itself, ``fault_at`` when the fault was put in.
    """

    codes: list[int]
    out: list[str]
    err: list[str]
    ended_at: float
    fault_at: float


class Started:
    """Processes that were started together."""

    def __init__(self, pids: list[int], folder: Path, answers: Any) -> None:
        self.pids = pids
        self.folder = folder
        self._answers = answers

    def is_running(self) -> bool:
        return all(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def send(self, number: signal.Signals) -> Ended:
        """Send all of them a signal, and wait until they have ended."""
        for pid in self.pids:
            os.kill(pid, number)
        return self.wait()

    def wait(self) -> Ended:
        ended, ended_at = json.loads(self._answers.readline())
        files = [[self.folder / f"{rank}.{name}" for rank in range(len(ended))] for name in ("out", "err")]
        said = [[file.read_text() if file.exists() else "" for file in each] for each in files]
        faults = [float(path.read_text()) for path in self.folder.glob("*.fault")]
        return Ended(ended, said[0], said[1], ended_at, faults[0] if faults else 0.0)


class Ranks:
    """Starts processes; one group at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def __enter__(self) -> Ranks:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def start(
        self,
        arguments: Sequence[object] | Sequence[Sequence[object]],
        *,
        size: int = 1,
        fault: tuple[int, str, int] | None = None,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        call: str = "localgrad.cli:main",
        estimates: bool = False,
        to: Path | str | None = None,
        split: Sequence[str] = (),
    ) -> Started:
        """Start ``size`` processes (one is started without torchrun's environment), with a fault in one of them.

        Args:
            arguments: of the command line; or a list of them for each.
            size: how many.
            fault: (rank, which, at which update of its modules).
            environment: more of it.
            port: where they meet.
            call: ``module:function`` that finds the arguments in ``sys.argv``.
            estimates: whether runs estimate their memory, which takes longer than they do, or say 1 MiB.
            to: a pipe that takes standard output, or a terminal that takes standard error as well.
            split: models of ``libraries.py`` that are split before processes are forked, once for all.
        """
        self.number += 1
        folder = self.folder / f"group{self.number}"
        folder.mkdir()
        each = arguments if isinstance(arguments[0], (list, tuple)) else [arguments] * size
        team = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
        request = [
            {
                "arguments": list(map(str, each[rank])),  # type: ignore[call-overload]
                "environment": {
                    **({**team, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}),
                    **(environment or {}),
                },
                "said": str(folder / str(rank)),
                "fault": fault[1:] if fault is not None and fault[0] == rank else None,
                "call": call,
                "estimates": estimates,
                "to": None if to is None else str(to),
                "split": list(split),
            }
            for rank in range(size)
        ]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Started(json.loads(self.process.stdout.readline()), folder, self.process.stdout)

    def run(self, arguments: Sequence[object] | Sequence[Sequence[object]], **settings: Any) -> Ended:
        """Start processes and wait until all have ended."""
        return self.start(arguments, **settings).wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


# ------------------------------------------------------------------------------------------- the other end


def die_while_caching(number: int) -> None:
    """Be killed when so many parts of features are written."""
    from localgrad.training import feature_cache

    count, write = 0, feature_cache._write_part

    def at_caching(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        described = write(*arguments)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return described

    feature_cache._write_part = at_caching


def inject(which: str, number: int, note: str | None = None) -> None:
    """Have something happen in this process at an update of one of its modules, counted from 1 in the training."""
    import torch

    from localgrad.step.local_step import LocalStep
    from localgrad.training.folder import RunFolder
    from localgrad.training.trainer import Trainer

    count, training = 0, False
    update, forward, save = LocalStep._update, LocalStep._once, RunFolder.save_part
    epoch = Trainer._train_epoch

    def noted() -> None:
        if note is not None:
            Path(note).write_text(str(time.monotonic()))

    def at_epoch(self: Trainer) -> None:  # estimates make steps before
        nonlocal training
        training = True
        epoch(self)

    def at_update(self: LocalStep) -> None:
        nonlocal count
        count += training
        if training and count == number:
            noted()
            if which == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif which == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif which == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            elif which == "error":
                raise RuntimeError("something else")
            elif which == "sleep":
                time.sleep(3600)
            elif which == "nan":
                with torch.no_grad():
                    for parameter in self.parameters:
                        parameter.fill_(float("nan"))
        update(self)

    def at_forward(self: LocalStep, *arguments: Any) -> Any:
        if which == "memory" and training and count + 1 == number:
            noted()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")
        return forward(self, *arguments)

    def at_saving(self: RunFolder, name: str, state: Any) -> None:
        if which == "kill while saving" and count >= number:
            (self.path / "checkpoints" / f".{name}.abcdefgh").write_bytes(b"half")
            noted()
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, name, state)

    LocalStep._update, LocalStep._once = at_update, at_forward  # type: ignore[method-assign]
    RunFolder.save_part, Trainer._train_epoch = at_saving, at_epoch  # type: ignore[method-assign]


def estimate_nothing() -> None:
    """Have runs say 1 MiB for whatever they estimate."""
    from localgrad.app import fitting

    def quickly(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(peak_bytes=2**20)

    fitting.estimate_step = fitting.estimate_share = quickly


def become(description: dict[str, Any]) -> None:
    """Be ``python -m localgrad`` with some arguments, in this forked process."""
    from localgrad import cli

    cli.time = SimpleNamespace(sleep=lambda _: None)  # no torchrun is here that would end rank 0 before it has spoken
    for number, name in ((1, "out"), (2, "err")):
        taken = description["to"] if number == 1 or os.isatty(1) else None
        os.dup2(os.open(taken or f"{description['said']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(description["environment"])
    sys.argv = ["localgrad", *description["arguments"]]
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1)
    match description["fault"]:
        case None:
            pass
        case ["kill while caching", number]:
            die_while_caching(number)
        case which, number:
            inject(which, number, f"{description['said']}.fault")
    if not description["estimates"]:
        estimate_nothing()
    module, function = description["call"].split(":")
    code = 0
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as stop:
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


WARM = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 8,
        "options": {"embed_dim": 8, "depth": 1, "num_heads": 2},
    },
    "data": {"name": "digits", "limit": 32},
    "local": {"modules": 1},
    "training": {"epochs": 1, "batch_size": 16},
    "execution": {"device": "cpu", "num_threads": 1},
}


def warm_up() -> None:
    """Import whatever is imported on the way, and read what is read once: by training."""
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    import parallel_worker  # noqa: F401
    from localgrad import run
    from localgrad.app.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        run.train(Recipe.from_dict(WARM), out=Path(folder) / "run")
    gc.collect()
    gc.freeze()  # nothing of this is to be looked through again by each process


def split_ahead(names: Sequence[str]) -> None:
    """Split models, and import their libraries, for all processes that are forked from now on."""
    import torch

    from libraries import parted

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in names:
        parted(name)
    torch.set_num_threads(threads)


def main() -> None:
    warm_up()
    for line in sys.stdin:
        pids = []
        descriptions = json.loads(line)
        split_ahead(descriptions[0]["split"])
        for description in descriptions:
            pid = os.fork()
            if not pid:
                try:
                    become(description)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(70)
            pids.append(pid)
        print(json.dumps(pids), flush=True)  # noqa: T201
        print(json.dumps(ended(pids)), flush=True)  # noqa: T201


def ended(pids: list[int]) -> tuple[list[int], float]:
    """Wait for processes; one that stopped itself is killed when all others have ended, as torchrun would do."""
    statuses: dict[int, int] = {}
    ended_at = 0.0
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.add(pid)
        else:
            ended_at = ended_at or time.monotonic() if stopped else time.monotonic()
            statuses[pid] = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        if stopped - statuses.keys() and len(statuses) + len(stopped) == len(pids):
            for each in stopped:
                os.kill(each, signal.SIGKILL)
    stopped.clear()
    return [statuses[pid] for pid in pids], ended_at


stopped: set[int] = set()


def as_one_of_torchruns(rank: str, which: str, number: str, *arguments: str) -> None:
    """Be one of the processes that torchrun starts, with a fault in one of them at the first attempt."""
    from localgrad import cli

    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        inject(which, int(number))
    sys.argv = ["localgrad", *arguments]
    cli.main()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        as_one_of_torchruns(*sys.argv[1:])
    else:
        main()
