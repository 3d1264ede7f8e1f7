"""Saving: a folder appears under its name complete, or not at all.

The engine calls `save` on the one rank that writes. Files go into a hidden sibling folder and are made
durable, the manifest last; then the folder is renamed. A kill at any moment leaves the previous or the
new checkpoint to find. It copies no tensor that already lies contiguous on the host, and never pickles.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sixfold.base.errors import CheckpointError, SaveError
from sixfold.base.units import bytes_text
from sixfold.checkpoint.content import Content, check_content
from sixfold.checkpoint.files import Buffer, Files, new_file
from sixfold.checkpoint.manifest import MANIFEST, STATE, FileEntry, Manifest, TensorEntry, read_manifest
from sixfold.checkpoint.retention import next_serial, old_name, temporary_name
from sixfold.checkpoint.tensorfile import TAGS, TensorFile, bytes_of, chunks_of, index_json, plan_files

MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class _Plan:
    """The files of one save, known before a byte is written."""

    tensor_files: tuple[tuple[str, TensorFile], ...]
    """Pairs of part and file."""
    other_files: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for _, file in self.tensor_files) + sum(map(len, self.other_files.values()))


def save(
    folder: Path | str, content: Content, *, max_file_bytes: int = MAX_FILE_BYTES, files: Files | None = None
) -> None:
    """Write one checkpoint folder; one that is already there under this name is replaced.

    Args:
        folder: the folder to appear; its parents are made.
        content: what it holds.
        max_file_bytes: tensor data per file before a part is cut into numbered files with an index.
        files: the file system.

    Raises:
        CheckpointError: the content cannot be saved, or the folder holds something else.
        SaveError: the disk refused. The previous checkpoint is untouched and no temporary folder is left.
    """
    files = files or Files()
    target = Path(os.path.abspath(folder))
    check_content(content)
    plan = _plan(content, max_file_bytes)
    temporary = temporary_name(target)
    try:
        _refuse_foreign(target)
        files.make_folder(target.parent)
        files.remove(temporary)
        if files.free_bytes(target.parent) < plan.num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(temporary, plan, content, files)
        _commit(temporary, target, files)
    except BaseException as error:
        with suppress(OSError):
            files.remove(temporary)
        if isinstance(error, OSError):
            raise _refused(target, plan.num_bytes, error, files) from error
        raise


def _plan(content: Content, max_file_bytes: int) -> _Plan:
    tensor_files: list[tuple[str, TensorFile]] = []
    other = {STATE: json.dumps(content.state, indent=1).encode()}
    for part, tensors in content.parts().items():
        specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        planned = plan_files(part, specs, max_file_bytes)
        tensor_files += [(part, file) for file in planned]
        if len(planned) > 1:
            other[f"{part}.safetensors.index.json"] = index_json(planned)
    taken = {MANIFEST, *other, *(file.name for _, file in tensor_files)}
    for name in content.extra_files:
        if not name or name in taken or name.startswith(".") or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"the extra file name {name!r} cannot be used",
                rule=f"an extra file has a plain name besides {', '.join(sorted(taken))}",
                fix=f"call it {'extra-' + Path(name).name.lstrip('.')!r}",
            )
    return _Plan(tuple(tensor_files), {**other, **content.extra_files})


def _refuse_foreign(target: Path) -> None:
    """A folder of the user's that is no checkpoint is never replaced."""
    if target.is_dir() and ((target / MANIFEST).exists() or not any(target.iterdir())):
        return
    if target.exists():
        raise CheckpointError(
            f"{target} exists and is not a checkpoint",
            rule="a save replaces an earlier checkpoint and nothing else",
            fix=f"save to a new name, such as {target / 'checkpoint'}"
            if target.is_dir()
            else f"save to a new name, such as {target.with_name(target.name + '-checkpoint')}",
        )


def _write(temporary: Path, plan: _Plan, content: Content, files: Files) -> None:
    """All files of a plan into a new folder, the manifest last; everything is durable afterwards."""
    serial = next_serial(temporary.parent)
    files.make_folder(temporary)
    parts = content.parts()
    entries: list[FileEntry] = []
    tensors: list[TensorEntry] = []
    for part, file in plan.tensor_files:
        entry, placed = _write_tensors(temporary, part, file, parts[part], files)
        entries.append(entry)
        tensors += placed
    entries += [_write_bytes(temporary / name, data, files) for name, data in plan.other_files.items()]
    step = content.state["step"]
    if not isinstance(step, int):
        raise AssertionError(f"check_content let the step {step!r} through")
    manifest = Manifest(
        step=step,
        serial=serial,
        files=tuple(entries),
        tensors=tuple(tensors),
        aliases=dict(content.aliases),
    )
    _write_bytes(temporary / MANIFEST, manifest.to_bytes(), files)
    files.sync_folder(temporary)


def _write_tensors(
    folder: Path, part: str, file: TensorFile, tensors: Mapping[str, Tensor], files: Files
) -> tuple[FileEntry, list[TensorEntry]]:
    placed: dict[str, TensorEntry] = {}
    with new_file(files, folder / file.name) as sink:
        sink.add([file.header])
        for slot in file.slots:
            crc = sink.add(chunks_of(bytes_of(tensors[slot.name])))
            placed[slot.name] = TensorEntry(
                part=part,
                name=slot.name,
                file=file.name,
                dtype=TAGS[slot.dtype],
                shape=slot.shape,
                start=slot.start,
                stop=slot.stop,
                crc32=crc,
            )
    entry = FileEntry(name=file.name, size=sink.size, crc32=sink.crc32)
    return entry, [
        placed[name] for name in tensors if name in placed
    ]  # in the caller's order, not the file's


def _write_bytes(path: Path, data: Buffer, files: Files) -> FileEntry:
    with new_file(files, path) as sink:
        sink.add([data])
    return FileEntry(name=path.name, size=sink.size, crc32=sink.crc32)


def _commit(temporary: Path, target: Path, files: Files) -> None:
    """Give a complete folder its name.

    A folder that is not empty cannot be renamed over, so an earlier checkpoint steps aside first; until
    the new one has the name, readers find the earlier one under its `old_name`.
    """
    old = old_name(target)
    if target.exists():
        if _is_complete(target):
            files.remove(old)
            files.rename(target, old)
        else:
            files.remove(target)
    files.rename(temporary, target)
    files.sync_folder(target.parent)
    files.remove(old)


def _is_complete(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _refused(target: Path, needed: int, error: OSError, files: Files) -> SaveError:
    try:
        free = bytes_text(files.free_bytes(target.parent))
    except OSError:
        free = "an unknown amount of space"
    given = f"saving {target} failed: {error.strerror or error} ({bytes_text(needed)} needed, {free} free)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SaveError(
            given,
            rule="a new checkpoint is written beside the previous one before it replaces anything",
            fix=f"free {bytes_text(needed)} on the disk of {target.parent}, or save to another disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SaveError(
            given,
            rule=f"the folder {target.parent} must be writable",
            fix=f"`chmod u+w {target.parent}` as its owner, or save to a folder of your own",
        )
    return SaveError(
        given,
        rule="every file must be written and made durable before the checkpoint gets its name",
        fix=f"check the file system of {target.parent}, or save to another one; the previous one is intact",
    )
