"""Rows of the residency table, for tests that must hold in every one of them."""

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


def on(*sizes: int) -> list[tuple[str, int]]:
    """(residency, ranks): whole and cut over all ranks on `sizes` ranks, in groups of two on four."""
    return [
        (name, ranks)
        for name, layout in RESIDENCIES.items()
        for ranks in ((4,) if "shard" in layout else sizes)
    ]


def carried(*sizes: int) -> list[tuple[str, int, str]]:
    """`on`, with each transport: (residency, ranks, transport). One rank exchanges nothing by either."""
    return [
        (name, ranks, transport)
        for name, ranks in on(*sizes)
        for transport in ("host", "network")
        if ranks > 1 or transport == "network"
    ]


def layout_of(residency: str, ranks: int, transport: str) -> dict[str, Any]:
    """What `layout` says of one of these."""
    return RESIDENCIES[residency] | ({"transport": transport} if ranks > 1 else {})
