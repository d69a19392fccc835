"""Every family that localgrad names, as a small model of random weights."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

from localgrad.backbones.base import Backbone, split

SWIN = {
    "embed_dim": 16,
    "depths": (2, 1, 2),
    "num_heads": (1, 2, 4),
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
}
VIT = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 32, "patch_size": 8}

# family -> (timm name, what makes it small, first blocks of stages after the first)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN, (2, 4)),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, (2, 4)),
    "swinv2_cr": ("swinv2_cr_tiny_224", SWIN, (2, 4)),
    "swinv2_cr extra norm": ("swinv2_cr_tiny_ns_224", SWIN, (2, 4)),
    "vit": ("vit_tiny_patch16_224", VIT, ()),
    "vit registers": ("vit_medium_patch16_reg4_gap_256", VIT, ()),
    "vit attention pool": ("vit_base_patch16_siglip_224", VIT, ()),
    "vit dynamic size": ("vit_tiny_patch16_224", VIT | {"dynamic_img_size": True}, ()),
    "deit": ("deit_tiny_patch16_224", VIT, ()),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT, ()),
    "deit3": ("deit3_small_patch16_224", VIT, ()),
    "dinov2": ("vit_small_patch14_dinov2", VIT, ()),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", VIT, ()),
    "beit": ("beit_base_patch16_224", VIT, ()),
    "beit shared bias": (
        "beit_base_patch16_224",
        VIT | {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
        (),
    ),
    "beitv2": ("beitv2_base_patch16_224", VIT, ()),
    "eva02": ("eva02_tiny_patch14_224", VIT | {"embed_dim": 32, "num_heads": 2}, ()),
    "eva02 mixed rope": ("vit_small_patch16_rope_mixed_224", VIT | {"embed_dim": 32, "num_heads": 2}, ()),
    "cait": ("cait_xxs24_224", VIT, ()),
    "convit": ("convit_tiny", VIT | {"embed_dim": 8, "local_up_to_layer": 2}, ()),
    "convit small": ("convit_small", VIT | {"embed_dim": 8, "local_up_to_layer": 2}, ()),
    "xcit": ("xcit_nano_12_p16_224", VIT | {"embed_dim": 32, "num_heads": 2}, ()),
    "davit": (
        "davit_tiny",
        {"embed_dims": (16, 32), "depths": (1, 2), "num_heads": (1, 2), "window_size": 4},
        (1,),
    ),
    "maxvit": (
        "maxvit_rmlp_pico_rw_256",
        {"embed_dim": (32, 64), "depths": (1, 2), "num_heads": None, "stem_width": (16, 16), "img_size": 64},
        (1,),
    ),
    "mvitv2": ("", {"img_size": 64}, (1,)),
    "mvitv2 class token": ("", {"img_size": 64, "use_cls_token": True}, (1,)),
    "pvt_v2": (
        "pvt_v2_b0",
        {"embed_dims": (16, 32, 32, 32), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)},
        (1, 4, 6),
    ),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 2, 2, 1), "img_size": 64}, (1, 3, 5)),
    "convnext": ("convnext_atto", {"dims": (16, 16, 32, 32), "depths": (1, 1, 2, 1)}, (1, 3, 6)),
    "resnet": ("resnet18", {"channels": (8, 16, 16, 32)}, (2, 4, 6)),
}


# Features that are not as wide as their grid: shapes alone would leave open which axis is which.
WIDER = {
    f"{family}, wider": (name, kwargs | more, stages)
    for family, more in (
        ("swinv2_cr", {"embed_dim": 24}),
        ("swinv2_cr extra norm", {"embed_dim": 24}),
        ("pvt_v2", {"embed_dims": (24, 32, 32, 32)}),
    )
    for name, kwargs, stages in [FAMILIES[family]]
}

SHARED = {"beit shared bias", "eva02 mixed rope"}
"""Models that use one parameter in every block."""


def build(family: str, *, shaken: bool = True) -> tuple[nn.Module, tuple[int, int, int]]:
    """A small model of a family, and the size of its images."""
    name, kwargs, _ = (FAMILIES | WIDER)[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.3, **kwargs) if name else build_mvitv2(**kwargs)
    size = kwargs.get("img_size", 64)
    if shaken:
        shake(model)
    return model, (3, size, size)


@cache
def parted(family: str) -> Backbone:
    """The same, split, in evaluation mode; for all tests that leave it as it is. To split takes longer than to run."""
    model, size = build(family)
    backbone = split(model, size).eval()
    assert backbone.model is model
    return backbone


def parted_copy(family: str) -> Backbone:
    """A test's own."""
    return copy.deepcopy(parted(family))


def build_mvitv2(img_size: int, *, use_cls_token: bool = False) -> nn.Module:
    """timm builds these from a configuration object that ``create_model`` does not open."""
    cfg = MultiScaleVitCfg(
        embed_dim=(16, 32),
        depths=(1, 2),
        num_heads=(1, 2),
        stride_q=((1, 1), (2, 2)),
        use_cls_token=use_cls_token,
        use_abs_pos=use_cls_token,
    )
    return MultiScaleVit(cfg, img_size=(img_size, img_size), num_classes=5, drop_path_rate=0.3)


def shake(model: nn.Module) -> None:
    """Small random weights everywhere: a layer scale of 1e-5 or a zero norm would hide what a block does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def images_for(size: tuple[int, int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))
