"""Which checkpoints a folder holds: the newest complete one, and which to remove.

The training loop asks for `latest` to resume and calls `prune` after a save. Folders that are not
complete are never chosen; only hidden leftovers of this room and checkpoints beyond `keep_last` are ever
removed. It reads manifests, never tensors.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.files import Files
from sixfold.checkpoint.manifest import Manifest, OtherVersionError, read_manifest

_TEMPORARY = ".tmp-"
_OLD = ".old-"

_log = logging.getLogger(__name__)


def step_folder(parent: Path, step: int) -> Path:
    """`parent/step-00000300`, the name under which a run saves."""
    return parent / f"step-{step:08d}"


def temporary_name(folder: Path) -> Path:
    """Where a folder is before it is complete, or while it is being removed."""
    return folder.with_name(_TEMPORARY + folder.name)


def old_name(folder: Path) -> Path:
    """Where a checkpoint waits while the one that replaces it takes its name."""
    return folder.with_name(_OLD + folder.name)


def latest(folder: Path | str) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints, or None.

    Newest is the one saved last. A damaged folder is passed over with a warning in the log.

    Raises:
        OtherVersionError: one of them was written by another version of the format; passing over it
            would silently go back in the run.
    """
    found = _complete(Path(folder))
    return found[-1][0] if found else None


def prune(folder: Path | str, keep_last: int, *, files: Files | None = None) -> tuple[Path, ...]:
    """Remove all complete checkpoints but the newest `keep_last`, and what broken saves left behind.

    To be called while no save into this folder is under way. Returns the checkpoints removed.
    """
    if keep_last < 1:
        raise CheckpointError(
            f"keep_last is {keep_last}",
            rule="at least the newest checkpoint is kept",
            fix="set checkpoint.keep_last to 1 or more",
        )
    files, folder = files or Files(), Path(folder)
    try:
        _remove_leftovers(folder, files)
        surplus = tuple(path for path, _ in _complete(folder)[:-keep_last])
        for path in surplus:
            # Out of sight in one operation, so that a kill leaves no half checkpoint under a good name.
            files.rename(path, temporary_name(path))
            files.remove(temporary_name(path))
    except OSError as error:
        raise CheckpointError(
            f"removing old checkpoints from {folder} failed: {error}",
            rule="the folder and what lies in it must be removable",
            fix=f"`chmod -R u+w {folder}` as its owner, or raise checkpoint.keep_last",
        ) from error
    return surplus


def next_serial(folder: Path) -> int:
    """The serial number of the next save into a folder: one more than any that is readable there."""
    found = (manifest.serial for _, manifest in _scan(folder) if isinstance(manifest, Manifest))
    return 1 + max(found, default=0)


def _remove_leftovers(folder: Path, files: Files) -> None:
    complete = {path for path, _ in _complete(folder)}
    for path in sorted(folder.glob(".*-*")):
        replaced = path.name.startswith(_OLD) and path.with_name(path.name.removeprefix(_OLD)) in complete
        if path.is_dir() and (replaced or path.name.startswith(_TEMPORARY)):
            files.remove(path)


def _complete(folder: Path) -> list[tuple[Path, Manifest]]:
    """Complete checkpoints, oldest first."""
    found = []
    for path, manifest in _scan(folder):
        if isinstance(manifest, OtherVersionError):
            raise manifest
        if isinstance(manifest, Manifest):
            found.append((path, manifest))
        elif not path.name.startswith(_OLD):
            _log.warning("passed over %s: %s", path, manifest.given)
    return sorted(found, key=lambda pair: (pair[1].serial, pair[1].step, pair[0].name))


def _scan(folder: Path) -> list[tuple[Path, Manifest | CheckpointError]]:
    """Every folder that could be a checkpoint, with its manifest or what is wrong with it."""
    if not folder.is_dir():
        return []
    found: list[tuple[Path, Manifest | CheckpointError]] = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and not path.name.startswith(_OLD)
        if hidden or not path.is_dir():
            continue
        try:
            found.append((path, read_manifest(path)))
        except CheckpointError as error:
            found.append((path, error))
    return found
