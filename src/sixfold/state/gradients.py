"""The gradients of one trained unit: from where backward leaves them to their sum over ranks.

This rank's own gradients lie in a flat buffer that exchanges send from, whole until they are reduced; what is
kept of the sum is the residency's. Owned by `Unit`, driven by `ReduceWindow` and `ModelState`. It never
decides when to reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sixfold.mesh import Pending, Replicas, untouched_zeros
from sixfold.parallel import DTYPES
from sixfold.plan import PrecisionPlan, Residency, UnitPlan
from sixfold.state.absent import Mask
from sixfold.state.flat import views_of


class Gradients:
    """Buffers of gradients and the views into them.

    Args:
        plan: the unit's slots.
        precision: its number types.
        residency: what is cut, and when it is reduced.
        parameters: of the unit, in the order of its slots.
        own: elements of the unit that this rank keeps the sum of.
        mask: lifted while gradients of dropped parameters are looked at.
        replicas: the ranks that sum theirs.

    Attributes:
        reduced: [own] in the grad type.
        segments: each optimizer group's part of `reduced`, where this rank has one.
        squares: sum of squares of each segment, in fp64.
        local_sum: sum of this rank's own gradients; not finite where one of them is not.
    """

    def __init__(
        self,
        plan: UnitPlan,
        precision: PrecisionPlan,
        residency: Residency,
        parameters: Sequence[nn.Parameter],
        own: slice,
        mask: Mask,
        replicas: Replicas,
    ) -> None:
        self._plan = plan
        self._residency = residency
        self._parameters = parameters
        self._own = own
        self._mask = mask
        self._replicas = replicas
        self._sum_dtype = DTYPES[precision.reduce]
        start, stop = own.start, own.stop
        self.segments = [
            (group, slice(max(begin, start) - start, min(end, stop) - start))
            for group, begin, end in plan.segments()
            if max(begin, start) < min(end, stop)
        ]
        self.squares = torch.zeros(len(self.segments), dtype=torch.float64)
        self.local_sum = torch.zeros(())
        self._local: torch.Tensor | None = None  # [numel]: this rank's own gradients until they are reduced
        self._views: list[torch.Tensor] = []
        self._views_at: dict[int, list[torch.Tensor]] = {}  # by address: a few buffers come again and again
        self._has_sum = False
        self._is_landing = False  # whether what is on its way arrives in `reduced`
        self._sent: torch.Tensor | None = None
        self._pending = Pending()
        dtype = DTYPES[precision.grad]
        if residency.reduces_each:
            self.reduced = untouched_zeros(stop - start, dtype, replicas.device)
        else:
            self._local = replicas.exchangeable.take(plan.numel, dtype).zero_()
            self._views = views_of(self._local, plan.slots)
            self.reduced = self._local[own]

    def adopt(self) -> None:
        """Have the parameters accumulate into the buffer, where it is there from the start."""
        for parameter in self._parameters:
            parameter.grad = None
            if self.reduced.dtype != parameter.dtype:
                parameter.grad_dtype = self.reduced.dtype
        for parameter, view in zip(self._parameters, self._views, strict=False):
            parameter.grad = view

    def drop(self) -> None:
        """Start a new accumulation.

        Nothing is zeroed: autograd hands over each first gradient, and `home` copies it over the old one.
        That moves fewer bytes than zeroing and adding.
        """
        self._has_sum = False
        self.local_sum = torch.zeros((), device=self._replicas.device)
        if self._sent is not None and self._residency.reduces_each:
            # An error left it on its way: memory that others may still write into is not used again.
            self._sent, self._local, self._views = None, None, []
        elif self._local is not None:
            self._replicas.exchangeable.reclaim(self._local)
        self._release()

    def _release(self) -> None:
        """Let go of this rank's own gradients: the parameters show none, borrowed memory goes back."""
        self._mask.lift()
        for parameter in self._parameters:
            parameter.grad = None
        self._mask.lower()
        if self._residency.reduces_each and self._local is not None:
            self._replicas.exchangeable.give(self._local)
            self._local, self._views = None, []

    def home(self, index: int) -> None:
        """Bring one parameter's gradient, if it lives elsewhere, into its place in the buffer.

        A parameter without gradient counts as zeros: the order and size of what is sent never
        depend on which parameters were used.
        """
        if self._local is None:
            self._local = self._replicas.exchangeable.take(self._plan.numel, self.reduced.dtype)
            place = self._local.data_ptr()
            if place not in self._views_at:
                self._views_at[place] = views_of(self._local, self._plan.slots)
            self._views = self._views_at[place]
            for start, stop in self._plan.gaps:
                self._local[start:stop] = 0
        parameter, view = self._parameters[index], self._views[index]
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

    def home_all(self) -> None:
        """Bring all gradients into the buffer."""
        self._mask.lift()
        is_new, views = self._local is None, self._views
        for index, parameter in enumerate(self._parameters):
            if is_new or parameter.grad is not views[index]:
                self.home(index)
        self._mask.lower()

    def start_reduce(self) -> None:
        """Start to sum gradients over the replicas, in the reduce type."""
        assert self._local is not None, "gradients are brought home first"
        # Once they are summed over ranks, nothing else tells whose gradients were not finite.
        self.local_sum = self.local_sum + self._local.sum(dtype=_wide(self._local.dtype))
        # One rank has nobody to send to, but the rounding must be that of every other layout.
        self._sent = self._local
        is_wide = self._sum_dtype == self._local.dtype
        if not is_wide:
            narrow = self._replicas.exchangeable.take(self._plan.numel, self._sum_dtype)
            self._sent = narrow.copy_(self._local)
        self._is_landing = bool(self._residency.gradients) and not self._has_sum and is_wide
        self._pending = self._replicas.sum_up(
            self._sent, self._residency.optimizer, self.reduced if self._is_landing else None
        )

    def finish_reduce(self) -> None:
        """Wait for the sum; afterwards `reduced` and `squares` hold it.

        Where each micro-batch is reduced, sums of one update add up and this rank's own gradients go.
        """
        self._pending.wait()
        arrived, self._sent = self._sent, None
        if arrived is not None:
            mine = arrived[self._own]
            if self._has_sum:
                self.reduced.add_(mine)
            elif not self._is_landing and mine.data_ptr() != self.reduced.data_ptr():
                self.reduced.copy_(mine)
            self._has_sum = self._residency.reduces_each
            if arrived is not self._local:
                self._replicas.exchangeable.give(arrived)
            if self._residency.optimizer or self._residency.reduces_each:
                self._release()
        self.take_norms()

    def take_norms(self) -> None:
        """Note the squares of `reduced` in `squares`."""
        # Taken here, the pass over this unit runs while later units are still on their way. A norm has
        # the type of its numbers, and bf16 would keep three digits of it.
        wide = _wide(self.reduced.dtype)
        norms = [torch.linalg.vector_norm(self.reduced[part], dtype=wide) for _, part in self.segments]
        if norms:
            self.squares = torch.stack(norms).double().square()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
