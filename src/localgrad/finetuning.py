"""``localgrad finetune``: pretrained weights trained on for other classes, by the method that fits and was named.

The method is named, or found within a budget (``app/ways.py``), or the best of a *pilot*: every candidate that fits is
trained on a share of the images, and judged on the validation images of the whole run. Each run is a plain run of
``run.train``, by a recipe that says all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localgrad import rules
from localgrad.app.planned import changes_of, check_plan_is_for
from localgrad.app.recipe import Recipe, flat
from localgrad.app.ways import FREEZE, FULL, LOCAL, LORA, PRESET, PROBE, QLORA, Tuning, typed
from localgrad.errors import BudgetError, RecipeError, arg
from localgrad.formats import given_path
from localgrad.partition import Plan
from localgrad.run import train
from localgrad.training.events import Sink
from localgrad.training.folder import new_folder
from localgrad.training.saved import Summary
from localgrad.units import format_bytes

PILOTED: tuple[tuple[str, ...], ...] = ((FULL,), (FREEZE,), (LORA,), (LOCAL,))
"""Methods that a pilot tries."""
PILOT_SUFFIX = "-pilot"
"""Of the folder that a pilot's runs are in, after the name of the run that it is for."""
FEWEST_PILOTED = 2
"""Batches of images in a pilot's epoch, at least."""


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def finetune(
    changes: Mapping[str, Any],
    *,
    method: str | None = None,
    budget: int | str | None = None,
    gradients: str = "any",
    pilot: float | None = None,
    plan: Plan | None = None,
    out: Path | str | None = None,
    base: Mapping[str, Any] | None = None,
    sinks: Sequence[Sink | str] = (),
    say: Callable[[str], object] = _print,
    **how: Any,
) -> Summary:
    """Fine-tune a pretrained model on your data, as ``localgrad finetune`` does, in a run folder of its own.

    Args:
        changes: values of the recipe, nested or by dotted key: ``data.name`` and ``model.name`` at least; all else is
            as the preset ``finetune`` has it. Without ``model.weights`` the library's own weights are loaded.
        method: ``full``, ``freeze``, ``probe``, ``lora``, ``qlora``, ``local``, or some joined by ``+``. By default
            ``full``; within a budget, the best that fits.
        budget: bytes, or such as ``"6GiB"``.
        gradients: with a budget and no method, which are looked for: ``exact``, ``local`` or ``any``.
        pilot: share of the training images, from 0 to 1, on which methods are tried first; the best goes on, or the
            one that is named.
        plan: that it is to be trained by, made with ``localgrad plan --finetune``; it says the method.
        out: the run folder; by default a new one under ``runs/``.
        base: values of a recipe in the preset's place.
        sinks: as for ``train``.
        say: takes the lines that say what was chosen.
        how: as for ``train``: ``download``, ``on_oom``, ``cache``, ``card``, ``confirm``.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        BudgetError: nothing fits.
        LocalgradError: anything that can't be as it is asked for.

    Example:
        >>> finetune({"data.name": "pets", "model.name": "vit_small_patch16_224"}, budget="4GiB")  # doctest: +SKIP
    """
    rules.check({"method": method, "plan": plan is not None, "pilot": pilot, "budget": budget, "gradients": gradients})
    out = None if out is None else given_path("out", out)
    if pilot is not None and not 0 < pilot < 1:
        raise RecipeError(f"{arg('pilot', pilot)}: it is a share of the training images, between 0 and 1; take 0.02.")
    planning = {
        "cache": how.get("cache", True),
        "card": how.get("card", "auto"),
        "replays": how.get("confirm", True),
    }
    if plan is not None:
        method, changes = method_of(plan), {**changes_of(plan), **flat(changes)}
    asked = Tuning.of(changes, method=method, budget=budget, gradients=gradients, base=base, planning=planning)
    if plan is not None:
        recipe = asked.recipe(asked.candidates()[0])
        check_plan_is_for(plan, recipe)
        return train(recipe, out=out, sinks=sinks, plan=plan, **how)
    candidates = asked.candidates(say)
    data = asked.recipe(candidates[0]).method.data
    rules.check({"pilot": pilot, "val_fraction": data.val_fraction, "streaming": data.streaming})
    if pilot is not None:
        out = out if out is not None else new_folder(asked.name, PRESET)
        candidates = _piloted(asked, candidates, pilot, out, say, **how)
    failure: BudgetError | None = None
    for words in candidates:
        say(f"Fine-tuning by {arg('method', typed(words))}.")
        try:
            return train(asked.recipe(words), out=out, sinks=sinks, **asked.within(words), **how)
        except BudgetError as error:  # composed figures said that it fits
            failure = error
            if len(candidates) > 1:
                say(f"{typed(words)} doesn't fit after all: {error}")
    assert failure is not None, "there was a candidate"
    raise failure


def method_of(plan: Plan) -> str:
    """The method that a plan was made for."""
    freeze = plan.made_for.get("training.freeze")
    found = {
        FREEZE: freeze is not None and freeze != 1.0,
        PROBE: freeze == 1.0,
        LORA: plan.made_for.get("model.lora") is not None and not plan.made_for.get("model.quantize"),
        QLORA: bool(plan.made_for.get("model.quantize")),
        LOCAL: plan.num_modules > 1,
    }
    return typed(word for word, holds in found.items() if holds) or FULL


@dataclass(frozen=True)
class Piloted:
    """What a pilot showed of a method.

    Attributes:
        words: of the method.
        accuracy: on validation images, from 0 to 1.
        peak_bytes: as measured.
        images_per_second: of the images that it trained on.
    """

    words: tuple[str, ...]
    accuracy: float
    peak_bytes: int
    images_per_second: float

    def __str__(self) -> str:
        return (
            f"pilot: {typed(self.words)}: validation accuracy {self.accuracy:.2%}, peak "
            f"{format_bytes(self.peak_bytes)}, {self.images_per_second:.0f} images/s"
        )


def _piloted(
    asked: Tuning,
    candidates: Sequence[tuple[str, ...]],
    share: float,
    place: Path,
    say: Callable[[str], object],
    **how: Any,
) -> list[tuple[str, ...]]:
    """The candidates, the best of a pilot first; where a method is named, that one all the same."""
    named = asked.words
    tried = (
        PILOTED if asked.budget is None else [words for words in PILOTED if words in candidates or named is not None]
    )
    tried = list(dict.fromkeys([*tried, *([named] if named else [])]))
    found: list[Piloted] = []
    for words in tried:
        recipe = _on_share(asked, asked.recipe(words), share)
        folder = place.with_name(place.name + PILOT_SUFFIX) / typed(words)
        try:
            summary = train(recipe, out=folder, **asked.within(words), **how)
        except BudgetError as error:
            say(f"pilot: {typed(words)} doesn't fit: {error}")
            continue
        accuracy = summary["val_accuracy"]
        assert accuracy is not None, "`rules` ask for validation images, and patience for enough of them"
        peak, speed = summary.get("measured_peak_bytes", 0), summary["images_per_second"]
        found.append(Piloted(words, accuracy, peak, speed))
        say(str(found[-1]))
    best = sorted(found, key=lambda row: -row.accuracy)
    if named is not None:
        return [named]
    return [row.words for row in best] or list(candidates)


def _on_share(asked: Tuning, recipe: Recipe, share: float) -> Recipe:
    """A recipe on a share of the images, some batches at least."""
    data = recipe.method.data
    count = asked.data.num_images
    assert count is not None, "data was named"
    has_validation = asked.data.splits is None  # one that was read is counted without its validation images
    most = round(count * (1 - data.val_fraction)) if has_validation else count
    left = min(data.limit or most, most)
    limit = min(left, max(FEWEST_PILOTED * recipe.method.training.batch_size, round(share * left)))
    return replace(recipe, method=replace(recipe.method, data=replace(data, limit=limit)))
