"""The compute type of a job, where it was left open.

The launcher measures it once and hands it to all ranks (`measured_compute`). Where no launcher of ours
speaks for all of them, they go by what processors say of themselves (`unmeasured_compute`), and so come to
one answer. What the user asked for is kept by both.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from sixfold.config import Resolved
from sixfold.monitor.hardware import bf16_speedup, fast_bf16

WORTHWHILE = 1.1
"""Times as fast as fp32 that bf16 products are at least: the rest of an update gains less, and digits go."""


def measured_compute(resolved: Resolved, module: nn.Module) -> Resolved:
    """Fill in the compute type where it is open: bf16 on GPUs and where its products are faster, else fp32.

    Args:
        module: what will be trained; only shapes are read.
    """
    if resolved.config.precision.compute is not None:
        return resolved
    if torch.cuda.is_available():
        return _on_gpu(resolved)
    rows = resolved.config.data.sequence_length * (resolved.config.batch.micro or 1)
    speedup = bf16_speedup(rows, *_usual_shape(module), threads=resolved.config.launch.threads)
    compute = "bf16" if speedup >= WORTHWHILE else "fp32"
    return resolved.decide({"precision.compute": compute}, f"measured: bf16 {speedup:.2g} x fp32")


def unmeasured_compute(resolved: Resolved) -> Resolved:
    """The same by the processor's instructions: an answer that ranks of equal hosts have in common."""
    if resolved.config.precision.compute is not None:
        return resolved
    if torch.cuda.is_available():
        return _on_gpu(resolved)
    compute, has = ("bf16", "has") if fast_bf16() else ("fp32", "has no")
    why = f"the processor {has} bf16 instructions; not measured where no one launcher starts all ranks"
    return resolved.decide({"precision.compute": compute}, why)


def _on_gpu(resolved: Resolved) -> Resolved:
    return resolved.decide({"precision.compute": "bf16"}, "computing on a GPU")


def _usual_shape(module: nn.Module) -> tuple[int, int]:
    """Of the matrices in which most of the module's weights are."""
    weights: Counter[tuple[int, int]] = Counter()
    for parameter in module.parameters():
        if parameter.dim() == 2:
            low, high = sorted(parameter.shape)
            weights[low, high] += parameter.numel()
    ((shape, _),) = weights.most_common(1) or [((256, 256), 0)]
    return shape
