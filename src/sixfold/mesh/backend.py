"""The calls of torch.distributed that several kinds of exchange need, and the one that brings ranks together.

Used by `Mesh`, and by what carries the exchanges of `Group` and `Link` (`carriers.py`) once the dispatcher
starts them. It decides nothing, and waits for nothing but that all ranks come.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sixfold.mesh.dispatch import Carried

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


def start_sum(tensor: torch.Tensor, group: ProcessGroup = None) -> list[Carried]:
    """Sum a tensor over a process group, in place."""
    return _begun(dist.all_reduce(tensor, group=group, async_op=True))


def start_copy(tensor: torch.Tensor, source: int, group: ProcessGroup = None) -> list[Carried]:
    """Copy the tensor of rank `source` of the world into everyone's."""
    return _begun(dist.broadcast(tensor, src=source, group=group, async_op=True))


def start_pieces(arriving: Sequence[Piece], sent: Sequence[Piece], tag: int) -> list[Carried]:
    """Receive tensors from some ranks and send some, each by itself; what is empty is left out."""
    works: list[Carried] = []
    for rank, tensor in arriving:
        if tensor.numel() and (work := dist.irecv(tensor, rank, tag=tag)) is not None:
            works.append(work)
    for rank, tensor in sent:
        if tensor.numel() and (work := dist.isend(tensor, rank, tag=tag)) is not None:
            works.append(work)
    return works


def start_swap(
    arriving: Sequence[Piece],
    sent: Sequence[Piece],
    tag: int,
    group: ProcessGroup = None,
) -> list[Carried]:
    """The same as one call of a process group, in which no receive waits for a send."""
    calls = [
        dist.P2POp(call, tensor, rank, group, tag)
        for call, pieces in ((dist.irecv, arriving), (dist.isend, sent))
        for rank, tensor in pieces
        if tensor.numel()
    ]
    return [*dist.batch_isend_irecv(calls)] if calls else []


def _begun(work: Carried | None) -> list[Carried]:
    return [work] if work is not None else []
