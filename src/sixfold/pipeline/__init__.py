"""Plays batches: turns instructions of programs into forwards, backwards and verbs of the state engine.

Driven by the engine, for a whole step at once or one instruction at a time. It writes no schedule
and owns no state but the losses of the step under way.
"""

from sixfold.pipeline.batch import Batch, fields_of, num_samples, split, tensors_of, to_device
from sixfold.pipeline.comparing import compare_written_out
from sixfold.pipeline.loss import LossForm
from sixfold.pipeline.passes import Passes
from sixfold.pipeline.player import Player
from sixfold.pipeline.playing import Playing
from sixfold.pipeline.scaling import LossScaler
from sixfold.pipeline.sequence import Piece, SequenceCut
from sixfold.pipeline.step import StepResult
from sixfold.pipeline.transfers import Transfers
from sixfold.pipeline.written_out import WrittenOut

__all__ = [
    "Batch",
    "LossForm",
    "LossScaler",
    "Passes",
    "Piece",
    "Player",
    "Playing",
    "SequenceCut",
    "StepResult",
    "Transfers",
    "WrittenOut",
    "compare_written_out",
    "fields_of",
    "num_samples",
    "split",
    "tensors_of",
    "to_device",
]
