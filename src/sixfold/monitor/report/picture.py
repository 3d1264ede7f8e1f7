"""The layout of a run as a picture: which rank is where, and what of the model's state each holds.

Called by `page`. It draws from the facts that the run wrote; it decides and computes no layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import prod
from typing import Any

MOST_RANKS = 64
"""Ranks that are drawn; of more, the first ones."""
_WIDTH, _HEIGHT, _GAP, _LEFT, _LEGEND = 108, 62, 8, 10, 140
_STATES = (("parameters", "#2563a8"), ("gradients", "#c2571a"), ("optimizer", "#2b8a4e"))


def layout(facts: Mapping[str, Any]) -> str:
    """An SVG: one box for each rank with its place on every axis, and in it a bar for each kind of state, as
    long as the part of it that the rank holds."""
    degrees: dict[str, int] = {axis: int(degree) for axis, degree in facts["degrees"].items()}
    world = prod(degrees.values())
    columns = _columns(degrees, min(world, MOST_RANKS))
    shown = min(world, MOST_RANKS)
    boxes = [
        _box(rank, _place(rank, degrees), facts["parts"], rank % columns, rank // columns)
        for rank in range(shown)
    ]
    rows = -(-shown // columns)
    width = _LEFT * 2 + columns * (_WIDTH + _GAP)
    height = rows * (_HEIGHT + _GAP) + 34
    legend = "".join(
        f'<rect x="{_LEFT + number * _LEGEND}" y="{height - 20}" width="10" height="10" fill="{colour}"/>'
        f'<text x="{_LEFT + 14 + number * _LEGEND}" y="{height - 11}">{name} {_part_text(facts, name)}</text>'
        for number, (name, colour) in enumerate(_STATES)
    )
    more = (
        f'<text x="{_LEFT}" y="{height - 26}">and {world - shown} ranks more</text>' if shown < world else ""
    )
    return (
        f'<svg viewBox="0 0 {max(width, 440)} {height}" width="{max(width, 440)}" role="img" '
        f'aria-label="layout of {world} ranks">{"".join(boxes)}{more}{legend}</svg>'
    )


def _columns(degrees: dict[str, int], shown: int) -> int:
    """Ranks side by side: those of the axes that talk most, as far as they fit into a page."""
    columns = 1
    for degree in list(degrees.values())[::-1]:
        if columns * degree > 8:
            break
        columns *= degree
    return min(max(columns, min(8, shown)) if columns == 1 else columns, shown)


def _place(rank: int, degrees: dict[str, int]) -> str:
    words = []
    for axis, degree in list(degrees.items())[::-1]:
        if degree > 1:
            words.append(f"{axis} {rank % degree}")
        rank //= degree
    return ", ".join(reversed(words))


def _box(rank: int, place: str, parts: Mapping[str, int], column: int, row: int) -> str:
    x, y = _LEFT + column * (_WIDTH + _GAP), 4 + row * (_HEIGHT + _GAP)
    bars = "".join(
        f'<rect x="{x + 6}" y="{y + 34 + 8 * number}" width="{(_WIDTH - 12) / parts[name]:.2f}" height="5" '
        f'fill="{colour}"/>'
        for number, (name, colour) in enumerate(_STATES)
    )
    return (
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4" class="rank"/>'
        f'<text x="{x + 6}" y="{y + 14}" class="name">rank {rank}</text>'
        f'<text x="{x + 6}" y="{y + 27}">{escape(place)}</text>{bars}'
    )


def _part_text(facts: Mapping[str, Any], name: str) -> str:
    parts = facts["parts"][name]
    return "whole" if parts == 1 else f"1/{parts}"
