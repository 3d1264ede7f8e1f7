"""A `Cut` tensor that the ranks of a host hold once between them: each writes its part, all read the whole.

Handed out by `HostGroup`: gathering it copies nothing and waits for nobody, because what is a copy elsewhere
is here a view of the same pages. What a rank writes into the whole it alone sees, so an edit by user code is
never made on everyone's numbers, nor once by every rank. It never decides when a part may be written.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import ClassVar

import torch

from sixfold.base.errors import MeshError
from sixfold.base.units import bytes_text
from sixfold.mesh.dispatch import NOTHING, Pending
from sixfold.mesh.host.memory import tensor_in


@dataclass(frozen=True)
class Common:
    """Shared numbers, as one rank sees them.

    Args:
        part: [size].
        whole: [n * size]: what all ranks have written, and what this rank alone has since `forget`.
    """

    part: torch.Tensor
    whole: torch.Tensor
    _window: mmap.mmap
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
        return cls(tensor_in(part, part_start, size, dtype), tensor_in(window, start, numel, dtype), window)

    def gather(self) -> Pending:
        """See `Cut`."""
        return NOTHING

    def forget(self) -> None:
        """See `Cut`: every page is read from shared memory again."""
        self._window.madvise(mmap.MADV_DONTNEED)


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
