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


def state_bytes_per_weight(inner: Optimizer, dtypes: Sequence[torch.dtype]) -> list[int]:
    """Bytes of state with one number per weight, by group; 0 where a twin cannot be made or stepped.

    Args:
        inner: a torch optimizer; its groups' settings count, a handed-over subclass may need arguments
            of its own and then counts as 0: this is a lower bound.
        dtypes: each group's type of master weights.
    """
    make: Callable[[Any], Optimizer] = type(inner)
    bytes_per_weight = []
    for group, dtype in zip(inner.param_groups, dtypes, strict=True):
        twin = nn.Parameter(torch.zeros(2, dtype=dtype))
        twin.grad = torch.zeros_like(twin)
        try:
            probe = make([{**group, "params": [twin]}])
            probe.step()
        except Exception:
            # Whatever a class of the user's asks for: a forecast is no reason to stop a run.
            bytes_per_weight.append(0)
            continue
        bytes_per_weight.append(
            sum(
                value.element_size()
                for value in probe.state[twin].values()
                if isinstance(value, torch.Tensor) and value.shape == twin.shape
            )
        )
    return bytes_per_weight
