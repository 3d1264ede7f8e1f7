"""Plays programs: turns instructions into forwards, backwards and verbs of the state engine.

Driven by the engine, for a whole step at once or one instruction at a time. It writes no schedule
and owns no state but the losses of the step under way.
"""

from sixfold.pipeline.batch import (
    Batch,
    checksum,
    divide,
    fields_of,
    lengths_of,
    num_samples,
    split,
    tensors_of,
    to_device,
    without_targets,
)
from sixfold.pipeline.loss import Counts, LossForm, Share
from sixfold.pipeline.passes import Passes
from sixfold.pipeline.player import Player
from sixfold.pipeline.scaling import LossScaler
from sixfold.pipeline.sequence import Piece, SequenceCut
from sixfold.pipeline.step import StepResult, Work
from sixfold.pipeline.transfers import Kind, Transfers
from sixfold.pipeline.written_out import WrittenOut

__all__ = [
    "Batch",
    "Counts",
    "Kind",
    "LossForm",
    "LossScaler",
    "Passes",
    "Piece",
    "Player",
    "SequenceCut",
    "Share",
    "StepResult",
    "Transfers",
    "Work",
    "WrittenOut",
    "checksum",
    "divide",
    "fields_of",
    "lengths_of",
    "num_samples",
    "split",
    "tensors_of",
    "to_device",
    "without_targets",
]
