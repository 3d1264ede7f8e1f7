"""Rows of the residency table, for tests that must hold in every one of them.

On one rank nothing is cut: there it is two rows, the first, which keeps all whole and reduces once, and
preset 3, which gathers and drops what it uses and reduces every micro-batch.
"""

from __future__ import annotations

from typing import Any

RESIDENCIES: dict[str, dict[str, Any]] = {
    "0": {"zero": 0},
    "1": {"zero": 1},
    "2": {"zero": 2},
    "3": {"zero": 3},
    "hybrid": {"zero": 3, "shard": 2},
    "secondary": {"zero": 3, "shard": 2, "gradients": "all", "optimizer": "all"},
}
"""What `layout` says of each."""
TRANSPORTS = ("host", "network")


def on(*sizes: int) -> list[tuple[str, int]]:
    """(residency, ranks): whole and cut over all ranks on `sizes` ranks, in groups of two on four."""
    return [
        (name, ranks)
        for name, layout in RESIDENCIES.items()
        for ranks in ((4,) if "shard" in layout else sizes)
        if ranks > 1 or name in ("0", "3")
    ]


def presets(*sizes: int) -> list[tuple[int, int]]:
    """(preset, ranks) of those that are no groups."""
    return [(int(name), ranks) for name, ranks in on(*sizes) if name.isdigit()]


def carried(*sizes: int) -> list[tuple[str, int, str]]:
    """(residency, ranks, transport): what is `on`, with the transports in turns, so that each residency and
    each number of ranks has both. One rank exchanges nothing by either."""
    found = [(name, ranks, "network") for name, ranks in on(*sizes) if ranks == 1]
    for row, name in enumerate(RESIDENCIES):
        several = [ranks for each, ranks in on(*sizes) if each == name and ranks > 1]
        turns = several if len(several) > 1 else 2 * several
        found += [(name, ranks, TRANSPORTS[(row + turn) % 2]) for turn, ranks in enumerate(turns)]
    return found


def layout_of(residency: str, ranks: int, transport: str) -> dict[str, Any]:
    """What `layout` says of one of these."""
    return RESIDENCIES[residency] | ({"transport": transport} if ranks > 1 else {})
