"""Evaluation mode for a while: a module is evaluated, and goes on as it was.

Called by whoever runs a user's model for its numbers: evaluation, trials of a model. It keeps gradients as
they are; `torch.no_grad` is a matter of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in evaluation mode; afterwards each of its parts is in the mode that it had, so
    that what its owner has frozen stays frozen."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        # From the outside in, for `train` reaches all that is inside; it is called, not only its mark set,
        # because parts may do more there, such as taking merged adapters out again.
        for part, mode in modes.items():
            if part.training != mode:
                part.train(mode)
