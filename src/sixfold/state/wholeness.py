"""Whether gradients that count as whole are so: the last guard against an update from a part of one.

Asked before the first updates. A parameter that no axis cuts, and whose gradient nobody said to be partial,
has the same gradient on all ranks along the tensor axis; where it has not, a sum over the axis is missing.
One sum too many is the same everywhere, and is not seen here. It changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain

import torch

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh
from sixfold.state.unit import Unit

AXIS = "tensor"
"""The axis whose ranks are fed the same and are no replicas: over the others gradients are always summed."""
TOLERANCE = 1e-3
"""Largest difference of two norms or sums of one gradient, as a part of the norm; roundings are far below
it."""
MOST_UPDATES = 20
"""Updates that are looked at, at most: more than a loss scale needs to come down from its start to 1. Some
gradients are zero for ever."""


class Wholeness:
    """Compares reduced gradients along the tensor axis, until each has been seen once.

    Args:
        units: trained ones of this rank.
    """

    def __init__(self, units: Sequence[Unit], mesh: Mesh) -> None:
        self._mesh = mesh
        self._group = mesh.along(AXIS)
        self._left = 0 if self._group.num_ranks == 1 else MOST_UPDATES
        self._unseen = [
            (unit, slot)
            for unit in units
            if AXIS not in unit.plan.cut and unit.grads is not None
            for slot in unit.plan.slots
            if unit.part_of(unit.grads, slot).numel()
        ]

    def check(self) -> None:
        """Compare those that have not been seen with finite numbers other than zero. A collective, which all
        ranks leave out alike once nothing is to be seen any more.

        Raises:
            ModelError: names parameters whose gradients differ; on every rank.
        """
        if not self._left:
            return
        self._left -= 1
        norms, sums = self._everyones()
        largest = norms.amax(0)
        spread = torch.maximum(largest - norms.amin(0), sums.amax(0) - sums.amin(0))
        differ = (spread > TOLERANCE * largest).tolist()
        found = [slot.name for (_, slot), is_off in zip(self._unseen, differ, strict=True) if is_off]
        was_seen = (largest.isfinite() & (largest > 0)).tolist()
        self._unseen = [each for each, flag in zip(self._unseen, was_seen, strict=True) if not flag]
        rows = [json.loads(text) for text in self._mesh.texts(json.dumps([found, len(self._unseen)]))]
        if not any(unseen for _, unseen in rows):
            self._left = 0
        first = list(dict.fromkeys(chain.from_iterable(names for names, _ in rows)))
        if first:
            raise ModelError(
                f"gradients of {len(first)} parameter(s) differ along the tensor axis, first: {first[0]}",
                rule="what is whole on every rank of the tensor axis has the same gradient on each, or is "
                "declared to be partial, so that it is summed",
                fix=f"in the rules of the model, give the module of {first[0]} the style "
                '"replicated_with_grad_allreduce", or set layout.tensor = 1',
            )

    def _everyones(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms and sums [ranks of the axis, unseen gradients]."""
        rows = []
        for unit, slot in self._unseen:
            assert unit.grads is not None, "of trained units"
            part = unit.part_of(unit.grads, slot).double()
            rows.append(torch.stack((part.norm(), part.sum())))
        shape = self._group.num_ranks, len(rows), 2
        table = torch.zeros(shape, dtype=torch.float64, device=self._mesh.device)
        if rows:
            table[self._group.place] = torch.stack(rows)
            self._group.all_gather(table.view(-1)).wait()
        norms, sums = table.unbind(-1)
        return norms, sums
