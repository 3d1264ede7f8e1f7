"""Buffers for the time of one exchange, used again by the next: freshly mapped pages cost more than the
copy into them.

Taken by `Group` for what arrives and by the state engine for gradients on their way. It never keeps
more buffers than were out at once.
"""

from __future__ import annotations

from collections import defaultdict

import torch


class Scratch:
    """Flat tensors by size and type; contents are whatever the last user left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: defaultdict[tuple[int, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor [numel]; give it back when nothing reads or writes it any more."""
        free = self._free[numel, dtype]
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=self._device)

    def give(self, tensor: torch.Tensor) -> None:
        """Return what `take` gave."""
        self._free[tensor.numel(), tensor.dtype].append(tensor)

    def reclaim(self, tensor: torch.Tensor) -> None:
        """Return when no other rank reads `tensor`, so that it may be written: at once, in plain memory."""
