"""Weights moved off zero while a model is tried, so that no mixing of tokens hides behind a zero.

Used around the trial of a cut. A convolution of zeros, or a branch scaled by 1e-6, shows only
once it has learned. Each module moves its own weights as its forward begins and puts them back as it ends: so
they may come and go with any residency, and ranks with the same weights move them alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.parallel.blocks import own_forward, put_forward
from sixfold.parallel.recompute import Forward

SMALL = 1e-3
"""Where no weight of a parameter is larger, all of them count as not yet learned; else those that are 0."""
SIZE = 0.05
"""Standard deviation of what is added."""


@contextmanager
def off_zero(model: nn.Module) -> Iterator[None]:
    """Inside, modules run with weights that are not zero."""
    with ExitStack() as undo:
        for number, module in enumerate(model.modules()):
            if type(module).forward is not nn.Module.forward and list(module.parameters(recurse=False)):
                moved = _moved(own_forward(module), number)
                undo.callback(put_forward(module, MethodType(moved, module)))
        yield


def _moved(own: Forward, number: int) -> Forward:
    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        draw, before = torch.Generator().manual_seed(number), list[tuple[Tensor, Tensor]]()
        try:
            for parameter in self.parameters(recurse=False):
                weights = parameter.data
                resting = _resting(weights)
                if resting is not None:
                    before.append((weights, weights.clone()))
                    noise = SIZE * torch.randn(weights.shape, generator=draw)
                    weights.add_(noise.to(weights) * resting)
            return own(self, *args, **kwargs)
        finally:
            for weights, kept in before:
                weights.copy_(kept)

    return forward


def _resting(weights: Tensor) -> Tensor | None:
    """Which weights to move, as a mask; None: none of them."""
    if not weights.is_floating_point() or not weights.numel():
        return None
    resting = torch.ones_like(weights, dtype=torch.bool)
    if float(weights.abs().max()) > SMALL:
        resting = weights == 0
    return resting if bool(resting.any()) else None
