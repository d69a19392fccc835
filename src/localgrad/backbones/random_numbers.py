"""All random numbers that a model may draw, and where they stand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import numpy as np
import torch


@final
class RandomState:
    """Where the random numbers of this process stand now: Python's, NumPy's, PyTorch's on the processor and on GPUs."""

    def __init__(self) -> None:
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.processor = torch.get_rng_state()
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.gpus = torch.cuda.get_rng_state_all() if in_use else []

    def restore(self) -> None:
        """Let them stand so again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.processor)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)

    def holds(self) -> bool:
        """Whether they still stand there."""
        now = RandomState()
        return self.same_torch(now) and self.same_others(now)

    def same_torch(self, other: RandomState) -> bool:
        """Whether PyTorch's numbers stand in the same place."""
        mine, theirs = (self.processor, *self.gpus), (other.processor, *other.gpus)
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))

    def same_others(self, other: RandomState) -> bool:
        """Whether Python's and NumPy's numbers stand in the same place."""
        return self.python == other.python and all(map(np.array_equal, self.numpy, other.numpy))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """A region at whose end all random numbers stand where they stood."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()
