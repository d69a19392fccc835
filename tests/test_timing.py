"""Times of a model's parts by the clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import localgrad
from helpers import MICRO_TOML, SIZE, Cli, assert_refused, make
from localgrad.app.planning import adamw
from localgrad.backbones.base import outline
from localgrad.errors import DeviceError
from localgrad.memory import timing
from localgrad.memory.costs import Costs, CostSettings, with_times
from localgrad.memory.parts import measure_costs
from localgrad.memory.timing import Calibration, measure_times
from localgrad.planning import budget

pytestmark = pytest.mark.usefixtures("cost_cache")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def read() -> tuple[Costs, Calibration]:
    """Costs of 32 images by shapes, and times of 4 by the clock."""
    backbone, objective = outline(make(depth=2), SIZE), localgrad.FeatureReconstruction()
    costs = measure_costs(backbone, objective, adamw, CostSettings(batch_size=32))
    return costs, measure_times(backbone, objective, adamw, CostSettings(batch_size=4), CPU)


def test_every_part_has_a_time_for_as_many_images_as_are_planned(read: tuple[Costs, Calibration]) -> None:
    costs, calibration = read
    timed = with_times(costs, calibration.costs)
    for ways in (timed.parts, timed.leading):
        for way in ways:
            for part, plain in zip(way, ways[0], strict=True):
                assert part.forward_ns > 0
                assert part.backward_ns > 0
                assert part.forward_ns + part.backward_ns >= plain.forward_ns + plain.backward_ns
    assert timed.parts[0][1].forward_ns == 8 * calibration.costs.parts[0][1].forward_ns
    assert all(head.cost.forward_ns > 0 for head in timed.heads)
    assert all(nanoseconds > 0 for nanoseconds in timed.update_ns), "once a step, however many images"
    assert timed.update_ns == calibration.costs.update_ns


def test_bytes_stay_those_of_shapes(read: tuple[Costs, Calibration]) -> None:
    costs, calibration = read
    timed = with_times(costs, calibration.costs)
    for start, stop in ((0, 1), (0, 2), (1, 2)):
        for choice in costs.choices(start, stop):
            assert timed.choice(start, stop, choice.how).peak_bytes == choice.peak_bytes


def test_a_modules_time_is_its_parts_and_their_update(read: tuple[Costs, Calibration]) -> None:
    timed = with_times(*[read[0], read[1].costs])
    own, head = timed.parts[0], timed.head(0, 2)
    passes = sum(part.forward_ns + part.backward_ns for part in (timed.leading[0][0], *own[1:], head.cost))
    assert timed.choices(0, 2)[0].nanoseconds == passes + sum(timed.update_ns) + head.update_ns


def test_the_whole_model_tells_how_far_parts_add_up(read: tuple[Costs, Calibration]) -> None:
    assert -0.9 < read[1].error < 9, "a busy machine's, too"
    assert "4 images" in read[1].note
    assert Calibration.from_dict(read[1].to_dict()) == read[1]


def test_timing_leaves_the_model_and_the_random_state_as_they_were() -> None:
    backbone = localgrad.split(make(depth=1).eval(), SIZE)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    measure_times(backbone, localgrad.GreedySupervised(), adamw, CostSettings(batch_size=2), CPU)
    assert torch.equal(state, torch.get_rng_state())
    assert not backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


@pytest.mark.heavy
def test_a_plan_by_the_clock_says_so_and_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        budget, "measure_times", lambda *args, **more: calls.append(args) or measure_times(*args, **more)
    )
    monkeypatch.setitem(timing.IMAGES, "cpu", 2)
    model = make(depth=1)
    plans = [localgrad.plan(model, batch_size=4, input_size=SIZE, measure=True) for _ in range(2)]
    for plan in plans:
        assert plan.forecast is not None
        assert any(note.startswith("times measured on ") for note in plan.forecast.notes)
    assert len(calls) == 1
    nominal = localgrad.plan(model, batch_size=4, input_size=SIZE).forecast
    assert nominal is not None
    assert nominal.peak_bytes == plans[0].forecast.peak_bytes  # type: ignore[union-attr]
    assert not any("times measured" in note for note in nominal.notes)


def test_what_isnt_here_cannot_be_timed(cli_: Cli, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(DeviceError, match="measure=True: there is no CUDA device here"):
        localgrad.plan(make(depth=1), batch_size=4, input_size=SIZE, device="cuda", measure=True)
    (tmp_path / "micro.toml").write_text(MICRO_TOML)
    said = cli_("plan", "--recipe", str(tmp_path / "micro.toml"), "--device", "cuda", "--measure")
    assert_refused(said, "--measure: there is no CUDA device here; take --device cpu, or leave it out.")
