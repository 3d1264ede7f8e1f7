"""Ranks of one host that exchange slices by reading each other's memory.

Made by `Host` and used by the mesh like any `Group`. A member *offers* a tensor, goes on, and later reads
what the others offered straight out of their buffers. What keeps this free of races and deadlocks:

- All members issue the same exchanges in the same order, so the n-th of one is the n-th of all. A member
  finishes them in that order, whichever it is asked to wait for; so who waits for number n waits only for
  others to offer number n or less, which none of them has to wait for.
- A member writes its own slice alone, and reads of the others' buffers only what they have offered.
- A buffer is written again after all others have finished the exchange it was offered for (`reclaim`).
  Who waits for that has finished the exchange itself, and the others do so before they wait for anything
  that this rank does later.

Sums are taken in the order of `Group`, so both give the same bits. It never blocks while it issues, except
when NUM_OFFERS exchanges are under way.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sixfold.base.errors import LinkError
from sixfold.mesh.group import Group, Pending
from sixfold.mesh.host.memory import PeerMemory
from sixfold.mesh.host.scratch import SharedScratch
from sixfold.mesh.host.signals import DONE, NUM_OFFERS, OFFERED, Process, Row, wait_beyond


@dataclass(frozen=True)
class Peer:
    """Another rank of this host.

    Args:
        process: to see whether it lives.
        memory: what it offers from.
    """

    process: Process
    memory: PeerMemory


@dataclass(frozen=True)
class _Member:
    """Another member of a group."""

    place: int
    peer: Peer
    row: Row


@dataclass(frozen=True)
class _Offer:
    """What another member offers for one exchange."""

    member: _Member
    offset: int
    num_bytes: int

    def tensor(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The offered tensor [numel]."""
        if numel * dtype.itemsize != self.num_bytes:
            raise _disagreement(self.member, f"{self.num_bytes} bytes", f"{numel * dtype.itemsize}")
        return self.member.peer.memory.tensor(self.offset, numel, dtype)


_Read = Callable[[list[_Offer]], None]


@dataclass(frozen=True)
class _Work:
    """One exchange of a group, as torch.distributed's Work."""

    group: HostGroup
    number: int
    hold: bool

    def wait(self) -> None:
        """Block until the tensor may be used."""
        (self.group.await_readers if self.hold else self.group.finish)(self.number)

    def is_completed(self) -> bool:
        """Whether that is so already; reads nothing."""
        return self.group.is_finished(self.number, by_all=self.hold)


class HostGroup(Group):
    """Ranks that exchange slices through shared memory.

    Args:
        ranks: its members in order.
        rank: this process, one of them.
        scratch: this rank's shared memory.
        row: this rank's counters in this group.
        members: the others, in order.
        timeout_s: how long to wait for one of them.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        scratch: SharedScratch,
        row: Row,
        members: Sequence[tuple[Peer, Row]],
        timeout_s: float,
    ) -> None:
        super().__init__(ranks, rank, scratch, None)
        self._shared = scratch
        self._row = row
        self._members = [
            _Member(place, peer, theirs)
            for (place, _), (peer, theirs) in zip(self._others(), members, strict=True)
        ]
        self._timeout_s = timeout_s
        self._offered = self._done = 0
        self._under_way: deque[tuple[int, _Read]] = deque()
        self._common: list[torch.Tensor] = []

    def slice_of(self, whole: torch.Tensor, place: int) -> torch.Tensor:
        """The part of `whole` that belongs to a member; of any size, the last members' may be shorter."""
        size = -(-whole.numel() // len(self))
        return whole[place * size : (place + 1) * size]

    def reduce_scatter(self, whole: torch.Tensor) -> Pending:
        """Start to sum everyone's `whole` into slices: this member's lies in its place in `whole`.

        Where `whole` was taken from shared memory, `reclaim` tells when it may be written again.
        """
        return Pending([self._start_sum(whole)])

    def all_gather(self, whole: torch.Tensor) -> Pending:
        """Start to fill `whole` with everyone's slice; this member's lies in its place already.

        In `common` memory nothing has to be copied: it is whole when all have come here.
        """
        return Pending([self._start_gather(whole)])

    def _start_sum(self, whole: torch.Tensor) -> _Work:
        mine, offered = self.slice_of(whole, self.place), whole
        if not self._shared.holds(whole):
            offered = self._shared.take(whole.numel(), whole.dtype).copy_(whole)

        def add(offers: list[_Offer]) -> None:
            for offer in offers:
                mine.add_(self.slice_of(offer.tensor(whole.numel(), whole.dtype), self.place))
            if offered is not whole:
                self._shared.give(offered)

        return self._issue("sum", offered, add)

    def _start_gather(self, whole: torch.Tensor) -> _Work:
        mine = self.slice_of(whole, self.place)
        if self._is_common(whole):
            return self._issue("common slices", None, lambda offers: None)
        in_place = self._shared.holds(whole)
        offered = mine if in_place else self._shared.take(mine.numel(), mine.dtype).copy_(mine)

        def fill(offers: list[_Offer]) -> None:
            for offer in offers:
                theirs = self.slice_of(whole, offer.member.place)
                theirs.copy_(offer.tensor(theirs.numel(), theirs.dtype))
            if not in_place:
                self._shared.give(offered)

        # What others read where it lies is not handed back before they have.
        return self._issue("slices", offered, fill, hold=in_place)

    def common(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that all members map: [numel] zeros, the same bytes for everyone. A collective.

        Each member may write its own slice; `all_gather` of the whole tells that all have, and `meet`,
        after the last reading, that they may be written again. It lies in the first member's memory.
        """
        made = self._shared.take(numel, dtype).zero_() if self.place == 0 else None
        found: list[torch.Tensor] = [] if made is None else [made]

        def open_it(offers: list[_Offer]) -> None:
            first = offers[0]
            if self.place > 0:
                first.tensor(numel, dtype)  # checks that all mean the same
                found.append(first.member.peer.memory.writable(first.offset, numel, dtype))

        self._issue("common memory", made, open_it).wait()
        self._common += found
        return found[0]

    def meet(self) -> None:
        """Return when all members have come here."""
        self._issue("meeting", None, lambda offers: None).wait()

    def _issue(self, kind: str, offered: torch.Tensor | None, read: _Read, *, hold: bool = False) -> _Work:
        """Offer a tensor under the next number; `read` is called when all have.

        Args:
            kind: what the exchange is, the same on all members.
            hold: whether it is over only when all others have read, too.
        """
        number = self._offered
        if number >= NUM_OFFERS:
            self.await_readers(number - NUM_OFFERS)
        code = zlib.crc32(kind.encode())
        offset, num_bytes = 0, 0
        if offered is not None and offered.numel():
            offset, num_bytes = self._shared.memory.offset_of(offered) or 0, offered.nbytes
            self._shared.note(offered, self, lambda: self.await_readers(number))
        self._row.write_offer(number, code, offset, num_bytes)
        self._under_way.append((code, read))
        self._offered = number + 1
        self._row.raise_to(OFFERED, self._offered)
        while self._done < self._offered and all(one.row[OFFERED] > self._done for one in self._members):
            self._read_next()
        return _Work(self, number, hold)

    def finish(self, number: int) -> None:
        """Wait until this member has read all that was offered for exchange `number` and all before it."""
        while self._done <= number:
            for one in self._members:
                wait_beyond(one.row, OFFERED, self._done, one.peer.process, self._timeout_s)
            self._read_next()

    def await_readers(self, number: int) -> None:
        """Wait until all members have."""
        self.finish(number)
        for one in self._members:
            wait_beyond(one.row, DONE, number, one.peer.process, self._timeout_s)

    def is_finished(self, number: int, *, by_all: bool) -> bool:
        """Whether this member, or all of them, have read what was offered for an exchange."""
        return self._done > number and (not by_all or all(one.row[DONE] > number for one in self._members))

    def _read_next(self) -> None:
        code, read = self._under_way[0]
        offers = []
        for one in self._members:
            theirs, offset, num_bytes, _ = one.row.read_offer(self._done)
            if theirs != code:
                raise _disagreement(one, f"exchange {self._done} of another kind", "this rank's")
            offers.append(_Offer(one, offset, num_bytes))
        read(offers)
        self._under_way.popleft()
        self._done += 1
        self._row.raise_to(DONE, self._done)

    def _is_common(self, whole: torch.Tensor) -> bool:
        return any(each.data_ptr() == whole.data_ptr() for each in self._common)


def _disagreement(member: _Member, theirs: str, mine: str) -> LinkError:
    rank = member.peer.process.rank
    return LinkError(
        f"rank {rank} offers {theirs} where this rank has {mine}",
        rule="every rank takes part in every exchange, in the same order",
        fix="call train_step, step, save and gathered equally often on every rank",
    )
