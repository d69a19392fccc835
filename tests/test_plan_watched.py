"""Plans and estimates of models that only watching splits: outlines, contexts, token losses, models by their config."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import localgrad
from helpers import Cli, adamw, assert_refused, assert_same_run
from localgrad.backbones.base import Backbone, outline, split
from localgrad.backbones.fake import FakeTensor
from localgrad.backbones.shapes import Fresh, given_by
from localgrad.errors import BackboneError, RecipeError
from localgrad.estimating import estimate_step
from localgrad.learner import LocalLearner
from localgrad.memory.costs import CostSettings
from localgrad.memory.parts import measure_costs
from localgrad.objectives import losses, supervised
from localgrad.partition import Plan

transformers = pytest.importorskip("transformers")

BATCH = 6
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def llama_config(**more: Any) -> Any:
    settings = {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    return transformers.LlamaConfig(**{**settings, **more})


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config(**more))  # type: ignore[no-any-return]


def gpt2(**more: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0, **more
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(  # type: ignore[no-any-return]
        transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)
    )


class Dino(nn.Module):
    """Its code keeps a table of coordinates in a cache of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT))
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).pooler_output)  # type: ignore[no-any-return]


def swin() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 2], [1, 2], [4, 4], num_classes=5)  # type: ignore[no-any-return]


def tokens(count: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Items of which each is shorter than the one before; padding stands on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (count, length), generator=generator)
    mask = (torch.arange(length) >= torch.arange(count).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


Made = tuple[Callable[[], nn.Module], Callable[[], Any]]
MODELS: dict[str, Made] = {
    "llama": (llama, tokens),
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)),
        lambda: {"pixel_values": images()},
    ),
    "swin": (swin, images),
    "gpt2": (lambda: gpt2(tie_word_embeddings=False), tokens),
    "bert": (bert, lambda: {key: value for key, value in tokens().items() if key != "labels"}),
    "mixtral": (mixtral, tokens),
    "beit": (
        lambda: transformers.BeitForImageClassification(
            transformers.BeitConfig(**VIT, use_relative_position_bias=True)
        ),
        lambda: {"pixel_values": images()},
    ),
    "dino": (Dino, images),
    "visformer": (
        lambda: timm.create_model(
            "visformer_tiny", img_size=32, init_channels=8, embed_dim=16, depth=(1, 1, 1), num_heads=2, num_classes=5
        ),
        images,
    ),
}
QUICK = ("llama",)
each_model = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in MODELS]
)


def made(name: str) -> tuple[nn.Module, Any]:
    make, example = MODELS[name]
    torch.manual_seed(0)
    return make(), example()


def glued(backbone: Backbone) -> list[bool]:
    return [getattr(block, "glue", None) is not None for block in backbone.blocks]


@each_model
def test_an_outline_is_what_splitting_gives(name: str) -> None:
    """By shapes alone, on the meta device: the same parts, and a step of them takes the same bytes."""
    model, example = made(name)
    drawn, real = outline(model, example=example), split(model, example=example)
    assert all(weight.is_meta for weight in drawn.parameters())
    assert (drawn.block_names, drawn.layouts, glued(drawn)) == (real.block_names, real.layouts, glued(real))
    assert drawn.trunk is not None and real.trunk is not None
    assert drawn.trunk.reads_inputs == real.trunk.reads_inputs
    assert (drawn.num_classes, drawn.num_tokens) == (real.num_classes, real.num_tokens)
    learners = [LocalLearner(each, modules=2) for each in (drawn, real)]
    one, other = (estimate_step(learner, BATCH, adamw).peak_by_label for learner in learners)
    assert one == other
    assert not any(isinstance(weight, FakeTensor) or weight.is_meta for weight in model.parameters())
    learner = learners[1]
    learner.configure_optimizers(adamw)  # what the model's code remembers are real tables again
    batch = example if isinstance(example, dict) else (example,)
    has_labels = isinstance(example, dict) and "labels" in example
    result = learner.step(batch, None if has_labels else learner.loss.made_up(4, real))
    assert all(bool(loss.isfinite()) for loss in result.losses)


@pytest.mark.heavy
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_is_the_real_learners(name: str) -> None:
    model, example = made(name)
    plan = localgrad.plan(model, example=example, batch_size=BATCH, modules=2, cache=False)
    learner = LocalLearner(model, modules=plan, example=example)
    assert plan.forecast is not None
    assert estimate_step(learner, BATCH, adamw).peak_bytes == plan.forecast.peak_bytes
    assert 0.98 < plan.forecast.composed_peak_bytes / plan.forecast.peak_bytes < 1.03


@functools.lru_cache(maxsize=4)
def table(length: int) -> Tensor:
    return torch.linspace(0.0, 1.0, length)


class Remembering(nn.Module):
    """A model whose code remembers a table, in a cache of the process, of whatever tensors are in use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head((x * table(x.shape[-1])).mean(1))  # type: ignore[no-any-return]


@pytest.mark.heavy
def test_tables_that_code_remembers_are_neither_real_among_fakes_nor_fake_afterwards() -> None:
    example = torch.randn(4, 6, 4)
    model = Remembering()
    learner = LocalLearner(model, modules=2, example=example, objective="greedy")
    assert type(table(8)) is Tensor
    peak = estimate_step(learner, 4, adamw).peak_bytes
    assert type(table(8)) is Tensor
    assert (
        estimate_step(LocalLearner(outline(model, example=example), modules=2, objective="greedy"), 4, adamw).peak_bytes
        == peak
    )
    assert type(table(8)) is Tensor


GROUPED = {
    "rows of groups": ((12, 8), (3, 8, 4)),
    "a gradient by weights": ((4, 12), (12, 8)),
    "all groups alike": ((3, 5, 8), (3, 8, 4)),
}


@pytest.mark.parametrize("way", GROUPED)
def test_grouped_products_have_the_shape_that_pytorch_gives(way: str) -> None:
    one, other = (torch.randn(shape) for shape in GROUPED[way])
    ends = None if one.ndim == 3 else torch.tensor([3, 7, 12], dtype=torch.int32)
    arguments = (one, other, ends)
    found = given_by(torch.ops.aten._grouped_mm.default, arguments, {})
    real = torch.ops.aten._grouped_mm.default(*arguments)
    assert isinstance(found, Fresh)
    assert (found.shape, found.dtype) == (tuple(real.shape), real.dtype)
    assert real.untyped_storage().nbytes() == real.numel() * 4


WAYS: dict[str, dict[str, Any]] = {
    "lopt": {"modules": 3, "objective": "lopt"},
    "solo": {"modules": 2, "objective": "solo"},
    "segprop": {"modules": 2, "objective": "segprop"},
    "blocks": {"modules": 2, "checkpoint": "blocks"},
    "chunks": {"modules": 2, "checkpoint": "blocks/8"},
    "parts": {"modules": 2, "accumulation": 2},
    "bf16": {"modules": 2, "precision": "bf16"},
    "chunked logits": {"modules": 2, "chunk_logits": True},
}


@pytest.mark.parametrize(
    "way", [way if way == "chunks" else pytest.param(way, marks=pytest.mark.heavy) for way in WAYS]
)
def test_composed_costs_of_a_language_model_are_those_of_the_whole_step(way: str) -> None:
    model, example = made("llama")
    drawn = outline(model, example=example)
    options = WAYS[way]
    learner = LocalLearner(drawn, **options)
    known = {key: options[key] for key in ("precision", "accumulation", "chunk_logits") if key in options}
    costs = measure_costs(drawn, learner.objective, adamw, CostSettings(batch_size=BATCH, **known))
    assert costs.along >= BATCH * 12 * (12 + 8)  # the mask [B, 1, N, N] of bytes, and what it is made of
    # A module's logits are counted from the beginning of the step on.
    assert 0.98 < costs.peak_of(learner.plan) / estimate_step(learner, BATCH, adamw).peak_bytes < 1.03


def test_a_budget_is_kept_and_the_plan_trains() -> None:
    model, example = made("llama")
    budget = 700_000  # of 1.0 MB that it needs end to end
    plan = localgrad.plan(model, example=example, batch_size=BATCH, budget=budget, cache=False)
    assert plan.forecast is not None and plan.forecast.peak_bytes <= budget
    again = Plan.from_json(plan.to_json())
    learner = LocalLearner(model, modules=again, example=example)
    learner.configure_optimizers(adamw)
    assert localgrad.estimate(learner, BATCH).peak_bytes == plan.forecast.peak_bytes
    whole = {key: value[:1].repeat(BATCH, 1) for key, value in example.items()}
    assert localgrad.estimate(learner, whole).peak_bytes == plan.forecast.peak_bytes
    learner.step(whole)
    longer = {key: torch.cat([value, value], 1) for key, value in example.items()}
    with pytest.raises(RecipeError, match=r"items are \[24\], but this learner was made by an example of \[12\]"):
        localgrad.estimate(learner, longer)
    with pytest.raises(BackboneError, match="there is no attention_mask"):
        localgrad.estimate(learner, {"input_ids": example["input_ids"]})


def test_longer_sequences_than_a_plan_is_of_are_told() -> None:
    torch.manual_seed(0)
    model, short = gpt2(tie_word_embeddings=False), torch.randint(0, 64, (2, 4))
    plan = localgrad.plan(model, example=short, batch_size=2, modules=2, cache=False)
    learner = LocalLearner(model, modules=plan, example=short)
    learner.configure_optimizers(adamw)
    learner.step(short[:, :3], short[:, :3])  # a shorter one needs less
    longer = torch.randint(0, 64, (2, 9))
    with pytest.warns(UserWarning, match=r"input_size \[4\], here \[9\]: its forecast isn't one of this"):
        learner.step(longer, longer)


@pytest.mark.heavy
def test_shared_embeddings_are_counted_once() -> None:
    model = gpt2(tie_word_embeddings=True)
    example = tokens()
    plan = localgrad.plan(model, example=example, batch_size=BATCH, modules=2, shared="last", cache=False)
    learner = LocalLearner(model, modules=plan, example=example, shared="last")
    assert plan.forecast is not None
    assert estimate_step(learner, BATCH, adamw).peak_bytes == plan.forecast.peak_bytes
    assert 0.98 < plan.forecast.composed_peak_bytes / plan.forecast.peak_bytes < 1.03
    with pytest.warns(UserWarning, match="shared 'last', here 'refuse'"):
        LocalLearner(gpt2(tie_word_embeddings=False), modules=plan, example=example)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own use of it
def test_adapters_are_planned_without_state_of_frozen_weights() -> None:
    peft = pytest.importorskip("peft")
    model, example = made("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    plan = localgrad.plan(adapted, example=example, batch_size=BATCH, modules=2, cache=False)
    assert plan.forecast is not None
    learner = LocalLearner(adapted, modules=plan, example=example)
    assert estimate_step(learner, BATCH, adamw).peak_bytes == plan.forecast.peak_bytes
    assert 0.98 < plan.forecast.composed_peak_bytes / plan.forecast.peak_bytes < 1.03


def test_chunks_of_a_batch_see_their_own_masks() -> None:
    """Of items whose masks differ, run a few at a time and recomputed."""
    model, example = made("bert")
    labels = torch.arange(4) % 3
    backbone = split(model.double(), example={key: value[:2] for key, value in example.items()})
    found = []
    for checkpoint in ("none", "blocks/2", "blocks/4"):
        torch.manual_seed(1)
        learner = LocalLearner(copy.deepcopy(backbone), modules=2, checkpoint=checkpoint)
        learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
        losses_seen = learner.step(example, labels).losses
        found.append([*losses_seen, *(weight.detach() for weight in learner.model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


# Logits in chunks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [1, 2])
def test_logits_of_the_models_own_end_are_never_whole(modules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = made("llama")
    backbone = split(model.double(), example=example)
    most = 5 * 64
    for home in (supervised, losses):
        monkeypatch.setattr(home, "WHOLE", most)
    monkeypatch.setattr(losses.in_chunks, "__kwdefaults__", {"label_smoothing": 0.0, "whole": most})
    seen, found = [], []
    for chunked in (False, True):
        torch.manual_seed(1)
        learner = LocalLearner(copy.deepcopy(backbone), modules=modules, objective="lopt", chunk_logits=chunked)
        learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
        head: Any = learner.model.lm_head  # type: ignore[union-attr]
        sizes: list[int] = []
        forward = head.forward
        head.forward = lambda given, sizes=sizes, forward=forward: sizes.append(given[..., 0].numel()) or forward(given)
        results = [learner.step(example), learner.global_step(example)]
        seen.append(sizes)
        assert [result.logits is None for result in results] == [chunked, chunked]
        found.append([results[0].losses, results[1].losses, [w.detach() for w in learner.model.parameters()]])
        learner.eval()
        assert learner.logits(example)[-1].shape == (4, 12, 64)  # type: ignore[union-attr]
    assert max(seen[0]) == 48 and set(seen[1]) <= {5, 3, 48}
    assert seen[1].count(48) == 1, "only where logits are asked for"
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.heavy
def test_chunked_logits_save_memory_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(vocab_size=4096)
    example = tokens(length=32)
    for home in (supervised, losses):
        monkeypatch.setattr(home, "WHOLE", 2**15)
    monkeypatch.setattr(losses.in_chunks, "__kwdefaults__", {"label_smoothing": 0.0, "whole": 2**15})
    whole, chunked = (
        localgrad.plan(model, example=example, batch_size=8, modules=1, chunk_logits=each, cache=False).forecast
        for each in (False, True)
    )
    assert whole is not None and chunked is not None
    logits = 8 * 32 * 4096 * 4
    assert whole.peak_bytes - chunked.peak_bytes > logits
    assert 0.98 < chunked.composed_peak_bytes / chunked.peak_bytes < 1.02


class Scaled(nn.Module):
    """Its logits are scaled behind the last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return 0.5 * self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.heavy
def test_what_ends_otherwise_has_no_chunks_of_logits() -> None:
    with pytest.raises(RecipeError, match="chunk_logits: Scaled does something behind its last linear layer"):
        LocalLearner(Scaled(), modules=2, example=tokens(), loss="next-token", chunk_logits=True)
    model, example = made("vit")
    with pytest.raises(RecipeError, match="chunk_logits: it is of logits of tokens"):
        LocalLearner(model, modules=2, example=example, chunk_logits=True)
    hooked = llama()
    hooked.lm_head.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, operator]
    with pytest.raises(RecipeError, match="chunk_logits: LlamaForCausalLM has hooks on its last layer"):
        LocalLearner(hooked, modules=2, example=tokens(), chunk_logits=True)


# The command line --------------------------------------------------------------------------------------------------

TEXT = ("--sequence-length", "12", "--batch-size", str(BATCH), "--device", "cpu", "--no-cache", "--modules", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder in the official form, without weights."""
    llama_config().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.heavy
def test_a_config_is_planned_and_its_model_trains_by_the_plan(folder: Path, tmp_path: Path, cli_: Cli) -> None:
    out = tmp_path / "plan.json"
    said = cli_("plan", "--model", f"hf:{folder}", *TEXT, "--json", str(out))
    assert said.code == 0, said
    assert "LlamaForCausalLM, 12 tokens, 64 classes, batch 6, fp32" in said.out
    assert "LocalLearner(model, modules=Plan.from_json" in said.out.replace("\n", "")
    plan = Plan.from_json(out.read_text())
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    learner = LocalLearner(model, modules=plan, example={k: v for k, v in tokens().items() if k != "labels"})
    assert plan.forecast is not None
    assert localgrad.estimate(learner, BATCH, optimizer=adamw).peak_bytes == plan.forecast.peak_bytes
    assert_refused(cli_("train", "--plan", str(out)), "is planned here, and trained in Python", f"--model hf:{folder}")


@pytest.mark.heavy
def test_images_are_planned_of_a_config(tmp_path: Path, cli_: Cli) -> None:
    transformers.ViTConfig(**VIT, architectures=["ViTForImageClassification"]).save_pretrained(tmp_path / "vit")
    options = ("--batch-size", "4", "--device", "cpu", "--no-cache", "--num-classes", "7", "--img-size", "64")
    said = cli_("plan", "--model", f"hf:{tmp_path / 'vit'}", *options)
    assert said.code == 0 and "ViTForImageClassification, 64x64, 7 classes, batch 4" in said.out, said


def test_what_a_config_cannot_be_planned_for_is_one_line(folder: Path, tmp_path: Path, cli_: Cli) -> None:
    def refused(*options: str, model: Path = folder) -> Callable[..., None]:
        said = cli_("plan", "--model", f"hf:{model}", "--device", "cpu", *options)
        return lambda *words: assert_refused(said, *words)

    refused()("--sequence-length", "take --sequence-length 512")
    refused("--sequence-length", "65")("--sequence-length 65", "takes 2 to 64, as its config says")
    refused("--sequence-length", "8", "--task", "causal")(
        "--task: unknown 'causal'; take causal-lm", "Nearest: causal-lm"
    )
    refused("--sequence-length", "8", "--img-size", "8")("--img-size", "is given tokens")
    refused("--sequence-length", "8", "--num-classes", "8")("--num-classes", "its vocabulary")
    refused("--sequence-length", "8", "--patch-size", "8")("--patch-size 8 doesn't go with --model hf:")
    refused("--sequence-length", "8", "--task", "image-classification")("is given images")
    refused("--sequence-length", "8", "--blocks", "model.embed_tokens")(
        "--blocks model.embed_tokens", "calls no module"
    )
    refused("--sequence-length", "8", "--set", "model.options.dtype=float16")("float16, in which updates get lost")
    refused("--sequence-length", "8", model=tmp_path / "nowhere")("there is no such folder")
    refused("--sequence-length", "8", model=tmp_path)("can't read a config there")
    llama_config(architectures=["LlamaModel"]).save_pretrained(tmp_path / "headless")
    refused("--sequence-length", "8", model=tmp_path / "headless")("--task: take causal-lm", "names LlamaModel")
    assert_refused(cli_("plan", "--model", "vit_tiny_patch16_224", "--sequence-length", "8"), "leave it out")


VISFORMER: dict[str, Any] = {
    "model": {
        "name": "visformer_tiny",
        "img_size": 32,
        "options": {"init_channels": 8, "embed_dim": 16, "depth": [1, 1, 1], "num_heads": 2},
    },
    "data": {"name": "digits", "limit": 32},
    "training": {"epochs": 1, "batch_size": 16, "warmup_epochs": 0},
    "execution": {"device": "cpu", "num_threads": 1},
}


@pytest.mark.heavy
def test_a_timm_model_that_only_watching_splits_trains_to_a_budget(tmp_path: Path) -> None:
    """Planned, and trained bit for bit as without a planner."""
    planned = {**VISFORMER, "local": {"modules": "auto"}}
    localgrad.train(planned, out=tmp_path / "planned", budget="600KiB", cache=False)
    plan = json.loads((tmp_path / "planned" / "plan.json").read_text())
    assert plan["forecast"]["peak_bytes"] <= 600 * 1024
    own = {"modules": plan["boundaries"] or 1}
    execution = {**VISFORMER["execution"], "checkpoint": plan["checkpoint"], "accumulation": plan["accumulation"]}
    localgrad.train({**VISFORMER, "local": own, "execution": execution}, out=tmp_path / "plain")
    assert_same_run(tmp_path / "planned", tmp_path / "plain")
