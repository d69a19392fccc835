"""``localgrad.plan`` and ``localgrad.estimate``: planning and estimating for people who write their own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from localgrad import rules
from localgrad.app.build import check_model_name
from localgrad.app.planned import kind_of, made_for_task
from localgrad.backbones.base import BACKBONES, Backbone, outline
from localgrad.backbones.example import Example
from localgrad.backbones.fake import without_initialization
from localgrad.errors import BackboneError, RecipeError, arg
from localgrad.estimating import estimate_step
from localgrad.learner import LocalLearner, OptimizerFactory
from localgrad.memory.cards import card_named
from localgrad.memory.track import MemoryProfile, simulate
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.losses import Loss, loss_of
from localgrad.objectives.methods import FeatureReconstruction, Objective
from localgrad.partition import Plan, Request
from localgrad.planning.budget import Task, check_gradients, plan_to_budget
from localgrad.planning.rank_plans import Parallel, plan_parallel
from localgrad.step.checks import check_inputs
from localgrad.step.local_step import PRECISIONS, check_precision
from localgrad.units import parse_bytes


@final
class _AdamW:
    """The optimizer that is planned for by default."""

    cache_key = "torch.optim.AdamW"

    def __call__(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters)


adamw = _AdamW()


def plan(
    model: nn.Module | str,
    *,
    batch_size: int,
    budget: int | str | None = None,
    modules: Request | None = None,
    gradients: str = "any",
    objective: Objective | None = None,
    optimizer: OptimizerFactory = adamw,
    precision: str = "fp32",
    input_size: tuple[int, int, int] | None = None,
    example: Any = None,
    blocks: str | None = None,
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] | None = None,
    shared: str = "refuse",
    chunk_logits: bool = False,
    device: str | None = None,
    compile: bool = False,
    ema_decay: float | None = None,
    clip_grad: float | None = None,
    overlap: int = 0,
    global_share: float = 0.0,
    freeze_from: float | None = None,
    parallel: int | None = None,
    balance: str = "time",
    measure: bool = False,
    cache: bool = True,
    card: str = "auto",
    confirm: bool = True,
) -> Plan:
    """Find the fastest way to train a model locally within a memory budget; nothing is run, no memory is used.

    Args:
        model: a timm model, or its name in timm; any other that ``localgrad.split`` takes with an ``example``, weights
            on the meta device included; or a backbone.
        batch_size: items an update.
        budget: such as ``"6GiB"``, or bytes; by default no limit.
        modules: only so many modules, ``"stages"``, boundaries, or ``"any"`` number; by default at most 4.
        gradients: ``"exact"`` for end-to-end training alone, ``"local"`` for local modules alone; ``"any"`` by default,
            and a plan of local modules tells which exact one fits, too.
        objective: as for ``LocalLearner``.
        optimizer: as for ``LocalLearner.configure_optimizers``; AdamW by default.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        input_size: (C, H, W); by default the model's own.
        example: a batch as the model is called with, as for ``localgrad.split``: of its tensors only shapes and types
            are read, so it says the length of sequences, too.
        blocks: as for ``localgrad.split``.
        loss: as for ``LocalLearner``.
        shared: as for ``LocalLearner``.
        chunk_logits: as for ``LocalLearner``.
        device: ``"cpu"`` or ``"cuda"``, which need not be there; by default where the model is.
        compile: as for ``LocalLearner``.
        ema_decay: as for ``LocalLearner``.
        clip_grad: as for ``LocalLearner``.
        overlap: as for ``LocalLearner``.
        global_share: share of the steps that are end-to-end (``LocalLearner.global_step``); how they recompute is
            the plan's ``global_checkpoint``.
        freeze_from: as for ``LocalLearner``.
        parallel: so many ranks, a local module each; the budget is then of every rank.
        balance: with ``parallel``: ``time`` for the fastest slowest rank, ``memory`` for the smallest largest one.
        measure: run the model's parts here and time them by the clock, in a minute; nominal rates by default.
        cache: take costs that were measured before, and keep those that are measured.
        card: with CUDA, the name of the card that is planned for, such as ``"RTX 4090"``; ``"auto"`` is the one here,
            or one that is assumed. The budget is of the card: its context and more is part of it.
        confirm: with CUDA, whether the plan is confirmed by replaying the allocations of its run.

    Returns:
        A plan with its forecast; train with ``LocalLearner(model, modules=plan)``. What it was made for is in it, and a
        learner that is used for something else says so.

    Raises:
        BudgetError: no plan fits; the message says the least that does, and what to change.
        RecipeError: an option that is none, or that doesn't go with another.
        BackboneError: the model can't be split.
        PartitionError: modules or ranks that the model doesn't have.

    Example:
        >>> p = plan("vit_tiny_patch16_224", batch_size=64, budget="2GiB")  # doctest: +SKIP
        >>> p.boundaries, p.forecast.peak_bytes  # doctest: +SKIP
        >>> p = plan(llama, example=batch, batch_size=8, budget="20GiB")  # doctest: +SKIP
        >>> learner = LocalLearner(llama, modules=p, example=batch)  # doctest: +SKIP
    """
    if precision not in PRECISIONS:
        raise RecipeError(f"{arg('precision')}: unknown {precision!r}; take one of {', '.join(PRECISIONS)}.")
    rules.check({"gradients": check_gradients(gradients), "parallel": parallel, "budget": budget})
    if not 0 <= global_share <= 1:
        raise RecipeError(f"{arg('global_share')} must be a share of the steps, from 0 to 1, got {global_share}.")
    backbone = _outlined(model, input_size, example, blocks)
    task = Task(
        backbone=backbone,
        objective=objective or FeatureReconstruction(),
        optimizer=optimizer,
        precision=precision,
        device=_kind(model) if device is None and card == "auto" else kind_of(device or "auto", card),
        compiled=compile,
        ema_decay=ema_decay,
        clip_grad=clip_grad,
        modules=modules,
        gradients=gradients,
        overlap=overlap,
        global_share=global_share,
        freeze_from=freeze_from,
        measure=measure,
        cache=cache,
        card=None if card == "auto" else card_named(card),
        replays=confirm,
        loss=loss_of(loss, backbone),
        shared=shared,
        chunk_logits=chunk_logits,
    )
    check_precision(precision, torch.device("cpu"), task.backbone.dtype)
    num_bytes = None if budget is None else parse_bytes(budget)
    if parallel is None:
        found = plan_to_budget(task, batch_size, num_bytes)
    else:
        found = plan_parallel(task, batch_size, Parallel(num_ranks=parallel, balance=balance), num_bytes)
    return replace(found, made_for=made_for_task(task, batch_size))


def _outlined(
    model: nn.Module | str, input_size: tuple[int, int, int] | None, example: Any, blocks: str | None
) -> Backbone:
    if isinstance(model, Backbone):
        if example is not None or blocks is not None:
            raise BackboneError("example, blocks: the backbone was split already; give them to localgrad.split.")
        return model
    if isinstance(model, str):
        import timm

        check_model_name(model)
        if model in BACKBONES:
            return BACKBONES[model]()
        with without_initialization():
            made: nn.Module = timm.create_model(model)
    else:
        made = model
    return outline(made, input_size, example=example, blocks=blocks)


def _kind(model: nn.Module | str) -> str:
    return "cpu" if isinstance(model, str) or not next(model.parameters()).is_cuda else "cuda"


def estimate(
    step_or_learner: LocalLearner | Callable[..., object],
    batch: int | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    optimizer: OptimizerFactory | None = None,
) -> MemoryProfile:
    """Predict the peak memory of one training step, without running it and without the memory.

    Args:
        step_or_learner: a ``LocalLearner``; or any training step that is a method of an object which holds model and
            optimizer (so that both can be copied), such as ``loop.step``.
        batch: for a learner the number of items, (images, labels), or a dict as it is trained on. For a step its
            arguments: a sequence, or by name; only shapes and dtypes are read, so tensors on the meta device will do.
        optimizer: for a learner, the factory; by default the one that it was configured with, else AdamW.

    Returns:
        Peak bytes, by category and by local module, and the timeline of bytes alive.

    Raises:
        RecipeError: a step that is a plain function: the tensors that it uses can't be found.

    Example:
        >>> estimate(learner, 64).peak_bytes  # doctest: +SKIP
        >>> estimate(learner.global_step, (images, labels)).peak_bytes  # doctest: +SKIP
        >>> estimate(loop.step, (images, labels)).by_category  # doctest: +SKIP
    """
    if isinstance(step_or_learner, LocalLearner):
        size = _num_images(step_or_learner, batch)
        return estimate_step(step_or_learner, size, optimizer or step_or_learner.optimizer_factory or adamw)
    if getattr(step_or_learner, "__self__", None) is None:
        raise RecipeError(
            "estimate: the step must be a method of an object that holds model and optimizer, such as loop.step; "
            f"the tensors of {step_or_learner!r} can't be found."
        )
    if isinstance(batch, (int, Tensor)):
        raise RecipeError("estimate: for a step, batch is the tensors it takes, such as (images, labels).")
    named: dict[str, Tensor] = dict(batch) if isinstance(batch, Mapping) else {str(n): t for n, t in enumerate(batch)}
    if not all(isinstance(tensor, Tensor) for tensor in named.values()):
        raise RecipeError("estimate: a step's arguments must be tensors; make others attributes of its object.")
    by_name = isinstance(batch, Mapping)

    def step(copied: Callable[..., object], **inputs: Tensor) -> object:
        return copied(**inputs) if by_name else copied(*inputs.values())

    sizes: Mapping[str, tuple[Sequence[int], torch.dtype]]
    sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in named.items()}
    on_cuda = any(tensor.is_cuda for tensor in named.values())
    return simulate(step_or_learner, step, inputs=sizes, device="cuda" if on_cuda else "cpu")


def _num_images(learner: LocalLearner, batch: object) -> int:
    """The number of images in a batch for a learner: a number, or (images, labels)."""
    if isinstance(batch, int):
        size = int(batch)
    elif isinstance(batch, Mapping) and learner.backbone.trunk is not None:
        size = _num_items(learner, batch)
    elif isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(tensor, Tensor) for tensor in batch):
        size, taken = len(batch[0]), learner.backbone.input_size
        if tuple(batch[0].shape[1:]) != taken:
            raise RecipeError(
                f"estimate: images are {list(batch[0].shape)}, but this learner was made for [B, "
                f"{', '.join(map(str, taken))}]; give images of that size."
            )
    else:
        raise RecipeError("estimate: for a learner, batch is a number of items, (images, labels), or a dict.")
    if size < 1:
        raise RecipeError(f"estimate: a batch needs at least one image, got {size}.")
    return size


def _num_items(learner: LocalLearner, batch: Mapping[str, Any]) -> int:
    """Of a batch as the example that a model was split by; of others figures would be wrong."""
    given, known = Example.of(batch, "batch"), learner.backbone.given
    check_inputs(LocalBatch(given.tensor, given.tensor, given=given), known)
    mine, theirs = given.tensor.shape[1:], known.tensor.shape[1:]
    if mine != theirs:
        raise RecipeError(
            f"estimate: items are {list(mine)}, but this learner was made by an example of {list(theirs)}; make one by "
            "an example of that length or size."
        )
    return given.num_items
