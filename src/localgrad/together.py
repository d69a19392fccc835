"""What several processes agree on before they train: that they are there, want the same, and can all do it.

A mistake that one of them finds ends all of them with the same message, which rank 0 prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from localgrad.build import resolve_device
from localgrad.errors import LocalgradError, ParallelError, RecipeError
from localgrad.execution.team import Team, in_team
from localgrad.recipe import Recipe

T = TypeVar("T")


@contextmanager
def team_of(recipe: Recipe) -> Iterator[Team | None]:
    """The processes that a recipe is trained by; ``None`` for one.

    Raises:
        ParallelError: they can't meet, or want different recipes.
    """
    execution = recipe.execution
    if execution.parallel == "none":
        if in_team() and int(os.environ["WORLD_SIZE"]) > 1:
            raise ParallelError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, and each would train the whole model; add "
                "--parallel modules."
            )
        if execution.replicas > 1:
            raise ParallelError(f"--replicas {execution.replicas}: they need --parallel modules.")
        yield None
        return
    team = Team.join(num_replicas=execution.replicas, device=_own_device(execution.device))
    _check_alike(team, recipe)
    yield team
    team.leave()  # not after an error: the others may be gone


def together(team: Team | None, make: Callable[[], T]) -> T:
    """Make something in every process; if one of them can't, none goes on.

    Args:
        team: the processes.
        make: what each does.

    Raises:
        LocalgradError: what was found by the first process that couldn't.
    """
    if team is None:
        return make()
    try:
        made, error = make(), None
    except LocalgradError as found:
        error = found
    said = team.everyone(None if error is None else str(error))
    rank, first = next(((rank, text) for rank, text in enumerate(said) if text is not None), (0, None))
    if first is None:
        return made
    if error is not None and rank == team.rank:
        raise error
    raise ParallelError(first if rank == 0 else f"rank {rank}: {first}")


def _own_device(name: str) -> torch.device:
    """The processor, or the GPU of this process's number on its machine."""
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise RecipeError(f"--device {name}: with --parallel modules each process takes its own GPU; take cuda.")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ParallelError(
            f"--device {name}: process {number} of this machine has no GPU, there are {count}; take --nproc-per-node "
            f"{count}, or --device cpu."
        )
    return torch.device("cuda", number)


def _check_alike(team: Team, recipe: Recipe) -> None:
    execution = replace(recipe.execution, num_threads=None, num_workers=0)
    own = replace(recipe, execution=execution).to_toml()
    said = team.everyone(own)
    for rank, text in enumerate(said):
        if text != said[0]:
            theirs, first = (set(lines.splitlines()) for lines in (text, said[0]))
            different = "; ".join(sorted(first - theirs) + sorted(theirs - first))
            raise ParallelError(
                f"rank {rank} has another recipe than rank 0 ({different}); start all with the same options."
            )
