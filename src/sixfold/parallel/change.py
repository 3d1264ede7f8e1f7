"""What an axis makes of a model on one rank: the form in which each axis answers `axes.py`.

Made by the modules of the axes, each in its own file; read by `initialize`. It holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from sixfold.config import LayoutConfig
from sixfold.mesh import Mesh
from sixfold.parallel.context.attention import ContextAttention
from sixfold.plan import Geometry, Place

Remove: TypeAlias = Callable[[], object]
Note: TypeAlias = Callable[[str, int], object]
"""Takes a kind of exchange, and bytes that a rank offers the others of the axis in one of them."""


def nothing(note: Note) -> Remove:
    """Of an axis whose ranks exchange nothing inside forward and backward."""
    return lambda: None


@dataclass(frozen=True)
class Case:
    """What an axis decides about.

    Args:
        model: whole, as it was handed over.
        rank: for which it is decided.
        places: what axes before this one have decided.
        owns_loss: whether the model computes its loss by itself.
    """

    model: nn.Module
    layout: LayoutConfig
    geometry: Geometry
    rank: int
    places: Mapping[str, Place] = field(default_factory=dict)
    owns_loss: bool = True


@dataclass(frozen=True)
class AxisChange:
    """What an axis makes of a model on one rank.

    Args:
        places: of parameters, by first names, that the axis cuts, or of which it makes gradients partial.
        apply: changes how modules run, and returns what undoes it; shapes of parameters are the state
            engine's.
        attention: what is to be told of the sequences that run; None where ranks have whole ones.
        agreed: what all ranks have to decide alike, as text.
        trace: has the model, while it is whole, note what its ranks would exchange as it runs; returns what
            undoes it.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    apply: Callable[[Mesh], Remove] = lambda mesh: lambda: None
    attention: ContextAttention | None = None
    agreed: str = ""
    trace: Callable[[Note], Remove] = nothing


Decide: TypeAlias = Callable[[Case], AxisChange]
"""What an axis makes of a case; the places of the change replace those of the case."""
