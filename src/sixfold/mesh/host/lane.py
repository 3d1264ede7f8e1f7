"""One sequence of exchanges among members of a host: who has offered what, who has read it, in which order.

Made by `HostGroup`, one for sums and one for all else. What keeps it free of races and deadlocks:

- All members issue the exchanges of a lane in the same order, so the n-th of one is the n-th of all. A member
  finishes them in that order, whichever it is asked to wait for; so who waits for number n waits only for
  others to offer number n or less, and offering waits for nobody.
- A member reads of the others' buffers only what they have offered, and writes its own alone.
- A buffer is written again after all others have finished the exchange it was offered for. `SharedScratch`
  hands out another one until then. Only `await_readers` waits for it, and who calls that has finished the
  exchange itself. An exchange that is started again and again therefore keeps its buffers, but not what is
  in them: its user reclaims them before he writes, or waits until all have read (`holds`).

It knows numbers and places, not what an exchange means.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sixfold.base.errors import LinkError
from sixfold.mesh.host.memory import PeerMemory
from sixfold.mesh.host.scratch import SharedScratch
from sixfold.mesh.host.signals import (
    DONE,
    FIRST_OFFER,
    NUM_OFFERS,
    OFFER_WORDS,
    OFFERED,
    Process,
    Row,
    wait_beyond,
)


@dataclass(frozen=True)
class Peer:
    """Another rank of this host.

    Args:
        process: to see whether it lives.
        memory: what it offers from.
    """

    process: Process
    memory: PeerMemory


@dataclass(frozen=True, eq=False)
class Member:
    """Another member of a group, with its counters in one lane."""

    place: int
    peer: Peer
    row: Row


class Offer(NamedTuple):
    """What another member offers for one exchange; the same one lies in the same memory."""

    member: Member
    offset: int
    num_bytes: int

    def tensor(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The offered tensor [numel]."""
        if numel * dtype.itemsize != self.num_bytes:
            raise _disagreement(self.member, f"{self.num_bytes} bytes", f"{numel * dtype.itemsize}")
        return self.member.peer.memory.tensor(self.offset, numel, dtype)


Read = Callable[[list[Offer]], None]


class Work:
    """One exchange of a lane, to be started as often as it is needed; what carries an exchange.

    Args:
        kind: what it is, the same on all members.
        source: what this member offers. What does not lie in shared memory is copied there each time.
        read: called with the others' offers when all have offered.
        holds: whether it is over only when all others have read what lies in shared memory by itself.
        then: what starts when this one has arrived, is part of it, and begins on no member before that.
        lent: what else in shared memory is read.
    """

    def __init__(
        self,
        lane: Lane,
        kind: str,
        source: torch.Tensor | None,
        read: Read,
        *,
        holds: bool = False,
        then: Work | None = None,
        lent: Sequence[torch.Tensor] = (),
    ) -> None:
        self._lane = lane
        self.code = zlib.crc32(kind.encode())
        self.read = read
        self._offset, self._num_bytes, self._copied = 0, 0, source
        self._readers: dict[Lane, int] = {}
        memory = lane.scratch.memory
        if source is None or not source.numel():
            self._copied = None
        elif (offset := memory.offset_of(source)) is not None:
            self._offset, self._num_bytes, self._copied = offset, source.nbytes, None
            self._readers = lane.scratch.readers_of(source)
        self._lent = [lane.scratch.readers_of(each) for each in lent]
        self._holds = holds and self._copied is None
        self._then = then
        self._number = -1

    def start(self) -> Work:
        """Offer under the next number, and read what is there already."""
        lane, scratch, copied = self._lane, self._lane.scratch, self._copied
        number = self._number = lane.offered
        if number >= lane.room:
            lane.make_room()
        offset, num_bytes, readers, borrowed = self._offset, self._num_bytes, self._readers, None
        if copied is not None:
            borrowed = scratch.take(copied.numel(), copied.dtype)
            borrowed.copy_(copied.view(-1))
            offset, num_bytes = scratch.memory.offset_of(borrowed) or 0, borrowed.nbytes
            readers = scratch.readers_of(borrowed)
        readers[lane] = number
        for each in self._lent:
            each[lane] = number
        words, at = lane.row.words, FIRST_OFFER + number % NUM_OFFERS * OFFER_WORDS
        words[at], words[at + 1], words[at + 2] = self.code, offset, num_bytes
        lane.under_way.append((self, borrowed))
        lane.offered = words[OFFERED] = number + 1  # the offer is there before the counter says so
        lane.row.wake[OFFERED]()
        while lane.done <= number:  # as `catch_up`, without a call for every exchange
            for one in lane.members:
                if one.row.words[OFFERED] <= lane.done:
                    return self
            lane.read_next()
        return self

    def wait(self) -> None:
        """Block until the tensor may be used."""
        lane, number = self._lane, self._number
        if lane.done <= number:
            lane.finish(number)
        if self._holds:
            for one in lane.members:
                if one.row.words[DONE] <= number:
                    lane.await_readers(number)
        if self._then is not None:
            self._then.start()
            self._then.wait()  # the others have offered it, so they have read this
        if (self._holds or self._then is not None) and self._readers.get(lane) == number:
            del self._readers[lane]

    def is_completed(self) -> bool:
        """Whether that is so already, apart from what comes then; reads nothing."""
        return self._lane.is_finished(self._number, by_all=self._holds)


class Lane:
    """One member's view of the sequence.

    Args:
        scratch: this rank's shared memory.
        row: this rank's counters.
        members: the others, in order.
        timeout_s: how long to wait for one of them.

    Attributes:
        offered, done: how many exchanges this member has offered, and has finished reading.
        read_by_all: exchanges below this number all have finished reading; as far as was seen by the way.
        room: the number from which on it has to be asked whether an older offer may be written over.
        under_way: what is offered and not read yet, and the copies in shared memory that it is offered from.
    """

    def __init__(self, scratch: SharedScratch, row: Row, members: Sequence[Member], timeout_s: float) -> None:
        self.scratch = scratch
        self.row = row
        self.members = members
        self._timeout_s = timeout_s
        self.offered = self.done = self.read_by_all = 0
        self.room = NUM_OFFERS
        self.under_way: deque[tuple[Work, torch.Tensor | None]] = deque()

    def catch_up(self) -> None:
        """Read what all have offered by now."""
        while self.done < self.offered:
            for one in self.members:
                if one.row.words[OFFERED] <= self.done:
                    return
            self.read_next()

    def finish(self, number: int) -> None:
        """Wait until this member has read all that was offered for exchange `number` and all before it."""
        while self.done <= number:
            for one in self.members:
                if one.row.words[OFFERED] <= self.done:
                    wait_beyond(one.row, OFFERED, self.done, one.peer.process, self._timeout_s)
            self.read_next()

    def await_readers(self, number: int) -> None:
        """Wait until all members have."""
        if self.done <= number:
            self.finish(number)
        for one in self.members:
            if one.row.words[DONE] <= number:
                wait_beyond(one.row, DONE, number, one.peer.process, self._timeout_s)

    def make_room(self) -> None:
        """Wait until the place of the next offer may be written."""
        self.await_readers(self.offered - NUM_OFFERS)
        self.room = min(self.done, *(one.row.words[DONE] for one in self.members)) + NUM_OFFERS

    def is_finished(self, number: int, *, by_all: bool) -> bool:
        """Whether this member, or all of them, have read what was offered for an exchange."""
        if self.done <= number:
            return False
        if by_all:
            for one in self.members:
                if one.row.words[DONE] <= number:
                    return False
        return True

    def read_next(self) -> None:
        """Read what all have offered for the oldest exchange that this member has not read."""
        done, (work, borrowed) = self.done, self.under_way[0]
        at, offers, least = FIRST_OFFER + done % NUM_OFFERS * OFFER_WORDS, [], done
        for one in self.members:
            words = one.row.words
            if words[at] != work.code:
                raise _disagreement(one, f"another kind of exchange {done}", "its own")
            offers.append(Offer(one, words[at + 1], words[at + 2]))
            if (theirs := words[DONE]) < least:
                least = theirs
        self.read_by_all = least
        work.read(offers)
        self.under_way.popleft()
        if borrowed is not None:
            self.scratch.give(borrowed)  # it is not handed out before the others have read it, too
        self.done = self.row.words[DONE] = done + 1
        self.row.wake[DONE]()


def _disagreement(member: Member, theirs: str, mine: str) -> LinkError:
    rank = member.peer.process.rank
    return LinkError(
        f"rank {rank} offers {theirs} where this rank has {mine}",
        rule="every rank takes part in every exchange, in the same order",
        fix="call train_step, step, save and gathered equally often on every rank",
    )
