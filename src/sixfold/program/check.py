"""Check programs without any device: balance, order, and that all ranks reach their end.

Called by the plan before a program is played and by tests over every schedule. It reads instructions
only; whether the numbers come out right is for the parity tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from textwrap import shorten

from sixfold.base.errors import ProgramError
from sixfold.program.instructions import (
    INPUT_PARTS,
    PASSES,
    SERVES,
    WEIGHT_PARTS,
    Instruction,
    Op,
    Program,
)
from sixfold.program.order import Wiring, global_order

_REPEATED = (Op.REDUCE, Op.GATHER, Op.DROP, Op.SHIFT_IN, Op.SHIFT_OUT)
"""What one program may hold several times; the windows they open and close are checked instead."""


@lru_cache(maxsize=256)
def check(programs: Program | tuple[Program, ...]) -> None:
    """Raise ProgramError unless `programs` can be played.

    Args:
        programs: those of all ranks of a pipeline, in order; one alone is a pipeline of one rank.

    Together: stages are numbered from 0, each on one rank, and each runs every micro-batch, numbered from
    0, forward, and backward either whole or in its two parts (or all forward only), or serves both. What
    passes between ranks is sent and received once, in one order on both, and all ranks reach their end
    even if every send blocks until its receive.

    Each: no pass, transfer, step or publish stands twice. A program with `step` makes an update, and then all
    do: every forward has its backward before it; every stage opens a reduction window, with at most one
    weight part of its own in each; after `step` comes nothing but one `publish` for each stage and
    shifts. A program without `step` publishes nothing. Where a stage is gathered, its passes stand
    inside its windows, and `step` outside; where it is shifted, windows and the update stand where it
    is in.
    """
    together = (programs,) if isinstance(programs, Program) else programs
    for problem, fix in _problems(together):
        shown = "\n".join(
            f"rank {rank}: {shorten(str(each), 400, placeholder=' ...')}"
            for rank, each in enumerate(together)
        )
        raise ProgramError(
            f"{problem} in:\n{shown}",
            rule="a step is balanced and in order",
            fix=fix,
        )


def _problems(programs: tuple[Program, ...]) -> Iterator[tuple[str, str]]:
    wiring = Wiring(programs)
    yield from _stage_problems(programs)
    yield from _balance_problems(wiring)
    for program in programs:
        yield from _update_problems(program)
        yield from _reduction_problems(program)
        yield from _window_problems(program, Op.GATHER, Op.DROP, (*PASSES, *SERVES))
        inside = (Op.GATHER, Op.DROP, Op.STEP, Op.PUBLISH)
        yield from _window_problems(program, Op.SHIFT_IN, Op.SHIFT_OUT, inside)
    for _ in global_order(wiring):
        pass


def _stage_problems(programs: tuple[Program, ...]) -> Iterator[tuple[str, str]]:
    owners: dict[int, int] = {}
    for rank, program in enumerate(programs):
        for each in program.instructions:
            if each.stage is not None and owners.setdefault(each.stage, rank) != rank:
                yield f"{each} on rank {rank}, whose stage is rank {owners[each.stage]}'s", "move it there"
    if sorted(owners) != list(range(len(owners))):
        yield f"stages {sorted(owners)}", "number stages from 0, without a gap"
    num_steps = sum(Instruction(Op.STEP) in program.instructions for program in programs)
    if num_steps not in (0, len(programs)):
        yield f"step on {num_steps} of {len(programs)} ranks", "end every rank's program with step, or none"


def _balance_problems(wiring: Wiring) -> Iterator[tuple[str, str]]:
    """Every pass and every transfer once, and none that nobody asked for."""
    for program in wiring.programs:
        for each, number in Counter(program.instructions).items():
            if number > 1 and each.op not in _REPEATED:
                yield f"{each} stands {number} times", "keep one of them"
    given = {each for program in wiring.programs for each in program.instructions}
    num_micro = 1 + max((each.micro for each in given if each.micro is not None), default=-1)
    learns = any(each.op in (*INPUT_PARTS, Op.BACKWARD_WEIGHT, Op.SERVE_BACKWARD) for each in given)
    learns |= Instruction(Op.STEP) in given
    for stage in wiring.ranks:
        for micro in range(num_micro):
            expected = _expected(wiring, stage, micro, learns, given)
            for each in sorted(expected - given, key=str):
                yield f"stage {stage}, micro-batch {micro} without {each}", f"add {each}"
            given -= expected
    for each in sorted((each for each in given if each.micro is not None), key=str):
        yield f"{each}, which nothing asks for", "leave it out"


def _expected(
    wiring: Wiring, stage: int, micro: int, learns: bool, given: set[Instruction]
) -> set[Instruction]:
    if any(Instruction(op, stage, micro) in given for op in SERVES):
        return {Instruction(op, stage, micro) for op in (SERVES if learns else SERVES[:1])}
    ops = [Op.FORWARD]
    before, after = (
        near in wiring.ranks and not wiring.is_local(stage, near) for near in (stage - 1, stage + 1)
    )
    ops += [Op.RECEIVE_ACTIVATION] * before + [Op.SEND_ACTIVATION] * after
    if learns:
        parts = [Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT]
        is_split = any(Instruction(op, stage, micro) in given for op in parts)
        ops += parts if is_split else [Op.BACKWARD]
        ops += [Op.SEND_GRADIENT] * before + [Op.RECEIVE_GRADIENT] * after
    return {Instruction(op, stage, micro) for op in ops}


def _update_problems(program: Program) -> Iterator[tuple[str, str]]:
    place = {each: index for index, each in enumerate(program.instructions)}
    end = place.get(Instruction(Op.STEP))
    for instruction, index in place.items():
        if instruction.op is Op.PUBLISH and (end is None or index < end):
            yield f"{instruction} without step before it", "publish after step"
        if end is not None and index > end and instruction.op not in (Op.PUBLISH, Op.SHIFT_OUT):
            yield f"{instruction} after step", "let nothing but publish and shift-out follow step"
    if end is not None:
        for stage in sorted({each.stage for each in place if each.stage is not None}):
            for op in (Op.REDUCE, Op.PUBLISH):
                if Instruction(op, stage) not in place:
                    yield f"stage {stage} without {op.value} {stage}", f"add {op.value} {stage}"


def _reduction_problems(program: Program) -> Iterator[tuple[str, str]]:
    parts: dict[int | None, int] = {}  # weight parts in the open window of each stage
    for instruction in program.instructions:
        stage = instruction.stage
        if instruction.op is Op.REDUCE:
            parts[stage] = 0
        if instruction.op in WEIGHT_PARTS and stage in parts:
            parts[stage] += 1
            if parts[stage] == 2:
                yield (
                    f"reduce {stage} before 2 or more weight parts of its stage",
                    "open a window before the last one, or before every later one as well",
                )


def _window_problems(
    program: Program, opening: Op, closing: Op, inside: tuple[Op, ...]
) -> Iterator[tuple[str, str]]:
    """Windows of one kind open and close in turn, with `inside` between, for the stages that have any."""
    is_open = {each.stage: False for each in program.instructions if each.op in (opening, closing)}
    for each in program.instructions:
        if each.op in (opening, closing):
            if is_open[each.stage] is (each.op is opening):
                yield (
                    f"{each} where that is so already",
                    f"let {opening.value}, {closing.value} take turns",
                )
            is_open[each.stage] = each.op is opening
        elif each.op in inside:
            concerned = is_open if each.stage is None else is_open.keys() & {each.stage}
            if not all(is_open[stage] for stage in concerned):
                yield f"{each} outside {opening.value} and {closing.value}", f"put {opening.value} before it"
    for stage, still in is_open.items():
        if still:
            yield f"{opening.value} {stage} without {closing.value} {stage}", f"add {closing.value} {stage}"
