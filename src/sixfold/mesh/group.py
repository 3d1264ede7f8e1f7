"""Some of the ranks, and what they exchange: equal slices of flat tensors, or a tensor for each member.

Made by the mesh. Without a native backend (gloo) sums and gathers go from member to member (`carriers.py`),
and sums are taken in one fixed order. A group of one rank sends nothing and runs the same lines. It never
decides what to exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from sixfold.base.ring import ranks_text
from sixfold.mesh.backend import Piece, copy_call, piece_calls, start_swap, sum_call
from sixfold.mesh.carriers import in_turn, swap, swap_sum
from sixfold.mesh.dispatch import Call, Carrier, Dispatcher, Pending
from sixfold.mesh.scratch import Scratch

_UPDATE = ("all", "shard", "copies", "world", "ties")
PURPOSES = (
    *_UPDATE,
    *("link even", "link odd", "link round", "meetings"),
    *("expert all", "expert shard", "expert copies"),
    *("tensor axis", "context axis", "expert axis"),
)
"""What the groups and links of a rank are for, one of each at most: replicas and their two levels, everyone,
tied weights; neighbours in a pipeline; meetings; replicas of experts; axes of the mesh."""


def lane_of(purpose: str) -> str:
    """What tells exchanges apart that others of the same ranks may overtake. Those of an update come in one
    order; those inside forward and backward do not wait for them."""
    return "" if purpose in _UPDATE else f":{purpose}"


class Group:
    """Ranks that exchange slices.

    Args:
        ranks: its members in order.
        rank: this process, one of them.
        scratch: where arriving slices are put. What lies there is sent without a copy.
        native: the process group of a backend whose own collectives are used; None for point-to-point.
        dispatcher: what its exchanges go through; None: one of its own.
        purpose: one of PURPOSES.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        scratch: Scratch,
        native: dist.ProcessGroup | None,
        dispatcher: Dispatcher | None = None,
        *,
        purpose: str = "all",
    ) -> None:
        self.place = ranks.index(rank)
        self.num_ranks = len(ranks)
        # Tags keep point-to-point sums and gathers apart; the collectives of a backend share one order.
        lane, number = lane_of(purpose), PURPOSES.index(purpose)
        lanes = (f"{lane}:sums", f"{lane}:gathers") if native is None else (lane, lane)
        self._reduce_tag, self._gather_tag = 2 * number + 1, 2 * number + 2
        self._everyone = ranks_text(ranks) + lane
        self._sums, self._gathers = (ranks_text(ranks) + each for each in lanes)
        self._dispatcher = dispatcher or Dispatcher()
        self._ranks = ranks
        self.scratch = scratch
        self._native = native

    def slice_of(self, whole: torch.Tensor, place: int) -> torch.Tensor:
        """The part of `whole` that belongs to the member at `place`, contiguous; the last members' may be
        shorter."""
        size = -(-whole.numel() // self.num_ranks)
        return whole[place * size : (place + 1) * size]

    # Each may be prepared once and started for every update, or be started at once.

    def prepare_reduce_scatter(self, whole: torch.Tensor, into: torch.Tensor | None = None) -> Pending:
        """Sum everyone's `whole` into slices.

        Args:
            into: where this member's goes, [size]; None: into its place in `whole`.
        """
        mine = self.slice_of(whole, self.place)
        into = mine if into is None else into
        if self.num_ranks == 1:
            return Pending(None if into is mine else partial(into.copy_, mine))
        return self._dispatcher.prepare("reduce-scatter", self._sums, whole, self._summing(whole, into))

    def prepare_all_gather(self, *wholes: torch.Tensor) -> Pending:
        """Fill `wholes`, of one type, with everyone's slices; this member's lie in their places already."""
        if self.num_ranks == 1:
            return Pending()
        return self._dispatcher.prepare("all-gather", self._gathers, wholes, self._filling(*wholes))

    def prepare_all_reduce(self, whole: torch.Tensor) -> Pending:
        """Sum `whole`, in place: the same bits on every member."""
        if self.num_ranks == 1:
            return Pending()
        return self._dispatcher.prepare("all-reduce", self._sums, whole, self._reducing(whole))

    def reduce_scatter(self, whole: torch.Tensor, into: torch.Tensor | None = None) -> Pending:
        """Start `prepare_reduce_scatter`."""
        return self.prepare_reduce_scatter(whole, into).start()

    def all_gather(self, whole: torch.Tensor) -> Pending:
        """Start `prepare_all_gather`."""
        return self.prepare_all_gather(whole).start()

    def all_reduce(self, whole: torch.Tensor) -> Pending:
        """Start `prepare_all_reduce`."""
        return self.prepare_all_reduce(whole).start()

    def broadcast(self, tensor: torch.Tensor) -> Pending:
        """Start to copy the first member's `tensor` into everyone's, in place."""
        if self.num_ranks == 1:
            return Pending()
        return self._dispatcher.start("broadcast", self._gathers, tensor, *self._copy_first(tensor))

    def all_to_all(self, sent: Sequence[torch.Tensor], arriving: Sequence[torch.Tensor]) -> Pending:
        """Start to send a tensor to each member and to fill one from each; this member's own is copied.

        To pass something round a ring, all but what goes to one neighbour and comes from the other is empty.

        Args:
            sent: by place, of one type, contiguous, each of its own size; left alone until the end. What lies
                in `scratch` is given back to it, which knows when the others have read it.
            arriving: by place, as what that member sends here.
        """
        return self.deal(sent, [[each] for each in arriving])

    def deal(self, sent: Sequence[torch.Tensor], arriving: Sequence[Sequence[torch.Tensor]]) -> Pending:
        """`all_to_all`, where what comes goes to several places.

        Args:
            arriving: by place, the pieces that what that member sends here is cut into, in its order; each is
                contiguous.
        """
        lay(sent[self.place], arriving[self.place])
        if self.num_ranks == 1:
            return Pending()
        leaving = [sent[place] for place, _ in self._others()]
        carrier = self._dealing(sent, arriving)
        return self._dispatcher.prepare("all-to-all", self._gathers, leaving, carrier).start()

    def _copy_first(self, tensor: torch.Tensor) -> list[Call]:
        first = self._ranks[0]
        if self._native is not None:
            return [copy_call(tensor, first, self._native)]
        if self.place > 0:
            return piece_calls([(first, tensor)], (), self._gather_tag)
        return piece_calls((), [(rank, tensor) for _, rank in self._others()], self._gather_tag)

    # How sums into slices, sums and gathers of slices are carried.

    def _summing(self, whole: torch.Tensor, into: torch.Tensor) -> Carrier:
        if self._native is not None:
            call = partial(dist.reduce_scatter_tensor, into, whole, group=self._native, async_op=True)
            return Carrier([call], lingers=True)
        sent = [(rank, self.slice_of(whole, place)) for place, rank in self._others()]
        return swap_sum(self._reduce_tag, sent, self.slice_of(whole, self.place), into, self.scratch)

    def _reducing(self, whole: torch.Tensor) -> Carrier:
        if self._native is not None:
            return Carrier([sum_call(whole, self._native)], lingers=True)
        return in_turn(self._summing(whole, self.slice_of(whole, self.place)), self._filling(whole))

    def _filling(self, *wholes: torch.Tensor) -> Carrier:
        if self._native is not None:
            call = partial(dist.all_gather_into_tensor, group=self._native, async_op=True)
            calls = [partial(call, whole, self.slice_of(whole, self.place)) for whole in wholes]
            return Carrier(calls, lingers=True)
        arriving: list[Piece] = []
        sent: list[Piece] = []
        for whole in wholes:
            mine = self.slice_of(whole, self.place)
            for place, rank in self._others():
                arriving.append((rank, self.slice_of(whole, place)))
                sent.append((rank, mine))
        return swap(self._gather_tag, arriving, sent)

    def _dealing(self, sent: Sequence[torch.Tensor], arriving: Sequence[Sequence[torch.Tensor]]) -> Carrier:
        others = self._others()
        landing = {
            place: whole[0] if len(whole) == 1 else self._place_for(whole, sent[place].dtype)
            for place, whole in ((place, arriving[place]) for place, _ in others)
        }

        def finish() -> None:
            for place, whole in landing.items():
                if len(arriving[place]) != 1:
                    lay(whole, arriving[place])
                    self.scratch.give(whole)

        coming = [(rank, landing[place]) for place, rank in others]
        leaving = [(rank, sent[place]) for place, rank in others]
        call = partial(start_swap, coming, leaving, self._gather_tag, self._native)
        return Carrier([call], finish, lingers=self._native is not None)

    def _place_for(self, pieces: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return self.scratch.take(sum(piece.numel() for piece in pieces), dtype)

    def _others(self) -> list[tuple[int, int]]:
        return [(place, rank) for place, rank in enumerate(self._ranks) if place != self.place]


def lay(whole: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    """Copy contiguous numbers into pieces, one after the other."""
    flat = whole.view(-1)
    for piece, part in zip(pieces, torch.split(flat, [each.numel() for each in pieces]), strict=True):
        piece.view(-1).copy_(part)


class World(Group):
    """All ranks, over the network: sums and copies of whole tensors are the backend's own."""

    def prepare_all_reduce(self, whole: torch.Tensor) -> Pending:
        """Sum `whole`, in place: the same bits on every member."""
        carrier = Carrier([sum_call(whole)], lingers=True)
        return self._dispatcher.prepare("all-reduce", self._everyone, whole, carrier)

    def broadcast(self, tensor: torch.Tensor) -> Pending:
        """Start to copy the first member's `tensor` into everyone's, in place."""
        return self._dispatcher.start("broadcast", self._everyone, tensor, copy_call(tensor, 0))
