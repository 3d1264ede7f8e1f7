"""Fixed-length samples out of long runs of tokens, of one source or of several blended.

Called by train for its batches and its evaluation. A sample is named by its global number alone;
which rank asks, and for how many at once, changes nothing. Never copies more than what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sixfold.base.errors import DataError
from sixfold.data.order import Indices, indices_at

Tokens = npt.NDArray[np.integer]

TURNS = 1000
"""Samples after which a blend has drawn from every source by its weight; weights count to one of these."""


class TokenStream:
    """The training samples of one source, in the order that `seed` gives them.

    Args:
        tokens: one-dimensional token ids, for example `corpus.parts[0].train`.
        sequence_length: tokens predicted per sample, L. Sample i is tokens [i*L, i*L + L + 1): inputs
            and, shifted by one, targets. Tokens after the last whole sample are left over.
        seed: root of the order; epochs follow one another without end.

    Raises:
        DataError: there are too few tokens for one sample.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, seed: int) -> None:
        # A plain view: indexing a memmap would label every batch a memmap too.
        self.tokens = np.asarray(tokens)
        self.sequence_length, self.seed = sequence_length, seed
        self.num_samples = (len(tokens) - 1) // sequence_length
        if self.num_samples < 1:
            raise DataError(
                f"{len(tokens)} tokens to train on, data.sequence_length = {sequence_length}",
                rule="one sample takes data.sequence_length + 1 tokens",
                fix=f"set data.sequence_length = {max(2, len(tokens) - 1)} or less, or add more text",
            )

    def batch(self, first: int, numbers: range | Sequence[int]) -> npt.NDArray[np.int64]:
        """Samples of the global batch that begins at global sample number `first`.

        Args:
            first: samples consumed by all ranks before this batch.
            numbers: places in the batch, as `plan.batch.share` gives them; empty is legal.

        Returns:
            int64 [len(numbers), sequence_length + 1].
        """
        return self.samples(first + np.asarray(numbers, dtype=np.int64))

    def samples(self, numbers: Indices) -> npt.NDArray[np.int64]:
        """The samples at any global `numbers`, int64 [len(numbers), sequence_length + 1]."""
        indices = indices_at(self.seed, numbers, self.num_samples)
        places = indices[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        return _wide(self.tokens[places])


class Blend:
    """The samples of several sources, each drawn from by its weight.

    Samples come in rounds of at most TURNS; in each, a source has a fixed number of turns, at places that a
    permutation of the round gives. So which sample comes at a number is computed, as it is for one source,
    which is a blend too: of rounds of one turn.

    Args:
        streams: one for each source, of the same sequence length and seed.
        weights: part of the samples from each, in any unit; None for as many as each has, so that all
            come to the end of an epoch together.

    Raises:
        DataError: there are not as many weights as streams.
    """

    def __init__(self, streams: Sequence[TokenStream], weights: Sequence[float] | None = None) -> None:
        if weights is not None and len(weights) != len(streams):
            raise DataError(
                f"data.weights has {len(weights)} numbers for {len(streams)} sources",
                rule="each source has one weight",
                fix=f"set data.weights = {[1.0] * len(streams)}, or leave it unset",
            )
        self.streams = tuple(streams)
        self.turns = turns_of(weights or [stream.num_samples for stream in streams])
        self.seed, self.sequence_length = streams[0].seed, streams[0].sequence_length

    def batch(self, first: int, numbers: range | Sequence[int]) -> npt.NDArray[np.int64]:
        """As `TokenStream.batch`."""
        wanted = first + np.asarray(numbers, dtype=np.int64)
        sources, own = self.origins(wanted)
        batch = np.empty((len(wanted), self.sequence_length + 1), dtype=np.int64)
        for index in np.unique(sources):
            here = sources == index
            batch[here] = self.streams[index].samples(own[here])
        return batch

    def origins(self, numbers: Indices) -> tuple[Indices, Indices]:
        """For each global number: which source it is drawn from, and its number within that source."""
        ends = np.cumsum(self.turns)
        turn = indices_at(self.seed, numbers, int(ends[-1]))
        sources = np.searchsorted(ends, turn, side="right")
        turns = np.asarray(self.turns)[sources]
        rounds = numbers // int(ends[-1])
        return sources, rounds * turns + turn - (ends[sources] - turns)


def turns_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Turns of each source in a round, in the smallest numbers; each source has one at least."""
    total = math.fsum(weights)
    turns = [max(1, round(TURNS * weight / total)) for weight in weights]
    divisor = math.gcd(*turns)
    return tuple(turn // divisor for turn in turns)


def document_numbers(samples: npt.NDArray[np.int64], mark: int) -> npt.NDArray[np.int64]:
    """Which document of its sample each token belongs to, counted from 0; same shape.

    A mark stands before every document, so it is the first token of one.
    """
    return np.cumsum(samples == mark, axis=1)


def document_positions(samples: npt.NDArray[np.int64], mark: int) -> npt.NDArray[np.int64]:
    """Each token's place within its document, as far as the sample shows it; same shape."""
    places = np.arange(samples.shape[1], dtype=np.int64)[None]
    starts = np.where(samples == mark, places, 0)
    return places - np.maximum.accumulate(starts, axis=1)


def windows(tokens: Tokens, sequence_length: int) -> Iterator[npt.NDArray[np.int64]]:
    """Consecutive int64 windows of up to `sequence_length` + 1 tokens, each overlapping the last by one.

    As inputs [:-1] and targets [1:] they predict every token after the first exactly once; only the
    last window may be shorter.
    """
    for start in range(0, len(tokens) - 1, sequence_length):
        yield _wide(tokens[start : start + sequence_length + 1])


def _wide(tokens: Tokens) -> npt.NDArray[np.int64]:
    return np.array(tokens, dtype=np.int64)
