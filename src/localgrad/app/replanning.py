"""When memory runs out in a run: say where and what to type, or plan again for less and go on.

The boundaries of a run stay as they are, since they change results; what may change is what modules recompute and into
how many parts batches are cut. Memory that runs out before a module's update has changed nothing yet: gradients are
dropped, the random state is put back, and the same step is run again under the new plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import final

import torch

from localgrad.app.build import Job
from localgrad.app.planned import laid_over, task_on
from localgrad.app.recipe import Recipe
from localgrad.errors import BudgetError, DeviceError, MemoryExceeded, RecipeError, arg
from localgrad.memory.track import MemoryProfile
from localgrad.partition import Plan, forecast_of
from localgrad.planning.budget import looks_at_whole_batches, plan_to_budget
from localgrad.training.saved import Peak
from localgrad.units import format_bytes

LESS = 0.9
"""The next plan has to need at most this share of the one for which memory ran out."""


@final
class Replanner:
    """Finds the next plan of a run that needs less than its profile, and says what was measured."""

    def __init__(self, job: Job, profile: MemoryProfile, measured: Callable[[], Peak]) -> None:
        self.job = job
        self.recipe = job.recipe
        self.profile = profile
        self.measured = measured

    def next_plan(self) -> Plan | None:
        """The fastest plan of the same boundaries with at least a tenth less memory; ``None`` where there is none.

        Raises:
            RecipeError: a run that planners don't plan, such as one that offloads.
        """
        boundaries = list(self.job.learner.plan.boundaries)
        local = replace(self.recipe.method.local, modules=boundaries or 1)
        recipe = replace(self.recipe, method=replace(self.recipe.method, local=local))
        try:
            task = task_on(recipe, self.job.learner.backbone, device=self.job.device.type, replays=False)
            if looks_at_whole_batches(task):  # a run's results stay as they are: so do the parts that are seen together
                task = replace(task, accumulation=recipe.execution.accumulation)
            budget = task.margin.needed(int(self.profile.peak_bytes * LESS))
            return plan_to_budget(task, recipe.method.training.batch_size, budget)
        except BudgetError:
            return None

    def adopt(self, plan: Plan) -> Recipe:
        """Run as another plan from now on; gives the recipe that says so."""
        learner = self.job.local
        learner.run_as(replace(plan, activation_bytes=learner.plan.activation_bytes))
        self.recipe = laid_over(plan, self.recipe)
        forecast = forecast_of(plan)
        peaks = {f"module {index}": module.peak_bytes for index, module in enumerate(forecast.modules)}
        self.profile = replace(self.profile, peak_bytes=forecast.peak_bytes, peak_by_label=peaks)
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.recipe

    def explain(self, error: MemoryExceeded, folder: Path) -> DeviceError:
        """An error that names where memory ran out, the plan's figure, the observed ones, and the command."""
        learner, place = self.job.learner, error.place
        where, label = str(place), ""
        if isinstance(place, int):
            span, names = learner.plan.spans[place], learner.backbone.block_names
            label = f"module {place}"
            where = f"local {label} ({names[span.start]} … {names[span.stop - 1]})"
        is_step = isinstance(place, int) or place == "an end-to-end step"
        advice = self._other_step(folder) if is_step else self._smaller_batches(folder)
        return DeviceError(f"{self.job.device}: memory ran out in {where}: {self.figures(label)}; {advice}.")

    def figures(self, label: str = "") -> str:
        """What was planned and what was observed: different things, each told by what it is.

        Args:
            label: of the part of a step that is meant; all of it by default.
        """
        planned = self.profile.peak_by_label.get(label, self.profile.peak_bytes)
        observed = self.measured()
        seen = f"{format_bytes(observed['measured_peak_bytes'])} at most in the run so far"
        what = observed["measured_peak_of"]
        if "measured_reserved_bytes" in observed:
            what += f"; reserved by the allocator: {format_bytes(observed['measured_reserved_bytes'])}"
        return (
            f"planned {format_bytes(planned)} (all tensors alive in {'that' if label else 'a'} step, as estimated), "
            f"observed {seen} ({what})"
        )

    def _other_step(self, folder: Path) -> str:
        try:
            plan = self.next_plan()
        except RecipeError as error:
            more = arg("accumulation", 2 * self.recipe.execution.accumulation)
            return (
                f"no other plan was looked for ({error}): go on with {arg('resume', folder)} and {more} or "
                f"{arg('checkpoint', 'halves/8')}, which don't change results"
            )
        if plan is None:
            return (
                f"nothing with these boundaries needs less: take more {arg('modules')} or a smaller {arg('batch_size')}"
            )
        how = arg("checkpoint", [str(how) for how in plan.checkpoint])
        if plan.global_checkpoint is not None:
            how += f" {arg('global_checkpoint', plan.global_checkpoint)}"
        guessed = " (by the margin, not replayed)" if self.job.device.type == "cuda" else ""
        return (
            f"the next plan that fits needs {format_bytes(forecast_of(plan).peak_bytes)}{guessed}: go on with "
            f"{arg('resume', folder)} {how} {arg('accumulation', plan.accumulation)} (or {arg('on_oom', 'replan')})"
        )

    def _smaller_batches(self, folder: Path) -> str:
        return f"what was trained is saved: go on with {arg('resume', folder)} {arg('on_oom', 'replan')}"
