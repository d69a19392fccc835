"""One module a rank: the search against brute force, and what goes from rank to rank."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad.backbones.base import Layout
from localgrad.objectives.carried import CARRIED, Carried
from localgrad.parallel.packets import Packets
from localgrad.partition import Checkpointing, check_boundaries, spans
from localgrad.planning.search import UNLIMITED, Choice, Ranks, fastest_ranks, smallest_ranks

WAYS = [Checkpointing(), Checkpointing("blocks"), Checkpointing("halves"), Checkpointing("halves", 4)]


class Table:
    """Random costs of every module on every rank."""

    def __init__(self, num_blocks: int, num_ranks: int, seed: int, *, spread: int = 12) -> None:
        self.num_blocks, self.num_ranks = num_blocks, num_ranks
        generator = random.Random(seed)
        self._choices, self._resident = {}, {}
        for start, stop in itertools.combinations(range(num_blocks + 1), 2):
            count = generator.randint(1, 4)
            times = sorted(generator.sample(range(spread), count))
            peaks = sorted(generator.sample(range(spread), count), reverse=True)
            self._choices[start, stop] = [Choice(*each) for each in zip(times, peaks, WAYS, strict=False)]
            for rank in range(num_ranks):
                self._resident[rank, start, stop] = generator.randint(0, spread)

    def choices(self, start: int, stop: int) -> list[Choice]:
        return self._choices[start, stop]

    def resident(self, rank: int, start: int, stop: int) -> int:
        return self._resident[rank, start, stop]

    def every(self, budget: int) -> Iterator[tuple[int, int, int]]:
        """(slowest, sum, largest) of every partition and every way to run it that fits."""
        for boundaries in itertools.combinations(range(1, self.num_blocks), self.num_ranks - 1):
            runs = [(span.start, span.stop) for span in spans(boundaries, self.num_blocks)]
            for ways in itertools.product(*(self._choices[run] for run in runs)):
                sizes = [self._resident[rank, *runs[rank]] + way.peak_bytes for rank, way in enumerate(ways)]
                times = [way.nanoseconds for way in ways]
                if max(sizes) <= budget:
                    yield max(times), sum(times), max(sizes)

    def check(self, found: Ranks) -> tuple[int, int, int]:
        """A plan is what it says it is; its figures."""
        check_boundaries(found.boundaries, self.num_blocks)
        runs = [(span.start, span.stop) for span in spans(found.boundaries, self.num_blocks)]
        assert len(runs) == len(found.choices) == len(found.rank_bytes) == self.num_ranks
        for rank, (run, choice) in enumerate(zip(runs, found.choices, strict=True)):
            assert choice in self._choices[run]
            assert found.rank_bytes[rank] == self._resident[rank, *run] + choice.peak_bytes
        times = [choice.nanoseconds for choice in found.choices]
        assert found.nanoseconds == max(times)
        return max(times), sum(times), max(found.rank_bytes)


SIZES = st.integers(1, 6).flatmap(lambda ranks: st.tuples(st.integers(ranks, 10 if ranks < 4 else 7), st.just(ranks)))


@given(sizes=SIZES, seed=st.integers(0, 10**6), budget=st.one_of(st.integers(0, 26), st.just(UNLIMITED)))
@settings(deadline=None, max_examples=150)
def test_the_fastest_ranks_are_those_of_brute_force(sizes, seed, budget):
    table = Table(*sizes, seed)
    found = fastest_ranks(*sizes, table.choices, table.resident, budget)
    expected = min(table.every(budget), default=None)
    assert (None if found is None else table.check(found)) == expected


@given(sizes=SIZES, seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=80)
def test_the_smallest_ranks_are_those_of_brute_force_and_no_smaller_budget_fits(sizes, seed):
    table = Table(*sizes, seed)
    found = smallest_ranks(*sizes, table.choices, table.resident)
    assert table.check(found) == min(table.every(UNLIMITED), key=lambda figures: (figures[2], *figures[:2]))
    assert fastest_ranks(*sizes, table.choices, table.resident, max(found.rank_bytes) - 1) is None


def test_a_worse_prefix_that_hides_behind_the_slowest_rank_is_not_taken():
    """The first three blocks are best cut at 1 by their own maximum, and at 2 by the sum of the whole."""
    times = {(0, 1): 8, (1, 3): 8, (0, 2): 1, (2, 3): 9, (3, 4): 9}

    def choices(start, stop):
        return [Choice(times.get((start, stop), 99), 0, Checkpointing())]

    assert fastest_ranks(3, 2, choices, lambda rank, start, stop: 0).boundaries == (1,)
    assert fastest_ranks(4, 3, choices, lambda rank, start, stop: 0).boundaries == (2, 3)


def test_more_ranks_than_blocks_have_no_plan():
    table = Table(2, 3, 0)
    assert fastest_ranks(2, 3, table.choices, table.resident) is None
    with pytest.raises(ValueError, match="3 ranks can be made of 2 blocks"):
        smallest_ranks(2, 3, table.choices, table.resident)


def test_deep_models_take_a_moment():
    table = Table(48, 24, 1, spread=1000)
    start = time.process_time()
    least = max(smallest_ranks(48, 24, table.choices, table.resident).rank_bytes)
    assert fastest_ranks(48, 24, table.choices, table.resident, 2 * least) is not None
    assert time.process_time() - start < 5.0


# Packets ---------------------------------------------------------------------------------------------------------


WIDTHS = (1000, 2000, 4000, 8000, 16000, 32000)
IMAGE = Layout(kind="NCHW", width=5, grid=(10, 10))


def packets(*uses: str, num_ranks: int = 4, last: bool = True) -> Packets:
    """Features of 1 kB to 32 kB over a grid of 1 by 2, four bytes a number; images of 2 kB; context is all of them."""
    return Packets(
        num_ranks=num_ranks,
        layouts=[Layout(kind="NCHW", width=width // 8, grid=(1, 2)) for width in WIDTHS],
        image=IMAGE,
        num_classes=10,
        num_images=1,
        dtype=torch.float32,
        labels=10,
        uses=uses,
        last_uses=[use for use in uses if use in ("context", "gradient") and last],
    )


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        ((), [0, 2010, 8010, 16010]),
        (("states", "branches"), [0, 2010, 8010, 16010]),
        (("images",), [0, 4010, 10_010, 16010]),
        (("previous",), [0, 4010, 10_010, 16010]),
        (("context",), [0, 4010, 18_010, 42_010]),
        (("gradient",), [0, 4010, 16010, 32010]),
        (("own",), [0, 2042, 8042, 16010]),
        (("grown",), [0, 2018, 8026, 16010]),
    ],
)
def test_a_packet_holds_what_objectives_further_on_look_at(uses, expected, monkeypatch):
    with_own(monkeypatch)
    assert [packets(*uses).into(rank, (1, 3, 4)) for rank in range(4)] == expected


def with_own(monkeypatch):
    """What somebody carries: eight numbers for each image; and two that every module adds."""
    own = Carried(name="own", shape=lambda site: (8,), begin=lambda batch, learner: batch.features)
    grown = Carried(name="grown", shape=lambda site: (2,), make=lambda handed: handed.features, grows=True)
    for each in (own, grown):
        monkeypatch.setitem(CARRIED, each.name, each)


def test_what_only_the_last_module_looks_at_travels_all_the_way():
    own = Packets(
        num_ranks=3,
        layouts=[Layout(kind="NCHW", width=width // 8, grid=(1, 2)) for width in WIDTHS],
        image=IMAGE,
        num_classes=10,
        num_images=1,
        dtype=torch.float32,
        labels=10,
        uses=(),
        last_uses=("images", "gradient"),
    )
    assert [own.into(rank, (1, 3)) for rank in range(3)] == [0, 4010, 18010]


@given(
    uses=st.sets(st.sampled_from(["images", "previous", "context", "gradient"])),
    boundaries=st.sets(st.integers(1, 4), min_size=1),
)
def test_no_packet_is_larger_than_at_most(uses, boundaries):
    edges = tuple(sorted(boundaries))
    own = packets(*uses, num_ranks=len(edges) + 1)
    for rank in range(len(edges) + 1):
        start = edges[rank - 1] if rank else 0
        assert own.into(rank, edges) <= own.at_most_into(rank, start)
        if not uses & {"previous", "context"}:
            assert own.into(rank, edges) == own.at_most_into(rank, start)
