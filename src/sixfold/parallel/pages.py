"""Keep freed memory in the process: a page that was given back to the system costs more to get again than the
copy into it.

Called by the engine once, for ranks that compute on CPUs. Each step frees and takes the same activations,
gathered parameters and gradients; by glibc's defaults every large one is mapped anew. It changes malloc's
settings for the whole process and allocates nothing.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


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
