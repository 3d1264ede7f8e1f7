"""The dispatcher: every exchange between ranks goes through it, whatever carries it.

`Mesh` and `Group` start their exchanges here. Each is numbered within its group and recorded, with what
is sent and the source line, before it starts, when it is waited for and when it has ended; so whoever
reads the ring of a rank knows what it did last. It never decides what is sent and never waits itself.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol
from zlib import crc32

import torch

from sixfold.base.errors import MeshError
from sixfold.base.places import place_of
from sixfold.base.ring import Block, Ring, content_text, differs, exchange_text, ranks_of


class Carried(Protocol):
    """What a transport hands out for something under way, as torch.distributed's Work."""

    def wait(self) -> object:
        """Block until the tensor may be used."""

    def is_completed(self) -> bool:
        """Whether it has arrived, without blocking."""


class Dispatcher:
    """Numbers and records the exchanges of one rank.

    Attributes:
        ring: where they are recorded.
        blocked_s: seconds that this rank has stood still for exchanges so far.
        phase_name: what the rank is doing at large; timeouts depend on it.
        on_broken: called with the error when an exchange breaks; it may end the process.
        neighbours: the rings of other ranks on this host, by rank, as far as they are known.
    """

    def __init__(self) -> None:
        self.ring = Ring()
        self.blocked_s = 0.0
        self.phase_name = "start"
        self.on_broken: Callable[[RuntimeError], None] | None = None
        self.neighbours: dict[int, Block] = {}
        self._counts: dict[str, int] = {}
        self._members: dict[str, list[int]] = {}
        self._under_way: deque[tuple[int, Sequence[Carried]]] = deque()

    @property
    def num_exchanges(self) -> int:
        """How many were started so far."""
        return self.ring.num_posted

    def start(
        self,
        op: str,
        group: str,
        tensor: torch.Tensor | Sequence[torch.Tensor],
        call: Callable[[], Sequence[Carried | None]],
        finish: Callable[[], None] | None = None,
    ) -> Pending:
        """Start one exchange of a group.

        Args:
            op: its name, "all-reduce" say.
            group: its ranks, as `ranks_text` writes them; ":lane" after it where exchanges of the same
                ranks may overtake each other. Order is kept, and numbers count, within one lane.
            tensor: what is exchanged, or what is sent to each of the others; recorded by size and type.
            call: starts it; one exchange may be carried in several pieces.
            finish: what is left to do when all pieces have arrived.

        Raises:
            MeshError: another rank of this host exchanges something else in this place. Nothing was sent:
                backends abort the process that receives what it does not expect, or give wrong sums.
        """
        number = self._counts.get(group, 0) + 1
        self._counts[group] = number
        tensors = [tensor] if isinstance(tensor, torch.Tensor) else tensor
        numel, dtype = sum(each.numel() for each in tensors), str(tensors[0].dtype)
        place = place_of(sys._getframe(2), besides="mesh")
        ring = self.ring
        text = exchange_text(number, op, numel, dtype, numel * tensors[0].itemsize, group, place)
        serial = ring.want(ring.post(text), text)  # a backend may block here already
        strangers = self._strangers(group, number, content_text(op, numel, dtype))
        if strangers:
            self._broken(RuntimeError("ranks differ"))
            raise MeshError(
                f"{op} #{number} of {numel} x {dtype} at {place}, where rank(s) {strangers} have another",
                rule="the ranks of a group issue the same exchanges in the same order",
                fix="call it on every rank, with tensors of one size and type",
            )
        began = perf_counter()
        try:
            works = [work for work in call() if work is not None]
        except RuntimeError as error:
            self._broken(error)
            raise
        self.blocked_s += perf_counter() - began
        ring.leave(serial)
        return Pending(works, finish, (self, serial, text))

    def enter(self, name: str) -> None:
        """From now on exchanges have the patience of another phase."""
        self.phase_name = name
        self.ring.write("phase", name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the block exchanges have the patience of another phase."""
        before = self.phase_name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def settle(self) -> None:
        """Note what has ended on a device by now though nobody blocked for it; they end in order."""
        while self._under_way and all(work.is_completed() for work in self._under_way[0][1]):
            self.ring.over(self._under_way.popleft()[0])

    def finish(
        self, serial: int, text: str, works: Sequence[Carried], rest: Callable[[], None] | None
    ) -> None:
        """Block until an exchange that `start` began has ended, and note it; called by `Pending` alone."""
        serial = self.ring.want(serial, text)
        began = perf_counter()
        try:
            for work in works:
                work.wait()
            if rest is not None:
                rest()
        except RuntimeError as error:
            self._broken(error)
            raise
        self.blocked_s += perf_counter() - began
        if all(work.is_completed() for work in works):
            self.ring.over(serial)
        else:  # on a GPU waiting only orders streams
            self._under_way.append((serial, works))
            self.settle()

    def _strangers(self, group: str, number: int, content: str) -> list[int]:
        """The members on this host that are known to exchange something else under this number."""
        group_key, content_key = crc32(group.encode()), crc32(content.encode())
        self.ring.announce(group_key, number, content_key)
        members = self._members.get(group)
        if members is None:
            members = self._members[group] = ranks_of(group)
        return [
            rank
            for rank in members
            if rank in self.neighbours and differs(self.neighbours[rank], group_key, number, content_key)
        ]

    def _broken(self, error: RuntimeError) -> None:
        if self.on_broken is not None:
            self.on_broken(error)


class Pending:
    """An exchange under way; `wait` returns when its tensor may be used.

    Args:
        works: its pieces.
        finish: what is left to do when they have arrived.
        record: the dispatcher, and serial and text under which it is recorded; None where nothing is sent,
            and for several exchanges that are waited for as one.
    """

    def __init__(
        self,
        works: Sequence[Carried] = (),
        finish: Callable[[], None] | None = None,
        record: tuple[Dispatcher, int, str] | None = None,
    ) -> None:
        self._works = works
        self._finish = finish
        self._record = record

    def has_arrived(self) -> bool:
        """Whether `wait` would not block, apart from what is left to do then."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Block until it has finished; at once when nothing was sent or it was waited for before."""
        works, self._works = self._works, ()
        finish, self._finish = self._finish, None
        record, self._record = self._record, None
        if record is not None:
            dispatcher, serial, text = record
            dispatcher.finish(serial, text, works, finish)
            return
        for work in works:
            work.wait()
        if finish is not None:
            finish()
