"""How much state an optimizer will have, asked of the optimizer itself before its first step.

A twin of it updates a few zeros. Called by the engine for the rehearsal of a save; it touches neither
the optimizer nor the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def state_bytes_per_weight(inners: Sequence[Optimizer], dtypes: Sequence[torch.dtype]) -> list[int]:
    """Bytes of state with one number per weight, by group; 0 where a twin cannot be made or stepped.

    Args:
        inners: torch optimizers, whose groups count through all of them; their settings count. A subclass
            of the user's may need arguments of its own and then counts as 0: this is a lower bound.
        dtypes: each group's type of master weights.
    """
    groups = [(type(inner), group) for inner in inners for group in inner.param_groups]
    return [
        _bytes_per_weight(make, group, dtype) for (make, group), dtype in zip(groups, dtypes, strict=True)
    ]


def _bytes_per_weight(make: Callable[[Any], Optimizer], group: dict[str, Any], dtype: torch.dtype) -> int:
    # A matrix, because some optimizers take nothing else.
    twin = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    twin.grad = torch.zeros_like(twin)
    try:
        probe = make([{**group, "params": [twin]}])
        probe.step()
    except Exception:
        # Whatever a class of the user's asks for: a forecast is no reason to stop a run.
        return 0
    return sum(
        value.element_size()
        for value in probe.state[twin].values()
        if isinstance(value, torch.Tensor) and value.shape == twin.shape
    )
