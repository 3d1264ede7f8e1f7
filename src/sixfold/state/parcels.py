"""Tensors of any shape that each lie on one rank, brought to all of them in one message.

Called for the optimizer state of whole parameters before it is saved. The order of names is the same on every
rank; nothing here knows what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import torch

from sixfold.mesh import Mesh
from sixfold.plan import Spread

_ALIGN = 16

Named = dict[str, dict[str, torch.Tensor]]


def exchange(mesh: Mesh, spread: Spread, mine: Mapping[str, Mapping[str, torch.Tensor]]) -> Named:
    """Everyone's tensors by name and key. A collective over all ranks.

    Args:
        spread: over what they are cut; ranks with the same place in it hold the same.
        mine: this rank's.
    """
    listed = [
        (name, key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, state in mine.items()
        for key, tensor in state.items()
    ]
    texts = mesh.texts(json.dumps([mesh.place_in(spread), listed]))
    lists = dict(json.loads(text) for text in texts)
    size = max(sum(_num_bytes(row) for row in rows) for rows in lists.values())
    num_parts = mesh.geometry.num_parts(spread)
    whole = torch.zeros(size * num_parts, dtype=torch.uint8, device=mesh.device)
    flats = whole.view(num_parts, size)
    if size:
        for part, row in _parts(flats[mesh.place_in(spread)], listed):
            part.copy_(mine[row[0]][row[1]])
        mesh.spread_out(whole, spread, ()).wait()
    found: Named = {}
    for place, rows in sorted(lists.items()):
        for part, (name, key, _, _) in _parts(flats[place], rows):
            found.setdefault(name, {})[key] = part
    return found


_Row = tuple[str, str, str, list[int]]


def _parts(flat: torch.Tensor, rows: list[_Row]) -> list[tuple[torch.Tensor, _Row]]:
    """Views of `flat` [bytes] as the listed tensors, one behind the other."""
    parts, offset = [], 0
    for row in rows:
        dtype = getattr(torch, row[2])
        part = flat[offset : offset + prod(row[3]) * dtype.itemsize].view(dtype).view(row[3])
        parts.append((part, row))
        offset += _num_bytes(row)
    return parts


def _num_bytes(row: _Row) -> int:
    item_bytes: int = getattr(torch, row[2]).itemsize
    return -(-prod(row[3]) * item_bytes // _ALIGN) * _ALIGN
