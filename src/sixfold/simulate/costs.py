"""What instructions cost: plain numbers for the simulator, measured, estimated or made up.

Filled in by the planner, by a measurement, or by whoever asks what a schedule would do; nothing here is
computed from a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sixfold.base.errors import ProgramError


@dataclass(frozen=True)
class StageCosts:
    """One stage, for one micro-batch on one rank: seconds and bytes.

    Args:
        forward: seconds of a forward.
        backward_input: of the input part of a backward.
        backward_weight: of its weight part; a whole backward takes both.
        reduce: of reducing the stage's gradients.
        publish: of bringing the update into its parameters.
        gather: of making its cut parameters whole.
        shift: of moving its state to or from its home.
        send: of handing one message to its transfer, in which nothing else is computed.
        receive: of asking for one, likewise.
        num_units: units of equal size that are reduced one by one as a weight part completes them.
        output_bytes: sent to the next stage; the gradient that comes back is as large.
        activation_bytes: kept from a forward to the end of its backward, or of its input part.
        queue_bytes: kept from an input part to the end of its weight part.
        gathered_bytes: of parameters while they are whole.
        persistent_bytes: held all the time.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    reduce: float = 0.0
    publish: float = 0.0
    gather: float = 0.0
    shift: float = 0.0
    send: float = 0.0
    receive: float = 0.0
    num_units: int = 1
    output_bytes: int = 0
    activation_bytes: int = 0
    queue_bytes: int = 0
    gathered_bytes: int = 0
    persistent_bytes: int = 0

    def __post_init__(self) -> None:
        _refuse_negative(self)
        if self.num_units < 1:
            raise ProgramError(
                f"num_units={self.num_units}", rule="a stage has at least one unit", fix="give 1 or more"
            )


@dataclass(frozen=True)
class Costs:
    """A pipeline.

    Args:
        stages: in order.
        step: seconds of the update, after all ranks have met.
        latency: seconds before the first byte of a transfer between ranks.
        bandwidth: bytes per second of one transfer.
        overlap: whether transfers and collectives run beside computation; if not, everything a rank does
            takes its turn.
    """

    stages: tuple[StageCosts, ...]
    step: float = 0.0
    latency: float = 0.0
    bandwidth: float = math.inf
    overlap: bool = True

    def __post_init__(self) -> None:
        _refuse_negative(self)
        if not self.bandwidth:
            raise ProgramError(
                f"bandwidth={self.bandwidth}",
                rule="bytes arrive in the end",
                fix="give the bytes sent in a second",
            )

    def transfer(self, stage: int) -> float:
        """Seconds for the output of `stage` to the next one, or for its gradient back."""
        return self.latency + self.stages[stage].output_bytes / self.bandwidth


def _refuse_negative(costs: StageCosts | Costs) -> None:
    for name, value in vars(costs).items():
        if isinstance(value, int | float) and not value >= 0:
            raise ProgramError(
                f"{name}={value}", rule="time and memory are not negative", fix=f"give {name} of 0 or more"
            )
