"""Several tensors in one flat one, so that an exchange carries them together.

Used by `heads.py` and `ring.py`, which know what is in it. It sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one type, one behind the other, copied once however they lie."""
    flat = tensors[0].new_empty(sum(each.numel() for each in tensors))
    for piece, each in zip(unpacked(flat, [each.shape for each in tensors]), tensors, strict=True):
        piece.copy_(each)
    return flat


def unpacked(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of those shapes, one behind the other."""
    pieces = torch.split(flat, [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
