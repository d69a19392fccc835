"""The training loop: epochs over batches, validation, selection, checkpoints, and nothing about how a step is done.

Selection is honest: a validation part of the training set chooses the best epoch, and the trainer never sees the test
set. All that a run needs to go on bit for bit is in one state. Losses stay on the device. Once a second (and before
every checkpoint) they are read, and a loss that is no longer finite stops the run; to name the first one, the device
itself keeps the number of the first bad batch of each term.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, TypeVar, Unpack, cast, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from localgrad.errors import CheckpointError, DataError, DivergenceError, MemoryExceeded, arg
from localgrad.learner import Learner, LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.step.executor import Attempt, StepResult, free_cache, out_of_memory
from localgrad.step.sharding import rows_of
from localgrad.step.states import load_weights
from localgrad.training.data import Batches
from localgrad.training.events import EpochEnded, Event, Progressed, Sink, StoppedEarly
from localgrad.training.folder import RunFolder, load_saved_weights
from localgrad.training.frozen_features import FrozenFeatures
from localgrad.training.health import HealthCheck
from localgrad.training.optim import Schedule
from localgrad.training.saved import PositionState, RandomStates, Selection, Standing, SumsState, TrainerState
from localgrad.units import format_bytes

SECONDS_BETWEEN_READINGS = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818  # not an error: the run was saved and can go on
    """Ctrl-C or SIGTERM arrived; the run was saved in its folder, to be resumed."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, and saved in {folder}")
        self.signal_number = signal_number
        self.folder = folder


@dataclass
class Position:
    """Where a run stands; all plain numbers, saved with every checkpoint.

    Attributes:
        epoch: under way, from 0.
        batch: batches done in it.
        best_epoch: ``None`` before the first validation.
        best_accuracy: its validation accuracy; ``None`` without validation images.
        num_images: trained on so far.
        train_seconds: spent training, without validation.
        seconds: spent in all.
        last_losses: each local module's terms, averaged over the last complete epoch that trained it.
        finished: in sequential mode, (epoch of its own, validation accuracy) selected for each finished module.
        extended_at: epochs that were complete when the run last got another number of them; 0 if it never did.
    """

    epoch: int = 0
    batch: int = 0
    best_epoch: int | None = None
    best_accuracy: float | None = None
    num_images: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    last_losses: list[dict[str, float]] = field(default_factory=list)
    finished: list[tuple[int, float | None]] = field(default_factory=list)
    extended_at: int = 0


@final
class EpochSums:
    """Sums over the batches of an epoch, kept on the device, of losses named by (module, term)."""

    def __init__(self, names: Sequence[tuple[int, str]], device: torch.device) -> None:
        self.names = list(names)
        self.losses = torch.zeros(len(names), dtype=torch.float64 if device.type != "mps" else None, device=device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.int64, device=device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=device)
        self.num_batches = 0
        self.num_global = 0
        self.num_images = 0
        self.has_logits = False

    def add(self, result: StepResult) -> None:
        """Add one batch, without waiting for the device."""
        targets = result.targets
        assert targets is not None, "the data path gives them"
        losses = torch.stack([term.float() for terms in result.terms for term in terms.values()])
        missing = len(self.names) - len(losses)
        if missing:  # an end-to-end step has the last module's losses only
            losses = F.pad(losses, (missing, 0))
            self.num_global += 1
        bad = ~torch.isfinite(losses) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, self.num_batches)
        self.losses += losses
        self.has_logits = result.logits is not None
        if result.logits is not None:
            self.num_correct += (result.logits.argmax(dim=1) == targets).sum()
        self.num_batches += 1
        self.num_images += len(targets)

    def means(self, num_modules: int) -> list[dict[str, float]]:
        """Each module's terms by name, averaged over the batches so far."""
        values: list[dict[str, float]] = [{} for _ in range(num_modules)]
        last = self.names[-1][0]
        for (module, term), total in zip(self.names, self.losses.tolist(), strict=True):
            # Of an end-to-end step there is the last module's task loss alone.
            is_global = module == last and term == "task"
            count = self.num_batches if is_global else self.num_batches - self.num_global
            if count:
                values[module][term] = total / count
        return values

    def first_failure(self) -> tuple[int, list[tuple[int, str]]] | None:
        """The first batch of the epoch with a loss that isn't finite, and the (module, term) of those in it."""
        first_bad = self.first_bad.tolist()
        batches = [batch for batch in first_bad if batch >= 0]
        if not batches:
            return None
        first = min(batches)
        return first, [name for name, batch in zip(self.names, first_bad, strict=True) if batch == first]

    def state_dict(self) -> SumsState:
        """The sums, on the CPU."""
        return {
            "losses": self.losses.cpu(),
            "num_correct": self.num_correct.cpu(),
            "num_batches": self.num_batches,
            "num_global": self.num_global,
            "num_images": self.num_images,
            "has_logits": self.has_logits,
        }

    def load_state_dict(self, state: SumsState) -> None:
        """Take up saved sums."""
        self.losses.copy_(state["losses"])
        self.num_correct.copy_(state["num_correct"])
        self.num_batches = state["num_batches"]
        self.num_global = state.get("num_global", 0)
        self.num_images = state["num_images"]
        self.has_logits = state.get("has_logits", True)  # as it was before modules without a classifier could be alone


class Common(TypedDict):
    """What every trainer is given; see ``Trainer``."""

    train: Batches
    val: Batches | None
    epochs: int
    folder: RunFolder
    sinks: NotRequired[Sequence[Sink]]
    patience: NotRequired[int | None]


class Trainer(ABC):
    """Trains a learner on batches, validates, selects and saves; how, its classes say.

    Args:
        learner: with its optimizers configured.
        schedule: of the learning rates.
        train: training batches.
        val: validation batches, or ``None``: then the last epoch is the best.
        epochs: length of the run.
        folder: where checkpoints go.
        sinks: take the events.
        patience: epochs without a better validation accuracy after which the run is over; by default it never is.

    Attributes:
        health: what measures the modules' health after some epochs; nothing by default.
        evaluation_batch: images that are evaluated together, at most; as many as the batches have, by default.
        with_less: asked where memory ran out in something that changes no weights, with what it was and what would take
            less; answers whether to do that. By default nobody is asked, and the run ends.
    """

    epochs_per_module: int | None = None
    """Where modules are trained one after another, the epochs of each."""

    def __init__(
        self,
        *,
        learner: Learner,
        schedule: Schedule | None,
        train: Batches,
        val: Batches | None,
        epochs: int,
        folder: RunFolder,
        sinks: Sequence[Sink] = (),
        patience: int | None = None,
    ) -> None:
        self.learner = learner
        self.schedule = schedule
        self.train = train
        self.val = val
        self.epochs = epochs
        self.folder = folder
        self.sinks = tuple(sinks)
        self.patience = patience
        self.health: HealthCheck | None = None
        self.evaluation_batch: int | None = None
        self.with_less: Callable[[str, str], bool] = lambda place, less: False
        self.position = Position()
        self._sums = self._new_sums()
        self._signal: int | None = None
        # Epoch and accuracy of the best weights on disk, where the checkpoint is from before that epoch's end: the run
        # was killed between the two, and an epoch that is trained in another way now may be another epoch's inferior.
        self._ahead: tuple[int, float | None] | None = None

    def fit(self) -> None:
        """Train from the current position to the last epoch, or until none was better for too long.

        Raises:
            DivergenceError: a loss is no longer finite; the last checkpoint is from before.
            Interrupted: Ctrl-C or SIGTERM; the run was saved where it stood.
            MemoryExceeded: memory ran out; an epoch that was trained by then is saved.
        """
        self._limit(self.val)
        with self._catching_signals():
            while self.position.epoch < self.epochs and not self.has_stopped:
                self._prepare()
                start = time.perf_counter()
                self._train_epoch()
                train_seconds = time.perf_counter() - start
                self._finish_epoch(start, train_seconds)
                self._leave_if_told()
        self._end()
        if self.has_stopped:
            self._emit(StoppedEarly(epoch=self.position.epoch - 1, epochs=self.epochs, num_waited=self._waited()))
        self._settle_best()

    @property
    def has_stopped(self) -> bool:
        """Whether the run is over before its last epoch, as none was better for too long.

        It is told by the saved position alone, so that all processes, and a run that goes on, decide alike.
        """
        position = self.position
        return position.batch == 0 and position.epoch < self.epochs and self._has_waited(position.epoch)

    def _has_waited(self, num_epochs: int) -> bool:
        """Whether, with so many epochs complete, none was better for too long; a run that was extended waits anew."""
        position = self.position
        if self.patience is None or position.best_epoch is None:
            return False
        return num_epochs - max(position.best_epoch + 1, position.extended_at) >= self.patience

    def _waited(self) -> int:
        """Complete epochs since the best one."""
        assert self.position.best_epoch is not None, "an epoch was judged"
        return self.position.epoch - 1 - self.position.best_epoch

    def load_state_dict(self, state: TrainerState) -> None:
        """Take up a saved state.

        Raises:
            CheckpointError: it is of another model, or a part is missing; all is as it was.
        """
        before = self.position, self._sums, all_random_states()
        try:
            self.learner.check_state_dict(state["learner"])  # first, since its reasons say the most
            self.position = Position(**state["position"])
            self._sums = self._new_sums()
            self._load_sums(state["sums"])
            _restore_random_state(state["random"])
            self.learner.load_state_dict(state["learner"])  # last: it is all or nothing by itself
            on_disk = self.folder.read_best()
            self._ahead = on_disk if on_disk is not None and on_disk[0] >= self.position.epoch else None
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error) is not None:
                raise
            self.position, self._sums = before[:2]
            _restore_random_state(before[2])
            raise CheckpointError(
                f"checkpoint {self.folder.last}: it doesn't fit this run ({error})",
                "restore the run's own, or start the run again in another folder",
            ) from error

    def _load_sums(self, state: SumsState) -> None:
        self._sums.load_state_dict(state)

    def _standing(self, sums: SumsState) -> Standing:
        """Where the run stands, but for its learner."""
        position = cast(PositionState, asdict(self.position))
        return {"position": position, "sums": sums, "random": all_random_states()}

    @abstractmethod
    def load_best(self) -> None:
        """Put the best epoch's weights into the learner (the averaged ones, where an average is kept)."""

    def _keep_best(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights of the epoch that is judged, the best so far."""
        position = self.position
        assert position.best_epoch is not None, "it is the best so far"
        self.folder.save_best(weights, position.best_epoch, position.best_accuracy)

    def _settle_best(self) -> None:
        """Take for the best what the best weights are of, where their epoch wasn't trained to the same end again."""
        if self._ahead is not None:
            self.position.best_epoch, self.position.best_accuracy = self._ahead
            self._ahead = None

    @abstractmethod
    def evaluate(self, batches: Batches) -> tuple[float, list[float | None]]:
        """Accuracy of the whole model and of each local module's own classifier."""

    def test(self, batches: Batches) -> tuple[float, list[float | None]]:
        """Accuracies on the test set, as ``evaluate`` gives them.

        Raises:
            MemoryExceeded: memory ran out, and nothing less was wanted or would do.
        """
        self._limit(batches)
        return self._unchanging("the test", lambda: self.evaluate(batches), partial(halve, batches))

    def details(self) -> tuple[str, ...]:
        """Lines about this way of training, for the start of a run."""
        return ()

    def selection(self) -> Selection:
        """What was selected, for the summary; the selected weights are in the learner."""
        position = self.position
        return {
            "val_accuracy": position.best_accuracy,
            "best_epoch": position.best_epoch,
            "epochs": self.epochs,
            "patience": self.patience,
            "num_epochs": position.epoch,
            "stopped_early": self.has_stopped,
            "extended_at": position.extended_at,
        }

    # ------------------------------------------------------------------- what is trained: said otherwise by others

    @property
    def _trained(self) -> range:
        """The local modules that are trained at the current position."""
        return self.learner.own

    def _prepare(self) -> None:  # noqa: B027  # most have nothing to prepare
        """Whatever must be ready before an epoch, or the rest of one, is trained."""

    def _end(self) -> None:  # noqa: B027  # most have nothing to let go
        """Let go of what was there for training alone."""

    def _feed(self) -> Iterator[LocalBatch]:
        """The rest of the epoch under way."""
        return self.train.epoch(self.position.epoch, start=self.position.batch)

    def _num_updates(self) -> int:
        """Updates so far of the modules that are trained, for their learning rate."""
        return self.position.epoch * len(self.train) + self.position.batch

    @abstractmethod
    def _step(self, batch: LocalBatch) -> StepResult:
        """Train on one batch."""

    def _count(self, num_images: int) -> int:
        """Images of all processes where one had so many."""
        return num_images

    def _validate(self) -> tuple[float | None, list[float | None]]:
        """The accuracy that selects, and that of each module's own classifier."""
        if self.val is None:
            return None, [None] * len(self.learner.modules)
        return self.evaluate(self.val)

    def _close_epoch(self, losses: list[dict[str, float]]) -> None:
        """Move the position to the next epoch."""
        self.position.last_losses = losses
        self.position.epoch, self.position.batch = self.position.epoch + 1, 0

    def _figures(self) -> tuple[list[dict[str, float]], float | None]:
        """Each module's mean losses by name over the epoch, and accuracy on its batches, where there are logits."""
        sums = self._sums
        accuracy = int(sums.num_correct) / sums.num_images if sums.has_logits else None
        return sums.means(len(self.learner.modules)), accuracy

    @abstractmethod
    def _save_best(self) -> None:
        """Keep the weights of this epoch, which is the best so far."""

    @abstractmethod
    def _save(self) -> None:
        """Write the checkpoint to resume from."""

    def _save_alone(self) -> None:  # noqa: B027  # one of several processes can't, while the others do something else
        """Write the checkpoint to resume from, where this process can by itself."""

    def _stops_now(self) -> bool:
        """Whether to stop after the batch that was just done."""
        return self._signal is not None

    def _leave_if_told(self) -> None:
        """End the run, which is saved, if a signal came."""
        if self._signal is not None:
            raise Interrupted(self._signal, self.folder.path)

    def _measure_health(self, check: HealthCheck, event: EpochEnded) -> None:
        start = time.perf_counter()
        self._emit(self._unchanging("the health check", lambda: check(event), check.shrink))
        self.position.seconds += time.perf_counter() - start

    # ------------------------------------------------------------------------------------------------ the loop

    def _unchanging(self, place: str, run: Callable[[], T], shrink: Callable[[], str | None]) -> T:
        return with_less(place, run, shrink, self.train.device, self.with_less)

    def _limit(self, batches: Batches | None) -> None:
        """Have evaluation batches no larger than there is room for."""
        if batches is not None and self.evaluation_batch is not None:
            batches.batch_size = min(batches.batch_size, self.evaluation_batch)

    def _train_epoch(self) -> None:
        position = self.position
        assert self.schedule is not None, "an epoch is prepared before it is trained"
        self.learner.train()
        start = last_reading = time.perf_counter()
        images_since = 0
        for batch in self._feed():
            self.schedule.at(self._num_updates())
            result = self._step(batch)
            num_images = self._sums.num_images
            self._sums.add(result)
            num_images = self._count(self._sums.num_images - num_images)
            position.batch += 1
            images_since += num_images
            position.num_images += num_images
            now = time.perf_counter()
            if self._stops_now():
                position.train_seconds += now - start
                position.seconds += now - start
                self._stop()
            if now - last_reading > SECONDS_BETWEEN_READINGS:
                self._report(result, images_since / (now - last_reading))
                last_reading, images_since = now, 0

    def _finish_epoch(self, start: float, train_seconds: float) -> None:
        self._check_finite()
        self._check_weights()
        position = self.position
        position.train_seconds += train_seconds
        best = position.best_epoch, position.best_accuracy
        try:
            losses = self._judge_epoch(start)
        except MemoryExceeded:  # the epoch is trained: a run that goes on from here judges it again
            position.best_epoch, position.best_accuracy = best
            self._save_alone()
            raise
        self._close_epoch(losses)
        self._sums = self._new_sums()
        self._save()

    def _judge_epoch(self, start: float) -> list[dict[str, float]]:
        """Validate the epoch that was trained, keep it if it is the best, tell of it, and measure health if it is due.

        Returns:
            Each module's mean losses by name.
        """
        position, trained = self.position, self._trained
        assert self.schedule is not None, "an epoch is prepared before it is trained"
        accuracy, by_module = self._unchanging("validation", self._validate, partial(halve, self.val))
        is_best = accuracy is None or position.best_accuracy is None or accuracy > position.best_accuracy
        if is_best:
            position.best_epoch, position.best_accuracy = position.epoch, accuracy
            self._save_best()
            self._ahead = None
        elif self._ahead is not None and self._ahead[0] <= position.epoch:
            self._settle_best()
        losses, train_accuracy = self._figures()
        soft = self.train.augment is not None and self.train.augment.gives_soft_labels
        seconds = time.perf_counter() - start
        event = EpochEnded(
            epoch=position.epoch,
            losses=tuple(losses),
            module=trained[0] if self.epochs_per_module else None,
            train_accuracy=None if soft else train_accuracy,
            val_accuracy=by_module[-1],
            val_module_accuracy=tuple(by_module),
            learning_rate=self.schedule.learning_rate,
            images_per_second=position.num_images / position.train_seconds,
            seconds=seconds,
            is_best=is_best,
        )
        self._emit(event)  # before saving: a line too many is dropped on resuming, one too few would be missing
        position.seconds += seconds
        last = event.epoch + 1 if self._has_waited(event.epoch + 1) else self.epochs_per_module or self.epochs
        if self.health is not None and self.health.is_due(event.epoch, last):
            self._measure_health(self.health, event)
        return losses

    def _report(self, result: StepResult, images_per_second: float) -> None:
        self._check_finite()
        losses = tuple(torch.stack(result.losses).tolist())
        epoch, batch = self.position.epoch, self.position.batch
        self._emit(Progressed(epoch=epoch, batch=batch, losses=losses, images_per_second=images_per_second))

    def _check_finite(self) -> None:
        failure = self._sums.first_failure()
        if failure is None:
            return
        batch, names = failure
        module = min(index for index, _ in names)
        terms = " and ".join(repr(term) for index, term in names if index == module)
        raise self._diverged(f"the loss of local module {module} is no longer finite (term {terms}", batch)

    def _check_weights(self) -> None:
        """Refuse weights that the last update broke: no loss has shown it yet, and they would be saved."""
        for index in self.learner.own:
            module = self.learner.modules[index]
            finite = torch.stack([torch.isfinite(rows_of(weight)).all() for weight in module.parameters()]).tolist()
            if not all(finite):
                name = next(name for (name, _), good in zip(module.named_parameters(), finite, strict=True) if not good)
                terms = " and ".join(repr(term) for term in module.objective.terms)
                raise self._diverged(
                    f"the weights of local module {index} are no longer finite ({name}, by an update of term {terms}",
                    self.position.batch - 1,
                )

    def _diverged(self, what: str, batch: int) -> DivergenceError:
        last = self.folder.last
        kept = f"the last good checkpoint is {last}" if last.exists() else "no epoch was complete"
        return DivergenceError(
            f"{what}, epoch {self.position.epoch + 1}, batch {batch + 1}); {kept}. Try a lower "
            f"{arg('lr')}, or {arg('clip_grad', 1)}."
        )

    def _stop(self) -> None:
        self._check_finite()
        self._check_weights()
        self._save()
        self._leave_if_told()

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into a flag that is read after the batch; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}  # nohup

        def note(number: int, _frame: object) -> None:
            self._signal = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _new_sums(self) -> EpochSums:
        modules = self.learner.modules
        names = [(index, name) for index in self._trained for name in modules[index].objective.terms]
        return EpochSums(names, self.train.device)

    def _emit(self, event: Event) -> None:
        for sink in self.sinks:
            sink.emit(event)


class TrainerOfAll(Trainer, ABC):
    """What trainers in one process have in common: it has the whole model."""

    learner: LocalLearner

    def load_best(self) -> None:
        """Put the best epoch's weights into the learner (the averaged ones, where an average is kept)."""
        load_best_weights(self.learner, load_saved_weights(self.folder.best))

    def evaluate(self, batches: Batches) -> tuple[float, list[float | None]]:
        """Accuracy of the whole model and of each local module's own classifier."""
        return evaluate(self.learner, batches)

    def state_dict(self) -> TrainerState:
        """Everything needed to go on bit for bit (on the CPU)."""
        standing = self._standing(self._sums.state_dict())
        return cast(TrainerState, {"learner": self.learner.state_dict(), **standing})

    def _save_best(self) -> None:
        self._keep_best(best_weights(self.learner))

    def _save(self) -> None:
        """Write the checkpoint to resume from."""
        self.folder.save_last(self.state_dict())

    def _save_alone(self) -> None:
        """Write the checkpoint to resume from, where this process can by itself."""
        self._save()


@final
class TogetherTrainer(TrainerOfAll):
    """Trains all local modules in every step.

    Args:
        is_global: whether a step is end-to-end, given its number from 0 and how many there are; by default none is.
        frozen: what gives batches from behind frozen blocks; by default they are of images.
        learner: with its optimizers configured.
        schedule: of the learning rates.
        others: as for ``Trainer``.
    """

    def __init__(
        self,
        *,
        learner: LocalLearner,
        schedule: Schedule,
        is_global: Callable[[int, int], bool] | None = None,
        frozen: FrozenFeatures | None = None,
        **others: Unpack[Common],
    ) -> None:
        super().__init__(learner=learner, schedule=schedule, **others)
        self.is_global = is_global or (lambda step, num_steps: False)
        self.frozen = frozen

    def _end(self) -> None:
        if self.frozen is not None:
            self.frozen.drop()

    def details(self) -> tuple[str, ...]:
        """Lines about this way of training, for the start of a run."""
        if self.frozen is None:
            return ()
        return (
            f"frozen blocks run for the first {self.frozen.num_variants} epochs alone; their features, in bf16, take "
            f"{format_bytes(self.frozen.num_bytes)} of disk in {self.frozen.folder}",
        )

    def _feed(self) -> Iterator[LocalBatch]:
        if self.frozen is None:
            return super()._feed()
        return self.frozen.epoch(self.position.epoch, self.position.batch)

    def _step(self, batch: LocalBatch) -> StepResult:
        step, num_steps = self._num_updates(), self.epochs * len(self.train)
        self.learner.at(step / num_steps)
        if self.is_global(step, num_steps):
            return self.learner.global_step_on(batch)
        return self.learner.step_on(batch)


def with_less(
    place: str,
    run: Callable[[], T],
    shrink: Callable[[], str | None],
    device: torch.device,
    goes_on: Callable[[str, str], bool],
) -> T:
    """Run something that changes no weights; where memory runs out, once more with less, if that is wanted.

    Args:
        place: what it is.
        run: does it.
        shrink: has it need less, and says what does; ``None`` where nothing would.
        device: on which it runs.
        goes_on: given both, answers whether to do it again.

    Raises:
        MemoryExceeded: nothing less is wanted or would do.
    """
    while True:
        attempt = Attempt()
        with attempt:
            return run()
        free_cache(device)  # the exception is gone here, and with its frames what they held
        assert attempt.reason is not None, "whatever else went wrong was raised"
        less = shrink()
        if less is None or not goes_on(place, less):
            raise MemoryExceeded(place, attempt.reason)


class InBatches(Protocol):
    """What looks at so many images at once."""

    batch_size: int


def halve(batches: InBatches | None) -> str | None:
    """Halve evaluation batches; accuracies don't depend on how many images are looked at together."""
    if batches is None or batches.batch_size == 1:
        return None
    batches.batch_size //= 2
    return f"{batches.batch_size} images at a time"


@torch.no_grad()
def evaluate(learner: LocalLearner, batches: Batches) -> tuple[float, list[float | None]]:
    """Accuracy of the whole model, from 0 to 1, and of each local module's own classifier (``None`` where it has none).

    Where an average of the weights is kept, the whole model is the averaged one; the classifiers of the modules
    before the last belong to the weights as they are trained. The learner is in evaluation mode afterwards.
    """
    learner.eval()
    counts = Counts()
    for batch in batches.epoch(0):
        logits = list(learner.logits(batch.images))
        if learner.averaged_model is not None:
            logits[-1] = learner.averaged_logits(batch.images)
        for index, values in enumerate(logits):
            counts.add(index, values, batch.targets)
    return whole_of(accuracies_of([counts.read()], len(learner.modules)))


@final
class Counts:
    """How many images each local module's own classifier saw, and had right; counted on the device."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def add(self, index: int, logits: Tensor | None, targets: Tensor) -> None:
        """Count a module's logits [B, K], where it has any, against class indices [B]; a negative one doesn't count."""
        if logits is not None:
            right = (logits.float().argmax(dim=1) == targets).sum()
            found = torch.stack([right, (targets >= 0).sum()])
            self._counts[index] = self._counts[index] + found if index in self._counts else found

    def read(self) -> dict[int, list[int]]:
        """(right, all) of each module that has a classifier."""
        return {index: found.tolist() for index, found in self._counts.items()}


def accuracies_of(counts: Sequence[dict[int, list[int]]], num_modules: int) -> list[float | None]:
    """Each module's accuracy, of what one process counted or several."""
    found: list[float | None] = [None] * num_modules
    for index in range(num_modules):
        parts = torch.tensor([own[index] for own in counts if index in own])
        if len(parts):
            right, total = parts.sum(dim=0).float()
            found[index] = float(right / total) if total else None
    return found


def whole_of(found: list[float | None]) -> tuple[float, list[float | None]]:
    """The whole model's accuracy, which is the last module's, beside all of them.

    Raises:
        DataError: not one image could be read.
    """
    if found[-1] is None:
        raise DataError("Not one of the images to evaluate by can be read; skipped.csv names them.")
    return found[-1], found


def best_weights(learner: LocalLearner) -> dict[str, Tensor]:
    """Weights worth keeping of this epoch: the model's (averaged, where an average is kept), the auxiliary nets'."""
    model = learner.averaged_model or learner.model
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, module in enumerate(learner.modules):
        weights |= {f"objectives.{index}.{name}": value for name, value in module.objective.state_dict().items()}
    return weights


def load_best_weights(learner: LocalLearner, weights: dict[str, Tensor]) -> None:
    """Put weights from ``best_weights`` into a learner, and into its average.

    Raises:
        CheckpointError: they are of another model or partition.
    """
    load_weights(learner.model, below(weights, "model."))
    if learner.averaged_model is not None:
        load_weights(learner.averaged_model, below(weights, "model."))
    for index, module in enumerate(learner.modules):
        load_weights(module.objective, below(weights, f"objectives.{index}."))


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def all_random_states() -> RandomStates:
    """The state of all random number generators that a run may draw from, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "python": (version, list(internal), gauss),
    }


def _restore_random_state(state: RandomStates) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), float(cached)))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
