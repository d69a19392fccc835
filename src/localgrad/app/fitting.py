"""A job trained in its run folder, by one process or several: its trainer, its estimates, its start, its summary."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localgrad.app.agreement import together
from localgrad.app.build import Job
from localgrad.app.hub_models import is_on_hub
from localgrad.app.planned import note_of_plan
from localgrad.app.recipe import Recipe, difference, flat
from localgrad.app.replanning import Replanner
from localgrad.app.run_folders import read_recipe
from localgrad.backbones.adapters import without_adapters
from localgrad.errors import (
    CheckpointError,
    DeviceError,
    LocalgradError,
    MemoryExceeded,
    PartitionError,
    RecipeError,
    arg,
)
from localgrad.estimating import end_to_end, estimate_step
from localgrad.evaluating import evaluation_batch
from localgrad.memory.allocator_rules import fraction_of, rules_here
from localgrad.memory.track import MemoryProfile
from localgrad.parallel.memory import estimate_share
from localgrad.parallel.parallel_learner import ParallelLearner
from localgrad.parallel.team import Team
from localgrad.partition import Plan, forecast_of
from localgrad.step.executor import out_of_memory
from localgrad.training.data import DataInfo
from localgrad.training.events import JsonlSink, Replanned, RunEnded, RunStarted, Sink, make_sinks
from localgrad.training.folder import RunFolder, load_saved_weights, save_weights
from localgrad.training.frozen_features import FrozenFeatures
from localgrad.training.health import HealthCheck
from localgrad.training.image_sets import Skipped, skipped_table
from localgrad.training.optim import note_of_warmup
from localgrad.training.parallel_trainer import ParallelTrainer, name_of
from localgrad.training.saved import RUN_FORMAT, Checkpoint, Peak, Peaks, RankFigures, Summary
from localgrad.training.stagewise import StagewiseTrainer, estimate_stages
from localgrad.training.trainer import Common, TogetherTrainer, Trainer, below
from localgrad.units import format_bytes, format_counts

_FEW = 10  # classes that are named in the first lines of a run
_ONE_LINE = 100


def fit(
    job: Job,
    folder: RunFolder,
    sinks: Sequence[Sink | str],
    state: Checkpoint | None = None,
    *,
    health: HealthCheck | None = None,
    replan: bool = False,
    fits: Callable[[], None] = lambda: None,
) -> Summary:
    """Train a job to its end; of several processes, each calls this, and rank 0 writes and speaks.

    Args:
        job: what was built.
        folder: of the run.
        sinks: take the events, beside those of the recipe.
        state: to go on from.
        health: measures the modules' health.
        replan: go on with another plan when memory runs out.
        fits: called once the state is known to be of this job.
    """
    trainer = make_trainer(job, folder)
    trainer.health = health
    if state is not None:
        together(job.team, lambda: trainer.load_state_dict(state))
        if state.get("lost_best"):
            trainer._save_best()
    fits()
    if job.team is None:
        profile = estimate_run(job)
        estimates = [profile.peak_bytes]
    else:
        profile = together(job.team, lambda: estimate_run(job))
        estimates = job.team.everyone(profile.peak_bytes)
    peaks: Peaks = {"estimated_peak_bytes": max(estimates)}
    if job.speaks:
        factory = job.optimizer if callable(job.optimizer) else job.optimizer[0]
        baseline = estimate_step(end_to_end(job.learner), _own_batch_size(job), factory, job.device)
        peaks["estimated_end_to_end_peak_bytes"] = baseline.peak_bytes
    replanner = Replanner(job, profile, partial(measured_peak, job.device))
    if job.team is None and (job.device.type == "cuda" or job.plan is not None):  # what it fits, evaluation has to fit
        room = profile.peak_bytes - profile.static_bytes
        trainer.evaluation_batch = evaluation_batch(job.local, room, job.device)
        if job.plan is not None and job.plan.evaluation_batch is not None:
            trainer.evaluation_batch = min(trainer.evaluation_batch, job.plan.evaluation_batch)
    if replan:
        trainer.with_less = partial(_go_on_with_less, trainer)
        if not isinstance(trainer, StagewiseTrainer):
            job.learner.on_out_of_memory(partial(_go_on, replanner, trainer))

    def explaining() -> AbstractContextManager[None]:
        return nullcontext() if job.team is not None else _explaining(job, replanner, folder.path)

    def run() -> Summary:
        if job.speaks:
            _emit_start(job, trainer, peaks, [] if state is None or "note" not in state else [state["note"]])
        with explaining():
            trainer.fit()
        seen: Peaks = {**peaks, **measured_peak(job.device)}
        if job.team is not None:
            seen["ranks"] = _figures_of_ranks(job, job.team, estimates)
            seen["measured_peak_bytes"] = max(each["measured_peak_bytes"] for each in seen["ranks"])
        with explaining():
            summary = _finish(job, trainer, seen)
        if job.team is not None:
            job.team.everyone(None)  # rank 0 has written it all
        return summary

    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    if isinstance(trainer, ParallelTrainer):
        run = partial(trainer.watched, run)
    with _within_budget(job):
        return _told(trainer, (*job.recipe.execution.sinks, *sinks), run) if job.speaks else run()


@contextmanager
def _within_budget(job: Job) -> Iterator[None]:
    """Hold this process to what its plan leaves PyTorch's allocator of a card, also where the card has more."""
    available = None if job.plan is None or job.plan.forecast is None else job.plan.forecast.available_bytes
    if available is None or job.device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()  # what planning left
    number = torch.cuda.current_device() if job.device.index is None else job.device.index
    fraction = fraction_of(available, torch.cuda.mem_get_info(number)[1])
    torch.cuda.set_per_process_memory_fraction(fraction, number)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, number)


def _own_batch_size(job: Job) -> int:
    """Images a step of this replica."""
    return job.recipe.method.training.batch_size // (1 if job.team is None else job.team.num_replicas)


def make_trainer(job: Job, folder: RunFolder) -> Trainer:
    """The trainer that a job's recipe and processes ask for."""
    settings, learner = job.recipe.method.training, job.learner
    common: Common = {
        "train": job.batches,
        "val": None if job.data.val is None else job.evaluation_batches(job.data.val),
        "epochs": settings.epochs,
        "folder": folder,
        "patience": settings.patience,
    }
    if isinstance(learner, ParallelLearner):
        return ParallelTrainer(learner=learner, schedule=job.schedule_for(learner.optimizers), **common)
    if settings.schedule == "sequential":
        return StagewiseTrainer(
            learner=job.local,
            optimizer=job.optimizer,
            schedule_for=job.schedule_for,
            cached_epochs=settings.cached_epochs,
            **common,
        )
    cached = min(settings.cached_epochs, settings.epochs)
    return TogetherTrainer(
        learner=job.local,
        frozen=FrozenFeatures(job.local, job.batches, folder.path / "cache", cached) if settings.cache_frozen else None,
        schedule=job.schedule_for(learner.optimizers),
        is_global=settings.is_global if settings.has_global_steps and learner.plan.num_modules > 1 else None,
        **common,
    )


def estimate_run(job: Job) -> MemoryProfile:
    """Predict the memory of this process's steps: the largest, where they differ."""
    settings, batch_size = job.recipe.method.training, _own_batch_size(job)
    if isinstance(job.learner, ParallelLearner):
        return estimate_share(job.learner, batch_size, job.optimizer, job.device)
    if settings.schedule == "sequential":
        steps = estimate_stages(job.local, batch_size, job.optimizer, job.device)
    else:
        steps = [estimate_step(job.local, batch_size, job.optimizer)]
        if settings.has_global_steps and job.learner.plan.num_modules > 1:
            steps.append(estimate_step(job.local, batch_size, job.optimizer, globally=True))
    return max(steps, key=lambda profile: profile.peak_bytes)


@contextmanager
def _explaining(job: Job, replanner: Replanner, path: Path) -> Iterator[None]:
    """A region in which memory that runs out ends the run with what to type next."""
    try:
        yield
    except MemoryExceeded as error:
        raise replanner.explain(error, path) from error
    except RuntimeError as error:  # in what can't be run again as if nothing had been
        if out_of_memory(error) is None:
            raise
        execution = job.recipe.execution
        ways = [arg("accumulation", 2 * execution.accumulation), arg("checkpoint", "halves/8")]
        if job.recipe.method.training.schedule != "sequential" and not execution.offload:
            ways.append(arg("offload", value=True))
        raise DeviceError(
            f"{job.device} is out of memory: {replanner.figures()}; take {', '.join(ways[:-1])} or {ways[-1]}, "
            f"which don't change results, or more {arg('modules')}."
        ) from error


def _go_on(replanner: Replanner, trainer: Trainer, module: int) -> bool:
    """Take the next plan, and write it down so that resuming takes it too."""
    try:
        plan = replanner.next_plan()
    except RecipeError:  # a run that planners don't plan; the error that follows says so
        return False
    if plan is None:
        return False
    recipe = replanner.adopt(plan)
    trainer.folder.write_text("recipe.toml", recipe.to_toml())
    how = f"checkpoint {','.join(map(str, plan.checkpoint))}, accumulation {plan.accumulation}"
    if replanner.job.device.type == "cuda":
        how += ", by the margin, not replayed"
    place = f"local module {module}" if module < plan.num_modules else "an end-to-end step"
    for sink in trainer.sinks:
        sink.emit(Replanned(place=place, how=how, peak_bytes=forecast_of(plan).peak_bytes))
    return True


def _go_on_with_less(trainer: Trainer, place: str, how: str) -> bool:
    for sink in trainer.sinks:
        sink.emit(Replanned(place=place, how=how))
    return True


def _told(trainer: Trainer, sinks: Sequence[Sink | str], run: Callable[[], Summary]) -> Summary:
    """Run something whose events go to the run folder and to some sinks, and tell them its summary."""
    epoch, path, kept = trainer.position.epoch, trainer.folder.path, trainer.folder.kept
    lines = JsonlSink(path / "metrics.jsonl", epoch, kept.get("metrics.jsonl"))
    kept["metrics.jsonl"] = lines.lines
    trainer.sinks = (lines, *make_sinks(sinks, path))
    try:
        summary = run()
        for sink in trainer.sinks:
            sink.emit(RunEnded(summary=summary))
        return summary
    finally:
        for sink in trainer.sinks:
            sink.close()


# Health ----------------------------------------------------------------------------------------------------------


def health_check(job: Job) -> HealthCheck | None:
    """What measures the modules' health, where the recipe asks for it; refused if its reference is no good."""
    execution, val = job.recipe.execution, job.data.val
    if not execution.health_every:
        return None
    reference = None
    if execution.health_reference is not None:
        reference = _end_to_end_weights(Path(execution.health_reference), job.recipe)
    try:
        return HealthCheck(
            job.local,
            job.batches,
            None if val is None else job.evaluation_batches(val),
            execution.health_every,
            reference=reference,
        )
    except CheckpointError as error:
        raise RecipeError(f"{arg('health_reference', execution.health_reference)}: {error}") from error


def _end_to_end_weights(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The best weights of an end-to-end run of a recipe's model."""
    try:
        found = read_recipe(path)
        weights = load_saved_weights(path / "checkpoints" / "best.safetensors")
    except LocalgradError as error:
        raise RecipeError(f"{arg('health_reference')}: {error}") from error
    named = arg("health_reference", path)
    free = ("model.drop_path", "model.pretrained", "model.weights")  # these don't change what features are
    different = [line for line in difference(found, recipe) if line.startswith("model.") and not line.startswith(free)]
    if different:
        raise RecipeError(f"{named}: it is a run of another model ({'; '.join(different)}).")
    if found.method.local.modules not in (1, []):
        raise RecipeError(f"{named}: it was trained with local modules; name a run with {arg('modules', 1)}.")
    return below(weights, "model.")


# The start -------------------------------------------------------------------------------------------------------


def _emit_start(job: Job, trainer: Trainer, peaks: Peaks, notes: Sequence[str]) -> None:
    method, learner, info = job.recipe.method, job.learner, job.data.info
    modules = "end-to-end" if learner.plan.num_modules == 1 else f"{learner.plan.num_modules} local modules"
    names = learner.backbone.block_names
    spans = "  |  ".join(
        names[span.start] if len(span) == 1 else f"{names[span.start]} … {names[span.stop - 1]}"
        for span in learner.plan.spans
    )
    peak, baseline = format_bytes(peaks["estimated_peak_bytes"]), format_bytes(peaks["estimated_end_to_end_peak_bytes"])
    training = method.training
    warmup = note_of_warmup(training.warmup_epochs, training.epochs, len(trainer.train))
    details = [
        f"{info.num_train:,} training, {info.num_val:,} validation, {info.num_test:,} test images, "
        f"{info.num_classes} classes{_some_names(info.class_names)}",
        *_left_out(info),
        *info.notes,
        f"modules: {spans}",
        f"estimated peak {peak}, end-to-end {baseline}",
        *([f"PyTorch's allocator: {rules_here()}"] if job.device.type == "cuda" else []),
        *([_shared_out(learner)] if isinstance(learner, ParallelLearner) else []),
        *trainer.details(),
        *(note for note in (warmup, _note_of_plan(job, trainer.folder)) if note is not None),
        *notes,
    ]
    event = RunStarted(
        folder=str(trainer.folder.path),
        title=f"{method.model.name} on {info.name}: {modules}, {method.local.objective} objective, {job.device}, "
        f"{job.recipe.execution.precision}",
        details=tuple(details),
        epochs=trainer.epochs,
        start_epoch=trainer.position.epoch,
        batches_per_epoch=len(trainer.train),
        epochs_per_module=trainer.epochs_per_module,
        recipe=flat(job.recipe.to_dict()),
        plan=(job.plan or learner.plan).to_dict(),
        estimated_peak_bytes=peaks["estimated_peak_bytes"],
        estimated_end_to_end_peak_bytes=peaks["estimated_end_to_end_peak_bytes"],
    )
    for sink in trainer.sinks:
        sink.emit(event)


def _some_names(names: Sequence[str]) -> str:
    """The names of classes in brackets, where they are few."""
    listed = ", ".join(names)
    return f" ({listed})" if len(names) <= _FEW and len(listed) < _ONE_LINE else ""


def _left_out(info: DataInfo) -> list[str]:
    """What was left out of each part, as lines."""
    lines = [f"left out of {part}: {format_counts(counts)}" for part, counts in info.skipped.items()]
    return [*lines, "listed in skipped.csv in the run folder"] if info.num_skipped else lines


def _note_of_plan(job: Job, folder: RunFolder) -> str | None:
    """A line where the run's plan was made for something else: another device, or what a resumed run changed."""
    try:
        plan = Plan.from_json((folder.path / "plan.json").read_text())
    except OSError:  # the run has none
        return None
    except PartitionError as error:
        return f"plan.json: {error}"
    return note_of_plan(plan, job.recipe, job.device)


def plan_of_run(folder: RunFolder, recipe: Recipe, device: torch.device) -> Plan | None:
    """The plan that a resumed run began with, where it still runs by it; else a line of the run says why not."""
    try:
        plan = Plan.from_json((folder.path / "plan.json").read_text())
    except (OSError, PartitionError):
        return None
    return plan if note_of_plan(plan, recipe, device) is None else None


def _shared_out(learner: ParallelLearner) -> str:
    """Which process has which modules, as a line."""
    shares = "  |  ".join(f"rank {rank}: {name_of(modules)}" for rank, modules in enumerate(learner.shares))
    return shares if learner.team.num_replicas == 1 else f"{learner.team.num_replicas} replicas of {shares}"


# The end ---------------------------------------------------------------------------------------------------------


def _finish(job: Job, trainer: Trainer, peaks: Peaks) -> Summary:
    """Read the test set, once, with the best epoch's weights; write weights and summary."""
    start = time.perf_counter()
    trainer.load_best()
    accuracy, by_module = trainer.test(job.evaluation_batches(job.data.test))
    if job.speaks:
        weights = below(load_saved_weights(trainer.folder.best), "model.")
        save_weights(trainer.folder.path / "model.safetensors", without_adapters(weights))
    if job.team is not None:
        add_skipped_of_all(job.team, job.data.skipped)
    position = trainer.position
    summary: Summary = {
        "format": RUN_FORMAT,
        "test_accuracy": accuracy,
        "test_module_accuracy": of_best(job.recipe, by_module),
        "num_test": job.data.num_read("test"),
        "losses": position.last_losses,
        **peaks,
        "images_per_second": position.num_images / position.train_seconds,
        **trainer.selection(),
        "seconds": position.seconds + time.perf_counter() - start,
        "seed": job.recipe.method.seed,
        "plan": job.learner.plan.to_dict(),
        "num_skipped": sum(len(own.images) for own in job.data.skipped.values()),
        "skipped": {part: own.counts() for part, own in job.data.skipped.items() if own.counts()},
        "device": device_name(job.device),
        "versions": versions(*(["transformers"] if is_on_hub(job.recipe.method.model.name) else [])),
        "folder": str(trainer.folder.path),
    }
    if job.speaks:
        table = trainer.folder.path / "skipped.csv"  # which grows where images are decoded while training
        before = table.read_text(encoding="utf-8", errors="replace") if table.exists() else ""
        trainer.folder.write_text("skipped.csv", skipped_table(job.data.skipped, before))
        trainer.folder.write_json("summary.json", summary)
        trainer.folder.finish()
    return summary


def of_best(recipe: Recipe, by_module: list[float | None]) -> list[float | None]:
    """Modules' accuracies with the best weights: where those are an average, only the last one's are any.

    The classifiers of the others were trained on the features of the weights as they were, and not on the average's.
    """
    if recipe.method.training.ema_decay is None:
        return by_module
    return [None] * (len(by_module) - 1) + by_module[-1:]


def add_skipped_of_all(team: Team, skipped: Mapping[str, Skipped]) -> None:
    """Add what other processes left out while they trained: replicas read different images. All call this together."""
    for others in team.everyone({part: own.images for part, own in skipped.items()}):
        for part, images in others.items():
            skipped[part].images.update(images)


def _figures_of_ranks(job: Job, team: Team, estimates: Sequence[int]) -> list[RankFigures]:
    """What each process of a parallel run measured of itself, beside its estimate."""
    learner: Any = job.learner
    figures: RankFigures = {
        "rank": team.rank,
        "replica": team.replica,
        "modules": list(learner.own),
        "sent_bytes_per_step": learner.sent_bytes_per_step,
        "waited_seconds": learner.links.waited_seconds,
        **measured_peak(job.device),
        "estimated_peak_bytes": estimates[team.rank],
    }
    return team.everyone(figures)


def measured_peak(device: torch.device) -> Peak:
    """Bytes of this process at most so far."""
    if device.type == "cuda":
        return {
            "measured_peak_bytes": torch.cuda.max_memory_allocated(device),
            "measured_peak_of": "tensors on the GPU",
            "measured_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "measured_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "measured_peak_of": "the whole process, libraries and data included",
    }


def versions(*more: str) -> dict[str, str]:
    """What ran: Python and the packages that results may depend on, and more that these do."""
    names = ("localgrad", "torch", "timm", "torchvision", "numpy", *more)
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} processor, {torch.get_num_threads()} threads"
