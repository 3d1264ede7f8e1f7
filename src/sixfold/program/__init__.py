"""The step as data: instructions, schedules that write them, passes that lower them, checks that read them.

Played by `pipeline`, timed by `simulate`, priced by `plan`; knows no tensors, no devices and no ranks'
contents.
"""

from sixfold.program.check import check
from sixfold.program.instructions import (
    INPUT_PARTS,
    PASSES,
    RECEIVES,
    SENDS,
    SERVES,
    WEIGHT_PARTS,
    Instruction,
    Op,
    Program,
)
from sixfold.program.lowering import (
    add_reductions,
    add_shifts,
    add_transfers,
    add_update,
    add_windows,
    only_forwards,
    post_ahead,
    serve_rest,
)
from sixfold.program.order import Wiring, global_order, results
from sixfold.program.peaks import Peak, peaks
from sixfold.program.schedules import (
    SCHEDULES,
    evaluation,
    passes,
    splits_backward,
    stages_of,
    training,
)

__all__ = [
    "INPUT_PARTS",
    "PASSES",
    "RECEIVES",
    "SCHEDULES",
    "SENDS",
    "SERVES",
    "WEIGHT_PARTS",
    "Instruction",
    "Op",
    "Peak",
    "Program",
    "Wiring",
    "add_reductions",
    "add_shifts",
    "add_transfers",
    "add_update",
    "add_windows",
    "check",
    "evaluation",
    "global_order",
    "only_forwards",
    "passes",
    "peaks",
    "post_ahead",
    "results",
    "serve_rest",
    "splits_backward",
    "stages_of",
    "training",
]
