"""Models that peft has put adapters into: its wrapper calls the model itself, whose layers are the adapted ones.

So the model is what is split, and each adapter is a layer like any other: trained by the local module that its block is
in, while frozen weights are only read. ``save_pretrained`` of the wrapper saves the adapters. Adapters that stand in no
layer (virtual tokens before the inputs) can't be had without the wrapper. peft is known by its name and by public
methods, and is imported only to make adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from localgrad.backbones.by_hand import listed
from localgrad.backbones.example import Example
from localgrad.backbones.fake import by_shapes_alone, fake_copy_with_memo
from localgrad.backbones.quantized import plain_weight, silence_hint
from localgrad.backbones.state import left_as_it_was
from localgrad.backbones.timm_models import beginnings_of_heads
from localgrad.errors import BackboneError, RecipeError, arg

SCALING = 2
"""Factor on what adapters add: peft's ``lora_alpha`` is so many times the rank."""


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


def with_adapters(model: nn.Module, rank: int, size: Sequence[int], *, heads: Sequence[str] | None = None) -> nn.Module:
    """Put LoRA adapters (arXiv 2106.09685) into every linear layer of a model but its head; they and the head learn.

    A layer that the model doesn't call, but reads the weight of (timm's BEiT: ``attn.qkv``), would never run its
    adapter, and is left as it is.

    Args:
        model: changed in place.
        rank: of the adapters.
        size: (C, H, W) of its images.
        heads: what the names of weights begin with that learn themselves; by default timm's classifiers.

    Raises:
        RecipeError: peft is missing, or no layer is as wide as the rank.
        BackboneError: there is no linear layer but the head.
    """
    silence_hint()
    try:
        import peft
    except ImportError as error:
        raise RecipeError(f"{arg('lora', rank)}: it needs peft ({error}); pip install 'localgrad[peft]'.") from error
    heads = beginnings_of_heads(model) if heads is None else tuple(heads)
    linear = _called_layers(model, size)
    targets = [name for name in linear if not f"{name}.weight".startswith(heads)]
    if not targets:
        raise BackboneError(
            f"{arg('lora', rank)}: {type(model).__name__} has no linear layers but its head; freeze its first blocks "
            f"instead ({arg('freeze', 0.5)})."
        )
    layers = (layer for name, layer in model.named_modules() if name in targets and isinstance(layer, nn.Linear))
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    if rank > widest:
        raise RecipeError(
            f"{arg('lora', rank)}: its widest linear layer has {widest} features, and an adapter of a higher rank adds "
            f"nothing; take less, such as {arg('lora', 8)}."
        )
    exactly = "|".join(map(re.escape, targets))  # of a list, peft takes whatever ends in one of its names as well
    config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=exactly)
    adapted: nn.Module = peft.inject_adapter_in_model(config, model)
    for name, weight in adapted.named_parameters():
        weight.requires_grad = "lora_" in name or name.startswith(heads)
    return adapted


def _called_layers(model: nn.Module, size: Sequence[int]) -> list[str]:
    """Names of the linear layers that a model calls, by shapes alone; of all where its forward can't be run so."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    called: set[str] = set()
    try:
        with by_shapes_alone():
            like = next(model.parameters())
            images = torch.empty(2, *size, dtype=like.dtype, device=like.device)
            fake_mode, (twin, images), _ = fake_copy_with_memo((model, images))
            for name in names:
                twin.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
            with fake_mode, torch.no_grad():
                twin.eval()(images)
    except Exception:  # of a forward that needs values, or can't take these images, which is told when it is split
        return names
    return [name for name in names if name in called]


def passed_by(model: nn.Module) -> list[str]:
    """Names of the linear layers without adapters that stand still, in a model that has some."""
    adapted = tuple(name.removesuffix("base_layer") for name, _ in model.named_modules() if name.endswith("base_layer"))
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not name.startswith(adapted)
        and not any(weight.requires_grad for weight in layer.parameters())
    ]


def adapters_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers among modules that peft has put adapters into, as far as they can be merged."""
    found = (module for module in modules if type(module).__module__.startswith("peft.tuners."))
    return [module for module in found if isinstance(getattr(module, "merged", None), bool)]


def are_merged(adapters: Iterable[nn.Module]) -> bool:
    """Whether some of what adapters learnt is in the weights at present, so that they would not run."""
    return any(each.merged for each in adapters)


MERGED = "adapters are merged into the weights, and never learn so; call model.unmerge_adapter() first"


def check_adapters_are_read(model: nn.Module, unread: Collection[str]) -> None:
    """Warn of adapters that are merged, or that the model passes by: it reads the weight of their layers alone.

    Args:
        model: with adapters of peft, or without any.
        unread: names of the weights that learn, and that its logits don't depend on.
    """
    if are_merged(adapters_in(model.modules())):
        warnings.warn(f"{type(model).__name__}: {MERGED}.", stacklevel=3)
        return
    layers = []
    for name, layer in model.named_modules():
        learning = [f"{name}.{own}" for own, weight in layer.named_parameters() if weight.requires_grad]
        if type(layer).__module__.startswith("peft.tuners.") and learning and set(learning) <= set(unread):
            layers.append(name)
    if layers:
        warnings.warn(
            f"{type(model).__name__} reads the weights of {listed(layers)} past their adapters, which never "
            "learn; leave these layers out of target_modules.",
            stacklevel=3,
        )


def without_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's weights: what adapters learnt is added to the layers that they are in; dequantised."""
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, is_base, rest = name.partition(".base_layer.")
        if is_base and rest in ("weight", "packed"):
            low, high = (weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            plain[f"{layer}.weight"] = plain_weight(weights, f"{layer}.base_layer") + SCALING * (high @ low)
        elif ".lora_" not in name and not (is_base and rest == "scales"):
            plain[name.replace(".base_layer.", ".")] = tensor
    return plain
