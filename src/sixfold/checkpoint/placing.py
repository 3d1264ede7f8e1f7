"""From pieces of logical tensors to ranges of bytes in files.

Reading uses it for checkpoints and for foreign weights. Pieces of the saved type in host memory are filled
where they are; others go through a small buffer and are converted. It opens no file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sixfold.checkpoint.content import Piece
from sixfold.checkpoint.files import CHUNK_BYTES
from sixfold.checkpoint.tensorfile import Spec


@dataclass(frozen=True)
class Place:
    """Where a whole tensor lies: row-major from byte `start` of `file` on."""

    file: str
    start: int
    spec: Spec


def fill_pieces(
    pieces: Iterable[Piece],
    place_of: Callable[[Piece], Place],
    read: Callable[[str, list[tuple[int, memoryview]]], None],
) -> None:
    """Read each piece's elements into its tensor.

    Args:
        read: fills memories with the bytes of a file from a number on.
    """
    wanted: dict[str, list[tuple[int, memoryview]]] = {}
    converted = []
    for piece in pieces:
        place = place_of(piece)
        if piece.stop > place.spec.numel:
            raise AssertionError(f"{piece.name}: {place.spec} has no elements up to {piece.stop}")
        if piece.tensor.dtype == place.spec.dtype and piece.tensor.device.type == "cpu":
            start = place.start + piece.start * place.spec.dtype.itemsize
            wanted.setdefault(place.file, []).append((start, _memory_of(piece.tensor)))
        else:
            converted.append((piece, place))
    for file, ranges in wanted.items():
        read(file, ranges)
    for piece, place in converted:
        _convert(piece, place, read)


def _convert(piece: Piece, place: Place, read: Callable[[str, list[tuple[int, memoryview]]], None]) -> None:
    size = place.spec.dtype.itemsize
    flat = piece.tensor.detach().view(-1)
    buffer = torch.empty(min(flat.numel(), CHUNK_BYTES // size), dtype=place.spec.dtype)
    at = 0
    while at < flat.numel():
        start = place.start + (piece.start + at) * size
        # Chunks end where checksums do, so that none is needed twice.
        count = min(flat.numel() - at, max(1, (CHUNK_BYTES - start % CHUNK_BYTES) // size))
        read(place.file, [(start, _memory_of(buffer[:count]))])
        flat[at : at + count].copy_(buffer[:count])
        at += count


def _memory_of(tensor: Tensor) -> memoryview:
    if not tensor.is_contiguous():
        raise AssertionError(f"strides {tensor.stride()}: not contiguous memory")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
