"""Gradients that have been summed over replicas: what is left to do before the update.

Made by `ModelState`, called by the player in this order: sums over other ranks that hold the same weights,
squares of norms, the search for what is not finite, and scaling. It reduces nothing over replicas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh
from sixfold.plan import Plan
from sixfold.state.ties import tied_groups
from sixfold.state.unit import Unit
from sixfold.state.wholeness import Wholeness


class GradientSums:
    """The reduced gradients of this rank's units.

    Args:
        units: its trained ones.
    """

    def __init__(self, module: nn.Module, units: Sequence[Unit], plan: Plan, mesh: Mesh) -> None:
        self._module = module
        self._units = units
        self._mesh = mesh
        self._gradients = [unit.gradients for unit in units if unit.gradients is not None]
        self._partial = [
            (gradients, [mesh.along(axis) for axis in unit.plan.partial])
            for unit, gradients in zip(units, self._gradients, strict=True)
            if unit.plan.partial
        ]
        self._ties = tied_groups(units, plan.stages, mesh)
        geometry, cut = mesh.geometry, plan.residency.optimizer
        is_cut = bool(cut) or geometry.cuts_model
        # Every rank has the squares of its slices, and some have the same ones; of what all have, the first
        # rank tells all, which is exact.
        self._counted = [
            (gradients, geometry.num_holders(cut, unit.plan.cut) if is_cut else 1)
            for unit, gradients in zip(units, self._gradients, strict=True)
            if not unit.plan.is_copy and (is_cut or mesh.rank == 0)
        ]
        self._wholeness = Wholeness(units, mesh)

    def share(self) -> None:
        """Sum reduced gradients over ranks that are no replicas: of weights whose gradients are partial along
        an axis, then of those that several stages hold. The first times, see that nothing partial is left.

        Raises:
            ModelError: see `Wholeness`.
        """
        for gradients, groups in self._partial:
            for group in groups:
                group.all_reduce(gradients.reduced).wait()
            gradients.finish_reduce()
        for tie in self._ties:
            tie.sum_grads()
        self._wholeness.check()

    def squares(self, num_groups: int) -> list[float]:
        """This rank's share of the square of the 2-norm of each optimizer group's reduced gradients."""
        squares = [0.0] * num_groups
        for gradients, holders in self._counted:
            for (group, _), square in zip(gradients.segments, gradients.squares.tolist(), strict=True):
                squares[group] += square / holders
        return squares

    def non_finite(self, grad_norm: float, loss_scale: float, step: int | None) -> ModelError:
        """The error for a gradient that is not finite. A collective.

        It names the first such parameter in module order, and the ranks whose own gradients of that
        parameter's unit were not finite before the sum.
        """
        sick = [
            slot.name
            for unit in self._units
            for slot in unit.plan.slots
            if unit.grads is not None and not unit.part_of(unit.grads, slot).isfinite().all()
        ]
        mine = [
            slot.name
            for unit, gradients in zip(self._units, self._gradients, strict=True)
            if not gradients.local_sum.isfinite()
            for slot in unit.plan.slots
        ]
        rows = [json.loads(text) for text in self._mesh.texts(json.dumps([sick, mine]))]
        everyones = {name for names, _ in rows for name in names}
        found = [name for name, _ in self._module.named_parameters() if name in everyones]
        first = "none (the sum of squares overflowed)"
        if found:
            name = found[0]
            ranks = [str(rank) for rank, (_, sick_here) in enumerate(rows) if name in sick_here]
            whose = "in the sum over ranks"
            if ranks:
                whose = f"it or others of its unit before the sum on rank(s) {', '.join(ranks)}"
            first = f"{name} ({whose})"
        scaled = f", the loss scale {loss_scale:g}" if loss_scale != 1.0 else ""
        return ModelError(
            f"the gradient norm of update {step} is {grad_norm}{scaled}; {len(found)} parameter(s) are not "
            f"finite, first: {first}",
            rule="an update is made from finite gradients only",
            fix="look at that rank's batch; lower optimizer.lr, set optimizer.clip_norm, or compute in a "
            "wider type" + (" or with a smaller precision.loss_scale" if scaled else ""),
        )

    def scale(self, factors: Sequence[float]) -> None:
        """Multiply all reduced gradients, those of each optimizer group by its own factor."""
        for gradients in self._gradients:
            for group, part in gradients.segments:
                if factors[group] != 1.0:
                    gradients.reduced[part].mul_(factors[group])
