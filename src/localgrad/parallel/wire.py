"""What travels between two ranks: packets of tensors, one way, in a fixed order, over one line of their own.

A packet is a batch as the next rank receives it: features, labels, targets, and what else it carries
(``objectives/carried.py``), the model context among it. Beside it goes a header of numbers: how many images there are,
the last batch of the phase as far as rank 0 knows, and which tensors are there (a frozen module gives no gradient).
Headers travel over gloo, so that reading them never waits for a GPU; so does what is on the processor.

Tensors are received into a ring of buffers. The first packet of a phase (an epoch, an evaluation) is described before
it is sent; later ones have its shapes, and a shorter batch is padded. What doesn't fit (sequences of another length, a
mask that only batches with padding have) goes behind its packet, over gloo: slower, since nobody asks for it ahead.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.backbones.watching import Context
from localgrad.errors import ParallelError, reason_of
from localgrad.objectives.carried import CARRIED, MODEL_CONTEXT, LocalBatch

Packet = Mapping[str, Tensor]
"""Tensors by name; ``context/002`` is the third of what grows."""
WIRES = ("same", "bf16")
"""How features travel: as they are, or in bfloat16: half the bytes of float32."""
_BEHIND = 1_000_000
"""Tag of what goes behind a packet; those of its tensors are their numbers."""


@dataclass(frozen=True)
class Line:
    """One direction between two neighbours: the other's global rank, and groups of both, one of them over gloo."""

    peer: int
    data: dist.ProcessGroup
    control: dist.ProcessGroup

    def group(self, *, on_host: bool) -> dist.ProcessGroup:
        """By which tensors go that are on the processor, or where features are."""
        return self.control if on_host else self.data


@dataclass(frozen=True)
class Slot:
    """One tensor of a packet.

    Attributes:
        name: in the packet.
        shape: of a full batch.
        dtype: before the wire.
        wire_dtype: on it.
        by_image: whether its first side is the batch.
        on_host: whether it is on the processor, whatever features are on.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    wire_dtype: torch.dtype
    by_image: bool
    on_host: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor, num_images: int, *, wire: str) -> Slot:
        """For what is like a tensor of a batch."""
        thing = CARRIED.get(name.partition("/")[0])
        narrows = name == "features" if thing is None else thing.narrows
        is_narrowed = wire == "bf16" and narrows and tensor.dtype.itemsize > 2
        has_rows = bool(tensor.ndim) and len(tensor) == num_images
        return cls(
            name,
            tuple(tensor.shape),
            tensor.dtype,
            torch.bfloat16 if is_narrowed else tensor.dtype,
            by_image=has_rows if thing is None else thing.splits,
            on_host=tensor.device.type == "cpu",
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return torch.Size(self.shape).numel() * self.wire_dtype.itemsize

    def takes(self, tensor: Tensor, num_images: int) -> bool:
        """Whether there is room for a tensor of a batch: of one that is by image, for that many rows."""
        if tensor.dtype != self.dtype or (tensor.device.type == "cpu") != self.on_host:
            return False
        if not self.by_image:
            return tuple(tensor.shape) == self.shape
        fits = bool(tensor.ndim) and tuple(tensor.shape[1:]) == self.shape[1:]
        return fits and len(tensor) == num_images <= self.shape[0]

    def travelling(self, tensor: Tensor) -> Tensor:
        """A tensor as it travels: contiguous, in the wire's dtype, padded to a full batch."""
        missing = self.shape[0] - len(tensor) if self.by_image else 0
        if missing:
            tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        return tensor.to(self.wire_dtype).contiguous()


def packed(batch: LocalBatch) -> dict[str, Tensor]:
    """A batch as a packet.

    Raises:
        ParallelError: its model context can't travel.
    """
    packet = {"features": batch.features, "labels": batch.labels}
    if batch.known_targets is not None:
        packet["targets"] = batch.known_targets
    for name, value in batch.carried.items():
        grown = {f"{name}/{number:03d}": tensor for number, tensor in enumerate(value)}
        packet |= {name: value} if isinstance(value, Tensor) else grown
    for number, context in enumerate(batch.model_contexts):
        for inner, tensor in enumerate(_taken_out(context)):
            packet[f"{MODEL_CONTEXT}/{number:03d}/{inner:03d}"] = tensor
    return packet


def unpacked(packet: Packet) -> LocalBatch:
    """The batch of a packet."""
    batch = LocalBatch(None, packet["labels"], features=packet["features"], targets=packet.get("targets"))
    contexts: dict[str, list[Tensor]] = {}
    for key in sorted(packet.keys() - {"features", "labels", "targets"}):
        name, _, number = key.partition("/")
        if name == MODEL_CONTEXT:
            contexts.setdefault(number.partition("/")[0], []).append(packet[key])
        else:
            batch.carried[name] = (*batch.carried.get(name, ()), packet[key]) if number else packet[key]
    batch.model_contexts = [_put_back(tensors) for tensors in contexts.values()]
    return batch


@final
class _Pickler(pickle.Pickler):
    """Pickles what isn't tensors; those are kept, each once, in order. Of one that repeats a number, that number."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: object) -> object:
        """Of a tensor its number, and its shape where one element stands for all (a stand-in has no memory)."""
        if not isinstance(obj, Tensor):
            return None
        repeats = obj.numel() > 1 and not any(obj.stride())
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj[(0,) * obj.ndim] if repeats else obj)
        return self._numbers[id(obj)], tuple(obj.shape) if repeats else None


@final
class _Unpickler(pickle.Unpickler):
    """Puts tensors back where they were."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._expanded: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        """The tensor of a number, and always the same one."""
        number, shape = pid
        if number not in self._expanded:
            tensor = self._tensors[number]
            self._expanded[number] = tensor if shape is None else tensor.expand(shape)
        return self._expanded[number]


def _taken_out(context: Context) -> list[Tensor]:
    """A context as tensors, of which the first is the bytes of all else in it.

    Raises:
        ParallelError: there is something in it that can't be pickled.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(context)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ParallelError(
            f"model: its blocks are called with something beside features that can't go to another process "
            f"({reason_of(error)}); train in one process, with LocalLearner."
        ) from error
    return [torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), *pickler.tensors]


def _put_back(tensors: list[Tensor]) -> Context:
    first, *others = tensors
    found: Context = _Unpickler(io.BytesIO(first.numpy().tobytes()), others).load()
    return found


@final
class Sender:
    """Sends packets to the next rank, as ``same`` or in ``bf16``."""

    def __init__(self, line: Line, *, wire: str = "same") -> None:
        self.line = line
        self.wire = wire
        self.packet_bytes = 0
        self._slots: list[Slot] | None = None
        self._pending: dict[int, tuple[list[Any], list[Tensor]]] = {}

    def send(self, batch: int, packet: Packet, *, last: int) -> None:
        """Start to send a packet, in order; of the tensors that the phase began with, some may be missing."""
        num_images = len(packet["features"])
        if self._slots is None:
            self._slots = [Slot.of(name, tensor, num_images, wire=self.wire) for name, tensor in packet.items()]
            dist.send_object_list([self._slots], self.line.peer, group=self.line.control)
        fits = [slot.name in packet and slot.takes(packet[slot.name], num_images) for slot in self._slots]
        fitting = {slot.name for slot, is_there in zip(self._slots, fits, strict=True) if is_there}
        behind = self._written({name: tensor for name, tensor in packet.items() if name not in fitting}, num_images)
        header = torch.tensor([num_images, last, len(behind), *fits])
        like = packet["features"]
        tensors = [
            slot.travelling(packet[slot.name])
            if is_there
            else torch.zeros(slot.shape, dtype=slot.wire_dtype, device="cpu" if slot.on_host else like.device)
            for slot, is_there in zip(self._slots, fits, strict=True)
        ]
        works = [dist.isend(header, self.line.peer, group=self.line.control, tag=0)]
        works += [
            dist.isend(tensor, self.line.peer, group=self.line.group(on_host=slot.on_host), tag=tag)
            for tag, (slot, tensor) in enumerate(zip(self._slots, tensors, strict=True), 1)
        ]
        if len(behind):
            works.append(dist.isend(behind, self.line.peer, group=self.line.control, tag=_BEHIND))
        self.packet_bytes = sum(slot.nbytes for slot in self._slots) + len(behind)
        self._pending[batch] = works, [header, *tensors, behind]

    def _written(self, packet: Packet, num_images: int) -> Tensor:
        """What goes behind a packet, as bytes; none where all fits."""
        if not packet:
            return torch.empty(0, dtype=torch.uint8)
        slots = {name: Slot.of(name, tensor, num_images, wire=self.wire) for name, tensor in packet.items()}
        file = io.BytesIO()
        torch.save(
            {
                name: (tensor.to("cpu", slots[name].wire_dtype).contiguous(), tensor.dtype, slots[name].on_host)
                for name, tensor in packet.items()
            },
            file,
        )
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def settle(self, batch: int) -> None:
        """Wait until a packet was taken."""
        works, _ = self._pending.pop(batch)
        for work in works:
            work.wait()

    def finish(self) -> None:
        """Wait until all packets were taken; the phase is over."""
        for batch in list(self._pending):
            self.settle(batch)
        self._slots = None


@final
class Receiver:
    """Receives packets from the rank before onto a device; ``num_slots`` have room at a time."""

    def __init__(self, line: Line, device: torch.device, num_slots: int) -> None:
        self.line = line
        self.device = device
        self.num_slots = num_slots
        self._slots: list[Slot] | None = None
        self._ring: list[list[Tensor]] = []
        self._expected: dict[int, tuple[list[Any], Tensor]] = {}

    def expect(self, batch: int) -> None:
        """Ask for a packet, into the room of the one ``num_slots`` before it."""
        if self._slots is None:
            described: list[Any] = [None]
            dist.recv_object_list(described, self.line.peer, group=self.line.control)
            self._open(described[0])
        assert self._slots is not None, "they were described"
        header = torch.zeros(3 + len(self._slots), dtype=torch.int64)
        works = [dist.irecv(header, self.line.peer, group=self.line.control, tag=0)]
        works += [
            dist.irecv(tensor, self.line.peer, group=self.line.group(on_host=slot.on_host), tag=tag)
            for tag, (slot, tensor) in enumerate(zip(self._slots, self._ring[batch % self.num_slots], strict=True), 1)
        ]
        self._expected[batch] = works, header

    def receive(self, batch: int) -> tuple[dict[str, Tensor], int]:
        """Wait for a packet that was asked for.

        Returns:
            Its tensors by name, which are good until ``num_slots`` packets later, and the last batch of the phase.
        """
        assert self._slots is not None, "a packet is expected before it is received"
        works, header = self._expected.pop(batch)
        for work in works:
            work.wait()
        num_images, last, num_behind, *present = header.tolist()
        tensors = self._ring[batch % self.num_slots]
        packet = {
            slot.name: (tensor[:num_images] if slot.by_image else tensor).to(slot.dtype)
            for slot, tensor, is_there in zip(self._slots, tensors, present, strict=True)
            if is_there
        }
        return packet | (self._behind(num_behind) if num_behind else {}), last

    def _behind(self, nbytes: int) -> dict[str, Tensor]:
        written = torch.empty(nbytes, dtype=torch.uint8)
        dist.recv(written, self.line.peer, group=self.line.control, tag=_BEHIND)
        found = torch.load(io.BytesIO(written.numpy().tobytes()), weights_only=True)
        return {
            name: tensor.to("cpu" if on_host else self.device, dtype)
            for name, (tensor, dtype, on_host) in found.items()
        }

    def finish(self) -> None:
        """The phase is over; the room stays for the next one."""
        assert not self._expected, "nothing is asked for beyond the last batch"
        self._slots = None

    def _open(self, slots: list[Slot]) -> None:
        self._slots = slots
        wanted = [(slot.shape, slot.wire_dtype, "cpu" if slot.on_host else self.device.type) for slot in slots]
        has = [(tuple(tensor.shape), tensor.dtype, tensor.device.type) for ring in self._ring[:1] for tensor in ring]
        if has != wanted:
            self._ring = []
            self._ring = [
                [
                    torch.empty(slot.shape, dtype=slot.wire_dtype, device="cpu" if slot.on_host else self.device)
                    for slot in slots
                ]
                for _ in range(self.num_slots)
            ]
