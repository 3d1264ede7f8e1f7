"""From what the user hands over or names to torch optimizers over the module's own parameters.

Called by `initialize` before anything is planned. What cannot be trained is refused here; how optimizers
are pointed at units is `optimizer.bind`.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.base.errors import ConfigError, ModelError, StateError
from sixfold.base.plugins import load_plugin
from sixfold.config import OptimizerConfig
from sixfold.parallel import ModuleFacts, module_facts
from sixfold.state.elementwise import elementwise_groups

Factory = Callable[[Iterable[Any]], Optimizer | Sequence[Optimizer]]
OptimizerLike = Optimizer | Sequence[Optimizer] | Factory

_CANNOT = {
    torch.optim.SparseAdam: "the gradients that ranks sum are dense; set sparse=True on embeddings or not, "
    "and use torch.optim.AdamW or Adagrad",
    torch.optim.LBFGS: "the engine makes one backward pass for an update, and L-BFGS asks for more as it "
    "goes; use another optimizer",
}
"""Optimizers of torch that cannot be driven from reduced gradients, and what to do instead."""


def build_optimizer(
    asked: OptimizerConfig, module: nn.Module | None = None, blocks: Sequence[str] = ()
) -> Factory:
    """A factory for the optimizer named in the configuration.

    Args:
        module, blocks: where "muon" finds the matrices of repeated blocks, by the names of those.
    """
    if asked.name == "muon":
        assert module is not None, "it updates parameters by what they are in their module"
        return _muon(asked, module, blocks)
    kinds: dict[str, type[Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
    }
    kind = kinds.get(asked.name) or load_plugin("optimizer", asked.name)
    named: dict[str, Any] = asked.model_dump(exclude={"name", "clip_norm", "ema_decay"}, exclude_none=True)

    def factory(parameters: Iterable[Any]) -> Optimizer:
        return kind(parameters, **named)

    if asked.name not in kinds:
        _check_settings(asked.name, kind, named)
    return factory


def _muon(asked: OptimizerConfig, module: nn.Module, blocks: Sequence[str]) -> Factory:
    """Muon for the matrices of repeated blocks, AdamW for the rest: embeddings, heads, norms.

    Its steps are scaled to the size of AdamW's, so one rate and one decay serve both.
    """
    common: dict[str, Any] = asked.model_dump(include={"lr", "weight_decay"}, exclude_none=True)
    others: dict[str, Any] = asked.model_dump(include={"betas", "eps"}, exclude_none=True)
    momentum: dict[str, Any] = {"momentum": asked.momentum} if asked.momentum is not None else {}

    def factory(parameters: Iterable[Any]) -> list[Optimizer]:
        inside = {
            parameter
            for name, parameter in module.named_parameters()
            if parameter.dim() == 2 and any(name.startswith(f"{block}.") for block in blocks)
        }
        given = list(parameters)
        matrices = [parameter for parameter in given if parameter in inside]
        rest = [parameter for parameter in given if parameter not in inside]
        if not matrices:
            raise ConfigError(
                f'optimizer.name = "muon" for {type(module).__name__}, which has no trained matrix in a '
                "repeated block",
                rule="muon updates the matrices of repeated blocks, and leaves the rest to adamw",
                fix='set layout.blocks, or optimizer.name = "adamw"',
            )
        made: list[Optimizer] = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common, **momentum)
        ]
        return [*made, torch.optim.AdamW(rest, **common, **others)] if rest else made

    return factory


def _check_settings(name: str, kind: Callable[..., object], named: dict[str, Any]) -> None:
    try:
        inspect.signature(kind).bind((), **named)
    except TypeError as error:
        given = ", ".join(f"{key} = {value}" for key, value in named.items())
        raise ConfigError(
            f"optimizer.name = {name!r} with {given}: {error}",
            rule="a plugin is called with the parameters, lr, and what else of [optimizer] is set",
            fix="leave unset what it does not take, or give it such a parameter",
        ) from error


def make_optimizers(optimizer: OptimizerLike, module: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers over `module`'s trainable parameters, before they are bound to units.

    Args:
        optimizer: one optimizer over parameters of `module`, or several, each over its own; or a factory
            that receives the trainable parameters and returns such.

    Raises:
        StateError: they already have state, or they miss, share or add parameters.
        ConfigError: something else than optimizers of dense gradients, or a group's clip_norm is no bound.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    names = {parameter: name for name, parameter in module.named_parameters()}
    if not parameters:
        raise ModelError(
            f"{type(module).__name__} has {len(names)} parameter(s), none with requires_grad=True",
            rule="training changes at least one parameter",
            fix="set requires_grad=True on what is to be trained",
        )
    given = optimizer(parameters) if callable(optimizer) else optimizer
    made = tuple(given) if isinstance(given, list | tuple) else (given,)
    for each in made:
        _check_kind(each)
    held = Counter(parameter for each in made for group in each.param_groups for parameter in group["params"])
    strangers = len(set(held) - set(names))
    missing = [names[parameter] for parameter in parameters if parameter not in held]
    twice = [names[parameter] for parameter in parameters if held[parameter] > 1]
    if strangers or missing or twice:
        raise StateError(
            f"{kind_of(made)} holds {strangers} tensor(s) that are not parameters of "
            f"{type(module).__name__}, misses {len(missing)} of its trainable ones "
            f"({', '.join(missing[:4])}) and has {len(twice)} twice ({', '.join(twice[:4])})",
            rule="each parameter with requires_grad=True is updated by one optimizer, and nothing else is",
            fix="build it over model.parameters(), and set requires_grad=False on what stays fixed; for a "
            "model on meta, whose parameters are made anew, pass a factory: optimizer=torch.optim.AdamW",
        )
    return made


def optimized_facts(module: nn.Module, made: Sequence[Optimizer], blocks: Sequence[str]) -> ModuleFacts:
    """The facts of `module` with the groups of its optimizers, and which of these take whole parameters.

    Args:
        blocks: names of its blocks, see `sixfold.parallel.block_names`.
    """
    groups = [group["params"] for each in made for group in each.param_groups]
    on_slices = [flag for each in made for flag in elementwise_groups(each)]
    whole_groups = [group for group, flag in enumerate(on_slices) if not flag]
    return module_facts(module, groups, whole_groups=whole_groups, blocks=blocks)


def kind_of(optimizers: Sequence[Optimizer]) -> str:
    """Names of their classes, as checkpoints keep them."""
    return " + ".join(type(each).__name__ for each in optimizers)


def _check_kind(made: object) -> None:
    if not isinstance(made, Optimizer):
        raise ConfigError(
            f"the optimizer handed over is or made a {type(made).__name__}",
            rule="optimizer is a torch optimizer, a list of them, or a function that returns such for the "
            "parameters it gets",
            fix="for example optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)",
        )
    if type(made) in _CANNOT:
        raise ConfigError(
            f"torch.optim.{type(made).__name__} as optimizer",
            rule="an optimizer is driven by one dense gradient an update",
            fix=_CANNOT[type(made)],
        )
    if any(float(state.get("step", 1)) > 0 for state in made.state.values()):
        raise StateError(
            f"{type(made).__name__} already has state for {len(made.state)} tensor(s)",
            rule="the optimizer is handed over before its first step",
            fix="call sixfold.initialize before optimizer.step(), and engine.load to bring state back",
        )
    without = [number for number, group in enumerate(made.param_groups) if group.get("lr") is None]
    if without:
        raise ConfigError(
            f'{type(made).__name__} has no number under "lr" in parameter group(s) '
            f"{', '.join(map(str, without))}",
            rule="schedules, records and checkpoints go by the learning rate of each group",
            fix='give each group one, for example {"lr": 1.0} for an optimizer that does not use it',
        )
    bounds = [group["clip_norm"] for group in made.param_groups if group.get("clip_norm") is not None]
    if not all(isinstance(bound, int | float) and 0 < bound < math.inf for bound in bounds):
        raise ConfigError(
            f"parameter groups with clip_norm = {', '.join(map(repr, bounds))}",
            rule="a group's own clip_norm is a positive number, the bound on the norm of its gradients",
            fix="for example {'params': ..., 'clip_norm': 0.5}, or leave it out for optimizer.clip_norm",
        )


def refuse_two_definitions(asked: OptimizerConfig, optimizer: object) -> None:
    """Raise when an optimizer was handed over and its settings are configured as well."""
    also = sorted(asked.model_fields_set - {"clip_norm", "ema_decay"})
    if optimizer is not None and also:
        raise ConfigError(
            f"optimizer.{', optimizer.'.join(also)} configured beside a {type(optimizer).__name__} "
            "handed over from Python",
            rule="the optimizer is defined in one place",
            fix="drop these keys (optimizer.clip_norm and ema_decay may stay), or hand over no optimizer",
        )
