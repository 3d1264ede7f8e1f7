"""How much a program holds at once, in counts: what it costs in bytes is for `simulate` and the planner.

Called by tests and by whoever prices activations. It reads one rank's program in its order; nothing is
played and no time passes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sixfold.program.instructions import INPUT_PARTS, WEIGHT_PARTS, Op, Program


@dataclass(frozen=True)
class Peak:
    """The most that one stage holds at once, in micro-batches.

    Args:
        activations: forwards whose backward (or its input part) is still to come.
        queued: input parts whose weight part is still to come.
        together: both at one time.
    """

    activations: int
    queued: int
    together: int


def peaks(program: Program) -> dict[int, Peak]:
    """The peak of each stage of `program`, which trains.

    Returns:
        By stage; those without a forward are left out.
    """
    activations, queued = Counter[int](), Counter[int]()
    most: dict[int, Peak] = {}
    for each in program.instructions:
        stage = each.stage
        if stage is None or each.micro is None:
            continue
        activations[stage] += (each.op is Op.FORWARD) - (each.op in INPUT_PARTS)
        queued[stage] += (each.op in INPUT_PARTS) - (each.op in WEIGHT_PARTS)
        before = most.get(stage, Peak(0, 0, 0))
        most[stage] = Peak(
            max(before.activations, activations[stage]),
            max(before.queued, queued[stage]),
            max(before.together, activations[stage] + queued[stage]),
        )
    return most
