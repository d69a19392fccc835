"""A local module whose weights, gradients and optimizer state are shared out among its replicas: PyTorch's FSDP2.

``shard`` turns the parameters of a module into DTensors: each replica keeps its rows. Before a step the module's hooks
gather all of them, after its backward pass the gradients are averaged and shared out, and the optimizer updates rows.
So a replica holds one whole module at a time, while it trains. Statistics of batch norms stay whole.

States are whole tensors everywhere: what is saved fits any number of replicas. Making one whole is a collective call
of the replicas; making rows of a whole one is not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from localgrad.backbones.watching import Called, Segment
from localgrad.errors import ParallelError, arg
from localgrad.objectives.auxiliary import carry_exemptions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

T = TypeVar("T")

OPTIMIZERS = (
    *("Adam", "AdamW", "AdamWLegacy", "Adamax", "NAdam", "NAdamLegacy", "NAdamW", "RAdam", "RAdamLegacy", "AdaBelief"),
    *("Adadelta", "Adagrad", "Adan", "Adopt", "LaProp", "MADGRAD", "RMSprop", "RMSpropTF"),
    *("SGD", "SGDW", "Lamb", "Lars", "Lion"),
)
"""Classes of torch and timm that were seen to do with rows what they do with whole tensors (but for rounding).

Others go on with a matrix as a whole (Muon, Kron), by its rows and columns (Adafactor), or with operations that DTensor
doesn't know: they fail, hang, or compute something else.
"""


OptimizerState = dict[str, Any]
"""What PyTorch's optimizers give and take as their state: its shape is theirs."""


def shard(module: nn.Module, twins: DeviceMesh) -> None:
    """Share a module's parameters out among the processes that have it alike.

    The weights stay whole between the forward and the backward pass: one is right behind the other.
    """
    from torch.distributed.fsdp import fully_shard

    whole_ones = list(module.parameters())
    fully_shard(module, mesh=twins, reshard_after_forward=False)
    carry_exemptions(whole_ones, module.parameters())


def check_shardable(optimizer: Optimizer) -> None:
    """Refuse an optimizer that isn't known to be right on rows.

    Raises:
        ParallelError: it isn't one of ``OPTIMIZERS``, or a cautious variant of one (2411.16085), which takes a mean.
    """
    name = type(optimizer).__name__
    if name not in OPTIMIZERS or optimizer.defaults.get("caution"):
        kind = f"a cautious {name}" if name in OPTIMIZERS else name
        raise ParallelError(
            f"{arg('shard')}: {kind} isn't known to work on rows of weights; take adamw, sgd, lion or lamb."
        )


def release(module: nn.Module) -> None:
    """Keep only the own rows of a module's weights, whatever was gathered; where there are no others, nothing."""
    if hasattr(module, "reshard"):
        cast(Any, module).reshard()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A region in which a module has its whole weights; all replicas enter it together."""
    if not hasattr(module, "unshard"):
        yield
        return
    cast(Any, module).unshard()
    try:
        yield
    finally:
        release(module)


def is_sharded(tensor: object) -> bool:
    """Whether this process has only its rows of a tensor: a DTensor, whose import takes a second."""
    return hasattr(tensor, "full_tensor")


def rows_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def made_whole(value: T) -> T:
    """Tensors in nested lists and dicts made whole; all replicas call this together."""
    if isinstance(value, Tensor):
        return cast(Any, value).full_tensor() if is_sharded(value) else value
    if isinstance(value, Mapping):
        return cast(T, {key: made_whole(each) for key, each in value.items()})
    if isinstance(value, list):
        return cast(T, [made_whole(each) for each in value])
    return value


def own_rows(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what this process has of another of its shape."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or the own rows of it, into place."""
    target.copy_(own_rows(value, target))


def put_optimizer(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Load an optimizer's whole state dict, of whose tensors it may have rows: those of its parameters' shape."""
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not any(map(is_sharded, parameters)):
        optimizer.load_state_dict(state)
        return
    own = {
        number: {
            name: own_rows(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in slots.items()
        }
        for number, slots in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


@torch.no_grad()
def swap(first: Tensor, second: Tensor) -> None:
    """Let two tensors have each other's values; without a copy, where they are whole."""
    if is_sharded(first):
        kept = rows_of(first).clone()
        rows_of(first).copy_(rows_of(second))
        rows_of(second).copy_(kept)
    else:
        first.data, second.data = second.data, first.data


class OwnRows(nn.Module):
    """Some parts of a model, whose state dict tells what this process has of them in plain tensors.

    Operators over lists of tensors take no rows beside whole ones; a moving average is such a one.
    """

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnRows:
        """For an average, which never runs: the code of a model that was split by watching isn't copied with it."""
        for part in self.modules():
            if isinstance(part, Segment):
                memo.setdefault(id(part.trunk), part.trunk)
            elif isinstance(part, Called):
                memo.setdefault(id(part.batch), part.batch)
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]  # torch overloads it
        """As of any module, but for rows."""
        return {name: rows_of(value) for name, value in super().state_dict(*args, **kwargs).items()}
