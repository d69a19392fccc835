"""``--num-processes``: the same command in several processes on this machine, started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from localgrad.execution.team import STATUS_FILE

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``localgrad`` with some arguments in several processes, and wait for them.

    Args:
        count: how many.
        arguments: of each; ``--num-processes`` among them is taken as done there.

    Returns:
        The exit status: that of the process that failed, if one did.
    """
    threads = max(1, (os.cpu_count() or 1) // count)
    with tempfile.TemporaryDirectory(prefix="localgrad-") as folder:
        said = Path(folder) / "status"
        said.touch()
        process = subprocess.Popen(
            [sys.executable, *TORCHRUN, "--nproc-per-node", str(count), "-m", "localgrad", *arguments],
            env={"OMP_NUM_THREADS": str(threads), **os.environ, STATUS_FILE: str(said)},
        )
        before = {number: signal.signal(number, _pass_on(process)) for number in (signal.SIGTERM, signal.SIGHUP)}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches torchrun by itself
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        told = [int(line) for line in said.read_text().split()]
    failed = [each for each in told if each]
    return failed[0] if failed else status


def _pass_on(process: subprocess.Popen[bytes]) -> signal.Handlers:
    def pass_on(number: int, _frame: object) -> None:
        process.send_signal(number)

    return pass_on  # type: ignore[return-value]
