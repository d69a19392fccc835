"""The store of features: what is written comes back, rounded to bfloat16 and in no other way, or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad.errors import RunFolderError
from localgrad.training import feature_cache
from localgrad.training.feature_cache import Rows, check_space, free_bytes, open_cache, row_bytes, write_cache

IDENTITY = {"weights": "abc", "seed": 3, "variants": {"train-0": 2**60}}
CPU = torch.device("cpu")


def rows(count: int, shape: tuple[int, ...] = (5,), *, seed: int = 0, classes: int | None = None, **more: Any) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (count,), generator=generator)
    labels = targets if classes is None else torch.rand(count, classes, generator=generator)
    return Rows(torch.randn(count, *shape, generator=generator).to(**more), labels, targets)


def joined(batches: Iterator[Rows]) -> Rows:
    return Rows(*(torch.cat(column) for column in zip(*batches, strict=True)))


def assert_equal(ours: Rows, theirs: Rows) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A cache of a training part of 12 rows and a validation part of 5."""
    folder = tmp_path / "run" / "cache" / "after-module-0"
    train = [rows(4, seed=number, classes=3) for number in range(3)]
    write_cache(folder, [("train-0", train), ("val", [rows(5, seed=9)])], IDENTITY)
    return folder


@pytest.mark.heavy
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    start=st.integers(0, 3),
    classes=st.sampled_from([None, 2, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_comes_back_in_any_shape(
    shape: tuple[int, ...], sizes: list[int], start: int, classes: int | None, dtype: torch.dtype
) -> None:
    batches = [rows(size, shape, seed=number, classes=classes, dtype=dtype) for number, size in enumerate(sizes)]
    whole = joined(iter(batches))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache" / "one"
        write_cache(folder, [("part", iter(batches))], IDENTITY)
        cache = open_cache(folder, IDENTITY)
        assert cache is not None
        found = list(cache.batches("part", CPU, start))
        first = sum(sizes[:start])
        assert [len(batch.targets) for batch in found] == sizes[start:]
        if found:
            rounded = whole.features.to(torch.bfloat16).to(dtype)
            assert_equal(joined(iter(found)), Rows(rounded[first:], whole.labels[first:], whole.targets[first:]))
        assert cache.num_bytes == sum(path.stat().st_size for path in folder.glob("part.*"))
        assert cache.num_bytes == sum(sizes) * row_bytes(whole.features[0].numel(), classes)


def test_batches_are_as_large_as_they_were_written(tmp_path: Path) -> None:
    """Images that were left out make theirs smaller: what else is read batch by batch stays beside them."""
    batches = [rows(size, seed=size) for size in (4, 3, 2, 4)]
    write_cache(tmp_path / "c" / "x", [("part", batches)], IDENTITY)
    cache = open_cache(tmp_path / "c" / "x", IDENTITY)
    assert cache is not None
    for start in range(5):
        found = [batch.targets for batch in cache.batches("part", CPU, start)]
        assert [each.tolist() for each in found] == [batch.targets.tolist() for batch in batches[start:]]


def test_what_lies_on_disk_is_bfloat16_to_the_bit(written: Path) -> None:
    raw = torch.frombuffer(bytearray((written / "train-0.features").read_bytes()), dtype=torch.bfloat16)
    expected = torch.cat([rows(4, seed=number, classes=3).features for number in range(3)]).to(torch.bfloat16)
    assert torch.equal(raw.view(12, 5), expected)
    exact = torch.tensor([[1.0, -0.0, 2.0**-130, 3.0e38, 1 + 2.0**-7]])
    write_cache(written, [("part", [Rows(exact, torch.zeros(1).long(), torch.zeros(1).long())])], IDENTITY)
    cache = open_cache(written, IDENTITY)
    assert cache is not None
    [batch] = cache.batches("part", CPU)
    assert torch.equal(batch.features[0, [0, 1, 2, 4]], exact[0, [0, 1, 2, 4]]), "what bfloat16 can tell is kept"
    assert abs(batch.features[0, 3] / exact[0, 3] - 1) < 2**-8, "a float32 that float16 couldn't hold"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_the_callers_own(dtype: torch.dtype, tmp_path: Path) -> None:
    write_cache(tmp_path / "c" / "x", [("part", [rows(6, dtype=dtype)])], IDENTITY)
    cache = open_cache(tmp_path / "c" / "x", IDENTITY)
    assert cache is not None
    [before] = cache.batches("part", CPU)
    kept = Rows(*(tensor.clone() for tensor in before))
    for tensor in before:
        tensor.zero_()
    [after] = cache.batches("part", CPU)
    assert_equal(after, kept)


def test_rewriting_replaces_the_whole_and_leaves_nothing_else(written: Path) -> None:
    write_cache(written, [("val", [rows(2)])], {"weights": "other"})
    assert sorted(path.name for path in written.iterdir()) == [
        "manifest.json",
        "val.features",
        "val.labels",
        "val.targets",
    ]
    assert list(written.parent.iterdir()) == [written]
    assert open_cache(written, IDENTITY) is None
    assert open_cache(written, {"weights": "other"}) is not None


# ------------------------------------------------------------------------------------- stale, torn, no room


@pytest.mark.parametrize(
    "identity", [{**IDENTITY, "weights": "abd"}, {**IDENTITY, "seed": 4}, {**IDENTITY, "variants": {}}, {}]
)
def test_a_cache_of_something_else_is_not_used(identity: dict[str, Any], written: Path) -> None:
    assert open_cache(written, IDENTITY) is not None
    assert open_cache(written, identity) is None


@pytest.mark.parametrize("name", ["train-0.features", "train-0.labels", "val.targets", "manifest.json"])
@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_torn_cache_is_not_used(name: str, change: str, written: Path) -> None:
    path = written / name
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if change == "shorter" else content + b"x")
    assert open_cache(written, IDENTITY) is None


@pytest.mark.parametrize("key", ["format", "identity", "parts"])
def test_a_manifest_without_one_of_its_parts_is_not_used(key: str, written: Path) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    for broken in ({**manifest, key: None}, {k: v for k, v in manifest.items() if k != key}):
        (written / "manifest.json").write_text(json.dumps(broken))
        try:
            assert open_cache(written, IDENTITY) is None
        except AttributeError:
            pytest.fail(f"{key} = None is not understood")


def test_a_process_that_dies_while_it_writes_leaves_no_cache(tmp_path: Path) -> None:
    """The partial folder stays behind, has another name, and is in nobody's way."""
    folder = tmp_path / "cache" / "after-module-0"

    def dying() -> Iterator[Rows]:
        yield rows(4)
        os._exit(9)

    child = os.fork()
    if not child:
        write_cache(folder, [("val", dying())], IDENTITY)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.name for path in folder.parent.iterdir()] == [".after-module-0.partial"]
    assert open_cache(folder, IDENTITY) is None
    write_cache(folder, [("val", [rows(4)])], IDENTITY)
    assert list(folder.parent.iterdir()) == [folder]


def test_an_error_while_features_are_made_leaves_what_was_there(written: Path) -> None:
    def failing() -> Iterator[Rows]:
        yield rows(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(written, [("val", failing())], {"weights": "new"})
    assert list(written.parent.iterdir()) == [written]
    assert open_cache(written, IDENTITY) is not None


def test_a_full_disk_is_one_line(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"can't be written \(No space left on device\); make room, .*resume"):
        write_cache(written, [("val", [rows(4)])], {"weights": "new"})
    monkeypatch.undo()
    assert open_cache(written, IDENTITY) is not None, "what was there is still there"


def test_room_is_counted_with_what_a_cache_holds_already(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    held = sum(path.stat().st_size for path in written.iterdir())
    assert free_bytes(written.parent) == 1000 + held
    assert free_bytes(written.parents[1] / "not" / "yet") == 1000
    check_space(written.parent, 1000 + held)
    with pytest.raises(RunFolderError, match=r"need 2\.94 GiB of disk .* are free; take fewer cached_epochs"):
        check_space(written.parent, 3 * 2**30 - 2**26)
