"""Decoders and classifiers: what they compute, at which resolution, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from localgrad import Layout
from localgrad.errors import RecipeError
from localgrad.objectives.auxiliary import (
    CLASSIFIERS,
    DECODERS,
    ConvDecoder,
    Decoder,
    LinearClassifier,
    LinearDecoder,
    MlpClassifier,
    Pool,
    TransformerClassifier,
    TransformerDecoder,
    build_classifier,
    build_decoder,
    transformer_blocks,
)

ALONE = [name for name in CLASSIFIERS if name not in ("next", "readout", "tail")]
"""Those that need no parts of a model; the others: tests/test_remedies.py, tests/test_language.py."""
SMALL = [name for name in DECODERS if name != "bilinear"]  # those that work at the module's own resolution
ORDER = tuple(int(i) for i in torch.randperm(36, generator=torch.Generator().manual_seed(3)))
SOURCES = {
    "NHWC": Layout(kind="NHWC", width=40, grid=(6, 6)),
    "NCHW": Layout(kind="NCHW", width=40, grid=(6, 6)),
    "tokens": Layout(kind="tokens", width=40, grid=(6, 6)),
    "prefix tokens": Layout(kind="tokens", width=40, grid=(6, 6), num_prefix_tokens=3),
    "ordered tokens": Layout(kind="tokens", width=40, grid=(6, 6), order=ORDER),
    "oblong": Layout(kind="NHWC", width=40, grid=(2, 6)),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def features(layout: Layout, count: int = 2) -> Tensor:
    height, width = layout.grid
    shape = {
        "NHWC": (height, width, layout.width),
        "NCHW": (layout.width, height, width),
        "tokens": (layout.num_prefix_tokens + height * width, layout.width),
    }[layout.kind]
    return torch.randn(count, *shape)


def grid_of(layout: Layout, x: Tensor) -> Tensor:
    """[B, H, W, D], written position by position."""
    height, width = layout.grid
    grid = torch.empty(len(x), height, width, layout.width)
    for row in range(height):
        for column in range(width):
            if layout.kind == "NHWC":
                grid[:, row, column] = x[:, row, column]
            elif layout.kind == "NCHW":
                grid[:, row, column] = x[:, :, row, column]
            else:
                place = row * width + column
                token = place if layout.order is None else layout.order.index(place)
                grid[:, row, column] = x[:, layout.num_prefix_tokens + token]
    return grid


@pytest.mark.parametrize(
    ("places", "positions", "stride"),
    [(7, 4, 2), (384, 27, 14), (30, 7, 4), (15, 15, 1), (28, 7, 4), (518, 37, 14), (223, 111, 2)],
)
def test_what_a_decoder_predicts_lies_where_its_position_came_from(places: int, positions: int, stride: int) -> None:
    """Grids that a stride doesn't divide: backbones pad them, or drop what is left, and neither moves a place."""
    target = Layout(kind="NHWC", width=1, grid=(1, places))
    decoder = LinearDecoder(Layout(kind="NHWC", width=1, grid=(1, positions)), target)
    assert decoder.ratio == (1, stride) and decoder.num_outputs == stride
    decoder.norm = decoder.project = nn.Identity()
    decoder.patches = lambda grid: grid.repeat(1, 1, 1, stride)  # type: ignore[method-assign]
    numbers = torch.arange(positions).float().reshape(1, 1, positions, 1)
    expected = (torch.arange(places) // stride).clamp(max=positions - 1).float()
    assert torch.equal(decoder(numbers).flatten(), expected)
    assert torch.equal(decoder.spread(numbers[..., 0] > 2).flatten(), expected > 2)


def test_where_no_stride_makes_a_grid_the_nearest_position_counts() -> None:
    coarse, fine = (Layout(kind="NHWC", width=1, grid=(side, side)) for side in (5, 8))
    decoder = LinearDecoder(fine, coarse)  # upsampled inside the module
    numbers = torch.arange(8.0).expand(1, 8, 8).unsqueeze(-1)
    decoder.patches = lambda grid: grid  # type: ignore[method-assign]
    assert decoder(numbers)[0, 0, :, 0].tolist() == [0, 2, 4, 5, 7]


@pytest.mark.parametrize("name", ["next", "linear"])
def test_what_a_classifier_is_given_of_the_model_is_no_option(name: str) -> None:
    for option in ("following", "tail", "undecayed", "per_token"):
        with pytest.raises(RecipeError, match=rf"'{name}' can't take") as refused:
            build_classifier(name, SOURCES["NHWC"], 3, {option: 1})
        options = str(refused.value).partition("its options are")[2].partition(".")[0]
        assert not {"following", "tail", "undecayed", "per_token"} & {*options.replace(" ", "").split(",")}


# Decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [Layout(kind="NCHW", width=3, grid=(24, 24)), SOURCES["prefix tokens"]], ids=["image", "same"]
)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SMALL)
def test_decoders_predict_the_target_grid(name: str, source: str, target: Layout) -> None:
    decoder = build_decoder(name, SOURCES[source], target, {})
    prediction = decoder(features(SOURCES[source]))
    assert prediction.shape == (2, *target.grid, target.width)
    prediction.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in decoder.named_parameters()), name


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SMALL)
def test_decoders_read_every_layout_alike(name: str, source: str) -> None:
    layout, plain = SOURCES[source], Layout(kind="NHWC", width=40, grid=SOURCES[source].grid)
    target = Layout(kind="NCHW", width=3, grid=(24, 24))
    ours, theirs = build_decoder(name, layout, target, {}), build_decoder(name, plain, target, {})
    theirs.load_state_dict(ours.state_dict())
    x = features(layout)
    torch.testing.assert_close(ours(x), theirs(grid_of(layout, x)))


@pytest.mark.parametrize(("source", "target"), [((7, 7), (13, 13)), ((4, 2), (7, 3)), ((3, 3), (7, 9))])
@pytest.mark.parametrize("name", SMALL)
def test_odd_grids_are_cropped(name: str, source: tuple[int, int], target: tuple[int, int]) -> None:
    """A backbone that pads 13 positions to 14 merges them to 7; the decoder predicts 14 and leaves one out."""
    small = Layout(kind="NHWC", width=40, grid=source)
    decoder = build_decoder(name, small, Layout(kind="NHWC", width=6, grid=target), {})
    rows, columns = (-(-t // s) for t, s in zip(target, source, strict=True))
    whole_grid = (source[0] * rows, source[1] * columns)
    whole = build_decoder(name, small, Layout(kind="NHWC", width=6, grid=whole_grid), {})
    whole.load_state_dict(decoder.state_dict())
    x = features(small)
    assert decoder(x).shape == (2, *target, 6)
    assert torch.equal(decoder(x), whole(x)[:, : target[0], : target[1]])


class Given(Decoder):
    """Patches as they come in, so that only the shuffle is looked at."""

    def patches(self, grid: Tensor) -> Tensor:
        return grid


@pytest.mark.parametrize("ratio", [(1, 1), (2, 2), (4, 4), (2, 3)])
def test_pixel_shuffle_places_every_value_where_a_naive_loop_does(ratio: tuple[int, int]) -> None:
    rows, columns = ratio
    width = 3
    source = Layout(kind="NHWC", width=rows * columns * width, grid=(5, 4))
    decoder = Given(source, Layout(kind="NHWC", width=width, grid=(5 * rows, 4 * columns)))
    assert decoder.ratio == ratio
    assert decoder.num_outputs == source.width
    x = features(source)
    image = decoder(x)
    for row in range(5 * rows):
        for column in range(4 * columns):
            start = ((row % rows) * columns + column % columns) * width
            assert torch.equal(image[:, row, column], x[:, row // rows, column // columns, start : start + width])


@pytest.mark.parametrize("side", [1, 2, 4])
def test_pixel_shuffle_is_torchs_own_up_to_the_order_of_channels(side: int) -> None:
    width = 3
    source = Layout(kind="NHWC", width=side * side * width, grid=(5, 4))
    decoder = Given(source, Layout(kind="NHWC", width=width, grid=(5 * side, 4 * side)))
    x = features(source)
    # torch counts a channel as d * side**2 + place in the patch, we as place * width + d.
    order = [position * width + d for d in range(width) for position in range(side * side)]
    expected = nn.functional.pixel_shuffle(x[..., order].permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    assert torch.equal(decoder(x), expected)


@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((6, 6), 4), ((4, 8), 4), ((5, 7), 14), ((3, 4), 2)])
def test_transformer_decoder_attends_within_windows_only(grid: tuple[int, int], window: int) -> None:
    source = Layout(kind="NHWC", width=32, grid=grid)
    target = Layout(kind="NHWC", width=4, grid=(grid[0] * 2, grid[1] * 2))
    decoder = TransformerDecoder(source, target, window=window)
    sides = [max(d for d in range(1, window + 1) if side % d == 0) for side in grid]
    assert list(decoder.window) == sides
    x = features(source)
    expected = torch.empty(2, *grid, decoder.num_outputs)
    for top in range(0, grid[0], sides[0]):
        for left in range(0, grid[1], sides[1]):
            patch = x[:, top : top + sides[0], left : left + sides[1]]
            tokens = torch.stack([patch[:, i, j] for i in range(sides[0]) for j in range(sides[1])], dim=1)
            tokens = decoder.leave(decoder.blocks(decoder.enter(decoder.norm(tokens))))
            for number in range(sides[0] * sides[1]):
                expected[:, top + number // sides[1], left + number % sides[1]] = tokens[:, number]
    torch.testing.assert_close(decoder.patches(x), expected)


def test_a_window_is_no_larger_than_asked_for_at_real_sizes() -> None:
    target = Layout(kind="NCHW", width=3, grid=(224, 224))
    decoder = TransformerDecoder(Layout(kind="NHWC", width=96, grid=(56, 56)), target)
    assert decoder.window == (14, 14)


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_computed_above_the_modules_own_resolution(name: str) -> None:
    """The reason for these decoders: no activation is larger than the features, but for the prediction itself."""
    source, target = Layout(kind="NHWC", width=40, grid=(6, 6)), Layout(kind="NCHW", width=3, grid=(24, 24))
    decoder = build_decoder(name, source, target, {})
    positions: dict[str, int] = {}

    def note(label: str, output: Any) -> None:
        channels = (
            output.shape[1] if output.ndim == 4 and output.shape[-1] == output.shape[-2] == 6 else output.shape[-1]
        )
        positions[label] = output.numel() // channels

    for label, part in decoder.named_modules():
        if label:
            part.register_forward_hook(lambda _m, _i, output, label=label: note(label, output))
    assert decoder(features(source)).shape[1:3] == (24, 24)
    assert positions
    heads = {label for label in positions if label.endswith(("q_norm", "k_norm"))}
    assert all(count == 2 * 36 for label, count in positions.items() if label not in heads), positions


@pytest.mark.parametrize("name", SMALL)
def test_what_autograd_keeps_does_not_grow_with_the_target(name: str) -> None:
    """Sixteen times the pixels to predict, and not a byte more that is kept for the backward pass."""
    source = Layout(kind="NHWC", width=40, grid=(6, 6))

    def kept(side: int) -> int:
        decoder = build_decoder(name, source, Layout(kind="NCHW", width=3, grid=(side, side)), {})
        found: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = features(source).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = decoder(x)
        del prediction
        return sum(found.values())

    assert kept(48) == kept(12)


@pytest.mark.parametrize(
    ("cls", "options", "widths"),
    [
        (ConvDecoder, {}, {"first": 40, "second": 48}),
        (ConvDecoder, {"hidden_width": 10}, {"first": 10, "second": 48}),
        (TransformerDecoder, {}, {"enter": 32}),
        (TransformerDecoder, {"width": 70}, {"enter": 64}),
        (TransformerDecoder, {"width": 5}, {"enter": 32}),
    ],
)
def test_widths_of_decoders(cls: type[Decoder], options: dict[str, int], widths: dict[str, int]) -> None:
    decoder = cls(SOURCES["NHWC"], Layout(kind="NCHW", width=3, grid=(24, 24)), **options)
    for name, width in widths.items():
        layer = getattr(decoder, name)
        assert width == (layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features)


def test_wide_features_get_narrow_decoders() -> None:
    source, target = Layout(kind="NHWC", width=768, grid=(7, 7)), Layout(kind="NCHW", width=3, grid=(14, 14))
    assert ConvDecoder(source, target).first.out_channels == 64
    assert TransformerDecoder(source, target).enter.out_features == 192


def test_linear_decoder_is_norm_linear_shuffle() -> None:
    source, target = SOURCES["NHWC"], Layout(kind="NHWC", width=5, grid=(6, 6))
    decoder = LinearDecoder(source, target)
    nn.init.normal_(decoder.norm.weight)
    x = features(source)
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * decoder.norm.weight
    torch.testing.assert_close(decoder(x), normed @ decoder.project.weight.T + decoder.project.bias)


# Classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ALONE)
def test_classifiers_give_logits_and_train_every_parameter(name: str, source: str) -> None:
    classifier = build_classifier(name, SOURCES[source], 7, {})
    logits = classifier(features(SOURCES[source]))
    assert logits.shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in classifier.parameters())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ALONE)
def test_classifiers_read_every_layout_alike(name: str, source: str) -> None:
    layout = SOURCES[source]
    plain = Layout(kind="tokens", width=40, grid=layout.grid, num_prefix_tokens=layout.num_prefix_tokens)
    ours, theirs = build_classifier(name, layout, 7, {}), build_classifier(name, plain, 7, {})
    theirs.load_state_dict(ours.state_dict())
    x = features(layout)
    tokens = (
        torch.cat([x[:, : layout.num_prefix_tokens], grid_of(layout, x).flatten(1, 2)], dim=1)
        if layout.kind == "tokens"
        else grid_of(layout, x).flatten(1, 2)
    )
    torch.testing.assert_close(ours(x), theirs(tokens))


@pytest.mark.parametrize("name", ALONE)
def test_classifiers_use_each_prefix_token_and_each_position(name: str) -> None:
    layout = SOURCES["prefix tokens"]
    classifier = build_classifier(name, layout, 7, {})
    x = features(layout).requires_grad_()
    classifier(x)[:, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(dim=-1) > 0).all()


def test_pool_is_the_mean_beside_the_prefix_tokens() -> None:
    layout = SOURCES["prefix tokens"]
    pool = Pool(layout)
    x = features(layout)
    pooled = torch.cat([x[:, 3:].mean(dim=1), x[:, 0], x[:, 1], x[:, 2]], dim=1)
    assert pool.width == 160
    torch.testing.assert_close(pool(x), nn.functional.layer_norm(pooled, (160,)))


@pytest.mark.parametrize(("cls", "layers"), [(LinearClassifier, 1), (MlpClassifier, 2)])
def test_pooled_classifiers_end_in_linear_layers(cls: type, layers: int) -> None:
    classifier = cls(SOURCES["NHWC"], 7)
    assert len([m for m in classifier.head.modules() if isinstance(m, nn.Linear)]) == layers
    x = features(SOURCES["NHWC"])
    torch.testing.assert_close(classifier(x), classifier.head(nn.functional.layer_norm(x.mean(dim=(1, 2)), (40,))))


@pytest.mark.parametrize(("grid", "pooled"), [((6, 6), (4, 4)), ((3, 9), (3, 4)), ((1, 1), (1, 1))])
def test_transformer_classifier_pools_to_a_small_grid(grid: tuple[int, int], pooled: tuple[int, int]) -> None:
    layout = Layout(kind="NHWC", width=40, grid=grid)
    classifier = TransformerClassifier(layout, 7)
    assert classifier.grid == pooled
    assert classifier.places.shape == (pooled[0] * pooled[1], 32)
    assert classifier(features(layout)).shape == (2, 7)


def test_transformer_classifier_takes_pooled_positions_row_by_row_after_the_prefix() -> None:
    layout = Layout(kind="tokens", width=40, grid=(8, 4), num_prefix_tokens=2)
    classifier = TransformerClassifier(layout, 7)
    x = features(layout)
    grid = x[:, 2:].view(2, 8, 4, 40)
    pooled = [grid[:, 2 * row : 2 * row + 2, column].mean(dim=1) for row in range(4) for column in range(4)]
    tokens = torch.stack([x[:, 0], x[:, 1], *pooled], dim=1)
    tokens = classifier.enter(nn.functional.layer_norm(tokens, (40,))) + classifier.places
    torch.testing.assert_close(classifier(x), classifier.head(classifier.blocks(tokens).mean(dim=1)))


@pytest.mark.parametrize(("num_tokens", "is_fused"), [(16, False), (64, True)])
def test_attention_over_few_tokens_is_computed_from_its_scores(num_tokens: int, is_fused: bool) -> None:
    """The same function either way; only over many tokens by the fused operator."""
    (block,) = transformer_blocks(64, 1, num_tokens=num_tokens)
    x = torch.randn(2, num_tokens, 64, generator=torch.Generator().manual_seed(0))
    with profile() as profiler:
        got = block(x)
    calls = {event.key for event in profiler.key_averages()}
    assert ("aten::scaled_dot_product_attention" in calls) == is_fused
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).view(2, num_tokens, 3, 2, 32).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1) / 32**0.5).softmax(-1)
    after = x + attention.proj((scores @ v).transpose(1, 2).reshape(2, num_tokens, 64))
    torch.testing.assert_close(got, after + block.mlp(block.norm2(after)))


def test_transformer_classifier_knows_where_things_stand() -> None:
    layout = SOURCES["NHWC"]
    classifier = TransformerClassifier(layout, 7)
    x = features(layout)
    assert not torch.allclose(classifier(x), classifier(x.flip(1)), atol=1e-5)
    with torch.no_grad():
        classifier.places.zero_()
    torch.testing.assert_close(classifier(x), classifier(x.flip(1)))


def test_options_of_classifiers() -> None:
    mlp = build_classifier("mlp", SOURCES["NHWC"], 7, {"hidden_width": 11})
    assert [m.out_features for m in mlp.modules() if isinstance(m, nn.Linear)] == [11, 7]
    transformer = build_classifier("transformer", SOURCES["NHWC"], 7, {"depth": 2, "width": 64, "grid": 2})
    assert transformer.places.shape == (4, 64)
    assert len(transformer.blocks) == 2


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convolution", "Linear", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"decoder: unknown '{name}'; there are linear, conv, transformer"):
        build_decoder(name, SOURCES["NHWC"], SOURCES["NCHW"], {})
    with pytest.raises(RecipeError, match=f"classifier: unknown '{name}'; there are linear, mlp, transformer"):
        build_classifier(name, SOURCES["NHWC"], 7, {})


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(RecipeError, match=r"Nearest: transformer\.$"):
        build_decoder("transfomer", SOURCES["NHWC"], SOURCES["NCHW"], {})


@pytest.mark.parametrize("options", [{"depth": 1}, {"source": 3}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="decoder_options: 'linear' can't take"):
        build_decoder("linear", SOURCES["NHWC"], SOURCES["NCHW"], options)
    with pytest.raises(RecipeError, match="classifier_options: 'linear' can't take"):
        build_classifier("linear", SOURCES["NHWC"], 7, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("transformer", {"depth": 0}),
        ("transformer", {"depth": -1}),
        ("transformer", {"window": 0}),
        ("transformer", {"width": -32}),
        ("conv", {"hidden_width": -1}),
        ("conv", {"hidden_width": "wide"}),
    ],
)
def test_impossible_sizes_of_decoders_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        build_decoder(name, SOURCES["NHWC"], SOURCES["NCHW"], options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("transformer", {"depth": 0}), ("transformer", {"grid": 0}), ("mlp", {"hidden_width": -1})],
)
def test_impossible_sizes_of_classifiers_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        build_classifier(name, SOURCES["NHWC"], 7, options)
