"""The simulator: programs and costs in, a timeline out.

Each rank has lanes that run beside each other. An instruction is issued once the passes before it in its
program are over; it starts when its lane is free and what it needs is there. Called by `sixfold plan`
and by whoever wants to see a schedule; it sends nothing and takes no measured time itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from sixfold.base.errors import ProgramError
from sixfold.program import (
    PASSES,
    RECEIVES,
    SENDS,
    SERVES,
    WEIGHT_PARTS,
    Instruction,
    Op,
    Program,
    Wiring,
    check,
    global_order,
    results,
)
from sixfold.simulate.costs import Costs, StageCosts
from sixfold.simulate.timeline import LANES, Event, Timeline, lane_of

_SECONDS: dict[Op, Callable[[StageCosts], float]] = {
    Op.FORWARD: lambda stage: stage.forward,
    Op.BACKWARD: lambda stage: stage.backward_input + stage.backward_weight,
    Op.BACKWARD_INPUT: lambda stage: stage.backward_input,
    Op.BACKWARD_WEIGHT: lambda stage: stage.backward_weight,
    **dict.fromkeys(SERVES, lambda stage: 0.0),
    Op.GATHER: lambda stage: stage.gather,
    Op.DROP: lambda stage: 0.0,
    Op.PUBLISH: lambda stage: stage.publish,
    Op.SHIFT_IN: lambda stage: stage.shift,
    Op.SHIFT_OUT: lambda stage: stage.shift,
}


def simulate(programs: tuple[Program, ...], costs: Costs) -> Timeline:
    """Play the programs of all ranks of a pipeline on a clock.

    A transfer occupies its lane on both ranks for the same time, one for each kind of transfer. Where things
    overlap, a receive is posted one pass ahead of its place, and handing over and asking take their time
    between passes. A window's first pass waits for its whole gather. A reduction starts when the first of the
    stage's units is complete and ends no earlier than its last unit can be reduced. `step` starts when all
    ranks are at it and have no reduction under way. Sent data and what the collectives need in between are
    not counted as memory; a received activation or gradient is from the start of its transfer.

    Args:
        costs: of as many stages as the programs have.

    Raises:
        ProgramError: the programs cannot be played, or the number of stages is another.
    """
    check(programs)
    clock = _Clock(Wiring(programs), costs)
    if len(costs.stages) != len(clock.wiring.ranks):
        raise ProgramError(
            f"costs of {len(costs.stages)} stages for programs of {len(clock.wiring.ranks)}",
            rule="each stage has its costs",
            fix=f"give costs of {len(clock.wiring.ranks)} stages",
        )
    for rank, instruction in global_order(clock.wiring):
        clock.add(rank, instruction)
    clock.finish()
    peak_bytes = tuple(_peak_bytes(rank, clock, costs) for rank in range(len(programs)))
    return Timeline(tuple(clock.events), peak_bytes)


@dataclass
class _Clock:
    """What has happened so far. Times by rank, by (rank, lane), or by (rank, stage)."""

    wiring: Wiring
    costs: Costs
    events: list[Event] = field(default_factory=list)
    stops: dict[Instruction, float] = field(default_factory=dict)
    lanes: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    issued: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    posted: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """When the last pass started, and with it what is posted a pass ahead."""
    ready: dict[tuple[int, int | None], float] = field(default_factory=lambda: defaultdict(float))
    """When a stage's last gather, shift, publish or step ended: what it serves waits for it."""
    opened: dict[tuple[int, int | None], float] = field(default_factory=dict)
    """Reduction windows that wait for their weight part, and since when."""
    meeting: float | None = None

    def add(self, rank: int, instruction: Instruction) -> None:
        """The next instruction of a rank; sends come right before their receives."""
        key = rank, instruction.stage
        if instruction.op in SENDS:
            self._transfer(rank, instruction)
        elif instruction.op is Op.REDUCE:
            self._reduce_open(key)
            self.opened[key] = self.issued[rank]
        elif instruction.op is Op.STEP:
            self._step(rank, instruction)
        elif instruction.op not in RECEIVES:
            seconds = _SECONDS[instruction.op](self._costs_of(instruction))
            waits = [self.stops[each] for each in self.wiring.needs(instruction)]
            waits += [self.issued[rank], self.ready[key]]
            event = self._record(rank, instruction, max(waits), seconds)
            if instruction.op in WEIGHT_PARTS and key in self.opened:
                self._reduce(key, event)
            if instruction.op in (Op.GATHER, Op.SHIFT_IN, Op.SHIFT_OUT, Op.PUBLISH):
                self.ready[key] = event.stop

    def finish(self) -> None:
        """Reduce what is still open."""
        for key in sorted(self.opened, key=str):
            self._reduce_open(key)

    def _costs_of(self, instruction: Instruction) -> StageCosts:
        assert instruction.stage is not None, "instructions check their own numbers"
        return self.costs.stages[instruction.stage]

    def _lane(self, instruction: Instruction) -> str:
        return lane_of(instruction.op) if self.costs.overlap else LANES[0]

    def _record(self, rank: int, instruction: Instruction, earliest: float, seconds: float) -> Event:
        lane = self._lane(instruction)
        start = max(earliest, self.lanes[rank, lane])
        event = Event(rank, lane, instruction, start, start + seconds)
        self.events.append(event)
        self.lanes[rank, lane] = event.stop
        self.stops.update(dict.fromkeys(results(instruction), event.stop))
        if lane == LANES[0]:
            self.issued[rank] = event.stop
        if instruction.op in PASSES:
            self.posted[rank] = start
        return event

    def _transfer(self, rank: int, send: Instruction) -> None:
        receive = send.partner
        assert receive is not None, "a send has its receive"
        assert receive.stage is not None, "and that one a stage"
        assert send.stage is not None, "as it has itself"
        other = self.wiring.ranks[receive.stage]
        start = max(
            *(self.stops[each] for each in self.wiring.needs(send)),
            self.issued[rank],
            (self.posted if self.costs.overlap else self.issued)[other],
            self.lanes[rank, self._lane(send)],
            self.lanes[other, self._lane(receive)],
        )
        seconds = self.costs.transfer(min(send.stage, receive.stage))
        self._record(rank, send, start, seconds)
        self._record(other, receive, start, seconds)
        if self.costs.overlap:
            self.issued[rank] += self._costs_of(send).send
            self.issued[other] += self._costs_of(receive).receive

    def _step(self, rank: int, instruction: Instruction) -> None:
        if self.meeting is None:
            self.finish()
            self.meeting = max((*self.lanes.values(), *self.issued.values()), default=0.0)
        event = self._record(rank, instruction, self.meeting, self.costs.step)
        for stage, other in self.wiring.ranks.items():
            if other == rank:
                self.ready[rank, stage] = event.stop

    def _reduce(self, key: tuple[int, int | None], weight_part: Event) -> None:
        """Reduce a stage while `weight_part` completes its units one by one."""
        opened = self.opened.pop(key)
        rank, stage = key
        instruction = Instruction(Op.REDUCE, stage)
        costs = self._costs_of(instruction)
        share = 1 / costs.num_units
        first = weight_part.start + share * (weight_part.stop - weight_part.start)
        start = max(opened, first, self.lanes[rank, self._lane(instruction)])
        stop = max(start + costs.reduce, weight_part.stop + share * costs.reduce)
        self._record(rank, instruction, start, stop - start)

    def _reduce_open(self, key: tuple[int, int | None]) -> None:
        """Reduce a stage whose window has no weight part."""
        if key in self.opened:
            instruction = Instruction(Op.REDUCE, key[1])
            self._record(key[0], instruction, self.opened.pop(key), self._costs_of(instruction).reduce)


def _peak_bytes(rank: int, clock: _Clock, costs: Costs) -> int:
    mine = [event for event in clock.events if event.rank == rank]
    persistent = sum(
        costs.stages[stage].persistent_bytes for stage, owner in clock.wiring.ranks.items() if owner == rank
    )
    # At one moment what ends is let go before what starts is taken.
    changes = sorted(_changes(mine, costs))
    return persistent + max(accumulate((change for _, change in changes), initial=0))


def _changes(events: list[Event], costs: Costs) -> Iterator[tuple[float, int]]:
    """Moments at which a rank holds more or fewer bytes, in any order."""
    passes = {result: event for event in events for result in results(event.instruction)}
    for event in events:
        op, stage, micro = event.instruction.op, event.instruction.stage, event.instruction.micro
        if stage is None:
            continue
        own = costs.stages[stage]
        forward = passes.get(Instruction(Op.FORWARD, stage, micro)) if micro is not None else None
        backward = passes.get(Instruction(Op.BACKWARD_INPUT, stage, micro)) if micro is not None else None
        if op is Op.FORWARD:
            yield event.start, own.activation_bytes
            yield (backward or event).stop, -own.activation_bytes
        elif op is Op.RECEIVE_ACTIVATION and forward is not None:
            yield event.start, costs.stages[stage - 1].output_bytes
            yield forward.start, -costs.stages[stage - 1].output_bytes
        elif op is Op.RECEIVE_GRADIENT and backward is not None:
            yield event.start, own.output_bytes
            yield backward.stop, -own.output_bytes
        elif op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
            yield event.stop, own.queue_bytes if op is Op.BACKWARD_INPUT else -own.queue_bytes
        elif op in (Op.GATHER, Op.DROP):
            yield event.start, own.gathered_bytes if op is Op.GATHER else -own.gathered_bytes
