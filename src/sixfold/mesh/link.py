"""The way between two ranks: tensors from one to the other, in order.

Made by the mesh for neighbours in a pipeline. Each direction is a lane of its own, in which both ranks count
alike, so a hang names the transfer that is missing. It copies nothing and knows no shapes but those of the
tensors it is given.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sixfold.base.ring import ranks_text
from sixfold.mesh.dispatch import Carried, Dispatcher, Pending

_TAG = 0  # groups have those from 1


def is_duplex(device: torch.device) -> bool:
    """Whether what goes to a rank and what comes from it pass each other, for tensors on `device`. NCCL
    carries both in the one order in which they are started, whatever their tags."""
    return device.type != "cuda"


class Link:
    """This rank and another one.

    Args:
        rank: this process.
        other: the other.
        dispatcher: what all transfers go through.
    """

    def __init__(self, rank: int, other: int, dispatcher: Dispatcher) -> None:
        self._other = other
        self._dispatcher = dispatcher
        pair = ranks_text(sorted((rank, other)))
        self._outwards, self._inwards = f"{pair}:{rank}>{other}", f"{pair}:{other}>{rank}"

    def send(self, tensor: torch.Tensor) -> Pending:
        """Start to send `tensor`, contiguous; it is left alone until the end. An empty one is not sent."""
        if not tensor.numel():
            return Pending()
        return self._dispatcher.start("transfer", self._outwards, tensor, lambda: self._start_send(tensor))

    def receive(self, tensor: torch.Tensor) -> Pending:
        """Start to fill `tensor`, contiguous, with what the other rank sends next."""
        if not tensor.numel():
            return Pending()
        return self._dispatcher.start("transfer", self._inwards, tensor, lambda: self._start_receive(tensor))

    def _start_send(self, tensor: torch.Tensor) -> Carried | None:
        return dist.isend(tensor, self._other, tag=_TAG)

    def _start_receive(self, tensor: torch.Tensor) -> Carried | None:
        return dist.irecv(tensor, self._other, tag=_TAG)
