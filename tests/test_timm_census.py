"""Every model file of timm, one model each: which are split, and why the others are not (timm 1.0.31)."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from localgrad.backbones.base import split
from localgrad.errors import BackboneError

SPLIT = (
    *("beit_base_patch16_224", "cait_xxs24_224", "convit_tiny", "convmixer_768_32", "cpubone_nano", "csatv2"),
    *("cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224", "edgenext_xx_small", "efficientformer_l1"),
    *("efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_slim_dw"),
    *("eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "ghostnet_050", "gmlp_ti16_224"),
    *("halonet_h1", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "hieradet_small", "iformer_t"),
    *("inception_next_atto", "lcnetv2_small", "legacy_seresnet18", "levit_128s", "lowformer_b0"),
    *("mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_gap", "nextvit_small"),
    *("poolformerv2_s12", "pvt_v2_b0", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "resnetv2_18"),
    *("samvit_base_patch16_224", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs"),
    *("swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window16_256", "test_byobnet"),
    *("test_coatnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet", "test_resnet"),
    *("test_vit", "test_vit_relpos", "tiny_vit_5m_224", "vit_tiny_r_s16_p8_224", "vitamin_small_224"),
    *("xception41p", "xcit_nano_12_p8_224"),
)
"""A small model of each of 67 files."""


NO_BLOCKS = (
    *("coat_tiny", "deepseek_vit_412m", "densenet121", "dla46x_c", "dpn48b", "gemma4_vit_167m", "inception_v3"),
    *("inception_resnet_v2", "inception_v4", "legacy_xception", "nasnetalarge", "nest_tiny", "pit_ti_224"),
    *("pnasnet5large", "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "rexnet_100", "selecsls42", "tresnet_m"),
    *("vgg11", "visformer_tiny", "volo_d1_224"),
)
"""Their blocks stand under other names than those that are looked for."""

OTHERS = {
    "crossvit_tiny_240": "its parts don't run on their own",  # two branches
    "hrnet_w18_small": "its parts don't run on their own",  # four branches
    "efficientvim_m1": "its parts don't run on their own",  # the head reads every stage
    "mobilenetv5_base": "its parts don't run on their own",  # the head reads two stages
    "cs3darknet_focus_s": r"stages\.0\.blocks\.0 does not receive what the features before it gives",
    "gcvit_xxtiny": r"stages\.0\.blocks\.0 is called with a Tensor beside its features",
    "tnt_s_legacy_patch16_224": r"what stands before blocks\.0 is not its forward_features alone",
    "twins_svt_small": "none of its blocks was called",  # a list of lists
}


def make(name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    return model, model.pretrained_cfg["input_size"]


def test_every_file_is_there() -> None:
    assert len(SPLIT) == len(set(SPLIT)) == 67
    assert len({*SPLIT, *NO_BLOCKS, *OTHERS}) == 98


@pytest.mark.heavy
@pytest.mark.parametrize("name", SPLIT)
def test_is_split(name: str) -> None:
    model, size = make(name)
    untouched = copy.deepcopy(model).eval()
    backbone = split(model, size).eval()  # the proof holds logits and gradients against each other
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(backbone(images), untouched(images))
    for mine, other in zip(backbone.model.buffers(), untouched.buffers(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*NO_BLOCKS, *OTHERS])
def test_is_refused_for_its_reason(name: str) -> None:
    model, size = make(name)
    with pytest.raises(BackboneError, match=OTHERS.get(name, "no container of blocks was found")):
        split(model, size)
