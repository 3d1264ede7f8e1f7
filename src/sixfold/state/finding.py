"""The first pass of its kind, in which ranks find out together in which order units are wanted.

Opened by `Gathering`; its end settles the order for all later passes. Before each gather the ranks say what
they want, and what comes first in the expected order is gathered on all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

from sixfold.mesh import Mesh
from sixfold.state.passes import BACKWARD, Users, Whole, drops_of, leave_before
from sixfold.state.unit import Unit
from sixfold.state.windows import ReduceWindow

_NOTHING = -1


class Finding:
    """A pass under way.

    Args:
        expected: all units, as they will probably be wanted.
        kept: what is whole after it, on every rank.
        lasting: units that are not dropped before its end.
        users: see `Users`.
        window: what reduces units that a backward pass has left; None where nothing is reduced.
        is_plain: of a backward pass, that it follows one forward, in which no block was wanted twice.

    Attributes:
        drops: see `Route`.
        found: what was gathered, in order.
    """

    def __init__(
        self,
        kind: str,
        expected: Sequence[Unit],
        kept: frozenset[Unit],
        lasting: Collection[Unit],
        users: Users,
        whole: Whole,
        window: ReduceWindow | None,
        mesh: Mesh,
        *,
        is_plain: bool,
    ) -> None:
        self.kind = kind
        self.kept = kept
        self._stays = kept.union(lasting)
        self.drops = drops_of(users, self._stays)
        self.found: list[Unit] = []
        self._expected = expected
        self._whole = whole
        self._window = window
        self._mesh = mesh
        self._leaves = kind == BACKWARD and is_plain
        self._leaving: deque[Unit] = deque()
        self._behind: set[Unit] = set()

    def go(self, units: Iterable[Unit], *, to_end: bool = False) -> None:
        """Go on until `units` are whole; or until no rank wants any more, which ends the pass."""
        wanted = [unit for unit in units if unit not in self._whole.units]
        if self.kind == BACKWARD:
            if wanted:
                for unit in self._behind.difference(units):
                    self._drop(unit)
            self._behind.update(units)
        for unit in wanted:
            self._negotiate(unit)
        if to_end:
            self._negotiate(None)

    def _negotiate(self, wanted: Unit | None) -> None:
        """Gather what any rank wants until this one has what it wants, or nobody wants anything."""
        mine = _NOTHING if wanted is None else self._expected.index(wanted)
        while True:
            everyones = [int(row[0]) for row in self._mesh.everyones(mine)]
            chosen = min((place for place in everyones if place != _NOTHING), default=None)
            if chosen is None:
                return
            unit = self._expected[chosen]
            self.found.append(unit)
            if self._leaves and unit.plan.blocks:
                self._leaving.append(unit)
                for left in leave_before(unit, self._leaving):
                    if self._window is not None:
                        self._window.start(left.gradients)
                    self._drop(left)
            was_whole = unit in self._whole.units
            self._whole.gather(unit)
            if unit is wanted:
                return
            if not was_whole:
                self._drop(unit)

    def _drop(self, unit: Unit) -> None:
        if unit in self._whole.units and unit not in self._stays and unit not in self._whole.holding:
            self._whole.drop(unit)
