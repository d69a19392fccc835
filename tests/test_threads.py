"""The number of threads: chosen once by size, written down, kept; waiting threads sleep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from helpers import MICRO, SIZE, Cli, interrupt_at_step, make
from localgrad import run
from localgrad.app import fitting, threads
from localgrad.app.build import create_model
from localgrad.app.recipe import Recipe, overlay, preset
from localgrad.training.trainer import EpochSums, Interrupted


@pytest.fixture(autouse=True)
def _three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fitting, "estimate_step", lambda *_, **__: SimpleNamespace(peak_bytes=2**20))
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3, "a run leaves the process as it was"


def recipe_of(**changes: Any) -> Recipe:
    values = {**MICRO, "execution": {"device": "cpu"}}
    return Recipe.from_dict(overlay(values, {key.replace("__", "."): value for key, value in changes.items()}))


def threads_of(folder: Path) -> int | None:
    return Recipe.from_toml((folder / "recipe.toml").read_text()).execution.num_threads


def test_small_models_take_one_thread_and_larger_ones_all() -> None:
    method = Recipe.from_dict(preset("digits")).method
    digits = create_model(method.model, num_classes=10, num_channels=1)
    assert threads.choose_threads(digits, (1, 32, 32), method.training.batch_size) == 1
    assert threads.choose_threads(digits, (1, 32, 32), 1024) == 3, "so is its batch"
    with torch.device("meta"):
        large = timm.create_model("vit_tiny_patch16_224")
    assert threads.choose_threads(large, (3, 224, 224), 1) == 3


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_choosing_leaves_no_trace(kind: str) -> None:
    model = make(kind)
    next(model.children()).eval()
    state, modes = {**model.state_dict()}, [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert threads.choose_threads(model, SIZE, 8) == 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_what_cant_be_run_is_left_to_whoever_says_why() -> None:
    assert threads.choose_threads(nn.Linear(7, 3), SIZE, 8) == 3
    assert threads.choose_threads(nn.Identity(), SIZE, 8) == 3


def test_the_number_is_written_down_and_trains_the_same_again(tmp_path: Path) -> None:
    run.train(recipe_of(), out=tmp_path / "chosen")
    assert threads_of(tmp_path / "chosen") == 1
    run.train(recipe_of(execution__num_threads=1), out=tmp_path / "asked")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("chosen", "asked")]
    assert weights[0] == weights[1]


@pytest.mark.heavy
def test_the_number_is_kept_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    add = EpochSums.add

    def seen(self: EpochSums, *arguments: Any) -> None:
        found.append(torch.get_num_threads())
        add(self, *arguments)

    monkeypatch.setattr(EpochSums, "add", seen)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 4)
        with pytest.raises(Interrupted):
            run.train(recipe_of(), out=tmp_path / "run")
    run.resume(tmp_path / "run")
    assert set(found) == {1}, "not the three of this process"
    assert len(found) == 9
    assert threads_of(tmp_path / "run") == 1


@pytest.mark.parametrize("own", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_waiting_threads_sleep_unless_the_user_says_how_they_wait(
    own: str | None, cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "7")  # so that it is as before afterwards
        if name != own:
            monkeypatch.delenv(name)
    assert cli_("--version").code == 0
    assert os.environ.get("OMP_WAIT_POLICY") == {None: "PASSIVE", "OMP_WAIT_POLICY": "7"}.get(own)
