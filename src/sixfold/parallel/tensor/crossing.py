"""Crossings: what happens to activations, and to their gradients on the way back, where an axis begins or
ends.

The modules that change a model for the tensor axis put them around layers. A crossing is a pair of
operations over the ranks of the axis, one for each direction, as data; the way back of one is the way there
of another, so gradients of gradients cross as well. It decides nothing and holds no state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Started(Protocol):
    """An exchange under way."""

    def wait(self) -> object:
        """Block until the tensor may be used."""


class Axis(Protocol):
    """The ranks along one axis, as `mesh.Group` is."""

    @property
    def num_ranks(self) -> int:
        """How many."""

    @property
    def place(self) -> int:
        """This one's, from 0."""

    def all_reduce(self, whole: Tensor) -> Started:
        """Start to sum a flat tensor, in place."""

    def all_gather(self, whole: Tensor) -> Started:
        """Start to fill a flat tensor with everyone's equal slice."""

    def reduce_scatter(self, whole: Tensor) -> Started:
        """Start to sum everyone's flat tensor; this member's slice of it ends in its place."""


Operation = Literal["same", "sum", "gather", "part", "scatter"]
SUMS = ("sum", "scatter")
"""Those that add up what ranks have."""
State = Literal["whole", "cut", "partial"]
"""What the ranks of an axis have of an activation, or of its gradient: all of it each, a part each, or a
summand each."""

BETWEEN: dict[Operation, tuple[State, State]] = {
    "sum": ("partial", "whole"),
    "gather": ("cut", "whole"),
    "part": ("whole", "cut"),
    "scatter": ("partial", "cut"),
}
"""What an operation takes, and what it gives; "same" gives what it is given."""


@dataclass(frozen=True)
class Crossing:
    """What is done to an activation and to its gradient.

    Args:
        there: to the activation. "same": nothing; "sum": over the ranks; "gather": their parts of one dim,
            one behind the other; "part": this rank's part is kept; "scatter": summed, and this rank's part
            kept.
        back: to its gradient.
    """

    there: Operation
    back: Operation


COPIED = Crossing("same", "sum")
"""Every rank has it whole, and goes on with another part of the work."""
SUMMED = Crossing("sum", "same")
"""Every rank has a summand; from here on all do the same."""
GATHERED = Crossing("gather", "part")
"""Every rank has a part; from here on all do the same."""
PARTED = Crossing("part", "gather")
"""All have the same; from here on each has a part."""
OPENED = Crossing("gather", "scatter")
"""Every rank has a part, gets the whole, and goes on with another part of the work on it."""
CLOSED = Crossing("scatter", "gather")
"""Every rank has a summand of the whole, and goes on with a part of the sum."""
IN_SEQUENCE = {COPIED: OPENED, SUMMED: CLOSED}
"""Between blocks where each rank keeps its part of the sequence alone, instead."""


def offered(operation: Operation, num_bytes: int, num_ranks: int) -> dict[str, int]:
    """Bytes that a rank offers the others in one operation, by kind.

    Args:
        num_bytes: of the whole tensor.
    """
    part = -(-num_bytes // num_ranks)
    kinds: dict[Operation, dict[str, int]] = {
        "sum": {"sums": num_bytes, "slices": part},
        "gather": {"slices": part},
        "scatter": {"sums": num_bytes},
    }
    return kinds.get(operation, {})


def bounds(total: int, num_ranks: int, place: int) -> tuple[int, int]:
    """(start, stop) of the part that the rank at `place` has of `total` things in order."""
    return place * total // num_ranks, (place + 1) * total // num_ranks


def cross(x: Tensor, crossing: Crossing, axis: Axis, dim: int = -1, total: int | None = None) -> Tensor:
    """`x` beyond a crossing.

    Args:
        dim: the one of which ranks have parts.
        total: its size where it is gathered from unequal parts; None: all are as large as this one.
    """
    if axis.num_ranks == 1:
        return x
    crossed: Tensor = _crossed(x, crossing, axis, dim, total)
    return crossed


# A compiled block is cut in two here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _crossed(x: Tensor, crossing: Crossing, axis: Axis, dim: int, total: int | None) -> Tensor:
    way = crossing.there, crossing.back, axis, dim, total
    crossed: Tensor = _Cross.apply(x, *way)  # type: ignore[no-untyped-call]
    return crossed


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Operation, back: Operation, axis: Axis, dim: int, total: int | None
    ) -> Tensor:
        if there in ("part", "scatter"):
            total = x.shape[dim]
        elif there == "gather" and total is None:
            total = x.shape[dim] * axis.num_ranks
        ctx.way_back = back, there, axis, dim, total
        return exchange(x, there, axis, dim, total or 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        crossed: Tensor = _Cross.apply(gradient, *ctx.way_back)  # type: ignore[no-untyped-call]
        return crossed, None, None, None, None, None


def exchange(x: Tensor, operation: Operation, axis: Axis, dim: int, total: int) -> Tensor:
    """One operation over the ranks, without a way back.

    Args:
        total: the size of `dim` in the whole.
    """
    if operation == "same":
        return x
    _AXES[id(axis)] = axis
    exchanged: Tensor = _exchange(x, operation, id(axis), dim, total)
    return exchanged


_AXES: WeakValueDictionary[int, Axis] = WeakValueDictionary()


# One operation for torch too: what recompute compares between a forward and its second run are then the
# operations of the model, not those that happen to be needed to carry an exchange.
@torch.library.custom_op("sixfold::exchange", mutates_args=())
def _exchange(x: Tensor, operation: str, axis: int, dim: int, total: int) -> Tensor:
    return _DO[operation](x, _AXES[axis], dim, total)


def _sum(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    summed = x.clone(memory_format=torch.contiguous_format)
    axis.all_reduce(summed.view(-1)).wait()
    return summed


def _part(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    start, stop = bounds(total, axis.num_ranks, axis.place)
    return x.narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)


def _gather(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    mine = x.movedim(dim, 0)
    rows = mine.new_empty((axis.num_ranks, -(-total // axis.num_ranks), *mine.shape[1:]))
    rows[axis.place, : len(mine)] = mine
    axis.all_gather(rows.view(-1)).wait()
    return _joined(rows, total).movedim(0, dim).contiguous()


def _joined(rows: Tensor, total: int) -> Tensor:
    """Everyone's rows, one behind the other, without what fills up the shorter ones."""
    num_ranks = len(rows)
    if total == num_ranks * rows.shape[1]:
        return rows.flatten(0, 1)
    sizes = [stop - start for start, stop in (bounds(total, num_ranks, place) for place in range(num_ranks))]
    return torch.cat([part[:size] for part, size in zip(rows, sizes, strict=True)])


def _scatter(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    whole = x.movedim(dim, 0)
    rows = whole.new_zeros((axis.num_ranks, -(-total // axis.num_ranks), *whole.shape[1:]))
    for place, row in enumerate(rows):
        start, stop = bounds(total, axis.num_ranks, place)
        row[: stop - start] = whole[start:stop]
    axis.reduce_scatter(rows.view(-1)).wait()
    start, stop = bounds(total, axis.num_ranks, axis.place)
    return rows[axis.place, : stop - start].movedim(0, dim).contiguous()


_DO: dict[str, Callable[[Tensor, Axis, int, int], Tensor]] = {
    "sum": _sum,
    "gather": _gather,
    "part": _part,
    "scatter": _scatter,
}
