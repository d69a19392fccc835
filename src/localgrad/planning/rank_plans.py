"""Plans for ranks: one local module each, balanced by time or by memory, within a budget that every rank keeps.

The same way through as for one process (``budget.py``): costs of every block, an exact search (``search.py``), and
one whole step of the chosen plan on fake tensors. The step is simulated in one process;
a rank's part of it is what its own module's step takes beside the static bytes of all, which are then its own alone.

What a rank needs has three parts: *static* (weights, optimizer state and average of its module), *step* (activations,
gradients, temporaries and the packet that is worked on) and *buffers*: packets received besides that one and packets
sent but not taken yet, as many as there may be, so that memory is known whatever the ranks' speeds. The wire's time is
left out (``research/simulation/simulator.py`` has it), and so is the update's, as in all plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from torch import Tensor

from localgrad import rules
from localgrad.errors import BudgetError, PartitionError, RecipeError, arg
from localgrad.memory.track import CUDA_ROUNDING, rounded
from localgrad.objectives.methods import GreedySupervised
from localgrad.parallel.packets import Packets
from localgrad.parallel.schedule import NUM_BUFFERS
from localgrad.partition import Plan, RankForecast, RanksForecast, forecast_of
from localgrad.planning.budget import ANY, Search, Task, at_least, budget_of, check_batch, confirmed, searches
from localgrad.planning.search import UNLIMITED, Ranks, Solution, fastest_ranks, smallest_ranks
from localgrad.step.local_module import image_of

BALANCES = ("time", "memory")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """What a plan for ranks is asked to be.

    Attributes:
        num_ranks: local modules, one a rank.
        balance: ``time``: the fastest slowest rank; ``memory``: the smallest largest rank.
        num_buffers: batches that may be on their way at each end of a link (``execution.buffers``).

    Raises:
        RecipeError: fewer than one rank, or another balance.
    """

    num_ranks: int
    balance: str = "time"
    num_buffers: int = NUM_BUFFERS

    def __post_init__(self) -> None:
        """Check the values."""
        if self.num_ranks < 1:
            raise RecipeError(
                f"{arg('parallel', self.num_ranks)}: a plan needs at least one rank; take {arg('parallel', 2)}."
            )
        _check_balance(self.balance)


def _check_balance(balance: str) -> None:
    if balance not in BALANCES:
        raise RecipeError(f"{arg('balance')}: unknown {balance!r}; take time or memory.")


def asked_for(
    num_ranks: int | None,
    balance: str | None,
    *,
    num_buffers: int = NUM_BUFFERS,
    frontier: bool = False,
    largest_batch: bool = False,
) -> Parallel | None:
    """The options of ``localgrad plan`` that are about ranks; ``None`` where they are not given.

    Raises:
        RecipeError: they contradict others, or are impossible.
    """
    if balance is not None:
        _check_balance(balance)
    auto = "auto" if largest_batch else None
    rules.check({"parallel": num_ranks, "balance": balance, "frontier": frontier, "batch_size": auto})
    if num_ranks is None:
        return None
    return Parallel(num_ranks=num_ranks, balance="time" if balance is None else balance, num_buffers=num_buffers)


def plan_parallel(task: Task, batch_size: int, parallel: Parallel, budget: int | None = None) -> Plan:
    """Find the best plan with one local module a rank, and confirm it.

    Args:
        task: what is to be trained; its modules may be boundaries, but then as many as there are ranks.
        batch_size: images an update.
        parallel: how many ranks, and how they are balanced.
        budget: bytes that every rank keeps; by default no limit.

    Returns:
        The plan. Its forecast is that of a step in one process, but ``needed_bytes`` is the largest rank's, and
        ``parallel`` tells of the ranks.

    Raises:
        BudgetError: no plan fits; the message says the least that does.
        PartitionError: more ranks than blocks, or modules of another number.
        RecipeError: something that ranks can't do.
    """
    check_batch(batch_size)
    _refuse_together(task, parallel)
    task = replace(_with_modules(task, parallel), replays=False)  # a rank's run is recorded nowhere: the larger margin
    whole = Search(task, task.costs(batch_size))
    least: list[tuple[int, _RankSearch]] = []
    for search in searches(task, whole, batch_size):
        ranks = _RankSearch(search, parallel)
        if budget is None:
            return ranks.confirmed(ranks.best(UNLIMITED), None)
        plan = _ranks_within(ranks, budget)
        if plan is not None:
            return plan
        least.append((max(ranks.smallest().rank_bytes), ranks))
    assert budget is not None, "without one the first search has a plan"
    raise _no_plan_for_ranks(min(least, key=lambda pair: pair[0])[1], budget)


@final
class _RankSearch:
    """The plans for ranks at one batch size and accumulation.

    Args:
        search: for the costs of modules.
        parallel: what is asked for.
    """

    def __init__(self, search: Search, parallel: Parallel) -> None:
        self.search, self.parallel, self.task, self.costs = search, parallel, search.task, search.costs
        self.batch_size = search.costs.settings.batch_size
        backbone, num_blocks = self.task.backbone, self.costs.num_blocks
        units = [backbone.stem, *backbone.blocks, backbone.tail]
        averages = [0] * len(units)
        if self.task.ema_decay is not None:
            averages = [_num_bytes([*unit.parameters(), *unit.buffers()]) for unit in units]
        self._static = [0, *itertools.accumulate(map(sum, zip(self.costs.static, averages, strict=True)))]
        soft = 4 * backbone.num_classes * self.batch_size
        self.packets = Packets(
            num_ranks=parallel.num_ranks,
            layouts=backbone.layouts,
            image=image_of(backbone.input_size),
            num_classes=backbone.num_classes,
            num_images=self.batch_size,
            dtype=backbone.dtype,
            labels=(soft if self.task.soft_labels else self.costs.labels) + self.costs.along,
            uses=self.costs.uses,
            last_uses=self.costs.last_uses,
            rounded=partial(rounded, rounding=CUDA_ROUNDING if self.costs.settings.device == "cuda" else 1),
        )
        self._arguments = num_blocks, parallel.num_ranks, search.choices, self._resident

    def static_bytes(self, start: int, stop: int) -> int:
        """Bytes that are alive all the time on the rank of blocks ``start .. stop - 1``."""
        first, last = start + 1 if start else 0, stop + 2 if stop == self.costs.num_blocks else stop + 1
        return self._static[last] - self._static[first] + self.costs.static_of(start, stop)

    def buffer_bytes(self, rank: int, received: int, sent: int) -> int:
        """Bytes of all packets of these sizes that a rank may have besides the one that it works on.

        What is sent on stays in the buffer that it was received into until it was taken: so a rank in the middle has
        twice as many of those. Its own features are counted with the whole packet, which is a little too much.
        """
        count = self.parallel.num_buffers
        slots = count if rank == self.parallel.num_ranks - 1 else 2 * count
        return (slots - 1) * received + count * sent

    def _resident(self, rank: int, start: int, stop: int) -> int:
        sent = self.packets.at_most_into(rank + 1, stop) if stop < self.costs.num_blocks else 0
        buffers = self.buffer_bytes(rank, self.packets.at_most_into(rank, start), sent)
        return self.static_bytes(start, stop) + buffers

    def smallest(self) -> Ranks:
        """The plan with the smallest largest rank."""
        return smallest_ranks(*self._arguments)

    def best(self, limit: int) -> Ranks | None:
        """The best plan whose estimated ranks are within a limit, by the balance that is asked for."""
        if self.parallel.balance == "time":
            return fastest_ranks(*self._arguments, limit)
        found = self.smallest()
        return found if max(found.rank_bytes) <= limit else None

    def confirmed(self, ranks: Ranks | None, budget: int | None) -> Plan:
        """A plan with its forecast, the ranks' included."""
        assert ranks is not None, "there is a plan for any number of ranks up to that of the blocks"
        edges = [0, *ranks.boundaries, self.costs.num_blocks]
        added = sum(self.costs.static_of(*run) for run in itertools.pairwise(edges))
        times = [choice.nanoseconds for choice in ranks.choices]
        peak = added + max(choice.peak_bytes for choice in ranks.choices)
        solution = Solution(ranks.boundaries, ranks.choices, sum(times), peak)
        plan = confirmed(self.task, self.search, solution, self.batch_size, budget)
        packets = [self.packets.into(rank, ranks.boundaries) for rank in range(len(times))]
        statics = [self.static_bytes(span.start, span.stop) for span in plan.spans]
        # The labels, which every rank has; and auxiliary nets that grow with the number of modules ahead, which
        # composed costs don't know. Which rank has those isn't told apart, so each is given all that is missing.
        forecast = forecast_of(plan)
        missing = max(0, forecast.static_bytes - sum(statics))
        rows = []
        for index, module in enumerate(forecast.modules):
            sent = packets[index + 1] if index + 1 < len(packets) else 0
            static, step = statics[index] + missing, module.peak_bytes - forecast.static_bytes
            buffers = self.buffer_bytes(index, packets[index], sent)
            rows.append(
                RankForecast(
                    time_share=module.time_share,
                    peak_bytes=static + step + buffers,
                    static_bytes=static,
                    step_bytes=step,
                    buffer_bytes=buffers,
                )
            )
        parallel = RanksForecast(
            num_ranks=len(rows),
            balance=self.parallel.balance,
            num_buffers=self.parallel.num_buffers,
            speed_up=sum(times) / max(times),
            sent_bytes=tuple(packets[1:]),
            ranks=tuple(rows),
        )
        needed = self.task.margin.needed(parallel.peak_bytes)
        return replace(plan, forecast=replace(forecast, needed_bytes=needed, parallel=parallel))


def largest_rank(plan: Plan) -> int:
    """Bytes of a confirmed plan's largest rank."""
    ranks = forecast_of(plan).parallel
    assert ranks is not None, "plans for ranks are confirmed with theirs"
    return ranks.peak_bytes


def _ranks_within(ranks: _RankSearch, budget: int) -> Plan | None:
    """The best plan of a search whose confirmed ranks are all within a budget."""
    usable = limit = ranks.task.margin.usable(budget)
    for _ in range(4):
        found = ranks.best(limit)
        if found is None:
            break
        plan = ranks.confirmed(found, budget)
        excess = largest_rank(plan) - usable
        if excess <= 0:
            return plan
        limit = max(found.rank_bytes) - excess
    least = ranks.smallest()  # composed figures that are too high may hide that it fits
    if max(least.rank_bytes) <= 1.1 * usable:
        plan = ranks.confirmed(least, budget)
        if largest_rank(plan) <= usable:
            return plan
    return None


def _no_plan_for_ranks(ranks: _RankSearch, budget: int) -> BudgetError:
    task, num_ranks = ranks.task, ranks.parallel.num_ranks
    accumulation = ranks.costs.settings.accumulation
    told = f" with the batch in {accumulation} parts" if accumulation > 1 else ""
    least = at_least(forecast_of(ranks.confirmed(ranks.smallest(), budget)).needed_bytes)
    hints = [f"a smaller {arg('batch_size')}"]
    if num_ranks < ranks.costs.num_blocks and task.modules == num_ranks:
        hints.append(arg("parallel", num_ranks + 1))
    if task.precision == "fp32":
        hints.append(arg("precision", "bf16"))
    return BudgetError(
        f"{budget_of(budget)}: no plan for a batch of {ranks.batch_size} on {num_ranks} ranks keeps every rank within "
        f"it; the least is {least}{told}. Take {', '.join(hints)}, or a larger budget."
    )


def _refuse_together(task: Task, parallel: Parallel) -> None:
    objective = task.objective
    rules.check(
        {
            "parallel": parallel.num_ranks,
            "overlap": task.overlap,
            "global_share": task.global_share,
            "teacher_share": objective.teacher_share if isinstance(objective, GreedySupervised) else None,
        }
    )


def _with_modules(task: Task, parallel: Parallel) -> Task:
    """The task with one module a rank."""
    num_ranks, num_blocks = parallel.num_ranks, len(task.backbone.blocks)
    if num_ranks > num_blocks:
        raise PartitionError(
            f"{arg('parallel', num_ranks)}: each rank needs a block, and this model has {num_blocks}; take "
            f"{arg('parallel', num_blocks)} or less."
        )
    if task.modules in (None, ANY):
        return replace(task, modules=num_ranks)
    count = task.fixed[1].start
    if count != num_ranks:
        raise PartitionError(
            f"{arg('parallel', num_ranks)}: a plan has one local module a rank, but {arg('modules')} asks for {count}; "
            f"leave {arg('modules')} out, or take {arg('parallel', count)}."
        )
    return task


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())
