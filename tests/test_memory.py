"""`localgrad.memory.track` against the profiler's own account of real steps, and piece by piece."""

import contextlib
import copy
import gc
import random
import threading
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _python_dispatch
from torch.utils.checkpoint import checkpoint

from helpers import profiler_peak
from localgrad.backbones import fake as _fake
from localgrad.memory import track as memory

MIB = 2**20


# -- toy nets and the independent reference -------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(768, 768), nn.GELU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(768, 10)), (3, 16, 16)


def vit(depth=3):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "depth": depth, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **sizes), (3, 32, 32)


def one_block():
    return vit(depth=1)


def swin():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 48, "num_classes": 10}
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, depths=(2, 2), num_heads=(2, 4), **sizes), (3, 32, 32)


def train_step(learner, images, labels, *, bf16=False):
    """A plain end-to-end step that keeps nothing alive."""
    model, optimizer = learner
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def nbytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shapes_of(**tensors: Tensor):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


# -- held against reality ---------------------------------------------------------------------------


def heavy(*values):
    return pytest.param(*values, marks=pytest.mark.heavy)


@pytest.mark.few(2)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("build", "bf16"),
    [
        *((build, False) for build in (mlp, vit, swin)),
        *((build, True) for build in (mlp, one_block)),
        *(heavy(build, True) for build in (vit, swin)),  # no processor of ours has bfloat16: seconds a step
    ],
)
def test_simulated_peak_is_the_profilers_peak(build, bf16, checkpointed):
    model, shape = build()
    if checkpointed:
        if build is mlp:
            model = nn.Sequential(model[0], Checkpointed(model[1:5]), Checkpointed(model[5:9]), model[9])
        else:
            model.set_grad_checkpointing(True)
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(32, *shape), torch.randint(10, (32,))
    inputs = shapes_of(images=images, labels=labels)
    profile = memory.simulate(
        (model, optimizer), lambda *args, **batch: train_step(*args, **batch, bf16=bf16), inputs=inputs
    )

    above_start = profiler_peak(lambda: train_step((model, optimizer), images, labels, bf16=bf16))
    state = [value for state in optimizer.state.values() for value in state.values()]
    static = nbytes_of(*model.parameters(), *model.buffers(), *state, images, labels)
    assert profile.static_bytes == pytest.approx(static, rel=1e-3)
    if bf16:  # kernels pack their operands in workspaces of fixed size, which nobody but they can see
        assert profile.peak_bytes == pytest.approx(static + above_start, rel=0.05)
    else:  # exact, even without the static bytes that both share
        assert profile.peak_bytes - profile.static_bytes == pytest.approx(above_start, rel=1e-3)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.heavy
def test_tracking_real_and_simulating_agree():
    model, shape = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(4, *shape), torch.randint(10, (4,))
    simulated = memory.simulate((model, optimizer), train_step, inputs=shapes_of(images=images, labels=labels))
    given_categories = {
        "parameters": model.parameters(),
        "buffers": model.buffers(),
        "inputs": [images, labels],
    }
    tracked = memory.track(lambda: train_step((model, optimizer), images, labels), categories=given_categories)
    assert simulated.peak_bytes == tracked.peak_bytes
    assert simulated.by_category == tracked.by_category
    # Without being told, everything that a step touches is found.
    untold = memory.track(lambda: train_step((model, optimizer), images, labels))
    assert untold.peak_bytes == tracked.peak_bytes


def test_mixed_precision_halves_activations():
    model, shape = vit()
    inputs = {"images": ((32, *shape), torch.float32)}

    def forward(model, images, bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(images)
        assert output.dtype == (torch.bfloat16 if bf16 else torch.float32)
        output.float().sum().backward()

    full, half = (
        memory.simulate(model, lambda m, images, b=bf16: forward(m, images, b), inputs=inputs) for bf16 in (False, True)
    )
    assert 0.45 < half.by_category["activations"] / full.by_category["activations"] < 0.7


# -- the account, piece by piece ------------------------------------------------------------------------


def test_views_and_in_place_operators_do_not_count_twice():
    def step():
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:].t()
        b.add_(1)
        torch.mul(a, 2, out=a)
        return b

    assert memory.track(step).peak_bytes == 4000


def test_a_storage_is_freed_with_its_last_reference():
    def step():
        a = torch.zeros(1000)
        view = a[:1]
        del a
        b = torch.zeros(1000)  # `view` keeps the first alive
        del view, b
        torch.zeros(1500)

    profile = memory.track(step)
    assert profile.peak_bytes == 8000
    assert [alive for _, alive in profile.timeline] == [0, 4000, 8000, 4000, 0, 6000, 0]


def test_what_autograd_alone_keeps_is_alive():
    weight = nn.Parameter(torch.ones(1000))

    def step():
        hidden = weight.exp()  # saved by exp and by sin
        loss = hidden.sin().sum()
        del hidden
        torch.zeros(2000)
        assert loss.requires_grad

    profile = memory.track(step)
    assert profile.static_bytes == profile.by_category["parameters"] == 4000
    assert profile.peak_bytes == 4000 + 4000 + 4 + 8000


def test_resizing_replaces_the_old_block():
    def step():
        a = torch.zeros(1000)
        a.resize_(3000)
        a.resize_(10)  # PyTorch keeps the block when a tensor shrinks
        torch.zeros(10)

    assert memory.track(step).peak_bytes == 12_000 + 40


def test_rounding_is_per_storage():
    assert memory.track(lambda: [torch.zeros(1), torch.zeros(129)], rounding=512).peak_bytes == 512 + 1024


def test_gradients_are_told_apart_and_optimizer_state_is_found():
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.ones(1, 100)).sum().backward()
        torch.zeros(10**6)  # so that the peak falls here
        optimizer.step()
        optimizer.zero_grad()

    at_peak = memory.track(step).by_category
    assert at_peak["parameters"] == at_peak["gradients"] == 40_000
    assert at_peak["optimizer"] == 2 * 40_000 + 4
    assert set(at_peak) == set(memory.CATEGORIES)


def test_gradients_left_by_the_last_step_were_there_before():
    weight = nn.Parameter(torch.ones(1000))

    def step():
        weight.grad = None
        weight.square().sum().backward()

    profile = memory.track(step, categories={"parameters": [weight]})
    assert profile.static_bytes == 8000
    assert weight._post_accumulate_grad_hooks in (None, {})  # nothing of ours stays behind


def test_a_storage_met_late_counts_from_the_start():
    late = torch.ones(1000)

    def step():
        big = torch.zeros(5000)
        del big
        late.sum()

    profile = memory.track(step, warmup=0)
    assert profile.static_bytes == 4000
    assert profile.peak_bytes == 24_000
    assert profile.timeline[0] == (0, 4000)


def test_a_storage_that_was_there_can_leave():
    box = []

    def step():
        box.append(torch.ones(1000))
        if len(box) > 1:
            del box[:]
            torch.zeros(100)

    assert memory.track(step).peak_bytes == 8000


def test_labels_get_their_own_peaks():
    def step():
        a = torch.zeros(100)
        with memory.annotate("first"):
            torch.zeros(1000)
            with memory.annotate("inner"):
                torch.zeros(3000)
        with memory.annotate("second"):
            torch.zeros(2000)
        with memory.annotate("first"):
            torch.zeros(500)
        return a

    profile = memory.track(step)
    assert profile.peak_label == "inner"
    assert profile.peak_by_label == {"": 400, "first": 4400, "inner": 12_400, "second": 8400}


def test_annotate_is_free_where_nothing_is_tracked():
    with memory.annotate("nowhere"):
        pass
    with pytest.raises(ZeroDivisionError), memory.annotate("nowhere"):
        _ = 1 / 0


def test_cycles_of_earlier_steps_do_not_count():
    def step():
        cycle = [torch.zeros(1000)]
        cycle.append(cycle)

    assert memory.track(step, warmup=3).peak_bytes == 4000
    assert gc.isenabled()


@pytest.mark.parametrize("bad", [{"rounding": 0}, {"categories": {"weights": []}}])
def test_wrong_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=r"rounding must be|categories must be among"):
        memory.track(lambda: None, **bad)


@given(st.lists(st.tuples(st.sampled_from(["make", "view", "free", "touch"]), st.integers(0, 50)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_sequence_matches_a_naive_account(actions):
    held: list[Tensor] = []
    owners: list[int] = []
    sizes: dict[int, int] = {}
    naive = 0

    def step():
        nonlocal naive
        for owner, (action, number) in enumerate(actions):
            if action == "make":
                held.append(torch.empty(number, dtype=torch.uint8))
                owners.append(owner)
                sizes[owner] = number
            elif held:
                index = number % len(held)
                if action == "view":
                    held.append(held[index][: number // 2])
                    owners.append(owners[index])
                elif action == "free":
                    del held[index], owners[index]
                else:
                    held[index].add_(1)
            naive = max(naive, sum(sizes[owner] for owner in set(owners)))
        held.clear()

    assert memory.track(step, warmup=0).peak_bytes == naive


# -- fake copies ------------------------------------------------------------------------------------------


class Learner:
    """Holds tensors in every way that a learner might."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.model[2].weight = self.model[0].weight  # one parameter, two places
        self.model.register_buffer("mask", torch.ones(2, 3).t(), persistent=False)
        self.cache = {"rope": [torch.ones(5, dtype=torch.bfloat16)]}  # plain attributes
        self.whole = torch.arange(12.0).view(3, 4)
        self.part = self.whole[1:, ::2]  # shares the storage
        self.logits = self.model(torch.ones(2, 4))  # not a leaf
        self.generator = torch.Generator()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda epoch: 0.5)

    def step(self, images):
        self.model(images).sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def test_fake_copy_copies_what_a_learner_holds():
    learner = Learner()
    learner.step(torch.ones(2, 4))
    learner.model(torch.ones(2, 4)).sum().backward()  # gradients are alive
    _, fake = _fake.fake_copy(learner)
    model = fake.model
    assert model[0].weight is model[2].weight
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.requires_grad
    assert fake.optimizer.param_groups[0]["params"][0] is model[0].weight
    everything = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters()),
        *(value for state in fake.optimizer.state.values() for value in state.values()),
        fake.cache["rope"][0],
        fake.whole,
        fake.part,
        fake.logits,
    ]
    assert all(isinstance(tensor, FakeTensor) and tensor.device.type == "cpu" for tensor in everything)
    assert list(fake.optimizer.state) == list(model.parameters())
    assert fake.cache["rope"][0].dtype == torch.bfloat16
    assert model.mask.stride() == learner.model.mask.stride()
    assert (fake.part.shape, fake.part.stride(), fake.part.storage_offset()) == ((2, 2), (4, 2), 4)
    assert fake.part.untyped_storage() is fake.whole.untyped_storage()
    assert fake.part.untyped_storage().nbytes() == 48


def test_fake_copy_keeps_parameters_that_share_a_storage_together():
    first = nn.Parameter(torch.ones(6))
    _, (a, b) = _fake.fake_copy((first, nn.Parameter(first.data.view(2, 3), requires_grad=False)))
    assert a.untyped_storage() is b.untyped_storage()
    assert (a.requires_grad, b.requires_grad, b.shape) == (True, False, (2, 3))


def test_fake_copy_takes_a_model_without_memory():
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6)  # 4 TB
    mode, fake = _fake.fake_copy(model)
    with mode:
        assert fake(torch.ones(1, 10**6)).device.type == "cpu"


def test_fake_copy_names_what_it_could_not_copy():
    with pytest.raises(TypeError) as caught:
        _fake.fake_copy([nn.Linear(2, 2), threading.Lock()])
    assert "fake_copy" in caught.value.__notes__[0]


def test_swins_masks_are_copied():
    model, _ = swin()
    _, fake = _fake.fake_copy(model)
    masks = [name for name, _ in model.named_buffers() if name.endswith("attn_mask")]
    assert len(masks) == 2
    assert all(isinstance(fake.get_buffer(name), FakeTensor) for name in masks)


def test_simulate_changes_nothing():
    learner = Learner()
    learner.step(torch.ones(2, 4))
    weights = copy.deepcopy(learner.model.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def step(fake, images):
        F.dropout(images, 0.5)
        torch.manual_seed(random.randrange(9) + np.random.randint(9))
        fake.step(images)

    memory.simulate(learner, step, inputs={"images": ((2, 4), torch.float32)})
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    after = learner.model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(p.grad is None and type(p) is nn.Parameter for p in learner.model.parameters())
    assert learner.optimizer.state[learner.model[0].weight]["step"].item() == 1


def test_simulate_finds_state_that_a_resumed_optimizer_brings():
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

    def step(learner, images):
        model, optimizer = learner
        model(images).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    inputs = {"images": ((1, 100), torch.float32)}
    profile = memory.simulate((model, optimizer), step, inputs=inputs, warmup=0)
    assert profile.static_bytes == 3 * 40_000 + 4 + 400


def test_simulating_for_cuda_rounds_and_takes_the_foreach_loop():
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())

    def step(learner, images):
        model, optimizer = learner
        model(images).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    inputs = {"images": ((1, 128), torch.float32)}
    cpu, cuda = (memory.simulate((model, optimizer), step, inputs=inputs, device=name) for name in ("cpu", "cuda"))
    assert cuda.static_bytes % 512 == 0
    assert cuda.peak_bytes - cpu.peak_bytes > 5 * 128 * 128 * 4  # temporaries of all parameters at once
    assert optimizer.param_groups[0]["foreach"] is None


def test_reading_a_value_gives_zero():
    seen = []

    def step(model, images):
        loss = model(images).sum().detach()
        seen.extend([loss.item(), float(loss), bool(loss.isnan()), int(loss.argmax())])

    memory.simulate(nn.Linear(4, 4), step, inputs={"images": ((2, 4), torch.float32)}, warmup=0)
    assert seen == [0.0, 0.0, False, 0]


def test_a_real_tensor_in_a_closure_is_refused():
    captured = torch.ones(2, 4)
    with pytest.raises(AssertionError, match="FakeTensor"):
        memory.simulate(nn.Linear(4, 4), lambda model: model(captured), inputs={})


# -- what autograd saves -------------------------------------------------------------------------------------


def test_saved_bytes_counts_each_storage_once_and_leaves_parameters_out():
    layer, x = nn.Linear(10, 20), torch.ones(5, 10)
    assert memory.saved_bytes(layer, x, exclude=layer.parameters()) == 5 * 10 * 4
    weight = torch.ones(5, 10, requires_grad=True)
    assert memory.saved_bytes(lambda w: w * w.view(5, 10), weight) == 5 * 10 * 4


@pytest.mark.parametrize("build", [vit, swin])
def test_blocks_save_together_what_the_whole_saves(build):
    model, shape = build()
    chain = [Embed(model), *model.blocks] if build is vit else [model.patch_embed, *model.layers]
    states = [*model.parameters(), *model.buffers()]
    parts = memory.block_activation_bytes(chain, torch.empty(2, *shape, device="meta"))
    whole = memory.saved_bytes(nn.Sequential(*chain), torch.randn(2, *shape), exclude=states)
    assert sum(parts) == whole
    assert all(part > 0 for part in parts)
    doubled = memory.block_activation_bytes(chain, torch.empty(4, *shape))
    assert doubled == pytest.approx([2 * part for part in parts], rel=0.02)  # position biases don't grow


class Embed(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = [vit]
        self.patch_embed, self.cls_token, self.pos_embed = vit.patch_embed, vit.cls_token, vit.pos_embed

    def forward(self, x):
        x = self.patch_embed(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed


def test_a_seam_that_both_sides_save_counts_once():
    parts = [nn.Sequential(nn.Linear(10, 10), nn.ReLU()), nn.Linear(10, 10)]
    # The first saves its input and ReLU's output; the second saves that same output.
    assert memory.block_activation_bytes(parts, torch.ones(3, 10)) == [2 * 120, 0]


# -- fake operators ---------------------------------------------------------------------------------------------


def told(result, given=()):
    """All that is to be known of what an operator gives: shapes, types, and whose memory it stands in."""
    owners = {id(tensor.untyped_storage()): place for place, tensor in enumerate(given) if isinstance(tensor, Tensor)}
    told = []
    for item in result if isinstance(result, (list, tuple)) else [result]:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            own = owners.setdefault(id(storage), len(owners) + len(given))
            layout = tuple(item.shape), item.stride(), item.storage_offset(), item.dtype, item.device
            told.append((*layout, storage.nbytes(), own, any(item is other for other in given)))
        else:
            told.append(len(item) if isinstance(item, list) else item)
    return told


class Checked(_fake.FakeTensorMode):
    """Holds what is remembered of operators against PyTorch's own mode, whenever it is used."""

    cpp_meta_supports_symint = fake_tensor.FakeTensorMode.cpp_meta_supports_symint

    num_checked = 0

    def known(self, func, args, kwargs):
        result = super().known(func, args, kwargs)
        if result is NotImplemented or func in NOT_COMPARED:
            return result
        if result is args[0] and result.constant is not None:
            return result  # PyTorch's mode gives another, though it is in place
        is_below = _python_dispatch._get_current_dispatch_mode() is self
        with _python_dispatch._pop_mode_temporarily() if is_below else contextlib.nullcontext():
            theirs = _fake._dispatch(self, func, (), args, kwargs)
        assert told(result, args) == told(theirs, args), func
        Checked.num_checked += 1
        return result


NOT_COMPARED = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default}
NOT_COMPARED |= {func for func in _fake._AT_ONCE if func.namespace == "profiler"}
"""What gives no tensor that operators could give."""


@pytest.mark.parametrize(
    ("build", "bf16"),
    [(mlp, False), *(heavy(*each) for each in [(mlp, True), (vit, True), (swin, False), (vit, False), (swin, True)])],
)
def test_remembered_operators_give_what_pytorch_gives(build, bf16, monkeypatch):
    monkeypatch.setattr(_fake.FakeTensorMode, "_recipes", {})
    model, size = build()
    learner = model, torch.optim.AdamW(model.parameters(), foreach=bf16)
    inputs = {"images": ((4, *size), torch.float32), "labels": ((4,), torch.int64)}
    memory.simulate(learner, lambda *a, **k: train_step(*a, bf16=bf16, **k), inputs=inputs)
    known = sum(recipe is not None for recipe in _fake.FakeTensorMode._recipes.values())
    assert known > 0.8 * len(_fake.FakeTensorMode._recipes)

    monkeypatch.setattr(_fake, "FakeTensorMode", Checked)
    monkeypatch.setattr(Checked, "num_checked", 0)
    memory.simulate(learner, lambda *a, **k: train_step(*a, bf16=bf16, **k), inputs=inputs)
    assert Checked.num_checked > known


def test_numbers_that_optimizers_count_on_are_known():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    mode, optimizer = memory.fake_copy(torch.optim.AdamW([weight], foreach=False))
    with mode:
        with memory.Tracker(1):
            for _ in range(3):
                optimizer.step()
            [state] = optimizer.state.values()
            assert state["step"].item() == 3
            assert state["step"].mul_(2).item() == 6
        with pytest.raises(_fake.NEEDS_VALUES):
            state["exp_avg"].sum().item()


def arguments():
    """Operators with arguments of which something could be overlooked."""
    aten = torch.ops.aten
    a, matrix = torch.empty(2, 3, 4), torch.empty(5, 4)
    yield aten.full.default, ([2], 1)
    yield aten.full.default, ([2], 1.0)
    yield aten.full.default, ([2], True)
    yield aten.add_.Tensor, (a, a)
    yield aten.split.Tensor, (a, 1)
    yield aten.view.default, (a[1:], [12])
    yield aten.view.default, (a[:1], [12])
    yield aten.unbind.int, (a,)
    yield aten.t.default, (matrix,)
    yield aten.detach.default, (a,)
    yield aten.clone.default, (a.transpose(0, 2),)
    yield aten.to.dtype, (a, torch.float32)
    yield aten.to.dtype, (a, torch.bfloat16)
    yield aten.cat.default, ([a, a],)
    yield aten.atleast_1d.Sequence, ([a, a],)
    yield aten.native_layer_norm.default, (a, [4], None, None, 1e-5)
    yield aten._foreach_add_.List, ([a, matrix], [a, matrix])
    yield aten.unsqueeze_.default, (a, 0)
    yield aten.resize_.default, (matrix, [3, 4])


def test_remembering_overlooks_nothing():
    def results(mode):
        with mode:
            for func, given in arguments():
                yield func, told(func(*given), given), told(given)
            torch.set_default_dtype(torch.float64)
            try:
                yield torch.float64, told(torch.ops.aten.full.default([2], 1.0)), []
            finally:
                torch.set_default_dtype(torch.float32)

    expected = list(results(fake_tensor.FakeTensorMode()))
    for _ in range(2):  # the second time, operators are known
        assert list(results(_fake.FakeTensorMode())) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_for_shapes_give_what_decompositions_give(dtype):
    aten, results = torch.ops.aten, []
    for mode in (_fake.FakeTensorMode(), fake_tensor.FakeTensorMode()):
        with mode:
            a, matrix, row, column = (torch.empty(*shape, dtype=dtype) for shape in ((2, 3, 4), (5, 4), (4,), (5, 1)))
            statistic = torch.empty(2, 3, 1)
            calls = [
                (aten.addmm.default, (row, matrix, torch.empty(4, 4, dtype=dtype).t())),
                (aten.addmm.default, (row, torch.empty(4, 5, dtype=dtype).t(), torch.empty(4, 4, dtype=dtype))),
                (aten.addmm.default, (column, matrix, torch.empty(4, 6, dtype=dtype))),
                *((aten.gelu_backward.default, (x, x)) for x in (a, a.transpose(0, 1), a[:, 1:])),
                (aten.gelu_backward.default, (a, a.transpose(0, 1).contiguous().transpose(0, 1))),
                *((aten._softmax_backward_data.default, (x, x, -1, dtype)) for x in (a, a.transpose(0, 1))),
                *(
                    (
                        aten.native_layer_norm_backward.default,
                        (a, a, [4], statistic, statistic, weight, weight, [True, weight is not None, mask]),
                    )
                    for weight in (row, None)
                    for mask in (weight is not None, False)
                ),
            ]
            results.append([told(func(*given), given) for func, given in calls])
    for call, (one, other) in enumerate(zip(*results, strict=True)):
        assert one == other, call


def plain_and_odd_calls():
    """Operators that have a rule, as the rules take them and as they leave them to PyTorch."""
    aten = torch.ops.aten
    a, matrix, row = torch.empty(2, 3, 4), torch.empty(5, 4), torch.empty(4)
    turned, half, whole, nothing = a.transpose(0, 2), a.bfloat16(), a.int(), torch.empty(0, 4)
    for func in (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor):
        for other in (a, row, half, whole, 2.0, 2, torch.empty(()), turned.contiguous().transpose(0, 2)):
            yield func, (a, other), {}
        yield func, (whole, whole), {}
        yield func, (turned, turned), {}
    for func in (aten.gelu.default, aten.neg.default, aten.relu.default, aten.rsqrt.default, aten.silu.default):
        for each in (a, turned, half, nothing, a[:, 1:]):
            yield func, (each,), {}
    yield aten.rsqrt.default, (whole,), {}
    yield aten.gelu.default, (a,), {"approximate": "tanh"}
    yield aten.roll.default, (a, [1, 2], [0, 1]), {}
    yield aten.roll.default, (turned, [1], [0]), {}
    yield aten.roll.default, (a, [1]), {}
    for given_to in (a, turned, half):
        weight = torch.empty(given_to.shape[-1], dtype=given_to.dtype)
        yield aten.native_layer_norm.default, (given_to, [given_to.shape[-1]], weight, weight, 1e-5), {}
        yield aten.native_layer_norm.default, (given_to, [given_to.shape[-1]], None, None, 1e-5), {}
        statistic = torch.empty(*given_to.shape[:-1], 1, dtype=given_to.dtype)
        arguments = (
            given_to,
            given_to,
            [given_to.shape[-1]],
            statistic,
            statistic,
            weight,
            weight,
            [True, True, False],
        )
        yield aten.native_layer_norm_backward.default, arguments, {}
    yield aten.native_layer_norm.default, (nothing, [4], row, row, 1e-5), {}
    yield aten.native_layer_norm.default, (half, [4], row, row, 1e-5), {}
    for kwargs in ({}, {"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}):
        image = torch.empty(2, 3, 4, 4)
        yield aten.empty_like.default, (image,), kwargs
        yield aten.zeros_like.default, (image.permute(0, 2, 3, 1),), kwargs
        yield aten.empty.memory_format, ([2, 3, 4, 4],), kwargs
    yield aten._foreach_sqrt.default, ([a, matrix],), {}
    yield aten._foreach_sqrt.default, ([turned, whole],), {}
    yield aten._foreach_addcmul_.Scalar, ([a, matrix], [a, matrix], [a, matrix], 1.0), {}
    yield aten._foreach_add_.List, ([a, matrix], [a, row]), {}
    yield aten.addmm.default, (row, matrix, torch.empty(4, 4)), {"beta": 2}


def test_rules_of_shapes_say_what_pytorch_says(monkeypatch):
    monkeypatch.setattr(_fake.FakeTensorMode, "_recipes", {})

    def results(mode):
        with mode:
            return [(func, told(func(*args, **kwargs), args)) for func, args, kwargs in plain_and_odd_calls()]

    expected = results(fake_tensor.FakeTensorMode())
    for _ in range(2):
        for one, other in zip(results(_fake.FakeTensorMode()), expected, strict=True):
            assert one == other


@pytest.mark.parametrize(
    ("name", "shapes"), [("_foreach_add_.List", ((2, 3), (3, 2))), ("addmm.default", ((4,), (5, 3), (4, 4)))]
)
def test_rules_of_shapes_hide_no_mistake(name, shapes):
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload)
    with _fake.FakeTensorMode():
        tensors = [torch.empty(*shape) for shape in shapes]
        with pytest.raises(RuntimeError):
            func(*([[each] for each in tensors] if "foreach" in name else tensors))


def test_numbers_that_fake_tensors_know_are_computed_each_time():
    with _fake.FakeTensorMode():
        for number in (1.0, 2.0):
            counter = torch.tensor(number)
            counter += 1
            assert (counter * 3).item() == 3 * (number + 1)


def test_pinned_a_quickly_made_fake_tensor_is_as_pytorch_makes_it():
    mode = _fake.FakeTensorMode()
    shaped = torch.empty(2, 3, dtype=torch.float64, device="meta")
    slow = FakeTensor(mode, shaped, torch.device("cpu"))
    for around in (contextlib.nullcontext(), mode):  # also where operators would be fake ones
        with around:
            quick = mode.make((2, 3), (3, 1), torch.float64)
            view = mode.make((2,), (3,), torch.float64, memory=quick.untyped_storage(), offset=1)
        assert vars(quick) == vars(view) == vars(slow)
        assert told(quick) == told(slow)
        assert view.untyped_storage() is quick.untyped_storage()
        assert view.storage_offset() == 1
        with pytest.raises(RuntimeError):
            quick.data_ptr()


# -- what we rely on inside PyTorch -----------------------------------------------------------------------------


def test_pinned_a_storage_has_one_python_object_that_lives_as_long_as_it_does():
    a = torch.ones(10, requires_grad=True).exp()
    reference = weakref.ref(a.untyped_storage())
    assert a.view(2, 5).untyped_storage() is a.untyped_storage()
    kept_by_autograd = a.sin().sum()
    del a
    gc.collect()
    assert reference() is not None
    kept_by_autograd.backward()
    del kept_by_autograd
    assert reference() is None


def test_pinned_backward_on_the_cpu_runs_under_the_mode():
    weight = nn.Parameter(torch.ones(1000))

    def step():
        loss = weight.sin().sum()
        with memory.annotate("backward"):
            loss.backward()
        weight.grad = None

    profile = memory.track(step, categories={"parameters": [weight]})
    assert profile.peak_label == "backward"
    assert profile.by_category["gradients"] + profile.by_category["temporary"] > 0


def test_objects_that_others_froze_stay_so_and_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, done = [0, 5], []
    monkeypatch.setattr(memory, "_frozen_by", [])
    monkeypatch.setattr(gc, "get_freeze_count", lambda: counts.pop(0))
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: done.append("unfreeze"))
    with memory.collecting_own_garbage(), memory.collecting_own_garbage():
        assert done == ["freeze"], "one within the other"
    assert done == ["freeze", "unfreeze"]
    for _ in range(3):
        with memory.collecting_own_garbage():
            pass
    assert (done, counts) == (["freeze", "unfreeze"], [])
