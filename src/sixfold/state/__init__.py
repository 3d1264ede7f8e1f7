"""The one state engine: flat units, their reduction, the optimizer over them.

Assembled by the engine from a plan and a mesh, driven by the player. It knows no schedule and no
loss; the residency table decides where state lives.
"""

from sixfold.parallel.pieces import runs_of
from sixfold.state.absent import Absent
from sixfold.state.average import Average
from sixfold.state.catalog import Catalog, Entry, storage_type
from sixfold.state.flat import range_in, zero_between
from sixfold.state.forecast import state_bytes_per_weight
from sixfold.state.foreign import take_over
from sixfold.state.making import build_optimizer, make_optimizers, optimized_facts, refuse_two_definitions
from sixfold.state.optimizer import BoundOptimizer, bind
from sixfold.state.state import ModelState
from sixfold.state.unit import Unit

__all__ = [
    "Absent",
    "Average",
    "BoundOptimizer",
    "Catalog",
    "Entry",
    "ModelState",
    "Unit",
    "bind",
    "build_optimizer",
    "make_optimizers",
    "optimized_facts",
    "range_in",
    "refuse_two_definitions",
    "runs_of",
    "state_bytes_per_weight",
    "storage_type",
    "take_over",
    "zero_between",
]
