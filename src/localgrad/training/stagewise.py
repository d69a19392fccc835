"""Sequential mode: local modules trained one after another, each on the cached features of the finished ones.

::

    images ---> module 0, all epochs ---> features on disk ---> module 1, all epochs ---> features on disk ---> ...

One module's weights, auxiliary nets, gradients and optimizer are on the device at a time; the others wait on the
processor, and a finished module's optimizer is gone. That is the lowest peak of all, paid for in accuracy: a module
sees few augmentations of each image, and features that no longer change.

A module is trained for all epochs of the recipe, with a learning rate that starts anew. The first one reads images,
augmented afresh in every epoch. When a module is finished, its best epoch's weights (by validation accuracy of its own
classifier; its last epoch's where it has none) run once, in evaluation mode, over ``cached_epochs`` epochs of what it
was trained on and over the validation images. Variant v is epoch v of the data path. The next module reads variant
``e mod cached_epochs`` in its epoch e; where its objective looks at images too, those of variant v are made once more.

A cache tells the weights that it was made with; one of others, missing or torn is made again, from the images if need
be. So a run can stop anywhere and go on.

Epochs of all modules are counted through in events and checkpoints: epoch e of module k is epoch k * epochs + e.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Unpack, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from localgrad.errors import CheckpointError
from localgrad.formats import Json
from localgrad.learner import Factories, LocalLearner
from localgrad.memory.track import MemoryProfile, simulate
from localgrad.objectives.carried import LocalBatch
from localgrad.step.executor import StepResult, walk
from localgrad.step.local_step import LocalStep, autocast
from localgrad.step.offload import HOST
from localgrad.step.states import StepState, check_optimizer_state, check_scaler_state
from localgrad.training.augment import derive_seed
from localgrad.training.data import Batches
from localgrad.training.events import EpochEnded, FeaturesCached
from localgrad.training.feature_cache import FeatureCache, Rows, open_cache, row_bytes, weights_digest, write_cache
from localgrad.training.fingerprint import identity_of
from localgrad.training.health import HealthCheck
from localgrad.training.optim import Schedule
from localgrad.training.saved import Selection, TrainerState
from localgrad.training.trainer import Common, Counts, Interrupted, TrainerOfAll, accuracies_of, evaluate
from localgrad.units import format_bytes

VAL = "val"


@final
class StagewiseTrainer(TrainerOfAll):
    """Trains a learner's local modules one after another.

    Args:
        learner: on the processor, without optimizers; while it is trained, one module is on the batches' device.
        optimizer: makes a module's optimizer when its turn comes.
        schedule_for: makes its learning rates.
        cached_epochs: differently augmented epochs of features that are kept.
        others: as for ``Trainer``; the epochs are those of each module, and features go to the folder, too.
    """

    def __init__(
        self,
        *,
        learner: LocalLearner,
        optimizer: Factories,
        schedule_for: Callable[[Sequence[Optimizer]], Schedule],
        cached_epochs: int,
        **others: Unpack[Common],
    ) -> None:
        self._own_epochs = self.epochs_per_module = others["epochs"]
        self.num_variants = min(cached_epochs, self._own_epochs)
        self.cache_folder = others["folder"].path / "cache"
        self._optimizer = optimizer
        self._schedule_for = schedule_for
        self._local_step: LocalStep | None = None
        self._inputs: FeatureCache | None = None
        others["epochs"] *= len(learner.modules)
        super().__init__(learner=learner, schedule=None, **others)

    @property
    def index(self) -> int:
        """The module whose turn it is (the last one's, when all are finished)."""
        return min(self.position.epoch // self._own_epochs, len(self.learner.modules) - 1)

    @property
    def optimizer(self) -> Optimizer | None:
        """The only optimizer there is."""
        return None if self._local_step is None else self._local_step.optimizer

    def _end(self) -> None:
        self._inputs = None
        shutil.rmtree(self.cache_folder, ignore_errors=True)

    def state_dict(self) -> TrainerState:
        """Everything needed to go on bit for bit, but the features: those are on disk, or made again."""
        step = self._local_step
        own: StepState | None = None
        if step is not None:
            name = type(step.optimizer).__name__
            own = {
                "optimizer": step.optimizer.state_dict(),
                "scaler": step.scaler.state_dict(),
                "optimizer_class": name,
            }
        return {**super().state_dict(), "local_step": own}

    def load_state_dict(self, state: TrainerState) -> None:
        """Take up a saved state.

        Raises:
            CheckpointError: it is of another model, or a part is missing.
        """
        super().load_state_dict(state)
        try:
            own = state["local_step"]
            if own is None and self.position.epoch < self.epochs and (self._own_epoch or self.position.batch):
                raise ValueError(f"module {self.index} is under way and has no optimizer")
            if own is not None:
                step = self._begin_module()
                saved, kind = own["optimizer"], own.get("optimizer_class")
                check_optimizer_state(step.optimizer, saved, kind, self.index, self.learner.names_of_parameters)
                check_scaler_state(step.scaler, own["scaler"], self.index)
                step.optimizer.load_state_dict(own["optimizer"])
                step.scaler.load_state_dict(own["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder.last}: the optimizer's part doesn't fit this run ({error}); restore the "
                "run's own, or start the run again in another folder."
            ) from error

    def load_best(self) -> None:
        """Put every module's best weights into the learner, the whole of which is on the device afterwards."""
        self._end_module()
        super().load_best()
        gather(self.learner, self.train.device)

    def details(self) -> tuple[str, ...]:
        """Lines about this way of training, for the start of a run."""
        if len(self.learner.modules) == 1:
            return ()
        num_val = 0 if self.val is None else len(self.val.images)
        needed = disk_needed(self.learner, self.train, num_val, self.num_variants)
        return (
            "sequential: one module after another, on cached features of the finished ones",
            f"features on disk: at most {format_bytes(needed)} at a time in {self.cache_folder}, "
            f"{self.num_variants} augmented epochs",
        )

    def selection(self) -> Selection:
        """What was selected: the validation accuracy is the whole model's; best epochs are counted module by module."""
        epochs, found = zip(*self.position.finished, strict=True)
        return {
            "val_accuracy": None if self.val is None else evaluate(self.learner, self.val)[0],
            "best_epoch": epochs[-1],
            "epochs": self._own_epochs,
            "best_epochs": list(epochs),
            "module_val_accuracy": list(found),
            # An image counts when it went through every module, as in any other run.
            "images_per_second": self.position.num_images / len(epochs) / self.position.train_seconds,
        }

    # --------------------------------------------------------------------------------------- what is trained

    @property
    def _trained(self) -> range:
        return range(self.index, self.index + 1)

    def _prepare(self) -> None:
        index = self.index
        if index and self._inputs is None:
            self._inputs = self._cache_of(index - 1)
        if self._local_step is None:
            self._begin_module()
        else:
            place(self.learner, index, self.train.device)  # making a cache anew moved it away

    def _feed(self) -> Iterator[LocalBatch]:
        if not self.index:
            yield from super()._feed()
            return
        start, variant = self.position.batch, self._own_epoch % self.num_variants
        images = self.train.epoch(variant, start=start) if self._looks_at_images else None
        for rows in self._read(self.index, _name(variant), start):
            seen = None if images is None else next(images).images
            batch = LocalBatch(seen, rows.labels, features=rows.features, targets=rows.targets, counts_all=True)
            del rows, seen  # what they hold is the step's to free
            yield batch

    def _num_updates(self) -> int:
        return self._own_epoch * len(self.train) + self.position.batch

    def _step(self, batch: LocalBatch) -> StepResult:
        assert self._local_step is not None
        progress = self._num_updates() / (self._own_epochs * len(self.train))
        self.learner.modules[self.index].objective.at(progress)
        self.learner.check_ready([self._local_step])
        batch.loss = self.learner.loss
        for visit in walk([self._local_step], batch, self.learner.route, first=self.index):
            output = visit.module(visit.received, batch)
            visit.hand_on(output.loss)  # nobody is behind it; what it received may go
        return StepResult(output.logits, (output.loss,), (output.terms,), (output.logits,), batch.targets)

    @torch.no_grad()
    def _validate(self) -> tuple[float | None, list[float | None]]:
        """Accuracy of the trained module's own classifier, on what the finished modules make of the images."""
        counts, module = Counts(), self.learner.modules[self.index]
        if self.val is not None:
            self.learner.eval()
        for rows in self._read(self.index, VAL) if self.val is not None else ():
            with autocast(self.train.device.type, self.learner.precision):
                logits = module.objective.classify(module.features(rows.features))
            if logits is None:
                break
            counts.add(self.index, logits, rows.targets)
        by_module = accuracies_of([counts.read()], len(self.learner.modules))
        return by_module[self.index], by_module

    def _close_epoch(self, losses: list[dict[str, float]]) -> None:
        """Move on; after a module's last epoch its best weights are put into it, before anything is saved."""
        position, index = self.position, self.index
        losses = [terms or before for terms, before in zip(losses, position.last_losses or losses, strict=True)]
        super()._close_epoch(losses)
        if position.epoch % self._own_epochs:
            return
        assert position.best_epoch is not None
        position.finished.append((position.best_epoch - index * self._own_epochs, position.best_accuracy))
        position.best_epoch = position.best_accuracy = None
        super().load_best()
        self._end_module()

    def _measure_health(self, check: HealthCheck, event: EpochEnded) -> None:
        """Measure on the processor, where the whole model has room; the module comes back for its next epoch."""
        gather(self.learner, HOST)
        super()._measure_health(check, event)

    # ------------------------------------------------------------------------------------ modules and features

    @property
    def _own_epoch(self) -> int:
        return self.position.epoch - self.index * self._own_epochs

    @property
    def _looks_at_images(self) -> bool:
        return "images" in self.learner.modules[self.index].objective.uses

    def _begin_module(self) -> LocalStep:
        """Bring the module to the device, and make its optimizer there."""
        place(self.learner, self.index, self.train.device)
        self._local_step = self.learner.local_step(self.index, self._optimizer)
        self.schedule = self._schedule_for([self._local_step.optimizer])
        return self._local_step

    def _end_module(self) -> None:
        """Let go of the module's optimizer and inputs."""
        self._local_step = self.schedule = self._inputs = None

    def _read(self, index: int, part: str, start: int = 0) -> Iterator[Rows]:
        """What a module receives: the images of a part, or the features that stand for them."""
        if index:
            assert self._inputs is not None
            yield from self._inputs.batches(part, self.train.device, start)
            return
        found = self.val.epoch(0) if self.val is not None and part == VAL else self.train.epoch(int(part.split("-")[1]))
        for batch in found:
            yield Rows(batch.images, batch.labels, batch.targets)

    def _cache_of(self, index: int) -> FeatureCache:
        """The features that a finished module gives: as they lie on disk, or else made, and those before dropped."""
        folder, identity = self.cache_folder / f"after-module-{index}", self._identity(index)
        found = open_cache(folder, identity)
        if found is None:
            if index:
                self._inputs = self._cache_of(index - 1)
            start = time.perf_counter()
            place(self.learner, index, self.train.device)
            self.learner.eval()
            parts = [_name(variant) for variant in range(self.num_variants)] + [VAL] * (self.val is not None)
            write_cache(folder, ((part, self._features(index, part)) for part in parts), identity)
            found = open_cache(folder, identity, verify=False)
            assert found is not None, "what was just written can be read"
            self.position.seconds += time.perf_counter() - start
            self._emit(FeaturesCached(module=index, num_bytes=found.num_bytes, seconds=time.perf_counter() - start))
        if index:
            self._inputs = None
            shutil.rmtree(self.cache_folder / f"after-module-{index - 1}", ignore_errors=True)
        return found

    def _features(self, index: int, part: str) -> Iterator[Rows]:
        module = self.learner.modules[index]
        for rows in self._read(index, part):
            if self._signal is not None:
                raise Interrupted(self._signal, self.folder.path)  # saved when the module was finished
            with torch.no_grad(), autocast(self.train.device.type, self.learner.precision):
                features = module.features(rows.features)
            yield rows._replace(features=features)

    def _identity(self, index: int) -> dict[str, Json]:
        """All that a module's features are made of: the weights up to it, and the data path."""
        return {
            "weights": weights_digest(module.parts for module in self.learner.modules[: index + 1]),
            "variants": {_name(v): derive_seed(self.train.seed, "order", v) for v in range(self.num_variants)},
            "precision": self.learner.precision,
            "data": self._data,
        }

    @cached_property
    def _data(self) -> list[Json]:
        return [identity_of(part) for part in (self.train, self.val) if part is not None]


def _name(variant: int) -> str:
    return f"train-{variant}"


def place(learner: LocalLearner, index: int, device: torch.device) -> None:
    """Have one local module on the device, and the others on the processor.

    Optimizers of modules that are moved must be gone, or know no state yet.
    """
    for number, module in enumerate(learner.modules):  # away first: modules may share constants, such as a rope
        if number != index:
            module.to("cpu")
    learner.modules[index].to(device)


def gather(learner: LocalLearner, device: torch.device) -> None:
    """Have the whole learner on the device."""
    learner.backbone.to(device)
    for module in learner.modules:
        module.to(device)


def disk_needed(learner: LocalLearner, train: Batches, num_val: int, cached_epochs: int) -> int:
    """The most bytes that cached features take at a time: a module's, and those that they are made from."""
    soft = train.augment is not None and train.augment.gives_soft_labels
    sizes = [0]
    for span in learner.plan.spans[:-1]:
        num_values = math.prod(learner.backbone.layouts[span.stop].shape)
        num_train = cached_epochs * len(train) * train.batch_size
        own = num_train * row_bytes(num_values, train.info.num_classes if soft else None)
        sizes.append(own + num_val * row_bytes(num_values, None))
    return max(a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True))


def estimate_stages(
    learner: LocalLearner, batch_size: int, optimizer: Factories, device: torch.device
) -> list[MemoryProfile]:
    """Predict the memory of each local module's step on its own, on fake tensors; the learner is not touched."""
    return [estimate_stage(learner, index, batch_size, optimizer, device) for index in range(len(learner.modules))]


def estimate_stage(
    learner: LocalLearner, index: int, batch_size: int, optimizer: Factories, device: torch.device
) -> MemoryProfile:
    """Predict the memory of one local module's step on its own."""
    bare = copy.copy(learner)  # without compiled code, which a fake copy can't hold
    bare._settings = {**learner._settings, "compile": False}
    step = bare.local_step(index, optimizer)
    step.device_type = HOST.type  # where copies are, of an outline's weights, too
    images = (batch_size, *learner.backbone.input_size)
    span = learner.plan.spans[index]
    inputs = images if index == 0 else (batch_size, *learner.backbone.layouts[span.start].shape)
    looks, dtype = "images" in learner.modules[index].objective.uses, learner.backbone.dtype
    make = optimizer if callable(optimizer) else optimizer[index]
    seen: set[int] = set()

    def run(copied: LocalStep, labels: Tensor) -> object:
        if id(copied) not in seen:  # anew: a copy lacks what bitsandbytes' keep beside their state
            seen.add(id(copied))
            copied.optimizer = make([weight for group in copied.optimizer.param_groups for weight in group["params"]])
        if index == 0:
            received = torch.empty(inputs, dtype=dtype)
            return copied(received, LocalBatch(received if looks else None, labels))
        compared = torch.empty(images, dtype=dtype) if looks else None
        return copied(torch.empty(inputs, dtype=dtype), LocalBatch(compared, labels))

    return simulate(
        step, run, inputs={"labels": ((batch_size,), torch.int64)}, device="cuda" if device.type == "cuda" else "cpu"
    )
