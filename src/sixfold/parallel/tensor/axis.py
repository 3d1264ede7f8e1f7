"""The tensor axis: from a model and a layout to pieces and changed forwards.

Called through `axes.py`. It joins its rooms in order: rules, pieces, forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.config import LayoutConfig
from sixfold.mesh import Mesh
from sixfold.parallel.change import AxisChange, Case, Note, Remove
from sixfold.parallel.facts import block_names
from sixfold.parallel.pipe.cut import ModelCut
from sixfold.parallel.tensor.crossing import COPIED, IN_SEQUENCE, SUMMED, Crossing, offered
from sixfold.parallel.tensor.cut import AXIS, Layer, TensorCut, decide_tensor, in_lists, in_sequence
from sixfold.parallel.tensor.forwards import TensorForwards
from sixfold.parallel.tensor.rules import find_rules


def decide_tensor_axis(case: Case) -> AxisChange:
    """See `Decide`."""
    model, layout, geometry, owns_loss = case.model, case.layout, case.geometry, case.owns_loss
    runs = _runs(model, layout) if layout.sequence_parallel else []
    rules = find_rules(model, layout)
    cut = decide_tensor(model, rules, geometry.degree(AXIS), geometry.coordinate(case.rank, AXIS))
    cut = in_sequence(cut, model, [name for run in runs for name in run])

    def apply(mesh: Mesh) -> Remove:
        forwards = TensorForwards(model, cut, mesh.along(AXIS), runs, owns_loss=owns_loss, device=mesh.device)
        return forwards.remove

    def trace(note: Note) -> Remove:
        blocks = {name for run in runs for name in run}
        return _traced(model, cut, blocks, geometry.degree("context"), owns_loss, note)

    cuts = {
        name: case.places[name].and_also(place) for name, place in cut.places.items() if name in case.places
    }
    agreed = "\n".join(f"{pattern} = {style}" for pattern, style in sorted(rules.styles.items()))
    return AxisChange({**cut.places, **cuts}, apply, agreed=agreed, trace=trace)


def _traced(
    model: nn.Module, cut: TensorCut, blocks: set[str], share: int, owns_loss: bool, note: Note
) -> Remove:
    """See `AxisChange.trace`: what crosses the borders of layers.

    Args:
        share: ranks that divide the tokens.
    """

    def note_crossing(crossing: Crossing | None, tensor: Tensor) -> None:
        num_bytes = -(-tensor.nbytes // share)
        for operation in (crossing.there, crossing.back) if crossing is not None else ():
            for kind, part in offered(operation, num_bytes, cut.num_ranks).items():
                note(kind, part)

    def noting(layer: Layer) -> Callable[..., None]:
        around, role = [layer.style.entering, layer.style.leaving], layer.style.role
        if role == "experts":
            around = [COPIED, SUMMED]
        if any(layer.name.startswith(block + ".") for block in blocks):
            around = [crossing and IN_SEQUENCE.get(crossing, crossing) for crossing in around]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            given = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            note_crossing(around[0], given)
            note_crossing(None if role == "scores" and owns_loss else around[1], output)
            if role == "vocabulary":  # of each token the loss tells three numbers
                note("slices", 3 * -(-given.numel() // share) * max(4, output.itemsize))

        return hook

    undo, parts = ExitStack(), dict(model.named_modules())
    for layer in cut.layers:
        if layer.name in parts:
            undo.callback(parts[layer.name].register_forward_hook(noting(layer), with_kwargs=True).remove)
    return undo.close


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
