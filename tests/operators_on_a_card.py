"""A process on a card: what PyTorch's own allocator is asked for by one operator at a time, beside what we say.

Standard output: JSON, case to [asked for, foretold]: bytes that are taken, and negative ones given back, in order.
"""

from __future__ import annotations

import gc
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad.backbones.fake import FakeTensorMode
from localgrad.memory.cards import Card
from localgrad.memory.recording import Recorder
from localgrad.memory.temporaries import moves_of
from localgrad.memory.track import Tracker, autocast_of

aten = torch.ops.aten
PROPERTIES = torch.cuda.get_device_properties(0)
CARD = Card(
    name=PROPERTIES.name,
    total_bytes=PROPERTIES.total_memory,
    multiprocessors=PROPERTIES.multi_processor_count,
    threads=PROPERTIES.max_threads_per_multi_processor,
    capability=(PROPERTIES.major, PROPERTIES.minor),
)
Make = Callable[..., Tensor]


def asked_for(run: Callable[[], Any]) -> list[int]:
    """What the allocator is asked for while something runs.

    What it gets back of an earlier case is left out: autograd's thread lets go of its results when it comes to it.
    """
    torch.cuda.memory._record_memory_history(enabled=None)
    torch.cuda.memory._record_memory_history(enabled="all", context=None)
    result = run()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    del result
    asked, live = [], set()
    for entry in trace:
        if entry["action"] == "alloc":
            live.add(entry["addr"])
            asked.append(entry["size"])
        elif entry["action"] == "free_completed" and entry["addr"] in live:
            live.remove(entry["addr"])
            asked.append(-entry["size"])
    return asked


def foretold(prepare: Callable[[Make], Callable[[], Any]]) -> list[int]:
    """What we say that it would be asked for."""
    recorder = Recorder(CARD)
    with FakeTensorMode(), autocast_of("cuda", CARD), Tracker(1, recorder) as tracker:
        run = prepare(torch.empty)
        events = recorder.trace.events
        start = len(events)
        result = run()
        found, sizes = [], {number: nbytes for number, nbytes, *_ in events if nbytes > 0}
        for number, nbytes, *_ in events[start:]:
            found.append(nbytes if nbytes > 0 else -sizes[number])
        del result, tracker
    return found


def on_card(*shape: int, **how: Any) -> Tensor:
    return torch.empty(*shape, device="cuda", **how)


def attention(dtype: torch.dtype, queries: int, keys: int, width: int, heads: int = 4) -> dict[str, Any]:
    """Cases of fused attention, forward and backward; the layout is that of models, [B, N, heads, D]."""

    def made(make: Make) -> tuple[Tensor, Tensor, Tensor]:
        sides = (queries, keys, keys)
        q, k, v = (make(8, side, heads, width, dtype=dtype).transpose(1, 2).requires_grad_() for side in sides)
        return q, k, v

    def forward(make: Make) -> Callable[[], Any]:
        tensors = made(make)
        return lambda: F.scaled_dot_product_attention(*tensors)

    def backward(make: Make) -> Callable[[], Any]:
        tensors = made(make)
        output = F.scaled_dot_product_attention(*tensors)
        gradient = torch.empty_like(output)
        return lambda: torch.autograd.grad(output, tensors, gradient, retain_graph=True)

    name = f"attention {str(dtype).removeprefix('torch.')} {queries}x{keys}x{width}, {heads} heads"
    return {name: forward, f"{name}, backward": backward}


def make_plain(make: Make) -> Tensor:
    return make(8, 96, 56, 56)


def cases() -> dict[str, Callable[[Make], Callable[[], Any]]]:
    """What is tried: given how a tensor is made, a function that gives the call."""
    found: dict[str, Any] = {}

    case = partial(_into, found)

    @case("bias gradient")
    def _(make: Make) -> Any:
        x = make(64 * 197, 768)
        return lambda: x.sum(0)

    @case("bias gradient of halves")
    def _(make: Make) -> Any:
        x = make(64 * 197, 768, dtype=torch.bfloat16)
        return lambda: x.sum(0)

    @case("mean")
    def _(make: Make) -> Any:
        x = make(64, 197, 768)
        return x.mean

    @case("whether all are finite")
    def _(make: Make) -> Any:
        x = make(3072, 768)
        return lambda: torch.isfinite(x).all()

    @case("mean squared error")
    def _(make: Make) -> Any:
        x, y = make(64, 197, 192), make(64, 197, 192)
        return lambda: F.mse_loss(x, y)

    @case("cross entropy")
    def _(make: Make) -> Any:
        x, labels = make(64, 1000), make(64, dtype=torch.int64)
        return lambda: F.cross_entropy(x, labels)

    @case("softmax, backward")
    def _(make: Make) -> Any:
        x = make(64, 3, 49, 49)
        return lambda: aten._softmax_backward_data(x, x, -1, torch.float32)

    @case("roll")
    def _(make: Make) -> Any:
        x = make(8, 56, 56, 96)
        return lambda: torch.roll(x, (3, 3), (1, 2))

    @case("layer norm of a permuted input")
    def _(make: Make) -> Any:
        x, weight = make(8, 768, 196).transpose(1, 2), make(768)
        return lambda: torch.native_layer_norm(x, [768], weight, weight, 1e-5)

    for rows in (196, 70_000):

        @case(f"layer norm, backward, {rows} rows")
        def _(make: Make, rows: int = rows) -> Any:
            x, weight = make(rows, 96), make(96)
            mean, rstd = make(rows, 1), make(rows, 1)
            return lambda: aten.native_layer_norm_backward(x, x, [96], mean, rstd, weight, weight, [True] * 3)

    @case("layer norm, backward, permuted")
    def _(make: Make) -> Any:
        x, weight = make(8, 96, 196).transpose(1, 2), make(96)
        mean, rstd = make(8, 196, 1), make(8, 196, 1)
        return lambda: aten.native_layer_norm_backward(x, x, [96], mean, rstd, weight, weight, [True] * 3)

    @case("gradient of a table of positions")
    def _(make: Make) -> Any:
        table, index, values = make(169, 3), make(2401, dtype=torch.int64), make(2401, 3)
        return lambda: aten.index_put(table, [index], values, True)

    @case("patches")
    def _(make: Make) -> Any:
        images, weight, bias = make(8, 3, 224, 224), make(96, 3, 4, 4), make(96)
        return lambda: aten.convolution(images, weight, bias, [4, 4], [0, 0], [1, 1], False, [0, 0], 1)

    for wanted in ([True, True, True], [False, True, True]):

        @case(f"patches, backward, of the input {wanted[0]}")
        def _(make: Make, wanted: list[bool] = wanted) -> Any:
            images, weight, gradient = make(8, 3, 224, 224), make(96, 3, 4, 4), make(8, 96, 56, 56)
            how = [96], [4, 4], [0, 0], [1, 1], False, [0, 0], 1, wanted
            return lambda: aten.convolution_backward(gradient, images, weight, *how)

    found |= convolutions()
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if CARD.has_bfloat16 else [])):
        for queries, keys, width in ((197, 197, 64), (49, 49, 32), (3136, 49, 64), (197, 197, 128)):
            found |= attention(dtype, queries, keys, width)
        found |= attention(dtype, 1024, 1024, 64, heads=1)
    return found


def convolutions() -> dict[str, Any]:
    """Cases of convolutions within a model, whose features may lie in another order."""
    found: dict[str, Any] = {}

    for layout in ("contiguous", "permuted"):

        def features(make: Make, layout: str = layout) -> Tensor:
            return make(8, 96, 56, 56) if layout == "contiguous" else make(8, 56, 56, 96).permute(0, 3, 1, 2)

        @_into(found, f"depthwise convolution, {layout}")
        def _(make: Make, features: Any = features) -> Any:
            images, weight, bias = features(make), make(96, 1, 7, 7), make(96)
            return lambda: aten.convolution(images, weight, bias, [1, 1], [3, 3], [1, 1], False, [0, 0], 96)

        for forms in ((features, make_plain), (make_plain, features), (features, features)):

            @_into(found, f"depthwise convolution, backward, {layout}, {forms[0] is features} {forms[1] is features}")
            def _(make: Make, forms: Any = forms) -> Any:
                gradient, images, weight = forms[0](make), forms[1](make), make(96, 1, 7, 7)
                how = [96], [1, 1], [3, 3], [1, 1], False, [0, 0], 96, [True, True, True]
                return lambda: aten.convolution_backward(gradient, images, weight, *how)

        @_into(found, f"strided convolution of {layout} features")
        def _(make: Make, features: Any = features) -> Any:
            images, weight, bias = features(make), make(192, 96, 2, 2), make(192)
            return lambda: aten.convolution(images, weight, bias, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)

        for wanted in ("gradient", "images"):

            @_into(found, f"strided convolution, backward, {layout} {wanted}")
            def _(make: Make, features: Any = features, wanted: str = wanted, layout: str = layout) -> Any:
                images = features(make) if wanted == "images" else make_plain(make)
                permuted = wanted == "gradient" and layout == "permuted"
                gradient = make(8, 28, 28, 192).permute(0, 3, 1, 2) if permuted else make(8, 192, 28, 28)
                how = [192], [2, 2], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True]
                weight = make(192, 96, 2, 2)
                return lambda: aten.convolution_backward(gradient, images, weight, *how)

    return found


def _into(found: dict[str, Any], name: str) -> Callable[[Any], Any]:
    def taken(prepare: Any) -> Any:
        found[name] = prepare
        return prepare

    return taken


def reductions(number: int, seed: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """Reductions of random shapes, layouts, axes and types."""
    drawn = random.Random(seed)
    lengths = (1, 3, 7, 12, 49, 64, 96, 127, 128, 129, 197, 384, 511, 512, 513, 768, 1000, 3072, 3136, 12608)
    for _ in range(number):
        shape = [drawn.choice(lengths) for _ in range(drawn.choice((1, 2, 2, 3, 4)))]
        if math.prod(shape) > 1 << 27:
            continue
        axes = sorted(drawn.sample(range(len(shape)), drawn.randint(1, len(shape))))
        dtype = drawn.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
        x = on_card(*shape, dtype=dtype)
        x = x.transpose(-1, drawn.randrange(len(shape))) if drawn.random() < 0.4 else x
        func, args = drawn.choice(
            (
                (aten.sum.dim_IntList, (x, axes)),
                (aten.mean.dim, (x, axes)),
                (aten.linalg_vector_norm.default, (x, 2, axes)),
            )
        )
        taken = [nbytes for kind, nbytes in moves_of(func, args, CARD) or () if kind == "take"]
        name = f"{func} {tuple(x.shape)} {x.stride()} over {axes} {dtype}"
        yield name, [nbytes for nbytes in asked_for(lambda f=func, a=args: f(*a)) if nbytes > 0][1:], taken


def main() -> None:
    gc.disable()  # else what an earlier case left in a cycle might be given back in the middle of a later one
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    square = on_card(64, 64)
    answer: dict[str, Any] = {}
    multiplied = asked_for(lambda: square @ square)
    answer["the first product"] = [multiplied, foretold(_product)]
    on_card(8, 8).requires_grad_().mul(2).sum().backward()
    weight = on_card(64, 64).requires_grad_()
    (square @ weight).backward(square)  # autograd's own workspace
    for name, prepare in cases().items():
        expected = foretold(prepare)
        workspace = foretold_workspace()
        answer[name] = [asked_for(prepare(on_card)), [nbytes for nbytes in expected if nbytes != workspace]]
    for name, asked, told in reductions(int(sys.argv[1]), 1):
        answer[name] = [asked, told]
    sys.stdout.write(f"{json.dumps(answer)}\n")


def _product(make: Make) -> Callable[[], Tensor]:
    square = make(64, 64)
    return lambda: square @ square


def foretold_workspace() -> int:
    """Of cuBLAS: taken once a thread, and by the real one before any case."""
    from localgrad.memory.temporaries import workspace_bytes

    return workspace_bytes(CARD)


if __name__ == "__main__":
    main()
