"""What this process can do and what it holds, found by measuring: peak operations, bf16, memory.

The command line asks once at the start whether bf16 pays and what full speed is; the training loop
asks for memory with each record. Nothing here changes threads, settings or random streams.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import torch

PEAK_SIZE = 1024
"""Side of the square matrices: large enough that the product, not its start, takes the time."""
PROBE_SIZE = 256
FAST_RATIO = 1.5
"""bf16 counts as fast when it beats fp32 by this factor; casting and rounding cost something too."""


def _seconds_per_product(dtype: torch.dtype, size: int, device: torch.device, budget_s: float) -> list[float]:
    """Durations of `size` x `size` products, repeated until the budget is used; at least five."""
    # Ones, not random numbers: no random stream is touched, and the time does not depend on values.
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = a @ a
    durations: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(durations) < 5 or time.perf_counter() < deadline:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        durations.append(time.perf_counter() - start)
    return durations


def peak_flops(dtype: torch.dtype, seconds: float = 0.2, device: torch.device | str = "cpu") -> float:
    """Operations per second of the best of many square matrix products, with the current threads.

    Ranks that share cores must measure at the same time, or each sees the whole machine.
    """
    place = torch.device(device)
    size = PEAK_SIZE if place.type == "cpu" else 8 * PEAK_SIZE
    return 2 * size**3 / min(_seconds_per_product(dtype, size, place, seconds))


def fast_bf16() -> bool:
    """Whether this processor multiplies bf16 faster than fp32; takes a few hundredths of a second.

    Measured, since torch offers no public flag that says so and a flag would not say how much.
    """
    cpu = torch.device("cpu")
    # Taken in turns, so that whatever else the machine does falls on both.
    ratios = []
    for _ in range(5):
        wide = median(_seconds_per_product(torch.float32, PROBE_SIZE, cpu, 0.0))
        narrow = median(_seconds_per_product(torch.bfloat16, PROBE_SIZE, cpu, 0.0))
        ratios.append(wide / narrow)
    return median(ratios) >= FAST_RATIO


def memory_bytes() -> int:
    """Memory of this process, pages that it shares divided among those who share them.

    Where the system does not report that (outside Linux), the resident memory.
    """
    return _rollup_bytes(Path("/proc/self/smaps_rollup")) or resident_bytes()


def resident_bytes() -> int:
    """Memory of this process that is in RAM, shared pages included whole; outside Linux, its peak."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return _peak_resident_bytes()
    # There is no such module on Windows, which ends above at the missing file.
    import resource

    return int(fields[1]) * resource.getpagesize()


def _rollup_bytes(path: Path) -> int | None:
    """The `Pss:` line of a smaps_rollup file in bytes; None where there is no such file or line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def _peak_resident_bytes() -> int:
    # This module of the standard library exists on Unix only.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
