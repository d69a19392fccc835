"""The training loop of several processes: the same loop in each, on the batches that reach it.

What differs from ``Trainer``: the first rank reads the data and the others receive them; figures and weights are
gathered where one process must have them all; checkpoints are written in parts, one a rank, and count once all of them
lie there. Every decision (the best epoch, the end) is made of gathered figures, so that all processes decide alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack, cast, final

import torch
from torch import Tensor

from localgrad.errors import DivergenceError, LocalgradError
from localgrad.objectives.carried import LocalBatch
from localgrad.parallel.parallel_learner import ParallelLearner, merged
from localgrad.parallel.watch import GONE, Fault, Watch
from localgrad.step.executor import StepResult
from localgrad.step.states import load_weights
from localgrad.training.data import Batches
from localgrad.training.folder import load_saved_weights
from localgrad.training.optim import Schedule
from localgrad.training.saved import Checkpoint, SumsState, TrainerState
from localgrad.training.streams import NO_LABEL
from localgrad.training.trainer import Common, Counts, Interrupted, Trainer, accuracies_of, below, whole_of


@final
class ParallelTrainer(Trainer):
    """Trains the own modules of a ``ParallelLearner``; every process has one.

    Args:
        learner: with its optimizers configured.
        schedule: of the learning rates of the own modules.
        others: as for ``Trainer``; the first rank's batches are used, rank 0's sinks, and all processes see the folder.
    """

    learner: ParallelLearner

    def __init__(self, *, learner: ParallelLearner, schedule: Schedule, **others: Unpack[Common]) -> None:
        super().__init__(learner=learner, schedule=schedule, **others)
        self.team = learner.team
        self._unsound: Tensor | None = None
        self.watch: Watch = self.team.watch
        self.watch.names = [name_of(learner.shares[rank % self.team.num_ranks]) for rank in range(self.team.size)]
        self.watch.doing = lambda: learner.links.doing
        self.watch.noted = lambda: self._signal

    def watched(self, run: Callable[[], Any]) -> Any:
        """Run something that all processes do together; what fails in one of them ends all.

        Raises:
            LocalgradError: as one line that names rank, modules and cause.
        """
        with self.watch.telling(Interrupted, explain=self._fault):
            return run()

    def _fault(self, error: Exception) -> Fault | None:
        """The fault of a connection that broke while a neighbour was waited for: the neighbour's."""
        what, _, _ = self.learner.links.doing
        if not what.startswith("wait for") or not isinstance(error, RuntimeError) or isinstance(error, LocalgradError):
            return None
        place = self.team.place
        peer = place.before if what.endswith("before") else place.behind
        assert peer is not None, "someone is waited for"
        return Fault(peer.peer, GONE, is_alive=False)

    def load_state_dict(self, state: TrainerState) -> None:
        """Take up a saved state, of one process or of several."""
        super().load_state_dict(joined_checkpoint(cast(Checkpoint, state)))

    def evaluate(self, batches: Batches) -> tuple[float, list[float | None]]:
        """Accuracy of the whole model and of each local module's own classifier; all processes call this together."""
        return evaluate_together(self.learner, batches)

    def load_best(self) -> None:
        """Put the best epoch's weights into the own modules."""
        weights = load_saved_weights(self.folder.best)
        model = below(weights, "model.")
        self.learner.load_own_weights(model, averages=model)
        for index in self.learner.own:
            load_weights(self.learner.modules[index].objective, below(weights, f"objectives.{index}."))

    # ------------------------------------------------------------------------------------------------- one epoch

    def _train_epoch(self) -> None:
        start = time.perf_counter()
        self._unsound = None
        self.learner.begin(len(self.train), start=self.position.batch)
        super()._train_epoch()
        self.learner.links.finish()
        if self.position.batch < len(self.train):
            seconds = time.perf_counter() - start
            self.position.train_seconds += seconds
            self.position.seconds += seconds
            self._stop()

    def _feed(self) -> Iterator[LocalBatch]:
        links = self.learner.links
        if self.team.place.rank > 0:
            nothing = LocalBatch(None, torch.empty(0, dtype=torch.int64))
            while not links.is_over:
                yield nothing
            return
        for batch in super()._feed():
            yield batch
            if links.is_over:
                return

    def _step(self, batch: LocalBatch) -> StepResult:
        self.learner.at(self._num_updates() / (self.epochs * len(self.train)))
        result = self.learner.share(batch)
        if result.unsound is not None:
            self._unsound = result.unsound if self._unsound is None else self._unsound | result.unsound
        return result

    def _count(self, num_images: int) -> int:
        return num_images * self.team.num_replicas

    def _stops_now(self) -> bool:
        """Never at once: the first rank shortens the epoch, and what it sends says so."""
        is_told = self._signal is not None or self.watch.told_to_stop is not None
        if self.team.place.rank == 0 and self.team.any_twin(is_told):
            self.learner.links.stop_soon()
        return False

    def _leave_if_told(self) -> None:
        numbers = [number for number in self.team.everyone(self._signal) if number is not None]
        if numbers:
            raise Interrupted(numbers[0], self.folder.path)

    # --------------------------------------------------------------------- whose fault a loss is that is no number

    def _report(self, result: StepResult, images_per_second: float) -> None:
        # What a rank received no numbers for is another's fault; that one reads its losses as often.
        if self._unsound is None or not bool(self._unsound):
            self._check_finite()
        if self.team.is_speaker:
            super()._report(result, images_per_second)

    def _check_together(self) -> None:
        """Refuse losses and weights that are no numbers, in all processes; the first bad module in the first batch."""
        error: DivergenceError | None = None
        try:
            self._check_finite()
            self._check_weights()
        except DivergenceError as found:
            error = found
        failure = self._sums.first_failure()
        batch = self.position.batch if failure is None else failure[0]
        said = self.team.everyone(None if error is None else (batch, self.team.place.rank, self.team.rank, str(error)))
        bad = [each for each in said if each is not None]
        if bad:
            _, _, rank, text = min(bad)
            self.watch.tell(Fault(rank, text, status=2))
            raise DivergenceError(text)  # in all of them; the first one told is whose fault it is

    def _finish_epoch(self, start: float, train_seconds: float) -> None:
        self._check_together()
        self.learner.average_statistics()
        super()._finish_epoch(start, train_seconds)

    def _stop(self) -> None:
        self._check_together()
        self.learner.average_statistics()
        super()._stop()

    def _figures(self) -> tuple[list[dict[str, float]], float | None]:
        sums = self._sums
        own = {index: losses for index, losses in enumerate(sums.means(len(self.learner.modules))) if losses}
        counts = (int(sums.num_correct), sums.num_images) if sums.has_logits and self._is_last else None
        said = self.team.everyone((own, counts))
        found: list[dict[str, float]] = [{} for _ in self.learner.modules]
        for losses, _ in said:
            for index, terms in losses.items():
                for name, value in terms.items():
                    found[index][name] = found[index].get(name, 0.0) + value / self.team.num_replicas
        known = [count for _, count in said if count is not None]
        accuracy = sum(correct for correct, _ in known) / sum(images for _, images in known) if known else None
        return found, accuracy

    @property
    def _is_last(self) -> bool:
        return self.team.place.rank == self.team.num_ranks - 1

    # ------------------------------------------------------------------------------------------------ what is kept

    def _save_best(self) -> None:
        learner = self.learner
        own = {f"model.{name}": w for name, w in learner.own_weights(averaged=learner.averages).items()}
        for index in learner.own:
            own |= {f"objectives.{index}.{name}": value for name, value in learner.objective_weights(index).items()}
        said = self.team.to_speaker({name: value.cpu() for name, value in own.items()})
        if said is not None:
            self._keep_best({name: value for part in said for name, value in part.items()})
        self.team.everyone(None)  # it is there for all

    def _save(self) -> None:
        """Each rank writes its part; rank 0 then makes them the checkpoint."""
        position, place = self.position, self.team.place.rank
        name = f"part-{position.epoch:04d}-{position.batch:06d}-{place}.pt"
        state = self.learner.state_dict()
        if self.team.replica == 0:
            self.folder.save_part(name, state)
        said = self.team.everyone((name, self._sums.state_dict()))
        if self.team.is_speaker:
            names = [part for part, _ in said[: self.team.num_ranks]]
            sums = self._joined([part for _, part in said])
            self.folder.commit(self._standing(sums), names)
        self.team.everyone(None)  # nobody begins a further one before

    def _joined(self, sums: Sequence[SumsState]) -> SumsState:
        """The sums of one process that did it all, of those of all processes."""
        ranks, replicas = self.team.num_ranks, self.team.num_replicas
        shares = [[sums[replica * ranks + rank]["losses"] for replica in range(replicas)] for rank in range(ranks)]
        last = sums[ranks - 1 :: ranks]
        return {
            **sums[ranks - 1],
            "losses": torch.cat([torch.stack(own).sum(0) / replicas for own in shares]),
            "num_correct": torch.stack([part["num_correct"] for part in last]).sum(),
            "num_images": sum(part["num_images"] for part in last),
        }

    def _load_sums(self, state: SumsState) -> None:
        modules = self.learner.modules
        names = [(index, name) for index, module in enumerate(modules) for name in module.objective.terms]
        own = [number for number, (index, _) in enumerate(names) if index in self.learner.own]
        first = self.team.replica == 0
        super()._load_sums(
            {
                **state,
                "losses": state["losses"][own],
                "num_correct": state["num_correct"] if first else torch.zeros_like(state["num_correct"]),
                "num_images": state["num_images"] if first else 0,
            }
        )


def joined_checkpoint(state: Checkpoint) -> Checkpoint:
    """A checkpoint with the learner's state in one, whether one process or several wrote it."""
    if "parts" not in state:
        return state
    return {**state, "learner": merged(state["parts"])}


def name_of(modules: range) -> str:
    """Some local modules in words."""
    if len(modules) == 1:
        return f"local module {modules.start}"
    return f"local modules {modules.start} to {modules.stop - 1}"


@torch.no_grad()
def evaluate_together(learner: ParallelLearner, batches: Batches) -> tuple[float, list[float | None]]:
    """``evaluate`` by all processes together; evaluation batches are shared out among replicas."""
    learner.eval()
    most = max(learner.team.everyone(len(batches)))
    learner.begin(len(batches))
    counts = Counts()
    image = torch.zeros(1, batches.info.num_channels, *batches.image_size, device=batches.device)
    blank = LocalBatch(image, torch.full((1,), NO_LABEL, device=batches.device), counts_all=True)
    fed = iter(batches.epoch(0)) if learner.team.place.rank == 0 else None
    for _ in range(len(batches)):
        batch = None if fed is None else next(fed, blank)  # fewer, where of some no image could be read
        logits, targets = learner.infer(*((None, None) if batch is None else (batch.images, batch.targets)))
        for index, values in logits.items():
            counts.add(index, values, targets)
    learner.links.finish()
    learner.attend(most - len(batches))
    return whole_of(accuracies_of(learner.team.everyone(counts.read()), len(learner.modules)))
