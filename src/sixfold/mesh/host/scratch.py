"""Buffers that other ranks of the host can read, used again once nobody reads them any more.

Handed out by the mesh in place of plain ones; `HostGroup` notes here which exchange reads which buffer.
It never frees: what was reserved stays for the next exchange.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch

from sixfold.mesh.host.memory import OwnMemory
from sixfold.mesh.scratch import Scratch


class SharedScratch(Scratch):
    """`Scratch` in shared memory.

    Args:
        memory: where the buffers lie.
    """

    def __init__(self, memory: OwnMemory) -> None:
        super().__init__(torch.device("cpu"))
        self.memory = memory
        self._starts: list[int] = []  # of all buffers, ascending
        self._readers: dict[int, dict[object, Callable[[], None]]] = {}

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor [numel] that nobody reads; waits where others still do.

        Raises:
            MeshError: there is no memory for it.
        """
        free = self._free[numel, dtype]
        if free:
            tensor = free.pop(0)  # the one that others have had the longest time to read
            self.reclaim(tensor)
            return tensor
        self._starts.append(self.memory.reserve(numel * dtype.itemsize))
        return self.memory.tensor(self._starts[-1], numel, dtype)

    def reclaim(self, tensor: torch.Tensor) -> None:
        """Return when no other rank reads `tensor`, so that it may be written."""
        if tensor.numel():
            for wait in self._readers.pop(self._start_of(tensor), {}).values():
                wait()

    def note(self, tensor: torch.Tensor, reader: object, wait: Callable[[], None]) -> None:
        """Remember that others read from `tensor` until `wait` returns; of one reader only the last time."""
        self._readers.setdefault(self._start_of(tensor), {})[reader] = wait

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether others can read `tensor` where it lies."""
        return self.memory.offset_of(tensor) is not None

    def _start_of(self, tensor: torch.Tensor) -> int:
        offset = self.memory.offset_of(tensor)
        assert offset is not None, "only what lies in shared memory is read by others"
        return self._starts[bisect_right(self._starts, offset) - 1]
