"""``--num-processes``: the same command in several processes on this machine, as torchrun starts them.

It is torchrun's own agent, called from Python: so what it would report at length of a process that failed (a
traceback, a table) is left out, as that process has said in a line what there is to say.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``localgrad`` with some arguments in several processes, and wait for them.

    SIGINT, SIGTERM and SIGHUP are passed on to them; whoever is still there half a minute later is killed
    (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` says otherwise).

    Args:
        count: how many.
        arguments: of each; ``--num-processes`` among them is taken as done there.

    Returns:
        The exit status: that of the process that failed first; 128 and the number of the signal that ended one.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="localgrad-") as folder:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=str(uuid.uuid4()),
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                local_addr="localhost",
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            elastic_launch(config, sys.executable)("-m", "localgrad", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + int(stop.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
