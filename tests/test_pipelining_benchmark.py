"""Pipelines of processes train as a plain loop does, local modules as in one process; figures are added up rightly."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from helpers import MODELS, SIZE, copied
from localgrad.backbones.base import split
from localgrad.errors import PartitionError, RecipeError

FOLDER = Path(__file__).parent.parent / "research" / "benchmarks"
STEPS = 3


@pytest.fixture(scope="module")
def pipelining() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(FOLDER))
        import pipelining

        yield pipelining


def arguments(kind: str, method: str, *more: str) -> list[str]:
    settings = {key: value for key, value in MODELS[kind].items() if key not in ("model_name", "img_size")}
    return [
        *("--method", method, "--model", MODELS[kind]["model_name"], "--model-options", json.dumps(settings)),
        *("--img-size", "32", "--num-classes", "5", "--batch-size", "4", "--microbatches", "2"),
        *("--steps", "2", "--warmup", "1", *more),
    ]


def by_hand(pipelining: ModuleType, kind: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    import pipelining_workers

    """A plain loop over the same batches: losses, weights before, weights after."""
    torch.manual_seed(0)
    model = timm.create_model(**MODELS[kind], num_classes=5, drop_path_rate=0.0)
    before = copied(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=pipelining_workers.LEARNING_RATE, weight_decay=0.05)
    everything = SimpleNamespace(needs_images=True, needs_labels=True)
    batches = pipelining.batches_for(everything, argparse.Namespace(seed=0, num_classes=5, batch_size=4), SIZE)
    losses = []
    for number in range(STEPS):
        images, labels = batches[number % len(batches)]
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, before, copied(model)


def on_two_processes(pipelining: ModuleType, folder: Path, *more: str) -> Any:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "pipelining.py"), *more]
    command += ["--json", str(folder / "report.json"), "--weights", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return pipelining.Report.from_dict(json.loads((folder / "report.json").read_text()))


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "method"), [("vit", "1f1b"), ("swin", "1f1b"), ("swin", "gpipe")])
def test_two_processes_train_as_a_plain_loop_does(
    kind: str, method: str, pipelining: ModuleType, tmp_path: Path
) -> None:
    import pipelining_workers

    losses, before, after = by_hand(pipelining, kind)
    report = on_two_processes(pipelining, tmp_path, *arguments(kind, method))
    assert report.losses == pytest.approx(losses, abs=1e-5)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert not found[0].keys() & found[1].keys()
    assert found[0].keys() | found[1].keys() == after.keys()
    moved = {name: value for part in found for name, value in part.items()}
    for name, value in after.items():
        # Keys' biases have no gradient but rounding, which AdamW makes into a small part of a whole step.
        torch.testing.assert_close(moved[name], value, rtol=0, atol=0.1 * pipelining_workers.LEARNING_RATE)
    assert any((after[name] - before[name]).abs().max() > 2 * pipelining_workers.LEARNING_RATE for name in found[0])
    assert any((after[name] - before[name]).abs().max() > 2 * pipelining_workers.LEARNING_RATE for name in found[1])
    for share in report.shares:
        assert len(share.step_seconds) == len(share.busy_seconds) == report.steps
        assert 0 < sum(share.busy_seconds) < sum(share.step_seconds)
        assert share.tensor_peak_bytes > 4 * 3 * share.num_parameters  # AdamW's state and the weights
        assert share.resident_peak_bytes > share.tensor_peak_bytes
    assert report.shares[0].sent_bytes == report.shares[1].sent_bytes > 0  # features there, gradients back


@pytest.mark.heavy
@pytest.mark.parametrize("more", [(), ("--modules", "3", "--classifier", "linear", "--decoder", "conv")])
def test_local_modules_on_two_processes_are_those_of_one(
    more: tuple[str, ...], pipelining: ModuleType, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    more = ("--boundaries", "1,2" if more else "1", *more)
    options = pipelining.parse(arguments("swin", "local-one", "--weights", str(folders[0]), *more))
    one = pipelining.run(options, 0, 1)
    two = on_two_processes(pipelining, folders[1], *arguments("swin", "local", *more))
    assert two.losses == one.losses
    assert len(set(one.losses)) == STEPS
    assert two.boundaries == one.boundaries
    expected = load_file(folders[0] / "0.safetensors")
    found = [load_file(folders[1] / f"{rank}.safetensors") for rank in range(2)]
    assert not found[0].keys() & found[1].keys()
    merged = {**found[0], **found[1]}
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    assert [part.num_blocks for share in two.shares for part in share.parts] == [
        part.num_blocks for part in one.shares[0].parts
    ]
    for share in two.shares:
        assert 0 < sum(share.busy_seconds) < sum(share.step_seconds)
        seconds = sum(part.forward + part.backward + part.update for part in share.parts)
        assert seconds <= sum(share.busy_seconds) / two.steps
        assert 4 * 3 * share.num_parameters < share.tensor_peak_bytes < 1.1 * share.estimated_bytes
    assert two.shares[0].sent_bytes == two.shares[0].parts[-1].sent_bytes > two.shares[1].sent_bytes == 0


def test_stages_in_one_process_are_the_loop_over_parts(pipelining: ModuleType, tmp_path: Path) -> None:
    import pipelining_workers

    reports = []
    for method in ("parts", "stages-one"):
        folder = tmp_path / method
        folder.mkdir()
        options = pipelining.parse(arguments("swin", method, "--ranks", "3", "--weights", str(folder)))
        reports.append(pipelining.run(options, 0, 1))
    parts, stages = reports
    assert stages.losses == pytest.approx(parts.losses, abs=1e-6)
    expected, found = (load_file(tmp_path / method / "0.safetensors") for method in ("parts", "stages-one"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0.1 * pipelining_workers.LEARNING_RATE)
    assert len(stages.shares[0].parts) == len(stages.boundaries) + 1 == 3
    assert all(min(part.forward, part.backward, part.update) > 0 for part in stages.shares[0].parts)


@pytest.mark.heavy
def test_times_are_a_list_of_parts(pipelining: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "times.json"
    more = ["--ranks", "3", "--boundaries", "1,2", "--times", str(path)]
    monkeypatch.setattr(sys, "argv", ["pipelining", *arguments("swin", "local-one", *more)])
    pipelining.main()
    listed = json.loads(path.read_text())
    assert [part["num_blocks"] for part in listed] == [1, 1, 3]
    assert [part["sent_bytes"] > 0 for part in listed] == [True, True, False]
    assert listed[0].keys() == {"forward", "backward", "update", "sent_bytes", "gradient_bytes", "num_blocks"}


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["none", "parts"])
def test_one_process_is_a_plain_loop(method: str, pipelining: ModuleType, tmp_path: Path) -> None:
    import pipelining_workers

    losses, _, after = by_hand(pipelining, "vit")
    options = pipelining.parse(arguments("vit", method, "--weights", str(tmp_path)))
    report = pipelining.run(options, 0, 1)
    exact = method == "none"
    assert report.losses == pytest.approx(losses, abs=0 if exact else 1e-5)
    found = load_file(tmp_path / "0.safetensors")
    assert found.keys() == after.keys()
    for name, value in after.items():
        atol = 0 if exact else 0.1 * pipelining_workers.LEARNING_RATE
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)
    assert report.boundaries == ()
    assert report.bubble < 0.5
    assert pipelining.Report.from_dict(json.loads(json.dumps(report.to_dict()))).shares == report.shares


def test_stages_make_the_whole_model(pipelining: ModuleType) -> None:
    import pipelining_workers

    model = timm.create_model(**MODELS["swin"], num_classes=5)
    backbone = split(model, SIZE).eval()
    images = torch.randn(2, *SIZE)
    features = images
    for rank in range(3):
        features = pipelining_workers.stage_net(backbone, (1, 2), rank)(features)
    assert torch.equal(features, model(images))


def test_blocks_are_timed_on_a_copy(pipelining: ModuleType) -> None:
    import pipelining_boundaries

    model = timm.create_model(**MODELS["resnet"], num_classes=5)
    backbone = split(model, SIZE).train()
    before = copied(model)
    seconds = pipelining_boundaries.block_seconds(backbone, torch.randn(2, *SIZE), repeats=1)
    assert len(seconds) == len(backbone.blocks)
    assert min(seconds) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("more", "ranks", "word"),
    [
        (["--microbatches", "3"], 2, "--batch-size 4"),
        ([], 3, "--microbatches 3"),
        (["--method", "none"], 2, "one process"),
        (["--steps", "0"], 2, "--steps"),
        (["--method", "local"], 1, "one process only"),
        (["--method", "local", "--modules", "1"], 2, "--modules 1"),
        (["--pin", "--threads", "2"], 2, "--pin"),
        (["--simulate"], 2, "--compare"),
    ],
)
def test_what_cant_be_run_is_refused(pipelining: ModuleType, more: list[str], ranks: int, word: str) -> None:
    options = pipelining.parse(arguments("vit", "1f1b", *more))
    with pytest.raises(RecipeError, match=word):
        pipelining.check(options, ranks)


def test_boundaries_must_fit(pipelining: ModuleType) -> None:
    backbone = split(timm.create_model(**MODELS["vit"], num_classes=5), SIZE)

    def chosen(*more: str) -> Any:
        return pipelining.choose_boundaries(pipelining.parse(arguments("vit", "1f1b", *more)), backbone, 2)

    assert chosen("--boundaries", "1") == (1,)
    assert chosen("--balance", "memory") == (2,)
    with pytest.raises(RecipeError, match="2 are wanted"):
        chosen("--boundaries", "1,2")
    with pytest.raises(PartitionError, match=r"1\.\.3"):
        chosen("--boundaries", "9")


def test_boundaries_of_local_modules_count_their_nets(pipelining: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelining_boundaries

    backbone = split(timm.create_model(**MODELS["vit"], num_classes=5), SIZE)
    monkeypatch.setattr(pipelining_boundaries, "block_seconds", lambda *_, **__: [3.0, 3.0, 3.0, 3.0])
    options = pipelining.parse(arguments("vit", "local-one"))
    for head, expected in [(0.5, (2,)), (4.0, (1,))]:
        monkeypatch.setattr(pipelining_boundaries, "head_seconds", lambda *_, head=head, **__: head)
        assert pipelining.choose_boundaries(options, backbone, 2) == expected
    monkeypatch.undo()
    assert pipelining_boundaries.head_seconds(backbone, pipelining.objective_of(options), 0, 2, 4) > 0
    assert pipelining.choose_boundaries(options, backbone, 2) in [(1,), (2,), (3,)]


# Reports ---------------------------------------------------------------------------------------------------------


PART = {"forward": 1.0, "backward": 0.0, "update": 0.0, "sent_bytes": 0, "gradient_bytes": 4, "num_blocks": 1}


def report_of(pipelining: ModuleType, method: str, *shares: tuple[list[float], list[float]], loss: float = 1.0) -> Any:
    return pipelining.Report(
        method=method,
        model="vit",
        image_size=SIZE,
        batch_size=8,
        microbatches=4,
        ranks=len(shares),
        threads=1,
        cores=2,
        pinned=True,
        boundaries=(),
        balanced_by="time",
        objective="mlp, linear" if method.startswith("local") else "",
        seed=0,
        steps=len(shares[0][0]),
        warmup=1,
        losses=(loss, 2.0),
        shares=tuple(
            pipelining.Share(
                rank=rank,
                blocks=(rank, rank + 1),
                num_parameters=1,
                sent_bytes=0,
                parts=(pipelining.Part(**PART | {"forward": sum(busy) / len(busy)}),),
                span_seconds=sum(walls),
                step_seconds=tuple(walls),
                busy_seconds=tuple(busy),
                processor_seconds=tuple(busy),
                resident_start_bytes=1,
                resident_peak_bytes=10 + rank,
                tensor_peak_bytes=5,
                estimated_bytes=6,
            )
            for rank, (walls, busy) in enumerate(shares)
        ),
    )


def test_a_report_sums_up_its_processes(pipelining: ModuleType) -> None:
    report = report_of(pipelining, "1f1b", ([2.0, 4.0, 3.0], [1.0, 2.0, 1.5]), ([2.0, 2.0, 2.0], [2.0, 1.0, 1.5]))
    assert report.median_step_seconds == 3.0
    assert report.seconds_per_step == 2.0  # of the last process, which all follow
    assert report.images_per_second == pytest.approx(4)
    assert [share.bubble for share in report.shares] == [0.5, 0.25]
    assert report.bubble == pytest.approx(1 - 9 / 15)
    assert pipelining.Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "bubble 40.0 %" in str(report)


def test_ratios_are_to_the_same_repeat(pipelining: ModuleType) -> None:
    # Repeats differ by more than methods do.
    walls = [(4.0, 2.0), (8.0, 6.0), (4.0, 2.0)]
    reports = [
        [
            report_of(pipelining, "none", ([slow], [slow])),
            report_of(pipelining, "1f1b", ([fast], [fast / 2]), ([fast], [fast]), loss=1.25),
        ]
        for slow, fast in walls
    ]
    baseline, row = pipelining.rows_of(reports)
    assert (baseline.time_ratio, baseline.throughput_ratio, baseline.loss_difference) == (1, 1, 0)
    assert row.time_ratio == 0.5
    assert row.time_ratio_range == (0.5, 0.75)
    assert row.throughput_ratio == 2
    assert row.bubble == 0.25
    assert row.resident_peak_bytes == (10, 11)
    assert row.loss_difference == 0.25
    assert row.to_same_modules is None
    assert "0.500 (0.500 to 0.750) | 2.00 |  | 25.0 %" in pipelining.as_table([baseline, row])


def test_local_modules_are_held_to_the_same_in_one_process(pipelining: ModuleType) -> None:
    reports = [
        [
            report_of(pipelining, "none", ([4.0], [4.0])),
            report_of(pipelining, "local", ([fast], [fast]), ([fast], [fast]), loss=3.0),
            report_of(pipelining, "local-one", ([5.0], [5.0]), loss=3.0),
        ]
        for fast in (2.0, 2.5, 4.0)
    ]
    _, local, one = pipelining.rows_of(reports)
    assert (local.to_same_modules, local.to_same_modules_range) == (2.0, (1.25, 2.5))
    assert (local.throughput_ratio, one.throughput_ratio) == (1.6, 0.8)
    assert (local.loss_difference, local.losses_of, one.to_same_modules) == (0, "local-one", None)
    table = pipelining.as_table([local])
    assert "| 2.00 (1.25 to 2.50) |" in table
    assert "losses of local differ from those of local-one by 0.0e+00 at most" in table


def test_the_simulator_is_held_against_runs(pipelining: ModuleType) -> None:
    pytest.importorskip("research.simulation.shared_cores")
    import pipelining_simulated

    ranks = [([2.0], [2.0])] * 4
    alone = report_of(pipelining, "local-one", ([8.0], [8.0]))
    share = alone.shares[0]
    seconds = [1.0, 2.0, 1.5, 0.5]
    parts = tuple(pipelining.Part(**PART | {"forward": second}) for second in seconds)
    alone = replace(alone, shares=(replace(share, parts=parts),))
    local = report_of(pipelining, "local", *ranks)
    assert pipelining_simulated.predict(replace(local, cores=4), alone) == pytest.approx(8 / 2)
    assert pipelining_simulated.predict(local, alone) == pytest.approx(8 / 3)  # two a core: 1 + 2, 1.5 + 0.5
    (found,) = pipelining_simulated.simulated([[local, alone]], "local")
    assert (found.cores, found.seconds, found.measured) == (2, "alone", 4.0)
    assert found.error == pytest.approx(-1 / 3)
    (line,) = pipelining_simulated.as_lines([found])
    assert "4 processes on 2 cores, " in line
    two = report_of(pipelining, "1f1b", ([2.0], [2.0]), ([2.0], [2.0]))
    (found,) = pipelining_simulated.simulated([[two]], "1f1b")
    # Two stages of 2 s, four microbatches: one of them to fill the pipeline.
    assert (found.seconds, found.predicted) == ("in the run", pytest.approx(8 / 2.5))
    assert not pipelining_simulated.simulated([[two]], "gpipe")


def test_methods_take_turns_and_keep_their_boundaries(
    pipelining: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, Any]] = []

    def fake(_: argparse.Namespace, method: str, boundaries: Any) -> Any:
        started.append((method, boundaries))
        return report_of(pipelining, method, ([1.0], [1.0]))

    monkeypatch.setattr(pipelining, "started", fake)
    options = pipelining.parse(["--compare", "1f1b", "gpipe", "--repeats", "2"])
    reports = pipelining.compare(options)
    assert started == [("none", None), ("1f1b", None), ("gpipe", ()), ("1f1b", ()), ("gpipe", ()), ("none", ())]
    assert [[report.method for report in repeat] for repeat in reports] == [["none", "1f1b", "gpipe"]] * 2
    started.clear()
    pipelining.compare(pipelining.parse(["--compare", "local", "1f1b", "--repeats", "1", "--simulate"]))
    assert started == [("none", None), ("local", None), ("1f1b", None), ("local-one", ()), ("stages-one", ())]
    assert "repeat 2 of 2: none" in capsys.readouterr().err


def test_processes_get_the_options_of_the_comparison(pipelining: ModuleType) -> None:
    more = ("--threads", "2", "--seed", "3", "--ranks", "4", "--modules", "5", "--decoder", "conv", "--pin")
    options = pipelining.parse(arguments("swin", "1f1b", *more))
    again = pipelining.parse(["--method", "1f1b", *pipelining.passed_on(options)])
    assert vars(again) == vars(options)
