"""What travels between two ranks: packets of tensors, one way, in a fixed order, over one line of their own.

A packet is a batch as the next rank receives it: features, labels, targets, and what else it carries
(``objectives/carried.py``). Beside it goes a header of three numbers: how many images there are, the last batch of the
phase as far as rank 0 knows, and which tensors are there (a frozen module gives no gradient). Headers travel over gloo,
so that reading them never waits for a GPU.

Tensors are received into a ring of buffers. The first packet of a phase (an epoch, an evaluation) is described before
it is sent; later ones have its shapes, and a shorter batch is padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.objectives.carried import CARRIED, Carried, LocalBatch

Packet = Mapping[str, Tensor]
"""Tensors by name; ``context/002`` is the third of what grows."""
WIRES = ("same", "bf16")
"""How features travel: as they are, or in bfloat16: half the bytes of float32."""


@dataclass(frozen=True)
class Line:
    """One direction between two neighbours: the other's global rank, and groups of both, one of them over gloo."""

    peer: int
    data: dist.ProcessGroup
    control: dist.ProcessGroup


@dataclass(frozen=True)
class Slot:
    """One tensor of a packet: name, shape of a full batch, dtype before and on the wire, whether it is by image."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    wire_dtype: torch.dtype
    by_image: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return torch.Size(self.shape).numel() * self.wire_dtype.itemsize


def packed(batch: LocalBatch) -> dict[str, Tensor]:
    """A batch as a packet."""
    packet = {"features": batch.features, "labels": batch.labels}
    if batch.known_targets is not None:
        packet["targets"] = batch.known_targets
    for name, value in batch.carried.items():
        grown = {f"{name}/{number:03d}": tensor for number, tensor in enumerate(value)}
        packet |= {name: value} if isinstance(value, Tensor) else grown
    return packet


def unpacked(packet: Packet) -> LocalBatch:
    """The batch of a packet."""
    batch = LocalBatch(None, packet["labels"], features=packet["features"], targets=packet.get("targets"))
    for key in sorted(packet.keys() - {"features", "labels", "targets"}):
        name, _, number = key.partition("/")
        batch.carried[name] = (*batch.carried.get(name, ()), packet[key]) if number else packet[key]
    return batch


def _thing(key: str) -> Carried | None:
    return CARRIED.get(key.partition("/")[0])


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
            self._slots = [self._slot(name, tensor) for name, tensor in packet.items()]
            self.packet_bytes = sum(slot.nbytes for slot in self._slots)
            dist.send_object_list([self._slots], self.line.peer, group=self.line.control)
        present = sum((slot.name in packet) << number for number, slot in enumerate(self._slots))
        header = torch.tensor([num_images, last, present])
        like = packet["features"]
        tensors = [
            _travelling(packet[slot.name], slot)
            if slot.name in packet
            else like.new_zeros(slot.shape, dtype=slot.wire_dtype)
            for slot in self._slots
        ]
        works = [dist.isend(header, self.line.peer, group=self.line.control, tag=0)]
        works += [
            dist.isend(tensor, self.line.peer, group=self.line.data, tag=tag) for tag, tensor in enumerate(tensors, 1)
        ]
        self._pending[batch] = works, [header, *tensors]

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

    def _slot(self, name: str, tensor: Tensor) -> Slot:
        thing = _thing(name)
        narrows = name == "features" if thing is None else thing.narrows
        is_narrowed = self.wire == "bf16" and narrows and tensor.dtype.itemsize > 2
        wire_dtype = torch.bfloat16 if is_narrowed else tensor.dtype
        return Slot(name, tuple(tensor.shape), tensor.dtype, wire_dtype, thing is None or thing.splits)


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
        header = torch.zeros(3, dtype=torch.int64)
        works = [dist.irecv(header, self.line.peer, group=self.line.control, tag=0)]
        works += [
            dist.irecv(tensor, self.line.peer, group=self.line.data, tag=tag)
            for tag, tensor in enumerate(self._ring[batch % self.num_slots], 1)
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
        num_images, last, present = header.tolist()
        tensors = self._ring[batch % self.num_slots]
        return {
            slot.name: (tensor[:num_images] if slot.by_image else tensor).to(slot.dtype)
            for number, (slot, tensor) in enumerate(zip(self._slots, tensors, strict=True))
            if present >> number & 1
        }, last

    def finish(self) -> None:
        """The phase is over; the room stays for the next one."""
        assert not self._expected, "nothing is asked for beyond the last batch"
        self._slots = None

    def _open(self, slots: list[Slot]) -> None:
        self._slots = slots
        wanted = [(slot.shape, slot.wire_dtype) for slot in slots]
        if not self._ring or [(tuple(tensor.shape), tensor.dtype) for tensor in self._ring[0]] != wanted:
            self._ring = []
            self._ring = [
                [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in wanted]
                for _ in range(self.num_slots)
            ]


def _travelling(tensor: Tensor, slot: Slot) -> Tensor:
    """A tensor as it travels: contiguous, in the wire's dtype, padded to a full batch."""
    if not slot.by_image and tuple(tensor.shape) == slot.shape and tensor.dtype == slot.dtype:
        return tensor.to(slot.wire_dtype).contiguous()
    missing = slot.shape[0] - len(tensor) if slot.by_image else -1
    if missing < 0 or tuple(tensor.shape[1:]) != slot.shape[1:] or tensor.dtype != slot.dtype:
        raise RuntimeError(
            f"{slot.name}: the phase began with {list(slot.shape)} {slot.dtype}, and now there are "
            f"{list(tensor.shape)} {tensor.dtype}; batches of one phase have one shape, only the last may be shorter."
        )
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor.to(slot.wire_dtype).contiguous()
