"""Which checkpoints a folder holds: the newest complete one, and which to remove.

The training loop asks for `latest` to resume and calls `prune` after a save. Folders that are not
complete are never chosen; only hidden leftovers of this room and checkpoints beyond `keep_last` are ever
removed. It reads manifests, never tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.files import Files
from sixfold.checkpoint.manifest import Manifest, OtherVersionError, read_manifest
from sixfold.checkpoint.remote import folder_at, is_remote, staging_leftovers

_TEMPORARY = ".tmp-"
_OLD = ".old-"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Which complete checkpoints of a folder stay.

    Args:
        last: as many of the newest.
        every: besides, those after a multiple of so many updates; None: no others.

    Raises:
        CheckpointError: fewer than one.
    """

    last: int
    every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("every", self.every)):
            if value is not None and value < 1:
                raise CheckpointError(
                    f"keep_{name} is {value}",
                    rule="at least the newest checkpoint is kept, and steps are counted from 1",
                    fix=f"set checkpoint.keep_{name} to 1 or more",
                )

    def surplus(self, steps: list[int]) -> list[int]:
        """Places in `steps`, oldest save first, of what goes."""
        return [
            place for place, step in enumerate(steps[: -self.last]) if self.every is None or step % self.every
        ]


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
    found = complete(folder_at(folder))
    return found[-1][0] if found else None


def prune(folder: Path | str, keep: Keep, *, files: Files | None = None) -> tuple[Path, ...]:
    """Remove all complete checkpoints but those to keep, and what broken saves left behind.

    To be called while no save into this folder is under way. Returns the checkpoints removed.
    """
    files, folder = files or Files(), folder_at(folder)
    leftovers, surplus = removable(folder, keep)
    try:
        for path in leftovers:
            files.remove(path)
        for path in surplus:
            if is_remote(path):
                files.remove(path)
                continue
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


def removable(folder: Path, keep: Keep) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """What `prune` would remove: leftovers of broken saves, and complete checkpoints."""
    found = complete(folder)
    places = keep.surplus([manifest.step for _, manifest in found])
    return tuple(_leftovers(folder, {path for path, _ in found})), tuple(found[at][0] for at in places)


def next_serial(folder: Path) -> int:
    """The serial number of the next save into a folder: one more than any that is readable there."""
    found = (manifest.serial for _, manifest in scan(folder) if isinstance(manifest, Manifest))
    return 1 + max(found, default=0)


def _leftovers(folder: Path, complete: set[Path]) -> list[Path]:
    """Temporary folders, on this host where the folder is remote, and replaced checkpoints whose replacement
    is there."""
    staged = staging_leftovers(folder) if is_remote(folder) else []
    return staged + [
        path
        for path in sorted(folder.glob(".*-*"))
        if path.is_dir()
        and (
            path.name.startswith(_TEMPORARY)
            or (path.name.startswith(_OLD) and path.with_name(path.name.removeprefix(_OLD)) in complete)
        )
    ]


def complete(folder: Path) -> list[tuple[Path, Manifest]]:
    """Complete checkpoints, oldest first."""
    found = []
    for path, manifest in scan(folder):
        if isinstance(manifest, OtherVersionError):
            raise manifest
        if isinstance(manifest, Manifest):
            found.append((path, manifest))
        elif not path.name.startswith(_OLD):
            _log.warning("passed over %s: %s", path, manifest.given)
    return sorted(found, key=lambda pair: (pair[1].serial, pair[1].step, pair[0].name))


def scan(folder: Path) -> list[tuple[Path, Manifest | CheckpointError]]:
    """Every folder inside that could be a checkpoint, with its manifest or what is wrong with it."""
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
