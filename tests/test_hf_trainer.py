"""``LocalTrainer``: one module is transformers' Trainer itself; several are trained, logged, saved and resumed."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import assert_same, copied
from localgrad.errors import CheckpointError, LocalgradError, RecipeError

if TYPE_CHECKING:
    from simulated import SimulatedCard

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from localgrad.integrations.hf import FILE, LocalTrainer  # noqa: E402  # it needs both

VOCABULARY, LENGTH = 37, 8
Item = dict[str, Any]


def llama(**more: Any) -> nn.Module:
    options = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=32, **(options | more)
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


def sentences(count: int = 11) -> list[Item]:
    """Token ids of several lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, LENGTH + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def padded(items: list[Item]) -> dict[str, Tensor]:
    """A batch as long as its longest item."""
    longest = max(len(item["input_ids"]) for item in items)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([[*item[name], *[value] * (longest - len(item[name]))] for item in items])

    mask = [[1] * len(item["input_ids"]) + [0] * (longest - len(item["input_ids"])) for item in items]
    return {"input_ids": filled("input_ids", 0), "attention_mask": torch.tensor(mask), "labels": filled("labels", -100)}


def pictures(count: int = 11) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": n % 3} for n in range(count)]


MODELS = {"llama": llama, "vit": vit}
DATA: dict[str, dict[str, Any]] = {
    "llama": {"train_dataset": sentences(), "eval_dataset": sentences(4), "data_collator": padded},
    "vit": {"train_dataset": pictures(), "eval_dataset": pictures(4)},
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]()


def arguments(folder: Path, **more: Any) -> Any:
    options: dict[str, Any] = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **(options | more))


def local(kind: str, folder: Path, model: nn.Module | None = None, *, modules: Any = 2, **more: Any) -> LocalTrainer:
    """A trainer of local modules; keywords that TrainingArguments don't have are the trainer's own."""
    fields = set(transformers.TrainingArguments.__dataclass_fields__)
    args = {name: value for name, value in more.items() if name in fields}
    own = {name: value for name, value in more.items() if name not in fields}
    return LocalTrainer(
        made(kind) if model is None else model, arguments(folder, **args), modules=modules, **(DATA[kind] | own)
    )


def plain(kind: str, folder: Path, **more: Any) -> Any:
    return transformers.Trainer(made(kind), arguments(folder, **more), **DATA[kind])


def logged(trainer: Any, *names: str) -> list[list[float]]:
    return [[entry[name] for name in names] for entry in trainer.state.log_history if names[0] in entry]


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3, "logging_steps": 2, "max_grad_norm": 0.1, "num_train_epochs": 2},
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2},
    "scheduled": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.0, "optim": "sgd"},
    "recomputed": {"gradient_checkpointing": True},
    "noisy": {"neftune_noise_alpha": 5.0},
}
QUICK = {("llama", "accumulated"), ("vit", "bf16")}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=() if (kind, way) in QUICK else pytest.mark.heavy)
        for way in WAYS
        for kind in MODELS
        if (kind, way) != ("vit", "noisy")  # it is of token embeddings
    ],
)
def test_one_module_is_transformers_trainer_bit_for_bit(kind: str, way: str, tmp_path: Path) -> None:
    """Dropout, padding, clipping, a last update of fewer batches; before and after training."""
    options = WAYS[way] | ({"max_steps": -1} if "num_train_epochs" in WAYS[way] else {})
    reference, trainer = plain(kind, tmp_path, **options), local(kind, tmp_path, modules=1, **options)
    for each in (reference, trainer):
        transformers.set_seed(7)
        each.evaluate()
        each.train()
        each.evaluate()
    assert_same(copied(trainer.model), copied(reference.model))
    assert logged(trainer, "loss", "learning_rate") == logged(reference, "loss", "learning_rate")
    assert logged(trainer, "train_loss") == logged(reference, "train_loss")
    assert logged(trainer, "eval_loss") == logged(reference, "eval_loss")
    is_clipped = options.get("max_grad_norm") != 0
    assert logged(trainer, "grad_norm") == (logged(reference, "grad_norm") if is_clipped else [])


def test_several_modules_train_by_one_schedule_and_log_their_losses(tmp_path: Path) -> None:
    trainer = local("llama", tmp_path, gradient_accumulation_steps=2, warmup_steps=2, lr_scheduler_type="linear")
    before = copied(trainer.model)
    trainer.train()
    assert len(trainer.learner.optimizers) == 2
    assert all(isinstance(optimizer, torch.optim.AdamW) for optimizer in trainer.learner.optimizers)
    rates = {group["lr"] for optimizer in trainer.learner.optimizers for group in optimizer.param_groups}
    assert rates == {trainer.lr_scheduler.get_last_lr()[0]} == {0.0}, "the schedule ends at 0"
    assert [rate for (rate,) in logged(trainer, "learning_rate")] == [0.0, 0.005, 0.01, 0.005]
    for loss, first, last in logged(trainer, "loss", "loss/module_0", "loss/module_1"):
        assert loss == pytest.approx(last, rel=1e-6)
        assert first > 0
    for norm, first, last in logged(trainer, "grad_norm", "grad_norm/module_0", "grad_norm/module_1"):
        assert norm == pytest.approx((first**2 + last**2) ** 0.5)
        assert min(first, last) > 0
    still = {name for name, value in copied(trainer.model).items() if torch.equal(value, before[name])}
    assert not still
    decays = [group["weight_decay"] for group in trainer.learner.optimizer.param_groups]
    assert decays == [0.1, 0.0] * 2
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (4, LENGTH, VOCABULARY)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "save_steps": 2}),
        ("vit", {"save_steps": 1, "max_steps": 2}),  # saved by other names than Trainer loads it by
        pytest.param("llama", {"bf16": True, "objective": "lopt", "save_steps": 3}, marks=pytest.mark.heavy),
    ],
    ids=["llama", "vit", "llama in bf16"],
)
def test_resuming_goes_on_bit_for_bit(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "max_steps": 4, **more}
    whole = local(kind, tmp_path / "whole", **more)
    whole.train()
    folder = tmp_path / "whole" / f"checkpoint-{more['save_steps']}"
    assert (folder / FILE).is_file()
    torch.manual_seed(99)  # whatever was drawn before
    resumed = local(kind, tmp_path / "resumed", **more)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same(resumed.learner.state_dict(), whole.learner.state_dict())
    assert logged(resumed, "loss", "loss/module_0") == logged(whole, "loss", "loss/module_0")


@pytest.mark.heavy  # whatever is shared, a checkpoint is as of any model
@pytest.mark.parametrize("shared", ["last", "average"])
def test_tied_embeddings_resume_bit_for_bit(shared: str, tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "shared": shared, "objective": "lopt"}
    with pytest.raises(LocalgradError, match="shared"):
        local("llama", tmp_path, llama(tie_word_embeddings=True)).train()
    torch.manual_seed(0)
    whole = local("llama", tmp_path / "whole", llama(tie_word_embeddings=True), **more)
    whole.train()
    resumed = local("llama", tmp_path / "again", llama(tie_word_embeddings=True), **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(resumed.learner.state_dict(), whole.learner.state_dict())
    assert whole.model.lm_head.weight is whole.model.get_input_embeddings().weight


IN_FP16 = """
import json, torch, transformers
from localgrad.integrations.hf import LocalTrainer

config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    image_size=8, patch_size=4, num_labels=3)
generator = torch.Generator().manual_seed(0)
data = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": n % 3} for n in range(11)]

def trained(kind, name, resume=None, **more):
    torch.manual_seed(0)
    args = transformers.TrainingArguments(output_dir=name, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        fp16=True, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, logging_steps=1, save_steps=2,
        gradient_accumulation_steps=2)
    trainer = kind(transformers.ViTForImageClassification(config), args, train_dataset=data, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer

facts = {}
for name, kind, more in [("plain", transformers.Trainer, {}), ("one", LocalTrainer, {"modules": 1})]:
    facts[name] = [entry["loss"] for entry in trained(kind, name, **more).state.log_history if "loss" in entry]
two = trained(LocalTrainer, "two", modules=2)
resumed = trained(LocalTrainer, "again", "two/checkpoint-2", modules=2)
facts["device"] = str(two.learner.device)
facts["scales"] = [scaler["scale"] for scaler in two.learner.state_dict()["scalers"]]
mine, theirs = (list(trainer.model.state_dict().values()) for trainer in (two, resumed))
facts["same"] = all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
facts["same"] &= two.learner.state_dict()["scalers"] == resumed.learner.state_dict()["scalers"]
print("facts " + json.dumps(facts))
"""


@pytest.mark.heavy  # a process starts
def test_in_fp16_each_module_has_its_loss_scale_and_resumes_with_it(simulated: SimulatedCard) -> None:
    """Trainer takes fp16 on cards only. (Simulated ones compute a softmax in fp16 that real ones compute in fp32.)"""
    said = simulated.run(IN_FP16, values=True)
    facts = json.loads(next(line for line in said.splitlines() if line.startswith("facts ")).removeprefix("facts "))
    assert facts["device"] == "cuda:0"
    assert facts["one"] == pytest.approx(facts["plain"], rel=2e-3)
    assert len(facts["scales"]) == 2
    assert min(facts["scales"]) < 65536, "first updates overflow, and are held back"
    assert facts["same"]


def test_what_can_not_be_resumed_is_refused_in_a_line(tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = local("vit", tmp_path, **more)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(CheckpointError, match=r"boundaries \[1\], this learner \[\]; give the same modules"):
        local("vit", tmp_path, modules=1, **more).train(resume_from_checkpoint=str(folder))
    torch.save({**torch.load(folder / FILE), "digest": "other"}, folder / FILE)
    with pytest.raises(CheckpointError, match=r"aren't those that were saved with localgrad\.pt"):
        local("vit", tmp_path, **more).train(resume_from_checkpoint=str(folder))
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no localgrad\.pt, so that training can't go on"):
        local("vit", tmp_path, **more).train(resume_from_checkpoint=str(folder))


BEST = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 2}
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}


def test_the_best_model_is_loaded_and_saved_as_trainers(tmp_path: Path) -> None:
    trainer = local("vit", tmp_path, **BEST)
    trainer.train()
    losses = [loss for (loss,) in logged(trainer, "eval_loss")]
    assert losses[0] > losses[1], "that it isn't the last one shows what is loaded"
    assert trainer.evaluate()["eval_loss"] == losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert_same(copied(again), copied(trainer.model))


@pytest.mark.parametrize("way", ["of two dtypes", "another head"])
def test_the_best_model_is_the_saved_one_to_the_bit(way: str, tmp_path: Path) -> None:
    """Where Trainer has loaded it, the library has nothing to add."""
    model = made("llama")
    if way == "another head":
        model.lm_head = nn.Sequential(nn.Dropout(0.1), model.lm_head)  # type: ignore[assignment]
    else:
        model.to(torch.bfloat16)
        model.lm_head.float()  # type: ignore[operator,union-attr]
        model.model.norm.float()  # type: ignore[operator,union-attr]
    trainer = local("llama", tmp_path, model, **BEST)
    trainer.train()
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert_same({name: value for name, value in copied(model).items() if name in saved}, saved)


def test_what_the_library_makes_otherwise_is_refused_in_a_line(tmp_path: Path) -> None:
    """A ViT's file has other names than its modules, so that Trainer misses them."""
    model = made("vit")
    width = model.classifier.in_features  # type: ignore[union-attr]
    model.classifier = nn.Sequential(nn.LayerNorm(width), model.classifier)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"parts of it were replaced \(classifier\.") as caught:
        local("vit", tmp_path, model, **BEST).train()
    assert "\n" not in str(caught.value)


def test_evaluation_has_the_loss_that_is_trained_on(tmp_path: Path) -> None:
    def seven(logits: Tensor, labels: Tensor) -> Tensor:
        return 7 * nn.functional.cross_entropy(logits, labels)

    trainer = local("vit", tmp_path, max_steps=1, loss=seven)
    trainer.train()
    batch = trainer.data_collator(pictures(2))
    with torch.no_grad():
        expected = seven(trainer.model.eval()(batch["pixel_values"]).logits, batch["labels"])
    assert trainer.evaluate(pictures(2))["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


class Bare(nn.Module):
    """It takes no labels, and gives logits in one of the ways that models do."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.of, self.gives = vit(), gives

    def forward(self, pixel_values: Tensor) -> Any:
        logits = self.of(pixel_values).logits
        return {"dict": {"logits": logits}, "tuple": (logits,), "tensor": logits}[self.gives]


@pytest.mark.parametrize("gives", ["dict", "tuple", "tensor"])
def test_models_that_take_no_labels_are_evaluated(gives: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found)
        return {}

    trainer = local(
        "vit",
        tmp_path,
        Bare(gives),
        max_steps=1,
        loss="cross-entropy",
        compute_metrics=metrics,
        remove_unused_columns=False,
    )
    trainer.train()
    images = pictures(5)
    found = trainer.evaluate(images)
    batch = trainer.data_collator(images)
    with torch.no_grad():
        expected = trainer.model.of.eval()(batch["pixel_values"]).logits
    torch.testing.assert_close(torch.as_tensor(seen[-1].predictions), expected, rtol=1e-4, atol=1e-5)
    assert seen[-1].label_ids.tolist() == batch["labels"].tolist()
    assert found["eval_loss"] == pytest.approx(float(nn.functional.cross_entropy(expected, batch["labels"])), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible:UserWarning")
def test_labels_of_several_classes_are_not_smoothed(tmp_path: Path) -> None:
    """As Trainer says itself."""
    data = [{**item, "labels": nn.functional.one_hot(torch.tensor(item["labels"]), 3).float()} for item in pictures()]
    losses = []
    for smoothing in (0.0, 0.3):
        model = made("vit")
        model.config.problem_type = "multi_label_classification"  # type: ignore[union-attr]
        trainer = local(
            "vit", tmp_path, model, modules=1, label_smoothing_factor=smoothing, max_steps=2, train_dataset=data
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_the_models_own_checkpointing_stays_off(tmp_path: Path) -> None:
    """Trainer has it on anew at the beginning of every training."""
    trainer = local("llama", tmp_path, max_steps=1, gradient_checkpointing=True, checkpoint="none")
    calls: list[int] = []
    trainer.learner.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(0))  # type: ignore[union-attr,index]
    for _ in range(2):
        calls.clear()
        trainer.train()
        assert len(calls) == 1


def test_an_example_has_labels_that_count(tmp_path: Path) -> None:
    class Five(nn.Module):
        """Its own loss is five times what it seems."""

        def __init__(self) -> None:
            super().__init__()
            self.of = vit()

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.of(pixel_values).logits
            return {"logits": logits} if labels is None else {"loss": 5 * self.loss(logits, labels), "logits": logits}

        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits, labels)

    none = [{**item, "labels": -100} for item in pictures(4)]
    with pytest.raises(RecipeError, match=r"loss: Five's own of the example is .* give loss="):
        local("vit", tmp_path, Five(), max_steps=1, train_dataset=[*none, *pictures()]).train()
    with pytest.raises(RecipeError, match="example: no label of it counts"):
        local("vit", tmp_path, Five(), max_steps=1, train_dataset=none).train()


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Items one after another: of a list again and again, of a generator once."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        yield from self.items


def test_a_data_set_that_can_be_read_once_loses_no_batch_to_the_example(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"example: Stream can be read once, .*; give example=") as refused:
        local("vit", tmp_path, train_dataset=Stream(iter(pictures()))).train()
    assert "\n" not in str(refused.value)
    seen: list[Any] = []

    def noting(items: list[Item]) -> Any:
        seen.extend(items)
        return transformers.default_data_collator(items)

    items = pictures(8)
    example = transformers.default_data_collator(items[:2])
    local("vit", tmp_path, train_dataset=Stream(iter(items)), example=example, data_collator=noting).train()
    assert [item["labels"] for item in seen] == [item["labels"] for item in items]
    local("vit", tmp_path, train_dataset=Stream(items), max_steps=1).train()


def test_smoothed_labels_are_the_objectives(tmp_path: Path) -> None:
    options = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2, "optim": "sgd"}
    reference, trainer = plain("llama", tmp_path, **options), local("llama", tmp_path, modules=1, **options)
    for each in (reference, trainer):
        each.train()
    torch.testing.assert_close(copied(trainer.model), copied(reference.model), rtol=1e-5, atol=1e-6)
    ours, theirs = logged(trainer, "loss"), logged(reference, "loss")
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def test_a_model_made_anew_is_split_anew(tmp_path: Path) -> None:
    trainer = LocalTrainer(
        args=arguments(tmp_path, max_steps=1), modules=2, model_init=lambda: made("vit"), **DATA["vit"]
    )
    for _ in range(2):
        trainer.train()
        assert trainer.learner.model is trainer.model
        assert trainer.learner.num_steps == 1


def test_the_example_draws_no_random_numbers(tmp_path: Path) -> None:
    trainer = local("llama", tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert trainer.learner.seed == 5
    assert torch.equal(torch.get_rng_state(), before)


class Odd(nn.Module):
    """Its own loss is none that localgrad has."""

    def __init__(self) -> None:
        super().__init__()
        self.of = vit()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.of(pixel_values).logits
        return {"logits": logits} if labels is None else {"loss": logits.square().mean(), "logits": logits}


def test_a_model_with_another_loss_is_refused_unless_one_is_given(tmp_path: Path) -> None:
    trainer = local("vit", tmp_path, Odd(), max_steps=1)
    with pytest.raises(RecipeError, match=r"loss: Odd's own of the example is .* give loss="):
        trainer.train()
    trainer = local("vit", tmp_path, Odd(), max_steps=1, loss="cross-entropy")
    trainer.train()
    assert trainer.learner.num_steps == 1


class Own(nn.Module):
    """Its own loss is a criterion's, of logits as they are before training: nearly alike."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.of, self.criterion = made("vit"), criterion
        self.of.classifier.weight.data *= 1e-3  # type: ignore[union-attr,operator]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.of(pixel_values).logits
        return (
            {"logits": logits} if labels is None else {"loss": self.criterion(logits, labels).mean(), "logits": logits}
        )


def pictures_in(dtype: torch.dtype) -> list[Item]:
    return [{**item, "pixel_values": item["pixel_values"].to(dtype)} for item in pictures()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("criterion", "is_other"),
    [
        (nn.CrossEntropyLoss(), False),
        (nn.CrossEntropyLoss(reduction="none"), False),
        (nn.CrossEntropyLoss(label_smoothing=0.1), True),
        (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"), True),
        (nn.CrossEntropyLoss(label_smoothing=0.005), True),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0])), True),
    ],
    ids=["plain", "of each", "smoothed", "smoothed of each", "smoothed a little", "weighted"],
)
def test_a_loss_that_only_seems_the_models_own_is_refused(
    criterion: nn.Module, is_other: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = Own(copy.deepcopy(criterion)).to(dtype)
    trainer = local("vit", tmp_path, model, train_dataset=pictures_in(dtype))
    if is_other:
        with pytest.raises(RecipeError, match=r"loss: Own's own of the example is .* give loss="):
            _ = trainer.learner
    else:
        assert trainer.learner.model is model


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(  # type: ignore[no-any-return]
        transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3, **sizes)
    )


@pytest.mark.parametrize("scale", [1.0, 1e3], ids=["unsure", "sure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "vit", "bert"])
def test_losses_of_transformers_are_the_models_own(kind: str, dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert() if kind == "bert" else made(kind)
    (model.lm_head if kind == "llama" else model.classifier).weight.data *= scale  # type: ignore[union-attr,operator]
    texts = [{"input_ids": item["input_ids"][:3], "labels": n % 3} for n, item in enumerate(sentences())]
    data = {"llama": sentences(), "vit": pictures_in(dtype), "bert": texts}[kind]
    more = {} if kind == "bert" else DATA[kind]
    trainer = LocalTrainer(
        model.to(dtype), arguments(tmp_path), modules=2, **(more | {"train_dataset": data, "eval_dataset": None})
    )
    before = copied(model)
    assert trainer.learner.model is model
    assert_same(copied(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def of_sum(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    raise AssertionError("not called")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"torch_compile": True}, "torch_compile=True: it doesn't go with local modules: it compiles the whole model"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True: it doesn't go"),
    ({"use_cache": True}, "use_cache=True: it doesn't go with local modules: they keep no keys and values"),
    ({"auto_find_batch_size": True}, r"auto_find_batch_size=True: .* localgrad\.plan says beforehand"),
    ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True: .* it saves in the middle of an update"),
    (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        "activation_checkpointing_kwargs: local modules recompute by themselves",
    ),
    ({"compute_loss_func": of_sum}, "compute_loss_func: each module has a loss of its own logits; give loss="),
    ({"optimizers": (torch.optim.SGD(nn.Linear(1, 1).parameters()), None)}, "optimizers: one of the whole model"),
    ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "optim"),
    ({"objective": "none such"}, "none such"),
    ({"modules": 9}, "9"),
    ({"loss": "binary"}, "loss"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_go_with_local_modules_is_refused_in_a_line(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((LocalgradError, ImportError), match=message) as refused:
        local("llama", tmp_path, max_steps=1, **more).train()
    assert "\n" not in str(refused.value)


def test_deepspeed_and_fsdp_are_refused_by_name(tmp_path: Path) -> None:
    """Both are refused by TrainingArguments themselves on such a machine; as they would be where they work."""
    for name, value in (("deepspeed", {"stage": 2}), ("fsdp", "full_shard"), ("parallelism_config", object())):
        args = arguments(tmp_path)
        setattr(args, name, value)
        with pytest.raises(RecipeError, match=f"{name}=.*doesn't go with local modules"):
            LocalTrainer(made("vit"), args, **DATA["vit"])


class OwnStep(LocalTrainer):
    def compute_loss(self, *args: Any, **more: Any) -> Any:
        raise AssertionError("not called")


def test_methods_that_would_not_be_called_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"OwnStep\.compute_loss: local modules train without it; give loss="):
        OwnStep(made("vit"), arguments(tmp_path), **DATA["vit"])


@pytest.mark.parametrize("first", [False, True], ids=["instead", "afterwards"])
def test_an_optimizer_of_the_whole_model_in_place_of_the_modules_own_is_refused(first: bool, tmp_path: Path) -> None:
    """It would have the schedule, and train nothing."""

    class Own(LocalTrainer):  # type: ignore[misc]
        def create_optimizer(self, *_: Any) -> Any:
            if first:
                super().create_optimizer()
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    trainer = Own(made("vit"), arguments(tmp_path), modules=2, **DATA["vit"])
    with pytest.raises(RecipeError, match=r"Own has a AdamW of its own.*self\.learner\.configure_optimizers"):
        trainer.train()


def test_a_create_optimizer_that_makes_each_modules_own_trains_by_them(tmp_path: Path) -> None:
    class Own(LocalTrainer):  # type: ignore[misc]
        def create_optimizer(self, *_: Any) -> Any:
            self.learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.5))
            self.optimizer = self.learner.optimizer
            return self.optimizer

    trainer = Own(made("vit"), arguments(tmp_path, max_steps=2), modules=2, **DATA["vit"])
    trainer.train()
    assert [rate for (rate,) in logged(trainer, "learning_rate")] == [0.5, 0.25]


def test_several_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("n_gpu", "world_size"):
        with monkeypatch.context() as patch, pytest.raises(RecipeError, match=f"{name}=2: LocalTrainer trains in one"):
            patch.setattr(transformers.TrainingArguments, name, property(lambda _: 2))
            LocalTrainer(made("vit"), arguments(tmp_path), **DATA["vit"])


def test_names_of_trainer_that_are_not_public_are_called_as_this_file_relies_on(tmp_path: Path) -> None:
    """What ``integrations/hf.py`` overrides: Trainer calls each, with these arguments; and Accelerate's wrapping."""
    called: list[tuple[str, tuple[Any, ...]]] = []

    class Noting(LocalTrainer):
        def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
            found = super()._build_accelerator_args(**kwargs)
            called.append(("_build_accelerator_args", tuple(type(each).__name__ for each in found["kwargs_handlers"])))
            return found

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            called.append(("_save_optimizer_and_scheduler", (Path(output_dir).name,)))
            super()._save_optimizer_and_scheduler(output_dir)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            called.append(("_load_optimizer_and_scheduler", (Path(str(checkpoint)).name,)))
            super()._load_optimizer_and_scheduler(checkpoint)

    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, bf16=True)
    Noting(made("vit"), args, modules=2, **DATA["vit"]).train()
    trainer = Noting(made("vit"), args, modules=2, **DATA["vit"])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    handlers = ("_build_accelerator_args", ("DistributedDataParallelKwargs", "GradScalerKwargs"))
    assert called[0] == handlers
    assert ("_save_optimizer_and_scheduler", ("checkpoint-1",)) in called
    assert ("_load_optimizer_and_scheduler", ("checkpoint-1",)) in called
    assert {"forward", "_original_forward"} <= vars(trainer.model).keys(), "in bf16 Accelerate wraps it"
    saved = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert [group["local_module"] for group in saved["param_groups"]] == [0, 0, 1, 1]
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1


def test_without_transformers_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "localgrad.integrations.hf")
    with pytest.raises(ImportError, match=r"needs transformers and accelerate .*pip install 'localgrad\[hf\]'") as told:
        importlib.import_module("localgrad.integrations.hf")
    assert "\n" not in str(told.value)
