"""Clipping by norm: which factor each parameter group's gradients are multiplied with.

Called by the player once an update, with norms that are the same on every rank. Numbers only; it sees no
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def clip_factors(norms: Sequence[float], own: Sequence[float | None], shared: float | None) -> list[float]:
    """One factor for each group; the formula is that of torch.nn.utils.clip_grad_norm_.

    Args:
        norms: each group's 2-norm.
        own: bounds of groups that are clipped each by its own norm.
        shared: bound on the norm of all other groups together; None for no bound.
    """
    rest = math.hypot(*[norm for norm, bound in zip(norms, own, strict=True) if bound is None])
    factors = []
    for norm, bound in zip(norms, own, strict=True):
        norm, bound = (rest, shared) if bound is None else (norm, bound)
        factors.append(1.0 if bound is None else min(1.0, bound / (norm + 1e-6)))
    return factors
