"""Rows for heads: ranks that have all heads of some rows each exchange so that they have some heads of all.

Called by `attention.py` around the ring. One all-to-all in forward and one in backward, for any number of
tensors at once. It computes nothing.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long
Sequence Transformer Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sixfold.mesh import Group
from sixfold.parallel.context.parcels import packed, unpacked
from sixfold.parallel.context.spans import chunk


@dataclass(frozen=True)
class Swap:
    """Neighbouring ranks that exchange rows for heads.

    Args:
        group: all ranks of the axis.
        num: ranks that exchange; it divides theirs.
        length: of the whole sequence.
    """

    group: Group
    num: int
    length: int

    @property
    def members(self) -> range:
        """Their places in the group."""
        first = self.group.place // self.num * self.num
        return range(first, first + self.num)

    def halves(self, place: int) -> tuple[int, int]:
        """Rows of the first and of the second chunk at a place."""
        ranks = self.group.num_ranks
        spans = (chunk(self.length, ranks, number) for number in (place, 2 * ranks - 1 - place))
        first, second = (stop - start for start, stop in spans)
        return first, second

    def rows(self, place: int) -> int:
        """Both together."""
        return sum(self.halves(place))

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[batch, heads, own rows, width] each to [batch, heads / num, rows of all members, width], in the
        order of the sequence."""
        sent = [each.chunk(self.num, 1) for each in tensors]
        arrived = self._exchange(
            list(zip(*sent, strict=True)),
            [
                [torch.Size((*parts[0].shape[:2], rows, parts[0].shape[-1])) for parts in sent]
                for rows in map(self.rows, self.members)
            ],
        )
        return [self._in_order(parts) for parts in zip(*arrived, strict=True)]

    def to_rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The way back."""
        sent, rows = [self._of_members(each) for each in tensors], self.rows(self.group.place)
        shapes = [torch.Size((*each.shape[:2], rows, each.shape[-1])) for each in tensors]
        arrived = self._exchange(list(zip(*sent, strict=True)), [shapes] * self.num)
        return [torch.cat(parts, 1) for parts in zip(*arrived, strict=True)]

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        halves = [
            torch.split(part, list(self.halves(place)), 2)
            for part, place in zip(parts, self.members, strict=True)
        ]
        return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], 2)

    def _of_members(self, whole: Tensor) -> list[Tensor]:
        firsts, seconds = zip(*(self.halves(place) for place in self.members), strict=True)
        pieces = torch.split(whole, [*firsts, *reversed(seconds)], 2)
        return [torch.cat([pieces[each], pieces[-1 - each]], 2) for each in range(self.num)]

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]]
    ) -> list[list[Tensor]]:
        """Send each member its tensors; returns those of each.

        Args:
            shapes: of the tensors from each member.
        """
        nothing = sent[0][0].new_empty(0)
        outwards, inwards = [nothing] * self.group.num_ranks, [nothing] * self.group.num_ranks
        for place, parts, coming in zip(self.members, sent, shapes, strict=True):
            outwards[place] = packed(parts)
            inwards[place] = nothing.new_empty(sum(shape.numel() for shape in coming))
        self.group.all_to_all(outwards, inwards).wait()
        return [unpacked(inwards[place], coming) for place, coming in zip(self.members, shapes, strict=True)]


def to_heads(swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`Swap.to_heads`, differentiable."""
    swapped: tuple[Tensor, ...] = _ToHeads.apply(swap, *tensors)  # type: ignore[no-untyped-call]
    return swapped


def to_rows(swap: Swap, tensor: Tensor) -> Tensor:
    """`Swap.to_rows` of one tensor, differentiable."""
    swapped: Tensor = _ToRows.apply(swap, tensor)  # type: ignore[no-untyped-call]
    return swapped


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap = swap
        return tuple(swap.to_heads(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.swap.to_rows(gradients)


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, swap: Swap, tensor: Tensor) -> Tensor:
        ctx.swap = swap
        return swap.to_rows([tensor])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.swap.to_heads([gradient])[0]
