"""Simulated speed-up against ranks: the tables and the picture of research/docs/parallel.md.

    python -m research.benchmarks.speed_up --plot docs/images/parallel.svg
    python -m research.benchmarks.speed_up --times times.json --model vit_large_patch16_224

Times are localgrad's own nominal ones of every block (a roofline, no clock is read), or measured ones from a file: a
list with, for each block, "forward", "backward" and "update" in seconds, "sent_bytes" and "gradient_bytes"; stem, tail
and losses are in the first and the last. All speed-ups are to end-to-end training on one rank, in images a second.
Local modules pay for their auxiliary nets, rivals have none (with --times all have the same times).

A pipeline has as many ranks as divide their number and have a block each; more ranks are replicas of it, each with a
batch of its own. Data parallel is given twice: with a whole batch a rank, so that the batch of an update grows with the
ranks, and with the one batch cut up. What is kind to rivals is told in research/simulation/simulator.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localgrad.memory.costs import Costs
from localgrad.partition import Checkpointing, balance, spans
from localgrad.planning.search import fastest_ranks
from research.simulation.simulator import (
    Cluster,
    Link,
    Module,
    data_parallel,
    gpipe,
    joined,
    local_modules,
    one_forward_one_backward,
)

MODELS = ("swin_tiny_patch4_window7_224", "vit_large_patch16_224")
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
STEPS = 200
ADAMW_PASSES = 7
"""AdamW reads weights, gradients and two averages and writes three of them back, and does little else."""
STYLES: dict[str, dict[str, Any]] = {  # Okabe and Ito's colours; markers and dashes say the same once more
    "local modules": {"color": "#0072B2", "marker": "^", "linestyle": "-"},
    "1F1B": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "GPipe": {"color": "#E69F00", "marker": "x", "linestyle": (0, (4, 2)), "markersize": 8},
    "data parallel, same batch": {"color": "#009E73", "marker": "D", "linestyle": "-"},
    "data parallel, a batch a rank": {"color": "#000000", "marker": "o", "linestyle": (0, (1, 1.5))},
}
GREY = "#666666"


@dataclass(frozen=True)
class Source:
    """A model's modules for any number of ranks.

    Attributes:
        name: of the model.
        num_blocks: the most ranks of one pipeline.
        local: modules with their auxiliary nets.
        stages: the same without.
    """

    name: str
    num_blocks: int
    local: Callable[[int], list[Module]]
    stages: Callable[[int], list[Module]]


def predicted(name: str, args: argparse.Namespace) -> Source:
    """From nominal costs of every block."""
    import timm

    from localgrad import FeatureReconstruction
    from localgrad.app.planning import adamw
    from localgrad.backbones.base import outline
    from localgrad.backbones.fake import without_initialization
    from localgrad.planning.budget import Task

    with without_initialization():
        model = timm.create_model(name)
    size = tuple(model.default_cfg["input_size"])
    task = Task(
        backbone=outline(model, size),
        objective=FeatureReconstruction(),
        optimizer=adamw,
        precision=args.precision,
        device=args.device,
    )
    costs = task.costs(args.batch_size)

    def plain(start: int, stop: int) -> list[Any]:
        return [costs.choice(start, stop, Checkpointing())]

    def local(num_ranks: int) -> list[Module]:
        found = fastest_ranks(costs.num_blocks, num_ranks, plain, lambda *_: 0)
        assert found is not None
        return _modules(costs, found.boundaries, args, auxiliary=True)

    seconds = [_module(costs, block, block + 1, args, auxiliary=False).seconds for block in range(costs.num_blocks)]

    def stages(num_ranks: int) -> list[Module]:
        return _modules(costs, balance([round(1e9 * time) for time in seconds], num_ranks), args, auxiliary=False)

    return Source(name, costs.num_blocks, local, stages)


def _modules(costs: Costs, boundaries: tuple[int, ...], args: argparse.Namespace, *, auxiliary: bool) -> list[Module]:
    labels = 8 * costs.settings.batch_size
    sent = [*(costs.inputs[edge] + labels for edge in boundaries), 0]  # features and labels
    runs = [(span.start, span.stop) for span in spans(boundaries, costs.num_blocks)]
    modules = [_module(costs, *run, args, auxiliary=auxiliary) for run in runs]
    return [replace(module, sent_bytes=nbytes) for module, nbytes in zip(modules, sent, strict=True)]


def _module(costs: Costs, start: int, stop: int, args: argparse.Namespace, *, auxiliary: bool) -> Module:
    """Blocks with stem or tail, and their objective; only the last one has one anyway."""
    from localgrad.memory.gauge import RATES

    last = stop == costs.num_blocks
    units = costs.parts[0][start + 1 if start else 0 : stop + 2 if last else stop + 1]
    parts = [*units, *([costs.head(start, stop).cost] if auxiliary or last else [])]
    gradient_bytes = sum(part.gradients for part in parts)
    return Module(
        forward=1e-9 * sum(part.forward_ns for part in parts),
        backward=1e-9 * sum(part.backward_ns for part in parts),
        update=ADAMW_PASSES * gradient_bytes / RATES[args.device].bytes,
        gradient_bytes=gradient_bytes,
        num_blocks=stop - start,
    )


def measured(path: Path, name: str) -> Source:
    """From a file of measured times."""
    blocks = [Module(**values) for values in json.loads(path.read_text())]
    times = [round(1e9 * block.seconds) for block in blocks]

    def stages(num_ranks: int) -> list[Module]:
        boundaries = balance(times, num_ranks)
        return [joined(blocks[span.start : span.stop]) for span in spans(boundaries, len(blocks))]

    return Source(f"{name}, measured ({path.name})", len(blocks), stages, stages)


def simulated(source: Source, num_ranks: int, cluster: Cluster, microbatches: int) -> dict[str, float]:
    """Speed-up of every way to train on so many ranks."""
    whole = source.stages(1)[0]
    replicas = next(n for n in range(1, num_ranks + 1) if num_ranks % n == 0 and num_ranks // n <= source.num_blocks)
    length = num_ranks // replicas
    stages = source.stages(length)
    share = replace(whole, forward=whole.forward / num_ranks, backward=whole.backward / num_ranks)
    pipelined = {"microbatches": microbatches, "replicas": replicas}
    found = {
        "local modules": local_modules(source.local(length), STEPS, cluster, replicas=replicas),
        "1F1B": one_forward_one_backward(stages, STEPS, cluster, **pipelined),
        "GPipe": gpipe(stages, STEPS, cluster, **pipelined),
        "data parallel, same batch": data_parallel(share, STEPS, cluster, replicas=num_ranks),
        "data parallel, a batch a rank": data_parallel(whole, STEPS, cluster, replicas=num_ranks),
    }
    speeds = {name: outcome.steady_throughput * whole.seconds for name, outcome in found.items()}
    speeds["data parallel, same batch"] /= num_ranks  # a step of all ranks together is one batch
    return speeds


def limits(source: Source, cluster: Cluster) -> dict[str, float]:
    """What one pipeline of local modules can't pass, however many ranks: its slowest block, and the wire."""
    whole, modules = source.stages(1)[0], source.local(source.num_blocks)
    packets = [link.seconds(m.sent_bytes) for m, link in zip(modules, cluster.links(len(modules)), strict=False)]
    return {
        "slowest block": whole.seconds / max(module.seconds for module in modules),
        "the wire": whole.seconds / max(packets),
    }


def print_table(name: str, rows: dict[int, dict[str, float]], bounds: dict[str, float], num_blocks: int) -> None:
    print(f"\n{name}: {num_blocks} blocks\n\n| ranks | {' | '.join(STYLES)} |\n|{'---|' * (len(STYLES) + 1)}")
    for num_ranks, speeds in rows.items():
        print(f"| {num_ranks} | {' | '.join(f'{speeds[key]:.2f}' for key in STYLES)} |")
    told = ", ".join(f"{key} {value:.1f}" for key, value in bounds.items())
    print(f"\nOne pipeline of local modules can't pass: {told}")


def draw(panels: list[tuple[Source, dict[int, dict[str, float]], dict[str, float]]], about: str, path: Path) -> None:
    """Speed-up against ranks, a panel a model."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), dpi=150)
    for place, (source, rows, bounds) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        ranks = list(rows)
        for name, style in STYLES.items():
            speeds = [rows[count][name] for count in ranks]
            axes.plot(ranks, speeds, label=name, linewidth=1.6, **({"markersize": 5} | style))
        for name, bound in bounds.items():
            axes.axhline(bound, color=GREY, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
            axes.text(1.02, bound * 1.05, f"limit: {name}", color=GREY, fontsize=8)
        axes.axvline(source.num_blocks, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        axes.text(source.num_blocks * 1.05, 1.05, f"{source.num_blocks} blocks;\nthen replicas", color=GREY, fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = [1, 2, 4, 8, 16, 32, 64]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlim(0.95, 70)
        axes.set_ylim(0.95, 115)
        axes.set_xlabel("ranks")
        axes.set_ylabel("speed-up over end-to-end training on one" if place == 1 else "")
        axes.set_title(source.name, loc="left", fontsize=10.5)
        axes.grid(visible=True, color="#e5e5e5", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.suptitle("Simulated speed-up against ranks", x=0.02, y=0.985, ha="left", fontsize=14)
    told = f"{about}\ndashed: what local modules can't pass without replicas"
    figure.text(0.02, 0.895, told, fontsize=8.5, color=GREY)
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=8.5)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.84, bottom=0.17, wspace=0.13)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "localgrad"}):  # letters stay letters
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="by default Swin-T and ViT-L")
    parser.add_argument("--times", type=Path, help="JSON of measured times, for --model")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="cuda", help="whose nominal rates: cuda or cpu")
    parser.add_argument("--within", type=float, default=300e9, help="bytes a second between ranks of a node")
    parser.add_argument("--between", type=float, default=25e9, help="the same between nodes, for each rank")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    cluster = Cluster(
        within=Link(args.within, args.latency),
        between=Link(args.between, args.latency),
        ranks_per_node=args.ranks_per_node,
    )
    about = (
        f"{'measured times' if args.times else f'nominal times of {args.device}, {args.precision}'}, batch "
        f"{args.batch_size}, pipelines in {args.microbatches} microbatches; nodes of {args.ranks_per_node} ranks, "
        f"{args.within / 1e9:g} GB/s within and {args.between / 1e9:g} GB/s between, {1e6 * args.latency:g} µs; "
        f"{datetime.datetime.now(tz=datetime.UTC).date()}"
    )
    print(about)
    names = (args.model,) if args.model else MODELS[:1] if args.times else MODELS
    panels = []
    for name in names:
        source = measured(args.times, name) if args.times else predicted(name, args)
        rows = {count: simulated(source, count, cluster, args.microbatches) for count in RANKS}
        bounds = limits(source, cluster)
        print_table(source.name, rows, bounds, source.num_blocks)
        panels.append((source, rows, bounds))
    if args.plot:
        draw(panels, about, args.plot)


if __name__ == "__main__":
    main()
