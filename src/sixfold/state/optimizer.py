"""Torch optimizers over flat units.

The user's optimizers stay the same objects: their groups are pointed at contiguous runs of the master
buffers (`runs.py`), settings per group kept. Bound once by the engine; the player calls `step`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.base.errors import StateError
from sixfold.parallel import torch_name, torch_type
from sixfold.parallel.pieces import runs_of
from sixfold.plan import Slot
from sixfold.state.average import Average
from sixfold.state.elementwise import ELEMENTWISE
from sixfold.state.flat import range_in, zero_between
from sixfold.state.making import kind_of
from sixfold.state.runs import Run, StatePiece, pieces_of, runs_in
from sixfold.state.slice_state import SliceState
from sixfold.state.state import ModelState


class BoundOptimizer:
    """Torch optimizers whose groups point at master buffers; groups count through all of them.

    Args:
        inners: the torch optimizers, the user's own objects.
        runs: what they update.
        state: whose masters these are; its mesh tells everyone which state there is.
        average: of the masters, where one is kept.

    Attributes:
        base_lrs: each group's peak learning rate.
    """

    def __init__(
        self, inners: Sequence[Optimizer], runs: list[Run], state: ModelState, average: Average | None
    ) -> None:
        self.inners = tuple(inners)
        self._runs = runs
        self._state = state
        self.average = average
        self._is_stepping = False
        self._left: dict[Optimizer, Mapping[Any, Any]] = {}
        self._bound = {inner: _ids_in(inner) for inner in inners}
        for inner in inners:
            inner.register_step_pre_hook(self._before_step)
            inner.register_load_state_dict_pre_hook(_before_loading)
        self.base_lrs = [float(group["lr"]) for group in self._groups()]
        self._lrs = list(self.base_lrs)

    def guard(self) -> None:
        """Have the optimizers refuse state by parameter; again, where theirs was replaced.

        Raises:
            StateError: there is some of a parameter, or an optimizer keeps its state elsewhere.
        """
        for inner in self.inners:
            if self._left.get(inner):
                raise _keeps_elsewhere(inner, "was written into the dictionary it had before initialize")
            state = inner.state
            if isinstance(state, SliceState):
                continue
            guarded = SliceState.guarding(state, self._state.known)
            with suppress(AttributeError):  # a property without a setter
                inner.state = guarded
            if inner.state is not guarded:
                raise _keeps_elsewhere(inner, "is not what it was set to")
            # Who fills what was left empty has another name for it: a wrapper's inner optimizer.
            self._left[inner] = {} if state else state

    @property
    def kind(self) -> str:
        """What a checkpoint's state belongs to."""
        return kind_of(self.inners)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for inner in self.inners for group in inner.param_groups]

    def step(self) -> None:
        """Update the master buffers from the reduced gradients.

        Raises:
            StateError: one of them is not whole; see `GradientSums.check_whole`.
        """
        self._state.sums.check_whole()
        self.guard()
        for run in self._runs:
            grad = run.grad
            run.tensor.grad = grad if grad.dtype == run.tensor.dtype else grad.to(run.tensor.dtype)
        self._is_stepping = True
        try:
            for inner in self.inners:
                inner.step()
        finally:
            self._is_stepping = False
            self.guard()
        for run in self._runs:
            run.tensor.grad = None
        if self.average is not None:
            self.average.update()

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not self._is_stepping:
            raise _steps_apart(optimizer, "called alone")
        self._check_groups(optimizer)

    def _check_groups(self, optimizer: Optimizer) -> None:
        groups = _ids_in(optimizer)
        if groups == self._bound[optimizer]:
            return
        held, bound = (set(chain.from_iterable(ids)) for ids in (groups, self._bound[optimizer]))
        raise _steps_apart(
            optimizer,
            f"{len(held - bound)} tensor(s) were added to it, {len(bound - held)} taken out; "
            f"it has {len(groups)} group(s) of {len(self._bound[optimizer])}",
        )

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` of its peak.

        Raises:
            StateError: somebody else has set one, which would be lost; or has changed the groups.
        """
        for inner in self.inners:
            self._check_groups(inner)
        found = [float(group["lr"]) for group in self._groups()]
        if found != self._lrs:
            raise StateError(
                f"learning rates {found} of the optimizer's groups, where {self._lrs} were set",
                rule="a schedule that moves sets the rate of each group before every update",
                fix='leave them to it, or set lr_schedule.name = "constant" and lr_schedule.warmup_steps = 0 '
                'and change group["lr"] yourself',
            )
        self._lrs = [base * factor for base in self.base_lrs]
        for group, lr in zip(self._groups(), self._lrs, strict=True):
            group["lr"] = lr

    @property
    def clip_norms(self) -> list[float | None]:
        """Each group's own bound on its gradient norm; None where the global one holds."""
        bounds = []
        for inner in self.inners:
            for group in inner.param_groups:
                bounds.append(group.get("clip_norm"))
        return bounds

    @property
    def lr(self) -> float:
        """Learning rate of the first group."""
        return float(self._groups()[0]["lr"])

    def state_specs(self) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        """State that any rank has: parameter -> key -> (global shape, type), the same on every rank.

        A collective where state is cut, of names alone: which keys there are may differ from group to
        group, and a group may lie on other ranks alone. Numbers for a whole tensor (a step count) stand
        under every parameter of their run. Parameters without elements have no state.

        Raises:
            StateError: as of `guard`.
        """
        self.guard()
        rows: Iterable[tuple[str, int, str, str, Sequence[int] | None]] = {
            (
                run.slots[0].name,
                len(run.slots),
                key,
                torch_name(value.dtype),
                None if value.shape == run.tensor.shape else tuple(value.shape),
            )
            for run in self._runs
            for key, value in run.state().items()
        }
        if any(unit.spread for unit in self._state.trained) or self._state.mesh.geometry.cuts_model:
            texts = self._state.mesh.texts(json.dumps(list(rows)))
            rows = [tuple(row) for text in texts for row in json.loads(text)]
        specs: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        catalog = self._state.catalog
        firsts = {name: (unit, place) for unit in catalog.units for place, name in enumerate(unit)}
        order = {name: number for number, name in enumerate(firsts)}
        for first, count, key, dtype, shape in sorted(rows, key=lambda row: (order[row[0]], row[2:4])):
            names, place = firsts[first]
            for entry in (catalog.entries[name] for name in names[place : place + count]):
                if entry.numel:
                    whole = entry.shape if shape is None else tuple(shape)
                    specs.setdefault(entry.name, {})[key] = (whole, torch_type(dtype))
        return specs

    def state_pieces(self) -> Iterator[StatePiece]:
        """What this rank writes of its state; over all ranks every element of `state_specs` once."""
        for run in self._runs:
            share = run.unit.share
            for key, value in run.state().items():
                for slot in filter(lambda slot: slot.numel, run.slots):
                    if value.shape != run.tensor.shape:
                        # Once for a parameter: where its first element is.
                        if share.start <= slot.offset < share.stop and next(iter(slot.runs(0, 1)))[0] == 0:
                            yield slot.name, key, 0, value
                        continue
                    start = max(slot.offset, run.start, share.start)
                    stop = min(slot.offset + slot.numel, run.stop, share.stop)
                    if start < stop:
                        part = value.reshape(-1)[start - run.start : stop - run.start]
                        for first, each in runs_of(slot, start - slot.offset, part):
                            yield slot.name, key, first, each

    def live_bytes(self) -> int:
        """Bytes of state with one number per weight."""
        return sum(
            value.untyped_storage().nbytes()
            for run in self._runs
            for value in run.state().values()
            if value.shape == run.tensor.shape
        )

    def blank_state(
        self, specs: Mapping[str, Mapping[str, tuple[Sequence[int], torch.dtype]]]
    ) -> tuple[dict[nn.Parameter, dict[str, torch.Tensor]], list[StatePiece]]:
        """Host memory for this rank's state of given names, shapes and types.

        Returns:
            What `adopt_state` takes, and its pieces, through which the numbers come in.
        """
        state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        pieces: list[StatePiece] = []
        of_group = {slot.group: slot for run in self._runs for slot in run.slots if slot.name in specs}
        for run in self._runs:
            slots = [slot for slot in run.slots if slot.name in specs]
            # Of parameters without elements nothing is saved; torch wants state of all of a group or of none.
            alike = slots or [of_group[slot.group] for slot in run.slots[:1] if slot.group in of_group]
            for key, (shape, dtype) in specs[alike[0].name].items() if alike else ():
                if _per_tensor(key, specs, alike):
                    flat = torch.empty(tuple(shape), dtype=dtype)
                    pieces.append((alike[0].name, key, 0, flat))
                else:
                    flat = torch.empty(run.tensor.shape, dtype=dtype)
                    mine = list(pieces_of(run, slots, key, flat.view(-1)))
                    zero_between(flat.view(-1), [range_in(flat, part) for *_, part in mine])
                    pieces += mine
                state.setdefault(run.tensor, {})[key] = flat
        return state, pieces

    def adopt_state(self, state: Mapping[nn.Parameter, Mapping[str, torch.Tensor]]) -> None:
        """Replace all state by what `blank_state` made."""
        for inner in self.inners:
            inner.state.clear()
            for group in inner.param_groups:
                # Torch keeps a count of updates on the host unless the update itself counts.
                counts_on_host = not (group.get("fused") or group.get("capturable"))
                for tensor in group["params"]:
                    if tensor in state:
                        inner.state[tensor] = {
                            key: value if key == "step" and counts_on_host else value.to(tensor.device)
                            for key, value in state[tensor].items()
                        }

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
        self._lrs = [float(group["lr"]) for group in self._groups()]


def _ids_in(optimizer: Optimizer) -> list[list[int]]:
    return [list(map(id, group["params"])) for group in optimizer.param_groups]


def _steps_apart(optimizer: Optimizer, what: str) -> StateError:
    return StateError(
        f"{type(optimizer).__name__}.step(): {what}",
        rule="the engine steps the optimizer it was given, over the parameters it had then: slices "
        "of flat buffers now",
        fix="call engine.step() after engine.backward(loss), or engine.train_step(batch); add "
        'parameter groups before sixfold.initialize, and leave their "params" alone afterwards',
    )


def _keeps_elsewhere(optimizer: Optimizer, what: str) -> StateError:
    return StateError(
        f"the state of {type(optimizer).__name__} {what}",
        rule="the engine puts a dictionary of its own in the place of optimizer.state: what is kept "
        "elsewhere would be missing in checkpoints",
        fix="let `state` be a plain attribute that the optimizer reads anew in every step, as torch's do; a "
        "wrapper around another optimizer cannot share the state of that one",
    )


def _before_loading(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    held = [len(group["params"]) for group in optimizer.param_groups]
    given = [len(group["params"]) for group in state_dict["param_groups"]]
    if held != given:
        raise StateError(
            f"{type(optimizer).__name__}.load_state_dict() with groups of {given} tensor(s); here are {held}",
            rule="the optimizer of an engine updates slices of flat buffers, not parameters one by one",
            fix="save with engine.save(folder), and bring state back with engine.load(folder)",
        )


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
        if parameter in names  # others stand on other stages
    }
    owners = [inner for inner in inners for _ in inner.param_groups]
    runs = [run for unit in state.trained for run in runs_in(unit, owners)]
    groups = [(inner, group) for inner in inners for group in inner.param_groups]
    for index, (inner, group) in enumerate(groups):
        group["params"] = [run.tensor for run in runs if run.slots[0].group == index]
        if type(inner) in ELEMENTWISE and _may_fuse(inner, group):
            group["fused"] = True
    average = Average(state.trained, ema_decay) if ema_decay is not None else None
    bound = BoundOptimizer(inners, runs, state, average)
    for inner in inners:
        inner.state.clear()
    bound.guard()
    blank, pieces = bound.blank_state(
        {
            name: {key: (value.shape, value.dtype) for key, value in values.items()}
            for name, values in initial.items()
            if values
        }
    )
    for name, key, start, part in pieces:
        part.view(-1).copy_(initial[name][key].reshape(-1)[start : start + part.numel()])
    bound.adopt_state(blank)
    return bound


def _is_plain(value: object) -> bool:
    kinds = (int, float, str, bool, type(None))
    return isinstance(value, kinds) or (
        isinstance(value, tuple) and all(isinstance(item, kinds) for item in value)
    )


def _per_tensor(
    key: str, specs: Mapping[str, Mapping[str, tuple[Sequence[int], torch.dtype]]], slots: Sequence[Slot]
) -> bool:
    # One number for a whole tensor, such as torch's count of updates under "step"; the name only
    # decides where the shapes cannot, in a run of nothing but 0-d parameters.
    shaped = all(tuple(specs[slot.name][key][0]) == slot.whole_shape for slot in slots)
    return not shaped or (key == "step" and all(slot.shape == () for slot in slots))


def _may_fuse(inner: Optimizer, group: dict[str, Any]) -> bool:
    # Only where the user left the choice to torch: one fused pass over a flat tensor runs at the
    # speed of memory, the default loop several times slower.
    undecided = "fused" in inspect.signature(type(inner).__init__).parameters and group.get("fused") is None
    blocked = any(group.get(key) for key in ("foreach", "capturable", "differentiable", "maximize"))
    tensor_lr = isinstance(group.get("lr"), torch.Tensor)
    return undecided and not blocked and not tensor_lr
