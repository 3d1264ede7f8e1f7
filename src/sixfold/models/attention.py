"""Causal attention and rotary positions as plain functions of tensors.

The reference models call them between their projections. Two ways to the same attention: torch's
fused kernel, and products written out where that kernel is slow. No parameters, no state.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 64
"""Query rows per block of written-out attention."""
WRITTEN_OUT_LENGTH = 1024
"""Beyond this many positions the memory of written-out attention outweighs its speed."""


def rotary_tables(length: int, head_width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position's angles, each [length, 1, head_width], fp32 (fp64 for fp64).

    Computed anew in each forward pass: a few thousand numbers, and no buffer that could be left
    uninitialised. The sign of the rotation is folded into the first half of `sin`.
    """
    return rotary_tables_at(torch.arange(length, device=like.device), head_width, base, like)


def rotary_tables_at(positions: Tensor, head_width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary_tables` of given positions [..., length], each [..., length, 1, head_width]."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    powers = torch.arange(0, head_width, 2, dtype=dtype, device=like.device) / head_width
    angles = positions.to(dtype)[..., None] * base**-powers
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[..., None, :], torch.cat((-sin, sin), -1)[..., None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_width / 2) of x [batch, length, heads, head_width] by its angle."""
    wide = x.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention: [batch, heads, length, head_width], with fewer heads in key and value.

    Args:
        allowed: which keys each query may see, bool [batch, 1, queries, keys]; None for all up to its own
            position.
    """
    is_narrow = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    # Where another function stands in for torch's own, it has its reasons and is asked.
    fused = F.scaled_dot_product_attention
    if is_narrow and query.shape[2] <= WRITTEN_OUT_LENGTH and inspect.isbuiltin(fused):
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

    torch's fused kernel multiplies bf16 on a CPU no faster than fp32, batched products do: three
    times faster forward and backward, although probabilities are kept for the backward pass.
    Heads that share a key are rows of one product. Keys behind the last query that a block holds are not
    multiplied.
    """
    batch, heads, length, head_width = query.shape
    groups, behind = heads // key.shape[1], key.shape[2] - length
    q = (query * head_width**-0.5).reshape(batch * key.shape[1], groups, length, head_width)
    k, v = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    if allowed is None:
        mask = query.new_full((1, length, key.shape[2]), float("-inf")).triu(1 + behind)
    else:
        mask = query.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        mask = mask.expand(batch, key.shape[1], -1, -1).flatten(0, 1)
    blocks = []
    for start in range(0, length, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, length)
        seen = end + behind
        rows = q[:, :, start:end].flatten(1, 2)
        scores = torch.baddbmm(mask[:, start:end, :seen].repeat(1, groups, 1), rows, k[:, :, :seen])
        mixed = scores.softmax(-1) @ v[:, :seen]
        blocks.append(mixed.view(batch, heads, end - start, head_width))
    return torch.cat(blocks, 2)


def within_documents(documents: Tensor) -> Tensor:
    """Which keys each query may see where several documents share a sample: those of its own, up to it.

    Args:
        documents: the number of each token's document, [batch, length].

    Returns:
        bool [batch, 1, length, length].
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
