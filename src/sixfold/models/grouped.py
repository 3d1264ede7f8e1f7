"""Gated feed-forward parts of many experts, on rows that are sorted by expert.

What experts compute. torch's grouped product is used where it runs; elsewhere one expert goes after the
other, with the same result. Plain functions of tensors; nothing here knows of routers or of ranks.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sixfold.models.choices import slices_of

GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPED_BYTES = 16
"""What rows of both operands of torch's grouped product are a multiple of."""
APART = 16
"""Numbers between rows whose columns a product reads: rows that are a power of two apart would share the same
few places of a cache."""


def fed_forward(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """`down @ (silu(gate @ row) * (up @ row))` of each row, with the matrices of its expert.

    Args:
        rows: [rows, width], those of an expert together and experts in order.
        gate_up: [experts, 2 * inner, width], gate before up.
        down: [experts, width, inner].
        counts: rows of each expert.

    Returns:
        [rows, width].
    """
    if all(is_groupable(rows, weight) for weight in (gate_up, down)):
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows.device)
        inner = gated(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
        return F.grouped_mm(inner, down.transpose(1, 2), offs=ends)
    out: Tensor = _OneByOne.apply(rows, gate_up, down, counts)  # type: ignore[no-untyped-call]
    return out


def is_groupable(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these, and is faster: on a CPU it is a loop as well."""
    widths = (weight.shape[1] * weight.itemsize, weight.shape[2] * weight.itemsize)
    return (
        rows.device.type != "cpu"
        and rows.dtype == weight.dtype
        and rows.dtype in GROUPED_DTYPES
        and not any(width % GROUPED_BYTES for width in widths)
    )


class _OneByOne(torch.autograd.Function):
    """The reference. What lies between two products of an expert is still in a cache when the second one
    comes, and in backward its memory serves the next expert.

    Of the gate the sigmoid s is kept and, in its place, a = gate * s. The slope of `silu` is a + s * (1 - a),
    so backward has no exponential.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        width, num_inner = down.shape[1:]
        packed, out = rows.new_empty(len(rows), 2 * num_inner), rows.new_empty(len(rows), width)
        sigmoids, inner = rows.new_empty(len(rows), num_inner), rows.new_empty(max(counts), num_inner)
        for expert, where in enumerate(slices_of(counts)):
            part, sigmoid = packed[where], sigmoids[where]
            torch.mm(rows[where], gate_up[expert].t(), out=part)
            gate, up = part.chunk(2, -1)
            gate.mul_(torch.sigmoid(gate, out=sigmoid))
            product = torch.mul(gate, up, out=inner[: len(part)])
            torch.mm(product, down[expert].t(), out=out[where])
        ctx.save_for_backward(rows, gate_up, down, packed, sigmoids)
        ctx.counts = counts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, packed, sigmoids = ctx.saved_tensors
        made = [
            torch.empty_like(each) if wanted else None
            for each, wanted in zip((rows, gate_up, down), ctx.needs_input_grad, strict=False)
        ]
        of_rows, of_gate_up, of_down = made
        most, num_inner = max(ctx.counts), down.shape[2]
        inner, of_inner = rows.new_empty(2, most, num_inner)
        of_packed, one = rows.new_empty(most, 2 * num_inner + APART)[:, :-APART], rows.new_ones(())
        for expert, where in enumerate(slices_of(ctx.counts)):
            given, count = gradient[where], where.stop - where.start
            (activated, up), sigmoid = packed[where].chunk(2, -1), sigmoids[where]
            if of_down is not None:
                torch.mm(given.t(), torch.mul(activated, up, out=inner[:count]), out=of_down[expert])
            of_product, of_part = torch.mm(given, down[expert], out=of_inner[:count]), of_packed[:count]
            of_gate, of_up = of_part.chunk(2, -1)
            torch.mul(of_product, activated, out=of_up)
            slope = torch.lerp(activated, one, sigmoid, out=inner[:count])
            torch.mul(of_product.mul_(up), slope, out=of_gate)
            if of_gate_up is not None:
                torch.mm(of_part.t(), rows[where], out=of_gate_up[expert])
            if of_rows is not None:
                torch.mm(of_part, gate_up[expert], out=of_rows[where])
        return of_rows, of_gate_up, of_down, None


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
