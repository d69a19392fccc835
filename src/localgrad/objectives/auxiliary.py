"""Auxiliary decoders and classifiers: small nets that give a local module something to learn, then are thrown away.

A **decoder** predicts a target (the module's input features, or the image) from the module's output features.
An **auxiliary classifier** predicts the labels from them.

What decides whether local learning saves memory at all is the resolution that a decoder works at. InfoPro's
(arXiv 2101.10832, appendix) interpolates the features to image size before its convolutions; on Swin-Tiny that
keeps more bytes than end-to-end training does. Every decoder here but that one (``BilinearDecoder``) stays at the
module's own resolution and upsamples in its last layer only, by pixel shuffle (Shi et al., arXiv 1609.05158,
section 3.2). The seed paper (arXiv 2212.14215) compares three decoder structures without giving their layers in the
copies that can be had, so the three here are ours.

Where features are sequences, a net that mixes positions is told which tokens aren't padding (``takes_mask``), and
gives the same whatever stands there; batches may be of any length. Where labels name tokens, classifiers give logits
for each, and those that mix tokens look back only, where the model does.

Shapes: B batch · H W grid of the module's output (of a sequence 1 x N) · D its width · h w grid of the target · d its
width · K classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.backbones.base import Layout
from localgrad.backbones.ends import copied
from localgrad.backbones.timm_models import with_plain_attention
from localgrad.errors import RecipeError, arg
from localgrad.objectives.averaging import OtherBuffers, averaged_pairs, check_moves
from localgrad.registry import Registry, misfit

HEAD_WIDTH = 32
"""Channels of one attention head; widths of transformer decoders and classifiers are multiples of it."""
FEW_TOKENS = 32
"""Over no more of them the scores of attention are fewer than the numbers of a head's queries."""


_EXEMPT = "_no_weight_decay"


def exempt_from_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter of an auxiliary net that isn't to be decayed, though it is no vector: positions, tokens.

    The mark is an attribute, ``_no_weight_decay``, as state space models have it (Mamba, arXiv 2312.00752, its code).
    """
    setattr(parameter, _EXEMPT, True)
    return parameter


def is_exempt_from_decay(parameter: nn.Parameter) -> bool:
    """Whether a parameter carries that mark."""
    return bool(getattr(parameter, _EXEMPT, False))


def carry_exemptions(before: Iterable[nn.Parameter], after: Iterable[nn.Parameter]) -> None:
    """Mark parameters as those were that they stand for, in order: PyTorch's copies and shards carry no attributes."""
    for old, new in zip(before, after, strict=True):
        if is_exempt_from_decay(old):
            exempt_from_decay(new)


class Decoder(nn.Module, ABC):
    """Predicts a target grid from a module's output features.

    Args:
        source: layout of the module's output features.
        target: layout of what is predicted (features or image).
    """

    _rows: Tensor
    _columns: Tensor

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__()
        self.source = source
        self.target = target
        found = [_stride(t, s) for t, s in zip(target.grid, source.grid, strict=True)]
        self.ratio = tuple(stride for stride, _ in found)
        self._is_even = all(even for _, even in found) or target.kind == "sequence"
        for name, t, s, stride in zip(("_rows", "_columns"), target.grid, source.grid, self.ratio, strict=True):
            nearest = None if self._is_even else ((torch.arange(t) + 0.5) * (s * stride / t)).long()
            self.register_buffer(name, nearest, persistent=False)

    @property
    def num_outputs(self) -> int:
        """Channels before the pixel shuffle: one patch of the target."""
        return self.target.width * self.ratio[0] * self.ratio[1]

    @abstractmethod
    def patches(self, grid: Tensor) -> Tensor:
        """Map grid features [B, H, W, D] to patches [B, H, W, rows * columns * d]."""

    mixes_positions = True
    """Whether a position is predicted from others as well."""
    takes_mask = False
    """Whether ``patches`` takes a second argument: which tokens aren't padding, bool [B, N], or ``None``."""

    def forward(
        self,
        features: Tensor,
        hidden: Tensor | None = None,
        token: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the target.

        Args:
            features: the module's output, in the ``source`` layout.
            hidden: [B, H, W], positions that the decoder is not to see; none by default.
            token: [D], what stands there instead.
            mask: bool [B, N], where features are sequences: which tokens aren't padding.

        Returns:
            [B, h, w, d], channels last.
        """
        grid = self.source.to_grid(features)
        if hidden is not None:
            assert token is not None, "something stands where positions are hidden"
            grid = torch.where(hidden.unsqueeze(-1), token.to(grid.dtype), grid)
        if mask is not None and self.mixes_positions and not self.takes_mask:
            raise RecipeError(
                f"decoder: {type(self).__name__} mixes positions, and would see padding; set takes_mask = True and let "
                "patches(grid, mask) leave it out, or take 'linear'."
            )
        patches = self.patches(grid, mask) if self.takes_mask else self.patches(grid)  # type: ignore[call-arg]
        rows, columns = self.ratio
        if patches.ndim != 4 or patches.shape[-1] != rows * columns * self.target.width:
            raise RecipeError(
                f"decoder: {type(self).__name__}.patches gave {list(patches.shape)}; give [B, H, W, num_outputs], "
                f"num_outputs being {rows * columns * self.target.width} here."
            )
        batch, height, width, _ = patches.shape
        image = patches.view(batch, height, width, rows, columns, self.target.width)
        image = image.transpose(2, 3).reshape(batch, height * rows, width * columns, self.target.width)
        return self._fitted(image)

    def _fitted(self, image: Tensor) -> Tensor:
        """What is predicted, each place where the target has it; sequences are as long as a batch is."""
        if self.target.kind == "sequence":
            return image
        if not self._is_even:
            return image.index_select(1, self._rows).index_select(2, self._columns)
        for dim, places in enumerate(self.target.grid, start=1):
            image = image.narrow(dim, 0, min(places, image.shape[dim]))  # the backbone pads odd grids
            left = places - image.shape[dim]  # or drops what fills no patch: nothing is known of that
            if left:
                last = image.narrow(dim, image.shape[dim] - 1, 1)
                image = torch.cat([image, last.expand(*(left if d == dim else -1 for d in range(image.ndim)))], dim)
        return image

    def spread(self, positions: Tensor) -> Tensor:
        """Positions of the output's grid as those of the target's, [B, H, W] to [B, h, w]."""
        rows, columns = self.ratio
        return self._fitted(positions.repeat_interleave(rows, 1).repeat_interleave(columns, 2))


def _stride(target: int, source: int) -> tuple[int, bool]:
    """Places of a target that each of the source's positions stands for, and whether the grids are so by a stride.

    A stride makes 4 positions of 7 places by padding them (Swin), and 27 of 384 by dropping what is left (patches).
    """
    padded, dropped = math.ceil(target / source), target // source
    if math.ceil(target / padded) == source:
        return padded, True
    return (dropped, True) if dropped and target // dropped == source else (padded, False)


class LinearDecoder(Decoder):
    """Norm, one linear layer, pixel shuffle."""

    mixes_positions = False

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__(source, target)
        self.norm = nn.LayerNorm(source.width)
        self.project = nn.Linear(source.width, self.num_outputs)

    def patches(self, grid: Tensor) -> Tensor:
        """Project each position to its patch of the target."""
        return cast(Tensor, self.project(self.norm(grid)))


class BottleneckDecoder(Decoder):
    """Norm, linear to a quarter of the width (``hidden_width``), GELU, linear, pixel shuffle: LoPT's (2605.04913)."""

    mixes_positions = False

    def __init__(self, source: Layout, target: Layout, *, hidden_width: int | None = None) -> None:
        super().__init__(source, target)
        hidden = size_option("hidden_width", hidden_width, default=max(1, source.width // 4))
        self.norm = nn.LayerNorm(source.width)
        self.project = nn.Sequential(nn.Linear(source.width, hidden), nn.GELU(), nn.Linear(hidden, self.num_outputs))

    def patches(self, grid: Tensor) -> Tensor:
        """Project each position to its patch of the target."""
        return cast(Tensor, self.project(self.norm(grid)))


class ConvDecoder(Decoder):
    """Norm, two 3x3 convolutions with a GELU between (``hidden_width``, by default D but at most 64), pixel shuffle."""

    takes_mask = True

    def __init__(self, source: Layout, target: Layout, *, hidden_width: int | None = None) -> None:
        super().__init__(source, target)
        hidden = size_option("hidden_width", hidden_width, default=min(source.width, 64))
        self.norm = nn.LayerNorm(source.width)
        self.first = nn.Conv2d(source.width, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, self.num_outputs, 3, padding=1)

    def patches(self, grid: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve at the module's own resolution; padding is as the zeros around it."""
        channels_first = self.norm(grid).permute(0, 3, 1, 2)  # a view: the convolution runs in channels-last
        seen = None if mask is None else mask[:, None, None, :].to(channels_first.dtype)
        hidden = F.gelu(self.first(channels_first if seen is None else channels_first * seen))
        patches = self.second(hidden if seen is None else hidden * seen)
        return cast(Tensor, patches.permute(0, 2, 3, 1).contiguous())


class BilinearDecoder(Decoder):
    """InfoPro's (arXiv 2101.10832, appendix, and its released code): upsampled first, then convolved at full size.

    Bilinear interpolation to the target's grid, 3x3 convolution, batch norm, ReLU, 3x3 convolution (``hidden_width``
    channels between, 12 by default). It costs more memory than any other here: its features are as large as the image,
    with the module's width.
    """

    def __init__(self, source: Layout, target: Layout, *, hidden_width: int | None = None) -> None:
        super().__init__(source, target)
        if source.kind == "sequence":
            raise RecipeError(
                f"{arg('decoder')}: 'bilinear' is of images, and features here are a sequence; take linear, conv, "
                "bottleneck or transformer."
            )
        hidden = size_option("hidden_width", hidden_width, default=12)
        self.first = nn.Conv2d(source.width, hidden, 3, padding=1)
        self.norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, target.width, 3, padding=1)
        self.ratio = (1, 1)

    def patches(self, grid: Tensor) -> Tensor:
        """Upsample, then convolve; a patch is a single position of the target."""
        large = F.interpolate(grid.permute(0, 3, 1, 2), self.target.grid, mode="bilinear", align_corners=True)
        return cast(Tensor, self.second(F.relu(self.norm(self.first(large)))).permute(0, 2, 3, 1).contiguous())

    def spread(self, positions: Tensor) -> Tensor:
        """Positions of the output's grid as those of the target's, the nearest ones."""
        rows, columns = (
            torch.arange(wide, device=positions.device) * narrow // wide
            for wide, narrow in zip(self.target.grid, self.source.grid, strict=True)
        )
        return positions[:, rows][:, :, columns]


class TransformerDecoder(Decoder):
    """Norm, linear to a width, transformer blocks over windows, norm, linear, pixel shuffle.

    Attention runs inside windows of at most ``window`` positions a side, so that a first-stage grid (56 x 56 in
    Swin-Tiny) costs what a ViT's 14 x 14 costs, and not its square. A sequence's windows are as many tokens in a row as
    an image's are positions.

    Args:
        source: layout of the module's output features.
        target: layout of what is predicted.
        depth: transformer blocks (one or two).
        width: their width, a multiple of 32; by default the features' own, rounded down, at most 192.
        window: largest side of an attention window, in positions; windows divide the grid of an image, so a prime side
            larger than this leaves windows of one.
    """

    takes_mask = True

    def __init__(
        self, source: Layout, target: Layout, *, depth: int = 1, width: int | None = None, window: int = 14
    ) -> None:
        super().__init__(source, target)
        width = head_multiple(size_option("width", width, default=min(source.width, 192)))
        largest = size_option("window", window)
        self.window = tuple(_largest_divisor(side, largest) for side in source.grid)
        if source.kind == "sequence":
            self.window = (1, largest * largest)
        self.norm = nn.LayerNorm(source.width)
        self.enter = nn.Linear(source.width, width)
        self.blocks = transformer_blocks(width, depth, num_tokens=math.prod(self.window))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.num_outputs))

    def patches(self, grid: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows, then project each position to its patch."""
        x: Tensor = self.enter(self.norm(grid))
        if self.source.kind == "sequence":
            return self._of_sequence(x.squeeze(1), mask).unsqueeze(1)
        batch, height, width, channels = x.shape
        rows, columns = self.window
        x = x.view(batch, height // rows, rows, width // columns, columns, channels)
        x = x.transpose(2, 3).reshape(-1, rows * columns, channels)
        x = self.leave(self.blocks(x))
        x = x.view(batch, height // rows, width // columns, rows, columns, self.num_outputs)
        return x.transpose(2, 3).reshape(batch, height, width, self.num_outputs)

    def _of_sequence(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """As of a grid, of tokens [B, N, width] of any number; windows may end in none."""
        batch, length, width = x.shape
        size = min(self.window[1], length)
        more = -length % size
        mask = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
        x = F.pad(x, (0, 0, 0, more)).reshape(-1, size, width)
        x = self.leave(attend(self.blocks, x, allowed(F.pad(mask, (0, more)).reshape(-1, size))))
        return x.reshape(batch, length + more, self.num_outputs)[:, :length]


class Classifier(nn.Module, ABC):
    """Predicts class logits from a module's output features.

    Args:
        source: layout of the module's output features.
        num_classes: classes to tell apart.
    """

    looks_ahead = False
    """Whether it is made with the model's blocks that follow, too: with ``following=`` and ``undecayed=``."""
    looks_at_tail = False
    """Whether it is made with the model's own end, too: with ``tail=``."""
    names_tokens = False
    """Whether it can give logits of each token [B, N, K]: made with ``per_token=True`` for losses that need them."""
    takes_mask = False
    """Whether ``forward`` takes a second argument: which tokens aren't padding, bool [B, N], or ``None``."""

    def __init__(self, source: Layout, num_classes: int) -> None:
        super().__init__()
        self.source = source
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Map features in the ``source`` layout to logits [B, num_classes]."""

    def follow(self) -> None:
        """Called after each update of the module that the classifier serves."""


class TrainedHead(Classifier):
    """A classifier in two steps, vectors and their logits, so that logits of many tokens needn't all be there at once.

    Args:
        source: layout of the module's output features.
        num_classes: classes to tell apart.
        per_token: whether each token has logits, or each item.
    """

    names_tokens = True
    takes_mask = True

    def __init__(self, source: Layout, num_classes: int, *, per_token: bool = False) -> None:
        super().__init__(source, num_classes)
        self.per_token = per_token

    @abstractmethod
    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features in the ``source`` layout to vectors [B, width], or [B, N, width] of tokens."""

    @abstractmethod
    def score(self, vectors: Tensor) -> Tensor:
        """Map vectors [..., width] to logits [..., num_classes], one by one, and nothing drawn at random."""

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features in the ``source`` layout to logits [B, num_classes], or [B, N, num_classes] of tokens."""
        return self.score(self.embed(features, mask))


class Pool(nn.Module):
    """Mean over the grid, beside the class and register tokens, and a norm: after it, or (``norm_first``) before it.

    Padding is left out. ``per_token`` there is no mean: each position of the grid is normed.
    """

    def __init__(self, source: Layout, *, norm_first: bool = False, per_token: bool = False) -> None:
        super().__init__()
        self.source = source
        self.norm_first = norm_first
        self.per_token = per_token
        self.width = source.width * (1 if per_token else 1 + source.num_prefix_tokens)
        self.norm = nn.LayerNorm(source.width if norm_first else self.width)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features to one vector an image, [B, width]; or one a position, [B, N, width]."""
        if self.per_token:
            return cast(Tensor, self.norm(self.source.to_grid(features).flatten(1, 2)))
        grid, prefix = self.source.to_grid(features), self.source.prefix(features)
        if self.norm_first:
            grid, prefix = self.norm(grid), None if prefix is None else self.norm(prefix)
        mean = mean_of(grid.flatten(1, 2), mask) if mask is not None else grid.mean(dim=(1, 2))
        pooled = mean if prefix is None else torch.cat([mean, prefix.flatten(1)], dim=1)
        return pooled if self.norm_first else cast(Tensor, self.norm(pooled))


def mask_at(mask: Tensor, length: int) -> Tensor:
    """Which tokens aren't padding [B, N], of a sequence of another length [B, length]: made of any that isn't."""
    if mask.shape[1] == length:
        return mask
    return F.adaptive_max_pool1d(mask.float().unsqueeze(1), length).squeeze(1) > 0


def mean_of(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of tokens [B, N, D] that aren't padding, [B, D]."""
    if mask is None:
        return tokens.mean(dim=1)
    counts = mask_at(mask, tokens.shape[1]).unsqueeze(-1)
    return torch.where(counts, tokens, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def allowed(mask: Tensor | None, *, length: int = 0, is_causal: bool = False, device: Any = None) -> Tensor | None:
    """What each token may attend to, bool [B or 1, 1, N or 1, N]; ``None`` for everything.

    Args:
        mask: which tokens aren't padding, [B, N].
        length: N, where there is no mask.
        is_causal: a token looks at what is before and at its place alone.
        device: where there is no mask.
    """
    if not is_causal:
        # Of a sequence that is nothing but padding, attention over no token would be no number.
        return None if mask is None else (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
    length, device = (length, device) if mask is None else (mask.shape[1], mask.device)
    before = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None:
        return before
    return before & mask[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=device)


def attend(blocks: nn.Sequential, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Run timm's blocks over tokens [B, N, width], which attend as ``allowed`` says."""
    for block in blocks:
        tokens = block(tokens, attn_mask=mask)
    return tokens


class LinearClassifier(TrainedHead):
    """Average pool, norm, linear: the head of most of the field.

    With ``norm_first`` norm, average pool, linear, in the order of TRGL's head (arXiv 2309.17357) and of Swin's own.
    """

    def __init__(self, source: Layout, num_classes: int, *, per_token: bool = False, norm_first: bool = False) -> None:
        super().__init__(source, num_classes, per_token=per_token)
        if not isinstance(norm_first, bool):
            raise RecipeError(f"classifier_options: norm_first must be true or false, got {norm_first!r}.")
        self.pool = Pool(source, norm_first=norm_first, per_token=per_token)
        self.head = nn.Linear(self.pool.width, num_classes)

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool."""
        return cast(Tensor, self.pool(features, mask))

    def score(self, vectors: Tensor) -> Tensor:
        """One linear layer."""
        return cast(Tensor, self.head(vectors))


class MlpClassifier(TrainedHead):
    """Average pool, norm, one hidden layer with GELU (by default of twice the features' width), linear."""

    def __init__(
        self, source: Layout, num_classes: int, *, per_token: bool = False, hidden_width: int | None = None
    ) -> None:
        super().__init__(source, num_classes, per_token=per_token)
        hidden = size_option("hidden_width", hidden_width, default=2 * source.width)
        self.pool = Pool(source, per_token=per_token)
        self.head = nn.Sequential(nn.Linear(self.pool.width, hidden), nn.GELU(), nn.Linear(hidden, num_classes))

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool."""
        return cast(Tensor, self.pool(features, mask))

    def score(self, vectors: Tensor) -> Tensor:
        """Two layers."""
        return cast(Tensor, self.head(vectors))


class TransformerClassifier(TrainedHead):
    """Tokens pooled to a small grid, transformer blocks over them, average, norm, linear.

    One or two blocks in the auxiliary head recover a good part of what greedy training loses (arXiv 2610.04867);
    on a pooled grid they cost next to nothing, whatever the module's resolution. Sequences, and tokens that each have a
    label, aren't pooled; of the latter none looks ahead, where those of the model don't.

    Args:
        source: layout of the module's output features.
        num_classes: classes to tell apart.
        per_token: whether each token has logits.
        depth: transformer blocks.
        width: their width, a multiple of 32; by default the features' own, rounded down, at most 384.
        grid: side of the pooled grid.
    """

    def __init__(
        self,
        source: Layout,
        num_classes: int,
        *,
        per_token: bool = False,
        depth: int = 1,
        width: int | None = None,
        grid: int = 4,
    ) -> None:
        super().__init__(source, num_classes, per_token=per_token)
        width = head_multiple(size_option("width", width, default=min(source.width, 384)))
        grid = size_option("grid", grid)
        self.pools = not per_token and source.kind != "sequence"
        self.is_causal = per_token and source.is_causal
        self.grid = (min(grid, source.grid[0]), min(grid, source.grid[1]))
        self.norm = nn.LayerNorm(source.width)
        self.enter = nn.Linear(source.width, width)
        num_tokens = self.grid[0] * self.grid[1] + source.num_prefix_tokens
        if self.pools:
            # Early features barely know where they stand; without places, attention over them is over a bag.
            self.places = exempt_from_decay(nn.Parameter(torch.randn(num_tokens, width) * 0.02))
        else:
            num_tokens = FEW_TOKENS + 1  # of whatever length batches are: fused attention
        self.blocks = transformer_blocks(width, depth, num_tokens=num_tokens)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the blocks."""
        if not self.pools:
            return self._of_sequence(features, mask)
        grid = self.source.to_grid(features).permute(0, 3, 1, 2)
        tokens = F.adaptive_avg_pool2d(grid, self.grid).flatten(2).transpose(1, 2)
        prefix = self.source.prefix(features)
        if prefix is not None:
            tokens = torch.cat([prefix, tokens], dim=1)
        return cast(Tensor, self.blocks(self.enter(self.norm(tokens)) + self.places).mean(dim=1))

    def _of_sequence(self, features: Tensor, mask: Tensor | None) -> Tensor:
        tokens: Tensor = self.enter(self.norm(self.source.to_grid(features).flatten(1, 2)))
        length = tokens.shape[1]
        mask = None if mask is None else mask_at(mask, length)
        tokens = tokens + sinusoids(length, tokens.shape[2], tokens.device).to(tokens.dtype)
        seen = allowed(mask, length=length, is_causal=self.is_causal, device=tokens.device)
        tokens = attend(self.blocks, tokens, seen)
        return tokens if self.per_token else mean_of(tokens, mask)

    def score(self, vectors: Tensor) -> Tensor:
        """Norm, linear."""
        return cast(Tensor, self.head(vectors))


def sinusoids(length: int, width: int, device: Any = None) -> Tensor:
    """Places of a sequence of any length, [length, width] (Vaswani et al., arXiv 1706.03762, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(length, device=device).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class NextClassifier(TrainedHead):
    """The blocks that follow in the model itself, on the module's output; then average pool, norm, linear.

    So the module learns to give what the next ones need. Sources: a classifier made like the layers that follow
    (AugLocal, arXiv 2402.17318); one whose blocks are a moving average of the next module's (MAN, arXiv 2407.05638).
    The average moves after the module's update only, never between a forward pass and its backward pass.

    Args:
        source: layout of the module's output features.
        num_classes: classes to tell apart.
        following: the blocks that follow, each with the layout of what it gives.
        undecayed: ids of the model's parameters that it leaves weight decay off; their copies have none either.
        per_token: whether each token has logits.
        depth: how many of them, at most; always at least one.
        weights: ``fresh`` (like them, initialised anew, trained), ``copy`` (starts as they start, trained) or ``ema``
            (follows them, not trained).
        decay: of the moving average, with ``ema``.
    """

    looks_ahead = True

    def __init__(
        self,
        source: Layout,
        num_classes: int,
        *,
        following: Sequence[tuple[nn.Module, Layout]],
        undecayed: Collection[int] = (),
        per_token: bool = False,
        depth: int = 1,
        weights: str = "copy",
        decay: float = 0.99,
    ) -> None:
        super().__init__(source, num_classes, per_token=per_token)
        if weights not in ("fresh", "copy", "ema"):
            raise RecipeError(f"classifier_options: weights {weights!r} of 'next' is unknown; take fresh, copy or ema.")
        check_decay("next", decay)
        taken = following[: size_option("depth", depth)]
        if not taken:
            raise RecipeError(
                f"{arg('classifier')}: 'next' needs blocks that follow, and there are none; take 'transformer'."
            )
        self.blocks = nn.Sequential(*(copy_of(block, undecayed) for block, _ in taken))
        self.averages: list[Average] = []
        if weights == "fresh":
            self.blocks.apply(_initialise)
        if weights == "ema":
            self.averages = [Average(mine, block, decay) for mine, (block, _) in zip(self.blocks, taken, strict=True)]
        self.pool = Pool(taken[-1][1], per_token=per_token)
        self.head = nn.Linear(self.pool.width, num_classes)

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the blocks, then pool."""
        return cast(Tensor, self.pool(self.blocks(features), mask))

    def score(self, vectors: Tensor) -> Tensor:
        """One linear layer."""
        return cast(Tensor, self.head(vectors))

    def follow(self) -> None:
        """Take a step towards the blocks that are followed."""
        for average in self.averages:
            average.follow()


@final
class Average:
    """Lets a copy of another module's part be a moving average of it, which no optimizer trains.

    It is no ``nn.Module``: what it follows is another local module's, and stays that.
    """

    def __init__(self, mine: nn.Module, source: nn.Module, decay: float) -> None:
        check_moves(source)
        self._mine, self._source, self._decay = mine.requires_grad_(requires_grad=False), source, decay
        self._others = OtherBuffers()

    @torch.no_grad()
    def follow(self) -> None:
        """Take a step towards what is followed."""
        for own, other in averaged_pairs(self._mine, self._source):
            own.lerp_(other.to(own.device), 1 - self._decay)
        self._others.follow(self._mine, self._source)


def check_decay(name: str, decay: float) -> None:
    """Refuse a decay of a classifier's moving average that is none.

    Raises:
        RecipeError: not from 0 to below 1.
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
        raise RecipeError(f"classifier_options: decay of {name!r} must be from 0 to below 1, got {decay!r}.")


def copy_of(part: nn.Module, undecayed: Collection[int]) -> nn.Module:
    """A copy of a block or of the model's end, trained for its own; what isn't decayed there isn't here either."""
    mine = copied(part)
    for own, original in zip(mine.parameters(), part.parameters(), strict=True):
        own.requires_grad = True
        if id(original) in undecayed or is_exempt_from_decay(original):
            exempt_from_decay(own)
    return mine


def _initialise(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)  # torch's own layers have it
    if reset is not None and not list(module.children()):
        reset()


def transformer_blocks(width: int, depth: int, *, num_tokens: int) -> nn.Sequential:
    """Plain pre-norm transformer blocks of timm: heads of 32 channels, an MLP of twice the width (a multiple of 32).

    Over few tokens attention isn't fused. The scores are few there, and on processors the backward pass of fused
    attention in bfloat16 is slow: 10.5 ms against 0.7 for 128 images of 16 tokens, one head (one core, torch 2.14).
    """
    from timm.models.vision_transformer import Block

    def block() -> nn.Module:
        whole = Block(width, width // HEAD_WIDTH, mlp_ratio=2.0, qkv_bias=True)
        return with_plain_attention(whole) if num_tokens <= FEW_TOKENS else whole

    return nn.Sequential(*(block() for _ in range(size_option("depth", depth))))


DECODERS: Registry[type[Decoder]] = Registry("decoder", Decoder)
CLASSIFIERS: Registry[type[Classifier]] = Registry("classifier", Classifier)


def register_decoder(name: str, decoder: type[Decoder]) -> None:
    """Give an auxiliary decoder a name, by which objectives and recipes choose it.

    Args:
        name: for ``decoder=`` and ``--decoder``.
        decoder: called with the layouts of what it is given and of what it predicts, and with ``decoder_options``.

    Raises:
        RecipeError: the name is another's, or the class is no decoder.
    """
    DECODERS.register(name, decoder)


def register_classifier(name: str, classifier: type[Classifier]) -> None:
    """Give an auxiliary classifier a name, by which objectives and recipes choose it.

    Args:
        name: for ``classifier=`` and ``--classifier``.
        classifier: called with the layout of what it is given, the number of classes, and with ``classifier_options``.

    Raises:
        RecipeError: the name is another's, or the class is no classifier.
    """
    CLASSIFIERS.register(name, classifier)


register_decoder("linear", LinearDecoder)
register_decoder("conv", ConvDecoder)
register_decoder("transformer", TransformerDecoder)
register_decoder("bilinear", BilinearDecoder)
register_decoder("bottleneck", BottleneckDecoder)
register_classifier("linear", LinearClassifier)
register_classifier("mlp", MlpClassifier)
register_classifier("transformer", TransformerClassifier)
register_classifier("next", NextClassifier)

Net = TypeVar("Net", bound=nn.Module)
LOOKED_AT = ("following", "undecayed", "tail", "per_token")
"""What classifiers are given of the model, by keyword."""


def build_decoder(name: str, source: Layout, target: Layout, options: Mapping[str, Any]) -> Decoder:
    """Make a decoder by name, for a module's output features and a target.

    Raises:
        RecipeError: unknown name, or options that this decoder doesn't take.
    """
    return _build(DECODERS, name, options, source, target)


def build_classifier(
    name: str,
    source: Layout,
    num_classes: int,
    options: Mapping[str, Any],
    following: Sequence[tuple[nn.Module, Layout]] = (),
    *,
    undecayed: Collection[int] = (),
    tail: nn.Module | None = None,
    per_token: bool = False,
) -> Classifier:
    """Make an auxiliary classifier by name, for a module's output features.

    The model's blocks after the module, and the ids of ``undecayed`` parameters, go to classifiers that look ahead; its
    own end to those that look at it. ``per_token`` there are to be logits for each token.

    Raises:
        RecipeError: unknown name, options that this classifier doesn't take, or it gives no logits of tokens.
    """
    kind = CLASSIFIERS.find(name)
    more: dict[str, Any] = {"following": following, "undecayed": undecayed} if kind.looks_ahead else {}
    if kind.looks_at_tail:
        more["tail"] = tail
    if per_token:
        if not kind.names_tokens:
            raise RecipeError(
                f"{arg('classifier')}: {name!r} gives logits for an item, and the loss is of tokens; take linear, mlp, "
                "transformer, next, readout or tail."
            )
        more["per_token"] = True
    return _build(CLASSIFIERS, name, options, source, num_classes, **more)


def _build(known: Registry[type[Net]], name: str, options: Mapping[str, Any], *args: Any, **more: Any) -> Net:
    kind = known.find(name)
    try:
        if not options.keys().isdisjoint(LOOKED_AT):
            raise TypeError("localgrad gives that itself")
        return kind(*args, **more, **options)
    except TypeError as error:
        raise RecipeError(f"{known.kind}_options: {name!r} {misfit(kind, options, error, LOOKED_AT)}") from error


def size_option(name: str, value: int | None, *, default: int = 1) -> int:
    """An option that counts something, or its default.

    Raises:
        RecipeError: it isn't a whole number from 1 on.
    """
    size = default if value is None else value
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise RecipeError(f"{name} of a decoder or classifier must be a whole number from 1 on, got {value!r}.")
    return size


def head_multiple(width: int) -> int:
    """A width rounded down to whole attention heads; one at least."""
    return max(HEAD_WIDTH, width // HEAD_WIDTH * HEAD_WIDTH)


def _largest_divisor(side: int, at_most: int) -> int:
    return max(d for d in range(1, min(side, at_most) + 1) if side % d == 0)
