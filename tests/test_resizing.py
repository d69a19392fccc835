"""How images come to the model's size as pretrained weights want it: against timm, kept with the run, and said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

import localgrad
from helpers import Cli, Recorder, assert_refused
from localgrad.app import build, fitting, run_folders, using_runs
from localgrad.app.recipe import Recipe, as_recipe
from localgrad.backbones.weights import start_from
from localgrad.errors import DataError
from localgrad.run import _normalised_as
from localgrad.training.prediction import load_images_for_prediction
from localgrad.training.settings import DataSettings
from localgrad.training.transforms import LIGHT_AREA, Prepared

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
RECIPE: dict[str, Any] = {
    "model": {"name": NAME, "img_size": 32, "patch_size": 8, "options": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
    "data.name": "photos",
    "local.modules": 2,
    "training": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0},
    "execution": {"device": "cpu", "num_threads": 1, "num_workers": 0},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photos; memory is estimated elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            photo(60 + index % 3, 50, 12 * number + index).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Smooth, with some noise, as photos are."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    return Image.fromarray((smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8))


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def vit(**config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, **VIT, pretrained_cfg_overlay=config)


def pretrained(here: Path, **config: Any) -> dict[str, Any]:
    """A recipe that starts from timm's weights with a config."""
    save_file(vit().state_dict(), here / "w.safetensors")
    overlay = {"file": str(here / "w.safetensors"), **config}
    options = {**RECIPE["model"]["options"], "pretrained_cfg_overlay": overlay}
    return {**RECIPE, "model": {**RECIPE["model"], "pretrained": True, "options": options}}


@pytest.mark.parametrize(
    ("interpolation", "crop", "side"), [("bicubic", 0.9, 224), ("bilinear", 0.875, 224), ("bicubic", 1.0, 96)]
)
@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 48)], ids=["wide", "high", "small"])
def test_what_is_evaluated_is_what_timm_evaluates(
    size: tuple[int, int], interpolation: str, crop: float, side: int
) -> None:
    """Pillow rounds between its two passes, and torchvision's kernel for bytes sums in other fractions."""
    model = vit(interpolation=interpolation, crop_pct=crop, input_size=(3, side, side), mean=(0,) * 3, std=(1,) * 3)
    image = photo(*size, seed=1)
    wanted = create_transform(**resolve_model_data_config(model), is_training=False)(image).mul(255).round()
    resizing = {"interpolation": interpolation, "crop": crop}
    for name in ("imagenet", "light"):
        found = Prepared(name, (side, side), training=False, resizing=resizing)(pixels(image), 0)
        differs = (found - wanted).abs()
        assert differs.max() <= 2
        assert (differs > 1).double().mean() < 1e-4
        assert (differs > 0).double().mean() < 0.06


def test_the_nearest_pixel_is_pillows() -> None:
    image = photo(96, 96, seed=2)
    wanted = np.array(image.resize((32, 32), Image.Resampling.NEAREST))
    found = Prepared("light", (32, 32), training=False, resizing={"interpolation": "nearest", "crop": 1.0})
    assert torch.equal(found(pixels(image), 0), torch.from_numpy(wanted).permute(2, 0, 1))


def test_light_cuts_half_or_more_and_mirrors_small_images_too() -> None:
    """In an image of columns 0 to 31 each crop shows how wide it is, and whether it was mirrored."""
    columns = torch.arange(32, dtype=torch.uint8).mul(8).expand(3, 32, 32)
    prepared = Prepared("light", (64, 64), training=True)
    found = torch.stack([prepared(columns, seed) for seed in range(60)]).float()
    assert found.shape == (60, 3, 64, 64)
    across = (found[:, 0, 32, -1] - found[:, 0, 32, 0]) / (8 * 32)
    assert 20 <= int((across < 0).sum()) <= 40
    # The narrowest crop of half the area is 3/4 as wide as high; pixels at both ends show their centres.
    assert float(across.abs().min()) > (LIGHT_AREA[0] * 0.75) ** 0.5 - 0.1
    assert float(across.abs().max()) <= 1


def test_pretrained_weights_bring_interpolation_and_crop_and_the_run_keeps_them(here: Path) -> None:
    listener = Recorder()
    given = pretrained(here, interpolation="bilinear", crop_pct=0.8)
    localgrad.train(given, out=here / "run", sinks=[listener])
    said = (
        "Images are resized bilinear and the central 0.8 of their side is evaluated, as with the pretrained weights; "
        "data.interpolation and data.crop set others."
    )
    lines = list(listener.events[0].details)  # type: ignore[attr-defined]
    assert "Normalised by mean" in lines[lines.index(said) - 1]
    kept = run_folders.read_recipe(here / "run").method.data
    assert (kept.transform, kept.interpolation, kept.crop) == ("imagenet", "bilinear", 0.8)

    seen: list[Any] = []
    evaluate = using_runs.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(using_runs, "evaluate", lambda learner, own: seen.append(own) or evaluate(learner, own))
        using_runs.evaluate_run(here / "run")
    wanted = Prepared("imagenet", (32, 32), training=False, resizing={"interpolation": "bilinear", "crop": 0.8})
    by_default = Prepared("imagenet", (32, 32), training=False)
    path = here / "photos" / "cat" / "0.png"
    image = pixels(Image.open(path))
    assert torch.equal(seen[0].wanted.prepared(image, 0), wanted(image, 0))
    assert not torch.equal(wanted(image, 0), by_default(image, 0))
    info = run_folders.read_description(here / "run").info
    [(_, found)] = load_images_for_prediction([path], kept, info, image_size=(32, 32))
    assert torch.equal(found, seen[0].input.of(wanted(image, 0)))
    # A run that starts from this one's folder takes its own, and torchrun's restart what the run has settled.
    own = as_recipe({**RECIPE, "model": {**RECIPE["model"], "weights": str(here / "run")}})
    settled = build.build(own, is_new=True).recipe.method.data
    assert (settled.interpolation, settled.crop) == ("bilinear", 0.8)
    assert _normalised_as(run_folders.read_recipe(here / "run"), as_recipe(given)).method.data == kept


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"data.crop": 0.7}, ("bilinear", 0.7)),
        ({"data.crop": 0.7, "data.interpolation": "nearest"}, ("nearest", 0.7)),
        ({"data.transform": "none"}, (None, None)),
        ({"data.transform": f"{__name__}:own"}, (None, None)),
        ({"data.transform": f"{__name__}:own_crop"}, (None, 0.8)),
    ],
    ids=str,
)
def test_what_is_set_wins_and_transforms_take_what_they_take(
    changes: dict[str, Any], found: tuple[Any, Any], here: Path
) -> None:
    recipe = as_recipe({**pretrained(here, interpolation="bilinear", crop_pct=0.8), **changes})
    job = build.build(recipe, is_new=True)
    assert (job.recipe.method.data.interpolation, job.recipe.method.data.crop) == found
    assert any("as with the pretrained weights" in note for note in job.data.info.notes) == (
        0.8 in found or "bilinear" in found
    )
    assert Recipe.from_toml(job.recipe.to_toml()) == job.recipe


def own(image_size: tuple[int, int], *, training: bool) -> Any:
    return lambda image: image[:, : image_size[0], : image_size[1]]


def own_crop(image_size: tuple[int, int], *, training: bool, crop: float = 2.0) -> Any:
    return own(image_size, training=training)


def test_folders_say_it_and_what_is_not_made_here_is_said(here: Path) -> None:
    timm.models.save_for_hf(vit(), here / "hub")
    config = json.loads((here / "hub" / "config.json").read_text())
    config["pretrained_cfg"] |= {"interpolation": "lanczos", "crop_pct": 0.95, "crop_mode": "squash"}
    (here / "hub" / "config.json").write_text(json.dumps(config))
    assert start_from(vit(), str(here / "hub")).evaluated_by == {
        "crop_pct": 0.95, "interpolation": "lanczos", "crop_mode": "squash"
    }  # fmt: skip
    job = build.build(as_recipe({**RECIPE, "model": {**RECIPE["model"], "weights": "hub"}}), is_new=True)
    assert (job.recipe.method.data.interpolation, job.recipe.method.data.crop) == ("bicubic", 0.95)
    assert job.data.info.notes[-2:] == (
        "The weights' interpolation is lanczos, which there isn't here: it is bicubic.",
        "The weights' images were brought to size by crop mode squash; here their centre is cut out.",
    )


def test_without_weights_a_run_writes_down_what_it_takes(here: Path) -> None:
    job = build.build(as_recipe(RECIPE), is_new=True)
    data = job.recipe.method.data
    assert (data.transform, data.interpolation, data.crop) == ("imagenet", "bicubic", 0.875)
    assert not any("as with the pretrained" in note for note in job.data.info.notes)
    mine = as_recipe({**RECIPE, "data.transform": f"{__name__}:own_crop"})
    assert build.build(mine, is_new=True).recipe == mine, "its default is none that a recipe can have"
    assert build.build(as_recipe(RECIPE)).recipe.method.data == DataSettings(name="photos"), "one from before"


def test_what_it_does_not_go_with_is_one_line(here: Path, cli_: Cli) -> None:
    (here / "r.toml").write_text(as_recipe(RECIPE).to_toml())
    train = ("train", "--recipe", "r.toml", "--out", "run")
    assert_refused(
        cli_(*train, "--crop", "0.9", "--fit", "pad"), "--crop 0.9 needs --transform", "--transform imagenet"
    )
    said = cli_(*train, "--interpolation", "bilinear", "--transform", "none")
    assert_refused(said, "--interpolation bilinear needs --transform")
    assert_refused(cli_(*train, "--crop", "1.5"), "data.crop = 1.5")
    assert_refused(cli_(*train, "--interpolation", "lanczos"), "data.interpolation = 'lanczos'")
    with pytest.raises(DataError, match=r"crop.*: the transform .*:own takes no crop; leave it out"):
        build.build(as_recipe({**RECIPE, "data.transform": f"{__name__}:own", "data.crop": 0.9}), is_new=True)
