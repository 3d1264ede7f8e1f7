"""The model state of one rank: the units of its stages and the verbs that act on them.

Driven by the player: `open_reduce` before the last backward of a stage, then `finish_reduce`, the optimizer,
`publish`. Units are reduced in one fixed order, a stage's last unit first, whichever parameters were used on
this rank; where parameters are cut, `Gathering` makes them whole while they are used. It issues
collectives only through the mesh and never looks at a loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from sixfold.base.errors import StateError
from sixfold.mesh import Mesh
from sixfold.parallel import Stage, torch_type
from sixfold.plan import Plan, Slot
from sixfold.state.catalog import make_catalog
from sixfold.state.edits import Edits
from sixfold.state.foreign import Foreign
from sixfold.state.gathering import Gathering
from sixfold.state.meeting import Meeting
from sixfold.state.passes import BACKWARD, forward_kind
from sixfold.state.publishing import Publication
from sixfold.state.readiness import Readiness
from sixfold.state.sums import GradientSums
from sixfold.state.unit import Unit
from sixfold.state.windows import ReduceWindow


@dataclass(frozen=True)
class _StageParts:
    """What moves the numbers of one stage's units.

    Args:
        window: sums their gradients over ranks.
        gathering: makes them whole while they are used, where they are cut.
        publication: brings what an update has written into their working parameters.
    """

    window: ReduceWindow
    gathering: Gathering
    publication: Publication


class ModelState:
    """Units of the stages that this rank has of one module, each stage's in module order.

    Args:
        module: whose parameters become views of the units' buffers.
        prefetch_bytes: bound on what is gathered ahead of its use; None for always one unit.
        given: parameters whose numbers are filled in afterwards.
        stages: its stages on this rank; None for a module that is not cut.
        buffer_sources: the ranks whose buffers are the model's, in a pipeline.
        puts_off: whether weight parts of backwards come later than the backward; a stage is then reduced when
            they are through, and not as gradients arrive.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: Mesh,
        prefetch_bytes: int | None = None,
        given: Collection[str] = (),
        *,
        stages: Sequence[Stage] | None = None,
        buffer_sources: Mapping[str, int] | None = None,
        puts_off: bool = False,
    ) -> None:
        self.mesh = mesh
        self.residency = plan.residency
        stages = stages or [Stage.whole(module)]
        self.units = _make_units(plan, stages, mesh, given)
        self.trained = [unit for unit in self.units if unit.plan.trainable]
        self._gradients = [unit.gradients for unit in self.trained if unit.gradients is not None]
        names = [name for name, _ in module.named_parameters()]
        self.catalog = make_catalog(names, self.units, mesh)
        places = {slot.name: slot.place for unit in self.units for slot in unit.plan.slots if slot.place}
        self.foreign = Foreign(module, stages, self.catalog, places, buffer_sources or {}, mesh)
        self.known = dict(self.foreign.names)
        """Names of all parameters of the model by id, the same on every rank."""
        for unit in self.units:
            for slot, parameter in zip(unit.plan.slots, unit.parameters, strict=True):
                self.known[id(parameter)] = slot.name
        self._readiness = Readiness(module, self.units, self.known)
        self.sums = GradientSums(module, self.trained, plan, mesh)
        self._is_reduced: set[int] = set()
        self._is_begun = False
        self._is_free = True
        # Several stages are on a rank in pipelines alone, where ranks come to passes in an order that they
        # have agreed on, so that nobody asks to be served.
        serve = partial(self._serve_asked, stages[0].number)
        self._meeting = Meeting(module, mesh, serve, is_needed=bool(self.residency.parameters and self.units))
        self._stages = {
            stage.number: self._make_parts(stage, prefetch_bytes, puts_off=puts_off) for stage in stages
        }
        self._gathering = [each.gathering for each in self._stages.values() if each.gathering.has_units]
        self.edits = Edits(module, self.units, self.foreign, self.known, self._gathering, mesh)
        self._places = {
            id(parameter): (gradients, index)
            for unit, gradients in zip(self.trained, self._gradients, strict=True)
            for index, parameter in enumerate(unit.parameters)
        }

    def _make_parts(self, stage: Stage, prefetch_bytes: int | None, *, puts_off: bool) -> _StageParts:
        units = [unit for unit in self.units if unit.plan.stage == stage.number]
        trained = [unit for unit in units if unit.plan.trainable]
        cut = units if self.residency.parameters else []
        window = ReduceWindow(trained, by_arrival=not self.residency.parameters and not puts_off)
        gathering = Gathering(stage.module, cut, self.mesh, self._meeting, window, prefetch_bytes)
        return _StageParts(window, gathering, Publication(trained))

    # Who runs and who serves, where parameters are cut; elsewhere these do nothing.

    def arrive(self, what: str, number: float = 0.0) -> list[float]:
        """Come to the call `what` of the engine; ranks in a pass are served until they come too. Returns
        everyone's `number`."""
        for gathering in self._gathering:
            if gathering.current is not None:
                gathering.close()
        return self._meeting.meet(what, number)

    def begin_forward(self) -> None:
        """The module is called from outside, so an earlier call of it has come to its end."""
        for gathering in self._gathering:
            gathering.leave()

    def largest(self, what: str, num_micro: int) -> int:
        """`arrive`; the largest `num_micro` of all ranks, or this rank's own where nothing that is sent
        depends on the others'."""
        if self.residency.parameters:
            return round(max(self.arrive(what, num_micro)))
        # With several stages here, the order in which they are reduced depends on the number too.
        depends = self.residency.reduces_each or len(self._stages) > 1
        return self.mesh.largest(num_micro) if depends else num_micro

    @contextmanager
    def by_program(self) -> Iterator[None]:
        """Inside, ranks come to forwards and backwards in an order that they have agreed on."""
        was_free, self._is_free = self._is_free, False
        for gathering in self._gathering:
            gathering.is_free = False
        try:
            yield
        finally:
            self._is_free = was_free
            for gathering in self._gathering:
                gathering.is_free = was_free

    def backward(self, stage: int = 0) -> AbstractContextManager[None]:
        """Inside, the one backward pass that this rank makes now; a window that is open is its own, and
        completed at its end."""
        return self._stages[stage].gathering.backward()

    def backward_input(self, stage: int) -> AbstractContextManager[None]:
        """Inside, the input part of a backward. What it accumulates belongs to the next reduction, so the
        one under way is waited for."""
        self._stages[stage].window.close()
        return self._stages[stage].gathering.backward()

    def put_off(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Accumulate a gradient that a backward left for later."""
        gradients, index = self._places[id(parameter)]
        grad = parameter.grad
        if grad is None:
            parameter.grad = gradient.to(parameter.grad_dtype or gradient.dtype)
            gradients.home(index)
        else:
            grad.add_(gradient)

    def complete(self, stage: int) -> None:
        """Start to reduce what is left of a stage in its open window: its gradients are complete, and those
        that did not come are zeros. Stages are so reduced in the order of their windows on every rank."""
        self._stages[stage].window.flush()

    def keep(self, stage: int, *, is_kept: bool) -> None:
        """Have a stage's cut parameters whole from now on, or no longer than passes need them."""
        self._stages[stage].gathering.keep(is_kept)

    def serve_forward(self, stage: int = 0) -> None:
        """Take part in the others' forward."""
        if self.residency.parameters:
            self._stages[stage].gathering.serve(forward_kind())

    def serve_backward(self, stage: int = 0, *, puts_off: bool = False) -> None:
        """Take part in the others' backward and, in an open window, in its reductions.

        Args:
            puts_off: whether they run its input part alone.
        """
        if puts_off:
            self._stages[stage].window.close()
        if self.residency.parameters:
            self._stages[stage].gathering.serve(BACKWARD)
        if not puts_off:
            self.complete(stage)

    def _serve_asked(self, stage: int, kind: str) -> None:
        if kind != BACKWARD:
            self._stages[stage].gathering.serve(kind)
            return
        self.begin()
        if self.reduces_with_backward:
            self.open_reduce(stage)
        self.serve_backward(stage)
        if self.reduces_with_backward:
            self.finish_reduce()

    @property
    def reduces_with_backward(self) -> bool:
        """Whether each backward of a written-out loop ends in a reduction; all ranks are in it anyway."""
        return bool(self.residency.parameters and self.residency.reduces_each)

    def begin(self) -> None:
        """Start accumulating gradients for the next update; gradients of the last one go. Until `end` a
        further call does nothing: a rank may have served others before its own first backward."""
        if self._is_begun:
            return
        for each in self._stages.values():
            each.window.finish()
        self._is_reduced = set()
        self._readiness.restore()
        self._is_begun = True

    def end(self) -> None:
        """The update is over, or given up."""
        self._is_begun = False

    def open_reduce(self, stage: int = 0) -> None:
        """From here on a unit of a stage is reduced as soon as its gradients are complete; ends an earlier
        window.

        Raises:
            StateError: gradients are reduced once, and have been in this update already.
        """
        if stage in self._is_reduced and not self.residency.reduces_each:
            raise StateError(
                f"a second reduction in one update, {self.residency}",
                rule="gradients that are held whole are summed over ranks once, when they are complete",
                fix='write one reduce for each stage, or set layout.reduce = "each"',
            )
        self._stages[stage].window.open()
        self._is_reduced.add(stage)

    def finish_reduce(self) -> None:
        """Start to reduce what has not been since `open_reduce`, and wait for all of it."""
        for each in self._stages.values():
            each.window.close()

    def publish(self, stage: int | None) -> None:
        """Bring a stage's updated state into its working parameters; None: of all units, of frozen ones too,
        after `Unit.fill_own`."""
        if stage is None:
            self.refresh()
        publication = Publication(self.units) if stage is None else self._stages[stage].publication
        publication.run()

    @contextmanager
    def shown(self, numbers: Mapping[Unit, torch.Tensor]) -> Iterator[None]:
        """`numbers` [own] of all trained units in place of their working parameters; edits of these are
        forgotten. Collectives at the beginning and, unless an error on this rank has to find its way out, at
        the end; what was there is kept for that time."""
        self.edits.absorb()
        kept = {unit: unit.part.clone() for unit in self.trained}
        try:
            self.refresh()
            for each in self._stages.values():
                each.publication.run(numbers)
            yield
            self.refresh()
            for pending in [unit.settle() for unit in kept]:
                pending.wait()
        finally:
            for unit, part in kept.items():
                unit.part.copy_(part)
                unit.forget_edits()

    def refresh(self) -> None:
        """Drop what is whole for a while: its numbers are about to change.

        Raises:
            StateError: it was edited, which is lost.
        """
        for gathering in self._gathering:
            gathering.refresh()

    def slots(self) -> Iterator[tuple[Unit, Slot]]:
        """Every parameter's unit and place."""
        for unit in self.units:
            for slot in unit.plan.slots:
                yield unit, slot

    def whole(self, numbers: Mapping[Unit, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Every parameter of the model whole, in the storage type; may share memory with the state. A
        collective.

        Args:
            numbers: [own] in place of some units' masters.
        """
        mine: dict[str, torch.Tensor] = {}
        for unit in self.units:
            flat = unit.whole_of((numbers or {}).get(unit, unit.master))
            mine |= {slot.name: unit.slot_of(flat, slot) for slot in unit.plan.slots}
        kinds = {name: torch_type(entry.storage) for name, entry in self.catalog.entries.items()}
        return {name: tensor.to(kinds[name]) for name, tensor in self.foreign.everyones(mine, kinds).items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every trained parameter's gradient of the last update, whole; copies. A collective per unit."""
        mine: dict[str, torch.Tensor] = {}
        for unit in self.trained:
            assert unit.grads is not None, "trained units have gradients"
            flat = unit.whole_of(unit.grads)
            mine |= {slot.name: unit.slot_of(flat, slot).clone() for slot in unit.plan.slots}
        kinds = {entry.name: torch_type(entry.grad) for entry in self.catalog.trained}
        return self.foreign.everyones(mine, kinds)

    def live_bytes(self) -> tuple[int, int, int]:
        """Bytes that live from step to step: working parameters, gradients, masters."""
        parameters = sum(_bytes_of(unit.part) for unit in self.units)
        gradients = sum(_bytes_of(unit.grads) for unit in self.trained if unit.grads is not None)
        masters = sum(_bytes_of(unit.master) for unit in self.trained if unit.master is not unit.held)
        return parameters, gradients, masters

    def remove(self) -> None:
        """Take the hooks off the module; its parameters stay usable, unless they are cut."""
        for each in self._stages.values():
            each.window.remove()
        for gathering in self._gathering:
            gathering.remove()
        for unit in self.units:
            if self.residency.parameters:
                unit.presence.end()


def _make_units(plan: Plan, stages: Sequence[Stage], mesh: Mesh, given: Collection[str]) -> list[Unit]:
    """The units of a plan over the parameters of its stages; those that are cut hold their own part alone."""
    parameters = {stage.number: stage.parameters for stage in stages}
    units = []
    for each in plan.units:
        unit = Unit(
            each,
            plan.precision_of(each),
            plan.residency,
            parameters[each.stage],
            mesh.replicas_of(each.cut),
            is_blank=all(slot.name in given for slot in each.slots),
            is_first="tensor" in each.cut or mesh.place("tensor") == 0,
        )
        units.append(unit)
        if plan.residency.parameters:
            unit.presence.drop()
    return units


def _bytes_of(tensor: torch.Tensor) -> int:
    """Of the storage, so that a view counts as what it keeps alive."""
    return tensor.untyped_storage().nbytes()
