"""What several processes agree on before they train: that they are there, want the same, and can all do it.

A mistake that one of them finds ends all of them with the same message, which rank 0 prints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from localgrad.app.build import resolve_device
from localgrad.app.recipe import Recipe
from localgrad.errors import LocalgradError, ParallelError, RecipeError, arg
from localgrad.parallel.team import Team, check_groups, exchange, in_team, meet
from localgrad.parallel.watch import Watch
from localgrad.training.trainer import Interrupted

T = TypeVar("T")


@contextmanager
def team_of(recipe: Recipe) -> Iterator[Team | None]:
    """The processes that a recipe is trained by, watched; ``None`` for one.

    Raises:
        ParallelError: they can't meet, or want different recipes; or one of them was lost.
    """
    execution = recipe.execution
    alone = not in_team() or int(os.environ["WORLD_SIZE"]) == 1
    if execution.parallel == "none" and alone:
        yield None
        return
    store = meet()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _agree(store, recipe, size)
    watch = Watch(meet(), rank, size)
    with watch.watching(LocalgradError, Interrupted):
        team = Team.join(num_replicas=execution.replicas, device=device, store=store)
        yield replace(team, watch=watch)
        team.leave()  # not after an error: the others may be gone


def _agree(store: Any, recipe: Recipe, size: int) -> torch.device:
    """Check, before there are groups, which could hang, that all want the same; gives this process's device."""
    execution = recipe.execution
    device, error = torch.device("cpu"), None
    try:
        if execution.parallel == "none":
            raise ParallelError(
                f"torchrun started {size} processes, and each would train the whole model; add "
                f"{arg('parallel', 'modules')}."
            )
        device = _own_device(execution.device)
        check_groups(size, execution.replicas, device)
    except LocalgradError as found:
        error = found
    own = replace(recipe, execution=replace(execution, num_threads=None, num_workers=0)).to_toml()
    said = [json.loads(text) for text in exchange(store, json.dumps([own, None if error is None else str(error)]))]
    _check_alike([text for text, _ in said])
    _raise_first([text for _, text in said], error, int(os.environ["RANK"]))
    return device


def together(team: Team | None, make: Callable[[], T]) -> T:
    """Make something in every process; if one of them can't, none goes on.

    Raises:
        LocalgradError: what was found by the first process that couldn't.
    """
    if team is None:
        return make()
    try:
        made, error = make(), None
    except LocalgradError as found:
        error = found
    _raise_first(team.everyone(None if error is None else str(error)), error, team.rank)
    return made


def _raise_first(said: Sequence[str | None], own: LocalgradError | None, own_rank: int) -> None:
    """Raise what the first process said that couldn't do its part, if one did."""
    rank, first = next(((rank, text) for rank, text in enumerate(said) if text is not None), (0, None))
    if own is not None and rank == own_rank:
        raise own
    if first is not None:
        raise ParallelError(first if rank == 0 else f"rank {rank}: {first}")


def _own_device(name: str) -> torch.device:
    """The processor, or the GPU of this process's number on its machine."""
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise RecipeError(
            f"{arg('device', name)}: with {arg('parallel', 'modules')} each process takes its own GPU; take cuda."
        )
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ParallelError(
            f"{arg('device', name)}: process {number} of this machine has no GPU, there are {count}; start {count} "
            f"processes on it, or take {arg('device', 'cpu')}."
        )
    return torch.device("cuda", number)


def _check_alike(recipes: Sequence[str]) -> None:
    for rank, text in enumerate(recipes):
        if text != recipes[0]:
            theirs, first = (set(lines.splitlines()) for lines in (text, recipes[0]))
            different = "; ".join(sorted(first - theirs) + sorted(theirs - first))
            raise ParallelError(
                f"rank {rank} has another recipe than rank 0 ({different}); start all with the same options."
            )
