"""The ranks of one host, and whether they can exchange through shared memory.

`Host.form` is called by the mesh on all ranks at once. Every rank says what it is and has; from these
facts all come to the same decision, with the reason in words. It never falls back in silence.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sixfold.base.errors import MeshError, PlanError
from sixfold.base.units import bytes_text
from sixfold.mesh.dispatch import Dispatcher
from sixfold.mesh.group import PURPOSES
from sixfold.mesh.host.group import NUM_LANES, HostGroup
from sixfold.mesh.host.lane import Peer
from sixfold.mesh.host.limits import free_bytes, total_bytes
from sixfold.mesh.host.link import HostLink
from sixfold.mesh.host.memory import OwnMemory, PeerMemory
from sixfold.mesh.host.scratch import SharedScratch
from sixfold.mesh.host.signals import ROW_BYTES, Process, Row

_log = logging.getLogger(__name__)

_ADDRESS_SPACE = 2**46
"""Bytes that a process sets aside for the memory of all ranks of its host, taken to be one a core."""


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others.

    Args:
        asked: the configured transport; None leaves it to the mesh.
        device: type of the device it computes on.
        place: what only ranks of the same host, and the same space of process numbers, have in common.
        pid: its process.
        handle: its memory's file descriptor; -1 without.
        needed: bytes that it will exchange at most.
        free: bytes that its host has left for all ranks on it.
        limit: which limit says so.
        problem: why it cannot share memory, or "".
    """

    asked: str | None
    device: str
    place: str
    pid: int
    handle: int
    needed: int
    free: int
    limit: str
    problem: str

    @classmethod
    def read(cls, text: str) -> Facts:
        """From JSON."""
        return cls(**json.loads(text))


def objection(everyones: Sequence[Facts], neighbours: Sequence[Sequence[int]]) -> str | None:
    """Why these ranks cannot exchange through shared memory, None where they can.

    Args:
        everyones: facts by rank.
        neighbours: the groups of ranks that exchange most, each of which has to be on one host.
    """
    for rank, facts in enumerate(everyones):
        if facts.device != "cpu":
            return f"rank {rank} computes on {facts.device}; memory is shared between CPUs"
        if facts.problem:
            return f"rank {rank}: {facts.problem}"
    for ranks in neighbours:
        if len({everyones[rank].place for rank in ranks}) > 1:
            return f"ranks {', '.join(map(str, ranks))} exchange most and are on different hosts"
    for place in dict.fromkeys(facts.place for facts in everyones):
        here = [facts for facts in everyones if facts.place == place]
        needed, tightest = sum(facts.needed for facts in here), min(here, key=lambda facts: facts.free)
        if needed > tightest.free:
            return (
                f"{len(here)} rank(s) of one host exchange up to "
                f"{' + '.join(bytes_text(facts.needed) for facts in here)} = {bytes_text(needed)}, and "
                f"{bytes_text(tightest.free)} are free {tightest.limit}"
            )
    return None


class Host:
    """The ranks that share memory with this one.

    Args:
        rank: this process.
        memory: what it offers.
        peers: the other ranks of this host.
        timeout_s: how long one waits for another.
    """

    def __init__(self, rank: int, memory: OwnMemory, peers: dict[int, Peer], timeout_s: float) -> None:
        self.ranks = tuple(sorted([rank, *peers]))
        self.scratch = SharedScratch(memory)
        self._rank = rank
        self._memory = memory
        self._peers = peers
        self._timeout_s = timeout_s

    @classmethod
    def form(
        cls,
        asked: str | None,
        rank: int,
        device: torch.device,
        texts: Callable[[str], list[str]],
        *,
        needed: int,
        neighbours: Sequence[Sequence[int]],
        timeout_s: float,
        place: str | None = None,
    ) -> Host | None:
        """Decide with all ranks whether to share memory, and open it. A collective.

        Args:
            asked: "host", "network", or None for whatever is possible.
            texts: gives every rank's text, by rank.
            needed: bytes that this rank's exchanges take at most.
            neighbours: see `objection`.
            place: what the ranks of a host have in common; None: found out.

        Returns:
            None where the network is used.

        Raises:
            PlanError: "host" was asked for and is not possible, on every rank.
        """
        memory, problem = _own_memory(asked, device)
        free, limit = (free_bytes() if memory else None) or (0, "")
        mine = Facts(
            asked=asked,
            device=device.type,
            place=place or _place(),
            pid=os.getpid(),
            handle=memory.handle if memory else -1,
            needed=needed,
            free=free,
            limit=limit,
            problem=problem,
        )
        everyones = [Facts.read(text) for text in texts(json.dumps(asdict(mine)))]
        # All ranks look at the same facts here, so they go the same way.
        if any(facts.asked == "network" for facts in everyones):
            return None
        reason = objection(everyones, neighbours)
        peers: dict[int, Peer] = {}
        if reason is None:
            here = [each for each, facts in enumerate(everyones) if facts.place == mine.place]
            try:
                peers = {each: _peer(each, everyones[each]) for each in here if each != rank}
            except OSError as error:
                problem = f"rank {rank} cannot open another's memory: {error.strerror}"
            reason = next(filter(None, texts(problem)), None)
        if reason is None and memory is not None:
            return cls(rank, memory, peers, timeout_s)
        if any(facts.asked == "host" for facts in everyones):
            raise PlanError(
                f'layout.transport = "host": {reason}',
                rule="ranks of one Linux host on x86-64 share memory where they compute on its CPUs and it "
                "is large enough",
                fix='leave layout.transport unset, or set it to "network"; with several hosts, set '
                "layout.shard to the number of ranks on each",
            )
        if rank == 0 and device.type == "cpu":
            _log.warning("ranks exchange over the network, not through shared memory: %s", reason)
        return None

    def group(self, ranks: Sequence[int], purpose: str, dispatcher: Dispatcher) -> HostGroup | None:
        """The group of `ranks`, this one among them; None unless all of them, and more than one, are here.

        Args:
            purpose: what it is for, one of PURPOSES; the same on every member.
            dispatcher: what its exchanges go through.
        """
        if len(ranks) < 2 or not set(ranks) <= set(self.ranks):
            return None
        peers = [self._peers[rank] for rank in ranks if rank != self._rank]
        others = [(peer, _rows(peer.memory, purpose)) for peer in peers]
        own = _rows(self._memory, purpose)
        return HostGroup(
            ranks, self._rank, self.scratch, own, others, self._timeout_s, dispatcher, purpose=purpose
        )

    def link(self, other: int, purpose: str, dispatcher: Dispatcher) -> HostLink | None:
        """The way to and from another rank; None unless it is here. Arguments as for `group`."""
        peer = self._peers.get(other)
        if peer is None:
            return None
        own, theirs = _rows(self._memory, purpose), _rows(peer.memory, purpose)
        return HostLink(self._rank, peer, self.scratch, own, theirs, self._timeout_s, dispatcher)


def _rows(memory: OwnMemory | PeerMemory, purpose: str) -> tuple[Row, Row]:
    """A rank's counters in one of its groups, a row for each of two lanes."""
    number = PURPOSES.index(purpose)
    first, second = (
        Row(memory.map, memory.address, (number * NUM_LANES + lane) * ROW_BYTES) for lane in range(NUM_LANES)
    )
    return first, second


def _own_memory(asked: str | None, device: torch.device) -> tuple[OwnMemory | None, str]:
    """This rank's memory, with its rows reserved; or None and why not."""
    if asked == "network" or device.type != "cpu":
        return None, "not tried"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, f"{sys.platform} on {platform.machine()}; Linux on x86_64 is needed"
    if free_bytes() is None:
        return None, "the system does not say how much memory is free"
    try:
        length = min(total_bytes(), _ADDRESS_SPACE // (os.cpu_count() or 1))
        memory = OwnMemory(length)
        memory.reserve(
            len(PURPOSES) * NUM_LANES * ROW_BYTES
        )  # first of all, so that it begins at 0 in everyone's
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return None, f"the system refuses it: {error.strerror}"
    except MeshError as error:  # told to the others, who wait for what this rank says
        return None, error.given
    return memory, ""


def _peer(rank: int, facts: Facts) -> Peer:
    return Peer(Process(rank, facts.pid), PeerMemory(facts.pid, facts.handle))


def _place() -> str:
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip()] if boot.exists() else []
    known += [os.readlink(space)] if space.exists() else []
    return " ".join([socket.gethostname(), *known])
