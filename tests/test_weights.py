"""Weights to start from: what is taken of a file, what is said of it, and files of every kind that isn't right."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from helpers import assert_refused
from localgrad.backbones.weights import start_from
from localgrad.errors import BackboneError

if TYPE_CHECKING:
    from helpers import Cli

VIT = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "embed_dim": 24, "patch_size": 8, "img_size": 32}
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
SWIN = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "patch_size": 2, "img_size": 32}


def vit(**more: Any) -> nn.Module:
    torch.manual_seed(more.pop("seed", 0))
    return timm.create_model(VIT, **(SMALL | {"num_classes": 10} | more))


def swin(**more: Any) -> nn.Module:
    torch.manual_seed(more.pop("seed", 0))
    return timm.create_model("swin_tiny_patch4_window7_224", **(SWIN | {"num_classes": 10} | more))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(vit().state_dict(), path)
    return path


def as_timm_loads(name: str, path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The independent reference: timm's own loading of a file of ten classes."""
    torch.manual_seed(1)
    overlay = {"file": str(path), "num_classes": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how timm resizes
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).state_dict()


def test_the_head_is_new_and_all_else_the_files(file: Path) -> None:
    model, before = vit(num_classes=3, seed=1), vit(num_classes=3, seed=1).state_dict()
    said = start_from(model, str(file))
    wanted = vit().state_dict()
    for name, tensor in model.state_dict().items():
        source = before if name.startswith("head.") else wanted
        assert torch.equal(tensor, source[name]), name
    assert said.made_new == ("head.bias", "head.weight")
    assert said.left_out == ("head.bias", "head.weight")
    assert said.resized == ()
    assert str(said) == (
        f"Weights of {file}: {len(wanted) - 2} tensors loaded; left out: head.bias, head.weight; made new: head.bias, "
        "head.weight."
    )


def test_of_as_many_classes_the_head_is_kept(file: Path) -> None:
    model = vit(seed=1)
    said = start_from(model, str(file))
    assert all(torch.equal(tensor, vit().state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (said.made_new, said.left_out) == ((), ())


@pytest.mark.parametrize(
    ("make", "name", "options", "resized"),
    [
        (vit, VIT, {"img_size": 48}, "pos_embed"),
        (
            swin,
            "swin_tiny_patch4_window7_224",
            {"window_size": 8},
            "layers.0.blocks.0.attn.relative_position_bias_table",
        ),
        (vit, VIT, {"in_chans": 1}, "patch_embed.proj.weight"),
        (vit, VIT, {"img_size": 16, "in_chans": 4}, "pos_embed"),
    ],
    ids=["positions", "windows", "grey", "four channels"],
)
def test_other_sizes_are_made_as_timm_makes_them(
    make: Any, name: str, options: dict[str, Any], resized: str, tmp_path: Path
) -> None:
    save_file(make().state_dict(), tmp_path / "w.safetensors")
    base = SMALL if make is vit else SWIN
    wanted = as_timm_loads(name, tmp_path / "w.safetensors", num_classes=3, **(base | options))
    model = make(num_classes=3, seed=1, **options)
    said = start_from(model, str(tmp_path / "w.safetensors"))
    assert resized in said.resized
    for key, tensor in model.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(tensor, wanted[key]), key


def test_files_of_trainers_and_of_data_parallel_are_read(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in vit().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "last.pth.tar")
    model = vit(num_classes=3, seed=1)
    start_from(model, str(tmp_path / "last.pth.tar"))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, vit().blocks[1].mlp.fc1.weight)


def test_folders_of_timm_say_of_what_they_are(tmp_path: Path) -> None:
    timm.models.save_for_hf(vit(), tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    said = start_from(vit(num_classes=3), str(tmp_path / "hub"))
    assert said.normalised_by == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(BackboneError, match=f"they are of {VIT}, and this model is swin_tiny_patch4_window7_224"):
        start_from(swin(), str(tmp_path / "hub"))


def test_what_cannot_be_read_or_is_of_another_model_is_refused(file: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("run",)

    whole = file.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": Evil()}, tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    save_file(swin().state_dict(), tmp_path / "swin.safetensors")
    save_file(vit(mlp_ratio=3).state_dict(), tmp_path / "deep.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save(vit().state_dict(), tmp_path / "two" / name)
    for name, said in (
        ("haf.safetensors", "there is no such file or folder.*half.safetensors"),
        ("half.safetensors", "it can't be read"),
        ("code.pth", "it can't be read"),
        ("empty.pth", "no tensors"),
        ("swin.safetensors", "0% of this model's weights are in it; it has .*layers.*, the model blocks"),
        ("deep.safetensors", r"is \[.*\] there, and \[.*\] in this model"),
        ("folder", "a folder has one file of weights, such as model.safetensors; here are: none"),
        ("two", "here are: a.pth, b.pth. Name one"),
    ):
        model = vit(num_classes=3, seed=1)
        with pytest.raises(BackboneError, match=said) as caught:
            start_from(model, str(tmp_path / name))
        assert "\n" not in str(caught.value)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, vit(num_classes=3, seed=1).state_dict()[key]), "nothing was loaded"


def test_a_run_starts_from_a_file_and_needs_it_no_more(file: Path, cli_: Cli, tmp_path: Path) -> None:
    copied = tmp_path / "copy.safetensors"
    copied.write_bytes(file.read_bytes())
    options = ["--model", VIT, "--img-size", "32", "--patch-size", "8", "--batch-size", "16", "--modules", "2"]
    options += ["--set", "model.options.depth=2", "--set", "model.options.embed_dim=24", "--lr", "1e-9"]
    options += [
        "--set",
        "data.limit=32",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--set",
        "training.warmup_epochs=0",
        "--set",
        "training.min_lr=0",
    ]
    run = tmp_path / "run"
    said = cli_("train", "--data", "digits", *options, "--weights", str(copied), "--out", str(run))
    assert said.code == 0, said.err
    assert "tensors loaded; resized: patch_embed.proj.weight." in " ".join(said.out.split())
    assert "Normalised by mean" in said.out
    copied.unlink()
    trained = load_run(run)
    assert torch.allclose(trained["blocks.1.mlp.fc1.weight"], vit().state_dict()["blocks.1.mlp.fc1.weight"], atol=1e-6)
    data = json.loads((run / "data.json").read_text())
    assert data["mean"] == pytest.approx([sum(vit().pretrained_cfg["mean"]) / 3])
    assert cli_("evaluate", str(run), "--device", "cpu").code == 0
    # A run's own folder is a source as well, and says how its images were normalised.
    again = vit(in_chans=1)
    loaded = start_from(again, str(run))
    assert loaded.normalised_by is not None
    assert loaded.normalised_by[0] == pytest.approx(data["mean"])
    assert torch.equal(again.state_dict()["norm.weight"], trained["norm.weight"])


def load_run(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def test_mistakes_are_one_line(cli_: Cli, tmp_path: Path) -> None:
    model = ["--data", "digits", "--model", VIT, "--weights", str(tmp_path / "none.pth")]
    assert_refused(cli_("train", *model, "--pretrained"), "--pretrained doesn't go with --weights", "start from")
    assert_refused(cli_("train", *model), "--weights", "there is no such file or folder")
    assert_refused(cli_("plan", *model, "--budget", "1GiB"), "--weights", "there is no such file or folder")
