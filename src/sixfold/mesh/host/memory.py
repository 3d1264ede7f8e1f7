"""Memory of one rank that other ranks of the host can read: one anonymous file, mapped once by everybody.

Made by `Host`. The file is as long as memory could ever be and almost all hole, so that nobody has to map
it again when it grows; pages are reserved before use, because touching one that cannot be had ends the
process. Nothing has a name: the kernel takes it back when the last process that maps it has ended.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
import weakref

import torch

from sixfold.base.errors import MeshError
from sixfold.base.units import bytes_text
from sixfold.mesh.host.limits import free_bytes

_PREFAULT = 23  # MADV_POPULATE_WRITE, Linux 5.14; Python's mmap has no name for it yet


class OwnMemory:
    """What this rank offers.

    Args:
        length: bytes that can be reserved at most; address space, not memory.
    """

    def __init__(self, length: int) -> None:
        self.handle = os.memfd_create("sixfold")
        self.path = f"/proc/self/fd/{self.handle}"
        weakref.finalize(self, os.close, self.handle)
        os.ftruncate(self.handle, length)
        self.map = mmap.mmap(self.handle, length)
        self.address = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()
        self._reserved = 0

    def reserve(self, num_bytes: int) -> int:
        """The offset of `num_bytes` new zeros.

        Raises:
            MeshError: memory of that size is not free.
        """
        size = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        offset = self._reserved
        set_aside = len(self.map) - offset, "of the address space set aside"
        free, limit = min(filter(None, (free_bytes(), set_aside)))
        if size > free:
            raise self._refusal(size, f"{bytes_text(free)} are free {limit}")
        try:
            os.posix_fallocate(self.handle, offset, size)
        except OSError as error:
            raise self._refusal(size, error.strerror or str(error)) from error
        self._reserved += size
        with contextlib.suppress(OSError):
            self.map.madvise(_PREFAULT, offset, size)  # far cheaper than a fault for every page
        return offset

    def tensor(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The tensor [numel] at `offset`."""
        return tensor_in(self.map, offset, numel, dtype)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a contiguous tensor begins, None when it lies elsewhere."""
        offset = tensor.data_ptr() - self.address
        return offset if 0 <= offset < len(self.map) else None

    def _refusal(self, size: int, why: str) -> MeshError:
        return MeshError(
            f"{bytes_text(size)} more of shared memory beside {bytes_text(self._reserved)}: {why}",
            rule="what ranks of a host exchange lies in memory that they share",
            fix='set layout.transport = "network", which needs less, or train fewer parameters per host',
        )


class PeerMemory:
    """What another rank of this host offers, to be read only: no mistake here can spoil it.

    Args:
        pid: its process.
        handle: its file, as it knows it.
    """

    def __init__(self, pid: int, handle: int) -> None:
        self.path = f"/proc/{pid}/fd/{handle}"
        self.map = _mapped(self.path, os.O_RDONLY, mmap.PROT_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch cannot mark a tensor as one that is only read
            self._bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()

    def tensor(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The tensor [numel] at `offset`; it must not be written."""
        return self._bytes[offset : offset + numel * dtype.itemsize].view(dtype)


def tensor_in(memory: mmap.mmap, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [numel] whose storage is no larger than itself, so that its bytes can be counted and saved."""
    return torch.frombuffer(memory, dtype=dtype, count=max(numel, 1), offset=offset)[:numel]


def _mapped(path: str, mode: int, protection: int) -> mmap.mmap:
    handle = os.open(path, mode)
    try:
        return mmap.mmap(handle, os.fstat(handle).st_size, flags=mmap.MAP_SHARED, prot=protection)
    finally:
        os.close(handle)
