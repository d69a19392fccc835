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
from localgrad.units import format_bytes

LESS = 0.9
"""The next plan has to need at most this share of the one for which memory ran out."""


@final
class Replanner:
    """Finds the next plan of a run that needs less memory.

    Args:
        job: the run's objects.
        profile: the estimate of a step as it runs now.
        measured: gives the bytes that were observed, and what they are of.
    """

    def __init__(self, job: Job, profile: MemoryProfile, measured: Callable[[], tuple[int, str]]) -> None:
        self.job = job
        self.recipe = job.recipe
        self.profile = profile
        self.measured = measured

    def next_plan(self) -> Plan | None:
        """The fastest plan of the same boundaries with at least a tenth less memory; ``None`` where there is none."""
        boundaries = list(self.job.learner.plan.boundaries)
        local = replace(self.recipe.method.local, modules=boundaries or 1)
        recipe = replace(self.recipe, method=replace(self.recipe.method, local=local))
        try:
            task = task_on(recipe, self.job.learner.backbone, device=self.job.device.type, replays=False)
            if looks_at_whole_batches(task):  # a run's results stay as they are: so do the parts that are seen together
                task = replace(task, accumulation=recipe.execution.accumulation)
            budget = task.margin.needed(int(self.profile.peak_bytes * LESS))
            return plan_to_budget(task, recipe.method.training.batch_size, budget)
        except (BudgetError, RecipeError):  # nothing fits, or a run that planners don't plan
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
        """An error that names the module, the plan's figure, the observed one, what they are of, and the command."""
        learner = self.job.learner
        where = "an end-to-end step"
        if error.module < learner.plan.num_modules:
            span, names = learner.plan.spans[error.module], learner.backbone.block_names
            where = f"local module {error.module} ({names[span.start]} … {names[span.stop - 1]})"
        planned = self.profile.peak_by_label.get(f"module {error.module}", self.profile.peak_bytes)
        observed, what = self.measured()
        plan = self.next_plan()
        if plan is None:
            advice = (
                f"nothing with these boundaries needs less: take more {arg('modules')} or a smaller {arg('batch_size')}"
            )
        else:
            how = arg("checkpoint", [str(how) for how in plan.checkpoint])
            if plan.global_checkpoint is not None:
                how += f" {arg('global_checkpoint', plan.global_checkpoint)}"
            advice = (
                f"the next plan that fits needs {format_bytes(forecast_of(plan).peak_bytes)}: go on with "
                f"{arg('resume', folder)} {how} {arg('accumulation', plan.accumulation)} "
                f"(or {arg('on_oom', 'replan')})"
            )
        # Two different things, each told by what it is: they are no measure of one another.
        return DeviceError(
            f"{self.job.device}: memory ran out in {where}: planned {format_bytes(planned)} (all tensors alive in that "
            f"step, as estimated), observed {format_bytes(observed)} at most in the run so far ({what}); {advice}."
        )
