"""Fixed-length samples out of one long run of tokens.

Called by train for its batches and its evaluation. A sample is named by its global number alone;
which rank asks, and for how many at once, changes nothing. Never copies more than what is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sixfold.base.errors import DataError
from sixfold.data.order import indices_at

Tokens = npt.NDArray[np.integer]


class TokenStream:
    """The training samples of a corpus, in the order that `seed` gives them.

    Args:
        tokens: one-dimensional token ids, for example `corpus.train`.
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
        indices = indices_at(self.seed, first + np.asarray(numbers, dtype=np.int64), self.num_samples)
        places = indices[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        return _wide(self.tokens[places])


def windows(tokens: Tokens, sequence_length: int) -> Iterator[npt.NDArray[np.int64]]:
    """Consecutive int64 windows of up to `sequence_length` + 1 tokens, each overlapping the last by one.

    As inputs [:-1] and targets [1:] they predict every token after the first exactly once; only the
    last window may be shorter.
    """
    for start in range(0, len(tokens) - 1, sequence_length):
        yield _wide(tokens[start : start + sequence_length + 1])


def _wide(tokens: Tokens) -> npt.NDArray[np.int64]:
    return np.array(tokens, dtype=np.int64)
