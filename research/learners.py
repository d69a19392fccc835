"""Learners of recipes, for what measures a step and needs no data."""

from __future__ import annotations

from typing import Any

import localgrad
from localgrad.app.build import build_recipe_objective, frozen_as_said, make_model, optimizer_of
from localgrad.app.recipe import Recipe

CLASSES = 10


def learner_of(values: dict[str, Any], size: tuple[int, int, int]) -> localgrad.LocalLearner:
    """The learner of a recipe's values, with weights as they are drawn, for images of a size (C, H, W)."""
    recipe = Recipe.from_dict(values)
    model, _ = make_model(recipe.method.model, num_classes=CLASSES, num_channels=size[0])
    backbone = frozen_as_said(recipe, localgrad.split(model, size))
    local, checkpoint = recipe.method.local, recipe.execution.checkpoint
    assert isinstance(local.modules, int), "as experiments have it"
    assert isinstance(checkpoint, str), "as experiments have it"
    learner = localgrad.LocalLearner(
        backbone,
        modules=local.modules,
        objective=build_recipe_objective(recipe),
        overlap=local.overlap,
        checkpoint=checkpoint,
    )
    learner.configure_optimizers(optimizer_of(recipe.method.training, backbone.model))
    return learner
