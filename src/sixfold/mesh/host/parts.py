"""Several tensors in one offer: a part for each member, or a list of what all read.

Used by `HostGroup`. A table says where each part begins and how long it is, because members may send
unequally much; so a reader that expects another size is told instead of reading something else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sixfold.mesh.host.lane import Offer
from sixfold.mesh.host.scratch import SharedScratch

_ALIGNMENT = 64
"""Bytes; parts of any type begin at multiples of it."""


def packed(parts: Sequence[torch.Tensor], scratch: SharedScratch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A buffer of bytes with the table of contiguous parts by place and copies of those that others could
    not read; and the parts that they read where they lie."""
    offsets = [scratch.memory.offset_of(part) if part.numel() else None for part in parts]
    starts, end = [], _aligned(16 * len(parts))
    for part, offset in zip(parts, offsets, strict=True):
        starts.append(end)
        end = end if offset is not None else _aligned(end + part.nbytes)
    buffer, table, lent = scratch.take(end, torch.uint8), list[int](), list[torch.Tensor]()
    own = scratch.memory.offset_of(buffer) or 0
    for part, offset, start in zip(parts, offsets, starts, strict=True):
        if offset is not None:
            table += [offset - own, part.nbytes]
            lent.append(part)
        else:
            table += [start, part.nbytes]
            buffer[start : start + part.nbytes].view(part.dtype).copy_(part.view(-1))
    buffer[: 8 * len(table)].view(torch.int64).copy_(torch.tensor(table))
    return buffer, lent


def part_of(offer: Offer, place: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The part [numel] for the member at `place` of what `packed` has made."""
    entry = Offer(offer.member, offer.offset + 16 * place, 16)
    start, num_bytes = entry.tensor(2, torch.int64).tolist()
    return Offer(offer.member, offer.offset + start, num_bytes).tensor(numel, dtype)


def listed(parts: Sequence[torch.Tensor], scratch: SharedScratch) -> torch.Tensor:
    """A table of parts that lie in shared memory, for good."""
    table = [number for part in parts for number in (scratch.memory.offset_of(part) or 0, part.nbytes)]
    return scratch.take(len(table), torch.int64).copy_(torch.tensor(table))


def parts_at(offer: Offer, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What `listed` has listed, of the sizes and types of `like`."""
    table = offer.tensor(2 * len(like), torch.int64).tolist()
    offers = [Offer(offer.member, *place) for place in zip(table[::2], table[1::2], strict=True)]
    return [each.tensor(part.numel(), part.dtype) for each, part in zip(offers, like, strict=True)]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
