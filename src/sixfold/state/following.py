"""A pass on the route that was prepared for it: the same gathers, drops and reductions on every rank.

Opened by `Gathering` where the order of a kind of pass is settled. All is decided; what is left is to compare
what the model wants with what comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sixfold.base.errors import StateError
from sixfold.mesh import Pending
from sixfold.state.passes import Route, Whole
from sixfold.state.unit import Unit
from sixfold.state.windows import ReduceWindow


class Following:
    """A pass under way.

    Args:
        window: what reduces units that a backward pass has left; None where nothing is reduced.

    Attributes:
        drops, kept: see `Route`.
    """

    def __init__(self, kind: str, route: Route, whole: Whole, window: ReduceWindow | None) -> None:
        self.kind = kind
        self.drops, self.kept = route.drops, route.kept
        self._stays = route.stays
        self._left = deque(route.steps)
        self._whole = whole
        self._window = window
        self._under_way: dict[Unit, Pending] = {}
        for unit in route.starts:
            self._under_way[unit] = unit.presence.gather()

    def go(self, units: Iterable[Unit], *, to_end: bool = False) -> None:
        """Go on until `units` are whole, or to the end, and gather for others what lies on the way.

        Raises:
            StateError: they do not come any more.
        """
        present, holding = self._whole.units, self._whole.holding
        wanted = set(units) - present
        while self._left and (wanted or to_end):
            step = self._left.popleft()
            for left in step.leaves:
                if self._window is not None:
                    self._window.start(left.gradients)
                if left in present and left not in self._stays and left not in holding:
                    present.discard(left)
                    left.presence.drop()
            unit, presence = step.unit, step.unit.presence
            if presence.is_copy:
                (self._under_way.pop(unit, None) or presence.gather()).wait()
            presence.show()
            if unit in wanted or unit in self._stays or unit in holding:
                present.add(unit)
                wanted.discard(unit)
            else:
                presence.drop()
            for each in step.starts:
                self._under_way[each] = each.presence.gather()
        if wanted:
            raise StateError(
                f"the block of {wanted.pop().plan.slots[0].name} runs at another place than in the first "
                f"{self.kind}",
                rule="with cut parameters all ranks gather blocks in one order, that of the first pass; "
                "blocks may be left out, but not change places",
                fix="set layout.zero = 2, or name a part that holds these blocks in layout.blocks",
            )
