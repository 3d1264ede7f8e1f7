"""Flat tensors and the parameters in them: views by slot, and what lies between.

Used by units, gradients, optimizers and checkpoints. It knows places, not what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from sixfold.plan import Slot


def view_of(flat: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The view of `flat` [numel of the unit] that belongs to one parameter, in its shape."""
    return flat[slot.offset : slot.offset + slot.numel].view(slot.shape)


def views_of(flat: torch.Tensor, slots: Sequence[Slot]) -> list[torch.Tensor]:
    """`view_of` for several slots."""
    return [view_of(flat, slot) for slot in slots]


def range_in(flat: torch.Tensor, part: torch.Tensor) -> tuple[int, int]:
    """(start, stop) of the elements of `flat` that `part`, a view of it, shows."""
    start = int(part.storage_offset() - flat.storage_offset())
    return start, start + part.numel()


def zero_between(flat: torch.Tensor, filled: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Zero the elements of `flat` that lie in none of the ranges (start, stop), and return it."""
    at = 0
    for start, stop in sorted(filled):
        flat[at:start] = 0
        at = max(at, stop)
    flat[at:] = 0
    return flat
