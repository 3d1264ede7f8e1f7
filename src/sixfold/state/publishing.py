"""From what an update has written to what forwards read, for several units at once.

Prepared by `ModelState` for the units that it publishes together, because what is exchanged is the same every
time. It changes no number of a master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sixfold.mesh import Replicas
from sixfold.plan import Spread
from sixfold.state.unit import Unit


class Publication:
    """Brings numbers of some units into their working parameters."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        alike: dict[tuple[Replicas, Spread, torch.dtype], list[Unit]] = {}
        for unit in units:
            alike.setdefault((unit.replicas, unit.spread, unit.part.dtype), []).append(unit)
        self._exchanges = [
            replicas.prepare_publish([unit.cut for unit in same], spread, same[0].residency.parameters)
            for (replicas, spread, _), same in alike.items()
        ]

    def run(self, numbers: Mapping[Unit, torch.Tensor] | None = None) -> None:
        """Publish the masters, or other `numbers` [own] of all units. A collective."""
        for unit in self._units:
            given = unit.master if numbers is None else numbers[unit]
            if given is not unit.held:
                unit.held.copy_(given)
        for exchange in self._exchanges:
            exchange.start()
        for exchange in self._exchanges:
            exchange.wait()
