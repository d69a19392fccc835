"""Whether the loss that a model computes itself is the task loss of local modules, which train in its place.

On one batch two losses may agree that aren't the same: where logits are nearly alike, as before training, smoothed
labels and class weights change nothing. Their gradients differ even there. So both are compared, the values and the
gradients by what the model's last layer gives; nothing before that layer keeps a graph. Gradients are taken where it
gives numbers from -1 to 1: where a model is sure of its classes, and right, narrow types round them away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.backbones.example import LABEL_NAMES, logits_of
from localgrad.backbones.state import left_as_it_was
from localgrad.errors import RecipeError, reason_of
from localgrad.objectives.base import in_float32
from localgrad.objectives.losses import Loss

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Share by which the values may differ, by the dtype of what a model gives."""
OF_GRADIENTS = {torch.float32: 1e-3, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Share of the largest number in them by which the gradients may differ, likewise."""
MOST_TRIED = 4
"""Layers, from the last one on, that are tried: a loss may have some of its own."""
_ADVICE = "give loss=, a name or a function of logits and labels"


def own_loss(model: nn.Module, example: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a model itself gives for a batch with labels, in evaluation mode: its loss, its logits; and the labels.

    Classifiers of transformers say what their problem is (``config.problem_type``) after that.

    Raises:
        RecipeError: it gives no loss.
    """
    labels = None
    if isinstance(example, Mapping):
        labels = next((example[name] for name in LABEL_NAMES if name in example), None)
    if labels is None:
        raise RecipeError(
            "example: it has no labels, so that the model's own loss can't be seen; give a batch with 'labels' in it, "
            f"as the data loader gives them, or {_ADVICE}."
        )
    output = _evaluated(model, example)
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(loss, Tensor):
        raise RecipeError(f"loss: {type(model).__name__} gives none for a batch with labels; {_ADVICE}.")
    return loss, logits_of(model, output), labels


def check_loss(model: nn.Module, example: Any, loss: Loss, own: tuple[Tensor, Tensor, Tensor]) -> None:
    """Refuse to train on another loss than the model's own, unless it is asked for.

    Args:
        model: in whose place local modules train.
        example: a batch with labels.
        loss: of the modules.
        own: what the model itself gives for the batch, see ``own_loss``.

    Raises:
        RecipeError: they differ.
    """
    value, logits, labels = own
    ours = loss(in_float32(logits), labels)
    if bool(ours.isnan()) and bool(value.isnan()):
        raise RecipeError(
            "example: no label of it counts, so that the model's own loss can't be seen; give example=, a batch with "
            "labels that do, or loss=."
        )
    told = f"loss: {type(model).__name__}'s own of the example is {float(value):.8g}, and {type(loss).__name__} gives"
    advice = f"{_ADVICE}, that local modules are to train on"
    tolerance = max(TOLERANCE[each.dtype] for each in (value, logits))
    if not torch.allclose(ours.double(), value.double(), rtol=tolerance, atol=1e-2 * tolerance):
        raise RecipeError(f"{told} {float(ours):.8g}; {advice}.")
    gradients = _gradients(model, example, loss, labels)
    if gradients is None:
        return
    theirs, mine, dtypes = gradients
    apart, largest = float((theirs - mine).abs().max()), float(theirs.abs().max())
    if not apart <= max(OF_GRADIENTS[dtype] for dtype in dtypes) * largest:
        raise RecipeError(
            f"{told} the same here, but another gradient ({apart:.2g} apart, where the largest is {largest:.2g}); "
            f"{advice}."
        )


def _evaluated(model: nn.Module, example: Any) -> Any:
    """What a model gives in evaluation mode; it keeps a graph from where one is begun.

    Raises:
        RecipeError: it can't be called so.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            return model(**example)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise RecipeError(
            f"loss: {type(model).__name__} can't be called with the example and its labels ({reason_of(error)}); "
            f"{_ADVICE}."
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def _gradients(
    model: nn.Module, example: Any, loss: Loss, labels: Tensor
) -> tuple[Tensor, Tensor, set[torch.dtype]] | None:
    """Of a model's own loss and of another one, by what the last layer gives that both depend on; or ``None``.

    With the dtypes that they were computed in: float32 where nothing behind that layer has narrower weights.
    """
    with left_as_it_was(model):
        calls: list[nn.Module] = []
        with _after_each_layer(model, lambda layer, _: calls.append(layer)):
            _evaluated(model, example)
        for number in range(len(calls), max(0, len(calls) - MOST_TRIED), -1):
            try:
                output, begin = _with_graph_from(number, model, example, widen=True)
            except RecipeError:  # weights behind it that take their own dtype alone
                output, begin = _with_graph_from(number, model, example)
            with torch.enable_grad():
                logits = logits_of(model, output)
                both = output["loss"], loss(in_float32(logits), labels)
            if begin is not None and all(each.requires_grad for each in both):
                found = [torch.autograd.grad(each, begin, retain_graph=True, allow_unused=True)[0] for each in both]
                if None not in found:
                    dtypes = {each.dtype for each in (begin, logits, both[0])}
                    return in_float32(found[0]), in_float32(found[1]), dtypes
    return None


def _with_graph_from(number: int, model: nn.Module, example: Any, *, widen: bool = False) -> tuple[Any, Tensor | None]:
    """What a model gives, with a graph that begins at what was given by a layer; and that, a leaf of it.

    Args:
        number: of the layer's call, from 1 on.
        model: in evaluation mode from here on.
        example: a batch with labels.
        widen: to float32 at least, from there on.
    """
    count, begin = 0, None

    def begin_graph(_: nn.Module, outputs: Tensor) -> Tensor | None:
        nonlocal count, begin
        count += 1
        if count != number:
            return None
        begin = (in_float32(outputs) if widen else outputs).clamp(-1, 1).requires_grad_()
        torch.set_grad_enabled(True)  # until the region without gradients ends
        return begin.clone()  # which may be written in place

    with _after_each_layer(model, begin_graph):
        return _evaluated(model, example), begin


@contextlib.contextmanager
def _after_each_layer(model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor | None]) -> Iterator[None]:
    """A region in which something is called with each layer that was run and its outputs; it may give others.

    Layers are modules without any in them, that give a tensor with a row an item.
    """

    def hook(layer: nn.Module, _: Any, outputs: Any) -> Tensor | None:
        return (
            call(layer, outputs)
            if isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim
            else None
        )

    layers = [layer for layer in model.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
