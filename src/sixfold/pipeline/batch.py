"""Batches: count their samples, cut them into micro-batches, hand them to a module.

A batch is a tensor, or a mapping, tuple or list of fields, nested at will; samples lie along dim 0.
Used by the engine and the player; nothing is copied, micro-batches are views.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from sixfold.base.errors import ModelError

Batch = Any
"""A tensor, or a mapping, tuple or list of fields, nested at will."""


def tensors_of(batch: Batch) -> Iterator[torch.Tensor]:
    """All tensors of a batch with at least one dim, in order."""
    if isinstance(batch, torch.Tensor):
        if batch.dim() > 0:
            yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for field in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(field)


def num_samples(batch: Batch) -> int:
    """Samples in a batch: the length of its first tensor; None or no fields are an empty batch."""
    if batch is None:
        return 0
    first = next(tensors_of(batch), None)
    return 0 if first is None else first.shape[0]


def split(batch: Batch, micro: int | None) -> list[Batch]:
    """Cut a batch into micro-batches of at most `micro` samples, in order.

    Raises:
        ModelError: it must be cut, and its tensors differ in length.
    """
    total = num_samples(batch)
    if total == 0:
        return []
    if micro is None or total <= micro:
        return [batch]
    lengths = sorted({tensor.shape[0] for tensor in tensors_of(batch)})
    if len(lengths) > 1:
        raise ModelError(
            f"a batch whose tensors have {', '.join(map(str, lengths))} entries along dim 0",
            rule=f"micro-batches of {micro} are cut along dim 0, so every tensor has one entry a sample",
            fix="give every field one entry per sample, or leave batch.micro unset",
        )

    def part(field: Any, start: int) -> Any:
        is_cut = isinstance(field, torch.Tensor) and field.dim() > 0
        return field[start : start + micro] if is_cut else field

    return [_map(batch, partial(part, start=start)) for start in range(0, total, micro)]


def to_device(batch: Batch, device: torch.device, floating: torch.dtype | None) -> Batch:
    """Move tensors to `device`, floating ones to the type `floating` unless it is None."""

    def move(field: Any) -> Any:
        if not isinstance(field, torch.Tensor):
            return field
        cast = floating if floating is not None and field.is_floating_point() else None
        return field.to(device=device, dtype=cast or field.dtype, non_blocking=True)

    return _map(batch, move)


def fields_of(
    batch: Batch, forward: Callable[..., Any], *, all_of_them: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for `forward`: a mapping by keyword, a sequence by position, a tensor alone.

    Args:
        all_of_them: pass every field. Otherwise (a loss function takes the whole batch too) only as
            many as the signature of `forward` accepts.
    """
    if not isinstance(batch, Mapping | tuple | list):
        return (batch,), {}
    names = inspect.signature(forward).parameters
    kinds = {parameter.kind for parameter in names.values()}
    if isinstance(batch, Mapping):
        takes_any = all_of_them or inspect.Parameter.VAR_KEYWORD in kinds
        return (), {key: value for key, value in batch.items() if takes_any or key in names}
    takes_any = all_of_them or inspect.Parameter.VAR_POSITIONAL in kinds
    return tuple(batch) if takes_any else tuple(batch[: len(names)]), {}


def _map(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_map(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return change(batch)
