"""Fine-tuning: methods by name, what each of them needs, and which fits.

A *method* is words joined by ``+``, each of which sets options of the recipe: ``full`` (every weight), ``freeze`` (the
lower half stays as it is), ``probe`` (the head alone), ``lora`` (adapters), ``qlora`` (likewise, above weights of 4
bits), ``local`` (two local modules or more). A *way* is a method and how it is run: plainly, recomputing, in so many
local modules, or in those one after another. The table of ways is composed from costs of parts, as plans are; the plan
that is chosen is confirmed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import util
from typing import Any

import torch

from localgrad.app.hub_models import is_on_hub
from localgrad.app.planned import PlannedData, data_planned_for, kind_of, plan_recipe, task_of
from localgrad.app.recipe import Recipe, flat, overlay, preset
from localgrad.backbones.quantized import num_weights
from localgrad.errors import BudgetError, LocalgradError, RecipeError, arg, did_you_mean
from localgrad.options import Values
from localgrad.partition import Checkpointing, Plan
from localgrad.planning.budget import MOST_MODULES, Search, Task, budget_of
from localgrad.planning.search import Solution
from localgrad.units import format_bytes, parse_bytes

PRESET = "finetune"
FULL, FREEZE, PROBE, LORA, QLORA, LOCAL = "full", "freeze", "probe", "lora", "qlora", "local"
METHODS: dict[str, Values] = {
    FULL: {},
    FREEZE: {"training.freeze": 0.5},
    PROBE: {"training.freeze": 1.0},
    # Adapters are of every depth alike, and start at nothing.
    LORA: {"model.lora": 8, "training.layer_decay": None},
    QLORA: {"model.lora": 8, "model.quantize": "4bit", "training.layer_decay": None},
    LOCAL: {"local.modules": 2},
}
"""What each word sets, by dotted key of the recipe; the rest is the preset's."""
ALONE = {FULL: "it trains every weight", PROBE: "it trains the head alone"}
FASTER = 4.0
"""Times the learning rate of weights that were trained, for those that are new: adapters, a head alone."""
BATCH, RATE = 64, 5e-4
FEWEST_STEPS, SMALLEST_BATCH = 20, 8
"""In an epoch, which the batch is made smaller for; but not smaller than this."""


def words_of(method: str) -> tuple[str, ...]:
    """The words of a method, in their own order.

    Raises:
        RecipeError: one that there isn't, or that doesn't go with another.
    """
    words = [word.strip() for word in method.split("+")]
    for word in words:
        if word not in METHODS:
            raise RecipeError(
                f"{arg('method')}: unknown {word!r}; take {', '.join(METHODS)}, or some of them joined by +."
                f"{did_you_mean(word, METHODS)}"
            )
        if word in ALONE and len(set(words)) > 1:
            raise RecipeError(f"{arg('method', method)}: {word} stands alone: {ALONE[word]}; leave it out.")
    return tuple(word for word in METHODS if word in words)


def typed(words: Iterable[str]) -> str:
    """A method as it is typed."""
    return "+".join(words)


def recipe_for(
    words: Sequence[str], changes: Mapping[str, Any], data: PlannedData, base: Values | None = None
) -> Recipe:
    """The recipe of a method: the preset, what the method sets, what follows from the data, and what is asked for.

    Args:
        words: of the method.
        changes: what is asked for, by dotted key.
        data: the batch is made smaller where it has few images; the learning rate follows the batch's square root,
            as suits optimizers like Adam (Malladi et al. 2022, arXiv 2205.10287).
        base: in the preset's place.

    Raises:
        RecipeError: a value that can't be; or local modules, where the method has none.
    """
    own: Values = {}
    for word in words:
        own |= METHODS[word]
    if base is None:
        size = changes.get("training.batch_size") or _batch_of(data)
        rate = RATE * math.sqrt(size / BATCH) * (FASTER if {LORA, QLORA, PROBE} & set(words) else 1.0)
        own |= {"training.batch_size": size, "training.lr": float(f"{rate:.3g}")}
    name = changes.get("model.name")
    if name is not None and is_on_hub(name):
        own["training.layer_decay"] = None  # its groups are timm's
    if changes.get("training.schedule") == "sequential" or changes.get("data.val_fraction") == 0:
        own["training.patience"] = None  # which is by validation images, of modules that train together
    if not changes.get("model.weights"):
        own["model.pretrained"] = True
    modules = changes.get("local.modules")
    if modules not in (None, 1, "auto") and LOCAL not in words:
        told = typed([*(word for word in words if word != FULL), LOCAL])
        raise RecipeError(f"{arg('modules')}: local modules are of {arg('method', told)}.")
    return Recipe.from_dict(overlay(overlay(preset(PRESET) if base is None else base, own), changes))


def _batch_of(data: PlannedData) -> int:
    """The batch for so many images: a power of two that leaves some steps in an epoch."""
    if data.num_images is None:
        return BATCH
    fitting: int = 2 ** int(math.log2(max(1, data.num_images // FEWEST_STEPS)))
    return max(SMALLEST_BATCH, min(BATCH, fitting))


@dataclass(frozen=True)
class Way:
    """One way to fine-tune, with composed figures.

    Attributes:
        words: of its method.
        how: it is run, for people: ``plain``, ``recompute blocks``, ``K = 2``, or ``K = 4 in turn``, one after another.
        num_modules: 1 for end-to-end training.
        peak_bytes: of a step.
        needed_bytes: the budget that it needs, by the margin.
        time_ratio: of a step, to full fine-tuning end to end with nothing recomputed. Of modules in turn it is a whole
            training's, but for the features' way to the disk and back.
        share: of the weights that are trained, from 0 to 1.
        optimizer: where it isn't the recipe's.
        in_turn: modules are trained one after another; no plan says so, and so it is never chosen unasked.
    """

    words: tuple[str, ...]
    how: str
    num_modules: int
    peak_bytes: int
    needed_bytes: int
    time_ratio: float
    share: float
    optimizer: str | None = None
    in_turn: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether gradients are those of the model's own loss."""
        return self.num_modules == 1

    @property
    def method(self) -> str:
        """Its method, as it is typed."""
        return typed(self.words if self.is_exact else [*(word for word in self.words if word != FULL), LOCAL])

    def fits(self, budget: int | None) -> bool:
        """Whether it does, by the margin."""
        return budget is None or self.needed_bytes <= budget


BASES = ((FULL,), (FREEZE,), (LORA,))
LOCAL_COUNTS = (2, 3, 4)
EIGHT_BIT = "bnbadamw8bit"


@dataclass(frozen=True)
class Ways:
    """All that were tried, and what can't be.

    Attributes:
        rows: method by method.
        left_out: reasons, for people.
    """

    rows: tuple[Way, ...]
    left_out: tuple[str, ...]


def ways_of(
    changes: Mapping[str, Any], data: PlannedData, base: Values | None = None, *, budget: int | None, **how: Any
) -> Ways:
    """What every method needs, run in every way.

    Args:
        changes: of the recipe, by dotted key.
        data: what it is trained on.
        base: in the preset's place.
        budget: bytes; where there is one, a way recomputes as little as makes it fit.
        how: as for ``task_of``.
    """
    rows: list[Way] = []
    left_out: list[str] = []
    whole: float | None = None
    for words, optimizer in _bases(left_out):
        own = {**changes, **({} if optimizer is None else {"training.optimizer": optimizer})}
        asked = {key: value for key, value in own.items() if key not in ("local.modules", "execution.checkpoint")}
        recipe = recipe_for((*words, LOCAL), {**asked, "local.modules": "auto"}, data, base)
        try:
            task = replace(task_of(recipe, data=data, **how), modules=None)
            size = recipe.method.training.batch_size
            search = Search(task, task.costs(size))
        except LocalgradError as error:
            if not rows:
                raise
            left_out.append(f"{typed(words)}: {error}")
            continue
        whole = whole or search.end_to_end().nanoseconds
        rows += _rows(search, _Maker(task, words, whole, optimizer), budget, recipe)
    return Ways(tuple(rows), tuple(left_out))


def _bases(left_out: list[str]) -> Iterator[tuple[tuple[str, ...], str | None]]:
    yield from ((words, None) for words in BASES)
    if util.find_spec("bitsandbytes") is None:
        left_out.append(f"{QLORA} and 8-bit optimizer states need bitsandbytes: pip install 'localgrad[8bit]'")
    else:
        yield (QLORA,), None
        yield (FULL,), EIGHT_BIT


@dataclass(frozen=True)
class _Maker:
    """Makes the ways of one method."""

    task: Task
    words: tuple[str, ...]
    base: float
    optimizer: str | None

    def __call__(self, how: str, num_modules: int, peak: int, time: float, *, in_turn: bool = False) -> Way:
        model = self.task.backbone.model
        learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        return Way(
            words=self.words,
            how=how,
            num_modules=num_modules,
            peak_bytes=peak,
            needed_bytes=self.task.margin.needed(peak),
            time_ratio=time / self.base,
            share=learning / num_weights(model),
            optimizer=self.optimizer,
            in_turn=in_turn,
        )


def _rows(search: Search, make: _Maker, budget: int | None, recipe: Recipe) -> Iterator[Way]:
    """The ways of one method: end to end, recomputing, in 2 to 4 local modules, and those one after another."""
    task = search.task
    plain = search.end_to_end()
    yield make("plain", 1, search.peak(plain), plain.nanoseconds)
    recomputing = _recomputing(search, budget)
    yield make(f"recompute {recomputing.choices[0].how}", 1, search.peak(recomputing), recomputing.nanoseconds)
    num_blocks = search.costs.num_blocks
    counts = [count for count in LOCAL_COUNTS if count <= min(num_blocks, MOST_MODULES)]
    for count in counts:
        own = Search(replace(task, modules=count), search.costs)
        found = own.balanced()
        if budget is not None and own.peak(found) > task.margin.usable(budget):
            found = own.fastest(task.margin.usable(budget)) or own.smallest()
        recomputes = any(choice.how != Checkpointing() for choice in found.choices)
        yield make(f"K = {count}{', recompute' * recomputes}", count, own.peak(found), found.nanoseconds)
    if counts:
        yield make(f"K = {counts[-1]} in turn", counts[-1], *_in_turn(task, counts[-1], recipe), in_turn=True)


def _recomputing(search: Search, budget: int | None) -> Solution:
    """The fastest end-to-end way that recomputes and fits, else the one that needs least; every block where all fit."""
    usable = None if budget is None else search.task.margin.usable(budget)
    if usable is None or search.peak(search.end_to_end()) <= usable:
        return search.end_to_end(Checkpointing("blocks"))
    ways = [way for way in search.exact_ways() if way.choices[0].how != Checkpointing()]
    fitting = [way for way in ways if search.peak(way) <= usable]
    if not fitting:
        return min(ways, key=search.peak)
    return min(fitting, key=lambda way: way.nanoseconds)


def _in_turn(task: Task, count: int, recipe: Recipe) -> tuple[int, float]:
    """Peak bytes and nanoseconds a batch of local modules one after another: the others are on the processor meanwhile.

    Each is trained for all epochs; all but the last one then run over the epochs whose features are kept.
    """
    from localgrad.training.stagewise import estimate_stage

    training = recipe.method.training
    batch_size = training.batch_size
    costs = task.costs(batch_size)
    search = Search(replace(task, modules=count), costs)
    found = search.balanced()
    runs = sum(
        costs.forward_ns(start, stop, with_objective=False)
        for start, stop in itertools.pairwise((0, *found.boundaries))
    )
    time = found.nanoseconds + runs * min(training.cached_epochs, training.epochs) / training.epochs
    largest = max(range(count), key=lambda index: found.choices[index].peak_bytes)
    learner = task.learner(search.as_plan(found))
    stage = estimate_stage(learner, largest, batch_size, task.optimizer, torch.device(task.device))
    return stage.peak_bytes, time


def fastest_way(
    ways: Iterable[Way], budget: int | None, *, is_exact: bool | None = None, words: Any = None
) -> Way | None:
    """The fastest of those that fit.

    Args:
        ways: to choose from.
        budget: bytes; by default no limit.
        is_exact: with exact gradients alone.
        words: of this method alone.
    """
    fitting = [
        way
        for way in ways
        if way.fits(budget)
        and not way.in_turn
        and (is_exact is None or way.is_exact == is_exact)
        and (words is None or way.words == words)
    ]
    return min(fitting, key=lambda way: way.time_ratio, default=None)


def in_order(ways: Sequence[Way], budget: int | None) -> list[Way]:
    """What is taken unasked, best first: full fine-tuning with exact gradients, others with exact ones, local modules.

    Whatever isn't exact comes last, however fast: what it costs in accuracy is only known once it is trained.
    """
    fitting = [way for way in ways if way.fits(budget) and not way.in_turn and way.optimizer is None]
    full = fastest_way(fitting, budget, is_exact=True, words=(FULL,))
    exact = sorted((way for way in fitting if way.is_exact), key=lambda way: way.time_ratio)
    local = sorted(
        (way for way in fitting if not way.is_exact),
        key=lambda way: (way.num_modules, way.words != (FULL,), way.time_ratio),
    )
    return list(dict.fromkeys([*([full] if full else []), *exact, *local]))


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning that is asked for, with what there is of its data.

    Attributes:
        changes: values of the recipe, by dotted key.
        words: of the method, where it is named.
        budget: bytes; by default no limit.
        gradients: which are looked for where no method is named.
        base: values of a recipe in the preset's place.
        data: what is known of it.
        planning: how plans are made, as for ``task_of``.
    """

    changes: Values
    words: tuple[str, ...] | None
    budget: int | None
    gradients: str
    base: Values | None
    data: PlannedData
    planning: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        changes: Mapping[str, Any],
        *,
        method: str | None = None,
        budget: int | str | None = None,
        gradients: str = "any",
        base: Mapping[str, Any] | None = None,
        planning: Mapping[str, Any],
    ) -> Tuning:
        """Read what there is to know of the data.

        Raises:
            RecipeError: no data, or values that can't be.
            DataError: the data is missing.
        """
        values = flat(changes)
        words = None if method is None else words_of(method)
        name = values.setdefault("data.name", values.get("data.train_data"))
        if not name:
            raise RecipeError(f"{arg('data')}: say what to fine-tune on, such as {arg('data', 'pets')}.")
        start = None if base is None else dict(base)
        first = recipe_for(words or (FULL,), values, PlannedData(), start)
        kind = planning.get("device") or kind_of(first.execution.device, planning.get("card", "auto"))
        data = data_planned_for(first, name)
        num_bytes = None if budget is None else parse_bytes(budget)
        return cls(values, words, num_bytes, gradients, start, data, {**planning, "device": kind})

    @property
    def name(self) -> str:
        """Of the data."""
        return str(self.changes["data.name"])

    def recipe(self, words: Sequence[str]) -> Recipe:
        """By a method; within a budget the planner says how it is run."""
        planned = {} if self.budget is None else {"local.modules": "auto"}
        return recipe_for(words, {**planned, **self.changes}, self.data, self.base)

    def within(self, words: Sequence[str]) -> dict[str, Any]:
        """The budget, and which plans are looked for within it."""
        if self.budget is None:
            return {}
        return {"budget": self.budget, "gradients": "local" if LOCAL in words else "exact"}

    def ways(self) -> Ways:
        """What every method needs."""
        return ways_of(self.changes, self.data, self.base, budget=self.budget, **self.planning)

    def candidates(self, say: Callable[[str], object] = str) -> list[tuple[str, ...]]:
        """Methods to be tried, the best first: the one that is named, or those that fit.

        Raises:
            BudgetError: none fits.
        """
        if self.words is not None:
            return [self.words]
        if self.budget is None:
            return [(FULL,)]
        ways = self.ways()
        for line in ways.left_out:
            say(f"not tried: {line}")
        return self.fitting(ways)

    def fitting(self, ways: Ways) -> list[tuple[str, ...]]:
        """Methods of ways that fit, the best first.

        Raises:
            BudgetError: none does.
        """
        kinds = {"any": (True, False), "exact": (True,), "local": (False,)}[self.gradients]
        fitting = [way for way in in_order(ways.rows, self.budget) if way.is_exact in kinds]
        if not fitting:
            assert self.budget is not None, "without a budget all fit"
            least = min((way for way in ways.rows if way.is_exact in kinds), key=lambda way: way.needed_bytes)
            raise BudgetError(
                f"{budget_of(self.budget)}: no method fits; the least is {arg('method', least.method)}, {least.how}, "
                f"{format_bytes(least.needed_bytes)}. Take a smaller {arg('batch_size')} or {arg('img_size')}, or a "
                "larger budget."
            )
        return list(dict.fromkeys(words_of(way.method) for way in fitting))

    def plan_of_best(self, ways: Ways, say: Callable[[str], object]) -> Plan:
        """The plan of the method that is named, or of the best that fits.

        Raises:
            BudgetError: none does.
        """
        methods = [self.words] if self.words is not None else self.fitting(ways)
        for words in methods[:-1]:
            try:
                return self.plan(words)
            except BudgetError as error:  # composed figures said that it fits
                say(f"{typed(words)} doesn't fit after all: {error}")
        return self.plan(methods[-1])

    def plan(self, words: Sequence[str]) -> Plan:
        """The plan of a method, confirmed.

        Raises:
            BudgetError: it doesn't fit.
        """
        recipe = recipe_for(words, {"local.modules": "auto", **self.changes}, self.data, self.base)
        gradients = "local" if LOCAL in words else "exact"
        task = task_of(recipe, data=self.data, gradients=gradients, **self.planning)
        return plan_recipe(recipe, task, self.budget)
