"""The residency table: where each kind of model state lives, as rows of data.

Chosen by `layout.zero`; read by the state engine, which derives every collective from it. A new
variant is a new row here, never a branch elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from sixfold.base.errors import PlanError
from sixfold.config import LayoutConfig

WHOLE: tuple[str, ...] = ()


@dataclass(frozen=True)
class Residency:
    """Axes over which each kind of state is cut on a rank; () means whole.

    Args:
        parameters: working parameters, in the compute type.
        gradients: accumulated gradients.
        optimizer: master weights and the optimizer's own state.
    """

    parameters: tuple[str, ...]
    gradients: tuple[str, ...]
    optimizer: tuple[str, ...]

    def __str__(self) -> str:
        kinds = (
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
        )
        return ", ".join(f"{kind} {'cut over ' + '+'.join(cut) if cut else 'whole'}" for kind, cut in kinds)


PRESETS: dict[int, Residency] = {0: Residency(WHOLE, WHOLE, WHOLE)}
"""By `layout.zero`. Whole gradients mean that reduction is an all-reduce."""


def decide_residency(layout: LayoutConfig) -> Residency:
    """The row that `layout.zero` names; unset is preset 0.

    Raises:
        PlanError: no such row.
    """
    zero = layout.zero or 0
    if zero not in PRESETS:
        raise PlanError(
            f"layout.zero = {zero}",
            rule=f"this version has residency presets: {', '.join(map(str, PRESETS))}",
            fix="set layout.zero = 0, or leave it unset",
        )
    return PRESETS[zero]
