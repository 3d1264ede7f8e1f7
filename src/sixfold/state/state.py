"""The model state of one rank: its units and the verbs that act on all of them.

Driven by the player: `open_reduce` before the last backward, then `finish_reduce`, the optimizer,
`publish`. Units are reduced in one fixed order, last unit first, whichever parameters were used on
this rank. It issues collectives only through the mesh and never looks at a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from sixfold.base.errors import ModelError, StateError
from sixfold.mesh import Mesh
from sixfold.parallel import DTYPES
from sixfold.plan import Plan, Slot
from sixfold.state.unit import Unit


class ModelState:
    """Units of one module, in module order.

    Args:
        module: whose parameters become views of the units' buffers.
    """

    def __init__(self, module: nn.Module, plan: Plan, mesh: Mesh) -> None:
        self.mesh = mesh
        self.residency = plan.residency
        self._module = module
        parameters = dict(module.named_parameters())
        self.units = [
            Unit(unit, plan.precision_of(unit), plan.residency, parameters, mesh) for unit in plan.units
        ]
        self.trained = [unit for unit in self.units if unit.plan.trainable]
        self._window = _ReduceWindow(self.trained)
        self._is_reduced = False

    def share_edits(self) -> None:
        """Give every rank what rank 0 has in its working parameters, and take it over."""
        for pending in [self.mesh.broadcast(unit.working) for unit in self.units]:
            pending.wait()
        for unit in self.units:
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
        self._window.abandon()
        self._is_reduced = False
        self._check_module()
        for unit in self.units:
            unit.check_home()
            unit.absorb_noted_edits()
        for unit in self.trained:
            unit.drop_grads()

    def num_reduces(self, num_micro: int) -> int:
        """How often an update of `num_micro` micro-batches on this rank is reduced, the same on every rank.

        Whole gradients are held and reduced once; cut ones after every micro-batch.
        """
        return max(1, self.mesh.largest(num_micro)) if self.residency.gradients else 1

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
            # Every rank has the squares of its slices, and each slice is held by `copies` ranks.
            square = self.mesh.total(square)[0] / len(self.mesh.copies)
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
        parameters = sum(_bytes_of(unit.working) for unit in self.units)
        gradients = sum(_bytes_of(unit.grads) for unit in self.trained if unit.grads is not None)
        masters = sum(_bytes_of(unit.master) for unit in self.trained if unit.master is not unit.held)
        return parameters, gradients, masters

    def remove(self) -> None:
        """Take the hooks off the module; its parameters stay usable."""
        self._window.remove()


def _bytes_of(tensor: torch.Tensor) -> int:
    """Of the storage, so that a view counts as what it keeps alive."""
    return tensor.untyped_storage().nbytes()


class _ReduceWindow:
    """Reduces units in fixed order while backward runs.

    A unit is complete when each of its parameters has received its gradient since the window was
    opened; parameters that receive none are counted in by `close`.
    """

    def __init__(self, units: list[Unit]) -> None:
        self._order = list(reversed(units))
        self._missing: dict[Unit, int] = {}
        self._next = 0
        self._open = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._arrival(unit, index))  # type: ignore[no-untyped-call]
            for unit in units
            for index, parameter in enumerate(unit.parameters)
        ]

    def open(self) -> None:
        self._missing = {unit: len(unit.parameters) for unit in self._order}
        self._next = 0
        self._open = True

    def abandon(self) -> None:
        """Forget a window that an error left open."""
        self._open = False

    def flush(self) -> None:
        while self._open and self._next < len(self._order):
            self._start()

    def close(self) -> None:
        if not self._open:
            return
        self.flush()
        for unit in self._order:
            unit.finish_reduce()
        self._open = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self) -> None:
        unit = self._order[self._next]
        unit.home_grads()
        unit.start_reduce()
        self._next += 1

    def _arrival(self, unit: Unit, index: int) -> Callable[[nn.Parameter], None]:
        def arrived(parameter: nn.Parameter) -> None:
            unit.home_grad(index)
            if not self._open:
                return
            self._missing[unit] -= 1
            if self._missing[unit] < 0:
                raise StateError(
                    f"a parameter of shape {tuple(parameter.shape)} received a second gradient after its "
                    "unit was handed to the reduction",
                    rule="one backward pass gives each parameter its gradient once",
                    fix="use torch.utils.checkpoint with use_reentrant=False, or the written-out loop "
                    "(engine.backward), which reduces in step()",
                )
            while self._next < len(self._order) and self._missing[self._order[self._next]] == 0:
                self._start()

        return arrived
