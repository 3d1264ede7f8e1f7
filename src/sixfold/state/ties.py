"""Weights that several stages hold: their gradients are summed over these, so that all copies stay equal.

Made by `ModelState`. Such weights have units of their own, cut alike on every stage, so the summands lie at
the same place. It sums after the reduction over data ranks and before the update, and changes no weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from sixfold.mesh import Group, Mesh
from sixfold.plan import StagePlan
from sixfold.state.gradients import Gradients
from sixfold.state.unit import Unit


class Tie:
    """The units of one set of stages that hold the same weights.

    Args:
        units: this rank's, equally many for each of its stages among them.
        group: the ranks that have such stages, one for each place in the pipeline.
    """

    def __init__(self, units: Sequence[Unit], group: Group) -> None:
        self._group = group
        by_stage: dict[int, list[Gradients]] = {}
        for unit in units:
            assert unit.gradients is not None, "frozen units are not tied"
            by_stage.setdefault(unit.plan.stage, []).append(unit.gradients)
        self._same = list(zip(*by_stage.values(), strict=True))

    def sum_grads(self) -> None:
        """Sum the reduced gradients; the same bits on every stage."""
        for first, *others in self._same:
            for other in others:
                first.reduced.add_(other.reduced)
            first.sum_over(self._group, "pipe")
            for other in others:
                other.reduced.copy_(first.reduced)
                other.summed = first.summed
                other.finish_reduce()


def tied_groups(units: Sequence[Unit], plan: StagePlan | None, mesh: Mesh) -> list[Tie]:
    """The ties that this rank has a part in, in one order on every rank.

    Args:
        units: of this rank's stages.
        plan: None in a pipeline of one stage, where nothing is tied across stages.
    """
    if plan is None:
        return []
    ties = []
    for number, stages in enumerate(plan.ties):
        mine = [unit for unit in units if unit.plan.tied == stages]
        if mine:
            places = sorted({plan.rank_of(stage) for stage in stages})
            ties.append(Tie(mine, mesh.holders(places, number)))
    return ties
