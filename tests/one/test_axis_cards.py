"""The cards of axes and the code behind them agree; tests/pure/test_axes.py holds what needs no torch."""

from __future__ import annotations

from sixfold.base.axes import CARDS
from sixfold.parallel.axes import DECIDE


def test_axes_that_change_modules_are_those_that_are_decided() -> None:
    # Stages are cut by `ModelCut`, which needs the costs of parts.
    assert {name for name, card in CARDS.items() if card.changes_module} == {*DECIDE, "pipe"}
