"""Passes through the model, where parameters are cut, and the one order of units that each kind of pass has.

Values that `Gathering` keeps: what a pass has done so far on this rank, and how the first pass of a kind
settles the order for all later ones. Nothing here gathers or sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from sixfold.base.errors import MeshError
from sixfold.mesh import Mesh, Pending
from sixfold.state.unit import Unit

EVALUATION, FORWARD, BACKWARD = "forward without gradients", "forward", "backward"
PASSES = (EVALUATION, FORWARD, BACKWARD)
"""Kinds of passes. Where ranks come to different ones, the first in this order goes first."""

_MOST_LETTERS = 96


class Hooked:
    """Whose methods are hooks of a module: a copy of that module keeps to the one there is."""

    def __deepcopy__(self, memo: object) -> Self:
        return self


def forward_kind() -> str:
    """The kind of a forward here and now."""
    return FORWARD if torch.is_grad_enabled() else EVALUATION


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


@dataclass
class Pass:
    """A pass under way.

    Args:
        order: None in the first pass of a kind.
        todo: what is still to be gathered, where that is known, from `place` on.
        kept: what is whole after it, on every rank.
        stays: units that are not dropped before its end.
        leaving: of a backward pass, what ranks will be done with before its end, in the order's order.
        is_plain: of a backward pass, that it follows one forward, in which no block was wanted twice.
        found: what was gathered, where the order is found out now.
        behind: what a backward pass has reached on this rank.
    """

    kind: str
    order: Order | None
    todo: list[Unit]
    kept: frozenset[Unit]
    stays: set[Unit]
    leaving: list[Unit]
    is_plain: bool
    place: int = 0
    under_way: dict[Unit, Pending] = field(default_factory=dict)
    found: list[Unit] = field(default_factory=list)
    behind: set[Unit] = field(default_factory=set)


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


def disagreement(mesh: Mesh, call: str) -> MeshError:
    """The error where data ranks came to different calls. A collective among them.

    Args:
        call: what this rank came to.
    """
    letters = call.encode()[:_MOST_LETTERS].ljust(_MOST_LETTERS)
    calls = [bytes(map(int, row)).decode(errors="replace").strip() for row in mesh.everyones(*letters)]
    return MeshError(
        "; ".join(f"rank {rank} came to {call}" for rank, call in enumerate(calls)),
        rule="with cut parameters all ranks make the same calls of the engine in the same order, and of "
        "several engines the same forwards and backwards as well",
        fix="call it on every rank, also where its result is not used; with several engines give every "
        "rank equally many micro-batches",
    )


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
