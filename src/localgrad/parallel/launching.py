"""``num_processes``: the same command in several processes on this machine, as torchrun starts them.

It is torchrun's own agent, called from Python: so what it would report at length of a process that failed (a
traceback, a table) is left out, as that process has said in a line what there is to say.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localgrad.errors import arg


def run_processes(count: int, arguments: Sequence[str], folder: Path) -> int:
    """Run ``localgrad`` with some arguments in several processes, and wait for them.

    SIGINT, SIGTERM and SIGHUP are passed on to them; whoever is still there half a minute later is killed
    (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` says otherwise).

    Args:
        count: how many.
        arguments: of each; ``num_processes`` among them is taken as done there.
        folder: the run's, to say how to go on.

    Returns:
        The exit status: that of the process that failed first; 128 and the number of the signal that ended one.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="localgrad-") as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=str(uuid.uuid4()),
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                local_addr="localhost",
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            elastic_launch(config, sys.executable)("-m", "localgrad", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        _tell_killed(error.failures, count, folder)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + int(stop.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _tell_killed(failures: Mapping[Any, Any], count: int, folder: Path) -> None:
    """Say which processes a signal ended, since they couldn't, and how to go on."""
    ended = {rank: -failure.exitcode for rank, failure in sorted(failures.items())}
    killed = {rank: number for rank, number in ended.items() if number > 0 and number != signal.SIGTERM}
    if not killed and any(number < 0 for number in ended.values()):  # it has said why, and the agent ended the others
        return
    killed = killed or ended
    said = " and ".join(f"rank {rank} was ended by {_name_of(number)}" for rank, number in killed.items())
    memory = " (if nobody did that, the system may have run out of memory)" if signal.SIGKILL in killed.values() else ""
    on = "nothing was saved yet: start it again"
    if (folder / "recipe.toml").exists():
        on = f"go on with: localgrad train {arg('resume', folder)} {arg('num_processes', count)}"
    print(f"localgrad: {said}{memory}; {on}", file=sys.stderr, flush=True)  # noqa: T201


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
