"""Rows of one layer on their way between the ranks that chose experts and those that have them.

Used by `expert.axis`, one journey for each forward of a layer. Rows are written straight to where they leave
from and land where they are computed on, so that nothing is sorted twice. It chooses no experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sixfold.mesh import Group, Pending
from sixfold.models.choices import Fill, Order, Weighted, slices_of


class Journey:
    """Rows that go out to experts and come back, and their gradients, which do the same.

    Where they are chosen they are in the order's order, those for one member together. Where experts are,
    those of one expert are together, in the order of members. In backward gradients leave where rows arrived
    and are waited for where they left; so what is computed meanwhile hides an exchange in both directions.

    Args:
        group: ranks that have the experts of a layer between them, equally many each, in order.
        order: of this rank's rows.
        device: where the backend of the group takes tensors from.

    Attributes:
        counts: of rows that come here, by expert here.
    """

    def __init__(self, group: Group, order: Order, device: torch.device) -> None:
        self._group, self._order = group, order
        leaving = torch.tensor(order.counts, device=device).view(group.num_ranks, -1)
        arriving = torch.empty_like(leaving)
        group.all_to_all(list(leaving), list(arriving)).wait()
        share = leaving.shape[1]
        by_member = [order.counts[first : first + share] for first in range(0, len(order.counts), share)]
        self._leaving = [sum(counts) for counts in by_member]
        self._own = by_member[group.place]
        self._arriving: list[list[int]] = arriving.tolist()
        self.counts = [sum(counts) for counts in zip(*self._arriving, strict=True)]
        self._under_way: tuple[Pending, Tensor, Tensor] | None = None

    def go(self, leg: str, x: Tensor) -> Tensor:
        """One leg of the way out and back; see `_LEGS`."""
        _JOURNEYS[id(self)] = self
        there: Tensor = _leg(x, id(self), leg)
        return there

    def send(self, tokens: Tensor) -> Tensor:
        """Start to send rows of tokens [tokens, width]; returns a receipt."""
        receipt: Tensor = _Send.apply(tokens, self)  # type: ignore[no-untyped-call]
        return receipt

    def receive(self, receipt: Tensor) -> Tensor:
        """The rows that came."""
        rows: Tensor = _Receive.apply(receipt, self)  # type: ignore[no-untyped-call]
        return rows

    def bring_back(self, made: Tensor, weights: Tensor) -> Tensor:
        """What experts made of them, summed with weights [tokens, choices]: [tokens, width]."""
        out: Tensor = _BringBack.apply(made, weights, self)  # type: ignore[no-untyped-call]
        return out

    def go_out(self, fill: Fill, like: Tensor) -> None:
        """Start one direction.

        Args:
            fill: writes the rows.
            like: what they are like.
        """
        came = like.new_empty(sum(self.counts), like.shape[1])
        pieces, here = self._pieces(came), self._group.place
        ranges = slices_of(self._leaving)
        lent, parts = self._leaving_parts(self._leaving, like)
        for where, part in zip(ranges, parts, strict=True):
            if len(part):
                fill(where, part)
        self._start(parts, pieces, lent, came)
        for where, piece in zip(slices_of(self._own, ranges[here].start), pieces[here], strict=True):
            fill(where, piece)

    def go_back(self, rows: Tensor) -> None:
        """Start the other direction."""
        came = rows.new_empty(len(self._order.tokens), rows.shape[1])
        landing, here = torch.split(came, self._leaving), self._group.place
        pieces = self._pieces(rows)
        lent, parts = self._leaving_parts([sum(counts) for counts in self._arriving], rows)
        for part, those in zip(parts, pieces, strict=True):
            if len(part):
                torch.cat(those, out=part)
        self._start(parts, [[each] for each in landing], lent, came)
        torch.cat(pieces[here], out=landing[here])

    def end(self) -> Tensor:
        """Wait for it; what came."""
        assert self._under_way is not None, "started before"
        (pending, lent, came), self._under_way = self._under_way, None
        pending.wait()
        self._group.scratch.give(lent)
        return came

    @property
    def order(self) -> Order:
        """Of this rank's rows."""
        return self._order

    def _start(
        self, parts: Sequence[Tensor], landing: Sequence[Sequence[Tensor]], lent: Tensor, came: Tensor
    ) -> None:
        here = self._group.place  # its own rows do not travel
        elsewhere = [() if place == here else each for place, each in enumerate(landing)]
        self._under_way = self._group.deal(parts, elsewhere), lent, came

    def _leaving_parts(self, counts: Sequence[int], like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Where rows are sent from: all of it, and a part for each member; none for this rank."""
        width, away = like.shape[1], list(counts)
        away[self._group.place] = 0
        lent = self._group.scratch.take(sum(away) * width, like.dtype)
        return lent, list(torch.split(lent.view(-1, width), away))

    def _pieces(self, rows: Tensor) -> list[list[Tensor]]:
        """Of rows where experts are those of each member, expert by expert."""
        by_expert = [count for counts in zip(*self._arriving, strict=True) for count in counts]
        pieces, num = torch.split(rows, by_expert), self._group.num_ranks
        return [list(pieces[place::num]) for place in range(num)]


def _leave(journey: Journey, tokens: Tensor) -> Tensor:
    journey.go_out(journey.order.filling(tokens), tokens)
    return tokens.new_empty(0)


def _return(journey: Journey, made: Tensor) -> Tensor:
    journey.go_back(made)
    return journey.end()


_LEGS: dict[str, Callable[[Journey, Tensor], Tensor]] = {
    "leave": _leave,
    "arrive": lambda journey, _receipt: journey.end(),
    "return": _return,
}
_JOURNEYS: WeakValueDictionary[int, Journey] = WeakValueDictionary()


# One operation for torch, as in `tensor.crossing`: recompute compares those of a forward and of its second
# run, and what it takes to carry rows may differ between them.
@torch.library.custom_op("sixfold::journey", mutates_args=())
def _leg(x: Tensor, journey: int, leg: str) -> Tensor:
    return _LEGS[leg](_JOURNEYS[journey], x)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.go("leave", tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _receipt: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.order.summed(ctx.journey.end()), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receipt: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.go("arrive", receipt)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.journey.go_back(gradient)
        return gradient.new_empty(0), None


class _BringBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, weights: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        rows = journey.go("return", made)
        ctx.save_for_backward(rows, weights)
        return Weighted(journey.order, rows, weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weighted = Weighted(ctx.journey.order, *ctx.saved_tensors)
        ctx.journey.go_out(weighted.filling(gradient), gradient)
        return ctx.journey.end(), weighted.of_weights(), None
