"""Which optimizers may work on slices: those whose update of a number depends on that number's history only.

Known classes of torch are listed; every other one is tried on a few numbers, laid out as a matrix, as a run
and in two parts. `initialize` asks once, before the plan; nothing the user holds is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sixfold.state.twin import step, twin_of

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
"""Optimizers of torch whose update of a number depends on that number's own history only."""

NUM_STEPS = 120
"""Updates of a trial. Behaviour that sets in later is not seen."""

_SHAPES = ((4, 6), (24,), (2, 3, 2, 2))
_PARTS = (slice(0, 10), slice(10, 24))
_CLOSE = 1e-7
_log = logging.getLogger(__name__)


def elementwise_groups(optimizer: Optimizer) -> list[bool]:
    """For each parameter group, whether slices of its parameters may be updated on their own.

    An attribute `elementwise`, of the class or the object, is believed. Exact classes of torch.optim are
    known. For any other, two trials of `NUM_STEPS` updates each: the same 24 numbers with the same
    gradients are updated as a matrix, as a run, as four dimensions and as two runs apart from each other,
    with magnitudes over six decades so that anything that looks at a whole tensor gives itself away. What
    raises in a trial is taken for not elementwise.
    """
    declared = getattr(optimizer, "elementwise", None)
    if isinstance(declared, bool):
        return [declared] * len(optimizer.param_groups)
    if type(optimizer) in ELEMENTWISE:
        return [True] * len(optimizer.param_groups)
    found = [_passes(optimizer, group) for group in optimizer.param_groups]
    _log.info("%s tried on slices, by group: elementwise %s", type(optimizer).__name__, found)
    return found


def _passes(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if "lr" in group:
        group = {**group, "lr": 0.05}  # at the start of a warm-up it may be 0, and nothing would be seen
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(devices=[]):
            return all(_trial(optimizer, group, drift, generator) for drift in (0.0, 1.0))
    except Exception as error:
        _log.info("%s on a few numbers: %s: %s", type(optimizer).__name__, type(error).__name__, error)
        return False


def _trial(optimizer: Optimizer, group: dict[str, Any], drift: float, generator: torch.Generator) -> bool:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    size = _PARTS[-1].stop
    decades = 10 ** torch.linspace(-3, 3, size, dtype=torch.float64)
    start = drawn(size) * decades[torch.randperm(size, generator=generator)]
    # Gradients that keep their direction wake up what estimates distances; random ones the rest.
    grads = (drift * drawn(size) + drawn(NUM_STEPS, size)) * decades[
        torch.randperm(size, generator=generator)
    ]
    whole = [_updated(optimizer, group, start, grads, shape) for shape in _SHAPES]
    parts = [_updated(optimizer, group, start[part], grads[:, part], (-1,)) for part in _PARTS]
    way = (whole[0] - start).abs()
    return bool((way > 0).all()) and all(
        bool(((other - whole[0]).abs() <= _CLOSE * way).all()) for other in (*whole[1:], torch.cat(parts))
    )


def _updated(
    optimizer: Optimizer,
    group: dict[str, Any],
    start: torch.Tensor,
    grads: torch.Tensor,
    shape: Sequence[int],
) -> torch.Tensor:
    parameter = nn.Parameter(start.clone().view(*shape))
    twin = twin_of(optimizer, group, parameter)
    for grad in grads:
        parameter.grad = grad.clone().view(*shape)
        step(twin)
    return parameter.detach().flatten()
