"""The calls of torch.distributed that several kinds of exchange need, and the one that brings ranks together.

Prepared by `Mesh`, `Group` and `Link`, and by what carries exchanges (`carriers.py`); made when the
dispatcher starts these. It decides nothing, and waits for nothing but that all ranks come.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sixfold.mesh.dispatch import Call, Carried

ProcessGroup = dist.ProcessGroup | None
"""None is everyone."""
Piece = tuple[int, torch.Tensor]
"""A rank, and what is sent to it or arrives from it."""


def join(
    rank: int, world_size: int, address: str | None, device: torch.device, *, meet_s: float, timeout_s: float
) -> None:
    """Form the default process group; arguments as for `Mesh.form`."""
    meeting = rendezvous(f"tcp://{address}", rank, world_size, timeout=timedelta(seconds=meet_s))
    store, *_ = next(meeting)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def sum_call(tensor: torch.Tensor, group: ProcessGroup = None) -> Call:
    """Sum a tensor over a process group, in place."""
    return partial(dist.all_reduce, tensor, group=group, async_op=True)


def copy_call(tensor: torch.Tensor, source: int, group: ProcessGroup = None) -> Call:
    """Copy the tensor of rank `source` of the world into everyone's."""
    return partial(dist.broadcast, tensor, source, group=group, async_op=True)


def piece_calls(arriving: Sequence[Piece], sent: Sequence[Piece], tag: int) -> list[Call]:
    """Receive tensors from some ranks and send some, each by itself; what is empty is left out."""
    return [
        partial(call, tensor, rank, tag=tag)
        for call, pieces in ((dist.irecv, arriving), (dist.isend, sent))
        for rank, tensor in pieces
        if tensor.numel()
    ]


def start_swap(
    arriving: Sequence[Piece],
    sent: Sequence[Piece],
    tag: int,
    group: ProcessGroup = None,
) -> Carried:
    """The same as one call of a process group, in which no receive waits for a send."""
    calls = [
        dist.P2POp(call, tensor, rank, group, tag)
        for call, pieces in ((dist.irecv, arriving), (dist.isend, sent))
        for rank, tensor in pieces
        if tensor.numel()
    ]
    return Several(dist.batch_isend_irecv(calls) if calls else ())


class Several:
    """Several that a call has started, as one."""

    def __init__(self, works: Sequence[Carried]) -> None:
        self._works = works

    def wait(self) -> None:
        """See `Carried`."""
        for work in self._works:
            work.wait()

    def is_completed(self) -> bool:
        """See `Carried`."""
        return all(work.is_completed() for work in self._works)
