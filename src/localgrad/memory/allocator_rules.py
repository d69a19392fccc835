"""Which rules PyTorch's caching allocator for CUDA follows: by its release, and by its settings. No torch needed.

Sources: c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp of PyTorch, and the page "CUDA semantics:
Memory management" of its documentation, section "Optimizing memory usage with PYTORCH_CUDA_ALLOC_CONF".
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1 << 20
LARGE_SEGMENT = 20 * MIB
"""Of the large pool, for requests below 10 MiB; also a page of its expandable segments."""
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables with settings; the first that is set counts."""
EXPANDABLE = "expandable_segments:True"
"""The setting that the command line takes where a person has set none."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What differs between releases of PyTorch, and between settings of `PYTORCH_CUDA_ALLOC_CONF`.

    Attributes:
        by_address: of equally large free blocks the lowest is taken (before 2.13), not that of the oldest segment.
            Then where the driver puts segments counts, which no one knows: replay both ways, see `CachingAllocator`.
        expandable: `expandable_segments:True`.
        max_split_bytes: `max_split_size_mb`; larger free blocks are neither split nor given to smaller requests.
        max_round_bytes: `max_non_split_rounding_mb`; how much larger than a request such a block may be.
        roundup_divisions: `roundup_power2_divisions`; 0 rounds to 512 bytes only.
        not_modelled: settings that are set, change what is reserved, and that this model doesn't know.
    """

    by_address: bool = False
    expandable: bool = False
    max_split_bytes: int | None = None
    max_round_bytes: int = LARGE_SEGMENT
    roundup_divisions: int = 0
    not_modelled: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The rules in words, for people."""
        words = ["expandable segments" if self.expandable else "ordinary segments"]
        words.append("lowest address first (PyTorch before 2.13)" if self.by_address else "oldest segment first")
        if self.max_split_bytes is not None:
            words.append(f"blocks split up to {self.max_split_bytes // MIB} MiB")
        if self.roundup_divisions > 1:
            words.append(f"requests rounded up to {self.roundup_divisions} parts of a power of two")
        words += [f"{name} not modelled" for name in self.not_modelled]
        return ", ".join(words)


RULES = Rules()
"""Of the newest release that is known, without settings."""


def rules_of(torch_version: str, settings: str = "") -> Rules:
    """The rules of a release of PyTorch under some settings.

    The order of equal blocks changed with pull requests 178362 (March 2026), 182929 and 183591 (May 2026); release 2.13
    was cut in June. 2.12 was cut between them, and is taken for an old one.

    Args:
        torch_version: such as "2.14.1+cu130".
        settings: the value of `PYTORCH_ALLOC_CONF` or `PYTORCH_CUDA_ALLOC_CONF`.
    """
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in f"{torch_version}.0".split(".")[:2])
    depth, words = 0, [""]
    for letter in "".join(settings.split()):  # commas stand between settings, and within the lists of some
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            words.append("")
        else:
            words[-1] += letter
    known = dict(word.split(":", 1) for word in words if ":" in word)
    divisions = known.get("roundup_power2_divisions", "0")
    unknown = [name for name in ("garbage_collection_threshold", "large_segment_size_mb") if float(known.get(name, 0))]
    if known.get("backend", "native") != "native":
        unknown.append(f"backend:{known['backend']}")
    if not divisions.isdecimal():
        unknown.append(f"roundup_power2_divisions:{divisions}")
    return Rules(
        by_address=(major, minor) < (2, 13),
        expandable=known.get("expandable_segments", "False").casefold() == "true",
        max_split_bytes=int(known["max_split_size_mb"]) * MIB if "max_split_size_mb" in known else None,
        max_round_bytes=int(known.get("max_non_split_rounding_mb", LARGE_SEGMENT // MIB)) * MIB,
        roundup_divisions=int(divisions) if divisions.isdecimal() else 0,
        not_modelled=tuple(unknown),
    )


def rules_here(environment: Mapping[str, str] = os.environ) -> Rules:
    """The rules of the PyTorch that is installed, under the settings of this process."""
    from importlib.metadata import version  # which would hold up --help

    settings = next((environment[name] for name in VARIABLES if environment.get(name)), "")
    return rules_of(version("torch"), settings)


def fraction_of(cap_bytes: int, total_bytes: int) -> float:
    """What `torch.cuda.set_per_process_memory_fraction` must be given so that a process may have exactly so many bytes.

    PyTorch multiplies it with the card's bytes and cuts off what is behind the point; one byte less can be a segment
    less.
    """
    fraction = min(cap_bytes / total_bytes, 1.0)
    while int(fraction * total_bytes) < min(cap_bytes, total_bytes):
        fraction = math.nextafter(fraction, 2.0)
    return fraction
