"""Train vision transformers as gradient-isolated local modules.

Everything public is here, ``localgrad.X``; what lies below is private. Names are looked up when they are first
used, so that ``import localgrad`` (and ``localgrad --help``) doesn't wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localgrad.app.planning import estimate, plan
    from localgrad.app.recipe import Recipe
    from localgrad.backbones.base import Backbone, Layout, register_backbone, split
    from localgrad.backbones.quantized import quantize_base
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
    from localgrad.finetuning import finetune
    from localgrad.integrations.exporting import export
    from localgrad.isolation import check_isolation
    from localgrad.learner import LocalLearner
    from localgrad.objectives.auxiliary import Classifier, Decoder, register_classifier, register_decoder
    from localgrad.objectives.base import LocalObjective, Term, TermValue
    from localgrad.objectives.carried import Carried, Handed, LocalBatch, register_carried
    from localgrad.objectives.methods import (
        Contrastive,
        FeatureReconstruction,
        GreedySupervised,
        ImageReconstruction,
        Objective,
        register_objective,
    )
    from localgrad.objectives.site import Site
    from localgrad.parallel.parallel_learner import ParallelLearner
    from localgrad.parallel.team import Team
    from localgrad.partition import Checkpointing, Plan, balance
    from localgrad.run import resume, train
    from localgrad.step.executor import StepResult
    from localgrad.training.events import (
        EpochEnded,
        FeaturesCached,
        HealthMeasured,
        Progressed,
        Replanned,
        RunEnded,
        RunStarted,
        Sink,
        StoppedEarly,
        register_sink,
    )
    from localgrad.training.transforms import register_transform

_HOMES = {
    "localgrad.app.planning": "estimate plan",
    "localgrad.app.recipe": "Recipe",
    "localgrad.backbones.base": "Backbone Layout register_backbone split",
    "localgrad.backbones.quantized": "quantize_base",
    "localgrad.compare.measuring": "Measurement measure",
    "localgrad.errors": "BackboneError BudgetError CheckpointError DataError DeviceError DivergenceError "
    "IsolationError LocalgradError ParallelError PartitionError RecipeError RunFolderError",
    "localgrad.finetuning": "finetune",
    "localgrad.integrations.exporting": "export",
    "localgrad.isolation": "check_isolation",
    "localgrad.learner": "LocalLearner",
    "localgrad.objectives.auxiliary": "Classifier Decoder register_classifier register_decoder",
    "localgrad.objectives.base": "LocalObjective Term TermValue",
    "localgrad.objectives.carried": "Carried Handed LocalBatch register_carried",
    "localgrad.objectives.methods": "Contrastive FeatureReconstruction GreedySupervised "
    "ImageReconstruction Objective register_objective",
    "localgrad.objectives.site": "Site",
    "localgrad.parallel.parallel_learner": "ParallelLearner",
    "localgrad.parallel.team": "Team",
    "localgrad.partition": "Checkpointing Plan balance",
    "localgrad.run": "resume train",
    "localgrad.step.executor": "StepResult",
    "localgrad.training.events": "EpochEnded FeaturesCached HealthMeasured Progressed "
    "Replanned RunEnded RunStarted Sink StoppedEarly register_sink",
    "localgrad.training.transforms": "register_transform",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "BackboneError",
    "BudgetError",
    "Carried",
    "CheckpointError",
    "Checkpointing",
    "Classifier",
    "Contrastive",
    "DataError",
    "Decoder",
    "DeviceError",
    "DivergenceError",
    "EpochEnded",
    "FeatureReconstruction",
    "FeaturesCached",
    "GreedySupervised",
    "Handed",
    "HealthMeasured",
    "ImageReconstruction",
    "IsolationError",
    "Layout",
    "LocalBatch",
    "LocalLearner",
    "LocalObjective",
    "LocalgradError",
    "Measurement",
    "Objective",
    "ParallelError",
    "ParallelLearner",
    "PartitionError",
    "Plan",
    "Progressed",
    "Recipe",
    "RecipeError",
    "Replanned",
    "RunEnded",
    "RunFolderError",
    "RunStarted",
    "Sink",
    "Site",
    "StepResult",
    "StoppedEarly",
    "Team",
    "Term",
    "TermValue",
    "__version__",
    "balance",
    "check_isolation",
    "estimate",
    "export",
    "finetune",
    "measure",
    "plan",
    "quantize_base",
    "register_backbone",
    "register_carried",
    "register_classifier",
    "register_decoder",
    "register_objective",
    "register_sink",
    "register_transform",
    "resume",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'localgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
