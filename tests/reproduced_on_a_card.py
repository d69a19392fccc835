"""A process on a card: ``python -m research.reproduce``, with the profile ``gpu`` of small models and few images.

Presets, precision and whatever else the profile sets stay as they are; so a fault of the long run shows here.
"""

from __future__ import annotations

from dataclasses import replace

from localgrad import cli
from research.reproduce import __main__ as command_line
from research.reproduce.profiles import GPU, PROFILES, SMOKE

FEW = {"data.limit": 40, "training.batch_size": 8, "training.epochs": 3, "training.warmup_epochs": 1}


def main() -> None:
    PROFILES["gpu"] = replace(
        GPU, settings={**GPU.settings, **FEW}, models=SMOKE.models, num_blocks=SMOKE.num_blocks, seeds=(0,)
    )
    cli.main(command_line.app)


if __name__ == "__main__":
    main()
