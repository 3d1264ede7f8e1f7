"""Places: which piece of a parameter a rank has, where an axis of the mesh cuts the parameter itself.

Decided by the modules of `parallel` that change a model for an axis; read by units, the state engine and
checkpoints, which translate between pieces and whole tensors. It counts elements and holds no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

Span = tuple[int, int]
"""(start, stop) of neighbouring indices of one dim."""


@dataclass(frozen=True)
class Place:
    """A piece of one parameter.

    Args:
        shape: of the whole.
        spans: of each dim the indices that the piece has, in its order; () for all of them.
        axes: axes of the mesh whose ranks have other pieces.
        partial: axes whose ranks have the same piece, and each only a summand of its gradient.
    """

    shape: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...] = ()
    axes: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()

    def and_also(self, other: Place) -> Place:
        """The piece of one parameter where other axes cut it too, in other dims."""
        spans = tuple(mine or theirs for mine, theirs in zip(self._given, other._given, strict=True))
        return Place(self.shape, spans, (*self.axes, *other.axes), (*self.partial, *other.partial))

    @cached_property
    def piece(self) -> tuple[int, ...]:
        """Shape of the piece."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self._all_spans)

    @cached_property
    def _all_spans(self) -> tuple[tuple[Span, ...], ...]:
        return tuple(spans or ((0, size),) for spans, size in zip(self._given, self.shape, strict=True))

    @property
    def _given(self) -> tuple[tuple[Span, ...], ...]:
        return self.spans or ((),) * len(self.shape)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first element in the whole, first element in the piece, number) of neighbours in both, in order.

        Args:
            start, stop: elements of the piece, in row-major order, as those of the whole are.
        """
        last = max((dim for dim, spans in enumerate(self.spans) if spans), default=-1)
        if last < 0:
            yield start, start, stop - start
            return
        inner = prod(self.shape[last + 1 :])
        row = self.piece[last] * inner
        outer = [[index for span in spans for index in range(*span)] for spans in self._all_spans[:last]]
        for number, indices in enumerate(product(*outer)):
            mine = number * row
            if mine >= stop:
                return
            if mine + row <= start:
                continue
            theirs = 0
            for index, size in zip(indices, self.shape[:last], strict=True):
                theirs = theirs * size + index
            theirs *= self.shape[last] * inner
            for begin, end in self._all_spans[last]:
                length = (end - begin) * inner
                low, high = max(mine, start), min(mine + length, stop)
                if low < high:
                    yield theirs + begin * inner + low - mine, low, high - low
                mine += length
