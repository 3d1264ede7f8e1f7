"""What a rank holds from step to step, in bytes, by the geometry that allocates it.

Asked before anything is made, and by tests against what really lives. Transient buffers (gradients on
their way, gathered copies, activations) are not counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sixfold.base.units import bytes_text, item_bytes
from sixfold.plan.plan import Plan
from sixfold.plan.residency import Spread
from sixfold.plan.stages import StagePlan
from sixfold.plan.units import UnitPlan
from sixfold.program import Program, peaks

PAGE_BYTES = 4096
"""What shared memory is taken by."""


@dataclass(frozen=True)
class Memory:
    """Persistent bytes of one rank, by kind of state.

    Args:
        parameters: working parameters, trained and frozen.
        gradients: accumulated gradients.
        master: weights that the optimizer updates, where the working ones are of another type.
        optimizer: the optimizer's own numbers, one per weight; counts of steps are left out.
        average: of the trained weights, in the type of the master.
    """

    parameters: int
    gradients: int
    master: int
    optimizer: int
    average: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.master + self.optimizer + self.average

    def __str__(self) -> str:
        kinds = ("parameters", "gradients", "master", "optimizer", *(["average"] if self.average else []))
        return ", ".join(f"{kind} {bytes_text(getattr(self, kind))}" for kind in kinds)


def persistent_memory(plan: Plan, num_moments: float | Sequence[float]) -> Memory:
    """What every rank holds.

    Args:
        num_moments: numbers of the master's type that the optimizer keeps per weight: 2 for AdamW, 1 for SGD
            with momentum; several for the parameter groups, of which ranks have equal parts of a unit.
    """
    row = plan.residency
    parameters = gradients = master = optimizer = average = 0
    for unit in plan.units:
        types = plan.precision_of(unit)

        def part(spread: Spread, unit: UnitPlan = unit) -> int:
            return unit.numel // plan.geometry.num_parts(spread, unit.cut)

        parameters += item_bytes(unit.dtype) * part(row.parameters)
        if unit.trainable and types is not None:
            own = part(row.optimizer)
            gradients += item_bytes(types.grad) * part(row.gradients)
            master += item_bytes(types.master) * own * (types.master != types.compute)
            optimizer += round(item_bytes(types.master) * own * _moments_of(unit, num_moments))
            average += item_bytes(types.master) * own * plan.has_average
    return Memory(parameters, gradients, master, optimizer, average)


def _moments_of(unit: UnitPlan, num_moments: float | Sequence[float]) -> float:
    """Numbers that an optimizer keeps per weight of a unit, on average."""
    if not isinstance(num_moments, Sequence):
        return num_moments
    held = [(slot.numel, num_moments[slot.group]) for slot in unit.slots if slot.numel]
    return sum(numel * each for numel, each in held) / (sum(numel for numel, _ in held) or 1)


def exchange_memory(plan: Plan) -> int:
    """Bytes that a rank shares with others at most: its gradients on their way, and parameters of which
    others gather slices."""
    row, total = plan.residency, 0
    for unit in plan.units:
        types = plan.precision_of(unit)
        if unit.trainable and types is not None:
            total += unit.numel * sum(item_bytes(kind) for kind in {types.grad, types.reduce})
        if row.parameters or (row.optimizer and unit.trainable):
            part = unit.numel // plan.geometry.num_parts(row.parameters, unit.cut)
            total += part * item_bytes(unit.dtype)
    return total


def transfer_memory(
    stages: StagePlan, programs: Sequence[Program], pipe_rank: int, handed: Sequence[int]
) -> int:
    """Bytes that a rank has sent along the pipe in an update and others have not read yet, at most.

    Of one border no more activations are under way than the stage before it has forwards that wait for their
    backward, and no more gradients: who has not read one has not run that backward. An evaluation, where
    nothing comes back, may have more.

    Args:
        programs: of all ranks of the pipeline.
        handed: bytes of what each stage hands on of one micro-batch.
    """
    waiting = {stage: peak.activations for program in programs for stage, peak in peaks(program).items()}
    total = 0
    for stage in stages.ranks[pipe_rank]:
        for before, other in ((stage, stage + 1), (stage - 1, stage - 1)):
            if 0 <= other <= stages.last and stages.rank_of(other) != pipe_rank:
                total += handed[before] * waiting.get(before, 0)
    return total


def offered_memory(offers: Iterable[tuple[str, int]]) -> int:
    """Bytes of shared memory that a rank offers along axes inside forward and backward, at most.

    A rank that goes on with the next exchange has others read this one meanwhile, so there are two buffers of
    each kind and size, of whole pages, with a table of what is in it.

    Args:
        offers: (kind of exchange, bytes), as often as it happens.
    """
    return 2 * sum((num_bytes // PAGE_BYTES + 1) * PAGE_BYTES for _, num_bytes in set(offers))
