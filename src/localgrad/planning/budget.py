"""Plans to a memory budget: measure the costs, find the fastest plan that fits, confirm it by one whole step.

``plan_to_budget`` is the way through: costs of every block (``memory/parts.py``), the exact search
(``planning/search.py``), then the very step of the chosen plan on fake tensors (``learner.estimate_step``), whose
figures are the ones that are reported. Should the confirmed peak lie above the composed one and so above the budget,
the search is repeated with the difference taken off.

On CUDA a budget is of the card, and what a plan reserves of it depends on the order of its allocations. So the search
leaves a margin (``Margin``), and the plan that it finds is confirmed by replaying the run's own allocations at exactly
what is left of the budget (``confirming.py``); what doesn't fit, or leaves much unused, changes the margin, and the
search goes on. Where nothing is replayed the margin is larger, and told.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import final

import torch
from torch import nn

from localgrad.backbones.base import Backbone
from localgrad.errors import BudgetError, DeviceError, PartitionError, RecipeError, arg
from localgrad.estimating import estimate_step, record_run
from localgrad.evaluating import LARGEST_EVALUATION_BATCH
from localgrad.learner import LocalLearner, OptimizerFactory
from localgrad.memory.allocator_rules import Rules, rules_here
from localgrad.memory.cards import CARDS, Card, card_of
from localgrad.memory.costs import WAYS, Choice, Costs, CostSettings, interpolated, with_times
from localgrad.memory.parts import measure_costs
from localgrad.memory.recording import Trace
from localgrad.memory.temporaries import workspace_bytes
from localgrad.memory.timing import IMAGES, Calibration, machine_of, measure_times
from localgrad.memory.track import MemoryProfile
from localgrad.objectives.losses import Loss
from localgrad.objectives.methods import Objective
from localgrad.partition import (
    Boundaries,
    Checkpointing,
    Forecast,
    ModuleForecast,
    Plan,
    Request,
    Rival,
    forecast_of,
    resolve,
)
from localgrad.partitioning import frozen_from, model_name
from localgrad.planning.cache import Figures, key_of, remembered
from localgrad.planning.confirming import SMALL_BYTES, Confirmation, DataPath, Room, confirm
from localgrad.planning.search import UNLIMITED, Solution, fastest, frontier, smallest
from localgrad.step.local_module import observed_parts
from localgrad.units import format_bytes, parse_bytes

LARGEST_BATCH = 1 << 17
FREE_PERCENT = 5
"""Of a budget, beside the largest batch that is searched for: nothing is gained by the last image that fits."""
MOST_MODULES = 4
"""That are taken unasked: accuracy falls with their number, and published results go no further than four or so."""
ANY = "any"
"""As ``modules``: as many as the budget needs."""
GRADIENTS = ("any", "exact", "local")
MIB = 1 << 20


FRAGMENTATION = {True: (8, 18), False: (15, 27)}
"""Expandable segments or not -> per cent of the estimated peak that the search leaves for temporaries and between
blocks: where the plan is confirmed by a replay, and where it isn't.

The least caps under which seven configurations of Swin-T and ViT-B run were 1.01 to 1.15 x the bytes that they allocate
with expandable segments and 1.02 to 1.23 x without, and allocated bytes up to 3.3 % above the estimate (PyTorch's
allocator, simulated runtime, no GPU). The first figures are where the search begins, the second the worst of those."""


@dataclass(frozen=True)
class Margin:
    """What is left free for what an estimated peak doesn't hold.

    Attributes:
        percent: of the estimated peak.
        fixed_bytes: whatever the peak.
        reasons: for people.
        most_bytes: of the largest budget that there is.
    """

    percent: int = 0
    fixed_bytes: int = 0
    reasons: tuple[str, ...] = ()
    most_bytes: int = UNLIMITED

    @classmethod
    def of(cls, room: Room | None, *, compiled: bool, replayed: bool = True) -> Margin:
        """The margin on a card, larger where the step is compiled.

        Args:
            room: what there is of a card without a budget; ``None`` on processors.
            compiled: whether modules are compiled.
            replayed: whether the plan is going to be confirmed by a replay.
        """
        margin = cls()
        if room is not None:
            percent = FRAGMENTATION[room.rules.expandable][not replayed]
            fixed = 2 * workspace_bytes(room.card) + room.spare_bytes + room.context_bytes
            reasons: tuple[str, ...] = ()
            if not replayed:
                reasons = (
                    f"not confirmed by a replay of the run's allocations: {percent} % left for temporaries and between "
                    "blocks",
                )
            margin = cls(percent, fixed, reasons, room.cap_bytes + room.context_bytes)
        if compiled:
            reason = "compiled graphs can't be estimated: 10 % on the estimate of the plain step"
            margin = replace(margin, percent=margin.percent + 10, reasons=(*margin.reasons, reason))
        return margin

    def usable(self, budget: int) -> int:
        """The largest estimated peak that fits a budget."""
        return (min(budget, self.most_bytes) - self.fixed_bytes) * 100 // (100 + self.percent)

    def needed(self, peak: int) -> int:
        """The budget that an estimated peak needs."""
        return -(-peak * (100 + self.percent) // 100) + self.fixed_bytes


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, as far as its memory and time go.

    Attributes:
        backbone: split, or outlined; only shapes are read.
        objective: what every module but the last is trained on.
        optimizer: makes a module's optimizer.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        device: ``cpu`` or ``cuda``; there need be none.
        compiled: whether modules go through ``torch.compile``.
        ema_decay: whether an average of the weights is kept.
        clip_grad: whether gradients are clipped.
        modules: how many modules, ``stages``, boundaries, or ``any``; by default at most 4.
        gradients: ``any``; ``exact`` for one module, end-to-end training; ``local`` for two or more.
        overlap: blocks of the module before that each module trains as well.
        global_share: share of the steps that are end-to-end; they recompute whatever makes them fit.
        freeze_from: share of the training after which modules are frozen, as for ``LocalLearner``.
        accumulation: into how many parts batches are cut; by default as few as fit.
        soft_labels: whether labels are probabilities of classes (mixup), not indices.
        measure: whether parts are timed by the clock of this machine, not by nominal rates.
        cache: whether costs that were measured before may be taken, and those that are measured are kept for others.
        card: that it is trained on, with CUDA; by default the one here, or one that is assumed.
        rules: of PyTorch's allocator; by default as it is here.
        data: what the data path takes of the card.
        replays: whether a plan is confirmed by replaying its run's allocations.
        loss: of the task; by default what the model is made for.
        shared: what becomes of a parameter that several modules read, as for ``LocalLearner``.
        chunk_logits: whether logits of the model's own end are made chunk by chunk.
        num_images: that an epoch has, at most: no batch is larger.
    """

    backbone: Backbone
    objective: Objective
    optimizer: OptimizerFactory
    precision: str = "fp32"
    device: str = "cpu"
    compiled: bool = False
    ema_decay: float | None = None
    clip_grad: float | None = None
    modules: Request | None = None
    gradients: str = "any"
    overlap: int = 0
    global_share: float = 0.0
    freeze_from: float | None = None
    accumulation: int | None = None
    soft_labels: bool = False
    measure: bool = False
    cache: bool = True
    card: Card | None = None
    rules: Rules = field(default_factory=rules_here)
    data: DataPath = field(default_factory=DataPath)
    replays: bool = True
    loss: Loss | None = None
    shared: str = "refuse"
    chunk_logits: bool = False
    num_images: int | None = None
    measured: dict[CostSettings, Costs] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def margin(self) -> Margin:
        """What is left free."""
        return Margin.of(self.room(None), compiled=self.compiled, replayed=self.replays)

    @cached_property
    def planned_card(self) -> Card:
        """The card that is planned for."""
        return self.card or card_of("auto")

    def room(self, budget: int | None) -> Room | None:
        """What a budget leaves PyTorch's allocator; ``None`` on processors."""
        if self.device != "cuda":
            return None
        convolves = any(isinstance(net, _CONVOLUTIONS) for net in self.backbone.model.modules())
        return Room.of(self.planned_card, self.rules, budget, convolves=convolves)

    @cached_property
    def fixed(self) -> tuple[Boundaries | None, range]:
        """Boundaries, where they are asked for, and how many modules there may be."""
        num_blocks = len(self.backbone.blocks)
        if self.modules is None or self.modules == ANY:
            most = min(MOST_MODULES, num_blocks) if self.modules is None else num_blocks
            counts = {"any": range(1, most + 1), "exact": range(1, 2), "local": range(2, most + 1)}[self.gradients]
            if not counts:
                raise PartitionError(f"{arg('gradients', 'local')}: this model has one block; take exact ones.")
            return None, counts
        boundaries = resolve(self.modules, [1] * num_blocks, self.backbone.stage_boundaries)
        count = len(boundaries) + 1
        if self.gradients != "any" and (self.gradients == "exact") != (count == 1):
            raise RecipeError(
                f"{arg('gradients', self.gradients)} doesn't go with {arg('modules')} that come to {count}: gradients "
                "are exact with one module, and local with more; leave one of them out."
            )
        return None if isinstance(self.modules, int) else boundaries, range(count, count + 1)

    @cached_property
    def average_bytes(self) -> int:
        """Bytes of the averaged weights."""
        if self.ema_decay is None:
            return 0
        tensors = {id(tensor): tensor for tensor in (*self.backbone.parameters(), *self.backbone.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def costs(self, batch_size: int, accumulation: int = 1) -> Costs:
        """Measure the costs, or take them from the cache."""
        settings = CostSettings(
            batch_size=batch_size,
            precision=self.precision,
            accumulation=accumulation,
            device=self.device,
            overlap=self.overlap,
            chunk_logits=self.chunk_logits,
            shared=self.shared,
        )
        if settings not in self.measured:  # what the cache doesn't know is measured once all the same
            costs = self._costs(settings)
            self.measured[settings] = with_times(costs, self.calibration.costs) if self.measure else costs
        return self.measured[settings]

    @cached_property
    def calibration(self) -> Calibration:
        """The times of parts here, by the clock; one for all batch sizes.

        Raises:
            DeviceError: there is no such device here.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            told = arg("measure", value=True)
            raise DeviceError(f"{told}: there is no CUDA device here; take {arg('device', 'cpu')}, or leave it out.")
        settings = CostSettings(
            batch_size=IMAGES[self.device],
            precision=self.precision,
            overlap=self.overlap,
            chunk_logits=self.chunk_logits,
            shared=self.shared,
        )
        device = torch.device(self.device)
        key = self._key_of(settings)

        def found() -> Figures:
            parts = self.backbone, self.objective, self.optimizer
            return measure_times(*parts, settings, device, loss=self.loss).to_dict()

        key = None if key is None else hashlib.sha256(f"{key} {machine_of(device)}".encode()).hexdigest()
        return Calibration.from_dict(remembered(key, found, folder="times"))

    def _costs(self, settings: CostSettings) -> Costs:
        def found() -> Figures:
            return measure_costs(self.backbone, self.objective, self.optimizer, settings, loss=self.loss).to_dict()

        return Costs.from_dict(remembered(self._key_of(settings), found))

    def _key_of(self, settings: CostSettings) -> str | None:
        if not self.cache:
            return None
        return key_of(self.backbone, self.objective, self.optimizer, settings, self.loss)

    def confirm(self, plan: Plan, batch_size: int, globally: Checkpointing | None = None) -> MemoryProfile:
        """Simulate one whole step of a plan; an end-to-end one that recomputes in some way, where that is given."""
        learner, device = self.learner(plan, globally), torch.device(self.device)
        return estimate_step(learner, batch_size, self.optimizer, device, globally=globally is not None)

    def replayed(self, plan: Plan, batch_size: int, room: Room) -> Confirmation:
        """Record a run of a plan, and replay it in what room there is."""
        return self._replayed(self._recorded(plan, batch_size, self.planned_card), room)

    def _replayed(self, trace: Trace, room: Room) -> Confirmation:
        return confirm(trace, room.less(percent=10) if self.compiled else room)

    def least_budget(self, plan: Plan, batch_size: int) -> int:
        """About the least budget that a run of a plan fits as it is replayed; rounded up as text, it suffices."""
        trace, room = self._recorded(plan, batch_size, self.planned_card), self.room(None)
        assert room is not None, "runs are replayed for cards"
        cap = self._replayed(trace, room).least_bytes
        least = (cap * 110 // 100 if self.compiled else cap) + room.context_bytes
        for _ in range(TRIES):  # fitting isn't monotone, and steps that are repeated need a little more
            told = parse_bytes(at_least(least))
            at_it = self.room(told)
            assert at_it is not None, "there is a card"
            if told > self.margin.most_bytes or self._replayed(trace, at_it).fits:
                break
            least = told + max((told - room.context_bytes) // 100, 2 * MIB)
        return least

    def most_on_other_cards(self, plan: Plan, batch_size: int) -> tuple[str, int]:
        """The card of the table that runs the most threads at once, and what a run of a plan reserves there."""
        worst = max(CARDS.values(), key=lambda card: card.multiprocessors * card.threads)
        trace = self._recorded(plan, batch_size, worst)
        room = Room.of(worst, rules_here(), None, convolves=False)
        return worst.name, room.replayed(trace.events, 1 << 50).reserved_bytes

    def _recorded(self, plan: Plan, batch_size: int, card: Card) -> Trace:
        mixed = self.global_share and plan.num_modules > 1
        largest = plan.evaluation_batch or batch_size
        sizes = [min(largest, count) for count in self.data.num_evaluated] or [largest]
        return record_run(
            self.learner(plan, plan.global_checkpoint),
            batch_size,
            self.optimizer,
            card,
            steps=4 if mixed else 2,
            globally=[False, True, False, False] if mixed else False,
            evaluation_batch=max(sizes),
            make_batch=self.data.make_batch,
            kept_bytes=self.data.kept_bytes,
        )

    def learner(self, plan: Plan, globally: Checkpointing | None = None) -> LocalLearner:
        """The learner of a plan, on this task's outline."""
        return LocalLearner(
            self.backbone,
            modules=plan,
            objective=self.objective,
            precision=self.precision,
            clip_grad=self.clip_grad,
            ema_decay=self.ema_decay,
            overlap=self.overlap,
            global_checkpoint=globally or Checkpointing(),
            loss=self.loss,
            shared=self.shared,
            chunk_logits=self.chunk_logits,
        )


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
class Search:
    """The plans of a task at one batch size.

    Args:
        task: what is to be trained.
        costs: of its parts.
    """

    def __init__(self, task: Task, costs: Costs) -> None:
        self.task = task
        self.costs = costs
        self.static_bytes = costs.static_bytes + task.average_bytes
        self._choices = lru_cache(maxsize=None)(costs.choices)
        boundaries, self.num_modules = task.fixed
        edges = None if boundaries is None else (0, *boundaries, costs.num_blocks)
        self._spans = None if edges is None else set(itertools.pairwise(edges))

    def choices(self, start: int, stop: int) -> Sequence[Choice]:
        """Ways to run a module; none where boundaries are asked for that don't make it."""
        if self._spans is not None and (start, stop) not in self._spans:
            return ()
        return self._choices(start, stop)

    def fastest(self, budget: int) -> Solution | None:
        """The fastest plan whose estimated peak is within a budget (no margin taken off)."""
        inner = min(budget, UNLIMITED) - self.static_bytes
        return fastest(self.costs.num_blocks, self.choices, self.costs.static_of, inner, num_modules=self.num_modules)

    def smallest(self) -> Solution:
        """The plan with the least peak."""
        return smallest(self.costs.num_blocks, self.choices, self.costs.static_of, num_modules=self.num_modules)

    def balanced(self) -> Solution:
        """The plan with the least peak among those that recompute nothing: of modules balanced by memory."""
        return smallest(self.costs.num_blocks, self._plain, self.costs.static_of, num_modules=self.num_modules)

    def exact(self, budget: int) -> Solution | None:
        """The fastest way to train end to end whose estimated peak is within a budget."""
        inner = min(budget, UNLIMITED) - self.static_bytes
        fitting = [solution for solution in self.exact_ways() if solution.peak_bytes <= inner]
        return min(fitting, key=lambda solution: solution.nanoseconds, default=None)

    def smallest_exact(self) -> Solution:
        """The way to train end to end with the least peak."""
        return min(self.exact_ways(), key=lambda solution: solution.peak_bytes)

    def exact_ways(self) -> list[Solution]:
        """All ways to train end to end, with one that recomputes nothing."""
        num_blocks = self.costs.num_blocks
        own = self.costs.static_of(0, num_blocks)
        ways = self._choices(0, num_blocks)
        return [Solution((), (way,), way.nanoseconds, way.peak_bytes + own) for way in ways]

    def _plain(self, start: int, stop: int) -> list[Choice]:
        """A module that recomputes nothing, where it may be one."""
        return [self.costs.choice(start, stop, Checkpointing())] if self.choices(start, stop) else []

    def fastest_plain(self, budget: int) -> Solution | None:
        """The fastest plan that recomputes nothing and whose estimated peak is within a budget."""
        inner = min(budget, UNLIMITED) - self.static_bytes
        return fastest(self.costs.num_blocks, self._plain, self.costs.static_of, inner, num_modules=self.num_modules)

    def frontier(self) -> list[Solution]:
        """All plans worth having."""
        return frontier(self.costs.num_blocks, self.choices, self.costs.static_of, num_modules=self.num_modules)

    def peak(self, solution: Solution) -> int:
        """Estimated peak of a plan, composed."""
        return self.static_bytes + solution.peak_bytes

    def end_to_end(self, how: Checkpointing | None = None) -> Solution:
        """End-to-end training, with one way of checkpointing."""
        num_blocks = self.costs.num_blocks
        choice = self.costs.choice(0, num_blocks, how or Checkpointing())
        return Solution((), (choice,), choice.nanoseconds, choice.peak_bytes + self.costs.static_of(0, num_blocks))

    def as_plan(self, solution: Solution) -> Plan:
        """A solution as the plan that training takes."""
        return Plan(
            model=model_name(self.task.backbone.model),
            num_blocks=self.costs.num_blocks,
            boundaries=solution.boundaries,
            checkpoint=tuple(choice.how for choice in solution.choices),
            accumulation=self.costs.settings.accumulation,
        )


def plan_to_budget(task: Task, batch_size: int, budget: int | None = None) -> Plan:
    """Find the fastest plan within a memory budget and confirm it; batches are cut only where nothing else fits.

    Args:
        task: what is to be trained.
        batch_size: images an update.
        budget: bytes; by default no limit, and modules that are asked for are balanced by memory.

    Returns:
        The plan, with its forecast.

    Raises:
        BudgetError: no plan fits; the message says the least that does, and what to change.
    """
    check_batch(batch_size)
    whole = Search(task, task.costs(batch_size))
    if budget is None:
        search = next(searches(task, whole, batch_size))
        # Times hardly tell partitions apart; without a budget local modules are there to save memory.
        solution = search.fastest(UNLIMITED) if 1 in search.num_modules else search.balanced()
        return confirmed(task, search, solution, batch_size, None)
    room = task.room(budget) if task.replays else None
    _check_static(whole, budget, room)
    for search in searches(task, whole, batch_size):
        plan = _within(search, batch_size, budget) if room is None else _within_room(search, batch_size, budget, room)
        if plan is not None:
            return plan
    raise _cannot_fit(task, whole, batch_size, budget)


def searches(task: Task, whole: Search, batch_size: int) -> Iterator[Search]:
    """The search for whole batches, then those for batches in 2, 4, 8 ... parts; or just the one that is asked for."""
    asked = [1, *parts_of(batch_size)] if task.accumulation is None else [task.accumulation]
    for parts in asked:
        yield whole if parts == 1 else Search(task, task.costs(batch_size, parts))


def parts_of(batch_size: int) -> list[int]:
    """Into how many parts a batch may be cut: none of a single image, on which batch norms refuse to train."""
    doubled = [1 << power for power in range(1, batch_size.bit_length()) if 1 << power <= batch_size // 2]
    return [parts for parts in doubled if batch_size % math.ceil(batch_size / parts) != 1]


def _within(search: Search, batch_size: int, budget: int) -> Plan | None:
    """The fastest plan of a search whose confirmed peak is within a budget."""
    task = search.task
    usable = limit = task.margin.usable(budget)
    for _ in range(4):
        solution = search.fastest(limit)
        if solution is None:
            break
        plan = confirmed(task, search, solution, batch_size, budget)
        excess = forecast_of(plan).peak_bytes - usable
        if excess <= 0:
            return plan
        limit = search.peak(solution) - excess
    least = search.smallest()  # what was taken off for others need not be true of this one, and it may need less
    if search.peak(least) <= 1.1 * usable:
        plan = confirmed(task, search, least, batch_size, budget)
        if forecast_of(plan).peak_bytes <= usable:
            return plan
    return None


@dataclass(frozen=True)
class _Tried:
    """A solution whose run was replayed."""

    solution: Solution
    plan: Plan
    confirmation: Confirmation


MUCH = 0.93
"""A plan that needs less than this share of what there is may leave room for a faster one."""
TRIES = 6


def _within_room(search: Search, batch_size: int, budget: int, room: Room) -> Plan | None:
    """The fastest plan of a search whose run fits what a budget leaves the allocator, as a replay of it shows.

    Composed peaks rank plans; how much more a plan reserves is learnt from those that were replayed.
    """
    task, best = search.task, None
    limit = task.margin.usable(budget)
    known: dict[Solution, _Tried] = {}
    for _ in range(TRIES):
        solution = search.fastest(limit)
        if solution is None or solution in known or (best and solution.nanoseconds >= best.solution.nanoseconds):
            break
        tried = known[solution] = _tried(search, solution, batch_size, budget, room)
        least, composed = tried.confirmation.least_bytes, search.peak(solution)
        share = room.cap_bytes / least
        if tried.confirmation.fits:
            best = tried
            if 1 / share > MUCH:
                break
            limit = int(composed * share * 0.99)
        elif best is not None:
            break
        else:
            limit = min(composed - 1, int(composed * min(share, 1.0) * 0.99))
    if best is None:
        least_plan = search.smallest()
        if least_plan not in known and search.peak(least_plan) <= room.cap_bytes:
            best = _tried(search, least_plan, batch_size, budget, room)
    if best is None or not best.confirmation.fits:
        return None
    plan = confirmed(task, search, best.solution, batch_size, budget)
    plan = replace(plan, evaluation_batch=best.plan.evaluation_batch)
    plan = told_of_card(task, plan, best.confirmation, room)
    if not room.card.assumed:
        return plan
    name, reserved = task.most_on_other_cards(plan, batch_size)
    forecast = forecast_of(plan)
    note = f"temporaries depend on the card: on {name}, most of the table's, this run reserves {format_bytes(reserved)}"
    return replace(plan, forecast=replace(forecast, notes=(*forecast.notes, note)))


def _tried(search: Search, solution: Solution, batch_size: int, budget: int, room: Room) -> _Tried:
    """A solution's run replayed; evaluated in smaller batches where that is what doesn't fit."""
    task = search.task
    plan = search.as_plan(solution)
    if task.global_share and plan.num_modules > 1:
        plan = confirmed(task, search, solution, batch_size, budget)
    parts = plan.accumulation * max(how.chunks for how in plan.checkpoint)
    size = min(LARGEST_EVALUATION_BATCH, batch_size if parts == 1 else max(1, 4 * batch_size // parts), batch_size)
    while True:
        plan = replace(plan, evaluation_batch=size)
        confirmation = task.replayed(plan, batch_size, room)
        if confirmation.failed_in not in ("evaluation", "step after evaluation") or size == 1:
            return _Tried(solution, plan, confirmation)
        size = max(1, size // 4)


def told_of_card(task: Task, plan: Plan, found: Confirmation, room: Room) -> Plan:
    """A plan whose forecast tells what the card's allocator makes of it."""
    forecast = forecast_of(plan)
    module = forecast.modules[forecast.peak_module]
    at_peak = {name: module.by_category.get(name, 0) for name in ("activations", "temporary", "gradients", "inputs")}
    weights = {id(tensor): tensor for tensor in (*task.backbone.parameters(), *task.backbone.buffers())}
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    held = sum(module.by_category.get(name, 0) for name in ("parameters", "buffers"))
    kept, workspaces = sum(task.data.kept_bytes), 2 * workspace_bytes(room.card)
    parts = {
        "context": room.context_bytes,
        "cuBLAS workspaces": workspaces,
        "images kept on the card": kept,
        "weights": weight_bytes,
        "average of weights": task.average_bytes,
        "auxiliary nets": max(0, held - weight_bytes - task.average_bytes),
        "optimizer state": module.by_category.get("optimizer", 0),
        "gradients": at_peak["gradients"],
        "activations": at_peak["activations"],
        "images and labels": at_peak["inputs"],
        "temporaries": at_peak["temporary"],
    }
    told = sum(parts.values()) - room.context_bytes
    parts["temporaries"] += max(0, found.replay.allocated_bytes - told)
    parts["fragmentation"] = found.replay.reserved_bytes - found.replay.allocated_bytes
    parts["allowance for cuDNN"] = room.cudnn_bytes
    parts["allowance for small tensors"] = SMALL_BYTES
    forecast = replace(
        forecast,
        needed_bytes=min(found.least_bytes, room.cap_bytes) + room.context_bytes,
        allocated_bytes=found.replay.allocated_bytes,
        reserved_bytes=found.replay.reserved_bytes,
        available_bytes=room.cap_bytes,
        card=str(room.card),
        card_is_assumed=room.card.assumed,
        allocator_rules=str(room.rules),
        is_confirmed=True,
        budget_parts={name: nbytes for name, nbytes in parts.items() if nbytes},
        attention=found.attention,
    )
    return replace(plan, forecast=forecast)


def confirmed(task: Task, search: Search, solution: Solution | None, batch_size: int, budget: int | None) -> Plan:
    """A solution as a plan, with the forecast of one whole step on fake tensors."""
    assert solution is not None, "there is a plan for any number of modules that the model has"
    plan = search.as_plan(solution)
    profile = task.confirm(plan, batch_size)
    # Times are told as ratios to end-to-end training on the whole batch, nothing recomputed.
    base = Search(task, task.costs(batch_size)).end_to_end().nanoseconds
    names = task.backbone.block_names
    modules = tuple(
        ModuleForecast(
            first_block=names[span.start],
            last_block=names[span.stop - 1],
            num_blocks=len(span),
            checkpoint=str(choice.how),
            peak_bytes=profile.peak_by_label[f"module {index}"],
            by_category=profile.by_category_of_label[f"module {index}"],
            time_share=choice.nanoseconds / solution.nanoseconds,
        )
        for index, (span, choice) in enumerate(zip(plan.spans, solution.choices, strict=True))
    )
    found = None
    if task.global_share and plan.num_modules > 1:
        usable = UNLIMITED if budget is None else task.margin.usable(budget)
        found = _global_steps(task, search, plan, batch_size, usable)
    time = mean_nanoseconds(task, search.costs, solution, found)
    peak = max(profile.peak_bytes, 0 if found is None else found.peak_bytes)
    forecast = Forecast(
        peak_bytes=peak,
        composed_peak_bytes=search.peak(solution),
        static_bytes=profile.static_bytes,
        needed_bytes=task.margin.needed(peak),
        budget_bytes=budget,
        time_ratio=time / base,
        global_peak_bytes=None if found is None else found.peak_bytes,
        modules=modules,
        peak_module=max(range(len(modules)), key=lambda index: modules[index].peak_bytes),
        rivals=_rivals(task, batch_size, base),
        exact=_exact_rival(search, plan, batch_size, budget, base),
        notes=(*task.margin.reasons, *_notes(task, plan)),
    )
    return replace(plan, global_checkpoint=None if found is None else found.how, forecast=forecast)


def mean_nanoseconds(task: Task, costs: Costs, solution: Solution, global_step: Choice | None) -> float:
    """Nominal time of a step, the mean over a whole training.

    Local steps with a teacher run the whole averaged model forward, too; modules that are frozen only run. End-to-end
    steps have neither.

    Args:
        task: what is to be trained.
        costs: of its parts.
        solution: how local steps are run.
        global_step: how end-to-end steps are, if there are any.
    """
    edges = (0, *solution.boundaries, costs.num_blocks)
    num_modules = len(solution.choices)
    time = 0.0
    for index, ((start, stop), choice) in enumerate(zip(itertools.pairwise(edges), solution.choices, strict=True)):
        begins = frozen_from(task.freeze_from, index, num_modules)
        frozen = 0.0 if begins is None else 1 - begins
        time += (1 - frozen) * choice.nanoseconds + frozen * costs.forward_ns(start, stop, with_objective=True)
    if num_modules > 1 and "teacher" in costs.uses:
        time += costs.forward_ns(0, costs.num_blocks, with_objective=False)
    if global_step is None:
        return time
    return (1 - task.global_share) * time + task.global_share * global_step.nanoseconds


def _global_steps(task: Task, search: Search, plan: Plan, batch_size: int, usable: int) -> Choice:
    """The fastest way to run a plan's end-to-end steps that is usable, confirmed; if none is, the smallest found."""
    num_blocks = search.costs.num_blocks
    ways = [search.costs.choice(0, num_blocks, how) for how in WAYS]
    found: list[Choice] = []
    for way in sorted(ways):
        if found and way.peak_bytes >= found[-1].peak_bytes:
            continue
        composed = search.static_bytes + way.peak_bytes
        if composed > 1.1 * usable and way.peak_bytes > min(ways, key=lambda other: other.peak_bytes).peak_bytes:
            continue
        found.append(way._replace(peak_bytes=task.confirm(plan, batch_size, way.how).peak_bytes))
        if found[-1].peak_bytes <= usable:
            return found[-1]
    return min(found, key=lambda way: way.peak_bytes)


def _notes(task: Task, plan: Plan) -> list[str]:
    notes = [task.calibration.note] if task.measure else []
    if task.precision == "bf16" and task.card is not None and not task.card.has_bfloat16:
        notes.append(f"{task.card.name} doesn't multiply bfloat16 in hardware; fp16 is faster there")
    if plan.accumulation > 1 and looks_at_whole_batches(task):
        notes.append(
            "what looks at a whole batch (batch norms, contrastive terms) sees a part of it at a time: accumulation "
            "changes results here"
        )
    return notes


def looks_at_whole_batches(task: Task) -> bool:
    """Whether results depend on which images are in a part of a batch together."""
    return task.objective.compares_images or any(seen.sees_batches for _, _, seen in observed_parts(task.backbone))


def _rivals(task: Task, batch_size: int, base: int) -> tuple[Rival, ...]:
    """What end-to-end training would need: plainly, checkpointed by blocks, and at its best."""
    search = Search(task, task.costs(batch_size))
    found = [(name, search.end_to_end(how)) for name, how in RIVALS.items()]
    return tuple(
        Rival(name=name, peak_bytes=search.peak(solution), time_ratio=solution.nanoseconds / base)
        for name, solution in found
    )


def _exact_rival(search: Search, plan: Plan, batch_size: int, budget: int | None, base: int) -> Rival | None:
    """Beside local modules: the fastest way to exact gradients within a budget; else the one that needs least."""
    task = search.task
    if plan.num_modules == 1 or budget is None:
        return None
    if search.costs.settings.accumulation > 1:
        search = Search(task, task.costs(batch_size))
    solution = search.exact(task.margin.usable(budget)) or search.smallest_exact()
    return Rival(
        name=f"end-to-end, checkpoint {solution.choices[0].how}",
        peak_bytes=search.peak(solution),
        time_ratio=solution.nanoseconds / base,
        needed_bytes=task.margin.needed(search.peak(solution)),
    )


RIVALS = {
    "end-to-end": Checkpointing(),
    "end-to-end, checkpoint blocks": Checkpointing("blocks"),
    "end-to-end, checkpoint blocks/8": Checkpointing("blocks", 8),
    "end-to-end, checkpoint halves/8": Checkpointing("halves", 8),
}


@dataclass(frozen=True)
class Candidate:
    """A plan worth having beside others, with composed figures.

    Attributes:
        boundaries: first block of every local module but the first.
        checkpoint: what each module recomputes.
        peak_bytes: of a step.
        time_ratio: of a step's time, to end-to-end training's.
    """

    boundaries: Boundaries
    checkpoint: tuple[Checkpointing, ...]
    peak_bytes: int
    time_ratio: float


def worth_having(task: Task, batch_size: int) -> list[Candidate]:
    """All plans worth having: fastest first, each next one slower and one per cent smaller; composed figures."""
    check_batch(batch_size)
    search = Search(task, task.costs(batch_size))
    base = search.end_to_end().nanoseconds
    return [
        Candidate(
            boundaries=solution.boundaries,
            checkpoint=tuple(choice.how for choice in solution.choices),
            peak_bytes=search.peak(solution),
            time_ratio=solution.nanoseconds / base,
        )
        for solution in search.frontier()
    ]


# The largest batch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch with which a method keeps a budget.

    Attributes:
        name: of the method.
        batch_size: images; 0 where not even two fit.
        time_ratio: time for an image, to that of end-to-end training; ``None`` where nothing fits.
    """

    name: str
    batch_size: int
    time_ratio: float | None = None


def largest_batches(task: Task, budget: int) -> list[LargestBatch]:
    """The largest batch that fits a budget, for every method side by side.

    Costs grow evenly with the batch: they are measured at two sizes and extended to any. A part's peak may fall to
    another moment in between, so they are measured again at the size found, until that size fits and is found again.

    Args:
        task: what is to be trained.
        budget: bytes.

    Returns:
        One for each of the methods; the last is the best that any plan does. A few per cent of the budget stay free.
    """
    usable = task.margin.usable(budget) * (100 - FREE_PERCENT) // 100
    methods: dict[str, Callable[[Search], Solution | None]] = {
        name: _fitting(how, usable) for name, how in RIVALS.items()
    }
    methods["local modules, nothing recomputed"] = lambda search: search.fastest_plain(usable)
    methods["local modules, any plan"] = lambda search: search.fastest(usable)
    rows = []
    for name, find in methods.items():
        size = _largest_batch(task, find)
        ratio = None
        if size:
            search = Search(task, task.costs(size))
            solution = find(search)
            assert solution is not None
            ratio = solution.nanoseconds / search.end_to_end().nanoseconds
        rows.append(LargestBatch(name, size, ratio))
    return rows


Find = Callable[[Search], Solution | None]


def _largest_batch(task: Task, find: Find, *, exact: bool = True) -> int:
    """The largest batch for which something is found; if need not be exact, the first one that is known to fit."""
    low, high = 16, 64
    best = 0
    for _ in range(6):
        small, large = task.costs(low), task.costs(high)

        def fits(size: int, small: Costs = small, large: Costs = large) -> bool:
            return find(Search(task, interpolated(small, large, size))) is not None

        size = _largest(fits, task.num_images or LARGEST_BATCH)
        if size in (0, best):
            break
        if find(Search(task, task.costs(size))) is not None:
            best = max(best, size)
        if size in (low, high) or (best and not exact):
            break
        high = max(3, size)  # never a single image, on which batch norms refuse to train
        low = max(2, min(high - 1, round(high * 0.9)))
    return best


def _fitting(how: Checkpointing, usable: int) -> Callable[[Search], Solution | None]:
    def find(search: Search) -> Solution | None:
        solution = search.end_to_end(how)
        return solution if search.peak(solution) <= usable else None

    return find


def _largest(fits: Callable[[int], bool], most: int = LARGEST_BATCH) -> int:
    """The largest number for which ``fits``, which is true up to some number and false beyond; 0 for none."""
    low, high, most = 0, 2, min(most, LARGEST_BATCH)
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle < 2 or fits(middle) else (low, middle)
    return low if low >= 2 else 0


# Errors ----------------------------------------------------------------------------------------------------------


def check_batch(batch_size: int) -> None:
    """Refuse a batch that no plan is made for."""
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise BudgetError(
            f"{arg('batch_size', batch_size)}: plans are made for 1 to {LARGEST_BATCH} images; take "
            f"{arg('batch_size', 128)}."
        )


def check_gradients(gradients: str) -> str:
    """Refuse a word that names no kind of plans."""
    if gradients not in GRADIENTS:
        raise RecipeError(f"{arg('gradients')}: unknown {gradients!r}; take one of {', '.join(GRADIENTS)}.")
    return gradients


def budget_of(num_bytes: int) -> str:
    """A budget as an error names it."""
    return arg("budget", format_bytes(num_bytes).replace(" ", ""))


def _check_static(search: Search, budget: int, room: Room | None) -> None:
    """Refuse a budget that no plan can fit; a replay knows more exactly than the margin what does."""
    static, margin = search.static_bytes, search.task.margin
    if room is not None:
        margin = replace(margin, percent=0, fixed_bytes=room.spare_bytes + room.context_bytes)
    if margin.usable(budget) <= static:
        raise BudgetError(
            f"{budget_of(budget)}: this is less than the weights, optimizer state and margin alone, "
            f"{at_least(margin.needed(static))}; take {arg('optimizer', 'adafactorbv')}, "
            f"{arg('offload', value=True)} with {arg('modules')}, a smaller model, or a larger budget."
        )


def _cannot_fit(task: Task, whole: Search, batch_size: int, budget: int) -> BudgetError:
    """Say the least that any plan needs, confirmed, and what to change."""
    best = min(searches(task, whole, batch_size), key=lambda search: search.peak(search.smallest()))
    accumulation = best.costs.settings.accumulation
    least = _least_bytes(best, batch_size)
    hints = []
    usable = task.margin.usable(budget)
    size = _largest_batch(task, lambda search: search.fastest(usable), exact=False)
    if 0 < size < batch_size:
        guessed = " (by the margin; not replayed)" if task.device == "cuda" else ""
        hints.append(arg("batch_size", size) + guessed)
    if task.precision == "fp32":
        half = replace(task, precision="bf16" if task.card is None or task.card.has_bfloat16 else "fp16")
        needed = _least_bytes(Search(half, half.costs(batch_size, accumulation)), batch_size)
        if needed < least:
            hints.append(f"{arg('precision', half.precision)} (least {at_least(needed)})")
    if task.gradients == "exact":
        hints.append(f"no {arg('gradients')}")
    elif task.modules != ANY:
        wider = Search(replace(task, modules=ANY), whole.costs)
        if wider.peak(wider.smallest()) <= usable:
            hints.append(arg("modules", ANY))
        elif task.modules is not None:
            hints.append(f"no {arg('modules')}")
    hints.append(
        "shorter sequences or a smaller model" if task.backbone.takes_ids else f"a smaller {arg('img_size')} or model"
    )
    parts_told = f" with the batch in {accumulation} parts" if accumulation > 1 else ""
    return BudgetError(
        f"{budget_of(budget)}: no plan for a batch of {batch_size} fits; the least is "
        f"{at_least(least)}{parts_told}. Take {', '.join(hints)}, or a larger budget."
    )


def _least_bytes(search: Search, batch_size: int) -> int:
    """The budget that the smallest plan of a search needs, confirmed: where runs are replayed, by a replay."""
    task, plan = search.task, search.as_plan(search.smallest())
    if task.device != "cuda" or not task.replays:
        return task.margin.needed(task.confirm(plan, batch_size).peak_bytes)
    # Evaluated in batches that need no more than a step does; they are among those that are tried.
    size = max(1, min(LARGEST_EVALUATION_BATCH, batch_size // plan.accumulation))
    return task.least_budget(replace(plan, evaluation_batch=size), batch_size)


def at_least(num_bytes: int) -> str:
    """Bytes as text, rounded up: typed as a budget, they suffice."""
    text = format_bytes(num_bytes)
    return text if parse_bytes(text) >= num_bytes else format_bytes(num_bytes * 1.005)
