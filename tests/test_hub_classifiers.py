"""Image classifiers of transformers in recipes: loaded, trained, resumed without their folder, used, and refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import localgrad
from helpers import EVERYTHING, MICRO, assert_refused, assert_same_run, interrupt_at_step
from localgrad import run
from localgrad.app import using_runs
from localgrad.app.build import build
from localgrad.app.hub_classifiers import make_classifier, processor_text, resizing_beside, statistics_of
from localgrad.app.recipe import ModelSettings, Recipe, overlay
from localgrad.errors import BackboneError
from localgrad.partition import Plan
from localgrad.training.folder import load_saved_weights
from localgrad.training.settings import DataSettings
from localgrad.training.trainer import Interrupted
from localgrad.training.transforms import light

if TYPE_CHECKING:
    from helpers import Cli

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 4}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 4}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
KINDS = {"ViT": VIT, "Swin": SWIN, "Dinov2": DINO, "ConvNextV2": CONVNEXT}
GREY = {"image_size": 16, "num_channels": 1, "num_labels": 5}


def saved(folder: Path, kind: str = "ViT", form: str = "ForImageClassification", **more: Any) -> Path:
    """A model's folder as transformers writes it; five classes, so that the digits' head is new."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**{**KINDS[kind], **GREY, **more})
    getattr(transformers, kind + form)(config).save_pretrained(folder)
    return folder


def processor(folder: Path, **values: Any) -> None:
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, **values})
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("hub") / "vit")
    processor(folder, image_mean=[0.4], image_std=[0.3])
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Half a second of the digits, on a model of a folder."""
    model = {"name": f"hf:{folder}", "pretrained": True}
    return Recipe.from_dict(overlay({**copy.deepcopy(MICRO), "model": model}, changes))


def of_the_hub(folder: Path) -> nn.Module:
    """The independent reference: the library's own loading."""
    model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(folder)
    return model


# What is made ------------------------------------------------------------------------------------------------------


def test_the_head_is_new_and_all_else_is_as_transformers_loads_it(vit: Path) -> None:
    settings = ModelSettings(name=f"hf:{vit}", pretrained=True)
    model, weights = make_classifier(settings, num_classes=3, num_channels=1)
    assert weights is not None and weights.normalised_by == ((0.4,), (0.3,))
    assert str(weights) == (
        f"Weights of hf:{vit}: 38 tensors loaded; left out: classifier.bias, classifier.weight; made new: "
        "classifier.bias, classifier.weight."
    )
    wanted = of_the_hub(vit).state_dict()
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, wanted[name]), name
    kept, _ = make_classifier(settings, num_classes=5, num_channels=1)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in kept.state_dict().items())


def test_weights_of_sixteen_bits_and_of_a_bare_trunk_are_trained_in_float32(tmp_path: Path) -> None:
    saved(tmp_path / "trunk", form="Model", dtype="bfloat16")
    small = of_the_hub(saved(tmp_path / "small")).to(torch.bfloat16)
    small.save_pretrained(tmp_path / "small")  # type: ignore[operator]
    for name in ("trunk", "small"):
        settings = ModelSettings(name=f"hf:{tmp_path / name}", pretrained=True, lora=2)
        model, weights = make_classifier(settings, num_classes=3, num_channels=1)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert weights is not None and weights.made_new == ("classifier.bias", "classifier.weight")
        learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert all("lora_" in each or each.startswith("classifier.") for each in learning)
        assert {each.partition(".lora_")[0] for each in learning if ".layers.0." in each} == {
            f"vit.layers.0.{part}"
            for part in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1",
                         "mlp.fc2")
        }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("ViTImageProcessor", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}),
        ("ViTImageProcessor", {"do_rescale": False, "image_mean": [100.0, 90.0, 80.0], "image_std": [50.0] * 3}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False}),
        ("EfficientNetImageProcessor", {"include_top": True}),
    ],
)
def test_images_are_normalised_as_by_the_models_own_processor(kind: str, values: dict[str, Any]) -> None:
    made = getattr(transformers, kind)(**values, do_resize=False, do_center_crop=False)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    wanted = made(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    found = statistics_of(made.to_dict())
    assert found is not None
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in found)
    ours = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        ("ViTImageProcessor", {}, {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}),
        (
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 256}, "crop_size": 224},
            {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"},
        ),
        (
            "ConvNextImageProcessor",
            {"crop_pct": 0.875, "resample": 2, "size": {"shortest_edge": 224}},
            {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"},
        ),
        (
            "ConvNextImageProcessor",
            {"crop_pct": 0.875, "resample": 2, "size": {"shortest_edge": 384}},
            {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
        ),
        (
            "BeitImageProcessor",
            {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True},
            {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "squash"},
        ),
        ("LevitImageProcessor", {}, {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}),
        ("PoolFormerImageProcessor", {}, {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}),
        ("ViTImageProcessor", {"do_resize": False}, None),
    ],
)
def test_images_are_resized_as_by_the_models_own_processor(kind: str, values: dict, wanted: dict | None) -> None:
    processor = getattr(transformers, kind)(**values)
    found = resizing_beside(processor.to_dict())
    assert found == wanted
    if found is None:
        return
    # A photo twice as wide as high: what timm makes of it by these words is what the processor makes.
    ramp = np.linspace(0, 255, 600).astype(np.uint8)
    photo = Image.fromarray(np.stack([np.tile(ramp, (300, 1))] * 3, axis=2))
    own = processor(photo, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0].float()
    made = timm.data.create_transform(tuple(own.shape), mean=(0,) * 3, std=(1 / 255,) * 3, **found)(photo)
    assert (made - own).abs().mean() < 2, "of 255"


def test_the_processor_of_a_run_prepares_images_as_its_evaluation_does(tmp_path: Path) -> None:
    data = DataSettings(name="pets", transform="light", interpolation="bilinear", crop=0.875)
    text = processor_text((32, 32), (0.5,) * 3, (0.25,) * 3, data)
    assert text is not None
    (tmp_path / "preprocessor_config.json").write_text(text)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 100), dtype=np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(torch.from_numpy(pixels), return_tensors="pt")
    ours = light((32, 32), training=False, interpolation="bilinear", crop=0.875)(torch.from_numpy(pixels))
    found = theirs["pixel_values"][0] * 0.25 + 0.5
    assert (found * 255 - ours).abs().max() <= 2, "of 255, where one rounds and the other cuts off"


# Runs --------------------------------------------------------------------------------------------------------------


def test_one_module_is_a_plain_loop_over_transformers_model_bit_for_bit(vit: Path) -> None:
    job = build(recipe(vit, **{"local.modules": 1, "training.weight_decay": 0.0}), is_new=True)
    plain: Any = copy.deepcopy(job.local.model).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=job.recipe.method.training.lr, weight_decay=0.0)
    for batch in job.batches.epoch(0):
        images, labels = batch.images.clone(), batch.labels.clone()
        result = job.local.step(images, labels)
        loss = F.cross_entropy(plain(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(result.losses[0], loss.detach())
    for name, tensor in job.local.model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def stop_and_lose_the_folder(wanted: Recipe, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets SIGTERM in its second step, and whose model's folder is gone then."""
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 2)
        with pytest.raises(Interrupted):
            run.train(wanted, out=path / "run")
    shutil.rmtree(path / "vit")


def test_a_run_needs_its_models_folder_no_more_once_it_has_begun(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(Path(shutil.copytree(vit, tmp_path / "vit")), **{"training.epochs": 1})
    stop_and_lose_the_folder(wanted, tmp_path, monkeypatch)
    (tmp_path / "run" / "config.json").unlink()  # which the checkpoint keeps
    with pytest.warns(match="config.json: missing; taken as the checkpoint keeps it"):
        summary = run.resume(tmp_path / "run")
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (data["mean"], data["std"]) == ([0.4], [0.3])
    assert using_runs.evaluate_run(tmp_path / "run")["accuracy"] == summary["test_accuracy"]
    loaded: Any = of_the_hub(tmp_path / "run")
    assert loaded.config.id2label == {number: str(number) for number in range(10)}
    weights = load_saved_weights(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.heavy
def test_it_goes_on_bit_for_bit(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {key: value for key, value in EVERYTHING.items() if key != "model.drop_path"}
    changes["model.options"] = {"hidden_dropout_prob": 0.1}
    wanted = recipe(Path(shutil.copytree(vit, tmp_path / "vit")), **changes)
    run.train(wanted, out=tmp_path / "whole")
    stop_and_lose_the_folder(wanted, tmp_path, monkeypatch)
    run.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "more"), [("Swin", {}), ("ConvNextV2", {}), ("Dinov2", {"model.img_size": 8})])
def test_other_kinds_train(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Dinov2 fits its position embeddings to images of another size by itself: they are loaded as they are."""
    wanted = recipe(saved(tmp_path / kind, kind), **more)
    summary = run.train(wanted, out=tmp_path / "run")
    assert len(summary["test_module_accuracy"]) == 2
    assert using_runs.evaluate_run(tmp_path / "run")["accuracy"] == summary["test_accuracy"]
    assert type(of_the_hub(tmp_path / "run")).__name__ == f"{kind}ForImageClassification"


@pytest.mark.heavy
def test_a_run_of_adapters_ends_in_plain_weights_and_predicts_as_the_pipeline(tmp_path: Path) -> None:
    from PIL import Image

    pytest.importorskip("peft")
    folder = saved(tmp_path / "vit", num_channels=3)
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / label / f"{number}.png")
    wanted = recipe(folder, **{"model.lora": 2, "data.name": str(tmp_path / "pets"), "training.batch_size": 4})
    run.train(wanted, out=tmp_path / "run")
    image = tmp_path / "pets" / "cat" / "0.png"
    [prediction] = using_runs.predict(tmp_path / "run", image)
    told = transformers.pipeline("image-classification", model=str(tmp_path / "run"))(Image.open(image))
    assert {each["label"]: each["score"] for each in told} == pytest.approx(dict(prediction.classes), abs=1e-5)


@pytest.mark.heavy
def test_a_plan_of_a_folder_is_trained_and_is_that_of_a_budget(vit: Path, tmp_path: Path, cli_: Cli) -> None:
    out, how = tmp_path / "plan.json", ("--batch-size", "16", "--device", "cpu", "--no-cache")
    data = ("--data", "digits", "--set", "data.limit=48")
    said = cli_("plan", "--model", f"hf:{vit}", *data, *how, "--modules", "2", "--json", str(out))
    assert said.code == 0 and f"localgrad train --plan {out}"[:40] in said.out.replace("\n", ""), said
    short = ("--epochs", "1", "--pretrained", "--device", "cpu")
    said = cli_("train", "--plan", str(out), *data, *short, "--out", str(tmp_path / "run"))
    assert said.code == 0 and "tensors loaded" in said.out and "forecast isn't one" not in said.out, said
    plan, summary = Plan.from_json(out.read_text()), json.loads((tmp_path / "run" / "summary.json").read_text())
    assert plan.forecast is not None
    assert summary["estimated_peak_bytes"] == plan.forecast.peak_bytes
    assert summary["plan"]["boundaries"] == list(plan.boundaries)


# What is refused ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_one_line(vit: Path, tmp_path: Path, cli_: Cli) -> None:
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama")
    shutil.copytree(vit, tmp_path / "mixed")
    saved(tmp_path / "swin", "Swin")
    shutil.copy(tmp_path / "swin" / "model.safetensors", tmp_path / "mixed")
    (tmp_path / "empty").mkdir()

    def refused(*options: str, model: Path = vit) -> Any:
        out = tmp_path / "run"
        said = cli_("train", "--data", "digits", "--model", f"hf:{model}", "--pretrained", *options, "--out", str(out))
        assert not out.exists()
        return lambda *words: assert_refused(said, *words)

    refused(model=tmp_path / "llama")("llama is none", "LocalLearner", "localgrad.integrations.hf.LocalTrainer")
    refused(model=tmp_path / "nowhere")("there is no such folder")
    refused(model=tmp_path / "empty")("transformers can't read a config there")
    refused(model=tmp_path / "mixed")("0% of this model's weights are in it; it has swin", "the model vit")
    refused("--img-size", "32")("position_embeddings is [1, 17, 16] there", "16x16 pixels", "take --img-size 16")
    refused("--img-size", "18")("take 16 or 20, or another model.options.patch_size")
    refused("--layer-decay", "0.7")("--layer-decay 0.7 doesn't go with --model hf:")
    refused("--patch-size", "2")("--patch-size 2 doesn't go with --model hf:")
    refused("--set", "model.options.dtype=bfloat16")("take --precision bf16")
    refused("--set", "model.options.hiden_size=8")("has no 'hiden_size'. Nearest: hidden_size")
    assert_refused(cli_("train", "--model", f"hf:{vit}", "--weights", "x"), "--weights x doesn't go with --model hf:")
    with pytest.raises(BackboneError, match="known to localgrad plan and localgrad train alone; take one of timm's"):
        localgrad.plan(f"hf:{vit}", batch_size=4)


def test_what_a_processor_does_to_pixels_and_recipes_do_not_is_refused(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "bgr")
    values = {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}
    (tmp_path / "bgr" / "preprocessor_config.json").write_text(json.dumps(values))
    settings = ModelSettings(name=f"hf:{tmp_path / 'bgr'}", pretrained=True)
    with pytest.raises(BackboneError, match="its image processor asks for do_flip_channel_order, which recipes don't"):
        make_classifier(settings, num_classes=3, num_channels=1)
    with pytest.raises(BackboneError, match="images of 1 channels, and the data's have 3: take such images"):
        make_classifier(ModelSettings(name=f"hf:{vit}", pretrained=True), num_classes=3, num_channels=3)
    processor(tmp_path / "bgr", image_mean=[0.4], image_std=[0.3], size={"height": 32, "width": 32})
    _, weights = make_classifier(settings, num_classes=3, num_channels=1)
    assert weights is not None
    assert weights.notes == ("Images are 16x16, and the image processor's 32x32; img_size=32 takes those.",)
