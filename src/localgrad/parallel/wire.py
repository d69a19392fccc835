"""What travels between two ranks: packets of tensors, one way, in a fixed order, over one line of their own.

A packet is what the next rank's modules look at for one batch: features, labels, targets, and whatever their
objectives use (the image for image reconstruction, the features before, pooled context). Beside it goes a header of
two numbers: how many images there are, and the last batch of the phase as far as rank 0 knows. Headers travel over
gloo, so that reading them never waits for a GPU.

Tensors are received into a ring of buffers. The first packet of a phase (an epoch, an evaluation) is described before
it is sent; later ones have its shapes, and a shorter batch is padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Packet = Mapping[str, Tensor]
WIRES = ("same", "bf16")
"""How features travel: as they are, or in bfloat16: half the bytes of float32."""
NARROWED = ("features", "previous", "context")


@dataclass(frozen=True)
class Line:
    """One direction between two neighbours.

    Attributes:
        peer: global rank of the other one.
        data: process group of the two, for tensors.
        control: process group of the two, over gloo.
    """

    peer: int
    data: dist.ProcessGroup
    control: dist.ProcessGroup


@dataclass(frozen=True)
class Slot:
    """One tensor of a packet: its name, the shape of a full batch, and its dtype before and on the wire."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    wire_dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.wire_dtype.itemsize


class Sender:
    """Sends packets to the next rank.

    Args:
        line: to it.
        wire: ``same`` or ``bf16``.
    """

    def __init__(self, line: Line, *, wire: str = "same") -> None:
        self.line = line
        self.wire = wire
        self.packet_bytes = 0
        self._slots: list[Slot] | None = None
        self._pending: dict[int, tuple[list[Any], list[Tensor]]] = {}

    def send(self, batch: int, packet: Packet, *, last: int) -> None:
        """Start to send a packet.

        Args:
            batch: its number; they come in order.
            packet: tensors by name, each [B, ...].
            last: the last batch of the phase, as far as is known.
        """
        num_images = len(packet["features"])
        if self._slots is None:
            self._slots = [self._slot(name, tensor) for name, tensor in packet.items()]
            self.packet_bytes = sum(slot.nbytes for slot in self._slots)
            dist.send_object_list([self._slots], self.line.peer, group=self.line.control)
        header = torch.tensor([num_images, last])
        tensors = [_travelling(packet[slot.name], slot) for slot in self._slots]
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
        is_narrowed = self.wire == "bf16" and name.startswith(NARROWED) and tensor.dtype.itemsize > 2
        return Slot(name, tuple(tensor.shape), tensor.dtype, torch.bfloat16 if is_narrowed else tensor.dtype)


class Receiver:
    """Receives packets from the rank before.

    Args:
        line: to it.
        device: where the tensors are wanted.
        num_slots: packets that have room at a time.
    """

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
        header = torch.zeros(2, dtype=torch.int64)
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
        num_images, last = header.tolist()
        tensors = self._ring[batch % self.num_slots]
        return {
            slot.name: tensor[:num_images].to(slot.dtype) for slot, tensor in zip(self._slots, tensors, strict=True)
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
    missing = slot.shape[0] - len(tensor)
    if missing < 0 or tuple(tensor.shape[1:]) != slot.shape[1:] or tensor.dtype != slot.dtype:
        raise RuntimeError(
            f"{slot.name}: the phase began with {list(slot.shape)} {slot.dtype}, and now there are "
            f"{list(tensor.shape)} {tensor.dtype}; batches of one phase have one shape, only the last may be shorter."
        )
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor.to(slot.wire_dtype).contiguous()
