"""The context axis as `parallel/axes.py` knows it: what it refuses of a model, and what it changes.

Parameters stay as they are. While the engine lives, calls of attention inside the model go to
`ContextAttention`, and Hugging Face models take the implementation that makes such calls. Whether nothing
else in the model mixes tokens is tried on the first batch (`pipeline/trials.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import gcd
from typing import Any

from torch import Tensor, nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Mesh
from sixfold.parallel.change import AxisChange, Case, Note, Remove
from sixfold.parallel.context.attention import OFF, ContextAttention
from sixfold.parallel.context.calls import answer_calls
from sixfold.parallel.facts import BATCH_NORMS, ROUTER_LOGITS
from sixfold.plan import Geometry

_CALLS = "sdpa"
"""What Hugging Face calls attention by torch's own function."""


def decide_context_axis(case: Case) -> AxisChange:
    """See `parallel.axes`.

    Raises:
        ModelError: the model takes batch statistics, or its attention cannot be had by torch's function, or
            its loss is no sum over tokens.
    """
    model, layout = case.model, case.layout
    if getattr(getattr(model, "config", None), ROUTER_LOGITS, False):
        raise ModelError(
            f"layout.context = {layout.context} with {type(model).__name__} and {ROUTER_LOGITS}",
            rule="a penalty on how all tokens are routed is no sum over the parts of a sequence",
            fix=f"set {ROUTER_LOGITS} = False in the model's configuration, or {OFF}",
        )
    norms = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    if norms:
        raise ModelError(
            f"layout.context = {layout.context} with {len(norms)} BatchNorm layer(s), first {norms[0]}",
            rule="statistics over tokens would be those of each rank's part",
            fix=f"use LayerNorm or GroupNorm, or {OFF}",
        )
    attention = ContextAttention(is_compiled=layout.compile is not None)
    return AxisChange(
        apply=partial(_apply, model, attention),
        attention=attention,
        trace=partial(_traced, model, case.geometry),
    )


def _traced(model: nn.Module, geometry: Geometry, note: Note) -> Remove:
    """See `AxisChange.trace`: what attention exchanges."""
    num_ranks, tensor = geometry.degree("context"), geometry.degree("tensor")

    def noting(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads, kv_heads = -(-query.shape[1] // tensor), -(-key.shape[1] // tensor)
        swapped = gcd(num_ranks, kv_heads)
        # Bytes of this rank's rows of one head, in two chunks.
        row = query[:, 0, 0].nbytes * 2 * -(-query.shape[2] // (2 * num_ranks))
        if swapped > 1:
            note("heads", row * (heads + 2 * kv_heads) * (swapped - 1) // swapped)
            note("rows", row * heads * (swapped - 1) // swapped)
        if swapped < num_ranks:
            note("ring", 2 * row * kv_heads)
            note("ring of sums", 2 * row * kv_heads * max(4, key.itemsize) // key.itemsize)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    with ExitStack() as undo:
        undo.callback(take_implementation(model))
        undo.callback(answer_calls(model, lambda: noting))
        return undo.pop_all().close


def _apply(model: nn.Module, attention: ContextAttention, mesh: Mesh) -> Remove:
    attention.met = mesh.along("context")
    with ExitStack() as undo:
        # Graphs that were compiled outlive the engine, and what they know of.
        undo.callback(setattr, attention, "met", None)
        undo.callback(take_implementation(model))
        undo.callback(answer_calls(model, attention.answer))
        return undo.pop_all().close


def take_implementation(model: nn.Module) -> Callable[[], None]:
    """Have a Hugging Face model call torch's function for attention; returns what puts its own way back.

    Raises:
        ModelError: it has no such way.
    """
    choose: Any = getattr(model, "set_attn_implementation", None)
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if choose is None or own is None or own == _CALLS:
        return lambda: None
    try:
        choose(_CALLS)
    except ValueError as error:
        raise ModelError(
            f"layout.context with {type(model).__name__} and its attention {own!r}: {error}"[:400],
            rule="attention across ranks stands in for torch's scaled_dot_product_attention",
            fix=OFF,
        ) from error
    return partial(choose, own)
