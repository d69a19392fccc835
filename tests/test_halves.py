"""Blocks cut at their residual additions and run over chunks: the plain block's numbers, at a lower peak."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath, set_fused_attn
from torch import Tensor, nn

from families import FAMILIES, images_for, parted, parted_copy, shake
from localgrad import GreedySupervised, LocalLearner
from localgrad.backbones.base import Backbone, split
from localgrad.backbones.halves import Piece, _known_cuts, find_pieces
from localgrad.backbones.state import left_as_it_was
from localgrad.backbones.timm_models import identity
from localgrad.errors import PartitionError
from localgrad.estimating import estimate_step
from localgrad.memory import track as memory
from localgrad.partition import LEVELS, Checkpointing
from localgrad.step.checkpointing import Recomputed
from localgrad.step.local_module import LocalModule, recompute

PIECES: dict[str, tuple[int, ...]] = {
    # Two halves a block; 1 where a merging of patches stands by itself. A timm update that loses halves shows here.
    "swin": (2, 2, 1, 2, 1, 2, 2),
    "swinv2": (2, 2, 1, 2, 1, 2, 2),
    "swinv2_cr": (3, 2, 1, 2, 1, 2, 1),  # glue first; the last block ends in a norm of its own
    "swinv2_cr extra norm": (3, 1, 1, 1, 1, 2, 1),  # so does the last one of every stage
    **dict.fromkeys(("vit", "vit registers", "vit attention pool", "vit dynamic size"), (2, 2, 2)),
    **dict.fromkeys(("deit", "deit distilled", "deit3", "dinov2", "dinov2 registers"), (2, 2, 2)),
    **dict.fromkeys(("beit", "beit shared bias", "beitv2", "eva02", "eva02 mixed rope"), (2, 2, 2)),
    "cait": (2, 2, 2, 1, 1),  # then blocks on the class token alone
    **dict.fromkeys(("convit", "convit small"), (2, 2, 3)),  # a class token last
    "xcit": (1, 1, 1, 1, 1),  # batch norms
    "davit": (2, 1, 2, 2),  # a spatial and a channel block, each whole
    "maxvit": (1, 1, 1),  # batch norms
    "mvitv2": (1, 1, 1),  # pools its shortcut
    "mvitv2 class token": (1, 1, 1),
    "pvt_v2": (4, 1, 3, 3, 1, 4, 1, 4),  # blocks in a row, with a norm or glue
    "hiera": (2, 1, 2, 1, 2, 1),  # whole where it pools
    "convnext": (1, 2, 1, 2, 1, 1, 2, 1),  # one residual; the twos are a downsampling and a block
    "resnet": (1,) * 8,  # batch norms
}
CHUNKED = ["halves/2", "halves/3"]
BATCH = 5  # no multiple of 2 or 3


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test finds its pieces anew, and not by another test's proof for a block that is alike."""
    monkeypatch.setattr("localgrad.backbones.halves._known_cuts", {})


class NoObjective(nn.Module):
    """Where only the features of a module are run."""


def trunk(backbone: Backbone, how: str) -> LocalModule:
    """All blocks as one local module."""
    checkpointing = Checkpointing.parse(how)
    blocks = range(len(backbone.blocks))
    recomputed = {} if how == "none" else {i: recompute(backbone, i, checkpointing) for i in blocks}
    return LocalModule(list(backbone.blocks), NoObjective(), recomputed).train()  # type: ignore[arg-type]


class Ran:
    """What one run of a module gave: output, gradients, buffers, random state."""

    def __init__(self, module: LocalModule, inputs: Tensor) -> None:
        with left_as_it_was(module):
            self._run(module, inputs)

    def _run(self, module: LocalModule, inputs: Tensor) -> None:
        inputs = inputs.detach().clone().requires_grad_()
        torch.manual_seed(2)
        self.output = module.features(inputs)
        self.random_state = torch.get_rng_state()
        slopes = torch.randn(self.output.shape, generator=torch.Generator().manual_seed(3), dtype=self.output.dtype)
        module.zero_grad()
        (self.output * slopes).sum().backward()
        self.random_state_after_backward = torch.get_rng_state()
        self.gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.gradients["inputs"] = inputs.grad
        module.zero_grad()
        self.buffers = copy.deepcopy(dict(module.named_buffers()))


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(value.norm() for value in theirs.values())  # for gradients that are zero but for rounding
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= tolerance * max(theirs[name].norm(), floor), name


def assert_same_run(ours: Ran, theirs: Ran, *, tolerance: float = 0.0) -> None:
    assert torch.equal(ours.random_state, theirs.random_state)
    assert torch.equal(ours.random_state_after_backward, theirs.random_state_after_backward)
    assert_equal(ours.buffers, theirs.buffers)
    if tolerance == 0.0:
        assert torch.equal(ours.output, theirs.output)
        assert_equal(ours.gradients, theirs.gradients)
    else:
        assert_close({"output": ours.output}, {"output": theirs.output}, tolerance)
        assert_close(ours.gradients, theirs.gradients, tolerance)


# Pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(10)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_of_every_family(family: str) -> None:
    backbone = parted(family)
    pieces = [find_pieces(block, backbone.example(i)) for i, block in enumerate(backbone.blocks)]
    assert tuple(map(len, pieces)) == PIECES[family]
    for block, found in zip(backbone.blocks, pieces, strict=True):
        together = [not piece.per_image for piece in found]
        assert any(together) == (has_batch_norm(block) or draws_positions(block))


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def draws_positions(module: nn.Module) -> bool:
    """swinv2_cr computes one position bias for all images by an MLP, with dropout."""
    return any(hasattr(part, "meta_mlp") for part in module.modules())


FEWER_IMAGES_THAN_CHUNKS = [(family, 2) for family in ("vit", "swin", "swinv2_cr", "convnext", "resnet")]


@pytest.mark.few(3)
@pytest.mark.parametrize(("family", "count"), [*((family, BATCH) for family in FAMILIES), *FEWER_IMAGES_THAN_CHUNKS])
def test_halves_give_the_plain_blocks_numbers(family: str, count: int) -> None:
    backbone = parted_copy(family)
    with torch.no_grad():
        inputs = backbone.stem(images_for(backbone.input_size, count))
    backbone.train()
    plain = Ran(trunk(backbone, "none"), inputs)
    assert_same_run(Ran(trunk(backbone, "halves"), inputs), plain)
    # A kernel may round otherwise for another number of rows, so chunks are held to the sixth digit,
    assert_same_run(Ran(trunk(backbone, "halves/3"), inputs), plain, tolerance=2e-4)
    # and to what is left of a wrong formula in double precision.
    backbone.double()
    plain = Ran(trunk(backbone, "none"), inputs.double())
    tolerance = 1e-6 if family == "eva02 mixed rope" else 1e-10  # which turns its angles in single precision
    for how in CHUNKED:
        assert_same_run(Ran(trunk(backbone, how), inputs.double()), plain, tolerance=tolerance)


# Dropout ---------------------------------------------------------------------------------------------------------

DROPPING = [(family, fused) for family in ("vit", "swin", "beit", "eva02") for fused in (True, False)]
DROPPING += [(family, True) for family in ("swinv2_cr", "pvt_v2", "cait")]
DROPPING += [pytest.param(family, False, marks=pytest.mark.heavy) for family in ("swinv2", "hiera", "davit", "pvt_v2")]


@pytest.fixture
def fused(request: pytest.FixtureRequest) -> Iterator[bool]:
    """timm's switch for fused attention, which draws its dropout itself; read when a model is built."""
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn()


def build_dropping(family: str, **more: Any) -> Backbone:
    name, kwargs, _ = FAMILIES[family]
    rates = {"drop_path_rate": 0.3, "attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_rate": 0.1}
    if family in ("hiera", "davit"):
        del rates["attn_drop_rate"], rates["proj_drop_rate"]
    torch.manual_seed(0)
    size = kwargs.get("img_size", 64)
    model = timm.create_model(name, num_classes=5, **(kwargs | rates | more)).double()
    shake(model)
    return split(model, (3, size, size)).train()


@pytest.mark.few(1)
@pytest.mark.parametrize(("family", "fused"), DROPPING, indirect=["fused"])
@pytest.mark.usefixtures("fused")
def test_dropout_draws_what_the_plain_block_draws(family: str) -> None:
    backbone = build_dropping(family)
    with torch.no_grad():
        inputs = backbone.stem(images_for(backbone.input_size, BATCH).double())
    plain = Ran(trunk(backbone, "none"), inputs)
    assert_same_run(Ran(trunk(backbone, "halves"), inputs), plain)
    for how in CHUNKED:
        assert_same_run(Ran(trunk(backbone, how), inputs), plain, tolerance=1e-10)


def test_weights_that_hide_a_branch_do_not_hide_its_form() -> None:
    """swinv2 starts with the norms after attention and MLP at zero: any form gives its bits then."""
    torch.manual_seed(0)
    name, kwargs, _ = FAMILIES["swinv2"]
    fresh = split(timm.create_model(name, num_classes=5, **kwargs), (3, 32, 32))
    modules = [trunk(fresh, how) for how in ("none", "halves")]
    shake(fresh.model)
    inputs = fresh.stem(images_for((3, 32, 32))).detach()
    assert_same_run(Ran(modules[1], inputs), Ran(modules[0], inputs))


class Scaled(nn.Module):
    """Written as timm writes its blocks, but for a factor that no form has."""

    def __init__(self, *, factor: float, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.attn, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop_path1 = self.drop_path2 = DropPath(drop)
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.drop_path1(self.attn(self.norm1(features)))
        return features + self.factor * self.drop_path2(self.mlp(self.norm2(features)))


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0 - 1e-6])
@pytest.mark.parametrize(("factor", "pieces"), [(1.0, 2), (2.0, 1)])
def test_drop_path_that_hides_a_branch_does_not_hide_its_form(factor: float, pieces: int, drop: float) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        _known_cuts.clear()
        assert len(find_pieces(Scaled(factor=factor, drop=drop), torch.randn(2, 3, 6))) == pieces


def test_looking_for_pieces_changes_nothing() -> None:
    backbone = build_dropping("swin")
    block = backbone.blocks[0].train()
    block.attn.eval()
    modes = {name: module.training for name, module in block.named_modules()}
    state = copy.deepcopy(block.state_dict())
    random_state = torch.get_rng_state()
    find_pieces(block, backbone.example(0))
    assert {name: module.training for name, module in block.named_modules()} == modes
    assert_equal(block.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_running_out_of_memory_is_not_taken_for_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build_dropping("vit")
    mlp = type(backbone.blocks[0].mlp)
    plain, failures = mlp.forward, [torch.OutOfMemoryError()]

    def forward(self: nn.Module, features: Tensor) -> Tensor:
        if failures:
            raise failures.pop()
        return plain(self, features)

    monkeypatch.setattr(mlp, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        find_pieces(backbone.blocks[0], backbone.example(0))


class Transposed(nn.Module):
    """Drops out features whose memory runs along the tokens first, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, features: Tensor) -> Tensor:
        turned = self.linear(features).transpose(1, 2).contiguous().transpose(1, 2)
        outermost = self.linear(features).transpose(0, 1).contiguous().transpose(0, 1)
        return F.dropout(turned, 0.4, self.training) + F.dropout(outermost, 0.4, self.training)


def test_draws_come_in_the_masks_own_order_of_memory() -> None:
    torch.manual_seed(0)
    block = Transposed().double().train()
    inputs = torch.randn(BATCH, 4, 6, dtype=torch.float64)
    pieces = find_pieces(block, inputs[:2])
    assert pieces[0].draws == ((0, 2, 1), (1, 0, 2))
    ran = [
        Ran(LocalModule([block], NoObjective(), recomputed), inputs)  # type: ignore[arg-type]
        for recomputed in ({}, {0: Recomputed(pieces, 2)}, {0: Recomputed(pieces, BATCH)})
    ]
    for ours in ran[1:]:
        assert_same_run(ours, ran[0], tolerance=1e-10)


# Training --------------------------------------------------------------------------------------------------------

SIZE = (3, 32, 32)
TRAINED: dict[str, dict[str, Any]] = {
    "vit": {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3},
    "swin": {"model_name": "swin_tiny_patch4_window7_224", "img_size": 32, "patch_size": 2, "window_size": 4}
    | {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
    "resnet": {"model_name": "resnet18", "channels": (8, 8, 16, 16), "output_stride": 8},
    "convnext": {"model_name": "convnext_atto", "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "maxvit": {"model_name": "maxvit_rmlp_pico_rw_256", "img_size": 64, "num_heads": None}
    | {"embed_dim": (32, 32), "depths": (1, 1), "stem_width": (16, 16)},
}


def make(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    depth = {"depth": 3} if kind == "vit" else {}
    return timm.create_model(**(TRAINED[kind] | depth | {"num_classes": 5, "drop_path_rate": 0.2} | more))


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, eps=1e-4)  # small gradients' signs don't count


def trained(
    model: nn.Module, checkpoint: Any, *, steps: int = 3, modules: int = 2, **settings: Any
) -> tuple[LocalLearner, list[Tensor]]:
    size = (3, 64, 64) if "MaxxVit" in type(model).__name__ else SIZE
    learner = LocalLearner(
        model, modules=modules, input_size=size, objective=GreedySupervised(), checkpoint=checkpoint, **settings
    )
    learner.configure_optimizers(adamw)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(7)
    losses = []
    for _ in range(steps):
        images, labels = torch.randn(7, *size, generator=generator), torch.randint(5, (7,), generator=generator)
        losses += learner.step(images, labels).losses
    return learner, losses


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "settings",
    [{"accumulation": 2, "clip_grad": 0.5}, {"precision": "bf16"}],
    ids=str,
)
@pytest.mark.parametrize("kind", TRAINED)
def test_training_over_chunks_is_plain_training(kind: str, settings: dict[str, Any]) -> None:
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1} if kind in ("vit", "swin") else {}
    plain, losses = trained(make(kind, **rates), "none", **settings)
    saving, ours = trained(make(kind, **rates), "halves/3", **settings)
    tolerance = 2e-2 if "precision" in settings else 1e-4
    torch.testing.assert_close(ours, losses, atol=tolerance, rtol=tolerance)
    step = 5e-3 if "precision" in settings else 1e-4
    torch.testing.assert_close(saving.model.state_dict(), plain.model.state_dict(), atol=step, rtol=1e-3)
    if kind in ("resnet", "maxvit"):  # no block of theirs can be cut, so it's all the same bits
        assert_equal(saving.model.state_dict(), plain.model.state_dict())


# Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_each_level_needs_less_memory(kind: str) -> None:
    levels = ["none", "blocks", "halves", "halves/4"]
    more = {"mlp_ratio": 8, "drop_path_rate": 0.0} | (
        {"patch_size": 4, "depth": 2} if kind == "vit" else {"depths": (1, 1)}
    )
    peaks = []
    for level in levels:
        learner = LocalLearner(
            make(kind, **more), modules=1, input_size=SIZE, objective=GreedySupervised(), checkpoint=level
        )
        profile = estimate_step(learner, 16, adamw)
        assert profile.timeline[-1][1] <= profile.static_bytes + 4096, level  # the losses' scalars
        peaks.append(profile.peak_bytes - profile.static_bytes)
    assert peaks[1] < 0.9 * peaks[0], peaks
    assert peaks[2] < 0.95 * peaks[1], peaks
    assert peaks[3] < 0.8 * peaks[2], peaks


@pytest.mark.heavy
def test_dropout_over_chunks_still_saves_memory_in_a_real_step() -> None:
    peaks = {}
    for level in ("none", "halves", "halves/4"):
        model = make("vit", patch_size=4, depth=2, mlp_ratio=8, proj_drop_rate=0.1, attn_drop_rate=0.1)
        learner, _ = trained(model, level, steps=1, modules=1)
        images, labels = torch.randn(16, *SIZE), torch.arange(16) % 5
        profile = memory.track(lambda: learner.step(images, labels) and None, warmup=1)  # noqa: B023
        assert profile.timeline[-1][1] <= profile.static_bytes + 4096
        peaks[level] = profile.peak_bytes - profile.static_bytes
    assert peaks["halves/4"] < 0.8 * peaks["halves"] < 0.8 * peaks["none"], peaks


# Compiling, counting, copying ------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("rates", [{}, {"proj_drop_rate": 0.1}], ids=str)
@pytest.mark.parametrize("level", ["blocks", "halves", "halves/2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while compiling
def test_compiled_halves_train_as_plain_ones_do(level: str, rates: dict[str, float]) -> None:
    torch.compiler.reset()
    still = {"drop_path_rate": 0.0, "depth": 2}  # compiled code draws other numbers
    _, losses = trained(make("vit", **still), "none", steps=2)
    _, ours = trained(make("vit", **still, **rates), level, steps=2, compile=True)
    tolerance = 0.5 if rates else 1e-4  # with dropout: that it runs
    torch.testing.assert_close(ours, losses, atol=tolerance, rtol=tolerance)


class Counted(nn.Module):
    """Counts calls where no forward pass of a block shows it: hooks would keep batches whole."""

    def __init__(self, inner: nn.Module, count: Callable[[], None]) -> None:
        super().__init__()
        self.inner, self.count = inner, count

    def forward(self, features: Tensor) -> Tensor:
        self.count()
        return self.inner(features)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("halves/2:1", [4, 1, 1]), ("halves:2", [2, 2, 1]), ("blocks:1", [2, 1, 1]), ("none", [1] * 3)],
)
def test_only_the_first_blocks_are_recomputed(how: str, expected: list[int]) -> None:
    backbone = split(make("vit"), SIZE)
    module = trunk_of_learner(backbone, how)
    calls = [0] * 3
    for number, block in enumerate(backbone.blocks):

        def count(number: int = number) -> None:
            calls[number] += 1

        block.mlp.act = Counted(block.mlp.act, count)
    module.train()
    module.features(torch.randn(4, *SIZE)).sum().backward()
    assert calls == expected
    calls[:] = [0] * 3
    module.eval()
    module.features(torch.randn(4, *SIZE)).sum().backward()
    assert calls == [1] * 3  # nothing is recomputed where nothing is trained


def trunk_of_learner(backbone: Backbone, how: str) -> LocalModule:
    return LocalLearner(backbone, modules=1, objective=GreedySupervised(), checkpoint=how).modules[0]


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["vit", "swin", "beit", "beit shared bias", "eva02", "cait", "pvt_v2"])
def test_a_deep_copy_runs_its_own_weights(family: str) -> None:
    backbone = parted_copy(family).train()
    inputs = backbone.stem(images_for(backbone.input_size)).detach()
    original = trunk(backbone, "halves/2")
    made = copy.deepcopy(original)
    made.features(inputs).sum().backward()
    assert all(parameter.grad is None for parameter in original.parameters())
    assert all(parameter.grad is not None for parameter in made.parameters())
    before = Ran(original, inputs).output
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.5)
    assert torch.equal(Ran(original, inputs).output, before)
    assert not torch.equal(Ran(made, inputs).output, before)


def test_the_sum_does_not_write_into_a_tensor_that_is_still_needed() -> None:
    """Where a branch gives its input or a view of it, adding in place would double the features."""
    features = torch.randn(2, 3, requires_grad=True) * 1
    for branch in (lambda x: x, lambda x: x[:], lambda x: x.view(2, 3)):
        kept = features.detach().clone()
        found = Recomputed([Piece(branch, identity)])(features)
        assert torch.equal(found, 2 * kept)
        assert torch.equal(features, kept)


# The text form ---------------------------------------------------------------------------------------------------


@st.composite
def checkpointings(draw: st.DrawFn) -> Checkpointing:
    level = draw(st.sampled_from(LEVELS))
    chunks = draw(st.integers(1, 10**6)) if level != "none" else 1
    first = draw(st.none() | st.integers(1, 10**6)) if level != "none" else None
    return Checkpointing(level, chunks, first)


@given(checkpointings())
def test_checkpointing_survives_its_text(how: Checkpointing) -> None:
    assert Checkpointing.parse(str(how)) == how
    assert Checkpointing.parse(f" {how}\n") == how
    assert Checkpointing.parse(how) is how


MALFORMED = ["", "half", "halve/8", "HALVES", "halves/", "halves/0", "halves/-1", "halves/2.5", "halves/x", "halves:0"]
MALFORMED += ["halves:", "halves/8:", "halves:3/8", "halves/8:0", "halves 8", "none/2", "none/2", "none:1", "8", "/8"]
MALFORMED += ["halves/8/8", "halves:1:1", "halves/" + "9" * 5000, None, 8, 1.5, [], {"level": "halves"}]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: str(text)[:20])
def test_malformed_checkpointing_is_refused_with_what_to_type(text: object) -> None:
    with pytest.raises(PartitionError, match=r"^checkpoint: ") as refused:
        Checkpointing.parse(text)
    assert re.search(r"halves/8|with a level", str(refused.value))
    assert len(str(refused.value)) < 400


@given(st.text("halvesbockn/:0123456789 ", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        how = Checkpointing.parse(text)
    except PartitionError:
        return
    assert Checkpointing.parse(str(how)) == how
