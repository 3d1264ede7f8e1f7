"""Any torch optimizer over flat units.

The user's optimizer stays the same object: its groups are pointed at contiguous runs of the master
buffers, settings per group kept. Elementwise optimizers get one tensor per unit and group; any
other gets each whole parameter. Called by the engine once; the player calls `step`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.base.errors import ConfigError, ModelError, StateError
from sixfold.config import OptimizerConfig
from sixfold.mesh import Mesh
from sixfold.plan import Slot
from sixfold.state.state import ModelState
from sixfold.state.unit import Unit

ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""Optimizers whose update of a number depends on that number's own history only."""

OptimizerLike = Optimizer | Callable[[Iterable[Any]], Optimizer]


def build_optimizer(asked: OptimizerConfig) -> Callable[[Iterable[Any]], Optimizer]:
    """A factory for the optimizer named in the configuration."""
    kinds: dict[str, type[Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
    }
    kind = kinds[asked.name]
    named: dict[str, Any] = asked.model_dump(exclude={"name", "clip_norm"}, exclude_none=True)

    def factory(parameters: Iterable[Any]) -> Optimizer:
        return kind(parameters, **named)

    return factory


def make_optimizer(optimizer: OptimizerLike, module: nn.Module) -> Optimizer:
    """The optimizer over `module`'s trainable parameters, before it is bound to units.

    Args:
        optimizer: an optimizer over parameters of `module`, or a factory that receives them.

    Raises:
        StateError: it already has state, or it misses or adds parameters.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    names = {parameter: name for name, parameter in module.named_parameters()}
    if not parameters:
        raise ModelError(
            f"{type(module).__name__} has {len(names)} parameter(s), none with requires_grad=True",
            rule="training changes at least one parameter",
            fix="set requires_grad=True on what is to be trained",
        )
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters)
    if not isinstance(made, Optimizer):
        raise ConfigError(
            f"the optimizer handed over made a {type(made).__name__}",
            rule="optimizer is a torch optimizer, or a function that returns one for the parameters it gets",
            fix="for example optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)",
        )
    held = {parameter for group in made.param_groups for parameter in group["params"]}
    if any(float(state.get("step", 1)) > 0 for state in made.state.values()):
        raise StateError(
            f"{type(made).__name__} already has state for {len(made.state)} tensor(s)",
            rule="the optimizer is handed over before its first step",
            fix="call sixfold.initialize before optimizer.step(), and engine.load to bring state back",
        )
    bounds = [group["clip_norm"] for group in made.param_groups if group.get("clip_norm") is not None]
    if not all(isinstance(bound, int | float) and 0 < bound < math.inf for bound in bounds):
        raise ConfigError(
            f"parameter groups with clip_norm = {', '.join(map(repr, bounds))}",
            rule="a group's own clip_norm is a positive number, the bound on the norm of its gradients",
            fix="for example {'params': ..., 'clip_norm': 0.5}, or leave it out for optimizer.clip_norm",
        )
    strangers = len(held - set(names))
    missing = [names[parameter] for parameter in parameters if parameter not in held]
    if strangers or missing:
        raise StateError(
            f"{type(made).__name__} holds {strangers} tensor(s) that are not parameters of "
            f"{type(module).__name__} and misses {len(missing)} of its trainable ones "
            f"({', '.join(missing[:4])})",
            rule="the optimizer updates exactly the parameters with requires_grad=True",
            fix="build it over model.parameters(), and set requires_grad=False on what stays fixed; for a "
            "model on meta, whose parameters are made anew, pass a factory: optimizer=torch.optim.AdamW",
        )
    return made


@dataclass(frozen=True)
class _Run:
    """A contiguous run of one unit's master that the optimizer sees as one tensor.

    Args:
        start: its first element, counted from the beginning of the unit.
        stop: behind its last one.
        slots: parameters of the same unit and group, whether or not they lie in this rank's run.
    """

    unit: Unit
    start: int
    stop: int
    tensor: nn.Parameter
    slots: tuple[Slot, ...]

    def part_of(self, mine: torch.Tensor) -> torch.Tensor:
        """The run's own part of `mine`, which covers what this rank has of the unit."""
        offset = self.unit.own.start
        return mine[self.start - offset : self.stop - offset].view(self.tensor.shape)


class BoundOptimizer:
    """A torch optimizer whose groups point at master buffers.

    Args:
        inner: the torch optimizer, the user's own object.
        runs: what it updates, by group.
        mesh: over which cut state is gathered for a checkpoint.
        base_lrs: each group's peak learning rate.
    """

    def __init__(self, inner: Optimizer, runs: list[_Run], mesh: Mesh) -> None:
        self.inner = inner
        self._runs = runs
        self._mesh = mesh
        self._is_stepping = False
        inner.register_step_pre_hook(self._before_step)
        self.base_lrs = [float(group["lr"]) for group in inner.param_groups]

    def step(self) -> None:
        """Update the master buffers from the reduced gradients."""
        for run in self._runs:
            grads = run.unit.grads
            assert grads is not None, "only trainable units are bound"
            grad = run.part_of(grads)
            run.tensor.grad = grad if grad.dtype == run.tensor.dtype else grad.to(run.tensor.dtype)
        self._is_stepping = True
        try:
            self.inner.step()
        finally:
            self._is_stepping = False
        for run in self._runs:
            run.tensor.grad = None

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        if not self._is_stepping or held != len(self._runs):
            what = (
                f"{held - len(self._runs)} tensor(s) were added to it"
                if self._is_stepping
                else "called alone"
            )
            raise StateError(
                f"{type(optimizer).__name__}.step(): {what}",
                rule="the engine steps the optimizer it was given, over the parameters it had then",
                fix="call engine.step() after engine.backward(loss), or engine.train_step(batch); add "
                "parameter groups before sixfold.initialize",
            )

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` of its peak."""
        for group, base in zip(self.inner.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    @property
    def clip_norms(self) -> list[float | None]:
        """Each group's own bound on its gradient norm; None where the global one holds."""
        return [group.get("clip_norm") for group in self.inner.param_groups]

    @property
    def lr(self) -> float:
        """Learning rate of the first group."""
        return float(self.inner.param_groups[0]["lr"])

    def named_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Optimizer state by parameter name and key, in the parameters' own shapes.

        Scalars (a step count) stand under every parameter of their run. A collective where state is cut;
        elsewhere views, not copies.
        """
        named: dict[str, dict[str, torch.Tensor]] = {}
        cut = [run for run in self._runs if run.unit.spread]
        for unit, key, slots, whole in self._gathered(cut):
            for slot, is_scalar in slots:
                place = min(slot.offset, whole.numel() - 1)
                value = whole[place] if is_scalar else unit.slot_of(whole, slot)
                named.setdefault(slot.name, {})[key] = value
        for run in (run for run in self._runs if not run.unit.spread):
            for key, value in self.inner.state.get(run.tensor, {}).items():
                for slot in run.slots:
                    named.setdefault(slot.name, {})[key] = _part(run, slot, torch.as_tensor(value))
        return named

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
            for key, value in self._state_of(run)
        }
        texts = self._mesh.texts(json.dumps(sorted(mine))) if runs else []
        everyones = sorted({tuple(row) for text in texts for row in json.loads(text)})
        for unit, number in index.items():
            for key, dtype in dict.fromkeys(row[1:3] for row in everyones if row[0] == number):
                part = torch.zeros_like(unit.master, dtype=getattr(torch, dtype))
                for run in runs:
                    value = dict(self._state_of(run)).get(key) if run.unit is unit else None
                    if value is not None:
                        run.part_of(part).copy_(value)
                kinds = {row[3]: row[4] for row in everyones if row[:3] == (number, key, dtype)}
                slots = [(slot, kinds[slot.group]) for slot in unit.plan.slots if slot.group in kinds]
                yield unit, key, slots, unit.whole_of(part)

    def _state_of(self, run: _Run) -> list[tuple[str, torch.Tensor]]:
        state = self.inner.state.get(run.tensor, {})
        return [(key, torch.as_tensor(value)) for key, value in state.items() if value is not None]

    def live_bytes(self) -> int:
        """Bytes of state with one number per weight."""
        return sum(
            value.untyped_storage().nbytes()
            for run in self._runs
            for _, value in self._state_of(run)
            if value.shape == run.tensor.shape
        )

    def load_named_state(self, named: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Inverse of `named_state`.

        Raises:
            StateError: a parameter has no entry, while others of its group have; on every rank.
        """
        slots = [slot for unit in dict.fromkeys(run.unit for run in self._runs) for slot in unit.plan.slots]
        with_state = {slot.group for slot in slots if slot.name in named}
        missing = [slot.name for slot in slots if slot.group in with_state and slot.name not in named]
        if missing:
            raise StateError(
                f"no optimizer state for {len(missing)} parameter(s): {', '.join(missing[:8])}",
                rule="a checkpoint holds optimizer state for every parameter of a group or for none",
                fix="load a checkpoint of the same model, or train on from its weights alone",
            )
        self.inner.state.clear()
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
            self.inner.state[run.tensor] = state

    def settings(self) -> list[dict[str, Any]]:
        """Settings of each group that are plain numbers, texts or flags, and the peak learning rate."""
        return [
            {**{key: value for key, value in group.items() if _is_plain(value)}, "peak_lr": base}
            for group, base in zip(self.inner.param_groups, self.base_lrs, strict=True)
        ]

    def load_settings(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Inverse of `settings`, for as many groups; whoever loads a checkpoint has compared them before."""
        self.base_lrs = [float(settings["peak_lr"]) for settings in saved]
        for group, settings in zip(self.inner.param_groups, saved, strict=True):
            for key, value in settings.items():
                if key in group:
                    group[key] = tuple(value) if isinstance(group[key], tuple) else value


def bind(inner: Optimizer, state: ModelState) -> BoundOptimizer:
    """Point the groups of `inner` at the master buffers of `state`.

    State that a constructor made (torch's Adagrad does) moves along.

    Raises:
        StateError: optimizer state is cut, and the optimizer is not known to be elementwise.
    """
    elementwise = type(inner) in ELEMENTWISE
    if not elementwise and state.residency.optimizer:
        raise StateError(
            f"{type(inner).__name__} with optimizer state cut over {'+'.join(state.residency.optimizer)}",
            rule="an optimizer on slices must be elementwise, and of torch.optim's own classes these are: "
            f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}",
            fix="use one of these, or set layout.zero = 0, where every parameter is whole",
        )
    names: dict[torch.Tensor, str] = {
        parameter: slot.name
        for unit in state.trained
        for parameter, slot in zip(unit.parameters, unit.plan.slots, strict=True)
    }
    initial = {
        names[parameter]: {key: torch.as_tensor(value).clone() for key, value in values.items()}
        for parameter, values in inner.state.items()
    }
    runs: list[_Run] = []
    for unit in state.trained:
        for group, begin, end in unit.plan.segments():
            start, stop = max(begin, unit.own.start), min(end, unit.own.stop)
            slots = tuple(slot for slot in unit.plan.slots if slot.group == group)
            if not elementwise:
                runs += [
                    _run(unit, slot.offset, slot.offset + slot.numel, (slot,), slot.shape) for slot in slots
                ]
            elif start < stop or not unit.spread:
                runs.append(_run(unit, start, stop, slots, (stop - start,)))
    for index, group_settings in enumerate(inner.param_groups):
        group_settings["params"] = [run.tensor for run in runs if run.slots[0].group == index]
        if elementwise and _may_fuse(inner, group_settings):
            group_settings["fused"] = True
    bound = BoundOptimizer(inner, runs, state.mesh)
    bound.load_named_state(initial)
    return bound


def _run(unit: Unit, start: int, stop: int, slots: tuple[Slot, ...], shape: tuple[int, ...]) -> _Run:
    view = unit.master[start - unit.own.start : stop - unit.own.start].view(shape)
    return _Run(unit, start, stop, nn.Parameter(view, requires_grad=True), slots)


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


def refuse_two_definitions(asked: OptimizerConfig, optimizer: object) -> None:
    """Raise when an optimizer was handed over and its settings are configured as well."""
    also = sorted(asked.model_fields_set - {"clip_norm"})
    if optimizer is not None and also:
        raise ConfigError(
            f"optimizer.{', optimizer.'.join(also)} configured beside a {type(optimizer).__name__} "
            "handed over from Python",
            rule="the optimizer is defined in one place",
            fix="drop these keys (optimizer.clip_norm may stay), or hand over no optimizer",
        )
