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
