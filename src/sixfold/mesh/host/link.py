"""The way between two ranks of one host: what one sends the other reads out of its memory.

Made by `Host` and used like any `Link`. Each direction is a lane, in which the sender offers and goes on, and
the receiver copies when it comes to it. A sender waits for nobody: it copies what it sends into shared
memory, which is used again when it has been read.
"""

from __future__ import annotations

import torch

from sixfold.mesh.dispatch import Carried, Dispatcher
from sixfold.mesh.host.lane import Lane, Member, Offer, Peer, Work
from sixfold.mesh.host.scratch import SharedScratch
from sixfold.mesh.host.signals import Row
from sixfold.mesh.link import Link


class HostLink(Link):
    """This rank and another one of its host.

    Args:
        rank: this process.
        peer: the other.
        scratch: this rank's shared memory.
        rows: this rank's counters, one row for each direction, that of the lower rank's sends first.
        theirs: the other's.
        timeout_s: how long to wait for it.
        dispatcher: what all transfers go through.
    """

    def __init__(
        self,
        rank: int,
        peer: Peer,
        scratch: SharedScratch,
        rows: tuple[Row, Row],
        theirs: tuple[Row, Row],
        timeout_s: float,
        dispatcher: Dispatcher,
    ) -> None:
        super().__init__(rank, peer.process.rank, dispatcher)
        self._shared = scratch
        lanes = [
            Lane(scratch, mine, [Member(0, peer, other)], timeout_s)
            for mine, other in zip(rows, theirs, strict=True)
        ]
        outwards = int(rank > peer.process.rank)
        self._out_lane, self._in_lane = lanes[outwards], lanes[1 - outwards]

    def _start_send(self, tensor: torch.Tensor) -> None:
        self._out_lane.catch_up()  # what the other has read meanwhile can be used again
        # It is read from a copy, so that the tensor is free at once.
        offered = self._shared.take(tensor.numel(), tensor.dtype).copy_(tensor.view(-1))
        Work(self._out_lane, "transfer", offered, lambda offers: None).start()
        self._shared.give(offered)

    def _start_receive(self, tensor: torch.Tensor) -> Carried:
        def copy(offers: list[Offer]) -> None:
            tensor.view(-1).copy_(offers[0].tensor(tensor.numel(), tensor.dtype))

        return Work(self._in_lane, "transfer", None, copy).start()
