"""The moving average of a model's weights: timm's, of what can be averaged (``averaging``).

Source: timm 1.0.31, ``ModelEmaV3``, whose numbers these are for models whose only state is that of norms.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from localgrad.backbones.hooks import let_go, strip_hooks
from localgrad.objectives.averaging import OtherBuffers, averaged_pairs, renew_spectral_norms
from localgrad.step.sharding import rows_of


class MovingAverage(ModelEmaV3):  # type: ignore[misc]  # timm has no types
    """An average of a model, in ``module``: in evaluation mode, without its users' hooks; settings are timm's."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        let_go(model)
        if next(model.parameters()).is_meta:  # of shapes, for estimates: timm would make a generator there
            super().__init__(nn.ParameterList([torch.empty(0)]), **settings)
            self.module = copy.deepcopy(model).eval()
        else:
            super().__init__(model, **settings)
        strip_hooks(self.module)
        self._others = OtherBuffers()

    @torch.no_grad()
    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Take a step towards a model of the same architecture; ``decay`` is the share of the average that stays."""
        averages, values = [], []
        for own, value in averaged_pairs(self.module, model):
            averages.append(_real_rows(own))
            values.append(_real_rows(value))
        if self.foreach:
            self._foreach_lerp_(averages, values, weight=1.0 - decay)
        else:
            for own, value in zip(averages, values, strict=True):
                self._lerp_(own, value.to(device=self.device), weight=1.0 - decay)
        self._others.follow(self.module, model)
        renew_spectral_norms(self.module)


def _real_rows(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, as real numbers, in the same memory."""
    rows = rows_of(tensor)
    return torch.view_as_real(rows) if rows.is_complex() else rows
