"""How fast training runs on many ranks: schedules played through on paper. Pure: seconds and bytes in, seconds out.

Four ways to train one model on R ranks, each rank with one module of it (data parallel: all of it)::

    local modules   rank 0  F0 B0 U F1 B1 U F2 B2 U         each module by its own loss; features go out after F,
                    rank 1     F0 B0 U F1 B1 U F2 B2 U      and nothing comes back: rank r is at batch t - r

    GPipe           rank 0  Fa Fb Fc . . . . Bc Bb Ba U     a batch in M microbatches, all forward, all backward; the
                    rank 1     Fa Fb Fc Bc Bb Ba U          gradient comes back over the links

    1F1B            rank 0  Fa Fb . Ba Fc . Bb . Bc U       the same, but backward as soon as it can: the same
                    rank 1     Fa Ba Fb Bb Fc Bc U          time, fewer activations alive

    data parallel   rank 0  F B|all-reduce U                gradients averaged over a ring

Each simulation is exact for its schedule: every rank runs its tasks in a fixed order, every link carries its messages
in a fixed order, and an event happens as soon as all that it waits for has. So times follow by maxima and sums, event
after event, with no queue.

What is simulated of the engine (``parallel/schedule.py``): a packet goes out between forward and backward pass; at
most ``num_buffers`` are under way, else the rank waits; a transfer begins once the receiver has a free buffer, of which
it has ``num_buffers``, the one that it works on among them. 1F1B and GPipe get what is kind to them: M microbatches
take exactly the batch's time, sends are never waited for, nothing is recomputed, a link's two directions are
independent.

What is not: what sending costs the processor, ranks whose times vary, loading of data, several all-reduces on one link.
Ranks have a processor each; ``shared_cores.py`` has those that don't.

Sources: GPipe, arXiv 1811.06965; 1F1B with a flush a batch, PipeDream-Flush, arXiv 2006.09503, section 2; ring
all-reduce, Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009), section 3: 2 (n - 1) / n of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from localgrad.parallel.schedule import NUM_BUFFERS


@dataclass(frozen=True, kw_only=True)
class Module:
    """What one rank does for one batch.

    Attributes:
        forward: seconds of its forward pass and loss.
        backward: seconds of its backward pass.
        update: seconds of its update.
        sent_bytes: of what it sends to the next rank; for rivals that send gradients, the same comes back.
        gradient_bytes: of its parameters' gradients, to be averaged over replicas.
        num_blocks: its blocks, alike; the all-reduce of a block starts when its backward pass is done.
    """

    forward: float
    backward: float
    update: float = 0.0
    sent_bytes: int = 0
    gradient_bytes: int = 0
    num_blocks: int = 1

    @property
    def seconds(self) -> float:
        """Of all three."""
        return self.forward + self.backward + self.update


def joined(modules: Sequence[Module]) -> Module:
    """Several modules in a row as one; what is sent is what the last one sends."""
    return Module(
        forward=sum(module.forward for module in modules),
        backward=sum(module.backward for module in modules),
        update=sum(module.update for module in modules),
        sent_bytes=modules[-1].sent_bytes,
        gradient_bytes=sum(module.gradient_bytes for module in modules),
        num_blocks=sum(module.num_blocks for module in modules),
    )


@dataclass(frozen=True)
class Link:
    """A connection between two ranks, one direction of it.

    Attributes:
        bandwidth: bytes a second.
        latency: seconds from the last byte's sending to its arrival.

    Raises:
        ValueError: the bandwidth isn't positive, or the latency is negative.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise ValueError(f"a link needs a positive bandwidth and no negative latency, got {self}.")

    def seconds(self, num_bytes: float) -> float:
        """How long bytes occupy the link."""
        return num_bytes / self.bandwidth


FREE = Link(float("inf"))
"""A link that takes no time."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where ranks are: nodes with fast links inside and slower ones between.

    Attributes:
        within: link of two ranks of a node.
        between: link of two ranks of different nodes, a rank's own.
        ranks_per_node: consecutive ranks are on one node.
    """

    within: Link = FREE
    between: Link = FREE
    ranks_per_node: int = 8

    def links(self, num_ranks: int) -> list[Link]:
        """The links between neighbours of a pipeline, which starts with a node's first rank or lies within a node."""
        return [self._to(rank) for rank in range(1, num_ranks)]

    def _to(self, rank: int) -> Link:
        return self.between if rank % self.ranks_per_node == 0 else self.within

    def ring(self, num_bytes: float, num_members: int, *, stride: int = 1) -> float:
        """Seconds of an all-reduce over ranks that are so far apart from each other, by its slowest link."""
        if num_members == 1:
            return 0.0
        link = self.between if num_members * stride > self.ranks_per_node else self.within
        hops = 2 * (num_members - 1)
        return link.seconds(num_bytes / num_members) * hops + hops * link.latency


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulation found.

    Attributes:
        batches: trained by all replicas together.
        makespan: seconds until the last rank is done.
        idle: for each rank of one replica, the share of the makespan in which it waits.
        period: seconds between two batches once it runs evenly.
        replicas: pipelines, each with batches of its own.
    """

    batches: int
    makespan: float
    idle: tuple[float, ...]
    period: float
    replicas: int = 1

    @property
    def throughput(self) -> float:
        """Batches a second, filling and draining included."""
        return self.batches / self.makespan

    @property
    def steady_throughput(self) -> float:
        """Batches a second once it runs evenly."""
        return self.replicas / self.period


def local_modules(
    modules: Sequence[Module],
    steps: int,
    cluster: Cluster | None = None,
    *,
    replicas: int = 1,
    num_buffers: int = NUM_BUFFERS,
) -> Outcome:
    """Local modules, one a rank, no gradient between them.

    Args:
        modules: in order.
        steps: batches of one replica.
        cluster: links; free ones by default.
        replicas: of the pipeline, the gradients of a module averaged over them.
        num_buffers: batches that may be on their way at each end of a link.

    Raises:
        ValueError: no modules, steps, replicas or buffers.
    """
    check_counts(modules=len(modules), steps=steps, replicas=replicas, num_buffers=num_buffers)
    cluster = cluster or Cluster()
    last = len(modules) - 1
    links = [*cluster.links(len(modules)), FREE]
    after = [_exposed(cluster, module, module.backward, replicas, len(modules)) + module.update for module in modules]
    free = [0.0] * len(modules)  # when a rank has done its last update
    done: list[list[float]] = [[] for _ in modules]  # when a rank has done each of its updates
    arrived: list[list[float]] = [[] for _ in modules]  # what a rank sent, at the next one
    sending = [0.0] * len(modules)  # until when a link is occupied
    ends = []
    for step in range(steps):
        for rank, module in enumerate(modules):
            start = free[rank] if rank == 0 else max(free[rank], arrived[rank - 1][step])
            time = start + module.forward
            if rank < last:
                buffer = 0.0
                if step >= num_buffers:
                    time = max(time, arrived[rank][step - num_buffers])
                    buffer = done[rank + 1][step - num_buffers]
                begin = max(time, sending[rank], buffer)
                sending[rank] = begin + links[rank].seconds(module.sent_bytes)
                arrived[rank].append(sending[rank] + links[rank].latency)
            free[rank] = time + module.backward + after[rank]
            done[rank].append(free[rank])
        ends.append(free[last])
    return outcome_of(modules, ends, max(free), replicas)


def one_forward_one_backward(
    modules: Sequence[Module], steps: int, cluster: Cluster | None = None, *, microbatches: int, replicas: int = 1
) -> Outcome:
    """A pipeline with one forward, one backward, flushed at each batch. Arguments as for ``gpipe``."""
    order = order_of_1f1b
    return _flushed(modules, steps, cluster or Cluster(), microbatches=microbatches, replicas=replicas, order=order)


def gpipe(
    modules: Sequence[Module], steps: int, cluster: Cluster | None = None, *, microbatches: int, replicas: int = 1
) -> Outcome:
    """A pipeline with all microbatches forward, then all backward.

    Args:
        modules: in order; their seconds are of a whole batch.
        steps: batches of one replica.
        cluster: links; free ones by default.
        microbatches: parts of each batch.
        replicas: of the pipeline.

    Raises:
        ValueError: no modules, steps, microbatches or replicas.
    """
    order = order_of_gpipe
    return _flushed(modules, steps, cluster or Cluster(), microbatches=microbatches, replicas=replicas, order=order)


def data_parallel(model: Module, steps: int, cluster: Cluster | None = None, *, replicas: int) -> Outcome:
    """The whole model on each rank, gradients averaged over a ring while the backward pass goes on.

    Args:
        model: seconds of one rank's batch.
        steps: batches of one rank.
        cluster: links; free ones by default.
        replicas: ranks.

    Raises:
        ValueError: no steps or replicas.
    """
    return local_modules([model], steps, cluster, replicas=replicas)


Pass = tuple[str, int]
"""``forward`` or ``backward``, and the number of a microbatch."""
Order = Callable[[int, int, int], list[Pass]]
"""``order(rank, num_ranks, microbatches)``: the passes of a rank for one batch."""


def order_of_1f1b(rank: int, num_ranks: int, microbatches: int) -> list[Pass]:
    """One forward, one backward, once as many are ahead as there are ranks behind."""
    ahead = min(num_ranks - 1 - rank, microbatches)
    passes = [("forward", number) for number in range(ahead)]
    for number in range(microbatches):
        passes += [("forward", number + ahead)] if number + ahead < microbatches else []
        passes.append(("backward", number))
    return passes


def order_of_gpipe(_rank: int, _num_ranks: int, microbatches: int) -> list[Pass]:
    """All forward, then all backward, the last one first."""
    forward = [("forward", number) for number in range(microbatches)]
    return forward + [("backward", number) for number in reversed(range(microbatches))]


def _flushed(
    modules: Sequence[Module],
    steps: int,
    cluster: Cluster,
    *,
    microbatches: int,
    replicas: int,
    order: Order,
) -> Outcome:
    """Play a schedule of microbatches through, batch after batch; once batches repeat, the rest is known."""
    check_counts(modules=len(modules), steps=steps, microbatches=microbatches, replicas=replicas)
    orders = [order(rank, len(modules), microbatches) for rank in range(len(modules))]
    links = cluster.links(len(modules))
    after = [
        _exposed(cluster, module, module.backward / microbatches, replicas, len(modules)) + module.update
        for module in modules
    ]
    free = [0.0] * len(modules)
    ends: list[float] = []
    makespan = 0.0
    for _ in range(steps):
        before = free
        done = _one_batch(modules, orders, links, before, microbatches)
        free = [time + rest for time, rest in zip(done, after, strict=True)]
        ends.append(max(free))
        shifts = [now - then for now, then in zip(free, before, strict=True)]
        if max(shifts) - min(shifts) <= 1e-9 * max(shifts):  # each rank does from here what it just did
            rest = steps - len(ends)
            makespan = max(free) + rest * shifts[0]
            ends += [ends[-1] + number * shifts[0] for number in range(1, rest + 1)]
            break
    return outcome_of(modules, ends, makespan or max(free), replicas)


def _one_batch(
    modules: Sequence[Module],
    orders: Sequence[Sequence[Pass]],
    links: Sequence[Link],
    free: Sequence[float],
    microbatches: int,
) -> list[float]:
    """When each rank is done with a batch's tasks, given when each is free to begin."""
    num_ranks = len(modules)
    now = list(free)
    arrived: dict[tuple[int, str, int], float] = {}  # what a task of a rank waits for
    occupied = {(rank, kind): 0.0 for rank in range(num_ranks) for kind in ("forward", "backward")}
    places = [0] * num_ranks
    waiting = list(range(num_ranks))
    while waiting:
        rank = waiting.pop()
        module, tasks = modules[rank], orders[rank]
        while places[rank] < len(tasks):
            kind, number = tasks[places[rank]]
            is_forward = kind == "forward"
            needs_nothing = rank == 0 if is_forward else rank == num_ranks - 1
            if not needs_nothing and (rank, kind, number) not in arrived:
                break
            begin = now[rank] if needs_nothing else max(now[rank], arrived[rank, kind, number])
            now[rank] = begin + (module.forward if is_forward else module.backward) / microbatches
            places[rank] += 1
            target = rank + 1 if is_forward else rank - 1
            if 0 <= target < num_ranks:
                edge = min(rank, target)
                num_bytes = modules[edge].sent_bytes / microbatches
                occupied[edge, kind] = max(now[rank], occupied[edge, kind]) + links[edge].seconds(num_bytes)
                arrived[target, kind, number] = occupied[edge, kind] + links[edge].latency
                waiting.append(target)
    return now


def _exposed(cluster: Cluster, module: Module, backward: float, replicas: int, stride: int) -> float:
    """Seconds that a module's all-reduce takes beyond its backward pass, which it follows block by block."""
    ring = cluster.ring(module.gradient_bytes, replicas, stride=stride)
    return max(ring / module.num_blocks, ring - backward * (1 - 1 / module.num_blocks))


def outcome_of(modules: Sequence[Module], ends: Sequence[float], makespan: float, replicas: int = 1) -> Outcome:
    """What was found, by when each batch was done."""
    busy = [module.seconds * len(ends) for module in modules]
    idle = tuple(max(0.0, 1 - seconds / makespan) if makespan else 0.0 for seconds in busy)
    return Outcome(
        batches=len(ends) * replicas, makespan=makespan, idle=idle, period=period_of(ends), replicas=replicas
    )


def period_of(ends: Sequence[float]) -> float:
    """Seconds between the ends of two batches, in the second half of them."""
    half = len(ends) // 2
    return (ends[-1] - ends[half]) / (len(ends) - 1 - half) if len(ends) - 1 > half else ends[-1] / len(ends)


def check_counts(**counts: int) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: with the first such count's name.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
