"""Units: which parameters travel together, and where each lies in its unit's flat buffers.

`cut_units` is called once with facts about a module; the state engine allocates exactly what it
says. It sees names, shapes and types as plain data, never a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from sixfold.plan.precision import ITEM_BYTES

ALIGN = 32
"""Elements to which every parameter's place is rounded up: 64 bytes in the narrowest type."""

TARGET_BYTES = 8 * 2**20
"""Neighbouring blocks share a unit up to this size: smaller units pay latency, larger ones leave
less to overlap with backward."""


@dataclass(frozen=True)
class ParameterFacts:
    """What the plan needs to know of one parameter.

    Args:
        name: its first name in the module.
        shape: its global shape.
        dtype: its working type.
        trainable: whether it gets gradients.
        group: the optimizer group it belongs to.
        block: name of the repeated block that holds it, None outside of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    group: int = 0
    block: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Slot:
    """One parameter's place: elements [offset, offset + numel) of its unit."""

    name: str
    shape: tuple[int, ...]
    offset: int
    group: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class UnitPlan:
    """One unit: a flat buffer and the parameters in it, ordered by optimizer group.

    Args:
        dtype: working type of all its parameters.
        trainable: whether it has gradients and optimizer state.
        slots: places in order, without overlap.
        numel: elements of the flat buffer, padding included.
        num_slices: equal slices that its optimizer state is cut into.
        blocks: names of the repeated blocks it belongs to, in module order; none for what lies outside of
            them, and where units may hold both.
    """

    dtype: str
    trainable: bool
    slots: tuple[Slot, ...]
    numel: int
    num_slices: int = 1
    blocks: tuple[str, ...] = ()

    def slice_of(self, index: int) -> tuple[int, int]:
        """(start, stop) of one of the `num_slices` equal, contiguous slices."""
        size = self.numel // self.num_slices
        return index * size, (index + 1) * size

    def gaps(self) -> list[tuple[int, int]]:
        """(start, stop) of what belongs to no parameter."""
        ends = [slot.offset + slot.numel for slot in self.slots]
        starts = [*(slot.offset for slot in self.slots[1:]), self.numel]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    def segments(self) -> list[tuple[int, int, int]]:
        """(group, start, stop) of each optimizer group's contiguous run, in order."""
        runs: list[tuple[int, int, int]] = []
        for slot in self.slots:
            stop = slot.offset + _round_up(slot.numel)
            if runs and runs[-1][0] == slot.group:
                runs[-1] = (slot.group, runs[-1][1], stop)
            else:
                runs.append((slot.group, slot.offset, stop))
        runs[-1] = (*runs[-1][:2], self.numel)
        return runs


def cut_units(
    parameters: Iterable[ParameterFacts],
    target_bytes: int = TARGET_BYTES,
    *,
    num_slices: int = 1,
    num_pieces: int = 1,
    by_block: bool = False,
) -> tuple[UnitPlan, ...]:
    """Cut parameters, given in module order, into units in that order.

    A unit holds one (dtype, trainable) kind. Parameters of one block stay together; neighbouring
    blocks are joined until `target_bytes` of working parameters are reached. Every parameter has
    exactly one slot.

    Args:
        num_slices: see UnitPlan.
        num_pieces: equal pieces that a unit is padded to, a multiple of num_slices: groups sum what they
            share by pieces.
        by_block: never put parameters of blocks and others into one unit, so that units can come and go
            with their blocks.
    """
    multiple = ALIGN * num_pieces

    def laid_out(run: Sequence[ParameterFacts]) -> UnitPlan:
        blocks = tuple(dict.fromkeys(facts.block for facts in run if facts.block is not None))
        return _lay_out(run, num_slices, multiple, blocks if by_block else ())

    open_runs: dict[tuple[str, bool, bool], list[ParameterFacts]] = {}
    done: list[tuple[int, UnitPlan]] = []
    order: dict[tuple[str, bool, bool], int] = {}
    for place, facts in enumerate(parameters):
        kind = (facts.dtype, facts.trainable, by_block and facts.block is not None)
        run = open_runs.setdefault(kind, [])
        starts_block = not run or facts.block is None or run[-1].block != facts.block
        if run and starts_block and _bytes(run) + _bytes([facts]) > target_bytes:
            done.append((order[kind], laid_out(run)))
            run = open_runs[kind] = []
        if not run:
            order[kind] = place
        run.append(facts)
    done += [(order[kind], laid_out(run)) for kind, run in open_runs.items() if run]
    return tuple(unit for _, unit in sorted(done, key=lambda item: item[0]))


def _lay_out(
    run: Sequence[ParameterFacts], num_slices: int, multiple: int, blocks: tuple[str, ...]
) -> UnitPlan:
    slots: list[Slot] = []
    offset = 0
    for facts in sorted(run, key=lambda facts: facts.group):
        slots.append(Slot(facts.name, facts.shape, offset, facts.group))
        offset += _round_up(facts.numel)
    numel = _round_up(offset, multiple)
    return UnitPlan(run[0].dtype, run[0].trainable, tuple(slots), numel, num_slices, blocks)


def _bytes(run: Sequence[ParameterFacts]) -> int:
    return sum(facts.numel for facts in run) * ITEM_BYTES.get(run[0].dtype, 1)


def _round_up(numel: int, multiple: int = ALIGN) -> int:
    return -(-numel // multiple) * multiple
