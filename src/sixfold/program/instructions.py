"""Instructions and programs: what one rank does in one step, as a list that can be read.

Written by the schedules, checked by `check`, played by `pipeline`. The text form is one line,
`forward 0.2 | reduce 0 | backward 0.2 | step`, and `Program.parse` is its exact inverse.
Nothing here knows a tensor or a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sixfold.base.errors import ProgramError


class Op(Enum):
    """What an instruction does; the value is its word in the text form."""

    FORWARD = "forward"
    """Run a stage forward on one micro-batch and keep what backward needs."""
    BACKWARD = "backward"
    """Run that stage backward; gradients accumulate."""
    SERVE_FORWARD = "serve-forward"
    """Take part in the forward that other ranks run on a micro-batch this rank does not have."""
    SERVE_BACKWARD = "serve-backward"
    """The same for its backward."""
    REDUCE = "reduce"
    """Open the stage's reduction window: from here a unit whose gradients are complete is reduced,
    in fixed order, while later instructions run. `step` closes every window."""
    STEP = "step"
    """Finish all reductions, normalise, clip, and update this rank's part of the state."""
    PUBLISH = "publish"
    """Bring the updated state into the stage's working parameters."""


_FIELDS = {
    Op.FORWARD: 2,
    Op.BACKWARD: 2,
    Op.SERVE_FORWARD: 2,
    Op.SERVE_BACKWARD: 2,
    Op.REDUCE: 1,
    Op.PUBLISH: 1,
    Op.STEP: 0,
}
"""How many numbers follow the word: stage and micro-batch, stage alone, or none."""


@dataclass(frozen=True)
class Instruction:
    """One thing to do.

    Args:
        op: what.
        stage: which stage of the model, counted from the first layer; None for `step`.
        micro: which micro-batch; None where the instruction concerns the whole step.
    """

    op: Op
    stage: int | None = None
    micro: int | None = None

    def __post_init__(self) -> None:
        given = (self.stage is not None) + (self.micro is not None)
        ordered = self.micro is None or self.stage is not None
        if given != _FIELDS[self.op] or not ordered:
            raise ProgramError(
                f"instruction {self.op.value} with stage={self.stage} and micro={self.micro}",
                rule=f"{self.op.value} takes {_FIELDS[self.op]} number(s): stage, then micro-batch",
                fix="give exactly those numbers",
            )

    def __str__(self) -> str:
        numbers = [str(number) for number in (self.stage, self.micro) if number is not None]
        return " ".join([self.op.value, ".".join(numbers)]) if numbers else self.op.value

    @classmethod
    def parse(cls, text: str) -> Instruction:
        """Inverse of `str`: `"forward 0.2"` is stage 0, micro-batch 2."""
        word, _, numbers = text.strip().partition(" ")
        try:
            op = Op(word)
            values = [int(number) for number in numbers.split(".")] if numbers else []
            if len(values) != _FIELDS[op]:
                raise ValueError(numbers)
        except ValueError:
            raise ProgramError(
                f"{text!r} is not an instruction",
                rule=f"an instruction is one of {', '.join(op.value for op in Op)}, then stage.micro",
                fix="write it like 'forward 0.2'",
            ) from None
        return cls(op, *values)


@dataclass(frozen=True)
class Program:
    """What one rank does in one step, in order."""

    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        return " | ".join(str(instruction) for instruction in self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    @classmethod
    def parse(cls, text: str) -> Program:
        """Inverse of `str`; blank text is the empty program."""
        parts = [part for part in text.split("|") if part.strip()]
        return cls(tuple(Instruction.parse(part) for part in parts))
