"""One unit: the flat buffers behind parameters that travel together.

Parameters become views of the working buffer and keep their identity; gradients accumulate into views of
a gradient buffer; the optimizer updates the master, which is the working numbers themselves where both
have the same type. Which of these are whole and which are this rank's slice is the residency's; every
collective follows from it. Made by `ModelState`; it never decides when to gather or to reduce.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sixfold.mesh import Pending, Replicas, untouched_zeros
from sixfold.parallel import DTYPES
from sixfold.plan import PrecisionPlan, Residency, Slot, Spread, UnitPlan
from sixfold.plan.residency import ALL
from sixfold.state.flat import view_of, views_of
from sixfold.state.gradients import Gradients
from sixfold.state.presence import Presence


class Unit:
    """Flat buffers of one unit and the views into them.

    Args:
        plan: the unit's slots.
        precision: its number types; None for parameters that are not floating.
        residency: what is cut.
        parameters: the module's own parameters by name; their numbers on the first replica are taken over.
        replicas: the ranks that hold the same.
        is_blank: nothing is taken over, because all numbers are filled in afterwards.
        is_first: whether, of the ranks that hold the same without being replicas, this is the first.
    """

    def __init__(
        self,
        plan: UnitPlan,
        precision: PrecisionPlan | None,
        residency: Residency,
        parameters: Mapping[str, nn.Parameter],
        replicas: Replicas,
        *,
        is_blank: bool = False,
        is_first: bool = True,
    ) -> None:
        self.plan = plan
        self._is_first = is_first
        self.precision = precision
        self.residency = residency
        self.parameters = [parameters[slot.name] for slot in plan.slots]
        self.replicas = replicas
        self.spread = residency.optimizer if plan.trainable else residency.parameters
        """Over what `held`, `master` and reduced gradients are cut."""
        self.own = self._range_of(self.spread)
        """Elements of the unit in `held`, `master` and reduced gradients."""
        self.kept = self._range_of(residency.parameters)
        """Elements of the unit in `part`."""
        compute = DTYPES[precision.compute] if precision else self.parameters[0].dtype
        self.cut = replicas.cut(
            plan.numel,
            compute,
            residency.parameters,
            is_read=self.spread != residency.parameters,
            is_blank=is_blank,
        )
        self.working = self.cut.whole
        """What forward and backward read: [numel] in the compute type; not to be read while it is dropped."""
        self.part = self.cut.part
        """What this rank keeps of it: [kept]."""
        self.held = self.part[self.own.start - self.kept.start : self.own.stop - self.kept.start]
        """What this rank publishes of it: [own]."""
        self.master = self.held
        """What the optimizer updates: [own] in the master type."""
        if precision and plan.trainable and precision.master != precision.compute:
            self.master = untouched_zeros(self.held.numel(), DTYPES[precision.master], replicas.device)
        self.presence = Presence(self.parameters, [slot.name for slot in plan.slots], self.cut)
        """Whether parameters have numbers: where working parameters are cut, they come and go."""
        self.gradients = (
            Gradients(plan, precision, residency, self.parameters, self.own, self.presence, replicas)
            if precision and plan.trainable
            else None
        )
        """None for frozen units."""
        self.working_bytes = self.working.numel() * self.working.element_size()
        """Size of `working` while it is whole."""
        self.shown = self.working
        """What parameters are views of while they have numbers: `working`, or memory that `lend` took."""
        self._adopt(is_blank=is_blank)
        self.presence.note_edits()

    @property
    def rounds(self) -> bool:
        """Whether working numbers are roundings of the master's."""
        return self.master is not self.held

    def _range_of(self, spread: Spread) -> slice:
        size = self.plan.numel // self.replicas.num_parts(spread)
        place = self.replicas.place_in(spread)
        return slice(place * size, (place + 1) * size)

    def _adopt(self, *, is_blank: bool) -> None:
        with torch.no_grad():
            if not is_blank:
                self._take_over()
            self._home = views_of(self.working, self.plan.slots)
            self.views = self._home
            self.point()
        if self.gradients is not None:
            self.gradients.adopt()

    def _take_over(self) -> None:
        # The first one's numbers, in the master's type: the master takes them before their rounding.
        whole = self.working
        if self.master is not self.held:
            whole = torch.zeros(self.plan.numel, dtype=self.master.dtype, device=self.replicas.device)
        for view, parameter in zip(views_of(whole, self.plan.slots), self.parameters, strict=True):
            view.copy_(parameter)
        self.replicas.align(whole).wait()
        self.part.copy_(whole[self.kept])
        self.master.copy_(whole[self.own])
        self.settle().wait()

    @property
    def grads(self) -> torch.Tensor | None:
        """Reduced gradients: [own] in the grad type; None for frozen units."""
        return self.gradients.reduced if self.gradients is not None else None

    def slot_of(self, flat: torch.Tensor, slot: Slot) -> torch.Tensor:
        """The view of `flat` [numel] that belongs to one parameter, in its shape."""
        return view_of(flat, slot)

    def part_of(self, mine: torch.Tensor, slot: Slot) -> torch.Tensor:
        """What `mine` [own] holds of one parameter: flat, empty where that lies on other ranks."""
        start = max(slot.offset, self.own.start)
        stop = max(start, min(slot.offset + slot.numel, self.own.stop))
        return mine[start - self.own.start : stop - self.own.start]

    def whole_of(self, mine: torch.Tensor) -> torch.Tensor:
        """Everyone's `mine` [own] as [numel]; a collective where it is cut, else the same memory."""
        if not self.spread:
            return mine
        whole = torch.zeros(self.plan.numel, dtype=mine.dtype, device=mine.device)
        whole[self.own] = mine
        self.replicas.spread_out(whole, self.spread, ()).wait()
        return whole

    @property
    def share(self) -> slice:
        """The elements of `own` that this rank writes into a checkpoint: replicas that hold the same ones
        divide them among themselves; of those that others hold too, the first one's do."""
        same = tuple(axis for axis in ALL if axis not in self.spread)
        place, count = self.replicas.place_in(same), self.replicas.num_parts(same)
        size = 0 if self.plan.is_copy or not self._is_first else _length(self.own)
        return slice(self.own.start + size * place // count, self.own.start + size * (place + 1) // count)

    def fill_own(self, mine: torch.Tensor) -> None:
        """Take over numbers [own] as master; publishing brings them into the working copy."""
        self.master.copy_(mine)

    def point(self) -> None:
        """Have parameters show what they are to."""
        for view, parameter in zip(self.views, self.parameters, strict=True):
            parameter.data = view

    def lend(self) -> None:
        """Have cut parameters whole in memory of their own until `take_back`. Whoever keeps a view of it, as
        in a `state_dict`, keeps the numbers of then. A collective."""
        self.presence.gather().wait()
        self._show(self.working.clone())
        self.presence.free()

    def take_back(self) -> None:
        """The reverse; what was edited and not absorbed is lost."""
        self._show(self.working)

    def _show(self, flat: torch.Tensor) -> None:
        self.shown = flat
        self.views = self._home if flat is self.working else views_of(flat, self.plan.slots)
        self.presence.show()
        self.point()

    def absorb(self, *, compares: bool) -> bool:
        """Take over edits of working parameters that are whole for good.

        Args:
            compares: find all, by a pass over master and working copy; else those that torch has counted
                (`load_state_dict`, `mul_`, ..., but nothing that is done to `.data`).

        Returns:
            Whether there were some that torch had not counted.
        """
        is_counted = self.presence.has_edits()
        self.presence.note_edits()
        return (compares or is_counted) and self.absorb_edits() and not is_counted

    def settle(self) -> Pending:
        """Start to wait until all ranks have come here and read what was published; `part` may then be
        written."""
        cut = self.residency.parameters
        return self.replicas.prepare_publish([self.cut], cut, cut).start()

    def align_edits(self) -> Pending:
        """Start to give every replica what the first one shows."""
        return self.replicas.align(self.shown)

    def absorb_edits(self) -> bool:
        """Take over what a user wrote into working parameters; untouched numbers keep full precision.

        Returns:
            Whether a master was changed.
        """
        is_changed = False
        if self.rounds:
            edited = self.shown[self.own]
            rounded = self.master.to(edited.dtype)
            kept = edited == rounded
            is_changed = not kept.all()
            if is_changed:  # seldom, so only then: what is no number equals nothing, and is no edit
                kept |= edited.isnan() & rounded.isnan()
                is_changed = not kept.all()
            if is_changed:
                self.master.copy_(torch.where(kept, self.master, edited.to(self.master.dtype)))
        if self.part is not self.shown:
            self.part.copy_(self.shown[self.kept])
            self.settle().wait()
            self.presence.note_edits()
        return is_changed

    def forget_edits(self) -> None:
        """What was written into parameters is lost, unless it was absorbed."""
        self.cut.forget()
        self.presence.note_edits()


def _length(part: slice) -> int:
    return int(part.stop - part.start)
