"""The processes that train one model together: torch.distributed's groups, and where this process stands in them.

Processes stand in a mesh of ``replicas x ranks``: the ranks of one replica share the local modules among them, and the
replicas of one rank have the same modules and average their gradients. torchrun starts them and tells each its number.
Every two neighbours in a row have a process group of their own, so that lines never wait for each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from localgrad.errors import ParallelError, arg, reason_of
from localgrad.parallel.pipeline import Neighbours
from localgrad.parallel.wire import Line

T = TypeVar("T")
JOINING_SECONDS = 120.0
"""How long processes wait for each other at the start; ``LOCALGRAD_JOINING_SECONDS`` says otherwise."""
TALKING = timedelta(days=7)
"""How long a process waits for others during the run: it is not this that ends a run that hangs, but ``Watch``."""


def in_team() -> bool:
    """Whether this process was started by torchrun, or by another that sets its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_speaker() -> bool:
    """Whether this process speaks for all: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def joining() -> timedelta:
    """How long this process waits for others at the start."""
    return timedelta(seconds=float(os.environ.get("LOCALGRAD_JOINING_SECONDS", JOINING_SECONDS)))


def was_restarted() -> bool:
    """Whether torchrun started this process anew, after one of the processes had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@dataclass(frozen=True, kw_only=True)
class Team:
    """Where this process stands among all that train one model.

    Attributes:
        rank: of this process among all.
        size: how many there are.
        replica: which replica it belongs to.
        num_replicas: how many there are.
        place: where it stands in its row of ranks.
        device: where it trains.
        store: torch.distributed's key-value store, for what isn't tensors.
        control: all processes, over gloo.
        twins: the processes with the same modules; ``None`` with one replica.
        twins_mesh: the same as a ``DeviceMesh``.
        twins_control: the same, over gloo.
        watch: what ends this process when another one is lost (``training.watch``); ``None`` in a loop of one's own.
    """

    rank: int
    size: int
    replica: int
    num_replicas: int
    place: Neighbours
    device: torch.device
    store: Any = field(repr=False)
    control: dist.ProcessGroup = field(repr=False)
    twins: dist.ProcessGroup | None = field(default=None, repr=False)
    twins_mesh: DeviceMesh | None = field(default=None, repr=False)
    twins_control: dist.ProcessGroup | None = field(default=None, repr=False)
    watch: Any = field(default=None, repr=False)

    @classmethod
    def join(cls, *, num_replicas: int = 1, device: torch.device | None = None, store: Any = None) -> Team:
        """Make groups with the other processes; all of them call this.

        Args:
            num_replicas: how often the whole model is there.
            device: where this process trains: the processor, or a GPU of its own; by default the GPU of its number on
                the machine, where there are GPUs.
            store: from ``meet``; by default they meet here.

        Raises:
            ParallelError: not started by torchrun, replicas that don't divide the processes, or no NCCL.
        """
        store = store or meet()
        if device is None:
            number = int(os.environ.get("LOCAL_RANK", "0"))
            device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        check_groups(size, num_replicas, device)
        on_gpu = device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if on_gpu:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("groups", store),  # type: ignore[attr-defined]
                rank=rank,
                world_size=size,
                timeout=TALKING,
            )
        num_ranks = size // num_replicas
        mesh = init_device_mesh(device.type, (num_replicas, num_ranks), mesh_dim_names=("replica", "rank"))
        replica, place = divmod(rank, num_ranks)
        before, behind = _lines(rank, num_replicas, num_ranks, on_gpu=on_gpu)
        twins = mesh.get_group("replica") if num_replicas > 1 else None
        twins_control = twins
        if twins is not None and on_gpu:
            twins_control = _same_modules(num_replicas, num_ranks, place)
        return cls(
            rank=rank,
            size=size,
            replica=replica,
            num_replicas=num_replicas,
            place=Neighbours(rank=place, num_ranks=num_ranks, before=before, behind=behind),
            device=device,
            store=store,
            control=_group(list(range(size)), "gloo"),
            twins=twins,
            twins_mesh=None if twins is None else mesh["replica"],
            twins_control=twins_control,
        )

    @property
    def is_speaker(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def num_ranks(self) -> int:
        """Processes that share the modules of one replica."""
        return self.place.num_ranks

    def everyone(self, value: T) -> list[T]:
        """What every process says, by rank; all call this together."""
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value, group=self.control)
        return said

    def to_speaker(self, value: T) -> list[T] | None:
        """What every process says, on rank 0 alone; all call this together. Tensors are better on the processor."""
        said: list[Any] | None = [None] * self.size if self.is_speaker else None
        dist.gather_object(value, said, dst=0, group=self.control)
        return said

    def any_twin(self, flag: bool) -> bool:  # noqa: FBT001  # the value itself
        """Whether a flag is set on this process or one with the same modules; those call this together."""
        if self.twins_control is None:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.twins_control)
        return bool(found.item())

    def leave(self) -> None:
        """Say good-bye: all processes are done."""
        dist.barrier(group=self.control)
        dist.destroy_process_group()


def check_groups(size: int, num_replicas: int, device: torch.device) -> None:
    """Refuse processes that can't be made groups of.

    Raises:
        ParallelError: replicas that don't divide them, or no NCCL.
    """
    if size % num_replicas:
        raise ParallelError(
            f"{arg('replicas', num_replicas)}: {size} processes can't be shared out among them; take a number of "
            f"processes that {num_replicas} divides."
        )
    if device.type == "cuda" and not dist.is_nccl_available():
        raise ParallelError(
            f"{arg('device', device)}: this PyTorch has no NCCL; take {arg('device', 'cpu')}, or another build."
        )


def meet() -> Any:
    """The store that torchrun keeps, or one of rank 0's, with this attempt's values only.

    Raises:
        ParallelError: not started by torchrun, or the processes can't meet.
    """
    if not in_team():
        raise ParallelError(
            f"{arg('parallel', 'modules')}: there is one process only; start several with torchrun, or add "
            f"{arg('num_processes', 2)}."
        )
    # A guest that reached somebody else's port waits for an answer without end; rank 0 says what there is to say.
    late = threading.Timer(2 * joining().total_seconds(), os._exit, (2,))
    late.daemon = True
    if not is_speaker():
        late.start()
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=joining()))  # type: ignore[attr-defined]
    except (RuntimeError, ValueError, OSError) as error:  # a port in use, an address of nobody, a variable unset
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise ParallelError(
            f"processes can't meet at {where} ({reason_of(error)}); give torchrun another port, or run it standalone."
        ) from error
    finally:
        late.cancel()
    # Only here: a run that torchrun starts anew must not find the fault that ended the one before.
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]


def exchange(store: Any, value: str) -> list[str]:
    """What every process says, by rank, before there are groups; all call this once.

    Raises:
        ParallelError: one of them never came.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    said: list[str] = []
    try:
        store.set(f"said/{rank}", value)
        for other in range(size):
            store.wait([f"said/{other}"], joining())
            said.append(store.get(f"said/{other}").decode())
        store.set(f"heard/{rank}", "")
        if rank == 0:  # which may keep the store, and end next
            store.wait([f"heard/{other}" for other in range(size)], joining())
    except RuntimeError as error:
        missing = min(len(said), size - 1)
        raise ParallelError(
            f"rank {missing} of {size} never came, in {joining().total_seconds():.0f} s; see what became of it, and "
            "start all of them again."
        ) from error
    return said


def _lines(rank: int, num_replicas: int, num_ranks: int, *, on_gpu: bool) -> tuple[Line | None, Line | None]:
    """A rank's lines from the one before and to the one behind; all processes make all groups, in one order."""
    before = behind = None
    for replica in range(num_replicas):
        for first in range(replica * num_ranks, (replica + 1) * num_ranks - 1):
            control = _group((first, first + 1), "gloo")
            data = _group((first, first + 1), "nccl") if on_gpu else control
            if rank == first:
                behind = Line(first + 1, data, control)
            elif rank == first + 1:
                before = Line(first, data, control)
    return before, behind


def _same_modules(num_replicas: int, num_ranks: int, own: int) -> Any:
    """The processes with the same modules as this one, over gloo; all processes make all groups, in one order."""
    groups = [
        _group([replica * num_ranks + place for replica in range(num_replicas)], "gloo") for place in range(num_ranks)
    ]
    return groups[own]


def _group(ranks: Sequence[int], backend: str) -> Any:
    return dist.new_group(list(ranks), backend=backend, timeout=TALKING)
