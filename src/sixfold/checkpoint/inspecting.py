"""Looking at checkpoints from outside: what a folder holds, and in what two checkpoints differ.

Called by `sixfold ckpt`. It reads, a tensor at a time, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.manifest import MANIFEST, Manifest
from sixfold.checkpoint.reading import Saved, open_checkpoint
from sixfold.checkpoint.retention import scan

RUN_FOLDER = "checkpoints"
"""Where a run folder keeps them."""


@dataclass(frozen=True)
class Found:
    """One folder that is a checkpoint or was to become one.

    Args:
        step: updates done; None where it is not complete.
        num_bytes: what a complete one takes.
        only: what it is limited to, where it holds a part of a model.
        problem: why it cannot be opened; None for a complete one.
    """

    path: Path
    step: int | None
    num_bytes: int | None
    only: str | None
    problem: str | None


def survey(folder: Path) -> list[Found]:
    """What lies in a folder of checkpoints or a run folder, or is the folder itself; oldest save first."""
    if (folder / MANIFEST).exists():
        return [_found(folder, open_checkpoint(folder).manifest)]
    inside = folder / RUN_FOLDER
    found = scan(inside if inside.is_dir() else folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoints",
            rule="a checkpoint, a folder of checkpoints or a run folder is looked at",
            fix="name the folder that `save` was given, or its parent",
        )
    complete = [pair for pair in found if isinstance(pair[1], Manifest)]
    ordered = sorted(complete, key=lambda pair: getattr(pair[1], "serial", 0))
    return [_found(*pair) for pair in [*(pair for pair in found if pair not in complete), *ordered]]


def _found(path: Path, manifest: Manifest | CheckpointError) -> Found:
    if isinstance(manifest, CheckpointError):
        return Found(path, None, None, None, manifest.given)
    return Found(path, manifest.step, sum(file.size for file in manifest.files), manifest.only, None)


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
