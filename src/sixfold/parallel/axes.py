"""The axes that change a model, one entry each: how it is decided and what comes of it.

Called by `initialize`: decided before ranks meet, so that what cannot run is refused before any weight is
made; applied when they have. An axis is a module beside this one with a function here; nothing else asks for
its name.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from sixfold.config import LayoutConfig
from sixfold.mesh import Mesh
from sixfold.parallel.change import AxisChange, Case, Decide, Note, Remove
from sixfold.parallel.context.axis import decide_context_axis
from sixfold.parallel.expert.axis import decide_expert
from sixfold.parallel.tensor.axis import decide_tensor_axis
from sixfold.plan import Geometry, Place

DECIDE: dict[str, Decide] = {
    "expert": decide_expert,
    "tensor": decide_tensor_axis,
    "context": decide_context_axis,
}
"""By axis, in the order in which they are decided and applied: tokens go to experts inside of what the tensor
axis puts around these."""


def decide_axes(
    model: nn.Module, layout: LayoutConfig, geometry: Geometry, rank: int, *, owns_loss: bool
) -> AxisChange:
    """What all axes with more than one rank make of `model`, as one change.

    Args:
        owns_loss: whether it computes its loss by itself.

    Raises:
        ModelError, PlanError: an axis cannot be applied to this model.
    """
    places: dict[str, Place] = {}
    changes: list[AxisChange] = []
    for axis, decide in DECIDE.items():
        if geometry.degree(axis) > 1:
            changes.append(decide(Case(model, layout, geometry, rank, places, owns_loss)))
            places = {**places, **changes[-1].places}

    if not changes:
        return AxisChange()

    def apply(mesh: Mesh) -> Remove:
        with ExitStack() as undo:
            for change in changes:
                undo.callback(change.apply(mesh))
            return undo.pop_all().close

    def trace(note: Note) -> Remove:
        with ExitStack() as undo:
            for change in changes:
                undo.callback(change.trace(note))
            return undo.pop_all().close

    attention = next((change.attention for change in changes if change.attention is not None), None)
    cuts = [f"{name} {place.shape} {place.axes} {place.partial}" for name, place in sorted(places.items())]
    agreed = "\n".join((*(change.agreed for change in changes), *cuts))
    return AxisChange(places, apply, attention, agreed, trace)
