"""Attention over keys that go round a ring of ranks, exact: what each brings is merged as it comes.

Called by `attention.py` with the rows of this rank. Keys and values go on to the next rank while those that
are here are used; in backward the sums of their gradients travel behind them and end where they began. It
chooses no layout and knows no module.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; merging by the log-sum-exp after
Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sixfold.mesh import Group, Pending
from sixfold.parallel.context.kernels import kernel_for, wide
from sixfold.parallel.context.parcels import packed, unpacked
from sixfold.parallel.context.spans import Pair, Sequences, Span, num_rows


@dataclass(frozen=True)
class Ring:
    """The ranks between which keys travel, `stride` places of `group` apart.

    Args:
        rows: by place in the ring, the spans that are there.
    """

    group: Group
    stride: int
    rows: Sequence[Sequence[Span]]

    @property
    def num_ranks(self) -> int:
        """Ranks in the ring."""
        return len(self.rows)

    @property
    def place(self) -> int:
        """This one's place."""
        return self.group.place // self.stride

    def pass_on(self, sent: Tensor, arriving: Tensor) -> Pending:
        """Start to send a tensor to the next rank, and to fill one from the rank before."""
        nothing, size = sent.new_empty(0), self.group.num_ranks
        outwards, inwards = [nothing] * size, [nothing] * size
        outwards[(self.group.place + self.stride) % size] = sent
        inwards[(self.group.place - self.stride) % size] = arriving
        return self.group.all_to_all(outwards, inwards)


@dataclass(frozen=True)
class View:
    """What queries see, and how scores are scaled."""

    sequences: Sequences
    is_causal: bool
    scale: float

    def pairs(self, query: Tensor, mine: Sequence[Span], theirs: Sequence[Span]) -> Sequence[Pair]:
        """Where queries meet keys; nowhere in an empty batch."""
        return self.sequences.pairs(mine, theirs, is_causal=self.is_causal) if len(query) else ()


def ring_attention(query: Tensor, key: Tensor, value: Tensor, ring: Ring, view: View) -> Tensor:
    """Attention of this rank's queries over everyone's keys, [batch, heads, rows, width]; differentiable.

    Args:
        query, key, value: of the rows at this rank's place in the ring, heads a multiple of kv_heads.
    """
    output: Tensor = _RingAttention.apply(query, key, value, ring, view)  # type: ignore[no-untyped-call]
    return output


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring, view: View) -> Tensor:
        kernel, mine = kernel_for(query, value), ring.rows[ring.place]
        merged = _Merged(query, value.shape[-1])
        for source, held in _round(ring, key, value):
            for pair in view.pairs(query, mine, ring.rows[source]):
                asking, (seen_key, seen_value) = query[:, :, pair.queries], _rows(held, pair.keys)
                merged.take(pair.queries, *kernel.forward(asking, seen_key, seen_value, pair, view.scale))
        output = merged.output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, merged.log_sum)
        ctx.ring, ctx.view = ring, view
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        gradient = gradient.contiguous()
        ring, view = ctx.ring, ctx.view
        kernel, mine, kind = kernel_for(query, value), ring.rows[ring.place], wide(query.dtype)
        d_query = torch.zeros_like(query, dtype=kind)
        own, behind = torch.empty(0), _Behind(ring, key, value)
        for source, held in _round(ring, key, value):
            sums = [torch.zeros_like(each, dtype=kind) for each in held]
            for pair in view.pairs(query, mine, ring.rows[source]):
                rows, (seen_key, seen_value) = pair.queries, _rows(held, pair.keys)
                d_rows, *d_held = kernel.backward(
                    gradient[:, :, rows],
                    query[:, :, rows],
                    seen_key,
                    seen_value,
                    output[:, :, rows],
                    log_sum[:, :, rows],
                    pair,
                    view.scale,
                )
                d_query[:, :, rows] += d_rows
                for total, part in zip(sums, d_held, strict=True):
                    total[:, :, pair.keys] += part
            flat = packed(sums)
            if source == ring.place:
                own = flat
            else:
                behind.follow(source, flat)
        d_key, d_value = unpacked(behind.join(own), (key.shape, value.shape))
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _round(ring: Ring, key: Tensor, value: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each rank's (place, [key, value]), this one's first; the next are on their way meanwhile."""
    held, source = [key, value], ring.place
    for step in range(ring.num_ranks):
        coming = (source - 1) % ring.num_ranks
        if step + 1 == ring.num_ranks:
            yield source, held
            return
        sent, shapes = packed(held), _shapes_at(ring, coming, key, value)
        arriving = sent.new_empty(sum(shape.numel() for shape in shapes))
        pending = ring.pass_on(sent, arriving)
        yield source, held
        pending.wait()
        held, source = unpacked(arriving, shapes), coming


class _Behind:
    """Sums of the gradients of keys and values on their way behind them, to where these belong."""

    def __init__(self, ring: Ring, key: Tensor, value: Tensor) -> None:
        self._ring, self._key, self._value = ring, key, value
        self._arriving = torch.empty(0)
        self._pending: Pending | None = None
        self._sent = torch.empty(0)  # left alone until it has gone

    def follow(self, source: int, here: Tensor) -> None:
        """Add what arose here for the keys of `source` to what came from the rank before, and send it on."""
        if self._pending is not None:
            self._pending.wait()
            here += self._arriving
        coming = (source - 1) % self._ring.num_ranks
        shapes = _shapes_at(self._ring, coming, self._key, self._value)
        self._arriving = here.new_empty(sum(shape.numel() for shape in shapes))
        self._sent = here
        self._pending = self._ring.pass_on(here, self._arriving)

    def join(self, own: Tensor) -> Tensor:
        """What arose here for this rank's own keys, and everywhere else."""
        if self._pending is not None:
            self._pending.wait()
            own += self._arriving
        return own


class _Merged:
    """Attention over all keys so far.

    Attributes:
        output: [batch, heads, rows, width].
        log_sum: [batch, heads, rows]; minus infinity where no key was seen.
    """

    def __init__(self, query: Tensor, width: int) -> None:
        self.output = query.new_zeros((*query.shape[:3], width), dtype=wide(query.dtype))
        self.log_sum = self.output.new_full(query.shape[:3], float("-inf"))
        self._fresh = 0  # rows from here on have seen nothing

    def take(self, rows: slice, mixed: Tensor, its_sum: Tensor) -> None:
        """Take in attention of some rows over further keys."""
        output, log_sum = self.output[:, :, rows], self.log_sum[:, :, rows]
        if rows.start >= self._fresh:
            self._fresh = rows.stop
            output.copy_(mixed)
            log_sum.copy_(its_sum)
            return
        both = torch.logaddexp(log_sum, its_sum)
        finite = both.masked_fill(both == float("-inf"), 0.0)
        output.mul_((log_sum - finite).exp_()[..., None])
        output.addcmul_(mixed.to(output.dtype), (its_sum - finite).exp_()[..., None])
        log_sum.copy_(both)


def _rows(held: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [each[:, :, rows] for each in held]


def _shapes_at(ring: Ring, place: int, *like: Tensor) -> list[torch.Size]:
    rows = num_rows(ring.rows[place])
    return [torch.Size((*each.shape[:2], rows, each.shape[-1])) for each in like]
