"""Checksums: one crc32 for every cell of 64 KiB of every file, so that any range can be verified alone.

A rank sums what it writes; cells that several ranks wrote are joined from their pieces, without the
bytes. All sums of a checkpoint lie in one file, in the order of `cells`. `writing` makes it and `ranges`
compares. This module opens no file.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sixfold.checkpoint.cells import CELL_BYTES, Cells, num_cells

try:  # the same sums, four times as fast
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32

_PIECE = np.dtype([("start", "<u8"), ("stop", "<u8"), ("crc32", "<u4")])


class Tally:
    """The sums of what one rank writes, 24 bytes a cell meanwhile. Within a file it goes upwards."""

    def __init__(self, cells: Cells) -> None:
        self._firsts = [cells.first(file) for file in range(len(cells.sizes))]
        self._starts, self._stops, self._sums = array("Q"), array("Q"), array("Q")

    def add(self, file: int, offset: int, data: bytes | memoryview) -> None:
        """Count `data`, which lies at `offset` of a file."""
        at, done, data = self._firsts[file] * CELL_BYTES + offset, 0, memoryview(data)
        while done < len(data):
            size = min(len(data) - done, CELL_BYTES - at % CELL_BYTES)
            if not (self._stops and self._stops[-1] == at and at % CELL_BYTES):
                self._starts.append(at)
                self._stops.append(at)
                self._sums.append(0)
            self._stops[-1] = at + size
            self._sums[-1] = crc32(data[done : done + size], self._sums[-1])
            at, done = at + size, done + size

    def to_bytes(self) -> bytes:
        """What `joined` takes."""
        pieces = np.empty(len(self._sums), _PIECE)
        pieces["start"], pieces["stop"], pieces["crc32"] = self._starts, self._stops, self._sums
        return pieces.tobytes()


def joined(cells: Cells, tallies: Sequence[bytes]) -> bytes:
    """The sums of all cells, uint32 little-endian, from the tallies of all ranks.

    Raises:
        AssertionError: a byte was written by no rank, or by two.
    """
    pieces = np.sort(np.concatenate([np.frombuffer(tally, _PIECE) for tally in tallies]), order="start")
    cell = pieces["start"] // CELL_BYTES
    is_first = np.append(True, cell[1:] != cell[:-1])[: len(cell)]
    expected = np.where(is_first, cell * CELL_BYTES, np.roll(pieces["stop"], 1))
    is_last = np.append(is_first[1:], True)[: len(cell)]
    if (
        len(np.unique(cell)) != cells.num_cells
        or (expected != pieces["start"]).any()
        or (pieces["stop"][is_last] != _stops(cells)).any()
    ):
        raise AssertionError(f"{len(tallies)} rank(s) did not write each byte of {cells.sizes} once")
    sums = pieces["crc32"][is_first].astype("<u4")
    for place in np.flatnonzero(~is_first):
        start, stop, crc = pieces[place].tolist()
        number = start // CELL_BYTES
        sums[number] = join_crc32(int(sums[number]), crc, stop - start)
    return bytes(sums)


def _stops(cells: Cells) -> NDArray[np.uint64]:
    """Where each cell ends; the last one of a file ends with it."""
    stops = (np.arange(cells.num_cells, dtype=np.uint64) + np.uint64(1)) * np.uint64(CELL_BYTES)
    for file, size in enumerate(cells.sizes):
        if size:
            stops[cells.first(file) + num_cells(size) - 1] = cells.first(file) * CELL_BYTES + size
    return stops


def join_crc32(first: int, second: int, second_bytes: int) -> int:
    """The crc32 of A + B from crc32(A), crc32(B) and len(B), without the bytes.

    Appending n bytes multiplies the sum, a polynomial over GF(2), by x^(8n) modulo the crc's own.
    """
    for bit in range(second_bytes.bit_length()):
        if second_bytes >> bit & 1:
            first = _times(_power(bit), first)
    return first ^ second


@cache
def _power(bit: int) -> int:
    """x^(8 * 2^bit); the highest bit is the lowest power."""
    return 1 << 23 if bit == 0 else _times(_power(bit - 1), _power(bit - 1))


def _times(a: int, b: int) -> int:
    product, bit = 0, 1 << 31
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = (b >> 1) ^ (0xEDB88320 if b & 1 else 0)
    return product
