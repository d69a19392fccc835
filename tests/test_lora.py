"""``--lora``: adapters of peft in a run, alone and under local modules, and plain weights at its end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import SIZE, adamw, assert_refused, batches, copied, make
from localgrad.backbones.adapters import passed_by, with_adapters, without_adapters
from localgrad.backbones.base import split
from localgrad.errors import BackboneError, RecipeError
from localgrad.learner import LocalLearner

if TYPE_CHECKING:
    from helpers import Cli

peft = pytest.importorskip("peft")

SMALL = {"depth": 2, "embed_dim": 24, "patch_size": 8, "img_size": 16, "in_chans": 1, "num_classes": 10}
OPTIONS = ["--data", "digits", "--model", "vit_tiny_patch16_224", "--img-size", "16", "--patch-size", "8"]
OPTIONS += ["--set", "model.options.depth=2", "--set", "model.options.embed_dim=24", "--set", "data.limit=64"]
BEIT = "beit_base_patch16_224"
OPTIONS += ["--batch-size", "16", "--device", "cpu", "--epochs", "1"]


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("modules", [1, 2])
def test_adapters_and_head_learn_and_nothing_else(kind: str, modules: int) -> None:
    plain = make(kind)
    model = with_adapters(copy.deepcopy(plain), 4, SIZE)
    learner = LocalLearner(split(model, SIZE), modules=modules)
    learner.configure_optimizers(adamw)
    before = copied(model)
    for images, labels in batches(2):
        learner.step(images, labels)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".lora_" in name or name.startswith("head.") for name in changed)
    assert {name.partition(".lora_")[0] for name in changed if ".lora_" in name} == {
        name
        for name, layer in plain.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.startswith("head")
    }


@pytest.mark.parametrize("rank", [129, 2**31, 10**20])
def test_a_rank_above_every_width_is_refused(rank: int) -> None:
    """It was a traceback of PyTorch, for want of memory or of digits."""
    model = make("vit")  # 32 wide, 128 in its MLPs
    with pytest.raises(RecipeError, match=f"^lora={rank}: its widest linear layer has 128 features.* such as lora=8"):
        with_adapters(model, rank, SIZE)
    with_adapters(model, 128, SIZE)


def test_plain_weights_are_those_that_peft_merges() -> None:
    model = with_adapters(make("vit"), 4, SIZE)
    learner = LocalLearner(split(model, SIZE), modules=1)
    learner.configure_optimizers(adamw)
    for images, labels in batches(3):
        learner.step(images, labels)
    plain = make("vit")
    plain.load_state_dict(without_adapters(model.state_dict()))
    images = batches(1)[0][0]
    with torch.no_grad():
        assert torch.allclose(plain.eval()(images), model.eval()(images), atol=1e-5)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    merged = model.blocks[1].mlp.fc1.base_layer.weight
    assert torch.allclose(plain.blocks[1].mlp.fc1.weight, merged, atol=1e-7)


def test_a_head_whose_layer_has_the_name_of_another_learns_itself() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Sequential()
            self.head.add_module("fc", nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.fc(x))
            return logits

    adapted = with_adapters(Model(), 2, (4,), heads=("head.",))
    assert {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name} == {"fc"}


def beit() -> nn.Module:
    """A model that reads the weight of a layer, and doesn't call it."""
    torch.manual_seed(0)
    options = {**SMALL, "in_chans": 3, "img_size": 32, "num_heads": 2}
    return timm.create_model(BEIT, **options)


def test_layers_that_a_model_passes_by_have_no_adapters(cli_: Cli, tmp_path: Path) -> None:
    model = with_adapters(beit(), 2, SIZE)
    assert passed_by(model) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    learner = LocalLearner(model, modules=2)
    learner.configure_optimizers(adamw)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    for images, labels in batches(3):
        learner.step(images, labels)
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    with torch.device("meta"):
        assert passed_by(with_adapters(beit(), 2, SIZE)) == passed_by(model), "planned as it is trained"
    assert passed_by(with_adapters(make("vit"), 2, SIZE)) == []
    options = [BEIT if each == "vit_tiny_patch16_224" else each for each in OPTIONS]
    said = cli_("train", *options, "--lora", "2", "--modules", "2", "--out", str(tmp_path / "run"))
    assert said.code == 0, said.err
    assert "No adapters in blocks.0.attn.qkv, blocks.1.attn.qkv: the model reads" in " ".join(said.out.split())


def test_adapters_that_a_model_passes_by_are_said() -> None:
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"])
    with pytest.warns(UserWarning, match=r"Beit reads the weights of blocks\.0\.attn\.qkv, blocks\.1\.attn\.qkv past"):
        split(peft.get_peft_model(beit(), config), SIZE)
    split(peft.get_peft_model(make("vit"), config), SIZE)


def test_weights_without_adapters_stay_as_they_are() -> None:
    weights = make("vit").state_dict()
    assert all(without_adapters(weights)[name] is tensor for name, tensor in weights.items())
    assert list(without_adapters(weights)) == list(weights)


@pytest.mark.heavy
def test_a_run_starts_from_a_file_and_ends_in_plain_weights(cli_: Cli, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict(), tmp_path / "w.safetensors")
    start = load_file(tmp_path / "w.safetensors")
    lora = ["--lora", "2", "--weights", str(tmp_path / "w.safetensors"), "--modules", "2", "--lr", "0.01"]
    run = tmp_path / "run"
    said = cli_("train", *OPTIONS, *lora, "--set", "training.warmup_epochs=0", "--out", str(run))
    assert said.code == 0, said.err
    assert "--lora 2: " in said.out
    assert "% of the weights learn." in said.out
    trained = load_file(run / "model.safetensors")
    assert trained.keys() == start.keys()
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    assert torch.equal(trained["norm.weight"], start["norm.weight"])
    evaluated = cli_("evaluate", str(run), "--device", "cpu")
    assert evaluated.code == 0, evaluated.err
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['test_accuracy']:.2%}" in evaluated.out
    planned = cli_("plan", *OPTIONS[:-6], "--lora", "2", "--batch-size", "16", "--device", "cpu", "--budget", "1GiB")
    assert planned.code == 0, planned.err


def test_mistakes_are_one_line(cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(cli_("train", *OPTIONS, "--lora", "0"), "lora")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert_refused(cli_("train", *OPTIONS, "--lora", "2"), "--lora 2", "pip install 'localgrad[peft]'")


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(BackboneError, match="lora=4: ResNet has no linear layers but its head"):
        with_adapters(make("resnet"), 4, SIZE)


class OfOneSize(nn.Module):
    """It says by itself that it can't take other images than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 2, "height must be divisible by window"
        return self.head(self.body(images.flatten(1)))  # type: ignore[no-any-return]


def test_a_size_that_a_model_can_not_take_is_refused_where_it_is_split() -> None:
    model = with_adapters(OfOneSize(), 2, (1, 3, 3), heads=("head",))
    assert any("lora_" in name for name, _ in model.body.named_parameters())  # type: ignore[union-attr,operator]
    with pytest.raises(BackboneError, match="height must be divisible by window"):
        split(model, example=torch.randn(2, 1, 3, 3))
