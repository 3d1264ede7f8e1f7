"""Units: which parameters travel together, and where each lies in its unit's flat buffers.

`cut_units` is called once with facts about a module; the state engine allocates exactly what it
says. It sees names, shapes and types as plain data, never a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from sixfold.base.errors import PlanError
from sixfold.base.units import item_bytes
from sixfold.plan.places import Place

ALIGN = 32
"""Elements to which every parameter's place is rounded up: 64 bytes in the narrowest type."""

TARGET_BYTES = 8 * 2**20
"""Neighbouring blocks share a unit up to this size: smaller units pay latency, larger ones leave
less to overlap with backward."""


MAX_PADDING = 0.125
"""Part that a unit of whole parameters may grow by, where the model has enough of them to avoid more."""


@dataclass(frozen=True)
class ParameterFacts:
    """What the plan needs to know of one parameter.

    Args:
        name: its first name in the module.
        shape: its shape on this rank.
        dtype: its working type.
        trainable: whether it gets gradients.
        group: the optimizer group it belongs to.
        block: name of the repeated block that holds it, None outside of them.
        whole: whether its optimizer needs it in one piece, so that no slice may cut it.
        stage: the stage of the pipeline that holds it here.
        tied: all stages that hold it, where these are several.
        place: which piece of it this rank has, where an axis of the mesh cuts it or its gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    group: int = 0
    block: str | None = None
    whole: bool = False
    stage: int = 0
    tied: tuple[int, ...] = ()
    place: Place | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def placed(facts: Sequence[ParameterFacts], places: Mapping[str, Place]) -> list[ParameterFacts]:
    """Facts of this rank's pieces, from those of whole parameters.

    Raises:
        PlanError: an optimizer needs in one piece what an axis cuts.
    """
    found = []
    for each in facts:
        place = places.get(each.name)
        if place is None:
            found.append(each)
            continue
        if each.whole and place.axes:
            raise PlanError(
                f"{each.name} is cut along {' and '.join(place.axes)}, and its optimizer updates it as a "
                "whole matrix",
                rule="an optimizer of whole matrices needs each of them on one rank",
                fix='set optimizer.name = "adamw", or make the axis 1',
            )
        found.append(replace(each, shape=place.piece, place=place))
    return found


@dataclass(frozen=True)
class Slot:
    """One parameter's place: elements [offset, offset + numel) of its unit.

    Args:
        shape: on this rank.
        place: which piece of the parameter that is; None for all of it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    group: int
    place: Place | None = None

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the parameter, wherever its pieces are."""
        return self.place.shape if self.place else self.shape

    def runs(self, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """See `Place.runs`."""
        return self.place.runs(start, stop) if self.place else [(start, start, stop - start)]


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
        whole: whether every parameter lies in one slice, owned by that slice's rank.
        stage: the stage of the pipeline that all its parameters belong to.
        tied: all stages that hold them, where these are several.
        cut: axes of the mesh along which other ranks have other pieces of all its parameters.
        partial: axes over which gradients are summed beside those that replicas stand along.
    """

    dtype: str
    trainable: bool
    slots: tuple[Slot, ...]
    numel: int
    num_slices: int = 1
    blocks: tuple[str, ...] = ()
    whole: bool = False
    stage: int = 0
    tied: tuple[int, ...] = ()
    cut: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()

    @property
    def is_copy(self) -> bool:
        """Whether an earlier stage holds the same parameters."""
        return bool(self.tied) and self.stage != self.tied[0]

    def slice_of(self, index: int) -> tuple[int, int]:
        """(start, stop) of one of the `num_slices` equal, contiguous slices."""
        size = self.numel // self.num_slices
        return index * size, (index + 1) * size

    @cached_property
    def gaps(self) -> list[tuple[int, int]]:
        """(start, stop) of what belongs to no parameter."""
        ends = [slot.offset + slot.numel for slot in self.slots]
        starts = [*(slot.offset for slot in self.slots[1:]), self.numel]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    def segments(self) -> list[tuple[int, int, int]]:
        """(group, start, stop) of contiguous runs of one optimizer group, in order; one run for each group
        unless parameters are whole."""
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
    cut_apart: Mapping[tuple[str, ...], tuple[int, int]] | None = None,
    by_block: bool = False,
) -> tuple[UnitPlan, ...]:
    """Cut parameters, given in module order, into units in that order.

    A unit holds one (dtype, trainable, whole, stage, tied, cut, partial) kind; what other stages hold as well
    is cut alike there. Parameters of one block stay together; neighbouring
    blocks are joined until `target_bytes` of working parameters are reached; whole ones further, until
    they can be shared out over the slices with little padding. Every parameter has exactly one slot.

    Args:
        num_slices: see UnitPlan.
        num_pieces: equal pieces that a unit is padded to, a multiple of num_slices: groups sum what they
            share by pieces.
        cut_apart: other such numbers, of slices and pieces, by the axes that cut the parameters themselves.
        by_block: never put parameters of blocks and others into one unit, so that units can come and go
            with their blocks.
    """
    apart = cut_apart or {}

    def layout_of(run: _Run) -> _Layout:
        slices, pieces = apart.get(run[0].place.axes if run[0].place else (), (num_slices, num_pieces))
        return _Layout(slices, ALIGN * pieces // slices, by_block)

    parameters = list(parameters)
    sizes: Counter[tuple[Kind, str]] = Counter()
    for facts in parameters:
        sizes[_kind(facts, by_block), facts.block or facts.name] += _bytes([facts])
    open_runs: dict[Kind, _Run] = {}
    done: dict[Kind, list[_Run]] = {}
    order: dict[int, int] = {}
    for place, facts in enumerate(parameters):
        kind = _kind(facts, by_block)
        run = open_runs.setdefault(kind, [])
        starts_block = not run or facts.block is None or run[-1].block != facts.block
        coming = sizes[kind, facts.block or facts.name]
        is_full = run and starts_block and _bytes(run) + coming > target_bytes
        if is_full and layout_of(run).is_tight(run):
            done.setdefault(kind, []).append(run)
            run = open_runs[kind] = []
        if not run:
            order[id(run)] = place
        run.append(facts)
    for kind, rest in open_runs.items():
        runs = done.setdefault(kind, [])
        if runs and not layout_of(rest).is_tight(rest):
            runs[-1] += rest
        else:
            runs.append(rest)
    all_runs = [run for runs in done.values() for run in runs]
    return tuple(layout_of(run).unit(run) for run in sorted(all_runs, key=lambda run: order[id(run)]))


Kind = tuple[str, bool, bool, bool, int, tuple[int, ...], tuple[str, ...], tuple[str, ...]]


def _kind(facts: ParameterFacts, by_block: bool) -> Kind:
    in_block = by_block and facts.block is not None
    place = facts.place or Place(facts.shape)
    kind = (facts.dtype, facts.trainable, facts.whole, in_block, facts.stage, facts.tied)
    return (*kind, place.axes, place.partial)


_Run = list[ParameterFacts]


@dataclass(frozen=True)
class _Layout:
    """How a run of parameters becomes a unit of equal slices.

    Args:
        num_slices: slices of every unit.
        multiple: elements that the size of a slice is a multiple of.
        by_block: whether units know their blocks.
    """

    num_slices: int
    multiple: int
    by_block: bool

    def unit(self, run: _Run) -> UnitPlan:
        slots: list[Slot] = []
        size = self._size(run)
        for index, members in enumerate(self._bins(run)):
            offset = index * size
            for facts in sorted(members, key=lambda facts: facts.group):
                slots.append(Slot(facts.name, facts.shape, offset, facts.group, facts.place))
                offset += _round_up(facts.numel)
        blocks = tuple(dict.fromkeys(facts.block for facts in run if facts.block is not None))
        return UnitPlan(
            run[0].dtype,
            run[0].trainable,
            tuple(slots),
            numel=size * self.num_slices,
            num_slices=self.num_slices,
            blocks=blocks if self.by_block else (),
            whole=run[0].whole,
            stage=run[0].stage,
            tied=run[0].tied,
            cut=run[0].place.axes if run[0].place else (),
            partial=run[0].place.partial if run[0].place else (),
        )

    def is_tight(self, run: _Run) -> bool:
        """Whether keeping parameters whole costs little padding."""
        if not run[0].whole:
            return True
        return self._size(run) * self.num_slices <= (1 + MAX_PADDING) * _numel(run)

    def _size(self, run: _Run) -> int:
        """Elements of one slice."""
        bins = self._bins(run)
        share = max(map(_numel, bins)) if len(bins) > 1 else -(-_numel(run) // self.num_slices)
        return _round_up(share, self.multiple)

    def _bins(self, run: _Run) -> list[_Run]:
        """Who lies in which slice; one bin where slices may cut parameters.

        Largest first, each to the rank that has least: at most the largest parameter above equal shares
        (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969).
        """
        if not run[0].whole or self.num_slices == 1:
            return [run]
        bins: list[_Run] = [[] for _ in range(self.num_slices)]
        loads = [0] * self.num_slices
        for facts in sorted(run, key=lambda facts: -facts.numel):
            lightest = loads.index(min(loads))
            bins[lightest].append(facts)
            loads[lightest] += _round_up(facts.numel)
        return bins


def _numel(run: Sequence[ParameterFacts]) -> int:
    return sum(_round_up(facts.numel) for facts in run)


def _bytes(run: Sequence[ParameterFacts]) -> int:
    return sum(facts.numel for facts in run) * item_bytes(run[0].dtype)


def _round_up(numel: int, multiple: int = ALIGN) -> int:
    return -(-numel // multiple) * multiple
