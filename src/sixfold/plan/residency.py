"""The residency table: where each kind of model state lives, as rows of data.

Chosen by `layout.zero`, each kind overridden by its own key; read by the state engine, which derives
every collective from it. A new variant is a new row here, never a branch elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sixfold.base.errors import PlanError
from sixfold.config import LayoutConfig

Spread = tuple[str, ...]
"""Axes over which something is cut, the outer cut first; () means whole on every rank."""

WHOLE: Spread = ()
GROUP: Spread = ("shard",)
ALL: Spread = ("shard", "data")
"""Each slice of a group cut once more, over the groups."""

SPREADS: dict[str, Spread] = {"whole": WHOLE, "group": GROUP, "all": ALL}
"""By the words of `layout.parameters`, `layout.gradients` and `layout.optimizer`."""


@dataclass(frozen=True)
class Residency:
    """Over what each kind of state is cut.

    Args:
        parameters: working parameters, in the compute type, between their uses.
        gradients: accumulated gradients.
        optimizer: master weights and the optimizer's own state.
        sums: whether gradients that are whole are summed over ranks after each micro-batch all the same, and
            kept as sums.
    """

    parameters: Spread
    gradients: Spread
    optimizer: Spread
    sums: bool = False

    @cached_property
    def reduces_each(self) -> bool:
        """Whether gradients cross ranks after each micro-batch, and not once after the last."""
        return bool(self.gradients) or self.sums

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
        text = ", ".join(f"{kind} {_text(spread)}" for kind, spread in kinds)
        return f"{text}; gradients summed after each micro-batch" if self.sums else text


def _text(spread: Spread) -> str:
    return f"cut over {'+'.join(spread)}" if spread else "whole"


PRESETS: dict[int, Residency] = {
    0: Residency(WHOLE, WHOLE, WHOLE),
    1: Residency(WHOLE, WHOLE, GROUP),
    2: Residency(WHOLE, GROUP, GROUP),
    3: Residency(GROUP, GROUP, GROUP),
}
"""By `layout.zero`. A group is all replicas unless `layout.shard` makes smaller ones of them."""


def decide_residency(layout: LayoutConfig) -> Residency:
    """The row that `layout.zero` names (unset: 0), with the kinds that have a key of their own.

    Raises:
        PlanError: no such row, or kinds that do not go together.
    """
    zero = layout.zero or 0
    if zero not in PRESETS:
        raise PlanError(
            f"layout.zero = {zero}",
            rule=f"there are residency presets {', '.join(map(str, PRESETS))}",
            fix=f"set layout.zero = {max(PRESETS)}",
        )
    own: dict[str, Any] = {
        kind: SPREADS[word]
        for kind in ("parameters", "gradients", "optimizer")
        if (word := getattr(layout, kind)) is not None
    }
    row = replace(PRESETS[zero], **own)
    if layout.reduce is not None and layout.gradients is None:
        row = replace(row, gradients=row.optimizer if layout.reduce == "each" else WHOLE)
    row = replace(row, sums=layout.reduce == "each" and not row.gradients)
    if len(row.parameters) > len(row.optimizer) or row.gradients not in (WHOLE, row.optimizer):
        finest = max(row.parameters, row.gradients, key=len)
        changes = [
            "layout.optimizer",
            *(["layout.gradients"] if row.gradients not in (WHOLE, finest) else []),
        ]
        raise PlanError(
            f"layout: {row}",
            rule="parameters are cut no finer than the optimizer state they are updated from; gradients "
            "are whole or cut like it",
            fix="set " + " and ".join(f'{key} = "{_word(finest)}"' for key in changes),
        )
    return row


def _word(spread: Spread) -> str:
    return next(word for word, each in SPREADS.items() if each == spread)
