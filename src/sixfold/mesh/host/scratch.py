"""Buffers that other ranks of the host can read, used again once nobody reads them any more.

Handed out by the mesh in place of plain ones; lanes note here which exchange reads which buffer.
It never frees: what was reserved stays for the next exchange.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Protocol

import torch

from sixfold.mesh.host.memory import OwnMemory
from sixfold.mesh.scratch import Scratch


class Readers(Protocol):
    """Those who read what this rank offers, in a numbered sequence."""

    read_by_all: int
    """What was offered below this number all are known to have read."""

    def await_readers(self, number: int) -> None:
        """Return when all have read what was offered under a number."""

    def is_finished(self, number: int, *, by_all: bool) -> bool:
        """Whether they have."""


class SharedScratch(Scratch):
    """`Scratch` in shared memory: what is taken nobody reads, and taking never waits until others have read.

    A buffer for which there is no memory is refused with a MeshError.

    Args:
        memory: where the buffers lie.
    """

    is_shared = True

    def __init__(self, memory: OwnMemory) -> None:
        super().__init__(torch.device("cpu"))
        self.memory = memory
        self._starts: list[int] = []  # of all buffers, ascending
        self._readers: dict[int, dict[Readers, int]] = {}  # of the buffers that begin there

    def reclaim(self, tensor: torch.Tensor) -> None:
        """Return when no other rank reads `tensor`, all of what was taken, so that it may be written."""
        readers = self._readers.get(tensor.data_ptr() - self.memory.address)
        while readers:
            each, number = readers.popitem()
            each.await_readers(number)

    def readers_of(self, tensor: torch.Tensor) -> dict[Any, int]:
        """Who reads the buffer in which `tensor` lies, each with the last number under which it does; whoever
        has it read notes so here."""
        offset = self.memory.offset_of(tensor) if tensor.numel() else None
        if offset is None:
            return {}  # nothing that others could read
        start = self._starts[bisect_right(self._starts, offset) - 1]
        return self._readers.setdefault(start, {})

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether others can read `tensor` where it lies."""
        return self.memory.offset_of(tensor) is not None

    def _is_idle(self, buffer: torch.Tensor) -> bool:
        readers = self._readers.get(buffer.data_ptr() - self.memory.address)
        if readers is None:
            return True
        for each, number in list(readers.items()):
            if number < each.read_by_all or each.is_finished(number, by_all=True):
                del readers[each]
        return not readers

    def _make(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self._starts.append(self.memory.reserve(numel * dtype.itemsize))
        return self.memory.tensor(self._starts[-1], numel, dtype)
