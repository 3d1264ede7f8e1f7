"""The few file operations that saving and pruning are made of.

`writing` and `retention` change the disk only through a `Files` object, so that a test can stop a save
before any single operation, slow one rank down or fill the disk. It knows bytes and folders, never
tensors.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

from sixfold.checkpoint.remote import is_remote, remove_remote

MANIFEST = "manifest.json"
CHUNK_BYTES = 2**20
"""Most that is handed to the system at once: what was summed a moment ago is copied from the cache."""

_HASTENED_BYTES = 2**18
"""What is smaller waits in memory for `sync`, as all would by default."""
_SYNC_FILE_RANGE_WRITE = 2  # fcntl.h of Linux

Buffer = bytes | memoryview


class Files:
    """The local file system, or one that is mounted."""

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path, size: int) -> FileIO:
        """A new, unbuffered file with its room reserved; one that exists already is an error."""
        handle = FileIO(path, "xb")
        try:
            _reserve(handle.fileno(), size)
        except BaseException:
            handle.close()
            raise
        return handle

    def reopen(self, path: Path) -> FileIO:
        """A file that another rank has created, to write into."""
        return FileIO(path, "r+b")

    def write(self, handle: FileIO, data: Buffer, offset: int) -> None:
        """Put `data` at `offset`, wherever other writers of the same file are."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(handle.fileno(), rest, offset)
            if written >= _HASTENED_BYTES:
                _start_writeback(handle.fileno(), offset, written)
            rest, offset = rest[written:], offset + written

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

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove(self, folder: Path) -> None:
        """Remove a folder with everything in it, if it is there."""
        if is_remote(folder):
            remove_remote(folder, first=MANIFEST)
        elif folder.exists():
            shutil.rmtree(folder)

    def names(self, folder: Path) -> set[str]:
        """What is in a folder; nothing where there is none. It is read anew each time: file systems
        shared by hosts may remember for long that a single name was not there."""
        with suppress(FileNotFoundError):
            return set(os.listdir(folder))
        return set()

    def free_bytes(self, folder: Path) -> int:
        """Room for what is written here or, for a remote folder, made before it goes there."""
        return shutil.disk_usage(tempfile.gettempdir() if is_remote(folder) else folder).free


def _reserve(handle: int, size: int) -> None:
    if not size:
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except (AttributeError, OSError) as error:
        # Not every system and file system can; a full disk is then met by a write.
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(handle, size)


def _start_writeback(handle: int, offset: int, size: int) -> None:
    """Let the disk begin with what was just written, while more is summed and copied. Where the system cannot
    do that, `sync`, which is needed in any case, does it all."""
    call = _sync_file_range()
    if call is not None:
        call(handle, offset, size, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
