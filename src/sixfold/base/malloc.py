"""What a rank finds in its environment, so that glibc takes the memory again that a step has freed.

Read by whoever starts ranks: the launcher, the pool of tests, the benchmarks. `mesh/pages.py` sets, in a rank
that runs, what can be set there. It starts nothing and loads nothing.

Torch asks for blocks at multiples of 64 bytes. glibc takes some more and gives the rest back, 48 to 96 bytes,
which its thread cache (tcache) keeps as a small block for later: it stands between two large blocks, never
grows together with them, and what is freed before it is by so much too small for the next block of its size.
A process then grows by whole activations that it does not hold. Without a cache for blocks of more than 24
bytes the rest grows together with its neighbours. Only a process that starts can be told.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

TUNABLES = "GLIBC_TUNABLES"
_TCACHE = "glibc.malloc.tcache"
_SETTING = f"{_TCACHE}_max=24"


def malloc_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variable to add to `environ`; none where it sets the thread cache already, or without glibc.

    Other tunables in it are kept. Source: "Memory Allocation Tunables" in the manual of the GNU C library.
    """
    given = environ.get(TUNABLES, "")
    if not sys.platform.startswith("linux") or _TCACHE in given:
        return {}
    return {TUNABLES: ":".join(filter(None, (given, _SETTING)))}
