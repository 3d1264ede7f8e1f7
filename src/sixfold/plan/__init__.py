"""What is decided, from what is asked and plain facts; no tensor library here.

`engine` and `train` ask this room once per run and pass the frozen answer down; nothing here
allocates, starts or plays anything.
"""

from sixfold.plan.batch import BatchPlan, decide_batch
from sixfold.plan.geometry import Geometry, decide_geometry
from sixfold.plan.learning_rate import LearningRate, decide_learning_rate
from sixfold.plan.memory import (
    Memory,
    exchange_memory,
    offered_memory,
    persistent_memory,
    transfer_memory,
)
from sixfold.plan.places import Place
from sixfold.plan.plan import REPLICAS, Plan, decide, decide_ranks
from sixfold.plan.precision import LossScaling, PrecisionPlan, decide_loss_scaling, decide_precision
from sixfold.plan.programs import Purpose, programs_for
from sixfold.plan.residency import PRESETS, Residency, Spread, decide_residency
from sixfold.plan.stages import BlockCosts, StagePlan, decide_stages
from sixfold.plan.traffic import (
    AttentionTraffic,
    Traffic,
    attention_traffic,
    dispatch_traffic,
    layer_traffic,
    scores_traffic,
    update_traffic,
)
from sixfold.plan.units import ParameterFacts, Slot, UnitPlan, cut_units, placed

__all__ = [
    "PRESETS",
    "REPLICAS",
    "AttentionTraffic",
    "BatchPlan",
    "BlockCosts",
    "Geometry",
    "LearningRate",
    "LossScaling",
    "Memory",
    "ParameterFacts",
    "Place",
    "Plan",
    "PrecisionPlan",
    "Purpose",
    "Residency",
    "Slot",
    "Spread",
    "StagePlan",
    "Traffic",
    "UnitPlan",
    "attention_traffic",
    "cut_units",
    "decide",
    "decide_batch",
    "decide_geometry",
    "decide_learning_rate",
    "decide_loss_scaling",
    "decide_precision",
    "decide_ranks",
    "decide_residency",
    "decide_stages",
    "dispatch_traffic",
    "exchange_memory",
    "layer_traffic",
    "offered_memory",
    "persistent_memory",
    "placed",
    "programs_for",
    "scores_traffic",
    "transfer_memory",
    "update_traffic",
]
