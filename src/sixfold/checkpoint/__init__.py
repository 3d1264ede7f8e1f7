"""Checkpoints: the logical state of a run as safetensors files that every tool reads as they lie.

The engine and the training loop save and open; `sixfold ckpt` will list and verify. A checkpoint holds
whole tensors by their global names, never anything about ranks or layout, and nothing in it is pickled.
This room never decides when to save, and never touches a module or an optimizer.
"""

from sixfold.checkpoint.content import Content, untie
from sixfold.checkpoint.reading import Saved, open_checkpoint
from sixfold.checkpoint.retention import latest, prune, step_folder
from sixfold.checkpoint.writing import save

__all__ = ["Content", "Saved", "latest", "open_checkpoint", "prune", "save", "step_folder", "untie"]
