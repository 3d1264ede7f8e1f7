"""Ranges of bytes out of a checkpoint's files, each cell compared with its checksum on the way.

`reading` says which ranges; neighbouring ones are read together, straight into the caller's memory. It
knows no tensors and never writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.cells import CELL_BYTES
from sixfold.checkpoint.files import CHUNK_BYTES
from sixfold.checkpoint.manifest import SUMS, Manifest, damaged
from sixfold.checkpoint.remote import open_bytes
from sixfold.checkpoint.sums import crc32


@dataclass(frozen=True)
class Ranges:
    """The bytes of one checkpoint.

    Raises, from every method: CheckpointError that names the damaged file.
    """

    folder: Path
    manifest: Manifest

    def fill(self, file: str, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each memory with the bytes of a file from its number on."""
        size = self._sizes[file]
        border, border_start = memoryview(bytearray(min(CELL_BYTES, size))), -1
        with self._opened(file) as handle:
            for start, memory in sorted(wanted, key=lambda pair: pair[0]):
                at, stop = start, start + len(memory)
                while at < stop:
                    first = at - at % CELL_BYTES
                    end = stop if stop == size else stop - stop % CELL_BYTES
                    if at == first and at < end:
                        end = min(end, at + CHUNK_BYTES)
                        self._read_cells(handle, file, at, memory[at - start : end - start])
                    else:
                        # A cell that is wanted in part; the next range often begins in it.
                        end = min(stop, first + CELL_BYTES)
                        if border_start != first:
                            self._read_cells(handle, file, first, border[: size - first])
                            border_start = first
                        memory[at - start : end - start] = border[at - first : end - first]
                    at = end

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Read whole files, all where none are named; the error lists all damaged ones."""
        problems = []
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for file in self._sizes if files is None else files:
            size = self._sizes[file]
            try:
                with self._opened(file) as handle:
                    for start in range(0, size, CHUNK_BYTES):
                        self._read_cells(handle, file, start, buffer[: size - start])
            except CheckpointError as error:
                problems.append(error.given.splitlines()[-1].strip())
        if problems:
            raise damaged(self.folder, problems)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {file.name: file.size for file in self.manifest.files}

    @cached_property
    def _sums(self) -> dict[str, NDArray[np.uint32]]:
        """File name -> crc32 of each of its cells."""
        try:
            data = (self.folder / SUMS).read_bytes()
        except OSError as error:
            raise damaged(self.folder, [f"{SUMS}: {error.strerror or error}"]) from error
        if crc32(data) != self.manifest.sums_crc32:
            raise damaged(self.folder, [f"{SUMS}: crc32 {crc32(data):08x}, not that of the manifest"])
        sums, cells = np.frombuffer(data, "<u4"), self.manifest.cells
        return {
            file: sums[cells.first(number) : cells.first(number + 1)]
            for number, file in enumerate(self._sizes)
        }

    def _read_cells(self, handle: BinaryIO, file: str, start: int, memory: memoryview) -> None:
        """Fill `memory` with whole cells from `start` on."""
        handle.seek(start)
        filled = read_into(handle, memory)
        for begin in range(0, len(memory), CELL_BYTES):
            crc = crc32(memory[begin : min(begin + CELL_BYTES, filled)])
            saved = int(self._sums[file][(start + begin) // CELL_BYTES])
            if crc != saved:
                place = f"crc32 {crc:08x} from byte {start + begin} on, {saved:08x} was saved"
                raise damaged(self.folder, [f"{file}: {place}"])

    @contextmanager
    def _opened(self, file: str) -> Iterator[BinaryIO]:
        try:
            with open_bytes(self.folder / file) as handle:
                yield handle
        except OSError as error:
            raise damaged(self.folder, [f"{file}: {error.strerror or error}"]) from error


def read_into(handle: BinaryIO, buffer: memoryview) -> int:
    """Fill the buffer as far as the file goes; returns the bytes read."""
    filled = 0
    while filled < len(buffer):
        size = handle.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not size:
            break
        filled += size
    return filled
