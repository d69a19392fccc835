"""``--quantize 4bit``: weights below adapters in NF4, held against a table and a layer of this file's own."""

from __future__ import annotations

import copy
import gc
import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from helpers import SIZE, adamw, assert_refused, assert_same_run, batches, copied, interrupt_at_step, make
from helpers import profiler_peak as measured_peak
from localgrad import run
from localgrad.app.recipe import Recipe
from localgrad.backbones.adapters import with_adapters, without_adapters
from localgrad.backbones.base import split
from localgrad.backbones.quantized import QuantizedLinear, check_quantizer, num_weights, packed_weight, quantize_base
from localgrad.errors import BackboneError
from localgrad.estimating import estimate_step
from localgrad.learner import LocalLearner
from localgrad.objectives.methods import FeatureReconstruction
from localgrad.partition import forecast_of
from localgrad.training.optim import OptimizerFactory
from localgrad.training.stagewise import estimate_stages
from localgrad.training.trainer import Interrupted

if TYPE_CHECKING:
    from helpers import Cli

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'localgrad[8bit]'"
)

# arXiv 2305.14314, appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
OPTIONS = ["--data", "digits", "--model", "vit_tiny_patch16_224", "--img-size", "16", "--patch-size", "8"]
OPTIONS += ["--set", "model.options.depth=2", "--set", "model.options.embed_dim=24", "--set", "data.limit=64"]
OPTIONS += ["--batch-size", "16", "--device", "cpu", "--epochs", "1"]
SMALL = {"depth": 2, "embed_dim": 24, "patch_size": 8, "img_size": 16, "in_chans": 1, "num_classes": 10}


def nearest(weight: Tensor) -> Tensor:
    """A weight rounded to NF4 in blocks of 64 numbers, in the order of its memory."""
    blocks = weight.detach().flatten().split(64)
    table = torch.tensor(NF4)
    rounded = [
        table[((block / block.abs().max())[:, None] - table).abs().argmin(1)] * block.abs().max() for block in blocks
    ]
    return torch.cat(rounded).view_as(weight)


def quantized(layer: nn.Linear) -> QuantizedLinear:
    packed = packed_weight(layer)
    assert packed is not None
    return QuantizedLinear(packed, layer.bias)


def adapted(kind: str = "vit", **more: Any) -> nn.Module:
    return quantize_base(with_adapters(make(kind, **more), 4, SIZE))


def learner_of(model: nn.Module, **options: Any) -> LocalLearner:
    learner = LocalLearner(split(model, SIZE), **options)
    learner.configure_optimizers(adamw)
    return learner


@pytest.mark.parametrize("sizes", [(48, 96), (10, 24), (128, 3)])
def test_a_layer_is_a_plain_one_of_the_rounded_weight(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(*sizes)
    layer = quantized(plain)
    assert torch.allclose(layer.weight, nearest(plain.weight), atol=1e-6)
    assert layer.packed.nbytes + layer.scales.nbytes == plain.weight.numel() // 2 + -(-plain.weight.numel() // 64) * 4
    ours, theirs = (torch.randn(2, 5, sizes[0], generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
    out, expected = layer(ours), F.linear(theirs, layer.weight, plain.bias)
    assert torch.equal(out, expected)
    (out**2).sum().backward()
    of_bias, plain.bias.grad = plain.bias.grad, None
    (expected**2).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose(of_bias, plain.bias.grad, rtol=1e-5, atol=1e-5)


def test_a_graph_keeps_no_weight_in_full() -> None:
    layer = quantized(nn.Linear(64, 64))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 64, requires_grad=True))
    assert {id(tensor) for tensor in kept} == {id(layer.packed), id(layer.scales)}


def test_a_layer_runs_in_the_type_that_it_is_given_and_in_autocasts() -> None:
    layer = quantized(nn.Linear(64, 4, bias=False))
    images = torch.randn(2, 64, dtype=torch.float64)
    assert torch.equal(layer(images), F.linear(images, layer.weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(images.float()), F.linear(images.float(), layer.weight))


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{"modules": 1}, {"modules": 2, "offload": True, "checkpoint": "blocks"}], ids=repr)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_adapters_and_head_learn_and_no_weight_of_4_bits(kind: str, options: dict[str, Any]) -> None:
    model = adapted(kind)
    plain = make(kind)
    assert num_weights(model) == num_weights(with_adapters(plain, 4, SIZE))
    learner = learner_of(model, **options)
    before = copied(model)
    for images, labels in batches(2):
        learner.step(images, labels)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".lora_" in name for name in changed)
    assert all(".lora_" in name or name.startswith("head.") for name in changed)
    assert {name.removesuffix(".packed") for name in before if name.endswith(".packed")} == {
        name.removesuffix(".lora_A.default.weight") + ".base_layer" for name in before if ".lora_A." in name
    }


def test_local_modules_train_as_beside_plain_weights_of_the_same_values() -> None:
    quantized = adapted()
    rounded = with_adapters(make(), 4, SIZE)
    for layer, twin in zip(rounded.modules(), quantized.modules(), strict=False):
        assert type(layer).__name__ == type(twin).__name__ or isinstance(twin, QuantizedLinear)
        if isinstance(twin, QuantizedLinear):
            layer.weight.data = twin.weight  # type: ignore[union-attr]
    losses = []
    for model in (quantized, rounded):
        torch.manual_seed(0)
        learner = learner_of(model, modules=2)
        losses.append([torch.stack(learner.step(images, labels).losses) for images, labels in batches(2)])
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_plain_weights_are_dequantised_and_merged() -> None:
    model = adapted()
    learner = learner_of(model, modules=1)
    for images, labels in batches(3):
        learner.step(images, labels)
    plain = make()
    plain.load_state_dict(without_adapters(model.state_dict()))
    with torch.no_grad():
        assert torch.allclose(plain.eval()(images), model.eval()(images), atol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{"modules": 1, "checkpoint": "blocks"}, {"modules": 2}], ids=repr)
def test_estimates_count_packed_weights_and_what_is_dequantised(options: dict[str, Any]) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    images, labels = batches(1, num_images=2)[0]
    profiles, peaks = [], []
    for model in (adapted(embed_dim=192, depth=2), with_adapters(make(embed_dim=192, depth=2), 4, SIZE)):
        learner = LocalLearner(split(model, SIZE), objective=FeatureReconstruction(classifier="linear"), **options)
        profiles.append(estimate_step(learner, 2, optimizer))
        learner.configure_optimizers(optimizer)
        gc.collect()
        peaks.append(measured_peak(partial(learner.step, images, labels)))
    packed = sum(layer.num_weights for layer in adapted(embed_dim=192, depth=2).modules() if hasattr(layer, "packed"))
    assert profiles[1].static_bytes - profiles[0].static_bytes == packed * (4 - 0.5625)
    above = profiles[0].peak_bytes - profiles[0].static_bytes
    assert above == pytest.approx(peaks[0], rel=0.1)


@pytest.mark.few(1)
@pytest.mark.parametrize("classifier", ["next", "tail"])
def test_heads_that_copy_blocks_copy_them_in_4_bits(classifier: str) -> None:
    learner = learner_of(adapted(), modules=2, objective=FeatureReconstruction(classifier=classifier))
    copies = [layer for layer in learner.modules[0].objective.modules() if isinstance(layer, QuantizedLinear)]
    assert copies
    images, labels = batches(1)[0]
    assert torch.stack(learner.step(images, labels).losses).isfinite().all()


@pytest.mark.heavy
def test_a_run_goes_on_bit_for_bit_and_ends_in_plain_weights(
    cli_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start = timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict()
    save_file(start, tmp_path / "w.safetensors")
    more = ["--lora", "2", "--quantize", "4bit", "--weights", str(tmp_path / "w.safetensors"), "--modules", "2"]
    more += ["--lr", "0.01", "--set", "training.warmup_epochs=0", "--num-threads", "1"]
    whole = tmp_path / "whole"
    said = cli_("train", *OPTIONS, *more, "--out", str(whole))
    assert said.code == 0, said.err
    assert "--quantize 4bit: " in said.out
    assert "held in 4 bits, which model.safetensors will have dequantised and merged." in said.out
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        with pytest.raises(Interrupted):
            run.train(Recipe.from_toml((whole / "recipe.toml").read_text()), out=tmp_path / "parts")
    run.resume(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", whole)

    trained, best = load_file(whole / "model.safetensors"), load_file(whole / "checkpoints" / "best.safetensors")
    assert trained.keys() == start.keys()
    low, high = (best[f"model.blocks.0.mlp.fc1.lora_{side}.default.weight"] for side in "AB")
    rounded = nearest(start["blocks.0.mlp.fc1.weight"])
    assert torch.allclose(trained["blocks.0.mlp.fc1.weight"], rounded + 2 * (high @ low), atol=1e-6)
    assert not torch.equal(high, torch.zeros_like(high))
    evaluated = cli_("evaluate", str(whole), "--device", "cpu")
    assert f"{json.loads((whole / 'summary.json').read_text())['test_accuracy']:.2%}" in evaluated.out


@pytest.mark.heavy
def test_a_plan_needs_less_and_remembers(cli_: Cli, tmp_path: Path) -> None:
    asked = ["--model", "vit_tiny_patch16_224", "--batch-size", "2", "--device", "cpu", "--lora", "2", "--modules", "1"]
    needs = []
    for more in ([], ["--quantize", "4bit"]):
        file = tmp_path / f"{len(needs)}.json"
        assert cli_("plan", *asked, *more, "--json", str(file)).code == 0
        needs.append(json.loads(file.read_text()))
    assert needs[1]["made_for"]["model.quantize"] == "4bit"
    assert needs[0]["made_for"]["num_parameters"] == needs[1]["made_for"]["num_parameters"]
    assert needs[1]["forecast"]["peak_bytes"] < needs[0]["forecast"]["peak_bytes"]


def test_what_cant_be_is_one_line(cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(cli_("train", *OPTIONS, "--quantize", "4bit"), "--quantize 4bit needs --lora", "add --lora 8")
    assert_refused(cli_("plan", *OPTIONS[2:8], "--quantize", "4bit"), "--quantize 4bit needs --lora")
    assert_refused(cli_("train", *OPTIONS, "--quantize", "8bit", "--lora", "2"), "model.quantize")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    more = ["--quantize", "4bit", "--lora", "2"]
    assert_refused(cli_("train", *OPTIONS, *more), "--quantize 4bit", "pip install 'localgrad[8bit]'")


def test_what_cant_be_in_4_bits_is_refused() -> None:
    fresh = FeatureReconstruction(classifier="next", classifier_options={"weights": "fresh"})
    with pytest.raises(BackboneError, match=r"can't begin anew; take classifier_options.weights 'copy' or 'ema'\.$"):
        LocalLearner(split(adapted(), SIZE), modules=2, objective=fresh)
    odd = nn.ModuleDict({"base_layer": nn.Linear(3, 4)})
    with pytest.raises(
        BackboneError, match="ModuleDict has no adapters in plain linear layers with an even number of inputs"
    ):
        quantize_base(odd)


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleList([nn.ModuleDict({"base_layer": shared}) for _ in range(2)])
    first, second = (part.base_layer for part in quantize_base(copy.deepcopy(model)))
    assert first is second
    assert isinstance(first, QuantizedLinear)


@pytest.mark.parametrize("nested", [False, True])
def test_layers_of_bitsandbytes_below_adapters_are_taken_over(nested: bool) -> None:
    model = make(depth=1, embed_dim=64)  # where a row isn't whole blocks, its own AVX512 kernels are wrong
    for name in ("fc1", "fc2"):
        layer = getattr(model.blocks[0].mlp, name)
        theirs = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, quant_type="nf4", compress_statistics=nested
        )
        theirs.load_state_dict(layer.state_dict())
        setattr(model.blocks[0].mlp, name, theirs.to("cpu"))
    adapted_one = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["fc1", "fc2"], modules_to_save=["head"], lora_alpha=1)
    )
    with pytest.raises(BackboneError, match=r"is of type torch.uint8, .* localgrad.quantize_base\(model\) below"):
        LocalLearner(adapted_one, modules=1, input_size=SIZE)
    images, labels = batches(1)[0]
    expected = adapted_one.train()(
        images
    ).detach()  # nothing is drawn; in eval mode its layers may rearrange themselves
    assert quantize_base(adapted_one) is adapted_one
    assert torch.allclose(adapted_one(images), expected, atol=1e-5)
    learner = LocalLearner(adapted_one, modules=1, input_size=SIZE)
    learner.configure_optimizers(adamw)
    assert torch.stack(learner.step(images, labels).losses).isfinite().all()


def test_layers_that_bitsandbytes_rearranged_are_refused() -> None:
    theirs = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    theirs.load_state_dict(nn.Linear(64, 64).state_dict())
    theirs = theirs.to("cpu")
    assert packed_weight(theirs) is not None
    theirs.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(BackboneError, match=r"in another order.*localgrad\.quantize_base\(model\) before"):
        packed_weight(theirs)


@pytest.mark.parametrize("schedule", ["together", pytest.param("sequential", marks=pytest.mark.heavy)])
def test_optimizers_of_eight_bits_are_planned_and_estimated(schedule: str) -> None:
    """They compute tables of their own when they are made, and keep more beside their state than a copy has."""
    model = make("vit", embed_dim=64)
    factory = OptimizerFactory(model, name="bnbadamw8bit", lr=1e-3, weight_decay=0.05)
    if schedule == "together":
        found = {
            name: forecast_of(localgrad.plan(model, batch_size=8, modules=1, optimizer=make_one, cache=False))
            for name, make_one in (("8bit", factory), ("32bit", torch.optim.AdamW))
        }
        states = {name: forecast.modules[0].by_category["optimizer"] for name, forecast in found.items()}
    else:
        learner = localgrad.LocalLearner(model, modules=2)
        states = {
            name: sum(
                step.by_category["optimizer"] for step in estimate_stages(learner, 8, make_one, torch.device("cpu"))
            )
            for name, make_one in (("8bit", factory), ("32bit", torch.optim.AdamW))
        }
    assert 0.2 < states["8bit"] / states["32bit"] < 0.5, "small tensors keep 32 bits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_stay_in_float32(dtype: torch.dtype) -> None:
    model, images = adapted().eval(), batches(1)[0][0]
    before = {name: scales.clone() for name, scales in model.named_buffers() if name.endswith("scales")}
    model.to(dtype)
    for name, scales in model.named_buffers():
        if name.endswith("scales"):
            assert torch.equal(scales, before[name])
    assert next(model.parameters()).dtype == dtype
    if dtype != torch.float16:
        learner = LocalLearner(split(model, SIZE), modules=2)
        learner.configure_optimizers(adamw)
        assert all(loss.isfinite() for loss in learner.step(images.to(dtype), batches(1)[0][1]).losses)


def test_adapters_on_4_bits_are_exported_merged_and_dequantised(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    model = quantize_base(peft.get_peft_model(make(), config)).eval()
    images = batches(1)[0][0]
    with torch.no_grad():
        expected = model(images)
    done = localgrad.export(model, to="timm", out=tmp_path / "out", example=images)
    weights = load_file(done.path / "model.safetensors")
    plain = make().eval()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-5)


def test_what_bitsandbytes_says_of_a_kernel_that_nobody_calls_is_left_out() -> None:
    check_quantizer()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    said = ("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "Failed to load %s")
    assert [bool(log.filter(logging.makeLogRecord({"msg": each}))) for each in said] == [False, True]


def test_merged_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False))
    model.merge_adapter()
    with pytest.raises(BackboneError, match=r"merged into the weights.* call model.unmerge_adapter\(\) first"):
        quantize_base(model)
    model.unmerge_adapter()
    assert quantize_base(model) is model
