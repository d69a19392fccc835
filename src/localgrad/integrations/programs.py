"""A model as a program that runs without its code: ``torch.export``'s, and ONNX made of it.

A program takes tensors, by position, and gives logits. The number of items (the first axis) is left open where the
model allows it; where its code depends on that number, the program is of one, and says so.

Source: PyTorch 2.14, ``torch.export.export``, ``torch.onnx.export(dynamo=True)``, which takes the exported program.

Shapes: B batch, first in every tensor of an example that has one row an item.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.backbones.example import Example, replaced
from localgrad.errors import BackboneError, RecipeError, arg, reason_of

TRACED_ITEMS = 3
"""Of the batch that a program is traced with; 0 and 1 stand for themselves there, and 2 is often something's size."""
ABOUT = "localgrad.json"
"""The file in a ``.pt2`` that tells classes and the like."""


class _Called(nn.Module):
    """A model that is called with the tensors of an example alone, by position, and gives logits."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        self.example = example
        self.paths = [path for path, value in example.leaves() if isinstance(value, Tensor)]

    def forward(self, *tensors: Tensor) -> Tensor:
        """The logits."""
        tree: Any = (self.example.args, self.example.kwargs)
        for path, tensor in zip(self.paths, tensors, strict=True):
            tree = replaced(tree, path, tensor)
        args, kwargs = tree
        return Example(args, kwargs, self.example.main).call(self.model)


@dataclass(frozen=True)
class Traced:
    """A traced program.

    Attributes:
        program: what ``torch.export`` made.
        names: of its inputs, in their order.
        open_inputs: for each input, whether its first axis is the batch.
        num_items: of every batch that it takes; ``None`` for any number.
        reason: why it takes no other.
    """

    program: torch.export.ExportedProgram
    names: tuple[str, ...]
    open_inputs: tuple[bool, ...]
    num_items: int | None = None
    reason: str = ""


def input_tensors(example: Example) -> tuple[Tensor, ...]:
    """What a program is called with for an example."""
    return tuple(value for _, value in example.leaves() if isinstance(value, Tensor))


def trace(model: nn.Module, example: Example, *, num_items: int) -> Traced:
    """Trace a model in evaluation mode.

    Args:
        model: on the processor.
        example: what it is called with.
        num_items: of the batches that the program takes where it can't take any number.

    Raises:
        BackboneError: it can't be traced.
    """
    names = tuple(_input_name(path) for path, value in example.leaves() if isinstance(value, Tensor))
    names = ("images",) if example.is_single else names
    have = example.num_items
    is_open = tuple(bool(tensor.ndim) and len(tensor) == have for tensor in input_tensors(example))

    def traced(count: int, shapes: object) -> torch.export.ExportedProgram:
        given = example.rows(count)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and of a model's own code, about tracing
            return torch.export.export(_Called(model, given), input_tensors(given), dynamic_shapes=shapes, strict=False)

    any_number = torch.export.Dim("batch")
    try:
        shapes = {"tensors": tuple({0: any_number} if each else None for each in is_open)}
        return Traced(traced(TRACED_ITEMS, shapes), names, is_open)
    except Exception as error:  # of many kinds: what torch can't know beforehand
        reason = reason_of(error, 300)
    try:
        return Traced(traced(num_items, None), names, (False,) * len(names), num_items, reason)
    except Exception as error:
        raise BackboneError(
            f"model: torch.export can't trace {type(model).__name__} ({type(error).__name__}: {reason_of(error, 300)})."
        ) from error


def _input_name(path: tuple[Any, ...]) -> str:
    """An input's name: its keyword, or its place."""
    kind, *rest = path
    return "_".join(map(str, rest)) if kind == 1 else "_".join(map(str, ("input", *rest)))


def write_program(traced: Traced, path: Path, about: Mapping[str, object]) -> None:
    """Write a program as ``torch.export.load`` reads it, with what is to be known of it."""
    torch.export.save(traced.program, path, extra_files={ABOUT: json.dumps({**about, "inputs": list(traced.names)})})


def read_program(path: Path) -> Callable[[Example], Tensor]:
    """Read a program again; gives what calls it."""
    module = torch.export.load(path).module()

    def call(example: Example) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(*input_tensors(example))
        return found

    return call


def check_onnx() -> None:
    """Refuse to go on without what writes and runs ONNX.

    Raises:
        RecipeError: one of the packages is missing.
    """
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"{arg('to', 'onnx')}: it needs onnx, onnxscript and onnxruntime ({error}); pip install 'localgrad[onnx]'."
        ) from error


def write_onnx(traced: Traced, path: Path, about: Mapping[str, object]) -> None:
    """Write a program as ONNX; what is to be known of it is in the model's metadata, each value as JSON.

    Raises:
        BackboneError: it uses what ONNX doesn't have.
    """
    axes = [{0: "batch"} if each else {} for each in traced.open_inputs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of onnxscript and torch, about each other
            made: Any = torch.onnx.export(
                traced.program,
                (),
                dynamo=True,
                input_names=list(traced.names),
                output_names=["logits"],
                dynamic_shapes=axes if any(traced.open_inputs) else None,
                verbose=False,
            )
    except Exception as error:
        raise BackboneError(
            f"{arg('to', 'onnx')}: torch.onnx can't write this model ({type(error).__name__}: "
            f"{reason_of(error, 300)}); take {arg('to', 'torch-export')}."
        ) from error
    made.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    made.save(str(path))


def read_onnx(path: Path, names: tuple[str, ...]) -> Callable[[Example], Tensor]:
    """Read ONNX with onnxruntime, on the processor; gives what calls it.

    Args:
        path: of the file.
        names: of the inputs, in the order of an example's tensors; one that nothing depends on may be gone.

    Raises:
        BackboneError: onnxruntime doesn't run it, as with weights of bfloat16.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own kinds
        raise BackboneError(
            f"{arg('to', 'onnx')}: onnxruntime can't run what was written ({type(error).__name__}: "
            f"{reason_of(error, 300)}); it was removed. Convert the model to float32, or take "
            f"{arg('to', 'torch-export')}."
        ) from error
    taken = {each.name for each in session.get_inputs()}

    def call(example: Example) -> Tensor:
        pairs = zip(names, input_tensors(example), strict=True)
        given = {name: tensor.numpy() for name, tensor in pairs if name in taken}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return call
