"""Folders behind a URL: object stores and whatever else fsspec knows, with the interface of `Path`.

Everything that reads takes them as it takes local folders. A save is made whole in a local folder first,
since such stores write no ranges and rename nothing, and then copied here, its manifest last. Those who write
or remove ask `is_remote`; this module knows no checkpoints.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import zlib
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from sixfold.base.errors import CheckpointError

_COPY_BYTES = 8 * 2**20


def folder_at(folder: str | Path) -> Path:
    """The folder that a local path or a URL such as "s3://bucket/run" names.

    Raises:
        CheckpointError: nothing here speaks the URL's protocol, or it was made a `Path` before.
    """
    text = str(folder)
    protocol, separator, rest = text.partition(":/")
    if not separator or len(protocol) < 2 or not protocol.replace("+", "").isalnum():
        return Path(os.path.abspath(Path(folder).expanduser()))
    if isinstance(folder, Path) and not rest.startswith("/"):
        raise CheckpointError(
            f"the folder {text!r} as a Path",
            rule="a Path folds the slashes of a URL",
            fix=f'hand it over as text: "{protocol}://{rest}"',
        )
    if isinstance(folder, str):
        # Only here: it loads fsspec, and most checkpoints are local.
        from upath import UPath

        try:
            found = UPath(folder)
            _ = found.fs  # made here, so that what it needs is missed here
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"the folder {text!r}: {error}",
                rule="fsspec has or finds a file system for the protocol of a URL",
                fix="install what the message names, such as `pip install s3fs`, or name a local folder",
            ) from error
        return cast(Path, found)
    return folder


def is_remote(folder: Path) -> bool:
    """Whether `folder_at` made it from a URL."""
    return not isinstance(folder, Path)


def staging_folder(folder: Path) -> Path:
    """Where a save of a remote folder is made, the same on all ranks of a host, in a folder for it alone."""
    return Path(tempfile.gettempdir()) / (_staged(folder.parent) + folder.name) / folder.name


def staging_place() -> str:
    """In words, equal on ranks that make a save of a remote folder together."""
    return f"{tempfile.gettempdir()} of host {socket.gethostname()}"


def staging_leftovers(parent: Path) -> list[Path]:
    """What saves of remote folders inside `parent` that were killed have left on this host."""
    return sorted(Path(tempfile.gettempdir()).glob(_staged(parent) + "*"))


def _staged(parent: Path) -> str:
    return f"sixfold-save-{zlib.crc32(str(parent).rstrip('/').encode()):08x}-"


def open_bytes(path: Path) -> BinaryIO:
    """A file to read from, unbuffered where it is local."""
    return cast(BinaryIO, path.open("rb") if is_remote(path) else FileIO(path, "rb"))


def copy_folder(source: Path, target: Path, first: str, last: str) -> None:
    """Copy the files of a folder: the one named `first` before all others, `last` when they are there."""
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in source.iterdir() if path.name not in (first, last))
    for name in (first, *names, last):
        with open_bytes(source / name) as read, (target / name).open("wb") as written:
            shutil.copyfileobj(read, written, _COPY_BYTES)


def remove_remote(folder: Path, first: str) -> None:
    """Remove a folder, if it is there, the file named `first` before all others."""
    found: Any = folder
    (folder / first).unlink(missing_ok=True)
    if folder.exists():
        found.fs.rm(found.path, recursive=True)
