"""Tensors of any shape that each lie on one rank of a group, brought to all of them in one message.

Called for the optimizer state of whole parameters before it is saved. The order of names is the same on every
rank; nothing here knows what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import torch

from sixfold.mesh import Mesh

_ALIGN = 16

Named = dict[str, dict[str, torch.Tensor]]


def exchange(mesh: Mesh, mine: Mapping[str, Mapping[str, torch.Tensor]]) -> Named:
    """Everyone's tensors by name and key, on every rank of the shard group. A collective over all ranks.

    Args:
        mine: this rank's; no two ranks of a group have the same name.
    """
    listed = [
        (name, key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, state in mine.items()
        for key, tensor in state.items()
    ]
    texts = mesh.texts(json.dumps([mesh.shard.place, listed]))
    # Copies of a group list the same under the same places.
    lists = dict(json.loads(text) for text in texts)
    size = max(sum(_num_bytes(row) for row in rows) for rows in lists.values())
    whole = torch.zeros(size * len(mesh.shard), dtype=torch.uint8, device=mesh.device)
    if size:
        for part, row in _parts(mesh.shard.slice_of(whole, mesh.shard.place), lists[mesh.shard.place]):
            part.copy_(mine[row[0]][row[1]])
        mesh.shard.all_gather(whole).wait()
    found: Named = {}
    for place, rows in sorted(lists.items()):
        for part, (name, key, _, _) in _parts(mesh.shard.slice_of(whole, place), rows):
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
