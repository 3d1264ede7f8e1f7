"""Ranks that hold the same parameters, and how state of these is cut over them and put together.

Made by the mesh, one for each set of axes along which parameters themselves are cut; the state engine's units
exchange through it. With one rank nothing is sent and the same lines run. It never decides what is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod

import torch

from sixfold.mesh.cut import Copied, Cut
from sixfold.mesh.dispatch import NOTHING, InTurn, Pending
from sixfold.mesh.group import Group
from sixfold.mesh.host import HostGroup
from sixfold.mesh.host.common import Common, renew
from sixfold.mesh.pages import untouched_zeros
from sixfold.mesh.scratch import Scratch
from sixfold.plan.residency import GROUP, Spread


class Replicas:
    """This rank among its replicas.

    Args:
        ranks: all of them, in order.
        place: which of them this rank is.
        shard: those in one of the equal groups of neighbours that they are split into.
        make: a group of some ranks and what it is for: "all", "shard" or "copies". Every rank asks for each
            at the same point.
        exchangeable: see `Mesh.exchangeable`.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        place: int,
        shard: int,
        make: Callable[[Sequence[int], str], Group],
        exchangeable: Scratch,
        device: torch.device,
    ) -> None:
        self.exchangeable = exchangeable
        self.device = device
        self._ranks = ranks
        self._place = place
        self._size = shard
        self._make = make

    @property
    def num_ranks(self) -> int:
        """How many."""
        return len(self._ranks)

    @cached_property
    def all(self) -> Group:
        """All of them."""
        return self._make(self._ranks, "all")

    @cached_property
    def shard(self) -> Group:
        """The neighbours over which model state is cut."""
        first = self._place - self._place % self._size
        return self._make(self._ranks[first : first + self._size], "shard")

    @cached_property
    def copies(self) -> Group:
        """The ranks that hold the same slices, one of each shard group."""
        return self._make(self._ranks[self._place % self._size :: self._size], "copies")

    def _along(self, axis: str) -> Group:
        return self.shard if axis == "shard" else self.copies

    def num_parts(self, spread: Spread) -> int:
        """Equal parts of something cut over `spread`."""
        parts = {"shard": self._size, "data": len(self._ranks) // self._size}
        return prod(parts[axis] for axis in spread)

    def place_in(self, spread: Spread) -> int:
        """Which of these is this rank's."""
        places = {"shard": self._place % self._size, "data": self._place // self._size}
        place = 0
        for axis in spread:
            place = place * self.num_parts((axis,)) + places[axis]
        return place

    def cut(
        self, numel: int, dtype: torch.dtype, spread: Spread, *, is_read: bool = False, is_blank: bool = False
    ) -> Cut:
        """Numbers [numel] cut over `spread`; whole for good where that is (). A collective.

        Args:
            is_read: whether others gather slices of what this rank keeps, by `spread_out`.
            is_blank: the whole is dropped before anything reads it; else it is zeros like the part.
        """
        if (sharing := self._sharing(spread)) is not None:
            return sharing.common(numel, dtype)
        size, place = numel // self.num_parts(spread), self.place_in(spread)
        if is_read:
            part = self.exchangeable.take(size, dtype).zero_()
        else:
            part = untouched_zeros(size, dtype, self.device)
        make, whole = torch.empty if is_blank else torch.zeros, part
        if spread:
            whole = make(numel, dtype=dtype, device=self.device)  # it comes and goes, so malloc has it
        filling = self.prepare_spread_out([whole], spread, ())
        return Copied(whole, part, slice(place * size, (place + 1) * size), filling)

    # Each may be prepared once and started for every update, or be started at once.

    def prepare_sum_up(
        self, partial: torch.Tensor, after: Spread, into: torch.Tensor | None = None
    ) -> Pending:
        """Sum everyone's `partial`, in place: whole, or this rank's slice in its place.

        Args:
            into: where the slice goes instead; one pass over it less.
        """
        if not after:
            assert into is None, "a sum that is whole stays where it is"
            return self.all.prepare_all_reduce(partial)
        if self.copies.num_ranks == 1:
            return self.shard.prepare_reduce_scatter(partial, into)
        mine = self.shard.slice_of(partial, self.shard.place)
        steps = [self.shard.prepare_reduce_scatter(partial)]
        if "data" in after:
            steps.append(self.copies.prepare_reduce_scatter(mine, into))
        else:
            steps.append(self.copies.prepare_all_reduce(mine))
            if into is not None:
                steps.append(Pending(functools.partial(into.copy_, mine)))
        return InTurn(steps)

    def prepare_spread_out(self, tensors: Sequence[torch.Tensor], before: Spread, after: Spread) -> Pending:
        """Fill `tensors`, of one type, in place, from what each rank has of them.

        Args:
            tensors: what each rank shall have, cut over `after`; the parts cut over `before` are in place.
        """
        steps: list[Pending] = []
        for axis in before:
            if axis not in after:
                group = self._along(axis)
                steps.insert(0, group.prepare_all_gather(*tensors))  # the finest level comes first
                tensors = [group.slice_of(tensor, group.place) for tensor in tensors]
        return InTurn(steps) if len(steps) > 1 else next(iter(steps), NOTHING)

    def prepare_publish(self, cuts: Sequence[Cut], before: Spread, after: Spread) -> Pending:
        """Let everyone gather what is in the `part` of each of `cuts`, of one type. When it has ended, nobody
        reads what was published before.

        Args:
            before: over what the parts are cut where they have been written; filled from there.
            after: over what they are cut.
        """
        filling = self.prepare_spread_out([cut.part for cut in cuts], before, after)
        if (sharing := self._sharing(after)) is None:
            return filling

        commons = [cut for cut in cuts if isinstance(cut, Common)]
        steps = [Pending(functools.partial(renew, commons)), sharing.prepare_meeting()]
        return InTurn(steps if filling is NOTHING else [filling, *steps])

    def sum_up(self, partial: torch.Tensor, after: Spread, into: torch.Tensor | None = None) -> Pending:
        """Start `prepare_sum_up`."""
        return self.prepare_sum_up(partial, after, into).start()

    def spread_out(self, tensor: torch.Tensor, before: Spread, after: Spread) -> Pending:
        """Start `prepare_spread_out`."""
        return self.prepare_spread_out([tensor], before, after).start()

    def align(self, tensor: torch.Tensor) -> Pending:
        """Start to copy the first one's `tensor` into everyone's, in place."""
        return self.all.broadcast(tensor)

    def _sharing(self, spread: Spread) -> HostGroup | None:
        """Ranks in whose common memory what is cut over `spread` is whole."""
        return self.shard if spread == GROUP and isinstance(self.shard, HostGroup) else None
