"""Facts about modules, and what is done to modules before they are trained.

The engine calls it between plan and state. It moves no state; what its axes make of forwards sends
activations, tokens and keys through the groups of the mesh.
"""

from sixfold.parallel.axes import decide_axes
from sixfold.parallel.blocks import change_forwards, check_backend, check_blocks
from sixfold.parallel.buffers import move_buffers, share_buffers
from sixfold.parallel.causal_loss import chunk_loss
from sixfold.parallel.change import AxisChange
from sixfold.parallel.context import (
    ContextAttention,
    Sequences,
    cut_rows,
    length_limits,
    num_rows,
    off_zero,
    seen_by,
)
from sixfold.parallel.expert.balance import ModelBalance
from sixfold.parallel.expert.routing import Routing
from sixfold.parallel.facts import (
    BATCH_NORMS,
    DTYPES,
    ModuleFacts,
    block_names,
    compute_type,
    dtype_name,
    module_facts,
    persistent_buffers,
    torch_name,
    torch_type,
)
from sixfold.parallel.materialize import materialize
from sixfold.parallel.pipe.costs import handed_bytes, measured_costs, on_meta
from sixfold.parallel.pipe.cut import ModelCut
from sixfold.parallel.pipe.deferral import Deferral, Product
from sixfold.parallel.pipe.stage import Stage

__all__ = [
    "BATCH_NORMS",
    "DTYPES",
    "AxisChange",
    "ContextAttention",
    "Deferral",
    "ModelBalance",
    "ModelCut",
    "ModuleFacts",
    "Product",
    "Routing",
    "Sequences",
    "Stage",
    "block_names",
    "change_forwards",
    "check_backend",
    "check_blocks",
    "chunk_loss",
    "compute_type",
    "cut_rows",
    "decide_axes",
    "dtype_name",
    "handed_bytes",
    "length_limits",
    "materialize",
    "measured_costs",
    "module_facts",
    "move_buffers",
    "num_rows",
    "off_zero",
    "on_meta",
    "persistent_buffers",
    "seen_by",
    "share_buffers",
    "torch_name",
    "torch_type",
]
