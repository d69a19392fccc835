"""A CUDA card without a card: PyTorch's own allocator, streams and checks, on a machine that has no GPU.

A library is preloaded under the ordinary CUDA build of torch and stands in for the driver, the runtime and cuBLAS.
Device memory is host memory that is mapped where it is touched; kernels do nothing. So ``torch.cuda.is_available()``
is true, and everything above the kernels runs for real.

What is true under it, and what isn't::

    true      the caching allocator: allocated, reserved, fragmentation, out of memory under a cap; expandable segments
              dispatch: a tensor on the wrong device is an error; autocast, GradScaler, streams, events, pinned memory
              the number of launches, copies and synchronisations; which Python line waits for the card
              with values: numbers, by ATen's kernels for processors (dropout inside of fused attention left out)
    not true  any time; cuDNN (switched off) and cuBLAS's own memory; the rounding of CUDA's kernels; NCCL
              the context (0 bytes, unless ``taken_bytes`` says otherwise)
              that a real card would choose the same attention kernel

Values take the processor's time. A limit keeps them to small tensors: a model is split and proved with values, while
steps of many images, whose tensors are larger, run in seconds and are for the allocator only; what has no value is 0.

    python -m research.simulated_card --total-bytes 3GiB train --budget 3GiB

Figures from it are labelled "PyTorch's allocator, simulated card, no GPU".

Source of the idea: interposition of shared libraries (ld.so(8), ``LD_PRELOAD``); which calls torch makes:
c10/cuda/CUDACachingAllocator.cpp, c10/cuda/CUDAStream.cpp, aten/src/ATen/cuda of PyTorch.
"""

from research.simulated_card.building import Unavailable, build, default_cache
from research.simulated_card.running import Ran, command_line, environment, run

__all__ = ["Ran", "Unavailable", "build", "command_line", "default_cache", "environment", "run"]
