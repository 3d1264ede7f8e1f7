"""The one state engine: flat units, their reduction, the optimizer over them.

Assembled by the engine from a plan and a mesh, driven by the player. It knows no schedule and no
loss; the residency table decides where state lives.
"""

from sixfold.state.forecast import state_bytes_per_weight
from sixfold.state.optimizer import (
    BoundOptimizer,
    bind,
    build_optimizer,
    make_optimizer,
    refuse_two_definitions,
)
from sixfold.state.state import ModelState
from sixfold.state.unit import Unit

__all__ = [
    "BoundOptimizer",
    "ModelState",
    "Unit",
    "bind",
    "build_optimizer",
    "make_optimizer",
    "refuse_two_definitions",
    "state_bytes_per_weight",
]
