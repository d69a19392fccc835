"""The shapes of what a run saves and tells: its checkpoint, the description of its data, its summary. Types only."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor

from localgrad.partition import PlanDict
from localgrad.step.states import LearnerPart, LearnerState, StepState

Kept = dict[str, str | list[str]]
"""What every checkpoint keeps of other files: their text, or a list of lines, by name."""


class PositionState(TypedDict):
    """A ``Position`` as plain values."""

    epoch: int
    batch: int
    best_epoch: int | None
    best_accuracy: float | None
    num_images: int
    train_seconds: float
    seconds: float
    last_losses: list[dict[str, float]]
    finished: list[tuple[int, float | None]]
    extended_at: NotRequired[int]


class SumsState(TypedDict):
    """Sums of the epoch under way; those of before 0.1.0 have neither ``num_global`` nor ``has_logits``."""

    losses: Tensor
    num_correct: Tensor
    num_batches: int
    num_global: NotRequired[int]
    num_images: int
    has_logits: NotRequired[bool]


class RandomStates(TypedDict):
    """All random number generators: PyTorch's on processor and GPUs, NumPy's, Python's."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: tuple[str, Tensor, int | str, int | str, float | str]
    python: tuple[int, list[int], float | None]


class Standing(TypedDict):
    """Where a run stands, but for its learner."""

    position: PositionState
    sums: SumsState
    random: RandomStates


class TrainerState(Standing):
    """Everything that a trainer needs to go on bit for bit; ``local_step`` is that of modules one after another."""

    learner: LearnerState
    local_step: NotRequired[StepState | None]


class Checkpoint(TrainerState):
    """``last.pt`` as it was read, with what is kept beside the trainer's state.

    In a parallel run's file the learner's state is missing; its ``parts`` are there instead, until they are joined.
    Two are of no file: ``lost_best``: the best epoch's weights are to be written again; ``note``: a line to say.
    """

    format: int
    kept: NotRequired[Kept]
    parts: NotRequired[list[LearnerPart]]
    lost_best: NotRequired[bool]
    note: NotRequired[str]


RUN_FORMAT = 2
"""Version of a run folder: of its ``data.json`` and ``summary.json``. 1, without a number, was that of 0.1.0."""


class Peak(TypedDict):
    """Bytes that were observed, and what they are of."""

    measured_peak_bytes: int
    measured_peak_of: str
    measured_reserved_bytes: NotRequired[int]


class RankFigures(Peak):
    """What one process of a parallel run measured of itself."""

    rank: int
    replica: int
    modules: list[int]
    sent_bytes_per_step: int
    waited_seconds: float
    estimated_peak_bytes: int


class Selection(TypedDict):
    """What was selected of how many epochs.

    ``epochs`` were wanted and ``num_epochs`` trained, of which ``extended_at`` before the run last got another number
    of them; these are missing in older summaries, and where modules were trained one after another, as the last three
    are everywhere else.
    """

    val_accuracy: float | None
    best_epoch: int | None
    epochs: int
    patience: NotRequired[int | None]
    num_epochs: NotRequired[int]
    stopped_early: NotRequired[bool]
    extended_at: NotRequired[int]
    best_epochs: NotRequired[list[int]]
    module_val_accuracy: NotRequired[list[float | None]]
    images_per_second: NotRequired[float]


class Peaks(TypedDict, total=False):
    """Bytes of a run, estimated and measured."""

    estimated_peak_bytes: int
    estimated_end_to_end_peak_bytes: int
    measured_peak_bytes: int
    measured_peak_of: str
    measured_reserved_bytes: int
    ranks: list[RankFigures]


class Summary(Peaks, Selection, total=False):
    """``summary.json``: the figures of a finished run."""

    format: int
    test_accuracy: float
    test_module_accuracy: list[float | None]
    num_test: int
    losses: list[dict[str, float]]
    seconds: float
    seed: int
    plan: PlanDict
    num_skipped: int
    skipped: dict[str, dict[str, int]]
    device: str
    versions: dict[str, str]
    folder: str


class Evaluation(TypedDict):
    """What evaluating a run gives: accuracies of the whole model and of each module's classifier on a part."""

    part: str
    accuracy: float
    module_accuracy: list[float | None]  # None where a module has no classifier, or none for averaged weights
    num_images: int
    skipped: dict[str, int]  # reason to number
