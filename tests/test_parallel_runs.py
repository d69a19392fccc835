"""Runs on several processes: what they leave, how they are stopped and resumed, and what becomes of them in a fault."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ranks as ranks_file
from helpers import Cli, assert_same_run, load_named, metrics_of, wait_for_epochs
from localgrad.app.recipe import Recipe, overlay
from localgrad.errors import DataError
from localgrad.parallel import launching
from localgrad.parallel.watch import BROKEN_SECONDS, SILENT_SECONDS, TOLD_SECONDS
from localgrad.training.data import Batches
from localgrad.training.folder import RunFolder
from localgrad.training.settings import Augment
from ranks import Ended, Ranks, free_port

SLOW = 4.0
"""Starting and training are as slow as the machine is busy; times that are stated are of the fault alone."""
START_SECONDS = 60.0
MICRO: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 4,
        "drop_path": 0.2,
        "options": {"embed_dim": 16, "depth": 4, "num_heads": 2},
    },
    "data": {"name": "digits", "limit": 96},
    "local": {"modules": 4},
    "training": {"epochs": 2, "batch_size": 16, "lr": 2e-3, "ema_decay": 0.9, "clip_grad": 1.0, "warmup_epochs": 0.5},
    "augment": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "crop_padding": 1},
    "execution": {"device": "cpu", "num_threads": 1, "accumulation": 2},
}
NUM_BATCHES = 6
PARALLEL = ("--parallel", "modules")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(Recipe.from_dict(MICRO).to_toml())
    return path


@pytest.fixture(scope="module")
def alone(ranks: Ranks, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done(ranks.run(["train", "--recipe", recipe, "--out", folder], estimates=True))
    return folder


@pytest.fixture(scope="module")
def shared_out(ranks: Ranks, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two processes."""
    folder = tmp_path_factory.mktemp("shared out") / "run"
    done(ranks.run(["train", "--recipe", recipe, *PARALLEL, "--out", folder], size=2, estimates=True))
    return folder


@pytest.fixture(scope="module")
def stopped(ranks: Ranks, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes of which the first one got SIGTERM in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    ended = ranks.run(
        ["train", "--recipe", recipe, *PARALLEL, "--out", folder],
        size=2,
        fault=(0, "term", 2 * NUM_BATCHES + 3),  # two modules a rank: in the second batch of the second epoch
    )
    assert ended.codes == [143, 143], ended
    (line,) = ended.err[0].splitlines()
    assert line.endswith(f"go on with: localgrad train --resume {folder}")
    assert "SIGTERM" in line
    assert ended.err[1] == ended.out[1] == ""
    position = RunFolder(folder, is_guest=True).load_last()["position"]
    assert position["epoch"] == 1
    assert 2 <= position["batch"] < NUM_BATCHES
    return folder


def done(ended: Ended) -> None:
    assert set(ended.codes) == {0}, ended
    assert set(ended.err) == {""}, ended.err


def stopped_by_sigterm(ended: Ended) -> None:
    assert set(ended.codes) == {143}, ended
    assert set(ended.err[1:]) == {""}, ended.err


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------- what a run leaves


def test_several_processes_leave_what_one_leaves(shared_out: Path, alone: Path) -> None:
    assert_same_run(shared_out, alone)
    assert not [path for path in shared_out.rglob(".*") if path.name != ".lock"]


@pytest.mark.heavy
def test_a_model_that_only_watching_splits_leaves_the_same(ranks: Ranks, tmp_path: Path) -> None:
    model = {
        "name": "visformer_tiny",
        "img_size": 32,
        "drop_path": 0.2,
        "options": {"init_channels": 8, "embed_dim": 16, "depth": [1, 2, 1], "num_heads": 2, "group": 4},
    }
    changes = {"data": {"name": "digits", "limit": 48}, "local": {"modules": 3}}
    (tmp_path / "recipe.toml").write_text(Recipe.from_dict({**MICRO, "model": model, **changes}).to_toml())
    command = ["train", "--recipe", tmp_path / "recipe.toml"]
    done(ranks.run([*command, "--out", tmp_path / "one"]))
    done(ranks.run([*command, *PARALLEL, "--out", tmp_path / "two"], size=2))
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_the_summary_tells_what_each_process_did(shared_out: Path, alone: Path) -> None:
    summary = json.loads((shared_out / "summary.json").read_text())
    first, last = summary["ranks"]
    assert (first["modules"], last["modules"]) == ([0, 1], [2, 3])
    # Of a training step of 16 images, not of an evaluation of up to 256: features, soft labels and targets.
    assert first["sent_bytes_per_step"] == 16 * (17 * 16 * 4 + 10 * 4 + 8)
    assert last["sent_bytes_per_step"] == 0
    for rank in (first, last):
        assert 0 < rank["estimated_peak_bytes"] < rank["measured_peak_bytes"]
        assert rank["waited_seconds"] >= 0
    assert summary["measured_peak_bytes"] == max(rank["measured_peak_bytes"] for rank in (first, last))
    whole = json.loads((alone / "summary.json").read_text())
    assert max(rank["estimated_peak_bytes"] for rank in (first, last)) < whole["estimated_peak_bytes"]


def test_such_a_run_is_evaluated_and_used_as_any_other(shared_out: Path, cli_: Cli, tmp_path: Path) -> None:
    said = cli_("evaluate", str(shared_out))
    accuracy = json.loads((shared_out / "summary.json").read_text())["test_accuracy"]
    assert said.code == 0, said
    assert f"{accuracy:.2%}" in said.out
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    said = cli_("predict", str(shared_out), str(tmp_path / "one.png"))
    assert said.code == 0, said


# --------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.heavy
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stopped_run_goes_on_in_any_number_of_processes(
    size: int, stopped: Path, alone: Path, ranks: Ranks, tmp_path: Path
) -> None:
    folder = copy_of(stopped, tmp_path)
    how = ["--set", "execution.parallel=none"] if size == 1 else []
    done(ranks.run(["train", "--resume", folder, *how], size=size))
    assert_same_run(folder, alone)
    assert len(list((folder / "checkpoints").glob("part-*"))) == (0 if size == 1 else size)


@pytest.mark.heavy
def test_several_processes_go_on_with_what_one_began(alone: Path, ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = ranks.run(["train", "--recipe", recipe, "--out", folder], fault=(0, "term", 4 * NUM_BATCHES + 10))
    assert ended.codes == [143], ended
    done(ranks.run(["train", "--resume", folder, *PARALLEL], size=2))
    assert_same_run(folder, alone)


@pytest.mark.heavy
def test_a_signal_at_any_process_stops_all(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    command = ["train", "--recipe", recipe, "--epochs", "400", *PARALLEL, "--out", tmp_path / "run"]
    ended = ranks.run(command, size=2, fault=(1, "term", 3))
    assert ended.codes == [143, 143], ended
    assert ended.err[0].startswith("localgrad: stopped by SIGTERM, and saved in ")
    assert len(metrics_of(tmp_path / "run")) < 100


def test_a_finished_run_says_so_again(shared_out: Path, ranks: Ranks) -> None:
    ended = ranks.run(["train", "--resume", shared_out], size=2)
    done(ended)
    assert "test accuracy" in ended.out[0]
    assert ended.out[1] == ""


PROGRAM = """#!/bin/sh
echo "$RANK of $WORLD_SIZE: $*" > {folder}/part.$RANK
mv {folder}/part.$RANK {folder}/said.$RANK
{does}
"""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("does", "status"),
    [("exit 0", 0), ("test $RANK = 0 && exec sleep 60; exit 3", 3), ("exec sleep 60", 130)],
    ids=["all end well", "one fails", "a signal"],
)
def test_num_processes_starts_the_same_command_and_ends_as_they_do(
    does: str, status: int, ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    """With shell scripts, which start at once, in Python's place; the heavy twin starts Python."""
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(folder=tmp_path, does=does))
    program.chmod(0o755)
    command = ["train", "--recipe", recipe, "--num-processes", "2", *PARALLEL, "--out", tmp_path / "run"]
    process = ranks.start(command, call="parallel_worker:start_program", environment={"PROGRAM": str(program)})
    said = [tmp_path / "said.0", tmp_path / "said.1"]
    if status == 130:
        while not all(path.exists() for path in said):
            assert process.is_running()
            time.sleep(0.01)
        ended = process.send(signal.SIGINT)
    else:
        ended = process.wait()
    assert ended.codes == [status], ended
    assert ended.err == [""], "whoever failed has said why"
    words = " ".join(map(str, command))
    assert [path.read_text() for path in said] == [f"{rank} of 2: -m localgrad {words}\n" for rank in (0, 1)]


@pytest.mark.heavy
def test_num_processes_starts_them_and_a_signal_stops_them(
    alone: Path, ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    """The console script's own processes, with nothing of torchrun's to be read."""
    folder = tmp_path / "run"
    more = ["--epochs", "400", "--num-processes", "2", *PARALLEL]
    process = ranks.start(["train", "--recipe", recipe, *more, "--out", folder])
    wait_for_epochs(process, folder, 1)
    ended = process.send(signal.SIGINT)
    assert ended.codes == [130], ended
    assert ended.err == [
        f"localgrad: stopped by SIGINT, and saved in {folder}; go on with: localgrad train --resume {folder}\n"
    ]


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank that a launcher started."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.heavy
def test_a_killed_process_of_num_processes_is_said_in_a_line(
    ranks: Ranks, alone: Path, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    more = ["--epochs", "400", "--num-processes", "2", *PARALLEL]
    process = ranks.start(["train", "--recipe", recipe, *more, "--out", folder])
    wait_for_epochs(process, folder, 1)
    os.kill(rank_of(process.pids[0], 1), signal.SIGKILL)
    (code,), _, (err,), *_ = process.wait()
    assert code == 137, err
    said = [line for line in err.splitlines() if "SIGKILL" in line]
    assert said == [
        "localgrad: rank 1 was ended by SIGKILL (if nobody did that, the system may have run out of memory); "
        f"go on with: localgrad train --resume '{folder}' --num-processes 2"
    ], err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ({0: -11, 1: -15}, "rank 0 was ended by SIGSEGV; nothing was saved yet: start it again"),
        ({0: -9, 2: -9, 3: 1}, "rank 0 was ended by SIGKILL and rank 2 was ended by SIGKILL (if nobody did that"),
        ({1: -15}, "rank 1 was ended by SIGTERM"),
        ({0: -60}, "rank 0 was ended by signal 60"),
        ({0: 2, 1: -15}, ""),
        ({0: 1}, ""),
    ],
    ids=str,
)
def test_how_processes_ended_is_said(
    codes: dict[int, int], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}
    launching._tell_killed(failures, 4, tmp_path)
    err = capsys.readouterr().err
    assert err.startswith(f"localgrad: {words}" if words else "")
    assert err.count("\n") == bool(words)


@pytest.mark.heavy
def test_num_processes_says_a_mistake_in_a_line(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    more = ["--num-processes", "2", *PARALLEL, "--replicas", "2", "--batch-size", "15"]
    ended = ranks.run(["train", "--recipe", recipe, *more, "--out", tmp_path / "run"])
    assert (ended.codes, ended.out) == ([2], [""]), ended
    assert ended.err == ["localgrad: --batch-size 15 can't be shared out among 2 replicas; take a multiple of 2.\n"]


@pytest.mark.heavy
def test_a_run_that_is_started_again_goes_on_where_it_was(
    ranks: Ranks, alone: Path, recipe: Path, tmp_path: Path
) -> None:
    """As torchrun does: the same command, and how often it was started."""
    folder = tmp_path / "run"
    command = ["train", "--recipe", recipe, *PARALLEL, "--out", folder]
    ended = ranks.run(command, size=2, fault=(1, "kill", IN_SECOND_EPOCH))
    assert ended.codes[1] == 137, ended
    done(ranks.run(command, size=2, environment={"TORCHELASTIC_RESTART_COUNT": "1"}))
    assert_same_run(folder, alone)


@pytest.mark.heavy
def test_torchrun_starts_a_run_again_where_it_was(alone: Path, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    fault = ["1", "kill", str(2 * NUM_BATCHES + 5)]
    arguments = ["train", "--recipe", str(recipe), *PARALLEL, "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *torchrun, ranks_file.__file__, *fault, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    said = [line for line in process.stderr.splitlines() if line.startswith("localgrad:")]
    assert len(said) <= 1, said  # torchrun may end the others before they can say what they saw
    assert_same_run(folder, alone)


# ------------------------------------------------------------------------------------------------------ faults

IN_SECOND_EPOCH = 2 * NUM_BATCHES + 5
WORDS = {
    "kill": "it ended without a word: killed, or its machine is gone",
    "stop": "no sign of life for 10 s: stopped, or its machine is gone",
    "sleep": "it hangs: for",
    "memory": "memory ran out in local module {first}: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "nan": "the loss of local module {first} is no longer finite",
    "error": "RuntimeError: something else",
    "kill while saving": "it ended without a word: killed, or its machine is gone",
}
HANGS_AFTER = 3.0
LASTS = {
    "kill": TOLD_SECONDS + BROKEN_SECONDS,
    "kill while saving": TOLD_SECONDS + BROKEN_SECONDS,
    "stop": SILENT_SECONDS + TOLD_SECONDS,
    "sleep": HANGS_AFTER + TOLD_SECONDS,
    "memory": TOLD_SECONDS,
    "error": TOLD_SECONDS,
    "nan": TOLD_SECONDS,
}
NAMES = ("local modules 0 to 1", "local modules 2 to 3")


QUICK = [("kill", 1), ("sleep", 0), ("memory", 1), ("nan", 0)]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("which", "rank"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.heavy)
        for each in itertools.product(WORDS, (0, 1))
    ],
)
def test_a_fault_of_one_process_ends_all_and_the_run_goes_on_afterwards(
    which: str, rank: int, ranks: Ranks, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    recipe = alone / "recipe.toml"
    number = 1 if which == "kill while saving" else IN_SECOND_EPOCH
    ended = ranks.run(
        ["train", "--recipe", recipe, *PARALLEL, "--out", folder],
        size=2,
        fault=(rank, which, number),
        # Else one that waits at the end of an epoch for another that is stopped would be told of first.
        environment={"LOCALGRAD_HANGING_SECONDS": str(HANGS_AFTER)} if which == "sleep" else {},
    )
    died = {"kill": 137, "kill while saving": 137, "stop": 137}.get(which)
    status = 2 if which in ("memory", "nan") else 1
    assert ended.codes == [died if died and each == rank else status for each in range(2)], ended
    speaker = 1 if died and rank == 0 else 0
    lines = [line for line in ended.err[speaker].splitlines() if line.startswith("localgrad: ")]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith(f"localgrad: rank {rank} ({NAMES[rank]}): {WORDS[which].format(first=2 * rank)}"), lines
    assert "localgrad: " not in ended.err[1 - speaker]
    if which not in ("error",) and speaker == 0:
        assert ended.err == [lines[0] + "\n", ""], ended.err
    took = ended.ended_at - ended.fault_at
    assert took < SLOW * LASTS[which], (which, took)
    if number > 1:
        state = RunFolder(folder, is_guest=True).load_last()
        assert [len(part["optimizers"]) for part in state["parts"]] == [2, 2]
    done(ranks.run(["train", "--resume", folder], size=2))
    assert_same_run(folder, alone)
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
    assert len(list((folder / "checkpoints").glob("part-*"))) == 2


# ---------------------------------------------------------------------------------------------------- replicas

STILL = {
    "model.drop_path": 0.0,
    "augment": {"flip": False, "crop_padding": 0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0},
}


def batches_of(shard: tuple[int, int], *, augment: Augment | None, limit: int = 100, batch_size: int = 12) -> Batches:
    data = load_named("digits", limit=limit)
    return Batches(
        images=data.train, batch_size=batch_size, image_size=(8, 8), info=data.info, device=torch.device("cpu"),
        augment=augment, seed=5, shard=shard,
    )  # fmt: skip


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_share_each_batch_out_without_overlap(replicas: int) -> None:
    whole = batches_of((0, 1), augment=Augment())
    parts = [batches_of((number, replicas), augment=Augment()) for number in range(replicas)]
    assert {len(part) for part in parts} == {len(whole)}
    for epoch in range(2):
        for index, batch in enumerate(whole._batches(epoch)):
            shares = [part._batches(epoch)[index] for part in parts]
            assert torch.equal(torch.cat(shares), batch)
            assert {len(share) for share in shares} == {12 // replicas} or len(batch) < 12


@pytest.mark.heavy
@pytest.mark.parametrize("replicas", [2, 3, 40])
def test_replicas_evaluate_each_image_once(replicas: int) -> None:
    parts = [batches_of((number, replicas), augment=None) for number in range(replicas)]
    seen = torch.cat([indices for part in parts for indices in part._batches(0)])
    assert torch.equal(seen.sort().values, torch.arange(100))
    assert [len(part) for part in parts] == [len(part._batches(0)) for part in parts]
    assert [len(list(part.epoch(0))) for part in parts] == [len(part) for part in parts]


def test_a_batch_that_replicas_cant_share_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size=12 can't be shared out among 5 replicas"):
        batches_of((0, 5), augment=Augment())


@pytest.fixture(scope="module")
def still(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs without draws: of one process, and of two replicas of two."""
    root = tmp_path_factory.mktemp("still")
    (root / "recipe.toml").write_text(Recipe.from_dict(overlay(MICRO, STILL)).to_toml())
    done(ranks.run(["train", "--recipe", root / "recipe.toml", "--out", root / "one"]))
    command = ["train", "--recipe", root / "recipe.toml", "--out", root / "four", *PARALLEL, "--replicas", "2"]
    done(ranks.run(command, size=4))
    return root / "one", root / "four"


@pytest.mark.heavy
def test_replicas_train_and_count_as_one_process_on_the_whole_batch(still: tuple[Path, Path]) -> None:
    one, four = still
    for ours, theirs in zip(metrics_of(four), metrics_of(one), strict=True):
        assert ours.keys() == theirs.keys()
        assert math.isclose(ours["train_accuracy"], theirs["train_accuracy"], abs_tol=0.03), (ours, theirs)
        for mine, other in zip(ours["losses"], theirs["losses"], strict=True):
            assert mine == pytest.approx(other, rel=1e-3)
    weights, others = load_file(four / "model.safetensors"), load_file(one / "model.safetensors")
    for name, value in others.items():
        assert torch.allclose(weights[name], value, rtol=1e-2, atol=1e-4), name
    summary = json.loads((four / "summary.json").read_text())
    assert [(rank["replica"], rank["modules"]) for rank in summary["ranks"]] == [
        (0, [0, 1]), (0, [2, 3]), (1, [0, 1]), (1, [2, 3])
    ]  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_replicas_that_keep_rows_save_and_resume_whole_weights(
    times: int, still: tuple[Path, Path], ranks: Ranks, tmp_path: Path
) -> None:
    """Stopped as four processes, once or again, then gone on with as two of one replica."""
    one, _ = still
    folder = tmp_path / "run"
    command = ["train", "--recipe", one.parent / "recipe.toml", "--out", folder]
    command += [*PARALLEL, "--replicas", "2", "--shard"]
    stopped_by_sigterm(ranks.run(command, size=4, fault=(2, "term", 2 * NUM_BATCHES + 3)))
    if times == 2:
        stopped_by_sigterm(ranks.run(["train", "--resume", folder], size=4, fault=(1, "term", 1)))
    plain = ["--set", "execution.replicas=1", "--set", "execution.shard=false"]
    done(ranks.run(["train", "--resume", folder, *plain], size=2))
    for ours, theirs in zip(metrics_of(folder), metrics_of(one), strict=True):
        for mine, other in zip(ours["losses"], theirs["losses"], strict=True):
            assert mine == pytest.approx(other, rel=1e-3)
    weights, others = (load_file(path / "model.safetensors") for path in (folder, one))
    for name, value in others.items():
        assert torch.allclose(weights[name], value, rtol=1e-2, atol=1e-4), name


@pytest.mark.heavy
def test_running_statistics_are_of_the_images_of_all_replicas(ranks: Ranks, tmp_path: Path) -> None:
    """Means of equal parts have the whole's mean as theirs; the weights all but stand still."""
    changes = {
        **STILL,
        "training.ema_decay": None,
        "model": {"name": "resnet18", "img_size": 16, "options": {"channels": [8, 8, 16, 16], "output_stride": 8}},
        "local.modules": 2,
        "training.lr": 1e-12,
        "training.min_lr": 0.0,
        "training.warmup_lr": 0.0,
        "training.weight_decay": 0.0,
        "training.warmup_epochs": 0.0,
        "execution.accumulation": 1,
    }
    plain = overlay({**MICRO, "model": {}}, changes)
    plain["training"] = {key: value for key, value in plain["training"].items() if value is not None}
    (tmp_path / "recipe.toml").write_text(Recipe.from_dict(plain).to_toml())
    command = ["train", "--recipe", tmp_path / "recipe.toml", "--epochs", "1", "--out"]
    done(ranks.run([*command, tmp_path / "one"]))
    done(ranks.run([*command, tmp_path / "two", *PARALLEL, "--replicas", "2"], size=2))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert torch.allclose(ours["bn1.running_mean"], theirs["bn1.running_mean"], atol=1e-5)
    assert torch.allclose(ours["bn1.running_var"], theirs["bn1.running_var"], rtol=0.2)


# --------------------------------------------------------------------------------------------------- bad input

REFUSED: dict[str, tuple[int, list[str], str]] = {
    "more ranks than modules": (3, ["--modules", "2", *PARALLEL], "3 processes for 2 local modules"),
    "replicas that don't divide": (3, [*PARALLEL, "--replicas", "2"], "3 processes can't be shared out"),
    "a batch that doesn't divide": (2, [*PARALLEL, "--replicas", "2", "--batch-size", "15"], "--batch-size 15"),
    "no GPU": (2, [*PARALLEL, "--device", "cuda"], "no CUDA GPU"),
    "no --parallel": (2, [], "add --parallel modules"),
    "alone": (1, [*PARALLEL], "there is one process only"),
    "replicas alone": (1, ["--replicas", "2"], "--replicas 2 needs --parallel"),
    "rows alone": (1, ["--shard"], "--shard needs --parallel: weights are shared out among replicas"),
    "rows of one": (2, [*PARALLEL, "--shard"], "add --replicas 2"),
    "rows for an optimizer of matrices": (
        2,
        ["--modules", "1", *PARALLEL, "--replicas", "2", "--shard", "--set", "training.optimizer='muon'"],
        "--shard: Muon isn't known",
    ),
    "processes for what": (1, ["--num-processes", "2"], "--num-processes 2 needs --parallel"),
    "no processes": (1, ["--num-processes", "0", *PARALLEL], "--num-processes: 0"),
    "overlap": (2, [*PARALLEL, "--overlap", "1"], "--overlap"),
    "global every": (2, [*PARALLEL, "--global-every", "2"], "--global-every"),
    "global tail": (2, [*PARALLEL, "--global-tail", "0.5"], "--global-tail"),
    "health": (2, [*PARALLEL, "--health", "1"], "--health"),
    "sequential": (2, [*PARALLEL, "--schedule", "sequential"], "--schedule"),
    "offload": (2, [*PARALLEL, "--offload"], "--offload"),
    "teacher": (2, [*PARALLEL, "--set", "local.options.teacher_share=0.5"], "teacher_share"),
    "budget": (2, [*PARALLEL, "--modules", "auto", "--budget", "1GiB"], "--budget"),
    "replan": (2, [*PARALLEL, "--on-oom", "replan"], "--on-oom replan"),
    "no such option": (2, [*PARALLEL, "--nonsense"], "nonsense"),
    "no such model": (2, [*PARALLEL, "--model", "vit_nonsense"], "vit_nonsense"),
}


def assert_refused(ended: Ended, words: str) -> None:
    assert set(ended.codes) == {2}, ended
    assert words in ended.err[0], ended.err
    assert set(ended.err[1:]) <= {""}
    if words != "nonsense":  # typer's own, in a frame
        assert ended.err[0].startswith("localgrad: ")
        assert ended.err[0].count("\n") == 1, ended.err


@pytest.mark.few(4)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_is_said_in_a_line_by_the_first_process(
    name: str, ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    size, arguments, words = REFUSED[name]
    assert_refused(ranks.run(["train", "--recipe", recipe, "--out", tmp_path / "run", *arguments], size=size), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("different", [["--lr", "0.1"], ["--replicas", "2"], None], ids=str)
def test_processes_that_want_different_things_are_refused(
    different: list[str] | None, ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    """More is asked for by the second; or nothing of processes."""
    command = ["train", "--recipe", recipe, "--out", tmp_path / "run"]
    second = command if different is None else [*command, *PARALLEL, *different]
    assert_refused(ranks.run([[*command, *PARALLEL], second], size=2), "rank 1 has another recipe than rank 0")


@pytest.mark.heavy
def test_a_run_of_other_modules_cant_be_resumed(ranks: Ranks, stopped: Path) -> None:
    assert_refused(ranks.run(["train", "--resume", stopped, "--modules", "2"], size=2), "local.modules")


def test_a_run_that_another_process_holds_cant_be_resumed(ranks: Ranks, stopped: Path) -> None:
    held = RunFolder(stopped)
    try:
        assert_refused(ranks.run(["train", "--resume", stopped], size=2), "another process is using it")
    finally:
        held.release()


def test_a_torn_part_of_a_checkpoint_is_said(ranks: Ranks, stopped: Path, tmp_path: Path) -> None:
    folder = copy_of(stopped, tmp_path)
    (folder / "checkpoints" / "before.pt").unlink()
    part = max((folder / "checkpoints").glob("part-*"))
    part.write_bytes(part.read_bytes()[:1000])
    assert_refused(ranks.run(["train", "--resume", folder], size=2), part.name)


@pytest.mark.heavy
def test_a_port_that_is_taken_is_said(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        ended = ranks.run(
            ["train", "--recipe", recipe, "--out", tmp_path / "run", *PARALLEL],
            size=2,
            port=taken.getsockname()[1],
            environment={"LOCALGRAD_JOINING_SECONDS": "3"},
        )
    assert set(ended.codes) == {2}, ended
    assert ended.err[0].splitlines()[-1].startswith("localgrad: processes can't meet at 127.0.0.1:"), ended.err


@pytest.mark.heavy
def test_a_process_that_never_comes_is_said(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    command = ["train", "--recipe", recipe, "--out", tmp_path / "run", *PARALLEL]
    ended = ranks.run(
        [command, ["--version"]], size=2, port=free_port(), environment={"LOCALGRAD_JOINING_SECONDS": "3"}
    )
    assert ended.codes == [2, 0], ended
    assert "localgrad: rank 1 of 2 never came, in 3 s" in ended.err[0] or "can't meet" in ended.err[0], ended.err


# ------------------------------------------------------------------------------------------------ small epochs


@pytest.mark.heavy
@pytest.mark.parametrize(
    "changes",
    [
        ["--set", "execution.buffers=9", "--val-fraction", "0"],
        ["--batch-size", "96", "--epochs", "3"],
    ],
    ids=["more room than batches, nothing to select on", "one batch an epoch"],
)
def test_short_epochs_end_as_long_ones_do(changes: list[str], ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    command = ["train", "--recipe", recipe, *changes]
    done(ranks.run([*command, "--out", tmp_path / "one"]))
    done(ranks.run([*command, *PARALLEL, "--out", tmp_path / "four"], size=4))
    assert_same_run(tmp_path / "four", tmp_path / "one")
