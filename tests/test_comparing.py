"""``localgrad compare``: turns and ratios on a fake clock, the Pareto front, files, the verb, and what goes wrong."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import SIZE, Cli, make
from localgrad import Plan, RecipeError, rules, split
from localgrad.app.comparison import Settings
from localgrad.compare import contenders, plots
from localgrad.compare import side_by_side as comparing
from localgrad.compare import verb as bench
from localgrad.compare.contenders import Contender, Local, PlainLoop, Runner, Stage, default_methods
from localgrad.compare.side_by_side import Comparison, Row, compare, envelope, pareto_front, rotated, summarise
from localgrad.errors import MemoryExceeded
from localgrad.objectives.carried import LocalBatch

CPU = torch.device("cpu")
IMAGES, LABELS = torch.zeros(4, 3, 32, 32), torch.arange(4) % 5


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(split(make("vit"), SIZE), sgd, 4, CPU)


class Clock:
    """Time that only steps take; it drifts, as a busy machine does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, kw_only=True)
class Fake(Contender):
    """A method that takes time and memory, and notes its turns."""

    title: str
    clock: Clock
    turns: list[str]
    takes: float = 1.0
    nbytes: int = 0
    fails_at: int | None = None
    fails_with: Callable[[str], BaseException] = ValueError

    @property
    def label(self) -> str:
        return self.title

    @property
    def family(self) -> str:
        return "local"

    def estimate(self, stage: Stage) -> Any:
        return SimpleNamespace(peak_bytes=self.nbytes, timeline=[(0, 1), (5, self.nbytes)])

    def build(self, stage: Stage) -> Runner:
        def step(batch: LocalBatch) -> None:
            self.turns.append(self.title)
            if self.turns.count(self.title) == self.fails_at:
                weight = next(stage.backbone.parameters())
                weight.grad = torch.zeros_like(weight)
                raise self.fails_with("it broke\nsecond line")
            torch.empty(self.nbytes, dtype=torch.uint8)
            self.clock.now += self.takes * self.clock.slowness
            self.clock.slowness *= 1.1

        return Runner(step, [])


def fakes(*rows: dict[str, Any]) -> tuple[list[Fake], list[str], Clock]:
    clock, turns = Clock(), []
    return [Fake(clock=clock, turns=turns, **row) for row in rows], turns, clock


# Turns and ratios ------------------------------------------------------------------------------------------------


def test_turns_rotate_and_ratios_are_within_a_repeat(stage: Stage) -> None:
    rows = [{"title": "end-to-end", "takes": 2.0, "nbytes": 4 << 20}, {"title": "b", "takes": 1.0, "nbytes": 1 << 20}]
    methods, turns, clock = fakes(*rows, {"title": "c", "takes": 6.0, "nbytes": 2 << 20})
    said: list[str] = []
    found = compare(
        stage, methods, IMAGES, LABELS, repeats=3, warmup=2, clock=clock, report=lambda text, turns: said.append(text)
    )
    names = ["end-to-end", "b", "c"]
    assert turns[:9] == [name for name in names for _ in range(3)]  # two to warm up, one for the memory
    assert turns[9:] == [*names, "b", "c", "end-to-end", "c", "end-to-end", "b"]
    base, b, _ = found.rows
    assert len(said) == 3 * (2 + 3)
    assert base.time_ratio == 1.0
    # The machine slows by 1.1 each turn: b is 1, 2 or 1 turns away from the baseline in the three repeats.
    ratios = [0.5 * 1.1, 0.5 / 1.1**2, 0.5 * 1.1]
    assert b.time_ratio == pytest.approx(sorted(ratios)[1])
    assert b.time_ratio_range == pytest.approx((min(ratios), max(ratios)))
    assert b.step_seconds == pytest.approx(b.time_ratio * sorted(filter(None, base.seconds))[1])
    assert b.images_per_second == pytest.approx(4 / b.step_seconds)
    low, high = b.images_per_second_range or (0, 0)
    assert low <= b.images_per_second <= high
    assert [row.measured_peak_ratio for row in found.rows] == pytest.approx([1, 0.25, 0.5], abs=0.05)
    assert [row.estimated_peak_ratio for row in found.rows] == [1, 0.25, 0.5]
    assert [row.is_pareto for row in found.rows] == [False, True, False]


def test_every_method_is_first_once() -> None:
    assert [rotated("abc", repeat)[0] for repeat in range(4)] == ["a", "b", "c", "a"]
    assert rotated([], 3) == []


@pytest.mark.parametrize(
    ("fails_at", "fails_with", "said"),
    [
        (1, ValueError, "ValueError: it broke second line"),
        (4, torch.OutOfMemoryError, "out of memory"),
        (4, functools.partial(MemoryExceeded, 1), "out of memory"),  # as local modules tell it
    ],
)
def test_a_method_that_fails_leaves_the_others_their_rows(
    stage: Stage, fails_at: int, fails_with: Callable[[str], Exception], said: str
) -> None:
    rows = [{"title": "end-to-end"}, {"title": "bad", "fails_at": fails_at, "fails_with": fails_with}]
    methods, turns, clock = fakes(*rows, {"title": "last"})
    found = compare(stage, methods, IMAGES, LABELS, repeats=3, clock=clock)
    base, bad, last = found.rows
    assert bad.error == said
    assert turns.count("bad") == fails_at  # and never again
    assert len(bad.seconds) == 3
    assert bad.time_ratio_range == (None if fails_at == 1 else bad.time_ratio_range)
    assert turns.count("end-to-end") == turns.count("last") == 5
    assert last.time_ratio is not None
    assert base.error is last.error is None
    assert all(weight.grad is None for weight in stage.backbone.parameters())
    assert "bad: " + said in bench.notes_of(found)[-1]


def test_an_interrupted_comparison_keeps_what_it_has(stage: Stage) -> None:
    methods, _, clock = fakes({"title": "end-to-end"}, {"title": "b", "fails_at": 4})
    methods[1] = replace(methods[1], fails_with=KeyboardInterrupt)  # in the second repeat
    found = compare(stage, methods, IMAGES, LABELS, repeats=5, clock=clock)
    assert found.about["is_interrupted"]
    assert [len(row.seconds) for row in found.rows] == [2, 2]
    assert found.rows[1].time_ratio is not None
    assert any(note.startswith("interrupted") for note in bench.notes_of(found))


def test_an_estimate_that_fails_does_not_stop_the_measurement(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, _, clock = fakes({"title": "end-to-end"}, {"title": "b"})
    monkeypatch.setattr(Fake, "estimate", lambda *_: 1 / 0)
    found = compare(stage, methods, IMAGES, LABELS, clock=clock)
    assert [row.error for row in found.rows] == ["the estimate failed: ZeroDivisionError: division by zero"] * 2
    assert all(row.estimated_peak_bytes is None and row.time_ratio for row in found.rows)


def test_a_method_too_large_for_this_machine_is_not_started(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_free_host_bytes", lambda: 2**20)
    methods, turns, clock = fakes({"title": "end-to-end", "nbytes": 2**21}, {"title": "b", "nbytes": 2**19})
    found = compare(stage, methods, IMAGES, LABELS, repeats=1, clock=clock)
    assert found.rows[0].error == "not run: it needs about 2.00 MiB, 1.00 MiB of memory are free"
    assert "end-to-end" not in turns
    assert found.rows[1].time_ratio is None  # nothing to compare with
    assert found.rows[1].step_seconds == pytest.approx(1.1**2)


def test_precisions_have_their_own_baseline_and_front() -> None:
    def row(name: str, precision: str, seconds: float, peak: int) -> Row:
        baseline = "end-to-end" + ("" if precision == "fp32" else ", bf16")
        return Row(
            name=name, family="local", precision=precision, compile=False, num_modules=None, baseline=baseline,
            measured_peak_bytes=peak, seconds=[seconds],
        )  # fmt: skip

    rows = [row("end-to-end", "fp32", 4, 100), row("x", "fp32", 8, 50), row("end-to-end, bf16", "bf16", 2, 40)]
    rows.append(row("y", "bf16", 3, 60))
    summarise(rows, 8)
    assert [row.time_ratio for row in rows] == [1, 2, 1, 1.5]
    assert [row.measured_peak_ratio for row in rows] == [1, 0.5, 1, 1.5]
    assert [row.is_pareto for row in rows] == [True, True, True, False]


# The front and the envelope --------------------------------------------------------------------------------------

POINTS = st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@pytest.mark.heavy
@given(POINTS)
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_nothing_dominates(points: dict[str, tuple[int, int]]) -> None:
    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    naive = {name for name, point in points.items() if not any(dominates(p, point) for p in points.values())}
    front = pareto_front(points)
    assert set(front) == naive
    assert len(front) == len(naive)
    assert [points[name] for name in front] == sorted(points[name] for name in front)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 1000)), min_size=1, max_size=60).map(
        lambda pairs: sorted(pairs, key=lambda pair: pair[0])
    ),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_an_envelope_keeps_the_peak_and_never_lies_below(timeline: list[tuple[int, int]], bins: int) -> None:
    thinned = envelope(timeline, bins)
    assert [share for share, _ in thinned] == [part / bins for part in range(bins)]
    assert max(value for _, value in thinned) == max(value for _, value in timeline)
    total = timeline[-1][0] + 1
    for operators, alive in timeline:
        assert thinned[operators * bins // total][1] >= alive


# The methods -----------------------------------------------------------------------------------------------------


def test_the_default_rows() -> None:
    assert [method.name for method in default_methods()] == [
        "end-to-end",
        "end-to-end, timm checkpointing",
        "K = 1",
        "K = 1, halves/8",
        "K = 2, feature",
        "K = 2, feature, halves/8",
        "K = 4, feature",
        "K = 4, feature, halves/8",
        "K = 4, image",
        "K = 4, greedy",
    ]


def test_rows_that_are_asked_for() -> None:
    plan = Plan(model="m", num_blocks=4, boundaries=(2,))
    methods = default_methods(
        modules=("stages", (1, 3)), objectives=("image", "greedy"), decoders=("linear", "conv"), checkpoints=("none",),
        precisions=("fp32", "bf16"), compile=True, budgets=(0.5, 0.2), plans=[("plan mine", plan)],
    )  # fmt: skip
    names = [method.name for method in methods]
    assert len(set(names)) == len(names) == 2 * (11 + 12)
    assert not any("halves" in name and "compiled" in name for name in names)
    assert "blocks 1|3, greedy, bf16" in names  # once: greedy has no decoder
    assert "stages, image, conv, compiled" in names
    assert "end-to-end, budget 0.2, bf16, compiled" in names
    assert "plan mine, image, compiled" in names


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "method",
    [
        PlainLoop(),
        PlainLoop(checkpoint=True),
        PlainLoop(precision="bf16"),
        Local(modules=3, objective="image"),
        Local(modules=(1, 2), objective="greedy", decoder=None, checkpoint="halves/2", precision="bf16"),
    ],
    ids=lambda method: method.name,
)
def test_each_method_trains_and_leaves_the_model_as_it_found_it(stage: Stage, method: Contender) -> None:
    model: Any = stage.backbone.model
    before = [weight.clone() for weight in model.parameters()]
    runner = method.build(stage)
    with runner.on_stage(CPU):
        runner.step(LocalBatch(torch.randn(4, 3, 32, 32), LABELS))
    assert all(weight.grad is None for weight in model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.grad_checkpointing is False
    profile = method.estimate(stage)
    assert profile is not None
    assert profile.peak_bytes > profile.static_bytes > 0


@pytest.mark.heavy
def test_measured_peaks_are_the_estimated_ones(stage: Stage) -> None:
    methods = [PlainLoop(), PlainLoop(checkpoint=True), Local(modules=3, objective="greedy", decoder=None)]
    images, labels = torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64)
    rows = compare(replace(stage, batch_size=16), methods, images, labels, repeats=1).rows
    for row in rows:
        assert row.measured_peak_bytes == pytest.approx(row.estimated_peak_bytes, rel=0.05)
    assert rows[2].measured_peak_ratio < 0.8  # type: ignore[operator]


def test_timms_checkpointing_is_on_during_the_step(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    model: Any = stage.backbone.model
    model.register_forward_pre_hook(lambda module, _: seen.append(module.grad_checkpointing))
    for checkpoint in (False, True):
        PlainLoop(checkpoint=checkpoint).build(stage).step(LocalBatch(IMAGES, LABELS))
    model._forward_pre_hooks.clear()
    assert seen == [False, True]


def test_what_a_compiler_decides_has_no_estimate(stage: Stage) -> None:
    assert PlainLoop(compile=True).estimate(stage) is None
    assert Local(modules=2, compile=True).estimate(stage) is None


def test_two_compilations_of_one_model_do_not_share_code(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps compiled variants by code object; budgets would otherwise get each other's."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: seen.append(function) or function)
    model = stage.backbone.model
    runs = [PlainLoop(compile=True, budget=budget).build(stage) for budget in (None, 0.5)]
    codes = [function.__func__.__code__ for function in seen]
    assert codes[0] is not codes[1]
    assert all(code is not type(model).forward.__code__ for code in codes)
    for run in runs:
        run.step(LocalBatch(IMAGES, LABELS))


def test_a_budget_holds_during_the_step_only(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config

    seen: list[float] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    handle = stage.backbone.model.patch_embed.register_forward_hook(  # type: ignore[union-attr]
        lambda *_: seen.append(config.activation_memory_budget)
    )
    PlainLoop(compile=True, budget=0.25).build(stage).step(LocalBatch(IMAGES, LABELS))
    handle.remove()
    assert seen == [0.25]
    assert config.activation_memory_budget == 1.0


def test_what_is_parked_goes_to_the_host_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU ``meta`` stands for the device: only where tensors are is looked at."""
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    moved: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, target: moved.append((self.ndim, target.type)) or self)
    with Runner(lambda _: None, [net, optimizer]).on_stage(torch.device("cuda")):
        assert sorted(moved) == [(1, "cuda")] * 3 + [(2, "cuda")] * 3  # weights and both moments; not the step counts
    assert len(moved) == 6  # nothing is on a GPU here, so nothing comes back


# Files -----------------------------------------------------------------------------------------------------------


def example(count: int = 4, *, failed: bool = True) -> Comparison:
    rows = [
        Row(
            name="end-to-end" if number == 0 else f"method {number}",
            family=list(plots.FAMILIES)[number % 4],
            precision="fp32",
            compile=False,
            num_modules=number or None,
            baseline="end-to-end",
            estimated_peak_bytes=(count - number) << 30,
            measured_peak_bytes=(count - number) << 30,
            seconds=[1.0 + number, 1.5 + number],
        )
        for number in range(count)
    ]
    if failed:
        rows.append(
            Row(
                name="broken",
                family="local",
                precision="fp32",
                compile=True,
                num_modules=4,
                baseline="end-to-end",
                seconds=[None, None],
                error="out of memory",
            )
        )
    summarise(rows, 8)
    about = {
        "model": "net", "batch_size": 8, "device": "a processor", "date": "2026-01-02", "input_size": [3, 32, 32],
        "data": "random images", "settings": {"optimizer": "adamw"}, "versions": {"torch": "2"},
    }  # fmt: skip
    return Comparison(about=about, rows=rows, timelines={"end-to-end": [(0.0, 5 << 30), (0.5, 9 << 30)]})


def texts_of(path: Path) -> list[str]:
    tree = ElementTree.parse(path)
    return ["".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_json_and_back() -> None:
    comparison = example()
    text = comparison.to_json()
    assert Comparison.from_json(text) == comparison
    assert set(json.loads(text)) == {"format", "about", "rows", "timelines"}
    assert {"name", "estimated_peak_bytes", "measured_peak_bytes", "seconds", "time_ratio", "error"} <= set(
        json.loads(text)["rows"][0]
    )


def test_without_timelines_json_is_short_and_read_all_the_same() -> None:
    comparison = replace(example(), timelines={})
    assert set(json.loads(comparison.to_json())) == {"format", "about", "rows"}
    assert Comparison.from_json(comparison.to_json()) == comparison


@pytest.mark.parametrize("path", sorted(Path("research/results/memory").resolve().glob("compare-*.json")))
def test_published_comparisons_are_read(path: Path) -> None:
    comparison = Comparison.from_json(path.read_text())
    assert comparison.timelines == {}
    assert all(row.time_ratio and row.peak_bytes for row in comparison.rows if row.error is None)


@pytest.mark.parametrize("option", ["--plot", "--timeline"])
def test_pictures_without_matplotlib_are_refused_at_once(
    compare_: Cli, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    said = compare_(*TINY, option, "a.png")
    assert said.code == 2
    assert said.err.strip().endswith(
        f"{option}: pictures need matplotlib, which isn't installed; pip install 'localgrad[plots]'."
    )
    assert not said.err.strip().count("\n")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 99, "about": {}, "rows": [], "timelines": {}}']
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="comparison: "):
        Comparison.from_json(text)


@pytest.mark.heavy
def test_plans_of_one_name_are_told_apart_by_their_folders() -> None:
    paths = [Path("runs/a/plan.json"), Path("runs/b/plan.json")]
    assert list(bench._titles(paths).values()) == ["plan a/plan", "plan b/plan"]
    assert list(bench._titles([*paths[:1], Path("small.json")]).values()) == ["plan plan", "plan small"]
    assert list(bench._titles([paths[0]] * 2).values()) == ["plan plan"]


@pytest.mark.parametrize("draw", [plots.plot_trade_off, plots.plot_timeline])
def test_plots_are_png_files(draw: Callable[[Comparison, Path], None], tmp_path: Path) -> None:
    from PIL import Image

    draw(example(), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
        assert len(image.convert("RGB").getcolors(10**6) or []) > 50


def test_the_trade_off_has_every_point_its_number_and_name_and_the_front(tmp_path: Path) -> None:
    plots.plot_trade_off(example(12), tmp_path / "plot.svg")
    texts = texts_of(tmp_path / "plot.svg")
    for number in range(1, 13):
        assert texts.count(str(number)) >= 2, "beside the point and in the list"
    assert {"end-to-end", *(f"method {number}" for number in range(1, 12))} <= set(texts)
    assert not any("broken" in text for text in texts)
    assert any("net" in text for text in texts)
    assert "batch 8, a processor, 2026-01-02" in texts
    assert "measured peak memory of a step (GiB)" in texts
    assert "time per step (seconds)" in texts
    assert "1 x" in texts
    drawing = (tmp_path / "plot.svg").read_text()
    assert drawing.count('id="pareto-front"') == 1


def test_numbers_of_points_in_one_place_lie_apart() -> None:
    figure, axes = plots._figure(example(), "numbers")
    plots._place_numbers(figure, axes, [(str(number), 0.5, 0.5) for number in range(6)])
    offsets: list[tuple[float, float]] = [text.xyann for text in axes.texts]  # type: ignore[attr-defined]
    gaps = [((a - c) ** 2 + (b - d) ** 2) ** 0.5 for i, (a, b) in enumerate(offsets) for c, d in offsets[:i]]
    assert len(offsets) == 6
    assert min(gaps) > 9


def test_the_timeline_names_methods_and_peaks(tmp_path: Path) -> None:
    plots.plot_timeline(example(), tmp_path / "plot.svg")
    texts = texts_of(tmp_path / "plot.svg")
    assert "end-to-end (9.00 GiB)" in texts
    assert any("(estimated)" in text for text in texts)


def test_empty_comparisons_can_be_drawn(tmp_path: Path) -> None:
    empty = Comparison(about={}, rows=[], timelines={})
    plots.plot_trade_off(empty, tmp_path / "a.svg")
    plots.plot_timeline(empty, tmp_path / "b.svg")


def test_the_table_shows_every_row_and_marks_the_front() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(bench.comparison_table(example()))
    console.file.close()
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4", "5"]
    assert all(line.rstrip().endswith("*") for line in lines[1:5])
    assert "unknown" in lines[5]  # compiled: measured only


# The verb --------------------------------------------------------------------------------------------------------


TINY = ("--model", "test_vit", "--img-size", "32", "--num-classes", "5", "--batch-size", "4", "--device", "cpu")


@pytest.fixture
def compare_(cli_: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """``localgrad compare``, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(cli_, "compare")


@pytest.fixture
def _quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates of the right kind in no time; what they are worth is tested above and in test_memory.py."""
    profile = SimpleNamespace(peak_bytes=2**21, timeline=[(0, 2**20), (1, 2**21)])
    monkeypatch.setattr(contenders, "simulate", lambda *_, **__: profile)
    monkeypatch.setattr(contenders, "estimate_step", lambda *_, **__: profile)


@pytest.mark.usefixtures("_quick_estimates")
def test_the_verb_from_end_to_end(compare_: Cli, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(Plan(model="test_vit", num_blocks=6, boundaries=(2,)).to_json())
    files = ("--json", "all.json", "--plot", "plot.svg", "--timeline", "line.png", "--plan", "plan.json")
    said = compare_(*TINY, "--modules", "2", "--objective", "feature", "--checkpoint", "none", "--repeats", "2", *files)
    assert said.code == 0, said.err
    names = [
        "end-to-end", "end-to-end, timm checkpointing", "K = 1", "K = 1, halves/8", "K = 2, feature",
        "plan plan, feature",
    ]  # fmt: skip
    assert said.out.startswith("test_vit, 3 x 32 x 32, batch 4 of random images, adamw; ")
    for name in names:
        assert f" {name}  " in said.out
    comparison = Comparison.from_json(Path("all.json").read_text())
    assert [row.name for row in comparison.rows] == names
    for row in comparison.rows:
        assert row.error is None
        assert (row.measured_peak_bytes or 0) > 2**20
        assert len([value for value in row.seconds if value]) == 2
    about = comparison.about
    assert about["command"].startswith("localgrad compare --model test_vit")
    assert about["settings"]["plans"] == ["plan.json"]
    assert {"torch", "timm", "localgrad"} <= set(about["versions"])
    assert about["num_threads"] == 1
    assert list(comparison.timelines) == [names[0], names[1], names[4]]
    assert names[4] in texts_of(Path("plot.svg"))
    assert Path("line.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.heavy
@pytest.mark.usefixtures("_quick_estimates")
def test_estimates_alone_run_nothing(compare_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainLoop, "build", lambda *_: pytest.fail("built"))
    arguments = ("--modules", "1", "--objective", "greedy", "--checkpoint", "none", "--precision", "bf16")
    said = compare_(*TINY, *arguments, "--estimate-only", "--data", "digits")
    assert said.code == 2
    assert "--num-classes" in said.err
    said = compare_(
        "--model",
        "test_vit",
        "--img-size",
        "32",
        "--batch-size",
        "4",
        *arguments,
        "--estimate-only",
        "--data",
        "digits",
    )
    assert said.code == 0, said.err
    assert "1 x 32 x 32, batch 4 of digits" in said.out
    assert "end-to-end, bf16" in said.out
    assert "step time" not in said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "swin_tinny"), "--model: timm has no 'swin_tinny'. Nearest: swin_tiny"),
        (("--repeats", "0"), "--repeats: 0 is below 1; take 3, or --estimate-only"),
        (("--batch-size", "0"), "--batch-size: 0 is below 1"),
        (("--batch-size", str(10**20)), f"--batch-size: {10**20} is above 131072; take 64"),
        (("--plot", "a.pdf"), "--plot: 'a.pdf' is neither .png nor .svg; take a.png."),
        (("--timeline", "no/such/a.png"), "--timeline: there is no folder 'no/such'"),
        (("--json", "."), "--json: '.' is a folder"),
        (("--plot", "a.png", "--estimate-only"), "--plot a.png doesn't go with --estimate-only: it needs step times"),
        (
            ("--objective", "greeedy"),
            "--objective: unknown 'greeedy'; take feature, image, greedy, contrastive, lopt, solo, segprop. Nearest",
        ),
        (("--decoder", "cnov"), "--decoder: unknown 'cnov'; take "),
        (("--precision", "fp8"), "--precision: unknown 'fp8'; take fp32, bf16."),
        (("--checkpoint", "halfs"), "--checkpoint: unknown 'halfs'; take none, blocks"),
        (("--modules", "two"), "--modules: 'two' is neither a number, stages, nor boundaries; take 2,4"),
        (("--memory-budget", "2"), "--memory-budget: '2' is no share from 0 to 1"),
        (("--plan", "none.json"), "--plan: none.json can't be read (No such file or directory)"),
        (("--device", "tpu"), "--device: 'tpu'"),
        ((*TINY, "--modules", "7"), "--modules: 7 local modules can't be made of 6 blocks; take a number from 1 to 6."),
        ((*TINY, "--modules", "4", "--modules", "3,2"), "--modules: boundaries must ascend"),
        ((*TINY, "--modules", "stages"), "--modules: this model has no stages"),
        ((*TINY, "--optimizer", "adamww"), "--optimizer: timm has no 'adamww'"),
    ],
)
def test_bad_input_ends_in_one_line_that_says_what_to_type(
    compare_: Cli, arguments: tuple[str, ...], said: str
) -> None:
    found = compare_(*arguments)
    assert found.code == 2
    assert found.out == ""
    lines = [line for line in found.err.splitlines() if line.strip()]
    assert len(lines) == 1, found.err
    assert lines[0].startswith(f"localgrad: {said}")


def test_a_plan_that_is_none_or_of_another_model(compare_: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    assert "localgrad: --plan bad.json: plan: this is not the JSON of a plan" in compare_("--plan", "bad.json").err
    (tmp_path / "other.json").write_text(Plan(model="other", num_blocks=6, boundaries=(2,)).to_json())
    said = compare_(*TINY, "--plan", "other.json")
    assert said.code == 2
    assert "localgrad: --plan: it was made for other with 6 blocks" in said.err


def test_pinned_the_name_of_the_compilers_budget() -> None:
    from torch._functorch import config

    assert config.activation_memory_budget == 1.0
    assert contenders.END_TO_END == "end-to-end"


@pytest.mark.parametrize("name", [*rules.READING, "download"])
def test_options_of_data_need_data(name: str) -> None:
    value = {"image_range": [0.0, 4095.0], "download": True}.get(name, "other")
    with pytest.raises(RecipeError, match=f"^{name}.* needs data: it is of images that are read"):
        bench.run(Settings(**{name: value}), report=SimpleNamespace())
