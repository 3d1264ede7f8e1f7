"""The order in which several ranks' programs run: what each instruction waits for, and who meets whom.

One machine for three callers: `check` asks whether programs reach their end, lowering where transfers
belong, `simulate` when everything happens. It knows order only, no time and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from sixfold.base.errors import ProgramError
from sixfold.program.instructions import RECEIVES, Instruction, Op, Program


@dataclass(frozen=True)
class Wiring:
    """Which rank has which stage, and so what an instruction waits for.

    Args:
        programs: one per rank of the pipeline, in order.
        is_connected: whether the programs hold their transfers; without them a pass waits for the pass
            of the other rank itself.
    """

    programs: tuple[Program, ...]
    is_connected: bool = True

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Stage to rank; a stage named by several ranks is the last one's."""
        return {
            each.stage: rank
            for rank, program in enumerate(self.programs)
            for each in program.instructions
            if each.stage is not None
        }

    def is_local(self, stage: int, other: int) -> bool:
        """Whether two stages stand on one rank, so that nothing is sent between them."""
        return self.ranks.get(stage) == self.ranks.get(other)

    def needs(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """What must be done before `instruction`, besides what stands before it in its program.

        A whole backward counts as its input part. Transfers wait for their partner as well.
        """
        match instruction:
            case Instruction(Op.FORWARD, int(stage), int(micro)):
                return self._from(stage, stage - 1, Op.FORWARD, Op.RECEIVE_ACTIVATION, micro)
            case Instruction(Op.BACKWARD | Op.BACKWARD_INPUT, int(stage), int(micro)):
                forward = Instruction(Op.FORWARD, stage, micro)
                return (
                    forward,
                    *self._from(stage, stage + 1, Op.BACKWARD_INPUT, Op.RECEIVE_GRADIENT, micro),
                )
            case Instruction(Op.BACKWARD_WEIGHT | Op.SEND_GRADIENT, int(stage), int(micro)):
                return (Instruction(Op.BACKWARD_INPUT, stage, micro),)
            case Instruction(Op.SERVE_BACKWARD, int(stage), int(micro)):
                return (Instruction(Op.SERVE_FORWARD, stage, micro),)
            case Instruction(Op.SEND_ACTIVATION, int(stage), int(micro)):
                return (Instruction(Op.FORWARD, stage, micro),)
        return ()

    def _from(
        self, stage: int, neighbour: int, pass_: Op, receive: Op, micro: int
    ) -> tuple[Instruction, ...]:
        if neighbour not in self.ranks:
            return ()
        if self.is_connected and not self.is_local(stage, neighbour):
            return (Instruction(receive, stage, micro),)
        return (Instruction(pass_, neighbour, micro),)


def results(instruction: Instruction) -> tuple[Instruction, ...]:
    """What others may wait for, once `instruction` is done: itself, and the input part of a backward."""
    if instruction.op is Op.BACKWARD:
        return instruction, Instruction(Op.BACKWARD_INPUT, instruction.stage, instruction.micro)
    return (instruction,)


def global_order(wiring: Wiring) -> Iterator[tuple[int, Instruction]]:
    """Run the programs against each other and yield (rank, instruction) in an order that can happen.

    Every send blocks until its receive is reached, and every `step` until all ranks reach theirs. Whoever
    gets through this gets through with buffered sends as well: they only let a rank go on earlier, and
    what each rank does next never depends on who was faster.

    A send is followed directly by its receive, and the steps of all ranks by each other.

    Raises:
        ProgramError: at the point where nobody can go on; says what every rank stands before.
    """
    queues = [program.instructions for program in wiring.programs]
    at = [0] * len(queues)
    done: set[Instruction] = set()

    def head(rank: int) -> Instruction | None:
        return queues[rank][at[rank]] if at[rank] < len(queues[rank]) else None

    def meeting(rank: int, instruction: Instruction) -> Sequence[int] | None:
        """Ranks that perform `instruction` together, or None as long as one is missing."""
        if instruction.op is Op.STEP:
            everybody = range(len(queues))
            return everybody if all(head(other) == instruction for other in everybody) else None
        partner = instruction.partner
        if partner is None:
            return (rank,)
        other = wiring.ranks.get(partner.stage) if partner.stage is not None else None
        # The sender goes first; its receiver is taken along.
        if instruction.op in RECEIVES or other is None or head(other) != partner:
            return None
        return rank, other

    waiting = list(range(len(queues)))
    while waiting:
        rank = waiting.pop()
        while (instruction := head(rank)) is not None:
            together = meeting(rank, instruction)
            if together is None or not done.issuperset(wiring.needs(instruction)):
                break
            for each in together:
                performed = queues[each][at[each]]
                at[each] += 1
                done.update(results(performed))
                yield each, performed
            waiting = list(range(len(queues)))
    stuck = [(rank, head(rank)) for rank in range(len(queues))]
    if any(instruction is not None for _, instruction in stuck):
        raise ProgramError(
            "no rank can go on: "
            + "; ".join(f"rank {rank} is at {each or 'its end'}" for rank, each in stuck),
            rule="an instruction follows what it needs; a send and its receive, and all steps, are reached "
            "together",
            fix="put what is needed before it, and transfers into one order on both ranks",
        )
