"""The gradients of one trained unit: from where backward leaves them to their sum over ranks.

This rank's own gradients lie in a flat buffer that exchanges send from, whole until they are reduced; what is
kept of the sum is the residency's. Owned by `Unit`, driven by `ReduceWindow` and `ModelState`. It never
decides when to reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sixfold.mesh import Pending, Replicas, untouched_zeros
from sixfold.parallel import DTYPES
from sixfold.plan import PrecisionPlan, Residency, UnitPlan
from sixfold.state.flat import views_of
from sixfold.state.presence import Presence


class Gradients:
    """Buffers of gradients and the views into them.

    Args:
        plan: the unit's slots.
        precision: its number types.
        residency: what is cut, and when it is reduced.
        parameters: of the unit, in the order of its slots.
        own: elements of the unit that this rank keeps the sum of.
        presence: of the parameters.
        replicas: the ranks that sum theirs.

    Attributes:
        reduced: [own] in the grad type.
        segments: each optimizer group's part of `reduced`, where this rank has one.
        squares: sum of squares of each segment, in fp64.
        local_sum: sum of this rank's own gradients; not finite where one of them is not.
        local: [numel], this rank's own gradients until they are reduced; see `open`.
        reduces_each: whether those of each micro-batch are reduced by themselves.
        has_sum: whether `reduced` holds a sum of this update, to which others are added.
        sent: what is on its way.
        awaited: places of parameters that have received no gradient since the last reduction, where that is
            noted.
    """

    def __init__(
        self,
        plan: UnitPlan,
        precision: PrecisionPlan,
        residency: Residency,
        parameters: Sequence[nn.Parameter],
        own: slice,
        presence: Presence,
        replicas: Replicas,
    ) -> None:
        self.plan = plan
        self.reduces_each = residency.reduces_each
        self._spread = residency.optimizer
        self._may_land = bool(residency.gradients)
        self._parameters = parameters
        self._own = own
        self._presence = presence
        self._replicas = replicas
        self._dtype, self._sum_dtype = DTYPES[precision.grad], DTYPES[precision.reduce]
        self._wide = torch.promote_types(self._dtype, torch.float32)
        start, stop = own.start, own.stop
        self.segments = [
            (group, slice(max(begin, start) - start, min(end, stop) - start))
            for group, begin, end in plan.segments()
            if max(begin, start) < min(end, stop)
        ]
        self.squares = torch.zeros(len(self.segments), dtype=torch.float64)
        self.local_sum = torch.zeros(())
        self._buffers: dict[int, _Buffer] = {}  # by address: a few come again and again
        self.local: _Buffer | None = None
        self._places = dict.fromkeys(range(len(plan.slots)))
        self.awaited = dict(self._places)
        self.has_sum = False
        self._is_landing = False  # whether what is on its way arrives in `reduced`
        self.sent: _Buffer | None = None
        if self.reduces_each:
            self.reduced = untouched_zeros(stop - start, self._dtype, replicas.device)
        else:
            self.reduced = self.open().flat.zero_()[own]

    def adopt(self) -> None:
        """Have the parameters accumulate into the buffer, where it is there from the start."""
        for parameter in self._parameters:
            parameter.grad = None
            if self.reduced.dtype != parameter.dtype:
                parameter.grad_dtype = self.reduced.dtype
        if self.local is not None:
            for parameter, view in zip(self._parameters, self.local.views, strict=True):
                parameter.grad = view

    def reclaim(self) -> None:
        """Before a new accumulation: what is left of the one before is thrown away.

        Nothing is zeroed: autograd hands over each first gradient, and it is copied over the old one. That
        moves fewer bytes than zeroing and adding.
        """
        if self.local is not None:
            if self.reduces_each:
                self._replicas.exchangeable.give(self.local.flat)
                self.local = None
            else:
                self._replicas.exchangeable.reclaim(self.local.flat)
        self.awaited.update(self._places)

    def open(self) -> _Buffer:
        """Have memory for this rank's own gradients."""
        flat = self._replicas.exchangeable.take(self.plan.numel, self._dtype)
        self.local = local = self._buffers.get(flat.data_ptr()) or self._buffer(flat)
        for start, stop in self.plan.gaps:
            flat[start:stop] = 0
        return local

    def _buffer(self, flat: torch.Tensor) -> _Buffer:
        made = self._buffers[flat.data_ptr()] = _Buffer(flat, views_of(flat, self.plan.slots))
        return made

    def home(self, index: int) -> None:
        """Bring one parameter's gradient, if it lives elsewhere, into its place in the buffer.

        A parameter without gradient counts as zeros: the order and size of what is sent never
        depend on which parameters were used.
        """
        _bring(self._parameters[index], (self.local or self.open()).views[index])

    def first_arrived(self) -> str:
        """The name of the first parameter that is not awaited."""
        return next(slot.name for place, slot in enumerate(self.plan.slots) if place not in self.awaited)

    def start_reduce(self) -> None:
        """Bring all gradients home, and start to sum them over the replicas, in the reduce type.

        Where this rank will not have the whole sum its parameters show none from here on; where each
        micro-batch is reduced, gradients of the next one have other memory.
        """
        presence, local = self._presence, self.local or self.open()
        stays = not (self._spread or self.reduces_each)
        is_dropped = presence.is_dropped
        if is_dropped:
            for parameter, kind in presence.own:
                parameter.__class__ = kind
        for parameter, view in zip(self._parameters, local.views, strict=True):
            grad = parameter.grad
            if grad is None or grad.is_sparse:
                _bring(parameter, view)
            elif grad is not view:  # as `_bring` does, without a call for each of them
                view.copy_(grad)
            parameter.grad = view if stays else None
        if is_dropped:
            for parameter, kind in presence.absent:
                parameter.__class__ = kind
        self.awaited.update(self._places)
        # Once they are summed over ranks, nothing else tells whose gradients were not finite.
        local_sum = local.flat.sum(dtype=self._wide)
        self.local_sum = self.local_sum + local_sum if self.has_sum else local_sum
        # One rank has nobody to send to, but the rounding must be that of every other layout.
        sent, is_alike = local, self._sum_dtype == self._dtype
        if not is_alike:
            flat = self._replicas.exchangeable.take(self.plan.numel, self._sum_dtype).copy_(local.flat)
            sent = self._buffers.get(flat.data_ptr()) or self._buffer(flat)
            if self.reduces_each:
                self._replicas.exchangeable.give(local.flat)
        if self.reduces_each:
            self.local = None
        self.sent, self._is_landing = sent, is_alike and self._may_land and not self.has_sum
        pending = sent.sums.get(self._is_landing)
        if pending is None:
            into = self.reduced if self._is_landing else None
            pending = self._replicas.prepare_sum_up(sent.flat, self._spread, into)
            sent.sums[self._is_landing] = pending
        pending.start()

    def finish_reduce(self) -> None:
        """Wait for the sum, if it is on its way, and note the squares of what `reduced` holds now.

        Where each micro-batch is reduced, sums of one update add up and this rank's own gradients go.
        """
        sent, self.sent = self.sent, None
        if sent is not None:
            sent.sums[self._is_landing].wait()
            mine = sent.flat[self._own]
            if self.has_sum:
                self.reduced.add_(mine)
            elif not self._is_landing and mine.data_ptr() != self.reduced.data_ptr():
                self.reduced.copy_(mine)
            self.has_sum = self.reduces_each
            if sent is not self.local:
                self._replicas.exchangeable.give(sent.flat)
        # Taken here, the pass over this unit runs while later units are still on their way. A norm has
        # the type of its numbers, and bf16 would keep three digits of it.
        norms = []
        for _, part in self.segments:
            norms.append(torch.linalg.vector_norm(self.reduced[part], dtype=self._wide))
        if norms:
            self.squares = torch.stack(norms).double().square()


@dataclass(frozen=True, eq=False)
class _Buffer:
    """Memory of gradients for some time.

    Args:
        flat: [numel].
        views: of the parameters.
        sums: what sums it up over the replicas, by whether the sum lands in `Gradients.reduced`; in place
            otherwise.
    """

    flat: torch.Tensor
    views: list[torch.Tensor]
    sums: dict[bool, Pending] = field(default_factory=dict)


def _bring(parameter: nn.Parameter, view: torch.Tensor) -> None:
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
