"""The configuration room: what the user asks, as one typed tree with the origin of every value.

`load` is the way in; everything above reads the frozen result. Nothing here knows a device, a rank
or a tensor library.
"""

from sixfold.config.load import load
from sixfold.config.resolved import Resolved
from sixfold.config.schema import describe
from sixfold.config.tree import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LaunchConfig,
    LayoutConfig,
    LRScheduleConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    PrecisionConfig,
    Section,
    TrainConfig,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LRScheduleConfig",
    "LaunchConfig",
    "LayoutConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "Resolved",
    "Section",
    "TrainConfig",
    "describe",
    "load",
]
