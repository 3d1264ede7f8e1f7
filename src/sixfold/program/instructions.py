"""Instructions and programs: what one rank does in one step, as a list that can be read.

Written by the schedules and lowering passes, checked by `check`, timed by `simulate`, played by
`pipeline`. The text form is one line, `forward 0.2 | reduce 0 | backward 0.2 | step`, and
`Program.parse` is its exact inverse. Nothing here knows a tensor or a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from sixfold.base.errors import ProgramError


class Op(Enum):
    """What an instruction does; the value is its word in the text form."""

    FORWARD = "forward"
    """Run a stage forward on one micro-batch and keep what backward needs."""
    BACKWARD = "backward"
    """Run that stage backward; gradients accumulate."""
    BACKWARD_INPUT = "backward-input"
    """The part of backward that others wait for: the gradient of the stage's input, and of every weight
    whose part cannot be put off. What the other weights need is queued."""
    BACKWARD_WEIGHT = "backward-weight"
    """The rest of that backward, from the queue: gradients of the weights that were put off."""
    SERVE_FORWARD = "serve-forward"
    """Take part in the forward that other ranks run on a micro-batch this rank does not have."""
    SERVE_BACKWARD = "serve-backward"
    """The same for its backward."""
    SEND_ACTIVATION = "send-activation"
    """Start to send the stage's output to the next stage."""
    RECEIVE_ACTIVATION = "receive-activation"
    """Receive the stage's input from the stage before. The forward waits for it; a player may post it
    earlier, as long as the order of transfers with that rank stays."""
    SEND_GRADIENT = "send-gradient"
    """Start to send the gradient of the stage's input to the stage before."""
    RECEIVE_GRADIENT = "receive-gradient"
    """Receive the gradient of the stage's output from the next stage; likewise for the backward."""
    GATHER = "gather"
    """Open the stage's residency window: its cut parameters are made whole, and stay so."""
    DROP = "drop"
    """Close that window: of cut parameters this rank keeps its slices."""
    SHIFT_IN = "shift-in"
    """Bring the stage's state from its home, host or disk, to the device."""
    SHIFT_OUT = "shift-out"
    """Send it home again."""
    REDUCE = "reduce"
    """Open the stage's reduction window: a unit whose gradients its next weight part (backward or
    backward-weight) completes is reduced, in fixed order, while later instructions run. What accumulates
    after that weight part belongs to the next window. `step` closes every window."""
    STEP = "step"
    """Finish all reductions, normalise, clip, and update this rank's part of the state."""
    PUBLISH = "publish"
    """Bring the updated state into the stage's working parameters."""


INPUT_PARTS = (Op.BACKWARD, Op.BACKWARD_INPUT)
"""What gives the gradient of a stage's input."""
WEIGHT_PARTS = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
"""What completes the gradients of a stage's weights for a micro-batch."""
PASSES = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
"""What computes on a micro-batch."""
SERVES = (Op.SERVE_FORWARD, Op.SERVE_BACKWARD)
"""What stands in for a pass of a micro-batch that this rank does not have."""

_PARTNERS = {
    Op.SEND_ACTIVATION: (Op.RECEIVE_ACTIVATION, 1),
    Op.RECEIVE_ACTIVATION: (Op.SEND_ACTIVATION, -1),
    Op.SEND_GRADIENT: (Op.RECEIVE_GRADIENT, -1),
    Op.RECEIVE_GRADIENT: (Op.SEND_GRADIENT, 1),
}
"""The other end of a transfer, and how many stages further it is."""

SENDS = (Op.SEND_ACTIVATION, Op.SEND_GRADIENT)
RECEIVES = (Op.RECEIVE_ACTIVATION, Op.RECEIVE_GRADIENT)

FIELDS = {op: 2 if op in (*PASSES, *SERVES, *SENDS, *RECEIVES) else 0 if op is Op.STEP else 1 for op in Op}
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
        if given != FIELDS[self.op] or not ordered:
            raise ProgramError(
                f"instruction {self.op.value} with stage={self.stage} and micro={self.micro}",
                rule=f"{self.op.value} takes {FIELDS[self.op]} number(s): stage, then micro-batch",
                fix="give exactly those numbers",
            )

    @cached_property
    def place(self) -> tuple[int, int]:
        """Stage and micro-batch; -1 for what it has not."""
        return -1 if self.stage is None else self.stage, -1 if self.micro is None else self.micro

    @property
    def partner(self) -> Instruction | None:
        """The other end of a transfer, `receive-activation 1.2` for `send-activation 0.2`; else None."""
        if self.op not in _PARTNERS or self.stage is None:
            return None
        op, further = _PARTNERS[self.op]
        return Instruction(op, self.stage + further, self.micro)

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
            if len(values) != FIELDS[op]:
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
