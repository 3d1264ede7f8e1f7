"""One unit: the flat buffers behind parameters that travel together.

Parameters become views of the working buffer and keep their identity; gradients accumulate into views of
a gradient buffer; the optimizer updates the master, which is the working numbers themselves where both
have the same type. Which of these are whole and which are this rank's slice is the residency's; every
collective follows from it. Made by `ModelState`; it never decides when to gather or to reduce.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from sixfold.base.errors import StateError
from sixfold.mesh import Mesh, Pending, untouched_zeros
from sixfold.parallel import DTYPES
from sixfold.plan import PrecisionPlan, Residency, Slot, Spread, UnitPlan
from sixfold.plan.residency import ALL
from sixfold.state.absent import absent_class


class Unit:
    """Flat buffers of one unit and the views into them.

    Args:
        plan: the unit's slots.
        precision: its number types; None for parameters that are not floating.
        residency: what is cut.
        parameters: the module's own parameters by name; their numbers on rank 0 are taken over.
        is_blank: nothing is taken over, because all numbers are filled in afterwards.
    """

    def __init__(
        self,
        plan: UnitPlan,
        precision: PrecisionPlan | None,
        residency: Residency,
        parameters: Mapping[str, nn.Parameter],
        mesh: Mesh,
        *,
        is_blank: bool = False,
    ) -> None:
        self.plan = plan
        self.precision = precision
        self.residency = residency
        self.parameters = [parameters[slot.name] for slot in plan.slots]
        self._mesh = mesh
        self.spread = residency.optimizer if plan.trainable else residency.parameters
        """Over what `held`, `master` and `grads` are cut."""
        self.own = self._range_of(self.spread)
        """Elements of the unit in `held`, `master` and `grads`."""
        self.kept = self._range_of(residency.parameters)
        """Elements of the unit in `part`."""
        compute = DTYPES[precision.compute] if precision else self.parameters[0].dtype
        self._cut = mesh.cut(
            plan.numel,
            compute,
            residency.parameters,
            is_read=self.spread != residency.parameters,
            is_blank=is_blank,
        )
        self.working = self._cut.whole
        """What forward and backward read: [numel] in the compute type; not to be read while it is dropped."""
        self.part = self._cut.part
        """What this rank keeps of it: [kept]."""
        self.held = self.part[self.own.start - self.kept.start : self.own.stop - self.kept.start]
        """What this rank publishes of it: [own]."""
        self.master = self.held
        """What the optimizer updates: [own] in the master type."""
        self.grads: torch.Tensor | None = None
        """Reduced gradients: [own] in the grad type; None for frozen units."""
        start, stop = self.own.start, self.own.stop
        self.segments = [
            (group, slice(max(begin, start) - start, min(end, stop) - start))
            for group, begin, end in plan.segments()
            if max(begin, start) < min(end, stop)
        ]
        """Each optimizer group's part of `grads`, where this rank has one."""
        self.grad_squares = torch.zeros(len(self.segments), dtype=torch.float64)
        """Sum of squares of each segment of `grads`, in fp64."""
        self.local_sum = torch.zeros(())
        """Sum of this rank's own gradients; not finite where one of them is not."""
        self._local: torch.Tensor | None = None  # [numel]: this rank's own gradients until they are reduced
        self._local_views: list[torch.Tensor] = []
        self._views_at: dict[int, list[torch.Tensor]] = {}  # by address: a few buffers come again and again
        self._has_sum = False
        self._is_landing = False  # whether what is on its way arrives in `grads`
        self._sent: torch.Tensor | None = None
        self._pending = Pending()
        if precision and plan.trainable:
            self._make_trainable(precision)
        self._adopt(is_blank=is_blank)
        self._versions = [parameter._version for parameter in self.parameters]
        self.is_dropped = False
        self._classes = [type(parameter) for parameter in self.parameters]
        names = {
            id(parameter): slot.name for parameter, slot in zip(self.parameters, plan.slots, strict=True)
        }
        self._absent_classes = [absent_class(parameter, names) for parameter in self.parameters]

    def _range_of(self, spread: Spread) -> slice:
        size = self.plan.numel // self._mesh.geometry.num_parts(spread)
        place = self._mesh.place_in(spread)
        return slice(place * size, (place + 1) * size)

    def _make_trainable(self, precision: PrecisionPlan) -> None:
        if precision.master != precision.compute:
            self.master = self._zeros(self.held.numel(), DTYPES[precision.master])
        grad = DTYPES[precision.grad]
        if self.residency.reduces_each:
            self.grads = self._zeros(self.held.numel(), grad)
        else:
            self._local = self._mesh.exchangeable.take(self.plan.numel, grad).zero_()
            self._local_views = self.views_of(self._local)
            self.grads = self._local[self.own]

    def _adopt(self, *, is_blank: bool) -> None:
        with torch.no_grad():
            if not is_blank:
                self._take_over()
            for view, parameter in zip(self.views_of(self.working), self.parameters, strict=True):
                parameter.data = view
        if self.precision is None or self.grads is None:
            return
        for parameter in self.parameters:
            parameter.grad = None
            if self.grads.dtype != parameter.dtype:
                parameter.grad_dtype = self.grads.dtype
        for parameter, view in zip(self.parameters, self._local_views, strict=False):
            parameter.grad = view

    def _take_over(self) -> None:
        # Rank 0's numbers, in the master's type: the master takes them before their rounding.
        whole = self.working
        if self.master is not self.held:
            whole = torch.zeros(self.plan.numel, dtype=self.master.dtype, device=self._mesh.device)
        for view, parameter in zip(self.views_of(whole), self.parameters, strict=True):
            view.copy_(parameter)
        self._mesh.align(whole).wait()
        self.part.copy_(whole[self.kept])
        self.master.copy_(whole[self.own])
        self.settle().wait()

    def _zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return untouched_zeros(numel, dtype, self._mesh.device)

    def slot_of(self, flat: torch.Tensor, slot: Slot) -> torch.Tensor:
        """The view of `flat` [numel] that belongs to one parameter, in its shape."""
        return flat[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`slot_of` for every slot."""
        return [self.slot_of(flat, slot) for slot in self.plan.slots]

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
        self._mesh.spread_out(whole, self.spread, ()).wait()
        return whole

    @property
    def share(self) -> slice:
        """The elements of `own` that this rank writes into a checkpoint: ranks that hold the same ones
        divide them among themselves, and of tied weights the first stage's do."""
        same = [axis for axis in ALL if axis not in self.spread]
        place, count = self._mesh.place_in(tuple(same)), self._mesh.geometry.num_parts(same)
        size = 0 if self.plan.is_copy else _length(self.own)
        return slice(self.own.start + size * place // count, self.own.start + size * (place + 1) // count)

    def fill_own(self, mine: torch.Tensor) -> None:
        """Take over numbers [own] as master; `publish` brings them into the working copy."""
        self.master.copy_(mine)

    # Where working parameters are cut: they come and go.

    @property
    def working_bytes(self) -> int:
        """Size of `working` while it is whole."""
        return self.working.numel() * self.working.element_size()

    def gather(self) -> Pending:
        """Start to make `working` whole; the parameters can be used after `show`."""
        return self._cut.gather()

    def show(self) -> None:
        """Let the parameters be used: `working` is whole."""
        self.is_dropped = False
        self._take_classes(self._classes)

    def drop(self) -> None:
        """Free `working`; its parameters raise when they are touched.

        Raises:
            StateError: a parameter was edited since `show`, which would be lost.
        """
        versions = [parameter._version for parameter in self.parameters]
        if versions != self._versions:
            edited = [
                slot.name
                for slot, now, then in zip(self.plan.slots, versions, self._versions, strict=True)
                if now != then
            ]
            raise StateError(
                f"{', '.join(edited[:4])} changed in place during a forward or backward",
                rule="with cut parameters (layout.zero = 3) a gathered copy lives until its block has run, "
                "so an edit of it would be lost",
                fix="edit inside `with engine.gathered():`, or set layout.zero = 2",
            )
        self._take_classes(self._absent_classes)
        self._cut.drop()
        self.is_dropped = True

    def _take_classes(self, classes: list[type[nn.Parameter]]) -> None:
        for parameter, kind in zip(self.parameters, classes, strict=True):
            parameter.__class__ = kind

    def _unmask(self) -> None:
        """Their own classes for a moment: what is asked next needs no numbers."""
        if self.is_dropped:
            self._take_classes(self._classes)

    def _mask(self) -> None:
        if self.is_dropped:
            self._take_classes(self._absent_classes)

    def check_home(self) -> None:
        """Raise if a parameter was frozen, unfrozen, or moved out of the working buffer by the user.

        Such a change would otherwise be trained past: its gradients would go nowhere.
        """
        self._unmask()
        try:
            self._refuse_strangers()
        finally:
            self._mask()

    def _refuse_strangers(self) -> None:
        base, size = self.working.data_ptr(), self.working.element_size()
        for slot, parameter in zip(self.plan.slots, self.parameters, strict=True):
            if parameter.requires_grad is not self.plan.trainable:
                raise StateError(
                    f"{slot.name}.requires_grad became {parameter.requires_grad} after initialize",
                    rule="what is trained is decided once, when units and optimizer are made",
                    fix="set requires_grad before sixfold.initialize, or save, initialize anew and load",
                )
            if self.is_dropped:
                continue  # without numbers there is nothing that could have been replaced
            if slot.numel and parameter.data_ptr() != base + slot.offset * size:
                raise StateError(
                    f"{slot.name} no longer lies in its unit: its data was replaced after initialize "
                    f"(now {parameter.dtype} on {parameter.device})",
                    rule="parameters are views of the engine's buffers; type and device are set by the plan",
                    fix="change values in place (parameter.copy_(...)), types with precision.compute, and "
                    "devices with sixfold.initialize(device=...)",
                )

    def drop_grads(self) -> None:
        """Start a new accumulation.

        Nothing is zeroed: autograd hands over each first gradient, and `home_grad` copies it over the
        old one. That moves fewer bytes than zeroing and adding.
        """
        self._has_sum = False
        self.local_sum = torch.zeros((), device=self._mesh.device)
        if self._sent is not None and self.residency.reduces_each:
            # An error left it on its way: memory that others may still write into is not used again.
            self._sent, self._local, self._local_views = None, None, []
        elif self._local is not None:
            self._mesh.exchangeable.reclaim(self._local)
        self._release()

    def _release(self) -> None:
        """Let go of this rank's own gradients: the parameters show none, borrowed memory goes back."""
        self._unmask()
        for parameter in self.parameters:
            parameter.grad = None
        self._mask()
        if self.residency.reduces_each and self._local is not None:
            self._mesh.exchangeable.give(self._local)
            self._local, self._local_views = None, []

    def home_grad(self, index: int) -> None:
        """Bring one parameter's gradient, if it lives elsewhere, into its place in the buffer.

        A parameter without gradient counts as zeros: the order and size of what is sent never
        depend on which parameters were used.
        """
        if self._local is None:
            assert self.grads is not None, "frozen units have no gradients"
            self._local = self._mesh.exchangeable.take(self.plan.numel, self.grads.dtype)
            place = self._local.data_ptr()
            if place not in self._views_at:
                self._views_at[place] = self.views_of(self._local)
            self._local_views = self._views_at[place]
            for start, stop in self.plan.gaps:
                self._local[start:stop] = 0
        parameter, view = self.parameters[index], self._local_views[index]
        grad = parameter.grad
        if grad is view:
            return
        if grad is None:
            view.zero_()
        elif grad.is_sparse:
            view.zero_().add_(grad)
        else:
            view.copy_(grad)
        parameter.grad = view

    def home_grads(self) -> None:
        """Bring all gradients into the buffer."""
        self._unmask()
        is_new, views = self._local is None, self._local_views
        for index, parameter in enumerate(self.parameters):
            if is_new or parameter.grad is not views[index]:
                self.home_grad(index)
        self._mask()

    def start_reduce(self) -> None:
        """Start to sum gradients over the data ranks, in the reduce type."""
        assert self._local is not None, "gradients are brought home first"
        assert self.grads is not None, "frozen units have no gradients"
        assert self.precision is not None, "a unit with gradients has number types"
        reduce = DTYPES[self.precision.reduce]
        # Once they are summed over ranks, nothing else tells whose gradients were not finite.
        self.local_sum = self.local_sum + self._local.sum(dtype=_wide(self._local.dtype))
        # One rank has nobody to send to, but the rounding must be that of every other layout.
        self._sent = self._local
        if reduce != self._local.dtype:
            self._sent = self._mesh.exchangeable.take(self.plan.numel, reduce).copy_(self._local)
        self._is_landing = bool(self.residency.gradients) and not self._has_sum and reduce == self.grads.dtype
        self._pending = self._mesh.sum_up(
            self._sent, self.residency.optimizer, self.grads if self._is_landing else None
        )

    def finish_reduce(self) -> None:
        """Wait for the sum; afterwards `grads` and `grad_squares` hold it.

        Where each micro-batch is reduced, sums of one update add up and this rank's own gradients go.
        """
        assert self.grads is not None, "frozen units have no gradients"
        self._pending.wait()
        arrived, self._sent = self._sent, None
        if arrived is not None:
            mine = arrived[self.own]
            if self._has_sum:
                self.grads.add_(mine)
            elif not self._is_landing and mine.data_ptr() != self.grads.data_ptr():
                self.grads.copy_(mine)
            self._has_sum = self.residency.reduces_each
            if arrived is not self._local:
                self._mesh.exchangeable.give(arrived)
            if self.spread or self.residency.reduces_each:
                self._release()
        self.take_norms()

    def take_norms(self) -> None:
        """Note the squares of `grads` in `grad_squares`."""
        assert self.grads is not None, "frozen units have no gradients"
        # Taken here, the pass over this unit runs while later units are still on their way. A norm has
        # the type of its numbers, and bf16 would keep three digits of it.
        wide = _wide(self.grads.dtype)
        norms = [torch.linalg.vector_norm(self.grads[part], dtype=wide) for _, part in self.segments]
        if norms:
            self.grad_squares = torch.stack(norms).double().square()

    def settle(self) -> Pending:
        """Start to wait until all ranks have come here and read what was published; `part` may then be
        written."""
        return self._cut.publish(Pending())

    def publish(self) -> Pending:
        """Start to bring the updated master into the working parameters."""
        return self.present(self.master)

    def present(self, numbers: torch.Tensor) -> Pending:
        """Start to bring `numbers` [own], this rank's part of everyone's, into the working parameters."""
        if numbers is not self.held:
            self.held.copy_(numbers)
        return self._cut.publish(self._mesh.spread_out(self.part, self.spread, self.residency.parameters))

    def absorb_noted_edits(self) -> None:
        """Take over edits that torch has counted since the last call (`load_state_dict`, `mul_`, ...)."""
        if self.residency.parameters:
            return  # `drop` has looked
        versions = [parameter._version for parameter in self.parameters]
        if versions != self._versions:
            if self.plan.trainable:
                self.absorb_edits()
            self._versions = versions

    def absorb_edits(self) -> None:
        """Take over what a user wrote into working parameters; untouched numbers keep full precision."""
        if self.master is not self.held:
            edited = self.working[self.own]
            kept = edited == self.master.to(edited.dtype)
            self.master.copy_(torch.where(kept, self.master, edited.to(self.master.dtype)))
        if self.part is not self.working:
            self.part.copy_(self.working[self.kept])
            self.settle().wait()
            self._versions = [parameter._version for parameter in self.parameters]

    def forget_edits(self) -> None:
        """What was written into `working` is lost, unless it was absorbed."""
        self._cut.forget()
        self._versions = [parameter._version for parameter in self.parameters]


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def range_in(flat: torch.Tensor, part: torch.Tensor) -> tuple[int, int]:
    """(start, stop) of the elements of `flat` that `part`, a view of it, shows."""
    start = int(part.storage_offset() - flat.storage_offset())
    return start, start + part.numel()


def zero_between(flat: torch.Tensor, filled: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Zero the elements of `flat` that lie in none of the ranges (start, stop), and return it."""
    at = 0
    for start, stop in sorted(filled):
        flat[at:start] = 0
        at = max(at, stop)
    flat[at:] = 0
    return flat
