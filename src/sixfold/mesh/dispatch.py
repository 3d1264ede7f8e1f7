"""The dispatcher: every exchange between ranks goes through it, whatever carries it.

`Mesh` and `Group` prepare their exchanges here, for all updates or for one use. Each is numbered within its
group and recorded, with what is sent and the source line, before it starts, when it is waited for and when it
has ended; so whoever reads the ring of a rank knows what it did last. It never decides what is sent.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from threading import Lock
from time import perf_counter, time
from typing import Protocol, Self

import torch

from sixfold.base.errors import MeshError
from sixfold.base.places import place_of
from sixfold.base.ring import OVER, SLOTS, WANTED, Block, Ring, Topic, differs, ranks_of


class Carried(Protocol):
    """What a transport hands out for something under way, as torch.distributed's Work."""

    def wait(self) -> object:
        """Block until the tensor may be used."""

    def is_completed(self) -> bool:
        """Whether it has arrived, without blocking."""


_is_completed = methodcaller("is_completed")

Call = Callable[[], Carried | None]
"""Starts something, and returns what to wait for."""


class Dispatcher:
    """Numbers and records the exchanges of one rank.

    Attributes:
        ring: where they are recorded.
        blocked_s: seconds that this rank has stood still for exchanges so far.
        phase_name: what the rank is doing at large; timeouts depend on it.
        on_broken: called with the error when an exchange breaks; it may end the process.
        neighbours: the rings of other ranks on this host, by rank, as far as they are known.
        counts: how many exchanges were started in each group.
    """

    def __init__(self) -> None:
        self.ring = Ring()
        self.blocked_s = 0.0
        self.phase_name = "start"
        self.on_broken: Callable[[RuntimeError], None] | None = None
        self.neighbours: dict[int, Block] = {}
        self.counts: dict[str, int] = {}
        self._members: dict[str, list[int]] = {}
        self._lingering: deque[tuple[int, int, Sequence[Carried]]] = deque()
        self._settling = Lock()

    @property
    def num_exchanges(self) -> int:
        """How many were started so far."""
        return self.ring.num_posted

    def prepare(
        self, op: str, group: str, tensor: torch.Tensor | Sequence[torch.Tensor], carrier: Carrier
    ) -> Exchange:
        """One exchange of a group, to be started as often as it is needed.

        Args:
            op: its name, "all-reduce" say.
            group: its ranks, as `ranks_text` writes them; ":lane" after it where exchanges of the same
                ranks may overtake each other. Order is kept, and numbers count, within one lane.
            tensor: what is exchanged, or several of one type at once, or what is sent to each of the others;
                recorded by size and type.
        """
        tensors = [tensor] if isinstance(tensor, torch.Tensor) else tensor
        numel, dtype = sum(each.numel() for each in tensors), tensors[0].dtype
        return Exchange(self, Topic(op, numel, str(dtype), numel * dtype.itemsize, group), carrier)

    def start(
        self,
        op: str,
        group: str,
        tensor: torch.Tensor | Sequence[torch.Tensor],
        *calls: Call,
    ) -> Pending:
        """Prepare an exchange that calls of a backend carry, and start it, once; see `prepare`, `Carrier`."""
        return self.prepare(op, group, tensor, Carrier(calls, lingers=True)).start()

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

    def linger(self, serial: int, at: int, left: Sequence[Carried]) -> None:
        """Keep in mind an exchange that was waited for, though a device has yet to do it; see `Exchange`."""
        self._lingering.append((serial, at, left))
        self.settle()

    def settle(self) -> None:
        """Note what has ended on a device by now though nobody blocked for it; they end in order.

        The watcher comes here too. Whichever thread finds the other one at it goes on: there is a next time.
        """
        if not self._settling.acquire(blocking=False):
            return
        try:
            while self._lingering and all(work.is_completed() for work in self._lingering[0][2]):
                serial, at, _ = self._lingering.popleft()
                if self.ring.num_posted - serial < SLOTS:
                    self.ring.times[at + OVER] = time()
        finally:
            self._settling.release()

    def compare(self, topic: Topic, number: int, place: str) -> None:
        """Raise MeshError where members on this host are known to exchange something else under a number."""
        members = self._members.get(topic.group)
        if members is None:
            members = self._members[topic.group] = ranks_of(topic.group)
        strangers = []
        for rank in members:
            block = self.neighbours.get(rank)
            if block is not None and differs(block, topic, number):
                strangers.append(rank)
        if strangers:
            self.broken(RuntimeError("ranks differ"))
            raise MeshError(
                f"{topic.op} #{number} of {topic.numel} x {topic.dtype} at {place}, where rank(s) "
                f"{strangers} have another",
                rule="the ranks of a group issue the same exchanges in the same order",
                fix="call it on every rank, with tensors of one size and type",
            )

    def broken(self, error: RuntimeError) -> None:
        """An exchange has broken."""
        if self.on_broken is not None:
            self.on_broken(error)


@dataclass(frozen=True)
class Carrier:
    """How a transport carries one exchange, as often as it is started.

    Args:
        calls: start it, one after the other; each returns what to wait for.
        finish: what is left to do here when all of that has arrived; None where that is nothing.
        lingers: whether a device may have yet to do what was waited for.
    """

    calls: Sequence[Call]
    finish: Callable[[], object] | None = None
    lingers: bool = False


class Pending:
    """What is prepared once and started as often as is wanted; by itself nothing, where nothing is sent.

    Args:
        act: what this rank does alone when it starts.
    """

    def __init__(self, act: Callable[[], object] | None = None) -> None:
        self._act = act

    def start(self) -> Self:
        """Begin; what was started and never waited for is given up."""
        if self._act is not None:
            self._act()
        return self

    def wait(self) -> None:
        """Block until it has finished, when its tensor may be used; at once where that was so before."""

    def has_arrived(self) -> bool:
        """Whether `wait` would not block, apart from what is left to do then."""
        return True


NOTHING = Pending()
"""Where nothing is sent, ever."""


class InTurn(Pending):
    """Several, each of which starts when the one before has finished."""

    def __init__(self, steps: Sequence[Pending]) -> None:
        super().__init__()
        self._first, *self._later = steps
        self._is_under_way = False

    def start(self) -> Self:
        """See `Pending`."""
        self._is_under_way = True
        self._first.start()
        return self

    def wait(self) -> None:
        """See `Pending`."""
        if self._is_under_way:
            self._is_under_way = False
            self._first.wait()
            for step in self._later:
                step.start().wait()

    def has_arrived(self) -> bool:
        """See `Pending`."""
        return not self._is_under_way


class Exchange(Pending):
    """One exchange of a group: what stays the same of it, and where it is when it is under way.

    Args:
        dispatcher: whose ring it is recorded in.
        topic: what it is.
        carrier: carries it.
    """

    def __init__(self, dispatcher: Dispatcher, topic: Topic, carrier: Carrier) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        self.topic = topic
        self._carrier = carrier
        self._works: Sequence[Carried] = ()
        self._is_under_way = False
        self._number = 0
        self._place = ""
        self._at = 0  # its slot in the ring, and what the ring had posted then
        self._serial = 0

    def start(self) -> Self:
        """See `Pending`.

        Raises:
            MeshError: another rank of this host exchanges something else in this place. Nothing was sent:
                backends abort the process that receives what it does not expect, or give wrong sums.
        """
        dispatcher, topic, ring = self._dispatcher, self.topic, self._dispatcher.ring
        self._number = dispatcher.counts[topic.group] = dispatcher.counts.get(topic.group, 0) + 1
        self._place = place_of(sys._getframe(1), besides="mesh")
        self._at = ring.post(topic, self._number, self._place)
        self._serial = ring.num_posted
        if dispatcher.neighbours:
            dispatcher.compare(topic, self._number, self._place)
        began = perf_counter()
        try:
            works = list[Carried]()
            for call in self._carrier.calls:
                if (work := call()) is not None:
                    works.append(work)
        except RuntimeError as error:
            dispatcher.broken(error)
            raise
        dispatcher.blocked_s += perf_counter() - began
        ring.times[self._at + WANTED] = 0.0
        self._works, self._is_under_way = works, True
        return self

    def wait(self) -> None:
        """See `Pending`."""
        if not self._is_under_way:
            return
        self._is_under_way = False
        dispatcher, ring, carrier = self._dispatcher, self._dispatcher.ring, self._carrier
        works, self._works = self._works, ()
        if ring.num_posted - self._serial >= SLOTS:  # so many came since that its slot belongs to another
            self._at = ring.post(self.topic, self._number, self._place)
            self._serial = ring.num_posted
        ring.times[self._at + WANTED] = time()
        began = perf_counter()
        try:
            for work in works:
                work.wait()
            if carrier.finish is not None:
                carrier.finish()
        except RuntimeError as error:
            dispatcher.broken(error)
            raise
        dispatcher.blocked_s += perf_counter() - began
        if carrier.lingers and not all(map(_is_completed, works)):
            dispatcher.linger(self._serial, self._at, works)
        elif ring.num_posted - self._serial < SLOTS:
            ring.times[self._at + OVER] = time()

    def has_arrived(self) -> bool:
        """See `Pending`."""
        return all(map(_is_completed, self._works))
