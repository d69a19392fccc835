"""Reconstruction: a decoder predicts, from a module's output, what the module was given, or the image.

The seed paper (arXiv 2212.14215) reconstructs the module's *input features*; InfoPro (arXiv 2101.10832, section 3)
the image. Features have no fixed scale (a residual stream grows with depth, and drifts), so by default each target
position is layer-normalised without affine parameters, as masked autoencoders normalise their patches (arXiv
2111.06377, section 4.1); pixels come normalised from the data path. The target reaches the term already detached.

*Masked* reconstruction hides a share of the positions from the decoder, which has to find them from the others
(MAE, arXiv 2111.06377; SimMIM, arXiv 2111.09886). Those hide patches from the encoder; here the module sees all, since
its output goes on to the next module.

Of sequences padding is left out: a mean is over the tokens that aren't, those of a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.objectives.auxiliary import Decoder, mask_at
from localgrad.objectives.base import Term, TermValue, in_float32
from localgrad.objectives.carried import LocalBatch


def _cosine_error(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each position; [..., d] to [..., 1], so that a mean over all is a mean over positions."""
    return (1 - F.cosine_similarity(prediction, target, dim=-1)).unsqueeze(-1)


ERRORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda prediction, target: F.mse_loss(prediction, target, reduction="none"),
    "smooth_l1": lambda prediction, target: F.smooth_l1_loss(prediction, target, reduction="none"),
    "cosine": _cosine_error,
    "bce": lambda prediction, target: F.binary_cross_entropy_with_logits(prediction, target, reduction="none"),
}
"""Error of a prediction and its target, both [B, h, w, d], at every position. ``bce``, binary cross-entropy as
InfoPro's, takes predictions as logits and targets as pixels from 0 to 1."""


class Reconstruction(Term):
    """Error between the decoder's prediction and its target.

    Args:
        decoder: from the module's output layout to the target's.
        of: the target: what the module received (``inputs``), what the module before received (``previous``), or the
            ``image``.
        normalise: layer-normalise each position of the target.
        error: one of ``ERRORS``.
        mask: share of the output's positions that is hidden from the decoder, and alone counts; 0 for none.
        pixels: mean and standard deviation, per channel, with which pixels from 0 to 1 were normalised, where the
            target is to be those pixels.
        has_padding: whether features are sequences, of which some tokens may be padding.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        decoder: Decoder,
        *,
        of: str = "inputs",
        normalise: bool,
        error: str = "mse",
        mask: float = 0.0,
        pixels: tuple[Sequence[float], Sequence[float]] | None = None,
        has_padding: bool = False,
    ) -> None:
        super().__init__()
        self.has_pixels = pixels is not None
        for name, values in zip(("pixel_mean", "pixel_std"), pixels or (), strict=False):
            self.register_buffer(name, torch.tensor([float(value) for value in values]), persistent=False)
        self.decoder = decoder
        self.of = of
        of_batch = {"inputs": (), "image": ("images",), "previous": ("previous",)}[of]
        self.uses = frozenset(of_batch + ("mask",) * has_padding)
        self.has_padding = has_padding
        self.normalise = normalise
        self.error = error
        self.mask = mask
        self.mask_token = nn.Parameter(torch.zeros(decoder.source.width)) if mask else None

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the reconstruction error. Arguments as in ``Term.forward``."""
        source = {"inputs": inputs, "image": batch.images, "previous": batch.previous}[self.of]
        assert source is not None, "the executor keeps what a term uses"
        hidden = None
        if self.mask_token is not None:
            shape = self.decoder.source.to_grid(outputs).shape[:3]
            hidden = torch.rand(*shape, device=outputs.device) < self.mask
        if not self.has_padding:
            return TermValue(self.compare(self.decoder(outputs, hidden, self.mask_token), source, hidden))
        seen = None if batch.mask is None else mask_at(batch.mask, outputs.shape[1])
        loss = self.compare(self.decoder(outputs, hidden, self.mask_token, seen), source, hidden, batch.mask)
        return TermValue(loss if batch.token_factor is None else loss * batch.token_factor.to(loss.dtype))

    def compare(self, prediction: Tensor, source: Tensor, hidden: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """The error of a prediction [B, h, w, d]; the source in its own layout.

        Args:
            prediction: of the source.
            source: what was to be predicted.
            hidden: bool [B, H, W], positions that alone count, if any.
            mask: bool [B, N], tokens that alone count.
        """
        target = self.decoder.target.to_grid(source)
        if self.decoder.target.kind == "sequence":
            prediction = prediction[:, :, : target.shape[2]]  # of a shorter sequence, patches may end behind it
        if self.has_pixels:
            target = (target.float() * self.pixel_std + self.pixel_mean).clamp(0, 1)  # but for rounding, they are
        if self.normalise:
            target = F.layer_norm(target, target.shape[-1:])
        if hidden is None and mask is None and self.error == "mse":
            # torch's scalar keeps a storage of the target's size, for as long as it lives
            return F.mse_loss(in_float32(prediction), in_float32(target)).clone()
        error = ERRORS[self.error](in_float32(prediction), in_float32(target))
        if hidden is None and mask is None:
            return error.mean()
        counts = torch.ones(1, 1, 1, 1, device=error.device)
        if hidden is not None:
            counts = counts * self.decoder.spread(hidden)[:, :, : error.shape[2]].unsqueeze(-1)
        if mask is not None:
            counts = counts * mask_at(mask, error.shape[2])[:, None, :, None]
        return (error * counts).sum() / (counts.sum() * error.shape[-1]).clamp(min=1.0)


class BlockReconstruction(Term):
    """Reconstruction of what entered each block of the module, one decoder each, first to last; their mean."""

    def __init__(self, parts: Sequence[Reconstruction]) -> None:
        super().__init__()
        self.uses = frozenset({"states"}).union(*(part.uses for part in parts))
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch, states: Sequence[Tensor] = ()) -> TermValue:
        """Compute the mean error. Arguments as in ``Term.forward``."""
        targets = [state.detach() for state in states]  # targets, not features: what goes on keeps its graph
        errors = [part(target, outputs, batch).loss for part, target in zip(self.parts, targets, strict=True)]
        return TermValue(torch.stack(errors).mean())
