"""Adapters of peft: the model in the wrapper is split, adapters alone learn, and peft saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import localgrad
from helpers import assert_same, copied
from localgrad.errors import BackboneError, RecipeError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
IDS = torch.randint(2, 37, (2, 8), generator=torch.Generator().manual_seed(0))
TOKENS = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
    "labels": IDS.masked_fill(torch.tensor([[False] * 8, [False] * 5 + [True] * 3]), -100),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT)


def adapted(kind: str, **more: Any) -> nn.Module:
    """A model with LoRA in attention; the same weights each time."""
    model, targets = (llama(), ["q_proj", "v_proj"]) if kind == "llama" else (vit(), ["qkv"])
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**(LORA | {"target_modules": targets} | more)))  # type: ignore[no-any-return]


def batch_of(kind: str) -> tuple[Any, ...]:
    if kind == "llama":
        return (TOKENS,)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)


def learner_of(model: nn.Module, kind: str, **more: Any) -> localgrad.LocalLearner:
    where = {"example": TOKENS} if kind == "llama" else {"input_size": (3, 16, 16)}
    learner = localgrad.LocalLearner(model, **where, **more)
    learner.configure_optimizers(lambda params: torch.optim.AdamW(params, lr=1e-2))
    return learner


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_one_module_is_a_plain_loop_over_adapters_bit_for_bit(kind: str) -> None:
    plain, model = adapted(kind), adapted(kind)
    learner = learner_of(model, kind, modules=1)
    assert learner.model is model.get_base_model()
    optimizer = torch.optim.AdamW([weight for weight in plain.parameters() if weight.requires_grad], lr=1e-2)
    batch = batch_of(kind)
    for _ in range(3):
        if kind == "llama":
            loss = plain(**batch[0], use_cache=False).loss
        else:
            loss = nn.functional.cross_entropy(plain(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(learner.step(*batch).losses[0], loss.detach())
    assert_same(copied(model), copied(plain))


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_each_module_trains_its_own_adapters_and_nothing_else_of_the_model(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    count = 2 if kind == "llama" else 4
    learner = learner_of(model, kind, modules=count)
    before = copied(model)
    for _ in range(2):
        result = learner.step(*batch_of(kind))
    assert len(result.losses) == count
    changed = {name for name, value in copied(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in changed)
    held = [{id(weight) for group in each.param_groups for weight in group["params"]} for each in learner.optimizers]
    assert not held[0] & held[1]
    localgrad.check_isolation(learner)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama() if kind == "llama" else vit(), tmp_path)
    with torch.no_grad():
        inputs: Any = {"input_ids": TOKENS["input_ids"]} if kind == "llama" else {"x": batch_of(kind)[0]}
        logits = [logits_of(each.eval()(**inputs)) for each in (model, again)]
    assert torch.equal(*logits)
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved


def logits_of(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def test_a_module_without_adapters_trains_its_auxiliary_nets_or_is_refused() -> None:
    """Adapters in the last block alone; then in the first alone."""
    model = adapted("llama", layers_to_transform=[1])
    learner = learner_of(model, "llama", modules=2)
    before = copied(model)
    auxiliary = copied(learner.modules[0].objective)
    learner.step(TOKENS)
    changed = {name for name, value in copied(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".layers.1." in name for name in changed)
    assert any(not torch.equal(value, auxiliary[name]) for name, value in copied(learner.modules[0].objective).items())
    with pytest.raises(RecipeError, match="local module 1 has no trainable parameter; unfreeze some, or use fewer"):
        learner_of(adapted("llama", layers_to_transform=[0]), "llama", modules=2)


def test_adapters_outside_of_layers_are_refused_in_a_line() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(BackboneError, match=r"PREFIX_TUNING puts virtual tokens .* such as peft\.LoraConfig"):
        localgrad.split(peft.get_peft_model(llama(), config), example=TOKENS)


def test_a_wrapper_that_does_more_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("vit")
    monkeypatch.setattr(type(model), "forward", lambda self, x: self.get_base_model()(x) * 2)
    with pytest.raises(BackboneError, match="PeftModel gives other logits than the model in it"):
        localgrad.split(model, (3, 16, 16))


@pytest.mark.heavy  # what each of the two does is tested by itself
def test_transformers_trainer_trains_saves_and_resumes_adapters(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from localgrad.integrations.hf import LocalTrainer

    def trained(kind: Any, name: str, resume: Path | None = None, **more: Any) -> Any:
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            per_device_train_batch_size=2,
            max_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=1,
        )
        items = [{key: value[number % 2] for key, value in TOKENS.items()} for number in range(8)]
        trainer = kind(adapted("llama"), args, train_dataset=items, **more)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    plain, one = trained(transformers.Trainer, "plain"), trained(LocalTrainer, "one", modules=1)
    assert_same(copied(one.model), copied(plain.model))
    assert {"adapter_model.safetensors", "localgrad.pt"} <= {x.name for x in (tmp_path / "one/checkpoint-1").iterdir()}
    two = trained(LocalTrainer, "two", modules=2)
    resumed = trained(LocalTrainer, "again", tmp_path / "two/checkpoint-1", modules=2)
    assert_same(resumed.learner.state_dict(), two.learner.state_dict())
    assert not torch.equal(flat_of(two.model), flat_of(one.model))


def flat_of(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_merged_adapters_are_told_by_their_cure() -> None:
    """They are not run while they are merged, so that nothing of them learns."""
    cure = r"adapters are merged .* call model\.unmerge_adapter\(\) first\.$"
    model: Any = adapted("vit")
    learner = localgrad.LocalLearner(model, modules=2)
    learner.configure_optimizers(lambda weights: torch.optim.SGD(weights, lr=0.1))
    batch = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    learner.step(*batch)
    model.merge_adapter()
    with pytest.raises(BackboneError, match=cure):
        learner.step(*batch)
    learner.eval()
    assert learner.logits(batch[0])[-1] is not None
    with pytest.warns(UserWarning, match=cure):
        localgrad.split(model)
    model.unmerge_adapter()
    learner.step(*batch)
    assert learner.num_steps == 2
