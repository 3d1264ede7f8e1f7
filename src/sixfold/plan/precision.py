"""Number types: which type each kind of number has, by one rule.

Read by the plan, the state engine and the player; names of types only, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sixfold.base.errors import PlanError
from sixfold.config import PrecisionConfig

FLOATING = ("fp64", "fp32", "bf16", "fp16")
"""Types of parameters that can be trained; others stay as they are."""


@dataclass(frozen=True)
class PrecisionPlan:
    """The five types for parameters that compute in `compute`.

    Args:
        compute: working parameters, activations, backward.
        storage: the model shown whole and written to checkpoints.
        grad: accumulated gradients.
        reduce: gradients crossing ranks.
        master: weights that the optimizer updates.
    """

    compute: str
    storage: str
    grad: str
    reduce: str
    master: str

    def __str__(self) -> str:
        return (
            f"compute {self.compute}, gradients {self.grad} (reduced in {self.reduce}), "
            f"master {self.master}, written in {self.storage}"
        )


def decide_precision(asked: PrecisionConfig, own: str) -> PrecisionPlan:
    """Fill in what is unset for parameters whose own type is `own` ("fp64", "fp32", "bf16", ...).

    Unset types are fp32, or fp64 where the computation is fp64.
    """
    compute = asked.compute or own
    wide = "fp64" if compute == "fp64" else "fp32"
    grad = asked.grad or wide
    return PrecisionPlan(
        compute=compute,
        storage=asked.storage or wide,
        grad=grad,
        reduce=asked.reduce or grad,
        master=asked.master or wide,
    )


@dataclass(frozen=True)
class LossScaling:
    """The factor on the loss that keeps small gradients from vanishing in fp16.

    The defaults are those of torch.amp.GradScaler; a factor of 1 that nothing changes is no scaling.

    Args:
        initial: the factor at the start.
        growth: what it is multiplied with after `growth_steps` finite updates in a row.
        backoff: what it is multiplied with after an update whose gradients overflowed.
        growth_steps: None for a factor that stays.
    """

    initial: float = 1.0
    growth: float = 2.0
    backoff: float = 0.5
    growth_steps: int | None = None

    def __str__(self) -> str:
        if self.growth_steps is None:
            return f"fixed at {self.initial:g}"
        return f"from {self.initial:g}, doubled after {self.growth_steps} finite updates"


def decide_loss_scaling(asked: PrecisionConfig, types: Iterable[PrecisionPlan]) -> LossScaling:
    """Scale where a gradient is ever in fp16.

    Raises:
        PlanError: settings of a scale, and no fp16.
    """
    if any("fp16" in (each.compute, each.grad, each.reduce) for each in types):
        if asked.loss_scale is not None:
            return LossScaling(asked.loss_scale)
        return LossScaling(asked.initial_scale or 65536.0, growth_steps=asked.growth_steps or 2000)
    for key in ("loss_scale", "initial_scale", "growth_steps"):
        if getattr(asked, key) is not None:
            raise PlanError(
                f"precision.{key} = {getattr(asked, key):g} for a model without fp16",
                rule="losses are scaled where gradients are computed, kept or reduced in fp16",
                fix=f'leave precision.{key} unset, or set precision.compute = "fp16"',
            )
    return LossScaling()
