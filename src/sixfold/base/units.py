"""Units of measure: bytes, counts and durations as text for tables, errors and live lines; sizes of numbers.

Called wherever a number is shown to a person, or bytes are counted; never rounds what is computed with.
"""

from __future__ import annotations

import re


def item_bytes(dtype: str) -> int:
    """Bytes of one number of a type: every name of one tells the bits ("bf16", "complex64", "F8_E4M3") but
    that of truth values."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def bytes_text(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`; binary prefixes, because memory is allocated in them."""
    value = float(num_bytes)
    for prefix in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or prefix == "GiB":
            return f"{value:.0f} {prefix}" if prefix == "B" else f"{value:.1f} {prefix}"
        value /= 1024
    raise AssertionError("unreachable: the loop returns at GiB")


def count_text(count: float) -> str:
    """`5_900_000` -> `5.9 M`; decimal prefixes, for parameters, tokens and operations."""
    value = float(count)
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            return f"{value:.0f}" if prefix == "" else f"{value:.1f} {prefix}"
        value /= 1000
    raise AssertionError("unreachable: the loop returns at T")


def milliseconds_text(seconds: float) -> str:
    """`0.1484` -> `148 ms`; three digits where there are fewer before the point."""
    value = 1e3 * seconds
    return f"{value:.0f} ms" if abs(value) >= 100 else f"{value:.3g} ms"


def duration_text(seconds: float) -> str:
    """`95` -> `1m35s`; below ten seconds one decimal."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
