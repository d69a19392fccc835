"""``ParallelLearner``: the local modules of one model on several processes, each with a share of them.

Started by torchrun, every process makes the same learner and runs the same loop; the first rank's images are used. Rank
r trains its modules on the batch that rank r - 1 has just sent on. The weights are those of one process, bit for bit
on processors that round alike. ``whole_state_dict()`` gathers the model.

Of a model that was split by watching, each process keeps the code and its own modules' weights; of all others it has
shapes. The model context, which the stem makes on the first rank, travels with the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from localgrad import rules
from localgrad.backbones.base import Backbone
from localgrad.backbones.fake import by_shapes_alone, fake_copy
from localgrad.backbones.hooks import copy_without_hooks
from localgrad.backbones.namespaces import Attributes
from localgrad.errors import ParallelError, RecipeError, arg
from localgrad.learner import Factories, Learner, make_ema, no_optimizers
from localgrad.objectives.auxiliary import NextClassifier
from localgrad.objectives.averaging import has_spectral_norms
from localgrad.objectives.carried import LocalBatch, Route, empty_batch, mask_of
from localgrad.objectives.losses import IGNORED
from localgrad.objectives.readouts import ReadoutClassifier, TailClassifier
from localgrad.objectives.site import Site
from localgrad.parallel.pipeline import Links, PipelineExecutor
from localgrad.parallel.schedule import NUM_BUFFERS, shares
from localgrad.parallel.team import Team
from localgrad.parallel.wire import WIRES, Packet, packed, unpacked
from localgrad.step.checks import check_labels
from localgrad.step.executor import SequentialExecutor, StepResult, Visit, walk
from localgrad.step.local_module import LocalModule, observed_parts, site_of
from localgrad.step.local_step import LocalStep, autocast
from localgrad.step.sharding import OwnRows, check_shardable, gathered, made_whole, put, release, shard, swap
from localgrad.step.states import LearnerPart, LearnerState, describe

_AVERAGED = "averaged/"
"""What the averaged model has of a batch in inference, in a packet."""
K = TypeVar("K")
V = TypeVar("V")


@final
class ParallelLearner(Learner):
    """Trains this process's share of a model's local modules.

    Only the own modules' weights, gradients, optimizer state and average take memory here. Call ``begin`` with the
    number of batches before each epoch, so that batches are received ahead; without it all works, one at a time.

    Args:
        model: any model that ``localgrad.split`` takes, on the processor, made alike in every process.
        team: from ``Team.join``; by default this process's own, as torchrun started it.
        num_buffers: batches that may be on their way at each end of a link.
        wire: how features travel: ``same``, or ``bf16`` in half the bytes.
        shard: share each module's weights, gradients and optimizer state out among its replicas (FSDP2).
        **settings: as for ``LocalLearner``, but for ``device``, ``offload``, ``overlap`` and ``global_checkpoint``.

    Raises:
        ParallelError: more ranks than local modules, what needs several modules in one place (a weight that they share,
            a readout of the model's output embedding), or replicas of a part with state that nobody knows how to
            average (running statistics of norms are averaged); or an average of layers with spectral norm, or a model
            that was split by watching, under ``shard``.
    """

    is_parallel = True

    def __init__(
        self,
        model: nn.Module,
        *,
        team: Team | None = None,
        num_buffers: int = NUM_BUFFERS,
        wire: str = "same",
        shard: bool = False,
        ema_decay: float | None = None,
        **settings: Any,
    ) -> None:
        if wire not in WIRES:
            raise RecipeError(f"wire: unknown {wire!r}; take {' or '.join(WIRES)}.")
        if num_buffers < 1:
            raise RecipeError(f"num_buffers must be at least 1, got {num_buffers}.")
        given = {**settings, "ema_decay": ema_decay, "shard": shard, "parallel": True}
        rules.check(given, ParallelError)
        self.team = team or Team.join()
        super().__init__(model, **settings)
        self._build()
        self.shares = shares_of(self.plan.activation_bytes or [1] * self.plan.num_modules, self.team.num_ranks)
        self._refuse(compiled=bool(self._settings["compile"]), shard=shard)
        if self.team.num_replicas > 1:
            self._refuse_own_ways()
        self._settle()
        self.skeleton: list[LocalModule] | None = None  # of the own modules: whole shapes, where they are sharded
        self._average_over_replicas(by_rows=shard)
        self._own_parts = OwnRows([part for index in self.own for part in self.modules[index].parts])
        if shard and ema_decay is not None and has_spectral_norms(self._own_parts):
            raise ParallelError(
                f"{arg('ema_decay', ema_decay)} doesn't go with {arg('shard')}: the average of a layer with spectral "
                "norm needs whole weights, and each process has rows; leave one of them out."
            )
        self._ema = make_ema(self._own_parts, ema_decay, on_host=False)
        self._say_what_differs()
        self._remember()  # tensors were moved, and with replicas cut into rows
        self.links = Links(self.team.place, self.team.device, num_buffers=num_buffers, wire=wire)

    def _refuse(self, *, compiled: bool, shard: bool) -> None:
        kinds = (NextClassifier, TailClassifier)
        averaged = any(net.averages for own in self.modules for net in own.modules() if isinstance(net, kinds))
        reads = any(isinstance(net, ReadoutClassifier) for own in self.modules for net in own.modules())
        if self.team.num_ranks > 1 or shard:  # else all modules are here, whole
            rules.check({"parallel": True, "classifier": "readout" if reads else None}, ParallelError)
        known = {"parallel": True, "teacher_share": self.uses("teacher"), "weights": "ema" if averaged else None}
        rules.check({**known, "compile": compiled, "replicas": self.team.num_replicas}, ParallelError)
        for carried in self.route.into(0):
            if not carried.travels:
                raise ParallelError(
                    f"{carried.name}: a term looks at it, and it can't go from process to process; train in one."
                )
        self._refuse_shared()
        if shard and self.backbone.trunk is not None:
            raise ParallelError(
                f"{arg('shard')}: {type(self.model).__name__} was split by watching it run, and its own code between "
                f"blocks needs whole weights; leave {arg('shard')} out."
            )

    def _refuse_shared(self) -> None:
        """Refuse weights that modules of several processes read: each would need the others' updates in every step."""
        for each in self.backbone.shared_across(self.plan.boundaries):
            ranks = {rank for rank, share in enumerate(self.shares) for module in each.modules if module in share}
            if each.tensor.requires_grad and (len(ranks) > 1 or self.team.num_replicas > 1):
                where = "of several processes" if len(ranks) > 1 else "that replicas average on their own"
                raise ParallelError(
                    f"{arg('shared', self.shared)}: {each.name} is read by local modules {where}; train in one process "
                    "(LocalLearner), choose modules=[...] that keep its readers in one, or untie it in the model."
                )

    def _refuse_own_ways(self) -> None:
        """Refuse state that follows a replica's own images, and of which nobody knows how to average it."""
        for name, part, seen in observed_parts(self.backbone):
            for path in seen.by_images:
                net = part.get_submodule(path)
                if not isinstance(net, _NormBase):
                    raise ParallelError(
                        f"{arg('replicas', self.team.num_replicas)}: {type(net).__name__} in {name} writes what it "
                        f"sees of the images into itself, and each replica sees others; take {arg('replicas', 1)}."
                    )

    def _average_over_replicas(self, *, by_rows: bool) -> None:
        """Let replicas average gradients: each of whole modules (DDP, in ``LocalStep``), or of its rows (FSDP2)."""
        if not by_rows:
            self._twins = self.team.twins
            if self._twins is not None:  # DDP has to know whether to wait for gradients that never come
                for index in self.own:
                    unread = unread_parameters(self.modules[index], self.sites[index], self.backbone)
                    self.modules[index].has_unread = bool(unread)
            return
        twins = self.team.twins_mesh
        if twins is None:
            raise ParallelError(
                f"{arg('shard')}: there is one replica only, and nobody to share with; add {arg('replicas', 2)}."
            )
        own = [self.modules[index] for index in self.own]
        self.skeleton = [copied.to("meta") for copied in copy_without_hooks(own)]
        for module in own:
            shard(module, twins)
        self.backbone.follow_parts()

    def _settle(self) -> None:
        """Move the own modules to the device, and free all others."""
        own = [part for index in self.own for part in self.modules[index].modules()]
        kept = [(table, dict(table)) for part in own for table in (part._parameters, part._buffers)]
        for index, module in enumerate(self.modules):
            if index not in self.own:
                module.to("meta")  # shapes stay, for checks of checkpoints
        for table, tensors in kept:  # some parts belong to several modules, such as tables of rotations
            cast(Attributes, table).update(tensors)
        for index in self.own:
            self.modules[index].to(self.team.device)
        self.backbone.follow_parts()
        if self.backbone.trunk is not None:  # what belongs to no part: every process has it
            inside = {id(tensor) for module in self.modules for tensor in (*module.parameters(), *module.buffers())}
            for part in self.model.modules():
                for name, buffer in part._buffers.items():
                    if buffer is not None and id(buffer) not in inside:
                        part._buffers[name] = buffer.to(self.team.device)

    @property
    def own(self) -> range:
        """The local modules that this process trains."""
        return self.shares[self.team.place.rank]

    @property
    def sent_bytes_per_step(self) -> int:
        """What the last training step sent on."""
        return self._pipeline.sent_bytes_per_step

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self._ema is not None

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.team.device

    @property
    def sites(self) -> list[Site]:
        """Where each local module stands."""
        boundaries = self.plan.boundaries
        return [site_of(self.backbone, boundaries, index, loss=self.loss) for index in range(len(boundaries) + 1)]

    def configure_optimizers(self, factory: Factories) -> None:
        """Make one optimizer for each of the own modules. As for ``LocalLearner``; call it in every process."""
        steps = self._make_steps(factory)
        if self.skeleton is not None:
            for step in steps:
                check_shardable(step.optimizer)
        self.optimizer_factory = factory
        self._seed(steps)
        executor = SequentialExecutor(steps, first=self.own.start, route=self.route)
        self._pipeline = PipelineExecutor(executor, self.links)
        self._take_executor(executor)

    def _seed(self, steps: Sequence[LocalStep]) -> None:
        super()._seed(steps)
        if self.team.num_replicas > 1:
            for index, step in zip(self.own, steps, strict=False):
                step.seed = (self.seed, index, self.team.replica)

    def begin(self, num_batches: int, *, start: int = 0) -> None:
        """Begin an epoch: how many batches it has, and the first one of them to be trained on, from 0."""
        self.links.finish()
        self.links.begin(start, num_batches - 1)

    def step(self, images: Any, labels: Tensor | None = None) -> StepResult:
        """Train the own modules on the next batch.

        Args:
            images: [B, C, H, W], or what else the model is called with; those of the first rank are used.
            labels: class indices int64 [B], soft targets [B, num_classes], or what else the loss takes; those of the
                first rank are used. With several replicas none may be ignored (-100): each counts its own, and all
                weigh alike.

        Returns:
            Figures of the own modules.

        Raises:
            LocalgradError: as ``LocalLearner.step``.
        """
        batch = LocalBatch.of(images, labels)
        assert batch.images is not None, "it has just begun"
        check_labels(batch.labels, batch.images, self.backbone.num_classes, self.loss)
        is_mixed = self.loss.is_of_classes and batch.labels.ndim == 2
        targets = batch.labels.argmax(dim=1) if is_mixed else None
        return self.share(LocalBatch(batch.images, batch.labels, targets=targets, given=batch.given))

    def share(self, batch: LocalBatch | None = None) -> StepResult:
        """As ``step``, on a batch that gives its images away; only the first rank gives one.

        Raises:
            RecipeError: no optimizers yet.
        """
        if self._executor is None:
            raise no_optimizers()
        for index in self.own:
            release(self.modules[index])  # after a step that failed, rows are what is trained
        self.check_ready(self._executor.steps)
        if batch is not None and self.team.place.rank == 0:
            self._check_batch(batch)
        self._in_training()
        received, unsound = self._pipeline.receive(batch)
        received.number, received.loss = self.num_steps, self.loss
        if self.team.place.rank == 0:
            self.route.begin(received, self)
        result = self._pipeline.step(received, unsound)
        for index in self.own:
            release(self.modules[index])  # a frozen one has no backward pass, after which that is done
        self._count_step()
        if self._ema is not None:
            self._ema.update(self._own_parts, step=self.num_steps)
        return result

    def _check_batch(self, batch: LocalBatch, *, is_part: bool = False) -> None:
        first = not self._values_checked
        super()._check_batch(batch, is_part=is_part)
        if first and self.team.num_replicas > 1 and bool((batch.labels == IGNORED).any()):
            raise ParallelError(
                f"labels: some are {IGNORED}, ignored; replicas weigh alike, however many labels count in each: leave "
                f"those images out, or {arg('replicas')}."
            )

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Make the running statistics of batch and instance norms, and of their average, the mean over the replicas.

        In a step each replica's norms see its own images, as they see the parts of a batch with ``accumulation``.
        Running statistics are linear in what was seen, so they may go their own ways until someone looks at them:
        before evaluating and saving. All replicas call this together.
        """
        if self.team.twins is None:
            return
        places = [self.modules[index] for index in self.own] + ([] if self._ema is None else [self._ema.module])
        norms = [net for place in places for net in place.modules() if isinstance(net, _NormBase)]
        for norm in dict.fromkeys(norms):
            for buffer in (norm.running_mean, norm.running_var):
                if buffer is not None:
                    dist.all_reduce(buffer, group=self.team.twins)
                    buffer.div_(self.team.num_replicas)

    @torch.no_grad()
    def infer(self, images: Any, targets: Tensor | None) -> tuple[dict[int, Tensor], Tensor]:
        """Logits of the own modules' classifiers for the next batch; call ``eval()`` first, and ``begin``.

        Where an average is kept, the last module's logits are those of the averaged model.

        Args:
            images: [B, C, H, W], or what else the model is called with; the first rank's are used.
            targets: class indices int64 [B], or what else is to come along to the last rank, [B, ...].

        Returns:
            Logits [B, num_classes] by module, where it has a classifier, and the targets.
        """
        packet: Packet = self.links.receive()
        if packet:
            own = {name: value for name, value in packet.items() if not name.startswith(_AVERAGED)}
            others = {name.removeprefix(_AVERAGED): packet[name] for name in packet.keys() - own.keys()}
            batch, averaged = unpacked(own), unpacked(others) if others else None
        else:
            assert images is not None and targets is not None, "the first rank has the images"
            batch, averaged = self._inferred(images, targets), None
            if self.averages:
                averaged = self._inferred(images, targets)
        found = {}
        with autocast(self.device.type, self.precision):
            for visit in self._walk(batch):
                with gathered(visit.module):
                    passed = visit.module.run_parts(visit.received)
                    logits = visit.module.objective.classify(passed.outputs, batch.mask)
                if logits is not None:
                    found[visit.index] = logits
                visit.hand_on(passed.handed_on)
            if averaged is not None:
                with self._averaged():
                    for visit in self._walk(averaged):
                        with gathered(visit.module):
                            passed = visit.module.run_parts(visit.received)
                            logits = visit.module.objective.classify(passed.outputs, averaged.mask)
                        visit.hand_on(passed.handed_on)
                if self.links.sender is None and logits is not None:
                    found[self.own[-1]] = logits
        if self.links.sender is not None:
            onward = packed(batch)
            if averaged is not None:
                onward |= {_AVERAGED + name: tensor for name, tensor in packed(averaged).items()}
            self.links.send(onward)
        self.links.done()
        return found, batch.labels

    def _inferred(self, images: Any, targets: Tensor) -> LocalBatch:
        batch = LocalBatch.of(images, targets)
        batch.carried = {"mask": mask_of(batch, self)} if self.uses("mask") else {}
        return batch

    def _walk(self, batch: LocalBatch) -> Iterator[Visit[LocalModule]]:
        """Go through the own modules, with what goes along with the batch."""
        modules = [self.modules[index] for index in self.own]
        modules[0].begin_batch(batch)
        yield from walk(modules, batch, first=self.own.start)
        modules[0].note_context(batch)

    def attend(self, num_batches: int) -> None:
        """Gather weights as ``infer`` does, for replicas that have more batches than this one."""
        for _ in range(num_batches if self.skeleton is not None else 0):
            for averaged in (False, True)[: 1 + self.averages]:
                with self._averaged() if averaged else contextlib.nullcontext():
                    for index in self.own:
                        with gathered(self.modules[index]):
                            pass

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the own modules have their averaged weights."""
        assert self._ema is not None, "an average is kept"
        mine, theirs = ([*net.parameters(), *net.buffers()] for net in (self._own_parts, self._ema.module))
        pairs = list(zip(mine, theirs, strict=True))  # each once, or a shared weight would be exchanged back
        for tensor, other in pairs:
            swap(tensor, other)
        try:
            yield
        finally:
            for tensor, other in pairs:
                swap(tensor, other)

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> LearnerPart:
        """This process's part of the state, ``merged`` makes the whole of all. Replicas call this together."""
        steps = self._executor.steps if self._executor else ()
        own = list(self.own)
        optimizers = [made_whole(step.optimizer.state_dict()) for step in steps]
        return {
            "model": self.own_weights(),
            "objectives": {index: self.objective_weights(index) for index in own},
            "optimizers": dict(zip(own, optimizers, strict=False)),
            "scalers": {index: step.scaler.state_dict() for index, step in zip(own, steps, strict=False)},
            "averaged_model": None if self._ema is None else self.own_weights(averaged=True),
            "num_steps": self.num_steps,
            "seed": self.seed,
            "boundaries": list(self.plan.boundaries),
            "objective": describe(self.objective),
            "optimizer_classes": {
                index: type(step.optimizer).__name__ for index, step in zip(own, steps, strict=False)
            },
        }

    def objective_weights(self, index: int) -> dict[str, Tensor]:
        """The state of an own module's objective. All its replicas call this together."""
        return made_whole(self.modules[index].objective.state_dict())

    def own_weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """The own modules' part of the model's weights, or of their average, in the model's own naming.

        All replicas call this together.
        """
        assert self._ema is not None or not averaged, "an average is kept"
        source = self._ema.module if averaged and self._ema is not None else self._own_parts
        loose = self._loose if self.team.place.rank == 0 else {}
        return loose | {name: made_whole(value) for name, value in self._named(source).items()}

    @property
    def _loose(self) -> dict[str, Tensor]:
        """What the model's state has and none of its parts: buffers of its own, alike in all processes."""
        tensors = [tensor for part in self.backbone.parts for tensor in (*part.parameters(), *part.buffers())]
        inside = set(map(id, tensors))
        return {name: each for name, each in self.model.state_dict(keep_vars=True).items() if id(each) not in inside}

    def _named(self, source: OwnRows) -> dict[str, Tensor]:
        names = {id(tensor): name for name, tensor in self.model.state_dict(keep_vars=True).items()}
        mine = self._own_parts.parts.state_dict(keep_vars=True).values()
        return {
            names[id(tensor)]: value for tensor, value in zip(mine, source.parts.state_dict().values(), strict=True)
        }

    def _take_weights(self, weights: dict[str, Tensor], averages: dict[str, Tensor] | None) -> None:
        self.load_own_weights(weights, averages=averages)

    @torch.no_grad()
    def load_own_weights(self, weights: dict[str, Tensor], *, averages: dict[str, Tensor] | None) -> None:
        """Put the own modules' part of a whole model's weights, and of its average, in place."""
        for name, value in (self._loose | self._named(self._own_parts)).items():
            put(value, weights[name])
        if self._ema is not None:
            assert averages is not None, "an average is kept"
            for name, value in self._named(self._ema.module).items():
                put(value, averages[name])

    def whole_state_dict(self) -> dict[str, Tensor] | None:
        """The whole model's weights on rank 0 (the averaged ones, where an average is kept); ``None`` on the others.

        All processes call this together.
        """
        own = self.own_weights(averaged=self._ema is not None)
        parts = self.team.to_speaker({name: value.cpu() for name, value in own.items()})
        if parts is None:
            return None
        found = {name: value for part in parts[: self.team.num_ranks] for name, value in part.items()}
        return {name: found[name] for name in self.model.state_dict()}


def unread_parameters(module: LocalModule, site: Site, backbone: Backbone) -> list[str]:
    """Names of a module's trainable parameters that its loss doesn't depend on, found on tensors without memory."""
    main, labels = backbone.like(2), site.loss.made_up(2, backbone)
    with by_shapes_alone():
        fake_mode, fake = fake_copy(module)
        with fake_mode:
            batch = empty_batch(
                site,
                Route([module.objective.uses]).into(0),
                2,
                backbone.dtype,
                labels=torch.empty(labels.shape, dtype=labels.dtype),
                main=main,
                context=None if fake.under_way is None else fake.under_way.known,
            )
            fake.train()(batch.features, batch).loss.backward()
    return [name for name, weight in fake.named_parameters() if weight.requires_grad and weight.grad is None]


def merged(parts: Sequence[LearnerPart]) -> LearnerState:
    """The state of a whole learner, as from ``LocalLearner.state_dict``, made of the parts of all ranks in order."""
    first = parts[0]
    averages = [part["averaged_model"] for part in parts]
    whole: LearnerState = {
        "model": _joined(part["model"] for part in parts),
        "objectives": _listed(part["objectives"] for part in parts),
        "optimizers": _listed(part["optimizers"] for part in parts),
        "scalers": _listed(part["scalers"] for part in parts),
        "averaged_model": None if averages[0] is None else _joined(own for own in averages if own is not None),
        "num_steps": first["num_steps"],
        "seed": first["seed"],
        "boundaries": first["boundaries"],
    }
    if "objective" in first:
        whole["objective"] = first["objective"]
        whole["optimizer_classes"] = _listed(part["optimizer_classes"] for part in parts)
    return whole


def _joined(parts: Iterable[Mapping[K, V]]) -> dict[K, V]:
    return {key: value for part in parts for key, value in part.items()}


def _listed(parts: Iterable[Mapping[int, V]]) -> list[V]:
    """What each local module has, in their order."""
    return [value for _, value in sorted(_joined(parts).items(), key=lambda pair: pair[0])]


def shares_of(costs: Sequence[int], num_ranks: int) -> tuple[range, ...]:
    """Which local modules each rank of a replica has, by the modules' costs.

    Raises:
        ParallelError: more ranks than modules.
    """
    if num_ranks > len(costs):
        raise ParallelError(
            f"{arg('parallel', 'modules')}: {num_ranks} processes for {len(costs)} local modules; take "
            f"{arg('modules', num_ranks)}, {len(costs)} processes, or {arg('replicas')}."
        )
    return shares(costs, num_ranks)
