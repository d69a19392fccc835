"""The run folder: whole or absent files, one process at a time, checkpoints that are what they say."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localgrad.errors import CheckpointError, RunFolderError
from localgrad.training.folder import (
    RunFolder,
    check_writable,
    holds_run,
    load_saved_weights,
    save_weights,
    write_atomically,
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    held = RunFolder(tmp_path / "run")
    yield held
    held.release()


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


# ------------------------------------------------------------------------------------- writing


def test_text_and_json_are_written(folder: RunFolder) -> None:
    assert not holds_run(folder.path)
    folder.write_text("recipe.toml", "seed = 1\n")
    folder.write_json("summary.json", {"a": [1, None]})
    assert holds_run(folder.path)
    assert (folder.path / "recipe.toml").read_text() == "seed = 1\n"
    assert json.loads((folder.path / "summary.json").read_text()) == {"a": [1, None]}
    assert (folder.path / "recipe.toml").stat().st_mode & 0o777 == 0o644
    assert names(folder.path) == {".lock", "checkpoints", "recipe.toml", "summary.json"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_writer_that_fails_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half of the n")
        raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write_atomically(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_process_killed_while_it_writes_leaves_the_old_file_and_its_rest_is_removed(folder: RunFolder) -> None:
    folder.write_text("recipe.toml", "old")
    folder.release()
    script = (
        "import os, signal, sys; from pathlib import Path; from localgrad.training.folder import write_atomically\n"
        "def die(path): path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), die)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder.path / "recipe.toml")], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (folder.path / "recipe.toml").read_text() == "old"
    assert len(names(folder.path)) == 4
    RunFolder(folder.path).release()
    assert names(folder.path) == {".lock", "checkpoints", "recipe.toml"}


@pytest.mark.parametrize("what", ["text", "weights", "checkpoint"])
def test_a_full_disk_is_said_and_keeps_the_old_file(what: str, folder: RunFolder) -> None:
    def write(size: int) -> Path:
        if what == "text":
            folder.write_text("big", "x" * size)
            return folder.path / "big"
        if what == "weights":
            save_weights(folder.best, {"a": torch.zeros(size)})
            return folder.best
        folder.save_last({"a": torch.zeros(size)})
        return folder.last

    path = write(10)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(RunFolderError, match=f"{path.name}: can't be written .* is still there"):
            write(100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert not [name for name in names(path.parent) if name.startswith(f".{path.name}")]


# ------------------------------------------------------------------------------------- the folder itself


def test_a_folder_is_held_by_one(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="another process is using it"):
        RunFolder(folder.path)
    folder.release()
    RunFolder(folder.path).release()


@pytest.mark.parametrize("below", ["file", "file/run", "file/a/b"])
def test_a_folder_that_cannot_be_made_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for refuse in (check_writable, RunFolder):
        with pytest.raises(RunFolderError, match="choose another"):
            refuse(tmp_path / below)
    assert names(tmp_path) == {"file"}


def test_checking_a_folder_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    monkeypatch.chdir(tmp_path)
    check_writable(Path("a/b"))
    check_writable(Path("../x/y"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunFolderError, match=r"a/b'?: it can't be made: no permission in .*choose another"):
        check_writable(Path("a/b"))
    assert names(tmp_path) == set()


# ------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back(folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="there is none"):
        folder.load_last()
    state = {"weights": {"a": torch.arange(3.0)}, "position": {"epoch": 2, "best": None}}
    folder.save_last(state)
    loaded = folder.load_last()
    assert loaded["position"] == state["position"]
    assert torch.equal(loaded["weights"]["a"], torch.arange(3.0))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255))))
def test_a_damaged_checkpoint_never_ends_in_a_traceback(
    share: float, flips: list[tuple[float, int]], folder: RunFolder
) -> None:
    state = {"weights": {f"layer{i}": torch.randn(20, 20) for i in range(5)}, "numbers": [1, 2.0, None]}
    folder.save_last(state)
    folder.before.unlink(missing_ok=True)
    whole = folder.last.read_bytes()
    folder.last.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated or no checkpoint"):
        folder.load_last()
    damaged = bytearray(whole)
    for place, flip in flips:
        damaged[int(place * len(whole))] ^= flip
    folder.last.write_bytes(damaged)
    try:
        loaded = folder.load_last()  # no byte that was flipped means anything
        assert loaded["numbers"] == state["numbers"]
        assert all(torch.equal(loaded["weights"][name], value) for name, value in state["weights"].items())
    except CheckpointError as error:
        assert "last.pt" in str(error)


def test_code_in_a_checkpoint_is_not_run(folder: RunFolder) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(folder.path / "evil"),)

    torch.save({"format": 1, "x": Evil()}, folder.last)
    with pytest.raises(CheckpointError):
        folder.load_last()
    assert "evil" not in names(folder.path)


# ------------------------------------------------------------------------------------- weights


def test_weights_come_back_tied_and_strided_too(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    weights = {"a": tensor, "tied": tensor, "view": tensor[:2], "turned": tensor.T, "half": tensor.bfloat16()}
    weights["count"] = torch.tensor(3)
    save_weights(tmp_path / "w.safetensors", weights)
    loaded = load_saved_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert loaded["half"].dtype == torch.bfloat16


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_weights_are_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        load_saved_weights(path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there are none; train the run first"):
        load_saved_weights(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError):
        load_saved_weights(tmp_path)


def test_readers_see_whole_files_while_they_are_written(tmp_path: Path) -> None:
    path, done = tmp_path / "file", threading.Event()
    path.write_text("0" * 10_000)

    def write() -> None:
        for digit in "123456789" * 3:
            write_atomically(path, lambda temporary, digit=digit: temporary.write_text(digit * 10_000))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        text = path.read_text()
        assert text == text[0] * 10_000
    writer.join()
