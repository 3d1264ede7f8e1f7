"""The model state of one rank: its units and the verbs that act on all of them.

Driven by the player: `open_reduce` before the last backward, then `finish_reduce`, the optimizer,
`publish`. Units are reduced in one fixed order, last unit first, whichever parameters were used on
this rank; where parameters are cut, `Gathering` makes them whole while they are used. It issues
collectives only through the mesh and never looks at a loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from sixfold.base.errors import ModelError, StateError
from sixfold.mesh import Mesh
from sixfold.parallel import DTYPES
from sixfold.plan import Plan, Slot
from sixfold.state.gathering import Gathering
from sixfold.state.passes import BACKWARD, forward_kind
from sixfold.state.unit import Unit
from sixfold.state.windows import ReduceWindow


class ModelState:
    """Units of one module, in module order.

    Args:
        module: whose parameters become views of the units' buffers.
        prefetch_bytes: bound on what is gathered ahead of its use; None for always one unit.
        given: parameters whose numbers are filled in afterwards.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: Mesh,
        prefetch_bytes: int | None = None,
        given: Collection[str] = (),
    ) -> None:
        self.mesh = mesh
        self.residency = plan.residency
        self._module = module
        parameters = dict(module.named_parameters())
        self.units: list[Unit] = []
        for unit_plan in plan.units:
            is_blank = all(slot.name in given for slot in unit_plan.slots)
            precision = plan.precision_of(unit_plan)
            unit = Unit(unit_plan, precision, plan.residency, parameters, mesh, is_blank=is_blank)
            self.units.append(unit)
            if self.residency.parameters:
                unit.drop()
        self.trained = [unit for unit in self.units if unit.plan.trainable]
        self._window = ReduceWindow(self.trained, by_arrival=not self.residency.parameters)
        self._is_reduced = False
        self._is_begun = False
        cut = self.units if self.residency.parameters else []
        self._gathering = Gathering(
            module, cut, mesh, self._serve_asked, self._window.hand_over, prefetch_bytes
        )

    # Who runs and who serves, where parameters are cut; elsewhere these do nothing.

    def arrive(self, what: str) -> None:
        """Come to the call `what` of the engine; ranks in a pass are served until they come too."""
        self._gathering.meet(what)

    def largest(self, what: str, num_micro: int) -> int:
        """`arrive`; the largest `num_micro` of all ranks, or this rank's own where nothing that is sent
        depends on the others'."""
        if self.residency.parameters:
            return round(max(self._gathering.meet(what, num_micro)))
        return self.mesh.largest(num_micro) if self.residency.reduces_each else num_micro

    def by_program(self) -> AbstractContextManager[None]:
        """Inside, ranks come to forwards and backwards in an order that they have agreed on."""
        return self._gathering.by_program()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Inside, the one backward pass that this rank makes now."""
        with self._gathering.backward():
            yield
        self._flush_pass()

    def serve_forward(self) -> None:
        """Take part in the others' forward."""
        self._gathering.serve(forward_kind())

    def serve_backward(self) -> None:
        """Take part in the others' backward and, in an open window, in its reductions."""
        self._gathering.serve(BACKWARD)
        self._flush_pass()

    def _flush_pass(self) -> None:
        if self.residency.parameters:
            self._window.flush()

    def _serve_asked(self, kind: str) -> None:
        if kind != BACKWARD:
            self._gathering.serve(kind)
            return
        self.begin()
        if self.reduces_with_backward:
            self.open_reduce()
        self.serve_backward()
        if self.reduces_with_backward:
            self.finish_reduce()

    @property
    def reduces_with_backward(self) -> bool:
        """Whether each backward of a written-out loop ends in a reduction; all ranks are in it anyway."""
        return bool(self.residency.parameters and self.residency.reduces_each)

    @contextmanager
    def edited(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """Working parameters of the units of `parameters` (None: all) whole; edits that rank 0 makes of them
        and of buffers are everyone's afterwards, unless the block raises. A collective."""
        asked = None if parameters is None else {id(parameter) for parameter in parameters}
        units = [
            unit
            for unit in self.units
            if asked is None or any(id(parameter) in asked for parameter in unit.parameters)
        ]
        with torch.no_grad(), self._gathering.held(units):
            try:
                try:
                    yield
                except BaseException:
                    self._undo_edits()
                    raise
                self._share_edits(units)
            finally:
                for unit in units:
                    unit.forget_edits()

    def _share_edits(self, units: list[Unit]) -> None:
        for pending in [self.mesh.broadcast(unit.working) for unit in units]:
            pending.wait()
        for unit in units:
            unit.absorb_edits()
        self.share_buffers(self._module.buffers())

    def _undo_edits(self) -> None:
        # Where this rank's masters still know better; nothing is exchanged, because an error that calls for
        # this may not have come to every rank.
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
        """Start accumulating gradients for the next update; gradients of the last one go. Until `end` a
        further call does nothing: a rank may have served others before its own first backward."""
        if self._is_begun:
            return
        self._window.abandon()
        self._is_reduced = False
        self._check_module()
        for unit in self.units:
            unit.check_home()
            unit.absorb_noted_edits()
        for unit in self.trained:
            unit.drop_grads()
        self._is_begun = True

    def end(self) -> None:
        """The update is over, or given up."""
        self._is_begun = False

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
            StateError: gradients are reduced once, and have been in this update already.
        """
        if self._is_reduced and not self.residency.reduces_each:
            raise StateError(
                f"a second reduction in one update, {self.residency}",
                rule="gradients that are held whole are summed over ranks once, when they are complete",
                fix='write one reduce for each stage, or set layout.reduce = "each"',
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

    def grad_norms(self, num_groups: int) -> list[float]:
        """The 2-norm of each optimizer group's reduced gradients, the same on every rank."""
        squares = [0.0] * num_groups
        for unit in self.trained:
            for (group, _), square in zip(unit.segments, unit.grad_squares.tolist(), strict=True):
                squares[group] += square
        if self.residency.optimizer:
            # Every rank has the squares of its slices, and some have the same ones.
            num_slices = self.mesh.geometry.num_parts(self.residency.optimizer)
            squares = [square * num_slices / self.mesh.data_ranks for square in self.mesh.total(*squares)]
        return [math.sqrt(square) for square in squares]

    def non_finite(self, grad_norm: float, loss_scale: float, step: int | None) -> ModelError:
        """The error for a gradient that is not finite. A collective.

        It names the first such parameter in module order, and the ranks whose own gradients of that
        parameter's unit were not finite before the sum.
        """
        sick = [
            slot.name
            for unit in self.trained
            for slot in unit.plan.slots
            if unit.grads is not None and not unit.part_of(unit.grads, slot).isfinite().all()
        ]
        mine = [bool(unit.local_sum.isfinite()) for unit in self.trained]
        rows = [json.loads(text) for text in self.mesh.texts(json.dumps([sick, mine]))]
        everyones = {name for names, _ in rows for name in names}
        found = [(slot.name, unit) for unit, slot in self.slots() if slot.name in everyones]
        first = "none (the sum of squares overflowed)"
        if found:
            name, place = found[0][0], self.trained.index(found[0][1])
            ranks = [str(rank) for rank, (_, is_finite) in enumerate(rows) if not is_finite[place]]
            whose = f"on rank(s) {', '.join(ranks)} before the sum" if ranks else "in the sum over ranks"
            first = f"{name} ({whose})"
        scaled = f", the loss scale {loss_scale:g}" if loss_scale != 1.0 else ""
        return ModelError(
            f"the gradient norm of update {step} is {grad_norm}{scaled}; {len(found)} parameter(s) are not "
            f"finite, first: {first}",
            rule="an update is made from finite gradients only",
            fix="look at that rank's batch; lower optimizer.lr, set optimizer.clip_norm, or compute in a "
            "wider type" + (" or with a smaller precision.loss_scale" if scaled else ""),
        )

    def scale_grads(self, factors: Sequence[float]) -> None:
        """Multiply all reduced gradients, those of each optimizer group by its own factor."""
        for unit in self.trained:
            for group, part in unit.segments:
                if factors[group] != 1.0 and unit.grads is not None:
                    unit.grads[part].mul_(factors[group])

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
