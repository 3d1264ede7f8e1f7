"""Products of groups of rows with stacked weights, and bringing rows into groups and back.

What experts compute: tokens sorted by expert, each group multiplied with that expert's matrix. torch's own
grouped product is used where it runs; elsewhere one product after the other, with the same result. Plain
functions of tensors; nothing here knows of routers or of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPED_BYTES = 16
"""What rows of both operands of torch's grouped product are a multiple of."""


@dataclass(frozen=True)
class Order:
    """Where the choices of all tokens stand once they are sorted by expert.

    Args:
        choices: numbers of the choices that count, sorted by expert and otherwise in order; choice c is one
            of token c // num_choices.
        counts: of choices by expert.
        num_choices: of each token.
    """

    choices: Tensor
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
        return cls(flat.argsort(stable=True)[: sum(counts)], counts, experts.shape[1])

    def take(self, tokens: Tensor) -> Tensor:
        """The row of each choice, from those of tokens [tokens, width]."""
        rows: Tensor = _Taken.apply(tokens, self)  # type: ignore[no-untyped-call]
        return rows

    def put_back(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows [choices, width] of each token, weighted by [tokens, choices] and summed: [tokens, width]."""
        spread = self.spread(rows, len(weights))
        return (spread * weights.to(rows.dtype).unsqueeze(2)).sum(1)

    def spread(self, rows: Tensor, num_tokens: int) -> Tensor:
        """Rows [choices, width] in the places of their tokens, [tokens, num_choices, width]; 0 elsewhere."""
        places = num_tokens * self.num_choices
        make = rows.new_zeros if places > len(rows) else rows.new_empty
        put = make(places, rows.shape[1]).index_copy_(0, self.choices, rows)
        return put.view(num_tokens, self.num_choices, rows.shape[1])


class _Taken(torch.autograd.Function):
    """Rows of tokens; the gradients of a token's rows are summed in one fixed order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order) -> Tensor:
        ctx.order, ctx.num_tokens = order, len(tokens)
        return tokens.index_select(0, order.choices // order.num_choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.order.spread(gradient, ctx.num_tokens).sum(1), None


def grouped_product(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """`rows[i] @ weight[g].T` for the rows of each group g.

    Args:
        rows: [rows, in], those of a group together and groups in order.
        weight: [groups, out, in].
        counts: rows of each group.

    Returns:
        [rows, out].
    """
    if is_groupable(rows, weight):
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows.device)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    product: Tensor = _Grouped.apply(rows, weight, counts)  # type: ignore[no-untyped-call]
    return product


def is_groupable(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these, and is faster: on a CPU it is a loop as well."""
    widths = (rows.shape[1] * rows.itemsize, weight.shape[1] * weight.itemsize)
    return (
        rows.device.type != "cpu"
        and rows.dtype == weight.dtype
        and rows.dtype in GROUPED_DTYPES
        and not any(width % GROUPED_BYTES for width in widths)
    )


class _Grouped(torch.autograd.Function):
    """The reference: a product for each group."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        product = rows.new_empty(rows.shape[0], weight.shape[1])
        for piece, matrix, into in zip(
            torch.split(rows, counts), weight, torch.split(product, counts), strict=True
        ):
            torch.mm(piece, matrix.t(), out=into)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wants_rows, wants_weight, _ = ctx.needs_input_grad
        of_rows = torch.empty_like(rows) if wants_rows else None
        of_weight = torch.empty_like(weight) if wants_weight else None
        parts = zip(torch.split(gradient, ctx.counts), torch.split(rows, ctx.counts), strict=True)
        start = 0
        for group, (piece, inputs) in enumerate(parts):
            if of_rows is not None:
                torch.mm(piece, weight[group], out=of_rows[start : start + len(piece)])
            if of_weight is not None:
                torch.mm(piece.t(), inputs, out=of_weight[group])
            start += len(piece)
        return of_rows, of_weight, None


def gated(packed: Tensor) -> Tensor:
    """`silu(gate) * up` of [rows, gate and up]; gradients of both are written next to each other at once."""
    out: Tensor = _Gated.apply(packed)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(packed, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        packed, activated = ctx.saved_tensors
        made = torch.empty_like(packed)
        (gate, up), (of_gate, of_up) = packed.chunk(2, -1), made.chunk(2, -1)
        torch.mul(gradient, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return made
