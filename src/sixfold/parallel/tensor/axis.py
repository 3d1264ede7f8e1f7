"""The tensor axis: from a model and a layout to pieces and changed forwards.

Called through `axes.py`. It joins its rooms in order: rules, pieces, forwards.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sixfold.base.errors import ModelError
from sixfold.config import LayoutConfig
from sixfold.mesh import Mesh
from sixfold.parallel.change import AxisChange, Remove
from sixfold.parallel.facts import block_names
from sixfold.parallel.pipe.cut import ModelCut
from sixfold.parallel.tensor.cut import AXIS, decide_tensor, in_lists, in_sequence
from sixfold.parallel.tensor.forwards import TensorForwards
from sixfold.parallel.tensor.rules import find_rules
from sixfold.plan import Geometry, Place


def decide_tensor_axis(
    model: nn.Module,
    layout: LayoutConfig,
    geometry: Geometry,
    rank: int,
    places: Mapping[str, Place],
    owns_loss: bool,
) -> AxisChange:
    """See `Decide`."""
    runs = _runs(model, layout) if layout.sequence_parallel else []
    rules = find_rules(model, layout)
    cut = decide_tensor(model, rules, geometry.degree(AXIS), geometry.coordinate(rank, AXIS))
    cut = in_sequence(cut, model, [name for run in runs for name in run])

    def apply(mesh: Mesh) -> Remove:
        forwards = TensorForwards(model, cut, mesh.along(AXIS), runs, owns_loss=owns_loss, device=mesh.device)
        return forwards.remove

    cuts = {name: places[name].and_also(cut.places[name]) for name in cut.places if name in places}
    agreed = "\n".join(f"{pattern} = {style}" for pattern, style in sorted(rules.styles.items()))
    return AxisChange({**cut.places, **cuts}, apply, agreed=agreed)


def _runs(model: nn.Module, layout: LayoutConfig) -> list[list[str]]:
    """Names of blocks that follow each other on one rank."""
    if layout.pipe > 1:
        cut = ModelCut.decide(model, layout)
        assert cut.plan is not None, "a pipeline of several ranks has stages"
        # Between stages the sequence is whole: a model may read its length from what it receives.
        return [[cut.parts.blocks[place] for place in blocks] for blocks in cut.plan.blocks if blocks]
    blocks = block_names(model, layout.blocks)
    if not blocks:
        raise ModelError(
            f"layout.sequence_parallel with a {type(model).__name__} that has no repeated blocks",
            rule="the sequence is cut from the first block of a model to its last",
            fix='name them, for example layout.blocks = ["encoder.layer.*"], or leave '
            "layout.sequence_parallel unset",
        )
    return in_lists(blocks)
