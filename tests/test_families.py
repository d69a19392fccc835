"""Every family that localgrad names, split and recomposed: the same bits, forward and backward, in both modes."""

from __future__ import annotations

import copy
import functools
import itertools
import time

import pytest
import timm
import torch
from torch import nn

from families import FAMILIES, SHARED, WIDER, build, images_for, parted, parted_copy
from localgrad import GreedySupervised, LocalLearner
from localgrad.backbones.base import SUPPORTED_FAMILIES, Backbone, Layout, outline, split
from localgrad.backbones.fake import without_initialization
from localgrad.backbones.timm_models import Step
from localgrad.estimating import estimate_step


def run(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(2)
    return module(images)


def test_every_family_is_tested() -> None:
    assert {family.split()[0] for family in FAMILIES} == set(SUPPORTED_FAMILIES)


@pytest.mark.few(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_equal_the_model_forward_and_backward(family: str) -> None:
    backbone = parted_copy(family)
    model, images = backbone.model, images_for(backbone.input_size)

    model.eval()
    assert torch.equal(run(backbone, images), run(model, images))

    twin = copy.deepcopy(model).train()  # its own batch statistics
    model.train()
    ours, theirs = run(backbone, images), run(twin, images)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is None or other.grad is None:
            continue
        if family in SHARED:  # summed block by block, in another order
            torch.testing.assert_close(mine.grad, other.grad, msg=name)
        else:
            assert torch.equal(mine.grad, other.grad), name
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.few(10)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_exactly_one_part(family: str) -> None:
    backbone = parted(family)
    parts = [backbone.stem, *backbone.blocks, backbone.tail]
    owned = [id(p) for part in parts for p in part.parameters()]
    if family not in SHARED:
        assert len(owned) == len(set(owned))
        backbone.check_boundaries(range(1, len(backbone.blocks)))
    assert set(owned) == {id(p) for p in backbone.model.parameters()} == {id(p) for p in backbone.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_use_the_parameters_they_hold(family: str) -> None:
    backbone = parted(family)
    features = images_for(backbone.input_size)
    for part in [backbone.stem, *backbone.blocks, backbone.tail]:
        features = part(features.detach())
        parameters = {name: p for name, p in part.named_parameters() if not name.startswith("unused.")}
        gradients = torch.autograd.grad(features.square().sum(), list(parameters.values()), allow_unused=True)
        unread = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
        assert not unread


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_and_stages_describe_the_features(family: str) -> None:
    backbone = parted(family)
    features = backbone.stem(images_for(backbone.input_size))
    assert len(backbone.layouts) == len(backbone.blocks) + 1 == len(backbone.block_names) + 1
    for block, layout in zip([*backbone.blocks, None], backbone.layouts, strict=True):
        check_layout(features, layout)
        features = block(features) if block is not None else features
    assert backbone.stage_boundaries == FAMILIES[family][2]
    modules = dict(backbone.model.named_modules())
    assert all(name in modules for name in backbone.block_names)


def check_layout(features: torch.Tensor, layout: Layout) -> None:
    grid = layout.to_grid(features)
    assert grid.shape == (features.shape[0], *layout.grid, layout.width)
    prefix = layout.prefix(features)
    assert (prefix is None) == (layout.num_prefix_tokens == 0)
    count = grid.numel() + (prefix.numel() if prefix is not None else 0)
    assert count == features.numel()


# Layout against timm's own reading of the features: forward_intermediates gives them as [B, D, H, W].
INTERMEDIATES = ["swin", "swinv2_cr", "vit", "vit registers", "deit distilled", "eva02", "xcit", "beit", "cait"]
INTERMEDIATES += ["hiera", "mvitv2", "mvitv2 class token", "pvt_v2", "davit", "maxvit", "convnext", "resnet"]


@pytest.mark.parametrize("family", INTERMEDIATES)
def test_to_grid_equals_timms_intermediate_features(family: str) -> None:
    backbone = parted(family)
    images = images_for(backbone.input_size)
    with torch.no_grad():
        expected = backbone.model.forward_intermediates(images, intermediates_only=True)
        grids, features = [], backbone.stem(images)
        for block, layout in zip(backbone.blocks, backbone.layouts[1:], strict=True):
            features = block(features)
            grids.append(layout.to_grid(features).permute(0, 3, 1, 2))
    # A stage ends where the next one begins; models without stages show every block.
    ends = [index - 1 for index in backbone.stage_boundaries] or list(range(len(grids) - 1))
    ends.append(len(grids) - 1)
    if family == "resnet":
        expected = expected[1:]  # the first is the stem's
    if family == "maxvit":
        expected = expected[-len(backbone.stage_boundaries) - 1 :]
    for end, wanted in zip(ends, expected, strict=False):
        assert torch.equal(grids[end], wanted), backbone.block_names[end]


def test_hiera_tokens_come_back_in_raster_order() -> None:
    backbone = parted("hiera")
    for block, layout in enumerate(backbone.layouts[:-1]):
        if layout.order is None:
            continue
        count = layout.grid[0] * layout.grid[1]
        position = torch.tensor(layout.order).view(1, count, 1)  # each token says where it stands
        raster = layout.to_grid(position.expand(1, count, layout.width))[0, :, :, 0].flatten()
        assert raster.tolist() == list(range(count)), block
    assert backbone.layouts[0].order is not None


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["vit", "swin", "mvitv2", "xcit", "pvt_v2", "eva02"])
def test_parts_compile_without_graph_breaks(family: str) -> None:
    backbone = parted_copy(family)
    images = images_for(backbone.input_size)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(backbone, backend="eager", fullgraph=True)
        assert torch.equal(compiled(images), backbone(images))


# Outlines --------------------------------------------------------------------------------------------------------


OUTLINED = [*(family for family in FAMILIES if f"{family}, wider" not in WIDER), *WIDER]


def glue_of(module: nn.Module) -> object:
    """What stands around the timm modules of one part, as plain values."""
    if isinstance(module, nn.Sequential):
        return [glue_of(child) for child in module]
    if not isinstance(module, Step):
        return type(module)
    glue = module.glue
    around = (
        (glue.func, glue.keywords) if isinstance(glue, functools.partial) else getattr(glue, "__name__", type(glue))
    )
    recomputed = [(name, made.method, made.kwargs, made.index) for name, made in module.recomputed.items()]
    return [type(module.module), around, module.args, module.kwargs, recomputed, module.unpack, module.shape]


@pytest.mark.few(4)
@pytest.mark.parametrize("family", OUTLINED)
def test_an_outline_is_the_split_without_its_proof(family: str) -> None:
    proved = parted_copy(family).train()
    model, size = proved.model, proved.input_size
    random_state = torch.get_rng_state()
    parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    drawn = outline(model, size)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in ("block_names", "layouts", "stage_boundaries", "input_size", "num_classes"):
        assert getattr(drawn, name) == getattr(proved, name), name
    assert list(map(glue_of, drawn.blocks)) == list(map(glue_of, proved.blocks))
    assert glue_of_tail(drawn) == glue_of_tail(proved)
    assert type(drawn.model) is type(model)
    assert drawn.training == model.training

    # The model's very parameters and buffers, in the same parts, under the same names.
    for ours, theirs in ((drawn, proved), (drawn.model, model)):
        for kind in ("named_parameters", "named_buffers"):
            named = [
                {name: id(tensor) for name, tensor in getattr(one, kind)(remove_duplicate=False)}
                for one in (ours, theirs)
            ]
            assert named[0] == named[1]
    for name, parameter in drawn.model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert id(parameter) == parameters[name][0]
        assert torch.equal(parameter, parameters[name][1])

    images = images_for(size)
    for mode in (False, True):
        ours = run(drawn.train(mode), images)
        assert torch.equal(ours, run(copy.deepcopy(model).train(mode), images))


def glue_of_tail(backbone: Backbone) -> object:
    glue = backbone.tail.glue
    around = (
        (glue.func, glue.keywords) if isinstance(glue, functools.partial) else getattr(glue, "__name__", type(glue))
    )
    return around, backbone.tail.before_head, len(backbone.tail.unused)


@pytest.mark.few(4)
@pytest.mark.parametrize("family", OUTLINED)
def test_without_initialization_buffers_are_right_and_nothing_is_drawn(family: str) -> None:
    initialised, size = build(family)
    with without_initialization():
        bare, _ = build(family, shaken=False)
    assert [(name, p.shape) for name, p in bare.named_parameters()] == [
        (name, p.shape) for name, p in initialised.named_parameters()
    ]
    ours, theirs = dict(bare.named_buffers()), dict(initialised.named_buffers())
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    bare.load_state_dict(initialised.state_dict())
    images = images_for(size)
    assert torch.equal(run(outline(bare, size).eval(), images), run(initialised.eval(), images))


def test_models_are_made_quickly_without_initialization() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        timm.create_model("vit_base_patch16_224", depth=4)
        return time.perf_counter() - start

    ordinary = min(seconds() for _ in range(2))
    with without_initialization():
        bare = min(seconds() for _ in range(2))
    assert bare < 0.5 * ordinary, (bare, ordinary)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("vit", "halves/2"),
        ("convnext", "none"),
        *(pytest.param(f, "halves/2", marks=pytest.mark.heavy) for f in ("swin", "swinv2", *WIDER)),
    ],
)
def test_an_outline_is_estimated_as_the_split_is(family: str, how: str) -> None:
    model, size = build(family)
    with without_initialization():
        bare, _ = build(family, shaken=False)
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.fill_(float("nan"))  # whatever was in memory
    peaks = []
    for backbone in (split(model, size), outline(bare, size)):
        learner = LocalLearner(backbone, modules=2, objective=GreedySupervised(), checkpoint=how)
        profile = estimate_step(learner, 6, torch.optim.AdamW)
        peaks.append((profile.peak_bytes, profile.static_bytes, profile.by_category))
    assert peaks[0] == peaks[1]


HEAVY = [
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224", "vit_small_patch16_224"),
    *("deit3_small_patch16_224", "beitv2_base_patch16_224", "eva02_small_patch14_224", "cait_xxs24_224"),
    *("xcit_tiny_12_p8_224", "davit_tiny", "maxvit_tiny_tf_224", "mvitv2_tiny", "mvitv2_base_cls", "pvt_v2_b2_li"),
    *("convit_tiny", "convit_small"),
    *("hiera_tiny_224", "convnext_tiny", "resnet50", "coatnet_0_rw_224", "poolformer_s12", "focalnet_tiny_srf"),
]


@pytest.mark.heavy
@pytest.mark.parametrize("name", HEAVY)
def test_models_of_real_size(name: str) -> None:
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1)
    size = model.pretrained_cfg["input_size"]
    backbone: Backbone = split(model, size)
    assert torch.equal(run(backbone.eval(), images_for(size)), run(model, images_for(size)))
    for before, after in itertools.pairwise(backbone.stage_boundaries):
        assert before < after
