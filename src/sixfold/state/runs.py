"""Runs: contiguous parts of a unit's masters, each of which an optimizer updates as one tensor.

Where the plan lets slices cut parameters a group has one run in a unit; where it keeps them whole, one for
each parameter that this rank owns. Made and read by the bound optimizer; a run updates nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.parallel.pieces import runs_of
from sixfold.plan import Slot
from sixfold.state.unit import Unit

StatePiece: TypeAlias = tuple[str, str, int, torch.Tensor]
"""(parameter, key, first element, elements) of one rank's optimizer state; a number for a whole tensor
starts at 0."""


@dataclass(frozen=True)
class Run:
    """A contiguous run of one unit's master that the optimizer sees as one tensor.

    Args:
        start: its first element, counted from the beginning of the unit.
        stop: behind its last one.
        slots: parameters of the same unit and group, whether or not they lie in this rank's run.
        optimizer: which updates it.
    """

    unit: Unit
    start: int
    stop: int
    tensor: nn.Parameter
    slots: tuple[Slot, ...]
    optimizer: Optimizer

    def part_of(self, mine: torch.Tensor) -> torch.Tensor:
        """The run's own part of `mine`, which covers what this rank has of the unit."""
        offset = self.unit.own.start
        return mine[self.start - offset : self.stop - offset].view(self.tensor.shape)

    @cached_property
    def grad(self) -> torch.Tensor:
        """Its reduced gradients."""
        assert self.unit.grads is not None, "only trainable units are bound"
        return self.part_of(self.unit.grads)

    def state(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps for it."""
        state = self.optimizer.state.get(self.tensor, {})
        return {key: torch.as_tensor(value) for key, value in state.items() if value is not None}


def runs_in(unit: Unit, owners: Sequence[Optimizer]) -> Iterator[Run]:
    """What this rank updates of a unit: parts of group after group, or parameter after parameter."""
    if unit.plan.whole:
        for slot in unit.plan.slots:
            if slot.offset in range(unit.own.start, unit.own.stop):
                stop = slot.offset + slot.numel
                yield _run(unit, slot.offset, stop, (slot,), slot.shape, owners)
        return
    for group, begin, end in unit.plan.segments():
        start, stop = max(begin, unit.own.start), min(end, unit.own.stop)
        slots = tuple(slot for slot in unit.plan.slots if slot.group == group)
        if start < stop or not unit.spread:
            yield _run(unit, start, stop, slots, (stop - start,), owners)


def _run(
    unit: Unit,
    start: int,
    stop: int,
    slots: tuple[Slot, ...],
    shape: tuple[int, ...],
    owners: Sequence[Optimizer],
) -> Run:
    view = unit.master[start - unit.own.start : stop - unit.own.start].view(shape)
    tensor = nn.Parameter(view, requires_grad=True)
    return Run(unit, start, stop, tensor, slots, owners[slots[0].group])


def pieces_of(run: Run, slots: Sequence[Slot], key: str, flat: torch.Tensor) -> Iterator[StatePiece]:
    """The parts of `flat`, which covers the run, that belong to each parameter."""
    for slot in slots:
        start, stop = max(slot.offset, run.start), min(slot.offset + slot.numel, run.stop)
        if start < stop:
            part = flat[start - run.start : stop - run.start]
            for first, each in runs_of(slot, start - slot.offset, part):
                yield slot.name, key, first, each
