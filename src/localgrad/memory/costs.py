"""What local modules cost in training, in bytes and nanoseconds, composed from the costs of their parts. Pure data.

Every part (stem, block, tail, objective) has five numbers that tell its memory::

    kept      bytes alive after its forward pass besides its output (its input, where it saved it, included)
    forward   most bytes alive during its forward pass, input and output included
    backward  most bytes alive during its backward pass, what it kept and the gradient of its output included
    gradients bytes of its parameters' gradients, alive from its backward pass to the update
    output    bytes of what it gives

and a module's peak is the largest of: what earlier parts keep + forward of this one; the same + backward of this one +
gradients of later ones; all gradients + the optimizer's temporaries. So the peak and the time of any module of any
partition follow without running anything, and a planner can look at thousands of plans in a moment.

Who measures parts: ``memory/parts.py``. What isn't composed: clipping and averaging of weights, whose bytes the
whole-step simulation sees that confirms a plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from localgrad.formats import Json
from localgrad.partition import Checkpointing, Plan

WAYS = tuple(map(Checkpointing.parse, ("none", "blocks", "blocks/8", "halves", "halves/2", "halves/4", "halves/8")))
"""The ways of checkpointing that are measured for every block, and that a planner chooses from."""


class Choice(NamedTuple):
    """One way to run a local module.

    Attributes:
        nanoseconds: time of its step; nominal ones leave the update out.
        peak_bytes: the most bytes alive during its step, all static memory left out.
        how: its checkpointing.
    """

    nanoseconds: int
    peak_bytes: int
    how: Checkpointing


class PartCost(NamedTuple):
    """What one part (stem, block, tail, objective) costs; bytes and nanoseconds, integers throughout."""

    kept: int
    kept_in_autocast: int
    output: int
    forward: int
    backward: int
    gradients: int
    forward_ns: int
    backward_ns: int


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """What costs are measured for.

    Attributes:
        batch_size: images a step.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast.
        accumulation: parts that the batch is cut into.
        device: ``cpu`` or ``cuda``.
        overlap: blocks of the module before that each module trains as well.
        chunk_logits: whether logits of the model's own end are made chunk by chunk.
        shared: what becomes of a parameter that several modules read, as for ``LocalLearner``: of one that is averaged
            each part is taken to have its own copy.
    """

    batch_size: int
    precision: str = "fp32"
    accumulation: int = 1
    device: str = "cpu"
    overlap: int = 0
    chunk_logits: bool = False
    shared: str = "refuse"

    @property
    def part_size(self) -> int:
        """Images in the largest part of the batch."""
        return math.ceil(self.batch_size / self.accumulation)


class Head(NamedTuple):
    """A module's objective: what it costs, its own static bytes, its update's bytes and time, and passes a step.

    Logits of its own that it gives are there from its forward pass to the end of the step.
    """

    cost: PartCost
    static: int
    temporary: int
    passes: int = 1
    update_ns: int = 0
    logits: int = 0


@dataclass(frozen=True)
class Costs:
    """The costs of a model's parts at one batch size, and of any local module composed from them.

    Parts are the stem, the blocks and the tail, in order. Bytes are of one part of the batch where it is accumulated.

    Attributes:
        settings: what they were measured for.
        parts: for each of ``WAYS``, the cost of each part inside a module.
        leading: the same for a part that is the first of its module: its input is there before, without a gradient.
        heads: every distinct objective.
        head_of: number of the head of blocks ``start .. stop - 1``, as ``head_of[start][stop - start - 1]``.
        static: for each part, bytes of parameters, buffers and optimizer state.
        state: for each part, bytes of optimizer state alone.
        temporary: for each part, bytes of the optimizer's temporaries.
        update_ns: for each part, the time of its update, where it is known.
        temporary_adds: whether those add up over parts (``foreach``), or the largest counts.
        inputs: for each block, bytes of what enters it for the whole batch, and of what enters the tail.
        images: bytes of the images of the whole batch.
        uses: what objectives of modules that are neither first nor last look at, besides inputs and labels.
        last_uses: what that of the last one looks at.
        carried: bytes of what else a whole batch carries from its beginning to the last but one of the modules.
        labels: bytes of a whole batch's, which are there all the time.
        along: bytes that go along with a whole batch through all modules: masks and positions of a model that was
            split by watching it.
        images_stay: whether the main input does, too.
    """

    settings: CostSettings
    parts: list[list[PartCost]]
    leading: list[list[PartCost]]
    heads: list[Head]
    head_of: list[list[int]]
    static: list[int]
    state: list[int]
    temporary: list[int]
    update_ns: list[int]
    temporary_adds: bool
    inputs: list[int]
    images: int
    uses: list[str]
    last_uses: list[str] = field(default_factory=list)
    carried: int = 0
    labels: int = 0
    along: int = 0
    images_stay: bool = False

    def to_dict(self) -> dict[str, Json]:
        """All of it as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Costs:
        """Take up what ``to_dict`` gave."""
        parts, leading = ([[PartCost(*cost) for cost in row] for row in values[key]] for key in ("parts", "leading"))
        heads = [Head(PartCost(*cost), *others) for cost, *others in values["heads"]]
        settings = CostSettings(**values["settings"])
        return cls(**{**values, "settings": settings, "parts": parts, "leading": leading, "heads": heads})

    @property
    def num_blocks(self) -> int:
        """Blocks between stem and tail."""
        return len(self.static) - 2

    @property
    def static_bytes(self) -> int:
        """Bytes of the model's parameters, buffers and optimizer state."""
        return sum(self.static)

    def head(self, start: int, stop: int) -> Head:
        """The objective of the module of blocks ``start .. stop - 1``."""
        return self.heads[self.head_of[start][stop - start - 1]]

    def static_of(self, start: int, stop: int) -> int:
        """Static bytes that the module's objective adds, and its own optimizer state of blocks that overlap.

        With the logits that it gives, as if they were there all the time: modules before it are taken to need a little
        more than they do.
        """
        head = self.head(start, stop)
        logits = head.logits * self.settings.accumulation
        return head.static + logits + sum(self.state[self.begin(start) + 1 : start + 1])

    def begin(self, start: int) -> int:
        """The first block that a module runs: before its own first one, with overlap."""
        return max(0, start - self.settings.overlap)

    def choices(self, start: int, stop: int) -> list[Choice]:
        """Every way to run the module of blocks ``start .. stop - 1`` that no other beats in time and peak.

        Returns:
            The fastest first, each next one slower and smaller.
        """
        found = []
        for number, how in enumerate(WAYS):
            peaks, times = self._runs(start, stop, number)
            num_blocks = stop - self.begin(start)
            for count, (peak, time) in enumerate(zip(peaks, times, strict=True)):
                if (count == 0) == (how.level == "none"):
                    first = None if count in (0, num_blocks) else count
                    found.append(Choice(time, peak, Checkpointing(how.level, how.chunks, first)))
        found.sort(key=lambda choice: choice[:2])
        kept: list[Choice] = []
        for choice in found:
            if not kept or choice.peak_bytes < kept[-1].peak_bytes:
                kept.append(choice)
        return kept

    def choice(self, start: int, stop: int, how: Checkpointing) -> Choice:
        """What one way to run a module costs; one of ``WAYS``, on all blocks or on the first few."""
        way = WAYS.index(Checkpointing(how.level, how.chunks))
        num_blocks = stop - self.begin(start)
        count = 0 if how.level == "none" else min(num_blocks, how.first or num_blocks)
        peaks, times = self._runs(start, stop, way)
        return Choice(times[count], peaks[count], how)

    def forward_ns(self, start: int, stop: int, *, with_objective: bool) -> int:
        """Nanoseconds of forward passes alone of blocks ``start .. stop - 1`` on a batch: of what only runs."""
        units = self._units(start, stop)
        plain = sum(self._part(0, unit, units[0]).forward_ns for unit in units)
        objective = self.head(start, stop).cost.forward_ns if with_objective else 0
        return (plain + objective) * self.settings.accumulation

    def peak_of(self, plan: Plan) -> int:
        """The peak of a step by a plan, all static bytes included."""
        runs = [(span.start, span.stop) for span in plan.spans]
        peaks = [self.choice(*run, plan.checkpointing(index)).peak_bytes for index, run in enumerate(runs)]
        return self.static_bytes + sum(self.static_of(*run) for run in runs) + max(peaks)

    def _runs(self, start: int, stop: int, way: int) -> tuple[list[int], list[int]]:
        """Peak bytes and nanoseconds of a module whose first 0, 1, 2 ... blocks run in ``way``, the others plainly."""
        first = start == 0
        begin = self.begin(start)
        units = self._units(start, stop)
        lead = units[0]
        plain = [self._part(0, unit, lead) for unit in units]
        other = [self._part(way if 0 < unit <= self.num_blocks else 0, unit, lead) for unit in units]
        head, skipped = self.head(start, stop).cost, 1 if first else 0  # the stem runs plainly
        passes = self.head(start, stop).passes * self.settings.accumulation
        gradients = [0, *itertools.accumulate(part.gradients for part in plain)]
        all_gradients = gradients[-1] + head.gradients
        accumulates = self.settings.accumulation > 1
        # Gradients alive during the backward pass of a unit: those of later ones, or (accumulated) of all.
        later = [all_gradients if accumulates else all_gradients - gradients[n + 1] for n in range(len(plain))]
        output = plain[-1].output
        before = all_gradients if accumulates else 0  # during the forward pass
        suffix_forward, suffix_backward = _suffix_peaks(plain, later, before, output)
        around = self._around(start, stop, output)
        update = all_gradients + output + self._temporary(start, stop)
        if accumulates:  # the parts' outputs are joined once all are there
            update = max(update, all_gradients + 2 * output * self.settings.accumulation)
        peaks, times = [], []
        kept = kept_in_autocast = prefix_peak = 0
        plain_kept = [0, *itertools.accumulate(part.kept for part in plain)]
        plain_in_autocast = [0, *itertools.accumulate(part.kept_in_autocast for part in plain)]
        time = sum(part.forward_ns + part.backward_ns for part in plain) + head.forward_ns + head.backward_ns
        update_ns = sum(self.update_ns[units.start : units.stop]) + self.head(start, stop).update_ns
        num_blocks = stop - begin
        for count in range(-skipped, num_blocks + 1):
            done = count + skipped  # units that run in the other way (the stem among them)
            if done:
                part = other[done - 1]
                prefix_peak = max(
                    prefix_peak,
                    kept_in_autocast + part.forward + before,
                    kept + part.backward + later[done - 1] + output,
                )
                kept, kept_in_autocast = kept + part.kept, kept_in_autocast + part.kept_in_autocast
                was = plain[done - 1]
                time += part.forward_ns + part.backward_ns - was.forward_ns - was.backward_ns
            if count < 0:
                continue
            rest, rest_in_autocast = plain_kept[-1] - plain_kept[done], plain_in_autocast[-1] - plain_in_autocast[done]
            peak = max(
                prefix_peak,
                kept_in_autocast - plain_in_autocast[done] + suffix_forward[done],
                kept - plain_kept[done] + suffix_backward[done],
                kept_in_autocast + rest_in_autocast + output + head.forward + before,
                kept + rest + output + head.backward + before,
                update,
            )
            peaks.append(around + peak)
            times.append(time * passes + update_ns)
        return peaks, times

    def _units(self, start: int, stop: int) -> range:
        """The parts of a module, by number: stem and tail among them, where they are its own."""
        return range(0 if start == 0 else self.begin(start) + 1, stop + (2 if stop == self.num_blocks else 1))

    def _part(self, way: int, unit: int, lead: int) -> PartCost:
        return (self.leading if unit == lead else self.parts)[way][unit]

    def _around(self, start: int, stop: int, output: int) -> int:
        """Bytes alive during the whole module: what enters it, the images, and earlier parts' outputs."""
        last = stop == self.num_blocks
        stay = self.images_stay or ("images" in self.uses and not last)
        images = self.images if start == 0 or stay else 0
        earlier = output * (self.settings.accumulation - 1)
        carried = 0 if last else self.carried
        return images + carried + self.labels + self.along + (self.inputs[self.begin(start)] if start else 0) + earlier

    def _temporary(self, start: int, stop: int) -> int:
        units = self._units(start, stop)
        found = [*self.temporary[units.start : units.stop], self.head(start, stop).temporary]
        return sum(found) if self.temporary_adds else max(found)


def _suffix_peaks(
    plain: Sequence[PartCost], later: Sequence[int], before: int, output: int
) -> tuple[list[int], list[int]]:
    """The largest forward and backward peak among units from each one on, with all of them plain from the start."""
    forward, backward = [0], [0]
    kept = [0, *itertools.accumulate(part.kept for part in plain)]
    in_autocast = [0, *itertools.accumulate(part.kept_in_autocast for part in plain)]
    for number in reversed(range(len(plain))):
        part = plain[number]
        forward.append(max(forward[-1], in_autocast[number] + part.forward + before))
        backward.append(max(backward[-1], kept[number] + part.backward + later[number] + output))
    return forward[::-1], backward[::-1]


def with_times(costs: Costs, timed: Costs) -> Costs:
    """The bytes of some costs with the times of others, which were taken on parts of the batch of another size.

    Recomputing adds work: where a noisy clock says less than without, it is taken to be as fast.
    """
    share = costs.settings.part_size / timed.settings.part_size

    def part(of_bytes: PartCost, of_time: PartCost) -> PartCost:
        forward, backward = round(of_time.forward_ns * share), round(of_time.backward_ns * share)
        return of_bytes._replace(forward_ns=forward, backward_ns=backward)

    def at_least(plain: PartCost, other: PartCost) -> PartCost:
        least = plain.forward_ns + plain.backward_ns - other.forward_ns
        return other._replace(backward_ns=max(other.backward_ns, least))

    def table(bytes_of: list[list[PartCost]], times_of: list[list[PartCost]]) -> list[list[PartCost]]:
        ways = [list(map(part, *rows)) for rows in zip(bytes_of, times_of, strict=True)]
        return [list(map(at_least, ways[0], way)) for way in ways]

    return replace(
        costs,
        parts=table(costs.parts, timed.parts),
        leading=table(costs.leading, timed.leading),
        heads=[
            head._replace(cost=part(head.cost, other.cost), update_ns=other.update_ns)
            for head, other in zip(costs.heads, timed.heads, strict=True)
        ],
        update_ns=timed.update_ns,
    )


def interpolated(small: Costs, large: Costs, batch_size: int) -> Costs:
    """Costs at any batch size from those at two: every tensor has a constant part and one that grows with the batch."""
    low, high = small.settings.batch_size, large.settings.batch_size
    share = (batch_size - low) / (high - low)

    def between(a: int, b: int) -> int:
        return round(a + (b - a) * share)

    def part(a: PartCost, b: PartCost) -> PartCost:
        return PartCost(*(max(0, between(x, y)) for x, y in zip(a, b, strict=True)))

    def table(a: list[list[PartCost]], b: list[list[PartCost]]) -> list[list[PartCost]]:
        return [list(map(part, *rows)) for rows in zip(a, b, strict=True)]

    return replace(
        large,
        settings=replace(large.settings, batch_size=batch_size),
        parts=table(small.parts, large.parts),
        leading=table(small.leading, large.leading),
        heads=[
            a._replace(cost=part(a.cost, b.cost), logits=between(a.logits, b.logits))
            for a, b in zip(small.heads, large.heads, strict=True)
        ],
        inputs=list(map(between, small.inputs, large.inputs)),
        images=between(small.images, large.images),
        carried=between(small.carried, large.carried),
        labels=between(small.labels, large.labels),
        along=between(small.along, large.along),
    )
