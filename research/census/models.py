"""The models of the census: the smallest entry point of every timm file, and one of each kind of other libraries.

Weights are random and configurations small: what is found depends on neither. Language batches have a padding mask.

Sources: timm 1.0.31, torchvision 0.29, transformers 5.24, open_clip 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | dict[str, Tensor]
NUM_CLASSES = 10
"""Classes of the heads."""

TIMM = (
    *("beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convmixer_768_32", "cpubone_nano"),
    *("crossvit_tiny_240", "csatv2", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "edgenext_xx_small"),
    *("efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0"),
    *("eva02_tiny_patch14_224", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m"),
    *("gmlp_ti16_224", "halonet_h1", "hiera_tiny_224", "hieradet_small", "iformer_t", "inception_next_atto"),
    *("levit_128s", "lowformer_b0", "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_gap"),
    *("nest_tiny", "nextvit_small", "pit_ti_224", "poolformerv2_s12", "pvt_v2_b0", "qwen3_vit_88m", "repvit_m1"),
    *("samvit_base_patch16_224", "sequencer2d_s", "shvit_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224"),
    *("swinv2_cr_tiny_224", "swinv2_tiny_window16_256", "test_coatnet", "test_convnext", "test_mambaout", "test_vit"),
    *("test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "twins_svt_small"),
    *("visformer_tiny", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p8_224"),
)
"""A small model of each of timm's 61 files of transformers, and of what is built as they are."""

TIMM_CONVOLUTIONAL = (
    *("cs3darknet_focus_s", "cspnext_tiny", "densenet121", "dla46x_c", "dpn48b", "ese_vovnet19b_slim_dw"),
    *("fasternet_t0", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hrnet_w18_small", "inception_resnet_v2"),
    *("inception_v3", "inception_v4", "lcnetv2_small", "legacy_seresnet18", "legacy_xception"),
    *("mobilenetv3_small_050", "nasnetalarge", "pnasnet5large", "rdnet_tiny", "regnetx_002", "repghostnet_050"),
    *("res2next50", "resnest14d", "resnetv2_18", "rexnet_100", "selecsls42", "skresnet18", "starnet_s050"),
    *("test_byobnet", "test_efficientnet", "test_nfnet", "test_resnet", "tresnet_m", "vgg11", "xception41p"),
)
"""Of each of the other 37."""

REFUSED = {
    "crossvit_tiny_240": "several features",
    "efficientvim_m1": "a skip, or a second stream",
    "nasnetalarge": "a skip, or a second stream",
    "pnasnet5large": "a skip, or a second stream",
    "tnt_s_legacy_patch16_224": "several features",
}
"""timm's that can't be local modules, by what the message says of them."""

SIDES = {"deepseek_vit_412m": 112, "gemma4_vit_167m": 192, "qwen3_vit_88m": 192}
"""Pixels of a side for those of timm's that take any, and whose own are 546 to 768: minutes a pass on a processor."""

TORCHVISION: dict[str, dict[str, Any]] = {
    "vit_b_16": {"image_size": 32},
    "swin_t": {},
    "swin_v2_t": {},
    "maxvit_t": {},
    "convnext_tiny": {},
    "resnet18": {},
    "efficientnet_b0": {},
    "regnet_y_400mf": {},
    "mobilenet_v3_small": {},
    "densenet121": {},
    "vgg11_bn": {},
    "shufflenet_v2_x0_5": {},
}

_VIT = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
_VIT |= {"image_size": 64, "patch_size": 8}
_SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_SAM = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}
_STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}

VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", _VIT),
    "DeiTForImageClassification": ("DeiTConfig", _VIT),
    "Dinov2ForImageClassification": ("Dinov2Config", _VIT),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", _VIT),
    "BeitForImageClassification": ("BeitConfig", _VIT),
    "Data2VecVisionForImageClassification": ("Data2VecVisionConfig", _VIT),
    "ViTMSNForImageClassification": ("ViTMSNConfig", _VIT),
    "IJepaForImageClassification": ("IJepaConfig", _VIT),
    "SwinForImageClassification": ("SwinConfig", _SWIN),
    "Swinv2ForImageClassification": ("Swinv2Config", _SWIN),
    "ConvNextForImageClassification": ("ConvNextConfig", {**_STAGES, "image_size": 64}),
    "ConvNextV2ForImageClassification": ("ConvNextV2Config", {**_STAGES, "image_size": 64}),
    "PvtV2ForImageClassification": ("PvtV2Config", {}),
    "SiglipForImageClassification": ("SiglipConfig", {"vision_config": _VIT}),
    "CLIPForImageClassification": ("CLIPConfig", {"vision_config": _VIT}),
    "DINOv3ViTModel": ("DINOv3ViTConfig", _VIT),
    "SamVisionModel": ("SamVisionConfig", {**_SAM, "global_attn_indexes": [1, 3], "window_size": 4}),
    "PoolFormerForImageClassification": ("PoolFormerConfig", {"depths": [1, 1, 1, 1]}),
    "ResNetForImageClassification": ("ResNetConfig", {"embedding_size": 16, **_STAGES}),
    "MobileViTForImageClassification": ("MobileViTConfig", {"image_size": 64}),
    "SegformerForImageClassification": ("SegformerConfig", {}),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {}),
}
"""Of transformers: its configuration's class, and what is small in it."""

_LM: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_LM |= {"intermediate_size": 96}
_GQA = {**_LM, "num_key_value_heads": 2, "max_position_embeddings": 64}
_ALL_HEADS = {**_GQA, "num_key_value_heads": 4}
_GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64}
_SLIDING = {"head_dim": 12, "sliding_window": 8}

_SPEECH_SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
_SPEECH: dict[str, Any] = {**_SPEECH_SIZES, "conv_dim": [16] * 3, "conv_stride": [5, 4, 4], "conv_kernel": [10, 3, 3]}
_SPEECH |= {"num_feat_extract_layers": 3}
_SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
_FRAMES = {**_VIT, "num_frames": 4}
_WAVE, _SPECTRUM, _VIDEO = (1600,), (64, 32), (4, 3, 64, 64)

SOUND_AND_VIDEO: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", {**_SPEECH, "layerdrop": 0.0}, "input_values", _WAVE),
    "HubertForSequenceClassification": ("HubertConfig", {**_SPEECH, "layerdrop": 0.0}, "input_values", _WAVE),
    "WavLMForSequenceClassification": ("WavLMConfig", {**_SPEECH, "layerdrop": 0.0}, "input_values", _WAVE),
    "ASTForAudioClassification": (
        "ASTConfig",
        {
            **_SPEECH_SIZES,
            "patch_size": 8,
            "num_mel_bins": 32,
            "max_length": 64,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        "input_values",
        _SPECTRUM,
    ),
    "VideoMAEForVideoClassification": ("VideoMAEConfig", _FRAMES, "pixel_values", _VIDEO),
    "TimesformerForVideoClassification": ("TimesformerConfig", _FRAMES, "pixel_values", _VIDEO),
    "VivitForVideoClassification": ("VivitConfig", {**_FRAMES, "tubelet_size": [2, 8, 8]}, "pixel_values", _VIDEO),
}
"""Of transformers: its configuration's class, what is small in it, its input's name, and one item's shape."""

LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", _GQA),
    "MistralForCausalLM": ("MistralConfig", {**_GQA, "sliding_window": 8}),
    "MixtralForCausalLM": ("MixtralConfig", {**_GQA, "num_local_experts": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", _GQA),
    "Qwen3ForCausalLM": ("Qwen3Config", {**_GQA, "head_dim": 12}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**_GQA, **_SLIDING}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**_GQA, **_SLIDING}),
    "PhiForCausalLM": ("PhiConfig", _ALL_HEADS),
    "Phi3ForCausalLM": ("Phi3Config", {**_ALL_HEADS, "pad_token_id": 0}),
    "Olmo2ForCausalLM": ("Olmo2Config", _GQA),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {**_GQA, "pad_token_id": 0}),
    "GPT2LMHeadModel": ("GPT2Config", _GPT2),
    "GPT2ForSequenceClassification": ("GPT2Config", {**_GPT2, "pad_token_id": 0}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _LM),
    "GPTJForCausalLM": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "OPTForCausalLM": (
        "OPTConfig",
        {**_LM, "ffn_dim": 96, "word_embed_proj_dim": 48, "max_position_embeddings": 64},
    ),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": 97, "hidden_size": 48, "n_layer": 4, "n_head": 4}),
    "FalconForCausalLM": ("FalconConfig", _LM),
    "MptForCausalLM": ("MptConfig", {"vocab_size": 97, "d_model": 48, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 4, "state_size": 8},
    ),
    "BertForSequenceClassification": ("BertConfig", _LM),
    "BertForMaskedLM": ("BertConfig", _LM),
    "RobertaForSequenceClassification": ("RobertaConfig", {**_LM, "pad_token_id": 1}),
    "XLMRobertaForTokenClassification": ("XLMRobertaConfig", {**_LM, "pad_token_id": 1}),
    "ElectraForSequenceClassification": ("ElectraConfig", {**_LM, "embedding_size": 32}),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config",
        {**_LM, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 97, "dim": 48, "n_layers": 4, "n_heads": 4, "hidden_dim": 96},
    ),
    "ModernBertForSequenceClassification": (
        "ModernBertConfig",
        {**_LM, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "AlbertForSequenceClassification": ("AlbertConfig", {**_LM, "embedding_size": 48}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 97, "d_model": 48, "d_ff": 96, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0},
    ),
}

OPEN_CLIP = ("ViT-B-32", "ViT-B-32-quickgelu", "RN50", "convnext_base")


@dataclass(frozen=True)
class Entry:
    """A model of the census.

    Attributes:
        library: the file of results that it is in.
        name: there.
        make: makes it, with random weights.
        batch: of two items, as a data loader gives them, from the model; without labels.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[nn.Module], Batch]

    @property
    def label(self) -> str:
        """As it is named on the command line."""
        return f"{self.library}/{self.name}"


def entries() -> Iterator[Entry]:
    """Every model."""
    for library, names in (("timm", TIMM), ("timm-convolutional", TIMM_CONVOLUTIONAL)):
        for name in names:
            yield Entry(library, name, lambda name=name: _timm(name), lambda m, name=name: images(size_of(m, name)))
    for name, options in TORCHVISION.items():
        size = options.get("image_size", 224 if name == "maxvit_t" else 64)
        yield Entry(
            "torchvision",
            name,
            lambda name=name, options=options: _torchvision(name, options),
            lambda _, size=size: images((3, size, size)),
        )
    for library, table in (("transformers-vision", VISION), ("transformers-language", LANGUAGE)):
        for name, (config, options) in table.items():
            yield Entry(
                library,
                name,
                lambda name=name, config=config, options=options: transformer(name, config, options),
                _pixels if table is VISION else _tokens,
            )
    for name, (config, options, given, shape) in SOUND_AND_VIDEO.items():
        yield Entry(
            "transformers-sound-video",
            name,
            lambda name=name, config=config, options=options: transformer(name, config, options),
            lambda _, given=given, shape=shape: {given: images(shape)},
        )
    for name in OPEN_CLIP:
        yield Entry("open_clip", name, lambda name=name: _open_clip(name), lambda _: images((3, 224, 224)))


def images(size: tuple[int, ...]) -> Tensor:
    """Two images, or what else has numbers, [2, *size]."""
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(1))


def size_of(model: nn.Module, name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model of timm is tried with."""
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[misc, index]
    return (channels, SIDES[name], SIDES[name]) if name in SIDES else (channels, height, width)


def _pixels(_: nn.Module) -> Batch:
    return {"pixel_values": images((3, 64, 64))}


def _tokens(model: nn.Module) -> Batch:
    """Two sequences of 16 tokens, of which the first ends in padding."""
    ids = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    ids[0, 12:] = getattr(model.config, "pad_token_id", None) or 0  # type: ignore[union-attr]
    return {"input_ids": ids, "attention_mask": mask}


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=NUM_CLASSES)


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    made: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=NUM_CLASSES, **options)
    return made


def transformer(name: str, config: str, options: dict[str, Any]) -> nn.Module:
    """A model of transformers, of a small configuration."""
    import transformers

    classes = {} if name.endswith(("LM", "LMHeadModel", "Model", "Generation")) else {"num_labels": NUM_CLASSES}
    made: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options, **classes))
    return made


def _open_clip(name: str) -> nn.Module:
    import open_clip

    made: nn.Module = open_clip.create_model(name, pretrained=None).visual
    return made
