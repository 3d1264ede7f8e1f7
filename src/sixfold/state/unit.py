"""One unit: the flat buffers behind parameters that travel together.

Parameters become views of the working buffer and keep their identity; gradients accumulate into
views of the gradient buffer; the optimizer updates the master buffer, which is the working buffer
itself where both have the same type. Made by `ModelState`; it never decides when to reduce.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sixfold.base.errors import StateError
from sixfold.mesh import Mesh, Pending
from sixfold.parallel import DTYPES
from sixfold.plan import PrecisionPlan, Slot, UnitPlan


class Unit:
    """Flat buffers of one unit and the views into them.

    Args:
        plan: the unit's slots.
        precision: its number types; None for parameters that are not floating.
        parameters: the module's own parameters by name.
    """

    def __init__(
        self,
        plan: UnitPlan,
        precision: PrecisionPlan | None,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.precision = precision
        self.parameters = [parameters[slot.name] for slot in plan.slots]
        compute = DTYPES[precision.compute] if precision else self.parameters[0].dtype
        self.working = torch.zeros(plan.numel, dtype=compute, device=device)
        """What forward and backward read: [numel] in the compute type."""
        self.master = self.working
        """What the optimizer updates: [numel] in the master type."""
        self.grads: torch.Tensor | None = None
        """Accumulated gradients: [numel] in the grad type; None for frozen units."""
        self.grad_square = torch.zeros((), dtype=torch.float64)
        """Sum of squares of the reduced gradients, a 0-d fp64 tensor."""
        self._grad_views: list[torch.Tensor] = []
        self._sent: torch.Tensor | None = None
        self._pending = Pending()
        self._adopt(precision)
        self._versions = [parameter._version for parameter in self.parameters]

    def _adopt(self, precision: PrecisionPlan | None) -> None:
        with torch.no_grad():
            if precision and self.plan.trainable and precision.master != precision.compute:
                self.master = torch.zeros(
                    self.plan.numel, dtype=DTYPES[precision.master], device=self.working.device
                )
            for slot, parameter in zip(self.plan.slots, self.parameters, strict=True):
                # The master takes the original numbers, not their rounding to the compute type.
                self.slot_of(self.master, slot).copy_(parameter)
                view = self.slot_of(self.working, slot)
                view.copy_(parameter)
                parameter.data = view
        if precision and self.plan.trainable:
            self.grads = torch.zeros(
                self.plan.numel, dtype=DTYPES[precision.grad], device=self.working.device
            )
            self._grad_views = [self.slot_of(self.grads, slot) for slot in self.plan.slots]
            for parameter, view in zip(self.parameters, self._grad_views, strict=True):
                parameter.grad = None
                if view.dtype != parameter.dtype:
                    parameter.grad_dtype = view.dtype
                parameter.grad = view

    def slot_of(self, flat: torch.Tensor, slot: Slot) -> torch.Tensor:
        """The view of `flat` [numel] that belongs to one parameter, in its shape."""
        return flat[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def check_home(self) -> None:
        """Raise if a parameter was frozen, unfrozen, or moved out of the working buffer by the user.

        Such a change would otherwise be trained past: its gradients would go nowhere.
        """
        base, size = self.working.data_ptr(), self.working.element_size()
        for slot, parameter in zip(self.plan.slots, self.parameters, strict=True):
            if parameter.requires_grad is not self.plan.trainable:
                raise StateError(
                    f"{slot.name}.requires_grad became {parameter.requires_grad} after initialize",
                    rule="what is trained is decided once, when units and optimizer are made",
                    fix="set requires_grad before sixfold.initialize, or save, initialize anew and load",
                )
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
        for parameter in self.parameters:
            parameter.grad = None

    def home_grad(self, index: int) -> None:
        """Bring one parameter's gradient, if it lives elsewhere, into its place in the buffer.

        A parameter without gradient counts as zeros: the order and size of what is sent never
        depend on which parameters were used.
        """
        parameter, view = self.parameters[index], self._grad_views[index]
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
        for index in range(len(self.parameters)):
            self.home_grad(index)

    def start_reduce(self, mesh: Mesh) -> None:
        """Start to sum gradients over the data ranks, in the reduce type."""
        assert self.grads is not None, "frozen units have no gradients"
        assert self.precision is not None, "a unit with gradients has number types"
        reduce = DTYPES[self.precision.reduce]
        # One rank has nobody to send to, but the rounding must be that of every other layout.
        self._sent = self.grads if reduce == self.grads.dtype else self.grads.to(reduce)
        self._pending = mesh.all_reduce(self._sent)

    def finish_reduce(self) -> None:
        """Wait for the sum; afterwards `grads` and `grad_square` hold it on every rank."""
        assert self.grads is not None, "frozen units have no gradients"
        self._pending.wait()
        if self._sent is not None and self._sent is not self.grads:
            self.grads.copy_(self._sent)
        self._sent = None
        # Taken here, the pass over this unit runs while later units are still on their way. A norm has
        # the type of its numbers, and bf16 would keep three digits of it.
        wide = torch.promote_types(self.grads.dtype, torch.float32)
        self.grad_square = torch.linalg.vector_norm(self.grads, dtype=wide).double().square()

    def publish(self) -> None:
        """Bring the updated master into the working parameters."""
        if self.master is not self.working:
            self.working.copy_(self.master)

    def absorb_noted_edits(self) -> None:
        """Take over edits that torch has counted since the last call (`load_state_dict`, `mul_`, ...)."""
        versions = [parameter._version for parameter in self.parameters]
        if versions != self._versions:
            if self.plan.trainable:
                self.absorb_edits()
            self._versions = versions

    def absorb_edits(self) -> None:
        """Take over what a user wrote into working parameters; untouched numbers keep full precision."""
        if self.master is not self.working:
            kept = self.working == self.master.to(self.working.dtype)
            self.master.copy_(torch.where(kept, self.master, self.working.to(self.master.dtype)))
