"""The order of samples as a pure function of (seed, global sample number).

Called by `stream` and `loader`. Every epoch is another permutation, computed for the numbers asked for
and never materialised, so one counter is the whole state of a run's data. Knows no ranks: who feeds
which part of a global batch is said by `plan.batch.share`.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 8


def sample_indices(seed: int, first: int, count: int, num_samples: int) -> Indices:
    """The samples, 0 to `num_samples` - 1, at global numbers `first` to `first + count - 1`: [count]."""
    return indices_at(seed, np.arange(first, first + count, dtype=np.int64), num_samples)


def indices_at(seed: int, numbers: Indices, num_samples: int) -> Indices:
    """The samples at any global `numbers`, which may lie in several epochs; same shape."""
    epochs, positions = np.divmod(numbers, num_samples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permute(_round_keys(seed, int(epoch)), positions[here], num_samples)
    return indices


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.blake2b(f"order:{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _permute(keys: npt.NDArray[np.uint64], positions: Indices, num_samples: int) -> Indices:
    """A keyed permutation of 0 .. num_samples - 1.

    A Feistel network over a rectangle of rows x columns cells: each round moves one coordinate by a hash
    of the other, which can be undone, so the network permutes the cells. The rectangle has fewer than
    `rows` cells too many; a position that lands on one of those walks on until it is back inside.
    """
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    result = positions.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        row, column = np.divmod(result[walking], np.uint64(columns))
        for key in keys.reshape(-1, 2):
            row = (row + _mix(column ^ key[0])) % np.uint64(rows)
            column = (column + _mix(row ^ key[1])) % np.uint64(columns)
        result[walking] = row * np.uint64(columns) + column
        walking = walking[result[walking] >= num_samples]
    return result.astype(np.int64)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finalizer of the splitmix64 generator, halved so that adding a coordinate cannot overflow."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (bits ^ (bits >> np.uint64(31))) >> np.uint64(1)
