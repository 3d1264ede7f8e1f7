"""The few file operations a save is made of, and checksums that run along with them.

`writing` and `retention` change the disk only through a `Files` object, so that a test can stop a save
before any single operation or fill the disk at any byte. It knows bytes and folders, never tensors.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

CHUNK_BYTES = 16 * 2**20
"""Most that is handed to the system, or summed, at once."""

Buffer = bytes | memoryview


class Files:
    """The local file system."""

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> FileIO:
        """A new, unbuffered file; one that exists already is an error."""
        return FileIO(path, "xb")

    def write(self, handle: FileIO, data: Buffer) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[handle.write(rest) :]

    def sync(self, handle: FileIO) -> None:
        os.fsync(handle.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Make the names inside a folder durable; a system without folder handles needs nothing."""
        if os.name == "nt":
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove(self, folder: Path) -> None:
        """Remove a folder with everything in it, if it is there."""
        if folder.exists():
            shutil.rmtree(folder)

    def free_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free


class Sink:
    """One file being written: its size and crc32 are known when the last byte is.

    Every byte is summed once. The sum of the file is joined from the sums of its pieces, so pieces
    that different writers summed can be joined just as well.
    """

    def __init__(self, files: Files, handle: FileIO) -> None:
        self._files, self._handle = files, handle
        self.size = 0
        self.crc32 = 0

    def add(self, chunks: Iterable[Buffer]) -> int:
        """Append one piece; returns the crc32 of that piece alone."""
        crc, size = 0, 0
        for chunk in chunks:
            self._files.write(self._handle, chunk)
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
        self.crc32 = join_crc32(self.crc32, crc, size)
        self.size += size
        return crc


@contextmanager
def new_file(files: Files, path: Path) -> Iterator[Sink]:
    """A `Sink` for a new file, which is durable once the block has ended without an error."""
    with files.create(path) as handle:
        yield Sink(files, handle)
        files.sync(handle)


def join_crc32(first: int, second: int, second_bytes: int) -> int:
    """The crc32 of A + B from crc32(A), crc32(B) and len(B), without the bytes.

    Appending n bytes multiplies the sum, a polynomial over GF(2), by x^(8n) modulo the crc's own.
    """
    power, base = 1 << 31, 1 << 23  # x^0 and x^8; the highest bit is the lowest power
    while second_bytes:
        if second_bytes & 1:
            power = _times(base, power)
        base = _times(base, base)
        second_bytes >>= 1
    return _times(power, first) ^ second


def _times(a: int, b: int) -> int:
    product, bit = 0, 1 << 31
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = (b >> 1) ^ (0xEDB88320 if b & 1 else 0)
    return product
