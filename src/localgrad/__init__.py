"""Train vision transformers as gradient-isolated local modules.

Everything public is here, ``localgrad.X``; what lies below is private. Names are looked up when they are first
used, so that ``import localgrad`` (and ``localgrad --help``) doesn't wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localgrad.app.planning import estimate, plan
    from localgrad.backbones.base import Backbone, Layout, split
    from localgrad.compare.measuring import Measurement, measure
    from localgrad.errors import (
        BackboneError,
        BudgetError,
        CheckpointError,
        DataError,
        DeviceError,
        DivergenceError,
        IsolationError,
        LocalgradError,
        ParallelError,
        PartitionError,
        RecipeError,
        RunFolderError,
    )
    from localgrad.isolation import check_isolation
    from localgrad.learner import LocalLearner
    from localgrad.objectives.carried import Carried, Handed, LocalBatch, register_carried
    from localgrad.objectives.methods import (
        Contrastive,
        FeatureReconstruction,
        GreedySupervised,
        ImageReconstruction,
        Objective,
    )
    from localgrad.parallel.parallel_learner import ParallelLearner
    from localgrad.parallel.team import Team
    from localgrad.partition import Plan, balance
    from localgrad.step.executor import StepResult

_HOMES = {
    "localgrad.app.planning": ("estimate", "plan"),
    "localgrad.backbones.base": ("Backbone", "Layout", "split"),
    "localgrad.errors": (
        "BackboneError",
        "BudgetError",
        "CheckpointError",
        "DataError",
        "DeviceError",
        "DivergenceError",
        "IsolationError",
        "LocalgradError",
        "ParallelError",
        "PartitionError",
        "RecipeError",
        "RunFolderError",
    ),
    "localgrad.step.executor": ("StepResult",),
    "localgrad.parallel.team": ("Team",),
    "localgrad.isolation": ("check_isolation",),
    "localgrad.learner": ("LocalLearner",),
    "localgrad.compare.measuring": ("Measurement", "measure"),
    "localgrad.objectives.carried": ("Carried", "Handed", "LocalBatch", "register_carried"),
    "localgrad.objectives.methods": (
        "Contrastive",
        "FeatureReconstruction",
        "GreedySupervised",
        "ImageReconstruction",
        "Objective",
    ),
    "localgrad.parallel.parallel_learner": ("ParallelLearner",),
    "localgrad.partition": ("Plan", "balance"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "BackboneError",
    "BudgetError",
    "Carried",
    "CheckpointError",
    "Contrastive",
    "DataError",
    "DeviceError",
    "DivergenceError",
    "FeatureReconstruction",
    "GreedySupervised",
    "Handed",
    "ImageReconstruction",
    "IsolationError",
    "Layout",
    "LocalBatch",
    "LocalLearner",
    "LocalgradError",
    "Measurement",
    "Objective",
    "ParallelError",
    "ParallelLearner",
    "PartitionError",
    "Plan",
    "RecipeError",
    "RunFolderError",
    "StepResult",
    "Team",
    "__version__",
    "balance",
    "check_isolation",
    "estimate",
    "measure",
    "plan",
    "register_carried",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'localgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
