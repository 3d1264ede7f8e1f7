"""The run folder: where a run keeps its configuration, metrics, logs and checkpoints.

Made by rank 0 or by the launcher; read again by `--resume`. It knows names of files, not their content.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sixfold.base.errors import CheckpointError, ConfigError, SaveError
from sixfold.checkpoint import latest
from sixfold.checkpoint.finding import CHECKPOINTS
from sixfold.checkpoint.remote import is_remote
from sixfold.config import Resolved
from sixfold.config.resolved import CONFIG

ADAPTER_FOLDER = "adapter"
_LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_log = logging.getLogger(__name__)


def check_place(into: Path | None, parent: Path) -> None:
    """Notice, before anything costs time, that no run folder can be made `into` a place or under `parent`.

    Raises:
        ConfigError: a file is in the way, the place cannot be written, or `into` holds a run.
    """
    folder = into if into is not None else parent
    if into is not None:
        _refuse_second_run(into)
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise _unwritable(folder, errno.ENOTDIR)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, errno.EACCES)


def make_folder(into: Path | None, parent: Path) -> Path:
    """The folder of a new run: `into` where it is given, else one named after the time under `parent`.

    Raises:
        ConfigError: `into` holds another run, or the place cannot be written.
    """
    return open_folder(into) if into is not None else new_folder(parent)


def new_folder(parent: Path) -> Path:
    """Make an empty run folder named after the time, under `parent`.

    Raises:
        ConfigError: `parent` cannot be written.
    """
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            folder = parent / f"{stamp}{suffix}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise _unwritable(parent, error.errno) from error
    raise AssertionError(f"a thousand runs began in {parent} within one second")


def open_folder(folder: Path) -> Path:
    """Make `folder` unless it is there and empty.

    Raises:
        ConfigError: it holds another run, or cannot be written.
    """
    _refuse_second_run(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.errno) from error
    return folder


def run_at(folder: Path) -> Path:
    """`folder`, which a run has made.

    Raises:
        CheckpointError: there is no run in it.
    """
    if not (folder / CONFIG).is_file():
        why = f"there is no {CONFIG} in it" if folder.is_dir() else "it is no folder"
        places = (folder, folder.parent, Path("runs"))
        near = next((runs for place in places if (runs := sorted(place.glob(f"*/{CONFIG}"))[-3:])), None)
        raise CheckpointError(
            f"{folder} is no run: {why if folder.exists() else 'it does not exist'}",
            rule="a run is named by the folder that `sixfold train` made for it",
            fix=f"name one of: {', '.join(str(found.parent) for found in near)}"
            if near
            else "look where train.folder or --into put it; unset: under runs/",
        )
    return folder


def run_around(folder: Path) -> Path | None:
    """The run whose folder this is, or the one of its checkpoints; None where it belongs to none, or lies
    behind a URL, as no run does that trains."""
    if is_remote(folder):
        return None
    near = (folder, folder.absolute().parent)
    return next((each for each in near if (each / CONFIG).is_file()), None)


def checkpoint_of(folder: Path, asked: Path | None) -> Path:
    """The checkpoint of a run that was `asked` for; None for the newest.

    Raises:
        CheckpointError: there is no run, no complete checkpoint in it, or not the one that was asked for.
    """
    run_at(folder)
    if asked is not None and asked.is_dir():
        return asked
    newest = latest(folder / CHECKPOINTS)
    if asked is not None:
        raise CheckpointError(
            f"--checkpoint {asked} is no folder",
            rule="a checkpoint of the run is named by its folder; unset, it is the newest",
            fix=f"give --checkpoint {newest}" if newest is not None else "leave --checkpoint out",
        )
    if newest is None:
        raise CheckpointError(
            f"{folder / CHECKPOINTS} holds no complete checkpoint",
            rule="texts are continued by the model of a checkpoint",
            fix="let the run come to its first save, or set checkpoint.every",
        )
    return newest


def write_config(folder: Path, resolved: Resolved) -> None:
    """Write the resolved configuration with the origin of every value; see `write_file`."""
    write_file(folder / CONFIG, resolved.to_toml().encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a run folder, or of a folder in it. Whatever stops it leaves what was there before.

    Raises:
        SaveError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder against every other process that would change it. The system lets go of it when this
    one ends, however it does. On a file system without locks nobody is kept off, which is told.

    Raises:
        ConfigError: another process holds it.
        SaveError: it cannot be written.
    """
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"{folder} is in use: another process trains this run, or removes checkpoints of it",
            rule="a run folder is changed by one process at a time",
            fix=f"wait for its end, or begin a run of your own with --config {folder / CONFIG}",
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
            raise _unwritten(folder / _LOCK, error) from error
        _log.warning("%s cannot be locked: see that no other process changes this run meanwhile", folder)
    try:
        yield
    finally:
        lock.release()


def _refuse_second_run(folder: Path) -> None:
    if os.path.exists(folder / CONFIG):  # unlike Path.exists, no error where a parent is closed to us
        raise ConfigError(
            f"--into {folder}: a run is there already",
            rule="a run folder holds one run",
            fix=f"go on with it by --resume {folder}, or name another folder",
        )


def _unwritten(path: Path, error: OSError) -> SaveError:
    # A run that is there already goes on where it is.
    is_there = any((folder / CONFIG).exists() for folder in path.parents[:2])
    elsewhere = ", or give --into or train.folder a place that has some"
    return SaveError(
        f"{path} cannot be written: {error.strerror}",
        rule="a run keeps its configuration, vocabulary, checkpoints and adapters in its folder",
        fix=f"free some space there{'' if is_there else elsewhere}",
    )


def _unwritable(folder: Path, code: int | None) -> ConfigError:
    return ConfigError(
        f"cannot make the run folder {folder}: {os.strerror(code or errno.EIO)}",
        rule="a run writes its configuration, metrics and checkpoints into a folder of its own",
        fix="set train.folder, or give --into, to a folder that can be written",
    )
