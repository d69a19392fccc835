"""Models that nobody named, taken apart by watching them run: the laws of splitting, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers import copied, logits_and_gradients
from localgrad.backbones.base import Backbone
from localgrad.backbones.example import Example
from localgrad.backbones.flow import Flow, Followed, choose
from localgrad.errors import BackboneError

D = 8


class Block(nn.Module):
    """A residual block with dropout; scaled by what it is given beside its features."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        branch = self.drop(self.linear(self.norm(x)).tanh())
        return x + (branch if scale is None else branch * scale)


class Given(NamedTuple):
    hidden: Tensor
    weights: Tensor | None


class Tokens(nn.Module):
    """Ids to logits; ``calls`` says how a block is called with features and the mask, and gives features."""

    def __init__(self, calls: Callable[[nn.Module, Tensor, Tensor], Tensor], block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.calls = nn.Embedding(11, D), calls
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(D, 5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = torch.ones_like(ids) if mask is None else mask
        scale = seen[..., None].to(self.embed.weight.dtype)
        x = self.embed(ids)
        for block in self.blocks:
            x = self.calls(block, x, scale)
        return self.head((x * scale).sum(1))


class ByKeyword(Block):
    """Features by keyword, a tuple with names out."""

    def forward(self, *, hidden: Tensor, scale: Tensor) -> Given:  # type: ignore[override]
        return Given(super().forward(hidden, scale), None)


class ToDict(Block):
    """A dict out, of which features are the second entry."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        x = super().forward(*pair)
        return {"scores": x.detach().mean(-1), "x": x}


class Stage(nn.Module):
    """A stage that is no container, with code of its own before its blocks."""

    def __init__(self, count: int, *, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        for index in range(count):
            self.add_module(f"b{index}", Block())

    def forward(self, x: Tensor) -> Tensor:
        x = 0.5 * (x[:, ::2] + x[:, 1::2]) if self.halves else x
        for block in self.children():
            x = block(x)
        return x


class Stages(nn.Module):
    """Features [B, N, D] through two stages, and a loose container behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stage(1, halves=False), Stage(2, halves=True)
        self.stem, self.after, self.table = (
            nn.Linear(4, D),
            nn.Sequential(Block(), Block()),
            nn.Parameter(torch.ones(D)),
        )
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)))
        return self.head(self.norm(self.after(x * self.table)).mean(1))


class Written(nn.Module):
    """A model whose way of going through its blocks is given."""

    def __init__(self, way: Callable[[nn.ModuleList, Tensor], Tensor], count: int = 4) -> None:
        super().__init__()
        self.way, self.stem, self.head = way, nn.Linear(4, D), nn.Linear(D, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self.blocks, self.stem(x)).mean(1))


def in_a_row(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def features(count: int = 2) -> Tensor:
    return torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(1))


def tokens(count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, 11, (count, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"ids": ids, "mask": mask}


def assert_split(model: nn.Module, example: Any, names: list[str], **more: Any) -> Backbone:
    """Split a model; its parts give its own logits and gradients on another batch, and it is as it was."""
    untouched = copy.deepcopy(model)
    before, random = copied(model), torch.get_rng_state()
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    training = {name: module.training for name, module in model.named_modules()}
    backbone = localgrad.split(model, example=example, **more)
    assert torch.equal(random, torch.get_rng_state())
    assert training == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(before[name], value) for name, value in copied(model).items())
    for name, module in model.named_modules():
        assert vars(module).keys() == modules[name].keys()
        assert all(len(vars(module)[k]) == len(v) for k, v in modules[name].items() if k.endswith(("hooks", "modules")))
    assert list(backbone.block_names) == names
    for training_mode in (False, True):
        backbone.train(training_mode)
        untouched.train(training_mode)
        for batch in (example, _other(example)):
            given = Example.of(batch)
            theirs = logits_and_gradients(lambda given=given: given.call(untouched), untouched)
            ours = logits_and_gradients(lambda batch=batch: backbone(batch), model)
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    return backbone


def _other(example: Any) -> Any:
    """The example with its items in another order, and one more."""
    return Example.of(example).map(lambda tensor: torch.cat([tensor.flip(0), tensor[:1]]))


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
WAYS = {
    "position": (lambda block, x, scale: block(x, scale), Block),
    "keyword, a named tuple out": (lambda block, x, scale: block(hidden=x, scale=scale).hidden, ByKeyword),
    "in a tuple, a dict out": (lambda block, x, scale: block((x, scale))["x"], ToDict),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_blocks_take_and_give(way: str) -> None:
    batch = tokens()
    model = made(lambda: Tokens(*WAYS[way]))
    backbone = assert_split(model, {**batch, "labels": torch.zeros(2)}, BLOCKS)
    assert backbone.trunk is not None
    assert (backbone.layouts[0].kind, backbone.num_classes) == ("sequence", 5)


def test_examples_are_a_tensor_a_tuple_or_a_dict() -> None:
    batch = tokens()
    for example in (batch["ids"], tuple(batch.values()), batch):
        assert_split(made(lambda: Tokens(*WAYS["position"])), example, BLOCKS)


class Old(nn.Module):
    """Code as GPT's first and CTRL have it: writes into what was looked up, asks its first parameter for its dtype.

    Args:
        checks: whether it asks blocks for values that a stand-in doesn't give.
    """

    def __init__(self, *, checks: bool = False) -> None:
        super().__init__()
        self.embed, self.checks = nn.Embedding(11, D), checks
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        scale = mask[..., None].to(next(self.parameters()).dtype)
        x = self.embed(ids)
        x *= 2.0
        x += scale
        if self.checks and not x.is_contiguous():
            raise ValueError("features lie apart")
        for block in self.blocks:
            x = block(x, scale)
            if self.checks and not x.is_contiguous():
                raise ValueError("features lie apart")
        return x


class OldWithHead(nn.Module):
    def __init__(self, *, checks: bool = False) -> None:
        super().__init__()
        self.body, self.head = Old(checks=checks), nn.Linear(D, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.body(ids, mask))


def test_code_that_writes_into_what_it_looked_up_and_asks_its_parameters() -> None:
    assert_split(made(OldWithHead), tokens(), [f"body.{name}" for name in BLOCKS])


class Sound(nn.Module):
    """A wave [B, T], whose gradient it asks for itself, or video [B, frames, C, H, W]; convolved, then as tokens."""

    def __init__(self, *, of_video: bool) -> None:
        super().__init__()
        self.of_video = of_video
        self.embed = nn.Conv3d(3, D, 4, 4) if of_video else nn.Conv1d(1, D, 4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(D, 5)

    def forward(self, given: Tensor) -> Tensor:
        x = given.movedim(1, 2) if self.of_video else given[:, None]
        if self.training and not self.of_video:
            x.requires_grad = True
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("of_video", [False, True])
def test_sound_and_video_train_with_the_first_features_as_the_first_target(of_video: bool) -> None:
    given = torch.randn(4, 4, 3, 8, 8) if of_video else torch.randn(4, 32)
    model = made(lambda: Sound(of_video=of_video))
    learner = localgrad.LocalLearner(model, modules=3, example=given)
    learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
    first = learner.modules[0].objective
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    result = learner.step(given, torch.arange(4))
    hook.remove()
    assert all(bool(torch.isfinite(loss)) for loss in result.losses)
    assert seen[0].shape == (4, 4 if of_video else 8, D)


def test_code_that_fails_without_its_blocks_is_refused_in_a_line() -> None:
    with pytest.raises(BackboneError, match=r"OldWithHead can't be split: .*features lie apart") as refused:
        localgrad.split(made(lambda: OldWithHead(checks=True)), example=tokens())
    assert "\n" not in str(refused.value)


def test_another_mask_is_another_context() -> None:
    model = made(lambda: Tokens(*WAYS["position"])).eval()
    backbone = localgrad.split(model, example=tokens())
    for count in (3, 1):
        batch = tokens(count)
        assert torch.equal(backbone(batch), model(**batch))
    assert not torch.equal(backbone(tokens(3)), model(tokens(3)["ids"]))


def test_stages_at_any_depth_and_what_lies_between() -> None:
    names = ["first.b0", "second.b0", "second.b1", "after.0", "after.1"]
    backbone = assert_split(made(Stages), features(), names)
    glued = [block.glue is not None for block in backbone.blocks]
    assert glued == [False, True, False, True, False]
    held = {name for name, weight in backbone.blocks.named_parameters() if weight is backbone.model.table}
    assert held == {"3.glue.weights.0"}  # a weight of no module belongs to the glue that reads it


def test_a_plain_chain_of_layers() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3)]
    model = made(lambda: nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(54, 5)))
    images = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    assert_split(model, images, ["0.2", "0.4"])


class Around(nn.Module):
    """Blocks behind a layer in a container, which holds less than they do; features out, or two views of them."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.views = views
        self.before = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.GELU())])
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.before[0](x))
        return (x[:, :1], x[:, 1:]) if self.views else x


@pytest.mark.parametrize("views", [False, True])
def test_inside_a_stage_what_is_light_is_glue(views: bool) -> None:
    def way(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = torch.cat(block(x), 1) if views else block(x)
        return x

    def make() -> nn.Module:
        model = Written(way)
        model.blocks = nn.ModuleList(Around(views=views) for _ in range(2))
        return model

    names = [f"blocks.{stage}.blocks.{index}" for stage in (0, 1) for index in range(4)]
    if views:  # such a stage is no station: what is inside of it stands by itself
        names = ["blocks.0.before.0", *names[:4], "blocks.1.before.0", *names[4:]]
    backbone = assert_split(made(make), features(), names)
    assert sum(block.glue is not None for block in backbone.blocks) == 1


def test_a_block_is_not_taken_further_apart() -> None:
    inner = Written(in_a_row)
    seen = Followed(inner.eval(), Example.of(features()), lambda output: output)
    finest = choose(seen)[0]
    assert [call.name for call in finest] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert any(call.name == "blocks.1.linear" for call in seen.walk())


# What is refused --------------------------------------------------------------------------------------------------


def skip(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    first = blocks[0](x)
    return blocks[3](blocks[2](blocks[1](first))) + first


def streams(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    y = x.roll(1, 1)
    for block in blocks:
        x, y = block(x, y), x
    return x + y


def scale_of_features(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, (x > 0).all(1, keepdim=True))
    return x


def twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return in_a_row(blocks, in_a_row(blocks, x))


def all_at_once(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.stack([block(x) for block in blocks]).sum(0)


REFUSED = {
    "a skip": (skip, r"what blocks\.0 gave goes on to its own code \(a skip, or a second stream\)"),
    "two streams": (streams, r"blocks\.\d is given several features \(args\.0, args\.1\)"),
    "a context of features": (scale_of_features, r"what blocks\.\d is called with .* depends on features"),
    "blocks that are called twice": (twice, r"blocks\.0 is called 2 times in one pass, with the same weights"),
    "blocks side by side": (all_at_once, r"past blocks\.0, what .* gave goes on to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_a_line(case: str) -> None:
    way, words = REFUSED[case]
    model = made(lambda: Written(way))
    before = copied(model)
    with pytest.raises(BackboneError, match=words) as refused:
        localgrad.split(model, example=features())
    assert "Chains seen:" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in copied(model).items())


def test_a_skip_over_little_leaves_what_stands_in_a_chain() -> None:
    def way(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        return in_a_row(blocks[2:], blocks[1](blocks[0](x)) + x)

    assert_split(made(lambda: Written(way)), features(), ["blocks.2", "blocks.3"])


def test_what_stands_between_blocks_may_write_in_place() -> None:
    layers = [layer for _ in range(5) for layer in (nn.Conv2d(D, D, 3, padding=1), nn.ReLU(inplace=True))]
    model = nn.Sequential(nn.Conv2d(3, D, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, 5))
    assert len(localgrad.split(model, example=torch.randn(2, 3, 8, 8)).blocks) >= 4


def test_layers_that_are_dropped_at_random_are_refused() -> None:
    def way(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if not (blocks.training and torch.rand([]) < 0.1):
                x = block(x)
        return x

    with pytest.raises(BackboneError, match=r"in training it leaves out blocks\.\d at random, .*layerdrop=0"):
        localgrad.split(made(lambda: Written(way)), example=features())


def test_a_batch_that_is_not_the_first_dimension_is_refused() -> None:
    layers = [nn.TransformerEncoderLayer(D, 2, 16, batch_first=first) for first in (False, True)]
    others, own = (
        made(
            lambda layer=layer: nn.Sequential(
                nn.Linear(4, D), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            )
        )
        for layer in layers
    )
    with pytest.raises(BackboneError, match=r"logits for the first item of a batch depend on the second.*batch_first"):
        localgrad.split(others, example=features())
    localgrad.split(own, example=features())


def test_an_encoder_with_a_decoder_is_refused() -> None:
    model = made(lambda: Written(in_a_row))
    model.config = type("Config", (), {"is_encoder_decoder": True})()  # type: ignore[assignment]
    with pytest.raises(BackboneError, match=r"an encoder and a decoder.*get_encoder"):
        localgrad.split(model, example=features())


@pytest.mark.parametrize("attribute", ["module", "_orig_mod"])
def test_what_stands_around_a_model_is_refused_with_the_way_in(attribute: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    around = nn.DataParallel(model) if attribute == "module" else torch.compile(model, backend="eager")
    with pytest.raises(BackboneError, match=rf"stands around the model.* pass model\.{attribute} "):
        localgrad.split(around, example=torch.randn(2, 4))


def test_an_example_that_the_model_cannot_take_is_named() -> None:
    model = made(lambda: Tokens(*WAYS["position"]))
    with pytest.raises(BackboneError, match=r"example: Tokens can't be called with input_ids \[2, 6\].*input_ids"):
        localgrad.split(model, example={"input_ids": tokens()["ids"]})
    with pytest.raises(BackboneError, match="example: got dict; give what the model is called with"):
        localgrad.split(model, example={"ids": [1, 2]})
    with pytest.raises(BackboneError, match="it has no item"):
        localgrad.split(model, example=tokens()["ids"][:0])


def test_one_number_an_item_has_a_dimension_of_its_own() -> None:
    model = made(lambda: Written(in_a_row))
    model.head = nn.Sequential(nn.Linear(D, 1), nn.Flatten(0))  # type: ignore[assignment]
    with pytest.raises(BackboneError, match=r"it gives \[2\] for 2 items; let it give logits \[B, num_classes\]"):
        localgrad.split(model, example=features())


def test_isolation_is_checked_with_what_the_model_is_called_with() -> None:
    learner = localgrad.LocalLearner(made(lambda: Written(in_a_row)), modules=2, example={"x": features()})
    localgrad.check_isolation(learner, {"x": features()}, torch.tensor([0, 1]))
    localgrad.check_isolation(learner, {"x": features()})


def test_logits_that_look_at_no_input() -> None:
    model = made(lambda: Written(lambda blocks, x: in_a_row(blocks, torch.ones_like(x))))
    with pytest.raises(BackboneError, match="its logits don't depend on its input"):
        localgrad.split(model, example=features())


class Counting(Written):
    """It counts its calls; or one norm stands before each of its blocks."""

    def __init__(self, *, counts: bool) -> None:
        super().__init__(lambda blocks, x: x)
        self.counts, self.norm = counts, nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts and self.training:
            self.calls += 1
        x = self.stem(x)
        for block in self.blocks:
            x = block(x if self.counts else self.norm(x))
        return self.head(x.mean(1))


@pytest.mark.parametrize(("counts", "name"), [(True, "calls"), (False, r"norm\.running_mean")])
def test_what_the_models_own_code_writes_is_refused(counts: bool, name: str) -> None:
    with pytest.raises(BackboneError, match=f"Counting can't be split: {name} is written in training by its own code"):
        localgrad.split(made(lambda: Counting(counts=counts)), example=features())


class CoolingDown(Written):
    """A number that falls with every call in training; and one that is noted once."""

    def __init__(self, *, falls: bool) -> None:
        super().__init__(in_a_row)
        self.falls, self.heat, self.longest = falls, 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, x.shape[1])
        if self.falls and self.training:
            self.heat *= 0.5
        return super().forward(x * self.heat)


def test_numbers_that_the_models_own_code_changes_are_refused() -> None:
    localgrad.split(CoolingDown(falls=False), example=features())
    with pytest.raises(BackboneError, match="heat is changed in training by its own code"):
        localgrad.split(CoolingDown(falls=True), example=features())


class Mixing(nn.Module):
    """A block that mixes positions by a matrix that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        return x + (mixing @ self.linear(x)).tanh()


class Causal(Written):
    """Its blocks are given a mask of positions, which has no row an item."""

    def __init__(self) -> None:
        super().__init__(lambda blocks, x: x)
        self.blocks = nn.ModuleList(Mixing() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]).tril()
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("checkpoint", "accumulation"), [("halves/6", 1), ("blocks/3", 1), ("none", 2), ("halves/2", 2)]
)
def test_what_blocks_are_given_may_be_as_long_as_the_batch(checkpoint: str, accumulation: int) -> None:
    """A batch of six, and six positions; or twelve in two parts: chunks of images take no rows of the mask."""
    torch.manual_seed(0)
    model, count = made(Causal), 6 * accumulation
    images, labels = torch.randn(count, 6, 4), torch.arange(count) % 5
    losses = []
    for how in ({"checkpoint": "none"}, {"checkpoint": checkpoint, "accumulation": accumulation}):
        learner = localgrad.LocalLearner(copy.deepcopy(model), modules=1, example=features(), **how)  # type: ignore[arg-type]
        learner.configure_optimizers(lambda params: torch.optim.SGD(params, lr=0.1))
        learner.step(images, labels)
        losses.append(torch.stack(list(learner.step(images, labels).losses)).mean())
    torch.testing.assert_close(losses[0], losses[1])


# By choice --------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Blocks in stages in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, D), nn.Linear(D, 5)
        self.stages = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(in_a_row(self.stages, self.stem(x)).mean(1))


def test_blocks_may_be_named() -> None:
    assert_split(made(Nested), features(), [f"stages.{stage}.{index}" for stage in (0, 1) for index in (0, 1)])
    assert_split(made(Nested), features(), ["stages.0", "stages.1"], blocks="stages")
    assert_split(made(Nested), features(), ["stages.1.0", "stages.1.1"], blocks="stages.1")


def test_blocks_that_are_not_there_or_not_in_a_chain() -> None:
    with pytest.raises(BackboneError, match=r"blocks='layers': .*it does in .*stages"):
        localgrad.split(made(Nested), example=features(), blocks="layers")
    with pytest.raises(BackboneError, match=r"blocks='blocks': they don't stand in a chain: past blocks\.1"):
        localgrad.split(made(lambda: Written(skip)), example=features(), blocks="blocks")


def test_a_copy_is_another_backbone() -> None:
    backbone = localgrad.split(made(Stages), example=features()).eval()
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        next(twin.blocks.parameters()).add_(1)
    assert not torch.equal(backbone(features()), twin(features()))
    assert torch.equal(backbone(features()), backbone.model(features()))
    assert torch.equal(twin(features()), twin.model(features()))


def test_a_model_of_16_bits_is_split_by_a_copy() -> None:
    model = made(Stages).bfloat16().eval()
    before = copied(model)
    backbone = localgrad.split(model, example=features().bfloat16())
    assert set(backbone.parameters()) == set(model.parameters())
    assert all(torch.equal(before[name], value) for name, value in copied(model).items())
    assert torch.equal(backbone(features().bfloat16()), model(features().bfloat16()))


# Data flow --------------------------------------------------------------------------------------------------------


def _waists(run: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Flow, list[int]]:
    with torch.no_grad(), Flow(given) as flow:
        result = run(given)
    end = flow.node(result)
    return flow, [] if end is None else flow.waists(end)


def test_waists_of_operators() -> None:
    x, w = torch.randn(2, 3), torch.randn(3, 3)

    def residual(x: Tensor) -> Tensor:
        y = x.view(3, 2).view(2, 3) @ w  # node 1; views are none
        y = y + (y.tanh() @ w)  # nodes 2, 3, 4
        return y.relu_()  # node 5

    assert _waists(residual, x)[1] == [0, 1, 4, 5]

    def by_shape(x: Tensor) -> Tensor:
        return (x @ w).exp() + torch.zeros_like(x) + x.new_ones(3)

    assert _waists(by_shape, x)[1] == [0, 1, 2, 3, 4]

    def into_a_buffer(x: Tensor) -> Tensor:
        found = torch.zeros(2, 6)
        found[:, :3] = x
        found[:, 3:].copy_(x)
        return found.sum(1)

    assert _waists(into_a_buffer, x)[1] == [0, 2, 3]
    assert _waists(lambda x: w * (x > 0).all(), x)[1] == []


def test_ids_are_followed_to_what_they_look_up() -> None:
    table, ids = torch.randn(9, 3), torch.tensor([[1, 2, 3]])

    def run(ids: Tensor) -> Tensor:
        mask = (ids > 1).float()[..., None]  # no features: of truth values
        return (table[ids.clamp(max=4)] * mask).exp() * mask

    assert _waists(run, ids)[1] == [0, 1, 2, 3, 4]


def test_who_goes_past_is_named() -> None:
    seen = Followed(made(lambda: Written(skip)).eval(), Example.of(features()), lambda output: output)
    third = next(call for call in seen.walk() if call.name == "blocks.2")
    assert seen.ends(third) is None
    assert seen.why_not(third).startswith("past blocks.2, what blocks.0 gave goes on to its own code")


# Libraries --------------------------------------------------------------------------------------------------------

LANGUAGE = ("LlamaForCausalLM", "BertForSequenceClassification", "MixtralForCausalLM")
VISION = ("SwinForImageClassification", "DINOv3ViTModel")


def _of_transformers(name: str) -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers", reason="transformers is of the extra hf")
    from research.census.models import entries

    entry = next(entry for entry in entries() if entry.name == name)
    model = made(entry.make)
    return model, entry.batch(model)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_with_a_padding_mask(name: str) -> None:
    model, batch = _of_transformers(name)
    path = "bert.encoder.layer" if name.startswith("Bert") else "model.layers"
    backbone = assert_split(model, batch, [f"{path}.{index}" for index in range(4)])
    assert backbone.layouts[0].kind == "sequence"


@pytest.mark.parametrize("name", VISION)
def test_vision(name: str) -> None:
    model, batch = _of_transformers(name)
    swin = ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.blocks.1"]
    swin += [each.replace("layers.0", "layers.1") for each in swin]
    backbone = assert_split(model, batch, swin if name.startswith("Swin") else [f"model.layer.{i}" for i in range(4)])
    assert {layout.kind for layout in backbone.layouts} == {"tokens"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AlbertForSequenceClassification", r"albert_layer_groups\.0 is called 4 times in one pass"),
        ("T5ForConditionalGeneration", "an encoder and a decoder"),
        ("SegformerForSemanticSegmentation", r"goes on to decode_head.*of its blocks' weights"),
    ],
)
def test_transformers_that_are_refused(name: str, words: str) -> None:
    model, batch = _of_transformers(name)
    with pytest.raises(BackboneError, match=words):
        localgrad.split(model, example=batch)
