"""Schedules: which rank runs which pass when, written from a handful of numbers.

A schedule is data: where stages stand, and per rank the order of forwards and of backwards, how many
forwards come first, and how long weight parts are put off. One function merges these into passes, the
lowering passes add the rest. Called by the plan for the layout at hand; nothing is played here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest

from sixfold.base.errors import ProgramError
from sixfold.program.instructions import Instruction, Op, Program
from sixfold.program.lowering import (
    add_reductions,
    add_shifts,
    add_transfers,
    add_update,
    add_windows,
    only_forwards,
    serve_rest,
)


@dataclass(frozen=True)
class Order:
    """What one rank does when, before anything is sent.

    Args:
        forwards: stages in order; each one's micro-batches come in their own order. None leaves a turn out.
        backwards: likewise.
        num_warm: forwards before forwards and backwards take turns.
        queued: weight parts that wait while forwards remain; None: backwards are not split.
        queued_at_end: weight parts that wait after the last forward.
    """

    forwards: Sequence[int | None]
    backwards: Sequence[int | None]
    num_warm: int
    queued: int | None = None
    queued_at_end: int = 0


@dataclass(frozen=True)
class Schedule:
    """One kind of schedule.

    Args:
        order: writes a rank's order from its number, the number of ranks, its stages, and the number of
            micro-batches.
        num_virtual: stages on each rank; None: as many as are asked for.
        place: stages of a rank, from its number, the number of ranks and of stages on each.
    """

    order: Callable[[int, int, Sequence[int], int], Order]
    num_virtual: int | None = None
    place: Callable[[int, int, int], tuple[int, ...]] = lambda rank, num_ranks, num_virtual: tuple(
        range(rank, num_ranks * num_virtual, num_ranks)
    )


def _breadth_first(rank: int, num_ranks: int, stages: Sequence[int], num_micro: int) -> Order:
    forwards = [stage for stage in stages for _ in range(num_micro)]
    return Order(forwards, forwards[::-1], num_warm=len(forwards))


def _in_turn(depth: int, *, splits: bool) -> Callable[[int, int, Sequence[int], int], Order]:
    """One stage on each rank, and `depth` forwards more at the start than the rank behind has."""

    def order(rank: int, num_ranks: int, stages: Sequence[int], num_micro: int) -> Order:
        same = list(stages) * num_micro
        queued = depth * rank
        return Order(same, same, depth * (num_ranks - rank - 1), queued if splits else None, queued)

    return order


def _interleaved(rank: int, num_ranks: int, stages: Sequence[int], num_micro: int) -> Order:
    # Micro-batches go in rounds of nearly equal size, at least one for each rank where there are enough:
    # a smaller round would come back to its first stage before that rank is done with it.
    num_rounds = max(1, num_micro // num_ranks)
    rounds = [num_micro // num_rounds + (number < num_micro % num_rounds) for number in range(num_rounds)]
    forwards = [stage for size in rounds for stage in stages for _ in range(size)]
    backwards = [stage for size in rounds for stage in reversed(stages) for _ in range(size)]
    return Order(forwards, backwards, 2 * (num_ranks - rank - 1) + (len(stages) - 1) * rounds[0])


def _zigzag(rank: int, num_ranks: int, stages: Sequence[int], num_micro: int) -> Order:
    down, up = stages
    # Until the first micro-batch is back, then both stages in turn.
    warm = [down] * (2 * (num_ranks - rank) - 1) + [up, down] * rank
    turns = [up] * (num_ranks - rank) + [down, up] * num_micro
    forwards, backwards = _at_most(num_micro, warm + turns), _at_most(num_micro, turns)
    return Order(forwards, backwards, len(warm), queued=0, queued_at_end=2 * rank)


def _at_most(num: int, stages: Iterable[int]) -> list[int | None]:
    """`stages` with None for those that have come `num` times already."""
    seen = Counter[int]()
    kept: list[int | None] = []
    for stage in stages:
        seen[stage] += 1
        kept.append(stage if seen[stage] <= num else None)
    return kept


def _both_ways(rank: int, num_ranks: int, num_virtual: int) -> tuple[int, ...]:
    return rank, 2 * num_ranks - 1 - rank


SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": Schedule(_breadth_first, num_virtual=1),
    "1f1b": Schedule(_in_turn(1, splits=False), num_virtual=1),
    "interleaved": Schedule(_interleaved),
    "breadth-first": Schedule(_breadth_first),
    "zero-bubble-h1": Schedule(_in_turn(1, splits=True), num_virtual=1),
    "zero-bubble-h2": Schedule(_in_turn(2, splits=True), num_virtual=1),
    "zero-bubble-v": Schedule(_zigzag, num_virtual=2, place=_both_ways),
}
"""By name; `docs/schedules.md` draws each one and names its source."""


def splits_backward(schedule: str) -> bool:
    """Whether a schedule puts off weight parts of backwards."""
    stages, *_ = stages_of(schedule, 2)
    return SCHEDULES[schedule].order(0, 2, stages, 1).queued is not None


def stages_of(schedule: str, num_ranks: int, num_virtual: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Stages of each rank, in the order in which a micro-batch passes them.

    Args:
        num_virtual: stages on each rank; None: the schedule's own number, else 1.

    Raises:
        ProgramError: no such schedule, or not with these numbers.
    """
    kind = SCHEDULES.get(schedule)
    if kind is None:
        raise ProgramError(
            f"schedule {schedule!r}",
            rule=f"a schedule is one of {', '.join(SCHEDULES)}",
            fix="take one of these",
        )
    if num_virtual is None:
        num_virtual = kind.num_virtual or 1
    if num_ranks < 1 or num_virtual < 1:
        raise ProgramError(
            f"{num_ranks} ranks with {num_virtual} stages each",
            rule="a pipeline has at least one rank, and a stage on each",
            fix="give positive numbers",
        )
    if kind.num_virtual not in (None, num_virtual):
        raise ProgramError(
            f"schedule {schedule!r} with {num_virtual} stages on each rank",
            rule=f"{schedule} has {kind.num_virtual} stage(s) on each rank",
            fix="leave the number of stages out, or choose 'interleaved' or 'breadth-first'",
        )
    return tuple(kind.place(rank, num_ranks, num_virtual) for rank in range(num_ranks))


def passes(
    schedule: str, num_ranks: int, num_micro: int, num_virtual: int | None = None
) -> tuple[Program, ...]:
    """Forwards and backwards of every rank in the schedule's order, and nothing else."""
    if num_micro < 0:
        raise ProgramError(
            f"{num_micro} micro-batches", rule="a count is not negative", fix="give 0 or more micro-batches"
        )
    placed = stages_of(schedule, num_ranks, num_virtual)
    order = SCHEDULES[schedule].order
    return tuple(_merge(order(rank, num_ranks, own, num_micro)) for rank, own in enumerate(placed))


def _merge(order: Order) -> Program:
    """Forwards first, then a forward and a backward in turn; weight parts follow at their distance."""
    written: list[Instruction] = []
    numbers = Counter[tuple[Op, int]]()
    queue: list[int] = []

    def write(op: Op, stage: int) -> None:
        written.append(Instruction(op, stage, numbers[op, stage]))
        numbers[op, stage] += 1

    warm, rest = order.forwards[: order.num_warm], order.forwards[order.num_warm :]
    num_left = sum(stage is not None for stage in order.forwards)
    for forward, backward in chain(((stage, None) for stage in warm), zip_longest(rest, order.backwards)):
        if forward is not None:
            write(Op.FORWARD, forward)
            num_left -= 1
        if backward is not None and order.queued is None:
            write(Op.BACKWARD, backward)
        elif backward is not None:
            write(Op.BACKWARD_INPUT, backward)
            queue.append(backward)
        while len(queue) > ((order.queued or 0) if num_left else order.queued_at_end):
            write(Op.BACKWARD_WEIGHT, queue.pop(0))
    for stage in queue:
        write(Op.BACKWARD_WEIGHT, stage)
    return Program(tuple(written))


@lru_cache(maxsize=256)
def training(
    schedule: str,
    num_ranks: int,
    num_micro: int,
    num_virtual: int | None = None,
    *,
    num_served: int = 0,
    num_reduces: int = 1,
    longest_window: int | None = 0,
    ahead: int = 0,
    shifts: bool = False,
    updates: bool = True,
) -> tuple[Program, ...]:
    """One update on every rank of a pipeline.

    Args:
        schedule: a name of `SCHEDULES`.
        num_ranks: of the pipeline.
        num_micro: micro-batches of this update; 0 is legal (an empty share still takes part in the
            reduction and the update).
        num_virtual: stages on each rank; None: the schedule's own number, else 1.
        num_served: further micro-batches that only other data ranks have and these ranks take part in.
        num_reduces: reduction windows of each stage, equally many on every data rank: 1 where gradients
            are whole, the longest share's number of micro-batches where they are cut.
        longest_window: passes for which gathered parameters are kept at most; 0 where they are whole, None
            for as many as follow each other in one stage.
        ahead: passes before its first at which such a window opens.
        shifts: whether a stage's state is at home, host or disk, while it is not used.
        updates: whether the update follows; without it nothing but gradients changes.

    Returns:
        One program for each rank, in order.
    """
    placed = stages_of(schedule, num_ranks, num_virtual)
    connected = add_transfers(passes(schedule, num_ranks, num_micro + num_served, num_virtual))
    programs = []
    for program, stages in zip(connected, placed, strict=True):
        if longest_window != 0:
            program = add_windows(program, longest_window, ahead)
        program = add_reductions(program, stages, num_reduces)
        if updates:
            program = add_update(program, stages)
        if shifts:
            program = add_shifts(program, stages)
        programs.append(serve_rest(program, num_micro))
    return tuple(programs)


@lru_cache(maxsize=256)
def evaluation(
    schedule: str,
    num_ranks: int,
    num_micro: int,
    num_virtual: int | None = None,
    *,
    num_served: int = 0,
    longest_window: int | None = 0,
    ahead: int = 0,
) -> tuple[Program, ...]:
    """The forwards alone, on every rank of the pipeline that `training` uses; arguments as there."""
    total = num_micro + num_served
    programs = add_transfers(
        tuple(only_forwards(each) for each in passes(schedule, num_ranks, total, num_virtual))
    )
    if longest_window != 0:
        programs = tuple(add_windows(each, longest_window, ahead) for each in programs)
    return tuple(serve_rest(each, num_micro) for each in programs)
