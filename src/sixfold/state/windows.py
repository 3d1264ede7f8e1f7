"""The reduction window: sums gradients over ranks in one order on every rank, while backward runs.

Opened and closed by `ModelState`. Where parameters are whole it counts gradients as they arrive and reduces
complete units, last unit first; where they are cut, it is told when backward leaves a unit, at the same place
among the gathers on every rank. It never looks at numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

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
            window was opened, and all units behind it are on their way; else when `start` is called.
            Parameters that receive none are counted in by `flush`.

    Attributes:
        is_open: whether gradients that come now are reduced.
    """

    def __init__(self, units: list[Unit], *, by_arrival: bool) -> None:
        self._all = [unit.gradients for unit in reversed(units) if unit.gradients is not None]
        self._by_arrival = by_arrival
        self._left: list[Gradients] = []
        self._under_way: list[Gradients] = []
        self._missing: dict[Gradients, int] = {}
        self.is_open = False
        # Units that are reduced after each of their backwards need no call of Python for each gradient: that
        # it has arrived is noted, without keeping the parameter, and all go home when the unit is reduced.
        self._handles = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._arrival(gradients, index)
                if by_arrival or not gradients.reduces_each
                else partial(gradients.awaited.pop, index)
            )
            for unit in units
            if (gradients := unit.gradients) is not None
            for index, parameter in enumerate(unit.parameters)
        ]

    def open(self) -> None:
        if self.is_open:
            self.close()
        for each in self._all:
            self._missing[each] = len(each.plan.slots)
        self._left, self._under_way = list(self._all), []
        self.is_open = True

    def start(self, gradients: Gradients | None) -> None:
        """Start to reduce a unit, which backward has left on every rank. Nothing happens without an open
        window, the second time, and for a frozen unit."""
        if not self.is_open or gradients is None or gradients not in self._left:
            return
        if gradients.reduces_each and len(self._under_way) == MOST_UNDER_WAY:
            self._under_way.pop(0).finish_reduce()
        self._left.remove(gradients)
        gradients.start_reduce()
        self._under_way.append(gradients)

    def flush(self) -> None:
        """Start to reduce what is left."""
        while self.is_open and self._left:
            self.start(self._left[0])

    def close(self) -> None:
        """Wait until all is reduced.

        Raises:
            StateError: a gradient came too late.
        """
        if not self.is_open:
            return
        self.finish()
        for each in self._all:
            if len(each.awaited) < len(each.plan.slots):
                raise self._late(each.first_arrived())

    def finish(self) -> None:
        """`close`, whichever gradients came: a window may have been left open by an error. Ranks that caught
        it go on from different places perhaps, so all that any of them started is brought to its end."""
        self.flush()
        while self._under_way:
            self._under_way.pop(0).finish_reduce()
        self.is_open = False

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _arrival(self, gradients: Gradients, index: int) -> Callable[[nn.Parameter], None]:
        # A hook hangs on its parameter where the garbage collector cannot follow: held firmly, a unit would
        # never be freed. All in one function, because it runs for every parameter.
        window, home = weakref.ref(self), weakref.ref(gradients)

        def arrived(parameter: nn.Parameter) -> None:
            here, its = window(), home()
            if here is None or its is None:
                return
            if here.is_open:
                if its not in here._left or (here._by_arrival and here._missing[its] == 0):
                    raise here._late(its.plan.slots[index].name)
                here._missing[its] -= 1
            view, grad = (its.local or its.open()).views[index], parameter.grad
            if grad is None or grad.is_sparse:
                its.home(index)
            elif grad is not view:  # as `home` does, without a call for each of them
                view.copy_(grad)
                parameter.grad = view
            while here.is_open and here._by_arrival and here._left and here._missing[here._left[0]] == 0:
                here.start(here._left[0])

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
