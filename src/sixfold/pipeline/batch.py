"""Batches: count their samples, cut them into micro-batches, hand them to a module.

A batch is a tensor, or a mapping, tuple or list of fields, nested at will; samples lie along dim 0.
Used by all of this room; nothing is copied, micro-batches are views.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from sixfold.base.errors import ModelError
from sixfold.models.chunks import IGNORED

Batch = Any
"""A tensor, or a mapping, tuple or list of fields, nested at will."""


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """All tensors of a batch with at least one dim, in order."""
    found, left = list[torch.Tensor](), [batch]
    while left:
        field = left.pop()
        if isinstance(field, torch.Tensor):
            if field.dim() > 0:
                found.append(field)
        elif isinstance(field, Mapping | tuple | list):
            left.extend(reversed(list(field.values() if isinstance(field, Mapping) else field)))
    return found


def lengths_of(batch: Batch) -> list[int]:
    """The different lengths that the tensors of a batch have along dim 0, in rising order."""
    return sorted(set(map(len, tensors_of(batch))))


_NUM_CHECKED = 4096
"""Numbers of each tensor that `checksum` looks at: another batch differs in those."""


def checksum(batch: Batch) -> int:
    """What tells two batches apart, 32 bits of the shape, type and first numbers of every tensor."""
    found = 0
    for tensor in tensors_of(batch):
        found = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), found)
        first = tensor.detach().reshape(-1)[:_NUM_CHECKED].cpu().contiguous()
        found = zlib.crc32(first.view(torch.uint8).numpy().tobytes(), found)
    return found


def num_samples(batch: Batch) -> int:
    """Samples in a batch: the length of its tensors; None or no fields are an empty batch.

    Where lengths differ (flat indices beside offsets, a mask beside inputs) it is the smallest.

    Raises:
        ModelError: there are fields, but no tensor among them.
    """
    if batch is None or (isinstance(batch, Mapping | tuple | list) and not batch):
        return 0
    tensors = tensors_of(batch)
    if not tensors:
        raise ModelError(
            f"a batch of {type(batch).__name__} without any tensor",
            rule="samples lie along dim 0 of the tensors of a batch",
            fix="hand over tensors, for example torch.as_tensor(values)",
        )
    return min(map(len, tensors))


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
    lengths = lengths_of(batch)
    if len(lengths) > 1:
        raise ModelError(
            f"a batch whose tensors have {', '.join(map(str, lengths))} entries along dim 0",
            rule=f"micro-batches of {micro} are cut along dim 0, so every tensor has one entry a sample",
            fix="give every field one entry per sample, or leave batch.micro unset",
        )

    return [_rows(batch, start, start + micro, total) for start in range(0, total, micro)]


def divide(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into so many micro-batches as equal as can be, some of them empty where samples are few."""
    total = num_samples(batch)
    borders = [total * part // parts for part in range(parts + 1)]
    return [_rows(batch, start, stop, total) for start, stop in pairwise(borders)]


def targets_of(batch: Batch) -> torch.Tensor | None:
    """The labels: the integer field of that name, else the first integer tensor with -100 in it. None: there
    are none, or they are not known from other numbers, and all count."""
    named = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(named, torch.Tensor):
        return named if named.dim() and not named.is_floating_point() else None
    for tensor in tensors_of(batch):
        if not tensor.dtype.is_floating_point and tensor.dtype.is_signed and bool((tensor == IGNORED).any()):
            return tensor
    return None


def with_targets(batch: Batch) -> Batch:
    """A batch of which every label counts: those that did not are 0."""
    targets = targets_of(batch)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.masked_fill(tensor == IGNORED, 0) if tensor is targets else tensor

    return batch if targets is None else change_tensors(batch, fill)


def without_targets(batch: Batch) -> Batch:
    """One sample shaped as those of `batch`, of which no label counts."""

    def one(name: str, field: Any) -> Any:
        if not isinstance(field, torch.Tensor) or not field.dim():
            return field
        is_mask = name == "attention_mask" and not field.is_floating_point()
        fill = IGNORED if name in ("labels", "shift_labels") else int(is_mask)
        return field.new_full((1, *field.shape[1:]), fill)

    if not isinstance(batch, Mapping):
        return change_tensors(batch, lambda field: one("", field))
    return {name: one(name, field) for name, field in batch.items()}


def to_device(batch: Batch, device: torch.device, floating: torch.dtype | None) -> Batch:
    """Move tensors to `device`, floating ones to the type `floating` unless it is None."""

    def move(field: Any) -> Any:
        if not isinstance(field, torch.Tensor):
            return field
        cast = floating if floating is not None and field.is_floating_point() else None
        return field.to(device=device, dtype=cast or field.dtype, non_blocking=True)

    return _map(batch, move)


def cast_floating(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch with its floating tensors in another type."""
    return change_tensors(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def fields_of(
    batch: Batch, forward: Callable[..., Any], *, all_of_them: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for `forward`: a mapping by keyword, a sequence by position, a tensor alone.

    Args:
        all_of_them: pass every field. Otherwise a loss function takes the whole batch, and `forward`
            gets the fields it names, or of a sequence as many as it needs, at least one: the target
            that comes after the inputs is not an optional argument.
    """
    if not isinstance(batch, Mapping | tuple | list):
        return (batch,), {}
    parameters = inspect.signature(forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if isinstance(batch, Mapping):
        takes_any = all_of_them or inspect.Parameter.VAR_KEYWORD in kinds
        return (), {key: value for key, value in batch.items() if takes_any or key in parameters}
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        parameter
        for parameter in parameters.values()
        if parameter.kind in by_position and parameter.default is inspect.Parameter.empty
    ]
    return tuple(batch) if all_of_them else tuple(batch[: max(1, len(needed))]), {}


def _rows(batch: Batch, start: int, stop: int, total: int) -> Batch:
    """Samples [start, stop) of a batch of `total`; lists of texts or numbers, one a sample, are cut too."""
    if isinstance(batch, torch.Tensor):
        return batch[start:stop] if batch.dim() > 0 else batch
    if isinstance(batch, Mapping):
        return {key: _rows(value, start, stop, total) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        if len(batch) == total and all(isinstance(field, str | bytes | int | float) for field in batch):
            return batch[start:stop]
        parts = [_rows(field, start, stop, total) for field in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def change_tensors(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """A batch with all its tensors changed."""
    return _map(batch, lambda field: change(field) if isinstance(field, torch.Tensor) else field)


def _map(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_map(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return change(batch)
