"""Reconstruction: a decoder predicts, from a module's output, what the module was given, or the image.

The seed paper (arXiv 2212.14215) reconstructs the module's *input features*; InfoPro (arXiv 2101.10832, section 3)
the image. The loss is the mean squared error over all positions and channels. Features have no fixed scale (a
residual stream grows with depth, and early in training it drifts), so by default each target position is
layer-normalised without affine parameters, as masked autoencoders normalise their patches (arXiv 2111.06377,
section 4.1); pixels come normalised from the data path and are taken as they are. The target reaches the term
already detached: the module received it so.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from localgrad.auxiliary import Decoder
from localgrad.objectives.base import LocalBatch, Term, TermValue


class Reconstruction(Term):
    """Mean squared error between the decoder's prediction and its target.

    Args:
        decoder: from the module's output layout to the target's.
        of_image: take the image as the target, and not what the module received.
        normalise: layer-normalise each position of the target.
    """

    def __init__(self, decoder: Decoder, *, of_image: bool, normalise: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.uses_images = of_image
        self.normalise = normalise

    def forward(self, inputs: Tensor, outputs: Tensor, batch: LocalBatch) -> TermValue:
        """Compute the reconstruction error. Arguments as in ``Term.forward``."""
        source = batch.images if self.uses_images else inputs
        assert source is not None, "the executor keeps the images for as long as a term uses them"
        target = self.decoder.target.to_grid(source)
        if self.normalise:
            target = F.layer_norm(target, target.shape[-1:])
        # PyTorch returns the mean at the beginning of a storage that held every element's error, and that would live
        # as long as the figure does: to the end of the step.
        return TermValue(F.mse_loss(self.decoder(outputs).float(), target.float()).clone())
