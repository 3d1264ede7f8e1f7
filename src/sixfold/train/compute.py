"""The compute type of a job, where it was left open.

Used by the launcher for a first look and by every rank; both come to the same answer. It measures nothing.
"""

from __future__ import annotations

import torch

from sixfold.config import Resolved
from sixfold.monitor.hardware import fast_bf16


def decide_compute(resolved: Resolved) -> Resolved:
    """Fill in the compute type where it is open: bf16 on GPUs and on processors that are fast at it."""
    if resolved.config.precision.compute is not None:
        return resolved
    if torch.cuda.is_available():
        return resolved.decide({"precision.compute": "bf16"}, "computing on a GPU")
    if fast_bf16():
        return resolved.decide(
            {"precision.compute": "bf16"}, "this processor has instructions that multiply bf16"
        )
    return resolved.decide(
        {"precision.compute": "fp32"}, "this processor is not known to multiply bf16 faster"
    )
