"""A moving average of the trained weights, beside the masters and cut like them.

Made by `bind` where `optimizer.ema_decay` asks for it, updated with every step of the optimizer. It never
changes a master; `ModelState.shown` lends averages to the working parameters for a while.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sixfold.state.unit import Unit


class Average:
    """average <- decay * average + (1 - decay) * weight, from the weights at the start.

    Args:
        units: the trained ones.

    Attributes:
        numbers: each unit's averages, [own] in the master type.
    """

    def __init__(self, units: Sequence[Unit], decay: float) -> None:
        self._decay = decay
        self.numbers: Mapping[Unit, torch.Tensor] = {unit: unit.master.clone() for unit in units}

    def update(self) -> None:
        """Take in the masters as they are now."""
        for unit, average in self.numbers.items():
            average.lerp_(unit.master, 1 - self._decay)

    def live_bytes(self) -> int:
        """Bytes of all averages."""
        return sum(average.untyped_storage().nbytes() for average in self.numbers.values())
