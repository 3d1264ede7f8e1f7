"""In what two checkpoints differ.

Called by `sixfold ckpt diff`. It reads, a tensor at a time, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sixfold.checkpoint.reading import Saved


@dataclass(frozen=True)
class Difference:
    """One thing in which two checkpoints differ.

    Args:
        what: "model NAME", "optimizer NAME/KEY" or "state PATH".
        first: how it is in the first one, "absent" where it is not.
        second: how it is in the second one.
        largest: for numbers of one shape, the largest absolute difference.
    """

    what: str
    first: str
    second: str
    largest: float | None = None


def differences(first: Saved, second: Saved) -> list[Difference]:
    """All in which two checkpoints differ, whatever layouts wrote them; both are verified on the way."""
    found = []
    mine, theirs = _entries(first), _entries(second)
    for part, name in dict.fromkeys((*mine, *theirs)):
        here, there = (_text(entries.get((part, name))) for entries in (mine, theirs))
        if here != there:
            found.append(Difference(f"{part} {name}", here, there))
            continue
        one, other = (saved.read(part, name) for saved in (first, second))
        if not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            wide = torch.complex128 if one.is_complex() else torch.float64
            largest = float((one.to(wide) - other.to(wide)).abs().max())
            found.append(Difference(f"{part} {name}", here, there, largest))
    one_state, other_state = _flat("", first.state), _flat("", second.state)
    for path in dict.fromkeys((*one_state, *other_state)):
        here, there = (repr(state[path]) if path in state else "absent" for state in (one_state, other_state))
        if here != there:
            found.append(Difference(f"state {path}", here, there))
    return found


def _entries(saved: Saved) -> dict[tuple[str, str], Any]:
    return {(entry.part, entry.name): entry for entry in saved.manifest.tensors}


def _text(entry: Any) -> str:
    return f"{entry.dtype}{list(entry.shape)}" if entry is not None else "absent"


def _flat(path: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v for key, each in value.items() for k, v in _flat(f"{path}.{key}".lstrip("."), each).items()
        }
    if isinstance(value, list) and value:
        return {k: v for i, each in enumerate(value) for k, v in _flat(f"{path}[{i}]", each).items()}
    return {path: value}
