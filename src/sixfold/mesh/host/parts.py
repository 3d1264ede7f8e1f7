"""Several tensors in one offer: copies, of which each member reads its own, or a list of where they lie.

Used by `HostGroup`. A table says where each part begins and how long it is, because members may send
unequally much; so a reader that expects another size is told instead of reading something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sixfold.mesh.host.lane import Offer
from sixfold.mesh.host.scratch import SharedScratch

_ALIGNMENT = 64
"""Bytes; parts of any type begin at multiples of it."""


def packed(parts: Sequence[torch.Tensor], take: Callable[[int, torch.dtype], torch.Tensor]) -> torch.Tensor:
    """Parts by place, contiguous, and their table in one buffer of bytes.

    Args:
        take: gives the buffer; see `Scratch.take`.
    """
    table, end = [], _aligned(16 * len(parts))
    for part in parts:
        table += [end, part.nbytes]
        end = _aligned(end + part.nbytes)
    buffer = take(end, torch.uint8)
    buffer[: 8 * len(table)].view(torch.int64).copy_(torch.tensor(table))
    for start, part in zip(table[::2], parts, strict=True):
        buffer[start : start + part.nbytes].view(part.dtype).copy_(part.view(-1))
    return buffer


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
