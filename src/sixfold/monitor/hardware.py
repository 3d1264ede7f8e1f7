"""What this process can do and what it holds: peak operations, bf16, memory.

The start of a run asks whether bf16 pays and what full speed is; the training loop asks for memory
with each record. Nothing here leaves threads, settings or random streams other than they were.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

PEAK_SIZE = 1024
"""Side of the square matrices: large enough that the product, not its start, takes the time."""


_MOST_OPERATIONS = 2**30
"""In one product that types are compared by: some milliseconds."""
_LONG_S = 0.05
"""A product that takes so long is timed once: bf16 without instructions for it takes a second and more."""


def _seconds_per_product(
    dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device, budget_s: float
) -> list[float]:
    """Durations of products [rows, inner] @ [inner, columns], repeated until the budget is used; at least
    five, or one that takes long."""
    rows, inner, columns = shape
    # Ones, not random numbers: no random stream is touched, and the time does not depend on values.
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(inner, columns, dtype=dtype, device=device)
    out = a @ b
    durations: list[float] = []
    least, deadline = 5, time.perf_counter() + budget_s
    while len(durations) < least or time.perf_counter() < deadline:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        durations.append(time.perf_counter() - start)
        if durations[-1] > _LONG_S:
            least = 1
    return durations


def peak_flops(dtype: torch.dtype, seconds: float = 0.2, device: torch.device | str = "cpu") -> float:
    """Operations per second of the best of many square matrix products, with the current threads.

    Ranks that share cores must measure at the same time, or each sees the whole machine.
    """
    place = torch.device(device)
    size = PEAK_SIZE if place.type == "cpu" else 8 * PEAK_SIZE
    return 2 * size**3 / min(_seconds_per_product(dtype, (size, size, size), place, seconds))


def bf16_speedup(rows: int, inner: int, columns: int, threads: int | None = None) -> float:
    """How many times as fast as in fp32 this processor multiplies matrices [rows, inner] and [inner, columns]
    in bf16: the best of several products in each type, of fewer rows where they would be long.

    Args:
        threads: of the measurement; None: the current number.
    """
    rows = max(16, min(rows, _MOST_OPERATIONS // (2 * inner * columns)))
    current = torch.get_num_threads()
    torch.set_num_threads(threads or current)
    try:
        fp32, bf16 = (
            min(_seconds_per_product(dtype, (rows, inner, columns), torch.device("cpu"), 0.0))
            for dtype in (torch.float32, torch.bfloat16)
        )
    finally:
        torch.set_num_threads(current)
    return fp32 / bf16


def fast_bf16() -> bool:
    """Whether this processor has instructions that multiply bf16, which make it faster than fp32 on most.

    Read, not measured: every rank on one machine gives the same answer, however busy the machine is.
    Known of x86 processors; for others the answer is no, and who knows better sets precision.compute.
    """
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


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
