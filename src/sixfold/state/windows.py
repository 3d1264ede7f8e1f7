"""The reduction window: sums gradients over ranks in a fixed order while backward runs.

Opened and closed by `ModelState`. It watches gradients arrive and hands complete units to their own
reduction; it never looks at numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sixfold.base.errors import StateError
from sixfold.state.unit import Unit

MOST_UNDER_WAY = 3
"""Units whose cut gradients may be on their way at once: each holds its whole gradient until it has
arrived."""


class ReduceWindow:
    """Reduces units in fixed order while backward runs.

    A unit is complete when each of its parameters has received its gradient since the window was
    opened; parameters that receive none are counted in by `close`.
    """

    def __init__(self, units: list[Unit]) -> None:
        self._order = list(reversed(units))
        self._missing: dict[Unit, int] = {}
        self._next = 0
        self._finished = 0
        self._open = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._arrival(unit, index))  # type: ignore[no-untyped-call]
            for unit in units
            for index, parameter in enumerate(unit.parameters)
        ]

    def open(self) -> None:
        self._missing = {unit: len(unit.parameters) for unit in self._order}
        self._next = self._finished = 0
        self._open = True

    def abandon(self) -> None:
        """Forget a window that an error left open."""
        self._open = False

    def flush(self) -> None:
        while self._open and self._next < len(self._order):
            self._start()

    def close(self) -> None:
        if not self._open:
            return
        self.flush()
        while self._finished < len(self._order):
            self._finish()
        self._open = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self) -> None:
        unit = self._order[self._next]
        unit.home_grads()
        unit.start_reduce()
        self._next += 1
        if unit.residency.gradients and self._next - self._finished > MOST_UNDER_WAY:
            self._finish()

    def _finish(self) -> None:
        self._order[self._finished].finish_reduce()
        self._finished += 1

    def _arrival(self, unit: Unit, index: int) -> Callable[[nn.Parameter], None]:
        def arrived(parameter: nn.Parameter) -> None:
            unit.home_grad(index)
            if not self._open:
                return
            self._missing[unit] -= 1
            if self._missing[unit] < 0:
                raise StateError(
                    f"a parameter of shape {tuple(parameter.shape)} received a second gradient after its "
                    "unit was handed to the reduction",
                    rule="one backward pass gives each parameter its gradient once",
                    fix="use torch.utils.checkpoint with use_reentrant=False, or the written-out loop "
                    "(engine.backward), which reduces in step()",
                )
            while self._next < len(self._order) and self._missing[self._order[self._next]] == 0:
                self._start()

        return arrived
