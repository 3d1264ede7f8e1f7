"""Where the elements of a rank's piece of a parameter stand in the whole one.

Used where numbers of the whole model come in or go out by ranges, as in checkpoints. It moves no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sixfold.plan import Slot


def runs_of(slot: Slot, start: int, part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element in the whole parameter, elements) of neighbours in it.

    Args:
        start: the first element of `part` in what this rank has of the parameter.
        part: flat.
    """
    for theirs, mine, count in slot.runs(start, start + part.numel()):
        if count:
            yield theirs, part[mine - start : mine - start + count]
