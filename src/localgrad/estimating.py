"""The memory of a learner's step, predicted on fake tensors; and its end-to-end baseline."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from localgrad.backbones.fake import by_shapes_alone, fake_copy_with_memo
from localgrad.learner import Factories, Learner, LocalLearner
from localgrad.memory.cards import Card
from localgrad.memory.recording import Recorder, Trace
from localgrad.memory.track import (
    MemoryProfile,
    Tracker,
    annotate,
    autocast_of,
    collecting_own_garbage,
    foreach_of,
    simulate,
)
from localgrad.objectives.carried import LocalBatch, made_up
from localgrad.step.executor import StepResult
from localgrad.step.offload import HOST, Offloader


def end_to_end(learner: Learner) -> LocalLearner:
    """The same backbone, precision and settings with one local module: the end-to-end baseline, sharing weights."""
    decay = None if learner._ema is None else learner._ema.decay
    offload, device = (learner.offload, learner._device) if isinstance(learner, LocalLearner) else (False, None)
    return LocalLearner(
        learner.backbone,
        modules=1,
        objective=learner.objective,
        ema_decay=decay,
        offload=offload,
        device=device,
        loss=learner.loss,
        chunk_logits=learner.chunk_logits,
        **learner._settings,
    )


def estimate_step(
    learner: LocalLearner,
    batch_size: int,
    optimizer: Factories,
    device: torch.device | None = None,
    *,
    globally: bool = False,
) -> MemoryProfile:
    """Predict the memory of one training step on fake tensors; the learner is not touched.

    Args:
        learner: as it will be trained.
        batch_size: images a step.
        optimizer: factory, as for ``configure_optimizers``.
        device: that it will be trained on; by default the one where it is.
        globally: predict the end-to-end step (``global_step_on``), and not the local one.
    """
    if globally:
        learner._recomputed_globally()  # made of real blocks; fake ones can't be taken apart
    return simulate(
        _bare(learner),
        _EstimatedStep(optimizer, globally=globally),
        inputs={"labels": (learner.label_shape(batch_size), learner.loss.label_dtype)},
        device="cuda" if (device or learner.device).type == "cuda" else "cpu",
        host=_on_host,
        autocasts=learner._settings["precision"] != "fp32",
    )


def _on_host(learner: LocalLearner) -> list[Tensor]:
    """What is parked in host memory, and what is kept there of the example that a model was split by."""
    return [*learner.host_tensors(), *learner.backbone.kept_of_example]


def _bare(learner: LocalLearner) -> LocalLearner:
    """A learner without its optimizers and compiled code, which a fake copy can't hold."""
    bare = copy.copy(learner)
    bare.plan = replace(learner.plan, made_for={})  # what it was made for was said
    bare._executor, bare._settings = None, {**learner._settings, "compile": False}
    bare._global_step = bare._joint = None
    bare.optimizer_factory = None
    bare._offloader, bare._device = None, None
    return bare


@final
class _EstimatedStep:
    """A training step of a copied learner, whose optimizers are made at the first call.

    It makes its images as the data path does, and gives them away, so that they are counted for as long as they live.
    """

    def __init__(self, factory: Factories, *, globally: bool = False) -> None:
        self.factory = factory
        self.globally = globally
        self.configured = False

    def __call__(self, learner: LocalLearner, labels: Tensor) -> StepResult:
        first = not self.configured
        if first:
            if learner.offload:  # to fake tensors, which are all on the processor
                learner._device = HOST
                learner._offloader = Offloader(learner.modules, HOST)
            learner.configure_optimizers(self.factory)
            _annotate_modules(learner)
            self.configured = True
        # The first step makes all optimizer state, also that of auxiliary nets, which an end-to-end step leaves alone.
        step = learner.global_step_on if self.globally and not first else learner.step_on
        return step(made_up(learner.backbone, labels))


def _annotate_modules(learner: LocalLearner) -> None:
    """Have each module's step run under its own label."""
    executor = learner._executor
    assert executor is not None, "optimizers are configured"
    inner = executor.around

    @contextlib.contextmanager
    def around(index: int) -> Iterator[None]:
        with annotate(f"module {index}"), inner(index):
            yield

    executor.around = around


# -- in the order in which a CUDA card's allocator is asked ------------------------------------------------


def record_run(
    learner: LocalLearner,
    batch_size: int,
    optimizer: Factories,
    card: Card,
    *,
    steps: int = 3,
    last_batch: int | None = None,
    evaluation_batch: int | None = None,
    last_evaluation_batch: int | None = None,
    globally: bool | Sequence[bool] = False,
    make_batch: Callable[[int], LocalBatch] | None = None,
    kept_bytes: Sequence[int] = (),
    cudnn: bool = True,
) -> Trace:
    """Write down what a run takes from a CUDA card's allocator, from the move of the weights on; no GPU.

    In the order in which a run allocates: weights as ``model.to("cuda")`` moves them, auxiliary nets, the average of
    weights; the images that the data path keeps on the card; whole steps from the first, which makes optimizer state
    among its activations; a smaller last batch; evaluation, with the average's too; and one more step, since what
    evaluation leaves behind is another cache than what the steps before it left.

    Args:
        learner: as it will be trained, on any device; it is not touched.
        batch_size: images a step.
        optimizer: factory, as for ``configure_optimizers``.
        card: that it will be trained on.
        steps: whole training steps.
        last_batch: images of a smaller last step; none by default.
        evaluation_batch: images of an evaluation batch; no evaluation by default.
        last_evaluation_batch: images of its smaller last one.
        globally: whether steps are end-to-end (``global_step_on``): all, or each of them.
        make_batch: makes a batch of so many images, as the data path does, on fake tensors; by default images of the
            model's size and labels come as they are.
        kept_bytes: of tensors that the data path keeps on the card from its first batch on.
        cudnn: whether it convolves, which keeps channels last where they are; its workspaces aren't known.

    Returns:
        The trace; its marks are ``weights``, ``step 1`` and so on, ``last batch``, ``evaluation``, ``step after
        evaluation``.
    """
    kinds = [globally] * steps if isinstance(globally, bool) else list(globally)[:steps]
    if any(kinds):
        learner._recomputed_globally()
    recorder = Recorder(card)
    with collecting_own_garbage(), by_shapes_alone():
        fake_mode, fake, _ = fake_copy_with_memo(_bare(learner))
        fake_mode.channels_first = not cudnn
        make = make_batch or partial(_plain_batch, fake)
        with fake_mode, autocast_of("cuda", card) as like_cuda, foreach_of("cuda"), Tracker(1, recorder) as tracker:
            recorder.mark("weights")
            if learner.offload:
                fake._device, fake._offloader = HOST, Offloader(fake.modules, HOST, recorder)
                for tensor in fake.host_tensors():
                    recorder.stays_on_host(tensor)
            _move(fake, tracker)
            fake.configure_optimizers(optimizer)
            gc.collect()
            run = _RecordedRun(fake, recorder, make)
            for nbytes in kept_bytes:
                recorder.take(nbytes)
            for number, is_global in enumerate(kinds, 1):
                run.step(f"step {number}", batch_size, is_global=is_global)
            if last_batch:
                run.step("last batch", last_batch, is_global=kinds[-1])
            if evaluation_batch:
                run.evaluate([evaluation_batch, *([last_evaluation_batch] if last_evaluation_batch else [])])
                run.step("step after evaluation", batch_size, is_global=kinds[-1])
            if like_cuda is not None:
                recorder.trace.attention = dict(like_cuda.attention)
            return recorder.trace


@final
class _RecordedRun:
    """Trains and evaluates a fake copy as the trainer does, which holds a batch and its result until the next ones."""

    def __init__(self, learner: LocalLearner, recorder: Recorder, make: Callable[[int], LocalBatch]) -> None:
        self.learner, self.recorder, self.make = learner, recorder, make
        self.batch: LocalBatch | None = None
        self.result: StepResult | None = None

    def step(self, label: str, num_images: int, *, is_global: bool) -> None:
        """One training step."""
        self.recorder.mark(label)
        self.batch = self.make(num_images)
        self.result = (self.learner.global_step_on if is_global else self.learner.step_on)(self.batch)

    def evaluate(self, sizes: Sequence[int]) -> None:
        """Evaluate some batches."""
        self.recorder.mark("evaluation")
        self.learner.eval()
        inputs = logits = None
        for size in sizes:
            batch = self.make(size)
            inputs = batch.given or batch.features
            del batch
            logits = list(self.learner.logits(inputs))
            if self.learner.averaged_model is not None:
                logits[-1] = self.learner.averaged_logits(inputs)
        del inputs, logits
        self.learner.train()


def _plain_batch(learner: LocalLearner, num_images: int) -> LocalBatch:
    return made_up(learner.backbone, torch.zeros(learner.label_shape(num_images), dtype=learner.loss.label_dtype))


def _move(learner: LocalLearner, tracker: Tracker) -> None:
    """Meet a fake copy's tensors in the order in which a run puts them on the card."""
    averaged = learner.averaged_model
    order = [tensor for module in (learner.model, *learner.modules) for tensor in _as_moved(module)]
    order += [] if averaged is None else _as_copied(averaged)
    seen: set[int] = set()
    for tensor in order:
        address = tensor.untyped_storage()._cdata
        if address not in seen:
            seen.add(address)
            tracker.mark(tensor, "parameters" if isinstance(tensor, nn.Parameter) else "buffers")
    for module in (learner.model, *learner.modules):
        for weight in module.parameters():
            tracker.know_parameter(weight)


def _as_moved(module: nn.Module) -> Iterator[Tensor]:
    """Tensors as ``module.to(device)`` moves them: of the modules inside, then its own."""
    for inner in module.children():
        yield from _as_moved(inner)
    for table in (module._parameters, module._buffers):
        yield from (tensor for tensor in table.values() if tensor is not None)


def _as_copied(module: nn.Module) -> Iterator[Tensor]:
    """Tensors as ``copy.deepcopy`` copies them: a module's own, then those of the modules inside."""
    for table in (module._parameters, module._buffers):
        yield from (tensor for tensor in table.values() if tensor is not None)
    for inner in module.children():
        yield from _as_copied(inner)
