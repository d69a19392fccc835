"""One optimizer's face over those of all local modules, for what takes a single ``torch.optim.Optimizer``.

Learning rate schedulers, Accelerate and trainers of frameworks keep one optimizer: they read and write its groups, save
its state and call its ``step``. Here that is all of the modules' own, behind one object: its groups *are* theirs, so
that a scheduler made of it changes every module's learning rate, just as one for each would. The updates themselves are
made by ``learner.step``, module after module; there is nothing left to do in ``step`` but to notice a loop that means
something else by it: one that has other gradients, scales a loss of its own, or takes several batches to an update.

Public parts of ``torch.optim.Optimizer`` alone are used (its hooks come by ``__setstate__``, as in unpickling), and
what ``torch.amp.GradScaler`` asks of an optimizer (``_step_supports_amp_scaling``): that is how ``step`` sees one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from localgrad.backbones.namespaces import Attributes
from localgrad.errors import CheckpointError, RecipeError
from localgrad.step.states import or_as_before


def _sync_lookahead(optimizer: Any) -> None:
    """Sync one of timm, which passes over weights without a gradient: those of a local module are freed by then."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.sync_lookahead()
    optimizer.zero_grad()


PASSED_ON: dict[str, Callable[[Any], object]] = {
    "train": methodcaller("train"),
    "eval": methodcaller("eval"),
    "sync_lookahead": _sync_lookahead,
}
"""Methods that torch's optimizers lack, and that loops call where one has them.

The modes of schedule-free optimizers, and what timm's loop calls after an epoch.
"""


@final
class JointOptimizer(Optimizer):
    """The optimizers of all local modules as one.

    ``step`` updates nothing: ``learner.step`` has made every module's update, and freed its gradients. Call it after
    each ``learner.step`` all the same where something counts on it, such as a scheduler, or Accelerate.

    Args:
        optimizers: those of the modules, first to last.
    """

    optimizers: tuple[Optimizer, ...]
    num_updates: int = 0
    """Updates that the learner has made since ``step`` was last called."""
    _step_supports_amp_scaling = True

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Not torch's own __init__, which would make groups of its own.
        Optimizer.__setstate__(self, {"optimizers": tuple(optimizers)})

    def __getstate__(self) -> Attributes:
        """For copies: what schedulers put on the object stays with it."""
        return {"optimizers": self.optimizers}

    def __getattr__(self, name: str) -> Any:
        """What loops look for with ``hasattr``: there where a module's optimizer has it, and passed on to those."""
        having = [each for each in self.optimizers if hasattr(each, name)] if name in PASSED_ON else []
        if not having:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def pass_on() -> None:
            for optimizer in having:
                PASSED_ON[name](optimizer)

        return pass_on

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all modules, first to last: the very dicts, so that what is written into one counts.

        The list is made anew each time; ``add_param_group`` of a module's own optimizer adds a group.
        """
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """What is kept for each parameter, by parameter; the mapping is made anew each time."""
        found: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            found.update(optimizer.state)
        return found

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Options that all modules' optimizers have, with the first one's values: schedulers look for momentum."""
        first, *others = self.optimizers
        return {
            name: value
            for name, value in first.defaults.items()
            if all(name in optimizer.defaults for optimizer in others)
        }

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update nothing: ``learner.step`` has updated all modules.

        Raises:
            RecipeError: there are gradients, of another backward pass than ``learner.step``'s, or a closure or a
                ``GradScaler`` to make some: they would update nothing; or the learner has updated more than once since
                the last call, where a loop takes several batches to an update.
        """
        count, self.num_updates = self.num_updates, 0
        if closure is not None:
            raise RecipeError("optimizer.step: a closure has no part in it; call learner.step(batch), which updates.")
        if "grad_scale" in vars(self):  # GradScaler leaves both there for the time of the call
            del vars(self)["grad_scale"], vars(self)["found_inf"]
            raise RecipeError(
                "optimizer.step: a GradScaler called it, and each local module scales its own loss; make the learner "
                "with precision='fp16', and leave the loop's own loss scale out."
            )
        if count > 1:
            raise RecipeError(
                f"optimizer.step: the learner has made {count} updates since the last one, one for each batch; call it "
                f"after each learner.step, or train on {count} batches at once: learner.step_parts([...]), or a larger "
                f"batch and LocalLearner(..., accumulation={count})."
            )
        if any(weight.grad is not None for group in self.param_groups for weight in group["params"]):
            raise RecipeError(
                "optimizer.step: there are gradients of another backward pass, and learner.optimizer updates nothing; "
                "call learner.step(batch) in place of loss.backward()."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002  # torch's own signature
        """Drop the gradients of all modules; ``learner.step`` does so by itself."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a group belongs to one module.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            "optimizer.add_param_group: a group belongs to one local module; call it of that module's own, "
            "learner.optimizers[index]."
        )

    def state_dict(self) -> dict[str, Any]:
        """The states of all modules' optimizers as one, in torch's own format.

        Returns:
            ``state``, by number of a parameter; ``param_groups``, of which each says the local module that it is of.
        """
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        for index, optimizer in enumerate(self.optimizers):
            own = optimizer.state_dict()
            first = sum(len(group["params"]) for group in groups)
            state |= {key + first if isinstance(key, int) else key: value for key, value in own["state"].items()}
            groups += [
                {**group, "params": [key + first for key in group["params"]], "local_module": index}
                for group in own["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            CheckpointError: it is of other local modules, or one of their optimizers doesn't take its part; all are as
                they were.
        """
        groups = state_dict["param_groups"]
        sizes = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self.optimizers]
        found = [
            [len(group["params"]) for group in groups if group.get("local_module") == index]
            for index in range(len(sizes))
        ]
        if found != sizes or sum(map(len, found)) != len(groups):
            raise CheckpointError(
                f"checkpoint: its optimizer has groups of {[len(group['params']) for group in groups]} parameters, "
                f"those of these local modules {sizes}; use the same modules, with as many frozen parameters."
            )
        with or_as_before(self.optimizers):
            first = 0
            for index, optimizer in enumerate(self.optimizers):
                own = [group for group in groups if group["local_module"] == index]
                count = sum(len(group["params"]) for group in own)
                optimizer.load_state_dict(
                    {
                        "state": {
                            key - first: value
                            for key, value in state_dict["state"].items()
                            if isinstance(key, int) and first <= key < first + count
                        },
                        "param_groups": [
                            {name: value for name, value in group.items() if name != "local_module"}
                            | {"params": [key - first for key in group["params"]]}
                            for group in own
                        ],
                    }
                )
                first += count
        self.num_updates = 0

    def __repr__(self) -> str:
        """The optimizers, one a line."""
        lines = [f"  {index}: {type(optimizer).__name__}" for index, optimizer in enumerate(self.optimizers)]
        return "\n".join(["JointOptimizer(", *lines, ")"])
