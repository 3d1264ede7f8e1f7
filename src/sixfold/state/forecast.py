"""How much state an optimizer will have, asked of the optimizer itself before its first step.

A twin of it updates a few zeros. Called by the engine for the rehearsal of a save and by `sixfold plan`; it
touches neither the optimizer nor the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.state.twin import step, twin_of


def state_bytes_per_weight(inners: Sequence[Optimizer], dtypes: Sequence[torch.dtype]) -> list[int | None]:
    """Bytes of state with one number per weight, by group; None where a twin cannot be made or stepped.

    Args:
        inners: torch optimizers, whose groups count through all of them; their settings count.
        dtypes: each group's type of master weights.
    """
    groups = [(inner, group) for inner in inners for group in inner.param_groups]
    return [
        _bytes_per_weight(inner, group, dtype) for (inner, group), dtype in zip(groups, dtypes, strict=True)
    ]


def _bytes_per_weight(inner: Optimizer, group: dict[str, Any], dtype: torch.dtype) -> int | None:
    # A matrix, because some optimizers take nothing else.
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    try:
        twin = twin_of(inner, group, parameter)
        step(twin)
        state = twin.state[parameter]
    except Exception:
        # Whatever a class of the user's asks for: a forecast is no reason to stop a run.
        return None
    return sum(
        value.element_size()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    )
