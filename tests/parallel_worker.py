"""What one of several processes does in the tests of parallel training; the same functions make the references.

``main`` with OUT REPLICAS SCENARIO... (``ranks.py`` calls it) trains each scenario in turn, with the same process
groups, and rank 0 writes ``OUT/SCENARIO.pt``: the whole model's weights and what the ranks say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from helpers import SIZE, make, make_backbone
from libraries import LIBRARIES, inputs_of, parted, tokens
from localgrad import (
    Backbone,
    Carried,
    Contrastive,
    FeatureReconstruction,
    GreedySupervised,
    ImageReconstruction,
    LocalBatch,
    LocalLearner,
    ParallelLearner,
    Team,
    register_carried,
)
from localgrad.backbones.example import mapped
from localgrad.compare.measuring import Held, peak_of
from localgrad.objectives.base import Term, TermValue
from localgrad.objectives.methods import Lopt, Objective, Segprop
from localgrad.objectives.site import Site, Weight
from localgrad.parallel.memory import estimate_share
from localgrad.parallel.parallel_learner import merged
from localgrad.step.sharding import rows_of
from localgrad.training.optim import Schedule

# What somebody carries from outside ------------------------------------------------------------------------------


def moments(features: Tensor) -> Tensor:
    """Mean and deviation of each image's numbers, [B, 2]."""
    flat = features.flatten(1).float()
    return torch.stack([flat.mean(dim=1), flat.std(dim=1)], dim=1)


register_carried(  # a mean over all modules so far, in which later ones count more
    Carried(
        name="moments",
        shape=lambda site: (2,),
        begin=lambda batch, learner: moments(batch.features),
        make=lambda handed: 0.5 * handed.batch.moments + 0.5 * moments(handed.features),
        dtype=torch.float32,
    )
)
register_carried(  # one of the whole batch, which no part of it cuts
    Carried(
        name="scale",
        shape=lambda site: (1,),
        begin=lambda batch, learner: batch.features.abs().amax().float().view(1),
        splits=False,
        dtype=torch.float32,
    )
)


class MomentsTerm(Term):
    """Guesses the moments of what came before from a module's outputs."""

    uses = frozenset({"moments", "scale"})

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.layout = site.outputs
        self.guess = nn.Linear(site.outputs.width, 2)

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        guessed = self.guess(self.layout.to_grid(outputs).mean(dim=(1, 2)))
        return TermValue(((guessed - batch.moments) / batch.scale.mean()).square().mean())


@dataclass(frozen=True, kw_only=True)
class Moments(Objective):
    """Moments only, up to the last module, which has the task."""

    def terms(self, site: Site) -> dict[str, tuple[Weight, Term]]:
        return {"moments": (1.0, MomentsTerm(site))}


NUM_BATCHES, BATCH_SIZE, NUM_CLASSES = 5, 6, 5


# What somebody split by hand -------------------------------------------------------------------------------------


class Embed(nn.Conv2d):
    """Patches as tokens."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)


class Head(nn.Module):
    """Logits of the mean token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, NUM_CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(tokens).mean(dim=1))


class Net(nn.Module):
    """A transformer of torch's own layers, which drop out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        side = SIZE[-1] // 4
        self.embed = Embed(SIZE[0], width, side, side)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(width, 2, 32, batch_first=True) for _ in range(4)))
        self.head = Head(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images)))


def by_hand() -> Backbone:
    torch.manual_seed(0)
    net = Net()
    return Backbone(stem=net.embed, blocks=net.blocks, tail=net.head, model=net, input_size=SIZE)


@dataclass(frozen=True)
class Scenario:
    """A training run: a model, modules, an objective, and settings of the learner."""

    kind: str = "swin"
    modules: int = 3
    objective: Objective = field(default_factory=FeatureReconstruction)
    settings: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.3
    mixes: bool = True
    wire: str = "same"
    num_buffers: int = 2
    shard: bool = False
    optimizer: str = "adamw"
    model: dict[str, Any] = field(default_factory=dict)
    unread: bool = False  # give blocks a parameter that they never read


EVERYTHING: dict[str, Any] = {"clip_grad": 1.0, "accumulation": 2, "ema_decay": 0.99}
SCENARIOS: dict[str, Scenario] = {
    "two": Scenario(modules=2, settings=EVERYTHING),
    "three": Scenario(modules=3, settings=EVERYTHING, num_buffers=1),
    "four": Scenario(kind="vit", modules=4, settings=EVERYTHING, num_buffers=3),
    "plain": Scenario(kind="vit", modules=4, mixes=False),
    "batch norms": Scenario(kind="resnet", modules=3, drop_path=0.0),
    "image": Scenario(objective=ImageReconstruction(), settings=EVERYTHING),
    "contrastive": Scenario(objective=Contrastive(), mixes=False),
    "greedy": Scenario(
        kind="vit", modules=4, objective=GreedySupervised(classifier="next"), settings={"checkpoint": "blocks"}
    ),
    "remedies": Scenario(
        kind="vit",
        modules=4,
        objective=FeatureReconstruction(
            reconstruct="previous", context=0.5, transport_tau=1.0, over_time={"reconstruction": (1.0, 0.1)}
        ),
        settings={"freeze_from": 0.4, **EVERYTHING},
    ),
    "reconcile": Scenario(kind="vit", modules=4, objective=FeatureReconstruction(reconcile=0.5)),
    "reconcile, frozen": Scenario(
        kind="vit", modules=4, objective=FeatureReconstruction(reconcile=0.5), settings={"freeze_from": 0.4}
    ),
    "own": Scenario(kind="vit", modules=4, objective=Moments(), settings=EVERYTHING),
    "by hand": Scenario(kind="by hand", settings=EVERYTHING),
    "bf16": Scenario(settings={"precision": "bf16"}),
    "still": Scenario(kind="vit", modules=4, drop_path=0.0, settings=EVERYTHING | {"accumulation": 3}, unread=True),
    "still, whole": Scenario(kind="vit", modules=4, drop_path=0.0, settings={"clip_grad": 1.0, "ema_decay": 0.99}),
    "unread": Scenario(kind="vit", modules=4, drop_path=0.0, settings={"accumulation": 3}, unread=True),
    "still parts": Scenario(kind="vit", modules=3, drop_path=0.0, settings={"accumulation": 3}),
    "halves": Scenario(
        modules=2,
        drop_path=0.0,
        objective=GreedySupervised(classifier="next"),
        settings={"checkpoint": "blocks", "freeze_from": 0.4, "clip_grad": 0.5},
    ),
    "norms": Scenario(kind="resnet", modules=2, drop_path=0.0, settings={"precision": "bf16", "ema_decay": 0.9}),
    "large": Scenario(
        kind="vit",
        modules=2,
        drop_path=0.0,
        settings={"ema_decay": 0.9},
        model={"embed_dim": 192, "num_heads": 3, "depth": 2},
    ),
    "narrow wire": Scenario(kind="vit", modules=4, wire="bf16"),
}

LANGUAGE = "transformers, language"
WATCHED: dict[str, Scenario] = {
    "language": Scenario(kind=LANGUAGE, settings=EVERYTHING),
    "language, lopt": Scenario(kind=LANGUAGE, objective=Lopt(), settings={"clip_grad": 1.0}, num_buffers=1),
    "language, segprop": Scenario(kind=LANGUAGE, modules=4, objective=Segprop(), settings={"accumulation": 3}),
    "language, bf16": Scenario(kind=LANGUAGE, modules=2, wire="bf16", settings={"precision": "bf16"}),
    "transformers": Scenario(kind="transformers, vision", settings=EVERYTHING),
    "torchvision": Scenario(kind="torchvision", settings={"checkpoint": "blocks", **EVERYTHING}),
    "timm": Scenario(kind="timm", objective=GreedySupervised(classifier="next")),
    "open_clip": Scenario(kind="open_clip", objective=ImageReconstruction(), settings=EVERYTHING),
    # Keys have a bias, whose gradient is rounding alone: AdamW would make steps of that.
    "open_clip, still": Scenario(kind="open_clip", modules=2, settings={"accumulation": 3}, optimizer="nesterov"),
}
"""Models that were split by watching: what their blocks need beside features travels."""
SCENARIOS |= WATCHED
SCENARIOS |= {
    name: Scenario(kind="vit", modules=2, drop_path=0.0, optimizer=name, model={"depth": 2})
    for name in ("lamb", "lion", "nesterov")
}
BY_ROWS = ["still", "halves", "norms", "large", "lamb"]
"""These once more, each replica with rows of the weights only."""
MORE_BY_ROWS = ["still, whole", "still parts", "unread", "lion", "nesterov"]
MEASURED = ["large, rows"]
SCENARIOS |= {f"{name}, rows": replace(SCENARIOS[name], shard=True) for name in [*BY_ROWS, *MORE_BY_ROWS]}
ESTIMATED = {"language": 2, "transformers": 3, "batch norms": 2, "four": 3, "remedies": 4, "halves": 2, "large": 1}
"""Estimating takes longer than training; among so many ranks each rank's weights in the first replica are."""
ESTIMATED |= {f"{name}, rows": ESTIMATED[name] for name in ESTIMATED.keys() & {*BY_ROWS}}


def data(scenario: Scenario) -> list[tuple[Any, Tensor]]:
    """Seeded batches, with labels made soft by mixup or not; of sequences some are of another length, or all full."""
    if scenario.kind in LIBRARIES:
        small = LIBRARIES[scenario.kind]
        batches = [small.batch(seed, BATCH_SIZE) for seed in range(NUM_BATCHES)]
        if scenario.kind == LANGUAGE:
            batches[1:4] = [tokens(11, BATCH_SIZE, full=True), tokens(12, BATCH_SIZE, length=7), tokens(13, 4)]
        return [(inputs_of(batch), batch["labels"]) for batch in batches]
    generator = torch.Generator().manual_seed(11)
    found = []
    mix = Mixup(mixup_alpha=0.4, num_classes=NUM_CLASSES)
    for _ in range(NUM_BATCHES):
        images = torch.randn(BATCH_SIZE, *SIZE, generator=generator)
        labels = torch.randint(0, NUM_CLASSES, (BATCH_SIZE,), generator=generator)
        found.append(mix(images, labels) if scenario.mixes else (images, labels))
    return found


def learner_of(scenario: Scenario, team: Team | None) -> LocalLearner | ParallelLearner:
    more = {**scenario.model, **({"drop_path_rate": scenario.drop_path} if scenario.drop_path else {})}
    if scenario.kind in LIBRARIES:
        model = parted(scenario.kind)
    elif scenario.kind == "by hand":
        model = by_hand()
    elif team is not None and not scenario.unread:
        model = make_backbone(scenario.kind, **more)
    else:
        model = make(scenario.kind, **more)
    if scenario.unread:
        for block in (model.blocks[0], model.blocks[-1]):
            block.register_parameter("unread", torch.nn.Parameter(torch.ones(3)))
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "modules": scenario.modules,
        "objective": scenario.objective,
        **({} if scenario.kind in LIBRARIES else {"input_size": SIZE}),
        **scenario.settings,
    }
    if team is None:
        return LocalLearner(model, **settings)
    return ParallelLearner(
        model, team=team, wire=scenario.wire, num_buffers=scenario.num_buffers, shard=scenario.shard, **settings
    )


def train(scenario: Scenario, team: Team | None = None) -> tuple[Any, list[Any]]:
    """Train on all batches, with a scheduler; the learner, and each step's losses."""
    import numpy as np

    np.random.seed(3)  # mixup draws of it
    batches = data(scenario)
    learner = learner_of(scenario, team)
    learner.configure_optimizers(partial(create_optimizer_v2, opt=scenario.optimizer, lr=1e-3, weight_decay=0.05))
    schedule = Schedule(
        learner.optimizers, name="cosine", epochs=2, batches_per_epoch=NUM_BATCHES, warmup_epochs=0.2, warmup_lr=1e-5,
        min_lr=1e-5, warmup_stagger=0.2, first=learner.own.start,
    )  # fmt: skip
    if isinstance(learner, ParallelLearner):
        learner.begin(NUM_BATCHES)
    losses = []
    for number, (images, labels) in enumerate(batches):
        schedule.at(number)
        learner.at(number / NUM_BATCHES)
        if team is not None and team.num_replicas > 1:
            own = [mapped(given, lambda whole: whole.tensor_split(team.num_replicas)[team.replica])
                   for given in (images, labels)]  # fmt: skip
        else:
            own = [images, labels]
        losses.append([float(loss) for loss in learner.step(*own).losses])
    if isinstance(learner, ParallelLearner):
        learner.links.finish()
    return learner, losses


def start_program() -> None:
    """Be the command line, which starts another program where it would start Python."""
    from localgrad import cli

    sys.executable = os.environ["PROGRAM"]
    cli.main()


def inferred(scenario: Scenario, learner: ParallelLearner) -> dict[int, Tensor]:
    """Logits of the own modules for the first batch."""
    inputs, labels = data(scenario)[0]
    learner.eval().begin(1)
    found, targets = learner.infer(inputs, labels)
    learner.links.finish()
    assert torch.equal(targets, labels)
    learner.train()
    return found


def measured_peak(scenario: Scenario, learner: ParallelLearner, team: Team) -> int:
    """Bytes of tensors in one more step, as the allocator tells."""
    images, labels = (given.tensor_split(team.num_replicas)[team.replica] for given in data(scenario)[0])

    def step() -> None:  # no message may be under way when the profiler stops
        learner.begin(1)
        learner.step(images, labels)
        learner.links.finish()

    held: list[Held] = [images, labels]
    for index, optimizer in zip(learner.own, learner.optimizers, strict=True):
        module = learner.modules[index]
        held += [rows_of(tensor) for tensor in (*module.parameters(), *module.buffers())]
        held += [rows_of(value) for slots in optimizer.state.values() for value in slots.values()]
    if learner.averages:
        held += [*learner._ema.module.state_dict().values()]  # rows
    team.everyone(None)
    return peak_of(step, torch.device("cpu"), held)[0]


def main() -> None:
    out, replicas, *names = sys.argv[1:]
    torch.set_num_threads(1)
    team = Team.join(num_replicas=int(replicas), device=torch.device("cpu"))
    for name in names:
        learner, losses = train(SCENARIOS[name], team)
        weights = learner.whole_state_dict()
        sender = learner.links.sender
        estimate = estimated = peaks = None
        if ESTIMATED.get(name) == team.num_ranks and not team.replica:
            estimate = estimate_share(learner, BATCH_SIZE // team.num_replicas, learner.optimizer_factory)
            estimated = estimate.by_category["parameters"]
        if name in MEASURED:
            measured = measured_peak(SCENARIOS[name], learner, team)
            peaks = None if estimate is None else (estimate.peak_bytes, measured)
        parts, logits = None, {}
        if name in WATCHED:
            parts, logits = team.to_speaker(learner.state_dict()), inferred(SCENARIOS[name], learner)
        own = [weight for index in learner.own for weight in learner.modules[index].parameters()]
        said = team.everyone(
            {
                "own": list(learner.own),
                "losses": losses,
                "logits": logits,
                "estimated": estimated,
                "weights": sum(weight.nbytes for weight in own),
                "peaks": peaks,
                "sent": 0 if sender is None else sender.packet_bytes,
                "alive": sum(rows_of(weight).nbytes for weight in learner.model.parameters() if not weight.is_meta),
            }
        )
        if team.is_speaker:
            state = None if parts is None else merged(parts[: team.num_ranks])
            torch.save({"weights": weights, "said": said, "state": state}, Path(out) / f"{name}.pt")
    team.leave()
