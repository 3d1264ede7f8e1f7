"""A `Cut` tensor that the ranks of a host hold once between them: each writes its part, all read the whole.

Handed out by `HostGroup`: gathering it copies nothing and waits for nobody, because what is a copy elsewhere
is here a view of the same pages. What a rank writes into the whole it alone sees, so an edit by user code is
never made on everyone's numbers, nor once by every rank. It never decides when a part may be written.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sixfold.base.errors import MeshError
from sixfold.base.units import bytes_text
from sixfold.mesh.dispatch import NOTHING, Pending
from sixfold.mesh.host.memory import tensor_in

_PATH = "/proc/self/pagemap"
PAGE_TABLE = _PATH if os.access(_PATH, os.R_OK) else os.devnull
"""A word for each page of this process."""
_IS_OF_FILE, _IS_HERE = 1, 6
"""In its three highest bits: whether the page is one of a file, whether it is in memory or swapped out."""


@dataclass(frozen=True)
class Common:
    """Shared numbers, as one rank sees them.

    Args:
        part: [size].
        whole: [n * size]: what all ranks have written, and what this rank alone has since `forget`.
        window: the map in which the whole lies.
        address: where that is in this process.
    """

    part: torch.Tensor
    whole: torch.Tensor
    window: mmap.mmap
    address: int
    is_copy: ClassVar[bool] = False

    @classmethod
    def open(
        cls,
        path: str,
        offset: int,
        numel: int,
        dtype: torch.dtype,
        *,
        place: int,
        count: int,
    ) -> Common:
        """The numbers [numel] at `offset` of a shared file, of `count` equal slices the one at `place`."""
        size = numel // count
        window, start = _window(path, offset, numel * dtype.itemsize, is_own=True)
        mine = offset + place * size * dtype.itemsize
        part, part_start = _window(path, mine, size * dtype.itemsize, is_own=False)
        return cls(
            tensor_in(part, part_start, size, dtype),
            tensor_in(window, start, numel, dtype),
            window,
            torch.frombuffer(window, dtype=torch.uint8).data_ptr(),
        )

    def gather(self) -> Pending:
        """See `Cut`."""
        return NOTHING

    def forget(self) -> None:
        """See `Cut`."""
        renew([self])


def renew(commons: Sequence[Common]) -> int:
    """Have those into whose whole this rank has written read from shared memory again; returns how many.

    It looks for pages that are no longer those of the file, which is far cheaper than mapping all anew; where
    it cannot look it takes it for granted.
    """
    count = 0
    with open(PAGE_TABLE, "rb", buffering=0) as table:
        for each in commons:
            entries = bytearray(8 * -(-len(each.window) // mmap.PAGESIZE))
            table.seek(8 * (each.address // mmap.PAGESIZE))
            can_see = table.readinto(entries) == len(entries)
            states = torch.frombuffer(entries, dtype=torch.int64) >> 61 & 7
            if not can_see or ((states & _IS_HERE > 0) & (states & _IS_OF_FILE == 0)).any():
                each.window.madvise(mmap.MADV_DONTNEED)
                count += 1
    return count


def _window(path: str, offset: int, num_bytes: int, *, is_own: bool) -> tuple[mmap.mmap, int]:
    """A map of some pages, to be written for itself or for all, and where in it the byte at `offset` is."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    handle = os.open(path, os.O_RDWR)
    try:
        window = mmap.mmap(
            handle,
            offset - start + num_bytes,
            flags=mmap.MAP_PRIVATE if is_own else mmap.MAP_SHARED,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start,
        )
    except OSError as error:
        raise MeshError(
            f"a map of {bytes_text(num_bytes)} in memory that ranks have in common: {error.strerror}",
            rule="each rank maps all parameters of its host, and may be asked to answer for a copy of them",
            fix='set layout.transport = "network", or let the system commit more (vm.overcommit_memory)',
        ) from error
    finally:
        os.close(handle)
    return window, offset - start
