"""Attention of one block of queries over one block of keys, with what is needed to merge blocks.

Two ways to the same numbers: public torch operations, for any device and type, and on CPUs torch's own fused
kernel, which is private because torch hands out its log-sum-exp nowhere else. This is the only file that
calls it, and where a version of torch lacks it the public way runs. Called by `ring.py`; it sends nothing.

Source: Dao et al. 2022, "FlashAttention", for forward and backward from the log-sum-exp alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from sixfold.parallel.context.spans import Pair

BLOCK_ROWS = 512
"""Query rows whose scores the public way holds at once."""


class Kernel(Protocol):
    """Attention of [batch, heads, queries, width] over [batch, kv_heads, keys, width], kv_heads dividing
    heads."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pair: Pair, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output as `query`, and the logarithm of the sum of its rows' exponentiated scores, [batch, heads,
        queries], fp32 (fp64 for fp64); minus infinity where a query sees no key."""

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum: Tensor,
        pair: Pair,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value from those of the output; `output` and `log_sum` are those over
        all keys, so that the gradients of several blocks of keys add up."""


def kernel_for(query: Tensor, value: Tensor) -> Kernel:
    """The fastest way for tensors like these."""
    is_known = _FUSED is not None and query.shape[-1] == value.shape[-1]
    return Fused() if is_known and query.device.type == "cpu" else Public()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which blocks are merged."""
    return torch.promote_types(dtype, torch.float32)


class Public:
    """Products written out, a block of queries at a time."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pair: Pair, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        outputs, sums = [], []
        for _, scores, _ in self._scores(query, key, pair, scale):
            log_sum = scores.logsumexp(-1)
            weights = (scores - _finite(log_sum)[..., None]).exp()
            mixed = weights.to(value.dtype) @ value[:, :, None, : scores.shape[-1]]
            outputs.append(mixed.flatten(1, 2))
            sums.append(log_sum.flatten(1, 2))
        return torch.cat(outputs, 2), torch.cat(sums, 2)

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum: Tensor,
        pair: Pair,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        heads, kind = key.shape[1], wide(query.dtype)
        delta = (gradient.to(kind) * output.to(kind)).sum(-1)
        d_key, d_value = torch.zeros_like(key, dtype=kind), torch.zeros_like(value, dtype=kind)
        d_queries = []
        for rows, scores, block in self._scores(query, key, pair, scale):
            seen = scores.shape[-1]
            grad = _grouped(gradient[:, :, rows], heads).to(kind)
            weights = (scores - _finite(_grouped(log_sum[:, :, rows], heads))[..., None]).exp()
            d_value[:, :, :seen] += (weights.transpose(-1, -2) @ grad).sum(2)
            d_weights = grad @ value[:, :, None, :seen].to(kind).transpose(-1, -2)
            d_scores = weights * (d_weights - _grouped(delta[:, :, rows], heads)[..., None]) * scale
            d_queries.append((d_scores @ key[:, :, None, :seen].to(kind)).flatten(1, 2))
            d_key[:, :, :seen] += (d_scores.transpose(-1, -2) @ block.to(kind)).sum(2)
        return torch.cat(d_queries, 2).to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)

    def _scores(
        self, query: Tensor, key: Tensor, pair: Pair, scale: float
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, masked scores [batch, kv_heads, group, rows, keys], and queries, block by block."""
        kind, length = wide(query.dtype), query.shape[2]
        for start in range(0, length, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, length))
            seen = min(rows.stop, key.shape[2]) if pair.is_causal else key.shape[2]
            block = _grouped(query[:, :, rows], key.shape[1])
            scores = (block @ key[:, :, None, :seen].transpose(-1, -2)).to(kind) * scale
            if pair.mask is not None:
                scores = scores.masked_fill(~pair.mask[:, :, None, rows, :seen], float("-inf"))
            elif pair.is_causal:
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1 + start)
                scores = scores.masked_fill(hidden, float("-inf"))
            yield rows, scores, block


class Fused:
    """torch's kernel for CPUs."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pair: Pair, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        output, log_sum = _FUSED(
            query, key, value, 0.0, pair.is_causal, attn_mask=pair.bias(query.dtype), scale=scale
        )
        if pair.blind is not None:  # it gives them a sum of 1
            log_sum = log_sum.masked_fill(pair.blind, float("-inf"))
        return output, log_sum

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum: Tensor,
        pair: Pair,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        d_query, d_key, d_value = _FUSED_BACKWARD(
            gradient,
            query,
            key,
            value,
            output,
            _finite(log_sum),
            0.0,
            pair.is_causal,
            attn_mask=pair.bias(query.dtype),
            scale=scale,
        )
        return d_query, d_key, d_value


def _finite(log_sum: Tensor) -> Tensor:
    """Rows that see nothing get no weight at all, whatever is taken off their scores."""
    return log_sum.masked_fill(log_sum == float("-inf"), 0.0)


def _grouped(rows: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads * group, ...] as [batch, kv_heads, group, ...]."""
    return rows.view(rows.shape[0], heads, rows.shape[1] // heads, *rows.shape[2:])


def _op(name: str) -> Any:
    found = getattr(torch.ops.aten, name, None)
    return None if found is None else found.default


_FUSED = _op("_scaled_dot_product_flash_attention_for_cpu")
_FUSED_BACKWARD = _op("_scaled_dot_product_flash_attention_for_cpu_backward")
