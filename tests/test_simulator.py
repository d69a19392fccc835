"""The simulator: small cases by hand, closed forms of the literature, and what must hold for any times."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.simulation import shared_cores
from research.simulation.simulator import (
    FREE,
    Cluster,
    Link,
    Module,
    Outcome,
    data_parallel,
    gpipe,
    joined,
    local_modules,
    one_forward_one_backward,
)

PIPELINES: dict[str, Callable[..., Outcome]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
SECONDS = st.integers(1, 20).map(float)
MODULES = st.lists(
    st.builds(
        Module,
        forward=SECONDS,
        backward=SECONDS,
        update=st.integers(0, 5).map(float),
        sent_bytes=st.integers(0, 100),
        gradient_bytes=st.integers(0, 100),
        num_blocks=st.integers(1, 4),
    ),
    min_size=1,
    max_size=6,
)


def every(modules: list[Module], steps: int, cluster: Cluster, replicas: int = 1) -> dict[str, Outcome]:
    return {
        "local": local_modules(modules, steps, cluster, replicas=replicas),
        "gpipe": gpipe(modules, steps, cluster, microbatches=4, replicas=replicas),
        "1f1b": one_forward_one_backward(modules, steps, cluster, microbatches=4, replicas=replicas),
        "data": data_parallel(joined(modules), steps, cluster, replicas=replicas),
    }


def cluster_of(bandwidth: float, latency: float = 0.0) -> Cluster:
    return Cluster(within=Link(bandwidth, latency), between=Link(bandwidth, latency))


# By hand ---------------------------------------------------------------------------------------------------------


def test_two_ranks_by_hand():
    """Rank 0: F 0-2, B 2-5, F 5-7. A packet of 10 bytes takes 1 s and arrives 0.5 s later: at 3.5, 8.5, 13.5."""
    modules = [Module(forward=2, backward=3, sent_bytes=10), Module(forward=1, backward=2, update=1)]
    found = local_modules(modules, 3, cluster_of(10, 0.5))
    assert found.makespan == 13.5 + 4
    assert found.period == 5
    assert found.idle == pytest.approx((1 - 15 / 17.5, 1 - 12 / 17.5))
    assert found.throughput == pytest.approx(3 / 17.5)


def test_a_slow_receiver_holds_the_sender_back():
    """Rank 1 starts at 1, 11, 21, 31; rank 0 is ahead of it, and waits until the only buffer is free."""
    modules = [Module(forward=1, backward=1, sent_bytes=1), Module(forward=5, backward=5)]
    found = local_modules(modules, 4, num_buffers=1)
    assert found.makespan == 41
    assert found.period == 10
    # On a wire that takes a second, rank 1 starts at 2; the next packet comes when its buffer is free: 13, 24, 35.
    assert local_modules(modules, 4, cluster_of(1.0), num_buffers=1).makespan == 45


def test_a_slow_wire_sets_the_speed():
    modules = [Module(forward=1, backward=1, sent_bytes=70), Module(forward=1, backward=1)]
    found = local_modules(modules, 20, cluster_of(10))
    assert found.period == 7
    assert found.makespan == 1 + 20 * 7 + 2


def test_pipelines_by_hand():
    """Two ranks, two microbatches of F 1 and B 2 each: F F . B . B on rank 0, F B F B on rank 1."""
    modules = [Module(forward=2, backward=4, sent_bytes=2)] * 2
    assert one_forward_one_backward(modules, 1, microbatches=2).makespan == 9
    assert gpipe(modules, 1, microbatches=2).makespan == 9
    # Half a second each way for each microbatch: rank 1 F 1.5-2.5 B 2.5-4.5 F 4.5-5.5 B 5.5-7.5; rank 0 B 8-10.
    assert one_forward_one_backward(modules, 1, cluster_of(2), microbatches=2).makespan == 10
    # Rank 1: F 1.5-2.5, F 2.5-3.5, B 3.5-5.5, B 5.5-7.5; rank 0: B 6-8, B 8-10.
    assert gpipe(modules, 1, cluster_of(2), microbatches=2).makespan == 10


def test_an_all_reduce_follows_the_backward_pass():
    """Four ranks, 8 bytes, 1 byte a second: 2 * 3 / 4 * 8 = 12 s."""
    cluster = cluster_of(1.0)
    assert cluster.ring(8, 4) == 12
    assert cluster.ring(8, 1) == 0
    assert cluster_of(1.0, 0.5).ring(8, 4) == 12 + 6 * 0.5
    whole = Module(forward=1, backward=3, update=1, gradient_bytes=8)
    assert data_parallel(whole, 1, cluster, replicas=4).makespan == 1 + 3 + 12 + 1
    # In four blocks of 3 s each, the first one's ready after 0.75 s.
    blocks = Module(forward=1, backward=3, update=1, gradient_bytes=8, num_blocks=4)
    assert data_parallel(blocks, 1, cluster, replicas=4).makespan == 1 + 0.75 + 12 + 1
    quick = data_parallel(blocks, 1, cluster_of(12.0), replicas=4)
    assert quick.makespan == 1 + 3 + 0.25 + 1, "only the last block's is seen"
    assert quick.batches == 4


def test_nodes_have_slower_links_between_them():
    cluster = Cluster(within=Link(100), between=Link(1), ranks_per_node=2)
    assert [link.bandwidth for link in cluster.links(5)] == [100, 1, 100, 1]
    assert cluster.ring(4, 2) == 4 / 100
    assert cluster.ring(4, 2, stride=2) == 4
    assert cluster.ring(4, 4) == 6


# Closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 3, 4, 16])
def test_the_bubble_of_equal_stages_is_that_of_the_papers(name: str, num_ranks: int, microbatches: int) -> None:
    modules = [Module(forward=1, backward=2)] * num_ranks
    for steps in (1, 5):
        found = PIPELINES[name](modules, steps, microbatches=microbatches)
        bubble = (num_ranks - 1) / (microbatches + num_ranks - 1)
        assert found.idle == pytest.approx([bubble] * num_ranks)


@given(modules=MODULES, steps=st.integers(1, 8))
def test_one_rank_takes_the_sum_of_its_times(modules: list[Module], steps: int) -> None:
    alone = joined(modules)
    for found in every([alone], steps, cluster_of(1.0)).values():
        assert found.makespan == pytest.approx(steps * alone.seconds)
        assert found.idle == pytest.approx((0.0,))
        assert found.period == pytest.approx(alone.seconds)


@given(modules=MODULES, buffers=st.integers(1, 3))
def test_the_slowest_rank_sets_the_speed_where_the_wire_is_fast(modules: list[Module], buffers: int) -> None:
    found = local_modules(modules, 200, num_buffers=buffers)
    slowest = max(module.seconds for module in modules)
    assert found.steady_throughput == pytest.approx(1 / slowest)
    fill = sum(module.forward for module in modules)
    assert found.makespan <= 200 * slowest + fill + max(m.backward + m.update for m in modules) + 1e-6
    assert min(found.idle) < 0.2


# Shared cores ----------------------------------------------------------------------------------------------------


def test_local_modules_that_share_a_core_by_hand():
    """Rank 0: F 0-1, then at half speed B U 1-5. Rank 1: at half speed F 1-3, B 3-4, U 4-5, and the rest of U 5-5.5."""
    modules = [Module(forward=1, backward=1, update=1), Module(forward=1, backward=0.5, update=1)]
    found = shared_cores.local_modules(modules, 1, [0, 0])
    assert found.makespan == 5.5
    assert found.idle == pytest.approx((1 - 3 / 5.5, 1 - 2.5 / 5.5))
    long = shared_cores.local_modules(modules, 200, ["a", "a"])
    assert long.makespan == pytest.approx(200 * 5.5)
    assert long.steady_throughput == pytest.approx(1 / 5.5)


def test_a_rank_that_waits_leaves_its_core_to_the_other():
    """Rank 1 has a core: F 1-5, B 5-6, F 6-10, B 10-11. Ranks 0 and 2 share one.

    Rank 0: F 0-1, B 1-3, F 3-4, B 4-7, at half speed from 5. Rank 2: F 5-7 at half speed, B 7-8, F 10-11, B 11-12.
    """
    modules = [Module(forward=1, backward=2), Module(forward=4, backward=1), Module(forward=1, backward=1)]
    assert shared_cores.local_modules(modules, 2, [0, 1, 0]).makespan == 12
    assert shared_cores.local_modules(modules, 1, [0, 1, 0]).makespan == 7


def test_a_rank_that_is_held_back_works_later_and_slows_others_then():
    """Rank 2 has work from 6 on, 12 s a batch. With one buffer, rank 0's third B waits for rank 1's first, until 11."""
    modules = [Module(forward=1, backward=1), Module(forward=5, backward=5), Module(forward=2, backward=10)]
    assert shared_cores.local_modules(modules, 3, [0, 1, 0], num_buffers=1).makespan == 6 + 3 * 12 + 1
    assert shared_cores.local_modules(modules, 3, [0, 1, 0], num_buffers=2).makespan == 6 + 3 * 12


def test_pipelines_that_share_a_core_by_hand():
    """Two ranks on one core: what either does, the core is never idle, so a batch takes the sum of all work."""
    modules = [Module(forward=2, backward=4, update=1), Module(forward=4, backward=2, update=3)]
    for pipeline in (shared_cores.gpipe, shared_cores.one_forward_one_backward):
        found = pipeline(modules, 5, [0, 0], microbatches=2)
        assert found.makespan == pytest.approx(5 * 16)
        assert found.period == pytest.approx(16)


def test_four_stages_on_two_cores_by_hand():
    """With one microbatch each stage waits for another, so that nothing but updates can be slowed down."""
    modules = [Module(forward=1, backward=2)] * 4
    found = shared_cores.one_forward_one_backward(modules, 3, [0, 0, 1, 1], microbatches=1)
    assert (found.makespan, found.period) == (3 * 12, 12)
    # Rank 3: B 4-6, U 6-8 at half speed. Rank 2: B 6-9, at half speed until 8. Rank 1: B 9-11, U 11-13 at half speed.
    # Rank 0: B 11-14, U 14-15.
    modules = [Module(forward=1, backward=2, update=1)] * 4
    found = shared_cores.one_forward_one_backward(modules, 3, [0, 0, 1, 1], microbatches=1)
    assert (found.makespan, found.period) == (3 * 15, 15)


RANKS_ON_CORES = MODULES.flatmap(
    lambda modules: st.tuples(
        st.just(modules), st.lists(st.integers(0, 3), min_size=len(modules), max_size=len(modules)).map(sorted)
    )
)
COUNTS = {"steps": st.integers(1, 12), "num_buffers": st.integers(1, 3), "microbatches": st.integers(1, 6)}


def on_cores(
    modules: list[Module], cores: list[int], steps: int, num_buffers: int, microbatches: int
) -> dict[str, Outcome]:
    return {
        "local": shared_cores.local_modules(modules, steps, cores, num_buffers=num_buffers),
        "gpipe": shared_cores.gpipe(modules, steps, cores, microbatches=microbatches),
        "1f1b": shared_cores.one_forward_one_backward(modules, steps, cores, microbatches=microbatches),
    }


def on_own(modules: list[Module], steps: int, num_buffers: int, microbatches: int) -> dict[str, Outcome]:
    return {
        "local": local_modules(modules, steps, num_buffers=num_buffers),
        "gpipe": gpipe(modules, steps, microbatches=microbatches),
        "1f1b": one_forward_one_backward(modules, steps, microbatches=microbatches),
    }


@given(modules=MODULES, **COUNTS)
def test_with_a_core_for_each_rank_it_is_the_exact_simulation(
    modules: list[Module], steps: int, num_buffers: int, microbatches: int
) -> None:
    counts = {"num_buffers": num_buffers, "microbatches": microbatches}
    found = on_cores(modules, list(range(len(modules))), steps, **counts)
    for name, expected in on_own(modules, steps, **counts).items():
        assert found[name].makespan == pytest.approx(expected.makespan)
        assert found[name].idle == pytest.approx(expected.idle)
        assert found[name].batches == expected.batches


@pytest.mark.heavy
@settings(max_examples=30)
@given(modules=MODULES, num_buffers=COUNTS["num_buffers"], microbatches=COUNTS["microbatches"])
def test_with_a_core_for_each_rank_it_runs_as_evenly(
    modules: list[Module], num_buffers: int, microbatches: int
) -> None:
    counts = {"num_buffers": num_buffers, "microbatches": microbatches}
    found = on_cores(modules, list(range(len(modules))), 60, **counts)
    for name, expected in on_own(modules, 60, **counts).items():
        assert found[name].period == pytest.approx(expected.period)


@pytest.mark.heavy
@given(ranks=RANKS_ON_CORES, **COUNTS)
def test_shared_cores_are_between_all_work_on_one_core_and_what_each_must_do(
    ranks: tuple[list[Module], list[int]], steps: int, num_buffers: int, microbatches: int
) -> None:
    modules, cores = ranks
    counts = {"num_buffers": num_buffers, "microbatches": microbatches}
    together = [
        joined([module for module, its in zip(modules, cores, strict=True) if its == core])
        for core in sorted(set(cores))
    ]
    # A core's ranks as one rank, which is never held up: it has done what they must before they can send anything. Not
    # of 1F1B, whose order isn't the best for all times: more stages, so more microbatches ahead, may be quicker.
    bounds = on_own(together, steps, steps, microbatches)
    busiest = steps * max(one.seconds for one in together)
    alone = on_own(modules, steps, **counts)
    for name, found in on_cores(modules, cores, steps, **counts).items():
        least = max(busiest, alone[name].makespan, bounds[name].makespan if name != "1f1b" else 0.0)
        assert least * (1 - 1e-9) <= found.makespan <= steps * joined(modules).seconds * (1 + 1e-9)
        assert all(0 <= idle <= 1 for idle in found.idle)


@pytest.mark.heavy
@given(modules=MODULES, **COUNTS)
def test_one_core_is_never_idle(modules: list[Module], steps: int, num_buffers: int, microbatches: int) -> None:
    for found in on_cores(modules, [0] * len(modules), steps, num_buffers, microbatches).values():
        assert found.makespan == pytest.approx(steps * joined(modules).seconds)


@settings(max_examples=30)
@given(ranks=RANKS_ON_CORES)
def test_the_busiest_core_sets_the_speed_of_local_modules(ranks: tuple[list[Module], list[int]]) -> None:
    modules, cores = ranks
    works = [
        sum(module.seconds for module, its in zip(modules, cores, strict=True) if its == core) for core in set(cores)
    ]
    found = shared_cores.local_modules(modules, 200, cores)
    assert max(works) * (1 - 1e-9) <= found.period <= max(works) * 1.05  # while ranks still get ahead of each other


def test_cores_are_named_for_each_rank():
    with pytest.raises(ValueError, match=r"2 ranks need as many cores' names, got 1\."):
        shared_cores.local_modules([Module(forward=1, backward=1)] * 2, 1, [0])
    with pytest.raises(ValueError, match="microbatches must be at least 1"):
        shared_cores.gpipe([Module(forward=1, backward=1)], 1, [0], microbatches=0)
    with pytest.raises(ValueError, match="num_buffers must be at least 1"):
        shared_cores.local_modules([Module(forward=1, backward=1)], 1, [0], num_buffers=0)


# For any times ---------------------------------------------------------------------------------------------------


@given(modules=MODULES, steps=st.integers(1, 8), bandwidth=st.floats(0.5, 1000), faster=st.floats(1, 10))
def test_a_faster_wire_is_never_slower(modules: list[Module], steps: int, bandwidth: float, faster: float) -> None:
    slow = every(modules, steps, cluster_of(bandwidth, 0.5), replicas=3)
    fast = every(modules, steps, cluster_of(bandwidth * faster, 0.5 / faster), replicas=3)
    for name, found in fast.items():
        assert found.makespan <= slow[name].makespan * (1 + 1e-9)


@given(modules=MODULES, steps=st.integers(1, 12), bandwidth=st.floats(0.5, 1000))
def test_more_buffers_are_never_slower_and_no_rank_is_beyond_its_work(
    modules: list[Module], steps: int, bandwidth: float
) -> None:
    spans = []
    for count in (1, 2, 3):
        found = local_modules(modules, steps, cluster_of(bandwidth, 0.1), num_buffers=count)
        spans.append(found.makespan)
        assert found.makespan >= steps * max(module.seconds for module in modules) - 1e-9
        assert all(0 <= idle <= 1 for idle in found.idle)
    assert spans == sorted(spans, reverse=True)


@given(modules=MODULES, bandwidth=st.floats(0.5, 1000), microbatches=st.integers(1, 6))
def test_batches_that_repeat_are_not_played_again(modules: list[Module], bandwidth: float, microbatches: int) -> None:
    """Twelve batches in one go are what they are one by one: with the shortcut and far beyond it."""
    cluster = cluster_of(bandwidth, 0.1)
    for pipeline in PIPELINES.values():
        spans = [pipeline(modules, steps, cluster, microbatches=microbatches).makespan for steps in (10, 11, 12)]
        assert spans[2] - spans[1] == pytest.approx(spans[1] - spans[0])
        assert spans[2] >= 12 * max(module.seconds for module in modules) - 1e-6


@given(modules=MODULES)
def test_no_pipeline_with_a_flush_beats_local_modules_once_they_run_evenly(modules: list[Module]) -> None:
    """Microbatches fill a pipeline sooner, so the first batches may."""
    found = every(modules, 50, Cluster())
    assert found["local"].period <= min(found["1f1b"].period, found["gpipe"].period) + 1e-9


def test_sixty_four_ranks_on_a_thousand_nodes_take_a_moment():
    modules = [Module(forward=1.0, backward=2.0 + rank % 3, sent_bytes=10, gradient_bytes=50) for rank in range(64)]
    cluster = Cluster(within=Link(300), between=Link(25, 1e-5), ranks_per_node=64)
    start = time.process_time()
    found = every(modules, 200, cluster, replicas=1000)
    assert time.process_time() - start < 1.0
    assert found["local"].batches == 200 * 1000
    assert found["local"].steady_throughput > found["1f1b"].steady_throughput


@pytest.mark.parametrize("name", ["modules", "steps", "replicas", "num_buffers"])
def test_nothing_to_simulate_is_refused(name: str) -> None:
    settings = {"modules": [Module(forward=1, backward=1)], "steps": 1} | {"modules": {"modules": []}}.get(name, {})
    settings |= {} if name == "modules" else {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        local_modules(**settings)


def test_links_that_are_none_are_refused():
    with pytest.raises(ValueError, match="positive bandwidth"):
        Link(0)
    with pytest.raises(ValueError, match="no negative latency"):
        Link(1, -1)
    assert FREE.seconds(1e12) == 0
    with pytest.raises(ValueError, match="microbatches must be at least 1"):
        gpipe([Module(forward=1, backward=1)], 1, microbatches=0)
