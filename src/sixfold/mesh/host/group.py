"""Ranks of one host that exchange slices by reading each other's memory.

Made by `Host` and used by the mesh like any `Group`. A member *offers* a tensor, goes on, and later reads
what the others offered straight out of their buffers. Sums and gathers are each issued in one order on all
members (`lane.py` says why); between the two there is none, as on the network. Sums are taken in the order
of `Group`, so both give the same bits. A member never writes into another's buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sixfold.mesh.dispatch import Carrier, Dispatcher, Pending
from sixfold.mesh.group import Group, lay
from sixfold.mesh.host.common import Common
from sixfold.mesh.host.lane import Lane, Member, Offer, Peer, Work
from sixfold.mesh.host.parts import listed, packed, part_of, parts_at
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

    def _summing(self, whole: torch.Tensor, into: torch.Tensor) -> Carrier:
        return Carrier([self._adding(whole, into).start])

    def _reducing(self, whole: torch.Tensor) -> Carrier:
        gathering = self._gathering(whole)
        return Carrier([self._adding(whole, self.slice_of(whole, self.place), gathering).start])

    def _filling(self, *wholes: torch.Tensor) -> Carrier:
        if len(wholes) > 1 and not all(self._shared.holds(whole) for whole in wholes):
            return Carrier([self._gathering(whole).start for whole in wholes])
        return Carrier([self._gathering(*wholes).start])

    def _adding(self, whole: torch.Tensor, into: torch.Tensor, then: Work | None = None) -> Work:
        mine, seen = self.slice_of(whole, self.place), dict[Offer, torch.Tensor]()

        def add(offers: list[Offer]) -> None:
            summed = mine
            for offer in offers:
                theirs = seen.get(offer)
                if theirs is None:
                    whole_there = offer.tensor(whole.numel(), whole.dtype)
                    theirs = seen[offer] = self.slice_of(whole_there, self.place)
                summed = torch.add(summed, theirs, out=into)

        return Work(self._sum_lane, "sum", whole, add, then=then)

    def _gathering(self, *wholes: torch.Tensor) -> Work:
        is_list = len(wholes) > 1
        places = [self.place, *(member.place for member in self._gather_lane.members)]
        slices = {place: [self.slice_of(whole, place) for whole in wholes] for place in places}
        offered = listed(slices[self.place], self._shared) if is_list else slices[self.place][0]
        seen = dict[Offer, list[torch.Tensor]]()

        def fill(offers: list[Offer]) -> None:
            for offer in offers:
                mine, theirs = slices[offer.member.place], seen.get(offer)
                if theirs is None:
                    one = mine[0]
                    theirs = parts_at(offer, mine) if is_list else [offer.tensor(one.numel(), one.dtype)]
                    seen[offer] = theirs
                for into, part in zip(mine, theirs, strict=True):
                    into.copy_(part)

        # What others read where it lies is not handed back before they have.
        return Work(self._gather_lane, "lists" if is_list else "slices", offered, fill, holds=True)

    def _dealing(self, sent: Sequence[torch.Tensor], arriving: Sequence[Sequence[torch.Tensor]]) -> Carrier:
        dtype, nothing = sent[self.place].dtype, sent[self.place].new_empty(0)
        others = [nothing if place == self.place else part for place, part in enumerate(sent)]
        offered, lent = packed(others, self._shared)

        def fill(offers: list[Offer]) -> None:
            for offer in offers:
                pieces = arriving[offer.member.place]
                numel = sum(piece.numel() for piece in pieces)
                lay(part_of(offer, self.place, numel, dtype), pieces)
            self._shared.give(offered)

        return Carrier([Work(self._gather_lane, "parts", offered, fill, lent=lent).start])

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
            found.append(Common.open(path, offset, numel, dtype, place=self.place, count=self.num_ranks))

        Work(self._gather_lane, "common memory", made, open_it).start().wait()
        return found[0]

    def prepare_meeting(self) -> Pending:
        """Wait until all members have come here."""
        meeting = Work(self._gather_lane, "meeting", None, lambda offers: None)
        return self._dispatcher.prepare("meeting", self._gathers, torch.empty(0), Carrier([meeting.start]))
