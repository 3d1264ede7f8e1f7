"""What the ranks of the expert axis send each other as a model runs: see `AxisChange.trace`.

Used by `axis.py`. It runs no expert, because where tokens go is not known where there are no numbers; what is
noted is what even load takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.parallel.blocks import put_forward
from sixfold.parallel.change import Note, Remove
from sixfold.plan import Geometry


def traced(parts: Iterable[nn.Module], geometry: Geometry, note: Note) -> Remove:
    """Have modules of experts note what goes out and what comes back, and return something of that size."""
    num_ranks, share = geometry.degree("expert"), geometry.degree("context")

    def forward(
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        beside: Callable[[], object] | None = None,
        **_: Any,
    ) -> Tensor:
        choices = -(-top_k_index.numel() // (share * num_ranks)) * (num_ranks - 1)
        sent = choices * hidden_states[0].nbytes
        note("tokens", sent)
        note("results", sent)
        if beside is not None:
            beside()
        return torch.empty_like(hidden_states)

    undo = ExitStack()
    for part in parts:
        undo.callback(put_forward(part, forward))
    return undo.close
