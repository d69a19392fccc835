"""Language models by local modules: labels of tokens, padding, lengths, and every auxiliary head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localgrad
from localgrad.backbones.base import Backbone, split
from localgrad.backbones.example import Example
from localgrad.errors import BackboneError, RecipeError
from localgrad.learner import LocalLearner
from localgrad.objectives import losses, supervised
from localgrad.objectives.carried import LocalBatch, mask_of
from localgrad.objectives.methods import FeatureReconstruction, GreedySupervised, Lopt, Objective, Segprop, Solo
from localgrad.objectives.readouts import ReadoutClassifier

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, WIDTH = 61, 10, 32
Batch = dict[str, Tensor]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=4,
        n_head=2,
        n_positions=64,
        tie_word_embeddings=False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert}
_split: dict[str, Backbone] = {}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]()


def batch_of(kind: str, *, seed: int = 0, items: int = 4, length: int = LENGTH, padding: int = 0) -> Batch:
    """Items of which the later ones are shorter; so much more padding beside."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (items, length), generator=generator)
    lengths = torch.linspace(length, length // 2, items).long()
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    labels = torch.randint(3, (items,), generator=generator) if kind == "bert" else ids.masked_fill(mask == 0, -100)
    ids = F.pad(ids.masked_fill(mask == 0, 1), (0, padding), value=1)
    labels = labels if kind == "bert" else F.pad(labels, (0, padding), value=-100)
    return {"input_ids": ids, "attention_mask": F.pad(mask, (0, padding)), "labels": labels}


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def learner_of(
    kind: str, modules: int = 2, objective: Objective | str | None = None, *, double: bool = False, **more: Any
) -> LocalLearner:
    """A learner of a copy of a model that is split once."""
    if kind not in _split:
        _split[kind] = split(make(kind), example=batch_of(kind))
    backbone = copy.deepcopy(_split[kind])
    torch.manual_seed(1)
    learner = LocalLearner(backbone.double() if double else backbone, modules=modules, objective=objective, **more)
    learner.configure_optimizers(sgd)
    return learner


def weights_of(learner: LocalLearner) -> dict[str, Tensor]:
    """Of the model and of the auxiliary nets, copied."""
    found = dict(learner.model.state_dict())
    for index, module in enumerate(learner.modules):
        found |= {f"{index}.{name}": value for name, value in module.objective.state_dict().items()}
    return {name: value.clone() for name, value in found.items() if value.is_floating_point()}


GREEDY = ("linear", "mlp", "transformer", "next", "readout", "tail")
HEADS: dict[str, Objective] = {name: GreedySupervised(classifier=name) for name in GREEDY} | {
    "norm first": GreedySupervised(classifier="linear", classifier_options={"norm_first": True}),
    "readout with blocks": Solo(classifier_options={"depth": 2}),
    "tail alone": Segprop(classifier_options={"depth": 0}),
    "average of what follows": GreedySupervised(classifier="next", classifier_options={"weights": "ema"}),
    "lopt": Lopt(),
    "conv": FeatureReconstruction(decoder="conv", classifier="linear"),
    "transformer decoder": FeatureReconstruction(decoder="transformer", classifier="mlp"),
    "blocks, some hidden": FeatureReconstruction(decoder="conv", classifier="linear", reconstruct="blocks"),
    "cosine": FeatureReconstruction(classifier="linear", reconstruction_error="cosine", normalise_targets=False),
    "transport": GreedySupervised(classifier="linear", transport_tau=1.0),
}
OF_CLASSES: dict[str, Objective] = {
    "contrastive": GreedySupervised(classifier="linear", contrastive_weight=1.0),
    "similarity": GreedySupervised(classifier="linear", similarity_weight=1.0),
}
EVERY = [
    *((kind, name, objective) for name, objective in HEADS.items() for kind in MODELS),
    *(("bert", name, objective) for name, objective in OF_CLASSES.items()),
]
QUICK = {(kind, name) for number, name in enumerate(HEADS) for kind in [[*MODELS][number % len(MODELS)]]}
every_head = pytest.mark.parametrize(
    ("kind", "objective"),
    [
        pytest.param(kind, each, id=f"{kind}-{name}", marks=() if (kind, name) in QUICK else pytest.mark.heavy)
        for kind, name, each in EVERY
    ],
)
"""Each head by one kind of model; by the others, too, where there is time."""


@pytest.mark.parametrize("kind", MODELS)
def test_one_module_is_plain_training_bit_for_bit(kind: str) -> None:
    plain, learner = make(kind), learner_of(kind, 1)
    optimizer = sgd(list(plain.parameters()))
    for seed in range(3):
        batch = batch_of(kind, seed=seed, length=LENGTH - seed)
        loss = plain(**batch, use_cache=False).loss if kind != "bert" else plain(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(learner.step(batch).losses[0], loss.detach())
    state = learner.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_causal_models_are_known() -> None:
    for kind in MODELS:
        learner_of(kind)
    assert {kind: {layout.is_causal for layout in _split[kind].layouts} for kind in MODELS} == {
        "llama": {True},
        "gpt2": {True},
        "bert": {False},
    }


@pytest.mark.few(4)
@every_head
def test_every_head_trains_isolated_modules_on_any_length(kind: str, objective: Objective) -> None:
    learner = learner_of(kind, 2 if kind != "llama" else 4, objective)
    localgrad.check_isolation(learner)
    before = weights_of(learner)
    for length in (LENGTH, LENGTH - 3, LENGTH + 5):
        result = learner.step(batch_of(kind, length=length))
        assert all(bool(loss.isfinite()) for loss in result.losses)
    after = weights_of(learner)
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert still <= {name for name in before if "mask_token" in name}, "every weight is trained by some module"
    with torch.no_grad():
        learner.eval()
        batch = batch_of(kind, length=LENGTH + 5)
        for logits in learner.logits({name: value for name, value in batch.items() if name != "labels"}):
            expected = (4, 3) if kind == "bert" else (4, LENGTH + 5, VOCABULARY)
            assert logits is None or logits.shape == expected


@pytest.mark.few(3)
@every_head
def test_padding_leaves_losses_and_gradients_alone(kind: str, objective: Objective) -> None:
    """More of it, and whatever stands there."""
    seen = []
    for padding in (0, 7):
        learner = learner_of(kind, 2, objective, double=True)
        batch = batch_of(kind, padding=padding)
        if padding:
            batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 17, batch["input_ids"])
        result = learner.step(batch)
        seen.append({**{str(index): loss for index, loss in enumerate(result.losses)}, **weights_of(learner)})
    unpadded, padded = seen
    # The embeddings of padding itself are learned by nothing; BERT's reconstruction sees none of them either.
    for name, value in unpadded.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_mask_given_by_its_position_is_seen_by_every_loss(kind: str) -> None:
    """As one given by its name; and one that doesn't tell what is padding is said."""
    batch = batch_of(kind, padding=3)
    given, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    found = []
    for inputs in (given, tuple(given.values())):
        torch.manual_seed(0)
        learner = LocalLearner(split(make(kind), example=inputs), modules=2)
        learner.configure_optimizers(sgd)
        learner.step(inputs, labels)
        found.append(weights_of(learner))
    named, placed = found
    assert all(torch.equal(value, placed[name]) for name, value in named.items())
    mask = given["attention_mask"].bool()
    wide = mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
    with pytest.warns(UserWarning, match=r"attention_mask: of shape \[4, 1, \d+, \d+\].* count every token"):
        assert bool(mask_of(LocalBatch.of({**given, "attention_mask": wide}, labels), learner).all())


@pytest.mark.few(2)
@every_head
def test_parts_of_a_batch_train_as_the_whole(kind: str, objective: Objective) -> None:
    """Parts hold unequal numbers of tokens and of labels that count."""
    if objective.compares_images:
        pytest.skip("it compares the items of a batch")
    learners = [learner_of(kind, 2, objective, double=True, accumulation=count) for count in (1, 3)]
    batch = batch_of(kind)
    whole, parts = (learner.step(batch) for learner in learners)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-6, atol=1e-9)  # factors are float32
    for (name, one), other in zip(weights_of(learners[0]).items(), weights_of(learners[1]).values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_parts_of_other_lengths_and_sizes_train_as_the_whole(kind: str) -> None:
    """As data loaders give them: each padded to its own longest item, the last one smaller."""
    objective = FeatureReconstruction(classifier="linear")
    whole, given = (learner_of(kind, 2, objective, double=True) for _ in range(2))
    batch = batch_of(kind, items=5)
    parts = []
    for rows in (slice(0, 3), slice(3, 5)):
        longest = int(batch["attention_mask"][rows].sum(1).max())
        parts.append({name: value[rows, :longest] if value.ndim > 1 else value[rows] for name, value in batch.items()})
    assert parts[0]["input_ids"].shape[1] > parts[1]["input_ids"].shape[1]
    expected, results = whole.step(batch), given.step_parts(parts)
    for index, loss in enumerate(expected.losses):
        summed = sum(result.losses[index] for result in results)
        torch.testing.assert_close(summed, loss, rtol=1e-6, atol=1e-9)
    for (name, one), other in zip(weights_of(whole).items(), weights_of(given).values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [name for name in HEADS if name != "lopt"])
def test_no_head_of_a_causal_model_looks_ahead(name: str) -> None:
    learner = learner_of("llama", 2, HEADS[name]).eval()
    batch = batch_of("llama", items=2)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 6:] = 3
    one, two = learner.logits(given)[0], learner.logits(other)[0]
    assert one is not None and two is not None
    torch.testing.assert_close(two[:, :6], one[:, :6])
    assert not torch.allclose(two[:, 6:], one[:, 6:])


def test_lopt_is_its_formula() -> None:
    """CE + 10 x mean over modules of MSE(D(h_b), stopgrad(h_(b-1))), in one backward pass over detached modules."""
    learner, reference = learner_of("llama", 4, "lopt", double=True), learner_of("llama", 4, "lopt", double=True)
    batch = batch_of("llama")
    counts = batch["attention_mask"].bool()
    modules, backbone = reference.modules, reference.backbone
    backbone.trunk.batch.given = LocalBatch.of(batch).given  # type: ignore[union-attr]
    features, errors = batch["input_ids"], []
    for index, module in enumerate(modules):
        entered = backbone.stem(features).detach() if index == 0 else features
        outputs = module.features(features)
        if index < 3:
            decoder: Any = module.objective.terms["reconstruction"].decoder
            norm, (down, _, up) = decoder.norm, decoder.project
            assert down.weight.shape == (WIDTH // 4, WIDTH)
            predicted = up(F.gelu(down(norm(outputs))))
            errors.append((predicted - entered)[counts].square().mean())
            features = outputs.detach()
    labels = batch["labels"]
    task = F.cross_entropy(outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (task + 10 * torch.stack(errors).mean()).backward()
    with torch.no_grad():
        for weight in {id(w): w for module in modules for w in module.parameters()}.values():
            weight.sub_(0.1 * (0 if weight.grad is None else weight.grad))
    learner.step(batch)
    for (name, mine), theirs in zip(weights_of(learner).items(), weights_of(reference).values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, n=name: f"{n}: {text}")


def test_a_readout_is_the_models_own_embedding_and_never_trains_it() -> None:
    learner = learner_of("llama", 2, "solo")
    [readout] = [net for net in learner.modules[0].modules() if isinstance(net, ReadoutClassifier)]
    own: Any = learner.model.lm_head  # type: ignore[union-attr]
    assert sum(weight.numel() for weight in readout.parameters()) == WIDTH  # a norm, and no embedding
    features = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    readout(features).sum().backward()
    assert own.weight.grad is None and features.grad is not None
    expected = F.linear(readout.norm(features), own.weight)
    torch.testing.assert_close(readout(features), expected)
    with torch.no_grad():
        own.weight.mul_(2)  # trained by the last module: the readout sees it at once
    torch.testing.assert_close(readout(features), 2 * expected)
    twin = copy.deepcopy(learner)
    [copied] = [net for net in twin.modules[0].modules() if isinstance(net, ReadoutClassifier)]
    with torch.no_grad():
        twin.model.lm_head.weight.zero_()  # type: ignore[union-attr, operator]
    assert not copied(features).any() and readout(features).any(), "a copy reads its own model's"


def test_a_tail_starts_as_the_models_own() -> None:
    learner = learner_of("gpt2", 2, Segprop(classifier_options={"depth": 2})).eval()
    batch = batch_of("gpt2")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    first, last = learner.logits(given)
    assert first is not None and last is not None
    torch.testing.assert_close(first, last)  # two blocks, and the last two are copied


def test_transport_is_of_blocks_however_the_models_end_is_computed() -> None:
    """In chunks, the end's norm has the blocks' shape."""
    objective = HEADS["transport"]
    whole, chunked = (learner_of("llama", 2, objective, double=True, chunk_logits=way) for way in (False, True))
    expected, found = whole.step(batch_of("llama")), chunked.step(batch_of("llama"))
    assert expected.terms[1]["transport"] > 0
    torch.testing.assert_close(found.terms[1]["transport"], expected.terms[1]["transport"])


def test_what_blocks_reconstruct_has_no_padding_whatever_the_head() -> None:
    """A head that looks at no mask doesn't keep it from the decoders."""
    learner = learner_of("bert", 2, FeatureReconstruction(reconstruct="blocks"))
    assert {"states", "mask"} <= learner.modules[0].objective.terms["reconstruction"].uses  # type: ignore[operator]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [*GREEDY, "readout with blocks"])
def test_logits_of_a_head_are_never_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learner_of("llama", 2, HEADS[name], double=True)
    chunked = learner_of("llama", 2, HEADS[name], double=True)
    batch = batch_of("llama")
    expected = whole.step(batch)
    assert expected.module_logits[0] is not None
    most = 7 * VOCABULARY
    for home in (supervised, losses):
        monkeypatch.setattr(home, "WHOLE", most)
    monkeypatch.setattr(losses.in_chunks, "__kwdefaults__", {"label_smoothing": 0.0, "whole": most})
    sizes = []
    head: Any = chunked.modules[0].objective.terms["task"].classifier
    score = head.score
    head.score = lambda vectors: sizes.append(vectors[..., 0].numel()) or score(vectors)  # type: ignore[func-returns-value]
    found = chunked.step(batch)
    assert max(sizes) == 7 and found.module_logits[0] is None
    torch.testing.assert_close(found.losses, expected.losses)
    for (key, one), other in zip(weights_of(whole).items(), weights_of(chunked).values(), strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, n=key: f"{n}: {text}")


class OfItems(localgrad.Classifier):
    """A plugin's, from before there were tokens."""

    def __init__(self, source: localgrad.Layout, num_classes: int) -> None:
        super().__init__(source, num_classes)
        self.head = nn.Linear(source.width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features.mean(dim=1))  # type: ignore[no-any-return]


class Masked(OfItems):
    """As it would be written now."""

    takes_mask = True

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        seen = mask.unsqueeze(-1).to(features)
        return self.head((features * seen).sum(dim=1) / seen.sum(dim=1))  # type: ignore[no-any-return]


def test_a_classifier_that_is_not_told_what_is_padding_is_said() -> None:
    localgrad.register_classifier("of-items", OfItems)
    localgrad.register_classifier("masked", Masked)
    with pytest.warns(UserWarning, match=r"classifier: OfItems isn't told which .* set takes_mask = True"):
        learner_of("bert", 2, GreedySupervised(classifier="of-items"))
    result = learner_of("bert", 2, GreedySupervised(classifier="masked"), double=True).step(batch_of("bert"))
    padded = learner_of("bert", 2, GreedySupervised(classifier="masked"), double=True).step(batch_of("bert", padding=3))
    torch.testing.assert_close(padded.losses, result.losses)


class Mixing(localgrad.Decoder):
    """A plugin's, likewise."""

    def patches(self, grid: Tensor) -> Tensor:
        return grid.flip(2)


@pytest.mark.parametrize(
    ("kind", "objective", "message"),
    [
        ("llama", GreedySupervised(classifier="of-items"), "classifier: 'of-items' gives logits for an item"),
        ("llama", FeatureReconstruction(decoder="bilinear"), "decoder: 'bilinear' is of images"),
        ("llama", FeatureReconstruction(decoder="mixing"), "Mixing mixes positions, and would see padding"),
        ("llama", GreedySupervised(context=0.5), "context: it is a small grid"),
        ("llama", GreedySupervised(contrastive_weight=1.0), "contrastive_weight: it is of classes"),
        ("llama", FeatureReconstruction(reconstruct="previous"), "'previous' of the second module are token ids"),
        ("llama", localgrad.ImageReconstruction(), "objective: it reconstructs images"),
        ("llama", Solo(classifier_options={"depth": 3}), "depth of 'readout' is 0, 1 or 2"),
        (
            "llama",
            Solo(classifier_options={"depth": 1, "width": "64"}),
            "width of a .* whole number from 1 on, got '64'",
        ),
        ("llama", Segprop(classifier_options={"depth": -1}), "depth of 'tail' is a number of blocks"),
        ("llama", "lopp", "objective: unknown 'lopp'; .* Nearest: lopt"),
    ],
)
def test_what_does_not_go_with_sequences_is_one_line(kind: str, objective: Any, message: str) -> None:
    localgrad.register_classifier("of-items", OfItems)
    localgrad.register_decoder("mixing", Mixing)
    with pytest.raises(RecipeError, match=message) as caught:
        learner_of(kind, 3, objective).step(batch_of(kind))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:classifier. OfItems isn't told:UserWarning")
def test_a_plugins_classifier_of_items_trains_items() -> None:
    localgrad.register_classifier("of-items", OfItems)
    learner = learner_of("bert", 2, GreedySupervised(classifier="of-items"))
    assert [bool(loss.isfinite()) for loss in learner.step(batch_of("bert")).losses] == [True, True]


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = gpt2()
    model.lm_head.weight = model.transformer.wte.weight  # type: ignore[union-attr]
    return model


def test_tied_embeddings_are_refused_with_a_way_out() -> None:
    with pytest.raises(BackboneError, match=r"wte\.weight is shared by the stem, the tail, .* shared='last'"):
        LocalLearner(tied(), modules=2, example=batch_of("gpt2"))
    with pytest.raises(RecipeError, match="shared: unknown 'first'; take one of refuse, last, average"):
        LocalLearner(tied(), modules=2, example=batch_of("gpt2"), shared="first")


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
def test_tied_embeddings_get_the_last_modules_gradient_alone(checkpoint: str) -> None:
    batch = batch_of("gpt2")
    learner = LocalLearner(
        tied(), modules=2, example=batch, shared="last", objective=Lopt(), clip_grad=None, checkpoint=checkpoint
    )
    learner.configure_optimizers(sgd)
    embedding = learner.model.transformer.wte.weight  # type: ignore[union-attr]
    assert embedding is learner.model.lm_head.weight  # type: ignore[union-attr]
    held = [[weight is embedding for weight in optimizer.param_groups[0]["params"]] for optimizer in learner.optimizers]
    assert [sum(each) for each in held] == [0, 1]
    twin = copy.deepcopy(learner.backbone).train()
    assert twin.trunk is not None
    twin.trunk.batch.given = Example.of(batch)
    boundary = learner.plan.boundaries[0]
    with torch.no_grad():
        features = twin.stem(batch["input_ids"])
        for block in twin.blocks[:boundary]:
            features = block(features)
    for block in twin.blocks[boundary:]:
        features = block(features)
    losses.NextToken()(twin.tail(features), batch["labels"]).backward()  # type: ignore[no-untyped-call]
    read = twin.model.transformer.wte.weight  # type: ignore[union-attr]
    learner.step(batch)
    assert read.grad is not None
    assert torch.equal(embedding, read.detach().add(read.grad, alpha=-0.1))
    assert embedding.requires_grad


def test_a_module_without_the_context_of_its_batch_is_refused() -> None:
    learner = learner_of("llama")
    batch = LocalBatch(None, batch_of("llama")["labels"], features=torch.zeros(4, LENGTH, WIDTH))
    with pytest.raises(RecipeError, match="features but no context"):
        learner.modules[1](batch.features, batch)


def test_a_backbone_was_split_already() -> None:
    with pytest.raises(BackboneError, match=r"split already; give them to localgrad\.split"):
        LocalLearner(copy.deepcopy(_split.setdefault("bert", split(make("bert"), example=batch_of("bert")))),
                     example=batch_of("bert"))  # fmt: skip
