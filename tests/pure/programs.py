"""The program of one rank without a pipeline, for tests of what reads programs."""

from __future__ import annotations

from sixfold.program import Program, training


def accumulation(num_micro: int, num_reduces: int = 1, num_served: int = 0) -> Program:
    """Gradient accumulation: `training` on a pipeline of one stage.

    Args:
        num_micro: micro-batches of this rank in this update.
        num_reduces: reduction windows, equally many on every rank.
        num_served: further micro-batches that only other ranks have and this one takes part in.
    """
    return training("1f1b", 1, num_micro, num_served=num_served, num_reduces=num_reduces)[0]
