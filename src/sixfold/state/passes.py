"""Passes through the model where parameters are cut, and the one order of units that each kind of pass has.

Values, made once: how the first pass of a kind settles the order for all later ones, and the route that these
take, in which every gather, drop and reduction has its place. Nothing here gathers or sends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sixfold.state.unit import Unit

EVALUATION, FORWARD, BACKWARD = "forward without gradients", "forward", "backward"
UNREDUCED = "backward that is not the engine's"
"""Kinds of passes. The last is what torch runs by itself, for the loss of another model or for a gradient
that somebody asks for: a backward in which nothing is reduced."""
PASSES = (EVALUATION, FORWARD, UNREDUCED, BACKWARD)
"""Where ranks come to different ones, the first in this order goes first."""

Users = Mapping[str, Sequence[Unit]]
"""The units that a block uses, by its name."""


def forward_kind() -> str:
    """The kind of a forward here and now."""
    return FORWARD if torch.is_grad_enabled() else EVALUATION


@dataclass(frozen=True)
class Whole:
    """What is whole on this rank.

    Args:
        units: those that are now.
        holding: those of blocks that run other blocks inside them, as far as this rank has seen; they are not
            dropped before the end of a pass.
    """

    units: set[Unit] = field(default_factory=set)
    holding: set[Unit] = field(default_factory=set)

    def gather(self, unit: Unit) -> None:
        """Make a unit whole and wait for it."""
        unit.presence.gather().wait()
        unit.presence.show()
        self.units.add(unit)

    def drop(self, unit: Unit) -> None:
        """The reverse."""
        self.units.discard(unit)
        unit.presence.drop()


@dataclass(frozen=True)
class Order:
    """How units follow each other in one kind of pass.

    Args:
        units: each once.
        lasting: those that are in use till the end: what lies outside of blocks, what was wanted again after
            it had been dropped, blocks that hold others.
    """

    units: Sequence[Unit] = ()
    lasting: frozenset[Unit] = frozenset()


def settle(
    found: Sequence[Unit], expected: Sequence[Unit], idle: Collection[Unit], holders: Collection[Unit]
) -> Order:
    """The order for later passes: what was found, and in between what another way through the model needs.

    Args:
        found: what the first pass gathered.
        expected: all units, as they will probably be wanted; first those that lie outside of blocks.
        idle: of these, those that no pass of this kind will want.
        holders: units of blocks that run other blocks inside them.
    """
    staying = [unit for unit in expected if not unit.plan.blocks]
    times = Counter(found)
    units = list(dict.fromkeys((*staying, *times)))
    place = len(staying)
    for unit in expected:
        if unit not in units and unit not in idle:
            units.insert(place, unit)
        if unit in units:
            place = max(units.index(unit) + 1, len(staying))
    repeated = [unit for unit, count in times.items() if count > 1]
    return Order(tuple(units), frozenset((*staying, *repeated, *holders)))


@dataclass(frozen=True)
class Step:
    """What ranks do together when a pass comes to a unit.

    Args:
        unit: it is gathered.
        leaves: units that backward is through with by now; they are reduced, and dropped.
        starts: units whose gathers start when this one has arrived.
    """

    unit: Unit
    leaves: Sequence[Unit]
    starts: Sequence[Unit]


@dataclass(frozen=True)
class Route:
    """A pass, decided from its beginning to its end.

    Args:
        starts: units whose gathers start at once.
        steps: one for each unit that is not whole yet, in the order that all ranks keep.
        drops: by name of a block, what is dropped when its forward has ended.
        stays: what is not dropped on the way.
        kept: what is whole after it, on every rank.
    """

    starts: Sequence[Unit]
    steps: Sequence[Step]
    drops: Users
    stays: frozenset[Unit]
    kept: frozenset[Unit]


def route(
    order: Order,
    present: Collection[Unit],
    kept: frozenset[Unit],
    users: Users,
    prefetch_bytes: int | None,
    *,
    is_backward: bool,
) -> Route:
    """Decide a pass.

    Args:
        present: what is whole at its beginning, on every rank.
        kept: see `Route`.
        prefetch_bytes: bound on what is gathered ahead; None for always one unit.
    """
    todo = [unit for unit in order.units if unit not in present]
    ahead = _ahead(todo, prefetch_bytes)
    starts = next(ahead)
    leaving = deque(unit for unit in order.units if is_backward and unit not in order.lasting)
    steps = []
    for unit, then in zip(todo, ahead, strict=True):
        leaves = leave_before(unit, leaving) if unit in leaving else []
        steps.append(Step(unit, leaves, then))
    stays = kept | order.lasting
    return Route(starts, steps, drops_of(users, stays), stays, kept)


def leave_before(unit: Unit, leaving: deque[Unit]) -> list[Unit]:
    """Take out of `leaving`, which holds `unit`, what backward is through with when it has come there: all
    units before that are of other blocks."""
    left = []
    while not set(leaving[0].plan.blocks) & set(unit.plan.blocks):
        left.append(leaving.popleft())
    return left


def drops_of(users: Users, stays: Collection[Unit]) -> Users:
    """`Route.drops`: of several blocks that use a unit, the last one is through with it."""
    return {
        name: [unit for unit in units if unit.plan.blocks[-1] == name and unit not in stays]
        for name, units in users.items()
    }


def _ahead(todo: Sequence[Unit], prefetch_bytes: int | None) -> Iterator[list[Unit]]:
    """Which gathers start at the beginning, and when each unit of `todo` has arrived: those of the next units
    that fit into the budget, each once. Where nothing is copied none have to be started."""
    num_started = 0
    for place in range(len(todo) + 1):
        starts, size = [], 0
        for number, unit in enumerate(todo[place:], place):
            size += unit.working_bytes
            if size > (unit.working_bytes if prefetch_bytes is None else prefetch_bytes):
                break
            if number >= num_started:
                num_started = number + 1
                if unit.presence.is_copy:
                    starts.append(unit)
        yield starts


def tensors_in(output: object) -> list[torch.Tensor]:
    """All tensors of a module's output: a tensor, a mapping, a sequence, or an object with fields."""
    found, left = list[torch.Tensor](), [output]
    while left:
        part = left.pop()
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, Mapping):
            left.extend(part.values())
        elif isinstance(part, tuple | list):
            left.extend(part)
        elif hasattr(part, "__dict__"):
            fields = vars(part).values()
            left.extend([each for each in fields if isinstance(each, torch.Tensor | tuple | list | Mapping)])
    return found
