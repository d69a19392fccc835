"""The methods that are compared: what each changes in a recipe, and nothing that another one keeps.

A method may set the local objective and what is recomputed; a remedy also what it is a remedy of (end-to-end steps, an
average that teaches, factors over depth). Model, data, augmentation, epochs and seed are the profile's, the table's and
the cell's.
"""

from __future__ import annotations

from typing import Any

Overlay = dict[str, Any]

END_TO_END, DEFAULT = "end-to-end", "default"
AVERAGED = "end-to-end-average"


def _local(objective: str, **options: Any) -> Overlay:
    return {"local.objective": objective, "local.options": options}


_AVERAGE: Overlay = {"training.ema_decay": 0.998}

_WHOLE: Overlay = {**_local("greedy"), "local.modules": 1, "execution.checkpoint": "none"}

BASELINES: dict[str, Overlay] = {
    END_TO_END: _WHOLE,
    "end-to-end-checkpointed": {**_WHOLE, "execution.checkpoint": "blocks"},
    "half-frozen": {**_WHOLE, "training.freeze": 0.5},
    AVERAGED: {**_WHOLE, **_AVERAGE},
}
"""One module, whatever K. Recomputation doesn't change results: the second one is there for its memory and its time.
The third is a floor: what its lower half adds to a network if it stays as it was drawn. What keeps an average of the
weights is held against the fourth one."""

METHODS: dict[str, Overlay] = {
    **{name: changes for name, changes in BASELINES.items() if name != AVERAGED},
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


def _remedy(classifier: str = "transformer", decoder: str = "linear", **options: Any) -> Overlay:
    return _local("feature", decoder=decoder, classifier=classifier, **options)


REMEDIES: dict[str, Overlay] = {
    AVERAGED: BASELINES[AVERAGED],
    # The auxiliary classifier.
    "classifier-mlp": _remedy("mlp"),
    "classifier-transformer": _remedy(),
    "classifier-transformer-2": _remedy(classifier_options={"depth": 2}),
    "classifier-transformer-3-1": _remedy(classifier_options={"depth": [3, 1]}),
    "classifier-next": _remedy("next"),
    "classifier-next-ema": _remedy("next", classifier_options={"weights": "ema"}),
    "classifier-tail": _remedy("tail"),
    "classifier-tail-3": _remedy("tail", classifier_options={"depth": 3}),
    "classifier-tail-ema": _remedy("tail", classifier_options={"depth": 3, "weights": "ema"}),
    "greedy-transformer": _local("greedy", classifier="transformer"),
    # Reconstruction.
    "reconstruct-blocks": _remedy(reconstruct="blocks"),
    "reconstruct-previous": _remedy(reconstruct="previous"),
    "reconstruct-cosine": _remedy(reconstruction_error="cosine"),
    # A decoder has to mix positions to fill in hidden ones: these two are to be held against one another.
    "reconstruct-conv": _remedy(decoder="conv"),
    "reconstruct-masked": _remedy(decoder="conv", mask=0.6),
    "reconstruct-fading": _remedy(over_time={"reconstruction": [1.0, 0.0]}),
    # Other terms.
    "transport": _remedy(transport_tau=1.0),
    "contrastive": _remedy(contrastive_weight=0.5),
    "similarity": _remedy(similarity_weight=1.0),
    "average": {**_remedy(), **_AVERAGE},  # alone, as `teacher` is evaluated on one too
    "teacher": {**_remedy(teacher_share=0.5), **_AVERAGE},
    # Between modules.
    "context": _remedy(context=0.5),
    "overlap-1": {**_remedy(), "local.overlap": 1},
    "reconcile": _remedy(reconcile=0.1),  # at 0.5 the pull is up to seven times as long as the loss's own gradient
    # End-to-end steps, recomputing.
    "global-every-8": {**_remedy(), "training.global_every": 8},
    "global-tail-10": {**_remedy(), "training.global_tail": 0.1},
    "global-tail-20": {**_remedy(), "training.global_tail": 0.2},
    "global-tail-40": {**_remedy(), "training.global_tail": 0.4},
    # The schedule over depth.
    "lr-depth": {**_remedy(), "training.lr_depth": [0.5, 1.0]},
    "warmup-stagger": {**_remedy(), "training.warmup_stagger": 2.0},
    "freeze": {**_remedy(), "training.freeze_from": 0.8},
}
"""Further ones, for the tables ``ranking`` and ``images`` alone."""


SOURCES: dict[str, Overlay] = {
    # arXiv 2309.17357: its head norms before it pools, its penalty is charged per branch, attention and MLP apart.
    "trgl-source": _local(
        "greedy",
        classifier="linear",
        classifier_options={"norm_first": True},
        transport_tau=1.0,
        transport_per="branch",
    ),
    # arXiv 2101.10832, with the weights of its released command for ResNet-110 in 16 modules on CIFAR-10 (other
    # numbers of modules and data sets have others there), linear between the first and the last but one.
    "infopro-source": _local(
        "image",
        decoder="bilinear",
        classifier="linear",
        reconstruction_error="bce",
        reconstruction_weight=[5.0, 0.5],
        task_weight=[0.0, 1.0],
    ),
}
"""Methods in their sources' own forms, for the table ``sources``; ``trgl`` and ``image`` stay as published."""


def overlay_of(method: str) -> Overlay:
    """What a method or remedy changes in a recipe."""
    return {**METHODS, **REMEDIES, **SOURCES}[method]


def begins_at(method: str) -> float:
    """The share of the training after which a remedy begins to act; before, the run is that of `default`."""
    changes = overlay_of(method)
    return float(changes.get("training.freeze_from", 1.0 - changes.get("training.global_tail", 1.0)))


def keeps_average(method: str) -> bool:
    """Whether a method keeps an average of the weights, which takes memory."""
    return "training.ema_decay" in overlay_of(method)
