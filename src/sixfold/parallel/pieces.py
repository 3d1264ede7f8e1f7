"""Pieces of parameters out of whole tensors and back, as their places say.

Used where numbers of the whole model come in or go out, whole or by ranges as in checkpoints, and for small
models on which a cut is tried; during an update each rank computes with its pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from sixfold.plan import Place, Slot


def piece_of(whole: torch.Tensor, place: Place) -> torch.Tensor:
    """What a rank with that place has of `whole`, contiguous; may be a view."""
    for dim, spans in enumerate(place.spans):
        if spans:
            whole = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in spans], dim)
    return whole.contiguous()


def put_piece(whole: torch.Tensor, place: Place, piece: torch.Tensor) -> None:
    """Inverse of `piece_of`: write `piece` into its place in `whole`."""
    theirs: list[list[slice]] = []
    mine: list[list[slice]] = []
    for size, spans in zip(place.shape, place.spans, strict=True):
        at = 0
        theirs.append([])
        mine.append([])
        for start, stop in spans or ((0, size),):
            theirs[-1].append(slice(start, stop))
            mine[-1].append(slice(at, at + stop - start))
            at += stop - start
    for there, here in zip(product(*theirs), product(*mine), strict=True):
        whole[there] = piece[here]


def runs_of(slot: Slot, start: int, part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element in the whole parameter, elements) of neighbours in it.

    Args:
        start: the first element of `part` in what this rank has of the parameter.
        part: flat.
    """
    for theirs, mine, count in slot.runs(start, start + part.numel()):
        if count:
            yield theirs, part[mine - start : mine - start + count]
