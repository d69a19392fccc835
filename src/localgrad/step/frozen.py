"""A local module that learns no more and only runs: its state stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@final
class Frozen:
    """Regions in which a module runs in training mode and changes nothing of its own.

    Batch (and instance) norms use their running statistics. What other modules write into their buffers (codebooks,
    counters, vectors of spectral norm) is undone; which buffers those are is seen in the first region. What is drawn at
    random goes on: later modules learn from features with dropout and drop path, as they did before.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._written: set[str] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """One such region, for a forward pass and (of an end-to-end step) its backward pass."""
        norms, buffers = [], []
        for owner, net in self.module.named_modules():
            if isinstance(net, _NormBase):
                norms += [net] * net.training
                continue
            for name, buffer in net._buffers.items():
                key = f"{owner}.{name}"
                if buffer is not None:
                    value = buffer.clone() if self._written is None or key in self._written else None
                    buffers.append((key, net._buffers, name, buffer, buffer._version, value))
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True
            self._written = self._written or set()
            for key, table, name, buffer, version, value in buffers:
                if table[name] is not buffer or buffer._version != version:
                    self._written.add(key)
                    table[name] = buffer
                    if value is not None:
                        with torch.no_grad():
                            buffer.copy_(value)
