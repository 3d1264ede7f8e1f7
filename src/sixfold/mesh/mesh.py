"""The mesh: which rank is where, and the one door through which ranks exchange data.

Formed by the engine from a geometry; state, checkpoint and train call its collectives by axis.
With one rank along an axis nothing is sent and the same lines run. It never decides what to send.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.distributed as dist

# Imported before any group exists: its functions take the group of that moment as default argument.
# Imported later (torch.optim does so at its first step) they keep the group's threads alive for ever,
# and the process may abort on its way out.
import torch.distributed.nn.functional

from sixfold.base.ring import ranks_text
from sixfold.mesh.backend import copy_call, join
from sixfold.mesh.dispatch import Dispatcher, Pending
from sixfold.mesh.group import Group, World
from sixfold.mesh.host import Host
from sixfold.mesh.link import Link
from sixfold.mesh.replicas import Replicas
from sixfold.mesh.scratch import Scratch
from sixfold.plan.geometry import MESH_AXES, Geometry


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks.

    Args:
        geometry: ranks along each axis.
        rank: this process, 0 to world_size - 1.
        device: where this rank keeps its tensors.
        owns_group: whether the process group was started here and ends with `close`.
        host: the ranks with which this one shares memory; None where all exchange over the network.
        dispatcher: what every exchange of this rank goes through.
    """

    geometry: Geometry
    rank: int
    device: torch.device
    owns_group: bool = False
    host: Host | None = None
    dispatcher: Dispatcher = field(default_factory=Dispatcher)

    @classmethod
    def form(
        cls,
        geometry: Geometry,
        device: torch.device,
        *,
        rank: int,
        address: str | None,
        meet_s: float,
        timeout_s: float,
    ) -> Mesh:
        """Join all ranks; a default process group that already exists is used as it is.

        Args:
            rank: this process.
            address: "host:port" where rank 0 listens; None for a process of its own.
            meet_s: how long to wait until all ranks have come.
            timeout_s: the backend's own limit on one exchange.
        """
        if geometry.world_size == 1 or dist.is_initialized():
            return cls(geometry, rank, device)
        join(rank, geometry.world_size, address, device, meet_s=meet_s, timeout_s=timeout_s)
        mesh = cls(geometry, rank, device, owns_group=True)
        # A process that leaves its group standing is aborted by gloo on its way out.
        atexit.register(mesh.close)
        return mesh

    def sharing(self, transport: str | None, *, exchange_bytes: int, timeout_s: float) -> Mesh:
        """The same mesh with memory shared between ranks of a host, where that is possible. A collective.

        Args:
            transport: "host" to demand it, "network" to do without, None for what is possible.
            exchange_bytes: what this rank's exchanges take at most.
            timeout_s: how long one rank waits for another.

        Raises:
            PlanError: it is demanded and cannot be had; on every rank.
        """
        if self.world_size == 1:
            return self
        neighbours: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.geometry.replica(rank) // self.geometry.shard
            neighbours.setdefault((*self._others_of(rank, "data", "context"), place), []).append(rank)
        host = Host.form(
            transport,
            self.rank,
            self.device,
            self.texts,
            needed=exchange_bytes,
            neighbours=list(neighbours.values()),
            timeout_s=timeout_s,
        )
        return replace(self, host=host)

    @cached_property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.geometry.world_size

    @cached_property
    def data_rank(self) -> int:
        """Which part of the global batch this rank feeds."""
        return self.geometry.coordinate(self.rank, "data")

    @cached_property
    def data_ranks(self) -> int:
        """Parts that the global batch is divided into."""
        return self.geometry.degree("data")

    @cached_property
    def num_fed(self) -> int:
        """Ranks that are given the same part of the global batch."""
        return self.world_size // self.data_ranks

    @cached_property
    def pipe_rank(self) -> int:
        """Where this rank stands in its pipeline, from the input."""
        return self.geometry.coordinate(self.rank, "pipe")

    @cached_property
    def pipe_ranks(self) -> int:
        """Ranks of a pipeline."""
        return self.geometry.degree("pipe")

    def rank_at(self, pipe_rank: int) -> int:
        """The rank at another place of this rank's pipeline."""
        return self.rank + (pipe_rank - self.pipe_rank) * (self.world_size // self.pipe_ranks)

    def link(self, pipe_rank: int) -> Link:
        """The one way to and from the rank at a neighbouring place of this rank's pipeline, a ring."""
        if pipe_rank not in self._links:
            low, high = sorted((pipe_rank, self.pipe_rank))
            purpose = ("link even", "link odd")[low % 2] if high == low + 1 else "link round"
            other = self.rank_at(pipe_rank)
            shared = self.host.link(other, purpose, self.dispatcher) if self.host else None
            self._links[pipe_rank] = shared or Link(self.rank, other, self.dispatcher)
        return self._links[pipe_rank]

    @cached_property
    def _links(self) -> dict[int, Link]:
        return {}

    def holders(self, pipe_ranks: Sequence[int], number: int) -> Group:
        """The ranks at several places of this rank's pipeline; each such group has the same number on all."""
        ranks = [self.rank_at(place) for place in pipe_ranks]
        # Memory is set aside for one such group of a rank; further ones meet over the network.
        return self._group(ranks, "ties") if number == 0 else self._network_group(ranks, "ties")

    @cached_property
    def _everyone(self) -> str:
        return ranks_text(range(self.world_size))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around work in which ranks wait for each other longer than in an update.

        Args:
            name: "start", "step", "save", "load" or any other; one without a timeout of its own has
                that of "step".
        """
        return self.dispatcher.phase(name)

    @cached_property
    def exchangeable(self) -> Scratch:
        """Buffers that exchanges send from without a copy, for gradients; what a sum was sent from is
        written again after `reclaim`."""
        return self.host.scratch if self.host else self.scratch

    @cached_property
    def scratch(self) -> Scratch:
        """Buffers for the time of one exchange."""
        return Scratch(self.device)

    @cached_property
    def replicas(self) -> Replicas:
        """The ranks that hold the same whole parameters as this one, along data and context."""
        return self.replicas_of(())

    def replicas_of(self, cut: Sequence[str]) -> Replicas:
        """The ranks that hold the same pieces of parameters which are cut along axes of the mesh.

        Every rank asks for the same ones in the same order.

        Args:
            cut: those axes.
        """
        is_dealt = "expert" in cut and self.geometry.expert > 1
        if is_dealt not in self._replicas:
            geometry, step = self.geometry, self.geometry.expert if is_dealt else 1
            place = geometry.replica(self.rank)
            purpose = "expert " if is_dealt else ""
            self._replicas[is_dealt] = Replicas(
                self._peers[place % step :: step],
                place // step,
                geometry.shard_of(cut),
                lambda ranks, which: self._group(ranks, purpose + which),
                self.exchangeable,
                self.device,
            )
        return self._replicas[is_dealt]

    @cached_property
    def _replicas(self) -> dict[bool, Replicas]:
        return {}

    def place(self, axis: str) -> int:
        """Where this rank stands along `axis`, from 0."""
        return self.geometry.coordinate(self.rank, axis)

    def along(self, axis: str) -> Group:
        """The ranks that differ from this one only in their place along "tensor", "context" or "expert"."""
        if axis not in self._axes:
            geometry = self.geometry
            if axis == "expert":
                first = geometry.replica(self.rank) // geometry.expert * geometry.expert
                ranks = self._peers[first : first + geometry.expert]
            else:
                ranks = self._ranks_along(axis)
            self._axes[axis] = self._group(ranks, f"{axis} axis")
        return self._axes[axis]

    @cached_property
    def _axes(self) -> dict[str, Group]:
        return {}

    @cached_property
    def _world(self) -> Group:
        if len(self._peers) == self.world_size:
            return self.replicas.all
        return self._group(range(self.world_size), "world")

    @cached_property
    def _meetings(self) -> Group:
        """What all engines of a process have in common: the process group, over the network."""
        return self._network_group(self._peers, "meetings")

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """Start to copy one rank's `tensor` into everyone's, in place."""
        if self.world_size == 1:
            return Pending()
        return self.dispatcher.start("broadcast", self._everyone, tensor, copy_call(tensor, source))

    def total(self, *numbers: float) -> list[float]:
        """Sums of a few numbers over all ranks, in fp64, the same on every rank."""
        if (prepared := self._totals.get(len(numbers))) is None:
            row = self.exchangeable.take(len(numbers), torch.float64)
            prepared = self._totals[len(numbers)] = row, self._world.prepare_all_reduce(row)
        row, summing = prepared
        row.copy_(torch.tensor(numbers, dtype=torch.float64))
        summing.start().wait()
        return row.tolist()

    @cached_property
    def _totals(self) -> dict[int, tuple[torch.Tensor, Pending]]:
        """By how many numbers they sum."""
        return {}

    def largest(self, number: int) -> int:
        """The largest of the replicas' numbers."""
        return round(max(self.everyones(number))[0])

    def everyones(self, *numbers: float) -> list[list[float]]:
        """Each replica's few numbers, in their order; ranks that come from different engines meet too."""
        if len(self._peers) == 1:
            return [list(numbers)]
        if (prepared := self._tables.get(len(numbers))) is None:
            table = torch.zeros(len(self._peers), len(numbers), dtype=torch.float64, device=self.device)
            prepared = self._tables[len(numbers)] = table, self._meetings.prepare_all_reduce(table.view(-1))
        table, summing = prepared
        table.zero_()[self.replica].copy_(torch.tensor(numbers, dtype=torch.float64))
        summing.start().wait()
        return table.tolist()

    @cached_property
    def _tables(self) -> dict[int, tuple[torch.Tensor, Pending]]:
        return {}

    @cached_property
    def replica(self) -> int:
        """Which of the replicas this rank is."""
        return self.geometry.replica(self.rank)

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        return self.total(float(flag))[0] > 0

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.total(0.0)

    def share_text(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.world_size == 1:
            return text
        size = torch.tensor([len(text.encode())], device=self.device)
        self.broadcast(size).wait()
        letters = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            letters.copy_(torch.tensor(list(text.encode()), dtype=torch.uint8))
        self.broadcast(letters).wait()
        return bytes(letters.tolist()).decode()

    def texts(self, text: str) -> list[str]:
        """Every rank's text, by rank."""
        if self.world_size == 1:
            return [text]
        mine = text.encode()
        sizes = [int(size) for size in self.gather(torch.tensor([len(mine)], device=self.device))]
        padded = torch.tensor(list(mine.ljust(max(1, *sizes), b" ")), dtype=torch.uint8, device=self.device)
        rows = self.gather(padded)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def close(self) -> None:
        """End the process group if it was started here."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _others_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Where a rank stands along all axes but some."""
        return tuple(self.geometry.coordinate(rank, axis) for axis in MESH_AXES if axis not in axes)

    @cached_property
    def _peers(self) -> list[int]:
        """The ranks along data and context, by place."""
        return self._ranks_along("data", "context")

    def _ranks_along(self, *axes: str) -> list[int]:
        """The ranks that differ from this one only in their places along `axes`, in order."""
        here = self._others_of(self.rank, *axes)
        return [rank for rank in range(self.world_size) if self._others_of(rank, *axes) == here]

    def _group(self, ranks: Sequence[int], purpose: str) -> Group:
        """Some ranks, this one among them.

        Args:
            purpose: what it is for, one of PURPOSES; the same on every member.
        """
        if self.host and (shared := self.host.group(ranks, purpose, self.dispatcher)):
            return shared
        return self._network_group(ranks, purpose)

    def _network_group(self, ranks: Sequence[int], purpose: str) -> Group:
        is_world = purpose in ("all", "world", "meetings") and 1 < len(ranks) == self.world_size
        kind = World if is_world else Group
        return kind(
            ranks,
            self.rank,
            self.scratch,
            self._native_of(ranks),
            self.dispatcher,
            purpose=purpose,
        )

    def _native_of(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        if len(ranks) == 1 or self.device.type != "cuda":
            return None
        if len(ranks) == self.world_size:
            return dist.group.WORLD
        # Every member calls this with its own ranks; without the flag, all ranks of the world would.
        return dist.new_group(list(ranks), use_local_synchronization=True)  # type: ignore[no-any-return]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, by rank; all of one shape and type."""
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self.dispatcher.start(
            "all-gather", self._everyone, tensor, lambda: dist.all_gather(rows, tensor, async_op=True)
        ).wait()
        return rows
