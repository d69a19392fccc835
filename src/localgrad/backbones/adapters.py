"""Models that peft has put adapters into: its wrapper calls the model itself, whose layers are the adapted ones.

So the model is what is split, and each adapter is a layer like any other: trained by the local module that its block is
in, while frozen weights are only read. ``save_pretrained`` of the wrapper saves the adapters. Adapters that stand in no
layer (virtual tokens before the inputs) can't be had without the wrapper. peft is known by its name and by public
methods, and isn't imported.
"""

from __future__ import annotations

import torch
from torch import nn

from localgrad.backbones.example import Example
from localgrad.backbones.state import left_as_it_was
from localgrad.errors import BackboneError


def is_adapted(model: object) -> bool:
    """Whether it is a wrapper of peft around a model."""
    kinds = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    return "peft" in kinds and callable(getattr(model, "get_base_model", None))


def adapted_model(model: nn.Module) -> nn.Module:
    """The model itself, adapters in its layers; any other model as it is.

    Raises:
        BackboneError: the adapters aren't in its layers.
    """
    if not is_adapted(model):
        return model
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = str(getattr(config, "peft_type", "it")).rpartition(".")[2]
        raise BackboneError(
            f"model: {kind} puts virtual tokens before the model's inputs, outside of any block; take adapters that "
            "stand in layers, such as peft.LoraConfig."
        )
    found: nn.Module = model.get_base_model()  # type: ignore[operator]
    return found


def check_calls_alike(wrapper: nn.Module, model: nn.Module, given: Example) -> None:
    """Refuse a wrapper that does more than call its model.

    Raises:
        BackboneError: their logits differ.
    """
    like = next(model.parameters())
    given = given.map(lambda tensor: tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device))
    with torch.inference_mode(mode=False), left_as_it_was(wrapper), torch.no_grad():
        wrapper.eval()
        if not torch.equal(given.call(wrapper), given.call(model)):
            raise BackboneError(
                f"model: {type(wrapper).__name__} gives other logits than the model in it, whose blocks are called "
                "without it; take adapters that stand in layers alone, such as peft.LoraConfig."
            )
