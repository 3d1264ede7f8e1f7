"""The load of experts as a picture: layers down, experts across, in colours.

Called by `page`. It draws what the run wrote down, and computes no load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_CELL, _ROW, _LEFT, _RIGHT = 26, 18, 250, 90
_WIDEST = 720
"""Of all cells of a row; of many experts they are narrower."""
_MORE, _LESS = (194, 87, 26), (37, 99, 168)


def loads(by_router: Mapping[str, Sequence[float]]) -> str:
    """An SVG: a row for each router, with the share of its busiest and its idlest expert behind it.

    Args:
        by_router: parts of all choices that fell on each expert.
    """
    most = max(len(load) for load in by_router.values())
    cell = min(_CELL, _WIDEST / most)
    width, height = _LEFT + most * cell + _RIGHT, (len(by_router) + 1) * _ROW
    rows = "".join(_row(name, load, number, cell) for number, (name, load) in enumerate(by_router.items()))
    return (
        f'<svg viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img" '
        f'aria-label="load of experts in {len(by_router)} layers">{rows}</svg>'
    )


def _row(name: str, load: Sequence[float], number: int, cell: float) -> str:
    y = number * _ROW
    shares = [part * len(load) for part in load]
    cells = "".join(
        f'<rect x="{_LEFT + expert * cell:.1f}" y="{y}" width="{cell:.1f}" height="{_ROW - 2}" '
        f'fill="{_colour(share)}"><title>expert {expert}: {share:.2f}</title></rect>'
        for expert, share in enumerate(shares)
    )
    end = _LEFT + len(load) * cell + 6
    return (
        f'<text x="0" y="{y + 12}">{escape(name)}</text>{cells}'
        f'<text x="{end:.1f}" y="{y + 12}">{min(shares):.2f} to {max(shares):.2f}</text>'
    )


def _colour(share: float) -> str:
    """White for an equal share; full colour for nothing, for twice as much or more, and for no number."""
    ends, strength = (_MORE if share > 1 else _LESS), min(1.0, abs(share - 1))  # in this order for a nan
    return "#" + "".join(f"{round(255 + (end - 255) * strength):02x}" for end in ends)
