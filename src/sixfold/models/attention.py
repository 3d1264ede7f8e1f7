"""Causal attention and rotary positions as plain functions of tensors.

The reference models call them between their projections. Two ways to the same attention: torch's
fused kernel, and products written out where that kernel is slow. No parameters, no state.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 64
"""Query rows per block of written-out attention."""
WRITTEN_OUT_LENGTH = 1024
"""Beyond this many positions the memory of written-out attention outweighs its speed."""


def rotary_tables(length: int, head_width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position's angles, each [1, length, head_width], fp32 (fp64 for fp64).

    Computed anew in each forward pass: a few thousand numbers, and no buffer that could be left
    uninitialised. The sign of the rotation is folded into the first half of `sin`.
    """
    return rotary_tables_at(torch.arange(length, device=like.device), head_width, base, like)


def rotary_tables_at(positions: Tensor, head_width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary_tables` of given positions [..., length], each [..., 1, length, head_width]."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    powers = torch.arange(0, head_width, 2, dtype=dtype, device=like.device) / head_width
    angles = positions.to(dtype)[..., None, :, None] * base**-powers
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_width / 2) of x [batch, heads, length, head_width] by its angle."""
    out: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotated(torch.autograd.Function):
    """Its gradient is the gradient turned back. Heads come as projections lie, [batch, length, heads,
    ...], and leave as products read them; in between, the tables run along a whole head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turned = _turned(gradient, cos, sin, -1)
        lying = torch.empty_like(gradient.transpose(1, 2), memory_format=torch.contiguous_format)
        return lying.transpose(1, 2).copy_(turned), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sense: int) -> Tensor:
    wide = x.to(cos.dtype, memory_format=torch.contiguous_format).contiguous()  # one copy, whatever it is
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, -1), sin, value=sense)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention: [batch, heads, length, head_width], with fewer heads in key and value.

    Args:
        allowed: which keys each query may see, bool [batch, 1, queries, keys]; None for all up to its own
            position.
    """
    is_short = query.device.type == "cpu" and query.shape[2] <= WRITTEN_OUT_LENGTH
    # Where another function stands in for torch's own, it has its reasons and is asked.
    if is_short and inspect.isbuiltin(F.scaled_dot_product_attention):
        return attend_written_out(query, key, value, allowed)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        is_causal=allowed is None,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def attend_written_out(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The same as plain batched products, one block of query rows after the other.

    On a CPU torch's fused kernel multiplies bf16 no faster than fp32, and fp32 slower than batched products
    do: these take a third of its time in bf16 and two thirds in fp32, forward and backward, although
    probabilities are kept for the backward pass. Heads that share a key are rows of one product. Keys behind
    the last query that a block holds are not multiplied.
    """
    batch, heads, length, head_width = query.shape
    groups, behind = heads // key.shape[1], key.shape[2] - length
    if allowed is None:
        mask = query.new_full((1, length, key.shape[2]), float("-inf")).triu(1 + behind)
    else:
        mask = query.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        mask = mask.expand(batch, key.shape[1], -1, -1).flatten(0, 1)
    rows = torch.split(query, BLOCK_ROWS, 2)
    ends = [behind + min(start + BLOCK_ROWS, length) for start in range(0, length, BLOCK_ROWS)]
    keys = _beginnings(key.flatten(0, 1).transpose(1, 2), 2, ends)
    values = _beginnings(value.flatten(0, 1), 1, ends)
    blocks = []
    for part, k, v, end in zip(rows, keys, values, ends, strict=True):
        start = end - behind - part.shape[2]
        q = (part * head_width**-0.5).reshape(len(k), groups * part.shape[2], head_width)
        shown = mask[:, start : end - behind, :end].repeat(1, groups, 1)
        mixed = torch.baddbmm(shown, q, k).softmax(-1) @ v
        blocks.append(mixed.view(part.shape).transpose(1, 2))
    return torch.cat(blocks, 1).transpose(1, 2)  # as the projection behind it reads


def _beginnings(x: Tensor, dim: int, lengths: list[int]) -> tuple[Tensor, ...]:
    """As many of the first entries of `x` along `dim` as each length says; the last is all of it."""
    parts: tuple[Tensor, ...] = _Beginnings.apply(x, dim, lengths)  # type: ignore[no-untyped-call]
    return parts


class _Beginnings(torch.autograd.Function):
    """Gradients of parts are added in place; slices would make each as large as the whole first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, lengths: list[int]) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return tuple(x.narrow(dim, 0, length) for length in lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[-1].clone()
        for part in gradients[:-1]:
            total.narrow(ctx.dim, 0, part.shape[ctx.dim]).add_(part)
        return total, None, None


def within_documents(documents: Tensor) -> Tensor:
    """Which keys each query may see where several documents share a sample: those of its own, up to it.

    Args:
        documents: the number of each token's document, [batch, length].

    Returns:
        bool [batch, 1, length, length].
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
