"""A process on a card: rows of requests through PyTorch's own allocator, for tests of the model of it.

Argument: a file of JSON, ``{"settings": [...], "rows": [{"events": [...], "caps": [...], "ends": [...]}]}``; a cap is a
process's fraction in bytes, an end is what the card has left. Standard output: JSON, for each setting and row what each
cap and end came to; then the events of two training steps, as the allocator saw them, and what these came to.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from localgrad.memory.allocator_rules import fraction_of

TOTAL = torch.cuda.get_device_properties(0).total_memory
CUDA = ctypes.CDLL(None)  # the runtime that this process has: its memory can be taken behind the allocator's back


def replayed(events: list[list[int]], cap: int | None = None, end: int | None = None) -> list[Any]:
    """Whether they fit, at most allocated and reserved, retries, and the index of the event that failed."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    torch.cuda.set_per_process_memory_fraction(1.0 if cap is None else fraction_of(cap, TOTAL))
    ballast = ctypes.c_void_p()
    if end is not None:
        assert CUDA.cudaMalloc(ctypes.byref(ballast), ctypes.c_size_t(torch.cuda.mem_get_info()[0] - end)) == 0
    held: dict[int, int] = {}
    failed_at = None
    for index, (number, nbytes, *stream) in enumerate(events):
        try:
            if nbytes < 0:
                torch._C._cuda_cudaCachingAllocator_raw_delete(held.pop(number))
            else:
                held[number] = torch._C._cuda_cudaCachingAllocator_raw_alloc(nbytes, *(stream or [0]))
        except torch.OutOfMemoryError:
            failed_at = index
            break
    stats = torch.cuda.memory_stats()
    for address in held.values():
        torch._C._cuda_cudaCachingAllocator_raw_delete(address)
    torch.cuda.empty_cache()
    if end is not None:
        assert CUDA.cudaFree(ballast) == 0
    return [
        failed_at is None,
        stats["allocated_bytes.all.peak"],
        stats["reserved_bytes.all.peak"],
        stats["num_alloc_retries"],
        failed_at,
    ]


def recorded() -> list[list[int]]:
    """The events of two steps of a small net."""
    torch.cuda.memory._record_memory_history(enabled="all", context=None)
    sizes = [(300, 2000), (2000, 2500), (2500, 900), (900, 10)]
    net = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(*size), torch.nn.GELU()) for size in sizes)).cuda()
    states: dict[torch.Tensor, torch.Tensor] = {}
    for rows in (700, 500):
        net(torch.zeros(rows, 300, device="cuda")).sum().backward()
        for weight in net.parameters():  # by hand: an optimizer of torch's imports its compiler, for seconds
            assert weight.grad is not None
            square = states.setdefault(weight, torch.zeros_like(weight))
            square.mul_(0.9).addcmul_(weight.grad, weight.grad)
            weight.data.addcdiv_(weight.grad, square.sqrt().add_(1e-8), value=-1e-3)
            weight.grad = None
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    torch._C._cuda_clearCublasWorkspaces()
    events: list[list[int]] = []
    live: dict[int, int] = {}
    for entry in trace:
        if entry["action"] == "alloc":
            live[entry["addr"]] = len(events)
            events.append([len(events), entry["size"]])
        elif entry["action"] == "free_completed":
            events.append([live.pop(entry["addr"]), -1])
    return events


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    answer: dict[str, Any] = {}
    for settings in task["settings"]:
        torch.cuda.memory._set_allocator_settings(settings)
        answer[settings] = [
            [replayed(row["events"], cap) for cap in row["caps"]]
            + [replayed(row["events"], end=end) for end in row["ends"]]
            for row in task["rows"]
        ]
    events = recorded()
    _, allocated, reserved, *_ = replayed(events)
    caps = range(allocated, reserved + (4 << 20), max((reserved - allocated) // 12, 1))
    answer["recorded"] = {"events": events, "caps": [[cap, replayed(events, cap)] for cap in caps]}
    answer["version"], answer["total"] = torch.__version__, TOTAL
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
