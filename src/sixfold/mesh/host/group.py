"""Ranks of one host that exchange slices by reading each other's memory.

Made by `Host` and used by the mesh like any `Group`. A member *offers* a tensor, goes on, and later reads
what the others offered straight out of their buffers. Sums and gathers are each issued in one order on all
members (`lane.py` says why); between the two there is none, as on the network. Sums are taken in the order
of `Group`, so both give the same bits. A member never writes into another's buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sixfold.mesh.dispatch import Carried, Dispatcher, Pending
from sixfold.mesh.group import Group
from sixfold.mesh.host.common import Common
from sixfold.mesh.host.lane import Lane, Member, Offer, Peer, Work
from sixfold.mesh.host.parts import packed, part_of
from sixfold.mesh.host.scratch import SharedScratch
from sixfold.mesh.host.signals import Row

NUM_LANES = 2


class HostGroup(Group):
    """Ranks that exchange slices through shared memory.

    Args:
        ranks: its members in order.
        rank: this process, one of them.
        scratch: this rank's shared memory.
        rows: this rank's counters in this group, one row a lane.
        members: the others, in order, each with its rows.
        timeout_s: how long to wait for one of them.
        dispatcher: what its exchanges go through.
        purpose: one of PURPOSES.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        scratch: SharedScratch,
        rows: Sequence[Row],
        members: Sequence[tuple[Peer, Sequence[Row]]],
        timeout_s: float,
        dispatcher: Dispatcher,
        *,
        purpose: str = "all",
    ) -> None:
        super().__init__(ranks, rank, scratch, None, dispatcher, purpose=purpose)
        self._shared = scratch
        others = list(zip(self._others(), members, strict=True))
        self._sum_lane, self._gather_lane = (
            Lane(
                scratch,
                rows[lane],
                [Member(place, peer, theirs[lane]) for (place, _), (peer, theirs) in others],
                timeout_s,
            )
            for lane in range(NUM_LANES)
        )

    # How the exchanges of `Group` are carried here. Where a sum was sent from shared memory, `reclaim` tells
    # when it may be written again.

    def _arriving(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return []  # read where it lies

    def _reduce(self, whole: torch.Tensor, arriving: list[torch.Tensor], into: torch.Tensor) -> list[Carried]:
        return [self._start_sum(whole, into)]

    def _gather(self, whole: torch.Tensor) -> list[Carried]:
        return [self._start_gather(whole)]

    def _start_sum(self, whole: torch.Tensor, into: torch.Tensor) -> Work:
        mine, offered = self.slice_of(whole, self.place), whole
        if not self._shared.holds(whole):
            offered = self._shared.take(whole.numel(), whole.dtype).copy_(whole)

        def add(offers: list[Offer]) -> None:
            summed = mine
            for offer in offers:
                theirs = self.slice_of(offer.tensor(whole.numel(), whole.dtype), self.place)
                summed = torch.add(summed, theirs, out=into)
            if offered is not whole:
                self._shared.give(offered)

        return self._sum_lane.issue("sum", offered, add)

    def _start_gather(self, whole: torch.Tensor) -> Work:
        mine = self.slice_of(whole, self.place)
        in_place = self._shared.holds(whole)
        offered = mine if in_place else self._shared.take(mine.numel(), mine.dtype).copy_(mine)

        def fill(offers: list[Offer]) -> None:
            for offer in offers:
                theirs = self.slice_of(whole, offer.member.place)
                theirs.copy_(offer.tensor(theirs.numel(), theirs.dtype))
            if not in_place:
                self._shared.give(offered)

        # What others read where it lies is not handed back before they have.
        return self._gather_lane.issue("slices", offered, fill, hold=in_place)

    def _deal(self, sent: Sequence[torch.Tensor], arriving: Sequence[torch.Tensor]) -> list[Carried]:
        nothing = sent[self.place].new_empty(0)
        offered = packed(
            [nothing if place == self.place else part for place, part in enumerate(sent)], self._shared.take
        )

        def fill(offers: list[Offer]) -> None:
            for offer in offers:
                into = arriving[offer.member.place]
                into.view(-1).copy_(part_of(offer, self.place, into.numel(), into.dtype))
            self._shared.give(offered)

        return [self._gather_lane.issue("parts", offered, fill)]

    def common(self, numel: int, dtype: torch.dtype) -> Common:
        """Memory that all members map: [numel] zeros, a multiple of their number. A collective.

        It lies in the first member's memory.
        """
        made = self._shared.take(numel, dtype).zero_() if self.place == 0 else None
        found: list[Common] = []

        def open_it(offers: list[Offer]) -> None:
            path, offset = self._shared.memory.path, 0
            if made is not None:
                offset = self._shared.memory.offset_of(made) or 0
            else:
                offers[0].tensor(numel, dtype)  # checks that all mean the same
                path, offset = offers[0].member.peer.memory.path, offers[0].offset
            found.append(
                Common.open(
                    path, offset, numel, dtype, place=self.place, count=self.num_ranks, tell=self._tell
                )
            )

        self._gather_lane.issue("common memory", made, open_it).wait()
        return found[0]

    def _tell(self) -> Pending:
        return self._dispatcher.start(
            "meeting",
            self._gathers,
            torch.empty(0),
            lambda: [self._gather_lane.issue("meeting", None, lambda offers: None)],
        )
