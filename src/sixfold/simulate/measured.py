"""Costs from recorded steps: what the simulator needs to say what another schedule would take, or the same.

Called by reports and benchmarks. It takes medians of what was measured and estimates nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from sixfold.program import RECEIVES, SENDS, Instruction, Op, Program, add_transfers
from sixfold.simulate.clock import simulate
from sixfold.simulate.costs import Costs, StageCosts
from sixfold.simulate.timeline import Timeline


def measured_costs(steps: Sequence[Timeline], *, latency: float = 0.0) -> Costs:
    """Costs of the stages in recorded steps, each the median over steps and micro-batches.

    In `step` ranks wait for each other, and only the last one's seconds are its cost: of each recorded step
    the least of all ranks'.

    A recorded send is the time in which it was handed over, and a recorded receive that in which it was asked
    for; what they were waited for is in no figure.

    A backward that was not split counts as its input part. Reductions are left out: what is left of them
    when the last backward is over is in the seconds of `step`.

    Args:
        latency: seconds of a transfer between ranks, which a recording does not tell from waiting.
    """
    seconds: dict[tuple[Op, int | None], list[float]] = defaultdict(list)
    for timeline in steps:
        updates: list[float] = []
        for event in timeline.events:
            op, stage = event.instruction.op, event.instruction.stage
            kind = next((kinds[0] for kinds in (SENDS, RECEIVES) if op in kinds), op)
            (updates if op is Op.STEP else seconds[kind, stage]).append(event.stop - event.start)
        if updates:
            seconds[Op.STEP, None].append(min(updates))

    def cost(op: Op, stage: int | None) -> float:
        return median(seconds[op, stage]) if (op, stage) in seconds else 0.0

    num_stages = 1 + max((stage for _, stage in seconds if stage is not None), default=-1)
    stages = tuple(
        StageCosts(
            forward=cost(Op.FORWARD, stage),
            backward_input=cost(Op.BACKWARD, stage) or cost(Op.BACKWARD_INPUT, stage),
            backward_weight=cost(Op.BACKWARD_WEIGHT, stage),
            publish=cost(Op.PUBLISH, stage),
            send=cost(SENDS[0], stage),
            receive=cost(RECEIVES[0], stage),
        )
        for stage in range(num_stages)
    )
    return Costs(stages, step=cost(Op.STEP, None), latency=latency)


def simulated_again(step: Timeline) -> Timeline:
    """A recorded step as the simulator plays it, at the median costs of its own passes: what the schedule
    comes to where passes of a stage take equally long and nothing is waited for but them.

    Args:
        step: of all ranks of a pipeline, each one's events in the order of its program.
    """
    # A player may have posted receives earlier than the schedule has them.
    played = [
        [each.instruction for each in step.events if each.rank == rank and not _is_transfer(each.instruction)]
        for rank in range(step.num_ranks)
    ]
    ends = [len(each) if _STEP not in each else each.index(_STEP) for each in played]
    passes = (Program(tuple(each[:end])) for each, end in zip(played, ends, strict=True))
    programs = (
        Program((*program.instructions, *each[end:]))
        for program, each, end in zip(add_transfers(tuple(passes)), played, ends, strict=True)
    )
    return simulate(tuple(programs), measured_costs([step]))


_STEP = Instruction(Op.STEP)


def _is_transfer(instruction: Instruction) -> bool:
    return instruction.op in (*SENDS, *RECEIVES)
