"""The expert axis: stacked expert weights cut over ranks, and tokens sent to where their experts are.

Decided and applied by `parallel.axes`. A module of experts is known by what its forward takes: tokens, the
experts chosen for each, and their weights. Its forward is replaced by one that sends tokens out, runs the
module's own forward on those that came, and brings the results back. Routers stay whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import ModelError, PlanError
from sixfold.mesh import Group, Mesh
from sixfold.models.choices import Order
from sixfold.models.moe import Experts
from sixfold.parallel.blocks import own_forward, put_forward
from sixfold.parallel.change import AxisChange, Case
from sixfold.parallel.expert.journey import Journey
from sixfold.parallel.expert.trace import traced
from sixfold.plan import Place

TAKES = ("hidden_states", "top_k_index", "top_k_weights")
"""Arguments by which the forward of experts is known; any others are optional."""


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts, by name: those whose parameters are all stacked, [experts, ...]."""
    return {name: part for name, part in model.named_modules() if _num_experts(part) is not None}


def decide_expert(case: Case) -> AxisChange:
    """Deal the experts of every layer out to `layout.expert` groups of ranks.

    Raises:
        ModelError: the model has no experts, or some that cannot be dealt out.
        PlanError: their number cannot be divided so.
    """
    layout, geometry, found = case.layout, case.geometry, experts_of(case.model)
    if not found:
        raise ModelError(
            f"layout.expert = {layout.expert} with a {type(case.model).__name__} without stacked experts",
            rule=f"experts are modules whose forward takes {', '.join(TAKES)} and whose parameters are all "
            "[experts, ...]",
            fix="set layout.expert = 1, or stack the experts' weights as sixfold.models.moe.Experts does",
        )
    degree, first_names = geometry.expert, {p: name for name, p in reversed([*case.model.named_parameters()])}
    here = geometry.coordinate(case.rank, "expert")
    made: dict[str, Place] = {}
    for name, part in found.items():
        num_experts = _num_experts(part) or 0
        if num_experts % degree:
            legal = [str(each) for each in range(1, num_experts + 1) if num_experts % each == 0]
            raise PlanError(
                f"layout.expert = {degree} with {num_experts} experts in {name}",
                rule="every group of ranks has equally many experts of a layer",
                fix=f"set layout.expert to one of {', '.join(legal)}",
            )
        share = num_experts // degree
        span = ((here * share, (here + 1) * share),)
        for parameter in part.parameters():
            spans = (span, *((),) * (parameter.dim() - 1))
            made[first_names[parameter]] = Place(tuple(parameter.shape), spans, ("expert",))
    trace = partial(traced, found.values(), geometry)
    return AxisChange(made, lambda mesh: _apply(found.values(), mesh), trace=trace)


def _num_experts(part: nn.Module) -> int | None:
    """Experts of a module of experts; None for any other module."""
    takes = inspect.signature(type(part).forward).parameters
    if not all(name in takes for name in TAKES):
        return None
    sizes = {parameter.shape[0] if parameter.dim() > 1 else 0 for parameter in part.parameters()}
    number = getattr(part, "num_experts", None)
    return number if isinstance(number, int) and sizes == {number} else None


def _apply(found: Any, mesh: Mesh) -> Callable[[], None]:
    group, undo = mesh.along("expert"), ExitStack()
    for part in found:
        dealing = _dealing(own_forward(part), group, part.num_experts)
        undo.callback(put_forward(part, MethodType(dealing, part)))
    return undo.close


def _dealing(own: Callable[..., Tensor], group: Group, num_experts: int) -> Callable[..., Tensor]:
    share = num_experts // group.num_ranks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        beside: Callable[[], object] | None = None,
    ) -> Tensor:
        if next(self.parameters()).shape[0] == num_experts:  # gathered: the whole model is here
            given = () if beside is None else (beside,)
            return own(self, hidden_states, top_k_index, top_k_weights, *given)
        order = Order.by_expert(top_k_index, num_experts)
        journey = Journey(group, order, hidden_states.device)
        receipt = journey.send(hidden_states)
        if beside is not None:
            beside()
        rows, counts = journey.receive(receipt), journey.counts
        if isinstance(self, Experts):
            made = self.on_groups(rows, counts)
        else:
            with _having(self, share):
                made = _tied(own(self, rows, *_choices(counts, rows)), rows, self)
        return journey.bring_back(made, top_k_weights)

    return forward  # type: ignore[no-any-return]


def _choices(counts: list[int], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows sorted by expert the one expert here that each is for, [rows, 1], and its weight, 1."""
    here = torch.tensor(counts, device=rows.device)
    experts = torch.arange(len(counts), device=rows.device).repeat_interleave(here)
    return experts[:, None], rows.new_ones(len(rows), 1)


def _tied(mine: Tensor, came: Tensor, part: nn.Module) -> Tensor:
    """What experts made of the rows that came. Of no rows they may make something that has no backward, and
    without one here the other ranks would wait in theirs."""
    if len(came):
        return mine
    used = [weight.flatten()[:0].sum() for weight in part.parameters() if weight.requires_grad]
    return mine + sum(used, came)


@contextmanager
def _having(part: nn.Module, num_experts: int) -> Iterator[None]:
    """Inside, the module's own forward sees as many experts as are here."""
    whole, part.num_experts = part.num_experts, num_experts  # type: ignore[assignment]
    try:
        yield
    finally:
        part.num_experts = whole
