"""Offloading: the same bits as without, two modules' static tensors on the device at most, all else an ordinary model.

Host and device are both the processor's memory here; what is on the "device" is what the offloader allocated there.
"""

from __future__ import annotations

import contextlib
import copy
import io
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import helpers
import localgrad
from helpers import MODELS, SIZE, adamw, assert_same, batches, flat, make_backbone, train
from localgrad import LocalLearner
from localgrad.errors import RecipeError
from localgrad.estimating import end_to_end, estimate_step
from localgrad.memory import track as memory
from localgrad.objectives.carried import LocalBatch
from localgrad.step.offload import Offloader


def rate_of(kind: str) -> dict[str, float]:
    return {} if kind == "resnet" else {"drop_path_rate": 0.3}


def make(kind: str = "vit", **more: Any) -> nn.Module:
    return helpers.make(kind, **(rate_of(kind) | more))


def make_learner(
    kind: str = "vit", modules: Any = 3, optimizer: Any = adamw, *, offload: bool = True, **more: Any
) -> LocalLearner:
    learner = LocalLearner(make_backbone(kind, **rate_of(kind)), modules=modules, offload=offload, **more)
    if optimizer is not None:
        learner.configure_optimizers(optimizer)
    return learner


# The same results ------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"clip_grad": 0.5, "accumulation": 2, "checkpoint": True, "ema_decay": 0.9},
    "fp16": {"precision": "fp16", "clip_grad": 1.0},
    "bf16": {"precision": "bf16"},
    "two": {"modules": 2},
    "one": {"modules": 1},
    "sgd": {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)},
    "adagrad": {"optimizer": torch.optim.Adagrad},  # makes its state before the first step
    "fused": {"optimizer": lambda params: torch.optim.AdamW(params, fused=True)},  # counts its steps on the device
    "foreach": {"optimizer": lambda params: torch.optim.NAdam(params, foreach=True)},
}


WITH_BUFFERS = ["plain", "all", "fp16"]
"""What may treat buffers in a way of its own; the others with a ResNet are heavy."""


def settings_of(kind: str, name: str) -> Any:
    quick = kind == "vit" or name in WITH_BUFFERS
    return pytest.param(kind, SETTINGS[name], id=f"{kind}-{name}", marks=[] if quick else pytest.mark.heavy)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "settings"), [settings_of(kind, name) for kind in ("vit", "resnet") for name in SETTINGS]
)
def test_offloading_changes_nothing_at_all(kind: str, settings: dict[str, Any]) -> None:
    data = batches(4)
    plain, offloaded = make_learner(kind, offload=False, **settings), make_learner(kind, **settings)
    for ours, theirs in zip(train(offloaded, data), train(plain, data), strict=True):
        assert torch.equal(ours.logits, theirs.logits)
        assert all(torch.equal(a, b) for a, b in zip(ours.losses, theirs.losses, strict=True))
        assert_same(offloaded.num_steps, plain.num_steps)
    assert_same(offloaded.state_dict(), plain.state_dict())
    images = data[0][0]
    for learner in (offloaded, plain):
        learner.eval()
    assert_same(offloaded.logits(images), plain.logits(images))
    if "ema_decay" in settings:
        assert_same(offloaded.averaged_logits(images), plain.averaged_logits(images))
        assert not torch.equal(offloaded.averaged_logits(images), offloaded.logits(images)[-1])  # type: ignore[arg-type]
    assert_same(offloaded.state_dict(), plain.state_dict())
    assert_same([train(offloaded, data)[-1].logits], [train(plain, data)[-1].logits])  # and on after evaluating


@pytest.mark.few(1)
@pytest.mark.parametrize("middle", ["offloaded", "plain"])
def test_a_run_goes_on_bit_for_bit_with_or_without(middle: str) -> None:
    """AdamW, clipping, accumulation, drop path, an average; saved in the middle by either kind of learner."""
    settings: dict[str, Any] = {"clip_grad": 0.5, "accumulation": 2, "ema_decay": 0.9}
    data = batches(6)
    straight = make_learner(offload=False, **settings)
    train(straight, data)
    first = make_learner(offload=middle == "offloaded", **settings)
    train(first, data[:3])
    random_state, file = torch.get_rng_state(), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_learner(offload=middle != "offloaded", **settings)
    train(second, batches(2))  # a state of its own, to be replaced whole
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(random_state)
    for images, labels in data[3:]:
        second.step(images, labels)
    assert_same(second.state_dict(), straight.state_dict())


COMPILERS = ["aot_eager", "inductor"]


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while compiling
@pytest.mark.parametrize("backend", ["eager", *(pytest.param(each, marks=pytest.mark.heavy) for each in COMPILERS)])
def test_compiled_modules_see_the_tensors_that_came(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    original, graphs = torch.compile, []

    def counted(function: Any, **options: Any) -> Any:
        graphs.append(function)
        return original(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setitem(MODELS, "vit", MODELS["vit"] | {"depth": 2, "drop_path_rate": 0.0})
    data = batches(3)
    made = [
        LocalLearner(make(drop_path_rate=0.0), modules=2, input_size=SIZE, compile=True, offload=flag)
        for flag in (True, False)
    ]
    for learner in made:
        learner.configure_optimizers(adamw)
    offloaded, plain = ([torch.stack(result.losses) for result in train(learner, data)] for learner in made)
    assert graphs
    assert_same(offloaded, plain)
    assert_same(made[0].state_dict(), made[1].state_dict())


def test_buffers_that_all_modules_read_stay() -> None:
    learner = make_learner("eva")
    assert learner._offloader is not None
    assert learner._offloader._shared
    places = [tensor.data_ptr() for tensor in learner._offloader._shared]
    train(learner, batches(2))
    learner.eval()
    assert places == [tensor.data_ptr() for tensor in learner._offloader._shared]
    plain = make_learner("eva", offload=False)
    train(plain, batches(2))
    assert_same(learner.state_dict(), plain.state_dict())


def test_frozen_parameters_come_along_and_stay_as_they_are() -> None:
    learners = []
    for offload in (True, False):
        learner = make_learner(offload=offload, optimizer=None)
        for name, parameter in learner.model.named_parameters():
            parameter.requires_grad_("attn" not in name)
        learner.configure_optimizers(adamw)
        train(learner, batches(3))
        learners.append(learner)
    assert_same(learners[0].state_dict(), learners[1].state_dict())


# An ordinary model between steps -----------------------------------------------------------------------------------


def test_the_models_state_is_right_after_every_step() -> None:
    plain, offloaded = make_learner(offload=False), make_learner()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for images, labels in batches(3):
        for learner in (plain, offloaded):
            torch.set_rng_state(state)
            learner.step(images, labels)
        state = torch.get_rng_state()
        assert_same(offloaded.model.state_dict(), plain.model.state_dict())
    assert all(type(p) is nn.Parameter and p.is_leaf and p.grad is None for p in offloaded.model.parameters())


@pytest.mark.parametrize("by", ["copy_", "data", "load_state_dict", "optimizer"])
def test_what_a_user_writes_between_steps_counts(by: str) -> None:
    """Module 0 is on the device then, for the next step; a copy made ahead of time would lose what is written."""
    states = []
    for learner in (make_learner(), make_learner(offload=False)):
        train(learner, batches(1))
        with torch.no_grad():
            for parameter in learner.model.parameters():
                if by == "copy_":
                    parameter.mul_(0.5)
                elif by == "data":
                    parameter.data.mul_(0.5)
        if by == "load_state_dict":
            learner.model.load_state_dict({name: v * 0.5 for name, v in learner.model.state_dict().items()})
        if by == "optimizer":
            for optimizer in learner.optimizers:
                saved = copy.deepcopy(optimizer.state_dict())
                for state in saved["state"].values():
                    state["exp_avg"] *= 0.5
                optimizer.load_state_dict(saved)
        train(learner, batches(2))
        states.append(learner.state_dict())
    assert_same(*states)


def test_an_error_in_a_step_leaves_everything_usable() -> None:
    data = batches(2)
    learner, plain = make_learner(), make_learner(offload=False)

    def stop(*_: object) -> None:
        raise KeyError("stop")

    for each in (learner, plain):
        train(each, data)
        hook = each.modules[1].parts[-1].register_forward_hook(stop)
        with pytest.raises(KeyError, match="stop"):
            train(each, data)
        hook.remove()
        train(each, data)
    assert_same(learner.state_dict(), plain.state_dict())


def test_a_deep_copy_trains_by_itself() -> None:
    learner = make_learner("eva", ema_decay=0.9)
    train(learner, batches(2))
    twin, before = copy.deepcopy(learner), copy.deepcopy(learner.state_dict())
    train(twin, batches(2))
    assert_same(learner.state_dict(), before)
    train(learner, batches(2))
    assert_same(learner.state_dict(), twin.state_dict())


def test_isolation_can_be_proved_with_offloading() -> None:
    learner = make_learner("resnet")
    train(learner, batches(1))
    before = flat(learner.state_dict())
    localgrad.check_isolation(learner)
    localgrad.check_isolation(learner, *batches(1)[0])
    assert_same(flat(learner.state_dict()), before)


def test_logits_without_optimizers_and_in_training_mode() -> None:
    images = batches(1)[0][0]
    learners = [make_learner("resnet", optimizer=None, offload=flag) for flag in (True, False)]
    for learner in learners:
        learner.train()
    assert_same(*(learner.logits(images) for learner in learners))
    assert_same(*(learner.state_dict() for learner in learners))  # running statistics moved
    assert not torch.equal(learners[0].model.bn1.running_mean, torch.zeros(8))  # type: ignore[union-attr]


def test_a_device_needs_offloading() -> None:
    with pytest.raises(RecipeError, match=r"device='cpu' needs offload: .* add offload=True"):
        LocalLearner(make(), modules=2, device="cpu")
    learner = make_learner(device="cpu")
    assert learner.device == torch.device("cpu")


def test_no_average_no_averaged_logits() -> None:
    with pytest.raises(RecipeError, match="no average of the weights"):
        make_learner().averaged_logits(batches(1)[0][0])


# Memory ------------------------------------------------------------------------------------------------------------


def static_bytes(learner: LocalLearner) -> list[int]:
    """Each module's parameters, buffers and AdamW state."""
    sizes = []
    for index, module in enumerate(learner.modules):
        weights = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
        sizes.append(weights + 2 * sum(p.nbytes for p in learner.parameters(index)))
    return sizes


@pytest.fixture
def _placed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the offloader's device copies be known by their storages."""
    made: list[weakref.ref[torch.UntypedStorage]] = PLACED
    made.clear()
    original = Offloader._prefetch

    def noted(self: Offloader, index: int, *, with_state: bool) -> None:
        original(self, index, with_state=with_state)
        if self._coming is not None:
            made.extend(weakref.ref(there.untyped_storage()) for _, _, there in self._coming.moved)

    monkeypatch.setattr(Offloader, "_prefetch", noted)
    yield
    made.clear()


PLACED: list[weakref.ref[torch.UntypedStorage]] = []


def on_device() -> int:
    storages = [reference() for reference in PLACED]
    return sum(storage.nbytes() for storage in storages if storage is not None)


@pytest.mark.usefixtures("_placed")
@pytest.mark.parametrize("settings", [{}, {"accumulation": 2, "clip_grad": 1.0, "checkpoint": True}], ids=str)
def test_two_modules_are_on_the_device_at_most(settings: dict[str, Any]) -> None:
    check_residency(settings)


def check_residency(settings: dict[str, Any]) -> None:
    learner = make_learner(modules=4, **settings)
    train(learner, batches(2))  # the state is there
    sizes = static_bytes(learner)
    seen: list[tuple[int, int]] = []

    def look(index: int) -> None:
        seen.append((index, on_device()))

    for index, module in enumerate(learner.modules):
        module.register_forward_pre_hook(lambda *_, index=index: look(index))
        learner.optimizers[index].register_step_post_hook(lambda *_, index=index: look(index))
    train(learner, batches(2))
    assert len(seen) >= 2 * 2 * 4
    for index, resident in seen:
        assert resident == sizes[index] + sizes[(index + 1) % 4], index
    assert on_device() == sizes[0]  # between steps
    learner.eval()
    assert on_device() == 0
    seen.clear()
    for index, module in enumerate(learner.modules):
        module.parts[0].register_forward_pre_hook(lambda *_, index=index: look(index))
    learner.logits(batches(1)[0][0])
    weights = [sum(t.nbytes for t in [*module.parameters(), *module.buffers()]) for module in learner.modules]
    assert seen == [(index, sum(weights[index : index + 2])) for index in range(4)]
    assert on_device() == 0


@pytest.mark.usefixtures("_placed")
def test_the_law_of_two_modules_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Offloader, "_send_home", lambda *_: None)
    with pytest.raises(AssertionError):
        check_residency({})


@pytest.mark.parametrize("num_modules", [2, 4])
def test_a_tracked_step_has_two_modules_static_bytes(num_modules: int) -> None:
    """By an instrument that knows nothing of the offloader but which tensors it calls parked."""
    learner, (images, labels) = make_learner(modules=num_modules), batches(1, num_images=2)[0]
    sizes = static_bytes(learner)
    profile = memory.track(lambda: learner.step(images, labels), host=learner.host_tensors)
    pairs = [sizes[index] + sizes[(index + 1) % num_modules] for index in range(num_modules)]
    counters = 4 * sum(len(learner.parameters(index)) for index in range(num_modules))  # AdamW's, on the processor
    at_peak = profile.by_category
    assert at_peak["parameters"] + at_peak["optimizer"] <= max(pairs) + counters
    assert at_peak["parameters"] + at_peak["optimizer"] >= min(pairs)
    assert profile.host_bytes == sum(sizes)
    assert profile.static_bytes <= sizes[0] + counters + images.nbytes + labels.nbytes


@pytest.mark.heavy
def test_the_estimate_of_an_offloaded_step_saves_what_the_step_saves() -> None:
    images, labels = batches(1, num_images=8)[0]

    def peaks(learner: LocalLearner) -> tuple[memory.MemoryProfile, memory.MemoryProfile]:
        train(learner, batches(2, num_images=8))
        before = flat(learner.state_dict())
        estimated = estimate_step(learner, 8, adamw)
        assert_same(flat(learner.state_dict()), before)
        known = {"parameters": learner.model.parameters(), "buffers": learner.model.buffers()}
        return estimated, memory.track(
            lambda: learner.step_on(LocalBatch(torch.empty(images.shape), labels)),
            host=learner.host_tensors,
            categories=None if learner.offload else known,
        )

    estimated, measured = peaks(make_learner(modules=4))
    estimated_whole, measured_whole = peaks(make_learner(modules=4, offload=False))
    saved = estimated_whole.peak_bytes - estimated.peak_bytes
    assert saved == measured_whole.peak_bytes - measured.peak_bytes > 300_000
    assert estimated.host_bytes == measured.host_bytes > saved
    assert estimated_whole.host_bytes == 0


@pytest.mark.heavy
def test_the_average_waits_on_the_host() -> None:
    peaks = {decay: estimate_step(make_learner(ema_decay=decay), 4, adamw) for decay in (None, 0.9)}
    model = make()
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert peaks[0.9].peak_bytes == peaks[None].peak_bytes
    assert peaks[0.9].host_bytes == peaks[None].host_bytes + weights


@pytest.mark.heavy
def test_the_end_to_end_baseline_has_the_whole_model_on_the_device() -> None:
    learner = make_learner(modules=4)
    baseline = end_to_end(learner)
    assert (baseline.offload, baseline.device) == (True, learner.device)
    whole = end_to_end(make_learner(modules=4, offload=False))
    assert estimate_step(baseline, 4, adamw).peak_bytes == estimate_step(whole, 4, adamw).peak_bytes


# Streams -----------------------------------------------------------------------------------------------------------


def test_copies_and_steps_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which a GPU's two streams are told to wait; the GPU itself is left out."""
    learner = make_learner()
    train(learner, batches(1))
    told: list[str] = []
    compute = SimpleNamespace(wait_event=lambda event: told.append(f"compute waits for {event}"))

    def record_event() -> str:
        told.append("all is in")
        return "what came in"

    side = SimpleNamespace(
        wait_stream=lambda other: told.append("copies wait for compute") if other is compute else None,
        record_event=record_event,
        synchronize=lambda: told.append("processor waits"),
    )
    monkeypatch.setattr(Offloader, "_stream", side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    kept: set[int] = set()
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, _stream: kept.add(id(tensor)))
    for index, module in enumerate(learner.modules):
        module.register_forward_pre_hook(lambda *_, index=index: told.append(f"module {index}"))
    train(learner, batches(1))
    assert told == [
        *("all is in", "module 0", "copies wait for compute"),  # module 1 is in; module 0 goes home
        *("compute waits for what came in", "all is in", "module 1", "copies wait for compute"),
        *("compute waits for what came in", "all is in", "module 2", "copies wait for compute"),
        *("compute waits for what came in", "processor waits"),  # module 0 is in, module 2 is home
    ]
    assert kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_offloading_on_a_gpu(precision: str) -> None:
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    model, data = {"depth": 12, "embed_dim": 384, "num_heads": 6}, batches(4)
    peaks, states = [], []
    try:
        for offload in (False, True):
            net = make(**model)
            settings: dict[str, Any] = {"modules": 6, "input_size": SIZE, "precision": precision, "clip_grad": 1.0}
            learner = (
                LocalLearner(net, offload=True, device="cuda", **settings)
                if offload
                else LocalLearner(net.cuda(), **settings)
            )
            learner.configure_optimizers(adamw)
            torch.manual_seed(7)
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            for images, labels in data:
                learner.step(images.cuda(), labels.cuda())
                states.append({name: value.cpu().clone() for name, value in learner.model.state_dict().items()})
            peaks.append(torch.cuda.max_memory_allocated() - (base if offload else 0))
            del learner, net
    finally:
        torch.use_deterministic_algorithms(mode=False)
    for plain, offloaded in zip(states[:4], states[4:], strict=True):
        assert_same(offloaded, plain)
    assert peaks[1] < 0.6 * peaks[0]
