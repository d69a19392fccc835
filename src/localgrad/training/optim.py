"""Optimizers and schedulers of timm, one of each for every local module.

Weight decay is left off biases, norms and whatever the model itself names (position embeddings, tokens), as timm
does for a whole model; timm decides on the plain model, and the decision is carried over parameter by parameter.
Schedulers count batches, never optimizer steps or calls, so that all modules stand at the same place in time.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from localgrad.errors import RecipeError, did_you_mean

SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "none")
WARMUP_SHARE = 0.2
"""Warm-up takes at most this share of all epochs, so that a short run still reaches its learning rate."""


class OptimizerFactory:
    """Makes one module's optimizer from its parameters.

    Args:
        model: the plain timm model, asked once which parameters aren't decayed.
        name: timm's name of the optimizer.
        lr: peak learning rate.
        weight_decay: of the parameters that are decayed.

    Raises:
        RecipeError: unknown optimizer, or the library that it is in is missing.
    """

    def __init__(self, model: nn.Module, *, name: str, lr: float, weight_decay: float) -> None:
        from timm.optim import get_optimizer_info, list_optimizers, param_groups_weight_decay

        known = list_optimizers()
        if name.lower() not in known:
            raise RecipeError(
                f"training.optimizer: timm has no {name!r}; take adamw, sgd, lamb or another of "
                f"timm.optim.list_optimizers().{did_you_mean(name, known)}"
            )
        self._eight_bit = _of_bitsandbytes(get_optimizer_info(name.lower()))
        self.name = name
        self.lr = lr
        self.weight_decay = weight_decay
        listed: set[str] = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=listed)
        self._undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}

    def scaled(self, lr: float, weight_decay: float) -> OptimizerFactory:
        """The same factory for one local module, with factors on its learning rate and weight decay."""
        other = copy.copy(self)
        other.lr, other.weight_decay = self.lr * lr, self.weight_decay * weight_decay
        return other

    @property
    def cache_key(self) -> str:
        """A text that is the same for factories whose optimizers need the same memory."""
        return self.name.lower()

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Make the optimizer of one local module.

        Raises:
            RecipeError: timm can't make it on this machine.
        """
        from timm.optim import create_optimizer_v2

        undecayed = [p for p in parameters if p.ndim <= 1 or id(p) in self._undecayed]
        known = set(map(id, undecayed))
        decayed = [p for p in parameters if id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": undecayed, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": self.weight_decay},
        ]
        groups = [group for group in groups if group["params"]]
        if self._eight_bit is not None:
            kind, options = self._eight_bit
            return kind(groups, lr=self.lr, weight_decay=self.weight_decay, **options)
        try:
            optimizer: Optimizer = create_optimizer_v2(
                groups,
                opt=self.name,
                lr=self.lr,
                weight_decay=self.weight_decay,
            )
        except (AssertionError, ImportError, TypeError, ValueError) as error:  # a library or a device that is missing
            raise RecipeError(
                f"training.optimizer: timm can't make {self.name!r} here ({error}); take adamw, sgd or lamb."
            ) from error
        return optimizer


def _of_bitsandbytes(info: Any) -> tuple[Callable[..., Optimizer], dict[str, Any]] | None:
    """The class and options of an optimizer that timm knows from bitsandbytes; ``None`` for any other one.

    timm would make it as well, but only where there is a GPU; bitsandbytes itself needs none.

    Args:
        info: timm's ``OptimInfo``.

    Raises:
        RecipeError: bitsandbytes is missing.
    """
    where = info.opt_class
    if not (isinstance(where, str) and where.startswith("bitsandbytes.")):
        return None
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # without a GPU it asks for a library that only its matrix products would use
    try:
        module = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise RecipeError(
            f"training.optimizer: {info.name!r} needs bitsandbytes ({error}); pip install 'localgrad[8bit]'."
        ) from error
    finally:
        log.setLevel(level)
    options = ({"momentum": 0.9} if info.has_momentum else {}) | (info.defaults or {})
    return getattr(module, where.rpartition(".")[2]), options


class Schedule:
    """Learning rates of all local modules over the run.

    Args:
        optimizers: one a local module.
        name: timm's name of the scheduler; ``none`` keeps the learning rate after the warm-up.
        epochs: length of the run.
        batches_per_epoch: updates an epoch.
        warmup_epochs: linear warm-up, at most a fifth of the run.
        warmup_lr: learning rate at its start.
        min_lr: learning rate at the end of the run.
        warmup_stagger: epochs by which each local module's warm-up is longer than that of the module before.
        first: which local module the first optimizer is of.

    Raises:
        RecipeError: unknown scheduler.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        *,
        name: str,
        epochs: int,
        batches_per_epoch: int,
        warmup_epochs: float,
        warmup_lr: float,
        min_lr: float,
        warmup_stagger: float = 0.0,
        first: int = 0,
    ) -> None:
        from timm.scheduler import create_scheduler_v2

        if name not in SCHEDULERS:
            raise RecipeError(
                f"training.scheduler: unknown {name!r}; take one of {', '.join(SCHEDULERS)}."
                f"{did_you_mean(name, SCHEDULERS)}"
            )
        self.optimizers = tuple(optimizers)
        longest = min(warmup_epochs, WARMUP_SHARE * epochs) + (first + len(self.optimizers) - 1) * warmup_stagger
        if warmup_stagger and longest >= epochs:
            raise RecipeError(
                f"training.warmup_stagger: {warmup_stagger} makes the last module's warm-up {longest:g} of {epochs} "
                "epochs; take less."
            )
        self._schedulers = [
            create_scheduler_v2(
                optimizer,
                sched="step" if name == "none" else name,
                num_epochs=epochs,
                decay_epochs=10 * epochs if name == "none" else max(1, epochs // 3),
                decay_milestones=[epochs // 2, epochs * 3 // 4],
                warmup_epochs=min(warmup_epochs, WARMUP_SHARE * epochs) + index * warmup_stagger,
                warmup_lr=warmup_lr,
                min_lr=min_lr,
                decay_rate=1.0 if name == "poly" else 0.1,  # timm takes it for poly's power
                step_on_epochs=False,
                updates_per_epoch=batches_per_epoch,
            )[0]
            for index, optimizer in enumerate(optimizers, first)
        ]
        self.at(0)

    def at(self, num_batches: int) -> None:
        """Set every learning rate to its value after ``num_batches`` batches of the run."""
        for scheduler in self._schedulers:
            scheduler.step_update(num_batches)

    @property
    def learning_rate(self) -> float:
        """The current learning rate of the first local module."""
        return float(self.optimizers[0].param_groups[0]["lr"])
