"""Number types: which type each kind of number has, by one rule.

Read by the plan and by the state engine; names of types only, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from sixfold.config import PrecisionConfig

ITEM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


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
