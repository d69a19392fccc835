"""The census of other libraries' models: its lists, its page, and (heavy) every model file of timm (timm 1.0.31)."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch

from localgrad.backbones.base import split
from localgrad.errors import BackboneError
from research.census import __main__ as census
from research.census.models import REFUSED, TIMM, TIMM_CONVOLUTIONAL, Entry, entries, size_of
from research.census.report import BEGIN, rewrite, tables
from research.census.trial import tried

ROOT = Path(__file__).parents[1]


LARGE = ("deepseek_vit_412m",)
"""Too much memory beside other tests; the census itself tries it, alone."""


def make(name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    return model, size_of(model, name)


def small() -> Entry:
    return next(entry for entry in entries() if entry.label == "torchvision/shufflenet_v2_x0_5")


def test_every_file_is_there_once() -> None:
    assert (len(set(TIMM)), len(set(TIMM_CONVOLUTIONAL))) == (61, 37)
    assert not set(TIMM) & set(TIMM_CONVOLUTIONAL)
    assert set(REFUSED) < {*TIMM, *TIMM_CONVOLUTIONAL}
    labels = [entry.label for entry in entries()]
    assert len(labels) == len(set(labels))


def test_the_page_is_made_of_the_results() -> None:
    page = (ROOT / census.PAGE).read_text()
    assert tables(ROOT / census.RESULTS) in page


def test_results_are_kept_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(census, "RESULTS", tmp_path)
    census.keep(
        small(), {"blocks": 3, "first": "a.0", "last": "a.2", "watched": True, "seconds": 1.0, "steps": {"2": ""}}
    )
    census.keep(small(), {"reason": "Net can't be split: why. Chains seen: none. Give blocks=", "seconds": 1.0})
    assert list(json.loads((tmp_path / "torchvision.json").read_text())) == ["shufflenet_v2_x0_5"]
    assert "3 blocks, a.0 .. a.2" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n<!-- end -->\nafter\n")
    assert rewrite(page, tmp_path)
    assert not rewrite(page, tmp_path)
    assert page.read_text().startswith("before\n")
    assert "| torchvision/shufflenet_v2_x0_5 | Net can't be split: why. |" in page.read_text()
    with pytest.raises(SystemExit, match="names: none of nobody is in the census; give libraries"):
        census.main(["nobody"])


def test_a_model_is_split() -> None:
    row = tried(small(), steps=False)
    assert row["watched"]
    assert (row["first"], row["last"]) == ("stage2.0", "conv5")


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in (*TIMM, *TIMM_CONVOLUTIONAL) if name not in (*REFUSED, *LARGE)])
def test_is_split(name: str) -> None:
    model, size = make(name)
    untouched = copy.deepcopy(model).eval()
    backbone = split(model, size).eval()  # the proof holds logits and gradients against each other
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(backbone(images), untouched(images))
    for mine, other in zip(backbone.model.buffers(), untouched.buffers(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.heavy
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_for_its_reason(name: str) -> None:
    model, size = make(name)
    with pytest.raises(BackboneError, match=REFUSED[name]):
        split(model, size)
