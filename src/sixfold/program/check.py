"""Check a program without any device: balance and order.

Called by the engine before a program is played and by tests over every schedule. It reads instructions
only; whether the numbers come out right is for the parity tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from sixfold.base.errors import ProgramError
from sixfold.program.instructions import Instruction, Op, Program

_FORWARD_OF = {Op.BACKWARD: Op.FORWARD, Op.SERVE_BACKWARD: Op.SERVE_FORWARD}
_BACKWARD_OF = {forward: backward for backward, forward in _FORWARD_OF.items()}


@lru_cache(maxsize=256)
def check(program: Program) -> None:
    """Raise ProgramError unless `program` can be played.

    No instruction but `reduce` stands twice. Every backward follows its forward, run or served alike.
    A program with `step` makes an update: every forward has its backward before it; every stage opens a
    reduction window, with
    at most one backward of its own in each; after `step` comes nothing but one `publish` for
    each stage. A program without `step` publishes nothing.
    """
    for problem, fix in _problems(program):
        raise ProgramError(f"{problem} in: {program}", rule="a step is balanced and in order", fix=fix)


def _problems(program: Program) -> Iterator[tuple[str, str]]:
    place: dict[Instruction, int] = {}
    for index, instruction in enumerate(program.instructions):
        if instruction in place and instruction.op is not Op.REDUCE:
            yield f"{instruction} stands twice", "keep one of them"
        place[instruction] = index
    end = place.get(Instruction(Op.STEP))
    for instruction, index in place.items():
        if instruction.op in _FORWARD_OF:
            forward = Instruction(_FORWARD_OF[instruction.op], instruction.stage, instruction.micro)
            if place.get(forward, len(place)) > index:
                yield f"{instruction} without {forward} before it", "put the forward first"
        if instruction.op is Op.PUBLISH and (end is None or index < end):
            yield f"{instruction} without step before it", "publish after step"
        if end is not None and index > end and instruction.op is not Op.PUBLISH:
            yield f"{instruction} after step", "let nothing but publish follow step"
    if end is not None:
        yield from _update_problems(place)
        yield from _window_problems(program)


def _update_problems(place: dict[Instruction, int]) -> Iterator[tuple[str, str]]:
    stages = sorted({instruction.stage for instruction in place if instruction.stage is not None})
    for instruction in place:
        if instruction.op in _BACKWARD_OF:
            backward = Instruction(_BACKWARD_OF[instruction.op], instruction.stage, instruction.micro)
            if backward not in place:
                yield f"{instruction} without {backward}", "add the backward"
    for stage in stages:
        for op in (Op.REDUCE, Op.PUBLISH):
            if Instruction(op, stage) not in place:
                yield f"stage {stage} without {op.value} {stage}", f"add {op.value} {stage}"


def _window_problems(program: Program) -> Iterator[tuple[str, str]]:
    backwards: dict[int | None, int] = {}  # in the open window of each stage
    for instruction in program.instructions:
        stage = instruction.stage
        if instruction.op is Op.REDUCE:
            backwards[stage] = 0
        if instruction.op is Op.BACKWARD and stage in backwards:
            backwards[stage] += 1
            if backwards[stage] == 2:
                yield (
                    f"reduce {stage} before 2 or more backwards of its stage",
                    "open a window before the last backward, or before every later one as well",
                )
