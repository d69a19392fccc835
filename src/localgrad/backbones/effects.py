"""What a block's forward pass changes beside giving an output, found out on a copy, and undone where it runs again.

Batch norms move running statistics, spectral norms their vectors, codebooks their codes, counters themselves: a part's
state is all that ``ModelState`` keeps of it, frozen weights among it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localgrad.backbones.hooks import is_ours
from localgrad.backbones.namespaces import Attributes
from localgrad.backbones.random_numbers import RandomState
from localgrad.backbones.state import PLAIN, ModelState, same_bits


@dataclass(frozen=True)
class Effects:
    """What a block's forward pass changes in training mode.

    Attributes:
        parts: modules that write into themselves.
        norms: batch norms of PyTorch or timm, whose statistics stay where they are with zero momentum.
        draws: whether it draws from Python's or NumPy's random numbers.
    """

    parts: tuple[nn.Module, ...] = ()
    norms: tuple[_BatchNorm, ...] = ()
    draws: bool = False

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.parts or self.norms or self.draws)

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """For a forward pass that is about to begin, and for its recomputation, which leaves no trace."""
        return contextlib.nullcontext(), self._undone(ModelState(self.parts, weights=True))

    @contextmanager
    def _undone(self, before: ModelState) -> Iterator[None]:
        with before.again(draws=self.draws), still_statistics(self.norms):
            yield


NO_EFFECTS = Effects()


@contextmanager
def still_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Keep running statistics where they are, without a copy of them."""
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count


def plain_norms(parts: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Batch norms in some parts of a model, whose statistics ``still_statistics`` keeps."""
    return [cast(_BatchNorm, norm) for part in parts for norm in part.modules() if is_plain_norm(norm)]


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm that does with its statistics what PyTorch's do."""
    return isinstance(module, _BatchNorm) and is_ours(type(module).forward) and "forward" not in vars(module)


class Observed(NamedTuple):
    """What was seen in a module's forward pass in training mode.

    Attributes:
        parts: names of the modules in it that write into themselves; "" is the module itself.
        draws: whether it draws from Python's or NumPy's random numbers.
        mixes: whether what it gives for an image depends on the other images of the batch.
        by_images: names of those parts that write what depends on the images.
    """

    parts: tuple[str, ...]
    draws: bool
    mixes: bool
    by_images: tuple[str, ...]

    @property
    def sees_batches(self) -> bool:
        """Whether results depend on which images come together."""
        return self.mixes or bool(self.by_images)

    def effects_on(self, module: nn.Module) -> Effects:
        """The same of the module that was observed, or of one that is alike."""
        found = [module.get_submodule(name) for name in self.parts]
        others = [part for part in found if not is_plain_norm(part)]
        norms = [part for part in found if is_plain_norm(part)]
        return Effects(tuple(others), tuple(cast(list[_BatchNorm], norms)), self.draws)


def observe_effects(module: nn.Module, twin: nn.Module, example: Tensor, *, foreign: bool) -> Observed:
    """See what a module's forward pass does in training mode; state that it writes only now and then isn't seen.

    Args:
        module: the module, which stays as it is.
        twin: a copy of it in training mode, which is run.
        example: what enters it, [2 or more, ...].
        foreign: whether it runs code that isn't ours, of which nothing is known.
    """
    parts = dict(twin.named_modules())
    norms = tuple(name for name, part in parts.items() if isinstance(part, _BatchNorm))
    tracking = tuple(name for name in norms if parts[name].running_mean is not None)
    has_more = any(b is not None for name, p in parts.items() if name not in norms for b in p._buffers.values())
    if example.is_meta or not (foreign or has_more):
        return Observed(tracking, draws=False, mixes=bool(norms), by_images=tracking)
    before = ModelState(parts.values(), weights=True)
    behind = ModelState(module.modules(), weights=True)  # a closure in the copy may run the module
    names = {part: name for name, part in parts.items()}

    def run(features: Tensor) -> Tensor:
        before.random.restore()
        output: Tensor = twin(features.clone()).detach()
        return output

    try:
        with torch.enable_grad():
            outputs = run(example)
            now = RandomState()
            draws = not now.same_others(before.random)
            written = [names[part] for part in before.changed()] if not behind.changed() else list(parts)
            if not (foreign or set(written) - set(norms)):
                return Observed(tuple(written), draws, mixes=bool(norms), by_images=tuple(written))
            states = {name: _values_of(parts[name]) for name in written}
            first = ModelState(parts.values(), weights=True)
            run(example)
            again = {names[part] for part in first.changed()}
            before.restore()
            # As many images, and so the same kernels: what doesn't mix them gives the first one's bits.
            others_changed = run(torch.cat([example[:1], 1 - 2 * example[1:].flip(-1)]))
            by_images = tuple(name for name in written if not _same_values(states[name], _values_of(parts[name])))
            mixes = len(outputs) != len(example) or not same_bits(others_changed[:1], outputs[:1])
            before.restore()
            is_quiet = not draws and now.same_torch(before.random)
            mixes = mixes or (is_quiet and not _same_alone(run, example, outputs))
    finally:
        before.restore()
        behind.restore()
    # What is written once, and whatever the images are, is a table that is made when it is needed, and no state.
    kept = tuple(name for name in written if name in again or name in by_images)
    return Observed(kept, draws, mixes, by_images)


def _same_alone(run: Callable[[Tensor], Tensor], example: Tensor, outputs: Tensor) -> bool:
    """Whether an image gives by itself what it gives among others, but for rounding."""
    try:
        alone = run(example[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # it needs several
        return False
    if alone.shape != outputs[:1].shape:
        return False
    return bool((alone - outputs[:1]).norm() <= 0.01 * outputs[:1].norm())


@torch.no_grad()
def _values_of(part: nn.Module) -> Attributes:
    """What a part has in its tables, copied, and its plain numbers; no tensors that it only shows."""
    found: Attributes = {name: value for name, value in vars(part).items() if isinstance(value, PLAIN)}
    tables = {**part._parameters, **part._buffers}
    return found | {name: value.clone() for name, value in tables.items() if value is not None}


def _same_values(one: Attributes, other: Attributes) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(value, other[name]) for name, value in one.items()]
    return all(same_bits(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1] for pair in pairs)
