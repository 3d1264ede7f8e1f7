"""The step under way: what a program is played on, what is between its instructions, and what comes of it.

Filled by the player and its passes; values only, nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sixfold.parallel import Product
from sixfold.pipeline.loss import Counts, Share
from sixfold.pipeline.transfers import Kind, Message, Received
from sixfold.program import Instruction, Op


@dataclass(frozen=True)
class StepResult:
    """What one program came to, the same on every rank.

    Args:
        loss: mean loss over the global batch.
        weight: what it is a mean over: samples, or targets where the loss says so.
        samples: in the global batch.
        grad_norm: 2-norm of the gradient of that mean, before clipping; None without an update.
        group_norms: the same of each parameter group, in the optimizer's order.
        loss_scale: the factor on losses in backward, taken off the gradients again.
        skipped: whether the update was left out, on every rank, because gradients overflowed in fp16.
        compute_s: seconds that this rank alone spent in the instructions of a whole program, less those in
            which it stood still for exchanges; None for a written-out step.
    """

    loss: float
    weight: float
    samples: int
    grad_norm: float | None = None
    group_norms: tuple[float, ...] = ()
    loss_scale: float = 1.0
    skipped: bool = False
    compute_s: float | None = field(default=None, compare=False)


Place = tuple[int, int]
"""Stage and micro-batch."""


def _runs_nothing(stage: int, micro: int, received: Any) -> Any:
    raise AssertionError(f"a program without forwards of its own runs stage {stage}, micro-batch {micro}")


@dataclass(frozen=True)
class Work:
    """What a program is played on.

    Args:
        run: runs a stage on a micro-batch, with what it has received: (stage, micro-batch, received) to the
            share of the loss at the last stage, else to what is sent on. By default there is nothing to run:
            the caller does, or others' passes are served.
        scale: P, by which the shares are divided already.
        counts: samples and targets that this rank answers for.
        kinds: of each micro-batch, what the shapes in it depend on.
        enter: what is called before a pass of a micro-batch, forward or backward.
    """

    run: Callable[[int, int, Any], Any] = _runs_nothing
    scale: float = 1.0
    counts: Counts = field(default_factory=Counts)
    kinds: Sequence[Kind] = ()
    enter: Callable[[int], None] | None = None


@dataclass
class Step:
    """The step under way: what waits for its backward, what is between stages, and the sums so far.

    `ready` is when all that the instruction under way has to wait for had come, in seconds of the monotonic
    clock.
    """

    work: Work
    counts: Counts
    shares: dict[int, Share] = field(default_factory=dict)
    inputs: dict[Place, Received] = field(default_factory=dict)
    outputs: dict[Place, Any] = field(default_factory=dict)
    gradients: dict[Place, list[torch.Tensor]] = field(default_factory=dict)
    messages: dict[tuple[Op, int, int], Message] = field(default_factory=dict)
    put_off: dict[Place, list[Product]] = field(default_factory=dict)
    following: Instruction | None = None
    ready: float = 0.0
    losses: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor | float] = field(default_factory=list)
    has_means: bool = False
    accumulates: bool = False
    compute_s: float = 0.0
    result: StepResult | None = None

    def count(self, share: Share) -> None:
        """Take in the loss of one micro-batch."""
        self.losses.append(share.value.detach())
        self.has_means |= share.is_mean
        if share.weight is not None:
            self.weights.append(share.weight)
