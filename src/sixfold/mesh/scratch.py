"""Buffers for the time of one exchange, used again by the next: freshly mapped pages cost more than the
copy into them.

Taken by `Group` for what arrives and by the state engine for gradients on their way. It never keeps
more buffers than were out at once.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict

import torch

MAX_SLACK = 1.25
"""How many times as large as what is asked for a buffer may be: units of one kind differ by their padding."""


class Scratch:
    """Flat tensors; contents are whatever the last user left.

    Attributes:
        is_shared: whether somebody else may still read what was given back.
    """

    is_shared = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: defaultdict[torch.dtype, list[torch.Tensor]] = defaultdict(list)  # smallest first

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor [numel]; give it back when nothing reads or writes it any more."""
        if not numel:
            return torch.empty(0, dtype=dtype, device=self._device)
        free = self._free[dtype]
        for place, buffer in enumerate(free):
            fits = numel <= buffer.numel() <= MAX_SLACK * numel
            if fits and (not self.is_shared or self._is_idle(buffer)):
                return free.pop(place)[:numel]
        return self._make(numel, dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """Return what `take` gave."""
        if not tensor.numel():
            return
        buffer = tensor.new_empty(0).set_(tensor.untyped_storage())  # all of it, where a part was asked for
        insort(self._free[tensor.dtype], buffer, key=torch.Tensor.numel)

    def reclaim(self, tensor: torch.Tensor) -> None:
        """Return when no other rank reads `tensor`, so that it may be written: at once, in plain memory."""

    def _is_idle(self, buffer: torch.Tensor) -> bool:
        return True

    def _make(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)
