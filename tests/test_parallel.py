"""Several real processes train what one process trains, bit for bit; the schedule needs none to be tested."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import assert_same, place_in
from libraries import parted, tokens
from localgrad import GreedySupervised, ParallelLearner, Team
from localgrad.backbones.base import split
from localgrad.errors import ParallelError
from localgrad.parallel import schedule
from localgrad.parallel.schedule import Action, actions, shares
from parallel_worker import BY_ROWS, ESTIMATED, LANGUAGE, MORE_BY_ROWS, SCENARIOS, WATCHED, Scenario, data, train
from ranks import Ranks
from research.simulation.timetable import program, timetable

# ------------------------------------------------------------------------------------------------ the schedule


def test_the_timetable_is_the_one_that_the_source_draws() -> None:
    def drawn(row: list[tuple[Action, ...]]) -> str:
        letters = {"forward": "F", "send": "S", "update": "U", "expect": "r"}
        return " | ".join("".join(f"{letters[a.kind]}{a.batch}" for a in now if a.kind in letters) for now in row)

    rows = [drawn(row) for row in timetable(3, 4)]
    assert rows == [
        "F0S0U0 | F1S1U1 | F2S2U2 | F3S3U3 |  | ",
        "r0r1 | F0S0U0 | r2F1S1U1 | r3F2S2U2 | F3S3U3 | ",
        "r0r1 |  | F0U0 | r2F1U1 | r3F2U2 | F3U3",
    ]
    assert "F0 S0 U0 F1 S1 U1" in str(schedule.__doc__)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4))
def test_every_batch_goes_through_every_rank_once_in_order_and_without_a_bubble(
    ranks: int, batches: int, buffers: int
) -> None:
    table = timetable(ranks, batches, buffers)
    for rank, row in enumerate(table):
        done = [(time, action.batch) for time, now in enumerate(row) for action in now if action.kind == "update"]
        if buffers > 1 or ranks == 1:
            assert done == [(rank + batch, batch) for batch in range(batches)]  # no wait but the first ``rank`` steps
        assert [batch for _, batch in done] == list(range(batches))


@given(st.integers(2, 6), st.integers(1, 9), st.integers(1, 4))
def test_sends_and_receives_match_and_room_is_bounded(ranks: int, batches: int, buffers: int) -> None:
    for rank in range(ranks):
        listed = program(rank, num_ranks=ranks, num_batches=batches, num_buffers=buffers)
        order = {
            kind: [action.batch for action in listed if action.kind == kind] for kind in ("expect", "receive", "send")
        }
        assert order["expect"] == order["receive"] == ([] if rank == 0 else list(range(batches)))
        assert order["send"] == ([] if rank == ranks - 1 else list(range(batches)))
        waiting = pending = 0
        for kind, _ in listed:
            waiting += (kind == "expect") - (kind == "update" and rank > 0)
            pending += (kind == "send") - (kind == "settle")
            assert waiting <= buffers
            assert pending <= buffers
        kinds = [kind for kind, _ in listed]
        if rank < ranks - 1:
            assert all(
                kinds[i + 1] == "update" for i, kind in enumerate(kinds) if kind == "send"
            )  # before the backward


@given(st.integers(2, 5), st.integers(2, 12), st.integers(1, 3), st.data())
def test_a_phase_that_ends_early_leaves_nothing_asked_for(ranks: int, batches: int, buffers: int, draw: Any) -> None:
    """Rank 0 shortens the phase while it works on a batch; the others hear of it with that batch's packet."""
    told = draw.draw(st.integers(0, batches - 1))
    end = min(batches - 1, told + buffers)
    for rank in range(ranks):
        asked = []
        last = batches - 1
        batch = 0
        while batch <= last:
            known = last  # asked for before the packet is read
            asked += [
                a.batch
                for a in actions(batch, rank=rank, num_ranks=ranks, first=0, last=known, num_buffers=buffers)
                if a.kind == "expect"
            ]
            if batch >= told:
                last = end
            batch += 1
        assert batch == end + 1
        assert asked == ([] if rank == 0 else list(range(end + 1)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_shares_are_runs_of_modules(costs: list[int], draw: Any) -> None:
    ranks = draw.draw(st.integers(1, len(costs)))
    found = shares(costs, ranks)
    assert [index for share in found for index in share] == list(range(len(costs)))
    assert all(len(share) for share in found)


# --------------------------------------------------------------------------------------------- real processes


def results_of(ranks: Ranks, size: int, names: list[str], folder: Path, *, replicas: int = 1) -> dict[str, Any]:
    watched = dict.fromkeys(SCENARIOS[name].kind for name in names if name in WATCHED)
    ended = ranks.run([folder, replicas, *names], size=size, call="parallel_worker:main", split=list(watched))
    assert set(ended.codes) == {0}, ended
    return {name: torch.load(folder / f"{name}.pt") for name in names}


@cache
def alone(name: str) -> tuple[Any, list[list[float]]]:
    """A learner in one process that has trained, and its losses."""
    return train(SCENARIOS[name])


def reference(name: str) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    learner, losses = alone(name)
    return (learner.averaged_model or learner.model).state_dict(), losses


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return list(weights) == list(others) and all(torch.equal(weights[name], others[name]) for name in weights)


BY_RANKS = {
    2: ["two", "three", "batch norms", "image", "remedies", "bf16", "own", "by hand"],
    3: ["four", "contrastive", "reconcile"],
    4: ["plain", "greedy", "remedies", "reconcile, frozen"],
}
BY_RANKS[2] += ["language", "language, lopt"]
MORE_BY_RANKS = {
    2: ["four", "torchvision", "timm", "open_clip"],
    3: ["three", "remedies", "transformers", "language"],
    4: ["four", "reconcile", "language, segprop"],
}


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, ["four"]),
        *(pytest.param(*each, marks=pytest.mark.heavy) for each in (*BY_RANKS.items(), *MORE_BY_RANKS.items())),
    ],
)
def test_processes_train_what_one_process_trains_bit_for_bit(
    size: int, names: list[str], ranks: Ranks, tmp_path: Path
) -> None:
    found = results_of(ranks, size, names, tmp_path)
    for name, result in found.items():
        weights, losses = reference(name)
        assert same(result["weights"], weights), name
        by_rank = [said["losses"] for said in result["said"]]
        assert [[loss for rank in by_rank for loss in rank[step]] for step in range(len(losses))] == losses, name
        assert [index for said in result["said"] for index in said["own"]] == list(range(SCENARIOS[name].modules))
        whole = sum(value.nbytes for value in weights.values())
        assert max(said["alive"] for said in result["said"]) < whole, name  # a rank keeps its own modules' weights
        assert all(said["sent"] > 0 for said in result["said"][:-1])
        if name in WATCHED:
            check_watched(name, result)
        for said in result["said"]:  # a rank's estimate has nothing of the others
            if ESTIMATED.get(name) != size:
                continue
            copies = 2 if SCENARIOS[name].settings.get("ema_decay") else 1
            assert said["weights"] <= said["estimated"] <= 1.1 * copies * said["weights"], (name, said)
    narrow = found.get("image"), found.get("three")
    if all(narrow):  # the image travels too, where an objective looks at it
        assert narrow[0]["said"][0]["sent"] > narrow[1]["said"][0]["sent"]


def check_watched(name: str, result: dict[str, Any]) -> None:
    """The whole state, and what is inferred, are those of one process."""
    learner = alone(name)[0]
    assert_same(result["state"], learner.state_dict())
    inputs, _ = data(SCENARIOS[name])[0]
    learner.eval()
    expected = list(learner.logits(inputs))
    if learner.averaged_model is not None:
        expected[-1] = learner.averaged_logits(inputs)
    found = {index: logits for said in result["said"] for index, logits in said["logits"].items()}
    assert found.keys() == {index for index, logits in enumerate(expected) if logits is not None}
    assert all(torch.equal(found[index], expected[index]) for index in found)


@pytest.mark.heavy
def test_what_blocks_need_beside_features_is_never_narrowed(ranks: Ranks, tmp_path: Path) -> None:
    """Features are rounded to bf16 on the wire, and in that precision are bf16 already but for what is added up."""
    found = results_of(ranks, 2, ["language, bf16"], tmp_path)["language, bf16"]
    losses = alone("language, bf16")[1]
    got = [[loss for said in found["said"] for loss in said["losses"][step]] for step in range(len(losses))]
    assert torch.allclose(torch.tensor(got), torch.tensor(losses), rtol=0.02)


def tied(shared: str) -> dict[str, Any]:
    model = copy.deepcopy(parted(LANGUAGE)).model
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    return {"model": model, "example": tokens(0, 2), "shared": shared, "modules": 3}


def following(classifier: str, weights: str) -> dict[str, Any]:
    options = {"weights": weights}
    return {"objective": GreedySupervised(classifier=classifier, classifier_options=options)}


@pytest.mark.parametrize("classifier", ["next", "tail"])
def test_copies_of_the_last_blocks_are_trained_wherever_their_module_is(classifier: str) -> None:
    for rank in (0, 1):
        learner = ParallelLearner(parted(LANGUAGE), team=place_in(2, rank), modules=2, **following(classifier, "copy"))
        assert list(learner.own) == [rank]


@pytest.mark.parametrize(
    ("asked", "team", "words"),
    [
        (lambda: tied("last"), place_in(2), r"shared='last': .*embed_tokens\.weight is read .* of several processes"),
        (lambda: tied("average"), place_in(3), "shared='average': .* of several processes; train in one process"),
        (lambda: tied("average"), place_in(1, num_replicas=2), "that replicas average on their own"),
        (lambda: {"objective": "solo"}, place_in(2), "classifier='readout' doesn't go with parallel: the output"),
        (lambda: {"shard": True}, place_in(2, num_replicas=2), "shard: LlamaForCausalLM was split by watching it run"),
        (lambda: following("next", "ema"), place_in(2), "ema.* doesn't go with parallel"),
        (lambda: following("tail", "ema"), place_in(2), "ema.* doesn't go with parallel"),
    ],
)
def test_what_processes_cannot_share_is_refused(asked: Any, team: Team, words: str) -> None:
    settings = {"model": parted(LANGUAGE), "modules": 2, **asked()}
    with pytest.raises(ParallelError, match=words) as refused:
        ParallelLearner(team=team, **settings)
    assert "\n" not in str(refused.value)


def test_what_each_process_keeps_of_a_watched_model() -> None:
    """Its own modules' weights; shapes of all others; frozen weights wherever they are read."""
    settings = tied("last")
    settings["model"].lm_head.weight.requires_grad_(False)
    backbone = split(settings.pop("model"), example=settings.pop("example"))
    alike = backbone.model.lm_head.weight.detach().clone()
    for rank in (0, 1):
        learner = ParallelLearner(copy.deepcopy(backbone), team=place_in(2, rank), **settings)
        own = {id(tensor) for index in learner.own for tensor in learner.modules[index].parameters()}
        for name, weight in learner.model.named_parameters():
            assert weight.is_meta == (id(weight) not in own), name
        frozen = learner.model.lm_head.weight if rank else learner.model.model.embed_tokens.weight
        assert torch.equal(frozen, alike)


@pytest.mark.heavy
def test_half_the_bytes_on_the_wire_cost_little(ranks: Ranks, tmp_path: Path) -> None:
    found = results_of(ranks, 2, ["plain", "narrow wire"], tmp_path)
    weights, losses = train(Scenario(kind="vit", modules=4))[0].model.state_dict(), train(SCENARIOS["narrow wire"])[1]
    assert same(found["plain"]["weights"], reference("plain")[0])
    narrow = found["narrow wire"]
    assert not same(narrow["weights"], weights)
    got = [[loss for said in narrow["said"] for loss in said["losses"][step]] for step in range(len(losses))]
    assert torch.allclose(torch.tensor(got), torch.tensor(losses), rtol=0.02)
    assert narrow["said"][0]["sent"] < 0.6 * found["plain"]["said"][0]["sent"] + 200


GROUPS = {
    ("still", "halves"): 2,
    ("norms", "large", "lamb"): 1,
    ("still, whole", "still parts"): 2,
    ("unread", "lion", "nesterov"): 1,
    ("open_clip, still",): 2,
}
"""What is trained together, by the number of ranks of each of two replicas."""


class Replicas(dict[str, Any]):
    """What replicas train, with all weights and with rows of them; a group when one of it is asked for."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        super().__init__()
        self.ranks, self.folder = ranks, folder

    def __missing__(self, name: str) -> Any:
        group, size = next(each for each in GROUPS.items() if name.removesuffix(", rows") in each[0])
        names = [*group, *(f"{each}, rows" for each in group if each not in WATCHED)]
        self.update(results_of(self.ranks, 2 * size, names, self.folder, replicas=2))
        return self[name]


@pytest.fixture(scope="module")
def replicas(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Replicas:
    return Replicas(ranks, tmp_path_factory.mktemp("replicas"))


def heavy(*names: str) -> Iterator[Any]:
    yield from (pytest.param(name, marks=pytest.mark.heavy) for name in names)


WHOLE = ["still, whole", "still parts", "still parts, rows", "unread", "open_clip, still"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["still", "still, rows", *heavy(*WHOLE)])
def test_replicas_train_as_one_process_on_the_whole_batch(name: str, replicas: Replicas) -> None:
    """Without draws, which are each replica's own."""
    weights, _ = reference(name.removesuffix(", rows"))
    assert replicas[name]["weights"].keys() == weights.keys()
    for key, value in weights.items():
        assert torch.allclose(replicas[name]["weights"][key], value, rtol=2e-3, atol=2e-5), key


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*BY_ROWS, *heavy(*MORE_BY_ROWS)])
def test_replicas_that_keep_rows_train_as_those_that_keep_all(name: str, replicas: Replicas) -> None:
    result, other = replicas[f"{name}, rows"], replicas[name]
    for key, value in other["weights"].items():
        assert torch.allclose(result["weights"][key], value, rtol=2e-3, atol=2e-5), key
    for rows, all_ in zip(result["said"], other["said"], strict=True):
        assert rows["alive"] < 0.65 * all_["alive"]
    own, whole = ([said["estimated"] for said in each["said"] if said["estimated"]] for each in (result, other))
    assert len(own) == len(whole) == ESTIMATED.get(name, 0)
    assert all(less < 0.65 * all_ for less, all_ in zip(own, whole, strict=True))
    if name == "large":  # gloo lets go of a gathered buffer when it comes to it
        (said,) = (said for said in result["said"] if said["peaks"])
        estimate, measured = said["peaks"]
        assert abs(estimate - measured) < 0.6 * said["weights"], said
