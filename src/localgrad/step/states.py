"""What a learner's state must be to be loaded: seen before anything is changed, so that it is all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.errors import CheckpointError
from localgrad.formats import Json
from localgrad.objectives.methods import Objective
from localgrad.step.sharding import OptimizerState, put

KEEPING = ("momentum", "amsgrad", "centered")
"""Options of optimizers, by which they keep something more."""
LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What optimizers of torch and timm keep in a parameter's own shape."""
OF_OTHERS = {"params", "param_names", "initial_lr", "lr_scale"}
"""What a group of parameters has from others than its optimizer's class: schedulers, timm."""


class ObjectiveName(TypedDict):
    """An objective in plain values: its class, and those of its options that aren't the default."""

    name: str
    options: dict[str, Json]


class _State(TypedDict):
    """What a learner and its part in one process have alike; an objective wasn't kept in the first checkpoints."""

    model: dict[str, Tensor]
    averaged_model: dict[str, Tensor] | None
    num_steps: int
    seed: int
    boundaries: list[int]
    objective: NotRequired[ObjectiveName]


class LearnerState(_State):
    """Everything that a resumed run needs of a learner."""

    objectives: list[dict[str, Tensor]]
    optimizers: list[OptimizerState]
    scalers: list[dict[str, float]]
    optimizer_classes: NotRequired[list[str]]


class LearnerPart(_State):
    """One process's part of that, lists by the number of the local module."""

    objectives: dict[int, dict[str, Tensor]]
    optimizers: dict[int, OptimizerState]
    scalers: dict[int, dict[str, float]]
    optimizer_classes: NotRequired[dict[int, str]]


class StepState(TypedDict):
    """The optimizer and loss scale of one local module's step."""

    optimizer: OptimizerState
    scaler: dict[str, float]
    optimizer_class: NotRequired[str]


def describe(objective: Objective) -> ObjectiveName:
    """An objective in plain values."""
    options: dict[str, Json] = {}
    for field in dataclasses.fields(objective):
        value, default = getattr(objective, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if _told_value(value) != _told_value(default):
            options[field.name] = _told_value(value)
    return {"name": type(objective).__name__, "options": options}


def _told_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _told_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_told_value(inner) for inner in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__qualname__


def check_objective(saved: Mapping[str, Any] | None, own: Objective) -> None:
    """Refuse the state of another objective; checkpoints of before it was kept have none.

    Raises:
        CheckpointError: naming both.
    """
    ours = describe(own)
    if saved is not None and saved != ours:
        theirs, here = (
            f"{each['name']}({', '.join(f'{name}={value!r}' for name, value in each['options'].items())})"
            for each in (saved, ours)
        )
        raise CheckpointError(
            f"checkpoint: it was trained on {theirs}, this learner has {here}; make it with the same objective, or "
            "del state['objective'] to go on with this one."
        )


def kind_of_optimizer(optimizer: Optimizer) -> str:
    """An optimizer's class and those of its options that decide what it keeps: what its memory depends on."""
    kept = [f"{name}={value}" for name in KEEPING if (value := optimizer.defaults.get(name))]
    return f"{type(optimizer).__name__}({', '.join(kept)})" if kept else type(optimizer).__name__


def check_optimizer_state(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    saved_class: str | None,
    index: int,
    names: Callable[[], Mapping[int, str]],
) -> None:
    """Refuse an optimizer's state that isn't of its class and its parameters, or has lost a part.

    Args:
        optimizer: of a local module.
        state: its part of a checkpoint.
        saved_class: the name of the class that it is from; ``None`` in checkpoints of before that was kept.
        index: of the local module.
        names: asked for the names of parameters, by ``id``.

    Raises:
        CheckpointError: naming the difference.
    """
    where, own = f"checkpoint: the optimizer of local module {index}", type(optimizer).__name__
    if saved_class is not None and saved_class != own:
        raise CheckpointError(f"{where} was {saved_class}, and this learner has {own}; configure {saved_class}.")
    if not isinstance(state, Mapping) or {"state", "param_groups"} - state.keys():
        raise CheckpointError(f"{where} has no state or param_groups; save learner.state_dict() again.")
    theirs, ours = state["param_groups"], optimizer.param_groups
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{where} has groups of {sizes[0]} parameters, this learner's of {sizes[1]}; configure it as it was, with "
            "as many frozen parameters."
        )
    for saved, mine in zip(theirs, ours, strict=True):
        unknown, missing = (
            sorted(map(str, a.keys() - b.keys() - OF_OTHERS)) for a, b in ((saved, mine), (mine, saved))
        )
        if unknown and missing:
            raise CheckpointError(
                f"{where} was another one: it has {', '.join(unknown[:3])}, and this learner's {own} "
                f"{', '.join(missing[:3])}; configure the same class."
            )
    parameters = [weight for group in ours for weight in group["params"]]
    keys = [key for group in theirs for key in group["params"]]
    by_key = dict(zip(keys, parameters, strict=True))
    for key, slots in state["state"].items():
        for name, value in slots.items() if isinstance(slots, Mapping) and key in by_key else ():
            shape = by_key[key].shape
            if name in LIKE_PARAMETERS and isinstance(value, Tensor) and value.ndim and value.shape != shape:
                raise CheckpointError(
                    f"{where} has {name} of shape {list(value.shape)} for a parameter of shape {list(shape)}; it is of "
                    "another model, or of parameters in another order."
                )
    for group in theirs:
        lost = _lost_slot([(by_key[key], state["state"].get(key)) for key in group["params"]], type(optimizer))
        if lost is not None:
            weight, slot = lost
            raise CheckpointError(
                f"{where} has no {slot} for {names().get(id(weight), 'a parameter')}, and has it for others like that; "
                "it isn't whole: take the checkpoint before it."
            )


def _lost_slot(kept: Sequence[tuple[Tensor, object]], kind: type[Optimizer]) -> tuple[Tensor, str] | None:
    """A parameter of a group that lacks something of what is kept for another one, and what.

    Optimizers of torch and timm keep as much for every parameter of a group, or things of other names (factors for
    matrices); of others that is taken for parameters of one shape only.

    Args:
        kept: parameters with their slots; those without any never had a gradient.
        kind: the optimizer's class.
    """
    is_even = kind.__module__.startswith(("torch.optim.", "timm.optim."))
    known = [(weight, slots) for weight, slots in kept if isinstance(slots, Mapping) and slots]
    kinds = {(None if is_even else weight.shape, frozenset(slots)) for weight, slots in known}
    for weight, slots in known:
        own = frozenset(slots)
        for shape, others in kinds:
            if own < others and shape in (None, weight.shape):
                return weight, str(min(others - own))
    return None


def check_scaler_state(scaler: torch.amp.GradScaler, state: Mapping[str, Any], index: int) -> None:
    """Refuse to go on in fp16 from a state that has no loss scale.

    Raises:
        CheckpointError: naming the local module.
    """
    if scaler.is_enabled() and not state:
        raise CheckpointError(
            f"checkpoint: local module {index} has no loss scale, as it wasn't trained in fp16; make the learner with "
            "precision='bf16' or 'fp32'."
        )


@contextlib.contextmanager
def or_as_before(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """A region after which, if it fails, optimizers have their states of before: loading puts others in their place."""
    before = [(optimizer.state, optimizer.param_groups) for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for optimizer, (state, groups) in zip(optimizers, before, strict=True):
            optimizer.state, optimizer.param_groups = state, groups
        raise


def load_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        CheckpointError: keys or shapes differ.
    """
    check_weights(module, state)
    for name, target in module.state_dict().items():
        owner, _, last = name.rpartition(".")
        if last == _EXTRA_STATE:
            module.get_submodule(owner).set_extra_state(state[name])
        else:
            put(target, state[name])


_EXTRA_STATE = "_extra_state"
"""The end of a key under which a module keeps what is no weight: torch's name."""


def check_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Refuse a state dict that doesn't fit exactly.

    Raises:
        CheckpointError: keys or shapes differ; the message names the first differences.
    """
    own = module.state_dict()
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or unknown:
        raise CheckpointError(
            f"checkpoint: it is of another model: {len(missing)} weights are missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])})."
        )
    for key, value in own.items():
        if key.rpartition(".")[2] == _EXTRA_STATE:  # of whatever kind and shape the module makes of it
            continue
        if not isinstance(state[key], Tensor):
            raise CheckpointError(f"checkpoint: {key} is a {type(state[key]).__name__}, not a tensor.")
        if value.shape != state[key].shape:
            raise CheckpointError(
                f"checkpoint: it is of another model: {key} has shape {list(state[key].shape)}, "
                f"not {list(value.shape)}."
            )
