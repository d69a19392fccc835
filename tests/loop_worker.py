"""What one of two processes does in the tests of loops, under a framework that has joined them: ``main`` with its name.

Prints what an ordinary learner says, and how far replicas' weights are from those of one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import localgrad
from helpers import adamw, batches, make


def joined(framework: str) -> Callable[[torch.optim.Optimizer], Any]:
    """Be one of two of a framework; what prepares an optimizer."""
    if framework == "accelerate":
        from accelerate import Accelerator

        prepare: Callable[[torch.optim.Optimizer], Any] = Accelerator(cpu=True).prepare
        return prepare
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    setup: Callable[[torch.optim.Optimizer], Any] = fabric.setup_optimizers
    return setup


def learner_of(team: localgrad.Team | None, **more: Any) -> Any:
    settings = {"modules": 2, "input_size": (3, 32, 32), "clip_grad": 1.0, **more}
    model = make()
    torch.manual_seed(1)
    kind: Any = localgrad.LocalLearner if team is None else localgrad.ParallelLearner
    learner = kind(model, **settings, **({} if team is None else {"team": team}))
    learner.configure_optimizers(adamw)
    return learner


def main() -> None:
    torch.set_num_threads(1)
    prepare = joined(sys.argv[1])
    data = batches(3, 8)
    alone = learner_of(None)
    prepare(alone.optimizer)
    try:
        alone.step(*data[0])
    except localgrad.ParallelError as error:
        print(error)
    team = localgrad.Team.join(num_replicas=2)
    learner, single = learner_of(team), learner_of(None, alone=True)
    optimizer = prepare(learner.optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = torch.optim.lr_scheduler.ExponentialLR(single.optimizer, 0.5)
    for images, labels in data:
        own = slice(4 * team.replica, 4 * team.replica + 4)
        learner.step(images[own], labels[own])
        optimizer.step()
        scheduler.step()
        single.step(images, labels)
        single.optimizer.step()
        rates.step()
    begun, ended = make().state_dict(), single.model.state_dict()
    weights = learner.whole_state_dict()
    if team.is_speaker:
        apart = max(float((weights[name] - value).abs().max()) for name, value in ended.items())
        moved = max(float((begun[name] - value).abs().max()) for name, value in ended.items())
        print(f"apart {apart} moved {moved}")
    team.leave()


if __name__ == "__main__":
    main()
