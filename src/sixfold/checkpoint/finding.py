"""Which checkpoints there are, as far as their manifests tell.

`reading` opens what is found here, `sixfold ckpt` lists it. No tensor library is loaded, so that what is
mistyped is told at once; no other file is read, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from sixfold.checkpoint.remote import folder_at
from sixfold.checkpoint.retention import old_name, scan

CHECKPOINTS = "checkpoints"
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
        return [_found(*find(folder))]
    if not folder.is_dir():
        raise _no_folder(folder)
    inside = folder / CHECKPOINTS
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


def find(folder: Path | str) -> tuple[Path, Manifest]:
    """The folder of one complete checkpoint, and its manifest; checks the size of every file.

    Raises:
        CheckpointError: not a checkpoint, not complete, damaged, or of another format version.
    """
    folder = folder_at(folder)
    if not (folder / MANIFEST).exists() and (old_name(folder) / MANIFEST).exists():
        folder = old_name(folder)  # a save that replaced it was killed before its own had the name
    if not folder.is_dir():
        raise _no_folder(folder)
    try:
        return folder, read_manifest(folder)
    except CheckpointError as error:
        inside = _newest(folder)
        if inside is None:
            raise
        raise CheckpointError(
            error.given, rule=error.rule, fix=f"open the newest inside it: {inside}"
        ) from error


def _no_folder(folder: Path) -> CheckpointError:
    near = nearest(folder.name, (path.name for path in folder.parent.glob("*") if path.is_dir()))
    newest = _newest(folder.parent)
    if near:
        fix = f"did you mean {folder.with_name(near)}?"
    else:
        fix = f"open {newest}" if newest else "name the folder that `save` was given, or its parent"
    what = "a file" if folder.exists() else "not there"
    return CheckpointError(f"{folder} is {what}", rule="a checkpoint is a folder", fix=fix)


def _newest(folder: Path) -> Path | None:
    """The checkpoint saved last of those inside; whatever else lies there is nothing to talk of."""
    found = [(one.serial, one.step, path) for path, one in scan(folder) if isinstance(one, Manifest)]
    return max(found)[-1] if found else None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of some names."""
    return next(iter(get_close_matches(name, list(names), n=1)), None)
