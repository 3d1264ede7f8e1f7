"""The reduction window: sums gradients over ranks in one order on every rank, while backward runs.

Opened and closed by `ModelState`. Where parameters are whole it watches gradients arrive and reduces
complete units, last unit first; where they are cut, units are handed over as backward leaves them, at the
same place among the gathers on every rank. It never looks at numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

from sixfold.base.errors import StateError
from sixfold.state.gradients import Gradients
from sixfold.state.unit import Unit

MOST_UNDER_WAY = 2
"""Units whose cut gradients may be on their way at once: each holds its whole gradient until it has
arrived."""


class ReduceWindow:
    """Reduces units while backward runs.

    Args:
        units: in module order.
        by_arrival: reduce a unit as soon as each of its parameters has received its gradient since the
            window was opened, and all units behind it are on their way; else when it is handed over.
            Parameters that receive none are counted in by `flush`.
    """

    def __init__(self, units: list[Unit], *, by_arrival: bool) -> None:
        self._all = [unit.gradients for unit in reversed(units) if unit.gradients is not None]
        self._by_arrival = by_arrival
        self._left: list[Gradients] = []
        self._under_way: list[Gradients] = []
        self._missing: dict[Gradients, int] = {}
        self._open = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._arrival(unit.gradients, index))  # type: ignore[no-untyped-call]
            for unit in units
            if unit.gradients is not None
            for index, parameter in enumerate(unit.parameters)
        ]

    def open(self) -> None:
        if self._open:
            self.close()
        for each in self._all:
            self._missing[each] = len(each.plan.slots)
        self._left, self._under_way = list(self._all), []
        self._open = True

    def abandon(self) -> None:
        """Forget a window that an error left open."""
        self._open = False

    def hand_over(self, unit: Unit) -> None:
        """Backward has left `unit`, on every rank; without an open window nothing happens."""
        if self._open and unit.gradients in self._left:
            self._start(unit.gradients)

    def flush(self) -> None:
        while self._open and self._left:
            self._start(self._left[0])

    def close(self) -> None:
        if not self._open:
            return
        if self._left:
            self.flush()
        while self._under_way:
            self._under_way.pop(0).finish_reduce()
        self._open = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, gradients: Gradients) -> None:
        self._left.remove(gradients)
        gradients.start_reduce()
        self._under_way.append(gradients)
        if gradients.reduces_each and len(self._under_way) > MOST_UNDER_WAY:
            self._under_way.pop(0).finish_reduce()

    def _arrival(self, gradients: Gradients, index: int) -> Callable[[nn.Parameter], None]:
        # A hook hangs on its parameter where the garbage collector cannot follow: held firmly, a unit would
        # never be freed. All in one function, because it runs for every parameter.
        window, home = weakref.ref(self), weakref.ref(gradients)

        def arrived(parameter: nn.Parameter) -> None:
            here, its = window(), home()
            if here is None or its is None:
                return
            if here._open:
                if its not in here._left or (here._by_arrival and here._missing[its] == 0):
                    raise here._late(its.plan.slots[index].name)
                here._missing[its] -= 1
            view, grad = (its.local or its.open()).views[index], parameter.grad
            if grad is None or grad.is_sparse:
                its.home(index)
            elif grad is not view:  # as `home` does, without a call for each of them
                view.copy_(grad)
                parameter.grad = view
            while here._open and here._by_arrival and here._left and here._missing[here._left[0]] == 0:
                here._start(here._left[0])

        return arrived

    def _late(self, name: str) -> StateError:
        if self._by_arrival:
            return StateError(
                f"{name} received a second gradient after its unit was handed to the reduction",
                rule="one backward pass gives each parameter its gradient once",
                fix="use torch.utils.checkpoint with use_reentrant=False, or the written-out loop "
                "(engine.backward), which reduces in step()",
            )
        return StateError(
            f"{name} received a gradient after its unit was handed to the reduction",
            rule="with cut parameters (layout.zero = 3) gradients are complete when backward comes to "
            "an earlier block",
            fix="name a part that holds all uses of it in layout.blocks, or set layout.zero = 2",
        )
