"""How long sequences may be before a Hugging Face model treats a part of one otherwise than the whole.

Asked by `pipeline/sequence.py`. Such models decide by the length that they see whether a window applies or
positions are scaled, and a short trial does not show it. It reads the model's configuration alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention")
_SCALED = ("dynamic", "longrope")
"""Kinds of rotary positions whose angles depend on the longest position seen."""


def length_limits(model: nn.Module) -> dict[str, int]:
    """The longest sequence that may be cut, by the setting that says so; none where nothing depends on it."""
    found: dict[str, int] = {}
    for config in _configs(getattr(model, "config", None)):
        found |= {name: value for name, value in _windows(config) if value > 0}
        for rope in _tables(getattr(config, "rope_parameters", None)):
            if rope.get("rope_type") in _SCALED:
                own = getattr(config, "max_position_embeddings", 0)
                found[f"rope_type {rope['rope_type']}"] = rope.get("original_max_position_embeddings") or own
    return found


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    if hasattr(config, "model_type"):
        yield config
        for part in vars(config).values():
            yield from _configs(part)


def _windows(config: Any) -> Iterator[tuple[str, int]]:
    kinds = getattr(config, "layer_types", None)
    is_off = getattr(config, "use_sliding_window", True) is False
    is_whole = kinds is not None and all(kind == "full_attention" for kind in kinds)
    if not (is_off or is_whole):
        for name in _WINDOWS:
            value = getattr(config, name, None)
            if isinstance(value, int):
                yield name, value


def _tables(rope: Any) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary positions, which may be told for each kind of layer."""
    if isinstance(rope, Mapping):
        yield rope
        for part in rope.values():
            yield from _tables(part)
