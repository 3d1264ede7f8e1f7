"""The model part of a checkpoint as a folder of its own, as Hugging Face tools know it.

Called by `sixfold export`. The files are taken as they lie, verified and linked where the file system can,
else copied; tensors are never converted.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from sixfold.base.errors import CheckpointError
from sixfold.checkpoint.content import MODEL, OPTIMIZER
from sixfold.checkpoint.manifest import STATE
from sixfold.checkpoint.reading import Saved
from sixfold.checkpoint.remote import is_remote, open_bytes


def export_files(saved: Saved) -> tuple[str, ...]:
    """The files of a checkpoint that make up the model: tensors, index, and what describes it."""
    tensors = {entry.file for entry in saved.manifest.tensors if entry.part != MODEL}
    inner = {STATE, f"{OPTIMIZER}.safetensors.index.json", *tensors}
    return tuple(file.name for file in saved.manifest.files if file.name not in inner)


def export(saved: Saved, target: Path, *, link: bool = True) -> tuple[str, ...]:
    """Make `target`, a folder with the model alone; returns its files.

    Args:
        link: share the bytes with the checkpoint where one file system holds both. Neither may then be
            edited in place; removing either is safe.

    Raises:
        CheckpointError: a file is damaged, or the folder exists or cannot be made.
    """
    names = export_files(saved)
    if target.exists():
        raise CheckpointError(
            f"{target} exists",
            rule="an export makes a new folder",
            fix=f"export to another name, such as {target.with_name(target.name + '-2')}",
        )
    saved.verify(names)
    unfinished = target.with_name(f".tmp-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        for name in names:
            if link and not is_remote(saved.folder):
                with suppress(OSError):  # other file systems, or one without links
                    os.link(saved.folder / name, unfinished / name)
                    continue
            with open_bytes(saved.folder / name) as read, (unfinished / name).open("wb") as written:
                shutil.copyfileobj(read, written)
        unfinished.rename(target)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"exporting to {target} failed: {error}",
            rule="the parent folder is writable and has room where files cannot be linked",
            fix="export beside the checkpoint, or to another disk",
        ) from error
    return names
