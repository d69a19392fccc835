"""Shared by all tests: one processor thread, no network, no GPU; fixtures that several files take."""

from __future__ import annotations

import copy
import gc
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from research.simulated_card.building import default_cache

if TYPE_CHECKING:
    from helpers import Cli
    from ranks import Ranks
    from simulated import SimulatedCard

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Beside another worker any test may be slow: that says nothing of what it draws.
settings.register_profile("beside others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beside others")
BUILDS = default_cache()  # of the simulated card: before a test points the cache elsewhere


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``few(n)`` n cases are quick, evenly chosen; the others are heavy.

    Files that fork processes come first, and so to one worker: what they are forked from takes ten seconds to start.
    """
    forking = {item.path for item in items if "ranks" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in forking)
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("heavy"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        [count] = next(found[0].iter_markers("few")).args
        quick = {round((number + 0.5) * len(found) / count - 0.5) for number in range(count)}
        for number, item in enumerate(found):
            if len(found) > 1 and number not in quick:
                item.add_marker("heavy")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are quicker so, and sums come in one order."""
    import torch  # not by the process that only shares tests out among workers

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _whatever_lasts_is_collected_once() -> None:
    """An estimate collects cycles; looking through all that is imported takes longer than most estimates."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _proved_once() -> Iterator[None]:
    """A stock model is proved by the first test that splits it."""
    from localgrad.backbones import base
    from proofs import proved_once

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(base, "prove", proved_once(base.prove))
        yield


@pytest.fixture(autouse=True, scope="session")
def _digits_read_once() -> Iterator[None]:
    """scikit-learn reads them from text."""
    from sklearn import datasets

    read = cache(datasets.load_digits)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets, "load_digits", lambda: copy.deepcopy(read()))
        yield


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What must die by itself: a cycle that waits for the collector keeps a GPU full."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def cost_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nobody's own cache of costs; one for all tests of a file."""
    from localgrad.planning import cache

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(cache, "_recent", {})
        yield folder / "localgrad" / "costs"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes that start at once."""
    from ranks import Ranks

    with Ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> SimulatedCard:
    """A CUDA card without a card, or a skip with the reason why there is none."""
    from research.simulated_card.building import Unavailable
    from simulated import SimulatedCard

    try:
        return SimulatedCard(tmp_path_factory.mktemp("simulated"), BUILDS)
    except Unavailable as why:
        pytest.skip(f"no simulated card: {why}")


@pytest.fixture
def cli_(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The console script's own entry, with its true exit status."""
    from helpers import Said
    from localgrad import cli

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["localgrad", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capfd.readouterr())

    return call
