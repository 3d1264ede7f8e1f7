"""Checkpoints: the logical state of a run as safetensors files that every tool reads as they lie.

The engine and the training loop save and open; `sixfold ckpt` will list and verify. A checkpoint holds
whole tensors by their global names, never anything about ranks or layout, and nothing in it is pickled.
This room never decides when to save, and never touches a module or an optimizer.
"""

from sixfold.checkpoint.content import MODEL, OPTIMIZER, Content, Piece, state_name, untie, whole
from sixfold.checkpoint.reading import Saved, open_checkpoint
from sixfold.checkpoint.retention import Keep, latest, prune, step_folder
from sixfold.checkpoint.tensorfile import Spec
from sixfold.checkpoint.writing import save

__all__ = [
    "MODEL",
    "OPTIMIZER",
    "Content",
    "Keep",
    "Piece",
    "Saved",
    "Spec",
    "latest",
    "open_checkpoint",
    "prune",
    "save",
    "state_name",
    "step_folder",
    "untie",
    "whole",
]
