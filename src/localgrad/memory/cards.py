"""Graphics cards, as far as memory depends on them: what kernels take and what is left of a card. No torch needed.

How large the temporaries of a kernel are depends on how many blocks of threads a card runs at once, and the workspace
of cuBLAS on its compute capability. So a plan is made for a card, and says which.

Sources: NVIDIA's data sheets and architecture whitepapers (multiprocessors, memory); "CUDA C++ Programming Guide",
table "Technical Specifications per Compute Capability" (resident threads).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from localgrad.errors import BudgetError, arg
from localgrad.units import format_bytes

MIB = 1 << 20
CONTEXT_BYTES = 512 * MIB
"""What the driver and loaded kernels take of a card before the first tensor, where there is no card to ask."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What of a card its memory depends on.

    Attributes:
        name: as people call it.
        total_bytes: of the card, as the driver reports it.
        multiprocessors: of the card.
        threads: that a multiprocessor holds at once, at most.
        capability: compute capability.
        context_bytes: what is gone before the first tensor: driver, loaded kernels, other processes.
        assumed: nobody named it, and there is none here.
    """

    name: str
    total_bytes: int
    multiprocessors: int
    threads: int
    capability: tuple[int, int]
    context_bytes: int = CONTEXT_BYTES
    assumed: bool = False

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies matrices of bfloat16 in hardware."""
        return self.capability >= (8, 0)

    def __str__(self) -> str:
        """Name, memory and what the size of temporaries depends on."""
        return f"{self.name} ({format_bytes(self.total_bytes)}{self._kernels}"

    def is_like(self, said: str) -> bool:
        """Whether temporaries are as large as on a card in words, whatever its driver calls it."""
        return said.endswith(self._kernels)

    @property
    def _kernels(self) -> str:
        major, minor = self.capability
        return f", {self.multiprocessors} multiprocessors, compute capability {major}.{minor})"


def _card(name: str, total_mib: int, multiprocessors: int, threads: int, capability: tuple[int, int]) -> Card:
    return Card(
        name=name,
        total_bytes=total_mib * MIB,
        multiprocessors=multiprocessors,
        threads=threads,
        capability=capability,
    )


_TABLE = (
    _card("T4", 14913, 40, 1024, (7, 5)),
    _card("V100-16GB", 16151, 80, 2048, (7, 0)),
    _card("V100-32GB", 32494, 80, 2048, (7, 0)),
    _card("RTX 2080 Ti", 11012, 68, 1024, (7, 5)),
    _card("RTX 3060", 12045, 28, 1536, (8, 6)),
    _card("RTX 3070", 7974, 46, 1536, (8, 6)),
    _card("RTX 3080", 10008, 68, 1536, (8, 6)),
    _card("RTX 3090", 24257, 82, 1536, (8, 6)),
    _card("RTX 4060", 7940, 24, 1536, (8, 9)),
    _card("RTX 4070", 11994, 46, 1536, (8, 9)),
    _card("RTX 4080", 16076, 76, 1536, (8, 9)),
    _card("RTX 4090", 24210, 128, 1536, (8, 9)),
    _card("RTX 5070", 11942, 48, 1536, (12, 0)),
    _card("RTX 5080", 15995, 84, 1536, (12, 0)),
    _card("RTX 5090", 32109, 170, 1536, (12, 0)),
    _card("A10", 22723, 72, 1536, (8, 6)),
    _card("L4", 22563, 58, 1536, (8, 9)),
    _card("L40S", 45457, 142, 1536, (8, 9)),
    _card("A100-40GB", 40443, 108, 2048, (8, 0)),
    _card("A100-80GB", 81154, 108, 2048, (8, 0)),
    _card("H100", 81090, 132, 2048, (9, 0)),
    _card("H200", 143156, 132, 2048, (9, 0)),
    _card("B200", 183359, 148, 2048, (10, 0)),
)
CARDS = {card.name: card for card in _TABLE}
"""Common cards. ``total_bytes`` is about what the driver leaves for programs, a little less than the label says."""


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum()).removeprefix("nvidia")


def card_named(name: str) -> Card:
    """A card of the table, whatever spaces, dashes and capitals its name is written with.

    Raises:
        BudgetError: the table has none of that name.
    """
    found = [card for card in CARDS.values() if _key(card.name) == _key(name)]
    if not found:
        raise BudgetError(f"{arg('card', name)}: there is no such card in the table; take {', '.join(CARDS)}.")
    return found[0]


def card_here(device: str | int | None = None) -> Card | None:
    """The card of this machine as it is now; ``None`` where torch sees none.

    What is gone of it (``context_bytes``) is its context, which is made by asking, and what other processes hold;
    blocks of this process's own allocator are not.

    Args:
        device: as torch takes it; by default the current one.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    found = torch.cuda.get_device_properties(device)
    return Card(
        name=found.name,
        total_bytes=total_bytes,
        multiprocessors=found.multi_processor_count,
        threads=found.max_threads_per_multi_processor,
        capability=(found.major, found.minor),
        context_bytes=total_bytes - free_bytes - torch.cuda.memory_reserved(device),
    )


def card_of(name: str, device: str | int | None = None) -> Card:
    """The card that is meant by a name: ``auto`` is the one here, else one that is assumed."""
    if name != "auto":
        return card_named(name)
    return card_here(device) or replace(CARDS[ASSUMED], assumed=True)


ASSUMED = "RTX 4090"
"""The card that is planned for where there is none and nobody names one."""


def available_bytes(card: Card, budget: int | None) -> int:
    """What of a budget is left for the allocator, which is what tensors can have.

    A budget is of the card, so a context is part of it; what others hold isn't, but it can't be had, either.
    Of what is gone of a card at most `CONTEXT_BYTES` are taken for the context.
    """
    context = min(card.context_bytes, CONTEXT_BYTES)
    free = card.total_bytes - card.context_bytes
    return free if budget is None else max(0, min(budget - context, free))
