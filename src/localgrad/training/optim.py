"""Optimizers and schedulers of timm, one of each for every local module.

Weight decay is left off biases, norms and whatever the model itself names (position embeddings, tokens), as timm
does for a whole model; timm decides on the plain model, and the decision is carried over parameter by parameter.
Auxiliary nets say so themselves (``auxiliary.exempt_from_decay``). Schedulers count batches, never optimizer steps or
calls, so that all modules stand at the same place in time.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from localgrad.backbones.timm_models import undecayed
from localgrad.errors import RecipeError, arg, did_you_mean
from localgrad.objectives.auxiliary import is_exempt_from_decay

SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "none")
FALLING = ("cosine", "tanh", "poly")
"""Those that end at ``min_lr``."""
WARMUP_SHARE = 0.2
"""Warm-up takes at most this share of all epochs, so that a short run still reaches its learning rate."""


@final
class OptimizerFactory:
    """Makes one module's optimizer from its parameters.

    Args:
        model: the plain timm model, asked once which parameters aren't decayed.
        name: timm's name of the optimizer.
        lr: peak learning rate.
        weight_decay: of the parameters that are decayed.
        layer_decay: factor on the learning rate from each of the model's layers to the one before, by timm's order of
            them; of auxiliary nets it is 1.

    Raises:
        RecipeError: unknown optimizer, one that needs more than gradients, or the library that it is in is missing; or
            a learning rate or weight decay that can't be one.
    """

    def __init__(
        self, model: nn.Module, *, name: str, lr: float, weight_decay: float, layer_decay: float | None = None
    ) -> None:
        info = optimizer_info(name)
        check_rate(arg("lr"), lr)
        _check_decay(arg("weight_decay"), weight_decay, lr)
        self._eight_bit = _of_bitsandbytes(info)
        self.name = name
        self.lr = lr
        self.weight_decay = weight_decay
        self._undecayed = undecayed(model, weight_decay)
        self._scales = {} if layer_decay in (None, 1.0) else _scales_by_layer(model, layer_decay)
        least = min(self._scales.values(), default=1.0)
        check_rate(f"{arg('layer_decay')}: with a factor of {least:g} the learning rate", least * lr)

    def scaled(self, lr: float, weight_decay: float) -> OptimizerFactory:
        """The same factory for one local module, with factors on its learning rate and weight decay."""
        other = copy.copy(self)
        other.lr, other.weight_decay = self.lr * lr, self.weight_decay * weight_decay
        check_rate(f"{arg('lr_depth')}: with a factor of {lr:g} the learning rate", other.lr)
        _check_decay(f"{arg('weight_decay_depth')}: with a factor of {weight_decay:g}", other.weight_decay, other.lr)
        return other

    @property
    def cache_key(self) -> str:
        """A text that is the same for factories whose optimizers need the same memory."""
        return self.name.lower() + " by layers" * bool(self._scales)

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Make the optimizer of one local module.

        Raises:
            RecipeError: timm can't make it on this machine.
        """
        from timm.optim import create_optimizer_v2

        groups = self._groups(parameters)
        if self._eight_bit is not None:
            kind, options = self._eight_bit
            return kind(groups, lr=self.lr, weight_decay=self.weight_decay, **options)
        try:
            optimizer: Optimizer = create_optimizer_v2(
                groups, opt=self.name, lr=self.lr, weight_decay=self.weight_decay
            )
        except (AssertionError, ImportError, TypeError, ValueError) as error:  # a library or a device that is missing
            raise RecipeError(
                f"{arg('optimizer')}: timm can't make {self.name!r} here ({error}); take adamw, sgd or lamb."
            ) from error
        return optimizer

    def _groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Parameters by their decay and, with layer decay, by the factor on their rate: timm's schedulers heed it."""
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for weight in parameters:
            is_free = weight.ndim <= 1 or id(weight) in self._undecayed or is_exempt_from_decay(weight)
            groups.setdefault((self._scales.get(id(weight), 1.0), not is_free), []).append(weight)
        made = []
        for (scale, is_decayed), weights in sorted(groups.items(), key=lambda each: each[0]):
            group = {"params": weights, "weight_decay": self.weight_decay if is_decayed else 0.0}
            made.append(group | ({"lr_scale": scale} if self._scales else {}))
        return made


def _scales_by_layer(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """By id of a model's parameters, the factor on its learning rate, as timm has it."""
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(model, layer_decay=layer_decay)
    return {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}


def optimizer_info(name: str) -> Any:
    """Timm's ``OptimInfo`` of an optimizer that a local module's step can use.

    Raises:
        RecipeError: unknown to timm, or in need of more than gradients.
    """
    from timm.optim import get_optimizer_info, list_optimizers

    known = list_optimizers()
    if name.lower() not in known:
        raise RecipeError(
            f"{arg('optimizer')}: timm has no {name!r}; take adamw, sgd, lamb or another of "
            f"timm.optim.list_optimizers().{did_you_mean(name, known)}"
        )
    info = get_optimizer_info(name.lower())
    if info.second_order:
        raise RecipeError(
            f"{arg('optimizer')}: {name!r} needs second gradients, and a step takes first ones only; take adamw, sgd "
            "or lamb."
        )
    if getattr(info.opt_class, "__name__", "") == "Kron":
        raise RecipeError(
            f"{arg('optimizer')}: {name!r} compiles its updates, and what they need can't be estimated; take adamw, "
            "sgd or lamb."
        )
    return info


def _of_bitsandbytes(info: Any) -> tuple[Callable[..., Optimizer], dict[str, int]] | None:
    """The class and options of an optimizer that timm knows from bitsandbytes; ``None`` for any other one.

    timm would make it as well, but only where there is a GPU; bitsandbytes itself needs none.

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
            f"{arg('optimizer')}: {info.name!r} needs bitsandbytes ({error}); pip install 'localgrad[8bit]'."
        ) from error
    finally:
        log.setLevel(level)
    options = ({"momentum": 0.9} if info.has_momentum else {}) | (info.defaults or {})
    return getattr(module, where.rpartition(".")[2]), options


_LEAST, _LARGEST = torch.finfo(torch.float32).tiny, 1e30
"""Rates and decays; optimizers multiply them further, and above float32's largest number PyTorch ends."""


def check_rate(what: str, rate: float) -> None:
    """Refuse a learning rate that isn't above 0 and finite in float32, in which weights are updated.

    Raises:
        RecipeError: naming ``what`` it is.
    """
    if not _LEAST <= rate <= _LARGEST:
        raise RecipeError(
            f"{what}: {rate} is no learning rate; take a number above 0, such as 0.001, and at most {_LARGEST:g}."
        )


def _check_decay(what: str, decay: float, lr: float) -> None:
    """Refuse a weight decay that isn't from 0 on, or whose share of an update isn't finite in float32."""
    if not (0 <= decay <= _LARGEST and decay * lr <= _LARGEST):
        raise RecipeError(
            f"{what}: {decay} is no decay at a learning rate of {lr:g}; take a number from 0 on, such as 0.05, and at "
            f"most {_LARGEST:g}, also times that rate."
        )


def check_schedule(
    lr: float, *, name: str, epochs: int, warmup_epochs: float, warmup_lr: float, min_lr: float, who: str = ""
) -> None:
    """Refuse learning rates and a warm-up that make no schedule; see ``Schedule``.

    Raises:
        RecipeError: an unknown scheduler, a number that is none, or one on the wrong side of the learning rate.
    """
    if name not in SCHEDULERS:
        raise RecipeError(
            f"{arg('scheduler')}: unknown {name!r}; take one of {', '.join(SCHEDULERS)}."
            f"{did_you_mean(name, SCHEDULERS)}"
        )
    if epochs < 1:
        raise RecipeError(f"{arg('epochs')}: {epochs} is below 1; take 1 or more.")
    if not 0 <= warmup_epochs < math.inf:
        raise RecipeError(
            f"{arg('warmup_epochs')}: {warmup_epochs} is no number of epochs; take one from 0 on, such as 5."
        )
    given = [("warmup_lr", warmup_lr, warmup_epochs > 0), ("min_lr", min_lr, name in FALLING)]
    for key, rate, is_used in given:
        if not 0 <= rate <= _LARGEST:
            raise RecipeError(
                f"{arg(key)}: {rate} is no learning rate; take a number from 0 on, such as 1e-6, and at most "
                f"{_LARGEST:g}."
            )
        if is_used and rate > lr:
            change = "fall in the warm-up" if key == "warmup_lr" else "rise to the end"
            raise RecipeError(
                f"{arg(key)}: {rate:g} is above the learning rate{who} ({lr:g}), which would {change}; take less, "
                f"or a larger {arg('lr')}."
            )


def warmup_of(warmup_epochs: float, epochs: int, batches_per_epoch: int) -> float:
    """Epochs that a warm-up takes: at most a fifth of the run, and none where that is less than an update."""
    taken = min(warmup_epochs, WARMUP_SHARE * epochs)
    return taken if taken * batches_per_epoch >= 1 else 0.0


def note_of_warmup(warmup_epochs: float, epochs: int, batches_per_epoch: int) -> str | None:
    """A line that says how long the warm-up is, where it is shorter than asked for."""
    taken = warmup_of(warmup_epochs, epochs, batches_per_epoch)
    if taken == warmup_epochs:
        return None
    told = (
        f"{taken:g} of {epochs} epochs, a fifth of the run," if taken else "none, as a fifth of the run is no update,"
    )
    return f"warm-up: {told} instead of {warmup_epochs:g} epochs (training.warmup_epochs)"


@final
class Schedule:
    """Learning rates of all local modules over the run.

    Args:
        optimizers: one a local module.
        name: timm's name of the scheduler. ``none`` keeps the learning rate after the warm-up, ``step`` divides it by
            ten after a third and after two thirds of the run, ``multistep`` after half and after three quarters of it;
            there, in runs of three epochs and more, that is after whole epochs.
        epochs: length of the run.
        batches_per_epoch: updates an epoch.
        warmup_epochs: linear warm-up, at most a fifth of the run (see ``warmup_of``).
        warmup_lr: learning rate at its start.
        min_lr: learning rate at the end of the run; ``step``, ``multistep`` and ``none`` don't look at it.
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

        self.optimizers = tuple(optimizers)
        for index, optimizer in enumerate(self.optimizers, first):
            who = f" of local module {index}" if first + len(self.optimizers) > 1 else ""
            rates = {"warmup_epochs": warmup_epochs, "warmup_lr": warmup_lr, "min_lr": min_lr}
            lr = min(group["lr"] for group in optimizer.param_groups)
            check_rate(f"learning rate{who}", lr)
            check_schedule(lr, name=name, epochs=epochs, who=who, **rates)
        if batches_per_epoch < 1:
            raise RecipeError(f"batches_per_epoch must be at least 1, got {batches_per_epoch}.")
        warmup = warmup_of(warmup_epochs, epochs, batches_per_epoch)
        if not 0 <= warmup_stagger < math.inf:
            raise RecipeError(f"{arg('warmup_stagger')}: {warmup_stagger} is no number of epochs; take one from 0 on.")
        longest = warmup + (first + len(self.optimizers) - 1) * warmup_stagger
        if warmup_stagger and longest >= epochs:
            raise RecipeError(
                f"{arg('warmup_stagger')}: {warmup_stagger} makes the last module's warm-up {longest:g} of {epochs} "
                "epochs; take less."
            )
        self._schedulers = [
            create_scheduler_v2(
                optimizer,
                sched="step" if name == "none" else name,
                num_epochs=epochs,
                decay_epochs=10 * epochs if name == "none" else epochs / 3,
                decay_milestones=_milestones(epochs, batches_per_epoch),
                warmup_epochs=warmup + index * warmup_stagger,
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
        """The current learning rate of the first local module, without the factors of layer decay."""
        group = self.optimizers[0].param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))


def _milestones(epochs: int, batches_per_epoch: int) -> list[float]:
    """The epochs after which ``multistep`` decays: half and three quarters of them, never in the first update."""
    half, three_quarters = (epochs // 2, epochs * 3 // 4) if epochs > 2 else (epochs / 2, epochs * 3 / 4)
    # timm decays one update before a milestone.
    return [max(half, 2 / batches_per_epoch), max(three_quarters, 3 / batches_per_epoch)]
