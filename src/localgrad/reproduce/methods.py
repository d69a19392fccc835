"""The methods that are compared: what each changes in a recipe, and nothing that another one keeps.

A method may set the local objective and, for end-to-end training, what is recomputed. Model, data, augmentation, epochs
and seed are the profile's, the table's and the cell's.
"""

from __future__ import annotations

from typing import Any

Overlay = dict[str, Any]

END_TO_END, DEFAULT = "end-to-end", "default"


def _local(objective: str, **options: Any) -> Overlay:
    return {"local.objective": objective, "local.options": options}


BASELINES: dict[str, Overlay] = {
    END_TO_END: {**_local("greedy"), "local.modules": 1},
    "end-to-end-checkpointed": {**_local("greedy"), "local.modules": 1, "execution.checkpoint": "blocks"},
}
"""One module, whatever K. Recomputation doesn't change results: the second one is there for its memory and its time."""

METHODS: dict[str, Overlay] = {
    **BASELINES,
    # InfoPro on transformers: the image is reconstructed.
    "image": _local("image", decoder="linear", classifier="linear"),
    # arXiv 2212.14215; the three decoders are ours, as the paper's aren't told.
    "feature-linear": _local("feature", decoder="linear", classifier="linear"),
    "feature-conv": _local("feature", decoder="conv", classifier="linear"),
    "feature-transformer": _local("feature", decoder="transformer", classifier="linear"),
    "greedy": _local("greedy", classifier="linear"),
    # arXiv 2309.17357; its value of tau for Swin isn't told in the copies that can be had.
    "trgl": _local("greedy", classifier="linear", transport_tau=1.0),
    # Our best.
    DEFAULT: _local("feature", decoder="linear", classifier="transformer"),
}
"""The methods of the published tables."""

REMEDIES: dict[str, Overlay] = {
    "greedy-mlp": _local("greedy", classifier="mlp"),
    "greedy-transformer": _local("greedy", classifier="transformer"),
    "feature-mlp": _local("feature", decoder="linear", classifier="mlp"),
}
"""Further ones, for the table ``ranking`` alone."""


def overlay_of(method: str) -> Overlay:
    """What a method or remedy changes in a recipe."""
    return {**METHODS, **REMEDIES}[method]
