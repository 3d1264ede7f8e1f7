"""A stand-in for an optimizer over one parameter: trying it touches neither the user's nor the model.

Made for the trial of what may work on slices, and for the forecast of how much state there will be.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def twin_of(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Optimizer:
    """A fresh optimizer of the same class over one parameter, sharing nothing.

    Args:
        group: one of the optimizer's, perhaps with other settings. Where there is state of its parameters
            already, as Adagrad's constructor makes it, there is of `parameter` too: zeros. State of other
            shapes is left to the first step.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    # Whatever the original keeps aside of its parameters or of itself leads to the twin's own.
    stand_ins: dict[int, Any] = {
        id(held): parameter for each in optimizer.param_groups for held in each["params"]
    }
    stand_ins[id(optimizer)] = twin
    rest = {
        key: value
        for key, value in vars(optimizer).items()
        if key not in ("param_groups", "state", "step") and "hook" not in key
    }
    vars(twin).update(copy.deepcopy(rest, stand_ins))
    settings = {key: value for key, value in group.items() if key != "params"}
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    known = [each for each in group["params"] if each in optimizer.state]
    # Beside a parameter without dimensions every count of steps looks like state of its shape.
    original = max(known, key=lambda each: each.dim() > 0, default=None)
    if original is not None and all(_fits(value, original) for value in optimizer.state[original].values()):
        state[parameter] = {
            key: torch.zeros_like(parameter) if _is_like(value, original) else copy.deepcopy(value, stand_ins)
            for key, value in optimizer.state[original].items()
        }
    groups = [{**copy.deepcopy(settings, stand_ins), "params": [parameter]}]
    twin.__setstate__({"state": state, "param_groups": groups})
    return twin


def step(twin: Optimizer) -> None:
    """One update of a twin; through its class, since a schedule may have wrapped the user's object's own."""
    type(twin).step(twin)


def _fits(value: object, parameter: Tensor) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0 or _is_like(value, parameter)


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
