"""Keep freed memory in the process: a page that was given back to the system costs more to get again than the
copy into it.

Called by the engine once, for ranks that compute on CPUs. Each step frees and takes the same activations,
gathered parameters and gradients; by glibc's defaults every large one is mapped anew. It changes malloc's
settings for the whole process; one more can be set only by who starts it (`base/malloc.py`). What lives as
long as the engine is mapped apart, by `untouched_zeros`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_MAPPED_BYTES = 2**20


def keep_pages() -> bool:
    """Let malloc neither map large blocks apart nor give the end of the heap back; whether that was possible.

    What a process has held at once it keeps, which the plan counts as its peak anyway.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def untouched_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [numel]; on the CPU, where they are many, the system gives their memory as it is touched.

    `torch.zeros` writes them, so that buffers nobody has used yet would be there in full. The storage of
    such a tensor cannot be resized.
    """
    num_bytes = numel * dtype.itemsize
    if device.type != "cpu" or num_bytes < _MAPPED_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype)
