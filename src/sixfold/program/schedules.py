"""Schedules: generators of programs.

Each function writes the program of one rank from a handful of numbers; which residency windows it
needs comes in as plain data. Called by `pipeline` before a step; nothing is played here.
"""

from __future__ import annotations

from sixfold.program.instructions import Instruction, Op, Program


def accumulation(num_micro: int, num_reduces: int = 1, num_served: int = 0) -> Program:
    """Gradient accumulation: a pipeline of one stage.

    Args:
        num_micro: micro-batches of this rank in this update; 0 is legal (an empty share still
            takes part in the reduction and the update).
        num_reduces: reduction windows, equally many on every rank.
        num_served: further micro-batches that only other ranks have and this one takes part in.

    A window opens before each of the last backwards, so that communication runs under it; windows that
    this rank has no backward for come last.
    """
    total = num_micro + num_served
    body: list[Instruction] = []
    for micro in range(total):
        is_own = micro < num_micro
        body.append(Instruction(Op.FORWARD if is_own else Op.SERVE_FORWARD, 0, micro))
        if micro >= total - num_reduces:
            body.append(Instruction(Op.REDUCE, 0))
        body.append(Instruction(Op.BACKWARD if is_own else Op.SERVE_BACKWARD, 0, micro))
    body += [Instruction(Op.REDUCE, 0)] * (num_reduces - total)
    return Program((*body, Instruction(Op.STEP), Instruction(Op.PUBLISH, 0)))


def forward_only(num_micro: int, num_served: int = 0) -> Program:
    """Evaluation: the forwards of one stage and nothing else."""
    own = [Instruction(Op.FORWARD, 0, micro) for micro in range(num_micro)]
    served = [Instruction(Op.SERVE_FORWARD, 0, num_micro + micro) for micro in range(num_served)]
    return Program((*own, *served))


def rehearsal(num_micro: int, num_reduces: int = 1, num_served: int = 0) -> Program:
    """`accumulation` without its update: computes and communicates, and leaves the state as it was."""
    update = (Op.STEP, Op.PUBLISH)
    kept = [
        instruction
        for instruction in accumulation(num_micro, num_reduces, num_served).instructions
        if instruction.op not in update
    ]
    return Program(tuple(kept))
