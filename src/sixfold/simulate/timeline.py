"""A timeline: which instruction ran on which rank from when to when, and what follows from that.

Made by the simulator, or from times that were measured; read by the exports. It says nothing about
why an instruction began when it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sixfold.base.units import bytes_text
from sixfold.program import INPUT_PARTS, PASSES, RECEIVES, SENDS, Instruction, Op

LANES = ("compute", *(op.value for op in (*SENDS, *RECEIVES)), "gather", "reduce", "shift")
"""What a rank does at the same time, where it can."""
_LANE_OF = {
    **{op: op.value for op in (*SENDS, *RECEIVES)},
    Op.GATHER: "gather",
    Op.PUBLISH: "gather",
    Op.REDUCE: "reduce",
    Op.SHIFT_IN: "shift",
    Op.SHIFT_OUT: "shift",
}
"""All else computes."""


def lane_of(op: Op) -> str:
    """The lane that an instruction runs in, where things overlap."""
    return _LANE_OF.get(op, LANES[0])


@dataclass(frozen=True)
class Event:
    """One instruction on the clock.

    Args:
        rank: of the pipeline.
        lane: one of `LANES`.
        instruction: what ran.
        start: seconds since the start of the step.
        stop: likewise.
    """

    rank: int
    lane: str
    instruction: Instruction
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """One step on all ranks of a pipeline.

    Args:
        events: in the order in which they were recorded.
        peak_bytes: the most that each rank held at once; empty where nobody counted.
    """

    events: tuple[Event, ...]
    peak_bytes: tuple[int, ...] = ()

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[Any]]) -> Timeline:
        """From what `rows` gave, perhaps through JSON."""
        events = []
        for rank, text, start, stop in rows:
            instruction = Instruction.parse(text)
            events.append(Event(rank, lane_of(instruction.op), instruction, start, stop))
        return cls(tuple(events))

    def rows(self) -> list[tuple[int, str, float, float]]:
        """(rank, instruction, start, stop) of each event, in plain values."""
        return [(each.rank, str(each.instruction), each.start, each.stop) for each in self.events]

    def aligned(self) -> Timeline:
        """The same on a clock that starts with the first pass; what was posted before it begins at 0."""
        first = min((each.start for each in self.events if each.instruction.op in PASSES), default=0.0)
        return replace(
            self,
            events=tuple(
                replace(each, start=max(0.0, each.start - first), stop=max(0.0, each.stop - first))
                for each in self.events
            ),
        )

    @property
    def num_ranks(self) -> int:
        """Ranks on which something ran."""
        return 1 + max((event.rank for event in self.events), default=-1)

    @property
    def makespan(self) -> float:
        """Seconds until everything was done."""
        return max((event.stop for event in self.events), default=0.0)

    def passes(self, rank: int) -> list[Event]:
        """What a rank computed on micro-batches, in order of time."""
        mine = (event for event in self.events if event.rank == rank and event.instruction.op in PASSES)
        return sorted(mine, key=lambda event: event.start)

    def busy(self, rank: int) -> float:
        """Seconds in passes."""
        return sum(event.stop - event.start for event in self.passes(rank))

    def span(self, rank: int) -> float:
        """Seconds from a rank's first pass to the end of its last."""
        mine = self.passes(rank)
        return max(event.stop for event in mine) - mine[0].start if mine else 0.0

    def idle(self, rank: int) -> float:
        """Seconds of the makespan in which a rank was in no pass."""
        return self.makespan - self.busy(rank)

    @property
    def ideal(self) -> float:
        """Seconds that the busiest rank computes: less is impossible."""
        return max(map(self.busy, range(self.num_ranks)), default=0.0)

    @property
    def bubble(self) -> float:
        """Seconds by which the longest span exceeds the ideal.

        Each rank counts from its own first pass, as the papers on schedules without bubble do: what follows
        may begin on every rank as soon as that one is done. Where all ranks meet in `step`,
        `makespan - ideal` is what is lost.
        """
        return max(map(self.span, range(self.num_ranks)), default=0.0) - self.ideal

    def __str__(self) -> str:
        lines = [f"makespan {self.makespan:.6g} s, ideal {self.ideal:.6g} s, bubble {self.bubble:.6g} s"]
        for rank in range(self.num_ranks):
            memory = f", peak {bytes_text(self.peak_bytes[rank])}" if any(self.peak_bytes) else ""
            lines.append(f"rank {rank}: busy {self.busy(rank):.6g} s, idle {self.idle(rank):.6g} s{memory}")
        return "\n".join(lines)

    def drawing(self, tick: float = 1.0) -> str:
        """Passes as text, a line for each rank and a character for each `tick` seconds.

        A forward is drawn as the last digit of its micro-batch, a backward or its input part as a small
        letter (a is micro-batch 0), a weight part as a capital one, and nothing to do as a dot.
        """
        return "\n".join(f"rank {rank}  {self._line(rank, tick)}" for rank in range(self.num_ranks))

    def _line(self, rank: int, tick: float) -> str:
        drawn = ["."] * round(self.makespan / tick)
        for event in self.passes(rank):
            first, last = round(event.start / tick), round(event.stop / tick)
            drawn[first:last] = [_sign(event.instruction)] * (last - first)
        return "".join(drawn)


def _sign(instruction: Instruction) -> str:
    micro = instruction.micro or 0
    if instruction.op is Op.FORWARD:
        return str(micro % 10)
    return chr(ord("a" if instruction.op in INPUT_PARTS else "A") + micro % 26)
