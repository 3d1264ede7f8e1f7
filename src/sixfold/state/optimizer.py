"""Any torch optimizer over flat units.

The user's optimizer stays the same object: its groups are pointed at contiguous runs of the master
buffers, settings per group kept. Elementwise optimizers get one tensor per unit and group; any
other gets each whole parameter. Called by the engine once; the player calls `step`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.base.errors import ConfigError, ModelError, StateError
from sixfold.config import OptimizerConfig
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

StatePiece: TypeAlias = tuple[str, str, int, torch.Tensor]
"""(parameter, key, first element, elements) of one rank's optimizer state; a number for a whole tensor
starts at 0."""

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
        state: whose masters they are.
        base_lrs: each group's peak learning rate.
    """

    def __init__(self, inner: Optimizer, runs: list[_Run], state: ModelState) -> None:
        self.inner = inner
        self._runs = runs
        self._state = state
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
    def lr(self) -> float:
        """Learning rate of the first group."""
        return float(self.inner.param_groups[0]["lr"])

    def state_specs(self) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        """State that any rank has: parameter -> key -> (global shape, type), the same on every rank.

        A collective where state is cut, of names alone: which keys there are may differ from group to
        group, and a group may lie on other ranks alone. Numbers for a whole tensor (a step count) stand
        under every parameter of their run. Parameters without elements have no state.
        """
        rows: Iterable[tuple[str, int, str, str, Sequence[int] | None]] = {
            (
                run.slots[0].name,
                len(run.slots),
                key,
                str(value.dtype).removeprefix("torch."),
                None if value.shape == run.tensor.shape else tuple(value.shape),
            )
            for run in self._runs
            for key, value in self._state_of(run)
        }
        if any(unit.spread for unit in self._state.trained):
            texts = self._state.mesh.texts(json.dumps(list(rows)))
            rows = [tuple(row) for text in texts for row in json.loads(text)]
        specs: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        firsts = {
            slot.name: (unit.plan.slots, place)
            for unit in self._state.trained
            for place, slot in enumerate(unit.plan.slots)
        }
        order = {name: number for number, name in enumerate(firsts)}
        for first, count, key, dtype, shape in sorted(rows, key=lambda row: (order[row[0]], row[2:4])):
            slots, place = firsts[first]
            for slot in slots[place : place + count]:
                if slot.numel:
                    whole = slot.shape if shape is None else tuple(shape)
                    specs.setdefault(slot.name, {})[key] = (whole, getattr(torch, dtype))
        return specs

    def state_pieces(self) -> Iterator[StatePiece]:
        """What this rank writes of its state; over all ranks every element of `state_specs` once."""
        for run in self._runs:
            share = run.unit.share
            for key, value in self._state_of(run):
                for slot in filter(lambda slot: slot.numel, run.slots):
                    if value.shape != run.tensor.shape:
                        if share.start <= slot.offset < share.stop:
                            yield slot.name, key, 0, value
                        continue
                    start = max(slot.offset, run.start, share.start)
                    stop = min(slot.offset + slot.numel, run.stop, share.stop)
                    if start < stop:
                        part = value.reshape(-1)[start - run.start : stop - run.start]
                        yield slot.name, key, start - slot.offset, part

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

    def blank_state(
        self, specs: Mapping[str, Mapping[str, tuple[Sequence[int], torch.dtype]]]
    ) -> tuple[dict[nn.Parameter, dict[str, torch.Tensor]], list[StatePiece]]:
        """Host memory for this rank's state of given names, shapes and types.

        Returns:
            What `adopt_state` takes, and its pieces, through which the numbers come in.
        """
        state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        pieces: list[StatePiece] = []
        for run in self._runs:
            slots = [slot for slot in run.slots if slot.name in specs]
            for key, (shape, dtype) in specs[slots[0].name].items() if slots else ():
                if _per_tensor(key, specs, slots):
                    flat = torch.empty(tuple(shape), dtype=dtype)
                    pieces.append((slots[0].name, key, 0, flat))
                else:
                    flat = torch.zeros(run.tensor.shape, dtype=dtype)
                    pieces += _pieces_of(run, slots, key, flat.view(-1))
                state.setdefault(run.tensor, {})[key] = flat
        return state, pieces

    def adopt_state(self, state: Mapping[nn.Parameter, Mapping[str, torch.Tensor]]) -> None:
        """Replace all state by what `blank_state` made."""
        self.inner.state.clear()
        for group in self.inner.param_groups:
            # Torch keeps a count of updates on the host unless the update itself counts.
            counts_on_host = not (group.get("fused") or group.get("capturable"))
            for tensor in group["params"]:
                if tensor in state:
                    self.inner.state[tensor] = {
                        key: value if key == "step" and counts_on_host else value.to(tensor.device)
                        for key, value in state[tensor].items()
                    }

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
    bound = BoundOptimizer(inner, runs, state)
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


def _run(unit: Unit, start: int, stop: int, slots: tuple[Slot, ...], shape: tuple[int, ...]) -> _Run:
    view = unit.master[start - unit.own.start : stop - unit.own.start].view(shape)
    return _Run(unit, start, stop, nn.Parameter(view, requires_grad=True), slots)


def _pieces_of(run: _Run, slots: Sequence[Slot], key: str, flat: torch.Tensor) -> Iterator[StatePiece]:
    """The parts of `flat`, which covers the run, that belong to each parameter."""
    for slot in slots:
        start, stop = max(slot.offset, run.start), min(slot.offset + slot.numel, run.stop)
        if start < stop:
            yield slot.name, key, start - slot.offset, flat[start - run.start : stop - run.start]


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
    shaped = all(tuple(specs[slot.name][key][0]) == slot.shape for slot in slots)
    return not shaped or (key == "step" and all(slot.shape == () for slot in slots))


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
