"""The axes that change a model, one entry each: how it is decided and what comes of it.

Called by `initialize`: decided before ranks meet, so that what cannot run is refused before any weight is
made; applied when they have. An axis is a module beside this one with a function here; nothing else asks for
its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from sixfold.config import LayoutConfig
from sixfold.mesh import Mesh
from sixfold.plan import Geometry, Place

Remove: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class AxisChange:
    """What an axis makes of a model on one rank.

    Args:
        places: of parameters, by first names, that the axis cuts, or of which it makes gradients partial.
        apply: changes how modules run, and returns what undoes it; shapes of parameters are the state
            engine's.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    apply: Callable[[Mesh], Remove] = lambda mesh: lambda: None


Decide: TypeAlias = Callable[[nn.Module, LayoutConfig, Geometry, int, Mapping[str, Place]], AxisChange]
"""(model, layout, geometry, rank, places so far) -> change. The places it returns replace those so far."""

DECIDE: dict[str, Decide] = {}
"""By axis, in the order in which they are decided and applied."""


def decide_axes(model: nn.Module, layout: LayoutConfig, geometry: Geometry, rank: int) -> AxisChange:
    """What all axes with more than one rank make of `model`, as one change.

    Raises:
        ModelError, PlanError: an axis cannot be applied to this model.
    """
    places: dict[str, Place] = {}
    changes: list[AxisChange] = []
    for axis, decide in DECIDE.items():
        if geometry.degree(axis) > 1:
            changes.append(decide(model, layout, geometry, rank, places))
            places |= changes[-1].places

    def apply(mesh: Mesh) -> Remove:
        undo = ExitStack()
        for change in changes:
            undo.callback(change.apply(mesh))
        return undo.close

    return AxisChange(places, apply)
