"""Lowering: from passes in order to whole programs, one concern at a time.

Each pass is a pure function that adds one kind of instruction and moves none that is there: transfers
(which need all ranks' programs), residency windows, reductions, the update, shifts. Called by the
schedules; nothing here knows a schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sixfold.program.instructions import (
    INPUT_PARTS,
    PASSES,
    RECEIVES,
    WEIGHT_PARTS,
    Instruction,
    Op,
    Program,
)
from sixfold.program.order import Wiring, global_order, results


def only_forwards(program: Program) -> Program:
    """Evaluation: the forwards of `program` in their order."""
    return Program(tuple(each for each in program.instructions if each.op is Op.FORWARD))


def add_transfers(programs: tuple[Program, ...]) -> tuple[Program, ...]:
    """Send what the next pass needs to the rank that has it.

    All programs are played on one clock (a whole backward takes two ticks, other passes one), and each
    transfer is put at the tick where what it carries is ready, on both ranks. All programs are then
    parts of one order of everything, so no way of blocking can lock them up.

    Args:
        programs: all ranks' passes.
    """
    wiring = Wiring(programs, is_connected=False)
    starts: dict[Instruction, int] = {}
    stops: dict[Instruction, int] = {}
    free = [0] * len(programs)
    transfers: list[list[tuple[int, Instruction]]] = [[] for _ in programs]
    for rank, each in global_order(wiring):
        if each.op not in PASSES:
            continue
        starts[each] = max([free[rank], *(stops[needed] for needed in wiring.needs(each))])
        free[rank] = starts[each] + (2 if each.op is Op.BACKWARD else 1)
        stops.update(dict.fromkeys(results(each), free[rank]))
        send = _send_after(each)
        partner = send.partner if send else None
        if send is None or partner is None or partner.stage not in wiring.ranks:
            continue
        other = wiring.ranks[partner.stage]
        if other != rank:
            transfers[rank].append((free[rank], send))
            transfers[other].append((free[rank], partner))
    return tuple(_merged(*pair, starts) for pair in zip(programs, transfers, strict=True))


def _send_after(instruction: Instruction) -> Instruction | None:
    """The transfer that takes on what this pass makes; None after a weight part and at the first stage."""
    if instruction.op is Op.FORWARD:
        return Instruction(Op.SEND_ACTIVATION, instruction.stage, instruction.micro)
    if instruction.op in INPUT_PARTS and instruction.stage:
        return Instruction(Op.SEND_GRADIENT, instruction.stage, instruction.micro)
    return None


def _merged(
    program: Program, transfers: list[tuple[int, Instruction]], starts: dict[Instruction, int]
) -> Program:
    # Both ends sort by the same key, so that transfers of one tick meet in one order.
    waiting = sorted(transfers, key=_moment, reverse=True)
    merged: list[Instruction] = []
    for each in program.instructions:
        while waiting and each in starts and waiting[-1][0] <= starts[each]:
            merged.append(waiting.pop()[1])
        merged.append(each)
    return Program((*merged, *(transfer for _, transfer in reversed(waiting))))


def _moment(transfer: tuple[int, Instruction]) -> tuple[int, int, int]:
    tick, instruction = transfer
    ends = (instruction, instruction.partner)
    stages = [each.stage for each in ends if each is not None and each.stage is not None]
    return tick, min(stages), instruction.micro or 0


def add_windows(program: Program, longest: int | None = None, ahead: int = 0) -> Program:
    """Put `gather` before and `drop` after the passes that a gathered copy serves.

    Args:
        longest: passes in one window at most; None: as many as follow each other in one stage.
        ahead: passes before its first at which a window opens, so that gathering runs under them.
    """
    places = [place for place, each in enumerate(program.instructions) if each.op in PASSES]
    windows: list[tuple[int, int, int | None]] = []  # first and last pass, stage
    for number, place in enumerate(places):
        stage = program.instructions[place].stage
        first, _, last_stage = windows[-1] if windows else (0, 0, None)
        if windows and stage == last_stage and (longest is None or number - first < longest):
            windows[-1] = (first, number, stage)
        else:
            windows.append((number, number, stage))
    before, after = defaultdict(list), defaultdict(list)
    closed: dict[int | None, int] = {}
    for first, last, stage in windows:
        before[places[max(first - ahead, closed.get(stage, 0))]].append(Instruction(Op.GATHER, stage))
        after[places[last]].append(Instruction(Op.DROP, stage))
        closed[stage] = last + 1
    return _woven(program, before, after)


def add_reductions(program: Program, stages: Sequence[int], num_reduces: int = 1) -> Program:
    """Open a reduction window before each of the last weight parts of every stage.

    Args:
        stages: of this rank; one without a pass is reduced too, after all passes.
        num_reduces: windows of each stage; those that it has no weight part for come last.
    """
    before = defaultdict(list)
    missing = dict.fromkeys(sorted(stages, reverse=True), num_reduces)
    for place in reversed(range(len(program))):
        each = program.instructions[place]
        if each.op in WEIGHT_PARTS and each.stage is not None and missing[each.stage]:
            missing[each.stage] -= 1
            before[place].append(Instruction(Op.REDUCE, each.stage))
    rest = [Instruction(Op.REDUCE, stage) for stage, number in missing.items() for _ in range(number)]
    return Program((*_woven(program, before, {}).instructions, *rest))


def add_update(program: Program, stages: Iterable[int]) -> Program:
    """End with `step`, and `publish` for each of this rank's stages."""
    publishes = [Instruction(Op.PUBLISH, stage) for stage in sorted(stages)]
    return Program((*program.instructions, Instruction(Op.STEP), *publishes))


def add_shifts(program: Program, stages: Iterable[int]) -> Program:
    """Have a stage's state on the device inside its residency windows and for the update, else at home."""
    before, after = defaultdict(list), defaultdict(list)
    for place, each in enumerate(program.instructions):
        if each.op is Op.GATHER:
            before[place].append(Instruction(Op.SHIFT_IN, each.stage))
        if each.op is Op.STEP:
            before[place] += [Instruction(Op.SHIFT_IN, stage) for stage in sorted(stages)]
        if each.op in (Op.DROP, Op.PUBLISH):
            after[place].append(Instruction(Op.SHIFT_OUT, each.stage))
    return _woven(program, before, after)


def serve_rest(program: Program, num_own: int) -> Program:
    """Have only the first micro-batches, and take part in what other ranks do with the rest.

    Each pass becomes its service; weight parts that were put off and transfers of the rest go, and what opens
    and closes windows stays, so that ranks with other numbers of micro-batches gather and reduce in one
    order.

    Args:
        num_own: micro-batches of this rank.
    """
    served: list[Instruction] = []
    for each in program.instructions:
        if each.micro is None or each.micro < num_own:
            served.append(each)
        elif each.op is Op.FORWARD:
            served.append(Instruction(Op.SERVE_FORWARD, each.stage, each.micro))
        elif each.op in INPUT_PARTS:
            served.append(Instruction(Op.SERVE_BACKWARD, each.stage, each.micro))
    return Program(tuple(served))


def post_ahead(program: Program) -> Program:
    """Receives one pass earlier, as a player posts them that does not block there: what is received then
    comes in beside that pass. For links whose directions are independent: where the transfers of a pair run
    in one order, a receive that has moved past a send waits for ever.

    Their order stays, a gradient's receive comes after its forward, and nothing between a reduction and its
    weight part.
    """
    ahead: list[Instruction] = []
    place = 0  # behind the last receive, or before the last pass
    for each in program.instructions:
        if each.op in RECEIVES:
            own_forward = Instruction(Op.FORWARD, each.stage, each.micro)
            if each.op is Op.RECEIVE_GRADIENT and own_forward in ahead[place:]:
                place = len(ahead)
            ahead.insert(place, each)
            place += 1
            continue
        ahead.append(each)
        if each.op in PASSES:
            place = len(ahead) - 1
            while place and ahead[place - 1].op is Op.REDUCE:
                place -= 1
    return Program(tuple(ahead))


def _woven(
    program: Program, before: dict[int, list[Instruction]], after: dict[int, list[Instruction]]
) -> Program:
    """`program` with instructions added at places of it."""
    woven: list[Instruction] = []
    for place, each in enumerate(program.instructions):
        woven += [*before.get(place, ()), each, *after.get(place, ())]
    return Program(tuple(woven))
