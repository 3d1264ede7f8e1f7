"""The residency table: where each kind of model state lives, as rows of data.

Chosen by `layout.zero`; read by the state engine, which derives every collective from it. A new
variant is a new row here, never a branch elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from sixfold.base.errors import PlanError
from sixfold.config import LayoutConfig

Spread = tuple[str, ...]
"""Axes over which something is cut; () means whole on every rank."""

WHOLE: Spread = ()
CUT: Spread = ("shard",)


@dataclass(frozen=True)
class Residency:
    """Over what each kind of state is cut.

    Args:
        parameters: working parameters, in the compute type.
        gradients: accumulated gradients.
        optimizer: master weights and the optimizer's own state.
    """

    parameters: Spread
    gradients: Spread
    optimizer: Spread

    @property
    def is_cut(self) -> bool:
        """Whether anything is."""
        return bool(self.parameters or self.gradients or self.optimizer)

    def __str__(self) -> str:
        kinds = (
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
        )
        return ", ".join(f"{kind} {'cut over ' + '+'.join(cut) if cut else 'whole'}" for kind, cut in kinds)


PRESETS: dict[int, Residency] = {
    0: Residency(WHOLE, WHOLE, WHOLE),
    1: Residency(WHOLE, WHOLE, CUT),
    2: Residency(WHOLE, CUT, CUT),
}
"""By `layout.zero`. The shard axis is all data ranks unless `layout.shard` makes smaller groups of them."""


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
            fix=f"set layout.zero = {max(PRESETS)}",
        )
    return PRESETS[zero]
