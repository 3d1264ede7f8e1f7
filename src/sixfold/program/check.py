"""Check a program without any device: balance and order.

Called by tests over every schedule and by the player before the first step of a new shape. It
reads instructions only; whether the numbers come out right is for the parity tests.
"""

from __future__ import annotations

from sixfold.base.errors import ProgramError
from sixfold.program.instructions import Instruction, Op, Program


def check(program: Program) -> None:
    """Raise ProgramError unless `program` is a step that can be played.

    A training step has one `step`; before it every forward is followed by its backward, exactly
    once each, and every stage's reduction window opens exactly once, not before the second-last
    backward has ended; after it each of those stages is published once. A program without
    backward is an evaluation and holds forwards only.
    """
    ops = {instruction.op for instruction in program.instructions}
    if ops <= {Op.FORWARD}:
        _unique(program, Op.FORWARD)
        return
    for op in Op:
        _unique(program, op)
    position = {instruction: index for index, instruction in enumerate(program.instructions)}
    end = position.get(Instruction(Op.STEP))
    if end is None:
        raise _broken(program, "no step", "end the program with step and publish")
    stages = {instruction.stage for instruction in program.instructions if instruction.op is Op.REDUCE}
    for instruction, index in position.items():
        _check_place(program, instruction, index, position, end)
        if instruction.stage is not None and instruction.stage not in stages:
            raise _broken(program, f"stage {instruction.stage} is never reduced", "add its reduce")
    for stage in sorted(stage for stage in stages if stage is not None):
        if Instruction(Op.PUBLISH, stage) not in position:
            raise _broken(program, f"stage {stage} is never published", f"add publish {stage} after step")
        last = max(_backwards(program, stage), default=-1)
        opened = position[Instruction(Op.REDUCE, stage)]
        if sum(index > opened for index in _backwards(program, stage)) > 1:
            raise _broken(
                program,
                f"reduce {stage} at place {opened} opens before more than one backward (last at {last})",
                "open the window before the last backward only, or gradients are reduced incomplete",
            )


def _check_place(
    program: Program, instruction: Instruction, index: int, position: dict[Instruction, int], end: int
) -> None:
    twin = {Op.FORWARD: Op.BACKWARD, Op.BACKWARD: Op.FORWARD}.get(instruction.op)
    if twin is not None:
        other = position.get(Instruction(twin, instruction.stage, instruction.micro))
        if other is None:
            raise _broken(program, f"{instruction} has no {twin.value}", f"add its {twin.value}")
        if instruction.op is Op.FORWARD and other < index:
            raise _broken(program, f"backward before {instruction}", "put the forward first")
    if (index > end) != (instruction.op is Op.PUBLISH) and instruction.op is not Op.STEP:
        raise _broken(program, f"{instruction} on the wrong side of step", "only publish follows step")


def _backwards(program: Program, stage: int) -> list[int]:
    return [
        index
        for index, instruction in enumerate(program.instructions)
        if instruction.op is Op.BACKWARD and instruction.stage == stage
    ]


def _unique(program: Program, op: Op) -> None:
    seen: set[Instruction] = set()
    for instruction in program.instructions:
        if instruction.op is op and instruction in seen:
            raise _broken(program, f"{instruction} stands twice", "keep one of them")
        seen.add(instruction)


def _broken(program: Program, what: str, fix: str) -> ProgramError:
    return ProgramError(f"{what} in: {program}", rule="a step is balanced and in order", fix=fix)
