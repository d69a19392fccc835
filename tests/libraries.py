"""One small model of each library, as its library makes it, with batches as a data loader gives them.

All of them are split by watching. They draw in training (dropout, drop path), so that what is drawn is seen, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.backbones.base import Backbone, split
from localgrad.backbones.example import Example

CLASSES, VOCABULARY, LENGTH = 5, 61, 10
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Small:
    """A small model.

    Attributes:
        make: makes it, of random weights.
        batch: given a seed and how many items, a batch with its labels; images are under ``images``.
        needs: the package.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    needs: str


def images(seed: int, items: int, *, name: str = "images") -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(items, 3, 32, 32, generator=generator)
    return {name: pixels, "labels": torch.randint(CLASSES, (items,), generator=generator)}


def tokens(seed: int, items: int, *, length: int = LENGTH, full: bool = False) -> Batch:
    """Sequences of which the later ones end in padding, or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (items, length), generator=generator)
    lengths = torch.linspace(length, length if full else length // 2, items).long()
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "labels": labels}


def visformer() -> nn.Module:
    from timm.models.visformer import Visformer

    return Visformer(
        img_size=32, init_channels=8, embed_dim=16, depth=(1, 2, 1), num_heads=2, attn_stage="011", group=4,
        num_classes=CLASSES, drop_path_rate=0.2,
    )  # fmt: skip


def swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    made: nn.Module = SwinTransformer([4, 4], 16, [2, 2], [1, 2], [4, 4], stochastic_depth_prob=0.2,
                                      num_classes=CLASSES)  # fmt: skip
    return made


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8,
        num_labels=CLASSES, hidden_dropout_prob=0.1,
    )  # fmt: skip
    made: nn.Module = transformers.ViTForImageClassification(config)
    return made


def llama(*, layers: int = 4, tied: bool = False) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=64, attention_dropout=0.1, tie_word_embeddings=tied,
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config)
    return made


def clip() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    made: nn.Module = VisionTransformer(
        image_size=32, patch_size=8, width=16, layers=4, heads=2, mlp_ratio=1.5, output_dim=CLASSES
    )
    return made


LIBRARIES = {
    "timm": Small(visformer, images, "timm"),
    "torchvision": Small(swin, images, "torchvision"),
    "transformers, vision": Small(vit, lambda *how: images(*how, name="pixel_values"), "transformers"),
    "transformers, language": Small(llama, tokens, "transformers"),
    "open_clip": Small(clip, images, "open_clip"),
}


def plain_model(name: str) -> nn.Module:
    """The same weights each time; or a skip, where the library isn't there."""
    small = LIBRARIES[name]
    pytest.importorskip(small.needs)
    torch.manual_seed(0)
    return small.make()


def inputs_of(batch: Batch) -> Any:
    """What the model is called with: a tensor where images are all."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    return given.get("images", given)


def called(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own logits."""
    return Example.of(inputs_of(batch)).call(model)


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """As the library's users write it: that of language models is their own."""
    if "input_ids" in batch:
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss
    return F.cross_entropy(called(model, batch), batch["labels"])


def parted(name: str) -> Backbone:
    """A copy of a model that is split once."""
    return copy.deepcopy(_parted(name))


@cache
def _parted(name: str) -> Backbone:
    model = plain_model(name)
    backbone = split(model, example=inputs_of(LIBRARIES[name].batch(0, 2)))
    assert backbone.model is model
    assert backbone.trunk is not None
    return backbone


def saved_and_loaded(name: str, model: nn.Module, folder: Path) -> nn.Module:
    """The model written and read by its library's own functions."""
    if name.startswith("transformers"):
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded: nn.Module = type(model).from_pretrained(folder)  # type: ignore[attr-defined]
        return loaded
    fresh = LIBRARIES[name].make()
    torch.save(model.state_dict(), folder / "weights.pt")
    if name == "timm":
        from timm.models import load_checkpoint

        load_checkpoint(fresh, str(folder / "weights.pt"))
    else:
        fresh.load_state_dict(torch.load(folder / "weights.pt"), strict=True)
    return fresh
