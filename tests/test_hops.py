"""How far it is from a verb to the work, and what a verb loads on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from localgrad import cli
from localgrad.objectives.base import LocalObjective

if TYPE_CHECKING:
    from ranks import Ranks

MOST_FRAMES = 14
"""Of the package, from the command line's verb to a local objective's ``forward``, both counted."""


class EnoughError(Exception):
    """The stack of a training step was seen."""


def test_there_are_few_frames_between_the_verb_and_the_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = str(Path(cli.__file__).parent)
    stacks: list[list[str]] = []
    forward = LocalObjective.forward

    def watched(self: LocalObjective, *arguments: Any) -> Any:
        frame, names = sys._getframe(1), ["LocalObjective.forward"]
        while frame is not None:
            if frame.f_code.co_filename.startswith(package):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back  # type: ignore[assignment]
        stacks.append(names[::-1])
        if "Trainer._train_epoch" in names:
            raise EnoughError
        return forward(self, *arguments)

    monkeypatch.setattr(LocalObjective, "forward", watched)
    with pytest.raises(EnoughError):
        cli.app(["train", "--out", str(tmp_path / "run"), "--epochs", "1", "--device", "cpu"], standalone_mode=False)
    assert any("estimate_step" in stack for stack in stacks), "the peak is estimated before"
    for stack in stacks:
        assert stack[0] == "train"
        assert len(stack) <= MOST_FRAMES, stack


def test_planning_loads_nothing_of_comparing_or_of_training_data(ranks: Ranks) -> None:
    options = {"model": "vit_tiny_patch16_224", "data": "cifar10", "batch-size": "4", "budget": "4GiB", "device": "cpu"}
    arguments = ["plan", "--no-cache", "--no-confirm", *(f"--{name}={value}" for name, value in options.items())]
    arguments += ["--set", "model.options={depth=1, embed_dim=24, num_heads=1}", "--modules", "1"]
    done = ranks.run(arguments, call="loaded:main", estimates=True)
    assert done.codes == [0], done.err
    loaded = next(line for line in done.out[0].splitlines() if line.startswith("loaded")).split()[1:]
    assert "localgrad.planning.budget" in loaded
    parts = ("data", "folders", "image_sets", "images", "loading", "trainer")
    unwanted = [name for name in loaded if name in {f"localgrad.training.{part}" for part in parts}]
    comparing = [name for name in loaded if name.startswith("localgrad.compare.")]
    assert unwanted == []
    assert comparing == []
