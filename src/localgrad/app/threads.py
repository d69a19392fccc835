"""How many processor threads a run takes: from the size of its model and batch alone, once, and kept in its recipe.

Sums come in another order with another number of threads, so it is part of what makes a run the same again; a clock
would choose differently on a busy day.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from localgrad.backbones.quantized import num_weights

SMALL_PARAMETERS = 4_000_000
"""A model with more is large whatever its images are: its optimizer alone has work for several threads."""
SMALL_FLOPS = 4e9
"""A forward pass of a batch with less is over in tens of milliseconds, in a hundred operators that wait for each other:
more threads gain little alone, and lose much beside another busy process."""


def choose_threads(model: nn.Module, input_size: Sequence[int], batch_size: int) -> int:
    """Processor threads for a model of (C, H, W): one for a small one, else as many as torch takes by itself."""
    weight = next(model.parameters(), None)
    if weight is None or num_weights(model) > SMALL_PARAMETERS:
        return torch.get_num_threads()
    training = {module: module.training for module in model.modules()}
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(1, *input_size, dtype=weight.dtype))
    except Exception:  # whoever splits it says in words what is wrong
        return torch.get_num_threads()
    finally:
        for module, mode in training.items():
            module.training = mode
    return 1 if batch_size * counter.get_total_flops() < SMALL_FLOPS else torch.get_num_threads()


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Leave this process with as many threads as it had."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
