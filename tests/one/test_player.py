"""The player by itself: what it cannot play it says, before anything is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sixfold.base.errors import ProgramError
from sixfold.pipeline.passes import Passes
from sixfold.pipeline.player import Player
from sixfold.program import training

NOTHING: Any = None
MESH: Any = SimpleNamespace(place=lambda axis: 0)


def test_instructions_of_pipelines_are_refused_by_name() -> None:
    passes = Passes(NOTHING, NOTHING)
    player = Player(NOTHING, NOTHING, MESH, passes, clip_norm=None, scaler=NOTHING)
    for instruction in set(training("zero-bubble-h1", 2, 1, longest_window=1, shifts=True)[1].instructions):
        if instruction.op.value in ("forward", "gather", "drop", "reduce", "step", "publish"):
            continue
        with pytest.raises(ProgramError, match=f"{instruction} cannot be played here"):
            player.perform(instruction)
