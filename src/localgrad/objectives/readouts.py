"""Classifiers made of the model's own end: its output embedding, read only, or copies of its last blocks and its end.

A language model has one classifier already, which is large: of 50,000 words and 2,048 channels a hundred million
weights. A *readout* shares it, and trains what stands before it alone. A *tail* has one of its own.

Shapes: B batch, N tokens, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.backbones.base import Layout
from localgrad.backbones.ends import copied, cut_off, last_linear
from localgrad.errors import RecipeError, arg
from localgrad.objectives.auxiliary import (
    FEW_TOKENS,
    Average,
    TrainedHead,
    allowed,
    attend,
    check_decay,
    copy_of,
    head_multiple,
    mask_at,
    mean_of,
    sinusoids,
    size_option,
    transformer_blocks,
)


@final
class ReadoutClassifier(TrainedHead):
    """Norm, private transformer blocks if any, then the model's own output embedding, which it reads and never trains.

    SOLO's. The norm starts as the model's last one, where there is just one; the blocks start at nothing. The embedding
    is the model's own tensor, wherever the model keeps it, detached: it changes as the last module trains it.

    Args:
        source: layout of the module's output features.
        num_classes: classes to tell apart.
        tail: the model's own end.
        per_token: whether each token has logits.
        depth: private blocks, none to two; where the model looks back only, so do they.
        width: of those, a multiple of 32; by default the features' own, rounded down.
    """

    looks_at_tail = True

    def __init__(
        self,
        source: Layout,
        num_classes: int,
        *,
        tail: nn.Module | None,
        per_token: bool = False,
        depth: int = 0,
        width: int | None = None,
    ) -> None:
        super().__init__(source, num_classes, per_token=per_token)
        if isinstance(depth, bool) or depth not in (0, 1, 2):
            raise RecipeError(f"classifier_options: depth of 'readout' is 0, 1 or 2 private blocks, got {depth!r}.")
        try:
            linear = None if tail is None else last_linear(tail, _like(source, tail), num_classes)
        except RuntimeError:  # it takes other features than these: grids shrink, widths grow on the way to it
            linear = None
        if tail is None or linear is None or linear.in_features != source.width:
            raise RecipeError(
                f"{arg('classifier')}: 'readout' needs a model that ends in a linear layer of {source.width} channels, "
                f"as features have here, to {num_classes} classes; take 'tail' or 'transformer'."
            )
        self._shared = [linear]  # a list: it is the last module's, and stays its own
        norms = [module for module in tail.modules() if _is_norm(module, source.width)]
        self.norm = copied(norms[0]) if len(norms) == 1 else nn.LayerNorm(source.width)
        self.norm.requires_grad_(requires_grad=True)
        self.is_causal = per_token and source.is_causal
        self.depth = depth
        if depth:
            wide = head_multiple(size_option("width", width, default=source.width))
            self.enter = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, wide))
            self.blocks = transformer_blocks(wide, depth, num_tokens=FEW_TOKENS + 1)
            self.leave = nn.Linear(wide, source.width)
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Private blocks, beside what they are given, and the norm."""
        tokens = self.source.to_grid(features).flatten(1, 2)
        length = tokens.shape[1]
        mask = None if mask is None else mask_at(mask, length)
        if self.depth:
            seen = allowed(mask, length=length, is_causal=self.is_causal, device=tokens.device)
            entered = self.enter(tokens)
            entered = entered + sinusoids(length, entered.shape[2], tokens.device).to(entered.dtype)
            tokens = tokens + self.leave(attend(self.blocks, entered, seen))
        return cast(Tensor, self.norm(tokens if self.per_token else mean_of(tokens, mask)))

    def score(self, vectors: Tensor) -> Tensor:
        """The model's own output embedding, which gets no gradient."""
        [linear] = self._shared
        bias = None if linear.bias is None else linear.bias.detach().to(vectors.device)
        return F.linear(vectors, linear.weight.detach().to(vectors.device), bias)  # offloaded ones come for a moment


@final
class OwnHead(TrainedHead):
    """The last layer of the model's own end, which the last module trains: given vectors, not features.

    Args:
        source: layout of what enters the model's end.
        linear: the layer; it stays the end's own.
    """

    def __init__(self, source: Layout, linear: nn.Linear) -> None:
        super().__init__(source, linear.out_features, per_token=True)
        self._linear = [linear]  # a list: it is in the end already

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """They are the layer's inputs already."""
        return features

    def score(self, vectors: Tensor) -> Tensor:
        """The layer."""
        [linear] = self._linear
        return cast(Tensor, linear(vectors))


@final
class TailClassifier(TrainedHead):
    """Copies of the model's last blocks and of its own end, which start as they start and are trained: SegProp's.

    Where the last blocks take smaller grids or other widths than the module gives, a bridge of its own stands before
    them. With ``ema`` the copies follow the model's last blocks and its end, as those are trained: then only the bridge
    is the module's.

    Args:
        source: layout of the module's output features.
        num_classes: classes to tell apart.
        following: the blocks after the module, each with the layout of what it gives.
        tail: the model's own end.
        undecayed: ids of the model's parameters that it leaves weight decay off; their copies have none either.
        per_token: whether each token has logits.
        depth: how many of the last blocks, at most.
        weights: ``copy`` (starts as they start, trained) or ``ema`` (follows them, not trained).
        decay: of the moving average, with ``ema``.
    """

    looks_ahead = True
    looks_at_tail = True

    def __init__(
        self,
        source: Layout,
        num_classes: int,
        *,
        following: Sequence[tuple[nn.Module, Layout]],
        tail: nn.Module | None,
        undecayed: Collection[int] = (),
        per_token: bool = False,
        depth: int = 1,
        weights: str = "copy",
        decay: float = 0.99,
    ) -> None:
        super().__init__(source, num_classes, per_token=per_token)
        if weights not in ("copy", "ema"):
            raise RecipeError(f"classifier_options: weights {weights!r} of 'tail' is unknown; take copy or ema.")
        check_decay("tail", decay)
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise RecipeError(f"classifier_options: depth of 'tail' is a number of blocks, 0 for none, got {depth!r}.")
        taken = following[len(following) - depth :] if depth < len(following) else following
        before = following[len(following) - len(taken) - 1][1] if len(taken) < len(following) else source
        if tail is None:
            raise RecipeError(f"{arg('classifier')}: 'tail' needs a model that has an end of its own; take 'next'.")
        fits = (before.kind, before.shape) == (source.kind, source.shape)
        self.bridge = nn.Identity() if fits else Bridge(source, before)
        self.blocks = nn.Sequential(*(copy_of(block, undecayed) for block, _ in taken))
        self.end = copy_of(tail, undecayed)
        self.averages: list[Average] = []
        if weights == "ema":
            pairs = [*zip(self.blocks, (block for block, _ in taken), strict=True), (self.end, tail)]
            self.averages = [Average(mine, part, decay) for mine, part in pairs]
        if hasattr(self.end, "unused") and not self.averages:
            self.end.unused = nn.ParameterList()
        self.head: nn.Module = nn.Identity()
        linear = last_linear(self.end, _like(following[-1][1] if following else source, tail), num_classes)
        if linear is not None and not self.averages:  # so that logits can be made chunk by chunk
            cut_off(self.end, linear)
            self.head = linear

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last blocks, and the end without its last linear layer; the blocks know the mask by themselves."""
        return cast(Tensor, self.end(self.blocks(self.bridge(features))))

    def score(self, vectors: Tensor) -> Tensor:
        """The last linear layer; nothing, where the model's end isn't one."""
        return cast(Tensor, self.head(vectors))

    def follow(self) -> None:
        """Take a step towards what is followed."""
        for average in self.averages:
            average.follow()


@final
class Bridge(nn.Module):
    """Features of one layout to another one: norm, mean over the positions that become one, linear.

    Args:
        source: layout of what is given.
        target: layout of what comes out.

    Raises:
        RecipeError: they have different numbers of class and register tokens.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__()
        if source.num_prefix_tokens != target.num_prefix_tokens:
            raise RecipeError(
                f"{arg('classifier')}: the model's last blocks take {target.num_prefix_tokens} class and register "
                f"tokens, and here there are {source.num_prefix_tokens}; take 'next', whose blocks follow here."
            )
        self.source, self.target = source, target
        self.norm = nn.LayerNorm(source.width)
        self.project = nn.Linear(source.width, target.width)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, ...] to features [B, ...]."""
        grid, prefix = self.norm(self.source.to_grid(features)), self.source.prefix(features)
        if self.source.grid != self.target.grid and self.target.kind != "sequence":
            grid = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), self.target.grid).permute(0, 2, 3, 1)
        prefix = None if prefix is None else self.project(self.norm(prefix))
        return self.target.from_grid(self.project(grid), prefix)


def _like(layout: Layout, part: nn.Module) -> Tensor:
    """Features of a layout for two items, zeros, as a part's weights are."""
    like = next((weight for weight in part.parameters() if weight.is_floating_point()), torch.empty(0))
    return torch.zeros(2, *layout.shape, dtype=like.dtype, device=like.device)


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module is a norm over channels: all that it has are one or two vectors of that width."""
    weights = list(module.parameters(recurse=False))
    return not list(module.children()) and 0 < len(weights) < 3 and all(w.shape == (width,) for w in weights)
