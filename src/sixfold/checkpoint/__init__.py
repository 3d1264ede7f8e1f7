"""Checkpoints: the logical state of a run as safetensors files that every tool reads as they lie.

The engine and the training loop save and open; `sixfold ckpt` lists and verifies. A checkpoint holds
whole tensors by their global names, never anything about ranks or layout, and nothing in it is pickled.
This room never decides when to save, and never touches a module or an optimizer. Its faces are loaded on
first use: finding and removing checkpoints takes no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sixfold.base.faces import on_first_use

if TYPE_CHECKING:
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

_HOMES = {
    **dict.fromkeys(("MODEL", "OPTIMIZER", "Content", "Piece", "state_name", "untie", "whole"), "content"),
    **dict.fromkeys(("Saved", "open_checkpoint"), "reading"),
    **dict.fromkeys(("Keep", "latest", "prune", "step_folder"), "retention"),
    "Spec": "tensorfile",
    "save": "writing",
}
__getattr__ = on_first_use(__name__, {name: f"{__name__}.{home}" for name, home in _HOMES.items()}, __all__)
