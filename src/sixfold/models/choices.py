"""Rows of tokens sorted by the expert that each chose, and the way back.

Used by `models.moe`, and by `parallel.expert` where experts lie on several ranks. Rows are written where they
are wanted in one pass over memory, and summed in another. It knows neither experts' weights nor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Fill = Callable[[slice, Tensor], None]
"""Writes some rows of an order into a tensor [rows, width]."""


def slices_of(counts: Sequence[int], start: int = 0) -> list[slice]:
    """Which rows each has of those that lie one after the other from `start` on."""
    return [slice(*ends) for ends in pairwise(accumulate(counts, initial=start))]


@dataclass(frozen=True)
class Order:
    """A row for each choice that counts, sorted by expert and otherwise in order.

    Args:
        choices: number of each row's choice, token * num_choices + place.
        tokens: token of each row.
        by_token: rows, those of one token together and in the order of its choices.
        starts: where those of each token begin.
        counts: rows of each expert.
        num_choices: of each token.
    """

    choices: Tensor
    tokens: Tensor
    by_token: Tensor
    starts: Tensor
    counts: list[int]
    num_choices: int

    @classmethod
    def by_expert(cls, experts: Tensor, num_experts: int) -> Order:
        """Sort the choices of tokens.

        Args:
            experts: [tokens, choices]; a choice of `num_experts` counts for nothing.
        """
        flat = experts.flatten()
        counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
        choices = flat.argsort(stable=True)[: sum(counts)]
        tokens = choices // experts.shape[1]
        per_token = torch.bincount(tokens, minlength=len(experts))
        starts = per_token.cumsum(0) - per_token
        return cls(choices, tokens, choices.argsort(), starts, counts, experts.shape[1])

    def filling(self, tokens: Tensor) -> Fill:
        """What writes rows of tokens [tokens, width]."""

        def fill(where: slice, into: Tensor) -> None:
            torch.index_select(tokens, 0, self.tokens[where], out=into)

        return fill

    def summed(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The rows [rows, width] of each token, times weights [rows], summed: [tokens, width]."""
        weights = None if weights is None else weights[self.by_token]
        return F.embedding_bag(self.by_token, rows, self.starts, mode="sum", per_sample_weights=weights)

    def take(self, tokens: Tensor) -> Tensor:
        """The rows of tokens [tokens, width]."""
        rows: Tensor = _Taken.apply(tokens, self)  # type: ignore[no-untyped-call]
        return rows

    def put_back(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The rows [rows, width] of each token, times weights [tokens, choices], summed: [tokens, width]."""
        out: Tensor = _PutBack.apply(rows, weights, self)  # type: ignore[no-untyped-call]
        return out


class Weighted:
    """Rows summed with weights, forward and backward.

    Args:
        rows: [rows, width].
        weights: [tokens, choices].
    """

    def __init__(self, order: Order, rows: Tensor, weights: Tensor) -> None:
        self._order, self._rows, self._weights = order, rows, weights
        self._by_row = weights.flatten()[order.choices].to(rows.dtype)
        self._gradients = torch.empty_like(self._by_row)

    def sum(self) -> Tensor:
        """[tokens, width]."""
        return self._order.summed(self._rows, self._by_row)

    def filling(self, gradient: Tensor) -> Fill:
        """What writes gradients of rows, from that of the sum."""
        taking = self._order.filling(gradient)

        def fill(where: slice, into: Tensor) -> None:
            taking(where, into)
            self._gradients[where] = torch.linalg.vecdot(into, self._rows[where])
            into.mul_(self._by_row[where].unsqueeze(1))

        return fill

    def of_weights(self) -> Tensor:
        """Gradients of weights, once those of all rows are written."""
        made = torch.zeros_like(self._weights)
        made.view(-1)[self._order.choices] = self._gradients.to(made.dtype)
        return made


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order) -> Tensor:
        ctx.order = order
        rows = tokens.new_empty(len(order.tokens), tokens.shape[1])
        order.filling(tokens)(slice(None), rows)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.order.summed(gradient.contiguous()), None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.order = order
        return Weighted(order, rows, weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        weighted, of_rows = Weighted(ctx.order, rows, weights), torch.empty_like(rows)
        weighted.filling(gradient)(slice(None), of_rows)
        return of_rows, weighted.of_weights(), None
