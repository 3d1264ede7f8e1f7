"""Recompute: a block's forward that keeps less for backward and runs again when backward comes to it.

`parallel.blocks` puts it in the place of a block's forward. The second run draws the same random numbers and
sees the block's buffers as the first one did, so gradients and buffers are those of a single run, bit for
bit. It moves no state and knows nothing of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sixfold.parallel.tensor.crossing import SUMS

Forward = Callable[..., Any]
"""`forward(block, *args, **kwargs)`, as a class defines it."""

Recompute = Literal["full", "selective"]

_PRODUCTS = ("mm", "addmm", "_grouped_mm", "_scaled_mm", "convolution")
"""Products of activations with weights: nearly all of a block's arithmetic, in tensors of its width.

Batched products are left out: between activations (scores of written-out attention) they are large and cheap.
"""

_ATTENTION = {
    "_scaled_dot_product_flash_attention": 3,
    "_scaled_dot_product_flash_attention_for_cpu": 3,
    "_scaled_dot_product_efficient_attention": 5,
    "_scaled_dot_product_cudnn_attention": 5,
    "_scaled_dot_product_fused_attention_overrideable": 4,
}
"""Fused attention kernels -> the place of `dropout_p` among their arguments."""


def recomputed(forward: Forward, kind: Recompute) -> Forward:
    """`forward`, saving less for backward.

    Args:
        forward: of a block; may take and return anything.
        kind: "full" saves the block's inputs alone; "selective" also the results of matrix products with
            weights, of sums over the tensor axis and of fused attention, and recomputes the rest (norms,
            activations, dropout, rotations).

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; selective after Korthikanti et
    al. 2022, "Reducing Activation Recomputation in Large Transformer Models".
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        num_args, names = len(args), tuple(kwargs)

        # All by position: torch looks there for the devices whose random state it has to put back, and for
        # tensors that were changed in place meanwhile.
        def again(*values: Any) -> Any:
            return forward(self, *values[:num_args], **dict(zip(names, values[num_args:], strict=True)))

        if torch.compiler.is_compiling():
            # A compiled graph recomputes by itself, without side effects.
            contexts: Any = {"context_fn": _SELECTIVE} if kind == "selective" else {}
        else:
            contexts = {"context_fn": functools.partial(_contexts, self, kind)}
        return checkpoint(again, *args, *kwargs.values(), use_reentrant=False, **contexts)

    return run


def saves(_context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The policy of selective recompute: whether the result of one torch operation is kept.

    Fused attention with dropout is not: a kernel that does not run again would not draw again either, and all
    that is drawn after it in the block would differ. Nor are gathers over the tensor axis, as large as what
    they are parts of: they run again.
    """
    if op is torch.ops.sixfold.exchange.default and args[1] not in SUMS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    place = _KEPT.get(op)
    if place is None or (place < len(args) and args[place] > 0):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def _ops(places: dict[str, int]) -> dict[Any, int]:
    """Names of torch operations as operations; those that this version or build lacks are left out."""
    aten = torch.ops.aten
    return {getattr(aten, name).default: place for name, place in places.items() if hasattr(aten, name)}


_NEVER = 1 << 30
_KEPT = _ops(dict.fromkeys(_PRODUCTS, _NEVER) | _ATTENTION)
_KEPT[torch.ops.sixfold.exchange.default] = _NEVER
_SELECTIVE = functools.partial(create_selective_checkpoint_contexts, saves)

_Context = AbstractContextManager[Any]


def _contexts(block: nn.Module, kind: Recompute) -> tuple[_Context, _Context]:
    first, second = _SELECTIVE() if kind == "selective" else (nullcontext(), nullcontext())
    buffers = [
        (owner, name, buffer.clone())
        for owner in block.modules()
        if owner.training
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    return first, _AsBefore(buffers, second) if buffers else second


class _AsBefore(AbstractContextManager[None]):
    """Run again on buffers as they were before the first run; what it makes of them is dropped.

    Entered once for every backward through the block, so it is no generator.
    """

    def __init__(self, buffers: list[tuple[nn.Module, str, torch.Tensor]], inner: _Context) -> None:
        self._before, self._inner = buffers, inner

    def __enter__(self) -> None:
        self._current = [(owner, name, getattr(owner, name)) for owner, name, _ in self._before]
        for owner, name, before in self._before:
            setattr(owner, name, before.clone())
        self._inner.__enter__()

    def __exit__(self, *raised: Any) -> None:
        try:
            self._inner.__exit__(*raised)
        finally:
            for owner, name, buffer in self._current:
                setattr(owner, name, buffer)
