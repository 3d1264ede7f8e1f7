"""Some of the ranks, and what they exchange: equal slices of flat tensors, or a tensor for each member.

Made by the mesh. Without a native backend (gloo) sums and gathers are a point-to-point exchange, which
measured about three times faster than gloo's own, and sums are taken in one fixed order. A group of
one rank sends nothing and runs the same lines. It never decides what to exchange.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sixfold.base.ring import ranks_text
from sixfold.mesh.backend import start_copy, start_receive, start_send, start_sum, start_swap
from sixfold.mesh.dispatch import Carried, Dispatcher, Pending
from sixfold.mesh.scratch import Scratch

_UPDATE = ("all", "shard", "copies", "world", "ties")
PURPOSES = (
    *_UPDATE,
    *("link even", "link odd", "link round", "meetings"),
    *("expert all", "expert shard", "expert copies"),
    *("tensor axis", "context axis", "expert axis"),
)
"""What the groups and links of a rank are for, one of each at most: replicas and their two levels, everyone,
tied weights; neighbours in a pipeline; meetings; replicas of experts; axes of the mesh."""


def lane_of(purpose: str) -> str:
    """What tells exchanges apart that others of the same ranks may overtake. Those of an update come in one
    order; those inside forward and backward do not wait for them."""
    return "" if purpose in _UPDATE else f":{purpose}"


class Group:
    """Ranks that exchange slices.

    Args:
        ranks: its members in order.
        rank: this process, one of them.
        scratch: where arriving slices are put.
        native: the process group of a backend whose own collectives are used; None for point-to-point.
        dispatcher: what its exchanges go through; None: one of its own.
        purpose: one of PURPOSES.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        scratch: Scratch,
        native: dist.ProcessGroup | None,
        dispatcher: Dispatcher | None = None,
        *,
        purpose: str = "all",
    ) -> None:
        self.place = ranks.index(rank)
        self.num_ranks = len(ranks)
        # Tags keep point-to-point sums and gathers apart; the collectives of a backend share one order.
        lane, number = lane_of(purpose), PURPOSES.index(purpose)
        lanes = (f"{lane}:sums", f"{lane}:gathers") if native is None else (lane, lane)
        self._reduce_tag, self._gather_tag = 2 * number + 1, 2 * number + 2
        self._everyone = ranks_text(ranks) + lane
        self._sums, self._gathers = (ranks_text(ranks) + each for each in lanes)
        self._dispatcher = dispatcher or Dispatcher()
        self._ranks = ranks
        self._scratch = scratch
        self._native = native

    def slice_of(self, whole: torch.Tensor, place: int) -> torch.Tensor:
        """The part of `whole` that belongs to the member at `place`, contiguous; the last members' may be
        shorter."""
        size = -(-whole.numel() // self.num_ranks)
        return whole[place * size : (place + 1) * size]

    def reduce_scatter(self, whole: torch.Tensor, into: torch.Tensor | None = None) -> Pending:
        """Start to sum everyone's `whole` into slices.

        Args:
            into: where this member's goes, [size]; None: into its place in `whole`.
        """
        mine = self.slice_of(whole, self.place)
        into = mine if into is None else into
        if self.num_ranks == 1:
            if into is not mine:
                into.copy_(mine)
            return Pending()
        arriving = self._arriving(whole)
        return self._dispatcher.start(
            "reduce-scatter",
            self._sums,
            whole,
            lambda: self._reduce(whole, arriving, into),
            lambda: self._add(mine, arriving, into),
        )

    def all_gather(self, whole: torch.Tensor) -> Pending:
        """Start to fill `whole` with everyone's slice; this member's lies in its place already."""
        if self.num_ranks == 1:
            return Pending()
        return self._dispatcher.start("all-gather", self._gathers, whole, lambda: self._gather(whole))

    def all_reduce(self, whole: torch.Tensor) -> Pending:
        """Start to sum `whole`, in place: the same bits on every member."""
        if self.num_ranks == 1:
            return Pending()
        if self._native is not None:
            return self._dispatcher.start(
                "all-reduce", self._sums, whole, lambda: start_sum(whole, self._native)
            )
        arriving, mine = self._arriving(whole), self.slice_of(whole, self.place)

        def spread() -> None:
            self._add(mine, arriving, mine)
            for work in self._gather(whole):
                work.wait()

        return self._dispatcher.start(
            "all-reduce", self._sums, whole, lambda: self._reduce(whole, arriving, mine), spread
        )

    def broadcast(self, tensor: torch.Tensor) -> Pending:
        """Start to copy the first member's `tensor` into everyone's, in place."""
        if self.num_ranks == 1:
            return Pending()
        return self._dispatcher.start("broadcast", self._gathers, tensor, lambda: self._copy_first(tensor))

    def all_to_all(self, sent: Sequence[torch.Tensor], arriving: Sequence[torch.Tensor]) -> Pending:
        """Start to send a tensor to each member and to fill one from each; this member's own is copied.

        To pass something round a ring, all but what goes to one neighbour and comes from the other is empty.

        Args:
            sent: by place, of one type, contiguous, each of its own size; left alone until the end.
            arriving: by place, as what that member sends here.
        """
        arriving[self.place].view(-1).copy_(sent[self.place].view(-1))
        if self.num_ranks == 1:
            return Pending()
        leaving = [sent[place] for place, _ in self._others()]
        return self._dispatcher.start(
            "all-to-all", self._gathers, leaving, lambda: self._deal(sent, arriving)
        )

    def _copy_first(self, tensor: torch.Tensor) -> list[Carried]:
        first = self._ranks[0]
        if self._native is not None:
            return start_copy(tensor, first, self._native)
        if self.place > 0:
            return start_receive(tensor, first, self._gather_tag)
        return [work for _, rank in self._others() for work in start_send(tensor, rank, self._gather_tag)]

    def _arriving(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Where the others' parts of this member's slice are put; nowhere where the backend adds."""
        num_others = 0 if self._native is not None else self.num_ranks - 1
        size = self.slice_of(whole, self.place).numel()
        return [self._scratch.take(size, whole.dtype) for _ in range(num_others)]

    def _reduce(self, whole: torch.Tensor, arriving: list[torch.Tensor], into: torch.Tensor) -> list[Carried]:
        if self._native is not None:
            return [dist.reduce_scatter_tensor(into, whole, group=self._native, async_op=True)]
        sent = [self.slice_of(whole, place) for place, _ in self._others()]
        return self._swap(arriving, sent, self._reduce_tag)

    def _add(self, mine: torch.Tensor, arriving: list[torch.Tensor], into: torch.Tensor) -> None:
        for piece in arriving:
            mine = torch.add(mine, piece, out=into)
            self._scratch.give(piece)

    def _gather(self, whole: torch.Tensor) -> list[Carried]:
        mine = self.slice_of(whole, self.place)
        if self._native is not None:
            return [dist.all_gather_into_tensor(whole, mine, group=self._native, async_op=True)]
        arriving = [self.slice_of(whole, place) for place, _ in self._others()]
        return self._swap(arriving, [mine] * len(arriving), self._gather_tag)

    def _swap(self, arriving: list[torch.Tensor], sent: list[torch.Tensor], tag: int) -> list[Carried]:
        """Start to exchange one tensor each with every other member."""
        return [
            work
            for (_, rank), theirs, mine in zip(self._others(), arriving, sent, strict=True)
            for work in (*start_receive(theirs, rank, tag), *start_send(mine, rank, tag))
        ]

    def _deal(self, sent: Sequence[torch.Tensor], arriving: Sequence[torch.Tensor]) -> list[Carried]:
        others = self._others()
        return start_swap(
            [(rank, arriving[place]) for place, rank in others],
            [(rank, sent[place]) for place, rank in others],
            self._gather_tag,
            self._native,
        )

    def _others(self) -> list[tuple[int, int]]:
        return [(place, rank) for place, rank in enumerate(self._ranks) if place != self.place]


class World(Group):
    """All ranks, over the network: sums and copies of whole tensors are the backend's own."""

    def all_reduce(self, whole: torch.Tensor) -> Pending:
        """Start to sum `whole`, in place: the same bits on every member."""
        return self._dispatcher.start("all-reduce", self._everyone, whole, lambda: start_sum(whole))

    def broadcast(self, tensor: torch.Tensor) -> Pending:
        """Start to copy the first member's `tensor` into everyone's, in place."""
        return self._dispatcher.start("broadcast", self._everyone, tensor, lambda: start_copy(tensor, 0))
