"""InfoPro and TRGL in their sources' own forms, against plain loops that have no code in common with ours."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import SIZE, batches, make, make_learner, term_of, train
from localgrad import FeatureReconstruction, GreedySupervised, ImageReconstruction, LocalLearner
from localgrad.app.build import build, build_recipe_objective
from localgrad.app.planning import adamw as planned_adamw
from localgrad.app.planning import plan
from localgrad.app.recipe import Recipe, overlay, preset
from localgrad.errors import BackboneError, RecipeError
from localgrad.estimating import estimate_step
from localgrad.objectives.carried import LocalBatch
from research.reproduce import tables
from research.reproduce.methods import METHODS, REMEDIES, SOURCES, overlay_of
from research.reproduce.profiles import PROFILES
from research.reproduce.tables import TABLES, cells_of, digest, fingerprint, recipe_of

TRGL = GreedySupervised(
    classifier="linear", classifier_options={"norm_first": True}, transport_tau=0.5, transport_per="branch"
)
PIXELS: dict[str, Any] = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# ------------------------------------------------------------------------------------------------- TRGL


def branches_of_vit(block: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A ViT's block written out: what it gives, and its two branches."""
    attention = block.ls1(block.attn(block.norm1(x)))
    x = x + block.drop_path1(attention)
    mlp = block.ls2(block.mlp(block.norm2(x)))
    return x + block.drop_path2(mlp), [attention, mlp]


@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.5}, {"init_values": 0.3}], ids=str)
def test_trgl_is_its_formula(options: dict[str, Any]) -> None:
    """Losses and gradients of each module, with branches after their layer scale and before their drop path."""
    learner = make_learner(make(**options), modules=2, objective=TRGL)
    (images, labels) = batches(1)[0]
    features, model = images, learner.model
    boundary = learner.plan.boundaries[0]
    learner.train()
    for index, module in enumerate(learner.modules):
        learner.model.zero_grad()
        torch.manual_seed(5)
        output = module(features, LocalBatch(images, labels))
        output.loss.backward()
        ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        learner.model.zero_grad()

        torch.manual_seed(5)
        x = features if index else model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        penalty = torch.zeros(())
        for block in model.blocks[boundary:] if index else model.blocks[:boundary]:
            x, branches = branches_of_vit(block, x)
            for branch in branches:
                penalty = penalty + sum(branch.flatten() ** 2) / branch.numel() / (2 * 0.5)
        if index:
            logits = model.forward_head(model.norm(x))
        else:
            head = term_of(module.objective, "task").classifier
            positions = F.layer_norm(x, x.shape[-1:], head.pool.norm.weight, head.pool.norm.bias)
            logits = head.head(torch.cat([positions[:, 1:].mean(dim=1), positions[:, 0]], dim=1))
        loss = F.cross_entropy(logits, labels) + penalty
        loss.backward()
        assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert float(output.terms["transport"]) == pytest.approx(float(penalty.detach()), rel=1e-5)
        for name, weight in model.named_parameters():
            assert (weight.grad is not None) == (name in ours), name
            if weight.grad is not None:
                torch.testing.assert_close(ours[name], weight.grad, rtol=1e-3, atol=1e-6)
        features = output.features


def test_trgl_of_swin_leaves_out_what_changes_the_shape() -> None:
    learner = make_learner(make("swin"), modules=2, objective=TRGL)
    images, labels = batches(1)[0]
    learner.train()
    output = learner.modules[0](images, LocalBatch(images, labels))
    x, penalty = learner.model.patch_embed(images), 0.0
    with torch.no_grad():
        for layer in learner.model.layers:
            x = layer.downsample(x)
            for block in layer.blocks:
                first = block._attn(block.norm1(x))
                x = x + first
                second = block.mlp(block.norm2(x))
                x = x + second
                penalty += float(first.square().mean() + second.square().mean()) / (2 * 0.5)
            if x.shape == output.features.shape:
                break
    assert float(output.terms["transport"]) == pytest.approx(penalty, rel=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("checkpoint", ["blocks", "halves", "halves/2", "blocks/2", "halves:1"])
def test_trgl_is_the_same_where_blocks_are_recomputed(checkpoint: str) -> None:
    data = batches(2)
    settings: dict[str, Any] = {"modules": 2, "objective": TRGL, "optimizer": sgd}
    plain = make_learner(make(drop_path_rate=0.3), **settings)
    other = make_learner(make(drop_path_rate=0.3), checkpoint=checkpoint, **settings)
    for ours, theirs in zip(train(plain, data), train(other, data), strict=True):
        assert [float(loss) for loss in ours.losses] == pytest.approx([float(loss) for loss in theirs.losses], rel=1e-5)
    for one, two in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.heavy
def test_trgl_is_estimated_and_planned() -> None:
    learner = make_learner(modules=2, objective=TRGL)
    blocks = make_learner(modules=2, objective=GreedySupervised(classifier="linear", transport_tau=0.5))
    assert estimate_step(learner, 8, planned_adamw).peak_bytes >= estimate_step(blocks, 8, planned_adamw).peak_bytes
    found = plan(make(), batch_size=8, modules=2, objective=TRGL, input_size=SIZE)
    assert found.forecast.peak_bytes > 0


def test_what_branches_would_skip_is_refused() -> None:
    """Hooks and another forward of a block, set after it was cut: its branches run without them."""
    learner = make_learner(make(), modules=2, objective=TRGL)
    train(learner, batches(1))
    block: Any = learner.model.get_submodule("blocks.1")
    seen: list[object] = []
    hook = block.register_forward_hook(lambda *_: seen.append(0))
    for step in (learner.step, copy.deepcopy(learner).step):
        with pytest.raises(RecipeError, match=r"transport_per: Block has hooks.*set hooks on its parts"):
            step(*batches(1)[0])
    hook.remove()
    hook = block.attn.register_forward_hook(lambda *_: seen.append(0))
    train(learner, batches(1))
    assert len(seen) == 1
    hook.remove()
    block.forward = lambda x: x
    with pytest.raises(RecipeError, match="or another forward"):
        train(learner, batches(1))


def test_blocks_without_branches_are_refused() -> None:
    with pytest.raises(
        BackboneError, match=r"transport_per: .* can't be cut into its residual branches; take transport"
    ):
        LocalLearner(make("resnet"), modules=2, objective=TRGL, input_size=SIZE)
    with pytest.raises(RecipeError, match="transport_per: unknown 'half'; take block or branch"):
        LocalLearner(make(), modules=2, objective=GreedySupervised(transport_per="half"), input_size=SIZE)
    options = {"norm_first": "yes"}
    with pytest.raises(RecipeError, match="norm_first must be true or false, got 'yes'"):
        LocalLearner(
            make(), objective=GreedySupervised(classifier="linear", classifier_options=options), input_size=SIZE
        )


# ------------------------------------------------------------------------------------------------- InfoPro


def bilinear(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation with aligned corners, [h, w, d] to [height, width, d]."""
    result = np.zeros((height, width, grid.shape[2]))
    for row in range(height):
        for column in range(width):
            y = row * (grid.shape[0] - 1) / (height - 1)
            x = column * (grid.shape[1] - 1) / (width - 1)
            top, left = min(int(y), grid.shape[0] - 2), min(int(x), grid.shape[1] - 2)
            dy, dx = y - top, x - left
            result[row, column] = (
                grid[top, left] * (1 - dy) * (1 - dx)
                + grid[top, left + 1] * (1 - dy) * dx
                + grid[top + 1, left] * dy * (1 - dx)
                + grid[top + 1, left + 1] * dy * dx
            )
    return result


def convolved(image: np.ndarray, convolution: nn.Conv2d) -> np.ndarray:
    """A 3 x 3 convolution, [h, w, d] to [h, w, channels]."""
    weight, bias = convolution.weight.detach().double().numpy(), convolution.bias.detach().double().numpy()
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    total = np.zeros((*image.shape[:2], len(weight))) + bias
    for row in range(3):
        for column in range(3):
            part = padded[row : row + image.shape[0], column : column + image.shape[1]]
            total += part @ weight[:, :, row, column].T
    return total


def test_infopro_is_its_formula() -> None:
    """Weights linear over modules; cross-entropy of pixels from 0 to 1 after bilinear upsampling."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    objective = ImageReconstruction(
        decoder="bilinear", classifier="linear", reconstruction_error="bce", reconstruction_weight=(5.0, 0.5),
        task_weight=(0.2, 1.0), **PIXELS,
    )  # fmt: skip
    learner = LocalLearner(model, modules=4, objective=objective, input_size=(3, 16, 16))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, 16, 16, generator=generator)
    images = (pixels - torch.tensor(PIXELS["pixel_mean"])[:, None, None]) / torch.tensor(PIXELS["pixel_std"])[
        :, None, None
    ]
    labels = torch.tensor([0, 3, 1])
    learner.train()
    features = images
    for index, module in enumerate(learner.modules[:-1]):
        output = module(features, LocalBatch(images, labels))
        decoder = term_of(module.objective, "reconstruction").decoder
        grids = output.features[:, 1:].detach().double().numpy().reshape(3, 4, 4, 32)
        first = np.stack([convolved(bilinear(grid, 16, 16), decoder.first) for grid in grids])
        mean, variance = first.mean(axis=(0, 1, 2)), first.var(axis=(0, 1, 2))
        hidden = np.maximum((first - mean) / np.sqrt(variance + 1e-5), 0)
        probabilities = 1 / (1 + np.exp(-np.stack([convolved(image, decoder.second) for image in hidden])))
        target = pixels.permute(0, 2, 3, 1).double().numpy()
        bits = target * np.log(probabilities) + (1 - target) * np.log(1 - probabilities)
        reconstruction = -bits.mean()
        task = float(F.cross_entropy(output.logits, labels))
        share = index / 2
        expected = (5.0 + (0.5 - 5.0) * share) * reconstruction + (0.2 + 0.8 * share) * task
        assert float(output.terms["reconstruction"]) == pytest.approx(reconstruction, rel=1e-5)
        assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
        features = output.features


def test_infopro_of_a_recipe_knows_how_its_images_were_normalised() -> None:
    options = SOURCES["infopro-source"]["local.options"]
    changes = {"local.objective": "image", "local.options": options, "local.modules": 3, "execution.device": "cpu"}
    recipe = Recipe.from_dict(overlay(preset("digits"), changes))
    job = build(recipe)
    objective: Any = job.learner.objective
    assert (objective.pixel_mean, objective.pixel_std) == (tuple(job.data.info.mean), tuple(job.data.info.std))
    batch = next(job.batches.epoch(0))
    term = term_of(job.learner.modules[0].objective, "reconstruction")
    pixels = batch.images.permute(0, 2, 3, 1) * term.pixel_std + term.pixel_mean
    assert -1e-5 < float(pixels.min()) < 0.01
    assert 0.9 < float(pixels.max()) < 1 + 1e-5
    assert [list(module.objective.terms) for module in job.learner.modules] == [
        ["reconstruction"],  # the task's weight begins at 0
        ["task", "reconstruction"],
        ["task"],
    ]


def test_impossible_pixels_are_refused() -> None:
    def built(**options: Any) -> None:
        objective = ImageReconstruction(decoder="bilinear", reconstruction_error="bce", **options)
        LocalLearner(make(), modules=2, objective=objective, input_size=SIZE)

    built(**PIXELS)
    with pytest.raises(RecipeError, match="'bce' compares pixels from 0 to 1; give pixel_mean and pixel_std"):
        built()
    for std in ((0.2, 0.2), (0.0, 0.2, 0.2), (math.nan, 0.2, 0.2)):
        with pytest.raises(RecipeError, match="give 3 finite numbers each, std above 0"):
            built(pixel_mean=(0.5, 0.5, 0.5), pixel_std=std)
    with pytest.raises(RecipeError, match="'bce' is of pixels"):
        LocalLearner(make(), objective=FeatureReconstruction(reconstruction_error="bce"), input_size=SIZE)


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["infopro-source", "trgl-source"])
def test_presets_and_methods_of_one_name_say_the_same(name: str) -> None:
    local = preset(name)["local"]
    assert local["objective"] == SOURCES[name]["local.objective"]
    given = {key: value for key, value in local["options"].items() if (key, value) != ("task_weight", 1.0)}
    assert given == SOURCES[name]["local.options"]
    build_recipe_objective(Recipe.from_dict(preset(name)))
    ours = preset({"infopro-source": "infopro", "trgl-source": "greedy"}[name])
    assert {**preset(name), "local": None} == {**ours, "local": None}


def test_names_of_sources_are_new_and_in_a_table_of_their_own() -> None:
    assert not SOURCES.keys() & {*METHODS, *REMEDIES}
    assert [name for name, table in TABLES.items() if SOURCES.keys() & set(table.methods)] == ["sources"]
    assert overlay_of("trgl") == {
        "local.objective": "greedy", "local.options": {"classifier": "linear", "transport_tau": 1.0},
    }  # fmt: skip


def test_published_recipes_mean_what_they_meant() -> None:
    """Of the methods that were there before sources had forms of their own."""
    found = {
        f"{table}: {cell.method}": fingerprint(recipe_of(cell, PROFILES["cpu"]))
        for table in ("ranking", "cifar10")
        for cell in cells_of(TABLES[table], PROFILES["cpu"])
        if (cell.seed, cell.modules) in ((0, 1), (0, 4))
    }
    assert (tables.REVISION, len(found), digest(found)) == (
        2,
        48,
        "ff3e0b69",
    )  # `classifier-tail` and its kin, and `global-tail-40`, are the latest
    assert found["ranking: trgl"] == "9ba500cb"
