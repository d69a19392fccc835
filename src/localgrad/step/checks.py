"""What is refused before a step: a model changed behind the learner's back, optimizers of something else, bad batches.

Nothing here waits for a device, but for ``check_values``, which a learner asks once.

Shapes: B batch, C channels, H W image.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.backbones.adapters import MERGED, adapters_in, are_merged
from localgrad.backbones.base import Backbone
from localgrad.backbones.example import Example
from localgrad.backbones.fake import FakeTensor
from localgrad.backbones.namespaces import Attributes
from localgrad.errors import BackboneError, DataError, ParallelError, RecipeError, arg
from localgrad.objectives.carried import LocalBatch
from localgrad.objectives.losses import CROSS_ENTROPY, IGNORED, Loss, OwnFunction

FACTORY = "configure_optimizers(lambda params: torch.optim.AdamW(params, lr=1e-3))"
"""A factory as it should be."""
SOFT_SUM_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far the sum of a row of soft labels may be from 1, by dtype; 1e-3 otherwise."""


@final
class Remembered:
    """The modules and parameters that something was made of, by identity.

    Args:
        roots: modules by the name that messages begin with; ``""`` for none.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        found: dict[int, tuple[str, nn.Module]] = {}
        for prefix, root in roots.items():
            for name, module in root.named_modules(prefix=prefix):
                found.setdefault(id(module), (name, module))
        self.modules = [module for _, module in found.values()]
        self._adapters = adapters_in(self.modules)
        # Tables are compared and not their owners' attributes: of a dozen blocks in a twentieth of a millisecond.
        tables = [
            (name, kind, table)
            for name, module in found.values()
            for kind, table in (("module", module._modules), ("parameter", module._parameters))
        ]
        self._names = [(name, kind) for name, kind, _ in tables]
        self._tables: list[Attributes] = [table for _, _, table in tables]
        self._kept = [dict(table) for table in self._tables]
        self._filled = [table for table in self._tables if table]
        self._values = list(self._listed())
        self._parameters = list({id(value): value for value in self._values if isinstance(value, Tensor)}.values())
        self._dtypes = [parameter.dtype for parameter in self._parameters]

    def _listed(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._filled))

    def check(self, *, trains: bool = True) -> None:
        """Refuse what isn't any more what it was.

        Args:
            trains: whether it is to be trained; merged adapters are as good as others elsewhere.

        Raises:
            BackboneError: a module or parameter was replaced, added or taken out, or has another dtype; or adapters
                are merged.
        """
        if trains and are_merged(self._adapters):
            raise BackboneError(f"model: {MERGED}.")
        same = sum(map(len, self._tables)) == len(self._values) and all(map(is_, self._listed(), self._values))
        if not same:
            raise BackboneError(
                f"model: {self._difference()} after the learner was made, and would not be trained; change the model "
                "first (heads, adapters, dtype), then make the learner again: LocalLearner(model, ...)."
            )
        if [parameter.dtype for parameter in self._parameters] != self._dtypes:
            before, now = next(
                (dtype, parameter.dtype)
                for parameter, dtype in zip(self._parameters, self._dtypes, strict=True)
                if parameter.dtype != dtype
            )
            raise BackboneError(
                f"model: its weights were {before} when the learner was made and are {now} now; make the learner again "
                "after model.to(dtype), or train in another precision: LocalLearner(model, precision='bf16')."
            )

    def _difference(self) -> str:
        for (owner, kind), table, kept in zip(self._names, self._tables, self._kept, strict=True):
            for name in [*kept, *(name for name in table if name not in kept)]:
                if table.get(name) is not kept.get(name) or (name in table) != (name in kept):
                    what = "taken out" if name not in table else "replaced" if name in kept else "added"
                    return f"the {kind} {'.'.join(filter(None, (owner, name)))} was {what}"
        return "the order of its modules was changed"


def check_model(backbone: Backbone, loss: Loss) -> None:
    """Refuse a backbone that isn't its model any more, or a model that has nothing to learn.

    Raises:
        BackboneError: parameters were replaced since it was split, or there is one class only.
    """
    held = set(map(id, backbone.parameters()))
    for name, weight in backbone.model.named_parameters():
        if id(weight) not in held:
            raise BackboneError(
                f"model: {name} was replaced or added after it was split, and would not be trained; split it again: "
                "localgrad.split(model, input_size)."
            )
    if backbone.num_classes < 2 and loss.needs_classes:
        raise BackboneError(
            "model: it has num_classes=1, and the cross-entropy of one class is always 0; make it with num_classes=2 "
            "(one logit for 'no', one for 'yes'), or say loss='binary' or loss='regression'."
        )


def check_optimizer(
    optimizer: object, parameters: Sequence[nn.Parameter], index: int, names: Callable[[], Mapping[int, str]]
) -> None:
    """Refuse what a factory gave, if it isn't an optimizer of just the parameters that it was given.

    Args:
        optimizer: what it gave.
        parameters: what it was given.
        index: of the local module.
        names: asked for the names of parameters, by ``id``.

    Raises:
        RecipeError: it isn't one; it holds others, lacks some, or has one twice; its learning rate or weight decay
            isn't finite; or its step needs more than gradients.
    """
    where = f"local module {index}: the optimizer factory"
    if not isinstance(optimizer, Optimizer):
        is_class = isinstance(optimizer, type)
        got = f"the class {optimizer.__name__}" if is_class else f"{type(optimizer).__name__}"  # type: ignore[attr-defined]
        raise RecipeError(f"{where} returned {got}, not an optimizer; write {FACTORY}.")
    held = {id(weight): weight for group in optimizer.param_groups for weight in group["params"]}
    given = {id(weight): weight for weight in parameters}

    def named(weights: Sequence[int]) -> str:
        return f"{len(weights)} parameters, such as {names().get(weights[0], 'one of no local module')}"

    foreign = [key for key in held if key not in given]
    if foreign:
        raise RecipeError(
            f"{where} returned a {type(optimizer).__name__} over what it wasn't given ({named(foreign)}); make one for "
            f"each call, of its argument alone and not of model.parameters(): {FACTORY}, or timm's "
            "create_optimizer_v2(params, ...)."
        )
    missing = [key for key in given if key not in held]
    if missing:
        raise RecipeError(
            f"{where} returned a {type(optimizer).__name__} that leaves out {named(missing)}; give it all parameters, "
            "or freeze those first with requires_grad_(False)."
        )
    if sum(len(group["params"]) for group in optimizer.param_groups) > len(held):
        raise RecipeError(
            f"{where} returned a {type(optimizer).__name__} that holds a parameter twice, and would update it twice; "
            f"write {FACTORY}."
        )
    for group in optimizer.param_groups:
        for name in ("lr", "weight_decay"):
            value = group.get(name)
            if isinstance(value, float) and not math.isfinite(value):  # not all optimizers of torch refuse it
                raise RecipeError(
                    f"{where} returned a {type(optimizer).__name__} with {name}={value}, and weights would be NaN; "
                    "give it a finite number, such as 1e-3."
                )
    _check_needs(optimizer, where)


def _check_needs(optimizer: Optimizer, where: str) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    needs = None
    if closure is not None and closure.default is inspect.Parameter.empty:
        needs = "a closure that computes the loss again"
    elif getattr(optimizer, "is_second_order", False):
        needs = "second gradients (create_graph=True)"
    elif hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        needs = "two backward passes a step"
    elif isinstance(optimizer, torch.optim.SparseAdam):
        needs = "sparse gradients"
    elif optimizer.defaults.get("differentiable"):
        needs = "a graph of its own (differentiable=True)"
    if needs is not None:
        raise RecipeError(
            f"{where} returned a {type(optimizer).__name__}, whose step needs {needs}; a local module's step gives it "
            "gradients alone: take AdamW, SGD, Lion or LAMB."
        )


def check_schedulers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse learning rates that a scheduler changes for some local modules alone.

    Schedulers of torch and timm note the learning rate that they start from in the optimizer.

    Raises:
        RecipeError: some have a scheduler, others none.
    """
    scheduled = [any("initial_lr" in group for group in optimizer.param_groups[:1]) for optimizer in optimizers]
    if any(scheduled) and not all(scheduled):
        without = scheduled.index(False)
        raise RecipeError(
            f"a learning rate scheduler is attached to {sum(scheduled)} of {len(scheduled)} optimizers, and none to "
            f"that of local module {without}; make one for all, CosineAnnealingLR(learner.optimizer, T_max=100), or "
            "one for each of learner.optimizers (ConstantLR(optimizer, factor=1.0) keeps a learning rate)."
        )


@final
class ReplacedOptimizers:
    """Optimizers that others took the place of, while somebody holds them: schedulers that were made of them.

    A scheduler that goes on with one changes a learning rate that nothing is trained by.
    """

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Optimizer], list[object]]] = []

    def __deepcopy__(self, memo: object) -> ReplacedOptimizers:
        """Schedulers of a copy's optimizers are the copy's own matter."""
        return ReplacedOptimizers()

    def add(self, optimizers: Sequence[Optimizer]) -> None:
        """Note the learning rates of optimizers that train nothing any more."""
        self._known = [pair for pair in self._known if pair[0]() is not None]
        self._known += [(weakref.ref(optimizer), _rates(optimizer)) for optimizer in optimizers]

    def check(self) -> None:
        """Refuse to go on where one of them has been given another learning rate since.

        Raises:
            RecipeError: with what to do.
        """
        for optimizer, rates in ((known(), rates) for known, rates in self._known):
            if optimizer is not None and _rates(optimizer) != rates:
                raise RecipeError(
                    "a learning rate scheduler goes on with an optimizer that configure_optimizers replaced, and "
                    "changes nothing that is trained; drop it, and make one of what trains now: "
                    "CosineAnnealingLR(learner.optimizer, T_max=100)."
                )


def _rates(optimizer: Optimizer) -> list[object]:
    """Learning rates by group; of those in tensors how often they were written, which waits for no device."""
    rates = (group.get("lr") for group in optimizer.param_groups)
    return [(id(rate), rate._version) if isinstance(rate, Tensor) else rate for rate in rates]


def check_alone(weight: Tensor) -> None:
    """Refuse to train beside other processes that may count on averaged gradients; what only estimates passes.

    Frameworks' wrappers (DDP) average in the backward pass of the whole model, which never runs here.

    Args:
        weight: any of the model's.

    Raises:
        ParallelError: this is one of several processes of torch.distributed.
    """
    if not dist.is_available() or not dist.is_initialized() or isinstance(weight, FakeTensor):
        return
    size = dist.get_world_size()
    if size > 1:
        raise ParallelError(
            f"step: there are {size} processes, and LocalLearner averages no gradients with the others; take "
            f"localgrad.ParallelLearner(model, team=localgrad.Team.join(num_replicas={size})), which does, or say "
            f"{arg('alone', value=True)}."
        )


# ------------------------------------------------------------------------------------------------------- batches


def check_tensors(batch: LocalBatch) -> None:
    """Refuse arrays and lists, and tensors that aren't dense, which would fail somewhere inside.

    Raises:
        DataError: naming what to pass.
    """
    for name, value in (("images", batch.images), ("labels", batch.labels)):
        if name == "labels" and value is None:
            raise DataError("labels: got None; pass class indices int64 [B], -100 for images that have none.")
        if not isinstance(value, Tensor):
            if value is not None:
                raise DataError(f"{name}: got {type(value).__name__}; pass a tensor: torch.as_tensor({name}).")
        elif value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout)
            raise DataError(f"{name}: got a tensor that is {kind}; pass a dense one: torch.stack(...) or .to_dense().")


def check_inputs(batch: LocalBatch, example: Example) -> None:
    """Refuse inputs that are others than a model was split by: keywords, number of sides, kind of numbers.

    Raises:
        BackboneError: naming what differs.
    """
    given = batch.given
    if given is None:
        if not example.is_single:
            raise BackboneError(
                f"inputs: got a single tensor, but the model was split by {example.described()}; give the same "
                "keywords."
            )
        given = Example.of(batch.images)
    told = {path: leaf for path, leaf in given.leaves() if isinstance(leaf, Tensor)}
    known = {path: leaf for path, leaf in example.leaves() if isinstance(leaf, Tensor)}
    for path in [*known, *told]:
        name = str(path[-1])
        if path not in told:
            raise BackboneError(f"inputs: there is no {name}, with which the model was split; give it in every batch.")
        if path not in known:
            raise BackboneError(
                f"inputs: there is a {name}, with which the model wasn't split; leave it out, or put it in the example."
            )
        mine, theirs = told[path], known[path]
        if mine.ndim != theirs.ndim or mine.is_floating_point() != theirs.is_floating_point():
            raise BackboneError(
                f"inputs: {name} is {mine.dtype} {list(mine.shape)}, in the example {theirs.dtype} "
                f"{list(theirs.shape)}; give what the model was split by."
            )


def check_images(
    images: Tensor, dtypes: Sequence[torch.dtype], device: torch.device, *, autocasts: bool, is_image: bool = True
) -> None:
    """Refuse images [B, C, H, W] that the model can't take, their size apart. Nothing is read from the device.

    ``dtypes`` are those of the weights that images enter (none for any); autocast converts other floating ones.

    Raises:
        BackboneError: another dtype or device; a graph that ends in them.
        DataError: there are none.
    """
    if not len(images):
        raise DataError("images: got an empty batch, and there is nothing to train on; leave empty batches out.")
    if not images.is_floating_point() and is_image:
        raise BackboneError(
            f"images: got {images.dtype}; pass floats, normalised as for the model: (images / 255 - mean) / std."
        )
    dtypes = dtypes if images.is_floating_point() else ()
    casts = autocasts and images.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if dtypes and images.dtype not in dtypes and not casts:
        raise BackboneError(f"images: got {images.dtype}, the model is {dtypes[0]}; pass images.to({dtypes[0]}).")
    if not same_device(images.device, device):
        raise BackboneError(f"images: they are on {images.device}, the model trains on {device}; pass images.to(...).")
    if images.requires_grad:
        raise BackboneError(
            "images: they require a gradient, and local modules give none back; pass images.detach(), and train what "
            "makes them as a part of the model."
        )


def same_device(first: torch.device, second: torch.device) -> bool:
    """Whether two devices are one; a GPU without a number is any."""
    return first.type == second.type and (None in (first.index, second.index) or first.index == second.index)


def check_labels(labels: Tensor, inputs: Tensor, num_classes: int, loss: Loss = CROSS_ENTROPY) -> None:
    """Refuse labels that don't go with inputs, classes or the loss. No value is read.

    Raises:
        DataError: naming what to pass.
    """
    loss.check(labels, inputs, num_classes)
    if len(labels) != len(inputs):
        raise DataError(f"labels: got {len(labels)} for {len(inputs)} images; give one for each.")
    if not same_device(labels.device, inputs.device):
        raise DataError(f"labels: they are on {labels.device}, the images on {inputs.device}; pass labels.to(...).")
    if labels.requires_grad:
        raise DataError("labels: they require a gradient, and a step gives none back; pass labels.detach().")


def check_values(batch: LocalBatch, num_classes: int, loss: Loss = CROSS_ENTROPY, *, is_part: bool = False) -> None:
    """Refuse images that aren't finite, and labels that mean no class. Waits for the device: for a first step.

    Args:
        batch: as for a step; fakes of tensors have no values and pass, once the same operators ran.
        num_classes: of the model.
        loss: of the task.
        is_part: whether there are more labels than these: then none of them need count.

    Raises:
        DataError: naming the first image at fault.
    """
    images, labels = batch.images, batch.labels
    if labels.is_meta:
        return
    if images is not None and images.is_floating_point():
        _refuse(
            ~torch.isfinite(images).flatten(1).all(dim=1),
            images,
            "images: number {row} has values that are NaN or infinite",
        )
    loss.check_values(labels)
    if (
        isinstance(loss, OwnFunction)
        or not (loss.is_of_classes or loss.names_tokens)
        or (loss.names_tokens and labels.is_floating_point())
    ):
        return
    if labels.is_floating_point():
        sums = labels.float().sum(dim=1)
        wrong = ((sums - 1).abs() > SOFT_SUM_TOLERANCE.get(labels.dtype, 1e-3)) | ~torch.isfinite(sums)
        _refuse(
            (labels < 0).any(dim=1) | wrong,
            labels,
            "labels: row {row} is {value}; soft labels are probabilities, from 0 to 1 with sum 1 (several classes at "
            "once don't go with cross-entropy: divide each row by its sum)",
        )
        return
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= num_classes)
    what = "token" if loss.names_tokens else "image"
    _refuse(
        wrong.flatten(),
        labels.flatten(),
        f"labels: that of {what} {{row}} is {{value}}; they go from 0 to {num_classes - 1}, {IGNORED} is ignored",
    )
    counted = loss.counted(labels)
    if counted is not None and not is_part and not isinstance(labels, FakeTensor) and bool(counted == 0):
        raise DataError(f"labels: all are {IGNORED}, ignored, and there is nothing to learn; leave this batch out.")


def _refuse(wrong: Tensor, values: Tensor, text: str) -> None:
    if isinstance(wrong, FakeTensor):
        return
    rows = wrong.nonzero().flatten().tolist()
    if rows:
        row = rows[0]
        value = values[row].tolist() if values.ndim < 3 else None
        shown = f"[{', '.join(f'{each:g}' for each in value[:6])}]" if isinstance(value, list) else str(value)
        raise DataError(text.format(row=row, value=shown) + ".")
