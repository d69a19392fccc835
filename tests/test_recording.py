"""`localgrad.estimating.record_run`: what a run asks of a CUDA card's allocator, in order, without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers import adamw, make
from localgrad import LocalLearner
from localgrad.backbones.fake import FakeTensorMode
from localgrad.estimating import record_run
from localgrad.memory.allocator import CachingAllocator, replay
from localgrad.memory.cards import card_named
from localgrad.memory.recording import Recorder, Trace
from localgrad.memory.temporaries import workspace_bytes
from localgrad.memory.track import Tracker, autocast_of

H200 = card_named("H200")


def learner_of(**more: Any) -> LocalLearner:
    return LocalLearner(make(), modules=2, **more)


def record(learner: LocalLearner, **more: Any) -> Trace:
    return record_run(learner, 4, adamw, H200, **{"steps": 2, **more})


def sizes(trace: Trace, *, stream: int | None = None) -> list[int]:
    return [event[1] for event in trace.events if event[1] > 0 and (stream is None or event[2:] == (stream,)[:stream])]


def held_at_most(trace: Trace) -> int:
    """The most bytes at once; each block is taken once, and none is given back that wasn't."""
    held: dict[int, int] = {}
    now = most = 0
    for number, nbytes, *_ in trace.events:
        if nbytes > 0:
            assert number not in held, "a block is taken once"
            held[number] = nbytes
            now += nbytes
            most = max(most, now)
        else:
            now -= held.pop(number)
    return most


def test_every_block_is_taken_once_and_what_is_given_back_was_taken() -> None:
    trace = record(learner_of(), evaluation_batch=8, last_batch=2)
    assert held_at_most(trace) > 0
    assert [mark.label for mark in trace.marks] == [
        "weights",
        "step 1",
        "step 2",
        "last batch",
        "evaluation",
        "step after evaluation",
    ]
    indices = [mark.index for mark in trace.marks]
    assert indices == sorted(indices)
    assert trace.label_at(indices[3]) == "last batch"


@pytest.mark.heavy
def test_the_learner_is_left_alone_and_two_records_are_the_same() -> None:
    learner = learner_of()
    before = {name: weight.clone() for name, weight in learner.model.named_parameters()}
    first, second = record(learner), record(learner)
    assert first.events == second.events
    assert learner._executor is None
    assert all(torch.equal(weight, before[name]) for name, weight in learner.model.named_parameters())


def test_weights_come_first_in_the_order_in_which_they_are_moved() -> None:
    learner = learner_of()
    trace = record(learner, steps=1)
    first = [event[1] for event in trace.events[: trace.marks[1].index]]
    moved: list[int] = []
    learner.model._apply(lambda tensor: moved.append(tensor.nbytes) or tensor)
    assert first[: len(moved)] == moved


def test_whole_steps_repeat_and_give_all_back() -> None:
    trace = record(learner_of(), steps=4)
    starts = [mark.index for mark in trace.marks[1:]]
    third, fourth = trace.events[starts[2] : starts[3]], trace.events[starts[3] :]
    taken = [sorted(nbytes for _, nbytes, *_ in part if nbytes > 0) for part in (third, fourth)]
    assert taken[0] == taken[1]


def test_two_threads_multiply_and_each_takes_a_workspace_for_good() -> None:
    for name in ("H200", "T4"):
        card = card_named(name)
        trace = record_run(learner_of(), 4, adamw, card, steps=2)
        workspaces = [event[0] for event in trace.events if event[1] == workspace_bytes(card)]
        assert len(workspaces) == 2
        assert not [event for event in trace.events if event[0] in workspaces and event[1] < 0]


@pytest.mark.heavy
def test_an_average_and_evaluation_take_more() -> None:
    plain = record(learner_of())
    averaged = record(learner_of(ema_decay=0.9))
    learner = learner_of()
    weights = sum(weight.nbytes for weight in learner.model.parameters())
    assert held_at_most(averaged) - held_at_most(plain) >= weights
    large = record(learner_of(), evaluation_batch=256)
    assert held_at_most(large) > held_at_most(plain)


@pytest.mark.heavy
def test_waiting_modules_are_on_the_side_stream_and_not_there_all_at_once() -> None:
    learner = LocalLearner(make(), modules=3, offload=True)
    trace = record(learner)
    assert trace.marks[1].index == 0, "nothing is on the card before the first step"
    assert sizes(trace, stream=1)
    assert held_at_most(trace) < held_at_most(record(LocalLearner(make(), modules=3)))


def test_counters_of_steps_stay_on_the_processor() -> None:
    trace = record(learner_of(), steps=1)
    number = sum(1 for _ in learner_of().parameters(0))
    assert sizes(trace).count(4) < number


@pytest.mark.heavy
def test_end_to_end_steps_hold_all_gradients() -> None:
    learner = learner_of()
    assert held_at_most(record(learner, globally=True)) != held_at_most(record(learner))
    mixed = record(learner, globally=[False, True])
    assert mixed.marks[-1].label == "step 2"


def tracked(run: Any) -> list[tuple[int, int]]:
    """The events of a call on fake tensors."""
    recorder = Recorder(H200)
    with FakeTensorMode(), autocast_of("cuda", H200), Tracker(1, recorder):
        run()
    return [(event[0], event[1]) for event in recorder.trace.events]


def test_autograd_sums_gradients_in_place() -> None:
    def twice() -> None:
        x = torch.empty(1000, 10, requires_grad=True)
        middle = x * 2.0
        (middle.sin() + middle.cos()).backward(torch.empty(1000, 10))

    forward, of_sine, of_cosine, of_middle = 5 + 1, 2, 3, 1  # with the gradient that it starts from
    assert [nbytes for _, nbytes in tracked(twice)].count(40_000) == forward + of_sine + of_cosine + of_middle


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_joining_tensors_of_two_types_casts_none_of_them(join: Any) -> None:
    def joined() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            join([torch.empty(100, 10), torch.empty(100, 10, dtype=torch.bfloat16)])

    assert [nbytes for _, nbytes in tracked(joined) if nbytes > 0] == [4000, 2000, 8000]


def test_fused_attention_is_the_cards_own() -> None:
    class Attends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attended: torch.Tensor = nn.functional.scaled_dot_product_attention(x, x, x)
            return attended

    def run(dtype: torch.dtype) -> list[int]:
        return [n for _, n in tracked(lambda: Attends()(torch.empty(2, 3, 49, 32, dtype=dtype))) if n > 0]

    half, full = run(torch.bfloat16), run(torch.float32)
    assert half == [2 * 3 * 49 * 32 * 2, 2 * 3 * 49 * 32 * 2, 2 * 3 * 49 * 4, 16, 8]
    assert full[1:3] == [8, 8], "the state of random numbers comes first"


def test_a_trace_is_replayed() -> None:
    trace = record(learner_of())
    done = replay(trace.events, CachingAllocator())
    assert done.fits
    assert done.reserved_bytes >= done.allocated_bytes >= held_at_most(trace)
