"""The mesh: which rank is where, and the one door through which ranks exchange data.

Formed by the engine from a geometry; state, checkpoint and train call its collectives by axis.
With one rank along an axis nothing is sent and the same lines run. It never decides what to send.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
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
from sixfold.mesh.backend import join, start_copy, start_sum
from sixfold.mesh.cut import Copied, Cut
from sixfold.mesh.dispatch import Dispatcher, Pending
from sixfold.mesh.group import MEETING_TAGS, Group
from sixfold.mesh.host import Host, HostGroup
from sixfold.mesh.link import Link
from sixfold.mesh.pages import untouched_zeros
from sixfold.mesh.scratch import Scratch
from sixfold.plan.geometry import Geometry
from sixfold.plan.residency import GROUP, Spread

_TIES, _LINKS = 4, 5
"""Numbers of a rank's groups: of the data axis, its two levels and the world, then of tied weights and links.
Further sets of stages with tied weights meet over the network."""


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
            place = self.geometry.coordinate(rank, "data")
            key = (*self._others_of(rank), place // self.geometry.shard)
            neighbours.setdefault(key, []).append(rank)
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

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.geometry.world_size

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank feeds."""
        return self.geometry.coordinate(self.rank, "data")

    @property
    def data_ranks(self) -> int:
        """Parts that the global batch is divided into."""
        return self.geometry.degree("data")

    @property
    def pipe_rank(self) -> int:
        """Where this rank stands in its pipeline, from the input."""
        return self.geometry.coordinate(self.rank, "pipe")

    @property
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
            number, other = _LINKS + (low % 2 if high == low + 1 else 2), self.rank_at(pipe_rank)
            shared = self.host.link(other, number, self.dispatcher) if self.host else None
            self._links[pipe_rank] = shared or Link(self.rank, other, self.dispatcher)
        return self._links[pipe_rank]

    @cached_property
    def _links(self) -> dict[int, Link]:
        return {}

    def holders(self, pipe_ranks: Sequence[int], number: int) -> Group:
        """The ranks at several places of this rank's pipeline; each such group has the same number on all."""
        return self._group([self.rank_at(place) for place in pipe_ranks], _TIES + number)

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start to sum `tensor`, in place, over the data ranks."""
        if self.data_ranks == 1:
            return Pending()
        if self.data_ranks < self.world_size or (self.host and isinstance(self._data_group, HostGroup)):
            return self._data_group.all_reduce(tensor)
        return self._world_sum(tensor)

    def _meeting(self, tensor: torch.Tensor) -> Pending:
        """`all_reduce` over what all engines of a process have in common, the process group."""
        if self.data_ranks < self.world_size:
            return self._data_meetings.all_reduce(tensor.view(-1))
        return self._world_sum(tensor)

    def _world_sum(self, tensor: torch.Tensor) -> Pending:
        if self.world_size == 1:
            return Pending()
        return self.dispatcher.start("all-reduce", self._everyone, tensor, lambda: start_sum(tensor))

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

    @property
    def exchangeable(self) -> Scratch:
        """Buffers that exchanges send from without a copy, for gradients; what a sum was sent from is
        written again after `reclaim`."""
        return self.host.scratch if self.host else self.scratch

    def cut(
        self, numel: int, dtype: torch.dtype, spread: Spread, *, is_read: bool = False, is_blank: bool = False
    ) -> Cut:
        """Numbers [numel] cut over `spread`; whole for good where that is (). A collective.

        Args:
            is_read: whether others gather slices of what this rank keeps, by `spread_out`.
            is_blank: the whole is dropped before anything reads it; else it is zeros like the part.
        """
        if spread == GROUP and isinstance(self.shard, HostGroup):
            return self.shard.common(numel, dtype)
        size, place = numel // self.geometry.num_parts(spread), self.place_in(spread)
        if is_read:
            part = self.exchangeable.take(size, dtype).zero_()
        else:
            part = untouched_zeros(size, dtype, self.device)
        make, whole = torch.empty if is_blank else torch.zeros, part
        if spread:
            whole = make(numel, dtype=dtype, device=self.device)  # it comes and goes, so malloc has it
        return Copied(
            whole,
            part,
            slice(place * size, (place + 1) * size),
            lambda whole: self.spread_out(whole, spread, ()),
        )

    @cached_property
    def scratch(self) -> Scratch:
        """Buffers for the time of one exchange."""
        return Scratch(self.device)

    @cached_property
    def shard(self) -> Group:
        """The neighbours over which model state is cut; every rank asks for it first at the same point."""
        return self._group_of(lambda place: place // self.geometry.shard, 1)

    @cached_property
    def copies(self) -> Group:
        """The ranks that hold the same slices, one of each shard group."""
        return self._group_of(lambda place: place % self.geometry.shard, 2)

    @cached_property
    def _data_group(self) -> Group:
        return self._group_of(lambda place: 0, 0)

    @cached_property
    def _world_group(self) -> Group:
        is_cut = self.data_ranks < self.world_size
        return self._group(range(self.world_size), 3) if is_cut else self._data_group

    @cached_property
    def _data_meetings(self) -> Group:
        ranks = self._data_peers
        return Group(
            ranks,
            self.rank,
            self.scratch,
            self._native_of(ranks),
            self.dispatcher,
            lane=":meetings",
            tags=MEETING_TAGS,
        )

    def place_in(self, spread: Spread) -> int:
        """Which of the equal parts of something cut over `spread` is this rank's."""
        place = 0
        for axis in spread:
            group = self._group_along(axis)
            place = place * group.num_ranks + group.place
        return place

    def sum_up(self, partial: torch.Tensor, after: Spread, into: torch.Tensor | None = None) -> Pending:
        """Start to sum everyone's `partial`, in place: whole, or this rank's slice in its place.

        Args:
            into: where the slice goes instead; one pass over it less.
        """
        if not after:
            assert into is None, "a sum that is whole stays where it is"
            return self.all_reduce(partial)
        if self.copies.num_ranks == 1:
            return self.shard.reduce_scatter(partial, into)
        summed, mine = self.shard.reduce_scatter(partial), self.shard.slice_of(partial, self.shard.place)

        def across() -> None:
            summed.wait()
            if "data" in after:
                self.copies.reduce_scatter(mine, into).wait()
                return
            self.copies.all_reduce(mine).wait()
            if into is not None:
                into.copy_(mine)

        return Pending(finish=across)

    def spread_out(self, tensor: torch.Tensor, before: Spread, after: Spread) -> Pending:
        """Start to fill `tensor`, in place, from what each rank has of it.

        Args:
            tensor: what each rank shall have, cut over `after`; the part cut over `before` is in its place.
        """
        levels = [axis for axis in before if axis not in after]
        parts = [tensor]
        for axis in levels[:-1]:
            parts.append(self._group_along(axis).slice_of(parts[-1], self._group_along(axis).place))
        if not levels:
            return Pending()
        finest = self._group_along(levels[-1]).all_gather(parts[-1])
        if len(levels) == 1:
            return finest

        def outwards() -> None:
            finest.wait()
            for axis, part in zip(reversed(levels[:-1]), reversed(parts[:-1]), strict=True):
                self._group_along(axis).all_gather(part).wait()

        return Pending(finish=outwards)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """Start to copy one rank's `tensor` into everyone's, in place."""
        if self.world_size == 1:
            return Pending()
        return self.dispatcher.start("broadcast", self._everyone, tensor, lambda: start_copy(tensor, source))

    def align(self, tensor: torch.Tensor) -> Pending:
        """Start to copy the first data rank's `tensor` into those of all data ranks, in place."""
        if self.data_ranks == self.world_size:
            return self.broadcast(tensor)
        return self._data_group.broadcast(tensor)

    def total(self, *numbers: float) -> list[float]:
        """Sums of a few numbers over all ranks, in fp64, the same on every rank."""
        return self.start_total(*numbers)()

    def start_total(self, *numbers: float) -> Callable[[], list[float]]:
        """Start to sum a few numbers; the function returned waits for the sums."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        by_host = self.host and isinstance(self._world_group, HostGroup)
        pending = self._world_group.all_reduce(tensor) if by_host else self._world_sum(tensor)

        def sums() -> list[float]:
            pending.wait()
            return [float(number) for number in tensor.tolist()]

        return sums

    def largest(self, number: int) -> int:
        """The largest of the data ranks' numbers."""
        return round(max(row[0] for row in self.everyones(number)))

    def everyones(self, *numbers: float) -> list[list[float]]:
        """Each data rank's few numbers, by data rank; ranks that come from different engines meet too."""
        if self.data_ranks == 1:
            return [list(numbers)]
        table = torch.zeros(self.data_ranks, len(numbers), dtype=torch.float64, device=self.device)
        table[self.data_rank] = torch.tensor(numbers, dtype=torch.float64)
        self._meeting(table).wait()
        return [[float(number) for number in row] for row in table.tolist()]

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

    def _others_of(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands along all axes but data."""
        axes = (axis for axis, _ in self.geometry.degrees if axis != "data")
        return tuple(self.geometry.coordinate(rank, axis) for axis in axes)

    def _group_along(self, axis: str) -> Group:
        return self.shard if axis == "shard" else self.copies

    @cached_property
    def _data_peers(self) -> list[int]:
        here = self._others_of(self.rank)
        return [rank for rank in range(self.world_size) if self._others_of(rank) == here]

    def _group_of(self, key: Callable[[int], int], number: int) -> Group:
        """The data ranks whose place among them has the same key as this rank's; see `_group`."""
        data = self._data_peers
        return self._group(
            [rank for place, rank in enumerate(data) if key(place) == key(self.data_rank)], number
        )

    def _group(self, ranks: Sequence[int], number: int) -> Group:
        """Some ranks, this one among them.

        Args:
            number: tells the groups of a rank apart; the same on every member.
        """
        if self.host and number < _LINKS and (shared := self.host.group(ranks, number, self.dispatcher)):
            return shared
        return Group(ranks, self.rank, self.scratch, self._native_of(ranks), self.dispatcher)

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
            "all-gather", self._everyone, tensor, lambda: [dist.all_gather(rows, tensor, async_op=True)]
        ).wait()
        return rows
