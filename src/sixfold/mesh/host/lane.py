"""One sequence of exchanges among members of a host: who has offered what, who has read it, in which order.

Made by `HostGroup`, one for sums and one for all else. What keeps it free of races and deadlocks:

- All members issue the exchanges of a lane in the same order, so the n-th of one is the n-th of all. A member
  finishes them in that order, whichever it is asked to wait for; so who waits for number n waits only for
  others to offer number n or less, and offering waits for nobody.
- A member reads of the others' buffers only what they have offered, and writes its own alone.
- A buffer is written again after all others have finished the exchange it was offered for. `SharedScratch`
  hands out another one until then. Only `await_readers` waits for it, and who calls that has finished the
  exchange itself.

It knows numbers and places, not what an exchange means.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sixfold.base.errors import LinkError
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
class Member:
    """Another member of a group, with its counters in one lane."""

    place: int
    peer: Peer
    row: Row


@dataclass(frozen=True)
class Offer:
    """What another member offers for one exchange."""

    member: Member
    offset: int
    num_bytes: int

    def tensor(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The offered tensor [numel]."""
        if numel * dtype.itemsize != self.num_bytes:
            raise _disagreement(self.member, f"{self.num_bytes} bytes", f"{numel * dtype.itemsize}")
        return self.member.peer.memory.tensor(self.offset, numel, dtype)


Read = Callable[[list[Offer]], None]


@dataclass(frozen=True)
class Work:
    """One exchange of a lane, as torch.distributed's Work.

    Args:
        hold: whether it is over only when all others have read, too.
    """

    lane: Lane
    number: int
    hold: bool

    def wait(self) -> None:
        """Block until the tensor may be used."""
        (self.lane.await_readers if self.hold else self.lane.finish)(self.number)

    def is_completed(self) -> bool:
        """Whether that is so already; reads nothing."""
        return self.lane.is_finished(self.number, by_all=self.hold)


class Lane:
    """One member's view of the sequence.

    Args:
        scratch: this rank's shared memory.
        row: this rank's counters.
        members: the others, in order.
        timeout_s: how long to wait for one of them.
    """

    def __init__(self, scratch: SharedScratch, row: Row, members: Sequence[Member], timeout_s: float) -> None:
        self._shared = scratch
        self._row = row
        self._members = members
        self._timeout_s = timeout_s
        self._offered = self._done = 0
        self._under_way: deque[tuple[int, Read]] = deque()

    def issue(self, kind: str, offered: torch.Tensor | None, read: Read, *, hold: bool = False) -> Work:
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
            self._shared.note(offered, self, number)
        self._row.write_offer(number, code, offset, num_bytes)
        self._under_way.append((code, read))
        self._offered = number + 1
        self._row.raise_to(OFFERED, self._offered)
        self.catch_up()
        return Work(self, number, hold)

    def catch_up(self) -> None:
        """Read what all have offered by now."""
        while self._done < self._offered and all(
            one.row.words[OFFERED] > self._done for one in self._members
        ):
            self._read_next()

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
        return self._done > number and (
            not by_all or all(one.row.words[DONE] > number for one in self._members)
        )

    def _read_next(self) -> None:
        code, read = self._under_way[0]
        offers = []
        for one in self._members:
            theirs, offset, num_bytes, _ = one.row.read_offer(self._done)
            if theirs != code:
                raise _disagreement(one, f"another kind of exchange {self._done}", "its own")
            offers.append(Offer(one, offset, num_bytes))
        read(offers)
        self._under_way.popleft()
        self._done += 1
        self._row.raise_to(DONE, self._done)


def _disagreement(member: Member, theirs: str, mine: str) -> LinkError:
    rank = member.peer.process.rank
    return LinkError(
        f"rank {rank} offers {theirs} where this rank has {mine}",
        rule="every rank takes part in every exchange, in the same order",
        fix="call train_step, step, save and gathered equally often on every rank",
    )
