"""The calls of torch.distributed that several kinds of exchange need, and the one that brings ranks together.

Used by `Mesh`, `Group` and `Link` inside `Dispatcher.start`. It decides nothing and waits for nothing but
that all ranks come.
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


def start_send(tensor: torch.Tensor, rank: int, tag: int) -> list[Carried]:
    """Send a tensor to a rank; without elements nothing is sent."""
    return _begun(dist.isend(tensor, rank, tag=tag)) if tensor.numel() else []


def start_receive(tensor: torch.Tensor, rank: int, tag: int) -> list[Carried]:
    """Receive a tensor from a rank, likewise."""
    return _begun(dist.irecv(tensor, rank, tag=tag)) if tensor.numel() else []


def start_swap(
    arriving: Sequence[tuple[int, torch.Tensor]],
    sent: Sequence[tuple[int, torch.Tensor]],
    tag: int,
    group: ProcessGroup = None,
) -> list[Carried]:
    """Receive from some ranks of the world and send to some, all at once; what is empty is left out."""
    calls = [
        dist.P2POp(call, tensor, rank, group, tag)
        for call, pieces in ((dist.irecv, arriving), (dist.isend, sent))
        for rank, tensor in pieces
        if tensor.numel()
    ]
    return [*dist.batch_isend_irecv(calls)] if calls else []


def _begun(work: Carried | None) -> list[Carried]:
    return [work] if work is not None else []
