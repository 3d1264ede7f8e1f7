"""What an axis makes of a model, as a value.

Returned by the modules beside this one that decide an axis, put together by `axes`. It does nothing until it
is applied, and knows no axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sixfold.mesh import Mesh
from sixfold.plan import Place

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
