"""How large a reproduction is: ``smoke`` shows that it works, ``cpu`` ranks methods on few images, ``gpu`` is it all.

``cpu-full`` is the small model of ``cpu`` on all images: what local training costs, and not what few images make of it.

A profile sets everything but the method, the data set and the seed, so that all methods of a table are trained alike.
It is part of every figure: figures of different profiles are never put into one table. Values are recipe keys, dotted
as in ``localgrad train --set``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A part of a profile's agenda: every method with every K and seed, seeds first.

    Attributes:
        table: of which table they are.
        methods: by name.
        modules: choices of K for all but the baselines.
        data: data set.
        seeds: of the runs.
        epochs: of the runs; by default the profile's.
    """

    table: str
    methods: tuple[str, ...]
    modules: tuple[int, ...] = (4,)
    data: str = "cifar10"
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of a reproduction.

    Attributes:
        name: as typed.
        about: what a reader of its figures must know of either model, a phrase.
        size: what follows the name of a model of that size.
        preset: what the settings are laid over; all but its local modules and objective.
        settings: for every cell, ``training.epochs`` among them.
        models: for each of the two models, what it is.
        num_blocks: of each model; a table's larger K are left out.
        seeds: by default.
        agenda: the cells that it is for, in the order in which they are run; without one, all cells of every table.
    """

    name: str
    about: str
    size: str = ""
    preset: str | None = None
    settings: Settings
    models: dict[str, Settings]
    num_blocks: dict[str, int]
    seeds: tuple[int, ...] = (0, 1, 2)
    agenda: tuple[Wanted, ...] = ()

    @property
    def epochs(self) -> int:
        """Epochs of a whole run."""
        return int(self.settings["training.epochs"])


DATA: dict[str, Settings] = {
    "cifar10": {},
    "cifar100": {},
    "stl10": {},
    "svhn": {"augment.flip": False},  # a mirrored digit is another one, or none
}
"""What a data set changes, whatever the profile."""

SMOKE = Profile(
    name="smoke",
    about="seconds a run, to see that everything works; its accuracies mean nothing",
    settings={
        "data.val_fraction": 0.1,
        "data.limit": 64,
        "training.epochs": 2,
        "training.batch_size": 16,
        "training.lr": 1e-3,
        "training.warmup_epochs": 0.0,
    },
    models={
        "swin": {
            "model.name": SWIN,
            "model.img_size": 16,
            "model.patch_size": 2,
            "model.options": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        },
        "vit": {
            "model.name": VIT,
            "model.img_size": 16,
            "model.patch_size": 4,
            "model.options": {"embed_dim": 32, "depth": 4, "num_heads": 2},
        },
    },
    num_blocks={"swin": 4, "vit": 4},
    seeds=(0,),
)

CPU = Profile(
    name="cpu",
    about="a reduced run for two processor cores: a small model and 32 x 32 pixels",
    settings={
        "data.val_fraction": 0.02,
        "data.limit": 2_500,
        "augment.crop_padding": 2,
        "augment.flip": True,
        "training.epochs": 50,
        "training.batch_size": 128,
        "training.lr": 3e-3,  # of 1e-3 and 3e-3 the better one for end-to-end training, on validation images
        "training.weight_decay": 0.05,
        "training.warmup_epochs": 3.0,
        "execution.precision": "bf16",
        # A good part of what such a small model needs is weights and optimizer: `default` at K = 4 stays within 0.40 x
        # end-to-end training with the first block of each module recomputed. Baselines say for themselves what they do.
        "execution.checkpoint": "halves:1",
    },
    models={
        # Blocks where activations are, and few weights: in early stages. Patches of 2 pixels would give as much
        # memory to save, but learn slower, and take longer for it.
        "swin": {
            "model.name": SWIN,
            "model.img_size": 32,
            "model.patch_size": 4,
            "model.options": {
                "embed_dim": 24,
                "depths": [6, 4, 2, 1],
                "num_heads": [1, 2, 4, 8],
                "window_size": 4,
            },
        },
        "vit": {
            "model.name": VIT,
            "model.img_size": 32,
            "model.patch_size": 4,
            "model.options": {"embed_dim": 96, "depth": 6, "num_heads": 3},
        },
    },
    num_blocks={"swin": 13, "vit": 6},
)

_MAIN = ("end-to-end", "default", "feature-linear", "greedy")
_LATER = (1, 2)

CPU_FULL = Profile(
    name="cpu-full",
    about="a small model and 32 x 32 pixels, on all images that aren't for validation",
    settings={
        **{key: value for key, value in CPU.settings.items() if key != "data.limit"},
        "training.epochs": 30,
        "execution.precision": "fp32",  # on processors without units for it, bf16 takes far longer
        # Measured (costs/cpu-full.json), `default` at K = 4 takes under 0.40 x end-to-end training's memory as it is.
        "execution.checkpoint": "none",
    },
    models=CPU.models,
    num_blocks=CPU.num_blocks,
    agenda=(
        # 1. What each method costs.
        Wanted(
            table="cifar10",
            methods=("end-to-end", "half-frozen", "greedy", "image", "feature-linear", "default", "trgl"),
        ),
        Wanted(table="cifar10", methods=("default", "feature-linear"), modules=(2,)),
        # 2. With what spread.
        Wanted(table="cifar10", methods=_MAIN, seeds=_LATER),
        Wanted(table="cifar10", methods=("default",), modules=(2,), seeds=_LATER),
        # 3. On other images.
        Wanted(table="cifar100", methods=("end-to-end", "default"), modules=(4, 2), data="cifar100"),
        Wanted(table="cifar100", methods=("feature-linear", "greedy"), data="cifar100"),
        Wanted(table="cifar100", methods=("end-to-end", "default"), data="cifar100", seeds=_LATER),
        # 4. Whether the gap grows.
        Wanted(table="epochs", methods=("end-to-end", "default")),
        Wanted(table="epochs", methods=("end-to-end", "default"), epochs=60),
        # As much time as 30 epochs end to end, as much arithmetic with every block recomputed, as much time with that.
        *(Wanted(table="epochs", methods=("default",), epochs=epochs) for epochs in (28, 36, 44)),
        # 5. What helps, chosen by validation.
        Wanted(
            table="ranking",
            methods=(
                *("end-to-end", "default"),
                *("global-tail-20", "global-tail-10", "global-tail-40"),
                *("classifier-transformer-2", "classifier-next", "classifier-tail", "overlap-1"),
                *("transport", "end-to-end-average", "teacher", "reconstruct-fading", "lr-depth"),
            ),
        ),
        # 6. Another model.
        Wanted(table="vit", methods=("end-to-end", "default", "feature-linear"), modules=(3,)),
    ),
)

GPU = Profile(
    name="gpu",
    size="-T",
    about="the full recipe, the preset `paper` in bf16: 224 x 224 pixels, all training images, 300 epochs",
    preset="paper",
    settings={"training.epochs": 300, "execution.precision": "bf16"},
    models={"swin": {"model.name": SWIN}, "vit": {"model.name": VIT}},
    num_blocks={"swin": 12, "vit": 12},
)

PROFILES: dict[str, Profile] = {profile.name: profile for profile in (SMOKE, CPU, CPU_FULL, GPU)}
