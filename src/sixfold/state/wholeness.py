"""Whether gradients that count as whole are so: the last guard against an update from a part of one.

Called before the first update. A parameter that no axis cuts, and whose gradient nobody said to be partial,
has the same gradient on all ranks along the tensor axis; where it has not, a sum over the axis is missing or
one is too many. It changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh
from sixfold.state.unit import Unit

AXIS = "tensor"
"""The axis whose ranks are fed the same and are no replicas: over the others gradients are always summed."""
TOLERANCE = 1e-3
"""Largest difference of two norms or sums of one gradient, as a part of the norm; roundings are far below
it."""


def check_wholeness(units: Sequence[Unit], mesh: Mesh) -> None:
    """Compare reduced gradients along the tensor axis. A collective.

    Raises:
        ModelError: names parameters whose gradients differ; on every rank.
    """
    group = mesh.along(AXIS)
    if group.num_ranks == 1:
        return
    names, rows = [], [torch.zeros(2, dtype=torch.float64, device=mesh.device)]
    for unit in units:
        if AXIS in unit.plan.cut or unit.grads is None:
            continue
        for slot in unit.plan.slots:
            part = unit.part_of(unit.grads, slot).double()
            names.append(slot.name)
            rows.append(torch.stack((part.norm(), part.sum())))
    table = torch.zeros(group.num_ranks, len(rows), 2, dtype=torch.float64, device=mesh.device)
    table[group.place] = torch.stack(rows)
    group.all_gather(table.view(-1)).wait()
    norms, sums = table[:, 1:].unbind(-1)
    largest = norms.amax(0)
    spread = torch.maximum(largest - norms.amin(0), sums.amax(0) - sums.amin(0))
    differ = (spread > TOLERANCE * largest).tolist()
    found = [name for name, is_off in zip(names, differ, strict=True) if is_off]
    everyones = [name for text in mesh.texts(json.dumps(found)) for name in json.loads(text)]
    if everyones:
        first = list(dict.fromkeys(everyones))
        raise ModelError(
            f"gradients of {len(first)} parameter(s) differ along the tensor axis, first: {first[0]}",
            rule="what is whole on every rank of the tensor axis has the same gradient on each, or is "
            "declared to be partial, so that it is summed",
            fix=f"in the rules of the model, give the module of {first[0]} the style "
            '"replicated_with_grad_allreduce", or set layout.tensor = 1',
        )
