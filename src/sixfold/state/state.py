"""The model state of one rank: its units and the verbs that act on all of them.

Driven by the player: `open_reduce` before the last backward, then `finish_reduce`, the optimizer,
`publish`. Units are reduced in one fixed order, last unit first, whichever parameters were used on
this rank; where parameters are cut, `Gathering` makes them whole while they are used. It issues
collectives only through the mesh and never looks at a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from sixfold.base.errors import ModelError, StateError
from sixfold.mesh import Mesh
from sixfold.parallel import DTYPES
from sixfold.plan import Plan, Slot
from sixfold.state.gathering import BACKWARD, FORWARD, Gathering
from sixfold.state.unit import Unit
from sixfold.state.windows import ReduceWindow


class ModelState:
    """Units of one module, in module order.

    Args:
        module: whose parameters become views of the units' buffers.
        prefetch_bytes: bound on what is gathered ahead of its use; None for always one unit.
    """

    def __init__(self, module: nn.Module, plan: Plan, mesh: Mesh, prefetch_bytes: int | None = None) -> None:
        self.mesh = mesh
        self.residency = plan.residency
        self._module = module
        parameters = dict(module.named_parameters())
        self.units: list[Unit] = []
        for unit_plan in plan.units:
            unit = Unit(unit_plan, plan.precision_of(unit_plan), plan.residency, parameters, mesh)
            self.units.append(unit)
            if self.residency.parameters:
                unit.drop()
        self.trained = [unit for unit in self.units if unit.plan.trainable]
        self._window = ReduceWindow(self.trained)
        self._is_reduced = False
        self._has_served = False
        cut = self.units if self.residency.parameters else []
        self._gathering = Gathering(module, cut, mesh, self._serve_asked, prefetch_bytes)

    # Who runs and who serves, where parameters are cut; elsewhere these do nothing.

    def arrive(self, what: str) -> None:
        """Come to the call `what` of the engine; ranks in a pass are served until they come too."""
        self._gathering.meet(what)

    def largest(self, what: str, num_micro: int) -> int:
        """`arrive`; the largest `num_micro` of all ranks, or this rank's own where nothing that is sent
        depends on the others'."""
        if self.residency.parameters:
            return round(max(self._gathering.meet(what, num_micro)))
        return self.mesh.largest(num_micro) if self.residency.gradients else num_micro

    def by_program(self) -> AbstractContextManager[None]:
        """Inside, ranks come to forwards and backwards in an order that they have agreed on."""
        return self._gathering.by_program()

    def backward(self) -> AbstractContextManager[None]:
        """Inside, the one backward pass that this rank makes now."""
        return self._gathering.backward()

    def serve_forward(self) -> None:
        """Take part in the others' forward."""
        self._gathering.serve(FORWARD)

    def serve_backward(self) -> None:
        """Take part in the others' backward and, in an open window, in its reductions."""
        # All at once and first: others wait for these before they gather on.
        self._window.flush()
        self._gathering.serve(BACKWARD)

    def _serve_asked(self, kind: str) -> None:
        if kind != BACKWARD:
            self._gathering.serve(kind)
            return
        if not self._has_served:
            self.begin()
            self._has_served = True
        if self.reduces_with_backward:
            self.open_reduce()
        self.serve_backward()

    @property
    def reduces_with_backward(self) -> bool:
        """Whether each backward of a written-out loop ends in a reduction; all ranks are in it anyway."""
        return bool(self.residency.parameters and self.residency.gradients)

    @contextmanager
    def whole(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[list[Unit]]:
        """The units of `parameters` (None: all) with their working parameters whole.

        Edits are lost unless `share_edits` takes them over.
        """
        asked = None if parameters is None else {id(parameter) for parameter in parameters}
        units = [
            unit
            for unit in self.units
            if asked is None or any(id(parameter) in asked for parameter in unit.parameters)
        ]
        with self._gathering.held(units):
            try:
                yield units
            finally:
                for unit in units:
                    unit.forget_edits()

    def share_edits(self, units: Iterable[Unit]) -> None:
        """Give every rank what rank 0 has in its working parameters, and take it over."""
        units = list(units)
        for pending in [self.mesh.broadcast(unit.working) for unit in units]:
            pending.wait()
        for unit in units:
            unit.absorb_edits()

    def undo_edits(self) -> None:
        """Forget edits where this rank's masters still know better; nothing is exchanged, because an error
        that calls for this may not have come to every rank."""
        for unit in self.trained:
            if not unit.spread:
                unit.publish().wait()

    def share_buffers(self, buffers: Iterable[torch.Tensor]) -> None:
        """Give every rank rank 0's buffers."""
        # A broadcast writes in place, so buffers that are views of something go through a copy.
        copies = [(buffer, buffer.detach().contiguous().clone()) for buffer in buffers if buffer.numel()]
        pending = [self.mesh.broadcast(copy) for _, copy in copies]
        for each in pending:
            each.wait()
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)

    def begin(self) -> None:
        """Start accumulating gradients for the next update; gradients of the last one go."""
        if self._has_served:  # begun already, for others
            self._has_served = False
            return
        self._window.abandon()
        self._is_reduced = False
        self._check_module()
        for unit in self.units:
            unit.check_home()
            unit.absorb_noted_edits()
        for unit in self.trained:
            unit.drop_grads()

    def _check_module(self) -> None:
        known = {id(parameter) for unit in self.units for parameter in unit.parameters}
        strangers = [name for name, part in self._module.named_parameters() if id(part) not in known]
        if strangers:
            raise StateError(
                f"{len(strangers)} parameter(s) came into the module after initialize: "
                f"{', '.join(strangers[:4])}",
                rule="what is trained is decided once, when units and optimizer are made",
                fix="change the module before sixfold.initialize, or initialize it anew",
            )

    def open_reduce(self) -> None:
        """From here on a unit is reduced as soon as its gradients are complete; ends an earlier window.

        Raises:
            StateError: gradients are whole and have been reduced in this update already.
        """
        if self._is_reduced and not self.residency.gradients:
            raise StateError(
                f"a second reduction in one update, gradients {self.residency.gradients or 'whole'}",
                rule="whole gradients are summed over ranks once, when they are complete",
                fix="write one reduce for each stage, or cut gradients (layout.zero = 2)",
            )
        self._window.close()
        self._window.open()
        self._is_reduced = True

    def flush_reduce(self) -> None:
        """Start to reduce what has not been since `open_reduce`."""
        self._window.flush()

    def finish_reduce(self) -> None:
        """Flush, and wait for all of it."""
        self._window.close()

    def grad_norm(self) -> float:
        """The 2-norm of all reduced gradients, the same on every rank."""
        square = sum(float(unit.grad_square) for unit in self.trained)
        if self.residency.optimizer:
            # Every rank has the squares of its slices, and some have the same ones.
            num_slices = self.mesh.geometry.num_parts(self.residency.optimizer)
            square = self.mesh.total(square)[0] * num_slices / self.mesh.data_ranks
        return math.sqrt(square)

    def non_finite(self, grad_norm: float) -> ModelError:
        """The error for a gradient that is not finite, naming the first parameter it is found in."""
        sick = {
            slot.name
            for unit in self.trained
            for slot in unit.plan.slots
            if unit.grads is not None and not unit.part_of(unit.grads, slot).isfinite().all()
        }
        everyones = {name for text in self.mesh.texts(" ".join(sick)) for name in text.split()}
        names = [slot.name for _, slot in self.slots() if slot.name in everyones]
        return ModelError(
            f"the gradient norm is {grad_norm}; {len(names)} parameter(s) are not finite, first: "
            f"{names[0] if names else 'none (the sum of squares overflowed)'}",
            rule="an update is made from finite gradients only",
            fix="lower optimizer.lr, set optimizer.clip_norm, or compute in a wider type",
        )

    def scale_grads(self, factor: float) -> None:
        """Multiply all reduced gradients."""
        if factor != 1.0:
            for unit in self.trained:
                if unit.grads is not None:
                    unit.grads.mul_(factor)

    def publish(self) -> None:
        """Bring the updated state into the working parameters."""
        self._publish(self.trained)

    def publish_all(self) -> None:
        """The same for frozen parameters too, after `Unit.fill_own`."""
        self._publish(self.units)

    def _publish(self, units: Iterable[Unit]) -> None:
        self._gathering.refresh()
        for pending in [unit.publish() for unit in units]:
            pending.wait()

    def slots(self) -> Iterator[tuple[Unit, Slot]]:
        """Every parameter's unit and place."""
        for unit in self.units:
            for slot in unit.plan.slots:
                yield unit, slot

    def masters(self) -> dict[str, torch.Tensor]:
        """Every parameter whole, in its master's type; may share memory with the state. A collective."""
        whole = {unit: unit.whole_of(unit.master) for unit in self.units}
        return {slot.name: unit.slot_of(whole[unit], slot) for unit, slot in self.slots()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every trained parameter's gradient of the last update, whole; copies. A collective per unit."""
        whole = {unit: unit.whole_of(unit.grads) for unit in self.trained if unit.grads is not None}
        return {
            slot.name: unit.slot_of(whole[unit], slot).clone() for unit, slot in self.slots() if unit in whole
        }

    def storage_type(self, unit: Unit) -> torch.dtype:
        """The type in which a unit's parameters are shown whole and written."""
        if unit.precision is None or not unit.plan.trainable:
            return unit.master.dtype
        return DTYPES[unit.precision.storage]

    def live_bytes(self) -> tuple[int, int, int]:
        """Bytes that live from step to step: working parameters, gradients, masters."""
        parameters = sum(_bytes_of(unit.part) for unit in self.units)
        gradients = sum(_bytes_of(unit.grads) for unit in self.trained if unit.grads is not None)
        masters = sum(_bytes_of(unit.master) for unit in self.trained if unit.master is not unit.held)
        return parameters, gradients, masters

    def remove(self) -> None:
        """Take the hooks off the module; its parameters stay usable."""
        self._window.remove()
        self._gathering.remove()


def _bytes_of(tensor: torch.Tensor) -> int:
    """Of the storage, so that a view counts as what it keeps alive."""
    return tensor.untyped_storage().nbytes()
