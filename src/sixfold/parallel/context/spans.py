"""Which rows of a sequence each rank has, and which of them see which: plain numbers, and masks where needed.

A sequence of `length` tokens is cut into two chunks for each of n ranks; the one at place p has chunks p and
2n - 1 - p, so that under a causal mask all have equally much to do. Chunks differ by one row at most where n
does not divide. Used by `ring.py` and `heads.py`; it sends and computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sixfold.parallel.tensor.crossing import bounds

Span = tuple[int, int]
"""Rows [start, stop) of the whole sequence."""


def chunk(length: int, num_ranks: int, number: int) -> Span:
    """One of the 2 * `num_ranks` chunks."""
    return bounds(length, 2 * num_ranks, number)


def spans_of(length: int, num_ranks: int, places: range) -> tuple[Span, ...]:
    """What ranks at neighbouring places have between them, in the order of the sequence: one run of first
    chunks, then one of second ones; a single span where these touch."""
    last = 2 * num_ranks - 1
    first = chunk(length, num_ranks, places[0])[0], chunk(length, num_ranks, places[-1])[1]
    second = chunk(length, num_ranks, last - places[-1])[0], chunk(length, num_ranks, last - places[0])[1]
    return ((first[0], second[1]),) if first[1] == second[0] else (first, second)


def num_rows(spans: Sequence[Span]) -> int:
    """Rows in several spans."""
    return sum(stop - start for start, stop in spans)


def cut_rows(whole: Tensor, spans: Sequence[Span], dim: int) -> Tensor:
    """The rows in `spans` of a tensor that has the whole sequence along `dim`; contiguous."""
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in spans], dim)


@dataclass(frozen=True)
class Pair:
    """Queries and keys that meet, by their places in local tensors, and what the queries see.

    Args:
        queries, keys: rows.
        is_causal: each query sees the keys up to its own row; both are the same rows then.
        mask: what each query sees, bool [batch, 1, queries, keys]. Without both it sees all keys.
    """

    queries: slice
    keys: slice
    is_causal: bool = False
    mask: Tensor | None = None
    _made: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def blind(self) -> Tensor | None:
        """Queries that see no key, bool [batch, 1, queries]; None: no such."""
        return None if self.mask is None else ~self.mask.any(-1)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """`mask` as zeros and minus infinities to add to scores; made once."""
        if self.mask is None:
            return None
        if dtype not in self._made:
            zeros = torch.zeros_like(self.mask, dtype=dtype)
            self._made[dtype] = zeros.masked_fill_(~self.mask, float("-inf"))
        return self._made[dtype]


@dataclass(frozen=True)
class Sequences:
    """The sequences of one micro-batch, as all ranks know them.

    Args:
        length: tokens of each.
        documents: the number of each token's document, [batch, length]; a token sees its own alone. None:
            one document.
        keys: which tokens may be seen at all, bool [batch, length]; None: all.
        seen: which keys each query may see, where that is told by pairs, bool [batch, 1, length, length].
    """

    length: int
    documents: Tensor | None = None
    keys: Tensor | None = None
    seen: Tensor | None = None
    _pairs: dict[object, list[Pair]] = field(default_factory=dict, compare=False, repr=False)

    def allowed(self, queries: Sequence[Span], keys: Sequence[Span]) -> Tensor | None:
        """What the documents and the padding let the rows in some spans see of those in others, bool
        [batch, 1, queries, keys]; None: all."""
        allowed: Tensor | None = None
        if self.seen is not None:
            allowed = cut_rows(cut_rows(self.seen, queries, 2), keys, 3)
        if self.documents is not None:
            asking, asked = (cut_rows(self.documents, spans, 1) for spans in (queries, keys))
            alike = asking[:, None, :, None] == asked[:, None, None, :]
            allowed = alike if allowed is None else allowed & alike
        if self.keys is not None:
            valid = cut_rows(self.keys, keys, 1)[:, None, None, :]
            rows = num_rows(queries)
            allowed = valid.expand(-1, -1, rows, -1) if allowed is None else allowed & valid
        return allowed

    def pairs(self, mine: Sequence[Span], theirs: Sequence[Span], *, is_causal: bool) -> list[Pair]:
        """The pairs in which queries in the spans `mine` see keys in the spans `theirs`; found once.

        Spans of two ranks are the same or have no row in common.
        """
        key = (tuple(mine), tuple(theirs), is_causal)
        if key not in self._pairs:
            found = [self._seen(pair, mine, theirs) for pair in _met(mine, theirs, is_causal=is_causal)]
            self._pairs[key] = [pair for pair in found if pair is not None]
        return self._pairs[key]

    def _seen(self, pair: Pair, mine: Sequence[Span], theirs: Sequence[Span]) -> Pair | None:
        mask = self.allowed(_within(mine, pair.queries), _within(theirs, pair.keys))
        if mask is None:
            return pair
        mask, hidden = (mask.tril(), (~mask).tril()) if pair.is_causal else (mask, ~mask)
        if not bool(hidden.any()):
            return pair
        return Pair(pair.queries, pair.keys, mask=mask) if bool(mask.any()) else None


def _met(mine: Sequence[Span], theirs: Sequence[Span], *, is_causal: bool) -> list[Pair]:
    """As few pairs as possible, by order alone."""
    met: list[Pair] = []
    start = 0
    for span in mine:
        rows = slice(start, start + span[1] - span[0])
        start, below = rows.stop, 0
        for seen in theirs:
            keys = slice(below, below + seen[1] - seen[0])
            below = keys.stop
            if is_causal and seen == span:
                met.append(Pair(rows, keys, is_causal=True))
            elif not is_causal or seen[0] < span[0]:
                met.append(Pair(rows, keys))
    return _joined(met)


def _joined(pairs: list[Pair]) -> list[Pair]:
    """Pairs that see everything, joined along keys and then along queries."""
    for one, other in (("queries", "keys"), ("keys", "queries")):
        out: list[Pair] = []
        for pair in sorted(pairs, key=lambda each: (getattr(each, one).start, getattr(each, other).start)):
            last = out[-1] if out else None
            if (
                last is not None
                and not last.is_causal
                and not pair.is_causal
                and getattr(last, one) == getattr(pair, one)
                and getattr(last, other).stop == getattr(pair, other).start
            ):
                both = {one: getattr(pair, one)}
                both[other] = slice(getattr(last, other).start, getattr(pair, other).stop)
                out[-1] = Pair(**both)
            else:
                out.append(pair)
        pairs = out
    return pairs


def _within(spans: Sequence[Span], rows: slice) -> list[Span]:
    """Rows of a local tensor that holds `spans`, in rows of the sequence."""
    found, below = [], 0
    for start, stop in spans:
        low, high = max(rows.start, below), min(rows.stop, below + stop - start)
        if low < high:
            found.append((start + low - below, start + high - below))
        below += stop - start
    return found
