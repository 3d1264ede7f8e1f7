"""Torch optimizers over flat units.

The user's optimizers stay the same objects: their groups are pointed at contiguous runs of the master
buffers, settings per group kept. Where the plan lets slices cut parameters a group gets one tensor per
unit; where it keeps them whole, each parameter that this rank owns. Bound once by the engine; the player
calls `step`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.base.errors import StateError
from sixfold.mesh import Mesh
from sixfold.plan import Slot
from sixfold.state.average import EMA, Average
from sixfold.state.elementwise import ELEMENTWISE
from sixfold.state.making import kind_of
from sixfold.state.parcels import exchange
from sixfold.state.state import ModelState
from sixfold.state.unit import Unit


@dataclass(frozen=True)
class _Run:
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

    def state(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps for it."""
        state = self.optimizer.state.get(self.tensor, {})
        return {key: torch.as_tensor(value) for key, value in state.items() if value is not None}


class BoundOptimizer:
    """Torch optimizers whose groups point at master buffers; groups count through all of them.

    Args:
        inners: the torch optimizers, the user's own objects.
        runs: what they update.
        state: whose masters these are; its mesh gathers cut state for a checkpoint.
        average: of the masters, where one is kept.
        base_lrs: each group's peak learning rate.
    """

    def __init__(
        self, inners: Sequence[Optimizer], runs: list[_Run], state: ModelState, average: Average | None
    ) -> None:
        self.inners = tuple(inners)
        self._runs = runs
        self._mesh: Mesh = state.mesh
        self._units = state.trained
        self.average = average
        self._is_stepping = False
        for inner in inners:
            inner.register_step_pre_hook(self._before_step)
        self.base_lrs = [float(group["lr"]) for group in self._groups()]

    @property
    def kind(self) -> str:
        """What a checkpoint's state belongs to."""
        return kind_of(self.inners)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for inner in self.inners for group in inner.param_groups]

    def step(self) -> None:
        """Update the master buffers from the reduced gradients."""
        for run in self._runs:
            grads = run.unit.grads
            assert grads is not None, "only trainable units are bound"
            grad = run.part_of(grads)
            run.tensor.grad = grad if grad.dtype == run.tensor.dtype else grad.to(run.tensor.dtype)
        self._is_stepping = True
        try:
            for inner in self.inners:
                inner.step()
        finally:
            self._is_stepping = False
        for run in self._runs:
            run.tensor.grad = None
        if self.average is not None:
            self.average.update()

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        bound = sum(run.optimizer is optimizer for run in self._runs)
        if not self._is_stepping or held != bound:
            what = f"{held - bound} tensor(s) were added to it" if self._is_stepping else "called alone"
            raise StateError(
                f"{type(optimizer).__name__}.step(): {what}",
                rule="the engine steps the optimizer it was given, over the parameters it had then",
                fix="call engine.step() after engine.backward(loss), or engine.train_step(batch); add "
                "parameter groups before sixfold.initialize",
            )

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` of its peak."""
        for group, base in zip(self._groups(), self.base_lrs, strict=True):
            group["lr"] = base * factor

    @property
    def clip_norms(self) -> list[float | None]:
        """Each group's own bound on its gradient norm; None where the global one holds."""
        return [group.get("clip_norm") for group in self._groups()]

    @property
    def lr(self) -> float:
        """Learning rate of the first group."""
        return float(self._groups()[0]["lr"])

    def named_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Optimizer state and averages by parameter name and key, in the parameters' own shapes.

        Scalars (a step count) stand under every parameter of their run. A collective where state is cut;
        elsewhere views, not copies.
        """
        named: dict[str, dict[str, torch.Tensor]] = {}
        cut = [run for run in self._runs if run.unit.spread and not run.unit.plan.whole]
        for unit, key, slots, whole in self._gathered(cut):
            for slot, is_scalar in slots:
                place = min(slot.offset, whole.numel() - 1)
                value = whole[place] if is_scalar else unit.slot_of(whole, slot)
                named.setdefault(slot.name, {})[key] = value
        for run in (run for run in self._runs if not run.unit.spread):
            for key, value in run.state().items():
                for slot in run.slots:
                    named.setdefault(slot.name, {})[key] = _part(run, slot, value)
        named |= self._owned()
        for name, numbers in (self.average.named() if self.average is not None else {}).items():
            named.setdefault(name, {})[EMA] = numbers
        return named

    def _owned(self) -> dict[str, dict[str, torch.Tensor]]:
        """State of parameters that each lie on one rank, of any shape, from their owners."""
        spread = next((unit.spread for unit in self._units if unit.plan.whole), ())
        if not spread:
            return {}
        mine = {run.slots[0].name: run.state() for run in self._runs if run.unit.plan.whole}
        return exchange(self._mesh, spread, mine)

    def _gathered(
        self, runs: list[_Run]
    ) -> Iterator[tuple[Unit, str, list[tuple[Slot, bool]], torch.Tensor]]:
        """Each unit's state under each key, [numel]; with it the slots that have it, and which as a scalar.

        Which keys there are may differ from group to group, and a group may lie on other ranks alone; so
        ranks agree first. A scalar travels as a run of itself.
        """
        index = {unit: number for number, unit in enumerate(dict.fromkeys(run.unit for run in runs))}
        mine = {
            (
                index[run.unit],
                key,
                str(value.dtype).removeprefix("torch."),
                run.slots[0].group,
                not value.dim(),
            )
            for run in runs
            for key, value in run.state().items()
        }
        texts = self._mesh.texts(json.dumps(sorted(mine))) if index else []
        everyones = sorted({tuple(row) for text in texts for row in json.loads(text)})
        for unit, number in index.items():
            for key, dtype in dict.fromkeys(row[1:3] for row in everyones if row[0] == number):
                part = torch.zeros_like(unit.master, dtype=getattr(torch, dtype))
                for run in runs:
                    value = run.state().get(key) if run.unit is unit else None
                    if value is not None:
                        run.part_of(part).copy_(value)
                kinds = {row[3]: row[4] for row in everyones if row[:3] == (number, key, dtype)}
                slots = [(slot, kinds[slot.group]) for slot in unit.plan.slots if slot.group in kinds]
                yield unit, key, slots, unit.whole_of(part)

    def live_bytes(self) -> int:
        """Bytes of state with one number per weight."""
        return sum(
            value.untyped_storage().nbytes()
            for run in self._runs
            for value in run.state().values()
            if value.shape == run.tensor.shape
        )

    def load_named_state(self, named: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Inverse of `named_state`.

        Raises:
            StateError: a parameter has no entry, while others of its group have; on every rank.
        """
        if self.average is not None:
            self.average.load({name: state[EMA] for name, state in named.items() if EMA in state})
        kept = {name: {key: each for key, each in named[name].items() if key != EMA} for name in named}
        named = {name: state for name, state in kept.items() if state}
        slots = [slot for unit in dict.fromkeys(run.unit for run in self._runs) for slot in unit.plan.slots]
        with_state = {slot.group for slot in slots if slot.name in named}
        missing = [slot.name for slot in slots if slot.group in with_state and slot.name not in named]
        if missing:
            raise StateError(
                f"no optimizer state for {len(missing)} parameter(s): {', '.join(missing[:8])}",
                rule="a checkpoint holds optimizer state for every parameter of a group or for none",
                fix="load a checkpoint of the same model, or train on from its weights alone",
            )
        for inner in self.inners:
            inner.state.clear()
        for run in (run for run in self._runs if run.slots[0].group in with_state):
            state: dict[str, torch.Tensor] = {}
            for key, first in named[run.slots[0].name].items():
                if _per_tensor(key, named, run):
                    state[key] = first.clone()
                    continue
                whole = torch.zeros(run.tensor.shape, dtype=first.dtype, device=run.tensor.device)
                for slot in run.slots:
                    _copy_overlap(run, slot, named[slot.name][key], whole)
                state[key] = whole
            run.optimizer.state[run.tensor] = state

    def settings(self) -> list[dict[str, Any]]:
        """Settings of each group that are plain numbers, texts or flags, and the peak learning rate."""
        return [
            {**{key: value for key, value in group.items() if _is_plain(value)}, "peak_lr": base}
            for group, base in zip(self._groups(), self.base_lrs, strict=True)
        ]

    def load_settings(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Inverse of `settings`, for as many groups; whoever loads a checkpoint has compared them before."""
        self.base_lrs = [float(settings["peak_lr"]) for settings in saved]
        for group, settings in zip(self._groups(), saved, strict=True):
            for key, value in settings.items():
                if key in group:
                    group[key] = tuple(value) if isinstance(group[key], tuple) else value


def bind(inners: Sequence[Optimizer], state: ModelState, ema_decay: float | None = None) -> BoundOptimizer:
    """Point the groups of all `inners` at the master buffers of `state`.

    State that a constructor made (torch's Adagrad does) moves along.

    Args:
        ema_decay: decay rate of the average to keep; None for none.
    """
    names: dict[torch.Tensor, str] = {
        parameter: slot.name
        for unit in state.trained
        for parameter, slot in zip(unit.parameters, unit.plan.slots, strict=True)
    }
    initial = {
        names[parameter]: {key: torch.as_tensor(value).clone() for key, value in values.items()}
        for inner in inners
        for parameter, values in inner.state.items()
    }
    owners = [inner for inner in inners for _ in inner.param_groups]
    runs = [run for unit in state.trained for run in _runs_of(unit, owners)]
    groups = [(inner, group) for inner in inners for group in inner.param_groups]
    for index, (inner, group) in enumerate(groups):
        group["params"] = [run.tensor for run in runs if run.slots[0].group == index]
        if type(inner) in ELEMENTWISE and _may_fuse(inner, group):
            group["fused"] = True
    average = Average(state.trained, ema_decay) if ema_decay is not None else None
    bound = BoundOptimizer(inners, runs, state, average)
    bound.load_named_state(initial)
    return bound


def _runs_of(unit: Unit, owners: Sequence[Optimizer]) -> Iterator[_Run]:
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
) -> _Run:
    view = unit.master[start - unit.own.start : stop - unit.own.start].view(shape)
    tensor = nn.Parameter(view, requires_grad=True)
    return _Run(unit, start, stop, tensor, slots, owners[slots[0].group])


def _part(run: _Run, slot: Slot, value: torch.Tensor) -> torch.Tensor:
    if value.shape != run.tensor.shape or run.tensor.shape == slot.shape:
        return value
    begin = slot.offset - run.start
    return value[begin : begin + slot.numel].view(slot.shape)


def _copy_overlap(run: _Run, slot: Slot, value: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy what the run holds of one parameter from `value`, in its shape, to `whole`, in the run's."""
    start, stop = max(slot.offset, run.start), min(slot.offset + slot.numel, run.stop)
    if start < stop:
        part = value.reshape(-1)[start - slot.offset : stop - slot.offset]
        whole.view(-1)[start - run.start : stop - run.start].copy_(part)


def _is_plain(value: object) -> bool:
    kinds = (int, float, str, bool, type(None))
    return isinstance(value, kinds) or (
        isinstance(value, tuple) and all(isinstance(item, kinds) for item in value)
    )


def _per_tensor(key: str, named: Mapping[str, Mapping[str, torch.Tensor]], run: _Run) -> bool:
    # One number for a whole tensor, such as torch's count of updates under "step"; the name only
    # decides where the shapes cannot, in a run of nothing but 0-d parameters.
    shaped = all(named[slot.name][key].shape == slot.shape for slot in run.slots)
    return not shaped or (key == "step" and all(slot.shape == () for slot in run.slots))


def _may_fuse(inner: Optimizer, group: dict[str, Any]) -> bool:
    # Only where the user left the choice to torch: one fused pass over a flat tensor runs at the
    # speed of memory, the default loop several times slower.
    undecided = "fused" in inspect.signature(type(inner).__init__).parameters and group.get("fused") is None
    blocked = any(group.get(key) for key in ("foreach", "capturable", "differentiable", "maximize"))
    tensor_lr = isinstance(group.get("lr"), torch.Tensor)
    return undecided and not blocked and not tensor_lr
