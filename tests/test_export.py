"""Results that live elsewhere: each export read in the library that it is for, in a process without localgrad."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import localgrad
from helpers import MICRO, assert_refused
from localgrad.app import fitting, using_runs
from localgrad.app.build import input_size_of, make_model
from localgrad.app.recipe import Recipe, overlay
from localgrad.app.timm_classifiers import evaluated_images, timm_config_of_run
from localgrad.backbones.base import BACKBONES
from localgrad.errors import BackboneError, LocalgradError, RecipeError, RunFolderError, RunWarning
from localgrad.integrations import exporting, programs
from localgrad.integrations.model_card import gradients_of_run, model_card
from localgrad.training.data import DataInfo
from localgrad.training.folder import save_weights
from localgrad.training.prediction import load_images_for_prediction
from localgrad.training.settings import DataSettings

if TYPE_CHECKING:
    from helpers import Cli

VIT = {"embed_dim": 8, "depth": 2, "num_heads": 2}


def info_of(channels: int = 1, classes: tuple[str, ...] = ("ant", "bee", "été"), **more: Any) -> DataInfo:
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return DataInfo("toy", classes, channels, None, mean, std, 0, 9, 3, 3, (), **more)


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_dict(overlay(copy.deepcopy(MICRO), {"training.epochs": 1, **changes}))


def agrees(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


class ByHand(nn.Module):
    """Of nobody's library; with a batch norm that has seen images."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU())
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


def by_hand() -> nn.Module:
    torch.manual_seed(2)
    model = ByHand()
    with torch.no_grad():
        model(torch.randn(4, 3, 8, 8) * 2 + 1)
    return model.train()


# config.json -------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "one channel, a patch size": ({"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "options": VIT}, 1),
    "a recipe's options": (
        {
            "name": "swin_tiny_patch4_window7_224",
            "img_size": 16,
            "patch_size": 2,
            "options": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        },
        3,
    ),
    "no size of its own": ({"name": "resnet18", "img_size": 32, "options": {"channels": [8, 8, 8, 8]}}, 1),
    "not square": ({"name": "vit_tiny_patch16_224", "options": {**VIT, "img_size": [16, 32], "patch_size": 8}}, 3),
    "class tokens of another layer": ({"name": "cait_xxs24_224", "img_size": 32, "options": {**VIT, "depth": 1}}, 3),
    "no class token": (
        {
            "name": "vit_tiny_patch16_224",
            "img_size": 32,
            "options": {**VIT, "class_token": False, "global_pool": "avg"},
        },
        3,
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_timm_makes_a_runs_model_again_by_its_config(kind: str, tmp_path: Path) -> None:
    values, channels = CONFIGS[kind]
    info, of = info_of(channels), recipe(model=values, **{"model.drop_path": 0.1})
    of = of if "patch_size" in values or "img_size" in values else recipe(model=values)
    settings = of.method.model
    torch.manual_seed(3)
    model, _ = make_model(settings, num_classes=3, num_channels=channels)
    size = input_size_of(model, settings, channels)
    (tmp_path / "config.json").write_text(timm_config_of_run(of, model, info, size), encoding="utf-8")
    save_weights(tmp_path / "model.safetensors", model.state_dict())
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, *size)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
    known = again.pretrained_cfg
    assert (tuple(known["input_size"]), known["num_classes"], again.num_classes) == (size, 3, 3)
    assert known["label_names"] == ["ant", "bee", "été"]
    assert not known.get("license"), "that of timm's weights, which this doesn't have"
    found = timm.data.resolve_model_data_config(again)
    assert (tuple(found["mean"]), tuple(found["std"]), tuple(found["input_size"])) == (info.mean, info.std, size)


def test_what_timm_writes_of_a_model_is_what_is_relied_on(tmp_path: Path) -> None:
    """Without a kind of weights its public function writes the config alone."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, **VIT)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=None)
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]
    found = json.loads((tmp_path / "config.json").read_text())
    assert {"architecture", "num_classes", "pretrained_cfg"} <= found.keys()


@pytest.mark.parametrize(
    ("settings", "more", "size"),
    [
        ({"transform": "imagenet", "crop": 0.8, "interpolation": "bilinear"}, {}, (20, 20)),
        ({"transform": "light"}, {}, (20, 20)),
        ({"transform": None}, {}, (20, 20)),
        ({"transform": "none"}, {"fit": "squash"}, (20, 28)),
    ],
    ids=str,
)
def test_images_go_through_the_same_in_timm(
    settings: dict[str, Any], more: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    info, data = info_of(3, **more), DataSettings(**settings, fit=more.get("fit"))
    values = evaluated_images(data, info, (3, *size)).values
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((72, 48), Image.Resampling.BICUBIC)  # smooth; its centre is whole pixels
    image.save(tmp_path / "image.png")
    [(_, ours)] = load_images_for_prediction([tmp_path / "image.png"], data, info, image_size=size)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=dict(values)))(image)
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs() * torch.tensor(info.std).view(-1, 1, 1) * 255
    assert float(difference.mean()) < 1, "of 255 steps: rounding between two resizings"


def test_what_timm_has_no_words_for_is_said() -> None:
    size = (3, 20, 20)
    for whole in (replace(info_of(3), found_size=(40, 40)), info_of(3, fit="squash")):
        assert evaluated_images(DataSettings(), whole, size).notes == ()
    for found_size in (None, (40, 60)):
        (note,) = evaluated_images(DataSettings(), replace(info_of(3), found_size=found_size), size).notes
        assert "were cut, and then resized; timm and transformers resize them first" in note
    padded = evaluated_images(DataSettings(), info_of(3, fit="pad"), size)
    assert padded.values["crop_mode"] == "border"
    assert "colour (255, 255, 255)" in padded.notes[0]
    own = evaluated_images(DataSettings(transform="mine:cut"), info_of(3, image_range=(0, 4095)), size)
    assert own.values["notes"] == list(own.notes)
    assert "mine:cut" in own.notes[0] and "from 0 to 4095" in own.notes[1]
    assert "longer side" in evaluated_images(DataSettings(transform="light"), info_of(3), (3, 20, 28)).notes[0]


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _quick_estimates() -> Iterator[None]:
    """Estimates are test_memory.py's matter."""
    with pytest.MonkeyPatch.context() as patch:
        estimate = SimpleNamespace(peak_bytes=2**20, static_bytes=2**19)
        patch.setattr(fitting, "estimate_step", lambda *_, **__: estimate)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of timm's model, and one with adapters."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    # Fast enough for logits to differ between images.
    localgrad.train(recipe(**{"training.epochs": 2, "training.lr": 0.02}), out=folder / "plain")
    localgrad.train(recipe(**{"model.lora": 2, "training.lr": 0.05}), out=folder / "lora")
    return folder


@pytest.fixture(scope="module")
def hub_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model of transformers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4, image_size=16,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder / "model")
    model = {"name": f"hf:{folder / 'model'}", "pretrained": True}
    changed = overlay({**copy.deepcopy(MICRO), "model": model}, {"training.epochs": 1, "training.lr": 0.01})
    localgrad.train(Recipe.from_dict(changed), out=folder / "run")
    return folder / "run"


def test_a_runs_folder_says_what_its_model_is_given(runs: Path) -> None:
    found = json.loads((runs / "plain" / "data.json").read_text())
    assert (found["image_size"], found["found_size"]) == ([16, 16], [8, 8])
    read = using_runs.read_description(runs / "plain")
    assert (read.image_size, read.info.found_size) == ((16, 16), (8, 8))


def test_a_damaged_config_is_made_again_when_the_run_goes_on(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "plain", tmp_path / "run"))
    config = folder / "config.json"
    before = config.read_text()
    for epochs, damaged in ((3, before[:40]), (4, None)):
        config.unlink() if damaged is None else config.write_text(damaged)
        localgrad.resume(folder, {"training.epochs": epochs})
        assert config.read_text() == before


# Each in its own library ---------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)

def of_timm(folder, images):
    import timm
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)

def of_transformers(folder, images):
    import transformers
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    return model.eval()(images).logits

def of_torch(path, images):
    return torch.export.load(path).module()(images)

def of_onnx(path, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])

found = {}
for name, kind, path, images in json.load(open(sys.argv[1])):
    with torch.no_grad():
        logits = globals()[kind](path, torch.from_numpy(np.load(images)))
    np.save(f"{images}.{name}.npy", logits.numpy())
assert "localgrad" not in sys.modules
"""


def read_elsewhere(cases: list[tuple[str, str, Path, Tensor]], folder: Path) -> dict[str, Tensor]:
    """Logits of exports, each read by its library, in one process that doesn't import localgrad.

    Args:
        cases: name, the function of ``ELSEWHERE``, path, and images.
        folder: for the images and the logits.
    """
    rows = []
    for name, kind, path, images in cases:
        np.save(folder / f"{name}.npy", images.numpy())
        rows.append((name, kind, str(path), str(folder / f"{name}.npy")))
    (folder / "cases.json").write_text(json.dumps(rows))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder / "cases.json")],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: torch.from_numpy(np.load(f"{images}.{name}.npy")) for name, _, _, images in rows}


def logits_of_run(folder: Path, images: Tensor) -> Tensor:
    """As ``localgrad predict`` has them, from the best epoch's checkpoint."""
    with torch.no_grad():
        found = using_runs.open_run(folder).trained(images)
    return found if isinstance(found, Tensor) else found.logits


def onnx_metadata(path: Path) -> dict[str, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
    return {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}


def libraries() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    import torchvision  # type: ignore[import-untyped]
    import transformers

    def of_torchvision() -> nn.Module:
        made: nn.Module = torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
        )
        nn.init.normal_(made.heads[0].weight, std=0.1)
        return made

    def of_transformers() -> nn.Module:
        config = transformers.ConvNextV2Config(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=32, num_labels=5
        )
        return transformers.ConvNextV2ForImageClassification(config)

    def of_timm() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, **VIT)

    size = (3, 32, 32)
    return {
        "by hand": (by_hand, (3, 8, 8)),
        "torchvision": (of_torchvision, size),
        "transformers": (of_transformers, size),
        "timm": (of_timm, size),
    }


FORMATS = {"torch-export": "of_torch", "onnx": "of_onnx", "timm": ""}
Case = tuple[str, str, Path, Tensor]


def cases_of_libraries(pairs: list[tuple[str, str]], folder: Path) -> tuple[list[Case], dict[str, Tensor]]:
    """Export models of libraries; gives what is to be read elsewhere, and the logits that are wanted."""
    cases: list[Case] = []
    wanted = {}
    for name, to in pairs:
        make, size = libraries()[name]
        torch.manual_seed(1)
        model, images = make().train(), torch.randn(4, *size)
        before = copy.deepcopy(model.state_dict())
        done = localgrad.export(model, to=to, out=folder / f"{name} {to}", example=images)
        assert model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        more = torch.randn(5, *size)
        with torch.no_grad():
            logits: Any = copy.deepcopy(model).eval()(more)
        wanted[f"{name} {to}"] = logits if isinstance(logits, Tensor) else logits.logits
        cases.append((f"{name} {to}", FORMATS[to] or f"of_{name}", done.path, more))
    return cases, wanted


def cases_of_runs(
    plain: Path, lora: Path | None, hub_run: Path | None, folder: Path
) -> tuple[list[Case], dict[str, Tensor]]:
    """The run folders themselves, and what is exported of them; in batches of several sizes."""
    torch.manual_seed(0)
    one, more = torch.randn(1, 1, 16, 16), torch.randn(5, 1, 16, 16)
    paths: dict[str, Path] = {}
    for name, source, to in (
        ("timm", plain, "timm"),
        ("merged", lora, "timm"),
        ("program", plain, "torch-export"),
        ("onnx", plain, "onnx"),
        ("from hub", hub_run, "timm"),
    ):
        if source is None:
            continue
        done = localgrad.export(source, to=to, out=folder / name)
        assert done.difference is not None and done.difference < 1e-5 < done.largest_logit
        assert done.batches == (1, 2, 3)
        paths[name] = done.path
    rows = [
        ("the run", "of_timm", plain, more, plain),
        ("the run with adapters", "of_timm", lora, more, lora),
        ("the run of transformers", "of_transformers", hub_run, more, hub_run),
        ("timm", "of_timm", paths["timm"], more, plain),
        ("merged", "of_timm", paths.get("merged"), more, lora),
        ("from hub", "of_transformers", paths.get("from hub"), more, hub_run),
        ("program of one", "of_torch", paths["program"], one, plain),
        ("program", "of_torch", paths["program"], more, plain),
        ("onnx of one", "of_onnx", paths["onnx"], one, plain),
        ("onnx", "of_onnx", paths["onnx"], more, plain),
    ]
    rows = [row for row in rows if row[4] is not None]
    return [row[:4] for row in rows], {row[0]: logits_of_run(row[4], row[3]) for row in rows}


def check_elsewhere(cases: list[Case], wanted: dict[str, Tensor], folder: Path) -> None:
    found = read_elsewhere(cases, folder)
    assert found.keys() == wanted.keys()
    for name, logits in wanted.items():
        assert agrees(found[name], logits), name
        assert not agrees(found[name], logits.roll(1, dims=1)), "the comparison can fail"


def of_timm(path: Path, images: Tensor) -> Any:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()(images)


def of_torch(path: Path, images: Tensor) -> Any:
    extra = {programs.ABOUT: ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra[programs.ABOUT])["class_names"] == [str(number) for number in range(10)]
    return program.module()(images)


def of_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    assert onnx_metadata(path)["input_size"] == [1, 16, 16]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.parametrize(
    ("to", "read"),
    [("timm", of_timm), ("torch-export", of_torch), pytest.param("onnx", of_onnx, marks=pytest.mark.heavy)],
)
def test_what_is_exported_of_a_run_gives_its_logits(to: str, read: Any, runs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, done = torch.randn(5, 1, 16, 16), localgrad.export(runs / "plain", to=to, out=tmp_path / to)
    with torch.no_grad():
        found = read(done.path, images)
    assert agrees(found, logits_of_run(runs / "plain", images))
    assert not agrees(found, logits_of_run(runs / "plain", -images)), "the comparison can fail"


@pytest.mark.heavy
def test_exports_give_their_logits_in_their_own_libraries(runs: Path, tmp_path: Path) -> None:
    plain = runs / "plain"
    check_elsewhere(*cases_of_runs(plain, None, None, tmp_path), tmp_path)
    about = onnx_metadata(tmp_path / "onnx")
    assert about["class_names"] == [str(number) for number in range(10)]
    info = using_runs.read_description(plain).info
    assert (about["mean"], about["std"], about["input_size"]) == (list(info.mean), list(info.std), [1, 16, 16])
    extra = {programs.ABOUT: ""}
    torch.export.load(tmp_path / "program", extra_files=extra)
    assert json.loads(extra[programs.ABOUT])["class_names"] == about["class_names"]


@pytest.mark.heavy
def test_runs_with_adapters_and_of_transformers_are_read_elsewhere(runs: Path, hub_run: Path, tmp_path: Path) -> None:
    check_elsewhere(*cases_of_runs(runs / "plain", runs / "lora", hub_run, tmp_path), tmp_path)


@pytest.mark.heavy
def test_models_of_every_library_in_every_format(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pairs = [(name, to) for name in libraries() for to in ("torch-export", "onnx")]
    pairs += [("transformers", "timm"), ("timm", "timm")]
    check_elsewhere(*cases_of_libraries(pairs, tmp_path), tmp_path)


@pytest.mark.heavy
def test_other_families_of_timm_are_read_again(tmp_path: Path) -> None:
    """With what timm's filters of checkpoints do to weights when they are loaded."""
    families = {
        "xcit_nano_12_p16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
        "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
        "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 2},
        "maxvit_pico_rw_256": {},
        "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
        "deit3_small_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    }
    for name, options in families.items():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4, in_chans=1, **options)
        done = localgrad.export(model, to="timm", out=tmp_path / name, class_names=list("abcd"))
        assert done.difference == 0, name
        assert json.loads((done.path / "config.json").read_text())["label_names"] == list("abcd")


def test_logits_of_zero_show_nothing_and_that_is_said(tmp_path: Path) -> None:
    model = by_hand()
    for each in model.head.parameters():  # type: ignore[union-attr]
        nn.init.zeros_(each)
    done = localgrad.export(model, to="torch-export", out=tmp_path / "p.pt2", example=torch.randn(2, 3, 8, 8))
    assert done.notes == ("All of the model's logits are 0, so that comparing them shows nothing.",)


def test_adapters_of_a_model_are_merged_and_the_model_keeps_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=3, **VIT)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = adapted.eval()(images)
        done = localgrad.export(adapted, to="timm", out=tmp_path / "timm", example=images)
        again = timm.create_model(f"local-dir:{done.path}", pretrained=True).eval()
        assert agrees(again(images), before)
        assert torch.equal(adapted(images), before)
    assert any("lora_" in name for name, _ in adapted.named_parameters())


class OfOneSize(ByHand):
    """Its code asks for the number of images."""

    def forward(self, images: Tensor) -> Tensor:
        rows = [super(OfOneSize, self).forward(images[i : i + 1]) for i in range(int(images.shape[0]))]
        return torch.cat(rows)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["POLY", "PROMPT_TUNING"])
def test_adapters_that_can_not_be_merged_are_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if kind == "POLY":
        base: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, **VIT)
        config = peft.PolyConfig(target_modules=["qkv"])
    else:
        transformers = pytest.importorskip("transformers")
        base = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
            )
        )
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(BackboneError, match=rf"adapters of {kind} can't be merged.*as of LoRA\.$") as refused:
        localgrad.export(peft.get_peft_model(base, config), to="timm", out=tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_asks_for_the_number_of_images_becomes_a_program_of_one_number_and_says_so(tmp_path: Path) -> None:
    done = localgrad.export(OfOneSize(), to="torch-export", out=tmp_path / "p.pt2", example=torch.randn(2, 3, 8, 8))
    assert done.batches == (2,)
    assert "It takes batches of 2 alone" in str(done)


class ByName(nn.Module):
    """Called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(values * mask)}


def test_a_program_is_called_with_the_tensors_of_a_batch_of_keywords(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = ByName(), {"values": torch.randn(4, 6), "mask": torch.rand(4, 6)}
    labelled = {**batch, "labels": torch.ones(4)}
    done = localgrad.export(model, to="torch-export", out=tmp_path / "p.pt2", example=labelled)
    with torch.no_grad():
        assert agrees(torch.export.load(done.path).module()(*batch.values()), model(**batch)["logits"])


@pytest.mark.heavy
def test_a_model_of_sequences_becomes_onnx(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(20, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    done = localgrad.export(model, to="onnx", out=tmp_path / "bert.onnx", example=batch)
    assert done.batches == (1, 2, 3)


def test_a_run_is_compared_on_images_where_some_are_named(runs: Path, tmp_path: Path, cli_: Cli) -> None:
    Image.new("L", (9, 9), 200).save(tmp_path / "one.png")
    out = tmp_path / "new" / "elsewhere"
    said = cli_("export", str(runs / "plain"), "--to", "timm", "--out", str(out), "--images", str(tmp_path / "one.png"))
    assert (said.code, said.err) == (0, "")
    assert f"written: {out} (config.json, model.safetensors)" in said.out
    assert "logits differ by 0 at most" in said.out
    assert (out / "config.json").read_text() == (runs / "plain" / "config.json").read_text()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    words = ("export", str(runs / "plain"), "--to", "timm", "--images", str(tmp_path / "photos"), "--out")
    assert_refused(cli_(*words, str(tmp_path / "none")), "None of the images in", "a.png (")
    shutil.copy(tmp_path / "one.png", tmp_path / "photos" / "b.png")
    said = cli_(*words, str(tmp_path / "some"))
    assert said.code == 0
    assert "a.png" in said.err


# The hub -----------------------------------------------------------------------------------------------------------


class RecordingHub:
    """Stands for ``huggingface_hub.HfApi``: keeps what it is asked for."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo_id: str, **more: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **more}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, folder_path: Path, **more: Any) -> None:
        names = sorted(each.name for each in Path(folder_path).iterdir())
        self.calls.append(("upload_folder", {"names": names, **more}))


class NoHub:
    def __init__(self) -> None:
        raise AssertionError("a dry run asked for the hub")


def test_a_dry_run_for_the_hub_writes_the_folder_with_a_card_and_asks_nobody(
    runs: Path, tmp_path: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.HfApi", NoHub)
    out = tmp_path / "hub"
    said = cli_("export", str(runs / "plain"), "--to", "hub", "--out", str(out), "--dry-run")
    assert (said.code, said.err) == (0, ""), said
    assert "\nwould be uploaded: README.md, " in said.out
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.license) == ("timm", "unknown")
    [result] = card.data.eval_results
    summary = json.loads((runs / "plain" / "summary.json").read_text())
    assert (result.metric_type, result.metric_value) == ("accuracy", summary["test_accuracy"])
    text = card.text
    for words in (
        "Method: local, by localgrad.",
        "local: 2 gradient-isolated modules, each with its own loss (objective feature).",
        f"| validation accuracy | {summary['val_accuracy']:.2%} |",
        f"| test accuracy | {summary['test_accuracy']:.2%} (",
        "estimated",
        "| measured | ",
        'timm.create_model("hf-hub:OWNER/NAME", pretrained=True)',
        "[local]\nmodules = 2",
    ):
        assert words in text, words


def test_the_hub_is_given_the_folder(runs: Path, tmp_path: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", RecordingHub)
    monkeypatch.setattr(RecordingHub, "calls", [])
    said = cli_("export", str(runs / "lora"), "--to", "hub", "--out", str(tmp_path / "hub"), "--repo", "me/digits")
    assert (said.code, said.err) == (0, ""), said
    assert "uploaded: https://huggingface.co/me/digits" in said.out
    (created, repo), (uploaded, folder) = RecordingHub.calls
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert repo == {"repo_id": "me/digits", "exist_ok": True}
    assert (folder["repo_id"], folder["names"]) == ("me/digits", ["README.md", "config.json", "model.safetensors"])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "hf-hub:me/digits" in card and "lora+local" in card


def test_a_hub_that_says_no_is_told_in_a_line_and_the_folder_stays(
    runs: Path, tmp_path: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi", RecordingHub)
    monkeypatch.setattr(RecordingHub, "create_repo", refuse)
    out = tmp_path / "hub"
    said = cli_("export", str(runs / "plain"), "--to", "hub", "--out", str(out), "--repo", "me/digits")
    assert_refused(said, "--repo me/digits", "ConnectionError: no route to host", "hf upload me/digits", str(out))
    assert (out / "README.md").exists()


def test_a_card_of_a_model_of_transformers_loads_it_there_and_tells_no_paths(hub_run: Path, tmp_path: Path) -> None:
    done = localgrad.export(hub_run, to="hub", out=tmp_path / "hub", dry_run=True)
    assert {"README.md", "config.json", "model.safetensors"} <= set(done.files)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'ViTForImageClassification.from_pretrained("OWNER/NAME")' in card
    assert "library_name: transformers" in card
    assert str(hub_run.parent) not in card
    assert 'name = "hf:model"' in card


def test_a_card_without_a_run_tells_no_figures() -> None:
    text = model_card(
        library="timm",
        architecture="vit",
        loading="pass",
        class_names=["a"] * 30,
        source={"license": "mit", "hf_hub_id": "timm/vit.tag"},
    )
    assert "license: mit" in text and "base_model: timm/vit.tag" in text and "30 classes" in text
    assert "Figures" not in text and "model-index" not in text


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("BertForPreTraining", None),
    ],
)
def test_a_card_says_what_its_model_does(architecture: str, task: str | None) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    text = model_card(library="transformers", architecture=architecture, loading="pass")
    data = huggingface_hub.ModelCard(text).data
    assert (data.pipeline_tag, data.metrics) == (task, None)
    assert data.tags == [*([task] if task else []), "transformers", "localgrad"]


@pytest.mark.parametrize(
    ("changes", "learnt"),
    [
        ({}, "the whole model"),
        ({"training.freeze": 1.0}, "the head alone"),
        ({"training.freeze": 0.5}, "the blocks behind frozen ones, and the head"),
        ({"model.lora": 4}, "adapters, and the head"),
        ({"model.lora": 4, "training.freeze": 2}, "adapters in the blocks behind frozen ones, and the head"),
    ],
)
def test_a_card_says_what_learned(changes: dict[str, Any], learnt: str) -> None:
    recipe = Recipe.from_dict(overlay({}, {"model.name": "vit_tiny_patch16_224", "local.modules": 1, **changes}))
    assert gradients_of_run(recipe, 1) == f"exact, end to end. What learned: {learnt}."


# Bad input ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(runs: Path, tmp_path: Path, cli_: Cli) -> None:
    before = sorted(runs.rglob("*"))
    for to, words in {
        "timm": "plain/export/timm (config.json, model.safetensors)",
        "onnx": "plain/export/model.onnx",
        "torch-export": "plain/export/model.pt2",
    }.items():
        said = cli_("export", str(runs / "plain"), "--to", to, "--dry-run")
        assert (said.code, said.out.splitlines()[0]) == (0, f"would be written: {runs}/{words}")
    assert sorted(runs.rglob("*")) == before


def test_what_cannot_be_exported_is_refused_in_a_line(runs: Path, tmp_path: Path, cli_: Cli) -> None:
    plain, there = str(runs / "plain"), tmp_path / "there"
    there.mkdir()
    (tmp_path / "file").write_text("")
    (there / "m.onnx.data").write_text("")
    beside = str(there / "m.onnx")
    assert_refused(cli_("export", plain, "--to", "onnx", "--out", beside), f"--out {beside}: {beside}.data is there")
    assert_refused(cli_("export", plain, "--to", "timn"), "--to: unknown 'timn'", "Nearest: timm")
    assert_refused(cli_("export", str(tmp_path / "none"), "--to", "timm"), "no run there")
    assert_refused(cli_("export", plain, "--to", "timm", "--out", str(there)), f"--out {there}", "there already")
    assert_refused(cli_("export", plain, "--to", "timm", "--out", str(tmp_path / "file" / "x")), "--out", "no folder")
    assert_refused(cli_("export", plain, "--to", "hub"), "--repo OWNER/NAME", "--dry-run")
    assert_refused(cli_("export", plain, "--to", "onnx", "--repo", "a/b"), "--repo", "--to onnx", "only the hub")
    nowhere = str(tmp_path / "none.png")
    assert_refused(cli_("export", plain, "--to", "timm", "--out", str(tmp_path / "o"), "--images", nowhere), nowhere)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "there"]
    assert not (runs / "plain" / "export").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(runs: Path, tmp_path: Path, cli_: Cli) -> None:
    tmp_path.chmod(0o500)
    assert_refused(cli_("export", str(runs / "plain"), "--to", "timm", "--out", str(tmp_path / "o")), "no permission")


def test_an_unfinished_run_is_refused(runs: Path, tmp_path: Path, cli_: Cli) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    said = cli_("export", str(tmp_path / "run"), "--to", "timm")
    assert_refused(said, "isn't finished", f"--resume {tmp_path / 'run'}")


def test_without_what_writes_onnx_it_is_said_what_to_install(
    runs: Path, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert_refused(cli_("export", str(runs / "plain"), "--to", "onnx"), "--to onnx", "pip install 'localgrad[onnx]'")


def test_a_file_that_is_another_model_is_refused_and_not_left_behind(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(traced: programs.Traced, path: Path, about: Any) -> None:
        traced.program.state_dict["model.head.bias"].data[0].add_(0.5)
        written(traced, path, about)

    def nothing(path: Path) -> Any:
        return lambda example: example.tensor.flatten(1)

    written = programs.write_program
    monkeypatch.setattr(exporting, "write_program", another)
    with pytest.raises(BackboneError, match=r"read again, its logits differ .* more than rounding"):
        localgrad.export(runs / "plain", to="torch-export", out=tmp_path / "new" / "p.pt2")
    monkeypatch.setattr(exporting, "read_program", nothing)
    with pytest.raises(BackboneError, match=r"logits of \[1, 256\], and the model of \[1, 10\]"):
        localgrad.export(runs / "plain", to="torch-export", out=tmp_path / "new" / "p.pt2")
    monkeypatch.setattr(exporting, "read_program", lambda _: lambda example: torch.full((example.num_items, 10), nan))
    with pytest.raises(BackboneError, match=r"read again, its logits differ from the model's by up to nan"):
        localgrad.export(runs / "plain", to="torch-export", out=tmp_path / "new" / "p.pt2")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_arent_the_best_epochs_are_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    weights = {name: each + 0.1 for name, each in using_runs.load_saved_weights(path).items()}
    save_weights(path, weights)
    with pytest.raises(BackboneError, match="differ from the model's"):
        localgrad.export(tmp_path / "run", to="timm")
    assert not (tmp_path / "run" / "export").exists()


def test_what_a_model_is_called_with_and_what_it_gives_are_checked_first(tmp_path: Path) -> None:
    def refused(words: str, model: nn.Module, kind: type[LocalgradError] = BackboneError, **how: Any) -> None:
        given = {"to": "torch-export", "out": tmp_path / "x.pt2", "example": torch.randn(4, 6), **how}
        with pytest.raises(kind, match=words):
            localgrad.export(model, **given)

    plain = nn.Linear(6, 3)
    refused("class_names: 2 names, and the model has 3 logits", plain, RecipeError, class_names=["a", "b"])
    refused("class_names='abc': give a list of names", plain, RecipeError, class_names="abc")
    refused("example: Linear can't be called with it .*dtype of its weights", plain.double())
    refused("example: give a batch of one item or more", nn.Linear(6, 3), example=torch.randn(0, 6))
    refused("example: give a batch of one item or more", nn.Identity(), example=torch.tensor(1.0))
    broken = nn.Linear(6, 3)
    nn.init.constant_(broken.bias, nan)
    refused("logits of Linear are no finite numbers", broken)
    kept = nn.Linear(6, 3)
    kept.last = kept(torch.randn(2, 6))
    refused("Linear can't be copied .* torch.no_grad", kept)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["timm", "onnx"])
@pytest.mark.parametrize("out", [".", "", "/", ".."])
def test_a_place_without_a_name_is_refused(to: str, out: str) -> None:
    with pytest.raises(RecipeError, match=r"out=.* is there already; remove it, or name another"):
        localgrad.export(nn.Linear(6, 3), to=to, out=out, example=torch.randn(4, 6))


def test_a_place_that_cannot_be_written_is_told_in_a_line(tmp_path: Path) -> None:
    name = "x" * 300
    with pytest.raises(RunFolderError, match=r"out=.*: it can't be written \(.*File name too long"):
        localgrad.export(nn.Linear(6, 3), to="torch-export", out=tmp_path / name, example=torch.randn(4, 6))


def test_a_place_at_home_and_a_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=3, **VIT)
    done = localgrad.export(torch.compile(model), to="timm", out="~/there")
    assert (done.path, done.difference) == (tmp_path / "there", 0)


def test_models_that_no_library_makes_again_are_refused(tmp_path: Path) -> None:
    model, out = by_hand(), tmp_path / "x"
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(BackboneError, match="no library makes ByHand again by its name; take to='onnx'"):
        localgrad.export(model, to="timm", out=out, example=images)
    with pytest.raises(RecipeError, match="example: give what the model is called with"):
        localgrad.export(model, to="torch-export", out=out)
    with pytest.raises(RecipeError, match="out: name the file or folder"):
        localgrad.export(model, to="torch-export", example=images)
    with pytest.raises(RecipeError, match="source: got int"):
        localgrad.export(3, to="timm", out=out)  # type: ignore[arg-type]
    with pytest.raises(LocalgradError, match="can't trace"):
        localgrad.export(Branching(), to="torch-export", out=out, example=images)
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    """What it does depends on pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_run_of_a_model_that_timm_cannot_describe_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Model argument 'norm_layer' is not serializable")

    monkeypatch.setattr("timm.models.save_for_hf", fail)
    with pytest.warns(RunWarning, match=r"no config.json, .*'norm_layer' is not serializable"):
        localgrad.train(recipe(), out=tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.warns(RunWarning, match="no config.json"):
        done = localgrad.export(tmp_path / "run", to="torch-export")
    assert done.path.name == "model.pt2"
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=3, **VIT)
    localgrad.export(model, to="torch-export", out=tmp_path / "own.pt2")
    with pytest.raises(BackboneError, match="norm_layer"):
        localgrad.export(model, to="timm", out=tmp_path / "own")


def test_a_plugins_model_has_no_config_and_is_exported_as_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Unflatten(1, (1, 8)))
            self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)))
            self.tail = nn.Sequential(nn.Flatten(), nn.Linear(8, num_classes))

        def forward(self, images: Tensor) -> Tensor:
            return self.tail(self.blocks(self.stem(images)))

    def made(num_classes: int, in_chans: int, **_: Any) -> localgrad.Backbone:
        net = Net(num_classes)
        return localgrad.Backbone(stem=net.stem, blocks=net.blocks, tail=net.tail, model=net, input_size=(1, 8, 8))

    monkeypatch.setitem(BACKBONES._known, "toy", made)
    localgrad.train(recipe(model={"name": "toy"}, **{"local.objective": "greedy"}), out=tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(BackboneError, match="no library makes toy again"):
        localgrad.export(tmp_path / "run", to="timm")
    done = localgrad.export(tmp_path / "run", to="torch-export")
    assert done.path == tmp_path / "run" / "export" / "model.pt2"
