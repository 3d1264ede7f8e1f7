"""Buffers that other ranks of the host can read, used again once nobody reads them any more.

Handed out by the mesh in place of plain ones; `HostGroup` notes here which exchange reads which buffer.
It never frees: what was reserved stays for the next exchange.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

import torch

from sixfold.mesh.host.memory import OwnMemory
from sixfold.mesh.scratch import Scratch


class Readers(Protocol):
    """Those who read what this rank offers, in a numbered sequence."""

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

    def __init__(self, memory: OwnMemory) -> None:
        super().__init__(torch.device("cpu"))
        self.memory = memory
        self._starts: list[int] = []  # of all buffers, ascending
        self._readers: dict[int, dict[Readers, int]] = {}

    def reclaim(self, tensor: torch.Tensor) -> None:
        """Return when no other rank reads `tensor`, so that it may be written."""
        for each, number in self._readers.pop(self._start_of(tensor), {}).items():
            each.await_readers(number)

    def note(self, tensor: torch.Tensor, readers: Readers, number: int) -> None:
        """Remember who reads `tensor`, and under which number; of each the last time only."""
        self._readers.setdefault(self._start_of(tensor), {})[readers] = number

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether others can read `tensor` where it lies."""
        return self.memory.offset_of(tensor) is not None

    def _is_idle(self, buffer: torch.Tensor) -> bool:
        readers = self._readers.get(self._start_of(buffer), {})
        return all(each.is_finished(number, by_all=True) for each, number in readers.items())

    def _make(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self._starts.append(self.memory.reserve(numel * dtype.itemsize))
        return self.memory.tensor(self._starts[-1], numel, dtype)

    def _start_of(self, tensor: torch.Tensor) -> int:
        if not tensor.numel():
            return -1  # nothing to read
        offset = self.memory.offset_of(tensor)
        assert offset is not None, "only what lies in shared memory is read by others"
        return self._starts[bisect_right(self._starts, offset) - 1]
