"""PyTorch's caching allocator for CUDA as a model: which bytes of a card a run of requests reserves. No torch, no GPU.

Tensors don't come from the card's driver. PyTorch takes *segments* from it, hands out pieces of them (*blocks*), and
keeps what is given back for the next request. So a run reserves more than it ever holds, and whether it fits under a
cap depends on the order of its requests: fitting isn't even monotone in the cap, as a larger cap leaves other holes.
There is no formula, but the rules are exact, and sizes and order are all that they look at. So requests are *replayed*.

The rules, from PyTorch's c10/cuda/CUDACachingAllocator.cpp (names in brackets are its functions) and, for settings,
c10/core/AllocatorConfig.h and the page "CUDA semantics: Memory management" of its documentation:

* A request is rounded up to 512 bytes (`round_size`). Up to 1 MiB it is served by the small pool of its stream, whose
  segments have 2 MiB; else by the large pool, whose segments have 20 MiB for requests below 10 MiB, and otherwise the
  request's own size, rounded up to 2 MiB (`get_pool`, `get_allocation_size`).
* The smallest free block that is large enough is taken (`get_free_block`). Of equal ones it is that of the oldest
  segment since 2.13, the lowest address before: see `Rules`. Its rest is split off where it has 512 bytes (small pool)
  or more than 1 MiB (large pool) (`should_split`). What is given back joins its free neighbours (`try_merge_blocks`).
* A new segment that would pass the cap of `set_per_process_memory_fraction`, or that the driver refuses, has all wholly
  free segments given back and is tried once more; that is a *retry*, and makes the card wait (`release_cached_blocks`).
* With *expandable segments* a pool's segment is a range of addresses, a little more than the card has bytes. It is
  mapped where blocks need it, in pages of 2 MiB (small pool) or 20 MiB (large), at the lowest address with room, and
  unmapped page by page (Note [Expandable Segments], `find_expandable_block`, `map_block`, `unmap_block`). The fraction
  is compared with the request as if it were a segment of its own, before it is known how much is to be mapped: it
  refuses some requests that would need less, and mapping may pass it by up to a page.

Not modelled: pools of CUDA graphs, blocks that another stream still uses (`record_stream`), `cudaMallocAsync`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from localgrad.memory.allocator_rules import LARGE_SEGMENT, MIB, RULES, Rules

SMALLEST_BLOCK = 512
SMALL_REQUEST = MIB
"""The largest request that the small pool serves, and what a split of a large block must leave more than."""
SMALL_SEGMENT = 2 * MIB
OWN_SEGMENT = 10 * MIB
"""From this size on a request gets a segment of its own size."""
SEGMENT_STEP = 2 * MIB

Event = tuple[int, int] | tuple[int, int, int]
"""(number, bytes[, stream]): a request; (number, -1): what that request got is given back."""


class DoesNotFitError(MemoryError):
    """A request for which neither the cap nor the card has room, after all that was free was given back."""


@final
class _Block:
    """A range of a segment's addresses: taken, free, or free and without memory. A segment is a chain of blocks."""

    __slots__ = ("address", "after", "before", "is_mapped", "is_taken", "nbytes", "pool", "segment")

    def __init__(self, pool: _Pool, segment: int, address: int, nbytes: int, *, is_mapped: bool) -> None:
        self.pool, self.segment, self.address, self.nbytes = pool, segment, address, nbytes
        self.is_mapped, self.is_taken = is_mapped, False
        self.before: _Block | None = None
        self.after: _Block | None = None

    def split(self, nbytes: int) -> _Block:
        """Keep the first bytes. Returns the rest, a block of the same kind, which no list knows yet."""
        rest = _Block(self.pool, self.segment, self.address + nbytes, self.nbytes - nbytes, is_mapped=self.is_mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.nbytes = rest, nbytes
        return rest

    def absorb(self, rest: _Block) -> None:
        """Grow by the next block of the chain."""
        self.nbytes += rest.nbytes
        self.after = rest.after
        if rest.after is not None:
            rest.after.before = self


@final
class _Pool:
    """The free blocks of one stream's small or large requests."""

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
        self.page_bytes = SMALL_SEGMENT if is_small else LARGE_SEGMENT
        self.free: list[tuple[int, int, int, _Block]] = []  # (bytes, segment, address): the order of choice
        self.unmapped: list[tuple[int, _Block]] = []  # by address

    def add(self, block: _Block) -> None:
        if block.is_mapped:
            insort(self.free, (block.nbytes, block.segment, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: _Block) -> None:
        if block.is_mapped:
            del self.free[bisect_left(self.free, (block.nbytes, block.segment, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    def add_merged(self, block: _Block) -> _Block:
        """Add a block, joined with neighbours that are free as it is. Returns what it is part of now."""
        before, after = block.before, block.after
        if after is not None and not after.is_taken and after.is_mapped == block.is_mapped:
            self.remove(after)
            block.absorb(after)
        if before is not None and not before.is_taken and before.is_mapped == block.is_mapped:
            self.remove(before)
            before.absorb(block)
            block = before
        self.add(block)
        return block


@final
class CachingAllocator:
    """The allocator of one process on one card.

    Args:
        cap_bytes: what `torch.cuda.set_per_process_memory_fraction` leaves the process; None: no limit.
        free_bytes: what the driver has to give (a card's bytes less what others hold); None: no limit.
        total_bytes: the card's size, from which expandable segments get their addresses.
        is_descending: each segment lies below the last, not above it. Matters for `Rules.by_address`, and for a second
            expandable segment of a pool.
        rules: of the release and its settings.

    Attributes:
        allocated_bytes, reserved_bytes: now, as `torch.cuda.memory_allocated` and `memory_reserved` count them.
        max_allocated_bytes, max_reserved_bytes: at most.
        num_retries: how often free segments were given back to serve a request.
    """

    def __init__(
        self,
        cap_bytes: int | None = None,
        *,
        free_bytes: int | None = None,
        total_bytes: int = 1 << 40,
        is_descending: bool = False,
        rules: Rules = RULES,
    ) -> None:
        self.rules = rules
        self.cap_bytes, self.free_bytes, self.total_bytes = cap_bytes, free_bytes, total_bytes
        self.allocated_bytes = self.reserved_bytes = self.max_allocated_bytes = self.max_reserved_bytes = 0
        self.num_retries = self.num_segments = 0
        self._sign, self._edge = (-1 if is_descending else 1), 0
        self._pools: dict[tuple[int, bool], _Pool] = {}

    def take(self, nbytes: int, stream: int = 0) -> _Block:
        """Serve a request. Returns what `give_back` takes.

        Raises:
            DoesNotFitError: there is no room for it.
        """
        nbytes = self._rounded(nbytes)
        is_small = nbytes <= SMALL_REQUEST
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = _Pool(is_small=is_small)
        block = self._found(pool, nbytes) or self._new(pool, nbytes)
        if block is None and self._release_unsplittable(pool, nbytes):
            block = self._new(pool, nbytes)
        if block is None:
            self.release_free()
            self.num_retries += 1
            block = self._new(pool, nbytes)
        if block is None:
            raise DoesNotFitError(nbytes)
        if self._is_split(pool, nbytes, block.nbytes - nbytes):
            pool.add(block.split(nbytes))
        block.is_taken = True
        self.allocated_bytes += block.nbytes
        self.max_allocated_bytes = max(self.max_allocated_bytes, self.allocated_bytes)
        return block

    def give_back(self, block: _Block) -> None:
        """Keep a block for later requests."""
        self.allocated_bytes -= block.nbytes
        block.is_taken = False
        block.pool.add_merged(block)

    def release_free(self) -> None:
        """Give the driver what no request holds a part of, as `torch.cuda.empty_cache` does."""
        for pool in sorted(self._pools.values(), key=lambda pool: pool.is_small):
            for *_, block in tuple(pool.free):
                if self.rules.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    self._release(block)

    def _rounded(self, nbytes: int) -> int:
        divisions = self.rules.roundup_divisions
        if divisions <= 1 or nbytes <= SMALLEST_BLOCK * divisions:
            return max(_up(nbytes, SMALLEST_BLOCK), SMALLEST_BLOCK)
        power = 1 << (nbytes.bit_length() - 1)
        return _up(nbytes, power >> (divisions.bit_length() - 1))

    def _is_split(self, pool: _Pool, nbytes: int, rest_bytes: int) -> bool:
        if pool.is_small or self.rules.expandable:
            return rest_bytes >= SMALLEST_BLOCK
        limit = self.rules.max_split_bytes
        return rest_bytes > SMALL_REQUEST and (limit is None or nbytes < limit)

    def _found(self, pool: _Pool, nbytes: int) -> _Block | None:
        """The free block that fits best, no longer in the pool's list."""
        free = pool.free
        at = bisect_left(free, (nbytes,))
        if at == len(free):
            return None
        if self.rules.expandable:  # a block at the end of what is mapped counts with the addresses behind it
            while at + 1 < len(free) and _reach(free[at + 1][3]) < _reach(free[at][3]):
                at += 1
        limit = self.rules.max_split_bytes
        if limit is not None:
            found_bytes = free[at][0]
            most = limit if nbytes < limit else nbytes + self.rules.max_round_bytes
            if found_bytes >= most:
                return None
        return free.pop(at)[3]

    def _new(self, pool: _Pool, nbytes: int) -> _Block | None:
        """A block of new memory, in no list; None where there is no room for it."""
        if pool.is_small:
            segment_bytes = SMALL_SEGMENT
        else:
            segment_bytes = LARGE_SEGMENT if nbytes < OWN_SEGMENT else _up(nbytes, SEGMENT_STEP)
        if self.cap_bytes is not None and self.reserved_bytes + segment_bytes > self.cap_bytes:
            return None
        if self.rules.expandable:
            return self._expanded(pool, nbytes)
        return self._segment(pool, segment_bytes, is_mapped=True) if self._reserve(segment_bytes) else None

    def _reserve(self, nbytes: int) -> bool:
        """Get bytes from the driver, if it has them."""
        if self.free_bytes is not None and self.reserved_bytes + nbytes > self.free_bytes:
            return False
        self.reserved_bytes += nbytes
        self.max_reserved_bytes = max(self.max_reserved_bytes, self.reserved_bytes)
        return True

    def _segment(self, pool: _Pool, nbytes: int, *, is_mapped: bool) -> _Block:
        """A new segment: one block. Where equal blocks go by address alone, all have one number."""
        room = _up(nbytes, LARGE_SEGMENT)  # so that it begins where a page does
        address = self._edge if self._sign > 0 else self._edge - room
        self._edge += self._sign * room
        self.num_segments += 1
        number = 0 if self.rules.by_address else self.num_segments
        return _Block(pool, number, address, nbytes, is_mapped=is_mapped)

    def _release(self, block: _Block) -> None:
        block.pool.remove(block)
        self.reserved_bytes -= block.nbytes

    def _release_unsplittable(self, pool: _Pool, nbytes: int) -> bool:
        """Under `max_split_size_mb`: give back a block that is large enough, or the largest ones that are together."""
        limit, free = self.rules.max_split_bytes, pool.free
        if limit is None or self.rules.expandable:
            return False
        wanted = max(nbytes, limit)
        at = bisect_left(free, (wanted,))
        if at < len(free):
            self._release(free[at][3])
            return True
        released = 0
        while free and released < wanted and free[-1][0] >= limit:
            released += free[-1][0]
            self._release(free[-1][3])
        return released >= wanted

    # Expandable segments. Blocks without memory always begin and end where a page does.

    def _expanded(self, pool: _Pool, nbytes: int) -> _Block | None:
        """Map what a request lacks, from the lowest address on that has room for it."""
        block = self._with_room(pool, nbytes)
        if not block.is_mapped:
            mapped = self._map(block, min(block.nbytes, nbytes))
            if mapped is None:
                return None
            block = mapped
        while block.nbytes < nbytes:
            assert block.after is not None  # it has room
            mapped = self._map(block.after, min(block.after.nbytes, nbytes - block.nbytes))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _with_room(self, pool: _Pool, nbytes: int) -> _Block:
        """The first of a row of free blocks, with and without memory, that together have room."""
        for _, unmapped in pool.unmapped:
            before = unmapped.before
            first = before if before is not None and not before.is_taken else unmapped
            room, block = 0, first
            while room < nbytes and not block.is_taken:
                room += block.nbytes
                if block.after is None:
                    break
                block = block.after
            if room >= nbytes:
                return first
        segment = self._segment(pool, _up(self.total_bytes + self.total_bytes // 8, pool.page_bytes), is_mapped=False)
        pool.add(segment)
        return segment

    def _map(self, block: _Block, nbytes: int) -> _Block | None:
        """Get memory for a block's first bytes. Returns the free block that they are part of now."""
        pool = block.pool
        nbytes = _up(nbytes, pool.page_bytes)
        if not self._reserve(nbytes):
            return None
        pool.remove(block)
        if nbytes < block.nbytes:
            pool.add(block.split(nbytes))
        block.is_mapped = True
        return pool.add_merged(block)

    def _unmap(self, block: _Block) -> None:
        """Give back the whole pages of a free block. What is left at either end stays a free block."""
        pool, page_bytes, address = block.pool, block.pool.page_bytes, block.address
        begin, end = _up(address, page_bytes), (address + block.nbytes) // page_bytes * page_bytes
        if begin >= end:
            return
        pool.remove(block)
        if end < address + block.nbytes:
            pool.add(block.split(end - address))
        if begin > address:
            first, block = block, block.split(begin - address)
            pool.add(first)
        block.is_mapped = False
        self.reserved_bytes -= block.nbytes
        block = pool.add_merged(block)
        if block.before is None and block.after is None:
            pool.remove(block)  # nothing of the segment is left


def _up(nbytes: int, step: int) -> int:
    """The smallest multiple of a step that isn't smaller."""
    return -(-nbytes // step) * step


def _reach(block: _Block) -> int:
    after = block.after
    return block.nbytes if after is None or after.is_mapped else block.nbytes + after.nbytes


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a row of requests came to.

    Attributes:
        fits: whether all were served.
        allocated_bytes: held at once, at most.
        reserved_bytes: of the card, at most.
        num_retries: how often free segments were given back.
        failed_at: the index of the event for which there was no room.
    """

    fits: bool
    allocated_bytes: int
    reserved_bytes: int
    num_retries: int
    failed_at: int | None = None


def replay(events: Iterable[Event], allocator: CachingAllocator) -> Replay:
    """Run requests through an allocator, in order, until one doesn't fit.

    Args:
        events: requests and returns.
        allocator: goes on from where it is.
    """
    held: dict[int, _Block] = {}
    take, give_back = allocator.take, allocator.give_back
    failed_at = None
    for index, (number, nbytes, *stream) in enumerate(events):
        if nbytes > 0:
            try:
                held[number] = take(nbytes, *stream)
            except DoesNotFitError:
                failed_at = index
                break
        elif nbytes < 0 and number in held:
            give_back(held.pop(number))
    return Replay(
        fits=failed_at is None,
        allocated_bytes=allocator.max_allocated_bytes,
        reserved_bytes=allocator.max_reserved_bytes,
        num_retries=allocator.num_retries,
        failed_at=failed_at,
    )
